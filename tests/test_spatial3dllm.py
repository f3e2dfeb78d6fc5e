"""Spatial 3D-LLM: every part against a slow and obvious version, and what the whole model promises.

What all papers promise is in test_contract.py; MODLE has a file of its own, test_modle.py.
"""

import math
from dataclasses import replace

import numpy as np
import papers
import pytest
import torch
from papers import make
from torch import nn

import data
from data import Stage, augment
from spatial3dllm import (
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
    interpolation,
    neighbor_graph,
)

ENCODER = Stage("encoder", {}, ("encoder", "scene"), "encoder")


@pytest.fixture(scope="module")
def scenes():
    return papers.rooms()


def points(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 3)))


# ---- 1 geometry ----------------------------------------------------------------------------------


def test_every_level_is_the_farthest_point_sample_of_the_one_before():
    """One order serves all levels, since every prefix of it is a sample of its own."""
    p = points(60)
    found = cloud_geometry(p, p, (20, 10, 5, 4), (0.5, 1, 2, 3), (4, 4, 4, 4))
    order = found["order"]
    assert torch.equal(order, data.farthest_point_sampling(p, 20))
    assert found["ball2"].shape == (5, 4)
    assert found["near3"].shape == (5, 3)


def test_a_ball_holds_the_nearest_points_within_its_radius():
    """Places left over repeat the nearest, which a maximum does not feel."""
    p, q = points(30), points(30)[:7]
    balls = ball_query(q, p, 0.8, 9)
    for row, center in zip(balls, q, strict=True):
        distance = (p - center).norm(dim=1)
        nearest = distance.argsort()[:9]
        inside = nearest[distance[nearest] <= 0.8]
        assert list(dict.fromkeys(row.tolist())) == inside.tolist()


def test_features_are_carried_to_finer_points_by_inverse_distance():
    coarse = points(6)
    fine = torch.cat([points(5, 1), coarse[2:3]])
    index, weight = interpolation(fine, coarse)
    for p, row, w in zip(fine, index, weight, strict=True):
        distance = (coarse - p).norm(dim=1)
        assert row.tolist() == distance.argsort()[:3].tolist()
        expected = 1 / (distance[row] + 1e-8)
        assert torch.allclose(w.double(), expected / expected.sum(), rtol=1e-4)
    assert torch.allclose(weight[-1], torch.tensor([1.0, 0, 0]), atol=1e-5), "it is a coarse point"


# ---- 2 encoder -----------------------------------------------------------------------------------


def test_a_set_abstraction_is_the_maximum_over_balls_of_an_mlp_per_pair():
    torch.manual_seed(0)
    layer = SetAbstraction((5, 6, 8), 0.5)
    f = torch.randn(2, 11, 5)
    p = torch.randn(2, 11, 3)
    q = torch.randn(2, 4, 3)
    index = torch.randint(0, 11, (2, 4, 3))
    out = layer(f, p, q, index)
    for b, m in np.ndindex(2, 4):
        ball = index[b, m]
        offset = (p[b, ball] - q[b, m]) / 0.5
        rows = layer.mlp(torch.cat([f[b, ball], offset], 1))
        assert torch.allclose(out[b, m], rows.amax(0), atol=1e-5)


def test_feature_propagation_puts_interpolated_beside_own_features():
    torch.manual_seed(0)
    layer = FeaturePropagation(4)
    coarse = torch.randn(2, 3, 4)
    fine = torch.randn(2, 7, 4)
    index = torch.randint(0, 3, (2, 7, 3))
    weight = torch.rand(2, 7, 3)
    out = layer(coarse, fine, index, weight)
    for b, n in np.ndindex(2, 7):
        near = weight[b, n] @ coarse[b, index[b, n]]
        expected = layer.norm(layer.mlp(torch.cat([near, fine[b, n]])))
        assert torch.allclose(out[b, n], expected, atol=1e-5)


# ---- 3 to 5 the three modules --------------------------------------------------------------------


def test_referents_pool_the_votes_that_fall_near_their_own():
    """The first seeds' votes are centers; one that nobody joins is its own group."""
    torch.manual_seed(0)
    part = IntraReferent(Config.tiny(feature=6, ball=0.5, ball_samples=3))
    f = torch.randn(2, 9, 6)
    p = 0.4 * torch.randn(2, 9, 3)
    h, v = part(f, p, 4)
    place, change = part.vote(f).split([3, 6], -1)
    assert torch.allclose(v, p + place)
    alone = 0
    for b, r in np.ndindex(2, 4):
        distance = (v[b] - v[b, r]).norm(dim=1)
        nearest = distance.argsort()[:3]
        group = nearest[distance[nearest] <= 0.5]
        alone += len(group) == 1
        g = slice(b, b + 1)
        expected = part.group((f + change)[g], v[g], v[g, r : r + 1], group[None, None])
        assert torch.allclose(h[b, r], expected[0, 0], atol=1e-4)
    assert 0 < alone < 8


