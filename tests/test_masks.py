"""Objects without labels (data.py, sections 9 and 9b): superpoints, own segments, and SAM 2's tracks made objects.

What surrounds SAM 2 is tested with a stand-in that knows the true masks of a procedural room; tests/test_own_room.py
asks the real network, tiny and untrained, where the package is installed (data.INSTALL).
"""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from bench import best_iou
from papers import refused
from scipy.spatial import Delaunay
from test_video import oracle

import data
from data import (
    merge_tracks,
    over_segment,
    room,
    sam2_masks,
    with_own_segments,
    with_tracks,
    world_points,
)


@pytest.fixture(scope="module")
def furnished():
    return [room(seed, size=64, points=20_000) for seed in range(900_000, 900_003)]


# ---- superpoints


def slow_segmentator(points, faces):
    """ScanNet's segmentator with a label per point: three edges per face, the lightest first."""
    normals = data.vertex_normals(points, faces)
    edges = []
    for i, j, k in faces:
        for a, b in ((i, j), (i, k), (k, j)):
            bend = 1 - normals[a] @ normals[b]
            convex = normals[b] @ (points[b] - points[a]) > 0
            edges.append((bend**2 if convex else bend, a, b))
    edges.sort()

    # first what bends little, for the size of what it joins; then what has less than 20 points
    label = np.arange(len(points))
    limit = np.full(len(points), 0.01)
    for small in (0, 20):
        for weight, a, b in edges:
            p, q = label[a], label[b]
            sizes = np.bincount(label)[[p, q]]
            smooth = not small and weight <= min(limit[p], limit[q])
            if p != q and (smooth or sizes.min() < small):
                label[label == q] = p
                limit[p] = weight + 0.01 / sizes.sum()
    return label + 1


def refines(a, b):
    """No label of a but 0, which is none, holds two of b."""
    pairs = np.unique([a[a > 0], b[a > 0]], axis=1)
    return len(np.unique(pairs[0])) == pairs.shape[1]


def test_a_mesh_is_segmented_as_scannets_segmentator_does(rng):
    """A crumpled sheet with a step and ridges, of 900 vertices."""
    x, y = rng.uniform(0, 0.6, (2, 900))
    step = 0.15 * (x > 0.3)
    ridges = 0.1 * abs(np.sin(9 * y))
    z = step + ridges + rng.normal(0, 0.0005, 900)
    points = np.float32([x, y, z]).T
    faces = Delaunay(points[:, :2]).simplices

    found = over_segment(points, faces=faces)
    slow = slow_segmentator(points, faces)
    assert refines(found + 1, slow)
    assert refines(slow, found)
    assert found.max() > 2
    assert np.bincount(found).min() >= 20


def patch(x, y, z, step=0.01):
    """Points [h, w, 3] of a level rectangle: x, y = (from, to), z, meters."""
    across, along = np.arange(*x, step), np.arange(*y, step)
    axes = np.meshgrid(across, along, z, indexing="ij")
    return np.stack(axes, axis=-1)[:, :, 0]


def test_a_bare_floor_and_wall_are_two_superpoints_whatever_the_order_of_points(rng):
    floor = patch((0.02, 0.5), (0, 0.5), 0, 0.03).reshape(-1, 3)
    points = np.concatenate([floor, floor[:, ::-1]])
    order = rng.permutation(len(points))
    level = order < len(floor)
    normals = np.eye(3)[2 * level]  # along z on the floor, along x on the wall
    found = over_segment(points[order], normals)
    assert refines(found + 1, level)
    assert refines(level + 1, found)


def test_hardly_any_points_are_still_superpoints(rng):
    points = rng.random((5, 3))
    for count in (2, 5):
        assert over_segment(points[:count], points[:count]).tolist() == [0] * count


# ---- own segments


def test_own_segments_of_rooms_follow_their_objects():
    """From frames alone, in rooms on which no constant was set: mean IoU of points over objects seen well.

    The floor belongs to none."""
    scores = []
    for seed in range(900_101, 900_107):
        truth = room(seed, points=0)
        found = with_own_segments(truth)
        floor = (found.points[:, 2] < 0.01) & (found.normals[:, 2] > 0.95)
        assert np.mean(found.instances[floor] > 0) < 0.1
        pixels = world_points(truth.frames).reshape(-1, 3)
        _, index = data.nearest(found.points, pixels)
        true = truth.frames.masks.ravel()[index[:, 0]]
        seen = [true == i for i in np.unique(true[true > 0])]
        scores += [best_iou(found.instances, own) for own in seen if own.sum() >= 10]
    assert np.mean(scores) >= 0.8


