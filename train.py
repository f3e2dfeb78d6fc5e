"""Train one of the papers: one trainer that knows none of them, and gives the same numbers on any number of processes.

    torchrun train.py --model proxy3d                        # rooms, tiny preset; a CPU is enough
    torchrun --nproc_per_node 8 train.py --model proxy3d --data scannet --root DIR --preset paper --shard
    torchrun train.py ... --data scannet --root DIR --annotations FILES     # official questions in place of generated
    torchrun train.py ... --resume                           # goes on exactly where the run stopped; python works too

A paper module offers `Config` (with the presets as class methods), `STAGES`, `TASKS` and `Model(config, text)`:
  begin(stage)      what trains and what is seen; all that it leaves trainable takes part in every forward of the stage
  prepare(scenes, cache, rank, world, progress)    frozen work, once per scene: a rank leaves its share in the folder
                    `cache`, where `batch` finds everyone's (it must not run the model: weights may be sharded by then)
  batch(groups)     groups = [(scene, samples)]; CPU only, as loader processes call it; what is random in it follows
                    from the scene's own draw (`scene.identifiers`)
  forward(batch)    {"loss": sum over its terms, "weight": how many terms; optional "correct", "count": right answer
                    tokens of how many, "tokens": seen, for the speed}
  optional: borrowed (names of frozen weights that Config loads from elsewhere: no checkpoint holds them),
  _no_split_modules (names of blocks, for --shard), gradient_checkpointing_enable() (for --recompute); of the module:
  for scenes without categories, GEOMETRY_TASKS (those of its TASKS that need none) and UNLABELLED (what stands in)

A step is a pure function of (seed, stage, step): which scenes, how they are turned, what is asked. Each process takes
every world-th scene of that list; losses are summed, then divided by the *global* number of terms, so neither the
number of processes nor accumulation changes the result. Random states need no saving: a step seeds them from its
position. The learning rate belongs to the global batch and is never rescaled.

A run folder holds config.json, log.jsonl, loss.png, cache/ and checkpoint/; metrics.json, predictions/ and report.html
once it is scored. state.json commits a checkpoint: it names the weight files and is replaced in one stroke once they
are on disk; a kill at any instant leaves the old or the new.

log.jsonl, a line per step, numbers over all processes:
  stage, step, total  stage, steps done in it, steps done in all    loss         mean per term (answer token)
  accuracy, running   right answer tokens: now, moving average      terms        answer tokens (terms of the loss)
  questions           asked (scenes in an encoder stage)            lr, norm     learning rate; gradient before clipping
  speed               tokens per second                             wait         share of the step waiting for data
  memory              peak GB of the first GPU, null on a CPU       skipped      steps not finite so far
  seconds             of training so far, before a resume too
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import importlib
import importlib.util
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import types
import typing
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

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

import data
import evaluate
from data import DataError, Scene, Stage, load_weights, named_weights, read_state, read_tensors

MODELS = [m for m in ("proxy3d", "fase3d", "spatial3dllm") if importlib.util.find_spec(m)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SCHEDULES = {  # share of the way from final_lr up to lr, at progress 0..1 after the warm-up
    "constant": lambda p: 1.0,
    "linear": lambda p: 1 - p,
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    "trapezoid": lambda p: min(1.0, 4 * (1 - p)),  # flat, then linear over the last quarter
}

# ---- 1 command line --------------------------------------------------------------------------------------------------

FLAGS = {
    "model": dict(required=True, help=f"paper: {', '.join(MODELS)}"),
    "data": dict(default="rooms", help="source of scenes: rooms, scannet, rgbd, cached"),
    "root": dict(help="folder of the scenes (not for rooms)"),
    "annotations": dict(help="folder of official files: stages that name such sources ask from them"),
    "preset": dict(default="tiny", help="tiny: from nothing, on a CPU; paper: the paper's numbers"),
    "llm": dict(help="name or folder of a pre-trained language model"),
    "steps": dict(type=int, help="scale the stages to this many steps in all"),
    "seed": dict(type=int, default=0),
    "set": dict(nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="a Config field, or STAGE.FIELD"),
    "stages": dict(help="run only these, comma-separated"),
    "init": dict(help="folder of another run of this model, whose weights to start from"),
    "train-scenes": dict(type=int, default=800, help="rooms to train in"),
    "test-scenes": dict(type=int, default=150, help="rooms to score in, never trained in"),
    # the flags above make the run what it is: --resume must repeat them
    "out": dict(type=Path, help="run folder (default runs/<model>)"),
    "resume": dict(action="store_true", help="go on from the run folder's checkpoint"),
    "overwrite": dict(action="store_true", help="replace the run in the run folder"),
    "save-every": dict(type=int, default=500, help="steps between checkpoints, besides those at a stage's end"),
    "shard": dict(action="store_true", help="FSDP2: spread weights, gradients and Adam over the processes"),
    "recompute": dict(action="store_true", help="gradient checkpointing: less memory, more time"),
    "dtype": dict(choices=list(DTYPES), help="of the arithmetic (default bfloat16 on a GPU, float32 on a CPU)"),
    "workers": dict(type=int, help="loader processes (default: cores to spare, at most 4)"),
    "tensorboard": dict(action="store_true"),
    "no-eval": dict(action="store_true", help="train only"),
}
SAME = [name.replace("-", "_") for name in list(FLAGS)[: list(FLAGS).index("test-scenes") + 1]]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = data.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, about in FLAGS.items():
        p.add_argument(f"--{name}", **about)
    args, unknown = argparse.ArgumentParser.parse_known_args(p, argv)
    if unknown:  # named with the nearest, as all that a run chooses by name
        pick(unknown[0], [f"--{name}" for name in FLAGS], "argument")
    args.out = args.out or Path("runs") / args.model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if args.workers is None:
        args.workers = max(0, min(4, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
    return args


def pick(name: str, known: typing.Iterable[str], what: str) -> str:
    """`name` if it is known, else a DataError that names the known ones and the nearest."""
    known = list(known)
    if name in known:
        return name
    near = "".join(f", did you mean {n}?" for n in difflib.get_close_matches(name, known, 1))
    raise DataError(f"unknown {what} {name}{near or ';'} known: {', '.join(known)}")


def typed(key: str, text: str, hint) -> object:
    """The text as a value of a field's type: int, float, bool, str, a tuple of one of them (16,21), None if allowed."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        other = next(a for a in args if a is not type(None))
        return None if text.lower() == "none" else typed(key, text, other)
    if typing.get_origin(hint) is tuple:
        return tuple(typed(key, part.strip(), args[0]) for part in text.strip("()").split(","))
    read = {bool: {"true": True, "false": False}.__getitem__, int: int, float: float, str: str}
    try:
        return read[hint](text)
    except (KeyError, ValueError):
        raise DataError(f"--set {key}={text}: expected {getattr(hint, '__name__', hint)}, got {text!r}") from None


