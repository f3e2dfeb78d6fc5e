"""Proxy3D: every part against a slow and obvious version, and what the whole model promises."""

import itertools
import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import full_rows
import numpy as np
import pytest
import torch
from PIL import Image
from test_text import save_tokenizer
from torch import nn

import data
from data import DataError, HubText, Scene, Stage, TinyText, augment, questions, room
from proxy3d import (
    CLUSTERING,
    STAGES,
    Config,
    HorizontalFourier,
    Model,
    _half,
    allocate,
    attention_in_frames,
    attention_map,
    bfs_order,
    breadth_first,
    build_llm,
    cluster,
    cluster_without_groups,
    dpc_knn,
    draw_category,
    draw_identifier,
    farthest_seeds,
    lloyd_step,
    majority,
    patch_triplets,
    qwen_tokens,
    rotate_height,
)

SMALL = dict(width=32, heads=4, hidden=64, vision_width=16, vision_layers=1, budget=24, grid=(6, 6), frames=3)
SYMBOLS, PLACED, PROXIES = (Stage(v, {}, ("3d", "lm"), v) for v in ("symbols", "symbols+3d", "proxies"))
MIX = {"coordinate": 2, "id_category": 1, "id_colour": 1, "ground": 1, "relation": 1}


def make(text, seed=0, **changes):
    torch.manual_seed(seed)
    return Model(Config.tiny(**{**SMALL, **changes}), text)


def asked(scenes, count=3, mix=MIX):
    rng = np.random.default_rng(0)
    return [(s, questions(s, mix, count, rng)) for s in scenes]


@pytest.fixture(scope="module")
def text():
    return TinyText(data.vocabulary())


@pytest.fixture(scope="module")
def scenes():
    """Three rooms with different numbers of objects, mirrored or not."""
    rng = np.random.default_rng(0)
    found = [augment(room(s, objects=n, views=4, size=48, points=0), rng) for s, n in ((0, 9), (1, 12), (2, 7))]
    assert len({s.turn.tobytes() for s in found}) > 1
    return found


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder with a small Qwen2.5-VL and a tokenizer, as a pre-trained model lies on disk."""
    folder = tmp_path_factory.mktemp("qwen")
    name = save_tokenizer(folder)
    torch.manual_seed(0)
    llm = build_llm(Config.tiny(**SMALL, tower="qwen", merge=2, patch=4), len(HubText(name)))
    for p in llm.model.language_model.parameters():  # weights large enough for answers that vary
        if p.dim() == 2:
            nn.init.normal_(p, std=2 * p.shape[1] ** -0.5)
    llm.generation_config.repetition_penalty, llm.generation_config.do_sample = 1.5, True  # as real ones come
    llm.save_pretrained(folder)
    return SimpleNamespace(name=name, weights={k: v.clone() for k, v in llm.state_dict().items()})


def load(hub, **changes):
    torch.manual_seed(0)
    return Model(Config(llm=hub.name, budget=24, grid=(6, 6), frames=3, symbol=16, **changes), HubText(hub.name))


# ---- 1 patches to triplets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("h", "w", "H", "W"), [(2, 3, 4, 8), (3, 4, 7, 10), (3, 2, 2, 5)])
def test_patch_triplets_equal_a_loop_over_patches_and_pixels(h, w, H, W):
    """Whatever the size of the depth image: patches need not hold equally many pixels, or any. A patch's point is the
    mean over the measured pixels of the label that covers most of it, not over all its pixels: a chair's edge must not
    be pulled to the wall behind it."""
    rng = np.random.default_rng(H)
    V, C = 2, 5
    f, points = torch.from_numpy(rng.normal(size=(V, h, w, C))), torch.from_numpy(rng.normal(size=(V, H, W, 3))).float()
    masks = torch.from_numpy(rng.integers(0, 3, (V, H, W)))
    points[torch.from_numpy(rng.random((V, H, W)) < 0.7)] = torch.nan
    points[0, 0, 0, 2] = torch.inf
    rows = []
    for v, i, j in itertools.product(range(V), range(h), range(w)):
        pixels = [(v, y, x) for y in range(H) for x in range(W) if y * h // H == i and x * w // W == j]
        votes = Counter(int(masks[p]) for p in pixels)
        label = min(votes, key=lambda m: (-votes[m], m), default=0)
        assert int(majority(masks, h, w)[v, i, j]) == label
        mine = [points[p] for p in pixels if int(masks[p]) == label and torch.isfinite(points[p]).all()]
        if mine:
            rows.append((f[v, i, j], torch.stack(mine).mean(0), label))
    got = patch_triplets(f, points, masks)
    assert 0 < len(rows) < V * h * w
    for tensor, expected in zip(got, zip(*rows, strict=True), strict=True):
        assert torch.allclose(tensor.double(), torch.stack([torch.as_tensor(e).double() for e in expected]), atol=1e-6)


def test_the_shares_of_an_even_patch_go_to_the_lowest_label():
    """A rule for ties, or the same room would give other proxies on another machine."""
    masks = torch.tensor([[[2, 1, 0, 5], [1, 2, 5, 0]]])
    assert majority(masks, 1, 2).tolist() == [[[1, 0]]]


# ---- 2 allocation and clustering -------------------------------------------------------------------------------------


def allocate_slowly(sizes, budget, floor):
    """In fractions, filling one group at a time."""
    budget = min(budget, sum(sizes))
    if len(sizes) > budget:
        chosen = sorted(range(len(sizes)), key=lambda g: -sizes[g])[:budget]
        return [int(g in chosen) for g in range(len(sizes))]
    if sum(min(s, floor) for s in sizes) > budget:
        floor = max(1, budget // len(sizes))
    given = [min(s, floor) for s in sizes]
    while (left := budget - sum(given)) > 0:
        open_ = [g for g in range(len(sizes)) if given[g] < sizes[g]]
        share = {g: Fraction(sizes[g] * left, sum(sizes[k] for k in open_)) for g in open_}
        full = [g for g in open_ if share[g] >= sizes[g] - given[g]]
        if full:
            given[full[0]] = sizes[full[0]]
            continue
        for g in open_:
            given[g] += int(share[g])
        for g in sorted(open_, key=lambda g: (-(share[g] - int(share[g])), -sizes[g], g))[: budget - sum(given)]:
            given[g] += 1
    return given


def test_allocation_equals_a_slow_one_and_keeps_its_promises():
    """Exactly the budget, never more than a group has, the floor for all; 2,000 random cases."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        sizes = rng.integers(1, rng.choice([3, 10, 400]), rng.integers(1, 12)).tolist()
        budget, floor = int(rng.integers(1, rng.choice([8, 60, 900]))), int(rng.choice([0, 1, 2, 5, 10]))
        given = allocate(sizes, budget, floor)
        assert given == allocate_slowly(sizes, budget, floor), (sizes, budget, floor)
        assert sum(given) == min(budget, sum(sizes)) and all(0 <= k <= s for k, s in zip(given, sizes, strict=True))
        low = floor if sum(min(s, floor) for s in sizes) <= budget else budget // len(sizes)
        assert all(k >= min(s, low) for k, s in zip(given, sizes, strict=True))


