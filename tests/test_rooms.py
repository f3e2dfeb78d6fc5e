"""Procedural rooms: what the layout, the views and the cloud promise, checked the slow way."""

import itertools

import numpy as np
import pytest
from scipy.spatial import distance_matrix

from data import (
    CATEGORIES,
    COLORS,
    FURNITURE,
    MATERIALS,
    PARTS,
    ROOM_SEEDS,
    DataError,
    box_ends,
    box_iou,
    category_icon,
    fingerprint,
    load_scenes,
    ray_cast,
    room,
    rooms,
    unproject,
    world_points,
)


@pytest.fixture(scope="module")
def scenes():
    return [room(seed) for seed in range(900_000, 900_012)]


def test_a_seed_is_a_room_whoever_makes_it(tmp_path):
    """Workers, order and earlier calls must not leak into a room, nor where its frames are kept."""
    small = {"views": 2, "size": 32, "points": 256}
    alone, among = room(7, **small), rooms(range(10), workers=2, **small)
    assert fingerprint(alone) == fingerprint(among[7])
    assert repr(alone.objects) == repr(among[7].objects) != repr(among[8].objects)

    kept = rooms([7], folder=tmp_path, **small)[0].frames
    for name, array in vars(alone.frames).items():
        np.testing.assert_array_equal(getattr(kept, name), array, strict=True)


def test_rooms_take_no_options_of_readers():
    with pytest.raises(DataError, match="--data rooms: takes no masks"):
        load_scenes("rooms", "test", masks="sam2")


def test_seeds_of_the_splits_are_disjoint():
    for a, b in itertools.combinations(ROOM_SEEDS.values(), 2):
        assert a and b and not set(a) & set(b)


def test_every_row_of_the_furniture_table_fills_its_size_with_known_materials():
    """The size is what placement keeps free, and the box must equal the parts' extent."""
    assert len(CATEGORIES) >= 25 and all(name.isalpha() for name in CATEGORIES)
    for category, (ends, materials) in PARTS.items():
        low, high = np.moveaxis(ends, 2, 0)
        assert np.allclose([low.min(0), 1 - high.max(0)], 0), category
        assert (low < high).all(), category
        assert set(materials) <= {"", *MATERIALS}, category


def test_objects_are_disjoint_inside_the_room_and_stand_or_hang(scenes):
    """Moves and placements are checked for collision and support: the rooms must start without any violation."""
    for scene in scenes:
        boxes = np.array([o.box for o in scene.objects])
        assert np.allclose(box_iou(boxes, boxes), np.eye(len(boxes)), atol=1e-6)
        low, high = box_ends(boxes)
        gaps = np.array([low - scene.bounds[0], scene.bounds[1] - high])  # [2, n, 3]
        assert gaps.min() >= -1e-6
        for i, o in enumerate(scene.objects):
            where = FURNITURE[o.category][3]
            if where in ("hang", "window", "door"):
                assert gaps[:, i, :2].min() < 1e-6
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
        categories, colors = map(set, zip(*pairs, strict=True))
        assert 8 <= len(pairs) == len(scene.objects) <= 16
        assert colors <= set(COLORS)
        shared.append(len(categories) < len(pairs))
    assert np.mean(shared) > 0.6


def test_an_id_says_nothing_about_the_category(scenes):
    """Ids in order of placement would let a model read "door" from id 1."""
    assert len({s.objects[0].category for s in scenes}) > len(scenes) // 2


def test_pixels_and_points_lie_on_the_boxes_of_their_objects_and_on_walls(scenes):
    """Depth, masks, poses and the cloud say the same as the boxes; no pixel is without depth."""
    for scene in scenes[:4]:
        f = scene.frames
        seen = world_points(f)  # NaN without depth, which is inside nothing
        for xyz, owner, margin in ((seen, f.masks, 0.01), (scene.points, scene.instances, 1e-4)):
            for thing in scene.objects:
                low, high = box_ends(thing.box)
                own = xyz[owner == thing.id]
                assert ((own > low - margin) & (own < high + margin)).all()
            rest = xyz[owner == 0]  # of walls, floor and ceiling the nearest
            assert (np.abs(rest[:, None] - scene.bounds).min((1, 2)) < margin).all()


def test_the_cloud_is_what_a_scanner_returns(scenes):
    """A part of every object, no undersides, no ceiling."""
    for scene in scenes:
        assert np.allclose(np.linalg.norm(scene.normals, axis=1), 1)
        assert len(np.unique(scene.instances)) == len(scene.objects) + 1
        low_or_room = (scene.points[:, 2] < 1e-4) | (scene.instances == 0)
        assert (scene.normals[low_or_room, 2] >= 0).all()


