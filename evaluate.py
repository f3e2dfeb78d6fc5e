"""Scores under named protocols: run a finished model, or score a file of predictions with no model at all.

    python evaluate.py --run runs/proxy3d [--benchmark rooms/qa ...] [--proposals gt|segments] [--objects 50 100]
    python evaluate.py --run runs/proxy3d --benchmark scanqa --annotations FILE [--root SCANS]
    python evaluate.py --benchmark scanqa --annotations FILE --predictions FILE.jsonl [--root SCANS] [--out FILE]

A benchmark is one row of `BENCHMARKS`: how to read its file, how to ask, how to score. A metric is a small pure
function of an answer and the truth. Peers score differently under one name, so a metric's name carries its protocol
("em/cleaned", "acc@0.5/scanrefer", "score/official"), and what cannot be computed (no Java) is None, never zero. Shares
are in 0..1 and text scores are pycocoevalcap's own; papers print both times 100.

What counts as no answer: a missing id, an id given twice, a prediction that is not text, text without a letter or digit
or longer than LIMIT characters. No answer scores the worst value of every metric and never drops out of a mean; that
nothing fits (zero targets) must be said in words. An identifier that the scene does not have, or a box with NaN or
without volume, is an answer that hits nothing.

Beside every score stand chance and blind, computed for the very questions scored.

Contents: 1 reading an answer · 2 metrics · 3 captions · 4 benchmarks · 4b official files · 5 scoring · 6 asking a
model · 6b mixtures to train on · 7 files · 8 tables and failures · 9 the report · 10 runs and the command line
"""

from __future__ import annotations

import ast
import base64
import contextlib
import csv
import functools
import hashlib
import html
import importlib
import io
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
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


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]],
                   protocols: Sequence[str] = ("ptb", "raw")) -> dict[str, float | None]:  # fmt: skip
    """CIDEr, BLEU-1..4, ROUGE-L and METEOR of a corpus, from pycocoevalcap: "/ptb" with the PTB tokenizer, as ScanQA
    and Chat-Scene do, "/raw" split at spaces, as LL3DA does. Without Java what needs it is None.

    CIDEr weighs words by the references of this very set: one sample scores 0, one-word answers at most 2.5. No answer
    counts as words that match nothing, as many as the longest text here has: with no words at all, corpus BLEU and
    METEOR would be better than with wrong ones. Corpus BLEU has its maximum where the lengths agree, so it is taken
    with one such word as well, and the worse of both counts: then no answer is worth less than silence.
    """
    texts = [[one_line(r) for r in group] for group in references] + [[one_line(c)] for c in captions]
    scores: dict[str, float | None] = {f"{name}/{p}": None for p in protocols for name in (*NGRAM, "meteor")}
    for protocol in protocols:
        with contextlib.suppress(OSError, ValueError):  # Java is there but fails: not available either
            if protocol == "raw" or java():
                words = ptb(texts) if protocol == "ptb" else texts
                pair, short = (beside(words, len(captions), filler) for filler in (None, 1))
                found = ngram_scores(*pair, protocol)
                if short != pair:
                    worse = ngram_scores(*short, protocol)
                    found = {key: min(value, worse[key]) for key, value in found.items()}
                scores |= found | ({f"meteor/{protocol}": float(meteor().compute_score(*pair)[0])} if java() else {})
    return scores


def beside(words: Sequence[Sequence[str]], count: int, filler: int | None = None) -> tuple[dict, dict]:
    """(references, captions) by number, from the references of `count` captions and then the captions; in place of an
    empty one `filler` words that match nothing (default: as many as the longest text has)."""
    known, said = dict(enumerate(words[:count])), dict(enumerate(words[count:]))
    silence = " ".join([MISS] * (filler or max(len(t.split()) for group in words for t in group)))
    return known, {i: [c or silence] for i, (c,) in said.items()}


def ngram_scores(known: dict, said: dict, protocol: str) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    values = [Cider().compute_score(known, said)[0], *Bleu(4).compute_score(known, said, verbose=0)[0],
              Rouge().compute_score(known, said)[0]]  # fmt: skip
    return {f"{name}/{protocol}": float(v) for name, v in zip(NGRAM, values, strict=True)}


def captions_at_iou(captions: Sequence[str], ious: Sequence[float], threshold: float, strict: bool) -> list[str]:
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
    expected: int | None = None  # questions of the official split, where the file's name tells which that is
    notes: list[str] = field(default_factory=list)  # what a reader of the scores should know
    file: str = ""  # the official file and its checksum

    def __post_init__(self):
        self.shown = self.shown or self.scenes

    @property
    def hidden(self) -> bool:
        """An official test split that came without answers."""
        return not any(s.answer or s.answers or s.targets is not None or s.value is not None for s in self.samples)


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

    @property
    def caption(self) -> str:
        """The words of an answer that may also say a box; "" where that is none."""
        found = boxes(self.text)
        words = TUPLE.sub(" ", self.text) if found else self.text
        return words.strip() if all(b is not None for b in found) and any(map(str.isalnum, words)) else ""

    @property
    def fit(self) -> float:
        """How well what is captioned fits the object: IoU of the box said, else of the best proposal."""
        offered = boxes(self.text)[:1] or [o.box for o in self.shown.objects if o.id in self.shown.identifiers]
        offered = [b for b in offered if b is not None]
        return float(iou_matrix(np.stack(offered), np.stack(self.truth)).max()) if offered and self.truth else 0.0


def refer(scene: Scene, object_id: int) -> str:
    """How an object is written: its identifier, or a word that no answer holds where it has none."""
    known = scene.identifiers.get(object_id)
    return MISS if known is None else f"<OBJ{known:03d}>"


@dataclass(frozen=True)
class Benchmark:
    """One row: `metrics` are means over questions, `corpus` are scores of the whole set; the first of them all is the
    headline. `group` names a question's part of the table ("" = none), or several as a tuple. With `macro`, which
    merges groups, a metric is the mean of the merged groups' means and the mean over questions becomes
    "<metric>_micro"."""

    tasks: tuple[str, ...] = ()  # a run's samples that belong here; () = all
    metrics: Mapping[str, Callable[[Case], float]] = field(default_factory=dict)
    corpus: Callable[[list[Case]], dict[str, float | None]] = lambda cases: {}
    group: Callable[[Sample], str | tuple[str, ...]] = lambda sample: sample.kind
    macro: Callable[[str], str] | None = None
    fault: Callable[[Case], str] = lambda case: ""  # what an answer with text lacks, for the report
    beside: tuple[str, ...] = ()  # this row is asked wherever one of these tasks was trained, its own never are
    baselines: Mapping[str, Callable[[Case], str]] = field(default_factory=dict)  # column -> answer made from the truth
    tokens: int = 24  # the longest answer
    ask: str = "{question}"  # the prompt around the question; part of the result
    ask_choice: str = ""  # the same where the question has {options}, one per line
    format: Format | None = None  # its official files; None: the file a run writes, `read_questions`
    submit: Callable[[Case], dict] | None = None  # one entry of the submission file, where a test split hides answers

    def prompt(self, sample: Sample) -> str:
        ask = self.ask_choice if sample.options and self.ask_choice else self.ask
        return ask.replace("{options}", "\n".join(sample.options or [])).replace("{question}", sample.question)


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
                               corpus=lambda cases: room_captions(cases)),
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


# ---- 4b official files -----------------------------------------------------------------------------------------------
#
# An official file is rows with named fields; one small function per benchmark says which field is what. Objects of
# ScanNet are numbered objectId + 1 (0 is "no object"). Nothing here needs the scans: `with_scans` adds them.


@dataclass(frozen=True)
class Row:
    """One row of an official file. row(field, kind) is that field's value as str, int, float, dict or a list of one of
    them; whatever is wrong with it is a DataError that names file, row and field. Whole numbers may come as text."""

    path: Path
    number: int
    held: object

    def error(self, name: str, what: str) -> DataError:
        return DataError(f"{self.path}, row {self.number}, field {name}: {what}")

    def __call__(self, name: str, kind: object = str, *default: object):
        if not isinstance(self.held, dict):
            raise self.error(name, "the row is no object with fields; get the file again")
        if default and self.held.get(name) is None:
            return default[0]
        if name not in self.held:
            raise self.error(name, f"missing; the row has {', '.join(map(str, self.held)) or 'nothing'}")
        try:
            return checked(self.held[name], kind)
        except (TypeError, ValueError):
            wanted = f"list of {kind[0].__name__}" if isinstance(kind, list) else kind.__name__
            raise self.error(name, f"{str(self.held[name])[:40]!r} is not a {wanted}; get the file again") from None


def checked(value: object, kind: object):
    if isinstance(kind, list):
        if not isinstance(value, list):
            raise TypeError
        return [checked(v, kind[0]) for v in value]
    accepted = {str: str, dict: dict, int: (int, str), float: (int, float, str)}[kind]
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise TypeError
    value = kind(value)
    if (kind is float and not np.isfinite(value)) or (kind is str and not value.strip()):
        raise ValueError
    return value


def read_parquet(path: Path) -> list[dict]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(f"{path}: pip install pyarrow reads parquet; or use the .jsonl file of the same rows") from None
    with data.reading(path, "parquet file"):
        return parquet.read_table(path).to_pylist()


def read_csv(path: Path) -> list[dict]:
    with data.reading(path, "table"), path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_rows(path: Path, key: str = "") -> list[Row]:
    """The rows of a .json (a list, or what lies under `key`), .jsonl, .csv or .parquet file, counted from 1."""
    if path.suffix == ".jsonl":
        return [Row(path, number, held) for number, held in read_lines(path)]
    if path.suffix in (".csv", ".parquet"):
        held = {".csv": read_csv, ".parquet": read_parquet}[path.suffix](path)
    else:
        held = data.read_json(path)
    if isinstance(held, dict):
        held = held.get(key)
    if not isinstance(held, list):
        raise DataError(f"{path}: no list of rows{f' under {key!r}' * bool(key)}; is it this benchmark's file?")
    return [Row(path, number, row) for number, row in enumerate(held, start=1)]


@dataclass(frozen=True)
class Format:
    """How a benchmark's official files become questions."""

    sample: Callable[[Row], Sample | None]  # None: a row that does not belong here
    splits: Mapping[str, tuple[str, int | None]]  # split -> its file's name, and how many questions it has
    scored: str = "val"  # the split that papers report
    rows: Callable[[Path, str], Iterable[Row]] = read_rows  # of a file, or of a split in it
    merged: bool = False  # rows of one id are one question with several answers
    hidden: tuple[str, ...] = ()  # splits whose answers are not public
    finish: Callable[[Questions, Sequence[Path]], None] | None = None  # what needs the whole file, or one beside it
    place: Callable[[Sample, Scene, np.ndarray], Sample] | None = None  # into the scan's frame, where theirs differs


def asked(id: str, scene: str, task: str, question: str, answers: Sequence[str], **more: object) -> Sample:
    """A Sample whose `wording` lets the blind baseline back off word by word."""
    words = "|".join([task, *re.findall(r"[a-z]+", question.lower())[:4]])
    return Sample(id, scene, task, question, answers[0] if answers else "", list(answers), wording=words, **more)


SCANQA_KINDS = (("what color", "color"), ("what (type|shape|kind)", "nature"), ("where", "place"),
                ("how many", "number"), ("what is|what are", "object"))  # fmt: skip


def scanqa(row: Row) -> Sample:
    question = row("question")
    kind = next((k for start, k in SCANQA_KINDS if re.match(start, question.lower())), "other")
    return asked(row("question_id"), row("scene_id"), "qa", question, row("answers", [str], []), kind=kind)


def sqa3d_rows(path: Path, split: str = "") -> list[Row]:
    """Questions joined with the annotations beside them."""
    beside = path.with_name(path.name.replace("_questions_", "_sqa_annotations_"))
    if beside == path:
        raise DataError(f"{path}: give SQA3D's v1_balanced_questions_<split>_scannetv2.json, annotations beside it")
    known = {row("question_id", int): row for row in read_rows(beside, "annotations")}
    joined = []
    for row in read_rows(path, "questions"):
        if row("question_id", int) not in known:
            raise row.error("question_id", f"not in {beside.name}; get both files of one release")
        joined.append(replace(row, held=known[row("question_id", int)].held | row.held))
    return joined


