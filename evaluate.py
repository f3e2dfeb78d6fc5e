"""Scores under named protocols: ask a trained model, or score anybody's answers without a model.

    python evaluate.py --run RUN [--benchmark rooms/qa ..] [--proposals gt|segments|FILE|DIR] [--objects N ..]
    python evaluate.py --run RUN --benchmark scanqa --annotations FILE --root SCANS
    python evaluate.py --benchmark scanqa --annotations FILE --predictions FILE [--dialect all]
    python evaluate.py --run RUN --scene PATH --ask "How many chairs are there?"

A question goes load -> predict (or read_predictions) -> score -> save -> table. A benchmark is a
class of a few lines: its files, its prompt, how a row becomes a `Sample`, how an answer is scored.
A metric is a plain function of (answer, sample, scene); what needs all answers at once (CIDEr,
BLEU) follows from `text_sets`.

Groups of papers score the same text differently, so a score's name carries its protocol:
"acc@0.5/scanrefer", "score/official", and for text a dialect, "cider/chat-scene" (`DIALECTS`).
Shares are in 0..1 and text scores are pycocoevalcap's own; papers print both times 100. What cannot
be computed (no Java) is None, never zero.

No answer is the empty text and is scored as the official scripts score it; how many there were
stands beside. So do chance and blind, computed for the very questions scored.

Contents: 1 reading an answer · 2 metrics · 3 text and captions · 4 benchmarks · 5 official files ·
6 predict · 7 score and table · 8 files and report · 9 mixtures to train on · 10 ask, command line
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from html import escape
from pathlib import Path

# a short spin at OpenMP's barriers, as in train.py
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.distributed as dist

import data
from data import DataError, Sample, Scene

Model = data.SceneLanguageModel

LIMIT = 10_000  # characters of an answer that are scored
MAX_ERROR_M = 10.0  # the largest error charged, also for no answer: silence must not lower a mean

# ---- 1 reading an answer -------------------------------------------------------------------------

IDENTIFIER = re.compile(r"<OBJ(\d{3})>")
WORDS = re.findall(
    r"\w+",
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
    hundred thousand""",
)
NUMBERS = dict(zip(WORDS, [*range(21), *range(30, 101, 10), 1000], strict=True))

CLEANED = {  # word -> word of the cleaner that six code bases score ScanQA and SQA3D with
    "letf": "left", "let": "left", "tehre": "there", "rigth": "right", "rght": "right", "behine": "behind", "tv": "TV",
    "chai": "chair", "wasing": "washing", "waslked": "walked", "oclock": "o'clock", "none": "zero",
    "23": "twenty-three", **{str(n): word for n, word in enumerate(WORDS[:21])},
}  # fmt: skip


@cache  # references and guesses are cleaned again and again
def clean(text):
    """Clean an answer as LEO does.

    Lower case, no punctuation but , ' - :, typos mended, digits to words, no articles.
    """
    text = re.sub(r"^ | $", "", re.sub(r" {2,}", " ", text.lower()))
    text = re.sub(r"[^a-z0-9,'\s\-:]+", "", text)
    text = re.sub(r"\w+", lambda found: CLEANED.get(found[0], found[0]), text)
    text = re.sub(r"\bo' +clock\b", "o'clock", text)
    text = re.sub(r"\b([a-zA-Z]+)[0-9]\b", r"\1", text)  # "mat2"
    for article in ("a", "an", "the"):
        text = re.sub(rf"\b{article} ([a-zA-Z]+)", r"\1", text)
    return re.sub(r"\bbackwards\b", "backward", text)


def first_word(text):
    return text.split(" ")[0].rstrip(".").strip()


def official_number(text):
    """Read a number as VSI-Bench does, else NaN.

    What stands before the first space, without final dots, must be a float.
    """
    try:
        return float(first_word(text))
    except ValueError:
        return np.nan


def number(text):
    """Read a number as lmms-eval does: the first in digits or in English words, else NaN."""
    # digits and words in the order in which they stand
    tokens = re.findall(r"-?\d+(?:\.\d+)?|[a-z]+", text.lower())
    start = next((i for i, token in enumerate(tokens) if token in NUMBERS or not token.isalpha()), None)
    if start is None:
        return np.nan
    if tokens[start] not in NUMBERS:
        return float(tokens[start])

    # "three hundred and twenty-one": thousands are put aside, hundreds multiply what came before
    total = current = 0
    for word in filter(str.isalpha, tokens[start:]):
        value = 0 if word == "and" else NUMBERS.get(word)
        if value is None:
            break
        if value == 1000:
            total, current = total + max(current, 1) * value, 0
        else:
            current = max(current, 1) * value if value == 100 else current + value
    return total + current


def boxes(text):
    """Read every bracketed [cx, cy, cz, w, d, h] in meters.

    One with NaN or without volume is an empty box, which fits nothing.
    """
    return [box if box is not None and (box[3:] > 0).all() else np.zeros(6) for box in data.tuples(text, 6)]


def with_boxes(text, scene):
    """Write an answer's identifiers out as boxes, so that metrics know one form.

    Identifiers of no object are dropped, as the official scripts do.
    """
    box_of = {scene.identifiers[o.id]: o.box.tolist() for o in scene.objects if o.id in scene.identifiers}
    return IDENTIFIER.sub(lambda found: str(box_of.get(int(found[1]), "")), text)


# ---- 2 metrics -----------------------------------------------------------------------------------
#
# Functions of (the answer's text, its Sample, the true Scene) that return a number.


def box_ious(a, b):
    """Compute the IoU [n, m] of two lists of boxes [6]; either may be empty."""
    return data.box_iou(np.reshape(a, (-1, 6)), np.reshape(b, (-1, 6)))


def true_boxes(ids, scene):
    """Find the boxes [6] of objects; one that the scan lacks has an empty box, which nothing hits."""
    box_of = {o.id: o.box for o in scene.objects}
    return [box_of.get(i, np.zeros(6)) for i in ids]


def first_box_fits(text, sample, scene, threshold):
    """Compute ScanRefer's Acc@IoU: whether the first box of the answer fits the target, `>=`."""
    iou = box_ious(boxes(text)[:1], true_boxes(sample.targets, scene))  # [1, 1], or [0, 1] without an answer
    return float((iou >= threshold).any())


def boxes_f1(text, sample, scene, threshold):
    """Compute Multi3DRefer's F1 of one question: 2 hits / (answered + true).

    With nothing to find, silence scores 1. IoUs are stored in float32, as there, which lets an
    exact 0.5 pass.
    """
    from scipy.optimize import linear_sum_assignment

    found, truth = boxes(text), true_boxes(sample.targets, scene)

    # pairs with the largest sum of overlap, which need not give the most hits
    iou = box_ious(found, truth).astype(np.float32)
    hits = (iou[linear_sum_assignment(-iou)] >= threshold).sum()
    return 2 * hits / (len(found) + len(truth)) if found or truth else 1.0


def spatial_score(text, sample, scene, parse):
    """Score a VSI-Bench question: a choice by its letter, a number by its mean relative accuracy.

    That is the share of the thresholds 0.50, 0.55 .. 0.95 with a relative error of at most 1 -
    threshold; the letter must be the first word.
    """
    if sample.options:
        return float(first_word(text).lower() == sample.answer.lower())
    error = abs(parse(text) - sample.value) / sample.value if sample.value else np.inf
    return np.mean(error <= 1 - np.linspace(0.5, 0.95, 10))


def length_error(text, sample, scene=None):
    """Measure how far a length is off, at most MAX_ERROR_M."""
    return np.nanmin([abs(number(text) - sample.value), MAX_ERROR_M])


def point_error(text, sample, scene=None):
    """Measure how far the first bracketed [x, y, z] is from the true point, at most MAX_ERROR_M."""
    point = next(iter(data.tuples(text, 3)), None)
    return MAX_ERROR_M if point is None else min(np.linalg.norm(point - sample.point), MAX_ERROR_M)


LENGTH = {
    "within_20_percent/number": lambda text, sample, _: float(
        length_error(text, sample) <= 0.2 * sample.value
    ),
    "mae_m/capped": length_error,
    "mra/number": partial(spatial_score, parse=number),
}
POSITION = {
    "within_0.5_m/triple": lambda text, sample, _: float(point_error(text, sample) <= 0.5),
    "mae_m/capped": point_error,
}

# ---- 3 text and captions -------------------------------------------------------------------------
#
# A match is a function of (answer, references), both cleaned, that returns its scores by name.


def strict(answer, references):
    """Match as ScanQA's EM@1: the answer is one of the references."""
    return {"em": float(answer in references)}


def overlaps(answer, reference):
    """Test whether one contains the other once spaces are gone; "" is in everything."""
    a, b = ("".join(text.split()) for text in (answer, reference))
    return a in b or b in a


