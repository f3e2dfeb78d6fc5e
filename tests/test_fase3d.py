"""Fase3D: every part against a slow and obvious version, and what the whole model promises."""

import cmath
import itertools
import json
import math
import re
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from types import SimpleNamespace

import full_rows
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from shapes import wrong_shapes
from test_text import save_tokenizer
from torch import nn

import data
import fase3d
import train
from data import DataError, HubText, Stage, TinyText, augment, questions, room
from fase3d import (
    ADAPTERS,
    CURVES,
    FILTERS,
    SELECTORS,
    STAGES,
    TUNED,
    Config,
    CoordinateToken,
    Enhancer,
    FourierFilter,
    Initial,
    Merger,
    Model,
    Place,
    QFormer,
    Router,
    canonical,
    choose_seeds,
    curve_order,
    enhance,
    farthest_seeds,
    fourier_code,
    graph_pool,
    hilbert,
    load_adapters,
    morton,
    most_frequent,
    nearest_edges,
    nearest_to_centre,
    quantise,
    recipe,
    routed_linear,
    save_adapters,
    spectral_clusters,
    superpoint_mean,
    support,
    unhilbert,
    unit_box,
    unmorton,
    vote_graph,
    windowed_filter,
)

SMALL = dict(points=608, dim=24, hidden=20, heads=4, window=16, tokens=14, prompt_neighbours=5, rank=4, alpha=4,
             filter_heads=8)  # fmt: skip
TINY = dict(width=32, attention_heads=2, ffn=48, layers=3, adapted_layers=2)
SYMBOLS, WORDS, TOKENIZER, TOKENS = (
    Stage(v, {}, ("tokenizer",), v) for v in ("symbols", "words", "tokenizer", "tokens")
)
MIX = {"count": 2, "id_category": 2, "id_colour": 1, "caption": 1, "what": 1}
FAMILIES = ("qwen", "llama", "opt")


def make(text, seed=0, **changes):
    torch.manual_seed(seed)
    model = Model(Config.tiny(**{**SMALL, **TINY, "no_colour": 0.0, **changes}), text)
    model.configure_stage(TOKENS)
    return model


def asked(scenes, count=3, mix=MIX):
    rng = np.random.default_rng(0)
    return [(s, questions(s, mix, count, rng)) for s in scenes]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text():
    return TinyText(data.vocabulary())


@pytest.fixture(scope="module")
def scenes():
    """Three rooms with different numbers of objects and superpoints, mirrored or not."""
    rng = np.random.default_rng(0)
    found = [augment(room(s, objects=n, views=0, points=700), rng) for s, n in ((0, 9), (1, 12), (4, 7))]
    assert len({s.turn.tobytes() for s in found}) > 1
    assert len({int(s.superpoints.max()) for s in found}) == 3
    return found


@pytest.fixture(scope="module")
def hubs(tmp_path_factory):
    """Folders with a small Qwen2 (tied word vectors, grouped keys), Llama and OPT and a tokenizer, as pre-trained
    models lie on disk; weights large enough for answers that vary, and a generation config as real ones bring it."""
    from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, Qwen2Config

    same = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, pad_token_id=0, bos_token_id=1)
    rope = dict(intermediate_size=40, **same)
    configs = dict(
        qwen=lambda **k: Qwen2Config(num_key_value_heads=2, tie_word_embeddings=True, **rope, **k),
        llama=lambda **k: LlamaConfig(tie_word_embeddings=False, **rope, **k),
        opt=lambda **k: OPTConfig(ffn_dim=40, word_embed_proj_dim=32, max_position_embeddings=1024, **same, **k),
    )
    found = {}
    for family, config in configs.items():
        folder = tmp_path_factory.mktemp(family)
        text = HubText(save_tokenizer(folder))
        torch.manual_seed(0)
        llm = AutoModelForCausalLM.from_config(config(vocab_size=len(text), eos_token_id=text.eos))
        for p in llm.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=2 * p.shape[1] ** -0.5)
        llm.generation_config.repetition_penalty, llm.generation_config.do_sample = 1.5, True
        llm.save_pretrained(folder)
        found[family] = SimpleNamespace(name=str(folder), text=text)
    return found


def load(hub, seed=0, **changes):
    torch.manual_seed(seed)
    model = Model(Config(llm=hub.name, **{**SMALL, "adapted_layers": 2, **changes}), hub.text)
    model.configure_stage(TOKENS)
    return model.eval()


def base(hub):
    """The same language model as anybody loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(hub.name).eval()


@torch.no_grad()
def wake(model, seed=1):
    """Adapters and filter as after training: LoRA starts at B = 0 and the filter at the identity."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
        if name.startswith("filters."):
            p.copy_(1 + torch.randn(p.shape, generator=g))
    return model


@torch.no_grad()
def told(model, groups):
    """Logits [A, vocabulary] of every answer token, in the order of the questions."""
    seen = []
    hook = model.llm.lm_head.register_forward_hook(lambda module, given, out: seen.append(out))
    out = model(model.batch(groups))
    hook.remove()
    return seen[0].float(), out


# ---- 1 token initialisation ------------------------------------------------------------------------------------------


def test_the_fourier_code_equals_its_formula():
    """sin of all phases, then cos: phase 100 x / 1000^(i / F), axis by axis."""
    x = torch.rand(2, 3, 3)
    code = fourier_code(x, 24)
    assert code.shape == (2, 3, 24)
    for a, b in itertools.product(range(2), range(3)):
        phase = [100 * float(c) / 1000 ** (i / 4) for c in x[a, b] for i in range(4)]
        assert code[a, b].tolist() == pytest.approx([*map(math.sin, phase), *map(math.cos, phase)], abs=2e-5)
    with pytest.raises(ValueError, match=r"^fourier_code: dim = 32 is not a multiple of 6"):
        fourier_code(x, 32)


def test_the_unit_box_is_the_scenes_own_and_a_flat_axis_is_zero():
    """One scan flat in z beside another must not borrow its height."""
    points = torch.randn(40, 3) * torch.tensor([1.0, 5.0, 2.0])
    scene = torch.arange(40) // 25
    points[25:, 2] = 0.7
    unit = unit_box(points, scene)
    for b in range(2):
        mine = points[scene == b]
        span = mine.amax(0) - mine.amin(0)
        expected = (mine - mine.amin(0)) / torch.where(span > 0, span, 1)
        assert torch.equal(unit[scene == b], expected) and torch.equal(unit_box(mine), expected)
    assert (unit[25:, 2] == 0).all() and unit[:25].amax(0).tolist() == [1, 1, 1]


def test_superpoint_features_equal_equation_1_point_by_point():
    """The mean over a superpoint may be taken before the last linear map: it is linear. N, channels, hidden and d all
    differ."""
    torch.manual_seed(0)
    N, channels, hidden, d, M = 50, 6, 10, 12, 7
    initial = Initial(channels, hidden, d)
    f, p, owner = torch.randn(N, channels), torch.rand(N, 3), torch.arange(N) * 5 % M
    S = initial(f, p, owner, M)
    x = initial.out(F.gelu(initial.norm(initial.lift(f)))) + fourier_code(p, d)  # [N, d] of every point
    assert S.shape == (M, d)
    for m in range(M):
        assert torch.allclose(S[m], torch.stack([x[n] for n in range(N) if owner[n] == m]).mean(0), atol=1e-5)


# ---- 2 serialization -------------------------------------------------------------------------------------------------


def full_grid(bits):
    side = torch.arange(2**bits)
    return torch.cartesian_prod(side, side, side).int()


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_consecutive_hilbert_keys_of_a_full_grid_are_face_neighbours(bits):
    """The property for which the curve is used: what is near in the sequence is near in the room."""
    steps = unhilbert(torch.arange(8**bits), bits).diff(dim=0).abs()
    assert (steps.sum(1) == 1).all()


@pytest.mark.parametrize(("keys", "cells"), [(morton, unmorton), (hilbert, unhilbert)], ids=["morton", "hilbert"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 10, 16])
def test_keys_are_bijections_with_exact_inverses(keys, cells, bits):
    """Onto 0 .. 8^bits - 1; the largest sizes are sampled, corners included."""
    if bits <= 4:
        grid = full_grid(bits)
        assert keys(grid, bits).sort().values.tolist() == list(range(8**bits))
    else:
        top = 2**bits - 1
        grid = torch.randint(0, top + 1, (5000, 3), generator=torch.Generator().manual_seed(0))
        grid = torch.cat([grid, torch.tensor([[0, 0, 0], [top, top, top], [top, 0, 0], [0, top, 0], [0, 0, top]])])
    key = keys(grid, bits)
    assert key.dtype == torch.int64 and int(key.min()) >= 0 and int(key.max()) < 8**bits
    assert torch.equal(cells(key, bits).long(), grid.long())


def test_morton_keys_equal_the_sum_of_the_paper():
    """sum_j x_j 2^(3j) + y_j 2^(3j+1) + z_j 2^(3j+2)."""
    grid = torch.randint(0, 2**16, (200, 3), generator=torch.Generator().manual_seed(0))
    expected = [sum(((c >> j) & 1) << 3 * j + axis for j in range(16) for axis, c in enumerate(row))
                for row in grid.tolist()]  # fmt: skip
    assert morton(grid, 16).tolist() == expected


