"""Spatial 3D-LLM: every part against a slow and obvious version, and what the whole model promises.

What all papers promise is in test_contract.py; MODLE has a file of its own, test_modle.py.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from papers import make, save_llm
from torch import nn

import data
import spatial3dllm
from data import DataError, Stage, augment, room
from spatial3dllm import (
    INTER,
    Concatenation,
    Config,
    FeaturePropagation,
    InterReferentGraph,
    IntraReferent,
    ReferentSceneAttention,
    SetAbstraction,
    ball_query,
    cloud_geometry,
    detection_loss,
    gather,
    interpolation,
    neighbor_graph,
)

ENCODER = Stage("encoder", {}, ("encoder", "scene"), "encoder")
REFERENTS = Stage("referents", {"modle_distance": 1}, ("scene", "code", "lm"), "referents")


@pytest.fixture(scope="module")
def scenes():
    """Three rooms with different numbers of objects, mirrored or transposed."""
    rng = np.random.default_rng(0)
    sizes = ((0, 9), (1, 12), (2, 7))
    made = [room(seed, objects=n, views=0, points=300) for seed, n in sizes]
    return [augment(scene, rng) for scene in made]


def model_at(stage, **changes):
    model = make("spatial3dllm", **changes).eval()
    model.configure_stage(stage)
    return model


def points(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 3)))


def same(seen, other, rows=slice(None)):
    """Whether two batches show the same; rows: of the first."""
    return all(torch.allclose(seen[k][rows].double(), other[k].double(), atol=1e-5) for k in other)


# ---- 1 geometry ----------------------------------------------------------------------------------


def test_every_level_is_the_farthest_point_sample_of_the_one_before():
    """One order serves all levels, since every prefix of it is a sample of its own."""
    p = points(60)
    found = cloud_geometry(p, p, (20, 10, 5, 4), (0.5, 1, 2, 3), (4, 4, 4, 4))
    order = found["order"]
    assert torch.equal(order, data.farthest_point_sampling(p, 20))
    assert found["ball0"].shape == (20, 4) and found["ball2"].shape == (5, 4)
    assert found["near3"].shape == (5, 3) and found["near2"].shape == (10, 3)


def test_a_ball_holds_the_nearest_points_within_its_radius():
    """Places left over repeat the nearest, which a maximum does not feel."""
    p, q = points(30), points(30)[:7]
    for row, center in zip(ball_query(q, p, 0.8, 9).tolist(), q, strict=True):
        distance = (p - center).norm(dim=1)
        inside = [j for j in distance.argsort().tolist() if distance[j] <= 0.8][:9]
        assert list(dict.fromkeys(row)) == inside


def test_features_are_carried_to_finer_points_by_inverse_distance():
    coarse, fine = points(6), torch.cat([points(5, 1), points(6)[2:3]])
    index, weight = interpolation(fine, coarse)
    for p, row, w in zip(fine, index, weight, strict=True):
        distance = (coarse - p).norm(dim=1)
        assert row.tolist() == distance.argsort()[:3].tolist()
        expected = 1 / (distance[row] + 1e-8)
        assert torch.allclose(w.double(), expected / expected.sum(), rtol=1e-4)
    assert torch.allclose(weight[-1], torch.tensor([1.0, 0, 0]), atol=1e-5), "it is a coarse point"


# ---- 2 encoder -----------------------------------------------------------------------------------


def test_scenes_of_a_batch_never_mix():
    values, index = torch.randn(2, 5, 3), torch.randint(0, 5, (2, 4, 6))
    taken = gather(values, index)
    assert taken.shape == (2, 4, 6, 3)
    assert all(torch.equal(taken[b], values[b][index[b]]) for b in range(2))


def test_a_set_abstraction_is_the_maximum_over_balls_of_an_mlp_per_pair():
    torch.manual_seed(0)
    layer = SetAbstraction((5, 6, 8), 0.5)
    f, p, q = torch.randn(2, 11, 5), torch.randn(2, 11, 3), torch.randn(2, 4, 3)
    index = torch.randint(0, 11, (2, 4, 3))
    out = layer(f, p, q, index)
    for b in range(2):
        for m in range(4):
            rows = []
            for j in index[b, m].tolist():
                rows.append(layer.mlp(torch.cat([f[b, j], (p[b, j] - q[b, m]) / 0.5])))
            assert torch.allclose(out[b, m], torch.stack(rows).amax(0), atol=1e-5)


def test_feature_propagation_puts_interpolated_beside_own_features():
    torch.manual_seed(0)
    layer = FeaturePropagation(4)
    coarse, fine = torch.randn(2, 3, 4), torch.randn(2, 7, 4)
    index, weight = torch.randint(0, 3, (2, 7, 3)), torch.rand(2, 7, 3)
    out = layer(coarse, fine, index, weight)
    for b in range(2):
        for n in range(7):
            near = sum(weight[b, n, i] * coarse[b, index[b, n, i]] for i in range(3))
            expected = layer.norm(layer.mlp(torch.cat([near, fine[b, n]])))
            assert torch.allclose(out[b, n], expected, atol=1e-5)


# ---- 3 to 5 the three modules --------------------------------------------------------------------


def test_referents_pool_the_votes_that_fall_near_their_own():
    """The first seeds' votes are centers; one that nobody joins is its own group."""
    torch.manual_seed(0)
    part = IntraReferent(Config.tiny(feature=6, ball=0.5, ball_samples=3))
    f, p = torch.randn(2, 9, 6), 0.4 * torch.randn(2, 9, 3)
    h, v = part(f, p, 4)
    moved = part.vote(f)
    assert torch.allclose(v, p + moved[..., :3])
    alone = 0
    for b in range(2):
        for r in range(4):
            distance = (v[b] - v[b, r]).norm(dim=1)
            group = [j for j in distance.argsort().tolist()[:3] if distance[j] <= 0.5]
            alone += group == [r]
            index = torch.tensor([[group + [r] * (3 - len(group))]])
            expected = part.group(
                (f + moved[..., 3:])[b : b + 1], v[b : b + 1], v[b : b + 1, r : r + 1], index
            )
            assert torch.allclose(h[b, r], expected[0, 0], atol=1e-4)
    assert 0 < alone < 8


