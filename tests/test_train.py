"""The trainer, with a paper of sixty lines (dummy_paper.py) in place of a real one.

Three processes are started for the whole file; nearly all else runs in this one, on one thread.
"""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import dummy_paper
import numpy as np
import papers
import pytest
import torch
from dummy_paper import command as run
from papers import refused
from torch.testing import assert_close

import data
import train
from data import Stage

SCENES = dummy_paper.SCENES["train"]
ENCODER, ANSWERS = dummy_paper.STAGES["tiny"]
DROPOUT = ["--set", "dropout=0.3", "--save-every=2"]
TWO = """
    then --out=ddp
    then --out=parts --set answers.accumulate=2
    then --out=few --set answers.batch=4 answers.clip=0
    then --out=shard --shard
    then --out=half --shard --dtype=bfloat16
    then --out=cut --shard stop=5
    then --out=alone --shard stop=5
    then --out=cut --shard --resume
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread_and_hand_made_scenes():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    data.adopt(dummy_paper)  # whichever of these tests comes first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_loss", lambda out: None)
        patch.setattr(data, "load_scenes", dummy_paper.load_scenes)
        yield
    torch.set_num_threads(before)


def log(out):
    return papers.rows(out / "log.jsonl")


def losses(out, key="loss"):
    return [line[key] for line in log(out)]


def assert_same_log(a, b, keys=("loss",), skipped=0):
    for key in keys:
        assert losses(a, key)[skipped:] == pytest.approx(losses(b, key)[skipped:], rel=1e-5)


def saved_steps(out):
    return data.read_state(out)["position"]["total"]


def weights(out):
    return data.read_tensors(out, "weights")


def assert_same_weights(a, b, tolerance=0.0):
    assert_close(weights(a), weights(b), rtol=tolerance, atol=tolerance)


def program(folder, *flags, **env):
    command, env = [sys.executable, dummy_paper.__file__, *flags], os.environ | {"OMP_NUM_THREADS": "1"} | env
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=pipe, stderr=subprocess.STDOUT)


@pytest.fixture
def refusal(tmp_path, capsys):
    """What a command that cannot be run says, in the test's folder or another: its status, and one line."""
    same = ["--model=dummy_paper", "--no-eval", "--workers=0", f"--out={tmp_path}"]

    def says(*flags, status=2):
        assert train.main([*same, *flags]) == status
        (line,) = re.findall(r"^train\.py:.*", capsys.readouterr().err, re.MULTILINE)
        return line

    return says


@pytest.fixture(scope="module", autouse=True)
def launched(tmp_path_factory):
    """Two gloo processes that train one run after the other, and one that will be killed. They start before the first
    test and are waited for by the last ones: their imports cost seconds."""
    folder = tmp_path_factory.mktemp("launched")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [program(folder, *TWO.split(), RANK=rank, LOCAL_RANK=rank, **env) for rank in "01"]
    ranks.append(program(folder, "--out=killed", *DROPOUT, "--workers=1", "kill=6"))
    yield folder, ranks
    for p in ranks:
        p.kill()
        p.stdout.close()
        p.wait()


