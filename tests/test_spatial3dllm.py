"""Spatial 3D-LLM: every part against a slow and obvious version, and what the whole model promises.

What all papers promise is in test_contract.py; MODLE has a file of its own, test_modle.py.
"""

import math
from dataclasses import replace

import numpy as np
import papers
import pytest
import torch
from papers import alike, make

import data
from spatial3dllm import (
    Concatenation,
    Config,
    FeaturePropagation,
    InterReferentGraph,
    IntraReferent,
    ReferentSceneAttention,
    SetAbstraction,
    cloud_geometry,
    detection_loss,
    neighbor_graph,
)

ENCODER = data.Stage("encoder", {}, ("encoder", "scene"), "encoder")


def ball(points, center, count, radius=math.inf):
    """The places in the list of the nearest of points [n, 3], at most `count`, that lie within the radius."""
    distance = (points - center).norm(dim=1)
    nearest = distance.argsort()[:count]
    return nearest[distance[nearest] <= radius]


def alone(layer, *arrays):
    """What a layer makes of a batch of one."""
    batch = (x[None] for x in arrays)
    return layer(*batch)[0]


# ---- 1 geometry ----------------------------------------------------------------------------------

COUNTS = (20, 10, 5, 4)
RADII = (0.5, 1, 2, 3)


@pytest.fixture
def cloud():
    """The points of every level, prefixes of one farthest-point order, and what is worked out for them."""
    p = torch.randn(60, 3)
    order = data.farthest_point_sampling(p, 20)
    levels = [p] + [p[order[:count]] for count in COUNTS]
    return levels, cloud_geometry(p, p, COUNTS, RADII, [5] * 4)


def test_a_ball_holds_the_nearest_points_within_its_radius_of_the_level_before(cloud):
    """Places left over repeat the nearest, which a maximum does not feel."""
    levels, found = cloud
    for i, radius in enumerate(RADII):
        for row, center in zip(found[f"ball{i}"], levels[i + 1], strict=True):
            assert list(dict.fromkeys(row.tolist())) == ball(levels[i], center, 5, radius).tolist()


def test_features_are_carried_to_finer_points_by_inverse_distance(cloud):
    levels, found = cloud
    for i in (2, 3):
        coarse = levels[i + 1]
        for p, row, w in zip(levels[i], found[f"near{i}"], found[f"weight{i}"], strict=True):
            assert torch.equal(row, ball(coarse, p, 3))
            expected = 1 / ((coarse[row] - p).norm(dim=1) + 1e-8)
            assert torch.allclose(w, expected / expected.sum(), rtol=1e-4)
    assert found["weight3"][0].tolist() == pytest.approx([1, 0, 0], abs=1e-5), "it is a coarse point"


# ---- 2 encoder -----------------------------------------------------------------------------------


def test_a_set_abstraction_is_the_maximum_over_balls_of_an_mlp_per_pair():
    layer = SetAbstraction((5, 6, 8), 0.5)
    f = torch.randn(11, 5)
    p = torch.randn(11, 3)
    q = torch.randn(4, 3)
    index = torch.randint(0, 11, (4, 3))
    out = alone(layer, f, p, q, index)
    for m, near in enumerate(index):
        offset = (p[near] - q[m]) / 0.5
        rows = layer.mlp(torch.cat([f[near], offset], 1))
        assert alike(out[m], rows.amax(0))


def test_feature_propagation_puts_interpolated_beside_own_features():
    layer = FeaturePropagation(4)
    coarse = torch.randn(3, 4)
    fine = torch.randn(7, 4)
    index = torch.randint(0, 3, (7, 3))
    weight = torch.rand(7, 3)
    out = alone(layer, coarse, fine, index, weight)
    for n in range(7):
        near = weight[n] @ coarse[index[n]]
        beside = torch.cat([near, fine[n]])
        assert alike(out[n], layer.norm(layer.mlp(beside)))


# ---- 3 to 5 the three modules --------------------------------------------------------------------


