"""Readers and writers: what other programs write comes in as the same room, and what is broken is said in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import (
    DataError,
    box_iou,
    open_scene,
    over_segment,
    read_cloud,
    read_scannet,
    read_views,
    render_masks,
    room,
    vertex_normals,
    with_own_segments,
    write_ply,
    write_scannet,
)

KITCHEN = Path(__file__).parents[2] / "shared/data/7scenes_redkitchen"
needs_kitchen = pytest.mark.skipif(not KITCHEN.exists(), reason=f"no real frames at {KITCHEN}")
Z_UP = np.eye(4)
Y_UP = np.array(
    [[1, 0, 0, 0.3], [0, 0, 1, 0.2], [0, -1, 0, -1.0], [0, 0, 0, 1]]
)  # a z-up world in y-up axes, shifted
Y_DOWN = np.array([[1, 0, 0, 0.3], [0, 0, -1, 0.2], [0, 1, 0, -1.0], [0, 0, 0, 1]])
OPENGL = np.diag([1.0, -1, -1, 1])


def same_partition(a, b):
    pairs = np.unique(np.stack([a, b]), axis=1).shape[1]
    return pairs == len(np.unique(a)) == len(np.unique(b))


@pytest.fixture(scope="module")
def small():
    return room(7, views=8, size=64, points=6000)


# ---- a room written as other programs lay out their frames


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".txt", ".csv", ".traj"):
        np.savetxt(path, array, delimiter="," if path.suffix == ".csv" else " ")
    else:
        Image.fromarray(array).save(path, quality=95)


def quaternion(pose):
    from scipy.spatial.transform import Rotation

    return Rotation.from_matrix(pose[:3, :3])


def write_rgbd(scene, folder, world=Y_DOWN, scale=1000):
    """7-Scenes: all files of a frame side by side; rotations a little too short, as in real files."""
    f = scene.frames
    save(folder / "camera-intrinsics.txt", f.intrinsics[0])
    for i, pose in enumerate(world @ f.poses):
        pose[:3, :3] *= 0.9999
        save(folder / f"frame-{i:06d}.color.png", f.color[i])
        save(folder / f"frame-{i:06d}.depth.png", np.round(f.depth[i] * scale).astype(np.uint16))
        save(folder / f"frame-{i:06d}.pose.txt", pose)
    return folder


def write_frames(scene, folder, color, depth, scale=1000):
    """Images and depth under names with a place for the frame's number."""
    for i, (image, meters) in enumerate(zip(scene.frames.color, scene.frames.depth, strict=True)):
        save(folder / color.format(i), image)
        save(folder / depth.format(i), np.round(meters * scale).astype(np.uint16))
    K = scene.frames.intrinsics[0]
    return dict(fx=K[0, 0], fy=K[1, 1], cx=K[0, 2], cy=K[1, 2])


def write_frames_25k(scene, folder, monkeypatch):
    write_frames(scene, folder, "color/{:06d}.png", "depth/{:06d}.png")
    save(folder / "intrinsics_depth.txt", np.pad(scene.frames.intrinsics[0], (0, 1)))
    for i, pose in enumerate(scene.frames.poses):
        save(folder / f"pose/{i:06d}.txt", pose)


def write_posed_images(scene, folder, monkeypatch):
    write_frames(scene, folder, "{:05d}.jpg", "{:05d}.png")
    save(folder / "depth_intrinsic.txt", scene.frames.intrinsics[0])
    for i, pose in enumerate(scene.frames.poses):
        save(folder / f"{i:05d}.txt", pose)


def write_replica(scene, folder, monkeypatch):
    camera = write_frames(scene, folder, "results/frame{:06d}.jpg", "results/depth{:06d}.png", 6553.5)
    save(folder / "traj.txt", scene.frames.poses.reshape(-1, 16))
    (folder / "cam_params.json").write_text(json.dumps({"camera": camera}))


def write_tum(scene, folder, monkeypatch):
    camera = write_frames(scene, folder, "rgb/130503110{}.175304.png", "depth/130503110{}.168323.png", 5000)
    monkeypatch.setitem(data.TUM_CAMERAS, "", tuple(camera.values()))
    rows = [
        [1305031100.17 + i, *pose[:3, 3], *quaternion(pose).as_quat()]
        for i, pose in enumerate(scene.frames.poses)
    ]
    (folder / "groundtruth.txt").write_text(
        "# timestamp tx ty tz qx qy qz qw\n" + "\n".join(" ".join(map(repr, map(float, r))) for r in rows)
    )