def refined(answer, references):
    """Match with EM, and EM-R: equal to a reference, or overlapping with one."""
    return strict(answer, references) | {"em_refined": float(any(overlaps(answer, r) for r in references))}


def refined_in_order(answer, references):
    """Match as LEO: the first reference that equals the answer or overlaps with it decides."""
    first = next((r for r in references if overlaps(answer, r)), None)
    return {"em": float(first == answer), "em_refined": float(first is not None)}


@dataclass(frozen=True)
class Dialect:
    """How a group of papers scores text."""

    who: str
    answer: Callable = str  # cleans the answer
    reference: Callable = str  # cleans a reference
    match: Callable = strict  # (answer, references) -> {"em": .., "em_refined": ..}
    ngrams: Callable | None = str  # cleans the answer once more for n-grams; None: exact match only
    ptb: bool = False  # whether the PTB tokenizer comes before n-grams
    above: float = 0.0  # captions: by how much the IoU must exceed the threshold
    first_30: bool = False  # captions: references are the first 30 words of the benchmark's own tokens


DIALECTS = {
    "scanqa": Dialect("ScanQA's score.py, 3D-LLM", ptb=True),
    "chat-scene": Dialect(
        "Chat-Scene, GPT4Scene, Proxy3D",
        lambda text: clean(text.removesuffix(".")),
        match=lambda answer, known: refined(answer, known if answer else []),
        ptb=True,
    ),
    "llava-3d": Dialect("LLaVA-3D, 3D-LLaVA", clean, clean, refined, ptb=True),
    "leo": Dialect("LEO, MSR3D", clean, clean, refined_in_order),
    "video-3d-llm": Dialect("Video-3D-LLM, 3DRS, Spatial-MLLM", ngrams=lambda text: text.rstrip(".")),
    "ll3da": Dialect("LL3DA, PerLA, Fase3D", lambda text: re.sub(" +", " ", text).strip(" ")),
}


def space_punctuation(text):
    return text.replace(".", " . ").replace(",", " , ").lower()


CAPTION_DIALECTS = {
    "ll3da": replace(DIALECTS["ll3da"], above=1e-9, first_30=True),
    "chat-scene": Dialect("Chat-Scene, GPT4Scene, Proxy3D, 3D-LLaVA", ptb=True),
    "video-3d-llm": Dialect("Video-3D-LLM, 3DRS", space_punctuation, space_punctuation),
    "leo": Dialect("LEO", lambda text: text.replace(". ", " . "), first_30=True),
}
# what the numbers in a paper use
PAPER_DIALECT = {"proxy3d": "chat-scene", "fase3d": "ll3da", "spatial3dllm": "ll3da"}


def with_java(work, *arguments):
    """Compute what needs Java, or None where it does not work: other scores must not be lost."""
    try:
        if not shutil.which("java"):
            raise OSError("there is no java")
        return work(*arguments)
    except (OSError, ValueError) as error:
        print(f"note: no {work.__name__}: {error}", file=sys.stderr)


def one_line(text):
    """Make text safe for Java programs that read lines.

    It is printable, valid UTF-8 and without METEOR's separator.
    """
    text = "".join(c if c.isprintable() else " " for c in text).replace("|||", " ")
    return " ".join(text.split())


def tokenize(groups):
    """Split groups of texts with pycocoevalcap's PTB tokenizer.

    Tokens are lower case, without punctuation, joined by spaces.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    lines = {i: [{"caption": one_line(text)} for text in texts] for i, texts in enumerate(groups)}
    tokens = [*PTBTokenizer().tokenize(lines).values()]
    if [*map(len, tokens)] != [*map(len, groups)]:
        raise ValueError("it gave other lines than it got; its message is above")
    return tokens


def meteor(pairs):
    """Compute METEOR of several (references, answers) with one Java process, gone afterwards."""
    from pycocoevalcap.meteor.meteor import Meteor

    scorer, found = Meteor(), []  # a process of a gigabyte
    try:
        for pair in pairs:
            # it reads lines: none may break in two
            safe = [{i: [*map(one_line, texts)] for i, texts in side.items()} for side in pair]
            found.append(scorer.compute_score(*safe)[0])
        return found
    finally:
        # whatever happened, it ends here; after an error its destructor would wait for the lock
        scorer.meteor_p.kill()
        if scorer.lock.locked():
            scorer.lock.release()


def text_scores(sets):
    """Compute CIDEr, BLEU-1..4, ROUGE-L and METEOR by pycocoevalcap.

    sets: {suffix: (answers, references, ptb)}, with a list of texts for every question; CIDEr
    weighs words by the references of this very set, so one sample scores 0 and one-word answers at
    most 2.5.
    Returns: {"cider<suffix>": .., ..}, None where Java is needed and missing; CIDEr of every answer
    in the first set.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    # what stays None is not available
    names = ("cider", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "meteor")
    scores = {name + suffix: None for suffix in sets for name in names}
    pairs, each = {}, []
    for suffix, (said, known, ptb) in sets.items():
        # both sides are split by one process
        groups, count = [*said, *known], len(said)
        if ptb:
            groups = with_java(tokenize, groups)
        if groups is None:
            continue

        # n-grams; the scorers want both sides by question
        said, known = dict(enumerate(groups[:count])), dict(enumerate(groups[count:]))
        cider, per_answer = Cider().compute_score(known, said)
        values = (
            cider,
            *Bleu(4).compute_score(known, said, verbose=0)[0],
            Rouge().compute_score(known, said)[0],
        )
        scores |= {name + suffix: float(value) for name, value in zip(names, values, strict=False)}
        each = each or per_answer.tolist()
        pairs[suffix] = known, said

    # METEOR of all sets with one process
    found = with_java(meteor, pairs.values()) if pairs else None
    scores |= {"meteor" + suffix: value for suffix, value in zip(pairs, found or (), strict=False)}
    return scores, each


def proposal_fit(scene, shown, object_id):
    """Find the best IoU with an object among the proposals that fit no other object better (LL3DA)."""
    # true objects are their own proposals
    if shown is scene or not scene.objects:
        return float(object_id in scene.identifiers)

    # of each proposal the object that it fits best, and how well
    offered = [o.box for o in shown.objects if o.id in shown.identifiers]
    iou = box_ious(offered, [o.box for o in scene.objects])  # [P, n]
    own = np.array([o.id == object_id for o in scene.objects])
    return iou.max(1)[own[iou.argmax(1)]].max(initial=0.0)


# ---- 4 benchmarks --------------------------------------------------------------------------------


@dataclass
class Questions:
    """The questions of one benchmark and the scenes they are about."""

    name: str  # in files and tables: "scanrefer", or with other proposals "scanrefer@segments"
    benchmark: Benchmark
    samples: list[Sample]
    scenes: dict[str, Scene]  # the truth
    shown: dict[str, Scene]  # what the model sees: the same, or with other proposals for objects
    blind: data.Blind | None = None  # answers of training questions
    source: str = ""  # the official file
    # what a reader of the scores must know: text -> how many
    remarks: Counter = field(default_factory=Counter)

    def each(self, *columns):
        """Give every question with its scenes and its entry of every column."""
        for sample, *entries in zip(self.samples, *columns, strict=True):
            yield sample, self.scenes[sample.scene], self.shown[sample.scene], *entries


class Benchmark:
    """What is asked and how answers are scored; a subclass or a keyword states what differs.

    The first score is the headline. `files` are official ones by split: (name, number of questions
    or None).
    """

    files = {}
    split = "val"  # the one that papers report
    boxes = ""  # a file of boxes, beside it, where objects are not numbered as in the scans
    tasks = ()  # generated questions that belong here
    prompt = "{question}"  # around the question; a part of the result
    choice_prompt = "{question}"  # the same where a question has {options}
    tokens = 48  # the longest answer; a true one must fit also where numbers are split into digits
    metrics = {}  # name/protocol -> function of (answer, sample, scene), the scene is the truth
    dialects = {}  # name -> Dialect, whose way to score text
    grounded = False  # whether an identifier in an answer means its box
    merged = False  # rows of one id are one question with several answers
    macro = False  # the score is the mean of the parts' means, that of "a" the mean of "a/b", "a/c"

    def __init__(self, **changes):
        vars(self).update(changes)

    def rows(self, path, split):
        """Give the rows of an official file, or of its part that is named like the split."""
        return read_rows(path, split)

    # read(**fields), of each benchmark with official files: turn the fields of a row into a question; None:
    # the row does not belong here

    def finish(self, samples, folders):
        """Do what needs all rows, or a file in one of the folders."""
        return samples

    def parts(self, sample):
        """Name the parts of the table that a question belongs to: its task where there are several,
        else its kind.
        """
        part = sample.task if len(self.tasks) > 1 else sample.kind
        return (part,) if part else ()

    def write_prompt(self, sample):
        prompt = self.choice_prompt if sample.options else self.prompt
        return prompt.format(question=sample.question, options="\n".join(sample.options or ()))

    def score(self, answer, sample, scene):
        """Score one answer by every metric, and its words in every dialect."""
        found = {name: metric(answer, sample, scene) for name, metric in self.metrics.items()}
        for name, dialect in self.dialects.items():
            known = [dialect.reference(r) for r in sample.answers or [sample.answer]]
            matched = dialect.match(dialect.answer(answer), known)
            found |= {f"{key}/{name}": value for key, value in matched.items()}
        return found

    def text_sets(self, questions, answers):
        """Prepare the sets of `text_scores`, for scores of all answers together."""
        sets = {}
        for name, d in self.dialects.items():
            if d.ngrams:
                said = [[d.ngrams(d.answer(text))] for text in answers]
                sets[f"/{name}"] = said, [[*map(d.reference, s.answers)] for s in questions.samples], d.ptb
        return sets


