"""Train one of the papers: one trainer that knows none of them, and gives the same numbers on any number of processes.

    torchrun train.py --model proxy3d                        # rooms, tiny preset; a CPU is enough
    torchrun --nproc_per_node 8 train.py --model proxy3d --data scannet --root DIR --preset paper --shard
    torchrun train.py ... --data scannet --root DIR --annotations FILES     # official questions in place of generated
    torchrun train.py ... --resume                           # goes on exactly where the run stopped; python works too

A paper module offers `Config` (with the presets as class methods), `STAGES`, `TASKS`, `recipe(config, stages)` and
`build(config, text)`, which gives a `data.SceneLanguageModel`: every method that is called here stands there with its
default. What a forward returns: {"loss": sum over its terms, "weight": how many terms, "correct": right answer tokens;
optional "count": of how many, "tokens": seen, for the speed}. All that a stage leaves trainable takes part in every
forward of that stage.

A step is a pure function of (seed, stage, step): which scenes, how they are turned, what is asked. Each process takes
every world-th scene of a step; losses are summed, then divided by the *global* number of terms, so neither the number
of processes nor accumulation changes the result. Random states need no saving: a step seeds them from its position.
The learning rate belongs to the global batch and is never rescaled.

A run folder holds config.json, log.jsonl, loss.png, cache/ and checkpoint/; metrics.json, predictions/, pictures/ and
report.html once it is scored. state.json commits a checkpoint: it holds a digest of each weight file and is replaced
in one stroke once they are on disk; a kill at any instant leaves the old or the new. SIGTERM and Ctrl-C let the step
in hand end and save.

log.jsonl, a line per step, numbers over all processes:
  stage, step, total  stage, steps done in it, steps done in all    loss         mean per term (answer token)
  accuracy, running   right answer tokens: now, moving average      terms        answer tokens (terms of the loss)
  questions           asked (scenes in an encoder stage)            lr, norm     learning rate; gradient before clipping
  speed               tokens per second                             wait         share of the step waiting for data
  memory              peak GB of the first GPU, null on a CPU       skipped      steps not finite so far
  seconds             of training so far, before a resume too

Contents: 1 command line · 2 processes and devices · 3 what a step asks · 4 one step · 5 checkpoints · 6 the run folder
· 7 the run
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import fcntl
import importlib
import itertools
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

# Two OpenMP threads wait for each other at every barrier. Beside a busy core a short spin is 15 times faster than the
# default and no slower on a quiet machine; it must be set before torch is loaded, and changes no result.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import evaluate
from data import DataError, Sample, Scene, Stage

MODELS = ["proxy3d", "fase3d", "spatial3dllm"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SCHEDULES = {  # share of the way from final_lr up to lr, at progress 0..1 after the warm-up
    "constant": lambda p: 1.0,
    "linear": lambda p: 1 - p,
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    "trapezoid": lambda p: min(1.0, 4 * (1 - p)),  # flat, then linear over the last quarter
}

# ---- 1 command line --------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags; `args.command` holds those that make the run what it is, which --resume must repeat."""
    command = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add = command.add_argument
    add("--model", required=True, choices=MODELS, help="paper")
    add("--data", default="rooms", choices=data.SOURCES, help="source of scenes (default: rooms)")
    add("--root", help="folder of the scenes (not for rooms)")
    add("--annotations", help="folder of official files: stages that name such sources ask from them")
    add("--preset", default="tiny", choices=["tiny", "paper"], help="from nothing, or the paper's numbers")
    add("--llm", help="name or folder of a pre-trained language model")
    add("--steps", type=int, help="scale the stages to this many steps in all")
    add("--seed", type=int, default=0)
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="a Config field, or STAGE.FIELD")
    add("--stages", dest="only", help="run only these, comma-separated")
    add("--init", help="folder of another run of this model, whose weights to start from")
    add("--train-scenes", type=int, default=800, help="rooms to train in")
    add("--test-scenes", type=int, default=150, help="rooms to score in, never trained in")
    data.add_scene_options(command)

    # the rest may differ between the parts of a run
    about = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(parents=[command], description=about, allow_abbrev=False)
    add = parser.add_argument
    add("--out", type=Path, help="run folder (default runs/<model>)")
    add("--resume", action="store_true", help="go on from the run folder's checkpoint")
    add("--overwrite", action="store_true", help="replace the run in the run folder")
    add("--save-every", type=int, default=500, help="steps between checkpoints, besides those at a stage's end")
    add("--shard", action="store_true", help="FSDP2: spread weights, gradients and Adam over the processes")
    add("--recompute", action="store_true", help="gradient checkpointing: less memory, more time")
    add("--dtype", choices=DTYPES, help="of the arithmetic (default bfloat16 on a GPU, float32 on a CPU)")
    add("--workers", type=int, help="loader processes (default: cores to spare, at most 4)")
    add("--tensorboard", action="store_true")
    add("--no-eval", action="store_true", help="train only")

    args = parser.parse_args(argv)
    args.command = vars(command.parse_known_args(argv)[0])
    args.out = args.out or Path("runs") / args.model
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
        args.workers = max(0, min(4, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
    return args


def known(name: str, names: Iterable[str], what: str) -> str:
    """Return `name` if it is among `names`, else raise a DataError that lists them."""
    if name not in names:
        raise DataError(f"unknown {what} {name}; known: {', '.join(names)}")
    return name


def override(target, key: str, text: str, what: str):
    """Copy a dataclass with one field read from text as Python writes it: 3, 1e-4, (16, 21), true, none, or a word."""
    kinds = {field.name: field.type for field in fields(target) if field.name != "name"}
    kind = kinds[known(key, kinds, what)]
    try:
        value = ast.literal_eval(text.title() if text.lower() in ("true", "false", "none") else text)
    except (ValueError, SyntaxError):
        value = text
    if type(value) is int and kind.startswith("float"):
        value = float(value)

    # an annotation such as "int | None" or "tuple[int, ...]" says which types a field takes
    found = "None" if value is None else type(value).__name__
    if found not in kind.partition("[")[0].split(" | "):
        raise DataError(f"--set {key}={text}: expected {kind}, got {found}")
    return replace(target, **{key: value})


LEAST = {"steps": 1, "train_scenes": 1, "batch": 1, "per_scene": 1, "accumulate": 1, "iterations": 1, "samples": 1}
MOST = {"warmup": 1.0, "until": 1.0}


def check_numbers(settings: dict, what: str) -> None:
    """Refuse numbers that are negative, not finite, or outside LEAST and MOST."""
    for name, value in settings.items():
        least, most = LEAST.get(name, 0), MOST.get(name, 1e12)
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) in (int, float) and not least <= number <= most:
                raise DataError(f"{what} {name} = {value}: give a number from {least} to {most:g}")


def configure(args: argparse.Namespace, paper) -> tuple[object, list[Stage]]:
    """Apply --llm, --set and --stages to the paper's preset: (Config, stages)."""
    config = getattr(paper.Config, args.preset)()
    stages = {stage.name: stage for stage in paper.STAGES[args.preset]}
    if args.llm:
        config = override(config, "llm", args.llm, "field of Config")
    for setting in args.set:
        key, equals, value = setting.partition("=")
        name, dot, field = key.rpartition(".")
        if not equals:
            raise DataError(f"--set {setting}: write KEY=VALUE")
        if dot:
            stage = stages[known(name, stages, "stage")]
            stages[name] = override(stage, field, value, f"field of stage {name}")
        else:
            config = override(config, key, value, "field of Config")

    # a setting may add or drop stages
    stages = {stage.name: stage for stage in paper.recipe(config, list(stages.values()))}
    names = args.only.split(",") if args.only else stages
    chosen = [stages[known(name.strip(), stages, "stage")] for name in names]

    # whatever set a number, it has a range
    check_numbers(vars(args), "command line:")
    check_numbers(vars(config), "Config:")
    for stage in chosen:
        check_numbers(vars(stage), f"stage {stage.name}:")
        known(stage.schedule, SCHEDULES, f"schedule of stage {stage.name}")
        if (stage.iterations is None) == (stage.epochs is None):
            raise DataError(f"stage {stage.name}: give either iterations or epochs")
    return config, chosen


def stage_steps(stages: list[Stage], scenes: int, total: int | None = None) -> list[int]:
    """Count every stage's optimizer steps; with `total` scaled so that they sum to it, at least one each."""
    steps = []
    for stage in stages:
        samples = stage.samples or scenes * (stage.per_scene if stage.tasks else 1)
        steps.append(stage.iterations or math.ceil(stage.epochs * samples / stage.batch))
    if total is None:
        return steps
    if total < len(steps):
        raise DataError(f"--steps {total}: each of the {len(steps)} stages needs a step")
    ends = np.cumsum([0, *steps]) / sum(steps) * (total - len(steps))
    return [int(n) + 1 for n in np.diff(np.round(ends))]


# ---- 2 processes and devices -----------------------------------------------------------------------------------------


class Distributed:
    """This process among those that torchrun started: its rank among `world`, its device, and a signal to end."""

    def __init__(self):
        self.signal, self.in_step = 0, False
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)

    def join(self, shard: bool) -> None:
        """Meet the other processes; sharding needs a group even of one."""
        backend = "gloo" if self.device.type == "cpu" else "nccl"
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group(backend, timeout=timedelta(hours=2))
        elif shard and not dist.is_initialized():
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.barrier()

    def print0(self, text: str) -> None:
        """Print once for all processes, above a progress bar."""
        if self.rank == 0:
            with tqdm.external_write_mode():
                print(text, flush=True)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def on_signal(self, number: int, frame) -> None:
        """Let the step in hand end, which then saves; outside of steps nothing is lost."""
        self.signal = number
        if not self.in_step:
            raise KeyboardInterrupt(number)


