"""Scenes, rooms, questions, text and batches: everything the three papers share, and nothing that only one needs.

A `Scene` is one furnished place with posed frames, a colored point cloud and objects; a `Sample` is
one question about it with all that scoring needs. Readers fill scenes, generators with a table of
templates fill samples, `collate` turns both into tensors. `knn`, `farthest_point_sampling`,
`group_mean` (part 2) and `over_segment` (part 9) are what papers share and what is most often
copied.

Frames and units: every array is in meters, z up, axis-aligned, right-handed, the floor at z = 0.
Cameras follow OpenCV (x right, y down, z forward); poses map camera to world; depth is measured
along the camera's z axis, 0 = missing. Boxes are axis-aligned: [cx, cy, cz, w, d, h], the center
and the full sizes along x, y, z.

Axis legend: S scenes, B boxes, V views, H W pixels, P pixels of a view or prompts of a batch, N
points, n objects, Q questions, T tokens, K scene tokens, D width.

Contents: 1 scenes and samples · 2 geometry · 3 procedural rooms · 4 questions · 5 text and batches
· 6 the base model; a first reading ends here · T the stand-in for pre-training · 7 scenes from disk
· 8 video · 9 superpoints and segments · 10 pictures · 11 own scenes
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

COLORS = {  # name -> RGB in 0..255; also the vocabulary in which real surfaces are described
    "red": (200, 40, 40),
    "orange": (235, 130, 30),
    "yellow": (235, 210, 60),
    "green": (60, 150, 60),
    "blue": (50, 90, 190),
    "purple": (130, 60, 160),
    "pink": (240, 150, 185),
    "brown": (125, 80, 45),
    "white": (238, 238, 232),
    "gray": (130, 130, 130),
    "black": (35, 35, 38),
}


class DataError(ValueError):
    """One line for the user: what is wrong, where (file and field), and the remedy.

    Commands print it and exit with status 2.
    """


# ---- 1 scenes and samples ------------------------------------------------------------------------


@dataclass
class Thing:
    """An object of a scene."""

    id: int  # its label in masks and instances, >= 1; 0 is everything else
    category: str  # "chair"; "" where unknown (an unlabeled real scene)
    color: str  # a name from COLORS; "" where unknown
    box: np.ndarray  # [6] cx, cy, cz, w, d, h in meters, in the scene's frame


@dataclass
class Frames:
    """V posed RGB-D views of one size; a scan's color may be finer than its depth, which the intrinsics fit."""

    color: np.ndarray  # [V, H, W, 3] uint8, of a scan perhaps with a larger H and W of its own
    depth: np.ndarray  # [V, H, W] float32 meters along the camera's z axis, 0 = missing
    masks: np.ndarray  # [V, H, W] int32 object ids, 0 = none
    intrinsics: np.ndarray  # [V, 3, 3] float64
    poses: np.ndarray  # [V, 4, 4] float64, camera to world


@dataclass(eq=False)
class LazyFrames:
    """Frames that are read from disk when one of their arrays is asked for.

    A thousand scans do not fit in memory, so only the frames read last are kept (`_read_frames`).
    """

    load: Callable  # () -> Frames
    key: str  # what the files are known by

    def __getattr__(self, name):
        # copying and pickling look for methods of their own before `load` is there
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_read_frames(self), name)


@lru_cache(maxsize=1)
def _read_frames(frames):
    return frames.load()


Array = np.ndarray | None  # where a source may have none


@dataclass
class Scene:
    """One place. Arrays that a source does not have are None; code that needs one raises DataError."""

    name: str
    source: str  # "rooms" | "scannet" | "rgbd" | "video" | "ply"
    objects: list[Thing]
    points: Array = None  # [N, 3] float32
    colors: Array = None  # [N, 3] uint8
    normals: Array = None  # [N, 3] float32 unit
    superpoints: Array = None  # [N] int64, contiguous from 0
    instances: Array = None  # [N] int64 object ids, 0 = none
    frames: Frames | LazyFrames | None = None
    bounds: Array = None  # [2, 3] lowest and highest corner of the room or cloud
    metric: bool = True  # False: unknown scale, metric questions are refused
    # the augmentation already applied to boxes and points; coordinates in cached features are without it, and who
    # reads them applies it
    turn: np.ndarray = field(default_factory=lambda: np.eye(3))
    identifiers: dict[int, int] = field(default_factory=dict)  # object id -> 0..99, per scene and epoch
    notes: list[str] = field(default_factory=list)  # what the reader did: transforms, dropped poses
    # kept by `scene_graph`; a copy starts without
    graph: SceneGraph | None = field(default=None, init=False, repr=False, compare=False)

    def thing(self, object_id):
        return next(o for o in self.objects if o.id == object_id)


@dataclass
class Sample:
    """One question with its exact answer.

    Text names objects by marks: "<obj 3>" is the object with id 3. Each paper puts its own words in
    their place: Proxy3D identifiers, Spatial 3D-LLM descriptions.
    """

    id: str  # unique in its benchmark
    scene: str
    task: str  # a key of TASKS: "ground", "count", ...
    question: str
    answer: str  # the text to write, marks included
    answers: list[str] = field(default_factory=list)  # every accepted answer; empty = [answer]
    tokens: list[str] = field(default_factory=list)  # `answers` in words, where a benchmark splits them
    reasoning: str = ""  # written before the answer where a model reasons aloud; never scored
    targets: list[int] | None = None  # object ids (grounding), [] = nothing fits
    value: float | None = None  # numeric truth: meters, square meters, count
    point: Array = None  # [3] truth of a coordinate question
    box: Array = None  # [6] truth of a box question
    options: list[str] | None = None  # multiple choice, "A. chair"
    prompt: Array = None  # [6] box or [3] click that belongs to the question
    about: list[int] = field(default_factory=list)  # object ids that the question describes
    template: str = ""  # a key of TEMPLATES: what the blind baseline falls back on
    kind: str = ""  # sub-type for tables: "unique", "multiple", "what", "easy", ...