def test_referents_pool_the_votes_that_fall_near_their_own():
    """The first seeds' votes are centers; one that nobody joins is its own group."""
    part = IntraReferent(Config.tiny(feature=6, ball=0.5, ball_samples=3))
    f = torch.randn(9, 6)
    p = 0.4 * torch.randn(9, 3)
    (h,), (v,) = part(f[None], p[None], 8)
    place, change = part.vote(f).split([3, 6], -1)
    assert alike(v, p + place)
    moved = f + change
    alone = 0
    for r in range(8):
        group = ball(v, v[r], 3, 0.5)
        alone += len(group) == 1
        offset = (v[group] - v[r]) / 0.5
        rows = part.group.mlp(torch.cat([moved[group], offset], 1))
        assert alike(h[r], rows.amax(0), 1e-4)
    assert 0 < alone < 8


def test_the_graph_layer_equals_dense_matrices():
    """A: each referent's k nearest, made symmetric, with self loops."""
    part = InterReferentGraph(Config.tiny(feature=5, neighbors=3))
    h = torch.randn(8, 5)
    q = torch.randn(8, 3)
    A = torch.eye(8)
    for i in range(8):
        near = ball(q, q[i], 4)
        A[i, near] = A[near, i] = 1
    D = torch.diag(A.sum(1).pow(-0.5))
    expected = h
    for norm, layer in zip(part.norms, part.layers, strict=True):
        expected = expected + torch.relu(D @ A @ D @ norm(expected) @ layer.weight.T)
    assert alike(alone(part, h, q), expected)


def test_referents_at_one_place_are_still_linked_with_themselves():
    graph = neighbor_graph(torch.zeros(1, 6, 3), 2)[0]
    assert torch.equal(graph, graph.T)
    assert (graph.diagonal() > 0).all()


