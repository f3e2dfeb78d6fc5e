"""The trainer, with a paper of sixty lines (dummy_paper.py) in place of a real one.

Three processes are started for the whole file; all else runs in this one, on one thread.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import dummy_paper  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from data import DataError, Stage  # noqa: E402

SCENES = dummy_paper.fake_scenes(11)
DROPOUT = ["--set", "dropout=0.3", "--save-every=2"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(train, "draw_loss", lambda out: None)


def log(out: Path) -> list[dict]:
    return [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path, key: str = "loss") -> list[float]:
    return [x[key] for x in log(out)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return train.read_tensors(out, "weights")


def same_weights(a: Path, b: Path, rtol: float = 0.0) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=rtol, atol=rtol) for k in a)


def program(*flags: str, **env: str) -> subprocess.Popen:
    command = [sys.executable, str(Path(dummy_paper.__file__)), *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)


def refusal(capsys, *argv: str, paper=dummy_paper) -> str:
    """What a command that cannot be run says: exit status 2 and one line."""
    assert train.main(["--model=dummy", "--no-eval", "--workers=0", *argv], paper, (SCENES, SCENES[:2])) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "Traceback" not in out + err
    return err


@pytest.fixture(scope="module", autouse=True)
def launched(tmp_path_factory) -> tuple[Path, list[subprocess.Popen]]:
    """Two gloo processes that train one run after the other, and one that will be killed. They start before the first
    test and are waited for by the last ones: their imports cost seconds."""
    folder = tmp_path_factory.mktemp("launched")
    commands = [
        ["--out=ddp"],
        ["--out=parts", "--set", "answers.accumulate=2"],
        ["--out=few", "--set", "answers.batch=4", "answers.clip=0"],
        ["--out=shard", "--shard"],
        ["--out=cut", "--shard", "--save-every=2", "stop=6"],
        ["--out=alone", "--shard", "--save-every=2", "stop=6"],
        ["--out=cut", "--shard", "--resume"],
    ]
    flags = [f.replace("=", f"={folder}/", 1) if f.startswith("--out") else f for c in commands for f in ["then", *c]]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    ranks = [program(*flags, RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
             for r in range(2)]  # fmt: skip
    ranks.append(program(f"--out={folder}/killed", *DROPOUT, "--workers=1", "kill=6"))
    yield folder, ranks
    for p in ranks:
        p.kill()
        p.stdout.close()
        p.wait()


@pytest.fixture(scope="module")
def two(launched) -> Path:
    """Folder of the runs of two processes with unequal numbers of questions."""
    folder, ranks = launched
    said = [p.communicate(timeout=120)[0] for p in ranks[:2]]
    assert [p.returncode for p in ranks[:2]] == [0, 0], "\n".join(said)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory, one_thread) -> Path:
    """The same runs in this process, with the picture."""
    folder = tmp_path_factory.mktemp("one")
    dummy_paper.command([f"--out={folder}/ddp"])
    dummy_paper.command([f"--out={folder}/few", "--set", "answers.batch=4", "answers.clip=0"])
    return folder


# ---- checkpoints -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def test_a_kill_at_any_instant_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """Every call that touches the disk is the last one once, files being left half written; what loads afterwards is
    the checkpoint before, or the new one, weights and moments and position belonging together."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())

    def save(value: float):
        for p in model.parameters():
            p.data.fill_(value)
            optimizer.state[p] = {"step": torch.tensor(value), "exp_avg": p.data.clone(), "exp_avg_sq": p.data.clone()}
        train.save(tmp_path, model, optimizer, {"position": {"total": value}, "run": {}})

    def held() -> set[float]:
        tensors = [t for kind in ("weights", "optimizer") for t in train.read_tensors(tmp_path, kind).values()]
        return {train.read_state(tmp_path)["position"]["total"], *(float(x) for t in tensors for x in t.flatten())}

    calls, deadly = [], None

    def deadly_at(name, real):
        def call(*args, **kw):
            calls.append(name)
            if len(calls) == deadly:
                path = next((a for a in args if isinstance(a, Path)), None)
                if name in ("save_file", "write_text"):
                    path.write_bytes(b'{"half')
                raise Killed
            return None if name == "fsync" else real(*args, **kw)  # a real one costs time and shows nothing here

        return call

    save(0.0)
    monkeypatch.setattr(train, "save_file", deadly_at("save_file", train.save_file))
    for owner, names in ((os, ("replace", "fsync", "open")), (Path, ("write_text", "unlink", "mkdir"))):
        for name in names:
            monkeypatch.setattr(owner, name, deadly_at(name, getattr(owner, name)))
    seen = []  # whether the new one was there already
    for step in range(1, 40):
        calls, deadly = [], step
        try:
            save(float(step))
        except Killed:
            deadly = None
            assert held() in ({step - 1.0}, {float(step)})
            seen.append(held() == {float(step)})
            save(float(step))
            assert held() == {float(step)}, "a later save must not stumble over what the kill left behind"
        else:
            break
    assert seen == sorted(seen) and set(seen) == {False, True} and len(seen) > 10
    assert [c for c in calls if c not in ("open", "mkdir")] == [
        "save_file", "fsync", "save_file", "fsync", "write_text", "fsync", "replace", "fsync", "unlink", "unlink",
    ], "what state.json names is on the disk before it is replaced"  # fmt: skip
    assert len(list((tmp_path / "checkpoint").iterdir())) == 3, "what is not needed is removed"


