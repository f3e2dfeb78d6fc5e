"""MODLE: every question answered again from the boxes alone; what its scores mean; its files."""

import itertools
import json
import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from pytest import approx
from test_questions import apart, by_task, check_number, draws, ends, hand, named, only, slots, support

import data
import evaluate
import spatial3dllm as modle
import train
from data import Sample

ASKED = {"modle_distance": 8, "modle_move": 7, "modle_place": 5}  # how many a scan gets


@pytest.fixture(scope="module", autouse=True)
def question_types():
    data.adopt(modle)
    evaluate.adopt(modle)


@pytest.fixture(scope="module")
def scenes():
    rooms = [data.room(seed, views=0, points=0) for seed in range(100)]
    return {s.name: s for s in rooms}


@pytest.fixture(scope="module")
def asked(scenes):
    return by_task(scenes, [*ASKED, "unseen_move"], 2, 5)


# ---- the slow check: its own parser, its own geometry --------------------------------------------

SIDES = {"left": (0, -1), "right": (0, 1), "front": (1, -1), "back": (1, 1)}
AXES = ["sideways", "lengthways"]

# what fills slots of a wording that lie beside each other
FORMS = {"amount": r"\d\.\d\d", "direction": r"to the \w+", "axis": "|".join(AXES)}


def side_of(words):
    """Axis and sign of "to the left"."""
    return SIDES[words["direction"].split()[-1]]


def new_box(kind, words, thing, anchor):
    """Where the thing is meant to be, from the words alone."""
    x = thing.box.copy()
    if kind == "towards":
        k = AXES.index(words["axis"])
        x[k] += math.copysign(float(words["amount"]), anchor.box[k] - x[k])
        return x
    if anchor:
        x[:2] = anchor.box[:2]
    if "direction" in words:
        k, sign = side_of(words)
        x[k] += sign * float(words["amount"])
    if kind == "floor":
        x[2] = x[5] / 2
    if kind == "top":
        x[2] = anchor.box[2] + anchor.box[5] / 2 + x[5] / 2
    return x


def check_place(scene, thing, put):
    """Inside the room, in nothing, held by something, elsewhere than before."""
    out = (ends(put) - scene.bounds) * [[-1], [1]]
    assert out.max() <= 0.021
    rest = [o for o in scene.objects if o is not thing]
    for o in rest:
        thin = np.minimum(put.box, o.box)[3:] / 2
        free = -apart(put, o) <= thin.clip(max=0.01) + 1e-9
        assert free.any() or o.box[5] < 0.05

    # it stands on the floor or with three quarters of its base on one thing, or is held as it was before
    held = support(put, replace(scene, objects=[*rest, put]))
    if isinstance(held, data.Thing):
        assert (-apart(put, held)).clip(0)[:2].prod() >= 0.749 * put.box[3:5].prod()
    else:
        assert held in ("floor", support(thing, scene))

    # IoU with the old place
    assert data.box_iou(thing.box[None], put.box[None]) < 0.25

    # what can be moved, without leaving something in the air
    assert thing.category not in ("door", "window")
    assert thing.box[5] >= 0.05
    assert not any(support(o, scene) is thing for o in rest)


def test_distances_are_those_between_the_centers_of_what_the_words_mean(asked):
    """Reasoning takes three differences."""
    assert len(asked["modle_distance"]) == 200
    for s, scene in asked["modle_distance"]:
        a, b = named(s, scene)
        assert a is not b
        assert s.about == [a.id, b.id]
        assert s.answer == f"{s.value:.2f}"
        check_number(s, scene)


def test_no_stage_asks_in_the_wordings_of_the_unseen_benchmarks():
    assert "unseen" not in str(modle.STAGES)
    texts = [text for some in data.TEMPLATES.values() for text in set(some) if "{what}" in text]
    for text in itertools.chain(*modle.UNSEEN.values()):
        assert texts.count(text) == 1


