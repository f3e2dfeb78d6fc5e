"""Scenes and geometry that every paper uses, against slow and obvious versions."""

import itertools
import math

import numpy as np
import pytest
import torch

from data import (
    LazyFrames,
    Scene,
    Thing,
    augment,
    box_iou,
    farthest_point_sampling,
    fingerprint,
    fourier_waves,
    group_mean,
    knn,
    number_objects,
    project,
    room,
    substitute,
    unproject,
)


@pytest.fixture(scope="module")
def scene():
    return room(3, views=2, size=24, points=300)


# ---- neighbors and groups --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 30])
def test_knn_equals_sorting_all_distances(k):
    """k = 1 is a case of its own: a tree then returns one axis less."""
    g = torch.Generator().manual_seed(k)
    queries, points = torch.rand(7, 3, generator=g), torch.rand(30, 3, generator=g)
    distance, index = knn(queries, points, k)
    assert distance.shape == index.shape == (7, k)
    assert distance.dtype == points.dtype and index.dtype == torch.int64
    for q in range(7):
        every = sorted((math.dist(queries[q].tolist(), p.tolist()), i) for i, p in enumerate(points))
        assert index[q].tolist() == [i for _, i in every[:k]]
        assert torch.allclose(distance[q], torch.tensor([d for d, _ in every[:k]]), atol=1e-6)


@pytest.mark.parametrize("k", [0, 6])
def test_knn_refuses_more_neighbors_than_there_are_points(k):
    """The tree would fill the rest with infinity and an index that is out of range."""
    with pytest.raises(ValueError, match=f"k = {k} neighbors of 5 points"):
        knn(torch.rand(2, 3), torch.rand(5, 3), k)


def test_farthest_point_sampling_equals_a_loop():
    """Each point is the farthest from all chosen before it."""
    points = torch.rand(40, 3, generator=torch.Generator().manual_seed(1))
    center = points.mean(0)
    chosen = [max(range(40), key=lambda i: float((points[i] - center).norm()))]
    while len(chosen) < 12:
        gaps = torch.cdist(points, points[chosen]).min(1).values
        chosen.append(int(gaps.argmax()))
    assert farthest_point_sampling(points, 12).tolist() == chosen


def test_a_group_mean_equals_a_loop_and_is_zero_where_a_group_is_empty():
    values = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    index = torch.arange(20) % 4
    mean, size = group_mean(values, index, 5)
    for group in range(4):
        assert torch.allclose(mean[group], values[index == group].mean(0))
    assert size.tolist() == [5, 5, 5, 5, 0] and (mean[4] == 0).all()


# ---- point maps and boxes --------------------------------------------------------------------------------------------


def test_unproject_follows_the_camera_model_and_project_inverts_it():
    """Pixel centers lie at half-integers, depth runs along the camera's z axis; missing depth is NaN."""
    rng = np.random.default_rng(0)
    V, H, W = 2, 3, 4
    depth = rng.uniform(1, 3, (V, H, W)).astype(np.float32)
    depth[1, 2, 3] = 0
    K = np.array([[5.0, 0, 2.1], [0, 6.0, 1.4], [0, 0, 1]])
    poses = np.tile(np.eye(4), (V, 1, 1))
    poses[:, :3, :3] = np.linalg.qr(rng.normal(size=(V, 3, 3)))[0]
    poses[:, :3, 3] = rng.normal(size=(V, 3))
    points = unproject(depth, np.stack([K, K]), poses)
    assert points.shape == (V, H, W, 3) and points.dtype == np.float32
    assert np.isnan(points[1, 2, 3]).all()

    for v, i, j in list(itertools.product(range(V), range(H), range(W)))[:-1]:
        x, y, z = poses[v, :3, :3].T @ (points[v, i, j] - poses[v, :3, 3])  # in the camera's frame
        pixel = [5 * x / z + 2.1, 6 * y / z + 1.4]
        assert np.allclose([*pixel, z], [j + 0.5, i + 0.5, depth[v, i, j]], atol=1e-4)
        assert np.allclose(project(points[v, i, j], K, poses[v])[0], pixel, atol=1e-4)