def test_a_failed_save_says_so_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)
    train.save(tmp_path, model, None, {"position": {"total": 1}, "run": {}})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "save_file", full)
    with pytest.raises(DataError, match=r"No space left.*--resume"):
        train.save(tmp_path, model, None, {"position": {"total": 2}, "run": {}})
    assert train.read_state(tmp_path)["position"] == {"total": 1}


def test_a_checkpoint_of_another_model_is_refused(tmp_path, capsys):
    dummy_paper.command([f"--out={tmp_path}/a", "--steps=2"])
    again = [f"--out={tmp_path}/a", "--steps=2", "--resume"]
    assert "model 'dummy', not 'proxy3d'" in refusal(capsys, "--model=proxy3d", *again)
    assert "seed 0, not 1" in refusal(capsys, *again, "--seed=1")
    assert "bias is (8,) there, missing in this model" in refusal(
        capsys, f"--out={tmp_path}/b", "--set", "biased=false", f"--init={tmp_path}/a")  # fmt: skip
    assert "missing" in refusal(capsys, f"--out={tmp_path}/c", "--resume")


def test_damaged_checkpoints_are_refused_in_one_line(tmp_path, capsys):
    flags = [f"--out={tmp_path}", "--steps=2", "--resume"]
    dummy_paper.command(flags[:2])
    file = tmp_path / "checkpoint" / train.read_state(tmp_path)["files"]["weights"]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "missing or damaged" in refusal(capsys, *flags)
    file.unlink()
    assert "missing or damaged" in refusal(capsys, *flags)
    for text in ("{", "[]", "{}"):
        (tmp_path / "checkpoint" / "state.json").write_text(text)
        assert "not the state of a checkpoint" in refusal(capsys, *flags)


def test_a_trained_run_is_not_overwritten_by_accident(tmp_path, capsys):
    flags = [f"--out={tmp_path}", "--steps=2"]
    dummy_paper.command(flags)
    assert "--resume" in refusal(capsys, *flags)
    assert "widht" in refusal(capsys, *flags, "--overwrite", "--set", "widht=3"), "a wrong command deletes nothing"
    assert len(log(tmp_path)) == 2
    dummy_paper.command([*flags, "--overwrite"])
    dummy_paper.command([*flags, "--resume"])  # a finished run has nothing left to do
    assert len(log(tmp_path)) == 2


