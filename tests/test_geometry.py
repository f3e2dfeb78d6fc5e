"""Scenes and geometry that every paper uses, against slow and obvious versions."""

import numpy as np
import pytest
import torch
from papers import alike

from data import (
    Scene,
    Thing,
    augment,
    box_iou,
    farthest_point_sampling,
    group_mean,
    knn,
    number_objects,
    project,
    room,
    substitute,
    unproject,
    world_points,
)


@pytest.fixture
def scene():
    return room(3, views=2, size=24, points=300)


# ---- neighbors and groups --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 30])
def test_knn_equals_sorting_all_distances(k):
    """k = 1 is a case of its own: a tree then returns one axis less."""
    queries, points = torch.rand(37, 3).split([7, 30])
    every = (queries[:, None] - points).norm(dim=2)
    near, order = every.sort()
    distance, index = knn(queries, points, k)
    assert torch.equal(index, order[:, :k])
    assert alike(distance, near[:, :k], 1e-6)


def test_farthest_point_sampling_equals_a_loop():
    """Each point is the farthest from all chosen before it."""
    points = torch.rand(40, 3)
    gaps = (points - points.mean(0)).norm(dim=1)
    chosen = []
    for _ in range(12):
        chosen.append(int(gaps.argmax()))
        gaps = torch.cdist(points, points[chosen]).amin(1)
    assert farthest_point_sampling(points, 12).tolist() == chosen


def test_a_group_mean_equals_a_loop_and_is_zero_where_a_group_is_empty():
    values = torch.rand(20, 3)
    index = torch.arange(20) % 4
    mean, size = group_mean(values, index, 5)
    for group in range(4):
        assert torch.allclose(mean[group], values[index == group].mean(0))
    assert size.tolist() == [5, 5, 5, 5, 0]
    assert not mean[4].any()


# ---- point maps and boxes --------------------------------------------------------------------------------------------


def test_unproject_follows_the_camera_model_and_project_inverts_it(scene):
    """Pixel centers lie at half-integers, depth runs along the camera's z axis; missing depth is NaN."""
    depth = scene.frames.depth.copy()
    poses = scene.frames.poses
    depth[1, 2, 3] = 0
    K = np.array([[20.0, 0, 11.1], [0, 25.0, 13.4], [0, 0, 1]])
    points = unproject(depth, np.stack([K, K]), poses)
    assert points.shape == (2, 24, 24, 3)
    assert points.dtype == np.float32
    assert np.isnan(points[1, 2, 3]).all()
    for v, i, j in np.argwhere(depth > 0):
        pixel = [j + 0.5, i + 0.5]
        ray = np.linalg.inv(K) @ [*pixel, 1]
        world = poses[v] @ [*(depth[v, i, j] * ray), 1]
        assert np.allclose(points[v, i, j], world[:3], atol=1e-4)
        assert np.allclose(project(points[v, i, j], K, poses[v])[0], pixel, atol=1e-4)


def test_iou_of_boxes_that_touch_contain_or_have_no_volume():
    """Every pair of [S, n, 6] and [S, m, 6] gives [S, n, m]; boxes without volume must not divide by zero."""
    unit = [0, 0, 0, 1, 1, 1]
    beside = [1, 0, 0, 1, 1, 1]
    half = [0, 0, 0, 0.5, 1, 1]
    flat = [0, 0, 0, 0, 1, 1]
    boxes = np.array([unit, beside, half, flat])
    iou = box_iou(boxes.reshape(2, 2, 6), np.stack([boxes, boxes]))
    first = [[1, 0, 0.5, 0], [0, 1, 0, 0]]
    second = [[0.5, 0, 1, 0], [0, 0, 0, 0]]
    assert np.allclose(iou, [first, second])


# ---- scenes ----------------------------------------------------------------------------------------------------------


def test_marks_and_nothing_else_are_replaced():
    """Ids have any number of digits; identifiers in the text are no marks."""
    text = substitute("is <obj 3> near <obj 12>, <obj 3> or <OBJ003>? <obj x>", lambda i: f"#{i}")
    assert text == "is #3 near #12, #3 or <OBJ003>? <obj x>"


def test_identifiers_are_different_random_and_belong_to_the_largest_things(rng):
    """An identifier that leaned on the order of objects would be learned instead of looked at."""
    heights = 1 + rng.permutation(130)
    things = [Thing(i, "box", "red", np.array([0, 0, 0, 1, 1, h])) for i, h in enumerate(heights)]
    seen = set()
    for _ in range(300):
        drawn = number_objects(Scene("s", "rooms", things), rng)
        assert set(drawn) == set(np.flatnonzero(heights > 30))
        assert sorted(drawn.values()) == list(range(100))
        seen.add(drawn[heights.argmax()])
    assert len(seen) > 80


def test_augmentation_moves_everything_alike(scene, rng):
    """Points stay inside the boxes of their objects, normals stay on their faces, bounds stay bounds, and what a camera
    sees lies, turned by `turn`, in the turned boxes."""
    world = world_points(scene.frames)
    turns = set()
    for _ in range(30):
        other = augment(scene, rng)
        turns.add(other.turn.tobytes())
        for o in other.objects:
            seen = world[scene.frames.masks == o.id] @ other.turn.T
            own = np.concatenate([other.points[other.instances == o.id], seen])
            assert (abs(own - o.box[:3]) <= o.box[3:] / 2 + 1e-4).all()
        assert np.allclose(other.normals, scene.normals @ other.turn.T)
        assert other.points.dtype == np.float32
        assert np.allclose(other.bounds, np.sort(scene.bounds @ other.turn.T, axis=0))
    assert len(turns) == 8  # every mirroring and transposition of the floor plan
    assert all(np.linalg.det(augment(scene, rng, mirror=False).turn) > 0 for _ in range(9))
