"""The numbers that a change of ideas must not move: python tests/golden.py [--write]

Short runs of the three papers (every stage of the tiny preset, 20 steps), ten of their answers each, their scores, a
room's digest, and one ScanQA and one VSI-Bench file scored. The vocabulary is pinned, since its size decides what the
first weights are drawn to be. tests/test_golden.py compares with golden.json; --write makes that file anew.
"""

import hashlib
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import papers

import data
import evaluate
import fase3d
import spatial3dllm
import train

GOLDEN = Path(__file__).with_name("golden.json")
NAMES = {  # of scores: today's -> those in golden.json
    "em_refined/llava-3d": "em/refined", "em/llava-3d": "em/cleaned", "em/scanqa": "em/strict", "/scanqa": "/ptb",
    "/ll3da": "/raw", "object_rel_direction/easy": "rel_direction_easy", "/object_": "/", "lmms-eval": "lenient",
}  # fmt: skip


def room_digest():
    """A digest of all that is made for one room."""
    scene, digest = data.room(7), hashlib.sha256()
    arrays = [scene.points, scene.colors, scene.normals, scene.superpoints, scene.instances]
    arrays += [scene.frames.color, scene.frames.depth, scene.frames.masks, scene.frames.poses]
    for array in [*arrays, *(o.box for o in scene.objects)]:
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(" ".join(f"{o.category} {o.color}" for o in scene.objects).encode())
    return digest.hexdigest()[:16]


def short_run(model, out):
    """20 steps of every stage of a paper's tiny preset in 12 rooms: losses, ten answers, scores."""
    stages = importlib.import_module(model).STAGES["tiny"]
    flags = [
        "--train-scenes=12",
        "--test-scenes=3",
        "--workers=0",
        f"--out={out}",
        f"--steps={20 * len(stages)}",
    ]
    changes = []
    for stage in stages:
        changes += [f"{stage.name}.iterations=20", f"{stage.name}.batch={16 if stage.tasks else 2}"]
    assert train.main([f"--model={model}", *flags, "--set", *changes]) == 0
    losses = {}
    for line in papers.rows(out / "log.jsonl"):
        losses.setdefault(line["stage"], []).append(round(line["loss"], 6))
    answers = {}
    for path in sorted((out / "predictions").rglob("*.jsonl")):
        if not path.name.endswith(".questions.jsonl"):
            for row in papers.rows(path)[:2]:
                answers[str(row["id"])] = row["prediction"]
    return {"losses": losses, "answers": dict(list(answers.items())[:10])}


def scanqa(number, question, *answers):
    return {"question_id": f"q{number}", "scene_id": "scene0011_00", "question": question, "answers": answers}


def vsi(number, kind, truth, options=None):
    asked = {"id": number, "scene_name": "a", "question": "?", "question_type": kind}
    return asked | {"ground_truth": truth, "options": options}


ASKED = {  # benchmark -> rows of its file, and answers
    "scanqa": (
        [
            scanqa(0, "What color is the chair?", "brown", "dark brown"),
            scanqa(1, "Where is the trash can?", "to the left of the door", "by the door"),
            scanqa(2, "How many monitors are there?", "2"),
        ],
        {"q0": "brown", "q1": "next to the door", "q2": "two"},
    ),
    "vsibench": (
        [
            vsi(1, "object_counting", "4"),
            vsi(2, "object_rel_direction_easy", "A", ["A. left", "B. right"]),
            vsi(3, "object_abs_distance", "2.0"),
        ],
        {1: "5", 2: "A. left", 3: "about 2.3 m"},
    ),
}


def official_scores(folder):
    """Scores of a ScanQA and a VSI-Bench file written here."""
    found = {}
    for name, (rows, said) in ASKED.items():
        questions, answers, out = (folder / f"{name}{part}.json" for part in ("", "_answers", "_metrics"))
        questions.write_text(json.dumps(rows))
        answers.write_text(json.dumps(said))
        flags = [f"--annotations={questions}", f"--predictions={answers}", f"--out={out}"]
        evaluate.main([f"--benchmark={name}", *flags, "--partial", "--dialect=all"])
        found[name] = {}
        for key, value in json.loads(out.read_text())[name].items():
            for new, old in NAMES.items():
                key = key.replace(new, old)
            if isinstance(value, float):
                found[name][key] = value
    return found


def measure(words):
    """All golden numbers of the code beside this folder, with a pinned vocabulary."""
    data.vocabulary = lambda *_: words
    with tempfile.TemporaryDirectory() as scratch:
        runs = {model: short_run(model, Path(scratch) / model) for model in papers.PAPERS}
        scores = official_scores(Path(scratch))
    return {"room": room_digest(), "words": words, "runs": runs, "official": scores}


def leaves(found, path=""):
    """Every number and text in dictionaries and lists, by the names on the way to it."""
    held = {}
    for key, value in found.items() if isinstance(found, dict) else enumerate(found):
        own = f"{path} {key}"
        held |= leaves(value, own) if isinstance(value, dict | list) else {own: value}
    return held


if __name__ == "__main__":
    if "--write" in sys.argv:
        for paper in (fase3d, spatial3dllm):
            data.adopt(paper)
        GOLDEN.write_text(json.dumps(measure(list(data.vocabulary())), indent=1) + "\n")
    else:
        then = json.loads(GOLDEN.read_text())
        now = leaves(measure(then["words"]))
        for path, value in leaves(then).items():
            if now.get(path) != value:
                print(f"{path}: {value!r} then, {now.get(path)!r} now")
    os._exit(0)
