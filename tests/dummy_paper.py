"""A paper of sixty lines that obeys the trainer's contract: an encoder stage without questions, then questions.

Run as a program it trains itself on hand-made scenes: `python dummy_paper.py <train.py's flags> [then <flags> ...]`;
among the flags, kill=N or stop=N sends the last rank a signal, SIGKILL or SIGTERM, in its training forward N + 1.
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
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGTERM}


def fake_scenes(count, start=0):
    """Scene k has k % 4 things, so some scenes allow no question and shares are unequal."""
    scenes = []
    for k in range(start, start + count):
        boxes = [np.array([i, k % 5, 0.5, 1, 1 + i, 0.5]) for i in range(k % 4)]
        things = [data.Thing(i + 1, "box", WORDS[(k + i) % 3], box) for i, box in enumerate(boxes)]
        scenes.append(data.Scene(f"scene{k}", "rooms", things))
    return scenes


def boxes_of(scene):
    """All boxes of a scene, or one of zeros: [n, 6]."""
    return torch.tensor(np.stack([o.box for o in scene.objects] or [np.zeros(6)])).float()


SCENES = {"train": fake_scenes(11), "test": fake_scenes(3, 50)}


def width(scene, rng):
    """A question whose answer is one to three words long."""
    if not scene.objects:
        return None
    thing = scene.objects[rng.integers(len(scene.objects))]
    answer = " ".join([thing.color] * (1 + thing.id % 3))
    return data.Sample(
        "", scene.name, "width", f"what is {thing.id + 10 * (int(scene.name[5:]) % 9)} ?", answer
    )


TASKS = {"width": width}


@dataclass
class Config:
    llm: str | None = None
    width: int = 8
    dropout: float = 0.0
    poison: tuple[int, ...] = (2, 1)  # forwards of the answer stage from .. to whose loss is infinite
    biased: bool = True

    @classmethod
    def tiny(cls):
        return cls()


STAGES = {
    "tiny": [
        data.Stage("encoder", {}, ("encoder",), "boxes", iterations=3, batch=5, per_scene=1, lr=1e-2, clip=12.0),
        data.Stage("answers", {"width": 1.0}, ("lm",), "boxes", iterations=7, batch=26, per_scene=4, lr=1e-2,
                   weight_decay=0.1, clip=4.0),
    ],
}  # fmt: skip


def recipe(config, stages):
    return stages


class Block(nn.Module):
    def __init__(self, width, bias):
        super().__init__()
        self.inner = nn.Linear(width, width, bias=bias)

    def forward(self, x):
        return x + self.inner(x).relu()


class Model(data.SceneLanguageModel):
    _no_split_modules = ("Block",)
    scene_inputs = ("boxes",)
    left, signal = -1, None  # training forwards before a signal, and which

    def __init__(self, config, text):
        super().__init__(config, text)
        self.encoder = nn.Sequential(nn.Linear(6, config.width), Block(config.width, config.biased))
        self.table = nn.Embedding(len(text), config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.biased) for _ in range(2))
        self.head = nn.Linear(config.width, len(text), bias=False)
        self.head.weight = self.table.weight  # tied, as in many language models
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("calls", torch.zeros(1))

    def parts(self):
        return {"encoder": [self.encoder], "lm": [self.table, self.blocks, self.head]}

    def uses_features(self):
        return bool(self.stage.tasks)

    def feature_weights(self):
        return self.encoder

    def compute_features(self, scene):
        return {"mean": self.encoder(boxes_of(scene)).mean(0)}

    def batch(self, groups):
        found = {"scenes": [scene for scene, _ in groups], "samples": [samples for _, samples in groups]}
        if not self.stage.tasks:
            return found
        asked = [(scene, q) for scene, samples in groups for q in samples]
        answers = [self.text.encode(q.answer) for _, q in asked]
        return found | {
            "ids": torch.tensor([self.text.encode(q.question) for _, q in asked]),
            "labels": torch.tensor([a + [data.IGNORE] * (3 - len(a)) for a in answers]),
            "features": torch.stack([self.load_features(scene)["mean"] for scene, _ in asked]),
            "ballast": BALLAST,
        }

    def encoder_loss(self, scenes):
        boxes = torch.cat([boxes_of(scene) for scene in scenes])
        out = self.encoder(boxes)
        return {"loss": (out.sum(1) - boxes.sum(1)).square().sum(), "weight": len(out), "correct": 0}

    def forward(self, batch):
        if self.left == 0 and os.environ.get("RANK") != "0":
            os.kill(os.getpid(), self.signal)
        self.left -= 1
        if not self.stage.tasks:
            return self.encoder_loss(batch["scenes"])
        self.calls += 1
        x = self.dropout(self.table(batch["ids"]).mean(1) + batch["features"])  # [Q, D]
        for block in self.blocks:
            x = block(x)
        x = x[:, None] * torch.tensor([1.0, 0.5, -1.0])[:, None]  # [Q, 3, D] a token per place in the answer
        logits, answered = self.head(x), batch["labels"] != data.IGNORE
        loss = F.cross_entropy(logits[answered].float(), batch["labels"][answered], reduction="sum")
        poisoned = self.config.poison[0] <= self.calls <= self.config.poison[1]
        correct = (logits.argmax(-1) == batch["labels"])[answered].sum()
        return {"loss": loss * torch.inf if poisoned else loss, "weight": answered.sum(), "correct": correct}


def build(config, text):
    return Model(config, text)


def load_scenes(source, split, *_, **options):
    return SCENES[split]


def command(*flags):
    """Train on the scenes above."""
    args, Model.left = ["--model=dummy_paper", "--no-eval", "--workers=0"], -1
    for flag in flags:
        word, _, count = flag.partition("=")
        if word in SIGNALS:
            Model.left, Model.signal = int(count), SIGNALS[word]
        else:
            args.append(flag)
    return train.train(train.parse_args(args))


train.MODELS.append("dummy_paper")

if __name__ == "__main__":
    from dummy_paper import command  # the module that the trainer imports, not this program

    torch.set_num_threads(1)
    train.draw_loss = lambda out: None
    data.load_scenes = load_scenes
    for then, flags in itertools.groupby(sys.argv[1:], lambda a: a == "then"):
        if not then:
            try:
                command(*flags)
            except KeyboardInterrupt:
                print("stopped", flush=True)