@pytest.mark.parametrize(
    ("sizes", "budget", "floor", "expected"),
    [
        ([100, 200, 700], 100, 0, [10, 20, 70]),  # in proportion
        ([50, 30, 29], 10, 0, [4, 3, 3]),  # 4.59, 2.75, 2.66: the largest remainders, not the largest groups
        ([100, 200, 700], 100, 2, [11, 21, 68]),  # the floor first, then the rest in proportion
        ([3, 3, 94], 20, 5, [3, 3, 14]),  # a group smaller than the floor gives all it has
        ([40, 40, 40], 10, 5, [4, 3, 3]),  # floors of 5 exceed the budget: 10 // 3 each
        ([1, 9, 5, 9, 2], 3, 2, [0, 1, 1, 1, 0]),  # more groups than tokens: the largest get one
        ([2, 1], 10, 2, [2, 1]),  # fewer patches than tokens
        ([7], 7, 2, [7]),
        ([], 5, 2, []),
    ],
)
def test_allocation_by_hand(sizes, budget, floor, expected):
    """Cases small enough to check on paper."""
    assert allocate(sizes, budget, floor) == expected


def test_farthest_seeds_equal_a_loop():
    """Seeds start nearest the centroid, each further one is the farthest from all before; owners are nearest seeds."""
    for seed in range(5):
        points = np.random.default_rng(seed).normal(size=(30, 3))
        chosen = [int(np.linalg.norm(points - points.mean(0), axis=1).argmin())]
        while len(chosen) < 9:
            gaps = [min(np.linalg.norm(p - points[j]) for j in chosen) for p in points]
            chosen.append(int(np.argmax(gaps)))
        seeds, owner = farthest_seeds(points, 9)
        assert seeds.tolist() == chosen
        assert owner.tolist() == [int(np.argmin([np.linalg.norm(p - points[j]) for j in chosen])) for p in points]


