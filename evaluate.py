"""Scores under named protocols: run a finished model, or score a file of predictions with no model at all.

    python evaluate.py --run runs/proxy3d [--benchmark rooms/qa ...] [--proposals gt|segments] [--objects 50 100]
    python evaluate.py --benchmark rooms/qa --annotations FILE --predictions FILE.jsonl [--out metrics.json]

A benchmark is one row of `BENCHMARKS`: how to read its file, how to ask, how to score. A metric is a small pure
function of an answer and the truth. Peers score differently under one name, so a metric's name carries its protocol
("em/cleaned", "acc@0.5/scanrefer", "score/official"), and what cannot be computed (no Java) is None, never zero. Shares
are in 0..1 and text scores are pycocoevalcap's own; papers print both times 100.

What counts as no answer: a missing id, an id given twice, a prediction that is not text, text without a letter or digit
or longer than LIMIT characters. No answer scores the worst value of every metric and never drops out of a mean; that
nothing fits (zero targets) must be said in words. An identifier that the scene does not have, or a box with NaN or
without volume, is an answer that hits nothing.

Beside every score stand chance and blind, computed for the very questions scored.

Contents: 1 reading an answer · 2 metrics · 3 captions · 4 benchmarks · 5 scoring · 6 asking a model · 7 files ·
8 tables and the command line
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
from data import TUPLE, DataError, Sample, Scene, Thing, substitute, tuples

LIMIT = 10_000  # characters of an answer; refined EM and captions would reward one that says everything
FAR = 10.0  # metres: the largest error charged, and the error of no answer, so that silence never lowers a mean error
MISS = "noanswer"  # a word of no reference; stands in captions for what was not said

# ---- 1 reading an answer ---------------------------------------------------------------------------------------------

IDENTIFIER = re.compile(r"OBJ(\d{3})(?!\d)")
NUMBER = re.compile(r"(?:(?<![\w.])[-+])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+")
UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
         "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"]  # fmt: skip
CLEANED = {  # word -> word of the cleaner that ScanQA and SQA3D are scored with (LEO's, used by six code bases)
    "letf": "left", "let": "left", "tehre": "there", "rigth": "right", "rght": "right", "behine": "behind", "tv": "TV",
    "chai": "chair", "wasing": "washing", "waslked": "walked", "oclock": "o'clock", "none": "zero",
    "23": "twenty-three", **{str(i): word for i, word in enumerate(UNITS)},
}  # fmt: skip
CLEANED_WORD = re.compile(r"\b(" + "|".join(CLEANED) + r")\b")


@functools.lru_cache(4096)  # chance asks for the same guesses again and again
def clean(text: str) -> str:
    """LEO's answer cleaner: lower case, no punctuation but , ' - :, typos, digits to words, articles dropped."""
    text = re.sub(r"^ | $", "", re.sub(r" {2,}", " ", text.lower()))
    text = re.sub(r"[^a-z0-9,'\s\-:]+", "", text)
    text = CLEANED_WORD.sub(lambda m: CLEANED[m[1]], text)
    text = re.sub(r"\bo' +clock\b", "o'clock", text)
    text = re.sub(r"\b([a-zA-Z]+)[0-9]\b", r"\1", text)  # "mat2"
    for article in ("a", "an", "the"):
        text = re.sub(rf"\b{article} ([a-zA-Z]+)", r"\1", text)
    return re.sub(r"\bbackwards\b", "backward", text)


def identifiers(text: str) -> list[int]:
    """Every <OBJ###> in the order written; the angle brackets may be missing."""
    return [int(i) for i in IDENTIFIER.findall(text)]


def numbers(text: str) -> list[float]:
    """Every finite number in digits: "2.5m" -> 2.5, "1,200" -> 1200; those of identifiers and lists do not count."""
    found = (float(n.replace(",", "")) for n in NUMBER.findall(IDENTIFIER.sub(" ", TUPLE.sub(" ", text))))
    return [n for n in found if np.isfinite(n)]


@functools.lru_cache(4096)
def number(text: str) -> float | None:
    """The first number in digits, else the first in words (zero to twenty), else None."""
    words = (float(UNITS.index(w)) for w in re.findall(r"[a-z]+", text.lower()) if w in UNITS)
    return next(itertools.chain(numbers(text), words), None)


def official_number(text: str) -> float | None:
    """VSI-Bench's parse: what stands before the first space, without final dots, must be a float as it is."""
    try:
        value = float(first_word(text))
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def first_word(text: str) -> str:
    return text.split(" ")[0].rstrip(".").strip()


@functools.lru_cache(4096)
def point(text: str) -> np.ndarray | None:
    """The first bracketed triple "[x, y, z]", [3] metres, or None."""
    return next(iter(tuples(text, 3)), None)


def boxes(text: str) -> list[np.ndarray | None]:
    """Every bracketed six-tuple [cx, cy, cz, w, d, h]; None for one with NaN or without volume."""
    return [b if b is not None and (b[3:] > 0).all() else None for b in tuples(text, 6)]


# ---- 2 metrics -------------------------------------------------------------------------------------------------------


def em_strict(text: str, references: Sequence[str]) -> float:
    """ScanQA's EM@1: the answer is one of the references, no normalisation."""
    return float(bool(text) and text in references)


def em_cleaned(text: str, references: Sequence[str]) -> float:
    """The answer is one of the references after `clean` on both sides; SQA3D's EM of the literature."""
    return em_strict(clean(text), [clean(r) for r in references])


def em_refined(text: str, references: Sequence[str]) -> float:
    """EM-R: after `clean`, equal to a reference, or one contains the other once spaces are removed. An empty string is
    in every string, so it never counts, on either side."""
    said = "".join(clean(text).split())
    known = ["".join(clean(r).split()) for r in references]
    return float(any(said and r and (said in r or r in said) for r in known))


def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU [n, m] of axis-aligned boxes [n, 6] and [m, 6] with ScanRefer's 1e-8 in the denominator, in float64."""
    lo = np.maximum((a[:, :3] - a[:, 3:] / 2)[:, None], (b[:, :3] - b[:, 3:] / 2)[None])
    hi = np.minimum((a[:, :3] + a[:, 3:] / 2)[:, None], (b[:, :3] + b[:, 3:] / 2)[None])
    inter = np.clip(hi - lo, 0, None).prod(-1)
    return inter / (a[:, 3:].prod(-1)[:, None] + b[:, 3:].prod(-1)[None] - inter + 1e-8)


def accuracy_at(predicted: np.ndarray | None, truth: np.ndarray, threshold: float) -> float:
    """ScanRefer's Acc@IoU, `>=` as there: 1 if the predicted box [6] fits the true one [6]."""
    return float(predicted is not None and iou_matrix(predicted[None], truth[None])[0, 0] >= threshold)