class TextBenchmark(Benchmark):
    """Answers in words: exact match, and n-gram scores of the whole set, in one or more dialects."""

    dialects = DIALECTS
    tokens = 96


class Captions(Benchmark):
    """Dense captions: m@kIoU over objects, where a caption whose box does not fit is "sos eos"
    (Scan2Cap).

    The markers stay because papers keep them; they lift BLEU-1 of wrong answers.
    """

    dialects = CAPTION_DIALECTS
    tokens = 128

    def score(self, answer, sample, scene):
        return {}  # only all captions together have scores

    def text_sets(self, questions, answers):
        # whether a proposal fits the object at all
        fits = [proposal_fit(scene, shown, s.targets[0]) for s, scene, shown in questions.each()]
        sets = {}
        for (name, d), k in itertools.product(self.dialects.items(), (0.5, 0.25)):
            said, known = [], []
            for s, answer, fit in zip(questions.samples, answers, fits, strict=True):
                said.append([d.answer(f"sos {answer} eos" if fit >= k + d.above else "sos eos")])
                texts = s.tokens if d.first_30 and s.tokens else s.answers
                known.append([d.reference(f"sos {text} eos") for text in texts])
            sets[f"@{k}/{name}"] = said, known, d.ptb
        return sets


class Grounding(Benchmark):
    """One object, named by its identifier or its box."""

    metrics = {f"acc@{t}/scanrefer": partial(first_box_fits, threshold=t) for t in (0.5, 0.25)}
    tokens = 64
    grounded = True


class ManyTargets(Grounding):
    """Any number of objects; Multi3DRefer's kinds, and those without and with a target, since
    silence scores in one."""

    metrics = {f"f1@{t}/multi3drefer": partial(boxes_f1, threshold=t) for t in (0.5, 0.25)}
    tokens = 384

    def parts(self, sample):
        return sample.kind, "with_target" if sample.targets else "zero_target"


class Spatial(Benchmark):
    """VSI-Bench's numbers and choices: the mean of the tasks' means, for which three kinds of
    direction are one."""

    metrics = {
        "score/official": partial(spatial_score, parse=official_number),
        "score/lmms-eval": partial(spatial_score, parse=number),
    }
    macro = True

    def parts(self, sample):
        task = sample.task.removeprefix("vsi_")
        return (task, f"{task}/{sample.kind}") if sample.kind else (task,)


STRICT = {"strict": Dialect("nobody else: answers as they are", ngrams=None)}
BENCHMARKS = {
    **{
        f"rooms/grounding{kind}": Grounding(tasks=(f"ground{kind}",))
        for kind in ("", "_multiple", "_category", "_relation", "_superlative")
    },
    "rooms/multi": ManyTargets(tasks=("multi",)),
    "rooms/qa": TextBenchmark(
        tasks=("color", "what", "where", "count", "exist", "situated"), dialects=STRICT
    ),
    "rooms/identifier": TextBenchmark(
        tasks=("id_category", "id_color", "id_size", "relation"), dialects=STRICT
    ),
    "rooms/coordinate": Benchmark(tasks=("coordinate",), metrics=POSITION),
    "rooms/distance": Benchmark(tasks=("distance", "distance_ids", "size"), metrics=LENGTH, tokens=96),
    "rooms/caption": Captions(tasks=("caption",)),
    "rooms/vsi": Spatial(
        tasks=(
            "vsi_counting",
            "vsi_abs_distance",
            "vsi_object_size",
            "vsi_room_size",
            "vsi_rel_distance",
            "vsi_rel_direction",
        )
    ),
}


def find_benchmark(name):
    return data.choose(BENCHMARKS, name, "benchmark")


def adopt(paper):
    """Add a paper module's own benchmarks, {name: keywords of Benchmark}; without metrics they ask for meters."""
    for name, row in vars(paper).get("BENCHMARKS", {}).items():
        BENCHMARKS[name] = Benchmark(**{"metrics": LENGTH} | row)


def choose_dialects(benchmark, names, paper=""):
    """Give a benchmark some of its dialects: those named ("all": every one), else the paper's, else
    its first.
    """
    known = benchmark.dialects
    wanted = known if "all" in names else names or [PAPER_DIALECT.get(paper)]
    chosen = [name for name in known if name in wanted] or [*known][:1]
    benchmark = copy.copy(benchmark)
    benchmark.dialects = {name: known[name] for name in chosen}
    return benchmark


# ---- 5 official files ----------------------------------------------------------------------------
#
# A class per benchmark: what a row looks like, and which field is what. Objects of ScanNet are
# numbered objectId + 1 (0 is "no object").


