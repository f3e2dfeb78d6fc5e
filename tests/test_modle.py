"""MODLE: every question answered again from the boxes alone, the slow way; locations as text; what the scores mean."""

import itertools
import json
import math
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_evaluate import STAGE, Echo
from test_questions import ends, find, only, support

import data
import evaluate
import spatial3dllm as modle
import train
from data import DataError, Sample, Scene, Thing
from evaluate import BENCHMARKS, Case, Questions
from spatial3dllm import TASKS, TEMPLATES, distinct, read_locations, translate

ASKED = [task for task in TASKS if task not in ("modle_add", "modle_stack")]


@pytest.fixture(scope="module", autouse=True)
def question_types():
    data.adopt(modle)


@pytest.fixture(scope="module")
def scenes():
    """200 rooms; a few are crowded and have frames, for the slice of what is seen once."""
    crowded = dict(objects=40, views=12)
    rooms = [data.room(k, size=48, points=0, **(crowded if k % 20 == 0 else dict(views=0))) for k in range(200)]
    return {s.name: s for s in rooms}


@pytest.fixture(scope="module")
def asked(scenes):
    draws = ((task, s, next(distinct(s, task, 5, patience=8), None)) for s in scenes.values() for task in ASKED)
    found = {task: [] for task in ASKED}
    for task, scene, sample in draws:
        found[task] += [(sample, scene)] if sample else []
    return found


def thing(id, category, colour, x, y, z=0.5, w=0.5, d=0.5, h=1.0):
    return Thing(id, category, colour, np.array([x, y, z, w, d, h], float))


def hand(*things, **rest):
    return Scene("hand", "rooms", list(things), bounds=np.array([[-3, -3, 0], [3, 3, 2.5]]), **rest)


# ---- the slow check: its own parser, its own geometry ----------------------------------------------------------------

AXES = {"along x to the left": (0, -1), "along x to the right": (0, 1),
        "along y to the front": (1, -1), "along y to the back": (1, 1)}  # fmt: skip


def pattern(wording):
    """The wording as a regular expression; a slot that stands there twice must hold the same words."""
    seen = set()
    forms = {"amount": r"\d\.\d\d", "axis": "[xy]", "direction": "|".join(AXES), "opposite": "|".join(AXES)}
    slot = lambda m: (f"(?P={m[1]})" if m[1] in seen else  # noqa: E731
                      seen.add(m[1]) or f"(?P<{m[1]}>{forms.get(m[1], '.+?')})")  # fmt: skip
    return re.sub(r"\\{(\w+)\\}", slot, re.escape(wording))


def read(sample):
    """(template, words that fill it)."""
    template, number = re.match(r"(\w+)#(\d+)", sample.wording).groups()
    return template, re.fullmatch(pattern(TEMPLATES[template][int(number)]), sample.question).groupdict()


def iou(a, b):
    shared = 1.0
    for k in range(3):
        high, low = min(a[k] + a[k + 3] / 2, b[k] + b[k + 3] / 2), max(a[k] - a[k + 3] / 2, b[k] - b[k + 3] / 2)
        shared *= max(0.0, high - low)
    return shared / (math.prod(a[3:]) + math.prod(b[3:]) - shared)


def new_box(template, words, thing, anchor):
    """Where the thing is meant to be, from the words alone."""
    x = list(thing.box)
    if "axis" in words:
        k = "xy".index(words["axis"])
        x[k] += math.copysign(float(words["amount"]), anchor.box[k] - x[k])
        return x
    if anchor:
        x[0], x[1] = anchor.box[:2]
    if "direction" in words:
        k, sign = AXES[words["direction"]]
        x[k] += sign * float(words["amount"])
    if "floor" in template:
        x[2] = x[5] / 2
    if "top" in template:
        x[2] = anchor.box[2] + anchor.box[5] / 2 + x[5] / 2
    return x