def write_icl(scene, folder, monkeypatch):
    """POV-Ray's axes are left-handed, y up: this room's y-down world with y reversed, and cameras with y reversed."""
    camera = write_frames(scene, folder, "rgb/{}.png", "depth/{}.png", 5000)
    monkeypatch.setitem(data.TUM_CAMERAS, "", tuple(camera.values()))
    poses = np.diag([1.0, -1, 1, 1]) @ Y_DOWN @ scene.frames.poses @ np.diag([1.0, -1, 1, 1])
    rows = [[i, *pose[:3, 3], *quaternion(pose).as_quat()] for i, pose in enumerate(poses)]
    np.savetxt(folder / "livingRoom0.gt.freiburg", rows)


def write_arkitscenes(scene, folder, monkeypatch):
    folder = folder / "471_frames"
    camera = write_frames(scene, folder, "lowres_wide/471_66{}.345.png", "lowres_depth/471_66{}.345.png")
    inverse = np.linalg.inv(scene.frames.poses)
    save(
        folder / "lowres_wide.traj",
        np.array([[660.346 + i, *quaternion(p).as_rotvec(), *p[:3, 3]] for i, p in enumerate(inverse)]),
    )
    for i in range(8):
        (folder / "lowres_wide_intrinsics").mkdir(exist_ok=True)
        np.savetxt(folder / f"lowres_wide_intrinsics/471_66{i}.344.pincam", [[64, 64, *camera.values()]])


def write_stray_scanner(scene, folder, monkeypatch):
    write_frames(scene, folder, "rgb/{:06d}.png", "depth/{:06d}.png")
    save(folder / "camera_matrix.csv", scene.frames.intrinsics[0])
    rows = [
        f"{i / 60}, {i:06d}, {', '.join(map(str, [*p[:3, 3], *quaternion(p).as_quat()]))}"
        for i, p in enumerate(Y_UP @ scene.frames.poses)
    ]
    (folder / "odometry.csv").write_text("\n".join(["timestamp, frame, x, y, z, qx, qy, qz, qw", *rows]))


def write_polycam(scene, folder, monkeypatch):
    camera = write_frames(scene, folder / "keyframes", "corrected_images/{}.jpg", "depth/{}.png")
    save(folder / "thumbnail.jpg", scene.frames.color[0])
    for i, pose in enumerate(Y_UP @ scene.frames.poses @ OPENGL):
        file = folder / f"keyframes/corrected_cameras/{i}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(camera | {f"t_{r}{c}": pose[r, c] for r in range(3) for c in range(4)}))


def write_nerfstudio(scene, folder, monkeypatch):
    camera = write_frames(scene, folder, "images/{}.png", "depths/{}.png")
    frames = [{"file_path": f"images/{i}.png", "depth_file_path": f"depths/{i}.png", "transform_matrix": pose.tolist()}
              for i, pose in enumerate(scene.frames.poses @ OPENGL)]  # fmt: skip
    held = {
        "fl_x": camera["fx"],
        "fl_y": camera["fy"],
        "cx": camera["cx"],
        "cy": camera["cy"],
        "frames": frames,
    }
    (folder / "transforms.json").write_text(json.dumps(held))


def write_seven_scenes(scene, folder, monkeypatch):
    write_rgbd(scene, folder)


WRITERS = [
    write_seven_scenes,
    write_frames_25k,
    write_posed_images,
    write_replica,
    write_tum,
    write_icl,
    write_arkitscenes,
    write_stray_scanner,
    write_polycam,
    write_nerfstudio,
]


def turn_by_a_quarter(scene):
    """The frames of a phone held upright: its sensor lies on its side."""
    f, turned = scene.frames, np.eye(4)
    turned[:3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]  # its right is the picture's down
    rows = [np.rot90(a, axes=(1, 2)) for a in (f.color, f.depth, f.masks)]
    return data.replace(
        scene, frames=data.Frames(*map(np.ascontiguousarray, rows), f.intrinsics, f.poses @ turned)
    )