@pytest.fixture(scope="module")
def two(launched):
    """Folder of the runs of two processes with unequal numbers of questions."""
    folder, ranks = launched
    said = [p.communicate(timeout=120)[0] for p in ranks[:2]]
    assert [p.returncode for p in ranks[:2]] == [0, 0], "\n".join(said)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same runs in this process."""
    folder = tmp_path_factory.mktemp("one")
    run(f"--out={folder}/ddp")
    run(f"--out={folder}/few", "--set", "answers.batch=4", "answers.clip=0")
    return folder


# ---- checkpoints -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def save(out, total):
    """A checkpoint whose tensors and position are all `total`."""
    model = torch.nn.Linear(2, 2)
    model.frozen_pretrained_names = ()
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.data.fill_(total)
        optimizer.state[p]["exp_avg"] = torch.full_like(p, total)
    (out / "checkpoint").mkdir(exist_ok=True)
    train.save_checkpoint(out, model, optimizer, {"position": {"total": total}, "run": {}, "processes": 1})


def held(out):
    """All numbers of a checkpoint."""
    numbers = {saved_steps(out)}
    for kind in ("weights", "optimizer"):
        for tensor in data.read_tensors(out, kind).values():
            numbers.update(tensor.flatten().tolist())
    return numbers


def test_a_kill_at_any_instant_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """Every call that touches the disk is the last one once, files being left half written; what loads afterwards is
    the checkpoint before, or the new one, weights and moments and position belonging together."""
    calls, deadly = [], None

    def deadly_at(name, real):
        def call(*args, **kw):
            calls.append(name)
            if len(calls) == deadly:
                if name in ("save_file", "write_text"):
                    path = next(a for a in args if isinstance(a, Path))
                    path.write_bytes(b'{"half')
                raise Killed
            if name != "fsync":  # a real one costs time and shows nothing here
                return real(*args, **kw)

        return call

    save(tmp_path, 0)
    disk = [(train, "save_file"), (os, "fsync"), (os, "replace"), (Path, "write_text"), (Path, "unlink")]
    for owner, name in disk:
        monkeypatch.setattr(owner, name, deadly_at(name, getattr(owner, name)))
    seen = []  # whether the new one was there already
    for step in range(1, 40):
        calls, deadly = [], step
        try:
            save(tmp_path, step)
            break
        except Killed:
            deadly = None
        seen.append(held(tmp_path) == {step})
        assert seen[-1] or held(tmp_path) == {step - 1}

        # a later save must not stumble over what the kill left behind
        save(tmp_path, step)
        assert held(tmp_path) == {step}
    assert seen == sorted(seen) and set(seen) == {False, True}
    expected = "save_file fsync save_file fsync write_text fsync replace fsync unlink unlink"
    assert " ".join(calls) == expected, "what state.json names is on the disk before it is replaced"
    assert len(list((tmp_path / "checkpoint").iterdir())) == 3, "what is not needed is removed"


def test_a_failed_save_and_numbers_that_are_not_finite_keep_the_checkpoint_before(tmp_path, monkeypatch):
    save(tmp_path, 1)
    with refused("weight is not finite"):
        save(tmp_path, torch.nan)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "save_file", full)
    with refused(r"No space left.*--resume"):
        save(tmp_path, 2)
    assert held(tmp_path) == {1.0}


def test_a_flipped_bit_or_a_file_of_another_step_is_refused(tmp_path):
    """safetensors has no checksum: such numbers would be taken as they are."""
    save(tmp_path, 1)
    for path in list((tmp_path / "checkpoint").glob("*.safetensors")):
        whole = path.read_bytes()
        for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:20], whole.replace(b"\x3f", b"\x40")):
            path.write_bytes(damaged)
            with refused("missing, damaged, or of another step"):
                held(tmp_path)
        path.write_bytes(whole)
    assert held(tmp_path) == {1.0}
    for text in ("{", "[]", "{}"):
        (tmp_path / "checkpoint" / "state.json").write_text(text)
        with refused("not a whole state of a checkpoint"):
            held(tmp_path)


def test_a_checkpoint_of_another_run_is_refused(tmp_path, refusal):
    run(f"--out={tmp_path}/a", "--steps=2")
    again = [f"--out={tmp_path}/a", "--steps=2", "--resume"]
    assert "seed 0, not 1" in refusal(*again, "--seed=1")
    other = [f"--out={tmp_path}/b", "--set", "biased=false", f"--init={tmp_path}/a"]
    assert "bias is (8,) there, missing in this model" in refusal(*other)
    assert "no trained model here" in refusal(f"--out={tmp_path}/c", "--resume")


def test_a_trained_run_is_not_overwritten_by_accident(tmp_path, refusal):
    flags = [f"--out={tmp_path}", "--steps=2"]
    run(*flags)
    assert "--resume" in refusal("--steps=2")
    assert "widht" in refusal("--steps=2", "--overwrite", "--set", "widht=3")
    assert len(log(tmp_path)) == 2, "a wrong command deletes nothing"
    answers = tmp_path / "predictions" / "rooms" / "qa.jsonl"
    answers.parent.mkdir(parents=True)
    answers.touch()
    run(*flags, "--overwrite")
    assert not answers.exists()
    run(*flags, "--resume")  # a finished run has nothing left to do
    assert len(log(tmp_path)) == 2


def test_another_run_starts_from_a_finished_ones_weights(tmp_path):
    """Tied weights are stored once and stay tied."""
    run(f"--out={tmp_path}/a")
    flags = [f"--init={tmp_path}/a", "--stages=answers", "--set", "answers.lr=0"]
    again = run(f"--out={tmp_path}/b", *flags)
    assert again.head.weight is again.table.weight and "head.weight" not in weights(tmp_path / "b")
    assert torch.equal(weights(tmp_path / "b")["table.weight"], weights(tmp_path / "a")["table.weight"])


def test_a_stage_of_other_code_is_refused():
    """Dropping what this code does not know would make another stage of it."""
    with refused("Stage has no color_of_the_sky"):
        data.stage_of(asdict(ANSWERS) | {"color_of_the_sky": "blue"})


# ---- what a step does ------------------------------------------------------------------------------------------------


class Listener:
    """In a model's place: its batch tells how each scene is turned and what is asked about it."""

    def batch(self, groups):
        told = [(scene.name, scene.turn.tolist(), [q.question for q in samples]) for scene, samples in groups]
        return {"scenes": [scene for scene, _ in groups], "samples": [], "told": told}


