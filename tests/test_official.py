"""Official files: read right, asked the same as in memory, scored as their authors do, and never fooled.

pytest tests/test_official.py
"""

import csv
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import official
import pytest
from test_evaluate import RECORD, STAGE, Echo, needs_java

import data
import evaluate
from data import DataError, Scene, Source, Thing
from evaluate import BENCHMARKS, Questions

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "data").exists(), reason=f"no official files at {SHARED}")
SIZE = {"views": 3, "size": 96, "points": 2000, "objects": 9}
SIX = list(official.TASKS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three training and two validation scans, and official files of both about them; val has six
    benchmarks."""
    root = tmp_path_factory.mktemp("scannet")
    scenes = {
        split: official.scans(root, seeds, **SIZE)
        for split, seeds in (("train", (1, 2, 3)), ("val", (900_011, 900_012)))
    }
    for split, found in scenes.items():
        (root / f"scannetv2_{split}.txt").write_text("\n".join(s.name for s in found))
    files, samples = root / "files", {}
    for name in SIX:
        samples[name] = official.questions(scenes["val"], name)
        official.write(files / name, name, BENCHMARKS[name].split, samples[name], scenes["val"])
        if name != "vsibench":
            asked = official.questions(scenes["train"], name)
            official.write(files / name, name, "train", asked, scenes["train"])
    return SimpleNamespace(root=root, files=files, scenes=scenes, samples=samples)


def asked(name: str, rows: list[dict], boxes: dict[int, list] | None = None, dialects=()) -> Questions:
    """Questions of rows about one scene with these boxes, by objectId."""
    benchmark = evaluate.choose_dialects(BENCHMARKS[name], dialects)
    things = [Thing(i + 1, "", "", np.array(box, float)) for i, box in (boxes or {}).items()]
    scene = evaluate.number_objects(Scene("s", "boxes", things))
    samples = benchmark.finish([benchmark.read(**row) for row in rows], [])
    return Questions(name, benchmark, samples, {"s": scene}, {"s": scene})


# ---- the numbers of the benchmarks' and peers' own scripts -----------------------------------------------------------

ANSWERS = [  # an answer, its references
    ("brown", ["brown", "dark brown"]),
    ("Brown.", ["brown"]),
    ("2", ["two"]),
    ("two chairs", ["2"]),
    ("a chair", ["brown chair", "chair"]),
    ("on the letf of the desk", ["left of desk", "to the left of a desk"]),
    ("", ["white"]),
    ("Next to the door, by the wall.", ["next to the door"]),
    ("book shelf", ["bookshelf"]),
    ("...", ["table"]),
    ("TV", ["tv"]),
    ("trash can\nby the bed", ["trash can by the bed", "next to bed"]),
    ("rectangular brown table", ["table"]),
    ("", ["in front of the window", "window"]),
]
SITUATED = [
    ("Yes.", ["yes"]),
    ("to my left", ["left"]),
    ("3", ["three"]),
    ("", ["no"]),
    ("backwards", ["backward"]),
    ("The black one", ["black"]),
    ("two", ["three"]),
    ("chair", ["chair"]),
    ("", ["desk"]),
]
SCORES = ("em", "em_refined", "cider", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "meteor")
PEERS = {  # what the scripts print for ANSWERS and for SITUATED; None: not theirs to score
    "scanqa": (
        [0.071429, None, 1.542582, 0.548387, 0.438104, 0.419496, 0.396064, 0.472163, 0.305059],
        [0.111111, None, 0.858972, 0.363636, 0.0, 0.0, 0.0, 0.344344, 0.229281],
    ),
    "chat-scene": (
        [0.285714, 0.5, 1.569054, 0.64, 0.478091, 0.385171, 6.1e-05, 0.570077, 0.317318],
        [0.444444, 0.666667, 1.456529, 0.6, 0.0, 0.0, 0.0, 0.584317, 0.375468],
    ),
    "llava-3d": (
        [0.357143, 1.0, 2.129824, 0.68, 0.583095, 0.553966, 0.454043, 0.637433, 0.380511],
        [0.444444, 0.888889, 1.456529, 0.6, 0.0, 0.0, 0.0, 0.584317, 0.375468],
    ),
    "leo": (
        [0.285714, 1.0, 1.897638, 0.64, 0.523723, 0.468538, 0.400446, 0.587096, 0.379502],
        [0.444444, 0.888889, 1.456529, 0.6, 0.0, 0.0, 0.0, 0.584317, 0.375468],
    ),
    "video-3d-llm": (
        [0.071429, None, 0.853412, 0.419355, 0.323788, 0.289223, 0.270783, 0.277243, 0.304322],
        [0.111111, None, 0.581194, 0.272727, 0.0, 0.0, 0.0, 0.233233, 0.229281],
    ),
    "ll3da": (
        [None, None, 0.853412, 0.40625, 0.318689, 0.286179, 0.268642, 0.277243, 0.290565],
        [None, None, 0.581194, 0.272727, 0.0, 0.0, 0.0, 0.233233, 0.206862],
    ),
}


@needs_java
@pytest.mark.parametrize(("name", "k"), [("scanqa", 0), ("sqa3d", 1)])
def test_words_are_scored_as_six_groups_of_papers_do(name, k):
    """Also where answers are empty, hold two lines or a capital and a full stop; each script's
    numbers to 1e-6."""
    pairs = (ANSWERS, SITUATED)[k]
    rows = [
        {
            "question_id": i,
            "scene_id": "s",
            "question": "What?",
            "situation": "I sit.",
            "answers": known if name == "scanqa" else [{"answer": a} for a in known],
        }
        for i, (_, known) in enumerate(pairs)
    ]
    values, _ = evaluate.measure(
        asked(name, rows, dialects=["all"]), {str(i): a for i, (a, _) in enumerate(pairs)}
    )
    for dialect, numbers in PEERS.items():
        for metric, number in zip(SCORES, numbers[k], strict=True):
            if number is not None:
                assert values[f"{metric}/{dialect}"] == pytest.approx(number, abs=1e-6), (metric, dialect)


CAPTIONS = [  # a caption, its box's IoU, the references
    ("A red chair near the table.", 0.8, ["This is a red chair. It is near the table.", "the chair is red."]),
    ("the lamp is tall", 0.5, ["a tall lamp"]),
    ("", 0.9, ["a white bed, next to the wall"]),
    ("a wooden door. it is closed", 0.3, ["a wooden door", "this door is closed"]),
    ("a small box", 0.1, ["a box under the desk"]),
    ("The desk is brown, with a lamp.", 0.25, ["a brown desk with a lamp"]),
]
DENSE = {  # CIDEr, BLEU-4, ROUGE-L and METEOR at 0.5, then at 0.25
    "chat-scene": [0.803679, 0.141756, 0.491376, 0.245735, 2.144954, 0.321094, 0.595493, 0.329762],
    "ll3da": [0.183616, 0.0, 0.44054, 0.189427, 0.877539, 2.2e-05, 0.46317, 0.240395],
    "video-3d-llm": [0.841063, 0.175852, 0.496156, 0.246559, 1.767252, 0.299343, 0.56532, 0.322554],
    "leo": [0.779635, 0.154461, 0.466628, 0.246559, 1.643985, 0.280688, 0.556962, 0.322554],
}


@needs_java
def test_dense_captions_are_scored_as_four_groups_of_papers_do(monkeypatch):
    """A caption whose box does not fit, or that is empty, is "sos eos"; `>` and `>=` differ at IoU
    0.5 and 0.25."""
    rows = [
        {
            "scene_id": "s",
            "object_id": i,
            "description": text,
            "token": re.findall(r"[a-z]+|[.,]", text.lower()),
        }
        for i, (_, _, known) in enumerate(CAPTIONS)
        for text in known
    ]
    questions = asked("scan2cap", rows, dialects=["all"])
    merged = {}
    for s in questions.samples:
        merged.setdefault(s.id, replace(s, answers=[], tokens=[])).answers.extend(s.answers)
        merged[s.id].tokens.extend(s.tokens)
    questions.samples = list(merged.values())
    monkeypatch.setattr(evaluate, "proposal_fit", lambda scene, shown, i: CAPTIONS[i - 1][1])
    values, _ = evaluate.measure(questions, {f"s|{i}": text for i, (text, _, _) in enumerate(CAPTIONS)})
    keys = [f"{metric}@{k}" for k in (0.5, 0.25) for metric in ("cider", "bleu4", "rouge_l", "meteor")]
    for dialect, numbers in DENSE.items():
        assert [values[f"{key}/{dialect}"] for key in keys] == pytest.approx(numbers, abs=1e-6), dialect


SPATIAL = [  # type, truth, options, answer
    ("object_counting", "4", None, "5"),
    ("object_counting", "2", None, "two chairs"),
    ("object_counting", "3", None, ""),
    ("object_abs_distance", "2.0", None, "about 2.3 m"),
    ("object_abs_distance", "1.5", None, "1.5."),
    ("object_size_estimation", "120", None, "one hundred and ten"),
    ("object_size_estimation", "60", None, "1,200"),
    ("room_size_estimation", "25.5", None, "24 square meters"),
    ("room_size_estimation", "12.0", None, "-12"),
    ("object_rel_distance", "B", "AB", "b"),
    ("object_rel_distance", "A", "AB", "(A)"),
    ("object_rel_direction_easy", "A", "AB", "A. left"),
    ("object_rel_direction_medium", "B", "AB", "A"),
    ("object_rel_direction_hard", "A", "AB", "A"),
    ("route_planning", "A", "AB", "A."),
    ("obj_appearance_order", "B", "AB", "The answer is B"),
]


@pytest.mark.parametrize(
    ("protocol", "overall", "parts"),
    [
        (
            "official",
            0.414583,
            {"object_counting": 0.2, "object_abs_distance": 0.5, "object_size_estimation": 0},
        ),
        (
            "lmms-eval",
            0.5625,
            {"object_counting": 0.533333, "object_abs_distance": 0.9, "object_size_estimation": 0.45},
        ),
    ],
)
def test_vsi_bench_is_scored_as_its_script_and_as_lmms_eval_do(protocol, overall, parts):
    rows = [
        {
            "id": i,
            "scene_name": "s",
            "question_type": kind,
            "question": "?",
            "ground_truth": truth,
            "options": options and [f"{letter}. x" for letter in options],
        }
        for i, (kind, truth, options, _) in enumerate(SPATIAL)
    ]
    values, _ = evaluate.measure(asked("vsibench", rows), {str(i): row[3] for i, row in enumerate(SPATIAL)})
    parts |= {"room_size_estimation": 0.45, "object_rel_distance": 0.5, "object_rel_direction": 2 / 3}
    parts |= {"object_rel_direction/medium": 0, "route_planning": 1, "obj_appearance_order": 0}
    assert values[f"score/{protocol}"] == pytest.approx(overall, abs=1e-6)
    assert {part: values[f"score/{protocol}/{part}"] for part in parts} == pytest.approx(parts, abs=1e-6)


BOXES = dict(
    enumerate(
        [
            [0, 0, 0, 1, 1, 1],
            [1 / 3, 0, 0, 1, 1, 1],
            [3, 0, 0, 2, 1, 1],
            [3.8, 0, 0, 2, 1, 1],
            [9, 9, 0, 1, 2, 1],
        ]
    )
)


def test_multi3drefer_is_scored_as_m3dref_and_chat_scene_do():
    """Silence is right where nothing is to be found; an identifier of no object is no answer."""
    cases = [
        ("zt_wo_d", [], "No."),
        ("zt_w_d", [], "Yes. <OBJ001>"),
        ("zt_w_d", [], "<OBJ077>"),
        ("zt_wo_d", [], ""),
        ("st_w_d", [0], "<OBJ001>"),
        ("st_wo_d", [2], "Yes. <OBJ003>"),
        ("st_wo_d", [4], "<OBJ099> <OBJ004>"),
        ("mt", [0, 2], "Yes. <OBJ001> <OBJ002> <OBJ004>"),
        ("mt", [2, 3], "<OBJ002> <OBJ002>"),
        ("mt", [0, 1, 4], ""),
    ]
    rows = [
        {"scene_id": "s", "object_ids": ids, "ann_id": i, "eval_type": kind, "description": "it"}
        for i, (kind, ids, _) in enumerate(cases)
    ]
    answers = {f"s|{i}": text for i, (_, _, text) in enumerate(cases)}
    values, _ = evaluate.measure(asked("multi3drefer", rows, BOXES), answers)
    printed = {
        "": (0.63, 0.78),
        "/zt_wo_d": (1, 1),
        "/zt_w_d": (0.5, 0.5),
        "/st_w_d": (1, 1),
        "/st_wo_d": (0.5, 1),
        "/mt": (0.433333, 0.6),
    }
    for part, numbers in printed.items():
        found = [values[f"f1@{k}/multi3drefer{part}"] for k in (0.5, 0.25)]
        assert found == pytest.approx(numbers, abs=1e-6), part


def test_scanrefer_is_scored_as_chat_scene_does():
    """The first identifier that exists counts; unique and multiple at both thresholds."""
    cases = [
        (0, "<OBJ001>"),
        (1, "OBJ000 <OBJ001>."),
        (2, "<OBJ003> <OBJ002>"),
        (3, "<OBJ003>"),
        (4, "<OBJ088> it is <OBJ004>"),
        (4, "<OBJ002>"),
        (0, "<OBJ000>"),
    ]
    rows = [
        {
            "scene_id": "s",
            "object_id": str(k),
            "object_name": "x",
            "ann_id": str(i),
            "description": "it",
            "eval_type": "unique" if k == 4 else "multiple",
        }
        for i, (k, _) in enumerate(cases)
    ]
    answers = {f"s|{k}|{i}": text for i, (k, text) in enumerate(cases)}
    values, _ = evaluate.measure(asked("scanrefer", rows, BOXES), answers)
    for part, numbers in {"": (0.571429, 0.857143), "/unique": (0.5, 0.5), "/multiple": (0.6, 1)}.items():
        found = [values[f"acc@{k}/scanrefer{part}"] for k in (0.5, 0.25)]
        assert found == pytest.approx(numbers, abs=1e-6), part


# ---- reading ---------------------------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize(
    ("name", "folder", "scenes", "kinds"),
    [
        ("scanqa", "scanqa", 71, {"object": 1478, "color": 838, "other": 814, "number": 224}),
        (
            "sqa3d",
            "sqa3d",
            67,
            {"what": 1147, "is": 652, "how": 465, "can": 338, "which": 351, "others": 566},
        ),
        ("openeqa", "open_eqa", 152, {"object localization": 263, "object recognition": 231}),
    ],
)
def test_official_questions_are_all_read_with_their_types(name, folder, scenes, kinds):
    """The types are those of the benchmarks' own scripts; `load` checks the number of questions."""
    questions = evaluate.load(name, SHARED / "data" / folder)
    count = Counter(s.kind for s in questions.samples)
    assert {kind: count[kind] for kind in kinds} == kinds and len(questions.scenes) == scenes
    best = evaluate.summarize(
        questions.benchmark,
        questions.samples,
        [questions.benchmark.score(s.answers[0], s, None) for s in questions.samples],
    )
    assert {value for key, value in best.items() if key.startswith("em")} == {1.0}


@pytest.mark.parametrize("name", SIX)
def test_rooms_in_a_benchmark_s_files_come_back_as_they_were(world, name):
    """Ids, questions, answers, targets, values and options; every question id once."""
    found = evaluate.read_official(name, world.files / name)
    known = {s.id: s for s in world.samples[name]}
    assert [s.id for s in found] == list(known)
    for s in found:
        true = known[s.id]
        assert (s.scene, s.question, s.options) == (true.scene, true.question, true.options)
        assert s.targets == true.targets and (s.value == true.value or name != "vsibench" or s.options)
        if name in ("scanqa", "sqa3d", "scan2cap"):
            assert s.answers == (true.answers or [true.answer])


def test_unique_means_alone_of_its_class_among_annotated_objects(tmp_path):
    """Not among all instances; what is none of 17 classes shares the class "others"."""
    names = {
        "armchair": "chair",
        "office chair": "chair",
        "bed": "bed",
        "piano": "otherfurniture",
        "clock": "otherprop",
    }
    table = ["raw_category\tnyu40class", *(f"{raw}\t{nyu}" for raw, nyu in names.items())]
    (tmp_path / evaluate.LABELS).write_text("\n".join(table))
    objects = ["armchair", "office_chair", "bed", "piano", "clock", "nameless"]
    rows = [
        {"scene_id": "s", "object_id": str(i), "object_name": name, "ann_id": str(k), "description": "it"}
        for i, name in enumerate(objects)
        for k in range(2)
    ]
    (tmp_path / "ScanRefer_filtered_val.json").write_text(json.dumps(rows))
    samples = evaluate.read_official("scanrefer", tmp_path)
    kinds = {s.id.split("|")[1]: s.kind for s in samples}
    assert [k for k, kind in kinds.items() if kind == "unique"] == ["2"] and len(samples) == 12


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        (
            "sr91k",
            dict(
                problem_type="numerical",
                problem="how many?",
                solution="<answer>3</answer>",
                path="x/scene0000_00.mp4",
                data_source="SR_dataset",
            ),
            dict(value=3.0, scene="scene0000_00", answers=["3"]),
        ),
        ("sr91k", dict(problem_type="OCR", problem="?", solution="hi", path="x.mp4"), None),
        (
            "sr91k",
            dict(problem_type="numerical", problem="?", solution="3", path="x.mp4", data_source="CLEVRER"),
            None,
        ),
        (
            "mmscan/qa",
            dict(ID="QA_1", scan_id="scannet/s", question="what?", answers=["a", "b"]),
            dict(id="QA_1", scene="s"),
        ),
        (
            "mmscan/vg",
            dict(ID="VG_1", scan_id="scannet/s", text="it", target_id=[3]),
            dict(targets=[3], id="VG_1"),
        ),
        (
            "3dllm/planning",
            dict(scene_id="s", question="### human: clean up. ### assistant:", answers=["1. go"]),
            dict(question="clean up."),
        ),
        (
            "msqa",
            dict(
                index=7, scan_id="s", situation="I sit.", question="What?", answers=["Two"], type="counting"
            ),
            dict(id="7", question="I sit. What?", kind="counting"),
        ),
        (
            "scanrefer",
            dict(scene_id="scene0217_00", object_id="33", object_name="x", ann_id="0", description="it"),
            dict(targets=[3]),
        ),
    ],
)
def test_a_row_becomes_a_question(name, row, expected):
    """Scene0217_00 lists its 31 objects twice: both listings are the same objects."""
    sample = BENCHMARKS[name].read(**row)
    assert sample is expected or {key: getattr(sample, key) for key in expected} == expected


