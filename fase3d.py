"""Fase3D: Efficient Encoder-Free 3D Large Multimodal Model in the Frequency Domain.

CVPR 2026, arXiv 2602.23153, version 2 (the first version merged tokens by optimal transport and is not built here).
Equation numbers are the paper's.

Idea. No pre-trained 3D encoder. Points get a small MLP and a Fourier code; superpoints pool them; space-filling curves
turn the unordered superpoints into sequences, on which a learned gate in the frequency domain spreads context in
O(n log n); a graph found by voting along the same curves merges them into a few hundred tokens. The language model
stays frozen: low-rank adapters, one for vision tokens and one for text tokens, and a Fourier filter on the vision side.

  points p [N,3], colour+normal f [N,6] -> MLP(f) + Fourier(p) -> superpoint mean S [M,d], centres [M,3]        (1)
    S along 4 curves, windows of 128 -> rFFT * gate -> irFFT -> mean over curves, added to S                (2) (3) (5)
    all points along the 4 curves, windows of 64 -> votes between superpoints -> k nearest: the graph   sec. 3.3, (9)
    seeds [T] of the points -> 1-hop pooling of S -> LayerNorm, phi -> Hilbert order -> adapter -> tokens [T,D]
    a click or box centre c [3] with its 16 nearest tokens -> one coordinate token [D]
  [tokens][coordinate token][question] -> frozen LLM; FFNs of the first 8 layers: dLoRA + filter -> answer         (4)

Axes: B scenes, N points, M superpoints, C curves, W windows, L window length, H heads, T tokens, E edges, d width of
the tokenizer, D width of the language model, R packed rows (one per scene), n positions read at a time.

| paper                                        | here                                       |
| sec. 3.1 token initialisation, (1)           | fourier_code, superpoint_mean, Initial     |
| (6) quantisation, Morton and Hilbert keys    | quantise, morton, hilbert and their inverses, CURVES, curve_order |
| (2) (3) (5) FFT context enhancer             | windowed_filter, enhance, Enhancer         |
| superpoint graph by window voting, (9)-(11)  | vote_graph, nearest_edges                  |
| token merging: seeds, suppression, pooling   | choose_seeds, graph_pool, Merger           |
| 3D coordinate token                          | CoordinateToken                            |
| Fourier-augmented LoRA: filter, dLoRA        | FourierFilter, adapt, Router               |
| (4) loss on answers                          | Model.forward                              |
| two training stages, and from scratch        | STAGES, recipe                             |
| dense captioning, 48 spectral clusters       | spectral_clusters, Model.propose           |
| Tables 3-6, ablations                        | last section                               |

What the paper leaves open, and what we chose
- d = 768 follows from its parameter counts. The MLP is 6 -> 128 -> d with LayerNorm and GELU after the first map; the
  mean over a superpoint is taken before the second, which is linear: the same result for 1/50 of the work.
- The Fourier code has sin and cos of 100 x / 1000^(i / F) for F = d / 6 frequencies per axis, coordinates scaled to the
  cloud's box.
- Centres are quantised with 10 bits, points with 16; equal keys are ordered by coordinates, so that the order of the
  input never matters.
- Enhancer: Hann windows before and after the filter, divided by the summed squared window (Hann squared at half
  overlap does not sum to a constant), sequences padded by a stride at both ends. The mean of a window's valid tokens
  is taken out first and put back with the gate of frequency zero. No projections around the FFT, as (2) has none. The
  gate is softplus(theta), [heads, L/2 + 1]; head h starts as a low-pass of its own width. The paper's DCT form would be
  the same filter on a mirrored window.
- Graph: a window is 32 points before and 32 after its centre, a new centre every 16 points. Candidates are sorted by
  squared distance of centres, then votes; k = 8; an edge stays if either end keeps it, with the larger vote.
- Seeds: farthest points, the first one farthest from the centroid; one per superpoint; a seed next to a kept one gives
  way to superpoints that no kept seed covers, those with most points first.
- Edge weight: max(0, cos(S_i, S_j)) * log(1 + v_ij) / log(1 + largest vote of the scene).
- A token is LayerNorm(adapter(z)) + the Fourier layer of its position a_t that also encodes clicks and boxes, so that a
  place can be found by what it shares with a token. The LayerNorm starts at the size of the LLM's word vectors.
- Coordinate token: the same Fourier layer of c + MLP([code(c); mean over its 16 nearest merged tokens of z_k +
  code(c_k - c)]); a box counts by its centre. Order: scene, coordinate token, text.
- LoRA on all linear maps of the FFN (OPT: fc1, fc2), no dropout. The filter acts on what enters the FFN, on scene and
  coordinate tokens, starts as the identity, and keeps the real part.
- What depends on geometry alone (which points, curves, graph, seeds) is computed once per scene and cached; points are
  drawn once per scene, not once per step. Mirrored scenes keep the curves of the unmirrored one.
- A cloud without colour is answered by models that saw such clouds in training (`no_colour`), and refused by others.
- The tiny preset has no pre-trained LLM. In its place: a stage on scenes written in words, one token per object and
  then one per seed, after which the LLM is frozen for good; and a tokenizer stage (token -> words of what it shows).
  None of that touches a loaded model.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from data import PROMPT, Sample, Scene, SceneLanguageModel, Source, Stage, farthest_point_sampling

# ---- configuration ---------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every number of the model; `paper()` are the paper's, `tiny()` trains from nothing on a laptop."""

    llm: str | None = None  # name or folder of a causal language model; None builds a tiny one from the fields below
    points: int = 50_000  # points per scene, drawn uniformly; paper 50,000
    superpoint: bool = True  # False: every point is a superpoint of its own (Table 3)
    colour: bool = True  # points carry colour
    normals: bool = True  # and normals; paper: both
    no_colour: float = 0.0  # share of training scenes shown without colour
    dim: int = 768  # d, width of the tokenizer; a multiple of 6 and of `heads`
    hidden: int = 128  # hidden width of the per-point MLP
    bits: int = 10  # per axis of a superpoint's key
    curves: int = 4  # how many of CURVES; paper 4 (1, 2, 4, 6)
    enhancer: bool = True  # False: no FFT context (Table 3)
    window: int = 128  # L, tokens per FFT window; paper 128
    heads: int = 8  # of the gate; paper 8
    vote_window: int = 64  # points per voting window; paper 64
    vote_stride: int = 16  # points between its centres; paper 16
    edges: int = 8  # k, edges kept per superpoint
    tokens: int = 256  # T; paper 256 (64, 128, 256, 320)
    selector: str = "graph"  # a key of SELECTORS
    prompt_neighbours: int = 16  # of a click or box; paper 16
    adapters: str = "decoupled"  # a key of ADAPTERS
    filter: str = "vision"  # a key of FILTERS
    adapted_layers: int = 8  # first layers with adapters and filter; paper 8 (0, 4, 8, 10, 12)
    rank: int = 768  # of LoRA; paper 768
    alpha: float = 768  # of LoRA; paper 768, scale alpha / rank = 1
    filter_heads: int = 8  # of the Fourier filter; paper 8
    pretrain: bool = True  # False: from scratch, without the generalist stage
    task: str = "all"  # what the second stage tunes for: a key of TUNED
    # the tiny model, used only where llm is None
    width: int = 128
    layers: int = 2
    attention_heads: int = 4
    ffn: int = 256
    attention: str = "sdpa"
    dtype: str = "float32"

    @classmethod
    def tiny(cls, **changes) -> Config:
        small = dict(points=4096, dim=96, hidden=64, tokens=128, prompt_neighbours=4, rank=32, alpha=32, filter_heads=4,
                     no_colour=0.05)  # fmt: skip
        return cls(**{**small, **changes})

    @classmethod
    def paper(cls, **changes) -> Config:
        return cls(**{**dict(llm="Qwen/Qwen2.5-3B-Instruct", dtype="float16", task="qa"), **changes})


# ---- 1 token initialisation, Eq. (1) ---------------------------------------------------------------------------------


def fourier_code(x: Tensor, dim: int) -> Tensor:
    """Non-parametric Fourier code: sin and cos of 100 x / 1000^(i / F), F = dim / 6 per axis; x [..., 3] -> [..., dim].

    Coordinates are expected in the unit of the scene's box, 0..1. Raises ValueError unless 6 divides dim.
    """
    if dim % 6:
        raise ValueError(f"fourier_code: dim = {dim} is not a multiple of 6 (three axes, sin and cos)")
    F_ = dim // 6
    frequency = 100 / 1000 ** (torch.arange(F_, device=x.device) / F_)  # [F]
    phase = (x.float()[..., None] * frequency).flatten(-2)  # [..., 3F]
    return torch.cat([phase.sin(), phase.cos()], dim=-1)  # [..., dim]


def superpoint_mean(x: Tensor, owner: Tensor, count: int) -> Tensor:
    """Eq. (1): the mean of x [N, d] over the points of each superpoint, owner [N] in 0..count-1 -> [count, d]."""
    total = x.new_zeros(count, x.shape[1]).index_add(0, owner, x)
    return total / torch.bincount(owner, minlength=count).clamp(min=1)[:, None]