def seed_everything(*numbers: int) -> None:
    """Seed Python, numpy and torch on every device from whole numbers >= 0."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (libraries draw from it)
    torch.manual_seed(seed)


def shard_model(model: nn.Module, distributed: Distributed, dtype: torch.dtype) -> None:
    """Shard in place with FSDP2: block by block, then what is left."""
    mesh = init_device_mesh(distributed.device.type, (distributed.world,))

    # on a CPU autocast leaves some operations in the weights' own type, so those stay as they are
    low = dtype if distributed.device.type == "cuda" else None
    policy = MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False)  # meters stay float32
    blocks = {name for m in model.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    for module in [*(m for m in model.modules() if type(m).__name__ in blocks), model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for method in ("cache_features", "generate"):
        register_fsdp_forward_method(model, method)


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Hold whole weights on every rank, so that ranks may run different numbers of forwards."""
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in modules:
        module.reshard()
        module.set_reshard_after_forward(module is not model, recurse=False)


def memory_line(model: nn.Module, shards: int) -> str:
    """Say what trains, and what a device holds before activations: weights, gradients, Adam's two moments."""
    trained = [p for p in model.parameters() if p.requires_grad]
    millions = sum(p.numel() for p in trained) / 1e6
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) / shards / 2**20
    gradients = sum(p.nbytes for p in trained) / shards / 2**20
    return (
        f"{millions:.2f} M parameters train; {weights + 3 * gradients:,.1f} MB per device before activations "
        f"({weights:,.1f} weights, {gradients:,.1f} gradients, {2 * gradients:,.1f} Adam)"
    )


