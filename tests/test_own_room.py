"""The whole way of a room of one's own: a video file, frames or a cloud in, an answer and pictures out, through the
command line. Where VGGT or SAM 2 are not installed, those tests skip and say so; a stand-in that knows the room takes
VGGT's place in the others. Both run untrained, so that their results mean nothing here but that they fit together."""

from functools import partial

import numpy as np
import pytest
from PIL import Image
from test_masks import SMALL, TINY
from test_video import encode, oracle, small_vggt

import data
import fase3d
import proxy3d
import spatial3dllm
import train

PAPERS = {"proxy3d": proxy3d, "fase3d": fase3d, "spatial3dllm": spatial3dllm}
QUESTIONS = ["what is the largest thing?", "how many things are there?"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of every paper, a step per stage; Proxy3D's with Qwen2.5-VL's own tower and inter-frame attention."""
    out = tmp_path_factory.mktemp("runs")
    for name, paper in PAPERS.items():
        little = [f"{s.name}.batch={16 if s.tasks else 2}" for s in paper.STAGES["tiny"]]
        little += [f"{s.name}.per_scene=16" for s in paper.STAGES["tiny"] if s.per_scene > 16]
        little += ["tower=qwen", "inter_frame=true"] if name == "proxy3d" else []
        steps = str(len(paper.STAGES["tiny"]))
        command = ["--model", name, "--steps", steps, "--train-scenes", "3", "--test-scenes", "1", "--workers", "0"]
        assert train.main([*command, "--no-eval", "--out", str(out / name), "--set", *little]) == 0
    return out


@pytest.fixture(scope="module")
def scene():
    return data.room(3, views=6, size=96)


def ask(paper, runs, path, out, *more):
    """What the command line says, and the picture."""
    questions = [word for q in QUESTIONS for word in ("--ask", q)]
    command = ["--scene", str(path), "--run", str(runs / paper), "--out", str(out), *questions, *more]
    assert PAPERS[paper].main(command) == 0
    assert len(np.unique(np.asarray(Image.open(out).convert("L")))) > 50  # drawn, not blank


@pytest.mark.parametrize("masks", ["segments", "sam2"])
@pytest.mark.parametrize("geometry", ["stand-in", "vggt"])
def test_a_video_file_ends_in_an_answer(runs, scene, tmp_path, capsys, monkeypatch, geometry, masks):
    """Decoding, depth and cameras, masks, tower with inter-frame attention, proxies, language model, picture."""
    if masks == "sam2":
        pytest.importorskip("sam2", reason=f"SAM 2 was not run: {data.INSTALL['sam2']}")
        network = data.load_sam2(None, config=TINY, device="cpu", **SMALL)
        easy = dict(points_per_side=2, pred_iou_thresh=0.0, stability_score_thresh=0.0, box_nms_thresh=1.0)
        monkeypatch.setattr(data, "load_sam2", lambda name: network)
        monkeypatch.setattr(data, "automatic_masks", partial(data.automatic_masks, **easy))
    if geometry == "vggt":
        network_of_depth = small_vggt()
        monkeypatch.setattr(data, "load_vggt", lambda name: network_of_depth)
    else:
        monkeypatch.setattr(data, "load_vggt", lambda name: None)
        monkeypatch.setattr(data, "vggt_geometry", lambda images, model: oracle(scene.frames)(images))
    path = encode(tmp_path / "room.mp4", scene.frames.colour)
    ask("proxy3d", runs, path, tmp_path / "ask.png", "--masks", masks, "--ask", "how tall is the door?")
    said = capsys.readouterr().out
    assert all(q in said for q in QUESTIONS) and (tmp_path / "ask_attention.png").exists()
    assert "how tall is the door?  this scene has no known scale: give poses, depth or --scale." in said
    assert ("tracks through the frames" if masks == "sam2" else "segments of our own") in said


@pytest.mark.parametrize("paper", ["fase3d", "spatial3dllm"])
def test_the_papers_of_points_answer_about_a_video_too(runs, scene, tmp_path, capsys, monkeypatch, paper):
    """On the cloud fused from its frames; with a true length the same video is asked in metres."""
    monkeypatch.setattr(data, "load_vggt", lambda name: None)
    monkeypatch.setattr(data, "vggt_geometry", lambda images, model: oracle(scene.frames)(images))
    path = encode(tmp_path / "room.mp4", scene.frames.colour)
    ask(paper, runs, path, tmp_path / "ask.png", "--ask", "how far is the door from the bed?")
    assert "bed?  this scene has no known scale" in capsys.readouterr().out
    ask(paper, runs, path, tmp_path / "ask.png", "--scale", "1.5", "--ask", "how far is the door from the bed?")
    assert "no known scale" not in capsys.readouterr().out


def test_ten_questions_in_one_call_get_the_answers_of_ten_calls(runs, scene, tmp_path, capsys):
    """The scene is read once and its tokens pass the language model once."""
    data.write_ply(tmp_path / "room.ply", scene.points, scene.colours, scene.normals)
    command = ["--scene", str(tmp_path / "room.ply"), "--run", str(runs / "fase3d"), "--out", str(tmp_path / "a.png")]
    things = ("chair", "bed", "lamp", "door", "rug")
    asked = [f"{start} {what}?" for start in ("is there a", "how many are") for what in things]
    assert fase3d.main([*command, *(word for q in asked for word in ("--ask", q))]) == 0
    together = [line for line in capsys.readouterr().out.splitlines() if "?" in line]
    alone = []
    for question in asked:
        assert fase3d.main([*command, "--ask", question]) == 0
        alone += [line for line in capsys.readouterr().out.splitlines() if "?" in line]
    assert together == alone and len(alone) == 10


@pytest.mark.parametrize(("make", "says"), [
    (lambda p: (p / "a.mp4").write_bytes(b"\0" * 5000), "not a whole video"),
    (lambda p: (p / "a.mp4").write_bytes(b""), "not a whole video"),
    (lambda p: (p / "a.ply").write_bytes(b"ply\nformat ascii 1.0\n"), "not a whole PLY file"),
    (lambda p: (p / "a").mkdir(), "no images"),
])  # fmt: skip
def test_what_is_no_scene_ends_in_one_line(runs, tmp_path, capsys, make, says):
    make(tmp_path)
    path = next(tmp_path.iterdir())
    for name, paper in PAPERS.items():
        assert paper.main(["--scene", str(path), "--run", str(runs / name), "--ask", "what is this?"]) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1


def test_a_cloud_of_millimetres_is_refused_and_read_with_its_scale(runs, scene, tmp_path, capsys):
    data.write_ply(tmp_path / "mm.ply", scene.points * 1000, scene.colours, scene.normals)
    command = ["--scene", str(tmp_path / "mm.ply"), "--run", str(runs / "fase3d"), "--ask", "is there a bed?"]
    assert fase3d.main([*command, "--out", str(tmp_path / "a.png")]) == 2
    assert "hardly metres; if millimetres, scale = 0.001 (--scale 0.001)" in capsys.readouterr().err
    assert fase3d.main([*command, "--scale", "0.001", "--out", str(tmp_path / "a.png")]) == 0


def test_a_scene_in_which_nothing_was_found_can_still_be_asked(runs, scene, tmp_path, capsys):
    """A blank wall has no segment; the answer may be empty, the command is not an error."""
    blank = data.replace(scene, objects=[], instances=np.zeros(len(scene.points), np.int64))
    wall = (blank.normals[:, 2] == 0) & (np.abs(blank.points[:, 0] - blank.points[:, 0].min()) < 0.02)
    data.write_ply(tmp_path / "wall.ply", *(a[wall] for a in (blank.points, blank.colours, blank.normals)))
    for paper in ("fase3d", "spatial3dllm"):
        ask(paper, runs, tmp_path / "wall.ply", tmp_path / "ask.png")
        assert "objects are 0 segments" in capsys.readouterr().out
