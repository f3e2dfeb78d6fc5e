"""Scenes, rooms, questions, text and batches: everything the three papers share, and nothing that only one needs.

A `Scene` is one furnished place with posed frames, a coloured point cloud and objects; a `Sample` is one question about
it with all that scoring needs. Readers fill scenes, a table of question templates fills samples, `collate` turns
both into tensors. `knn`, `farthest_point_sampling` (part 2) and `over_segment` (part 5) are what papers share and
what is most often copied.

Frames and units: every array is in metres, z up, axis-aligned, right-handed, the floor at z = 0. Cameras follow OpenCV
(x right, y down, z forward); poses map camera to world; depth is measured along the camera's z axis, 0 = missing.
Boxes are axis-aligned: [cx, cy, cz, w, d, h], the centre and the full sizes along x, y, z.

Axis legend: S scenes, B boxes or those scenes that are read anew, V views, H W pixels, P pixels of a view or positions
of a prefix, N points, n objects, Q questions, T tokens, K scene tokens, D width.

Contents: 1 scenes and samples · 2 geometry · 3 procedural rooms · 4 questions · 5 text and batches · 6 the base model;
a first reading ends here · 7 scenes from disk · 8 video · 9 superpoints and segments · 10 pictures · 11 own scenes
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial, wraps
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

COLOURS = {  # name -> RGB in 0..255; also the vocabulary in which real surfaces are described
    "red": (200, 40, 40), "orange": (235, 130, 30), "yellow": (235, 210, 60), "green": (60, 150, 60),
    "blue": (50, 90, 190), "purple": (130, 60, 160), "pink": (240, 150, 185), "brown": (125, 80, 45),
    "white": (238, 238, 232), "gray": (130, 130, 130), "black": (35, 35, 38),
}  # fmt: skip


class DataError(ValueError):
    """One line for the user: what is wrong, where (file and field), and the remedy. Commands print it and exit 2."""


# ---- 1 scenes and samples --------------------------------------------------------------------------------------------


@dataclass
class Thing:
    """An object: `id` is its label in masks and instances (>= 1; 0 is everything else); box in metres, scene frame."""

    id: int
    category: str  # "chair"; "" where unknown (an unlabelled real scene)
    colour: str  # a name from COLOURS; "" where unknown
    box: np.ndarray  # [6] cx, cy, cz, w, d, h


@dataclass
class Frames:
    """V posed RGB-D views of one size."""

    colour: np.ndarray  # [V, H, W, 3] uint8
    depth: np.ndarray  # [V, H, W] float32 metres along the camera's z axis, 0 = missing
    masks: np.ndarray  # [V, H, W] int32 object ids, 0 = none
    intrinsics: np.ndarray  # [V, 3, 3] float64
    poses: np.ndarray  # [V, 4, 4] float64, camera to world


class LazyFrames:
    """Frames that are read when one of their arrays is looked at and dropped when the next scene's are: a thousand
    scans do not fit in memory. `load()` returns a Frames."""

    latest: tuple = (None, None)  # (whose, Frames): shared by all, so that one set is held at a time

    def __init__(self, load: Callable[[], Frames], key: str = ""):
        self.load, self.key = load, key  # key: what the files are known by

    def __getattr__(self, name: str) -> np.ndarray:
        if name.startswith("__"):
            raise AttributeError(name)
        if LazyFrames.latest[0] is not self:
            LazyFrames.latest = (self, self.load())
        return getattr(LazyFrames.latest[1], name)


@dataclass
class Scene:
    """One place. Arrays that a source cannot give are None, and whoever needs them says so in one line."""

    name: str
    source: str  # "rooms" | "scannet" | "rgbd" | "video" | "ply"
    objects: list[Thing]
    points: np.ndarray | None = None  # [N, 3] float32
    colours: np.ndarray | None = None  # [N, 3] uint8
    normals: np.ndarray | None = None  # [N, 3] float32 unit
    superpoints: np.ndarray | None = None  # [N] int64, contiguous from 0
    instances: np.ndarray | None = None  # [N] int64 object ids, 0 = none
    frames: Frames | LazyFrames | None = None
    bounds: np.ndarray | None = None  # [2, 3] lowest and highest corner of the room or cloud
    metric: bool = True  # False: unknown scale, metric questions are refused
    turn: np.ndarray = field(default_factory=lambda: np.eye(3))  # augmentation already applied to boxes and points;
    #                                                 encodings cached before it apply it to their own coordinates
    identifiers: dict[int, int] = field(default_factory=dict)  # object id -> 0..99, drawn per scene and epoch
    notes: list[str] = field(default_factory=list)  # what the reader did: transforms, dropped poses, guesses

    def thing(self, object_id: int) -> Thing:
        return next(o for o in self.objects if o.id == object_id)


@dataclass
class Sample:
    """One question with its exact answer. Text names objects by marks, "<obj 3>" = the object with id 3; each paper
    replaces them in its own way (`substitute`): Proxy3D by identifiers, Spatial 3D-LLM by boxes in text."""

    id: str  # unique in its benchmark
    scene: str
    task: str  # a key of TASKS: "ground", "count", ...
    question: str
    answer: str  # the text to write, marks included
    answers: list[str] = field(default_factory=list)  # every accepted answer; empty = [answer]
    tokens: list[str] = field(default_factory=list)  # `answers` split into words, where a benchmark does it itself
    steps: str = ""  # written before the answer where a model reasons aloud; never scored
    targets: list[int] | None = None  # object ids (grounding), [] = nothing fits
    value: float | None = None  # numeric truth: metres, square metres, count
    point: np.ndarray | None = None  # [3] truth of a coordinate question
    box: np.ndarray | None = None  # [6] truth of a box question
    options: list[str] | None = None  # multiple choice, "A. chair"
    prompt: np.ndarray | None = None  # [6] box or [3] click that belongs to the question
    about: list[int] = field(default_factory=list)  # object ids that the question describes, in the order of its truth
    wording: str = ""  # which template and slots: what the blind baseline may condition on
    kind: str = ""  # sub-type for tables: "unique", "multiple", "what", "easy", ...


def fingerprint(scene: Scene) -> str:
    """Hash what a scene is made of: files of frozen work belong to it, not to its name.

    Frames on disk are known by their `key`, others by every 16th pixel; turning a scene does not change the result.
    """
    digest = hashlib.sha256(f"{scene.name} {scene.source}".encode())
    if isinstance(scene.frames, LazyFrames):
        digest.update(scene.frames.key.encode())
    elif scene.frames is not None:
        frames = scene.frames
        digest.update(frames.poses.tobytes())
        for array in (frames.colour, frames.depth, frames.masks):
            digest.update(np.ascontiguousarray(array[:, ::16, ::16]).tobytes())
    for array in (scene.colours, scene.superpoints, scene.instances):
        if array is not None:
            digest.update(np.ascontiguousarray(array[:: 1 + len(array) // 4096]).tobytes())
    if scene.points is not None:
        some = scene.points[:: 1 + len(scene.points) // 4096]
        digest.update(np.round(np.linalg.norm(some, axis=1), 3).tobytes())
    return digest.hexdigest()[:12]


def safe_name(name: str) -> str:
    """Turn a name that came from a file into a plain file name: it never leads out of its folder."""
    plain = re.sub(r"[^\w@.-]", "_", name).lstrip(".")
    if not plain:
        raise DataError(f"{name!r}: not a name for a file; use letters, digits, - and _")
    return plain


MARK = re.compile(r"<obj (\d+)>")


def substitute(text: str, refer: Callable[[int], str]) -> str:
    """Replace every mark "<obj 3>" by refer(3)."""
    return MARK.sub(lambda m: refer(int(m.group(1))), text)


def number_objects(scene: Scene, rng: np.random.Generator, count: int = 100) -> dict[int, int]:
    """Random identifiers 0..count-1 for the scene's objects; of more than `count` objects the largest are numbered."""
    by_volume = sorted(scene.objects, key=lambda o: (-float(np.prod(o.box[3:])), o.id))[:count]
    ids = rng.permutation(count)[: len(by_volume)]
    return {o.id: int(i) for o, i in zip(sorted(by_volume, key=lambda o: o.id), ids, strict=True)}


def augment(scene: Scene, rng: np.random.Generator, recolour: bool = False, mirror: bool = True) -> Scene:
    """A copy with new identifiers, mirrored and transposed horizontally at random; `recolour` also draws new object
    colours (only where the colours shown come from the object table: symbols). Without `mirror` only turned: questions
    that people wrote say left and right."""
    turn = np.diag([rng.choice([-1.0, 1.0]), rng.choice([-1.0, 1.0]), 1.0])
    if rng.random() < 0.5:
        turn = turn[[1, 0, 2]]
    if not mirror and np.linalg.det(turn) < 0:
        turn = np.diag([-1.0, 1.0, 1.0]) @ turn
    size = np.abs(turn)
    names = list(COLOURS)
    objects = [
        replace(o, box=np.concatenate([turn @ o.box[:3], size @ o.box[3:]]),
                colour=names[rng.integers(len(names))] if recolour and o.colour else o.colour)
        for o in scene.objects
    ]  # fmt: skip
    rotate = lambda a: None if a is None else (a @ turn.T).astype(a.dtype)  # noqa: E731
    bounds = None if scene.bounds is None else np.sort(scene.bounds @ turn.T, axis=0)
    return replace(scene, objects=objects, points=rotate(scene.points), normals=rotate(scene.normals), bounds=bounds,
                   turn=turn @ scene.turn, identifiers=number_objects(scene, rng))  # fmt: skip


# ---- 2 geometry ------------------------------------------------------------------------------------------------------