def change_first(**fields):
    return lambda rows: [{**rows[0], **fields}, *rows[1:]]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("scanqa", change_first(answers="red"), "row 1: .*a list of answers must be text"),
        ("scanqa", change_first(answers=[]), "row 1: .*a list of answers must be text"),
        ("scanqa", change_first(question=" "), "row 1: .*must be text"),
        ("scanqa", lambda rows: [*rows, rows[0]], "the question id .* twice"),
        ("scanqa", lambda rows: [rows[0], {"scene_id": "s"}], "row 2: .*missing 3 required .*question_id"),
        ("scanqa", lambda rows: ["x"], "row 1: .*must be a mapping"),
        ("scanqa", lambda rows: [], "no rows of JSON"),
        ("scanqa", lambda rows: 3, "no rows of JSON"),
        ("vsibench", change_first(options=None, ground_truth="B"), "row 1: could not convert"),
        ("scanrefer", change_first(object_id="one"), "row 1: invalid literal"),
    ],
)
def test_a_broken_official_file_is_refused_in_one_line(world, tmp_path, name, change, message):
    path = world.files / name / BENCHMARKS[name].files[BENCHMARKS[name].split][0]
    rows = (
        [json.loads(line) for line in path.read_text().splitlines()]
        if name == "vsibench"
        else json.loads(path.read_text())
    )
    (tmp_path / path.name).write_text(json.dumps(change(rows)))
    with pytest.raises(DataError, match=message) as error:
        evaluate.read_official(name, tmp_path / path.name)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_the_number_of_questions_is_that_of_the_split(world, capsys):
    """Whatever the file is called; `--partial` accepts less, and nothing accepts no answer at all."""
    path = world.files / "scanqa" / "ScanQA_v1.0_val.json"
    other = path.with_name("mine.json")
    other.write_text(path.read_text())
    said = world.root / "said.json"
    said.write_text(json.dumps({"x": "white"}))
    for file in (path, other):
        with pytest.raises(DataError, match=r"questions, not 4675; complete it, or say --partial"):
            evaluate.load("scanqa", file)
    command = ["--benchmark", "scanqa", "--annotations", str(other), "--predictions", str(said), "--partial"]
    assert evaluate.main(command) == 2
    assert "questions have no answer" in capsys.readouterr().err
    assert evaluate.main([*command[:1], "mmscan/qa", *command[2:]]) == 2