def unit_box(points: Tensor, scene: Tensor | None = None) -> Tensor:
    """points [N, 3] in the unit of their cloud's box: [N, 3] in 0..1; with `scene` [N], 0..B-1, each scene has its own.
    An axis without extent gives 0."""
    if scene is None:
        low = points.amin(0)
        return (points - low) / (points.amax(0) - low).clamp(min=1e-6)
    B = int(scene.max()) + 1
    index = scene[:, None].expand(-1, 3)
    low = points.new_full((B, 3), math.inf).scatter_reduce(0, index, points, "amin")
    high = points.new_full((B, 3), -math.inf).scatter_reduce(0, index, points, "amax")
    return (points - low[scene]) / (high - low).clamp(min=1e-6)[scene]


class Initial(nn.Module):
    """Per-point MLP + Fourier code, pooled to superpoints."""

    def __init__(self, channels: int, hidden: int, dim: int):
        super().__init__()
        self.lift, self.norm, self.out = nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.Linear(hidden, dim)

    def forward(self, features: Tensor, places: Tensor, owner: Tensor, count: int) -> Tensor:
        """features [N, channels], places [N, 3] in 0..1, owner [N] -> S [count, d]."""
        x = F.gelu(self.norm(self.lift(features)))  # [N, hidden]
        S = self.out(superpoint_mean(x, owner, count))  # [M, d] pooled before the linear map: the same, and cheaper
        code = places.new_zeros(count, S.shape[1])  # [M, d]
        for p, o in zip(places.split(4096), owner.split(4096), strict=True):  # never [N, d] at once: faster
            code.index_add_(0, o, fourier_code(p, S.shape[1]))
        return S + code / torch.bincount(owner, minlength=count).clamp(min=1)[:, None]  # [M, d]


# ---- 2 serialization, Eq. (6) ----------------------------------------------------------------------------------------


def quantise(points: Tensor, bits: int, scene: Tensor | None = None) -> Tensor:
    """Eq. (6): floor((2^b - 1) (c - min) / (max - min)) per axis, [N, 3] int32; an axis without extent gives 0. With
    `scene` [N] every scene has its own box."""
    return ((2**bits - 1) * unit_box(points.double(), scene)).floor().int()


def _spread(x: Tensor) -> Tensor:
    """Bits of x (up to 21) moved three places apart, int64."""
    x = x.long()
    for shift, mask in ((32, 0x1F00000000FFFF), (16, 0x1F0000FF0000FF), (8, 0x100F00F00F00F00F),
                        (4, 0x10C30C30C30C30C3), (2, 0x1249249249249249)):  # fmt: skip
        x = (x | (x << shift)) & mask
    return x


def _gather(x: Tensor) -> Tensor:
    """The inverse of `_spread`."""
    x = x & 0x1249249249249249
    for shift, mask in ((2, 0x10C30C30C30C30C3), (4, 0x100F00F00F00F00F), (8, 0x1F0000FF0000FF),
                        (16, 0x1F00000000FFFF), (32, 0x1FFFFF)):  # fmt: skip
        x = (x | (x >> shift)) & mask
    return x


def morton(cells: Tensor, bits: int) -> Tensor:
    """Z-order keys [N] int64 of cells [N, 3] in 0..2^bits-1: bit j of x, y, z goes to 3j, 3j + 1, 3j + 2."""
    x, y, z = cells.unbind(1)
    return _spread(x) | _spread(y) << 1 | _spread(z) << 2


def unmorton(keys: Tensor, bits: int) -> Tensor:
    """The inverse: keys [N] -> cells [N, 3] int32."""
    return torch.stack([_gather(keys >> axis) for axis in range(3)], 1).int()


def _turn(x: list[Tensor], axis: int, level: int) -> None:
    """One step of the Hilbert curve, in place and its own inverse: where bit `level` of the axis is set, the lower bits
    of axis 0 flip; elsewhere they change places with those of the axis."""
    low = (1 << level) - 1
    turned = -((x[axis] >> level) & 1)  # all ones where the bit is set
    swap = (x[0] ^ x[axis]) & low & ~turned
    x[0] = x[0] ^ (swap | turned & low)
    if axis:
        x[axis] = x[axis] ^ swap


def hilbert(cells: Tensor, bits: int) -> Tensor:
    """Hilbert keys [N] int64 of cells [N, 3] (Skilling 2004): consecutive keys are face neighbours. Every axis turns
    the lower bits, from the top bit down; what remains is a Gray code."""
    x = [c.contiguous().int() for c in cells.unbind(1)]
    for level in range(bits - 1, 0, -1):
        for axis in (0, 1, 2):
            _turn(x, axis, level)
    x[1] = x[1] ^ x[0]
    x[2] = x[2] ^ x[1]
    t = x[2] >> 1  # bit j becomes the parity of the bits above it
    for shift in (1, 2, 4, 8):
        t = t ^ (t >> shift)
    x = [c ^ t for c in x]
    return _spread(x[0]) << 2 | _spread(x[1]) << 1 | _spread(x[2])


def unhilbert(keys: Tensor, bits: int) -> Tensor:
    """The inverse: keys [N] -> cells [N, 3] int32."""
    x = [_gather(keys >> axis).int() for axis in (2, 1, 0)]
    t = x[2] >> 1
    x[2] = x[2] ^ x[1]
    x[1] = x[1] ^ x[0]
    x[0] = x[0] ^ t
    for level in range(1, bits):
        for axis in (2, 1, 0):
            _turn(x, axis, level)
    return torch.stack(x, 1)


CURVES = {  # name -> (keys, axes in the order in which they enter); Config.curves of them are used, from the top. The
    # first axis leads a Hilbert key, the last a Morton key: height leads "z", and turns fastest in "vertical z"
    "z": (morton, (0, 1, 2)), "hilbert": (hilbert, (0, 1, 2)),
    "transposed z": (morton, (1, 0, 2)), "transposed hilbert": (hilbert, (1, 0, 2)),
    "vertical z": (morton, (2, 0, 1)), "vertical hilbert": (hilbert, (2, 0, 1)),
}  # fmt: skip


def canonical(points: Tensor, scene: Tensor | None = None) -> Tensor:
    """Order [N] of points by scene, x, y, z: what makes results independent of the order of the input."""
    p = points.cpu().numpy()
    keys = (p[:, 2], p[:, 1], p[:, 0]) + (() if scene is None else (scene.cpu().numpy(),))
    return torch.from_numpy(np.lexsort(keys)).to(points.device)


def curve_order(points: Tensor, curve: str, bits: int, scene: Tensor | None = None) -> Tensor:
    """Order [N] of points [N, 3] along a curve, scene after scene; equal keys keep the order of the input (give points
    in `canonical` order). Raises ValueError for an unknown curve or more than 16 bits."""
    if curve not in CURVES or not 1 <= bits <= 16:
        raise ValueError(f"curve_order: {curve!r} with {bits} bits; known: {', '.join(CURVES)}, 1 to 16 bits")
    keys, axes = CURVES[curve]
    key = keys(quantise(points, bits, scene)[:, axes], bits)
    return torch.argsort(key if scene is None else (scene << 3 * bits) | key, stable=True)


# ---- 3 FFT context enhancer, Eq. (2), (3), (5) -----------------------------------------------------------------------