def test_cameras_are_upright_in_the_room_and_in_no_object(scenes):
    for scene in scenes:
        low, high = box_ends(np.array([o.box for o in scene.objects]))
        for pose in scene.frames.poses:
            turn, eye = pose[:3, :3], pose[:3, 3]
            assert np.allclose(turn @ turn.T, np.eye(3))
            assert np.linalg.det(turn) > 0
            assert pose[2, 1] < 0  # y points down
            assert abs(pose[2, 0]) < 1e-12  # x is level
            assert np.min([eye - scene.bounds[0], scene.bounds[1] - eye]) > 0.1
            assert not ((eye > low) & (eye < high)).all(1).any()


def test_most_of_an_object_shows_its_color(scenes):
    """Names were given by the table; a shade that turns white into gray would make the answers wrong."""
    names = list(COLORS)
    centers = 0.92 * np.array([*COLORS.values()])
    right = []
    for scene in scenes[:6]:
        for thing in scene.objects:
            pixels = scene.frames.color[scene.frames.masks == thing.id]
            if len(pixels) >= 40:
                nearest = distance_matrix(pixels, centers).argmin(1)
                right.append(names[np.bincount(nearest).argmax()] == thing.color)
    assert np.mean(right) > 0.95


def test_the_ray_cast_equals_a_slab_test_of_all_pixels_and_boxes(rng):
    """Rectangles, painting and float32 must lose no pixel, also for boxes beside and behind the camera."""
    frames = room(1, points=0, views=1, size=24).frames
    eye = frames.poses[0, :3, 3]
    size = rng.uniform(0.05, 0.8, (40, 3))
    size[::4, 0] = size[1::4, 1] = 4  # beams that pass the camera along x and along y
    boxes = np.hstack([eye + rng.uniform(-2, 2, (40, 3)), size])
    low, high = box_ends(boxes[(abs(boxes[:, :3] - eye) > size / 2).any(1)])

    # of every pixel and box the last entry and the first exit over the three pairs of faces
    rays = unproject(np.ones((1, 24, 24)), frames.intrinsics, frames.poses).reshape(-1, 1, 3) - eye
    t = np.sort([(low - eye) / rays, (high - eye) / rays], axis=0)  # [2, P, B, 3]
    enter, leave = t[0].max(2), t[1].min(2)
    enter[(enter >= leave) | (enter <= 0.01)] = np.inf
    first = enter.min(1)
    truth = np.where(np.isinf(first), len(low), enter.argmin(1))

    cast = ray_cast(low, high, frames.poses[0], 24, np.array([eye - 9, eye + 9]))
    depth, box, _ = (image.ravel() for image in cast)
    assert (box != truth).sum() <= 1  # a ray through an edge may round either way
    hit = (box == truth) & np.isfinite(first)
    assert hit.sum() > 50
    assert np.allclose(depth[hit], first[hit], atol=1e-4)


def test_faces_that_touch_have_no_points(scenes):
    """The legs of a table end under its top: all that faces upwards on a table is the top itself. Hidden points would
    teach an encoder surfaces that no scanner ever returns."""
    heights = []
    for scene in scenes:
        for thing in scene.objects:
            if thing.category in ("table", "bench", "stool"):
                up = (scene.instances == thing.id) & (scene.normals[:, 2] == 1)
                _, top = box_ends(thing.box)
                heights += [*(scene.points[up, 2] - top[2])]
    assert np.abs(heights).max() < 1e-5


def test_superpoints_are_flat_pieces_of_one_object_of_at_most_a_meter(scenes):
    for scene in scenes[:3]:
        sp = scene.superpoints
        count = sp.max() + 1
        pieces = np.column_stack([sp, scene.instances, scene.normals])
        assert len(np.unique(pieces, axis=0)) == count
        for i in range(count):
            assert np.ptp(scene.points[sp == i], axis=0).max() <= 1 + 1e-5


def test_a_room_grows_with_its_objects_as_far_as_there_are_colors():
    for count in (3, 200):
        scene = room(5, objects=count, views=0, points=0)
        assert scene.frames is scene.points is None
        assert len({(o.category, o.color) for o in scene.objects}) == len(scene.objects) == count
    sizes = [len(room(seed, objects=(3, 48), views=0, points=0).objects) for seed in range(40)]
    assert 12 <= sum(n < 12 for n in sizes) <= 28, "as many below the middle of 3, 12, 48 as above"
    for wrong in (5000, (9, 8), (3, 4, 5)):
        with pytest.raises(ValueError, match=r"objects = .*; give 3 to \d+"):
            room(0, objects=wrong)


def test_icons_fill_the_image_and_differ():
    """Symbols of stage I: two categories with one icon could never be told apart."""
    icons = np.array([category_icon(name, "red", 48) for name in [*CATEGORIES, "unicorn"]])
    for icon in icons:
        places = np.argwhere(icon.any(2))
        assert np.ptp(places, axis=0).max() >= 0.6 * 48
        assert 0 < places.min() < places.max() < 47
    for a, b in itertools.combinations(icons, 2):
        assert (a != b).any(2).mean() > 0.03
    assert not np.array_equal(category_icon("chair", "red", 48), category_icon("chair", "blue", 48))
