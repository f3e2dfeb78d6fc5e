"""Rooms as scans, and their questions in the file formats of the benchmarks: what evaluate.py reads."""

from __future__ import annotations

import json
from dataclasses import replace

import data
from evaluate import BENCHMARKS, number_objects

TASKS = {  # benchmark -> generated questions of the same form
    "scanqa": ("color", "what", "where", "count", "exist"),
    "sqa3d": ("situated",),
    "scanrefer": ("ground",),
    "multi3drefer": ("multi",),
    "scan2cap": ("caption",),
    "vsibench": BENCHMARKS["rooms/vsi"].tasks,
}
TYPES = {  # others: object_<task>
    "object_size": "object_size_estimation",
    "room_size": "room_size_estimation",
}


def scans(root, seeds, **size):
    """Write procedural rooms as scans below root/scans."""
    rooms = [replace(data.room(seed, **size), name=f"scene{seed % 10_000:04d}_00") for seed in seeds]
    for room in rooms:
        data.write_scannet(room, root / "scans")
    return rooms


def questions(scenes, benchmark, per_scene=3):
    """Generate questions, with the ids that the benchmark's reader gives them."""
    numbered = [number_objects(scene, 0) for scene in scenes]
    samples = data.question_set(numbered, TASKS[benchmark], per_scene, 0)
    if benchmark == "scan2cap":  # one question per object
        samples = list({(s.scene, *s.targets): s for s in samples}.values())
    for i, s in enumerate(samples):
        if benchmark == "scanrefer":
            s.id = f"{s.scene}|{s.targets[0] - 1}|{i}"
        elif benchmark == "scan2cap":
            s.id = f"{s.scene}|{s.targets[0] - 1}"
        elif benchmark == "multi3drefer":
            s.id = f"{s.scene}|{i}"
        elif benchmark != "scanqa":
            s.id = str(i)
    return samples


def row(number, **fields):
    """Make a row of a benchmark's file: what every question has, with the fields of this one."""
    same = {"scene_id": "s", "question": "What?", "description": "it", "object_name": "x"}
    return same | {"question_id": number, "ann_id": number} | fields


def rows_of(s, benchmark):
    """Write a question as rows of its benchmark's file: of captions one per description."""
    about = {"scene_id": s.scene, "question": s.question, "description": s.question, "eval_type": s.kind}
    number = s.id.split("|")[-1]
    if benchmark == "scanqa":
        return [row(s.id, **about, answers=s.answers or [s.answer])]
    if benchmark == "multi3drefer":
        return [row(number, **about, object_ids=[i - 1 for i in s.targets])]
    if benchmark == "vsibench":
        task = s.task.removeprefix("vsi_")
        kind = f"_{s.kind}" if "direction" in task else ""
        asked = {
            "id": int(s.id),
            "scene_name": s.scene,
            "question_type": TYPES.get(task, f"object_{task}") + kind,
            "ground_truth": s.answer if s.options else str(s.value),
            "options": s.options,
        }
        return [about | asked]
    about["object_id"] = str(s.targets[0] - 1)
    texts = s.answers or [s.question]
    return [row(number, **about | {"description": text, "token": text.split()}) for text in texts]


def write(folder, benchmark, split, samples):
    """Write the official file of a split."""
    path = folder / BENCHMARKS[benchmark].files[split][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    if benchmark == "sqa3d":
        write_sqa3d(path, samples)
        return path
    rows = [row for s in samples for row in rows_of(s, benchmark)]
    lines = "\n".join(map(json.dumps, rows))
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(rows))
    return path


def write_sqa3d(path, samples):
    """Two files; situation and question are cut behind the first full stop."""
    asked, told = [], []
    for s in samples:
        situation, _, question = s.question.partition(". ")
        known = {"scene_id": s.scene, "question_id": int(s.id)}
        asked.append(known | {"situation": situation + ".", "question": question})
        told.append(known | {"answers": [{"answer": s.answer, "answer_confidence": "yes", "answer_id": 1}]})
    path.write_text(json.dumps({"task_type": "", "questions": asked}))
    beside = path.with_name(path.name.replace("_questions_", "_sqa_annotations_"))
    beside.write_text(json.dumps({"annotations": told}))