def check_place(scene, thing, box):
    """Inside the room, in nothing, held by something, elsewhere than before."""
    put = replace(thing, box=np.array(box))
    rest = [o for o in scene.objects if o is not thing]
    for k in range(3):
        assert scene.bounds[0, k] - 0.021 <= ends(put, k)[0] and ends(put, k)[1] <= scene.bounds[1, k] + 0.021
    for o in rest:
        depth = [min(ends(put, k)[1], ends(o, k)[1]) - max(ends(put, k)[0], ends(o, k)[0]) for k in range(3)]
        thin = [min(put.box[3 + k], o.box[3 + k]) / 2 for k in range(3)]
        assert o.box[5] < 0.05 or any(d <= min(0.01, t) + 1e-9 for d, t in zip(depth, thin, strict=True))
    before = support(thing, scene)
    assert before is None or support(put, replace(scene, objects=[*rest, put])) is not None
    assert iou(thing.box, box) < 0.25
    assert thing.category not in ("door", "window") and thing.box[5] >= 0.05
    assert not any(support(o, scene) is thing for o in rest), "what stands on it would be left in the air"


@pytest.mark.parametrize("task", [t for t in ASKED if "distance" in t])
def test_distances_are_those_between_the_centres_of_what_the_words_mean(asked, task):
    assert len(asked[task]) > (3 if "one_view" in task else 195)
    for s, scene in asked[task]:
        _, words = read(s)
        a, b = only(scene, words["what"]), only(scene, words["other"])
        assert s.about == [a.id, b.id] and a is not b
        assert s.value == pytest.approx(math.dist(a.box[:3], b.box[:3]))
        assert float(s.answer) == pytest.approx(s.value, abs=0.014)


@pytest.mark.parametrize("task", [t for t in ASKED if "move" in t or "place" in t])
def test_edits_end_where_their_words_say_and_only_where_there_is_room_and_support(asked, task):
    assert len(asked[task]) > (3 if "one_view" in task else 180)
    for s, scene in asked[task]:
        template, words = read(s)
        thing = only(scene, words["what"])
        anchor = only(scene, words["other"]) if "other" in words else None
        assert s.about == [o.id for o in (thing, anchor) if o]
        assert s.box == pytest.approx(new_box(template, words, thing, anchor))
        check_place(scene, thing, s.box)
        assert read_locations(s.answer, 6)[0] == pytest.approx(s.box, abs=0.011 if template.count("move") else 0.021)
        if "towards" in template:  # and not past it
            k = "xy".index(words["axis"])
            assert float(words["amount"]) <= abs(anchor.box[k] - thing.box[k]) >= 0.3
        if "beside" in template or "floor" in template:
            k = AXES[words["direction"]][0]
            assert float(words["amount"]) - (thing.box[3 + k] + anchor.box[3 + k]) / 2 <= 0.6 + 1e-9
        if "floor" in template:
            assert support(anchor, scene) == "floor"
        if "top" in template:
            assert support(replace(thing, box=s.box), scene) is anchor


def test_all_kinds_of_edits_are_asked(asked):
    kinds = {task: Counter(s.kind for s, _ in asked[task]) for task in ("modle_move", "modle_place", "modle_refuse")}
    assert {task: set(k) for task, k in kinds.items()} == {
        "modle_move": {"axis", "towards", "beside"}, "modle_place": {"floor", "top"},
        "modle_refuse": {"ambiguous", "contradictory"}}  # fmt: skip
    assert all(n >= 20 for k in kinds.values() for n in k.values())


@pytest.mark.parametrize("task", ["modle_refuse", "modle_refuse_loose"])
def test_refused_is_what_fits_several_things_or_contradicts_itself(asked, task):
    assert len(asked[task]) > 150
    for s, scene in asked[task]:
        _, words = read(s)
        if s.kind == "ambiguous":
            named = [words[k] for k in ("what", "other") if k in words]
            assert s.answer == "more than one thing fits." and max(len(find(scene, n)) for n in named) > 1
        else:
            sides = {w for w in ("left", "right", "front", "back") if re.search(rf"\b{w}\b", s.question)}
            itself = len(re.findall(re.escape(f"the {words['what']}"), s.question)) == 2
            assert s.answer == "this contradicts itself."
            assert itself or sides in ({"left", "right"}, {"front", "back"})
        assert not s.steps and s.box is None and s.value is None


def test_one_view_asks_about_what_one_frame_shows(asked):
    for s, scene in [*asked["modle_move_one_view"], *asked["modle_distance_one_view"]]:
        shown = [sum((mask == i).sum() >= 0.002 * mask.size for mask in scene.frames.masks) for i in s.about]
        assert 1 in shown[: 1 if s.box is not None else 2]


