"""Fase3D: every part against a slow and obvious version, and what the whole model promises.

What holds for all papers (packed questions, loss, generation, caches, shapes) is in test_contract.py.
"""

import cmath
import itertools
import math
import re
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import fase3d
from data import DataError, Stage, TinyText, augment, questions, room
from fase3d import (
    ADAPTERS,
    CURVES,
    FILTERS,
    SELECTORS,
    STAGES,
    TUNED,
    Config,
    Model,
    TinyModel,
)

TOKENIZER = dict(points=608, dim=24, hidden=20, heads=4, window=16, tokens=14)
SMALL = dict(TOKENIZER, prompt_neighbors=5, rank=4, alpha=4, filter_heads=8, adapted_layers=2)
TINY = dict(SMALL, reader=(32, 3, 2, 48), no_color=0.0)
TOKENS = Stage("tokens", {"count": 1}, fase3d.PARTS, "tokens")
MIX = {"count": 2, "id_category": 2, "id_color": 1, "caption": 1, "what": 1}
FAMILIES = ("qwen", "llama", "opt")


def make(text, stage=TOKENS, **changes):
    torch.manual_seed(0)
    model = TinyModel(Config.tiny(**{**TINY, **changes}), text)
    model.configure_stage(stage)
    return model


def with_questions(scenes, count=3, mix=MIX):
    rng = np.random.default_rng(0)
    return [(scene, questions(scene, mix, count, rng)) for scene in scenes]


@pytest.fixture(scope="module")
def text():
    return TinyText(data.vocabulary())


@pytest.fixture(scope="module")
def scenes():
    """Three rooms with different numbers of objects and superpoints, mirrored or not."""
    rng = np.random.default_rng(0)
    sizes = {0: 9, 1: 12, 4: 7}
    found = [augment(room(s, objects=n, views=0, points=700), rng) for s, n in sizes.items()]
    return found


@pytest.fixture(scope="module")
def hubs(tmp_path_factory, text):
    """Folders with a small Qwen2 (tied words, grouped keys), Llama and OPT, as they lie on disk."""
    from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, Qwen2Config

    same = dict(
        vocab_size=len(text),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    same |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=1)
    configs = {
        "qwen": Qwen2Config(
            intermediate_size=40,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            **same,
        ),
        "llama": LlamaConfig(intermediate_size=40, tie_word_embeddings=False, **same),
        "opt": OPTConfig(ffn_dim=40, word_embed_proj_dim=32, **same),
    }

    # weights large enough for answers that vary
    folders = {}
    for family, config in configs.items():
        torch.manual_seed(0)
        llm = AutoModelForCausalLM.from_config(config)
        for p in llm.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=2 * p.shape[1] ** -0.5)
        folders[family] = str(tmp_path_factory.mktemp(family))
        llm.save_pretrained(folders[family])
    return folders


def load(folder, text, **changes):
    torch.manual_seed(0)
    model = Model(Config(**{"llm": folder, "dtype": "float32", **SMALL, **changes}), text)
    model.configure_stage(TOKENS)
    return model.eval()


@torch.no_grad()
def wake(model):
    """Move adapters and filters as training does: they start at B = 0 and at the identity."""
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if ".lora." in name and name.endswith(".1.weight"):
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
        if name.endswith(".gain"):
            p.copy_(1 + torch.randn(p.shape, generator=g))
    return model


# ---- 1 token initialization ----------------------------------------------------------------------


def test_the_fourier_code_equals_its_formula():
    """sin of all phases, then cos: phase 100 x / 1000^(i / F), axis by axis."""
    x = torch.rand(2, 3)
    for row, code in zip(x.tolist(), fase3d.fourier_code(x, 24).tolist(), strict=True):
        phase = [100 * c / 1000 ** (i / 4) for c in row for i in range(4)]
        assert code == pytest.approx([*map(math.sin, phase), *map(math.cos, phase)], abs=2e-5)


def test_superpoint_features_equal_equation_1_point_by_point():
    """The mean over a superpoint may be taken before the last linear map: it is linear."""
    torch.manual_seed(0)
    initial = fase3d.Initial(channels=6, hidden=10, dim=12)
    f, p, owner = torch.randn(50, 6), torch.rand(50, 3), torch.arange(50) * 5 % 7
    S = initial(f, p, owner)
    x = initial.out(initial.lift(f)) + fase3d.fourier_code(p, 12)  # [N, d] of every point
    for m in range(7):
        own = torch.stack([x[n] for n in range(50) if owner[n] == m])
        assert torch.allclose(S[m], own.mean(0), atol=1e-5)


# ---- 2 serialization -----------------------------------------------------------------------------


def full_grid(bits):
    side = torch.arange(2**bits)
    return torch.cartesian_prod(side, side, side)


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_keys_number_a_full_grid_and_hilberts_steps_are_to_face_neighbors(bits):
    """What is near in the sequence is near in the room: the property for which it is used."""
    grid = full_grid(bits)
    for keys in (fase3d.morton, fase3d.hilbert):
        assert keys(grid, bits).sort().values.tolist() == list(range(8**bits))
    steps = grid[fase3d.hilbert(grid, bits).argsort()].diff(dim=0).abs()
    assert (steps.sum(1) == 1).all()


def hilbert_slowly(cell, bits):
    """Skilling's published loops (AxestoTranspose), on Python's whole numbers."""
    # undo the turns, from the highest bit down
    x, q = list(cell), 1 << (bits - 1)
    while q > 1:
        for i in range(3):
            if x[i] & q:
                x[0] ^= q - 1
            else:
                swap = (x[0] ^ x[i]) & (q - 1)
                x[0] ^= swap
                x[i] ^= swap
        q >>= 1

    # Gray code
    x[1] ^= x[0]
    x[2] ^= x[1]
    t, q = 0, 1 << (bits - 1)
    while q > 1:
        if x[2] & q:
            t ^= q - 1
        q >>= 1

    # bits of the three axes in turn
    key = 0
    for bit in reversed(range(bits)):
        for axis in x:
            key = key << 1 | (axis ^ t) >> bit & 1
    return key