def groups_of_patches(L=60, G=4, C=3, seed=0):
    """Features that spell membership ([L, L] one-hot), points, labels with gaps and a negative one."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 17, 3, -2])[:G][torch.randint(0, G, (L,), generator=g)]
    return torch.eye(L), torch.randn(L, 3, generator=g), labels


@pytest.mark.parametrize("method", CLUSTERING)
@pytest.mark.parametrize("lloyd", [0, 3])
@pytest.mark.parametrize("budget", [3, 20, 59, 500])
def test_proxies_are_means_of_patches_of_one_group_and_every_patch_is_in_one(method, lloyd, budget):
    """One-hot features make a proxy list its members: the mean of n one-hot rows has n entries 1 / n. With fewer tokens
    than groups (3 < 4) the smallest group is left out, and nothing else."""
    f, p, m = groups_of_patches()
    z, c, labels = cluster(f, p, m, budget, 2, method, lloyd)
    K = min(budget, len(p))
    assert z.shape == (K, 60) and c.shape == (K, 3) and labels.shape == (K,) and z.dtype == c.dtype == torch.float32
    assert labels.tolist() == sorted(labels.tolist())  # contiguous groups
    for k in range(K):
        mine = z[k] > 0
        assert mine.any() and torch.allclose(z[k][mine], 1 / mine.sum())
        assert torch.allclose(c[k], p[mine].mean(0), atol=1e-6) and (m[mine] == labels[k]).all()
    left_out = min(Counter(m.tolist()).values()) if budget < 4 else 0
    assert int((z > 0).sum()) == 60 - left_out and (z > 0).sum(0).max() == 1


def test_every_patch_goes_to_the_nearest_seed_of_its_own_group_on_coordinates_alone():
    """Features never decide who belongs together."""
    f, p, m = groups_of_patches()
    z, _, labels = cluster(f, p, m, 20)
    other, _, _ = cluster(torch.rand(60, 60), p, m, 20)
    assert not torch.allclose(other, z)
    for label in labels.unique():
        mine = (m == label).nonzero()[:, 0]
        _, owner = farthest_seeds(p[mine].numpy(), int((labels == label).sum()))
        expected = {frozenset(mine[owner == k].tolist()) for k in range(owner.max() + 1)}
        assert {frozenset((row > 0).nonzero()[:, 0].tolist()) for row in z[labels == label]} == expected


@pytest.mark.parametrize("method", CLUSTERING)
def test_the_order_of_the_patches_changes_nothing(method):
    """Frames come in any order. The proxies of a label are compared as a set: sorted by their coordinates."""
    _, p, m = groups_of_patches(L=200)
    f = torch.randn(200, 8)
    shuffle = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    found = []
    for order in (slice(None), shuffle):
        z, c, labels = cluster(f[order], p[order], m[order], 40, 2, method, 2)
        rank = np.lexsort((c[:, 0].numpy(), labels.numpy()))
        found.append((z[rank], c[rank], labels[rank]))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def spread(points, owner):
    return sum(np.square(points[owner == k] - points[owner == k].mean(0)).sum() for k in np.unique(owner))


def test_a_lloyd_step_never_raises_the_distance_to_the_means_and_empties_no_cluster():
    """From a random start it lowers it, for a while; a step that would empty a cluster is not made."""
    rng = np.random.default_rng(0)
    points, owner = rng.normal(size=(80, 3)), np.arange(80) % 6
    before = [spread(points, owner)]
    for _ in range(8):
        owner = lloyd_step(points, owner, 6)
        before.append(spread(points, owner))
        assert len(np.unique(owner)) == 6
    assert before[2] < before[1] < before[0] and all(b <= a + 1e-9 for a, b in itertools.pairwise(before))
    same = np.array([0, 1, 1])
    assert (lloyd_step(np.ones((3, 3)), same, 2) == same).all()


@pytest.mark.parametrize("method", CLUSTERING)
@pytest.mark.parametrize("lloyd", [0, 2])
def test_duplicates_and_single_patches_make_no_empty_proxy(method, lloyd):
    """All patches of a flat dark screen may measure one point; an empty proxy would be 0 / 0."""
    f = torch.arange(5.0)[:, None]
    for points in (torch.ones(5, 3), torch.tensor([[0.0], [0], [1], [1], [1]]).expand(5, 3)):
        for budget in (1, 3, 5):
            z, c, labels = cluster(f, points, torch.zeros(5, dtype=torch.long), budget, 2, method, lloyd)
            assert len(z) == budget and torch.isfinite(z).all() and torch.isfinite(c).all()
            assert budget < 5 or z.sum() == f.sum()  # as many proxies as patches: each is one
    z, c, labels = cluster(f[:1], torch.ones(1, 3), torch.tensor([4]), 10, 2, method, lloyd)
    assert z.tolist() == [[0]] and c.tolist() == [[1, 1, 1]] and labels.tolist() == [4]


def test_no_patches_and_unknown_methods_are_refused():
    """In one line that says what to look at."""
    nothing = torch.zeros(0, 4), torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match=r"^cluster: no patches with a measured point; check the depth"):
        cluster(*nothing, 10)
    with pytest.raises(ValueError, match=r"^cluster: unknown method 'kmeans'; known: fps, dpc_knn$"):
        cluster(torch.zeros(1, 4), torch.zeros(1, 3), torch.zeros(1, dtype=torch.long), 10, method="kmeans")


# ---- 3 serialization -------------------------------------------------------------------------------------------------


def breadth_first_slowly(points, root, k):
    n, gap = len(points), lambda a, b: math.dist(points[a], points[b])
    near = [sorted((j for j in range(n) if j != i), key=lambda j, i=i: gap(i, j))[:k] for i in range(n)]
    order, queue = [root], [root]
    while len(order) < n:
        if queue:
            i = queue.pop(0)
            new = [j for j in range(n) if j not in order and (j in near[i] or i in near[j])]
            new.sort(key=lambda j: gap(i, j))
        else:
            new = [min((j for j in range(n) if j not in order), key=lambda j: min(gap(i, j) for i in order))]
        order, queue = order + new, queue + new
    return order


@pytest.mark.parametrize("neighbours", [1, 2, 6, 50])
def test_breadth_first_equals_a_queue_over_sets(neighbours):
    """With 1 neighbour the graph falls into many pieces, with 50 (more than there are points) everything is linked."""
    for seed in range(4):
        points = np.random.default_rng(seed).normal(size=(14, 3))
        assert breadth_first(points, seed, neighbours) == breadth_first_slowly(points.tolist(), seed, neighbours)


def test_far_away_pieces_come_last_and_the_nearest_first():
    """Three clusters along x: a component is finished before the next begins."""
    points = np.random.default_rng(0).normal(size=(15, 3)) + np.repeat([0, 100, 40], 5)[:, None]
    order = breadth_first(points, 2, 3)
    assert [i // 5 for i in order] == [0] * 5 + [2] * 5 + [1] * 5 and len(set(order)) == 15


def random_proxies(seed, K=40, G=6):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(K, 3, generator=g) * 2, torch.randint(0, G, (K,), generator=g)


def test_serialization_keeps_groups_together_and_starts_near_the_origin():
    """A permutation; every group is one run; the first group's centroid is the nearest to the origin, and the first
    proxy the one of that group nearest to it."""
    for seed in range(5):
        c, g = random_proxies(seed)
        order = bfs_order(c, g)
        assert sorted(order.tolist()) == list(range(len(c)))
        runs = [k for k, _ in itertools.groupby(g[order].tolist())]
        assert len(runs) == len(set(runs)) == len(g.unique())
        assert runs[0] == min(g.unique().tolist(), key=lambda k: float(c[g == k].mean(0).norm()))
        assert order[0] == min((g == runs[0]).nonzero()[:, 0].tolist(), key=lambda i: float(c[i].norm()))


def test_serialization_equals_two_slow_searches():
    """Over groups from the one nearest the origin; inside each from the proxy nearest the last one written."""
    for seed in range(3):
        c, g = random_proxies(seed)
        names = g.unique().tolist()
        centroids = [c[g == k].double().mean(0).tolist() for k in names]
        root = min(range(len(names)), key=lambda i: math.hypot(*centroids[i]))
        out, last = [], [0.0, 0.0, 0.0]
        for i in breadth_first_slowly(centroids, root, 3):
            here = (g == names[i]).nonzero()[:, 0].tolist()
            start = min(range(len(here)), key=lambda k: math.dist(c[here[k]].tolist(), last))
            out += [here[k] for k in breadth_first_slowly(c[here].tolist(), start, 3)]
            last = c[out[-1]].tolist()
        assert bfs_order(c, g, 3).tolist() == out


def test_the_sequence_depends_on_neither_the_input_order_nor_the_names_of_groups():
    """Object ids are arbitrary, and so is the order in which clusters are found. Duplicates and a grid give ties."""
    grid = torch.tensor(list(itertools.product(range(3), range(3), range(2)))).float()
    cases = [random_proxies(0), (grid, torch.arange(18) % 4), (torch.ones(7, 3), torch.arange(7) % 3)]
    for c, g in cases:
        first = c[bfs_order(c, g)]
        for seed in range(5):
            gen = torch.Generator().manual_seed(seed)
            shuffle, names = torch.randperm(len(c), generator=gen), torch.randperm(100, generator=gen)
            again = c[shuffle][bfs_order(c[shuffle], names[g[shuffle]])]
            assert torch.equal(again, first)


def test_mirroring_and_transposing_the_floor_plan_keeps_the_sequence():
    """So that the order may be cached once per scene and augmentation applied afterwards."""
    c, g = random_proxies(1)
    first = bfs_order(c, g).tolist()
    for seed in range(12):
        turn = augment(Scene("s", "rooms", []), np.random.default_rng(seed)).turn
        assert bfs_order(c @ torch.from_numpy(turn).float().T, g).tolist() == first


# ---- 4 hybrid positional encoding ------------------------------------------------------------------------------------


def test_rotation_by_height_is_a_product_of_complex_numbers():
    """Pair i is a complex number, turned by height / unit * 10000^(-2i/C). All axes differ, so none can be mixed up."""
    B, K, C = 2, 5, 8
    z, height = torch.randn(B, K, C), torch.rand(B, K) * 3
    turned = rotate_height(z, height, unit=0.1)
    assert turned.shape == (B, K, C)
    for b, k, i in itertools.product(range(B), range(K), range(C // 2)):
        pair = complex(z[b, k, 2 * i], z[b, k, 2 * i + 1])
        angle = float(height[b, k]) / 0.1 * 10000 ** (-2 * i / C)
        expected = pair * complex(math.cos(angle), math.sin(angle))
        assert complex(turned[b, k, 2 * i], turned[b, k, 2 * i + 1]) == pytest.approx(expected, abs=1e-4)


def test_rotation_is_a_rotation():
    """R(0) = I, norms stay, and two heights after one another are their sum: only differences of height matter."""
    z, a, b = torch.randn(3, 7, 16), torch.rand(3, 7) * 2, torch.rand(3, 7) * 2
    assert torch.equal(rotate_height(z, torch.zeros(3, 7)), z)
    assert torch.allclose(rotate_height(z, a).norm(dim=-1), z.norm(dim=-1), atol=1e-5)
    assert torch.allclose(rotate_height(rotate_height(z, a), b), rotate_height(z, a + b), atol=1e-4)
    dot = lambda s: (rotate_height(z, a + s) * rotate_height(z, b + s)).sum(-1)  # noqa: E731
    assert torch.allclose(dot(0), dot(0.7), atol=1e-3)


def test_horizontal_fourier_equals_its_formula():
    """F(x) = W2 GELU(W1 r), r = [cos(x Wr), sin(x Wr)] / sqrt(D); all widths differ."""
    torch.manual_seed(0)
    f = HorizontalFourier(features=10, hidden=7, width=12, gamma=0.5)
    xy = torch.randn(2, 3, 2)
    out = f(xy)
    assert out.shape == (2, 3, 12) and f.frequencies.shape == (2, 5)
    Wr = f.frequencies.tolist()
    for b, k in itertools.product(range(2), range(3)):
        phase = [sum(float(xy[b, k, a]) * Wr[a][i] for a in range(2)) for i in range(5)]
        r = torch.tensor([t / math.sqrt(10) for t in [*map(math.cos, phase), *map(math.sin, phase)]])
        hidden = f.lift.weight @ r
        gelu = torch.tensor([float(t) * 0.5 * (1 + math.erf(float(t) / math.sqrt(2))) for t in hidden.detach()])
        assert torch.allclose(out[b, k], f.out.weight @ gelu, atol=1e-6)


def test_the_encoding_starts_small_but_alive():
    """A loaded model must not be thrown off, and from exactly zero W1 and Wr would get no gradient."""
    torch.manual_seed(0)
    f = HorizontalFourier(256, 256, 64)
    out = f(torch.randn(50, 2) * 3)
    assert 0 < out.abs().max() < 0.02
    out.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in f.parameters())


# ---- 5 symbols -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [11, 16, 28, 56])
def test_digits_are_legible(size):
    """012 as a person would draw it on a 3 x 5 grid, white on black, in the middle of the image."""
    rows = ["###..#..###", "#.#.##....#", "#.#..#..###", "#.#..#..#..", "###.###.###"]
    image = draw_identifier(12, size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8 and set(np.unique(image)) == {0, 255}
    inked = np.argwhere(image[..., 0])
    top, left = inked.min(0)
    zoom = size // 11
    glyph = image[top : top + 5 * zoom : zoom, left : left + 11 * zoom : zoom, 0]
    assert ["".join("#" if v else "." for v in row) for row in glyph] == rows
    low, high = inked.min(0), size - 1 - inked.max(0)
    assert np.abs(low - high).max() <= 1


def test_a_hundred_identifiers_are_a_hundred_pictures_at_one_merged_token():
    """28 pixels are one token of the tower: whatever is to be told apart must differ inside it, row by row."""
    pictures = np.stack([draw_identifier(i, 28) for i in range(100)])
    assert len(np.unique(pictures.reshape(100, -1), axis=0)) == 100
    digits = [draw_identifier(111 * d % 1000, 28)[:, 3:9, 0] for d in range(10)]  # the first of three equal digits
    assert min((a != b).sum() for a, b in itertools.combinations(digits, 2)) >= 4


def test_a_folder_of_images_replaces_the_icons(text, tmp_path):
    """Any set of drawings can be tried, through the whole model; a category without one is an error of one line."""
    Image.new("RGB", (50, 40), (10, 200, 30)).save(tmp_path / "chair.png")
    image = draw_category("chair", "red", 16, str(tmp_path))
    assert image.shape == (16, 16, 3) and (image == [10, 200, 30]).all()
    assert not np.array_equal(draw_category("chair", "red", 16), image)
    keys = [("category", "chair", "red"), ("category", "chair", "blue")]
    drawn, own = make(text).symbols(keys), make(text, symbols=str(tmp_path)).symbols(keys)
    assert torch.equal(own[0], own[1]) and not torch.allclose(drawn[0], drawn[1])
    assert not torch.allclose(own[0], drawn[0])
    with pytest.raises(DataError, match=r"^no symbol image .*sofa\.png; add one, or leave `symbols` unset"):
        make(text, symbols=str(tmp_path)).symbols([("category", "sofa", "red")])


def test_the_tower_sees_every_symbol_once(text, monkeypatch):
    """100 identifiers are drawn for every scene and step; the tower is frozen, so its answer may be kept."""
    model, seen = make(text), []
    model.configure_stage(SYMBOLS)
    look = model.look
    monkeypatch.setattr(model, "look", lambda images: seen.append(len(images)) or look(images))
    a = model.symbols([("id", 3), ("id", 8), ("id", 3)])
    b = model.symbols([("id", 8), ("id", 9)])
    assert a.shape == (3, 32) and seen == [2, 1] and torch.equal(a[0], a[2]) and torch.equal(a[1], b[0])
    model.configure_stage(Stage("0", {}, ("tower",), "tower"))  # while it trains, nothing may be kept
    for _ in range(2):
        assert model.symbols([("id", 3)]).requires_grad
    assert seen == [2, 1, 1, 1] and not model.symbol_features


# ---- 6 the model: scale and start ------------------------------------------------------------------------------------


def rms(x):
    return float(x.detach().float().square().mean().sqrt())


@pytest.mark.parametrize("tower", ["conv", "qwen"])
def test_what_is_trained_from_scratch_enters_at_the_scale_of_the_embeddings(text, scenes, tower):
    """Tokens a hundred times smaller than words are not found by attention, larger ones drown them (learning.md)."""
    model = make(text, tower=tower, merge=1)
    words = rms(model.llm.get_input_embeddings().weight)
    model.configure_stage(PROXIES)
    z, _, _ = model.proxy_tokens(scenes[0])
    for features in (model.symbols([("id", i) for i in range(20)]), model.symbols([("category", "chair", "red")]), z):
        assert rms(features) == pytest.approx(words, rel=0.06)


def test_features_of_a_loaded_tower_enter_untouched(hub, scenes):
    """The language model was trained on exactly these: no norm, no anchor, no projection in between."""
    model = load(hub)
    assert isinstance(model.norm, nn.Identity) and model.anchor is None
    model.configure_stage(PROXIES)
    z, _, _ = model.proxy_tokens(scenes[0])
    assert torch.equal(z, model.load_features(scenes[0])["z"].float())
    image = torch.from_numpy(draw_identifier(12, 16))[None]
    with torch.no_grad():
        seen = qwen_tokens(model.llm.model.visual, image, False)
    assert torch.allclose(model.symbols([("id", 12)])[0], seen.mean((0, 1, 2)), atol=1e-7)


def test_a_loaded_model_keeps_every_weight(hub):
    """What stands in for pre-training in `tiny` must never touch what was pre-trained."""
    model = load(hub)
    now = model.llm.state_dict()
    assert now.keys() == hub.weights.keys() and all(torch.equal(now[k], v) for k, v in hub.weights.items())


def test_a_tiny_model_starts_by_copying_what_is_like_itself(text):
    """Keys = queries and output = transposed values: attend to what shares content, and add it. The first two heads of
    the first layer look back instead."""
    for i, layer in enumerate(make(text).llm.model.language_model.layers):
        a, heads = layer.self_attn, slice(2 * 8 if i == 0 else 0, None)  # rows of the heads, 8 each
        assert torch.equal(a.k_proj.weight[heads], a.q_proj.weight[heads]) and a.q_proj.weight[heads].std() > 0.1
        assert torch.equal(a.o_proj.weight, a.v_proj.weight.T) and not torch.equal(a.q_proj.weight, a.v_proj.weight)


def test_two_heads_start_by_looking_one_and_two_words_back(text):
    """So that the end of a question knows its last words, whatever they are."""
    model = make(text, width=128, layers=1)
    language = model.llm.model.language_model
    language.set_attn_implementation("eager")  # tells its weights
    with torch.no_grad():
        (attention,) = language(input_ids=torch.arange(200, 230)[None], output_attentions=True).attentions
    for head in range(2):
        looked = attention[0, head].argmax(-1)
        assert looked[head + 1 :].tolist() == list(range(30 - head - 1))


def test_a_number_starts_as_the_code_that_the_scene_tokens_carry(text):
    """A coordinate is read by the same copy as a name: the token of x = 1.25 points where F(1.25, .) does."""
    model = make(text, width=128, heads=4)
    table, height = model.llm.get_input_embeddings().weight.detach(), model.config.height_unit
    with torch.no_grad():
        for token, (axis, value) in text.number.items():
            if axis in "xy":
                code = _half(model.fourier, axis, torch.tensor([value, 0.0] if axis == "x" else [0.0, value]))
            elif axis == "z":
                code = rotate_height(model.anchor, torch.tensor(value), height)
            else:
                continue
            assert torch.cosine_similarity(code, table[token], dim=0) > 0.85
        xyz = torch.rand(60, 3) * torch.tensor([6.0, 6.0, 2.0]) - torch.tensor([3.0, 3.0, 0.0])
        encoded = rotate_height(model.anchor.expand(60, -1), xyz[:, 2], height) + model.fourier(xyz[:, :2])
        for i, axis in enumerate("xyz"):
            tokens = [t for t, (a, _) in text.number.items() if a == axis]
            values = torch.tensor([text.number[t][1] for t in tokens])
            read = values[torch.cosine_similarity(encoded[:, None], table[tokens], dim=-1).argmax(1)]
            assert ((read - xyz[:, i]).abs() < 0.2).float().mean() > 0.8, axis


# ---- scenes to tokens ------------------------------------------------------------------------------------------------


def test_stage_one_tokens_are_category_plus_identifier(text, scenes):
    """[B, K, D] with B = 3 scenes of 9, 12 and 7 objects: one "chess piece" per object, no position in it."""
    model = make(text)
    model.configure_stage(SYMBOLS)
    tokens, valid = model.encode(scenes)
    assert tokens.shape == (3, 12, 32) and valid.sum(1).tolist() == [9, 12, 7]
    assert [model.scene_length(s) for s in scenes] == [9, 12, 7]
    for b, scene in enumerate(scenes):
        centres = torch.tensor(np.stack([o.box[:3] for o in scene.objects])).float()
        order = bfs_order(centres, torch.arange(len(centres)))
        for k, i in enumerate(order.tolist()):
            o = scene.objects[i]
            f_sem, f_id = model.symbols([("category", o.category, o.colour), ("id", scene.identifiers[o.id])])
            assert torch.allclose(tokens[b, k], f_sem + f_id, atol=1e-6)
        assert (tokens[b, len(centres) :] == 0).all() and valid[b, : len(centres)].all()


@pytest.mark.parametrize("stage", [PLACED, PROXIES], ids=lambda s: s.name)
def test_tokens_with_positions_follow_equation_4(text, scenes, stage):
    """R(c_height) (z + anchor) + F(c_horizontal) + f_id, at the turned centres; no identifier where nothing is."""
    model = make(text)
    model.configure_stage(stage)
    with torch.no_grad():
        tokens, valid = model.encode(scenes[:2])
        assert tokens.shape == (2, 24 if stage is PROXIES else 12, 32)
        for b, scene in enumerate(scenes[:2]):
            z, c, numbers = (model.proxy_tokens if stage is PROXIES else model.symbol_tokens)(scene)
            assert len(z) == valid[b].sum()
            for k in range(len(z)):
                f_id = model.symbols([("id", int(numbers[k]))])[0] if numbers[k] >= 0 else 0
                expected = rotate_height(z[k] + model.anchor, c[k, 2]) + model.fourier(c[k, :2]) + f_id
                assert torch.allclose(tokens[b, k], expected, atol=1e-5)
    assert stage is PLACED or ((numbers < 0).any() and (numbers >= 0).any())  # floor and walls have no identifier


def test_proxies_lie_in_their_objects_also_when_the_scene_is_turned(text, scenes):
    """Proxies are cached before augmentation: `turn` must move them as it moved the boxes. The proxy of an object
    carries that object's identifier, by which a question calls it."""
    model = make(text)
    model.configure_stage(PROXIES)
    for scene in scenes:
        _, c, numbers = model.proxy_tokens(scene)
        box = {scene.identifiers[o.id]: o.box for o in scene.objects}
        own = np.stack([box[n] for n in numbers.tolist() if n >= 0])
        inside = np.abs(c[numbers >= 0].numpy() - own[:, :3]) <= own[:, 3:] / 2 + 1e-3
        assert inside.all() and len(set(numbers.tolist()) - {-1}) > 2
        for o in scene.objects:
            assert model.object_to_text(scene, o.id) == f"<OBJ{scene.identifiers[o.id]:03d}>"
            assert text.decode(text.encode(model.object_to_text(scene, o.id))) == model.object_to_text(scene, o.id)


