"""Spatial 3D-LLM: every part against a slow and obvious version, and what the whole model promises.

MODLE, its questions and its text locations have a file of their own, test_modle.py."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import full_rows
import numpy as np
import pytest
import torch
from shapes import wrong_shapes
from test_text import save_tokenizer
from torch import nn

import data
import spatial3dllm
from data import DataError, HubText, Stage, TinyText, augment, questions, room
from spatial3dllm import (
    INTER,
    STAGES,
    Abstraction,
    Concatenation,
    Config,
    Context,
    FeaturePropagation,
    FourierPosition,
    Graph,
    LocationCode,
    Model,
    SetAbstraction,
    ball_query,
    build_llm,
    detection_loss,
    gather,
    gather_max,
    interpolation,
    neighbour_graph,
    recipe,
    sample_order,
    waves,
)

SMALL = dict(width=32, heads=4, hidden=64, feature=16, points=300, centres=(64, 32, 16, 8), samples=(8, 8, 8, 8),
             referents=12, fourier=8, context_heads=2, ball=3.0)  # fmt: skip
ENCODER = Stage("encoder", {}, ("encoder", "scene"), "encoder")
SYMBOLS = Stage("symbols", {}, ("code", "lm"), "symbols", steps=True)
REFERENTS = Stage("referents", {}, ("scene", "code", "lm"), "referents", steps=True)
MIX = {"modle_distance": 2, "modle_move": 2, "ground": 1, "colour": 1, "id_category": 1}


@pytest.fixture(scope="module", autouse=True)
def tasks():
    """The trainer adds a paper's own tasks to the shared ones; so does this file."""
    data.adopt(spatial3dllm)


@pytest.fixture(scope="module")
def text():
    return TinyText(data.vocabulary())