def assert_same_room(found, truth):
    """Up to a turn and a shift on the floor: gravity, meters, colors and poses."""
    a, b = found.frames.poses, truth.frames.poses
    np.testing.assert_allclose(a[:, 2, 3], b[:, 2, 3], atol=0.04)
    np.testing.assert_allclose(a[:, 2, :3], b[:, 2, :3], atol=0.02)
    between_a, between_b = (np.linalg.norm(p[:, None, :3, 3] - p[:, :3, 3], axis=-1) for p in (a, b))
    np.testing.assert_allclose(between_a, between_b, atol=1e-5)
    np.testing.assert_allclose(found.frames.depth, truth.frames.depth, atol=6e-4)
    np.testing.assert_allclose(found.frames.intrinsics, truth.frames.intrinsics, atol=1e-6)
    assert np.abs(found.frames.color.astype(int) - truth.frames.color).mean() < 4
    assert found.metric and found.objects == []


@pytest.mark.parametrize("held", ["as it is", "upright"])
@pytest.mark.parametrize("write", WRITERS)
def test_every_layout_gives_the_same_room(small, tmp_path, monkeypatch, write, held):
    scene = turn_by_a_quarter(small) if held == "upright" else small
    write(scene, tmp_path / "a", monkeypatch)
    assert_same_room(read_views(tmp_path / "a"), scene)


def test_a_video_beside_the_depth_gives_its_frames(small, tmp_path, monkeypatch):
    pytest.importorskip("av")
    from test_video import encode

    write_stray_scanner(small, tmp_path, monkeypatch)
    for file in (tmp_path / "rgb").iterdir():
        file.unlink()
    encode(tmp_path / "rgb.mp4", small.frames.color, np.arange(8) / 20)
    assert_same_room(read_views(tmp_path), small)


@pytest.mark.parametrize("convention", ["opencv", "opengl", "opencv_inverse", "opengl_inverse"])
def test_every_convention_of_poses_gives_the_same_room(small, tmp_path, convention):
    poses = small.frames.poses @ (OPENGL if "opengl" in convention else np.eye(4))
    frames = data.replace(small.frames, poses=np.linalg.inv(poses) if "inverse" in convention else poses)
    write_rgbd(data.replace(small, frames=frames), tmp_path / "a", world=Z_UP)
    assert_same_room(read_views(tmp_path / "a", convention=convention), small)
    if convention != "opencv":
        with pytest.raises(
            DataError, match=r"of the depth fits other frames; name the poses' --convention|mirrored"
        ):
            read_views(tmp_path / "a")


def test_depth_of_another_unit_is_refused_with_the_usual_ones(small, tmp_path):
    write_rgbd(small, tmp_path / "a", scale=5000)
    with pytest.raises(
        DataError, match=r"--depth-scale \(millimeters 1000, TUM and ICL-NUIM 5000, Replica.* 6553.5"
    ):
        read_views(tmp_path / "a")
    assert_same_room(read_views(tmp_path / "a", depth_scale=5000.0), small)


def test_walls_lie_along_the_axes_and_0_and_65535_are_missing_depth(small, tmp_path):
    folder = write_rgbd(small, tmp_path / "a")
    depth = np.asarray(Image.open(folder / "frame-000002.depth.png")).copy()
    depth[0, :2] = 0, 65535
    save(folder / "frame-000002.depth.png", depth)
    scene = read_views(folder)
    assert not scene.frames.depth[2, 0, :2].any() and scene.frames.depth[2, 0, 2] > 0
    side = scene.normals[np.abs(scene.normals[:, 2]) < 0.2]
    assert np.mean(np.abs(side[:, :2]).max(1) > 0.98) > 0.8


def test_shrunk_frames_keep_their_geometry(small, tmp_path):
    """Intrinsics follow the image: pixels of small and large frames must lie on the same surfaces."""
    folder = write_rgbd(small, tmp_path / "a")
    large, little = (read_views(folder, longest=n).frames for n in (64, 32))
    near, far = (data.unproject(f.depth, f.intrinsics, f.poses) for f in (little, large))
    block = far.reshape(8, 32, 2, 32, 2, 3)
    low, high = np.nanmin(block, axis=(2, 4)) - 0.1, np.nanmax(block, axis=(2, 4)) + 0.1
    known = np.isfinite(near).all(-1)
    assert ((near >= low) & (near <= high)).all(-1)[known].mean() > 0.98


