"""What every paper promises to trainer and evaluator: one test per claim, for three papers, from nothing and loaded."""

import re
from dataclasses import replace

import numpy as np
import papers
import pytest
import torch
import torch.nn.functional as F
from papers import PAPERS, alike, answer_logits, make, questions_of, refused, stages_of
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train
from data import IGNORE

MIX = {"id_category": 2, "id_color": 1, "count": 1, "what": 1}  # questions with and without a marked object


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small pre-trained language model on disk for each paper."""
    return {name: papers.save_llm(name, tmp_path_factory.mktemp(name)) for name in PAPERS}


@pytest.fixture(scope="module")
def groups(scenes):
    return questions_of(scenes, MIX)


@pytest.fixture(params=PAPERS)
def name(request):
    return request.param


@pytest.fixture(params=["tiny", "loaded"])
def kind(request):
    return request.param


@pytest.fixture
def any_model(name, kind, folders):
    """One model of each paper and kind, at its last stage."""
    return make(name, folders[name] if kind == "loaded" else None)


@pytest.fixture
def model(any_model):
    return any_model.eval()


# ---- questions -------------------------------------------------------------------------------------------------------


def test_a_packed_question_gets_the_logits_it_has_alone(model, groups):
    """Neighbours, companions and padding are not seen, and positions are those it would have alone."""
    packed, _ = answer_logits(model, groups)
    alone = [answer_logits(model, [(scene, [q])])[0] for scene, samples in groups for q in samples]
    assert len(alone) == 9
    assert packed.std() > 0.01
    assert alike(packed, torch.cat(alone), 2e-5 * float(packed.abs().max()))


def test_the_loss_is_the_summed_cross_entropy_of_the_answers(model, groups):
    """With the number of its terms and of its hits: the trainer divides by the global number."""
    logits, out = answer_logits(model, groups)
    target = []
    for scene, samples in groups:
        for q in samples:
            answer = model.write_marks(scene, q).answer
            target += [*model.text.encode(answer), model.text.eos]
    target = torch.tensor(target)
    loss = F.cross_entropy(logits, target, reduction="sum")
    assert float(out["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert out["weight"] == len(target)
    assert out["correct"] == (logits.argmax(1) == target).sum()


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


def test_generation_is_step_by_step_argmax(model, groups):
    """Scenes and questions of different lengths in one batch; a loaded generation config must not matter."""
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


def test_answers_depend_on_the_scene_and_on_what_is_marked(model, scenes):
    """Guards the tests above: the same words about another scene or another thing have other logits."""
    first, second = (
        data.Sample("q", "s", "id_category", f"what is {data.mark(o)}?", "chair")
        for o in scenes[0].objects[:2]
    )
    groups = [(scenes[0], [first, second]), (scenes[1], [first])]
    one, another, elsewhere = answer_logits(model, groups)[0].chunk(3)
    assert not alike(one, another, 1e-3)
    assert not alike(one, elsewhere, 1e-3)


# ---- stages ----------------------------------------------------------------------------------------------------------


def test_scenes_add_up_in_every_stage_so_processes_may_share_them(name, scenes, groups):
    """Loss, terms and right answers of a batch are the sums of its scenes' own."""
    model = make(name).train()
    for stage in stages_of(name, "tiny"):
        model.configure_stage(stage)
        model.cache_features(scenes)
        together = model(model.batch(groups))
        alone = [model(model.batch([group])) for group in groups]
        for key in ("loss", "weight", "correct"):
            total = sum(float(out[key]) for out in alone)
            assert float(together[key]) == pytest.approx(total, rel=2e-5, abs=1e-5), (stage.name, key)


def test_gradients_reach_all_that_a_stage_trains_and_nothing_frozen(any_model, name, kind, scenes):
    """A parameter without a gradient hangs data-parallel training; a frozen one that moves was not frozen."""
    model = any_model.train()
    for stage in stages_of(name, kind):
        model.configure_stage(stage)
        model.cache_features(scenes)
        mix = {**stage.tasks, "id_category": 1.0}  # a marked object: Fase3D's coordinate token has a part
        groups = questions_of(scenes, mix, 6) if stage.tasks else [(scene, []) for scene in scenes]
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = torch.optim.SGD(trained.values(), lr=1e-2)

        # two steps: a low-rank pair's first matrix has to wait for its second, which starts at zero
        for _ in range(2):
            model.zero_grad()
            out = model(model.batch(groups))
            (out["loss"] / out["weight"]).backward()
            reached = {n for n, p in model.named_parameters() if p.grad is not None}
            assert reached == trained.keys(), stage.name
            optimizer.step()
        idle = {n for n, p in trained.items() if not p.grad.abs().sum() > 0}
        assert idle == set(), stage.name
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved <= trained.keys(), stage.name


