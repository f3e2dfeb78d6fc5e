"""Pictures: what is drawn lies where geometry says, and every kind of scene gives one that is not blank.

pytest tests/test_pictures.py
"""

from dataclasses import replace
from itertools import combinations

import bench
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import data
from data import (
    View,
    corner_camera,
    draw_scene,
    merge_segments,
    project,
    read_answer,
    read_masks,
    render_masks,
    room,
    spread_labels,
    unproject,
    z_buffer,
)

LOW, HIGH = np.array([-2.0, -1.0, 0.0]), np.array([3.0, 4.0, 2.5])


@pytest.fixture(scope="module")
def scene():
    made = room(3, objects=9, views=3, size=48, points=600)
    made.identifiers = data.number_objects(made, np.random.default_rng(0))
    return made


def test_project_undoes_unproject_and_what_is_behind_has_no_pixel(scene):
    """Pixel centres lie at halves."""
    f = scene.frames
    points = unproject(f.depth[:1], f.intrinsics[:1], f.poses[:1])[0]
    pixels, depth = project(points.astype(float), f.intrinsics[0], f.poses[0])
    v, u = np.indices(f.depth[0].shape) + 0.5
    seen = f.depth[0] > 0
    assert seen.mean() > 0.9
    assert np.allclose(pixels[seen], np.stack([u, v], -1)[seen], atol=1e-3)
    assert np.allclose(depth[seen], f.depth[0][seen], atol=1e-4)
    behind = f.poses[0, :3, 3] - f.poses[0, :3, 2]
    pixels, depth = project(behind, f.intrinsics[0], f.poses[0])
    assert np.isnan(pixels).all() and depth == pytest.approx(-1)


@pytest.mark.parametrize("sides", [(-1, -1), (-1, 1), (1, -1), (1, 1)])
def test_the_corner_camera_has_the_room_in_view_upright_and_its_own_corner_nearest(sides):
    H, W = 300, 400
    corners = np.array([[x, y, z] for x in (LOW[0], HIGH[0]) for y in (LOW[1], HIGH[1]) for z in (LOW[2], HIGH[2])])
    pixels, depth = project(corners, *corner_camera(LOW, HIGH, sides, (H, W)))
    assert (pixels > 0).all() and (pixels < [W, H]).all() and (depth > 0).all()
    assert np.ptp(pixels, axis=0).max() > 0.8 * H, "it fills the image"
    assert (pixels[0::2, 1] > pixels[1::2, 1]).all(), "the floor is below the ceiling"
    nearest = corners[depth.argmin(), :2]
    assert np.array_equal(nearest, np.where(np.array(sides) > 0, HIGH[:2], LOW[:2]))


def test_a_point_lands_where_the_panel_says_in_both_views():
    """`place` is what axes draw at and `pixels` what the cloud is drawn at: they agree, from above to the metre."""
    camera = corner_camera(LOW, HIGH, (1, 1), (300, 400))
    points = np.array([[0.5, 1.5, 0.0], [2.0, 3.0, 2.0], [-1.0, 0.0, 1.0]])
    for view in (View(Figure().add_subplot(), (300, 400), LOW, HIGH),
                 View(Figure().add_subplot(), (300, 400), LOW, HIGH, camera)):  # fmt: skip
        (x0, x1), (y0, y1) = view.axis.get_xlim(), view.axis.get_ylim()
        share = (view.place(points) - [x0, y1]) / [x1 - x0, y0 - y1]  # from the upper left corner
        assert np.allclose(view.pixels(points)[0], share * [400, 300])
    above = View(Figure().add_subplot(), (300, 400), LOW, HIGH)
    pixels, depth = above.pixels(points)
    assert np.array_equal(above.place(points), points[:, :2])
    assert np.allclose(pixels[0], [200, 150]), "the middle of the room is the middle of the panel"
    assert depth.argmin() == 1, "what is high is near the eye"
    grown = np.diff(above.pixels(np.array([[0.0, 0, 0], [1.0, 0, 0]]))[0], axis=0)[0]
    assert np.allclose(grown, [above.scale, 0]) and above.scale * 5 < 300