def test_a_place_has_random_waves_that_half_precision_does_not_blur():
    """A linear map of the cosines and sines of random mixtures of x, y and z."""
    part = ReferentSceneAttention(Config.tiny(feature=8))
    x = 8 * torch.rand(1, 4, 3)
    phase = x @ part.frequencies
    expected = part.position(torch.cat([phase.cos(), phase.sin()], -1))
    assert alike(part.code(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert (part.code(x) - expected).abs().max() < 0.01


def test_referents_attend_to_seeds_and_see_them_from_their_own_place():
    """Against softmax written out, per head."""
    part = ReferentSceneAttention(Config.tiny(feature=6, context_heads=2, fourier=4))
    h = torch.randn(3, 6)
    q = torch.randn(3, 3)
    f = torch.randn(5, 6)
    p = torch.randn(5, 3)
    out = alone(part, h, q, f, p)
    query = part.query(part.norm(h) + part.code(q))
    seeds = part.norm_scene(f)
    key = part.key(seeds + part.code(p))
    for r in range(3):
        value = part.value(seeds) + part.place(p - q[r])
        seen = []
        for n in torch.arange(6).chunk(2):
            score = query[r, n] @ key[:, n].T / math.sqrt(3)
            seen.append(score.softmax(-1) @ value[:, n])
        x = h[r] + part.out(torch.cat(seen))
        expected = x + part.mlp(part.norm_mlp(x))
        assert alike(out[r], expected, 1e-4)


def test_concatenation_sets_neighbors_side_by_side():
    part = Concatenation(Config.tiny(feature=4, neighbors=2))
    h = torch.randn(5, 4)
    q = torch.randn(5, 3)
    near = ball(q, q[1], 3)
    message = part.out(part.norm(h[near]).flatten())
    assert alike(alone(part, h, q)[1], h[1] + torch.relu(message), 1e-6)


# ---- 6 what referents are taught -----------------------------------------------------------------


def test_the_detection_loss_of_the_truth_is_nearly_nothing_and_grows_with_each_fault():
    """Votes, boxes, names: each counts, of the background only its place."""
    words = 3 * torch.eye(20, 32)
    names = torch.tensor([2, 5, 6, 7, 11, 12])  # the first for what has no name, then categories, then colors
    true = torch.rand(2, 6, 6) + 0.2
    named = torch.tensor([[[5, 12], [7, 11], [5, 11], [2, 2], [6, 12], [2, 2]]] * 2)
    on = named[..., 0] > 2
    perfect = {
        "boxes": true[:, :4],
        "votes": true[..., :3],
        "tokens": words[named].sum(2)[:, :4],
    }

    def told(**changes):
        return detection_loss({**perfect, **changes}, true, named, on, words, names)

    best, right = told()
    assert (right == 1).all()
    assert best.max() < 0.7, "two names share what is told: log 2"

    # every fault costs: of the background, row 3, its place does, but it has no size
    center = slice(3)
    size = slice(3, 6)
    faults = [
        ("boxes", 0, center, 0.1),
        ("boxes", 0, size, 0.1),
        ("votes", 4, center, 0.1),
        ("boxes", 3, center, 0.02),
        ("boxes", 3, size, 0),
    ]
    for key, row, columns, least in faults:
        values = perfect[key].clone()
        values[:, row, columns] += 1
        loss, _ = told(**{key: values})
        assert (loss > best + least).all() if least else torch.equal(loss, best)

    # the names of others
    loss, right = told(tokens=perfect["tokens"].roll(1, 1))
    assert (loss > best + 0.1).all()
    assert not right.any()

    # where nothing is
    loss, _ = detection_loss(perfect, true, torch.full_like(named, 2), on & False, words, names)
    assert loss.isfinite().all()


def test_seeds_are_told_what_they_lie_on(scenes):
    """Box and names of their object; of the background its own place."""
    model = make("spatial3dllm", stage=ENCODER)
    seen = model.see(scenes)
    true, named, on = model.seed_truth(scenes, seen["instances"], seen["places"])
    assert 0 < on.float().mean() < 1
    for b, m in np.ndindex(on.shape):
        i = int(seen["instances"][b, m])
        assert on[b, m] == (i > 0)
        place, names = seen["places"][b, m], ()
        if i:
            o = scenes[b].thing(i)
            place, names = o.box, (o.category, o.color)
        assert np.allclose(true[b, m, : len(place)], place, atol=1e-6)
        assert named[b, m].tolist() == list(data.name_pair(model.text, *names))


# ---- 7 the model ---------------------------------------------------------------------------------


def test_sizes_and_votes_of_a_frozen_encoder_follow_a_turned_scene(rng):
    """Centers do too: test_contract.py."""
    plain = data.room(0, objects=9, views=0, points=300)
    model = make("spatial3dllm").eval()
    before = model.see([plain])
    for _ in range(4):
        turned = data.augment(plain, rng)
        turn = torch.from_numpy(turned.turn).float()
        after = model.see([turned])
        sizes = before["boxes"][..., 3:] @ turn.abs().T
        assert alike(after["boxes"][..., 3:], sizes)
        assert alike(after["votes"], before["votes"] @ turn.T)


def test_small_and_bare_clouds_share_a_batch_and_change_nothing_for_others(scenes):
    """Fewer points than are read; no colors, normals or objects."""
    few = data.room(1, views=0, points=200)
    bare = replace(scenes[0], name="bare", colors=None, normals=None, instances=None)
    batch = [scenes[0], few, bare]
    model = make("spatial3dllm", stage=ENCODER).eval()
    together = model.see(batch)
    for i, scene in enumerate(batch):
        for key, own in model.see([scene]).items():
            assert torch.isfinite(own).all()
            assert alike(together[key][i], own[0])


def test_lora_stands_beside_attention_and_referents_are_as_loud_as_words(tmp_path):
    model = make("spatial3dllm", papers.save_llm("spatial3dllm", tmp_path))
    adapted = {name.split(".")[-4] for name in model.llm.state_dict() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    loud = model.embeddings.square().mean().sqrt()
    assert alike(model.projector[-1].weight, loud)


def test_a_marked_object_is_written_as_its_box(scenes):
    thing = scenes[0].objects[0]
    sample = data.Sample("", "", "id_category", f"what is {data.mark(thing)}?", "chair")
    written = make("spatial3dllm").write_marks(scenes[0], sample)
    assert written.question == f"what is {data.listed(thing.box)}?"
