"""A room of one's own: from a video, images, or frames without depth or poses to a scene. What VGGT would find comes
from a stand-in that knows the truth in a unit and a frame of its own; VGGT's own parts run where they are installed."""

import argparse
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_readers import KITCHEN, needs_kitchen, write_rgbd

import data
import train
from data import DataError, open_scene, read_images, read_video, read_views, room, sharpness, similarity, spread

av = pytest.importorskip("av", reason='no PyAV, so no video is read: pip install -e ".[video]"')

TURNED = [[0, 1, 0], [-1, 0, 0], [0, 0, 1 << 14]]  # how a phone says that its upright picture lies on its side


def encode(path, images, seconds=None, rotation=None, gop=12):
    """Images [V, H, W, 3] as a video, shown at `seconds`, with a track matrix that says how to turn it."""
    seconds = np.arange(len(images)) / 30 if seconds is None else seconds
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt, stream.options = "yuv444p", {"g": str(gop), "crf": "0", "preset": "ultrafast"}
        stream.codec_context.time_base = Fraction(1, 1000)
        for image, second in zip(images, seconds, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = round(second * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if rotation is not None:
        raw = bytearray(path.read_bytes())
        start = raw.find(b"tkhd") + 44  # the track header's 3 x 3 matrix, 16.16 and 2.30 fixed point
        raw[start : start + 36] = struct.pack(">9i", *(np.array(rotation).ravel() << 16))
        path.write_bytes(raw)
    return path


def numbered(count, height=48, width=64):
    """Grey images that tell their number by brightness, with a red upper left corner and a fine pattern."""
    grey = np.arange(count) * (200 // count) + 20
    images = np.tile(grey[:, None, None, None].astype(np.uint8), (1, height, width, 3))
    images[:, :12, :12] = (250, 0, 0)
    images[:, 24:40:2, 24:40] += 30
    return images


def number(images, count):
    return np.round((images[:, 44, 5:40].mean((1, 2)) - 20) / (200 // count)).astype(int).tolist()


def oracle(frames, unit=3.7):
    """geometry(images) as VGGT gives it, from the truth: in the first camera's axes, in a unit of its own."""

    def geometry(images):
        H, W = images.shape[1:3]
        rows = [data.resize_frame(f, (H, W)) for f in zip(frames.colour, frames.depth, frames.masks, frames.intrinsics,
                                                         frames.poses, strict=True)]  # fmt: skip
        depth, K, poses = (np.stack([r[i] for r in rows]) for i in (1, 3, 4))
        poses = np.linalg.inv(poses[0]) @ poses
        poses[:, :3, 3] /= unit
        return (depth / unit).astype(np.float32), np.ones_like(depth), K, poses

    return geometry


# reading a video


def test_frames_are_evenly_spaced_in_time_not_in_number(tmp_path):
    """Half of the frames lie in the first tenth of the time; they make a tenth of what is read."""
    seconds = np.concatenate([np.linspace(0, 1, 50, endpoint=False), np.linspace(1, 10, 50)])
    images, notes = read_video(encode(tmp_path / "a.mp4", numbered(100), seconds), count=10, tries=1)
    found = number(images, 100)
    assert sum(n < 50 for n in found) == 1 and found == sorted(found) and len(found) == 10
    assert notes == ["10 of 100 frames in 10.0 s, each the sharpest of up to 1"]


@pytest.mark.parametrize("gop", [1, 12, 1000])
def test_every_frame_comes_back_whatever_the_distance_of_key_frames(tmp_path, gop):
    images, _ = read_video(encode(tmp_path / "a.mp4", numbered(24), gop=gop), count=100)
    assert number(images, 24) == list(range(24))


def test_the_sharpest_frame_of_an_interval_is_taken(tmp_path):
    images = numbered(40)
    for i in np.flatnonzero(np.arange(40) % 4 != 1):
        images[i, 20:44, 20:44] = images[i, 20:44, 20:44].mean((0, 1))  # no pattern: as blurred as can be
    found, _ = read_video(encode(tmp_path / "a.mp4", images), count=10, tries=4)
    assert number(found, 40) == [n for n in range(40) if n % 4 == 1]
    assert sharpness(images[1, :, :, 0]) > sharpness(images[2, :, :, 0])


def test_a_video_held_upright_is_turned(tmp_path):
    images, _ = read_video(encode(tmp_path / "a.mp4", numbered(3), rotation=TURNED), count=3)
    assert images.shape == (3, 64, 48, 3)
    assert images[0, 5, -5, 0] > 200 > 100 > images[0, 5, 5, 0]  # the red corner moved from the left to the right


def test_large_frames_are_shrunk_and_small_ones_left(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered(3, 120, 160))
    assert read_video(path, longest=80)[0].shape == (3, 60, 80, 3)
    assert read_video(path, longest=1000)[0].shape == (3, 120, 160, 3)


def test_a_recording_that_broke_off_gives_what_it_has(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered(60), gop=6)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * 0.6)])
    images, notes = read_video(path, count=20, tries=1)
    found = number(images, 60)
    assert 5 < len(found) < 20 or int(notes[0].split()[2]) < 60
    assert found == sorted(found) and found[0] < 3


@pytest.mark.parametrize("content", [b"", b"not a video at all", bytes(range(256)) * 40])
def test_a_broken_file_is_one_line(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.mp4: not a whole video \(.*\); copy or record it again") as error:
        read_video(path)
    assert "\n" not in str(error.value)


def test_a_sound_file_and_a_missing_package_are_one_line(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DataError, match="has no pictures"):
        read_video(path)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(DataError, match=r'needs the package av .*pip install -e "\.\[video\]"'):
        read_video(path)


def test_images_are_read_in_the_order_of_their_numbers(tmp_path):
    for i, image in enumerate(numbered(12)):
        Image.fromarray(image).save(tmp_path / f"IMG_{i}.png")
    images, _ = read_images(tmp_path, count=12)
    assert number(images, 12) == list(range(12))
    Image.fromarray(numbered(1, 40, 40)[0]).save(tmp_path / "IMG_12.png")
    with pytest.raises(DataError, match="frames of 2 sizes"):
        read_images(tmp_path)


def test_spread_covers_the_time_and_leaves_no_frame_twice():
    rng = np.random.default_rng(0)
    for n, count, tries in ((1, 32, 8), (5, 32, 8), (1000, 32, 8), (1000, 7, 3), (64, 64, 1)):
        times = np.sort(rng.uniform(0, 100, n))
        groups = spread(times, count, tries)
        flat = np.concatenate(groups)
        assert len(set(flat.tolist())) == len(flat) and (np.diff(flat) > 0).all()
        assert 1 <= len(groups) <= count and max(map(len, groups)) <= tries


# scale


def some_cameras(count=6, seed=0):
    rng = np.random.default_rng(seed)
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = np.linalg.qr(rng.normal(size=(count, 3, 3)))[0]
    poses[:, :3, :3] *= np.linalg.det(poses[:, :3, :3])[:, None, None]
    poses[:, :3, 3] = rng.normal(size=(count, 3))
    return poses


def moved(poses, unit, seed=1):
    world = some_cameras(1, seed)[0]
    out = world @ poses
    out[:, :3, 3] /= unit
    return out


@pytest.mark.parametrize("line", [False, True])
def test_the_scale_is_that_of_the_known_poses_also_along_a_line(line):
    known = some_cameras()
    if line:
        known[:, 1:3, 3] = 0
    scale, off = similarity(moved(known, 4.2), known, "x")
    assert scale == pytest.approx(4.2) and off < 1e-9


def test_poses_that_do_not_fit_or_stand_still_are_refused():
    known = some_cameras()
    flipped = known @ np.diag([1, -1, -1, 1])  # another convention for the camera's axes
    turned = np.linalg.inv(known)
    for wrong in (turned, known[::-1]):
        with pytest.raises(DataError, match=r"disagree by .* name the convention of the poses: opencv, opengl"):
            similarity(moved(known, 2.0), wrong, "x")
    assert similarity(moved(known, 2.0), flipped @ np.diag([1, -1, -1, 1]), "x")[0] == pytest.approx(2.0)
    with pytest.raises(DataError, match="moves less than 10 cm"):
        similarity(known, known * [[[1, 1, 1, 0.001]]] * 1, "x")


# the whole scene, three ways


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    """One room as video, images, frames with poses, frames with depth, and both."""
    folder = tmp_path_factory.mktemp("ways")
    scene = room(3, views=12, size=96)
    whole = write_rgbd(scene, folder / "whole")
    out = {"rgbd": read_scene(whole, scene, longest=96)}
    for kind, lacks in (("poses", "depth.png"), ("depth", "pose.txt"), ("images", "")):
        part = folder / kind
        part.mkdir()
        for file in whole.iterdir():
            if kind == "images" and "color" not in file.name:
                continue
            if not (lacks and file.name.endswith(lacks)):
                name = file.name.replace(".color", "") if kind == "images" else file.name
                (part / name).symlink_to(file)
        out[kind] = read_scene(part, scene)
    out["video"] = read_scene(encode(folder / "room.mp4", scene.frames.colour), scene)
    return out


def read_scene(path, scene, **options):
    reader, _ = data.choose_reader(Path(path))
    if reader is read_views:
        options["geometry"] = oracle(scene.frames)
    return reader(path, **options)


def extent(scene):
    """Length, width and height of what was seen: a cloud from cameras alone may lie a quarter turn off."""
    *level, height = np.ptp(scene.bounds, axis=0)
    return np.array([*sorted(level), height])


def test_what_is_known_makes_a_scene_metric_and_what_is_not_is_guessed(ways):
    assert {k: s.metric for k, s in ways.items()} == {
        "rgbd": True, "poses": True, "depth": True, "images": False, "video": False}  # fmt: skip
    true = extent(ways["rgbd"])
    for kind in ("poses", "depth"):
        np.testing.assert_allclose(extent(ways[kind]), true, atol=0.15)
    for kind in ("images", "video"):
        ratio = extent(ways[kind]) / true
        assert ratio.std() < 0.05  # the same room in another unit
        depth = ways[kind].frames.depth
        assert np.median(depth[depth > 0]) == pytest.approx(data.GUESS, rel=0.02)


def test_all_ways_give_the_same_frames(ways):
    for scene in ways.values():
        assert scene.frames.colour.shape == (12, 96, 96, 3) and scene.frames.depth.shape == (12, 96, 96)
        assert len(scene.points) > 1000 and abs(scene.bounds[0, 2]) < 0.3
    for kind in ("poses", "depth", "images"):
        assert np.array_equal(ways[kind].frames.colour, ways["rgbd"].frames.colour)
    assert np.abs(ways["video"].frames.colour.astype(int) - ways["rgbd"].frames.colour).mean() < 6


def test_masks_that_lie_beside_the_frames_are_the_objects(tmp_path):
    """No SAM 2 is needed where a folder has instance-filt/; our own segments replace them when asked for."""
    scene = room(3, views=12, size=96)
    folder = write_rgbd(scene, tmp_path / "room")
    (folder / "instance-filt").mkdir()
    for i, mask in enumerate(scene.frames.masks):
        Image.fromarray(mask.astype(np.uint16)).save(folder / f"instance-filt/frame-{i:06d}.png")
    found = open_scene(folder, longest=96)
    assert "tracks through the frames" in found.notes[-1]
    seen = [o for o in scene.objects if (scene.frames.masks == o.id).sum() > 100]
    sizes = np.stack([np.sort(o.box[3:]) for o in found.objects])  # the cloud may lie a quarter turn off
    near = [np.abs(sizes - np.sort(o.box[3:])).max(1).min() < 0.25 for o in seen]
    assert np.mean(near) > 0.8 and len(found.objects) <= len(scene.objects)
    assert "segments of our own" in open_scene(folder, longest=96, masks="segments").notes[-1]
    with pytest.raises(DataError, match="--masks 'x' is unknown: choose one of segments, sam2, files"):
        open_scene(folder, masks="x")


def askable(scene):
    """The question types that a scene can be asked once its own segments are its objects."""
    scene = data.with_own_segments(scene)
    scene.identifiers = data.number_objects(scene, np.random.default_rng(0))
    return {t for t in data.GEOMETRY_TASKS if data.question_set([scene], [t], 3, 0)}


def test_metric_questions_are_asked_only_where_the_scale_is_known(ways):
    for scene in ways.values():
        asked = askable(scene)
        assert bool(asked & data.METRIC) == scene.metric
        assert asked >= {"relation", "ground_superlative"}


def test_a_true_length_makes_a_video_metric(ways, tmp_path):
    scene = room(3, views=12, size=96)
    path = encode(tmp_path / "room.mp4", scene.frames.colour)
    guessed = extent(ways["video"])
    true = read_scene(path, scene, scale=2.0)
    assert true.metric
    np.testing.assert_allclose(extent(true), 2 * guessed, rtol=0.03)


def test_one_frame_is_a_scene(tmp_path):
    scene = room(3, views=12, size=96)
    path = encode(tmp_path / "one.mp4", scene.frames.colour[:1])
    one = read_views(path, geometry=lambda images: [a[:1] for a in oracle(scene.frames)(images)])
    assert one.frames.depth.shape[0] == 1 and not one.metric


def test_the_uncertain_fifth_of_the_depth_is_dropped(tmp_path):
    scene = room(3, views=4, size=64)
    path = encode(tmp_path / "a.mp4", scene.frames.colour)

    def unsure(images):
        depth, _, K, poses = oracle(scene.frames)(images)
        confidence = np.arange(depth.size, dtype=np.float32).reshape(depth.shape)
        return depth, confidence, K, poses

    kept = read_views(path, geometry=unsure).frames.depth
    assert (kept > 0).mean() == pytest.approx(0.8, abs=0.02)
    assert not (kept.ravel()[: int(0.19 * kept.size)] > 0).any()


@pytest.mark.parametrize("bad", ["depth", "K", "poses"])
def test_geometry_that_is_not_finite_is_one_line(tmp_path, bad):
    path = encode(tmp_path / "a.mp4", numbered(3))
    parts = {"depth": np.ones((3, 48, 64), np.float32), "confidence": np.ones((3, 48, 64), np.float32),
             "K": np.tile(np.eye(3), (3, 1, 1)), "poses": np.tile(np.eye(4), (3, 1, 1))}  # fmt: skip
    parts[bad][:] = np.nan
    with pytest.raises(DataError, match="no depth and cameras were found"):
        read_views(path, geometry=lambda images: tuple(parts.values()))


# opening


def test_every_kind_of_scene_has_its_reader_and_its_options(tmp_path):
    (tmp_path / "frames").mkdir()
    Image.fromarray(numbered(1)[0]).save(tmp_path / "frames/0.png")
    (tmp_path / "room.MP4").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    assert data.choose_reader(tmp_path / "room.MP4")[0] is read_views
    assert data.choose_reader(tmp_path / "frames")[0] is read_views
    with pytest.raises(DataError, match=r"notes.txt: no kind of scene; give a \.ply, a video"):
        open_scene(tmp_path / "notes.txt")
    with pytest.raises(DataError, match=r"--vggt: has no part in reading .*room\.ply; known here: scale, up"):
        (tmp_path / "room.ply").write_bytes(b"ply")
        open_scene(tmp_path / "room.ply", vggt="x")
    with pytest.raises(DataError, match=r"--convention: has no part in reading .*; known here: longest, masks"):
        open_scene(tmp_path / "room.MP4", convention="opengl")
    with pytest.raises(DataError, match="--sam2: names the weights for --masks sam2; add that"):
        open_scene(tmp_path / "room.MP4", sam2="x")
    whole = write_rgbd(room(3, views=3, size=32), tmp_path / "whole")
    assert data.choose_reader(whole)[1] == {"up", "max_frames", "longest", "masks", "sam2", "depth_scale", "convention"}
    for file in whole.glob("*.depth.png"):
        file.unlink()
    assert data.choose_reader(whole)[1] >= {"convention", "vggt"} and "scale" not in data.choose_reader(whole)[1]
    with pytest.raises(DataError, match="no images"):
        (tmp_path / "empty").mkdir()
        open_scene(tmp_path / "empty")


def test_check_says_what_frames_lack_and_who_finds_it(tmp_path, capsys):
    encode(tmp_path / "a.mp4", numbered(40))
    assert data.main(["check", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "a.mp4: 32 of 40 frames in 1.3 s" in said and "depth and poses: found by VGGT, which is" in said
    whole = write_rgbd(room(3, views=3, size=32), tmp_path / "whole")
    for file in whole.glob("*.depth.png"):
        file.unlink()
    lines = data.check(whole)
    assert lines[0].endswith("3 images without depth") and lines[1].startswith("depth: found by VGGT")
    Image.fromarray(numbered(1)[0]).save(tmp_path / "photo.png")
    assert any(line.endswith("1 images without depth and poses") for line in data.check(tmp_path))


def test_a_missing_vggt_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vggt", None)
    monkeypatch.setitem(__import__("sys").modules, "vggt.models.vggt", None)
    data.load_vggt.cache_clear()
    with pytest.raises(DataError, match=r"needs the package vggt .*: pip install git\+https://github.com/"):
        open_scene(encode(tmp_path / "a.mp4", numbered(3)))


def test_a_scene_survives_being_kept(tmp_path):
    scene = data.with_own_segments(room(5, views=3, size=48))
    data.save_scene(scene, tmp_path / "a.npz")
    again = open_scene(tmp_path / "a.npz")
    for key in data.SCENE_ARRAYS:
        assert np.array_equal(getattr(scene, key), getattr(again, key))
    for key in data.FRAME_ARRAYS:
        assert np.array_equal(getattr(scene.frames, key), getattr(again.frames, key))
    assert [(o.id, o.category, o.colour, *o.box) for o in again.objects] == [
        (o.id, o.category, o.colour, *o.box) for o in scene.objects]  # fmt: skip
    data.save_scene(data.replace(scene, objects=[]), tmp_path / "b.npz")
    empty = open_scene(tmp_path / "b.npz")
    assert not empty.objects and empty.notes == scene.notes, "nothing was found, and is not looked for again"
    assert np.array_equal(data.with_own_segments(empty).frames.masks, scene.frames.masks), "frames on disk will do"
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:2000])
    with pytest.raises(DataError, match="not a whole kept scene"):
        open_scene(tmp_path / "a.npz")


# what words ask for metres


def test_questions_in_metres_are_known_by_their_words_or_their_answers():
    """Every question of a metric type is refused where the scale is unknown, and no question of another type is."""
    scene = room(1)
    scene.identifiers = data.number_objects(scene, np.random.default_rng(0))
    unscaled = data.replace(scene, metric=False)
    refer = lambda i: f"<OBJ{scene.identifiers[i]:03d}>"  # noqa: E731
    for task in data.TASKS:
        for sample in data.question_set([scene], [task], 12, 0):
            question, answer = (data.substitute(t, refer) for t in (sample.question, sample.answer))
            assert bool(data.refuse_measures(unscaled, question, answer)) == (task in data.METRIC), question
            assert data.refuse_measures(scene, question, answer) is None


# the kitchen, and VGGT itself


@needs_kitchen
def test_the_kitchen_as_video_as_frames_with_poses_and_as_rgbd(tmp_path):
    """32 real frames given three ways differ only as they should: in scale, and in what may be asked."""
    rows, camera = data.find_frames(KITCHEN)
    frames = list(data.read_frames(rows, camera, "opencv", 1000.0, []))
    small = data.stack_frames([data.resize_frame(f, (120, 160)) for f in frames])
    true = data.read_rgbd(KITCHEN, size=(120, 160), points=10_000)
    posed = tmp_path / "posed"
    posed.mkdir()
    for file in KITCHEN.iterdir():
        if "depth" not in file.name:
            (posed / file.name).symlink_to(file)
    see = oracle(small)
    video = read_views(encode(tmp_path / "kitchen.mp4", small.colour), geometry=see, longest=160, points=10_000)
    with_poses = read_views(posed, geometry=see, longest=160, points=10_000)
    for scene in (video, with_poses, true):
        assert scene.frames.colour.shape == (32, 120, 160, 3)
    assert (video.metric, with_poses.metric, true.metric) == (False, True, True)
    np.testing.assert_allclose(with_poses.frames.intrinsics, true.frames.intrinsics)
    np.testing.assert_allclose(extent(with_poses), extent(true), atol=0.35)
    up = np.array([scene.frames.poses[:, 2, 1] for scene in (video, with_poses, true)])  # how upright each camera is
    assert np.abs(up - up[2]).max() < 0.08
    asked = []
    for scene in (video, with_poses, true):
        asked.append(askable(scene))
    assert not asked[0] & data.METRIC and asked[1] & asked[2] & data.METRIC >= {"coordinate", "distance_ids"}
    assert asked[0] & asked[1] & asked[2] >= {"relation", "id_size", "id_colour"}


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
    last.bias.data.copy_(torch.tensor([0, 0, 0, 0, 0, 0, 0.25, 0.25, 0.25]))  # added four times: 1 radian
    return model.eval()


def test_vggts_own_parts_give_depth_and_cameras_in_our_conventions():
    images = room(2, views=3, size=60).frames.colour[:, :48]
    depth, confidence, K, poses = data.vggt_geometry(images, small_vggt(), longest=70)
    assert depth.shape == confidence.shape == (3, 48, 60) and (depth > 0).all() and (confidence >= 1).all()
    np.testing.assert_allclose(K[:, 0, 2], 30, rtol=1e-5)
    np.testing.assert_allclose(K[:, 1, 2], 24, rtol=1e-5)
    turn = poses[:, :3, :3]
    np.testing.assert_allclose(turn @ turn.swapaxes(1, 2), np.tile(np.eye(3), (3, 1, 1)), atol=1e-5)


def test_a_video_reaches_a_scene_through_vggts_own_parts(tmp_path, monkeypatch):
    """Untrained, so where things are means nothing; every array has its shape and every number is finite."""
    model = small_vggt()
    monkeypatch.setattr(data, "load_vggt", lambda name: model)
    path = encode(tmp_path / "room.mp4", room(2, views=3, size=96).frames.colour)
    scene = open_scene(path)
    assert scene.frames.depth.shape == (3, 96, 96) and np.isfinite(scene.points).all() and not scene.metric


# images and videos as strangers bring them


def test_photographs_are_turned_as_their_tag_says(tmp_path):
    """A phone writes its sensor's rows, and beside them that it was held upright."""
    image = Image.fromarray(numbered(1)[0])
    tag = image.getexif()
    tag[0x0112] = 6  # turn by 90 degrees clockwise
    image.save(tmp_path / "a.JPG", exif=tag, quality=95)
    (tmp_path / "._a.JPG").write_bytes(b"what a Mac leaves beside it")
    images, _ = read_images(tmp_path)
    assert images.shape == (1, 64, 48, 3)
    assert images[0, 5, -5, 0] > 200 > 100 > images[0, 5, 5, 0]  # the red corner moved from the left to the right


def test_grey_of_16_bits_keeps_its_shade(tmp_path):
    Image.fromarray(np.full((40, 40), 100 * 257, np.uint16)).save(tmp_path / "a.png")
    assert (read_images(tmp_path)[0] == 100).all()


def test_an_image_of_too_many_pixels_is_one_line(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="too many pixels to be a photograph"):
        read_images(tmp_path)


def test_images_too_small_for_a_laplacian_have_no_sharpness():
    assert sharpness(np.ones((2, 300))) == 0


def test_the_video_is_read_and_not_its_cover(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        cover, film = container.add_stream("mjpeg", rate=1), container.add_stream("libx264", rate=30)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        film.width, film.height, film.pix_fmt = 64, 48, "yuv444p"
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(cover.encode())
        for image in numbered(20):
            container.mux(film.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(film.encode())
    assert read_video(path)[0].shape == (20, 48, 64, 3)


def test_a_title_in_another_encoding_does_no_harm(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered(3))
    path.write_bytes(path.read_bytes().replace(b"VideoHandler", b"VideoHand\x80er"))
    assert len(read_video(path)[0]) == 3


# keeping scenes


@pytest.fixture
def videos(tmp_path, monkeypatch):
    """Three videos in a folder, one of them broken, and a stand-in for VGGT."""
    scenes = {f"room{i}": room(i, views=4, size=48) for i in range(2)}
    (tmp_path / "in").mkdir()
    for name, scene in scenes.items():
        encode(tmp_path / f"in/{name}.mp4", scene.frames.colour)
    (tmp_path / "in/torn.mp4").write_bytes(b"x")
    monkeypatch.setattr(data, "load_vggt", lambda name: None)
    monkeypatch.setattr(data, "vggt_geometry", lambda images, model: oracle(scenes["room0"].frames)(images))
    return tmp_path


def test_scenes_are_kept_once_and_what_failed_is_said_and_tried_again(videos, capsys, monkeypatch):
    command = ["cache", str(videos / "in"), str(videos / "out"), "--max-frames", "4"]
    assert data.main(command) == 2
    said = capsys.readouterr().out
    assert "torn: " in said and "not a whole video" in said and "2 of 3 scenes kept" in said
    manifest = data.read_json(videos / "out/manifest.json")
    assert manifest["options"] == {"max_frames": 4} and set(manifest["scenes"]) == {"room0", "room1", "torn"}
    row = manifest["scenes"]["room0"]
    kept = open_scene(videos / "out/room0.npz")
    assert row["frames"] == 4 and not row["metric"] and row["objects"] == len(kept.objects) > 0

    encode(videos / "in/torn.mp4", room(5, views=4, size=48).frames.colour)  # recorded again
    opened = []
    monkeypatch.setattr(data, "open_scene", lambda path, **o: opened.append(path.name) or open_scene(path, **o))
    assert data.main(command) == 0 and opened == ["torn.mp4"]
    assert "3 of 3 scenes kept" in capsys.readouterr().out
    assert data.main([*command[:-1], "5"]) == 2
    assert "was made with the options {'max_frames': 4}" in capsys.readouterr().err


def test_kept_scenes_can_be_trained_on(videos, tmp_path):
    """Without scale, so no question in metres is drawn; the run ends with scores of a scene that it did not see."""
    (videos / "in/torn.mp4").unlink()
    data.cache_scenes(videos / "in", tmp_path / "out", max_frames=4)
    little = ["--steps", "5", "--workers", "0", "--out", str(tmp_path / "run")]
    assert train.main(["--model", "proxy3d", "--data", "cached", "--root", str(tmp_path / "out"), *little]) == 0
    asked = set(data.read_json(tmp_path / "run/metrics.json")) - {"provenance"}
    assert asked and not asked & {"rooms/coordinate", "rooms/distance"}
    (tmp_path / "out/room1.npz").unlink()
    with pytest.raises(DataError, match="1 kept scenes, and one must be left to score in"):
        train.make_kept(argparse.Namespace(root=tmp_path / "out"))


def test_a_kill_between_a_scene_and_its_manifest_loses_nothing(videos, monkeypatch):
    data.cache_scenes(videos / "in/room0.mp4", videos / "out", max_frames=4)
    data.write_manifest(videos / "out/manifest.json", {"max_frames": 4}, {})
    monkeypatch.setattr(data, "open_scene", None)  # whoever opens the video again fails
    rows = data.cache_scenes(videos / "in/room0.mp4", videos / "out", max_frames=4)
    assert rows["room0"]["frames"] == 4
    (videos / "out/manifest.json").unlink()
    with pytest.raises(DataError, match="holds scenes but no manifest of their options"):
        data.cache_scenes(videos / "in/room0.mp4", videos / "out", max_frames=5)


def test_several_processes_keep_the_same_scenes(tmp_path):
    for i in range(3):
        scene = room(i, views=0, points=2000)
        (tmp_path / "in").mkdir(exist_ok=True)
        data.write_ply(tmp_path / f"in/{i}.ply", scene.points, scene.colours, scene.normals)
    one, two = (data.cache_scenes(tmp_path / "in", tmp_path / str(n), workers=n) for n in (1, 2))
    for name in ("0", "1", "2"):
        a, b = (data.load_scene(tmp_path / folder / f"{name}.npz") for folder in "12")
        assert np.array_equal(a.instances, b.instances) and one[name]["objects"] == two[name]["objects"]


def test_a_folder_without_scenes_and_names_that_clash_are_refused(tmp_path):
    with pytest.raises(DataError, match="no scenes; give a video"):
        data.cache_scenes(tmp_path, tmp_path / "out")
    for suffix in ("mp4", "mov"):
        (tmp_path / f"a.{suffix}").write_bytes(b"x")
    with pytest.raises(DataError, match="2 scenes have 1 different names"):
        data.cache_scenes(tmp_path, tmp_path / "out")


def test_kept_scenes_whose_arrays_do_not_belong_together_are_one_line(tmp_path):
    path, scene = tmp_path / "a.npz", data.with_own_segments(room(1, views=2, size=48))
    data.save_scene(scene, path)
    held = dict(np.load(path))
    assert len(data.load_scene(path).points) == len(scene.points)
    for change in ({"points": held["points"][:9]}, {"frames.poses": None}):
        np.savez(path, **{k: v for k, v in (held | change).items() if v is not None})
        with pytest.raises(DataError, match="its arrays do not belong together"):
            data.load_scene(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="not a whole kept scene"):
        data.load_scene(path)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, capsys):
    scene = room(1, views=1, size=32)
    data.write_ply(tmp_path / "a.ply", scene.points, scene.colours, scene.normals)
    (tmp_path / "file").write_bytes(b"")
    for command in (["cache", str(tmp_path / "a.ply")], ["rooms", "--count", "1"]):
        assert data.main([*command, str(tmp_path / "file/out")]) == 2
        said = capsys.readouterr().err.splitlines()
        assert "cannot be written (Not a directory); name another place" in said[-1] and "Traceback" not in str(said)