def test_steps_only_show_boxes_and_add_neighbours(asked):
    """What follows the located things is sums of two neighbours; the answer repeats the first box but for the sums."""
    for s, scene in [pair for task in ASKED for pair in asked[task] if "refuse" not in task]:
        things = [scene.thing(i) for i in s.about]
        for o, words in zip(things, (read(s)[1][k] for k in ("what", "other") if k in read(s)[1]), strict=True):
            located = re.search(rf"(?:^|\] ){re.escape(words)} \[([^]]*)\]", s.steps)
            shown = [float(v) for v in located[1].split(",")]
            assert shown == pytest.approx(o.box[: len(shown)], abs=0.0051)
        tail = s.steps.rpartition("]")[2].removesuffix("=").split()
        if s.box is None:
            assert len(tail) == 9
            for p, q, d in zip(*[iter(tail)] * 3, strict=True):
                assert p[0] == q[0] and abs(abs(float(p[1:]) - float(q[1:])) - float(d)) < 0.0051
            assert math.hypot(*map(float, tail[2::3])) == pytest.approx(float(s.answer), abs=0.0051)
            continue
        answer = read_locations(s.answer, 6)[0]
        if len(tail) in (4, 7):
            x, side, amount, total = tail[:4]
            sign = {"left": -1, "right": 1, "front": -1, "back": 1}[side]
            assert float(total[1:]) == pytest.approx(float(x[1:]) + sign * float(amount), abs=0.0051)
            assert answer["xy".index(total[0])] == float(total[1:])
        if len(tail) > 4:
            for z, h, up in (tail[i : i + 3] for i in range(len(tail) - 3 if len(tail) == 7 else 0, len(tail) - 2, 2)):
                assert float(up[1:]) == pytest.approx(float(z[1:]) + float(h[1:]) / 2, abs=0.0101)
            assert answer[2] == float(tail[-1][1:])
        assert answer[3:] == pytest.approx(things[0].box[3:], abs=0.0051)


def test_drills_are_the_two_sums_of_the_steps(scenes):
    rng = np.random.default_rng(0)
    for scene in list(scenes.values())[:50]:
        x, side, amount, _ = (s := TASKS["modle_add"](scene, rng)).question.split()
        sign = {"left": -1, "right": 1, "front": -1, "back": 1}[side]
        assert float(s.answer[1:]) == pytest.approx(float(x[1:]) + sign * float(amount)) and s.answer[0] == x[0]
        assert x[0] == ("x" if side in ("left", "right") else "y")
        z, h, _ = (s := TASKS["modle_stack"](scene, rng)).question.split()
        assert float(s.answer[1:]) == pytest.approx(float(z[1:]) + float(h[1:]) / 2, abs=0.0051) and s.answer[0] == "z"


# ---- which edits are refused -----------------------------------------------------------------------------------------


def places(scene, i, *boxes):
    return modle.allowed(data.facts(scene), i, np.array(boxes, float)).tolist()


def test_an_edit_out_of_the_room_into_a_thing_into_the_air_or_back_is_refused():
    scene = hand(thing(1, "chair", "red", 0, 0), thing(2, "table", "blue", 2, 0, 0.4, 1, 1, 0.8),
                 thing(3, "rug", "gray", 0, 2, 0.01, 1, 1, 0.02))  # fmt: skip
    chair = scene.objects[0].box
    at = lambda x, y, z: [x, y, z, *chair[3:]]  # noqa: E731
    good = at(-2, -2, 0.5), at(0, 2, 0.5), at(2, 0, 1.3)  # free floor, a rug, the table's top
    bad = at(-2.9, 0, 0.5), at(1.7, 0, 0.5), at(-2, -2, 0.8), at(0.1, 0, 0.5), at(2, 0, 1.9)
    assert places(scene, 0, *good, *bad) == [True] * 3 + [False] * 5


def test_what_carries_a_thing_a_door_and_a_rug_stay_where_they_are():
    scene = hand(thing(1, "table", "red", 0, 0, 0.4, 1, 1, 0.8), thing(2, "vase", "blue", 0, 0, 1.0, 0.2, 0.2, 0.4),
                 thing(3, "rug", "gray", 0, 2, 0.01, 1, 1, 0.02), thing(4, "door", "", 2.97, 0, 1, 0.06, 0.9, 2))
    assert modle.movable(data.facts(scene)) == [1]


def test_a_thing_in_a_room_that_it_fills_has_nowhere_to_go():
    full = hand(thing(1, "bed", "red", 0, 0, 0.5, 5.9, 5.9))
    rng = np.random.default_rng(0)
    assert not any(TASKS[f"modle_{task}"](full, rng) for task in ("move", "place", "distance") for _ in range(20))