@pytest.mark.parametrize(
    ("task", "kinds"),
    [(f"{name}_move", {"axis", "towards", "beside"}) for name in ("modle", "unseen")]
    + [("modle_place", {"floor", "top"})],
)
def test_edits_end_where_their_words_say_and_only_where_there_is_room_and_support(asked, task, kinds):
    counts = Counter(s.kind for s, _ in asked[task])
    assert counts.keys() == kinds
    assert min(counts.values()) >= 20
    assert counts.total() > 150
    for s, scene in asked[task]:
        # what the words mean
        words = slots(s, **FORMS)
        thing = only(scene, words["what"])
        anchor = only(scene, words["other"]) if "other" in words else None
        put = replace(thing, box=s.box)
        assert s.about == [o.id for o in (thing, anchor) if o]
        assert s.template == f"{task}_{s.kind}"
        assert s.box == approx(new_box(s.kind, words, thing, anchor))
        assert s.answer == data.listed(s.box), "the truth, rounded"
        check_place(scene, thing, put)

        # what is special about its kind
        if s.kind == "towards":  # and not past it
            k = AXES.index(words["axis"])
            between = abs(anchor.box - thing.box)
            assert between[k] >= max(0.3, between[1 - k], float(words["amount"]))
        if s.kind == "beside":
            assert support(anchor, scene) != "wall"
        if s.kind in ("beside", "floor"):
            k, _ = side_of(words)
            assert apart(put, anchor)[k] <= 0.6 + 1e-9
        if s.kind == "floor":
            assert support(anchor, scene) == "floor"
        if s.kind == "top":
            assert support(put, scene) is anchor


# ---- which edits are asked -----------------------------------------------------------------------


def test_a_room_that_is_full_bare_or_of_unknown_scale_is_asked_nothing():
    full = hand(("red bed", 0, 0, 0.5, 9.9, 9.9))
    pair = hand(("red chair", 0, 0), ("blue table", 2, 0))
    assert draws(pair, "modle_distance")
    for scene, task in itertools.product((full, hand(), replace(pair, metric=False)), ASKED):
        assert not draws(scene, task)


def test_a_scene_without_names_is_asked_by_color_and_size():
    """Also without bounds: the room is then what its boxes fill."""
    scene = hand(
        ("red ", 0, 0, 1.0, 0.5, 0.5, 2.0),
        ("blue ", 2, 0),
        ("blue ", -2, 0, 0.2, 0.5, 0.5, 0.4),
    )
    for bounds in (scene.bounds, None):
        room = replace(scene, bounds=bounds)
        assert "the red thing" in " ".join(s.question for s in draws(room, "modle_distance"))
        assert draws(room, "modle_move")


# ---- tiny preset: reasoning and drills --------------------------------------------------------


def number(word):
    """The value of "x1.25"."""
    return float(word[1:])


def check_sums(words):
    """Every sum, side and stack among the words is right; count them."""
    checked = 0
    for k in range(len(words) - 2):
        a, b, c = words[k : k + 3]
        axis, sign = SIDES.get(b) or SIDES.get(c, (0, 0))
        if b in SIDES and c[0].isdigit():  # from, side, amount, to
            end = words[k + 3]
            assert a[0] == end[0] == "xy"[axis]
            assert number(end) == approx(number(a) + sign * float(c), abs=0.0101)
        elif c in SIDES and a not in SIDES and b[0] in "xy":  # there, here, side
            assert a[0] == b[0] == "xy"[axis]
            assert (number(a) > number(b)) == (sign > 0)
        elif a[0] == "z" and b[0] == "h":  # from, height of what stands there, up
            assert number(c) == approx(number(a) + number(b) / 2, abs=0.0151)
        else:
            continue
        checked += 1
    return checked


def test_reasoning_begins_with_the_boxes_it_is_about(asked):
    for s, scene in itertools.chain(*asked.values()):
        words = slots(s, **FORMS)
        for i, slot in zip(s.about, ("what", "other"), strict=False):
            pattern = rf"(?:^|\] ){re.escape(words[slot])} (\[[^]]*\])"
            shown = json.loads(re.search(pattern, s.reasoning)[1])
            assert shown == approx(scene.thing(i).box[: len(shown)], abs=0.0051)