def changed(target, changes: dict[str, str], what: str):
    """A copy of a dataclass with fields set from text."""
    hints = typing.get_type_hints(type(target))
    return replace(target, **{k: typed(k, v, hints[pick(k, hints, what)]) for k, v in changes.items()})


def configure(args: argparse.Namespace, paper) -> tuple[object, list[Stage]]:
    """The paper's preset with --llm, --set and --stages applied: (Config, stages)."""
    preset = pick(args.preset, paper.STAGES, "preset")
    stages = {s.name: s for s in paper.STAGES[preset]}
    changes = {"llm": args.llm} if args.llm else {}
    for item in args.set:
        key, equals, value = item.partition("=")
        if not equals:
            raise DataError(f"--set {item}: write KEY=VALUE")
        name, dot, field = key.rpartition(".")
        if dot:
            stages[name] = changed(stages[pick(name, stages, "stage")], {field: value}, f"field of stage {name}")
        else:
            changes[key] = value
    config = changed(getattr(paper.Config, preset)(), changes, f"key of {args.model}'s Config")
    if hasattr(paper, "recipe"):  # a setting may add or drop stages
        stages = {s.name: s for s in paper.recipe(config, list(stages.values()))}
    names = args.stages.split(",") if args.stages else stages
    return config, [stages[pick(n.strip(), stages, "stage")] for n in names]


def stage_steps(stages: list[Stage], scenes: int, total: int | None = None) -> list[int]:
    """Optimizer steps of every stage; with `total` scaled so that they sum to it, at least one each."""
    steps = []
    for s in stages:
        if (s.iterations is None) == (s.epochs is None):
            raise DataError(f"stage {s.name}: give either iterations or epochs")
        pick(s.schedule, SCHEDULES, f"schedule of stage {s.name}")
        samples = s.samples or scenes * (s.per_scene if s.tasks else 1)
        steps.append(s.iterations or math.ceil(s.epochs * samples / s.batch))
    if total is None:
        return steps
    if total < len(steps):
        raise DataError(f"--steps {total}: each of the {len(steps)} stages needs a step; give at least {len(steps)}")
    ends = np.cumsum([0, *steps]) / sum(steps) * (total - len(steps))
    return [int(n) + 1 for n in np.diff(np.round(ends))]


# ---- 2 processes, seeds, devices -------------------------------------------------------------------------------------


@dataclass
class Ranks:
    """This process among its fellows."""

    rank: int
    world: int
    device: torch.device

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def start_processes(shard: bool = False) -> Ranks:
    """Join the processes that torchrun announces in the environment; alone without them."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    if (world > 1 or shard) and not dist.is_initialized():
        alone = {} if world > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2), **alone)
    return Ranks(rank, world, torch.device("cuda", local) if cuda else torch.device("cpu"))


def seed_everything(*numbers: int) -> None:
    """Python, numpy and torch on every device, from whole numbers >= 0."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (libraries draw from it)
    torch.manual_seed(seed)