def windowed_filter(x: Tensor, valid: Tensor, gate: Tensor) -> Tensor:
    """Eq. (2) inside overlapping windows: x [R, M, d] sequences, valid [R, M], gate [H, L/2 + 1] >= 0 -> [R, M, d].

    Windows of L every L/2, Hann before and after, overlap-add divided by the summed squared window; padding counts
    nowhere. With gate 1 the result is x. Raises ValueError unless H divides d.
    """
    M, d = x.shape[1:]
    H, L = gate.shape[0], 2 * (gate.shape[1] - 1)
    if d % H:
        raise ValueError(f"windowed_filter: {H} heads do not divide the width {d}")
    stride = L // 2
    W = -(-M // stride) + 1  # a stride of padding in front, and enough behind for every token to lie in two
    pad = (0, 0, stride, W * stride - M)
    seen = F.pad(valid[..., None].to(x), pad).unfold(1, L, stride)  # [R, W, 1, L]
    part = F.pad(x * valid[..., None], pad).unfold(1, L, stride)  # [R, W, d, L]
    hann = torch.hann_window(L, device=x.device, dtype=x.dtype)  # [L]
    after = hann / hann.view(2, -1).square().sum(0).repeat(2)  # [L] the second Hann over the sum of squared windows
    mean = part.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1)  # [R, W, d, 1]
    wide = gate.to(x).repeat_interleave(d // H, 0)  # [d, L/2 + 1]
    spectrum = torch.fft.rfft((part - mean) * (seen * hann)) * wide  # [R, W, d, L/2 + 1]
    y = torch.fft.irfft(spectrum, n=L) * after + mean * wide[:, :1] * (hann * after)  # [R, W, d, L]
    out = y[:, 1:, :, :stride] + y[:, :-1, :, stride:]  # [R, W - 1, d, stride]
    return out.transpose(2, 3).flatten(1, 2)[:, :M] * valid[..., None]  # [R, M, d]


def enhance(S: Tensor, valid: Tensor, orders: Tensor, gate: Tensor) -> Tensor:
    """Eq. (3): S + the mean over curves of the filtered sequences, each put back in place.

    S [B, M, d], valid [B, M], orders [B, C, M] permutations with the valid superpoints first -> [B, M, d], float32.
    """
    x, total = S.float(), 0
    for order in orders.unbind(1):  # one curve at a time: a fourth of the memory, half of the time
        place = order[..., None].expand_as(x)  # [B, M, d]
        y = windowed_filter(x.gather(1, place), valid.gather(1, order), gate)  # [B, M, d]
        total = total + torch.zeros_like(y).scatter(1, place, y)  # [B, M, d]
    return S + (total / orders.shape[1]).to(S)  # [B, M, d]


class Enhancer(nn.Module):
    """The learned gate: softplus(theta) >= 0 per head and frequency, shared by the curves."""

    def __init__(self, heads: int, window: int):
        super().__init__()
        bins = window // 2 + 1
        cut = (window / 2) ** (torch.arange(heads) / max(1, heads - 1))  # [H] from one wave per window to all
        gate = 1 / (1 + (torch.arange(bins) / cut[:, None]) ** 2)  # [H, bins] low-passes of many widths
        self.theta = nn.Parameter(gate.expm1().log())  # softplus(theta) = gate

    def forward(self, S: Tensor, valid: Tensor, orders: Tensor) -> Tensor:
        with torch.autocast(S.device.type, enabled=False):  # the FFT stays in float32
            return enhance(S.float(), valid, orders, F.softplus(self.theta.float()))  # [B, M, d]


# ---- 4 superpoint graph by window voting, Eq. (9)-(11) ---------------------------------------------------------------


def vote_graph(points: Tensor, superpoints: Tensor, curves: Sequence[str], window: int = 64, stride: int = 16,
               bits: int = 16, scene: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Votes between superpoints whose points meet in a window along a curve: (pairs [E, 2] from -> to, votes [E]).

    Points [N, 3] lie along each curve; every `stride`-th of a scene is a centre and votes for the superpoint of each
    of the window/2 points before and after it, if that is another one. superpoints [N] are numbered through all scenes,
    negative = none. Time O(C N window / stride), plus sorting. Points must be in `canonical` order.
    """
    M = int(superpoints.max()) + 1
    reach = torch.arange(-(window // 2), window // 2 + 1, device=points.device)
    place = torch.arange(len(points), device=points.device)
    room = torch.zeros_like(place) if scene is None else scene
    begin = torch.searchsorted(room, room)  # where the scene of each place starts: canonical order has it first
    keys = []
    for curve in curves:
        order = curve_order(points, curve, bits, scene)
        label = superpoints[order]
        centre = place[(place - begin) % stride == 0]
        near = centre[:, None] + reach  # [N / stride, window + 1]
        inside = (near >= 0) & (near < len(points))
        near = near.clamp(0, len(points) - 1)
        a, b = label[centre][:, None].expand_as(near), label[near]
        meet = inside & (a != b) & (a >= 0) & (b >= 0) & (room[near] == room[centre][:, None])
        keys.append(a[meet] * M + b[meet])
    pair, votes = torch.cat(keys).unique(return_counts=True)
    return torch.stack([pair // M, pair % M], 1), votes


def nearest_edges(pairs: Tensor, votes: Tensor, centres: Tensor, k: int = 8) -> tuple[Tensor, Tensor]:
    """The graph: of every superpoint's candidates the k with the smallest (squared distance of centres, then most
    votes); made symmetric by the larger vote. pairs [E, 2], votes [E], centres [M, 3] -> edges [E', 2], votes [E']."""
    gap = (centres[pairs[:, 0]] - centres[pairs[:, 1]]).square().sum(1)
    order = torch.argsort(votes, descending=True, stable=True)
    order = order[torch.argsort(gap[order], stable=True)]
    order = order[torch.argsort(pairs[order, 0], stable=True)]
    source = pairs[order, 0]
    rank = torch.arange(len(source), device=source.device) - torch.searchsorted(source, source)
    kept = order[rank < k]
    both, count = torch.cat([pairs[kept], pairs[kept].flip(1)]), votes[kept].repeat(2)
    key, which = (both[:, 0] * len(centres) + both[:, 1]).unique(return_inverse=True)
    most = count.new_zeros(len(key)).scatter_reduce(0, which, count, "amax")
    return torch.stack([key // len(centres), key % len(centres)], 1), most


# ---- 5 token merging -------------------------------------------------------------------------------------------------


def choose_seeds(points: Tensor, superpoints: Tensor, edges: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Seed superpoints [T] and their positions a_t [T, 3], T = min(count, M).

    Farthest points, mapped to their superpoints; the first of a superpoint counts, and those next to a kept seed step
    back (graph-aware suppression). Free places go to superpoints that no seed covers, those with most points first,
    then to the suppressed seeds, then to what is left. points [N, 3], superpoints [N] of 0..M-1, edges [E, 2] both ways
    """
    M = int(superpoints.max()) + 1
    size = torch.bincount(superpoints, minlength=M)
    anchor = farthest_point_sampling(points, count)
    near: list[list[int]] = [[] for _ in range(M)]
    for a, b in edges.tolist():
        near[a].append(b)
    covered, place, later = [False] * M, {}, {}

    def keep(s: int, point: int) -> None:
        place[s] = point
        for other in (s, *near[s]):
            covered[other] = True

    for point, s in zip(anchor.tolist(), superpoints[anchor].tolist(), strict=True):
        if s not in place and s not in later:
            later.update({s: point}) if covered[s] else keep(s, point)
    middle = nearest_to_centre(points, superpoints, M).tolist()
    by_size = torch.argsort(size, descending=True, stable=True).tolist()
    for s in by_size:
        if len(place) < count and not covered[s] and s not in later:
            keep(s, middle[s])
    for s, point in [*later.items(), *((s, middle[s]) for s in by_size)]:
        if len(place) < count:
            place.setdefault(s, point)
    chosen = torch.tensor(list(place), device=points.device)
    return chosen, points[torch.tensor(list(place.values()), device=points.device)]


def nearest_to_centre(points: Tensor, owner: Tensor, count: int) -> Tensor:
    """The point [count] of each group that is nearest the group's mean (ties: the first)."""
    gap = (points - superpoint_mean(points, owner, count)[owner]).square().sum(1)
    order = torch.argsort(gap, stable=True)
    order = order[torch.argsort(owner[order], stable=True)]
    return order[torch.searchsorted(owner[order], torch.arange(count, device=owner.device))]


def most_frequent(label: Tensor, owner: Tensor, count: int) -> Tensor:
    """The most frequent label >= 0 [count] of each group of points (ties: the largest); label, owner [N]."""
    pair, times = (owner * (int(label.max()) + 1) + label).unique(return_counts=True)
    group, label = pair // (int(label.max()) + 1), pair % (int(label.max()) + 1)
    most = times.new_zeros(count).scatter_reduce(0, group, times, "amax")
    first = times == most[group]
    return label.new_zeros(count).scatter_reduce(0, group[first], label[first], "amax")


def graph_pool(S: Tensor, seed: Tensor, token: Tensor, member: Tensor, strength: Tensor, count: int) -> Tensor:
    """Point-seeded graph pooling: z_t = the weighted mean of S over the seed (weight 1) and its neighbours (weight
    max(0, cos) * strength). S [M, d]; entries (token [P], member [P], strength [P]) list each token's support, the seed
    itself with strength 0; seed [T] -> z [count, d], count = T."""
    unit = F.normalize(S, dim=-1)  # [M, d]
    alike = (unit[seed[token]] * unit[member]).sum(-1).clamp(min=0)  # [P]
    weight = torch.where(seed[token] == member, torch.ones_like(alike), alike * strength)  # [P]
    total = weight.new_zeros(count).index_add(0, token, weight)  # [T]
    return S.new_zeros(count, S.shape[1]).index_add(0, token, weight[:, None] * S[member]) / total[:, None]  # [T, d]


def support(seeds: Tensor, edges: Tensor, votes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of `graph_pool`: every seed and its 1-hop neighbours as (token, member, strength), strength =
    log(1 + votes) / log(1 + most votes). seeds [T], edges [E, 2] sorted by their first end, votes [E]."""
    T = len(seeds)
    own = torch.arange(T, device=seeds.device)
    first = torch.searchsorted(edges[:, 0].contiguous(), seeds)
    number = torch.searchsorted(edges[:, 0].contiguous(), seeds, right=True) - first  # [T] neighbours
    token = own.repeat_interleave(number)
    step = torch.arange(len(token), device=seeds.device) - (number.cumsum(0) - number)[token]
    edge = first[token] + step
    strength = votes[edge].float().log1p() / votes.max().float().log1p() if len(edges) else votes.float()
    return (torch.cat([own, token]), torch.cat([seeds, edges[edge, 1]]),
            torch.cat([strength.new_zeros(T), strength]))  # fmt: skip


class Merger(nn.Module):
    """phi(LayerNorm(z)), then the MLP adapter to the LLM's width, at the scale of its word vectors."""

    def __init__(self, dim: int, width: int, scale: float):
        super().__init__()
        self.norm, self.phi = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.lift, self.out = nn.Linear(dim, dim), nn.Linear(dim, width)
        self.end = nn.LayerNorm(width, bias=False)
        nn.init.constant_(self.end.weight, scale)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z [T, d] pooled -> (z' [T, d], tokens [T, D])."""
        z = self.phi(self.norm(z))  # [T, d]
        return z, self.end(self.out(F.gelu(self.lift(F.gelu(z)))))  # [T, d], [T, D]


# ---- 6 positions and the coordinate token ----------------------------------------------------------------------------


class Place(nn.Module):
    """The Fourier layer of a position in metres: sin and cos of 6 wavelengths 0.5 .. 16 m per axis, one linear map."""

    def __init__(self, width: int, scale: float):
        super().__init__()
        self.out = nn.Linear(36, width, bias=False)
        nn.init.normal_(self.out.weight, std=scale / math.sqrt(18))  # 18 of 36 squared waves: the words' size

    def forward(self, c: Tensor) -> Tensor:
        wave = 2 * math.pi / 0.5 / 2 ** torch.arange(6.0, device=c.device)  # [6]
        phase = (c.float()[..., None] * wave).flatten(-2)  # [..., 18]
        return self.out(torch.cat([phase.cos(), phase.sin()], dim=-1).to(self.out.weight))  # [..., D]


class CoordinateToken(nn.Module):
    """A click or a box's centre with its nearest merged tokens: MLP([code(c); mean_k(z_k + code(c_k - c))])."""

    def __init__(self, dim: int, width: int, scale: float):
        super().__init__()
        self.lift, self.out, self.end = nn.Linear(2 * dim, dim), nn.Linear(dim, width), nn.LayerNorm(width, bias=False)
        nn.init.constant_(self.end.weight, scale)

    def forward(self, c: Tensor, box: Tensor, z: Tensor, places: Tensor, valid: Tensor, k: int) -> Tensor:
        """c [P, 3] metres; box [P, 2, 3] low and high corner of its cloud; z [P, T, d] the scene's merged tokens at
        places [P, T, 3], valid [P, T] -> [P, D]."""
        dim = z.shape[-1]
        size = (box[:, 1] - box[:, 0]).clamp(min=1e-6)  # [P, 3]
        gap = (places - c[:, None]).square().sum(-1).masked_fill(~valid, math.inf)  # [P, T]
        gap, near = gap.topk(min(k, gap.shape[1]), largest=False)  # [P, k]
        counted = torch.isfinite(gap)[..., None].to(z)  # [P, k, 1]
        feature = z.gather(1, near[..., None].expand(-1, -1, dim))  # [P, k, d]
        offset = places.gather(1, near[..., None].expand(-1, -1, 3)) - c[:, None]  # [P, k, 3]
        around = (feature + fourier_code(offset / size[:, None], dim).to(z)) * counted  # [P, k, d]
        around = around.sum(1) / counted.sum(1)  # [P, d]
        here = fourier_code((c - box[:, 0]) / size, dim).to(z)  # [P, d]
        return self.end(self.out(F.gelu(self.lift(torch.cat([here, around], dim=-1)))))  # [P, D]


# ---- 7 the frozen language model: dLoRA, routing, Fourier filter -----------------------------------------------------


class FourierFilter(nn.Module):
    """The global filter: (z + real(iFFT(FFT(z) * G))) / 2 along the channels of a head; G starts at 1, the identity."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise data.DataError(f"filter_heads = {heads} does not divide the language model's width {width}")
        self.gain, self.heads = nn.Parameter(torch.ones(width)), heads

    def forward(self, z: Tensor) -> Tensor:
        x = z.float().unflatten(-1, (self.heads, -1))  # [..., H, D / H]
        mixed = torch.fft.ifft(torch.fft.fft(x) * self.gain.float().view(self.heads, -1)).real.flatten(-2)  # [..., D]
        return ((z + mixed) / 2).to(z)  # [..., D]


class Router:
    """Which adapter serves which token, shared by all adapted layers. `routed(vision)`, vision [B, T], says it for the
    tokens that enter the model; tokens generated afterwards, one per row, are text."""

    def __init__(self):
        self.vision: Tensor | None = None

    @contextlib.contextmanager
    def routed(self, vision: Tensor):
        self.vision = vision
        try:
            yield
        finally:
            self.vision = None

    def mask(self, x: Tensor) -> Tensor:
        """Vision or not for each token of x [..., D], flat: [tokens]. Raises ValueError where x fits neither case."""
        if self.vision is None:
            raise ValueError("Router: say which tokens are vision first, with router.routed(mask)")
        (B, T), tokens = self.vision.shape, x.shape[:-1].numel()
        if tokens % (B * T) == 0:  # the prompt; beams repeat its rows
            return self.vision.repeat_interleave(tokens // (B * T), 0).flatten()
        if tokens % B == 0 and (x.dim() == 2 or x.shape[1] == 1):  # a generated token per row
            return torch.zeros(tokens, dtype=torch.bool, device=x.device)
        raise ValueError(f"Router: {tuple(x.shape)} is neither the prompt {B} x {T} nor one new token per row")


def routed_linear(layer: nn.Module, x: Tensor, vision: Tensor, route: dict[str, str]) -> Tensor:
    """A linear map of the FFN with its adapters: the frozen map for all tokens, plus B A x of the vision adapter for
    vision tokens and of the text adapter for the others. x [..., in], vision [tokens] -> [..., out].

    `route` names the adapter of each kind of token; a kind without one passes through the frozen map alone.
    """
    out = layer.base_layer(x)
    flat, rows = out.flatten(0, -2), x.flatten(0, -2)
    for kind, name in route.items():
        mine = (vision if kind == "vision" else ~vision).nonzero()[:, 0]  # [n]
        down, up = layer.lora_A[name], layer.lora_B[name]
        delta = up(down(rows[mine].to(down.weight.dtype))) * layer.scaling[name]  # [n, out]
        flat = flat.index_add(0, mine, delta.to(flat))
    return flat.view(out.shape)


FFN = {"gate_proj", "up_proj", "down_proj", "fc1", "fc2"}  # of Qwen2, Llama; of OPT


def adapt(llm: nn.Module, layers: int, rank: int, alpha: float, names: dict[str, str], where: str, heads: int,
          router: Router) -> nn.ModuleList:  # fmt: skip
    """Put the adapters `names` (kind of token -> peft adapter) into the FFNs of the first layers, their linear maps
    behind `routed_linear`, and a FourierFilter for the tokens `where` in front of each FFN. Returns the filters.

    peft makes the matrices, names and saves them; which token uses which is `routed_linear` alone. Raises DataError
    where the model has no FFN that is known.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import Linear

    blocks = next((m for n, m in llm.named_modules() if n.endswith("layers") and isinstance(m, nn.ModuleList)), ())
    layers = min(layers, len(blocks))
    if not layers:
        return nn.ModuleList()
    if not any(n.rpartition(".")[2] in FFN for n, _ in blocks[0].named_modules()):
        raise data.DataError(f"{type(llm).__name__}: its FFN has none of {', '.join(sorted(FFN))}; choose another llm")
    wrapped = None
    for name in dict.fromkeys(names.values()):
        settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=FFN, bias="none",
                              layers_to_transform=list(range(layers)), layers_pattern="layers")  # fmt: skip
        if wrapped is None:
            with warnings.catch_warnings():  # peft asks transformers a question by its old name
                warnings.simplefilter("ignore", FutureWarning)
                wrapped = get_peft_model(llm, settings, adapter_name=name)
        else:
            wrapped.add_adapter(name, settings)
    if wrapped is not None:
        llm.wrapped = (wrapped,)  # in a tuple: a second path to the same modules would save them twice
    for module in blocks.modules():
        if isinstance(module, Linear):
            module.forward = lambda x, *_, layer=module, **__: routed_linear(layer, x, router.mask(x), names)
    filters = nn.ModuleList()
    for block in blocks[:layers]:
        own = FourierFilter(llm.config.hidden_size, heads)
        filters.append(own)
        if where == "none":  # it exists all the same, so that ablations start from the same weights
            continue

        def before(_, inputs: tuple, own: nn.Module = own) -> Tensor:
            x = inputs[0]
            chosen = router.mask(x).view(*x.shape[:-1], 1)
            return own(x) if where == "both" else torch.where(chosen, own(x), x)

        entry = block.mlp if hasattr(block, "mlp") else block.fc1
        entry.register_forward_pre_hook(before)
    return filters


# ---- 8 the model -----------------------------------------------------------------------------------------------------


def build_llm(config: Config, vocabulary: int) -> nn.Module:
    """A small Qwen2 from its configuration: the same class that `from_pretrained` loads."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    settings = Qwen2Config(vocab_size=vocabulary, hidden_size=config.width, intermediate_size=config.ffn,
                           num_hidden_layers=config.layers, num_attention_heads=config.attention_heads,
                           num_key_value_heads=config.attention_heads, max_position_embeddings=32768, pad_token_id=0,
                           bos_token_id=1, eos_token_id=1, tie_word_embeddings=True,
                           rope_parameters={"rope_type": "default", "rope_theta": 1e6})  # fmt: skip
    settings._attn_implementation = config.attention
    return Qwen2ForCausalLM(settings)


class Model(SceneLanguageModel):
    """Fase3D around a causal language model. See the file's docstring for shapes."""

    scene_inputs = ("symbols", "words", "tokenizer", "tokens")

    def __init__(self, config: Config, text: data.TinyText | data.HubText):
        super().__init__(config, text)
        if config.attention != "sdpa":
            raise data.DataError(f"attention = {config.attention}: packed questions need sdpa's mask; leave it unset")
        for table, key in ((SELECTORS, "selector"), (ADAPTERS, "adapters"), (FILTERS, "filter"), (TUNED, "task")):
            if getattr(config, key) not in table:
                raise data.DataError(f"unknown {key} {getattr(config, key)}; known: {', '.join(table)}")
        if not 1 <= config.curves <= len(CURVES):
            raise data.DataError(f"curves = {config.curves}; give 1 to {len(CURVES)}")
        if config.llm is None:
            self.llm = build_llm(config, len(text))
            data.start_weights(self.llm.model)
            data.start_decoder(self.llm.model, config.attention_heads)
            nn.init.normal_(self.llm.get_input_embeddings().weight)
        else:
            from transformers import AutoModelForCausalLM

            self.llm = AutoModelForCausalLM.from_pretrained(
                config.llm, dtype=getattr(torch, config.dtype), attn_implementation=config.attention)  # fmt: skip
        self.width = D = self.llm.config.hidden_size
        self.router = Router()
        self.filters = adapt(self.llm, config.adapted_layers, config.rank, config.alpha, ADAPTERS[config.adapters],
                             config.filter, config.filter_heads, self.router)  # fmt: skip
        scale = float(self.llm.get_input_embeddings().weight.detach().float().square().mean().sqrt())
        channels = 3 * config.colour + 3 * config.normals
        if not channels:
            raise data.DataError("colour = false and normals = false: points would carry nothing; leave one on")
        self.initial = Initial(channels, config.hidden, config.dim)
        self.enhancer = Enhancer(config.heads, config.window)
        self.merger = Merger(config.dim, D, scale)
        self.place = Place(D, scale)
        self.coordinate = CoordinateToken(config.dim, D, scale)
        self.selector = SELECTORS[config.selector][1](config)
        if config.llm is not None:  # a checkpoint need not repeat what `llm` names
            names = self.llm.named_parameters(prefix="llm", remove_duplicate=False)  # a tied weight has two
            self.frozen_pretrained_names = tuple(n for n, _ in names if "lora_" not in n)
            if config.adapters == "full":
                self.frozen_pretrained_names = ()
        self.contrast = []

    # -- what trains, and on what

    def parts(self) -> dict[str, list[nn.Parameter]]:
        llm = dict(self.llm.named_parameters())
        used = (self.initial, self.enhancer if self.config.enhancer else None, self.merger, self.selector)
        modules = [m for m in used if m is not None]
        return {"tokenizer": [p for m in modules for p in m.parameters()], "place": list(self.place.parameters()),
                "prompt": list(self.coordinate.parameters()),
                "adapters": [p for n, p in llm.items() if "lora_" in n],
                "filter": list(self.filters.parameters()) if self.config.filter != "none" else [],
                "lm": [p for n, p in llm.items() if "lora_" not in n]}  # fmt: skip

    def configure_stage(self, stage: Stage) -> None:
        if self.config.adapters == "full" and "adapters" in stage.trains:
            stage = replace(stage, trains=(*stage.trains, "lm"))
        super().configure_stage(stage)

    # -- geometry of a scene: computed once, cached

    def feature_settings(self) -> tuple:
        c = self.config
        return (c.points, c.superpoint, c.bits, c.curves, c.vote_window, c.vote_stride, c.edges, c.tokens, c.selector)

    def uses_features(self) -> bool:
        return self.stage.scene_input != "symbols"

    def compute_features(self, scene: Scene) -> dict[str, Tensor]:
        """What follows from the points alone: which are used, "index" [N]; their superpoint, "owner" [N]; the curves,
        "orders" [C, M]; "seed" [T] and "place" [T, 3] metres; the support of `graph_pool`, "token", "member",
        "strength" [P]; the graph, "edges" [E, 2] and "votes" [E]; and which object a seed lies on, "shows" [T]."""
        c = self.config
        if scene.points is None or len(scene.points) == 0:
            raise data.DataError(f"{scene.name}: Fase3D needs points; this source has none")
        if scene.superpoints is None and c.superpoint:
            raise data.DataError(f"{scene.name}: no superpoints; make them with data.over_segment")
        points = torch.from_numpy(np.ascontiguousarray(scene.points @ scene.turn)).float()  # unturned
        drawn = np.random.default_rng(len(points)).choice(len(points), min(c.points, len(points)), replace=False)
        index = canonical(points)[np.sort(drawn)].numpy()  # drawn from the sorted points: their order never matters
        points = points[index]
        label = torch.from_numpy(scene.superpoints[index]).long() if c.superpoint else torch.arange(len(points))
        label = label.unique(return_inverse=True)[1]
        centres = superpoint_mean(points, label, int(label.max()) + 1)
        order = canonical(centres)  # number superpoints by place, not by name
        centres, owner = centres[order], torch.argsort(order)[label]
        curves = list(CURVES)[: c.curves]
        orders = torch.stack([curve_order(centres, name, c.bits) for name in curves])  # [C, M]
        pairs, votes = vote_graph(points, owner, curves, c.vote_window, c.vote_stride)
        edges, votes = nearest_edges(pairs, votes, centres, c.edges)
        seed, place = SELECTORS[c.selector][0](points, owner, edges, c.tokens)
        order = canonical(place)
        order = order[curve_order(place[order], "hilbert", c.bits)]  # the LLM's positions follow a Hilbert curve
        seed, place = seed[order], place[order]
        token, member, strength = support(seed, edges, votes)
        shows = torch.zeros(len(seed), dtype=torch.long)
        if scene.instances is not None:
            shows = most_frequent(torch.from_numpy(scene.instances[index]).long(), owner, len(centres))[seed]
        found = dict(index=torch.from_numpy(index), owner=owner, orders=orders, seed=seed, token=token, member=member,
                     edges=edges, votes=votes, shows=shows)  # fmt: skip
        return {k: v.int() for k, v in found.items()} | {"place": place, "strength": strength}

    def cache_features(self, scenes: Sequence[Scene], folder: Path | None = None,
                       rank: int = 0, world: int = 1) -> None:  # fmt: skip
        """Frozen work, once: the geometry of every scene; and the names that are told apart."""
        things = [o for s in scenes for o in s.objects]
        names = {*data.COLOURS, *(o.category for o in things), *(o.colour for o in things)} - {""}
        self.contrast = sorted({self.text.unk, *(self.text.encode(n)[0] for n in names)}) if not self.config.llm else []
        super().cache_features(scenes, folder, rank, world)

    # -- scenes to tokens

    def features(self, scene: Scene, index: np.ndarray) -> np.ndarray:
        """Colour and normals of the points `index`, in -1..1: [N, channels] float32; hidden colour is 0."""
        parts = []
        if self.config.colour:
            hide = self.config.no_colour
            drawn = np.random.default_rng([7, *scene.identifiers.values()]).random()
            if scene.colours is None and not hide:
                raise data.DataError(f"{scene.name}: the cloud has no colour and this model never saw such; train with "
                                     "--set colour=false or no_colour=0.1")  # fmt: skip
            seen = scene.colours is not None and not (self.training and drawn < hide)
            parts.append(scene.colours[index] / 127.5 - 1 if seen else np.zeros((len(index), 3)))
        if self.config.normals:
            if scene.normals is None:
                raise data.DataError(f"{scene.name}: the cloud has no normals, which this model needs; make them with "
                                     "data.estimate_normals, or train with --set normals=false")  # fmt: skip
            parts.append(scene.normals[index])
        return np.concatenate(parts, 1).astype(np.float32)

    def superpoints(self, scenes: Sequence[Scene]) -> tuple[Tensor, list[int]]:
        """Context-enhanced superpoint features of all scenes in a row: (S [M, d], superpoints per scene)."""
        device, found = self.llm.device, [self.load_features(s) for s in scenes]
        sizes = [g["orders"].shape[1] for g in found]
        start = np.cumsum([0, *sizes])
        points = torch.cat([torch.from_numpy(s.points[g["index"].numpy()]) for s, g in zip(scenes, found, strict=True)])
        features = torch.cat([torch.from_numpy(self.features(s, g["index"].numpy()))
                              for s, g in zip(scenes, found, strict=True)])  # fmt: skip
        owner = torch.cat([g["owner"].long() + int(m) for g, m in zip(found, start, strict=False)])
        scene = torch.arange(len(scenes)).repeat_interleave(torch.tensor([len(g["index"]) for g in found]))
        places = unit_box(points.float(), scene).to(device)  # [N, 3] in 0..1
        S = self.initial(features.to(device), places, owner.to(device), int(start[-1]))  # [M, d]
        if self.config.enhancer:
            B, most = len(scenes), max(sizes)
            valid = torch.arange(most) < torch.tensor(sizes)[:, None]  # [B, most]
            orders = torch.arange(most).repeat(B, self.config.curves, 1)  # [B, C, most]
            for b, g in enumerate(found):
                orders[b, :, : sizes[b]] = g["orders"]
            valid, orders = valid.to(device), orders.to(device)
            padded = S.new_zeros(B, most, S.shape[1]).masked_scatter(valid[..., None], S)  # [B, most, d]
            S = self.enhancer(padded, valid, orders)[valid]  # [M, d]
        return S, sizes

    def merge(self, scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, list[int]]:
        """All scenes' merged tokens in a row: (z' [T, d], tokens [T, D] without places, tokens per scene)."""
        S, sizes = self.superpoints(scenes)
        device, found = S.device, [self.load_features(s) for s in scenes]
        number = [len(g["seed"]) for g in found]
        at, first = np.cumsum([0, *sizes]), np.cumsum([0, *number])
        shift = lambda key, by: torch.cat([g[key].long() + int(n) for g, n in zip(found, by, strict=False)]).to(device)  # noqa: E731
        strength = torch.cat([g["strength"] for g in found]).to(device)
        z = graph_pool(S, shift("seed", at), shift("token", first), shift("member", at), strength, int(first[-1]))
        if self.selector is not None:
            z = self.selector(S, sizes, number)  # [T, d]
        return *self.merger(z), number

    def centres(self, scene: Scene) -> Tensor:
        """Where the scene's tokens are, turned with it: [T, 3] metres."""
        if self.stage.scene_input == "symbols":
            centres = torch.from_numpy(np.stack([o.box[:3] for o in scene.objects])).float()
            return centres[self.object_order(centres)]
        return self.load_features(scene)["place"] @ torch.from_numpy(scene.turn).float().T

    @staticmethod
    def object_order(centres: Tensor) -> Tensor:
        order = canonical(centres)
        return order[curve_order(centres[order], "hilbert", 10)]

    def scene_length(self, scene: Scene) -> int:
        """How many tokens the scene will take."""
        return len(scene.objects) if self.stage.scene_input == "symbols" else len(self.load_features(scene)["seed"])

    def in_words(self, scene: Scene) -> Tensor:
        """A scene written in words, in place of what points would show: [T, D] the sum of the word vectors of category
        and colour, of every object ("symbols") or of what each seed lies on ("words"), at the words' own size."""
        names = {0: (self.text.unk,) * 2} | {o.id: self.names(o) for o in scene.objects}
        if self.stage.scene_input == "symbols":
            centres = torch.from_numpy(np.stack([o.box[:3] for o in scene.objects])).float()
            shown = [scene.objects[i].id for i in self.object_order(centres).tolist()]
        else:
            shown = self.load_features(scene)["shows"].tolist()
        ids = torch.tensor([names.get(i, names[0]) for i in shown], device=self.llm.device)  # [T, 2]
        words = self.llm.get_input_embeddings()(ids).sum(1)  # [T, D]
        return F.layer_norm(words, words.shape[-1:])

    def names(self, thing: data.Thing) -> tuple[int, int]:
        """The words of its category and colour; an unknown one is replaced by the other, both by <unk>."""
        category, colour = (self.text.encode(n)[:1] for n in (thing.category, thing.colour))
        return tuple((category or colour or [self.text.unk]) + (colour or category or [self.text.unk]))

    def encode(self, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        """{"tokens" [B, T, D], "valid" [B, T], "places" [B, T, 3] metres, and from points "z" [B, T, d]}."""
        device = self.llm.device
        places = [self.centres(s) for s in scenes]
        valid = torch.arange(max(map(len, places))) < torch.tensor([len(p) for p in places])[:, None]
        valid = valid.to(device)  # [B, T]
        pad = lambda x: x.new_zeros(*valid.shape, x.shape[-1]).masked_scatter(valid[..., None], x)  # noqa: E731
        places = torch.cat(places).to(device)
        if self.stage.scene_input == "tokens":
            z, tokens, _ = self.merge(scenes)
            more = {"z": pad(z)}
        else:
            tokens, more = torch.cat([self.in_words(s) for s in scenes]), {}
        return {"tokens": pad(tokens + self.place(places)), "valid": valid, "places": pad(places), **more}

    def prompt_tokens(self, batch: dict, seen: dict[str, Tensor]) -> Tensor:
        """The coordinate token of every question that has one: [P, D]."""
        device = self.llm.device
        c, owner = batch["prompts"][:, :3].to(device), batch["prompt_scene"].to(device)  # [P, 3], [P]
        token = self.place(c)  # [P, D]
        if self.stage.scene_input != "tokens":
            return token
        box = torch.from_numpy(np.stack([[s.points.min(0), s.points.max(0)] for s in batch["scenes"]])).float()
        around = self.coordinate(c, box.to(device)[owner], seen["z"][owner], seen["places"][owner],
                                 seen["valid"][owner], self.config.prompt_neighbours)  # fmt: skip
        return token + around  # [P, D]

    # -- questions

    def object_to_text(self, scene: Scene, object_id: int) -> str:
        """How a question names an object: a coordinate token stands in front of the text."""
        return "this"

    def refusal(self, scene: Scene, question: str) -> str | None:
        """Why a question cannot be answered about a scene of one's own, or None."""
        about_colour = {"colour", "color", *data.COLOURS} & set(question.lower().replace("?", " ").split())
        return "this cloud has no colour." if about_colour and scene.colours is None else None

    def add_prompt(self, scene: Scene, sample: Sample, rng: np.random.Generator) -> Sample:
        """A question about a marked object, with the object's place for a prompt: its box, or in training half of the
        time a click on it, one of its points. Raises DataError for more than one object."""
        marks = data.MARK.findall(sample.question)
        if sample.prompt is not None or not marks:
            return sample
        if len(set(marks)) > 1:
            raise data.DataError(f"{sample.task}: {sample.question!r} points at two things; Fase3D has one coordinate "
                                 "token per question")  # fmt: skip
        thing = scene.thing(int(marks[0]))
        if self.training and scene.instances is not None and rng.random() < 0.5:
            mine = np.flatnonzero(scene.instances == thing.id)
            if len(mine):
                return replace(sample, prompt=scene.points[mine[int(rng.random() * len(mine))]].astype(float))
        return replace(sample, prompt=thing.box)

    def batch(self, groups: Sequence[tuple[Scene, Sequence[Sample]]]) -> dict:
        """See the base class; and which scene each prompt belongs to."""
        batch = super().batch(groups)
        if not batch["samples"]:
            return batch
        owner = batch["ids"].eq(PROMPT).nonzero()[:, 0]
        return batch | {"prompt_scene": owner}

    def run_decoder(self, embeds: Tensor, is_scene: Tensor, positions: Tensor, mask: Tensor, cache=None) -> Tensor:
        """See the base class; scene and coordinate tokens are vision."""
        with self.router.routed(is_scene):
            return super().run_decoder(embeds, is_scene, positions, mask, cache)

    # -- the tokenizer stage of the tiny preset

    def encoder_loss(self, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        """Stand-in for a long training: every token names the category and colour of what its seed lies on, in the
        language model's own word vectors; walls and floor are <unk>. {"loss", "weight", "correct"}."""
        _, tokens, number = self.merge(scenes)  # [T, D]
        device = tokens.device
        names = [{o.id: self.names(o) for o in s.objects} for s in scenes]
        target = torch.tensor([known.get(i, (self.text.unk,) * 2) for s, known in zip(scenes, names, strict=True)
                               for i in self.load_features(s)["shows"].tolist()], device=device)  # [T, 2]
        table = torch.tensor(self.contrast, device=device)
        words = self.llm.get_input_embeddings().weight.detach()[table]  # [names, D]
        where = torch.searchsorted(table, target)  # [T, 2]
        weight = torch.where(target[:, 0] == self.text.unk, 0.2, 1.0)  # [T]
        told = -(0.2 * tokens @ words.T).log_softmax(-1).gather(1, where).mean(1)  # [T] which names
        apart = 1 - F.cosine_similarity(tokens, words[where].sum(1), dim=-1)  # [T] written as their sum
        top = (tokens @ words.T).topk(2).indices  # [T, 2]
        thing = target[:, 0] != self.text.unk
        both = (top[:, :, None] == where[:, None]).any(1).all(1) & thing  # both words on top
        return {"loss": ((told + apart) * weight).sum(), "weight": weight.sum(), "correct": both.sum(),
                "count": thing.sum(), "tokens": torch.tensor(sum(number))}  # fmt: skip

    # -- dense captioning without given boxes, and pictures

    @torch.no_grad()
    def propose(self, scene: Scene, count: int = 48) -> Scene:
        """The scene with spectral clusters of its superpoint graph for objects, without category, box = extent of their
        points: proposals for dense captioning."""
        found = self.load_features(scene)
        S, _ = self.superpoints([scene])
        edges, votes = found["edges"].long(), found["votes"].float()
        unit = F.normalize(S, dim=-1).cpu()
        strength = votes.log1p() / votes.max().log1p() if len(votes) else votes
        weight = (unit[edges[:, 0]] * unit[edges[:, 1]]).sum(1).clamp(min=0) * strength
        label = spectral_clusters(edges.numpy(), weight.numpy(), len(unit), count)[found["owner"].numpy()]
        points = scene.points[found["index"].numpy()]
        things = []
        for i in np.unique(label):
            low, high = points[label == i].min(0), points[label == i].max(0)
            things.append(data.Thing(int(i) + 1, "", "", np.concatenate([(low + high) / 2, high - low])))
        instances = np.zeros(len(scene.points), np.int64)
        instances[found["index"].numpy()] = label + 1
        note = f"objects are {len(things)} spectral clusters of the superpoint graph"
        return replace(scene, objects=things, instances=instances, notes=[*scene.notes, note])

    def proposals(self) -> dict:
        """What `evaluate.py --proposals` may name besides its own."""
        return {"clusters": self.propose}

    def token_centers(self, scene: Scene) -> np.ndarray:
        """Where the scene's tokens are [T, 3], for pictures."""
        return self.centres(scene).numpy()

    def pictures(self, scenes: Sequence[Scene], folder: Path, count: int = 2) -> list[Path]:
        """Of some scenes: cloud, boxes and tokens; curves; superpoint graph and seeds. Returns the files."""
        paths = []
        for scene in scenes[:count]:
            found = {k: v.numpy() for k, v in self.load_features(scene).items()}
            paths += [folder / f"{scene.name}{what}.png" for what in ("", "_curves", "_graph")]
            data.draw_scene(scene, paths[-3], tokens=self.token_centers(scene))
            draw_curves(scene.points, found, paths[-2])
            draw_graph(scene, found, paths[-1])
        return paths


def spectral_clusters(edges: np.ndarray, weight: np.ndarray, nodes: int, count: int = 48) -> np.ndarray:
    """Labels [nodes] in 0..count-1 of a weighted graph: k-means on the rows of the first `count` eigenvectors of
    D^-1/2 A D^-1/2 (Ng, Jordan and Weiss), found by scipy's sparse solver. edges [E, 2] symmetric, weight [E] >= 0."""
    from scipy.cluster.vq import kmeans2
    from scipy.sparse import coo_array
    from scipy.sparse.linalg import eigsh

    few = min(count, nodes - 2)  # the solver finds fewer eigenvectors than there are nodes
    if few < 1 or not weight.any():
        return np.arange(nodes) % count
    A = coo_array((weight.astype(float), (edges[:, 0], edges[:, 1])), (nodes, nodes)).tocsr()
    scale = 1 / np.sqrt(np.maximum(A.sum(1), 1e-9))
    A = A.multiply(scale[:, None]).multiply(scale[None]).tocsr()
    start = np.random.default_rng(0).random(nodes)
    _, vectors = eigsh(A, k=few, which="LA", v0=start, tol=1e-3)
    rows = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    return kmeans2(rows, few, minit="++", rng=np.random.default_rng(0))[1]


def draw_curves(points: np.ndarray, found: dict[str, np.ndarray], path: Path) -> None:
    """A picture of a scene's curves (`Model.geometry`): its superpoints in line along each, from above. points [N, 3]
    of the scene, as turned."""
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    points = points[found["index"]]
    centres = superpoint_mean(*map(torch.from_numpy, (points, found["owner"])), int(found["owner"].max()) + 1).numpy()
    rows = math.ceil(len(found["orders"]) / 2)
    wide, deep = np.ptp(points[:, :2], axis=0) + 0.5
    figure = Figure(figsize=(14, min(6.4 * deep / wide, 12) * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flatten()
    for axis, order, name in zip(axes, found["orders"], CURVES, strict=False):
        axis.scatter(*points[:, :2].T, s=1, c="0.85", zorder=0)
        line = centres[order][:, :2]
        parts = LineCollection(np.stack([line[:-1], line[1:]], 1), cmap="turbo", array=np.arange(len(line)), lw=1.3)
        axis.add_collection(parts)
        axis.set_title(f"curve {name!r} from above", fontsize=11)
        axis.set(aspect="equal", xlabel="x", ylabel="y")
    for axis in axes[len(found["orders"]) :]:
        axis.set_axis_off()
    bar = figure.colorbar(parts, ax=axes, shrink=0.5, label=f"place of a superpoint in the line of {len(line)}")
    bar.ax.tick_params(labelsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=data.DPI)


def draw_graph(scene: Scene, found: dict[str, np.ndarray], path: Path) -> None:
    """A picture of a scene's superpoint graph (`Model.geometry`): nodes at the superpoints' centres in the colours of
    their points, edges darker the more votes they have, the seeds that become tokens larger."""
    M, index = int(found["owner"].max()) + 1, found["index"]
    mean = lambda rows: superpoint_mean(torch.from_numpy(np.ascontiguousarray(rows)).float(),  # noqa: E731
                                        torch.from_numpy(found["owner"]), M).numpy()  # fmt: skip
    centres = mean(scene.points[index])
    colours = np.full((M, 3), 0.5) if scene.colours is None else mean(scene.colours[index] / 255)
    once = found["edges"][:, 0] < found["edges"][:, 1]
    edges, votes = found["edges"][once], found["votes"][once]
    strength = np.log1p(votes) / np.log1p(votes.max(initial=1))
    title = (f"{scene.name}: superpoint graph of {M} superpoints and {len(edges)} edges by window voting; "
             f"{len(found['seed'])} ringed seeds become tokens")  # fmt: skip
    with data.board(scene, path, title, ["edges: the darker, the more votes"], "pale") as views:
        for view in views:
            view.lines(centres[edges], colors=np.c_[np.zeros((len(edges), 3)), 0.15 + 0.6 * strength], lw=0.8, zorder=2)
            view.dots(centres, c=colours, s=12, zorder=3)
            view.dots(centres[found["seed"]], c=colours[found["seed"]], s=55, ec="black", lw=1.0, zorder=4)


# ---- 9 the adapters as files -----------------------------------------------------------------------------------------

MARKER = {"format": "fase3d", "needs": "fourier filter, routing by token kind"}  # of the file that plain peft lacks


def save_adapters(model: Model, folder: Path) -> None:
    """What was trained around the language model, in the form in which adapters travel: FOLDER/<adapter>/ as peft
    writes it, and FOLDER/fase3d.safetensors with tokenizer, coordinate token and filter, marked. peft alone would load
    the adapters, apply one of them to all tokens, and know nothing of the rest."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model.llm, "wrapped"):
        model.llm.wrapped[0].save_pretrained(folder)
    own = {n: p.detach().cpu().contiguous() for n, p in data.named_weights(model).items() if not n.startswith("llm.")}
    save_file(own, folder / "fase3d.safetensors", metadata={**MARKER, "filter": model.config.filter})


def load_adapters(model: Model, folder: Path) -> None:
    """The inverse, into a model of the same Config. Raises DataError for a folder without the filter's marked file, or
    where a name or shape differs."""
    from safetensors import safe_open

    path = folder / "fase3d.safetensors"
    if not path.exists():
        raise data.DataError(f"{folder}: no fase3d.safetensors; adapters alone are not the model: filter, tokenizer "
                             "and coordinate token are missing, save them with fase3d.save_adapters")  # fmt: skip
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("format") != MARKER["format"]:
            raise data.DataError(f"{path}: not marked as Fase3D's; save it with fase3d.save_adapters")
        if (there := file.metadata().get("filter")) != model.config.filter:
            raise data.DataError(f"{path}: filter is {there!r} there, {model.config.filter!r} in this model; use the "
                                 "Config it is from")  # fmt: skip
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    for name in dict.fromkeys(ADAPTERS[model.config.adapters].values()) if hasattr(model.llm, "wrapped") else ():
        path = folder / name / "adapter_model.safetensors"
        if not path.exists():
            raise data.DataError(f"{path}: missing, this model has an adapter {name!r}; use the Config it is from")
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                inner = key.removeprefix("base_model.model.")
                for side in ("lora_A", "lora_B"):
                    inner = inner.replace(f".{side}.", f".{side}.{name}.")
                saved[f"llm.{inner}"] = file.get_tensor(key)
    own = {n: p for n, p in data.named_weights(model).items() if not n.startswith("llm.") or "lora_" in n}
    for name in sorted(saved.keys() | own.keys()):
        there, here = (tuple(t[name].shape) if name in t else "missing" for t in (saved, own))
        if there != here:
            raise data.DataError(f"{folder}: {name} is {there} there, {here} in this model; use the Config it is from")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


# ---- 10 the paper's recipe -------------------------------------------------------------------------------------------

TASKS: dict = {}  # Fase3D needs no question types beyond data.TASKS
UNLABELLED = ("id_colour", "exist", "count")  # what stands in for questions that need names

GENERALIST = {  # stage 1, sources and the paper's counts: the ScanNet part of 3D-LLM (of whose descriptions it counts
    # the validation rooms too: the leak filter takes them out), and four data sets, two of them as captions
    "3D-LLM descriptions": Source("3dllm/description", 1033, splits=("train", "val")),
    "3D-LLM planning": Source("3dllm/planning", 1864), "3D-LLM dialogue": Source("3dllm/dialogue", 2955),
    "ScanQA": Source("scanqa", 25_563), "SQA3D": Source("sqa3d", 26_623), "ScanRefer": Source("scan2cap", 36_665),
    "Nr3D": Source("nr3d/caption", 32_919),
}  # fmt: skip
_QA = {"colour": 0.2, "what": 0.2, "where": 0.12, "count": 0.12, "exist": 0.16, "situated": 0.04}
_CAPTION = {"caption": 1.0}
_NAME = {"id_category": 0.5, "id_colour": 0.5}  # "what is this?" with a click: the short form of a caption


def _mix(**parts: tuple[float, dict[str, float]]) -> dict[str, float]:
    """Question mixes by share."""
    return {task: share * w / sum(mix.values()) for share, mix in parts.values() for task, w in mix.items()}


TUNED = {"qa": _QA, "caption": _CAPTION, "all": _mix(qa=(0.7, _QA), caption=(0.2, _CAPTION), name=(0.1, _NAME))}
_OFFICIAL = {"qa": ("ScanQA", "SQA3D"), "caption": ("ScanRefer", "Nr3D"), "all": tuple(GENERALIST)}  # of a task
_PARTS = ("tokenizer", "place", "prompt", "adapters", "filter")
_ALL = _mix(qa=(0.6, _QA), caption=(0.15, _CAPTION), name=(0.25, _NAME))
_TINY = dict(lr=2e-3, weight_decay=0.01, per_scene=32, batch=256, schedule="constant", warmup=0.1, steps=True)

STAGES = {
    "paper": [  # sec. 4.1: AdamW, weight decay 0.1, cosine from 1e-4 to 1e-6; stage 2 tunes for one task
        Stage("1 generalist", _mix(qa=(0.6, _QA), caption=(0.4, _CAPTION)), _PARTS, "tokens", iterations=100_000,
              batch=8, per_scene=1, lr=1e-4, final_lr=1e-6, weight_decay=0.1, clip=0.1, files=GENERALIST),
        Stage("2 task", {}, _PARTS, "tokens", iterations=30_000, batch=8, per_scene=1, lr=1e-4, final_lr=1e-6,
              weight_decay=0.1, clip=0.1),
    ],
    "tiny": [
        Stage("0 language", _mix(qa=(0.35, _QA), caption=(0.1, _CAPTION), name=(0.55, _NAME)), ("lm", "place"),
              "symbols", iterations=800, recolour=True, **{**_TINY, "per_scene": 16}),
        Stage("0 words", _ALL, ("lm", "place"), "words", iterations=300, recolour=True, **_TINY),
        Stage("0 tokenizer", {}, ("tokenizer",), "tokenizer", iterations=400, batch=16, lr=8e-3, schedule="cosine",
              warmup=0.05),
        Stage("1 generalist", _ALL, _PARTS, "tokens", iterations=500, files=GENERALIST, **_TINY),
        Stage("2 task", {}, _PARTS, "tokens", iterations=300, **{**_TINY, "schedule": "linear"}),
    ],
}  # fmt: skip


def recipe(config: Config, stages: list[Stage]) -> list[Stage]:
    """The stages for a configuration: without `pretrain` no generalist stage ("from scratch"); the last stage asks what
    `task` names."""
    kept = [s for s in stages if config.pretrain or s.name != "1 generalist"]
    files = {name: GENERALIST[name] for name in _OFFICIAL[config.task]}
    return [replace(s, tasks=TUNED[config.task], files=files) if s.name == "2 task" else s for s in kept]


# ---- 11 alternatives the paper compares with -------------------------------------------------------------------------


def farthest_seeds(points: Tensor, superpoints: Tensor, edges: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Table 6, "FPS": the superpoints of the farthest points, without suppression; each counts once, so that more
    points are drawn until there are enough superpoints. Shapes as in `choose_seeds`."""
    count = min(count, int(superpoints.max()) + 1)
    drawn = count
    while True:
        anchor = farthest_point_sampling(points, drawn)
        label, first = np.unique(superpoints[anchor].numpy(), return_index=True)
        if len(label) >= count or drawn >= len(points):
            kept = anchor[torch.from_numpy(np.sort(first)[:count])]
            return superpoints[kept], points[kept]
        drawn = min(2 * drawn, len(points))


class QFormer(nn.Module):
    """Table 6, "Q-Former": learned queries that cross-attend to all superpoints in place of seeds and graph; the tokens
    keep the seeds' positions in the sequence, but know no place."""

    def __init__(self, tokens: int, dim: int, heads: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(tokens, dim) * 0.02)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.before, self.after = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, S: Tensor, sizes: list[int], number: list[int]) -> Tensor:
        """S [M, d], superpoints per scene, tokens per scene -> [T, d] of all scenes."""
        out = []
        for part, n in zip(S.split(sizes), number, strict=True):
            x = self.queries[:n]  # [T, d]
            x = x + self.attention(x[None], self.before(part)[None], self.before(part)[None], need_weights=False)[0][0]
            out.append(x + self.ffn(self.after(x)))  # [T, d]
        return torch.cat(out)


SELECTORS = {  # name -> (seeds, what replaces graph pooling)
    "graph": (choose_seeds, lambda config: None),
    "fps": (farthest_seeds, lambda config: None),
    "qformer": (choose_seeds, lambda config: QFormer(config.tokens, config.dim, config.heads)),
}
ADAPTERS = {  # Table 4: kind of token -> peft adapter
    "none": {}, "vision": {"vision": "vision"}, "text": {"text": "text"},
    "shared": {"vision": "shared", "text": "shared"}, "decoupled": {"vision": "vision", "text": "text"},
    "full": {},  # the language model itself trains with the adapters' stages
}  # fmt: skip
FILTERS = {"none": "no filter", "vision": "scene and coordinate tokens", "both": "all tokens"}


# ---- 12 demo and command line ----------------------------------------------------------------------------------------


def build(config: Config, text) -> Model:
    """The model of a configuration."""
    return Model(config, text)


def demo() -> None:
    """One room from points to an answer, with real shapes, and a tiny model that learns its questions by heart."""
    torch.manual_seed(0)
    scene = data.room(1, views=0)
    scene.identifiers = data.number_objects(scene, np.random.default_rng(0))
    model = Model(Config.tiny(no_colour=0.0), data.TinyText(data.vocabulary()))
    stage = Stage("demo", TUNED["all"], _PARTS, "tokens", iterations=60)
    model.configure_stage(stage)
    model.cache_features([scene])
    found = model.load_features(scene)
    shape = lambda *tensors: ", ".join(str(list(t.shape)) for t in tensors)  # noqa: E731
    with torch.no_grad():
        S, _ = model.superpoints([scene])
        z, tokens, _ = model.merge([scene])
    print(f"points p, f [N, 3], [N, 6]   {shape(scene.points)}, {shape(model.features(scene, found['index'].numpy()))}")
    print(f"superpoints S [M, d]         {shape(S)}")
    print(f"curves [C, M]                {shape(found['orders'])}: {', '.join(list(CURVES)[: model.config.curves])}")
    print(f"graph, edges [E, 2]          {shape(found['edges'])}")
    print(f"seeds -> merged z' [T, d]    {shape(found['seed'])} -> {shape(z)}")
    print(f"tokens [T, D]                {shape(tokens)}")
    samples = data.questions(scene, stage.tasks, 24, np.random.default_rng(1))
    batch = model.batch([(scene, samples)])
    print(f"packed questions [R, T]      {shape(batch['ids'])}, {len(samples)} of them")
    with model.router.routed(batch["ids"] < 0):
        print(f"routed to vision, to text    {int((batch['ids'] < 0).sum())}, {int((batch['ids'] >= 0).sum())} tokens")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"parameters that train        {trains:,} of {sum(p.numel() for p in model.parameters()):,}")
    for step in range(stage.iterations):
        out = model(batch)
        loss = out["loss"] / out["weight"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == stage.iterations - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    model.eval()
    answer = model.generate(model.batch([(scene, samples[:1])]))[0]
    question = data.substitute(samples[0].question, lambda i: model.object_to_text(scene, i))
    print(f"{question}  ->  {answer}  (true: {samples[0].answer}; learned by heart, python train.py --model fase3d "
          "learns to see)")  # fmt: skip


if __name__ == "__main__":
    demo()