def f1_at(predicted: Sequence[np.ndarray | None], truth: Sequence[np.ndarray], threshold: float) -> float:
    """Multi3DRefer's F1 of one question: the assignment with the largest sum of IoU, true positives = its pairs with
    IoU >= threshold, 2 TP / (P + G). Nothing to find: 1 if nothing was predicted, else 0. IoUs are stored in float32,
    as there, which lets an exact 0.5 pass. None (no such identifier, not a box) is a prediction that hits nothing."""
    from scipy.optimize import linear_sum_assignment

    if not truth or not predicted:
        return float(len(truth) == len(predicted))
    iou = np.zeros((len(predicted), len(truth)), np.float32)
    for i, p in enumerate(predicted):
        if p is not None:
            iou[i] = iou_matrix(p[None], np.stack(truth))[0]
    return float(2 * (iou[linear_sum_assignment(-iou)] >= threshold).sum() / (len(predicted) + len(truth)))


def mra(predicted: float | None, truth: float) -> float:
    """VSI-Bench's mean relative accuracy: the share of the ten thresholds 0.50, 0.55 .. 0.95 for which the relative
    error is at most 1 - threshold."""
    if predicted is None:
        return 0.0
    error = abs(predicted - truth) / abs(truth) if truth else float(predicted != truth)
    return float(np.mean(error <= 1 - np.linspace(0.5, 0.95, 10)))


def choice_official(text: str, letter: str, options: Sequence[str] = ()) -> float:
    """VSI-Bench's choice: `first_word` is the letter, whatever its case. "A) chair" and "(A)" are wrong."""
    return float(first_word(text).lower() == letter.lower())


def choice_lenient(text: str, letter: str, options: Sequence[str]) -> float:
    """The first of the options' letters that stands alone ("(B)", "The answer is B."), or the option's own words."""
    letters = "".join(o[0] for o in options)
    alone = re.search(rf"(?<![A-Za-z'])([{letters}])(?![A-Za-z'])", text) if letters else None
    if alone:
        return float(alone[1] == letter)
    return max(em_cleaned(text, [o[2:]]) for o in options if o[0] == letter) if letter in letters else 0.0


def share_error(predicted: float | None, truth: float) -> float:
    """Relative error, at most 1 (= 100 %); no answer is 1."""
    if predicted is None:
        return 1.0
    return min(abs(predicted - truth) / abs(truth), 1.0) if truth else float(predicted != truth)


def metre_error(predicted: float | np.ndarray | None, truth: float | np.ndarray) -> float:
    """Metres between two lengths or two points, at most FAR; no answer is FAR."""
    return FAR if predicted is None else min(float(np.linalg.norm(np.clip(predicted - truth, -FAR, FAR))), FAR)


# ---- 3 captions ------------------------------------------------------------------------------------------------------