def test_a_finished_run_loads_with_equal_weights(tmp_path):
    """And --init starts from them; tied weights are stored once and stay tied."""
    done = dummy_paper.command([f"--out={tmp_path}/a"])
    again = train.load_run(tmp_path / "a", dummy_paper, (SCENES, SCENES[:2]))
    assert again.model.head.weight is again.model.table.weight and "head.weight" not in weights(tmp_path / "a")
    a, b = done.model.state_dict(), again.model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert again.text.state() == done.text.state() and again.stages[-1].name == "answers"
    dummy_paper.command([f"--out={tmp_path}/b", f"--init={tmp_path}/a", "--stages=answers", "--set", "answers.lr=0"])
    assert torch.equal(weights(tmp_path / "b")["encoder.0.weight"], weights(tmp_path / "a")["encoder.0.weight"])


# ---- what a step does ------------------------------------------------------------------------------------------------


def test_a_step_is_a_pure_function_of_seed_stage_and_step():
    stage = dummy_paper.STAGES["tiny"][1]

    def ask(seed: int, index: int, step: int) -> list:
        groups = train.Draws(None, SCENES, stage, index, seed).ask(step)
        return [(scene.name, scene.turn.tolist(), [q.question for q in samples]) for scene, samples in groups]

    assert ask(0, 1, 5) == ask(0, 1, 5)
    assert len({str(ask(*key)) for key in ((0, 1, 5), (1, 1, 5), (0, 2, 5), (0, 1, 6))}) == 4


def test_an_epoch_visits_every_scene_once_and_a_step_asks_exactly_the_batch():
    stage = Stage("s", {"width": 1}, (), iterations=1, batch=26, per_scene=4)
    steps = [train.plan(stage, 0, step, 21, seed=3) for step in range(3)]
    assert [n for _, n in steps[0]] == [4, 4, 4, 4, 4, 4, 2]
    assert Counter(scene for step in steps for scene, _ in step) == Counter(range(21))
    assert train.plan(stage, 0, 3, 21, seed=3) != steps[0], "the next epoch has an order of its own"


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (3, 2), (8, 3)])
def test_the_ranks_and_micro_batches_partition_a_step(world, accumulate, tmp_path):
    """Nothing is asked twice and nothing left out, also where there are more shares than scenes."""
    model = dummy_paper.Model(dummy_paper.Config(), data.TinyText([]))
    with torch.no_grad():
        model.cache_features(SCENES, tmp_path, 0, 1, lambda items, what: items)
    stage = data.replace(dummy_paper.STAGES["tiny"][1], accumulate=accumulate)
    step, whole = 4, train.Draws(model, SCENES, data.replace(stage, accumulate=1), 1, 0)[4]
    draws = [train.Draws(model, SCENES, stage, 1, 0, rank, world) for rank in range(world)]
    parts = [d[accumulate * step + part] for d in draws for part in range(accumulate)]
    rows = lambda parts: Counter(tuple(x.tolist()) for p in parts if p["share"] for x in p["batch"]["ids"])  # noqa: E731
    assert rows(parts) == rows([whole])
    assert sum(p["questions"] for p in parts) == whole["questions"]
    assert any(p["share"] == 0 for p in parts) == (world * accumulate > 7)


def test_loader_processes_change_nothing_and_scenes_keep_their_frames():
    """Frames do not travel between processes: they are put back from the trainer's own scenes."""
    scenes = [data.replace(s, frames=object(), points=np.ones((3, 3), np.float32)) for s in SCENES[1:]]
    stage = dummy_paper.STAGES["tiny"][0]
    model = dummy_paper.Model(dummy_paper.Config(), data.TinyText([]))
    model.configure_stage(stage)
    draws = train.Draws(model, scenes, stage, 0, 7)
    near, far = (list(train.load(draws, range(1, 3), workers, torch.device("cpu"))) for workers in (0, 1))
    for (a,), (b,) in zip(near, far, strict=True):
        assert torch.equal(a["batch"]["boxes"], b["batch"]["boxes"])
        for x, y in zip(a["batch"]["scenes"], b["batch"]["scenes"], strict=True):
            assert x.frames is y.frames is not None
            assert np.array_equal(x.points, y.points) and x.identifiers == y.identifiers


