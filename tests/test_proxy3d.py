"""Proxy3D: every part against a slow and obvious version, and what the whole model promises."""

import itertools
import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import papers
import pytest
import torch
from shapes import wrong_shapes

import data
import proxy3d
from data import DataError, HubText, Stage, TinyText, augment, questions, room
from proxy3d import (
    CLUSTERING,
    IDENTIFIERS,
    STAGES,
    Config,
    Model,
    allocate,
    bfs_order,
    breadth_first,
    build,
    cluster,
    make_proxies,
    patch_triplets,
    qwen_tokens,
    rotate_height,
)

SMALL = dict(
    reader=(32, 2, 4, 64),
    vision_width=16,
    vision_layers=1,
    budget=24,
    grid=(6, 6),
    frames=3,
)
MIX = {"coordinate": 2.0, "id_category": 1.0, "relation": 1.0}
SYMBOLS, PLACED, PROXIES = (Stage(name, MIX, ("lm",), name) for name in ("symbols", "symbols+3d", "proxies"))
TOWER = Stage("0", {}, ("tower",), "tower")


@pytest.fixture(scope="module")
def text():
    return TinyText(data.vocabulary())


@pytest.fixture(scope="module")
def scenes():
    """Three rooms with different numbers of objects, mirrored or not."""
    rng = np.random.default_rng(0)
    made = [room(seed, objects=n, views=4, size=48, points=0) for seed, n in ((0, 9), (1, 12), (2, 7))]
    turned = [augment(scene, rng) for scene in made]
    assert len({scene.turn.tobytes() for scene in turned}) > 1
    return turned


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Qwen2.5-VL with its tokenizer, as a pre-trained one lies on disk."""
    return str(papers.save_llm("proxy3d", tmp_path_factory.mktemp("qwen")))


def make(text, stage=PROXIES, seed=0, **changes):
    torch.manual_seed(seed)
    model = build(Config.tiny(**{**SMALL, **changes}), text)
    model.configure_stage(stage)
    return model


def load(folder, stage=PROXIES, **changes):
    torch.manual_seed(0)
    config = Config(llm=folder, budget=24, grid=(6, 6), frames=3, symbol=16, **changes)
    model = build(config, HubText(folder))
    model.configure_stage(stage)
    return model


def ask(scene, count=3):
    return questions(scene, MIX, count, np.random.default_rng(0))


# ---- 1 patches to triplets -----------------------------------------------------------------------


@pytest.mark.parametrize(("h", "w", "H", "W"), [(2, 3, 4, 8), (3, 4, 7, 10), (3, 2, 2, 5)])
def test_patch_triplets_equal_a_loop_over_patches_and_pixels(h, w, H, W):
    """Patches need not hold equally many pixels, or any; ties go to the lowest label, or the same room would give
    other proxies on another machine."""
    rng = np.random.default_rng(H)
    features = torch.from_numpy(rng.normal(size=(2, h, w, 5)))
    points = torch.from_numpy(rng.normal(size=(2, H, W, 3))).float()
    points[torch.from_numpy(rng.random((2, H, W)) < 0.7)] = torch.nan
    points[0, 0, 0, 2] = torch.inf
    masks = torch.from_numpy(rng.integers(0, 3, (2, H, W)))

    rows = []
    for v, i, j in np.ndindex(2, h, w):
        pixels = [(v, y, x) for y, x in np.ndindex(H, W) if y * h // H == i and x * w // W == j]
        votes = Counter(int(masks[p]) for p in pixels)
        label = min(votes, key=lambda m: (-votes[m], m), default=0)
        mine = [points[p] for p in pixels if masks[p] == label and torch.isfinite(points[p]).all()]
        if mine:
            rows.append((features[v, i, j], torch.stack(mine).mean(0), torch.tensor(label)))
    assert 0 < len(rows) < 2 * h * w
    for got, expected in zip(patch_triplets(features, points, masks), zip(*rows, strict=True), strict=True):
        assert torch.allclose(got, torch.stack(expected), atol=1e-6)


# ---- 2 allocation and clustering -----------------------------------------------------------------


def allocate_slowly(sizes, budget, floor):
    """In fractions, filling one group at a time."""
    budget = min(budget, sum(sizes))
    if sum(min(size, floor) for size in sizes) > budget:
        floor = budget // len(sizes)
    given = [min(size, floor) for size in sizes]
    while (left := budget - sum(given)) > 0:
        free = [g for g in range(len(sizes)) if given[g] < sizes[g]]
        share = {g: Fraction(sizes[g] * left, sum(sizes[k] for k in free)) for g in free}
        full = [g for g in free if share[g] >= sizes[g] - given[g]]
        if full:
            given[full[0]] = sizes[full[0]]
            continue
        for g in free:
            given[g] += int(share[g])
        ranked = sorted(free, key=lambda g: (int(share[g]) - share[g], -sizes[g], g))
        for g in ranked[: budget - sum(given)]:
            given[g] += 1
    return given


def test_allocation_equals_a_slow_one_and_keeps_its_promises():
    """Exactly the budget, never more than a group has, the floor for all; 2,000 random cases."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        sizes = rng.integers(1, rng.choice([3, 10, 400]), rng.integers(1, 12)).tolist()
        budget, floor = (
            int(rng.integers(1, rng.choice([8, 60, 900]))),
            int(rng.choice([0, 1, 2, 5, 10])),
        )
        given = allocate(sizes, budget, floor)
        assert given == allocate_slowly(sizes, budget, floor), (sizes, budget, floor)
        assert sum(given) == min(budget, sum(sizes))
        least = min(floor, budget // len(sizes))
        assert all(min(size, least) <= k <= size for k, size in zip(given, sizes, strict=True))


@pytest.mark.parametrize(
    ("sizes", "budget", "floor", "expected"),
    [
        ([100, 200, 700], 100, 0, [10, 20, 70]),  # in proportion
        (
            [50, 30, 29],
            10,
            0,
            [4, 3, 3],
        ),  # 4.59, 2.75, 2.66: the largest remainders, not the largest groups
        (
            [100, 200, 700],
            100,
            2,
            [11, 21, 68],
        ),  # the floor first, then the rest in proportion
        ([3, 3, 94], 20, 2, [3, 2, 15]),  # the example in the docstring
        ([3, 3, 94], 20, 5, [3, 3, 14]),  # a group smaller than the floor gives all it has
        ([40, 40, 40], 10, 5, [4, 3, 3]),  # floors of 5 exceed the budget: 10 // 3 each
        ([2, 1], 10, 2, [2, 1]),  # fewer patches than tokens
    ],
)
def test_allocation_by_hand(sizes, budget, floor, expected):
    assert allocate(sizes, budget, floor) == expected


def test_farthest_seeds_equal_a_loop():
    """Seeds start nearest the centroid, each is the farthest from all before; owners are nearest seeds."""
    for seed in range(5):
        points = np.random.default_rng(seed).normal(size=(30, 3))
        gap = np.linalg.norm(points[:, None] - points, axis=-1)
        chosen = [int(np.linalg.norm(points - points.mean(0), axis=1).argmin())]
        while len(chosen) < 9:
            chosen.append(int(gap[:, chosen].min(1).argmax()))
        assert proxy3d.farthest_seeds(points, 9).tolist() == gap[:, chosen].argmin(1).tolist()


def grouped_points(L=60):
    """Points, and labels with a gap and a negative one."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(L, 3, generator=g), torch.tensor([0, 17, 3, -2])[
        torch.randint(0, 4, (L,), generator=g)
    ]


@pytest.mark.parametrize("method", CLUSTERING)
@pytest.mark.parametrize("budget", [3, 20, 59, 500])
def test_every_patch_is_in_one_proxy_of_its_own_group(method, budget):
    """With fewer tokens than groups some are left out whole, else nothing is."""
    points, labels = grouped_points()
    proxy = cluster(points, labels, budget, 2, method)
    names, sizes = labels.unique(return_counts=True)
    given = allocate(sizes.tolist(), budget, 2)
    for name, count in zip(names, given, strict=True):
        mine = proxy[labels == name].unique()
        assert len(mine) == max(count, 1) and (mine == -1).all() == (count == 0)
        assert not set(mine.tolist()) & set(proxy[labels != name].tolist()) - {-1}
    assert proxy.max() == min(budget, 60) - 1


def test_lloyd_steps_lower_the_distance_to_the_means():
    """Or k-means would be no alternative."""
    points = np.random.default_rng(0).normal(size=(200, 3))

    def spread(owner):
        return sum(np.square(points[owner == k] - points[owner == k].mean(0)).sum() for k in np.unique(owner))

    assert spread(CLUSTERING["kmeans"](points, 8)) < 0.95 * spread(CLUSTERING["fps"](points, 8))


@pytest.mark.parametrize("method", CLUSTERING)
def test_coinciding_patches_make_no_empty_proxy(method):
    """An empty proxy would be 0 / 0."""
    labels = torch.zeros(5, dtype=torch.long)
    for points in (
        torch.ones(5, 3),
        torch.tensor([[0.0], [0], [1], [1], [1]]).expand(5, 3),
        torch.ones(1, 3),
    ):
        proxy = cluster(points, labels[: len(points)], 4, 2, method)
        assert proxy.unique().tolist() == list(range(int(proxy.max()) + 1))


def test_no_patches_is_one_line():
    with pytest.raises(
        ValueError,
        match=r"^cluster: no patches with a measured point; check the scene's depth",
    ):
        cluster(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), 10)


def scene_arrays(seed=0):
    """Two frames of 4 x 5 patches whose features spell their numbers, one pixel each: [2, 4, 5, 40] one-hot."""
    g = torch.Generator().manual_seed(seed)
    points, masks = (
        torch.randn(2, 4, 5, 3, generator=g),
        torch.randint(0, 4, (2, 4, 5), generator=g),
    )
    return torch.eye(40).view(2, 4, 5, 40), points, masks


@pytest.mark.parametrize("grouping", [True, False])
def test_a_proxy_is_the_mean_of_its_patches_and_shows_the_object_of_most(grouping):
    """One-hot features list a proxy's members. Without grouping (Table 4) only the majority names it."""
    features, points, masks = scene_arrays()
    z, c, group = make_proxies(features, points, masks, 15, 2, semantic_grouping=grouping)
    points, masks, mixed = points.view(-1, 3), masks.flatten(), 0
    assert z.shape == (15, 40) and ((z > 0).sum(0) == 1).all()
    for k in range(15):
        mine = z[k] > 0
        votes = Counter(masks[mine].tolist())
        assert torch.allclose(z[k][mine], 1 / mine.sum())
        assert torch.allclose(c[k], points[mine].mean(0), atol=1e-6)
        assert group[k] == min(votes, key=lambda i: (-votes[i], i))
        mixed += len(votes) > 1
    assert (mixed == 0) == grouping
    expected = bfs_order(c, group if grouping else torch.zeros(15))
    assert expected.tolist() == list(range(15))


def test_the_order_of_frames_changes_nothing():
    features, points, masks = scene_arrays()
    there = make_proxies(features, points, masks, 15)
    back = make_proxies(features.flip(0), points.flip(0), masks.flip(0), 15)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(there, back, strict=True))


