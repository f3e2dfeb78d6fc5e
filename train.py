"""Train a paper: one trainer that knows none of them, with the same numbers on any number of processes.

    torchrun train.py --model proxy3d                  # rooms, tiny preset; a CPU is enough
    torchrun --nproc_per_node 8 train.py --model proxy3d --data scannet --root DIR --preset paper
    torchrun train.py ... --annotations FILES          # official questions in place of generated ones
    torchrun train.py ... --shard                      # FSDP2, for models that do not fit one GPU
    torchrun train.py ... --resume                     # goes on exactly where the run stopped

A paper module offers `Config` (with the presets as class methods), `STAGES`, `TASKS`, `recipe(config,
stages)` and `build(config, text)`, which gives a `data.SceneLanguageModel`: every method that is called
here stands there with its default. A forward returns {"loss": sum over its terms, "weight": how many
terms, "correct": right answer tokens; optional "count": of how many, "tokens": read, for the speed}. All
that a stage leaves trainable takes part in every forward of that stage.

A step is a pure function of (seed, stage, step): which scenes, how they are turned, what is asked. Each
process takes every world-th scene of a step; losses are summed, then divided by the *global* number of
terms, so neither the number of processes nor accumulation changes the result. Random states need no
saving: a step seeds them from its position. The learning rate belongs to the global batch and is never
rescaled.

The tiny presets load nothing: a first run makes the language model of all three papers (the last part of
data.py's section T) in a folder language-... beside its own, and later runs find it there.

A run folder holds config.json, log.jsonl, loss.png, cache/ and checkpoint/; metrics.json, predictions/,
pictures/ and report.html once it is scored. state.json commits a checkpoint: it holds a digest of each
weight file and is replaced in one stroke once they are on disk; a kill at any instant leaves the old or
the new. SIGTERM and Ctrl-C let the step in hand end and save.

log.jsonl, a line per step, numbers over all processes:
  stage, step, total   name of the stage, steps done in it, steps done in all
  loss, terms          mean per term, number of terms (answer tokens)
  accuracy, running    share of right answer tokens: now, moving average
  questions            asked (scenes in a stage without questions)
  lr, norm             learning rate, norm of the gradient before clipping
  speed, wait          tokens per second, share of the step spent waiting for data
  memory               peak GB of the first GPU, null on a CPU
  skipped              steps so far whose loss or gradient was not finite
  seconds              of training so far, before a resume too

Contents: 1 command line · 2 processes and devices · 3 what a step asks · 4 one step · 5 checkpoints
· 6 the run folder · 7 the run
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import fcntl
import hashlib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

# OpenMP threads wait for each other at every barrier, by default spinning for long: beside other work that
# takes the time from the thread that is waited for. So they spin shortly, unless the environment has a value of
# its own. It must be set before torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import evaluate
from data import DataError, Sample, Scene, Stage

MODELS = ["proxy3d", "fase3d", "spatial3dllm"]
SIGNALS = (signal.SIGTERM, signal.SIGINT)
SCHEDULES = {  # share of the way from final_lr up to lr, at progress 0..1 after the warm-up
    "constant": lambda p: 1.0,
    "linear": lambda p: 1 - p,
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    "trapezoid": lambda p: min(1.0, 4 * (1 - p)),  # flat, then linear over the last quarter
}

# ---- 1 command line ------------------------------------------------------------------------------


def parse_args(argv=None):
    """Read the flags; `args.command` holds those that say what the run is, which --resume must repeat."""
    # what a checkpoint is worth depends on these
    command = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add = command.add_argument
    add("--model", required=True, choices=MODELS, help="paper")
    add("--data", default="rooms", choices=data.SOURCES, help="source of scenes (default: rooms)")
    add("--root", help="folder of the scenes (not for rooms)")
    add("--annotations", help="folder of official files, for stages that name such sources")
    add("--preset", default="tiny", help="tiny: from nothing; paper: the paper's own settings")
    add("--llm", help="name or folder of a pre-trained language model")
    add("--steps", type=int, help="scale the stages to this many steps in all")
    add("--seed", type=int, default=0)
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="field, or STAGE.FIELD")
    add("--stages", dest="only", help="run only these, comma-separated")
    add("--init", help="folder of another run of this model, whose weights to start from")
    add("--train-scenes", type=int, default=800, help="rooms to train in")
    add("--test-scenes", type=int, default=150, help="rooms to score in, never trained in")
    data.add_scene_options(command)

    # the rest may differ between the parts of a run
    parser = argparse.ArgumentParser(parents=[command], allow_abbrev=False, description="Train a paper.")
    add = parser.add_argument
    add("--out", type=Path, help="run folder (default runs/<model>)")
    switches = {
        "resume": "go on from the run folder's checkpoint",
        "overwrite": "replace the run in the run folder",
        "shard": "FSDP2: spread weights, gradients, Adam over processes",
        "recompute": "gradient checkpointing: less memory, more time",
        "tensorboard": None,
        "no-eval": "train only",
        "fresh": "tiny preset: train the language model anew",
    }
    for name, words in switches.items():
        add(f"--{name}", action="store_true", help=words)
    add("--save-every", type=int, default=500, help="steps between checkpoints within a stage")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the arithmetic (default: bfloat16 on a GPU, else float32)",
    )

    # the trainer itself keeps a core busy, and so does every other process on this machine
    spare = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1
    add(
        "--workers",
        type=int,
        default=max(0, min(4, spare)),
        help="loader processes (default: cores to spare, at most 4)",
    )

    args = parser.parse_args(argv)
    args.command = vars(command.parse_known_args(argv)[0])
    args.out = args.out or Path("runs") / args.model
    return args


def override(target, key, text):
    """Copy a dataclass with one field read from text.

    Values are written as in Python, 3, 1e-4, (16, 21), true, none; what is none of these is a word, and so is
    whatever a field of words gets: filter=none.
    """
    # a stage's name is also that of a folder
    kinds = {field.name: field.type for field in fields(target) if field.name != "name"}
    kind = data.choose(kinds, key, f"{type(target).__name__}: field")

    # Python's own words begin with a capital
    python = text.title() if text.lower() in ("true", "false", "none") else text
    try:
        value = text if kind == "str" else ast.literal_eval(python)
    except (ValueError, SyntaxError):
        value = text
    if type(value) is int and kind.startswith("float"):
        value = float(value)

    # an annotation such as "int | None" or "tuple[int, ...]" says which types a field takes
    found = "None" if value is None else type(value).__name__
    if found not in kind.partition("[")[0].split(" | "):
        raise DataError(f"--set {key}={text}: expected {kind}, got {found}")
    return replace(target, **{key: value})


# whole numbers of a flag, a Config or a Stage that may be 0; all others are 1 or more
MAY_BE_0 = (
    "seed",
    "workers",
    "test_scenes",
    "save_every",
    "floor",
    "lloyd",
    "lora",
    "adapted_layers",
    "graph_layers",
)
SHARES = ("warmup", "no_color", "betas", "lora_dropout")


def check_numbers(settings, what):
    """Refuse numbers that are negative, not finite, or of no meaning for their setting."""
    for name, value in settings.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if not numbers and name != "score":
            raise DataError(f"{what} {name} = (): give one at least")
        for number in numbers:
            # a size stays below what any machine holds, a share at most 1
            if type(number) is int:
                least, most = int(name not in MAY_BE_0), 1e12 if name == "seed" else 1e7
            elif type(number) is float:
                least, most = 0, 1 if name in SHARES else 1e12
            else:
                continue
            if not least <= number <= most:
                raise DataError(f"{what} {name} = {value}: give a number from {least} to {most:g}")


def configure(args, paper):
    """Apply --llm, --set and --stages to the paper's preset: (Config, stages)."""
    stages = {stage.name: stage for stage in data.choose(paper.STAGES, args.preset, "preset")}
    config = getattr(paper.Config, args.preset)()
    settings = [f"llm={args.llm}", *args.set] if args.llm else args.set
    for setting in settings:
        key, _, text = setting.partition("=")
        name, dot, field = key.rpartition(".")
        if dot:
            stages[name] = override(data.choose(stages, name, "stage"), field, text)
        else:
            config = override(config, key, text)

    # a setting may add or drop stages
    stages = {stage.name: stage for stage in paper.recipe(config, list(stages.values()))}
    names = args.only.split(",") if args.only else stages
    chosen = [data.choose(stages, name.strip(), "stage") for name in names]

    # whatever set a number, it has a range
    check_numbers(vars(args), "command line:")
    check_numbers(vars(config), "Config:")
    for stage in chosen:
        check_numbers(vars(stage), f"stage {stage.name}:")
        data.choose(SCHEDULES, stage.schedule, f"stage {stage.name}: schedule")
        if (stage.iterations is None) == (stage.epochs is None):
            raise DataError(f"stage {stage.name}: give either iterations or epochs")
    return config, chosen