def test_an_impossible_mix_is_an_error_and_not_an_endless_search():
    draws = train.Draws(None, [SCENES[0]], dummy_paper.STAGES["tiny"][1], 1, 0)
    with pytest.raises(DataError, match="stage answers: no scene allows any question of width"):
        draws[0]


@pytest.mark.parametrize("schedule", train.SCHEDULES)
def test_every_schedule_warms_up_to_lr_and_ends_at_or_above_final_lr(schedule):
    stage = Stage("s", {}, (), iterations=100, lr=2.0, final_lr=0.5, schedule=schedule, warmup=0.1)
    rates = [train.learning_rate(stage, step, 100) for step in range(101)]
    assert rates[:11] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.0])
    assert rates[100] == pytest.approx(2.0 if schedule == "constant" else 0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    middle = {"constant": 2.0, "linear": 1.25, "cosine": 1.25, "trapezoid": 2.0}
    assert rates[55] == pytest.approx(middle[schedule])


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path):
    """The second of three answer steps has an infinite loss: weights stay, the step is noted with its questions."""
    flags = ["--set", "poison=2,2", "answers.iterations=3"]
    run = dummy_paper.command([f"--out={tmp_path}", *flags])
    lines = log(tmp_path)[3:]
    assert [x["loss"] is not None for x in lines] == [True, False, True]
    assert [x["skipped"] for x in lines] == [0, 1, 1]
    assert all(p.isfinite().all() for p in run.model.parameters())
    note = json.loads((tmp_path / "nonfinite.jsonl").read_text())
    assert note["where"] == "stage answers, step 2"
    assert [x[0] for x in note["scenes and questions"]] == [s.name for s, _ in train.Draws(
        None, SCENES, run.stages[1], 1, 0).ask(1)]  # fmt: skip


def test_five_bad_steps_in_a_row_end_the_run(tmp_path, capsys):
    said = refusal(capsys, f"--out={tmp_path}", "--set", "poison=1,99", "answers.iterations=9")
    assert "stage answers, step 5: the fifth step in a row" in said and "nonfinite.jsonl" in said


def test_a_parameter_without_a_part_in_the_loss_is_named(tmp_path):
    """With several processes it would be a hang; so it is an error with one process too, at the first step."""

    class Idle(dummy_paper.Model):
        def __init__(self, *args):
            super().__init__(*args)
            self.idle = torch.nn.Parameter(torch.zeros(1))

    paper = type("paper", (), {**vars(dummy_paper), "Model": Idle})
    with pytest.raises(ValueError, match="1 trainable parameters have no part in the loss, such as idle"):
        train.run(train.parse(["--model=dummy", f"--out={tmp_path}", "--workers=0"]), paper, (SCENES, []))


def test_a_stage_is_left_once_its_running_accuracy_is_high_enough(tmp_path):
    flags = ["--stages=answers", "--set", "answers.iterations=300", "answers.until=0.6", "answers.lr=0.1"]
    dummy_paper.command([f"--out={tmp_path}", *flags, "answers.schedule=constant"])
    running = [x["running"] for x in log(tmp_path)]
    assert running[-1] > 0.6 >= running[-2] and len(running) < 300


def test_what_ever_trains_is_kept_in_float32():
    """A step of 5e-6 is lost in bfloat16's three digits; frozen weights stay as they were loaded."""

    class Low(dummy_paper.Model):
        def __init__(self, *args):
            super().__init__(*args)
            self.bfloat16()

    paper = type("paper", (), {**vars(dummy_paper), "Model": Low})
    args = train.parse(["--model=dummy", "--workers=0", "--stages=encoder", "--steps=1", "--no-eval", "--out=/nowhere"])
    run = train.build(args, train.Ranks(0, 1, torch.device("cpu")), paper, (SCENES, []))
    train.keep_precise(run.model, run.stages)
    assert run.model.encoder[0].weight.dtype == torch.float32 and run.model.table.weight.dtype == torch.bfloat16


# ---- command line, log -----------------------------------------------------------------------------------------------