def sqa3d(row: Row) -> Sample:
    question = row("question")
    kind = next((k for k in ("what", "is", "how", "can", "which") if question.lower().startswith(k)), "others")
    answers = [Row(row.path, row.number, a)("answer") for a in row("answers", [dict])]
    sample = asked(str(row("question_id", int)), row("scene_id"), "situated", question, answers, kind=kind)
    return replace(sample, question=f"{row('situation')} {question}")


def situation(row: Row) -> Sample:
    """Where am I: point = position in metres, value = degrees around z, both in the file's own frame."""
    position, turn = (Row(row.path, row.number, row(f, dict)) for f in ("position", "rotation"))
    degrees = float(np.degrees(2 * np.arctan2(turn("_z", float), turn("_w", float))))
    sample = asked(str(row("question_id", int)), row("scene_id"), "localise", row("situation"), [])
    return located(sample, np.array([position(axis, float) for axis in "xyz"]), degrees)


def located(sample: Sample, at: np.ndarray, degrees: float) -> Sample:
    degrees = (degrees + 180) % 360 - 180
    return replace(sample, point=at, value=degrees, answer=f"[{at[0]:.2f}, {at[1]:.2f}, {degrees:.0f}]")


def place_situation(sample: Sample, scene: Scene, world: np.ndarray) -> Sample:
    """SQA3D's positions are relative to the scene's centre and unaligned; its rotations point backward: p R^T + centre
    of the aligned cloud, turned by R and by half a circle, as LEO does. world [4, 4]: the scan's axis alignment."""
    centre = (scene.points.min(0) + scene.points.max(0)) / 2
    turn = float(np.degrees(np.arctan2(world[1, 0], world[0, 0])))
    return located(sample, world[:3, :3] @ sample.point + centre, sample.value + turn + 180)


def scanrefer(row: Row) -> Sample:
    scene, thing = row("scene_id"), row("object_id", int, None)
    targets = None if thing is None else [thing + 1]
    kind = row("eval_type", str, "") or row("object_name", str, "").replace("_", " ")
    return asked(f"{scene}|{'' if thing is None else thing}|{row('ann_id')}", scene, "ground", row("description"),
                 [f"<obj {i}>" for i in targets or []], targets=targets, kind=kind)  # fmt: skip


CLASSES = {"cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter", "desk",
           "curtain", "refrigerator", "shower curtain", "toilet", "sink", "bathtub"}  # and "others"  # fmt: skip
LABELS = "scannetv2-labels.combined.tsv"


def unique_or_multiple(questions: Questions, folders: Sequence[Path]) -> None:
    """ScanRefer's rule: unique = the only object of its class among the scene's *annotated* objects; 17 NYU40 classes,
    all else is the class "others". Files of M3DRef bring the split along (eval_type)."""
    if all(s.kind in ("unique", "multiple") for s in questions.samples):
        return
    table = next((p / LABELS for p in folders if (p / LABELS).exists()), None)
    if table is None:
        questions.samples[:] = [replace(s, kind="") for s in questions.samples]
        questions.notes.append(f"unique/multiple not available: {LABELS} lies neither beside the annotations nor in "
                               "--root")  # fmt: skip
        return
    with data.reading(table, "ScanNet label table"):
        rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines()[1:]]
        known = {r[1]: r[7] if r[7] in CLASSES else "others" for r in rows}
    of = lambda s: known.get(s.kind, "others")  # noqa: E731
    objects = {(s.scene, s.id.split("|")[1], of(s)) for s in questions.samples}
    count = Counter((scene, name) for scene, _, name in objects)
    questions.samples[:] = [replace(s, kind="unique" if count[s.scene, of(s)] == 1 else "multiple")
                            for s in questions.samples]  # fmt: skip


ZERO_TO_MANY = ("zt_w_d", "zt_wo_d", "st_w_d", "st_wo_d", "mt")


def several(id: str, scene: str, question: str, targets: list[int], **more: object) -> Sample:
    answer = f"yes. {' '.join(f'<obj {i}>' for i in targets)}" if targets else "no."
    return asked(id, scene, "multi", question, [answer], targets=targets, **more)


def multi3drefer(row: Row) -> Sample:
    kind, scene = row("eval_type"), row("scene_id")
    if kind not in ZERO_TO_MANY:
        raise row.error("eval_type", f"{kind!r} is none of {', '.join(ZERO_TO_MANY)}")
    targets = [i + 1 for i in row("object_ids", [int])]
    return several(f"{scene}|{row('ann_id', int)}", scene, row("description"), targets, kind=kind)


def scan2cap(row: Row) -> Sample:
    """One object of ScanRefer (or of Nr3D in the same form); rows of one object are merged."""
    scene, thing = row("scene_id"), row("object_id", int)
    tokens = row("token", [str], None) or row("description").lower().split()
    return asked(f"{scene}|{thing}", scene, "caption", f"describe <obj {thing + 1}>.", [row("description")],
                 tokens=[" ".join(tokens[:30])], targets=[thing + 1])  # fmt: skip


VIEW_WORDS = {"front", "behind", "back", "right", "left", "facing", "leftmost", "rightmost", "looking", "across"}


def nr3d(row: Row) -> Sample:
    """easy: at most two objects of the class in the stimulus; view_dep: a word that depends on where one stands."""
    scene, thing, stimulus = row("scan_id"), row("target_id", int), row("stimulus_id")
    try:
        number, tokens = int(stimulus.split("-")[2]), ast.literal_eval(row("tokens"))
    except (IndexError, ValueError, SyntaxError):
        raise row.error("stimulus_id, tokens", "not scene-label-n-target-... and a list; get the file again") from None
    kind = f"{'easy' if number <= 2 else 'hard'} view_{'dep' if VIEW_WORDS & set(tokens) else 'indep'}"
    return asked(f"{row('assignmentid')}|{stimulus}", scene, "ground", row("utterance"), [f"<obj {thing + 1}>"],
                 targets=[thing + 1], kind=kind)  # fmt: skip


def mmscan_qa(row: Row) -> Sample:
    return asked(row("ID"), row("scan_id").split("/")[-1], "qa", row("question"), row("answers", [str], []),
                 kind=row("sub_class"))  # fmt: skip


def mmscan_vg(row: Row) -> Sample:
    return several(row("ID"), row("scan_id").split("/")[-1], row("text"), row("target_id", [int]),
                   kind=row("sub_class"))  # fmt: skip


MMSCAN_BOXES = "MMScan_boxes.json"


def mmscan_boxes(questions: Questions, folders: Sequence[Path]) -> None:
    """MMScan numbers objects as EmbodiedScan's pickles do, which nothing here opens. Their boxes come as JSON, {scan:
    {bbox_id: [centre, size, zxy Euler angles]}}; scored is the axis-aligned extent."""
    from scipy.spatial.transform import Rotation

    path = next((p / MMSCAN_BOXES for p in folders if (p / MMSCAN_BOXES).exists()), None)
    if path is None:
        raise DataError(f"{folders[0]}: no {MMSCAN_BOXES}, {{scan: {{bbox_id: [9 numbers]}}}}, exported from "
                        "embodiedscan_infos_*.pkl")  # fmt: skip
    with data.reading(path, "table of boxes"):
        for name, found in data.read_json(path).items():
            rows = np.array(list(found.values()), float).reshape(-1, 9)
            size = np.abs(Rotation.from_euler("ZXY", rows[:, 6:]).as_matrix()) @ rows[:, 3:6, None]
            things = [Thing(int(i), "", "", np.append(r[:3], s)) for i, r, s in zip(found, rows, size[..., 0],
                                                                                    strict=True)]  # fmt: skip
            questions.scenes[name.split("/")[-1]] = Scene(name.split("/")[-1], "scannet", things)
    known = {(n, o.id) for n, s in questions.scenes.items() for o in s.objects}
    kept = [s for s in questions.samples if {(s.scene, i) for i in s.targets} <= known]
    if lost := len(questions.samples) - len(kept):  # a few, in the release itself
        questions.notes.append(f"{lost} questions about objects that {path.name} lacks are not asked")
    questions.samples[:] = kept


def sr91k(row: Row) -> Sample | None:
    """SpaceR-151k also holds questions of other sources and kinds: those are skipped."""
    kind = row("problem_type")
    if not row("data_source", str, "SR").startswith("SR") or kind not in ("multiple choice", "numerical", "regression"):
        return None
    solution = re.sub(r"</?answer>", "", row("solution")).strip()
    id, scene, options = str(row("problem_id", int, row.number)), Path(row("path")).stem, row("options", [str], None)
    sample = asked(id, scene, "vsi", row("problem"), [solution], kind=kind, options=options or None)
    return valued(row, sample, "solution")


VSI_TASKS = {
    "object_counting": "counting", "object_abs_distance": "abs_distance", "object_size_estimation": "object_size",
    "room_size_estimation": "room_size", "object_rel_distance": "rel_distance", "route_planning": "route",
    "obj_appearance_order": "order", "object_rel_direction_easy": "rel_direction easy",
    "object_rel_direction_medium": "rel_direction medium", "object_rel_direction_hard": "rel_direction hard",
}  # fmt: skip


def vsibench(row: Row) -> Sample:
    if row("question_type") not in VSI_TASKS:
        raise row.error("question_type", f"{row('question_type')!r} is none of {', '.join(VSI_TASKS)}")
    task, _, kind = VSI_TASKS[row("question_type")].partition(" ")
    sample = asked(str(row("id", int)), row("scene_name"), f"vsi_{task}", row("question"), [row("ground_truth")],
                   kind=kind, options=row("options", [str], None))  # fmt: skip
    return valued(row, sample, "ground_truth")


def valued(row: Row, sample: Sample, name: str) -> Sample:
    """A choice's letter must be among its options; anything else must be a number."""
    if sample.options:
        if sample.answer not in {o[0] for o in sample.options}:
            raise row.error(name, f"{sample.answer!r} is no letter of {' '.join(sample.options)[:60]}")
        return sample
    return replace(sample, value=Row(row.path, row.number, {name: sample.answer})(name, float))


def dialogue(row: Row) -> Sample:
    question = re.sub(r"###\s*(human|assistant)\s*:", " ", row("question"))
    return asked(f"{row.path.stem}|{row.number}", row("scene_id"), "chat", " ".join(question.split()),
                 row("answers", [str]))  # fmt: skip


def texts(cases: list[Case]) -> dict[str, float | None]:
    return caption_scores([c.text for c in cases], [c.references for c in cases])


def dense_captions(cases: list[Case]) -> dict[str, float | None]:
    """m@kIoU over the annotated objects, in both conventions: "/chat-scene" IoU >= k with the PTB tokenizer, "/ll3da"
    IoU > k without, against each reference's first 30 tokens. An object that no proposal fits counts as "sos eos"; no
    answer has not even these."""
    scores: dict[str, float | None] = {}
    for k in (0.5, 0.25):
        for name, protocol, strict in (("chat-scene", "ptb", False), ("ll3da", "raw", True)):
            known = [c.sample.tokens if strict and c.sample.tokens else c.references for c in cases]
            said = captions_at_iou([c.caption for c in cases], [c.fit for c in cases], k, strict)
            said = [text if c.caption else "" for text, c in zip(said, cases, strict=True)]
            found = caption_scores(said, [[f"sos {r} eos" for r in group] for group in known], [protocol])
            scores |= {f"{key.partition('/')[0]}@{k}/{name}": value for key, value in found.items()}
    return scores


def room_captions(cases: list[Case]) -> dict[str, float | None]:
    """Captions of the objects that were asked about; where proposals stood for them, first of all m@kIoU."""
    found = caption_scores([c.text for c in cases], [c.references for c in cases])
    return found if all(c.shown is c.scene for c in cases) else dense_captions(cases) | found


def best_guess(case: Case, error: Callable[[np.ndarray, Sample], float]) -> float:
    """The smallest error of the first three guesses [x, y, degrees]; SQA3D's script takes place and angle apart."""
    return min((error(g, case.sample) for g in tuples(case.text, 3)[:3] if g is not None), default=np.inf)


def metres_off(guess: np.ndarray, truth: Sample) -> float:
    return float(np.linalg.norm(np.clip(guess[:2] - truth.point[:2], -1e6, 1e6)))


def degrees_off(guess: np.ndarray, truth: Sample) -> float:
    return float(abs((guess[2] - truth.value + 180) % 360 - 180))


LOCALISE = {
    **{f"within_{t}_m/sqa3d": lambda c, t=t: float(best_guess(c, metres_off) < t) for t in (0.5, 1.0)},
    **{f"within_{t}_degrees/sqa3d": lambda c, t=t: float(best_guess(c, degrees_off) < t) for t in (15, 30)},
}
WORD = "{question}\nAnswer the question using a single word or phrase."
SPLITS = ("train", "val", "test")