def test_the_graph_layer_equals_dense_matrices():
    """A: each referent's k nearest, made symmetric, with self loops."""
    torch.manual_seed(0)
    part = InterReferentGraph(Config.tiny(feature=5, neighbors=3))
    h, q = torch.randn(2, 8, 5), torch.randn(2, 8, 3)
    out = part(h, q)
    for b in range(2):
        distance = (q[b, :, None] - q[b]).norm(dim=-1)
        A = torch.eye(8)
        for i in range(8):
            for j in distance[i].argsort()[1:4].tolist():
                A[i, j] = A[j, i] = 1
        D = torch.diag(A.sum(1).pow(-0.5))
        assert torch.allclose(neighbor_graph(q, 3)[b], D @ A @ D, atol=1e-6)
        expected = h[b]
        for norm, layer in zip(part.norms, part.layers, strict=True):
            expected = expected + torch.relu(D @ A @ D @ norm(expected) @ layer.weight.T)
        assert torch.allclose(out[b], expected, atol=1e-5)


def test_referents_at_one_place_are_still_linked_with_themselves():
    graph = neighbor_graph(torch.zeros(1, 6, 3), 2)
    assert torch.equal(graph, graph.mT) and (graph.diagonal(dim1=1, dim2=2) > 0).all()


def test_a_place_has_random_waves_that_half_precision_does_not_blur():
    """A linear map of the cosines and sines of random mixtures of x, y and z."""
    part, x = ReferentSceneAttention(Config.tiny(feature=8)), 8 * torch.rand(1, 4, 3)
    phase = x @ part.frequencies
    features = torch.cat([phase.cos(), phase.sin()], -1)
    assert torch.allclose(part.code(x), part.position(features), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert (part.code(x) - part.position(features)).abs().max() < 0.05


def test_referents_attend_to_seeds_and_see_them_from_their_own_place():
    """Against softmax written out, per head."""
    torch.manual_seed(0)
    part = ReferentSceneAttention(Config.tiny(feature=6, context_heads=2, fourier=4))
    h, q, f, p = (
        torch.randn(2, 3, 6),
        torch.randn(2, 3, 3),
        torch.randn(2, 5, 6),
        torch.randn(2, 5, 3),
    )
    out = part(h, q, f, p)
    for b in range(2):
        query = part.query(part.norm(h[b]) + part.code(q[b]))
        seeds = part.norm_scene(f[b])
        key, value = part.key(seeds + part.code(p[b])), part.value(seeds)
        for r in range(3):
            seen = []
            for n in (slice(0, 3), slice(3, 6)):
                weight = (query[r, n] @ key[:, n].T / math.sqrt(3)).softmax(-1)
                seen.append(weight @ (value + part.place(p[b] - q[b, r]))[:, n])
            x = h[b, r] + part.out(torch.cat(seen))
            assert torch.allclose(out[b, r], x + part.mlp(part.norm_mlp(x)), atol=1e-4)


def test_concatenation_sets_neighbors_side_by_side():
    torch.manual_seed(0)
    part = Concatenation(Config.tiny(feature=4, neighbors=2))
    h, q = torch.randn(1, 5, 4), torch.randn(1, 5, 3)
    near = (q[0, 1] - q[0]).norm(dim=1).argsort()[:3]
    expected = h[0, 1] + torch.relu(part.out(part.norm(h[0, near]).flatten()))
    assert torch.allclose(part(h, q)[0, 1], expected, atol=1e-6)


# ---- 6 what referents are taught -----------------------------------------------------------------


def test_the_detection_loss_of_the_truth_is_nearly_nothing_and_grows_with_each_fault():
    """Votes, boxes, names: each counts, of the background only its place."""
    words = nn.functional.one_hot(torch.arange(20), 32).float().mul(3)
    names = torch.tensor([2, 5, 6, 7, 11, 12])  # the first for what has no name, then categories, then colors
    true = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0)) + 0.2
    named = torch.tensor([[[5, 12], [7, 11], [5, 11], [2, 2], [6, 12], [2, 2]]] * 2)
    on = named[..., 0] > 2
    tokens = words[named].sum(2)[:, :4]
    perfect = {"boxes": true[:, :4], "votes": true[..., :3], "tokens": tokens}

    def loss_with(**changes):
        return detection_loss({**perfect, **changes}, true, named, on, words, names)

    def moved(key, row, column, amount):
        values = perfect[key].clone()
        values[:, row, column] += amount
        return {key: values}

    best, right = loss_with()
    assert (right == 1).all() and (best < 0.7).all(), "two names share what is told: log 2"
    center, size = slice(0, 3), slice(3, 6)
    for change in (
        moved("boxes", 0, center, 1),
        moved("boxes", 0, size, 1),
        moved("votes", 4, center, 1),
    ):
        assert (loss_with(**change)[0] > best + 0.1).all()
    renamed, wrong = loss_with(tokens=tokens.roll(1, 1))
    assert (renamed > best + 0.1).all() and (wrong == 0).all()
    assert torch.equal(loss_with(**moved("boxes", 3, size, 5))[0], best), "a wall has no size"
    assert (loss_with(**moved("boxes", 3, center, 1))[0] > best + 0.02).all(), "but a place"
    nothing = detection_loss(perfect, true, named * 0 + 2, on & False, words, names)
    assert torch.isfinite(nothing[0]).all()


