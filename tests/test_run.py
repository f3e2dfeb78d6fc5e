"""The commands a stranger types, in little: make rooms, train, train in scans, ask, shard.

pytest tests/test_run.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import data
import evaluate
import proxy3d
import train

LITTLE = ["--model", "proxy3d", "--steps", "5", "--workers", "0", "--set", "0 tower.batch=2"]
LITTLE += [f"{stage.name}.batch=16" for stage in proxy3d.STAGES["tiny"][1:]]
LITTLE += ["IV proxies.tasks={'ground': 1.0}"]  # one benchmark to score is enough
ROOMS = ["--train-scenes", "3", "--test-scenes", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of five steps, one per stage."""
    out = tmp_path_factory.mktemp("runs") / "proxy3d"
    assert train.main([*LITTLE, *ROOMS, "--no-eval", "--out", str(out)]) == 0
    return out


def test_every_stage_trains_in_turn(run):
    """A stage that was skipped, or a checkpoint that belongs to an earlier one, would show here."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == [stage.name for stage in proxy3d.STAGES["tiny"]]
    assert data.read_state(run)["position"]["stage"] == 5 and (run / "loss.png").stat().st_size > 5000


def test_a_run_s_record_is_all_that_scoring_needs(run):
    """config.json and the weights give the model back; no training scene is made for it."""
    record = json.loads((run / "config.json").read_text())
    assert record == data.read_state(run)["run"]
    config = data.from_json(proxy3d.Config, record["config"])
    model = proxy3d.build(config, data.load_text(record["text"]))
    data.load_weights(model, run)
    stages = [data.stage_of(row) for row in record["stages"]]
    model.configure_stage(stages[-1])
    assert [stage.batch for stage in stages] == [2, 16, 16, 16, 16] and stages[-1].files == proxy3d.SPACESPAN
    assert record["scene_counts"] == {"train": 3, "test": 2} and record["dtype"] == "float32"


def test_rooms_written_as_scans_can_be_checked_trained_in_and_asked_about(run, tmp_path, capsys):
    assert data.main(["rooms", str(tmp_path), "--count", "2", "--seed", "7"]) == 0
    assert data.main(["check", str(tmp_path)]) == 0
    out = ["--data", "scannet", "--root", str(tmp_path), "--no-eval", "--out", str(tmp_path / "run")]
    assert train.main([*LITTLE, *out]) == 0
    ask = [
        "--run",
        str(run),
        "--scene",
        str(tmp_path / "scans" / "scene0007_00"),
        "--ask",
        "what is <OBJ007>?",
    ]
    capsys.readouterr()
    evaluate.main(ask)
    assert "what is <OBJ007>?" in capsys.readouterr().out


def test_the_demo_shows_shapes_a_falling_loss_and_an_answer(capsys):
    """What `python proxy3d.py` prints."""
    proxy3d.demo()
    said = capsys.readouterr().out
    losses = [float(line.split()[-1]) for line in said.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.1 * losses[0] and "[96, 3]" in said and "->" in said


def test_a_sharded_run_of_two_processes_ends_with_scores_and_pictures(run, tmp_path):
    """Frozen work, answers and pictures need whole weights on every rank; only the first process draws, and the
    second waits for it."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "train.py",
    ]
    command = [*launch, *LITTLE, *ROOMS, "--shard", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        command, cwd=Path(train.__file__).parent, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "run/metrics.json").read_text())
    assert scores["rooms/grounding"]["count"] > 0
    assert (tmp_path / "run/report.html").exists() and len([*(tmp_path / "run/pictures").glob("*.png")]) >= 2
    alone, shared = data.read_tensors(run, "weights"), data.read_tensors(tmp_path / "run", "weights")
    for name, tensor in alone.items():  # one process that trained in the same rooms
        # Adam turns a gradient of rounding size into a full step: single entries may differ
        off = (shared[name] - tensor).abs() > 1e-4 + 0.01 * tensor.abs()
        assert off.sum() <= 2 + 0.01 * tensor.numel(), name