def files(name: str, *counts: int | None) -> dict[str, tuple[str, int | None]]:
    """Of train, val and test, in this order."""
    return {split: (name.replace("*", split), n) for split, n in zip(SPLITS, (*counts, *[None] * 3), strict=False)}


def submit_scanqa(case: Case) -> dict:
    return {"scene_id": case.sample.scene, "question_id": case.sample.id, "answer_top10": [case.text] * 10,
            "bbox": np.zeros((8, 3)).tolist()}  # fmt: skip


def submit_scanrefer(case: Case) -> dict:
    """The box as its 8 corners. "others" only sorts the server's table; it is not derived here."""
    found = next((b for b in case.referred if b is not None), np.zeros(6))
    corners = [found[:3] + found[3:] * np.array(signs) / 2 for signs in itertools.product((-1, 1), repeat=3)]
    scene, thing, ann = case.sample.id.split("|")
    return {"scene_id": scene, "object_id": thing, "ann_id": ann, "bbox": np.array(corners).tolist(),
            "unique_multiple": int(case.sample.kind == "multiple"), "others": 0}  # fmt: skip


_VSI = BENCHMARKS["rooms/vsi"]
_CHOICE = "Options:\n{options}\nAnswer with the option's letter from the given choices directly."
_GROUND = dict(metrics=GROUNDING, corpus=distinct_ids, fault=fault_reference)
_MULTI = dict(metrics=MULTI, fault=lambda c: fault_reference(c, may_be_none=True), tokens=64)
_CAPTION = dict(corpus=dense_captions, tokens=64, group=lambda s: "")
BENCHMARKS |= {
    "scanqa": Benchmark(("qa",), EXACT, texts, ask=WORD, submit=submit_scanqa, format=Format(scanqa, {
        **files("ScanQA_v1.0_*.json", 25_563, 4_675), "test_w_obj": ("ScanQA_v1.0_test_w_obj.json", 4_976),
        "test_wo_obj": ("ScanQA_v1.0_test_wo_obj.json", 6_149)}, hidden=("test_w_obj", "test_wo_obj"))),
    "sqa3d": Benchmark(("situated",), {k: EXACT[k] for k in ("em/cleaned", "em/refined", "em/strict")}, texts, ask=WORD,
                       format=Format(sqa3d, files("v1_balanced_questions_*_scannetv2.json", 26_623, 3_261, 3_519),
                                     "test", sqa3d_rows)),
    "sqa3d/localisation": Benchmark(
        ("localise",), LOCALISE, tokens=48, ask="{question} Where am I, and which way do I face? Answer as [x, y, "
        "degrees].", fault=lambda c: "" if point(c.text) is not None else "no [x, y, degrees]",
        format=Format(situation, files("v1_balanced_questions_*_scannetv2.json", 26_623, 3_261, 3_519), "test",
                      sqa3d_rows, place=place_situation)),
    "scanrefer": Benchmark(("ground",), **_GROUND, ask="Which object is described? {question}", submit=submit_scanrefer,
                           format=Format(scanrefer, files("ScanRefer_filtered_*.json", 36_665, 9_508, 5_410),
                                         hidden=("test",), finish=unique_or_multiple)),
    "multi3drefer": Benchmark(("multi",), **_MULTI, ask="Which objects are described, if any? {question}",
                              format=Format(multi3drefer, files("multi3drefer_*.json", 43_838, 11_120, 6_968))),
    "scan2cap": Benchmark(("caption",), **_CAPTION, format=Format(
        scan2cap, files("ScanRefer_filtered_*.json", 7_875, 2_068, 1_103), merged=True)),
    "nr3d": Benchmark(("ground",), {"acc/id": lambda c: first_hit(c, 0.9)}, distinct_ids,
                      lambda s: tuple(s.kind.split()), fault=fault_reference,
                      ask="Which object is described? {question}",
                      format=Format(nr3d, files("nr3d_*.csv") | {"all": ("nr3d.csv", 41_503)}, "test")),
    "nr3d/caption": Benchmark(("caption",), **_CAPTION, format=Format(scan2cap, files("nr3d_*.json"), merged=True)),
    "mmscan/qa": Benchmark(("qa",), EXACT, texts, tokens=64, format=Format(
        mmscan_qa, files("MMScan_QA.json"))),
    "mmscan/vg": Benchmark(("multi",), **_MULTI, ask="Which objects are described, if any? {question}", format=Format(
        mmscan_vg, files("MMScan_VG.json"), finish=mmscan_boxes)),
    "sr91k": Benchmark(("vsi",), SPATIAL, fault=_VSI.fault, tokens=16, ask=WORD, ask_choice="{question}\n" + _CHOICE,
                       format=Format(sr91k, {"train": ("SpaceR-151k.jsonl", None)}, "train")),
    "vsibench": replace(
        _VSI, ask=f"These are frames of a video.\n{WORD.replace('Answer', 'Please answer')}",
        ask_choice=f"These are frames of a video.\n{{question}}\n{_CHOICE}", format=Format(vsibench, {
            "test": ("test.jsonl", 5_130), "parquet": ("test-00000-of-00001.parquet", 5_130)}, "test")),
    **{f"3dllm/{short}": Benchmark(("chat",), EXACT if short == "qa" else {}, texts, lambda s: "", tokens=tokens,
                                   format=Format(dialogue, files(f"3d_llm_{long}_*.json", *counts)))
       for short, long, tokens, counts in (
           ("description", "scene_description", 256, (912, 121)),
           ("dialogue", "embodied_dialogue_filtered", 128, (None, 1_222)),
           ("planning", "embodied_planning_filtered", 256, (None, 2_282)),
           ("qa", "embodied_question_answer", 24, (14_944, 1_938)))},
}  # fmt: skip


def generated() -> list[str]:
    """Benchmarks of generated questions: what a run is asked where nothing is named."""
    return [name for name, row in BENCHMARKS.items() if row.format is None]


def find_split(folder: Path, format: Format, split: str) -> Path | None:
    """The file of a split anywhere below a folder."""
    return min(folder.rglob(format.splits[split][0]), default=None) if split in format.splits else None


def read_official(name: str, path: Path, root: Path | None = None, split: str = "") -> Questions:
    """Questions of an official file, or of the split that papers score found below a folder, with scenes that have a
    name and nothing else. root: where the scans' tables may lie. Duplicate ids and rows without answers are refused."""
    format = find_benchmark(name).format
    if path.is_dir():
        found = find_split(path, format, split or format.scored)
        if found is None:
            wanted = format.splits.get(split or format.scored, ("file of that split",))[0]
            raise DataError(f"{path}: no {wanted} below it; name the file itself")
        path = found
    order = [split or format.scored, *format.splits]  # a file that holds all splits is known by the one wanted
    split = next((s for s in order if format.splits.get(s, ("",))[0] == path.name), "")
    questions = Questions([], {}, expected=format.splits.get(split, ("", None))[1], file=fingerprint(path))
    known: dict[str, Sample] = {}
    for row in format.rows(path, split):
        sample = format.sample(row)
        if sample is None:
            continue
        if sample.id in known and not format.merged:
            raise row.error("id", f"{sample.id} twice; question ids must differ")
        first = known.setdefault(sample.id, sample)
        if first is not sample:
            first.answers += sample.answers
            first.tokens += sample.tokens
        elif split in format.hidden:
            known[sample.id] = replace(sample, answer="", answers=[], targets=None)
    questions.samples = list(known.values())
    if not questions.samples:
        raise DataError(f"{path}: no questions of {name}")
    open_ended = [s.id for s in questions.samples if not (s.answer or s.targets is not None)]
    if open_ended and not questions.hidden:
        raise DataError(f"{path}, field answers: {open_ended[0]} has none while others have; get the file again")
    if format.finish:
        folders = [path.parent, path.parent.parent, *([root] if root else [])]
        format.finish(questions, folders)
    for s in questions.samples:
        questions.scenes.setdefault(s.scene, Scene(s.scene, "scannet", []))
    questions.shown = questions.scenes
    return questions


def scans_below(root: Path) -> set[str]:
    places = [root / p for p in ("", "scans", "scans_test")]
    return {p.parent.name for place in places for p in place.glob(f"*/*{data.SCAN_FILES[0]}")}


LOST = np.array([1e6, 1e6, 1e6, 1e-3, 1e-3, 1e-3])  # the box of a target that its scan does not have: nothing hits it


def with_scans(name: str, questions: Questions, root: Path, partial: bool = False) -> Questions:
    """The same questions with the scans below `root` as their scenes. Targets that a scan lacks count as missed, as in
    the literature, and are reported; questions of scans that are not there are an error, or left out with `partial`."""
    row, there = find_benchmark(name), scans_below(root)
    missing = sorted(questions.scenes.keys() & {s.scene for s in questions.samples} - there)
    if missing and (not partial or len(missing) == len(questions.scenes)):
        raise DataError(f"{root}: {len(missing)} of {len(questions.scenes)} scans are not there, such as {missing[0]}; "
                        "python data.py check says what is needed, --partial leaves their questions out")  # fmt: skip
    samples = [s for s in questions.samples if s.scene in there]
    scans = {n: data.open_scan(root, n) for n in sorted({s.scene for s in samples})}
    if row.format and row.format.place:
        samples = [row.format.place(s, scans[s.scene], alignment(root, s.scene)) for s in samples]
    targets = {n: set() for n in scans}
    for s in samples:
        targets[s.scene].update(s.targets or [])
    scenes, lost = {}, 0
    for n, scan in scans.items():
        own = questions.scenes[n].objects or scan.objects
        absent = sorted(targets[n] - {o.id for o in own})
        if absent or own is not scan.objects:
            scenes[n] = replace(scan, objects=[*own, *(Thing(i, "", "", LOST) for i in absent)])
        lost += len(absent)
    notes = [*questions.notes, *([f"{lost} targets have no box in their scans and count as missed"] if lost else [])]
    return replace(questions, samples=samples, scenes=scans | scenes, shown=scans, notes=notes)


def alignment(root: Path, scene: str) -> np.ndarray:
    """A scan's axisAlignment [4, 4]; the identity where it has none."""
    path = data.scan_folder(root, scene) / f"{scene}.txt"
    with data.reading(path, "axisAlignment of 16 numbers"):
        text = data.scan_fields(path).get("axisAlignment", "1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1")
        return np.array(text.split(), float).reshape(4, 4)


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


def groups_of(row: Benchmark, sample: Sample) -> tuple[str, ...]:
    group = row.group(sample)
    return group if isinstance(group, tuple) else (group,) * bool(group)


