"""Spatial 3D-LLM: Exploring Spatial Awareness in 3D Vision-Language Models.

ICME 2025, arXiv 2507.16524. Of this paper only the abstract, descriptions by others and the names
of its parts are public: neither equations nor sizes, losses or schedules. The parts below are built
after the nearest public relatives, and every choice is listed.

Idea. A cloud of points becomes a few hundred *referents*, tokens that know where they are. Each
gathers the seeds (points with features) that vote for the same object (intra-referent), hears its neighbors
(inter-referent) and looks back at the whole scene (contextual). A language model reads them and
writes locations as text: boxes, distances, edited layouts. Things are named by description ("the
red chair") or by their box in text, never by an identifier.

  cloud p [N, 3], f [N, 7] = color, normal, height
    | PointNet2: four set abstractions, two feature propagations; trained by its own stage, frozen
  seeds f [M, C] at p [M, 3], the points that keep features
    | IntraReferent: seeds vote for centers of objects; balls around the first R votes, pooled
  referents h [R, C] at their votes q [R, 3]
    | InterReferentGraph: two graph convolutions over the nearest referents
    | ReferentSceneAttention: cross-attention to all seeds
  referents h [R, C] -> boxes [R, 6]
    | projector(h) + code(waves of boxes)
  scene tokens [R, D] -> Llama with LoRA -> "[1.25, -0.80, 0.45, 0.50, 0.50, 0.90]"

Axes: B scenes (in data.py S), N points, M centers of a level or seeds, R referents, P points of a ball or
neighbors, C channels, H heads, L tokens of attention, W waves, K scene tokens (K = R), D width of the language
model, T text. Tensors carry no annotation but their shape: f are features, p places of points or seeds, q
centers, v votes, h referents.

| paper                                     | here                                             |
| scene encoder, PointNet++, frozen         | SetAbstraction, FeaturePropagation, PointNet2    |
| intra-referent clustering and abstraction | IntraReferent                                    |
| inter-referent message passing            | neighbor_graph, InterReferentGraph               |
| contextual referent-scene interaction     | ReferentSceneAttention                           |
| location-enriched scene embeddings        | data.fourier_waves, Model.add_locations          |
| Vicuna-7B, instruction tuning             | Model.load_llm, STAGES["paper"]                  |
| MODLE (abstract: 263K annotations)        | data.distance, modle_edit, write_modle           |
| ablations of the three modules            | Config.intra, .inter, .context, .positions       |

What is not public, and what we chose (all sizes below are ours or a relative's)
- Encoder: VoteNet's backbone, set abstractions 2048/0.2 m, 1024/0.4, 512/0.8, 256/1.2 with 64, 32,
  16, 16 points and two feature propagations to 1,024 seeds of 256 channels; LayerNorm in place of
  BatchNorm, so that a scene's features depend on no other scene. A ball takes its *nearest* points,
  not the first in memory: the order of the points changes nothing. All levels and the referents are
  prefixes of one farthest-point order. A cloud of fewer points than are read gives each of them
  several times.
- Votes: Vote2Cap-DETR's vote query, which the descriptions match step by step: an FFN gives an
  offset and a feature, referents are sampled from the seeds before they move and grouped after,
  radius 0.3 m, 16 votes, max pool, 256 referents. VoteNet divides a vote's feature by its length; here
  the LayerNorm of the next layer keeps sizes in bounds.
- Graph: Scan2Cap's 10 neighbors by center, symmetric, with self loops; h + ReLU(G LN(h) W) with a learned W
  and G = deg^-1/2 adj deg^-1/2, two layers.
- Context: one pre-norm cross-attention over all seeds and an FFN, 8 heads, random Fourier features
  of places. What a referent sees is written relative to its own place.
- Boxes: an MLP on the referent gives the rest of the way to the object's center, and its size. The
  language model reads the six numbers through one linear map of their Fourier features (wavelengths
  0.5 to 16 m), added to the token.
- Encoder training: votes (smooth L1), boxes (smooth L1 on center and log size) and semantic class,
  told by the nearest word vector of the language model, that of the first token of category and of color.
  The parts weigh 2, 2 and 1, sizes half of centers, what lies on no object 0.1 (names 0.3). The same loss, at
  0.2, goes on beside the questions, for all that stands behind the encoder, which stays frozen. A trained
  encoder starts another run (`train.py --init RUN --stages`).
- A frozen encoder sees a scene as it was scanned, and so do the modules behind it; where training
  turns or mirrors the scene (`data.augment`), only the boxes and votes they found are turned after them. What
  features still know of the scanned orientation then contradicts the answers, so the language model learns to
  take places from the code of the boxes alone.
- Language: LoRA of rank 32 on q, k, v, o and the schedule of the same group's 3DMIT (2 epochs,
  batch 128, 5e-4); loss on the answer only. Boxes in meters with two decimals.
- All of MODLE: see its section. The tiny preset: see the last section; none of it touches a loaded
  model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from data import DataError, Source, Stage, box_ends, listed, meters, pick, several

# ---- configuration -------------------------------------------------------------------------------


@dataclass
class Config:
    """Every number of the model: `paper()` as far as known, `tiny()` trains from nothing."""

    llm: str | None = None  # name or folder of a Llama (Vicuna); None builds a tiny one
    points: int = 40_000  # of the cloud that are read; VoteNet 40,000
    centers: tuple = (2048, 1024, 512, 256)  # how many, of the four set abstractions; seeds: the second
    radii: tuple = (0.2, 0.4, 0.8, 1.2)  # meters, of their balls
    samples: tuple = (64, 32, 16, 16)  # nearest points per ball
    feature: int = 256  # channels C of seeds and referents
    referents: int = 256
    ball: float = 0.3  # meters around a vote
    ball_samples: int = 16
    ball_layers: int = 3  # of the MLP over a ball's votes
    neighbors: int = 10  # of the referents' graph
    graph_layers: int = 2
    context_heads: int = 8
    fourier: int = 128  # random features of the contextual positions
    intra: bool = True  # False: referents are seeds as they are, no votes, no abstraction
    inter: str = "graph"  # a key of INTER
    context: bool = True  # False: referents never look back at the scene
    positions: bool = True  # False: no place enters attention or tokens; of height the points' features know
    detection_weight: float = 0.2  # of the detection loss beside the questions
    lora_rank: int = 32  # of a loaded model, and its alpha; 3DMIT 32
    lora_dropout: float = 0.1
    dtype: str = "float32"  # of a loaded model's weights
    # the tiny preset only: its language model, and how far color and normal spread the centers
    reader: tuple[int, ...] = data.READER
    spread: float = 2.0  # meters per unit of color
    spread_normal: float = 0.3  # meters per unit of normal

    @classmethod
    def tiny(cls, **changes) -> Config:
        small = dict(
            points=2048,
            centers=(512, 256, 128, 64),
            samples=(8, 8, 8, 8),
            ball_samples=8,
            feature=128,
            referents=96,
            ball_layers=2,
            context_heads=4,
            fourier=48,
        )
        return cls(**small | changes)

    @classmethod
    def paper(cls, **changes) -> Config:
        return cls(**dict(llm="lmsys/vicuna-7b-v1.5", dtype="bfloat16") | changes)


# ---- 1 geometry of a cloud, worked out once per scene --------------------------------------------


def ball_query(q, p, radius, samples):
    """Find the nearest `samples` points p [N, 3] within `radius` of every center q [M, 3].

    Returns: indices [M, samples]; where a ball holds fewer, the nearest point is repeated, which a maximum
    does not feel.
    """
    distance, index = data.knn(q, p, samples)
    return torch.where(distance <= radius, index, index[:, :1])


def interpolation(fine, coarse):
    """Find the three nearest coarse points of every fine one, and weights by inverse distance.

    Args: fine [N, 3], coarse [M, 3]. Returns: indices [N, 3] into the coarse, weights [N, 3].
    """
    distance, index = data.knn(fine, coarse, 3)
    weight = 1 / (distance + 1e-8)
    return index, (weight / weight.sum(1, keepdim=True)).float()


def cloud_geometry(p, space, counts, radii, samples):
    """Work out which points each level of PointNet++ looks at.

    Args: p [N, 3] meters; space [N, .] in which centers are spread, p itself or more; per level the
    count of centers, the radius of their balls in meters, and how many points each takes.
    Returns: "order" [M1] of the first level's centers; per level i "ball{i}" [M, P]; per
    propagation from level i + 1 to i "near{i}" and "weight{i}" [M, 3].
    """
    # every prefix of a farthest-point order is itself a farthest-point sample, so one order serves
    # all levels
    order = data.farthest_point_sampling(space, counts[0])  # [M1]
    levels = [p, *(p[order[:count]] for count in counts)]

    found = {"order": order}
    for i, (fine, coarse) in enumerate(itertools.pairwise(levels)):
        found[f"ball{i}"] = ball_query(coarse, fine, radii[i], samples[i])
    for i in (3, 2):
        found[f"near{i}"], found[f"weight{i}"] = interpolation(levels[i], levels[i + 1])
    return found


# ---- 2 scene encoder: PointNet++ -----------------------------------------------------------------


def gather(values, index):
    """Take values [B, N, C] at index [B, ...]: [B, ..., C]."""
    return torch.stack([v[i] for v, i in zip(values, index, strict=True)])


def mlp(*widths):
    """Stack linear layers with ReLU between them."""
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class SetAbstraction(nn.Module):
    """One level of PointNet++: max over a ball of MLP([feature, (point - center) / radius])."""

    def __init__(self, widths, radius):
        super().__init__()
        self.radius = radius
        layers = []
        for a, b in itertools.pairwise([widths[0] + 3, *widths[1:]]):
            layers += [nn.Linear(a, b), nn.LayerNorm(b), nn.ReLU()]
        self.mlp = nn.Sequential(*layers)

    def forward(self, f, p, q, index):
        """Abstract f [B, N, C] at p [B, N, 3] to centers q [B, M, 3] with balls index [B, M, P].

        Returns: [B, M, widths[-1]].
        """
        place = (gather(p, index) - q[:, :, None]) / self.radius  # [B, M, P, 3]
        pairs = torch.cat([gather(f, index), place], -1)  # [B, M, P, inputs]
        return self.mlp(pairs).amax(2)  # [B, M, outputs]


class FeaturePropagation(nn.Module):
    """Coarse features interpolated to finer points, beside what those had, through an MLP."""

    def __init__(self, C: int):
        super().__init__()
        self.mlp, self.norm = mlp(2 * C, C, C), nn.LayerNorm(C)

    def forward(self, coarse, fine, index, weight):
        """Carry coarse [B, M, C] to finer points that have fine [B, N, C].

        Args: index [B, N, 3] into M and weight [B, N, 3]: `interpolation`. Returns: [B, N, C].
        """
        near = (gather(coarse, index) * weight[..., None]).sum(2)  # [B, N, C]
        return self.norm(self.mlp(torch.cat([near, fine], -1)))  # [B, N, C]


class PointNet2(nn.Module):
    """PointNet++: four set abstractions, and back to the second's centers, the seeds."""

    def __init__(self, config: Config):
        super().__init__()
        # VoteNet's widths: 64, 64, 128 behind color, normal and height; then 128, 128, 256
        C = config.feature
        a, b = C // 4, C // 2
        widths = [(7, a, a, b), (b, b, b, C), (C, b, b, C), (C, b, b, C)]
        self.down = nn.ModuleList(SetAbstraction(*sizes) for sizes in zip(widths, config.radii, strict=True))
        self.up = nn.ModuleList(FeaturePropagation(C) for _ in range(2))

    def forward(self, f, p, cloud):
        """Encode a cloud f [B, N, 7], p [B, N, 3] along its geometry (`cloud_geometry`, batched).

        Returns: seed features [B, M, C] and their places [B, M, 3].
        """
        # down: fewer centers with wider balls
        first = gather(p, cloud["order"])  # [B, M1, 3]
        levels = [f]
        for i, layer in enumerate(self.down):
            index = cloud[f"ball{i}"]
            q = first[:, : index.shape[1]]  # [B, M, 3]
            f, p = layer(f, p, q, index), q  # [B, M, C], [B, M, 3]
            levels.append(f)

        # up again to the second level
        for i, layer in zip((3, 2), self.up, strict=True):
            f = layer(f, levels[i], cloud[f"near{i}"], cloud[f"weight{i}"])  # [B, finer, C]
        return f, first[:, : f.shape[1]]  # [B, M2, C], [B, M2, 3]