def read_rows(path, key=""):
    """Read the rows of a .json (a list, or what lies under `key`), .jsonl or .csv file.

    A line that is not JSON is None; an object is one row.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; name the file itself")

    # a byte order mark is no part of the text
    text = path.read_text("utf-8-sig", "replace")
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines(True)))

    def parsed(text):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return None

    # one JSON value, or one a line
    held = parsed(text)
    if held is None:  # JSON Lines
        held = [parsed(line) for line in text.split("\n") if line.strip()]

    # an object holds its rows under a key, or is a row
    if isinstance(held, dict):
        held = held.get(key, [held])
    if not isinstance(held, list) or not any(row is not None for row in held):
        raise DataError(f"{path}: no rows of JSON or JSON Lines; copy or export it again")
    return held


def make_sample(id, scene, task, question, answers, **more):
    """Make a question of an official file; the blind baseline falls back on its first two words."""
    texts = [scene, question, *answers]
    written = all(isinstance(t, str) and t.strip() for t in texts)
    if not (isinstance(answers, list) and answers and written):
        raise ValueError(f"scene, question and a list of answers must be text, not {texts}"[:200])
    template = " ".join([task, *question.lower().split()[:2]])
    return Sample(str(id), scene, task, question, answers[0], answers, template=template, **more)


WORD = "{question}\nAnswer the question using a single word or phrase."
OPTIONS = "Options:\n{options}\nAnswer with the option's letter from the given choices directly."


def splits(name, **counts):
    """Name the files of splits, the same but for the split, with their numbers of questions."""
    return {split: (name.replace("*", split), count) for split, count in counts.items()}


class ScanQA(TextBenchmark):
    """{"question_id": "val-scene0011-0", "scene_id": "scene0011_00", "question": "What color is the
    chair?", "answers": ["dark brown"], "object_ids": [8], "object_names": ["chair"]}"""

    files = splits("ScanQA_v1.0_*.json", train=25_563, val=4_675)
    prompt = WORD
    kinds = {
        "Where": "place",
        "How many": "number",
        "What color": "color",
        "What is the color": "color",
        "What shape": "nature",
        "What type": "nature",
        "What kind": "nature",
        "What is": "object",
    }

    def read(self, question_id, scene_id, question, answers, **others):
        kind = next((kind for words, kind in self.kinds.items() if words in question), "other")
        return make_sample(question_id, scene_id, "qa", question, answers, kind=kind)


class SQA3D(TextBenchmark):
    """{"question_id": 220602000000, "scene_id": "scene0050_00", "situation": "I am standing by the
    ottoman ..", "question": "What is on my left?", and from the annotations "answers": [{"answer":
    "desk", ..}], ..}"""

    files = splits("v1_balanced_questions_*_scannetv2.json", train=26_623, val=3_261, test=3_519)
    split = "test"
    prompt = WORD
    # there Chat-Scene, the headline, cleans references too
    dialects = {"chat-scene": replace(DIALECTS["chat-scene"], reference=clean)}
    dialects = dialects | DIALECTS | dialects
    kinds = ("what", "is", "how", "can", "which")

    def rows(self, path, split):
        beside = path.with_name(path.name.replace("_questions_", "_sqa_annotations_"))
        answers = {row["question_id"]: row for row in read_rows(beside, "annotations")}
        return [answers.get(row["question_id"], {}) | row for row in read_rows(path, "questions")]

    def read(self, question_id, scene_id, situation, question, answers, **others):
        answers = [answer["answer"] for answer in answers]
        kind = next((word for word in self.kinds if question.lower().startswith(word)), "others")
        sample = make_sample(question_id, scene_id, "situated", question, answers, kind=kind)
        return replace(sample, question=f"{situation} {question}")


class MSQA(TextBenchmark):
    """{"index": "scene0011_00_12", "scan_id": "scene0011_00", "situation": "You are sitting on ..",
    "question": "How many chairs are in front of me?", "answers": ["Two"], "type": "counting", ..};
    its GPT score is not offered."""

    files = splits("msqa_scannet_*.json", train=None, val=None, test=None)
    split = "test"
    dialects = {"leo": DIALECTS["leo"]}

    def read(self, index, scan_id, situation, question, answers, type, **others):
        return make_sample(index, scan_id, "situated", f"{situation} {question}", answers, kind=type)


class OpenEQA(TextBenchmark):
    """{"question_id": "e845f82a-..", "episode_history": "scannet-v0/002-scannet-scene0709_00",
    "question": "What red object is below the windows?", "answer": "Fire extinguisher", "category":
    "object recognition"}; the benchmark's own score is a language model's judgement, which is not
    offered."""

    files = {"val": ("open-eqa-v0.json", 1_636)}
    prompt = WORD
    dialects = {"llava-3d": DIALECTS["llava-3d"], **DIALECTS}

    def read(self, question_id, episode_history, question, answer, category, extra_answers=()):
        scene, answers = episode_history.split("-")[-1], [answer, *filter(str.strip, extra_answers)]
        return make_sample(question_id, scene, "qa", question, answers, kind=category)


def object_of(scene, object_id):
    """Turn ScanNet's objectId into an object's id; scene0217_00 lists its 31 objects twice."""
    number = int(object_id)
    return number + 1 - (31 if scene == "scene0217_00" and number > 30 else 0)


CLASSES = {"cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter", "desk",
           "curtain", "refrigerator", "shower curtain", "toilet", "sink", "bathtub"}  # and "others"  # fmt: skip
LABELS = "scannetv2-labels.combined.tsv"


class ScanRefer(Grounding):
    """{"scene_id": "scene0011_00", "object_id": "8", "object_name": "office_chair", "ann_id": "0",
    "description": "a brown chair ..", "token": ["a", "brown", ..]}; "unique" = the only *annotated*
    object of one of 18 classes, where ScanNet's table of classes lies beside the file or in --root."""

    files = splits("ScanRefer_filtered_*.json", train=36_665, val=9_508)
    prompt = "Which object is described? {question}"
    kinds = ("unique", "multiple")

    def read(self, scene_id, object_id, object_name, ann_id, description, eval_type="", **others):
        target, kind = object_of(scene_id, object_id), eval_type or object_name.replace("_", " ")
        return make_sample(
            f"{scene_id}|{object_id}|{ann_id}",
            scene_id,
            "ground",
            description,
            [f"<obj {target}>"],
            targets=[target],
            kind=kind,
        )

    def finish(self, samples, folders):
        # rows that name their object's category in place of a kind, and the class of each category
        named = [s for s in samples if s.kind not in self.kinds]
        table = next((folder / LABELS for folder in folders if (folder / LABELS).exists()), None)
        rows = csv.DictReader(table.read_text().splitlines(), delimiter="\t") if table else ()
        class_of = {row["raw_category"]: row["nyu40class"] for row in rows if row["nyu40class"] in CLASSES}
        for s in named:
            s.kind = class_of.get(s.kind, "others") if table else ""

        # how many annotated objects of a class a scene has
        count = Counter(found[:2] for found in {(s.scene, s.kind, *s.targets) for s in named})
        for s in named if table else ():
            s.kind = "unique" if count[s.scene, s.kind] == 1 else "multiple"
        return samples


class Multi3DRefer(ManyTargets):
    """{"scene_id": "scene0011_00", "object_ids": [3, 8], "object_name": "chair", "ann_id": 0,
    "eval_type": "mt", "description": "the chairs at the table"}; prompt and answer are Proxy3D's (supp. Fig. 5)."""

    files = splits("multi3drefer_*.json", train=43_838, val=11_120)
    prompt = (
        'Are there any objects that correspond to the description "{question}"? '
        "If yes, could you share the IDs for those objects?"
    )

    def read(self, scene_id, object_ids, ann_id, eval_type, description, **others):
        targets = [object_of(scene_id, i) for i in object_ids]
        answer = "No."
        if targets:
            answer = "Yes. " + " ".join(f"<obj {i}>" for i in targets) + "."
        return make_sample(
            f"{scene_id}|{ann_id}", scene_id, "multi", description, [answer], targets=targets, kind=eval_type
        )


class Scan2Cap(Captions):
    """ScanRefer's rows, or Nr3D's in the same form; all descriptions of an object are references of
    one question, in the words of Proxy3D's supp. Fig. 5."""

    files = splits("ScanRefer_filtered_*.json", train=7_875, val=2_068)
    merged = True

    def read(self, scene_id, object_id, description, token=(), **others):
        target, words = object_of(scene_id, object_id), token or description.lower().split()
        return make_sample(
            f"{scene_id}|{object_id}",
            scene_id,
            "caption",
            f"Provide a detailed description of the appearance of <obj {target}> before analyzing its spatial "
            "connections with other elements in the scene.",
            [description],
            tokens=[" ".join(words[:30])],
            targets=[target],
        )


class VSIBench(Spatial):
    """{"id": 0, "dataset": "scannet", "scene_name": "scene0011_00", "question_type":
    "object_rel_distance", "question": "Which is closest to ..", "ground_truth": "B", "options":
    ["A. chair", "B. bed"]}; no options: a number as text."""

    files = {"test": ("test.jsonl", 5_130)}
    split = "test"
    prompt = f"These are frames of a video.\n{WORD.replace('Answer', 'Please answer')}"
    choice_prompt = f"These are frames of a video.\n{{question}}\n{OPTIONS}"

    def read(self, id, scene_name, question_type, question, ground_truth, options=None, **others):
        task, _, kind = re.sub("_(easy|medium|hard)$", r" \1", question_type).partition(" ")
        value = None if options else float(ground_truth)
        return make_sample(
            id, scene_name, f"vsi_{task}", question, [ground_truth], kind=kind, options=options, value=value
        )


class SR91K(Benchmark):
    """A training source: {"problem_type": "numerical", "problem": "How many ..", "solution":
    "<answer>3</answer>", "path": "scannet/scene0011_00.mp4", "options": [..], "data_source":
    "SR_dataset"}; other sources are skipped."""

    files = {"train": ("SpaceR-151k.jsonl", None)}
    prompt, choice_prompt = WORD, "{question}\n" + OPTIONS

    def read(self, problem_type, problem, solution, path, data_source="SR", options=None, **others):
        asked = problem_type in ("multiple choice", "numerical", "regression")
        if not (asked and data_source.startswith("SR")):
            return None
        answer = re.sub(r"</?answer>", "", solution).strip()
        value = None if options else float(answer)
        return make_sample("", Path(path).stem, "vsi", problem, [answer], options=options, value=value)


class MMScanQA(Benchmark):
    """A training source, {"train": [..], "val": [..]} of {"ID": "QA_1", "sub_class": "..",
    "scan_id": "scannet/scene0011_00", "question": "..", "answers": [".."]}"""

    files = splits("MMScan_QA.json", train=None)
    prompt = WORD

    def read(self, ID, sub_class, scan_id, question, answers, **others):
        return make_sample(ID, scan_id.split("/")[-1], "qa", question, answers, kind=sub_class)


class MMScanVG(Multi3DRefer):
    """A training source, {"train": [..], ..} of {"ID": "VG_1", "sub_class": "..", "scan_id":
    "scannet/scene0011_00", "text": "..", "target_id": [3]}.

    MMScan numbers objects its own way. MMScan_boxes.json beside the file, as `read_boxes` takes it with these
    numbers for objectIds, says which of a scan's objects each one is: that which its box fits best.
    """

    files = splits("MMScan_VG.json", train=None)
    boxes = "MMScan_boxes.json"

    def read(self, ID, sub_class, scan_id, text, target_id, **others):
        sample = super().read(scan_id.split("/")[-1], target_id, ID, sub_class, text)
        return replace(sample, id=ID)


class Dialogue(Benchmark):
    """A training source, 3D-LLM: {"scene_id": "scene0011_00", "question": "### human: clean up. ###
    assistant:", "answers": ["1. go to the desk"]}"""

    def read(self, scene_id, question, answers):
        words = re.sub(r"###\s*(human|assistant)\s*:", " ", question).split()
        return make_sample("", scene_id, "chat", " ".join(words), answers)


BENCHMARKS |= {
    "scanqa": ScanQA(),
    "sqa3d": SQA3D(),
    "msqa": MSQA(),
    "openeqa": OpenEQA(),
    "scanrefer": ScanRefer(),
    "multi3drefer": Multi3DRefer(),
    "scan2cap": Scan2Cap(),
    "nr3d/caption": Scan2Cap(files=splits("nr3d_*.json", train=None, val=None)),
    "vsibench": VSIBench(),
    "sr91k": SR91K(),
    "mmscan/qa": MMScanQA(),
    "mmscan/vg": MMScanVG(),
    "3dllm/description": Dialogue(files=splits("3d_llm_scene_description_*.json", train=912, val=121)),
    "3dllm/dialogue": Dialogue(
        files=splits("3d_llm_embodied_dialogue_filtered_*.json", train=None, val=1_222)
    ),
    "3dllm/planning": Dialogue(
        files=splits("3d_llm_embodied_planning_filtered_*.json", train=None, val=2_282)
    ),
}


def read_official(name, path, root=None, split=""):
    """Read the questions of a file, or of a split's file anywhere below a folder.

    split: by default the one that papers report, which must be there; of a named one the folder may
    have no file and so no questions. root: where tables of the scans may lie. Raises DataError with
    file, row and what is wrong.
    """
    # below a folder it is the split's file
    benchmark = find_benchmark(name)
    wanted = split or benchmark.split
    if path.is_dir():
        file = benchmark.files.get(wanted, (f"{wanted} split",))[0]
        found = sorted(path.rglob(file))
        if not found:
            if split:
                return []
            raise DataError(f"{path}: no {file} below it; name the file itself")
        path = found[0]

    # what is wrong with a row is said with its number
    samples = {}  # by id
    with data.reading(path, f"file of {name}"):
        rows = benchmark.rows(path, wanted)
    for n, row in enumerate(rows, start=1):
        with data.reading(f"{path}, row {n}", f"question {str(row)[:80]}"):
            sample = benchmark.read(**row)
        if sample is not None:
            # a row without an id is known by its place
            sample.id = sample.id or f"{path.stem}/{n}"
            first = samples.setdefault(sample.id, sample)
            if first is not sample:
                if not benchmark.merged:
                    raise DataError(f"{path}, row {n}: the question id {sample.id} twice; get the file again")
                first.answers += sample.answers
                first.tokens += sample.tokens

    # some benchmarks need all rows, or a table beside the file
    if not samples:
        raise DataError(f"{path}: no questions of {name}")
    return benchmark.finish(list(samples.values()), [path.parent, root or path.parent])


# ---- 6 predict -----------------------------------------------------------------------------------


def number_objects(scene, seed=None):
    """Give objects identifiers: ScanNet's objectIds, or with a seed random ones.

    The random ones are the same at every evaluation.
    """
    identifiers = {o.id: o.id - 1 for o in scene.objects}
    if seed is not None:
        rng = np.random.default_rng([seed, zlib.crc32(scene.name.encode())])
        identifiers = data.number_objects(scene, rng)
    return replace(scene, identifiers=identifiers)


def read_boxes(path):
    """Read scenes of nothing but boxes.

    The file is {scene: {objectId: [cx, cy, cz, w, d, h]}} or {scene: [box, ..]}; a box's identifier
    is its objectId, or its place in the list.
    """
    scenes = {}
    with data.reading(path, "file of boxes, {scene: {objectId: six numbers}}"):
        for name, found in read_rows(path)[0].items():
            # objects are numbered from 1, ScanNet's objectIds from 0
            rows = found.items() if isinstance(found, dict) else enumerate(found)
            things = [data.Thing(int(k) + 1, "", "", np.array(box, float).reshape(6)) for k, box in rows]
            scenes[name] = number_objects(Scene(name, "boxes", things))
    return scenes


def load(name, annotations, root=None, partial=False, dialects=(), paper="", **options):
    """Read an official file and the scenes that it asks about.

    root: the folder of the scans, or a file of true boxes (`read_boxes`); None: no scene is needed.
    partial: accept another number of questions than the split has, and leave out those whose scan
    is missing. dialects, paper: as for `choose_dialects`. options: of the scans' reader.
    """
    # the questions, in the dialects that are to be scored
    benchmark = choose_dialects(find_benchmark(name), dialects, paper)
    if benchmark.split not in benchmark.files or not (benchmark.metrics or benchmark.dialects):
        raise DataError(f"{name}: has no official questions that are scored")
    samples = read_official(name, annotations, root)

    # a file counts as the split it is named after, any other as the one that papers report
    expected = dict(benchmark.files.values()).get(annotations.name, benchmark.files[benchmark.split][1])
    if expected not in (None, len(samples)) and not partial:
        raise DataError(
            f"{annotations}: {len(samples)} questions, not {expected}; complete it, or say --partial"
        )

    # the scenes of these questions and no others
    wanted = {s.scene for s in samples}
    if root is None:
        scenes = {scene: Scene(scene, "scannet", []) for scene in wanted}
    elif root.is_file():
        scenes = read_boxes(root)
    else:
        # scans, or scenes that `data.py cache` has kept, of videos too
        scenes = {}
        for path in data.find_scans(root) or data.find_scenes(root):
            scene = path.stem.partition(".")[0]
            if scene in wanted:
                takes = data.choose_reader(path)[1]
                own = {name: value for name, value in options.items() if name in takes}
                scenes[scene] = data.open_scene(path, "none", **own)
    missing = wanted - scenes.keys()
    if missing and not (partial and wanted & scenes.keys()):
        raise DataError(
            f"{root}: {len(missing)} of {len(wanted)} scenes are not there, such as {min(missing)}; "
            "--partial leaves their questions out"
        )

    # the answers of a training file beside it are the blind baseline
    folder = annotations if annotations.is_dir() else annotations.parent
    known = read_official(name, folder, root, "train")
    blind = data.Blind(known) if known else None
    samples = [s for s in samples if s.scene in scenes]
    return Questions(name, benchmark, samples, scenes, scenes, blind, fingerprint(annotations))


def with_proposals(questions, how, model=None, seed=None):
    """Number all objects, and show other proposals in their place.

    These are "segments", those that the model names, a file's boxes, or a folder's masks.
    """
    # true objects, numbered
    scenes = {name: number_objects(scene, seed) for name, scene in questions.scenes.items()}
    if how == "gt":
        return replace(questions, scenes=scenes, shown=scenes)

    # where proposals come from
    file = Path(how)
    own = {"segments": data.with_own_segments, **model.proposals()} if model else {}
    if model and how not in own and file.is_dir():
        own[how] = partial(data.with_predicted_masks, folder=file)
    if how not in own and not file.is_file():
        known = ", ".join(["gt", *own])
        raise DataError(f"--proposals {how}: neither a file of boxes, a folder of masks, nor one of {known}")
    given = {} if how in own else read_boxes(file)

    # under a name of their own, or a cache would give the features of the true objects
    shown = {}
    for name, scene in scenes.items():
        if how in own:
            scene = own[how](scene)
        else:
            objects = given[name].objects if name in given else []
            scene = replace(scene, objects=objects, instances=None, frames=None)
        shown[name] = number_objects(replace(scene, name=f"{name}@{file.stem}"), seed)
    return replace(questions, name=f"{questions.name}@{file.stem}", scenes=scenes, shown=shown)


def as_shown(sample, scene, shown):
    """Write a question in the proposals' terms: a mark becomes that of the best fitting proposal."""
    offered = [o for o in shown.objects if o.id in shown.identifiers]
    if not offered:
        return sample

    def best(object_id):
        iou = box_ious([o.box for o in offered], true_boxes([object_id], scene))
        return f"<obj {offered[iou.argmax()].id}>"

    texts = ("question", "answer", "reasoning")
    return replace(sample, **{key: data.substitute(getattr(sample, key), best) for key in texts})


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def predict(model, questions):
    """Answer greedily: {id: text}, the same on every rank.

    A rank takes every world-th scene: nothing is padded, nothing answered twice.
    """
    # a process answers whole scenes, so that each is encoded once
    rank, world = rank_and_world()
    benchmark, answers = questions.benchmark, {}
    own = sorted({s.scene for s in questions.samples})[rank::world]
    samples = [s for scene in own for s in questions.samples if s.scene == scene]
    for start in range(0, len(samples), 256):
        chunk = samples[start : start + 256]

        # a scene is read once for all of its questions in the batch
        groups = []
        for name, group in itertools.groupby(chunk, key=lambda s: s.scene):
            scene, shown = questions.scenes[name], questions.shown[name]
            written = [replace(s, question=benchmark.write_prompt(s)) for s in group]
            groups.append((shown, [as_shown(s, scene, shown) for s in written]))
        texts = model.generate(model.batch(groups), max_new_tokens=benchmark.tokens)

        # a stage with reasoning writes it up to the last "="
        for sample, text in zip(chunk, texts, strict=True):
            answers[sample.id] = text.rpartition("=")[2].strip() if model.stage.reasoning else text

    # every process gets all answers
    parts = [answers] * world
    if world > 1:
        dist.all_gather_object(parts, answers)
    return {id: text for part in parts for id, text in part.items()}


# ---- 7 score and table ---------------------------------------------------------------------------


def summarize(benchmark, samples, scored):
    """Average scores per question: {"metric/protocol": .., "metric/protocol/part": ..}."""
    # over all questions, which are the part "", and over each part
    groups = defaultdict(list)
    for sample, scores in zip(samples, scored, strict=True):
        for part in {"", *benchmark.parts(sample)}:
            groups[part].append([*scores.values()])
    means = {part: np.mean(groups[part], axis=0) for part in sorted(groups)}  # [metrics] each

    # kinds of one task count alike whatever their size, and then so do tasks: "a/b", "a", ""
    for whole in sorted(means, reverse=True) if benchmark.macro else ():
        finer = [mean for part, mean in means.items() if part and part.rpartition("/")[0] == whole]
        means[whole] = np.mean(finer or [means[whole]], axis=0)

    return {
        f"{metric}/{part}".removesuffix("/"): mean[i]
        for i, metric in enumerate(scored[0])
        for part, mean in means.items()
    }


def measure(questions, answers):
    """Score answers {id: text}: all scores, and a value per question (its first score, else its
    CIDEr).

    A missing answer is the empty text.
    """
    # question by question; a metric knows boxes only, not identifiers
    benchmark, scored = questions.benchmark, []
    texts = [answers.get(s.id, "") for s in questions.samples]
    for sample, scene, shown, text in questions.each(texts):
        scored.append(benchmark.score(with_boxes(text, shown) if benchmark.grounded else text, sample, scene))
    values = summarize(benchmark, questions.samples, scored)
    each = [next(iter(scores.values()), 0.0) for scores in scored]

    # then all answers together
    found, per_answer = text_scores(benchmark.text_sets(questions, texts))
    if not values and per_answer:
        each = per_answer
    return values | found, each


def chance_scores(questions):
    """Compute what guessing gets on these very questions (`data.chance`).

    Scores are left out where nothing says what to guess from.
    """
    benchmark, scored = questions.benchmark, []
    for sample, scene, shown in questions.each():
        # what a guess may be drawn from
        guesses = questions.blind.answers(sample.task, 50) if questions.blind else []
        known = shown.objects if sample.targets is not None else sample.options or guesses

        # all metrics of a guess at once
        names = benchmark.score("", sample, scene)
        worth = [[*benchmark.score(text, sample, scene).values()] for text in guesses]
        chance = data.chance(sample, shown, worth, np.array) if known else np.nan
        scored.append(dict(zip(names, np.broadcast_to(chance, len(names)), strict=True)))
    found = summarize(benchmark, questions.samples, scored)
    return {name: value for name, value in found.items() if not np.isnan(value)}


def plain(text, scene):
    """Write marked objects by their identifiers, where no paper writes them in words of its own."""
    return data.substitute(text, lambda i: f"<OBJ{scene.identifiers.get(i, 999):03d}>")


def score(questions, answers, others):
    """Make a benchmark's entry of metrics.json from answers {id: text}.

    others: other models' answers, by column. Under "rows" it has a row per question: id, scene,
    question, prediction, answer, score, blind.
    """
    benchmark = questions.benchmark
    values, each = measure(questions, answers)

    # the same questions by chance, blind, and by other models
    blind = {}
    if questions.blind:
        blind = {s.id: plain(questions.blind.predict(s, shown), shown) for s, _, shown in questions.each()}
    columns = {"chance": chance_scores(questions), "blind": measure(questions, blind)[0] if blind else {}}
    columns |= {name: measure(questions, found)[0] for name, found in others.items()}

    # a row per question, what was wrong with its answer, and how well proposals fit its targets
    rows, parts, fits, remarks = [], [], [], questions.remarks.copy()
    for s, scene, shown, value in questions.each(each):
        # a row that a person can read
        text = answers.get(s.id, "")
        rows.append(
            {
                "id": s.id,
                "scene": s.scene,
                "question": s.question,
                "prediction": text,
                "answer": plain(" | ".join(s.answers or [s.answer]), scene),
                "score": value,
                "blind": blind.get(s.id, ""),
            }
        )
        # what is wrong with the answer is counted
        remarks["empty answers"] += not any(map(str.isalnum, text))
        remarks["answers without an object or box"] += benchmark.grounded and not boxes(
            with_boxes(text, shown)
        )
        fits += [proposal_fit(scene, shown, i) for i in s.targets or () if shown is not scene]
        parts += benchmark.parts(s)
    for t in (0.25, 0.5) if fits else ():
        remarks[f"recall@{t} of the proposals"] = np.mean(np.array(fits) >= t).round(3)

    return {
        **values,
        **{name: found.get(next(iter(values))) for name, found in columns.items()},
        "count": len(rows),
        "counts": Counter(parts),
        "columns": columns,
        "remarks": +remarks,
        "dialects": {name: dialect.who for name, dialect in benchmark.dialects.items()},
        "questions": questions.source,
        "prompt": benchmark.prompt,
        "max_new_tokens": benchmark.tokens,
        "rows": rows,
    }


def table(entries):
    """Lay out every score beside chance, blind and others, and what a reader must know."""
    names = dict.fromkeys(c for e in entries.values() for c, found in e["columns"].items() if found)
    lines, notes = [["benchmark", "score", "model", *names, "count"]], []
    for title, entry in entries.items():
        # every score with its count
        for key in (key for key in entry if "/" in key):
            found = [entry, *(entry["columns"].get(c, {}) for c in names)]
            cells = ["n/a" if scores.get(key) is None else f"{scores[key]:.3f}" for scores in found]
            part = "/".join(key.split("/")[2:])
            lines.append([title, key, *cells, str(entry["counts"].get(part, entry["count"]))])

        # what a reader must know stands below the numbers
        notes += [f"{title}: {n} {remark}" for remark, n in entry["remarks"].items()]
        notes += [f"{title}: dialect {name} is that of {who}" for name, who in entry["dialects"].items()]

    # words to the left, numbers to the right
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(f"{cell:{'<>'[c > 1]}{widths[c]}}" for c, cell in enumerate(line)) for line in lines]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:], *notes])


