"""Rooms as scans, and their questions in the file formats of the benchmarks: what the readers of evaluate.py read."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import data
from data import Sample, Scene, substitute
from evaluate import VSI_TASKS

TASKS = {  # benchmark -> generated questions of the same form
    "scanqa": ("colour", "what", "where", "count", "exist"), "sqa3d": ("situated",), "scanrefer": ("ground",),
    "multi3drefer": ("multi",), "scan2cap": ("caption",),
    "vsibench": ("vsi_counting", "vsi_abs_distance", "vsi_object_size", "vsi_room_size", "vsi_rel_distance",
                 "vsi_rel_direction"),
}  # fmt: skip
FILES = {"scanqa": "ScanQA_v1.0_{}.json", "sqa3d": "v1_balanced_questions_{}_scannetv2.json",
         "scanrefer": "ScanRefer_filtered_{}.json", "multi3drefer": "multi3drefer_{}.json",
         "scan2cap": "ScanRefer_filtered_{}.json", "vsibench": "{}.jsonl"}  # fmt: skip


def scans(root: Path, seeds: Iterable[int], **size) -> list[Scene]:
    """Procedural rooms named and written as scans below root/scans."""
    rooms = [replace(data.room(seed, **size), name=f"scene{seed % 10_000:04d}_00") for seed in seeds]
    for room in rooms:
        data.write_scannet(room, root / "scans")
    return rooms


def numbered(scene: Scene) -> Scene:
    return replace(scene, identifiers=data.number_objects(scene, np.random.default_rng(0)))


def plain(text: str) -> str:
    """Without marks: descriptions in official files name no objects."""
    return substitute(text, lambda i: "thing")


def questions(scenes: Sequence[Scene], benchmark: str, per_scene: int = 3) -> list[Sample]:
    """Generated questions, with the ids that the benchmark's reader gives them."""
    samples = data.question_set(map(numbered, scenes), TASKS[benchmark], per_scene, 0)
    if benchmark == "scan2cap":
        samples = [replace(s, id=f"{s.scene}|{s.targets[0] - 1}", question=f"describe <obj {s.targets[0]}>.")
                   for s in {(s.scene, s.targets[0]): s for s in samples}.values()]  # fmt: skip
    for i, s in enumerate(samples):
        s.id = {"scanrefer": f"{s.scene}|{(s.targets or [0])[0] - 1}|{i}", "multi3drefer": f"{s.scene}|{i}",
                "sqa3d": str(i), "vsibench": str(i)}.get(benchmark, s.id)  # fmt: skip
    return samples


def scanqa_rows(samples: Sequence[Sample]) -> list[dict]:
    return [{"scene_id": s.scene, "question_id": s.id, "question": s.question, "answers": s.answers or [s.answer],
             "object_ids": [0], "object_names": ["thing"]} for s in samples]  # fmt: skip


def scanrefer_rows(samples: Sequence[Sample], scenes: Sequence[Scene]) -> list[dict]:
    """Also of captions: one row per accepted description."""
    names = {(s.name, o.id): o.category.replace(" ", "_") for s in scenes for o in s.objects}
    rows = []
    for s in samples:
        for text in s.answers or [s.question]:
            (target,) = s.targets
            rows.append({"scene_id": s.scene, "object_id": str(target - 1), "object_name": names[s.scene, target],
                         "ann_id": s.id.split("|")[2] if s.id.count("|") == 2 else str(len(rows)),
                         "description": text, "token": text.replace(".", " .").split()}
                        | ({"eval_type": s.kind} if s.kind in ("unique", "multiple") else {}))  # fmt: skip
    return rows


def multi3drefer_rows(samples: Sequence[Sample]) -> list[dict]:
    return [{"scene_id": s.scene, "object_ids": [i - 1 for i in s.targets], "object_name": "thing", "eval_type": s.kind,
             "ann_id": int(s.id.split("|")[1]), "description": s.question} for s in samples]  # fmt: skip


def vsi_rows(samples: Sequence[Sample]) -> list[dict]:
    types = {v: k for k, v in VSI_TASKS.items()}
    names = [s.task.removeprefix("vsi_") + f" {s.kind}" * ("direction" in s.task) for s in samples]
    return [{"id": int(s.id), "dataset": "scannet", "scene_name": s.scene, "question_type": types[name],
             "question": s.question, "ground_truth": s.answer if s.options else str(s.value), "options": s.options}
            for s, name in zip(samples, names, strict=True)]  # fmt: skip


def write_sqa3d(path: Path, samples: Sequence[Sample]) -> None:
    """Two files; situation and question are cut behind the first full stop."""
    cut = [s.question.partition(". ") for s in samples]
    asked = [{"scene_id": s.scene, "situation": a + ".", "alternative_situation": [a, a], "question": q,
              "question_id": int(s.id)} for s, (a, _, q) in zip(samples, cut, strict=True)]  # fmt: skip
    told = [{"scene_id": s.scene, "question_id": int(s.id), "question_type": "N/A", "answer_type": "other",
             "answers": [{"answer": s.answer, "answer_confidence": "yes", "answer_id": 1}],
             "rotation": {"_x": 0, "_y": 0, "_z": 0.6, "_w": 0.8}, "position": {"x": 0.5, "y": -0.25, "z": 0}}
            for s in samples]  # fmt: skip
    path.write_text(json.dumps({"task_type": "", "questions": asked}))
    path.with_name(path.name.replace("_questions_", "_sqa_annotations_")).write_text(json.dumps({"annotations": told}))


def write(folder: Path, benchmark: str, split: str, samples: Sequence[Sample], scenes: Sequence[Scene]) -> Path:
    """The official file of a split; returns its path."""
    path = folder / FILES[benchmark].format(split)
    path.parent.mkdir(parents=True, exist_ok=True)
    if benchmark == "sqa3d":
        write_sqa3d(path, samples)
    elif benchmark == "vsibench":
        path.write_text("".join(json.dumps(row) + "\n" for row in vsi_rows(samples)))
    else:
        rows = {"scanqa": scanqa_rows, "multi3drefer": multi3drefer_rows}.get(
            benchmark, lambda samples: scanrefer_rows(samples, scenes))(samples)  # fmt: skip
        path.write_text(json.dumps(rows))
    return path


def write_csv(path: Path, rows: Sequence[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