@pytest.mark.parametrize("bits", [1, 4, 10, 16])
def test_keys_equal_the_paper_and_skillings_loops(bits):
    """Morton: sum_j x_j 2^(3j) + y_j 2^(3j+1) + z_j 2^(3j+2)."""
    grid = torch.randint(0, 2**bits, (200, 3), generator=torch.Generator().manual_seed(0))
    grid = torch.cat([grid, full_grid(1) * (2**bits - 1)])  # corners too
    morton, hilbert = fase3d.morton(grid, bits), fase3d.hilbert(grid, bits)
    for cell, m, h in zip(grid.tolist(), morton, hilbert, strict=True):
        pairs = itertools.product(range(bits), enumerate(cell))
        assert int(m) == sum((c >> j & 1) << (3 * j + axis) for j, (axis, c) in pairs)
        assert int(h) == hilbert_slowly(cell, bits)


def test_quantization_equals_equation_6():
    """floor((2^b - 1)(c - min) / (max - min)); an axis without extent is 0."""
    points = torch.tensor([[0.0, 2.0, -1.0], [1.0, 2.0, 0.0], [0.5, 2.0, 1.0], [0.26, 2.0, 0.99]])
    cells = [[0, 0, 0], [3, 0, 1], [1, 0, 3], [0, 0, 2]]
    assert fase3d.quantize(points, 2).tolist() == cells
    assert fase3d.quantize(points[:1], 10).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("name", CURVES)
def test_every_curve_is_the_plain_one_of_permuted_axes(name):
    """Transposed: x and y change places. Vertical: z comes in front. Ties are ordered by place."""
    points = torch.rand(300, 3)
    axes = {"transposed": [1, 0, 2], "vertical": [2, 0, 1]}.get(name.split()[0], [0, 1, 2])
    order = fase3d.curve_order(points, name, 10)
    plain = fase3d.curve_order(points[:, axes], name.split()[-1], 10)
    assert torch.equal(order, plain)

    # and unlike every other curve
    others = [fase3d.curve_order(points, o, 10).tolist() for o in CURVES if o != name]
    assert order.tolist() not in others

    # whatever the order of the input, also within one cell
    shuffled = torch.randperm(300)
    again = fase3d.curve_order(points[shuffled], name, 2)
    assert torch.equal(points[shuffled][again], points[fase3d.curve_order(points, name, 2)])


# ---- 3 FFT context enhancer ----------------------------------------------------------------------