# ---- 8 files and report --------------------------------------------------------------------------

ID_FIELDS = ("id", "question_id", "sample_id", "qid", "index")
TEXT_FIELDS = (
    "prediction",
    "pred",
    "pred_response",
    "response_pred",
    "answer_top10",
    "filtered_resps",
    "response",
    "text",
    "answer",
)


def read_predictions(path, questions, partial=False):
    """Read anybody's answers to the questions: {id: text}.

    One line says how the file was understood. Raises DataError.
    """
    # rows, whatever they are wrapped in
    rows = [row for row in read_rows(path) if isinstance(row, dict)]
    if len(rows) == 1 and not rows[0].keys() & {*ID_FIELDS, "doc"}:  # {id: text}
        rows = [{"id": id, "prediction": text} for id, text in rows[0].items()]
    # lmms-eval keeps the question in "doc"
    rows = [row["doc"] | row if isinstance(row.get("doc"), dict) else row for row in rows]

    # the first known field that rows have is the id, or the text
    fields = dict.fromkeys(itertools.chain(*rows))
    id_field, text_field = (next((n for n in names if n in fields), "") for names in (ID_FIELDS, TEXT_FIELDS))
    known, answers = {s.id for s in questions.samples}, {}
    for row in rows:
        id, text = str(row.get(id_field)).strip(), row.get(text_field)
        # the first of several is the answer; what was thought before it is none
        while isinstance(text, list) and text:
            text = text[0]
        text = "" if text is None else str(text)
        if id not in known or id in answers:
            questions.remarks["rows that answer no question, or one answered before"] += 1
            continue
        tagged = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
        answers[id] = (tagged[1].strip() if tagged else text)[:LIMIT]
        questions.remarks["answers taken out of <answer> tags"] += tagged is not None

    # how the file was understood, and whether it is enough
    print(
        f"{path}: {len(rows)} rows, id = {id_field}, text = {text_field}, {len(answers)} of {len(known)} answered"
    )
    if not text_field or (len(answers) < len(known) and not (partial and answers)):
        raise DataError(
            f"{path}: {len(known) - len(answers)} of {len(known)} questions have no answer; complete it, or "
            f'say --partial; wanted are rows like {{"id": "{min(known)}", "prediction": "text"}}, these have '
            f"{', '.join(fields)}"
        )
    return answers