def test_intrinsics_of_the_color_images_are_known_by_their_principal_point(small, tmp_path):
    """The camera of pictures four times as large, used for the depth, would make the room twice as large."""
    folder = write_rgbd(small, tmp_path / "a")
    save(folder / "camera-intrinsics.txt", np.diag([4.0, 4, 1]) @ small.frames.intrinsics[0])
    for file in folder.glob("*.color.png"):
        Image.open(file).resize((256, 256), Image.Resampling.NEAREST).save(file)
    assert_same_room(read_views(folder), small)
    save(folder / "camera-intrinsics.txt", np.diag([9.0, 9, 1]) @ small.frames.intrinsics[0])
    with pytest.raises(DataError, match="belong to no image of"):
        read_views(folder)


def test_frames_that_are_lost_are_dropped_and_counted(small, tmp_path):
    """ScanNet has poses that are not finite, depth that is empty, and exports with gaps; others leave hidden files."""
    folder = write_rgbd(small, tmp_path / "a")
    np.savetxt(folder / "frame-000001.pose.txt", np.full((4, 4), -np.inf))
    save(folder / "frame-000003.depth.png", np.zeros((64, 64), np.uint16))
    (folder / "frame-000005.depth.png").unlink()
    (folder / "frame-000006.pose.txt").unlink()
    (folder / "._frame-000000.color.png").write_bytes(b"what a Mac leaves")
    scene = read_views(folder)
    assert len(scene.frames.depth) == 4 and np.isfinite(scene.points).all()
    said = "; ".join(scene.notes)
    assert "dropped 2 of 8 frames with a missing file" in said and "1 of 8 frames with no depth" in said
    assert "dropped 1 of 8 frames with a pose that is not finite" in said


@needs_kitchen
def test_the_kitchen_stands_upright_in_meters():
    """32 real frames, y-down, slightly non-orthonormal: table level at 0.7 m, floor at 0, walls along the axes."""
    kitchen = read_views(KITCHEN)
    level = kitchen.points[kitchen.normals[:, 2] > 0.95]
    table = level[(np.abs(level[:, 2] - 0.72) < 0.1)]
    assert abs(np.linalg.svd(table - table.mean(0), full_matrices=False)[2][2, 2]) > np.cos(np.radians(2))
    assert np.mean(np.abs(level[:, 2]) < 0.04) > 0.2
    assert 1.5 < kitchen.bounds[1, 2] < 3 and 3 < np.ptp(kitchen.bounds[:, 0]) < 8
    side = kitchen.normals[np.abs(kitchen.normals[:, 2]) < 0.2]
    assert np.mean(np.abs(side[:, :2]).max(1) > 0.98) > 0.3
    assert len(kitchen.frames.depth) == 32 and kitchen.metric and "near -y" in "".join(kitchen.notes)

    scene = data.with_own_segments(kitchen)  # the table is one piece, the chairs are others
    p = scene.points
    top = (np.abs(p[:, 2] - 0.72) < 0.04) & (np.abs(p[:, 0] - 0.25) < 0.9) & (np.abs(p[:, 1] - 1.6) < 0.35)
    counts = np.bincount(scene.instances[top])
    assert counts[1:].max() > 0.85 * top.sum() and 10 <= len(scene.objects) <= 120


# ---- gravity


def test_cameras_that_look_down_from_one_side_do_not_make_a_wall_of_the_floor(small):
    """The mean image-up is then nearer to the walls than to the vertical."""
    eyes = np.stack([np.full(6, -1.8), np.linspace(-0.6, 0.6, 6), np.full(6, 2.2)], axis=1)
    forward = np.tile([np.cos(1.0), 0, -np.sin(1.0)], (6, 1))  # 57 degrees down
    poses = np.tile(np.eye(4), (6, 1, 1))
    poses[:, :3, :3] = np.stack(
        [np.tile([0.0, -1, 0], (6, 1)), np.cross(forward, [0.0, -1, 0]), forward], axis=2
    )
    poses[:, :3, 3] = eyes
    facing = ((eyes.mean(0) - small.points) * small.normals).sum(1) > 0
    tilt = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    poses[:, :3] = tilt @ poses[:, :3]
    up = data.up_of_cameras(small.normals[facing] @ tilt.T, poses)
    assert up @ tilt[:, 2] > 0.999


