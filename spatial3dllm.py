"""Spatial 3D-LLM: text locations and MODLE."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

import data
from data import DIRECTIONS, DataError, Facts, Sample, Scene, facts, listed, metres, pick, several

# ---- locations as text -----------------------------------------------------------------------------------------------

GRID = 255  # the largest integer of the grid form (LL3DA's)


def _span(size: int, bounds: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Zero and unit [size] of the grid: positions run from the lowest to the highest corner, sizes are shares of it."""
    if bounds is None:
        raise DataError("locations on the grid are shares of the room: the scene needs bounds; write metres instead")
    span = np.maximum(np.diff(bounds, axis=0)[0], 1e-6)
    return np.concatenate([bounds[0], np.zeros(3)])[:size], np.tile(span, 2)[:size]


def write_metres(values: Sequence[float], bounds: np.ndarray | None = None) -> str:
    """A point [3] or a box [6] in metres: "[1.25, -0.80, 0.45]"."""
    return listed(values)


def read_metres(values: np.ndarray, bounds: np.ndarray | None = None) -> np.ndarray:
    return values


def write_grid(values: Sequence[float], bounds: np.ndarray | None) -> str:
    """A point or a box as integers 0..255 of the scene's bounds [2, 3] (LL3DA): "[128, 90, 12]". What lies outside is
    written as the end of the range."""
    zero, unit = _span(len(values), bounds)
    return str(np.clip(np.round((np.asarray(values, float) - zero) / unit * GRID), 0, GRID).astype(int).tolist())


def read_grid(values: np.ndarray, bounds: np.ndarray | None) -> np.ndarray:
    zero, unit = _span(len(values), bounds)
    return zero + values / GRID * unit


LOCATIONS = {"metres": (write_metres, read_metres), "grid": (write_grid, read_grid)}