def told(i, key=(0, 1), stage=ANSWERS, **ranks):
    """What micro-batch i is about: nothing where its weight is zero."""
    part = train.QuestionDataset(Listener(), SCENES, stage, key, **ranks)[i]
    return part["batch"]["told"] if part["weight"] else []


def test_a_step_is_a_pure_function_of_seed_stage_and_step():
    keys = [(5, (0, 1)), (5, (1, 1)), (5, (0, 2)), (6, (0, 1))]
    first, again = ([str(told(*key)) for key in keys] for _ in range(2))
    assert first == again and len(set(first)) == 4


def test_an_epoch_visits_every_scene_once_and_a_step_asks_exactly_the_batch():
    dataset = train.QuestionDataset(None, SCENES * 2, replace(ANSWERS, batch=42), (3, 0))
    steps = [dataset.slots(step) for step in range(3)]
    assert [n for _, n in steps[0]] == [4] * 10 + [2]
    assert Counter(which for step in steps[:2] for which, _ in step) == Counter(range(22))
    assert steps[2] != steps[0], "the next epoch has an order of its own"


def test_official_questions_are_asked_once_an_epoch_few_scenes_at_a_time():
    listed = {s.name: [data.Sample(f"{s.name}/{i}", s.name, "", "", "") for i in range(9)] for s in SCENES}
    dataset = train.OfficialQuestions(None, SCENES, replace(ANSWERS, batch=33), (3, 0), listed=listed)
    steps = [dataset.slots(step) for step in range(6)]
    asked = [[sample.id for _, own in step for sample in own] for step in steps]
    assert {len(ids) for ids in asked} == {33} and len({*asked[0], *asked[1], *asked[2]}) == 99
    assert asked[0] != asked[3] and max(map(len, steps)) < 16
    for which, own in itertools.chain(*steps):
        assert {sample.scene for sample in own} == {SCENES[which].name}


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (3, 2), (8, 3)])
def test_the_ranks_and_micro_batches_partition_a_step(world, accumulate):
    """Nothing is asked twice and nothing left out, also where there are more shares than scenes."""
    stage, parts = replace(ANSWERS, accumulate=accumulate), []
    for rank in range(world):
        for i in range(4 * accumulate, 5 * accumulate):
            parts.append(told(i, stage=stage, rank=rank, world=world))
    assert sorted(itertools.chain(*parts)) == sorted(told(4))
    assert ([] in parts) == (world * accumulate > 7)


def test_loader_processes_change_nothing_and_scenes_keep_their_frames():
    """Frames do not travel between processes: they are those of the trainer's own scenes."""
    scenes = [replace(s, frames=object(), points=np.ones((3, 3), np.float32)) for s in SCENES[1:]]
    dataset = train.QuestionDataset(Listener(), scenes, ENCODER, (7, 0))
    near, far = (list(train.load_steps(dataset, range(1, 3), workers)) for workers in (0, 1))
    for (a,), (b,) in zip(near, far, strict=True):
        for x, y in zip(a["batch"]["scenes"], b["batch"]["scenes"], strict=True):
            assert x.frames is y.frames is dataset.by_name[x.name].frames and x.identifiers == y.identifiers
            assert np.array_equal(x.points, y.points)