def wrap(model: nn.Module, ranks: Ranks, dtype: torch.dtype, shard: bool) -> nn.Module:
    """DDP around the model, or the model itself sharded in place: block by block, then what is left."""
    if shard and not isinstance(model, FSDPModule):
        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        low = None if dtype == torch.float32 else dtype
        policy = MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False)  # metres stay float32
        names = {n for m in model.modules() for n in getattr(m, "_no_split_modules", None) or ()}
        for module in [*(m for m in model.modules() if type(m).__name__ in names), model]:
            fully_shard(module, mesh=mesh, mp_policy=policy)
        for method in {"cache_features", "generate"} & set(dir(model)):
            register_fsdp_forward_method(model, method)
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if ranks.world > 1 and not shard else model


@contextlib.contextmanager
def gathered(model: nn.Module):
    """Whole weights on every rank, so that ranks may run different numbers of forwards: frozen work, generation. Inside
    another `gathered` it does nothing: the outer one would find its weights sharded again."""
    sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]
    if not sharded or getattr(model, "is_gathered", False):
        yield
        return
    model.is_gathered = True
    for m in sharded:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    yield
    for m in sharded:
        m.reshard()
        m.set_reshard_after_forward(m is not model, recurse=False)
    model.is_gathered = False


def keep_precise(model: nn.Module, stages: list[Stage]) -> None:
    """Whatever trains in some stage becomes float32: steps of 5e-6 would vanish in bfloat16."""
    for stage in stages:
        model.configure_stage(stage)
        for p in model.parameters():
            p.data = p.data.float() if p.requires_grad else p.data


def memory_line(model: nn.Module, shards: int) -> str:
    """What trains, and what a device must hold before activations: weights, gradients, Adam's two moments."""
    count = lambda ts: sum(t.numel() for t in ts) / 1e6  # noqa: E731
    size = lambda ts: sum(t.numel() * t.element_size() for t in ts) / shards / 2**20  # noqa: E731
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = [size([*model.parameters(), *model.buffers()]), size(trained), 2 * size(trained)]
    return (f"{count(trained):.2f} of {count(model.parameters()):.2f} M parameters train; {sum(parts):,.1f} MB per "
            "device before activations ({:,.1f} weights, {:,.1f} gradients, {:,.1f} Adam)".format(*parts))  # fmt: skip


# ---- 3 scenes, and what a step asks about them -----------------------------------------------------------------------


def askable(stages: list[Stage], scenes: list[Scene], paper, say: typing.Callable) -> list[Stage]:
    """The stages as they are; on scenes without categories, with geometry and colour in place of names."""
    if any(o.category for s in scenes for o in s.objects):
        return stages
    say("the objects have no categories: questions are about colour, size and place only, also in the first stage")
    swaps = getattr(paper, "UNLABELLED", data.UNLABELLED)
    kept = {*data.GEOMETRY_TASKS, *getattr(paper, "GEOMETRY_TASKS", ()), *swaps, "subtract", "norm"}
    out = []
    for stage in stages:
        mix = {t: w for t, w in stage.tasks.items() if t in kept}
        rest = sum(stage.tasks.values()) - sum(mix.values())
        mix |= {t: mix.get(t, 0.0) + rest / len(swaps) for t in swaps if rest > 0}
        out.append(replace(stage, tasks=mix))
    return out