# ---- 3 intra-referent clustering and abstraction -------------------------------------------------


class IntraReferent(nn.Module):
    """Votes of the seeds, grouped in balls around those of the first R of them, and pooled."""

    def __init__(self, config: Config):
        super().__init__()
        C = config.feature
        self.samples = config.ball_samples
        self.vote = mlp(C, C, C, 3 + C)
        self.group = SetAbstraction([C] * (config.ball_layers + 1), config.ball)

    def forward(self, f, p, count):
        """Turn seeds f [B, M, C] at p [B, M, 3], in farthest-point order, into referents.

        Returns: h [B, R, C] and the votes [B, M, 3] of all seeds, of which the first R are the
        referents' centers.
        """
        # every seed says how far away the center of its object is, and what changes in its feature
        # on the way
        moved, change = self.vote(f).split((3, f.shape[-1]), -1)  # [B, M, 3], [B, M, C]
        v, f = p + moved, f + change  # [B, M, 3], [B, M, C]

        # the nearest votes of each referent; a vote too far away is replaced by the referent's own
        q = v[:, :count]  # [B, R, 3]
        with torch.no_grad():
            distance, index = torch.cdist(q, v).topk(self.samples, largest=False)  # [B, R, P]
            own = torch.arange(q.shape[1], device=q.device)[:, None]
            index = torch.where(distance <= self.group.radius, index, own)  # [B, R, P]
        return self.group(f, v, q, index), v  # [B, R, C], [B, M, 3]


# ---- 4 inter-referent message passing ------------------------------------------------------------