def test_seeds_are_told_what_they_lie_on(scenes):
    """Box and names of their object; of the background its own place."""
    model = model_at(ENCODER)
    model.cache_features(scenes)
    seen = model.see(scenes)
    true, named, on = model.seed_truth(scenes, seen["instances"], seen["places"])
    assert 0 < on.float().mean() < 1
    for b, scene in enumerate(scenes):
        for m, object_id in enumerate(seen["instances"][b].tolist()):
            thing = next((o for o in scene.objects if o.id == object_id), None)
            names = tuple(named[b, m].tolist())
            if thing is None:
                assert not on[b, m] and names == data.name_pair(model.text)
                assert torch.equal(true[b, m, :3], seen["places"][b, m])
            else:
                assert on[b, m] and names == data.name_pair(model.text, thing.category, thing.color)
                assert torch.allclose(true[b, m].double(), torch.from_numpy(thing.box), atol=1e-6)


# ---- 7 the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [ENCODER, REFERENTS], ids=lambda stage: stage.name)
def test_neither_the_order_of_the_points_nor_the_turn_of_a_room_changes_its_seeds(scenes, stage):
    """A cloud has no order, and two processes meet the same scene turned differently."""
    scene = scenes[0]
    order = np.random.default_rng(1).permutation(len(scene.points))
    arrays = {k: getattr(scene, k)[order] for k in ("points", "colors", "normals", "instances")}
    shuffled = replace(scene, name="shuffled", **arrays)
    assert same(model_at(stage).see([scene]), model_at(stage).see([shuffled]))

    model = model_at(stage)
    cloud = model.read_cloud(scene)
    turned = [augment(scene, np.random.default_rng(seed)) for seed in range(6)]
    assert len({s.turn.tobytes() for s in turned}) > 3
    for other in map(model.read_cloud, turned):
        assert all(torch.equal(cloud[key], other[key]) for key in cloud)


