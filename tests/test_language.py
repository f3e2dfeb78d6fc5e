"""The language model that reads rooms in words: what it is shown and asked, and how the three papers start from it."""

from dataclasses import replace

import numpy as np
import papers
import pytest
import torch
from torch.nn.functional import layer_norm

import data
import train
from data import Reader, Stage, TinyText

SIZES = (32, 2, 4, 64)


@pytest.fixture(scope="module")
def text():
    for name in papers.PAPERS:
        papers.paper_of(name)
    return TinyText(data.vocabulary())


@pytest.fixture(scope="module")
def scenes():
    """Two rooms whose things are pointed at by clicks, and one where they are by boxes."""
    rng = np.random.default_rng(0)
    found = [data.augment(data.room(seed, views=0, points=0), rng) for seed in range(3)]
    for scene, way in zip(found, (0, 0, 1), strict=True):
        scene.identifiers = {o.id: 2 * k + way * (k == 0) for k, o in enumerate(scene.objects)}
    return found


def reader(text, scene_input):
    torch.manual_seed(0)
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
        assert len(shown) == len(scene.objects)
        assert len(shown) == int(valid.sum()) == model.scene_length(scene)
        for k, o in enumerate(shown):
            gaps = [np.abs(o.box - p.box)[:3].sum() for p in shown[k + 1 :]]
            assert not gaps or gaps[0] == min(gaps)

            # per axis the cosines of six waves, then their sines
            words = [text.encode(o.category)[0], text.encode(o.color)[0]]
            place = o.box if scene is scenes[2] else o.box[:3]
            phase = 2 * np.pi * place[:, None] / (0.5 * 2 ** np.arange(6))
            waves = np.concatenate([np.cos(phase), np.sin(phase)], 1).flatten()
            code = model.code.weight[:, : len(waves)] @ torch.from_numpy(waves).float()
            named = layer_norm(table[words].sum(0), (32,))
            assert torch.allclose(tokens[k], named + code, atol=1e-4)


def test_pieces_lie_in_their_things_and_some_show_nothing(text, scenes):
    """As the papers see: several tokens of a thing, walls between them."""
    model = reader(text, "pieces")
    for scene in scenes:
        pieces = model.shown(scene)
        assert {o.id for o, _ in pieces if o} == {o.id for o in scene.objects}
        nothing = [box for o, box in pieces if o is None]
        assert len(nothing) == len(scene.objects) < len(pieces) / 2
        for o, box in pieces:
            if o:
                away = np.abs(box[:3] - o.box[:3])
                assert (away <= o.box[3:] / 2).all()
                assert model.clicks(scene) or np.array_equal(box, o.box)


def test_a_click_is_asked_only_what_it_can_point_at(text, scenes):
    """No answer names a thing or a box, no question two things; boxes in text can do all of it."""
    mix = dict.fromkeys(("id_color", "ground", "relation", "modle_move", "count"), 1.0)
    model, rng = reader(text, "boxes"), np.random.default_rng(0)
    groups = [(scene, data.questions(scene, mix, 40, rng)) for scene in scenes]
    batch = model.batch(groups)
    kept = [{s.task for s in samples} for samples in batch["samples"]]
    assert kept == [{"id_color", "count"}, {"id_color", "count"}, set(mix)]
    clicked = [s for samples in batch["samples"][:2] for s in samples if s.task == "id_color"]
    assert len(batch["prompts"]) == len(clicked) > 5
    for s in clicked:
        assert "this" in s.question
        assert s.prompt is not None
    for s in batch["samples"][2]:
        assert "[" in s.question or s.task not in ("id_color", "relation")


def test_the_token_of_a_number_starts_as_the_code_of_its_value(text):
    """Reading a coordinate is then the same copy as reading a name."""
    model = Reader(data.Config(reader=(128, 1, 4, 8)), text)
    table = model.llm.get_input_embeddings().weight.detach()
    for k, value in enumerate((1.25, -2.0, 0.75, 1.5, 0.5, 2.0)):
        waves = data.fourier_waves(torch.tensor([value]))
        code = model.code.weight[:, 12 * k : 12 * k + 12] @ waves
        own = {token: v for token, (axis, v) in text.number.items() if axis == "xyzwdh"[k]}
        likeness = table[list(own)] @ code
        nearest = list(own.values())[int(likeness.argmax())]
        assert abs(nearest - value) <= 0.125