def test_a_scene_of_unknown_scale_or_without_things_is_asked_nothing():
    rng = np.random.default_rng(0)
    two = hand(thing(1, "chair", "red", 0, 0), thing(2, "table", "blue", 2, 0), metric=False)
    for task, scene in itertools.product(TASKS, (two, hand(metric=False), hand())):
        sample = TASKS[task](scene, rng)
        assert sample is None or "refuse" in task or (scene.metric and not sample.about)
        assert "refuse" in task or data.refusal(two, task)


def test_a_run_on_an_unlabelled_scene_keeps_modles_tasks():
    """Questions about names are swapped for others there; MODLE's speak of colour and size."""
    stage = data.Stage("I", {"modle_move": 0.5, "modle_add": 0.2, "count": 0.3}, ())
    (kept,) = train.askable([stage], [hand(thing(1, "", "red", 0, 0))], modle, print)
    assert kept.tasks["modle_move"] == 0.5 + 0.3 / 3 and kept.tasks["modle_add"] == 0.2 and "count" not in kept.tasks


def test_an_unlabelled_scene_is_asked_by_colour_and_size():
    blue = thing(2, "", "blue", 2, 0), thing(3, "", "blue", -2, 0, 0.2, h=0.4)
    scene = hand(thing(1, "", "red", 0, 0, 1.0, h=2.0), *blue)
    rng = np.random.default_rng(0)
    assert "the red thing" in " ".join(TASKS["modle_distance"](scene, rng).question for _ in range(20))
    assert any(TASKS["modle_move"](scene, rng) for _ in range(20))
    assert "the blue thing" in " ".join(TASKS["modle_refuse"](scene, rng).question for _ in range(20))


# ---- wordings, words, tokens -----------------------------------------------------------------------------------------


def test_the_two_sets_of_wordings_share_no_question(asked):
    loose = {w for k, row in TEMPLATES.items() if k.endswith("_loose") for w in row}
    trained = {w for k, row in TEMPLATES.items() if not k.endswith("_loose") for w in row if w != "{numbers} ="}
    assert len(loose) >= 15 and len(trained) >= 15 and not loose & trained
    for task in ASKED:
        if task.endswith("_loose"):
            assert not any(re.fullmatch(pattern(w), s.question) for s, _ in asked[task] for w in trained)
        else:
            assert not any(re.fullmatch(pattern(w), s.question) for s, _ in asked[task] for w in loose)


def test_looser_wordings_are_never_trained_and_have_rows_of_their_own():
    loose = [task for task in TASKS if task.endswith(("_loose", "_one_view"))]
    assert data.NEVER_TRAINED.issuperset(loose) and not data.NEVER_TRAINED.intersection(modle.SHARES)
    for task in loose:
        row = BENCHMARKS[f"rooms/{task}"]
        assert row.tasks == (task,) and row.beside == (re.sub("_loose|_one_view", "", task),)


def test_the_tiny_tokenizer_knows_every_word_and_number(asked, scenes):
    """Importing the file puts its wordings where data.vocabulary looks."""
    text = data.TinyText(data.vocabulary())
    for s, _ in (pair for task in ASKED for pair in asked[task]):
        whole = f"{s.question} {s.steps} {s.answer}"
        assert text.unk not in text.encode(whole.replace("'", ""))
        answer = text.decode(text.encode(f"{s.steps} {s.answer}")).rpartition("=")[2].strip()
        if s.box is not None:
            assert read_locations(answer, 6)[0] == pytest.approx(read_locations(s.answer, 6)[0], abs=1 / 32 + 1e-9)
        elif s.value is not None:
            assert float(answer) == pytest.approx(float(s.answer), abs=1 / 32 + 1e-9)
        else:
            assert answer == s.answer
        assert len(text.encode(f"{s.steps} {s.answer}")) <= 40


# ---- locations as text -----------------------------------------------------------------------------------------------