def test_boxes_and_votes_of_a_frozen_encoder_follow_a_turned_scene(scenes):
    back = scenes[0].turn.astype(np.float32)
    straight = dict(points=scenes[0].points @ back, normals=scenes[0].normals @ back, turn=np.eye(3))
    base = replace(scenes[0], **straight)
    model = model_at(REFERENTS)
    before = model.see([base])
    for seed in range(4):
        turned = augment(base, np.random.default_rng(seed))
        turn, after = torch.from_numpy(turned.turn).float(), model.see([turned])
        center, size = before["boxes"].split(3, -1)
        expected = torch.cat([center @ turn.T, size @ turn.abs().T], -1)
        assert torch.allclose(after["boxes"], expected, atol=1e-5)
        assert torch.allclose(after["votes"], before["votes"] @ turn.T, atol=1e-5)


def test_small_and_bare_clouds_share_a_batch_and_change_nothing_for_others(scenes):
    """Fewer points than are read, a single one, no colors, normals or objects."""
    keys = ("points", "colors", "normals", "instances")
    few = replace(scenes[1], name="few", **{k: getattr(scenes[1], k)[::3] for k in keys})
    bare = replace(scenes[0], name="bare", colors=None, normals=None, instances=None)
    one = replace(bare, name="one", points=scenes[0].points[:1])
    batch = [scenes[0], few, bare, one]
    model = model_at(ENCODER)
    together = model.see(batch)
    for i, scene in enumerate(batch):
        assert same(together, model.see([scene]), slice(i, i + 1))
    assert all(torch.isfinite(values).all() for values in together.values())


def test_a_scene_without_points_is_refused_in_one_line(scenes):
    with pytest.raises(DataError, match="bare: no points"):
        model_at(REFERENTS).read_cloud(replace(scenes[0], name="bare", points=None))


def test_the_language_model_on_disk_loads_with_every_weight_and_only_lora_is_added(tmp_path):
    from transformers import LlamaForCausalLM

    folder = save_llm("spatial3dllm", tmp_path)
    saved = LlamaForCausalLM.from_pretrained(folder).state_dict()
    config = Config(llm=str(folder), feature=16, lora_rank=4)
    model = spatial3dllm.build(config, data.HubText(str(folder)))
    loaded = {k.replace(".base_layer", ""): v for k, v in model.llm.state_dict().items() if "lora_" not in k}
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[k], saved[k]) for k in saved)
    adapted = {k.split(".")[-4] for k in model.llm.state_dict() if "lora_A" in k}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    loud = float(model.embeddings.detach().square().mean().sqrt())
    assert torch.allclose(model.projector[-1].weight, torch.tensor(loud)), "as loud as words"


def test_a_marked_object_is_written_as_its_box(scenes):
    thing = scenes[0].objects[0]
    sample = data.Sample("", scenes[0].name, "id_category", f"what is {data.mark(thing)}?", "chair")
    written = model_at(REFERENTS).write_marks(scenes[0], sample)
    assert written.question == f"what is {data.listed(thing.box)}?"


@pytest.mark.parametrize(
    "change",
    [
        dict(intra=False),
        dict(inter="off"),
        dict(inter="concat"),
        dict(context=False),
        dict(positions=False),
    ],
    ids=str,
)
def test_every_ablation_changes_the_tokens_and_can_start_from_the_same_weights(scenes, change):
    default, model = model_at(REFERENTS), model_at(REFERENTS, **change)
    model.load_state_dict(default.state_dict())
    assert not torch.allclose(default.encode(scenes)["tokens"], model.encode(scenes)["tokens"], atol=1e-4)
    silent = {"intra": "intra", "context": "context", "positions": "code"}
    off = silent.get(next(iter(change)), "inter.graph")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith(off) for name in trained)


def test_an_unknown_inter_referent_part_is_refused_with_the_known_ones():
    with pytest.raises(DataError, match=f"off, {', '.join(INTER)}"):
        model_at(REFERENTS, inter="gcn")


def test_a_picture_shows_where_referents_are(scenes, tmp_path):
    from PIL import Image

    model = model_at(REFERENTS)
    assert model.token_centers(scenes[0]).shape == (model.config.referents, 3)
    paths = model.pictures(scenes[:1], tmp_path)
    assert [path.name for path in paths] == [f"{scenes[0].name}.png"]
    assert len(Image.open(paths[0]).convert("RGB").getcolors(1 << 24)) > 100