def test_reasoning_of_an_edit_adds_neighbors_and_ends_at_the_truth_to_centimeters(asked):
    least = {"axis": 1, "towards": 2, "beside": 1, "floor": 1, "top": 2}
    for s, _ in asked["modle_move"] + asked["modle_place"]:
        *words, end = s.reasoning.rpartition("]")[2].split()
        assert end == "="
        assert check_sums(words) >= least[s.kind]
        said = data.tuples(s.answer, 6)[0]
        assert said == approx(s.box, abs=0.0051)
        for before, word in itertools.pairwise(words):
            if before[0].isdigit():
                assert said["xy".index(word[0])] == number(word)
        last = words[-1]
        assert said["xyz".index(last[0])] == approx(number(last), abs=0.0101)


@pytest.mark.parametrize("task", ["modle_add", "modle_side", "modle_stack"])
def test_drills_are_the_single_steps_of_edits(scenes, task):
    for scene in list(scenes.values())[:20]:
        for s in draws(scene, task, 4):
            *words, end = s.question.split()
            assert end == "="
            assert check_sums([*words, s.answer]) == 1


def test_the_tiny_tokenizer_knows_every_word_and_number(asked):
    text = data.TinyText(data.vocabulary())
    for s, _ in itertools.chain(*asked.values()):
        ids = text.encode(f"{s.reasoning} {s.answer}")
        assert text.unk not in ids + text.encode(s.question)
        assert len(ids) <= 41
        said = text.decode(ids).rpartition("=")[2]
        truth = s.value if s.box is None else list(s.box)
        assert json.loads(said) == approx(truth, abs=1 / 32 + 0.0051)


# ---- scores --------------------------------------------------------------------------------------

HOME = hand(
    ("red chair", 0, 0),
    ("blue table", 2, 0, 0.4, 1, 1, 0.8),
    ("red bin", 0, 2),
)
MOVE = Sample("m", "hand", "modle_move", "", "", box=np.array([0, 1, 0.5, 0.5, 0.5, 1]), about=[1])
FAR_OFF = Sample("d", "hand", "modle_distance", "", "2.00", value=2.0, about=[1, 2])


def scored(sample, text):
    return list(evaluate.BENCHMARKS[f"rooms/{sample.task}"].score(text, sample, HOME).values())


@pytest.mark.parametrize(
    ("text", "scores"),  # Acc@0.25, Acc@0.5, meters between centers, collision
    [
        ("[0, 1, 0.5, 0.5, 0.5, 1]", [1, 1, 0.0, 0]),  # the truth
        ("it is then at [0, 1.25, 0.5, 0.5, 0.5, 1].", [1, 0, 0.25, 0]),  # IoU 1/3
        ("[0, 0, 0.5, 0.5, 0.5, 1]", [0, 0, 1.0, 0]),  # not moved: its own old place is free
        ("[0, 1.6, 0.5, 0.5, 0.5, 1]", [0, 0, 0.6, 1]),  # in the bin
        ("[2, 1, 0.5, 0.5, 0.5, 1]", [0, 0, 2.0, 0]),
        ("[4.85, 1, 0.5, 0.5, 0.5, 1]", [0, 0, 4.85, 1]),  # in the wall
        ("[0, 1, 0.3, 0.5, 0.5, 1]", [1, 1, 0.2, 1]),  # in the floor
        ("[99, 1, 0.5, 0.5, 0.5, 1]", [0, 0, 10.0, 1]),  # no error counts more than 10 m
    ],
)
def test_what_an_edit_scores(text, scores):
    assert scored(MOVE, text) == approx(scores)


@pytest.mark.parametrize(
    ("text", "scores"),  # within 20 %, meters off, mean relative accuracy
    [
        ("2.00", [1, 0.0, 1.0]),
        ("about 2.3 m", [1, 0.3, 0.8]),
        ("1.5", [0, 0.5, 0.6]),
        ("5", [0, 3.0, 0.0]),
        ("99", [0, 10.0, 0.0]),
    ],
)
def test_what_a_distance_scores(text, scores):
    assert scored(FAR_OFF, text) == approx(scores)


NO_BOX = [
    "", "no", "[]", "[,,,,,]", "[1, 2, 3]", "[nan, 0, 0, 1, 1, 1]", "[inf, 0, 0, 1, 1, 1]", "][",
    "[1, 2, 3, 4, 5, -6]", "[1, 2, 3, 0, 5, 6]", "[a, b, c, d, e, f]", "[1, 2, 3, 4, 5, 1e999]",
    "[" * 5000, "=", "\0", "\ud800", "<OBJ003>", "[[0, 1, 0.5], [0.5, 0.5, 1]]",
]  # fmt: skip