def stage_steps(stages, scenes, total=None):
    """Count every stage's optimizer steps; with `total` scaled to sum to it, at least one each."""
    steps = []
    for stage in stages:
        samples = stage.samples or scenes * (stage.per_scene if stage.tasks else 1)
        steps.append(stage.iterations or math.ceil(stage.epochs * samples / stage.batch))
    if total is None:
        return steps
    if total < len(steps):
        raise DataError(f"--steps {total}: each of the {len(steps)} stages needs a step")

    # rounding where stages end, not their lengths, keeps the sum exact
    ends = np.cumsum([0, *steps]) / sum(steps) * (total - len(steps))
    return [int(n) + 1 for n in np.diff(np.round(ends))]


# ---- 2 processes and devices ---------------------------------------------------------------------


class Distributed:
    """This process among those that torchrun started: its rank, its device, and a signal to end."""

    met = False  # whether each may fail by itself

    def __init__(self):
        self.signal, self.in_step = 0, False
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")

        # on a CPU threads add the gradients of x[index] in any order, unless told not to
        torch.use_deterministic_algorithms(not torch.cuda.is_available())
        torch.utils.deterministic.fill_uninitialized_memory = False
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)

    def connect(self):
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group(timeout=timedelta(hours=2))  # NCCL on GPUs, else gloo

    def join(self):
        """Meet the other processes: until then what is wrong is wrong on all of them."""
        self.connect()
        self.barrier()
        Distributed.met = True

    def share(self, make, items):
        """Do as `map` does, each process a share of the items; every process gets all that was made."""
        if self.world == 1:
            return map(make, items)
        self.connect()
        parts = [None] * self.world
        dist.all_gather_object(parts, [make(item) for item in items[self.rank :: self.world]])
        return list(itertools.chain(*itertools.zip_longest(*parts)))[: len(items)]

    def print0(self, text):
        """Print once for all processes, above a progress bar."""
        if self.rank == 0:
            with tqdm.external_write_mode():
                print(text, flush=True)

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def listen(self):
        """Have `on_signal` called."""
        for number in SIGNALS:
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        """Let the step in hand end, which then saves; outside of steps end at once."""
        if multiprocessing.parent_process():  # a process that makes rooms ends without a word
            sys.exit(1)
        self.signal = number
        if not self.in_step:
            raise KeyboardInterrupt(number)