def test_iou_of_boxes_that_touch_contain_or_have_no_volume():
    """Every pair of [S, n, 6] and [S, m, 6] gives [S, n, m]; boxes without volume must not divide by zero."""
    boxes = np.array([[0, 0, 0, 1, 1, 1], [1, 0, 0, 1, 1, 1], [0, 0, 0, 0.5, 1, 1], [0, 0, 0, 0, 1, 1.0]])
    iou = box_iou(np.stack([boxes[:2], boxes[2:]]), np.stack([boxes, boxes]))
    assert np.allclose(iou[0], [[1, 0, 0.5, 0], [0, 1, 0, 0]])
    assert np.allclose(iou[1], [[0.5, 0, 1, 0], [0, 0, 0, 0]])


# ---- scenes ----------------------------------------------------------------------------------------------------------


def test_marks_and_nothing_else_are_replaced():
    """Ids have any number of digits; identifiers in the text are no marks."""
    text = substitute("is <obj 3> near <obj 12>, <obj 3> or <OBJ003>? <obj x>", lambda i: f"#{i}")
    assert text == "is #3 near #12, #3 or <OBJ003>? <obj x>"


def test_identifiers_are_different_random_and_belong_to_the_largest_things():
    """An identifier that leaned on the order of objects would be learned instead of looked at."""
    rng = np.random.default_rng(0)
    heights = [1 + (37 * i) % 130 for i in range(130)]
    things = [Thing(i, "box", "red", np.array([0, 0, 0, 1, 1, h])) for i, h in enumerate(heights)]
    drawn = [number_objects(Scene("s", "rooms", things), rng) for _ in range(300)]
    assert all(set(d) == {i for i, h in enumerate(heights) if h > 30} for d in drawn)
    assert all(sorted(d.values()) == list(range(100)) for d in drawn)
    assert len({d[heights.index(130)] for d in drawn}) > 80


def test_augmentation_moves_everything_alike(scene):
    """Points stay inside the boxes of their objects, normals stay on their faces, bounds stay bounds, and what a camera
    sees lies, turned by `turn`, in the turned boxes."""
    rng = np.random.default_rng(0)
    frames = scene.frames
    seen = frames.masks > 0
    world = unproject(frames.depth, frames.intrinsics, frames.poses)[seen]
    turns = set()
    for _ in range(30):
        other = augment(scene, rng)
        turns.add(other.turn.tobytes())
        box = {o.id: o.box for o in other.objects}
        for points, ids in ((other.points, other.instances), (world @ other.turn.T, frames.masks[seen])):
            own = np.array([box[i] for i in ids[ids > 0]])
            assert (np.abs(points[ids > 0] - own[:, :3]) <= own[:, 3:] / 2 + 1e-4).all()
        assert np.allclose(other.normals, scene.normals @ other.turn.T) and other.points.dtype == np.float32
        assert np.allclose(other.bounds, np.sort(scene.bounds @ other.turn.T, axis=0))
    assert len(turns) == 8  # every mirroring and transposition of the floor plan
    assert all(np.linalg.det(augment(scene, rng, mirror=False).turn) > 0 for _ in range(9))


def test_of_frames_on_disk_one_scenes_are_held_at_a_time(scene):
    """A thousand scans do not fit in memory."""
    read = []

    def load(name):
        read.append(name)
        return scene.frames

    a, b = (LazyFrames(lambda name=name: load(name)) for name in "ab")
    assert a.depth is scene.frames.depth and a.masks is scene.frames.masks and read == ["a"]
    assert len(b.poses) == 2 and len(a.poses) == 2 and read == ["a", "b", "a"]


def test_a_fingerprint_tells_contents_apart_but_not_turns(scene):
    """Cached features belong to what a scene is made of, also once it is augmented."""
    assert fingerprint(scene) == fingerprint(augment(scene, np.random.default_rng(0)))
    others = [room(3, views=2, size=24, points=301), room(3, views=3, size=24, points=300)]
    assert len({fingerprint(s) for s in (scene, *others)}) == 3


def test_a_number_in_meters_is_written_in_waves_of_half_a_meter_to_sixteen():
    """cos and sin of 2 pi x / wavelength, number by number."""
    for row in (8 * torch.randn(4, 3)).tolist():
        waves = []
        for x in row:
            phase = [2 * math.pi * x / w for w in (0.5, 1, 2, 4, 8, 16)]
            waves += [*map(math.cos, phase), *map(math.sin, phase)]
        assert torch.allclose(fourier_waves(torch.tensor(row)), torch.tensor(waves), atol=1e-4)