ROOM = np.array([[-3, -2, 0], [3, 4, 2.5]])
NOTHING = ["", " ", "no", "[]", "[ ]", "[,]", "[,,,,,]", "[1]", "[1, 2]", "[1, 2, 3]", "[1, 2, 3, 4]", "[1 2 3 4 5]",
           "[nan, 0, 0, 1, 1, 1]", "[inf, 0, 0, 1, 1, 1]", "[1, 2, 3, 4, 5, -6]", "[1, 2, 3, 0, 5, 6]", "[0 0 0 0 0 0]",
           "[a, b, c, d, e, f]", "[1, 2, 3, 4, 5, x]", "[1e999, 0, 0, 1, 1, 1]", "[1, 2, 3, 4, 5, 1e999]", "[[[[[[",
           "]]]]]]", "][", "((()))", ")(", "{1, 2}", "more than one thing fits.", "this contradicts itself.", "\0",
           "\ud800", "[" * 5000, "9" * 5000, "-" * 99, "." * 99, "1." * 50, "=", "= = =", "<OBJ003>", "1.2.3.4.5.6.7",
           "0x10", "\u00bd \u00b2", "[\u0661, \u0662]", "(1, 2, 3, 4, 5)", "(nan, 1, 1, 1, 1, 1)", "null", "None",
           "x1.25", "[--1, 2]", "[1 2 3 4 5 NaN]", "[1;2;3;4;5;-0]"]  # fmt: skip
NOTHING += [f"{a}{b}" for a in ("the box is ", "it, ", "]", "=[", "\n\t") for b in NOTHING[:10]]


def test_locations_survive_writing_and_reading_in_either_form():
    rng = np.random.default_rng(0)
    for size, step in itertools.product((3, 6), ("metres", "grid")):
        for _ in range(50):
            values = rng.uniform(ROOM[0], ROOM[1])
            values = np.concatenate([values, rng.uniform(0.1, 2, 3)])[:size]
            text = modle.LOCATIONS[step][0](values, ROOM)
            (found,) = read_locations(f"it is at {text}.", size, ROOM, step)
            assert found == pytest.approx(values, abs=0.0051 if step == "metres" else 6 / 255 / 2 + 1e-9)


def test_the_grid_runs_from_0_to_255_over_the_room():
    assert modle.write_grid([-3, -2, 0], ROOM) == "[0, 0, 0]"
    assert modle.write_grid([3, 4, 2.5], ROOM) == "[255, 255, 255]"
    assert modle.write_grid([0, 1, 1.25, 6, 3, 9], ROOM) == "[128, 128, 128, 255, 128, 255]"
    assert modle.write_grid([-9, 9, 0], ROOM) == "[0, 255, 0]"


def test_questions_and_answers_translate_as_whole_sentences():
    text = "from [0.00, 1.00, 1.25] to [3.00, 4.00, 2.50, 6.00, 3.00, 1.00], not [7] or [a, b, c]"
    grid = translate(text, ROOM, "metres", "grid")
    assert grid == "from [128, 128, 128] to [255, 255, 255, 255, 128, 102], not [7] or [a, b, c]"
    metres = translate(grid, ROOM, "grid", "metres")
    assert metres == "from [0.01, 1.01, 1.25] to [3.00, 4.00, 2.50, 6.00, 3.01, 1.00], not [7] or [a, b, c]"


@pytest.mark.parametrize("said", ["[1, 2, 0.5, 1, 1, 1]", "(1, 2, 0.5, 1, 1, 1)", "[1 2 .5 1 1 1]", "[1;2;0.5;1;1;1]",
                                  "1, 2, 0.5, 1, 1, 1", "x 1 y 2 z 0.5, size 1 by 1 by 1", "[1, 2, 0.5, 1, 1, 1",
                                  "box: [1.00, 2.00, 0.50, 1, 1, 1]!", "[9] [1, 2, 0.5, 1, 1, 1] [7, 8]"])  # fmt: skip
def test_a_box_is_read_however_it_is_put(said):
    assert read_locations(said, 6)[0].tolist() == [1, 2, 0.5, 1, 1, 1]


def test_a_hundred_malformed_answers_hold_nothing_and_raise_nothing():
    assert len(set(NOTHING)) >= 90 and len(NOTHING) >= 100
    for text, form in itertools.product(NOTHING, modle.LOCATIONS):
        assert read_locations(text, 6, ROOM, form) == []
        read_locations(text, 3, ROOM, form), translate(text, ROOM, form, "metres")


def test_the_grid_needs_bounds_and_a_known_form():
    with pytest.raises(DataError, match="bounds"):
        modle.write_grid([0, 0, 0], None)
    with pytest.raises(DataError, match="metres, grid"):
        read_locations("[1, 2, 3]", 3, ROOM, "feet")