@pytest.fixture(scope="module")
def scenes():
    """Three rooms with different numbers of objects, mirrored or transposed."""
    rng = np.random.default_rng(0)
    found = [augment(room(s, objects=n, views=0, points=300), rng) for s, n in ((0, 9), (1, 12), (2, 7))]
    assert len({s.turn.tobytes() for s in found}) > 1
    return found


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder with a small Llama and a tokenizer, as a pre-trained model lies on disk."""
    folder = tmp_path_factory.mktemp("llama")
    name = save_tokenizer(folder)
    torch.manual_seed(0)
    llm = build_llm(Config.tiny(**SMALL), len(HubText(name)))
    for p in llm.model.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=2 * p.shape[1] ** -0.5)
    llm.save_pretrained(folder)
    return SimpleNamespace(name=name, weights={k: v.clone() for k, v in llm.state_dict().items()})


def make(text, seed=0, **changes):
    torch.manual_seed(seed)
    return Model(Config.tiny(**{**SMALL, **changes}), text)


def load(hub, **changes):
    torch.manual_seed(0)
    small = {k: v for k, v in SMALL.items() if k not in ("width", "heads", "hidden")}
    return Model(Config(llm=hub.name, lora_rank=4, **small, **changes), HubText(hub.name))


def asked(scenes, count=3, mix=MIX):
    rng = np.random.default_rng(0)
    return [(s, questions(s, mix, count, rng)) for s in scenes]


def random_points(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)


# ---- 1 geometry ------------------------------------------------------------------------------------------------------


def test_the_farthest_order_equals_a_loop_and_its_prefixes_are_orders_of_their_own():
    """One order serves all levels, so a prefix must be what sampling fewer gives, and sampling the sample must not
    change it."""
    points = random_points(40)
    chosen = [int(np.linalg.norm(points - points.mean(0), axis=1).argmax())]
    while len(chosen) < 15:
        chosen.append(int(np.argmax([min(np.linalg.norm(p - points[j]) for j in chosen) for p in points])))
    order = sample_order(points, 15)
    assert order.tolist() == chosen
    assert sample_order(points, 6).tolist() == chosen[:6]
    assert sample_order(points[:4], 10).tolist() == np.resize(sample_order(points[:4], 4), 10).tolist()


def test_a_ball_holds_the_nearest_points_within_its_radius():
    """Places left over repeat the nearest, which a maximum does not feel; also with fewer points than places."""
    points, centres = random_points(30), random_points(30)[:7]
    for samples in (4, 50):
        index = ball_query(centres, points, 0.8, samples)
        assert index.shape == (7, samples)
        for q, row in zip(centres, index, strict=True):
            far = np.linalg.norm(points - q, axis=1)
            inside = [j for j in np.argsort(far, kind="stable") if far[j] <= 0.8][:samples]
            assert list(dict.fromkeys(row.tolist())) == inside
            assert all(j == row[0] for j in row[len(inside) :])


def test_features_are_carried_to_finer_points_by_inverse_distance():
    """A point that is a coarse one itself takes its value; where there are only two, the nearest is also the third."""
    coarse, fine = random_points(6), np.concatenate([random_points(5, 1), random_points(6)[2:3]])
    index, weight = interpolation(fine, coarse)
    for p, row, w in zip(fine, index, weight, strict=True):
        far = np.linalg.norm(coarse - p, axis=1)
        assert row.tolist() == np.argsort(far)[:3].tolist()
        assert w == pytest.approx((1 / (far[row] + 1e-8)) / (1 / (far[row] + 1e-8)).sum(), rel=1e-4)
    assert weight[-1] == pytest.approx([1, 0, 0], abs=1e-5)
    assert interpolation(fine, coarse[:2])[0].shape == (6, 3)


# ---- 2 encoder -------------------------------------------------------------------------------------------------------


def test_gathering_equals_indexing():
    """Scenes of a batch never mix."""
    values, index = torch.randn(2, 5, 3), torch.randint(0, 5, (2, 4, 6))
    taken = gather(values, index)
    assert taken.shape == (2, 4, 6, 3)
    assert all(torch.equal(taken[b], values[b][index[b]]) for b in range(2))
    assert torch.equal(gather_max(values, index), taken.amax(2))


@pytest.mark.parametrize("pairs", [0, 2])
def test_set_abstraction_equals_a_loop_over_balls(pairs):
    """The MLP of every pair, then the maximum; with `pairs` = 0 the layers after the first follow the maximum, which
    for that first, linear, layer is the same as seeing every pair."""
    torch.manual_seed(0)
    B, N, M, S, inputs, hidden, outputs = 2, 11, 4, 3, 5, 6, 7
    layer = SetAbstraction(inputs, hidden, outputs, 0.5, pairs)
    f, index = torch.randn(B, N, inputs), torch.randint(0, N, (B, M, S))
    p, q = torch.randn(B, N, 3), torch.randn(B, M, 3)
    out = layer(f, p, q, index)
    assert out.shape == (B, M, outputs)
    for b in range(B):
        for m in range(M):
            rows = []
            for j in index[b, m].tolist():
                h = layer.feature(f[b, j]) + layer.place((p[b, j] - q[b, m]) / 0.5)
                rows.append(layer.pairs(h) if pairs else h)
            assert torch.allclose(out[b, m], layer.out(torch.stack(rows).amax(0)), atol=1e-5)


def test_feature_propagation_equals_a_loop():
    """Interpolated coarse features beside the fine ones, all axes different."""
    torch.manual_seed(0)
    layer = FeaturePropagation(4, 6, 5)
    coarse, fine, index = torch.randn(2, 3, 4), torch.randn(2, 7, 6), torch.randint(0, 3, (2, 7, 3))
    weight = torch.rand(2, 7, 3)
    out = layer(coarse, fine, index, weight)
    assert out.shape == (2, 7, 5)
    for b in range(2):
        for n in range(7):
            spread = sum(weight[b, n, i] * coarse[b, index[b, n, i]] for i in range(3))
            assert torch.allclose(out[b, n], layer.norm(layer.mlp(torch.cat([spread, fine[b, n]]))), atol=1e-5)


def test_every_shape_column_with_all_axes_different(text, scenes):
    """B 3, N 300, M 32 of 64, R 12, S 8, C 16, D 32."""
    model = make(text)
    model.configure_stage(ENCODER)
    clouds = [model.cloud(s) for s in scenes]
    f, p = model.encode_clouds(clouds, torch.eye(3).expand(3, 3, 3))
    assert f.shape == (3, 32, 16) and p.shape == (3, 32, 3)
    h, v = model.intra(f, p, 12)
    assert h.shape == (3, 12, 16) and v.shape == (3, 32, 3)
    assert all(part(h, v[:, :12]).shape == (3, 12, 16) for part in model.inter.values())
    assert model.context(h, v[:, :12], f, p).shape == (3, 12, 16)
    assert FourierPosition(8, 16)(p).shape == (3, 32, 16)
    assert LocationCode(20)(torch.rand(3, 12, 6)).shape == (3, 12, 20)
    h, boxes, votes = model.referents(f, p)
    assert h.shape == (3, 12, 16) and boxes.shape == (3, 12, 6) and votes.shape == (3, 32, 3)
    assert (boxes[..., 3:] > 0).all()
    for stage, K in ((SYMBOLS, 12), (REFERENTS, 12)):
        model.configure_stage(stage)
        z, valid = model.encode(scenes)
        assert z.shape == (3, K, 32) and valid.shape == (3, K)
    model.configure_stage(SYMBOLS)
    assert model.encode(scenes)[1].sum(1).tolist() == [9, 12, 7]


def test_every_shape_in_a_comment_is_true_with_all_axes_different(text, hub, scenes):
    """Statement by statement (`shapes.wrong_shapes`): N 300, M 64, 31, 18, 8, R 13, P 7, C 20, D 32."""
    odd = dict(centres=(64, 31, 18, 8), feature=20, samples=(7,) * 4, ball_samples=7, neighbours=5, context_heads=4,
               referents=13)  # fmt: skip

    def run():
        for change in ({}, {"pairs": 1}, {"inter": "concat"}, {"locations": "metres"}):
            model = make(text, **odd, **change)
            for stage in (ENCODER, SYMBOLS, REFERENTS):
                model.configure_stage(stage)
                model.cache_features(scenes)
                model(model.batch(asked(scenes) if stage is not ENCODER else [(s, []) for s in scenes]))
        model.generate(model.batch(asked(scenes, 4)), 1)
        model.told(scenes[0])

    assert wrong_shapes(spatial3dllm, run, ({"B", "S"}, {"R", "K"})) == []


# ---- 3 to 5 the three modules ----------------------------------------------------------------------------------------


def test_abstraction_equals_a_loop_over_votes():
    """Votes move, referents are the first seeds, groups are the nearest votes within the ball of a referent's own, and
    one that nobody joins is its own group."""
    torch.manual_seed(0)
    part = Abstraction(Config.tiny(feature=6, ball=0.5, ball_samples=3))
    f, p = torch.randn(2, 9, 6), 0.4 * torch.randn(2, 9, 3)
    h, v = part(f, p, 4)
    moved = part.vote(f)
    assert torch.allclose(v, p + moved[..., :3])
    alone = 0
    for b in range(2):
        for r in range(4):
            far = (v[b] - v[b, r]).norm(dim=1)
            group = [j for j in far.argsort().tolist()[:3] if far[j] <= 0.5]
            alone += group == [r]
            rows = [part.feature((f + moved[..., 3:])[b, j]) + part.place((v[b, j] - v[b, r]) / 0.5) for j in group]
            assert torch.allclose(h[b, r], part.out(torch.stack(rows).amax(0)), atol=1e-4)
    assert 0 < alone < 8


def test_the_graph_layer_equals_dense_matrices():
    """A: each referent's k nearest, made symmetric, with self loops; H + ReLU(D^-1/2 A D^-1/2 LN(H) W), twice."""
    torch.manual_seed(0)
    part = Graph(Config.tiny(feature=5, neighbours=3))
    h, centres = torch.randn(2, 8, 5), torch.randn(2, 8, 3)
    out = part(h, centres)
    for b in range(2):
        far = (centres[b, :, None] - centres[b, None]).norm(dim=-1)
        A = torch.eye(8)
        for i in range(8):
            for j in far[i].argsort()[1:4].tolist():
                A[i, j] = A[j, i] = 1
        D = torch.diag(A.sum(1).pow(-0.5))
        assert torch.allclose(neighbour_graph(centres, 3)[b], D @ A @ D, atol=1e-6)
        expected = h[b]
        for norm, layer in zip(part.norms, part.layers, strict=True):
            expected = expected + torch.relu(D @ A @ D @ norm(expected) @ layer.weight.T)
        assert torch.allclose(out[b], expected, atol=1e-5)