@pytest.mark.parametrize("unknown", ["category", "colour"])
@pytest.mark.parametrize("stage", STAGES["tiny"], ids=lambda s: s.name)
def test_things_of_unknown_category_or_colour_pass_every_stage(text, scenes, unknown, stage):
    """A real scene has segments without categories, a scan without colours has things without colours."""
    scene = replace(scenes[0], name="bare", objects=[replace(o, **{unknown: ""}) for o in scenes[0].objects])
    model = make(text)
    model.configure_stage(stage)
    model.cache_features([scene])
    samples = questions(scene, stage.tasks, 4, np.random.default_rng(0)) if stage.tasks else []
    assert torch.isfinite(model(model.batch([(scene, samples)]))["loss"]) and (samples or not stage.tasks)


def test_a_scene_of_more_than_100_objects_numbers_the_100_largest(text):
    """The others keep their proxies, as far as the budget goes, but no name."""
    scene = augment(room(0, objects=120, views=3, size=48, points=0), np.random.default_rng(0))
    volume = {o.id: float(np.prod(o.box[3:])) for o in scene.objects}
    assert len(scene.identifiers) == 100
    assert min(volume[i] for i in scene.identifiers) >= max(v for i, v in volume.items() if i not in scene.identifiers)
    model = make(text, budget=80)
    model.configure_stage(PLACED)
    tokens, valid = model.encode([scene])
    assert tokens.shape == (1, 100, 32) and valid.all()
    model.configure_stage(PROXIES)
    _, _, numbers = model.proxy_tokens(scene)
    owner = model.load_features(scene)["owner"].tolist()
    assert len(owner) == 80 and numbers.tolist() == [scene.identifiers.get(i, -1) for i in owner]
    for sample in questions(scene, MIX, 20, np.random.default_rng(0)):
        data.substitute(sample.question + sample.answer, lambda i: model.object_to_text(scene, i))  # no KeyError