@lru_cache(maxsize=8)
def scene_order(count: int, seed: int, index: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([0, seed, index, epoch]).permutation(count)


def plan(stage: Stage, index: int, step: int, scenes: int, seed: int) -> list[tuple[int, int]]:
    """(scene, number of questions) for every slot of a step; the scenes come in a new order each epoch."""
    full, rest = divmod(stage.batch, stage.per_scene if stage.tasks else 1)
    asked = [stage.per_scene if stage.tasks else 0] * full + [rest] * (rest > 0)
    places = [divmod(step * len(asked) + i, scenes) for i in range(len(asked))]
    return [(int(scene_order(scenes, seed, index, e)[i]), n) for (e, i), n in zip(places, asked, strict=True)]


def shuffled(listed: dict[str, list], names: list[str], per_scene: int, seed: int, index: int,
             epoch: int) -> list[tuple[int, data.Sample]]:  # fmt: skip
    """An epoch over listed questions, as (scene, question): every one once, `per_scene` of a scene in a row, so that a
    batch holds few scenes."""
    rng = np.random.default_rng([2, seed, index, epoch])
    runs = []
    for which, name in enumerate(names):
        own = listed.get(name, [])
        order = rng.permutation(len(own)).tolist()
        runs += [[(which, own[i]) for i in order[k : k + per_scene]] for k in range(0, len(own), per_scene)]
    return [pair for r in rng.permutation(len(runs)).tolist() for pair in runs[r]]


HELD = ("frames", "colours", "superpoints", "instances")  # arrays that turning a scene leaves as they are


@dataclass
class Draws(torch.utils.data.Dataset):
    """Micro-batch i of a stage for one rank: {"batch", "questions", "share"}. A rank without questions of its own
    repeats a scene with share 0, so that every rank runs every module and no collective waits for it."""

    model: nn.Module
    scenes: list[Scene]
    stage: Stage
    index: int
    seed: int
    rank: int = 0
    world: int = 1
    listed: dict[str, list] | None = None  # questions by scene to be asked in place of generated ones
    epoch: tuple = (None, None)  # the one in use: (its number, its questions in order)

    def plan(self, step: int) -> list[tuple[int, typing.Any]]:
        """(scene, how many questions are to be drawn, or the questions themselves) for every slot of a step."""
        stage = self.stage
        if self.listed is None:
            return plan(stage, self.index, step, len(self.scenes), self.seed)
        size, asked = sum(map(len, self.listed.values())), []
        for place in range(step * stage.batch, (step + 1) * stage.batch):
            epoch, i = divmod(place, size)
            if self.epoch[0] != epoch:
                names = [s.name for s in self.scenes]
                self.epoch = epoch, shuffled(self.listed, names, stage.per_scene, self.seed, self.index, epoch)
            asked.append(self.epoch[1][i])
        return [(which, [s for _, s in pairs]) for which, pairs in itertools.groupby(asked, key=lambda pair: pair[0])]

    def ask(self, step: int, slots: typing.Iterable[int] | None = None) -> list[tuple[Scene, list]]:
        """The scenes of some slots (default: all) of a step, turned and numbered anew, with their questions."""
        stage, groups = self.stage, []
        for slot, (which, count) in enumerate(self.plan(step)):
            if slots is not None and slot not in slots:
                continue
            rng = np.random.default_rng([1, self.seed, self.index, step, slot])
            if self.listed is not None:
                groups.append((data.augment(self.scenes[which], rng, mirror=False), count))
                continue
            for base in self.scenes[which:] + self.scenes[:which]:
                scene = data.augment(base, rng, stage.recolour)
                samples = data.questions(scene, stage.tasks, count, rng) if stage.tasks else []
                if samples or not stage.tasks:  # else: a scene that allows no question gives way to the next
                    break
            else:
                raise DataError(f"stage {stage.name}: no scene allows any question of {', '.join(stage.tasks)}")
            groups.append((scene, samples))
        return groups

    def __getitem__(self, i: int) -> dict:
        step, part = divmod(i, self.stage.accumulate)
        own = self.ask(step, range(self.rank + self.world * part, 10**9, self.world * self.stage.accumulate))
        batch = self.model.batch(own or self.ask(step, [0]))
        batch.pop("samples", None)  # for scoring only
        if torch.utils.data.get_worker_info():  # scenes travel without the arrays that the trainer holds anyway
            batch["scenes"] = [replace(s, **dict.fromkeys(HELD)) for s in batch.get("scenes", [])]
        asked = sum(len(samples) if self.stage.tasks else 1 for _, samples in own)
        return {"batch": batch, "share": float(bool(own)), "questions": asked}


def die_with_parent(worker: int) -> None:
    """A killed trainer would otherwise leave its loader processes behind, with its memory and its port."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG


def load(draws: Draws, steps: range, workers: int, device: torch.device) -> typing.Iterator[list[dict]]:
    """The micro-batches of each step, on the device, drawn ahead by loader processes."""
    base, n, parts = {s.name: s for s in draws.scenes}, draws.stage.accumulate, []
    how = {"sampler": range(steps.start * n, steps.stop * n), "num_workers": workers, "collate_fn": lambda draw: draw}
    if workers and sys.platform == "linux":  # forked, they have the model and its caches for nothing
        how |= {"multiprocessing_context": "fork", "worker_init_fn": die_with_parent}
    loader = torch.utils.data.DataLoader(draws, batch_size=None, **how)
    for draw in loader:
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in draw["batch"].items()}
        batch["scenes"] = [replace(s, **{k: getattr(base[s.name], k) for k in HELD}) for s in batch.get("scenes", [])]
        parts.append({**draw, "batch": batch})
        if len(parts) == n:
            yield parts
            parts = []


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
    groups = [{"params": [p for p in trained if (p.ndim > 1) == matrix], "weight_decay": stage.weight_decay * matrix}
              for matrix in (True, False)]  # fmt: skip
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=stage.lr, betas=stage.betas)


def gradients(net: nn.Module, draws: list[dict], clip: float, ranks: Ranks, dtype: torch.dtype) -> dict:
    """Leave in the parameters the gradient of the loss per term, over all ranks and micro-batches; return numbers.

    Raw sums go backward; DDP and FSDP average them over ranks, so world / (global number of terms) is what is missing.
    """
    totals = torch.zeros(6, dtype=torch.float64, device=ranks.device)
    for i, draw in enumerate(draws):
        if isinstance(net, DistributedDataParallel):
            net.require_backward_grad_sync = i == len(draws) - 1
        with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
            out = net(draw["batch"])
        (out["loss"] * draw["share"]).backward()
        count = out.get("count", out["weight"] if "correct" in out else 0)
        numbers = (out["loss"].detach(), out["weight"], out.get("correct", 0), count, draw["questions"],
                   out.get("tokens", out["weight"]))  # fmt: skip
        numbers = [torch.as_tensor(n, dtype=torch.float64, device=ranks.device) for n in numbers]
        totals += draw["share"] * torch.stack(numbers)
    if ranks.world > 1:
        dist.all_reduce(totals)
    loss, terms, correct, count, questions, tokens = totals.tolist()
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
    if idle := [n for n, p in trained.items() if p.grad is None]:
        raise ValueError(f"{len(idle)} trainable parameters have no part in the loss, such as {idle[0]}: begin(stage) "
                         "must freeze what a stage does not use, forward must use the rest in every batch")  # fmt: skip
    for p in trained.values():
        p.grad.mul_(ranks.world / terms if terms else math.nan)
    norm = nn.utils.clip_grad_norm_(trained.values(), clip or math.inf)
    return {"loss": loss / terms if terms else math.nan, "accuracy": correct / count if count else None, "terms": terms,
            "norm": float(norm.full_tensor() if isinstance(norm, DTensor) else norm), "questions": questions,
            "tokens": tokens}  # fmt: skip


# ---- 5 checkpoints ---------------------------------------------------------------------------------------------------


def write_tensors(tensors: dict[str, Tensor], path: Path, rank: int) -> None:
    """Whole tensors to a safetensors file, on disk when this returns; every rank must call it, the first writes."""
    whole = {}
    for name, t in tensors.items():
        t = t.detach().full_tensor() if isinstance(t, DTensor) else t.detach()
        if rank == 0:
            whole[name] = t.cpu().contiguous()
    if rank == 0:
        save_file(whole, path)
        sync(path)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def save(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, state: dict, rank: int = 0) -> None:
    """Write a checkpoint: weights, Adam's moments, and `state`. Replacing state.json is what commits it."""
    folder = out / "checkpoint"
    weights = named_weights(model)
    moments = {f"{key}/{name}": value for name, p in weights.items() if optimizer and p in optimizer.state
               for key, value in optimizer.state[p].items()}  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = read_state(out)["number"] + 1 if (folder / "state.json").exists() else 1
        tensors = {"weights": weights} | ({"optimizer": moments} if moments else {})
        files = {kind: f"{kind}-{number}.safetensors" for kind in tensors}
        for kind, file in files.items():
            write_tensors(tensors[kind], folder / file, rank)
        if rank == 0:
            new = folder / "state.json.new"
            new.write_text(json.dumps({"number": number, "files": files, **state}, indent=1))
            sync(new)
            os.replace(new, folder / "state.json")
            sync(folder)
            for stale in {p.name for p in folder.iterdir()} - {"state.json", *files.values()}:
                (folder / stale).unlink()
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder}: saving failed ({error}); the checkpoint before is whole: make room, then --resume"
                        ) from None  # fmt: skip


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, run: Path) -> None:
    """Adam's moments, spread over the ranks like the parameters they belong to."""
    saved = read_tensors(run, "optimizer")
    names = {id(p): name for name, p in named_weights(model).items()}
    state = {}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        own = {key: saved[f"{key}/{names[id(p)]}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        if isinstance(p, DTensor):
            own |= {k: distribute_tensor(t, p.device_mesh, p.placements) for k, t in own.items() if k != "step"}
        state[i] = own
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


# ---- 6 run folder, log, progress and picture -------------------------------------------------------------------------


def check_run(args: argparse.Namespace) -> dict | None:
    """Refuse to mix this command with what the run folder holds; the position to go on from, if any."""
    out, held = args.out, (args.out / "checkpoint" / "state.json").exists()
    state = read_state(out) if args.resume or held else None
    for key in SAME if args.resume else ():
        then, now = state["run"].get(key), getattr(args, key)
        if then != now:
            raise DataError(f"{out} holds a run with {key} {then!r}, not {now!r}: repeat the command that began it, or "
                            "choose another --out")  # fmt: skip
    if held and not args.resume and not args.overwrite:
        raise DataError("{} holds a run of {model} (preset {preset}, seed {seed}): --resume continues it, --overwrite "
                        "replaces it, --out DIR keeps it".format(out, **state["run"]))  # fmt: skip
    return state["position"] if args.resume else None


def open_run(out: Path, record: dict, position: dict | None) -> None:
    """An empty run folder, or one whose log ends where the checkpoint does."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.jsonl"
    if position is None:
        for name in ("checkpoint", "predictions", "pictures"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in ("log.jsonl", "nonfinite.jsonl", "loss.png", "metrics.json", "report.html"):
            (out / name).unlink(missing_ok=True)
        for path in evaluate.side_scores(out):
            path.unlink()
    elif log.exists():  # steps after the checkpoint will be done again
        lines = [x for x in log.read_text().splitlines(True) if x.endswith("\n")]
        log.write_text("".join(x for x in lines if json.loads(x)["total"] <= position["total"]))
    (out / "config.json").write_text(json.dumps(record, indent=1))


def append(path: Path, line: dict) -> None:
    with path.open("a") as f:
        f.write(json.dumps(line) + "\n")


def draw_loss(out: Path) -> None:
    """loss.png from log.jsonl: loss and accuracy per answer token against steps, a colour per stage."""
    from matplotlib.figure import Figure

    lines = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for stage in dict.fromkeys(x["stage"] for x in lines):
        own = [x for x in lines if x["stage"] == stage]
        for axis, key in zip(axes, ("loss", "accuracy"), strict=True):
            heights = [math.nan if x[key] is None else x[key] for x in own]
            axis.plot([x["total"] for x in own], heights, lw=1, label=stage)
    axes[0].set(ylabel="loss per answer token", yscale="log")
    axes[1].set(ylabel="right answer tokens", xlabel="step", ylim=(0, 1))
    axes[0].legend()
    figure.savefig(out / "loss.png", dpi=100)


def bar(text: str, done: int, total: int, ranks: Ranks) -> None:
    """Progress: one changing line on a terminal; elsewhere a line every 5 %."""
    if ranks.rank == 0 and sys.stdout.isatty():
        print(f"\r{text}\033[K", end="\n" * (done == total), flush=True)
    elif done == total or done * 20 // total > (done - 1) * 20 // total:
        ranks.say(text)


def progress(ranks: Ranks):
    """What `prepare` reports with: progress(items, what) gives the items back."""

    def iterate(items, what: str):
        for i, item in enumerate(items, start=1):
            yield item
            bar(f"{what} {i}/{len(items)}", i, len(items), ranks)

    return iterate


def tensorboard(out: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise DataError("--tensorboard: its package is missing; pip install tensorboard") from None
    return SummaryWriter(out / "tensorboard")


# ---- 7 the run -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What stays the same from the first step to the last."""

    args: argparse.Namespace
    ranks: Ranks
    model: nn.Module
    text: data.TinyText | data.HubText
    train: list[Scene]
    test: list[Scene]
    stages: list[Stage]
    steps: list[int]
    record: dict  # config.json
    dtype: torch.dtype
    listed: dict[str, dict]  # stage -> scene -> questions of official files
    board: object = None  # TensorBoard's writer

    def save(self, position: dict, optimizer: torch.optim.Optimizer | None = None) -> None:
        state = {"position": position, "run": self.record, "processes": self.ranks.world}
        save(self.args.out, self.model, optimizer, state, self.ranks.rank)
        if self.ranks.rank == 0 and (self.args.out / "log.jsonl").exists():
            draw_loss(self.args.out)
        self.ranks.barrier()

    def prepare(self, scenes: list[Scene]) -> None:
        with gathered(self.model), torch.no_grad():
            self.model.cache_features(scenes, self.args.out / "cache", self.ranks.rank, self.ranks.world)
        self.ranks.barrier()


def train_stage(run: Run, index: int, position: dict) -> None:
    """One stage from position["step"] on; the position moves along, at the end to the start of the next stage."""
    args, ranks, stage, steps = run.args, run.ranks, run.stages[index], run.steps[index]
    seed_everything(args.seed, index)
    run.model.configure_stage(stage)
    run.model.train()
    run.prepare(run.train)
    net, optimizer = wrap(run.model, ranks, run.dtype, args.shard), make_optimizer(run.model, stage)
    if position["adam"]:
        load_optimizer(optimizer, run.model, args.out)
    ranks.say(f"stage {stage.name} ({index + 1} of {len(run.stages)}): {steps} steps of {stage.batch}")
    draws = Draws(run.model, run.train, stage, index, args.seed, ranks.rank, ranks.world, run.listed.get(stage.name))
    first, before, began, tokens = position["step"], position["seconds"], time.monotonic(), 0.0
    ended = began
    for parts in load(draws, range(first, steps), args.workers, ranks.device):
        step, arrived = position["step"], time.monotonic()
        seed_everything(args.seed, index, step, ranks.rank)
        numbers = gradients(net, parts, stage.clip, ranks, run.dtype)
        numbers["lr"] = learning_rate(stage, step, steps)
        update(optimizer, numbers, position, run, draws)
        now = time.monotonic()
        numbers |= {"speed": numbers["tokens"] / (now - ended), "wait": (arrived - ended) / (now - ended)}
        position.update(step=step + 1, total=position["total"] + 1, seconds=before + now - began)
        ended, tokens, pace = now, tokens + numbers["tokens"], (now - began) / (step + 1 - first)
        report(run, stage, position, numbers)
        bar(f"{stage.name} {step + 1}/{steps}  loss {numbers['loss']:.4f}  accuracy {position['running']:.3f}  "
            f"{tokens / (now - began):,.0f} tok/s  {timedelta(seconds=round(pace * (steps - step - 1)))} left",
            step + 1, steps, ranks)  # fmt: skip
        if stage.until is not None and position["running"] > stage.until:
            ranks.say(f"\nstage {stage.name}: left after {step + 1} steps, running accuracy above {stage.until}")
            break
        if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < steps:
            run.save({**position, "adam": bool(optimizer.state)}, optimizer)
    position.update(stage=index + 1, step=0, running=0.0, adam=False)
    run.save(position)
    possible = {t for scene in run.test for t in data.TASKS if not data.refusal(scene, t)}  # metres need a scale
    scored = tuple(name for name in stage.score if possible & set(evaluate.BENCHMARKS[name].tasks))
    if scored and not args.no_eval:
        ranks.say(f"after stage {stage.name}:")
        evaluate_run(run, stage, scored, args.out / f"after {stage.name}")


def update(optimizer: torch.optim.Optimizer, numbers: dict, position: dict, run: Run, draws: Draws) -> None:
    """The optimizer's step, if all is finite; else count it and note what was asked. Five in a row end the run."""
    if math.isfinite(numbers["loss"]) and math.isfinite(numbers["norm"]):
        for group in optimizer.param_groups:
            group["lr"] = numbers["lr"]
        optimizer.step()
        position["in_a_row"] = 0
        position["running"] += 0.03 * ((numbers["accuracy"] or 0.0) - position["running"])
    else:
        position.update(skipped=position["skipped"] + 1, in_a_row=position["in_a_row"] + 1)
        where = f"stage {draws.stage.name}, step {position['step'] + 1}"
        if run.ranks.rank == 0:
            asked = [[scene.name, *(q.question for q in samples)] for scene, samples in draws.ask(position["step"])]
            append(run.args.out / "nonfinite.jsonl", {"where": where, "scenes and questions": asked})
        run.ranks.say(f"\n{where}: loss or gradient is not finite, skipped ({position['skipped']} so far)")
        if position["in_a_row"] == 5:
            raise DataError(f"{where}: the fifth step in a row that is not finite; {run.args.out}/nonfinite.jsonl has "
                            "their questions; lower the stage's lr or clip, or use --dtype float32")  # fmt: skip
    optimizer.zero_grad(set_to_none=True)


def report(run: Run, stage: Stage, position: dict, numbers: dict) -> None:
    """One line of log.jsonl (names: see the top of this file), and TensorBoard where asked."""
    if run.ranks.rank:
        return
    peak = torch.cuda.max_memory_allocated() / 2**30 if run.ranks.device.type == "cuda" else None
    line = {k: v for k, v in {**position, **numbers, "memory": peak}.items() if k not in ("adam", "in_a_row", "tokens")}
    brief = lambda v: float(f"{v:.9g}") if math.isfinite(v) else None  # noqa: E731 (JSON knows no NaN)
    line = {k: brief(v) if isinstance(v, float) else v for k, v in line.items()} | {"stage": stage.name}
    append(run.args.out / "log.jsonl", line)
    for key in ("loss", "accuracy", "lr", "norm", "speed") if run.board else ():
        if line[key] is not None:
            run.board.add_scalar(key, line[key], line["total"])


def make_text(config, scenes: list[Scene], listed: dict[str, dict]) -> data.TinyText | data.HubText:
    """The pre-trained model's own tokenizer, else one word-level vocabulary of all questions about such scenes."""
    if getattr(config, "llm", None):
        return data.HubText(config.llm)
    words = data.vocabulary({*data.CATEGORIES, *(o.category for s in scenes for o in s.objects)})
    samples = (s for by_scene in listed.values() for own in by_scene.values() for s in own)
    read = data.TinyText.train(t for s in samples for t in (s.question, s.answer))
    return data.TinyText({*words, *read.state()["words"]})


def read_listed(args: argparse.Namespace, stages: list[Stage], train: list[Scene],
                test: list[Scene]) -> tuple[dict[str, dict], dict[str, list]]:  # fmt: skip
    """(questions of official files, counts per source), both by stage, for the stages that name sources."""
    named = [s for s in stages if s.files]
    if args.annotations and not named:
        raise DataError(f"--annotations: no stage of {args.model} that runs names official files; leave it out")
    folder, root = Path(args.annotations or ""), Path(args.root or args.annotations or "")
    found = {s.name: evaluate.mixture(s.files, folder, root, train, test, args.seed)
             for s in named if args.annotations}  # fmt: skip
    return {name: listed for name, (listed, _) in found.items()}, {name: report for name, (_, report) in found.items()}


def build(args: argparse.Namespace, ranks: Ranks, paper=None, scenes: tuple | None = None,
          text: dict | None = None) -> Run:  # fmt: skip
    """Scenes, tokenizer and a fresh model for a command. `paper`, `scenes` (train, test) and `text` (a tokenizer's
    state) replace what the command names."""
    paper = paper or importlib.import_module(pick(args.model, MODELS, "model"))
    data.adopt(paper)
    config, stages = configure(args, paper)
    if scenes is None:
        pick(args.data, data.SOURCES, "source of data")
        counts = {"train": args.train_scenes, "test": args.test_scenes}
        scenes = tuple(data.load_scenes(args.data, s, args.root, n, args.workers) for s, n in counts.items())
        if not scenes[0] or not (scenes[1] or args.no_eval):
            counts = "{} scenes to train in, {} to score in".format(*map(len, scenes))
            raise DataError(f"--data {args.data}: {counts}; give one of each at least (--train-scenes, --test-scenes, "
                            "scans of both splits), or --no-eval")  # fmt: skip
    train, test = scenes
    for note in dict.fromkeys(n for s in (*train, *test) for n in s.notes) if len(train) == 1 else ():
        ranks.say(f"note: {note}")
    if len(train) == 1:
        ranks.say("note: one scene shows that everything works; it cannot show learning")
    stages = askable(stages, train, paper, ranks.say)
    listed, reports = read_listed(args, stages, train, test)
    for name, report in reports.items():
        ranks.say(f"stage {name} asks from official files:\n{evaluate.describe_mixture(report)}")
    sizes = {name: sum(map(len, by_scene.values())) for name, by_scene in listed.items()}
    stages = [replace(s, samples=sizes.get(s.name, s.samples)) for s in stages]
    steps = stage_steps(stages, len(train), args.steps)
    text = data.load_text(text) if text else make_text(config, train, listed)
    seed_everything(args.seed)
    model = paper.Model(config, text)
    record = {**{k: getattr(args, k) for k in SAME}, "config": asdict(config), "text": text.state(),
              "scenes": {"train": [s.name for s in train], "test": [s.name for s in test]}, "mixtures": reports,
              "revision": evaluate.revision(), "torch": torch.__version__}  # fmt: skip
    dtype = DTYPES[args.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32")]
    return Run(args, ranks, model, text, train, test, stages, steps, record, dtype, listed)


def load_run(folder: Path, paper=None, scenes: tuple | None = None) -> Run:
    """A finished run's model with its weights, tokenizer, scenes and stages, at its last stage."""
    record = read_state(folder)["run"]
    args = parse([f"--model={record['model']}", f"--out={folder}"])
    vars(args).update({k: record[k] for k in SAME if k in record} | {"annotations": None})  # nothing is trained on
    run = build(args, start_processes(), paper, scenes, record["text"])
    load_weights(run.model, folder)
    run.model.to(run.ranks.device).eval()
    run.model.configure_stage(run.stages[-1])
    return run


def run(args: argparse.Namespace, paper=None, scenes: tuple | None = None) -> Run:
    """Train all stages and score the result."""
    started = time.monotonic()
    begun = check_run(args)
    ranks = start_processes(args.shard)
    whole = build(args, ranks, paper, scenes)
    model, stages = whole.model, whole.stages
    ranks.say(f"{args.out}: seed {args.seed}, processes {ranks.world}, {ranks.device.type}, {whole.dtype}")
    keep_precise(model, stages)
    for stage, steps in zip(stages, whole.steps, strict=True):
        model.configure_stage(stage)
        ranks.say(f"  {stage.name}: {steps} steps; {memory_line(model, ranks.world if args.shard else 1)}")
    if args.resume or args.init:
        load_weights(model, args.out if args.resume else Path(args.init))
    if args.recompute:
        if not hasattr(model, "gradient_checkpointing_enable"):
            raise DataError(f"--recompute: {args.model} offers no gradient checkpointing; leave it out")
        model.gradient_checkpointing_enable()
    if args.shard:
        wrap(model, ranks, whole.dtype, shard=True)  # moves to the device block by block
    else:
        model.to(ranks.device)
    ranks.barrier()  # all have read what the folder holds
    if ranks.rank == 0:
        open_run(args.out, whole.record, begun)
        whole.board = tensorboard(args.out) if args.tensorboard else None
        for name, found in whole.listed.items():
            evaluate.draw_mixture(found, whole.record["mixtures"][name], args.out / f"mixture {name}.png")
    position = begun or {"stage": 0, "step": 0, "total": 0, "running": 0.0, "skipped": 0, "in_a_row": 0, "seconds": 0.0,
                         "adam": False}  # fmt: skip
    for index in range(position["stage"], len(stages)):
        train_stage(whole, index, position)
    if not args.no_eval:
        evaluate_run(whole, stages[-1])
        draw_pictures(whole)
        evaluate.write_report(args.out, args.out, whole.test)
        ranks.barrier()  # a process that ends before the first is done drawing looks like one that failed
    ranks.say(f"{args.out}: done in {(time.monotonic() - started) / 60:.1f} minutes")
    return whole


def evaluate_run(run: Run, stage: Stage, names: tuple[str, ...] = (), out: Path | None = None) -> None:
    """Score the model, as that stage sees, in scenes it never saw, and print the table; every rank takes part."""
    run.model.configure_stage(stage)
    run.model.eval()
    run.prepare(run.test)
    with gathered(run.model), torch.no_grad():
        evaluate.evaluate_run(run, names, out=out, stage=stage)


def draw_pictures(run: Run) -> None:
    """Some test scenes as the model sees them, where it can show that."""
    found = [run.args.out / "loss.png"]
    with gathered(run.model):
        if run.ranks.rank == 0 and hasattr(run.model, "pictures"):
            found += run.model.pictures(run.test, run.args.out / "pictures")
    run.ranks.say("\n".join(f"picture: {path}" for path in found))


def main(argv: list[str] | None = None, paper=None, scenes: tuple | None = None) -> int:
    try:
        run(parse(argv), paper, scenes)
    except (DataError, OSError) as error:  # OSError: what cannot be written
        # a loader process puts its traceback in front: the last line is the message
        print(f"train.py: {str(error).strip().splitlines()[-1].removeprefix('data.DataError: ')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