NGRAM = ("cider", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l")


@functools.cache
def java() -> bool:
    """Whether Java runs here; the PTB tokenizer and METEOR need it."""
    return bool(shutil.which("java")) and subprocess.run(["java", "-version"], capture_output=True).returncode == 0


@functools.cache
def meteor():
    """pycocoevalcap's METEOR process; kept, because it reads its paraphrases for seconds."""
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor()


def one_line(text: str) -> str:
    """Text that survives pipes and line-based tokenizers: one line, printable, valid UTF-8, no METEOR separator."""
    text = "".join(c if c.isprintable() else " " for c in text).replace("|||", " ")
    return " ".join(text.split())


def ptb(texts: Sequence[Sequence[str]]) -> list[list[str]]:
    """pycocoevalcap's PTB tokens (lower case, no punctuation), joined by spaces; needs Java."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokens = PTBTokenizer().tokenize({i: [{"caption": t} for t in group] for i, group in enumerate(texts)})
    if [len(tokens.get(i, ())) for i in range(len(texts))] != [len(group) for group in texts]:
        raise DataError("PTB tokenizer: Java gave other lines than it got; see its message above")
    return [tokens[i] for i in range(len(texts))]


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """CIDEr, BLEU-1..4, ROUGE-L and METEOR of a corpus, from pycocoevalcap: "/ptb" with the PTB tokenizer, as ScanQA
    and Chat-Scene do, "/raw" split at spaces, as LL3DA does. Without Java what needs it is None.

    CIDEr weighs words by the references of this very set: one sample scores 0, one-word answers at most 2.5. No answer
    counts as words that match nothing, as many as its longest reference has: with no words at all, corpus BLEU and
    METEOR would be better than with wrong ones.
    """
    texts = [[one_line(r) for r in group] for group in references] + [[one_line(c)] for c in captions]
    scores: dict[str, float | None] = {f"{name}/ptb": None for name in (*NGRAM, "meteor")}
    if java():
        with contextlib.suppress(OSError, ValueError):  # Java is there but fails: not available either
            known, said = beside(ptb(texts), len(captions))
            scores |= ngram_scores(known, said, "ptb") | {"meteor/ptb": float(meteor().compute_score(known, said)[0])}
    return scores | ngram_scores(*beside(texts, len(captions)), "raw")


def beside(words: Sequence[Sequence[str]], count: int) -> tuple[dict, dict]:
    """(references, captions) by number, from the references of `count` captions and then the captions."""
    known, said = dict(enumerate(words[:count])), dict(enumerate(words[count:]))
    return known, {i: [c or " ".join([MISS] * max(len(r.split()) for r in known[i]))] for i, (c,) in said.items()}


def ngram_scores(known: dict, said: dict, protocol: str) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    values = [Cider().compute_score(known, said)[0], *Bleu(4).compute_score(known, said, verbose=0)[0],
              Rouge().compute_score(known, said)[0]]  # fmt: skip
    return {f"{name}/{protocol}": float(v) for name, v in zip(NGRAM, values, strict=True)}


def captions_at_iou(captions: Sequence[str], ious: Sequence[float], threshold: float,
                    strict: bool) -> list[str]:  # fmt: skip
    """The captions that Scan2Cap's m@kIoU scores: "sos ... eos" where the box fits, "sos eos" where not.

    strict: IoU > threshold (Scan2Cap, LL3DA) or >= (Chat-Scene). The markers stay because papers keep them; they lift
    BLEU-1 of wrong answers.
    """
    fits = [i > threshold if strict else i >= threshold for i in ious]
    return [f"sos {c} eos" if ok else "sos eos" for c, ok in zip(captions, fits, strict=True)]


# ---- 4 benchmarks ----------------------------------------------------------------------------------------------------


@dataclass
class Questions:
    """What is asked and all that scoring needs. `shown` are the scenes as the model sees them: the true ones, or the
    same places with other proposals for objects. `blind` is by question id, `guesses` (what chance draws from where a
    question names no choices of its own) by task."""

    samples: list[Sample]
    scenes: dict[str, Scene]
    shown: dict[str, Scene] = field(default_factory=dict)
    blind: dict[str, str] = field(default_factory=dict)
    guesses: dict[str, list[str]] = field(default_factory=dict)
    proposals: str = "gt"

    def __post_init__(self):
        self.shown = self.shown or self.scenes


@dataclass
class Case:
    """One answer beside its question. text "" = no answer."""

    sample: Sample
    text: str
    scene: Scene  # the truth
    shown: Scene  # its objects are the proposals that identifiers point at

    @property
    def references(self) -> list[str]:
        return [substitute(a, lambda i: refer(self.scene, i)) for a in self.sample.answers or [self.sample.answer]]

    @property
    def truth(self) -> list[np.ndarray]:
        """The true boxes [6] of the targets."""
        return [self.scene.thing(i).box for i in self.sample.targets or []]

    @property
    def referred(self) -> list[np.ndarray | None]:
        """The boxes that the answer points at: by identifiers, else in numbers; None hits nothing."""
        object_id = {k: i for i, k in self.shown.identifiers.items()}
        found = identifiers(self.text)
        return [self.shown.thing(object_id[k]).box if k in object_id else None for k in found] or boxes(self.text)


def refer(scene: Scene, object_id: int) -> str:
    """How an object is written: its identifier, or a word that no answer holds where it has none."""
    known = scene.identifiers.get(object_id)
    return MISS if known is None else f"<OBJ{known:03d}>"


@dataclass(frozen=True)
class Benchmark:
    """One row: `metrics` are means over questions, `corpus` are scores of the whole set; the first of them all is the
    headline. `group` names a question's part of the table ("" = none). With `macro`, which merges groups, a metric is
    the mean of the merged groups' means and the mean over questions becomes "<metric>_micro"."""

    tasks: tuple[str, ...] = ()  # a run's samples that belong here; () = all
    metrics: Mapping[str, Callable[[Case], float]] = field(default_factory=dict)
    corpus: Callable[[list[Case]], dict[str, float | None]] = lambda cases: {}
    group: Callable[[Sample], str] = lambda sample: sample.kind
    macro: Callable[[str], str] | None = None
    fault: Callable[[Case], str] = lambda case: ""  # what an answer with text lacks, for the report
    beside: tuple[str, ...] = ()  # this row is asked wherever one of these tasks was trained, its own never are
    baselines: Mapping[str, Callable[[Case], str]] = field(default_factory=dict)  # column -> answer made from the truth
    tokens: int = 24  # the longest answer
    ask: str = "{question}"  # the prompt around the question; part of the result
    read: Callable[[Path], Questions] | None = None  # its annotations; None: the file a run writes, `read_questions`
    expected: int | None = None  # questions of the split, where that is known
    papers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # paper -> score -> value it prints


def fault_reference(case: Case, may_be_none: bool = False) -> str:
    found = case.referred
    if not found:
        return "" if may_be_none else "no id or box"
    return "id not in the scene or not a box" if any(b is None for b in found) else ""


def first_hit(case: Case, threshold: float) -> float:
    """Acc@IoU of the first thing the answer points at."""
    found = case.referred
    return max((accuracy_at(found[0], t, threshold) for t in case.truth), default=0.0) if found else 0.0


def set_f1(case: Case, threshold: float) -> float:
    return f1_at(case.referred, case.truth, threshold) if case.text else 0.0


def vsi(case: Case, parse: Callable[[str], float | None], choose: Callable[[str, str, Sequence[str]], float]) -> float:
    """A VSI-Bench question: its choice, or the MRA of its number."""
    s = case.sample
    return choose(case.text, s.answer, s.options) if s.options else mra(parse(case.text), s.value)


@functools.lru_cache(4096)
def box(text: str) -> np.ndarray | None:
    """The first bracketed six-tuple, [6] metres, or None."""
    return next(iter(boxes(text)), None)


def centre_error(case: Case) -> float:
    """Metres between the centres of the answered and the true box, at most FAR; no answer is FAR."""
    found = box(case.text)
    return metre_error(None if found is None else found[:3], case.sample.box[:3])


def over_move(case: Case) -> float:
    """The centre error over the length of the true move: 0 = there, 1 = as good as not moved, at most 2 (no answer, or
    moved the opposite way)."""
    was = case.scene.thing(case.sample.about[0]).box
    return min(centre_error(case) / max(float(np.linalg.norm((case.sample.box - was)[:3])), 1e-6), 2.0)


def others(case: Case) -> np.ndarray:
    """Boxes [n, 6] of all things but the one that is moved."""
    f = data.facts(case.scene)
    return f.boxes[[o.id != case.sample.about[0] for o in f.things]]


def collides(case: Case) -> float:
    """1 if the answered box stands in another thing (`data.collide`) or out of the room by over 5 cm, or is none."""
    found, room = box(case.text), case.scene.bounds
    if found is None or data.collide(found[None], others(case), 0.05).any():
        return 1.0
    low, high = found[:3] - found[3:] / 2, found[:3] + found[3:] / 2
    return float(room is not None and ((low < room[0] - 0.05) | (high > room[1] + 0.05)).any())


def supported(case: Case) -> float:
    """1 if something holds the answered box, to 5 cm (`data.carried`): the floor, the top of a thing under its centre,
    or a wall."""
    found = box(case.text)
    if found is None:
        return 0.0
    floor, wall, carries = data.carried(found[None], others(case), case.scene.bounds, wall=0.05)
    return float(carries.any() or wall[0] or (floor[0] and found[2] - found[5] / 2 > -0.05))


def unmoved(case: Case) -> str:
    """The answer of who leaves the thing where it is."""
    return data.listed(case.scene.thing(case.sample.about[0]).box)


def parsed_edit(case: Case) -> str:
    """The answer of who sees every true box and reads amount, direction and relation off the question's words."""
    thing, *anchor = (case.scene.thing(i) for i in case.sample.about)
    words = case.sample.question
    for o in (thing, *anchor):  # names may hold such words too
        words = words.replace(f"the {data.describe(case.scene, o)}", "it")
    new, amount = thing.box.copy(), next(iter(numbers(words)), None)
    axis, side = re.search(r"\balong ([xy])\b", words), re.search(rf"\b({'|'.join(data.DIRECTIONS)})\b", words)
    if anchor and (side or amount is None):  # from where the other thing is
        new[:2] = anchor[0].box[:2]
    if side:
        k, sign = data.DIRECTIONS[side[1]]
        new[k] += sign * amount
    elif amount is not None:  # towards it
        k = "xy".index(axis[1])
        new[k] += np.sign(anchor[0].box[k] - new[k]) * amount
    if "floor" in words:
        new[2] = new[5] / 2
    elif amount is None:  # on top of it
        new[2] = anchor[0].box[2] + (anchor[0].box[5] + new[5]) / 2
    return data.listed(new)


def true_category(case: Case) -> str:
    """A caption that knows nothing but the true category."""
    return f"this is {data.article(data.phrase(case.scene.thing(case.sample.targets[0]).category, ''))}."


def axis_error(case: Case, axis: int) -> float:
    found = point(case.text)
    return metre_error(None if found is None else found[axis], case.sample.point[axis])


EXACT = {
    "em/strict": lambda c: em_strict(c.text, c.references),
    "em/cleaned": lambda c: em_cleaned(c.text, c.references),
    "em/refined": lambda c: em_refined(c.text, c.references),
}
GROUNDING = {
    "acc@0.5/scanrefer": lambda c: first_hit(c, 0.5),
    "acc@0.25/scanrefer": lambda c: first_hit(c, 0.25),
}
MULTI = {
    "f1@0.5/multi3drefer": lambda c: set_f1(c, 0.5),
    "f1@0.25/multi3drefer": lambda c: set_f1(c, 0.25),
}
LENGTH = {
    "within_20_percent/number": lambda c: float(share_error(number(c.text), c.sample.value) <= 0.2),
    "within_10_percent/number": lambda c: float(share_error(number(c.text), c.sample.value) <= 0.1),
    "within_0.5_m/number": lambda c: float(metre_error(number(c.text), c.sample.value) <= 0.5),
    "within_0.25_m/number": lambda c: float(metre_error(number(c.text), c.sample.value) <= 0.25),
    "mae_m/capped": lambda c: metre_error(number(c.text), c.sample.value),
    "relative_error/capped": lambda c: share_error(number(c.text), c.sample.value),
}
EDIT = {
    "acc@0.25/box": lambda c: accuracy_at(box(c.text), c.sample.box, 0.25),
    "acc@0.5/box": lambda c: accuracy_at(box(c.text), c.sample.box, 0.5),
    "centre_error_over_move/capped": over_move,
    "centre_error_m/capped": centre_error,
    "collision_rate/5_cm": collides,
    "support_rate/5_cm": supported,
}
POSITION = {
    "within_0.5_m/triple": lambda c: float(metre_error(point(c.text), c.sample.point) <= 0.5),
    "within_0.25_m/triple": lambda c: float(metre_error(point(c.text), c.sample.point) <= 0.25),
    "mae_x_m/capped": lambda c: axis_error(c, 0),
    "mae_y_m/capped": lambda c: axis_error(c, 1),
    "mae_z_m/capped": lambda c: axis_error(c, 2),
}
SPATIAL = {
    "score/official": lambda c: vsi(c, official_number, choice_official),
    "score/lenient": lambda c: vsi(c, number, choice_lenient),
}


MODLE = {  # task -> what its rows share; each is scored in wordings that were trained and in looser ones that never are
    "distance": dict(metrics=LENGTH | {"mra/number": lambda c: mra(number(c.text), c.sample.value)}, tokens=64,
                     fault=lambda c: "" if number(c.text) is not None else "no number"),
    **{name: dict(metrics=EDIT, tokens=64, fault=lambda c: "" if box(c.text) is not None else "no [box]",
                  baselines={"unmoved box": unmoved, "true box + parsed move": parsed_edit})
       for name in ("move", "place")},
    "refuse": dict(metrics={"em/cleaned": EXACT["em/cleaned"]}),
}  # fmt: skip


def by_task(sample: Sample) -> str:
    return sample.task


def distinct_ids(cases: list[Case]) -> dict[str, int]:
    """How many different identifiers were answered first: a model that always names the same few shows here."""
    return {"distinct_ids/count": len({i for c in cases for i in identifiers(c.text)[:1]})}


BENCHMARKS: dict[str, Benchmark] = {
    **{f"rooms/grounding{part}": Benchmark((f"ground{part}",), GROUNDING, corpus=distinct_ids, fault=fault_reference)
       for part in ("", "_multiple", "_category", "_relation", "_superlative")},
    "rooms/multi": Benchmark(("multi",), MULTI, fault=lambda c: fault_reference(c, may_be_none=True), tokens=48),
    "rooms/qa": Benchmark(("colour", "what", "where", "count", "exist", "situated"), EXACT, group=by_task),
    "rooms/identifier": Benchmark(("id_category", "id_colour", "id_size", "relation"), EXACT, group=by_task),
    "rooms/coordinate": Benchmark(("coordinate",), POSITION, tokens=48,
                                  fault=lambda c: "" if point(c.text) is not None else "no [x, y, z]"),
    "rooms/distance": Benchmark(("distance", "distance_ids", "size"), LENGTH, group=by_task, tokens=64,
                                fault=lambda c: "" if number(c.text) is not None else "no number"),
    **{f"rooms/modle_{name}{part}": Benchmark((f"modle_{name}{part}",), beside=(f"modle_{name}",) * bool(part), **row)
       for name, row in MODLE.items() for part in ("", "_loose", "_one_view")
       if part != "_one_view" or name in ("distance", "move")},
    "rooms/caption": Benchmark(("caption",), tokens=64, baselines={"true category": true_category},
                               corpus=lambda cases: caption_scores([c.text for c in cases],
                                                                   [c.references for c in cases])),
    "rooms/vsi": Benchmark(
        ("vsi_counting", "vsi_abs_distance", "vsi_object_size", "vsi_room_size", "vsi_rel_distance",
         "vsi_rel_direction", "vsi_route", "vsi_order"), SPATIAL, tokens=16,
        fault=lambda c: "" if c.sample.options or number(c.text) is not None else "no number",
        group=lambda s: s.task.removeprefix("vsi_") + (f"_{s.kind}" if s.kind in ("easy", "medium", "hard") else ""),
        macro=lambda group: re.sub("_(easy|medium|hard)$", "", group)),
}  # fmt: skip


def find_benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise DataError(f"unknown benchmark {name}; known: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def select(row: Benchmark, samples: Iterable[Sample]) -> list[Sample]:
    return [s for s in samples if not row.tasks or s.task in row.tasks]


# ---- 5 scoring -------------------------------------------------------------------------------------------------------


def admit(ids: Sequence[str], pairs: Iterable[tuple[object, object]]) -> tuple[dict[str, str], Counter]:
    """(an answer for every id, what was wrong how often). Every fault becomes no answer, ""; extra ids are left out."""
    answers, faults = {}, Counter()
    known, twice = set(ids), set()
    for key, text in pairs:
        key = str(key)
        if key not in known:
            faults["extra id"] += 1
        elif key in answers:
            faults["duplicate id"] += 1
            twice.add(key)
        else:
            fault = ("not text" if not isinstance(text, str) else "too long" if len(text) > LIMIT else
                     "" if any(map(str.isalnum, text)) else "empty")  # fmt: skip
            faults.update([fault] if fault else [])
            answers[key] = "" if fault else text
    faults.update({"missing id": missing} if (missing := len(known) - len(answers)) else {})
    return {i: "" if i in twice else answers.get(i, "") for i in ids}, faults


def summarise(row: Benchmark, samples: Sequence[Sample], values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Means of values per question, over all and per group: {"metric/protocol": .., "metric/protocol/group": ..}."""
    groups: dict[str, list[int]] = {}
    for i, s in enumerate(samples):
        groups.setdefault(row.group(s), []).append(i)
    groups.pop("", None)
    result = {}
    for name, value in values.items():
        value = np.asarray(value, float)
        parts = {g: float(value[i].mean()) for g, i in sorted(groups.items())}
        result[name] = float(value.mean())
        if row.macro:
            result[f"{name}_micro"] = result[name]
            merged = {m: [v for g, v in parts.items() if row.macro(g) == m] for m in map(row.macro, parts)}
            result[name] = float(np.mean([np.mean(v) for v in merged.values()]))
            parts |= {m: float(np.mean(v)) for m, v in merged.items()}
        result |= {f"{name}/{g}": v for g, v in parts.items()}
    return result


def group_counts(row: Benchmark, samples: Sequence[Sample]) -> dict[str, int]:
    """Questions per group, merged ones included."""
    groups = [g for g in map(row.group, samples) if g]
    return dict(Counter(groups) | Counter(map(row.macro, groups) if row.macro else []))


def measure(row: Benchmark, cases: list[Case]) -> dict[str, float | None]:
    """Every score of one set of answers."""
    values = {name: [metric(c) for c in cases] for name, metric in row.metrics.items()}
    return summarise(row, [c.sample for c in cases], values) | row.corpus(cases)


def chance_scores(row: Benchmark, questions: Questions, samples: Sequence[Sample]) -> dict[str, float | None]:
    """What guessing gets on these very questions (`data.chance`), for every metric that is a mean over questions;
    None where nothing says what a guess would be drawn from."""
    values = {name: [] for name in row.metrics}
    for s in samples:
        case = Case(s, "", questions.scenes[s.scene], questions.shown[s.scene])
        guesses = questions.guesses.get(s.task, ())
        known = bool(case.shown.objects) if s.targets is not None else bool(s.options or guesses)
        for name, metric in row.metrics.items():
            score = lambda text, metric=metric, case=case: metric(replace(case, text=text))  # noqa: E731
            values[name].append(data.chance(s, case.shown, guesses, score) if known else np.nan)
    return {k: None if np.isnan(v) else v for k, v in summarise(row, samples, values).items()}


def proposal_recall(questions: Questions, samples: Sequence[Sample]) -> dict[str, float | str]:
    """Which proposals were used, and the share of the target objects that one of them fits at IoU 0.25 and 0.5."""
    targets = sorted({(s.scene, i) for s in samples for i in s.targets or []})
    best = []
    for name, i in targets:
        offered = [o.box for o in questions.shown[name].objects if o.id in questions.shown[name].identifiers]
        truth = questions.scenes[name].thing(i).box[None]
        best.append(float(iou_matrix(np.stack(offered), truth).max()) if offered else 0.0)
    recall = {f"recall@{t}": float(np.mean(np.array(best) >= t)) for t in (0.25, 0.5)} if best else {}
    return {"source": questions.proposals, **recall}


def score(name: str, questions: Questions, answers: Iterable[tuple[object, object]] | Mapping[str, str],
          columns: Mapping[str, Mapping[str, str]] | None = None, faults: Counter | None = None) -> dict:  # fmt: skip
    """One benchmark's entry of metrics.json: every score of `answers` (id -> text, or pairs as read from a file), the
    headline's chance and blind, the count, what was malformed, the proposals, and under "columns" the same scores for
    blind, chance, the row's baselines and each further set of answers in `columns`."""
    row = find_benchmark(name)
    samples = select(row, questions.samples)
    ids = [s.id for s in samples]
    texts, found = admit(ids, answers.items() if isinstance(answers, Mapping) else answers)

    def cases(texts: Mapping[str, str]) -> list[Case]:
        return [Case(s, texts[s.id], questions.scenes[s.scene], questions.shown[s.scene]) for s in samples]

    values = measure(row, cases(texts))
    others = {"blind": questions.blind} if questions.blind.keys() & set(ids) else {}
    others |= {k: {c.sample.id: answer(c) for c in cases(texts)} for k, answer in row.baselines.items()}
    others |= columns or {}
    others = {k: measure(row, cases(admit(ids, v.items())[0])) for k, v in others.items()}
    others["chance"] = chance_scores(row, questions, samples)
    headline = next(iter(values))
    malformed = found + (faults or Counter()) + Counter(f for c in cases(texts) if c.text and (f := row.fault(c)))
    entry = values | {"chance": others["chance"].get(headline), "blind": others.get("blind", {}).get(headline),
                      "count": len(samples), "malformed": dict(malformed),
                      "counts": group_counts(row, samples),
                      "proposals": proposal_recall(questions, samples), "columns": others}  # fmt: skip
    if None in values.values():
        entry["not_available"] = {k: "needs a working Java" for k, v in values.items() if v is None}
    return entry


# ---- 6 asking a model ------------------------------------------------------------------------------------------------

PROPOSALS = {"gt": lambda scene: scene, "segments": lambda scene: data.with_own_segments(scene)}


def prepare(samples: list[Sample], scenes: Mapping[str, Scene], blind: object = None, proposals: str = "gt",
            seed: int = 0, more: Mapping[str, Callable[[Scene], Scene]] | None = None) -> Questions:  # fmt: skip
    """Questions for `run`: fixed identifiers, the chosen proposals, blind answers and guesses (blind: `data.Blind`);
    `more` proposals, by name, come from the model."""
    sources = PROPOSALS | dict(more or {})
    if proposals not in sources:
        raise DataError(f"unknown proposals {proposals}; known: {', '.join(sources)}")
    scenes = {s.scene: numbered(scenes[s.scene], seed) for s in samples}
    shown = scenes if proposals == "gt" else {  # under a name of their own, or caches would mix them up
        name: numbered(sources[proposals](replace(scene, name=f"{name}@{proposals}", identifiers={})), seed)
        for name, scene in scenes.items()
    }  # fmt: skip
    questions = Questions(samples, scenes, shown, proposals=proposals)
    if blind is not None:
        for s in samples:
            text = blind.predict(s, shown[s.scene])
            questions.blind[s.id] = substitute(text, lambda i, s=s: refer(shown[s.scene], i))
        questions.guesses = {task: list(blind.answers(task, 50)) for task in sorted({s.task for s in samples})}
    return questions


def numbered(scene: Scene, seed: int) -> Scene:
    """The scene with identifiers: its own, or the same random ones at every call."""
    rng = np.random.default_rng([seed, zlib.crc32(scene.name.encode())])
    return scene if scene.identifiers else replace(scene, identifiers=data.number_objects(scene, rng))


def as_shown(sample: Sample, scene: Scene, shown: Scene) -> Sample:
    """The sample in the proposals' terms: marks of true objects become marks of the proposals that fit them best."""
    offered = [o for o in shown.objects if o.id in shown.identifiers]
    if shown is scene or not offered:
        return sample

    def best(object_id: int) -> str:
        iou = iou_matrix(np.stack([o.box for o in offered]), scene.thing(object_id).box[None])
        return f"<obj {offered[int(iou.argmax())].id}>"

    texts = {k: substitute(getattr(sample, k), best) for k in ("question", "answer", "steps")}
    return replace(sample, **texts, answers=[substitute(a, best) for a in sample.answers])


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(samples: Sequence[Sample], rank: int, world: int) -> list[Sample]:
    """A rank's part, by stride over scenes, in scene order: nothing padded, nothing twice, each scene encoded once."""
    mine = set(sorted({s.scene for s in samples})[rank::world])
    return sorted((s for s in samples if s.scene in mine), key=lambda s: s.scene)


def merge(parts: Sequence[Mapping[str, str]], ids: Sequence[str]) -> dict[str, str]:
    """All ranks' answers in the order of `ids`. Raises ValueError unless every id was answered exactly once."""
    times = Counter(i for part in parts for i in part)
    times.subtract(Counter(ids))
    wrong = [i for i, n in times.items() if n]
    if wrong or len(set(ids)) != len(ids):
        raise ValueError(f"evaluate: {len(wrong)} questions were not answered exactly once, such as {wrong[:3]}")
    both = {i: text for part in parts for i, text in part.items()}
    return {i: both[i] for i in ids}


@torch.no_grad()
def predict(model: torch.nn.Module, questions: Questions, samples: Sequence[Sample], stage: data.Stage,
            tokens: int = 24, batch_size: int = 64, ask: str = "{question}") -> dict[str, str]:  # fmt: skip
    """Greedy answers of the samples by id, the same on every rank. A model writes its steps up to the last "=": they
    are cut off where the stage has steps, and never scored. Calls model.batch([(scene, samples), ...]) and
    model.generate(batch, max_new_tokens=..), whose answers come in the batch's order."""
    rank, world = rank_and_world()
    training = model.training
    model.eval()
    answers = {}
    mine = share(samples, rank, world)
    for chunk in (mine[i : i + batch_size] for i in range(0, len(mine), batch_size)):
        groups = []
        for name, group in itertools.groupby(chunk, key=lambda s: s.scene):
            true, shown = questions.scenes[name], questions.shown[name]
            asked = (as_shown(s, true, shown) for s in group)
            groups.append((shown, [replace(s, question=ask.replace("{question}", s.question)) for s in asked]))
        texts = model.generate(model.batch(groups), max_new_tokens=tokens)
        for s, text in zip(chunk, texts, strict=True):
            answers[s.id] = text.rpartition("=")[2].strip() if stage.steps else text
    model.train(training)
    parts = [answers] * world
    if world > 1:
        dist.all_gather_object(parts, answers)
    return merge(parts, [s.id for s in samples])


# ---- 7 files ---------------------------------------------------------------------------------------------------------


def write_whole(path: Path, text: str) -> None:
    """Write a file that is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def to_json(value: object) -> str:
    return json.dumps(value, default=lambda a: a.tolist())


def write_predictions(path: Path, answers: Mapping[str, str]) -> None:
    write_whole(path, "".join(to_json({"id": i, "prediction": text}) + "\n" for i, text in answers.items()))


def read_lines(path: Path) -> Iterable[tuple[int, object]]:
    """(line number, JSON value) of a JSON Lines file; None for a line that is not JSON. Empty lines are skipped."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with path.open(encoding="utf-8", errors="replace") as file:
        for row, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield row, json.loads(line)
                except (ValueError, RecursionError):
                    yield row, None


def read_predictions(path: Path) -> tuple[list[tuple[object, object]], Counter]:
    """(pairs of id and prediction, faults) of {"id": .., "prediction": ..} lines. Nothing in the file is trusted."""
    pairs, faults = [], Counter()
    for _, line in read_lines(path):
        if isinstance(line, dict) and {"id", "prediction"} <= line.keys():
            pairs.append((line["id"], line["prediction"]))
        else:
            faults["unreadable line"] += 1
    return pairs, faults


def write_questions(path: Path, questions: Questions, samples: Sequence[Sample]) -> None:
    """The questions with truth, proposals and baselines, so that any model's answers to them can be scored later."""

    def scene(name: str, s: Scene) -> dict:
        return {"name": name, "source": s.source, "objects": [asdict(o) for o in s.objects],
                "identifiers": list(s.identifiers.items()), "bounds": s.bounds}  # fmt: skip

    lines = [{"proposals": questions.proposals, "guesses": questions.guesses}]
    for name in sorted({s.scene for s in samples}):
        true, shown = questions.scenes[name], questions.shown[name]
        lines += [{"scene": scene(name, true)}] + [{"shown": scene(name, shown)}] * (shown is not true)
    lines += [{"sample": asdict(s), "blind": questions.blind.get(s.id, "")} for s in samples]
    write_whole(path, "".join(to_json(line) + "\n" for line in lines))


def read_questions(path: Path) -> Questions:
    """What `write_questions` wrote. Errors name the file, the row and the field."""
    questions = Questions([], {})
    shown, seen = {}, set()
    arrays = ("point", "box", "prompt")
    for row, line in read_lines(path):
        try:
            if "sample" in line:
                sample = Sample(**line["sample"])
                for name in arrays:
                    value = getattr(sample, name)
                    setattr(sample, name, None if value is None else np.array(value, float))
                if sample.id in seen:
                    raise DataError(f"{path}, row {row}, field id: {sample.id} twice; question ids must differ")
                if sample.scene not in questions.scenes:
                    raise DataError(f"{path}, row {row}, field scene: no line describes {sample.scene} before it")
                if not {o.id for o in questions.scenes[sample.scene].objects}.issuperset(sample.targets or []):
                    raise DataError(f"{path}, row {row}, field targets: an object that {sample.scene} does not have")
                seen.add(sample.id)
                questions.samples.append(sample)
                if line.get("blind"):
                    questions.blind[sample.id] = line["blind"]
            elif "scene" in line or "shown" in line:
                key = "scene" if "scene" in line else "shown"
                known = line[key]
                things = [Thing(**o | {"box": np.array(o["box"], float)}) for o in known["objects"]]
                bounds = known.get("bounds") and np.array(known["bounds"], float)
                scene = Scene(known["name"], known["source"], things, identifiers=dict(known["identifiers"]),
                              bounds=bounds)  # fmt: skip
                (questions.scenes if key == "scene" else shown)[scene.name] = scene
            else:
                questions.proposals, questions.guesses = line["proposals"], line["guesses"]
        except DataError:
            raise
        except (TypeError, KeyError, AttributeError, ValueError) as e:
            raise DataError(f"{path}, row {row}: {e}; write it with evaluate.py --run") from e
    questions.shown = questions.scenes | shown
    if not questions.samples:
        raise DataError(f"{path}: no questions")
    return questions


def revision() -> str:
    """The commit of the code, with "+changes" where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    if not shutil.which("git"):
        return "unknown"
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    return "unknown" if head.returncode else head.stdout.strip() + "+changes" * bool(status.stdout.strip())


def provenance(model: torch.nn.Module | None = None, **more: object) -> dict:
    """What a number depends on besides the answers."""
    facts = {"code": revision(), "torch": torch.__version__, "python": sys.version.split()[0]}
    if model is not None:
        weight = next(model.parameters())
        kernels = (getattr(getattr(m, "config", None), "_attn_implementation", None) for m in model.modules())
        facts |= {"device": torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type,
                  "dtype": str(weight.dtype), "attention": next(filter(None, kernels), "unknown"),
                  "decoding": "greedy", "processes": rank_and_world()[1]}  # fmt: skip
    return facts | more


def save_metrics(path: Path, entries: Mapping[str, dict], facts: dict) -> None:
    """metrics.json = {benchmark: entry, "provenance": facts + every benchmark's proposals and prompt}. Entries already
    there stay only if the facts are the same, so that one file never mixes two runs."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"provenance": {}}
    before = old.pop("provenance")
    if {k: v for k, v in before.items() if k not in ("proposals", "prompts")} != json.loads(to_json(facts)):
        old = {}
    entries = old | dict(entries)
    more = {"proposals": {name: e["proposals"] for name, e in entries.items()},
            "prompts": {name: BENCHMARKS[name.split("@")[0]].ask for name in entries}}  # fmt: skip
    text = json.dumps(entries | {"provenance": facts | more}, indent=1, default=lambda a: a.tolist())
    write_whole(path, text + "\n")


# ---- 8 tables and the command line -----------------------------------------------------------------------------------


def table(entries: Mapping[str, dict]) -> str:
    """One line per score, and per group for headlines: model, further columns, papers, blind, chance, count. What was
    malformed, which proposals were used and what is not available ("n/a") stand below."""
    extra = dict.fromkeys(c for e in entries.values() for c in e["columns"] if c not in ("blind", "chance"))
    papers = dict.fromkeys(p for name in entries for p in BENCHMARKS[name.split("@")[0]].papers)
    rows = [["benchmark", "score", "model", *extra, *papers, "blind", "chance", "count"]]
    notes: dict[str, list[str]] = {}
    show = lambda v: "n/a" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v)  # noqa: E731
    for name, entry in entries.items():
        printed, scores = BENCHMARKS[name.split("@")[0]].papers, [k for k in entry if "/" in k]
        for key in scores:
            part = key.split("/")[2:]
            if not part or key.startswith(f"{scores[0]}/"):
                cells = [entry, *(entry["columns"].get(c, {}) for c in extra), *(printed.get(p, {}) for p in papers),
                         *(entry["columns"].get(c, {}) for c in ("blind", "chance"))]  # fmt: skip
                count = entry["counts"][part[0]] if part else entry["count"]
                rows.append([name, key, *(show(cell.get(key, "")) for cell in cells), str(count)])
        recall = [f"{k} {show(v)}" for k, v in entry["proposals"].items() if k != "source"]
        remarks = [f"{n} answers: {fault}" for fault, n in entry["malformed"].items()]
        remarks += [f"proposals: {entry['proposals']['source']}, {', '.join(recall)}"] if recall else []
        remarks += [f"{key} not available: {why}" for key, why in entry.get("not_available", {}).items()]
        for remark in remarks:
            notes.setdefault(remark, []).append(name)
    widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
    align = [str.ljust, str.ljust] + [str.rjust] * (len(widths) - 2)
    lines = ["  ".join(put(v, w) for put, v, w in zip(align, r, widths, strict=True)) for r in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines + [f"{remark} ({', '.join(names)})" for remark, names in notes.items()])


def label(name: str, questions: Questions) -> str:
    """How a benchmark is called in files and tables: other proposals than the true objects are part of its name."""
    return name if questions.proposals == "gt" else f"{name}@{questions.proposals}"


def check_count(name: str, found: int, expected: int | None, what: str, partial: bool) -> None:
    if expected is not None and found != expected and not partial:
        raise DataError(f"{name}: {found} {what}, {expected} expected; complete them, or say --partial")


def run(model: torch.nn.Module, questions: Questions, stage: data.Stage, out: Path, names: Sequence[str] = (),
        partial: bool = False, columns: Mapping[str, Mapping[str, Mapping[str, str]]] | None = None,
        batch_size: int = 64, **details: object) -> dict[str, dict]:  # fmt: skip
    """Ask, score, write OUT/predictions/<benchmark>.jsonl (and .questions.jsonl beside it) and OUT/metrics.json, print
    the table. names: benchmarks, by default all that have questions. columns: name -> benchmark -> id -> answer of
    another model to the same questions (`ask_all`). details go into the provenance. Every rank calls it; rank 0 scores
    and returns the entries, the others {}."""
    answers = ask_all(model, questions, stage, names, batch_size)
    facts = provenance(model, stage=stage.name, **details)
    if rank_and_world()[0]:
        return {}
    entries = {}
    for name, found in answers.items():
        row = find_benchmark(name)
        check_count(name, len(found), row.expected, "questions", partial)
        path = Path(out) / "predictions" / f"{label(name, questions)}.jsonl"
        write_predictions(path, found)
        write_questions(path.with_suffix(".questions.jsonl"), questions, select(row, questions.samples))
        others = {c: by_name[name] for c, by_name in (columns or {}).items() if name in by_name}
        entries[label(name, questions)] = score(name, questions, found, others) | {"max_new_tokens": row.tokens}
    save_metrics(Path(out) / "metrics.json", entries, facts)
    print(table(entries))
    return entries


def evaluate_run(done: object, names: Sequence[str] = (), proposals: str = "gt", partial: bool = False,
                 out: Path | None = None, per_scene: int | None = None, batch_size: int = 256,
                 stage: data.Stage | None = None, objects: int | None = None) -> dict[str, dict]:  # fmt: skip
    """Score a run of train.py (`train.load_run`: model, stages, train and test scenes, args) in its test scenes, or in
    as many fresh rooms of so many `objects`, as `stage` sees (default: its last), in every benchmark of which that
    stage trained a task, or those named. A model may offer `baselines() -> {column: context manager}`: itself without
    something, asked the same; and `proposals() -> {name: scene -> that with other objects}`. Returns as `run`."""
    stage = stage or done.stages[-1]
    test = rooms_of(objects, len(done.test)) if objects else done.test
    per_scene = per_scene or max(3, 60 // len(test))  # of every task; more where there are few scenes
    done.model.begin(stage)
    seed, trained = done.args.seed, set(stage.tasks)
    rows = [BENCHMARKS[n] for n in names or BENCHMARKS]
    tasks = [task for row in rows for task in row.tasks
             if task in data.TASKS and (names or task in trained or trained.intersection(row.beside))]
    scenes = {s.name: numbered(s, seed) for s in test}
    samples = data.question_set(scenes.values(), tasks, per_scene, seed)
    blind = data.Blind(data.question_set(done.train[:300], tasks, 3, seed + 1))
    questions = prepare(samples, scenes, blind, proposals, seed, getattr(done.model, "proposals", dict)())
    done.prepare(list(questions.shown.values()))
    columns = {}
    for column, without in getattr(done.model, "baselines", dict)().items():
        asked = [n for n in ask_names(questions) if n in ("rooms/grounding", "rooms/qa")]
        with without:
            columns[column] = ask_all(done.model, questions, stage, asked, batch_size) if asked else {}
    source = f"rooms of {objects} objects" if objects else done.args.data
    return run(done.model, questions, stage, out or done.args.out, names, partial, columns, batch_size,
               seed=seed, paper=done.args.model, scenes_from=source, scenes=len(questions.scenes))  # fmt: skip


def rooms_of(objects: int, count: int) -> list[Scene]:
    """Test rooms of a given number of objects, none of them a default room, with as many points per object as those."""
    first = data.ROOM_SEEDS["test"].start + 10_000 + 100 * objects
    return [data.room(seed, objects, points=max(4096, 340 * objects)) for seed in range(first, first + count)]


def ask_all(model: torch.nn.Module, questions: Questions, stage: data.Stage, names: Sequence[str] = (),
            batch_size: int = 64) -> dict[str, dict[str, str]]:  # fmt: skip
    """Benchmark -> id -> answer, on every rank."""
    chosen = {name: select(find_benchmark(name), questions.samples) for name in names or BENCHMARKS}
    empty = [name for name, samples in chosen.items() if not samples]
    if names and empty:
        raise DataError(f"{empty[0]}: this run has no such questions; it has {', '.join(ask_names(questions))}")
    return {
        name: predict(model, questions, samples, stage, BENCHMARKS[name].tokens, batch_size, BENCHMARKS[name].ask)
        for name, samples in chosen.items() if samples
    }  # fmt: skip


def ask_names(questions: Questions) -> list[str]:
    return [name for name, row in BENCHMARKS.items() if select(row, questions.samples)]


def score_file(name: str, annotations: Path, predictions: Path, out: Path | None = None, partial: bool = False) -> dict:
    """Score a predictions file with no model; missing ids are an error, or with `partial` wrong answers."""
    row = find_benchmark(name)
    questions = (row.read or read_questions)(annotations)
    samples = select(row, questions.samples)
    if not samples:
        raise DataError(f"{annotations}: no questions of {name}; it has those of {', '.join(ask_names(questions))}")
    pairs, faults = read_predictions(predictions)
    answered = {s.id for s in samples} & {str(key) for key, _ in pairs}
    check_count(name, len(samples), row.expected, "questions", partial)
    check_count(name, len(answered), len(samples), "answered questions", partial)
    entries = {label(name, questions): score(name, questions, pairs, faults=faults)}
    if out:
        save_metrics(out, entries, provenance(predictions=predictions.name, annotations=annotations.name))
    print(table(entries))
    return entries


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Scores of a finished run, or of a file of predictions.")
    parser.error = lambda message: parser.exit(2, f"evaluate.py: {message}\n")
    parser.add_argument("--run", type=Path, help="folder of a finished run")
    parser.add_argument("--benchmark", nargs="+", default=[], metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--proposals", default="gt",
                        help=f"what stands for objects: {', '.join(PROPOSALS)}; fase3d also: clusters")  # fmt: skip
    parser.add_argument("--objects", type=int, nargs="+", default=[None], metavar="N",
                        help="with --run: ask in fresh rooms of N objects; scores go to OUT/objects-N")  # fmt: skip
    parser.add_argument("--partial", action="store_true", help="accept fewer questions or answers than there should be")
    parser.add_argument("--annotations", type=Path, help="the benchmark's questions; no model is needed then")
    parser.add_argument("--predictions", type=Path, help='lines of {"id": .., "prediction": "text"}')
    parser.add_argument("--out", type=Path, help="metrics.json to write; with --run: the folder for it")
    a = parser.parse_args(arguments)
    try:
        for name in a.benchmark:
            find_benchmark(name)
        if a.run and not (a.annotations or a.predictions):
            import train

            done = train.load_run(a.run)
            for n in a.objects:
                out = (a.out or a.run) / f"objects-{n}" if n else a.out
                evaluate_run(done, a.benchmark, a.proposals, a.partial, out, objects=n)
        elif a.annotations and a.predictions and len(a.benchmark) == 1 and not a.run:
            score_file(a.benchmark[0], a.annotations, a.predictions, a.out, a.partial)
        else:
            parser.error("give --run DIR, or one --benchmark NAME with --annotations FILE and --predictions FILE")
    except DataError as e:
        parser.exit(2, f"evaluate.py: {e}\n")


if __name__ == "__main__":
    main()