def test_a_scene_without_frames_is_one_line(text):
    """A bare cloud has nothing for the tower."""
    model = make(text)
    model.configure_stage(PROXIES)
    with pytest.raises(DataError, match=r"^scan7: Proxy3D needs posed frames with depth; this source has points only$"):
        model.encode([Scene("scan7", "ply", [])])


def test_frames_of_any_size_are_seen_at_the_grid_and_evenly_spaced(text, scenes, monkeypatch):
    """The tower gets exactly grid x cell pixels, whatever the camera, and `frames` of the views, first and last
    included; depth and masks keep their own size."""
    model, seen = make(text, frames=3, grid=(6, 5)), []
    look = model.look
    monkeypatch.setattr(model, "look", lambda images, together: seen.append(images) or look(images, together))
    model.proxies(scenes[0])
    assert seen[0].shape == (3, 48, 40, 3) and seen[0].dtype == torch.uint8
    full = make(text, frames=3)
    monkeypatch.setattr(full, "look", lambda images, together: seen.append(images) or look(images, together))
    full.proxies(scenes[0])
    assert torch.equal(seen[1], torch.from_numpy(scenes[0].frames.colour[[0, 2, 3]]))


# ---- what a stage trains ---------------------------------------------------------------------------------------------


def check_gradients(model, stage, scenes):
    """Whatever the stage trains gets a gradient that is not zero, and nothing else gets any."""
    model.configure_stage(stage)
    model.cache_features(scenes)
    groups = asked(scenes, 6, stage.tasks) if stage.tasks else [(s, []) for s in scenes]
    out = model(model.batch(groups))
    assert out["loss"].ndim == 0 and float(out["weight"]) > 0 and 0 <= float(out["correct"]) <= float(out["weight"])
    out["loss"].backward()
    names = {id(p): n for n, p in model.named_parameters()}
    trained = set()
    for part in stage.trains:
        if (part, stage.scene_input) != ("3d", "symbols"):  # positions are not seen yet
            for m in model.parts()[part]:
                trained |= {names[id(p)] for p in ([m] if isinstance(m, nn.Parameter) else m.parameters())}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.mark.parametrize("stage", STAGES["tiny"], ids=lambda s: s.name)