def revision():
    """Name the commit of the code, with "-dirty" where files differ from it."""
    git = f"git -C '{Path(__file__).parent}' describe --always --dirty --abbrev=40"
    status, text = subprocess.getstatusoutput(git)
    return "unknown" if status else text


def fingerprint(path):
    """Name a file with its checksum, which tells two releases apart; a folder by its name."""
    return f"{path.name} crc32 {zlib.crc32(path.read_bytes()):08x}" if path.is_file() else path.name


def save(path, entries, **facts):
    """Write metrics.json = {benchmark: entry, "provenance": facts} and
    predictions/<benchmark>.jsonl.

    Entries that are there already stay if all facts are the same: a file never mixes two models.
    """
    # entries of the same model and code stay
    facts |= {"code": revision(), "torch": torch.__version__}
    try:
        (old,) = read_rows(path)
        old = old if old.pop("provenance") == facts else {}
    except (OSError, ValueError, LookupError, AttributeError):  # nothing there, or something else
        old = {}

    # questions and answers in files of their own
    for title, entry in entries.items():
        lines = [json.dumps(row) + "\n" for row in entry.pop("rows")]
        file = path.parent / "predictions" / f"{title}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(lines))
    path.write_text(json.dumps(old | entries | {"provenance": facts}, indent=1) + "\n")