@pytest.mark.parametrize("name", papers.PAPERS)
def test_every_paper_starts_from_its_weights_and_places(name):
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
    box = torch.tensor([[1.2, -0.7, 0.4, 0.5, 0.6, 0.7]])
    if name == "proxy3d":
        axes = 2
        code = model.fourier(box[:, :2])
    elif name == "fase3d":
        axes = 3
        code = model.place(data.fourier_waves(box[:, :3]))
    else:
        axes = 6
        code = model.code(data.fourier_waves(box))
    expected = data.fourier_waves(box[:, :axes]) @ weights["code.weight"][:, : 12 * axes].T
    assert torch.allclose(code, expected, atol=1e-4)


# ---- made once, kept for all papers ----------------------------------------------------------------------------------


def run(model, out, *more):
    flags = ["--train-scenes", "4", "--test-scenes", "1", "--workers", "0", "--no-eval", "--steps", "6"]
    return train.main(["--model", model, "--out", str(out), *flags, *more])


def test_the_first_paper_makes_it_and_the_next_one_finds_it(tmp_path):
    assert run("fase3d", tmp_path / "a") == 0
    (folder,) = tmp_path.glob("language-*")
    made = (folder / "log.jsonl").stat().st_mtime_ns
    weights = data.read_tensors(folder, "weights")

    # another paper, and the frozen language model in the first one's checkpoint
    assert run("spatial3dllm", tmp_path / "b") == 0
    assert [folder] == list(tmp_path.glob("language-*"))
    assert (folder / "log.jsonl").stat().st_mtime_ns == made
    held = data.read_tensors(tmp_path / "a", "weights")
    assert torch.equal(held["llm.model.norm.weight"], weights["llm.model.norm.weight"])

    # other sizes need another; --fresh makes it again, with the same result
    assert run("fase3d", tmp_path / "c", "--set", "reader=(32, 2, 4, 16)", "filter_heads=4") == 0
    assert len(list(tmp_path.glob("language-*"))) == 2
    assert run("spatial3dllm", tmp_path / "d", "--fresh") == 0
    assert (folder / "log.jsonl").stat().st_mtime_ns > made
    again = data.read_tensors(folder, "weights")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_one_that_was_stopped_goes_on(tmp_path, monkeypatch):
    """A run that ends in the middle leaves a checkpoint, from which the next one continues to the same weights."""
    assert run("fase3d", tmp_path / "whole" / "a") == 0
    whole = data.read_tensors(next((tmp_path / "whole").glob("language-*")), "weights")

    save = train.save_checkpoint

    def break_off(out, model, optimizer, state, rank=0):
        save(out, model, optimizer, state, rank)
        if state["position"]["total"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", break_off)
        assert run("fase3d", tmp_path / "a", "--save-every", "1") == 130
    (folder,) = tmp_path.glob("language-*")
    assert data.read_state(folder)["position"]["total"] == 3
    assert run("fase3d", tmp_path / "a") == 0
    again = data.read_tensors(folder, "weights")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_reader_of_other_scenes_knows_their_words(scenes):
    """Categories that no room has are in the vocabulary of the run, and pass as any other."""
    otters = [replace(o, category="otter") for o in scenes[0].objects]
    strange = replace(scenes[0], objects=otters)
    words = TinyText(data.vocabulary([*data.CATEGORIES, "otter"]))
    assert words.unk not in words.encode("otter")
    assert reader(words, "places").encode([strange])["valid"].all()


def test_half_of_the_rooms_it_reads_hold_things_of_the_scenes_at_hand(scenes):
    """A frozen language model must have read the names that its scenes use; rooms alone keep theirs."""
    args = train.parse_args(["--model", "fase3d", "--workers", "0"])
    otters = [replace(o, category=f"otter {k}") for k, o in enumerate(scenes[0].objects)]
    strange = [replace(scenes[0], objects=otters)]
    for given, share in ((scenes, 0.0), (strange, 0.5)):
        rooms = train.rooms_to_read(args, 20, given)
        read = [{o.category.split()[0] for o in room.objects} == {"otter"} for room in rooms]
        assert np.mean(read) == share