def test_quantisation_equals_equation_6():
    """floor((2^b - 1)(c - min) / (max - min)); an axis without extent is 0, and each scene has its own box."""
    points = torch.tensor([[0.0, 2.0, -1.0], [1.0, 2.0, 0.0], [0.5, 2.0, 1.0], [0.26, 2.0, 0.99]])
    assert quantise(points, 2).tolist() == [[0, 0, 0], [3, 0, 1], [1, 0, 3], [0, 0, 2]]
    assert quantise(points[:1], 10).tolist() == [[0, 0, 0]]
    both = torch.cat([points, points * 7 - 3])
    scene = torch.tensor([0] * 4 + [1] * 4)
    assert torch.equal(quantise(both, 2, scene), quantise(points, 2).repeat(2, 1))


@pytest.mark.parametrize("name", CURVES)
def test_every_curve_is_the_plain_one_of_permuted_axes(name):
    """Transposed: x and y change places. Vertical: z comes in front of x and y."""
    points = torch.rand(300, 3)
    axes = [1, 0, 2] if "transposed" in name else [2, 0, 1] if "vertical" in name else [0, 1, 2]
    assert torch.equal(curve_order(points, name, 10), curve_order(points[:, axes], name.split()[-1], 10))
    others = [curve_order(points, other, 10).tolist() for other in CURVES if other != name]
    assert curve_order(points, name, 10).tolist() not in others


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_runs_through_one_scene_after_another(name):
    """As it would through each alone; equal keys keep the order of the input."""
    g = torch.Generator().manual_seed(0)
    points = torch.rand(90, 3, generator=g) * torch.tensor([4.0, 1.0, 2.0])
    points[40:60] = points[20:40]
    scene = torch.tensor([0] * 30 + [1] * 45 + [2] * 15)
    order = curve_order(points, name, 3, scene)
    expected = [(scene == b).nonzero()[:, 0][curve_order(points[scene == b], name, 3)] for b in range(3)]
    assert torch.equal(order, torch.cat(expected))
    assert curve_order(torch.ones(9, 3), name, 3).tolist() == list(range(9))


def test_unknown_curves_and_too_many_bits_are_refused():
    """The error names the known ones."""
    with pytest.raises(ValueError, match=r"^curve_order: 'peano' with 10 bits; known: z, hilbert, .*1 to 16 bits$"):
        curve_order(torch.rand(3, 3), "peano", 10)
    with pytest.raises(ValueError, match=r"with 17 bits"):
        curve_order(torch.rand(3, 3), "z", 17)


# ---- 3 FFT context enhancer ------------------------------------------------------------------------------------------