def test_predicted_masks_in_scannet_s_format_become_objects_and_the_surest_wins(tmp_path):
    """Masks of their pixels are rendered when the frames are looked at."""
    scan = data.read_scannet(data.write_scannet(room(0, views=6, points=8000), tmp_path))
    things = [o.id for o in scan.objects[:3]]
    everywhere = np.ones(len(scan.points))  # less sure than the others
    lines = []
    for k, mask in enumerate([everywhere, *(scan.instances == i for i in things)], start=1):
        np.savetxt(tmp_path / f"{k}.txt", mask, "%d")
        lines.append(f"{k}.txt 5 {0.2 * k}\n")
    (tmp_path / f"{scan.name}.txt").write_text("".join(lines))

    found = data.with_predicted_masks(scan, tmp_path)
    assert [o.id for o in found.objects] == [1, 2, 3, 4]
    for k, i in enumerate(things, start=2):
        assert np.array_equal(found.instances == k, scan.instances == i)
    assert isinstance(found.frames, data.LazyFrames)
    shown = found.frames.masks[np.isin(scan.frames.masks, things)]
    assert (shown > 1).mean() > 0.8
    with refused(r"other.txt: list of masks .* missing"):
        data.with_predicted_masks(replace(scan, name="other"), tmp_path)


# ---- tracks


class TrueMasks:
    """SAM 2's video predictor where `sam2_masks` uses it: it follows what it is shown until that leaves the view."""

    device = torch.device("cpu")

    def __init__(self, masks):
        self.masks = masks

    def init_state(self, folder, **options):
        return {}

    def add_new_mask(self, state, frame, track, mask):
        state[track] = np.bincount(self.masks[frame][mask]).argmax()

    def propagate_in_video(self, state, key, reverse):
        followed = dict(state)
        frames = range(len(self.masks))
        for v in frames[key::-1] if reverse else frames[key:]:
            followed = {t: o for t, o in followed.items() if o in self.masks[v]}
            shown = np.stack([self.masks[v] == followed.get(t, -1) for t in state])
            yield v, list(state), torch.from_numpy(20.0 * shown - 10.0)[:, None].float()

    def reset_state(self, state):
        state.clear()


def propose_truth(frames):
    """Automatic masks that are right: the wall, every object, and of those that fit in a view the upper part."""

    def propose(model, image):
        v = (frames.color == image).all((1, 2, 3)).argmax()
        shown = frames.masks[v]
        whole = [shown == i for i in np.unique(shown)]
        upper = np.arange(64)[:, None] < 32
        return whole + [mask & upper for mask in whole if mask.mean() <= 0.5]

    return propose


def test_every_object_on_a_keyframe_comes_back_as_tracks_with_its_true_pixels(furnished, monkeypatch):
    """All that the stand-in follows from a keyframe until it leaves the view; the wall and parts start no track."""
    for scene in furnished:
        f = scene.frames
        monkeypatch.setattr(data, "automatic_masks", propose_truth(f))
        tracks = sam2_masks(f.color, TrueMasks(f.masks), keyframe_every=4)
        assert refines(tracks, f.masks)
        for thing in scene.objects:
            own = f.masks == thing.id
            area = own.mean((1, 2))
            shown = (own & (tracks > 0)).mean((1, 2))
            starts = [k for k in (0, 4, 8, 11) if 0.001 <= area[k] <= 0.5]
            for v in range(12):
                followed = any(area[min(k, v) : max(k, v) + 1].all() for k in starts)
                assert shown[v] == (area[v] if followed and area[v] >= 0.001 else 0)


def test_the_surer_track_gets_the_pixel(monkeypatch):
    sure = [2.0, 2, 2, -1]
    less = [-1, 1, 1, 1]  # both claim the middle ones
    logits = torch.tensor([sure, less])[:, None, None].expand(2, 1, 4, 4)

    class Squares(TrueMasks):
        def propagate_in_video(self, state, key, reverse):
            for v in range(2):
                yield v, list(state), logits

    row, column = np.indices((4, 4))
    left = column < 2
    right = (column >= 2) & (row < 3)
    model = Squares(np.ones((2, 4, 4), int))
    monkeypatch.setattr(data, "automatic_masks", lambda model, image: [right, left])
    tracks = sam2_masks(np.zeros((2, 4, 4, 3), np.uint8), model)
    assert (tracks == [1, 1, 1, 2]).all()


def test_a_scan_s_objects_can_be_shown_by_what_vggt_and_sam_2_see(tmp_path, monkeypatch):
    """As Proxy3D does, from images alone: geometry of VGGT brought to the scan's cameras, tracks matched to the
    annotated objects in space. Stand-ins see the truth, in another unit and axes, with other numbers."""
    truth = room(0, size=64)
    scan = data.write_scannet(truth, tmp_path)
    monkeypatch.setattr(data, "load_vggt", lambda name: None)
    monkeypatch.setattr(data, "vggt_geometry", oracle(truth.frames))
    monkeypatch.setattr(data, "load_sam2", lambda name: TrueMasks(truth.frames.masks))
    monkeypatch.setattr(data, "automatic_masks", propose_truth(truth.frames))
    scene = data.open_scene(scan, geometry="vggt", masks="sam2")
    assert [o.category for o in scene.objects] == [o.category for o in truth.objects]
    assert data.fingerprint(scene) != data.fingerprint(data.open_scene(scan))
    points = world_points(scene.frames)
    assert np.allclose(points, world_points(truth.frames), atol=1e-3, equal_nan=True)
    shown = scene.frames.masks
    assert refines(shown, truth.frames.masks)
    assert len(np.unique(shown)) > 10