def seed(*numbers):
    """Seed torch on every device; numpy's generators are made where they are used."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def shard_model(model, device, dtype):
    """Shard in place with FSDP2: block by block, then what is left."""
    # on a CPU autocast leaves some operations in the weights' own type, so those stay as they are
    low = dtype if device.type == "cuda" else None
    policy = MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False)  # meters stay float32
    blocks = {name for m in model.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    for module in [*(m for m in model.modules() if type(m).__name__ in blocks), model]:
        fully_shard(module, mp_policy=policy)
    for method in ("cache_features", "generate"):
        register_fsdp_forward_method(model, method)


@contextlib.contextmanager
def unsharded(model):
    """Hold whole weights on every rank, without gradients: ranks may run different forwards."""
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    with torch.no_grad():
        yield
    for module in modules:
        module.reshard()
        module.set_reshard_after_forward(module is not model, recurse=False)


def scene_line(scenes):
    """Say what scenes take; frames that are read when they are looked at take nothing."""
    arrays = [a for s in scenes for part in (s, s.frames) if part for a in vars(part).values()]
    held = sum(a.nbytes for a in arrays if isinstance(a, np.ndarray))
    return f"{len(scenes)} scenes to train in, {held / len(scenes) / 2**20:.1f} MB of memory each"


def memory_line(model, shards):
    """Say what trains, and what a device holds of weights, gradients and Adam's two moments."""
    trained = [p for p in model.parameters() if p.requires_grad]
    millions = sum(p.numel() for p in trained) / 1e6
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) / shards / 2**20
    gradients = sum(p.nbytes for p in trained) / shards / 2**20
    return (
        f"{millions:.2f} M parameters train; {weights + 3 * gradients:,.1f} MB per device before activations "
        f"({weights:,.1f} weights, {gradients:,.1f} gradients, {2 * gradients:,.1f} Adam)"
    )


# ---- 3 what a step asks --------------------------------------------------------------------------


def ask_without_names(stage, paper):
    """Mix in questions about geometry and color; where objects have no names others cannot be drawn."""
    instead = getattr(paper, "UNLABELLED", data.UNLABELLED)
    weight = sum(stage.tasks.values()) / len(instead)
    more = dict.fromkeys(instead, weight) if stage.tasks else {}
    return replace(stage, tasks=stage.tasks | more)


@dataclass
class QuestionDataset(torch.utils.data.Dataset):
    """The micro-batches of one stage for one rank, each a pure function of (seed, stage, step).

    A step has slots: one scene each, with its questions. Slot s belongs to rank s % world; a rank's slots
    are dealt to its micro-batches in the same way. Item i is micro-batch i % accumulate of step
    i // accumulate. `key` is (seed, number of the stage); `listed` holds official questions by scene.
    """

    model: data.SceneLanguageModel
    scenes: list[Scene]
    stage: Stage
    key: tuple[int, int]
    rank: int = 0
    world: int = 1
    listed: dict[str, list[Sample]] | None = None

    def __post_init__(self):
        self.by_name = {scene.name: scene for scene in self.scenes}
        self.shuffled = lru_cache(maxsize=3)(self.shuffle)

    def shuffle(self, epoch):
        """Order an epoch's scenes."""
        return np.random.default_rng([0, *self.key, epoch]).permutation(len(self.scenes)).tolist()

    def take(self, step, count):
        """Take a step's `count` items out of shuffled epochs that follow one another without end."""
        size = len(self.shuffled(0))
        places = [divmod(place, size) for place in range(step * count, (step + 1) * count)]
        return [self.shuffled(epoch)[i] for epoch, i in places]

    def slots(self, step):
        """Choose a step's (scene, number of questions); without questions a slot is a scene."""
        stage = self.stage
        per_scene = stage.per_scene if stage.tasks else 1
        counts = [min(per_scene, stage.batch - begun) for begun in range(0, stage.batch, per_scene)]
        return list(zip(self.take(step, len(counts)), counts, strict=True))

    def ask(self, rng, which, count):
        """Turn a scene, number its objects anew, and draw questions about it."""
        stage = self.stage
        for scene in self.scenes[which:] + self.scenes[:which]:
            scene = data.augment(scene, rng)
            samples = data.questions(scene, stage.tasks, count, rng) if stage.tasks else []
            if samples or not stage.tasks:  # a scene that allows no question gives way to the next
                return scene, samples
        raise DataError(f"stage {stage.name}: no scene allows any of {', '.join(stage.tasks)}")

    def __getitem__(self, i):
        step, part = divmod(i, self.stage.accumulate)
        slots = list(enumerate(self.slots(step)))
        own = slots[self.rank + self.world * part :: self.world * self.stage.accumulate]

        # a rank without a slot repeats the first with weight 0: no collective waits for it
        groups = [
            self.ask(np.random.default_rng([1, *self.key, step, slot]), *chosen)
            for slot, chosen in own or slots[:1]
        ]
        questions = sum(len(samples) or 1 for _, samples in groups)

        # of a scene only what the draw changed travels between processes: frames stay where they are
        batch = self.model.batch(groups)
        del batch["samples"]
        batch["scenes"] = [self.changes(scene) for scene in batch["scenes"]]
        return {"batch": batch, "questions": questions, "weight": float(bool(own))}

    def changes(self, scene):
        """Tell what the draw changed of a scene: (its name, the fields that differ)."""
        base = self.by_name[scene.name]
        changed = {name: value for name, value in vars(scene).items() if value is not getattr(base, name)}
        changed.pop("graph", None)  # made anew where it is needed
        return scene.name, changed