# ---- 3 serialization -----------------------------------------------------------------------------


def breadth_first_slowly(points, start, k):
    def gap(i, j):
        return math.dist(points[i], points[j])

    n = len(points)
    near = [sorted((j for j in range(n) if j != i), key=lambda j, i=i: gap(i, j))[:k] for i in range(n)]
    order = [min(range(n), key=lambda i: math.dist(points[i], start))]
    queue = list(order)
    while len(order) < n:
        left = [j for j in range(n) if j not in order]
        if queue:
            i = queue.pop(0)
            new = sorted((j for j in left if j in near[i] or i in near[j]), key=lambda j: gap(i, j))
        else:
            new = [min(left, key=lambda j: min(gap(i, j) for i in order))]
        order, queue = order + new, queue + new
    return order


@pytest.mark.parametrize("neighbors", [1, 2, 6, 50])
def test_breadth_first_equals_a_queue_over_sets(neighbors):
    """With 1 neighbor the graph falls into many parts, with 50 everything is linked."""
    for seed in range(4):
        points = np.random.default_rng(seed).normal(size=(14, 3))
        expected = breadth_first_slowly(points.tolist(), points[seed].tolist(), neighbors)
        assert breadth_first(points, points[seed], neighbors) == expected


def random_proxies(seed, K=40, G=6):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(K, 3, generator=g) * 2, torch.randint(0, G, (K,), generator=g)