def summarise(row: Benchmark, samples: Sequence[Sample], values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Means of values per question, over all and per group: {"metric/protocol": .., "metric/protocol/group": ..}."""
    groups: dict[str, list[int]] = {}
    for i, s in enumerate(samples):
        for name in groups_of(row, s):
            groups.setdefault(name, []).append(i)
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
    groups = [g for s in samples for g in groups_of(row, s)]
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


def majority(samples: Sequence[Sample]) -> dict[str, dict[str, str]]:
    """Two columns for open questions: the most frequent answer of this very file, given to all of them (what knowing
    nothing but the answers is worth), and each question's first reference (what the score can reach)."""
    if any(s.targets is not None or s.options or not s.answers for s in samples):
        return {}
    most = Counter(a for s in samples for a in s.answers).most_common(1)[0][0]
    return {"majority": {s.id: most for s in samples}, "first reference": {s.id: s.answers[0] for s in samples}}


def cases_of(name: str, questions: Questions,
             answers: Iterable[tuple[object, object]] | Mapping[str, str]) -> tuple[list[Case], Counter]:  # fmt: skip
    """(one case for every question of a benchmark, what was wrong with the answers: `admit`)."""
    samples = select(find_benchmark(name), questions.samples)
    texts, faults = admit([s.id for s in samples], answers.items() if isinstance(answers, Mapping) else answers)
    return [Case(s, texts[s.id], questions.scenes[s.scene], questions.shown[s.scene]) for s in samples], faults


def score(name: str, questions: Questions, answers: Iterable[tuple[object, object]] | Mapping[str, str],
          columns: Mapping[str, Mapping[str, str]] | None = None, faults: Counter | None = None) -> dict:  # fmt: skip
    """One benchmark's entry of metrics.json: every score of `answers` (id -> text, or pairs as read from a file), the
    headline's chance and blind, the count, what was malformed, the proposals, and under "columns" the same scores for
    blind, chance, the row's baselines and each further set of answers in `columns`."""
    row = find_benchmark(name)
    cases, found = cases_of(name, questions, answers)
    samples = [c.sample for c in cases]
    values = measure(row, cases)
    others = {"blind": questions.blind} if questions.blind.keys() & {s.id for s in samples} else {}
    others |= {k: {c.sample.id: answer(c) for c in cases} for k, answer in row.baselines.items()}
    others |= majority(samples) if row.format else {}
    others |= columns or {}
    others = {k: measure(row, cases_of(name, questions, v)[0]) for k, v in others.items()}
    others["chance"] = chance_scores(row, questions, samples)
    headline = next(iter(values))
    malformed = found + (faults or Counter()) + Counter(f for c in cases if c.text and (f := row.fault(c)))
    entry = values | {"chance": others["chance"].get(headline), "blind": others.get("blind", {}).get(headline),
                      "count": len(samples), "malformed": dict(malformed),
                      "counts": group_counts(row, samples),
                      "proposals": proposal_recall(questions, samples), "columns": others,
                      "expected": questions.expected, "notes": questions.notes, "file": questions.file}  # fmt: skip
    if None in values.values():
        entry["not_available"] = {k: "needs a working Java" for k, v in values.items() if v is None}
    return entry


# ---- 6 asking a model ------------------------------------------------------------------------------------------------

PROPOSALS = {"gt": lambda scene: scene, "segments": lambda scene: data.with_own_segments(scene)}


def prepare(samples: list[Sample], scenes: Mapping[str, Scene], blind: object = None, proposals: str = "gt",
            seed: int = 0, more: Mapping[str, Callable[[Scene], Scene]] | None = None,
            official: Questions | None = None) -> Questions:  # fmt: skip
    """Questions for `run`: fixed identifiers, the chosen proposals, blind answers and guesses (blind: `data.Blind`);
    `more` proposals, by name, come from the model. official: what `with_scans` gave, where the objects shown are not
    quite the truth."""
    sources = PROPOSALS | dict(more or {})
    if proposals not in sources:
        raise DataError(f"unknown proposals {proposals}; known: {', '.join(sources)}")
    names = sorted({s.scene for s in samples})
    seen = {n: numbered((official.shown if official else scenes)[n], seed) for n in names}
    if official:
        scenes = {n: seen[n] if scenes[n] is official.shown[n] else replace(scenes[n], identifiers=seen[n].identifiers)
                  for n in names}  # fmt: skip
    else:
        scenes = seen
    shown = seen if proposals == "gt" else {  # under a name of their own, or caches would mix them up
        name: numbered(sources[proposals](replace(scene, name=f"{name}@{proposals}", identifiers={})), seed)
        for name, scene in seen.items()
    }  # fmt: skip
    questions = replace(official or Questions(samples, scenes), scenes=scenes, shown=shown, proposals=proposals)
    guess_blindly(questions, blind)
    return questions


def guess_blindly(questions: Questions, blind: object = None) -> None:
    """Add what `data.Blind` answers to every question, and the guesses that chance draws from."""
    for s in questions.samples if blind is not None else ():
        shown = questions.shown[s.scene]
        questions.blind[s.id] = substitute(blind.predict(s, shown), lambda i, shown=shown: refer(shown, i))
        if s.task not in questions.guesses:
            questions.guesses[s.task] = list(blind.answers(s.task, 50))


def numbered(scene: Scene, seed: int) -> Scene:
    """The scene with identifiers: its own, or the same random ones at every call."""
    rng = np.random.default_rng([seed, zlib.crc32(scene.name.encode())])
    return scene if scene.identifiers else replace(scene, identifiers=data.number_objects(scene, rng))


def as_shown(sample: Sample, scene: Scene, shown: Scene) -> Sample:
    """The sample in the proposals' terms: marks of true objects become marks of the proposals that fit them best."""
    offered = [o for o in shown.objects if o.id in shown.identifiers]
    marked = {int(i) for text in (sample.question, sample.answer) for i in data.MARK.findall(text)}
    if not offered or (shown is scene and marked <= shown.identifiers.keys()):
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
            tokens: int = 24, batch_size: int = 64,
            ask: Callable[[Sample], str] = lambda sample: sample.question) -> dict[str, str]:  # fmt: skip
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
            groups.append((shown, [replace(s, question=ask(s)) for s in asked]))
        texts = model.generate(model.batch(groups), max_new_tokens=tokens)
        for s, text in zip(chunk, texts, strict=True):
            answers[s.id] = text.rpartition("=")[2].strip() if stage.steps else text
    model.train(training)
    parts = [answers] * world
    if world > 1:
        dist.all_gather_object(parts, answers)
    return merge(parts, [s.id for s in samples])


# ---- 6b mixtures to train on -----------------------------------------------------------------------------------------
#
# A paper's table of sources (`Stage.files`) and a folder of official files give the questions of a stage. No scene of
# an evaluation split is trained in, by space: scene0011_01 is the room of scene0011_00.


def space(scene: str) -> str:
    return scene.split("_")[0]


def evaluation_spaces(names: Iterable[str], folder: Path, root: Path, held: Iterable[Scene]) -> set[str]:
    """Rooms that must not be trained in: those of ScanNet's val and test lists, of the scenes held out by the run, and
    of every other split of these benchmarks that lies in the folder."""
    lists = {p for place in (folder, root) for name in ("val", "test") for p in place.rglob(f"scannetv2_{name}.txt")}
    scenes = {scene for path in lists for scene in path.read_text().split()} | {s.name for s in held}
    for name in names:
        format = find_benchmark(name).format
        for split in format.splits.keys() - {"train", "all"}:
            if path := find_split(folder, format, split):
                scenes |= read_official(name, path, root, split).scenes.keys()
    if not scenes:
        raise DataError(f"{folder}: nothing says which rooms are for evaluation; put scannetv2_val.txt and "
                        "scannetv2_test.txt there or beside the scans")  # fmt: skip
    return {space(scene) for scene in scenes}


FORMS = {  # of answers, as SpaceSpan's table names them
    "text": lambda s: s.targets is None or s.task == "caption", "id": lambda s: s.targets is not None,
    "number": lambda s: s.value is not None, "choice": lambda s: bool(s.options),
}  # fmt: skip
DROPPED = ("other form", "leaked", "no scan", "no object", "not drawn")


def mixture(sources: Mapping[str, data.Source], folder: Path, root: Path, train: Sequence[Scene],
            held: Sequence[Scene] = (), seed: int = 0) -> tuple[dict[str, list[Sample]], list[dict]]:  # fmt: skip
    """(questions by scene, a row of counts per source), every question with its benchmark's prompt, one per accepted
    answer. Dropped, in this order, are answers of another form, leaks, questions without a scan, those whose target no
    object that gets an identifier fits with the source's IoU (boxes: proposals.json in the folder, else the scans'
    own), and what is more than the source takes."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name the one that holds the official files")
    benchmarks = sorted({source.benchmark for source in sources.values()})
    spaces = evaluation_spaces(benchmarks, folder, root, held)
    there = {s.name: s for s in train}
    file = min(folder.rglob("proposals.json"), default=None)
    boxes_of = {} if file is None else data.read_json(file)

    def reachable(s: Sample, fit: float) -> bool:
        scene, targets = there[s.scene], set(s.targets or ())
        if not targets <= data.number_objects(scene, np.random.default_rng(0)).keys():
            return False
        offered = np.array(boxes_of.get(s.scene, [[]]), float).reshape(-1, 6)
        truth = [scene.thing(i).box for i in targets]
        return file is None or all(len(offered) and iou_matrix(offered, t[None]).max() >= fit for t in truth)

    listed, report = {}, []
    for name, source in sources.items():
        format = find_benchmark(source.benchmark).format
        paths = {split: path for split in source.splits if (path := find_split(folder, format, split))}
        read = [read_official(source.benchmark, path, root, split) for split, path in paths.items()]
        samples = [s for questions in read for s in questions.samples]
        row = {"source": name, "asks": source.asks, "printed": source.printed, "found": len(samples)}
        tests = (FORMS[source.asks], lambda s: space(s.scene) not in spaces, lambda s: s.scene in there,
                 lambda s, fit=source.fit: reachable(s, fit))  # fmt: skip
        for what, test in zip(DROPPED, tests, strict=False):
            kept = [s for s in samples if test(s)]
            row[what], samples = len(samples) - len(kept), kept
        ask = find_benchmark(source.benchmark).prompt
        samples = [replace(s, id=f"{name}/{s.id}/{k}", question=ask(s), answer=a, answers=[], tokens=[])
                   for s in samples for k, a in enumerate(dict.fromkeys(s.answers))]  # fmt: skip
        most = min(source.most or len(samples), len(samples))
        drawn = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(len(samples))[:most]
        row["not drawn"], samples = len(samples) - most, [samples[i] for i in sorted(drawn.tolist())]
        report.append(row | {"kept": len(samples)})
        for s in samples:
            listed.setdefault(s.scene, []).append(s)
    if not listed:
        names = ", ".join(sorted({find_benchmark(b).format.splits["train"][0] for b in benchmarks}))
        raise DataError(f"{folder}: no question to train on is left of {names}; found were "
                        f"{sum(r['found'] for r in report)}, see the scans' ids and splits")  # fmt: skip
    return listed, report


def describe_mixture(report: Sequence[Mapping]) -> str:
    """One line per source: what the paper prints, what was found, dropped and kept."""
    head = ["source", "asks", "printed", "found", *DROPPED, "kept"]
    rows = [[f"{r[h]:,}" if isinstance(r[h], int) else r[h] for h in head] for r in report]
    total = ["sum", "", *(f"{sum(r[h] for r in report):,}" for h in head[2:])]
    leaked = sum(r["leaked"] for r in report)
    return "\n".join([*columns_of([head, *rows, total], 2),
                      f"{leaked:,} questions removed because their room belongs to an evaluation split"])  # fmt: skip


def draw_mixture(listed: Mapping[str, Sequence[Sample]], report: Sequence[Mapping], path: Path) -> None:
    """The distributions of questions and of sources as rings: first words inside, second words outside; sources."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), layout="constrained")
    left, right = figure.subplots(1, 2)
    words = Counter(tuple((*s.wording.split("|"), "", "")[1:3]) for samples in listed.values() for s in samples)
    first = Counter()
    for (a, _), n in words.items():
        first[a] += n
    order = sorted(words, key=lambda w: (-first[w[0]], w[0], -words[w]))
    share = lambda n: n > 0.015 * sum(first.values())  # noqa: E731
    inner = list(dict.fromkeys(a for a, _ in order))
    colour = {a: f"C{i % 10}" for i, a in enumerate(inner)}
    rings = (([first[a] for a in inner], inner, inner, 0.7, 0.72),
             ([words[w] for w in order], [b for _, b in order], [a for a, _ in order], 1, 1.03))  # fmt: skip
    for counts, names, starts, radius, place in rings:
        labels = [name if share(n) else "" for name, n in zip(names, counts, strict=True)]
        left.pie(counts, labels=labels, colors=[colour[a] for a in starts], radius=radius, labeldistance=place,
                 textprops={"fontsize": 8}, wedgeprops={"width": 0.3, "edgecolor": "white"})  # fmt: skip
    kept = [r for r in report if r["kept"]]
    right.pie([r["kept"] for r in kept], labels=[f"{r['source']}, {r['asks']}\n{r['kept']:,}" for r in kept],
              wedgeprops={"width": 0.45, "edgecolor": "white"}, textprops={"fontsize": 9})  # fmt: skip
    left.set_title("questions by their first words")
    right.set_title("questions by source and form of the answer")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


# ---- 7 files ---------------------------------------------------------------------------------------------------------


def write_whole(path: Path, text: str) -> None:
    with data.whole(path) as part:
        part.write_text(text, encoding="utf-8")


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


def read_sample(held: dict) -> Sample:
    sample = Sample(**held)
    arrays = {name: getattr(sample, name) for name in ("point", "box", "prompt")}
    return replace(sample, **{name: None if a is None else np.array(a, float) for name, a in arrays.items()})


def read_scene(held: dict) -> Scene:
    things = [Thing(**o | {"box": np.array(o["box"], float)}) for o in held["objects"]]
    bounds = held.get("bounds") and np.array(held["bounds"], float)
    return Scene(held["name"], held["source"], things, identifiers=dict(held["identifiers"]), bounds=bounds)


