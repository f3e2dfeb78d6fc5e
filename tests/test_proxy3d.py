"""Proxy3D: every part against a slow and obvious version, and what the whole model promises."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import papers
import pytest
import torch
from papers import alike, questions_of
from scipy.spatial import distance_matrix
from shapes import wrong_shapes

import data
import proxy3d
from data import augment, room
from proxy3d import (
    IDENTIFIERS,
    STAGES,
    Config,
    allocate,
    attention_map,
    bfs_order,
    cluster,
    draw_identifier,
    farthest_seeds,
    make_proxies,
    patch_triplets,
    qwen_tokens,
    rms,
    rotate_height,
    seeds_in_turn,
    seeds_together,
)

MIX = {"coordinate": 2.0, "id_category": 1.0, "relation": 1.0}
TOWER, SYMBOLS, PLACED, _, PROXIES = papers.stages_of("proxy3d")
make = partial(papers.make, "proxy3d")
with_and_without_lloyd = pytest.mark.parametrize("lloyd", [0, 3])
with_and_without_inter_frame = pytest.mark.parametrize("inter_frame", [True, False])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Qwen2.5-VL with its tokenizer, as a pre-trained one lies on disk."""
    return papers.save_llm("proxy3d", tmp_path_factory.mktemp("qwen"))


# ---- 1 patches to triplets -----------------------------------------------------------------------


@pytest.mark.parametrize(("h", "w", "H", "W"), [(2, 3, 4, 8), (3, 4, 7, 10), (3, 2, 2, 5)])
def test_patch_triplets_equal_a_loop_over_patches(h, w, H, W):
    """Patches need not hold equally many pixels, or any; ties go to the highest label, an object before none."""
    features = torch.randn(2, h, w, 5)
    points = torch.randn(2, H, W, 3)
    points[torch.rand(2, H, W) < 0.7] = torch.nan
    points[0, 0, 0, 2] = torch.inf
    masks = torch.randint(3, (2, H, W))

    rows = []
    for v, i, j in np.ndindex(2, h, w):
        down = torch.arange(H) * h // H == i
        across = torch.arange(W) * w // W == j
        patch = down[:, None] & across
        label = 2 - masks[v, patch].bincount(minlength=3).flip(0).argmax()
        mine = patch & (masks[v] == label) & points[v].isfinite().all(-1)
        if mine.any():
            rows.append((features[v, i, j], points[v, mine].mean(0), label))
    assert 0 < len(rows) < 2 * h * w
    found = patch_triplets(features, points, masks)
    for got, *expected in zip(found, *rows, strict=True):
        assert alike(got, torch.stack(expected), 1e-6)


# ---- 2 allocation and clustering -----------------------------------------------------------------


def allocate_slowly(sizes, budget, floor):
    """In whole numbers, filling one group at a time."""
    budget = min(budget, sum(sizes))
    if np.minimum(sizes, floor).sum() > budget:
        floor = budget // len(sizes)
    given = np.minimum(sizes, floor).tolist()
    while (left := budget - sum(given)) > 0:
        free = [g for g, size in enumerate(sizes) if given[g] < size]
        total = sum(sizes[g] for g in free)
        share = {g: divmod(sizes[g] * left, total) for g in free}  # and the remainder
        full = [g for g in free if given[g] + share[g][0] >= sizes[g]]
        if full:
            given[full[0]] = sizes[full[0]]
            continue
        for g in free:
            given[g] += share[g][0]
        ranked = sorted(free, key=lambda g: (share[g][1], sizes[g]), reverse=True)
        for g in ranked[: budget - sum(given)]:
            given[g] += 1
    return given