def test_steps_scales_every_stage_and_the_sum_is_exact():
    mix = {"width": 1.0}
    stages = [Stage("a", {}, (), iterations=200), Stage("b", mix, (), epochs=2, batch=256, per_scene=16),
              Stage("c", mix, (), epochs=3, samples=1000, batch=256), Stage("d", {}, (), iterations=1)]  # fmt: skip
    assert train.stage_steps(stages, 800) == [200, 100, 12, 1]
    for total in (4, 5, 30, 313, 1000):
        scaled = train.stage_steps(stages, 800, total)
        assert sum(scaled) == total and min(scaled) >= 1
    assert train.stage_steps(stages, 800, 3130)[0] == pytest.approx(2000, rel=0.01)


@pytest.mark.parametrize(("flags", "says"), [
    (["--modle=x"], "unknown argument --modle=x"),
    (["--step", "3"], "did you mean --steps?"),
    (["--preset=tin"], "unknown preset tin, did you mean tiny? known: tiny, paper"),
    (["--set", "widht=3"], "unknown key of dummy's Config widht, did you mean width? known: width, dropout"),
    (["--set", "answers.lrr=3"], "unknown field of stage answers lrr, did you mean lr?"),
    (["--set", "answer.lr=3"], "unknown stage answer, did you mean answers?"),
    (["--set", "width=many"], "--set width=many: expected int"),
    (["--set", "width"], "write KEY=VALUE"),
    (["--set", "answers.schedule=cosin"], "did you mean cosine?"),
    (["--stages=encoder,answer"], "unknown stage answer"),
    (["--steps=1"], "each of the 2 stages needs a step"),
    (["--seed=a"], "invalid int value"),
    (["--dtype=float16"], "float32"),
    (["--llm=x"], "unknown key of dummy's Config llm"),
    (["--recompute"], "offers no gradient checkpointing"),
])  # fmt: skip
def test_a_wrong_command_gets_one_line_that_names_what_is_known(flags, says, tmp_path, capsys):
    assert says in refusal(capsys, f"--out={tmp_path}", *flags)


def test_an_unknown_model_or_source_names_the_known_ones(tmp_path, capsys):
    assert train.main(["--model=proxy", f"--out={tmp_path}"]) == 2
    assert "unknown model proxy, did you mean proxy3d? known: proxy3d" in capsys.readouterr().err
    assert train.main(["--model=dummy", "--data=room", f"--out={tmp_path}"], dummy_paper) == 2
    assert "unknown source of data room, did you mean rooms?" in capsys.readouterr().err
    assert train.main([]) == 2
    assert "--model" in capsys.readouterr().err


def test_set_reads_a_value_by_the_type_of_its_field():
    new = train.changed(dummy_paper.Config(), {"width": "3", "dropout": "1e-1", "bends": "(5, 6)", "biased": "false",
                                               "extra": "7"}, "key")  # fmt: skip
    assert (new.width, new.dropout, new.bends, new.biased, new.extra) == (3, 0.1, (5, 6), False, 7)
    assert train.changed(new, {"extra": "None"}, "key").extra is None
    with pytest.raises(DataError, match="expected bool"):
        train.typed("biased", "no", bool)


def test_the_memory_estimate_is_weights_gradients_and_two_moments():
    model = torch.nn.Sequential(torch.nn.Linear(512, 512, bias=False), torch.nn.Linear(512, 1024, bias=False)).half()
    model[0].float().requires_grad_(False)
    model[1].float()
    line = train.memory_line(model, shards=2)
    assert line.startswith("0.52 of 0.79 M parameters train; 4.5 MB per device"), line
    assert "(1.5 weights, 1.0 gradients, 2.0 Adam)" in line


def test_every_number_in_the_log_is_explained(one):
    """The glossary is the file's docstring; the picture stands beside the log."""
    glossary = train.__doc__[train.__doc__.index("log.jsonl, a line per step") :]
    for line in log(one / "ddp"):
        assert not [key for key in line if not re.search(rf"\b{key}\b", glossary)]
    assert [x["total"] for x in log(one / "ddp")] == list(range(1, 11))
    assert (one / "ddp" / "loss.png").stat().st_size > 5000
    assert json.loads((one / "ddp" / "config.json").read_text())["scenes"]["test"] == ["scene50", "scene51", "scene52"]