# ---- 3 what a step asks ----------------------------------------------------------------------------------------------


def ask_without_names(stages: list[Stage], paper) -> list[Stage]:
    """Mix in questions about geometry and color, where objects have no categories and others cannot be drawn."""
    instead = getattr(paper, "UNLABELLED", data.UNLABELLED)
    changed = []
    for stage in stages:
        weight = sum(stage.tasks.values()) / len(instead)
        more = dict.fromkeys(instead, weight) if stage.tasks else {}
        changed.append(replace(stage, tasks=stage.tasks | more))
    return changed


class QuestionDataset(torch.utils.data.Dataset):
    """The micro-batches of one stage for one rank, each a pure function of (seed, stage, step).

    A step has slots: one scene each, with its questions. Slot s belongs to rank s % world; a rank's slots are dealt
    to its micro-batches in the same way. Item i is micro-batch i % accumulate of step i // accumulate.
    """

    def __init__(self, model, scenes: list[Scene], stage: Stage, index: int, seed: int, rank: int = 0, world: int = 1):
        self.model, self.scenes, self.stage = model, scenes, stage
        self.key = (seed, index)
        self.rank, self.world = rank, world
        self.by_name = {scene.name: scene for scene in scenes}
        self.shuffled = lru_cache(maxsize=3)(self.shuffle)

    def shuffle(self, epoch: int) -> list:
        """Order an epoch's scenes."""
        return np.random.default_rng([0, *self.key, epoch]).permutation(len(self.scenes)).tolist()

    def take(self, step: int, count: int) -> list:
        """Take a step's `count` items out of shuffled epochs that follow one another without end."""
        size = len(self.shuffled(0))
        places = [divmod(place, size) for place in range(step * count, (step + 1) * count)]
        return [self.shuffled(epoch)[i] for epoch, i in places]

    def slots(self, step: int) -> list[tuple]:
        """Choose the (scene, number of questions) of a step; a stage without questions has a scene per slot."""
        stage = self.stage
        per_scene = stage.per_scene if stage.tasks else 1
        counts = [min(per_scene, stage.batch - begun) for begun in range(0, stage.batch, per_scene)]
        return list(zip(self.take(step, len(counts)), counts, strict=True))

    def ask(self, rng: np.random.Generator, which: int, count: int) -> tuple[Scene, list[Sample]]:
        """Turn a scene, number its objects anew and draw questions; a scene that allows none gives way to the next."""
        stage = self.stage
        for scene in self.scenes[which:] + self.scenes[:which]:
            scene = data.augment(scene, rng, stage.recolour)
            samples = data.questions(scene, stage.tasks, count, rng) if stage.tasks else []
            if samples or not stage.tasks:
                return scene, samples
        raise DataError(f"stage {stage.name}: no scene allows any question of {', '.join(stage.tasks)}")

    def __getitem__(self, i: int) -> dict:
        step, part = divmod(i, self.stage.accumulate)
        slots = list(enumerate(self.slots(step)))
        own = slots[self.rank + self.world * part :: self.world * self.stage.accumulate]

        # a rank without a slot repeats the first with weight 0: every rank runs every module, no collective waits
        groups = []
        for slot, chosen in own or slots[:1]:
            rng = np.random.default_rng([1, *self.key, step, slot])
            groups.append(self.ask(rng, *chosen))
        questions = sum(len(samples) if self.stage.tasks else 1 for _, samples in groups)

        # between processes only what the draw changed of a scene travels: its frames stay where they are
        batch = self.model.batch(groups)
        del batch["samples"]
        batch["scenes"] = [self.changes(scene) for scene in batch["scenes"]]
        return {"batch": batch, "questions": questions, "weight": float(bool(own))}

    def changes(self, scene: Scene) -> tuple[str, dict]:
        """Tell what the draw changed of a scene: (its name, the fields that differ)."""
        base, names = self.by_name[scene.name], [field.name for field in fields(Scene)]
        return scene.name, {k: getattr(scene, k) for k in names if getattr(scene, k) is not getattr(base, k)}