def test_the_graph_layer_equals_dense_matrices():
    """A: each referent's k nearest, made symmetric, with self loops."""
    torch.manual_seed(0)
    part = InterReferentGraph(Config.tiny(feature=5, neighbors=3))
    h = torch.randn(2, 8, 5)
    q = torch.randn(2, 8, 3)
    out = part(h, q)
    for b in range(2):
        distance = (q[b, :, None] - q[b]).norm(dim=-1)
        A = torch.eye(8)
        for i in range(8):
            for j in distance[i].argsort()[1:4].tolist():
                A[i, j] = A[j, i] = 1
        D = torch.diag(A.sum(1).pow(-0.5))
        graph = D @ A @ D
        assert torch.allclose(neighbor_graph(q, 3)[b], graph, atol=1e-6)
        expected = h[b]
        for norm, layer in zip(part.norms, part.layers, strict=True):
            expected = expected + torch.relu(graph @ norm(expected) @ layer.weight.T)
        assert torch.allclose(out[b], expected, atol=1e-5)


def test_referents_at_one_place_are_still_linked_with_themselves():
    graph = neighbor_graph(torch.zeros(1, 6, 3), 2)
    assert torch.equal(graph, graph.mT)
    assert (graph.diagonal(dim1=1, dim2=2) > 0).all()