def read_locations(text: str, size: int, bounds: np.ndarray | None = None, form: str = "metres") -> list[np.ndarray]:
    """The points (size 3) or boxes (size 6) in an answer, [size] metres each; [] = it holds none. Never raises on text.

    Read are bracketed lists of that length, else lists in parentheses, else all bare numbers in groups of that length
    (3DMIT's rule). What is not finite, and a box without volume, is no location.
    """
    read = data.choose(LOCATIONS, form, "form of locations")[1]
    found = data.tuples(text, size) or data.tuples(re.sub(r"\(([^()]*)\)", r"[\1]", text), size)
    if not found:
        numbers = np.array([float(n) for n in re.findall(r"(?<![\d.])-?\d{1,6}(?:\.\d{1,9})?(?![\d.]*\d)", text)])
        found = list(numbers[: len(numbers) // size * size].reshape(-1, size))
    located = [read(values, bounds) for values in found if values is not None]
    return [v for v in located if np.isfinite(v).all() and (v[3:] > 0).all()]


def translate(text: str, bounds: np.ndarray | None, source: str, target: str) -> str:
    """The text with every bracketed point and box in another form: questions in metres become the grid's, a model's
    answers on the grid become metres. Lists of other lengths stay as they are."""
    (_, read), (write, _) = (data.choose(LOCATIONS, name, "form of locations") for name in (source, target))

    def rewrite(found: re.Match) -> str:
        values = next((v for size in (3, 6) for v in data.tuples(found[0], size)), None)
        return found[0] if values is None else write(read(values, bounds), bounds)

    return data.TUPLE.sub(rewrite, text)


# ---- MODLE: distances measured, layouts edited -----------------------------------------------------------------------
#
# The composition, splits, wordings and scores of MODLE's 263K annotations are not public: all of this section is our
# choice. Objects are named by descriptions that fit them alone (`data.describe`). Distances run from centre to centre
# of the boxes. Directions are the axes of the scene, and a question says so: "along x to the right" = +x, "along y to
# the back" = +y. What is moved keeps its size and its orientation. A thing that is placed is taken away in thought
# only: the scene still shows it, but its old place counts as free, and an edit is asked only where source and target
# overlap by less than 0.25 IoU, so that its old place is never an answer.
#
# Steps (written before the answer where a model reasons aloud) hold only what the scene shows, what stands just before,
# or one sum of two neighbours:
#   distance      red chair [x, y, z] bed [x, y, z] xa xb dx ya yb dy za zb dz = d
#   move axis     red chair [box] x1.25 right 0.80 x2.05 = [box]
#   move towards  red chair [box] bed [x, y, z] x1.25 left 0.80 x0.45 = [box]
#   move beside   red chair [box] bed [x, y, z] x0.20 right 1.30 x1.50 = [box]            (from the bed's x, at its y)
#   place floor   red vase [box] bed [x, y, z] x0.20 right 1.30 x1.50 z0.00 h0.36 z0.18 = [box]
#   place top     red vase [box] table [box] z0.37 h0.74 z0.74 h0.36 z0.92 = [box]         (z + h / 2, twice)
# The two sums have drills of their own: modle_add "x1.25 right 0.80 =" -> "x2.05" and modle_stack "z0.74 h0.36 =" ->
# "z0.92"; data.TASKS has "subtract" and "norm" for distances.

TEMPLATES: dict[str, tuple[str, ...]] = {
    "modle_distance": ("from centre to centre, how far is the {what} from the {other}?",
                       "in metres between centres, how far is the {what} from the {other}?",
                       "what is the distance from the centre of the {what} to the centre of the {other}?",
                       "measure from the centre of the {what} to the centre of the {other}."),
    "modle_move_axis": ("move the {what} {direction} by {amount} metres.",
                        "move the {what} by {amount} metres {direction}.",
                        "shift the {what} {direction} by {amount} metres.",
                        "shift the {what} {amount} metres {direction}."),
    "modle_move_towards": ("move the {what} along {axis} towards the {other} by {amount} metres.",
                           "move the {what} by {amount} metres along {axis} towards the {other}.",
                           "shift the {what} along {axis} towards the {other} by {amount} metres."),
    "modle_move_beside": ("move the {what} next to the {other}, {direction} of its centre by {amount} metres.",
                          "move the {what} next to the {other}: {amount} metres {direction} of its centre.",
                          "shift the {what} next to the {other}, {amount} metres {direction} of its centre."),
    "modle_place_floor": (
        "take the {what} away and put it on the floor, {direction} of the centre of the {other} by {amount} metres.",
        "remove the {what}, then set it on the floor: {amount} metres {direction} of the centre of the {other}."),
    "modle_place_top": ("take the {what} away and put it in the middle on top of the {other}.",
                        "remove the {what}, then set it on top of the {other}, in the middle."),
    "modle_contradiction": ("move the {what} {direction} and {opposite} by {amount} metres.",
                            "shift the {what} by {amount} metres {direction} and {opposite}.",
                            "move the {what} {amount} metres towards the {what}.",
                            "take the {what} away and put it in the middle on top of the {what}."),
    # the second set: never trained on
    "modle_distance_loose": ("how many metres lie between the middle of the {what} and the middle of the {other}?",
                             "the {what} and the {other}: how far apart are their centres?",
                             "give me the length of a straight line from the {what} to the {other}, centre to centre."),
    "modle_move_axis_loose": ("i want the {what} {amount} metres further {direction}.",
                              "could you push the {what} {direction}? {amount} metres will do.",
                              "where is the {what} after it went {amount} metres {direction}?"),
    "modle_move_towards_loose": ("could you bring the {what} {amount} metres closer to the {other}, only along {axis}?",
                                 "i want the {what} closer to the {other}: {amount} metres along {axis}."),
    "modle_move_beside_loose": ("the {what} should be beside the {other}: centre {amount} metres {direction} of it.",
                                "i want the {what} beside the {other}, {amount} metres {direction}."),
    "modle_place_floor_loose": (
        "what if the {what} stood on the floor, {amount} metres {direction} of the {other}? where would it be?",
        "i want the {what} gone from there. it should stand on the floor, {amount} metres {direction} of the {other}."),
    "modle_place_top_loose": ("what if the {what} stood at the centre of the {other}, on it? where would it be?",
                              "i want the {what} gone from there. it should stand on the {other}, at its centre."),
    "modle_contradiction_loose": ("i want the {what} {amount} metres further {direction} and also {opposite}.",
                                  "could you push the {what} {direction}, but {opposite}? {amount} metres will do.",
                                  "i want the {what} gone from there. it should stand on the {what}, at its centre."),
    # what fills the wordings, and the fixed answers
    "modle_direction": ("along x to the left", "along x to the right", "along y to the front", "along y to the back"),
    "modle_refusal": ("more than one thing fits.", "this contradicts itself."),
    "modle_add": ("{numbers} =",), "modle_stack": ("{numbers} =",),
}  # fmt: skip
DIRECTION = {side: next(t for t in TEMPLATES["modle_direction"] if t.endswith(side)) for side in DIRECTIONS}
OPPOSITE = {"left": "right", "right": "left", "front": "back", "back": "front"}
AMBIGUOUS, CONTRADICTORY = TEMPLATES["modle_refusal"]
AMOUNTS = np.arange(2, 31) / 10  # metres of a move
NEXT_TO = 0.6  # metres: the widest gap between what is put next to each other
APART = 0.3  # metres: along the axis of a move "towards", so that the side is clear
SAME_PLACE = 0.25  # IoU of source and target at and above which an edit is not asked
TOUCH = 0.01  # metres: boxes that share more along every axis collide
TOPS = {*data.SURFACES, "coffee table", "end table", "side table", "dining table", "kitchen counter", "counter",
        "cabinet", "kitchen cabinet", "tv stand", "file cabinet"}  # fmt: skip


def tight(f: Facts) -> np.ndarray:
    """[2, 3] the room: its bounds, or the corners of all boxes where a scan gives none."""
    ends = f.boxes[:, :3] - f.boxes[:, 3:] / 2, f.boxes[:, :3] + f.boxes[:, 3:] / 2
    return np.stack([ends[0].min(0), ends[1].max(0)]) if f.bounds is None else f.bounds


def allowed(f: Facts, i: int, boxes: np.ndarray) -> np.ndarray:
    """Which boxes [m, 6] may be the new place of thing i, [m] bool: inside the room (to 2 cm), in nothing else
    (`data.collide`), held by the floor, by a wall or by one other thing (`data.carried`; not asked of what stands on
    unknown ground already), and elsewhere than before (SAME_PLACE)."""
    others = np.delete(f.boxes, i, axis=0)
    room = tight(f)
    inside = (boxes[:, :3] - boxes[:, 3:] / 2 >= room[0] - 0.02).all(1)
    inside &= (boxes[:, :3] + boxes[:, 3:] / 2 <= room[1] + 0.02).all(1)
    free = ~data.collide(boxes, others, TOUCH).any(1)
    floor, wall, carries = data.carried(boxes, others, f.bounds)
    held = floor | (carries.sum(1) + wall == 1) | (f.support[i] == data.NOTHING)
    return inside & free & held & (data.box_iou(boxes, f.boxes[i : i + 1])[:, 0] < SAME_PLACE)


def movable(f: Facts) -> list[int]:
    """Things with words of their own that are no part of a wall, no rug, and hold nothing."""
    holding = set(f.support.tolist())
    return [i for i in f.described if f.things[i].category not in data.BUILT and i not in holding
            and f.boxes[i, 5] >= data.FLAT]  # fmt: skip


def shifts(start: np.ndarray) -> tuple[list[str], np.ndarray, np.ndarray]:
    """A box [6] moved by every amount in every direction: sides, amounts [m] and boxes [m, 6]."""
    sides, boxes = [], []
    for side, (axis, sign) in DIRECTIONS.items():
        moved = np.repeat(start[None], len(AMOUNTS), axis=0)
        moved[:, axis] += sign * AMOUNTS
        sides += [side] * len(AMOUNTS)
        boxes.append(moved)
    return sides, np.tile(AMOUNTS, len(DIRECTIONS)), np.concatenate(boxes)


def add_up(axis: int, value: float, side: str, amount: float) -> tuple[str, float]:
    """The steps of a shift, "x1.25 right 0.80 x2.05", and the sum of the printed numbers."""
    total = round(round(value, 2) + DIRECTIONS[side][1] * amount, 2)
    return f"{'xyz'[axis]}{metres(value)} {side} {metres(amount)} {'xyz'[axis]}{metres(total)}", total


def stack(z: float, height: float) -> tuple[str, float]:
    """The steps of half a height, "h0.36 z0.92", and the printed sum z + height / 2."""
    total = round(round(z, 2) + round(height, 2) / 2, 2)
    return f"h{metres(height)} z{metres(total)}", total


def modle_distance(scene: Scene, rng: np.random.Generator, task: str) -> Sample | None:
    """Metres between the centres of two described things; `value` is exact, the answer follows from the printed steps.
    modle_distance_one_view: one of them at least is seen in one frame only."""
    f = facts(scene)
    for i, j in filter(None, (pair_of(f, rng, task) for _ in range(4))):
        (a, p), (b, q) = ((f.described[k], f.boxes[k, :3].tolist()) for k in (i, j))
        steps, length = data.chain(p, q)
        if length >= 0.1:
            text, slots = {"what": a, "other": b}, {"a": f.category(i), "b": f.category(j)}
            return data.ask(scene, rng, task, metres(length), text, slots, wording_of(task),
                            steps=f"{a} {listed(p)} {b} {listed(q)} {steps} =", value=float(f.apart[1, i, j]),
                            about=[f.things[i].id, f.things[j].id])  # fmt: skip
    return None


def wording_of(task: str, kind: str = "") -> str:
    """The template of a task: modle_move_loose, kind "axis" -> modle_move_axis_loose."""
    base, loose, _ = task.removesuffix("_one_view").partition("_loose")
    return f"{base}{'_' * bool(kind)}{kind}{loose}"


def seen_once(f: Facts) -> set[int]:
    return {i for i, views in f.views.items() if len(views) == 1} if f.frames is not None else set()


def pair_of(f: Facts, rng: np.random.Generator, task: str) -> list[int]:
    """Two different described things in random order."""
    if not task.endswith("_one_view"):
        return several(rng, list(f.described), 2)
    first = pick(rng, sorted(seen_once(f) & f.described.keys()))
    rest = [i for i in f.described if i != first]
    return [] if first is None or not rest else several(rng, [first, pick(rng, rest)], 2)


def modle_move(scene: Scene, rng: np.random.Generator, task: str) -> Sample | None:
    """A described thing moved along an axis: by an amount ("axis"), by an amount towards another thing and not past it
    ("towards"), or to an amount from another's centre ("beside"). The answer is its new box. The direction and amount
    are drawn from all that are `allowed`. modle_move_one_view: of a thing seen in one frame only."""
    f = facts(scene)
    things = movable(f)
    if task.endswith("_one_view"):
        things = sorted(seen_once(f).intersection(things))
    for i in several(rng, things, min(4, len(things))):
        kind = pick(rng, ("axis", "towards", "beside"))
        j = None if kind == "axis" else pick(rng, [j for j in f.described if j != i])
        if kind == "axis" or j is not None:
            sample = move_to(scene, rng, task, kind, i, j)
            if sample:
                return sample
    return None


def move_to(scene: Scene, rng: np.random.Generator, task: str, kind: str, i: int, j: int | None) -> Sample | None:
    f = facts(scene)
    box = f.boxes[i]
    start = box.copy()
    if kind == "beside":
        start[:2] = f.boxes[j, :2]
    sides, amounts, boxes = shifts(start)
    good = allowed(f, i, boxes)
    axes, signs = np.array([DIRECTIONS[s] for s in sides]).T
    if kind == "towards":
        way = (f.boxes[j] - box)[axes] * signs
        good &= (way >= APART) & (amounts <= way)
    if kind == "beside":
        good &= amounts <= ((f.boxes[j] + box)[axes + 3] / 2 + NEXT_TO)
    k = pick(rng, np.flatnonzero(good))
    if k is None:
        return None
    side, amount, axis = sides[k], float(amounts[k]), int(axes[k])
    sums, new = add_up(axis, start[axis], side, amount)
    answer = start.copy()
    answer[axis] = new
    anchor = "" if j is None else f"{f.described[j]} {listed(f.boxes[j, :3])} "
    steps = f"{f.described[i]} {listed(box)} {anchor}{sums} ="
    return edit(scene, rng, task, kind, i, j, answer, boxes[k], steps, side, amount)


def edit(scene: Scene, rng: np.random.Generator, task: str, kind: str, i: int, j: int | None, answer: np.ndarray,
         box: np.ndarray, steps: str, side: str = "", amount: float = 0.0) -> Sample | None:  # fmt: skip
    """The Sample of an edit: `box` is exact, `answer` follows from the printed steps."""
    f = facts(scene)
    things = [i] if j is None else [i, j]
    text = dict(zip(("what", "other"), (f.described[k] for k in things), strict=False))
    if side:
        text |= {"direction": DIRECTION[side], "axis": "xy"[DIRECTIONS[side][0]], "amount": metres(amount)}
    slots = {"side": side, "what": f.category(i), "amount": metres(amount)}
    return data.ask(scene, rng, task, listed(answer), text, slots, wording_of(task, kind), steps=steps, kind=kind,
                    box=box, about=[f.things[k].id for k in things])  # fmt: skip


def modle_place(scene: Scene, rng: np.random.Generator, task: str) -> Sample | None:
    """A described thing taken away and put back: on the floor at an amount from the centre of another thing that stands
    there ("floor"), or in the middle on top of one whose flat top is wide enough ("top"). The answer is its box."""
    f = facts(scene)
    things = [i for i in movable(f) if f.support[i] != data.WALL]
    for i in several(rng, things, min(4, len(things))):
        kind = pick(rng, ("floor", "top"))
        fits = {"floor": lambda j: f.support[j] == data.FLOOR,
                "top": lambda j, i=i: f.category(j) in TOPS and (f.boxes[j, 3:5] >= f.boxes[i, 3:5]).all()}[kind]
        j = pick(rng, [j for j in f.described if j != i and fits(j)])
        sample = None if j is None else PLACES[kind](scene, rng, task, i, j)
        if sample:
            return sample
    return None


def place_on_floor(scene: Scene, rng: np.random.Generator, task: str, i: int, j: int) -> Sample | None:
    f = facts(scene)
    box, other = f.boxes[i], f.boxes[j]
    start = np.array([*other[:2], box[5] / 2, *box[3:]])
    sides, amounts, boxes = shifts(start)
    axes = np.array([DIRECTIONS[s][0] for s in sides])
    near = amounts <= (other + box)[axes + 3] / 2 + NEXT_TO
    k = pick(rng, np.flatnonzero(near & allowed(f, i, boxes)))
    if k is None:
        return None
    side, amount, axis = sides[k], float(amounts[k]), int(axes[k])
    sums, new = add_up(axis, start[axis], side, amount)
    up, z = stack(0.0, box[5])
    answer = start.copy()
    answer[axis], answer[2] = new, z
    steps = f"{f.described[i]} {listed(box)} {f.described[j]} {listed(other[:3])} {sums} z0.00 {up} ="
    return edit(scene, rng, task, "floor", i, j, answer, boxes[k], steps, side, amount)


def place_on_top(scene: Scene, rng: np.random.Generator, task: str, i: int, j: int) -> Sample | None:
    f = facts(scene)
    box, other = f.boxes[i], f.boxes[j]
    target = np.array([*other[:2], other[2] + (other[5] + box[5]) / 2, *box[3:]])
    if not allowed(f, i, target[None])[0]:
        return None
    first, top = stack(other[2], other[5])
    second, z = stack(top, box[5])
    answer = target.copy()
    answer[2] = z
    steps = f"{f.described[i]} {listed(box)} {f.described[j]} {listed(other)} z{metres(other[2])} {first} {second} ="
    return edit(scene, rng, task, "top", i, j, answer, target, steps)


PLACES = {"floor": place_on_floor, "top": place_on_top}


def modle_refuse(scene: Scene, rng: np.random.Generator, task: str) -> Sample | None:
    """Requests that nobody can follow, with the fixed sentence that says so: "ambiguous" (a measurement, a move or a
    placement that says "the chair" where there are several, or "the red thing" where nothing has a category),
    "contradictory" (opposite directions at once, a thing towards or on itself)."""
    f = facts(scene)
    kind, loose = pick(rng, ("ambiguous", "contradictory")), "_loose" * task.endswith("_loose")
    groups = {key: members for key, members in f.groups.items() if len(members) > 1}
    key = pick(rng, [k for k in groups if not k[1]] or [k for k in groups if not k[0]])  # colours where no names are
    known = pick(rng, list(f.described.values()))
    if known is None or (kind == "ambiguous" and key is None):
        return None
    side, amount = pick(rng, tuple(DIRECTIONS)), metres(pick(rng, AMOUNTS))
    text = {"what": known, "direction": DIRECTION[side], "opposite": DIRECTION[OPPOSITE[side]], "amount": amount}
    if kind == "contradictory":
        return data.ask(scene, rng, task, CONTRADICTORY, text, template="modle_contradiction" + loose, kind=kind)
    words = data.phrase(*key)
    template = pick(rng, ("modle_distance", "modle_move_axis", "modle_move_towards", "modle_place_floor"))
    what, other = (words, "") if template == "modle_move_axis" else several(rng, [known, words], 2)
    text |= {"what": what, "other": other, "axis": "xy"[DIRECTIONS[side][0]]}
    return data.ask(scene, rng, task, AMBIGUOUS, text, template=template + loose, kind=kind)


def modle_drill(scene: Scene, rng: np.random.Generator, task: str) -> Sample | None:
    """Text only, inside the room: modle_add "x1.25 right 0.80 =" -> "x2.05", modle_stack "z0.74 h0.36 =" -> "z0.92"."""
    f = facts(scene)
    if not len(f.boxes):
        return None
    lo, hi = tight(f)
    if task == "modle_stack":
        z = 0.0 if rng.random() < 0.3 else rng.uniform(0, max(hi[2] / 2, 0.1))  # things are put on floors, and on tops
        steps, value = stack(z, rng.uniform(0.05, max(hi[2] - z, 0.1)))
        numbers, answer = f"z{metres(z)} {steps}".rsplit(" ", 1)
    else:
        side = pick(rng, tuple(DIRECTIONS))
        axis = DIRECTIONS[side][0]
        steps, value = add_up(axis, rng.uniform(lo[axis], hi[axis]), side, float(pick(rng, AMOUNTS)))
        numbers, answer = steps.rsplit(" ", 1)
    return data.ask(scene, rng, task, answer, {"numbers": numbers}, value=value)


TASKS: dict[str, Callable[[Scene, np.random.Generator], Sample | None]] = {
    task: partial(make, task=task)
    for make, tasks in (
        (modle_distance, ("modle_distance", "modle_distance_loose", "modle_distance_one_view")),
        (modle_move, ("modle_move", "modle_move_loose", "modle_move_one_view")),
        (modle_place, ("modle_place", "modle_place_loose")),
        (modle_refuse, ("modle_refuse", "modle_refuse_loose")),
        (modle_drill, ("modle_add", "modle_stack")),
    )
    for task in tasks
}
GEOMETRY_TASKS = tuple(TASKS)  # none needs a category
# data's tables are what `data.ask`, `data.vocabulary` and the baselines read: importing this file fills them in
data.TEMPLATES.update(TEMPLATES)
data.METRIC.update(task for task in TASKS if "refuse" not in task)
data.NEVER_TRAINED.update(task for task in TASKS if task.endswith(("_loose", "_one_view")))

# Writing them down. 219 questions for each of ScanNet's 1,201 training scans are the paper's 263K.

SHARES = {"modle_distance": 0.40, "modle_move": 0.35, "modle_place": 0.20, "modle_refuse": 0.05}
WORDINGS = {"train": ("",), "val": ("", "_loose")}  # the looser ones are for validation only
PER_SCENE = 219


def distinct(scene: Scene, task: str, seed: int, patience: int = 100) -> Iterator[Sample]:
    """Different questions of a task until `patience` draws in a row bring no new one. The random stream belongs to
    (seed, scene, task), so a subset of scenes or tasks gets the same questions."""
    rng = np.random.default_rng([seed, zlib.crc32(scene.name.encode()), zlib.crc32(task.encode())])
    seen, idle = set(), 0
    while idle < patience:
        sample = TASKS[task](scene, rng)
        idle = 0 if sample and sample.question not in seen else idle + 1
        if idle == 0:
            seen.add(sample.question)
            sample.id = f"{scene.name}/{task}/{len(seen) - 1}"
            yield sample


def spread(streams: Sequence[Iterator[Sample]], total: int) -> list[Sample]:
    """`total` samples, one of every stream in turn; what a poor scene cannot give, the others do."""
    samples, streams = [], list(streams)
    while streams and len(samples) < total:
        row = [next(stream, None) for stream in streams[: total - len(samples)]]
        streams = [stream for stream, s in itertools.zip_longest(streams, row, fillvalue=True) if s is not None]
        samples += [s for s in row if s is not None]
    return samples


def annotation(sample: Sample, scene: Scene) -> dict:
    """A question as JSON: metres, boxes [cx, cy, cz, w, d, h] in the scan's aligned axes, ScanNet's own object numbers.
    `source` is the box before an edit: whoever wants the thing gone from the cloud drops the first of object_ids."""
    value = sample.value and round(sample.value, 4)
    exact = {"value": value} if sample.box is None else {
        "box": sample.box.round(4).tolist(), "source": scene.thing(sample.about[0]).box.round(4).tolist()}  # fmt: skip
    return {"id": sample.id, "scene_id": sample.scene, "task": sample.task, "kind": sample.kind,
            "question": sample.question, "answers": [sample.answer], "steps": sample.steps,
            "object_ids": [i - 1 for i in sample.about], **exact}  # fmt: skip


def write_modle(root: Path, out: Path, per_scene: int = PER_SCENE, seed: int = 0) -> dict:
    """MODLE for the scans below a ScanNet-layout root (`data.scan_ids` splits them): OUT/train.json and OUT/val.json,
    and OUT/manifest.json with the seed, the wordings and the counts per task and scene, which is returned. Each split
    has `per_scene` questions times its scans, shared out over tasks by SHARES, as far as its scans can give them; the
    validation scans are asked as many once more in the looser wordings. The same seed gives the same files."""
    manifest = {"seed": seed, "per_scene": per_scene, "shares": SHARES, "wordings": TEMPLATES}
    out.mkdir(parents=True, exist_ok=True)
    for split, ids in zip(("train", "val"), data.scan_ids(root).values(), strict=True):
        scenes = {}
        for scene_id in ids:  # only what questions need is kept
            scan = data.read_scannet(root, scene_id, max_frames=0)
            scenes[scene_id] = Scene(scene_id, scan.source, scan.objects, bounds=scan.bounds)
        samples = []
        for task, share in SHARES.items():
            for wording in WORDINGS[split]:
                streams = [distinct(scene, task + wording, seed) for scene in scenes.values()]
                samples += spread(streams, round(share * per_scene * len(scenes)))
        rows = [json.dumps(annotation(s, scenes[s.scene])) for s in samples]
        (out / f"{split}.json").write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")
        counts = {scene_id: Counter(s.task for s in samples if s.scene == scene_id) for scene_id in scenes}
        manifest[split] = {"questions": len(rows), "tasks": Counter(s.task for s in samples), "scenes": counts,
                           "wordings": ["loose" if w else "trained" for w in WORDINGS[split]]}  # fmt: skip
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return manifest


def modle_main(arguments: Sequence[str]) -> None:
    """`python spatial3dllm.py modle --root SCANS --out modle/`. Raises DataError."""
    parser = argparse.ArgumentParser(prog="spatial3dllm.py modle", description=write_modle.__doc__, allow_abbrev=False)
    parser.error = lambda message: (_ for _ in ()).throw(DataError(f"modle: {message}"))
    parser.add_argument("--root", type=Path, required=True, help="a folder of scans in ScanNet's layout")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.json, val.json and manifest.json")
    parser.add_argument("--per-scene", type=int, default=PER_SCENE, help="questions per scan, on average")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(arguments)
    manifest = write_modle(a.root, a.out, a.per_scene, a.seed)
    for split in WORDINGS:
        tasks = ", ".join(f"{task} {n}" for task, n in manifest[split]["tasks"].items())
        counts = f"{manifest[split]['questions']} questions about {len(manifest[split]['scenes'])} scans"
        print(f"{a.out / split}.json: {counts}; {tasks}")
    print(a.out / "manifest.json")
