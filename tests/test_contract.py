"""What every paper promises to trainer and evaluator: one test per claim, for three papers, from nothing and loaded."""

from dataclasses import replace

import numpy as np
import papers
import pytest
import torch
from papers import PAPERS, answer_logits, make, questions_of

import data
from data import IGNORE

MIX = {"id_category": 2, "id_color": 1, "count": 1, "what": 1}  # questions with and without a marked object


@pytest.fixture(scope="module")
def scenes():
    """Three rooms with frames and points, of different numbers of objects, mirrored or transposed."""
    rng = np.random.default_rng(0)
    made = [data.room(seed, objects=n, views=4, size=48, points=700) for seed, n in ((0, 9), (1, 12), (4, 7))]
    turned = [data.augment(scene, rng) for scene in made]
    assert len({scene.turn.tobytes() for scene in turned}) > 1
    return turned


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small pre-trained language model on disk for each paper."""
    return {name: papers.save_llm(name, tmp_path_factory.mktemp(name)) for name in PAPERS}


@pytest.fixture(params=[(name, kind) for name in PAPERS for kind in ("tiny", "loaded")], ids="-".join)
def model(request, folders):
    """One model of each paper and kind, at its last stage."""
    name, kind = request.param
    found = make(name, folders[name] if kind == "loaded" else None)
    found.configure_stage(stages_of(name, kind)[-1])
    return found.eval()


def stages_of(name: str, kind: str) -> list[data.Stage]:
    paper = papers.paper_of(name)
    if kind == "tiny":
        return paper.recipe(paper.Config.tiny(), paper.STAGES["tiny"])
    return paper.recipe(paper.Config.paper(), paper.STAGES["paper"])


# ---- questions -------------------------------------------------------------------------------------------------------


def test_a_packed_question_gets_the_logits_it_has_alone(model, scenes):
    """Neighbours, companions and padding are not seen, and positions are those it would have alone."""
    groups = questions_of(scenes, MIX)
    packed, out = answer_logits(model, groups)
    alone = [answer_logits(model, [(scene, [q])]) for scene, samples in groups for q in samples]
    assert len(alone) == 9 and packed.std() > 0.01
    expected = torch.cat([logits for logits, _ in alone])
    assert torch.allclose(packed, expected, atol=2e-5 * float(packed.abs().max()))
    assert float(out["loss"]) == pytest.approx(sum(float(o["loss"]) for _, o in alone), rel=1e-5)
    assert int(out["weight"]) == len(packed)


def test_the_loss_is_the_summed_cross_entropy_of_the_answers(model, scenes):
    """With the number of its terms and of its hits: the trainer divides by the global number."""
    groups = questions_of(scenes, MIX)
    logits, out = answer_logits(model, groups)
    answers = [model.write_marks(scene, q).answer for scene, samples in groups for q in samples]
    target = [t for answer in answers for t in [*model.text.encode(answer), model.text.eos]]
    each = [-float(row.log_softmax(-1)[t]) for row, t in zip(logits, target, strict=True)]
    assert float(out["loss"]) == pytest.approx(sum(each), rel=1e-5) and int(out["weight"]) == len(target)
    assert int(out["correct"]) == sum(int(row.argmax()) == t for row, t in zip(logits, target, strict=True))


@torch.no_grad()
def answer_slowly(model, scene, sample, count):
    """Decode without a cache: the whole row again for every token, under a plain causal mask."""
    batch = model.batch([(scene, [sample])])
    seen = model.encode([scene])
    prompts = model.prompt_tokens(batch, seen)
    start = int((batch["labels"][0] != IGNORE).nonzero()[0]) + 1
    ids = batch["ids"][0, :start].tolist()
    while len(ids) < start + count and model.text.eos not in ids[start:]:
        T = len(ids)
        mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
        hidden = model.forward_llm(torch.tensor([ids]), torch.arange(T)[None], mask, seen, prompts)
        ids.append(int(model.llm.lm_head(hidden[0, -1]).argmax()))
    return model.text.decode(ids[start:])


def test_generation_is_step_by_step_argmax(model, scenes):
    """Scenes and questions of different lengths in one batch; a loaded generation config must not matter."""
    groups = questions_of(scenes, MIX)
    expected = [answer_slowly(model, scene, q, 9) for scene, samples in groups for q in samples]
    assert len(set(expected)) > 3
    assert model.generate(model.batch(groups), max_new_tokens=9) == expected
    one = (groups[2][0], groups[2][1][1:2])
    assert model.generate(model.batch([one]), max_new_tokens=9) == [expected[7]]


def test_a_scene_is_read_once_for_all_of_its_questions(model, scenes, monkeypatch):
    """Its tokens go through the language model in one forward, whatever the number of questions and answer tokens."""
    read = []
    forward_llm = model.forward_llm

    def count(ids, *rest):
        read.append(int((ids == data.SCENE).sum()))
        return forward_llm(ids, *rest)

    monkeypatch.setattr(model, "forward_llm", count)
    model.generate(model.batch(questions_of(scenes[:1], MIX, 10)), max_new_tokens=4)
    assert sum(read) == model.scene_length(scenes[0]) and read[0] == sum(read)


def test_answers_depend_on_the_scene(model, scenes):
    """Guards the tests above: the same words about another scene have other logits."""
    sample = data.Sample("q", "s", "count", "how many chairs are there?", "2")
    here, there = (answer_logits(model, [(scene, [sample])])[0] for scene in scenes[:2])
    assert not torch.allclose(here, there, atol=1e-3)


# ---- stages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPERS)
def test_scenes_add_up_in_every_stage_so_processes_may_share_them(name, scenes):
    """Loss, terms and right answers of a batch are the sums of its scenes' own."""
    model = make(name).train()
    for stage in stages_of(name, "tiny"):
        model.configure_stage(stage)
        model.cache_features(scenes)
        groups = [(scene, samples) for scene, samples in questions_of(scenes, MIX)]
        together = model(model.batch(groups))
        alone = [model(model.batch([group])) for group in groups]
        for key in ("loss", "weight", "correct"):
            total = sum(float(out[key]) for out in alone)
            assert float(together[key]) == pytest.approx(total, rel=2e-5, abs=1e-5), (stage.name, key)