class OfficialQuestions(QuestionDataset):
    """Questions of official files, every one once an epoch, in place of generated ones."""

    def shuffle(self, epoch):
        """Order an epoch's questions, each with its scene."""
        rng, runs = np.random.default_rng([2, *self.key, epoch]), []
        for which, scene in enumerate(self.scenes):
            own = [(which, sample) for sample in self.listed.get(scene.name, [])]
            rng.shuffle(own)

            # a few questions of a scene in a row, so that a batch has few scenes to encode
            few = self.stage.per_scene
            runs += [own[begun : begun + few] for begun in range(0, len(own), few)]
        rng.shuffle(runs)
        return list(itertools.chain(*runs))

    def slots(self, step):
        """Choose a step's (scene, questions): exactly as many questions as its batch."""
        taken = self.take(step, self.stage.batch)
        by_scene = itertools.groupby(taken, key=lambda pair: pair[0])
        return [(which, [sample for _, sample in pairs]) for which, pairs in by_scene]

    def ask(self, rng, which, samples):
        """Turn a scene, but never mirror it, since people wrote left and right; boxes in an answer stay."""
        scene = self.scenes[which]
        turned = data.augment(scene, rng, mirror=False)
        if any(sample.box is not None for sample in samples):
            turned = replace(scene, identifiers=turned.identifiers)
        return turned, samples


def start_worker(worker):
    """Let a loader process outlive a signal to the group, whose step must end, but not its parent."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG


def load_steps(dataset, steps, workers):
    """Yield the micro-batches of each step, drawn ahead by loader processes."""
    # a step is a batch of micro-batches
    n = dataset.stage.accumulate
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=n,
        sampler=range(steps.start * n, steps.stop * n),
        collate_fn=list,
        num_workers=workers,
        worker_init_fn=start_worker,
        multiprocessing_context="fork" if workers else None,
    )
    for micro_batches in loader:
        for micro_batch in micro_batches:
            batch = micro_batch["batch"]
            batch["scenes"] = [replace(dataset.by_name[name], **changed) for name, changed in batch["scenes"]]
        yield micro_batches


# ---- 4 one step ----------------------------------------------------------------------------------


def learning_rate(stage, step, steps):
    """Rate of step 0, 1, ...: a linear warm-up, then the stage's schedule."""
    warm = round(stage.warmup * steps)
    if step < warm:
        return stage.lr * (step + 1) / warm
    share = SCHEDULES[stage.schedule]((step - warm) / max(1, steps - warm))
    return stage.final_lr + (stage.lr - stage.final_lr) * share