def test_serialization_equals_two_slow_searches():
    """Over groups from the one nearest the origin; inside each from the proxy nearest the last one written."""
    for seed in range(3):
        c, g = random_proxies(seed)
        names = g.unique().tolist()
        centroids = [c[g == name].double().mean(0).tolist() for name in names]
        out, last = [], [0.0, 0.0, 0.0]
        for i in breadth_first_slowly(centroids, last, 3):
            here = (g == names[i]).nonzero()[:, 0].tolist()
            out += [here[k] for k in breadth_first_slowly(c[here].tolist(), last, 3)]
            last = c[out[-1]].tolist()
        assert bfs_order(c, g, 3).tolist() == out


def test_serialization_by_hand():
    """The example in the docstring."""
    x = torch.tensor([4.0, 4.4, 0.9, 0.1, 4.3])
    order = bfs_order(torch.stack([x, 0 * x, 0 * x], 1), torch.tensor([5, 5, 2, 2, 9]), 1)
    assert x[order].tolist() == pytest.approx([0.1, 0.9, 4.0, 4.4, 4.3])


def test_the_sequence_depends_on_neither_the_input_order_nor_the_names_of_groups():
    """Object ids are arbitrary, and so is the order in which clusters are found."""
    c, g = random_proxies(0)
    first = c[bfs_order(c, g)]
    for seed in range(5):
        gen = torch.Generator().manual_seed(seed)
        shuffle, names = (
            torch.randperm(len(c), generator=gen),
            torch.randperm(100, generator=gen),
        )
        assert torch.equal(c[shuffle][bfs_order(c[shuffle], names[g[shuffle]])], first)


def test_mirroring_and_transposing_the_floor_plan_keeps_the_sequence():
    """So that proxies may be kept in order and augmentation applied afterwards."""
    c, g = random_proxies(1)
    for seed in range(12):
        turn = augment(data.Scene("s", "rooms", []), np.random.default_rng(seed)).turn
        assert torch.equal(bfs_order(c @ torch.from_numpy(turn).float().T, g), bfs_order(c, g))