def test_the_nearest_disc_shows():
    pixels = np.array([[10.5, 10.5], [12.5, 10.5], [np.nan, 3.0], [19.5, 0.5]])
    which = z_buffer(pixels, np.array([2.0, 1.0, 0.1, 5.0]), np.array([3.0, 1.0, 3.0, 2.0]), (20, 20))
    slow = np.full((20, 20), -1)
    for y in range(20):
        for x in range(20):
            hits = [(z, i) for i, ((u, v), z, r) in enumerate(zip(
                pixels, (2.0, 1.0, 0.1, 5.0), (3.0, 1.0, 3.0, 2.0), strict=True))
                if not np.isnan(u) and (x - int(u)) ** 2 + (y - int(v)) ** 2 <= r * r]  # fmt: skip
            slow[y, x] = min(hits, default=(0, -1))[1]
    assert np.array_equal(which, slow)
    assert which[10, 12] == 1 and which[10, 10] == 0 and which[19, 0] == -1


def test_labels_stay_inside_and_apart_and_near_their_place():
    """A crowd of sixty in 300 x 300 pixels; a label wider than the panel finds no room."""
    anchors = np.random.default_rng(0).uniform(0, 300, (60, 2))
    sizes = np.tile([30.0, 9.0], (60, 1))
    sizes[7] = [400.0, 9.0]
    taken = np.array([[150.0, 150.0, 50.0, 20.0]])
    placed = spread_labels(anchors, sizes, (300, 300), taken)
    assert np.isnan(placed[7]).all() and np.isfinite(np.delete(placed, 7, 0)).all()
    boxes = [*taken[0:1], *np.concatenate([placed, sizes / 2], 1)[np.isfinite(placed[:, 0])]]
    for a, b in combinations(boxes, 2):
        assert (np.abs(a[:2] - b[:2]) >= a[2:] + b[2:] - 1e-9).any()
    assert all((b[:2] - b[2:] >= 0).all() and (b[:2] + b[2:] <= 300).all() for b in boxes)
    assert np.nanmax(np.linalg.norm(placed - anchors, axis=1)) < 150
    assert np.array_equal(spread_labels(np.array([[50.0, 50]]), np.array([[30.0, 9]]), (300, 300), taken), [[50, 50]])


def test_answers_are_read_as_places_named_before_and_after_the_equals_sign():
    named, places, rest = read_answer("red sofa [1.00, 2.00, 0.50] door [0.00, 2.00, 1.00] x1.00 x0.00 1.00 = 1.12")
    assert [n for n, _ in named] == ["red sofa", "door"] and not places and rest == "1.12"
    named, places, rest = read_answer("lamp [0, 0, 1, 1, 1, 2] x0.00 right 0.50 x0.50 = [0.50, 0, 1, 1, 1, 2]")
    assert [len(v) for _, v in named] == [6] and places[0][0] == 0.5 and rest == ""
    assert read_answer("[1, 2, 3]")[1][0].tolist() == [1, 2, 3] and read_answer("[1, 2] nan = [x, y, z]")[1] == []


KINDS = {
    "as it is": lambda s: s,
    "one wide frame": lambda s: replace(s, frames=data.Frames(*(
        x[:1, :20] if x.ndim > 2 and x.shape[1] == 48 else x[:1] for x in vars(s.frames).values()))),
    "a bare cloud": lambda s: replace(s, frames=None),
    "no objects": lambda s: replace(s, frames=None, objects=[], instances=None),
    "no colour": lambda s: replace(s, frames=None, objects=[], instances=None, colours=None, normals=None),
    "no metres": lambda s: replace(s, metric=False),
    "one point": lambda s: replace(s, frames=None, objects=[], points=s.points[:1], colours=s.colours[:1],
                                   normals=s.normals[:1], instances=None),
    "no points": lambda s: replace(s, frames=None, points=None, colours=None, normals=None, instances=None),
    "nothing": lambda s: replace(s, frames=None, objects=[], points=None, colours=None, normals=None, instances=None),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_scene_gives_a_picture(scene, kind, tmp_path):
    """Answers, tokens and lines of text with it; counted are the colours that a blank picture lacks."""
    answer = "lamp [0, 0, 1, 1, 1, 2] = [0.50, 0, 1, 1, 1, 2]"
    draw_scene(KINDS[kind](scene), tmp_path / "new" / "x.png", ["a line", "another"], np.zeros((2, 3)),
               [answer, "a [0, 0, 1] b [1, 0, 0] = 1.41"])  # fmt: skip
    image = Image.open(tmp_path / "new" / "x.png").convert("RGB")
    colours = len(image.getcolors(1 << 24))
    assert min(image.size) > 500 and colours > (200 if kind in ("one point", "no points", "nothing") else 1000), colours


def test_an_answer_and_a_box_are_drawn_at_their_place(tmp_path):
    """From above: the pixels that an answered box adds lie around its outline."""
    size, box = (600, 800), np.array([1.0, 2.0, 0.5, 1.0, 0.5, 1.0])
    figure = Figure(figsize=(8, 6), dpi=100)
    view = View(figure.add_axes((0, 0, 1, 1)), size, LOW, HIGH)
    data.draw_answer(view, "[1.00, 2.00, 0.50, 1.00, 0.50, 1.00]", "red")
    figure.savefig(tmp_path / "x.png")
    image = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int)
    rows, columns = np.nonzero((image[..., 0] > 200) & (image[..., 1] < 60))
    corners = view.pixels(box[:3] + np.array([[-0.5, -0.25, 0], [0.5, 0.25, 0]]) * box[3:] / [1.0, 0.5, 1.0])[0]
    assert np.allclose([columns.min(), columns.max()], sorted(corners[:, 0]), atol=3)
    assert np.allclose([rows.min(), rows.max()], sorted(corners[:, 1]), atol=3)