def test_half_precision_changes_the_loss_by_a_rounding(name, folders, groups):
    """Weights in bfloat16, as a paper run loads them, and autocast, as the trainer runs them."""
    losses = []
    for dtype in ("float32", "bfloat16"):
        for auto in (False, True):
            model = make(name, folders[name], dtype=dtype).eval()
            with torch.autocast("cpu", torch.bfloat16, enabled=auto), torch.no_grad():
                batch = model.batch(groups)
                losses.append(float(model(batch)["loss"]))
                assert len(model.generate(batch, 1)) == 9
    assert losses == pytest.approx([losses[0]] * 4, rel=0.03)
    assert len(set(losses)) > 1


def test_recomputed_activations_give_the_same_gradients(name, folders, scenes, groups):
    """Gradient checkpointing trades time for memory, never the result."""
    gradients = []
    for recompute in (False, True):
        model = make(name, folders[name]).train()
        if recompute:
            model.gradient_checkpointing_enable()
        model.cache_features(scenes)
        model(model.batch(groups))["loss"].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]
    assert_close(*gradients, rtol=0, atol=0)


WAITS = ("nonzero", "_local_scalar_dense", "unique", "_unique2", "bincount", "masked_select", "equal")


class Waits(TorchDispatchMode):
    """Counts the operations for which a GPU's results must be waited for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        places = args[1] if name == "index" else ()
        masked = any(place is not None and place.dtype == torch.bool for place in places)
        self.count += masked or name in WAITS
        return function(*args, **kwargs or {})


def test_a_step_hardly_ever_waits_for_the_device(name, scenes):
    """Whatever the number of scenes; a token of every answer waits once, to see which answers have ended."""
    model, mix = make(name), {"color": 1.0}
    model.cache_features(scenes)
    for asked in (scenes, scenes[:1]):
        batch = model.batch(questions_of(asked, mix))
        with Waits() as waits:
            model(batch)
        assert waits.count <= 4
    found = []
    for tokens in (1, 3):
        with Waits() as waits:
            model.generate(batch, tokens)
        found.append(waits.count)
    assert found[1] - found[0] <= 2


def make_with(name, settings):
    """A model with settings as they are typed behind --set."""
    changes = {}
    for setting in settings.split():
        key, _, text = setting.partition("=")
        config = train.override(papers.paper_of(name).Config.tiny(), key, text)
        changes[key] = getattr(config, key)
    return make(name, **changes)


# settings of the papers' ablations, each beside the default
SWITCHES = {
    "proxy3d": [
        "semantic_grouping=false",
        "lloyd=2",
        "budget=9",
        "floor=5",
        "grid=(3,4)",
        "frames=2",
    ],
    "fase3d": [
        "selector=fps",
        "selector=qformer",
        "adapters=none",
        "adapters=vision",
        "adapters=text",
        "adapters=shared",
        "adapters=full",
        "filter=none",
        "filter=both",
        "curves=1",
        "superpoint=false",
        "enhancer=false",
        "superpoint=false enhancer=false",
        "adapted_layers=0",
        "adapted_layers=3",  # all: what serves the scene's tokens alone is not behind the last
        "tokens=5",
        "color=false",
        "normals=false",
    ],
    "spatial3dllm": ["intra=false", "inter=off", "inter=concat", "context=false", "positions=false"],
}


@pytest.mark.parametrize(("name", "change"), [(name, change) for name in PAPERS for change in SWITCHES[name]])
def test_every_switch_of_the_ablations_changes_the_answers_and_trains(name, change, scenes, groups):
    """Or an ablation would compare a model with itself; and all that it says it trains gets a gradient."""
    default = papers.wake(make(name)).eval()
    model = papers.wake(make_with(name, change)).eval()
    weights = default.state_dict()
    for key, own in model.state_dict().items():
        if key in weights and weights[key].shape == own.shape:
            own.copy_(weights[key])
    logits, changed = (answer_logits(m, groups)[0] for m in (default, model))
    assert not alike(logits, changed, 1e-4)

    model.train().cache_features(scenes)
    model(model.batch(groups))["loss"].backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    idle = {n for n, p in trained.items() if p.grad is None or not p.grad.any()}
    assert idle == ({"context.place.weight"} if change == "positions=false" else set())  # it maps zeros


# ---- scenes ----------------------------------------------------------------------------------------------------------


def test_features_are_those_of_the_unturned_scene_and_places_turn_with_it(model, rng):
    """So that they are worked out once and serve the scene however it is mirrored."""
    plain = data.room(3, objects=8, views=4, size=48, points=700)
    first = model.compute_features(plain)
    centers = model.token_centers(plain)
    for _ in range(4):
        turned = data.augment(plain, rng)
        found = model.compute_features(turned)
        assert all(torch.equal(found[key], first[key]) for key in first)
        assert np.allclose(model.token_centers(turned), centers @ turned.turn.T, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("spatial3dllm", ""),
        ("fase3d", "tokens=30"),  # equally large superpoints among them
        ("fase3d", "points=300"),
        ("fase3d", "superpoint=false points=300"),
        ("fase3d", "selector=fps"),
        ("fase3d", "selector=qformer"),
    ],
)
def test_the_order_of_points_and_the_names_of_superpoints_change_no_token(name, change, scenes, rng):
    """By more than 1e-5, clicks included; also where only some points are drawn."""
    model = make_with(name, change).eval()
    groups, shuffled = questions_of(scenes, {"id_category": 1}, 4), []
    for scene, samples in groups:
        order = rng.permutation(len(scene.points))
        names = rng.permutation(1000)
        arrays = {key: getattr(scene, key)[order] for key in ("points", "colors", "normals", "instances")}
        arrays["superpoints"] = names[scene.superpoints[order]]
        shuffled.append((replace(scene, name=f"{scene.name} shuffled", **arrays), samples))

    tokens, prompts = [], []
    for asked in (groups, shuffled):
        seen = model.encode([scene for scene, _ in asked])
        tokens.append(seen["tokens"])
        prompts.append(model.prompt_tokens(model.batch(asked), seen))
    assert tokens[0].std() > 0.1
    assert torch.allclose(*tokens, rtol=0, atol=1e-5)
    assert torch.allclose(*prompts, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["fase3d", "spatial3dllm"])
@pytest.mark.parametrize("count", [1, 40])
def test_a_point_or_a_bare_wall_is_a_scene(name, count, rng):
    """Gray, without objects: it is read, and answered about."""
    zeros = np.zeros((count, 3), np.float32)
    scene = data.Scene("wall", "ply", [], colors=zeros.astype(np.uint8), normals=zeros)
    scene.points = rng.random((count, 3)).astype(np.float32)
    scene.superpoints = np.zeros(count, int)
    model = make(name).eval()
    assert torch.isfinite(model.encode([scene])["tokens"]).all()
    sample = data.Sample("q", "wall", "count", "what is the number of doors?", "0")
    assert len(model.generate(model.batch([(scene, [sample])]), 2)) == 1
    for propose in model.proposals().values():
        assert len(propose(scene).objects) == 1


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("proxy3d", "frames", "Proxy3D needs posed frames, here are points only"),
        ("fase3d", "points", "Fase3D needs points; this source has none"),
        ("fase3d", "superpoints", "no superpoints; make them with data.over_segment"),
        ("fase3d", "colors", "the cloud has no color and this model never saw such; train with"),
        ("spatial3dllm", "points", "no points, and Spatial 3D-LLM reads a cloud"),
    ],
)
def test_a_scene_that_lacks_what_a_paper_reads_is_refused_in_one_line(name, missing, message, scenes):
    bare = replace(scenes[0], name="scan7", **{missing: None})
    with refused(rf"^scan7: {message}[^\n]*$"):
        make(name).encode([bare])


@pytest.mark.parametrize(
    ("name", "endings"),
    [("proxy3d", ["", "_attention"]), ("fase3d", ["", "_curves", "_graph"]), ("spatial3dllm", [""])],
)
def test_pictures_of_a_scene_are_not_blank(name, endings, scenes, tmp_path):
    from PIL import Image

    paths = make(name).pictures(scenes[:1], tmp_path)
    assert [path.name for path in paths] == [f"{scenes[0].name}{end}.png" for end in endings]
    for path in paths:
        assert len(Image.open(path).convert("RGB").getcolors(1 << 24)) > 1000


# ---- frozen work -----------------------------------------------------------------------------------------------------


def test_cached_features_are_read_back_equal_and_shared_by_ranks(model, scenes, tmp_path, monkeypatch):
    """Each rank computes its share, finds the others' on disk, and sees what a model without a cache sees."""
    with torch.no_grad():
        expected = model.encode(scenes)["tokens"]
        for rank in (0, 1):
            model.feature_cache = {}
            model.cache_features(scenes, tmp_path, rank, world=2)
        assert len(list(tmp_path.glob("*/*.safetensors"))) == len(scenes)
        model.feature_cache = {}
        monkeypatch.setattr(model, "compute_features", lambda scene: pytest.fail("computed again"))
        assert torch.equal(model.encode(scenes)["tokens"], expected)

        # one that is damaged is named, with the remedy
        model.feature_cache = {}
        damaged = min(tmp_path.glob("*/*.safetensors"))
        damaged.write_bytes(damaged.read_bytes()[:50])
        with refused(f"{damaged.name}: .*made anew once it is deleted"):
            model.encode(scenes)