# ---- scores ----------------------------------------------------------------------------------------------------------

TABLE = thing(2, "table", "blue", 2, 0, 0.4, 1, 1, 0.8)
HOME = hand(thing(1, "chair", "red", 0, 0), TABLE, thing(3, "bin", "red", 0, 2))
MOVE = Sample("m", "hand", "modle_move", "move the chair along y to the back by 1.00 metres.", kind="axis", about=[1],
              answer="[0.00, 1.00, 0.50, 0.50, 0.50, 1.00]", box=np.array([0, 1, 0.5, 0.5, 0.5, 1]))  # fmt: skip
FAR_OFF = Sample("d", "hand", "modle_distance", "from centre to centre, how far is the chair from the table?", "2.00",
                 value=2.0, about=[1, 2])  # fmt: skip


def scored(row, sample, text):
    case = Case(sample, text, HOME, HOME)
    return {name.split("/")[0]: metric(case) for name, metric in BENCHMARKS[row].metrics.items()} | {
        name: metric(case) for name, metric in BENCHMARKS[row].metrics.items()}  # fmt: skip


@pytest.mark.parametrize(("text", "acc25", "acc5", "over", "hit", "held"), [
    ("[0, 1, 0.5, 0.5, 0.5, 1]", 1, 1, 0.0, 0, 1),  # the truth
    ("[0, 0, 0.5, 0.5, 0.5, 1]", 0, 0, 1.0, 0, 1),  # not moved
    ("[0, -1, 0.5, 0.5, 0.5, 1]", 0, 0, 2.0, 0, 1),  # the other way
    ("[0, -2.7, 0.5, 0.5, 0.5, 1]", 0, 0, 2.0, 0, 1),  # never worse than that
    ("[0, 1.25, 0.5, 0.5, 0.5, 1]", 1, 0, 0.25, 0, 1),  # IoU 1/3; 25 cm off of 1 m
    ("[0, 1.6, 0.5, 0.5, 0.5, 1]", 0, 0, 0.6, 1, 1),  # in the bin
    ("[0, 1, 1.5, 0.5, 0.5, 1]", 0, 0, 1.0, 0, 0),  # in the air
    ("[2, 0, 1.3, 0.5, 0.5, 1]", 0, 0, 2.0, 0, 1),  # on the table
    ("[2.85, 1, 0.5, 0.5, 0.5, 1]", 0, 0, 2.0, 1, 1),  # in the wall
    ("[0, 1, 0.3, 0.5, 0.5, 1]", 1, 1, 0.2, 1, 0),  # in the floor
    ("no idea", 0, 0, 2.0, 1, 0), ("[0, 1, 0.5, 0.5, 0.5, 0]", 0, 0, 2.0, 1, 0), ("", 0, 0, 2.0, 1, 0),
])  # fmt: skip
def test_what_an_edit_scores(text, acc25, acc5, over, hit, held):
    s = scored("rooms/modle_move", MOVE, text)
    assert (s["acc@0.25/box"], s["acc@0.5/box"], s["collision_rate"], s["support_rate"]) == (acc25, acc5, hit, held)
    assert s["centre_error_over_move"] == pytest.approx(over)
    assert s["centre_error_m"] == pytest.approx(10 if text in ("no idea", "") or text.endswith("0]") else over, abs=1.8)


@pytest.mark.parametrize(("text", "w20", "w10", "half", "quarter", "error", "share", "mra"), [
    ("2.00", 1, 1, 1, 1, 0.0, 0.0, 1.0), ("about 2.3 m", 1, 0, 1, 0, 0.3, 0.15, 0.8),
    ("1.5", 0, 0, 1, 0, 0.5, 0.25, 0.6), ("5", 0, 0, 0, 0, 3.0, 1.0, 0.0), ("far", 0, 0, 0, 0, 10.0, 1.0, 0.0),
])  # fmt: skip
def test_what_a_distance_scores(text, w20, w10, half, quarter, error, share, mra):
    s = scored("rooms/modle_distance", FAR_OFF, text)
    got = [s[k] for k in ("within_20_percent", "within_10_percent", "within_0.5_m", "within_0.25_m", "mae_m",
                          "relative_error", "mra")]  # fmt: skip
    assert got == pytest.approx([w20, w10, half, quarter, error, share, mra])