# ---- 4 hybrid positional encoding ----------------------------------------------------------------


def test_rotation_by_height_is_a_product_of_complex_numbers():
    """Pair i is a complex number, turned by height / unit * 10000^(-2i/C)."""
    B, K, C = 2, 5, 8
    z, height = torch.randn(B, K, C), torch.rand(B, K) * 3
    turned = torch.view_as_complex(rotate_height(z, height, unit=0.1).view(B, K, 4, 2))
    angle = height.double()[..., None] / 0.1 * 10000.0 ** (-torch.arange(4) * 2 / C)
    expected = torch.view_as_complex(z.view(B, K, 4, 2)) * torch.polar(torch.ones_like(angle), angle)
    assert torch.allclose(turned.to(expected), expected, atol=1e-4)


def test_rotation_is_a_rotation():
    """R(0) = I, norms stay, and two heights after one another are their sum."""
    z, a, b = torch.randn(3, 7, 16), torch.rand(3, 7) * 2, torch.rand(3, 7) * 2
    assert torch.equal(rotate_height(z, 0 * a), z)
    assert torch.allclose(rotate_height(z, a).norm(dim=-1), z.norm(dim=-1), atol=1e-5)
    assert torch.allclose(rotate_height(rotate_height(z, a), b), rotate_height(z, a + b), atol=1e-4)


def test_horizontal_fourier_equals_its_formula():
    """F(x) = W2 GELU(W1 r), r = [cos(x Wr), sin(x Wr)] / sqrt(D)."""
    f = proxy3d.HorizontalFourier(features=10, width=12).requires_grad_(False)
    xy = torch.randn(2, 3, 2)
    out = f(xy)
    for at in np.ndindex(2, 3):
        phase = [sum(float(xy[at][a]) * float(f.frequencies[a, i]) for a in range(2)) for i in range(5)]
        r = torch.tensor([*map(math.cos, phase), *map(math.sin, phase)]) / math.sqrt(10)
        hidden = (f.lift.weight @ r).tolist()
        gelu = torch.tensor([t * 0.5 * (1 + math.erf(t / math.sqrt(2))) for t in hidden])
        assert torch.allclose(out[at], f.out.weight @ gelu, atol=1e-6)


class WideModel(Model):
    """A random tower of the paper's width."""

    def load_llm(self):
        return papers.qwen_vl(
            vocab_size=len(self.text),
            hidden_size=3584,
            intermediate_size=8,
            num_hidden_layers=0,
            num_attention_heads=28,
            num_key_value_heads=28,
        )


def test_a_meter_along_any_axis_moves_a_token_of_the_papers_width_by_comparable_amounts(text, scenes):
    """Rotation by height moves what is there; F and symbols must be as large, whatever the tower's scale."""
    model = WideModel(Config(llm="random", budget=24, grid=(6, 6), frames=3, symbol=16), text)
    model.configure_stage(PROXIES)
    model.cache_features(scenes)
    with torch.no_grad():
        z, c, _ = model.scene_tokens(scenes[0])
        here = model.add_position(z, c)
        moved = []
        for meter in torch.eye(3):
            there = model.add_position(z, c + meter)
            moved.append((there - here).norm(dim=-1).mean())
        symbols = model.gains[1] * model.symbols(IDENTIFIERS)
    assert max(moved) < 4 * min(moved)
    assert proxy3d.rms(symbols) == pytest.approx(proxy3d.rms(z), rel=0.5)


def test_the_size_of_positions_is_measured_once_and_saved(folder, scenes):
    """A run that is continued or scored elsewhere must not measure other scenes."""
    model, again = load(folder, PLACED), load(folder)
    model.cache_features(scenes)
    again.load_state_dict(model.state_dict())
    again.cache_features(scenes[1:])
    assert torch.equal(again.gains, model.gains) and (model.gains != 1).all()
    assert "gains" in data.named_weights(again)


# ---- 5 symbols -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [11, 16, 28, 56])
def test_digits_are_legible(size):
    """012 as a person would draw it on a 3 x 5 grid, white on black, in the middle of the image."""
    rows = ["###..#..###", "#.#.##....#", "#.#..#..###", "#.#..#..#..", "###.###.###"]
    image = proxy3d.draw_identifier(12, size)[..., 0].numpy()
    zoom = size // 11
    top, left = np.argwhere(image).min(0)
    glyph = image[top : top + 5 * zoom : zoom, left : left + 11 * zoom : zoom]
    assert ["".join("#" if v else "." for v in row) for row in glyph] == rows
    margins = np.argwhere(image).min(0) - (size - 1 - np.argwhere(image).max(0))
    assert np.abs(margins).max() <= 1 and set(np.unique(image)) == {0, 255}