class OfficialQuestions(QuestionDataset):
    """Questions of official files, every one once an epoch, in place of generated ones.

    `listed` holds them by scene name. `per_scene` of a scene follow each other, so that a batch has few scenes.
    """

    def __init__(self, listed: dict[str, list[Sample]], *args):
        super().__init__(*args)
        self.listed = listed

    def shuffle(self, epoch: int) -> list[tuple[int, Sample]]:
        """Order an epoch's questions, each with its scene."""
        rng, per_scene, runs = np.random.default_rng([2, *self.key, epoch]), self.stage.per_scene, []
        for which, scene in enumerate(self.scenes):
            own = [(which, sample) for sample in self.listed.get(scene.name, [])]
            rng.shuffle(own)
            runs += [own[begun : begun + per_scene] for begun in range(0, len(own), per_scene)]
        rng.shuffle(runs)
        return list(itertools.chain(*runs))

    def slots(self, step: int) -> list[tuple]:
        """Choose the (scene, questions) of a step: exactly as many questions as its batch."""
        taken = self.take(step, self.stage.batch)
        by_scene = itertools.groupby(taken, key=lambda pair: pair[0])
        return [(which, [sample for _, sample in pairs]) for which, pairs in by_scene]

    def ask(self, rng: np.random.Generator, which: int, samples: list[Sample]) -> tuple[Scene, list[Sample]]:
        """Turn a scene; it is not mirrored, since people wrote left and right."""
        return data.augment(self.scenes[which], rng, mirror=False), samples


def start_worker(worker: int) -> None:
    """Let a loader process outlive a signal to the group, whose step must end, but not its parent."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG


def load_steps(dataset: QuestionDataset, steps: range, workers: int) -> Iterator[list[dict]]:
    """Yield the micro-batches of each step, drawn ahead by loader processes."""
    n = dataset.stage.accumulate
    forked = {"multiprocessing_context": "fork", "worker_init_fn": start_worker} if workers else {}
    items = range(steps.start * n, steps.stop * n)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=n, sampler=items, collate_fn=list, num_workers=workers, **forked
    )
    for micro_batches in loader:
        for micro_batch in micro_batches:
            batch = micro_batch["batch"]
            batch["scenes"] = [replace(dataset.by_name[name], **changes) for name, changes in batch["scenes"]]
        yield micro_batches


# ---- 4 one step ------------------------------------------------------------------------------------------------------


def learning_rate(stage: Stage, step: int, steps: int) -> float:
    """Rate of step 0, 1, ...: linear warm-up over the first share of the steps, then the stage's schedule."""
    warm = round(stage.warmup * steps)
    if step < warm:
        return stage.lr * (step + 1) / warm
    share = SCHEDULES[stage.schedule]((step - warm) / max(1, steps - warm))
    return stage.final_lr + (stage.lr - stage.final_lr) * share