def test_an_impossible_mix_is_an_error_and_not_an_endless_search():
    dataset = train.QuestionDataset(None, [SCENES[0]], ANSWERS, (0, 1))
    with refused("stage answers: no scene allows any of width"):
        dataset[0]


def test_objects_without_categories_are_asked_about_geometry(rng):
    room = data.room(3, views=0)
    bare = replace(room, objects=[replace(o, category="") for o in room.objects])
    stage = train.ask_without_names(replace(ANSWERS, tasks={"id_category": 1.0}), dummy_paper)
    samples = data.questions(bare, stage.tasks, 20, rng)
    assert {s.task for s in samples} == set(data.UNLABELLED) and len(samples) == 20


@pytest.mark.parametrize("schedule", train.SCHEDULES)
def test_every_schedule_warms_up_to_lr_and_ends_at_or_above_final_lr(schedule):
    stage = Stage("s", {}, (), iterations=100, lr=2.0, final_lr=0.5, schedule=schedule, warmup=0.1)
    rates = [train.learning_rate(stage, step, 100) for step in range(101)]
    assert rates[:11] == pytest.approx([*np.linspace(0.2, 2, 10), 2])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    last = {"constant": (2.0, 2.0), "linear": (1.25, 0.5), "cosine": (1.25, 0.5), "trapezoid": (2.0, 0.5)}
    assert (rates[55], rates[100]) == pytest.approx(last[schedule])


def test_a_step_that_is_not_finite_is_skipped_and_counted_and_five_in_a_row_end_the_run(tmp_path, refusal):
    """The second of three answer steps has an infinite loss, then all have."""
    flags = [f"--out={tmp_path}", "--overwrite", "--set"]
    model = run(*flags, "poison=2,2", "answers.iterations=3")
    assert [loss is not None for loss in losses(tmp_path)[3:]] == [True, False, True]
    assert losses(tmp_path, "skipped")[3:] == [0, 1, 1]
    assert all(p.isfinite().all() for p in model.parameters())
    assert "five such steps in a row" in refusal(*flags, "poison=1,99", "answers.iterations=9")


def test_a_parameter_without_a_part_in_the_loss_is_named(tmp_path, monkeypatch):
    """With several processes it would be a hang; so it is an error with one process too, at the first step."""

    class Idle(dummy_paper.Model):
        def parts(self):
            return super().parts() | {"encoder": [self.encoder, self.head]}

    monkeypatch.setattr(dummy_paper, "Model", Idle)
    with pytest.raises(ValueError, match="1 trainable parameters have no part in the loss"):
        run(f"--out={tmp_path}")


# ---- command line, run folder, log -----------------------------------------------------------------------------------


def test_steps_scales_every_stage_and_the_sum_is_exact():
    mix = {"width": 1.0}
    stages = [Stage("a", {}, (), iterations=200), Stage("b", mix, (), epochs=2, batch=256, per_scene=16),
              Stage("c", mix, (), epochs=3, samples=1000, batch=256), Stage("d", {}, (), iterations=1)]  # fmt: skip
    assert train.stage_steps(stages, 800) == [200, 100, 12, 1]
    for total in (4, 5, 30, 313, 1000):
        scaled = train.stage_steps(stages, 800, total)
        assert sum(scaled) == total and min(scaled) >= 1
    assert train.stage_steps(stages, 800, 3130)[0] == pytest.approx(2000, rel=0.01)