def test_no_two_symbols_share_a_picture():
    """Identifiers, known categories, and labels of scans that no icon shows: those are written."""
    labels = [
        "office chair",
        "trash can",
        "cabinet",
        "kitchen cabinet",
        "books",
        "box",
        "shower curtain rod",
    ]
    categories = [proxy3d.draw_category(name, "white", 112) for name in [*data.CATEGORIES, *labels]]
    pictures = torch.stack([*(proxy3d.draw_identifier(i, 112) for i in range(100)), *categories])
    assert len(pictures.flatten(1).unique(dim=0)) == len(pictures)


def test_the_frozen_tower_sees_every_symbol_once(text, monkeypatch):
    model, seen = make(text), []
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda images: seen.append(len(images)) or encode(images))
    first = model.symbols([("id", 3), ("id", 8), ("id", 3)])
    again = model.symbols([("id", 8), ("id", 9)])
    assert sum(seen) == 3 and torch.equal(first[0], first[2]) and torch.equal(first[1], again[0])


# ---- 6 the model: scale and start ----------------------------------------------------------------


def test_what_is_trained_from_scratch_enters_at_the_scale_of_the_embeddings(text, scenes):
    """Tokens a hundred times smaller than words are not found by attention, larger ones drown them."""
    model = make(text)
    words = proxy3d.rms(model.llm.get_input_embeddings().weight.detach())
    z, _, _ = model.scene_tokens(scenes[0])
    for features in (
        model.symbols(IDENTIFIERS),
        model.symbols([("category", "chair", "red")]),
        z,
    ):
        assert proxy3d.rms(features) == pytest.approx(words, rel=0.06)


def test_a_loaded_model_keeps_every_weight_and_its_features_enter_untouched(folder, scenes):
    """The language model was trained on exactly these: no norm, no anchor, no projection in between."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = load(folder)
    weights = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).state_dict()
    own = model.llm.state_dict()
    assert own.keys() == weights.keys() and all(torch.equal(own[name], v) for name, v in weights.items())
    z, _, _ = model.scene_tokens(scenes[0])
    assert torch.equal(z, model.load_features(scenes[0])["z"].float())
    with torch.no_grad():
        seen = qwen_tokens(model.llm.model.visual, proxy3d.draw_identifier(12, 16)[None], False)
    assert torch.allclose(model.symbols([("id", 12)])[0], seen.mean((0, 1, 2)), atol=1e-7)


def test_the_most_similar_number_token_of_each_axis_says_where_a_token_is(text):
    """A tiny model's coordinate is read by the same copy as a name."""
    model = make(text, reader=(128, 1, 4, 8))
    model.start_from(data.named_weights(data.Reader(model.config, text)))
    table = model.llm.get_input_embeddings().weight.detach()
    xyz = torch.rand(60, 3) * torch.tensor([6.0, 6.0, 2.0]) - torch.tensor([3.0, 3.0, 0.0])
    encoded = model.add_position(torch.zeros(60, 128), xyz).detach()
    for i, axis in enumerate("xyz"):
        tokens = [token for token, (name, _) in text.number.items() if name == axis]
        values = torch.tensor([text.number[token][1] for token in tokens])
        read = values[torch.cosine_similarity(encoded[:, None], table[tokens], dim=-1).argmax(1)]
        assert ((read - xyz[:, i]).abs() < 0.2).float().mean() > 0.8, axis


# ---- scenes to tokens ----------------------------------------------------------------------------


def test_stage_one_tokens_are_category_plus_identifier(text, scenes):
    """One "chess piece" per object, in BFS order, no position in it; scenes of 9, 12 and 7 objects."""
    model = make(text, SYMBOLS)
    seen = model.encode(scenes)
    assert seen["tokens"].shape == (3, 12, 32) and seen["valid"].sum(1).tolist() == [
        9,
        12,
        7,
    ]
    for b, scene in enumerate(scenes):
        assert model.scene_length(scene) == len(scene.objects)
        centers = torch.tensor(np.stack([o.box[:3] for o in scene.objects]))
        for k, i in enumerate(bfs_order(centers, torch.arange(len(centers))).tolist()):
            o = scene.objects[i]
            f_sem, f_id = model.symbols([("category", o.category, o.color), ("id", scene.identifiers[o.id])])
            assert torch.allclose(seen["tokens"][b, k], f_sem + f_id, atol=1e-6) and seen["valid"][b, k]


