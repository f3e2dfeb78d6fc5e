"""The language model that reads rooms in words: what it is shown and asked, and how the three papers start from it."""

from dataclasses import replace

import numpy as np
import papers
import pytest
import torch
from papers import alike
from torch.nn.functional import layer_norm
from torch.testing import assert_close

import data
import train
from data import Reader, Stage, TinyText, read_tensors

SIZES = (32, 2, 4, 64)


@pytest.fixture(scope="module")
def text():
    for name in papers.PAPERS:
        papers.paper_of(name)
    return TinyText(data.vocabulary())


@pytest.fixture
def scenes(rng):
    """Two rooms whose things are pointed at by clicks, and one where they are by boxes."""
    found = [data.augment(data.room(seed, views=0, points=0), rng) for seed in range(3)]
    for scene in found:
        scene.identifiers = {o.id: 2 * k for k, o in enumerate(scene.objects)}
    found[2].identifiers[1] = 1  # the sum is odd
    return found


def reader(text, scene_input):
    model = Reader(data.Config(reader=SIZES), text)
    model.configure_stage(Stage("a", {"what": 1.0}, ("lm",), scene_input, reasoning=True))
    return model.eval()


def test_a_token_is_the_words_of_a_thing_and_where_it_is(text, scenes):
    """Sizes are shown where things are named by their boxes; neighbors stand next to each other."""
    model = reader(text, "boxes")
    seen = model.encode(scenes)
    table = model.llm.get_input_embeddings().weight
    for scene, tokens, valid in zip(scenes, seen["tokens"], seen["valid"], strict=True):
        shown = [o for o, _ in model.shown(scene)]
        assert len(scene.objects) == len(shown) == valid.sum() == model.scene_length(scene)
        for k, o in enumerate(shown):
            gaps = [abs(o.box - p.box)[:3].sum() for p in shown[k + 1 :]]
            assert not gaps or gaps[0] == min(gaps)

            # per axis the cosines of six waves, then their sines
            words = text.encode(f"{o.category} {o.color}")
            place = o.box if scene is scenes[2] else o.box[:3]
            phase = 2 * np.pi * place[:, None] / (0.5 * 2 ** np.arange(6))
            waves = torch.from_numpy(np.hstack([np.cos(phase), np.sin(phase)])).float().flatten()
            code = model.code.weight[:, : len(waves)] @ waves
            named = layer_norm(table[words].sum(0), (32,))
            assert alike(tokens[k], named + code, 1e-4)


def test_behind_the_first_stage_training_shows_something_strange_too(text, scenes):
    """Drawn by the scene, not by the process: one shift of all its tokens, and a smaller noise in each."""
    for scene_input, strange in (("places", False), ("pieces", True)):
        model = reader(text, scene_input)
        plain = model.encode(scenes[:1])["tokens"][0]
        more = model.train().encode(scenes[:1])["tokens"][0] - plain
        assert_close(model.encode(scenes)["tokens"][0, : len(more)], plain + more)
        assert bool(more.any()) == strange
        assert not strange or more.mean(0).std() > more.std(0).mean() / 2


def test_pieces_lie_in_their_things_and_some_show_nothing(text, scenes):
    """As the papers see: several tokens of a thing, walls between them."""
    model = reader(text, "pieces")
    for scene in scenes:
        pieces = model.shown(scene)
        shown = [(o, box) for o, box in pieces if o]
        assert {o.id for o, _ in shown} == {o.id for o in scene.objects}
        assert len(pieces) - len(shown) == len(scene.objects) < len(pieces) / 2
        for o, box in shown:
            away = abs(box - o.box)[:3]
            assert (away <= o.box[3:] / 2).all()
            assert model.clicks(scene) or np.array_equal(box, o.box)


def test_a_click_is_asked_only_what_it_can_point_at(text, scenes):
    """No answer names a thing or a box, no question two things; boxes in text can do all of it."""
    mix = dict.fromkeys(("id_color", "ground", "relation", "modle_move", "count"), 1.0)
    model = reader(text, "boxes")
    batch = model.batch(papers.questions_of(scenes, mix, 40))
    first, second, boxed = batch["samples"]
    kept = [{s.task for s in samples} for samples in batch["samples"]]
    assert kept == [{"id_color", "count"}, {"id_color", "count"}, set(mix)]
    clicked = [s for s in first + second if s.task == "id_color"]
    assert len(batch["prompts"]) == len(clicked) > 5
    for s in clicked:
        assert "this" in s.question
        assert s.prompt is not None
    for s in boxed:
        assert "[" in s.question or s.task not in ("id_color", "relation")