@pytest.mark.parametrize(("flags", "says"), {
    "--set widht=3": "Config: field 'widht' is unknown: choose one of llm, width, dropout",
    "--set answers.name=../x": "Stage: field 'name' is unknown",
    "--set answer.lr=3": "stage 'answer' is unknown: choose one of encoder, answers",
    "--set width=many": "--set width=many: expected int, got str",
    "--set width": "--set width=: expected int",
    "--set answers.schedule=cosin": "choose one of constant, linear, cosine, trapezoid",
    "--steps=1": "each of the 2 stages needs a step",
    "--set answers.epochs=2": "either iterations or epochs",
    "--set answers.batch=-4": "stage answers: batch = -4: give a number from 1",
    "--set answers.batch=0": "batch = 0: give a number from 1",
    "--set answers.batch=100000000000": "give a number from 1 to 1e+07",
    "--set poison=()": "Config: poison = (): give one at least",
    "--set answers.lr=1e999": "lr = inf",
    "--set answers.warmup=5": "warmup = 5.0: give a number from 0 to 1",
    "--set dropout=-1": "Config: dropout = -1.0",
    "--set dropout=2": "--set dropout=2: no model can be trained so (ValueError: dropout probability",
    "--train-scenes=-5": "train_scenes = -5",
}.items())  # fmt: skip
def test_a_wrong_setting_gets_one_line_that_names_what_is_known(flags, says, refusal):
    assert says in refusal(*flags.split())


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--modle=x", "unrecognized arguments: --modle=x"),
        ("--model=proxy", "proxy3d"),
        ("--data=room", "scannet"),
    ],
)
def test_a_wrong_flag_ends_with_status_2_and_the_known_ones(flag, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(["--model=dummy_paper", flag])
    assert says in capsys.readouterr().err


def test_set_reads_a_value_by_the_type_of_its_field():
    config = dummy_paper.Config()
    for setting in ("width=3", "dropout=1", "poison=(5, 6)", "biased=false", "llm=none"):
        config = train.override(config, *setting.split("="))
    assert config == dummy_paper.Config(None, 3, 1.0, (5, 6), False) and isinstance(config.dropout, float)
    assert train.override(config, "llm", "Qwen/Qwen2.5-3B").llm == "Qwen/Qwen2.5-3B"
    with refused("expected bool"):
        train.override(config, "biased", "no")


@pytest.mark.parametrize("taken", ["", "cache", "checkpoint", "lock"])
def test_a_run_folder_that_cannot_be_written_is_refused_before_scenes_are_made(
    taken, tmp_path, refusal, monkeypatch
):
    monkeypatch.setattr(data, "load_scenes", None)
    path = tmp_path / "run" / taken
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if taken == "lock" else path.touch()
    assert str(path) in refusal(f"--out={tmp_path}/run")


def test_a_run_folder_belongs_to_one_run(tmp_path, refusal):
    """The lock dies with its process."""
    script = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", script, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert "another run is writing there" in refusal("--steps=2")
        other.kill()
    run(f"--out={tmp_path}", "--steps=2")


def test_the_memory_estimate_is_weights_gradients_and_two_moments():
    model = torch.nn.Sequential(torch.nn.Linear(512, 511), torch.nn.Linear(512, 1023))
    model[0].requires_grad_(False)
    line = train.memory_line(model, shards=2)
    assert "0.52 M parameters train; 4.5 MB" in line and "(1.5 weights, 1.0 gradients, 2.0 Adam)" in line


def test_the_memory_of_scenes_counts_arrays_but_no_frames_that_stay_on_disk():
    room = data.room(0, views=2, size=96, points=1000)
    assert train.scene_line([room, room]).startswith("2 scenes to train in, 0.2 MB of memory each")
    lazy = replace(room, frames=data.LazyFrames(lambda: room.frames, "key"))
    assert "0.0 MB" in train.scene_line([lazy])


def test_every_number_in_the_log_is_explained(one):
    """In the glossary of the trainer's docstring."""
    glossary = train.__doc__[train.__doc__.index("log.jsonl, a line per step") :]
    for line in log(one / "ddp"):
        assert all(re.search(rf"\b{key}\b", glossary) for key in line)
    assert losses(one / "ddp", "total") == list(range(1, 11))


def test_the_same_seed_gives_the_same_run(one, tmp_path):
    run(f"--out={tmp_path}/a")
    run(f"--out={tmp_path}/b", "--seed=1")
    assert losses(tmp_path / "a") == losses(one / "ddp") != losses(tmp_path / "b")


# ---- several processes, and their ends -------------------------------------------------------------------------------


def test_two_processes_with_unequal_shares_give_the_losses_of_one(one, two):
    """Averaging the ranks' mean losses, as DDP alone would, is off by per cents: shares differ by rank and step."""
    for step in range(7):
        asked = [len(questions) for *_, questions in told(step)]
        assert sum(asked[::2]) != sum(asked[1::2])
    assert_same_log(two / "ddp", one / "ddp", ["loss", "norm", "terms", "questions"])
    assert_same_weights(two / "ddp", one / "ddp", 1e-4)


def test_accumulation_never_changes_the_result(one, two, tmp_path):
    """On one process and on two; at a micro-batch boundary a rank may have no questions at all."""
    run(f"--out={tmp_path}", "--set", "answers.accumulate=2", "encoder.accumulate=3")
    for out in (tmp_path, two / "parts"):
        assert_same_log(out, one / "ddp")


def test_a_rank_without_questions_takes_part_with_weight_zero(one, two):
    """One scene per step and two ranks: the second has nothing to do, and must neither hang nor count. Adam hides a
    wrong scale of the gradient, so its norm is compared too."""
    assert_same_log(two / "few", one / "few", ["loss", "norm", "terms", "questions", "accuracy"], skipped=3)


def test_sharding_gives_the_losses_of_ddp(two):
    assert_same_log(two / "shard", two / "ddp")
    assert_same_weights(two / "shard", two / "ddp", 1e-4)
    assert losses(two / "half") == pytest.approx(losses(two / "ddp"), rel=0.1)  # bfloat16


def test_a_sharded_run_stopped_on_one_rank_resumes_sharded(two):
    """SIGTERM reaches the second process only; both end that step and save."""
    assert losses(two / "cut") == pytest.approx(losses(two / "shard"), rel=1e-6)


def test_a_sharded_checkpoint_goes_on_in_one_process(one, two, capsys):
    """Checkpoints hold whole tensors, so neither the number of processes nor sharding is baked into them."""
    state = data.read_state(two / "alone")
    assert state["processes"] == 2 and state["position"]["total"] == 6 and "optimizer" in state["sha256"]
    run(f"--out={two}/alone", "--resume")
    assert "the run began on 2 processes" in capsys.readouterr().out
    assert_same_log(two / "alone", one / "ddp")


def test_a_run_killed_or_stopped_and_resumed_equals_an_undisturbed_one_bit_for_bit(launched, tmp_path):
    """With dropout, so that random states matter; the killed run had got to step 6, whose log line is dropped. Its
    loader process dies with it, though nobody reads its pipe: `communicate` waits for all who hold the output."""
    folder, (*_, killed) = launched
    stopped = tmp_path / "stopped"
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert saved_steps(folder / "killed") == 5 and len(losses(folder / "killed")) == 6
    with pytest.raises(KeyboardInterrupt):
        run(f"--out={stopped}", *DROPOUT, "stop=5")
    assert saved_steps(stopped) == len(losses(stopped)) == 6

    run(f"--out={tmp_path}/whole", *DROPOUT)
    for out in (folder / "killed", stopped):
        run(f"--out={out}", *DROPOUT, "--resume")
        assert losses(out) == losses(tmp_path / "whole")
        assert_same_weights(out, tmp_path / "whole")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_a_checkpoint_one_line_and_its_status(
    number, status, tmp_path, refusal, monkeypatch
):
    monkeypatch.setattr(dummy_paper.Model, "left", 0)
    monkeypatch.setattr(dummy_paper.Model, "signal", number)
    assert "--resume" in refusal(status=status)
    assert saved_steps(tmp_path) == 1


def test_a_signal_while_rooms_are_made_ends_the_run_in_one_line(refusal, monkeypatch):
    """Those who make them end without a word: by the signal, as under torchrun, or since their work is done."""

    def make(*_, **__):
        data.rooms(range(8), views=0, points=0)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(data, "load_scenes", make)
    said = refusal(status=143)
    assert said == "train.py: stopped; the same command goes on from the last checkpoint"


def test_a_dead_loader_process_is_one_line(refusal, monkeypatch):
    monkeypatch.setattr(dummy_paper.Model, "batch", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert "fewer --workers" in refusal("--workers=1", status=1)


def test_gradients_of_indexing_repeat_to_the_bit_on_several_threads():
    """Threads add them in any order unless the trainer forbids it: a resumed run would not be the run it resumes."""
    torch.set_num_threads(4)
    index = torch.arange(16_000) % 50
    x = torch.randn(50, 32, requires_grad=True)
    scale = torch.randn(16_000, 32)
    train.Distributed()
    found = [torch.autograd.grad((x[index] * scale).sum(), x)[0] for _ in range(20)]
    assert all(torch.equal(found[0], gradient) for gradient in found)