def write_report(out):
    """Write report.html of a run: its tables, worst answers, and links to its pictures."""
    if rank_and_world()[0]:
        return

    # tables and worst answers, also of rooms of other sizes and of earlier stages
    parts = [f"<!doctype html><meta charset=utf-8><title>{escape(out.name)}</title>"]
    for path in sorted(out.rglob("metrics.json")):
        entries = json.loads(path.read_text())
        facts = json.dumps(entries.pop("provenance"))
        parts.append(f"<h2>{escape(path.parent.name)}</h2><pre>{escape(table(entries))}</pre>{facts}")
        for title in entries:
            lines = (path.parent / "predictions" / f"{title}.jsonl").read_text().splitlines()
            rows = sorted(map(json.loads, lines), key=lambda row: row["score"])[:5]
            text = "\n".join(f"{key}: {value}" for row in rows for key, value in row.items())
            parts.append(f"<h3>{escape(title)}: worst answers</h3><pre>{escape(text)}</pre>")

    # pictures stay where they are
    for picture in sorted(out.rglob("*.png")):
        name = escape(str(picture.relative_to(out)))
        parts.append(f'<p>{name}<br><img src="{name}" alt="{name}" style="max-width: 100%">')
    (out / "report.html").write_text("\n".join(parts), encoding="utf-8", errors="replace")


# ---- 9 mixtures to train on ----------------------------------------------------------------------
#
# A paper's table of sources (`Stage.files`) and a folder of official files give the questions of a
# stage. No room of an evaluation split is trained in: scene0011_01 is another scan of the room
# scene0011_00.


def evaluation_rooms(names, folder, root, held):
    """Name the rooms that must not be trained in.

    They are those of ScanNet's val and test lists, of the scenes held out by the run, and of every
    other split of these benchmarks in the folder.
    """
    # ScanNet's own lists
    scenes = {scene.name for scene in held}
    for place in (folder, root):
        for path in place.rglob("scannetv2_*.txt"):
            scenes.update(() if "train" in path.name else path.read_text().split())

    # other splits of the same benchmarks
    for name in names:
        for split in find_benchmark(name).files.keys() - {"train"}:
            scenes.update(s.scene for s in read_official(name, folder, root, split))
    if not scenes:
        raise DataError(
            f"{folder}: nothing says which rooms are for evaluation; put scannetv2_val.txt and "
            "scannetv2_test.txt there or beside the scans"
        )
    return {scene.split("_")[0] for scene in scenes}