# ---- anybody's predictions -------------------------------------------------------------------------------------------

IDS = ["val-scene0011-0", "val-scene0011-1", "val-scene0011-2"]
TRUTH = dict(zip(IDS, ["white", "brown", "2"], strict=True))
FORMS = {  # name of a file -> its text
    "lines.jsonl": "\n".join(json.dumps({"id": i, "prediction": t}) for i, t in TRUTH.items()),
    "mark.jsonl": "\ufeff"
    + "\r\n".join(json.dumps({"id": f" {i} ", "prediction": t}) for i, t in TRUTH.items()),
    "list.json": json.dumps([{"question_id": i, "text": t} for i, t in TRUTH.items()], indent=1),
    "server.json": json.dumps(
        [{"question_id": i, "answer_top10": [t] * 10, "bbox": [[0]]} for i, t in TRUTH.items()]
    ),
    "object.json": json.dumps(TRUTH),
    "lmms.jsonl": "\n".join(
        json.dumps(
            {"doc_id": 0, "doc": {"question_id": i, "answers": []}, "filtered_resps": [t], "target": "x"}
        )
        for i, t in TRUTH.items()
    ),
    "video.jsonl": "\n".join(
        json.dumps({"sample_id": i, "pred_response": t, "gt_response": ["x"]}) for i, t in TRUTH.items()
    ),
    "tags.jsonl": "\n".join(
        json.dumps({"id": i, "response": f"<think>hm</think><answer> {t}\n</answer>"})
        for i, t in TRUTH.items()
    ),
    "chat.json": json.dumps(
        [{"scene_id": "s", "qid": i, "pred": t, "ref_captions": ["x"]} for i, t in TRUTH.items()]
    ),
    "number.json": json.dumps([{"id": i, "answer": 2 if t == "2" else t} for i, t in TRUTH.items()]),
}