def neighbor_graph(q, k):
    """Build G = deg^-1/2 adj deg^-1/2 of the graph that links every referent with itself and its k nearest.

    Args: q [B, R, 3] centers. Returns: [B, R, R], symmetric.
    """
    distance = torch.cdist(q, q)  # [B, R, R]
    near = distance.topk(k + 1, largest=False).indices  # [B, R, k + 1]
    linked = torch.zeros_like(distance).scatter_(-1, near, 1.0)  # [B, R, R]
    linked = torch.maximum(linked, linked.mT)  # [B, R, R]
    # itself: of two referents at one place the other may have come first
    linked.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    inverse_root = linked.sum(-1).rsqrt()  # [B, R] of the degree
    return inverse_root[..., None] * linked * inverse_root[..., None, :]  # [B, R, R]


class InterReferentGraph(nn.Module):
    """h <- h + ReLU(G LN(h) W), a few times, with G of `neighbor_graph`."""

    def __init__(self, config: Config):
        super().__init__()
        C = config.feature
        self.k = config.neighbors
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(config.graph_layers))
        self.layers = nn.ModuleList(nn.Linear(C, C, bias=False) for _ in range(config.graph_layers))

    def forward(self, h, q):
        """Pass messages between referents h [B, R, C] at q [B, R, 3]: [B, R, C]."""
        graph = neighbor_graph(q.detach(), self.k)  # [B, R, R]; who is near is a choice without a gradient
        for norm, layer in zip(self.norms, self.layers, strict=True):
            h = h + F.relu(graph @ layer(norm(h)))  # [B, R, C]
        return h


# ---- 5 contextual referent-scene interaction -----------------------------------------------------