def windowed_filter_slowly(x, gate):
    """One sequence x [n, d]: window by window, channel by channel, sums for Fourier transforms."""
    (n, d), H, L = x.shape, len(gate), 2 * (len(gate[0]) - 1)
    hann = [0.5 - 0.5 * math.cos(2 * math.pi * t / L) for t in range(L)]
    out, norm = np.zeros((n, d)), np.zeros(n)
    for start in range(-L // 2, n, L // 2):
        here = [t for t in range(L) if 0 <= start + t < n]
        for c in range(d):
            G = gate[c // (d // H)]
            mean = sum(x[start + t, c] for t in here) / len(here)
            u = {t: (x[start + t, c] - mean) * hann[t] for t in here}

            # its mean aside, the window times Hann goes through the gate
            spectrum = []
            for k in range(L):
                wave = sum(u[t] * cmath.exp(-2j * math.pi * k * t / L) for t in here)
                spectrum.append(wave * G[min(k, L - k)])  # a real signal's spectrum is symmetric

            # and comes back, times Hann again
            for t in here:
                waves = [b * cmath.exp(2j * math.pi * k * t / L) for k, b in enumerate(spectrum)]
                y = sum(waves).real / L
                out[start + t, c] += (y + mean * G[0] * hann[t]) * hann[t]

        # what the windows add up to
        for t in here:
            norm[start + t] += hann[t] ** 2
    return out / norm[:, None]


@pytest.mark.parametrize("M", [1, 3, 8, 21])
def test_the_windowed_filter_equals_a_loop_over_windows_and_frequencies(M):
    """From shorter than half a window to several windows; C, M, d, H and L all differ."""
    g = torch.Generator().manual_seed(0)
    x, gate = torch.randn(2, M, 6, generator=g), torch.rand(3, 5, generator=g)
    out = fase3d.windowed_filter(x, gate)
    for row, own in zip(x.double().numpy(), out.numpy(), strict=True):
        assert np.abs(own - windowed_filter_slowly(row, gate.double().tolist())).max() < 2e-6


@pytest.mark.parametrize("M", [1, 7, 8, 9, 16, 130, 300])
@pytest.mark.parametrize("L", [16, 128])
def test_with_gate_one_the_enhancer_doubles_its_input_at_both_ends_too(M, L):
    """Windows that add up to one everywhere, also where a sequence is shorter than a window."""
    g = torch.Generator().manual_seed(M)
    S = torch.rand(M, 12, generator=g) * 2 - 1
    orders = torch.stack([torch.randperm(M, generator=g) for _ in range(4)])
    assert (fase3d.enhance(S, orders, torch.ones(3, L // 2 + 1)) - 2 * S).abs().max() <= 1e-6


def test_the_enhancer_is_the_mean_over_curves_each_put_back_in_place():
    """Eq. (3), one curve at a time."""
    g = torch.Generator().manual_seed(0)
    S, gate = torch.randn(19, 8, generator=g), torch.rand(4, 5, generator=g)
    orders = torch.stack([torch.randperm(19, generator=g) for _ in range(3)])
    expected = S.clone()
    for order in orders:
        y = fase3d.windowed_filter(S[order][None], gate)[0]
        for place, m in enumerate(order.tolist()):
            expected[m] += y[place] / 3
    assert torch.allclose(fase3d.enhance(S, orders, gate), expected, atol=1e-5)


def test_the_gate_starts_as_a_low_pass_of_each_heads_own_width():
    """From one wave per window to all of them; in float32 under autocast too; all of it learns."""
    enhancer = fase3d.Enhancer(4, 16)
    gate = F.softplus(enhancer.theta).detach().view(4, 9)
    assert (gate > 0).all()
    assert torch.allclose(gate[:, 0], torch.ones(4))
    assert (gate.diff(dim=1) < 0).all()
    assert (gate[1:, 1:] > gate[:-1, 1:]).all()
    assert gate[0, 1] == pytest.approx(0.5)
    assert gate[3, 8] == pytest.approx(0.5)

    # the same under autocast, and every bin with a gradient
    S, orders = torch.randn(30, 8), torch.arange(30).repeat(2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        low = enhancer(S, orders)
    assert torch.equal(low, enhancer(S, orders))
    enhancer(S, orders).square().sum().backward()
    assert (enhancer.theta.grad != 0).all()


# ---- 4 superpoint graph --------------------------------------------------------------------------


def random_cloud(N=220, seed=0):
    """Points [N, 3], some on one another, and their superpoints, some in two places."""
    g = torch.Generator().manual_seed(seed)
    points = torch.rand(N, 3, generator=g)
    points[5:9] = points[5]
    cell = (points * 3).long().clamp(max=2) @ torch.tensor([9, 3, 1])
    return points, (cell % 17).unique(return_inverse=True)[1]


def vote_slowly(points, superpoints, curves, window, stride):
    """Votes by counting: center by center, neighbor by neighbor."""
    votes = Counter()
    for name in curves:
        line = superpoints[fase3d.curve_order(points, name, 16)].tolist()
        for at in range(0, len(line), stride):
            for other in range(max(0, at - window // 2), min(len(line), at + window // 2 + 1)):
                if line[at] != line[other]:
                    votes[line[at], line[other]] += 1
    return dict(votes)


@pytest.mark.parametrize(("window", "stride"), [(64, 16), (6, 4), (10, 1)])
def test_the_graph_equals_a_brute_force_vote_count(window, stride):
    """Every pair, every vote; also at the ends of the curves."""
    points, owner = random_cloud()
    for curves in (["z"], list(CURVES)[:4]):
        pairs, votes = fase3d.vote_graph(points, owner, curves, window, stride)
        found = dict(zip(map(tuple, pairs.tolist()), votes.tolist(), strict=True))
        assert found == vote_slowly(points, owner, curves, window, stride)
        assert len(found) > 20


def test_the_edges_kept_are_the_nearest_then_most_voted_and_symmetric():
    """Against sorting in a loop; centers on a grid give ties of distance, which votes decide."""
    g = torch.Generator().manual_seed(0)
    centers = full_grid(2)[torch.randperm(64, generator=g)[:20]].float()
    every = itertools.permutations(range(20), 2)
    pairs = torch.tensor([(a, b) for a, b in every if (7 * a + 3 * b) % 4])
    votes = torch.randint(1, 6, (len(pairs),), generator=g)
    for k in (1, 3, 100):
        # each node's candidates, sorted
        rows = defaultdict(list)
        for (a, b), v in zip(pairs.tolist(), votes.tolist(), strict=True):
            rows[a].append((int((centers[a] - centers[b]).square().sum()), -v, b))
        kept = {(a, b): -v for a in rows for _, v, b in sorted(rows[a])[:k]}

        # both ends share the larger vote
        expected = {}
        for a, b in kept:
            most = max(kept[a, b], kept.get((b, a), 0))
            expected |= {(a, b): most, (b, a): most}
        edges, most = fase3d.nearest_edges(pairs, votes, centers, k)
        assert dict(zip(map(tuple, edges.tolist()), most.tolist(), strict=True)) == expected


# ---- 5 token merging -----------------------------------------------------------------------------


def chain(count):
    """A graph that links every superpoint to the next."""
    links = torch.stack([torch.arange(count - 1), torch.arange(1, count)], 1)
    return torch.cat([links, links.flip(1)])


def test_seeds_of_a_line_by_hand():
    """Seven superpoints in a line: farthest points lie on 6, 0, 3, then on 1 and 5.

    These are neighbors of kept seeds and step back; but all are covered by now, so they get the
    places that are left.
    """
    # points every few centimeters around 0, 10, 20 ... meters
    sizes = torch.tensor([4, 4, 9, 4, 4, 4, 4])
    owner = torch.arange(7).repeat_interleave(sizes)
    along = torch.cat([10.0 * m + torch.arange(n) / n for m, n in enumerate(sizes.tolist())])
    points = torch.stack([along, along * 0, along * 0], 1)

    # what farthest points alone would give
    drawn = owner[data.farthest_point_sampling(points, 6)].tolist()
    assert drawn[:3] == [6, 0, 3]
    assert set(drawn[3:5]) == {1, 5}

    # seeds are the same, in the same order
    for count in (3, 5, 6):
        assert fase3d.choose_seeds(points, owner, chain(7), count)[0].tolist() == drawn[:count]


def test_free_places_go_to_what_no_seed_covers_and_the_largest_first():
    """A wall of 31 m and five small things behind it: of four farthest points three are the wall's.

    0 and 5 cover 1 and 4; of 2 and 3 the larger is taken and covers the other; then the largest.
    """
    owner = torch.arange(6).repeat_interleave(torch.tensor([31, 3, 1, 2, 1, 1]))
    points = torch.zeros(39, 3)
    points[:31, 0] = torch.arange(31)
    points[31:, 0] = 30 + owner[31:] + 0.01 * torch.arange(8)

    # what farthest points alone would give
    drawn = owner[data.farthest_point_sampling(points, 4)].tolist()
    assert set(drawn[:2]) == {0, 5}
    assert drawn[2:] == [0, 0]

    # the wall's second and third give way
    seeds, places = fase3d.choose_seeds(points, owner, chain(6), 4)
    assert seeds.tolist() == [*drawn[:2], 3, 1]
    assert places[3].tolist() == points[32].tolist(), "the point nearest the middle of 1"


@pytest.mark.parametrize("count", [1, 6, 20, 500])
def test_seeds_are_spread_before_they_are_neighbors(count):
    """T = min(count, M), each once, at a point of its own; neighbors only when all is covered."""
    for seed in range(4):
        points, owner = random_cloud(N=600, seed=seed)
        M = int(owner.max()) + 1
        centers = fase3d.superpoint_mean(points, owner)
        votes = fase3d.vote_graph(points, owner, ["z", "hilbert"], 64, 16)
        edges, _ = fase3d.nearest_edges(*votes, centers, 2)
        seeds, places = fase3d.choose_seeds(points, owner, edges, count)
        assert len(set(seeds.tolist())) == len(places) == min(count, M)

        # every seed at one of its own points
        for s, place in zip(seeds.tolist(), places, strict=True):
            assert (points[owner == s] == place).all(1).any()

        # a neighbor of an earlier seed comes only when every superpoint is covered
        near, covered = defaultdict(set), set()
        for a, b in edges.tolist():
            near[a].add(b)
        for s in seeds.tolist():
            if s in covered:
                assert covered == set(range(M))
            covered |= {s} | near[s]


def test_pooled_tokens_equal_the_formula_written_as_a_loop():
    """z_t = sum_i w_i S_i / sum_i w_i: 1 for the seed, max(0, cos) * strength for a neighbor."""
    torch.manual_seed(0)
    S, seed = torch.randn(13, 7), torch.tensor([4, 12, 0, 9, 7])

    # edges at the seeds: whose, to which superpoint, how strong
    token = torch.tensor([0, 0, 0, 2, 2, 3, 4, 4, 4, 4])  # token 1 stands alone
    member = torch.tensor([1, 5, 8, 3, 12, 2, 0, 1, 10, 11])
    strength = torch.rand(10)
    z = fase3d.graph_pool(S, seed, token, member, strength)
    for t, s in enumerate(seed.tolist()):
        # the seed, then its neighbors one by one
        total, weights = S[s].clone(), 1.0
        for e in (token == t).nonzero()[:, 0]:
            w = max(0.0, float(F.cosine_similarity(S[s], S[member[e]], dim=0))) * strength[e]
            total, weights = total + w * S[member[e]], weights + w
        assert torch.allclose(z[t], total / weights, atol=1e-5)
    assert torch.equal(z[1], S[12])


def rms(x):
    return float(x.detach().float().square().mean().sqrt())


def test_tokens_enter_at_the_size_of_the_word_vectors(text, scenes, hubs):
    """Merged tokens and places alike; tokens a hundred times smaller are not found by attention."""
    for model in (make(text), load(hubs["opt"], text)):
        words = rms(model.llm.get_input_embeddings().weight)
        assert rms(model.scene_tokens(scenes[0])["tokens"]) == pytest.approx(words, rel=0.02)
        places = model.place(data.fourier_waves(torch.rand(500, 3) * 5))
        assert rms(places) == pytest.approx(words, rel=0.2)


# ---- 6 positions and the coordinate token --------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 50])
def test_the_coordinate_token_equals_a_loop_over_its_neighbors(k):
    """MLP([code(c); mean over the k nearest of z + code(offset)]); of fewer than k all count."""
    torch.manual_seed(0)
    token = fase3d.CoordinateToken(12, 10, 0.5)
    c, z, places = torch.randn(4, 3), torch.randn(9, 12), torch.randn(9, 3)
    box = torch.tensor([[-2.0, -3.0, -2.5], [2.0, 2.5, 3.5]])
    size = box[1] - box[0]

    # one click at a time
    for own, out in zip(c, token(c, box, z, places, k), strict=True):
        near = (places - own).norm(dim=1).argsort()[:k].tolist()
        around = [z[t] + fase3d.fourier_code((places[t] - own) / size, 12) for t in near]
        here = fase3d.fourier_code((own - box[0]) / size, 12)
        expected = token.mlp(torch.cat([here, torch.stack(around).mean(0)]))
        assert torch.allclose(out, expected, atol=1e-4)


def test_clicks_and_tokens_are_coded_in_one_box(text, scenes):
    """That of the points drawn, also where a point that was not drawn lies far away."""
    model, scene = make(text, points=300).eval(), scenes[0]
    index = model.load_features(scene)["index"].numpy()
    left_out = np.setdiff1d(np.arange(len(scene.points)), index)
    far = replace(scene, points=scene.points.copy())
    far.points[left_out[0]] = 50.0
    seen, other = model.encode([scene]), model.encode([far])

    # nothing notices it
    expected = np.stack([scene.points[index].min(0), scene.points[index].max(0)])
    assert np.array_equal(seen["box"][0].numpy(), expected)
    assert all(torch.equal(seen[key], other[key]) for key in seen)


# ---- 7 filter, adapters, routing -----------------------------------------------------------------


def test_the_filter_equals_a_dense_circulant_matrix_and_the_complex_fft():
    """Multiplying spectra is convolving around a circle: (z + K z) / 2, K[i, j] = k[i - j]."""
    torch.manual_seed(0)
    z, gain, w = torch.randn(5, 24), torch.randn(3, 8), 8
    out = fase3d.global_filter(z, gain)

    # head by head, a kernel from its gains
    for h, G in enumerate(gain.tolist()):
        waves = [[g * cmath.exp(2j * math.pi * k * t / w) for k, g in enumerate(G)] for t in range(w)]
        kernel = [sum(wave).real / w for wave in waves]
        K = torch.tensor([[kernel[(i - j) % w] for j in range(w)] for i in range(w)])
        x = z[:, h * w : (h + 1) * w]
        assert torch.allclose(out[:, h * w : (h + 1) * w], (x + x @ K.T) / 2, atol=1e-5)

    # half of a spectrum is enough
    x = z.view(5, 3, 8)
    mixed = torch.fft.ifft(torch.fft.fft(x) * gain).real
    assert (out - ((x + mixed) / 2).flatten(1)).abs().max() < 1e-6


def test_the_filter_is_the_identity_at_start():
    """G = 1: a frozen model must not be thrown off by an untrained filter."""
    z = torch.randn(5, 24)
    assert (fase3d.global_filter(z, torch.ones(4, 6)) - z).abs().max() < 1e-6
    half = z.bfloat16()
    assert fase3d.global_filter(half, torch.ones(4, 6)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ADAPTERS)
def test_decoupled_lora_equals_a_loop_over_tokens(name):
    """Base map for all; alpha / rank * B A x of the pair of its kind; a kind without one passes."""
    torch.manual_seed(0)

    # twenty tokens of two kinds, pairs that are not zero
    vision = torch.rand(20) < 0.4
    index = {"vision": vision.nonzero()[:, 0], "text": (~vision).nonzero()[:, 0]}
    route = ADAPTERS[name]
    layer = fase3d.DecoupledLoRA(nn.Linear(6, 9), route, 1.5, index)
    for pair in set(route.values()):
        layer.add(pair, 2)
        nn.init.normal_(layer.lora[pair][1].weight)

    # token by token
    x = torch.randn(4, 5, 6)
    out = layer(x).view(20, 9)
    for row, is_vision, own in zip(x.view(20, 6), vision.tolist(), out, strict=True):
        expected = layer.base(row)
        if pair := route.get("vision" if is_vision else "text"):
            expected = expected + 1.5 * layer.lora[pair](row)
        assert torch.allclose(own, expected, atol=1e-5)


def some_input(model):
    """Embeddings [2, 11, D] whose first six tokens are vision."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 11, model.llm.config.hidden_size, generator=g)
    return x, (torch.arange(11) < 6).expand(2, 11)


@torch.no_grad()
def hidden(model, x, vision):
    """The decoder's output, under a plain causal mask."""
    places = torch.arange(11).expand(2, 11)
    mask = torch.ones(11, 11, dtype=torch.bool).tril().expand(2, 1, 11, 11)
    return model.run_decoder(x, vision, places, mask)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_at_start_adapters_change_nothing_and_the_filter_rounds(hubs, text, family, adapters):
    """B = 0 and G = 1: the frozen model answers as anybody loads it."""
    from transformers import AutoModelForCausalLM

    # as anybody loads it
    plain = AutoModelForCausalLM.from_pretrained(hubs[family]).eval()
    model = load(hubs[family], text, adapters=adapters, filter="none")
    x, vision = some_input(model)
    with torch.no_grad():
        expected = plain.base_model(inputs_embeds=x).last_hidden_state
    assert torch.allclose(hidden(model, x, vision), expected, atol=1e-6)

    # with the filter: the FFT there and back
    filtered = load(hubs[family], text, adapters=adapters, filter="both")
    assert (hidden(filtered, x, vision) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["vision", "text"])
def test_an_adapter_moves_the_paths_of_its_own_tokens_only(hubs, text, family, kind):
    """Token by token in the FFN; in the model nothing in front of the first token of its kind."""
    model = wake(load(hubs[family], text))
    x, vision = some_input(model)
    mine = vision if kind == "vision" else ~vision
    layers = [m for m in model.llm.modules() if isinstance(m, fase3d.DecoupledLoRA)]
    assert len(layers) == 2 * (2 if family == "opt" else 3)

    # every token's output of the first map, with B and with -B
    seen = []
    hook = layers[0].register_forward_hook(lambda layer, given, out: seen.append(out.view(2, 11, -1)))
    before = hidden(model, x, vision)
    for layer in layers:
        layer.lora[kind][1].weight.data.mul_(-1)
    after = hidden(model, x, vision)
    hook.remove()

    # its own tokens in the FFN; in the model whatever can see one of them
    assert torch.equal((seen[1] - seen[0]).abs().amax(-1) > 1e-5, mine)
    moved = (after - before).abs().amax(-1) > 1e-5
    assert torch.equal(moved, mine.int().cummax(1).values.bool())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", FILTERS)
def test_the_filter_acts_on_the_tokens_it_is_for(hubs, text, family, where):
    """In front of the adapted FFNs; the weights exist for all, so ablations share a start."""
    model = wake(load(hubs[family], text, adapters="none", filter=where))
    filters = [m for m in model.llm.modules() if isinstance(m, fase3d.FourierFilter)]
    assert len(filters) == 2
    assert len(model.parts()["filter"]) == (0 if where == "none" else 2)

    # one pass says which token is which
    x, vision = some_input(model)
    hidden(model, x, vision)
    moved = (filters[0](x) - x).abs().amax(-1) > 1e-5
    kinds = {"none": vision & ~vision, "vision": vision, "both": vision | ~vision}
    assert torch.equal(moved, kinds[where])


@pytest.mark.parametrize("adapters", ["vision", "shared", "decoupled"])
@pytest.mark.parametrize("where", ["vision", "both"])
def test_whatever_trains_gets_a_gradient_where_every_layer_is_adapted(text, scenes, adapters, where):
    """Nothing reads vision tokens behind the last layer: what would serve them alone is not there."""
    model = wake(make(text, adapted_layers=3, adapters=adapters, filter=where))
    out = model(model.batch(with_questions(scenes)))
    out["loss"].backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert not [n for n, p in trained.items() if p.grad is None or not p.grad.any()]
    with pytest.raises(DataError, match=r"^adapted_layers = 4; the llm has 3$"):
        make(text, adapted_layers=4)


def test_a_language_model_with_another_ffn_is_refused(hubs, text, monkeypatch):
    """In one line that names the linear maps that are known."""
    monkeypatch.setattr(fase3d, "FFN", {"w1", "w2"})
    with pytest.raises(DataError, match=r"^LlamaForCausalLM: its FFN has none of w1, w2$"):
        load(hubs["llama"], text)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(hubs, text, scenes, family):
    """To the bit: layers that run again during the backward pass route their tokens as before."""
    found = []
    for recompute in (False, True):
        model = wake(load(hubs[family], text)).train()
        if recompute:
            model.gradient_checkpointing_enable()
        out = model(model.batch(with_questions(scenes)))
        out["loss"].backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gates_and_gains_are_vectors_so_that_they_do_not_decay(text):
    """The optimizer decays what has two dimensions; decay would open the gate by itself."""
    model = make(text)
    assert model.enhancer.theta.dim() == 1
    assert all(gain.dim() == 1 for gain in model.parts()["filter"])


def test_a_checkpoint_leaves_out_what_the_language_models_folder_holds(hubs, text):
    """Tied words under both names; not in a model that trains its language model."""
    for family in FAMILIES:
        kept = data.named_weights(load(hubs[family], text))
        inside = [n for n in kept if n.startswith("llm.")]
        assert inside and all(".lora." in n or n.endswith(".gain") for n in inside)
    for model in (make(text), load(hubs["llama"], text, adapters="full")):
        assert "llm.model.norm.weight" in data.named_weights(model)


# ---- 8 the model: scenes to tokens ---------------------------------------------------------------


def shuffled(scene, seed):
    """The same scene with its points in another order and its superpoints under other names."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(scene.points))
    names = rng.permutation(1000)[: scene.superpoints.max() + 1]

    # every array moves along, superpoints under new names
    arrays = {key: getattr(scene, key)[order] for key in ("points", "colors", "normals", "instances")}
    superpoints = names[scene.superpoints[order]]
    return replace(scene, name=f"{scene.name} {seed}", superpoints=superpoints, **arrays)


SWITCHES = [{}, dict(points=300), dict(superpoint=False, points=300), dict(curves=6)]


@pytest.mark.parametrize("change", SWITCHES + [dict(selector=s) for s in SELECTORS], ids=str)
@torch.no_grad()
def test_the_order_of_points_and_the_names_of_superpoints_change_no_token(text, scenes, change):
    """By more than 1e-5, coordinate tokens included; also where only some points are drawn."""
    model = make(text, **change).eval()
    for scene, samples in with_questions(scenes[:2], 4, {"id_category": 1}):
        mine = model.encode([scene])
        prompts = model.prompt_tokens(model.batch([(scene, samples)]), mine)

        # the same scene in another order
        other_scene = shuffled(scene, 0)
        other = model.encode([other_scene])
        again = model.prompt_tokens(model.batch([(other_scene, samples)]), other)
        assert torch.equal(other["places"], mine["places"])
        assert mine["tokens"].std() > 0.1
        assert (other["tokens"] - mine["tokens"]).abs().max() < 1e-5
        assert (again - prompts).abs().max() < 1e-5


def test_a_turned_scene_keeps_the_geometry_of_the_unturned_one(text):
    """Same points, curves, graph and seeds; places turn with the points."""
    plain = room(3, objects=8, views=0, points=700)
    model = make(text).eval()
    first = model.compute_features(plain)
    for seed in range(4):
        turned = augment(plain, np.random.default_rng(seed))
        found = model.compute_features(turned)
        assert all(torch.equal(found[key], first[key]) for key in first)

        # every token at a point of the scene as it is now
        centers = model.token_centers(turned)
        assert np.allclose(centers, first["place"].numpy() @ turned.turn.T, atol=1e-5)
        assert all((np.abs(turned.points - c) < 1e-5).all(1).any() for c in centers)


def test_tokens_lie_along_a_hilbert_curve(text, scenes):
    """The language model's positions are an order; near tokens should be near in it."""
    place = make(text).load_features(scenes[0])["place"]
    assert torch.equal(fase3d.curve_order(place, "hilbert", 10), torch.arange(len(place)))


def test_what_a_seed_shows_is_the_most_frequent_object_on_its_superpoint(text, scenes):
    """The truth of the tokenizer's own stage."""
    found = {k: v.numpy() for k, v in make(text).load_features(scenes[0]).items()}
    instances = scenes[0].instances[found["index"]]
    for s, shown in zip(found["seed"], found["shows"], strict=True):
        votes = Counter(instances[found["owner"] == s].tolist())
        assert votes[int(shown)] == max(votes.values())


@pytest.mark.parametrize("unknown", ["category", "color"])
@pytest.mark.parametrize("stage", fase3d.recipe(Config.tiny(), STAGES["tiny"]), ids=lambda s: s.name)
def test_things_of_unknown_category_or_color_pass_every_stage(text, scenes, unknown, stage):
    """A real scene has segments without categories, a scan without colors things without colors."""
    objects = [replace(o, **{unknown: ""}) for o in scenes[0].objects]
    scene = replace(scenes[0], name="bare", objects=objects)
    model = make(text, stage)
    model.cache_features([scene])
    (group,) = with_questions([scene], 4, stage.tasks) if stage.tasks else [(scene, [])]
    assert torch.isfinite(model(model.batch([group]))["loss"])


@torch.no_grad()
def test_one_superpoint_is_a_scene(text):
    """A single wall, or a single point: no edges, a token, a proposal, an answer."""
    for n in (1, 40):
        points = np.random.default_rng(0).random((n, 3)).astype(np.float32)

        # a gray scene of n points and no objects
        arrays = dict(colors=np.zeros((n, 3), np.uint8), normals=np.zeros((n, 3), np.float32))
        scene = data.Scene("wall", "ply", [], points=points, superpoints=np.zeros(n, int), **arrays)

        # everything works on one token
        model = make(text).eval()
        assert model.encode([scene])["tokens"].shape == (1, 1, 32)
        assert len(model.propose(scene).objects) == 1
        sample = data.Sample("q", "wall", "count", "what is the number of doors?", "0")
        assert len(model.generate(model.batch([(scene, [sample])]), 2)) == 1


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("points", "Fase3D needs points; this source has none"),
        ("superpoints", "no superpoints; make them with data.over_segment"),
        (
            "colors",
            "the cloud has no color and this model never saw such; train with",
        ),
        (
            "normals",
            "the cloud has no normals; make them with data.estimate_normals, or train",
        ),
    ],
)
def test_a_scene_that_lacks_something_says_so_in_one_line(text, scenes, missing, message):
    """Which it lacks, and what to do."""
    bare = replace(scenes[0], name="scan7", **{missing: None})
    with pytest.raises(DataError, match=rf"^scan7: {message}[^\n]*$"):
        make(text).encode([bare])


@torch.no_grad()
def test_what_a_model_does_not_look_at_may_be_missing(text, scenes):
    """Color, normals and superpoints can be switched off."""
    bare = replace(scenes[0], name="bare", colors=None, superpoints=None)
    model = make(text, color=False, superpoint=False).eval()
    assert torch.equal(model.encode(scenes[:1])["tokens"], model.encode([bare])["tokens"])
    gray = make(text, normals=False, superpoint=False, no_color=0.1).eval()
    assert torch.isfinite(gray.encode([replace(bare, normals=None)])["tokens"]).all()


def test_a_model_that_saw_colorless_scenes_answers_about_one(text, scenes):
    """Half of the training scenes hide it, by their identifiers; hidden and missing look the same."""
    model, index = make(text, no_color=0.5), np.arange(50)
    draws = [augment(scenes[0], np.random.default_rng(i)) for i in range(60)]
    hidden = [not model.point_features(s, index)[:, :3].any() for s in draws]
    assert 18 <= sum(hidden) <= 42

    # as if it had none
    dark = draws[hidden.index(True)]
    none = model.point_features(replace(dark, colors=None), index)
    assert torch.equal(model.point_features(dark, index), none)

    # without training nothing is hidden
    lit = model.eval().point_features(dark, index).numpy()
    assert np.allclose(lit, np.c_[dark.colors[:50] / 127.5 - 1, dark.normals[:50]], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(selector="kmeans"), "selector 'kmeans' is unknown: choose one of graph, fps, qformer"),
        (dict(filter="all"), "filter 'all' is unknown: choose one of none, vision, both"),
        (dict(task="ground"), "task 'ground' is unknown: choose one of qa, scanqa, sqa3d, caption, all"),
        (dict(curves=7), "curves = 7; give 1 to 6"),
        (dict(dim=32), "dim = 32; give a multiple of 6 and of heads = 4"),
        (dict(filter_heads=5), "filter_heads = 5 does not divide the llm's width 32"),
    ],
    ids=str,
)
def test_settings_that_do_not_exist_are_refused_with_the_known_ones(text, change, message):
    """In one line."""
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        make(text, **change)


# ---- questions -----------------------------------------------------------------------------------


@torch.no_grad()
def test_answers_depend_on_the_scene_and_on_the_click(text, scenes):
    """Another scene, or the same words about another place; a box counts by its center."""
    model = make(text).eval()
    a, b = (o.box for o in scenes[0].objects[:2])
    losses = []
    for scene, prompt in ((0, a), (0, a[:3]), (0, b), (1, a)):
        sample = data.Sample("q", "s", "id_category", "what is this?", "chair", prompt=prompt)
        losses.append(float(model(model.batch([(scenes[scene], [sample])]))["loss"]))
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def test_a_marked_object_is_asked_about_by_a_click_or_its_box(text, scenes):
    """In training half of the time a click on one of its points; else its box. One per question."""
    model, scene = make(text), scenes[0]
    thing = scene.objects[2]
    sample = data.Sample("q", scene.name, "id_category", f"what is <obj {thing.id}>?", "")

    # forty draws
    prompts = []
    for seed in range(40):
        prompts.append(model.add_prompt(scene, sample, np.random.default_rng(seed)).prompt)

    # many clicks, all on the object; else the box
    clicks = [p for p in prompts if len(p) == 3]
    assert 10 <= len(clicks) <= 30 and len({c.tobytes() for c in clicks}) > 5
    mine = scene.points[scene.instances == thing.id]
    assert all((np.abs(mine - c) < 1e-6).all(1).any() for c in clicks)
    assert all(np.array_equal(p, thing.box) for p in prompts if len(p) == 6)
    for seed in range(9):
        rng = np.random.default_rng(seed)
        assert model.eval().add_prompt(scene, sample, rng).prompt is thing.box

    # two objects would be one too many
    both = replace(sample, question="is <obj 1> above <obj 2>?")
    with pytest.raises(DataError, match=r"points at two things; Fase3D has one coordinate token"):
        model.batch([(scene, [both])])


# ---- recipe and alternatives ---------------------------------------------------------------------

ABLATIONS = [
    *(dict(selector=s) for s in SELECTORS),
    *(dict(adapters=a) for a in ADAPTERS),
    *(dict(filter=f) for f in FILTERS),
    *(dict(curves=c) for c in (1, 2, 6)),
    dict(superpoint=False),
    dict(enhancer=False),
    dict(superpoint=False, enhancer=False),
    dict(adapted_layers=0),
    dict(tokens=5),
    dict(color=False),
]


@pytest.mark.parametrize("change", ABLATIONS, ids=str)
def test_every_alternative_trains(text, scenes, change):
    """Tables 3, 4, A, C, E and the switches of points: whatever trains gets a gradient."""
    model = wake(make(text, **change))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any(n.startswith("llm.model.embed") for n in trained) == (change == {"adapters": "full"})
    model(model.batch(with_questions(scenes)))["loss"].backward()
    assert not [n for n, p in trained.items() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("change", ABLATIONS[1:-1], ids=str)
@torch.no_grad()
def test_a_switch_changes_the_tokens_if_it_is_about_them(text, scenes, change):
    """Or an ablation would compare a model with itself."""
    a, b = make(text).eval(), make(text, **change).eval()
    weights = a.state_dict()
    b.load_state_dict({name: weights.get(name, w) for name, w in b.state_dict().items()})
    x, y = a.encode(scenes)["tokens"], b.encode(scenes)["tokens"]
    about_them = not {"adapters", "filter", "adapted_layers"} & set(change)
    assert torch.equal(x, y) != about_them


def test_farthest_seeds_lie_apart_and_are_not_merged(text, scenes):
    """Table E compares geometric sampling with merging: a token is its seed's superpoint."""
    points, owner = random_cloud(N=300)

    # farthest points of the centers
    centers = fase3d.superpoint_mean(points, owner)
    seeds, places = fase3d.farthest_seeds(points, owner, None, 5)
    assert torch.equal(seeds, data.farthest_point_sampling(centers, 5))
    assert torch.equal(places, centers[seeds])

    # no edge ends at a seed
    model = make(text, selector="fps").eval()
    found = model.load_features(scenes[0])
    assert not len(found["token"])
    assert len(found["edges"])
    S, _ = model.superpoints(scenes[0])
    assert torch.equal(model.scene_tokens(scenes[0])["z"], model.merger(S[found["seed"]])[0])


@torch.no_grad()
def test_a_q_former_token_knows_its_place(text, scenes):
    """A query starts from its seed: permuted seeds give permuted tokens."""
    model = make(text, selector="qformer").eval()
    S, seed = torch.randn(30, 24), torch.randperm(30)[:7]
    z = model.qformer(S[seed], S)

    # in another order
    order = torch.randperm(7)
    assert torch.allclose(model.qformer(S[seed[order]], S), z[order], atol=1e-5)
    assert (z[0] - z[1]).abs().max() > 0.1


def test_the_papers_recipe():
    """Sec. 4.1: 100,000 iterations on everything, 30,000 on one task; "from scratch" without the first."""
    for stage, steps in zip(STAGES["paper"], (100_000, 30_000), strict=True):
        assert (stage.iterations, stage.batch) == (steps, 8)
        assert (stage.lr, stage.final_lr) == (1e-4, 1e-6)
        assert (stage.schedule, stage.weight_decay) == ("cosine", 0.1)
        assert stage.trains == ("tokenizer", "place", "prompt", "adapters", "filter")

    # two switches, the same in both presets
    switches = itertools.product(("paper", "tiny"), TUNED, (True, False))
    for preset, task, pretrain in switches:
        config = getattr(Config, preset)(task=task, pretrain=pretrain)
        stages = fase3d.recipe(config, STAGES[preset])
        names = [s.name for s in STAGES[preset] if pretrain or s.name != "1 generalist"]
        assert [s.name for s in stages] == names
        assert stages[-1].tasks == TUNED[task][0]
        assert list(stages[-1].files) == TUNED[task][1]
        assert stages[-1].files
        assert set().union(*(s.tasks for s in stages)) <= set(data.TASKS)


# ---- dense captioning without boxes, pictures ----------------------------------------------------


def cliques(sizes):
    """A graph of separate cliques with interleaved names."""
    owner = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    every = itertools.permutations(range(len(owner)), 2)
    edges = np.array([(a, b) for a, b in every if owner[a] == owner[b]])
    return owner, edges, np.ones(len(edges))


@pytest.mark.parametrize("sizes", [[5, 5, 5], [3, 8, 4, 6, 9], [10, 4]])
def test_spectral_clusters_of_separate_cliques_are_the_cliques(sizes):
    """As many clusters as cliques: every clique is one; asked twice, the same."""
    owner, edges, weight = cliques(sizes)
    label = fase3d.spectral_clusters(edges, weight, len(owner), len(sizes))
    assert len(set(zip(owner, label, strict=True))) == len(set(label)) == len(sizes)
    again = fase3d.spectral_clusters(edges, weight, len(owner), len(sizes))
    assert np.array_equal(label, again)


def test_spectral_clusters_cut_where_the_weights_are_small():
    """Two groups joined by a weak bridge, without which they would be one component."""
    owner, edges, weight = cliques([8, 8])

    # one edge of little weight
    bridge = np.array([[np.flatnonzero(owner == 0)[0], np.flatnonzero(owner == 1)[0]]])
    edges = np.concatenate([edges, bridge, bridge[:, ::-1]])
    label = fase3d.spectral_clusters(edges, np.append(weight, [0.05, 0.05]), 16, 2)
    assert len(set(zip(owner, label, strict=True))) == 2
    none = fase3d.spectral_clusters(np.zeros((0, 2), int), np.zeros(0), 9, 4)
    assert set(none) == {0, 1, 2, 3}, "without edges any labels, but no more"


@pytest.mark.parametrize("count", [48, 6])
def test_proposals_are_clusters_of_superpoints_with_the_extent_of_their_points(text, scenes, count):
    """At most 48, with a color but no category, every drawn point in one; the same when asked again."""
    model, scene = make(text).eval(), scenes[0]
    found = model.propose(scene, count)
    labels = set(found.instances.tolist()) - {0}
    assert labels == {o.id for o in found.objects} and 1 < len(labels) <= count
    assert all(not o.category and o.color in data.COLORS for o in found.objects)

    # boxes span their points
    for o in found.objects:
        mine = scene.points[found.instances == o.id]
        box = np.concatenate([(mine.min(0) + mine.max(0)) / 2, np.ptp(mine, 0)])
        assert np.allclose(o.box, box, atol=1e-5)

    # whole superpoints, the same ones every time
    drawn = found.instances > 0
    pairs = set(zip(scene.superpoints[drawn], found.instances[drawn], strict=True))
    assert len({s for s, _ in pairs}) == len(pairs), "a superpoint is never cut"
    assert np.array_equal(model.propose(scene, count).instances, found.instances)


def test_pictures_show_clouds_curves_and_graphs(text, scenes, tmp_path):
    """Three files a scene, none blank."""
    from PIL import Image

    paths = make(text).pictures(scenes[:1], tmp_path)
    names = [f"{scenes[0].name}{what}.png" for what in ("", "_curves", "_graph")]
    assert [p.name for p in paths] == names
    assert all(len(Image.open(p).convert("RGB").getcolors(1 << 24)) > 1000 for p in paths)