def make_optimizer(model: nn.Module, stage: Stage) -> torch.optim.AdamW:
    """AdamW over what the stage trains; weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": stage.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas)


def compute_gradients(net: nn.Module, micro_batches: list[dict], clip: float, distributed: Distributed,
                      dtype: torch.dtype) -> dict:  # fmt: skip
    """Leave in the parameters the gradient of the loss per term, over all ranks and micro-batches; return numbers.

    Raw sums go backward; DDP and FSDP average them over ranks, so world / (global number of terms) is what is missing.
    A signal to one rank is "stop" on all.
    """
    device = distributed.device
    totals = torch.zeros(7, dtype=torch.float64, device=device)
    for i, micro_batch in enumerate(micro_batches):
        # with DDP gradients meet once a step
        if isinstance(net, DistributedDataParallel):
            net.require_backward_grad_sync = i == len(micro_batches) - 1

        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = net(micro_batch["batch"])
        (out["loss"] * micro_batch["weight"]).backward()

        # numbers stay on the device: a copy would wait for it
        terms = out["weight"]
        counts = [terms, out["correct"], out.get("count", terms), out.get("tokens", terms), micro_batch["questions"]]
        numbers = [torch.as_tensor(n, dtype=torch.float64, device=device) for n in [out["loss"].detach(), *counts]]
        totals[:6] += micro_batch["weight"] * torch.stack(numbers)

    # every rank needs the global numbers
    totals[6] = distributed.signal
    if distributed.world > 1:
        dist.all_reduce(totals)
    loss, terms, correct, count, tokens, questions, stop = totals.tolist()

    # an idle parameter would make DDP wait for ever, so one process does not accept it either
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    if idle := [name for name, p in trained.items() if p.grad is None]:
        raise ValueError(
            f"{len(idle)} trainable parameters have no part in the loss, such as {idle[0]}: configure_stage must "
            "freeze what a stage does not use, forward must use the rest in every batch"
        )

    per_term = 1 / terms if terms else math.nan
    for p in trained.values():
        p.grad.mul_(distributed.world * per_term)
    norm = nn.utils.clip_grad_norm_(trained.values(), clip or math.inf)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    accuracy = correct / count if count else None
    return {
        "loss": loss * per_term,
        "accuracy": accuracy,
        "terms": terms,
        "questions": questions,
        "norm": norm,
        "tokens": tokens,
        "stop": stop > 0,
    }


# ---- 5 checkpoints ---------------------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_tensors(path: Path, tensors: dict[str, Tensor], rank: int) -> str | None:
    """Write whole tensors to a safetensors file and return its digest; every rank takes part, the first writes."""
    whole = {}
    for name, t in tensors.items():
        t = t.detach().full_tensor() if isinstance(t, DTensor) else t.detach()
        if rank == 0:
            whole[name] = t.cpu().contiguous()
    if rank > 0:
        return None

    if broken := [name for name, t in whole.items() if not t.isfinite().all()]:
        raise DataError(f"{path}: not written, as {broken[0]} is not finite; lower lr, then --resume from before")
    save_file(whole, path)
    sync(path)
    return data.file_digest(path)


def save_checkpoint(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, state: dict,
                    rank: int = 0) -> None:  # fmt: skip
    """Write weights, Adam's moments and `state`; every rank takes part. Replacing state.json commits them."""
    folder, number = out / "checkpoint", state["position"]["total"]
    weights = data.named_weights(model)
    tensors = {"weights": weights}
    if optimizer:
        moments = [(name, optimizer.state.get(p, {})) for name, p in weights.items()]
        tensors["optimizer"] = {f"{name}/{key}": value for name, own in moments for key, value in own.items()}
    paths = {kind: folder / f"{kind}-{number}.safetensors" for kind in tensors}

    try:
        digests = {kind: write_tensors(path, tensors[kind], rank) for kind, path in paths.items()}
        if rank > 0:
            return
        new = folder / "state.json.new"
        new.write_text(json.dumps({**state, "sha256": digests}, indent=1))
        sync(new)
        os.replace(new, folder / "state.json")

        # only now is the checkpoint before of no use
        sync(folder)
        for stale in {*folder.glob("*.safetensors")} - {*paths.values()}:
            stale.unlink()
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder}: saving failed ({error}); make room, then --resume from the one before") from None


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, run: Path) -> None:
    """Read Adam's moments, spread over the ranks like the parameters they belong to."""
    weights = data.named_weights(model)
    for entry, value in data.read_tensors(run, "optimizer").items():
        name, key = entry.rsplit("/", 1)
        p = weights[name]
        if key != "step":
            value = value.to(p.device)
            value = distribute_tensor(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value
        optimizer.state[p][key] = value


# ---- 6 the run folder ------------------------------------------------------------------------------------------------

RESULTS = ("checkpoint/*", "predictions/*", "log.jsonl", "loss.png", "metrics.json", "report.html")


def open_run(args: argparse.Namespace, rank: int) -> tuple[object, dict | None]:
    """Lock the run folder, prove that it can be written, and read the state to go on from: (lock, state or None)."""
    out, state = args.out, None
    if args.resume:
        state = data.read_state(out)
        for key, now in args.command.items():
            then = state["run"].get(key)
            if then != now:
                raise DataError(f"{out} holds a run with {key} {then!r}, not {now!r}: repeat its command or use --out")
    elif (out / "checkpoint" / "state.json").exists() and not args.overwrite:
        raise DataError(f"{out} holds a run: --resume continues it, --overwrite replaces it, --out DIR keeps it")

    for folder in (out, out / "cache", out / "checkpoint"):
        folder.mkdir(parents=True, exist_ok=True)
    lock = (out / "lock").open("w")
    if rank == 0:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # dies with this process
        except OSError:
            raise DataError(f"{out}: another run is writing there; wait for it, or choose another --out") from None
    return lock, state


def begin_log(out: Path, record: dict, total: int) -> None:
    """Write config.json, and end the log where the checkpoint does: later steps will be done again."""
    if total == 0:
        for pattern in RESULTS:
            for path in out.glob(pattern):
                path.unlink()
    log = out / "log.jsonl"
    if log.exists():
        lines = [line for line in log.read_text().splitlines(True) if line.endswith("\n")]
        log.write_text("".join(line for line in lines if json.loads(line)["total"] <= total))
    (out / "config.json").write_text(json.dumps(record, indent=1))


def draw_loss(out: Path) -> None:
    """Draw loss.png from log.jsonl: loss and accuracy per answer token against steps, a color per stage."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(9, 6), layout="constrained")
    loss, accuracy = figure.subplots(2, 1, sharex=True)
    for axis, key in ((loss, "loss"), (accuracy, "accuracy")):
        for stage, own in itertools.groupby(lines, key=lambda line: line["stage"]):
            points = [(line["total"], line[key]) for line in own if line[key] is not None]
            if points:
                axis.plot(*zip(*points, strict=True), lw=1, label=stage)
    loss.set(ylabel="loss per answer token", yscale="log")
    accuracy.set(ylabel="right answer tokens", xlabel="step", ylim=(0, 1))
    loss.legend()
    figure.savefig(out / "loss.png", dpi=100)


def tensorboard(out: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise DataError("--tensorboard: its package is missing; pip install tensorboard") from None
    return SummaryWriter(out / "tensorboard")


# ---- 7 the run -------------------------------------------------------------------------------------------------------


def load_scenes(args: argparse.Namespace) -> list[list[Scene]]:
    """Read or make the scenes to train in and those to score in."""
    scenes = []
    for split, count in (("train", args.train_scenes), ("test", args.test_scenes)):
        options = data.scene_options(args)
        scenes.append(data.load_scenes(args.data, split, args.root, count, args.workers, **options))
    train, test = map(len, scenes)
    if train == 0 or (test == 0 and not args.no_eval):
        raise DataError(f"--data {args.data}: {train} scenes to train in, {test} to score in; or --no-eval")
    return scenes


def read_official(args: argparse.Namespace, stages: list[Stage], scenes: list[list[Scene]]) -> tuple[dict, dict]:
    """Read the official files that stages name: (questions, what was found), each by stage."""
    listed, found = {}, {}
    named = [stage for stage in stages if stage.files and args.annotations]
    if args.annotations and not named:
        raise DataError(f"--annotations: no stage of {args.model} that runs names official files; leave it out")
    for stage in named:
        folder, root = Path(args.annotations), Path(args.root or args.annotations)
        listed[stage.name], found[stage.name] = evaluate.mixture(stage.files, folder, root, *scenes, args.seed)
    return listed, found


def make_text(config, scenes: list[Scene], listed: dict[str, dict]) -> data.TinyText | data.HubText:
    """Take the pre-trained model's own tokenizer, else one word-level vocabulary of all that may be asked."""
    if config.llm:
        return data.HubText(config.llm)
    words = data.vocabulary({*data.CATEGORIES, *(o.category for s in scenes for o in s.objects)})
    samples = [s for by_scene in listed.values() for own in by_scene.values() for s in own]
    read = data.TinyText.train(text for s in samples for text in (s.question, s.answer))
    return data.TinyText({*words, *read.state()["words"]})


class Trainer:
    """A run. Its position, and a checkpoint of model and optimizer, are all that a resume needs."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, args.out
        self.bad_in_a_row = 0
        self.distributed = Distributed()
        self.rank, self.world, print0 = self.distributed.rank, self.distributed.world, self.distributed.print0
        device = self.distributed.device
        dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
        self.dtype = DTYPES[dtype]
        paper = importlib.import_module(args.model)
        data.adopt(paper)
        config, stages = configure(args, paper)

        # what is wrong with the folder must not show after minutes of work
        self.lock, state = open_run(args, self.rank)
        start = {"stage": 0, "step": 0, "total": 0, "running": 0.0, "skipped": 0, "seconds": 0.0}
        self.position = state["position"] if state else start

        # scenes, and what stages ask about them
        scenes = self.train_scenes, self.test_scenes = load_scenes(args)
        if len(self.train_scenes) == 1:
            notes = [*self.train_scenes[0].notes, "one scene shows that everything works; it cannot show learning"]
            print0("\n".join(f"note: {note}" for note in notes))
        if not any(o.category for scene in self.train_scenes for o in scene.objects):
            print0("the objects have no categories: questions are about color, size and place only")
            stages = ask_without_names(stages, paper)
        self.listed, found = read_official(args, stages, scenes)
        for name, counts in found.items():
            print0(f"stage {name} asks from official files:\n{evaluate.describe_mixture(counts)}")
        sizes = {name: sum(map(len, by_scene.values())) for name, by_scene in self.listed.items()}
        self.stages = [replace(stage, samples=sizes.get(stage.name, stage.samples)) for stage in stages]
        self.steps = stage_steps(self.stages, len(self.train_scenes), args.steps)

        # every rank draws the same first weights
        text = make_text(config, self.train_scenes, self.listed)
        seed_everything(args.seed)
        self.model = model = paper.build(config, text)
        model.keep_trained_precise(self.stages)
        if args.resume or args.init:
            data.load_weights(model, self.out if args.resume else Path(args.init))
        if args.recompute:
            model.gradient_checkpointing_enable()

        # from here on the processes know each other
        self.distributed.join(args.shard)
        print0(f"{self.out}: seed {args.seed}, processes {self.world}, {device.type}, {dtype}")
        if state and state["processes"] != self.world:
            print0(f"note: the run began on {state['processes']} processes; results agree to rounding")
        for stage, steps in zip(self.stages, self.steps, strict=True):
            model.configure_stage(stage)
            print0(f"  {stage.name}: {steps} steps; {memory_line(model, self.world if args.shard else 1)}")
        if args.shard:
            shard_model(model, self.distributed, self.dtype)  # moves to the device block by block
        else:
            model.to(device)

        # all that scoring needs to know of the run
        self.record = {
            **args.command,
            "config": asdict(config),
            "stages": [asdict(stage) for stage in self.stages],
            "text": text.state(),
            "scenes": {"train": [s.name for s in self.train_scenes], "test": [s.name for s in self.test_scenes]},
            "scene_counts": {"train": args.train_scenes, "test": args.test_scenes},
            "scene_options": data.scene_options(args),
            "mixtures": found,
            "dtype": dtype,
            "revision": evaluate.revision(),
            "torch": torch.__version__,
        }
        self.board = None
        if self.rank == 0:
            begin_log(self.out, self.record, self.position["total"])
            self.board = tensorboard(self.out) if args.tensorboard else None

    def train(self) -> None:
        """Train all stages and score the result."""
        started = time.monotonic()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.distributed.on_signal)

        for index in range(self.position["stage"], len(self.stages)):
            self.train_stage(index)
            stage = self.stages[index]
            if stage.score:
                self.score(stage, self.out / f"after {stage.name}", stage.score)
        self.score(self.stages[-1], self.out)

        # a process that ends before the first is done drawing looks like one that failed
        with unsharded(self.model), torch.no_grad():
            if self.rank == 0 and not self.args.no_eval:
                self.model.pictures(self.test_scenes, self.out / "pictures")
                evaluate.write_report(self.out)
        self.distributed.barrier()
        self.distributed.print0(f"{self.out}: done in {(time.monotonic() - started) / 60:.1f} minutes")

    def train_stage(self, index: int) -> None:
        """Train one stage from the position on; at the end the position is the start of the next."""
        args, model, position = self.args, self.model, self.position
        stage, steps = self.stages[index], self.steps[index]
        seed_everything(args.seed, index)
        model.configure_stage(stage)
        model.train()

        # frozen work, once per scene
        with unsharded(model), torch.no_grad():
            model.cache_features(self.train_scenes, self.out / "cache", self.rank, self.world)
        self.distributed.barrier()

        # the optimizer, and what it was when the run stopped
        optimizer = make_optimizer(model, stage)
        if position["step"] > 0:
            load_optimizer(optimizer, model, self.out)
        parallel = self.world > 1 and not args.shard
        net = DistributedDataParallel(model, gradient_as_bucket_view=True) if parallel else model

        # the questions, drawn ahead by loader processes
        what = (model, self.train_scenes, stage, index, args.seed, self.rank, self.world)
        listed = self.listed.get(stage.name)
        dataset = OfficialQuestions(listed, *what) if listed else QuestionDataset(*what)
        todo = range(position["step"], steps)
        name = f"{stage.name} ({index + 1} of {len(self.stages)})"
        bar = tqdm(total=steps, initial=todo.start, desc=name, disable=self.rank > 0, mininterval=2)

        self.distributed.in_step, ended = True, time.monotonic()
        for micro_batches in load_steps(dataset, todo, args.workers):
            # a step seeds all that is random in it, so that a resumed run draws what this one would have drawn
            step, arrived = position["step"], time.monotonic()
            seed_everything(args.seed, index, step, self.rank)
            numbers = compute_gradients(net, micro_batches, stage.clip, self.distributed, self.dtype)
            numbers["lr"] = learning_rate(stage, step, steps)
            tokens, stop = numbers.pop("tokens"), numbers.pop("stop")
            self.update(optimizer, numbers)

            seconds = time.monotonic() - ended
            position["step"] += 1
            position["total"] += 1
            position["seconds"] += seconds
            numbers["speed"], numbers["wait"] = tokens / seconds, (arrived - ended) / seconds
            ended += seconds
            self.log(stage, numbers)
            bar.set_postfix(loss=numbers["loss"], accuracy=position["running"], refresh=False)
            bar.update()

            # the next stage starts with new moments
            last = position["step"] == steps or (stage.until is not None and position["running"] > stage.until)
            due = args.save_every and position["step"] % args.save_every == 0
            if last:
                position |= {"stage": index + 1, "step": 0, "running": 0.0}
                self.save(None)
            elif due or stop:
                self.save(optimizer)
            if stop:
                raise KeyboardInterrupt(self.distributed.signal or signal.SIGTERM)
            if last:
                break
        self.distributed.in_step = False
        bar.close()

    def update(self, optimizer: torch.optim.Optimizer, numbers: dict) -> None:
        """Take the optimizer's step if all is finite, else count it; five skipped in a row end the run."""
        position = self.position
        if math.isfinite(numbers["loss"]) and math.isfinite(numbers["norm"]):
            for group in optimizer.param_groups:
                group["lr"] = numbers["lr"]
            optimizer.step()
            position["running"] += 0.03 * ((numbers["accuracy"] or 0.0) - position["running"])
            self.bad_in_a_row = 0
        else:
            numbers |= {"loss": None, "norm": None}  # JSON knows no NaN
            position["skipped"] += 1
            self.bad_in_a_row += 1
            where = f"stage {self.stages[position['stage']].name}, step {position['step'] + 1}"
            self.distributed.print0(f"{where}: loss or gradient is not finite, skipped")
            if self.bad_in_a_row == 5:
                raise DataError(f"{where}: the fifth step in a row that is not finite; lower the stage's lr or clip")
        optimizer.zero_grad(set_to_none=True)

    def save(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Write a checkpoint and the picture of the loss; every rank takes part."""
        state = {"position": self.position, "run": self.record, "processes": self.world}
        save_checkpoint(self.out, self.model, optimizer, state, self.rank)
        if self.rank == 0:
            draw_loss(self.out)
        self.distributed.barrier()

    def log(self, stage: Stage, numbers: dict) -> None:
        """Append a line to log.jsonl (names: see the top of this file), and to TensorBoard where asked."""
        if self.rank > 0:
            return
        cuda = self.distributed.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        line = {**self.position, **numbers, "memory": memory, "stage": stage.name}
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        for key in ("loss", "accuracy", "lr", "norm", "speed"):
            if self.board and line[key] is not None:
                self.board.add_scalar(key, line[key], line["total"])

    def score(self, stage: Stage, out: Path, names: Iterable[str] = ()) -> None:
        """Score the model, as that stage sees, in scenes that it never saw; every rank takes part."""
        if self.args.no_eval:
            return
        with unsharded(self.model), torch.no_grad():
            evaluate.evaluate_scenes(self.model, self.test_scenes, stage, out, record=self.record, names=names,
                                     blind_scenes=self.train_scenes[:300])  # fmt: skip


LOST = {  # what PyTorch says when another process is gone -> what the user should know
    "DataLoader worker": "a loader process died, likely for want of memory: --resume with fewer --workers",
    "gloo": "another process of this run ended; --resume goes on",
    "NCCL": "another process of this run ended; --resume goes on",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command: status 0, 2 and one line for what the user can mend, 128 + n after signal n."""
    args = parse_args(argv)
    status, message = 0, ""
    try:
        Trainer(args).train()
    except KeyboardInterrupt as stopped:
        status = 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
        message = "stopped; the same command with --resume goes on from the last checkpoint"
    except (DataError, OSError) as error:
        # a loader process puts its traceback in front: the last line is the message
        status, message = 2, str(error).strip().splitlines()[-1].removeprefix("data.DataError: ")
    except RuntimeError as error:
        lost = [line for sign, line in LOST.items() if sign in str(error)]
        if not lost:
            raise
        status, message = 1, lost[0]

    # before the processes meet, what is wrong is wrong on all of them
    first = int(os.environ.get("RANK", 0)) == 0
    if message and (first or (dist.is_initialized() and status < 128)):
        print(f"train.py: {message}", file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