def test_what_is_no_answer_scores_nothing_and_raises_nothing():
    for text in NO_BOX:
        assert scored(MOVE, text) == [0, 0, 10, 1]
    for text in ("", "far", "\0"):
        assert scored(FAR_OFF, text) == [0, 10, 0]


# ---- written down --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Six scans in ScanNet's layout: five to train, one to test."""
    root = tmp_path_factory.mktemp("scans")
    for seed in range(6):
        scene = replace(data.room(seed, 8, views=1, size=32, points=3000), name=f"scene{seed:04d}_00")
        data.write_scannet(scene, root)
    return root


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory):
    """What the command writes about the scans, a few questions each."""
    out = tmp_path_factory.mktemp("questions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modle, "PER_SCENE", ASKED)
        assert modle.main(["modle", "--root", str(root), "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(("split", "scans"), [("train", 5), ("test", 1)])
def test_the_command_writes_true_questions_in_the_scans_own_numbers(root, folder, split, scans):
    written = json.loads((folder / f"modle_{split}.json").read_text())
    assert "x to the right, y to the back" in written["frame"]
    rows = written["questions"]
    assert len({row["scene_id"] for row in rows}) == scans
    different = {(row["scene_id"], row["question"]) for row in rows}
    assert len({row["id"] for row in rows}) == len(different) == len(rows)
    assert Counter(row["task"] for row in rows)["modle_distance"] == 8 * scans
    for row in rows:
        scene = data.read_scannet(root / row["scene_id"], max_frames=0)
        boxes = [scene.thing(i + 1).box for i in row["object_ids"]]  # ScanNet's objectId
        if row["task"] == "modle_distance":
            distance = math.dist(*(box[:3] for box in boxes))
            assert row["value"] == approx(distance, abs=1e-4)
        else:
            assert row["box"][3:] == approx(boxes[0][3:], abs=1e-4)


@pytest.mark.parametrize("task", ASKED)
def test_the_right_answers_to_what_the_command_writes_score_best(root, folder, task):
    best = [1, 0, 1] if task == "modle_distance" else [1, 1, 0, 0]
    name = task.replace("_", "/")
    samples = evaluate.read_official(name, folder)
    assert samples
    for s in samples:
        scene = data.read_scannet(root / s.scene, max_frames=0)
        scores = evaluate.BENCHMARKS[name].score(s.answer, s, scene).values()
        assert list(scores) == approx(best, abs=0.01)


def test_what_the_command_writes_is_trained_on_and_without_files_questions_are_made(root, folder, tmp_path):
    """Training takes the other scans, as the paper's mixture names them."""
    known, held = (data.load_scenes("scannet", split, root) for split in ("train", "test"))
    written = {k: v for k, v in modle.INSTRUCTIONS.items() if v.benchmark.startswith("modle/")}
    made = {task: data.Source(task.replace("_", "/"), 1201 * count) for task, count in ASKED.items()}
    for sources, files in ((written, folder), (made, tmp_path)):
        listed, report = evaluate.mixture(sources, files, root, known, held)
        assert len(report) == 3
        assert listed.keys() == {scene.name for scene in known}
        assert {s.task for own in listed.values() for s in own} == ASKED.keys()
    assert Counter(s.task for s in listed[known[0].name])["modle_distance"] == 8


def test_an_answer_s_box_lies_in_the_scene_as_it_is_shown(asked, rng):
    """Scenes are turned at random; the text of a file, with its boxes and sides, is not."""
    for s, scene in asked["modle_move"][:20]:
        dataset = train.OfficialQuestions(None, [scene], data.Stage("x", {}, (), "x", epochs=1), (0, 0))
        shown, _ = dataset.ask(rng, 0, [s])
        assert repr(shown.objects) == repr(scene.objects)
        assert len(shown.identifiers) == len(scene.objects)


def test_the_papers_number_of_questions_comes_from_its_scans():
    assert sum(modle.PER_SCENE.values()) * 1201 // 1000 == 263
