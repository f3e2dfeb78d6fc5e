"""Procedural rooms: what the layout, the views and the cloud promise, checked the slow way."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from data import (
    CATEGORIES,
    COLORS,
    FURNITURE,
    MATERIALS,
    PARTS,
    ROOM_SEEDS,
    box_ends,
    box_iou,
    category_icon,
    fingerprint,
    ray_cast,
    room,
    rooms,
    unproject,
)

SEEDS = range(900_000, 900_012)


@pytest.fixture(scope="module")
def scenes():
    return [room(seed) for seed in SEEDS]


def test_a_seed_is_a_room_whoever_makes_it():
    """Workers, order and earlier calls must not leak into a room: a run on 2 processes trains on the same data."""
    small = {"views": 2, "size": 32, "points": 256}
    alone, among = room(7, **small), rooms(range(10), workers=2, **small)[7]
    assert fingerprint(alone) == fingerprint(among)
    assert repr(alone.objects) == repr(among.objects)
    assert fingerprint(alone) != fingerprint(replace(room(8, **small), name=alone.name))


def test_seeds_of_the_splits_are_disjoint():
    for a, b in itertools.combinations(ROOM_SEEDS.values(), 2):
        assert len(a) and len(b)
        assert a[-1] < b[0] or b[-1] < a[0]


def test_every_row_of_the_furniture_table_fills_its_size_with_known_materials():
    """The size is what placement keeps free, and the box must equal the parts' extent."""
    assert len(CATEGORIES) >= 25 and all(name.isalpha() for name in CATEGORIES)
    for category, (ends, materials) in PARTS.items():
        low, high = ends[..., 0], ends[..., 1]
        assert np.allclose(low.min(0), 0), category
        assert np.allclose(high.max(0), 1), category
        assert (low < high).all(), category
        assert set(materials) <= {"", *MATERIALS}, category


def test_objects_are_disjoint_inside_the_room_and_stand_or_hang(scenes):
    """Moves and placements are checked for collision and support: the rooms must start without any violation."""
    for scene in scenes:
        boxes = np.array([o.box for o in scene.objects])
        assert np.allclose(box_iou(boxes, boxes), np.eye(len(boxes)), atol=1e-6)
        low, high = box_ends(boxes)
        assert (low >= scene.bounds[0] - 1e-6).all()
        assert (high <= scene.bounds[1] + 1e-6).all()
        for i, o in enumerate(scene.objects):
            where = FURNITURE[o.category][3]
            if where in ("hang", "window", "door"):
                to_walls = [low[i] - scene.bounds[0], scene.bounds[1] - high[i]]
                assert np.min(to_walls, axis=0)[:2].min() < 1e-6
            elif where == "top":  # exactly one thing below, which carries all of it
                around = (low <= low[i] + 1e-6) & (high >= high[i] - 1e-6)
                touches = np.abs(high[:, 2] - low[i, 2]) < 1e-6
                assert (around[:, :2].all(1) & touches).sum() == 1
            else:
                assert abs(low[i, 2]) < 1e-9


def test_a_category_and_a_color_name_one_object(scenes):
    """ "the red chair" is the right answer only if there is one; "the chair" alone must often not be enough."""
    shared = []
    for scene in scenes:
        pairs = {(o.category, o.color) for o in scene.objects}
        assert 8 <= len(pairs) == len(scene.objects) <= 16
        assert {color for _, color in pairs} <= set(COLORS)
        shared.append(len({category for category, _ in pairs}) < len(pairs))
    assert np.mean(shared) > 0.6


def test_an_id_says_nothing_about_the_category(scenes):
    """Ids in order of placement would let a model read "door" from id 1."""
    assert len({s.objects[0].category for s in scenes}) > len(scenes) // 2


def assert_inside(points, box, margin):
    low, high = box_ends(box)
    assert ((points > low - margin) & (points < high + margin)).all()


def distance_to_faces(points, bounds):
    """From each point to the nearest of a room's walls, floor and ceiling."""
    return np.abs(points[:, None] - bounds).min((1, 2))


def test_depth_masks_and_poses_agree_with_the_boxes(scenes):
    """A pixel of an object unprojects onto its box, any other onto a wall, the floor or the ceiling."""
    for scene in scenes[:4]:
        f = scene.frames
        xyz = unproject(f.depth, f.intrinsics, f.poses)
        assert f.color.shape == (12, 96, 96, 3) and f.color.dtype == np.uint8
        assert (f.depth > 0).all()
        for thing in scene.objects:
            assert_inside(xyz[f.masks == thing.id], thing.box, 0.01)
        assert (distance_to_faces(xyz[f.masks == 0], scene.bounds) < 0.01).all()


def test_cameras_are_upright_in_the_room_and_in_no_object(scenes):
    for scene in scenes:
        low, high = box_ends(np.array([o.box for o in scene.objects]))
        for pose in scene.frames.poses:
            turn, eye = pose[:3, :3], pose[:3, 3]
            assert np.allclose(turn @ turn.T, np.eye(3))
            assert np.linalg.det(turn) > 0
            assert pose[2, 1] < 0  # y points down
            assert abs(pose[2, 0]) < 1e-12  # x is level
            assert (eye > scene.bounds[0] + 0.1).all()
            assert (eye < scene.bounds[1] - 0.1).all()
            assert not ((eye > low) & (eye < high)).all(1).any()