def test_no_malformed_answer_raises_a_score():
    lower = ("centre_error", "collision", "mae", "relative")
    for row, sample in (("rooms/modle_move", MOVE), ("rooms/modle_distance", FAR_OFF)):
        best, none = scored(row, sample, sample.answer), scored(row, sample, "")
        for text in NOTHING:
            if row == "rooms/modle_distance" and evaluate.number(text) is not None:
                continue  # a number is an answer
            for name, value in scored(row, sample, text).items():
                assert value == none[name]
                assert value >= best[name] if name.startswith(lower) else value <= best[name]


def test_columns_of_the_unmoved_box_and_the_parsed_move_stand_beside_the_models(asked):
    """Unmoved scores 0 by construction; who sees every true box and reads the words right scores 1."""
    for task in ("modle_move", "modle_move_loose", "modle_place", "modle_place_loose"):
        pairs = asked[task][:40]
        questions = Questions([s for s, _ in pairs], {scene.name: scene for _, scene in pairs})
        entry = evaluate.score(f"rooms/{task}", questions, {s.id: "" for s, _ in pairs})
        unmoved, parsed = (entry["columns"][c] for c in ("unmoved box", "true box + parsed move"))
        assert unmoved["acc@0.25/box"] == 0 and unmoved["collision_rate/5_cm"] == 0
        assert parsed["acc@0.5/box"] == 1 and parsed["centre_error_m/capped"] < 0.02
        assert entry["acc@0.25/box"] == 0 and entry["collision_rate/5_cm"] == 1


def test_a_name_that_holds_a_direction_does_not_mislead_the_parsed_move():
    scene = hand(thing(1, "left door", "", 0, 0), thing(2, "floor lamp", "", 2, 0))
    question = "move the left door next to the floor lamp: 1.00 metres along y to the back of its centre."
    s = Sample("m", "hand", "modle_move", question, "", box=np.array([2, 1, 0.5, 0.5, 0.5, 1]), about=[1, 2])
    assert evaluate.parsed_edit(Case(s, "", scene, scene)) == "[2.00, 1.00, 0.50, 0.50, 0.50, 1.00]"


def test_questions_written_and_read_again_score_the_same(asked, tmp_path):
    pairs = asked["modle_move"][:20]
    questions = Questions([s for s, _ in pairs], {scene.name: scene for _, scene in pairs})
    evaluate.write_questions(tmp_path / "q.jsonl", questions, questions.samples)
    answers = {s.id: evaluate.unmoved(Case(s, "", scene, scene)) for s, scene in pairs}
    again = evaluate.score("rooms/modle_move", evaluate.read_questions(tmp_path / "q.jsonl"), answers)
    assert again == evaluate.score("rooms/modle_move", questions, answers)


def test_blind_guesses_a_mean_box_and_does_not_know_what_is_ambiguous(asked):
    """Words alone show a contradiction, but not that there are two chairs."""
    seen = [s for task in ("modle_move", "modle_distance", "modle_refuse") for s, _ in asked[task]]
    seen += [replace(s, id=f"{s.id}b") for s, _ in asked["modle_distance"]]
    blind = data.Blind(seen, least=1000)  # only whole tasks are known well enough
    boxes = [s.box for s, _ in asked["modle_move"]]
    bare = [replace(s, wording=s.task) for s, _ in asked["modle_move"]]
    assert data.tuples(blind.predict(bare[0], None), 6)[0] == pytest.approx(np.mean(boxes, axis=0), abs=0.0051)
    ambiguous = next(s for s, _ in asked["modle_refuse"] if s.wording.startswith("modle_distance"))
    assert evaluate.number(data.Blind(seen).predict(ambiguous, None)) is not None
    form = lambda s: re.sub(r"#\d+|=[^|]*", "", s.wording)  # noqa: E731  template and slots, without their values
    answerable = {form(s) for task in ("modle_distance", "modle_move", "modle_place") for s, _ in asked[task]}
    assert {form(s) for s, _ in asked["modle_refuse"] if s.kind == "ambiguous"} < answerable