def knn(queries: torch.Tensor, points: torch.Tensor, k: int, chunk: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest points of every query, nearest first: (distances [M, k] in the unit of the input, indices [M, k]).

    A KD-tree on the CPU (50,000 points: 0.2 s against 7 s for all distances); chunked distances + top-k on a GPU.
    queries [M, 3], points [N, 3] float. Raises ValueError if k > N.
    """
    if not 1 <= k <= len(points):
        raise ValueError(f"knn: k = {k} neighbours of {len(points)} points")
    if points.device.type == "cpu":
        from scipy.spatial import cKDTree

        distance, index = cKDTree(points.numpy()).query(queries.numpy(), k=k, workers=-1)
        shape = (len(queries), k)
        return torch.from_numpy(distance.reshape(shape)).to(points), torch.from_numpy(index.reshape(shape))
    parts = [torch.cdist(q, points).topk(k, dim=1, largest=False) for q in queries.split(chunk)]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def nearest(queries: np.ndarray, points: np.ndarray, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """`knn` of arrays: distances [M, k] and indices [M, k]; of fewer than k points, all."""
    tensors = (torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in (queries, points))
    distance, index = knn(*tensors, min(k, len(points)))
    return distance.numpy(), index.numpy()


def farthest_point_sampling(points: torch.Tensor, count: int, first: int | None = None) -> torch.Tensor:
    """Indices [count] of points chosen one by one, each the farthest from those chosen before; ties: lowest index.

    points [N, 3]; starts at `first`, by default the point farthest from the centroid. count is capped at N.
    """
    count = min(count, len(points))
    if first is None:
        first = int((points - points.mean(0)).square().sum(1).argmax())
    chosen = torch.empty(count, dtype=torch.long, device=points.device)
    nearest = torch.full((len(points),), float("inf"), dtype=points.dtype, device=points.device)
    index = torch.tensor(first, device=points.device)
    for i in range(count):
        chosen[i] = index
        nearest = torch.minimum(nearest, (points - points[index]).square().sum(1))
        index = nearest.argmax()
    return chosen


def unproject(depth: np.ndarray, intrinsics: np.ndarray, poses: np.ndarray) -> np.ndarray:
    """World point map [V, H, W, 3] float32 from depth [V, H, W] (0 -> NaN), intrinsics [V, 3, 3], poses [V, 4, 4]."""
    V, H, W = depth.shape
    u, v = np.meshgrid(np.arange(W) + 0.5, np.arange(H) + 0.5)
    fx, fy, cx, cy = (intrinsics[:, i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    rays = np.stack([(u - cx) / fx, (v - cy) / fy, np.ones((V, H, W))], axis=-1)  # [V, H, W, 3]
    points = (rays * np.where(depth > 0, depth, np.nan)[..., None]).reshape(V, H * W, 3)
    points = points @ poses[:, :3, :3].swapaxes(1, 2) + poses[:, None, :3, 3]
    return points.reshape(V, H, W, 3).astype(np.float32)


def project(points: np.ndarray, K: np.ndarray, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `unproject` for one camera: pixels [..., 2] (the first pixel's centre is at 0.5, 0.5) and depth
    [...] of points [..., 3], with K [3, 3] and pose [4, 4]. Pixels of what lies behind the camera are NaN."""
    camera = (points - pose[:3, 3]) @ pose[:3, :3]
    depth = camera[..., 2]
    ahead = np.where(depth > 1e-6, depth, np.nan)[..., None]
    return camera[..., :2] / ahead * K[[0, 1], [0, 1]] + K[:2, 2], depth


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU [..., n, m] of axis-aligned boxes a [..., n, 6] and b [..., m, 6] (centre, size)."""
    lo = np.maximum((a[..., :3] - a[..., 3:] / 2)[..., :, None, :], (b[..., :3] - b[..., 3:] / 2)[..., None, :, :])
    hi = np.minimum((a[..., :3] + a[..., 3:] / 2)[..., :, None, :], (b[..., :3] + b[..., 3:] / 2)[..., None, :, :])
    inter = np.clip(hi - lo, 0, None).prod(-1)
    union = a[..., 3:].prod(-1)[..., :, None] + b[..., 3:].prod(-1)[..., None, :] - inter
    return inter / np.maximum(union, 1e-12)


FLAT = 0.05  # metres: what is lower, a rug, is no obstacle


def collide(a: np.ndarray, b: np.ndarray, slack: float) -> np.ndarray:
    """Whether boxes a [m, 6] stand in boxes b [n, 6], [m, n] bool: along every axis they share more than `slack` metres
    or than half of the thinner one. What is lower than FLAT is no obstacle."""
    lo = np.maximum((a[:, :3] - a[:, 3:] / 2)[:, None], b[:, :3] - b[:, 3:] / 2)
    hi = np.minimum((a[:, :3] + a[:, 3:] / 2)[:, None], b[:, :3] + b[:, 3:] / 2)
    thin = np.minimum(a[:, None, 3:], b[:, 3:]) / 2
    return (hi - lo > np.minimum(thin, slack)).all(-1) & (b[:, 5] >= FLAT)


def carried(boxes: np.ndarray, tops: np.ndarray, bounds: np.ndarray | None,
            wall: float = 0.02) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """What may hold boxes [m, 6]: floor [m] (the bottom is less than 5 cm above z = 0), wall [m] (within `wall` metres
    of a side of the bounds [2, 3]) and carries [m, n] (which of tops [n, 6], at least 10 cm high, has its upper side
    within 5 cm of the bottom and below the centre)."""
    c, s, at, size = boxes[:, :3], boxes[:, 3:], tops[:, :3], tops[:, 3:]
    bottom, top = c[:, 2] - s[:, 2] / 2, at[:, 2] + size[:, 2] / 2
    carries = (np.abs(c[:, None, :2] - at[:, :2]) <= size[:, :2] / 2).all(-1) & (size[:, 2] >= 0.1)
    carries &= np.abs(bottom[:, None] - top) < 0.05
    lo, hi = (-np.inf, np.inf) if bounds is None else bounds[:, :2]
    return bottom < 0.05, (np.minimum(c[:, :2] - lo, hi - c[:, :2]) - s[:, :2] / 2 < wall).any(1), carries


# ---- 3 procedural rooms ----------------------------------------------------------------------------------------------
#
# A room is boxes: a piece of furniture is a row of one table, the row a few boxes (a chair: seat, back and legs), and a
# view is one slab test of boxes against pixels. Layout and rendering use integers and + - * / sqrt only, element by
# element, which IEEE 754 rounds alike everywhere: the same seed gives the same room on every machine.

ROOM_SEEDS = {"train": range(800_000), "val": range(800_000, 900_000), "test": range(900_000, 1_000_000)}

MATERIALS = {
    "wood": (168, 124, 80), "metal": (172, 176, 182), "screen": (38, 46, 60), "paper": (232, 226, 208),
    "leaf": (74, 138, 66), "sheet": (246, 246, 242), "glass": (178, 210, 232), "dark": (52, 48, 46),
}  # fmt: skip

# category -> width, depth, height in metres; where it stands; its parts. A part is "x0 x1 y0 y1 z0 z1 material" in
# percent of the size, the back at y = 0; "|" repeats it mirrored left to right; "legs 46 12" are four legs up to 46 %,
# 12 % thick. No material: the object's own colour, which is most of what is seen. Parts fill the size exactly.
FURNITURE = {
    "chair": (0.46, 0.50, 0.92, "seat", "0 100 0 100 46 53, 0 100 0 12 53 100, legs 46 12"),
    "stool": (0.40, 0.40, 0.62, "free", "0 100 0 100 86 100, legs 86 16 wood"),
    "sofa": (1.90, 0.90, 0.80, "wall", "10 90 25 100 8 52, 0 100 0 28 8 100, | 0 10 28 100 8 72, legs 8 6 dark,"
             "| 13 48 28 40 52 85"),
    "table": (1.40, 0.85, 0.74, "free", "0 100 0 100 92 100, legs 92 7"),
    "desk": (1.25, 0.65, 0.76, "wall", "0 100 0 100 94 100, 0 32 2 95 5 94, 95 100 2 95 0 94, 32 95 2 6 40 94,"
             "2 30 4 90 0 5 dark, 10 22 95 98 70 76 metal, 10 22 95 98 38 44 metal"),
    "nightstand": (0.48, 0.42, 0.55, "wall", "0 100 0 100 94 100, 4 96 0 95 12 94, 38 62 95 100 68 76 metal,"
                   "38 62 95 100 32 40 metal, legs 12 12 dark"),
    "dresser": (1.15, 0.48, 0.85, "wall", "0 100 0 97 8 100, legs 8 8 dark, 3 97 97 98 37 39 dark,"
                "3 97 97 98 67 69 dark, | 20 32 97 100 20 25 metal, | 20 32 97 100 50 55 metal,"
                "| 20 32 97 100 80 85 metal"),
    "bookshelf": (0.90, 0.32, 1.85, "wall", "| 0 5 0 100 0 100, 5 95 0 10 0 100, 5 95 10 100 0 3, 5 95 10 100 24 27,"
                  "5 95 10 100 48 51, 5 95 10 100 72 75, 5 95 10 100 97 100, 6 50 15 80 27 42 paper,"
                  "52 70 15 75 27 40 wood, 40 92 15 80 51 65 dark, 8 45 15 80 75 90 wood, 50 80 15 80 75 88 paper"),
    "wardrobe": (1.15, 0.60, 2.00, "wall", "0 100 0 97 4 100, 2 98 2 93 0 4 dark, 49 51 97 98 6 98 dark,"
                 "| 43 46 97 100 42 60 metal"),
    "bed": (1.50, 2.05, 0.95, "wall", "0 100 4 100 10 34 wood, 2 98 4 99 34 55, 0 100 0 4 0 100 wood,"
            "| 10 46 6 24 55 66 sheet, legs 10 6 wood"),
    "piano": (1.45, 0.62, 1.20, "wall", "0 100 0 55 0 100, 0 100 55 100 50 62, 6 94 58 97 62 65 sheet,"
              "6 94 58 76 65 66 dark, | 0 6 55 95 0 50"),
    "fridge": (0.70, 0.68, 1.75, "wall", "0 100 0 95 0 64, 0 100 0 95 66 100, 2 98 0 93 64 66 dark,"
               "8 14 95 100 35 60 metal, 8 14 95 100 70 88 metal"),
    "stove": (0.62, 0.62, 0.90, "wall", "0 100 0 97 6 97, 4 96 4 92 0 6 dark, 12 88 97 98 20 62 screen,"
              "15 85 98 100 66 70 metal, | 12 42 12 42 97 100 dark, | 12 42 58 88 97 100 dark,"
              "| 12 22 97 100 82 90 dark, 45 55 97 100 82 90 dark"),
    "sink": (0.60, 0.48, 1.00, "wall", "0 100 0 100 68 74, 0 100 0 12 74 84, | 0 10 12 100 74 84, 10 90 88 100 74 84,"
             "38 62 20 60 0 68, 46 54 3 10 84 100 metal, 46 54 10 40 95 100 metal"),
    "toilet": (0.40, 0.66, 0.80, "wall", "0 100 0 28 42 97, 20 80 0 75 0 42, 5 95 28 100 42 52, 25 75 45 88 52 53 dark,"
               "40 60 10 20 97 100 metal"),
    "bathtub": (1.60, 0.75, 0.58, "wall", "0 100 0 100 0 30, 0 100 0 12 30 100, 0 100 88 100 30 100,"
                "| 0 6 12 88 30 100, 6 94 12 88 30 70 glass"),
    "lamp": (0.44, 0.44, 1.60, "free", "0 100 0 100 74 100, 46 54 46 54 3 74 metal, 20 80 20 80 0 3"),
    "plant": (0.52, 0.52, 0.95, "free", "14 86 14 86 0 48, 4 96 4 96 42 54, 42 58 42 58 54 80 leaf,"
              "0 60 34 50 64 72 leaf, 48 100 44 62 74 82 leaf, 34 52 0 100 84 92 leaf, 38 62 38 62 92 100 leaf"),
    "bin": (0.34, 0.34, 0.52, "free", "8 92 8 92 0 85, 0 100 0 100 85 93, 30 70 30 70 93 100 dark"),
    "rug": (1.70, 1.15, 0.02, "free", "0 100 0 100 0 60 paper, 6 94 8 92 60 100"),
    "monitor": (0.58, 0.22, 0.46, "top", "0 100 40 60 25 100, 12 88 60 64 38 90 screen, 44 56 40 60 4 25,"
                "25 75 0 100 0 5"),
    "laptop": (0.40, 0.34, 0.28, "top", "0 100 15 100 0 9, 0 100 0 15 4 100, 12 88 15 17 24 88 screen,"
               "10 90 30 62 9 11 dark"),
    "bottle": (0.17, 0.17, 0.44, "top", "0 100 0 100 0 62, 28 72 28 72 62 92, 25 75 25 75 92 100 metal"),
    "vase": (0.24, 0.24, 0.36, "top", "20 80 20 80 0 12, 0 100 0 100 12 62, 30 70 30 70 62 85, 18 82 18 82 85 100"),
    "pillow": (0.48, 0.32, 0.16, "top", "0 100 0 100 20 80, 12 88 12 88 0 100"),
    "picture": (0.80, 0.04, 0.60, "hang", "0 100 0 70 0 100 wood, 8 92 70 100 10 90"),
    "mirror": (0.60, 0.05, 0.95, "hang", "0 100 0 80 0 100, 20 80 80 100 14 86 glass"),
    "clock": (0.40, 0.06, 0.40, "hang", "18 82 0 80 0 100, 0 100 0 80 18 82, 46 54 80 100 46 88 dark,"
              "54 76 80 100 46 54 dark"),
    "tv": (1.10, 0.08, 0.66, "hang", "0 100 0 80 0 100, 20 80 80 100 26 84 screen"),
    "door": (0.92, 0.06, 2.05, "door", "6 94 0 60 0 97, | 0 6 0 80 0 100 wood, 6 94 0 80 97 100 wood,"
             "82 90 60 100 47 50 metal"),
    "window": (1.70, 0.08, 1.30, "window", "28 72 0 50 5 95 glass, | 0 28 20 100 0 95, 28 72 0 60 0 5,"
               "49 51 50 60 5 95 sheet, 28 72 50 60 48 52 sheet, 0 100 0 100 95 100"),
}  # fmt: skip
CATEGORIES = sorted(FURNITURE)
SURFACES = ("desk", "dresser", "nightstand", "table")  # flat tops on which small things stand
ORDER = ("door", "window", "wall", "free", "seat", "hang", "top")  # what is placed first
CLEAR = {"door": 0.8, "window": 0.7, "hang": 0.5}  # metres kept free in front: doors open, pictures are seen
SHADE = np.array([0.84, 0.90, 0.80, 0.93, 0.72, 1.0])  # light on faces -x +x -y +y -z +z; white never looks gray
NORMALS = np.array([[-1, 0, 0], [1, 0, 0], [0, -1, 0], [0, 1, 0], [0, 0, -1], [0, 0, 1]], np.float32)
BACK = np.array([[0, -1], [1, 0], [0, 1], [-1, 0]], float)  # where an object's back points after 0..3 quarter turns
HALF_FOV = 0.9163312  # tan(85 degrees / 2)


def _parse_parts(text: str) -> tuple[np.ndarray, list[str]]:
    """A row's parts: corners [m, axis, (low, high)] in 0..1 and materials [m]."""
    ends, materials = [], []
    for words in (part.split() for part in text.split(",")):
        mirrored, legs = words[0] == "|", words[0] == "legs"
        words = words[mirrored or legs :]
        numbers = [int(w) / 100 for w in words if w.isdigit()]
        if legs:
            top, b = numbers
            boxes = [(x, x + b, y, y + b, 0, top) for x in (0, 1 - b) for y in (0, 1 - b)]
        else:
            boxes = [numbers, (1 - numbers[1], 1 - numbers[0], *numbers[2:])][: 1 + mirrored]
        ends += boxes
        materials += [words[-1] if words[-1].isalpha() else ""] * len(boxes)
    return np.array(ends).reshape(-1, 3, 2), materials


PARTS = {category: _parse_parts(row[4]) for category, row in FURNITURE.items()}
CUBE = _parse_parts("0 100 0 100 0 100")


def _corners(category: str, size: np.ndarray, turn: int) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest corners [m, 3] of a category's parts around the centre of its base."""
    ends = (PARTS.get(category, CUBE)[0] - [[0.5], [0.5], [0.0]]) * size[:, None]
    x, y, z = ends[:, 0], ends[:, 1], ends[:, 2]
    for _ in range(turn):
        x, y = -y[:, ::-1], x
    return np.stack([x[:, 0], y[:, 0], z[:, 0]], 1), np.stack([x[:, 1], y[:, 1], z[:, 1]], 1)


def _propose(where, size, side, tops, tables, rng, n=48):
    """n candidate boxes (low [n, 3], high [n, 3]) and turns [n] for an object of this size that stands `where`.

    tops, tables: arrays [k, 7] of the boxes (low, high, turn) that carry small things, and that chairs stand around.
    """
    turn, u, where_z = rng.integers(4, size=n), rng.uniform(-1, 1, (n, 2)), rng.uniform(1.35, 1.6, n)
    if where == "top":  # turned as what carries it
        below = tops[rng.integers(len(tops), size=n)]
        turn = below[:, 6].astype(int)
    half = np.where(turn[:, None] % 2, size[[1, 0]], size[:2]) / 2  # half widths along x and y after turning
    back = BACK[turn]
    along = 1 - np.abs(back)  # the axis along the wall or the table's edge
    xy, z = (side / 2 - half - 0.03) * u, np.zeros(n)
    if where == "top":
        free = (below[:, 3:5] - below[:, :2]) / 2 - half
        xy = np.where((free >= 0).all(1, keepdims=True), (below[:, :2] + below[:, 3:5]) / 2 + free * u, np.inf)
        z = below[:, 5]
    elif where == "seat" and len(tables):  # at a table, facing it; the second half of the candidates anywhere
        table = tables[rng.integers(len(tables), size=n)]
        centre, reach = (table[:, 3:5] + table[:, :2]) / 2, (table[:, 3:5] - table[:, :2]) / 2
        at_table = centre + back * (reach + half + 0.08 + 0.06 * (u + 1)) + along * reach * 0.8 * u
        xy = np.where(np.arange(n)[:, None] < n // 2, at_table, xy)
    elif where not in ("free", "seat"):  # the back against a wall
        xy = back * (side / 2 - half - (0.03 if where == "wall" else 0.0)) + along * xy
        z = {"hang": where_z - size[2] / 2, "window": z + 0.95}.get(where, z)
    return np.column_stack([xy - half, z]), np.column_stack([xy + half, z + size[2]]), turn


def _furnish(rng: np.random.Generator, count: int, side: np.ndarray, height: float) -> list[tuple] | None:
    """`count` objects as (category, colour, low [m, 3], high [m, 3]) of their parts, or None: the room is too small."""
    others = [c for c in CATEGORIES if c not in ("door", "window")]
    chosen = [SURFACES[rng.integers(len(SURFACES))]]  # about 12 categories in a room, so several chairs are common
    others.remove(chosen[0])
    chosen += [others[i] for i in rng.permutation(len(others))[: max(11, count // 5)]]
    drawn = [chosen[i] for i in rng.integers(1, len(chosen), max(count - 3, 0))]
    rank = lambda c: (ORDER.index(FURNITURE[c][3]), -FURNITURE[c][0] * FURNITURE[c][1])  # noqa: E731
    queue = ["door", "window", *sorted([chosen[0], *drawn], key=rank)]
    queue += [chosen[i] for i in rng.integers(len(chosen), size=6 * count)]  # stand in for what found no place
    colours = list(COLOURS)
    left = {c: [colours[i] for i in rng.permutation(len(colours))] for c in ["door", "window", *chosen]}
    placed, taken, tops, tables = [], np.empty((0, 6)), np.empty((0, 7)), np.empty((0, 7))
    for category in queue:
        if len(placed) == count:
            break
        where = FURNITURE[category][3]
        if not left[category] or (where == "top" and not len(tops)):  # no colour twice in a category
            continue
        size = np.array(FURNITURE[category][:3]) * rng.uniform(0.88, 1.12, 3)
        low, high, turn = _propose(where, size, side, tops, tables, rng)
        margin = np.array([0.06, 0.06, 0.0]) / (3 if where == "top" else 1)
        clash = (low - margin)[:, None] < taken[:, 3:] - 1e-6
        clash &= (high + margin)[:, None] > taken[:, :3] + 1e-6
        inside = (low[:, :2] >= -side / 2 - 1e-9).all(1) & (high[:, :2] <= side / 2 + 1e-9).all(1)
        good = np.flatnonzero(inside & (high[:, 2] < height) & ~clash.all(2).any(1))
        if not len(good):
            continue
        low, high, turn = low[good[0]], high[good[0]], int(turn[good[0]])
        base = np.append((low[:2] + high[:2]) / 2, low[2])
        lo, hi = _corners(category, size, turn)
        placed.append((category, left[category].pop(), lo + base, hi + base))
        row = np.array([[*low, *high, turn]])
        tops = np.concatenate([tops, row]) if category in SURFACES else tops
        tables = np.concatenate([tables, row]) if category in ("table", "desk") else tables
        front = np.append(-BACK[turn] * CLEAR.get(where, 0.0), 0.0)
        taken = np.concatenate([taken, [[*np.minimum(low, low + front), *np.maximum(high, high + front)]]])
    return placed if len(placed) == count else None


def _look(position: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Camera-to-world poses [V, 4, 4] of upright OpenCV cameras at position [V, 3] that look at target [V, 3]."""
    unit = lambda a: a / np.sqrt(a[:, :1] ** 2 + a[:, 1:2] ** 2 + a[:, 2:] ** 2)  # noqa: E731
    forward = unit(target - position)
    right = unit(np.stack([forward[:, 1], -forward[:, 0], np.zeros(len(forward))], 1))
    (fx, fy, fz), (rx, ry, _) = forward.T, right.T
    down = np.stack([-fz * ry, fz * rx, fx * ry - fy * rx], 1)  # forward x right
    pose = np.tile(np.eye(4), (len(forward), 1, 1))
    pose[:, :3] = np.stack([right, down, forward, position], 2)
    return pose


def _cameras(rng: np.random.Generator, views: int, side: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Poses [V, 4, 4]: half of the views survey the room from around, half look from near at what those show smallest.

    low, high [n, 3]: the object boxes. Of 24 candidates each view takes the first that is 0.3 m from every box, the
    near views also one about 0.8 m away with nothing in between.
    """
    around, near, tries = (views + 1) // 2, views // 2, 24
    clearance = lambda eye: np.minimum(np.maximum(low - eye, eye - high).max(3).min(2), 0.3)  # noqa: E731
    s = (np.arange(around)[:, None] + rng.uniform(0, 1, (around, tries))) / around * 4  # once along the perimeter
    wall = s.astype(int) % 4
    xy = BACK[wall] + (2 * (s % 1) - 1)[..., None] * BACK[(wall + 1) % 4]
    xy = xy * rng.uniform(0.5, 0.8, (around, tries, 1)) * side / 2
    eye = np.concatenate([xy, rng.uniform(1.7, 2.4, (around, tries, 1))], 2)[:, :, None]  # [around, tries, 1, 3]
    eye = eye[np.arange(around), clearance(eye).argmax(1), 0]
    across = eye[:, :2] * rng.uniform(-0.6, -0.2, (around, 1))
    survey = _look(eye, np.column_stack([across, rng.uniform(0.3, 0.8, around)]))

    centre, extent = (low + high) / 2, np.sort(high - low, axis=1)
    x, y, z = (((centre - survey[:, None, :3, 3]) * survey[:, None, :3, k]).sum(2) for k in range(3))  # [around, n]
    inside = np.maximum(np.abs(x), np.abs(y)) < 0.85 * HALF_FOV * z
    shown = (inside / np.maximum(z, 0.1) ** 2).max(0) * extent[:, 1] * extent[:, 2]
    pick = np.argsort(shown, kind="stable")[np.arange(near) % len(low)]
    target = centre[pick]
    inwards = target[:, :2] * (1 - 1.6 / side)  # what hangs on a wall is seen from the front
    xy = inwards[:, None] + rng.uniform(-1.0, 1.0, (near, tries, 2))
    xy = np.clip(xy, -side / 2 + 0.25, side / 2 - 0.25)
    eye = np.concatenate([xy, rng.uniform(1.5, 1.8, (near, tries, 1))], 2)[:, :, None]
    path = target[:, None, None] - eye
    ends = np.sort([(low - eye) / path, (high - eye) / path], axis=0)
    enter, leave = ends[0].max(3), ends[1].min(3)
    blocked = (enter < leave) & (leave > 0) & (enter < 1) & (np.arange(len(low)) != pick[:, None, None])
    fitness = clearance(eye) - 0.3 * np.abs(np.abs(path[:, :, 0, :2]).max(2) - 0.8) - blocked.any(2)
    return np.concatenate([survey, _look(eye[np.arange(near), fitness.argmax(1), 0], target)])


def ray_cast(lo, hi, pose, size, bounds=None, half_fov=HALF_FOV):
    """What the pixels of one square view hit first, by one slab test of boxes against pixels.

    lo, hi [B, 3]: corners of the boxes; pose [4, 4] camera to world; bounds [2, 3]: a room around it all, seen from
    inside. Only the pixels in a box's rectangle on the image are tested. Returns for P = size * size pixels: depth [P]
    float32 along the camera's axis (0 = nothing), box [P] (B = the room, -1 = nothing), face [P] in the order of
    NORMALS and the points hit [P, 3].
    """
    P = size * size
    right, down, forward, eye = pose[:3].T
    step = (2 * np.arange(size) + 1 - size) / size * half_fov  # pixel centres at depth 1
    rays = right[:, None, None] * step + down[:, None, None] * step[:, None] + forward[:, None, None]
    rays = rays.reshape(3, P).astype(np.float32)
    rays[rays == 0] = 1e-9
    inverse = 1 / rays
    a, b = (lo - eye).astype(np.float32), (hi - eye).astype(np.float32)

    # every box's rectangle on the image, from its eight corners; the whole image where it reaches behind the camera
    corner = np.array([[(a, b)[i][:, 0], (a, b)[j][:, 1], (a, b)[k][:, 2]] for i, j, k in np.ndindex(2, 2, 2)])
    x, y, z = ((corner * v[:, None].astype(np.float32)).sum(1) for v in (right, down, forward))  # [8, B] each
    limit = np.float32(half_fov) * z
    seen = (z > 0.02).any(0) & ~(x < -limit).all(0) & ~(x > limit).all(0)
    seen &= ~(y < -limit).all(0) & ~(y > limit).all(0)
    behind = (z < 0.02).any(0)
    u, v = ((q / np.maximum(limit, 0.01) + 1) * (size / 2) for q in (x, y))
    u0, v0 = (np.where(behind, 0, np.floor(np.clip(q.min(0) - 0.01, 0, size))).astype(int) for q in (u, v))
    u1, v1 = (np.where(behind, size, np.ceil(np.clip(q.max(0) + 0.01, 0, size))).astype(int) for q in (u, v))
    width = u1 - u0
    area = np.where(seen, width * (v1 - v0), 0)
    box = np.repeat(np.arange(len(lo)), area)  # one entry per pair of a box and a pixel of its rectangle
    row, column = np.divmod(np.arange(len(box)) - np.repeat(np.cumsum(area) - area, area), width[box])
    pixel = (row + v0[box]) * size + column + u0[box]

    # slab test: a ray is inside a box between its last entry and its first exit over the three axes
    enter, leave = np.full(len(box), 0.01, np.float32), np.full(len(box), np.inf, np.float32)
    for axis in range(3):
        scale = inverse[axis][pixel]
        t0, t1 = a[:, axis][box] * scale, b[:, axis][box] * scale
        enter, leave = np.maximum(enter, np.minimum(t0, t1)), np.minimum(leave, np.maximum(t0, t1))
    hit = np.flatnonzero((enter < leave) & (enter > 0.01))
    pixel, box, enter = pixel[hit], box[hit], enter[hit]
    depth, found = np.full(P, np.inf, np.float32), np.full(P, -1)
    np.minimum.at(depth, pixel, enter)
    first = enter == depth[pixel]
    found[pixel[first]] = box[first]
    axis = (np.where(rays > 0, a.T[:, found], b.T[:, found]) * inverse).argmax(0)  # the axis entered last
    if bounds is not None:
        ends = np.where(rays > 0, bounds[1][:, None], bounds[0][:, None]) - eye[:, None]
        leave = ends.astype(np.float32) * inverse
        wall = leave.min(0) < depth
        axis = np.where(wall, leave.argmin(0), axis)
        depth, found = np.where(wall, leave.min(0), depth), np.where(wall, len(lo), found)
    depth[found < 0] = 0
    face = 2 * axis + (rays[axis, np.arange(P)] < 0)  # towards -x a ray meets a +x normal, on a box and on a wall
    return depth, found, face, (eye[:, None] + depth * rays).T


def _sample_surface(lo, hi, bounds, weight, count, rng):
    """`count` random points on what is not hidden: points [N, 3], box [N] (B = the room), face [N].

    weight [B + 1]: shares of the boxes and the room. A point is kept when 4 mm along its normal lie in the room and
    outside all boxes, so that faces that touch, the undersides on the floor and the backs at a wall have no points.
    """
    B = len(lo)
    lo_all, hi_all = np.concatenate([lo, bounds[:1]]), np.concatenate([hi, bounds[1:]])
    w, d, h = (hi_all - lo_all).T
    area = np.stack([d * h, d * h, w * h, w * h, w * d, w * d], 1)
    area[B, 4] = 0.0  # no ceiling
    cumulative = np.cumsum((area / area.sum(1, keepdims=True) * weight[:, None]).ravel())
    kept, total = [], 0
    while total < count:
        n = 2 * count
        box, face = np.divmod(np.searchsorted(cumulative, rng.uniform(0, cumulative[-1], n)), 6)
        box = np.minimum(box, B)
        xyz = lo_all[box] + rng.uniform(0, 1, (n, 3)) * (hi_all - lo_all)[box]
        axis = face // 2
        xyz[np.arange(n), axis] = np.where(face % 2 == (box < B), hi_all[box, axis], lo_all[box, axis])
        probe = xyz + 0.004 * NORMALS[face]
        hidden = np.ones((n, B), bool)
        for k in range(3):
            hidden &= (probe[:, k, None] > lo[:, k]) & (probe[:, k, None] < hi[:, k])
        seen = ~hidden.any(1) & (probe > bounds[0]).all(1) & (probe < bounds[1]).all(1)
        kept.append((xyz[seen], box[seen], face[seen]))
        total += int(seen.sum())
    return tuple(np.concatenate(part)[:count] for part in zip(*kept, strict=True))


def _paint(palette, face, xyz, boards, rng):
    """Colours [P, 3] uint8: palette [F, 3] of the faces [P], boards on the floor (the last face), slight noise."""
    colour = palette[face] + rng.integers(-5, 6, (len(face), 1), dtype=np.int8)
    floor = np.flatnonzero(face == len(palette) - 1)
    row = np.floor(xyz[floor, 1] * 5).astype(int)
    column = np.floor(xyz[floor, 0] * 0.8 + boards[row % 64] * 0.1).astype(int)
    colour[floor] += boards[(row * 7 + column * 13) % 64, None]
    return np.clip(colour, 0, 255).astype(np.uint8)


def room(seed: int, objects: int | None = None, views: int = 12, size: int = 96, points: int = 4096) -> Scene:
    """A furnished room around x = y = 0; the same seed gives the same room on every machine.

    objects: how many, door and window included (default 8 to 16); the room grows with them. views of size x size
    pixels; views = 0 or points = 0 leave the frames or the cloud out. Object boxes are the exact extent of their parts
    and disjoint (small things stand exactly on the tops of big ones); no two objects share category and colour. Half of
    the cloud lies on objects, shared by the root of their surface, so that small ones have points too; superpoints are
    the faces of parts, cut at every metre. Raises ValueError for a number of objects that cannot be furnished.
    """
    most = len(CATEGORIES) * len(COLOURS) * 2 // 3  # beyond, too few pairs of category and colour are left
    if objects is not None and not 3 <= objects <= most:
        raise DataError(f"room: objects = {objects}; give 3 to {most}")
    rng = np.random.Generator(np.random.PCG64(seed))
    count, side, height = int(rng.integers(8, 17)), rng.uniform(4.0, 6.5, 2), 2.6
    if objects is not None:
        count, side = objects, side * max(1.0, np.sqrt(1.3 * objects / (side[0] * side[1])))
    while (placed := _furnish(rng, count, side, height)) is None:
        side = side * 1.08
    placed = [placed[i] for i in rng.permutation(count)]  # an id says nothing about the category
    low, high = (np.array([f(p[k], 0) for p in placed]) for f, k in ((np.min, 2), (np.max, 3)))
    boxes = np.concatenate([(low + high) / 2, high - low], 1)
    things = [Thing(i + 1, p[0], p[1], boxes[i]) for i, p in enumerate(placed)]
    bounds = np.array([[*-side / 2, 0.0], [*side / 2, height]])
    scene = Scene(f"room{seed:06d}", "rooms", things, bounds=bounds)

    lo, hi = np.concatenate([p[2] for p in placed]), np.concatenate([p[3] for p in placed])  # [B, 3] of all parts
    owner = np.append(np.repeat(np.arange(1, count + 1), [len(p[2]) for p in placed]), 0)  # [B + 1], the room is 0
    own = [np.array(COLOURS[p[1]]) + rng.integers(-8, 9, 3) for p in placed]
    rgb = [MATERIALS.get(m, c) for p, c in zip(placed, own, strict=True) for m in PARTS[p[0]][1]]
    warm = rng.integers(-8, 9)
    wall = np.array([212 + warm, 208, 202 - warm]) - rng.integers(22)
    floor = ((158, 128, 98), (140, 122, 104), (176, 152, 122), (150, 150, 146), (122, 104, 88))[rng.integers(5)]
    shell = [*np.outer([0.94, 0.98, 0.92, 1.0], wall), (236, 236, 232), floor]
    palette = np.concatenate([(np.array(rgb)[:, None] * SHADE[:, None]).reshape(-1, 3), shell]).astype(np.int16)
    boards = rng.integers(-10, 11, 64).astype(np.int16)

    if views:
        poses = _cameras(rng, views, side, low, high)
        cast = [ray_cast(lo, hi, pose, size, bounds) for pose in poses]
        depth, box, face, xyz = (np.concatenate(a) for a in zip(*cast, strict=True))
        focal, shape = size / 2 / HALF_FOV, (views, size, size)
        intrinsics = np.tile([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]], (views, 1, 1))
        colour = _paint(palette, 6 * box + face, xyz, boards, rng).reshape(*shape, 3)
        masks = owner[box].astype(np.int32).reshape(shape)
        scene.frames = Frames(colour, depth.reshape(shape), masks, intrinsics, poses)
    if points:
        w, d, h = (hi - lo).T
        area = w * d + d * h + w * h
        total = np.bincount(owner[:-1], area)[1:]  # [count]
        share = np.sqrt(total) / np.cumsum(np.sqrt(total))[-1]
        weight = np.append(area * (share / total)[owner[:-1] - 1], 1.0)
        xyz, box, face = _sample_surface(lo, hi, bounds, weight, points, rng)
        scene.points, scene.normals, scene.instances = xyz.astype(np.float32), NORMALS[face], owner[box]
        scene.colours = _paint(palette, 6 * box + face, xyz, boards, rng)
        cell = np.floor(xyz).astype(np.int64) + 512
        piece = ((6 * box + face) * 1024 + cell[:, 0]) * 1024 + cell[:, 1] + (cell[:, 2] << 50)
        scene.superpoints = np.unique(piece, return_inverse=True)[1].reshape(-1)
    return scene


def _room(job: tuple[int, Callable | None, dict]):
    seed, then, options = job
    scene = room(seed, **options)
    return then(scene) if then else scene


def rooms(seeds: Iterable[int], workers: int = 2, then: Callable | None = None, **options) -> list:
    """`room(seed, **options)` for all seeds in their order, made by `workers` forked processes (0: in this one).

    then: a module's function that a worker applies to its scene; what it returns is kept in the scene's place (1,000
    scenes with frames are 1.4 GB). Workers use numpy's elementwise functions only, so each keeps to one thread and
    forking a process that runs threads is safe.
    """
    jobs = [(int(seed), then, options) for seed in seeds]
    if workers < 2 or len(jobs) < 8 or "fork" not in multiprocessing.get_all_start_methods():
        return [_room(job) for job in jobs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about forking with threads, see above
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            return list(pool.imap(_room, jobs, chunksize=min(16, -(-len(jobs) // (4 * workers)))))


def category_icon(category: str, colour: str, size: int) -> np.ndarray:
    """The category's furniture alone on black in a three-quarter view that fills the image: [size, size, 3] uint8.

    The paper embeds categories from drawn icons (Proxy3D); a category outside the table is drawn as a plain cube.
    Raises ValueError for a colour that is not in COLOURS.
    """
    if colour not in COLOURS:
        raise ValueError(f"category_icon: colour {colour!r} is not one of {', '.join(COLOURS)}")
    lo, hi = _corners(category, np.array(FURNITURE.get(category, (1.0, 1.0, 1.0))[:3]), 0)
    pose, half_fov = _look(np.array([[0.6, 0.8, 0.5]]), np.zeros((1, 3)))[0], 0.35
    corner = np.array([[(lo, hi)[i][:, 0], (lo, hi)[j][:, 1], (lo, hi)[k][:, 2]] for i, j, k in np.ndindex(2, 2, 2)])
    x, y, z = ((corner * pose[:3, k, None]).sum(1) for k in range(3))  # [8, m] along the camera's axes
    # the nearest eye e for which |x - ex| <= s (z - ez) and |y - ey| <= s (z - ez) hold for all corners
    s = 0.94 * half_fov
    (x0, x1), (y0, y1) = (((q - s * z).max(), (-q - s * z).max()) for q in (x, y))
    eye = np.array([(x0 - x1) / 2, (y0 - y1) / 2, -max(x0 + x1, y0 + y1) / (2 * s)])
    pose[:3, 3] = (pose[:3, :3] * eye).sum(1)
    _, box, face, _ = ray_cast(lo, hi, pose, size, half_fov=half_fov)
    rgb = np.array([MATERIALS.get(m, COLOURS[colour]) for m in PARTS.get(category, CUBE)[1]])[:, None] * SHADE[:, None]
    image = np.where(box[:, None] < 0, 0, rgb[box, face])
    return image.astype(np.uint8).reshape(size, size, 3)


# ---- 4 questions and baselines ---------------------------------------------------------------------------------------

# Wordings per template: content words close to the answer, since anything between is one more hop for a small model.
# {what}, {other}, {at}, {facing} are descriptions ("red chair"), {a} and {b} are marks.
AT = "i am standing at the {at} facing the {facing}.", "i stand at the {at} and look at the {facing}.", \
     "from the {at} i face the {facing}."  # fmt: skip
TEMPLATES: dict[str, tuple[str, ...]] = {
    "ground": ("which one is the {what}?", "find the {what}.", "which object is the {what}?", "point to the {what}."),
    "multi": ("find all {what}.", "which objects are {what}?", "point to all {what}."),
    "id_category": ("what is {a}?", "what kind of thing is {a}?", "name {a}."),
    "id_colour": ("what colour is {a}?", "which colour has {a}?", "name the colour of {a}."),
    "id_size": ("is {a} larger than {b}?", "is {a} bigger than {b}?", "has {a} more volume than {b}?"),
    "coordinate": ("where is {a}?", "what is the position of {a}?", "give the coordinates of {a}."),
    "relation": ("where is {a} relative to {b}?", "on which side is {a} of {b}?", "which way is {a} from {b}?"),
    "distance_ids": ("how far is {a} from {b}?", "what is the distance of {a} from {b}?",
                     "how many metres is {a} from {b}?"),
    "subtract": ("{numbers} =",),
    "norm": ("{numbers} =",),
    "colour": ("what colour is the {what}?", "which colour has the {what}?", "name the colour of the {what}."),
    "what_colour": ("what is {what}?", "which thing is {what}?", "what kind of thing is {what}?"),
    "what_on": ("what is on the {what}?", "what stands on the {what}?", "which thing is on the {what}?"),
    "what_near": ("what is nearest to the {what}?", "what is closest to the {what}?", "what is next to the {what}?"),
    "where_support": ("what does the {what} stand or hang on?", "what is the {what} on?", "what holds the {what}?"),
    "where_near": ("where is the {what}?", "where can i find the {what}?", "near what is the {what}?"),
    "count": ("how many {what} are there?", "count the {what}.", "what is the number of {what}?"),
    "exist": ("is there {what}?", "do you see {what}?", "does the room have {what}?"),
    "situated_side": tuple(f"{at} is the {{what}} on my left or right?" for at in AT),
    "situated_depth": tuple(f"{at} is the {{what}} in front of me or behind me?" for at in AT),
    "situated_turn": tuple(f"{at} must i turn around to see the {{what}}?" for at in AT),
    "distance": ("how far is the {what} from the {other}?", "what is the distance of the {what} from the {other}?",
                 "how many metres is the {what} from the {other}?"),
    "size_height": ("how tall is the {what}?", "how high in metres is the {what}?", "give the height of the {what}."),
    "size_length": ("how long is the {what}?", "how many metres long is the {what}?", "give the length of the {what}."),
    "caption": ("describe {a}.", "give a description of {a}.", "tell me about {a}."),
    "vsi_counting": ("how many {what} are in this room?", "how many {what} do you count here?",
                     "what is the number of {what} in this room?"),
    "vsi_abs_distance": ("from closest point to closest point, how many metres are between the {what} and the {other}?",
                         "what is the shortest distance in metres between the {what} and the {other}?",
                         "how wide in metres is the gap between the {what} and the {other}?"),
    "vsi_object_size": ("in centimetres, how long is the longest side (length, width or height) of the {what}?",
                        "how many centimetres measures the longest dimension of the {what}?",
                        "give in centimetres the largest of length, width and height of the {what}."),
    "vsi_room_size": ("how many square metres has this room?", "what is the floor area of this room in square metres?",
                      "give the size of this room in square metres."),
    "vsi_rel_distance": ("measured between closest points, which of these is closest to the {what}? {options}",
                         "by their closest points, which of these is nearest to the {what}? {options}",
                         "which of these has the narrowest gap to the {what}? {options}"),
    "vsi_rel_direction": tuple(f"{at} {{note}}where is the {{what}}? {{options}}" for at in AT),
    "vsi_route": tuple(f"{at} i go to the {{what}}: {{actions}}. which turns are missing? {{options}}" for at in AT),
    "vsi_order": ("in which order do these first appear in the video: {what}? {options}",
                  "what is the order of first appearance in the video of {what}? {options}",
                  "of {what}, which is seen first in the video, and which next? {options}"),
}  # fmt: skip
FLOOR, WALL, NOTHING = -1, -2, -3  # in Facts.support
STRUCTURE = {"wall", "floor", "ceiling"}  # in labelled scans these are instances too; no question is about them
BUILT = {"door", "window"}  # parts of walls: where they are is not asked
PLURALS = {"shelf": "shelves", "bookshelf": "bookshelves", "clothes": "clothes"}
SYNONYMS = {"couch": "sofa", "refrigerator": "fridge", "trash": "bin", "television": "tv", "painting": "picture",
            "carpet": "rug", "light": "lamp", "closet": "wardrobe", "night": "nightstand"}  # fmt: skip
WORDS = "a an the thing things on near from floor wall yes no this there it is turn then go forward to back means at " \
        "least degrees a b c d"  # the words that code below writes besides those of the tables
DECIDED = 0.15  # metres by which the nearest must beat the second (VSI-Bench's threshold)
# How one of several is told from the rest: (rows [r, n] in all of which it must have the smallest number, by how much).
RELATIONS = {
    "nearest to": (lambda f, anchor: f.apart[:, anchor], DECIDED),
    "farthest from": (lambda f, anchor: -f.apart[:, anchor], DECIDED),
    "on": (lambda f, anchor: (f.support != anchor)[None] * 1.0, 1.0),
}
EXTREMES = {
    "largest": (lambda f, _: -f.measures[:1], 0.405), "smallest": (lambda f, _: f.measures[:1], 0.405),
    "tallest": (lambda f, _: -f.measures[1:2], 0.1), "shortest": (lambda f, _: f.measures[1:2], 0.1),
    "highest": (lambda f, _: -f.measures[2:], 0.1), "lowest": (lambda f, _: f.measures[2:], 0.1),
}  # fmt: skip
SELECT = RELATIONS | EXTREMES
# Forms of a question about a group: which (category, colour) keys it means.
FORMS = {"category": lambda key: not key[1], "colour": lambda key: not key[0], "pair": all}
SIDES = (("left", "right"), ("front", "behind"), ("below", "above"))  # per axis: negative, positive
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "front": (1, -1), "back": (1, 1)}  # where to move: axis, sign; seen as
#                                                                                   `side_of` does, looking along +y
# Directions from a situation: answers, degrees between them, margin in degrees, answer from |degrees| and side.
HEADINGS = {
    "side": (("left", "right"), (0, 180), 20, lambda a, side: side),
    "depth": (("front", "behind"), (90,), 20, lambda a, side: "front" if a < 90 else "behind"),
    "turn": (("no", "yes"), (90,), 20, lambda a, side: "no" if a < 90 else "yes"),
    "easy": (("left", "right"), (0, 180), 15, lambda a, side: side),  # these three: VSI-Bench's
    "medium": (("left", "right", "back"), (0, 135), 15, lambda a, side: "back" if a > 135 else side),
    "hard": (("front-left", "front-right", "back-left", "back-right"), (0, 90, 180), 15,
             lambda a, side: ("front-" if a < 90 else "back-") + side),
}  # fmt: skip
# Numbers read off boxes: template -> (how many things, number in the unit asked for, how it is written).
MEASURES = {
    "size_height": (1, lambda f, i: f.boxes[i, 5], "{:.2f}"),
    "size_length": (1, lambda f, i: f.boxes[i, 3:5].max(), "{:.2f}"),
    "vsi_object_size": (1, lambda f, i: 100 * f.boxes[i, 3:].max(), "{:.0f}"),
    "vsi_abs_distance": (2, lambda f, i, j: f.apart[0, i, j], "{:.2f}"),
    "vsi_room_size": (0, lambda f: np.diff(f.bounds[:, :2], axis=0).prod(), "{:.0f}"),
}  # fmt: skip
# Words read off things: template -> (places that may be asked about, the answer, "" = unclear).
LOOKUPS = {
    "colour": (lambda f: f.unique, lambda f, i: f.things[i].colour),
    "what_colour": (lambda f: [m[0] for (c, _), m in f.groups.items() if not c and len(m) == 1],
                    lambda f, i: f.things[i].category),
    "what_on": (lambda f: [i for i in f.unique if np.count_nonzero(f.support == i) == 1],
                lambda f, i: f.things[int(np.argmax(f.support == i))].category),
    "what_near": (lambda f: f.unique, lambda f, i: f.category(f.select("nearest to", range(len(f.things)), i))),
    "where_support": (lambda f: f.movable, lambda f, i: f.spot(i)),
    "where_near": (lambda f: [i for i in f.movable if f.support[i] == FLOOR], lambda f, i: f.neighbour(i)),
}  # fmt: skip


def plural(noun: str) -> str:
    return PLURALS.get(noun) or noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def phrase(category: str, colour: str, many: bool = False) -> str:
    """A group of things in words, "" = any: "red chair", "chairs", "red thing"."""
    noun = category or "thing"
    return f"{colour} {plural(noun) if many else noun}".lstrip()


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def mark(thing: Thing) -> str:
    return f"<obj {thing.id}>"


def metres(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # + 0.0: never "-0.00"


def listed(values: Iterable[float]) -> str:
    """A point or a box as text: "[1.25, -0.80, 0.45]"."""
    return f"[{', '.join(map(metres, values))}]"


def pick(rng: np.random.Generator, items: Sequence):
    """One item drawn uniformly, None of nothing (much cheaper than rng.choice; 256 questions are made a step)."""
    return items[int(rng.random() * len(items))] if len(items) else None


def several(rng: np.random.Generator, items: Sequence, count: int) -> list:
    """`count` different items in random order, [] where there are fewer."""
    return [items[i] for i in rng.permutation(len(items))[:count].tolist()] if len(items) >= count else []


def bearing(at: np.ndarray, facing: np.ndarray, what: np.ndarray) -> float:
    """Degrees in -180..180, left positive, that one who stands `at` and looks at `facing` must turn to see `what`."""
    (ax, ay), (bx, by) = (facing - at)[:2].tolist(), (what - at)[:2].tolist()
    return math.degrees(math.atan2(ax * by - ay * bx, ax * bx + ay * by))


class Facts:
    """What questions ask of one scene, worked out once; a thing is named by its place i in `things`.

    groups: (category, colour) -> places, "" = any. Reached by `facts(scene)`."""

    def __init__(self, scene: Scene):
        self.objects, self.bounds, self.frames = scene.objects, scene.bounds, scene.frames  # not scene: no cycle
        self.things = [o for o in scene.objects if o.category not in STRUCTURE]
        self.numbered = [i for i, o in enumerate(self.things) if not scene.identifiers or o.id in scene.identifiers]
        self.is_numbered = set(self.numbered)
        self.groups: dict[tuple[str, str], list[int]] = defaultdict(list)
        for i, o in enumerate(self.things):
            both = ((o.category, o.colour),) if o.category and o.colour else ()
            for key in ((o.category, ""), ("", o.colour), *both):
                if any(key):
                    self.groups[key].append(i)
        self.groups.default_factory = None

    def number(self, category: str, colour: str) -> int:
        return len(self.groups.get((category, colour), ()))

    def category(self, i: int | None) -> str:
        return "" if i is None else self.things[i].category

    @cached_property
    def boxes(self) -> np.ndarray:
        """[n, 6] metres."""
        return np.array([o.box for o in self.things], dtype=float).reshape(-1, 6)

    @cached_property
    def measures(self) -> np.ndarray:
        """[4, n]: log volume, height, z of the top, z of the centre."""
        z, size = self.boxes[:, 2], self.boxes[:, 3:]
        return np.stack([np.log(np.maximum(size.prod(1), 1e-9)), size[:, 2], z + size[:, 2] / 2, z])

    @cached_property
    def apart(self) -> np.ndarray:
        """[2, n, n] metres between the closest points of two boxes, and between their centres."""
        between = np.abs(self.boxes[:, None, :3] - self.boxes[None, :, :3])
        size = self.boxes[:, 3:]
        gap = np.maximum(between - (size[:, None] + size[None]) / 2, 0)
        return np.sqrt(np.square(np.stack([gap, between])).sum(-1))

    @cached_property
    def support(self) -> np.ndarray:
        """[n] what each thing stands or hangs on (`carried`): FLOOR before all; else WALL, or the place of the one
        thing that carries it; NOTHING (unknown) where neither or both hold."""
        floor, wall, carries = carried(self.boxes, self.boxes, self.bounds)
        carries &= ~np.eye(len(carries), dtype=bool)
        count = carries.sum(1)
        found = np.where((count == 1) & ~wall, carries.argmax(1) if len(carries) else 0, NOTHING)
        return np.where(floor, FLOOR, np.where(wall & (count == 0), WALL, found))

    @cached_property
    def categories(self) -> list[str]:
        return [category for category, colour in self.groups if not colour]

    @cached_property
    def colours(self) -> list[str]:
        return [colour for category, colour in self.groups if not category]

    @cached_property
    def missing(self) -> list[str]:
        """Categories of rooms that nothing here has, not even by another name ("office chair", "couch")."""
        words = {w for category in self.categories for w in category.split()}
        return [c for c in CATEGORIES if c not in words | {SYNONYMS[w] for w in words if w in SYNONYMS}]

    @cached_property
    def names(self) -> dict[int, tuple[str, str]]:
        """Things that category, or category and colour (only colour without a category), tell from all others."""
        keys = {}
        for i, o in enumerate(self.things):
            key = (o.category, "" if o.category and self.number(o.category, "") == 1 else o.colour)
            if any(key) and self.number(*key) == 1:
                keys[i] = key
        return keys

    @cached_property
    def unique(self) -> list[int]:
        """The only things of their category."""
        return [i for i, (_, colour) in self.names.items() if not colour]

    @cached_property
    def movable(self) -> list[int]:
        return [i for i in self.unique if self.things[i].category not in BUILT]

    @cached_property
    def targets(self) -> dict[str, list[int]]:
        """Numbered things by the words that single them out."""
        pairs = {i: self.number(o.category, "") for i in self.numbered if (o := self.things[i]).category and o.colour
                 and self.number(o.category, o.colour) == 1}  # fmt: skip
        return {"named": [i for i in self.names if i in self.is_numbered], "ground": list(pairs),
                "ground_multiple": [i for i, alike in pairs.items() if alike > 1],
                "ground_category": [i for i in self.unique if i in self.is_numbered]}  # fmt: skip

    @cached_property
    def views(self) -> dict[int, list[int]]:
        """Thing -> the frames of which it fills 0.2 %, in order; those of none are left out."""
        seen, masks = defaultdict(list), self.frames.masks
        for v, mask in enumerate(masks):
            for object_id, pixels in zip(*(a.tolist() for a in np.unique(mask, return_counts=True)), strict=True):
                if pixels >= 0.002 * mask.size:
                    seen[object_id].append(v)
        return {i: seen[o.id] for i, o in enumerate(self.things) if o.id in seen}

    @cached_property
    def described(self) -> dict[int, str]:
        """The words for every thing that has some (`words`)."""
        return {i: words for i in range(len(self.things)) if (words := self.words(i))}

    def select(self, how: str, group: Iterable[int], anchor: int | None = None) -> int | None:
        """The one of the group that SELECT's rows single out ("nearest to" the anchor, "largest"); None: too close."""
        group = [i for i in group if i != anchor]
        if not group:
            return None
        rows, margin = SELECT[how]
        rows = rows(self, anchor)[:, group]
        best = int(rows[0].argmin())
        ahead = np.count_nonzero(rows - rows[:, best, None] >= margin)
        return group[best] if ahead == rows.size - len(rows) else None

    def words(self, i: int) -> str | None:
        """What `describe` says of a thing."""
        if i in self.names:
            return phrase(*self.names[i])
        thing, everything = self.things[i], range(len(self.things))
        tries = [(how, (thing.category, ""), anchor) for how in RELATIONS for anchor in self.unique if thing.category]
        tries += [(how, key, None) for key in ((thing.category, ""), ("", thing.colour), ("", "")) for how in EXTREMES]
        fits = (t for t in tries if self.select(t[0], self.groups.get(t[1], everything), t[2]) == i)
        found = next(fits, None)
        return found and selection(self, *found)

    def spot(self, i: int) -> str:
        """What a thing stands or hangs on: "on the desk", "on the floor", "on the wall"; "" = unknown."""
        j = int(self.support[i])
        name = {FLOOR: "floor", WALL: "wall", NOTHING: ""}.get(j) if j < 0 else self.things[j].category
        return f"on the {name}" if name else ""

    def neighbour(self, i: int) -> str:
        """What a thing on the floor is near: "near the bed", the nearest of the others there; "" = unclear."""
        name = self.category(self.select("nearest to", np.flatnonzero(self.support == FLOOR).tolist(), i))
        return f"near the {name}" if name else ""


def facts(scene: Scene) -> Facts:
    """The scene's Facts, kept with the scene; `dataclasses.replace` (augment) leaves them behind, as it must."""
    known = scene.__dict__.get("facts")
    if known is None or known.objects is not scene.objects:
        known = scene.__dict__["facts"] = Facts(scene)
    return known


def selection(f: Facts, how: str, key: tuple[str, str], anchor: int | None) -> str:
    """ "chair nearest to the bed", "largest red thing"."""
    return f"{how} {phrase(*key)}" if anchor is None else f"{phrase(*key)} {how} the {f.things[anchor].category}"


def describe(scene: Scene, thing: Thing) -> str | None:
    """Words that fit this thing alone, to be put behind "the": "chair", "red chair", "chair nearest to the bed",
    "largest red thing"; None where nothing of that kind is unambiguous."""
    f = facts(scene)
    i = next((i for i, o in enumerate(f.things) if o.id == thing.id), None)
    return None if i is None else f.words(i)


def ask(scene: Scene, rng: np.random.Generator, task: str, answer: str, text: dict, slots: dict | None = None,
        template: str = "", wrong: Iterable[str] = (), **rest) -> Sample | None:  # fmt: skip
    """A Sample in one of the template's wordings: `text` fills it, `slots` are what a blind guess may know of it. With
    `wrong` answers it is a multiple choice, answered by a letter. None where metres are asked of an unknown scale."""
    if task in METRIC and not scene.metric:
        return None
    if wrong:
        texts = [answer, *wrong]
        order = rng.permutation(len(texts)).tolist()
        rest["options"] = [f"{'ABCD'[k]}. {texts[j]}" for k, j in enumerate(order)]
        text, answer = text | {"options": " ".join(rest["options"])}, "ABCD"[order.index(0)]
    template = template or task
    wordings = TEMPLATES[template]
    i = int(rng.random() * len(wordings))
    wording = f"{template}#{i}" + "".join([f"|{k}={v}" for k, v in slots.items()] if slots else ())
    return Sample("", scene.name, task, wordings[i].format(**text), answer, wording=wording, **rest)


def numbered(scene: Scene, rng: np.random.Generator, count: int = 1, named: bool = False) -> list[Thing] | None:
    """One or two different things, in random order, that have an identifier (`named`: and a description)."""
    f = facts(scene)
    n = f.targets["named"] if named else f.numbered
    if len(n) < count:
        return None
    i = int(rng.random() * len(n))
    return [f.things[j] for j in (n[i], n[i - 1 - int(rng.random() * (len(n) - 1))])[:count]]


# Every function below makes one Sample, or None where the scene (or this draw) cannot give an unambiguous one.


def ground(scene: Scene, rng: np.random.Generator, task: str) -> Sample | None:
    """One thing by category and colour (ground_category: by its unique category). ScanRefer's kinds: "unique" = the
    only thing of its category, "multiple" = not; ground_multiple asks only the latter."""
    f = facts(scene)
    i = pick(rng, f.targets[task])
    if i is None:
        return None
    o = f.things[i]
    key = (o.category, "" if task == "ground_category" else o.colour)
    kind = "unique" if f.number(o.category, "") == 1 else "multiple"
    return ask(scene, rng, task, mark(o), {"what": phrase(*key)}, {"category": key[0], "colour": key[1]}, "ground",
               targets=[o.id], kind=kind)  # fmt: skip


def ground_by(scene: Scene, rng: np.random.Generator, task: str) -> Sample | None:
    """ground_relation: one of several of a category by its relation to the only thing of another, "chair nearest to the
    table". ground_superlative: "largest red thing", "tallest chair", "lowest thing", which needs no category; what is
    alone in its group is asked for without ("red thing", kind "only")."""
    f = facts(scene)
    relation = task == "ground_relation"
    keys = [key for key, m in f.groups.items() if not relation or (len(m) > 1 and not key[1])]
    for _ in range(4):
        key, how = pick(rng, keys), pick(rng, tuple(RELATIONS if relation else EXTREMES))
        anchor = pick(rng, f.unique) if relation else None
        if relation and None in (key, anchor):
            return None
        key = key if key and (relation or rng.random() < 0.5) else ("", "")
        group = f.groups.get(key) or range(len(f.things))
        i = f.select(how, group, anchor)
        if i in f.is_numbered:
            alone = not relation and len(group) == 1
            text = phrase(*key) if alone else selection(f, how, key, anchor)
            slots = {"how": how, "category": f.things[i].category}
            return ask(scene, rng, task, mark(f.things[i]), {"what": text}, slots, "ground", targets=[f.things[i].id],
                       kind="only" if alone else how)  # fmt: skip
    return None


def absent(f: Facts, rng: np.random.Generator, form: str) -> tuple[str, str] | None:
    """A (category, colour) that nothing has. A pair is a hard negative: its category and its colour are both here."""
    colours = {"category": [""], "colour": list(COLOURS), "pair": f.colours}[form]
    categories = {"category": f.missing, "colour": [""], "pair": f.categories}[form]
    keys = ((pick(rng, categories), pick(rng, colours)) for _ in range(8))
    return next((key for key in keys if None not in key and key not in f.groups), None)


def multi(scene: Scene, rng: np.random.Generator) -> Sample | None:
    """All things of a category, colour or both (Multi3DRefer): "yes. <obj 1> <obj 4>", in the order of their
    identifiers, or "no.". Kinds: zt, st, mt = zero, one, several targets; w_d, wo_d = with, without distractors (other
    things of the category)."""
    f = facts(scene)
    kind = pick(rng, ("zt_w_d", "zt_wo_d", "st_w_d", "st_wo_d", "mt"))
    if kind[0] == "z":
        key = absent(f, rng, "pair" if kind == "zt_w_d" else pick(rng, ("category", "colour")[not f.categories :]))
    else:
        fits = {"mt": lambda key, n: n > 1, "st_wo_d": lambda key, n: n == 1 and not key[1],
                "st_w_d": lambda key, n: n == 1 and all(key) and f.number(key[0], "") > 1}[kind]  # fmt: skip
        key = pick(rng, [key for key, members in f.groups.items() if fits(key, len(members))])
    members = f.groups.get(key, [])
    if key is None or not f.is_numbered.issuperset(members):
        return None
    ids = sorted((f.things[i].id for i in members), key=lambda k: scene.identifiers.get(k, k))
    answer = f"yes. {' '.join(f'<obj {k}>' for k in ids)}" if ids else "no."
    return ask(scene, rng, "multi", answer, {"what": phrase(*key, many=True)}, {"category": key[0], "colour": key[1]},
               targets=ids, kind=kind)  # fmt: skip


def larger(a: Thing, b: Thing) -> str:
    """Whether the box of a has more volume, by half at least."""
    ratio = math.prod(a.box[3:].tolist()) / max(math.prod(b.box[3:].tolist()), 1e-9)
    return "yes" if ratio > 1.5 else "no" if ratio < 1 / 1.5 else ""


def side_of(a: Thing, b: Thing) -> str:
    """Where a is relative to b along the axis that separates their centres most (by half more than any other, 20 cm at
    least), for a viewer who looks along +y: x right, y behind (away from the viewer), z above."""
    apart = (a.box[:3] - b.box[:3]).tolist()
    second, most = sorted(map(abs, apart))[1:]
    axis = [abs(v) for v in apart].index(most)
    return SIDES[axis][apart[axis] > 0] if most >= max(0.2, 1.5 * second) else ""


MARKED = {"id_category": (1, lambda o: o.category), "id_colour": (1, lambda o: o.colour), "id_size": (2, larger),
          "relation": (2, side_of)}  # fmt: skip


def marked(scene: Scene, rng: np.random.Generator, task: str) -> Sample | None:
    """A word about one or two marked things (MARKED)."""
    things, word = MARKED[task]
    for chosen in filter(None, (numbered(scene, rng, things) for _ in range(4))):
        if answer := word(*chosen):
            return ask(scene, rng, task, answer, dict(zip("ab", map(mark, chosen), strict=False)))
    return None


def coordinate(scene: Scene, rng: np.random.Generator) -> Sample | None:
    """The centre of a thing's box in metres: "[1.25, -0.80, 0.45]"."""
    o = numbered(scene, rng)
    return o and ask(scene, rng, "coordinate", listed(o[0].box[:3].tolist()), {"a": mark(o[0])},
                     point=o[0].box[:3].copy())  # fmt: skip


def chain(a: Iterable[float], b: Iterable[float]) -> tuple[str, float]:
    """The steps of a distance, per axis both coordinates and their unsigned difference ("x1.25 x0.50 0.75 y-0.80 ..."),
    and the length that follows from the printed numbers."""
    parts, total = [], 0.0
    for axis, p, q in zip("xyz", a, b, strict=True):
        p, q = round(p, 2) + 0.0, round(q, 2) + 0.0
        parts.append(f"{axis}{p:.2f} {axis}{q:.2f} {abs(p - q):.2f}")
        total += (p - q) ** 2
    return " ".join(parts), math.sqrt(total)


def distance(scene: Scene, rng: np.random.Generator, task: str) -> Sample | None:
    """Metres from centre to centre, by marks (distance_ids) or by description; `value` is exact, `answer` follows from
    the printed steps: 1.4 cm apart at most. By description the steps first rewrite the question with marks."""
    a, b = numbered(scene, rng, 2, named=task == "distance") or (None, None)
    if a is None:
        return None
    p, q = a.box[:3].tolist(), b.box[:3].tolist()
    steps, length = chain(p, q)
    text, slots = {"a": mark(a), "b": mark(b)}, None
    if task == "distance":
        steps = f"{mark(a)} from {mark(b)}? {steps}"
        text, slots = {"what": describe(scene, a), "other": describe(scene, b)}, {"a": a.category, "b": b.category}
    return ask(scene, rng, task, metres(length), text, slots, steps=steps + " =", value=math.dist(p, q))


def drill(scene: Scene, rng: np.random.Generator, task: str) -> Sample | None:
    """Text only, from two random points inside the bounds (of the centres, where the scene has none). subtract:
    "x1.25 x0.50 =" -> "0.75"; norm: the nine numbers of a distance's steps -> the length."""
    centres = facts(scene).boxes[:, :3] if scene.bounds is None else scene.bounds
    if not len(centres):
        return None
    lo, hi = centres.min(0).tolist(), centres.max(0).tolist()
    numbers, length = chain(*([x + rng.random() * (y - x) for x, y in zip(lo, hi, strict=True)] for _ in range(2)))
    if task == "subtract":
        axis = 3 * int(rng.random() * 3)
        *pair, difference = numbers.split()[axis : axis + 3]
        numbers, length = " ".join(pair), float(difference)
    return ask(scene, rng, task, metres(length), {"numbers": numbers}, value=length)


def measure(scene: Scene, rng: np.random.Generator, task: str) -> Sample | None:
    """A number of MEASURES, at least 0.1; `value` and answer are in the unit asked for: size (height or the longer
    horizontal side, metres), and for the only things of their category vsi_abs_distance (closest points, metres) and
    vsi_object_size (longest side, cm); vsi_room_size (floor of the bounds, square metres) is asked of rooms only, since
    the bounds of a scan are not its walls."""
    f = facts(scene)
    template = pick(rng, [t for t in MEASURES if t.startswith(task)])
    things, number, form = MEASURES[template]
    chosen = several(rng, list(f.names) if task == "size" else f.unique, things)
    if len(chosen) < things or (not things and (scene.source != "rooms" or scene.bounds is None)):
        return None
    value = float(number(f, *chosen))
    text = {k: phrase(*f.names[i]) for k, i in zip(("what", "other"), chosen, strict=False)}
    slots = {k: f.things[i].category for k, i in zip(("what", "other"), chosen, strict=False)}
    return ask(scene, rng, task, form.format(value), text, slots, template, value=value,
               kind=template.removeprefix(task).strip("_")) if value >= 0.1 else None  # fmt: skip


def lookup(scene: Scene, rng: np.random.Generator, task: str) -> Sample | None:
    """An answer of LOOKUPS. colour: of the only chair. what: the category of the only red thing, of the only thing on
    the desk, of the thing nearest to the bed. where: what the only lamp stands or hangs on (`Facts.support`), or in
    other words what it is near (`Facts.neighbour`)."""
    f = facts(scene)
    template = pick(rng, [t for t in LOOKUPS if t.startswith(task)])
    places, word = LOOKUPS[template]
    asked = places(f)
    if template == "where_support":  # the answer is drawn first, or nearly all would be on the floor
        found = [f.spot(i) for i in asked]
        answer = pick(rng, list(dict.fromkeys(found)))
        asked = [i for i, a in zip(asked, found, strict=True) if a == answer]
    i = pick(rng, asked)
    answer = "" if i is None else word(f, i)
    if not answer:
        return None
    text = f.things[i].colour if template == "what_colour" else f.things[i].category
    return ask(scene, rng, task, answer, {"what": text}, {"what": text}, template, kind=template.partition("_")[2])


def exist(scene: Scene, rng: np.random.Generator) -> Sample | None:
    """Is there a red chair? The form is drawn before yes or no, so that the form gives nothing away."""
    f = facts(scene)
    form, yes = pick(rng, tuple(FORMS) if f.categories else ("colour",)), rng.random() < 0.5
    key = pick(rng, [key for key in f.groups if FORMS[form](key)]) if yes else absent(f, rng, form)
    return key and ask(scene, rng, "exist", "yes" if yes else "no", {"what": article(phrase(*key))},
                       {"form": form, "category": key[0], "colour": key[1]}, kind=form)  # fmt: skip


def count(scene: Scene, rng: np.random.Generator, task: str) -> Sample | None:
    """How many of a category, a colour or both. The number is drawn first, or small ones would win: from 0 up, for
    vsi_counting a category's from 2 up."""
    f = facts(scene)
    vsi = task == "vsi_counting"
    form = pick(rng, ("category", "colour", "category", "colour", "pair")) if f.categories else "colour"
    form = "category" if vsi else form
    keys = defaultdict(list, {} if vsi else {0: []})
    for key, members in f.groups.items():
        if FORMS[form](key) and len(members) > vsi:
            keys[len(members)].append(key)
    number = pick(rng, list(keys))
    key = absent(f, rng, form) if number == 0 else number and pick(rng, keys[number])
    return key and ask(scene, rng, task, str(number), {"what": phrase(*key, many=True)},
                       {"form": form, "category": key[0], "colour": key[1]}, value=float(number))  # fmt: skip


def caption(scene: Scene, rng: np.random.Generator) -> Sample | None:
    """What a thing is and where: "this is a red chair near the table."; accepted are paraphrases of the same facts."""
    f = facts(scene)
    i = pick(rng, [i for i in f.numbered if f.things[i].category])
    if i is None:
        return None
    o = f.things[i]
    spot = "" if o.category in BUILT else f.neighbour(i) if f.support[i] == FLOOR else f.spot(i)
    noun, tail = phrase(o.category, o.colour), f" {spot}." if spot else "."
    answers = [f"{start}{article(noun)}{tail}" for start in ("this is ", "", "there is ", "it is ")]
    return ask(scene, rng, "caption", answers[0], {"a": mark(o)}, targets=[o.id],
               answers=answers + ([f"the {noun} is {spot}."] if spot else []))  # fmt: skip


def walk(f: Facts, rng: np.random.Generator, things: Sequence[int], stops: int = 3) -> list[int]:
    """Different things, each at least 0.8 m from the one before and from the first on the floor plan; [] = no luck."""
    chosen = several(rng, things, stops)
    xy = f.boxes[chosen, :2].tolist()
    return chosen if all(math.dist(xy[i], xy[j]) >= 0.8 for i in range(1, len(xy)) for j in (0, i - 1)) else []


def heading(scene: Scene, rng: np.random.Generator, task: str) -> Sample | None:
    """Direction of a thing for one who stands by another and faces a third (HEADINGS): SQA3D's situations, or
    VSI-Bench's choices among the only things of their category. The answer is drawn first."""
    f = facts(scene)
    vsi = task == "vsi_rel_direction"
    kind = pick(rng, ("easy", "medium", "hard") if vsi else ("side", "depth", "turn"))
    answers, edges, margin, label = HEADINGS[kind]
    wanted = pick(rng, answers)
    for chosen in filter(None, (walk(f, rng, f.unique if vsi else list(f.names)) for _ in range(8))):
        angle = bearing(*f.boxes[chosen])
        clear = min(abs(abs(angle) - edge) for edge in edges) >= margin
        if clear and label(abs(angle), "left" if angle > 0 else "right") == wanted:
            at, facing, what = (phrase(*f.names[i]) for i in chosen)
            note = "back means at least 135 degrees to turn. " if kind == "medium" else ""
            return ask(scene, rng, task, wanted, {"at": at, "facing": facing, "what": what, "note": note},
                       {"kind": kind, "what": what}, task if vsi else f"situated_{kind}",
                       [a for a in answers if a != wanted] if vsi else (), kind=kind)  # fmt: skip
    return None


def vsi_rel_distance(scene: Scene, rng: np.random.Generator) -> Sample | None:
    """Which of four things is nearest to another (`Facts.select`)."""
    f = facts(scene)
    for anchor, *four in filter(None, (several(rng, f.unique, 5) for _ in range(4))):
        best = f.select("nearest to", four, anchor)
        if best is not None:
            what = f.things[anchor].category
            return ask(scene, rng, "vsi_rel_distance", f.things[best].category, {"what": what}, {"what": what},
                       wrong=[f.things[i].category for i in four if i != best])  # fmt: skip
    return None


def vsi_route(scene: Scene, rng: np.random.Generator) -> Sample | None:
    """The one or two turns missing from a walk over three or four things: left and right are 60 to 120 degrees, back is
    at least 150."""
    f = facts(scene)
    for path in filter(None, (walk(f, rng, f.unique, pick(rng, (3, 4))) for _ in range(8))):
        turns = []
        for a, b, c in zip(path, path[1:], path[2:], strict=False):
            angle = bearing(f.boxes[b], 2 * f.boxes[b] - f.boxes[a], f.boxes[c])
            side = "left" if angle > 0 else "right"
            turns.append(side if 60 <= abs(angle) <= 120 else "back" if abs(angle) >= 150 else "")
        if all(turns):
            names = [f.things[i].category for i in path]
            right, *wrong = ("turn " + ", turn ".join(t) for t in (turns, *itertools.product(("left", "right", "back"),
                             repeat=len(turns))) if t != tuple(turns))  # fmt: skip
            actions = "go forward to the " + ", then turn (?), then go forward to the ".join(names[1:])
            return ask(scene, rng, "vsi_route", right, {"at": names[0], "facing": names[1], "what": names[-1],
                       "actions": actions}, {"turns": len(turns)}, wrong=several(rng, wrong, min(3, len(wrong))),
                       kind=f"{len(turns)} turns")  # fmt: skip
    return None


def vsi_order(scene: Scene, rng: np.random.Generator) -> Sample | None:
    """Order in which four things first appear in the frames (`Facts.views`), each in another frame."""
    f = facts(scene)
    first = defaultdict(list)
    for i in f.unique if scene.frames else ():
        if i in f.views:
            first[f.views[i][0]].append(f.things[i].category)
    seen = [pick(rng, first[v]) for v in sorted(several(rng, sorted(first), 4))]
    if not seen:
        return None
    right, *wrong = map(", ".join, itertools.permutations(seen))
    return ask(scene, rng, "vsi_order", right, {"what": ", ".join(several(rng, seen, 4))}, wrong=several(rng, wrong, 3))


TASKS: dict[str, Callable[[Scene, np.random.Generator], Sample | None]] = {
    "multi": multi, "coordinate": coordinate, "exist": exist, "caption": caption,
    "vsi_rel_distance": vsi_rel_distance, "vsi_route": vsi_route, "vsi_order": vsi_order,
    **{task: partial(make, task=task) for make, tasks in (
        (ground, ("ground", "ground_multiple", "ground_category")), (marked, MARKED),
        (ground_by, ("ground_relation", "ground_superlative")), (distance, ("distance", "distance_ids")),
        (drill, ("subtract", "norm")), (lookup, ("colour", "what", "where")), (count, ("count", "vsi_counting")),
        (measure, ("size", "vsi_object_size", "vsi_abs_distance", "vsi_room_size")),
        (heading, ("situated", "vsi_rel_direction")),
    ) for task in tasks},
}  # fmt: skip
METRIC = {"coordinate", "distance_ids", "distance", "subtract", "norm", "size", "vsi_abs_distance", "vsi_object_size",
          "vsi_room_size"}  # fmt: skip
NEVER_TRAINED = {"vsi_route", "vsi_order"}  # asked in evaluation only, as in the paper
# what an unlabelled scene can be asked: no category needed, colour where there is one
GEOMETRY_TASKS = ("coordinate", "distance_ids", "relation", "id_size", "id_colour", "ground_superlative", "distance",
                  "size")  # fmt: skip
UNLABELLED = ("ground_superlative", "id_colour", "id_size")  # what stands in there for a question that needs a name


def adopt(paper) -> None:
    """Take a paper's own question types among the shared ones: its TASKS and, where it has them, its TEMPLATES (their
    wordings), METRIC and NEVER_TRAINED. Whoever runs that paper calls this; importing it changes nothing."""
    TASKS.update(paper.TASKS)
    TEMPLATES.update(getattr(paper, "TEMPLATES", {}))
    METRIC.update(getattr(paper, "METRIC", ()))
    NEVER_TRAINED.update(getattr(paper, "NEVER_TRAINED", ()))


def refusal(scene: Scene, task: str) -> str | None:
    """Why a task cannot be asked of a scene at all, in one line; None = it can."""
    if task in METRIC and not scene.metric:
        return f"{task}: scene {scene.name} has no metric scale; give poses, depth or a known length"
    return None


def vocabulary(categories: Iterable[str] = CATEGORIES) -> list[str]:
    """Every word that a question, its steps or its answer may hold, for a tokenizer that knows only whole words."""
    parts = [w for wordings in TEMPLATES.values() for w in wordings]
    parts += [w for c in categories if c for w in (c, plural(c))]
    parts += [*COLOURS, *SELECT, *itertools.chain(*SIDES, *(row[0] for row in HEADINGS.values())), WORDS]
    return sorted({w for text in parts for w in re.findall(r"[a-z]+", re.sub(r"\{\w+\}", " ", text))})


def questions(scene: Scene, mix: dict[str, float], count: int, rng: np.random.Generator) -> list[Sample]:
    """`count` questions, tasks drawn by the weights of `mix`. A draw that the scene cannot give is replaced by another,
    four per question at most, so a poor scene may give fewer."""
    names, edges = list(mix), np.cumsum(list(mix.values()))
    samples = []
    for k in np.searchsorted(edges, rng.random(4 * count) * edges[-1], side="right").tolist():
        sample = TASKS[names[k]](scene, rng) if len(samples) < count else None
        if sample is not None:
            sample.id = f"{scene.name}/{sample.task}/{len(samples)}"
            samples.append(sample)
    return samples


def question_set(scenes: Iterable[Scene], tasks: Iterable[str], per_scene: int, seed: int) -> list[Sample]:
    """The evaluation's questions: per scene and task up to `per_scene` different ones. Every (scene, task) has a random
    stream of its own, so a subset of scenes or tasks gets the same questions."""
    samples, tasks = [], list(tasks)
    for scene in scenes:
        for task in tasks:
            rng = np.random.default_rng([seed, zlib.crc32(scene.name.encode()), zlib.crc32(task.encode())])
            found: dict[str, Sample] = {}
            for _ in range(8 * per_scene):
                sample = TASKS[task](scene, rng)
                if sample and sample.question not in found and len(found) < per_scene:
                    sample.id = f"{scene.name}/{task}/{len(found)}"
                    found[sample.question] = sample
            samples += found.values()
    return samples


# Baselines: what a score must be seen against.


def backoff(sample: Sample) -> list[str]:
    """What a blind guess conditions on, most specific first: the wording, its template with all slots, with fewer and
    fewer of them, the bare template, the task."""
    head, *slots = sample.wording.split("|")
    template = head.split("#")[0]
    keys = ["|".join([template, *slots[:n]]) for n in range(len(slots), -1, -1)]
    return list(dict.fromkeys([sample.wording, *keys, sample.task]))


def blind_content(sample: Sample) -> str:
    """The answer without what cannot be known blindly: an option's text for its letter, nothing for marks."""
    chosen = [o.partition(". ")[2] for o in sample.options or () if o.startswith(sample.answer + ".")]
    return chosen[0] if chosen else MARK.sub("", sample.answer).strip()


class Blind:
    """Answers without looking at the scene: the most frequent training answer of the same wording, backing off slot by
    slot until at least `least` training questions share it; the median of metres, the mean of points and boxes, and
    for marks an arbitrary object of the scene."""

    def __init__(self, samples: Iterable[Sample], least: int = 5):
        self.least, self.seen, self.cache = least, defaultdict(list), {}
        for s in samples:
            for key in backoff(s):
                self.seen[key].append(s)

    def answers(self, task: str, most: int = 200) -> list[str]:
        """Distinct training answers of a task, evenly thinned to `most`: what `chance` draws from."""
        distinct = sorted({s.answer for s in self.seen.get(task, ())})
        return distinct[:: -(-len(distinct) // most) or 1]

    def _best(self, key: str) -> tuple[Counter, str]:
        seen = self.seen[key]  # of the task most common among them: one wording may serve several
        task = Counter(s.task for s in seen).most_common(1)[0][0]
        seen = [s for s in seen if s.task == task]
        counts = Counter(map(blind_content, seen))
        for place in ("point", "box"):
            if getattr(seen[0], place) is not None:
                return counts, listed(np.mean([getattr(s, place) for s in seen], axis=0))
        if seen[0].task in METRIC:
            decimals = len(seen[0].answer.partition(".")[2])
            return counts, f"{np.median([s.value for s in seen]):.{decimals}f}"
        return counts, min(counts, key=lambda a: (-counts[a], a))

    def predict(self, sample: Sample, scene: Scene) -> str:
        """The blind answer; "" where training had no question of the task."""
        keys = backoff(sample)
        key = next((k for k in keys if len(self.seen.get(k, ())) >= self.least), keys[-1])
        if key not in self.seen:
            return ""
        counts, text = self.cache.get(key) or self.cache.setdefault(key, self._best(key))
        if sample.options:
            return max(sample.options, key=lambda o: counts[o.partition(". ")[2]]).partition(".")[0]
        if sample.targets is not None and sample.task != "caption" and text != "no." and (n := facts(scene).numbered):
            return f"{text} {mark(facts(scene).things[n[zlib.crc32(sample.id.encode()) % len(n)]])}".strip()
        return text


PAIRS = ({"yes", "no"}, {"left", "right"}, {"front", "behind"})


def chance(sample: Sample, scene: Scene, answers: Sequence[str] = (),
           score: Callable[[str], float] | None = None) -> float:  # fmt: skip
    """Expected score of a guess drawn uniformly from what the very question allows: the numbered objects of the scene
    (for "multi" also "no"; one object against m targets has F1 2 / (1 + m)), the options, the two of a pair such as yes
    and no, else the task's training `answers` (`Blind.answers`), scored by `score` (default: exact match)."""
    n = len(facts(scene).numbered)
    if sample.task == "multi":
        m = len(sample.targets)
        return (2 * m / (1 + m) if m else 1.0) / (n + 1)
    if sample.task.startswith("ground"):
        return 1 / n
    if sample.options:
        return 1 / len(sample.options)
    if any(sample.answer in pair for pair in PAIRS) and sample.task != "relation":
        return 0.5
    score = score or (lambda text: float(text in (sample.answers or [sample.answer])))
    return sum(map(score, answers)) / len(answers) if answers else 0.0


# ---- 5 text ----------------------------------------------------------------------------------------------------------

SCENE, PROMPT = -1, -2  # placeholder ids for scene tokens and for a question's own click or box; never in a vocabulary
IGNORE = -100  # label of a position that carries no loss
NUMBERS = {"x": (-8, 8), "y": (-8, 8), "z": (-1, 4), "w": (0, 8), "d": (0, 8), "h": (0, 4), "l": (0, 16)}  # metres
BINS = 16  # number tokens per metre: 6.25 cm
PIECE = re.compile(r"<obj\d{3}>|\[[^\[\]]*\]|[xyzwdh][+-]?\d+\.\d+|-?\d+\.\d+|\d+|[a-z]+(?:'[a-z]+)?|[^\sa-z0-9]")


TUPLE = re.compile(r"\[([^\[\]]{1,200})\]")


def tuples(text: str, size: int) -> list[np.ndarray | None]:
    """Every bracketed list of `size` entries, [size] float each; None where an entry is not a finite number."""
    found = []
    for inside in TUPLE.findall(text):
        entries = re.split(r"[,;\s]+", inside.strip())
        if len(entries) == size:
            try:
                values = np.array([float(e) for e in entries])
            except ValueError:
                values = np.full(size, np.nan)
            found.append(values if np.isfinite(values).all() else None)
    return found


class TinyText:
    """Word-level text for models trained from scratch: one token per word, identifier, punctuation mark or number.

    Text is lower-cased. Metres become number tokens, one per 1/16 m and axis: a bracketed triple "[1.25, -0.80, 0.45]"
    is an x, a y and a z token (a six-tuple adds w d h), "x1.25" names its axis, any other decimal is a length. A number
    outside its axis' range is written as the range's end. A pre-trained model needs none of this: its digits already
    carry meaning (`HubText`). Words outside the vocabulary become <unk>; `unknown(text)` lists them.
    """

    template = ("", "", "")  # text before the scene tokens, between scene and question, between question and answer

    def __init__(self, words: Iterable[str]):
        identifiers = [f"<obj{i:03d}>" for i in range(100)]
        numbers = [f"{a}#{i}" for a, (lo, hi) in NUMBERS.items() for i in range((hi - lo) * BINS + 1)]
        pieces = ["<pad>", "<eos>", "<unk>", *identifiers, *numbers, *(str(i) for i in range(301)), *".,?!:;=-()"]
        self.pieces = list(dict.fromkeys([*pieces, *sorted(set(words))]))
        self.index = {p: i for i, p in enumerate(self.pieces)}
        self.pad, self.eos, self.unk = 0, 1, 2
        number = lambda p: (p[0], NUMBERS[p[0]][0] + int(p[2:]) / BINS)  # noqa: E731
        self.number = {i: number(p) for i, p in enumerate(self.pieces) if p[1:2] == "#"}

    @classmethod
    def train(cls, texts: Iterable[str]) -> TinyText:
        """Vocabulary = every word of the texts."""
        return cls({p for t in texts for p in PIECE.findall(t.lower()) if p.isalpha() or "'" in p})

    def __len__(self) -> int:
        return len(self.pieces)

    def _number(self, axis: str, value: float) -> int:
        lo, hi = NUMBERS[axis]
        return self.index[f"{axis}#{min(max(round((value - lo) * BINS), 0), (hi - lo) * BINS)}"]

    def encode(self, text: str) -> list[int]:
        ids = []
        for p in PIECE.findall(text.lower()):
            if p in self.index:
                ids.append(self.index[p])
            elif p[0] == "[":
                values = re.findall(r"-?\d+\.?\d*", p)
                axes = "xyzwdh"[: len(values)] if len(values) in (3, 6) else "l" * len(values)
                ids += [self._number(a, float(v)) for a, v in zip(axes, values, strict=True)]
            elif p[-1].isdigit() and "." in p:
                ids.append(self._number(p[0], float(p[1:])) if p[0] in "xyzwdh" else self._number("l", abs(float(p))))
            else:
                ids.append(self.unk)
        return ids

    def unknown(self, text: str) -> list[str]:
        return [p for p in PIECE.findall(text.lower()) if p.isalpha() and p not in self.index]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids up to <eos>; runs of x y z (w d h) tokens come back as a bracketed tuple."""
        ids = [int(i) for i in ids]
        ids = [i for i in (ids[: ids.index(self.eos)] if self.eos in ids else ids) if i != self.pad]
        axes = "".join(self.number[i][0] if i in self.number else "." for i in ids)
        out, t = [], 0
        while t < len(ids):
            run = next((r for r in ("xyzwdh", "xyz") if axes.startswith(r, t)), "")
            if run:
                out.append("[" + ", ".join(f"{self.number[i][1]:.2f}" for i in ids[t : t + len(run)]) + "]")
            elif axes[t] != ".":
                out.append(("" if axes[t] == "l" else axes[t]) + f"{self.number[ids[t]][1]:.2f}")
            else:
                out.append(self.pieces[ids[t]])
            t += len(run) or 1
        text = re.sub(r" ([.,?!:;])", r"\1", " ".join(out))
        return re.sub(r"<obj(\d{3})>", r"<OBJ\1>", text)

    def state(self) -> dict:
        return {"kind": "tiny", "words": [p for p in self.pieces if p.isalpha() or "'" in p]}


class HubText:
    """The tokenizer of a pre-trained model (any `AutoTokenizer` name or folder), with its own chat template where it
    has one, else the plain "### human: ... ### assistant:" form. Numbers stay text, metres with two decimals. Raises
    DataError where there is no such model."""

    def __init__(self, name: str):
        from transformers import AutoTokenizer

        try:
            self.name, self.tokenizer = name, AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise DataError(f"{name}: no pre-trained model there ({str(error).splitlines()[0][:120]}); give its "
                            "folder, or its name and a network at the first use") from None  # fmt: skip
        self.eos = self.tokenizer.eos_token_id
        self.pad = self.eos if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        if self.tokenizer.chat_template:
            message = [{"role": "user", "content": "\0scene\0question\0"}]
            chat = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        else:
            chat = "### human: \0scene\0question\0 ### assistant: "
        before, _, _, after = chat.split("\0")
        vision = "<|vision_start|>" in self.tokenizer.get_vocab()
        self.template = (before + "<|vision_start|>" * vision, "<|vision_end|>" * vision + "\n", after)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def unknown(self, text: str) -> list[str]:
        return []

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True).strip()

    def state(self) -> dict:
        return {"kind": "hub", "name": self.name}


TEXTS = {"tiny": lambda state: TinyText(state["words"]), "hub": lambda state: HubText(state["name"])}


def load_text(state: dict) -> TinyText | HubText:
    """The tokenizer that `state()` described."""
    return TEXTS[state["kind"]](state)


def start_weights(part: torch.nn.Module) -> None:
    """Every linear map and convolution from N(0, 1 / inputs), the scale for widths of hundreds; biases zero."""
    for module in part.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)


@torch.no_grad()
def start_decoder(decoder: torch.nn.Module, heads: int) -> None:
    """A small decoder (Qwen2 or Llama layers, weights from `start_weights`) begins where pre-training would lead: with
    keys = queries and output = transposed values every head is "find the token like me and add it unchanged", two
    heads of the first layer look back, and the last norm keeps logits small."""
    for layer in decoder.layers:
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
        layer.self_attn.o_proj.weight.copy_(layer.self_attn.v_proj.weight.T)
    look_back(decoder.layers[0].self_attn, heads)
    decoder.norm.weight.fill_(0.1)


def look_back(attention: torch.nn.Module, heads: int, gain: float = 2.0) -> None:
    """Turn the first two heads into "the word before" and "the one before that": constant queries and keys (biases)
    whose rotary angles agree at that distance, so that a question's end knows its last words."""
    size = attention.q_proj.out_features // heads
    theta = 1e6 ** (-torch.arange(size // 2) * 2.0 / size)[:4]  # the four fastest rotary pairs
    strength = math.sqrt(gain * math.sqrt(size))
    for head in range(2):
        rows = slice(head * size, (head + 1) * size)
        for projection, turn in ((attention.q_proj, 0.0), (attention.k_proj, head + 1.0)):
            projection.weight[rows] = 0
            projection.bias[rows][:4] = strength * (turn * theta).cos()
            projection.bias[rows][size // 2 : size // 2 + 4] = strength * (turn * theta).sin()
        attention.v_proj.weight[rows] *= 1.5
        attention.o_proj.weight[:, rows] *= 1.5


# ---- 5b batches ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A row of a paper's mixture of official files: what is taken of which benchmark's training file."""

    benchmark: str  # a row of the evaluator that reads official files
    printed: int  # how many questions the paper counts
    asks: str = "text"  # the form of the answers taken: text, id, number or choice
    fit: float = 0.0  # IoU that the best proposal must have with the target, where proposals come as a file
    most: int | None = None  # of more, a random draw
    splits: tuple[str, ...] = ("train",)


@dataclass
class Stage:
    """The whole recipe of one training stage; a paper's table of stages is a list of these."""

    name: str
    tasks: dict[str, float]  # question mix: names of TASKS or of the paper's own; {} for an encoder without questions
    trains: tuple[str, ...]  # parts of the model that train: keys of its `parts()`
    scene_input: str = "proxies"  # what the model sees of a scene: one of its `scene_inputs`
    iterations: int | None = None  # optimizer steps, or
    epochs: float | None = None  # passes over the stage's samples (exactly one of the two)
    samples: int | None = None  # questions that make one pass, where they are drawn rather than listed
    batch: int = 256  # GLOBAL: questions (or scenes, in a stage without questions) per optimizer step
    per_scene: int = 16  # questions asked about one scene in a batch
    lr: float = 5e-6
    final_lr: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.1  # share of the steps
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1  # micro-batches per step: memory only, never the result
    until: float | None = None  # leave once the running answer-token accuracy exceeds this
    steps: bool = False  # write Sample.steps before the answer
    recolour: bool = False  # draw new object colours at every use (symbols only)
    score: tuple[str, ...] = ()  # benchmarks to ask at the end of this stage, before the next changes the model
    files: dict[str, Source] = field(default_factory=dict)  # official files asked instead, where a run is given them


def collate(groups: Sequence[tuple[Scene, Sequence[Sample]]], text: TinyText | HubText, lengths: Sequence[int],
            steps: bool = False) -> dict:  # fmt: skip
    """Pack every scene's questions behind its scene tokens: one row per scene, scene tokens once, all questions.

    A question sees the scene and itself, never its neighbours (`packed_mask`), and its positions restart behind the
    scene, so a packed row gives every question exactly the logits it would have alone.

    lengths: scene tokens per scene. Returns ids [S, T] with SCENE and PROMPT placeholders, labels [S, T] (the id that
    position t must predict, IGNORE elsewhere), positions [S, T], block [S, T] (-1 padding, 0 shared prefix, q >= 1 the
    question), prompts [P, 6], scenes, samples.
    """
    before, between, after = (text.encode(t) for t in text.template)
    rows, prompts = [], []
    for (_, samples), K in zip(groups, lengths, strict=True):
        ids = [*before, *[SCENE] * K, *between]
        shared = len(ids)
        labels, positions, block = [IGNORE] * shared, list(range(shared)), [0] * shared
        for q, sample in enumerate(samples, start=1):
            if sample.prompt is not None:
                prompts.append(np.resize(np.append(sample.prompt, np.zeros(3)), 6))
            question = [*[PROMPT] * (sample.prompt is not None), *text.encode(sample.question), *after]
            reasoning = sample.steps + " " if steps and sample.steps else ""
            answer = [*text.encode(reasoning + sample.answer), text.eos]
            ids += question + answer[:-1]
            labels += [IGNORE] * (len(question) - 1) + answer
            positions += range(shared, shared + len(question) + len(answer) - 1)
            block += [q] * (len(question) + len(answer) - 1)
        rows.append((ids, labels, positions, block))
    T = max(len(r[0]) for r in rows)
    pad = [text.pad, IGNORE, 0, -1]
    ids, labels, positions, block = (
        torch.tensor([list(r[i]) + [pad[i]] * (T - len(r[i])) for r in rows]) for i in range(4)
    )
    return {"ids": ids, "labels": labels, "positions": positions, "block": block,
            "prompts": torch.tensor(np.array(prompts).reshape(-1, 6), dtype=torch.float32),
            "scenes": [g[0] for g in groups], "samples": [list(g[1]) for g in groups]}  # fmt: skip


def packed_mask(block: torch.Tensor, new: int | None = None) -> torch.Tensor:
    """[S, 1, N, T] bool, True = may attend, for the last N = `new` positions of T (None: all): causal, in the shared
    prefix or the own question; padding sees itself."""
    T = block.shape[1]
    N = T if new is None else new
    key, query = torch.arange(T, device=block.device), torch.arange(T - N, T, device=block.device)[:, None]
    theirs, own = block[:, None, :], block[:, T - N :, None]  # [S, 1, T], [S, N, 1]
    visible = ((theirs == 0) | (theirs == own)) & (key <= query) & (theirs >= 0)
    return (visible | (key == query))[:, None]


# ---- 6 the base model ------------------------------------------------------------------------------------------------


def last_hidden(decoder: torch.nn.Module, cache, **inputs) -> torch.Tensor:
    """Run a decoder of transformers over its inputs, behind a cache of keys and values or None: its last hidden state.

    The argument that takes the cache is called past_key_values up to transformers 5.39 and cache in later versions.
    """
    name = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
    return decoder(**inputs, **{name: cache}, use_cache=cache is not None).last_hidden_state


class SceneLanguageModel(torch.nn.Module):
    """What the three papers share, and every hook that trainer and evaluator call, with its default in one place.

    A paper says what may train (`parts`) and what the language model sees of a scene (`encode`). This class freezes by
    stage, keeps frozen work on disk, puts scene tokens between words, sums the loss over answer tokens, and decodes
    greedily behind a prefix that all questions of a scene share.
    """

    scene_inputs: tuple[str, ...] = ()  # what a stage may show: its `scene_input` is one of these
    frozen_pretrained_names: tuple[str, ...] = ()  # weights that Config loads from elsewhere: no checkpoint holds them
    frame_width = 0  # pixels of the longer side that frames should be read with, 0 = as they are

    def __init__(self, config, text: TinyText | HubText):
        super().__init__()
        self.config, self.text = config, text
        self.stage: Stage | None = None  # set by configure_stage
        self.feature_cache: dict[str, dict[str, torch.Tensor]] = {}  # frozen work in memory, by scene
        self.feature_folder: Path | None = None  # and on disk

    @property
    def device(self) -> torch.device:
        return self.llm.device

    # -- what every paper gives

    def parts(self) -> dict[str, list]:
        """Name -> modules and parameters that a stage may train: what `Stage.trains` chooses from."""
        raise NotImplementedError

    def scene_length(self, scene: Scene) -> int:
        """Say how many tokens the scene takes; called in loader processes, on the CPU."""
        raise NotImplementedError

    def encode(self, scenes: Sequence[Scene]) -> dict[str, torch.Tensor]:
        """Turn scenes into {"tokens" [S, K, D], "valid" [S, K] bool} and what else a paper keeps per token.

        A scalar "auxiliary_loss" (a mean) may be among them; training adds it once per answer token.
        """
        raise NotImplementedError

    # -- what a paper may give

    def encoder_loss(self, scenes: Sequence[Scene]) -> dict[str, torch.Tensor]:
        """Loss of a stage without questions: {"loss", "weight", "correct"[, "count", "tokens"]} as in `forward`."""
        raise NotImplementedError

    def compute_features(self, scene: Scene) -> dict[str, torch.Tensor]:
        """Do all frozen work on one scene, from its unturned geometry."""
        return {}

    def feature_settings(self) -> tuple:
        """List the settings that `compute_features` depends on."""
        return ()

    def feature_weights(self) -> torch.nn.Module | None:
        """Name the module whose weights `compute_features` depends on."""
        return None

    def object_to_text(self, scene: Scene, object_id: int) -> str:
        """Write the object that a mark "<obj 3>" stands for."""
        return f"<OBJ{scene.identifiers[object_id]:03d}>"

    def add_prompt(self, scene: Scene, sample: Sample, rng: np.random.Generator) -> Sample:
        """Give a question its click or box, where a paper has such prompts."""
        return sample

    def prompt_tokens(self, batch: dict, seen: dict[str, torch.Tensor]) -> torch.Tensor:
        """Encode the prompts of a batch, in its order: [P, D]."""
        return seen["tokens"][0, :0]

    def run_decoder(self, embeds: torch.Tensor, is_scene: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor,
                    cache=None) -> torch.Tensor:  # fmt: skip
        """Run the language model over embeds [R, N, D] behind its cache: last hidden state [R, N, D].

        is_scene [R, N] bool marks scene and prompt tokens, positions [R, N], mask [R, 1, N, T] bool, True = may attend.
        """
        return last_hidden(self.llm.model, cache, inputs_embeds=embeds, attention_mask=mask, position_ids=positions)

    def refusal(self, scene: Scene, question: str) -> str | None:
        """Say why a question about a scene of one's own cannot be answered, or None."""
        return None

    def proposals(self) -> dict[str, Callable[[Scene], Scene]]:
        """Name the paper's own object proposals: scene -> scene with other objects."""
        return {}

    def baselines(self) -> dict:
        """Name columns beside the score: context managers in which the model lacks something."""
        return {}

    def token_centers(self, scene: Scene) -> np.ndarray:
        """Say where the scene's tokens are: [K, 3] meters, for pictures."""
        raise NotImplementedError

    def pictures(self, scenes: Sequence[Scene], folder: Path) -> list[Path]:
        """Draw what the model sees of some scenes; return the files."""
        return []

    def answer_pictures(self, scene: Scene, samples: Sequence[Sample], answers: Sequence[str],
                        folder: Path) -> list[Path]:  # fmt: skip
        """Draw how the model came to its answers; return the files."""
        return []

    # -- stages

    def configure_stage(self, stage: Stage) -> None:
        """Freeze everything but the parts that the stage trains, and remember what it shows."""
        parts = self.parts()
        if stage.scene_input not in self.scene_inputs or not set(stage.trains) <= set(parts):
            raise ValueError(f"stage {stage.name}: scene_input is one of {self.scene_inputs}, trains of {tuple(parts)}")
        self.stage = stage
        self.requires_grad_(False)
        for name in stage.trains:
            for part in parts[name]:
                part.requires_grad_(True)

    def keep_trained_precise(self, stages: Sequence[Stage]) -> None:
        """Turn whatever some stage trains into float32: steps of 5e-6 would vanish in bfloat16."""
        for stage in stages:
            self.configure_stage(stage)
            for p in self.parameters():
                if p.requires_grad:
                    p.data = p.data.float()

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the language model's activations in the backward pass: less memory, more time."""
        self.llm.gradient_checkpointing_enable({"use_reentrant": False})

    # -- frozen work, once per scene

    def uses_features(self) -> bool:
        """Whether the stage sees what `compute_features` gives."""
        return True

    def cache_key(self) -> str:
        """Hash the settings and weights that the features depend on."""
        digest = hashlib.sha256(repr(self.feature_settings()).encode())
        weights = self.feature_weights()
        for name, value in weights.named_parameters() if weights is not None else ():
            digest.update(name.encode() + value.detach().float().cpu().clone().numpy().tobytes())
        return digest.hexdigest()[:16]

    def cache_features(self, scenes: Sequence[Scene], folder: Path | None = None,
                       rank: int = 0, world: int = 1) -> None:  # fmt: skip
        """Do the frozen work of a rank's share of the scenes; the others' is then read from the folder."""
        from tqdm import tqdm

        if not self.uses_features():
            return
        self.feature_folder = None if folder is None else Path(folder) / self.cache_key()
        for scene in tqdm(scenes[rank::world], "features", disable=rank > 0, mininterval=2):
            self.load_features(scene)

    def load_features(self, scene: Scene) -> dict[str, torch.Tensor]:
        """Give a scene's features from memory, else from disk, else compute and keep them."""
        if scene.name in self.feature_cache:
            return self.feature_cache[scene.name]

        # a file belongs to what it was made of: another scene of the same name gets another file
        path = None
        if self.feature_folder is not None:
            path = self.feature_folder / f"{safe_name(scene.name)}-{fingerprint(scene)}.npz"
        if path is not None and path.exists():
            with np.load(path, allow_pickle=False) as stored:
                found = {key: torch.from_numpy(stored[key]) for key in stored}
        else:
            with torch.no_grad():
                found = {key: value.cpu() for key, value in self.compute_features(scene).items()}
            if path is not None:
                write_npz(path, **{key: value.numpy() for key, value in found.items()})

        self.feature_cache[scene.name] = found
        return found

    # -- questions

    def write_marks(self, scene: Scene, sample: Sample) -> Sample:
        """Put the paper's own words for objects in place of the marks in a question's texts."""
        texts = {key: substitute(getattr(sample, key), partial(self.object_to_text, scene))
                 for key in ("question", "steps", "answer")}  # fmt: skip
        return replace(sample, **texts)

    def batch(self, groups: Sequence[tuple[Scene, Sequence[Sample]]]) -> dict:
        """Turn scenes with their questions into tensors (`collate`); runs in loader processes, on the CPU."""
        if not self.stage.tasks:
            return {"scenes": [scene for scene, _ in groups], "samples": []}
        written = []
        for scene, samples in groups:
            rng = np.random.default_rng([5, *scene.identifiers.values()])  # the scene's own, whatever the rank
            prompted = [self.add_prompt(scene, sample, rng) for sample in samples]
            written.append((scene, [self.write_marks(scene, sample) for sample in prompted]))
        lengths = [self.scene_length(scene) for scene, _ in groups]
        return collate(written, self.text, lengths, self.stage.steps)

    def forward_llm(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, seen: dict,
                    prompts: torch.Tensor, cache=None) -> torch.Tensor:  # fmt: skip
        """Embed ids [R, N] with scene and prompt tokens in their places, and run the language model: [R, N, D]."""
        return self.run_decoder(self.embed(ids, seen, prompts), ids < 0, positions, mask, cache)

    def embed(self, ids: torch.Tensor, seen: dict, prompts: torch.Tensor) -> torch.Tensor:
        """Embed ids [R, N] with scene and prompt tokens in place of the placeholders: [R, N, D]."""
        embeds = self.llm.get_input_embeddings()(ids.clamp(min=0))  # [R, N, D]
        scene_tokens = seen["tokens"][seen["valid"]].to(embeds)
        embeds = embeds.masked_scatter((ids == SCENE)[..., None], scene_tokens)  # [R, N, D]
        return embeds.masked_scatter((ids == PROMPT)[..., None], prompts.to(embeds))  # [R, N, D]

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """Sum the next-token loss over answer tokens.

        Returns: {"loss", "weight" = answer tokens, "correct" = those predicted right, "tokens" = all that were read}.
        """
        if not self.stage.tasks:
            return self.encoder_loss(batch["scenes"])
        ids, labels, positions, block = (batch[k].to(self.device) for k in ("ids", "labels", "positions", "block"))
        seen = self.encode(batch["scenes"])  # tokens [S, K, D]
        prompts = self.prompt_tokens(batch, seen)  # [P, D]
        hidden = self.forward_llm(ids, positions, packed_mask(block), seen, prompts)  # [S, T, D]

        # the vocabulary is large: only positions that carry a label go through the last layer
        answered = labels != IGNORE  # [S, T]
        logits = self.llm.lm_head(hidden[answered]).float()  # [A, vocabulary]
        target = labels[answered]  # [A]
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
        if "auxiliary_loss" in seen:
            loss = loss + len(target) * seen["auxiliary_loss"]
        correct = (logits.argmax(-1) == target).sum()
        return {"loss": loss, "weight": answered.sum(), "correct": correct, "tokens": (block >= 0).sum()}

    @torch.no_grad()
    def generate(self, batch: dict, max_new_tokens: int = 64) -> list[str]:
        """Answer greedily, one text per question in the batch's order.

        A scene is read once: its keys and values are copied to a row per question, and every row writes a token at a
        time until its end token. Two questions of scene 0 and one of scene 1, P prefix positions, N of a question:

            prefix   s0 s0 s0 s0      rows 0 0 1      s0 s0 s0 s0 | how many chairs ?  .  -> "2" -> <eos>
                     s1 s1 .  .                       s0 s0 s0 s0 | is there a  lamp  ?  -> "yes" -> <eos>
                                                      s1 s1 .  .  | how tall is it    ?  -> ...
        """
        from transformers import DynamicCache

        ids, labels, positions, block = (batch[k].to(self.device) for k in ("ids", "labels", "positions", "block"))
        seen = self.encode(batch["scenes"])
        prompts = self.prompt_tokens(batch, seen)
        nothing = prompts[:0]

        # the prefix of every scene, padded on the right
        P = int((block == 0).sum(1).max())
        shared = block[:, :P] == 0  # [S, P]
        cache = DynamicCache()
        self.forward_llm(ids[:, :P].where(shared, self.text.pad), positions[:, :P].where(shared, 0),
                         packed_mask(shared.long() - 1), seen, nothing, cache)  # fmt: skip

        # a row per question: what stands before its answer; the position that carries the first label ends it
        row, asked, places = [], [], []
        for s in range(len(block)):
            for q in range(1, int(block[s].max()) + 1):
                own = (block[s] == q).nonzero()[:, 0]
                end = int((labels[s, own] != IGNORE).int().argmax()) + 1
                row.append(s)
                asked.append(ids[s, own[:end]])
                places.append(positions[s, own[:end]])
        row = torch.tensor(row, device=self.device)  # [Q]
        length = torch.tensor([len(a) for a in asked], device=self.device)  # [Q]
        question = pad_sequence(asked, batch_first=True, padding_value=self.text.pad)  # [Q, N]
        position = pad_sequence(places, batch_first=True)  # [Q, N]
        N = question.shape[1]

        # read the questions behind copies of their scenes' prefixes
        cache.batch_select_indices(row)
        present = torch.arange(N, device=self.device) < length[:, None]  # [Q, N]
        valid = torch.cat([shared[row], present], 1)  # [Q, P + N]
        causal = torch.arange(P + N, device=self.device) <= torch.arange(P, P + N, device=self.device)[:, None]
        mask = (valid[:, None] & causal)[:, None]  # [Q, 1, N, P + N]
        hidden = self.forward_llm(question, position, mask, seen, prompts, cache)  # [Q, N, D]
        index = torch.arange(len(row), device=self.device)  # which question a row answers
        last = hidden[index, length - 1]  # [Q, D]
        place = position[index, length - 1]  # [Q]

        # one token a step; a row that has ended leaves the batch
        written: list[list[int]] = [[] for _ in asked]
        for _ in range(max_new_tokens):
            token = self.llm.lm_head(last).argmax(-1)  # [rows]
            for i, t in zip(index.tolist(), token.tolist(), strict=True):
                written[i].append(t)
            alive = (token != self.text.eos).nonzero()[:, 0]
            if not len(alive):
                break
            cache.batch_select_indices(alive)
            index, token, place, valid = index[alive], token[alive], place[alive] + 1, valid[alive]
            valid = torch.cat([valid, valid.new_ones(len(alive), 1)], 1)
            hidden = self.forward_llm(token[:, None], place[:, None], valid[:, None, None], seen, nothing, cache)
            last = hidden[:, 0]
        return [self.text.decode(tokens) for tokens in written]


def overfit_demo(model: SceneLanguageModel, scene: Scene, samples: Sequence[Sample], steps: int, lr: float) -> None:
    """Learn one scene's questions by heart: print the falling loss and the answer to the first question."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        out = model(model.batch([(scene, samples)]))
        loss = out["loss"] / out["weight"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}")

    model.eval()
    first = model.write_marks(scene, samples[0])
    answer = model.generate(model.batch([(scene, samples[:1])]))[0]
    print(f"{first.question}  ->  {answer}  (true: {first.answer}; learned by heart, train.py learns to see)")


# ---- 6b checkpoints --------------------------------------------------------------------------------------------------


def named_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers, the tensors themselves, tied ones once; without those that the model names in
    `borrowed`: frozen ones that its Config loads from elsewhere."""
    first, borrowed = {}, set(model.frozen_pretrained_names)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in borrowed:
            first.setdefault(id(tensor), (name, tensor))
    return dict(first.values())


def read_state(run: Path) -> dict:
    """state.json of a run's checkpoint: {"number", "files", "position", "run", ...}."""
    path = run / "checkpoint" / "state.json"
    if not path.exists():
        raise DataError(f"{path}: missing, so there is no trained model here; train one, or name another folder")
    try:
        state = json.loads(path.read_text())
    except ValueError:
        state = None
    if not isinstance(state, dict) or {"number", "files", "position", "run"} - set(state):
        raise DataError(f"{path}: not the state of a checkpoint; copy the run again")
    return state


def read_tensors(run: Path, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of a run's checkpoint by their names; kind: "weights" or another of its files. Raises DataError."""
    path = run / "checkpoint" / read_state(run)["files"][kind]
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: missing or damaged ({error}); copy the run again") from None


def load_weights(model: torch.nn.Module, run: Path) -> None:
    """Copy a run's weights into a model that is not sharded: every name and shape must agree."""
    saved, own = read_tensors(run, "weights"), named_weights(model)
    for name in sorted(saved.keys() | own.keys()):
        there, here = (tuple(t[name].shape) if name in t else "missing" for t in (saved, own))
        if there != here:
            raise DataError(f"{run}/checkpoint: {name} is {there} there, {here} in this model; {run}/config.json says "
                            "which model and settings it belongs to")  # fmt: skip
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


# ---- 7 scenes from disk ----------------------------------------------------------------------------------------------
#
# A damaged file becomes one line of text in `reading`, and every scene is checked once, in
# `check_scene`. Frames of all programs pass one reader, `read_views`: a row of LAYOUTS lists a
# program's files, and VGGT fills in what they lack.

VIDEOS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
CLOUDS = (".ply", ".glb", ".obj", ".stl", ".xyz")
SCAN_FILES = ("_vh_clean_2.ply", "_vh_clean_2.0.010000.segs.json", ".aggregation.json", ".txt")
SHELL = ("wall", "floor", "ceiling")  # labels of ScanNet that are no objects
INSTALL = {  # optional package -> how to install it
    "av": 'pip install -e ".[video]"',
    "vggt": "pip install git+https://github.com/facebookresearch/vggt",
    "sam2": "SAM2_BUILD_CUDA=0 pip install --no-build-isolation sam2",
}
DEPTH_SCALES = (
    "millimeters 1000, TUM and ICL-NUIM 5000, Replica of NICE-SLAM 6553.5, RealSense L515 4000"
)
UP = {sign + "xyz"[i]: float(f"{sign}1") * np.eye(3)[i] for i in range(3) for sign in "+-"}
SAME, DOWN, TURNED = np.diag([1.0, 1, 1, 1]), np.diag([1.0, -1, 1, 1]), np.diag([1.0, -1, -1, 1])
CONVENTIONS = {  # of poses -> the camera's axes in OpenCV's, the world's, whether they map world to camera
    "opencv": (SAME, SAME, False),
    "opengl": (TURNED, SAME, False),
    "opencv_inverse": (SAME, SAME, True),
    "opengl_inverse": (TURNED, SAME, True),
    "povray": (DOWN, DOWN, False),  # both left-handed
}


@contextmanager
def reading(path, what):
    """Turn whatever a missing or damaged file raises, in any library, into a DataError of one
    line that names it."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(
            f"{path}: {what} missing; `python data.py check DIR` says what is needed"
        ) from None
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:90]
        raise DataError(f"{path}: not a whole {what} ({why}); copy or export it again") from None


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write named arrays as one file, which becomes `path` when it is whole: nobody ever reads
    half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "wb") as file:
        np.savez(file, **arrays)
    os.replace(part, path)


def read_json(path: Path):
    with reading(path, "JSON file"):
        return json.loads(path.read_text())


def read_words(path):
    """Split the lines of a table at blanks and commas, without remarks and a header that begins
    with "timestamp"."""
    lines = [line.replace(",", " ").split() for line in path.read_text().splitlines()]
    return [words for words in lines if words and not words[0].startswith(("#", "timestamp"))]


def read_numbers(path, columns, rows=None):
    """Read the upper left [rows, columns] of a table of numbers; by default all rows."""
    with reading(path, f"table of {columns} numbers per line"):
        table = [words[:columns] for words in read_words(path)]
        return np.array(table[:rows], float).reshape(rows or -1, columns)


def need(module, what):
    """Import a module of an optional package; without it, raise a DataError that says how to
    install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(
            f"{what} needs the package {package} ({error}): {INSTALL[package]}"
        ) from None


def choose(table: dict, key: str, what: str):
    """Look up table[key]; an unknown key is a DataError that names the known ones."""
    if key not in table:
        raise DataError(f"{what} {key!r} is unknown: choose one of {', '.join(table)}")
    return table[key]


def file_key(files):
    """Name a state of files by their paths, sizes and times of change, without reading them."""
    return "|".join(
        f"{file.resolve()}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files
    )


def check_scene(scene: Scene, trusted: bool = False) -> Scene:
    """Check what a reader made, and note its size.

    Points and boxes are finite, every array is as long as the points, and, unless the unit is
    `trusted`, the scene is 0.5 to 30 meters large. Raises DataError.
    """
    arrays = [scene.points, scene.colours, scene.normals, scene.superpoints, scene.instances]
    lengths = {len(array) for array in arrays if array is not None}
    with reading(scene.name, "scene of boxes with six numbers"):
        boxes = np.array([o.box for o in scene.objects], float).reshape(-1, 6)
    finite = np.isfinite(scene.points).all() and np.isfinite(boxes).all()
    if len(lengths) > 1 or min(lengths) < 2 or not finite:
        what = f"arrays of {lengths} points, or numbers that are not finite"
        raise DataError(f"{scene.name}: {what}; export it again")

    # what lies flat on a plane has a side of 0, which has no logarithm in a loss
    for o in scene.objects:
        o.box[3:] = np.maximum(o.box[3:], 0.001)

    # a wrong unit shows in the size, which everybody can judge
    size = np.ptp(scene.points, axis=0)
    said = f"size {size[0]:.2f} x {size[1]:.2f} x {size[2]:.2f} m"
    if not scene.metric:
        said += ", guessed: questions in meters are refused; of a known length give --scale TRUE/GUESSED"
    elif not trusted and not 0.5 <= size.max() <= 30:
        raise DataError(
            f"{scene.name}: {said} is hardly a room; give --scale (0.001 if in millimeters, 1 if it is "
            f"right), or of frames --depth-scale ({DEPTH_SCALES})"
        )
    if said not in scene.notes:
        scene.notes.append(said)
    return scene


# ---- 7.1 how programs lay out their frames


class FrameFiles(NamedTuple):
    """One frame on disk; what no file holds is None."""

    image: Path  # for a frame in a video: its number, below the path of the video
    depth: Path | None = None
    pose: Path | np.ndarray | None = None  # [4, 4] in the layout's convention
    camera: Path | np.ndarray | None = None  # [3, 3] of the image or of the depth
    mask: Path | None = None  # an object id per pixel


def pictures(folder, pattern="*"):
    """List the images in a folder, frame10 after frame9; hidden files are none."""
    files = (file for file in folder.glob(pattern) if file.suffix.lower() in IMAGES)
    shown = (file for file in files if file.name[0] != ".")
    return sorted(shown, key=lambda file: (len(file.name), file.name))


def pinhole(fx, fy, cx, cy):
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], float)


def json_camera(held, focal="f"):
    return pinhole(*[held[name] for name in (f"{focal}x", f"{focal}y", "cx", "cy")])


def rigid(position, turn):
    """Build a pose [4, 4] from a position and a quaternion (x, y, z, w) or an axis times its
    angle."""
    from scipy.spatial.transform import Rotation

    rotation = Rotation.from_quat(turn) if len(turn) == 4 else Rotation.from_rotvec(turn)
    pose = np.eye(4)
    pose[:3, :3] = rotation.as_matrix()
    pose[:3, 3] = position
    return pose


def seconds(files):
    """The times in names such as 1305031102.175304.png or ID_66236.345.png."""
    return [float(file.stem.split("_")[-1]) for file in files]


def in_time(images, times, values, within=0.02):
    """Pick for each image the value of the nearest time, None beyond `within` seconds."""
    wanted, times = seconds(images), np.array(times)
    index = np.searchsorted((times[1:] + times[:-1]) / 2, wanted)
    near = np.abs(times[index] - wanted) <= within
    return [values[i] if n else None for i, n in zip(index, near, strict=True)]


def named_views(mark, images, depth, pose, cameras):
    """Frames whose other files bear the name of their image."""
    base = mark.parent
    camera = next((base / name for name in cameras if (base / name).exists()), None)
    for image in pictures(mark if mark.is_dir() else base, images):
        name = image.stem.removesuffix(".color")
        mask = base / "instance-filt" / f"{name}.png"
        yield FrameFiles(image, base / depth.format(name), base / pose.format(name), camera, mask)


def replica(mark):
    """results/frame*.jpg and depth*.png; traj.txt has a pose of 16 numbers per line.

    cam_params.json lies beside it or above.
    """
    above = [folder / "cam_params.json" for folder in mark.parents]
    camera = json_camera(read_json(next(file for file in above if file.exists()))["camera"])
    poses = read_numbers(mark, 16).reshape(-1, 4, 4)
    for image, pose in zip(pictures(mark.parent / "results", "frame*"), poses, strict=False):
        depth = image.with_name(image.stem.replace("frame", "depth") + ".png")
        yield FrameFiles(image, depth, pose, camera)


TUM_CAMERAS = {  # part of a sequence's name -> its published camera
    "freiburg1": (517.3, 516.5, 318.6, 255.3),
    "freiburg2": (520.9, 521.0, 325.1, 249.7),
    "freiburg3": (535.4, 539.2, 320.1, 247.6),
    "traj": (481.2, 480.0, 319.5, 239.5),  # ICL-NUIM
    "": (525.0, 525.0, 319.5, 239.5),  # TUM's for all others
}


def tum(mark):
    """rgb/ and depth/ named by seconds; lines "second x y z qx qy qz qw"."""
    base = mark.parent
    images, depths = pictures(base / "rgb"), pictures(base / "depth")
    cameras = (camera for name, camera in TUM_CAMERAS.items() if name in base.resolve().name)
    K = pinhole(*next(cameras))

    # colors, depth and poses have clocks of their own
    rows = read_numbers(mark, 8)
    poses = [rigid(row[1:4], row[4:]) for row in rows]
    depths = in_time(images, seconds(depths), depths)
    poses = in_time(images, rows[:, 0], poses)
    for image, depth, pose in zip(images, depths, poses, strict=True):
        yield FrameFiles(image, depth, pose, K)


def arkitscenes(mark):
    """lowres_wide/, lowres_depth/, lowres_wide_intrinsics/ named ID_SECONDS; lines "second rx ry
    rz x y z"."""
    base = mark.parent
    images = pictures(base / "lowres_wide")
    depths = [base / "lowres_depth" / image.name for image in images]

    # intrinsics are named by times a millisecond off; poses are fewer than images
    files = sorted((base / "lowres_wide_intrinsics").glob("*.pincam"))
    cameras = [pinhole(*read_numbers(file, 6)[0, 2:]) for file in files]  # behind width and height
    cameras = in_time(images, seconds(files), cameras)
    rows = read_numbers(mark, 7)
    poses = [rigid(row[4:], row[1:4]) for row in rows]
    poses = in_time(images, rows[:, 0], poses, 0.01)
    yield from map(FrameFiles, images, depths, poses, cameras)


def stray_scanner(mark):
    """rgb.mp4 or rgb/NUMBER.png, depth/NUMBER.png; lines "second, number, x, y, z, qx, qy, qz,
    qw"."""
    base = mark.parent
    images = {int(image.stem): image for image in pictures(base / "rgb")}
    for _, number, *pose in read_numbers(mark, 9):
        image = images.get(int(number), base / f"rgb.mp4/{number:.0f}")
        depth = base / f"depth/{number:06.0f}.png"
        yield FrameFiles(image, depth, rigid(pose[:3], pose[3:]), base / "camera_matrix.csv")


def polycam(mark):
    """keyframes/ with images/, depth/, cameras/; corrected_ ones, where there are any, have the
    better poses."""
    kind = "corrected_" if (mark / "corrected_cameras").exists() else ""
    for file in sorted((mark / f"{kind}cameras").glob("*.json")):
        held = read_json(file)
        pose = np.eye(4)
        pose[:3] = [[held[f"t_{i}{j}"] for j in range(4)] for i in range(3)]
        image = mark / f"{kind}images/{file.stem}.jpg"
        depth = mark / f"depth/{file.stem}.png"
        yield FrameFiles(image, depth, pose, json_camera(held))


def nerfstudio(mark):
    """transforms.json: per frame file_path, transform_matrix, perhaps depth_file_path; intrinsics
    per frame or once."""
    held = read_json(mark)
    for frame in held["frames"]:
        files = (frame.get("file_path"), frame.get("depth_file_path"))
        image, depth = (name and mark.parent / name for name in files)
        pose = np.array(frame["transform_matrix"], float)
        yield FrameFiles(image, depth, pose, json_camera(held | frame, "fl_"))


def colmap(mark):
    """cameras.txt and images.txt of a sparse model; export undistorted images, for lens
    distortion is not undone."""
    base = next(folder / "images" for folder in mark.parents if (folder / "images").is_dir())
    cameras = {}
    for id, model, _, _, *numbers in read_words(mark.with_name("cameras.txt")):
        if model in ("SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL"):  # one focal length
            numbers.insert(0, numbers[0])
        cameras[id] = pinhole(*numbers[:4])
    for words in read_words(mark):
        if len(words) == 10:  # an image; the line behind it lists its points, three words each
            w, x, y, z, *position = map(float, words[1:8])
            pose = rigid(position, (x, y, z, w))
            yield FrameFiles(base / words[9], None, pose, cameras[words[8]])


def photographs(mark):
    yield from map(FrameFiles, pictures(mark.parent))


@dataclass
class Layout:
    """How a program lays out its frames, and what it documents about their numbers."""

    name: str
    marks: tuple[str, ...]  # patterns of the file or folder that tells it
    views: Callable[[Path], Iterator[FrameFiles]]  # the frames, from what matched
    depth_scale: float = 1000.0  # units of the depth images per meter
    up: str = "auto"  # axis of the poses' world that points up
    convention: str = "opencv"
    metric: bool = True  # poses are in meters


SEVEN_SCENES = partial(named_views, images="*.color.*", depth="{}.depth.png", pose="{}.pose.txt",
                       cameras=("camera-intrinsics.txt", "intrinsics.txt"))  # fmt: skip
EXPORTED = partial(named_views, images="*", depth="depth/{}.png", pose="pose/{}.txt",
                   cameras=("intrinsic/intrinsic_depth.txt", "intrinsics_depth.txt", "intrinsic_depth.txt",
                            "intrinsic/intrinsic_color.txt", "intrinsics_color.txt"))  # fmt: skip
POSED_IMAGES = partial(named_views, images="*.jpg", depth="{}.png", pose="{}.txt",
                       cameras=("depth_intrinsic.txt", "intrinsic.txt"))  # fmt: skip
LAYOUTS = (  # the first that fits is taken
    Layout("NAME.color.png, NAME.depth.png, NAME.pose.txt (7-Scenes)", ("*.color.*",), SEVEN_SCENES),
    Layout("results/, traj.txt (Replica of NICE-SLAM)", ("traj.txt",), replica, 6553.5, "+z"),
    Layout("rgb/, depth/, groundtruth.txt (TUM RGB-D)", ("groundtruth.txt",), tum, 5000.0, "+z"),
    Layout("rgb/, depth/, *.gt.freiburg (ICL-NUIM)", ("*.gt.freiburg",), tum, 5000.0, "-y", "povray"),
    Layout("lowres_wide/ (ARKitScenes)", ("lowres_wide.traj", "*/lowres_wide.traj"), arkitscenes,
           up="+z", convention="opencv_inverse"),
    Layout("odometry.csv, depth/ (Stray Scanner)", ("odometry.csv",), stray_scanner, up="+y"),
    Layout("keyframes/ (Polycam)", ("keyframes",), polycam, up="+y", convention="opengl"),
    Layout("transforms.json (nerfstudio)", ("transforms.json",), nerfstudio, up="+z",
           convention="opengl", metric=False),
    Layout("images/, sparse/ (COLMAP text)", ("images.txt", "sparse/**/images.txt"), colmap,
           convention="opencv_inverse", metric=False),
    Layout("color/, depth/, pose/, intrinsic/ (ScanNet)", ("color", "rgb", "images"), EXPORTED),
    Layout("NAME.jpg, NAME.png, NAME.txt (EmbodiedScan)", ("depth_intrinsic.txt", "intrinsic.txt"),
           POSED_IMAGES),
    Layout("images alone", ("*",), photographs),
)  # fmt: skip
VIDEO = Layout("video", (), photographs)
KNOWN_LAYOUTS = "; ".join(layout.name for layout in LAYOUTS)


def existing(part):
    """Return a part of FrameFiles, or None where its file is missing."""
    missing = isinstance(part, Path) and not (part.exists() or part.parent.is_file())
    return None if missing else part


def find_frames(folder: Path) -> tuple[Layout | None, list[FrameFiles]]:
    """Find the layout that fits a folder, and its frames, with None for missing files.

    Returns (None, []) where there is no image.
    """
    for layout in LAYOUTS:
        marks = [file for pattern in layout.marks for file in sorted(folder.glob(pattern))[:1]]
        for mark in marks:
            with reading(mark, layout.name):
                views = [FrameFiles(*map(existing, view)) for view in layout.views(mark)]
            if any(view.image for view in views):
                return layout, views
    return None, []


# ---- 7.2 frames


def read_image(path, mode=None):
    """Read an image in a mode of PIL ("RGB", "I" = integers), or a frame of a video; its rows as
    the camera wrote them."""
    if path.parent.is_file():
        return video_frame(path.parent, int(path.name))
    with reading(path, "image"), Image.open(path) as image:
        return np.asarray(image.convert(mode) if mode else image)


def read_depth(path, scale):
    """Read depth [H, W] in float32 meters; 0 = missing, as 65535 is in the file."""
    depth = read_image(path)
    if depth.ndim != 2 or depth.dtype.kind not in "iu" or depth.dtype == np.uint8:
        what = f"{depth.dtype} {depth.shape} is a picture of depth (8 bits end at 255)"
        raise DataError(f"{path}: {what}; export 16 bits")
    return np.where(depth == 65535, 0, depth).astype(np.float32) / np.float32(scale)


def read_pose(pose, convention):
    """Read a pose [4, 4] as camera to world with OpenCV's axes; None where it is not finite, or
    mirrored."""
    pose = read_numbers(pose, 4, 4) if isinstance(pose, Path) else pose
    camera, world, inverse = choose(CONVENTIONS, convention, "--convention")
    if not np.isfinite(pose).all():
        return None

    # files round their numbers: take the nearest rotation (polar decomposition)
    u, _, vt = np.linalg.svd(pose[:3, :3])
    pose = np.block([[u @ vt, pose[:3, 3:]], [0, 0, 0, 1]])
    pose = world @ (np.linalg.inv(pose) if inverse else pose) @ camera
    return pose if np.linalg.det(pose) > 0 else None


def read_camera(camera, sizes):
    """Read a camera matrix [3, 3] for an image of size 1 x 1.

    Files do not say whether it is the color's or the depth's: of `sizes` (H, W) take the one
    whose middle is nearest to the principal point. Raises DataError where that is near none.
    """
    K = read_numbers(camera, 3, 3) if isinstance(camera, Path) else camera
    scaled = [np.diag([1 / W, 1 / H, 1]) @ K for H, W in sizes]
    best = min(scaled, key=lambda K: np.abs(K[:2, 2] - 0.5).max())
    if not (np.abs(best[:2, 2] - 0.5).max() < 0.25 and np.diag(best).min() > 0):
        what = f"intrinsics {K.tolist()} belong to no image of (H, W) = {sizes}"
        raise DataError(f"{what}; export those of these images ({camera})")
    return best


def read_view(view, layout, longest):
    """Read one frame, at the size of its depth or else of its image, at most `longest` pixels.

    Returns color [H, W, 3] u8, depth [H, W] f32 meters, mask [H, W] i32, intrinsics [3, 3], pose
    [4, 4], with None for what no file holds; or, where the frame is of no use, the reason, a str.
    """
    depth, K, pose = None, None, None
    color = read_image(view.image, "RGB")
    sizes = [color.shape[:2]]

    # ScanNet has poses that are not finite, and depth that is empty
    if view.pose is not None:
        pose = read_pose(view.pose, layout.convention)
        if pose is None:
            return "a pose that is not finite, or mirrored"
    if view.depth is not None:
        depth = read_depth(view.depth, layout.depth_scale)
        if not depth.any():
            return "no depth"

        # color of another shape shows another part of the room
        sizes.insert(0, depth.shape)
        if abs(np.divide(*sizes[0]) / np.divide(*sizes[1]) - 1) > 0.03:
            what = f"depth and color have different shapes {sizes}"
            raise DataError(f"{view.depth}: {what}; export depth registered to color")

    # bring all to one size; the intrinsics follow
    H, W = fit_longest(*sizes[0], longest)
    depth = depth if depth is None else resize(depth, (H, W))
    mask = np.zeros((H, W), np.int32)
    if view.mask is not None:
        mask = resize(read_image(view.mask, "I"), (H, W))
    if view.camera is not None:
        K = np.diag([W, H, 1]) @ read_camera(view.camera, sizes)
    return resize(color, (H, W)), depth, mask, K, pose


def read_frames(where, layout, views, max_frames: int, longest: float, notes: list[str]) -> Frames:
    """Read at most `max_frames` views, evenly spaced, as Frames; what no file holds is None.

    Dropped and counted are frames that lack a file that others have, whose pose is not finite, or
    whose depth is empty. Raises DataError where none is left.
    """
    known = [part for part in range(4) if any(view[part] is not None for view in views)]
    chosen = np.linspace(0, len(views) - 1, min(max_frames, len(views))).round().astype(int)
    rows = []
    for view in [views[i] for i in np.unique(chosen)]:
        complete = all(view[part] is not None for part in known)
        rows.append(read_view(view, layout, longest) if complete else "a missing file")

    # say what was lost, and why
    lost = Counter(row for row in rows if isinstance(row, str))
    rows = [row for row in rows if not isinstance(row, str)]
    notes += [f"dropped {n} of {len(views)} frames with {why}" for why, n in lost.items()]
    notes.append(f"{len(rows)} of {len(views)} frames used; layout {layout.name}")
    if len({row[0].shape for row in rows}) != 1:
        what = f"{'; '.join(notes)}: none is usable, or their sizes differ"
        raise DataError(f"{where}: {what}; export the frames again")
    columns = zip(*rows, strict=True)
    return Frames(*(None if column[0] is None else np.stack(column) for column in columns))


def agreement(frames: Frames, reach: float = 0.1) -> float:
    """Share of some frames' depth that others confirm to `reach` meters, among what these do not
    see hidden."""
    points = unproject(frames.depth, frames.intrinsics, frames.poses)
    some = range(0, len(points), 1 + len(points) // 8)
    confirmed, denied = 1, 0
    for v, other in itertools.permutations(some, 2):
        seen = points[v][frames.depth[v] > 0][::16]
        camera = frames.intrinsics[other], frames.poses[other], frames.depth.shape[1:]
        _, row, column, z = in_view(seen, *camera)
        beyond = frames.depth[other][row, column] - z
        confirmed += (np.abs(beyond) <= reach).sum()
        denied += (beyond > reach).sum()
    return confirmed / (confirmed + denied)


def read_views(
    path: str | Path,
    scale: float | None = None,
    max_frames: int = 32,
    longest: int | None = None,
    vggt: str = "facebook/VGGT-1B",
    **documented,
) -> Scene:
    """Read a video, images, or frames in one of LAYOUTS as a scene without objects.

    What no file holds of depth, poses and intrinsics VGGT finds. Its unit becomes meters by the
    known poses or depth; else it is guessed, and the scene not metric. scale: true meters per
    meter of that. longest: side of the frames in pixels, by default 320, or 640 for VGGT.
    documented: up (UP or "auto"), convention (CONVENTIONS), depth_scale, in place of those of the
    layout. Raises DataError.
    """
    path, notes = Path(path), []
    layout, views = find_frames(path) if path.is_dir() else (VIDEO, [])
    if layout is None:
        inside = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
        raise DataError(f"{path}: holds no frames, but {inside}; known layouts: {KNOWN_LAYOUTS}")
    layout = replace(layout, **documented)
    has_depth, has_pose = (any(view[part] is not None for view in views) for part in (1, 2))
    measured = has_depth and has_pose
    longest = longest or (320 if measured else 640)

    # what the files hold
    if has_depth or has_pose:
        frames = read_frames(path, layout, views, max_frames, longest, notes)
    else:
        read = read_photographs if views else read_video
        images = read(path, views, max_frames, longest, notes)
        frames = Frames(images, None, np.zeros(images.shape[:3], np.int32), None, None)

    # VGGT sees the rest in the images, in the unit of what is known; without any it is guessed
    if any(array is None for array in vars(frames).values()):
        frames = fill_in(path, frames, vggt)
    metric = has_depth or (has_pose and layout.metric)
    guess = 1.0 if metric else GUESS / float(np.median(frames.depth[frames.depth > 0]))
    rescale(frames, guess * (scale or 1.0))

    # a wrong convention or scale makes frames contradict each other: 0.92 where all is right, else
    # below 0.5
    share = agreement(frames) if has_depth or has_pose else 1.0
    if share < 0.6:
        raise DataError(
            f"{path}, read as {layout.name}: only {share:.0%} of the depth fits other frames; name the "
            f"poses' --convention ({', '.join(CONVENTIONS)}) or the --depth-scale ({DEPTH_SCALES})"
        )

    # the cloud is what the frames show, and both are turned upright
    views = zip(frames.colour, frames.depth, frames.intrinsics, frames.poses, strict=True)
    points, colors, normals, voxel = fuse(views)
    world, said = align_to_gravity(points, normals, layout.up, frames.poses)
    frames.poses = world @ frames.poses
    notes += [f"{len(points)} points in voxels of {voxel * 100:.1f} cm", said]
    source, cloud = "rgbd" if measured else "video", move(points, normals, world)
    scene = Scene(path.resolve().stem, source, [], colours=colors, notes=notes, **cloud)
    scene.frames, scene.metric = frames, metric or scale is not None
    return check_scene(scene, trusted=scale is not None or "depth_scale" in documented)


def fit_longest(height, width, longest):
    """Shrink a size so that its longer side is at most `longest` pixels."""
    scale = min(1.0, longest / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize(image, size):
    """Resize to (H, W): colors [h, w, 3] are averaged over a pixel's area; of depth and ids [h,
    w] the nearest is taken."""
    method = Image.Resampling.BOX if image.ndim == 3 else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(image).resize(size[::-1], method))


# ---- 7.3 clouds


def unit(vectors):
    """Scale vectors [..., 3] to length 1, float32."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(length, 1e-9)).astype(np.float32)


def move(points, normals, world):
    """Move a cloud by a rigid 4x4: points, normals and bounds as keyword arguments of Scene."""
    points = (points @ world[:3, :3].T + world[:3, 3]).astype(np.float32)
    normals = (normals @ world[:3, :3].T).astype(np.float32)
    return dict(
        points=points,
        normals=normals,
        bounds=np.stack([points.min(0), points.max(0)]).astype(float),
    )


def voxel_of(points, voxel):
    """Number the occupied voxels from 0: the one of each of points [N, 3], int64 [N]."""
    cell = np.floor(points / voxel).astype(np.int64)
    cell -= cell.min(0, initial=np.iinfo(np.int64).max)
    return np.unique(cell @ [1 << 42, 1 << 21, 1], return_inverse=True)[1].reshape(-1)


def voxel_mean(rows, weight, voxel):
    """Average rows [N, C], whose first columns are x, y, z, in each occupied voxel: rows [n, C]
    and summed weights [n]."""
    index = voxel_of(rows[:, :3], voxel)
    total = np.bincount(index, weight)
    sums = np.stack([np.bincount(index, weight * column) for column in rows.T], axis=1)
    return sums / total[:, None], total


def voxel_downsample(rows, weight, voxel, limit):
    """Average rows [N, 9] of point, color and normal in the least voxels, from `voxel` meters up,
    that leave at most `limit`: points [n, 3] f32, colors [n, 3] u8, unit normals [n, 3] f32,
    voxel."""
    rows, weight = voxel_mean(rows, weight, voxel)
    while len(rows) > limit:
        voxel *= 1.2
        rows, weight = voxel_mean(rows, weight, voxel)
    points = rows[:, :3].astype(np.float32)
    colors = rows[:, 3:6].round().astype(np.uint8)
    return points, colors, unit(rows[:, 6:]), voxel


def fuse(frames: Iterable[tuple], limit: int = 100_000) -> tuple:
    """Fuse frames (color [H, W, 3], depth [H, W], intrinsics [3, 3], pose [4, 4]) to one cloud:
    points [N, 3] f32, colors [N, 3] u8, unit normals [N, 3] f32 towards the cameras, voxel in
    meters: 2.5 cm, or a pixel's footprint if larger."""
    parts = []
    for color, depth, K, pose in frames:
        if not parts:
            footprint = float(np.median(depth[depth > 0])) / K[0, 0]
            voxel = max(0.025, footprint)

        # normals from differences of the point map: NaN beside missing depth, grazing ones at the
        # edges of things
        points = unproject(depth[None], K[None], pose[None])[0]
        normals = unit(np.cross(np.gradient(points, axis=0), np.gradient(points, axis=1)))
        facing = (normals * unit(pose[:3, 3] - points)).sum(-1)
        seen = np.abs(facing) > 0.1
        rows = np.concatenate([points, color, normals * np.sign(facing)[..., None]], axis=-1)[seen]
        parts.append(voxel_mean(rows, np.ones(len(rows)), voxel))

    # voxels with less than a fifth of a single view's samples are flying pixels
    rows, weight = voxel_mean(*map(np.concatenate, zip(*parts, strict=True)), voxel)
    solid = weight >= min(3.0, 0.2 * (voxel / footprint) ** 2)
    if not solid.any():
        raise DataError("no frame shows a surface; check the depth images and --depth-scale")
    return voxel_downsample(rows[solid], weight[solid], voxel, limit)


def estimate_normals(points, k=24):
    """Estimate unit normals [N, 3] float32: the least axis of each point's k neighbors, facing
    the centroid."""
    near = points[nearest(points, points, k)[1]].astype(np.float32)
    near = near - near.mean(1, keepdims=True)
    normals = np.linalg.eigh(np.einsum("nki,nkj->nij", near, near))[1][..., 0]
    inward = (normals * (points.mean(0) - points)).sum(1, keepdims=True) >= 0
    return np.where(inward, normals, -normals).astype(np.float32)


COLORS = (  # names of the three color fields of a .ply
    ("red", "green", "blue"),
    ("diffuse_red", "diffuse_green", "diffuse_blue"),
    ("r", "g", "b"),
    ("f_dc_0", "f_dc_1", "f_dc_2"),  # of Gaussian splats: spherical harmonics of degree 0
)


def load_mesh(path):
    """Load a cloud or mesh: points [N, 3] f64, colors [N, 3] u8, normals [N, 3], faces [F, 3];
    None for what it lacks."""
    import trimesh

    with reading(path, "cloud or mesh"):
        mesh = trimesh.load(path, process=False, fix_texture=False)
        if isinstance(mesh, trimesh.Scene):  # a .glb of several parts
            mesh = mesh.to_mesh()
        visual = mesh.visual.to_color() if mesh.visual.kind == "texture" else mesh.visual
        points, faces, normals = np.asarray(mesh.vertices, float), None, None
        colors = visual.vertex_colors[:, :3] if visual.kind and len(visual.vertex_colors) else None
        if isinstance(mesh, trimesh.Trimesh):
            faces = np.asarray(mesh.faces)
            points[faces]  # a face of a vertex that is not there ends here

        # what a .ply calls its fields
        if "_ply_raw" in mesh.metadata:
            held = mesh.metadata["_ply_raw"]["vertex"]
            points[held["length"] - 1]  # a text that is cut off ends here
            for names in (("nx", "ny", "nz"), *COLORS):
                if not set(names) <= set(held["properties"]):
                    continue
                values = np.stack([np.ravel(held["data"][name]) for name in names], axis=1)
                if names[0] == "nx":
                    normals = values
                else:
                    colors = eight_bit(0.5 + 0.2821 * values if names[0] == "f_dc_0" else values)
    return points, colors, normals, faces


def eight_bit(values):
    """Bring colors [N, 3] up to 1, 255 or 65535, whichever they reach, to uint8."""
    highest = values.max()
    full = 65535 if highest > 255 else 255 if highest > 4 else 1
    return np.nan_to_num(values * (255.0 / full)).round().clip(0, 255).astype(np.uint8)


def write_ply(path, points, colours, normals):
    """Write a cloud as a binary .ply: points and normals [N, 3] in float32, colors [N, 3] uint8."""
    import trimesh

    cloud = trimesh.Trimesh(points, vertex_normals=normals, vertex_colors=colours, process=False)
    cloud.export(path, file_type="ply", vertex_normal=True)


def points_of_faces(points, colors, normals, faces, limit):
    """Draw points, colors, normals from the faces of a mesh, one in 3 x 3 cm, where its corners
    are much fewer: they alone do not show a wall.

    Faces that fill the space like no surface are left alone.
    """
    import trimesh

    mesh = trimesh.Trimesh(points, faces, process=False)
    count = int(min(limit, mesh.area / 0.03**2))
    if count < 4 * len(points) or mesh.area > 8 * mesh.bounding_box.area:
        return points, colors, vertex_normals(points, faces) if normals is None else normals
    drawn, face = trimesh.sample.sample_surface(mesh, count, seed=0)
    return drawn, None if colors is None else colors[faces[face]].mean(1), mesh.face_normals[face]


def read_cloud(
    path: str | Path, up: str = "auto", scale: float | None = None, limit: int = 200_000
) -> Scene:
    """Read a cloud or mesh (CLOUDS) as a scene without objects or frames, at most `limit` points,
    averaged in voxels.

    `up`: UP or "auto"; `scale`: meters per unit. Raises DataError.
    """
    path = Path(path)
    points, colors, normals, faces = load_mesh(path)
    points = points * (scale or 1.0)
    notes = [f"{len(points)} points in the file"]
    if faces is not None:
        notes.append(f"{len(faces)} faces")
        points, colors, normals = points_of_faces(points, colors, normals, faces, limit)

    # without what is not finite, and floaters of a reconstruction
    low, high = np.nanpercentile(points, (1, 99), axis=0)
    near = (np.abs(points - (low + high) / 2) <= 10 * (high - low).max()).all(1)
    if not near.all():
        notes.append(f"dropped {(~near).sum()} points that are not finite or far from all others")

    # near the origin, where float32 is fine enough; what lies twice at a place is one point
    points = points - (low.round() if np.abs(low).max() > 1000 else 0)
    columns = [np.zeros_like(points) if a is None else a for a in (points, colors, normals)]
    rows = np.concatenate(columns, axis=1)[near]
    points, color, normal, voxel = voxel_downsample(rows, np.ones(len(rows)), 0.005, limit)
    notes.append(f"{len(points)} points averaged in voxels of {voxel * 100:.1f} cm")
    if not (np.square(normal).sum(1) > 0.5).all():
        normal = estimate_normals(points)
    world, said = align_to_gravity(points, normal, up)
    scene = Scene(path.stem, "ply", [], notes=[*notes, said], **move(points, normal, world))
    scene.colours = None if colors is None else color
    return check_scene(scene, trusted=scale is not None)


# ---- 7.4 gravity


def up_of_cameras(points, normals, poses):
    """Find gravity's up [3] from cameras [V, 4, 4] and the surfaces they see, whose normals face
    them."""
    up, right = -poses[:, :3, 1].mean(0), poses[:, :3, 0].mean(0)

    # a phone held upright writes frames turned by a quarter; floor and tops, seen from above,
    # tell which side is up
    if np.linalg.norm(right) > 1.5 * np.linalg.norm(up):
        tilt = normals @ unit(right)
        up = right * np.sign(tilt[np.abs(tilt) > 0.8].sum())

    # towards the surfaces that face up, however steeply the cameras look down: no wall in front
    # of a camera does
    up = unit(up)
    for degrees in (75, 30, 15, 8):
        tilt = normals @ up
        level = (tilt if degrees == 75 else np.abs(tilt)) > np.cos(np.radians(degrees))
        if level.sum() < 100:
            return up
        up = unit((normals[level] * np.sign(tilt[level])[:, None]).mean(0))

    # fitted to the thickest layer of their points, without those that stick out
    floor = points[level].astype(np.float64)
    height = floor @ up
    bins = np.arange(height.min() - 0.1, height.max() + 0.2, 0.1)
    counts, edges = np.histogram(height, bins)
    floor = floor[np.abs(height - edges[counts.argmax()] - 0.05) < 0.1]
    for _ in range(6):
        offset = floor - floor.mean(0)
        plane = np.linalg.eigh(offset.T @ offset)[1][:, 0]
        away = np.abs(offset @ plane)
        floor = floor[away < 2 * away.mean() + 0.005]
    return plane * np.sign(plane @ up)


def up_of_cloud(points, normals):
    """Weigh for x, y and z what speaks for its pointing up (down, where negative): level surfaces
    and things lie low, and rooms are 2 to 3.5 meters high."""
    low, high = np.percentile(points, (1, 99), axis=0)
    size = np.maximum(high - low, 1e-6)
    place = (points - low) / size - 0.5  # [N, 3], -0.5 to 0.5
    things = place[(np.abs(place) < 0.45).all(1)]  # what is not the room's shell
    surfaces = -(np.sign(place) * (np.abs(normals) > 0.9)).mean(0)
    lying = -things.mean(0) if len(things) else 0.0
    return (surfaces + 2 * lying) * np.minimum(1, np.minimum(size / 2, 3.5 / size))


def find_up(points, normals, up, poses):
    """Find the direction [3] that points up, and why.

    `up`: an axis that a user or a layout names, or "auto".
    """
    if poses is not None:
        found, sure = up_of_cameras(points, normals, poses), True
    else:
        weight = up_of_cloud(points, normals)
        found = np.where(np.abs(weight) == np.abs(weight).max(), np.sign(weight), 0)
        sure = weight @ found > 2.5 * max(weight[2], 0.02)  # clouds are z-up by custom
    axis = max(UP, key=lambda name: UP[name] @ found)
    if up == "auto" and sure:
        return found, f"what is level and lies low, near {axis}"
    up = "+z" if up == "auto" else up
    direction = choose(UP, up, "--up")
    doubt = "" if direction @ found > 0.8 else f"; if it lies on its side, --up={axis} fits better"
    return direction, f"up = {up}{doubt}"


def align_to_gravity(points, normals, up, poses=None):
    """Find the rigid 4x4 that turns a cloud z-up, walls along x and y, floor at z = 0; and a line
    that says how."""
    from scipy.spatial.transform import Rotation

    up, said = find_up(points, normals, up, poses)
    turn = Rotation.align_vectors([[0, 0, 1]], [up])[0]

    # walls agree modulo a quarter turn, so as complex numbers their fourth powers do; twice
    # without what stands askew
    wall = turn.apply(normals)
    quarter = (wall[:, 0] + 1j * wall[:, 1])[np.abs(wall[:, 2]) < 0.2] ** 4
    if len(quarter) >= 100 and abs(quarter.mean()) > 0.1:
        for reach in (4.0, 0.6, 0.6):  # radians
            askew = np.angle(quarter[np.abs(np.angle(quarter)) < reach].mean())
            quarter = quarter * np.exp(-1j * askew)
            turn = Rotation.from_euler("z", -askew / 4) * turn

    # the floor is the lowest level surface that is no crumb
    z = turn.apply(points)[:, 2]
    level = z[np.abs(turn.apply(normals)[:, 2]) > 0.9]
    level = level if len(level) else z
    floor = np.median(level[np.abs(level - np.percentile(level, 3)) < 0.08])
    world = np.eye(4)
    world[:3, :3] = turn.as_matrix()
    world[2, 3] = -floor
    return world, f"turned z-up by {said}"


# ---- 7.5 ScanNet


def scan_folder(root: Path, scene_id: str) -> Path:
    """Find the folder of a scan below a ScanNet root."""
    for place in (root / scene_id, root / "scans" / scene_id, root / "scans_test" / scene_id):
        if (place / f"{scene_id}{SCAN_FILES[0]}").exists():
            return place
    lacking = f"no {scene_id}/{scene_id}{SCAN_FILES[0]} or under scans/, scans_test/"
    raise DataError(f"{root}: {lacking}; see python data.py check {root}")


def read_scannet(
    root: str | Path, scene_id: str, max_frames: int = 32, longest: float = math.inf
) -> Scene:
    """Read a ScanNet scan: its own files and, when they are looked at, `max_frames` of the frames
    exported beside them or below posed_images/<id> or frames/<id>, at most `longest` pixels.

    The axis alignment is the only transform. Instance = objectId + 1; wall, floor and ceiling are
    no objects; boxes are the extent of an object's points. Masks are read from instance-filt/ or
    else rendered. Raises DataError.
    """
    root, notes = Path(root), []
    folder = scan_folder(root, scene_id)
    mesh, segs, aggregation, info = (folder / f"{scene_id}{suffix}" for suffix in SCAN_FILES)
    points, colors, normals, faces = load_mesh(mesh)
    with reading(info, "scan description with an axisAlignment of 16 numbers"):
        aligned = re.search("axisAlignment = (.+)", info.read_text())  # scans for testing have none
        world = np.array(aligned[1].split(), float).reshape(4, 4) if aligned else np.eye(4)
    if normals is None:
        normals = estimate_normals(points) if faces is None else unit(vertex_normals(points, faces))
    cloud = move(points, normals, world)
    scene = Scene(scene_id, "scannet", [], colours=colors, notes=notes, **cloud)

    # objects are groups of segments; scans of the test split have neither
    scene.instances = np.zeros(len(points), np.int64)
    if segs.exists() or aggregation.exists():
        add_objects(scene, segs, aggregation)
    else:
        notes.append("a test scan without labels: superpoints are our own, objects unknown")
        scene.superpoints = over_segment(points, None if faces is not None else normals, faces)

    # a thousand scans do not fit in memory, so frames stay on disk
    places = folder, root / "posed_images" / scene_id, root / "frames" / scene_id
    found = [frames for frames in map(find_frames, places) if any(view.depth for view in frames[1])]
    if found and max_frames:
        load = partial(scan_frames, scene, world, *found[0], max_frames, longest)
        files = [view.image for view in found[0][1] if view.image]
        scene.frames = LazyFrames(load, file_key([mesh, *files]))
    elif max_frames:
        notes.append("no exported frames (color/, depth/, pose/, intrinsic/): points only")
    return check_scene(scene, trusted=True)


def add_objects(scene, segs, aggregation):
    """Give a scan its superpoints, objects and instances."""
    with reading(segs, "list of segIndices"):
        segments = np.array(read_json(segs)["segIndices"], np.int64)
    values, scene.superpoints = np.unique(segments, return_inverse=True)
    seen = []
    with reading(aggregation, "list of segGroups with objectId, label, segments"):
        for group in read_json(aggregation)["segGroups"]:
            id, label = group["objectId"] + 1, group["label"].replace("_", " ")
            parts = set(group["segments"])
            if label in SHELL or parts in seen:  # scene0217_00 lists its objects twice
                continue
            seen.append(parts)
            mine = np.isin(values, list(parts))[scene.superpoints]
            if not mine.any() or len(mine) != len(scene.points):
                what = f"{label} (objectId {id - 1}) and the mesh do not fit"
                raise DataError(f"{aggregation}: {what}; copy one scan's files")
            scene.instances[mine] = id

            # two keys are of write_scannet: boxes and colors that points can only approach
            box = np.array(group.get("alignedBox", extent(scene.points[mine])))
            color = group.get("colour") or colour_name(scene.colours, mine)
            scene.objects.append(Thing(id, label, color, box))


def scan_frames(scene, world, layout, views, max_frames, longest) -> Frames:
    """Read a scan's frames in the aligned axes, with masks of its objects."""
    notes = []
    frames = read_frames(scene.name, layout, views, max_frames, longest, notes)
    scene.notes += [note for note in notes if note not in scene.notes]
    frames.poses = world @ frames.poses
    if not any(view.mask for view in views):
        frames.masks = render_masks(scene.points, scene.instances, frames)
    frames.masks[~np.isin(frames.masks, [o.id for o in scene.objects])] = 0
    return frames


def write_scannet(scene: Scene, out: str | Path) -> Path:
    """Write a room as the ScanNet scan <out>/<name>, unaligned as scans are; read_scannet gives
    it back.

    Superpoints are cut at instances, depth is rounded to 1 mm. Color is written as PNG, so that
    nothing is lost; two extra keys per object (alignedBox, colour) hold what ScanNet has no place
    for.
    """
    folder = Path(out) / scene.name
    for part in ("color", "depth", "pose", "intrinsic", "instance-filt"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    mesh, segs, aggregation, info = (folder / f"{scene.name}{suffix}" for suffix in SCAN_FILES)
    world = rigid((1.5, -0.75, 0.25), (0, 0, 0.6435))  # a shift, and a turn about z
    back = np.linalg.inv(world)
    raw = move(scene.points, scene.normals, back)
    write_ply(mesh, raw["points"], scene.colours, raw["normals"])
    info.write_text(f"axisAlignment = {' '.join(map(str, world.ravel().tolist()))}\n")

    # a segment belongs to one object
    both = np.stack([scene.superpoints, scene.instances])
    pairs, segment = np.unique(both, axis=1, return_inverse=True)
    segs.write_text(json.dumps({"segIndices": segment.ravel().tolist()}))
    groups = []
    for o in scene.objects:
        group = dict(objectId=o.id - 1, label=o.category, colour=o.colour)
        group |= dict(alignedBox=o.box.tolist(), segments=np.flatnonzero(pairs[1] == o.id).tolist())
        groups.append(group)
    aggregation.write_text(json.dumps({"segGroups": groups}))

    frames, camera = scene.frames, np.eye(4)
    camera[:3, :3] = frames.intrinsics[0]
    np.savetxt(folder / "intrinsic/intrinsic_depth.txt", camera, "%.17g")
    for i, pose in enumerate(back @ frames.poses):
        np.savetxt(folder / f"pose/{i}.txt", pose, "%.17g")
        images = {
            "color": frames.colour[i],
            "depth": frames.depth[i] * 1000,
            "instance-filt": frames.masks[i],
        }
        for part, image in images.items():
            kind = np.uint8 if part == "color" else np.uint16
            Image.fromarray(image.round().astype(kind)).save(
                folder / part / f"{i}.png", compress_level=1
            )
    return folder


# ---- 8 video ---------------------------------------------------------------------------------------------------------

GUESS = 2.0  # meters: the median depth of frames whose scale nobody knows


def sharpness(gray) -> float:
    """Measure the sharpness of an image [h, w]: the mean squared difference of neighboring
    pixels, which blur lowers."""
    gray = np.asarray(gray, np.float32)
    return float(sum(np.square(np.diff(gray, axis=axis)).mean() for axis in (0, 1)))


def frames_from(container, stream, second):
    """Yield the frames of a video from `second` on, decoded from the key frame before."""
    container.seek(max(0, int(second / stream.time_base)), stream=stream)
    for frame in container.decode(stream):
        if frame.time is not None and frame.time >= second - 1e-6:
            yield frame


def video_frame(path, number):
    """Decode one frame of a video, [H, W, 3] uint8, with the rows as the camera wrote them."""
    av = need("av", "reading a video")
    with reading(path, "video"), av.open(str(path)) as container:
        stream = container.streams.video[0]
        frame = next(frames_from(container, stream, (number - 0.5) / stream.average_rate))
        return frame.to_ndarray(format="rgb24")


def read_video(path, _, count, longest, notes, tries=8):
    """Decode up to `count` frames [V, H, W, 3] uint8 of a video, upright: of each of as many
    equal intervals of time the sharpest of its first `tries` frames.

    What cannot be decoded, as the end of a torn recording, is left out.
    """
    av = need("av", "reading a video")
    images = []
    with reading(path, "video"), av.open(str(path), metadata_errors="replace") as container:
        if not container.streams.video:
            raise DataError(f"{path}: has no pictures; give a video")
        stream = container.streams.best("video")  # not a cover picture
        stream.thread_type = "AUTO"
        times = container.start_time, container.duration
        start, length = ((time or 0) / av.time_base for time in times)
        for begin, end in itertools.pairwise(start + np.linspace(0, length, count + 1)):
            # the first frames of an interval, as far as they can be decoded
            frames = []
            with suppress(av.FFmpegError):
                for frame in itertools.islice(frames_from(container, stream, begin), tries):
                    frames.append(frame)
            frames = [frame for frame in frames if frame.time < end]

            # of these the sharpest, turned as the tag of a phone held upright says
            if frames:
                best = max(frames, key=lambda frame: sharpness(frame.to_ndarray(format="gray")))
                image = np.rot90(best.to_ndarray(format="rgb24"), round(best.rotation / 90))
                size = fit_longest(*image.shape[:2], longest)
                images.append(resize(np.ascontiguousarray(image), size))
        notes.append(f"{len(images)} frames of {length:.1f} s, each the sharpest of up to {tries}")
        return np.stack(images)  # where none can be decoded this is no whole video


def read_photographs(where, views, count, longest, notes, tries=8):
    """Read up to `count` images [V, H, W, 3] uint8, upright as their EXIF tags say: of each of as
    many equal parts of the list the sharpest of its first `tries`.

    Depth and confidence maps (16 bits, or few values) are left out.
    """
    images, maps = [], 0
    for part in np.array_split(np.arange(len(views)), min(count, len(views))):
        photos = []
        for i in part[:tries]:
            with reading(views[i].image, "image"), Image.open(views[i].image) as image:
                is_map = image.mode[0] in "IF" or image.getcolors(8)
                photo = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
            maps += bool(is_map)
            photos += [] if is_map else [resize(photo, fit_longest(*photo.shape[:2], longest))]
        images += sorted(photos, key=lambda photo: sharpness(photo.mean(2)))[-1:]
    said = f"{len(images)} of {len(views)} images, each the sharpest of up to {tries}"
    notes.append(f"{said}; {maps} depth or confidence maps")
    if len({image.shape for image in images}) != 1:
        raise DataError(f"{where}: {notes[-1]}: no photographs of one size; known: {KNOWN_LAYOUTS}")
    return np.stack(images)


@lru_cache(maxsize=1)
def load_vggt(name: str):
    """Load VGGT (Wang et al., CVPR 2025) by its hub name or a folder of its weights, on a GPU
    where there is one."""
    vggt = need("vggt.models.vggt", "depth and cameras from bare frames")
    with reading(f"--vggt {name}", "VGGT, whose weights are on the hub as facebook/VGGT-1B"):
        model = vggt.VGGT.from_pretrained(name).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def vggt_geometry(images, model, longest=518):
    """See depth and cameras in images [V, H, W, 3] uint8: depth [V, H, W], confidence [V, H, W]
    >= 1, intrinsics [V, 3, 3] of this size, poses [V, 4, 4] camera to world in the first camera's
    axes, all in VGGT's own unit.

    Depth and cameras come from their own heads, whose un-projection VGGT's authors recommend over
    the point map. The longer side is brought to `longest` pixels, both to whole patches.
    """
    pose_enc = need("vggt.utils.pose_enc", "depth and cameras from bare frames")
    V, H, W, _ = images.shape
    patch, device = model.aggregator.patch_size, next(model.parameters()).device
    h, w = (max(1, round(n * longest / max(H, W) / patch)) * patch for n in (H, W))
    x = torch.from_numpy(np.ascontiguousarray(images)).to(device)  # [V, H, W, 3]
    x = x.permute(0, 3, 1, 2).float() / 255  # [V, 3, H, W]
    x = torch.nn.functional.interpolate(x, (h, w), mode="bicubic", antialias=True)  # [V, 3, h, w]
    x = x.clamp(0, 1)[None]  # [1, V, 3, h, w]

    # one pass of the transformer, two heads
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        tokens, first = model.aggregator(x)
    code = model.camera_head(tokens)[-1]  # [1, V, 9]
    maps = model.depth_head(tokens, images=x, patch_start_idx=first)  # [1, V, h, w, 1], [1, V, h, w]
    camera, K = pose_enc.pose_encoding_to_extri_intri(code, (h, w))  # [1, V, 3, 4], [1, V, 3, 3]

    # arrays of the images' size
    maps = torch.cat([m.reshape(1, V, h, w) for m in maps]).float()  # [2, V, h, w]
    maps = torch.nn.functional.interpolate(maps, (H, W), mode="nearest-exact")  # [2, V, H, W]
    K = np.diag([W / w, H / h, 1]) @ K[0].double().cpu().numpy()
    poses = np.tile(np.eye(4), (V, 1, 1))
    poses[:, :3] = camera[0].double().cpu().numpy()  # world to camera
    return *maps.cpu().numpy(), K, np.linalg.inv(poses)


def rescale(frames: Frames, unit: float) -> None:
    """Multiply depth and camera positions by `unit`, in place."""
    frames.depth *= np.float32(unit)
    frames.poses[:, :3, 3] *= unit


def fill_in(where, frames: Frames, vggt: str) -> Frames:
    """Put VGGT's depth, intrinsics and poses in place of those that are None, in the unit of
    those that are known.

    The unit is the median ratio of known to found depth, else of the cameras' distances from
    their middle. A fifth of the found depth, the least certain, is dropped. Raises DataError.
    """
    try:
        depth, confidence, K, poses = vggt_geometry(frames.colour, load_vggt(vggt))
    except DataError as error:
        lacking = [name for name, array in vars(frames).items() if array is None]
        raise DataError(f"{where}: has no {', '.join(lacking)}; {error}") from None
    sure = (depth > 0) & (confidence >= np.quantile(confidence, 0.2))
    if not (sure.any() and all(np.isfinite(a).all() for a in (depth, K, poses))):
        what = "no depth and cameras were found in its frames"
        raise DataError(f"{where}: {what}; record it again, slowly and in light")
    seen = Frames(frames.colour, np.where(sure, depth, 0), frames.masks, K, poses)

    # known poses have other axes than the found ones, but the same distances
    if frames.depth is not None:
        both = sure & (frames.depth > 0)
        rescale(seen, float(np.median(frames.depth[both] / depth[both])))
    elif frames.poses is not None:
        at = np.stack([frames.poses, poses])[:, :, :3, 3]  # [2, V, 3]
        known, found = np.median(np.linalg.norm(at - at.mean(1, keepdims=True), axis=2), axis=1)
        if known < 0.02:
            what = "the camera hardly moves, so its poses give no scale"
            raise DataError(f"{where}: {what}; leave them out")
        rescale(seen, known / max(found, 1e-9))
    known = {name: array for name, array in vars(frames).items() if array is not None}
    return replace(seen, **known)


# ---- 9 superpoints and segments --------------------------------------------------------------------------------------


def group_mean(values: np.ndarray, label: np.ndarray, count: int) -> np.ndarray:
    """Mean of values [N, C] per label 0..count-1."""
    total = np.stack([np.bincount(label, v, count) for v in values.T], axis=1)
    return total / np.maximum(np.bincount(label, minlength=count), 1)[:, None]


def vertex_normals(points: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Mean of the unit normals of a vertex's faces [N, 3] float32, *not* normalised, as in ScanNet's segmentator."""
    p = points.astype(np.float32)[faces]
    normal = np.cross(p[:, 1] - p[:, 0], p[:, 2] - p[:, 0])
    normal, corner = unit(normal * 1e6), faces.ravel()
    return group_mean(np.repeat(normal, 3, axis=0), corner, len(points)).astype(np.float32)


def neighbour_pairs(points: np.ndarray, k: int, reach: float = np.inf) -> tuple[np.ndarray, np.ndarray, float]:
    """Every pair a < b of points where one is among the other's k nearest, closer than `reach` times the median
    distance of nearest points: (a [E], b [E], that distance)."""
    distance, near = (a[:, 1:] for a in nearest(points, points, k + 1))
    spacing = float(np.median(distance[:, 0]))
    a, b = np.nonzero(distance <= max(reach * spacing, 1e-9))[0], near[distance <= max(reach * spacing, 1e-9)]
    key = np.sort(np.minimum(a, b) * len(points) + np.maximum(a, b))
    key = key[np.diff(key, prepend=-1) > 0]
    return key // len(points), key % len(points), spacing


def over_segment(points: np.ndarray, normals: np.ndarray | None = None, faces: np.ndarray | None = None,
                 threshold: float = 0.01, min_size: int = 20, k: int = 10) -> np.ndarray:  # fmt: skip
    """Superpoints [N] int64, contiguous from 0: Felzenszwalb-Huttenlocher with the rules of ScanNet's segmentator.

    An edge from a to b weighs 1 - n_a . n_b, squared if convex (n_b along b - a), so that rounded things hold together.
    Edges are a mesh's (faces [F, 3]; normals default to `vertex_normals`), or the k nearest neighbours' of a bare
    cloud, there the mean of both directions. Felzenszwalb & Huttenlocher, IJCV 2004; ScanNet's Segmentator calls
    threshold kThresh and min_size segMinVerts.
    """
    if len(points) < 2:
        return np.zeros(len(points), np.int64)
    points = np.asarray(points, np.float32)
    if normals is None:
        normals = vertex_normals(points, faces) if faces is not None else estimate_normals(points)
    normals = np.asarray(normals, np.float32)

    def weigh(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        flat = 1 - np.einsum("ij,ij->i", normals[a], normals[b])
        return np.where(np.einsum("ij,ij->i", normals[b], points[b] - points[a]) > 0, flat * flat, flat)

    if faces is not None:
        a, b = faces[:, [0, 0, 2]].ravel(), faces[:, [1, 2, 1]].ravel()
        weight = weigh(a, b)
    else:
        a, b, _ = neighbour_pairs(points, k)
        weight = (weigh(a, b) + weigh(b, a)) / 2
    return segment_graph(len(points), a, b, weight, threshold, min_size)


def segment_graph(count: int, a: np.ndarray, b: np.ndarray, weight: np.ndarray,
                  threshold: float, min_size: int) -> np.ndarray:  # fmt: skip
    """Labels [count] of a graph's segments from its edges a, b, weight [E], taken lightest first.

    Two segments join if the edge is no heavier than either's limit, its heaviest inner edge + threshold / size; at the
    end segments below min_size join a neighbour. A segment that refuses once is final, for later edges weigh more: so
    all edges inside a segment or at a final one are skipped by whole blocks, and Python sees few.
    """
    order = np.argsort(weight, kind="stable")
    a, b, weight = a[order], b[order], weight[order]
    parent, size, limit = list(range(count)), [1] * count, [threshold] * count
    final = np.zeros(count, bool)

    def find(x: int) -> int:
        while parent[x] != x:
            parent[x] = x = parent[parent[x]]
        return x

    def roots() -> np.ndarray:
        root = np.array(parent)
        while (root[root] != root).any():
            root = root[root]
        parent[:] = root.tolist()
        return root

    def join(x: int, y: int) -> int:
        x, y = (x, y) if size[x] >= size[y] else (y, x)
        parent[y] = x
        size[x] += size[y]
        return x

    for start in range(0, len(a), 1 << 16):
        block, root = slice(start, start + (1 << 16)), roots()
        x, y = root[a[block]], root[b[block]]
        live = (x != y) & ~final[x] & ~final[y]
        for p, q, w in zip(x[live].tolist(), y[live].tolist(), weight[block][live].tolist(), strict=True):
            p, q = find(p), find(q)
            if p != q and w <= limit[p] and w <= limit[q]:
                p = join(p, q)
                limit[p] = w + threshold / size[p]
            elif p != q:
                final[p] |= w > limit[p]
                final[q] |= w > limit[q]
    root = roots()
    across = root[a] != root[b]
    for p, q in zip(a[across].tolist(), b[across].tolist(), strict=True):
        p, q = find(p), find(q)
        if p != q and min(size[p], size[q]) < min_size:
            join(p, q)
    return np.unique(roots(), return_inverse=True)[1].astype(np.int64)


def extent(points: np.ndarray) -> np.ndarray:
    """The axis-aligned box [6] of points [N, 3]."""
    low, high = points.min(0).astype(float), points.max(0).astype(float)
    return np.concatenate([(low + high) / 2, high - low])


def colour_name(colours: np.ndarray | None, mine: np.ndarray) -> str:
    """The name in COLOURS nearest to the median of the colours [N, 3] at `mine`; "" without colours."""
    if colours is None:
        return ""
    median = np.median(colours[mine], axis=0)
    return min(COLOURS, key=lambda name: float(np.square(median - COLOURS[name]).sum()))


def hue_of(colours: np.ndarray) -> np.ndarray:
    """Colours [N, 3] u8 as one axis of brightness, which counts less, and two of hue: [N, 3] float32."""
    r, g, blue = colours.T.astype(np.float32) / 255
    return np.stack([(r + g + blue) / 6, 0.7 * (r - g), 0.7 * ((r + g) / 2 - blue)], axis=1)


def find_shell(points: np.ndarray, normals: np.ndarray, hue: np.ndarray, superpoints: np.ndarray,
               spacing: float) -> np.ndarray:  # fmt: skip
    """Mask [N] of the room itself: points on a large level or upright plane with next to nothing behind it (floor,
    ceiling, walls), in the plane's own colour (so that a flat rug or a door stays)."""
    shell, reach = np.zeros(len(points), bool), max(0.05, 1.2 * spacing)
    size = np.bincount(superpoints)
    mean = group_mean(normals, superpoints, len(size))
    flatness = np.linalg.norm(mean, axis=1)
    for s in np.flatnonzero((size >= 0.01 * len(points)) & (flatness > 0.9)):
        normal = mean[s] / flatness[s]
        height = (points - np.median(points[superpoints == s], axis=0)) @ normal
        if 0.3 < abs(normal[2]) < 0.9 or (height < -reach - 0.05).mean() > 0.03:
            continue
        on = (np.abs(height) < reach) & (normals @ normal > 0.8)
        off = np.linalg.norm(hue - np.median(hue[on], axis=0), axis=1)
        shell |= on & (off < max(0.1, 2.5 * np.median(off[on])))
    return shell


def merge_segments(points: np.ndarray, normals: np.ndarray, colours: np.ndarray, superpoints: np.ndarray,
                   colour_scale: float = 0.25, largest: float = 2.6, smallest: float = 0.12) -> np.ndarray:  # fmt: skip
    """Object-sized pieces of a cloud: instances [N] int64, 0 = the room itself and crumbs. No learning, no categories.

    Superpoints are cut where the colour jumps, the room's shell is taken away, and touching pieces join in order of
    a cost: colour difference / colour_scale, less for a small piece at a large one (a handle), + the concave share of
    the contact (things meet in concave edges: Stein et al., CVPR 2014), both halved where one lies within the other's
    box and does not rest on it (the glass of a mirror), + the share in which one rests on top of the other in another
    colour. Nothing grows beyond `largest` metres; what stays below `smallest` is a crumb.
    points, normals [N, 3] metres z-up, colours [N, 3] u8. The constants were set on procedural rooms.
    """
    a, b, spacing = neighbour_pairs(points, 8, reach=3.5)
    hue = hue_of(colours)
    inside = superpoints[a] == superpoints[b]
    jump = np.linalg.norm(hue[a] - hue[b], axis=1)
    piece = segment_graph(len(points), a[inside], b[inside], jump[inside], 0.1, 8)
    S = int(piece.max()) + 1
    size = np.bincount(piece).astype(float)
    kept = np.bincount(piece, find_shell(points, normals, hue, superpoints, spacing), S) < 0.5 * size
    tint = group_mean(hue, piece, S)
    low, high = np.full((S, 3), np.inf), np.full((S, 3), -np.inf)
    np.minimum.at(low, piece, points)
    np.maximum.at(high, piece, points)

    links = touching(points, normals, piece, kept, high[:, 2], (a, b), spacing)
    root = join_pieces(links, size, tint, low, high, spacing, colour_scale, largest)
    big = kept & (root == np.arange(S)) & (size >= 12) & ((high - low).max(1) >= smallest)
    return (np.cumsum(big) * big)[root][piece]


def touching(points: np.ndarray, normals: np.ndarray, piece: np.ndarray, kept: np.ndarray, top: np.ndarray,
             pairs: tuple[np.ndarray, np.ndarray], spacing: float) -> list[dict[int, np.ndarray]]:  # fmt: skip
    """For each of S pieces those that touch it, and their contact [3]: how many pairs of neighbouring points, in how
    many of them the surface is concave, and one rests on top of the other. piece [N] of points and normals [N, 3],
    metres; kept [S] bool, top [S] the greatest heights, pairs: two [E]."""
    (a, b), S = pairs, len(kept)
    x, y = piece[a], piece[b]
    touch = (x != y) & kept[x] & kept[y]
    a, b, x, y = a[touch], b[touch], x[touch], y[touch]
    gap = points[a] - points[b]
    concave = ((normals[a] - normals[b]) * gap).sum(1) < -0.2 * np.linalg.norm(gap, axis=1)
    rests = concave & (((normals[a][:, 2] > 0.8) & (top[y] > top[x] + 2 * spacing))
                       | ((normals[b][:, 2] > 0.8) & (top[x] > top[y] + 2 * spacing)))  # fmt: skip
    key, inverse = np.unique(np.minimum(x, y) * S + np.maximum(x, y), return_inverse=True)
    contacts = np.stack([np.bincount(inverse, w, len(key)) for w in (np.ones(len(a)), concave, rests)], axis=1)
    links: list[dict[int, np.ndarray]] = [{} for _ in range(S)]
    for k, contact in zip(key.tolist(), contacts, strict=True):
        links[k // S][k % S] = links[k % S][k // S] = contact
    return links


def join_pieces(links: list[dict[int, np.ndarray]], size: np.ndarray, tint: np.ndarray, low: np.ndarray,
                high: np.ndarray, spacing: float, colour_scale: float, largest: float) -> np.ndarray:  # fmt: skip
    """Join touching pieces while the cheapest pair costs at most 1 (`merge_segments`): the piece [S] that each became,
    whose rows of size [S], tint, low and high [S, 3] then describe them all. `links` of `touching` is used up."""
    S = len(links)
    version, into, heap = [0] * S, list(range(S)), []

    def offer(p: int, others: list[int]) -> None:
        """Put the pairs of p and others on the heap, as far as they may join: those of a cost of 1 at most."""
        q = np.array(others, int)
        edges, bent, resting = np.array([links[p][other] for other in others]).reshape(-1, 3).T
        lows, highs = low[q], high[q]
        whole = (np.maximum(high[p], highs) - np.minimum(low[p], lows)).max(1)
        ends = np.concatenate([low[p] - lows, highs - high[p]], axis=1)
        within = (resting == 0) & ((ends >= -spacing).all(1) | (ends <= spacing).all(1))
        half = np.where(within, 0.5, 1.0)
        differ = half * np.linalg.norm(tint[p] - tint[q], axis=1) / colour_scale
        weight = 0.5 + 0.5 * (np.minimum(size[p], size[q]) / np.maximum(size[p], size[q])) ** 0.5
        cost = weight * differ + half * bent / edges + np.where(differ > 0.5, resting / edges, 0.0)
        for i in np.flatnonzero((cost <= 1) & (whole <= largest)).tolist():
            u, v = min(p, others[i]), max(p, others[i])
            heapq.heappush(heap, (float(cost[i]), u, v, version[u], version[v]))

    for p in range(S):
        offer(p, [q for q in links[p] if p < q])
    while heap:
        _, p, q, *seen = heapq.heappop(heap)
        if seen != [version[p], version[q]]:
            continue  # one of them has grown since
        tint[p] = (size[p] * tint[p] + size[q] * tint[q]) / (size[p] + size[q])
        size[p] += size[q]
        low[p], high[p] = np.minimum(low[p], low[q]), np.maximum(high[p], high[q])
        into[q], version[p], version[q] = p, version[p] + 1, -1
        for other, contact in links[q].items():
            del links[other][q]
            if other != p:
                links[p][other] = links[other][p] = contact + links[p].get(other, 0)
        links[q] = {}
        offer(p, [*links[p]])
    root = np.array(into)
    while (root[root] != root).any():
        root = root[root]
    return root


def render_masks(points: np.ndarray, instances: np.ndarray, frames: Frames, reach: float | None = None) -> np.ndarray:
    """Masks [V, H, W] int32: every depth pixel takes the instance [N] of the nearest point [N, 3], 0 beyond `reach`
    metres (default: 5 cm or twice the cloud's spacing). Asked from the pixels, this tests depth and leaves no holes."""
    if reach is None:
        reach = max(0.05, 2 * float(np.quantile(nearest(points, points, 2)[0][:, -1], 0.5, method="lower")))
    masks = np.zeros(frames.depth.shape, np.int32)
    for v in range(len(masks)):  # one frame at a time: memory stays that of a frame
        seen = frames.depth[v] > 0
        pixels = unproject(frames.depth[v : v + 1], frames.intrinsics[v : v + 1], frames.poses[v : v + 1])[0][seen]
        distance, near = (a[:, 0] for a in nearest(pixels, points))
        masks[v][seen] = np.where(distance <= reach, instances[near], 0)
    return masks


def in_view(points: np.ndarray, K: np.ndarray, pose: np.ndarray,
            size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Which points [N, 3] fall on an image of size (H, W), hidden ones too: (index [M], row [M], column [M], depth [M]
    metres along the camera's axis). K [3, 3]; pose [4, 4] camera to world."""
    pixels, depth = project(points, K, pose)
    inside = np.flatnonzero((depth > 0.1) & (pixels >= 0).all(1) & (pixels < size[::-1]).all(1))
    column, row = pixels[inside].astype(int).T
    return inside, row, column, depth[inside]


def depth_support(points: np.ndarray, instances: np.ndarray, frames: Frames,
                  reach: float = 0.1) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """What depth that a segmentation has not used says about it: for every instance id the share [n] of its points that
    lie on the measured surface (to `reach` metres) among those that do or are seen through, and their number [n].
    A point behind the surface is hidden and has no say."""
    agree, against = (np.zeros(int(instances.max(initial=0)) + 1) for _ in range(2))
    for depth, K, pose in zip(frames.depth, frames.intrinsics, frames.poses, strict=True):
        inside, v, u, z = in_view(points, K, pose, depth.shape)
        measured = depth[v, u]
        for total, hit in ((agree, np.abs(measured - z) <= reach), (against, measured > z + reach)):
            total += np.bincount(instances[inside][hit & (measured > 0)], minlength=len(total))
    return agree / np.maximum(agree + against, 1), (agree + against).astype(int)


def surface(scene: Scene, limit: int = 100_000) -> tuple:
    """What its cameras see of a scene: points, colours and normals. A room's own cloud comes from the objects
    themselves, so that cloud is fused from its frames, like that of any scene with frames alone."""
    f = scene.frames
    if f is None or (scene.points is not None and scene.source != "rooms"):
        return scene.points, scene.colours, scene.normals
    return fuse(zip(f.colour, f.depth, f.intrinsics, f.poses, strict=True), limit)[:3]


def read_masks(points: np.ndarray, frames: Frames) -> np.ndarray:
    """The inverse of `render_masks`: for points [N, 3] the object id [N] of the nearest depth pixel of all frames."""
    seen = unproject(frames.depth, frames.intrinsics, frames.poses)[frames.depth > 0]
    return frames.masks[frames.depth > 0][nearest(points, seen)[1][:, 0]].astype(np.int64)


def seen_cloud(scene: Scene, limit: int = 100_000) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]:
    """`surface` with what it may lack: points, colours (None: without), normals, and the colours or grey."""
    points, colours, normals = surface(scene, limit)
    if points is None or len(points) < 2:
        raise DataError(f"{scene.name}: no cloud and no frames to segment; read them first")
    grey = np.full((len(points), 3), 128, np.uint8) if colours is None else colours
    return points, colours, estimate_normals(points) if normals is None else normals, grey


def with_own_segments(scene: Scene, limit: int = 100_000) -> Scene:
    """The scene with its own segments for objects, its superpoints and masks made anew, on the cloud of `seen_cloud`.
    Raises DataError where there is nothing to segment."""
    points, colours, normals, grey = seen_cloud(scene, limit)
    superpoints = over_segment(points, normals)
    instances = merge_segments(points, normals, grey, superpoints)
    masks = None if scene.frames is None else render_masks(points, instances, scene.frames)
    return with_pieces(scene, (points, colours, normals), superpoints, instances, masks, "segments of our own")


def with_pieces(scene: Scene, cloud: tuple, superpoints: np.ndarray, instances: np.ndarray, masks: np.ndarray | None,
                what: str, trim: float = 0.0) -> Scene:  # fmt: skip
    """The scene on a cloud (points, colours, normals), the pieces that instances [N] number on it for objects (category
    "", colour by name), and masks [V, H, W]; boxes leave out the share `trim` of a piece's points at every side."""
    (points, colours, normals), f, objects = cloud, scene.frames, []
    for i in range(1, int(instances.max(initial=0)) + 1):
        mine = instances == i
        box = extent(np.quantile(points[mine], (trim, 1 - trim), axis=0))
        objects.append(Thing(i, "", colour_name(colours, mine), box))
    note = f"objects are {len(objects)} {what}, without categories"
    return replace(scene, points=points, colours=colours, normals=normals, superpoints=superpoints, instances=instances,
                   objects=objects, frames=f and Frames(f.colour, f.depth, masks, f.intrinsics, f.poses),
                   notes=[*scene.notes, note])  # fmt: skip


# ---- 9b masks of a video ---------------------------------------------------------------------------------------------
# SAM 2 follows what it is shown through the frames and loses what leaves the view; points in space say which tracks are
# one object (`with_sam2`).

SAM2 = "facebook/sam2.1-hiera-large"  # Proxy3D does not say which SAM 2 it takes: the most accurate one


@lru_cache(maxsize=1)
def load_sam2(name: str | Path | None = SAM2, config: str | None = None, device: str | None = None, **overrides):
    """SAM 2's video predictor, ready to track.

    name: of its weights on the hub; a checkpoint (.pt) of one's own, with the name of its configuration in SAM 2's
    package unless the file still bears its published name; or None, untrained weights. overrides: values of the
    configuration's model, as image_size=512 (pixels, published 1024). Weights are read without executing pickles.
    Raises DataError where the package or the weights are missing, or do not fit each other.
    """
    try:
        from pickle import UnpicklingError

        from hydra.errors import HydraException
        from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES, build_sam2_video_predictor
    except ImportError:
        raise DataError(f"SAM 2 is not installed: {INSTALL['sam2']} (or --masks segments)") from None
    published = {file: configuration for configuration, file in HF_MODEL_ID_TO_FILENAMES.values()}
    path = None if name is None else Path(name)
    if name in HF_MODEL_ID_TO_FILENAMES:
        from huggingface_hub import hf_hub_download

        _, file = HF_MODEL_ID_TO_FILENAMES[name]
        try:
            path = Path(hf_hub_download(name, file))
        except OSError:
            raise DataError(f"{name}: {file} is not here and the hub does not give it; download it where there is a "
                            "network and give its path in the name's place") from None  # fmt: skip
    elif path is not None and not path.is_file():
        raise DataError(f"{path}: no such checkpoint; give a file or one of {', '.join(HF_MODEL_ID_TO_FILENAMES)}")
    config = config or (path and published.get(path.name))
    if config is None:
        raise DataError(f"{name}: whose configuration? give config = one of {', '.join(sorted(published.values()))}")
    try:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        changes = [f"++model.{key}={value}" for key, value in overrides.items()]
        model = build_sam2_video_predictor(config, device=device, hydra_overrides_extra=changes)
    except HydraException as error:
        why = " ".join(str(error).split())[:200]
        raise DataError(f"{config}: not a configuration of SAM 2's package, or not with {overrides} ({why})") from None
    if path is not None:
        with reading(path, f"checkpoint for {config}"):
            try:
                model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model"])
            except (RuntimeError, UnpicklingError) as error:  # other names and shapes; more than tensors inside
                raise ValueError(" ".join(str(error).split())) from None
    model.fill_hole_area = 0  # holes of 8 pixels: filling them needs SAM 2's own CUDA extension, and warns without it
    return model


def automatic_masks(model, **settings) -> Callable[[np.ndarray], list[np.ndarray]]:
    """A function from one image [H, W, 3] u8 to the masks [H, W] bool that SAM 2 sees in it when it is prompted with a
    grid of points; it shares the video predictor's weights. settings: SAM2AutomaticMaskGenerator's (points_per_side=32,
    pred_iou_thresh=0.8, ...); unknown ones raise DataError."""
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

    known = dict(inspect.signature(SAM2AutomaticMaskGenerator).parameters)
    for key in settings:  # it would take and forget them
        choose(known, key, "setting of automatic masks")
    generator = SAM2AutomaticMaskGenerator(model, **settings)
    generator.predictor._bb_feat_sizes = [(model.image_size // s,) * 2 for s in (4, 8, 16)]  # it assumes 1024 pixels
    return lambda image: [found["segmentation"] for found in generator.generate(image)]


def new_masks(proposals: Sequence[np.ndarray], tracks: np.ndarray, smallest: float, largest: float) -> list[np.ndarray]:
    """Of the masks [H, W] bool proposed on a frame those that start a track, from large to small.

    tracks [H, W] int are already there. A mask is left out if it covers less than `smallest` or more than `largest` of
    the frame (a wall from near), or if half of it belongs to tracks or to larger masks: then it is such an object, or a
    part of one. Otherwise it keeps what it shares with none.
    """
    taken, kept = tracks > 0, []
    for mask in sorted(proposals, key=np.count_nonzero, reverse=True):  # stable: equal ones in the order given
        fresh = mask & ~taken
        if smallest <= mask.mean() <= largest and 2 * fresh.sum() > mask.sum():
            kept.append(fresh)
            taken |= mask
    return kept


def keep_labels(labels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The labels with kept[label] renumbered from 1 in their order, the others 0; int32."""
    kept = kept & (np.arange(len(kept)) > 0)
    return (np.cumsum(kept) * kept).astype(np.int32)[labels]


def sam2_masks(images: np.ndarray, model, keyframe_every: int = 8, most: int = 100, chunk: int = 16,
               smallest: float = 0.001, largest: float = 0.5,
               propose: Callable[[np.ndarray], Sequence[np.ndarray]] | None = None) -> np.ndarray:  # fmt: skip
    """Tracks [V, H, W] int32 of everything in a video [V, H, W, 3] u8: 0 = none, ids 1..n, n <= most.

    On every `keyframe_every`-th frame and on the last, `propose` (default: `automatic_masks(model)`) finds masks; those
    that no track explains (see `new_masks`) are followed forwards and backwards, the largest first, until there are
    `most` tracks. A pixel goes to the track of the highest score; on a frame where a track has less than `smallest` of
    the pixels it is not seen. What leaves the view and comes back may be a new track: `merge_tracks`.

    model: `load_sam2()`. Memory on the CPU, at 1024 pixels: 12.6 MB per frame, 8 bytes per pixel of the video and the
    state of `chunk` tracks, 4 MB per track and 0.8 MB per track and frame; so sample 32 to 64 frames of a video first.
    Time grows with tracks times frames; the images are encoded anew for every chunk.
    """
    from PIL import Image

    V, H, W = images.shape[:3]
    propose = propose or automatic_masks(model)
    tracks, best, count = np.zeros((V, H, W), np.int32), np.zeros((V, H, W), np.float32), 0
    on_gpu = model.device.type == "cuda"
    with (tempfile.TemporaryDirectory() as folder, torch.inference_mode(),
          torch.autocast(model.device.type, torch.bfloat16, enabled=on_gpu)):  # fmt: skip
        for v in range(V):  # SAM 2 reads frames from a folder only
            Image.fromarray(images[v]).save(f"{folder}/{v:05d}.jpg", quality=95, subsampling=0)
        state = model.init_state(folder, offload_video_to_cpu=True, offload_state_to_cpu=True)
        for key in sorted({*range(0, V, keyframe_every), V - 1}):
            started = new_masks(propose(images[key]), tracks[key], smallest, largest)[: most - count]
            for first in range(0, len(started), chunk):
                for mask in started[first : first + chunk]:
                    count += 1
                    model.add_new_mask(state, key, count, mask)
                for reverse in (False, True):
                    for v, ids, logits in model.propagate_in_video(state, start_frame_idx=key, reverse=reverse):
                        score, which = (t.cpu().numpy() for t in logits[:, 0].float().max(0))  # [H, W] each
                        better = score > best[v]
                        best[v][better], tracks[v][better] = score[better], np.array(ids)[which[better]]
                model.reset_state(state)
    shown = np.zeros(count + 1, bool)
    for frame in tracks:
        area = np.bincount(frame.ravel(), minlength=count + 1)
        frame[area[frame] < smallest * H * W] = 0
        shown |= area >= max(1, smallest * H * W)
    return keep_labels(tracks, shown)


def merge_tracks(tracks: np.ndarray, points: np.ndarray, voxel: float = 0.05, share: float = 0.3,
                 smallest: int = 4) -> np.ndarray:  # fmt: skip
    """Masks [V, H, W] int32 in which tracks [V, H, W] that are one object bear one id, from 1, the largest first.

    points [V, H, W, 3] metres (NaN = missing, `unproject`). A track occupies the voxels where it has more than half of
    the points, counted on the frames that show the track: at its edges, neighbours and what its mask spills on have
    more. Two tracks become one if they share at least `share` of the voxels of the smaller, the largest shares first,
    unless some frame shows both, or shows what each has already become: standing side by side they are two objects (a
    book lies on the table that is seen with it). Objects of fewer than `smallest` voxels are dropped.
    """
    V, n = len(tracks), int(tracks.max(initial=0))
    present = np.zeros((n + 1, V), bool)
    for v in range(V):
        present[np.unique(tracks[v]), v] = True
    measured = np.isfinite(points).all(-1)
    cell = voxel_of(points[measured], voxel)
    C = int(cell.max(initial=-1)) + 1
    key = (np.nonzero(measured)[0] * C + cell) * (n + 1) + tracks[measured]
    key, count = np.unique(key, return_counts=True)  # a row per frame, voxel and track
    frame, cell, track = key // (n + 1) // max(C, 1), key // (n + 1) % max(C, 1), key % (n + 1)
    occupied = np.zeros((n + 1, C), np.float32)
    for t in range(1, n + 1):
        here, own = present[t, frame], track == t
        occupied[t] = 2 * np.bincount(cell[own], count[own], C) > np.bincount(cell[here], count[here], C)

    both, size = occupied @ occupied.T, occupied.sum(1)
    overlap = np.triu(both / np.maximum(np.minimum(size[:, None], size), 1), 1)
    a, b = np.nonzero(overlap >= share)
    root = np.arange(n + 1)
    for i in np.argsort(-overlap[a, b], kind="stable"):
        p, q = root[a[i]], root[b[i]]
        if p != q and not (present[p] & present[q]).any():
            present[p] |= present[q]
            occupied[p] = np.maximum(occupied[p], occupied[q])
            root[root == q] = p
    size = occupied.sum(1) * (root == np.arange(n + 1))
    order = np.argsort(-size, kind="stable")[: int((size >= smallest).sum())]
    rank = np.zeros(n + 1, np.int32)
    rank[order] = np.arange(1, len(order) + 1)
    return rank[root][tracks]


def vote(points: np.ndarray, masks: np.ndarray, frames: Frames | LazyFrames, reach: float = 0.05) -> np.ndarray:
    """Instances [N] int64 of points [N, 3]: the mask [V, H, W] that most frames show at the point, if most of those
    that see the point and that mask anywhere agree; 0 = none. A frame sees a point within `reach` metres of its depth.
    """
    N, n, V = len(points), int(masks.max(initial=0)), len(masks)
    votes, seen = np.zeros((N, n + 1), np.int16), np.zeros((V, N), bool)
    for v in range(V):
        inside, row, column, z = in_view(points, frames.intrinsics[v], frames.poses[v], masks.shape[1:])
        near = np.abs(frames.depth[v][row, column] - z) <= reach
        inside, row, column = inside[near], row[near], column[near]
        seen[v, inside] = True
        votes[inside, masks[v][row, column]] += 1
    votes[:, 0] = 0
    first = votes.argmax(1)
    together = np.zeros(N, int)
    for v in range(V):
        together += seen[v] & np.isin(first, np.unique(masks[v]))
    return np.where(2 * votes[np.arange(N), first] > together, first, 0)


def with_tracks(scene: Scene, tracks: np.ndarray, limit: int = 100_000) -> Scene:
    """The scene with merged tracks [V, H, W] of its frames for masks and objects, on the cloud of `seen_cloud`; its
    points are labelled by `vote`.

    A track that mostly lies on the room's shell (floor, wall), or has fewer than 8 points, is dropped. Boxes span the
    2nd to 98th percentile of a track's points: masks bleed at edges. Raises DataError without frames of that size.
    """
    f = scene.frames
    if f is None or f.depth.shape != tracks.shape:
        have = "none" if f is None else f.depth.shape
        raise DataError(f"{scene.name}: tracks are {tracks.shape}, frames {have}; make the tracks from these frames")
    points, colours, normals, grey = seen_cloud(scene, limit)
    keep = scene.superpoints is not None and points is scene.points
    superpoints = scene.superpoints if keep else over_segment(points, normals)
    shell = find_shell(points, normals, hue_of(grey), superpoints, neighbour_pairs(points, 1)[2])
    instances = vote(points, tracks, f)
    n = int(tracks.max(initial=0))
    total, flat = (np.bincount(i, minlength=n + 1) for i in (instances, instances[shell]))
    kept = (total >= 8) & (2 * flat < total)
    instances, masks = keep_labels(instances, kept).astype(np.int64), keep_labels(tracks, kept)
    cloud, what = (points, colours, normals), "tracks through the frames"
    return with_pieces(scene, cloud, superpoints, instances, masks, what, trim=0.02)


# ---- 10 pictures -----------------------------------------------------------------------------------------------------

DPI = 90  # of all pictures
PICTURES = (".png", ".jpg", ".pdf", ".svg")


def palette(count: int) -> np.ndarray:
    """Colours [count + 1, 3] of objects by id: neighbours in number far apart in hue; 0, the room itself, is pale."""
    from matplotlib.colors import hsv_to_rgb

    i = np.arange(count + 1)
    colours = hsv_to_rgb(np.stack([i * 0.618 % 1, np.array([0.7, 0.4, 0.85])[i % 3], 0.95 - 0.25 * (i // 3 % 2)], 1))
    colours[0] = 0.87
    return colours


def z_buffer(pixels: np.ndarray, depth: np.ndarray, radius: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which point shows in every pixel of an image of `size` (H, W): [H, W] index, -1 = none. Points are discs of
    `radius` [N] pixels at pixels [N, 2] (x, y; NaN = unseen), and the one of least depth [N] shows."""
    H, W = size
    order = np.argsort(-depth, kind="stable")  # far first: of several in one pixel the last written, the nearest, stays
    order = order[np.isfinite(pixels[order]).all(1)]
    at, radius, depth = np.floor(pixels[order]).astype(int), radius[order], depth[order]
    which, near = np.full(H * W, -1), np.full(H * W, np.inf)
    reach = int(np.ceil(radius.max(initial=0)))
    for dy, dx in itertools.product(range(-reach, reach + 1), repeat=2):
        x, y = at[:, 0] + dx, at[:, 1] + dy
        here = (dx * dx + dy * dy <= radius * radius) & (x >= 0) & (x < W) & (y >= 0) & (y < H)
        flat, z = (y * W + x)[here], depth[here]
        front = z < near[flat]
        near[flat[front]], which[flat[front]] = z[front], order[here][front]
    return which.reshape(H, W)


def shade(which: np.ndarray, depth: np.ndarray, span: float) -> np.ndarray:
    """Brightness [H, W] of a `z_buffer`: a pixel behind its neighbours is darker, up to `span` metres; so edges show
    without normals (eye-dome lighting: Boucheny 2009)."""
    z = np.pad(np.where(which >= 0, depth[which] if len(depth) else 0.0, np.inf), 2, constant_values=np.inf)
    behind = np.zeros(which.shape)
    for dy, dx in itertools.product((-2, 0, 2), repeat=2):
        around = np.roll(z, (dy, dx), (0, 1))[2:-2, 2:-2]
        with np.errstate(invalid="ignore"):
            behind += np.nan_to_num(np.clip((z[2:-2, 2:-2] - around) / span, 0, 1)) * np.isfinite(around)
    return 1 - 0.09 * np.where(which >= 0, behind, 0)


def corner_camera(low: np.ndarray, high: np.ndarray, sides: tuple[int, int],
                  size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Intrinsics [3, 3] and pose [4, 4] of a camera that looks from above over one corner of the box low..high [3], the
    one at `sides` (-1 or 1 along x and y), and has all of it in an image of `size` (H, W)."""
    centre, reach = (low + high) / 2, np.linalg.norm(high - low)
    away = np.array([*(np.array(sides) * np.maximum(high - low, 0.3 * reach)[:2]), 0.0])
    away = away / np.linalg.norm(away) + [0, 0, 0.75]
    pose = _look((centre + 1.05 * reach * away)[None], centre[None])[0]
    corners = np.array(list(itertools.product(*zip(low, high, strict=True))))
    flat, _ = project(corners, np.eye(3), pose)
    least, most = flat.min(0), flat.max(0)
    focal = 0.97 * min(np.array(size[::-1]) / (most - least))
    K = np.diag([focal, focal, 1.0])
    K[:2, 2] = np.array(size[::-1]) / 2 - focal * (least + most) / 2
    return K, pose


def spread_labels(anchors: np.ndarray, sizes: np.ndarray, limits: tuple[float, float],
                  taken: np.ndarray) -> np.ndarray:  # fmt: skip
    """Centres [n, 2] for labels of `sizes` [n, 2] near their anchors [n, 2], none over another or over the rectangles
    `taken` [m, 4] (centre, half size) and all inside (0, 0)..limits; NaN where there is no room within 90 pixels.
    Greedy, in the order given."""
    angle = np.arange(16) * np.pi / 8
    rings = np.concatenate([[[0.0, 0.0]], *(r * np.stack([np.sin(angle), -np.cos(angle)], 1) for r in range(8, 91, 6))])
    placed = np.full((len(anchors), 2), np.nan)
    for i, (anchor, half) in enumerate(zip(anchors, sizes / 2, strict=True)):
        tries = anchor + rings * [1.6, 1.0]  # labels are wider than high
        free = ((tries - half >= 0) & (tries + half <= limits)).all(1)
        gap = np.abs(tries[:, None] - taken[:, :2]) - half - taken[:, 2:]
        free &= (gap >= 0).any(2).all(1)
        if free.any():
            placed[i] = tries[free.argmax()]
            taken = np.concatenate([taken, [[*placed[i], *half]]])
    return placed


class View:
    """One panel of a picture: the cloud as it looks from there, and whatever is drawn over it, all in metres.

    Without a camera it looks from straight above and its axes are metres; with one, (K, pose), they are pixels."""

    def __init__(self, axis, size: tuple[int, int], low: np.ndarray, high: np.ndarray, camera: tuple | None = None,
                 unit: str = " (m)"):  # fmt: skip
        self.axis, self.size, self.camera, self.span = axis, size, camera, float(np.linalg.norm(high - low))
        H, W = size
        self.scale, self.start, self.top, self.taken = 1.0, np.zeros(2), high[2], np.zeros((0, 4))
        if camera is None:
            self.scale = min(W / (high - low)[0], H / (high - low)[1]) * 0.96  # pixels per metre
            self.start = (low + high)[:2] / 2 - np.array([W, H]) / self.scale / 2
            axis.set(xlabel=f"x{unit}", ylabel=f"y{unit}")
        else:
            axis.set(xticks=[], yticks=[])
        x, y = self.start + np.array([W, H]) / self.scale
        axis.set(xlim=(self.start[0], x), ylim=(self.start[1], y) if camera is None else (H, 0))

    def place(self, points: np.ndarray) -> np.ndarray:
        """Points [..., 3] metres -> [..., 2] in the panel's own units; NaN behind the camera."""
        return np.asarray(points)[..., :2] if self.camera is None else project(points, *self.camera)[0]

    def pixels(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points [..., 3] -> pixels [..., 2], downwards, and how far they are from the eye [...]."""
        if self.camera is not None:
            return project(points, *self.camera)
        x, y = np.moveaxis((points[..., :2] - self.start) * self.scale, -1, 0)
        return np.stack([x, self.size[0] - y], -1), self.top - points[..., 2]

    def faces(self, cloud: dict) -> np.ndarray:
        """Mask [N]: False where the outer walls and the ceiling turn their backs, to look into the room."""
        points, normals, low, high = (cloud[k] for k in ("points", "normals", "low", "high"))
        if self.camera is None:
            return (normals[:, 2] > -0.3) | (points[:, 2] < low[2] + 0.9 * (high - low)[2])
        return (normals * unit(self.camera[1][:3, 3] - points)).sum(1) > -0.1

    def show(self, cloud: dict, look: str) -> None:
        """Draw a `shown_cloud`, coloured as LOOKS says, its points as discs that close the gaps between them."""
        points, spacing, colours = cloud["points"], cloud["spacing"], LOOKS[look][1](cloud["ids"], cloud["true"])
        pixels, depth = self.pixels(points)
        pixels[~self.faces(cloud)] = np.nan
        grain = self.scale if self.camera is None else self.camera[0][0, 0] / np.maximum(depth, 1e-3)
        most = min(14.0, (4e6 / max(len(points), 1)) ** 0.5)
        which = z_buffer(pixels, depth, np.clip(0.6 * spacing * grain, 0.8, most), self.size)
        image = np.ones((*self.size, 3))
        image[which >= 0] = colours[which[which >= 0]]
        image *= shade(which, depth, 0.04 * self.span)[..., None]
        (x0, x1), (y0, y1) = self.axis.get_xlim(), self.axis.get_ylim()
        self.axis.imshow(image, extent=(x0, x1, y0, y1), interpolation="bilinear", aspect="auto", zorder=0)

    def dots(self, points: np.ndarray, **style):
        """matplotlib's scatter at points [n, 3]."""
        return self.axis.scatter(*self.place(points).T, **style)

    def lines(self, paths: np.ndarray, **style) -> None:
        """Polylines through paths [n, m, 3]; see matplotlib's LineCollection."""
        from matplotlib.collections import LineCollection

        self.axis.add_collection(LineCollection(self.place(np.asarray(paths)), **style), autolim=False)

    def boxes(self, boxes: np.ndarray, **style) -> None:
        """Outlines of boxes [n, 6]: their twelve edges; from above, a rectangle each."""
        steps = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 1], [1, 1, 1],
                          [0, 1, 1], [0, 0, 1]]) - 0.5  # fmt: skip
        rest = np.array([[[1, 0, 0], [1, 0, 1]], [[1, 1, 0], [1, 1, 1]], [[0, 1, 0], [0, 1, 1]]]) - 0.5
        for path in [steps] if self.camera is None else [steps, *rest]:
            self.lines(boxes[:, None, :3] + boxes[:, None, 3:] * path, **style)

    def labels(self, points: np.ndarray, texts: Sequence[str], size: float = 8, **style) -> int:
        """Write texts at points [n, 3], moved apart where they would overlap, then with a line to their place. Returns
        for how many there was no room."""
        from matplotlib.patheffects import withStroke

        wide = [0.62 * size * max(map(len, t.split("\n"))) + 4 for t in texts]
        high = [1.25 * size * (t.count("\n") + 1) for t in texts]
        pixels = self.pixels(np.asarray(points, float).reshape(-1, 3))[0]
        sizes = np.stack([wide, high], 1).reshape(-1, 2) * DPI / 72
        seen = (np.isfinite(pixels) & (pixels >= 0) & (pixels <= self.size[::-1])).all(1)
        placed = np.full(pixels.shape, np.nan)
        placed[seen] = spread_labels(pixels[seen], sizes[seen], self.size[::-1], self.taken)
        self.taken = np.concatenate([self.taken, np.concatenate([placed, sizes / 2], 1)[np.isfinite(placed).all(1)]])
        back = lambda p: p if self.camera else self.start + np.array([p[0], self.size[0] - p[1]]) / self.scale  # noqa: E731
        for at, to, text in zip(pixels, placed, texts, strict=True):
            if np.isfinite(to).all():
                if np.abs(at - to).max() > 12:
                    self.axis.plot(*np.stack([back(at), back(to)]).T, color="0.25", lw=0.6, zorder=4)
                self.axis.text(*back(to), text, fontsize=size, ha="center", va="center", zorder=5,
                               path_effects=[withStroke(linewidth=2, foreground="white")], **style)
        return int(seen.sum() - np.isfinite(placed).all(1).sum())


LOOKS = {  # how a cloud is coloured: in words, and from ids [N] and true colours [N, 3] of 0..1
    "segments": ("a colour per object, grey is the room itself", lambda ids, true: np.where(
        ids[:, None] > 0, palette(int(ids.max(initial=0)))[ids], 0.4 * true + 0.55)),
    "true": ("true colours", lambda ids, true: true),
    "pale": ("true colours, pale", lambda ids, true: 0.35 * true + 0.6),
}  # fmt: skip


def spacing_of(points: np.ndarray) -> np.ndarray:
    """Distance [N] of every point to its fourth neighbour, at most twice the median: discs of that size close gaps."""
    if len(points) < 2:
        return np.full(len(points), 0.05)
    gap = nearest(points, points, 5)[0][:, -1]
    return np.minimum(gap, 2 * np.median(gap))


def shown_cloud(scene: Scene) -> dict[str, np.ndarray]:
    """What pictures show of a scene: points [N, 3], normals [N, 3], true colours [N, 3] of 0..1 (height where there is
    none), object ids [N], spacing [N] in metres; and the corners low, high [3] of it all."""
    from matplotlib import colormaps

    points, colours, normals = surface(scene)
    points = np.zeros((0, 3)) if points is None else points
    if normals is None:
        normals = estimate_normals(points) if len(points) > 2 else np.tile([0.0, 0.0, 1.0], (len(points), 1))
    ids = np.zeros(len(points), np.int64)
    if len(points) and points is scene.points and scene.instances is not None:
        ids = scene.instances
    elif len(points) and scene.frames is not None:
        ids = read_masks(points, scene.frames)
    extremes = [o.box[:3] + side * o.box[3:] / 2 for o in scene.objects for side in (-1, 1)]
    extremes += [*np.percentile(points, [0.2, 99.8], axis=0)] if len(points) else []
    low, high = np.min(extremes or [np.zeros(3)], 0), np.max(extremes or [np.zeros(3)], 0)
    pad = np.maximum(0.02 * np.linalg.norm(high - low) - (high - low), 0.02)
    if colours is None:
        true = colormaps["viridis"](np.clip((points[:, 2] - low[2]) / (high - low + pad)[2], 0, 1))[:, :3] * 0.8 + 0.1
    else:
        true = colours / 255
    return dict(points=points, normals=normals, true=true, ids=ids, spacing=spacing_of(points), low=low - pad,
                high=high + pad)  # fmt: skip


def perspective(axis, size: tuple[int, int], cloud: dict) -> View:
    """The view over that corner of the room from which most of the objects (or, without any, of the cloud) is seen."""
    views, seen = [], []
    step = max(1, len(cloud["points"]) // 5000)
    few = {k: v[::step] if k not in ("low", "high") else v for k, v in cloud.items()}
    thing = (few["ids"] > 0) | ~few["ids"].any()
    for sides in itertools.product((-1, 1), repeat=2):
        camera = corner_camera(cloud["low"], cloud["high"], sides, size)
        views.append(View(axis, size, cloud["low"], cloud["high"], camera))
        pixels, depth = views[-1].pixels(few["points"])
        pixels[~views[-1].faces(few)] = np.nan
        which = z_buffer(pixels / 8, depth, np.ones(len(depth)), (size[0] // 8, size[1] // 8))
        seen.append(thing[which[which >= 0]].sum())
    return views[int(np.argmax(seen))]


@contextmanager
def board(scene: Scene, path: Path, title: str, lines: Sequence[str] = (), look: str = "segments",
          images: Sequence[tuple[str, np.ndarray]] = (), inks: Sequence[str] = ()) -> Iterator[list[View]]:  # fmt: skip
    """A picture of a scene, written to `path` on leaving: its cloud from above and in perspective (coloured as LOOKS
    says), a row of images (caption, [H, W, 3]) and lines of text below, in the colours `inks` (black where they end).
    Yields the two views, to draw over them."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    cloud, wide, high = shown_cloud(scene), 16.4, 6.4
    lines = [(part, ink) for line, ink in itertools.zip_longest(lines, inks[: len(lines)], fillvalue="black")
             for part in wrap(line, 190)]  # fmt: skip
    row, foot = 2.6 * bool(images), 0.25 * len(lines) + 0.1
    total = 0.65 + high + 0.6 + row + foot
    figure = Figure(figsize=(wide, total))
    inches = lambda x, y, w, h: figure.add_axes((x / wide, 1 - (y + h) / total, w / wide, h / total))  # noqa: E731
    size = (int(high * DPI), int(7.4 * DPI))
    above, corner = inches(0.7, 0.65, 7.4, high), inches(8.5, 0.65, 7.4, high)
    unit = " (m)" if scene.metric else ""
    views = [View(above, size, cloud["low"], cloud["high"], unit=unit), perspective(corner, size, cloud)]
    meaning = LOOKS[look][0] if scene.colours is not None or look == "segments" else "colours: height"
    above.set_title(f"from above; {meaning}", fontsize=10)
    corner.set_title("in perspective", fontsize=10)
    figure.text(0.7 / wide, 1 - 0.3 / total, title, fontsize=12, weight="bold")
    for view in views:
        view.show(cloud, look)
    left = 0.3
    for caption, image in images:
        width = (row - 0.45) * image.shape[1] / image.shape[0]
        axis = inches(left, 0.65 + high + 0.85, width, row - 0.45)
        axis.imshow(image, aspect="auto")
        axis.set_axis_off()
        axis.set_title(caption, fontsize=9)
        left += width + 0.25
    for i, (line, ink) in enumerate(lines):
        figure.text(0.3 / wide, (foot - 0.25 * i - 0.2) / total, line, fontsize=10, color=ink)
    yield views
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a question may name dollars
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # another script: empty squares
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)


def read_answer(text: str) -> tuple[list[tuple[str, np.ndarray]], list[np.ndarray], str]:
    """An answer's places: those named before its last "=" as (words before it, [3] or [6]), those after it, and what
    else stands there. Without "=" all count as after it."""
    before, _, after = text.rpartition("=")
    numbers = lambda t: [v for size in (3, 6) for v in tuples(t[0], size) if v is not None]  # noqa: E731
    named, last = [], 0
    for found in TUPLE.finditer(before):
        words = re.sub(r"[^A-Za-z<>0-9 ]", " ", before[last : found.start()]).strip()
        named += [(words, v) for v in numbers(found)]
        last = found.end()
    return named, [v for found in TUPLE.finditer(after) for v in numbers(found)], TUPLE.sub("", after).strip()


ANSWERS = ("crimson", "royalblue", "seagreen", "darkorange")  # the colours of the first answer, the second, ...


def draw_answer(view: View, text: str, shade: str, unit: str = " m") -> None:
    """The places that an answer writes. A number that follows two of them is the length of the line between their
    centres; a box that follows from another is where that one (dashed) is moved to."""
    named, places, rest = read_answer(text)
    boxes = [v for _, v in named if len(v) == 6]
    moved = bool(boxes and len(places) == 1 and len(places[0]) == 6)
    if moved:
        old, new = boxes[0], places[0]
        view.boxes(old[None], colors=shade, lw=1.8, linestyles="dashed", zorder=3)
        view.lines([[old[:3], new[:3]]], colors=shade, lw=1.5, linestyles="dotted", zorder=3)
        view.labels(np.stack([old[:3], new[:3]]), [f"{named[0][0]}\nbefore", f"{named[0][0]}\nafter"], 9, color=shade)
    elif re.fullmatch(r"\d+(\.\d+)?", rest) and len(named) > 1:
        ends = np.stack([v[:3] for _, v in named[:2]])
        view.lines(ends[None], colors=shade, lw=2.5, zorder=3)
        view.dots(ends, c=shade, s=40, zorder=4)
        view.labels(np.stack([ends.mean(0), *ends]), [rest + unit, named[0][0], named[1][0]], 10, color=shade)
    for place in places:
        if len(place) == 6:
            view.boxes(place[None], colors=shade, lw=2.2, zorder=4)
        view.dots(place[None, :3], c=shade, s=30, zorder=4)
    if len(places) > 1:
        view.lines([[p[:3] for p in places]], colors=shade, lw=1.5, zorder=3)


def draw_things(view: View, scene: Scene) -> None:
    """Boxes of all objects in the colours of their segments, with identifier and category (colour, where that is
    unknown). Of very many only identifiers are written in perspective; the title says for how many there is no room."""
    if not scene.objects:
        return
    things = sorted(scene.objects, key=lambda o: o.box[3:].prod())  # the small ones choose their places first
    crowded = len(things) > 60
    shades = 0.65 * palette(max(o.id for o in things))[[o.id for o in things]]
    view.boxes(np.stack([o.box for o in things]), colors=shades, lw=0.5 if crowded else 0.9, zorder=2)
    places = np.stack([o.box[:3] for o in things])
    places[:, 2] += np.array([o.box[5] / 2 for o in things]) * bool(view.camera)  # in perspective on top of the box
    words = [o.category or o.colour if view.camera is None or not crowded else "" for o in things]
    texts = [f"{scene.identifiers.get(o.id, '')} {w}".strip() for o, w in zip(things, words, strict=True)]
    missing = view.labels(places, texts, 6.5 if len(things) > 35 else 8)
    if missing:
        view.axis.set_title(f"{view.axis.get_title()} ({missing} names left out)", fontsize=10)


def frame_images(frames: Frames | None, shown: Sequence[int] = (0, -1)) -> list[tuple[str, np.ndarray]]:
    """Some frames with their masks beside them, as images of `board`."""
    if frames is None:
        return []
    images, colours = [], palette(int(frames.masks.max(initial=0)))
    for v in sorted({i % len(frames.colour) for i in shown}):
        images += [(f"frame {v}", frames.colour[v]), ("its masks", colours[frames.masks[v]])]
    return images


def draw_scene(scene: Scene, path: Path, lines: Sequence[str] = (), tokens: np.ndarray | None = None,
               answers: Sequence[str] = ()) -> None:  # fmt: skip
    """A picture: the cloud from above and in perspective, coloured by object, boxes with identifiers and categories,
    scene tokens [K, 3] as crosses, the places written in answers, each answer in a colour of its own (`draw_answer`);
    below, two frames with their masks and lines of text."""
    nameless = bool(scene.objects) and not any(o.category for o in scene.objects)
    title = f"{scene.name}, {len(scene.objects)} objects" + " without categories, named by their true colour" * nameless
    if tokens is not None:
        title += f"; the {len(tokens)} crosses are where the model's scene tokens are"
    look, inks = "segments" if scene.objects else "true", [ANSWERS[i % len(ANSWERS)] for i in range(len(answers))]
    with board(scene, path, title, lines, look, frame_images(scene.frames), inks) as views:
        for view in views:
            if tokens is not None:
                view.dots(tokens, c="black", marker="x", s=9, lw=0.6, zorder=2)
            for answer, shade in zip(answers, inks, strict=True):
                draw_answer(view, answer, shade, " m" if scene.metric else "")
            draw_things(view, scene)


# ---- 11 scenes of one's own, command line ----------------------------------------------------------------------------

SOURCES = ("rooms", "scannet", "rgbd", "ply", "cached")


def split_fifths(rows: list) -> dict[str, list]:
    """Split {"train", "test"}: every fifth row is for testing, and one that is alone for both."""
    test = rows[4::5] or rows[-1:]
    return {"train": [row for row in rows if row not in test] or rows, "test": test}


def scan_ids(root: Path) -> dict[str, list[str]]:
    """List the scans below a ScanNet root as {"train", "test"}.

    By scannetv2_{train,val}.txt where both lie there, else every fifth is for testing.
    """
    meshes = [file for place in ("", "scans/") for file in root.glob(f"{place}*/*{SCAN_FILES[0]}")]
    found = sorted(file.parent.name for file in meshes)
    if not found:
        lacking = f"no <id>/<id>{SCAN_FILES[0]} here or under scans/"
        raise DataError(f"{root}: {lacking}; see python data.py check {root}")
    lists = {"train": root / "scannetv2_train.txt", "test": root / "scannetv2_val.txt"}
    if not all(file.exists() for file in lists.values()):
        return split_fifths(found)
    listed = {split: file.read_text().split() for split, file in lists.items()}
    return {split: [name for name in names if name in found] for split, names in listed.items()}


def load_scenes(
    source: str, split: str, root: Path | None = None, count: int = 800, workers: int = 0, **options
) -> list[Scene]:
    """Load the scenes of a split, "train" or "test", of one of SOURCES: rooms, scans, or own
    scenes below `root`.

    Own scenes in which no object is found are left out, and said. options: of `open_scene`.
    Raises DataError.
    """
    if source == "rooms":
        return rooms(ROOM_SEEDS[split][:count], workers + 1)
    if root is None:
        raise DataError(f"--data {source}: name the folder with --root")
    if options and source == "scannet":
        raise DataError(f"--{next(iter(options))}: has no part in --data {source}")
    root, scenes = Path(root), []
    if source == "scannet":
        return [read_scannet(root, name) for name in scan_ids(root)[split]]

    # what was kept once opens quickly, the rest is read and segmented now
    paths = sorted(root.glob("*.npz")) if source == "cached" else find_scenes(root)
    for path in split_fifths(paths)[split]:
        scene = open_scene(path, **options)
        if scene.objects:
            scenes.append(scene)
        else:
            print(f"{path}: no object was found, so nothing can be asked; left out")
    if not scenes:
        lacking = f"no scenes with objects for the {split} split"
        raise DataError(f"--root {root}: {lacking}; see python data.py check {root}")
    return scenes


def positive(text: str) -> float:
    """Read a number above 0 from a flag."""
    number = int(text) if text.isdigit() else float(text)
    if not 0 < number < math.inf:
        raise ValueError(text)
    return number


SCENE_OPTIONS = {  # flags of a scene of one's own -> arguments of argparse
    "scale": dict(type=positive, help="true meters per unit of a cloud, or per guessed meter of a video"),
    "up": dict(choices=("auto", *UP), help="axis of the files that points up, as --up=-y (default: found)"),
    "convention": dict(choices=CONVENTIONS, help="of the poses (default: the layout's)"),
    "depth_scale": dict(type=positive, help=f"units of depth per meter (the layout's; {DEPTH_SCALES})"),
    "max_frames": dict(type=positive, help="frames to use at most (default: 32)"),
    "longest": dict(type=positive, help="longer side of frames in pixels (default: 320; 640 for VGGT)"),
    "vggt": dict(help="name or folder of VGGT's weights, for frames without depth or poses"),
    "masks": dict(choices=("files", "segments", "sam2"), help="where objects come from: instance-filt/ "
                  "beside the frames (default where it lies), segments of the cloud (else), SAM 2"),
    "sam2": dict(help=f"name or checkpoint of SAM 2's weights (default: {SAM2})"),
}  # fmt: skip


def add_scene_options(parser: argparse.ArgumentParser) -> None:
    for name, arguments in SCENE_OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **arguments)


def scene_options(args: argparse.Namespace) -> dict:
    """Pick those of SCENE_OPTIONS that were given."""
    given = {name: getattr(args, name) for name in SCENE_OPTIONS}
    return {name: value for name, value in given.items() if value is not None}


def read_scan(path: Path, **options) -> Scene:
    return read_scannet(path.parent, path.name, **options)


def choose_reader(path: Path) -> tuple[Callable, set[str]]:
    """Choose who reads a scene of one's own, and the options it takes. Raises DataError."""
    kind = path.suffix.lower()
    if kind == ".npz":
        return load_scene, set()
    if (path / f"{path.name}{SCAN_FILES[0]}").exists():
        return read_scan, {"max_frames", "longest"}
    if path.is_dir() or kind in VIDEOS:
        return read_views, set(SCENE_OPTIONS)
    if kind in CLOUDS:
        return read_cloud, {"up", "scale"}
    known = ", ".join((*CLOUDS, *VIDEOS))
    raise DataError(f"{path}: no scene; give {known}, a scan, or a folder of frames")


def open_scene(
    path: str | Path, masks: str | None = None, sam2: str | None = None, **options
) -> Scene:
    """Read a scene of one's own, and find objects where none are labelled.

    masks: "files" (beside its frames, the default where they lie), "segments" of its cloud,
    "sam2" (tracks; sam2 names the weights), or "none". Options: those of its reader; another one
    is a DataError.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such scene; give a video, a cloud, or a folder of frames")
    if sam2 is not None and masks != "sam2":
        raise DataError("--sam2: names the weights for --masks sam2; add that, or leave it out")
    reader, takes = choose_reader(path)
    if strange := sorted(set(options) - takes):
        known = ", ".join(sorted(takes)) or "none"
        raise DataError(f"--{strange[0].replace('_', '-')}: has no part in {path}; known here: {known}")
    scene = reader(path, **options)
    if scene.objects or reader is load_scene or masks == "none":
        return scene
    labelled = scene.frames is not None and scene.frames.masks.any()
    how = choose(SEGMENTERS, masks or ("files" if labelled else "segments"), "--masks")
    return check_scene(how(scene, sam2), trusted=True)


def with_sam2(scene: Scene, name: str | None = None) -> Scene:
    """Take SAM 2's tracks through the frames, merged in 3D, for objects."""
    f = scene.frames
    if f is None:
        raise DataError(f"--masks sam2: {scene.name} has no frames; leave it out")
    tracks = sam2_masks(f.colour, load_sam2(name or SAM2))
    return with_tracks(scene, merge_tracks(tracks, unproject(f.depth, f.intrinsics, f.poses)))


def with_files(scene: Scene, _=None) -> Scene:
    """Take the masks that lie beside the frames for objects."""
    if scene.frames is None or not scene.frames.masks.any():
        raise DataError(f"--masks files: {scene.name} has no instance-filt/ with masks; leave it out")
    return with_tracks(scene, scene.frames.masks)


SEGMENTERS = {
    "files": with_files,
    "segments": lambda scene, _: with_own_segments(scene),
    "sam2": with_sam2,
}
FRAME_ARRAYS = ("colour", "depth", "masks", "intrinsics", "poses")


def save_scene(scene: Scene, path: Path) -> None:
    """Write a scene as one .npz file, without pickle; objects and notes go as JSON."""
    arrays = {name: array for name, array in vars(scene).items() if isinstance(array, np.ndarray)}
    if scene.frames is not None:
        arrays |= {f"frames.{name}": getattr(scene.frames, name) for name in FRAME_ARRAYS}
    about = dict(name=scene.name, source=scene.source, metric=scene.metric, notes=scene.notes)
    about["objects"] = [[o.id, o.category, o.colour, *map(float, o.box)] for o in scene.objects]
    write_npz(path, about=np.array(json.dumps(about)), **arrays)


def load_scene(path: Path) -> Scene:
    """Load the scene that save_scene wrote; its frames are read when they are looked at.

    Raises DataError.
    """
    with reading(path, "kept scene"), np.load(path, allow_pickle=False) as held:
        about = json.loads(str(held["about"])) | {"name": path.stem}
        rows = about.pop("objects")
        objects = [Thing(i, category, color, np.array(box)) for i, category, color, *box in rows]
        arrays = {name: held[name] for name in held if name != "about" and "." not in name}
        scene = Scene(objects=objects, **about, **arrays)
        if "frames.masks" in held:
            scene.frames = LazyFrames(partial(load_frames, path), file_key([path]))
        return check_scene(scene, trusted=True)


def load_frames(path: Path) -> Frames:
    """Load the frames that save_scene wrote."""
    with reading(path, "kept scene"), np.load(path, allow_pickle=False) as held:
        frames = Frames(*(held[f"frames.{name}"] for name in FRAME_ARRAYS))
    V, H, W = frames.masks.shape
    shapes = [(V, H, W, 3), (V, H, W), (V, H, W), (V, 3, 3), (V, 4, 4)]
    if [array.shape for array in vars(frames).values()] != shapes:
        raise DataError(f"{path}: its frames do not belong together; make it with data.py cache again")
    return frames


def is_scene(path: Path) -> bool:
    """Whether `path` is a video, a cloud, a scan's folder, or one of frames or images."""
    if path.is_dir():
        return (path / f"{path.name}{SCAN_FILES[0]}").exists() or bool(find_frames(path)[1])
    return path.suffix.lower() in (*VIDEOS, *CLOUDS) and path.name[0] != "."


def find_scenes(path: Path) -> list[Path]:
    """Find all scenes that lie in a folder, or else in the folders in it; what is a scene itself,
    or holds none, is alone."""
    if not path.is_dir() or is_scene(path):
        return [path]
    here, below = sorted(path.glob("*")), sorted(path.glob("*/*"))
    return list(filter(is_scene, here)) or list(filter(is_scene, below)) or [path]


def cache_scenes(path: Path, out: Path, **options) -> int:
    """Write every scene of `path`, through its frozen encoders (VGGT, SAM 2, segments), once as
    out/<name>.npz.

    Under torchrun a process takes every world-th scene and its own GPU. What is there already
    stays, so done again it goes on where it stopped. Prints failures and returns their number.
    """
    from tqdm import tqdm

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    failed = 0
    for scene in tqdm(find_scenes(path)[rank::world], unit="scene"):
        name = "_".join(scene.relative_to(path).parts) or path.resolve().name
        file = out / f"{safe_name(name)}.npz"
        try:
            if not file.exists():
                save_scene(open_scene(scene, **options), file)
        except DataError as error:
            print(error, file=sys.stderr)
            failed += 1
    return failed


SCANNET_TERMS = (
    "ScanNet is had by its Terms of Use form (ScanNet/ScanNet on GitHub): four files per scan, 10.6 GB; "
    "frames are exported from the .sens files (1.2 TB) as color/, depth/, pose/, intrinsic/"
)


def check_scans(path: Path, scans: list[Path]) -> list[str]:
    """Describe a ScanNet root: how many scans, and what they lack."""
    shown = sum(bool(find_frames(scan)[1]) for scan in scans)
    lines = [f"{path}: {len(scans)} scans, {shown} with frames beside them"]
    for suffix in SCAN_FILES:
        lacking = [scan.name for scan in scans if not (scan / f"{scan.name}{suffix}").exists()]
        if lacking:
            said = f"missing <id>{suffix} of {len(lacking)} scans, first {lacking[0]}"
            lines.append(f"{said}; {SCANNET_TERMS}")
    return lines


def check(path: Path, **options) -> list[str]:
    """Describe what lies at `path`: the lines of `data.py check DIR`.

    Scenes are opened, but no objects looked for; of a ScanNet root only the files are counted.
    """
    patterns = ("scene*_*/", "scans/scene*_*/", "scans_test/scene*_*/")
    scans = [scan for pattern in patterns for scan in sorted(path.glob(pattern))]
    if scans:
        return check_scans(path, scans)
    lines = []
    for place in find_scenes(path):
        try:
            scene = open_scene(place, masks="none", **options)
            counts = f"{len(scene.points)} points, {len(scene.objects)} objects"
            lines.append(f"{place}: {counts}; {'; '.join(scene.notes)}")
        except DataError as error:
            lines.append(str(error))
    return lines


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Make `main` return its exit status: its own or 0; 2 where something is wrong, which one
    line says."""

    @wraps(main)
    def status(*arguments) -> int:
        try:
            return main(*arguments) or 0
        except (DataError, OSError) as error:  # OSError: what cannot be written
            print(f"{Path(inspect.getfile(main)).name}: {error}", file=sys.stderr)
            return 2

    return status


@command
def main(arguments: Sequence[str] | None = None) -> int | None:
    """Look at data or make some; the status is 2 also where a scene could not be kept."""
    parser = argparse.ArgumentParser(description="Look at data, or make some.")
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("check", help="what is there, what is missing, and where it is had")
    look.add_argument("path", type=Path)
    make = commands.add_parser("rooms", help="procedural rooms in ScanNet's file layout")
    make.add_argument("out", type=Path)
    make.add_argument("--count", type=int, default=10)
    make.add_argument("--objects", type=int, help="objects per room (default: 8 to 16)")
    make.add_argument("--seed", type=int, default=0, help="of the first room")
    keep = commands.add_parser("cache", help="scenes through VGGT, SAM 2 and segmentation, once")
    keep.add_argument("path", type=Path, help="a scene, or a folder of scenes")
    keep.add_argument("out", type=Path)
    add_scene_options(look)
    add_scene_options(keep)
    args = parser.parse_args(arguments)
    if args.command == "check":
        print("\n".join(check(args.path, **scene_options(args))))
    elif args.command == "rooms":
        for seed in range(args.seed, args.seed + args.count):
            scene = room(seed, args.objects, size=240, views=16, points=20_000)
            named = replace(scene, name=f"scene{seed % 10_000:04d}_00")
            print(write_scannet(named, args.out / "scans"))
    elif cache_scenes(args.path, args.out, **scene_options(args)):
        return 2


if __name__ == "__main__":
    sys.exit(main())