def test_most_of_an_object_shows_its_color(scenes):
    """Names were given by the table; a shade that turns white into gray would make the answers wrong."""
    names, centers = list(COLORS), 0.92 * np.array(list(COLORS.values()), float)
    right = []
    for scene in scenes[:6]:
        for thing in scene.objects:
            pixels = scene.frames.color[scene.frames.masks == thing.id].astype(float)
            if len(pixels) >= 40:
                nearest = ((pixels[:, None] - centers) ** 2).sum(-1).argmin(1)
                right.append(names[np.bincount(nearest).argmax()] == thing.color)
    assert np.mean(right) > 0.95


def test_the_ray_cast_equals_a_slab_test_of_all_pixels_and_boxes():
    """Rectangles, painting and float32 must lose no pixel, also for boxes beside and behind the camera."""
    rng = np.random.default_rng(0)
    frames = room(1, points=0, views=1, size=24).frames
    eye = frames.poses[0, :3, 3]
    low = eye + rng.uniform(-2, 2, (40, 3))
    high = low + rng.uniform(0.05, 0.8, (40, 3))
    low[:4, 0] -= 4  # beams that pass the camera along x and along y
    low[4:8, 1] -= 4
    outside = ((low > eye) | (high < eye)).any(1)
    assert outside[:8].all()
    low, high = low[outside], high[outside]

    # of every pixel and box the last entry and the first exit over the three pairs of faces
    rays = unproject(np.ones((1, 24, 24)), frames.intrinsics, frames.poses).reshape(-1, 1, 3) - eye
    t = np.sort([(low - eye) / rays, (high - eye) / rays], axis=0)  # [2, P, B, 3]
    enter, leave = t[0].max(2), t[1].min(2)
    enter[(enter >= leave) | (enter <= 0.01)] = np.inf
    truth = np.where(np.isinf(enter.min(1)), -1, enter.argmin(1))

    depth, box, _, _ = ray_cast(low, high, frames.poses[0], 24)
    assert (box != truth).sum() <= 1  # a ray through an edge may round either way
    hit = (box == truth) & (box >= 0)
    assert hit.sum() > 50 and (box[hit] < 8).any()
    assert np.allclose(depth[hit], enter.min(1)[hit], atol=1e-4)


def test_the_cloud_lies_on_what_can_be_seen(scenes):
    """No point inside a table leg: hidden points would teach an encoder surfaces that no scanner ever returns."""
    scene = scenes[0]
    assert len(scene.points) == 4096
    assert np.allclose(np.linalg.norm(scene.normals, axis=1), 1)
    assert len(np.unique(scene.instances)) == len(scene.objects) + 1
    for thing in scene.objects:
        assert_inside(scene.points[scene.instances == thing.id], thing.box, 1e-4)
    on_floor = scene.points[:, 2] < 1e-4
    assert (scene.normals[on_floor, 2] >= 0).all()  # no undersides
    walls = scene.points[scene.instances == 0]
    assert (distance_to_faces(walls, scene.bounds) < 1e-4).all()
    assert walls[:, 2].max() < scene.bounds[1, 2]  # no ceiling


def test_faces_that_touch_have_no_points(scenes):
    """The legs of a table end under its top: all that faces upwards on a table is the top itself."""
    heights = []
    for scene in scenes:
        for thing in scene.objects:
            if thing.category in ("table", "bench", "stool"):
                up = (scene.instances == thing.id) & (scene.normals[:, 2] == 1)
                heights += [*(scene.points[up, 2] - thing.box[2] - thing.box[5] / 2)]
    assert heights and np.abs(heights).max() < 1e-5


def test_superpoints_are_flat_pieces_of_one_object_of_at_most_a_meter(scenes):
    for scene in scenes[:3]:
        sp = scene.superpoints
        assert sp.dtype == np.int64 and np.array_equal(np.unique(sp), np.arange(sp.max() + 1))
        for i in range(sp.max() + 1):
            inside = sp == i
            assert len(np.unique(scene.instances[inside])) == 1
            assert len(np.unique(scene.normals[inside], axis=0)) == 1
            assert np.ptp(scene.points[inside], axis=0).max() <= 1 + 1e-5


def test_a_room_grows_with_its_objects_as_far_as_there_are_colors():
    for count in (3, 200):
        scene = room(5, objects=count, views=0, points=0)
        assert len(scene.objects) == count and scene.frames is None and scene.points is None
        assert len({(o.category, o.color) for o in scene.objects}) == count
    with pytest.raises(ValueError, match=r"objects = 5000; give 3 to \d+"):
        room(0, objects=5000)


def test_icons_fill_the_image_and_differ():
    """Symbols of stage I: two categories with one icon could never be told apart."""
    icons = np.array([category_icon(name, "red", 48) for name in [*CATEGORIES, "unicorn"]])
    for icon in icons:
        places = np.argwhere(icon.any(2))
        assert np.ptp(places, axis=0).max() >= 0.6 * 48
        assert places.min() > 0 and places.max() < 47
    for a, b in itertools.combinations(icons, 2):
        assert (a != b).any(2).mean() > 0.03
    assert not np.array_equal(category_icon("chair", "red", 48), category_icon("chair", "blue", 48))