def small(names=("scanqa",)) -> Questions:
    rows = [
        {"question_id": i, "scene_id": "s", "question": "What?", "answers": [t]} for i, t in TRUTH.items()
    ]
    return asked("scanqa", rows)


@pytest.mark.parametrize("name", [*FORMS, "table.csv"])
def test_a_predictions_file_is_read_as_what_it_is(tmp_path, capsys, name):
    path = tmp_path / name
    if name == "table.csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("question_id", "prediction"), *TRUTH.items()])
    else:
        path.write_text(FORMS[name])
    questions = small()
    assert evaluate.read_predictions(path, questions) == TRUTH
    assert "3 rows, id = " in capsys.readouterr().out and (questions.remarks.total() == 3) == (
        name == "tags.jsonl"
    )


@needs_shared
@pytest.mark.parametrize(
    "path", sorted((SHARED / "cases/predictions_of_peers").glob("*.json*")), ids=lambda p: p.name
)
def test_files_of_peers_score(path, no_java):
    if path.name != "annotations.json":
        questions = evaluate.load("scanqa", path.with_name("annotations.json"), partial=True)
        answers = evaluate.read_predictions(path, questions)
        assert len(answers) == 6 and evaluate.measure(questions, answers)[0]["em/scanqa"] == 1


@pytest.mark.parametrize(
    ("text", "correct", "remark"),
    [
        (json.dumps({IDS[0]: "white", IDS[1]: None, IDS[2]: {"a": 1}}), 1, None),
        (FORMS["lines.jsonl"] + "\n" + json.dumps({"id": IDS[0], "prediction": "red"}), 3, "answered before"),
        (FORMS["lines.jsonl"] + '\n{"id": "x", "prediction": "y"}\nrubbish', 3, "answer no question"),
        (json.dumps({**TRUTH, IDS[0]: "x" * 10**6}), 2, None),
        (json.dumps({**TRUTH, IDS[1]: "\x00\ud800"}), 2, None),
    ],
)
def test_what_is_wrong_with_answers_is_counted_beside_the_score(tmp_path, no_java, text, correct, remark):
    (tmp_path / "said.jsonl").write_text(text)
    questions = small()
    entry = evaluate.score(questions, evaluate.read_predictions(tmp_path / "said.jsonl", questions), {})
    assert entry["em/scanqa"] == pytest.approx(correct / 3)
    assert remark is None or [key for key in entry["remarks"] if remark in key]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows of JSON"),
        ("rubbish", "no rows of JSON"),
        ('"white"', "no rows of JSON"),
        ("[" * 10**5, "no rows"),
        (
            json.dumps([{"key": 1, "words": "x"}] * 2),
            'wanted are rows like {"id": ".*", "prediction": "text"}, these have key',
        ),
        (json.dumps({"x": "y"}), "3 of 3 questions have no answer"),
        (json.dumps(["white"]), "3 of 3 questions have no answer"),
        (json.dumps({IDS[0]: "white"}), "2 of 3 questions have no answer"),
    ],
)
def test_a_predictions_file_that_is_not_understood_is_refused_with_what_is_wanted(tmp_path, text, message):
    (tmp_path / "said.json").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        evaluate.read_predictions(tmp_path / "said.json", small())
    assert "\n" not in str(error.value) and "said.json" in str(error.value)


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setattr(evaluate.shutil, "which", lambda name: None)


