"""The commands a stranger types, in little and in one process: train, look at data, ask about a scene of one's own.

    pytest tests/test_run.py
"""

import contextlib
import io
import json
import os
import sys

import pytest
import torch
from test_evaluate import two_processes

import data
import evaluate
import fase3d
import proxy3d
import train

SMALL = ["--set", "0 tower.batch=2", "I identifiers.batch=16", "II coordinates.batch=16", "III relations.batch=48",
         "IV proxies.batch=16"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of five steps, one per stage."""
    out = tmp_path_factory.mktemp("runs") / "proxy3d"
    command = ["--model", "proxy3d", "--steps", "5", "--train-scenes", "3", "--test-scenes", "1", "--workers", "0"]
    assert train.main([*command, "--no-eval", "--out", str(out), *SMALL]) == 0
    return out


def test_every_stage_trains_in_turn(run):
    """A stage that was skipped, or a checkpoint that belongs to an earlier one, would show here."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == [stage.name for stage in proxy3d.STAGES["tiny"]]
    assert data.read_state(run)["position"]["stage"] == 5


def test_rooms_written_as_scans_can_be_checked_and_asked(run, tmp_path, capsys):
    """From files alone: the labelled objects come back with their categories, and an answer comes with a picture."""
    assert data.main(["rooms", str(tmp_path), "--count", "1", "--seed", "7"]) == 0
    scan = tmp_path / "scans" / "scene0007_00"
    assert data.main(["check", str(tmp_path)]) == 0 and "1 scans, 1 with exported frames" in capsys.readouterr().out
    picture = tmp_path / "ask.png"
    ask = ["--scene", str(scan), "--run", str(run), "--out", str(picture)]
    assert proxy3d.main([*ask, "--ask", "what is <OBJ007>?", "--ask", "how many gizmos are there?"]) == 0
    said = capsys.readouterr().out
    assert "what is <OBJ007>?" in said and "'gizmos'" in said and picture.stat().st_size > 10_000
    assert data.open_scene(scan).objects[0].category in data.CATEGORIES


@pytest.mark.parametrize(("arguments", "says"), [
    (["--scene", "nowhere", "--ask", "x"], "--run: name a trained run"),
    (["--scene", "nowhere", "--ask", "x", "--run", "RUN"], "nowhere: no such scene"),
    (["--scene", "nowhere", "--ask", "x", "--run", "nothing"], "no trained model here"),
    (["--ask", "x"], "--scene"),
    (["--scene", "x", "--skale", "2"], "unrecognized arguments: --skale 2; known: --scene, --ask, "),
    (["--scene", "x", "--max-frames", "many"], "--max-frames: many is not a whole number of at least 1"),
    (["--scene", "x", "--scale", "0"], "--scale: 0 is not a number above 0"),
])  # fmt: skip
def test_a_wrong_question_gets_one_line_and_status_2(run, arguments, says, capsys):
    assert proxy3d.main([str(run) if a == "RUN" else a for a in arguments]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


@pytest.mark.parametrize("flag", ["--train-scenes", "--test-scenes"])
def test_no_scenes_are_refused_in_one_line(tmp_path, flag, capsys):
    """They would divide by zero, the test scenes only after all the training is done."""
    assert train.main(["--model", "proxy3d", "--workers", "0", "--train-scenes", "1", "--test-scenes", "1", flag, "0",
                       "--out", str(tmp_path / "run")]) == 2  # fmt: skip
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("0 to score in" in said or "0 scenes to train in" in said)


def test_a_run_of_another_paper_is_refused(run, tmp_path, capsys):
    """Its weights would not fit, and the message of a failing load names tensors, not the mistake."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    state = data.read_state(run)
    (folder / "state.json").write_text(json.dumps(state | {"run": state["run"] | {"model": "fase3d"}}))
    assert proxy3d.main(["--scene", str(tmp_path), "--ask", "x", "--run", str(tmp_path)]) == 2
    assert "holds a fase3d" in capsys.readouterr().err


def test_a_run_of_other_settings_is_refused(run, tmp_path, capsys):
    """Dropping what this code does not know would build another model than the one that was trained."""
    (tmp_path / "checkpoint").mkdir()
    state = data.read_state(run)
    state["run"]["config"]["colour_of_the_sky"] = "blue"
    (tmp_path / "checkpoint" / "state.json").write_text(json.dumps(state))
    assert proxy3d.main(["--scene", str(tmp_path), "--ask", "x", "--run", str(tmp_path)]) == 2
    assert "colour_of_the_sky" in capsys.readouterr().err


def test_a_picture_shows_segments_that_are_no_objects(tmp_path):
    """Held-out frames confirm only some segments: the cloud still holds the ids of the others, also larger ones."""
    scene = data.room(3, views=2, size=32, points=256)
    scene.objects = [o for o in scene.objects if o.id < 4]
    data.draw_scene(scene, tmp_path / "scene.png")
    assert (tmp_path / "scene.png").stat().st_size > 10_000


def test_the_demo_shows_shapes_a_falling_loss_and_an_answer(capsys):
    """What `python proxy3d.py` prints; CI also runs it in a folder that holds only proxy3d.py and data.py."""
    assert proxy3d.main([]) == 0
    said = capsys.readouterr().out
    losses = [float(line.split()[-1]) for line in said.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.1 * losses[0] and "[96, 3]" in said and "->" in said


@pytest.fixture(scope="module")
def points_run(tmp_path_factory):
    """A run of Fase3D of five steps, and a room's cloud as files with and without colour."""
    out = tmp_path_factory.mktemp("runs") / "fase3d"
    small = [f"{s.name}.batch={8 if s.tasks or s.name == '2 task' else 2}" for s in fase3d.STAGES["tiny"]]
    command = ["--model", "fase3d", "--steps", "5", "--train-scenes", "3", "--test-scenes", "1", "--workers", "0"]
    assert train.main([*command, "--no-eval", "--out", str(out), "--set", *small]) == 0
    scene = data.room(3, views=0)
    data.write_ply(out / "cloud.ply", scene.points, scene.colours, scene.normals)
    rows = "\n".join(" ".join(f"{v:.4f}" for v in p) for p in scene.points)
    head = f"ply\nformat ascii 1.0\nelement vertex {len(scene.points)}\n"
    (out / "bare.ply").write_text(head + "".join(f"property float {a}\n" for a in "xyz") + "end_header\n" + rows + "\n")
    return out


def test_a_bare_cloud_can_be_asked_about_points_and_places(points_run, capsys):
    """A .ply has no superpoints, no objects, perhaps no normals and no colour: what is missing is made, or said."""
    for file in ("cloud.ply", "bare.ply"):
        ask = ["--scene", str(points_run / file), "--run", str(points_run), "--out", str(points_run / "ask.png")]
        assert fase3d.main([*ask, "--ask", "what colour is the sofa?", "--ask", "is there a bed?"]) == 0
        said = capsys.readouterr().out
        assert ("this cloud has no colour." in said) == (file == "bare.ply")
    assert fase3d.main([*ask, "--ask", "what is this?", "--at", "1.0,-0.5,0.4"]) == 0


@pytest.mark.parametrize("end", ["quit\n", "\n", "\x04"], ids=["quit", "empty", "Ctrl-D"])
def test_questions_typed_at_a_terminal_are_answered_one_after_another(points_run, end, capsys, monkeypatch):
    """As if all had been given with --ask; the scene is read once, one bad question does not end it, and the picture
    is drawn at the end with all that was asked."""
    asked = ["how many chairs are there?", "what colour is the sofa?", "how many gizmos are there?"]
    command = ["--scene", str(points_run / "bare.ply"), "--run", str(points_run), "--out", str(points_run / "ask.png")]
    assert fase3d.main([*command, *(word for q in asked for word in ("--ask", q))]) == 0
    expected = [line for line in capsys.readouterr().out.splitlines() if "?" in line]
    encode, encoded, drawn = fase3d.Model.encode, [], []
    monkeypatch.setattr(fase3d.Model, "encode", lambda model, scenes: encoded.append(1) or encode(model, scenes))
    monkeypatch.setattr(data, "draw_scene", lambda scene, path, lines, *_: drawn.append(lines))
    master, slave = os.openpty()
    os.write(master, "\n".join([asked[0], "what is <obj 999>?", *asked[1:], end]).encode())
    with open(slave) as stdin, open(slave, "w", closefd=False) as stdout:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "stdout", stdout)
        assert fase3d.main(command) == 0
    monkeypatch.undo()
    said = b""
    with open(master, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # raised when all is read
        while part := terminal.read(4096):
            said += part
    said = said.decode()
    assert drawn == [expected] and len(encoded) == 1
    assert said.count("\n? ") >= 4 and "this cloud has no colour." in said and "'gizmos'" in said
    assert "<obj 999>: bare has no such object" in said and said.rstrip().endswith("ask.png")


def test_without_a_question_and_without_a_terminal_there_is_nothing_to_answer(points_run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("how many chairs are there?"))
    assert fase3d.main(["--scene", str(points_run / "cloud.ply"), "--run", str(points_run)]) == 2
    said = capsys.readouterr().err
    assert "--ask: give a question" in said and said.count("\n") == 1


def test_a_place_must_be_three_numbers_and_a_model_that_takes_places(run, points_run, capsys):
    ask = ["--scene", str(points_run / "cloud.ply"), "--ask", "what is this?"]
    assert fase3d.main([*ask, "--run", str(points_run), "--at", "1,2"]) == 2
    assert "give three numbers in metres" in capsys.readouterr().err
    assert proxy3d.main([*ask, "--run", str(run), "--at", "1,2,3"]) == 2
    assert "takes no places; fase3d does" in capsys.readouterr().err


def test_captions_of_clusters_are_scored_where_they_fit(points_run, capsys):
    """`--proposals clusters`: the model's own, and m@kIoU stands first."""
    out = points_run / "clusters"
    what = ["--benchmark", "rooms/caption", "--proposals", "clusters", "--out", str(out)]
    evaluate.main(["--run", str(points_run), *what])
    entry = json.loads((out / "metrics.json").read_text())["rooms/caption@clusters"]
    assert next(iter(entry)).endswith("@0.5/chat-scene") and entry["proposals"]["source"] == "clusters"


def test_a_file_where_a_folder_is_to_be_written_gets_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "taken").touch()
    little = ["--steps", "5", "--train-scenes", "1", "--test-scenes", "1", "--workers", "0", *SMALL]
    assert train.main(["--model", "proxy3d", "--out", str(tmp_path / "taken"), *little]) == 2
    said = capsys.readouterr().err
    assert "taken" in said and said.count("\n") == 1
    assert data.main(["rooms", str(tmp_path / "taken"), "--count", "1"]) == 2
    said = capsys.readouterr().err
    assert "taken" in said and said.count("\n") == 1


def test_a_picture_that_cannot_be_written_and_a_missing_argument_get_one_line_too(points_run, capsys):
    taken = points_run / "cloud.ply"  # a file, and no folder
    ask = ["--scene", str(taken), "--ask", "is there a bed?", "--run", str(points_run), "--out", str(taken / "a.png")]
    for main, command, says in ((fase3d.main, ask, "cloud.ply"), (data.main, ["rooms"], "required: out")):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1


def test_a_sharded_run_of_two_processes_ends_with_scores_and_pictures(run, tmp_path):
    """Frozen work, the untrained tower, answers and pictures need whole weights on every rank, also within each other;
    only the first process draws, and the second waits for it."""
    small = "0 tower.batch=2|I identifiers.batch=16|II coordinates.batch=16|III relations.batch=48|IV proxies.batch=16"
    script = (
        "import sys, train; sys.exit(train.main(['--model', 'proxy3d', '--steps', '5', '--train-scenes', '3', "
        "'--test-scenes', '2', '--workers', '0', '--shard', '--out', sys.argv[1], '--set', *sys.argv[2].split('|')]))"
    )
    two_processes(script, str(tmp_path / "run"), small)
    scores = json.loads((tmp_path / "run/metrics.json").read_text())
    assert "untrained tower" in scores["rooms/grounding"]["columns"] and scores["provenance"]["processes"] == 2
    assert (tmp_path / "run/report.html").exists() and len([*(tmp_path / "run/pictures").glob("*.png")]) >= 2
    for name, tensor in data.read_tensors(run, "weights").items():  # one process that trained in three rooms as well
        assert torch.allclose(data.read_tensors(tmp_path / "run", "weights")[name], tensor, rtol=1e-3, atol=1e-3), name