def test_gradients_reach_all_that_a_tiny_stage_trains_and_nothing_frozen(text, scenes, stage):
    """A parameter without a gradient hangs data-parallel training; a frozen one that moves ruins cached proxies."""
    check_gradients(make(text), stage, scenes)


@pytest.mark.parametrize("stage", STAGES["paper"], ids=lambda s: s.name)
@pytest.mark.parametrize("loaded", [False, True], ids=["from config", "loaded"])
def test_gradients_reach_all_that_a_stage_of_the_paper_trains_and_nothing_frozen(text, hub, scenes, stage, loaded):
    """With Qwen2.5-VL's own vision tower, built tiny and loaded from a folder."""
    check_gradients(load(hub) if loaded else make(text, tower="qwen"), stage, scenes)


def test_the_papers_recipe_is_its_table_1():
    """Supp. Table 1: lr 5e-6, cosine, warm-up 0.1 in all stages."""
    rows = [(s.trains, s.scene_input, s.batch, s.accumulate, s.epochs, s.samples) for s in STAGES["paper"]]
    assert rows == [
        (("3d", "lm"), "symbols", 256, 1, 1, 30_000),
        (("3d", "lm"), "symbols+3d", 256, 1, 3, 30_000),
        (("lm",), "symbols+3d", 256, 1, 3, 115_000),
        (("lm",), "proxies", 128, 2, 1, 318_000),
    ]
    assert all((s.lr, s.schedule, s.warmup, s.weight_decay) == (5e-6, "cosine", 0.1, 0) for s in STAGES["paper"])
    for stage in itertools.chain(*STAGES.values()):
        assert set(stage.tasks) <= set(data.TASKS)


def test_unknown_inputs_and_parts_of_a_stage_are_refused(text):
    """The error names the known ones."""
    for wrong in (Stage("x", {}, ("lm",), "points"), Stage("x", {}, ("bev",), "proxies")):
        with pytest.raises(ValueError, match=r"^stage x: visual is one of .*proxies.*'tower', '3d', 'lm'"):
            make(text).configure_stage(wrong)


def test_a_tower_that_trains_again_drops_what_it_saw_before(text, scenes):
    """Proxies of the old tower would be used with the new one, and nobody would notice."""
    model = make(text)
    model.configure_stage(PROXIES)
    model.encode(scenes)
    model.configure_stage(Stage("0", {}, ("tower",), "tower"))
    assert not model.symbol_features and all(s.name not in model.cache for s in scenes)


def test_the_tower_learns_from_what_its_labels_name_whatever_the_size_of_the_frames(text, scenes, monkeypatch):
    """Labels count in patches of the grid: a crop cut in the pixels of larger frames would show another place."""
    model, seen = make(text), []
    model.configure_stage(Stage("0", {}, ("tower",), "tower"))
    model.cache_features(scenes)
    look = model.look
    monkeypatch.setattr(model, "look", lambda images: seen.append(images) or look(images))
    for times in (1, 3):
        f = scenes[0].frames
        large = {k: getattr(f, k).repeat(times, 1).repeat(times, 2) for k in ("colour", "masks")}
        model.cache.clear()
        model.encoder_loss([replace(scenes[0], frames=replace(f, **large))])
    one, three = (x.float() for x in seen if x.shape == seen[0].shape)  # the others are symbols
    assert (one - three).abs().mean() < 4 < (one - one.roll(1, 0)).abs().mean()


def test_the_untrained_tower_is_another_one_and_leaves_no_trace(text, scenes):
    """The row "untrained tower" beside a score: same language model, other eyes, also when an answer breaks it off."""
    model = make(text, seed=5)
    model.configure_stage(PROXIES)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    before = model.encode(scenes)[0]
    with pytest.raises(KeyError), model.baselines()["untrained tower"]:
        assert not torch.allclose(model.encode(scenes)[0], before, atol=0.1)
        now = model.state_dict()
        assert all(torch.equal(now[k], v) for k, v in weights.items() if "visual" not in k)
        raise KeyError
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())
    assert torch.equal(model.encode(scenes)[0], before)


# ---- questions -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def told(model, groups):
    """Logits [A, vocabulary] of every answer token, in the order of the questions."""
    seen = []
    hook = model.llm.lm_head.register_forward_hook(lambda module, given, out: seen.append(out))
    out = model(model.batch(groups))
    hook.remove()
    return seen[0].float(), out


@pytest.mark.parametrize("stage", [SYMBOLS, PLACED, PROXIES], ids=lambda s: s.name)
@pytest.mark.parametrize("loaded", [False, True], ids=["tiny", "loaded"])
def test_a_question_gets_the_logits_it_has_alone(text, hub, scenes, stage, loaded):
    """Packed behind one scene with others, in a batch with longer scenes: neighbours, companions and padding must not
    be seen, and positions must be those it would have alone."""
    model = load(hub) if loaded else make(text)
    model.configure_stage(stage)
    groups = asked(scenes)
    packed, out = told(model, groups)
    alone = [told(model, [(s, [q])]) for s, samples in groups for q in samples]
    assert len(alone) == 9 and packed.std() > 0.01
    assert torch.allclose(packed, torch.cat([logits for logits, _ in alone]), atol=1e-5 * float(packed.abs().max()))
    assert float(out["loss"]) == pytest.approx(sum(float(o["loss"]) for _, o in alone), rel=1e-5)
    assert int(out["weight"]) == sum(int(o["weight"]) for _, o in alone) == len(packed)


def test_the_loss_is_the_cross_entropy_of_the_answers(text, scenes):
    """Eq. (6), as a sum, with the number of its terms and of its hits: the trainer divides by the global count."""
    model = make(text)
    model.configure_stage(PLACED)
    groups = asked(scenes)
    logits, out = told(model, groups)
    answers = [data.substitute(q.answer, lambda i, s=s: model.object_to_text(s, i)) for s, samples in groups for q in samples]
    target = [t for answer in answers for t in [*text.encode(answer), text.eos]]
    each = [-float(row.log_softmax(-1)[t]) for row, t in zip(logits, target, strict=True)]
    assert float(out["loss"]) == pytest.approx(sum(each), rel=1e-5) and int(out["weight"]) == len(target)
    assert int(out["correct"]) == sum(int(row.argmax()) == t for row, t in zip(logits, target, strict=True))


@torch.no_grad()
def answer_slowly(model, scene, sample, count):
    """Greedy without a cache: the whole row again for every token, under a plain causal mask."""
    batch = model.batch([(scene, [sample])])
    tokens, valid = model.encode([scene])
    start = int((batch["labels"][0] != data.IGNORE).nonzero()[0]) + 1
    ids = batch["ids"][0, :start].tolist()
    while len(ids) < start + count and model.text.eos not in ids[start:]:
        T = len(ids)
        out = model.llm.model.language_model(
            inputs_embeds=model.embed(torch.tensor([ids]), tokens, valid),
            position_ids=torch.arange(T).expand(3, 1, T),
            attention_mask={"full_attention": torch.ones(1, 1, T, T, dtype=torch.bool).tril()},
            use_cache=False,
        )
        ids.append(int(model.llm.lm_head(out.last_hidden_state[0, -1]).argmax()))
    return model.text.decode(ids[start:])