# ---- asking ----------------------------------------------------------------------------------------------------------


def oracle(sample, place):
    """Answers two of three questions with their truth, the third with nonsense."""
    return evaluate.plain(sample.answer, place) if sum(sample.id.encode()) % 3 else "<OBJ099> x"


@pytest.mark.parametrize("name", ["scanqa", "sqa3d", "scanrefer", "multi3drefer", "scan2cap"])
def test_a_run_and_a_file_of_its_answers_get_the_same_scores(
    world, tmp_path, monkeypatch, capsys, no_java, name
):
    """With identifiers of the model's own in the run and ScanNet's in the file, and with boxes in
    place of scans."""
    model = Echo(oracle)
    model.stage = STAGE
    monkeypatch.setattr(evaluate, "load_run", lambda folder: (model, RECORD))
    files = [
        "--benchmark",
        name,
        "--dialect",
        "ll3da",
        "--annotations",
        str(world.files / name),
        "--partial",
        "--root",
    ]
    run = ["--run", str(tmp_path), *files, str(world.root)]
    assert evaluate.main(run) == 0
    ran = json.loads((tmp_path / "metrics.json").read_text())[name]
    assert (
        ran["blind"] is not None and "crc32" not in ran["questions"] and (tmp_path / "report.html").exists()
    )
    scans = {s.name: evaluate.number_objects(s) for s in world.scenes["val"]}
    answers = {s.id: oracle(s, scans[s.scene]) for s in world.samples[name]}
    (tmp_path / "said.json").write_text(json.dumps(answers))
    boxes = {s.name: {o.id - 1: o.box.tolist() for o in s.objects} for s in scans.values()}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    for root in (world.root, tmp_path / "boxes.json"):
        command = [
            *files,
            str(root),
            "--predictions",
            str(tmp_path / "said.json"),
            "--out",
            str(tmp_path / "m.json"),
        ]
        assert evaluate.main(command) == 0
        entry = json.loads((tmp_path / "m.json").read_text())[name]
        keys = [key for key in ran if "/" in key]
        assert keys and [entry[key] for key in keys] == pytest.approx([ran[key] for key in keys], abs=2e-2)
    if name in ("scanrefer", "multi3drefer", "scan2cap"):
        assert evaluate.main([*files[:-1], "--predictions", str(tmp_path / "said.json")]) == 2
        assert "needs boxes" in capsys.readouterr().err


