"""Spatial 3D-LLM: Exploring Spatial Awareness in 3D Vision-Language Models.

ICME 2025, arXiv 2507.16524. Of this paper only the abstract, descriptions by others and the names of its parts are
public: neither equations nor sizes, losses or schedules. The parts below are built after the nearest public relatives,
and every choice is listed.

Idea. A cloud of points becomes a few hundred *referents*, tokens that know where they are. Each gathers the points that
vote for the same object (intra-referent), hears its neighbors (inter-referent) and looks back at the whole scene
(contextual). A language model reads them and writes locations as text: boxes, distances, edited layouts. Things are
named by description ("the red chair") or by their box in text, never by an identifier.

  cloud p [N, 3], f [N, 7] = color, normal, height
    | PointNet2: four set abstractions, two feature propagations; trained by its own stage, then frozen
  seeds f [M, C] at p [M, 3]
    | IntraReferent: every seed votes for an object's center; balls around the votes of the first R seeds, pooled
  referents h [R, C] at their votes q [R, 3]
    | InterReferentGraph: two graph convolutions over the nearest referents
    | ReferentSceneAttention: cross-attention to all seeds
  referents h [R, C] -> boxes [R, 6]
    | projector(h) + location(boxes)
  scene tokens [R, D] -> Llama with LoRA -> "... = [1.25, -0.80, 0.45, 0.50, 0.50, 0.90]"

Axes: B scenes, N points, M seeds, R referents, P points of a ball, C channels, H heads, K scene tokens (K = R), D width
of the language model, T text. In the code f are features, p places of points or seeds, q centers, v votes, h referents.

| paper                                     | here                                                           |
| scene encoder, PointNet++, frozen         | SetAbstraction, FeaturePropagation, PointNet2                  |
| intra-referent clustering and abstraction | IntraReferent                                                  |
| inter-referent message passing            | neighbor_graph, InterReferentGraph                             |
| contextual referent-scene interaction     | ReferentSceneAttention                                         |
| location-enriched scene embeddings        | FourierCode, Model.encode                                      |
| Vicuna-7B, instruction tuning             | load_llm, STAGES["paper"]                                      |
| MODLE (abstract: 263K annotations)        | modle_distance, modle_edit, write_modle, BENCHMARKS            |
| ablations of the three modules            | Config.intra, .inter, .context, .positions; INTER              |

What is not public, and what we chose (all sizes below are ours or a relative's)
- Encoder: VoteNet's backbone, set abstractions 2048/0.2 m, 1024/0.4, 512/0.8, 256/1.2 with 64, 32, 16, 16 points and
  two feature propagations to 1,024 seeds of 256 channels; LayerNorm in place of BatchNorm, so that a scene's features
  depend on no other scene. A ball takes its *nearest* points, not the first in memory: the order of the points changes
  nothing. All levels and the referents are prefixes of one farthest-point order.
- Votes: Vote2Cap-DETR's vote query, which the descriptions match step by step: an FFN gives an offset and a feature,
  referents are sampled from the seeds before they move and grouped after, radius 0.3 m, 16 votes, max pool, 256
  referents.
- Graph: Scan2Cap's 10 neighbors by center, symmetric, with self loops; H + ReLU(D^-1/2 A D^-1/2 LN(H) W), two layers.
- Context: one pre-norm cross-attention over all seeds and an FFN, 8 heads, random Fourier features of places. What a
  referent sees is written relative to its own place.
- Boxes: an MLP on the referent gives the rest of the way to the object's center, and its size. The language model reads
  the six numbers through one linear map of their Fourier features (wavelengths 0.5 to 16 m), added to the token.
- Encoder training: votes (smooth L1), boxes (smooth L1 on center and log size) and semantic class, told by the nearest
  word vectors of the language model (category and color). The same loss, at 0.2, goes on beside the questions, for the
  three modules only: the encoder stays frozen. A trained encoder starts another run (`train.py --init RUN --stages`).
- A frozen encoder sees a scene as it was scanned, and so do the modules behind it; where training turns the scene, the
  boxes and votes are turned after them.
- Language: LoRA of rank 32 on q, k, v, o and the schedule of the same group's 3DMIT (2 epochs, batch 128, 5e-4);
  loss on the answer only. Boxes in meters with two decimals.
- All of MODLE: see its section. The tiny preset: see the last section; none of it touches a loaded model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import data
from data import DIRECTIONS, DataError, Sample, Scene, Source, Stage, facts, listed, metres, pick, several

# ---- configuration ---------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every number of the model; `paper()` are the paper's where it names them, `tiny()` trains from nothing."""

    llm: str | None = None  # a Llama (Vicuna) name or folder; None builds a tiny one from the fields below
    points: int = 40_000  # of the cloud that are read; VoteNet 40,000
    centers: tuple[int, ...] = (2048, 1024, 512, 256)  # of the four set abstractions; the second level are the seeds
    radii: tuple[float, ...] = (0.2, 0.4, 0.8, 1.2)  # meters, of their balls
    samples: tuple[int, ...] = (64, 32, 16, 16)  # nearest points per ball
    widths: tuple[tuple[int, ...], ...] = ((64, 64, 128), (128, 128, 256), (128, 128, 256), (128, 128, 256))  # of MLPs
    feature: int = 256  # channels C of seeds and referents
    referents: int = 256
    ball: float = 0.3  # meters around a vote
    ball_samples: int = 16
    ball_widths: tuple[int, ...] = (256, 256, 256)  # of the MLP over a ball's votes; the last is `feature`
    unit_votes: bool = True  # a vote's feature has length 1
    neighbors: int = 10  # of the referents' graph
    graph_layers: int = 2
    context_heads: int = 8
    fourier: int = 128  # random features of the contextual positions
    intra: bool = True  # False: referents are seeds as they are, no votes, no abstraction
    inter: str = "graph"  # a key of INTER
    context: bool = True  # False: referents never look back at the scene
    positions: bool = True  # False: nothing that the language model reads says where a referent is
    detection_weight: float = 0.2  # of the detection loss beside the questions
    lora_rank: int = 32  # of a loaded model; 3DMIT 32
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    dtype: str = "bfloat16"  # of a loaded model's weights
    # the tiny preset only: its language model, and how far color and normal spread the centers
    width: int = 128
    layers: int = 2
    heads: int = 4
    hidden: int = 256
    spread: float = 2.0  # meters per unit of color
    spread_normal: float = 0.3  # meters per unit of normal

    @classmethod
    def tiny(cls) -> Config:
        return cls(
            points=2048,
            centers=(512, 256, 128, 64),
            samples=(16, 16, 16, 16),
            widths=((64, 64, 64), (128, 128, 128), (128, 128, 128), (128, 128, 128)),
            feature=128,
            referents=96,
            ball_widths=(128, 128),
            unit_votes=False,
            context_heads=4,
            fourier=48,
        )

    @classmethod
    def paper(cls) -> Config:
        return cls(llm="lmsys/vicuna-7b-v1.5")


# ---- 1 geometry of a cloud, worked out once per scene ----------------------------------------------------------------


def ball_query(q: Tensor, p: Tensor, radius: float, samples: int) -> Tensor:
    """Find the nearest `samples` points p [N, 3] within `radius` of every center q [M, 3]: indices [M, samples].

    Places left over repeat the nearest point, which a maximum does not feel.
    """
    distance, index = data.knn(q, p, min(samples, len(p)))
    nearest = index[:, :1]  # [M, 1]
    index = torch.where(distance <= radius, index, nearest)
    return torch.cat([index, nearest.expand(-1, samples - index.shape[1])], 1)