def test_scenes_of_one_name_get_files_of_their_own_and_none_outside_the_folder(model, scenes, tmp_path):
    """A folder of features may outlive its scenes, and names of scenes come from files of strangers."""
    folder = tmp_path / "inside" / "cache"
    for scene in scenes[:2]:
        model.feature_cache = {}
        model.cache_features([replace(scene, name="../../outside")], folder)
    assert len(list(folder.rglob("*.safetensors"))) == 2


def test_a_loaded_language_model_keeps_every_weight(name, folders):
    """Under whatever names adapters give them."""
    model = make(name, folders[name])
    saved = type(model.llm).from_pretrained(folders[name]).state_dict()
    assert_close(papers.plain_weights(model.llm), dict(saved), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["fase3d", "spatial3dllm"])
def test_a_checkpoint_holds_what_trains_and_no_weight_that_stays_as_it_was_loaded(name, folders):
    """Fase3D and Spatial 3D-LLM train adapters: the run's checkpoint names the loaded weights only."""
    model = make(name, folders[name])
    held = set(data.named_weights(model))
    inside = {n for n in held if n.startswith("llm.")}
    assert inside
    assert all("lora" in n or n.endswith(".gain") for n in inside)
    for stage in stages_of(name, "loaded"):
        model.configure_stage(stage)
        assert {n for n, p in model.named_parameters() if p.requires_grad} <= held


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unknown", ["category", "color"])
def test_things_of_unknown_category_or_color_pass_every_stage(name, unknown, scenes):
    """A scan's objects may lack a name, and nobody names every color."""
    model, groups = make(name).eval(), []
    for scene in scenes:
        bare = replace(scene, objects=[replace(o, **{unknown: ""}) for o in scene.objects])
        groups.append((bare, [data.Sample("q", "s", "count", "how many?", "1")]))
    for stage in stages_of(name, "tiny"):
        model.configure_stage(stage)
        with torch.no_grad():
            model.cache_features([scene for scene, _ in groups])
            assert torch.isfinite(model(model.batch(groups))["loss"]), stage.name


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fase3d", "selector=kmeans", "selector 'kmeans' is unknown: choose one of graph, fps, qformer"),
        ("fase3d", "filter=all", "filter 'all' is unknown: choose one of none, vision, both"),
        ("fase3d", "task=x", "task 'x' is unknown: choose one of qa, scanqa, sqa3d, caption, all"),
        ("fase3d", "curves=7", "curves = 7; give 1 to 6"),
        ("fase3d", "dim=32", "dim = 32; give a multiple of 6 and of heads = 4"),
        ("fase3d", "filter_heads=5", "filter_heads = 5 does not divide the llm's width 32"),
        ("fase3d", "adapted_layers=4", "adapted_layers = 4; the llm has 3"),
        ("spatial3dllm", "inter=gcn", "inter = gcn: choose one of off, graph, concat"),
    ],
)
def test_settings_that_do_not_exist_are_refused_with_the_known_ones(name, change, message):
    with refused(f"^{re.escape(message)}$"):
        make_with(name, change)


def test_unknown_inputs_and_parts_of_a_stage_are_refused_with_the_known_ones(name):
    model = make(name)
    for part, scene_input in (("lm", "nothing"), ("bev", model.scene_inputs[0])):
        with pytest.raises(ValueError, match=r"^stage x: scene_input is one of .*, trains of .*lm"):
            model.configure_stage(data.Stage("x", {}, (part,), scene_input))