def read_questions(path: Path) -> Questions:
    """What `write_questions` wrote. Errors name the file, the row and the field."""
    questions = Questions([], {})
    shown, seen = {}, set()
    for row, line in read_lines(path):
        try:
            if "sample" in line:
                sample = read_sample(line["sample"])
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
            elif "scene" in line:
                scene = read_scene(line["scene"])
                questions.scenes[scene.name] = scene
            elif "shown" in line:
                scene = read_scene(line["shown"])
                shown[scene.name] = scene
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
    facts = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "code": revision(), "torch": torch.__version__,
             "python": sys.version.split()[0]}  # fmt: skip
    if model is not None:
        weight = next(model.parameters())
        kernels = (getattr(getattr(m, "config", None), "_attn_implementation", None) for m in model.modules())
        facts |= {"device": torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type,
                  "dtype": str(weight.dtype), "attention": next(filter(None, kernels), "unknown"),
                  "decoding": "greedy", "processes": rank_and_world()[1]}  # fmt: skip
    return facts | more


def prompts(row: Benchmark) -> str | list[str]:
    return [row.ask, row.ask_choice] if row.ask_choice else row.ask


def fingerprint(path: Path) -> str:
    """File name and the start of its SHA-256: numbers of two releases of one file are told apart."""
    with data.reading(path, "file"):
        return f"{path.name} sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def save_metrics(path: Path, entries: Mapping[str, dict], facts: dict) -> None:
    """metrics.json = {benchmark: entry, "provenance": facts + every benchmark's proposals and prompt}. Entries already
    there stay only if the facts are the same but for the date, so that one file never mixes two runs."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"provenance": {}}
    before = old.pop("provenance")
    same = lambda d: {k: v for k, v in d.items() if k not in ("date", "proposals", "prompts")}  # noqa: E731
    if same(before) != same(json.loads(to_json(facts))):
        old = {}
    entries = old | dict(entries)
    more = {"proposals": {name: e["proposals"] for name, e in entries.items()},
            "prompts": {name: prompts(BENCHMARKS[name.split("@")[0]]) for name in entries}}  # fmt: skip
    text = json.dumps(entries | {"provenance": facts | more}, indent=1, default=lambda a: a.tolist())
    write_whole(path, text + "\n")


# ---- 8 tables and failures -------------------------------------------------------------------------------------------


def show(value: float | str | None) -> str:
    return "n/a" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def columns_beside(entries: Mapping[str, dict]) -> list[str]:
    """The baselines that some entry has, blind and chance last."""
    extra = dict.fromkeys(c for e in entries.values() for c in e["columns"] if c not in ("blind", "chance"))
    return [*extra, "blind", "chance"]


def score_row(entry: dict, key: str, columns: Sequence[str]) -> list[str]:
    """One score as text: model, further columns, count."""
    part = key.split("/")[2:]
    cells = [entry, *(entry["columns"].get(c, {}) for c in columns)]
    return [*(show(cell.get(key, "")) for cell in cells), str(entry["counts"][part[0]] if part else entry["count"])]


def score_keys(entry: dict) -> tuple[list[str], list[str]]:
    """(scores over all questions and the headline's parts, parts of the other scores)."""
    keys = [k for k in entry if "/" in k]
    first = [k for k in keys if not k.split("/")[2:] or k.startswith(f"{keys[0]}/")]
    return first, [k for k in keys if k not in first]


def remarks(entry: dict) -> list[str]:
    """What was malformed, which proposals were used and how they fit, notes, the file, what is not available."""
    recall = [f"{k} {show(v)}" for k, v in entry["proposals"].items() if k != "source"]
    lines = [f"{n} answers: {fault}" for fault, n in entry["malformed"].items()]
    lines += [f"proposals: {entry['proposals']['source']}, {', '.join(recall)}"] if recall else []
    lines += entry["notes"] + [f"questions: {entry['file']}"] * bool(entry["file"])
    lacks = entry.get("not_available", {})
    return lines + [f"{', '.join(k for k in lacks if lacks[k] == why)} not available: {why}"
                    for why in dict.fromkeys(lacks.values())]  # fmt: skip


def table(entries: Mapping[str, dict]) -> str:
    """One line per score, and per group for headlines: model, further columns, blind, chance, count. What was
    malformed, which proposals were used and what is not available ("n/a") stand below, then what papers print."""
    columns = columns_beside(entries)
    rows = [["benchmark", "score", "model", *columns, "count"]]
    notes: dict[str, list[str]] = {}
    for name, entry in entries.items():
        rows += [[name, key, *score_row(entry, key, columns)] for key in score_keys(entry)[0]]
        for remark in remarks(entry):
            notes.setdefault(remark, []).append(name)
    lines = columns_of(rows, 2) + [f"{remark} ({', '.join(names)})" for remark, names in notes.items()]
    return "\n".join(lines + [line for name, entry in entries.items() for line in literature(name, entry)])


def columns_of(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Rows of text as aligned lines, the first `left` columns to the left, a rule under the head."""
    widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
    align = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    lines = ["  ".join(put(v, w) for put, v, w in zip(align, r, widths, strict=True)) for r in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


# What papers print, times 100 as there: a line "benchmark: scores" and below it "model | values"; letters behind a
# value say what differs (REMARKS). From the tables of Proxy3D, of Fase3D (LL3DA, PerLA, 3D-LLaVA, Fase3D) and of 3D-R1
# (Spatial 3D-LLM).
PRINTED = """
scanqa: cider/ptb em/strict em/cleaned
Proxy3D, 700 tokens | 93.6 25.2a -
Qwen2-VL-7B | 53.9 19.0a -
Chat-Scene | 87.7 21.6a -
GPT4Scene (HDM) | 90.9b 28.2ab -
Descrip3D | 93.7 22.67a -
ScanQA | 64.9 21.1 -
LEO | 80.0 - 24.5d
Spatial-MLLM-4B | 91.8d 26.3d -
LLaVA-3D | 91.7d - 27.0d
LEO-VL | 100.4d - 22.6d
scanqa: cider/raw bleu4/raw meteor/raw rouge_l/raw em/strict
Spatial 3D-LLM | 82.5d 13.9d 16.8d 39.1d -
Fase3D, Qwen2.5-3B | 90.11 17.12e 18.24 42.56 -
Fase3D, Vicuna-7B | 91.74 16.87 18.61 43.37 -
Fase3D, OPT-1.3B | 86.24 15.96 17.63 40.34 -
LL3DA | 76.79 13.53 15.88 37.31 -
PerLA | 78.13 14.49 17.44 39.60 -
3D-LLaVA | 92.60d 17.10d 18.40d 43.10d -
Video-3D-LLM | 102.1c - - - 30.1
3DRS | 104.8c - - - 30.3
sqa3d: em/cleaned
Proxy3D, 700 tokens | 57.5
Fase3D, Qwen2.5-3B | 53.9d
Fase3D, Vicuna-7B | 54.3d
3D-LLaVA | 54.5d
Qwen2-VL-7B | 40.7
Chat-Scene | 54.6
GPT4Scene (HDM) | 57.4b
Descrip3D | 55.7
ScanQA | 47.2d
LEO | 50.0
Spatial-MLLM-4B | 55.9d
LLaVA-3D | 55.6
Video-3D-LLM | 58.6
3DRS | 60.6
LEO-VL | 60.8d
scanrefer: acc@0.5/scanrefer acc@0.25/scanrefer acc@0.5/scanrefer/unique
Proxy3D, 700 tokens | 54.1f 59.6f 84.0f
Chat-Scene | 50.2f 55.5f 82.5f
GPT4Scene (HDM) | 57.0bf 62.6bf 83.7bf
Descrip3D | 51.8f 57.2f 83.2f
Qwen2-VL-7B | 5.1f 5.4f 6.3f
LLaVA-3D | 42.4g 54.1g -
LEO | - 38.2i -
Video-3D-LLM | 51.7g 58.1g 78.3g
3DRS | 56.1g 62.9g 77.9g
ScanRefer | 24.3g 37.3g 53.5g
multi3drefer: f1@0.5/multi3drefer f1@0.25/multi3drefer
Proxy3D, 700 tokens | 57.5f 62.0f
Chat-Scene | 52.4f 57.1f
GPT4Scene (HDM) | 59.8bf 64.5bf
Descrip3D | 55.1f 59.4f
Qwen2-VL-7B | 19.9f 21.1f
Video-3D-LLM | 52.7g 58.0g
3DRS | 54.9g 60.4g
scan2cap: cider@0.5/chat-scene bleu4@0.5/chat-scene
Proxy3D, 700 tokens | 73.3f 34.7f
Chat-Scene | 77.1f 36.3f
GPT4Scene (HDM) | 86.3bf 40.6bf
Descrip3D | 77.2f 34.5f
Qwen2-VL-7B | 0.0f 3.8f
Video-3D-LLM | 83.8g 41.4g
3DRS | 86.1g 41.6g
LLaVA-3D | 79.2g 41.1g
Scan2Cap | 39.1g 23.3g
LEO | - 72.4i
scan2cap: cider@0.5/ll3da bleu4@0.5/ll3da meteor@0.5/ll3da rouge_l@0.5/ll3da
Spatial 3D-LLM | 72.2d 34.6d 23.1d 54.3d
Fase3D + Mask3D | 78.14g 41.34g 27.92g 57.63g
Fase3D, own clusters | 70.72g 37.83g 26.81g 56.37g
3D-LLaVA | 78.80g 36.90g 27.10g 57.70g
LL3DA | 65.19g 36.79g 25.97g 55.06g
PerLA | 69.41g 38.02g 29.07g 56.80g
nr3d/caption: cider@0.5/ll3da bleu4@0.5/ll3da meteor@0.5/ll3da rouge_l@0.5/ll3da
Fase3D + Mask3D | 54.91g 30.24g 26.48g 57.14g
Fase3D, own clusters | 52.89g 29.31g 26.14g 56.41g
LL3DA | 51.18g 28.75g 25.91g 56.61g
PerLA | 55.06g 31.24g 28.52g 59.13g
3dllm/planning: cider/raw bleu4/raw meteor/raw rouge_l/raw
Spatial 3D-LLM | 195.92d 14.65d 18.95d 36.93d
LL3DA | 128.80 12.95 17.05 39.25
vsibench: counting abs_distance object_size room_size rel_distance rel_direction route order score/official
human | 94.3 47.0 60.4 45.9 94.7 95.8 95.8 100.0 79.2
GPT-4o | 46.2 5.3 43.8 38.2 37.0 41.3 31.5 28.5 34.0
Gemini-1.5 Pro | 56.2 30.9 64.1 43.6 51.3 46.3 36.0 34.6 45.4
InternVL2-40B | 34.9 26.9 46.5 31.8 42.1 32.2 34.0 39.6 36.0
LLaVA-OneVision-72B | 43.5 23.9 57.6 37.5 42.5 39.9 32.5 44.6 40.2
LLaVA-Video-72B | 48.9 22.8 57.4 35.3 42.4 36.7 35.0 48.6 40.9
Qwen2.5-VL-7B | 40.9 14.8 43.4 10.7 38.6 38.5 33.0 29.8 33.0
Qwen2.5-VL-72B | 25.1 29.3 54.5 38.8 38.2 37.0 34.0 28.9 37.0
Spatial-MLLM-4B | 65.3 34.8 63.1 45.1 41.3 46.2 33.5 46.3 48.4
Proxy3D, 450 tokens | 63.9 41.9 67.2 42.8 50.3 46.5 31.4h 32.0h 47.0
"""
REMARKS = {
    "a": "only the prediction is cleaned, not the references (Chat-Scene's script): neither strict nor cleaned",
    "b": "uses point clouds besides images",
    "c": "no PTB tokenizer, full stops stripped, references as they are",
    "d": "which tokenizer or cleaner was used is not stated where the number is quoted",
    "e": "18.02 in the same paper's Tables 3 and 4",
    "f": "objects are Mask3D proposals, and an answer without an id counts as object 0",
    "g": "objects are proposals of a detector",
    "h": "not trained on",
    "i": "as printed there, probably one column too far to the right: CIDEr 72.4 and BLEU-4 38.2 of Scan2Cap",
}


def printed(name: str) -> dict[str, dict[str, tuple[float, str]]]:
    """What papers print for a benchmark: model -> score -> (share, what differs). An average that does not follow from
    the eight tasks printed beside it says so."""
    table: dict[str, dict[str, tuple[float, str]]] = {}
    benchmark, keys = "", []
    for line in PRINTED.strip().splitlines():
        if ": " in line:
            benchmark, _, keys = line.partition(": ")
            keys = [k if "/" in k else f"score/official/{k}" for k in keys.split()]
        elif benchmark == name:
            model, values = line.split(" | ")
            cells = [re.fullmatch(r"([\d.]+)([a-z]*)", v) for v in values.split()]
            row = {k: (float(c[1]) / 100, "; ".join(REMARKS[m] for m in c[2]))
                   for k, c in zip(keys, cells, strict=True) if c}  # fmt: skip
            if "score/official" in row:
                mean = np.mean([v for k, (v, _) in row.items() if k != "score/official"])
                if abs(mean - row["score/official"][0]) > 0.00055:  # more than rounding to a tenth
                    row["score/official"] = (row["score/official"][0], "the printed average does not follow from the "
                                             f"printed tasks, whose mean is {mean:.4f}")  # fmt: skip
            table.setdefault(model, {}).update(row)
    return table


def papers_beside(name: str, entry: dict) -> tuple[list[list[str]], list[str]]:
    """(head, our row and what papers print; why numbers with a mark are not comparable); ([], []) where none print."""
    papers = printed(name.split("@")[0])
    keys = list(dict.fromkeys(k for row in papers.values() for k in row))
    if not keys:
        return [], []
    reasons: dict[str, str] = {}
    mark = lambda why: f" [{reasons.setdefault(why, str(len(reasons) + 1))}]" if why else ""  # noqa: E731
    ours = "" if entry["count"] == entry["expected"] else (
        f"ours: {entry['count']} questions of a file whose split has {entry['expected'] or 'an unknown number'}")
    if entry["proposals"]["source"] == "gt" and len(entry["proposals"]) > 1:
        ours += "; " * bool(ours) + "ours: true objects as proposals, papers detect them"
    cell = lambda v, why="": "" if v is None else f"{v:.3f}{mark(why)}"  # noqa: E731
    rows = [[name, *keys], ["this run", *(cell(entry.get(k), ours) for k in keys)]]
    rows += [[model, *(cell(*row.get(k, (None,))) for k in keys)] for model, row in papers.items()]
    return rows, [f"[{n}] not comparable: {why}" for why, n in reasons.items()]


def literature(name: str, entry: dict) -> list[str]:
    """`papers_beside` as lines."""
    rows, reasons = papers_beside(name, entry)
    return ["", *columns_of(rows, 1), *reasons] if rows else []


def case_values(row: Benchmark, cases: Sequence[Case]) -> list[float]:
    """Each answer's own headline score; of captions their CIDEr, at most 10, within this set."""
    if row.metrics:
        return [next(iter(row.metrics.values()))(c) for c in cases]
    from pycocoevalcap.cider.cider import Cider

    said = [one_line(c.text) for c in cases]
    pair = beside([[*map(one_line, c.references)] for c in cases] + [[t] for t in said], len(cases))
    return Cider().compute_score(*pair)[1].tolist()


def worst_first(row: Benchmark, values: Sequence[float]) -> list[int]:
    """Which answers are not right, the worst first."""
    return [i for i in np.argsort(values, kind="stable").tolist() if values[i] < 1 or not row.metrics]


def failures(name: str, questions: Questions, answers: Mapping[str, str], count: int, folder: Path) -> list[str]:
    """The `count` worst answers by the headline metric (captions: each one's CIDEr), as lines and, where the scene has
    a cloud, as pictures in `folder`. Some are errors of the annotation, not of the model."""
    row, (cases, _) = find_benchmark(name), cases_of(name, questions, answers)
    values = case_values(row, cases)
    lines = []
    for n, i in enumerate(worst_first(row, values)[:count], start=1):
        c = cases[i]
        facts = {"asked": row.prompt(c.sample), "answered": c.text or "(nothing)", "true": " / ".join(c.references)}
        told = [f"{n}. {c.sample.id} in {c.sample.scene}: {values[i]:.3f}",
                *(f"   {what}: {one_line(said)[:300]}" for what, said in facts.items())]  # fmt: skip
        if c.shown.points is not None:
            data.draw_scene(c.shown, folder / f"{n}.png", told)
            told.append(f"   picture: {folder / f'{n}.png'}")
        lines += told
    write_whole(folder / "failures.txt", "\n".join(lines) + "\n")
    return lines


# ---- 9 the report ----------------------------------------------------------------------------------------------------

LESS = re.compile("error|mae|collision")  # scores of which less is better
ROOMS, ASKED = 3, 4  # pictures of rooms, and questions of a benchmark in them
WIDE = 1200  # pixels of an embedded picture
STYLE = """
:root { color-scheme: light dark; --ink: #1c1d21; --dim: #60646c; --line: #dcdee3; --page: #ffffff; --panel: #f5f6f8;
  --good: #17702f; --bad: #b3261e; --bar: #4a86cf; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7ea; --dim: #a0a4ad; --line: #3a3d44; --page: #16171a;
  --panel: #202226; --good: #6cc985; --bad: #f2857b; --bar: #4f8fdc; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: auto; padding: 1rem 1rem 4rem; }
h1 { margin: .5rem 0; line-height: 1.2; }
h2 { margin: 2.5rem 0 .5rem; border-bottom: 2px solid var(--line); }
h3 { margin: 1.75rem 0 .5rem; }
h1, h2, h3, dd, p, li { overflow-wrap: anywhere; }
a { color: inherit; }
nav a { margin-right: 1rem; display: inline-block; }
.dim { color: var(--dim); }
.good { color: var(--good); }
.bad { color: var(--bad); }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--dim); font-weight: 600; }
tr > :first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
.bar { display: inline-block; position: relative; width: 8rem; height: .8rem; vertical-align: middle;
  background: var(--panel); border: 1px solid var(--line); }
.bar i { display: block; height: 100%; background: var(--bar); }
.bar b { position: absolute; top: -.2rem; bottom: -.2rem; border-left: 2px solid var(--ink); }
.bar b.chance { border-left-style: dotted; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .75rem; margin: .25rem 0; }
dt { color: var(--dim); }
dd { margin: 0; }
figure { margin: 1rem 0; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: .25rem; }
@media (max-width: 45rem) { .scroll > img { max-width: none; width: 40rem; } th, td { padding: .2rem .4rem; } }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: .6rem;
  margin: .6rem 0 2rem; padding: 0; list-style: none; }
.cards > li { background: var(--panel); border-radius: .25rem; padding: .5rem .75rem; font-size: .875rem; }
pre { background: var(--panel); padding: .75rem; overflow-x: auto; font-size: .8125rem; }
summary { cursor: pointer; color: var(--dim); margin: .5rem 0; }
"""


class Markup(str):
    """Text that is HTML already; any other text is escaped where it enters a tag."""


def tag(name: str, /, *inside: object, **attributes: object) -> Markup:
    """<name attributes>inside</name>; a trailing _ of an attribute's name is dropped (class_)."""
    head = "".join(f' {k.rstrip("_")}="{html.escape(str(v))}"' for k, v in attributes.items())
    body = "".join(x if isinstance(x, Markup) else html.escape(str(x)) for x in inside)
    return Markup(f"<{name}{head}>" if name in ("meta", "img") else f"<{name}{head}>{body}</{name}>")


def html_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    lines = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    top = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    return tag("div", tag("table", tag("thead", top), tag("tbody", *lines)), class_="scroll", tabindex=0)


def anchor(*names: str) -> str:
    """What links within the page lead to: an id without spaces."""
    return "/".join(names).replace(" ", "-")


def facts_list(facts: Mapping[str, object]) -> Markup:
    return tag("dl", *(tag(k, v) for pair in facts.items() for k, v in zip(("dt", "dd"), pair, strict=True)))


def folded(title: str, *inside: Markup) -> Markup:
    return tag("details", tag("summary", title), *inside)


def embedded(path: Path, alt: str) -> Markup:
    """The picture itself, at most WIDE pixels wide and in 256 colours, which drawings do not miss."""
    from PIL import Image

    picture = Image.open(path).convert("RGB")
    picture.thumbnail((WIDE, 2 * WIDE))
    held = io.BytesIO()
    picture.quantize(256, Image.Quantize.FASTOCTREE).save(held, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"
    size = dict(zip(("width", "height"), picture.size, strict=True))
    return tag("div", tag("img", src=source, alt=alt, **size), class_="scroll", tabindex=0)


def against_blind(entry: dict, key: str) -> Markup:
    """How far a score is above blind, or above chance where there is no blind one; in words, as less may be better."""
    column = next((c for c in ("blind", "chance") if entry["columns"].get(c, {}).get(key) is not None), None)
    if column is None or not isinstance(entry[key], float):
        return Markup("")
    gain = (entry[key] - entry["columns"][column][key]) * (-1 if LESS.search(key) else 1)
    words = f"{abs(gain):.3f} {'better' if gain > 0 else 'worse'}" if round(gain, 3) else "equal"
    than = "" if column == "blind" else " than chance"
    return tag("span", words + than, class_="good" if round(gain, 3) > 0 else "bad")


def bar(value: object, blind: object, chance: object) -> Markup:
    """A share as a bar, with marks where blind and chance are; nothing for what is no share."""
    if not isinstance(value, float) or not 0 <= value <= 1:
        return Markup("")
    marks = {"blind": blind, "chance": chance}
    lines = [tag("b", class_=k, style=f"left:{v:.1%}") for k, v in marks.items() if v is not None]
    return tag("span", tag("i", style=f"width:{value:.1%}"), *lines, class_="bar")


def overview(entries: Mapping[str, dict], place: str) -> Markup:
    """A line per benchmark: its headline score."""
    rows = []
    for name, entry in entries.items():
        key = score_keys(entry)[0][0]
        link = tag("a", name, href=f"#{anchor(place, name)}")
        picture = bar(entry[key], entry["blind"], entry["chance"])
        rows.append([link, show(entry[key]), picture, against_blind(entry, key), show(entry["blind"]),
                     show(entry["chance"]), entry["count"], key])  # fmt: skip
    head = ["benchmark", "model", "0 to 1", "against blind", "blind", "chance", "questions", "score"]
    return html_table(head, rows)


def all_scores(entries: Mapping[str, dict], place: str) -> list[Markup]:
    """Every score of every benchmark, with all baselines; below it what papers print."""
    parts = []
    for name, entry in entries.items():
        columns = [c for c in columns_beside({name: entry}) if entry["columns"].get(c)]
        head = ["score", "model", "against blind", *columns, "questions"]
        rows = [[[key, cells[0], against_blind(entry, key), *cells[1:]] for key in keys
                 for cells in [score_row(entry, key, columns)]] for keys in score_keys(entry)]  # fmt: skip
        papers, reasons = papers_beside(name, entry)
        parts += [tag("h3", name, id=anchor(place, name)), html_table(head, rows[0])]
        parts += [folded(f"{len(rows[1])} scores of parts", html_table(head, rows[1]))] * bool(rows[1])
        parts += [tag("p", line, class_="dim") for line in remarks(entry)]
        parts += [tag("p", "What papers print:"), html_table(papers[0], papers[1:])] if papers else []
        parts += [tag("p", line, class_="dim") for line in reasons]
    return parts


def side_scores(run: Path) -> list[Path]:
    """The metrics.json of other questions than the run's own: after a stage, and in rooms of N objects."""
    found = [*run.glob("after */metrics.json"), *run.glob("objects-*/metrics.json")]
    return sorted(found, key=lambda path: data.natural(path.parent.name))


def read_answered(folder: Path, entries: Mapping[str, dict]) -> dict[str, tuple[list[Case], list[float]]]:
    """Benchmark -> (its cases, each one's own score), from the files that a run wrote."""
    found = {}
    for name in entries:
        path = folder / "predictions" / f"{name}.jsonl"
        if path.is_file():
            benchmark = name.split("@")[0]
            cases, _ = cases_of(benchmark, read_questions(path.with_suffix(".questions.jsonl")),
                                read_predictions(path)[0])  # fmt: skip
            found[name] = cases, case_values(find_benchmark(benchmark), cases)
    return found


def draw_at_random(answered: Mapping[str, tuple[list[Case], list[float]]]) -> dict[tuple[str, str], list[tuple]]:
    """(scene, proposals) -> [(benchmark, which case), ..]: ASKED questions of every benchmark out of ROOMS rooms, the
    same rooms for all as far as they were asked about; nothing here looks at an answer."""
    rng = np.random.default_rng(0)
    order = rng.permutation(sorted({c.sample.scene for cases, _ in answered.values() for c in cases})).tolist()
    rooms_of_it = {name: {c.sample.scene for c in cases} for name, (cases, _) in answered.items()}
    rooms, chosen = [], {}
    for name in sorted(answered, key=lambda n: len(rooms_of_it[n])):  # rare ones decide on the rooms
        mine = [r for r in dict.fromkeys([*rooms, *order]) if r in rooms_of_it[name]][:ROOMS]
        rooms = list(dict.fromkeys([*rooms, *mine]))
        pool = [i for i, c in enumerate(answered[name][0]) if c.sample.scene in mine]
        chosen[name] = rng.permutation(pool)[:ASKED].tolist()
    drawn: dict[tuple[str, str], list[tuple]] = {}
    for name in answered:
        for i in chosen[name]:
            key = answered[name][0][i].sample.scene, name.partition("@")[2]
            drawn.setdefault(key, []).append((name, i))
    return drawn


def named(text: str, scene: Scene) -> str:
    """At most 300 characters of an answer on one line, with every identifier's object in words."""
    things = {k: scene.thing(i) for i, k in scene.identifiers.items()}
    words = lambda k: f" ({data.phrase(things[k].category, things[k].colour)})" if k in things else ""  # noqa: E731
    return re.sub(r"<?OBJ(\d{3})(?!\d)>?", lambda m: m[0] + words(int(m[1])), one_line(text)[:300])


def truth_of(case: Case) -> str:
    """The references; with the boxes of the targets where the answer is in numbers."""
    words = " / ".join(named(r, case.scene) for r in case.references) or "(nothing fits)"
    boxed = [data.listed(b) for b in case.truth if b[0] < LOST[0]] if boxes(case.text) else []
    return " ".join([words, *boxed])


def places_of(case: Case) -> str:
    """Answer and truth where both write places near enough to be drawn, else ""."""
    both = case.text, truth_of(case)
    found = [[v for size in (3, 6) for v in tuples(text, size)] for text in both]
    near = all(v is not None and np.abs(v).max() < 10 * FAR for side in found for v in side)
    return " ".join(both) if all(found) and near else ""


def verdict(row: Benchmark, value: float) -> Markup:
    if not row.metrics:
        return tag("span", f"CIDEr {value:.2f}", class_="dim")
    words = "✓ right" if value >= 1 else "✗ wrong" if value <= 0 else f"{value:.3f} of 1"
    return tag("span", words, class_="good" if value >= 1 else "bad")


def card(name: str, case: Case, value: float, *more: str) -> Markup:
    """A question with answer and truth."""
    row = find_benchmark(name.split("@")[0])
    asked = one_line(substitute(row.prompt(case.sample), lambda i: refer(case.scene, i)))[:600]
    place = "" if case.sample.prompt is None else f" at {data.listed(case.sample.prompt)}"
    told = {"asked": asked + place, "answered": named(case.text, case.shown) or tag("span", "(nothing)", class_="dim"),
            "true": truth_of(case)}  # fmt: skip
    head = tag("div", name, " · ", verdict(row, value), *(f" · {m}" for m in more))
    return tag("li", head, facts_list(told))


def room_figures(answered: Mapping[str, tuple[list[Case], list[float]]], scenes: Mapping[str, Scene],
                 root: Path | None) -> list[Markup]:  # fmt: skip
    """Rooms with what was asked about them. A room whose cloud is at hand, or below `root`, is drawn with the objects
    shown to the model, and the first three places answered, each joined to the true one."""
    parts = []
    for (scene, proposals), asked in draw_at_random(answered).items():
        cases = [answered[name][0][i] for name, i in asked]
        place = scenes.get(scene) or (data.open_scan(root, scene) if root and scene in scans_below(root) else None)
        drawn = place is not None and place.points is not None
        located = [c for c in cases if places_of(c)][: 3 * drawn]
        title = f"{scene}, proposals: {proposals}" if proposals else scene
        parts.append(tag("h3", title))
        if drawn:
            shown = replace(place, objects=cases[0].shown.objects, identifiers=cases[0].shown.identifiers)
            with tempfile.TemporaryDirectory() as folder:
                data.draw_scene(shown, Path(folder) / "room.png", answers=[places_of(c) for c in located])
                parts.append(embedded(Path(folder) / "room.png", f"{title}: frames, and its cloud with objects"))
        cards = [card(name, c, answered[name][1][i], *["in the picture"] * any(c is d for d in located))
                 for (name, i), c in zip(asked, cases, strict=True)]  # fmt: skip
        parts.append(tag("ul", *cards, class_="cards"))
    return parts


def stage_rows(run: Path) -> list[list[str]]:
    """Stage, steps, minutes, first and last loss, running share of right answer tokens: from log.jsonl."""
    rows, before = [], 0.0
    lines = [line for _, line in read_lines(run / "log.jsonl") if line]  # a kill may leave half a line
    for stage, group in itertools.groupby(lines, key=lambda x: x["stage"]):
        own = list(group)
        last = own[-1]
        rows.append([stage, len(own), f"{(last['seconds'] - before) / 60:.1f}", show(own[0]["loss"]),
                     show(last["loss"]), show(last["running"])])  # fmt: skip
        before = last["seconds"]
    return rows


def command_of(record: Mapping, run: Path) -> str:
    """The command that made a run, every choice written out; any number of processes gives the same."""
    words = ["torchrun", "train.py"]
    for key, value in itertools.takewhile(lambda pair: pair[0] != "config", record.items()):
        if value not in (None, []):
            words += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join([*words, "--out", str(run)])


def shortened(value: object) -> object:
    """Long lists by their ends."""
    if isinstance(value, dict):
        return {k: shortened(v) for k, v in value.items()}
    return [*value[:3], f"... {len(value)} in all", value[-1]] if isinstance(value, list) and len(value) > 12 else value


def scores_section(entries: Mapping[str, dict], sides: Mapping[str, Mapping[str, dict]]) -> list[Markup]:
    about = tag("p", "A score means what it is above ", tag("em", "blind"), ", the most frequent training answer to "
                "the same wording (the solid mark), and ", tag("em", "chance"), ", a guess among the answers that are "
                "possible (the dotted mark). Both are computed for the very questions scored. A score's name carries "
                "its protocol.")  # fmt: skip
    parts = [about, *([overview(entries, "own"), *all_scores(entries, "own")] if entries else [])]
    for name, side in sides.items():
        title = re.sub("^after ", "After stage ", re.sub(r"^objects-(\d+)$", r"Rooms of \1 objects", name))
        parts += [tag("h3", title), overview(side, name), folded(f"{title}: all scores", *all_scores(side, name))]
    return parts


def loss_section(run: Path) -> list[Markup]:
    picture, parts = run / "loss.png", []
    if picture.is_file():
        parts.append(embedded(picture, "loss and share of right answer tokens against steps, by stage"))
    if (run / "log.jsonl").is_file():
        head = ["stage", "steps", "minutes", "first loss", "last loss", "right answer tokens, averaged"]
        parts.append(html_table(head, stage_rows(run)))
    return parts


def failures_section(answered: Mapping[str, tuple[list[Case], list[float]]], count: int) -> list[Markup]:
    parts = [tag("p", f"The {count} worst answers of every benchmark by its first score. Some are errors of the "
                 "question, not of the model.")]  # fmt: skip
    for name, (cases, values) in answered.items():
        row = find_benchmark(name.split("@")[0])
        order = worst_first(row, values)
        cards = [card(name, cases[i], values[i], f"score {values[i]:.3f}", cases[i].sample.scene)
                 for i in order[:count]]  # fmt: skip
        short = f"{len(order)} of {len(cases)} not right" if row.metrics else "the lowest CIDEr"
        parts += [tag("h3", f"{name}: {short}"), tag("ul", *cards, class_="cards")]
    return parts


def write_report(folder: Path, run: Path, scenes: Iterable[Scene] = (), root: Path | None = None,
                 worst: int = ASKED) -> None:  # fmt: skip
    """FOLDER/report.html from what FOLDER (metrics.json, predictions/) and the run's folder (config.json, loss.png,
    log.jsonl, pictures/) hold: one file that needs no other and no network. What is not there is left out. scenes, and
    the scans below `root`: clouds to draw rooms from. worst: failures to list per benchmark. Rank 0 writes."""
    if rank_and_world()[0]:
        return
    read = lambda path: data.read_json(path) if path.is_file() else {}  # noqa: E731
    entries, record = read(folder / "metrics.json"), read(run / "config.json")
    facts = entries.pop("provenance", {})
    sides = {p.parent.name: {k: v for k, v in read(p).items() if k != "provenance"} for p in side_scores(folder)}
    answered = read_answered(folder, entries)
    parts = {"Scores": scores_section(entries, sides), "Loss": loss_section(run)}
    if answered:
        about = tag("p", f"{ASKED} questions of every benchmark, drawn at random (seed 0) without a look at the "
                    "answers. Right and wrong are by the benchmark's first score.")  # fmt: skip
        parts["Rooms"] = [about, *room_figures(answered, {s.name: s for s in scenes}, root)]
        parts["Failures"] = failures_section(answered, worst)
    pictures = sorted((run / "pictures").glob("*.png"))[:ROOMS]
    parts["As the model sees it"] = [folded(p.stem, embedded(p, f"{p.stem} as the model sees it")) for p in pictures]
    parts["How it was made"] = [
        *([tag("pre", command_of(record, run))] if record else []),
        *(folded(k, tag("pre", json.dumps(shortened(v), indent=1)))
          for k, v in (("provenance", facts), ("configuration", record)))]  # fmt: skip
    parts = {title: inside for title, inside in parts.items() if inside}

    model = record.get("model", facts.get("paper", run.name))
    known = {**facts, **record, "code": facts.get("code", record.get("revision")), "run": run.resolve().name,
             "scored in": f"{facts['scenes']} scenes: {facts['scenes_from']}" if "scenes" in facts else None}
    order = ("model", "preset", "data", "scored in", "seed", "code", "date", "device", "run")
    body = tag("main", tag("h1", f"{model}: report of a run"),
               facts_list({k: known[k] for k in order if known.get(k) is not None}),
               tag("nav", *(tag("a", title, href=f"#{anchor(title)}") for title in parts)),
               *(tag("section", tag("h2", t, id=anchor(t)), *inside) for t, inside in parts.items()))  # fmt: skip
    head = tag("head", tag("meta", charset="utf-8"),
               tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
               tag("title", f"{model}: report of a run"), tag("style", Markup(STYLE)))  # fmt: skip
    write_whole(folder / "report.html", "<!doctype html>\n" + tag("html", head, tag("body", body), lang="en") + "\n")
    print(f"report: {folder / 'report.html'}")


# ---- 10 runs and the command line ------------------------------------------------------------------------------------


def label(name: str, questions: Questions) -> str:
    """How a benchmark is called in files and tables: other proposals than the true objects are part of its name."""
    return name if questions.proposals == "gt" else f"{name}@{questions.proposals}"


def check_count(name: str, found: int, expected: int | None, what: str, partial: bool) -> None:
    if expected is not None and found != expected and not partial:
        raise DataError(f"{name}: {found} {what}, {expected} expected; complete them, or say --partial")


def run(model: torch.nn.Module, questions: Questions, stage: data.Stage, out: Path, names: Sequence[str] = (),
        partial: bool = False, columns: Mapping[str, Mapping[str, Mapping[str, str]]] | None = None,
        batch_size: int = 64, worst: int = 0, **details: object) -> dict[str, dict]:  # fmt: skip
    """Ask, score, write OUT/predictions/<benchmark>.jsonl (and .questions.jsonl beside it) and OUT/metrics.json, print
    the table. names: benchmarks, by default all that have questions. columns: name -> benchmark -> id -> answer of
    another model to the same questions (`ask_all`). worst: how many failures to list. details go into the provenance.
    Where the answers are hidden, what a run leaves is the submission file. Every rank calls it; rank 0 scores and
    returns the entries, the others {}."""
    answers = ask_all(model, questions, stage, names, batch_size)
    facts = provenance(model, stage=stage.name, **details)
    if rank_and_world()[0]:
        return {}
    entries = {}
    for name, found in answers.items():
        row, title = find_benchmark(name), label(name, questions)
        check_count(name, len(found), questions.expected, "questions", partial)
        path = Path(out) / "predictions" / f"{title}.jsonl"
        write_predictions(path, found)
        if questions.hidden:
            submission(name, questions, found, path.with_suffix(".submission.json"))
            continue
        write_questions(path.with_suffix(".questions.jsonl"), questions, select(row, questions.samples))
        others = {c: by_name[name] for c, by_name in (columns or {}).items() if name in by_name}
        entries[title] = score(name, questions, found, others) | {"max_new_tokens": row.tokens}
        if worst:
            print("\n".join(failures(name, questions, found, worst, Path(out) / "failures" / title)))
    if entries:
        save_metrics(Path(out) / "metrics.json", entries, facts)
        print(table(entries))
    return entries


def submission(name: str, questions: Questions, answers: Mapping[str, str], path: Path) -> None:
    """What the benchmark's server takes in place of scores that nobody here can compute."""
    row = find_benchmark(name)
    if row.submit is None:
        raise DataError(f"{name}: {questions.file} has no answers, and no server's file format for it is known here")
    cases, faults = cases_of(name, questions, answers)
    write_whole(path, json.dumps([row.submit(c) for c in cases]) + "\n")
    print(f"{name}: the answers of {questions.file} are hidden; to be submitted: {path} "
          f"({len(cases)} answers, {dict(faults) or 'none'} malformed)")  # fmt: skip


def evaluate_run(done: object, names: Sequence[str] = (), proposals: str = "gt", partial: bool = False,
                 out: Path | None = None, per_scene: int | None = None, batch_size: int = 256,
                 stage: data.Stage | None = None, objects: int | None = None,
                 worst: int = 0) -> dict[str, dict]:  # fmt: skip
    """Score a run of train.py (`train.load_run`: model, stages, train and test scenes, args) in its test scenes, or in
    as many fresh rooms of so many `objects`, as `stage` sees (default: its last), in every benchmark of which that
    stage trained a task, or those named. A model may offer `baselines() -> {column: context manager}`: itself without
    something, asked the same; and `proposals() -> {name: scene -> that with other objects}`. Returns as `run`."""
    stage = stage or done.stages[-1]
    test = rooms_of(objects, len(done.test)) if objects else done.test
    per_scene = per_scene or max(3, 60 // len(test))  # of every task; more where there are few scenes
    done.model.configure_stage(stage)
    seed, trained = done.args.seed, set(stage.tasks)
    usual = [task for row in map(BENCHMARKS.get, generated()) for task in row.tasks
             if task in data.TASKS and (task in trained or trained.intersection(row.beside))]  # fmt: skip
    tasks = [task for n in names for task in BENCHMARKS[n].tasks if task in data.TASKS] if names else usual
    scenes = {s.name: numbered(s, seed) for s in test}
    samples = data.question_set(scenes.values(), tasks, per_scene, seed)
    known = list(dict.fromkeys([*usual, *tasks]))  # one wording may serve several tasks: blind knows them all
    blind = data.Blind(data.question_set(done.train[:300], known, 3, seed + 1))
    questions = prepare(samples, scenes, blind, proposals, seed, done.model.proposals())
    done.prepare(list(questions.shown.values()))
    columns = {}
    for column, without in done.model.baselines().items():
        asked = [n for n in ask_names(questions) if n in ("rooms/grounding", "rooms/qa")]
        with without:
            columns[column] = ask_all(done.model, questions, stage, asked, batch_size) if asked else {}
    source = f"rooms of {objects} objects" if objects else done.args.data
    return run(done.model, questions, stage, out or done.args.out, names, partial, columns, batch_size, worst,
               seed=seed, paper=done.args.model, scenes_from=source, scenes=len(questions.scenes))  # fmt: skip


def rooms_of(objects: int, count: int) -> list[Scene]:
    """Test rooms of a given number of objects, none of them a default room, with as many points per object as those."""
    first = data.ROOM_SEEDS["test"].start + 10_000 + 100 * objects
    return [data.room(seed, objects, points=max(4096, 340 * objects)) for seed in range(first, first + count)]


def ask_all(model: torch.nn.Module, questions: Questions, stage: data.Stage, names: Sequence[str] = (),
            batch_size: int = 64) -> dict[str, dict[str, str]]:  # fmt: skip
    """Benchmark -> id -> answer, on every rank."""
    chosen = {name: select(find_benchmark(name), questions.samples) for name in names or generated()}
    empty = [name for name, samples in chosen.items() if not samples]
    if names and empty:
        known = ", ".join(ask_names(questions)) or "none of those named; without --benchmark it is asked all it has"
        raise DataError(f"{empty[0]}: this run has no such questions; it has {known}")
    return {
        name: predict(model, questions, samples, stage, BENCHMARKS[name].tokens, batch_size,
                      BENCHMARKS[name].prompt)
        for name, samples in chosen.items() if samples
    }  # fmt: skip


def ask_names(questions: Questions) -> list[str]:
    return [name for name in generated() if select(BENCHMARKS[name], questions.samples)]


def blind_of(name: str, annotations: Path) -> data.Blind | None:
    """Blind answers from the training file beside the annotations; None where there is none."""
    format = find_benchmark(name).format
    folder = annotations if annotations.is_dir() else annotations.parent
    found = find_split(folder, format, "train")
    return None if found is None else data.Blind(read_official(name, found, split="train").samples)


def scans_of(done: object) -> Path | None:
    """The folder of the scans that a run was trained on, if it was on such."""
    return Path(done.args.root) if done.args.data == "scannet" else None


def evaluate_official(done: object, name: str, annotations: Path, root: Path | None = None, proposals: str = "gt",
                      partial: bool = False, out: Path | None = None, batch_size: int = 256,
                      worst: int = 0) -> dict[str, dict]:  # fmt: skip
    """Score a run of train.py on an official file (or the split of it that papers score, found below a folder), in the
    scans below `root` (default: those it trained on). Returns as `run`."""
    root = root or scans_of(done)
    if root is None:
        raise DataError(f"{name}: its scenes are needed; give the folder of the scans with --root")
    questions = read_official(name, annotations, Path(root))
    check_count(name, len(questions.samples), questions.expected, "questions", partial)
    questions = with_scans(name, questions, Path(root), partial)
    stage, seed = done.stages[-1], done.args.seed
    done.model.configure_stage(stage)
    more = done.model.proposals()
    blind = blind_of(name, annotations)
    questions = prepare(questions.samples, questions.scenes, blind, proposals, seed, more, questions)
    done.prepare(list(questions.shown.values()))
    return run(done.model, questions, stage, out or done.args.out, [name], partial, None, batch_size, worst,
               seed=seed, paper=done.args.model, scenes_from=str(root), scenes=len(questions.scenes))  # fmt: skip


def with_boxes(questions: Questions, path: Path) -> Questions:
    """Proposals from a file {scene: [[cx, cy, cz, w, d, h], ..]}: identifier k is the k-th box (k < 1000)."""
    with data.reading(path, "JSON object of scenes with lists of six numbers"):
        held = {n: np.array(rows, float).reshape(-1, 6)[:1000] for n, rows in data.read_json(path).items()}
    shown = {}
    for n, scene in questions.scenes.items():
        things = [Thing(k, "", "", box) for k, box in enumerate(held.get(n, ()))]
        shown[n] = replace(scene, objects=things, identifiers={o.id: o.id for o in things})
    return replace(questions, shown=shown, proposals=fingerprint(path).replace(" sha256 ", "-"))


def read_benchmark(name: str, annotations: Path, root: Path | None = None, proposals: str = "gt",
                   partial: bool = False) -> Questions:  # fmt: skip
    """Questions to score a file of answers with: those that a run wrote, or an official file. There identifiers are
    ScanNet's objectIds (boxes from the scans below `root`), or count the boxes of a proposals file."""
    row = find_benchmark(name)
    if row.format is None or annotations.name.endswith(".questions.jsonl"):
        return read_questions(annotations)
    questions = read_official(name, annotations, root)
    if root is not None:
        check_count(name, len(questions.samples), questions.expected, "questions", partial)
        questions = with_scans(name, questions, root, partial)
        ids = lambda s: replace(s, identifiers={o.id: o.id - 1 for o in s.objects if o.box is not LOST})  # noqa: E731
        scenes = {n: ids(s) for n, s in questions.scenes.items()}
        shown = {n: scenes[n] if s is questions.scenes[n] else ids(s) for n, s in questions.shown.items()}
        questions = replace(questions, scenes=scenes, shown=shown)
    elif any(s.targets is not None for s in questions.samples):
        raise DataError(f"{name}: its boxes lie in the scans; give their folder with --root")
    if proposals != "gt":
        questions = with_boxes(questions, Path(proposals))
    guess_blindly(questions, blind_of(name, annotations))
    return questions


def score_file(name: str, annotations: Path, predictions: Path, out: Path | None = None, partial: bool = False,
               root: Path | None = None, proposals: str = "gt", worst: int = 0) -> dict:  # fmt: skip
    """Score a predictions file with no model; missing ids are an error, or with `partial` wrong answers."""
    row = find_benchmark(name)
    questions = read_benchmark(name, annotations, root, proposals, partial)
    samples = select(row, questions.samples)
    if not samples:
        raise DataError(f"{annotations}: no questions of {name}; it has those of {', '.join(ask_names(questions))}")
    pairs, faults = read_predictions(predictions)
    answered = {s.id for s in samples} & {str(key) for key, _ in pairs}
    check_count(name, len(samples), questions.expected, "questions", partial)
    check_count(name, len(answered), len(samples), "answered questions", partial)
    texts, _ = admit([s.id for s in samples], pairs)
    folder = (out or predictions).parent
    if questions.hidden:
        submission(name, questions, texts, out or predictions.with_suffix(".submission.json"))
        return {}
    entries = {label(name, questions): score(name, questions, pairs, faults=faults)}
    if out:
        save_metrics(out, entries, provenance(predictions=predictions.name, annotations=annotations.name))
    if worst:
        print("\n".join(failures(name, questions, texts, worst, folder / "failures" / label(name, questions))))
    print(table(entries))
    return entries


def main(arguments: Sequence[str] | None = None) -> None:
    parser = data.Parser(description="Scores of a finished run, or of a file of predictions.")
    parser.add_argument("--run", type=Path, help="folder of a finished run")
    parser.add_argument("--benchmark", nargs="+", default=[], metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--proposals", default="gt",
                        help=f"what stands for objects: {', '.join(PROPOSALS)}; fase3d also: clusters; without a run "
                        "a JSON file {scene: [[cx, cy, cz, w, d, h], ..]}")  # fmt: skip
    parser.add_argument("--objects", type=int, nargs="+", default=[None], metavar="N",
                        help="with --run: ask in fresh rooms of N objects; scores go to OUT/objects-N")  # fmt: skip
    parser.add_argument("--partial", action="store_true", help="accept fewer questions or answers than there should be")
    parser.add_argument("--annotations", type=Path, help="the benchmark's questions: a file, or a folder that holds it")
    parser.add_argument("--predictions", type=Path, help='lines of {"id": .., "prediction": "text"}; no model then')
    parser.add_argument("--root", type=Path, help="folder of the scans that official questions are about")
    parser.add_argument("--failures", type=int, default=0, metavar="N", help="list the N worst answers, with pictures")
    parser.add_argument("--out", type=Path, help="metrics.json to write; with --run: the folder for it")
    try:
        a = parser.parse_args(arguments)
        official = [n for n in a.benchmark if find_benchmark(n).format]
        if a.run and not a.predictions and official in ([], a.benchmark) and bool(official) == bool(a.annotations):
            import train

            done = train.load_run(a.run)
            for name in official:
                evaluate_official(done, name, a.annotations, a.root, a.proposals, a.partial, a.out, worst=a.failures)
            for n in [] if official else a.objects:
                out = (a.out or a.run) / f"objects-{n}" if n else a.out
                evaluate_run(done, a.benchmark, a.proposals, a.partial, out, objects=n, worst=a.failures)
            write_report(a.out or a.run, a.run, done.test, a.root or scans_of(done), a.failures or ASKED)
        elif a.annotations and a.predictions and len(a.benchmark) == 1 and not a.run:
            score_file(a.benchmark[0], a.annotations, a.predictions, a.out, a.partial, a.root, a.proposals, a.failures)
        else:
            parser.error("give --run DIR, or one --benchmark NAME with --annotations FILE and --predictions FILE; a "
                         "run and an official benchmark take --annotations too")  # fmt: skip
    except (DataError, OSError) as e:  # OSError: what cannot be written
        parser.exit(2, f"evaluate.py: {e}\n")


if __name__ == "__main__":
    main()