def test_masks_come_back_from_the_cloud_they_were_rendered_from(scene):
    points, _, _ = data.surface(scene)
    ids = read_masks(points, scene.frames)
    again = render_masks(points, ids, scene.frames)
    seen = scene.frames.depth > 0
    assert (again == scene.frames.masks)[seen].mean() > 0.95
    assert set(ids.tolist()) <= {0, *(o.id for o in scene.objects)}


def test_point_iou_counts_points():
    rng = np.random.default_rng(0)
    found, true = rng.integers(0, 5, 300), rng.integers(0, 4, 300)
    slow = [[(((found == i) & (true == j)).sum()) / ((found == i) | (true == j)).sum() for j in range(1, 4)]
            for i in range(1, 5)]  # fmt: skip
    assert np.allclose(bench.point_iou(found, true), slow)
    assert np.array_equal(bench.point_iou(true, true), np.eye(3))


def box(low, high, colour, step=0.03):
    """Points, outward normals and colours of a box without its bottom, which no camera sees."""
    low, high, parts = np.array(low), np.array(high), []
    for axis, side in ((0, -1), (0, 1), (1, -1), (1, 1), (2, 1)):
        spans = [np.arange(a, b + 1e-9, step) for a, b in zip(low, high, strict=True)]
        spans[axis] = [(low, high)[side > 0][axis]]
        points = np.stack(np.meshgrid(*spans, indexing="ij"), -1).reshape(-1, 3)
        parts.append(np.concatenate([points, np.tile(side * np.eye(3)[axis], (len(points), 1))], 1))
    rows = np.concatenate(parts)
    return rows[:, :3].astype(np.float32), rows[:, 3:].astype(np.float32), np.tile(np.uint8(colour), (len(rows), 1))


def test_a_pane_joins_its_frame_and_a_pillow_stays_apart_from_the_bed():
    """Both lie within the other's box and differ in colour: that is forgiven only where nothing rests on anything."""
    wood = (125, 80, 45)
    mirror = box([0, 0, 1], [0.06, 1.2, 2.2], wood)
    pane = (np.abs(mirror[0][:, 1:] - [0.6, 1.6]) < 0.4).all(1)
    mirror[2][pane] = (150, 200, 240)
    bed = [box([2, 0, 0], [3.5, 2, 0.5], wood), box([2, 2, 0], [3.5, 2.09, 1.2], wood)]
    pillow = box([2.5, 1.4, 0.5], [3.1, 1.8, 0.62], (178, 173, 162))
    parts = [mirror, *bed, pillow]
    label = merge_segments(*map(np.concatenate, zip(*parts, strict=True)),
                           np.repeat(range(4), [len(p[0]) for p in parts]))  # fmt: skip
    first, *_, last = np.split(label, np.cumsum([len(p[0]) for p in parts])[:-1])
    most = lambda x: np.bincount(x).argmax()  # noqa: E731
    assert most(first[pane]) == most(first[~pane]) > 0
    assert 0 < most(last) != most(label[len(first) : -len(last)]) > 0