def interpolation(fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
    """Find the three nearest coarse points of every fine one [M, 3], and their weights by inverse distance [M, 3]."""
    distance, index = data.knn(fine, coarse, min(3, len(coarse)))
    weight = 1 / (distance + 1e-8)
    return index, (weight / weight.sum(1, keepdim=True)).float()


def cloud_geometry(
    p: Tensor, space: Tensor, counts: Sequence[int], radii: Sequence[float], samples: Sequence[int]
) -> dict[str, Tensor]:
    """Work out which points each level of PointNet++ looks at.

    Args: p [N, 3] meters; space [N, .] in which centers are spread, p itself or more; per level the count of centers,
    the radius of their balls, and how many points each takes.
    Returns: "order" [M1] of the first level's centers; per level i "ball{i}" [M, P]; per propagation from level i + 1
    to i "near{i}" and "weight{i}" [M, 3].
    """
    # every prefix of a farthest-point order is itself a farthest-point sample, so one order serves all levels; where
    # there are fewer points they come again
    order = data.farthest_point_sampling(space, counts[0])
    order = order.repeat(-(-counts[0] // len(order)))[: counts[0]]  # [M1]
    levels = [p, *(p[order[:count]] for count in counts)]

    found = {"order": order}
    for i, (fine, coarse) in enumerate(itertools.pairwise(levels)):
        found[f"ball{i}"] = ball_query(coarse, fine, radii[i], samples[i])
    for i in (3, 2):
        found[f"near{i}"], found[f"weight{i}"] = interpolation(levels[i], levels[i + 1])
    return found


# ---- 2 scene encoder: PointNet++ -------------------------------------------------------------------------------------


def gather(values: Tensor, index: Tensor) -> Tensor:
    """Take values [B, N, C] at index [B, ...]: [B, ..., C]."""
    B, C = values.shape[0], values.shape[-1]
    flat = index.reshape(B, -1, 1).expand(-1, -1, C)
    return values.gather(1, flat).view(*index.shape, C)


class SetAbstraction(nn.Module):
    """One level of PointNet++: over each ball the maximum of MLP([feature, (point - center) / radius])."""

    def __init__(self, inputs: int, widths: Sequence[int], radius: float):
        super().__init__()
        self.radius = radius
        layers = []
        for a, b in itertools.pairwise([inputs + 3, *widths]):
            layers += [nn.Linear(a, b), nn.LayerNorm(b), nn.ReLU()]
        self.mlp = nn.Sequential(*layers)

    def forward(self, f: Tensor, p: Tensor, q: Tensor, index: Tensor) -> Tensor:
        """Abstract f [B, N, C] at p [B, N, 3] to centers q [B, M, 3] with balls index [B, M, P]: [B, M, widths[-1]]."""
        place = (gather(p, index) - q[:, :, None]) / self.radius  # [B, M, P, 3]
        pairs = torch.cat([gather(f, index), place], -1)  # [B, M, P, C + 3]
        return self.mlp(pairs).amax(2)  # [B, M, outputs]


class FeaturePropagation(nn.Module):
    """Coarse features interpolated to finer points, beside what those had, through an MLP."""

    def __init__(self, coarse: int, fine: int, outputs: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(coarse + fine, outputs), nn.ReLU(), nn.Linear(outputs, outputs))
        self.norm = nn.LayerNorm(outputs)

    def forward(self, coarse: Tensor, fine: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """coarse [B, M, C], fine [B, N, C'], index [B, N, 3] into M, weight [B, N, 3] -> [B, N, outputs]."""
        near = (gather(coarse, index) * weight[..., None]).sum(2)  # [B, N, C]
        return self.norm(self.mlp(torch.cat([near, fine], -1)))  # [B, N, outputs]


class PointNet2(nn.Module):
    """PointNet++ with four set abstractions and two feature propagations: the second level's centers are the seeds."""

    inputs = 7  # color, normal, height

    def __init__(self, config: Config, level: type = SetAbstraction):
        super().__init__()
        C = config.feature
        inputs = [self.inputs, *(widths[-1] for widths in config.widths)]
        levels = zip(inputs, config.widths, config.radii, strict=False)
        self.down = nn.ModuleList(level(*sizes) for sizes in levels)
        self.up = nn.ModuleList([FeaturePropagation(inputs[4], inputs[3], C), FeaturePropagation(C, inputs[2], C)])

    def forward(self, f: Tensor, p: Tensor, cloud: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Encode a cloud f [B, N, 7], p [B, N, 3] along its geometry (`cloud_geometry`, batched).

        Returns: seed features [B, M, C] and their places [B, M, 3].
        """
        # down: fewer centers with wider balls
        first = gather(p, cloud["order"])  # [B, M1, 3]
        levels = []
        for i, layer in enumerate(self.down):
            index = cloud[f"ball{i}"]
            q = first[:, : index.shape[1]]  # [B, M, 3]
            f, p = layer(f, p, q, index), q  # [B, M, C], [B, M, 3]
            levels.append(f)

        # up again to the second level
        for i, layer in zip((3, 2), self.up, strict=True):
            f = layer(f, levels[i - 1], cloud[f"near{i}"], cloud[f"weight{i}"])  # [B, finer, C]
        return f, first[:, : f.shape[1]]  # [B, M, C], [B, M, 3]


# ---- 3 intra-referent clustering and abstraction ---------------------------------------------------------------------


class IntraReferent(nn.Module):
    """Votes of the seeds, grouped in balls around the votes of the first R of them, pooled: referents with centers."""

    def __init__(self, config: Config, level: type = SetAbstraction):
        super().__init__()
        C = config.feature
        self.samples, self.unit = config.ball_samples, config.unit_votes
        self.vote = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, C), nn.ReLU(), nn.Linear(C, 3 + C))
        self.group = level(C, config.ball_widths, config.ball)

    def forward(self, f: Tensor, p: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Turn seeds f [B, M, C] at p [B, M, 3], in farthest-point order, into referents.

        Returns: h [B, R, C] and the votes [B, M, 3] of all seeds, of which the first R are the referents' centers.
        """
        # every seed says how far away the center of its object is, and what changes in its feature on the way
        moved, change = self.vote(f).split((3, f.shape[-1]), -1)  # [B, M, 3], [B, M, C]
        v, f = p + moved, f + change  # [B, M, 3], [B, M, C]
        if self.unit:
            f = F.normalize(f, dim=-1)  # [B, M, C]

        # the nearest votes of each referent; a vote too far away is replaced by the referent's own
        q = v[:, :count]  # [B, R, 3]
        with torch.no_grad():
            distance, index = torch.cdist(q, v).topk(min(self.samples, v.shape[1]), largest=False)  # [B, R, P]
            own = torch.arange(q.shape[1], device=q.device)[:, None]
            index = torch.where(distance <= self.group.radius, index, own)  # [B, R, P]
        return self.group(f, v, q, index), v  # [B, R, C], [B, M, 3]


# ---- 4 inter-referent message passing --------------------------------------------------------------------------------


def neighbor_graph(q: Tensor, k: int) -> Tensor:
    """Normalize the symmetric graph in which every referent knows itself and its k nearest: D^-1/2 A D^-1/2.

    Args: q [B, R, 3] centers. Returns: [B, R, R].
    """
    distance = torch.cdist(q, q)  # [B, R, R]
    near = distance.topk(min(k + 1, q.shape[1]), largest=False).indices  # [B, R, k + 1]
    linked = torch.zeros_like(distance).scatter_(-1, near, 1.0)  # [B, R, R]
    linked = torch.maximum(linked, linked.mT)  # [B, R, R]
    linked.diagonal(dim1=-2, dim2=-1).fill_(1.0)  # of two referents at one place either may be the nearest
    degree = linked.sum(-1).rsqrt()  # [B, R]
    return degree[..., None] * linked * degree[..., None, :]  # [B, R, R]


class InterReferentGraph(nn.Module):
    """H <- H + ReLU(D^-1/2 A D^-1/2 LN(H) W), a few times."""

    def __init__(self, config: Config):
        super().__init__()
        C = config.feature
        self.k = config.neighbors
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(config.graph_layers))
        self.layers = nn.ModuleList(nn.Linear(C, C, bias=False) for _ in range(config.graph_layers))

    def forward(self, h: Tensor, q: Tensor) -> Tensor:
        """Pass messages between referents h [B, R, C] at q [B, R, 3]: [B, R, C]."""
        graph = neighbor_graph(q.detach(), self.k)  # [B, R, R]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            h = h + F.relu(graph @ layer(norm(h)))  # [B, R, C]
        return h


# ---- 5 contextual referent-scene interaction -------------------------------------------------------------------------


class FourierCode(nn.Module):
    """A linear map of the cosines and sines of numbers in meters (Tancik et al. 2020).

    frequencies [n, G, W], radians per meter: n numbers give G groups of W phases. A place has random frequencies that
    mix its three numbers in one group; a box has the same W wavelengths for each of its six.
    """

    def __init__(self, frequencies: Tensor, width: int):
        super().__init__()
        self.register_buffer("frequencies", frequencies)
        self.out = nn.Linear(2 * frequencies[0].numel(), width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Encode x [..., n] meters: [..., width]."""
        with torch.autocast(x.device.type, enabled=False):  # half precision would blur meters to decimeters
            phase = torch.tensordot(x.float(), self.frequencies, 1)  # [..., G, W]
        return self.out(torch.cat([phase.cos(), phase.sin()], -1).flatten(-2))


class ReferentSceneAttention(nn.Module):
    """Referents look at all seeds of the scene: pre-norm cross-attention with Fourier positions, and an FFN."""

    def __init__(self, config: Config):
        super().__init__()
        C = config.feature
        self.heads = config.context_heads
        self.norm, self.norm_scene, self.norm_mlp = (nn.LayerNorm(C) for _ in range(3))
        self.position = FourierCode(torch.randn(3, 1, config.fourier // 2) * (2 * math.pi * 0.25), C)
        self.query, self.key, self.value, self.out = (nn.Linear(C, C) for _ in range(4))
        self.place = nn.Linear(3, C, bias=False)  # what is seen is written from the referent's own place
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.ReLU(), nn.Linear(2 * C, C))

    def split(self, x: Tensor) -> Tensor:
        """Part the channels of x [B, L, C] into heads: [B, H, L, C / H]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, h: Tensor, q: Tensor, f: Tensor, p: Tensor) -> Tensor:
        """Let referents h [B, R, C] at q [B, R, 3] look at seeds f [B, M, C] at p [B, M, 3]: [B, R, C]."""
        # where things are decides who is looked at (query, key) and is part of what is seen (value)
        own, seeds = self.norm(h), self.norm_scene(f)  # [B, R, C], [B, M, C]
        query = self.split(self.query(own + self.position(q)))  # [B, H, R, C / H]
        key = self.split(self.key(seeds + self.position(p)))  # [B, H, M, C / H]
        value = self.split(self.value(seeds) + self.place(p))  # [B, H, M, C / H]
        seen = F.scaled_dot_product_attention(query, key, value)  # [B, H, R, C / H]

        # attention weights sum to one: subtracting the own place leaves the way to what is seen
        seen = seen.transpose(1, 2).flatten(2) - self.place(q)  # [B, R, C]
        h = h + self.out(seen)  # [B, R, C]
        return h + self.mlp(self.norm_mlp(h))  # [B, R, C]


# ---- 6 what referents are taught -------------------------------------------------------------------------------------


def weighted_mean(loss: Tensor, weight: Tensor) -> Tensor:
    return (loss * weight).sum() / weight.sum()


def detection_loss(
    seen: dict[str, Tensor], true: Tensor, named: Tensor, on: Tensor, words: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Say how far off votes, boxes and names are.

    Args: seen, of `Model.see`: "votes" [B, M, 3] of seeds, "boxes" [B, R, 6] and "tokens" [B, R, D] of referents, which
    are the first R seeds. Of every seed its true box true [B, M, 6] (on walls and floor its own place; the size there
    counts for nothing), the numbers named [B, M, 2] of its category and color (0 = nothing), whether it lies on an
    object on [B, M]. words: the language model's vectors of all categories and of all colors, each [., D].
    Returns: the mean loss, and the share of referents on objects whose category and color are right.
    """
    close = partial(F.smooth_l1_loss, beta=0.1, reduction="none")
    boxes = seen["boxes"]  # [B, R, 6]
    R = boxes.shape[1]

    # centers, in meters; most seeds lie on walls and floor, so these count a tenth
    voted = weighted_mean(close(seen["votes"], true[..., :3]).mean(-1), torch.where(on, 1.0, 0.1))
    true, named, on = true[:, :R], named[:, :R], on[:, :R]
    boxed = weighted_mean(close(boxes[..., :3], true[..., :3]).mean(-1), torch.where(on, 1.0, 0.1))

    # sizes, as ratios
    if on.any():
        boxed = boxed + 0.5 * close(boxes[..., 3:].log(), true[..., 3:].log()).mean(-1)[on].mean()

    # names: the nearest word among all categories and among all colors (25: a sharp softmax of cosines), and the token
    # as their sum
    z = F.normalize(seen["tokens"].float(), dim=-1)  # [B, R, D]
    told, whole, right = 0.0, 0.0, on
    for kind, vectors in enumerate(words):
        logits = 25 * z @ F.normalize(vectors, dim=-1).T  # [B, R, names]
        told = told + F.cross_entropy(logits.mT, named[..., kind], reduction="none")  # [B, R]
        whole = whole + vectors[named[..., kind]]  # [B, R, D]
        right = right & (logits.argmax(-1) == named[..., kind])  # [B, R]
    apart = 1 - F.cosine_similarity(z, whole, dim=-1)  # [B, R]
    loss = weighted_mean(told + apart, torch.where(on, 1.0, 0.3)) + 2 * (voted + boxed)
    return loss, right.sum() / on.sum().clamp(min=1)


# ---- 7 the model -----------------------------------------------------------------------------------------------------


def load_llm(config: Config) -> nn.Module:
    """Load a pre-trained Llama, its attention adapted by LoRA (peft) on q, k, v and o."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, config.dtype)
    llm = AutoModelForCausalLM.from_pretrained(config.llm, dtype=dtype, attn_implementation="sdpa")
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )
    return inject_adapter_in_model(lora, llm)


BOX_FREQUENCIES = 2 * math.pi / 0.5 / 2 ** torch.arange(6)  # of wavelengths 0.5, 1, ... 16 m


class Model(data.SceneLanguageModel):
    """Spatial 3D-LLM around a Llama. See the file's docstring for shapes."""

    scene_inputs = ("encoder", "referents")
    level = SetAbstraction  # of the encoder, and of votes

    def __init__(self, config: Config, text: data.TinyText | data.HubText):
        super().__init__(config, text)
        if config.inter not in INTER:
            raise DataError(f"inter = {config.inter!r}: choose one of {', '.join(INTER)}")
        self.llm = self.make_llm()
        pretrained = [name for name in self.llm.state_dict() if "lora_" not in name]
        self.frozen_pretrained_names = tuple(f"llm.{name}" for name in pretrained)
        C, D = config.feature, self.llm.config.hidden_size

        # the paper's parts
        self.encoder = PointNet2(config, self.level)
        self.intra = IntraReferent(config, self.level)
        self.context = ReferentSceneAttention(config)
        self.inter = nn.ModuleDict({name: part(config) for name, part in INTER.items()})  # all: runs share weights
        self.box = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, 6))
        self.projector = nn.Sequential(nn.Linear(C, D), nn.GELU(), nn.Linear(D, D), nn.LayerNorm(D))
        self.code = FourierCode(torch.eye(6)[..., None] * BOX_FREQUENCIES, D)
        for part in (self.encoder, self.intra, self.inter, self.context, self.box, self.projector):
            data.start_weights(part)

        with torch.no_grad():
            # votes, boxes and messages begin near nothing; attention begins with what is alike and near
            for small in (self.intra.vote[-1], self.box[-1], *self.inter["graph"].layers):
                small.weight.mul_(0.2)
            self.context.key.weight.copy_(self.context.query.weight)
            # new tokens start at the RMS of the word embeddings
            scale = float(self.embeddings.float().square().mean().sqrt())
            nn.init.normal_(self.code.out.weight, std=scale * (self.code.out.in_features / 2) ** -0.5)
            self.projector[-1].weight.fill_(scale)

        self.encoder_trains = False
        self.names: list[dict[str, int]] = [{"": 0}, {"": 0}]  # categories and colors seen so far; "" = nothing
        self.name_tokens: list[list[list[int]]] = [[], []]
        self.no_name = text.eos  # the token that stands for ""

    def make_llm(self) -> nn.Module:
        return load_llm(self.config)

    @property
    def embeddings(self) -> Tensor:
        return self.llm.get_input_embeddings().weight

    # -- what trains

    def parts(self) -> dict[str, list]:
        """Name what a stage may train; modules that are switched off take no part."""
        c = self.config
        lora = [p for name, p in self.llm.named_parameters() if "lora_" in name]
        scene = [self.projector, self.box, self.inter[c.inter]]
        if c.intra:
            scene.append(self.intra)
        if c.context:
            scene.append(self.context)
        code = [self.code] if c.positions else []
        return {"encoder": [self.encoder], "scene": scene, "code": code, "lm": lora or [self.llm]}

    def configure_stage(self, stage: Stage) -> None:
        """Freeze all but what trains; keep geometry of scenes for an encoder that trains, seeds of a frozen one."""
        super().configure_stage(stage)
        trains = "encoder" in stage.trains
        if trains or self.encoder_trains:
            self.feature_cache = {}
        self.encoder_trains = trains

    # -- clouds to seeds: frozen work

    def sampling_space(self, p: np.ndarray, color: np.ndarray, normal: np.ndarray) -> np.ndarray:
        """Say where centers are spread [N, .]: by place alone."""
        return p

    def read_cloud(self, scene: Scene) -> dict[str, Tensor]:
        """Prepare a scene's cloud as it was scanned, whatever its turn and the order of its points.

        Returns: "f" [N, 7] color, normal, height; "p" [N, 3]; object ids "instances" [M] of the seeds; and
        `cloud_geometry`.
        """
        c, back = self.config, scene.turn.astype(np.float32)
        if scene.points is None or not len(scene.points):
            raise DataError(f"{scene.name}: Spatial 3D-LLM reads a cloud, and this scene has no points")

        # the same points under every turn: turned back, sorted, drawn
        p = scene.points @ back  # [N, 3]
        kept = np.lexsort(p.T)
        kept = kept[np.sort(np.random.default_rng(0).permutation(len(kept))[: c.points])]
        p = p[kept].astype(np.float32)  # [N, 3]
        normal = np.zeros_like(p) if scene.normals is None else scene.normals[kept] @ back  # [N, 3]
        color = np.full(p.shape, 0.5) if scene.colours is None else scene.colours[kept] / 255  # [N, 3]
        instances = np.zeros(len(p), int) if scene.instances is None else scene.instances[kept]  # [N]

        # features of about unit size
        f = np.concatenate([(color - 0.5) / 0.27, normal, p[:, 2:] - 1], 1)  # [N, 7]
        space = torch.from_numpy(self.sampling_space(p, color, normal))
        p = torch.from_numpy(p)
        geometry = cloud_geometry(p.double(), space, c.centers, c.radii, c.samples)
        seeds = geometry["order"][: c.centers[1]]
        return {"f": torch.from_numpy(f).float(), "p": p, "instances": torch.from_numpy(instances)[seeds], **geometry}

    def encode_clouds(self, cloud: dict[str, Tensor], turn: Tensor) -> tuple[Tensor, Tensor]:
        """Encode clouds, turned by turn [B, 3, 3]: seed features [B, M, C] and places [B, M, 3]."""
        f = cloud["f"]
        f = torch.cat([f[..., :3], f[..., 3:6] @ turn.mT, f[..., 6:]], -1)  # [B, N, 7]
        return self.encoder(f, cloud["p"] @ turn.mT, cloud)

    def compute_features(self, scene: Scene) -> dict[str, Tensor]:
        """Prepare the cloud of an encoder that trains; of a frozen one give its seeds "f", "p" and "instances"."""
        cloud = self.read_cloud(scene)
        if self.encoder_trains:
            return cloud
        batch = {key: value[None].to(self.device) for key, value in cloud.items()}
        f, p = self.encode_clouds(batch, torch.eye(3, device=self.device)[None])
        return {"f": f[0].half(), "p": p[0], "instances": cloud["instances"]}

    def feature_settings(self) -> tuple:
        c = self.config
        return (self.encoder_trains, c.points, c.centers, c.radii, c.samples, c.spread, c.spread_normal)

    def feature_weights(self) -> nn.Module | None:
        return None if self.encoder_trains else self.encoder

    def cache_features(
        self, scenes: Sequence[Scene], folder: Path | None = None, rank: int = 0, world: int = 1
    ) -> None:
        """Do the frozen work, and learn the names of what is there."""
        found = ({o.category for s in scenes for o in s.objects}, {o.colour for s in scenes for o in s.objects})
        for kind, names in enumerate(found):
            known = sorted(names.union(self.names[kind]) - data.STRUCTURE)  # "" sorts first
            self.names[kind] = {name: i for i, name in enumerate(known)}
            self.name_tokens[kind] = [self.text.encode(name) or [self.no_name] for name in known]
        super().cache_features(scenes, folder, rank, world)

    # -- seeds to tokens

    def see(self, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        """Find what is there: "boxes" [B, R, 6] and "tokens" [B, R, D] of referents; of seeds "votes" and "places"
        [B, M, 3] and object ids "instances" [B, M]."""
        kept = [self.load_features(scene) for scene in scenes]
        found = {key: pad_sequence([x[key] for x in kept], batch_first=True).to(self.device) for key in kept[0]}
        turn = torch.from_numpy(np.stack([s.turn for s in scenes])).float().to(self.device)  # [B, 3, 3]
        with torch.autocast(self.device.type, enabled=False):  # meters stay float32
            if self.encoder_trains:
                f, p = self.encode_clouds(found, turn)  # [B, M, C], [B, M, 3]
                h, boxes, votes = self.referents(f, p)  # [B, R, C], [B, R, 6], [B, M, 3]
            else:
                # a frozen encoder saw the scenes unturned: what follows is turned afterwards, as features cannot be
                h, boxes, votes = self.referents(found["f"].float(), found["p"])  # [B, R, C], [B, R, 6], [B, M, 3]
                boxes = torch.cat([boxes[..., :3] @ turn.mT, boxes[..., 3:] @ turn.abs().mT], -1)  # [B, R, 6]
                votes, p = votes @ turn.mT, found["p"] @ turn.mT  # [B, M, 3], [B, M, 3]
            tokens = self.projector(h)  # [B, R, D]
        return {"tokens": tokens, "boxes": boxes, "votes": votes, "places": p, "instances": found["instances"]}

    def referents(self, f: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turn seeds f [B, M, C] at p [B, M, 3] into referents [B, R, C], boxes [B, R, 6] and the votes [B, M, 3]."""
        c = self.config
        h, v = self.intra(f, p, c.referents) if c.intra else (f[:, : c.referents], p)
        q = v[:, : c.referents]  # [B, R, 3]
        h = self.inter[c.inter](h, q)  # [B, R, C]
        if c.context:
            h = self.context(h, q, f, p) if c.positions else self.context(h, 0 * q, f, 0 * p)  # [B, R, C]
        box = self.box(h)  # [B, R, 6] the rest of the way, and log sizes
        return h, torch.cat([q + box[..., :3], (box[..., 3:] - 1).clamp(-5, 3).exp()], -1), v

    def add_locations(self, tokens: Tensor, boxes: Tensor) -> Tensor:
        """Enrich tokens [B, K, D] by where they are, boxes [B, K, 6]: [B, K, D]."""
        return tokens + self.code(boxes) if self.config.positions else tokens

    def scene_length(self, scene: Scene) -> int:
        return self.config.referents

    def encode(self, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        """Turn scenes into "tokens" [B, K, D], "valid" [B, K] and, where they train, the detection loss."""
        seen = self.see(scenes)
        tokens = self.add_locations(seen["tokens"], seen["boxes"])  # [B, K, D]
        out = {"tokens": tokens, "valid": torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)}
        if self.training:
            out["auxiliary_loss"] = self.config.detection_weight * self.teach(scenes, seen)[0]
        return out

    # -- teaching

    def seed_truth(self, scene: Scene, instances: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Say what seeds with object ids instances [M] at places [M, 3] lie on.

        Returns: true boxes [M, 6], named [M, 2] and on [M] as `detection_loss` takes them.
        """
        true = torch.cat([places, torch.ones_like(places)], -1)  # [M, 6]
        named = torch.zeros(len(places), 2, dtype=torch.long)  # [M, 2]
        on = torch.zeros(len(places), dtype=torch.bool)  # [M]
        categories, colors = self.names
        for o in scene.objects:
            if o.category not in data.STRUCTURE:
                mine = instances == o.id
                true[mine] = torch.from_numpy(o.box).float()
                named[mine] = torch.tensor([categories.get(o.category, 0), colors.get(o.colour, 0)])
                on |= mine
        return true, named, on

    def teach(self, scenes: Sequence[Scene], seen: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Compare what was seen with the truth: `detection_loss`."""
        with torch.no_grad():
            seeds = zip(scenes, seen["instances"].cpu(), seen["places"].cpu(), strict=True)
            truth = [self.seed_truth(*seed) for seed in seeds]
            true, named, on = (torch.stack(column).to(self.device) for column in zip(*truth, strict=True))
            # a name's vector is the mean over its tokens
            table = self.embeddings
            words = [torch.stack([table[ids].float().mean(0) for ids in kind]) for kind in self.name_tokens]
        return detection_loss(seen, true, named, on, words)

    def encoder_loss(self, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        """Give the detection loss of a stage without questions, per scene."""
        loss, right = self.teach(scenes, self.see(scenes))
        weight = torch.tensor(float(len(scenes)), device=self.device)
        return {"loss": loss * weight, "weight": weight, "correct": right * weight}

    # -- text and pictures

    def object_to_text(self, scene: Scene, object_id: int) -> str:
        """Name a marked object in a question by its box."""
        return listed(scene.thing(object_id).box)

    @torch.no_grad()
    def token_centers(self, scene: Scene) -> np.ndarray:
        return self.see([scene])["boxes"][0, :, :3].cpu().numpy()

    @torch.no_grad()
    def pictures(self, scenes: Sequence[Scene], folder: Path) -> list[Path]:
        """Draw the way from points to referents, of four scenes: seeds, their votes, and the referents' boxes."""
        paths = [folder / f"{data.safe_name(scene.name)}_referents.png" for scene in scenes[:4]]
        for scene, path in zip(scenes, paths, strict=False):
            seen = self.see([scene])
            seeds, votes, boxes = (seen[key][0].cpu().numpy() for key in ("places", "votes", "boxes"))
            ways = np.stack([seeds, votes, np.full_like(seeds, np.nan)], 1).reshape(-1, 3)  # NaN lifts the pen
            title = f"{scene.name}: {len(seeds)} seeds (gray) vote (blue); {len(boxes)} referents (black, boxes)"
            figure, axes = data.scene_figure(scene, title)
            for axis, n in zip(axes, (2, 3), strict=True):  # from above: x and y
                axis.plot(*ways[:, :n].T, c="lightsteelblue", lw=0.5)
                axis.scatter(*seeds[:, :n].T, c="gray", s=3)
                axis.scatter(*votes[:, :n].T, c="royalblue", s=5)
                axis.scatter(*boxes[:, :n].T, c="black", s=9)
                data.draw_boxes(axis, boxes, color="crimson", alpha=0.15)  # where referents agree the lines add up
            data.save_figure(figure, path)
        return paths


# ---- 8 MODLE: distances measured, layouts edited ---------------------------------------------------------------------
#
# The composition, splits, wordings and scores of MODLE's 263K annotations are not public: all of this section is our
# choice. Objects are named by descriptions that fit them alone (`data.describe`). Distances run from center to center
# of the boxes. Directions are the axes of the scene, and a question says so: "along x to the right" = +x, "along y to
# the back" = +y. What is moved keeps its size and its orientation. A thing that is placed is taken away in thought
# only: the scene still shows it, but its old place counts as free, and an edit is asked only where source and target
# overlap by less than 0.25 IoU, so that its old place is never an answer. Kinds of edits:
#   move   axis      along an axis by an amount
#          towards   along an axis towards another thing by an amount, not past it
#          beside    to an amount along an axis from another thing's center, next to it
#   place  floor     as beside, but on the floor
#          top       in the middle on top of another thing

TEMPLATES: dict[str, tuple[str, ...]] = {
    "modle_distance": (
        "from centre to centre, how far is the {what} from the {other}?",
        "in metres between centres, how far is the {what} from the {other}?",
        "what is the distance from the centre of the {what} to the centre of the {other}?",
        "measure from the centre of the {what} to the centre of the {other}.",
    ),
    "modle_move_axis": (
        "move the {what} {direction} by {amount} metres.",
        "move the {what} by {amount} metres {direction}.",
        "shift the {what} {direction} by {amount} metres.",
        "shift the {what} {amount} metres {direction}.",
    ),
    "modle_move_towards": (
        "move the {what} along {axis} towards the {other} by {amount} metres.",
        "move the {what} by {amount} metres along {axis} towards the {other}.",
        "shift the {what} along {axis} towards the {other} by {amount} metres.",
    ),
    "modle_move_beside": (
        "move the {what} next to the {other}, {direction} of its centre by {amount} metres.",
        "move the {what} next to the {other}: {amount} metres {direction} of its centre.",
        "shift the {what} next to the {other}, {amount} metres {direction} of its centre.",
    ),
    "modle_place_floor": (
        "take the {what} away and put it on the floor, {direction} of the centre of the {other} by {amount} metres.",
        "remove the {what}, then set it on the floor: {amount} metres {direction} of the centre of the {other}.",
    ),
    "modle_place_top": (
        "take the {what} away and put it in the middle on top of the {other}.",
        "remove the {what}, then set it on top of the {other}, in the middle.",
    ),
    "modle_direction": ("along x to the left", "along x to the right", "along y to the front", "along y to the back"),
}
DIRECTION = dict(zip(DIRECTIONS, TEMPLATES["modle_direction"], strict=True))
EDITS = {"modle_move": ("axis", "towards", "beside"), "modle_place": ("floor", "top")}
AMOUNTS = np.arange(2, 31) / 10  # meters of a move
NEXT_TO = 0.6  # meters: the widest gap between what is put next to each other
APART = 0.3  # meters: along the axis of a move "towards", so that the side is clear
SAME_PLACE = 0.25  # IoU of source and target at and above which an edit is not asked
TOUCH = 0.01  # meters: boxes that share more along every axis collide
FLAT = 0.05  # meters: what is lower, a rug, is no obstacle
TOPS = {*data.SURFACES, "coffee table", "end table", "side table", "dining table", "kitchen counter", "counter",
        "cabinet", "kitchen cabinet", "tv stand", "file cabinet"}  # fmt: skip


def ends(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the lowest and the highest corners [..., 3] of boxes [..., 6]."""
    return boxes[..., :3] - boxes[..., 3:] / 2, boxes[..., :3] + boxes[..., 3:] / 2


def collide(a: np.ndarray, b: np.ndarray, slack: float) -> np.ndarray:
    """Say which boxes a [m, 6] stand in boxes b [n, 6], [m, n] bool.

    They do if along every axis they share more than `slack` meters or than half of the thinner one.
    """
    low, high = ends(a)
    lows, highs = ends(b)
    shared = np.minimum(high[:, None], highs) - np.maximum(low[:, None], lows)  # [m, n, 3]
    thin = np.minimum(a[:, None, 3:], b[:, 3:]) / 2  # [m, n, 3]
    return (shared > np.minimum(thin, slack)).all(-1) & (b[:, 5] >= FLAT)


def carried(boxes: np.ndarray, tops: np.ndarray, bounds: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """Say what may hold boxes [m, 6].

    Returns: floor [m], the bottom is less than 5 cm above z = 0; wall [m], within 2 cm of a side of the bounds [2, 3];
    carries [m, n], which of tops [n, 6], at least 10 cm high, ends within 5 cm of the bottom and below the center.
    """
    (low, high), (_, top) = ends(boxes), ends(tops)
    room_low, room_high = (-np.inf, np.inf) if bounds is None else bounds[:, :2]
    gap = np.minimum(low[:, :2] - room_low, room_high - high[:, :2])  # [m, 2]
    below = (np.abs(boxes[:, None, :2] - tops[:, :2]) <= tops[:, 3:5] / 2).all(-1)  # [m, n]
    level = np.abs(low[:, None, 2] - top[:, 2]) < 0.05  # [m, n]
    return low[:, 2] < 0.05, (gap < 0.02).any(1), below & level & (tops[:, 5] >= 0.1)


def room_ends(f: data.Facts) -> tuple[np.ndarray, np.ndarray]:
    """Give the corners [3] of the room: its bounds, or those of all boxes where a scan gives none."""
    low, high = ends(f.boxes)
    return (low.min(0), high.max(0)) if f.bounds is None else tuple(f.bounds)


def in_room(f: data.Facts, boxes: np.ndarray, slack: float) -> np.ndarray:
    """Say which boxes [m, 6] keep inside the room: [m] bool."""
    (low, high), (room_low, room_high) = ends(boxes), room_ends(f)
    return ((low >= room_low - slack) & (high <= room_high + slack)).all(1)


def allowed(f: data.Facts, i: int, boxes: np.ndarray) -> np.ndarray:
    """Say which boxes [m, 6] may be the new place of thing i: [m] bool."""
    others = np.delete(f.boxes, i, axis=0)
    free = in_room(f, boxes, 0.02) & ~collide(boxes, others, TOUCH).any(1)

    # held by the floor, a wall or one other thing; of what stands on unknown ground already that is not asked
    floor, wall, carries = carried(boxes, others, f.bounds)
    held = floor | (carries.sum(1) + wall == 1) | (f.support[i] == data.NOTHING)
    return free & held & (data.box_iou(boxes, f.boxes[i : i + 1])[:, 0] < SAME_PLACE)


def movable(f: data.Facts) -> list[int]:
    """List the things with words of their own that are no part of a wall, no rug, and hold nothing."""
    holding = set(f.support.tolist())
    free = [i for i in f.described if f.things[i].category not in data.BUILT and i not in holding]
    return [i for i in free if f.boxes[i, 5] >= FLAT]


def anchors(f: data.Facts, i: int, kind: str) -> list[int]:
    """List the things from which a kind of edit of thing i may be told."""
    others = [j for j in f.described if j != i]
    if kind == "floor":
        return [j for j in others if f.support[j] == data.FLOOR]
    if kind == "top":
        wide = (f.boxes[:, 3:5] >= f.boxes[i, 3:5]).all(1)
        return [j for j in others if f.category(j) in TOPS and wide[j]]
    return others


def targets(f: data.Facts, i: int, j: int | None, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """List where a kind of edit of thing i, told from thing j, can lead: sides [m], amounts [m] and boxes [m, 6]."""
    box, start = f.boxes[i], f.boxes[i].copy()
    if kind in ("beside", "floor", "top"):
        start[:2] = f.boxes[j, :2]
    if kind == "floor":
        start[2] = box[5] / 2
    if kind == "top":
        start[2] = f.boxes[j, 2] + (f.boxes[j, 5] + box[5]) / 2
        return np.array(["left"]), np.zeros(1), start[None]

    # every direction and amount
    sides, amounts = np.repeat(list(DIRECTIONS), len(AMOUNTS)), np.tile(AMOUNTS, len(DIRECTIONS))
    axes, signs = np.array([DIRECTIONS[side] for side in sides]).T
    boxes = np.repeat(start[None], len(sides), axis=0)
    boxes[np.arange(len(sides)), axes] += signs * amounts

    # those that the words mean
    fits = np.full(len(sides), True)
    if kind == "towards":
        way = (f.boxes[j] - box)[axes] * signs
        fits = (way >= APART) & (amounts <= way)
    if kind in ("beside", "floor"):
        fits = amounts <= (f.boxes[j] + box)[axes + 3] / 2 + NEXT_TO
    return sides[fits], amounts[fits], boxes[fits]


def modle_distance(scene: Scene, rng: np.random.Generator) -> Sample | None:
    """Ask for the meters between the centers of two described things."""
    f = facts(scene)
    for _ in range(4):
        pair = several(rng, list(f.described), 2)
        length = float(f.apart[1][tuple(pair)]) if pair else 0.0
        if length >= 0.1:
            text = {"what": f.described[pair[0]], "other": f.described[pair[1]]}
            about = [f.things[k].id for k in pair]
            return data.ask(scene, rng, "modle_distance", metres(length), text, value=length, about=about)
    return None


def modle_edit(scene: Scene, rng: np.random.Generator, task: str) -> Sample | None:
    """Ask for the new box of a described thing that is moved or placed, by one of the kinds of EDITS."""
    f = facts(scene)
    things = movable(f)
    if task == "modle_place":
        things = [i for i in things if f.support[i] != data.WALL]
    for i in several(rng, things, min(4, len(things))):
        # how it is told
        kind = pick(rng, EDITS[task])
        j = None if kind == "axis" else pick(rng, anchors(f, i, kind))
        if j is None and kind != "axis":
            continue

        # one of the free places that this can mean
        sides, amounts, boxes = targets(f, i, j, kind)
        free = np.flatnonzero(allowed(f, i, boxes))
        if not len(free):
            continue
        k = free[0] if kind == "top" else pick(rng, free)

        named = [i] if j is None else [i, j]
        text = dict(zip(("what", "other"), (f.described[n] for n in named), strict=False))
        text |= {"direction": DIRECTION[sides[k]], "axis": "xy"[DIRECTIONS[sides[k]][0]], "amount": metres(amounts[k])}
        answer, about = listed(boxes[k]), [f.things[n].id for n in named]
        return data.ask(scene, rng, task, answer, text, template=f"{task}_{kind}", kind=kind, box=boxes[k], about=about)
    return None


TASKS: dict[str, Callable[[Scene, np.random.Generator], Sample | None]] = {
    "modle_distance": modle_distance,
    "modle_move": partial(modle_edit, task="modle_move"),
    "modle_place": partial(modle_edit, task="modle_place"),
}
METRIC = set(TASKS)  # answers are meters
GEOMETRY_TASKS = tuple(TASKS)  # none needs a category
UNLABELLED = ("ground_superlative", "modle_distance", "modle_move")  # what stands in for questions that need names

# Scores of an answer: functions of (text, sample, scene).

FAR = 10.0  # meters: no error counts more, no answer counts as much


def distance_error(text: str, sample: Sample) -> float:
    """Meters between the first number of an answer and the truth."""
    found = re.search(r"\d+(\.\d+)?", data.TUPLE.sub(" ", text))
    return min(abs(float(found[0]) - sample.value), FAR) if found else FAR


def relative_error(text: str, sample: Sample) -> float:
    """The distance error over the true distance, at most 1."""
    return min(distance_error(text, sample) / sample.value, 1.0)


def mean_relative_accuracy(text: str, sample: Sample) -> float:
    """VSI-Bench's MRA: the share of the thresholds 0.50, 0.55 .. 0.95 that 1 - relative error reaches."""
    return float(np.mean(relative_error(text, sample) <= 1 - np.linspace(0.5, 0.95, 10)))


def read_box(text: str) -> np.ndarray | None:
    """The first bracketed six numbers of an answer [6], or None, also for a box without volume."""
    found = data.tuples(text, 6)[:1]
    return found[0] if found and found[0] is not None and (found[0][3:] > 0).all() else None


def accuracy(text: str, sample: Sample, threshold: float) -> float:
    """1 if the answered and the true box overlap by that IoU."""
    found = read_box(text)
    return float(found is not None and data.box_iou(found[None], sample.box[None])[0, 0] >= threshold)


def center_error(text: str, sample: Sample) -> float:
    """Meters between the centers of the answered and the true box."""
    found = read_box(text)
    return FAR if found is None else min(float(np.linalg.norm((found - sample.box)[:3])), FAR)


def error_over_move(text: str, sample: Sample, scene: Scene) -> float:
    """The center error over the length of the true move: 0 = there, 1 = as good as not moved, at most 2."""
    move = (sample.box - scene.thing(sample.about[0]).box)[:3]
    return min(center_error(text, sample) / max(float(np.linalg.norm(move)), 1e-6), 2.0)


def collides(text: str, sample: Sample, scene: Scene) -> float:
    """1 if the answered box stands in another thing or out of the room by over 5 cm, or is none."""
    found, f = read_box(text), facts(scene)
    if found is None:
        return 1.0
    others = f.boxes[[o.id != sample.about[0] for o in f.things]]
    return float(collide(found[None], others, 0.05).any() or not in_room(f, found[None], 0.05)[0])


DISTANCE = {
    "within_20_percent/number": lambda text, sample, scene: float(relative_error(text, sample) <= 0.2),
    "within_10_percent/number": lambda text, sample, scene: float(relative_error(text, sample) <= 0.1),
    "mae_m/capped": lambda text, sample, scene: distance_error(text, sample),
    "relative_error/capped": lambda text, sample, scene: relative_error(text, sample),
    "mra/number": lambda text, sample, scene: mean_relative_accuracy(text, sample),
}
EDIT = {
    "acc@0.25/box": lambda text, sample, scene: accuracy(text, sample, 0.25),
    "acc@0.5/box": lambda text, sample, scene: accuracy(text, sample, 0.5),
    "center_error_over_move/capped": error_over_move,
    "center_error_m/capped": lambda text, sample, scene: center_error(text, sample),
    "collision_rate/5_cm": collides,
}
BENCHMARKS = {  # the first metric is the headline; tokens: the longest answer
    "rooms/modle_distance": dict(tasks=("modle_distance",), metrics=DISTANCE, tokens=64),
    "rooms/modle_move": dict(tasks=("modle_move",), metrics=EDIT, tokens=64),
    "rooms/modle_place": dict(tasks=("modle_place",), metrics=EDIT, tokens=64),
}

# Writing it down. 219 questions for each of ScanNet's 1,201 training scans are the paper's 263K.

PER_SCENE = {"modle_distance": 88, "modle_move": 77, "modle_place": 54}
FRAME = "meters in the scan's aligned axes: x to the right, y to the back, z up; boxes [cx, cy, cz, w, d, h]"


def annotation(sample: Sample, scene: Scene) -> dict:
    """Write a question as JSON, with ScanNet's own object numbers.

    "source" is the box before an edit: whoever wants the thing gone from the cloud drops the first of "object_ids".
    """
    row = {"id": sample.id, "scene_id": scene.name, "task": sample.task, "kind": sample.kind}
    row |= {"question": sample.question, "answers": [sample.answer], "object_ids": [i - 1 for i in sample.about]}
    if sample.box is None:
        return row | {"value": round(sample.value, 4)}
    boxes = {"box": sample.box, "source": scene.thing(sample.about[0]).box}
    return row | {key: box.round(4).tolist() for key, box in boxes.items()}


def write_modle(root: Path, out: Path, seed: int = 0) -> dict:
    """Write MODLE for the scans below a ScanNet-layout root: OUT/train.json, OUT/val.json and OUT/manifest.json.

    A scan gives as many different questions of each task as PER_SCENE says, or as many as it can. The same seed gives
    the same files. Returns: the manifest, with the counts per task.
    """
    manifest = {"seed": seed, "frame": FRAME, "per_scene": PER_SCENE}
    out.mkdir(parents=True, exist_ok=True)
    for split, scans in zip(("train", "val"), data.scan_ids(root).values(), strict=True):
        rows = []
        for scan in scans:
            scene = data.read_scannet(root, scan, max_frames=0)
            for task, count in PER_SCENE.items():
                rows += [annotation(s, scene) for s in data.question_set([scene], [task], count, seed)]
        lines = ",\n".join(map(json.dumps, rows))
        (out / f"{split}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        manifest[split] = Counter(row["task"] for row in rows)
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return manifest


# ---- 9 the recipe ----------------------------------------------------------------------------------------------------

INSTRUCTIONS = {  # official files beside MODLE; the paper's counts are not public: these are the training files' own
    "ScanQA": Source("scanqa", 25_563),
    "SQA3D": Source("sqa3d", 26_623),
    "ScanRefer": Source("scanrefer", 36_665, "id"),
    "Scan2Cap": Source("scan2cap", 36_665),
    "3D-LLM planning": Source("3dllm/planning", 1864),
    "3D-LLM descriptions": Source("3dllm/description", 1033),
}
GROUNDING = {"ground": 0.15, "multi": 0.05, "situated": 0.05}
USUAL = {"colour": 0.04, "what": 0.05, "where": 0.03, "count": 0.03, "exist": 0.06, "caption": 0.04}
MODLE = {"modle_distance": 0.2, "modle_move": 0.2, "modle_place": 0.08}

STAGES = {
    "paper": [  # not public: VoteNet's encoder training, 3DMIT's instruction tuning
        Stage("0 encoder", {}, ("encoder", "scene"), "encoder", epochs=180, batch=8, lr=1e-3, weight_decay=0.01),
        Stage(
            "I instructions",
            GROUNDING | USUAL | MODLE,
            ("scene", "code", "lm"),
            "referents",
            epochs=2,
            samples=537_000,  # of which MODLE's share is its 263,000
            batch=128,
            per_scene=8,
            lr=5e-4,
            betas=(0.9, 0.95),
            weight_decay=1e-3,
            warmup=0.03,
            files=INSTRUCTIONS,
        ),
    ]
}


def recipe(config: Config, stages: list[Stage]) -> list[Stage]:
    """Give the stages for a configuration: a loaded language model needs no symbols to learn words from."""
    return [s for s in stages if config.llm is None or s.scene_input != "symbols"]


# ---- 10 alternatives the paper compares with -------------------------------------------------------------------------


class Concatenation(nn.Module):
    """Instead of the graph: a referent beside its k nearest, features side by side, through one layer."""

    def __init__(self, config: Config):
        super().__init__()
        self.k, C = config.neighbors, config.feature
        self.norm, self.out = nn.LayerNorm(C), nn.Linear((self.k + 1) * C, C)

    def forward(self, h: Tensor, q: Tensor) -> Tensor:
        """Read h [B, R, C] at q [B, R, 3] with its neighbors: [B, R, C]; of fewer than k the nearest come again."""
        R, k = h.shape[1], self.k
        near = torch.cdist(q, q).topk(min(k + 1, R), largest=False).indices  # [B, R, .]
        near = near[..., torch.arange(k + 1, device=h.device) % R]  # [B, R, k + 1]
        return h + F.relu(self.out(gather(self.norm(h), near).flatten(2)))  # [B, R, C]


class NoMessages(nn.Module):
    """Instead of the graph: referents stay as they are."""

    def __init__(self, config: Config):
        super().__init__()

    def forward(self, h: Tensor, q: Tensor) -> Tensor:
        return h


INTER = {"graph": InterReferentGraph, "concat": Concatenation, "off": NoMessages}


# ---- 11 demo and command line ----------------------------------------------------------------------------------------


def demo() -> None:
    """Take one room from points to an answer, with real shapes, by a tiny model that learns its questions by heart."""
    torch.manual_seed(0)
    scene = data.room(1, views=0)
    scene.identifiers = data.number_objects(scene, np.random.default_rng(0))
    model = build(Config.tiny(), data.TinyText(data.vocabulary()))
    tasks = {"modle_distance": 1.0, "modle_move": 1.0}
    model.configure_stage(Stage("demo", tasks, ("scene", "code", "lm"), "referents", steps=True))
    model.cache_features([scene])
    samples = data.questions(scene, tasks, 8, np.random.default_rng(1))

    with torch.no_grad():
        seen = model.see([scene])
        shown = {
            "cloud [N, 3]": scene.points,
            "seeds [B, M, 3]": seen["places"],
            "votes [B, M, 3]": seen["votes"],
            "graph [B, R, R]": neighbor_graph(seen["boxes"][..., :3], model.config.neighbors),
            "boxes of referents [B, R, 6]": seen["boxes"],
            "scene tokens [B, K, D]": model.encode([scene])["tokens"],
            "packed questions [S, T]": model.batch([(scene, samples)])["ids"],
        }
    for name, values in shown.items():
        print(f"{name:30}{list(values.shape)}")
    data.overfit_demo(model, scene, samples, 61, 3e-3)


@data.command
def main(arguments: Sequence[str]) -> None:
    """Show the demo, or write MODLE's annotations."""
    data.adopt(sys.modules[__name__])
    parser = argparse.ArgumentParser(description="Spatial 3D-LLM: without arguments a demo.")
    modle = parser.add_subparsers(dest="command").add_parser("modle", help="write MODLE's annotations for scans")
    modle.add_argument("--root", type=Path, required=True, help="a folder of scans in ScanNet's layout")
    modle.add_argument("--out", type=Path, required=True, help="folder for train.json, val.json and manifest.json")
    modle.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(arguments)
    if a.command == "modle":
        print(json.dumps(write_modle(a.root, a.out, a.seed), indent=1))
    else:
        demo()


# ==== tiny preset: trains from nothing on a CPU; not in the paper, skip on a first reading ==========================
#
# Nothing is pre-trained here. In its place: an initialization that attends to what shares content and copies it,
# number tokens that start as the code of their own value, stages on *symbols* (one token per object: its words and its
# true box), cheap set abstractions, seeds spread by color and normal too, so that small things own some, and answers
# that write their steps. Steps hold only what the scene shows, what stands just before, or one sum of two neighbors:
#   distance  red chair [x, y, z] bed [x, y, z] xa xb dx ya yb dy za zb dz = d
#   axis      red chair [box] x1.25 right 0.80 x2.05 = [box]
#   towards   red chair [box] bed [x, y, z] x1.25 left 0.80 x0.45 = [box]
#   beside    red chair [box] bed [x, y, z] x0.20 right 1.30 x1.50 = [box]          (from the bed's x, at its y)
#   floor     red vase [box] bed [x, y, z] x0.20 right 1.30 x1.50 z0.00 h0.36 z0.18 = [box]
#   top       red vase [box] table [box] z0.37 h0.74 z0.74 h0.36 z0.92 = [box]      (z + h / 2, twice)


class TinySetAbstraction(nn.Module):
    """A set abstraction whose MLP is one linear layer before the maximum, and the rest behind it.

    A linear layer of [feature, (point - center) / radius] runs once per point and once per center, not once per pair.
    """

    def __init__(self, inputs: int, widths: Sequence[int], radius: float):
        super().__init__()
        self.radius = radius
        self.feature, self.place = nn.Linear(inputs, widths[0]), nn.Linear(3, widths[0], bias=False)
        layers = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.ReLU(), nn.Linear(a, b)]
        self.out = nn.Sequential(*layers, nn.LayerNorm(widths[-1]))

    def forward(self, f: Tensor, p: Tensor, q: Tensor, index: Tensor) -> Tensor:
        """Abstract f [B, N, C] at p [B, N, 3] to centers q [B, M, 3] with balls index [B, M, P]: [B, M, widths[-1]]."""
        place = self.place.weight.T / self.radius  # [3, hidden]
        points = self.feature(f) + p @ place  # [B, N, hidden]

        # the maximum over each ball, as a bag of rows of all scenes: [B, M, P, hidden] is never held
        B, N, _ = points.shape
        rows = index + torch.arange(B, device=index.device)[:, None, None] * N  # [B, M, P]
        h = F.embedding_bag(rows.flatten(0, 1), points.flatten(0, 1), mode="max")  # [B*M, hidden]
        return self.out(h.view(B, -1, points.shape[2]) - q @ place)


def build_llm(config: Config, vocabulary: int) -> nn.Module:
    """Build a small Llama from its configuration: the class that `from_pretrained` loads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=config.width,
        intermediate_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=32768,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=True,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(shape)


@torch.no_grad()
def start_tiny(model: Model, text: data.TinyText) -> None:
    """Give a model from a configuration what pre-training would: attend to what shares content, copy it unchanged.

    The weights are scaled for a width of 100s, not 1000s; embeddings have unit size and the logits a small gain. The
    token of a number starts as the code that a referent with this number carries, so that reading a box is the same
    copy as reading a name. All of it is trained on.
    """
    llm, D = model.llm.model, model.config.width
    data.start_weights(llm)
    data.start_decoder(llm, model.config.heads)
    model.projector[-1].weight.fill_(1.0)

    # one random map from Fourier features to embeddings per axis; l are lengths, of no axis
    table, W = llm.embed_tokens.weight, len(BOX_FREQUENCIES)
    nn.init.normal_(table)
    maps = dict(zip("xyzwdhl", torch.randn(7, 2 * W, D) / math.sqrt(W), strict=True))
    for token, (axis, value) in text.number.items():
        phase = value * BOX_FREQUENCIES
        table[token] = torch.cat([phase.cos(), phase.sin()]) @ maps[axis] + 0.3 * torch.randn(D)

    # a place starts at a third of its words' strength, a size at a quarter: at full strength both would drown the words
    # that grounding needs
    gain = dict(zip("xyzwdh", [0.35] * 3 + [0.25] * 3, strict=True))
    model.code.out.weight.copy_(torch.cat([gain[axis] * maps[axis] for axis in gain]).T)


class TinyModel(Model):
    """The model around a small Llama from a configuration, which may also read symbols and writes steps."""

    scene_inputs = ("encoder", "symbols", "referents")
    level = TinySetAbstraction

    def __init__(self, config: Config, text: data.TinyText):
        super().__init__(config, text)
        self.frozen_pretrained_names = ()
        self.no_name = text.unk
        start_tiny(self, text)

    def make_llm(self) -> nn.Module:
        return build_llm(self.config, len(self.text))

    def sampling_space(self, p: np.ndarray, color: np.ndarray, normal: np.ndarray) -> np.ndarray:
        """Spread centers by place, color and normal, so that small things own some: [N, 9]."""
        return np.concatenate([p, self.config.spread * color, self.config.spread_normal * normal], 1)

    def uses_features(self) -> bool:
        return self.stage.scene_input != "symbols"

    def scene_length(self, scene: Scene) -> int:
        return len(scene.objects) if self.stage.scene_input == "symbols" else super().scene_length(scene)

    def symbols(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """Stand in for referents, one per object in random order: words [n, D], true boxes [n, 6]."""
        order = np.random.default_rng(list(scene.identifiers.values())).permutation(len(scene.objects))
        things = [scene.objects[i] for i in order]
        names = [[self.text.encode(name) or [self.no_name] for name in (o.category, o.colour)] for o in things]
        first = torch.tensor([[ids[0] for ids in pair] for pair in names], device=self.device)  # [n, 2]
        boxes = torch.from_numpy(np.stack([o.box for o in things])).float()  # [n, 6]
        return F.layer_norm(self.embeddings[first].sum(1), (self.config.width,)), boxes.to(self.device)

    def encode(self, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        """Turn scenes into "tokens" [B, K, D] and "valid" [B, K]: symbols or referents."""
        if self.stage.scene_input != "symbols":
            return super().encode(scenes)
        rows = [self.symbols(scene) for scene in scenes]
        words, boxes = (pad_sequence(part, batch_first=True) for part in zip(*rows, strict=True))
        lengths = torch.tensor([len(scene.objects) for scene in scenes])
        valid = torch.arange(words.shape[1]) < lengths[:, None]  # [B, K]
        return {"tokens": self.add_locations(words, boxes), "valid": valid.to(self.device)}

    def write_marks(self, scene: Scene, sample: Sample) -> Sample:
        """Write the steps of an answer too, and the answer that follows from them."""
        if self.training and sample.task in BENCHMARK_TASKS:
            steps, answer = written_steps(scene, sample)
            sample = replace(sample, steps=f"{steps} =", answer=answer)
        return super().write_marks(scene, sample)


BENCHMARK_TASKS = ("modle_distance", *EDITS)


def shift_steps(axis: int, value: float, side: str, amount: float) -> tuple[str, float]:
    """Write a shift, "x1.25 right 0.80 x2.05"; give the sum of the printed numbers too."""
    total = round(round(value, 2) + DIRECTIONS[side][1] * amount, 2)
    return f"{'xyz'[axis]}{metres(value)} {side} {metres(amount)} {'xyz'[axis]}{metres(total)}", total


def stack_steps(z: float, height: float) -> tuple[str, float]:
    """Write the steps of half a height, "z0.74 h0.36 z0.92"; give the printed sum z + height / 2 too."""
    total = round(round(z, 2) + round(height, 2) / 2, 2)
    return f"z{metres(z)} h{metres(height)} z{metres(total)}", total


def written_steps(scene: Scene, sample: Sample) -> tuple[str, str]:
    """Write the steps of one of MODLE's questions; give the answer that follows from their printed numbers too."""
    things = [scene.thing(i) for i in sample.about]
    names, boxes = [data.describe(scene, thing) for thing in things], [thing.box for thing in things]
    if sample.task == "modle_distance":
        sums, length = data.chain(*(box[:3].tolist() for box in boxes))
        return " ".join(f"{n} {listed(b[:3])}" for n, b in zip(names, boxes, strict=True)) + f" {sums}", metres(length)

    # where things are
    steps = [f"{names[0]} {listed(boxes[0])}"]
    for name, box in zip(names[1:], boxes[1:], strict=True):
        steps.append(f"{name} {listed(box if sample.kind == 'top' else box[:3])}")

    # along the floor: from the own place, or from the other thing's
    answer = sample.box.copy()
    if sample.kind != "top":
        start = boxes[0 if sample.kind in ("axis", "towards") else 1]
        move = (sample.box - start)[:2]
        axis = int(np.abs(move).argmax())
        side = next(side for side, (k, sign) in DIRECTIONS.items() if k == axis and sign * move[k] > 0)
        shift, answer[axis] = shift_steps(axis, start[axis], side, abs(move[axis]))
        steps.append(shift)

    # and up
    z = 0.0
    if sample.kind == "top":
        climb, z = stack_steps(boxes[1][2], boxes[1][5])
        steps.append(climb)
    if sample.kind in ("floor", "top"):
        climb, answer[2] = stack_steps(z, boxes[0][5])
        steps.append(climb if sample.kind == "floor" else climb.partition(" ")[2])
    return " ".join(steps), listed(answer)


def modle_drill(scene: Scene, rng: np.random.Generator, task: str) -> Sample | None:
    """Text only, inside the room: modle_add "x1.25 right 0.80 =" -> "x2.05", modle_stack "z0.74 h0.36 =" -> "z0.92"."""
    f = facts(scene)
    if not len(f.boxes):
        return None
    lo, hi = room_ends(f)
    if task == "modle_stack":
        z = 0.0 if rng.random() < 0.3 else rng.uniform(0, max(hi[2] / 2, 0.1))  # things are put on floors, and on tops
        steps, value = stack_steps(z, rng.uniform(0.05, max(hi[2] - z, 0.1)))
    else:
        side = pick(rng, tuple(DIRECTIONS))
        axis = DIRECTIONS[side][0]
        steps, value = shift_steps(axis, rng.uniform(lo[axis], hi[axis]), side, float(pick(rng, AMOUNTS)))
    numbers, answer = steps.rsplit(" ", 1)
    return data.ask(scene, rng, task, answer, {"numbers": numbers}, value=value)


def modle_refuse(scene: Scene, rng: np.random.Generator) -> Sample | None:
    """Ask what nobody can follow, answered by a fixed sentence.

    Ambiguous is a request that says "the chair" where there are several, or "the red thing" where nothing has a
    category; contradictory are opposite directions at once, and a thing towards or on itself.
    """
    f = facts(scene)
    kind = pick(rng, ("ambiguous", "contradictory"))
    several_of = [key for key, members in f.groups.items() if len(members) > 1]
    key = pick(rng, [k for k in several_of if not k[1]] or [k for k in several_of if not k[0]])
    known = pick(rng, list(f.described.values()))
    if known is None or (kind == "ambiguous" and key is None):
        return None

    side, amount = pick(rng, tuple(DIRECTIONS)), metres(pick(rng, AMOUNTS))
    opposite = next(s for s, (axis, _) in DIRECTIONS.items() if axis == DIRECTIONS[side][0] and s != side)
    text = {"what": known, "direction": DIRECTION[side], "opposite": DIRECTION[opposite], "amount": amount}
    ambiguous, contradictory = TEMPLATES["modle_refusal"]
    if kind == "contradictory":
        return data.ask(scene, rng, "modle_refuse", contradictory, text, template="modle_contradiction")

    template = pick(rng, ("modle_distance", "modle_move_axis", "modle_move_towards", "modle_place_floor"))
    words = data.phrase(*key)
    what, other = (words, "") if template == "modle_move_axis" else several(rng, [known, words], 2)
    text |= {"what": what, "other": other, "axis": "xy"[DIRECTIONS[side][0]]}
    return data.ask(scene, rng, "modle_refuse", ambiguous, text, template=template)


TEMPLATES |= {
    "modle_contradiction": (
        "move the {what} {direction} and {opposite} by {amount} metres.",
        "shift the {what} by {amount} metres {direction} and {opposite}.",
        "move the {what} {amount} metres towards the {what}.",
        "take the {what} away and put it in the middle on top of the {what}.",
    ),
    "modle_refusal": ("more than one thing fits.", "this contradicts itself."),
    "modle_add": ("{numbers} =",),
    "modle_stack": ("{numbers} =",),
}
DRILLS = {task: partial(modle_drill, task=task) for task in ("modle_add", "modle_stack")}
TASKS |= DRILLS | {"modle_refuse": modle_refuse}
METRIC |= set(DRILLS)
GEOMETRY_TASKS += (*DRILLS, "modle_refuse")

_TINY = dict(lr=2e-3, weight_decay=0.01, per_scene=16, batch=256, schedule="constant", warmup=0.1, steps=True)

STAGES["tiny"] = [  # the encoder comes third: its classes are the word vectors that the first two have taught
    Stage("I locations", {"ground": 0.4, "ground_multiple": 0.2, "ground_category": 0.2, "colour": 0.2},
          ("code", "lm"), "symbols", iterations=340, recolour=True, **_TINY),
    Stage("II steps", {"subtract": 0.27, "norm": 0.05, "modle_add": 0.24, "modle_stack": 0.03, "ground": 0.06,
                       "colour": 0.02, "what": 0.03, "exist": 0.05, "count": 0.02, "modle_distance": 0.13,
                       "modle_move": 0.15, "modle_refuse": 0.06},
          ("code", "lm"), "symbols", iterations=800, recolour=True, **{**_TINY, "batch": 192, "per_scene": 12}),
    Stage("III encoder", {}, ("encoder", "scene"), "encoder", iterations=900, batch=16, lr=3e-3, schedule="cosine",
          warmup=0.04, weight_decay=0.01),
    Stage("IV referents", {"ground": 0.08, "subtract": 0.06, "modle_add": 0.1, "modle_stack": 0.03, **USUAL, **MODLE,
                           "modle_refuse": 0.08},
          ("scene", "code", "lm"), "referents", iterations=600,
          **{**_TINY, "schedule": "trapezoid", "batch": 128, "per_scene": 8}),
]  # fmt: skip


def build(config: Config, text: data.TinyText | data.HubText) -> Model:
    """Build the model of a configuration: from nothing where it names no language model."""
    return TinyModel(config, text) if config.llm is None else Model(config, text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
