"""A paper of 60 lines that obeys the trainer's contract: an encoder stage without questions, then questions.

Run as a program it trains itself on hand-made scenes: `python dummy_paper.py <train.py's flags> [then <flags> ...]`;
among the flags, kill=N or stop=N ends a command in its forward N + 1, by SIGKILL or by an exception.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import train

WORDS = ("red", "green", "blue")
BALLAST = "x" * 70_000  # in every batch: more than a pipe holds
STOP = {"left": None, "how": None}  # training forwards left before `how()` is called


class Stopped(Exception):
    pass


def stop():
    raise Stopped


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fake_scenes(count: int, start: int = 0) -> list[data.Scene]:
    """Scene k has k % 4 things, so some scenes allow no question and shares are unequal."""
    box = lambda k, i: np.array([i, k % 5, 0.5, 1, 1 + i, 0.5])  # noqa: E731
    things = lambda k: [data.Thing(i + 1, "box", WORDS[(k + i) % 3], box(k, i)) for i in range(k % 4)]  # noqa: E731
    return [data.Scene(f"scene{k}", "rooms", things(k)) for k in range(start, start + count)]


def width(scene: data.Scene, rng: np.random.Generator) -> data.Sample | None:
    """A question whose answer is one to three words long."""
    if not scene.objects:
        return None
    thing = scene.objects[rng.integers(len(scene.objects))]
    answer = " ".join([thing.colour] * (1 + thing.id % 3))
    return data.Sample("", scene.name, "width", f"what is {thing.id + 10 * (int(scene.name[5:]) % 9)} ?", answer)


TASKS = {"width": width}


@dataclass
class Config:
    width: int = 8
    dropout: float = 0.0
    poison: tuple[int, int] = (0, 0)  # forwards of the answer stage from .. to whose loss is infinite
    bends: tuple[int, int] = (2, 2)
    biased: bool = True
    extra: int | None = None

    @classmethod
    def tiny(cls):
        return cls()

    @classmethod
    def paper(cls):
        return cls(width=16)


STAGES = {"tiny": [
    data.Stage("encoder", {}, ("encoder",), "encoder", iterations=3, batch=5, per_scene=1, lr=1e-2, clip=12.0),
    data.Stage("answers", {"width": 1.0}, ("lm",), iterations=7, batch=26, per_scene=4, lr=1e-2, weight_decay=0.1,
               clip=4.0),
], "paper": [data.Stage("answers", {"width": 1.0}, ("lm",), epochs=2, batch=32)]}  # fmt: skip


class Block(nn.Module):
    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.inner = nn.Linear(width, width, bias=bias)

    def forward(self, x):
        return x + self.inner(x).relu()


class Model(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self, config: Config, text):
        super().__init__()
        self.config, self.text, self.cache, self.visual = config, text, None, ""
        self.encoder = nn.Sequential(nn.Linear(6, config.width), Block(config.width, config.biased))
        self.table = nn.Embedding(len(text), config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.biased) for _ in config.bends)
        self.head = nn.Linear(config.width, len(text), bias=False)
        self.head.weight = self.table.weight  # tied, as in many language models
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("calls", torch.zeros(1))

    def begin(self, stage):
        self.visual = stage.visual
        for name, p in self.named_parameters():
            p.requires_grad_(("encoder" if name.startswith("encoder") else "lm") in stage.trains)

    def prepare(self, scenes, cache, rank, world, progress):
        """Frozen work, kept by what it depends on; the ranks have different numbers of scenes."""
        if self.visual != "encoder":
            self.cache = cache / f"{float(self.encoder[0].weight.sum()):.9f}"
            self.cache.mkdir(parents=True, exist_ok=True)
            for scene in progress(scenes[rank::world], "features"):
                boxes = np.stack([o.box for o in scene.objects] or [np.zeros(6)])
                feature = self.encoder(torch.tensor(boxes, dtype=torch.float32)).mean(0)
                np.save(self.cache / f"{scene.name}.npy", feature.numpy())

    def feature(self, scene):
        return torch.from_numpy(np.load(self.cache / f"{scene.name}.npy"))

    def batch(self, groups):
        if self.visual == "encoder":
            boxes = [o.box for scene, _ in groups for o in scene.objects] or [np.zeros(6)]
            return {"boxes": torch.tensor(np.stack(boxes), dtype=torch.float32), "scenes": [s for s, _ in groups]}
        rows = [(self.text.encode(q.question), self.text.encode(q.answer)) for _, samples in groups for q in samples]
        labels = [a + [-100] * (3 - len(a)) for _, a in rows]
        return {"ids": torch.tensor([q for q, _ in rows]), "labels": torch.tensor(labels),
                "features": torch.stack([self.feature(s) for s, samples in groups for _ in samples]),
                "samples": [samples for _, samples in groups], "ballast": BALLAST}  # fmt: skip

    def forward(self, batch):
        if self.training and STOP["left"] is not None:
            STOP["left"] -= 1
            if STOP["left"] < 0:
                STOP["how"]()
        if self.visual == "encoder":
            out = self.encoder(batch["boxes"])
            return {"loss": (out.sum(1) - batch["boxes"].sum(1)).square().sum(), "weight": len(out)}
        self.calls += 1
        x = self.dropout(self.table(batch["ids"]).mean(1) + batch["features"])  # [Q, D]
        for block in self.blocks:
            x = block(x)
        x = x[:, None] * torch.tensor([1.0, 0.5, -1.0])[:, None]  # [Q, 3, D] a token per place in the answer
        logits, answered = self.head(x), batch["labels"] != -100
        loss = F.cross_entropy(logits[answered], batch["labels"][answered], reduction="sum")
        poisoned = self.config.poison[0] <= self.calls <= self.config.poison[1]
        return {"loss": loss * (float("inf") if poisoned else 1.0), "weight": answered.sum(),
                "correct": (logits.argmax(-1) == batch["labels"])[answered].sum()}  # fmt: skip


def command(flags: list[str]) -> train.Run | None:
    """One run on the scenes above; None where it was stopped."""
    STOP["left"] = None
    for flag in [f for f in flags if f[:5] in ("stop=", "kill=")]:
        STOP.update(left=int(flag[5:]), how={"stop": stop, "kill": kill}[flag[:4]])
        flags = [f for f in flags if f != flag]
    args = train.parse(["--model=dummy", "--no-eval", "--workers=0", *flags])
    try:
        return train.run(args, sys.modules[__name__], (fake_scenes(11), fake_scenes(3, 50)))
    except Stopped:
        return None
    finally:
        STOP["left"] = None


if __name__ == "__main__":
    torch.set_num_threads(1)
    train.draw_loss = lambda out: None
    for then, flags in itertools.groupby(sys.argv[1:], lambda a: a == "then"):
        if not then:
            command(list(flags))