def test_the_graph_takes_fewer_referents_than_neighbours_and_twins():
    """Two referents at one place: either may come first among the nearest; the graph stays symmetric and finite."""
    graph = neighbour_graph(torch.zeros(1, 4, 3), 10)
    assert torch.allclose(graph, torch.full((1, 4, 4), 0.25))


def test_context_is_cross_attention_seen_from_the_own_place():
    """Against softmax written out, per head; moving the whole scene does not change it but through the positions."""
    torch.manual_seed(0)
    part = Context(Config.tiny(feature=6, context_heads=2, fourier=4))
    h, q, f, p = torch.randn(2, 3, 6), torch.randn(2, 3, 3), torch.randn(2, 5, 6), torch.randn(2, 5, 3)
    out = part(h, q, f, p)
    for b in range(2):
        query = part.query(part.norm(h[b]) + part.position(q[b]))
        s = part.norm_scene(f[b])
        key, value = part.key(s + part.position(p[b])), part.value(s)
        for r in range(3):
            seen = []
            for n in (slice(0, 3), slice(3, 6)):
                weight = (query[r, n] @ key[:, n].T / math.sqrt(3)).softmax(-1)
                seen.append(weight @ (value + part.place(p[b] - q[b, r]))[:, n])
            x = h[b, r] + part.out(torch.cat(seen))
            assert torch.allclose(out[b, r], x + part.mlp(part.norm_mlp(x)), atol=1e-4)


