"""Fase3D: every part against a slow and obvious version, and what the whole model promises.

What holds for all papers (packed questions, loss, generation, caches, ablations) is in test_contract.py.
"""

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import papers
import pytest
import torch
import torch.nn.functional as F
from papers import alike, refused, wake
from torch import nn

import data
import fase3d
from fase3d import ADAPTERS, CURVES, FILTERS, STAGES, TUNED, Config
from proxy3d import rms

make = partial(papers.make, "fase3d")


@pytest.fixture
def scene(scenes):
    return scenes[0]


@pytest.fixture
def model():
    return make().eval()


@pytest.fixture(scope="module", params=["fase3d", "spatial3dllm", "opt"])
def folder(request, tmp_path_factory):
    """A small Qwen2 (tied words, grouped keys), Llama or OPT, as it lies on disk."""
    return papers.save_llm(request.param, tmp_path_factory.mktemp(request.param))


# ---- 1 token initialization ----------------------------------------------------------------------


def test_the_fourier_code_equals_its_formula():
    """sin of all phases, then cos: phase 100 x / 1000^(i / F), axis by axis."""
    x = torch.rand(3)
    phase = [100 * c / 1000 ** (i / 4) for c in x.tolist() for i in range(4)]
    expected = [*np.sin(phase), *np.cos(phase)]
    assert fase3d.fourier_code(x, 24).tolist() == pytest.approx(expected, abs=2e-5)


def test_superpoint_features_equal_equation_1_point_by_point():
    """The mean over a superpoint may be taken before the last linear map: it is linear."""
    initial = fase3d.Initial(channels=6, hidden=10, dim=12)
    f = torch.randn(50, 6)
    p = torch.rand(50, 3)
    owner = torch.arange(50) * 5 % 7
    S = initial(f, p, owner, 7)
    lifted = initial.out(initial.lift(f))
    x = lifted + fase3d.fourier_code(p, 12)  # [N, d] of every point
    for m in range(7):
        assert alike(S[m], x[owner == m].mean(0))


# ---- 2 serialization -----------------------------------------------------------------------------


def full_grid(bits):
    side = torch.arange(2**bits)
    return torch.cartesian_prod(side, side, side)


@pytest.mark.parametrize(("bits", "corner"), [(1, 0), (5, 0), (16, 40_000)])
def test_hilbert_keys_number_a_cube_of_cells_in_steps_to_face_neighbors(bits, corner):
    """What is near in the sequence is near in the room: the property for which curves are used."""
    side = min(bits, 5)
    cells = corner + full_grid(side)  # the whole grid, or a cube in the midst of a finer one
    keys = fase3d.hilbert(cells, bits)
    in_line = keys.argsort()
    assert keys.min() % 8**side == 0
    assert (keys[in_line].diff() == 1).all()
    steps = cells[in_line].diff(dim=0).abs()
    assert (steps.sum(1) == 1).all()


def test_morton_keys_equal_the_paper():
    """sum_j x_j 2^(3j) + y_j 2^(3j+1) + z_j 2^(3j+2), x_j being bit j of x."""
    cells = torch.randint(0, 2**16, (200, 3))
    j = torch.arange(16)
    axis = torch.arange(3)[:, None]
    bits = cells[..., None] // 2**j % 2  # [N, 3, 16]
    expected = bits * 2 ** (3 * j + axis)
    assert torch.equal(fase3d.morton(cells, 16), expected.sum((1, 2)))


def test_quantization_equals_equation_6():
    """floor((2^b - 1)(c - min) / (max - min)); an axis without extent is 0."""
    cells = {
        (0.0, 2.0, -1.0): [0, 0, 0],
        (1.0, 2.0, 0.0): [3, 0, 1],
        (0.5, 2.0, 1.0): [1, 0, 3],
        (0.26, 2.0, 0.99): [0, 0, 2],
    }
    points = torch.tensor([*cells])
    assert fase3d.quantize(points, 2).tolist() == [*cells.values()]