def mixture(sources, folder, root, train, held, seed=0):
    """Give questions by scene, and a line per source that says what was kept and dropped.

    MODLE's are made where no file holds them. Every accepted answer is a question, with its benchmark's
    prompt. Dropped are answers of another form, leaks, questions without a scan (or, where the benchmark
    has a file of boxes of its own, without these), those whose target no numbered object fits with the
    source's IoU (boxes: proposals.json in the folder, else the scans' own), and more than the source takes.
    """
    # the rooms that may be trained in, and the proposals a model will be shown
    rooms = evaluation_rooms({source.benchmark for source in sources.values()}, folder, root, held)
    there = {scene.name: number_objects(scene, seed) for scene in train}
    file = min(folder.rglob("proposals.json"), default=None)
    shown = read_boxes(file) if file else there

    listed, report = defaultdict(list), []
    for name, source in sources.items():
        # truth: the boxes that the numbers of its objects mean
        benchmark, samples, dropped, truth = find_benchmark(source.benchmark), [], Counter(), there
        if benchmark.boxes:
            file = min(folder.rglob(benchmark.boxes), default=None)
            truth = read_boxes(file) if file else {}
        rows = [s for split in source.splits for s in read_official(source.benchmark, folder, root, split)]
        task = source.benchmark.replace("/", "_")
        if not rows and task in data.TASKS:
            rows = data.question_set(there.values(), [task], source.printed // 1201, seed)
        for s in rows:
            # why a question is dropped, if it is
            forms = {
                "text": s.task == "caption" or s.targets is None,
                "id": s.targets is not None,
                "number": s.value is not None,
                "choice": s.options,
            }
            why = ""
            if not forms[source.asks] or source.kind not in s.kind:
                why = "of another form"
            elif s.scene.split("_")[0] in rooms:
                why = "of rooms for evaluation"
            elif s.scene not in there.keys() & shown.keys() & truth.keys():
                why = "without a scan"
            else:
                fits = [proposal_fit(truth[s.scene], shown[s.scene], i) for i in s.targets or ()]
                if min(fits, default=1.0) < max(source.fit, 1e-9):
                    why = "without an object that fits"
            dropped[why] += 1
            if why:
                continue

            # every accepted answer is a question of its own
            question = benchmark.write_prompt(s)
            if benchmark.boxes:
                s = replace(as_shown(s, truth[s.scene], there[s.scene]), answers=[])
            for text in dict.fromkeys(s.answers or [s.answer]):
                samples.append(
                    replace(s, id=f"{name}/{s.id}/{text}", question=question, answer=text, answers=[])
                )

        # of more than the source takes, a random draw
        order = np.random.default_rng([seed, len(report)]).permutation(len(samples))[: source.most]
        for i in order:
            listed[samples[i].scene].append(samples[i])
        reasons = ", ".join(f"{n:,} {why}" for why, n in dropped.items() if why)
        report.append(
            f"{name}: {len(order):,} questions kept of {dropped.total():,} ({source.printed:,} in the "
            f"paper); dropped were {reasons or 'none'}"
        )
    return listed, report


# ---- 10 ask, command line ------------------------------------------------------------------------

COMPARED = ("rooms/grounding", "rooms/qa")  # what a model without something is asked as well (`baselines`)
IN_METERS = re.compile(  # words of a question whose answer is a measure: of a scene of unknown scale it is refused
    r"\b(how (far|tall|high|long|wide|deep|thick|large|big)|(centi|milli)?met(re|er)s?|[cm]m|square|distance|measure|"
    r"coordinates?|position|height|length|width|depth|area|size|feet|inch(es)?)\b|^where is <obj\d+>\?|\d\.\d"
)


def load_run(folder):
    """Load a run's model, as its last stage sees, and the record of how it was made."""
    # the paper's own questions and benchmarks come with it
    record = data.read_state(folder)["run"]
    data.choose(PAPER_DIALECT, record["model"], f"{folder}: paper")
    paper = importlib.import_module(record["model"])
    data.adopt(paper)
    adopt(paper)

    # the model as it was built, with the weights it ended with
    config = data.from_json(paper.Config, record["config"])
    model = paper.build(config, data.load_text(record["text"]))
    stages = [data.stage_of(stage) for stage in record["stages"]]
    model.keep_trained_precise(stages)  # as in training, or their weights would be rounded
    data.load_weights(model, folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.configure_stage(stages[-1])
    return model.eval(), record


def in_training_arithmetic(model, record):
    """Compute as the run's training did."""
    dtype = getattr(torch, record["dtype"])
    return torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32)


def evaluate_questions(model, asked, out, record):
    """Ask, score, write OUT/metrics.json and OUT/predictions, and print the table.

    The model is asked as its stage sees, in the arithmetic it was trained in. Every rank calls it;
    rank 0 gets the entries, others {}.
    """
    # frozen work of all scenes first, shared by the processes
    rank, world = rank_and_world()
    model.eval()
    shown = {scene.name: scene for questions in asked for scene in questions.shown.values()}
    folder = model.feature_folder.parent if model.feature_folder else out / "cache"
    model.cache_features(list(shown.values()), folder, rank, world)
    if world > 1:
        dist.barrier()  # a rank reads what the others have cached

    # the answers, also without what the paper's baselines take away
    others = defaultdict(dict)
    with in_training_arithmetic(model, record):
        answers = {questions.name: predict(model, questions) for questions in asked}
        for column, without in model.baselines().items():
            with without:
                for questions in asked:
                    if questions.name.split("@")[0] in COMPARED:
                        others[questions.name][column] = predict(model, questions)
    if rank:
        return {}

    # one process scores and writes
    entries = {q.name: score(q, answers[q.name], others[q.name]) for q in asked}
    print(table(entries))
    save(
        out / "metrics.json",
        entries,
        paper=record["model"],
        seed=record["seed"],
        stage=model.stage.name,
        dtype=record["dtype"],
        device=model.device.type,
    )
    return entries


def evaluate_scenes(model, scenes, out, *, record, names=(), proposals="gt", blind_scenes=(), dialects=()):
    """Ask a model, as its stage sees, generated questions about scenes it never saw.

    names: benchmarks, by default all of which that stage trained a task. blind_scenes: whose answers
    the blind baseline knows. A task gets 60 questions in all, and three per scene at least. Returns
    as `evaluate_questions`.
    """
    # the scenes with their proposals
    seed, true = record["seed"], {scene.name: scene for scene in scenes}
    every = with_proposals(Questions("", Benchmark(), [], true, true), proposals, model, seed)

    asked = []
    for name in names or BENCHMARKS:
        # of a benchmark only what was trained, unless it is named
        benchmark = choose_dialects(find_benchmark(name), dialects, record["model"])
        tasks = [task for task in benchmark.tasks if names or task in model.stage.tasks]

        # the questions, and what is blindly known of others like them
        samples = data.question_set(every.scenes.values(), tasks, max(3, 60 // len(true)), seed)
        blind = data.Blind(data.question_set(blind_scenes, tasks, 3, seed + 1))
        if samples:
            asked.append(Questions(name + every.name, benchmark, samples, every.scenes, every.shown, blind))
    if not asked:
        print(f"note: these scenes give no question of {', '.join(names or BENCHMARKS)}")
        return {}
    return evaluate_questions(model, asked, out, record)


def evaluate_run(args):
    """Score a finished run: in its test scenes, in rooms of N objects, or on official files."""
    # questions of official files, in their scans
    model, record = load_run(args.run)
    out, asked, options = args.out or args.run, [], record["scene_options"]
    for name in args.benchmark if args.annotations else ():
        root = Path(args.root or record["root"] or "scans")
        # frames as the model has seen them
        questions = load(name, args.annotations, root, args.partial, args.dialect, record["model"], **options)
        asked.append(with_proposals(questions, args.proposals, model, record["seed"]))
    if asked:
        evaluate_questions(model, asked, out, record)
        return write_report(out)

    # scenes that the run did not train in, and some it did, whose answers the blind baseline knows
    load_scenes = partial(data.load_scenes, record["data"], root=record["root"], **options)
    count, place = record["scene_counts"], out
    blind = load_scenes("train", count=min(300, count["train"]), frames=False)
    if args.objects:
        place = out / f"objects-{'-'.join(map(str, args.objects))}"
        load_scenes = partial(load_scenes, objects=args.objects)
    scenes = load_scenes("test", count=count["test"])
    evaluate_scenes(
        model,
        scenes,
        place,
        record=record,
        names=args.benchmark,
        proposals=args.proposals,
        blind_scenes=blind,
        dialects=args.dialect,
    )
    write_report(out)


def score_file(args):
    """Score a file of answers; no model is asked.

    Identifiers are ScanNet's objectIds, or count a file's boxes.
    """
    # the questions with their boxes
    questions = load(args.benchmark[0], args.annotations, args.root, args.partial, args.dialect)
    if args.root is None and any(s.targets for s in questions.samples):
        raise DataError(f"{questions.name}: needs boxes; give the scans, or a file of boxes, with --root")
    questions = with_proposals(questions, args.proposals)

    # anybody's answers to them
    entries = {
        questions.name: score(questions, read_predictions(args.predictions, questions, args.partial), {})
    }
    print(table(entries))
    if args.out:
        save(args.out, entries, predictions=fingerprint(args.predictions))


def ask_scene(args):
    """Answer questions about a scene of one's own, and draw it."""
    # the scene, as sharp as the model looks at it
    model, record = load_run(args.run)
    if args.at is not None and type(model).prompt_tokens is Model.prompt_tokens:
        raise DataError(f"--at: {record['model']} takes no places; fase3d does")
    options = data.scene_options(args)
    if model.frame_width > 320 and "longest" in data.choose_reader(args.scene)[1]:
        options.setdefault("longest", max(640, model.frame_width))
    scene = number_objects(data.open_scene(args.scene, **options), 0)
    print("\n".join(f"note: {note}" for note in scene.notes))

    # questions of the command line, else typed ones until an empty line
    if not args.ask:
        print("questions, one a line; an empty line ends")
    samples, lines, texts = [], [], []
    for question in map(str.strip, args.ask or itertools.takewhile(str.strip, sys.stdin)):
        if unknown := {int(i) for i in data.MARK.findall(question)} - scene.identifiers.keys():
            raise DataError(
                f"<obj {min(unknown)}>: {scene.name} has no such object; its picture shows those it has"
            )
        for word in model.text.unknown(question):
            print(f"note: the model has never read the word {word!r}")
        samples.append(Sample(str(len(samples)), scene.name, "ask", question, "", prompt=args.at))
        with in_training_arithmetic(model, record):
            (text,) = model.generate(model.batch([(scene, samples[-1:])]), max_new_tokens=96)

        # what cannot be known is refused, whatever the model wrote
        refused = model.refusal(scene, question)
        if not scene.metric and (IN_METERS.search(question.lower()) or re.search(r"\d\.\d", text)):
            refused = "this scene has no known scale: give poses, depth or --scale."
        lines.append(f"{question}  {refused or text.rpartition('=')[2].strip()}")
        texts.append("" if refused else text)
        print(lines[-1])
    if not samples:
        raise DataError("--ask: give a question, or type one a line")

    # a picture of what was read, and of the places in the answers
    picture = args.out or args.run / "ask.png"
    data.draw_scene(scene, picture, lines, model.token_centers(scene), texts)
    for path in (picture, *model.answer_pictures(scene, samples, texts, picture.parent)):
        print(f"picture: {path}")


def place(text):
    """Read a place [3] from "X,Y,Z"."""
    return np.array(text.split(","), float).reshape(3)


@data.command
def main(arguments=None):
    parser = argparse.ArgumentParser(
        description="Scores of a finished run, or of a file of answers; or ask a scene."
    )
    # flags that name a place, then the others
    add = parser.add_argument
    places = {
        "run": "folder of a finished run",
        "annotations": "official questions: a file, or a folder that holds it",
        "predictions": "answers: .jsonl, .json or .csv with an id and a text; ids are ScanRefer's "
        "scene|object|ann, Multi3DRefer's scene|ann, captions' scene|object",
        "root": "the scans, or a file of true boxes {scene: {objectId: box}}",
        "out": "folder of the scores; metrics.json of a file; picture of a scene",
        "scene": "with --run: a scene of one's own to ask about",
    }
    for name, words in places.items():
        add(f"--{name}", type=Path, help=words)
    add("--benchmark", nargs="+", default=[], metavar="NAME", help=", ".join(BENCHMARKS))
    add(
        "--proposals",
        default="gt",
        help="what stands for objects: gt, segments, of fase3d clusters, a file of boxes {scene: "
        "[[cx, cy, cz, w, d, h], ..]}, or a folder of masks in ScanNet's format (Mask3D)",
    )
    add("--dialect", nargs="+", default=[], choices=[*DIALECTS, "all"], help="whose way to score text")
    add("--partial", action="store_true", help="accept fewer questions or answers than there should be")
    add("--ask", action="append", help="a question; repeatable (default: typed, one a line)")
    add(
        "--at",
        type=place,
        metavar="X,Y,Z",
        help='in meters: the place that "this" in a question means (fase3d)',
    )
    data.add_scene_options(parser)
    args = parser.parse_args(arguments)

    # several processes share the questions; then one of three things is done
    if args.run and "RANK" in os.environ:  # torchrun
        dist.init_process_group()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if args.run and args.scene:
        ask_scene(args)
    elif args.run and not args.predictions:
        evaluate_run(args)
    elif args.annotations and args.predictions and len(args.benchmark) == 1:
        score_file(args)
    else:
        parser.error(
            "give --run DIR (python train.py --model proxy3d makes runs/proxy3d), or one --benchmark NAME "
            "with --annotations FILE and --predictions FILE"
        )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