class ReferentSceneAttention(nn.Module):
    """Referents look at all seeds: pre-norm cross-attention with Fourier positions, and an FFN."""

    def __init__(self, config: Config):
        super().__init__()
        C = config.feature
        self.heads = config.context_heads
        self.norm, self.norm_scene, self.norm_mlp = (nn.LayerNorm(C) for _ in range(3))
        frequencies = torch.randn(3, config.fourier // 2) * (2 * math.pi * 0.25)  # radians per meter
        self.register_buffer("frequencies", frequencies)
        self.position = nn.Linear(config.fourier, C, bias=False)
        self.query, self.key, self.value, self.out = (nn.Linear(C, C) for _ in range(4))
        self.place = nn.Linear(3, C, bias=False)  # the way to what is seen, as a part of what is seen
        self.mlp = mlp(C, 2 * C, C)

    def split(self, x):
        """Part the channels of x [B, L, C] into heads: [B, H, L, C / H]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def code(self, x):
        """Encode places x [B, L, 3] in meters by random Fourier features (Tancik et al. 2020): [B, L, C]."""
        # half precision would blur meters to decimeters
        with torch.autocast(x.device.type, enabled=False):
            phase = x.float() @ self.frequencies  # [B, L, W]
        return self.position(torch.cat([phase.cos(), phase.sin()], -1))  # [B, L, C]

    def forward(self, h, q, f, p):
        """Let referents h [B, R, C] at q [B, R, 3] look at seeds f [B, M, C] at p [B, M, 3].

        Returns: [B, R, C].
        """
        # where things are decides who is looked at (query, key) and is part of what is seen (value)
        own, seeds = self.norm(h), self.norm_scene(f)  # [B, R, C], [B, M, C]
        query = self.split(self.query(own + self.code(q)))  # [B, H, R, C / H]
        key = self.split(self.key(seeds + self.code(p)))  # [B, H, M, C / H]
        value = self.split(self.value(seeds) + self.place(p))  # [B, H, M, C / H]
        seen = F.scaled_dot_product_attention(query, key, value)  # [B, H, R, C / H]

        # attention weights sum to one: subtracting the own place leaves the way to what is seen
        seen = seen.transpose(1, 2).flatten(2) - self.place(q)  # [B, R, C]
        h = h + self.out(seen)  # [B, R, C]
        return h + self.mlp(self.norm_mlp(h))  # [B, R, C]


# ---- 6 what referents are taught -----------------------------------------------------------------


def weighted_mean(loss, weight):
    """Average loss [B, N] with weights [B, N], scene by scene: [B]; 0 where there is no weight."""
    return (loss * weight).sum(1) / weight.sum(1).clamp(min=1e-6)


def detection_loss(seen: dict, true, named, on, table, names):
    """Say how far off votes, boxes and names are.

    Args:
    seen: what `Model.see` gives; "votes" [B, M, 3] of seeds, "boxes" [B, R, 6] and "tokens" [B, R, D] of
        referents, which are the first R seeds.
    true [B, M, 6]: box of the object that a seed lies on; on walls and floor its center is the seed itself, and
        its size counts for nothing.
    named [B, M, 2]: first tokens of that object's category and color; <unk> for nothing.
    on [B, M]: whether a seed lies on an object.
    table, names: word vectors and the tokens that may be named, as for `data.naming`.
    Returns, of every scene [B]: the mean loss, and the share of referents on objects whose nearest word
    is their category or color.
    """

    def close(a, b):
        return F.smooth_l1_loss(a, b, beta=0.1, reduction="none").mean(-1)

    boxes = seen["boxes"]  # [B, R, 6]
    R = boxes.shape[1]

    # centers, in meters; most seeds lie on walls and floor, so these count a tenth
    voted = weighted_mean(close(seen["votes"], true[..., :3]), torch.where(on, 1.0, 0.1))
    true, named, on = true[:, :R], named[:, :R], on[:, :R]
    boxed = weighted_mean(close(boxes[..., :3], true[..., :3]), torch.where(on, 1.0, 0.1))

    # sizes, as ratios
    sized = close(boxes[..., 3:].log(), true[..., 3:].log())  # [B, R]
    boxed = boxed + 0.5 * weighted_mean(sized, on.float())

    # names, in the words of the language model
    naming, right = data.naming(seen["tokens"].flatten(0, 1), table, names, named.flatten(0, 1))  # [B * R]
    loss = weighted_mean(naming.view_as(on), torch.where(on, 1.0, 0.3)) + 2 * (voted + boxed)
    return loss, weighted_mean(right.view_as(on).float(), on.float())


# ---- 7 the model ---------------------------------------------------------------------------------


class Model(data.SceneLanguageModel):
    """Spatial 3D-LLM around a Llama. See the file's docstring for shapes."""

    scene_inputs = ("encoder", "referents")

    def __init__(self, config: Config, text):
        super().__init__(config, text)
        if config.inter not in (*INTER, "off"):
            raise DataError(f"inter = {config.inter}: choose one of off, {', '.join(INTER)}")
        self.llm = self.load_llm()
        C, D = config.feature, self.llm.config.hidden_size

        # the paper's parts
        self.encoder = PointNet2(config)
        self.intra = IntraReferent(config)
        self.context = ReferentSceneAttention(config)
        # all of them, so that runs with one or another can start from the same weights
        self.inter = nn.ModuleDict({name: part(config) for name, part in INTER.items()})
        self.box = mlp(C, C, 6)
        self.projector = nn.Sequential(nn.Linear(C, D), nn.GELU(), nn.Linear(D, D), nn.LayerNorm(D))
        self.code = nn.Linear(72, D, bias=False)  # of data.fourier_waves
        for part in (self.encoder, self.intra, self.inter, self.context, self.box, self.projector):
            data.start_weights(part)

        with torch.no_grad():
            # votes, boxes and messages begin near nothing; attention begins with what is alike and
            # near
            for small in (self.intra.vote[-1], self.box[-1], *self.inter["graph"].layers):
                small.weight.mul_(0.2)
            self.context.key.weight.copy_(self.context.query.weight)
            # new tokens start at the RMS of the word embeddings
            scale = float(self.embeddings.float().square().mean().sqrt())
            nn.init.normal_(self.code.weight, std=scale / math.sqrt(36))  # 36 pairs, cos^2 + sin^2 = 1
            self.projector[-1].weight.fill_(scale)

        loaded = [f"llm.{name}" for name in self.llm.state_dict() if "lora_" not in name]
        self.frozen_pretrained_names = tuple(loaded)

    def load_llm(self):
        """Load a pre-trained Llama, its attention adapted by LoRA (peft) on q, k, v and o."""
        from peft import LoraConfig, inject_adapter_in_model
        from transformers import AutoModelForCausalLM

        c = self.config
        dtype = getattr(torch, c.dtype)
        llm = AutoModelForCausalLM.from_pretrained(c.llm, dtype=dtype, attn_implementation="sdpa")
        lora = LoraConfig(
            r=c.lora_rank,
            lora_alpha=c.lora_rank,
            lora_dropout=c.lora_dropout,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        )
        return inject_adapter_in_model(lora, llm)

    @property
    def embeddings(self) -> Tensor:
        return self.llm.get_input_embeddings().weight

    # -- what trains

    def parts(self):
        """Name what a stage may train; modules that are switched off take no part."""
        c, lora = self.config, [p for name, p in self.llm.named_parameters() if "lora_" in name]
        scene = [self.projector, self.box]
        scene += [part for part, used in ((self.intra, c.intra), (self.context, c.context)) if used]
        scene += [part for name, part in self.inter.items() if name == c.inter]
        code = [self.code] if c.positions else []
        return {"encoder": [self.encoder], "scene": scene, "code": code, "lm": lora or [self.llm]}

    @property
    def encoder_trains(self) -> bool:
        return "encoder" in self.stage.trains

    def configure_stage(self, stage):
        """Freeze all but what trains; what is kept of scenes depends on if the encoder does."""
        super().configure_stage(stage)
        self.feature_cache = {}

    # -- clouds to seeds: frozen work

    def sampling_space(self, p, color, normal):
        """Say where the centers of points p [N, 3] are spread, [N, .]: by place alone."""
        return p

    def read_cloud(self, scene):
        """Prepare a scene's cloud as it was scanned, whatever its turn and the order of its points.

        Returns: "f" [N, 7] color, normal, height; "p" [N, 3]; object ids "instances" [M] of the
        seeds; and `cloud_geometry`.
        """
        c, turn = self.config, scene.turn.astype(np.float32)
        if scene.points is None or not len(scene.points):
            raise DataError(f"{scene.name}: no points, and Spatial 3D-LLM reads a cloud")

        # the same points under every turn: sorted and drawn as they were scanned. A turn multiplied rows by
        # turn.T, so turn itself undoes it
        p = scene.points @ turn  # [N, 3]
        kept = np.lexsort(p.T)
        kept = kept[np.sort(np.random.default_rng(0).permutation(len(kept))[: c.points])]
        kept = np.resize(kept, c.points)
        p = p[kept]  # [N, 3]

        # what a cloud lacks: no direction, medium gray, no object
        normal, color, instances = np.zeros_like(p), np.full(p.shape, 0.5), np.zeros(len(p), int)
        if scene.normals is not None:
            normal = scene.normals[kept] @ turn  # [N, 3]
        if scene.colors is not None:
            color = scene.colors[kept] / 255  # [N, 3]
        if scene.instances is not None:
            instances = scene.instances[kept]  # [N]

        # features of about unit size
        f = np.concatenate([(color - 0.5) / 0.27, normal, p[:, 2:] - 1], 1)  # [N, 7]
        space = torch.from_numpy(self.sampling_space(p, color, normal))
        p = torch.from_numpy(p)
        geometry = cloud_geometry(p.double(), space, c.centers, c.radii, c.samples)
        ids = torch.from_numpy(instances)[geometry["order"][: c.centers[1]]]
        return {"f": torch.from_numpy(f).float(), "p": p, "instances": ids, **geometry}

    def compute_features(self, scene):
        """Prepare a cloud for an encoder that trains; else give seeds "f", "p", "instances"."""
        cloud = self.read_cloud(scene)
        if self.encoder_trains:
            return cloud
        batch = self.stack([cloud])
        f, p = self.encoder(batch["f"], batch["p"], batch)
        return {"f": f[0].half(), "p": p[0], "instances": cloud["instances"]}

    def stack(self, rows: list[dict]) -> dict:
        return {key: torch.stack([row[key] for row in rows]).to(self.device) for key in rows[0]}

    def feature_settings(self):
        return (self.encoder_trains, self.config)

    def feature_weights(self):
        return nn.Module() if self.encoder_trains else self.encoder

    # -- seeds to tokens

    def see(self, scenes):
        """Find what is there.

        Returns: "boxes" [B, R, 6] and "tokens" [B, R, D] of referents, without their locations; of
        seeds "votes" and "places" [B, M, 3] and object ids "instances" [B, M].
        """
        turn = torch.from_numpy(np.stack([scene.turn for scene in scenes]))  # [B, 3, 3]
        turn = turn.float().to(self.device)
        with torch.autocast(self.device.type, enabled=False):  # meters stay float32
            found = self.stack([self.load_features(scene) for scene in scenes])

            # the cloud [B, N, .] if the encoder trains, else seeds [B, M, .]
            f, p = found["f"].float(), found["p"]
            if self.encoder_trains:
                f = torch.cat([f[..., :3], f[..., 3:6] @ turn.mT, f[..., 6:]], -1)  # [B, N, 7]
                f, p = self.encoder(f, p @ turn.mT, found)  # [B, M, C], [B, M, 3]
            h, boxes, votes = self.referents(f, p)  # [B, R, C], [B, R, 6], [B, M, 3]
            tokens = self.projector(h)  # [B, R, D]
            if not self.encoder_trains:
                # it saw the scenes unturned: places and sizes are turned now, features cannot be
                centers, sizes = boxes.split(3, -1)  # [B, R, 3], [B, R, 3]
                boxes = torch.cat([centers @ turn.mT, sizes @ turn.abs().mT], -1)  # [B, R, 6]
                votes, p = votes @ turn.mT, p @ turn.mT  # [B, M, 3], [B, M, 3]
        return {
            "tokens": tokens,
            "boxes": boxes,
            "votes": votes,
            "places": p,
            "instances": found["instances"],
        }

    def referents(self, f, p):
        """Turn seeds f [B, M, C] at p [B, M, 3] into referents.

        Returns: features [B, R, C], boxes [B, R, 6] and the seeds' votes [B, M, 3].
        """
        c = self.config
        # who they are
        h, v = self.intra(f, p, c.referents) if c.intra else (f[:, : c.referents], p)
        q = v[:, : c.referents]  # [B, R, 3]

        # what is around them
        if c.inter != "off":
            h = self.inter[c.inter](h, q)  # [B, R, C]
        if c.context:
            here, there = (q, p) if c.positions else (0 * q, 0 * p)  # [B, R, 3], [B, M, 3]
            h = self.context(h, here, f, there)  # [B, R, C]

        # the rest of the way to the center, and log sizes, at first of e^-1 = 0.37 m
        box = self.box(h)  # [B, R, 6]
        return h, torch.cat([q + box[..., :3], (box[..., 3:] - 1).clamp(-5, 3).exp()], -1), v

    def add_locations(self, tokens, boxes):
        """Enrich tokens [B, K, D] by where they are, boxes [B, K, 6]: [B, K, D]."""
        return tokens + self.code(data.fourier_waves(boxes)) if self.config.positions else tokens

    def scene_length(self, scene):
        return self.config.referents

    def encode(self, scenes):
        """Give "tokens" [B, K, D], "valid" [B, K] and, in training, the weighted detection loss [B] as
        "auxiliary_loss".
        """
        seen = self.see(scenes)
        tokens = self.add_locations(seen["tokens"], seen["boxes"])  # [B, K, D]
        out = {"tokens": tokens, "valid": torch.ones_like(tokens[..., 0], dtype=torch.bool)}
        if self.training:
            out["auxiliary_loss"] = self.config.detection_weight * self.teach(scenes, seen)[0]
        return out

    # -- teaching

    def seed_truth(self, scenes, instances, places):
        """Say what seeds lie on: true, named and on as `detection_loss` takes them.

        Args: instances [B, M] object ids, places [B, M, 3] of the seeds.
        """
        # a table of all objects; row 0 is for walls, floor and nothing
        named = [data.name_pair(self.text)]
        boxes, row = [np.ones(6)], torch.zeros_like(instances)  # [B, M]
        for scene, own, ids in zip(scenes, row, instances, strict=True):
            for o in scene.objects:
                if o.category not in data.STRUCTURE:
                    own[ids == o.id] = len(boxes)
                    boxes.append(o.box)
                    named.append(data.name_pair(self.text, o.category, o.color))

        on = row > 0  # [B, M]
        true = torch.from_numpy(np.stack(boxes)).float()[row]  # [B, M, 6]
        true[..., :3] = torch.where(on[..., None], true[..., :3], places)
        return true, torch.tensor(named)[row], on

    def teach(self, scenes, seen):
        """Compare what was seen with the truth: `detection_loss`."""
        with torch.no_grad():
            truth = self.seed_truth(scenes, seen["instances"].cpu(), seen["places"].cpu())
        true, named, on, names = (x.to(self.device) for x in (*truth, self.names))
        return detection_loss(seen, true, named, on, self.embeddings, names)

    def encoder_loss(self, scenes):
        """Sum the detection loss over scenes, for a stage without questions; its weight is their number."""
        loss, right = self.teach(scenes, self.see(scenes))
        return {"loss": loss.sum(), "weight": len(scenes), "correct": right.sum()}

    # -- text and pictures

    def object_to_text(self, scene, object_id):
        """Name a marked object by its box, in questions and answers alike: so "ground" asks for a box."""
        return listed(scene.thing(object_id).box)

    @torch.no_grad()
    def token_centers(self, scene):
        return self.see([scene])["boxes"][0, :, :3].cpu().numpy()


# ---- 8 MODLE: distances measured, layouts edited -------------------------------------------------
#
# The composition, splits, wordings and scores of MODLE's 263K annotations are not public: all of
# this section is our choice. Objects are named by descriptions that fit them alone
# (`SceneGraph.described`). Distances run from center to center of the boxes. Directions are the axes of
# the scene, as FRAME says before a question of a file: to the right = +x, to the back = +y. What
# is moved keeps its size and its orientation, stands on the floor or with three quarters of its base on one
# thing, and hangs only where it hung before. The scene still shows it at its old place, which counts as
# free; an edit is asked only where source and target overlap by less than 0.25 IoU, so that the old place
# is never an answer. Kinds of edits:
#   move   axis      along an axis by an amount
#          towards   along the axis on which another thing is farther away, towards it, not past it
#          beside    to an amount along an axis from another thing's center, next to it
#   place  floor     as beside, but on the floor
#          top       in the middle on top of another thing
#
# `Sample.reasoning` holds how an answer is worked out, up to "=". Only stages with `reasoning` write it: those of the
# tiny preset, never the paper's.

TEMPLATES = {
    "modle_distance": (
        "how far apart are the {what} and the {other}, center to center?",
        "how far is it from the center of the {what} to the center of the {other}?",
        "what is the distance between the centers of the {what} and the {other}?",
        "how many meters are between the centers of the {what} and the {other}?",
    ),
    "modle_move_axis": (
        "move the {what} {amount} meters {direction}.",
        "shift the {what} {direction} by {amount} meters.",
        "please push the {what} {amount} meters {direction}.",
        "can you slide the {what} {direction} by {amount} meters?",
    ),
    "modle_move_towards": (
        "move the {what} {amount} meters {axis}, towards the {other}.",
        "shift the {what} {axis} towards the {other} by {amount} meters.",
        "please push the {what} {amount} meters {axis}, closer to the {other}.",
    ),
    "modle_move_beside": (
        "move the {what} next to the {other}, {amount} meters {direction} of its center.",
        "bring the {what} next to the {other}: {amount} meters {direction} of its center.",
        "please push the {what} next to the {other}, {direction} of its center by {amount} meters.",
    ),
    "modle_place_floor": (
        "put the {what} on the floor, {amount} meters {direction} of the center of the {other}.",
        "set the {what} down on the floor: {direction} of the center of the {other} by {amount} meters.",
        "can you put the {what} on the floor {amount} meters {direction} of the center of the {other}?",
    ),
    "modle_place_top": (
        "put the {what} on top of the {other}, in the middle.",
        "set the {what} down in the middle on top of the {other}.",
        "can you put the {what} on the middle of the {other}?",
    ),
}
UNSEEN = {  # wordings that no stage trains on, for benchmarks of their own
    "unseen_distance": (
        "what is the distance between the {what} and the {other}?",
        "what is the distance from the {what} to the {other}, center to center?",
        "how far is it from the {what} to the {other}?",
        "how many meters apart are the {what} and the {other}?",
        "in meters, how far is it from the {what} to the center of the {other}?",
        "the {what} and the {other}: how far apart are the centers?",
    ),
    "unseen_move_axis": (
        "please move the {what} {direction} by {amount} meters.",
        "can you shift the {what} {amount} meters {direction}?",
        "by {amount} meters, push the {what} {direction}.",
    ),
    "unseen_move_towards": (
        "please shift the {what} {amount} meters {axis} towards the {other}.",
        "can you move the {what} {axis} by {amount} meters, closer to the {other}?",
    ),
    "unseen_move_beside": (
        "put the {what} next to the {other}, {direction} of its center by {amount} meters.",
        "can you bring the {what} next to the {other}, {amount} meters {direction} of its center?",
    ),
}
TEMPLATES |= UNSEEN
DIRECTIONS = {  # words -> axis, sign
    "to the left": (0, -1),
    "to the right": (0, 1),
    "to the front": (1, -1),
    "to the back": (1, 1),
}
AXIS_WORDS = ("sideways", "lengthways")  # x, y
TEMPLATES["modle_words"] = (*DIRECTIONS, *AXIS_WORDS)  # no question, but words that questions hold
EDITS = {"modle_move": ("axis", "towards", "beside"), "modle_place": ("floor", "top")}
EDITS["unseen_move"] = EDITS["modle_move"]
AMOUNTS = np.arange(2, 31) / 10  # meters of a move
AXIS = np.repeat([axis for axis, _ in DIRECTIONS.values()], len(AMOUNTS))  # of every possible move
STEP = np.concatenate([sign * AMOUNTS for _, sign in DIRECTIONS.values()])  # meters along that axis
NEXT_TO = 0.6  # meters: the widest gap between what is put next to each other
APART = 0.3  # meters: along the axis of a move "towards", so that the side is clear
SAME_PLACE = 0.25  # IoU of source and target at and above which an edit is not asked
TOUCH = 0.01  # meters: boxes that share more along every axis collide
FLAT = 0.05  # meters: what is lower, a rug, is no obstacle
TOPS = {
    *data.SURFACES, "coffee table", "end table", "side table", "dining table", "kitchen counter",
    "counter", "cabinet", "kitchen cabinet", "tv stand", "file cabinet",
}  # fmt: skip

# In these functions g is a scene graph, i and j are indices into g.things, boxes are [m, 6].


def shared(boxes, others):
    """Measure how much boxes share with others [n, 6] along each axis: [m, n, 3] meters, negative where apart."""
    low, high = box_ends(boxes[:, None])
    other_low, other_high = box_ends(others)
    return np.minimum(high, other_high) - np.maximum(low, other_low)


def collide(boxes, others, slack):
    """Say which boxes stand in which of others [n, 6]: [m, n] bool.

    They do if along every axis they share more than `slack` meters, or than half of the thinner one if that is
    less. In what is FLAT, a rug, everything may stand.
    """
    thin = np.minimum(boxes[:, None, 3:], others[:, 3:]) / 2  # [m, n, 3]
    return (shared(boxes, others) > np.minimum(thin, slack)).all(-1) & (others[:, 5] >= FLAT)


def room_ends(g):
    """Give the corners [3] of the room: its bounds, else those of all boxes."""
    low, high = box_ends(g.boxes)
    return (low.min(0), high.max(0)) if g.bounds is None else g.bounds


def in_room(g, boxes, slack):
    """Say which boxes keep inside the room: [m] bool."""
    (low, high), (room_low, room_high) = box_ends(boxes), room_ends(g)
    return ((low >= room_low - slack) & (high <= room_high + slack)).all(1)


def allowed(g, i, boxes):
    """Say which boxes may be the new place of thing i: free, in the room, held, elsewhere.

    What stands on unknown ground may stay so.
    """
    others = np.delete(g.boxes, i, axis=0)
    support = data.support_of(boxes, others, g.bounds)

    # three quarters of its base stand on one thing, or it is held as before
    base = shared(boxes, others)[..., :2].clip(0).prod(-1) >= 0.75 * boxes[:, None, 3:5].prod(-1)  # [m, n]
    held = (base & (support[:, None] == np.arange(len(others)))).any(1)
    held |= (support == data.FLOOR) | (support < 0) & (support == g.support[i])
    free = in_room(g, boxes, 0.02) & ~collide(boxes, others, TOUCH).any(1)
    moved = data.box_iou(boxes, g.boxes[[i]])[:, 0] < SAME_PLACE
    return free & moved & held


def movable(g):
    """List the things with words of their own that are no door, window or rug, and hold nothing."""
    free = [i for i in g.described if g.category(i) not in data.BUILT and i not in g.support]
    return [i for i in free if g.boxes[i, 5] >= FLAT]


def anchors(g, i, kind):
    """List the things from which a kind of edit of thing i may be told."""
    others = [j for j in g.described if j != i]
    if kind == "floor":
        return [j for j in others if g.support[j] == data.FLOOR]
    if kind == "top":
        wide = (g.boxes[:, 3:5] >= g.boxes[i, 3:5]).all(1)
        return [j for j in others if g.category(j) in TOPS and wide[j]]
    if kind == "beside":
        return [j for j in others if g.support[j] != data.WALL]
    return others


def edit_start(kind, box, other):
    """Give the box [6] from which a kind of edit moves a box, told from another thing's box."""
    start = box.copy()
    if kind in ("beside", "floor", "top"):
        start[:2] = other[:2]
    if kind == "floor":
        start[2] = box[5] / 2
    if kind == "top":
        start[2] = other[2] + (other[5] + box[5]) / 2
    return start


def edit_targets(kind, box, other):
    """List all boxes to which a kind of edit can lead, whether they are free or not."""
    start = edit_start(kind, box, other)
    if kind == "top":
        return start[None]

    # every direction and amount, of which a kind may fit some only
    boxes = np.repeat(start[None], len(STEP), axis=0)
    boxes[np.arange(len(STEP)), AXIS] += STEP
    if kind == "towards":  # the longer way, and not past it
        way = (other - box)[:2]
        ahead = way[AXIS] * np.sign(STEP)
        return boxes[(ahead >= APART) & (np.abs(STEP) <= ahead) & (ahead >= np.abs(way).max())]
    if kind in ("beside", "floor"):
        return boxes[np.abs(STEP) <= (other + box)[AXIS + 3] / 2 + NEXT_TO]
    return boxes


def read_move(start, box):
    """Say how a box moved: words of DIRECTIONS, axis, meters."""
    move = (box - start)[:2]
    axis = np.abs(move).argmax()
    for words, (k, sign) in DIRECTIONS.items():
        if k == axis and sign * move[k] >= 0:
            return words, axis, abs(move[axis])


def modle_edit(g, rng, task):
    """Ask for the new box of a described thing that is moved or placed (EDITS)."""
    things = movable(g)
    if task == "modle_place":
        things = [i for i in things if g.support[i] != data.WALL]
    for i in several(rng, things, min(4, len(things))):
        # how it is told: from its own place, or from another thing
        kind = pick(rng, EDITS[task])
        j = i if kind == "axis" else pick(rng, anchors(g, i, kind))
        if j is None:
            continue

        # one of the free places that this can mean
        box, other = g.boxes[i], g.boxes[j]
        boxes = edit_targets(kind, box, other)
        free = np.flatnonzero(allowed(g, i, boxes))
        if not len(free):
            continue
        target = boxes[free[0] if kind == "top" else pick(rng, free)]

        # the words for it
        words, axis, amount = read_move(edit_start(kind, box, other), target)
        text = {
            "what": g.described[i],
            "other": g.described[j],
            "direction": words,
            "axis": AXIS_WORDS[axis],
            "amount": meters(amount),
        }
        return dict(
            answer=listed(target),
            text=text,
            template=f"{task}_{kind}",
            reasoning=edit_reasoning(g, i, j, kind, target),
            kind=kind,
            box=target,
            about=[g.things[k].id for k in dict.fromkeys([i, j])],
        )
    return None


# What a model may write before its answer holds only what the scene shows, what stands just before, or
# one sum of two neighbors:
#   distance  red chair [x, y, z] bed [x, y, z] xa xb dx ya yb dy za zb dz = d
#   axis      red chair [box] x1.25 right 0.80 x2.05 = [box]
#   towards   bed [x, y, z] red chair [box] x0.20 x1.25 left 0.80 x0.45 = [box]    (the bed's x says which side)
#   beside    red chair [box] bed [x, y, z] x0.20 right 1.30 x1.50 = [box]    (from the bed's x, at its y)
#   floor     red vase [box] bed [x, y, z] x0.20 right 1.30 x1.50 z0.00 h0.36 z0.18 = [box]
#   top       red vase [box] table [box] z0.37 h0.74 z0.74 h0.36 z0.92 = [box]    (z + h / 2, twice)


def shift_reasoning(axis, start, words, amount):
    """Write a shift along an axis: "x1.25 right 0.80 x2.05"."""
    letter, side = "xy"[axis], words.split()[-1]
    end = start + DIRECTIONS[words][1] * amount
    return f"{letter}{meters(start)} {side} {meters(amount)} {letter}{meters(end)}"


def stack_reasoning(z, height):
    """Write half a height: "z0.74 h0.36 z0.92"."""
    return f"z{meters(z)} h{meters(height)} z{meters(z + height / 2)}"


def edit_reasoning(g, i, j, kind, target):
    """Write how thing i, told from thing j by a kind of edit, gets to its target box [6]."""
    # what is moved, and of the other thing as much as the sums need
    box, other = g.boxes[i], g.boxes[j]
    parts = [f"{g.described[i]} {listed(box)}"]
    if j != i:
        parts.append(f"{g.described[j]} {listed(other if kind == 'top' else other[:3])}")

    # along the floor, or up to the top of the other thing
    z = 0.0
    if kind == "top":
        z = other[2] + other[5] / 2
        sums = stack_reasoning(other[2], other[5])
        parts.append(sums.rpartition(" ")[0])  # without the sum, with which the next part begins
    else:
        start = edit_start(kind, box, other)
        words, axis, amount = read_move(start, target)
        if kind == "towards":  # the box that a sum starts from comes last
            parts = [*reversed(parts), f"{'xy'[axis]}{meters(other[axis])}"]
        parts.append(shift_reasoning(axis, start[axis], words, amount))
    if kind in ("floor", "top"):
        parts.append(stack_reasoning(z, box[5]))
    return " ".join(parts) + " ="


# `data.adopt` puts these among the shared tables, which questions are drawn from
GENERATORS = {"modle_distance": data.distance, "modle_move": modle_edit, "modle_place": modle_edit}
TASKS = {task: partial(data.make_sample, function, task) for task, function in GENERATORS.items()}
TASKS["unseen_distance"] = partial(data.make_sample, data.distance, "unseen_distance")
TASKS["unseen_move"] = partial(data.make_sample, modle_edit, "unseen_move")
METRIC = set(TASKS)  # answers are meters
UNLABELLED = ("ground_superlative", "modle_distance", "modle_move")  # asked of objects without names

# Scores of an answer's text to a Sample about a Scene. No error counts more than FAR meters, and where there is
# no answer it counts FAR.

FAR = 10.0


def read_box(text):
    """Read the first box [6] of an answer; none is all NaN, which overlaps nothing."""
    found = [box for box in data.tuples(text, 6) if box is not None and (box[3:] > 0).all()]
    return found[0] if found else np.full(6, np.nan)


def box_fits(text, sample, scene, threshold):
    return float(data.box_iou(read_box(text)[None], sample.box[None])[0, 0] >= threshold)


def center_error(text, sample, scene):
    """Measure the meters between the centers of the answered and the true box."""
    return float(np.fmin(np.linalg.norm((read_box(text) - sample.box)[:3]), FAR))


def collides(text, sample, scene):
    """Say 1 if the box stands in another thing or out of the room by over 5 cm, or is none."""
    g, box = data.scene_graph(scene), read_box(text)[None]
    others = g.boxes[[o.id != sample.about[0] for o in g.things]]
    return float(collide(box, others, 0.05).any() or not in_room(g, box, 0.05)[0])


EDIT = {  # the first metric is the headline
    "acc@0.25/box": partial(box_fits, threshold=0.25),
    "acc@0.5/box": partial(box_fits, threshold=0.5),
    "center_error_m/capped": center_error,
    "collision_rate/5_cm": collides,
}
# tokens: the longest answer. Distances are scored as the evaluator scores any length in meters.
BENCHMARKS = {f"rooms/{task}": dict(tasks=(task,), tokens=64) for task in TASKS}
for task in EDITS:
    BENCHMARKS[f"rooms/{task}"]["metrics"] = EDIT

# Writing it down. 219 questions for each of ScanNet's 1,201 training scans are the paper's 263K.

PER_SCENE = {"modle_distance": 88, "modle_move": 77, "modle_place": 54}
FRAME = (
    "In meters, in the scan's aligned axes: x to the right, y to the back, z up; sideways is along x, lengthways "
    "along y. Boxes are [cx, cy, cz, w, d, h]."
)


def annotation(sample):
    """Write a question as JSON, with ScanNet's own object numbers.

    Whoever wants the thing of an edit gone from the cloud drops the first of "object_ids".
    """
    row = {
        "id": sample.id,
        "scene_id": sample.scene,
        "task": sample.task,
        "kind": sample.kind,
        "question": sample.question,
        "answers": [sample.answer],
        "object_ids": [i - 1 for i in sample.about],
    }
    if sample.box is None:
        return row | {"value": round(sample.value, 4)}
    return row | {"box": sample.box.round(4).tolist()}


def write_modle(root: Path, out: Path):
    """Write MODLE for the scans below a ScanNet-layout root: OUT/modle_train.json and modle_test.json.

    A scan gives as many different questions of each task as PER_SCENE says, or as many as it can;
    the same scans always give the same files.
    """
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        # scan by scan, so that a subset of the scans gives a subset of the questions
        rows = []
        for scene in data.load_scenes("scannet", split, root):
            for task, count in PER_SCENE.items():
                rows += map(annotation, data.question_set([scene], [task], count, 0))
        path = out / f"modle_{split}.json"
        path.write_text(json.dumps({"frame": FRAME, "questions": rows}, indent=1), encoding="utf-8")
        print(path, dict(Counter(row["task"] for row in rows)))


def annotations(path: Path, split: str) -> list[dict]:
    """Give the rows of a file that `write_modle` wrote."""
    return data.read_json(path)["questions"]


def read_annotation(wanted, id, scene_id, task, kind, question, answers, object_ids, value=None, box=None):
    """Make a question again of what `annotation` wrote; None where it is of another task."""
    if task != wanted:
        return None
    return data.Sample(
        id,
        scene_id,
        task,
        question,
        answers[0],
        list(answers),
        value=value,
        box=None if box is None else np.array(box),
        about=[i + 1 for i in object_ids],
        template=f"{task}_{kind}".rstrip("_"),
        kind=kind,
    )


for task in GENERATORS:
    BENCHMARKS[task.replace("_", "/")] = BENCHMARKS[f"rooms/{task}"] | dict(
        tasks=(),
        prompt=FRAME + "\n{question}",
        files={split: (f"modle_{split}.json", None) for split in ("train", "test")},
        split="test",
        rows=annotations,
        read=partial(read_annotation, task),
    )


# ---- 9 the recipe --------------------------------------------------------------------------------

INSTRUCTIONS = {  # files and how many questions are expected in them; the paper's own mixture is not public
    "MODLE distance": Source("modle/distance", 105_688),
    "MODLE movement": Source("modle/move", 92_477),
    "MODLE placement": Source("modle/place", 64_854),
    "ScanQA": Source("scanqa", 25_563),
    "SQA3D": Source("sqa3d", 26_623),
    "ScanRefer": Source("scanrefer", 36_665, "id"),  # the targets' ids; `object_to_text` writes them as boxes
    "Scan2Cap": Source("scan2cap", 36_665),
    "3D-LLM planning": Source("3dllm/planning", 1864),
    "3D-LLM descriptions": Source("3dllm/description", 1033),
}
GROUNDING = {"ground": 0.2, "situated": 0.05}
USUAL = {"color": 0.04, "what": 0.05, "where": 0.03, "count": 0.03, "exist": 0.06, "caption": 0.04}
MODLE = {"modle_distance": 0.2, "modle_move": 0.2, "modle_place": 0.08}

STAGES = {
    "paper": [  # not public: VoteNet's encoder training, 3DMIT's instruction tuning
        Stage(
            "0 encoder",
            {},
            ("encoder", "scene"),
            "encoder",
            epochs=180,
            batch=8,
            lr=1e-3,
            weight_decay=0.01,
        ),
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


def recipe(config, stages):
    """Leave the stages as they are: no setting of this paper adds or drops one."""
    return stages


# ---- 10 alternatives the paper compares with -----------------------------------------------------


class Concatenation(nn.Module):
    """Instead of the graph: a referent and its k nearest, side by side, through one layer."""

    def __init__(self, config: Config):
        super().__init__()
        self.k, C = config.neighbors, config.feature
        self.norm, self.out = nn.LayerNorm(C), nn.Linear((self.k + 1) * C, C)

    def forward(self, h, q):
        """Read h [B, R, C] at q [B, R, 3] with its neighbors: [B, R, C]."""
        near = torch.cdist(q, q).topk(self.k + 1, largest=False).indices  # [B, R, P]
        return h + F.relu(self.out(gather(self.norm(h), near).flatten(2)))  # [B, R, C]


INTER = {"graph": InterReferentGraph, "concat": Concatenation}


# ---- 11 demo and command line --------------------------------------------------------------------


def demo():
    """Take one room from points to an answer by a tiny model that learns its questions by heart."""
    torch.manual_seed(0)
    scene = data.room(1, views=0)
    model = build(Config.tiny(), data.TinyText(data.vocabulary()))
    tasks = {"modle_distance": 1.0, "modle_move": 1.0}
    model.configure_stage(Stage("demo", tasks, ("scene", "code", "lm"), "referents", reasoning=True))
    model.cache_features([scene])
    samples = data.questions(scene, tasks, 8, np.random.default_rng(1))

    # shapes on the way from points to packed questions
    questions = model.batch([(scene, samples)])["ids"]
    shown = {"cloud": scene.points, **model.see([scene]), "questions": questions}
    for name, values in shown.items():
        print(f"{name:12}{list(values.shape)}")
    data.overfit_demo(model, scene, samples, 61, 3e-3)


@data.command
def main(arguments):
    """Show the demo, or write MODLE's annotations."""
    data.adopt(sys.modules[__name__])
    parser = argparse.ArgumentParser(description="Spatial 3D-LLM: without arguments a demo.")
    commands = parser.add_subparsers(dest="command")
    modle = commands.add_parser("modle", help="write MODLE's annotations for scans")
    modle.add_argument("--root", type=Path, required=True, help="scans in ScanNet's layout")
    modle.add_argument("--out", type=Path, required=True, help="for modle_train.json and modle_test.json")
    a = parser.parse_args(arguments)
    if a.command == "modle":
        write_modle(a.root, a.out)
    else:
        demo()


# ==== tiny preset: trains from nothing on a CPU; not in the paper, skip on a first reading ========
#
# Its language model has read rooms in words (data.Reader), knows numbers, and writes the reasoning of MODLE. Seeds
# are spread by color and normal too, so that small things own some.


class TinyModel(Model):
    """Spatial 3D-LLM around the small language model that has read rooms in words."""

    from_nothing = True

    def __init__(self, config: Config, text):
        super().__init__(config, text)
        self.frozen_pretrained_names = ()

    def load_llm(self):
        return data.tiny_llm(len(self.text), self.config.reader)

    def sampling_space(self, p, color, normal):
        """Spread centers by place, color and normal, so that small things own some: [N, 9]."""
        c = self.config
        return np.concatenate([p, c.spread * color, c.spread_normal * normal], 1)


def modle_drill(g, rng, task):
    """Ask for one step of an edit.

    modle_add "x1.25 right 0.80 =", modle_side "x0.50 x1.25 =", modle_stack "z0.74 h0.36 =".
    """
    if not len(g.boxes):
        return None
    low, high = room_ends(g)
    words = pick(rng, list(DIRECTIONS))
    axis, sign = DIRECTIONS[words]
    a, b = rng.uniform(low[axis], high[axis], 2)
    if task == "modle_add":
        written = shift_reasoning(axis, a, words, float(pick(rng, AMOUNTS)))
    elif task == "modle_side":
        # which way from the second place the first is
        here, there = sorted((a, b))[::sign]
        letter, side = "xy"[axis], words.split()[-1]
        written = f"{letter}{meters(there)} {letter}{meters(here)} {side}"
    else:
        # things are put on floors, and on tops
        z = 0.0 if rng.random() < 0.3 else rng.uniform(0, high[2] / 2)
        written = stack_reasoning(z, rng.uniform(0.05, high[2] - z))
    numbers, answer = written.rsplit(" ", 1)
    return dict(answer=answer, text={"numbers": numbers})


SUMS = {"modle_add": 0.08, "modle_side": 0.04, "modle_stack": 0.03}
for task in SUMS:
    TEMPLATES[task] = ("{numbers} =",)
    TASKS[task] = partial(data.make_sample, modle_drill, task)
METRIC.update(SUMS)

STAGES["tiny"] = [
    Stage(
        "I encoder", {}, ("encoder", "scene"), "encoder", iterations=700, batch=16, lr=3e-3,
        schedule="cosine", warmup=0.04, weight_decay=0.01,
    ),
    Stage(
        "II referents",
        {"ground": 0.08, "subtract": 0.06, **SUMS, **USUAL, **MODLE, "modle_distance": 0.12,
         "distance": 0.08},  # in everyday words too: then a distance is also understood in words never read
        ("scene", "code", "lm"), "referents", iterations=1000, batch=128, per_scene=8, lr=2e-3,
        schedule="trapezoid", weight_decay=0.01, reasoning=True,
    ),
]  # fmt: skip


def build(config, text):
    """Build the model of a configuration: from nothing where it names no language model."""
    return TinyModel(config, text) if config.llm is None else Model(config, text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