@pytest.mark.parametrize("up", ["+y", "-y", "+x", "+z"])
@pytest.mark.parametrize("normals", [True, False])
def test_a_cloud_that_lies_on_its_side_is_turned_upright(small, tmp_path, up, normals):
    """From level surfaces and things that lie low, since nobody says which axis is up."""
    turn = {"+z": np.eye(3), "+y": Y_UP[:3, :3], "-y": Y_DOWN[:3, :3], "+x": np.roll(np.eye(3), 1, 0)}[up]
    direction = small.normals if normals else np.zeros_like(small.normals)
    write_ply(tmp_path / "a.ply", small.points @ turn.T, small.colors, direction @ turn.T)
    scene = read_cloud(tmp_path / "a.ply")
    share = np.linspace(0, 1, 21)
    np.testing.assert_allclose(
        *(np.quantile(p[:, 2], share) for p in (scene.points, small.points)), atol=0.02
    )
    assert up in scene.notes[-2]


def test_an_axis_that_fits_worse_is_taken_as_given_and_doubted(small, tmp_path):
    write_ply(tmp_path / "a.ply", small.points, small.colors, small.normals)
    assert "--up=+z fits better" in "".join(read_cloud(tmp_path / "a.ply", up="+y").notes)
    folder = write_rgbd(small, tmp_path / "a")
    assert "up = +x; if it lies on its side, --up=-y fits better" in "".join(
        read_views(folder, up="+x").notes
    )


# ---- clouds and meshes


def ply(fields, rows, more="", tail=""):
    """A PLY of points as text; `fields`: lines such as "float x"."""
    lines = "\n".join(" ".join(f"{v:.6g}" for v in row) for row in rows)
    properties = "".join(f"property {field}\n" for field in fields)
    return f"ply\nformat ascii 1.0\ncomment\nelement vertex {len(rows)}\n{properties}{more}end_header\n{lines}\n{tail}"


XYZ = ["float x", "float y", "float z"]
NAMES = {  # how others scale colors -> fields, and values from 0 to 1 as they write them
    "8 bits": (["uchar red", "uchar green", "uchar blue"], lambda c: np.round(c * 255)),
    "8 of 16 bits": (["ushort red", "ushort green", "ushort blue"], lambda c: np.round(c * 255)),
    "fractions": (["float red", "float green", "float blue"], lambda c: c),
}


@pytest.mark.parametrize("name", NAMES)
def test_colors_are_read_whatever_their_numbers(small, tmp_path, name):
    fields, write = NAMES[name]
    rows = np.concatenate([small.points, write(small.colors / 255.0)], axis=1)
    (tmp_path / "a.ply").write_text(ply(XYZ + fields, rows))
    points, colors, *_ = data.load_mesh(tmp_path / "a.ply")
    np.testing.assert_allclose(points, small.points, atol=1e-5)
    assert np.abs(colors.astype(int) - small.colors).max() <= 1


FACES = {
    "triangles": ("property list uchar int vertex_indices\n", "3 0 1 2\n3 1 2 3\n"),
    "polygons": ("property list uchar int vertex_indices\n", "4 0 1 2 3\n3 2 3 4\n"),
    "texture": (
        "property list uchar int vertex_indices\nproperty list uchar float texcoord\n",
        "3 0 1 2 6 0 0 0 1 1 1\n3 1 2 3 6 0 0 0 1 1 1\n",
    ),
}


@pytest.mark.parametrize("name", FACES)
def test_faces_of_any_kind_do_not_keep_the_points_from_being_read(small, tmp_path, name):
    fields, tail = FACES[name]
    (tmp_path / "a.ply").write_text(ply(XYZ, small.points, f"element face 2\n{fields}", tail))
    assert len(read_cloud(tmp_path / "a.ply").points) > 5980


@pytest.mark.parametrize("suffix", [".ply", ".glb", ".obj", ".stl"])
def test_a_mesh_of_few_large_faces_gets_points_from_them(tmp_path, suffix):
    """Eight corners of a room are no cloud."""
    import trimesh

    box = trimesh.creation.box((4, 5, 2.6) if suffix != ".glb" else (4, 2.6, 5))
    box.visual.vertex_colors = np.tile(np.uint8([200, 40, 40, 255]), (8, 1))
    box.export(tmp_path / f"a{suffix}")
    scene = open_scene(tmp_path / f"a{suffix}", masks="none", **({"up": "+y"} if suffix == ".glb" else {}))
    assert len(scene.points) > 50_000
    np.testing.assert_allclose(np.ptp(scene.points, axis=0)[2], 2.6, atol=0.01)
    assert suffix == ".stl" or np.abs(scene.colors[0].astype(int) - [200, 40, 40]).max() <= 1


