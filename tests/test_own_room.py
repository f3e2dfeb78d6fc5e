"""The whole way of a room of one's own: a video or a cloud in, an answer and a picture out, through the command line. A
stand-in that knows the room takes VGGT's place; where SAM 2 is not installed its test skips and says so. The runs are
untrained, so that their answers mean nothing here but that all parts fit together."""

import numpy as np
import papers
import pytest
from PIL import Image
from test_video import encode, oracle

import data
import evaluate
import train

QUESTIONS = ["what is the largest thing?", "how far is the door from the bed?"]
NO_SCALE = "this scene has no known scale"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of every paper, a step per stage."""
    out = tmp_path_factory.mktemp("runs")
    for name in papers.PAPERS:
        stages = papers.stages_of(name)
        little = [f"{stage.name}.batch={16 if stage.tasks else 2}" for stage in stages]
        command = (
            f"--model={name} --steps={len(stages)} --train-scenes=3 --test-scenes=1 --workers=0 --no-eval"
        )
        assert train.main([*command.split(), f"--out={out}/{name}", "--set", *little]) == 0
    return out


@pytest.fixture(scope="module")
def scene():
    return data.room(3, views=6, size=96)


@pytest.fixture
def video(scene, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load_vggt", lambda name: None)
    monkeypatch.setattr(data, "vggt_geometry", oracle(scene.frames))
    return encode(tmp_path / "room.mp4", scene.frames.color)


def ask(runs, paper, path, *more):
    """Ask the command line; it draws a picture."""
    picture = path.parent / "ask.png"
    command = f"--run {runs / paper} --scene {path} --out {picture}".split()
    for question in QUESTIONS:
        command += ["--ask", question]
    assert evaluate.main([*command, *more]) == 0
    assert len(np.unique(np.asarray(Image.open(picture).convert("L")))) > 50  # drawn, not blank


@pytest.mark.parametrize("paper", papers.PAPERS)
def test_a_video_ends_in_an_answer_in_meters_where_its_scale_is_known(runs, video, capsys, paper):
    ask(runs, paper, video)
    said = capsys.readouterr().out
    assert all(question in said for question in QUESTIONS)
    assert f"bed?  {NO_SCALE}" in said and "m, guessed" in said
    ask(runs, paper, video, "--scale", "1.5")
    assert NO_SCALE not in capsys.readouterr().out


def test_tracks_of_sam_2_become_the_objects_of_a_video(runs, video, capsys, monkeypatch):
    pytest.importorskip("sam2", reason=f"SAM 2 was not run: {data.INSTALL['sam2']}")
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
    from test_masks import tiny_sam2

    def generator(model):
        easy = dict(points_per_side=2, pred_iou_thresh=0.0, stability_score_thresh=0.0, box_nms_thresh=1.0)
        made = SAM2AutomaticMaskGenerator(model, **easy)
        made.predictor._bb_feat_sizes = [(64, 64), (32, 32), (16, 16)]  # for 256 pixels
        return made

    monkeypatch.setattr(data, "load_sam2", lambda name: tiny_sam2())
    monkeypatch.setattr("sam2.automatic_mask_generator.SAM2AutomaticMaskGenerator", generator)
    ask(runs, "proxy3d", video, "--masks", "sam2")
    assert "tracks through the frames" in capsys.readouterr().out


@pytest.mark.parametrize("paper", ["fase3d", "spatial3dllm"])
def test_a_cloud_and_one_in_which_nothing_is_found_can_be_asked(runs, scene, tmp_path, paper):
    """A blank wall has no segment; the answer may be empty, the command is not an error."""
    wall = np.abs(scene.points[:, 0] - scene.points[:, 0].min()) < 0.02
    for name, part in (("room", slice(None)), ("wall", wall)):
        data.write_ply(tmp_path / f"{name}.ply", scene.points[part], scene.colors[part], scene.normals[part])
        ask(runs, paper, tmp_path / f"{name}.ply")