@pytest.mark.parametrize("stage", [PLACED, PROXIES], ids=lambda s: s.name)
@pytest.mark.parametrize("loaded", [False, True], ids=["tiny", "loaded"])
def test_generation_is_step_by_step_argmax(text, hub, scenes, stage, loaded):
    """Scenes and questions of different lengths in one batch, against one question at a time. A loaded generation
    config with sampling or a repetition penalty, a `rope_deltas` left by someone else, and companions in the batch must
    not matter."""
    model = load(hub) if loaded else make(text)
    if not loaded:
        full_rows.vary(model.llm.model.language_model)
    model.configure_stage(stage)
    groups = asked(scenes)
    expected = [answer_slowly(model, s, q, 9) for s, samples in groups for q in samples]
    assert len(set(expected)) > 5 and max(len(set(e.split() if not loaded else e)) for e in expected) > 3
    batch = model.batch(groups)
    model.llm.model.rope_deltas = torch.full((9, 1), 57)
    assert model.generate(batch, max_new_tokens=9) == expected
    model.llm.model.rope_deltas = torch.full((1, 1), -31)
    before = model(batch)["loss"].detach()
    assert model.generate(model.batch([(groups[2][0], groups[2][1][1:2])]), max_new_tokens=9) == [expected[7]]
    assert torch.equal(model(batch)["loss"].detach(), before)


@pytest.mark.parametrize("loaded", [False, True], ids=["tiny", "loaded"])
def test_ten_questions_about_a_scene_are_answered_as_each_alone(text, hub, scenes, loaded):
    """The scene's tokens go through the language model once, and are found again in the next call, unchanged."""
    model = load(hub) if loaded else make(text)
    if not loaded:
        full_rows.vary(model.llm.model.language_model)
    model.configure_stage(PLACED)
    full_rows.compare(model, [*asked(scenes[:1], 10), *asked(scenes[1:2], 1), *asked(scenes[2:])])