def test_concatenation_sets_neighbours_side_by_side():
    """The ablation's rival of the graph; with fewer referents than places the nearest come again."""
    torch.manual_seed(0)
    part = Concatenation(Config.tiny(feature=4, neighbours=2))
    h, centres = torch.randn(1, 5, 4), torch.randn(1, 5, 3)
    near = (centres[0, 1] - centres[0]).norm(dim=1).argsort()[:3]
    expected = h[0, 1] + torch.relu(part.out(part.norm(h[0, near]).flatten()))
    assert torch.allclose(part(h, centres)[0, 1], expected, atol=1e-6)
    assert part(h[:, :2], centres[:, :2]).shape == (1, 2, 4)


def test_number_tokens_start_as_the_code_of_their_value(text):
    """Reading a coordinate is then the same copy as reading a name: the token of x = 1.25 is nearest, of all x tokens,
    to the code of a box at x = 1.25; so for all six numbers."""
    model = make(text, width=128)
    table = model.embeddings.detach()
    for axis, value in zip("xyzwdh", (1.25, -2.0, 0.75, 1.5, 0.5, 2.0), strict=True):
        own = {t: v for t, (a, v) in text.number.items() if a == axis}
        part = model.code.out.weight.view(128, 6, -1)[:, "xyzwdh".index(axis)] @ waves(torch.tensor(value))
        near = max(own, key=lambda t: float(table[t] @ part))
        assert abs(own[near] - value) <= 0.125


def test_the_detection_loss_of_the_truth_is_nearly_nothing_and_grows_with_each_fault():
    """Votes, boxes, names: each counts, of the background only its place, and a scene without objects is no fault."""
    words = nn.functional.one_hot(torch.arange(8), 16).float().mul(3).split((5, 3))
    true = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0)) + 0.2
    named = torch.tensor([[[1, 2], [3, 1], [1, 1], [0, 0], [2, 2], [0, 0]]] * 2)
    on = named[..., 0] > 0
    features = (words[0][named[..., 0]] + words[1][named[..., 1]])[:, :4]
    truth = dict(true=true, named=named, on=on, words=words)
    perfect = dict(boxes=true[:, :4], votes=true[..., :3], features=features, **truth)
    best, right = detection_loss(**perfect)
    assert right == 1 and best < 0.01
    far, big, votes, nowhere = true[:, :4].clone(), true[:, :4].clone(), true[..., :3].clone(), true[:, :4].clone()
    far[:, 0, :3] += 1
    big[:, 0, 3:] *= 3
    votes[:, 4] += 1
    for change in (dict(boxes=far), dict(boxes=big), dict(votes=votes), dict(features=features.roll(1, 1))):
        assert detection_loss(**{**perfect, **change})[0] > best + 0.1
    assert detection_loss(**{**perfect, "features": features.roll(1, 1)})[1] == 0
    nowhere[:, 3, 3:] *= 5
    assert detection_loss(**{**perfect, "boxes": nowhere})[0] == best  # walls have no size, but they stay in place
    nowhere[:, 3, :3] += 1
    assert detection_loss(**{**perfect, "boxes": nowhere})[0] > best + 0.02
    assert torch.isfinite(detection_loss(**{**perfect, "named": named * 0, "on": on & False})[0])


# ---- the whole model -------------------------------------------------------------------------------------------------


