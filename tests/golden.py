"""The numbers that a change of ideas must not move: python tests/golden.py [--write]

Short runs of the three papers (every stage of the tiny preset, 20 steps), ten of their answers each, their scores, a
room's digest, and one ScanQA and one VSI-Bench file scored. The vocabulary is pinned, since its size decides what the
first weights are drawn to be. tests/test_golden.py compares with golden.json; --write makes that file anew.
"""

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
GOLDEN = HERE / "golden.json"
NAMES = {  # of scores: today's -> those in golden.json
    "em_refined/llava-3d": "em/refined", "em/llava-3d": "em/cleaned", "em/scanqa": "em/strict", "/scanqa": "/ptb",
    "/ll3da": "/raw", "object_rel_direction/easy": "rel_direction_easy", "/object_": "/", "lmms-eval": "lenient",
}  # fmt: skip
BATCH = {"proxy3d": 16, "fase3d": 16, "spatial3dllm": 16}


def room_digest() -> str:
    """A digest of all that is made for one room."""
    import data

    scene, digest = data.room(7), hashlib.sha256()
    arrays = [scene.points, scene.colors, scene.normals, scene.superpoints, scene.instances]
    arrays += [scene.frames.color, scene.frames.depth, scene.frames.masks, scene.frames.poses]
    for array in [*arrays, *(o.box for o in scene.objects)]:
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(" ".join(f"{o.category} {o.color}" for o in scene.objects).encode())
    return digest.hexdigest()[:16]


def short_run(model: str, out: Path) -> dict:
    """20 steps of every stage of a paper's tiny preset in 12 rooms: losses, ten answers, scores."""
    import importlib

    import train

    stages = importlib.import_module(model).STAGES["tiny"]
    changes = []
    for stage in stages:
        changes += [f"{stage.name}.iterations=20", f"{stage.name}.batch={BATCH[model] if stage.tasks else 2}"]
    flags = ["--train-scenes", "12", "--test-scenes", "3", "--workers", "0", "--out", str(out)]
    flags += ["--steps", str(20 * len(stages)), "--set", *changes]
    assert train.main(["--model", model, *flags]) == 0
    losses: dict[str, list[float]] = {}
    for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()):
        losses.setdefault(line["stage"], []).append(round(line["loss"], 6))
    answers = {}
    for path in sorted((out / "predictions").rglob("*.jsonl")):
        if not path.name.endswith(".questions.jsonl"):
            for row in map(json.loads, path.read_text().splitlines()[:2]):
                answers[str(row["id"])] = row["prediction"]
    return {"losses": losses, "answers": dict(list(answers.items())[:10])}


def official_scores(folder: Path) -> dict:
    """Scores of a ScanQA and a VSI-Bench file written here."""
    import evaluate

    def text(name: str, content: str) -> str:
        (folder / name).write_text(content)
        return str(folder / name)

    rows = [{"question_id": f"q{i}", "scene_id": "scene0011_00", "question": q, "answers": a, "object_ids": [],
             "object_names": []}
            for i, (q, a) in enumerate([("What color is the chair?", ["brown", "dark brown"]),
                                        ("Where is the trash can?", ["to the left of the door", "by the door"]),
                                        ("How many monitors are there?", ["2"])])]  # fmt: skip
    said = [{"id": f"q{i}", "prediction": p} for i, p in enumerate(["brown", "next to the door", "two"])]
    scanqa = text("ScanQA_v1.0_val.json", json.dumps(rows))
    lines = text("scanqa.jsonl", "\n".join(map(json.dumps, said)))
    vsi = [{"id": 1, "scene_name": "a", "question_type": "object_counting", "question": "How many?",
            "ground_truth": "4", "options": None, "dataset": "scannet"},
           {"id": 2, "scene_name": "a", "question_type": "object_rel_direction_easy", "question": "Which side?",
            "ground_truth": "A", "options": ["A. left", "B. right"], "dataset": "scannet"},
           {"id": 3, "scene_name": "a", "question_type": "object_abs_distance", "question": "How far?",
            "ground_truth": "2.0", "options": None, "dataset": "scannet"}]  # fmt: skip
    bench = text("vsi.jsonl", "\n".join(map(json.dumps, vsi)))
    said = [
        {"id": 1, "prediction": "5"},
        {"id": 2, "prediction": "A. left"},
        {"id": 3, "prediction": "about 2.3 m"},
    ]
    answered = text("vsi_answers.jsonl", "\n".join(map(json.dumps, said)))
    found = {}
    for name, questions, answers in (("scanqa", scanqa, lines), ("vsibench", bench, answered)):
        out = str(folder / f"{name}_metrics.json")
        evaluate.main(["--benchmark", name, "--annotations", questions, "--predictions", answers, "--partial",
                       "--dialect", "all", "--out", out])  # fmt: skip
        found[name] = {}
        for key, value in json.loads(Path(out).read_text())[name].items():
            for new, old in NAMES.items():
                key = key.replace(new, old)
            if isinstance(value, float):
                found[name][key] = value
    return found


def measure(
    words: list[str], models: list[str] | tuple[str, ...] = tuple(BATCH), official: bool = True
) -> dict:
    """All golden numbers of the code beside this folder, with a pinned vocabulary."""
    import data

    data.vocabulary = lambda *_: words
    found = {"room": room_digest(), "words": words, "runs": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for model in models:
            found["runs"][model] = short_run(model, Path(scratch) / model)
        if official:
            found["official"] = official_scores(Path(scratch))
    return found


if __name__ == "__main__":
    if "--write" in sys.argv:
        import data
        import fase3d
        import spatial3dllm

        for paper in (fase3d, spatial3dllm):
            data.adopt(paper)
        GOLDEN.write_text(json.dumps(measure(list(data.vocabulary())), indent=1) + "\n")
    else:
        then = json.loads(GOLDEN.read_text())
        models = [a for a in sys.argv[1:] if a in BATCH] or list(BATCH)
        now = measure(then["words"], models, official="official" in sys.argv or len(sys.argv) == 1)
        print("room", now["room"] == then["room"])
        for model in models:
            for stage, losses in then["runs"][model]["losses"].items():
                here = now["runs"][model]["losses"].get(stage, [])
                worst = max((abs(a - b) / abs(a) for a, b in zip(losses, here, strict=False)), default=9)
                print(model, stage, f"largest relative difference of {len(here)}/20 losses: {worst:.2e}")
            for key, text in then["runs"][model]["answers"].items():
                if (here := now["runs"][model]["answers"].get(key)) != text:
                    print(f"{key}: {text!r} then, {here!r} now")
        if "official" in now:
            for name, scores in then["official"].items():
                for key, value in scores.items():
                    if (here := now["official"][name].get(key)) != value:
                        print(f"{name} {key}: {value} then, {here} now")
    os._exit(0)