@pytest.mark.parametrize("kind", ["tiny", "loaded"])
@pytest.mark.parametrize("name", PAPERS)
def test_gradients_reach_all_that_a_stage_trains_and_nothing_frozen(name, kind, folders, scenes):
    """A parameter without a gradient hangs data-parallel training; a frozen one that moves was not frozen."""
    model = make(name, folders[name] if kind == "loaded" else None)
    for stage in stages_of(name, kind):
        model.zero_grad(set_to_none=True)
        model.configure_stage(stage)
        model.train()
        model.cache_features(scenes)
        mix = {**stage.tasks, "id_category": 1.0}  # a marked object: Fase3D's coordinate token has a part
        groups = questions_of(scenes, mix, 6) if stage.tasks else [(scene, []) for scene in scenes]
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)

        # two steps: a low-rank pair's first matrix has to wait for its second, which starts at zero
        for _ in range(2):
            optimizer.zero_grad()
            out = model(model.batch(groups))
            (out["loss"] / out["weight"]).backward()
            assert trained == {n for n, p in model.named_parameters() if p.grad is not None}, stage.name
            optimizer.step()
        idle = {n for n, p in model.named_parameters() if n in trained and not p.grad.abs().sum() > 0}
        assert idle == set(), stage.name
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved <= trained, stage.name