@pytest.mark.parametrize("stage", [PLACED, PROXIES], ids=lambda stage: stage.name)
@pytest.mark.parametrize("loaded", [False, True])
def test_tokens_with_positions_follow_equation_4(text, folder, scenes, stage, loaded):
    """R(c_height) z + F(c_horizontal) + f_id, at the turned centers; no identifier where nothing is."""
    model = load(folder, stage) if loaded else make(text, stage)
    with torch.no_grad():
        tokens = model.encode(scenes[:2])["tokens"]
        for b, scene in enumerate(scenes[:2]):
            z, c, number = model.scene_tokens(scene)
            anchor = 0 if loaded else model.anchor
            expected = rotate_height(z + anchor, c[:, 2]) + model.gains[0] * model.fourier(c[:, :2])
            named = number >= 0
            f_id = model.symbols([("id", i) for i in number[named].tolist()])
            expected[named] += model.gains[1] * f_id
            assert torch.allclose(tokens[b, : len(z)], expected, atol=1e-5)
    assert stage is PLACED or (named.any() and not named.all())  # floor and walls have no identifier


def test_proxies_lie_in_their_objects_also_when_the_scene_is_turned(text, scenes):
    """Proxies are kept before augmentation: `turn` must move them as it moved the boxes."""
    model = make(text)
    for scene in scenes:
        _, c, number = model.scene_tokens(scene)
        boxes = {scene.identifiers[o.id]: o.box for o in scene.objects}
        own = np.stack([boxes[n] for n in number.tolist() if n >= 0])
        assert (np.abs(c[number >= 0].numpy() - own[:, :3]) <= own[:, 3:] / 2 + 1e-3).all()
        assert len(set(number.tolist()) - {-1}) > 2


def test_a_scene_of_more_than_100_objects_numbers_the_100_largest(text):
    """The others keep their proxies, as far as the budget goes, but no name."""
    scene = augment(room(0, objects=120, views=3, size=48, points=0), np.random.default_rng(0))
    assert make(text, PLACED).encode([scene])["valid"].sum() == len(scene.identifiers) == 100
    model = make(text, budget=80)
    _, _, number = model.scene_tokens(scene)
    group = model.load_features(scene)["group"].tolist()
    assert len(group) == 80 and number.tolist() == [scene.identifiers.get(i, -1) for i in group]
    assert all(model.write_marks(scene, sample) for sample in ask(scene, 20))  # no KeyError


def test_a_scene_without_frames_is_one_line(text):
    with pytest.raises(DataError, match=r"^scan7: Proxy3D needs posed frames, here are points only$"):
        make(text).encode([data.Scene("scan7", "ply", [])])


def test_frames_of_any_size_are_seen_at_the_grid_and_evenly_spaced(text, scenes, monkeypatch):
    """Exactly grid x cell pixels, whatever the camera, the first and the last of the views included."""
    seen = []
    for grid in ((6, 5), (6, 6)):
        model = make(text, grid=grid)
        encode = model.encode_images
        monkeypatch.setattr(
            model,
            "encode_images",
            lambda x, together, e=encode: seen.append(x) or e(x, together),
        )
        model.compute_features(scenes[0])
    assert seen[0].shape == (3, 48, 40, 3) and seen[0].dtype == torch.uint8
    assert torch.equal(seen[1], torch.from_numpy(scenes[0].frames.color[[0, 2, 3]]))


# ---- what a stage asks and trains ----------------------------------------------------------------


def test_the_papers_recipe_is_its_table_1():
    """lr 5e-6, cosine, warm-up 0.1 in all stages; F is first seen, and so first trained, in stage II."""
    rows = [(s.trains, s.scene_input, s.batch, s.accumulate, s.epochs, s.samples) for s in STAGES["paper"]]
    assert rows == [
        (("lm",), "symbols", 256, 1, 1, 30_000),
        (("3d", "lm"), "symbols+3d", 256, 1, 3, 30_000),
        (("lm",), "symbols+3d", 256, 1, 3, 115_000),
        (("lm",), "proxies", 128, 2, 1, 318_000),
    ]
    assert all(
        (s.lr, s.schedule, s.warmup, s.weight_decay) == (5e-6, "cosine", 0.1, 0) for s in STAGES["paper"]
    )
    for stage in itertools.chain(*STAGES.values()):
        assert set(stage.tasks) <= set(data.TASKS)
    without = proxy3d.recipe(Config(coordinate_stage=False), STAGES["paper"])
    assert [s.name[:3] for s in without] == ["I i", "III", "IV "] and "3d" in without[-1].trains


def test_each_of_the_papers_settings_has_a_name():
    """Main table: 700 tokens at 32x42; VSI-Bench and ablations: 450 at 16x21."""
    settings = [(c.budget, c.grid, c.frames, c.floor) for c in (Config.paper(), Config.paper_450())]
    assert settings == [(700, (32, 42), 32, 2), (450, (16, 21), 32, 2)]
    assert all(callable(getattr(Config, preset)) for preset in STAGES)