def make_optimizer(model, stage):
    """AdamW over what the stage trains; weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": stage.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas)


def compute_gradients(net, micro_batches, clip, dtype, distributed):
    """Leave in the parameters the gradient of the loss per term, over all ranks and micro-batches.

    Raw sums go backward; DDP and FSDP average them over ranks, so world / (global number of terms) is what
    is missing. Returns: numbers for the log, tokens read, and whether a signal reached any rank.
    """
    device = distributed.device
    totals = torch.zeros(7, dtype=torch.float64, device=device)
    for i, micro_batch in enumerate(micro_batches):
        # with DDP gradients meet once a step; other modules have no use for this
        net.require_backward_grad_sync = i == len(micro_batches) - 1

        weight = micro_batch["weight"]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = net(micro_batch["batch"])
        (out["loss"] * weight).backward()

        # numbers stay on the device: reading one would wait for it
        terms = out["weight"]
        counts = [terms, out["correct"], out.get("count", terms), out.get("tokens", terms)]
        for k, number in enumerate([out["loss"].detach(), *counts, micro_batch["questions"]]):
            totals[k] += weight * number

    # every rank needs the global numbers, and a signal to one must stop all
    totals[6] = distributed.signal
    if distributed.world > 1:
        dist.all_reduce(totals)
    loss, terms, correct, count, tokens, questions, stop = totals.tolist()

    # an idle parameter would make DDP wait for ever, so one process does not accept it either
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    if idle := [name for name, p in trained.items() if p.grad is None]:
        raise ValueError(
            f"{len(idle)} trainable parameters have no part in the loss, such as {idle[0]}: "
            "configure_stage must freeze what a stage does not use, forward must use the rest"
        )

    # from sums to means; a step without terms has no gradient, and is skipped as not finite
    per_term = 1 / terms if terms else math.nan
    for p in trained.values():
        p.grad.mul_(distributed.world * per_term)
    norm = nn.utils.clip_grad_norm_(trained.values(), clip or math.inf)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    accuracy = correct / count if count else None
    numbers = dict(loss=loss * per_term, norm=norm, accuracy=accuracy, terms=terms, questions=questions)
    return numbers, tokens, stop > 0


def update(optimizer, numbers, position):
    """Take the optimizer's step if all is finite, else count it as skipped."""
    # one gradient that is not finite would spoil Adam's moments for good
    finite = math.isfinite(numbers["loss"]) and math.isfinite(numbers["norm"])
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = numbers["lr"]
        optimizer.step()
        position["running"] += 0.03 * ((numbers["accuracy"] or 0.0) - position["running"])
    else:
        numbers |= {"loss": None, "norm": None}  # JSON knows no NaN
        position["skipped"] += 1
    optimizer.zero_grad()
    return finite


# ---- 5 checkpoints -------------------------------------------------------------------------------


def sync(path):
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def gather(tensors, rank):
    """Copy whole tensors to the CPU of the first rank; every rank takes part."""
    whole = {}
    for name, t in tensors.items():
        t = t.full_tensor() if isinstance(t, DTensor) else t
        if rank == 0:
            whole[name] = t.detach().cpu().contiguous()
            if not whole[name].isfinite().all():
                raise DataError(f"{name} is not finite: nothing was saved, the checkpoint before is whole")
    return whole


def save_checkpoint(out, model, optimizer, state, rank=0):
    """Write weights, Adam's moments and `state`; every rank takes part.

    Replacing state.json, when all that it names is on the disk, is what commits them.
    """
    weights = data.named_weights(model)
    tensors = {"weights": gather(weights, rank)}
    if optimizer:
        moments = {
            f"{name}/{key}": value
            for name, p in weights.items()
            for key, value in optimizer.state.get(p, {}).items()
        }
        tensors["optimizer"] = gather(moments, rank)
    if rank > 0:
        return

    folder, number, digests = out / "checkpoint", state["position"]["total"], {}
    try:
        # new files beside the old ones
        for kind, whole in tensors.items():
            path = folder / f"{kind}-{number}.safetensors"
            save_file(whole, path)
            sync(path)
            digests[kind] = data.file_digest(path)

        # the stroke that makes them count
        new = folder / "state.json.new"
        new.write_text(json.dumps(state | {"sha256": digests}, indent=1))
        sync(new)
        os.replace(new, folder / "state.json")
        sync(folder)

        # only now are the old ones of no use
        for path in folder.glob("*.safetensors"):
            if not path.stem.endswith(f"-{number}"):
                path.unlink()
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder}: saving failed ({error}); make room, then --resume") from None


def load_optimizer(optimizer, model, run):
    """Read Adam's moments, spread over the ranks like the parameters they belong to."""
    weights = data.named_weights(model)
    for entry, value in data.read_tensors(run, "optimizer").items():
        name, key = entry.rsplit("/", 1)
        p = weights[name]

        # the count of steps is one number, kept on the CPU
        if key != "step":
            value = value.to(p.device)
            if isinstance(p, DTensor):
                value = distribute_tensor(value, p.device_mesh, p.placements)
        optimizer.state[p][key] = value


# ---- 6 the run folder ----------------------------------------------------------------------------

RESULTS = ("checkpoint/*", "predictions/**/*.jsonl", "loss.png", "metrics.json", "report.html")


def open_run(args, rank):
    """Lock the run folder and read the state to go on from: (lock, state or None)."""
    # a run goes on as the command that began it says; another command is another run
    out, state = args.out, None
    if args.resume:
        state = data.read_state(out)
        for key, now in args.command.items():
            then = state["run"].get(key)
            if then != now:
                raise DataError(f"{out} holds a run with {key} {then!r}, not {now!r}: choose another --out")
    elif (out / "checkpoint" / "state.json").exists() and not args.overwrite:
        raise DataError(f"{out} holds a run: --resume it, --overwrite it, or choose another --out")

    # what cannot be written shows here, not when it is first needed
    for folder in (out / "cache", out / "checkpoint"):
        folder.mkdir(parents=True, exist_ok=True)
    lock = (out / "lock").open("w")
    if rank == 0:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # dies with this process
        except OSError:
            raise DataError(f"{out}: another run is writing there; choose another --out") from None
    return lock, state