@pytest.mark.parametrize("name", PAPERS)
def test_half_precision_changes_the_loss_by_a_rounding(name, folders, scenes):
    """Weights in bfloat16, as a paper run loads them, and autocast, as the trainer runs them."""
    losses = []
    for dtype, auto in (("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True)):
        model = make(name, folders[name], dtype=dtype).eval()
        model.configure_stage(stages_of(name, "loaded")[-1])
        with torch.autocast("cpu", torch.bfloat16, enabled=auto), torch.no_grad():
            batch = model.batch(questions_of(scenes, MIX))
            losses.append(float(model(batch)["loss"]))
            assert len(model.generate(batch, 1)) == 9
    assert losses[1:] == pytest.approx(losses[:1] * 3, rel=0.03) and len(set(losses)) > 1


@pytest.mark.parametrize("name", PAPERS)
def test_recomputed_activations_give_the_same_gradients(name, folders, scenes):
    """Gradient checkpointing trades time for memory, never the result."""
    gradients = []
    for recompute in (False, True):
        model = make(name, folders[name]).train()
        model.configure_stage(stages_of(name, "loaded")[-1])
        if recompute:
            model.gradient_checkpointing_enable()
        model.cache_features(scenes)
        model(model.batch(questions_of(scenes, MIX)))["loss"].backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for key, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][key], rtol=1e-4, atol=1e-6), key


# ---- frozen work -----------------------------------------------------------------------------------------------------


def test_cached_features_are_read_back_equal_and_shared_by_ranks(model, scenes, tmp_path, monkeypatch):
    """Each rank computes its share, finds the others' on disk, and sees what a model without a cache sees."""
    with torch.no_grad():
        expected = model.encode(scenes)["tokens"]
        for rank in (0, 1):
            model.feature_cache = {}
            model.cache_features(scenes, tmp_path, rank, world=2)
        assert len(list(tmp_path.glob("*/*.npz"))) == len(scenes)
        model.feature_cache = {}
        monkeypatch.setattr(model, "compute_features", lambda scene: pytest.fail("computed again"))
        assert torch.equal(model.encode(scenes)["tokens"], expected)


def test_another_scene_of_the_same_name_gets_features_of_its_own(model, scenes, tmp_path):
    """A folder of features that outlives its scenes must not answer for others."""
    with torch.no_grad():
        model.cache_features(scenes[:1], tmp_path)
        other = replace(scenes[1], name=scenes[0].name)
        model.feature_cache = {}
        model.cache_features([other], tmp_path)
        assert len(list(tmp_path.glob("*/*.npz"))) == 2


def test_a_name_never_leads_out_of_the_cache_folder(model, scenes, tmp_path):
    """Names of scenes come from files of strangers."""
    with torch.no_grad():
        model.cache_features([replace(scenes[0], name="../../outside")], tmp_path / "inside" / "cache")
    assert not list(tmp_path.glob("*.npz")) and len(list((tmp_path / "inside" / "cache").rglob("*.npz"))) == 1


def test_a_checkpoint_holds_no_weight_that_was_loaded_and_stayed_frozen(folders):
    """Fase3D and Spatial 3D-LLM keep theirs frozen: the run's checkpoint names them only."""
    for name in ("fase3d", "spatial3dllm"):
        model = make(name, folders[name])
        held = set(data.named_weights(model))
        assert held and not held & set(model.frozen_pretrained_names)
        trained = set()
        for stage in stages_of(name, "loaded"):
            model.configure_stage(stage)
            trained |= {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained <= held


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("unknown", ["category", "color"])
def test_things_of_unknown_category_or_color_pass_every_stage(name, unknown, scenes):
    """A scan's objects may lack a name, and nobody names every color."""
    model = make(name).eval()
    bare = [replace(s, objects=[replace(o, **{unknown: ""}) for o in s.objects]) for s in scenes]
    for stage in stages_of(name, "tiny"):
        model.configure_stage(stage)
        with torch.no_grad():
            model.cache_features(bare)
            groups = [(scene, [data.Sample("q", "s", "count", "how many?", "1")]) for scene in bare]
            assert torch.isfinite(model(model.batch(groups))["loss"]), stage.name


@pytest.mark.parametrize("name", PAPERS)
def test_unknown_inputs_and_parts_of_a_stage_are_refused_with_the_known_ones(name):
    model = make(name)
    for wrong in (
        data.Stage("x", {}, ("lm",), "nothing"),
        data.Stage("x", {}, ("bev",), model.scene_inputs[0]),
    ):
        with pytest.raises(ValueError, match=r"^stage x: scene_input is one of .*, trains of .*lm"):
            model.configure_stage(wrong)