def told(model, groups):
    """Logits of the answer tokens of every question."""
    model.eval()
    seen = []
    with torch.no_grad():
        for b in (model.batch([g]) for g in groups):
            tokens, valid = model.encode(b["scenes"])
            how = {"attention_mask": data.packed_mask(b["block"]), "position_ids": b["positions"], "use_cache": False}
            hidden = model.llm.model(inputs_embeds=model.embed(b["ids"], tokens, valid), **how)
            seen.append(model.llm.lm_head(hidden.last_hidden_state[b["labels"] != data.IGNORE]))
    return seen


def test_the_order_of_the_points_changes_nothing(text, scenes):
    """Seeds, referents and boxes, to 1e-5: a cloud has no order."""
    scene = scenes[0]
    order = np.random.default_rng(1).permutation(len(scene.points))
    arrays = {k: getattr(scene, k)[order] for k in ("points", "colours", "normals", "instances")}
    for stage in (ENCODER, REFERENTS):
        results = []
        for s in (scene, replace(scene, name="shuffled", **arrays)):
            model = make(text)
            model.configure_stage(stage)
            results.append(model.see([s]))
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a.double(), b.double(), atol=1e-5)


def test_batch_companions_and_padding_change_nothing(text, scenes):
    """Clouds of different sizes share a batch, and so do questions of different lengths."""
    few = replace(scenes[1], name="few", **{k: getattr(scenes[1], k)[::3] for k in
                                            ("points", "colours", "normals", "instances")})  # fmt: skip
    model = make(text)
    model.configure_stage(ENCODER)
    together = model.see([scenes[0], few, scenes[2]])
    for i, scene in enumerate([scenes[0], few, scenes[2]]):
        for whole, alone in zip(together, model.see([scene]), strict=True):
            assert torch.allclose(whole[i : i + 1].double(), alone.double(), atol=1e-5)
    for stage in (SYMBOLS, REFERENTS):
        model.configure_stage(stage)
        model.config.teach = 0.0  # its mean is over the batch
        groups = asked(scenes)
        alone = [float(model(model.batch([(s, [q])]))["loss"].detach()) for s, qs in groups for q in qs]
        assert float(model(model.batch(groups))["loss"].detach()) == pytest.approx(sum(alone), rel=1e-4)


def test_cached_seeds_follow_a_turned_scene(text, scenes):
    """A frozen encoder saw the scene once; boxes and votes of its mirrored and transposed copies are turned with it."""
    base = replace(scenes[0], name="base", points=scenes[0].points @ scenes[0].turn.astype(np.float32),
                   normals=scenes[0].normals @ scenes[0].turn.astype(np.float32), turn=np.eye(3))  # fmt: skip
    model = make(text)
    model.configure_stage(REFERENTS)
    _, boxes, votes, *_ = model.see([base])
    for seed in range(4):
        turned = augment(base, np.random.default_rng(seed))
        _, b, v, *_ = model.see([turned])
        turn = torch.from_numpy(turned.turn).float()
        assert torch.allclose(b[..., :3], boxes[..., :3] @ turn.T, atol=1e-5)
        assert torch.allclose(b[..., 3:], boxes[..., 3:] @ turn.abs().T, atol=1e-5)
        assert torch.allclose(v, votes @ turn.T, atol=1e-5)


STAGE_CASES = [(s, False) for s in STAGES["tiny"]] + [(s, loaded) for s in STAGES["paper"] for loaded in (False, True)]


@pytest.mark.parametrize(("stage", "loaded"), STAGE_CASES, ids=lambda v: v.name if isinstance(v, Stage) else str(v))
@pytest.mark.parametrize("change", [{}, dict(intra=False, inter="off", context=False), dict(positions=False)], ids=str)
def test_gradients_reach_all_that_trains_and_nothing_frozen(text, hub, scenes, stage, loaded, change):
    """With every switch of the ablations; of a loaded model LoRA trains and its own weights rest."""
    model = load(hub, **change) if loaded else make(text, **change)
    model.configure_stage(stage)
    model.cache_features(scenes)
    out = model(model.batch(asked(scenes, 6, stage.tasks) if stage.tasks else [(s, []) for s in scenes]))
    (out["loss"] / out["weight"]).backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained
    whole = not loaded and "lm" in stage.trains
    assert trained and all("lora_" in n for n in trained if n.startswith("llm.")) is not whole
    silent = [n for n in trained if not model.get_parameter(n).grad.abs().max() > 0 and "lora_A" not in n
              and (model.config.positions or n != "context.place.weight")]
    assert not silent, silent


