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


@pytest.fixture
def cloud(scene, tmp_path):
    data.write_ply(tmp_path / "room.ply", scene.points, scene.colours, scene.normals)
    return tmp_path / "room.ply"


@pytest.mark.parametrize("flags", [
    ["--scale", "0"], ["--scale", "-1"], ["--scale", "nan"], ["--scale", "inf"], ["--depth-scale", "0"],
    ["--max-frames", "0"], ["--max-frames", "-1"], ["--longest", "0"], ["--up", "q"], ["--convention", "q"],
    ["--out", "a.xyz"], ["--out", "."], ["--ask", ""], ["--ask", "  "],
])  # fmt: skip
def test_values_that_cannot_be_are_refused_where_they_enter(runs, cloud, capsys, flags):
    command = ["--scene", str(cloud), "--run", str(runs / "fase3d"), "--ask", "is there a bed?", *flags]
    assert fase3d.main(command) == 2
    said = capsys.readouterr().err
    assert flags[0] in said and said.count("\n") == 1


def test_masks_of_an_unknown_kind_are_refused_before_a_scene_is_read(scene, tmp_path):
    encode(tmp_path / "a.mp4", scene.frames.colour)
    with pytest.raises(data.DataError, match="--masks 'foo' is unknown: choose one of segments, sam2"):
        data.open_scene(tmp_path / "a.mp4", masks="foo", vggt="none")


def test_values_may_begin_with_a_minus(runs, cloud, tmp_path, capsys):
    command = ["--scene", str(cloud), "--run", str(runs / "fase3d"), "--out", str(tmp_path / "a.png")]
    assert fase3d.main([*command, "--ask", "is it?", "--up", "-y", "--at", "-1.5,0,1"]) == 0
    assert "up = -y as given" in capsys.readouterr().out


@pytest.mark.parametrize("command", [
    ["cache", "a", "b", "--workers", "0"], ["cache", "a"],
    ["rooms", "a", "--count", "0"], ["rooms", "a", "--seed", "-1"],
])  # fmt: skip
def test_errors_of_the_commands_of_data_are_one_line(capsys, command):
    assert data.main(command) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("question", ["what for $x_{1$?", "どこ?", "is it \udcff?"])
def test_any_text_can_be_asked_and_drawn(runs, cloud, tmp_path, capsys, question):
    """Neither mathematics, nor a script without letters in the font, nor bytes of another encoding."""
    command = ["--scene", str(cloud), "--run", str(runs / "fase3d"), "--out", str(tmp_path / "a.png")]
    assert fase3d.main([*command, "--ask", question]) == 0
    assert not capsys.readouterr().err and (tmp_path / "a.png").exists()


def test_a_prompt_goes_on_after_bytes_that_are_no_text_and_ends_at_an_interrupt(monkeypatch, capsys):
    said = iter([UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), "is it?", KeyboardInterrupt()])

    def typing(prompt):
        word = next(said)
        if isinstance(word, str):
            return word
        raise word

    monkeypatch.setattr("builtins.input", typing)
    assert list(data.typed()) == [["is it?"]]