@pytest.mark.parametrize("stage", STAGES["paper"][:3], ids=lambda stage: stage.name)
def test_a_symbol_stage_asks_only_what_its_tokens_show(folder, scenes, stage):
    """Other colors leave the tokens as they are, so no answer may change with them; other categories change both."""
    model, scene = load(folder, stage), scenes[0]
    gray = replace(scene, objects=[replace(o, color="gray") for o in scene.objects])
    odd = replace(scene, objects=[replace(o, category=f"thing {o.id}") for o in scene.objects])
    tokens = [model.encode([s])["tokens"] for s in (scene, gray, odd)]
    assert torch.equal(tokens[0], tokens[1]) and not torch.allclose(tokens[0], tokens[2], atol=1e-5)
    for task in stage.tasks:
        asked = questions(scene, {task: 1.0}, 20, np.random.default_rng(0))
        again = questions(gray, {task: 1.0}, 20, np.random.default_rng(0))
        answers = {q.question: q.answer for q in asked}
        assert asked and all(answers.get(q.question, q.answer) == q.answer for q in again)


def test_a_tower_that_trains_drops_what_it_saw_before(text, scenes):
    """Proxies of the old tower would be used with the new one, and nobody would notice."""
    model = make(text)
    model.encode(scenes)
    model.configure_stage(TOWER)
    model.cache_features(scenes)
    model.encoder_loss(scenes)
    assert not model.symbol_features and not model.feature_cache


def test_the_tower_learns_from_what_its_labels_name_whatever_the_size_of_the_frames(
    text, scenes, monkeypatch
):
    """Labels count in patches of the grid: a crop cut in the pixels of larger frames would show another place."""
    model, seen = make(text, TOWER), []
    model.cache_features(scenes)
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda images: seen.append(images.float()) or encode(images))
    f = scenes[0].frames
    for times in (1, 3):
        large = {name: getattr(f, name).repeat(times, 1).repeat(times, 2) for name in ("color", "masks")}
        model.encoder_loss([replace(scenes[0], frames=replace(f, **large))])
    one, three = seen[0], seen[2]  # the others are symbols
    assert (one - three).abs().mean() < 4 < (one - one.roll(1, 0)).abs().mean()


def test_the_untrained_tower_is_another_one_and_leaves_no_trace(text, scenes):
    """The column "untrained tower": same language model, other eyes, also when an answer breaks it off."""
    model = make(text, seed=5)
    weights = {name: v.clone() for name, v in model.state_dict().items()}
    before = model.encode(scenes)["tokens"]
    with pytest.raises(KeyError), model.baselines()["untrained tower"]:
        assert not torch.allclose(model.encode(scenes)["tokens"], before, atol=0.1)
        raise KeyError
    assert all(torch.equal(model.state_dict()[name], v) for name, v in weights.items())
    assert torch.equal(model.encode(scenes)["tokens"], before)


def test_lora_trains_and_keeps_adapters_only(folder, scenes):
    """At the start they change nothing; a checkpoint holds them and what is new, the rest is loaded again."""
    model, plain = load(folder, lora=4), load(folder)
    plain.fourier.load_state_dict(model.fourier.state_dict())
    groups = [(scenes[0], ask(scenes[0]))]
    loss = model(model.batch(groups))["loss"]
    assert float(loss) == pytest.approx(float(plain(plain.batch(groups))["loss"]), rel=1e-6)
    loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and all("language_model.layers" in name and "lora_" in name for name in trained)
    held = set(data.named_weights(model))
    assert trained <= held and {name.split(".")[0] for name in held - trained} == {
        "fourier",
        "gains",
    }


# ---- the vision tower ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    language = dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=4)
    return papers.qwen_vl(window_size=24, depth=3, num_hidden_layers=1, **language).model.visual


