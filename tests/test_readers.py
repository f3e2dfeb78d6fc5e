"""Readers and writers: what other programs write comes in as the same room, and what is broken is said in one line."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_equal
from papers import refused
from PIL import Image
from scipy.spatial.distance import pdist
from scipy.spatial.transform import Rotation

import data
from data import DataError, open_scene, read_cloud, read_scannet, read_views, room, write_ply, write_scannet

KITCHEN = Path(__file__).parents[2] / "shared/data/7scenes_redkitchen"


def said(scene):
    return "; ".join(scene.notes)


def turned(axis, degrees, shift=(0.3, 0.2, -1.0)):
    """A pose of a quarter turn and a shift."""
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler(axis, degrees, degrees=True).as_matrix()
    pose[:3, 3] = shift
    return pose


Z_UP = np.eye(4)
Y_UP = turned("x", -90)  # a z-up world in y-up axes
Y_DOWN = turned("x", 90)
OPENGL = np.diag([1.0, -1, -1, 1])


@pytest.fixture(scope="module")
def small():
    return room(7, views=8, size=64, points=6000)


# ---- a room written as other programs lay out their frames


def save(path, what):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(what))
    elif path.suffix in (".png", ".jpg"):
        Image.fromarray(what).save(path, quality=95)
    else:
        np.savetxt(path, what, delimiter="," if path.suffix == ".csv" else " ")


def place(pose):
    """Position and quaternion (x, y, z, w)."""
    return [*pose[:3, 3], *Rotation.from_matrix(pose[:3, :3]).as_quat()]


def write_frames(frames, folder, color, depth, pose="", world=Z_UP, scale=1000):
    """Images, depth and poses under names with a place for the frame's number; returns their camera.

    Rotations are a little too short, as in real files.
    """
    columns = zip(frames.color, frames.depth, world @ frames.poses, strict=True)
    for i, (image, meters, matrix) in enumerate(columns):
        save(folder / color.format(i), image)
        save(folder / depth.format(i), np.round(meters * scale).astype(np.uint16))
        if pose:
            matrix[:3, :3] *= 0.9999
            save(folder / pose.format(i), matrix)
    K = frames.intrinsics[0]
    return dict(fx=K[0, 0], fy=K[1, 1], cx=K[0, 2], cy=K[1, 2])


def write_rgbd(frames, folder, world=Y_DOWN, scale=1000):
    """7-Scenes: all files of a frame side by side."""
    names = ("frame-{:06d}.color.png", "frame-{:06d}.depth.png", "frame-{:06d}.pose.txt")
    write_frames(frames, folder, *names, world, scale)
    save(folder / "camera-intrinsics.txt", frames.intrinsics[0])
    return folder


def write_frames_25k(frames, folder):
    write_frames(frames, folder, "color/{:06d}.png", "depth/{:06d}.png", "pose/{:06d}.txt")
    save(folder / "intrinsics_depth.txt", np.pad(frames.intrinsics[0], (0, 1)))


def write_posed_images(frames, folder):
    write_frames(frames, folder, "{:05d}.jpg", "{:05d}.png", "{:05d}.txt")
    save(folder / "depth_intrinsic.txt", frames.intrinsics[0])


def write_replica(frames, folder):
    camera = write_frames(frames, folder, "results/frame{:06d}.jpg", "results/depth{:06d}.png", scale=6553.5)
    save(folder / "traj.txt", frames.poses.reshape(-1, 16))
    save(folder / "cam_params.json", {"camera": camera})


def write_tum(frames, folder):
    write_frames(frames, folder, "rgb/130503110{}.175304.png", "depth/130503110{}.168323.png", scale=5000)
    rows = [[1305031100.17 + i, *place(pose)] for i, pose in enumerate(frames.poses)]
    np.savetxt(folder / "groundtruth.txt", rows, header="timestamp tx ty tz qx qy qz qw")


def write_arkitscenes(frames, folder):
    folder = folder / "471_frames"
    camera = write_frames(frames, folder, "lowres_wide/471_66{}.345.png", "lowres_depth/471_66{}.345.png")
    rows = []
    for i, pose in enumerate(np.linalg.inv(frames.poses)):
        turn = Rotation.from_matrix(pose[:3, :3]).as_rotvec()
        rows.append([660.346 + i, *turn, *pose[:3, 3]])
        save(folder / f"lowres_wide_intrinsics/471_66{i}.344.pincam", [[64, 64, *camera.values()]])
    save(folder / "lowres_wide.traj", rows)


def write_stray_scanner(frames, folder):
    write_frames(frames, folder, "rgb/{:06d}.png", "depth/{:06d}.png")
    save(folder / "camera_matrix.csv", frames.intrinsics[0])
    rows = [[i / 60, i, *place(pose)] for i, pose in enumerate(Y_UP @ frames.poses)]
    header = "timestamp, frame, x, y, z, qx, qy, qz, qw"
    np.savetxt(folder / "odometry.csv", rows, delimiter=", ", header=header, comments="")


def write_polycam(frames, folder):
    keyframes = folder / "keyframes"
    held = write_frames(frames, keyframes, "corrected_images/{}.jpg", "depth/{}.png")
    save(folder / "thumbnail.jpg", frames.color[0])
    for i, pose in enumerate(Y_UP @ frames.poses @ OPENGL):
        for (row, column), value in np.ndenumerate(pose[:3]):
            held[f"t_{row}{column}"] = value
        save(keyframes / f"corrected_cameras/{i}.json", held)


def write_nerfstudio(frames, folder):
    camera = write_frames(frames, folder, "images/{}.png", "depths/{}.png")
    held = {"fl_x": camera["fx"], "fl_y": camera["fy"], "cx": camera["cx"], "cy": camera["cy"], "frames": []}
    for i, pose in enumerate(frames.poses @ OPENGL):
        files = {"file_path": f"images/{i}.png", "depth_file_path": f"depths/{i}.png"}
        held["frames"].append(files | {"transform_matrix": pose.tolist()})
    save(folder / "transforms.json", held)


def turn_by_a_quarter(frames):
    """The frames of a phone held upright: its sensor lies on its side."""
    pictures = (frames.color, frames.depth, frames.masks)
    shown = (np.rot90(array, axes=(1, 2)) for array in pictures)
    poses = frames.poses @ turned("z", 90, shift=0)  # its right is the picture's down
    return data.Frames(*shown, frames.intrinsics, poses)


def assert_same_room(found, truth):
    """Up to a turn and a shift on the floor: gravity, meters, colors and poses of the frames."""
    assert found.metric and found.objects == []
    frames = found.frames
    assert_allclose(frames.poses[:, 2, 3], truth.poses[:, 2, 3], atol=0.04)
    assert_allclose(frames.poses[:, 2, :3], truth.poses[:, 2, :3], atol=0.02)
    assert_allclose(pdist(frames.poses[:, :3, 3]), pdist(truth.poses[:, :3, 3]), atol=1e-5)
    assert_allclose(frames.depth, truth.depth, atol=6e-4)
    assert_allclose(frames.intrinsics, truth.intrinsics, atol=1e-6)
    assert np.abs(frames.color.astype(int) - truth.color).mean() < 4


@pytest.fixture(scope="module")
def frames(small):
    return small.frames


@pytest.mark.parametrize("held", ["as it is", "upright"])
@pytest.mark.parametrize(
    "write",
    [
        write_rgbd,
        write_frames_25k,
        write_posed_images,
        write_replica,
        write_tum,
        write_arkitscenes,
        write_stray_scanner,
        write_polycam,
        write_nerfstudio,
    ],
)
def test_every_layout_gives_the_same_room(frames, tmp_path, monkeypatch, write, held):
    if held == "upright":
        frames = turn_by_a_quarter(frames)
    monkeypatch.setattr(data, "TUM_CAMERA", frames.intrinsics[0])
    write(frames, tmp_path)
    assert_same_room(read_views(tmp_path), frames)


def test_times_of_images_without_any_depth_give_frames_without_depth(frames, tmp_path):
    write_tum(frames, tmp_path)
    shutil.rmtree(tmp_path / "depth")
    layout, views = data.find_frames(tmp_path)
    assert "TUM" in layout.name and all(view.depth is None and view.pose is not None for view in views)


def test_a_video_beside_the_depth_gives_its_frames(frames, tmp_path):
    from test_video import encode  # skips without PyAV

    write_stray_scanner(frames, tmp_path)
    shutil.rmtree(tmp_path / "rgb")
    encode(tmp_path / "rgb.mp4", frames.color, np.arange(8) / 20)
    assert_same_room(read_views(tmp_path), frames)


@pytest.mark.parametrize("convention", ["opencv", "opengl", "opencv_inverse", "opengl_inverse"])
def test_every_convention_of_poses_gives_the_same_room(frames, tmp_path, convention):
    poses = frames.poses @ (OPENGL if "opengl" in convention else Z_UP)
    if "inverse" in convention:
        poses = np.linalg.inv(poses)
    write_rgbd(replace(frames, poses=poses), tmp_path, world=Z_UP)
    assert_same_room(read_views(tmp_path, convention=convention), frames)
    if convention != "opencv":
        with refused(r"fits other frames; name the poses' --convention|mirrored"):
            read_views(tmp_path)


def test_depth_of_another_unit_is_refused_with_the_usual_ones(frames, tmp_path):
    write_rgbd(frames, tmp_path, scale=5000)
    with refused(r"--depth-scale \(millimeters 1000, TUM RGB-D 5000, Replica.* 6553.5"):
        read_views(tmp_path)
    assert_same_room(read_views(tmp_path, depth_scale=5000.0), frames)


@pytest.fixture
def folder(frames, tmp_path):
    return write_rgbd(frames, tmp_path / "frames")


def walls_along_the_axes(scene):
    """The share of the upright surfaces that face along x or y."""
    side = scene.normals[np.abs(scene.normals[:, 2]) < 0.2]
    return np.mean(np.abs(side[:, :2]).max(1) > 0.98)


def test_walls_lie_along_the_axes_and_0_and_65535_are_missing_depth(folder):
    depth = np.array(Image.open(folder / "frame-000002.depth.png"))
    depth[0, :2] = 0, 65535
    save(folder / "frame-000002.depth.png", depth)
    scene = read_views(folder)
    row = scene.frames.depth[2, 0]
    assert not row[:2].any() and row[2] > 0
    assert walls_along_the_axes(scene) > 0.8


def test_shrunk_frames_keep_their_geometry(folder):
    """Intrinsics follow the image, so that a pixel lies on the surface of the four that it stands for."""
    large, little = (read_views(folder, longest=n).frames for n in (64, 32))
    assert_allclose(little.intrinsics, np.diag([0.5, 0.5, 1]) @ large.intrinsics)
    four = large.depth.reshape(8, 32, 2, 32, 2)
    within = little.depth.clip(four.min((2, 4)), four.max((2, 4)))
    assert np.mean(little.depth == within) > 0.98


def test_intrinsics_of_the_color_images_are_known_by_their_principal_point(frames, folder):
    """The camera of pictures four times as large, used for the depth, would make the room twice as large."""
    save(folder / "camera-intrinsics.txt", np.diag([4.0, 4, 1]) @ frames.intrinsics[0])
    for file in folder.glob("*.color.png"):
        Image.open(file).resize((256, 256), Image.Resampling.NEAREST).save(file)
    assert_same_room(read_views(folder), frames)
    save(folder / "camera-intrinsics.txt", np.diag([9.0, 9, 1]) @ frames.intrinsics[0])
    with refused("belong to no image of"):
        read_views(folder)


def test_frames_that_are_lost_are_dropped_and_counted(folder):
    """ScanNet has poses that are not finite, depth that is empty, and exports with gaps; others leave hidden files."""
    save(folder / "frame-000001.pose.txt", np.full((4, 4), -np.inf))
    save(folder / "frame-000003.depth.png", np.zeros((64, 64), np.uint16))
    (folder / "frame-000005.depth.png").unlink()
    (folder / "frame-000006.pose.txt").unlink()
    (folder / "._frame-000000.color.png").write_bytes(b"what a Mac leaves")
    for i in range(7):  # the last is not labelled
        save(folder / f"instance-filt/frame-{i:06d}.png", np.ones((64, 64), np.uint8))
    scene = read_views(folder)
    assert len(scene.frames.depth) == 3 and np.isfinite(scene.points).all()
    notes = said(scene)
    assert "dropped 3 of 8 frames with a missing file" in notes and "1 of 8 frames with no depth" in notes
    assert "dropped 1 of 8 frames with a pose that is not finite" in notes


@pytest.mark.skipif(not KITCHEN.exists(), reason=f"no real frames at {KITCHEN}")
def test_the_kitchen_stands_upright_in_meters():
    """32 real frames, y-down, slightly non-orthonormal: table level at 0.7 m, floor at 0, walls along the axes."""
    kitchen = read_views(KITCHEN)
    assert len(kitchen.frames.depth) == 32 and kitchen.metric and "near -y" in said(kitchen)
    assert 1.5 < kitchen.bounds[1, 2] < 3 and 3 < np.ptp(kitchen.bounds[:, 0]) < 8
    assert walls_along_the_axes(kitchen) > 0.3
    level = kitchen.points[kitchen.normals[:, 2] > 0.95]
    assert np.mean(np.abs(level[:, 2]) < 0.04) > 0.2
    table = level[np.abs(level[:, 2] - 0.72) < 0.1]
    axes = np.linalg.svd(table - table.mean(0), full_matrices=False)[2]
    assert abs(axes[2, 2]) > np.cos(np.radians(2))

    # the table is one piece, the chairs are others
    scene = data.with_own_segments(kitchen)
    top = (np.abs(scene.points - [0.25, 1.6, 0.72]) < [0.9, 0.35, 0.04]).all(1)
    counts = np.bincount(scene.instances[top])
    assert counts[1:].max() > 0.85 * top.sum() and 10 <= len(scene.objects) <= 120


# ---- gravity


def test_a_camera_that_looks_down_from_one_side_does_not_make_a_wall_of_the_floor(small):
    """Its image-up is then nearer to the walls than to the vertical."""
    forward = [np.cos(1.0), 0, -np.sin(1.0)]  # 57 degrees down
    right = [0, -1.0, 0]
    eye = [-1.8, 0, 2.2]
    facing = ((eye - small.points) * small.normals).sum(1) > 0
    tilt = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    pose = tilt @ np.stack([right, np.cross(forward, right), forward, eye], axis=1)
    up = data.up_of_cameras(small.normals[facing] @ tilt.T, pose[None])
    assert up @ tilt[:, 2] > 0.999


def write_cloud(scene, path, matrix=Z_UP[:3, :3]):
    """A room as a cloud, in axes or a unit that the matrix gives."""
    write_ply(path, scene.points @ matrix.T, scene.colors, scene.normals @ matrix.T)
    return path


@pytest.mark.parametrize(
    ("up", "turn"), {"+y": Y_UP, "-y": Y_DOWN, "+x": turned("y", 90), "+z": Z_UP}.items()
)
def test_a_cloud_that_lies_on_its_side_is_turned_upright(small, tmp_path, up, turn):
    """From level surfaces and things that lie low, since nobody says which axis is up."""
    scene = read_cloud(write_cloud(small, tmp_path / "a.ply", turn[:3, :3]))
    found, truth = (np.quantile(s.points[:, 2], np.linspace(0, 1, 21)) for s in (scene, small))
    assert_allclose(found, truth, atol=0.02)
    assert up in scene.notes[-2]


def test_an_axis_that_fits_worse_is_taken_as_given_and_doubted(small, folder, tmp_path):
    cloud = write_cloud(small, tmp_path / "a.ply")
    assert "--up=+z fits better" in said(read_cloud(cloud, up="+y"))
    scene = read_views(folder, up="+x")
    assert "up = +x; if it lies on its side, --up=-y fits better" in said(scene)


# ---- clouds and meshes


def ply(rows, kind="", names="", faces="", tail=""):
    """A PLY of points as text, with more fields of one kind, and faces."""
    fields = ["float x", "float y", "float z", *(f"{kind} {name}" for name in names.split())]
    lines = ["ply", "format ascii 1.0", "comment", f"element vertex {len(rows)}"]
    lines += [f"property {field}" for field in fields]
    lines.append(f"{faces}end_header")
    for row in rows:
        lines.append(" ".join(f"{value:.6g}" for value in row))
    return "\n".join([*lines, tail])


CORNERS = "element face 2\nproperty list uchar int vertex_indices\n"
TRIANGLES = (CORNERS, "3 0 1 2\n3 1 2 3\n")
POLYGONS = (CORNERS, "4 0 1 2 3\n3 2 3 4\n")
TEXTURED = (
    f"{CORNERS}property list uchar float texcoord\n",
    "3 0 1 2 6 0 0 0 1 1 1\n3 1 2 3 6 0 0 0 1 1 1\n",
)


@pytest.mark.parametrize(
    ("kind", "faces"),
    [
        ("uchar", TRIANGLES),
        ("float", TEXTURED),
        ("float", POLYGONS),
    ],
)
def test_colors_are_read_whatever_their_numbers_and_beside_faces_of_any_kind(small, tmp_path, kind, faces):
    """Bytes and fractions."""
    white = 1 if kind == "float" else 255
    shown = small.colors / 255 * white
    rows = np.concatenate([small.points, shown], axis=1)
    (tmp_path / "a.ply").write_text(ply(rows, kind, "red green blue", *faces))
    points, colors, *_ = data.load_mesh(tmp_path / "a.ply")
    assert_allclose(points, small.points, atol=1e-5)
    assert_allclose(colors, small.colors, rtol=0, atol=1)


@pytest.mark.parametrize("suffix", [".ply", ".glb", ".obj", ".stl"])
def test_a_mesh_of_few_large_faces_gets_points_from_them(tmp_path, suffix):
    """Eight corners of a room are no cloud."""
    import trimesh

    box = trimesh.creation.box((4, 2.6, 5))
    box.visual.vertex_colors = [[200, 40, 40, 255]] * 8
    path = tmp_path / f"a{suffix}"
    box.export(path)
    scene = open_scene(path, masks="none", up="+y")
    assert len(scene.points) > 50_000
    assert np.ptp(scene.points[:, 2]) == pytest.approx(2.6, abs=0.01)
    if suffix != ".stl":
        assert_allclose(scene.colors[0], [200, 40, 40], rtol=0, atol=1)


def test_points_that_are_not_finite_far_away_or_twice_there_are_dropped(small, tmp_path):
    """A depth camera writes what it missed as (0, 0, 0), thousands of times; splats have floaters."""
    missed = np.zeros((300, 3))
    rows = [*small.points, *missed, (500, 0, 0), (np.nan, 0, 0)]
    (tmp_path / "a.ply").write_text(ply(rows))
    scene = read_cloud(tmp_path / "a.ply")
    assert 5980 < len(scene.points) < 6002
    assert "dropped 2 points that are not finite or far" in said(scene)


@pytest.mark.parametrize("unit", [1000, 0.01])
def test_sizes_that_no_room_has_are_refused_and_every_size_is_said(small, tmp_path, unit):
    path = write_cloud(small, tmp_path / "a.ply", unit * np.eye(3))
    with refused(r"m is hardly a room; give --scale \(0.001 if in millimeters"):
        read_cloud(path)
    assert read_cloud(path, scale=1 / unit).notes[-1] == "size 6.24 x 5.94 x 2.60 m"


# ---- ScanNet


@pytest.fixture
def scan(small, tmp_path):
    return write_scannet(replace(small, name="scan"), tmp_path)


def assert_equal_scenes(found, truth, **limits):
    """Every array, to so many meters, and every object."""
    for a, b in ((found, truth), (found.frames, truth.frames)):
        for name, array in vars(b).items():
            if isinstance(array, np.ndarray):
                assert_allclose(getattr(a, name), array, rtol=0, atol=limits.get(name, 0))
    assert_equal([vars(o) for o in found.objects], [vars(o) for o in truth.objects])


def test_a_room_written_as_a_scan_is_read_back(small, scan):
    limits = dict(points=1e-5, normals=1e-5, bounds=0.05, depth=6e-4, poses=1e-9)  # files hold millimeters
    assert_equal_scenes(read_scannet(scan), small, **limits)


def test_points_normals_and_poses_get_the_alignment_exactly_once(small, scan):
    world = turned("z", 37)
    (scan / "scan.txt").write_text(f"axisAlignment = {' '.join(map(str, world.ravel()))}\n")
    moved = read_scannet(scan)
    assert_allclose(moved.points, small.points @ world[:3, :3].T + world[:3, 3], atol=1e-5)
    assert_allclose(moved.normals, small.normals @ world[:3, :3].T, atol=1e-5)
    assert_allclose(moved.frames.poses, world @ small.frames.poses, atol=1e-9)


@contextmanager
def edited(path):
    """What a JSON file holds, to be changed."""
    held = json.loads(path.read_text())
    yield held
    save(path, held)


def test_scans_without_our_extra_keys_get_boxes_from_points_and_rendered_masks(small, scan):
    """Real scans have neither alignedBox nor masks at these pixels: what is computed must agree with what was known."""
    with edited(scan / "scan.aggregation.json") as held:
        for group in held["segGroups"]:
            del group["alignedBox"], group["color"]
    shutil.rmtree(scan / "instance-filt")
    back = read_scannet(scan)
    found, truth = (np.stack([o.box for o in scene.objects]) for scene in (back, small))
    assert np.median(data.box_iou(found, truth).diagonal()) > 0.8
    big = np.isin(small.frames.masks, [o.id for o in small.objects if o.box[3:].min() > 0.3])
    assert (back.frames.masks == small.frames.masks)[big].mean() > 0.8


def test_the_reader_keeps_what_scannet_means(small, scan):
    """Walls are no objects, groups listed twice count once (scene0217_00), and lost poses are dropped and counted."""
    with edited(scan / "scan.aggregation.json") as held:
        held["segGroups"][0]["label"] = "wall"
        held["segGroups"] += [dict(g, objectId=g["objectId"] + 31) for g in held["segGroups"]]
    save(scan / "pose/3.txt", np.full((4, 4), -np.inf))
    (scan / "scan.txt").write_text("numDepthFrames = 8\nsceneType = Living room / Lounge\n")
    back = read_scannet(scan)
    assert [o.id for o in back.objects] == [o.id for o in small.objects[1:]]
    assert len(back.frames.depth) == 7 and small.objects[0].id not in back.frames.masks
    assert "dropped 1 of 8 frames with a pose that is not finite" in said(back)


def test_frames_on_disk_have_a_key_that_tells_other_files(scan):
    """A cache of what an encoder saw in them must not outlive them."""

    def key(**options):
        return data.fingerprint(read_scannet(scan, **options))

    assert key() == key() != key(max_frames=5)
    for name, values in {"color": "RGB", "depth": "I;16", "instance-filt": "L"}.items():
        before = key()
        Image.new(values, (65, 64)).save(scan / name / "3.png")
        assert before != key()


def test_a_scan_s_color_keeps_its_own_size(scan):
    """A tower sees 1296 x 968 pixels of color where depth has 640 x 480."""
    for file in (scan / "color").iterdir():
        Image.open(file).resize((192, 192)).save(file)
    frames = read_scannet(scan).frames
    assert frames.color.shape == (8, 192, 192, 3)
    assert frames.depth.shape == frames.masks.shape == (8, 64, 64)
    assert read_scannet(scan, longest=96).frames.color.shape == (8, 96, 96, 3)


def test_a_labelled_scan_refuses_other_masks(scan):
    with refused(r"--masks segments: .* has labelled objects; leave the flag out"):
        open_scene(scan, masks="segments")


def test_a_test_scan_has_superpoints_of_ours_and_no_objects(scan):
    for suffix in data.SCAN_FILES[1:3]:
        (scan / f"scan{suffix}").unlink()
    back = read_scannet(scan)
    assert back.objects == [] and back.superpoints.max() > 10 and "test scan" in said(back)
    assert not back.frames.masks.any()


SEGS, GROUPS, INFO = ("scan/scan" + suffix for suffix in data.SCAN_FILES[1:])
DEPTH, COLOR, POSE = (f"frames/frame-000002.{part}" for part in ("depth.png", "color.png", "pose.txt"))
NO_CORNER = ply(np.eye(3), faces=CORNERS, tail="3 0 1 9\n3 0 1 2\n")
BROKEN = {  # what is wrong -> the file, its text or array or what spoils it, and what the line says
    "image is text": (COLOR, "hello", "color.png: not a whole image"),
    "pose of three rows": (POSE, "1 0 0 0\n", "pose.txt: not a whole table of 4"),
    "color as depth": (DEPTH, np.zeros((64, 64, 3), np.uint8), "is a picture of depth"),
    "8-bit depth": (DEPTH, np.ones((64, 64), np.uint8), "export 16 bits"),
    "another shape": (COLOR, np.zeros((48, 64, 3), np.uint8), "[(64, 64), (48, 64)]"),
    "no focal length": ("frames/camera-intrinsics.txt", np.diag([0.0, 0, 1]), "belong to no image"),
    "all poses mirrored": (
        "frames/*.pose.txt",
        np.diag([1.0, 1, -1, 1]),
        "8 of 8 frames with a pose that is not finite, or mirrored",
    ),
    "alignment of 4": (INFO, "axisAlignment = 1 0 0 0\n", "16 numbers"),
    "torn list": (SEGS, '{"segIndices": [1', "not a whole JSON"),
    "other segments": (SEGS, lambda held: held["segIndices"].pop(), "do not fit"),
    "object without points": (GROUPS, lambda held: held["segGroups"][2].update(segments=[]), "(objectId 2)"),
    "empty cloud": ("a.ply", "", "not a whole cloud or mesh"),
    "torn cloud": ("a.ply", ply(np.eye(3))[:-6], "not a whole cloud"),
    "one point": ("a.ply", ply(np.ones((1, 3))), "arrays of {1} points"),
    "face of no corner": ("a.ply", NO_CORNER, "out of bounds"),
    "empty kept scene": ("a.npz", "", "not a whole kept scene"),
    "video is text": ("a.mp4", "hello", "not a whole video"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_one_line(scan, folder, tmp_path, name):
    file, wrong, line = BROKEN[name]
    path = tmp_path / file
    if isinstance(wrong, str):
        path.write_text(wrong)
    elif isinstance(wrong, np.ndarray):
        for each in tmp_path.glob(file):
            save(each, wrong)
    else:
        with edited(path) as held:
            wrong(held)
    with pytest.raises(DataError) as error:
        open_scene(tmp_path / Path(file).parts[0])
    assert line in str(error.value) and "\n" not in str(error.value)


def test_check_opens_what_is_there_and_says_what_a_root_lacks(small, scan, folder, capsys):
    assert f"6000 points, {len(small.objects)} objects" in next(data.check(scan))
    root = scan.parent / "root"
    whole = write_scannet(replace(small, name="scene0000_00"), root / "scans")
    (whole / "scene0000_00.txt").unlink()
    with refused(r"^.*scene0000_00.txt: .* missing; `python data.py check .*\Z"):
        open_scene(whole)
    found, lacking = data.check(root)
    assert found == f"{root}: 1 scans, 1 with frames beside them"
    assert "missing 1 files, first" in lacking and "Terms of Use" in lacking
    assert data.main(["check", str(folder)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "8 of 8 frames used; layout NAME.color.png" in line and "x 2.60 m" in line