def test_points_that_are_not_finite_far_away_or_twice_there_are_dropped(small, tmp_path):
    """A depth camera writes what it missed as (0, 0, 0), thousands of times; splats have floaters."""
    rows = np.concatenate([small.points, np.zeros((300, 3)), [[500, 0, 0], [np.nan, 0, 0]]])
    (tmp_path / "a.ply").write_text(ply(XYZ, rows))
    scene = read_cloud(tmp_path / "a.ply")
    assert 5980 < len(scene.points) < 6002 and "dropped 2 points that are not finite or far" in "".join(
        scene.notes
    )


def test_sizes_that_no_room_has_are_refused_and_every_size_is_said(small, tmp_path):
    for unit in (1000, 0.01):
        write_ply(tmp_path / "a.ply", small.points * unit, small.colors, small.normals)
        with pytest.raises(DataError, match=r"m is hardly a room; give --scale \(0.001 if in millimeters"):
            read_cloud(tmp_path / "a.ply")
        scene = read_cloud(tmp_path / "a.ply", scale=1 / unit)
        assert scene.notes[-1] == "size 6.24 x 5.94 x 2.60 m"


# ---- ScanNet


@pytest.fixture
def scan(small, tmp_path):
    return write_scannet(small, tmp_path)


def test_a_room_written_as_a_scan_is_read_back(small, scan):
    """Raw files are rotated and shifted, so this only holds if points and poses get the alignment exactly once."""
    raw = data.load_mesh(scan / f"{small.name}_vh_clean_2.ply")[0]
    assert np.abs(raw - small.points).max() > 0.5
    back = read_scannet(scan)
    np.testing.assert_allclose(back.points, small.points, atol=1e-5)
    np.testing.assert_allclose(back.normals, small.normals, atol=1e-5)
    np.testing.assert_allclose(back.bounds, small.bounds, atol=0.05)
    assert np.array_equal(back.colors, small.colors) and np.array_equal(back.instances, small.instances)
    assert same_partition(back.superpoints, small.superpoints)
    for a, b in zip(back.objects, small.objects, strict=True):
        assert (a.id, a.category, a.color) == (b.id, b.category, b.color) and np.array_equal(a.box, b.box)
    for name in ("color", "masks", "intrinsics"):
        assert np.array_equal(getattr(back.frames, name), getattr(small.frames, name)), name
    np.testing.assert_allclose(back.frames.depth, small.frames.depth, atol=6e-4)  # files hold millimeters
    np.testing.assert_allclose(back.frames.poses, small.frames.poses, atol=1e-9)


def edit(path, change):
    held = json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(held))


def test_scans_without_our_extra_keys_get_boxes_from_points_and_rendered_masks(small, scan):
    """Real scans have neither alignedBox nor masks at these pixels: what is computed must agree with what was known."""

    def strip(held):
        for group in held["segGroups"]:
            del group["alignedBox"], group["color"]

    edit(scan / f"{small.name}.aggregation.json", strip)
    for mask in (scan / "instance-filt").iterdir():
        mask.unlink()
    back = read_scannet(scan)
    iou = data.box_iou(
        np.stack([o.box for o in back.objects]), np.stack([o.box for o in small.objects])
    ).diagonal()
    assert np.median(iou) > 0.8
    big = np.isin(small.frames.masks, [o.id for o in small.objects if o.box[3:].min() > 0.3])
    assert (back.frames.masks == small.frames.masks)[big].mean() > 0.8


def test_the_reader_keeps_what_scannet_means(small, scan):
    """Walls are no objects, groups listed twice count once (scene0217_00), and lost poses are dropped and counted."""

    def change(held):
        held["segGroups"][0]["label"] = "wall"
        held["segGroups"] += [dict(g, objectId=g["objectId"] + 31) for g in held["segGroups"]]

    edit(scan / f"{small.name}.aggregation.json", change)
    np.savetxt(scan / "pose/3.txt", np.full((4, 4), -np.inf))
    (scan / f"{small.name}.txt").write_text("numDepthFrames = 8\nsceneType = Living room / Lounge\n")
    back = read_scannet(scan)
    assert [o.id for o in back.objects] == [o.id for o in small.objects[1:]]
    assert len(back.frames.depth) == 7 and small.objects[0].id not in back.frames.masks
    assert any("dropped 1 of 8 frames with a pose that is not finite" in note for note in back.notes)