def random_images(count):
    return torch.randint(
        0,
        256,
        (count, 24, 40, 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )


def test_pixels_enter_the_tower_as_its_own_processor_would_give_them(tower):
    """The order of patches, of pixels in a patch and of colors, the doubled frame, mean and deviation."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    images = random_images(2)
    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, do_resize=False)
    given = processor(images=list(images.numpy()), return_tensors="pt")
    with torch.no_grad():
        expected = tower(given["pixel_values"], grid_thw=given["image_grid_thw"]).pooler_output
        tokens = qwen_tokens(tower, images, inter_frame=False)
    assert tokens.shape == (2, 3, 5, 128)
    assert torch.allclose(tokens.flatten(0, 2), expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("inter_frame", [True, False])
def test_frames_see_each_other_only_with_inter_frame_attention(tower, inter_frame):
    """Table 4's switch. Without it a frame's features must not depend on which other frames are there."""
    images = random_images(3)
    changed = images.clone()
    changed[2] = 255 - changed[2]
    with torch.no_grad():
        a, b, one = (qwen_tokens(tower, x, inter_frame) for x in (images, changed, images[:1]))
    moved = (a - b).abs().amax((1, 2, 3)) > 1e-6
    assert moved.tolist() == [inter_frame, inter_frame, True]
    assert torch.allclose(a[:1], one, atol=1e-6) != inter_frame


def test_inter_frame_attention_reaches_the_scene_but_never_the_symbols(folder, scenes):
    """Frames of a scene are one view of one room; pictures of digits that were seen together are not."""
    on, off = load(folder), load(folder, inter_frame=False)
    assert torch.equal(on.symbols(IDENTIFIERS), off.symbols(IDENTIFIERS))
    z = [model.compute_features(scenes[0])["z"].float() for model in (on, off)]
    assert z[0].shape == z[1].shape and not torch.allclose(*z, atol=1e-3 * proxy3d.rms(z[0]))


# ---- 8 alternatives, 9 attention -----------------------------------------------------------------

SWITCHES = [
    dict(semantic_grouping=False),
    dict(clustering="dpc_knn"),
    dict(clustering="kmeans"),
    dict(budget=9),
    dict(floor=5),
    dict(grid=(3, 4)),
    dict(frames=2),
]


@pytest.mark.parametrize("change", SWITCHES, ids=str)
def test_every_switch_of_the_ablations_changes_the_tokens_and_their_cache(text, scenes, change):
    """Main Tables 4-5. A folder of features belongs to one setting and one tower."""
    default, model = make(text), make(text, **change)
    assert len({default.cache_key(), model.cache_key(), make(text, seed=1).cache_key()}) == 3
    assert model.scene_length(scenes[0]) <= model.config.budget
    a, b = default.load_features(scenes[0]), model.load_features(scenes[0])
    assert a["z"].shape != b["z"].shape or not torch.equal(a["z"], b["z"])
    batch = model.batch([(scene, ask(scene)) for scene in scenes[:2]])
    assert torch.isfinite(model(batch)["loss"])


def dpc_knn_slowly(points, count, k=5):
    n, gap = len(points), [[math.dist(a, b) for b in points] for a in points]
    density = [math.exp(-sum(sorted(g * g for g in row)[1 : k + 1]) / k) for row in gap]
    farthest = max(map(max, gap))
    delta = [
        min((gap[i][j] for j in range(n) if density[j] > density[i]), default=farthest) for i in range(n)
    ]
    centers = sorted(range(n), key=lambda i: -density[i] * delta[i])[:count]
    return [min(range(count), key=lambda j: gap[i][centers[j]]) for i in range(n)]


def test_density_peak_clustering_equals_a_loop():
    """Also with fewer points than neighbors."""
    for seed in range(4):
        points = np.random.default_rng(seed).normal(size=(25 if seed else 4, 3))
        assert proxy3d.dpc_knn(points, 3).tolist() == dpc_knn_slowly(points.tolist(), 3)


def test_the_attention_map_is_a_distribution_over_the_scene(text, scenes):
    """K entries, none negative, sum 1; looking does not change how the model computes afterwards."""
    for stage, K in ((PLACED, 12), (PROXIES, 24)):
        model, (sample, *_) = make(text, stage), ask(scenes[1])
        batch = model.batch([(scenes[1], [sample])])
        before = model(batch)["loss"]
        looked = proxy3d.attention_map(model, scenes[1], sample)
        assert (
            looked.shape == (K,) and (looked >= 0).all() and float(looked.sum()) == pytest.approx(1, abs=1e-5)
        )
        assert looked.std() > 1e-4 and torch.equal(model(batch)["loss"], before)


def test_pictures_show_where_an_answer_looked(text, scenes, tmp_path):
    """Two files a scene, neither blank; before proxies are seen, only the first."""
    from PIL import Image

    model = make(text)
    paths = model.pictures(scenes[:1], tmp_path)
    name = scenes[0].name
    assert [path.name for path in paths] == [f"{name}.png", f"{name}_attention.png"]
    assert all(len(Image.open(path).convert("RGB").getcolors(1 << 24)) > 100 for path in paths)
    model.configure_stage(PLACED)
    assert len(model.pictures(scenes[:1], tmp_path)) == 1


# ---- comments ------------------------------------------------------------------------------------


def test_every_shape_in_a_comment_is_true(text, folder, scenes):
    """Statement by statement; pictures of symbols are square, and the small tower's sizes are."""
    groups = [(scene, ask(scene)) for scene in scenes]

    def run():
        for clustering in CLUSTERING:
            model = make(text, TOWER, grid=(6, 8), clustering=clustering, fourier=24)
            model.start_from(data.named_weights(data.Reader(model.config, text)))
            for stage in (TOWER, PLACED, PROXIES):
                model.configure_stage(stage)
                model.cache_features(scenes)
                model(model.batch(groups))
        proxy3d.attention_map(model, scenes[0], groups[0][1][0])
        model = load(folder)
        model(model.batch(groups))

    square = [
        ("H", "W"),
        ("h", "w"),
        ("V", "H"),
        ("V", "h"),
        ("V", "W"),
        ("V", "E"),
        ("V", "m"),
        ("B", "V"),
    ]
    square += [("m", "h"), ("m", "w"), ("t", "h"), ("t", "w"), ("m", "t")]
    assert wrong_shapes(proxy3d, run, [set(pair) for pair in square]) == []