def fingerprint(scene):
    """Hash what a scene is made of, so that a file of cached features belongs to it and not to its name.

    Frames on disk are known by their `key`, others by every 16th pixel. Turning a scene does not
    change the result.
    """
    digest = hashlib.sha256(f"{scene.name} {scene.source}".encode())
    arrays = [scene.colors, scene.superpoints, scene.instances]
    if scene.points is not None:
        arrays.append(np.linalg.norm(scene.points, axis=1).round(3))  # lengths do not change with a turn
    if isinstance(scene.frames, LazyFrames):
        digest.update(scene.frames.key.encode())
    elif scene.frames is not None:
        f = scene.frames
        arrays += [f.poses, *(pixels[:, ::16, ::16] for pixels in (f.color, f.depth, f.masks))]

    # some 4,096 rows of each are enough to tell scenes apart
    for array in arrays:
        if array is not None:
            digest.update(np.ascontiguousarray(array[:: 1 + len(array) // 4096]).tobytes())
    return digest.hexdigest()[:12]


def safe_name(name):
    """Turn a name that came from a file into a plain file name: it never leads out of its folder."""
    plain = re.sub(r"[^\w@.-]", "_", name).lstrip(".")
    if not plain:
        raise DataError(f"{name!r}: not a name for a file; use letters, digits, - and _")
    return plain


MARK = re.compile(r"<obj (\d+)>")


def substitute(text, object_to_text):
    """Replace every mark "<obj 3>" by object_to_text(3)."""
    return MARK.sub(lambda found: object_to_text(int(found[1])), text)


def marks_of(sample):
    """List the objects (ids) that a question or its answer marks."""
    return {int(i) for i in MARK.findall(sample.question + sample.answer)}


def number_objects(scene, rng, count=100):
    """Draw identifiers 0..count-1 for the scene's objects; of more than `count` objects the largest get one."""
    by_volume = sorted(scene.objects, key=lambda o: -np.prod(o.box[3:]))
    numbered = sorted(o.id for o in by_volume[:count])
    return dict(zip(numbered, rng.permutation(count).tolist(), strict=False))


def augment(scene, rng, mirror=True):
    """Copy a scene with new identifiers and, at random, another of the eight symmetries of its floor plan.

    mirror: False turns only, for questions that people wrote and that say left and right.
    """
    # mirror x, mirror y, swap x and y
    turn = np.diag([*rng.choice([-1.0, 1.0], 2), 1.0])
    if rng.random() < 0.5:
        turn = turn[[1, 0, 2]]
    if not mirror and np.linalg.det(turn) < 0:
        turn = np.diag([-1.0, 1.0, 1.0]) @ turn

    # boxes stay along the axes
    objects = []
    for o in scene.objects:
        box = np.concatenate([turn @ o.box[:3], np.abs(turn) @ o.box[3:]])
        objects.append(replace(o, box=box))

    # the cloud turns along; frames do not, their points are turned when they are unprojected
    turned = {}
    for name in ("points", "normals", "bounds"):
        array = getattr(scene, name)
        if array is not None:
            turned[name] = array @ turn.T.astype(array.dtype)
    if "bounds" in turned:
        turned["bounds"].sort(axis=0)
    turned["identifiers"] = number_objects(scene, rng)
    return replace(scene, objects=objects, turn=turn @ scene.turn, **turned)


# ---- 2 geometry ----------------------------------------------------------------------------------


def knn(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k nearest points of every query, nearest first.

    On the CPU by a KD-tree (50,000 points: 0.2 s against 7 s for all distances), on a GPU by chunks
    of all distances.

    Args: queries [M, 3], points [N, 3] float. Raises ValueError if k > N.
    Returns: distances [M, k] in the unit of the input, indices [M, k].
    """
    if not 1 <= k <= len(points):
        raise ValueError(f"knn: k = {k} neighbors of {len(points)} points")

    # a tree on the CPU
    if points.device.type == "cpu":
        from scipy.spatial import cKDTree

        tree = cKDTree(points.numpy())
        distance, index = tree.query(queries.numpy(), k=np.arange(1, k + 1), workers=-1)
        return torch.from_numpy(distance).to(points), torch.from_numpy(index)

    # all distances on a GPU, in chunks: M x N of them do not fit into memory at once
    found = []
    for part in queries.split(4096):
        found.append(torch.cdist(part, points).topk(k, dim=1, largest=False))
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def nearest(queries, points, k=1):
    """Call `knn` on arrays: distances [M, k] and indices [M, k]; of fewer than k points, all."""
    tensors = [torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in (queries, points)]
    distance, index = knn(*tensors, min(k, len(points)))
    return distance.numpy(), index.numpy()


def farthest_point_sampling(points: Tensor, count: int) -> Tensor:
    """Choose points one by one, each the farthest from those chosen before; of equals the lowest index.

    Args: points [N, 3]; count, at most N are taken. Returns: indices [count], first the point
    farthest from the centroid.
    """
    # start at the rim, so that the choice does not depend on the order of the points
    index = (points - points.mean(0)).square().sum(1).argmax()
    chosen = index.new_empty(min(count, len(points)))

    # then always where the nearest chosen point is farthest
    distance = torch.full_like(points[:, 0], float("inf"))  # [N] squared, to the nearest chosen point
    for i in range(len(chosen)):
        chosen[i] = index
        to_newest = (points - points[index]).square().sum(1)
        distance = torch.minimum(distance, to_newest)
        index = distance.argmax()
    return chosen


def group_mean(values: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Average the rows of every group.

    Args: values [N, C] float; index [N], the group 0..count-1 of each row.
    Returns: mean [count, C], 0 where a group is empty, and the groups' sizes [count].
    """
    total = values.new_zeros(count, values.shape[1]).index_add(0, index, values)
    size = index.new_zeros(count).index_add(0, index, torch.ones_like(index))
    return total / size.clamp(min=1)[:, None], size


def most_frequent(labels: Tensor, cell: Tensor, cells: int) -> Tensor:
    """Find the most frequent of labels [N] >= 0 in every cell [cells]; ties go to the lowest.

    Args: cell [N], the cell 0..cells-1 of every label. An empty cell gets 0.
    """
    n = int(labels.max()) + 1
    votes = torch.bincount(cell * n + labels, minlength=cells * n)
    return votes.view(cells, n).argmax(1)


def fourier_waves(x):
    """Give the cosines and sines of six wavelengths, 0.5 .. 16 m, of every number: [..., n] meters -> [..., 12 n]."""
    frequencies = 2 * math.pi / 0.5 / 2 ** torch.arange(6.0, device=x.device)  # [6]
    phase = x.float()[..., None] * frequencies  # [..., n, 6]
    return torch.cat([phase.cos(), phase.sin()], -1).flatten(-2)


def unproject(depth, intrinsics, poses):
    """Turn depth into a map of world points: [V, H, W, 3] float32, NaN where depth is 0.

    Args: arrays depth [V, H, W], intrinsics [V, 3, 3], poses [V, 4, 4]. The first pixel's center is
    at (0.5, 0.5).
    """
    # the centers of the pixels
    V, H, W = depth.shape
    u, v = np.meshgrid(np.arange(W) + 0.5, np.arange(H) + 0.5)
    pixels = np.stack([u, v, np.ones((H, W))], axis=-1).reshape(-1, 3)  # [H * W, 3]

    # the ray of a pixel's center at depth 1, as the world sees it
    turn = poses[:, :3, :3] @ np.linalg.inv(intrinsics)
    points = np.float32(pixels) @ np.float32(turn).swapaxes(1, 2)  # [V, H * W, 3]

    # times the depth, from where the camera stands; in place, for there may be millions
    points *= np.where(depth > 0, depth, np.nan).reshape(V, -1, 1)
    points += np.float32(poses[:, None, :3, 3])
    return points.reshape(V, H, W, 3)


def project(points, K, pose):
    """Invert `unproject` for one camera: pixels [..., 2], NaN behind the camera, and depth [...].

    Args: arrays points [..., 3], K [3, 3], pose [4, 4].
    """
    camera = (points - pose[:3, 3]) @ pose[:3, :3]
    depth = camera[..., 2]
    ahead = np.where(depth > 1e-6, depth, np.nan)
    pixels = camera @ K.T / ahead[..., None]
    return pixels[..., :2], depth


def box_ends(boxes):
    """Give the lowest and the highest corners [..., 3] of boxes [..., 6]."""
    center, half = boxes[..., :3], boxes[..., 3:] / 2
    return center - half, center + half


def box_iou(a, b):
    """Compute the IoU [..., n, m] of boxes a [..., n, 6] and b [..., m, 6]."""
    a, b = a[..., :, None, :], b[..., None, :, :]  # every pair
    a_low, a_high = box_ends(a)
    b_low, b_high = box_ends(b)
    overlap = np.minimum(a_high, b_high) - np.maximum(a_low, b_low)
    shared = overlap.clip(min=0).prod(-1)
    union = a[..., 3:].prod(-1) + b[..., 3:].prod(-1) - shared
    return shared / (union + 1e-8)  # as ScanRefer divides


# ---- 3 procedural rooms --------------------------------------------------------------------------
#
# A room is boxes: a piece of furniture is a row of one table, the row a few boxes (a chair: seat,
# back and legs), and a view is one slab test of boxes against pixels. Layout and rendering use
# integers and + - * / sqrt only, element by element, which IEEE 754 rounds alike everywhere: the
# same seed gives the same room on every machine.

ROOM_SEEDS = {"train": range(800_000), "val": range(800_000, 900_000), "test": range(900_000, 1_000_000)}

MATERIALS = {
    "wood": (168, 124, 80),
    "metal": (172, 176, 182),
    "screen": (38, 46, 60),
    "paper": (232, 226, 208),
    "leaf": (74, 138, 66),
    "sheet": (246, 246, 242),
    "glass": (178, 210, 232),
    "dark": (52, 48, 46),
}

FLOORS = (
    (158, 128, 98),
    (140, 122, 104),
    (176, 152, 122),
    (150, 150, 146),
    (122, 104, 88),
)

# category -> width, depth, height in meters; where it stands; its parts. A part is "x0 x1 y0 y1 z0
# z1 material" in percent of the size, the back at y = 0; "|" repeats it mirrored left to right;
# "legs 46 12" are four legs up to 46 %, 12 % thick. No material: the object's own color, which is
# most of what is seen. Parts fill the size exactly.
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
SURFACES = ("desk", "dresser", "nightstand", "table")  # flat tops on which small things stand
ORDER = ("door", "window", "wall", "free", "seat", "hang", "top")  # what is placed first
CLEAR = {"door": 0.8, "window": 0.7, "hang": 0.5}  # meters kept free in front
SHADE = np.array([0.84, 0.90, 0.80, 0.93, 0.72, 1.0])  # light on faces -x +x -y +y -z +z; white stays white
NORMALS = np.kron(np.eye(3), [[-1], [1]]).astype(np.float32) + 0  # of the same faces; + 0: no -0.0
BACK = np.array([[0, -1], [1, 0], [0, 1], [-1, 0]], float)  # of an object after 0..3 quarter turns
HALF_FOV = 0.9163312  # tan(85 degrees / 2)


def _parse_parts(text):
    """Read a row's parts: their ends [m, axis, (low, high)] in 0..1 of the size, and their materials [m]."""
    boxes, materials = [], []
    for part in text.split(","):
        numbers = [int(number) / 100 for number in re.findall(r"\d+", part)]
        new = [numbers]
        if "legs" in part:
            top, thick = numbers
            ends = ((0, thick), (1 - thick, 1))
            new = [(*x, *y, 0, top) for x in ends for y in ends]
        if "|" in part:
            x0, x1, *rest = numbers
            new.append((1 - x1, 1 - x0, *rest))
        boxes += new
        material = re.search("[a-z]*$", part)[0]
        materials += [material for _ in new]
    return np.array(boxes).reshape(-1, 3, 2), materials


PARTS = {category: _parse_parts(row[4]) for category, row in FURNITURE.items()}
CATEGORIES = sorted(FURNITURE)
CUBE = _parse_parts("0 100 0 100 0 100")


def _place_parts(category, size, turn):
    """Give the lowest and highest corners [2, m, 3] of a category's parts around the center of its base."""
    ends = (PARTS.get(category, CUBE)[0] - [[0.5], [0.5], [0.0]]) * size[:, None]
    x, y, z = ends.swapaxes(0, 1)  # [m, (low, high)] each
    for _ in range(turn):
        x, y = -y[:, ::-1], x
    return np.stack([x, y, z]).T


def _propose(where, size, side, tops, tables, rng, n=48):
    """Draw n candidate places for an object of this size that stands `where`: low [n, 3], high [n, 3], turn [n].

    side [2]: the room's width and depth. tops, tables: what carries small things and what chairs
    stand around, a row [center x, y, half width along x, y, height, turn] each.
    """
    turn = rng.integers(4, size=n)
    u = rng.uniform(-1, 1, (n, 2))
    hung = rng.uniform(1.35, 1.6, n)
    if where == "top":  # turned as what carries it
        carrier = np.array(tops)[rng.integers(len(tops), size=n)]
        turn = carrier[:, 5].astype(int)
    half = np.where(turn[:, None] % 2, size[[1, 0]], size[:2]) / 2  # half widths along x and y after turning
    back = BACK[turn]
    along = 1 - np.abs(back)  # the axis along the wall or the table's edge

    # by default anywhere on the floor
    xy = (side / 2 - half - 0.03) * u
    z = np.zeros(n)

    if where == "top":
        # anywhere on the carrier, unless it is too small
        free = carrier[:, 2:4] - half
        fits = (free >= 0).all(1, keepdims=True)
        xy = np.where(fits, carrier[:, :2] + free * u, np.inf)
        z = carrier[:, 4]
    elif where == "seat" and tables:
        # the first half of the candidates at a table, facing it
        table = np.array(tables)[rng.integers(len(tables), size=n)]
        reach = table[:, 2:4]
        away = back * (reach + half + 0.08 + 0.06 * (u + 1))
        at_table = table[:, :2] + away + along * reach * 0.8 * u
        xy[: n // 2] = at_table[: n // 2]
    elif where not in ("free", "seat"):
        # the back against a wall
        gap = 0.03 if where == "wall" else 0.0
        xy = back * (side / 2 - half - gap) + along * xy
        if where == "hang":
            z = hung - size[2] / 2
        if where == "window":
            z = z + 0.95
    return np.column_stack([xy - half, z]), np.column_stack([xy + half, z + size[2]]), turn


def _choose(rng, count):
    """Draw the categories of a room: in the order in which they are placed, more than fit; and each once."""
    # about 12 categories in a room, so several chairs are common, and always one that small things
    # stand on
    surface = SURFACES[rng.integers(len(SURFACES))]
    others = [c for c in CATEGORIES if c not in ("door", "window", surface)]
    chosen = [surface, *several(rng, others, len(others))[: max(11, count // 5)]]
    more = rng.integers(1, len(chosen), count - 3)
    drawn = [surface, *(chosen[i] for i in more)]

    # what needs a wall before what stands free, large before small; then what stands in for what
    # found no place
    def rank(category):
        width, depth, _, where = FURNITURE[category][:4]
        return ORDER.index(where), -width * depth

    drawn.sort(key=rank)
    spare = [chosen[i] for i in rng.integers(len(chosen), size=6 * count)]
    return ["door", "window", *drawn, *spare], ["door", "window", *chosen]


def _furnish(rng, count, side, height):
    """Place `count` objects that do not touch: (category, color, corners [2, m, 3] of its parts) of each, or None.

    None where the room is too small.
    """
    queue, chosen = _choose(rng, count)
    unused = {category: several(rng, list(COLORS), len(COLORS)) for category in chosen}
    placed, taken, tops, tables = [], [], [], []
    for category in queue:
        if len(placed) == count:
            break
        *size, where = FURNITURE[category][:4]
        if not unused[category] or (where == "top" and not tops):  # no color twice in a category
            continue
        size = size * rng.uniform(0.88, 1.12, 3)
        low, high, turn = _propose(where, size, side, tops, tables, rng)

        # the first candidate inside the room that keeps clear of everything
        gap = 0.02 if where == "top" else 0.06
        margin = [gap, gap, 0.0]
        taken_low, taken_high = np.array(taken).reshape(-1, 2, 3).swapaxes(0, 1)  # [k, 3] each
        clash = (low - margin)[:, None] < taken_high - 1e-6
        clash &= (high + margin)[:, None] > taken_low + 1e-6
        good = ~clash.all(2).any(1) & (high[:, 2] < height)
        good &= (np.maximum(-low, high)[:, :2] <= side / 2 + 1e-9).all(1)
        if not good.any():
            continue
        i = good.argmax()
        low, high, turn = low[i], high[i], int(turn[i])
        base = np.append((low[:2] + high[:2]) / 2, low[2])
        placed.append((category, unused[category].pop(), _place_parts(category, size, turn) + base))

        # what it changes for those to come: doors open and pictures are seen, so the floor in front
        # is taken too
        row = [*base[:2], *(high[:2] - low[:2]) / 2, high[2], turn]
        if category in SURFACES:
            tops.append(row)
        if category in ("table", "desk"):
            tables.append(row)
        front = np.append(-BACK[turn] * CLEAR.get(where, 0.0), 0.0)
        taken.append([np.minimum(low, low + front), np.maximum(high, high + front)])
    return placed if len(placed) == count else None


def _unit(a):
    # cumsum adds in the same order on every machine, sum does not
    return a / np.sqrt(np.square(a).cumsum(1)[:, -1:])


def _look(position, target):
    """Give the poses [V, 4, 4] of upright cameras at position [V, 3] that look at target [V, 3]."""
    forward = _unit(target - position)
    right = _unit(np.cross(forward, [0, 0, 1])) + 0.0  # never -0.0, whose bits differ
    pose = np.tile(np.eye(4), (len(forward), 1, 1))
    pose[:, :3] = np.stack([right, np.cross(forward, right), forward, position], 2)
    return pose


def _along(vectors, axes):
    """Multiply vectors [..., 3] by axes [..., 3, 3], adding in the same order on every machine."""
    return (vectors[..., None] * axes).sum(-2)


def _cameras(rng, count, side, low, high):
    """Give poses [count, 4, 4] that each look at one of the objects low, high [n, 3], the smallest first."""
    # the two larger sides of a box say how much of it can be seen
    _, middle, largest = np.sort(high - low, axis=1).T
    pick = np.resize(np.argsort(middle * largest, kind="stable"), count)
    target = ((low + high) / 2)[pick, None]  # [count, 1, 3]

    # 24 candidates for each, towards the middle of the room: what hangs on a wall is seen from the front
    inside = np.array([*side / 2 - 0.3, 0])
    xy = target * [*1 - 2 / side, 0] + rng.uniform(-1.5, 1.5, (count, 24, 3))
    eye = np.clip(xy, -inside, inside) + rng.uniform([0, 0, 1.4], [0, 0, 2.2], (count, 24, 3))

    # how far a candidate is from the nearest box, and whether one is in its line of sight (slab test)
    ends = np.stack([low, high])[:, None, None]  # [2, 1, 1, n, 3]
    clear = np.maximum(ends[0] - eye[:, :, None], eye[:, :, None] - ends[1]).max(3).min(2)  # [count, 24]
    enter, leave = np.sort((ends - eye[:, :, None]) / (target - eye)[:, :, None], axis=0)
    enter, leave = enter.max(3), leave.min(3)  # [count, 24, n]
    between = (enter < leave) & (leave > 0) & (enter < 1)
    between[np.arange(count), :, pick] = False

    # the best sees it freely, from 1.2 m away
    away = np.abs(target - eye)[..., :2].max(2)
    fitness = clear.clip(max=0.3) - 0.2 * np.abs(away - 1.2) - between.any(2)
    return _look(eye[np.arange(count), fitness.argmax(1)], target[:, 0])


def _rectangles(low, high, pose, size, half_fov):
    """Bound what boxes cover of an image: pixels u0, v0, u1, v1 of each, empty where a box is out of sight.

    low, high [B, 3] relative to the camera. Taken from the box around the box along the camera's
    own axes.
    """
    axes = pose[:3, :3]
    center = _along((low + high) / 2, axes)
    half = _along((high - low) / 2, np.abs(axes))
    first, last = center - half, center + half  # [B, 3] right, down, forward

    # at depth 1, from where it is nearest and from where it is farthest; what is behind the camera
    # is not seen
    depth = np.stack([first[:, 2:], last[:, 2:]]).clip(min=0.01)  # [2, B, 1]
    start, end = (first[:, :2] / depth).min(0), (last[:, :2] / depth).max(0)
    pixels = (np.concatenate([start, end], 1) / half_fov + 1) * size / 2  # [B, 4]
    pixels[:, 2:] += 1  # of a pixel that is covered in part, too
    return np.clip(pixels, 0, size).astype(int).tolist()


def ray_cast(lo, hi, pose, size, bounds, half_fov=HALF_FOV):
    """Find what the pixels of a square view hit first: paint box after box over what is farther.

    A ray meets a box between its last entry and its first exit over the three pairs of faces (slab
    test). Its length is measured along the camera's axis, so it is the depth. In the plane, from
    the origin towards (2, 1), for a box x 2..6, y 2..4:

        between its x faces   t = 1 ....... 3
        between its y faces       t = 2 ....... 4
        inside                        2 .. 3         last entry 2 < first exit 3: a hit at t = 2, on the y face

    Args: lo, hi [B, 3] corners of the boxes; pose [4, 4] camera to world; bounds [2, 3], the room
    around it all, seen from inside. Returns, all [size, size]: depth float32, box (B = the room),
    face in the order of NORMALS.
    """
    right, down, forward, eye = pose[:3].T
    step = (2 * np.arange(size) + 1 - size) / size * half_fov  # pixel centers at depth 1
    rays = right[:, None, None] * step + down[:, None, None] * step[:, None] + forward[:, None, None]
    rays = rays.astype(np.float32)  # [3, size, size]
    rays[rays == 0] = 1e-9
    inverse = 1 / rays
    ends = (np.stack([lo, hi]) - eye).astype(np.float32)  # [2, B, 3]

    # the room first: seen from inside, a ray meets it at its first exit
    a, b = (bounds - eye).astype(np.float32)[:, :, None, None] * inverse
    exits = np.maximum(a, b)
    depth = exits.min(0)
    axis = exits.argmin(0)  # of the face that is met
    found = np.full((size, size), len(lo))

    # then every box, in its rectangle on the image
    for box, (u0, v0, u1, v1) in enumerate(_rectangles(*ends, pose, size, half_fov)):
        if u0 >= u1 or v0 >= v1:
            continue
        window = np.s_[v0:v1, u0:u1]
        a, b = ends[:, box, :, None, None] * inverse[:, v0:v1, u0:u1]
        entries = np.minimum(a, b)
        enter = entries.max(0)
        leave = np.maximum(a, b).min(0)
        hit = (enter < leave) & (enter > 0.01) & (enter <= depth[window])
        depth[window][hit] = enter[hit]
        found[window][hit] = box
        axis[window][hit] = entries.argmax(0)[hit]

    # towards -x a ray meets a +x normal, on a box and on a wall
    backwards = np.take_along_axis(rays, axis[None], 0)[0] < 0
    return depth, found, 2 * axis + backwards


def _sample_surface(lo, hi, owner, bounds, count, rng):
    """Draw `count` random points on what can be seen: points [N, 3], box [N] (B = the room), face [N].

    lo, hi [B, 3] corners of the parts, owner [B] the objects they belong to. Half of the points lie
    on objects, shared by the root of their surface, so that small ones have points too.
    """
    B = len(lo)
    low = np.concatenate([lo, bounds[:1]])  # [B + 1, 3] with the room
    high = np.concatenate([hi, bounds[1:]])
    w, d, h = (high - low).T
    area = np.stack([d * h, w * h, w * d], 1).repeat(2, 1)  # [B + 1, 6] of the faces
    area[B, 4] = 0.0  # no ceiling

    # how often every box is drawn
    surface = (w * d + d * h + w * h)[:B]
    total = np.bincount(owner, surface)[1:]  # [objects]
    share = np.sqrt(total) / np.cumsum(np.sqrt(total))[-1]
    weight = np.append(surface * (share / total)[owner - 1], 1.0)
    by_face = area / area.sum(1, keepdims=True) * weight[:, None]
    cumulative = np.cumsum(by_face.ravel())

    kept, found = [], 0
    while found < count:
        # a face by its weight, a place on it at random
        n = 2 * count
        drawn = np.searchsorted(cumulative, rng.uniform(0, cumulative[-1], n))
        box, face = np.divmod(drawn, 6)
        xyz = low[box] + rng.uniform(0, 1, (n, 3)) * (high - low)[box]
        axis = face // 2
        outer = face % 2 == (box < B)  # the room is seen from inside
        xyz[np.arange(n), axis] = np.where(outer, high[box, axis], low[box, axis])

        # it is seen if 4 mm along its normal are in the room and in no box: not where faces touch,
        # nor on undersides
        probe = xyz + 0.004 * NORMALS[face]
        hidden = np.ones((n, B), bool)
        for k in range(3):
            hidden &= (probe[:, k, None] > lo[:, k]) & (probe[:, k, None] < hi[:, k])
        inside = (probe > bounds[0]).all(1) & (probe < bounds[1]).all(1)
        seen = inside & ~hidden.any(1)
        kept.append((xyz[seen], box[seen], face[seen]))
        found += seen.sum()
    return [np.concatenate(part)[:count] for part in zip(*kept, strict=True)]


def _shade(category, own):
    """Color the six faces of a category's parts in the light, what has no material in its own color: [m, 6, 3]."""
    rgb = [MATERIALS.get(material, own) for material in PARTS.get(category, CUBE)[1]]
    return np.array(rgb)[:, None] * SHADE[:, None]


def _palette(placed, rng):
    """Color the six faces of every part and then of the room: [B + 1, 6, 3] int16."""
    faces = []
    for category, color, _ in placed:
        faces += [*_shade(category, COLORS[color] + rng.integers(-8, 9, 3))]

    warm = rng.integers(-8, 9)
    wall = np.array([212 + warm, 208, 202 - warm]) - rng.integers(22)
    floor = FLOORS[rng.integers(len(FLOORS))]
    shell = [*np.outer([0.94, 0.98, 0.92, 1.0], wall), (236, 236, 232), floor]
    return np.array([*faces, shell]).astype(np.int16)


def _noise(rng, *shape):
    return rng.integers(-5, 6, (*shape, 1), dtype=np.int8)


def _paint(palette, box, face, noise):
    """Color points by their boxes and faces [...], with slight noise [..., 1]: [..., 3] uint8."""
    return np.clip(palette[box, face] + noise, 0, 255).astype(np.uint8)


def room(seed, objects=None, views=12, size=96, points=None, render=True, folder=None):
    """Make a furnished room around x = y = 0; the same seed gives the same room on every machine.

    objects: how many, door and window included, or the least and the most (default 8 to 16); the room
    grows with them, and so does its cloud (default 4096 points). views of size x size pixels; views = 0
    or points = 0 leave the frames or the cloud out, and so does render = False, which leaves all else
    as it is with frames. folder: where the frames are kept, since those of hundreds of rooms take a
    gigabyte of memory. Object boxes are the exact extent of
    their parts and disjoint (small things stand exactly on the tops of big ones); no two objects
    share category and color. Superpoints are the faces of parts, cut at every meter. Raises
    DataError for a number of objects that cannot be furnished.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    count = int(rng.integers(8, 17))
    side, height = rng.uniform(4.0, 6.5, 2), 2.6
    if objects is not None:
        most = len(CATEGORIES) * len(COLORS) * 2 // 3  # beyond, too few pairs of category and color are left
        ends = np.resize(objects, 2)
        if np.size(objects) > 2 or not 3 <= ends[0] <= ends[1] <= most:
            raise DataError(f"room: objects = {objects}; give 3 to {most}")

        # as many small rooms as large ones: between 8 and 16 as many as between 16 and 32
        count = round(np.exp(rng.uniform(*np.log(ends))))
        side = side * max(1.0, np.sqrt(1.3 * count / (side[0] * side[1])))
    if points is None:
        points = 4096 if objects is None else max(4096, 340 * count)

    # the room grows until everything has a place; shuffled, so that an id says nothing about the
    # category
    while (placed := _furnish(rng, count, side, height)) is None:
        side = side * 1.08
    placed = several(rng, placed, count)
    categories, colors, parts = zip(*placed, strict=True)
    low = np.array([part[0].min(0) for part in parts])
    high = np.array([part[1].max(0) for part in parts])
    boxes = np.concatenate([(low + high) / 2, high - low], 1)
    ids = np.arange(1, count + 1)
    things = list(map(Thing, ids.tolist(), categories, colors, boxes))
    bounds = np.array([[*-side / 2, 0.0], [*side / 2, height]])
    scene = Scene(f"room{seed:06d}", "rooms", things, bounds=bounds)

    # all parts of all objects, and the room as the last
    lo, hi = np.concatenate(parts, axis=1)  # [B, 3] each
    owner = np.append(np.repeat(ids, [len(part[0]) for part in parts]), 0)  # [B + 1] object ids
    palette = _palette(placed, rng)

    if views:
        poses = _cameras(rng, views, side, low, high)
        noise = _noise(rng, views, size, size)
        if render:
            cast = [ray_cast(lo, hi, pose, size, bounds) for pose in poses]
            depth, box, face = (np.stack(part) for part in zip(*cast, strict=True))  # [V, size, size] each
            color = _paint(palette, box, face, noise)
            masks = owner[box].astype(np.int32)
            focal = size / 2 / HALF_FOV
            K = np.tile(pinhole(focal, focal, size / 2, size / 2), (views, 1, 1))
            scene.frames = Frames(color, depth, masks, K, poses)

    if points:
        xyz, box, face = _sample_surface(lo, hi, owner[:-1], bounds, points, rng)
        scene.points = xyz.astype(np.float32)
        scene.normals = NORMALS[face]
        scene.instances = owner[box]
        scene.colors = _paint(palette, box, face, _noise(rng, points))
        piece = np.column_stack([np.floor(xyz).astype(int), 6 * box + face])
        scene.superpoints = np.unique(piece[:, [2, 3, 0, 1]], axis=0, return_inverse=True)[1].ravel()

    # frames go to a file, and are read when they are looked at
    if folder and scene.frames:
        path = folder / f"{scene.name}.npz"
        save_scene(scene, path)
        scene.frames = LazyFrames(partial(load_frames, path), scene.name)
    return scene


def rooms(seeds, workers=2, **options):
    """Make `room(seed, **options)` for all seeds, in their order, by `workers` forked processes (0: in this one).

    Workers use numpy's elementwise functions only, so each keeps to one thread and forking a
    process that runs threads is safe.
    """
    seeds, make = list(seeds), partial(room, **options)
    if workers < 2 or len(seeds) < 8 or "fork" not in multiprocessing.get_all_start_methods():
        return [make(seed) for seed in seeds]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return pool.map(make, seeds)


def category_icon(category, color, size):
    """Draw the category's furniture alone on black, three-quarter view: [size, size, 3] uint8.

    The paper embeds categories from drawn icons (Proxy3D); a category outside the table is drawn as
    a plain cube.
    """
    # as large as fits into a sphere of radius 1, seen from 3.2 m
    extent = np.array(FURNITURE.get(category, (1.0, 1.0, 1.0))[:3])
    parts = _place_parts(category, extent, 0) - [0, 0, extent[2] / 2]
    lo, hi = parts * 2 / np.linalg.norm(extent)
    pose = _look(3.2 * _unit(np.array([[0.6, 0.8, 0.5]])), np.zeros((1, 3)))[0]
    _, box, face = ray_cast(lo, hi, pose, size, np.array([3 * [-9], 3 * [9]]), half_fov=0.35)

    # the room around it is black
    shaded = np.array([*_shade(category, COLORS[color]), np.zeros((6, 3))])  # [m + 1, 6, 3]
    return shaded[box, face].astype(np.uint8)


# ---- 4 questions and baselines -------------------------------------------------------------------
#
# A question is made in three steps: draw which objects it is about, read the answer off their boxes
# and names (`scene_graph`), put both into one of a template's wordings (`make_sample`). A draw without a
# clear answer gives None.

# Wordings keep content words close to the answer, since anything between is one more hop for a
# small model. {what}, {other}, {at}, {facing} are descriptions ("red chair"), {a} and {b} are
# marks.
TEMPLATES = {
    "ground": (
        "which one is the {what}?",
        "find the {what}.",
        "which object is the {what}?",
        "point to the {what}.",
    ),
    "multi": ("find all {what}.", "which objects are {what}?", "point to all {what}."),
    "id_category": ("what is {a}?", "what kind of thing is {a}?", "name {a}."),
    "id_color": ("what color is {a}?", "which color has {a}?", "name the color of {a}."),
    "id_size": ("is {a} larger than {b}?", "is {a} bigger than {b}?", "has {a} more volume than {b}?"),
    "coordinate": ("where is {a}?", "what is the position of {a}?", "give the coordinates of {a}."),
    "relation": (
        "where is {a} relative to {b}?",
        "on which side is {a} of {b}?",
        "which way is {a} from {b}?",
    ),
    "distance_ids": (
        "how far is {what} from {other}?",
        "what is the distance of {what} from {other}?",
        "how many meters is {what} from {other}?",
    ),
    "color": (
        "what color is the {what}?",
        "which color has the {what}?",
        "name the color of the {what}.",
    ),
    "what_color": ("what is {what}?", "which thing is {what}?", "what kind of thing is {what}?"),
    "what_on": ("what is on the {what}?", "what stands on the {what}?", "which thing is on the {what}?"),
    "what_near": (
        "what is nearest to the {what}?",
        "what is closest to the {what}?",
        "what is next to the {what}?",
    ),
    "where_support": (
        "what does the {what} stand or hang on?",
        "what is the {what} on?",
        "what holds the {what}?",
    ),
    "where_near": ("where is the {what}?", "where can i find the {what}?", "near what is the {what}?"),
    "count": ("how many {what} are there?", "count the {what}.", "what is the number of {what}?"),
    "exist": ("is there {what}?", "do you see {what}?", "does the room have {what}?"),
    "situated_side": (
        "i am standing at the {at} facing the {facing}. is the {what} on my left or right?",
        "i stand at the {at} and look at the {facing}. is the {what} on my left or right?",
        "from the {at} i face the {facing}. is the {what} on my left or right?",
    ),
    "situated_depth": (
        "i am standing at the {at} facing the {facing}. is the {what} in front of me or behind me?",
        "i stand at the {at} and look at the {facing}. is the {what} in front of me or behind me?",
        "from the {at} i face the {facing}. is the {what} in front of me or behind me?",
    ),
    "situated_turn": (
        "i am standing at the {at} facing the {facing}. must i turn around to see the {what}?",
        "i stand at the {at} and look at the {facing}. must i turn around to see the {what}?",
        "from the {at} i face the {facing}. must i turn around to see the {what}?",
    ),
    "distance": (
        "how far is the {what} from the {other}?",
        "what is the distance of the {what} from the {other}?",
        "how many meters is the {what} from the {other}?",
    ),
    "size_height": (
        "how tall is the {what}?",
        "how high in meters is the {what}?",
        "give the height of the {what}.",
    ),
    "size_length": (
        "how long is the {what}?",
        "how many meters long is the {what}?",
        "give the length of the {what}.",
    ),
    "caption": ("describe {a}.", "give a description of {a}.", "tell me about {a}."),
    "vsi_counting": (
        "how many {what} are in this room?",
        "how many {what} do you count here?",
        "what is the number of {what} in this room?",
    ),
    "vsi_abs_distance": (
        "from closest point to closest point, how many meters are between the {what} and the {other}?",
        "what is the shortest distance in meters between the {what} and the {other}?",
        "how wide in meters is the gap between the {what} and the {other}?",
    ),
    "vsi_object_size": (
        "in centimeters, how long is the longest side (length, width or height) of the {what}?",
        "how many centimeters measures the longest dimension of the {what}?",
        "give in centimeters the largest of length, width and height of the {what}.",
    ),
    "vsi_room_size": (
        "how many square meters has this room?",
        "what is the floor area of this room in square meters?",
        "give the size of this room in square meters.",
    ),
    "vsi_rel_distance": (
        "measured between closest points, which of these is closest to the {what}? {options}",
        "by their closest points, which of these is nearest to the {what}? {options}",
        "which of these has the narrowest gap to the {what}? {options}",
    ),
    "vsi_rel_direction": (
        "i am standing at the {at} facing the {facing}. {note}where is the {what}? {options}",
        "i stand at the {at} and look at the {facing}. {note}where is the {what}? {options}",
        "from the {at} i face the {facing}. {note}where is the {what}? {options}",
    ),
    "subtract": ("{numbers} =",),
    "norm": ("{numbers} =",),
}
WORDS = (  # the words that code below writes besides those of the tables; of HEADINGS those that SIDES lacks
    "a an the thing things on near from floor wall yes no this there it is back means at least degrees to turn a b c d"
)

FLOOR, WALL, NOTHING = -1, -2, -3  # in SceneGraph.support
STRUCTURE = {"wall", "floor", "ceiling"}  # instances too in labeled scans; no question is about them
BUILT = {"door", "window"}  # parts of walls: where they are is not asked
SYNONYMS = {
    "sofa": "couch",
    "fridge": "refrigerator",
    "bin": "trash",
    "tv": "television",
    "picture": "painting",
    "rug": "carpet",
    "lamp": "light",
    "wardrobe": "closet",
    "nightstand": "night",
}

# How one of several objects is told from the rest -> a measure of the scene graph, +1 for the
# smallest or -1 for the greatest, by how much the next must differ: 0.15 m is VSI-Bench's margin,
# 0.405 a ratio of 1.5 in volume.
RELATIONS = {
    "nearest to": ("distance", 1, 0.15),
    "farthest from": ("distance", -1, 0.15),
    "on": ("not on", 1, 1.0),
}
EXTREMES = {
    "largest": ("volume", -1, 0.405),
    "smallest": ("volume", 1, 0.405),
    "tallest": ("height", -1, 0.1),
    "shortest": ("height", 1, 0.1),
    "highest": ("level", -1, 0.1),
    "lowest": ("level", 1, 0.1),
}
SELECT = RELATIONS | EXTREMES

# what a question may name of a group: its category, its color, both
FORMS = {"category": (True, False), "color": (False, True), "pair": (True, True)}
SIDES = (("left", "right"), ("front", "behind"), ("below", "above"))  # per axis: negative, positive

# Directions from a situation: answer and its sector in degrees, left positive, with a margin at
# every edge.
HEADINGS = {
    "situated_side": [("left", 20, 160), ("right", 200, 340)],
    "situated_depth": [("front", -70, 70), ("behind", 110, 250)],
    "situated_turn": [("no", -70, 70), ("yes", 110, 250)],
    "vsi_rel_direction_easy": [("left", 15, 165), ("right", 195, 345)],
    "vsi_rel_direction_medium": [("left", 15, 120), ("right", 240, 345), ("back", 150, 210)],
    "vsi_rel_direction_hard": [
        ("front-left", 15, 75),
        ("front-right", 285, 345),
        ("back-left", 105, 165),
        ("back-right", 195, 255),
    ],
}


def plural(noun):
    if noun.endswith("shelf"):
        return noun[:-1] + "ves"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def phrase(category, color, many=False):
    """Name a group of things, "" = any: "red chair", "chairs", "red thing"."""
    noun = category or "thing"
    return f"{color} {plural(noun) if many else noun}".lstrip()


def article(noun):
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def mark(thing):
    return f"<obj {thing.id}>"


def meters(value):
    return f"{round(value, 2) + 0.0:.2f}"  # + 0.0: never "-0.00"


def listed(values):
    """Write a point or a box: "[1.25, -0.80, 0.45]"."""
    return f"[{', '.join(map(meters, values))}]"


def pick(rng, items):
    """Draw one item, None of nothing (much cheaper than rng.choice; 256 questions are made a step)."""
    return items[int(rng.random() * len(items))] if len(items) else None


def several(rng, items, count):
    """Draw `count` different items in random order, [] where there are fewer."""
    if len(items) < count:
        return []
    return [items[i] for i in rng.permutation(len(items))[:count].tolist()]


# -- what questions ask of a scene; from here on g is a scene graph, i and j are places in g.things


class SceneGraph:
    """Objects of a scene and how they relate; an object is named by its place in `things`."""

    def __init__(self, scene):
        self.objects, self.identifiers, self.bounds = scene.objects, scene.identifiers, scene.bounds
        self.floor_area = 0.0  # square meters, where the bounds are walls
        if scene.source == "rooms" and scene.bounds is not None:
            self.floor_area = float(np.ptp(scene.bounds[:, :2], axis=0).prod())

        # without walls, floor and ceiling; and the places of those that have an identifier
        things = self.things = [o for o in scene.objects if o.category not in STRUCTURE]
        known = scene.identifiers or [o.id for o in things]
        self.numbered = [i for i, o in enumerate(things) if o.id in known]

        # who has the same category, the same color, both: (category, color) -> places, "" = any
        self.groups = {}
        for i, o in enumerate(things):
            for key in dict.fromkeys([(o.category, ""), ("", o.color), (o.category, o.color)]):
                if any(key):
                    self.groups.setdefault(key, []).append(i)

        # what nothing else is: "chair", else "red chair", "red thing" without category
        self.names = {}  # place -> words
        for i, o in enumerate(things):
            for key in [(o.category, ""), (o.category, o.color)]:
                if len(self.groups.get(key, ())) == 1:
                    self.names.setdefault(i, phrase(*key))
        self.unique = [i for i, name in self.names.items() if name == things[i].category]

        # sizes and distances: what SELECT compares, [r, n], or seen from every object, [r, n, n]
        self.boxes = np.array([o.box for o in things], dtype=float).reshape(-1, 6)
        center, size = self.boxes[:, :3], self.boxes[:, 3:]
        between = np.abs(center[:, None] - center)  # [n, n, 3]
        gap = np.maximum(between - (size[:, None] + size) / 2, 0)
        self.support = support_of(self.boxes, self.boxes, scene.bounds)
        self.measures = {
            "distance": np.sqrt(np.square([gap, between]).sum(-1)),  # between closest points, between centers
            "not on": (self.support != np.arange(len(things))[:, None])[None] * 1.0,
            "volume": np.log(np.maximum(size.prod(1), 1e-9))[None],
            "height": size[None, :, 2],
            "level": np.stack([center[:, 2] + size[:, 2] / 2, center[:, 2]]),
        }

    def category(self, i):
        return "" if i is None else self.things[i].category

    @cached_property
    def described(self):
        """Words that fit one object alone, to be put behind "the", for every object that has some.

        "chair", "red chair", "chair nearest to the bed", "largest red thing".
        """
        words = {i: self.names.get(i) or _comparison(self, i) for i in range(len(self.things))}
        return {i: text for i, text in words.items() if text}


def scene_graph(scene):
    """Work out what questions ask of a scene, once for its present objects."""
    if scene.graph is None or scene.graph.objects is not scene.objects:
        scene.graph = SceneGraph(scene)
    return scene.graph


def support_of(boxes, others, bounds):
    """Find what boxes [m, 6] stand or hang on: [m] FLOOR, WALL, the place of one of others [n, 6], NOTHING."""
    # it stands on the floor to 5 cm
    low, high = box_ends(boxes)
    floor = low[:, 2] < 0.05

    # another box carries it whose top is less than 5 cm from its bottom and below its center; a mat
    # does not
    center = boxes[:, None, :3]
    other_low, other_high = box_ends(others)
    carries = ((other_low <= center) & (center <= other_high))[..., :2].all(-1)  # [m, n]
    carries &= (np.abs(low[:, None, 2] - other_high[:, 2]) < 0.05) & (others[:, 5] >= 0.1)
    count = carries.sum(1)
    carrier = carries @ np.arange(len(others))

    # it hangs within 2 cm of a wall, if nothing carries it; on a thing at a wall, either may hold it
    wall = np.zeros(len(boxes), bool)
    if bounds is not None:
        wall = (np.minimum(low - bounds[0], bounds[1] - high)[:, :2] < 0.02).any(1)
    cases = [floor, wall & (count == 0), ~wall & (count == 1)]
    return np.select(cases, [FLOOR, WALL, carrier], NOTHING)


def keys_of(g, form):
    """List the keys of groups that a question of this form may be about."""
    return [key for key in g.groups if (key[0] > "", key[1] > "") == FORMS[form]]


def alone(g, form):
    """List the only objects of a category, of a color, or of both."""
    return [g.groups[key][0] for key in keys_of(g, form) if len(g.groups[key]) == 1]


def select(g, how, group, anchor=None):
    """Find the one of the group that is "nearest to" the anchor, or "largest"; None where it is close."""
    group = [i for i in group if i != anchor]
    if not group:
        return None

    # every row must put the same one first, by the margin
    what, sign, margin = SELECT[how]
    rows = g.measures[what] if anchor is None else g.measures[what][:, anchor]
    rows = sign * rows[:, group]  # [r, len(group)]
    best = int(rows[0].argmin())
    close = np.count_nonzero(rows - rows[:, [best]] < margin)
    return group[best] if close == len(rows) else None  # only itself


def selection(g, how, key, anchor):
    """Write a selection: "chair nearest to the bed", "largest red thing"."""
    if anchor is None:
        return f"{how} {phrase(*key)}"
    return f"{phrase(*key)} {how} the {g.category(anchor)}"


def _comparison(g, i):
    """Find words that fit object i alone by comparing: a relation to a unique object or a superlative."""
    # the first that fits, in the order in which people would say it
    o = g.things[i]
    kind = (o.category, "")
    tries = [(how, kind, anchor) for how in RELATIONS for anchor in g.unique if o.category]
    tries += [(how, key, None) for key in (kind, ("", o.color), ("", "")) for how in EXTREMES]
    for how, key, anchor in tries:
        if select(g, how, g.groups.get(key, range(len(g.things))), anchor) == i:
            return selection(g, how, key, anchor)
    return None


def support_phrase(g, i):
    """Say what an object stands or hangs on: "on the desk", "on the floor"; "" = unclear."""
    on = g.support[i]
    name = {FLOOR: "floor", WALL: "wall", NOTHING: ""}[on] if on < 0 else g.category(on)
    return f"on the {name}" if name else ""


def nearby_phrase(g, i):
    """Say which other object on the floor is nearest: "near the bed"; "" = unclear."""
    standing = np.flatnonzero(g.support == FLOOR).tolist()
    name = g.category(select(g, "nearest to", standing, i))
    return f"near the {name}" if name else ""


# -- from a draw to a question

TASKS = {}  # task -> a function (scene, rng) -> Sample or None
METRIC = {  # tasks whose answers are in meters
    "coordinate", "distance_ids", "distance", "size", "vsi_abs_distance", "vsi_object_size", "vsi_room_size"
}  # fmt: skip
UNLABELLED = ("ground_superlative", "id_color", "id_size")  # stand in where objects have no names


def make_sample(function, task, scene, rng):
    """Draw and write one question of a task: what `function` draws, in one of its template's wordings.

    A drawn "text" fills the template, "wrong" are other answers of a multiple choice; the rest are
    fields of Sample. Returns None where this draw has no unambiguous question, or meters are asked
    of a scene of unknown scale.
    """
    drawn = function(scene_graph(scene), rng, task)
    if drawn is None or (task in METRIC and not scene.metric):
        return None
    text, wrong = drawn.pop("text"), drawn.pop("wrong", ())

    # the options in random order; the answer becomes the letter of the right one, number 0
    if wrong:
        texts = [drawn["answer"], *wrong]
        order = rng.permutation(len(texts))
        drawn["options"] = [f"{letter}. {texts[k]}" for letter, k in zip("ABCD", order, strict=False)]
        drawn["answer"] = "ABCD"[order.argmin()]
        text["options"] = " ".join(drawn["options"])
    template = drawn.setdefault("template", task)
    question = pick(rng, TEMPLATES[template]).format(**text)
    return Sample("", scene.name, task, question, **drawn)


def generator(*tasks):
    """Register a function (scene graph, rng, task) -> a dict for `make_sample`, or None, for its tasks."""

    def register(function):
        for task in tasks:
            TASKS[task] = partial(make_sample, function, task)
        return function

    return register


def draw_numbered(rng, places, count):
    """Draw one or two different places, [] where there are too few."""
    n = len(places)
    if n < count:
        return []
    first = int(rng.random() * n)
    other = first - 1 - int(rng.random() * (n - 1))
    return [places[first], places[other]][:count]


# -- generators


def pointed(thing, what, kind):
    return dict(answer=mark(thing), text={"what": what}, template="ground", targets=[thing.id], kind=kind)


@generator("ground", "ground_multiple", "ground_category")
def ground(g, rng, task):
    """Ask for one object by category and color (ground_category: by its unique category).

    ScanRefer's kinds: "unique" = the only one of its category, "multiple" = not; ground_multiple
    asks the latter.
    """
    # what a category, or category and color, tells from all others; only what has an identifier can
    # be the answer
    form = "category" if task == "ground_category" else "pair"
    places = [i for i in alone(g, form) if i in g.numbered]
    if task == "ground_multiple":
        places = [i for i in places if i not in g.unique]
    i = pick(rng, places)
    if i is None:
        return None
    o = g.things[i]
    what = phrase(o.category, o.color if form == "pair" else "")
    return pointed(o, what, "unique" if i in g.unique else "multiple")


@generator("ground_relation", "ground_superlative")
def ground_by(g, rng, task):
    """Ask for one object by comparing.

    ground_relation: one of several of a category by its relation to the only one of another, "chair
    nearest to the table". ground_superlative: "largest red thing", "tallest chair", "lowest thing",
    which needs no category; what is alone in its group is asked for without ("red thing", kind
    "only").
    """
    # among which objects, and how they compare
    relation = task == "ground_relation"
    keys, hows = list(g.groups), list(EXTREMES)
    if relation:
        keys = [key for key in keys_of(g, "category") if len(g.groups[key]) > 1]
        hows = list(RELATIONS)
    for _ in range(4):
        key, how, anchor = pick(rng, keys), pick(rng, hows), None
        if relation:
            anchor = pick(rng, g.unique)
            if None in (key, anchor):
                return None
        elif key is None or rng.random() >= 0.5:
            key = ("", "")  # among all

        # the comparison must be clear, and its winner must have an identifier
        group = g.groups.get(key, range(len(g.things)))
        i = select(g, how, group, anchor)
        if i in g.numbered:
            if len(group) == 1:
                return pointed(g.things[i], phrase(*key), "only")
            return pointed(g.things[i], selection(g, how, key, anchor), how)
    return None


def absent(g, rng, form):
    """Draw a key that no object has; of a pair, a hard negative, category and color are both here."""
    here = [category for category, _ in keys_of(g, "category")]
    text = " ".join(here)  # "office chair" and "couch" are a chair and a sofa by another name
    choices = {
        "category": ([c for c in CATEGORIES if c not in text and SYNONYMS.get(c, c) not in text], [""]),
        "color": ([""], list(COLORS)),
        "pair": (here, [color for _, color in keys_of(g, "color")]),
    }
    for _ in range(8):
        key = tuple(pick(rng, part) for part in choices[form])
        if None not in key and key not in g.groups:
            return key
    return None


def kind_of(g, key):
    """Name Multi3DRefer's kind of a group: mt = several targets, st = one, with or without distractors."""
    category, color = key
    if len(g.groups[key]) > 1:
        return "mt"
    if not color:
        return "st_wo_d"
    return "st_w_d" if category and len(g.groups[category, ""]) > 1 else ""


@generator("multi")
def multi(g, rng, task):
    """Ask for all objects of a category, color or both (Multi3DRefer): "yes. <obj 1> <obj 4>" or "no.".

    Objects are listed by identifier. Kinds: zt, st, mt = zero, one, several targets; w_d, wo_d =
    with, without distractors (others of the category).
    """
    # the kind first, then a group of that kind: most groups have one object
    kind = pick(rng, ("zt_w_d", "zt_wo_d", "st_w_d", "st_wo_d", "mt"))
    if kind.startswith("zt"):
        forms = ("category", "color") if keys_of(g, "category") else ("color",)
        key = absent(g, rng, "pair" if kind == "zt_w_d" else pick(rng, forms))
    else:
        key = pick(rng, [key for key in g.groups if kind_of(g, key) == kind])

    # all of its objects must have an identifier
    members = g.groups.get(key, [])
    if key is None or not set(members) <= set(g.numbered):
        return None
    ids = sorted((g.things[i].id for i in members), key=lambda k: g.identifiers.get(k, k))
    answer = " ".join(["yes.", *(f"<obj {k}>" for k in ids)]) if ids else "no."
    return dict(answer=answer, text={"what": phrase(*key, many=True)}, targets=ids, kind=kind)


def larger(g, i, j):
    """Say whether the box of i has more volume than that of j, by half at least."""
    return {i: "yes", j: "no", None: ""}[select(g, "largest", [i, j])]


def side_of(g, i, j):
    """Say where i is relative to j along the axis that separates their centers most.

    By half more than any other, 20 cm at least, for a viewer who looks along +y: x right, y behind
    (away from the viewer), z above.
    """
    apart = g.boxes[i, :3] - g.boxes[j, :3]
    axis = np.abs(apart).argmax()
    _, second, most = sorted(np.abs(apart))
    negative, positive = SIDES[axis]
    if most < max(0.2, 1.5 * second):
        return ""
    return positive if apart[axis] > 0 else negative


MARKED = {  # task -> how many marked objects, a word about them ("" = unclear)
    "id_category": (1, lambda g, i: g.things[i].category),
    "id_color": (1, lambda g, i: g.things[i].color),
    "id_size": (2, larger),
    "relation": (2, side_of),
    "coordinate": (1, lambda g, i: listed(g.boxes[i, :3].tolist())),
}


@generator(*MARKED)
def marked(g, rng, task):
    """Ask for a word of MARKED about one or two objects; a coordinate is the center of a box in meters."""
    count, word = MARKED[task]
    for _ in range(4):
        chosen = draw_numbered(rng, g.numbered, count)
        answer = word(g, *chosen) if chosen else ""
        if answer:
            point = g.boxes[chosen[0], :3].copy() if task == "coordinate" else None
            text = dict(zip("ab", (mark(g.things[i]) for i in chosen), strict=False))
            return dict(answer=answer, text=text, point=point)
    return None


def differences(p, q):
    """Write two points axis by axis, "x1.25 x0.50 0.75 y-0.80 ...", and compute their distance from what is written."""
    parts, total = [], 0.0
    for axis, a, b in zip("xyz", p, q, strict=True):
        a, b = round(a, 2) + 0.0, round(b, 2) + 0.0
        parts.append(f"{axis}{a:.2f} {axis}{b:.2f} {abs(a - b):.2f}")
        total += (a - b) ** 2
    return " ".join(parts), math.sqrt(total)


@generator("distance", "distance_ids")
def distance(g, rng, task):
    """Ask for the meters between the centers of two things, by their descriptions or (distance_ids) by marks.

    The reasoning writes both places before it compares them: "<obj 3> [1.25, -0.80, 0.45] <obj 7> [..] x1.25 ...".
    """
    names = g.described
    if task == "distance_ids":
        names = {i: mark(g.things[i]) for i in g.numbered}
    chosen = draw_numbered(rng, list(names), 2)
    if not chosen:
        return None
    p, q = g.boxes[chosen, :3].tolist()
    length = math.dist(p, q)
    if length < 0.1:
        return None
    what, other = (names[i] for i in chosen)
    return dict(
        answer=meters(length),
        text={"what": what, "other": other},
        reasoning=f"{what} {listed(p)} {other} {listed(q)} {differences(p, q)[0]} =",
        value=length,
        about=[g.things[i].id for i in chosen],
    )


MEASURES = {  # template -> how many objects, the number in the unit asked for, how it is written
    "size_height": (1, lambda g, i: g.boxes[i, 5], "{:.2f}"),
    "size_length": (1, lambda g, i: g.boxes[i, 3:5].max(), "{:.2f}"),
    "vsi_object_size": (1, lambda g, i: 100 * g.boxes[i, 3:].max(), "{:.0f}"),
    "vsi_abs_distance": (2, lambda g, i, j: g.measures["distance"][0, i, j], "{:.2f}"),
    "vsi_room_size": (0, lambda g: g.floor_area, "{:.0f}"),
}


@generator("size", "vsi_object_size", "vsi_abs_distance", "vsi_room_size")
def measure(g, rng, task):
    """Ask for a number of MEASURES, at least 0.1.

    size: height or the longer horizontal side of what has a name, meters. Of the only objects of
    their category: vsi_abs_distance (closest points, meters), vsi_object_size (longest side,
    centimeters). vsi_room_size: square meters, asked of rooms only, since the bounds of a scan are
    not its walls.
    """
    template = pick(rng, [t for t in MEASURES if t.startswith(task)])
    count, number, form = MEASURES[template]

    # a size may be asked of "the red chair", VSI-Bench asks of "the chair" only
    chosen = several(rng, list(g.names) if task == "size" else g.unique, count)
    value = float(number(g, *chosen)) if len(chosen) == count else 0.0
    if value < 0.1:
        return None
    text = dict(zip(("what", "other"), (g.names[i] for i in chosen), strict=False))
    return dict(answer=form.format(value), text=text, template=template, value=value)


def known_answer(g, template, i):
    """Answer a template of `lookup` about object i: "" = unclear, None = not asked."""
    # by looking at it, or by what is on it or next to it
    if template == "color":
        return g.things[i].color
    if template == "what_on":
        on = np.flatnonzero(g.support == i)
        return g.category(on[0]) if len(on) == 1 else None
    if template == "what_near":
        return g.category(select(g, "nearest to", range(len(g.things)), i))

    # by where it is
    if template == "where_support":
        return support_phrase(g, i)
    if template == "where_near":
        return nearby_phrase(g, i) if g.support[i] == FLOOR else None
    return g.category(i)


@generator("color", "what", "where")
def lookup(g, rng, task):
    """Ask for a word that the scene graph knows.

    color: of the only chair. what: the category of the only red thing, of the only thing on the
    desk, of the thing nearest to the bed. where: what the only lamp stands or hangs on, or in other
    words what it is near.
    """
    template = pick(rng, [name for name in TEMPLATES if name.partition("_")[0] == task])
    places = alone(g, "color") if template == "what_color" else g.unique
    if task == "where":
        places = [i for i in places if g.category(i) not in BUILT]
    answers = {i: known_answer(g, template, i) for i in places}
    places = [i for i in places if answers[i] is not None]

    # the answer is drawn first, or nearly all would be on the floor
    if template == "where_support":
        wanted = pick(rng, list(dict.fromkeys(answers.values())))
        places = [i for i in places if answers[i] == wanted]
    i = pick(rng, places)
    if i is None or not answers[i]:
        return None
    what = g.things[i].color if template == "what_color" else g.category(i)
    return dict(answer=answers[i], text={"what": what}, template=template)


@generator("exist")
def exist(g, rng, task):
    """Ask whether there is a red chair; the form is drawn before yes or no and gives nothing away."""
    form = pick(rng, tuple(FORMS) if keys_of(g, "category") else ("color",))
    yes = rng.random() < 0.5
    key = pick(rng, keys_of(g, form)) if yes else absent(g, rng, form)
    if key is None:
        return None
    return dict(answer="yes" if yes else "no", text={"what": article(phrase(*key))}, kind=form)


@generator("count", "vsi_counting")
def count(g, rng, task):
    """Ask how many of a category, a color or both there are (vsi_counting: of a category that has several).

    The number is drawn first, or small ones would win.
    """
    form = "color"
    if keys_of(g, "category"):
        form = pick(rng, ("category", "color", "category", "color", "pair"))
    if task == "vsi_counting":
        form = "category"

    # the groups by how many they are; what is absent counts 0
    by_number = {0: []}
    for key in keys_of(g, form):
        by_number.setdefault(len(g.groups[key]), []).append(key)
    number = pick(rng, [number for number in by_number if number > 1 or task == "count"])
    key = absent(g, rng, form) if number == 0 else pick(rng, by_number.get(number, ()))
    if key is None:
        return None
    return dict(answer=str(number), text={"what": phrase(*key, many=True)}, value=float(number))


@generator("caption")
def caption(g, rng, task):
    """Ask what an object is and where: "this is a red chair near the table."; accept paraphrases."""
    i = pick(rng, [i for i in g.numbered if g.category(i)])
    if i is None:
        return None
    o, where = g.things[i], ""
    if o.category not in BUILT:
        where = nearby_phrase(g, i) if g.support[i] == FLOOR else support_phrase(g, i)

    # one wording to write, others to accept
    noun = phrase(o.category, o.color)
    starts = ("this is ", "", "there is ", "it is ")
    answers = [f"{start}{article(noun)} {where}".strip() + "." for start in starts]
    if where:
        answers.append(f"the {noun} is {where}.")
    return dict(answer=answers[0], text={"a": mark(o)}, targets=[o.id], answers=answers)


@generator("situated", "vsi_rel_direction")
def heading(g, rng, task):
    """Ask for the direction of an object for one who stands by another and faces a third (HEADINGS).

    SQA3D's situations, or VSI-Bench's choices among the only objects of their category. The answer
    is drawn first.
    """
    name = pick(rng, [name for name in HEADINGS if name.startswith(task)])
    kind = name.rpartition("_")[2]
    answer, low, high = pick(rng, HEADINGS[name])
    for _ in range(100):  # until it is behind as often as in front
        # three objects, each at least 0.8 m from the others on the floor plan
        chosen = several(rng, list(g.names) if task == "situated" else g.unique, 3)
        xy = g.boxes[chosen, :2].tolist()
        if not chosen or min(math.dist(p, q) for p, q in itertools.combinations(xy, 2)) < 0.8:
            continue

        # degrees to turn from what is faced to what is asked about, left positive
        at, facing, what = (complex(*p) for p in xy)
        turn = np.angle((what - at) / (facing - at), deg=True)
        if (turn - low) % 360 <= high - low:
            text = dict(zip(("at", "facing", "what"), (g.names[i] for i in chosen), strict=True))
            drawn = dict(answer=answer, text=text, kind=kind)
            if task == "situated":
                return drawn | dict(template=name)
            text["note"] = "back means at least 135 degrees to turn. " if kind == "medium" else ""
            wrong = [other for other, *_ in HEADINGS[name] if other != answer]
            return drawn | dict(wrong=wrong)
    return None


@generator("vsi_rel_distance")
def vsi_rel_distance(g, rng, task):
    """Ask which of four objects is nearest to another."""
    for _ in range(4):
        chosen = several(rng, g.unique, 5)
        best = select(g, "nearest to", chosen[1:], *chosen[:1])
        if best is not None:
            wrong = [g.category(i) for i in chosen[1:] if i != best]
            return dict(answer=g.category(best), text={"what": g.category(chosen[0])}, wrong=wrong)
    return None


# -- sets of questions


def adopt(paper):
    """Take a paper's own question types among the shared ones: its TASKS, and TEMPLATES and METRIC if it has them."""
    own = vars(paper)
    TASKS.update(own["TASKS"])
    TEMPLATES.update(own.get("TEMPLATES", {}))
    METRIC.update(own.get("METRIC", ()))


def vocabulary(categories=CATEGORIES, more=()):
    """List every word that a question, its reasoning or its answer may hold, or one of `more` texts does."""
    texts = [WORDS, *more, *COLORS, *SELECT, *itertools.chain(*SIDES, *TEMPLATES.values())]
    for category in filter(None, categories):
        texts += [category, plural(category)]
    return sorted(set(re.findall(r"[a-z]+(?:'[a-z]+)?", " ".join(texts).lower())))


def questions(scene, mix, count, rng):
    """Draw `count` questions, tasks by the weights of `mix`.

    A draw that the scene cannot give is replaced by another, four per question at most, so a poor
    scene may give fewer.
    """
    samples = []
    weights = np.array(list(mix.values()))
    for task in rng.choice(list(mix), 4 * count, p=weights / weights.sum()).tolist():
        if len(samples) == count:
            break
        sample = TASKS[task](scene, rng)
        if sample is not None:
            sample.id = f"{scene.name}/{sample.task}/{len(samples)}"
            samples.append(sample)
    return samples


def question_set(scenes, tasks, per_scene, seed):
    """Make an evaluation's questions: per scene and task up to `per_scene` different ones.

    Every (scene, task) has a random stream of its own, so a subset of scenes or tasks gets the same
    questions.
    """
    samples = []
    for scene, task in itertools.product(scenes, tasks):
        rng = np.random.default_rng([seed, zlib.crc32(scene.name.encode()), zlib.crc32(task.encode())])

        # of the same question asked twice, the first stays
        found = {}
        for _ in range(8 * per_scene):
            sample = TASKS[task](scene, rng)
            if sample and sample.question not in found and len(found) < per_scene:
                sample.id = f"{scene.name}/{task}/{len(found)}"
                found[sample.question] = sample
        samples += found.values()
    return samples


# -- baselines: what a score must be seen against


def blind_content(sample):
    """Give what can be known blindly of an answer: an option's text for its letter, nothing for marks."""
    for option in sample.options or ():
        if option.startswith(sample.answer + ". "):
            return option[3:]
    return MARK.sub("", sample.answer).strip()


class Blind:
    """Answers without looking: the most frequent training answer to the same question, else to its template.

    Of meters the median, of points and boxes the mean, for marks an arbitrary object of the scene.
    """

    def __init__(self, samples):
        self.seen = defaultdict(Counter)  # key -> answer -> how often
        for sample in samples:
            for key in self.keys(sample):
                self.seen[key][blind_content(sample)] += 1

    def keys(self, sample):
        """List what a question is found again by: its text, its template, its task."""
        task = sample.task
        return [(task, "question", MARK.sub("", sample.question)), (task, "template", sample.template), task]

    def answers(self, task, most=200):
        """List the training answers of a task, evenly thinned to `most`: what `chance` draws from."""
        distinct = sorted(self.seen[task])
        return distinct[:: max(1, math.ceil(len(distinct) / most))]

    def predict(self, sample, scene):
        """Give the blind answer; "" where training had no question of the template."""
        question, template, _ = self.keys(sample)
        seen = self.seen[question] or self.seen[template]
        if not seen:
            return ""

        # the option whose text was right most often; its letter is arbitrary
        if sample.options:
            return max(sample.options, key=lambda option: seen[option[3:]])[0]

        # what is nearest to all training answers
        rows = [re.findall(r"-?\d+\.?\d*", answer) for answer in seen.elements()]
        if sample.task in METRIC and rows[0]:
            numbers = np.array(rows, float)  # [answers, 1, 3 or 6]
            return meters(np.median(numbers)) if numbers.shape[1] == 1 else listed(numbers.mean(0))

        # the most frequent answer; a mark is replaced by an object of this scene
        text = max(seen, key=seen.get)
        g = scene_graph(scene)
        if sample.targets is None or sample.task == "caption" or text.lower() == "no." or not g.numbered:
            return text
        i = g.numbered[zlib.crc32(sample.id.encode()) % len(g.numbered)]
        return f"{text} {mark(g.things[i])}".strip()


EVEN = {"yes", "no", "left", "right", "front", "behind"}  # answers of which there is one other


def chance(sample, scene, answers, score):
    """Compute the expected score of a guess drawn uniformly from what the very question allows.

    That is the numbered objects of the scene (for "multi" also "no"; one object against m targets
    has F1 2 / (1 + m)), the options, the two of a pair such as yes and no, else the task's training
    `answers` (`Blind.answers`), each scored by `score`.
    """
    # any object of the scene
    n = len(scene_graph(scene).numbered)
    if sample.task == "multi":
        m = len(sample.targets)
        return (2 * m / (1 + m) if m else 1.0) / (n + 1)
    if sample.task.startswith("ground"):
        return 1 / n

    # any of the answers that the question names, else any of those seen in training
    if sample.options:
        return 1 / len(sample.options)
    if sample.answer in EVEN and sample.task != "relation":
        return 0.5
    return sum(map(score, answers)) / len(answers) if answers else 0.0


# ---- 5 text --------------------------------------------------------------------------------------

SCENE, PROMPT = -1, -2  # placeholder ids: scene tokens, a question's own click or box
IGNORE = -100  # label of a position that carries no loss
TUPLE = re.compile(r"\[([^\[\]]{1,200})\]")
PIECE = re.compile(
    r"<obj\d{3}>|\[[^\[\]]*\]|[xyzwdh][+-]?\d+\.\d+|-?\d+\.\d+|\d+|[a-z]+(?:'[a-z]+)?|[^\sa-z0-9]"
)


def tuples(text, size):
    """Find every bracketed list of `size` entries: [size] float, None where one is no finite number."""
    found = []
    for inside in TUPLE.findall(text):
        # "1.2, 3" and "1.2 3" alike; what a model wrote may hold anything
        entries = re.split(r"[,;\s]+", inside.strip())
        if len(entries) == size:
            try:
                values = np.array([float(e) for e in entries])
            except ValueError:
                values = np.full(size, np.nan)
            found.append(values if np.isfinite(values).all() else None)
    return found


class TinyText:
    """Word-level text for models trained from scratch: a token per word, identifier, mark or number.

    Text is lower-cased. Meters become number tokens (section T); a pre-trained model needs none of
    them, its digits already carry meaning (`HubText`). Words outside the vocabulary become <unk>;
    `unknown(text)` lists them.
    """

    template = ("", "", "")  # text before the scene tokens, behind them, between question and answer

    def __init__(self, words):
        # number tokens: piece -> (axis, meters)
        numbers = {}
        for axis, (low, high) in NUMBERS.items():
            for i in range((high - low) * BINS + 1):
                numbers[f"{axis}#{i}"] = (axis, low + i / BINS)

        # every piece once; a run's words decide the rest, in an order of their own
        identifiers = [f"<obj{i:03d}>" for i in range(100)]
        counts = map(str, range(301))
        self.words = sorted(set(words))
        pieces = ["<pad>", "<eos>", "<unk>", *identifiers, *numbers, *counts, *".,?!:;=-()", *self.words]
        self.pieces = list(dict.fromkeys(pieces))
        self.index = {p: i for i, p in enumerate(self.pieces)}
        self.pad, self.eos, self.unk = 0, 1, 2
        self.number = {self.index[p]: number for p, number in numbers.items()}  # the same by token

    def __len__(self):
        return len(self.pieces)

    def encode(self, text):
        pieces = [p for word in PIECE.findall(text.lower()) for p in number_pieces(word)]
        return [self.index.get(p, self.unk) for p in pieces]

    def unknown(self, text):
        return [p for p in PIECE.findall(text.lower()) if p.isalpha() and p not in self.index]

    def decode(self, ids):
        """Write the ids up to <eos>: number tokens as meters, identifiers in capitals, as scores read them."""
        pieces = [self.pieces[int(i)] for i in ids if int(i) != self.pad]
        text = join_numbers(" ".join(pieces).partition("<eos>")[0].strip())
        text = re.sub(r" ([.,?!:;])", r"\1", text)
        return re.sub(r"<obj(\d{3})>", r"<OBJ\1>", text)

    def state(self):
        return {"kind": "tiny", "words": self.words}


class HubText:
    """The tokenizer of a pre-trained model (any `AutoTokenizer` name or folder), with its own chat template.

    Without one the text begins as the tokenizer itself begins it ("<s>") and takes Vicuna's form for
    a Vicuna, "### human: ... ### assistant:" for others. Numbers stay text, meters with two
    decimals. Raises DataError where there is no such model.
    """

    def __init__(self, name):
        from transformers import AutoTokenizer

        with reading(name, "pre-trained model: give its folder, or its name and a network at the first use"):
            self.name, self.tokenizer = name, AutoTokenizer.from_pretrained(name)
        self.eos = self.tokenizer.eos_token_id
        self.pad = self.eos if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        self.unk = self.eos  # stands for what has no name

        # where in a chat the scene and the question stand
        person, assistant = (
            ("USER", "ASSISTANT") if "vicuna" in name.lower() else ("### human", "### assistant")
        )
        start = self.tokenizer.decode(self.tokenizer.encode(""))
        space = " " if self.tokenizer.tokenize("x") == ["x"] else ""  # Llama's puts one before every text
        chat = f"{start}{person}:{space}\0scene\0question\0{space}{assistant}:{space}"
        if self.tokenizer.chat_template:
            message = [{"role": "user", "content": "\0scene\0question\0"}]
            chat = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, _, _, after = chat.split("\0")
        self.template = (before, "\n", after)
        if "<|vision_start|>" in self.tokenizer.get_vocab():
            self.template = (before + "<|vision_start|>", "<|vision_end|>\n", after)

    def __len__(self):
        return len(self.tokenizer)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def unknown(self, text):
        return []

    def decode(self, ids):
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True).strip()

    def state(self):
        return {"kind": "hub", "name": self.name}


def load_text(state):
    """Make the tokenizer that `state()` described."""
    return TinyText(state["words"]) if state["kind"] == "tiny" else HubText(state["name"])


# ---- 5b batches ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A row of a paper's mixture of official files: what is taken of which benchmark's training file."""

    benchmark: str  # a row of the evaluator that reads official files
    printed: int  # how many questions the paper counts, or the files are said to hold
    asks: str = "text"  # the form of the answers taken: text, id, number or choice
    fit: float = 0.0  # IoU that the best proposal must have with the target, where proposals come as a file
    most: int | None = None  # of more, a random draw
    kind: str = ""  # what the kind of a question must contain
    splits: tuple[str, ...] = ("train",)


@dataclass
class Stage:
    """The whole recipe of one training stage; a paper's table of stages is a list of these."""

    name: str
    tasks: dict[str, float]  # mix of questions, by names of TASKS or of the paper's own; {} asks none
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
    reasoning: bool = False  # write Sample.reasoning before the answer
    score: tuple[str, ...] = ()  # benchmarks to ask at its end, before the next stage changes the model
    files: dict[str, Source] = field(default_factory=dict)  # official files to ask instead


def collate(groups, text, lengths, reasoning=False):
    """Pack every scene's questions behind its scene tokens: one row per scene, scene tokens once, all questions.

    A question sees the scene and itself, never its neighbors (`packed_mask`), and its positions
    restart behind the scene, so a packed row gives every question exactly the logits it would have
    alone. Two questions on 2 scene tokens (S), answered "2" and "no" (- = IGNORE, . = <eos>):

        ids        S  S  how many chairs ?  2  is there a lamp ?  no
        labels     -  -  -   -    -      2  .  -  -     - -    no .
        positions  0  1  2   3    4      5  6  2  3     4 5    6  7
        block      0  0  1   1    1      1  1  2  2     2 2    2  2

    Args: groups, pairs of a scene and its questions, whose marks are already replaced; text, the
    tokenizer; lengths, scene tokens per scene; reasoning, write Sample.reasoning before the answer.
    Returns: ids [S, T] with SCENE and PROMPT placeholders, labels [S, T] (what position t must
    predict), positions [S, T], block [S, T] (-1 padding, 0 shared prefix, q >= 1 the question),
    prompts [P, 6], scenes, samples.
    """
    before, between, after = (text.encode(t) for t in text.template)
    padding = {"ids": text.pad, "labels": IGNORE, "positions": 0, "block": -1}
    rows = {name: [] for name in padding}
    prompts = []
    for (_, samples), K in zip(groups, lengths, strict=True):
        # what all questions share: all up to the end of the scene
        ids = [*before, *[SCENE] * K, *between]
        shared = len(ids)
        labels, positions, block = [IGNORE] * shared, list(range(shared)), [0] * shared

        for q, sample in enumerate(samples, start=1):
            question = [*text.encode(sample.question), *after]
            if sample.prompt is not None:  # a click leaves the box's size at zero
                question = [PROMPT, *question]
                prompts.append(np.pad(sample.prompt, (0, 6 - len(sample.prompt))))
            written = sample.answer
            if reasoning and sample.reasoning:
                written = f"{sample.reasoning} {written}"
            answer = [*text.encode(written), text.eos]

            # a position is labeled with the next token, so <eos> is never read and the question's
            # end predicts
            own = [*question, *answer[:-1]]
            ids += own
            labels += [IGNORE] * (len(question) - 1) + answer
            positions += range(shared, shared + len(own))
            block += [q] * len(own)
        for name, row in zip(rows, (ids, labels, positions, block), strict=True):
            rows[name].append(torch.tensor(row))

    # rows of one length
    batch = {name: pad_sequence(rows[name], True, padding[name]) for name in rows}
    batch["prompts"] = torch.tensor(np.array(prompts).reshape(-1, 6), dtype=torch.float32)
    batch["scenes"] = [scene for scene, _ in groups]
    batch["samples"] = [list(samples) for _, samples in groups]
    return batch


def packed_mask(block: Tensor) -> Tensor:
    """Say who may attend to whom in packed rows: [S, 1, T, T] bool, True = the second may be seen by the first.

    Every position sees the shared prefix and its own question, up to itself. For block = [0, 0, 1,
    1, 2, -1]:

        scene 0      x . . . . .
        scene 0      x x . . . .
        question 1   x x x . . .
        question 1   x x x x . .
        question 2   x x . . x .
        padding -1   x x . . . x      (itself too: an empty row of the softmax is 0 / 0)

    Args: block [S, T] as `collate` gives it.
    """
    place = torch.arange(block.shape[1], device=block.device)
    seen, own = block[:, None, :], block[:, :, None]  # [S, 1, T], [S, T, 1]
    past, itself = place <= place[:, None], place == place[:, None]  # [T, T]
    visible = ((seen == 0) | (seen == own)) & (seen >= 0) & past
    return (visible | itself)[:, None]


# ---- 6 the base model ----------------------------------------------------------------------------


def last_hidden(decoder, cache, **inputs):
    """Run a decoder of transformers over its inputs, behind a cache of keys and values or None: its last hidden state.

    The argument that takes the cache is called past_key_values up to transformers 5.39 and cache in later versions.
    """
    name = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
    return decoder(**inputs, **{name: cache}, use_cache=cache is not None).last_hidden_state


class SceneLanguageModel(nn.Module):
    """What the three papers share, and every hook that trainer and evaluator call, with its default in one place.

    A paper says what may train (`parts`) and what the language model sees of a scene (`encode`). This class freezes by
    stage, keeps frozen work on disk, puts scene tokens between words, sums the loss over answer tokens, and decodes
    greedily behind a prefix that all questions of a scene share.
    """

    scene_inputs = ()  # what a stage may show: its `scene_input` is one of these
    frozen_pretrained_names = ()  # weights that Config loads from elsewhere: no checkpoint holds them
    frame_width = 0  # pixels of the longer side that frames should be read with, 0 = as they are
    from_nothing = False  # its language model is not loaded: it starts from the `Reader`

    def __init__(self, config, text):
        super().__init__()
        self.config, self.text = config, text
        self.stage = None  # set by configure_stage
        self.feature_cache = {}  # frozen work in memory: scene -> what `compute_features` gave
        self.feature_folder = None  # and on disk
        self.names = torch.empty(0)  # first tokens of all names, sorted: what `naming` tells apart

    @property
    def device(self):
        return self.llm.device

    # -- what every paper gives

    def parts(self):
        """Map names to lists of modules and parameters that a stage may train: what `Stage.trains` chooses from."""
        raise NotImplementedError

    def scene_length(self, scene):
        """Say how many tokens the scene takes; called in loader processes, on the CPU."""
        raise NotImplementedError

    def encode(self, scenes):
        """Turn scenes into {"tokens" [S, K, D], "valid" [S, K] bool} and what else a paper keeps per token.

        An "auxiliary_loss" [S] may be among them; training adds it once per answer token of the scene.
        """
        raise NotImplementedError

    # -- what a paper may give

    def encoder_loss(self, scenes):
        """Loss of a stage without questions: {"loss", "weight", "correct"[, "count", "tokens"]} as in `forward`."""
        raise NotImplementedError

    def compute_features(self, scene):
        """Do all frozen work on one scene, from its unturned geometry: name -> tensor."""
        return {}

    def feature_settings(self):
        """List the settings that `compute_features` depends on."""
        return ()

    def feature_weights(self):
        """Give the module whose weights `compute_features` depends on."""
        return nn.Module()

    def object_to_text(self, scene, object_id):
        """Write the object that a mark "<obj 3>" stands for."""
        return f"<OBJ{scene.identifiers[object_id]:03d}>"

    def add_prompt(self, scene, sample, rng):
        """Give a question its click or box, where a paper has such prompts."""
        return sample

    def prompt_tokens(self, batch, seen):
        """Encode the prompts of a batch, in its order, [P, D]; seen is what `encode` gave."""
        return seen["tokens"][0, :0]

    def run_decoder(self, embeds, is_scene, positions, mask, cache=None):
        """Run the language model over embeds [R, N, D] behind its cache: last hidden state [R, N, D].

        is_scene [R, N] bool marks scene and prompt tokens, positions [R, N], mask [R, 1, N, T] bool, True = may attend.
        """
        return last_hidden(
            self.llm.model, cache, inputs_embeds=embeds, attention_mask=mask, position_ids=positions
        )

    def refusal(self, scene, question):
        """Say why a question about a scene of one's own cannot be answered, or None."""
        return None

    def proposals(self):
        """Map names of the paper's own object proposals to functions: scene -> scene with other objects."""
        return {}

    def baselines(self):
        """Map names of columns beside the score to context managers in which the model lacks something."""
        return {}

    def token_centers(self, scene):
        """Say where the scene's tokens are: [K, 3] meters, for pictures."""
        raise NotImplementedError

    def pictures(self, scenes, folder):
        """Draw scenes, whose objects are numbered, with their tokens; return the files."""
        paths = []
        for scene in scenes:
            paths.append(folder / f"{safe_name(scene.name)}.png")
            draw_scene(scene, paths[-1], tokens=self.token_centers(scene))
        return paths

    def answer_pictures(self, scene, samples, answers, folder):
        """Draw how the model came to its answers; return the files."""
        return []

    def start_from(self, reader):
        """Copy the weights of the language model that has read rooms in words (tiny presets), by name."""
        with torch.no_grad():
            for name, tensor in named_weights(self).items():
                if name in reader:
                    tensor.copy_(reader[name])

    # -- stages

    def configure_stage(self, stage):
        """Freeze everything but the parts that the stage trains, and remember what it shows."""
        parts = self.parts()
        if stage.scene_input not in self.scene_inputs or not set(stage.trains) <= set(parts):
            raise DataError(
                f"stage {stage.name}: scene_input is one of {self.scene_inputs}, trains of {tuple(parts)}"
            )
        self.stage = stage
        self.requires_grad_(False)
        for name in stage.trains:
            for part in parts[name]:
                part.requires_grad_(True)

    def keep_trained_precise(self, stages):
        """Turn whatever some stage trains into float32: steps of 5e-6 would vanish in bfloat16."""
        for stage in stages:
            self.configure_stage(stage)
            for p in self.parameters():
                if p.requires_grad:
                    p.data = p.data.float()

    def gradient_checkpointing_enable(self):
        """Recompute the language model's activations in the backward pass: less memory, more time."""
        # transformers renames the method in version 6
        enable = getattr(self.llm, "activation_checkpointing_enable", self.llm.gradient_checkpointing_enable)
        enable({"use_reentrant": False})

    # -- frozen work, once per scene

    def uses_features(self):
        """Whether the stage sees what `compute_features` gives."""
        return True

    def cache_key(self):
        """Hash the settings and weights that the features depend on."""
        digest = hashlib.sha256(repr(self.feature_settings()).encode())
        for name, value in self.feature_weights().named_parameters():
            digest.update(name.encode() + value.detach().float().cpu().clone().numpy().tobytes())
        return digest.hexdigest()[:16]

    def cache_features(self, scenes, folder=None, rank=0, world=1):
        """Do the frozen work of a rank's share of the scenes; the others' is then read from the folder.

        It also lists the tokens `names` that the loss on names tells apart.
        """
        from tqdm import tqdm

        # what may have to be named: nothing, things, identifiers
        known = {(o.category, o.color) for scene in scenes for o in scene.objects}
        known |= {(), *((f"<OBJ{i:03d}>",) for i in range(100))}
        self.names = torch.tensor([name_pair(self.text, *names) for names in known]).unique()

        if not self.uses_features():
            return
        self.feature_folder = None if folder is None else Path(folder) / self.cache_key()
        for scene in tqdm(scenes[rank::world], "features", disable=rank > 0, mininterval=2):
            self.load_features(scene)

    def load_features(self, scene):
        """Give a scene's features, name -> tensor, from memory, else from disk, else compute and keep them."""
        if scene.name in self.feature_cache:
            return self.feature_cache[scene.name]

        # a file belongs to what it was made of: another scene of the same name gets another file
        path = self.feature_folder
        if path:
            path = path / f"{safe_name(scene.name)}-{fingerprint(scene)}.safetensors"
        if not path or not path.exists():
            with torch.no_grad():
                found = {key: value.cpu().contiguous() for key, value in self.compute_features(scene).items()}
            if path:
                write_whole(path, lambda file: file.write(save(found)))

        # a mapped file takes memory where it is looked at: a loader process asks for lengths alone
        if path:
            with reading(path, "file of features, which is made anew once it is deleted"):
                found = load_file(path)
        self.feature_cache[scene.name] = found
        return found

    # -- questions

    def visible(self, scene):
        """List the objects (ids) that some token shows; the others are not asked about."""
        return {o.id for o in scene.objects}

    def write_marks(self, scene, sample):
        """Put the paper's own words for objects in place of the marks in a question's texts."""
        write = partial(self.object_to_text, scene)
        names = ("question", "reasoning", "answer")
        return replace(sample, **{name: substitute(getattr(sample, name), write) for name in names})

    def batch(self, groups):
        """Turn scenes with their questions into tensors (`collate`); runs in loader processes, on the CPU."""
        if not self.stage.tasks:
            return {"scenes": [scene for scene, _ in groups], "samples": []}
        written = []
        for scene, samples in groups:
            # random numbers of the scene's own, whatever the rank
            rng = np.random.default_rng([5, *scene.identifiers.values()])
            prompted = [self.add_prompt(scene, sample, rng) for sample in samples]
            written.append((scene, [self.write_marks(scene, sample) for sample in prompted]))
        lengths = [self.scene_length(scene) for scene, _ in groups]
        return collate(written, self.text, lengths, self.stage.reasoning)

    def forward_llm(self, ids, positions, mask, seen, prompts, cache=None):
        """Run the language model over ids [R, N], scene and prompt tokens in place of the placeholders: [R, N, D].

        R rows: scenes with all their questions in training, single questions or tokens in generation.
        """
        embeds = self.llm.get_input_embeddings()(ids.clamp(min=0))  # [R, N, D]
        scene_tokens = seen["tokens"][seen["valid"]].to(embeds)
        embeds = embeds.masked_scatter((ids == SCENE)[..., None], scene_tokens)
        embeds = embeds.masked_scatter((ids == PROMPT)[..., None], prompts.to(embeds))
        return self.run_decoder(embeds, ids < 0, positions, mask, cache)

    def inputs(self, batch):
        """Give ids, labels, positions and block of a batch on the model's device, all [S, T]."""
        return [batch[name].to(self.device) for name in ("ids", "labels", "positions", "block")]

    def forward(self, batch):
        """Sum the next-token loss over answer tokens, plus a paper's auxiliary loss once for each of them.

        Returns: {"loss", "weight" = answer tokens, "correct" = those predicted right, "tokens" = all that were read}.
        """
        if not self.stage.tasks:
            return self.encoder_loss(batch["scenes"])
        ids, labels, positions, block = self.inputs(batch)
        seen = self.encode(batch["scenes"])  # tokens [S, K, D]
        prompts = self.prompt_tokens(batch, seen)  # [P, D]
        hidden = self.forward_llm(ids, positions, packed_mask(block), seen, prompts)  # [S, T, D]

        # the vocabulary is large: only positions that carry a label go through the last layer. The batch says
        # which, since the device would have to be waited for
        answered = labels != IGNORE  # [S, T]
        index = (batch["labels"] != IGNORE).flatten().nonzero()[:, 0].to(self.device)  # [A]
        logits = self.llm.lm_head(hidden.flatten(0, 1)[index]).float()  # [A, vocabulary]
        target = labels.flatten()[index]  # [A]
        loss = F.cross_entropy(logits, target, reduction="sum")
        if "auxiliary_loss" in seen:
            loss = loss + (answered.sum(1) * seen["auxiliary_loss"]).sum()
        correct = (logits.argmax(-1) == target).sum()
        return {"loss": loss, "weight": answered.sum(), "correct": correct, "tokens": (block >= 0).sum()}

    def naming_loss(self, features, pairs, weight):
        """Loss of a stage without questions, as in `forward`: `naming` of features [R, D], weighted [R]."""
        words, names = self.llm.get_input_embeddings().weight, self.names.to(features.device)
        loss, right = naming(features, words, names, pairs)
        return {"loss": (loss * weight).sum(), "weight": weight.sum(), "correct": (right * weight).sum()}

    @torch.no_grad()
    def generate(self, batch, max_new_tokens=64):
        """Answer greedily, one text per question in the batch's order.

        A scene is read once: its keys and values are copied to a row per question, and every row writes a token at a
        time until its end token. Two questions of scene 0 and one of scene 1, P prefix positions, N of a question:

            prefix   s0 s0 s0 s0      rows 0 0 1      s0 s0 s0 s0 | how many chairs ?  .  -> "2" -> <eos>
                     s1 s1 .  .                       s0 s0 s0 s0 | is there a  lamp  ?  -> "yes" -> <eos>
                                                      s1 s1 .  .  | how tall is it    ?  -> ...
        """
        from transformers import DynamicCache

        ids, labels, positions, block = self.inputs(batch)
        seen = self.encode(batch["scenes"])
        prompts = self.prompt_tokens(batch, seen)
        nothing = prompts[:0]

        # the prefix of every scene, padded on the right
        P = int((block == 0).sum(1).max())
        shared = block[:, :P] == 0  # [S, P]
        cache = DynamicCache()
        prefix = ids[:, :P].where(shared, self.text.pad)
        self.forward_llm(prefix, positions[:, :P], packed_mask(shared.long() - 1), seen, nothing, cache)

        # a row per question: its positions up to the one that carries the first label
        row, asked, places = [], [], []
        for s in range(len(block)):
            for q in range(1, int(block[s].max()) + 1):
                own = (block[s] == q).nonzero()[:, 0]
                own = own[: (labels[s, own] == IGNORE).sum() + 1]
                row.append(s)
                asked.append(ids[s, own])
                places.append(positions[s, own])

        # padded on the left, so that all end in the last column
        question = pad_sequence(asked, True, self.text.pad, "left")  # [Q, N]
        place = pad_sequence(places, True, -1, "left")  # [Q, N]
        present = place >= 0
        N = question.shape[1]

        # read the questions behind copies of their scenes' prefixes
        row = torch.tensor(row, device=self.device)  # [Q]
        cache.batch_select_indices(row)
        valid = torch.cat([shared[row], present], 1)  # [Q, P + N]
        causal = torch.ones_like(valid[:1]).expand(N, -1).tril(P)  # [N, P + N]
        mask = (valid[:, None] & causal)[:, None]  # [Q, 1, N, P + N]
        hidden = self.forward_llm(question, place, mask, seen, prompts, cache)  # [Q, N, D]

        # one token a step; a row that has ended leaves the batch
        answers = [[] for _ in asked]  # tokens of every question
        rows = answers  # those that are still written
        for _ in range(max_new_tokens):
            token = self.llm.lm_head(hidden[:, -1]).argmax(-1)  # [rows]
            for answer, t in zip(rows, token.tolist(), strict=True):
                answer.append(t)
            alive = [i for i, answer in enumerate(rows) if answer[-1] != self.text.eos]
            if not alive:
                break
            rows = [rows[i] for i in alive]
            alive = torch.tensor(alive, device=self.device)
            cache.batch_select_indices(alive)
            token, place = token[alive, None], place[alive, -1:] + 1
            valid = F.pad(valid[alive], (0, 1), value=True)
            hidden = self.forward_llm(token, place, valid[:, None, None], seen, nothing, cache)
        return [self.text.decode(tokens) for tokens in answers]


def name_pair(text, *names):
    """Look up the first tokens of two names; one alone, or <unk>, stands for both."""
    tokens = [token for name in names for token in text.encode(name)[:1]] or [text.unk]
    return tokens[0], tokens[-1]


def naming(features, table, names, pairs):
    """Compare features with the words for what they show, a category and a color, among all names.

    Args: features [R, D]; table, word vectors of the language model; names [n], sorted tokens; pairs [R, 2] of them.
    Returns, of every feature [R]: the loss (classified among all names, and like the sum of its two words), and
    whether one of its words comes first.
    """
    z, words = F.normalize(features.float(), dim=-1), table.detach().float()
    logits = 25 * z @ F.normalize(words[names], dim=-1).T  # [R, n]; 25: a sharp softmax of cosines
    target = torch.searchsorted(names, pairs)  # [R, 2]
    classified = -logits.log_softmax(-1).gather(1, target).mean(1)  # [R]
    unlike = 1 - F.cosine_similarity(z, words[pairs].sum(1), dim=-1)  # [R]
    return classified + unlike, (logits.argmax(-1, keepdim=True) == target).any(1)


def overfit_demo(model, scene, samples, steps, lr):
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


def run_demo(demo):
    """Run a paper's demo as a command that takes no flags."""
    ask = 'a trained run is asked by: python evaluate.py --run RUN --scene PATH --ask "..."'
    argparse.ArgumentParser(description=demo.__doc__, epilog=ask).parse_args()
    demo()


# ---- 6b checkpoints ------------------------------------------------------------------------------


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name the tensors that a checkpoint holds: tied ones once, those loaded from elsewhere not at all."""
    first = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in model.frozen_pretrained_names:
            first.setdefault(id(tensor), (name, tensor))
    return dict(first.values())


def file_digest(path: Path) -> str:
    """Hash a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(run: Path) -> dict:
    """Read a checkpoint's state.json: {"position", "run" (its config.json), "processes", "sha256"}."""
    path = run / "checkpoint" / "state.json"
    if not path.exists():
        raise DataError(f"{path}: missing, so there is no trained model here; train one first")
    with reading(path, "state of a checkpoint"):
        state = json.loads(path.read_text())
        if not all(isinstance(state[part], dict) for part in ("position", "run", "sha256")):
            raise TypeError("position, run and sha256 are dictionaries")
    return state


def read_tensors(run: Path, kind: str) -> dict[str, Tensor]:
    """Read a checkpoint's tensors by their names; kind: "weights" or "optimizer". Raises DataError."""
    state = read_state(run)
    path = run / "checkpoint" / f"{kind}-{state['position']['total']:d}.safetensors"
    if not path.exists() or file_digest(path) != state["sha256"][kind]:
        raise DataError(f"{path}: missing, damaged, or of another step; copy the run again")
    return load_file(path)


def load_weights(model: nn.Module, run: Path):
    """Copy a run's weights into a model that is not sharded: names and shapes must agree, numbers be finite."""
    saved, own = read_tensors(run, "weights"), named_weights(model)

    # a weight that stayed as it was drawn would not show
    with torch.no_grad():
        for name in sorted(saved.keys() | own.keys()):
            there, here = (tuple(t[name].shape) if name in t else "missing" for t in (saved, own))
            if there != here:
                lacking = f"{name} is {there} there, {here} in this model"
                raise DataError(f"{run}/checkpoint: {lacking}; see {run}/config.json")
            if not saved[name].isfinite().all():
                raise DataError(f"{run}/checkpoint: {name} is not finite; train it again")
            own[name].copy_(saved[name])


def from_json(kind: type, values: dict):
    """Make a dataclass again of what `asdict` and JSON left of it: tuples became lists."""
    if strange := values.keys() - {f.name for f in fields(kind)}:
        raise DataError(
            f"{kind.__name__} has no {', '.join(strange)}: other code made this run; train it again"
        )
    whole = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return kind(**whole)


def stage_of(values: dict) -> Stage:
    """Make a stage again of its row in config.json."""
    files = {name: from_json(Source, row) for name, row in values["files"].items()}
    return from_json(Stage, {**values, "files": files})


# ---- T stand-in for pre-training: tiny preset only, skip on a first reading ----------------------
#
# A pre-trained model brings words, numbers and attention that finds things. The tiny preset makes them for
# itself: number tokens, first weights with which every head is "find the token like me", and a language model
# that has read rooms *in words* before it sees any. For the trainer this module is the paper of that model
# (Config, STAGES, recipe, build): it trains it once, keeps it in a folder, and starts all papers from it.

# Meters as tokens, one per 1/16 m and axis: a bracketed triple "[1.25, -0.80, 0.45]" is an x, a y
# and a z token (six numbers add w d h), "x1.25" names its axis, any other decimal is a length l.
# Outside its axis' range a number becomes the range's end.
NUMBERS = {  # meters
    "x": (-8, 8),
    "y": (-8, 8),
    "z": (-1, 4),
    "w": (0, 8),
    "d": (0, 8),
    "h": (0, 4),
    "l": (0, 16),
}
BINS = 16  # number tokens per meter: 6.25 cm
PLACE = re.compile(r"x#\d+ y#\d+ z#\d+(?: w#\d+ d#\d+ h#\d+)?")
NUMBER = re.compile(r"([xyzwdhl])#(\d+)")


def number_pieces(word):
    """Split a word of TinyText into number tokens: "[1.25, -0.80, 0.45]" -> "x#148", "y#115", "z#23"."""
    # which axes its numbers belong to; a length has no sign
    numbers = re.findall(r"-?\d+\.?\d*", word.lstrip("-"))
    if word[0] == "[":
        axes = "xyzwdh"
    elif "." in word and numbers:
        axes = word[0] if word[0] in NUMBERS else "l"
    else:
        return [word]

    # the nearest bin of the axis' range
    pieces = []
    for axis, number in zip(axes, numbers, strict=False):
        low, high = NUMBERS[axis]
        value = min(max(float(number), low), high)
        pieces.append(f"{axis}#{round((value - low) * BINS)}")
    return pieces


def join_numbers(text):
    """Invert `number_pieces` in a text: runs of x y z (w d h) become tuples, others keep their axis."""

    def write(found):
        axis, i = found.groups()
        return f"{axis}{NUMBERS[axis][0] + int(i) / BINS:.2f}".removeprefix("l")

    def write_tuple(run):
        numbers = [NUMBER.sub(write, piece)[1:] for piece in run[0].split()]
        return f"[{', '.join(numbers)}]"

    return NUMBER.sub(write, PLACE.sub(write_tuple, text))


METRIC.update(("subtract", "norm"))


@generator("subtract", "norm")
def drill(g, rng, task):
    """Ask for arithmetic, text only, on two random points inside the bounds, or those of the centers.

    subtract: "x1.25 x0.50 =" -> "0.75"; norm: the nine numbers of a distance's reasoning -> the length.
    """
    span = g.boxes[:, :3] if g.bounds is None else g.bounds
    if not len(span):
        return None
    low, high = span.min(0), span.max(0)
    a, b = (low + rng.random((2, 3)) * (high - low)).tolist()
    numbers, length = differences(a, b)

    # one axis of the three
    if task == "subtract":
        axis = 3 * int(rng.random() * 3)
        *pair, difference = numbers.split()[axis : axis + 3]
        numbers, length = " ".join(pair), float(difference)
    return dict(answer=meters(length), text={"numbers": numbers}, value=length)


def start_weights(part):
    """Draw every linear map and convolution from N(0, 1 / inputs), the scale for widths of hundreds; biases zero."""
    for module in part.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@torch.no_grad()
def start_decoder(decoder, heads):
    """Start a small decoder (Qwen2 or Llama layers, weights from `start_weights`) where pre-training would lead.

    With keys = queries and output = transposed values every head is "find the token like me and add
    it unchanged", but for two that look back, and the last norm keeps logits small.
    """
    # like finds like: the score of two tokens is the product of the same projection of both
    for layer in decoder.layers:
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
        layer.self_attn.o_proj.weight.copy_(layer.self_attn.v_proj.weight.T)
        look_back(layer.self_attn, heads)
    decoder.norm.weight.fill_(0.1)


def look_back(attention, heads):
    """Turn the first two heads into "the word before" and "the one before that".

    Constant queries and keys (biases) whose rotary angles agree at that distance, so that a
    question's end knows its last words.
    """
    size = attention.q_proj.out_features // heads
    theta = 1e6 ** (-torch.arange(4) * 2.0 / size)  # the four fastest rotary pairs
    strength = math.sqrt(2 * math.sqrt(size))

    # a query at angle 0 and a key at angle 1 or 2 meet where the rotation by their distance is the
    # same
    for head in range(2):
        rows = slice(head * size, (head + 1) * size)
        for projection, turn in ((attention.q_proj, 0.0), (attention.k_proj, head + 1.0)):
            projection.weight[rows] = 0
            projection.bias[rows][:4] = strength * (turn * theta).cos()
            projection.bias[rows][size // 2 : size // 2 + 4] = strength * (turn * theta).sin()

        # and what they find is heard above what the others add
        attention.v_proj.weight[rows] *= 1.5
        attention.o_proj.weight[:, rows] *= 1.5


def tiny_llm(vocabulary, reader):
    """Make a small Qwen2, of the class that `from_pretrained` loads; reader: width, layers, heads, width of the FFN."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    width, layers, heads, hidden = reader
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        pad_token_id=0,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        attn_implementation="sdpa",
    )
    llm = Qwen2ForCausalLM(config)
    start_weights(llm.model)
    start_decoder(llm.model, heads)
    nn.init.normal_(llm.get_input_embeddings().weight)
    return llm


READER = (128, 2, 4, 256)  # width, layers, heads, width of the FFN


@dataclass
class Config:
    """Size of the language model that reads rooms in words."""

    llm: str | None = None  # as in the papers' own; there is none to load
    reader: tuple[int, ...] = READER

    @classmethod
    def tiny(cls):
        return cls()


class Reader(SceneLanguageModel):
    """A small language model that reads rooms in words, and answers what the papers ask.

    A token is the sum of the words for category and color, brought to their size, and a linear map of where
    the thing is. The text points at things as two of the papers do: by a click, a token of the place before
    the question, or by the box in numbers, which the tokens then carry too. A paper's tokens will be a little
    strange to it (an identifier, a turn by height), so it learns to answer in spite of a shift and of noise.
    """

    scene_inputs = ("places", "boxes", "pieces")

    def __init__(self, config, text):
        super().__init__(config, text)
        self.llm = tiny_llm(len(text), config.reader)
        width = config.reader[0]
        self.code = nn.Linear(72, width, bias=False)

        # a number starts as what a token with this number carries: to read a place is then the same copy as to
        # read a name. A place is at first as large as a word, a size smaller
        maps = torch.randn(7, 12, width) / math.sqrt(6)  # of x y z w d h, and of lengths
        share = torch.tensor([3**-0.5] * 3 + [0.25] * 3)
        words = self.llm.get_input_embeddings().weight
        with torch.no_grad():
            self.code.weight.copy_((share[:, None, None] * maps[:6]).flatten(0, 1).T)
            for token, (axis, value) in text.number.items():
                vector = fourier_waves(torch.tensor([value])) @ maps["xyzwdhl".index(axis)]
                words[token] = vector + 0.3 * torch.randn(width)

            # a plural starts as its noun: few questions hold one
            for noun in text.words:
                many = text.index.get(plural(noun))
                if many is not None and len(noun) > 2:
                    words[many] = words[text.index[noun]] + 0.3 * torch.randn(width)

    def parts(self):
        return {"lm": [self.llm, self.code]}

    def clicks(self, scene):
        """Whether the text points at this scene's things by clicks: always, or every other time."""
        return self.stage.scene_input == "places" or sum(scene.identifiers.values()) % 2 == 0

    def shown(self, scene):
        """List what the tokens stand for: a thing, or None for a wall, and the box [6] that a token carries."""
        # neighbors next to each other: from a thing to the nearest that is left
        rng = np.random.default_rng(list(scene.identifiers.values()))
        order = several(rng, scene.objects, len(scene.objects))
        center = np.array([o.box[:3] for o in order])
        gap = np.abs(center[:, None] - center).sum(2)  # [n, n]
        line, last = [], -1
        for _ in order:
            line.append(order[last])
            gap[:, last] = np.inf
            last = gap[last].argmin()
        if self.stage.scene_input != "pieces":
            return [(o, o.box) for o in line]

        # a paper sees several tokens of a thing, somewhere inside it, and some of what is no thing
        pieces = []
        for o in line:
            for inside in rng.uniform(-0.4, 0.4, (rng.integers(1, 7), 3)):
                place = o.box[:3] + inside * o.box[3:] if self.clicks(scene) else o.box[:3]
                pieces.append((o, np.concatenate([place, o.box[3:]])))
        for _ in line:
            place = pieces[rng.integers(len(pieces))][1] + rng.normal(0, 1, 6)
            pieces.insert(rng.integers(len(pieces)), (None, place))
        return pieces

    def scene_length(self, scene):
        return len(self.shown(scene))

    def encode(self, scenes):
        table, tokens = self.llm.get_input_embeddings().weight, []
        for scene in scenes:
            # what things are called
            things, boxes = zip(*self.shown(scene), strict=True)
            names = [(o.category, o.color) if o else () for o in things]
            pairs = torch.tensor([name_pair(self.text, *pair) for pair in names], device=self.device)
            words = table[pairs].sum(1)  # [K, D]

            # where they are, and where boxes are written how large
            waves = fourier_waves(torch.from_numpy(np.stack(boxes)).to(self.device))  # [K, 72]
            if self.clicks(scene):
                waves[:, 36:] = 0
            token = F.layer_norm(words, words.shape[-1:]) + self.code(waves)

            # behind the first stage also what means nothing, as a paper's tokens carry much that is new to it
            if self.training and self.stage.scene_input != "places":
                rng = np.random.default_rng([6, *scene.identifiers.values()])
                shift, noise = rng.random(2) * [1.0, 0.5]
                strange = shift * rng.normal(size=token.shape[1]) + noise * rng.normal(size=token.shape)
                token = token + torch.from_numpy(strange).to(token)
            tokens.append(token)
        valid = [torch.ones_like(t[:, 0], dtype=torch.bool) for t in tokens]
        return {"tokens": pad_sequence(tokens, True), "valid": pad_sequence(valid, True)}

    def object_to_text(self, scene, object_id):
        return "this" if self.clicks(scene) else listed(scene.thing(object_id).box)

    def add_prompt(self, scene, sample, rng):
        marked = MARK.findall(sample.question)
        if not (marked and self.clicks(scene)):
            return sample
        return replace(sample, prompt=scene.thing(int(marked[0])).box)

    def prompt_tokens(self, batch, seen):
        return F.linear(fourier_waves(batch["prompts"][:, :3].to(self.device)), self.code.weight[:, :36])

    def batch(self, groups):
        """Leave out what cannot be asked with a click: boxes and things as answers, and two things at once."""
        kept = []
        for scene, samples in groups:
            if self.clicks(scene):
                samples = [
                    s
                    for s in samples
                    if s.box is None
                    and not MARK.search(s.answer + s.reasoning)
                    and len(set(MARK.findall(s.question))) < 2
                ]
            kept.append((scene, samples))
        return super().batch(kept)


# First "what is this?" with a click, which teaches to find; the rest builds on it. Then numbers, in the steps of
# distances and of MODLE's layouts (tasks of spatial3dllm.py); at last all of it, about things in pieces.
NAMES = {"id_category": 0.15, "id_color": 0.15}
WORDS_MIX = NAMES | {
    "caption": 0.08,
    "color": 0.08,
    "what": 0.1,
    "where": 0.05,
    "count": 0.07,
    "exist": 0.3,
    "situated": 0.02,
}
NUMBERS_MIX = {
    "subtract": 0.15,
    "norm": 0.03,
    "modle_add": 0.1,
    "modle_side": 0.05,
    "modle_stack": 0.02,
    "coordinate": 0.04,
    "modle_distance": 0.08,
    "modle_move": 0.08,
    "modle_place": 0.03,
    "ground": 0.1,
    "id_category": 0.06,
    "color": 0.04,
    "what": 0.08,
    "where": 0.03,
    "count": 0.05,
    "exist": 0.16,
}
PIECES_MIX = NUMBERS_MIX | WORDS_MIX | dict.fromkeys(NAMES, 0.1)
READ = dict(trains=("lm",), lr=2e-3, weight_decay=0.01, schedule="constant", reasoning=True)
STAGES = {
    "tiny": [
        Stage("words", WORDS_MIX, scene_input="places", iterations=800, **READ),
        Stage("numbers", NUMBERS_MIX, scene_input="boxes", iterations=500, **READ),
        Stage(
            "pieces",
            PIECES_MIX,
            scene_input="pieces",
            iterations=300,
            per_scene=32,
            **READ | {"schedule": "trapezoid"},
        ),
    ]
}


def recipe(config, stages):
    """Leave the stages as they are."""
    return stages


def build(config, text):
    """Make the language model of a configuration."""
    return Reader(config, text)


# ---- 7 scenes from disk --------------------------------------------------------------------------
#
# A damaged file becomes one line of text in `reading`, and every scene is checked once, in
# `check_scene`. Frames of all programs pass one reader, `read_views`: a row of LAYOUTS lists a
# program's files, and VGGT fills in what they lack.

VIDEOS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
CLOUDS = (".ply", ".glb", ".obj", ".stl")
SCAN_FILES = (
    "_vh_clean_2.ply",
    "_vh_clean_2.0.010000.segs.json",
    ".aggregation.json",
    ".txt",
)
VGGT = "facebook/VGGT-1B"
INSTALL = {  # optional package -> how to install it
    "av": 'pip install -e ".[video]"',
    "vggt": "pip install git+https://github.com/facebookresearch/vggt",
    "sam2": "SAM2_BUILD_CUDA=0 pip install --no-build-isolation sam2",
}
DEPTH_SCALES = "millimeters 1000, TUM RGB-D 5000, Replica of NICE-SLAM 6553.5, RealSense L515 4000"
UP = {sign + "xyz"[i]: float(f"{sign}1") * np.eye(3)[i] for i in range(3) for sign in "+-"}
CONVENTIONS = ("opencv", "opengl", "opencv_inverse", "opengl_inverse")  # of poses


@contextmanager
def reading(path, what):
    """Turn whatever a missing or damaged file raises, in any library, into a DataError of one
    line that names it."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: {what} missing; `python data.py check DIR` says what is needed") from None
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:90]
        raise DataError(f"{path}: not a whole {what} ({why}); copy or export it again") from None


def write_whole(path, write):
    """Let `write` fill a file, which becomes `path` when it is whole: nobody ever reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # of a write that failed


def read_json(path):
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
        raise DataError(f"{what} needs the package {package} ({error}): {INSTALL[package]}") from None


def choose(table, key, what):
    """Look up table[key]; an unknown key is a DataError that names the known ones."""
    if key not in table:
        raise DataError(f"{what} {key!r} is unknown: choose one of {', '.join(table)}")
    return table[key]


def file_key(files):
    """Name a state of files by their paths, sizes and times of change, without reading them."""
    return "|".join(f"{file.resolve()}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)


def check_scene(scene, trusted=False):
    """Check what a reader made, and note its size.

    Points and boxes are finite, every array is as long as the points, and, unless the unit is
    `trusted`, the scene is 0.5 to 30 meters large. Raises DataError.
    """
    arrays = (scene.points, scene.colors, scene.normals, scene.superpoints, scene.instances)
    lengths = {len(array) for array in arrays if array is not None}
    numbers = [scene.points, scene.normals, scene.bounds, *(o.box for o in scene.objects)]
    total = sum(array.sum() for array in numbers if array is not None)
    if len(lengths) > 1 or min(lengths) < 2 or not np.isfinite(total):
        raise DataError(
            f"{scene.name}: arrays of {lengths} points, or numbers that are not finite; export it again"
        )

    # a wrong unit shows in the size, which everybody can judge
    size = np.ptp(scene.points, axis=0)
    said = f"size {size[0]:.2f} x {size[1]:.2f} x {size[2]:.2f} m"
    if not scene.metric:
        said += ", guessed: questions in meters are refused; of a known length give --scale TRUE/GUESSED"
    elif not (trusted or 0.5 <= size.max() <= 30):
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
    files = [file for file in folder.glob(pattern) if file.suffix.lower() in IMAGES and file.name[0] != "."]
    return sorted(files, key=lambda file: (len(file.name), file.name))


def pinhole(fx, fy, cx, cy):
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], float)


def json_camera(held, focal="f"):
    return pinhole(held[f"{focal}x"], held[f"{focal}y"], held["cx"], held["cy"])


def rigid(position, turn):
    """Build a pose [4, 4] from a position and a quaternion (x, y, z, w) or an axis times its
    angle."""
    from scipy.spatial.transform import Rotation

    rotation = Rotation.from_quat(turn) if len(turn) == 4 else Rotation.from_rotvec(turn)
    pose = np.eye(4)
    pose[:3, :3] = rotation.as_matrix()
    pose[:3, 3] = position
    return pose


def stamp(file):
    """Read the second or the number that a name such as 1305031102.175304.png, ID_66.345.png or
    frame000012.jpg ends with."""
    return float(re.findall(r"\d+(?:\.\d+)?", file.stem)[-1])


def in_time(images, times, values):
    """Pick for each image the value of the nearest time, None beyond 0.02 seconds."""
    times, picked = np.fromiter(times, float), []
    for wanted in map(stamp, images):
        away = np.abs(times - wanted)
        picked.append(values[away.argmin()] if min(away, default=1) <= 0.02 else None)
    return picked


def timed_views(images, depths, rows, cameras):
    """Frames whose depth and pose are those nearest in time: each kind has a clock of its own.

    rows [N, 7 or 8] of a trajectory: time, position, and a turn as in `rigid`.
    """
    depths = in_time(images, map(stamp, depths), depths)
    poses = in_time(images, rows[:, 0], [rigid(row[1:4], row[4:]) for row in rows])
    return map(FrameFiles, images, depths, poses, cameras)


def named_views(images, depth, pose, mark):
    """Frames whose other files bear the name of their image, with one camera, best the depth's."""
    base = mark.parent
    cameras = [*base.glob("*intrinsic*.txt"), *base.glob("intrinsic/intrinsic*.txt")]
    camera = max(cameras, key=lambda file: "depth" in file.name, default=None)
    for image in pictures(mark if mark.is_dir() else base, images):
        name = image.stem.removesuffix(".color")
        mask = base / f"instance-filt/{name}.png"
        yield FrameFiles(image, base / depth.format(name), base / pose.format(name), camera, mask)


def above(mark, name):
    """Find what lies beside a file, or in the nearest folder above it."""
    return next(filter(Path.exists, (folder / name for folder in mark.parents)))


def replica(mark):
    """results/frame*.jpg and depth*.png; traj.txt has a pose of 16 numbers per line.

    cam_params.json lies beside it or above.
    """
    # one camera, and a pose for every number of a frame
    K = json_camera(read_json(above(mark, "cam_params.json"))["camera"])
    poses = dict(enumerate(read_numbers(mark, 16).reshape(-1, 4, 4)))
    for image in pictures(mark.parent / "results", "frame*"):
        depth = image.with_name(f"depth{image.stem[5:]}.png")
        yield FrameFiles(image, depth, poses.get(stamp(image)), K)


TUM_CAMERA = pinhole(525.0, 525.0, 319.5, 239.5)  # for all its sequences, since depth is registered


def tum(mark):
    """rgb/ and depth/ named by seconds; lines "second x y z qx qy qz qw"."""
    base, rows = mark.parent, read_numbers(mark, 8)
    cameras = itertools.repeat(TUM_CAMERA)
    return timed_views(pictures(base / "rgb"), pictures(base / "depth"), rows, cameras)


def arkitscenes(mark):
    """lowres_wide/, lowres_depth/, lowres_wide_intrinsics/ named ID_SECONDS; lines "second rx ry
    rz x y z"."""
    base, rows = mark.parent, read_numbers(mark, 7)
    images, depths = pictures(base / "lowres_wide"), pictures(base / "lowres_depth")

    # a file of intrinsics, named a millisecond off, holds width, height and the camera
    files = sorted((base / "lowres_wide_intrinsics").glob("*.pincam"))
    cameras = [pinhole(*read_numbers(file, 6)[0, 2:]) for file in files]
    cameras = in_time(images, map(stamp, files), cameras)
    return timed_views(images, depths, rows[:, [0, 4, 5, 6, 1, 2, 3]], cameras)


def stray_scanner(mark):
    """rgb.mp4 or rgb/NUMBER.png, depth/NUMBER.png; lines "second, number, x, y, z, qx, qy, qz,
    qw"."""
    base, rows = mark.parent, read_numbers(mark, 9)

    # names are the numbers of the second column
    images = pictures(base / "rgb") or [base / f"rgb.mp4/{number:.0f}" for number in rows[:, 1]]
    camera = itertools.repeat(base / "camera_matrix.csv")
    return timed_views(images, pictures(base / "depth"), rows[:, 1:], camera)


def polycam(mark):
    """keyframes/ with images/, depth/, cameras/; corrected_ ones, where there are any, have the
    better poses."""
    # poses that the app corrected after recording, else those of the recording
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
        image, depth = mark.parent / frame["file_path"], frame.get("depth_file_path")
        depth = depth and mark.parent / depth
        pose = np.array(frame["transform_matrix"], float)
        yield FrameFiles(image, depth, pose, json_camera(held | frame, "fl_"))


def colmap(mark):
    """cameras.txt and images.txt of a sparse model; export undistorted images, for lens
    distortion is not undone."""
    # a model of one focal length writes it once
    cameras = {}
    for id, model, _, _, *numbers in read_words(mark.with_name("cameras.txt")):
        if model == "SIMPLE_PINHOLE" or "RADIAL" in model:  # one focal length
            numbers.insert(0, numbers[0])
        cameras[id] = pinhole(*numbers[:4])

    # every second line is an image, which lies above the model
    images = above(mark, "images")
    for words in read_words(mark):
        if len(words) == 10:  # an image; the line behind it lists its points, three words each
            w, x, y, z, *position = map(float, words[1:8])
            pose = rigid(position, (x, y, z, w))
            yield FrameFiles(images / words[9], None, pose, cameras[words[8]])


def photographs(mark):
    return map(FrameFiles, pictures(mark.parent))


def video_views(path):
    """The frames of a video, by number."""
    with opened_video(path) as (container, stream):
        count = round(container.duration / 1e6 * stream.average_rate)
    return [FrameFiles(path / str(number)) for number in range(count)]


@dataclass
class Layout:
    """How a program lays out its frames, and what it documents about their numbers."""

    name: str
    marks: str  # patterns, blanks between, of the file or folder that tells it
    views: Callable  # what matched -> FrameFiles
    up: str = "auto"  # axis of the poses' world that points up
    convention: str = "opencv"
    depth_scale: float = 1000.0  # units of the depth images per meter
    metric: bool = True  # poses are in meters


LAYOUTS = (  # the first that fits is taken
    Layout("NAME.color.png, NAME.depth.png, NAME.pose.txt (7-Scenes)", "*.color.*",
           partial(named_views, "*.color.*", "{}.depth.png", "{}.pose.txt")),
    Layout("results/, traj.txt (Replica of NICE-SLAM)", "traj.txt", replica, "+z", depth_scale=6553.5),
    Layout("rgb/, depth/, groundtruth.txt (TUM RGB-D)", "groundtruth.txt", tum, "+z", depth_scale=5000.0),
    Layout("lowres_wide/ (ARKitScenes)", "lowres_wide.traj */lowres_wide.traj", arkitscenes,
           "+z", "opencv_inverse"),
    Layout("odometry.csv, depth/ (Stray Scanner)", "odometry.csv", stray_scanner, "+y"),
    Layout("keyframes/ (Polycam)", "keyframes", polycam, "+y", "opengl"),
    Layout("transforms.json (nerfstudio)", "transforms.json", nerfstudio,
           "+z", "opengl", metric=False),
    Layout("images/, sparse/ (COLMAP text)", "images.txt sparse/**/images.txt", colmap,
           convention="opencv_inverse", metric=False),
    Layout("color/, depth/, pose/, intrinsic/ (ScanNet)", "color rgb images",
           partial(named_views, "*", "depth/{}.png", "pose/{}.txt")),
    Layout("NAME.jpg, NAME.png, NAME.txt (EmbodiedScan)", "depth_intrinsic.txt intrinsic.txt",
           partial(named_views, "*.jpg", "{}.png", "{}.txt")),
    Layout("images alone", "*", photographs),
)  # fmt: skip
KNOWN_LAYOUTS = "; ".join(layout.name for layout in LAYOUTS)


def existing(part):
    """Return a part of FrameFiles, or None where its file is missing."""
    return part if not isinstance(part, Path) or part.exists() or part.parent.is_file() else None


def find_frames(folder):
    """Find the layout that fits a folder or a video, and its frames, with None for missing files.

    Returns (None, []) where there is no image.
    """
    if folder.is_file():
        return Layout("video", "", video_views), video_views(folder)
    for layout in LAYOUTS:
        for pattern in layout.marks.split():
            # the first file that only this program writes tells its layout
            for mark in sorted(folder.glob(pattern))[:1]:
                with reading(mark, layout.name):
                    views = [FrameFiles(*map(existing, view)) for view in layout.views(mark)]
                if any(view.image for view in views):
                    return layout, views
    return None, []


# ---- 7.2 frames


def read_image(path):
    with reading(path, "image"), Image.open(path) as image:
        return np.asarray(image)


def read_color(path, upright):
    """Read an image or a frame of a video as RGB, its rows as the camera wrote them.

    upright: turn it as its tag says; None where it is a depth or confidence map, which has 16 bits or
    few values.
    """
    if path.parent.is_file():
        return video_frame(path, upright)
    with reading(path, "image"), Image.open(path) as image:
        if upright:
            if image.mode[0] in "IF" or image.getcolors(8):
                return None
            image = ImageOps.exif_transpose(image)
        return np.asarray(image.convert("RGB"))


def read_depth(path, scale):
    """Read depth [H, W] in float32 meters; 0 = missing, as 65535 is in the file."""
    depth = read_image(path)
    if depth.ndim != 2 or depth.itemsize == 1:
        raise DataError(
            f"{path}: {depth.dtype} {depth.shape} is a picture of depth (8 bits end at 255); export 16 bits"
        )
    return np.where(depth == 65535, 0, depth).astype(np.float32) / scale


def read_pose(pose, convention):
    """Read a pose [4, 4] as camera to world with OpenCV's axes; None where it is not finite, or
    mirrored."""
    from scipy.spatial.transform import Rotation

    pose = read_numbers(pose, 4, 4) if isinstance(pose, Path) else pose.copy()
    if not (np.isfinite(pose).all() and np.linalg.det(pose) > 0):
        return None

    # files round their numbers: take the nearest rotation
    pose[:3, :3] = Rotation.from_matrix(pose[:3, :3]).as_matrix()

    if "inverse" in convention:
        pose = np.linalg.inv(pose)
    if "opengl" in convention:
        pose = pose @ np.diag([1, -1, -1, 1])
    return pose


def read_camera(camera, sizes):
    """Read a camera matrix [3, 3] for an image of size 1 x 1.

    Files do not say whether it is the color's or the depth's: of `sizes` (H, W) take the one
    whose middle is nearest to the principal point. Raises DataError where that is near none.
    """
    K = read_numbers(camera, 3, 3) if isinstance(camera, Path) else camera
    H, W = min(sizes, key=lambda size: np.abs(K[:2, 2] / size[::-1] - 0.5).max())
    scaled = np.diag([1 / W, 1 / H, 1]) @ K
    if np.abs(scaled[:2, 2] - 0.5).max() > 0.25 or np.diag(scaled).min() <= 0:
        what = f"intrinsics {K.tolist()} belong to no image of (H, W) = {sizes}"
        raise DataError(f"{what}; export those of these images ({camera})")
    return scaled


def shrink(size, longest):
    """Scale a size (H, W) so that its longer side is at most `longest`."""
    scale = min(1.0, longest / max(size))
    return tuple(max(1, round(side * scale)) for side in size)


def read_view(view, layout, longest, fine=False):
    """Read one frame, at the size of its depth or else of its image, at most `longest` pixels.

    fine: color keeps its own size. Returns color [H, W, 3] u8, depth [H, W] f32 meters, mask [H, W] i32,
    intrinsics [3, 3], pose [4, 4], with None for what no file holds; or, where the frame is of no use, the
    reason, a str.
    """
    depth, K, pose = None, None, None
    color = read_color(view.image, upright=all(part is None for part in view[1:]))
    if color is None:
        return "no image, but a depth or confidence map, or what is torn"
    sizes = [color.shape[:2]]

    # ScanNet has poses that are not finite, and depth that is empty
    if view.pose is not None:
        pose = read_pose(view.pose, layout.convention)
        if pose is None:
            return "a pose that is not finite, or mirrored"
    if view.depth:
        depth = read_depth(view.depth, layout.depth_scale)
        if not depth.any():
            return "no depth"

        # color of another shape shows another part of the room
        sizes.insert(0, depth.shape)
        tall, wide = np.divide(*sizes)
        if abs(tall / wide - 1) > 0.03:
            raise DataError(
                f"{view.depth}: depth and color have different shapes {sizes}; export depth registered to color"
            )

    # bring all to one size; the intrinsics follow
    H, W = shrink(sizes[0], longest)
    mask = np.zeros((H, W), np.int32)
    if view.mask:
        mask = resize(read_image(view.mask).astype(np.int32), (H, W))
    if depth is not None:
        depth = resize(depth, (H, W))
    if view.camera is not None:
        K = np.diag([W, H, 1]) @ read_camera(view.camera, sizes)
    color = resize(color, shrink(color.shape[:2], longest) if fine else (H, W))
    return color, depth, mask, K, pose


def read_frames(where, layout, views, max_frames, longest, fine=False):
    """Read at most `max_frames` views, evenly spaced: Frames, where what no file holds is None, and notes.

    Dropped and counted in the notes are frames that lack a file that others have, whose pose is not
    finite, or whose depth is empty. Raises DataError where none is left.
    """
    # a part of FrameFiles that some frames have, all that are read must have
    known = [part for part in range(5) if any(view[part] is not None for view in views)]
    longest = longest or (320 if known[3:4] == [3] else 640)  # VGGT sees what is lacking of the first four

    # evenly spaced ones, and why some of them are of no use
    chosen = np.linspace(0, len(views) - 1, min(max_frames, len(views))).round().astype(int)
    rows, lost = [], Counter()
    for i in chosen:
        view, row = views[i], "a missing file"
        if all(view[part] is not None for part in known):
            row = read_view(view, layout, longest, fine)
        if isinstance(row, str):
            lost[row] += 1
        else:
            rows.append(row)

    # say what was lost, and why
    notes = [f"dropped {n} of {len(views)} frames with {why}" for why, n in lost.items()]
    notes.append(f"{len(rows)} of {len(views)} frames used; layout {layout.name}")
    if len({row[0].shape for row in rows}) != 1:
        what = f"{'; '.join(notes)}: none is usable, or their sizes differ"
        raise DataError(f"{where}: {what}; export them again, as one of: {KNOWN_LAYOUTS}")
    columns = zip(*rows, strict=True)
    return Frames(*(None if c[0] is None else np.stack(c) for c in columns)), notes


def world_points(frames):
    """Give the point [V, H, W, 3] that every pixel of frames shows, by `unproject`."""
    return unproject(frames.depth, frames.intrinsics, frames.poses)


def agreement(frames):
    """Share of some frames' depth that others confirm to 10 cm, among what these do not
    see hidden."""
    # see some points of some frames from all other frames
    points = world_points(frames)
    some = range(0, len(points), 1 + len(points) // 8)
    beyond = [np.zeros(1)]  # meters from a point to the surface that another frame sees in its place
    for v, other in itertools.permutations(some, 2):
        seen = points[v][frames.depth[v] > 0][::16]
        beyond.append(in_view(seen, frames, other)[-1])

    # what is hidden there tells nothing
    beyond = np.concatenate(beyond)
    return np.mean(beyond[beyond >= -0.1] <= 0.1)


def read_views(path, scale=None, max_frames=32, longest=None, vggt=VGGT, **documented):
    """Read a video, images, or frames in one of LAYOUTS as a scene without objects.

    What no file holds of depth, poses and intrinsics VGGT finds. Its unit becomes meters by the
    known poses or depth; else it is guessed, and the scene not metric. scale: true meters per
    meter of that. longest: side of the frames in pixels, by default 320, or 640 for VGGT.
    documented: up (UP or "auto"), convention (CONVENTIONS), depth_scale, in place of those of the
    layout. Raises DataError.
    """
    path = Path(path)
    layout, views = find_frames(path)
    if not layout:
        raise DataError(f"{path}: holds no frames; known layouts: {KNOWN_LAYOUTS}")

    # what a user says holds before what the layout documents
    layout = replace(layout, **documented)
    frames, notes = read_frames(path, layout, views, max_frames, longest)
    known = {name: array for name, array in vars(frames).items() if array is not None}
    has_depth, has_pose = "depth" in known, "poses" in known

    # VGGT sees the rest in the images, in the unit of what is known; without any it is guessed
    if len(known) < len(vars(frames)):
        frames = replace(see(path, frames, vggt), **known)
    metric = has_depth or (has_pose and layout.metric)
    guess = 1.0 if metric else GUESS / np.median(frames.depth[frames.depth > 0])
    rescale(frames, guess * (scale or 1.0))

    # a wrong convention or scale makes frames contradict each other: 0.92 where all is right, else
    # below 0.5
    if (has_depth or has_pose) and agreement(frames) < 0.6:
        raise DataError(
            f"{path}, read as {layout.name}: less than 60% of the depth fits other frames; name the poses' "
            f"--convention ({', '.join(CONVENTIONS)}) or the --depth-scale ({DEPTH_SCALES})"
        )

    # the cloud is what the frames show, and both are turned upright
    name, source = path.resolve().stem, "rgbd" if has_depth and has_pose else "video"
    scene = Scene(name, source, [], frames=frames, notes=notes, **fuse(frames))
    align_to_gravity(scene, layout.up)
    scene.metric = metric or scale is not None
    return check_scene(scene, trusted=scale or "depth_scale" in documented)


def resize(image, size):
    """Resize to (H, W): colors [h, w, 3] are averaged over a pixel's area; of depth and ids [h,
    w] the nearest is taken."""
    method = Image.BOX if image.ndim == 3 else Image.NEAREST
    return np.asarray(Image.fromarray(image).resize(size[::-1], method))


# ---- 7.3 clouds


def unit(vectors):
    """Scale vectors [..., 3] to length 1, float32."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(length, 1e-9)).astype(np.float32)


def move(scene, world):
    """Move a scene's cloud by a rigid 4x4, in place, and find its bounds."""
    turn = world[:3, :3].T
    points = (scene.points @ turn + world[:3, 3]).astype(np.float32)
    scene.points, scene.normals = points, (scene.normals @ turn).astype(np.float32)
    scene.bounds = np.array([points.min(0), points.max(0)], float)


def voxel_of(points, voxel):
    """Number the occupied voxels from 0: the one of each of points [N, 3], int64 [N]."""
    cell = np.floor(points / voxel).astype(np.int64)
    cell -= cell.min(0)
    number = np.ravel_multi_index(cell.T, cell.max(0) + 1)
    return np.unique(number, return_inverse=True)[1]


def average(rows, group):
    """Average the rows [N, C] of every group 0..n-1 of [N] by `group_mean`: [n, C] float64."""
    mean, _ = group_mean(torch.from_numpy(rows).double(), torch.from_numpy(group), group.max() + 1)
    return mean.numpy()


def voxel_downsample(rows, voxel, limit):
    """Average rows [N, C], whose first columns are x, y, z, in the least voxels, from `voxel` meters
    up, that leave at most `limit`: rows [n, C]."""
    # coarser until it fits
    while (cell := voxel_of(rows[:, :3], voxel)).max() >= limit:
        voxel *= 1.2
    return average(rows, cell)


def fuse(frames):
    """Fuse frames to one cloud: points [N, 3] f32, colors [N, 3] u8, unit normals [N, 3] f32
    towards the cameras, one point in voxels of 2.5 cm, or of a pixel's footprint if larger; as keyword
    arguments of Scene."""
    points = world_points(frames)

    # normals from differences of the point map: NaN beside missing depth, grazing ones at the
    # edges of things
    across, down = np.gradient(points, axis=(1, 2))
    normals = unit(np.cross(across, down))
    ray = unit(frames.poses[:, None, None, :3, 3] - points)
    facing = (normals * ray).sum(-1, keepdims=True)
    normals *= np.sign(facing)
    seen = np.abs(facing[..., 0]) > 0.1
    rows = np.concatenate([points[seen], frames.color[seen], normals[seen]], axis=1)
    if not len(rows):
        raise DataError("no frame shows a surface; check the depth images and --depth-scale")

    # voxels with less than a fifth of a single view's samples are flying pixels
    footprint = np.median(frames.depth[frames.depth > 0]) / frames.intrinsics[0, 0, 0]
    voxel = max(0.025, float(footprint))
    cell = voxel_of(rows[:, :3], voxel)
    solid = np.bincount(cell)[cell] >= min(3.0, 0.2 * (voxel / footprint) ** 2)
    rows = voxel_downsample(rows[solid], voxel, 100_000)
    points, colors = rows[:, :3].astype(np.float32), rows[:, 3:6].round().astype(np.uint8)
    return dict(points=points, colors=colors, normals=unit(rows[:, 6:]))


def estimate_normals(points):
    """Estimate unit normals [N, 3] float32: the least axis of each point's 24 neighbors, facing
    the centroid."""
    # the axis along which neighbors differ least
    near = points[nearest(points, points, 24)[1]].astype(np.float32)
    near -= near.mean(1, keepdims=True)
    normals = np.linalg.eigh(near.swapaxes(1, 2) @ near)[1][..., 0]

    # walls and tops face the middle of a room
    inward = (normals * (points.mean(0) - points)).sum(1, keepdims=True) >= 0
    return np.where(inward, normals, -normals)


def load_mesh(path):
    """Load a cloud or mesh: points [N, 3] f64, colors [N, 3] u8, normals [N, 3] as a .ply has them,
    faces [F, 3]; None for what it lacks."""
    import trimesh

    with reading(path, "cloud or mesh"):
        mesh = trimesh.load(path, process=False, fix_texture=False)
        if isinstance(mesh, trimesh.Scene):  # a .glb of several parts
            mesh = mesh.to_mesh()
        points, colors, normals, faces = np.asarray(mesh.vertices, float), None, None, None

        # pictures on faces become a color per corner
        visual = mesh.visual
        if visual.kind == "texture":
            visual = visual.to_color()
        if visual.kind and len(visual.vertex_colors):
            colors = visual.vertex_colors[:, :3]
        if isinstance(mesh, trimesh.Trimesh):
            faces = np.asarray(mesh.faces)
            points[faces]  # a face of a vertex that is not there ends here

        # trimesh keeps no normals of bare points, and no colors beside texture coordinates
        if "_ply_raw" in mesh.metadata:
            held = mesh.metadata["_ply_raw"]["vertex"]
            points[held["length"] - 1]  # a text that is cut off ends here
            names, columns = held["properties"], held["data"]
            if "nx" in names:
                normals = np.column_stack([columns[name] for name in ("nx", "ny", "nz")])
            if "red" in names:
                shown = np.column_stack([columns[name] for name in ("red", "green", "blue")])
                colors = trimesh.visual.to_rgba(shown)[:, :3]
    return points, colors, normals, faces


def write_ply(path, points, colors, normals):
    """Write a cloud as a binary .ply: points and normals [N, 3] in float32, colors [N, 3] uint8."""
    import trimesh

    cloud = trimesh.Trimesh(points, vertex_normals=normals, vertex_colors=colors, process=False)
    cloud.export(path, vertex_normal=True)


def read_cloud(path, up="auto", scale=None):
    """Read a cloud or mesh (CLOUDS) as a scene without objects or frames, at most 200,000 points,
    averaged in voxels, around the origin.

    `up`: UP or "auto"; `scale`: meters per unit. Raises DataError.
    """
    import trimesh

    path = Path(path)
    points, colors, _, faces = load_mesh(path)
    points = points * (scale or 1.0)
    shown = np.zeros_like(points) if colors is None else colors

    # the corners of large faces do not show a wall: faces give a point in 3 x 3 cm
    if faces is not None:
        mesh = trimesh.Trimesh(points, faces, process=False)
        count = int(min(200_000, mesh.area / 0.03**2))
        drawn, face = trimesh.sample.sample_surface(mesh, count, seed=0)
        points = np.concatenate([points, drawn])
        shown = np.concatenate([shown, shown[faces[face]].mean(1)])

    # around the origin, where float32 is fine enough, without what is not finite or floats far away
    low, high = np.nanpercentile(points, (1, 99), axis=0)
    points = points - (low + high) / 2
    near = (np.abs(points) <= 10 * (high - low).max()).all(1)

    # what lies twice at a place is one point
    rows = voxel_downsample(np.concatenate([points, shown], axis=1)[near], 0.005, 200_000)
    points = rows[:, :3]
    scene = Scene(path.stem, "ply", [], points=points, normals=estimate_normals(points))
    if not near.all():
        scene.notes.append(f"dropped {(~near).sum()} points that are not finite or far from all others")
    align_to_gravity(scene, up)
    if colors is not None:
        scene.colors = rows[:, 3:].round().astype(np.uint8)
    return check_scene(scene, trusted=scale)


# ---- 7.4 gravity


def up_of_cameras(normals, poses):
    """Find gravity's up [3] from cameras [V, 4, 4] and the surfaces they see, whose normals face
    them."""
    up, right = -poses[:, :3, 1].mean(0), poses[:, :3, 0].mean(0)

    # a phone held upright writes frames turned by a quarter; floor and tops, seen from above,
    # tell which side is up
    if np.linalg.norm(right) > 1.25 * np.linalg.norm(up):
        tilt = normals @ unit(right)
        up = right * np.sign(tilt[np.abs(tilt) > 0.8].sum())

    # towards the surfaces that face up, however steeply the cameras look down: no wall in front
    # of a camera does
    up = unit(up)
    for degrees in (75, 30, 15, 8, 4, 2):
        level = normals[normals @ up > np.cos(np.radians(degrees))]
        if len(level) >= 100:
            up = unit(level.mean(0))
    return up


def up_of_cloud(points, normals):
    """Find the axis [3] of a cloud that points up: most level surfaces lie low along it."""
    # how many surfaces across an axis lie below the middle
    low, high = np.percentile(points, (1, 99), axis=0)
    below = np.sign((low + high) / 2 - points)
    weight = (below * (np.abs(normals) > 0.9)).mean(0)

    # rooms are 2 to 3.5 meters high, and clouds are z-up by custom
    size = np.maximum(high - low, 1e-6)
    weight *= np.minimum(size / 2, 3.5 / size).clip(max=1)
    weight[2] = 2.5 * max(weight[2], 0.02)
    return max(UP.values(), key=lambda axis: axis @ weight)


def align_to_gravity(scene, up):
    """Turn a scene z-up, walls along x and y, floor at z = 0, in place, and note how.

    `up`: an axis that a user or a layout names, or "auto".
    """
    from scipy.spatial.transform import Rotation

    # what the data say; a user or a layout is believed, but told
    points, normals, frames = scene.points, scene.normals, scene.frames
    found = up_of_cameras(normals, frames.poses) if frames else up_of_cloud(points, normals)
    axis = max(UP, key=lambda name: UP[name] @ found)
    direction, said = found, f"what is level and lies low, near {axis}"
    if up != "auto":
        direction, said = UP[up], f"up = {up}"
    if direction @ found < 0.8:
        said += f"; if it lies on its side, --up={axis} fits better"
    turn = Rotation.align_vectors([[0, 0, 1]], [direction])[0]

    # walls agree modulo a quarter turn, so as complex numbers their fourth powers do
    wall = turn.apply(normals)
    quarter = (wall[:, 0] + 1j * wall[:, 1])[np.abs(wall[:, 2]) < 0.2] ** 4
    if len(quarter):
        askew = np.angle(quarter.mean())
        askew += np.median(np.angle(quarter * np.exp(-1j * askew)))  # whatever stands askew
        turn = Rotation.from_euler("z", -askew / 4) * turn

    # the floor is the lowest level surface that is no crumb
    world = rigid(0, turn.as_quat())
    z = points @ world[2, :3]
    level = z[np.abs(wall[:, 2]) > 0.9]
    if len(level):
        z = level
    world[2, 3] = -np.median(z[np.abs(z - np.percentile(z, 3)) < 0.08])

    # the cameras turn along
    move(scene, world)
    if frames:
        frames.poses = world @ frames.poses
    scene.notes.append(f"turned z-up by {said}")


# ---- 7.5 ScanNet


def scan_files(folder):
    """Name the files of a ScanNet scan: mesh, segments, groups of segments, description."""
    return [folder / f"{folder.name}{suffix}" for suffix in SCAN_FILES]


def is_scan(path):
    return scan_files(path)[0].exists()


def find_scans(root):
    """Find the folders of all scans below a ScanNet root, whole or not."""
    return sorted([*root.glob("scene*_*/"), *root.glob("scans*/scene*_*/")])


def read_scannet(folder, max_frames=32, longest=math.inf, geometry="files", vggt=None):
    """Read a ScanNet scan: its own files and, when they are looked at, `max_frames` of the frames
    exported beside them or to posed_images/<id> of the root, at most `longest` pixels.

    The axis alignment is the only transform. Instance = objectId + 1; wall, floor and ceiling are
    no objects; boxes are the extent of an object's points. Masks are read from instance-filt/ or
    else rendered. geometry: "vggt" takes depth and cameras from VGGT, whose weights `vggt` names
    (`see`). Raises DataError.
    """
    folder = Path(folder).absolute()
    mesh, segs, aggregation, info = scan_files(folder)
    points, colors, normals, faces = load_mesh(mesh)
    with reading(info, "scan description with an axisAlignment of 16 numbers"):
        # scans for testing have none
        aligned = re.search("axisAlignment = (.+)", info.read_text())
        world = np.array(aligned[1].split(), float).reshape(4, 4) if aligned else np.eye(4)
    if normals is None:
        normals = unit(vertex_normals(points, faces))
    scene = Scene(folder.name, "scannet", [], points=points, colors=colors, normals=normals)
    move(scene, world)

    # objects are groups of segments; scans of the test split have neither
    scene.instances = np.zeros(len(points), np.int64)
    if segs.exists() or aggregation.exists():
        add_objects(scene, segs, aggregation)
    else:
        scene.notes.append("a test scan without labels: superpoints are our own, objects unknown")
        scene.superpoints = over_segment(points, normals, faces)

    # a thousand scans do not fit in memory, so frames stay on disk
    vggt = vggt or (VGGT if geometry == "vggt" else None)
    for place in (folder, *(root / "posed_images" / folder.name for root in folder.parents[:2])):
        layout, views = find_frames(place)
        if max_frames and any(view.depth and view.pose is not None for view in views):
            load = partial(scan_frames, scene, world, layout, views, max_frames, longest, vggt)
            files = [file for view in views for file in view if isinstance(file, Path)]
            key = f"{file_key([mesh, *files])} {max_frames} {longest} {vggt}"
            scene.frames = LazyFrames(load, key)
            break
    return check_scene(scene, trusted=True)


def add_objects(scene, segs, aggregation):
    """Give a scan its superpoints, objects and instances."""
    with reading(segs, "list of segIndices"):
        segments = np.array(read_json(segs)["segIndices"], np.int64)

    # superpoints are the segments, numbered from 0
    values, scene.superpoints = np.unique(segments, return_inverse=True)
    seen = []
    with reading(aggregation, "list of segGroups with objectId, label, segments"):
        for group in read_json(aggregation)["segGroups"]:
            id, label = group["objectId"] + 1, group["label"].replace("_", " ")
            parts = set(group["segments"])
            if label in STRUCTURE or parts in seen:  # scene0217_00 lists its objects twice
                continue
            seen.append(parts)
            mine = np.isin(values, list(parts))[scene.superpoints]
            if not mine.any() or len(mine) != len(scene.points):
                what = f"{label} (objectId {id - 1}) and the mesh do not fit"
                raise DataError(f"{aggregation}: {what}; copy one scan's files")
            scene.instances[mine] = id

            # two keys are of write_scannet: boxes and colors that points can only approach
            box = np.array(group.get("alignedBox", extent(scene.points[mine])), float).reshape(6)
            color = str(group.get("color") or color_name(scene.colors, mine))
            scene.objects.append(Thing(id, label, color, box))


def scan_frames(scene, world, layout, views, max_frames, longest, vggt):
    """Read a scan's frames in the aligned axes, with masks of its objects."""
    if vggt:
        views = [view._replace(depth=None, camera=None) for view in views]
    frames, notes = read_frames(scene.name, layout, views, max_frames, longest, fine=True)
    scene.notes += [note for note in notes if note not in scene.notes]

    # of what VGGT sees as fine as the color, every n-th pixel is kept: 640 at most
    if vggt:
        frames = see(scene.name, frames, vggt)
        n = math.ceil(max(frames.depth.shape[1:]) / 640)
        pixels = np.s_[:, n // 2 :: n, n // 2 :: n]
        frames.depth, frames.masks = frames.depth[pixels], frames.masks[pixels]
        frames.intrinsics = np.diag([1 / n, 1 / n, 1]) @ frames.intrinsics

    # masks from files, or of the points that a frame sees
    frames.poses = world @ frames.poses
    if not any(view.mask for view in views):
        frames.masks = render_masks(scene.points, scene.instances, frames)
    frames.masks[~np.isin(frames.masks, [o.id for o in scene.objects])] = 0
    return frames


def write_scannet(scene, out):
    """Write a room as the ScanNet scan <out>/<name>; read_scannet gives it back.

    Depth is rounded to 1 mm. Color is written as PNG, so that nothing is lost; two extra keys per
    object (alignedBox, color) hold what ScanNet has no place for.
    """
    folder, frames = Path(out) / scene.name, scene.frames
    depth, masks = (frames.depth * 1000).round().astype(np.uint16), frames.masks.astype(np.uint16)
    images = {"color": frames.color, "depth": depth, "instance-filt": masks}
    for part in (*images, "pose", "intrinsic"):
        (folder / part).mkdir(parents=True, exist_ok=True)

    # points, and no axisAlignment: a room stands along the axes
    mesh, segs, aggregation, info = scan_files(folder)
    write_ply(mesh, scene.points, scene.colors, scene.normals)
    info.write_text("sceneType = room\n")

    # an object is a group of segments, none of which holds points of two
    segs.write_text(json.dumps({"segIndices": scene.superpoints.tolist()}))
    groups = []
    for o in scene.objects:
        group = dict(objectId=o.id - 1, label=o.category, color=o.color, alignedBox=o.box.tolist())
        group["segments"] = np.unique(scene.superpoints[scene.instances == o.id]).tolist()
        groups.append(group)
    aggregation.write_text(json.dumps({"segGroups": groups}))

    # a file of every kind per frame
    np.savetxt(folder / "intrinsic/intrinsic_depth.txt", frames.intrinsics[0])
    for i, pose in enumerate(frames.poses):
        np.savetxt(folder / f"pose/{i}.txt", pose)
        for part, pixels in images.items():
            Image.fromarray(pixels[i]).save(folder / part / f"{i}.png")
    return folder


# ---- 8 video -------------------------------------------------------------------------------------

GUESS = 2.0  # meters: the median depth of frames whose scale nobody knows


@contextmanager
def opened_video(path):
    """Open a video: its container, and the stream of its pictures that is no cover."""
    av = need("av", "reading a video")
    with reading(path, "video"), av.open(str(path), metadata_errors="replace") as container:
        yield container, container.streams.best("video")


def video_frame(path, upright):
    """Decode frame VIDEO/NUMBER, [H, W, 3] uint8, with the rows as the camera wrote them or
    upright; None where a recording broke off."""
    with opened_video(path.parent) as (container, stream):
        import av

        start = (stream.start_time or 0) * stream.time_base
        second = start + (int(path.name) - 0.5) / stream.average_rate

        # from the key frame before it to the first frame that is not earlier
        container.seek(max(0, int(second / stream.time_base)), stream=stream)
        with suppress(av.FFmpegError):
            for frame in container.decode(stream):
                if frame.time is not None and frame.time >= second:
                    turn = round(frame.rotation / 90) if upright else 0
                    return np.rot90(frame.to_ndarray(format="rgb24"), turn)
    return None


@lru_cache(maxsize=1)
def load_vggt(name):
    """Load VGGT (Wang et al., CVPR 2025) by its hub name or a folder of its weights, on a GPU
    where there is one."""
    vggt = need("vggt.models.vggt", "depth and cameras from bare frames")
    with reading(f"--vggt {name}", f"VGGT, whose weights are on the hub as {VGGT}"):
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
    from vggt.utils.pose_enc import pose_encoding_to_extri_intri

    # whole patches, as VGGT was trained on
    V, H, W, _ = images.shape
    patch, device = model.aggregator.patch_size, next(model.parameters()).device
    h, w = (max(1, round(n * longest / max(H, W) / patch)) * patch for n in (H, W))
    x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255  # [V, 3, H, W]
    x = F.interpolate(x, (h, w), mode="bicubic", antialias=True).clamp(0, 1)[None]  # [1, V, 3, h, w]

    # one pass of the transformer, two heads
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        tokens, first = model.aggregator(x)
    code = model.camera_head(tokens)[-1]  # [1, V, 9]

    # depth [1, V, h, w, 1] and confidence [1, V, h, w]; cameras [1, V, 3, 4] and [1, V, 3, 3]
    maps = model.depth_head(tokens, images=x, patch_start_idx=first)
    cameras = pose_encoding_to_extri_intri(code, (h, w))
    camera, K = (c[0].double().cpu().numpy() for c in cameras)

    # arrays of the images' size
    maps = torch.stack([m.reshape(V, h, w).float() for m in maps])
    depth, confidence = F.interpolate(maps, (H, W)).cpu().numpy()
    K = np.diag([W / w, H / h, 1]) @ K
    poses = np.tile(np.eye(4), (V, 1, 1))
    poses[:, :3] = camera  # world to camera
    return depth, confidence, K, np.linalg.inv(poses)


def rescale(frames, unit):
    """Multiply depth and camera positions by `unit`, in place."""
    frames.depth *= unit
    frames.poses[:, :3, 3] *= unit


def see(where, frames, vggt):
    """See depth, intrinsics and poses in the color of frames by VGGT, in the unit of what they hold of these.

    The unit is the median ratio of known to found depth; else what is found is moved as one body to
    known poses (`register`), so that a scan's boxes still hold. A fifth of the found depth, the least
    certain, is dropped. Raises DataError without VGGT.
    """
    try:
        # what the images show, in a unit of their own
        depth, confidence, K, poses = vggt_geometry(frames.color, load_vggt(vggt))
    except DataError as error:
        lacking = [name for name, array in vars(frames).items() if array is None]
        raise DataError(f"{where}: has no {', '.join(lacking)}; {error}") from None
    sure = (depth > 0) & (confidence >= np.quantile(confidence, 0.2))
    seen = replace(frames, depth=np.where(sure, depth, 0), intrinsics=K, poses=poses)

    # its own unit becomes that of what is known
    if frames.depth is not None:
        both = sure & (frames.depth > 0)
        rescale(seen, np.median(frames.depth[both] / depth[both]))
    elif frames.poses is not None:
        register(seen, frames.poses)
    return seen


def register(frames, poses):
    """Scale, turn and shift frames as one body, in place, to where their cameras fit known poses best."""
    from scipy.spatial.transform import Rotation

    # other axes, but the same distances
    at = np.stack([poses, frames.poses])[:, :, :3, 3]  # [2, V, 3]
    true, found = np.linalg.norm(at.std(1), axis=1)
    rescale(frames, true / max(found, 1e-9))

    # every camera says how to turn; then middle comes to lie on middle
    turns = poses @ np.linalg.inv(frames.poses)
    world = rigid(0, Rotation.from_matrix(turns[:, :3, :3]).mean().as_quat())
    world[:3, 3] = (poses - world @ frames.poses)[:, :3, 3].mean(0)
    frames.poses = world @ frames.poses


# ---- 9 superpoints and segments ------------------------------------------------------------------


def vertex_normals(points, faces):
    """Average the unit normals of a vertex's faces: [N, 3] float32, *not* normalized, as in ScanNet's
    segmentator.

    Args: points [N, 3], faces [F, 3].
    """
    import trimesh

    mesh = trimesh.Trimesh(points, faces, process=False)
    mean = mesh.faces_sparse @ mesh.face_normals / np.maximum(mesh.vertex_degree, 1)[:, None]
    return mean.astype(np.float32)


def neighbor_pairs(points, k, reach=np.inf):
    """Find all pairs a < b of points where one is among the other's k nearest: (a [E], b [E]).

    Pairs farther apart than `reach` times the median distance to the nearest neighbor are left out: they
    are gaps.
    """
    distance, near = (a[:, 1:] for a in nearest(points, points, k + 1))  # the nearest is the point itself
    close = distance <= reach * (np.median(distance[:, 0]) + 1e-9)
    pairs = np.column_stack([np.nonzero(close)[0], near[close]])
    return tuple(np.unique(np.sort(pairs, axis=1), axis=0).T)


def over_segment(points, normals=None, faces=None):
    """Segment a cloud or mesh into superpoints: labels [N] int64, contiguous from 0.

    The weight of an edge from a to b is 1 - n_a . n_b, squared where the surface is convex (n_b
    points along b - a), so that round things hold together. The edges are a mesh's, whose normals are
    `vertex_normals`, or join the 10 nearest neighbors of a bare cloud, there with the mean weight of
    both directions.
    Args: points [N, 3]; normals [N, 3] of a bare cloud; faces [F, 3] of a mesh.
    Source: Felzenszwalb & Huttenlocher, IJCV 2004, with the rules of ScanNet's Segmentator.
    """

    # edges, and how much the surface bends along them
    def weigh(a, b):
        bend = 1 - (normals[a] * normals[b]).sum(1)
        convex = (normals[b] * (points[b] - points[a])).sum(1) > 0
        return np.where(convex, bend * bend, bend)

    if faces is None:
        a, b = neighbor_pairs(points, 10)
        weight = (weigh(a, b) + weigh(b, a)) / 2
    else:
        normals = vertex_normals(points, faces)
        a, b = faces[:, [0, 1, 0, 2, 2, 1]].reshape(-1, 2).T
        weight = weigh(a, b)

    # a segment is a tree of points, known by its root; ScanNet's kThresh is 0.01, its segMinVerts 20
    N, threshold, min_size = len(points), 0.01, 20
    parent, size, limit = list(range(N)), [1] * N, [threshold] * N

    def find(x):
        while parent[x] != x:
            parent[x] = x = parent[parent[x]]
        return x

    # lightest edges first; two segments join if the edge is no heavier than either's limit: its
    # heaviest inner edge + threshold / size. Then what stayed too small joins its most similar neighbor
    order = np.argsort(weight, kind="stable")
    edges = [column[order].tolist() for column in (a, b, weight)]
    for crumbs in (False, True):
        for x, y, w in zip(*edges, strict=True):
            x, y = find(x), find(y)
            fits = min(size[x], size[y]) < min_size if crumbs else w <= min(limit[x], limit[y])
            if x != y and fits:
                parent[y] = x
                size[x] += size[y]
                limit[x] = w + threshold / size[x]
    return np.unique([find(x) for x in range(N)], return_inverse=True)[1]


def extent(points, trim=0.0):
    """Return the axis-aligned box [6] of points [N, 3], without those that are NaN.

    The share `trim` of them at every side is left out. The box's sides are 1 mm or more: what is flat
    would have a side of 0, which has no logarithm in a loss.
    """
    low, high = np.nanquantile(points, (trim, 1 - trim), axis=0)
    return np.concatenate([(low + high) / 2, np.maximum(high - low, 0.001)])


def color_name(colors, chosen):
    """Name the median of colors [N, 3] at `chosen` by the nearest of COLORS; "" without colors."""
    if colors is None:
        return ""
    median = np.median(colors[chosen], axis=0)
    return min(COLORS, key=lambda name: np.square(median - COLORS[name]).sum())


def opponent_colors(colors):
    """Turn colors [N, 3] u8 into brightness, which counts less than hue, and two axes of hue: [N, 3]
    float32."""
    r, g, b = colors.T.astype(np.float32) / 255
    return np.stack([(r + g + b) / 6, 0.7 * (r - g), 0.7 * ((r + g) / 2 - b)], axis=1)


def find_shell(points, normals, colors, superpoints):
    """Find the room itself (floor, ceiling, walls): mask [N].

    Args: points, normals [N, 3]; colors [N, 3], `opponent_colors`; superpoints [N].
    """
    shell, thickness = np.zeros(len(points), bool), 0.05
    for s in np.flatnonzero(np.bincount(superpoints) >= 0.01 * len(points)):
        # a large level or upright plane
        inside = superpoints == s
        normal = normals[inside].mean(0)
        flatness = np.linalg.norm(normal)
        normal = normal / flatness
        if flatness < 0.9 or 0.3 < abs(normal[2]) < 0.9:
            continue

        # with next to nothing behind it: a table top has legs and a floor
        height = (points - np.median(points[inside], axis=0)) @ normal
        if (height < -2 * thickness).mean() > 0.03:
            continue

        # all that lies in the plane, in the plane's own color: a rug or a door stays an object
        plane = (np.abs(height) < thickness) & (normals @ normal > 0.8)
        differ = np.linalg.norm(colors - np.median(colors[plane], axis=0), axis=1)
        shell |= plane & (differ < max(0.1, 2.5 * np.median(differ[plane])))
    return shell


def object_segments(points, normals, colors, superpoints):
    """Merge superpoints to object-sized segments: ids [N] int64, 0 = the room itself and crumbs.

    Nothing is learned. Touching pieces join in order of their cost, color difference / 0.2 + the
    share of the contact that is concave (objects meet in concave edges: Stein et al., CVPR 2014), up
    to a cost of 1 and a length of 2.6 meters; what stays below 12 cm is a crumb. The constants were
    set on procedural rooms.
    Args: points, normals [N, 3] meters, z up; colors [N, 3] u8; superpoints [N].
    """
    import trimesh

    # superpoints are cut where the color jumps: a picture on a cupboard
    colors = opponent_colors(colors)
    a, b = neighbor_pairs(points, 8, reach=3.5)
    jump = np.linalg.norm(colors[a] - colors[b], axis=1)
    alike = (superpoints[a] == superpoints[b]) & (jump < 0.08)
    joined = np.column_stack([a, b])[alike]
    piece = trimesh.graph.connected_component_labels(joined, len(points))
    size, color = np.bincount(piece), average(colors, piece)
    shell = find_shell(points, normals, colors, superpoints)
    in_room = np.bincount(piece, shell) >= 0.5 * size  # of every piece

    # where two pieces touch: the share of pairs of points at which the surface is concave
    gap = points[a] - points[b]
    concave = ((normals[a] - normals[b]) * gap).sum(1) < -0.2 * np.linalg.norm(gap, axis=1)
    touch = np.sort([piece[a], piece[b]], axis=0)
    (x, y), contact, edges = np.unique(touch, axis=1, return_inverse=True, return_counts=True)
    cost = np.linalg.norm(color[x] - color[y], axis=1) / 0.2 + np.bincount(contact, concave) / edges
    cost[(x == y) | in_room[x] | in_room[y]] = np.inf

    # how far every piece reaches along each axis, forwards and backwards
    reach = np.full((len(size), 6), -np.inf)
    np.maximum.at(reach, piece, np.hstack([points, -points]))

    # join the cheapest pair first
    root = np.arange(len(size))
    for i in np.argsort(cost)[: (cost <= 1).sum()]:
        p, q = root[x[i]], root[y[i]]
        both = np.maximum(reach[p], reach[q])
        if (both[:3] + both[3:]).max() <= 2.6:
            root[root == q] = p
            reach[p] = both

    # number what is large enough
    size = np.bincount(root, size, len(size))  # 0 for what joined another
    length = (reach[:, :3] + reach[:, 3:]).max(1)
    return keep_labels(root[piece], ~in_room & (size >= 12) & (length >= 0.12))


def keep_labels(labels, kept):
    """Renumber the labels with kept[label] from 1 in their order; the others become 0."""
    number = np.cumsum(kept) * kept
    return number[labels]


def render_masks(points, instances, frames):
    """Give every depth pixel the instance [N] of the nearest of points [N, 3]: masks [V, H, W] int32.

    0 = no point within 5 cm, or within twice the cloud's spacing.
    """
    reach = max(0.05, 2 * np.median(nearest(points, points, 2)[0][:, -1]))
    masks = np.zeros(frames.depth.shape, np.int32)
    pixels = world_points(frames)
    for mask, depth, seen in zip(masks, frames.depth, pixels, strict=True):
        # one frame at a time: the search takes much memory
        distance, near = nearest(seen[depth > 0], points)
        mask[depth > 0] = np.where(distance <= reach, instances[near], 0)[:, 0]
    return masks


def masked(frames, masks, points, instances):
    """Give frames other masks [V, H, W], None: rendered from the instances of points."""
    if masks is None:
        masks = render_masks(points, instances, frames)
    return Frames(frames.color, frames.depth, masks, frames.intrinsics, frames.poses)


def in_view(points, frames, v):
    """Find which of points [N, 3] fall on frame v, hidden ones too.

    Returns: index, row, column [M], and how many meters the depth measured there lies behind them, [M].
    """
    pixels, z = project(points, frames.intrinsics[v], frames.poses[v])
    depth = frames.depth[v]
    inside = np.flatnonzero((z > 0.1) & (pixels >= 0).all(1) & (pixels < depth.shape[::-1]).all(1))
    column, row = pixels[inside].astype(int).T
    return inside, row, column, depth[row, column] - z[inside]


def seen_cloud(scene):
    """Give a room the cloud that its cameras see, in place of the one that is drawn from its objects."""
    if scene.source != "rooms" or not scene.frames:
        return scene
    return replace(scene, **fuse(scene.frames))


def visible_cloud(scene):
    """Give a scene the cloud that its cameras see, with superpoints of our own."""
    scene = seen_cloud(scene)
    return replace(scene, superpoints=over_segment(scene.points, scene.normals))


def shown_colors(scene):
    """Give a cloud's colors [N, 3] u8, gray where it has none."""
    return np.full(scene.points.shape, 128, np.uint8) if scene.colors is None else scene.colors


def with_own_segments(scene):
    """Make a scene's own segments its objects, with masks and superpoints made anew."""
    scene = visible_cloud(scene)
    instances = object_segments(scene.points, scene.normals, shown_colors(scene), scene.superpoints)
    return with_instances(scene, instances, None, "segments of our own")


def with_predicted_masks(scene, folder):
    """Make instances that were predicted in ScanNet's own format (Mask3D and others) a scan's objects.

    <folder>/<scan>.txt has a line per instance: the name of a file that says 0 or 1 of every vertex,
    a label, and how sure it is. A vertex belongs to the surest. Raises DataError.
    """
    table = folder / f"{scene.name}.txt"
    instances = np.zeros(len(scene.points), np.int64)
    with reading(table, "list of masks (file, label, score)"):
        rows = sorted(read_words(table), key=lambda row: float(row[2]))
        for i, (file, *_) in enumerate(rows, start=1):
            instances[np.loadtxt(folder / file) > 0] = i
    return with_instances(scene, instances, None, f"masks of {folder.name}")


def with_instances(scene, instances, masks, what, trim=0.0):
    """Make the instances [N] of a cloud its objects: category "", color by name.

    Masks [V, H, W] of the frames, None: rendered. Boxes leave out the share `trim` of an object's
    points at every side; `what` says in a note what the objects are.
    """
    objects = []
    for i in np.unique(instances[instances > 0]).tolist():
        own = instances == i
        box = extent(scene.points[own], trim)
        objects.append(Thing(i, "", color_name(scene.colors, own), box))

    # frames that lie on disk get their masks when they are looked at
    frames = scene.frames
    if frames:
        load = partial(masked, frames, masks, scene.points, instances)
        lazy = isinstance(frames, LazyFrames)
        frames = LazyFrames(load, f"{frames.key} {what}") if lazy else load()
    notes = [*scene.notes, f"objects are {len(objects)} {what}, without categories"]
    return replace(scene, instances=instances, objects=objects, frames=frames, notes=notes)


# ---- 9b masks of a video -------------------------------------------------------------------------

SAM2 = "facebook/sam2.1-hiera-large"  # Proxy3D does not say which SAM 2 it takes: the most accurate one


@lru_cache(maxsize=1)
def load_sam2(name):
    """Load SAM 2's video predictor by the name of its weights, on a GPU where there is one."""
    sam2 = need("sam2.sam2_video_predictor", "--masks sam2")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with reading(f"--sam2 {name}", "SAM 2, whose weights are on the hub"):
        model = sam2.SAM2VideoPredictor.from_pretrained(name, device=device)

    # small holes stay: filling needs SAM 2's CUDA extension, and warns without it
    model.fill_hole_area = 0
    return model


def automatic_masks(model, image):
    """See masks [H, W] bool in an image [H, W, 3] u8 by a grid of prompts to SAM 2."""
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

    found = SAM2AutomaticMaskGenerator(model).generate(image)
    return [mask["segmentation"] for mask in found]


def sam2_masks(images, model, keyframe_every=8):
    """Track everything in a video [V, H, W, 3] u8: tracks [V, H, W] int32, 0 = none, ids 1..100 at most.

    Masks that `automatic_masks` sees on every `keyframe_every`-th frame are
    followed both ways. A pixel goes to the track with the highest score. What is smaller than a
    thousandth of a frame is not seen, what is larger than half of it is a wall from near. What leaves
    the view and comes back is a new track: `merge_tracks`.
    """
    V, shape, count = len(images), images.shape[:3], 0
    tracks, best = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    half = torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), half:
        # SAM 2 reads frames from a folder only
        for v, image in enumerate(images):
            Image.fromarray(image).save(f"{folder}/{v:05d}.jpg", quality=95)
        state = model.init_state(folder, offload_video_to_cpu=True, offload_state_to_cpu=True)

        for key in sorted({*range(0, V, keyframe_every), V - 1}):
            # from large to small: a mask starts a track unless half of it belongs to tracks or larger masks
            taken, first = tracks[key] > 0, count
            for mask in sorted(automatic_masks(model, images[key]), key=np.count_nonzero, reverse=True):
                fresh = mask & ~taken
                if 0.001 <= mask.mean() <= 0.5 and 2 * fresh.sum() > mask.sum() and count < 100:
                    count += 1
                    model.add_new_mask(state, key, count, fresh)
                    taken |= mask
            if count == first:
                continue

            # forwards and backwards, each pixel to its best track
            for reverse in (False, True):
                for v, ids, logits in model.propagate_in_video(state, key, reverse=reverse):
                    score, which = (a.cpu().numpy() for a in logits[:, 0].float().max(0))  # [H, W] each
                    better = score > best[v]
                    best[v][better] = score[better]
                    tracks[v][better] = np.array(ids)[which[better]]
            model.reset_state(state)

    # crumbs on a frame are not seen there
    for frame in tracks:
        area = np.bincount(frame.ravel())
        frame[area[frame] < 0.001 * frame.size] = 0
    return tracks


def merge_tracks(tracks, points, share=0.3):
    """Give tracks [V, H, W] that are one object one id, from 1: masks [V, H, W].

    points [V, H, W, 3] in meters, NaN = missing. Two tracks become one if they share at least `share`
    of the 5 cm voxels of the smaller, the largest shares first, unless some frame shows both: side by side
    they are two objects. A track occupies the voxels where most points on its own frames are its own,
    since masks spill over edges.
    """
    ids = np.arange(tracks.max() + 1)
    present = np.stack([np.isin(ids, frame) for frame in tracks], axis=1)  # [n + 1, V]

    # the voxels in which most points of a track's frames are its own
    measured = np.isfinite(points).all(-1)
    frame, cell, track = np.nonzero(measured)[0], voxel_of(points[measured], 0.05), tracks[measured]
    cells = cell.max() + 1
    occupied = np.zeros((len(ids), cells), np.float32)
    for t in ids[1:]:
        own = np.bincount(cell[track == t], minlength=cells)
        shown = np.bincount(cell[present[t, frame]], minlength=cells)
        occupied[t] = 2 * own > shown

    # join the largest shares first
    both, size = occupied @ occupied.T, occupied.sum(1)
    overlap = np.triu(both / np.maximum(np.minimum(size[:, None], size), 1), 1)
    a, b = np.nonzero(overlap >= share)
    root = ids.copy()
    for i in np.argsort(-overlap[a, b], kind="stable"):
        p, q = root[a[i]], root[b[i]]
        if not (present[p] & present[q]).any():  # never of one with itself
            present[p] |= present[q]
            root[root == q] = p

    # tracks of hardly any voxel in space are dropped
    return keep_labels(root[tracks], np.bincount(root, size, len(ids)) >= 4)


def find_tracks(frames, sam2):
    """Track what frames show through them: masks [V, H, W], 0 = none."""
    tracks = sam2_masks(frames.color, load_sam2(sam2))
    tracks = np.stack([resize(frame, frames.depth.shape[1:]) for frame in tracks])  # color may be finer
    return merge_tracks(tracks, world_points(frames))


def tracked(frames, objects, sam2):
    """Mask frames by tracks in place of annotations: a track shows the known object that its box fits best.

    Boxes of tracks span the 2nd to 98th percentile of their points. A track that has an IoU of less than 0.25
    with every object shows none.
    """
    tracks, points = find_tracks(frames, sam2), world_points(frames)
    boxes = np.stack([o.box for o in objects])
    number = np.zeros(tracks.max() + 1, np.int32)
    for t in range(1, len(number)):
        box = extent(points[tracks == t], 0.02)
        iou = box_iou(box[None], boxes)[0]
        if iou.max() >= 0.25:
            number[t] = objects[iou.argmax()].id
    return masked(frames, number[tracks], None, None)


def vote(points, masks, frames):
    """Label points [N, 3] by masks [V, H, W]: instances [N], 0 = none.

    A point takes the mask that most frames show at it, if most of those that see the point, and that
    mask anywhere, agree. A frame sees a point within 5 cm of its depth.
    """
    # what every frame shows at every point, -1 where it does not see it
    shown = np.full((len(masks), len(points)), -1)
    for v, mask in enumerate(masks):
        index, row, column, behind = in_view(points, frames, v)
        near = np.abs(behind) <= 0.05
        shown[v, index[near]] = mask[row, column][near]

    # the mask that most frames show
    votes = np.stack([(shown == i).sum(0) for i in range(masks.max() + 1)])  # [n + 1, N]
    votes[0] = 0
    first = votes.argmax(0)

    # frames that see the point, and show its mask somewhere
    together = sum((shown[v] >= 0) & np.isin(first, mask) for v, mask in enumerate(masks))
    return np.where(2 * votes.max(0) > together, first, 0)


def with_tracks(scene, tracks):
    """Make merged tracks [V, H, W] of a scene's frames its masks and objects.

    A track on the room's shell, or of fewer than 8 points, is dropped. Boxes span the 2nd to 98th
    percentile of a track's points, since masks bleed at edges.
    """
    scene = visible_cloud(scene)
    colors = opponent_colors(shown_colors(scene))
    shell = find_shell(scene.points, scene.normals, colors, scene.superpoints)

    # how many points of a track there are, and how many of them belong to walls and floor
    instances, n = vote(scene.points, tracks, scene.frames), tracks.max() + 1
    total, flat = np.bincount(instances, minlength=n), np.bincount(instances, shell, n)
    kept = (total >= 8) & (2 * flat < total)
    kept[0] = False
    masks = keep_labels(tracks, kept).astype(np.int32)
    return with_instances(scene, keep_labels(instances, kept), masks, "tracks through the frames", 0.02)


# ---- 10 pictures ---------------------------------------------------------------------------------

CORNERS = np.array(list(itertools.product((-0.5, 0.5), repeat=3)))  # [8, 3] of a box of size 1
OUTLINE = CORNERS[[0, 1, 3, 2, 0, 4, 5, 1, 5, 7, 3, 7, 6, 2, 6, 4]]  # [16, 3], a way along all its edges
ANSWERS = ("crimson", "royalblue", "seagreen", "darkorange")  # colors of the first answer, the second, ...


def axes_of(axis):
    """Say how many coordinates a picture's axis takes: 2 from above, 3 in perspective."""
    return 3 if axis.name == "3d" else 2


def draw_boxes(axis, boxes, **style):
    """Draw the edges of boxes [n, 6] on an axis of `scene_figure`."""
    for box in boxes:
        way = box[:3] + OUTLINE * box[3:]
        axis.plot(*way[:, : axes_of(axis)].T, **style)


def scene_figure(scene, title, lines=()):
    """Begin a picture of a scene: its cloud from above and in perspective, two frames below it, lines
    of text.

    Returns: the figure, and its two axes (from above, in perspective). `save_figure` ends the picture.
    """
    from matplotlib.figure import Figure

    # the ceiling would hide the room; from above the highest is drawn last
    cloud, frames = seen_cloud(scene), scene.frames
    z = cloud.points[:, 2]
    some = np.argsort(z)
    some = some[z[some] < z.min() + 2.3]

    # 30,000 points show enough
    some = some[:: 1 + len(some) // 30_000]
    points, colors = cloud.points[some], shown_colors(cloud)[some] / 255

    # the cloud above, frames below
    below = 1.0 if frames else 0.01
    figure = Figure(figsize=(15, 8 + 3 * below), layout="constrained")
    grid = figure.add_gridspec(2, 4, height_ratios=(3, below))
    top = figure.add_subplot(grid[0, :2], aspect="equal", xlabel="x in meters", ylabel="y in meters")
    view = figure.add_subplot(grid[0, 2:], projection="3d", computed_zorder=False)
    top.scatter(*points[:, :2].T, c=colors, s=4, zorder=0)
    view.scatter(*points.T, c=colors, s=2, depthshade=False, zorder=0)
    view.set_aspect("equal")
    view.set_axis_off()

    # the first and the last frame, each with its objects beside it
    if frames:
        images = (frames.color[0], frames.masks[0] % 20, frames.color[-1], frames.masks[-1] % 20)
        for column, image in enumerate(images):
            axis = figure.add_subplot(grid[1, column])
            axis.imshow(image, cmap="tab20", vmin=0, vmax=19)
            axis.set_axis_off()
    figure.suptitle(title, parse_math=False)
    figure.supxlabel("\n".join(lines), parse_math=False)
    return figure, (top, view)


def save_figure(figure, path):
    """Write a figure, with the folder that it goes to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def draw_scene(scene, path, lines=(), tokens=None, answers=()):
    """Draw a scene with its objects' boxes, identifiers and names, and what a model sees and answers.

    tokens [K, 3] in meters are crosses; the boxes, points and identifiers that an answer writes are
    drawn in a color per answer.
    """
    from matplotlib import colormaps

    figure, axes = scene_figure(scene, f"{scene.name}: {len(scene.objects)} objects", lines)
    for axis in axes:
        n = axes_of(axis)
        for o in scene.objects:
            draw_boxes(axis, [o.box], color=colormaps["tab20"](o.id % 20), lw=0.8)
            name = f"{scene.identifiers.get(o.id, '')} {o.category or o.color}".strip()
            axis.text(*o.box[:n], name, fontsize=7, ha="center", parse_math=False)
        if tokens is not None:
            axis.scatter(*tokens[:, :n].T, c="black", marker="x", s=12, lw=0.7)

    # an answer names objects by identifier, or writes boxes and points in meters
    box_of = {scene.identifiers.get(o.id): o.box for o in scene.objects}
    for color, text in zip(itertools.cycle(ANSWERS), answers):
        named = [box_of.get(int(i)) for i in re.findall(r"<OBJ(\d{3})>", text)]
        boxes = [box for box in named + tuples(text, 6) if box is not None]
        points = [point for point in tuples(text, 3) if point is not None]
        for axis in axes:
            draw_boxes(axis, boxes, color=color, lw=2.5)
            for point in points:
                axis.scatter(*point[: axes_of(axis)], c=color, s=60, zorder=4)
    save_figure(figure, path)


# ---- 11 scenes of one's own, command line --------------------------------------------------------

SOURCES = ("rooms", "scannet", "rgbd", "ply", "cached")


def load_scenes(
    source, split, root=None, count=800, workers=0, share=map, frames=True, folder=None, **options
):
    """Load the scenes of a split, "train" or "test", of one of SOURCES: rooms, scans, or own
    scenes below `root`.

    Those that scannetv2_val.txt of the root names are for testing; without that file every fifth is,
    and one that is alone is for both. Scenes that cannot be read, or in which no object is found, are
    left out, and said. share: maps in place of `map`, so that processes can share the reading.
    frames: False makes rooms without; folder: where rooms keep them, None = in memory. options: of
    `open_scene`. Raises DataError where none is left.
    """
    # rooms are made, all else is read
    if source == "rooms":
        if strange := options.keys() - {"objects"}:
            raise DataError(f"--data rooms: takes no {', '.join(strange)}; these say how scenes are read")
        return rooms(ROOM_SEEDS[split][:count], workers + 1, render=frames, folder=folder, **options)
    if root is None:
        raise DataError(f"--data {source}: name the folder with --root")
    root = Path(root)
    paths = list(filter(is_scan, find_scans(root))) if source == "scannet" else find_scenes(root)

    # the official split, else our own
    listed = root / "scannetv2_val.txt"
    if listed.exists():
        names = listed.read_text().split()
        chosen = [path for path in paths if (path.name in names) == (split == "test")]
    else:
        test = paths[4::5] or paths[-1:]
        train = [path for path in paths if path not in test] or paths
        chosen = test if split == "test" else train

    # without an object there is nothing to ask
    def read(path):
        try:
            scene = open_scene(path, **options)
            if not scene.objects:
                raise DataError(f"{path}: no object was found, so nothing can be asked")
            return scene
        except DataError as error:
            print(f"{error}; left out")

    scenes = [scene for scene in share(read, chosen) if scene]
    if not scenes and (chosen or not paths):
        lacking = f"--root {root}: no scenes with objects for the {split} split"
        raise DataError(f"{lacking}; see python data.py check {root}")
    return scenes


SCENE_OPTIONS = {  # flags of a scene of one's own -> arguments of argparse
    "scale": dict(type=float, help="true meters per unit of a cloud, or per guessed meter of a video"),
    "up": dict(choices=("auto", *UP), help="axis of the files that points up, as --up=-y (default: found)"),
    "convention": dict(choices=CONVENTIONS, help="of the poses (default: the layout's)"),
    "depth_scale": dict(type=float, help=f"units of depth per meter (the layout's; {DEPTH_SCALES})"),
    "max_frames": dict(type=int, help="frames to use at most (default: 32)"),
    "longest": dict(type=int, help="longer side of frames in pixels (default: 320; 640 for VGGT)"),
    "vggt": dict(help="name or folder of VGGT's weights, for frames without depth or poses"),
    "geometry": dict(choices=("files", "vggt"), help="where depth and cameras of a scan come from (default: files)"),
    "masks": dict(choices=("files", "segments", "sam2"), help="where objects come from: instance-filt/ "
                  "beside the frames (default where it lies), segments of the cloud (else), SAM 2"),
    "sam2": dict(help=f"name of SAM 2's weights (default: {SAM2})"),
    "objects": dict(type=int, nargs="+", help="of --data rooms: how many, or the least and the most (default: 8 16)"),
}  # fmt: skip


def add_scene_options(parser):
    for name, arguments in SCENE_OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **arguments)


def scene_options(args):
    """Pick those of SCENE_OPTIONS that were given."""
    return {k: value for k, value in vars(args).items() if k in SCENE_OPTIONS and value is not None}


def choose_reader(path):
    """Choose who reads a scene of one's own, and the options it takes. Raises DataError."""
    kind = path.suffix.lower()
    if kind == ".npz":
        return load_scene, set()
    if is_scan(path):
        return read_scannet, {"max_frames", "longest", "geometry", "vggt"}
    if path.is_dir() or kind in VIDEOS:
        return read_views, set(SCENE_OPTIONS) - {"geometry", "objects"}
    if kind in CLOUDS:
        return read_cloud, {"up", "scale"}
    known = ", ".join((*CLOUDS, *VIDEOS))
    raise DataError(f"{path}: no scene; give {known}, a scan, or a folder of frames")


def open_scene(path, masks=None, sam2=None, **options):
    """Read a scene of one's own, and find objects where none are labelled.

    masks: "files" (beside its frames, the default where they lie), "segments" of its cloud,
    "sam2" (tracks; sam2 names the weights), or "none". Options: those of its reader; another one
    is a DataError.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such scene; give a video, a cloud, or a folder of frames")

    # the format decides which options have a meaning
    reader, takes = choose_reader(path)
    if strange := options.keys() - takes:
        flag, known = min(strange).replace("_", "-"), ", ".join(sorted(takes)) or "none"
        raise DataError(f"--{flag}: has no part in {path}; known here: {known}")
    scene = reader(path, **options)
    frames, weights = scene.frames, sam2 or SAM2

    # labelled objects stay; tracks may only show them, in frames that lie on disk
    if scene.objects and masks == "sam2" and frames:
        scene.frames = LazyFrames(partial(tracked, frames, scene.objects, weights), f"{frames.key} {weights}")
    elif scene.objects and masks not in (None, "none"):
        raise DataError(f"--masks {masks}: {path} has labelled objects; leave the flag out")
    if scene.objects or reader is load_scene or masks == "none":
        return scene

    # where they are sought; who names weights of SAM 2 wants it
    labelled = frames and frames.masks.any()
    masks = masks or ("sam2" if sam2 else "files" if labelled else "segments")
    if masks == "segments":
        return with_own_segments(scene)
    if masks == "files" and labelled:
        return with_tracks(scene, frames.masks)
    if masks == "sam2" and frames:
        return with_tracks(scene, find_tracks(frames, weights))
    lacking = "it has no frames, or no instance-filt/ with masks"
    raise DataError(f"--masks {masks}: {path}: {lacking}; choose files, segments or sam2")


FRAME_ARRAYS = list(Frames.__annotations__)


def save_scene(scene, path):
    """Write a scene as one .npz file, without pickle; objects and notes go as JSON."""
    arrays = {name: array for name, array in vars(scene).items() if isinstance(array, np.ndarray)}
    for name in FRAME_ARRAYS if scene.frames else ():
        arrays[f"frames.{name}"] = getattr(scene.frames, name)

    # what is no array goes as JSON
    about = {name: getattr(scene, name) for name in ("name", "source", "metric", "notes")}
    about["objects"] = [[o.id, o.category, o.color, *o.box.tolist()] for o in scene.objects]
    write_whole(path, partial(np.savez, about=json.dumps(about), **arrays))


def load_scene(path):
    """Load the scene that save_scene wrote; its frames are read when they are looked at.

    Raises DataError.
    """
    with reading(path, "kept scene"), np.load(path) as held:
        # objects from JSON, arrays by their names, frames later
        about = json.loads(str(held["about"])) | {"name": path.stem}
        about["objects"] = [Thing(*row[:3], np.array(row[3:])) for row in about["objects"]]
        arrays = {name: held[name] for name in held if name != "about" and "." not in name}
        arrays["bounds"] = arrays["bounds"].reshape(2, 3)
        scene = Scene(**about, **arrays)
        if "frames.masks" in held:
            scene.frames = LazyFrames(partial(load_frames, path), file_key([path]))
        return check_scene(scene, trusted=True)


def load_frames(path):
    """Load the frames that save_scene wrote."""
    with reading(path, "kept scene"), np.load(path) as held:
        frames = Frames(*(held[f"frames.{name}"] for name in FRAME_ARRAYS))

        # all of one number and size, and every camera somewhere
        V, H, W = frames.depth.shape
        shapes = frames.masks.shape, frames.color.shape[::3], frames.intrinsics.shape, frames.poses.shape
        if shapes != ((V, H, W), (V, 3), (V, 3, 3), (V, 4, 4)):
            raise ValueError(f"frames of shapes {shapes}")
        if not np.isfinite(frames.poses.sum() + frames.intrinsics.sum() + frames.depth.sum()):
            raise ValueError("frames with numbers that are not finite")
    return frames


def is_scene(path):
    """Whether `path` is a video, a cloud, a kept scene, a scan's folder, or one of frames or images."""
    if path.is_dir():
        return is_scan(path) or bool(find_frames(path)[1])
    return path.suffix.lower() in (*VIDEOS, *CLOUDS, ".npz") and path.name[0] != "."


def find_scenes(path):
    """Find all scenes that lie in a folder, or else in the folders in it; what is a scene itself,
    or holds none, is alone."""
    for places in ([path], path.glob("*"), path.glob("*/*")):
        if found := sorted(filter(is_scene, places)):
            return found
    return [path]


def cache_scenes(path, out, **options):
    """Write every scene of `path`, through its frozen encoders (VGGT, SAM 2, segments), once as
    out/<name>.npz.

    Under torchrun a process takes every world-th scene and its own GPU. What is there already
    stays, so done again it goes on where it stopped. Prints failures and returns their number.
    """
    from tqdm import tqdm

    # under torchrun a process has its share of the scenes, and a GPU
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())

    # what fails is said, and the rest goes on
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


def check(path, **options):
    """Describe what lies at `path`, line by line: `data.py check DIR`.

    Scenes are opened, but no objects looked for. A ScanNet root is too large for that: its scans and
    their files are counted.
    """
    if scans := find_scans(path):
        shown = sum(bool(find_frames(scan)[1]) for scan in scans)
        yield f"{path}: {len(scans)} scans, {shown} with frames beside them"

        # where missing files are had, and under which terms
        lacking = [file for scan in scans for file in scan_files(scan) if not file.exists()]
        if lacking:
            yield f"missing {len(lacking)} files, first {lacking[0]}; {SCANNET_TERMS}"
        return
    for place in find_scenes(path):
        try:
            scene = open_scene(place, masks="none", **options)
            counts = f"{len(scene.points)} points, {len(scene.objects)} objects"
            yield f"{place}: {counts}; {'; '.join(scene.notes)}"
        except DataError as error:
            yield str(error)


def command(main):
    """Make `main` return its exit status: its own or 0; 2 where something is wrong, which one
    line says."""

    def status(*arguments):
        try:
            return main(*arguments) or 0
        except (DataError, OSError) as error:  # OSError: what cannot be written
            print(f"{Path(inspect.getfile(main)).name}: {error}", file=sys.stderr)
            return 2

    return status


@command
def main(arguments=None):
    """Look at data or make some; the status is 2 also where a scene could not be kept."""
    parser = argparse.ArgumentParser(description="Look at data, or make some.")
    commands = parser.add_subparsers(dest="command", required=True)

    # one sub-command each
    look = commands.add_parser("check", help="what is there, what is missing, and where it is had")
    make = commands.add_parser("rooms", help="procedural rooms in ScanNet's file layout")
    make.add_argument("out", type=Path)
    make.add_argument("--count", type=int, default=10)
    make.add_argument("--objects", type=int, help="objects per room (default: 8 to 16)")
    make.add_argument("--seed", type=int, default=0, help="of the first room")
    keep = commands.add_parser("cache", help="scenes through VGGT, SAM 2 and segmentation, once")
    for reads in (look, keep):
        reads.add_argument("path", type=Path, help="a scene, or a folder of scenes")
        add_scene_options(reads)
    keep.add_argument("out", type=Path)

    # a command prints what it finds or makes
    args = parser.parse_args(arguments)
    if args.command == "check":
        for line in check(args.path, **scene_options(args)):
            print(line)
    elif args.command == "rooms":
        for seed in range(args.seed, args.seed + args.count):
            scene = room(seed, args.objects, size=240, views=16, points=20_000)
            scene.name = f"scene{seed:04d}_00"
            print(write_scannet(scene, args.out / "scans"))
    elif cache_scenes(args.path, args.out, **scene_options(args)):
        return 2


if __name__ == "__main__":
    sys.exit(main())