def test_the_language_model_on_disk_loads_with_every_weight(hub, scenes):
    """Config(llm=...) takes a Llama as it lies there; only LoRA is added, and as yet it changes nothing."""
    model = load(hub)
    now = {k.replace(".base_layer", ""): v for k, v in model.llm.state_dict().items() if "lora_" not in k}
    assert now.keys() == hub.weights.keys() and all(torch.equal(now[k], v) for k, v in hub.weights.items())
    adapted = {k.split(".")[-4] for k in model.llm.state_dict() if "lora_A" in k}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    model.configure_stage(REFERENTS)
    model.cache_features(scenes)
    z, _ = model.encode(scenes)
    loud = float(model.embeddings.square().mean().sqrt())
    assert 0.5 * loud < float(z.square().mean().sqrt()) < 2.5 * loud
    assert len(model.generate(model.batch(asked(scenes, 2)), 4)) == 6


@pytest.mark.parametrize("stage", STAGES["paper"], ids=lambda s: s.name)
def test_half_precision_changes_the_loss_by_a_rounding(hub, scenes, stage):
    """Weights in bfloat16, as a paper run loads them, and autocast, as the trainer runs them: points, features and
    words of different types meet in one token."""
    losses = []
    for dtype, auto in (("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True)):
        model = load(hub, dtype=dtype)
        model.configure_stage(stage)
        model.cache_features(scenes)
        with torch.autocast("cpu", torch.bfloat16, enabled=auto):
            batch = model.batch(asked(scenes, 3, stage.tasks) if stage.tasks else [(s, []) for s in scenes])
            out = model(batch)
            out["loss"].backward()
            losses.append(float(out["loss"].detach()))
            if stage.tasks:
                assert len(model.generate(batch, 1)) == 9
    assert losses[1:] == pytest.approx(losses[:1] * 3, rel=0.02) and len(set(losses)) > 1


def test_boxes_as_integers_are_written_and_read_back(hub, scenes, monkeypatch):
    """The grid form: what the model reads holds integers, what it answers is metres again; the tiny tokenizer has no
    such tokens and says so."""
    model = load(hub, locations="grid")
    model.configure_stage(replace(REFERENTS, steps=False))
    scene = scenes[0]
    sample = data.question_set([scene], ["ground"], 1, 0)[0]
    batch = model.batch([(scene, [sample])])
    written = model.text.decode([i for i in batch["labels"][0].tolist() if i != data.IGNORE])
    low, span = scene.bounds[0], scene.bounds[1] - scene.bounds[0]
    box = scene.thing(sample.targets[0]).box
    expected = np.round((box - [*low, 0, 0, 0]) / np.tile(span, 2) * 255)
    assert np.abs(np.array(json.loads(written)) - expected).max() <= 1
    monkeypatch.setattr(data, "answer", lambda *_: [written])
    assert np.abs(data.tuples(model.generate(batch)[0], 6)[0] - box).max() < 0.03
    with pytest.raises(DataError, match="tiny tokenizer has metres only"):
        Model(Config.tiny(**SMALL, locations="grid"), TinyText([]))


def test_generation_is_step_by_step_argmax(text, scenes):
    """Scenes and questions of different lengths in one batch, against the whole row again per token."""
    model = make(text)
    full_rows.vary(model.llm.model)
    for stage in (SYMBOLS, REFERENTS):
        model.configure_stage(stage)
        groups, expected = asked(scenes), []
        for scene, sample in ((s, q) for s, qs in groups for q in qs):
            batch = model.batch([(scene, [sample])])
            tokens, valid = model.encode([scene])
            start = int((batch["labels"][0] != data.IGNORE).nonzero()[0]) + 1
            ids = batch["ids"][0, :start].tolist()
            while len(ids) < start + 9 and text.eos not in ids[start:]:
                out = model.llm.model(inputs_embeds=model.embed(torch.tensor([ids]), tokens, valid), use_cache=False)
                ids.append(int(model.llm.lm_head(out.last_hidden_state[0, -1]).argmax()))
            expected.append(text.decode(ids[start:]))
        assert len(set(expected)) > 5
        assert model.generate(model.batch(groups), max_new_tokens=9) == expected


@pytest.mark.parametrize("loaded", [False, True], ids=["tiny", "loaded"])
def test_ten_questions_about_a_scene_are_answered_as_each_alone(text, hub, scenes, loaded):
    """The scene's tokens go through the language model once, and are found again in the next call, unchanged."""
    model = load(hub).eval() if loaded else make(text)
    if not loaded:
        full_rows.vary(model.llm.model)
    model.configure_stage(SYMBOLS)
    full_rows.compare(model, [*asked(scenes[:1], 10), *asked(scenes[1:2], 1), *asked(scenes[2:])])


def test_answers_depend_on_the_scene_and_on_positions(text, scenes):
    """The same question about another scene has other logits; without positions, moving everything changes nothing."""
    (_, samples), *_ = asked(scenes, 2, {"modle_distance": 1})
    for positions in (True, False):
        model = make(text, positions=positions)
        model.configure_stage(SYMBOLS)
        moved = replace(scenes[0], objects=[replace(o, box=o.box + np.eye(6)[0]) for o in scenes[0].objects])
        here, there = (told(model, [(s, samples)])[0] for s in (scenes[0], moved))
        assert torch.allclose(here, there, atol=1e-4) is not positions
    model.configure_stage(REFERENTS)
    model.cache_features(scenes)
    assert not torch.allclose(*(told(model, [(s, samples)])[0] for s in scenes[:2]), atol=1e-3)


@pytest.mark.parametrize("change", [dict(intra=False), dict(inter="off"), dict(inter="concat"), dict(context=False),
                                    dict(positions=False)], ids=str)  # fmt: skip
def test_every_switch_of_the_ablations_runs_and_changes_the_tokens(text, scenes, change):
    """All variants hold the same parameters, so that they can start from the same run."""
    default, model = make(text), make(text, **change)
    assert [(n, p.shape) for n, p in default.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]
    for m in (default, model):
        m.configure_stage(REFERENTS)
        m.prepare(scenes)
    assert not torch.allclose(default.encode(scenes)[0], model.encode(scenes)[0], atol=1e-4)
    batch = model.batch(asked(scenes[:2]))
    assert torch.isfinite(model(batch)["loss"]) and len(model.generate(batch, 2)) == 6


def test_an_unknown_part_or_form_is_refused_with_the_known_ones(text):
    with pytest.raises(DataError, match="graph, concat, off"):
        make(text, inter="gcn")
    with pytest.raises(DataError, match="metres, grid"):
        make(text, locations="feet")
    assert list(INTER) == ["graph", "concat", "off"]


# ---- files -----------------------------------------------------------------------------------------------------------


def test_an_encoder_file_gives_the_same_seeds_in_another_model(text, scenes, tmp_path):
    """Weights and the settings they belong to; a loaded encoder is frozen from the start."""
    first = make(text, seed=1)
    first.save_encoder(tmp_path / "encoder.safetensors")
    second = make(text, seed=2, encoder=str(tmp_path / "encoder.safetensors"))
    for model in (first, second):
        model.configure_stage(REFERENTS)
    a, b = (m.load_features(scenes[0]) for m in (first, second))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert first.cache_key() == second.cache_key() != make(text, seed=3).cache_key()
    stages = recipe(second.config, STAGES["tiny"])
    assert [s.trains for s in stages if s.scene_input == "encoder"] == [("scene",)]
    assert recipe(first.config, STAGES["tiny"]) == STAGES["tiny"]


def test_a_wrong_encoder_file_is_refused_in_one_line(text, tmp_path):
    make(text).save_encoder(tmp_path / "small.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "small.safetensors").read_bytes()[:100])
    with pytest.raises(DataError, match=r"small.safetensors: an encoder with .*64.*these settings are .*48"):
        make(text, centres=(48, 32, 16, 8), encoder=str(tmp_path / "small.safetensors"))
    for name in ("cut", "absent"):
        with pytest.raises(DataError, match=rf"{name}.safetensors: no readable .*python spatial3dllm.py encoder"):
            make(text, encoder=str(tmp_path / f"{name}.safetensors"))


def test_cached_seeds_are_read_back_equal_and_shared_by_ranks(text, scenes, tmp_path, monkeypatch):
    """Another process reads what the first one wrote; rank r computes scenes r, r + world, ..."""
    first, second = make(text), make(text)
    for model in (first, second):
        model.configure_stage(REFERENTS)
    first.prepare(scenes, tmp_path, rank=1, world=2)
    assert [p.stem for p in tmp_path.rglob("*.npz")] == [scenes[1].name]
    first.prepare(scenes, tmp_path)
    monkeypatch.setattr(second, "encode_clouds", lambda *_: pytest.fail("computed again"))
    second.prepare(scenes, tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(first.see(scenes), second.see(scenes), strict=True))


def test_a_scene_without_points_is_refused(text, scenes):
    model = make(text)
    model.configure_stage(REFERENTS)
    with pytest.raises(DataError, match="has no points"):
        model.cache_features([replace(scenes[0], name="bare", points=None)])


def test_one_point_and_bare_clouds_are_read(text, scenes):
    """A cloud without colours or normals, and one of a single point, give finite referents."""
    model = make(text)
    model.configure_stage(REFERENTS)
    bare = replace(scenes[0], name="bare", colours=None, normals=None, instances=None)
    one = replace(bare, name="one", points=scenes[0].points[:1])
    for seen in model.see([bare, one]):
        assert torch.isfinite(seen).all()


def test_a_question_that_names_several_things_is_refused(text):
    """On a scene of one's own, by what is known of it; a fuller description of the same words is not."""
    box = lambda x: np.array([x, 0, 0.5, 0.5, 0.5, 1.0])  # noqa: E731
    things = [data.Thing(1, "chair", "red", box(0)), data.Thing(2, "chair", "blue", box(2)),
              data.Thing(3, "bed", "red", box(4))]  # fmt: skip
    scene = data.Scene("hand", "ply", things)
    refused = Model.refusal(scene, "How far is the chair from the bed?")
    assert refused == "more than one thing fits. 2 chairs are here."
    assert Model.refusal(scene, "How far is the red chair from the bed?") is None
    assert Model.refusal(scene, "move the red thing 1 metre") == "more than one thing fits. 2 red things are here."


def test_of_overlapping_boxes_the_surest_is_kept():
    """Against the definition, pair by pair: each that is left out overlaps a surer one that is kept."""
    rng = np.random.default_rng(0)
    boxes, sure = np.concatenate([rng.uniform(0, 2, (30, 3)), rng.uniform(0.3, 1, (30, 3))], 1), rng.uniform(0, 1, 30)
    sure[:3] = 0
    kept = spatial3dllm.surest(boxes, sure)
    near = (data.box_iou(boxes, boxes) > 0.25) | (np.linalg.norm(boxes[:, None, :3] - boxes[:, :3], axis=-1) < 0.3)
    assert 3 < len(kept) < 27 and (np.diff(sure[kept]) < 0).all()
    assert near[np.ix_(kept, kept)].sum() == len(kept), "each is near itself alone"
    for i in set(range(30)) - set(kept):
        assert sure[i] == 0 or any(near[i, j] and sure[j] > sure[i] for j in kept)


def test_pictures_show_answers_and_referents(text, scenes, tmp_path):
    """Two files a scene, none blank; referents name categories or nothing."""
    from PIL import Image

    model = make(text)
    paths = model.pictures(scenes, tmp_path, 1)
    assert [p.name for p in paths] == [f"{scenes[0].name}.png", f"{scenes[0].name}_referents.png"]
    assert all(len(Image.open(p).convert("RGB").getcolors(1 << 24)) > 1000 for p in paths)
    said = model.told(scenes[0])
    assert len(said["box"]) == len(said["name"]) == model.config.referents and (said["sure"] > 0).all()
    assert set(said["name"]) <= {"", *data.CATEGORIES} and said["seed"].shape == said["vote"].shape


def test_a_loaded_model_is_no_part_of_the_checkpoint(hub):
    """LoRA and the scene's modules are; seven billion weights stay where they were loaded from."""
    names = data.named_weights(load(hub)).keys()
    assert {n.split(".")[0] for n in names} >= {"encoder", "intra", "inter", "context", "projector", "llm"}
    assert all("lora_" in n for n in names if n.startswith("llm."))


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "says"), [
    (["encoder"], "--run, --out"),
    (["modle", "--root", "nowhere"], "--out"),
    (["modle", "--root", "nowhere", "--out", "x", "--per-scene", "0"], "--per-scene 0: give at least 1"),
    (["modl"], "command 'modl' is unknown: choose one of modle, encoder"),
    (["--scene", "nowhere", "--ask", "?"], "--run"),
])  # fmt: skip
def test_a_command_that_lacks_something_says_so_in_one_line(arguments, says, capsys):
    assert spatial3dllm.main(arguments) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