@pytest.mark.parametrize("stage", STAGES["paper"], ids=lambda s: s.name)
def test_half_precision_changes_the_loss_by_a_rounding(hub, scenes, stage):
    """Weights in bfloat16, as a paper run loads them, and autocast, as the trainer runs them: features, positions and
    embeddings of different types meet in one token."""
    groups, losses = asked(scenes, 3, stage.tasks), []
    for dtype, auto in (("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True)):
        model = load(hub, dtype=dtype)
        model.configure_stage(stage)
        with torch.autocast("cpu", torch.bfloat16, enabled=auto):
            batch = model.batch(groups)
            losses.append(float(model(batch)["loss"].detach()))
            assert len(model.generate(batch, 1)) == 9
    assert losses[1:] == pytest.approx(losses[:1] * 3, rel=0.02) and len(set(losses)) > 1
    looked = attention_map(load(hub, dtype="bfloat16"), scenes[0], groups[0][1][0])
    assert float(looked.sum()) == pytest.approx(1, abs=1e-5)


def test_answers_depend_on_the_scene(text, scenes):
    """Guards the two tests above: the same question about another scene has other logits."""
    model = make(text)
    model.configure_stage(PLACED)
    _, samples = asked(scenes[:1])[0]
    other = replace(scenes[1], identifiers=dict.fromkeys(range(1, 13), 0) | scenes[0].identifiers)
    assert not torch.allclose(told(model, [(scenes[0], samples)])[0], told(model, [(other, samples)])[0], atol=1e-3)


def test_an_attention_kernel_that_cannot_take_the_mask_is_refused(text):
    """Eager attention would add the mask's booleans to the scores, and questions would silently see each other."""
    with pytest.raises(DataError, match=r"^attention = eager: packed questions need .*sdpa"):
        make(text, attention="eager")


# ---- the vision tower ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    return build_llm(Config.tiny(tower="qwen", merge=2, patch=4, grid=(3, 5), vision_width=16), 10).model.visual


def test_pixels_enter_the_tower_as_its_own_processor_would_give_them(tower):
    """The order of patches, of pixels in a patch and of colours, the doubled frame, mean and deviation."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = torch.randint(0, 256, (2, 24, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, do_resize=False)
    given = processor(images=list(images.numpy()), return_tensors="pt")
    with torch.no_grad():
        expected = tower(given["pixel_values"], grid_thw=given["image_grid_thw"]).pooler_output
        tokens = qwen_tokens(tower, images, inter_frame=False)
    assert tokens.shape == (2, 3, 5, 128)
    assert torch.allclose(tokens.flatten(0, 2), expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("grid", [(16, 21), (32, 42)])
def test_frames_of_any_camera_become_the_papers_16x21_or_32x42_tokens(text, scenes, grid):
    """Sec. 3.1: 14-pixel patches, merged 2 x 2, on frames of exactly 448 x 588 or 896 x 1176 pixels."""
    model = make(text, tower="qwen", merge=2, patch=14, grid=grid, inter_frame=True, vision_width=16)
    f = scenes[0].frames
    wide = replace(f, **{k: getattr(f, k)[:2, 6:42] for k in ("colour", "depth", "masks")}, intrinsics=f.intrinsics[:2],
                   poses=f.poses[:2])  # fmt: skip
    images = model.fit(torch.from_numpy(wide.colour))
    assert images.shape == (2, 28 * grid[0], 28 * grid[1], 3)
    assert model.look(images, together=True).shape == (2, *grid, model.width)
    found = model.proxies(replace(scenes[0], frames=wide))
    assert len(found["z"]) == model.config.budget and torch.isfinite(found["z"]).all()


@pytest.mark.parametrize("inter_frame", [True, False])
def test_frames_see_each_other_only_with_inter_frame_attention(tower, inter_frame):
    """Table 4's switch. Without it a frame's features must not depend on which other frames are there."""
    images = torch.randint(0, 256, (3, 24, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    changed = images.clone()
    changed[2] = 255 - changed[2]
    with torch.no_grad():
        a, b, one = (qwen_tokens(tower, x, inter_frame) for x in (images, changed, images[:1]))
    moved = (a - b).abs().amax((1, 2, 3)) > 1e-6
    assert moved.tolist() == [inter_frame, inter_frame, True]
    assert torch.allclose(a[:1], one, atol=1e-6) != inter_frame


def test_the_switch_reaches_the_scene_but_never_the_symbols(text, scenes):
    """Frames of a scene are one view of one room; pictures of digits that were seen together are not."""
    on, off = (make(text, tower="qwen", vision_layers=2, inter_frame=b) for b in (True, False))
    keys = [("id", 1), ("id", 2)]
    assert torch.equal(on.symbols(keys), off.symbols(keys))
    assert torch.allclose(on.symbols([("id", 3)]), on.symbols([("id", 3), ("id", 4)])[:1])
    z = [m.proxies(scenes[0])["z"].float() for m in (on, off)]
    assert z[0].shape == z[1].shape and not torch.allclose(*z, atol=1e-2)


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_cached_proxies_are_read_back_equal(text, scenes, tmp_path, monkeypatch):
    """Another process reads what the first one wrote, without looking at the frames, and answers alike."""
    first, second = make(text), make(text)
    for model in (first, second):
        model.configure_stage(PROXIES)
    first.prepare(scenes, tmp_path)
    assert sorted(p.name for p in (tmp_path / first.cache_key()).iterdir()) == sorted(f"{s.name}.npz" for s in scenes)
    monkeypatch.setattr(second, "proxies", lambda scene: pytest.fail("computed again"))
    second.prepare(scenes, tmp_path)
    for scene in scenes:
        a, b = first.load_features(scene), second.load_features(scene)
        assert a.keys() == b.keys() == {"z", "c", "owner"}
        assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    assert torch.equal(first.encode(scenes)[0], second.encode(scenes)[0])


def test_ranks_share_the_work_and_read_each_other(text, scenes, tmp_path):
    """Rank r computes scenes r, r + world, ...; nothing is done before real proxies are seen."""
    model = make(text)
    model.configure_stage(PLACED)
    model.cache_features(scenes, tmp_path)
    assert not list(tmp_path.iterdir())
    model.configure_stage(PROXIES)
    model.cache_features(scenes, tmp_path, rank=1, world=2)
    assert [p.stem for p in tmp_path.rglob("*.npz")] == [scenes[1].name]


@pytest.mark.parametrize(
    "change",
    [dict(budget=12), dict(floor=5), dict(grid=(3, 3)), dict(frames=2), dict(semantic_grouping=False), dict(lloyd=1),
     dict(inter_frame=True), dict(clustering="dpc_knn"), dict(neighbours=3), dict(seed=1)],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_a_file_of_other_settings_or_of_another_tower_is_never_read(text, scenes, tmp_path, change):
    """Each setting that proxies depend on has a folder of its own (seed: other weights of the tower)."""
    stale = make(text)
    stale.configure_stage(PROXIES)
    stale.prepare(scenes[:1], tmp_path)
    fresh = make(text, **change)
    fresh.configure_stage(PROXIES)
    assert fresh.cache_key() != stale.cache_key() == make(text).cache_key()
    fresh.prepare(scenes[:1], tmp_path)
    expected = fresh.proxies(scenes[0])
    assert all(torch.equal(expected[k], v) for k, v in fresh.load_features(scenes[0]).items())


# ---- 8 alternatives --------------------------------------------------------------------------------------------------


def dpc_knn_slowly(points, count, k):
    n, gap = len(points), [[math.dist(a, b) for b in points] for a in points]
    density = [math.exp(-sum(sorted(gap[i][j] ** 2 for j in range(n) if j != i)[:k]) / min(k, n - 1)) for i in range(n)]
    denser = [[j for j in range(n) if (density[j], -j) > (density[i], -i)] for i in range(n)]
    delta = [min((gap[i][j] for j in denser[i]), default=max(map(max, gap))) for i in range(n)]
    centres = sorted(range(n), key=lambda i: (-density[i] * delta[i], i))[:count]
    return [min(range(count), key=lambda j: gap[i][centres[j]]) for i in range(n)]


@pytest.mark.parametrize("k", [1, 5, 100])
def test_density_peak_clustering_equals_a_loop(k):
    """Also with fewer points than neighbours."""
    for seed in range(4):
        points = np.random.default_rng(seed).normal(size=(25, 3))
        owner = dpc_knn(points, 6, k)
        assert owner.tolist() == dpc_knn_slowly(points.tolist(), 6, k)
    assert dpc_knn(points[:1], 1).tolist() == [0]


def test_without_grouping_a_proxy_has_the_majority_id_of_its_patches():
    """Table 4: clusters are those of one group, features and centres unchanged; only the label is voted for."""
    f, p, m = groups_of_patches()
    z, c, labels = cluster_without_groups(f, p, m, 15)
    whole, centres, _ = cluster(f, p, torch.zeros_like(m), 15, 1)
    assert torch.allclose(z, whole) and torch.allclose(c, centres) and labels.shape == (15,)
    mixed = 0
    for k in range(15):
        votes = Counter(m[z[k] > 0].tolist())
        assert labels[k] == min(votes, key=lambda i: (-votes[i], i))
        mixed += len(votes) > 1
    assert mixed > 5


@pytest.mark.parametrize(
    "change",
    [dict(semantic_grouping=False), dict(clustering="dpc_knn"), dict(lloyd=2), dict(budget=9), dict(budget=200),
     dict(floor=5), dict(grid=(3, 4)), dict(tower="qwen", inter_frame=True)],
    ids=str,
)  # fmt: skip
def test_every_switch_of_the_ablations_runs_and_changes_the_tokens(text, scenes, change):
    """Main Tables 4-5: questions can be asked and answered under each."""
    default, model = make(text), make(text, **change)
    for m in (default, model):
        m.configure_stage(PROXIES)
    assert model.scene_length(scenes[0]) == min(model.config.budget, 3 * math.prod(model.config.grid))
    batch = model.batch(asked(scenes[:2]))
    assert torch.isfinite(model(batch)["loss"]) and len(model.generate(batch, 2)) == 6
    a, b = default.load_features(scenes[0]), model.load_features(scenes[0])
    assert a["z"].shape != b["z"].shape or not torch.equal(a["z"], b["z"])


def test_the_attention_map_is_a_distribution_over_the_scene(text, scenes):
    """K entries, none negative, sum 1; looking does not change how the model computes afterwards."""
    model = make(text)
    for stage, K in ((PLACED, 12), (PROXIES, 24)):
        model.configure_stage(stage)
        ((scene, samples),) = asked(scenes[1:2], 1)
        before = told(model, [(scene, samples)])[0]
        looked = attention_map(model, scene, samples[0])
        assert looked.shape == (K,) and (looked >= 0).all() and float(looked.sum()) == pytest.approx(1, abs=1e-5)
        assert looked.std() > 1e-4 and torch.equal(told(model, [(scene, samples)])[0], before)


def test_pixels_get_the_attention_of_the_nearest_proxy_of_their_own_object():
    """Against a loop; a nearer proxy of another object does not count, nor does a pixel without depth."""
    rng = np.random.default_rng(0)
    points = torch.from_numpy(rng.uniform(-2, 2, (2, 5, 4, 3))).float()
    points[0, 0, 0] = math.nan
    masks = torch.from_numpy(rng.integers(0, 4, (2, 5, 4)))  # nothing stands for object 3
    centres, owner = torch.from_numpy(rng.uniform(-2, 2, (9, 3))).float(), torch.arange(9) % 3
    looked = torch.rand(9)
    heat = attention_in_frames(looked, centres, owner, points, masks)
    for at in np.ndindex(2, 5, 4):
        gap = (centres - points[at]).norm(dim=1).masked_fill(owner != masks[at], math.inf)
        known = bool(torch.isfinite(gap).any())
        assert heat[at] == (looked[gap.argmin()] if known else 0)


def test_pictures_show_where_an_answer_looked(text, scenes, tmp_path):
    """A run's pictures and `--ask`'s: two files a scene, neither blank; before proxies are seen, only the first."""
    from PIL import Image

    model = make(text)
    model.configure_stage(PROXIES)
    paths = model.pictures(scenes, tmp_path, 1)
    assert [p.name for p in paths] == [f"{scenes[0].name}.png", f"{scenes[0].name}_attention.png"]
    ((scene, samples),) = asked(scenes[:1], 2)
    paths += model.answer_pictures(scene, samples, ["nothing", "<OBJ001>"], tmp_path)
    assert paths[-1] == tmp_path / "ask_attention.png"
    assert all(len(Image.open(p).convert("RGB").getcolors(1 << 24)) > 1000 for p in paths)
    model.configure_stage(PLACED)
    assert len(model.pictures(scenes, tmp_path, 1)) == 1
    assert model.answer_pictures(scene, samples, ["x"], tmp_path) == []