def test_frames_stay_on_disk_and_their_key_tells_other_files(small, scan):
    """A cache of what an encoder saw in them must not outlive them."""
    first = read_scannet(scan)
    assert not isinstance(first.frames, data.Frames) and data.fingerprint(first) == data.fingerprint(
        read_scannet(scan)
    )
    Image.new("RGB", (64, 64)).save(scan / "color/3.png")
    assert data.fingerprint(first) != data.fingerprint(read_scannet(scan))


def test_a_test_scan_has_superpoints_of_ours_and_no_objects(small, scan):
    for suffix in data.SCAN_FILES[1:3]:
        (scan / f"{small.name}{suffix}").unlink()
    back = read_scannet(scan)
    assert (
        back.objects == [] and back.superpoints.max() > 10 and any("test scan" in note for note in back.notes)
    )
    assert not back.frames.masks.any()


MESH, SEGS, GROUPS, INFO = ("scan/NAME" + suffix for suffix in data.SCAN_FILES)
DEPTH, COLOR, POSE = (f"frames/frame-000002.{part}" for part in ("depth.png", "color.png", "pose.txt"))
CORNER = "element face 1\nproperty list uchar int vertex_indices\n"
BROKEN = {  # what is wrong -> the file, what spoils it, and what the line says
    "image is text": (COLOR, lambda f: f.write_text("hello"), "color.png: not a whole image"),
    "pose of three rows": (POSE, lambda f: f.write_text("1 0 0 0\n"), "pose.txt: not a whole table of 4"),
    "color as depth": (DEPTH, lambda f: save(f, np.zeros((64, 64, 3), np.uint8)), "is a picture of depth"),
    "8-bit depth": (DEPTH, lambda f: save(f, np.ones((64, 64), np.uint8)), "export 16 bits"),
    "another shape": (COLOR, lambda f: save(f, np.zeros((48, 64, 3), np.uint8)), "[(64, 64), (48, 64)]"),
    "no focal length": (
        "frames/camera-intrinsics.txt",
        lambda f: save(f, np.diag([0.0, 0, 1])),
        "belong to no image",
    ),
    "all poses mirrored": (
        "frames",
        lambda f: [save(p, np.diag([1.0, 1, -1, 1])) for p in f.glob("*pose.txt")],
        "dropped 8 of 8 frames with a pose that is not finite, or mirrored",
    ),
    "no description": (INFO, lambda f: f.unlink(), "data.py check"),
    "alignment of 4": (INFO, lambda f: f.write_text("axisAlignment = 1 0 0 0\n"), "16 numbers"),
    "torn list": (SEGS, lambda f: f.write_text('{"segIndices": [1'), "not a whole JSON"),
    "other segments": (SEGS, lambda f: edit(f, lambda h: h["segIndices"].pop()), "do not fit"),
    "object without points": (
        GROUPS,
        lambda f: edit(f, lambda h: h["segGroups"][2].update(segments=[])),
        "(objectId 2)",
    ),
    "box of seven numbers": (
        GROUPS,
        lambda f: edit(f, lambda h: h["segGroups"][2]["alignedBox"].append(0.0)),
        "boxes with six numbers",
    ),
    "empty cloud": ("a.ply", lambda f: f.write_text(""), "not a whole cloud or mesh"),
    "torn cloud": ("a.ply", lambda f: f.write_text(ply(XYZ, np.eye(3))[:-6]), "not a whole cloud"),
    "one point": ("a.ply", lambda f: f.write_text(ply(XYZ, np.ones((1, 3)))), "arrays of {1} points"),
    "face of no corner": (
        "a.ply",
        lambda f: f.write_text(ply(XYZ, np.eye(3), CORNER, "3 0 1 9\n")),
        "out of bounds",
    ),
    "video is text": ("a.mp4", lambda f: f.write_text("hello"), "not a whole video"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_one_line(small, tmp_path, name):
    file, spoil, line = BROKEN[name]
    write_scannet(data.replace(small, name="scan"), tmp_path)
    write_rgbd(small, tmp_path / "frames")
    path = tmp_path / file.replace("NAME", "scan")
    spoil(path)
    with pytest.raises(DataError) as error:
        open_scene(tmp_path / Path(file).parts[0])
    assert line in str(error.value) and "\n" not in str(error.value)


def test_check_opens_what_is_there_and_says_what_a_root_lacks(small, scan, capsys):
    assert f"6000 points, {len(small.objects)} objects" in data.check(scan)[0]
    root = scan.parent / "root"
    write_scannet(data.replace(small, name="scene0000_00"), root / "scans")
    assert data.check(root) == [f"{root}: 1 scans, 1 with frames beside them"]
    (root / "scans/scene0000_00/scene0000_00.txt").unlink()
    assert "missing 1 files, first" in data.check(root)[1] and "Terms of Use" in data.check(root)[1]
    folder = write_rgbd(small, scan.parent / "frames" / "kitchen")
    assert data.main(["check", str(folder)]) == 0
    said = capsys.readouterr().out
    assert (
        "8 of 8 frames used; layout NAME.color.png" in said and "x 2.60 m" in said and said.count("\n") == 1
    )


# ---- over-segmentation and own segments


def literal_segmentator(points, faces, threshold, min_size):
    """ScanNet's segmentator written out: three edges per face, union by rank, edge after edge."""
    normals = vertex_normals(points, faces)
    edges = []
    for i, j, k in faces:
        for a, b in ((i, j), (i, k), (k, j)):
            weight = np.float32(1) - np.dot(normals[a], normals[b])
            if np.dot(normals[b], points[b] - points[a]) > 0:
                weight = weight * weight
            edges.append((float(weight), a, b))
    edges.sort(key=lambda e: e[0])
    parent, rank, size = list(range(len(points))), [0] * len(points), [1] * len(points)
    limit = [threshold] * len(points)

    def find(x):
        while parent[x] != x:
            x = parent[x]
        return x

    def join(x, y):
        if rank[x] > rank[y]:
            x, y = y, x
        parent[x] = y
        size[y] += size[x]
        rank[y] += rank[x] == rank[y]

    for weight, a, b in edges:
        a, b = find(a), find(b)
        if a != b and weight <= limit[a] and weight <= limit[b]:
            join(a, b)
            a = find(a)
            limit[a] = weight + threshold / size[a]
    for _, a, b in edges:
        a, b = find(a), find(b)
        if a != b and (size[a] < min_size or size[b] < min_size):
            join(a, b)
    return np.array([find(i) for i in range(len(points))])


def bumpy_mesh(seed, n=40):
    """A crumpled sheet with a step and ridges: n x n vertices, triangles."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(n) * 0.02, np.arange(n) * 0.02, indexing="ij")
    z = 0.15 * (x > 0.3) + 0.1 * np.abs(np.sin(9 * y)) + rng.normal(0, 0.0008, (n, n))
    i = np.arange(n * n).reshape(n, n)
    square = np.stack([i[:-1, :-1], i[1:, :-1], i[1:, 1:], i[:-1, 1:]], axis=-1).reshape(-1, 4)
    points = np.stack([x, y, z], axis=-1).reshape(-1, 3).astype(np.float32)
    return points, np.concatenate([square[:, :3], square[:, [0, 2, 3]]])


@pytest.mark.parametrize("seed", range(3))
def test_a_mesh_is_segmented_exactly_as_scannets_segmentator_does(seed):
    """The blocks that settle many edges at once must never change what one edge after the other would give."""
    points, faces = bumpy_mesh(seed)
    found = over_segment(points, faces=faces)
    assert same_partition(found, literal_segmentator(points, faces, 0.01, 20))
    assert 5 < found.max() + 1 < 80 and np.bincount(found).min() >= 20


def test_own_segments_of_rooms_follow_their_objects():
    """From frames alone, no labels. Seeds differ from those the constants were set on."""
    best = []
    for seed in (900_101, 900_102, 900_103):
        truth = room(seed, points=0)
        scene = with_own_segments(truth)
        floor = (scene.points[:, 2] < 0.01) & (scene.normals[:, 2] > 0.95)
        assert np.mean(scene.instances[floor] > 0) < 0.1
        seen = [o for o in truth.objects if (truth.frames.masks == o.id).sum() >= 20]
        best += (
            box_iou(np.stack([o.box for o in seen]), np.stack([o.box for o in scene.objects])).max(1).tolist()
        )
    assert np.mean(best) > 0.6 and np.mean(np.array(best) > 0.5) > 0.7


def test_rendered_masks_are_the_rooms_own():
    scene = room(5, views=4, size=64, points=40_000)
    masks = render_masks(scene.points, scene.instances, scene.frames)
    assert (masks == scene.frames.masks).mean() > 0.95
    scene.frames.depth[:, :20] = 0
    assert not render_masks(scene.points, scene.instances, scene.frames)[:, :20].any()