class Log:
    """config.json, log.jsonl (names: see the top of this file), and TensorBoard where asked."""

    def __init__(self, args, record, total):
        # a new run starts from an empty folder
        self.path = args.out / "log.jsonl"
        if total == 0:
            for pattern in RESULTS:
                for path in args.out.glob(pattern):
                    path.unlink()

        # a line is a step; those after the checkpoint will be done again
        self.path.touch()
        kept = self.path.read_text().splitlines(True)[:total]
        self.path.write_text("".join(kept))

        # what the run is, for people; who resumes or scores it reads the state
        (args.out / "config.json").write_text(json.dumps(record, indent=1))
        self.board = None
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(args.out / "tensorboard")

    def write(self, line):
        """Append a line, with the peak memory of the GPU."""
        peak = torch.cuda.max_memory_allocated() / 2**30
        with self.path.open("a") as file:
            file.write(json.dumps({**line, "memory": peak or None}) + "\n")
        for key in ("loss", "accuracy", "lr", "norm", "speed"):
            if self.board and line[key] is not None:
                self.board.add_scalar(key, line[key], line["total"])


def draw_loss(out):
    """Draw loss.png from log.jsonl: the loss per answer token against steps, a color per stage."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()

    # a skipped step is a gap
    for stage, own in itertools.groupby(lines, key=lambda line: line["stage"]):
        points = [(line["total"], line["loss"] or math.nan) for line in own]
        axis.plot(*zip(*points, strict=True), lw=1, label=stage)
    axis.set(xlabel="step", ylabel="loss per answer token", yscale="log")
    axis.legend()
    figure.savefig(out / "loss.png", dpi=100)


# ---- 7 the run -----------------------------------------------------------------------------------


def make_text(config, scenes, listed):
    """Take the pre-trained model's own tokenizer, else one of all words that may be asked."""
    if config.llm:
        return data.HubText(config.llm)
    categories = {*data.CATEGORIES, *(o.category for scene in scenes for o in scene.objects)}
    official = [s for by_scene in listed.values() for own in by_scene.values() for s in own]
    return data.TinyText(data.vocabulary(categories, (f"{s.question} {s.answer}" for s in official)))


def rooms_to_read(args, count, scenes):
    """Make rooms without pictures; in every other one things have names that the scenes have and rooms have not."""
    seeds = data.ROOM_SEEDS["train"][:count]
    rooms = data.rooms(seeds, args.workers + 1, objects=args.objects, views=0, points=0)
    names = {o.category for scene in scenes for o in scene.objects}
    strange = sorted(names - {"", *data.STRUCTURE, *data.CATEGORIES})
    for k, room in enumerate(rooms[::2] if strange else ()):
        drawn = np.random.default_rng(k).choice(strange, len(data.CATEGORIES))
        name = dict(zip(data.CATEGORIES, drawn.tolist(), strict=True))
        room.objects = [replace(o, category=name[o.category]) for o in room.objects]
    return rooms


def read_rooms(args, config, text, scenes):
    """Find the run of the language model that has read rooms in words; train it where there is none yet.

    Its folder lies beside that of this run and is named by what it depends on: data.py, the vocabulary, sizes,
    and what is asked about a room, since papers write some of its questions.
    """
    # a short run reads shortly
    stages, steps = data.STAGES["tiny"], args.steps
    if steps is not None:
        steps = min(max(steps, len(stages)), sum(stage.iterations for stage in stages))
    count = min(4000, 5 * args.train_scenes)
    code = Path(data.__file__).read_bytes()
    room = data.room(0, views=0, points=0)
    asked = [data.questions(room, stage.tasks, 100, np.random.default_rng(0)) for stage in stages]
    made_of = repr((text.state(), config.reader, steps, count, args.objects, asked)).encode()
    out = args.out.parent / f"language-{hashlib.sha256(code + made_of).hexdigest()[:12]}"

    # a run that was stopped goes on, one that has ended is read
    begun = (out / "checkpoint" / "state.json").exists() and not args.fresh
    if not begun or data.read_state(out)["position"]["stage"] < len(stages):
        settings = dict(model="data", preset="tiny", seed=0, steps=steps, set=[f"reader={config.reader}"])
        settings |= dict.fromkeys(("llm", "only", "init", "annotations"))
        run = dict(out=out, resume=begun, overwrite=args.fresh, no_eval=True, shard=False)
        own = argparse.Namespace(**vars(args) | settings | run)
        own.command = args.command | settings
        train(own, (rooms_to_read(args, count, scenes), []), text)
    return out