def test_scans_that_are_missing_are_an_error_or_left_out(world):
    half = [s for s in world.samples["scanqa"] if s.scene == world.scenes["val"][0].name]
    path = official.write(
        world.root / "more", "scanqa", "val", [*half, replace(half[0], id="x", scene="gone")], []
    )
    with pytest.raises(DataError, match="4675"):
        evaluate.load("scanqa", path, world.root)
    assert len(evaluate.load("scanqa", path, world.root, partial=True).samples) == len(half)


class Digits:
    """Splits numbers into digits and words into pieces of four letters, as large vocabularies do at
    worst."""

    @staticmethod
    def tokens(text: str) -> list[str]:
        return re.findall(r"\s?[A-Za-z]{1,4}|\d|[^\sA-Za-z\d]", text)


@pytest.mark.parametrize("name", [n for n, b in BENCHMARKS.items() if b.tasks or n in SIX])
def test_every_true_answer_survives_the_row_s_limit(world, name):
    """Also where a paper writes an object as its box and a tokenizer splits it into digits: cut at
    the limit, the truth must still be whole. (A box in digits takes 40 tokens.)"""
    benchmark = BENCHMARKS[name]
    scenes = [data.room(seed, views=0, points=0) for seed in range(900_000, 900_020)]
    samples = (
        world.samples[name]
        if name in SIX
        else data.question_set(
            [evaluate.number_objects(s, 0) for s in scenes],
            [t for t in benchmark.tasks if t in data.TASKS],
            5,
            0,
        )
    )
    places = {s.name: s for s in [*scenes, *world.scenes["val"]]}
    for s in samples:
        for text in s.answers or [s.answer]:
            boxed = data.substitute(text, lambda i, s=s: data.listed(places[s.scene].thing(i).box))
            assert len(Digits.tokens(boxed)) < benchmark.tokens, boxed