def test_allocation_equals_a_slow_one_and_keeps_its_promises(rng):
    """Exactly the budget, never more than a group has, the floor for all; 2,000 random cases."""
    for _ in range(2000):
        sizes = rng.integers(1, rng.choice([3, 10, 400]), rng.integers(1, 12)).tolist()
        budget = int(rng.integers(1, rng.choice([8, 60, 900])))
        floor = int(rng.choice([0, 1, 2, 5, 10]))
        given = allocate(sizes, budget, floor)
        assert given == allocate_slowly(sizes, budget, floor)
        assert sum(given) == min(budget, sum(sizes))
        least = np.minimum(sizes, min(floor, budget // len(sizes)))
        assert np.array_equal(np.clip(given, least, sizes), given)


def test_farthest_seeds_equal_a_loop():
    """Seeds start nearest the centroid, each is the farthest from all before; owners are nearest seeds."""
    for _ in range(5):
        points = torch.randn(30, 3).numpy()
        gap = distance_matrix(points, points)
        chosen = [np.linalg.norm(points - points.mean(0), axis=1).argmin()]
        while len(chosen) < 9:
            chosen.append(gap[:, chosen].min(1).argmax())
        assert np.array_equal(farthest_seeds(points, 9), gap[:, chosen].argmin(1))


@pytest.mark.parametrize("digits", [0, 3])
def test_all_groups_at_once_get_the_seeds_that_they_get_one_by_one(digits):
    """As a GPU takes them; also where points coincide or are equally far, digits = 0."""
    for _ in range(20):
        sizes = torch.randint(1, 40, (6,))
        counts = torch.tensor(allocate(sizes.tolist(), int(torch.randint(6, 120, ()))))
        points = torch.randn(int(sizes.sum()), 3).round(decimals=digits)
        together = seeds_together(points, sizes, counts)
        assert torch.equal(together, seeds_in_turn(points, sizes, counts))


def grouped_points():
    """Points, and labels with a gap and a negative one."""
    names = torch.tensor([0, 17, 3, -2])
    return torch.randn(60, 3), names[torch.randint(4, (60,))]


@with_and_without_lloyd
@pytest.mark.parametrize("budget", [3, 20, 500])
def test_every_patch_is_in_one_proxy_of_its_own_group(lloyd, budget):
    """Numbered group by group. With fewer tokens than groups some are left out whole, else nothing is."""
    points, labels = grouped_points()
    proxy = cluster(points, labels, budget, 2, lloyd)
    names, sizes = labels.unique(return_counts=True)
    given = allocate(sizes.tolist(), budget)
    numbers = torch.arange(min(budget, 60)).split(given)
    for name, own in zip(names, numbers, strict=True):
        assert proxy[labels == name].unique().tolist() == (own.tolist() or [-1])


def test_lloyd_steps_lower_the_distance_to_the_means():
    """Or k-means would be no alternative."""
    points = torch.randn(200, 3)

    def spread(lloyd):
        owner = cluster(points, torch.zeros(200), 8, lloyd=lloyd)
        means, _ = data.group_mean(points, owner, 8)
        return (points - means[owner]).square().sum()

    assert spread(10) < 0.95 * spread(0)


@with_and_without_lloyd
def test_coinciding_patches_make_no_empty_proxy(lloyd):
    """An empty proxy would be 0 / 0."""
    points = torch.tensor([0.0, 0, 1, 1, 1, 2])[:, None].expand(-1, 3)
    proxy = cluster(points, torch.tensor([0, 0, 0, 0, 0, 1]), 5, 2, lloyd)
    assert proxy.bincount().tolist() == [3, 2, 1]


def test_no_patches_is_one_line():
    with pytest.raises(ValueError, match=r"^cluster: no patches with a measured point; check the scene's"):
        cluster(torch.zeros(0, 3), torch.zeros(0), 10)


@pytest.mark.parametrize("grouping", [True, False])
def test_a_proxy_is_the_mean_of_its_patches_and_shows_the_object_of_most(grouping):
    """One-hot features list a proxy's members. Without grouping (Table 4) only the majority names it."""
    # two frames of 4 x 5 patches, one pixel each
    features = torch.eye(40).view(2, 4, 5, 40)
    points = torch.randn(2, 4, 5, 3)
    masks = torch.randint(4, (2, 4, 5))
    z, c, group = make_proxies(features, points, masks, 15, semantic_grouping=grouping)

    members = (z > 0).float()
    share = members / members.sum(1, keepdim=True)
    assert (members.sum(0) == 1).all()
    assert alike(z, share)
    assert alike(c, share @ points.view(40, 3), 1e-6)

    votes = members @ torch.eye(4)[masks.flatten()]
    mixed = (votes > 0).sum(1) > 1
    assert torch.equal(group, votes.argmax(1))
    assert mixed.any() != grouping
    order = bfs_order(c, group if grouping else torch.zeros(15))
    assert torch.equal(order, torch.arange(15))


# ---- 3 serialization -----------------------------------------------------------------------------


def breadth_first_slowly(points, start, k):
    """A queue over sets, on points [n, 3]."""
    gap = distance_matrix(points, points)
    near = gap.argsort()[:, 1 : k + 1]
    order = [np.linalg.norm(points - start, axis=1).argmin()]
    queue = list(order)
    while left := [j for j in range(len(points)) if j not in order]:
        if queue:
            i = queue.pop(0)
            linked = [j for j in left if j in near[i] or i in near[j]]
            new = sorted(linked, key=lambda j: gap[i, j])
        else:
            new = [min(left, key=lambda j: gap[order, j].min())]
        order += new
        queue += new
    return order


@pytest.mark.parametrize("neighbors", [1, 2, 6, 50])
def test_serialization_equals_two_slow_searches(neighbors):
    """Over groups from the one nearest the origin; inside each from the proxy nearest the last one written. With 1
    neighbor the graph falls into many parts, with 50 everything is linked."""
    for _ in range(4):
        c, g = grouped_points()
        points = c.double().numpy()
        names = np.unique(g)
        centroids = np.stack([points[g == name].mean(0) for name in names])
        out = []
        last = np.zeros(3)
        for i in breadth_first_slowly(centroids, last, neighbors):
            here = np.flatnonzero(g == names[i])
            out += list(here[breadth_first_slowly(points[here], last, neighbors)])
            last = points[out[-1]]
        assert bfs_order(c, g, neighbors).tolist() == out


def test_the_sequence_depends_on_neither_input_order_nor_names_of_groups_nor_mirroring(rng):
    """Object ids are arbitrary, and so is the order in which clusters are found; proxies are kept in order, and
    augmentation comes afterwards."""
    c, g = grouped_points()
    first = c[bfs_order(c, g)]
    for _ in range(12):
        shuffle = torch.randperm(len(c))
        turn = augment(data.Scene("s", "rooms", []), rng).turn
        turned = c[shuffle] @ torch.from_numpy(turn).float().T
        order = shuffle[bfs_order(turned, torch.randperm(100)[g[shuffle]])]
        assert torch.equal(c[order], first)


def test_the_examples_in_the_docstrings_are_true():
    assert allocate([3, 3, 94], 20, 2) == [3, 2, 15]
    x = torch.tensor([4.0, 4.4, 0.9, 0.1, 4.3])
    centers = x[:, None] * torch.eye(3)[0]
    order = bfs_order(centers, torch.tensor([5, 5, 2, 2, 9]), 1)
    assert order.tolist() == [3, 2, 0, 1, 4]


# ---- 4 hybrid positional encoding ----------------------------------------------------------------


def test_rotation_by_height_is_a_product_of_complex_numbers():
    """Pair i is a complex number, turned by height / unit * 10000^(-2i/C)."""
    z = torch.randn(2, 5, 8)
    height = 3 * torch.rand(2, 5)
    angle = height[..., None] / 0.1 * 10000.0 ** (-torch.arange(4) * 2 / 8)
    expected = torch.view_as_complex(z.unflatten(-1, (4, 2))) * torch.exp(1j * angle)
    turned = rotate_height(z, height, unit=0.1).unflatten(-1, (4, 2))
    assert alike(turned, torch.view_as_real(expected), 1e-4)


def test_horizontal_fourier_equals_its_formula():
    """F(x) = W2 GELU(W1 r), r = [cos(x Wr), sin(x Wr)] / sqrt(D)."""
    f = proxy3d.HorizontalFourier(features=10, width=12)
    xy = torch.randn(2, 3, 2)
    phase = xy @ f.frequencies
    r = torch.cat([phase.cos(), phase.sin()], -1) / math.sqrt(10)
    expected = torch.nn.functional.gelu(r @ f.lift.weight.T) @ f.out.weight.T
    assert alike(f(xy), expected, 1e-6)


class WideModel(proxy3d.Model):
    """A random tower of the paper's width."""

    def load_llm(self):
        return papers.qwen_vl(vocab_size=len(self.text), hidden_size=3584, num_hidden_layers=0)


@torch.no_grad()
def test_a_meter_along_any_axis_moves_a_token_of_the_papers_width_by_comparable_amounts(scenes):
    """Rotation by height moves what is there; F and symbols must be as large, whatever the tower's scale."""
    config = Config(llm="random", symbol=16, **papers.SIZES["proxy3d"])
    model = WideModel(config, data.TinyText(data.vocabulary()))
    model.configure_stage(PROXIES)
    model.cache_features(scenes)
    z, c, _ = model.scene_tokens(scenes[0])
    here = model.add_position(z, c)
    there = torch.stack([model.add_position(z, c + meter) for meter in torch.eye(3)])
    moved = (there - here).norm(dim=-1).mean(1)
    assert moved.max() < 4 * moved.min()
    assert rms(model.gains[1] * model.symbols(IDENTIFIERS)) == pytest.approx(rms(z), rel=0.5)


def test_the_size_of_positions_is_measured_once_and_saved(folder, scenes):
    """A run that is continued or scored elsewhere must not measure other scenes."""
    model = make(folder, PLACED)
    again = make(folder)
    model.cache_features(scenes)
    again.load_state_dict(model.state_dict())
    again.cache_features(scenes[1:])
    assert (model.gains != 1).all()
    assert torch.equal(again.gains, model.gains)
    assert "gains" in data.named_weights(again)


# ---- 5 symbols -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [11, 16, 56])
def test_digits_are_legible(size):
    """012 as a person would draw it on a 3 x 5 grid, white on black, in the middle of the image."""
    rows = ["###..#..###", "#.#.##....#", "#.#..#..###", "#.#..#..#..", "###.###.###"]
    image = draw_identifier(12, size)[..., 0].numpy()
    zoom = size // 11
    lit = np.argwhere(image)
    low, high = lit.min(0), lit.max(0)
    down, across = map(slice, low, high + 1, [zoom, zoom])
    glyph = np.where(image[down, across], "#", ".")
    assert ["".join(row) for row in glyph] == rows
    assert (abs(low + high - size + 1) <= 1).all()


def test_no_two_symbols_share_a_picture():
    """Identifiers, known categories, and labels of scans that no icon shows: those are written."""
    names = ["office chair", "trash can", "cabinet", "kitchen cabinet", "books", "shower curtain rod"]
    names += data.CATEGORIES
    pictures = [draw_identifier(i, 112) for i in range(100)]
    pictures += [proxy3d.draw_category(name, "white", 112) for name in names]
    assert len(torch.stack(pictures).unique(dim=0)) == len(pictures)


# ---- 6 the model: scale and start ----------------------------------------------------------------


def test_what_is_trained_from_scratch_enters_at_the_scale_of_the_embeddings(scenes):
    """Tokens a hundred times smaller than words are not found by attention, larger ones drown them."""
    model = make()
    words = rms(model.llm.get_input_embeddings().weight.detach())
    z, _, _ = model.scene_tokens(scenes[0])
    symbols = model.symbols([*IDENTIFIERS, ("category", "chair", "red")])
    for features in (symbols[:-1], symbols[-1], z):
        assert rms(features) == pytest.approx(words, rel=0.06)


def test_what_a_loaded_tower_sees_enters_untouched(folder, scenes):
    """The language model was trained on exactly these: no norm, no anchor, no projection in between."""
    model = make(folder)
    z, _, _ = model.scene_tokens(scenes[0])
    assert torch.equal(z, model.load_features(scenes[0])["z"].float())
    seen = qwen_tokens(model.llm.model.visual, draw_identifier(12, 16)[None], False)
    assert alike(model.symbols([("id", 12)])[0], seen.mean((0, 1, 2)), 1e-7)


def test_the_most_similar_number_token_says_how_high_a_token_is():
    """A tiny model's coordinate is read by the same copy as a name; R turns the anchor for it."""
    model = make(reader=(128, 1, 4, 8))
    papers.start_as_reader(model)
    xyz = 2 * torch.rand(60, 3)
    encoded = model.add_position(torch.zeros(60, 128), xyz)
    numbers = model.text.number.items()
    tokens, heights = zip(*((token, value) for token, (axis, value) in numbers if axis == "z"), strict=True)
    words = model.llm.get_input_embeddings().weight[[*tokens]]
    nearest = torch.cosine_similarity(encoded[:, None], words, dim=-1).argmax(1)
    wrong = abs(torch.tensor(heights)[nearest] - xyz[:, 2])
    assert (wrong < 0.2).float().mean() > 0.7


# ---- scenes to tokens ----------------------------------------------------------------------------


def test_stage_one_tokens_are_category_plus_identifier(scenes):
    """One "chess piece" per object, in BFS order, no position in it; scenes of 9, 12 and 7 objects."""
    model = make(stage=SYMBOLS)
    seen = model.encode(scenes)
    assert seen["valid"].sum(1).tolist() == [9, 12, 7]
    for scene, tokens in zip(scenes, seen["tokens"], strict=True):
        centers = np.stack([o.box[:3] for o in scene.objects])
        order = breadth_first_slowly(centers, np.zeros(3), 6)
        for k, i in enumerate(order):
            o = scene.objects[i]
            keys = ("category", o.category, o.color), ("id", scene.identifiers[o.id])
            assert alike(tokens[k], model.symbols(keys).sum(0), 1e-6)


@pytest.mark.parametrize("stage", [PLACED, PROXIES], ids=lambda stage: stage.name)
@pytest.mark.parametrize("loaded", [False, True])
def test_tokens_with_positions_follow_equation_4(folder, scenes, stage, loaded):
    """R(c_height) z + F(c_horizontal) + f_id, at the turned centers; no identifier where nothing is."""
    model = make(folder if loaded else None, stage)
    for scene, row in zip(scenes, model.encode(scenes)["tokens"], strict=True):
        z, c, number = model.scene_tokens(scene)
        anchor = 0 if loaded else model.anchor
        where, named_by = model.gains
        expected = rotate_height(z + anchor, c[:, 2])
        expected += where * model.fourier(c[:, :2])
        named = number >= 0
        expected[named] += named_by * model.symbols(IDENTIFIERS)[number[named]]
        assert alike(row[: len(z)], expected)
        assert named.any()
        assert named.all() == (stage is PLACED)  # floor and walls have no identifier


def test_proxies_lie_in_their_objects_also_when_the_scene_is_turned(scenes):
    """Proxies are kept before augmentation: `turn` must move them as it moved the boxes."""
    model = make()
    for scene in scenes:
        _, c, number = model.scene_tokens(scene)
        seen = 0
        for o in scene.objects:
            mine = c[number == scene.identifiers[o.id]].numpy()
            away = abs(mine - o.box[:3])
            assert (away <= o.box[3:] / 2 + 1e-3).all()
            seen += len(mine) > 0
        assert seen > 2


def test_a_scene_of_more_than_100_objects_numbers_the_100_largest(rng):
    """The others keep their proxies, as far as the budget goes, but no name."""
    scene = augment(room(0, objects=120, views=3, size=48, points=0), rng)
    assert make(stage=PLACED).encode([scene])["valid"].sum() == 100
    model = make(budget=80)
    _, _, number = model.scene_tokens(scene)
    group = model.load_features(scene)["group"].tolist()
    assert len(group) == 80
    assert number.tolist() == [scene.identifiers.get(i, -1) for i in group]


def test_frames_of_any_size_are_seen_at_the_grid_and_evenly_spaced(scenes):
    """Exactly grid x cell pixels, whatever the camera, the first and the last of the views included."""
    seen = []
    for grid in ((6, 5), (6, 6)):
        model = make(grid=grid)
        model.tower.register_forward_pre_hook(lambda tower, given: seen.append(given[0]))
        model.compute_features(scenes[0])
    assert seen[0].shape == (3, 48, 40, 3)
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
    for stage in STAGES["paper"]:
        assert (stage.lr, stage.schedule, stage.warmup, stage.weight_decay) == (5e-6, "cosine", 0.1, 0)
    for stages in STAGES.values():
        for stage in stages:
            assert stage.tasks.keys() <= data.TASKS.keys()
    without = proxy3d.recipe(Config(coordinate_stage=False), STAGES["paper"])
    assert [s.name[:3] for s in without] == ["I i", "III", "IV "]
    assert "3d" in without[-1].trains


def test_each_of_the_papers_settings_has_a_name():
    """Main table: 700 tokens at 32x42; VSI-Bench and ablations: 450 at 16x21."""
    for config, *size in ((Config.paper(), 700, (32, 42)), (Config.paper_450(), 450, (16, 21))):
        assert [config.budget, config.grid] == size
        assert (config.frames, config.floor) == (32, 2)


@pytest.mark.parametrize("stage", STAGES["paper"][:3], ids=lambda stage: stage.name)
def test_a_symbol_stage_asks_only_what_its_tokens_show(folder, scenes, stage):
    """Other colors leave the tokens as they are, so no answer may change with them; other categories change both."""
    model, scene = make(folder, stage), scenes[0]
    gray = replace(scene, objects=[replace(o, color="gray") for o in scene.objects])
    odd = replace(scene, objects=[replace(o, category=f"thing {o.id}") for o in scene.objects])
    tokens, in_gray, oddly = (model.encode([s])["tokens"] for s in (scene, gray, odd))
    assert torch.equal(tokens, in_gray)
    assert not alike(tokens, oddly)

    def asked(scene):
        ((_, samples),) = questions_of([scene], stage.tasks, 40)
        return [(q.task, q.question, q.answer) for q in samples]

    assert asked(scene) == asked(gray)
    assert {task for task, *_ in asked(scene)} == stage.tasks.keys()


def test_a_tower_that_trains_drops_what_it_saw_before(scenes):
    """Proxies of the old tower would be used with the new one, and nobody would notice."""
    model = make()
    model.encode(scenes)
    model.configure_stage(TOWER)
    model.cache_features(scenes)
    model.encoder_loss(scenes)
    assert not model.symbol_features
    assert not model.feature_cache


def test_the_untrained_tower_is_another_one_and_leaves_no_trace(scenes):
    """The column "untrained tower": same language model, other eyes, also when an answer breaks it off."""
    model = make()
    before = model.encode(scenes)["tokens"]
    with pytest.raises(KeyError), model.baselines()["untrained tower"]:
        assert not alike(model.encode(scenes)["tokens"], before, 0.1)
        raise KeyError
    assert torch.equal(model.encode(scenes)["tokens"], before)
    model.feature_cache = {}
    assert torch.equal(model.encode(scenes)["tokens"], before), "the tower is back, not only what it saw"


def test_lora_trains_and_keeps_adapters_only(folder, scenes):
    """At the start they change nothing; a checkpoint holds them and what is new, the rest is loaded again."""
    model, plain = make(folder, lora=4), make(folder)
    plain.fourier.load_state_dict(model.fourier.state_dict())
    batch = model.batch(questions_of(scenes[:1], MIX))
    loss = model(batch)["loss"]
    assert torch.allclose(loss, plain(batch)["loss"], rtol=1e-6)
    loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert all("language_model.layers" in name and "lora_" in name for name in trained)
    held = set(data.named_weights(model))
    assert trained <= held
    assert {name.split(".")[0] for name in held - trained} == {"fourier", "gains"}


# ---- the vision tower ----------------------------------------------------------------------------


@pytest.fixture
def tower():
    llm = papers.qwen_vl(window_size=24, depth=3, hidden_size=128, num_hidden_layers=1)
    return llm.model.visual.requires_grad_(False)


def random_images(count):
    return torch.randint(256, (count, 24, 40, 3), dtype=torch.uint8)


def test_pixels_enter_the_tower_as_its_own_processor_would_give_them(tower):
    """The order of patches, of pixels in a patch and of colors, the doubled frame, mean and deviation."""
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as theirs

    images = random_images(2)
    processor = theirs.Qwen2VLImageProcessorPil(patch_size=4, do_resize=False)
    given = processor(images=list(images.numpy()), return_tensors="pt")
    expected = tower(given["pixel_values"], grid_thw=given["image_grid_thw"]).pooler_output
    tokens = qwen_tokens(tower, images, False)
    assert tokens.shape == (2, 3, 5, 128)
    assert alike(tokens.flatten(0, 2), expected, 1e-4 * float(expected.abs().max()))


@with_and_without_inter_frame
def test_windows_of_one_size_attend_in_one_call_as_they_would_one_by_one(folder, inter_frame):
    """The loaded tower's attention beside transformers' own, where frames have windows of several sizes."""
    visual, images = make(folder).visual, random_images(3)
    assert visual.config._attn_implementation == "flash_batched"
    batched = qwen_tokens(visual, images, inter_frame)
    visual.config._attn_implementation = "sdpa"
    assert alike(batched, qwen_tokens(visual, images, inter_frame))


@with_and_without_inter_frame
def test_frames_see_each_other_only_with_inter_frame_attention(tower, inter_frame):
    """Table 4's switch. Without it a frame's features must not depend on which other frames are there."""
    images = random_images(3)
    changed = images.clone()
    changed[2] = 255 - changed[2]
    a, b, one = (qwen_tokens(tower, x, inter_frame) for x in (images, changed, images[:1]))
    moved = (a - b).abs().amax((1, 2, 3)) > 1e-6
    assert moved.tolist() == [inter_frame, inter_frame, True]
    assert alike(a[:1], one, 1e-6) != inter_frame


def test_inter_frame_attention_reaches_the_scene_but_never_the_symbols(folder, scenes):
    """Frames of a scene are one view of one room; pictures of digits that were seen together are not."""
    on, off = make(folder), make(folder, inter_frame=False)
    assert torch.equal(on.symbols(IDENTIFIERS), off.symbols(IDENTIFIERS))
    together, apart = (model.compute_features(scenes[0])["z"].float() for model in (on, off))
    assert not alike(together, apart, 1e-3 * rms(together))


# ---- 8 alternatives, 9 attention -----------------------------------------------------------------


def test_a_folder_of_features_belongs_to_one_setting_and_one_tower():
    model = make()
    one, another = model.cache_key(), make(budget=9).cache_key()
    data.start_weights(model.tower)
    assert len({one, another, model.cache_key()}) == 3


def test_the_attention_map_is_a_distribution_over_the_scene(scenes):
    """K entries, none negative, sum 1; looking does not change how the model computes afterwards."""
    model = make()
    groups = questions_of(scenes[1:2], MIX, 1)
    batch = model.batch(groups)
    before = model(batch)["loss"]
    looked = attention_map(model, scenes[1], groups[0][1][0])
    assert looked.shape == (24,)
    assert looked.min() >= 0
    assert abs(looked.sum() - 1) < 1e-5
    assert looked.std() > 1e-4
    assert torch.equal(model(batch)["loss"], before)


# ---- comments ------------------------------------------------------------------------------------


def test_every_shape_in_a_comment_is_true(folder, scenes):
    """Statement by statement; pictures of symbols are square, and the small tower's sizes are."""
    groups = questions_of(scenes, MIX)

    def run():
        model = make(stage=TOWER, grid=(6, 8), lloyd=1, fourier=24)
        papers.start_as_reader(model)
        for stage in (TOWER, PLACED, PROXIES):
            model.configure_stage(stage)
            model.cache_features(scenes)
            model(model.batch(groups))
        attention_map(model, scenes[0], groups[0][1][0])
        seeds_together(torch.randn(9, 3), torch.tensor([2, 7]), torch.tensor([1, 4]))
        model = make(folder)
        model(model.batch(groups))

    square = ["HW", "hw", "VH", "Vh", "VW", "VE", "Vm", "BV", "mh", "mw", "th", "tw", "mt"]
    equal = [{"heads", "d"}, *map(set, square)]
    assert wrong_shapes(proxy3d, run, equal) == []