def train(args, scenes=(), text=None):
    """Train all stages of a paper, score the result, and return the model.

    Its position, and a checkpoint of model and optimizer, are all that a resume needs. scenes: those to train
    in and those to score in, text: the tokenizer, where they are not to be made here.
    """
    distributed = Distributed()
    distributed.listen()
    rank, world, device = distributed.rank, distributed.world, distributed.device
    print0 = distributed.print0
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    arithmetic = getattr(torch, dtype)
    shard = args.shard and world > 1
    paper = importlib.import_module(args.model)
    for name in [*MODELS, args.model]:  # all papers share one vocabulary
        data.adopt(importlib.import_module(name))
    evaluate.adopt(paper)
    config, stages = configure(args, paper)

    # what is wrong with the folder must not show after minutes of work
    _lock, state = open_run(args, rank)  # held until this function ends
    start = {"stage": 0, "step": 0, "total": 0, "running": 0.0, "skipped": 0, "seconds": 0.0}
    position = state["position"] if state else start

    # scenes to train in, and scenes to score in
    options = data.scene_options(args)
    if args.data == "scannet":
        options.setdefault("max_frames", getattr(config, "frames", 32))
    counts = {"train": args.train_scenes, "test": args.test_scenes}
    folder = args.out / "cache" / "rooms"
    load = partial(data.load_scenes, args.data, share=distributed.share, folder=folder, **options)

    # a paper without a setting for frames trains on points alone
    train_scenes, test_scenes = scenes or (
        load(split, args.root, count, args.workers, frames=split == "test" or hasattr(config, "frames"))
        for split, count in counts.items()
    )
    if not train_scenes or not (test_scenes or args.no_eval):
        raise DataError(f"--data {args.data}: give a scene to train in and one to score in, or --no-eval")
    if len(train_scenes) == 1:
        print0("note: one scene cannot show learning; `python data.py check` says how it was read")

    # what stages ask about them: generated questions, or those of official files
    if not any(o.category for scene in train_scenes for o in scene.objects):
        print0("the objects have no categories: questions are about color, size and place only")
        stages = [ask_without_names(stage, paper) for stage in stages]
    listed, mixtures = {}, {}
    for i, stage in enumerate(stages):
        if args.annotations and stage.files:
            folders = Path(args.annotations), Path(args.root or args.annotations)
            own, counted = evaluate.mixture(stage.files, *folders, train_scenes, test_scenes, args.seed)
            print0("\n".join([f"stage {stage.name} asks from official files:", *counted]))
            mixtures[stage.name] = counted
            if own:
                stages[i] = replace(stage, samples=sum(map(len, own.values())))
                listed[stage.name] = own
            else:
                print0("none is left: its questions are generated")
    if args.annotations and not listed:
        raise DataError(
            f"--annotations {args.annotations}: no question to train on; {mixtures or 'no stage asks'}"
        )
    steps = stage_steps(stages, len(train_scenes), args.steps)

    # every rank draws the same first weights
    text = text or make_text(config, train_scenes, listed)
    seed(args.seed)
    model = paper.build(config, text)
    model.keep_trained_precise(stages)
    if args.resume or args.init:
        data.load_weights(model, args.out if args.resume else Path(args.init))
    elif model.from_nothing:
        reader = read_rooms(args, config, text, train_scenes)
        print0(f"starts from the language model in {reader}")
        model.start_from(data.read_tensors(reader, "weights"))
    if args.recompute:
        model.gradient_checkpointing_enable()

    # from here on the processes know each other
    distributed.join()
    print0(scene_line(train_scenes))
    print0(f"{args.out}: seed {args.seed}, processes {world}, {device.type}, {dtype}")
    if state and state["processes"] != world:
        print0(f"note: the run began on {state['processes']} processes; results agree to rounding")
    for stage, n in zip(stages, steps, strict=True):
        model.configure_stage(stage)
        print0(f"  {stage.name}: {n} steps; {memory_line(model, world if shard else 1)}")
    if shard:
        shard_model(model, device, arithmetic)  # moves to the device block by block
    else:
        model.to(device)

    # all that scoring needs to know of the run
    record = {
        **args.command,
        "config": asdict(config),
        "stages": [asdict(stage) for stage in stages],
        "text": text.state(),
        "scene_counts": counts,
        "scene_options": options,
        "mixtures": mixtures,
        "dtype": dtype,
        "revision": evaluate.revision(),
        "torch": torch.__version__,
    }
    log = Log(args, record, position["total"]) if rank == 0 else None

    def save(optimizer):
        """Write a checkpoint; every rank takes part."""
        state = {"position": position, "run": record, "processes": world}
        if rank == 0:
            sync(log.path)  # whole lines up to this step, whatever happens
        save_checkpoint(args.out, model, optimizer, state, rank)
        if rank == 0:
            draw_loss(args.out)
        distributed.barrier()

    # the blind baseline knows the answers of some scenes that the model trains in
    blind = train_scenes[:300]
    score = partial(evaluate.evaluate_scenes, model, test_scenes, record=record, blind_scenes=blind)

    distributed.listen()  # again: the language model's run did so for itself
    for index in range(position["stage"], len(stages)):
        # frozen work, once per scene
        stage = stages[index]
        seed(args.seed, index)
        model.configure_stage(stage)
        model.train()
        with unsharded(model):
            model.cache_features(train_scenes, args.out / "cache", rank, world)
        distributed.barrier()

        # what no token shows is not asked about
        shown = {scene.name: model.visible(scene) for scene in train_scenes}
        asked = [replace(s, objects=[o for o in s.objects if o.id in shown[s.name]]) for s in train_scenes]
        hidden = sum(o.id not in shown[s.name] for s in train_scenes for o in s.objects)
        if hidden:
            print0(f"stage {stage.name}: {hidden} objects that no token shows are not asked about")
        own = {
            name: [s for s in samples if data.marks_of(s) <= shown[name]]
            for name, samples in listed.get(stage.name, {}).items()
        }

        # the optimizer, and what it was when the run stopped
        optimizer = make_optimizer(model, stage)
        if position["step"] > 0:
            load_optimizer(optimizer, model, args.out)
        net = model
        if world > 1 and not shard:
            net = DistributedDataParallel(model, gradient_as_bucket_view=True)

        # the questions, drawn ahead by loader processes
        kind = OfficialQuestions if own else QuestionDataset
        dataset = kind(model, asked, stage, (args.seed, index), rank, world, own)
        todo = range(position["step"], steps[index])
        name = f"{stage.name} ({index + 1} of {len(stages)})"
        bar = tqdm(total=todo.stop, initial=todo.start, desc=name, disable=rank > 0, mininterval=2)

        distributed.in_step, bad, ended = True, 0, time.monotonic()
        for micro_batches in load_steps(dataset, todo, args.workers):
            # a step seeds all that is random in it: a resumed run draws what this one would have drawn
            step, arrived = position["step"], time.monotonic()
            seed(args.seed, index, step, rank)
            numbers, tokens, stop = compute_gradients(net, micro_batches, stage.clip, arithmetic, distributed)
            numbers["lr"] = learning_rate(stage, step, todo.stop)

            # one bad batch may happen; five in a row will not mend
            bad = 0 if update(optimizer, numbers, position) else bad + 1
            if bad > 0:
                print0(f"stage {stage.name}, step {step + 1}: loss or gradient is not finite, skipped")
            if bad == 5:
                raise DataError(f"stage {stage.name}: five such steps in a row; lower its lr or clip")

            # the position moves on, and the log with it
            seconds = time.monotonic() - ended
            position["step"], position["total"] = step + 1, position["total"] + 1
            position["seconds"] += seconds
            numbers |= {"speed": tokens / seconds, "wait": (arrived - ended) / seconds}
            ended += seconds
            if rank == 0:
                log.write(position | numbers | {"stage": stage.name})
            bar.set_postfix(loss=numbers["loss"], accuracy=position["running"], refresh=False)
            bar.update()

            # the next stage starts with new moments, so the last checkpoint of this one has none
            if step + 1 == todo.stop:
                position |= {"stage": index + 1, "step": 0, "running": 0.0}
                save(None)
            elif stop or (args.save_every and (step + 1) % args.save_every == 0):
                save(optimizer)
            if stop:
                raise KeyboardInterrupt(distributed.signal or signal.SIGTERM)
        distributed.in_step = False
        bar.close()

        # some skills are scored before the next stage changes the model
        if stage.score and not args.no_eval:
            with unsharded(model):
                score(args.out / f"after {stage.name}", names=stage.score)

    # the finished model: its scores, some pictures of what it sees, and a report
    if not args.no_eval:
        with unsharded(model):
            score(args.out)
            if rank == 0:
                few = [evaluate.number_objects(scene, args.seed) for scene in test_scenes[:4]]
                model.pictures(few, args.out / "pictures")
                evaluate.write_report(args.out)
        distributed.barrier()  # a process that ends before the first looks like one that failed
    print0(f"{args.out}: done, {position['seconds'] / 60:.1f} minutes of training")
    return model