def test_blind_knows_the_same_whether_a_benchmark_is_asked_alone(scenes, tmp_path):
    """An ambiguous request has the wording of a measurement: who never saw those would guess the refusal."""
    rooms, tasks = list(scenes.values()), ("modle_distance", "modle_move", "modle_place", "modle_refuse")
    args = SimpleNamespace(seed=3, model="spatial3dllm", data="rooms", out=tmp_path)
    done = SimpleNamespace(args=args, model=Echo(), stages=[replace(STAGE, tasks=dict.fromkeys(tasks, 1.0))],
                           train=rooms[10:40], test=rooms[:4], prepare=lambda scenes: None)  # fmt: skip
    together, alone = (evaluate.evaluate_run(done, names, per_scene=4)["rooms/modle_refuse"]["columns"]["blind"]
                       for names in ((), ["rooms/modle_refuse"]))  # fmt: skip
    assert together == alone and together["em/cleaned/ambiguous"] < together["em/cleaned/contradictory"]


# ---- written down ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Six scans in ScanNet's layout: five to train, one to validate."""
    root = tmp_path_factory.mktemp("scans")
    for seed in range(6):
        scene = replace(data.room(seed, 8, views=0, points=3000), name=f"scene{seed:04d}_00")
        data.write_scannet(scene, root)
    return root


def test_the_manifest_counts_what_the_files_hold(root, tmp_path):
    modle.modle_main(["--root", str(root), "--out", str(tmp_path), "--per-scene", "20", "--seed", "3"])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for split, scans, times in (("train", 5, 1), ("val", 1, 2)):
        rows = json.loads((tmp_path / f"{split}.json").read_text())
        assert len(rows) == manifest[split]["questions"] == times * scans * 20
        assert Counter(r["task"] for r in rows) == manifest[split]["tasks"]
        counts = {k: {t: n for t, n in v.items() if n} for k, v in manifest[split]["scenes"].items()}
        by_scene = {k: Counter(r["task"] for r in rows if r["scene_id"] == k) for k in counts}
        assert by_scene == counts and len(counts) == scans
        assert len({r["id"] for r in rows}) == len({(r["scene_id"], r["question"]) for r in rows}) == len(rows)
    assert manifest["seed"] == 3 and set(manifest["train"]["tasks"]) == set(modle.SHARES)
    assert {t for t in manifest["val"]["tasks"] if t.endswith("_loose")} == {f"{t}_loose" for t in modle.SHARES}


def test_the_files_are_the_same_for_the_same_seed_only(root, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        modle.write_modle(root, tmp_path / name, per_scene=10, seed=seed)
    for file in ("train.json", "val.json", "manifest.json"):
        a, b, c = ((tmp_path / name / file).read_text() for name in "abc")
        assert a == b != c


def test_a_row_tells_where_everything_is_in_the_scans_own_numbers(root, tmp_path):
    modle.write_modle(root, tmp_path, per_scene=20)
    for row in json.loads((tmp_path / "train.json").read_text()):
        scene = data.read_scannet(root, row["scene_id"], max_frames=0)
        boxes = {o.id - 1: o.box for o in scene.objects}  # ScanNet's objectId
        if row["task"] == "modle_distance":
            a, b = (boxes[i][:3] for i in row["object_ids"])
            assert row["value"] == pytest.approx(math.dist(a, b), abs=1e-4)
        elif row["task"] != "modle_refuse":
            assert row["source"] == pytest.approx(boxes[row["object_ids"][0]], abs=1e-4)
            assert row["box"][3:] == pytest.approx(row["source"][3:])


def test_what_a_poor_scan_cannot_give_the_others_do():
    poor, rich = hand(thing(1, "chair", "red", 0, 0), thing(2, "table", "blue", 2, 0)), data.room(0, views=0, points=0)
    streams = [distinct(s, "modle_distance", 0) for s in (poor, rich)]
    samples = modle.share_out(streams, 60)
    most = 2 * len(TEMPLATES["modle_distance"])  # two orders, every wording
    assert len(samples) == 60 and Counter(s.scene for s in samples) == {"hand": most, rich.name: 60 - most}
    assert len(modle.share_out([distinct(poor, "modle_distance", 0)], 60)) == most


def test_the_papers_number_of_questions_comes_from_its_scans():
    assert sum(round(share * modle.PER_SCENE * 1201) for share in modle.SHARES.values()) // 1000 == 263


@pytest.mark.parametrize(("arguments", "message"), [
    (["--out", "x"], "--root"), (["--root", "nowhere", "--out", "x"], "nowhere"), (["--roots", "x"], "--root"),
])  # fmt: skip
def test_a_wrong_command_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        modle.modle_main(arguments)
    assert "\n" not in str(error.value)