def test_the_token_of_a_number_starts_as_the_code_of_its_value(text):
    """Reading a coordinate is then the same copy as reading a name."""
    model = Reader(data.Config(reader=(128, 1, 4, 8)), text)
    table = model.llm.get_input_embeddings().weight.detach()
    for k, value in enumerate((1.25, -2.0, 0.75, 1.5, 0.5, 2.0)):
        waves = data.fourier_waves(torch.tensor([value]))
        code = model.code.weight.split(12, dim=1)[k] @ waves
        tokens = [token for token, (axis, _) in text.number.items() if axis == "xyzwdh"[k]]
        nearest = (table[tokens] @ code).argmax()
        assert abs(text.number[tokens[nearest]][1] - value) <= 0.125


@pytest.mark.parametrize(
    ("name", "axes", "part"),
    [("proxy3d", 2, "fourier"), ("fase3d", 3, "place"), ("spatial3dllm", 6, "code")],
)
def test_every_paper_starts_from_its_weights_and_places(name, axes, part):
    """Around other names and modules: the same language model, and the same place has the same code."""
    model = papers.make(name, reader=SIZES)
    own = Reader(model.config, model.text)
    weights = {k: v + 0.1 for k, v in data.named_weights(own).items()}
    model.start_from(weights)
    taken = papers.plain_weights(model)
    for key in weights:
        if key.startswith("llm.model.layers"):
            assert torch.equal(taken[key], weights[key]), key

    # where something is
    place = torch.tensor([[1.2, -0.7, 0.4, 0.5, 0.6, 0.7]])[:, :axes]
    waves = data.fourier_waves(place)
    given = place if name == "proxy3d" else waves
    code = getattr(model, part)(given)
    expected = waves @ weights["code.weight"][:, : 12 * axes].T
    assert alike(code, expected, 1e-4)


# ---- made once, kept for all papers ----------------------------------------------------------------------------------


def run(model, out, *more):
    flags = "--train-scenes 4 --test-scenes 1 --workers 0 --no-eval --steps 6"
    return train.main(["--model", model, "--out", str(out), *flags.split(), *more])


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a paper's run, and that of the language model that was made for it."""
    out = tmp_path_factory.mktemp("first") / "run"
    assert run("fase3d", out) == 0
    (made,) = out.parent.glob("language-*")
    return out, made


def test_the_first_paper_makes_it_and_the_next_one_finds_it(first):
    out, made = first
    log, weights = made / "log.jsonl", read_tensors(made, "weights")
    written = log.stat().st_mtime_ns

    # another paper, and the frozen language model in the first one's checkpoint
    assert run("spatial3dllm", out.with_name("second")) == 0
    assert [made] == list(out.parent.glob("language-*"))
    assert log.stat().st_mtime_ns == written
    held = read_tensors(out, "weights")
    assert torch.equal(held["llm.model.norm.weight"], weights["llm.model.norm.weight"])

    # other sizes need another; --fresh makes it again, with the same result
    assert run("fase3d", out.with_name("other"), "--set", "reader=(32, 2, 4, 16)", "filter_heads=4") == 0
    assert len(list(out.parent.glob("language-*"))) == 2
    assert run("spatial3dllm", out.with_name("fresh"), "--fresh") == 0
    assert log.stat().st_mtime_ns > written
    assert_close(read_tensors(made, "weights"), weights, rtol=0, atol=0)


def test_one_that_was_stopped_goes_on(first, tmp_path, monkeypatch):
    """A run that ends in the middle leaves a checkpoint, from which the next one continues to the same weights."""
    save = train.save_checkpoint

    def break_off(*given):
        save(*given)
        *_, state, _ = given
        if state["position"]["total"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_checkpoint", break_off)
    assert run("fase3d", tmp_path / "a", "--save-every", "1") == 130
    (made,) = tmp_path.glob("language-*")
    assert data.read_state(made)["position"]["total"] == 3

    monkeypatch.undo()
    assert run("fase3d", tmp_path / "a") == 0
    weights = (read_tensors(folder, "weights") for folder in (made, first[1]))
    assert_close(*weights, rtol=0, atol=0)


def test_it_knows_the_words_of_other_scenes_and_half_of_the_rooms_it_reads_hold_them(scenes):
    """A frozen language model must have read the names that its scenes use; rooms alone keep theirs."""
    args = train.parse_args(["--model", "fase3d", "--workers", "0"])
    otters = [replace(o, category="otter") for o in scenes[0].objects]
    strange = [replace(scenes[0], objects=otters)]
    assert train.make_text(args, strange, {}).unknown("otter") == []
    for given, share in ((scenes, 0.0), (strange, 0.5)):
        rooms = train.rooms_to_read(args, 20, given)
        read = [all(o.category == "otter" for o in room.objects) for room in rooms]
        assert np.mean(read) == share
