"""The commands a stranger types, in little: make rooms, train, train in scans, ask, shard.

pytest tests/test_run.py
"""

import json
import math
import re
import subprocess
from pathlib import Path

import official
import papers
import pytest

import data
import evaluate
import proxy3d
import train

LITTLE = ["--model=proxy3d", "--steps=5", "--workers=0", "--set", "0 tower.batch=2"]
LITTLE += [f"{stage.name}.batch=16" for stage in proxy3d.STAGES["tiny"][1:]]
LITTLE += ["IV proxies.tasks={'ground': 1.0}"]  # one benchmark to score is enough
ROOMS = ["--train-scenes=3", "--test-scenes=2"]


def launch(*flags):
    """Train on two processes; what they print."""
    command = [*papers.LAUNCH, "--nproc_per_node=2", "train.py", *flags]
    place = Path(train.__file__).parent
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of five steps, one per stage."""
    out = tmp_path_factory.mktemp("runs") / "proxy3d"
    assert train.main([*LITTLE, *ROOMS, "--no-eval", "--out", str(out)]) == 0
    return out


def test_every_stage_trains_in_turn(run):
    """A stage that was skipped, or a checkpoint that belongs to an earlier one, would show here."""
    lines = papers.rows(run / "log.jsonl")
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
    assert data.main(["rooms", str(tmp_path), "--count=2", "--seed=7"]) == 0
    assert data.main(["check", str(tmp_path)]) == 0
    flags = ["--data=scannet", f"--root={tmp_path}", "--no-eval", f"--out={tmp_path}/run"]
    assert train.main([*LITTLE, *flags]) == 0
    capsys.readouterr()
    evaluate.main([f"--run={run}", f"--scene={tmp_path}/scans/scene0007_00", "--ask=what is <OBJ007>?"])
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
    launch(*LITTLE, *ROOMS, "--shard", f"--out={tmp_path}/run")
    scores = json.loads((tmp_path / "run/metrics.json").read_text())
    assert scores["rooms/grounding"]["count"] > 0
    assert (tmp_path / "run/report.html").exists() and len([*(tmp_path / "run/pictures").glob("*.png")]) >= 2
    alone, shared = data.read_tensors(run, "weights"), data.read_tensors(tmp_path / "run", "weights")
    for name, tensor in alone.items():  # one process that trained in the same rooms
        # Adam turns a gradient of rounding size into a full step: single entries may differ
        off = (shared[name] - tensor).abs() > 1e-4 + 0.01 * tensor.abs()
        assert off.sum() <= 2 + 0.01 * tensor.numel(), name


def write_official(root, rooms):
    """Questions about scans in the files of two benchmarks and of MMScan, which numbers objects its own way."""
    official.write(root, "scanqa", "train", official.questions(rooms[1:], "scanqa"))
    official.write(root, "multi3drefer", "train", official.questions(rooms[1:], "multi3drefer"))
    (root / "scannetv2_val.txt").write_text(rooms[0].name)
    boxes, rows = {}, []
    for room in rooms[1:]:
        boxes[room.name] = {str(90 - o.id): o.box.tolist() for o in room.objects}
        for o in room.objects:
            kind = ("VG_Inter_Space_OO", "VG_Single_EQ")[o.id % 2]
            asked = {"ID": f"VG_{room.name}_{o.id}", "sub_class": kind, "text": f"{room.name} {o.id}"}
            rows.append(asked | {"scan_id": f"scannet/{room.name}", "target_id": [90 - o.id]})
    (root / "MMScan_boxes.json").write_text(json.dumps(boxes))
    (root / "MMScan_VG.json").write_text(json.dumps({"train": rows}))


def test_a_description_of_mmscan_asks_for_the_scan_s_own_object(tmp_path):
    """Its numbers mean boxes; the scan's object that fits the box is the answer."""
    rooms = official.scans(tmp_path, range(3), views=1, size=32, points=2000)
    write_official(tmp_path, rooms)
    scenes = [data.read_scannet(tmp_path / "scans" / room.name, max_frames=0) for room in rooms]
    sources = {"VG": proxy3d.SPACESPAN["MMScan VG"]}
    listed, _ = evaluate.mixture(sources, tmp_path, tmp_path, scenes[1:], scenes[:1])
    asked = [s for own in listed.values() for s in own]
    assert len(asked) > 10
    for s in asked:
        scene, number = re.search(r"(scene\S+) (\d+)", s.question).groups()
        assert s.scene == scene and s.answer == f"Yes. <obj {number}>."

    # stage III, whose symbols show where things are and nothing else, takes what is about space
    spatial, _ = evaluate.mixture(proxy3d.RELATIONS, tmp_path, tmp_path, scenes[1:], scenes[:1])
    kinds = [s.kind for own in spatial.values() for s in own]
    assert len(kinds) > 5 and set(kinds) == {"VG_Inter_Space_OO"}

    # without boxes nobody knows what the numbers mean
    (tmp_path / "MMScan_boxes.json").unlink()
    listed, report = evaluate.mixture(sources, tmp_path, tmp_path, scenes[1:], scenes[:1])
    assert not listed and "VG: 0 questions kept" in report[0]


@pytest.mark.parametrize(
    ("paper", "llm"), [("proxy3d", "proxy3d"), ("fase3d", "opt"), ("spatial3dllm", "spatial3dllm")]
)
def test_the_papers_stages_train_around_a_loaded_model_in_scans_on_two_processes(paper, llm, tmp_path):
    """Rooms written as scans, official files beside them: Qwen2.5-VL, OPT and Llama as they lie on disk."""
    write_official(tmp_path, official.scans(tmp_path, range(4), views=2, size=64, points=2000))
    folder = papers.save_llm(llm, tmp_path / "llm")
    flags = f"--model={paper} --preset=paper --llm={folder} --data=scannet --root={tmp_path} --annotations={tmp_path}"
    flags += f" --steps=4 --workers=0 --no-eval --save-every=100 --out={tmp_path}/run --set"
    small = {**papers.SIZES[paper], **papers.LOADED[paper]}
    damaged = tmp_path / "scans/scene0900_00/scene0900_00_vh_clean_2.ply"
    damaged.parent.mkdir()
    damaged.write_text("ply")
    said = launch(*flags.split(), *(f"{key}={value}" for key, value in small.items()))
    assert said.count("left out") == 1  # processes share the reading: none reads all scans
    lines = papers.rows(tmp_path / "run/log.jsonl")
    assert [line["stage"] for line in lines][-1] == papers.stages_of(paper, "loaded")[-1].name
    assert all(math.isfinite(line["loss"]) for line in lines)