def test_every_curve_is_the_plain_one_of_permuted_axes_and_another_than_the_rest():
    """Transposed: x and y change places. Vertical: z comes in front. Ties are ordered by place."""
    points = torch.rand(300, 3)
    shuffled = points[torch.randperm(300)]
    orders = set()
    for turn, axes in ("", [0, 1, 2]), ("transposed ", [1, 0, 2]), ("vertical ", [2, 0, 1]):
        permuted = points[:, axes]
        for curve in ("z", "hilbert"):
            order = fase3d.curve_order(points, turn + curve, 10)
            assert torch.equal(order, fase3d.curve_order(permuted, curve, 10))
            orders.add(tuple(order.tolist()))

            # whatever the order of the input, also within one cell
            first, again = (p[fase3d.curve_order(p, turn + curve, 2)] for p in (points, shuffled))
            assert torch.equal(first, again)
    assert len(orders) == len(CURVES)


# ---- 3 FFT context enhancer ----------------------------------------------------------------------


def windowed_filter_slowly(x, gate):
    """One sequence x [n, d], window by window."""
    n, d = x.shape
    L = 2 * (gate.shape[1] - 1)
    hann = np.hanning(L + 1)[:-1]
    G = gate.repeat(d // len(gate), 0).T  # [L/2 + 1, d]
    out = np.zeros_like(x)
    norm = np.zeros((n, 1))
    for start in range(-L // 2, n, L // 2):
        t = np.arange(max(start, 0), min(start + L, n))
        w = hann[t - start, None]

        # its mean aside, the window times Hann goes through the gate and comes back, times Hann again
        mean = x[t].mean(0)
        window = np.zeros((L, d))
        window[t - start] = (x[t] - mean) * w
        spectrum = np.fft.rfft(window, axis=0)
        y = np.fft.irfft(spectrum * G, L, axis=0)
        out[t] += (y[t - start] + mean * G[0] * w) * w
        norm[t] += w**2  # what the windows add up to
    return out / norm


@pytest.mark.parametrize("M", [1, 3, 7, 8, 9, 16, 21, 130, 300])
@pytest.mark.parametrize("L", [8, 16, 128])
def test_the_enhancer_equals_a_loop_over_curves_and_windows(M, L):
    """Eq. (2) and (3), from shorter than half a window to many windows."""
    S = torch.rand(M, 12) * 2 - 1
    orders = torch.stack([torch.randperm(M) for _ in range(4)])
    gate = torch.rand(3, L // 2 + 1)

    # the mean over curves, each put back in place
    x = S.double().numpy()
    expected = x.copy()
    for order in orders.numpy():
        expected[order] += windowed_filter_slowly(x[order], gate.double().numpy()) / 4
    out = fase3d.enhance(S, orders, gate).numpy()
    assert np.abs(out - expected).max() < 1e-6

    # windows add up to one everywhere, at both ends too: a gate of one doubles the input
    out = fase3d.enhance(S, orders, torch.ones_like(gate))
    assert (out - 2 * S).abs().max() <= 1e-6


def test_the_gate_starts_as_a_low_pass_of_each_heads_own_width():
    """From one wave per window to all of them."""
    enhancer = fase3d.Enhancer(4, 16)
    gate = F.softplus(enhancer.theta).detach().view(4, 9)
    assert alike(gate[:, 0], torch.ones(4))
    assert (gate.diff(dim=1) < 0).all()
    assert (gate[:, 1:].diff(dim=0) > 0).all()
    assert gate[0, 1] == pytest.approx(0.5)
    assert gate[3, 8] == pytest.approx(0.5)


# ---- 4 superpoint graph --------------------------------------------------------------------------


def random_cloud():
    """Points [N, 3], some on one another, and their superpoints, some in two places."""
    points = torch.rand(220, 3)
    points[5:9] = points[5]
    cell = (points * 3).long() @ torch.tensor([9, 3, 1])
    return points, (cell % 17).unique(return_inverse=True)[1]


def counted(pairs, votes):
    """{(from, to): votes}"""
    return dict(zip(map(tuple, pairs.tolist()), votes.tolist(), strict=True))


@pytest.mark.parametrize(("window", "stride"), [(64, 16), (6, 4), (10, 1)])
def test_the_graph_equals_a_brute_force_vote_count(window, stride):
    """Center by center, neighbor by neighbor; also at the ends of the curves."""
    points, owner = random_cloud()
    curves = list(CURVES)[:4]
    expected = Counter()
    for name in curves:
        line = owner[fase3d.curve_order(points, name, 16)].tolist()
        for at in range(0, len(line), stride):
            for other in line[max(0, at - window // 2) : at + window // 2 + 1]:
                if other != line[at]:
                    expected[line[at], other] += 1
    found = fase3d.vote_graph(points, owner, curves, window, stride)
    assert counted(*found) == expected
    assert len(expected) > 20


@pytest.mark.parametrize("k", [1, 3, 100])
def test_the_edges_kept_are_the_nearest_then_most_voted_and_symmetric(k):
    """Against sorting in a loop; centers on a grid give ties of distance, which votes decide."""
    drawn = torch.randperm(64)[:20]
    centers = full_grid(2)[drawn].float()
    distance = torch.cdist(centers, centers).tolist()
    votes = torch.randint(-1, 6, (20, 20)).relu()
    votes.fill_diagonal_(0)

    # of each node's candidates the first ones; both ends share the larger vote
    expected = Counter()
    for a, row in enumerate(votes.tolist()):
        candidates = [(distance[a][b], -v, b) for b, v in enumerate(row) if v]
        for _, v, b in sorted(candidates)[:k]:
            expected[a, b] = expected[b, a] = max(expected[a, b], -v)
    pairs = votes.nonzero()
    found = fase3d.nearest_edges(pairs, votes[votes > 0], centers, k)
    assert counted(*found) == expected


# ---- 5 token merging -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 6, 500])
def test_seeds_are_farthest_points_and_free_places_go_to_what_none_of_them_covers(count):
    """Of farthest points in one superpoint the first counts; then the largest next to no seed; then neighbors."""
    for _ in range(4):
        points, owner = random_cloud()
        size = owner.bincount()
        near = torch.rand(len(size), len(size)) < 0.1
        near = near | near.T
        anchors = data.farthest_point_sampling(points, count)
        expected = list(dict.fromkeys(owner[anchors].tolist()))
        covered = near[expected].any(0)
        rest = np.lexsort((-size, covered)).tolist()
        expected += [s for s in rest if s not in expected]

        seeds, places = fase3d.choose_seeds(points, owner, near.nonzero(), count)
        assert seeds.tolist() == expected[:count]
        assert torch.equal(places[0], points[anchors[0]])
        for s, place in zip(seeds, places, strict=True):
            assert (points[owner == s] == place).all(1).any(), "a point of its own"


def test_pooled_tokens_equal_the_formula_written_as_a_loop():
    """z_t = sum_i w_i S_i / sum_i w_i: 1 for the seed, max(0, cos) * strength for a neighbor."""
    S = torch.randn(13, 7)
    seed = torch.tensor([4, 12, 0])
    token = torch.tensor([0, 0, 0, 2, 2, 2])  # of every edge at a seed; token 1 stands alone
    member = torch.tensor([1, 5, 8, 3, 12, 2])
    strength = torch.rand(6)
    total = S[seed]
    weight = torch.ones(3, 1)
    for t, m, s in zip(token, member, strength, strict=True):
        cos = F.cosine_similarity(S[seed[t]], S[m], dim=0)
        w = cos.clamp(min=0) * s
        total[t] += w * S[m]
        weight[t] += w
    z = fase3d.graph_pool(S, seed, token, member, strength)
    assert alike(z, total / weight)


@torch.no_grad()
def test_tokens_enter_at_the_size_of_the_word_vectors(folder, scene):
    """Merged tokens and places alike; tokens a hundred times smaller are not found by attention."""
    model = make(folder)
    words = rms(model.llm.get_input_embeddings().weight)
    waves = data.fourier_waves(torch.rand(500, 3) * 5)
    places = model.place(waves)
    tokens = model.scene_tokens(scene)["tokens"]
    assert rms(tokens) == pytest.approx(words, rel=0.02)
    assert rms(places) == pytest.approx(words, rel=0.2)


# ---- 6 positions and the coordinate token --------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 50])
def test_the_coordinate_token_equals_a_loop_over_its_neighbors(k):
    """MLP([code(c); mean over the k nearest of z + code(offset)]); of fewer than k all count."""
    token = fase3d.CoordinateToken(12, 10, 0.5)
    clicks = torch.randn(4, 3)
    z = torch.randn(9, 12)
    places = torch.randn(9, 3)
    box = torch.tensor([[-2.0, -3.0, -2.5], [2.0, 2.5, 3.5]])
    size = box[1] - box[0]
    found = token(clicks, box, z, places, k)
    for c, out in zip(clicks, found, strict=True):
        offset = places - c
        near = offset.norm(dim=1).argsort()[:k]
        around = z[near] + fase3d.fourier_code(offset[near] / size, 12)
        here = fase3d.fourier_code((c - box[0]) / size, 12)
        expected = token.mlp(torch.cat([here, around.mean(0)]))
        assert alike(out, expected, 1e-4)


# ---- 7 filter, adapters, routing -----------------------------------------------------------------


def test_the_filter_equals_the_complex_fft():
    """(z + iFFT(FFT(z) * G)) / 2, head by head: half of a spectrum is enough."""
    z = torch.randn(5, 24)
    gain = torch.randn(3, 8)
    x = z.view(5, 3, 8)
    mixed = torch.fft.ifft(torch.fft.fft(x) * gain).real
    expected = ((x + mixed) / 2).flatten(1)
    assert (fase3d.global_filter(z, gain) - expected).abs().max() < 1e-6


# two sequences of eleven embeddings, of which the first six are vision
EMBEDS = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0))
VISION = (torch.arange(11) < 6).expand(2, 11)
KINDS = {"vision": VISION, "text": ~VISION}


@pytest.mark.parametrize("name", ADAPTERS)
def test_decoupled_lora_equals_every_pair_on_all_tokens_masked_by_kind(name):
    """Base map for all; alpha / rank * B A x of the pair of its kind; a kind without one passes."""
    index = {kind: mine.flatten().nonzero()[:, 0] for kind, mine in KINDS.items()}
    route = ADAPTERS[name]
    layer = fase3d.DecoupledLoRA(nn.Linear(32, 9), route, 1.5, index)
    for pair in set(route.values()):
        layer.add(pair, 2)
        nn.init.normal_(layer.lora[pair][1].weight)

    expected = layer.base(EMBEDS)
    for kind, pair in route.items():
        down, up = layer.lora[pair]
        expected = expected + KINDS[kind][..., None] * 1.5 * up(down(EMBEDS))
    assert alike(layer(EMBEDS), expected)


def hidden(model):
    """The decoder's output for them, under a plain causal mask."""
    places = torch.arange(11).expand(2, 11)
    mask = torch.ones(2, 1, 11, 11, dtype=torch.bool).tril()
    return model.run_decoder(EMBEDS, VISION, places, mask)


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_at_start_adapters_change_nothing_and_the_filter_rounds(folder, adapters):
    """B = 0 and G = 1: the frozen model answers as anybody loads it."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = plain.base_model(inputs_embeds=EMBEDS).last_hidden_state
    model = make(folder, adapters=adapters, filter="none").eval()
    assert alike(hidden(model), expected, 1e-6)
    filtered = make(folder, adapters=adapters, filter="both").eval()
    assert (hidden(filtered) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_adapter_moves_what_can_see_a_token_of_its_kind_only(folder, kind):
    """With B or -B: nothing in front of the first such token."""
    model = wake(make(folder)).eval()
    layers = [m for m in model.llm.modules() if isinstance(m, fase3d.DecoupledLoRA)]
    assert len(layers) in (4, 6), "every map of two FFNs"
    before = hidden(model)
    for layer in layers:
        layer.lora[kind][1].weight.mul_(-1)
    change = (hidden(model) - before).abs().amax(-1)
    assert torch.equal(change > 1e-5, KINDS[kind].cumsum(1) > 0)


@pytest.mark.parametrize("where", FILTERS)
def test_the_filter_acts_on_the_tokens_it_is_for(folder, where):
    """In front of the adapted FFNs."""
    model = wake(make(folder, adapters="none", filter=where)).eval()
    first, _ = (m for m in model.llm.modules() if isinstance(m, fase3d.FourierFilter))
    hidden(model)  # one pass says which token is which
    change = (first(EMBEDS) - EMBEDS).abs().amax(-1)
    expected = {"none": VISION & False, "vision": VISION, "both": VISION | True}
    assert torch.equal(change > 1e-5, expected[where])


def test_a_language_model_with_another_ffn_is_refused(folder, monkeypatch):
    """In one line that names the linear maps that are known."""
    monkeypatch.setattr(fase3d, "FFN", {"w1", "w2"})
    with refused(r"^\w+ForCausalLM: its FFN has none of w1, w2$"):
        make(folder)


def test_gates_and_gains_are_vectors_so_that_they_do_not_decay(model):
    """The optimizer decays what has two dimensions; decay would open the gate by itself."""
    assert model.enhancer.theta.dim() == 1
    assert all(gain.dim() == 1 for gain in model.parts()["filter"])


def test_the_language_model_itself_trains_with_full_adapters_only():
    """Table 4; a checkpoint then holds it."""
    for adapters in ADAPTERS:
        norm = make(adapters=adapters).llm.model.norm
        assert norm.weight.requires_grad == (adapters == "full")


# ---- 8 the model: scenes to tokens ---------------------------------------------------------------


def test_tokens_lie_along_a_hilbert_curve(model, scene):
    """The language model's positions are an order; near tokens should be near in it."""
    place = model.load_features(scene)["place"]
    order = fase3d.curve_order(place, "hilbert", 10)
    assert torch.equal(order, torch.arange(len(place)))


def test_a_seed_lies_on_its_superpoint_and_shows_the_most_frequent_object_there(model, scene):
    """The truth of the tokenizer's own stage."""
    found = model.load_features(scene)
    places = model.token_centers(scene)
    for s, shown, place in zip(found["seed"], found["shows"], places, strict=True):
        mine = found["index"][found["owner"] == s].numpy()
        assert np.isclose(scene.points[mine], place, atol=1e-5).all(1).any()
        votes = np.bincount(scene.instances[mine])
        assert votes[shown] == votes.max()


@pytest.mark.parametrize("switch", ["color", "normals", "superpoint"])
def test_what_a_model_does_not_look_at_may_be_missing(scene, switch):
    missing = switch.rstrip("s") + "s"
    bare = replace(scene, name="bare", **{missing: None})
    model = make(**{switch: False}).eval()
    tokens = [model.encode([s])["tokens"] for s in (scene, bare)]
    assert torch.equal(*tokens)


def test_a_model_that_saw_colorless_scenes_answers_about_one(scene, rng):
    """Half of the training scenes hide it, by their identifiers; hidden and missing look the same."""
    model = make(no_color=0.5)
    index = np.arange(50)
    seen = [data.augment(scene, rng) for _ in range(60)]
    hidden = [s for s in seen if not model.point_features(s, index)[:, :3].any()]
    assert 18 <= len(hidden) <= 42

    # as if it had none
    dark = hidden[0]
    none = model.point_features(replace(dark, colors=None), index)
    assert torch.equal(model.point_features(dark, index), none)

    # without training nothing is hidden
    lit = model.eval().point_features(dark, index)[:, :3].numpy()
    assert np.allclose(lit, dark.colors[:50] / 127.5 - 1, atol=1e-6)


# ---- questions -----------------------------------------------------------------------------------


def test_a_marked_object_is_asked_about_by_a_click_or_its_box(model, scene, rng):
    """In training half of the time a click on one of its points; else its box. One per question."""
    thing = scene.objects[2]
    sample = data.Sample("q", scene.name, "id_category", f"what is {data.mark(thing)}?", "")
    mine = scene.points[scene.instances == thing.id]
    clicks = []
    for _ in range(40):
        prompt = model.train().add_prompt(scene, sample, rng).prompt
        if len(prompt) == 3:
            clicks.append(prompt.tobytes())
            assert (np.abs(mine - prompt) < 1e-6).all(1).any()
        else:
            assert np.array_equal(prompt, thing.box)
        assert model.eval().add_prompt(scene, sample, rng).prompt is thing.box
    assert 5 < len(set(clicks)) <= len(clicks) <= 30

    # two objects would be one too many
    both = replace(sample, question="is <obj 1> above <obj 2>?")
    with refused(r"points at two things; Fase3D has one coordinate token"):
        model.batch([(scene, [both])])


# ---- recipe and alternatives ---------------------------------------------------------------------


def test_farthest_seeds_lie_apart_and_are_not_merged(scene):
    """Table E compares geometric sampling with merging: a token is its seed's superpoint."""
    points, owner = random_cloud()
    centers = fase3d.superpoint_mean(points, owner)
    seeds, places = fase3d.farthest_seeds(points, owner, None, 5)
    assert torch.equal(seeds, data.farthest_point_sampling(centers, 5))
    assert torch.equal(places, centers[seeds])

    model = make(selector="fps").eval()
    S, _ = model.superpoint_features(scene)
    seed = model.load_features(scene)["seed"]
    z, _ = model.merger(S[seed])
    assert torch.equal(model.scene_tokens(scene)["z"], z)


def test_a_q_former_token_knows_its_place():
    """A query starts from its seed: permuted seeds give permuted tokens."""
    qformer = make(selector="qformer").eval().qformer
    S = torch.randn(30, 24)
    seed = torch.randperm(30)[:7]
    order = torch.randperm(7)
    z = qformer(S[seed], S)
    assert alike(qformer(S[seed[order]], S), z[order])
    assert (z[0] - z[1]).abs().max() > 0.1


def test_the_papers_recipe():
    """Sec. 4.1: 100,000 iterations on everything, 30,000 on one task, each with the same schedule."""
    same = dict(
        batch=8,
        lr=1e-4,
        final_lr=1e-6,
        schedule="cosine",
        weight_decay=0.1,
        trains=("tokenizer", "place", "prompt", "adapters", "filter"),
    )
    for stage, steps in zip(STAGES["paper"], (100_000, 30_000), strict=True):
        assert stage == replace(stage, iterations=steps, **same)


@pytest.mark.parametrize("preset", STAGES)
@pytest.mark.parametrize("task", TUNED)
def test_the_last_stage_asks_for_its_task_and_from_scratch_means_without_the_one_before(preset, task):
    config = getattr(Config, preset)(task=task)
    *stages, generalist, last = fase3d.recipe(config, STAGES[preset])
    assert generalist.name == "1 generalist"
    assert (last.tasks, list(last.files)) == TUNED[task]
    assert fase3d.recipe(replace(config, pretrain=False), STAGES[preset]) == [*stages, last]


# ---- dense captioning without boxes --------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[5, 5, 5], [3, 8, 4, 6, 9], [8, 8]])
def test_spectral_clusters_cut_where_the_weights_are_small(sizes, rng):
    """Cliques joined by weak bridges: as many clusters as cliques are the cliques."""
    owner = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    _, first = np.unique(owner, return_index=True)
    graph = np.equal.outer(owner, owner).astype(float)
    graph[np.ix_(first, first)] = 0.05
    np.fill_diagonal(graph, 0)
    edges = np.argwhere(graph)
    label = fase3d.spectral_clusters(edges, graph[graph > 0], len(owner), len(sizes))
    pairs = set(zip(owner, label, strict=True))
    assert len(pairs) == len(set(label)) == len(sizes)


@pytest.mark.parametrize("count", [48, 6])
def test_proposals_are_clusters_of_superpoints_with_the_extent_of_their_points(model, scene, count):
    """At most 48, with a color but no category, every drawn point in one; the same when asked again."""
    found, again = (model.propose(scene, count) for _ in range(2))
    assert np.array_equal(again.instances, found.instances)
    assert 1 < len(found.objects) <= count
    assert {o.id for o in found.objects} == set(found.instances.tolist()) - {0}
    for o in found.objects:
        assert not o.category
        assert o.color in data.COLORS
        mine = scene.points[found.instances == o.id]
        low, high = mine.min(0), mine.max(0)
        box = [*(low + high) / 2, *high - low]
        assert np.allclose(o.box, box, atol=0.0011)  # no side is shorter than a millimeter

    # a superpoint is never cut
    drawn = found.instances > 0
    owner = scene.superpoints[drawn]
    pairs = set(zip(owner, found.instances[drawn], strict=True))
    assert len(pairs) == len(set(owner))
