"""From a video, images, or frames without depth or poses to a scene, and scenes that are kept.

What VGGT would find comes from a stand-in that knows the truth in a unit and a frame of its own; VGGT's own
parts run where they are installed.
"""

import shutil
import struct
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from papers import refused
from PIL import Image
from test_readers import assert_equal_scenes, place, said, save, write_cloud, write_rgbd

import data
from data import open_scene, read_views, room

av = pytest.importorskip("av", reason='no PyAV, so no video is read: pip install -e ".[video]"')


def encode(path, images, seconds=None, gop=12):
    """Images [V, H, W, 3] as a video, shown at `seconds`."""
    if seconds is None:
        seconds = np.arange(len(images)) / 4
    tick = Fraction(1, 1000)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=round(1 / (seconds[-1] - seconds[-2])))
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.options = {"g": str(gop), "crf": "0", "preset": "ultrafast"}
        stream.codec_context.time_base = tick
        for image, second in zip(images, seconds, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(second * 1000), tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbered(count):
    """Gray images that tell their number by brightness, with a red upper left corner and a fine pattern."""
    gray = np.arange(count) * (200 // count) + 20
    images = np.tile(gray[:, None, None, None].astype(np.uint8), (1, 48, 64, 3))
    images[:, :12, :12] = (250, 0, 0)
    images[:, 24:40:2, 24:40] += 30
    return images


def number(images, count):
    gray = images[:, 44, 5:40].mean((1, 2)) - 20
    return np.round(gray / (200 // count)).astype(int).tolist()


def write_rooms(folder, seeds, **size):
    """Rooms as clouds that are named by their seeds."""
    for i in seeds:
        write_cloud(room(i, views=0, **size), folder / f"{i}.ply")


def read_images(path, count=32, longest=640):
    frames, notes = data.read_frames(path, *data.find_frames(path), count, longest)
    return frames.color, notes


# ---- reading a video


def test_frames_are_evenly_spaced_in_time_not_in_number(tmp_path):
    """Half of the frames lie in the first tenth of the time; they make a tenth of what is read."""
    seconds = [*np.arange(50) / 50, *np.linspace(1, 10, 50)]
    path = encode(tmp_path / "a.mp4", numbered(100), seconds)
    found = number(read_images(path, count=10)[0], 100)
    assert sum(n < 50 for n in found) == 1 and found == sorted(found) and len(found) >= 9


@pytest.mark.parametrize("gop", [1, 12, 1000])
def test_every_frame_comes_back_once_whatever_the_distance_of_key_frames(tmp_path, gop):
    path = encode(tmp_path / "a.mp4", numbered(24), gop=gop)
    assert number(read_images(path)[0], 24) == list(range(24))


def test_a_video_held_upright_is_turned_and_shrunk(tmp_path):
    """The red corner moves from the left to the right."""
    path = encode(tmp_path / "a.mp4", numbered(3))

    # a phone says with the track header's 3 x 3 matrix, 16.16 and 2.30 fixed point, how it was held
    raw = bytearray(path.read_bytes())
    start = raw.find(b"tkhd") + 44
    raw[start : start + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(raw)
    images = read_images(path, longest=32)[0]
    assert images.shape == (3, 32, 24, 3)
    assert images[0, 2, -2, 0] > 200 > 100 > images[0, 2, 2, 0]


def test_a_recording_that_broke_off_gives_what_it_has(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered(60), gop=6)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) * 3 // 5])
    found = number(read_images(path, count=20)[0], 60)
    assert 5 < len(found) < 20 and found == sorted(found) and found[0] < 3


def test_missing_packages_are_one_line_that_says_how_to_install_them(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", numbered(3))
    lines = {
        "vggt.models.vggt": r"a.mp4: has no depth, intrinsics, poses; .*: pip install git\+https://github.com/",
        "av": r'needs the package av .*pip install -e "\.\[video\]"',
    }
    for module, line in lines.items():
        monkeypatch.setitem(sys.modules, module, None)
        data.load_vggt.cache_clear()
        with refused(line):
            open_scene(path)


# ---- images


def test_images_are_read_in_order_upright_and_without_depth_maps(tmp_path):
    """A phone writes its sensor's rows, and beside them that it was held upright; depth maps are no photographs."""
    tags = Image.Exif()
    tags[0x0112] = 6  # turn by 90 degrees clockwise
    for i, image in enumerate(numbered(12)):
        Image.fromarray(image).save(tmp_path / f"IMG_{i}.JPG", exif=tags, quality=95)
    save(tmp_path / "depth_0000001.png", np.arange(3072, dtype=np.uint16).reshape(48, 64))
    save(tmp_path / "confidence_01.png", np.full((48, 64), 2, np.uint8))
    (tmp_path / "._IMG_1.JPG").write_bytes(b"what a Mac leaves beside it")
    images, notes = read_images(tmp_path, count=14)
    assert images.shape == (12, 64, 48, 3)
    assert "dropped 2 of 14 frames with no image, but a depth or confidence map" in notes[0]
    assert number(np.rot90(images, axes=(1, 2)), 12) == list(range(12))

    # maps alone
    for photograph in tmp_path.glob("IMG*"):
        photograph.unlink()
    with refused(r"dropped 2 of 2 frames with no image, but a depth or confidence map.*rgb/"):
        open_scene(tmp_path)


# ---- what VGGT fills in


def oracle(frames, unit=3.7):
    """vggt_geometry from the truth: in the first camera's axes, in a unit of its own."""

    def geometry(images, model=None):
        assert images.shape[:3] == frames.depth.shape
        depth = frames.depth / np.float32(unit)
        poses = np.linalg.inv(frames.poses[0]) @ frames.poses
        poses[:, :3, 3] /= unit
        return depth, np.ones_like(depth), frames.intrinsics, poses

    return geometry


@pytest.fixture
def stand_in(monkeypatch):
    """Put a stand-in in VGGT's place."""

    def use(geometry):
        monkeypatch.setattr(data, "load_vggt", lambda name: None)
        monkeypatch.setattr(data, "vggt_geometry", geometry)

    return use


@pytest.fixture(scope="module")
def frames():
    return room(3, views=12, size=96).frames


def extent(scene):
    """Length, width and height of what was seen: a cloud from cameras alone may lie a quarter turn off."""
    *level, height = np.ptp(scene.bounds, axis=0)
    return np.array([*sorted(level), height])


def write_colmap(frames, folder, unit=2.5):
    """A sparse model as text: world to camera in a unit of its own, and a line of points behind every image."""
    lines = ["# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME"]
    poses = frames.poses.copy()
    poses[:, :3, 3] /= unit
    for i, pose in enumerate(np.linalg.inv(poses)):
        save(folder / f"images/{i}.png", frames.color[i])
        tx, ty, tz, qx, qy, qz, qw = place(pose)
        lines.append(f"{i + 1} {qw} {qx} {qy} {qz} {tx} {ty} {tz} 1 {i}.png")
        lines.append("1.0 2.0 -1 3.0 4.0 7")
    model = folder / "sparse/0"
    model.mkdir(parents=True)
    (model / "images.txt").write_text("\n".join(lines))
    K = frames.intrinsics[0]
    camera = f"# cameras\n1 SIMPLE_RADIAL 96 96 {K[0, 0]} {K[0, 2]} {K[1, 2]} 0.01\n"
    (model / "cameras.txt").write_text(camera)


@pytest.fixture
def places(frames, tmp_path, stand_in):
    """One room as frames, frames without depth, without poses, as images, as a video and as COLMAP's model."""
    stand_in(oracle(frames))
    whole = write_rgbd(frames, tmp_path / "whole")
    write_colmap(frames, tmp_path / "colmap")
    encode(tmp_path / "video.mp4", frames.color)
    lacking = {"poses": ["*depth*"], "depth": ["*pose*"], "images": ["*depth*", "*pose*", "*intrinsics*"]}
    for kind, patterns in lacking.items():
        shutil.copytree(whole, tmp_path / kind, ignore=shutil.ignore_patterns(*patterns))
    return tmp_path


def test_depth_or_poses_make_a_scene_metric(places):
    true = read_views(places / "whole")
    for kind in ("poses", "depth"):
        found = read_views(places / kind)
        assert found.metric and np.array_equal(found.frames.color, true.frames.color)
        assert_allclose(extent(found), extent(true), atol=0.15)


def test_without_both_the_scale_is_guessed(places):
    true = read_views(places / "whole")
    for kind in ("images", "video.mp4", "colmap"):
        found = read_views(places / kind)
        depth = found.frames.depth
        assert not found.metric and "guessed" in found.notes[-1] and depth.shape == (12, 96, 96)
        assert (extent(found) / extent(true)).std() < 0.05  # the same room in another unit
        assert np.median(depth[depth > 0]) == pytest.approx(data.GUESS, rel=0.02)
        scaled = read_views(places / kind, scale=2.0)  # a length that is twice the guessed one
        assert scaled.metric
        assert_allclose(extent(scaled), 2 * extent(found), rtol=0.03)


def test_poses_of_another_convention_and_cameras_that_stand_still_are_refused(places):
    """Found depth and known poses contradict each other then."""
    with refused("name the poses' --convention"):
        read_views(places / "poses", convention="opengl")
    for file in (places / "poses").glob("*.pose.txt"):
        save(file, np.eye(4))
    with refused("no frame shows a surface"):
        read_views(places / "poses")


def test_the_uncertain_fifth_of_the_depth_is_dropped_and_none_at_all_is_one_line(frames, tmp_path, stand_in):
    path = encode(tmp_path / "a.mp4", frames.color)
    depth, _, *cameras = oracle(frames)(frames.color)
    surer = np.arange(depth.size, dtype=np.float32).reshape(depth.shape)
    stand_in(lambda images, model: (depth, surer, *cameras))
    kept = read_views(path).frames.depth.ravel() > 0
    assert kept.mean() == pytest.approx(0.8, abs=0.02)
    assert not kept[: int(0.19 * kept.size)].any()
    stand_in(lambda images, model: (depth * np.nan, surer, *cameras))
    with refused("no frame shows a surface"):
        read_views(path)


# ---- VGGT itself


def small_vggt(width=32):
    """VGGT from its own aggregator and heads, tiny and untrained, its cameras started at a usual field of view."""
    vggt = pytest.importorskip("vggt.models.vggt", reason=f"VGGT itself was not run: {data.INSTALL['vggt']}")
    from vggt.heads.camera_head import CameraHead
    from vggt.heads.dpt_head import DPTHead
    from vggt.models.aggregator import Aggregator

    torch.manual_seed(0)
    model = vggt.VGGT.__new__(vggt.VGGT)
    torch.nn.Module.__init__(model)
    model.aggregator = Aggregator(img_size=70, embed_dim=width, depth=4, num_heads=4, patch_embed="conv")
    model.camera_head = CameraHead(dim_in=2 * width, num_heads=4, trunk_depth=1)
    model.depth_head = DPTHead(2 * width, output_dim=2, activation="exp", conf_activation="expp1", features=16,
                               out_channels=[8, 16, 16, 16], intermediate_layer_idx=[0, 1, 2, 3])  # fmt: skip
    last = [m for m in model.camera_head.pose_branch.modules() if isinstance(m, torch.nn.Linear)][-1]
    torch.nn.init.normal_(last.weight, std=0.002)
    last.bias.data = 0.25 * (torch.arange(9) > 5)  # the field of view, added four times: 1 radian
    return model.eval()


def test_vggts_own_parts_give_depth_and_cameras_in_our_conventions():
    """Untrained, so where things are means nothing; every array has its shape and every number is finite."""
    images = room(2, views=3, size=60).frames.color[:, :48]
    depth, confidence, K, poses = data.vggt_geometry(images, small_vggt(), longest=70)
    assert depth.shape == confidence.shape == (3, 48, 60)
    assert (depth > 0).all() and (confidence >= 1).all()
    assert_allclose(K[:, :2, 2], [[30, 24]] * 3, rtol=1e-5)
    turn = poses[:, :3, :3]
    assert_allclose(turn @ turn.swapaxes(1, 2), [np.eye(3)] * 3, atol=1e-5)
    assert np.isfinite(poses).all()


# ---- opening and keeping scenes


def test_every_kind_of_scene_has_its_reader_and_its_options(frames, tmp_path):
    (tmp_path / "room.ply").write_bytes(b"ply")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/scan.sens").write_text("x")
    write_rgbd(frames, tmp_path / "a")
    for name, options, line in (
        ("odd/scan.sens", {}, r"scan.sens: no scene; give \.ply"),
        ("room.ply", {"vggt": "x"}, r"--vggt: has no part in .*room\.ply; known here: scale, up"),
        ("a", {"masks": "x"}, "--masks x: .*; choose files, segments or sam2"),
        ("odd", {}, "odd: holds no frames; known layouts: .*COLMAP"),
    ):
        with refused(line):
            open_scene(tmp_path / name, **options)


def test_masks_that_lie_beside_the_frames_are_the_objects(frames, tmp_path):
    """No SAM 2 is needed where a folder has instance-filt/; segments of its own replace them when asked for."""
    write_rgbd(frames, tmp_path)
    for i, mask in enumerate(frames.masks):
        save(tmp_path / f"instance-filt/frame-{i:06d}.png", mask.astype(np.uint16))
    found = open_scene(tmp_path)
    masks = found.frames.masks
    for o in found.objects:
        assert len(np.unique(frames.masks[masks == o.id])) == 1
    assert (masks > 0)[frames.masks > 0].mean() > 0.8
    assert not np.array_equal(open_scene(tmp_path, masks="segments").frames.masks, masks)


def test_scenes_are_kept_once_and_what_failed_is_said_and_tried_again(tmp_path, stand_in, capsys):
    frames = room(0, views=4, size=48).frames
    stand_in(oracle(frames))
    command = f"cache {tmp_path}/in {tmp_path}/out --max-frames 4".split()
    (tmp_path / "in").mkdir()
    encode(tmp_path / "in/room.mp4", frames.color)
    (tmp_path / "in/torn.mp4").write_bytes(b"x")
    assert data.main(command) == 2
    assert "torn.mp4: not a whole video" in capsys.readouterr().err
    first = tmp_path / "out/room.mp4.npz"
    kept, before = open_scene(first), first.stat().st_mtime_ns
    assert len(kept.frames.depth) == 4 and not kept.metric and kept.objects

    encode(tmp_path / "in/torn.mp4", frames.color)  # recorded again
    assert data.main(command) == 0
    assert open_scene(tmp_path / "out/torn.mp4.npz").objects and first.stat().st_mtime_ns == before


def test_processes_share_the_scenes(tmp_path, monkeypatch):
    write_rooms(tmp_path, range(3), points=2000)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, names in (("1", ["1.ply.npz"]), ("0", ["0.ply.npz", "1.ply.npz", "2.ply.npz"])):
        monkeypatch.setenv("RANK", rank)
        assert data.cache_scenes(tmp_path, tmp_path / "out") == 0
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names


def test_a_scene_survives_being_kept(tmp_path):
    scene = data.check_scene(data.with_own_segments(room(5, views=3, size=48)))
    data.save_scene(scene, tmp_path / "a.npz")
    assert_equal_scenes(open_scene(tmp_path / "a.npz"), scene)
    data.save_scene(replace(scene, objects=[]), tmp_path / "b.npz")
    assert not open_scene(tmp_path / "b.npz").objects, "nothing was found, and is not looked for again"

    # its arrays belong together
    data.save_scene(replace(scene, points=scene.points[:9]), tmp_path / "c.npz")
    with refused(r"arrays of {.*} points"):
        open_scene(tmp_path / "c.npz")


def test_own_scenes_are_trained_on_without_those_in_which_nothing_was_found(tmp_path, capsys):
    """Boxes then have sides that a loss can take the logarithm of."""
    write_rooms(tmp_path, range(3))
    flat = room(0, views=0)
    flat.points[:, 2] = 0
    flat.colors[:] = 120
    flat.normals[:] = 0, 0, 1
    write_cloud(flat, tmp_path / "0_empty.ply")
    assert data.cache_scenes(tmp_path, tmp_path / "out") == 0
    for source, root in (("ply", tmp_path), ("cached", tmp_path / "out")):
        scenes = data.load_scenes(source, "train", root) + data.load_scenes(source, "test", root)
        assert len(scenes) == 3 and "0_empty" in capsys.readouterr().out
        assert min(o.box[3:].min() for scene in scenes for o in scene.objects) >= 0.001


def test_scenes_that_cannot_be_read_are_said_and_left_out_unless_none_is_left(tmp_path, capsys):
    write_rooms(tmp_path, (0, 2))
    (tmp_path / "1.ply").write_bytes(b"torn")
    assert len(data.load_scenes("ply", "train", tmp_path)) == 1
    said = capsys.readouterr().out
    assert "1.ply: not a whole cloud" in said and said.endswith("left out\n") and said.count("\n") == 1
    (tmp_path / "2.ply").write_bytes(b"torn")
    with refused(r"no scenes with objects for the test split; see python data.py check"):
        data.load_scenes("ply", "test", tmp_path)


def test_a_scene_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        data.save_scene(room(0, views=0), tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())


def test_options_reach_the_scenes_of_a_folder(frames, tmp_path):
    write_rgbd(frames, tmp_path / "a", scale=4000)
    (scene,) = data.load_scenes("rgbd", "test", tmp_path, depth_scale=4000.0, up="-y")
    assert "up = -y" in said(scene) and scene.frames.depth.max() < 10