def main(argv=None):
    """Run a command: status 0, 2 and one line for what the user can mend, 128 + n after signal n."""
    # what ends a run in an expected way is one line; anything else is a bug and shows its traceback
    args = parse_args(argv)
    status, message = 0, ""
    try:
        train(args)
    except KeyboardInterrupt as stopped:
        status = 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
        again = "with --resume " if (args.out / "checkpoint" / "state.json").exists() else ""
        message = f"stopped; the same command {again}goes on from the last checkpoint"
    except (DataError, OSError, ModuleNotFoundError) as error:
        # a loader process puts its traceback in front: the last line is the message
        status, message = 2, str(error).strip().splitlines()[-1].removeprefix("data.DataError: ")
    except Exception as error:
        status, why = 1, " ".join(f"{type(error).__name__}: {error}".split())
        log = args.out / "log.jsonl"
        if "DataLoader worker" in why:
            message = "a loader process died, likely for want of memory: --resume with fewer --workers"
        elif "gloo" in why or "NCCL" in why:
            message = "another process of this run ended; --resume goes on"
        elif args.set and not (log.exists() and log.stat().st_size):
            # before the first step it is what the user set that fits nothing
            status, message = 2, f"--set {' '.join(args.set)}: no model can be trained so ({why[:90]})"
        else:
            raise

    # before the processes meet, what is wrong is wrong on all of them
    first = os.environ.get("RANK", "0") == "0"
    if message and (first or (Distributed.met and status < 128)):
        print(f"train.py: {message}", file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
