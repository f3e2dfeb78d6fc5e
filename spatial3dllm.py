"""Spatial 3D-LLM: Exploring Spatial Awareness in 3D Vision-Language Models.

ICME 2025, arXiv 2507.16524. Of this paper only the abstract, descriptions by others and the names of its parts are
public: neither equations nor sizes, losses or schedules. The parts below are built after the nearest public relatives,
and every choice is listed.

Idea. A cloud of points becomes a few hundred *referents*, tokens that know where they are. Each gathers the points that
vote for the same object (intra-referent), hears its neighbours (inter-referent) and looks back at the whole scene
(contextual). A language model reads them and writes locations as text: boxes, distances, edited layouts. Things are
named by description ("the red chair") or by their box in text, never by an identifier.

  cloud [N,3] + colour, normal, height [N,7] --PointNet++ (frozen)--> seeds f [M,C], p [M,3]
  seeds --FFN--> votes v [M,3] --farthest points, balls, max--> referents h [R,C] at their votes
  h --k-NN graph, 2 layers--> h --cross-attention to the seeds, Fourier positions--> h [R,C], boxes [R,6]
  projector(h) + code(boxes) = scene tokens [R,D] -> Llama with LoRA -> "red chair [1.25, -0.80, 0.45, ...] ... = 2.03"

Axes: B scenes, N points, M seeds, R referents, P points of a ball, C channels, H heads, K scene tokens (= R), D width
of the language model, S packed rows (one per scene), n positions read at a time, Q questions, T text, A answer tokens.

| paper                                     | here                                                   |
| scene encoder, PointNet++, frozen         | SetAbstraction, FeaturePropagation, PointNet           |
| intra-referent clustering and abstraction | Abstraction                                            |
| inter-referent message passing            | neighbour_graph, Graph                                 |
| contextual referent-scene interaction     | FourierPosition, Context                               |
| location-enriched scene embeddings        | LocationCode, Model.encode                             |
| Vicuna-7B, instruction tuning             | load_llm, STAGES                                       |
| MODLE (abstract: 263K annotations)        | TASKS, write_modle; metrics: evaluate's rooms/modle_*  |
| ablations of the three modules            | Config.intra, .inter, .context, .positions; last part  |

What is not public, and what we chose
- Encoder: VoteNet's backbone, set abstractions 2048/0.2 m, 1024/0.4, 512/0.8, 256/1.2 with 64, 32, 16, 16 points and
  two feature propagations to 1,024 seeds of 256 channels. A ball takes its *nearest* points, not the first in memory:
  the order of the points changes nothing. All levels and the referents are prefixes of one farthest-point order.
- Votes: Vote2Cap-DETR's vote query, which the descriptions match step by step: FFN to an offset and a feature, sampling
  on the seeds before they move, grouping after, radius 0.3 m, 16 votes, max pool, 256 referents.
- Graph: Scan2Cap's 10 neighbours by centre, symmetric, with self loops; H + ReLU(D^-1/2 A D^-1/2 LN(H) W), two layers.
- Context: one pre-norm cross-attention over all seeds and an FFN, 8 heads, random Fourier features of places. What a
  referent sees is written relative to its own place.
- Boxes: an MLP on the referent gives the rest of the way to the object's centre, and its size. The language model reads
  the six numbers through one linear map of their Fourier features (wavelengths 0.5 to 16 m), added to the token.
- Encoder training: votes (smooth L1), boxes (smooth L1 on centre and log size) and semantic class, told by the nearest
  word vectors of the language model (category and colour). The same loss, at 0.2, goes on beside the questions, for the
  three modules only: the encoder stays frozen.
- Language: LoRA of rank 32 on q, k, v, o and the schedule of the same group's 3DMIT (2 epochs, batch 128, 5e-4);
  loss on the answer only. Boxes in metres with two decimals, or 0-255 integers (`locations="grid"`).
- All of MODLE (see its section). The paper's RefCOCO and CLEVR checks are images, outside the scope of this file.
- The tiny preset has nothing pre-trained. In its place: an initialisation that looks back at the last words, attends to
  what shares content and copies it (`start_tiny`), number tokens that start as the code of their own value, stages on
  symbols (one token per object: its words and its true box), seeds spread by colour and normal too, so that small
  things own some, and answers that write their steps. None of that touches a loaded model.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import data
from data import (
    DIRECTIONS,
    DataError,
    Facts,
    Sample,
    Scene,
    SceneLanguageModel,
    Source,
    Stage,
    facts,
    listed,
    metres,
    pick,
    several,
)

# ---- configuration ---------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every number of the model; `paper()` are the paper's where it names them, `tiny()` trains from nothing."""

    llm: str | None = None  # a Llama (Vicuna) name or folder; None builds a tiny one from the fields below
    points: int = 40_000  # of the cloud that are read; VoteNet 40,000
    centres: tuple[int, ...] = (2048, 1024, 512, 256)  # of the four set abstractions; the second level are the seeds
    radii: tuple[float, ...] = (0.2, 0.4, 0.8, 1.2)  # metres, of their balls
    samples: tuple[int, ...] = (64, 32, 16, 16)  # nearest points per ball
    pairs: int = 2  # layers of a set abstraction's MLP, after the first, that see every pair; PointNet++ 2
    feature: int = 256  # channels of seeds and referents
    spread: float = 0.0  # metres per unit of colour when centres are sampled; 0: by place alone
    spread_normal: float = 0.0  # metres per unit of normal
    referents: int = 256
    ball: float = 0.3  # metres around a vote
    ball_samples: int = 16
    neighbours: int = 10  # of the referents' graph
    graph_layers: int = 2
    context_heads: int = 8
    fourier: int = 128  # random features of the contextual positions
    intra: bool = True  # False: referents are seeds as they are, no votes, no abstraction
    inter: str = "graph"  # a key of INTER
    context: bool = True  # False: referents never look back at the scene
    positions: bool = True  # False: nothing that the language model reads says where a referent is
    locations: str = "metres"  # a key of LOCATIONS, of a loaded model: boxes as metres or as integers 0..255
    teach: float = 0.2  # weight of the detection loss beside the questions
    encoder: str | None = None  # file of a trained encoder (Model.save_encoder)
    lora_rank: int = 32  # of a loaded model; 3DMIT 32
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    # the tiny model, used only where llm is None
    width: int = 128
    layers: int = 2
    heads: int = 4
    hidden: int = 256
    dtype: str = "float32"

    @classmethod
    def tiny(cls, **changes) -> Config:
        small = dict(points=2048, centres=(512, 256, 128, 64), samples=(16, 16, 16, 16), pairs=0, feature=128,
                     spread=2.0, spread_normal=0.3, referents=96, context_heads=4, fourier=48)  # fmt: skip
        return cls(**{**small, **changes})

    @classmethod
    def paper(cls, **changes) -> Config:
        return cls(**{**dict(llm="lmsys/vicuna-7b-v1.5", dtype="bfloat16"), **changes})


# ---- 1 geometry of a cloud, worked out once per scene ----------------------------------------------------------------


def sample_order(space: np.ndarray, count: int) -> np.ndarray:
    """Farthest-point order [count] of points space [N, D], from the one farthest from the centroid; where there are
    fewer points they come again. Every prefix is itself a farthest-point sample, so one order serves all levels."""
    x = np.asarray(space, dtype=np.float64)
    square = np.square(x).sum(1)
    nearest = np.full(len(x), np.inf)
    order = np.empty(min(count, len(x)), dtype=np.int64)
    index = int(np.square(x - x.mean(0)).sum(1).argmax())
    for k in range(len(order)):
        order[k] = index
        np.minimum(nearest, square - 2 * (x @ x[index]) + square[index], out=nearest)
        nearest[index] = -np.inf
        index = int(nearest.argmax())
    return np.resize(order, count)


def ball_query(centres: np.ndarray, points: np.ndarray, radius: float, samples: int) -> np.ndarray:
    """The nearest `samples` points within `radius` of every centre: indices [M, samples]; places left over repeat the
    nearest, which a maximum does not feel. centres [M, 3], points [N, 3]."""
    from scipy.spatial import cKDTree

    distance, index = cKDTree(points).query(centres, k=min(samples, len(points)))
    distance, index = distance.reshape(len(centres), -1), index.reshape(len(centres), -1)
    index = np.where(distance <= radius, index, index[:, :1])
    return np.concatenate([index, np.repeat(index[:, :1], samples - index.shape[1], 1)], 1)