@needs_shared
@pytest.mark.parametrize(
    ("name", "folder"), [("scanqa", "scanqa"), ("sqa3d", "sqa3d"), ("openeqa", "open_eqa")]
)
def test_every_official_answer_survives_its_limit(name, folder):
    samples = evaluate.read_official(name, SHARED / "data" / folder)
    assert max(len(Digits.tokens(a)) for s in samples for a in s.answers) < BENCHMARKS[name].tokens


# ---- training --------------------------------------------------------------------------------------------------------


def test_no_room_of_an_evaluation_split_is_trained_in(world):
    """Another scan of a validation room is that room; every accepted answer is a question of its
    own, with the prompt."""
    train, val = world.scenes["train"], world.scenes["val"]
    again = replace(val[0], name=val[0].name.replace("_00", "_01"))
    leak = [
        replace(s, scene=again.name, id=f"x{i}")
        for i, s in enumerate(world.samples["scanqa"])
        if s.scene == val[0].name
    ]
    folder = world.root / "train files"
    rows = official.questions(train, "scanqa")
    official.write(folder, "scanqa", "train", [*rows, *leak], train)
    official.write(folder, "scanrefer", "train", official.questions(train, "scanrefer"), train)
    (folder / "scannetv2_val.txt").write_text(val[0].name)
    sources = {
        "ScanQA": Source("scanqa", 25_563),
        "ids": Source("scanrefer", 9, "id"),
        "words": Source("scanrefer", 9),
    }
    listed, report = evaluate.mixture(sources, folder, folder, [*train, again], [], seed=1)
    assert again.name not in listed and set(listed) <= {s.name for s in train}
    kept = [s for samples in listed.values() for s in samples]
    own = [s for s in kept if s.id.startswith("ScanQA/")]
    assert len(own) == sum(len(set(s.answers or [s.answer])) for s in rows) and own[0].question.endswith(
        "word or phrase."
    )
    assert (
        f"{len(leak)} of rooms for evaluation" in report[0]
        and "of another form" in report[2]
        and len(report) == 3
    )
    some = {"ids": Source("scanrefer", 9, "id", most=2)}
    assert (
        len([s for samples in evaluate.mixture(some, folder, folder, train, [])[0].values() for s in samples])
        == 2
    )
    assert len(report) == 3