def test_a_place_has_random_waves_that_half_precision_does_not_blur():
    """A linear map of the cosines and sines of random mixtures of x, y and z."""
    part = ReferentSceneAttention(Config.tiny(feature=8))
    x = 8 * torch.rand(1, 4, 3)
    phase = x @ part.frequencies
    features = torch.cat([phase.cos(), phase.sin()], -1)
    assert torch.allclose(part.code(x), part.position(features), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert (part.code(x) - part.position(features)).abs().max() < 0.05


def test_referents_attend_to_seeds_and_see_them_from_their_own_place():
    """Against softmax written out, per head."""
    torch.manual_seed(0)
    part = ReferentSceneAttention(Config.tiny(feature=6, context_heads=2, fourier=4))
    h = torch.randn(2, 3, 6)
    q = torch.randn(2, 3, 3)
    f = torch.randn(2, 5, 6)
    p = torch.randn(2, 5, 3)
    out = part(h, q, f, p)
    for b in range(2):
        query = part.query(part.norm(h[b]) + part.code(q[b]))
        seeds = part.norm_scene(f[b])
        key = part.key(seeds + part.code(p[b]))
        for r in range(3):
            value = part.value(seeds) + part.place(p[b] - q[b, r])
            seen = []
            for n in (slice(0, 3), slice(3, 6)):
                score = query[r, n] @ key[:, n].T / math.sqrt(3)
                seen.append(score.softmax(-1) @ value[:, n])
            x = h[b, r] + part.out(torch.cat(seen))
            expected = x + part.mlp(part.norm_mlp(x))
            assert torch.allclose(out[b, r], expected, atol=1e-4)


def test_concatenation_sets_neighbors_side_by_side():
    torch.manual_seed(0)
    part = Concatenation(Config.tiny(feature=4, neighbors=2))
    h = torch.randn(1, 5, 4)
    q = torch.randn(1, 5, 3)
    near = (q[0, 1] - q[0]).norm(dim=1).argsort()[:3]
    message = part.out(part.norm(h[0, near]).flatten())
    expected = h[0, 1] + torch.relu(message)
    assert torch.allclose(part(h, q)[0, 1], expected, atol=1e-6)


# ---- 6 what referents are taught -----------------------------------------------------------------


def test_the_detection_loss_of_the_truth_is_nearly_nothing_and_grows_with_each_fault():
    """Votes, boxes, names: each counts, of the background only its place."""
    words = nn.functional.one_hot(torch.arange(20), 32).float().mul(3)
    names = torch.tensor([2, 5, 6, 7, 11, 12])  # the first for what has no name, then categories, then colors
    torch.manual_seed(0)
    true = torch.rand(2, 6, 6) + 0.2
    named = torch.tensor([[[5, 12], [7, 11], [5, 11], [2, 2], [6, 12], [2, 2]]] * 2)
    on = named[..., 0] > 2
    perfect = {
        "boxes": true[:, :4],
        "votes": true[..., :3],
        "tokens": words[named].sum(2)[:, :4],
    }
    best, right = detection_loss(perfect, true, named, on, words, names)
    assert (right == 1).all()
    assert (best < 0.7).all(), "two names share what is told: log 2"

    def moved(key, row, columns, amount=1):
        values = perfect[key].clone()
        values[:, row, columns] += amount
        return detection_loss({**perfect, key: values}, true, named, on, words, names)[0]

    center = slice(0, 3)
    size = slice(3, 6)
    assert (moved("boxes", 0, center) > best + 0.1).all()
    assert (moved("boxes", 0, size) > best + 0.1).all()
    assert (moved("votes", 4, center) > best + 0.1).all()
    assert (moved("boxes", 3, center) > best + 0.02).all(), "a wall has a place"
    assert torch.equal(moved("boxes", 3, size, 5), best), "but no size"

    renamed = {**perfect, "tokens": perfect["tokens"].roll(1, 1)}
    loss, right = detection_loss(renamed, true, named, on, words, names)
    assert (loss > best + 0.1).all()
    assert (right == 0).all()
    loss, _ = detection_loss(perfect, true, named * 0 + 2, on & False, words, names)
    assert torch.isfinite(loss).all(), "where nothing is"


def test_seeds_are_told_what_they_lie_on(scenes):
    """Box and names of their object; of the background its own place."""
    model = make("spatial3dllm", stage=ENCODER)
    seen = model.see(scenes)
    true, named, on = model.seed_truth(scenes, seen["instances"], seen["places"])
    assert 0 < on.float().mean() < 1
    for b, scene in enumerate(scenes):
        things = {o.id: o for o in scene.objects}
        for m, i in enumerate(seen["instances"][b].tolist()):
            names = tuple(named[b, m].tolist())
            assert on[b, m] == (i in things)
            if i in things:
                o = things[i]
                assert names == data.name_pair(model.text, o.category, o.color)
                assert np.allclose(true[b, m], o.box, atol=1e-6)
            else:
                assert names == data.name_pair(model.text)
                assert torch.equal(true[b, m, :3], seen["places"][b, m])


# ---- 7 the model ---------------------------------------------------------------------------------


def test_boxes_and_votes_of_a_frozen_encoder_follow_a_turned_scene():
    plain = data.room(0, objects=9, views=0, points=300)
    model = make("spatial3dllm").eval()
    before = model.see([plain])
    center, size = before["boxes"].split(3, -1)
    for seed in range(4):
        turned = augment(plain, np.random.default_rng(seed))
        turn = torch.from_numpy(turned.turn).float()
        after = model.see([turned])
        expected = torch.cat([center @ turn.T, size @ turn.abs().T], -1)
        assert torch.allclose(after["boxes"], expected, atol=1e-5)
        assert torch.allclose(after["votes"], before["votes"] @ turn.T, atol=1e-5)


def test_small_and_bare_clouds_share_a_batch_and_change_nothing_for_others(scenes):
    """Fewer points than are read; no colors, normals or objects."""
    keys = ("points", "colors", "normals", "instances")
    few = replace(scenes[1], name="few", **{k: getattr(scenes[1], k)[::3] for k in keys})
    bare = replace(scenes[0], name="bare", colors=None, normals=None, instances=None)
    batch = [scenes[0], few, bare]
    model = make("spatial3dllm", stage=ENCODER).eval()
    together = model.see(batch)
    for i, scene in enumerate(batch):
        for key, own in model.see([scene]).items():
            assert torch.isfinite(own).all()
            assert torch.allclose(together[key][i], own[0], atol=1e-5)


def test_lora_stands_beside_attention_and_referents_are_as_loud_as_words(tmp_path):
    model = make("spatial3dllm", papers.save_llm("spatial3dllm", tmp_path))
    adapted = {name.split(".")[-4] for name in model.llm.state_dict() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    loud = model.embeddings.detach().square().mean().sqrt()
    assert torch.allclose(model.projector[-1].weight, loud)


def test_a_marked_object_is_written_as_its_box(scenes):
    thing = scenes[0].objects[0]
    sample = data.Sample("", scenes[0].name, "id_category", f"what is {data.mark(thing)}?", "chair")
    written = make("spatial3dllm").write_marks(scenes[0], sample)
    assert written.question == f"what is {data.listed(thing.box)}?"