def interpolation(fine: np.ndarray, coarse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The three nearest coarse points of every fine one [M, 3], and their weights by inverse distance [M, 3]."""
    from scipy.spatial import cKDTree

    distance, index = cKDTree(coarse).query(fine, k=[1, 2, 3] if len(coarse) > 2 else [1, 1, 1])
    weight = 1 / (distance + 1e-8)
    return index, (weight / weight.sum(1, keepdims=True)).astype(np.float32)


# ---- 2 scene encoder: PointNet++ -------------------------------------------------------------------------------------


def gather(values: Tensor, index: Tensor) -> Tensor:
    """values [B, N, C] at index [B, ...] -> [B, ..., C]."""
    B, C = values.shape[0], values.shape[-1]
    flat = index.reshape(B, -1, 1).expand(-1, -1, C)
    return values.gather(1, flat).view(*index.shape, C)


def gather_max(values: Tensor, index: Tensor) -> Tensor:
    """max over P of values [B, N, C] at index [B, M, P] -> [B, M, C], without ever holding [B, M, P, C]."""
    B, N, C = values.shape
    rows = index + torch.arange(B, device=index.device)[:, None, None] * N  # [B, M, P] into B * N
    return F.embedding_bag(rows.flatten(0, 1), values.reshape(B * N, C), mode="max").view(B, -1, C)


class SetAbstraction(nn.Module):
    """One level of PointNet++: over each ball the maximum of MLP([feature, (point - centre) / radius]).

    The first layer is linear, so it runs once per point and once per centre instead of once per pair. `pairs` more
    layers see every pair, as in the paper; with none (tiny) they follow the maximum, at a sixteenth of the work."""

    def __init__(self, inputs: int, hidden: int, outputs: int, radius: float, pairs: int):
        super().__init__()
        self.radius = radius
        self.feature = nn.Linear(inputs, hidden)
        self.place = nn.Linear(3, hidden, bias=False)
        self.pairs = nn.Sequential(*(m for _ in range(pairs) for m in (nn.ReLU(), nn.Linear(hidden, hidden))))
        self.out = nn.Sequential(nn.ReLU(), nn.Linear(hidden, outputs), nn.ReLU(), nn.Linear(outputs, outputs),
                                 nn.LayerNorm(outputs))  # fmt: skip

    def forward(self, f: Tensor, p: Tensor, q: Tensor, index: Tensor) -> Tensor:
        """f [B, N, C], p [B, N, 3], centres q [B, M, 3], index [B, M, P] of points in the ball -> [B, M, outputs]."""
        place = self.place.weight.T / self.radius  # [3, hidden]
        point, centre = self.feature(f) + p @ place, q @ place  # [B, N, hidden], [B, M, hidden]
        if len(self.pairs):
            h = self.pairs(gather(point, index) - centre[:, :, None]).amax(2)  # [B, M, hidden]
        else:
            h = gather_max(point, index) - centre  # [B, M, hidden]
        return self.out(h)  # [B, M, outputs]


class FeaturePropagation(nn.Module):
    """Coarse features interpolated to finer points, beside what those had, through an MLP."""

    def __init__(self, coarse: int, fine: int, outputs: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(coarse + fine, outputs), nn.ReLU(), nn.Linear(outputs, outputs))
        self.norm = nn.LayerNorm(outputs)

    def forward(self, coarse: Tensor, fine: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """coarse [B, M, C], fine [B, N, C'], index [B, N, 3] into M, weight [B, N, 3] -> [B, N, outputs]."""
        carried = (gather(coarse, index) * weight[..., None]).sum(2)  # [B, N, C]
        return self.norm(self.mlp(torch.cat([carried, fine], -1)))  # [B, N, outputs]


class PointNet(nn.Module):
    """PointNet++ with four set abstractions and two feature propagations: the second level's centres are the seeds."""

    inputs = 7  # colour, normal, height

    def __init__(self, config: Config):
        super().__init__()
        C = config.feature
        widths = [self.inputs, C // 2, C, C, C]
        self.down = nn.ModuleList(SetAbstraction(a, b, b, r, config.pairs) for a, b, r in
                                  zip(widths, widths[1:], config.radii, strict=False))  # fmt: skip
        self.up = nn.ModuleList(FeaturePropagation(C, C, C) for _ in range(2))

    def forward(self, f: Tensor, p: Tensor, order: Tensor, balls: Sequence[Tensor],
                links: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Cloud f [B, N, 7], p [B, N, 3]; order [B, M1] of the first centres, of which every later level is a prefix;
        balls [B, M, P] per level; links per propagation -> seed features [B, M2, C] and their places [B, M2, 3]."""
        q = gather(p, order)  # [B, M1, 3]
        levels = []
        for layer, index in zip(self.down, balls, strict=True):
            centres = q[:, : index.shape[1]]  # [B, M, 3]
            f, p = layer(f, p, centres, index), centres  # [B, M, C], [B, M, 3]
            levels.append(f)
        for layer, fine, link in zip(self.up, (levels[2], levels[1]), links, strict=True):
            f = layer(f, fine, *link)  # [B, finer, C]
        return f, q[:, : f.shape[1]]  # [B, M2, C], [B, M2, 3]


# ---- 3 intra-referent clustering and abstraction ---------------------------------------------------------------------


class Abstraction(nn.Module):
    """Votes of the seeds, grouped in balls around the votes of the first R of them, pooled: referents with centres."""

    def __init__(self, config: Config):
        super().__init__()
        C = config.feature
        self.ball, self.samples = config.ball, config.ball_samples
        self.vote = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, C), nn.ReLU(), nn.Linear(C, 3 + C))
        self.feature, self.place = nn.Linear(C, C), nn.Linear(3, C, bias=False)
        self.out = nn.Sequential(nn.ReLU(), nn.Linear(C, C), nn.LayerNorm(C))

    def forward(self, f: Tensor, p: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Seeds f [B, M, C] at p [B, M, 3] in farthest-point order -> referents h [B, R, C] and the votes [B, M, 3] of
        all seeds, of which the first R are the referents' centres."""
        moved, change = self.vote(f).split((3, f.shape[-1]), -1)  # [B, M, 3], [B, M, C]
        v, f = p + moved, f + change  # [B, M, 3], [B, M, C]
        q = v[:, :count]  # [B, R, 3]
        with torch.no_grad():
            far, index = torch.cdist(q, v).topk(min(self.samples, v.shape[1]), largest=False)  # [B, R, P]
            own = torch.arange(q.shape[1], device=q.device)[:, None]  # what is too far is the referent itself again
            index = torch.where(far <= self.ball, index, own)  # [B, R, P]
        place = self.place.weight.T / self.ball  # [3, C]
        h = gather_max(self.feature(f) + v @ place, index) - q @ place  # [B, R, C]
        return self.out(h), v  # [B, R, C], [B, M, 3]


# ---- 4 inter-referent message passing --------------------------------------------------------------------------------


def neighbour_graph(centres: Tensor, k: int) -> Tensor:
    """D^-1/2 A D^-1/2 of the symmetric graph in which every referent knows itself and its k nearest: centres
    [B, R, 3] -> [B, R, R]."""
    far = torch.cdist(centres, centres)  # [B, R, R]
    near = far.topk(min(k + 1, far.shape[-1]), largest=False).indices  # [B, R, k + 1]
    linked = torch.zeros_like(far).scatter_(-1, near, 1.0)  # [B, R, R]
    linked = torch.maximum(linked, linked.mT)  # [B, R, R]
    linked.diagonal(dim1=-2, dim2=-1).fill_(1.0)  # of two referents at one place either may be the nearest
    degree = linked.sum(-1).rsqrt()  # [B, R]
    return degree[..., None] * linked * degree[..., None, :]  # [B, R, R]


class Graph(nn.Module):
    """H <- H + ReLU(D^-1/2 A D^-1/2 LN(H) W), a few times."""

    def __init__(self, config: Config):
        super().__init__()
        C = config.feature
        self.k = config.neighbours
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(config.graph_layers))
        self.layers = nn.ModuleList(nn.Linear(C, C, bias=False) for _ in range(config.graph_layers))

    def forward(self, h: Tensor, centres: Tensor) -> Tensor:
        """h [B, R, C], centres [B, R, 3] -> [B, R, C]."""
        graph = neighbour_graph(centres.detach(), self.k)  # [B, R, R]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            h = h + F.relu(graph @ layer(norm(h)))  # [B, R, C]
        return h


# ---- 5 contextual referent-scene interaction -------------------------------------------------------------------------


class FourierPosition(nn.Module):
    """Random Gaussian Fourier features of a place (Tancik et al. 2020), and a linear map."""

    def __init__(self, features: int, C: int, scale: float = 1.0):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(3, features // 2) * (2 * math.pi * scale))
        self.out = nn.Linear(features, C, bias=False)

    def forward(self, places: Tensor) -> Tensor:
        """places [..., 3] metres -> [..., C]."""
        phase = places @ self.frequencies  # [..., waves]
        return self.out(torch.cat([phase.cos(), phase.sin()], -1))  # [..., C]


class Context(nn.Module):
    """Referents look at all seeds of the scene: pre-norm cross-attention with Fourier positions, and an FFN."""

    def __init__(self, config: Config):
        super().__init__()
        C = config.feature
        self.heads = config.context_heads
        self.norm, self.norm_scene, self.norm_mlp = (nn.LayerNorm(C) for _ in range(3))
        self.position = FourierPosition(config.fourier, C, 0.25)
        self.query, self.key, self.value, self.out = (nn.Linear(C, C) for _ in range(4))
        self.place = nn.Linear(3, C, bias=False)  # what is seen is written from the referent's own place
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.ReLU(), nn.Linear(2 * C, C))

    def forward(self, h: Tensor, centres: Tensor, scene: Tensor, places: Tensor) -> Tensor:
        """Referents h [B, R, C] at centres [B, R, 3], seeds scene [B, M, C] at places [B, M, 3] -> [B, R, C]."""
        B, R, C = h.shape
        split = lambda x: x.view(B, -1, self.heads, C // self.heads).transpose(1, 2)  # noqa: E731
        q, s = self.norm(h), self.norm_scene(scene)  # [B, R, C], [B, M, C]
        q = split(self.query(q + self.position(centres)))  # [B, H, R, C / H]
        k, v = split(self.key(s + self.position(places))), split(self.value(s) + self.place(places))  # [B, H, M, C / H]
        seen = F.scaled_dot_product_attention(q, k, v)  # [B, H, R, C / H]
        seen = seen.transpose(1, 2).reshape(B, R, C) - self.place(centres)  # [B, R, C]
        h = h + self.out(seen)  # [B, R, C]
        return h + self.mlp(self.norm_mlp(h))  # [B, R, C]


# ---- 6 the model -----------------------------------------------------------------------------------------------------

WAVES = 6  # wavelengths 0.5, 1, ... 16 m


def waves(values: Tensor) -> Tensor:
    """[...] metres -> [..., 2 * WAVES]: cosines and sines of the value at WAVES wavelengths."""
    phase = values[..., None] * (2 * math.pi / 0.5 / 2 ** torch.arange(WAVES, device=values.device))  # [..., WAVES]
    return torch.cat([phase.cos(), phase.sin()], -1)  # [..., 2 * WAVES]


class LocationCode(nn.Module):
    """Where a token is, for the language model: a linear map of Fourier features of its box's six numbers."""

    def __init__(self, width: int):
        super().__init__()
        self.out = nn.Linear(6 * 2 * WAVES, width, bias=False)

    def forward(self, boxes: Tensor) -> Tensor:
        """boxes [..., 6] metres -> [..., D]."""
        return self.out(waves(boxes).flatten(-2))  # [..., D]


def build_llm(config: Config, vocabulary: int):
    """A small Llama from its configuration: the class that `from_pretrained` loads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(vocab_size=vocabulary, hidden_size=config.width, intermediate_size=config.hidden,
                        num_hidden_layers=config.layers, num_attention_heads=config.heads,
                        num_key_value_heads=config.heads, max_position_embeddings=32768, pad_token_id=0, bos_token_id=1,
                        eos_token_id=1, tie_word_embeddings=True, attention_bias=True,
                        rope_parameters={"rope_type": "default", "rope_theta": 1e6})  # fmt: skip
    shape._attn_implementation = "sdpa"
    return LlamaForCausalLM(shape)


def load_llm(config: Config):
    """A pre-trained Llama, its attention adapted by LoRA (peft) on q, k, v and o."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForCausalLM

    llm = AutoModelForCausalLM.from_pretrained(config.llm, dtype=getattr(torch, config.dtype),
                                               attn_implementation="sdpa")  # fmt: skip
    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                      target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])  # fmt: skip
    return inject_adapter_in_model(lora, llm)


@torch.no_grad()
def start_tiny(model: Model, text: data.TinyText) -> None:
    """Give a model from a configuration what pre-training would: attend to what shares content, copy it unchanged
    (`data.start_decoder`).

    The weights are scaled for a width of 100s, not 1000s; embeddings have unit size and the logits a small gain. The
    token of a number starts as the code that a referent with this number carries, so that reading a box is the same
    copy as reading a name. All of it is trained on.
    """
    llm, D = model.llm.model, model.width
    data.start_weights(llm)
    data.start_decoder(llm, model.config.heads)
    table = llm.embed_tokens.weight
    nn.init.normal_(table)
    maps = dict(zip("xyzwdhl", torch.randn(7, 2 * WAVES, D) / math.sqrt(WAVES), strict=True))  # l: lengths, of no axis
    for token, (axis, value) in text.number.items():
        table[token] = waves(torch.tensor(value)) @ maps[axis] + 0.3 * torch.randn(D)
    # a place speaks softly at first, a size softer: full strength would drown the words that grounding needs
    gain = dict(zip("xyzwdh", [0.35] * 3 + [0.25] * 3, strict=True))
    model.code.out.weight.copy_(torch.cat([gain[a] * maps[a] for a in gain]).T)


def detection_loss(boxes: Tensor, votes: Tensor, features: Tensor, true: Tensor, named: Tensor, on: Tensor,
                   words: Sequence[Tensor]) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What referents should know: (mean loss, share of those on objects whose category and colour are right).

    boxes [B, R, 6] and features [B, R, D] of referents, votes [B, M, 3] of seeds; of every seed the true box
    true [B, M, 6] (of walls and floor: the seed's own place, its size counts for nothing), the numbers named [B, M, 2]
    of its category and its colour (0 = nothing), and whether it lies on an object on [B, M]; words are the language
    model's vectors of all categories and of all colours, each [., D]. Referents are the first R seeds.
    """
    R, mean = boxes.shape[1], lambda loss, weight: (loss * weight).sum() / weight.sum()
    far = lambda a, b: F.smooth_l1_loss(a, b, beta=0.1, reduction="none").mean(-1)  # noqa: E731
    share = lambda on, other: torch.where(on, 1.0, other)  # noqa: E731  (walls and floor are everywhere)
    voted = mean(far(votes, true[..., :3]), share(on, 0.1))
    true, named, on = true[:, :R], named[:, :R], on[:, :R]
    boxed = mean(far(boxes[..., :3], true[..., :3]), share(on, 0.1))
    if on.any():
        boxed = boxed + 0.5 * far(boxes[..., 3:].log(), true[..., 3:].log())[on].mean()
    z = F.normalize(features.float(), dim=-1)  # [B, R, D]
    told, right, whole = 0.0, on, 0.0
    for kind, vectors in enumerate(words):
        logits = 25 * z @ F.normalize(vectors, dim=-1).T  # [B, R, names]
        told = told + F.cross_entropy(logits.mT, named[..., kind], reduction="none")  # [B, R] which name, and
        right = right & (logits.argmax(-1) == named[..., kind])
        whole = whole + vectors[named[..., kind]]
    apart = 1 - F.cosine_similarity(z, whole, dim=-1)  # [B, R] written as their sum
    loss = mean(told + apart, share(on, 0.3)) + 2 * (voted + boxed)
    return loss, right.sum() / on.sum().clamp(min=1)


class Model(SceneLanguageModel):
    """Spatial 3D-LLM around a Llama. See the file's docstring for shapes."""

    scene_inputs = ("encoder", "symbols", "referents")

    def __init__(self, config: Config, text: data.TinyText | data.HubText):
        super().__init__(config, text)
        data.choose(LOCATIONS, config.locations, "form of locations")
        if config.locations != "metres" and config.llm is None:
            raise DataError(f"locations = {config.locations}: the tiny tokenizer has metres only; leave it unset")
        self.llm = build_llm(config, len(text)) if config.llm is None else load_llm(config)
        C, D = config.feature, self.llm.config.hidden_size
        self.width = D
        self.frozen_pretrained_names = () if config.llm is None else tuple(
            f"llm.{name}" for name in self.llm.state_dict() if "lora_" not in name)  # fmt: skip
        self.encoder, self.intra, self.context = PointNet(config), Abstraction(config), Context(config)
        data.choose(INTER, config.inter, "inter-referent part")
        self.inter = nn.ModuleDict({name: part(config) for name, part in INTER.items()})  # all: runs share weights
        self.box = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, 6))
        self.projector = nn.Sequential(nn.Linear(C, D), nn.GELU(), nn.Linear(D, D), nn.LayerNorm(D))
        self.code = LocationCode(D)
        for part in (self.encoder, self.intra, self.inter, self.context, self.box, self.projector):
            data.start_weights(part)
        scale = self.embeddings.detach().float().square().mean().sqrt()  # what is new speaks as loud as words
        with torch.no_grad():
            for small in (self.intra.vote[-1], self.box[-1], *self.inter["graph"].layers):
                small.weight.mul_(0.2)
            self.context.key.weight.copy_(self.context.query.weight)  # look first at what is alike and near
            nn.init.normal_(self.code.out.weight, std=float(scale) * (6 * WAVES) ** -0.5)
            self.projector[-1].weight.fill_(1.0 if config.llm is None else float(scale))
        if config.llm is None:
            start_tiny(self, text)
        if config.encoder:
            self.load_encoder(Path(config.encoder))
        self.encoder_trains = False
        self.cache, self.names = {}, [[""], [""]]

    @property
    def embeddings(self) -> Tensor:
        return self.llm.get_input_embeddings().weight

    # -- what trains, and on what

    def parts(self) -> dict[str, list[nn.Module | nn.Parameter]]:
        """What a stage may train; modules that are switched off take no part."""
        c = self.config
        lora = [p for name, p in self.llm.named_parameters() if "lora_" in name]
        return {"encoder": [self.encoder], "code": [self.code] * c.positions, "lm": lora or [self.llm],
                "scene": [self.projector, self.box, self.inter[c.inter], *[self.intra] * c.intra,
                          *[self.context] * c.context]}  # fmt: skip

    def configure_stage(self, stage: Stage) -> None:
        super().configure_stage(stage)
        self.encoder_trains = "encoder" in stage.trains
        if self.encoder_trains:
            self.feature_cache = {}

    # -- clouds to seeds

    def cloud(self, scene: Scene) -> dict:
        """The geometry of a scene's cloud as it lies in memory, worked out once: f [N, 7] colour, normal, height;
        p [N, 3]; order, balls and links as `PointNet.forward` takes them; inst [M] object ids of the seeds."""
        key = ("cloud", scene.name)
        if key not in self.cache:
            c, back = self.config, scene.turn.T.astype(np.float32)
            if scene.points is None or not len(scene.points):
                raise DataError(f"{scene.name}: Spatial 3D-LLM reads a cloud, and this scene has no points")
            kept = np.lexsort(scene.points.T)  # the order in memory means nothing
            if len(kept) > c.points:
                kept = kept[np.sort(np.random.default_rng(0).permutation(len(kept))[: c.points])]
            p = scene.points[kept].astype(np.float32)
            n = np.zeros_like(p) if scene.normals is None else scene.normals[kept]
            rgb = np.full(p.shape, 0.5) if scene.colours is None else scene.colours[kept] / 255
            p, n = p @ back.T, n @ back.T
            f = np.concatenate([(rgb - 0.5) / 0.27, n, p[:, 2:] - 1], 1).astype(np.float32)  # all of unit size
            order = sample_order(np.concatenate([p, c.spread * rgb, c.spread_normal * n], 1), c.centres[0])
            levels = [p, *(p[order[:m]] for m in c.centres)]
            balls = [ball_query(q, x, r, k) for x, q, r, k in zip(levels, levels[1:], c.radii, c.samples, strict=False)]
            links = [interpolation(levels[i], levels[i + 1]) for i in (3, 2)]
            inst = np.zeros(len(p), int) if scene.instances is None else scene.instances[kept]
            self.cache[key] = {"f": f, "p": p, "order": order, "balls": balls, "links": links,
                               "inst": inst[order[: c.centres[1]]]}  # fmt: skip
        return self.cache[key]

    def encode_clouds(self, clouds: Sequence[dict], turn: Tensor) -> tuple[Tensor, Tensor]:
        """Clouds turned by turn [B, 3, 3] -> seed features [B, M, C] and places [B, M, 3]."""
        stack = lambda rows: torch.from_numpy(np.stack(rows)).to(turn.device)  # noqa: E731
        N = max(len(x["p"]) for x in clouds)
        f, p = (stack([np.pad(x[k], ((0, N - len(x[k])), (0, 0))) for x in clouds]) for k in ("f", "p"))
        f = torch.cat([f[..., :3], f[..., 3:6] @ turn.mT, f[..., 6:]], -1)  # [B, N, 7], normals turned
        balls = [stack(level) for level in zip(*(x["balls"] for x in clouds), strict=True)]
        links = [[stack([x["links"][i][j] for x in clouds]) for j in (0, 1)] for i in (0, 1)]
        return self.encoder(f, p @ turn.mT, stack([x["order"] for x in clouds]), balls, links)

    def see(self, scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Referents [B, R, C], their boxes [B, R, 6], of all seeds votes and places [B, M, 3] and object ids [B, M].

        While the encoder trains it sees the scenes as they are turned. A frozen one saw them once, unturned: what
        follows from its cached seeds is turned afterwards, as features cannot be."""
        turn = torch.from_numpy(np.stack([s.turn for s in scenes])).float().to(self.llm.device)
        with torch.autocast(turn.device.type, enabled=False):  # metres stay float32
            if self.encoder_trains:
                clouds = [self.cloud(s) for s in scenes]
                inst = torch.from_numpy(np.stack([x["inst"] for x in clouds])).to(turn.device)
                f, p = self.encode_clouds(clouds, turn)
                return *self.referents(f, p), p, inst
            found = [self.load_features(s) for s in scenes]
            f, p, inst = (torch.stack([x[k] for x in found]).to(turn.device) for k in ("f", "p", "inst"))
            h, boxes, votes = self.referents(f.float(), p)
            boxes = torch.cat([boxes[..., :3] @ turn.mT, boxes[..., 3:] @ turn.abs().mT], -1)
            return h, boxes, votes @ turn.mT, p @ turn.mT, inst

    def feature_settings(self) -> tuple:
        c = self.config
        return (c.points, c.centres, c.radii, c.samples, c.spread, c.spread_normal)

    def feature_weights(self) -> nn.Module:
        return self.encoder

    def uses_features(self) -> bool:
        return not self.encoder_trains and self.stage.scene_input != "symbols"

    def compute_features(self, scene: Scene) -> dict[str, Tensor]:
        """Seeds of the frozen encoder: {"f" [M, C] float16, "p" [M, 3] metres, "inst" [M]}."""
        cloud = self.cloud(scene)
        f, p = self.encode_clouds([cloud], torch.eye(3, device=self.llm.device)[None])
        return {"f": f[0].half(), "p": p[0], "inst": torch.from_numpy(cloud["inst"]).long()}

    def cache_features(self, scenes: Sequence[Scene], folder: Path | None = None,
                       rank: int = 0, world: int = 1) -> None:  # fmt: skip
        """Frozen work, once: the geometry of the clouds, or the seeds of the frozen encoder; and the categories and
        colours that are told apart."""
        for kind, of in enumerate((lambda o: o.category, lambda o: o.colour)):
            found = {of(o) for s in scenes for o in s.objects} - data.STRUCTURE
            self.names[kind] = sorted(found.union(self.names[kind], [""]))  # "" sorts first: nothing
        if self.encoder_trains:
            for scene in scenes[rank::world]:
                self.cloud(scene)
        super().cache_features(scenes, folder, rank, world)

    def save_encoder(self, path: Path) -> None:
        """The trained scene encoder as a file of its own, with the settings it belongs to."""
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().float().cpu().contiguous() for k, v in self.encoder.state_dict().items()}
        save_file(weights, path, {"settings": json.dumps(self.encoder_settings())})

    def load_encoder(self, path: Path) -> None:
        """Read a file of `save_encoder` into this model. Raises DataError where it is missing or of other settings."""
        try:
            with safe_open(path, "pt") as stored:
                settings = json.loads((stored.metadata() or {}).get("settings", "null"))
                weights = {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: no readable encoder ({error}); write one with python spatial3dllm.py encoder"
                            ) from None  # fmt: skip
        if settings != self.encoder_settings():
            raise DataError(f"{path}: an encoder with {settings}; these settings are {self.encoder_settings()}")
        self.encoder.load_state_dict(weights)

    def encoder_settings(self) -> dict:
        c = self.config
        return {"centres": list(c.centres), "radii": list(c.radii), "pairs": c.pairs, "feature": c.feature}

    # -- seeds to tokens

    def referents(self, f: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Seeds f [B, M, C] at p [B, M, 3] -> referents [B, R, C], boxes [B, R, 6] and the seeds' votes [B, M, 3]."""
        c = self.config
        h, v = self.intra(f, p, c.referents) if c.intra else (f[:, : c.referents], p)
        q = v[:, : c.referents]  # [B, R, 3]
        h = self.inter[c.inter](h, q)  # [B, R, C]
        if c.context:
            h = self.context(h, q, f, p) if c.positions else self.context(h, 0 * q, f, 0 * p)  # [B, R, C]
        box = self.box(h)  # [B, R, 6] the rest of the way, and log sizes
        return h, torch.cat([q + box[..., :3], (box[..., 3:] - 1).clamp(-5, 3).exp()], -1), v

    def words_of(self, name: str) -> Tensor:
        """The language model's vector [D] for a name, the mean over its tokens; "" = <unk>, nothing."""
        ids = self.text.encode(name) if name else [getattr(self.text, "unk", self.text.eos)]
        return self.embeddings[ids].float().mean(0)

    def seen_loss(self, scenes: Sequence[Scene], features: Tensor, boxes: Tensor, votes: Tensor, places: Tensor,
                  inst: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`detection_loss` with the truth of the scenes; places [B, M, 3] and object ids inst [B, M] of the seeds."""
        index = [{name: i for i, name in enumerate(names)} for names in self.names]
        most = 1 + max(int(inst.max()), max((o.id for s in scenes for o in s.objects), default=0))
        true, named = torch.ones(len(scenes), most, 6), torch.zeros(len(scenes), most, 2, dtype=torch.long)
        on = torch.zeros(len(scenes), most, dtype=torch.bool)
        for b, scene in enumerate(scenes):
            for o in (o for o in scene.objects if o.category not in data.STRUCTURE):
                on[b, o.id], true[b, o.id] = True, torch.from_numpy(o.box)
                named[b, o.id] = torch.tensor([index[0].get(o.category, 0), index[1].get(o.colour, 0)])
        at = torch.arange(len(scenes))[:, None], inst.cpu()
        true, named, on = (x[at].to(inst.device) for x in (true, named, on))  # [B, M, 6], [B, M, 2], [B, M]
        true = torch.where(on[..., None], true, torch.cat([places, torch.ones_like(places)], -1))
        with torch.no_grad():
            words = [torch.stack([self.words_of(name) for name in names]) for names in self.names]
        return detection_loss(boxes, votes, features, true, named, on, words)

    def symbols(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """The tiny preset's stand-in for referents, one per object in random order: words [n, D], true boxes [n, 6]."""
        order = np.random.default_rng(list(scene.identifiers.values())).permutation(len(scene.objects))
        things = [scene.objects[i] for i in order]
        first = lambda name: (self.text.encode(name) or [self.text.unk])[0]  # noqa: E731
        words = torch.tensor([[first(o.category), first(o.colour)] for o in things])  # [n, 2]
        boxes = torch.from_numpy(np.stack([o.box for o in things])).float()
        return F.layer_norm(self.embeddings[words].sum(1), (self.width,)), boxes.to(self.embeddings.device)

    def scene_length(self, scene: Scene) -> int:
        """How many tokens the scene will take."""
        return len(scene.objects) if self.stage.scene_input == "symbols" else self.config.referents

    def look(self, scenes: Sequence[Scene], teach: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Scene tokens [B, K, D], valid [B, K], and with `teach` the detection loss."""
        if self.stage.scene_input == "symbols":
            rows = [self.symbols(s) for s in scenes]
            z, boxes = (nn.utils.rnn.pad_sequence(part, batch_first=True) for part in zip(*rows, strict=True))
            valid = torch.arange(z.shape[1]) < torch.tensor([len(r[0]) for r in rows])[:, None]  # [B, K]
            loss = torch.zeros(())
        else:
            h, boxes, *seeds = self.see(scenes)
            z = self.projector(h)  # [B, K, D]
            valid = torch.ones(z.shape[:2], dtype=torch.bool)
            loss = self.seen_loss(scenes, z, boxes, *seeds)[0] if teach else torch.zeros(())
        if self.config.positions:
            z = z + self.code(boxes)  # [B, K, D]
        return z, valid.to(z.device), loss

    def encode(self, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        """Scene tokens [B, K, D] and valid [B, K]; what they are depends on the stage."""
        teach = self.training and self.stage.scene_input == "referents"
        tokens, valid, seen = self.look(scenes, teach)
        return {"tokens": tokens, "valid": valid} | ({"auxiliary_loss": self.config.teach * seen} if teach else {})

    # -- questions

    def object_to_text(self, scene: Scene, object_id: int) -> str:
        """How a question names a marked object: by its box in text."""
        return listed(scene.thing(object_id).box)

    def encoder_loss(self, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        """The detection loss per scene."""
        h, boxes, *seeds = self.see(scenes)
        loss, right = self.seen_loss(scenes, self.projector(h), boxes, *seeds)
        weight = torch.tensor(float(len(scenes)), device=loss.device)
        return {"loss": loss * weight, "weight": weight, "correct": right * weight}

    # -- own scenes and pictures

    def refusal(self, scene: Scene, question: str) -> str | None:
        """Why a question about a scene of one's own cannot be answered, or None: it names what several things are.

        The model learns to say so itself (rooms/modle_refuse); where the truth is known nobody need rely on that."""
        f, asked = facts(scene), question.lower()
        for words in sorted(f.described.values(), key=len, reverse=True):
            asked = asked.replace(f"the {words}", "it")
        for key, members in f.groups.items():
            if len(members) > 1 and re.search(rf"\bthe {re.escape(data.phrase(*key))}\b", asked):
                return f"{AMBIGUOUS} {len(members)} {data.phrase(*key, many=True)} are here."
        return None

    @torch.no_grad()
    def token_centers(self, scene: Scene) -> np.ndarray:
        """Where the scene's tokens are [K, 3], for pictures."""
        return self.see([scene])[1][0, :, :3].cpu().numpy()

    def pictures(self, scenes: Sequence[Scene], folder: Path, count: int = 4) -> list[Path]:
        """Some scenes with their referents, and a distance and an edited box as answered; returns the files."""
        paths = []
        for scene in scenes[:count]:
            scene = scene if scene.identifiers else replace(
                scene, identifiers=data.number_objects(scene, np.random.default_rng(0)))  # fmt: skip
            asked = data.question_set([scene], ["modle_distance", "modle_move"], 1, 0)
            answers = self.generate(self.batch([(scene, asked)])) if asked else []
            said = [text.rpartition("=")[2].strip() for text in answers]
            lines = [f"{s.question}  {t}  (true: {s.answer})" for s, t in zip(asked, said, strict=True)]
            paths += [folder / f"{scene.name}.png", folder / f"{scene.name}_referents.png"]
            data.draw_scene(scene, paths[-2], lines, self.token_centers(scene), answers)
            self.draw_referents(scene, paths[-1])
        return paths

    @torch.no_grad()
    def told(self, scene: Scene) -> dict[str, np.ndarray | list[str]]:
        """What the referents say of themselves: "box" [R, 6] and "name", the category nearest to each ("" = nothing),
        with "sure" [R], its share among all; and the "seed" [M, 3] with its "vote" [M, 3]."""
        h, boxes, votes, places, _ = (x[0] for x in self.see([scene]))
        names = ["", *sorted(data.CATEGORIES)]
        words = F.normalize(torch.stack([self.words_of(name) for name in names]).to(h.device), dim=-1)
        alike = F.normalize(self.projector(h).float(), dim=-1) @ words.T  # [R, names]
        sure, best = (25 * alike).softmax(-1).max(-1)
        found = {"box": boxes, "sure": sure, "seed": places, "vote": votes}
        return {k: v.float().cpu().numpy() for k, v in found.items()} | {"name": [names[i] for i in best.tolist()]}

    def draw_referents(self, scene: Scene, path: Path) -> None:
        """A picture of the way from points to referents: seeds, their votes, and of the referents that name something
        the surest of every place with its box."""
        found = self.told(scene)
        kept = surest(found["box"], found["sure"] * [bool(name) for name in found["name"]])
        title = (f"{scene.name}: {len(found['seed'])} seeds (grey) vote for the middle of their object (blue); "
                 f"{len(found['box'])} referents gather them (black)")  # fmt: skip
        lines = ["boxes and names: what the surest referent of each place says of its object"]
        with data.board(scene, path, title, lines, "pale") as views:
            for view in views:
                view.lines(np.stack([found["seed"], found["vote"]], 1), colors="steelblue", lw=0.5, alpha=0.6, zorder=1)
                view.dots(found["seed"], c="0.5", s=3, zorder=1)
                view.dots(found["vote"], c="royalblue", s=5, zorder=2)
                view.dots(found["box"][:, :3], c="black", s=9, zorder=3)
                view.boxes(found["box"][kept], colors="crimson", lw=1.2, zorder=3)
                view.labels(found["box"][kept, :3], [found["name"][i] for i in kept], 9)


def surest(boxes: np.ndarray, sure: np.ndarray, overlap: float = 0.25) -> list[int]:
    """Of boxes [R, 6] that overlap by more than that IoU, or lie within 0.3 m, the one with the highest `sure` [R];
    surest first, zeros left out (greedy non-maximum suppression)."""
    near = data.box_iou(boxes, boxes) > overlap
    near |= np.linalg.norm(boxes[:, None, :3] - boxes[:, :3], axis=-1) < 0.3
    kept: list[int] = []
    for i in np.argsort(-sure, kind="stable"):
        if sure[i] > 0 and not near[i, kept].any():
            kept.append(int(i))
    return kept


# ---- 7 locations as text ---------------------------------------------------------------------------------------------

GRID = 255  # the largest integer of the grid form (LL3DA's)


def _span(size: int, bounds: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Zero and unit [size] of the grid: positions run from the lowest to the highest corner, sizes are shares of it."""
    if bounds is None:
        raise DataError("locations on the grid are shares of the room: the scene needs bounds; write metres instead")
    span = np.maximum(np.diff(bounds, axis=0)[0], 1e-6)
    return np.concatenate([bounds[0], np.zeros(3)])[:size], np.tile(span, 2)[:size]


def write_metres(values: Sequence[float], bounds: np.ndarray | None = None) -> str:
    """A point [3] or a box [6] in metres: "[1.25, -0.80, 0.45]"."""
    return listed(values)


def read_metres(values: np.ndarray, bounds: np.ndarray | None = None) -> np.ndarray:
    return values


def write_grid(values: Sequence[float], bounds: np.ndarray | None) -> str:
    """A point or a box as integers 0..255 of the scene's bounds [2, 3] (LL3DA): "[128, 90, 12]". What lies outside is
    written as the end of the range."""
    zero, unit = _span(len(values), bounds)
    return str(np.clip(np.round((np.asarray(values, float) - zero) / unit * GRID), 0, GRID).astype(int).tolist())


def read_grid(values: np.ndarray, bounds: np.ndarray | None) -> np.ndarray:
    zero, unit = _span(len(values), bounds)
    return zero + values / GRID * unit


LOCATIONS = {"metres": (write_metres, read_metres), "grid": (write_grid, read_grid)}


def read_locations(text: str, size: int, bounds: np.ndarray | None = None, form: str = "metres") -> list[np.ndarray]:
    """The points (size 3) or boxes (size 6) in an answer, [size] metres each; [] = it holds none. Never raises on text.

    Read are bracketed lists of that length, else lists in parentheses, else all bare numbers in groups of that length
    (3DMIT's rule). What is not finite, and a box without volume, is no location.
    """
    read = data.choose(LOCATIONS, form, "form of locations")[1]
    found = data.tuples(text, size) or data.tuples(re.sub(r"\(([^()]*)\)", r"[\1]", text), size)
    if not found:
        numbers = np.array([float(n) for n in re.findall(r"(?<![\d.])-?\d{1,6}(?:\.\d{1,9})?(?![\d.]*\d)", text)])
        found = list(numbers[: len(numbers) // size * size].reshape(-1, size))
    located = [read(values, bounds) for values in found if values is not None]
    return [v for v in located if np.isfinite(v).all() and (v[3:] > 0).all()]


def translate(text: str, bounds: np.ndarray | None, source: str, target: str) -> str:
    """The text with every bracketed point and box in another form: questions in metres become the grid's, a model's
    answers on the grid become metres. Lists of other lengths stay as they are."""
    (_, read), (write, _) = (data.choose(LOCATIONS, name, "form of locations") for name in (source, target))

    def rewrite(found: re.Match) -> str:
        values = next((v for size in (3, 6) for v in data.tuples(found[0], size)), None)
        return found[0] if values is None else write(read(values, bounds), bounds)

    return data.TUPLE.sub(rewrite, text)


# ---- 8 MODLE: distances measured, layouts edited ---------------------------------------------------------------------
#
# The composition, splits, wordings and scores of MODLE's 263K annotations are not public: all of this section is our
# choice. Objects are named by descriptions that fit them alone (`data.describe`). Distances run from centre to centre
# of the boxes. Directions are the axes of the scene, and a question says so: "along x to the right" = +x, "along y to
# the back" = +y. What is moved keeps its size and its orientation. A thing that is placed is taken away in thought
# only: the scene still shows it, but its old place counts as free, and an edit is asked only where source and target
# overlap by less than 0.25 IoU, so that its old place is never an answer.
#
# Steps (written before the answer where a model reasons aloud) hold only what the scene shows, what stands just before,
# or one sum of two neighbours:
#   distance      red chair [x, y, z] bed [x, y, z] xa xb dx ya yb dy za zb dz = d
#   move axis     red chair [box] x1.25 right 0.80 x2.05 = [box]
#   move towards  red chair [box] bed [x, y, z] x1.25 left 0.80 x0.45 = [box]
#   move beside   red chair [box] bed [x, y, z] x0.20 right 1.30 x1.50 = [box]            (from the bed's x, at its y)
#   place floor   red vase [box] bed [x, y, z] x0.20 right 1.30 x1.50 z0.00 h0.36 z0.18 = [box]
#   place top     red vase [box] table [box] z0.37 h0.74 z0.74 h0.36 z0.92 = [box]         (z + h / 2, twice)
# The two sums have drills of their own: modle_add "x1.25 right 0.80 =" -> "x2.05" and modle_stack "z0.74 h0.36 =" ->
# "z0.92"; data.TASKS has "subtract" and "norm" for distances.

TEMPLATES: dict[str, tuple[str, ...]] = {
    "modle_distance": ("from centre to centre, how far is the {what} from the {other}?",
                       "in metres between centres, how far is the {what} from the {other}?",
                       "what is the distance from the centre of the {what} to the centre of the {other}?",
                       "measure from the centre of the {what} to the centre of the {other}."),
    "modle_move_axis": ("move the {what} {direction} by {amount} metres.",
                        "move the {what} by {amount} metres {direction}.",
                        "shift the {what} {direction} by {amount} metres.",
                        "shift the {what} {amount} metres {direction}."),
    "modle_move_towards": ("move the {what} along {axis} towards the {other} by {amount} metres.",
                           "move the {what} by {amount} metres along {axis} towards the {other}.",
                           "shift the {what} along {axis} towards the {other} by {amount} metres."),
    "modle_move_beside": ("move the {what} next to the {other}, {direction} of its centre by {amount} metres.",
                          "move the {what} next to the {other}: {amount} metres {direction} of its centre.",
                          "shift the {what} next to the {other}, {amount} metres {direction} of its centre."),
    "modle_place_floor": (
        "take the {what} away and put it on the floor, {direction} of the centre of the {other} by {amount} metres.",
        "remove the {what}, then set it on the floor: {amount} metres {direction} of the centre of the {other}."),
    "modle_place_top": ("take the {what} away and put it in the middle on top of the {other}.",
                        "remove the {what}, then set it on top of the {other}, in the middle."),
    "modle_contradiction": ("move the {what} {direction} and {opposite} by {amount} metres.",
                            "shift the {what} by {amount} metres {direction} and {opposite}.",
                            "move the {what} {amount} metres towards the {what}.",
                            "take the {what} away and put it in the middle on top of the {what}."),
    # the second set: never trained on
    "modle_distance_loose": ("how many metres lie between the middle of the {what} and the middle of the {other}?",
                             "the {what} and the {other}: how far apart are their centres?",
                             "give me the length of a straight line from the {what} to the {other}, centre to centre."),
    "modle_move_axis_loose": ("i want the {what} {amount} metres further {direction}.",
                              "could you push the {what} {direction}? {amount} metres will do.",
                              "where is the {what} after it went {amount} metres {direction}?"),
    "modle_move_towards_loose": ("could you bring the {what} {amount} metres closer to the {other}, only along {axis}?",
                                 "i want the {what} closer to the {other}: {amount} metres along {axis}."),
    "modle_move_beside_loose": ("the {what} should be beside the {other}: centre {amount} metres {direction} of it.",
                                "i want the {what} beside the {other}, {amount} metres {direction}."),
    "modle_place_floor_loose": (
        "what if the {what} stood on the floor, {amount} metres {direction} of the {other}? where would it be?",
        "i want the {what} gone from there. it should stand on the floor, {amount} metres {direction} of the {other}."),
    "modle_place_top_loose": ("what if the {what} stood at the centre of the {other}, on it? where would it be?",
                              "i want the {what} gone from there. it should stand on the {other}, at its centre."),
    "modle_contradiction_loose": ("i want the {what} {amount} metres further {direction} and also {opposite}.",
                                  "could you push the {what} {direction}, but {opposite}? {amount} metres will do.",
                                  "i want the {what} gone from there. it should stand on the {what}, at its centre."),
    # what fills the wordings, and the fixed answers
    "modle_direction": ("along x to the left", "along x to the right", "along y to the front", "along y to the back"),
    "modle_refusal": ("more than one thing fits.", "this contradicts itself."),
    "modle_add": ("{numbers} =",), "modle_stack": ("{numbers} =",),
}  # fmt: skip
DIRECTION = {side: next(t for t in TEMPLATES["modle_direction"] if t.endswith(side)) for side in DIRECTIONS}
OPPOSITE = {"left": "right", "right": "left", "front": "back", "back": "front"}
AMBIGUOUS, CONTRADICTORY = TEMPLATES["modle_refusal"]
AMOUNTS = np.arange(2, 31) / 10  # metres of a move
NEXT_TO = 0.6  # metres: the widest gap between what is put next to each other
APART = 0.3  # metres: along the axis of a move "towards", so that the side is clear
SAME_PLACE = 0.25  # IoU of source and target at and above which an edit is not asked
TOUCH = 0.01  # metres: boxes that share more along every axis collide
TOPS = {*data.SURFACES, "coffee table", "end table", "side table", "dining table", "kitchen counter", "counter",
        "cabinet", "kitchen cabinet", "tv stand", "file cabinet"}  # fmt: skip


def tight(f: Facts) -> np.ndarray:
    """[2, 3] the room: its bounds, or the corners of all boxes where a scan gives none."""
    ends = f.boxes[:, :3] - f.boxes[:, 3:] / 2, f.boxes[:, :3] + f.boxes[:, 3:] / 2
    return np.stack([ends[0].min(0), ends[1].max(0)]) if f.bounds is None else f.bounds


def allowed(f: Facts, i: int, boxes: np.ndarray) -> np.ndarray:
    """Which boxes [m, 6] may be the new place of thing i, [m] bool: inside the room (to 2 cm), in nothing else
    (`data.collide`), held by the floor, by a wall or by one other thing (`data.carried`; not asked of what stands on
    unknown ground already), and elsewhere than before (SAME_PLACE)."""
    others = np.delete(f.boxes, i, axis=0)
    room = tight(f)
    inside = (boxes[:, :3] - boxes[:, 3:] / 2 >= room[0] - 0.02).all(1)
    inside &= (boxes[:, :3] + boxes[:, 3:] / 2 <= room[1] + 0.02).all(1)
    free = ~data.collide(boxes, others, TOUCH).any(1)
    floor, wall, carries = data.carried(boxes, others, f.bounds)
    held = floor | (carries.sum(1) + wall == 1) | (f.support[i] == data.NOTHING)
    return inside & free & held & (data.box_iou(boxes, f.boxes[i : i + 1])[:, 0] < SAME_PLACE)


def movable(f: Facts) -> list[int]:
    """Things with words of their own that are no part of a wall, no rug, and hold nothing."""
    holding = set(f.support.tolist())
    return [i for i in f.described if f.things[i].category not in data.BUILT and i not in holding
            and f.boxes[i, 5] >= data.FLAT]  # fmt: skip


def shifts(start: np.ndarray) -> tuple[list[str], np.ndarray, np.ndarray]:
    """A box [6] moved by every amount in every direction: sides, amounts [m] and boxes [m, 6]."""
    sides, boxes = [], []
    for side, (axis, sign) in DIRECTIONS.items():
        moved = np.repeat(start[None], len(AMOUNTS), axis=0)
        moved[:, axis] += sign * AMOUNTS
        sides += [side] * len(AMOUNTS)
        boxes.append(moved)
    return sides, np.tile(AMOUNTS, len(DIRECTIONS)), np.concatenate(boxes)


def add_up(axis: int, value: float, side: str, amount: float) -> tuple[str, float]:
    """The steps of a shift, "x1.25 right 0.80 x2.05", and the sum of the printed numbers."""
    total = round(round(value, 2) + DIRECTIONS[side][1] * amount, 2)
    return f"{'xyz'[axis]}{metres(value)} {side} {metres(amount)} {'xyz'[axis]}{metres(total)}", total


def half_up(z: float, height: float) -> tuple[str, float]:
    """The steps of half a height, "h0.36 z0.92", and the printed sum z + height / 2."""
    total = round(round(z, 2) + round(height, 2) / 2, 2)
    return f"h{metres(height)} z{metres(total)}", total


def modle_distance(scene: Scene, rng: np.random.Generator, task: str) -> Sample | None:
    """Metres between the centres of two described things; `value` is exact, the answer follows from the printed steps.
    modle_distance_one_view: one of them at least is seen in one frame only."""
    f = facts(scene)
    for i, j in filter(None, (pair_of(f, rng, task) for _ in range(4))):
        (a, p), (b, q) = ((f.described[k], f.boxes[k, :3].tolist()) for k in (i, j))
        steps, length = data.chain(p, q)
        if length >= 0.1:
            text, slots = {"what": a, "other": b}, {"a": f.category(i), "b": f.category(j)}
            return data.ask(scene, rng, task, metres(length), text, slots, wording_of(task),
                            steps=f"{a} {listed(p)} {b} {listed(q)} {steps} =", value=float(f.apart[1, i, j]),
                            about=[f.things[i].id, f.things[j].id])  # fmt: skip
    return None


def wording_of(task: str, kind: str = "") -> str:
    """The template of a task: modle_move_loose, kind "axis" -> modle_move_axis_loose."""
    base, loose, _ = task.removesuffix("_one_view").partition("_loose")
    return f"{base}{'_' * bool(kind)}{kind}{loose}"


def seen_once(f: Facts) -> set[int]:
    return {i for i, views in f.views.items() if len(views) == 1} if f.frames is not None else set()


def pair_of(f: Facts, rng: np.random.Generator, task: str) -> list[int]:
    """Two different described things in random order."""
    if not task.endswith("_one_view"):
        return several(rng, list(f.described), 2)
    first = pick(rng, sorted(seen_once(f) & f.described.keys()))
    rest = [i for i in f.described if i != first]
    return [] if first is None or not rest else several(rng, [first, pick(rng, rest)], 2)


def modle_move(scene: Scene, rng: np.random.Generator, task: str) -> Sample | None:
    """A described thing moved along an axis: by an amount ("axis"), by an amount towards another thing and not past it
    ("towards"), or to an amount from another's centre ("beside"). The answer is its new box. The direction and amount
    are drawn from all that are `allowed`. modle_move_one_view: of a thing seen in one frame only."""
    f = facts(scene)
    things = movable(f)
    if task.endswith("_one_view"):
        things = sorted(seen_once(f).intersection(things))
    for i in several(rng, things, min(4, len(things))):
        kind = pick(rng, ("axis", "towards", "beside"))
        j = None if kind == "axis" else pick(rng, [j for j in f.described if j != i])
        if kind == "axis" or j is not None:
            sample = move_to(scene, rng, task, kind, i, j)
            if sample:
                return sample
    return None


def move_to(scene: Scene, rng: np.random.Generator, task: str, kind: str, i: int, j: int | None) -> Sample | None:
    f = facts(scene)
    box = f.boxes[i]
    start = box.copy()
    if kind == "beside":
        start[:2] = f.boxes[j, :2]
    sides, amounts, boxes = shifts(start)
    good = allowed(f, i, boxes)
    axes, signs = np.array([DIRECTIONS[s] for s in sides]).T
    if kind == "towards":
        way = (f.boxes[j] - box)[axes] * signs
        good &= (way >= APART) & (amounts <= way)
    if kind == "beside":
        good &= amounts <= ((f.boxes[j] + box)[axes + 3] / 2 + NEXT_TO)
    k = pick(rng, np.flatnonzero(good))
    if k is None:
        return None
    side, amount, axis = sides[k], float(amounts[k]), int(axes[k])
    sums, new = add_up(axis, start[axis], side, amount)
    answer = start.copy()
    answer[axis] = new
    anchor = "" if j is None else f"{f.described[j]} {listed(f.boxes[j, :3])} "
    steps = f"{f.described[i]} {listed(box)} {anchor}{sums} ="
    return edit(scene, rng, task, kind, i, j, answer, boxes[k], steps, side, amount)


def edit(scene: Scene, rng: np.random.Generator, task: str, kind: str, i: int, j: int | None, answer: np.ndarray,
         box: np.ndarray, steps: str, side: str = "", amount: float = 0.0) -> Sample | None:  # fmt: skip
    """The Sample of an edit: `box` is exact, `answer` follows from the printed steps."""
    f = facts(scene)
    things = [i] if j is None else [i, j]
    text = dict(zip(("what", "other"), (f.described[k] for k in things), strict=False))
    if side:
        text |= {"direction": DIRECTION[side], "axis": "xy"[DIRECTIONS[side][0]], "amount": metres(amount)}
    slots = {"side": side, "what": f.category(i), "amount": metres(amount)}
    return data.ask(scene, rng, task, listed(answer), text, slots, wording_of(task, kind), steps=steps, kind=kind,
                    box=box, about=[f.things[k].id for k in things])  # fmt: skip


def modle_place(scene: Scene, rng: np.random.Generator, task: str) -> Sample | None:
    """A described thing taken away and put back: on the floor at an amount from the centre of another thing that stands
    there ("floor"), or in the middle on top of one whose flat top is wide enough ("top"). The answer is its box."""
    f = facts(scene)
    things = [i for i in movable(f) if f.support[i] != data.WALL]
    for i in several(rng, things, min(4, len(things))):
        kind = pick(rng, ("floor", "top"))
        fits = {"floor": lambda j: f.support[j] == data.FLOOR,
                "top": lambda j, i=i: f.category(j) in TOPS and (f.boxes[j, 3:5] >= f.boxes[i, 3:5]).all()}[kind]
        j = pick(rng, [j for j in f.described if j != i and fits(j)])
        sample = None if j is None else PLACES[kind](scene, rng, task, i, j)
        if sample:
            return sample
    return None


def place_on_floor(scene: Scene, rng: np.random.Generator, task: str, i: int, j: int) -> Sample | None:
    f = facts(scene)
    box, other = f.boxes[i], f.boxes[j]
    start = np.array([*other[:2], box[5] / 2, *box[3:]])
    sides, amounts, boxes = shifts(start)
    axes = np.array([DIRECTIONS[s][0] for s in sides])
    near = amounts <= (other + box)[axes + 3] / 2 + NEXT_TO
    k = pick(rng, np.flatnonzero(near & allowed(f, i, boxes)))
    if k is None:
        return None
    side, amount, axis = sides[k], float(amounts[k]), int(axes[k])
    sums, new = add_up(axis, start[axis], side, amount)
    up, z = half_up(0.0, box[5])
    answer = start.copy()
    answer[axis], answer[2] = new, z
    steps = f"{f.described[i]} {listed(box)} {f.described[j]} {listed(other[:3])} {sums} z0.00 {up} ="
    return edit(scene, rng, task, "floor", i, j, answer, boxes[k], steps, side, amount)


def place_on_top(scene: Scene, rng: np.random.Generator, task: str, i: int, j: int) -> Sample | None:
    f = facts(scene)
    box, other = f.boxes[i], f.boxes[j]
    target = np.array([*other[:2], other[2] + (other[5] + box[5]) / 2, *box[3:]])
    if not allowed(f, i, target[None])[0]:
        return None
    first, top = half_up(other[2], other[5])
    second, z = half_up(top, box[5])
    answer = target.copy()
    answer[2] = z
    steps = f"{f.described[i]} {listed(box)} {f.described[j]} {listed(other)} z{metres(other[2])} {first} {second} ="
    return edit(scene, rng, task, "top", i, j, answer, target, steps)


PLACES = {"floor": place_on_floor, "top": place_on_top}


def modle_refuse(scene: Scene, rng: np.random.Generator, task: str) -> Sample | None:
    """Requests that nobody can follow, with the fixed sentence that says so: "ambiguous" (a measurement, a move or a
    placement that says "the chair" where there are several, or "the red thing" where nothing has a category),
    "contradictory" (opposite directions at once, a thing towards or on itself)."""
    f = facts(scene)
    kind, loose = pick(rng, ("ambiguous", "contradictory")), "_loose" * task.endswith("_loose")
    groups = {key: members for key, members in f.groups.items() if len(members) > 1}
    key = pick(rng, [k for k in groups if not k[1]] or [k for k in groups if not k[0]])  # colours where no names are
    known = pick(rng, list(f.described.values()))
    if known is None or (kind == "ambiguous" and key is None):
        return None
    side, amount = pick(rng, tuple(DIRECTIONS)), metres(pick(rng, AMOUNTS))
    text = {"what": known, "direction": DIRECTION[side], "opposite": DIRECTION[OPPOSITE[side]], "amount": amount}
    if kind == "contradictory":
        return data.ask(scene, rng, task, CONTRADICTORY, text, template="modle_contradiction" + loose, kind=kind)
    words = data.phrase(*key)
    template = pick(rng, ("modle_distance", "modle_move_axis", "modle_move_towards", "modle_place_floor"))
    what, other = (words, "") if template == "modle_move_axis" else several(rng, [known, words], 2)
    text |= {"what": what, "other": other, "axis": "xy"[DIRECTIONS[side][0]]}
    # the slots of those that can be answered, or a blind guess would know
    slots = {"a": what, "b": other} if template == "modle_distance" else {"side": side, "what": what, "amount": amount}
    return data.ask(scene, rng, task, AMBIGUOUS, text, slots, template + loose, kind=kind)


def modle_drill(scene: Scene, rng: np.random.Generator, task: str) -> Sample | None:
    """Text only, inside the room: modle_add "x1.25 right 0.80 =" -> "x2.05", modle_stack "z0.74 h0.36 =" -> "z0.92"."""
    f = facts(scene)
    if not len(f.boxes):
        return None
    lo, hi = tight(f)
    if task == "modle_stack":
        z = 0.0 if rng.random() < 0.3 else rng.uniform(0, max(hi[2] / 2, 0.1))  # things are put on floors, and on tops
        steps, value = half_up(z, rng.uniform(0.05, max(hi[2] - z, 0.1)))
        numbers, answer = f"z{metres(z)} {steps}".rsplit(" ", 1)
    else:
        side = pick(rng, tuple(DIRECTIONS))
        axis = DIRECTIONS[side][0]
        steps, value = add_up(axis, rng.uniform(lo[axis], hi[axis]), side, float(pick(rng, AMOUNTS)))
        numbers, answer = steps.rsplit(" ", 1)
    return data.ask(scene, rng, task, answer, {"numbers": numbers}, value=value)


TASKS: dict[str, Callable[[Scene, np.random.Generator], Sample | None]] = {
    task: partial(make, task=task)
    for make, tasks in (
        (modle_distance, ("modle_distance", "modle_distance_loose", "modle_distance_one_view")),
        (modle_move, ("modle_move", "modle_move_loose", "modle_move_one_view")),
        (modle_place, ("modle_place", "modle_place_loose")),
        (modle_refuse, ("modle_refuse", "modle_refuse_loose")),
        (modle_drill, ("modle_add", "modle_stack")),
    )
    for task in tasks
}
GEOMETRY_TASKS = tuple(TASKS)  # none needs a category
# what `data.adopt` takes, beside TASKS and TEMPLATES, into the tables that `data.ask` and the baselines read
METRIC = {task for task in TASKS if "refuse" not in task}
NEVER_TRAINED = {task for task in TASKS if task.endswith(("_loose", "_one_view"))}

# Writing them down. 219 questions for each of ScanNet's 1,201 training scans are the paper's 263K.

SHARES = {"modle_distance": 0.40, "modle_move": 0.35, "modle_place": 0.20, "modle_refuse": 0.05}
WORDINGS = {"train": ("",), "val": ("", "_loose")}  # the looser ones are for validation only
PER_SCENE = 219


def distinct(scene: Scene, task: str, seed: int, patience: int = 100) -> Iterator[Sample]:
    """Different questions of a task until `patience` draws in a row bring no new one. The random stream belongs to
    (seed, scene, task), so a subset of scenes or tasks gets the same questions."""
    rng = np.random.default_rng([seed, zlib.crc32(scene.name.encode()), zlib.crc32(task.encode())])
    seen, idle = set(), 0
    while idle < patience:
        sample = TASKS[task](scene, rng)
        idle = 0 if sample and sample.question not in seen else idle + 1
        if idle == 0:
            seen.add(sample.question)
            sample.id = f"{scene.name}/{task}/{len(seen) - 1}"
            yield sample


def share_out(streams: Sequence[Iterator[Sample]], total: int) -> list[Sample]:
    """`total` samples, one of every stream in turn; what a poor scene cannot give, the others do."""
    samples, streams = [], list(streams)
    while streams and len(samples) < total:
        row = [next(stream, None) for stream in streams[: total - len(samples)]]
        streams = [stream for stream, s in itertools.zip_longest(streams, row, fillvalue=True) if s is not None]
        samples += [s for s in row if s is not None]
    return samples


def annotation(sample: Sample, scene: Scene) -> dict:
    """A question as JSON: metres, boxes [cx, cy, cz, w, d, h] in the scan's aligned axes, ScanNet's own object numbers.
    `source` is the box before an edit: whoever wants the thing gone from the cloud drops the first of object_ids."""
    value = sample.value and round(sample.value, 4)
    exact = {"value": value} if sample.box is None else {
        "box": sample.box.round(4).tolist(), "source": scene.thing(sample.about[0]).box.round(4).tolist()}  # fmt: skip
    return {"id": sample.id, "scene_id": sample.scene, "task": sample.task, "kind": sample.kind,
            "question": sample.question, "answers": [sample.answer], "steps": sample.steps,
            "object_ids": [i - 1 for i in sample.about], **exact}  # fmt: skip


def write_modle(root: Path, out: Path, per_scene: int = PER_SCENE, seed: int = 0) -> dict:
    """MODLE for the scans below a ScanNet-layout root (`data.scan_ids` splits them): OUT/train.json and OUT/val.json,
    and OUT/manifest.json with the seed, the wordings and the counts per task and scene, which is returned. Each split
    has `per_scene` questions times its scans, shared out over tasks by SHARES, as far as its scans can give them; the
    validation scans are asked as many once more in the looser wordings. The same seed gives the same files."""
    data.adopt(sys.modules[__name__])
    if per_scene < 1:
        raise DataError(f"--per-scene {per_scene}: give at least 1 question per scan")
    manifest = {"seed": seed, "per_scene": per_scene, "shares": SHARES, "wordings": TEMPLATES}
    out.mkdir(parents=True, exist_ok=True)
    for split, ids in zip(("train", "val"), data.scan_ids(root).values(), strict=True):
        scenes = {}
        for scene_id in ids:  # only what questions need is kept
            scan = data.read_scannet(root, scene_id, max_frames=0)
            scenes[scene_id] = Scene(scene_id, scan.source, scan.objects, bounds=scan.bounds)
        samples = []
        for task, share in SHARES.items():
            for wording in WORDINGS[split]:
                streams = [distinct(scene, task + wording, seed) for scene in scenes.values()]
                samples += share_out(streams, round(share * per_scene * len(scenes)))
        rows = [json.dumps(annotation(s, scenes[s.scene])) for s in samples]
        (out / f"{split}.json").write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")
        counts = {scene_id: Counter(s.task for s in samples if s.scene == scene_id) for scene_id in scenes}
        manifest[split] = {"questions": len(rows), "tasks": Counter(s.task for s in samples), "scenes": counts,
                           "wordings": ["loose" if w else "trained" for w in WORDINGS[split]]}  # fmt: skip
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return manifest


def modle_main(arguments: Sequence[str]) -> None:
    """`python spatial3dllm.py modle --root SCANS --out modle/`. Raises DataError."""
    parser = data.Parser(prog="spatial3dllm.py modle", description=write_modle.__doc__)
    parser.add_argument("--root", type=Path, required=True, help="a folder of scans in ScanNet's layout")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.json, val.json and manifest.json")
    parser.add_argument("--per-scene", type=int, default=PER_SCENE, help="questions per scan, on average")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(arguments)
    manifest = write_modle(a.root, a.out, a.per_scene, a.seed)
    for split in WORDINGS:
        tasks = ", ".join(f"{task} {n}" for task, n in manifest[split]["tasks"].items())
        counts = f"{manifest[split]['questions']} questions about {len(manifest[split]['scenes'])} scans"
        print(f"{a.out / split}.json: {counts}; {tasks}")
    print(a.out / "manifest.json")


# ---- 9 the recipe ----------------------------------------------------------------------------------------------------

INSTRUCTIONS = {  # official files beside MODLE; the paper's counts are not public: these are the training files' own
    "ScanQA": Source("scanqa", 25_563), "SQA3D": Source("sqa3d", 26_623),
    "ScanRefer": Source("scanrefer", 36_665, "id"),
    "Scan2Cap": Source("scan2cap", 36_665), "3D-LLM planning": Source("3dllm/planning", 1864),
    "3D-LLM descriptions": Source("3dllm/description", 1033),
}  # fmt: skip
_USUAL = {"colour": 0.04, "what": 0.05, "where": 0.03, "count": 0.03, "exist": 0.06, "caption": 0.04}
_EDIT = {"modle_distance": 0.2, "modle_move": 0.2, "modle_place": 0.08, "modle_refuse": 0.08}
_TINY = dict(lr=2e-3, weight_decay=0.01, per_scene=16, batch=256, schedule="constant", warmup=0.1, steps=True)

STAGES = {
    "paper": [  # not public: VoteNet's encoder training, 3DMIT's instruction tuning
        Stage("0 encoder", {}, ("encoder", "scene"), "encoder", epochs=180, batch=8, lr=1e-3, weight_decay=0.01),
        Stage("I instructions", {"ground": 0.15, "multi": 0.05, "situated": 0.05, **_USUAL, **_EDIT},
              ("scene", "code", "lm"), "referents", epochs=2, samples=263_000, batch=128, per_scene=8, lr=5e-4,
              betas=(0.9, 0.95), weight_decay=1e-3, warmup=0.03, files=INSTRUCTIONS),
    ],
    "tiny": [  # the encoder comes third: its classes are the word vectors that the first two have taught
        Stage("I locations", {"ground": 0.4, "ground_multiple": 0.2, "ground_category": 0.2, "colour": 0.2},
              ("code", "lm"), "symbols", iterations=340, recolour=True, **_TINY),
        Stage("II steps", {"subtract": 0.27, "norm": 0.05, "modle_add": 0.24, "modle_stack": 0.03, "ground": 0.06,
                           "colour": 0.02, "what": 0.03, "exist": 0.05, "count": 0.02, "modle_distance": 0.13,
                           "modle_move": 0.15, "modle_refuse": 0.06},
              ("code", "lm"), "symbols", iterations=800, recolour=True, **{**_TINY, "batch": 192, "per_scene": 12}),
        Stage("III encoder", {}, ("encoder", "scene"), "encoder", iterations=900, batch=16, lr=3e-3, schedule="cosine",
              warmup=0.04, weight_decay=0.01),
        Stage("IV referents", {"ground": 0.08, "subtract": 0.06, "modle_add": 0.1, "modle_stack": 0.03, **_USUAL,
                               **_EDIT},
              ("scene", "code", "lm"), "referents", iterations=600,
              **{**_TINY, "schedule": "trapezoid", "batch": 128, "per_scene": 8}),
    ],
}  # fmt: skip


def recipe(config: Config, stages: list[Stage]) -> list[Stage]:
    """The stages for a configuration: a loaded encoder is frozen from the start, and only what follows it trains."""
    if config.encoder is None:
        return stages
    return [replace(s, trains=("scene",)) if s.scene_input == "encoder" else s for s in stages]


UNLABELLED = ("ground_superlative", "modle_distance", "modle_move")  # what stands in for questions that need names


# ---- 10 alternatives the paper compares with -------------------------------------------------------------------------


class Concatenation(nn.Module):
    """Instead of the graph: a referent beside its k nearest, features side by side, through one layer."""

    def __init__(self, config: Config):
        super().__init__()
        self.k, C = config.neighbours, config.feature
        self.norm, self.out = nn.LayerNorm(C), nn.Linear((self.k + 1) * C, C)

    def forward(self, h: Tensor, centres: Tensor) -> Tensor:
        """h [B, R, C], centres [B, R, 3] -> [B, R, C]; with fewer than k others the nearest come again."""
        R, k = h.shape[1], self.k
        near = torch.cdist(centres, centres).topk(min(k + 1, R), largest=False).indices  # [B, R, k + 1]
        near = near[..., torch.arange(k + 1, device=h.device) % R]  # [B, R, k + 1]
        return h + F.relu(self.out(gather(self.norm(h), near).flatten(2)))  # [B, R, C]


class Nothing(nn.Module):
    """Referents stay as they are."""

    def __init__(self, config: Config):
        super().__init__()

    def forward(self, h: Tensor, centres: Tensor) -> Tensor:
        return h


INTER = {"graph": Graph, "concat": Concatenation, "off": Nothing}


# ---- 11 demo and command line ----------------------------------------------------------------------------------------


def build(config: Config, text) -> Model:
    """The model of a configuration."""
    return Model(config, text)


def demo() -> None:
    """One room from points to an answer, with real shapes, and a tiny model that learns its questions by heart."""
    torch.manual_seed(0)
    scene = data.room(1, views=0)
    scene.identifiers = data.number_objects(scene, np.random.default_rng(0))
    model = Model(Config.tiny(), data.TinyText(data.vocabulary()))
    stage = Stage("demo", {"modle_distance": 1.0, "modle_move": 1.0}, ("scene", "code", "lm"), "referents", steps=True)
    model.configure_stage(stage)
    model.cache_features([scene])
    shape = lambda *tensors: ", ".join(str(list(t.shape)) for t in tensors)  # noqa: E731
    with torch.no_grad():
        h, boxes, votes, _, seeds = model.see([scene])
        tokens, _ = model.encode([scene])
    print(f"cloud [N, 3]                 {shape(scene.points)}")
    print(f"seeds [B, M]                 {shape(seeds)}")
    print(f"votes [B, M, 3]              {shape(votes)}")
    print(f"referents, boxes [B, R, .]   {shape(h, boxes)}")
    print(f"graph [B, R, R]              {shape(neighbour_graph(boxes[..., :3], model.config.neighbours))}")
    print(f"scene tokens [B, K, D]       {shape(tokens)}")
    samples = data.questions(scene, stage.tasks, 8, np.random.default_rng(1))
    batch = model.batch([(scene, samples)])
    print(f"packed questions [S, T]      {shape(batch['ids'])}, {len(samples)} of them")
    trained = [p for p in model.parameters() if p.requires_grad]
    print(f"parameters that train        {sum(p.numel() for p in trained):,}")
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    for step in range(61):
        out = model(batch)
        loss = out["loss"] / out["weight"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    answer = model.generate(model.batch([(scene, samples[:1])]))[0]
    print(f"{samples[0].question}  ->  {answer}")
    print(f"(true: {samples[0].answer}; learned by heart, python train.py --model spatial3dllm learns to see)")


@data.command
def main(arguments: Sequence[str]) -> None:
    """Without arguments the demo; `modle` writes annotations."""
    data.adopt(sys.modules[__name__])
    if arguments:
        data.choose({"modle": modle_main}, arguments[0], "command")(arguments[1:])
    else:
        demo()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