def windowed_filter_slowly(x, n, gate):
    """One sequence x [n, d]: window by window, channel by channel, with sums for Fourier transforms."""
    H, L = len(gate), 2 * (len(gate[0]) - 1)
    d = x.shape[1]
    hann = [0.5 - 0.5 * math.cos(2 * math.pi * t / L) for t in range(L)]
    out, norm = np.zeros((n, d)), np.zeros(n)
    for start in range(-L // 2, n, L // 2):
        here = [t for t in range(L) if 0 <= start + t < n]
        for c in range(d):
            G = gate[c // (d // H)]
            mean = sum(x[start + t, c] for t in here) / len(here)
            u = [(x[start + t, c] - mean) * hann[t] if t in here else 0 for t in range(L)]
            bins = [sum(u[t] * cmath.exp(-2j * math.pi * k * t / L) for t in range(L)) for k in range(L)]
            bins = [b * G[min(k, L - k)] for k, b in enumerate(bins)]  # a real signal's spectrum is symmetric
            for t in here:
                y = sum(b * cmath.exp(2j * math.pi * k * t / L) for k, b in enumerate(bins)).real / L
                out[start + t, c] += (y + mean * G[0] * hann[t]) * hann[t]
        for t in here:
            norm[start + t] += hann[t] ** 2
    return out / norm[:, None]


def test_the_windowed_filter_equals_a_loop_over_windows_and_frequencies():
    """Hann before and after, a gate per head, the mean of a window's valid tokens taken out and put back. R, M, d, H
    and L all differ; sequences from shorter than half a window to several windows."""
    g = torch.Generator().manual_seed(0)
    R, M, d, H, L = 5, 21, 6, 3, 8
    x, gate = torch.randn(R, M, d, generator=g), torch.rand(H, L // 2 + 1, generator=g)
    valid = torch.arange(M) < torch.tensor([1, 3, 8, 13, 21])[:, None]
    x[~valid] = 1e4  # padding counts nowhere
    out = windowed_filter(x, valid, gate)
    assert out.shape == (R, M, d) and (out[~valid] == 0).all()
    for r, n in enumerate(valid.sum(1).tolist()):
        expected = windowed_filter_slowly(x[r].double().numpy(), n, gate.double().tolist())
        assert np.abs(out[r, :n].numpy() - expected).max() < 2e-6
    with pytest.raises(ValueError, match=r"^windowed_filter: 4 heads do not divide the width 6$"):
        windowed_filter(x, valid, torch.ones(4, 5))


@pytest.mark.parametrize("M", [1, 2, 7, 8, 9, 16, 17, 64, 130, 300])
@pytest.mark.parametrize("L", [16, 128])
def test_with_gate_one_the_enhancer_doubles_its_input_at_both_ends_too(M, L):
    """Windows that add up to one everywhere, also where a sequence is shorter than a window or a single token."""
    g = torch.Generator().manual_seed(M)
    S = torch.rand(2, M, 12, generator=g) * 2 - 1
    orders = torch.stack([torch.stack([torch.randperm(M, generator=g) for _ in range(4)]) for _ in range(2)])
    out = enhance(S, torch.ones(2, M, dtype=torch.bool), orders, torch.ones(3, L // 2 + 1))
    assert (out - 2 * S).abs().max() <= 1e-6


def test_the_enhancer_is_the_mean_over_curves_each_put_back_in_place():
    """Eq. (3), one curve and one scene at a time. B, M, C and d all differ."""
    g = torch.Generator().manual_seed(0)
    B, M, C, d, n = 2, 19, 3, 8, (19, 11)
    S, gate = torch.randn(B, M, d, generator=g), torch.rand(4, 5, generator=g)
    valid = torch.arange(M) < torch.tensor(n)[:, None]
    orders = torch.arange(M).repeat(B, C, 1)
    for b, c in itertools.product(range(B), range(C)):
        orders[b, c, : n[b]] = torch.randperm(n[b], generator=g)
    out = enhance(S, valid, orders, gate)
    for b in range(B):
        total = S[b, : n[b]].clone()
        for c in range(C):
            order = orders[b, c, : n[b]].tolist()
            y = windowed_filter(S[b, order][None], torch.ones(1, n[b], dtype=torch.bool), gate)[0]
            for place, m in enumerate(order):
                total[m] += y[place] / C
        assert torch.allclose(out[b, : n[b]], total, atol=1e-5)


def test_the_gate_is_positive_and_starts_as_a_low_pass_of_each_heads_own_width():
    """From one wave per window to all of them; in float32 under autocast too, and all of it learns."""
    enhancer = Enhancer(4, 16)
    gate = F.softplus(enhancer.theta).detach()
    assert gate.shape == (4, 9) and (gate > 0).all() and torch.allclose(gate[:, 0], torch.ones(4))
    assert (gate.diff(dim=1) < 0).all() and (gate[1:, 1:] > gate[:-1, 1:]).all()
    assert gate[0, 1] == pytest.approx(0.5) and gate[3, 8] == pytest.approx(0.5)
    S, orders = torch.randn(1, 30, 8), torch.arange(30).repeat(1, 2, 1)
    valid = torch.ones(1, 30, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(enhancer(S, valid, orders), enhancer(S.float(), valid, orders))
    enhancer(S, valid, orders).square().sum().backward()
    assert (enhancer.theta.grad != 0).all()


# ---- 4 superpoint graph ----------------------------------------------------------------------------------------------


def vote_graph_slowly(points, superpoints, curves, window, stride, bits, scene):
    """Votes by counting: centre by centre, neighbour by neighbour."""
    votes = Counter()
    for b, name in itertools.product(set(scene), curves):
        mine = [n for n in range(len(points)) if scene[n] == b]
        keys, axes = CURVES[name]
        cells = quantise(points[mine], bits)[:, list(axes)]
        line = [mine[i] for _, i in sorted((int(k), i) for i, k in enumerate(keys(cells, bits)))]
        for at in range(0, len(line), stride):
            for other in range(max(0, at - window // 2), min(len(line), at + window // 2 + 1)):
                a, c = int(superpoints[line[at]]), int(superpoints[line[other]])
                if a != c and a >= 0 and c >= 0:
                    votes[a, c] += 1
    return dict(votes)


def random_cloud(N=220, M=17, seed=0, scenes=1):
    """Points in canonical order, superpoints numbered through all scenes, some without one."""
    g = torch.Generator().manual_seed(seed)
    points, scene = torch.rand(N, 3, generator=g), torch.arange(N) * scenes // N
    points[5:9] = points[5]  # points on one another
    points = points[canonical(points, scene)]
    cell = (points * 3).long().clamp(max=2) @ torch.tensor([9, 3, 1])
    owner = cell % M + M * scene
    owner = owner.unique(return_inverse=True)[1]
    return points, owner, scene


@pytest.mark.parametrize("scenes", [1, 3])
@pytest.mark.parametrize(("window", "stride"), [(64, 16), (6, 4), (10, 1)])
def test_the_graph_equals_a_brute_force_vote_count(scenes, window, stride):
    """Every pair, every vote; also at the ends of the curves, with scenes in one call that must not see each other,
    and with points that belong to no superpoint."""
    points, owner, scene = random_cloud(scenes=scenes)
    owner[torch.randperm(len(owner), generator=torch.Generator().manual_seed(1))[:30]] = -1
    for curves in (["z"], list(CURVES)[:4]):
        pairs, votes = vote_graph(points, owner, curves, window, stride, 16, scene)
        expected = vote_graph_slowly(points, owner, curves, window, stride, 16, scene.tolist())
        assert dict(zip(map(tuple, pairs.tolist()), votes.tolist(), strict=True)) == expected and len(expected) > 20
        if scenes == 1:
            alone = vote_graph(points, owner, curves, window, stride)
            assert torch.equal(pairs, alone[0]) and torch.equal(votes, alone[1])


def test_one_superpoint_has_no_edges_anywhere():
    """A wall scanned alone: no votes, no graph, one seed."""
    points = random_cloud()[0]
    owner = torch.zeros(len(points), dtype=torch.long)
    pairs, votes = vote_graph(points, owner, list(CURVES))
    edges, votes = nearest_edges(pairs, votes, points.mean(0, keepdim=True))
    assert edges.shape == (0, 2) and votes.shape == (0,)
    seed, place = choose_seeds(points, owner, edges, 5)
    token, member, strength = support(seed, edges, votes)
    assert seed.tolist() == token.tolist() == member.tolist() == strength.tolist() == [0] and place.shape == (1, 3)


def test_the_edges_kept_are_the_nearest_then_most_voted_and_symmetric():
    """Against sorting in a loop; centres on a grid give ties of distance, which votes decide."""
    g = torch.Generator().manual_seed(0)
    centres = full_grid(2)[torch.randperm(64, generator=g)[:20]].float()
    pairs = torch.tensor([(a, b) for a in range(20) for b in range(20) if a != b and (7 * a + 3 * b) % 4])
    votes = torch.randint(1, 6, (len(pairs),), generator=g)
    for k in (1, 3, 100):
        kept = {}
        for a in range(20):
            mine = [(int((centres[a] - centres[b]).square().sum()), -int(v), b)
                    for (x, b), v in zip(pairs.tolist(), votes, strict=True) if x == a]  # fmt: skip
            kept |= {(a, b): -v for _, v, b in sorted(mine)[:k]}
        expected = {(a, b): max(kept.get((a, b), 0), kept.get((b, a), 0))
                    for x, y in kept for a, b in ((x, y), (y, x))}  # fmt: skip
        edges, most = nearest_edges(pairs, votes, centres, k)
        assert dict(zip(map(tuple, edges.tolist()), most.tolist(), strict=True)) == expected
        assert edges.tolist() == sorted(edges.tolist()), "sorted by their first end, as `support` reads them"


# ---- 5 token merging -------------------------------------------------------------------------------------------------


def line_of_superpoints(sizes):
    """Superpoint m = sizes[m] points around x = 10 m; a graph that links each to the next."""
    points = torch.cat([torch.stack([10.0 * m + torch.arange(n) / n, torch.zeros(n), torch.zeros(n)], 1)
                        for m, n in enumerate(sizes)])  # fmt: skip
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    next_ = torch.tensor([(a, b) for a in range(len(sizes)) for b in (a - 1, a + 1) if 0 <= b < len(sizes)])
    return points, owner, next_


def test_seeds_of_a_line_by_hand():
    """Farthest points of seven superpoints in a line: the ends 6 and 0, the middle 3, then 1 and 5, neighbours of kept
    seeds: they step back, but all are covered by now, so they get the places that are left."""
    points, owner, edges = line_of_superpoints([4, 4, 9, 4, 4, 4, 4])
    drawn = [int(owner[i]) for i in data.farthest_point_sampling(points, 6)]
    assert drawn[:3] == [6, 0, 3] and set(drawn[3:5]) == {1, 5}
    for count in (3, 5, 6):
        assert choose_seeds(points, owner, edges, count)[0].tolist() == drawn[:count]


def test_free_places_go_to_what_no_seed_covers_and_the_largest_first():
    """A wall of 31 m and five small things behind it, in a line: of four farthest points three lie on the wall. 0 and 5
    cover 1 and 4; of the open 2 and 3 the larger one is taken and covers the other; then the largest that is left."""
    sizes = [31, 3, 1, 2, 1, 1]
    owner = torch.arange(6).repeat_interleave(torch.tensor(sizes))
    points = torch.zeros(len(owner), 3)
    points[:31, 0] = torch.arange(31)
    points[31:, 0] = 30 + owner[31:] + 0.01 * torch.arange(8)
    edges = line_of_superpoints(sizes)[2]
    drawn = [int(owner[i]) for i in data.farthest_point_sampling(points, 4)]
    assert drawn[:2] in ([0, 5], [5, 0]) and drawn[2:] == [0, 0]
    seeds, places = choose_seeds(points, owner, edges, 4)
    assert seeds.tolist() == [*drawn[:2], 3, 1]
    assert places[3].tolist() == points[32].tolist(), "the point nearest the middle of 1"


@pytest.mark.parametrize("count", [1, 6, 20, 45, 500])
def test_seeds_keep_their_promises(count):
    """T = min(count, M), each once, each at a point of its own superpoint; a seed next to an earlier one is taken only
    when every superpoint is covered or a seed; the first is the point farthest from the centroid."""
    for seed in range(4):
        points, owner, _ = random_cloud(N=600, M=27, seed=seed)
        owner = owner * 2 + (points[:, 0] * 6).long() % 2
        owner = owner.unique(return_inverse=True)[1]
        M = int(owner.max()) + 1
        centres = superpoint_mean(points, owner, M)
        edges, _ = nearest_edges(*vote_graph(points, owner, ["z", "hilbert"]), centres, 2)
        seeds, places = choose_seeds(points, owner, edges, count)
        T = min(count, M)
        assert seeds.shape == (T,) and places.shape == (T, 3) and len(set(seeds.tolist())) == T
        for s, place in zip(seeds.tolist(), places, strict=True):
            assert (points[owner == s] == place).all(1).any()
        assert torch.equal(places[0], points[(points - points.mean(0)).square().sum(1).argmax()])
        near = defaultdict(set)
        for a, b in edges.tolist():
            near[a].add(b)
        covered = set()
        for s in seeds.tolist():
            if s in covered:
                drawn = {int(owner[i]) for i in data.farthest_point_sampling(points, count)}
                assert covered | drawn >= set(range(M)), "a neighbour of a seed while others were not covered"
                break
            covered |= {s} | near[s]


def test_pooled_tokens_equal_the_formula_written_as_a_loop():
    """z_t = sum_i w_i S_i / sum_i w_i over seed and neighbours: 1 for the seed, max(0, cos) log(1 + v) / log(1 + most)
    for a neighbour. M, T, E and d all differ; one seed stands alone."""
    torch.manual_seed(0)
    M, T, d = 13, 5, 7
    S = torch.randn(M, d)
    pairs = [(a, b) for a in range(M - 1) for b in range(M - 1) if a != b and (a + b) % 3 == 0]
    edges, votes = torch.tensor(pairs), torch.tensor([1 + (a * b) % 9 for a, b in pairs])
    seeds = torch.tensor([4, 12, 0, 9, 7])
    token, member, strength = support(seeds, edges, votes)
    z = graph_pool(S, seeds, token, member, strength, T)
    assert z.shape == (T, d) and len(token) == len(member) == len(strength) > T
    alike = []
    for t, s in enumerate(seeds.tolist()):
        weights = {s: 1.0}
        for (a, b), v in zip(pairs, votes.tolist(), strict=True):
            if a == s:
                cos = float(S[a] @ S[b] / S[a].norm() / S[b].norm())
                weights[b] = max(0.0, cos) * math.log(1 + v) / math.log(1 + int(votes.max()))
                alike.append(cos)
        expected = sum(w * S[i] for i, w in weights.items()) / sum(weights.values())
        assert torch.allclose(z[t], expected, atol=1e-5)
    assert min(alike) < 0 < max(alike) and torch.allclose(z[1], S[12], atol=1e-6)


def test_the_middle_of_a_superpoint_is_one_of_its_points():
    """The nearest to the mean; of equals the first."""
    points, owner, _ = random_cloud()
    middle = nearest_to_centre(points, owner, int(owner.max()) + 1)
    for m, i in enumerate(middle.tolist()):
        mine = (owner == m).nonzero()[:, 0]
        gap = (points[mine] - points[mine].mean(0)).square().sum(1)
        assert i in mine and float((points[i] - points[mine].mean(0)).square().sum()) == pytest.approx(float(gap.min()))
    assert nearest_to_centre(torch.ones(6, 3), torch.tensor([1, 0, 1, 0, 0, 1]), 2).tolist() == [1, 0]


def rms(x):
    return float(x.detach().float().square().mean().sqrt())


def test_tokens_enter_at_the_size_of_the_word_vectors(text, scenes, hubs):
    """Merged tokens, places and coordinate tokens alike; tokens a hundred times smaller are not found by attention."""
    for model in (make(text), load(hubs["opt"])):
        words = rms(model.llm.get_input_embeddings().weight)
        _, tokens, _ = model.merge(scenes)
        assert rms(tokens) == pytest.approx(words, rel=0.02)
        assert rms(model.place(torch.rand(500, 3) * 5)) == pytest.approx(words, rel=0.2)
        assert rms(Merger(24, 32, 0.3)(torch.randn(9, 24))[1]) == pytest.approx(0.3, rel=0.01)


# ---- 6 positions and the coordinate token ----------------------------------------------------------------------------


def test_a_place_is_a_linear_map_of_waves_of_half_a_metre_to_sixteen():
    """cos and sin of 2 pi c / wavelength, axis by axis."""
    torch.manual_seed(0)
    place = Place(10, 1.0)
    c = torch.randn(4, 3) * 3
    for row, out in zip(c.tolist(), place(c), strict=True):
        phase = [2 * math.pi * x / w for x in row for w in (0.5, 1, 2, 4, 8, 16)]
        waves = torch.tensor([*map(math.cos, phase), *map(math.sin, phase)])
        assert torch.allclose(out, place.out.weight @ waves, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 50])
def test_the_coordinate_token_equals_a_loop_over_its_neighbours(k):
    """MLP([code(c); mean over the k nearest of z + code(offset)]); padding is nobody's neighbour, and where there are
    fewer than k all count. P, T, d and D all differ."""
    torch.manual_seed(0)
    P, T, d, D = 4, 9, 12, 10
    token = CoordinateToken(d, D, 0.5)
    c, z, places = torch.randn(P, 3), torch.randn(P, T, d), torch.randn(P, T, 3)
    box = torch.stack([-2 - torch.rand(P, 3), 2 + torch.rand(P, 3)], 1)
    valid = torch.arange(T) < torch.tensor([9, 2, 7, 1])[:, None]
    places[~valid] = c[:, None].expand_as(places)[~valid]  # padding as near as can be
    out = token(c, box, z, places, valid, k)
    assert out.shape == (P, D)
    for p in range(P):
        size = box[p, 1] - box[p, 0]
        near = sorted((t for t in range(T) if valid[p, t]), key=lambda t, p=p: float((places[p, t] - c[p]).norm()))[:k]
        around = [z[p, t] + fourier_code((places[p, t] - c[p]) / size, d) for t in near]
        x = torch.cat([fourier_code((c[p] - box[p, 0]) / size, d), torch.stack(around).mean(0)])
        assert torch.allclose(out[p], token.end(token.out(F.gelu(token.lift(x)))), atol=1e-4)


# ---- 7 filter, adapters, routing -------------------------------------------------------------------------------------


def test_the_filter_is_the_identity_at_start():
    """G = 1: a frozen model must not be thrown off by an untrained filter."""
    z = torch.randn(3, 5, 24)
    assert (FourierFilter(24, 4)(z) - z).abs().max() < 1e-6
    half = z.bfloat16()
    assert FourierFilter(24, 4)(half).dtype == torch.bfloat16 and torch.allclose(FourierFilter(24, 4)(half), half)


def test_the_filter_equals_a_dense_circulant_matrix():
    """Multiplying spectra is convolving around a circle: (z + K z) / 2, K[i, j] = real(k[i - j]) per head."""
    torch.manual_seed(0)
    H, w = 3, 8
    own = FourierFilter(H * w, H)
    nn.init.normal_(own.gain)
    z = torch.randn(5, H * w)
    expected = []
    for h in range(H):
        G = own.gain.detach()[h * w : (h + 1) * w].tolist()
        kernel = [sum(g * cmath.exp(2j * math.pi * k * t / w) for k, g in enumerate(G)).real / w for t in range(w)]
        K = torch.tensor([[kernel[(i - j) % w] for j in range(w)] for i in range(w)])
        x = z[:, h * w : (h + 1) * w]
        expected.append((x + x @ K.T) / 2)
    assert torch.allclose(own(z), torch.cat(expected, 1), atol=1e-5)
    with pytest.raises(DataError, match=r"^filter_heads = 7 does not divide the language model's width 24$"):
        FourierFilter(24, 7)


def test_routed_linear_equals_a_loop_over_tokens():
    """Base map for all; B A x * alpha / rank of its own adapter for each kind; a kind without adapter passes."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    plain = nn.Sequential()
    plain.add_module("fc1", nn.Linear(6, 9))
    wrapped = get_peft_model(plain, LoraConfig(r=2, lora_alpha=3, target_modules=["fc1"]), adapter_name="vision")
    wrapped.add_adapter("text", LoraConfig(r=2, lora_alpha=3, target_modules=["fc1"]))
    layer = plain.fc1
    for name in ("vision", "text"):
        nn.init.normal_(layer.lora_B[name].weight)
    x, vision = torch.randn(4, 5, 6), torch.rand(20) < 0.4
    for route in ({"vision": "vision", "text": "text"}, {"vision": "text"}, {"text": "text"}, {}):
        out = routed_linear(layer, x, vision, route)
        assert out.shape == (4, 5, 9)
        for i, (row, seen) in enumerate(zip(x.reshape(-1, 6), vision.tolist(), strict=True)):
            expected = layer.base_layer(row)
            if name := route.get("vision" if seen else "text"):
                expected = expected + 1.5 * layer.lora_B[name].weight @ (layer.lora_A[name].weight @ row)
            assert torch.allclose(out.reshape(-1, 9)[i], expected, atol=1e-5)


def test_the_router_says_what_it_cannot_place():
    """A prompt of another size, or a call outside `routed`, is an error and never a silent default."""
    router, vision = Router(), torch.tensor([[True, True, False], [False, True, False]])
    with pytest.raises(ValueError, match=r"^Router: say which tokens are vision first"):
        router.mask(torch.zeros(2, 3, 8))
    with router.routed(vision):
        assert router.mask(torch.zeros(2, 3, 8)).tolist() == vision.flatten().tolist()
        assert router.mask(torch.zeros(6, 8)).tolist() == vision.flatten().tolist()  # OPT's FFN sees rows
        assert router.mask(torch.zeros(4, 3, 8)).tolist() == vision[[0, 0, 1, 1]].flatten().tolist()  # two beams
        assert router.mask(torch.zeros(2, 1, 8)).tolist() == [False, False]  # a new token per row
        with pytest.raises(ValueError, match=r"^Router: \(2, 5, 8\) is neither the prompt 2 x 3 nor one new token"):
            router.mask(torch.zeros(2, 5, 8))
    assert router.vision is None


def some_input(model, rows=2, length=11, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, model.width, generator=g), torch.rand(rows, length, generator=g) < 0.5


@torch.no_grad()
def logits(model, x, vision):
    with model.router.routed(vision):
        return model.llm(inputs_embeds=x, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapters", ["none", "vision", "text", "shared", "decoupled"])
def test_at_start_lora_alone_leaves_the_logits_unchanged_to_the_bit(hubs, family, adapters):
    """B = 0: the frozen model answers as before it was adapted."""
    model = load(hubs[family], adapters=adapters, filter="none")
    x, vision = some_input(model)
    with torch.no_grad():
        assert torch.equal(logits(model, x, vision), base(hubs[family])(inputs_embeds=x).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["vision", "both"])
def test_at_start_the_filter_changes_the_logits_by_rounding_only(hubs, family, where):
    """To 1e-5: the FFT there and back."""
    model = load(hubs[family], filter=where)
    x, vision = some_input(model)
    with torch.no_grad():
        assert (logits(model, x, vision) - base(hubs[family])(inputs_embeds=x).logits).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_moves_the_paths_of_its_own_tokens_only(hubs, family):
    """In the FFN itself token by token, and in the model nothing that stands before the first token of its kind."""
    model = wake(load(hubs[family]))
    x, _ = some_input(model)
    vision = torch.zeros(2, 11, dtype=torch.bool)
    vision[:, :6] = True
    entries = {}
    block = next(m for n, m in model.llm.named_modules() if n.endswith("layers"))[0]
    last = block.mlp if hasattr(block, "mlp") else block.fc2
    hook = last.register_forward_hook(lambda m, given, out: entries.update(ffn=out.reshape(2, 11, -1)))

    def look():
        seen = logits(model, x, vision)
        return seen, entries["ffn"]

    before = look()
    for name, mine in (("text", ~vision), ("vision", vision)):
        kept = {n: p.detach().clone() for n, p in model.named_parameters() if f"lora_B.{name}" in n}
        assert len(kept) == 2 * (2 if family == "opt" else 3)
        for n, p in model.named_parameters():
            if n in kept:
                p.data.mul_(-1)
        after = look()
        for n, p in model.named_parameters():
            if n in kept:
                p.data.copy_(kept[n])
        moved = (after[1] - before[1]).abs().amax(-1) > 1e-4
        assert torch.equal(moved, mine)
        assert ((after[0] - before[0]).abs().amax(-1) > 1e-4).tolist() == [
            [t >= (6 if name == "text" else 0) for t in range(11)]
        ] * 2
    hook.remove()


@pytest.mark.parametrize("where", FILTERS)
def test_the_filter_acts_on_the_tokens_it_is_for(hubs, where):
    """What enters the FFN of an adapted layer: vision tokens, all, or none, and nothing behind the adapted layers."""
    plain, model = (load(hubs["llama"], adapters="none", filter=f) for f in ("none", where))
    x, vision = some_input(wake(model))
    seen = {}
    for name, m in (("plain", plain), ("own", model)):
        blocks = m.llm.model.layers
        hooks = [blocks[i].mlp.gate_proj.register_forward_hook(
            lambda _, given, out, key=(name, i): seen.update({key: given[0]})) for i in range(3)]  # fmt: skip
        logits(m, x, vision)
        for h in hooks:
            h.remove()
    first = (seen["own", 0] - seen["plain", 0]).abs().amax(-1) > 1e-5
    expected = {"none": torch.zeros_like(vision), "vision": vision, "both": torch.ones_like(vision)}[where]
    assert torch.equal(first, expected)
    assert len(model.filters) == 2, "the weights are the same for all, so that ablations can start from one run"
    assert not model.llm.model.layers[2].mlp._forward_pre_hooks


def test_a_language_model_with_another_ffn_is_refused():
    """In one line that names the linear maps that are known."""
    strange = nn.Module()
    strange.layers = nn.ModuleList([nn.Sequential(nn.Linear(3, 3))])
    with pytest.raises(DataError, match=r"^Module: its FFN has none of down_proj, fc1, fc2, gate_proj, up_proj;"):
        fase3d.adapt(strange, 1, 2, 2, ADAPTERS["decoupled"], "none", 1, Router())


# ---- generation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def uncached(model, scene, sample, more=()):
    """Logits [1, T, vocabulary] of a question and of the tokens `more` behind it, in one pass under the model's own
    causal mask; and where the answer starts."""
    batch = model.batch([(scene, [sample])])
    seen = model.encode([scene])
    start = int((batch["labels"][0] != data.IGNORE).nonzero()[0]) + 1
    ids = torch.tensor([batch["ids"][0, :start].tolist() + list(more)])
    embeds = model.embed(ids, seen["tokens"], seen["valid"], model.prompt_tokens(batch, seen))
    with model.router.routed(ids < 0):
        hidden = model.llm.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return model.llm.lm_head(hidden)[0], start


def answer_slowly(model, scene, sample, count):
    """Greedy, the whole row again for every token."""
    ids = []
    while len(ids) < count and model.text.eos not in ids:
        ids.append(int(uncached(model, scene, sample, ids)[0][-1].argmax()))
    return model.text.decode(ids)


@pytest.mark.parametrize("family", [*FAMILIES, "tiny"])
def test_generation_with_a_cache_is_step_by_step_argmax_without(text, hubs, scenes, family):
    """The prompt's tokens of both kinds take their own adapters and the new ones that of text, for questions of
    different scenes and lengths, with and without a click, in one batch."""
    model = wake(make(text).eval() if family == "tiny" else load(hubs[family]))
    if family == "tiny":
        full_rows.vary(model.llm.model)
    groups = asked(scenes)
    batch = model.batch(groups)
    assert 0 < len(batch["prompts"]) < 9
    expected = [answer_slowly(model, s, q, 8) for s, samples in groups for q in samples]
    assert len(set(expected)) > 5
    assert model.generate(batch, max_new_tokens=8) == expected
    for name, p in model.named_parameters():
        if "lora_B.text" in name:
            p.data.mul_(-1)
    assert model.generate(batch, max_new_tokens=8) != expected, "routing would not show"


@pytest.mark.parametrize("family", [*FAMILIES, "tiny"])
def test_ten_questions_about_a_scene_are_answered_as_each_alone(text, hubs, scenes, family):
    """The scene's tokens go through the language model once, and are found again in the next call, unchanged; some
    questions have a coordinate token, which is made from what is kept of the scene."""
    model = wake(make(text, tokens=500).eval() if family == "tiny" else load(hubs[family], tokens=500))
    if family == "tiny":
        full_rows.vary(model.llm.model)
    groups = [*asked(scenes[:1], 10), *asked(scenes[1:2], 1), *asked(scenes[2:])]
    assert 0 < len(model.batch(groups)["prompts"]) < 14
    full_rows.compare(model, groups)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_take_the_routes_of_their_rows(hubs, scenes, family):
    """A beam search repeats every row; the score it reports is the uncached log-probability of what it returns."""
    model = wake(load(hubs[family]))
    (scene, samples), (other, more) = asked(scenes[:2], 1)
    batch = model.batch([(scene, samples), (other, more)])
    out = full_rows.answer(model, batch, 5, num_beams=3, min_new_tokens=5, length_penalty=0.0,
                           return_dict_in_generate=True, output_scores=True)  # fmt: skip
    for s, q, ids, score in zip((scene, other), (*samples, *more), out.sequences, out.sequences_scores, strict=True):
        found, start = uncached(model, s, q, ids.tolist())
        logp = found.log_softmax(-1)[start - 1 : -1].gather(1, ids[:, None]).sum()
        assert float(score) == pytest.approx(float(logp), abs=1e-3)


# ---- 8 the model: scenes to tokens -----------------------------------------------------------------------------------


def shuffled(scene, seed):
    """The same scene with its points in another order and its superpoints under other names."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(scene.points))
    names = rng.permutation(1000)[: scene.superpoints.max() + 1]
    return replace(scene, name=f"{scene.name} {seed}", points=scene.points[order], colours=scene.colours[order],
                   normals=scene.normals[order], superpoints=names[scene.superpoints[order]],
                   instances=scene.instances[order])  # fmt: skip


@pytest.mark.parametrize("change", [{}, dict(points=300), dict(superpoint=False, points=300), dict(selector="fps"),
                                    dict(curves=6), dict(selector="qformer")], ids=str)  # fmt: skip
@torch.no_grad()
def test_the_order_of_the_points_and_the_names_of_superpoints_change_no_token(text, scenes, change):
    """By more than 1e-5, coordinate tokens included; also where only some of the points are drawn."""
    model = make(text, **change).eval()
    for scene, samples in asked(scenes[:2], 4, {"id_category": 1}):
        mine = model.encode([scene])
        prompts = model.prompt_tokens(model.batch([(scene, samples)]), mine)
        for seed in range(2):
            again = shuffled(scene, seed)
            other = model.encode([again])
            assert torch.equal(other["places"], mine["places"])
            assert (other["tokens"] - mine["tokens"]).abs().max() < 1e-5
            assert (model.prompt_tokens(model.batch([(again, samples)]), other) - prompts).abs().max() < 1e-5
        assert mine["tokens"].std() > 0.1


@torch.no_grad()
def test_padding_and_companions_change_no_token(text, scenes):
    """Three scenes with different numbers of superpoints and tokens, together and alone."""
    model = make(text, tokens=500).eval()
    together = model.encode(scenes)
    lengths = [model.scene_length(s) for s in scenes]
    assert len(set(lengths)) == 3 and together["valid"].sum(1).tolist() == lengths
    for b, scene in enumerate(scenes):
        alone = model.encode([scene])
        for key in ("tokens", "z", "places"):
            assert (together[key][b, : lengths[b]] - alone[key][0]).abs().max() < 1e-5
            assert (together[key][b, lengths[b] :] == 0).all()


def test_a_turned_scene_keeps_the_cached_geometry(text, scenes, tmp_path):
    """Mirrored and transposed scenes read one file: same points, curves, graph and seeds; places turn with the boxes,
    and tokens are those a model without a cache computes from the turned points."""
    plain = room(3, objects=8, views=0, points=700)
    model = make(text).eval()
    model.cache_features([plain], tmp_path)
    first = model.load_features(plain)
    for seed in range(6):
        turned = augment(plain, np.random.default_rng(seed))
        fresh = make(text).eval()
        found = fresh.geometry(turned)
        assert found.keys() == first.keys()
        for key in first:
            assert np.array_equal(found[key], first[key].numpy()), key
        with torch.no_grad():
            cached, own = model.encode([turned]), fresh.encode([turned])
        assert all(torch.equal(cached[k], own[k]) for k in cached)
        expected = first["place"].numpy() @ turned.turn.T
        assert np.allclose(model.token_centers(turned), expected, atol=1e-5)
        assert all((np.abs(turned.points - c) < 1e-5).all(1).any() for c in model.token_centers(turned))


def test_geometry_is_written_once_and_read_back_equal(text, scenes, tmp_path, monkeypatch):
    """Each rank its share; another process reads what they wrote; other settings have folders of their own."""
    for rank in range(2):
        make(text).prepare(scenes, tmp_path, rank, world=2)
    first, second = make(text).eval(), make(text).eval()
    names = sorted(p.name for p in (tmp_path / first.cache_key()).iterdir())
    assert names == sorted(f"{s.name}.npz" for s in scenes)
    expected = first.encode(scenes)
    monkeypatch.setattr(second, "geometry", lambda scene: pytest.fail("computed again"))
    second.prepare(scenes, tmp_path)
    found = second.encode(scenes)
    assert all(torch.equal(found[k], v) for k, v in expected.items())
    changes = [dict(points=99), dict(superpoint=False), dict(bits=5), dict(curves=2), dict(vote_window=8),
               dict(vote_stride=3), dict(edges=2), dict(tokens=9), dict(selector="fps")]  # fmt: skip
    assert len({make(text, **c).cache_key() for c in [{}, *changes]}) == 10
    assert make(text, heads=8, window=8).cache_key() == first.cache_key()


def test_tokens_lie_along_a_hilbert_curve(text, scenes):
    """The language model's positions are an order; near tokens should be near in it."""
    model = make(text)
    for scene in scenes:
        place = model.load_features(scene)["place"]
        assert torch.equal(curve_order(place, "hilbert", 10), torch.arange(len(place)))


def test_stages_on_words_have_a_token_per_object_or_per_seed(text, scenes):
    """The stand-in for a pre-trained language model: the sum of the words of category and colour, and a place."""
    model = make(text)
    for stage, lengths in ((SYMBOLS, [9, 12, 7]), (WORDS, [14, 14, 14])):
        model.configure_stage(stage)
        model.cache_features(scenes)
        seen = model.encode(scenes)
        assert [model.scene_length(s) for s in scenes] == seen["valid"].sum(1).tolist() == lengths
        for b, scene in enumerate(scenes):
            words = {o.id: text.encode(f"{o.category} {o.colour}") for o in scene.objects}
            shows = model.load_features(scene)["shows"].tolist()
            if stage is SYMBOLS:  # the place tells which object it is
                shows = [next(o.id for o in scene.objects if np.allclose(o.box[:3], c, atol=1e-5))
                         for c in seen["places"][b, : lengths[b]].numpy()]  # fmt: skip
                assert sorted(shows) == [o.id for o in scene.objects]
            for t, i in enumerate(shows):
                ids = torch.tensor(words.get(i, [text.unk] * 2))
                word = F.layer_norm(model.llm.get_input_embeddings()(ids).sum(0), (32,))
                assert torch.allclose(seen["tokens"][b, t], word + model.place(seen["places"][b, t]), atol=1e-4)


def test_what_a_seed_shows_is_the_most_frequent_object_on_its_superpoint(text, scenes):
    """The truth of the tokenizer's own stage."""
    model = make(text)
    for scene in scenes:
        found = {k: v.numpy() for k, v in model.load_features(scene).items()}
        things = scene.instances[found["index"]]
        for s, shown in zip(found["seed"], found["shows"], strict=True):
            votes = Counter(things[found["owner"] == s].tolist())
            assert votes[int(shown)] == max(votes.values())


def test_the_most_frequent_label_equals_counting():
    """Superpoints of rooms hardly ever lie on two things, so the rooms above cannot tell; ties go to the largest."""
    g = torch.Generator().manual_seed(0)
    label, owner = torch.randint(0, 4, (60,), generator=g), torch.randint(0, 9, (60,), generator=g)
    for m, found in enumerate(most_frequent(label, owner, 9).tolist()):
        votes = Counter(label[owner == m].tolist())
        assert found == max(votes, key=lambda i: (votes[i], i))


@pytest.mark.parametrize("unknown", ["category", "colour"])
@pytest.mark.parametrize("stage", recipe(Config.tiny(), STAGES["tiny"]), ids=lambda s: s.name)
def test_things_of_unknown_category_or_colour_pass_every_stage(text, scenes, unknown, stage):
    """A real scene has segments without categories, a scan without colours has things without colours."""
    scene = replace(scenes[0], name="bare", objects=[replace(o, **{unknown: ""}) for o in scenes[0].objects])
    model = make(text)
    model.configure_stage(stage)
    model.cache_features([scene])
    samples = questions(scene, stage.tasks, 4, np.random.default_rng(0)) if stage.tasks else []
    assert torch.isfinite(model(model.batch([(scene, samples)]))["loss"]) and (samples or not stage.tasks)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_a_scene_that_lacks_something_says_so_in_one_line(text, scenes):
    """Points, superpoints, colour or normals: which, and what to do."""
    for key, message in (
        ("points", "Fase3D needs points; this source has none"),
        ("superpoints", "no superpoints; make them with data.over_segment"),
        ("colours", "the cloud has no colour and this model never saw such; train with --set colour=false or"),
        ("normals", "the cloud has no normals, which this model needs; make them with data.estimate_normals, or"),
    ):
        bare = replace(scenes[0], name="scan7", **{key: None})
        with pytest.raises(DataError, match=rf"^scan7: {message}[^\n]*$"):
            make(text).encode([bare])
    empty = replace(scenes[0], name="scan8", points=np.zeros((0, 3), np.float32))
    with pytest.raises(DataError, match=r"^scan8: Fase3D needs points"):
        make(text).encode([empty])


def test_what_a_model_does_not_look_at_may_be_missing(text, scenes):
    """Colour, normals and superpoints can be switched off; then a bare cloud will do."""
    bare = replace(scenes[0], name="bare", colours=None, normals=None, superpoints=None)
    full = make(text, colour=False, superpoint=False).eval()
    assert torch.equal(full.encode([scenes[0]])["tokens"],
                       full.encode([replace(bare, normals=scenes[0].normals)])["tokens"])  # fmt: skip
    grey = make(text, normals=False, superpoint=False, no_colour=0.1).eval()
    assert torch.isfinite(grey.encode([bare])["tokens"]).all()
    with pytest.raises(DataError, match=r"^colour = false and normals = false: points would carry nothing"):
        make(text, colour=False, normals=False)


def test_a_model_that_saw_colourless_scenes_answers_about_one(text, scenes):
    """A share of training scenes is shown without colour, drawn with the scene's identifiers; asked without training,
    what has colour keeps it. Missing and hidden colour look the same."""
    model = make(text, no_colour=0.5)
    index = np.arange(50)
    draws = [augment(scenes[0], np.random.default_rng(i)) for i in range(60)]
    hidden = [(model.features(s, index)[:, :3] == 0).all() for s in draws]
    assert 18 <= sum(hidden) <= 42
    dark = draws[hidden.index(True)]
    none = model.features(replace(dark, colours=None), index)
    assert np.array_equal(model.features(dark, index), none) and none.shape == (50, 6)
    model.eval()
    lit = model.features(dark, index)
    assert np.allclose(lit[:, :3], dark.colours[:50] / 127.5 - 1) and np.array_equal(lit[:, 3:], dark.normals[:50])
    assert np.array_equal(model.features(replace(dark, colours=None), index), none)


def test_a_question_about_two_things_has_no_coordinate_token(text, scenes):
    """The paper has one per question; a second mark would be read as the first."""
    model = make(text)
    sample = data.Sample("q", scenes[0].name, "relation", "is <obj 1> above <obj 2>?", "no")
    with pytest.raises(DataError, match=r"^relation: .* points at two things; Fase3D has one coordinate token"):
        model.batch([(scenes[0], [sample])])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(selector="kmeans"), "unknown selector kmeans; known: graph, fps, qformer"),
        (dict(adapters="dual"), "unknown adapters dual; known: none, vision, text, shared, decoupled, full"),
        (dict(filter="all"), "unknown filter all; known: none, vision, both"),
        (dict(task="ground"), "unknown task ground; known: qa, caption, all"),
        (dict(curves=7), "curves = 7; give 1 to 6"),
        (dict(attention="eager"), "attention = eager: packed questions need sdpa's mask; leave it unset"),
        (dict(filter_heads=5), "filter_heads = 5 does not divide the language model's width 32"),
    ],
    ids=lambda c: c if isinstance(c, str) else next(iter(c)),
)
def test_settings_that_do_not_exist_are_refused_with_the_known_ones(text, change, message):
    """In one line."""
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        make(text, **change)


def test_unknown_inputs_and_parts_of_a_stage_are_refused(text):
    """The error names the known ones."""
    for wrong in (Stage("x", {}, ("lm",), "proxies"), Stage("x", {}, ("bev",), "tokens")):
        with pytest.raises(ValueError, match=r"^stage x: visual is one of .*tokens.*'adapters', 'filter', 'lm'"):
            make(text).configure_stage(wrong)


def test_one_superpoint_is_a_scene(text):
    """A single wall, or a single point: a token, a proposal, an answer."""
    for n in (1, 40):
        points = np.random.default_rng(0).random((n, 3)).astype(np.float32)
        scene = data.Scene("wall", "ply", [], points=points, colours=np.zeros((n, 3), np.uint8),
                           normals=np.zeros((n, 3), np.float32), superpoints=np.zeros(n, np.int64))  # fmt: skip
        model = make(text).eval()
        assert model.encode([scene])["tokens"].shape == (1, 1, 32)
        assert len(model.propose(scene).objects) == 1
        sample = data.Sample("q", "wall", "count", "what is the number of doors?", "0")
        assert len(model.generate(model.batch([(scene, [sample])]), 2)) == 1


# ---- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "tiny"])
def test_a_question_gets_the_logits_it_has_alone(text, hubs, scenes, family):
    """Packed behind one scene with others, in a batch with other scenes: neighbours, companions and padding must not
    be seen, and positions must be those it would have alone."""
    model = wake(make(text).eval() if family == "tiny" else load(hubs[family]))
    groups = asked(scenes)
    packed, out = told(model, groups)
    alone = [told(model, [(s, [q])]) for s, samples in groups for q in samples]
    assert len(alone) == 9 and packed.std() > 0.01
    expected = torch.cat([found for found, _ in alone])
    assert torch.allclose(packed, expected, atol=2e-5 * float(packed.abs().max()))
    assert float(out["loss"]) == pytest.approx(sum(float(o["loss"]) for _, o in alone), rel=1e-5)
    assert int(out["weight"]) == sum(int(o["weight"]) for _, o in alone) == len(packed)


def test_the_loss_is_the_cross_entropy_of_the_answers(text, scenes):
    """Eq. (4), as a sum, with the number of its terms and of its hits: the trainer divides by the global count."""
    model = make(text).eval()
    groups = asked(scenes)
    found, out = told(model, groups)
    target = [t for s, samples in groups for q in samples
              for t in [*text.encode(data.substitute(q.answer, lambda i: "this")), text.eos]]  # fmt: skip
    each = [-float(row.log_softmax(-1)[t]) for row, t in zip(found, target, strict=True)]
    assert float(out["loss"]) == pytest.approx(sum(each), rel=1e-5) and int(out["weight"]) == len(target)
    assert int(out["correct"]) == sum(int(row.argmax()) == t for row, t in zip(found, target, strict=True))


def test_answers_depend_on_the_scene_and_on_the_click(text, scenes):
    """Guards the tests above: another scene, or the same words about another place, has other logits."""
    model = make(text).eval()
    a, b = (replace(data.Sample("q", "s", "id_category", "what is this?", "chair"), prompt=o.box)
            for o in scenes[0].objects[:2])  # fmt: skip
    here = told(model, [(scenes[0], [a])])[0]
    assert not torch.allclose(here, told(model, [(scenes[0], [b])])[0], atol=1e-3)
    assert not torch.allclose(here, told(model, [(scenes[1], [a])])[0], atol=1e-3)
    click = replace(a, prompt=a.prompt[:3])
    assert torch.equal(here, told(model, [(scenes[0], [click])])[0]), "a box counts by its centre"


def test_a_marked_object_is_asked_about_by_a_click_or_its_box(text, scenes):
    """In training half of the time a click on one of its points, drawn from the scene's identifiers; else its box."""
    model, scene = make(text), scenes[0]
    thing = scene.objects[2]
    sample = data.Sample("q", scene.name, "id_category", f"what is <obj {thing.id}>?", thing.category)
    prompts = []
    for seed in range(40):
        again = replace(scene, identifiers=data.number_objects(scene, np.random.default_rng(seed)))
        batch = model.batch([(again, [sample])])
        assert torch.equal(batch["prompts"], model.batch([(again, [sample])])["prompts"])
        assert batch["prompt_scene"].tolist() == [0] and int((batch["ids"] == data.PROMPT).sum()) == 1
        prompts.append(batch["prompts"][0].numpy())
    boxes = [np.allclose(p, thing.box) for p in prompts]
    clicks = [p[:3] for p, box in zip(prompts, boxes, strict=True) if not box]
    assert 10 <= sum(boxes) <= 30 and len({c.tobytes() for c in clicks}) > 5
    mine = scene.points[scene.instances == thing.id]
    assert all((np.abs(mine - c) < 1e-6).all(1).any() for c in clicks)
    model.eval()
    assert np.allclose(model.batch([(again, [sample])])["prompts"][0], thing.box)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_changes_the_loss_by_a_rounding(hubs, scenes, family):
    """The frozen model in float16 as a paper run loads it, or bfloat16, and autocast as the trainer runs it."""
    groups, losses = asked(scenes), []
    for dtype, auto in (("float32", False), ("float32", True), ("float16", False), ("bfloat16", True)):
        model = wake(load(hubs[family], dtype=dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=auto):
            batch = model.batch(groups)
            out = model(batch)
            losses.append(float(out["loss"].detach()))
            out["loss"].backward()
            assert len(model.generate(batch, 1)) == 9
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert losses[1:] == pytest.approx(losses[:1] * 3, rel=0.03) and len(set(losses)) > 1


# ---- what a stage trains ---------------------------------------------------------------------------------------------


def check_gradients(model, stage, scenes, mix=None):
    """Whatever the stage trains gets a gradient, nothing else gets any or moves; after one step every gradient is one
    that moves its parameter (LoRA's A has to wait for B, which starts at 0)."""
    model.train()
    model.configure_stage(stage)
    model.cache_features(scenes)
    groups = asked(scenes, 6, mix or stage.tasks) if stage.tasks else [(s, []) for s in scenes]
    batch = model.batch(groups)
    parts = model.parts()
    trained = {id(p) for part in stage.trains for p in parts[part]}
    if model.config.adapters == "full":
        trained |= {id(p) for p in parts["lm"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        out = model(batch)
        assert out["loss"].ndim == 0 and float(out["weight"]) > 0 and 0 <= float(out["correct"]) <= float(out["weight"])
        (out["loss"] / out["weight"]).backward()
        assert trained == {id(p) for p in model.parameters() if p.grad is not None}
        still = {n for n, p in model.named_parameters() if id(p) in trained and not p.grad.abs().sum() > 0}
        expected = {n for n in before if "lora_A" in n and "adapters" in stage.trains} if step == 0 else set()
        if not len(batch.get("prompts", ())) and "prompt" in stage.trains:
            expected |= {n for n in before if n.startswith("coordinate.")}
        assert still == expected
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved <= {n for n, p in model.named_parameters() if id(p) in trained}


@pytest.mark.parametrize("stage", recipe(Config.tiny(), STAGES["tiny"]), ids=lambda s: s.name)
def test_gradients_reach_all_that_a_tiny_stage_trains_and_nothing_frozen(text, scenes, stage):
    """A parameter without a gradient hangs data-parallel training; a frozen one that moves was not frozen."""
    check_gradients(make(text), stage, scenes)


@pytest.mark.parametrize("stage", recipe(Config.paper(), STAGES["paper"]), ids=lambda s: s.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_all_that_a_stage_of_the_paper_trains_and_nothing_frozen(hubs, scenes, stage, family):
    """With the language model frozen, whichever it is."""
    check_gradients(load(hubs[family]), stage, scenes)


@pytest.mark.parametrize("stage", [s for s in recipe(Config.tiny(), STAGES["tiny"]) if s.tasks], ids=lambda s: s.name)
def test_a_batch_without_any_click_trains_too(text, scenes, stage):
    """No question of a step need have a coordinate token; its layers then have a gradient of zero, not none."""
    check_gradients(make(text), stage, scenes, {"count": 1, "exist": 1})


@pytest.mark.parametrize(
    "change",
    [*(dict(selector=k) for k in SELECTORS), *(dict(adapters=k) for k in ADAPTERS), *(dict(filter=k) for k in FILTERS),
     *(dict(curves=k) for k in (1, 2, 6)), dict(superpoint=False), dict(enhancer=False),
     dict(superpoint=False, enhancer=False), dict(adapted_layers=0), dict(adapted_layers=1), dict(tokens=5),
     dict(colour=False), dict(normals=False), dict(no_colour=0.5)],
    ids=str,
)  # fmt: skip
def test_every_alternative_trains(text, scenes, change):
    """Tables 3 to 6 and the switches of points: one step under each."""
    stage = next(s for s in STAGES["tiny"] if s.name == "1 generalist")
    check_gradients(make(text, **change), stage, scenes)


def test_vision_adapters_of_the_last_layer_reach_no_answer(text, scenes):
    """Behind it only the text is read. With every layer adapted (Table 4's columns ask for at most 12 of them) exactly
    these get gradients of zero."""
    model = wake(make(text, adapted_layers=99))
    model.configure_stage(next(s for s in STAGES["tiny"] if s.name == "1 generalist"))
    out = model(model.batch(asked(scenes)))
    out["loss"].backward()
    dead = {n for n, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0}
    last = {n for n, _ in model.named_parameters() if "layers.2." in n and ".vision." in n} | {"filters.2.gain"}
    assert dead == last and len(last) == 7


@pytest.mark.parametrize(("change", "same"), [(dict(superpoint=False), False), (dict(enhancer=False), False),
                                              (dict(curves=1), False), (dict(selector="fps"), False),
                                              (dict(selector="qformer"), False), (dict(adapters="none"), True),
                                              (dict(filter="none"), True)], ids=str)  # fmt: skip
@torch.no_grad()
def test_a_switch_changes_the_tokens_if_it_is_about_them(text, scenes, change, same):
    """Or an ablation would compare a model with itself."""
    a, b = make(text).eval(), make(text, **change).eval()
    weights = a.state_dict()
    b.load_state_dict({k: weights.get(k, v) for k, v in b.state_dict().items()})
    x, y = (m.encode(scenes)["tokens"] for m in (a, b))
    assert torch.equal(x, y) == same


def test_the_papers_recipe():
    """Sec. 4.1: 100,000 iterations on everything, 30,000 on one task, batch 8, AdamW 0.1, cosine 1e-4 to 1e-6; "from
    scratch" leaves the first out, and the tiny stages follow the same two switches."""
    rows = [(s.trains, s.iterations, s.batch, s.lr, s.final_lr, s.schedule, s.weight_decay) for s in STAGES["paper"]]
    parts = ("tokenizer", "place", "prompt", "adapters", "filter")
    assert rows == [(parts, n, 8, 1e-4, 1e-6, "cosine", 0.1) for n in (100_000, 30_000)]
    for preset, kind in (("paper", Config.paper), ("tiny", Config.tiny)):
        every = [s.name for s in STAGES[preset]]
        for task in TUNED:
            for pretrain in (True, False):
                stages = recipe(kind(task=task, pretrain=pretrain), STAGES[preset])
                assert [s.name for s in stages] == [n for n in every if pretrain or n != "1 generalist"]
                assert stages[-1].tasks == TUNED[task]
                assert set().union(*(s.tasks for s in stages)) <= set(data.TASKS)
    assert all(sum(mix.values()) == pytest.approx(1) for mix in [TUNED["all"], STAGES["paper"][0].tasks])
    c = Config.paper()
    assert (c.points, c.dim, c.curves, c.window, c.heads, c.vote_window, c.vote_stride, c.tokens, c.prompt_neighbours,
            c.adapted_layers, c.rank, c.alpha, c.filter_heads) == (
            50_000, 768, 4, 128, 8, 64, 16, 256, 16, 8, 768, 768, 8)  # fmt: skip


# ---- dense captioning without boxes ----------------------------------------------------------------------------------


def cliques(sizes):
    """A graph of separate cliques with interleaved names."""
    owner = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    edges = np.array([(a, b) for a in range(len(owner)) for b in range(len(owner)) if a != b and owner[a] == owner[b]])
    return owner, edges, np.ones(len(edges))


@pytest.mark.parametrize("sizes", [[5, 5, 5], [3, 8, 4, 6, 9], [10, 4]])
def test_spectral_clusters_of_separate_cliques_are_the_cliques(sizes):
    """As many clusters as cliques: every clique is one; asked twice, the same."""
    owner, edges, weight = cliques(sizes)
    label = spectral_clusters(edges, weight, len(owner), len(sizes))
    assert len(set(zip(owner.tolist(), label.tolist(), strict=True))) == len(set(label.tolist())) == len(sizes)
    assert np.array_equal(label, spectral_clusters(edges, weight, len(owner), len(sizes)))


def test_spectral_clusters_cut_where_the_weights_are_small():
    """Two groups joined by a weak bridge, without which they would be one component."""
    owner, edges, weight = cliques([8, 8])
    bridge = np.array([[np.flatnonzero(owner == 0)[0], np.flatnonzero(owner == 1)[0]]])
    edges, weight = np.concatenate([edges, bridge, bridge[:, ::-1]]), np.append(weight, [0.05, 0.05])
    label = spectral_clusters(edges, weight, 16, 2)
    assert len(set(zip(owner.tolist(), label.tolist(), strict=True))) == 2
    none = np.zeros((0, 2), int)
    assert spectral_clusters(none, np.zeros(0), 2).tolist() == [0, 1]
    assert set(spectral_clusters(none, np.zeros(0), 9, 4)) == {0, 1, 2, 3}, "without edges any labels, but no more"


def test_proposals_are_clusters_of_superpoints_with_the_extent_of_their_points(text, scenes):
    """At most 48, no category, every drawn point in one; the same when asked again."""
    model = make(text).eval()
    for scene, count in ((scenes[0], 48), (scenes[1], 6)):
        found = model.propose(scene, count)
        labels = set(found.instances.tolist()) - {0}
        assert labels == {o.id for o in found.objects} and 1 < len(labels) <= count
        assert {(o.category, o.colour) for o in found.objects} == {("", "")} and "spectral clusters" in found.notes[-1]
        for o in found.objects:
            mine = scene.points[found.instances == o.id]
            assert np.allclose(o.box, np.concatenate([(mine.min(0) + mine.max(0)) / 2, np.ptp(mine, 0)]), atol=1e-5)
            assert len(set(scene.superpoints[found.instances == o.id])) >= 1
        pairs = set(zip(scene.superpoints.tolist(), found.instances.tolist(), strict=True))
        assert len({s for s, i in pairs if i}) == len([i for _, i in pairs if i]), "a superpoint is never cut"
        again = model.propose(scene, count)
        assert np.array_equal(again.instances, found.instances)
    assert np.array_equal(scenes[0].superpoints, model.propose(scenes[0]).superpoints)


def test_pictures_show_clouds_curves_and_graphs(text, scenes, tmp_path):
    """Three files a scene, none blank."""
    from PIL import Image

    paths = make(text).pictures(scenes, tmp_path, 1)
    assert [p.name for p in paths] == [f"{scenes[0].name}{what}.png" for what in ("", "_curves", "_graph")]
    assert all(len(Image.open(p).convert("RGB").getcolors(1 << 24)) > 1000 for p in paths)


# ---- 9 adapters and runs as files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_and_filter_reload_to_equal_logits(hubs, scenes, family, tmp_path):
    """Into a model whose tokenizer, adapters and filter started elsewhere."""
    first, second = wake(load(hubs[family], seed=0)), wake(load(hubs[family], seed=5), seed=6)
    groups = asked(scenes)
    expected = told(first, groups)[0]
    assert not torch.allclose(told(second, groups)[0], expected, atol=1e-2)
    save_adapters(first, tmp_path)
    load_adapters(second, tmp_path)
    assert torch.equal(told(second, groups)[0], expected)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["text", "vision"]


def test_a_folder_without_the_filter_is_refused(hubs, tmp_path):
    """Adapters alone are not the model: what plain peft wrote, or a file that is not ours, is named with the remedy."""
    model = wake(load(hubs["qwen"]))
    save_adapters(model, tmp_path)
    file = tmp_path / "fase3d.safetensors"
    tensors = load_file(file)
    save_file(tensors, file)  # without the marker
    with pytest.raises(DataError, match=r"fase3d\.safetensors: not marked as Fase3D's; save it with"):
        load_adapters(model, tmp_path)
    kept = {k: v for k, v in tensors.items() if not k.startswith("filters.")}
    save_file(kept, file, metadata={**fase3d.MARKER, "filter": "vision"})
    with pytest.raises(DataError, match=r"filters\.0\.gain is missing there, \(32,\) in this model"):
        load_adapters(model, tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=r"no fase3d\.safetensors; adapters alone are not the model: filter, "):
        load_adapters(model, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [(dict(rank=8), r"lora_A\.\w+\.weight is \(4, \d+\) there, \(8, \d+\) in this model"),
     (dict(dim=48), r"coordinate\.lift\.bias is \(24,\) there, \(48,\) in this model"),
     (dict(filter="none"), r"filter is 'vision' there, 'none' in this model"),
     (dict(adapted_layers=1), r"filters\.1\.gain is \(32,\) there, missing in this model"),
     (dict(adapters="shared"), r"shared.adapter_model\.safetensors: missing, this model has an adapter 'shared'")],
    ids=str,
)  # fmt: skip
def test_a_folder_of_other_settings_is_refused(hubs, tmp_path, change, message):
    """In one line that names what differs; the model is left as it was."""
    save_adapters(wake(load(hubs["qwen"])), tmp_path)
    model = load(hubs["qwen"], **change)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(DataError, match=rf"^[^\n]*{message}[^\n]*$"):
        load_adapters(model, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["vision", "text"])
def test_plain_peft_loads_one_adapter_for_all_tokens_and_no_filter(hubs, family, name, tmp_path):
    """What others see in our folder: the same as our model with every token of one kind and the filter at rest."""
    from peft import PeftModel

    model = wake(load(hubs[family]))
    save_adapters(model, tmp_path)
    theirs = PeftModel.from_pretrained(base(hubs[family]), tmp_path / name).eval()
    x, vision = some_input(model)
    with torch.no_grad():
        expected = theirs(inputs_embeds=x).logits
    every = torch.full_like(vision, name == "vision")
    for own in model.filters:
        nn.init.ones_(own.gain)
    assert torch.allclose(logits(model, x, every), expected, atol=1e-4)
    assert not torch.allclose(logits(model, x, vision), expected, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_holds_no_borrowed_weight_and_reloads_to_equal_logits(hubs, scenes, family, tmp_path):
    """Billions of frozen numbers lie where `llm` names them; the tied output matrix of Qwen among them."""
    first = wake(load(hubs[family]))
    groups = asked(scenes)
    expected = told(first, groups)[0]
    record = {"model": "fase3d", "config": asdict(first.config), "text": first.text.state()}
    train.save(tmp_path, first, None, {"position": {}, "run": json.loads(json.dumps(record))})
    names = set(data.read_tensors(tmp_path, "weights"))
    assert all("lora_" in n for n in names if n.startswith("llm.")) and any("lora_B" in n for n in names)
    parts = {"llm", "filters", "initial", "enhancer", "merger", "place", "coordinate"}
    assert {n.split(".")[0] for n in names} == parts
    again = data.load_model(fase3d, tmp_path)
    again.configure_stage(TOKENS)
    assert torch.equal(told(again, groups)[0], expected)


def test_a_language_model_that_trains_is_in_the_checkpoint(text, hubs):
    """The tiny one, and a loaded one under full fine-tuning."""
    for model in (make(text), load(hubs["llama"], adapters="full")):
        assert {"llm.model.embed_tokens.weight", "llm.model.norm.weight"} <= set(data.named_weights(model))


# ---- alternatives ----------------------------------------------------------------------------------------------------


def test_farthest_seeds_are_the_superpoints_of_the_farthest_points():
    """Each once, in the order of the points, more drawn until there are enough."""
    points, owner, edges = random_cloud(N=300)
    M = int(owner.max()) + 1
    for count in (1, 5, M, 4 * M):
        seeds, places = farthest_seeds(points, owner, edges, count)
        expected = list(dict.fromkeys(owner[data.farthest_point_sampling(points, len(points))].tolist()))
        assert seeds.tolist() == expected[:count]
        assert all((points[owner == s] == p).all(1).any() for s, p in zip(seeds.tolist(), places, strict=True))


def test_the_q_former_reads_each_scene_alone():
    """M, T and d differ; companions change nothing."""
    torch.manual_seed(0)
    former = QFormer(7, 12, 4).eval()
    S = torch.randn(30, 12)
    both = former(S, [20, 10], [7, 5])
    assert both.shape == (12, 12)
    assert torch.allclose(both[:7], former(S[:20], [20], [7]), atol=1e-6)
    assert torch.allclose(both[7:], former(S[20:], [10], [5]), atol=1e-6)


# ---- shapes ----------------------------------------------------------------------------------------------------------


def test_every_shape_in_a_comment_is_true_with_all_axes_different(text, hubs, scenes):
    """Statement by statement (`shapes.wrong_shapes`); a packed row per scene makes R = B."""
    groups = asked(scenes, 4, {"id_category": 1})

    def run():
        models = [make(text, window=10), load(hubs["qwen"], window=10),
                  make(text, selector="qformer", window=10)]  # fmt: skip
        for model in models:
            model(model.batch(groups))
            model.eval().propose(scenes[0])
            model.generate(model.batch(groups[:2]), 1)
        for stage in (WORDS, TOKENIZER):
            models[0].configure_stage(stage)
            models[0].prepare(scenes)
            models[0](models[0].batch(groups))

    known = lambda function: {"D": 32, **({"N": 608} if function == "vote_graph" else {})}  # noqa: E731
    assert wrong_shapes(fase3d, run, ({"R", "B"}, {"k", "C"}), known) == []