# ---- merging


def test_what_leaves_the_view_and_comes_back_is_one_object_again(furnished):
    """Every object's mask is cut into a track of early and one of late frames: most halves join, and nothing else."""
    joined = []
    for scene in furnished:
        f = scene.frames
        tracks = f.masks.copy()
        tracks[6:][tracks[6:] > 0] += 100
        masks = merge_tracks(tracks, world_points(f))
        assert refines(masks, f.masks)
        for o in scene.objects:
            early = masks[tracks == o.id]
            late = masks[tracks == o.id + 100]
            if early.any() and late.any():
                joined.append(early[0] == late[0])
    assert len(joined) > 12
    assert np.mean(joined) > 0.8


def test_two_that_stand_side_by_side_stay_apart_also_through_a_third():
    """Tracks 1 and 2 share a frame. 3 fits both and goes with 2, which it fits better; 1 must not follow it there."""
    points = np.stack([patch((0, 0.6), (0, 0.4), 0.5)] * 3)
    row, _ = np.indices((60, 40))
    left, right = row < 25, row >= 20
    together = np.stack([np.where(left, 1, 2), 3 * right, 0 * row])
    masks = merge_tracks(together, points, share=0.1)
    first, second, third = masks[[0, 0, 1], [0, -1, -1], 0]
    assert first != second == third

    # as soon as no frame shows both, all three are one
    together[0] = left
    together[2] = np.where(left, 0, 2)
    assert merge_tracks(together, points, share=0.1).max() == 1


def test_a_book_is_not_merged_into_the_table_it_lies_on_even_if_never_tracked_with_it():
    """They share the voxels at the book's edges, but one of the two has fewer points in each."""
    points = np.stack([patch((0, 1.2), (0, 0.8), 0.76)] * 2)  # [2, h, w, 3]
    away = abs(points[..., :2] - (0.61, 0.41))
    book = (away < (0.115, 0.09)).all(-1)
    points[book, 2] = 0.79
    tracks = [1 * book[0], 2 * ~book[1]]
    assert merge_tracks(np.stack(tracks), points).max() == 2


# ---- a scene of tracks


def test_points_take_the_mask_of_most_frames_that_show_it():
    """Of three frames that show mask 2 anywhere, two have it at the first point; mask 1 has the second in one.

    A point behind the measured surface, and one outside the view, belong to nothing.
    """
    cameras = [data.pinhole(1, 1, 1, 0.5)] * 3
    frames = data.Frames(None, np.ones((3, 1, 2)), None, cameras, [np.eye(4)] * 3)
    masks = np.array([[[2, 0]], [[2, 1]], [[0, 2]]])
    points = np.array([[-0.5, 0, 1], [0.5, 0, 1], [-1, 0, 2], [3, 0, 1]])  # the last two: behind, outside
    assert data.vote(points, masks, frames).tolist() == [2, 1, 0, 0]


def test_a_room_of_true_tracks_is_that_room_and_tracked_walls_are_no_objects(furnished):
    found = []
    for scene in furnished:
        f = scene.frames
        floor = world_points(f)[..., 2] < 0.02
        tracks = np.where(f.masks > 0, f.masks, 99 - floor)
        tracked = with_tracks(scene, tracks)
        masks = tracked.frames.masks
        ids = [o.id for o in tracked.objects]
        assert [0, *ids] == np.unique(masks).tolist() == list(range(len(ids) + 1))
        assert not masks[f.masks == 0].any()
        assert len(ids) >= len(np.unique(f.masks)) - 3, "some are so thin that they belong to the wall"
        for o in tracked.objects:
            true = scene.thing(f.masks[masks == o.id][0])
            found.append(data.box_iou(o.box[None], true.box[None]))
    assert np.mean(found) > 0.55


# ---- the real network


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sam2.sam2_video_predictor", None)
    with refused(r"^--masks sam2 needs .* sam2 .*: SAM2_BUILD_CUDA=0 pip install .*sam2$"):
        data.load_sam2(data.SAM2)


def test_weights_that_are_not_here_or_unknown_are_one_line(monkeypatch):
    pytest.importorskip("sam2", reason=f"no SAM 2: {data.INSTALL['sam2']}")

    def offline(**names):
        raise FileNotFoundError

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    for name in (data.SAM2, "nobody/nothing"):
        with refused(rf"^--sam2 {name}: [^\n]*SAM 2, whose weights[^\n]*$"):
            data.load_sam2(name)


def tiny_sam2():
    """Build the package's smallest network, untrained, on small images."""
    from sam2.build_sam import build_sam2_video_predictor

    torch.manual_seed(0)
    small = ["++model.image_size=256", "++model.memory_attention.num_layers=1"]
    config = "configs/sam2.1/sam2.1_hiera_t.yaml"
    return build_sam2_video_predictor(config, device="cpu", hydra_overrides_extra=small)