def test_the_same_seed_gives_the_same_run(one, tmp_path):
    dummy_paper.command([f"--out={tmp_path}/a"])
    dummy_paper.command([f"--out={tmp_path}/b", "--seed=1"])
    assert losses(tmp_path / "a") == losses(one / "ddp") != losses(tmp_path / "b")


# ---- several processes -----------------------------------------------------------------------------------------------


def test_two_processes_with_unequal_shares_give_the_losses_of_one(one, two):
    """Averaging the ranks' mean losses, as DDP alone would, is off by per cents: shares differ by rank and step."""
    draws = train.Draws(None, SCENES, dummy_paper.STAGES["tiny"][1], 1, 0)
    asked = [[sum(len(q) for _, q in draws.ask(step, range(rank, 7, 2))) for step in range(7)] for rank in range(2)]
    assert all(a != b for a, b in zip(*asked, strict=True))
    assert len(losses(one / "ddp")) == 10
    for key in ("loss", "norm", "terms", "questions"):
        assert losses(two / "ddp", key) == pytest.approx(losses(one / "ddp", key), rel=1e-5)
    assert same_weights(two / "ddp", one / "ddp", 1e-4)


def test_accumulation_never_changes_the_result(one, two, tmp_path):
    """On one process and on two; at a micro-batch boundary a rank may have no questions at all."""
    dummy_paper.command([f"--out={tmp_path}", "--set", "answers.accumulate=2", "encoder.accumulate=3"])
    assert losses(tmp_path) == pytest.approx(losses(one / "ddp"), rel=1e-5)
    assert losses(two / "parts") == pytest.approx(losses(one / "ddp"), rel=1e-5)


def test_a_rank_without_questions_takes_part_with_weight_zero(one, two):
    """One scene per step and two ranks: the second has nothing to do, and must neither hang nor count. Adam hides a
    wrong scale of the gradient, so its norm is compared too."""
    for key in ("loss", "norm", "terms", "questions", "accuracy"):
        assert losses(two / "few", key)[3:] == pytest.approx(losses(one / "few", key)[3:], rel=1e-5)


def test_sharding_gives_the_losses_of_ddp(two):
    assert losses(two / "shard") == pytest.approx(losses(two / "ddp"), rel=1e-5)
    assert same_weights(two / "shard", two / "ddp", 1e-4)


def test_a_sharded_run_resumes_sharded(two):
    assert len(losses(two / "cut")) == 10
    assert losses(two / "cut") == pytest.approx(losses(two / "shard"), rel=1e-6)


def test_a_sharded_checkpoint_goes_on_in_one_process(one, two):
    """Checkpoints hold whole tensors, so neither the number of processes nor sharding is baked into them."""
    state = train.read_state(two / "alone")
    assert state["processes"] == 2 and state["position"]["total"] == 5 and "optimizer" in state["files"]
    dummy_paper.command([f"--out={two}/alone", "--resume"])
    assert losses(two / "alone") == pytest.approx(losses(one / "ddp"), rel=1e-5)


def test_ten_steps_equal_five_a_kill_and_five_more_bit_for_bit(launched, tmp_path):
    """With dropout, so that random states matter; the killed run had got to step 6, whose log line is dropped. Its
    loader process dies with it, though nobody reads its pipe: `communicate` waits for all who hold the output."""
    folder, (*_, killed) = launched
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert train.read_state(folder / "killed")["position"]["total"] == 5 and len(losses(folder / "killed")) == 6
    dummy_paper.command([f"--out={folder}/killed", *DROPOUT, "--resume"])
    dummy_paper.command([f"--out={tmp_path}", *DROPOUT])
    assert losses(folder / "killed") == losses(tmp_path)
    assert same_weights(folder / "killed", tmp_path)
