"""Scenes and geometry that every paper uses, against slow and obvious versions."""

import numpy as np
import pytest
import torch

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
)


@pytest.fixture(scope="module")
def scene():
    return room(3, views=2, size=24, points=300)


def random_points(count):
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(0))


# ---- neighbors and groups --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 30])
def test_knn_equals_sorting_all_distances(k):
    """k = 1 is a case of its own: a tree then returns one axis less."""
    queries, points = random_points(37).split([7, 30])
    distance, index = knn(queries, points, k)
    assert distance.shape == index.shape == (7, k)
    for q in range(7):
        every = (points - queries[q]).norm(dim=1)
        nearest = every.argsort()[:k]
        assert index[q].tolist() == nearest.tolist()
        assert torch.allclose(distance[q], every[nearest], atol=1e-6)


def test_farthest_point_sampling_equals_a_loop():
    """Each point is the farthest from all chosen before it."""
    points = random_points(40)
    center = points.mean(0)
    chosen = [max(range(40), key=lambda i: float((points[i] - center).norm()))]
    while len(chosen) < 12:
        gaps = torch.cdist(points, points[chosen]).min(1).values
        chosen.append(int(gaps.argmax()))
    assert farthest_point_sampling(points, 12).tolist() == chosen


def test_a_group_mean_equals_a_loop_and_is_zero_where_a_group_is_empty():
    values = random_points(20)
    index = torch.arange(20) % 4
    mean, size = group_mean(values, index, 5)
    for group in range(4):
        assert torch.allclose(mean[group], values[index == group].mean(0))
    assert size.tolist() == [5, 5, 5, 5, 0] and (mean[4] == 0).all()


# ---- point maps and boxes --------------------------------------------------------------------------------------------


def test_unproject_follows_the_camera_model_and_project_inverts_it(scene):
    """Pixel centers lie at half-integers, depth runs along the camera's z axis; missing depth is NaN."""
    depth, poses = scene.frames.depth.copy(), scene.frames.poses
    depth[1, 2, 3] = 0
    K = np.array([[20.0, 0, 11.1], [0, 25.0, 13.4], [0, 0, 1]])
    points = unproject(depth, np.stack([K, K]), poses)
    assert points.shape == (2, 24, 24, 3) and points.dtype == np.float32
    assert np.isnan(points[1, 2, 3]).all()
    for v, i, j in np.argwhere(depth > 0):
        pixel = [j + 0.5, i + 0.5]
        ray = np.linalg.inv(K) @ [*pixel, 1]
        world = poses[v] @ [*(depth[v, i, j] * ray), 1]
        assert np.allclose(points[v, i, j], world[:3], atol=1e-4)
        assert np.allclose(project(points[v, i, j], K, poses[v])[0], pixel, atol=1e-4)


def test_iou_of_boxes_that_touch_contain_or_have_no_volume():
    """Every pair of [S, n, 6] and [S, m, 6] gives [S, n, m]; boxes without volume must not divide by zero."""
    unit, beside, half, flat = np.tile([0, 0, 0, 1, 1, 1.0], (4, 1))
    beside[0], half[3], flat[3] = 1, 0.5, 0
    boxes = np.stack([unit, beside, half, flat])
    iou = box_iou(boxes.reshape(2, 2, 6), np.stack([boxes, boxes]))
    assert np.allclose(iou[0], [[1, 0, 0.5, 0], [0, 1, 0, 0]])
    assert np.allclose(iou[1], [[0.5, 0, 1, 0], [0, 0, 0, 0]])


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
    frames = scene.frames
    world = unproject(frames.depth, frames.intrinsics, frames.poses)
    turns = set()
    for _ in range(30):
        other = augment(scene, rng)
        turns.add(other.turn.tobytes())
        for o in other.objects:
            seen = world[frames.masks == o.id] @ other.turn.T
            own = np.concatenate([other.points[other.instances == o.id], seen])
            assert (np.abs(own - o.box[:3]) <= o.box[3:] / 2 + 1e-4).all()
        assert np.allclose(other.normals, scene.normals @ other.turn.T) and other.points.dtype == np.float32
        assert np.allclose(other.bounds, np.sort(scene.bounds @ other.turn.T, axis=0))
    assert len(turns) == 8  # every mirroring and transposition of the floor plan
    assert all(np.linalg.det(augment(scene, rng, mirror=False).turn) > 0 for _ in range(9))