def test_a_target_is_trained_on_only_where_a_proposal_fits_it(world, tmp_path):
    train = world.scenes["train"]
    official.write(tmp_path, "scanrefer", "train", official.questions(train, "scanrefer"), train)
    (tmp_path / "scannetv2_val.txt").write_text("scene9999_00")
    boxes = {s.name: [o.box.tolist() for o in s.objects[:4]] for s in train}
    (tmp_path / "proposals.json").write_text(json.dumps(boxes))
    listed, report = evaluate.mixture(
        {"ids": Source("scanrefer", 9, "id", fit=0.75)}, tmp_path, tmp_path, train, []
    )
    assert (
        all(s.targets[0] <= 4 for samples in listed.values() for s in samples)
        and "without an object that fits" in report[0]
    )


def test_a_folder_that_cannot_be_trained_on_is_refused(world, tmp_path):
    with pytest.raises(DataError, match="nothing says which rooms are for evaluation"):
        evaluate.mixture({"ScanQA": Source("scanqa", 1)}, tmp_path, tmp_path, world.scenes["train"], [])
    with pytest.raises(DataError, match="no question to train on is left; ScanQA: 0 questions kept of 0"):
        evaluate.mixture({"ScanQA": Source("scanqa", 1)}, tmp_path, tmp_path, [], world.scenes["val"])


def test_chat_scene_cleans_the_references_of_sqa3d_but_not_of_scanqa():
    """Its two scripts differ there."""
    sample = data.Sample("0", "s", "qa", "q", "the Table", ["the Table"])
    for name, right in (("sqa3d", 1.0), ("scanqa", 0.0)):
        assert BENCHMARKS[name].score("table.", sample, None)["em/chat-scene"] == right
