"""Rooms as scans, and their questions in the file formats of the benchmarks: what evaluate.py reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import data
from data import Sample, Scene
from evaluate import BENCHMARKS, number_objects

TASKS = {  # benchmark -> generated questions of the same form
    "scanqa": ("color", "what", "where", "count", "exist"),
    "sqa3d": ("situated",),
    "scanrefer": ("ground",),
    "multi3drefer": ("multi",),
    "scan2cap": ("caption",),
    "vsibench": BENCHMARKS["rooms/vsi"].tasks,
}
TYPES = {
    "object_size": "object_size_estimation",
    "room_size": "room_size_estimation",
}  # others: object_<task>


def scans(root: Path, seeds: Iterable[int], **size) -> list[Scene]:
    """Write procedural rooms as scans below root/scans."""
    rooms = [replace(data.room(seed, **size), name=f"scene{seed % 10_000:04d}_00") for seed in seeds]
    for room in rooms:
        data.write_scannet(room, root / "scans")
    return rooms


def questions(scenes: Sequence[Scene], benchmark: str, per_scene: int = 3) -> list[Sample]:
    """Generate questions, with the ids that the benchmark's reader gives them."""
    numbered = [number_objects(scene, 0) for scene in scenes]
    samples = data.question_set(numbered, TASKS[benchmark], per_scene, 0)
    if benchmark == "scan2cap":  # one question per object
        samples = list({(s.scene, *s.targets): s for s in samples}.values())
        return [
            replace(s, id=f"{s.scene}|{s.targets[0] - 1}", question=f"describe <obj {s.targets[0]}>.")
            for s in samples
        ]
    for i, s in enumerate(samples):
        if benchmark == "scanrefer":
            s.id = f"{s.scene}|{s.targets[0] - 1}|{i}"
        elif benchmark != "scanqa":
            s.id = f"{s.scene}|{i}" if benchmark == "multi3drefer" else str(i)
    return samples


def row_of(s: Sample, benchmark: str, scenes: Sequence[Scene]) -> list[dict]:
    """A question as rows of its benchmark's file: of captions one per description."""
    row = {"scene_id": s.scene, "question_id": s.id, "question": s.question, "object_names": ["thing"]}
    if benchmark == "scanqa":
        return [row | {"answers": s.answers or [s.answer], "object_ids": [0]}]
    if benchmark == "multi3drefer":
        return [
            row
            | {
                "object_ids": [i - 1 for i in s.targets],
                "eval_type": s.kind,
                "description": s.question,
                "ann_id": int(s.id.split("|")[1]),
            }
        ]
    if benchmark == "vsibench":
        task = s.task.removeprefix("vsi_")
        kind = f"_{s.kind}" if "direction" in task else ""
        truth = s.answer if s.options else str(s.value)
        return [
            {
                "id": int(s.id),
                "dataset": "scannet",
                "scene_name": s.scene,
                "question": s.question,
                "question_type": TYPES.get(task, f"object_{task}") + kind,
                "ground_truth": truth,
                "options": s.options,
            }
        ]
    categories = {(scene.name, o.id): o.category.replace(" ", "_") for scene in scenes for o in scene.objects}
    kind = {"eval_type": s.kind} if s.kind in ("unique", "multiple") else {}
    return [
        row
        | kind
        | {
            "object_id": str(s.targets[0] - 1),
            "object_name": categories[s.scene, s.targets[0]],
            "ann_id": s.id.split("|")[-1],
            "description": text,
            "token": text.split(),
        }
        for text in s.answers or [s.question]
    ]


def write(
    folder: Path, benchmark: str, split: str, samples: Sequence[Sample], scenes: Sequence[Scene]
) -> Path:
    """Write the official file of a split."""
    path = folder / BENCHMARKS[benchmark].files[split][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    if benchmark == "sqa3d":
        write_sqa3d(path, samples)
        return path
    rows = [row for s in samples for row in row_of(s, benchmark, scenes)]
    lines = "\n".join(map(json.dumps, rows))
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(rows))
    return path


def write_sqa3d(path: Path, samples: Sequence[Sample]) -> None:
    """Two files; situation and question are cut behind the first full stop."""
    asked, told = [], []
    for s in samples:
        situation, _, question = s.question.partition(". ")
        known = {"scene_id": s.scene, "question_id": int(s.id)}
        asked.append(known | {"situation": situation + ".", "question": question})
        told.append(known | {"answers": [{"answer": s.answer, "answer_confidence": "yes", "answer_id": 1}]})
    path.write_text(json.dumps({"task_type": "", "questions": asked}))
    path.with_name(path.name.replace("_questions_", "_sqa_annotations_")).write_text(
        json.dumps({"annotations": told})
    )
