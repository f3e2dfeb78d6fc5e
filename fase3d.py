"""Fase3D: Efficient Encoder-Free 3D Large Multimodal Model in the Frequency Domain.

CVPR 2026, arXiv 2602.23153, version 2 (version 1 merged tokens by optimal transport; that is not
built here). Equation, section and table numbers are the paper's.

Idea. No pre-trained 3D encoder. Points get a small MLP and a Fourier code; superpoints pool them;
space-filling curves turn the unordered superpoints into sequences, on which a learned gate in the
frequency domain spreads context in O(n log n); a graph found by voting along the same curves merges
them into a few hundred tokens. The language model stays frozen: low-rank adapters, one for vision
tokens and one for text tokens, and a Fourier filter for vision tokens.

  points p [N,3], color + normal f [N,6] -> MLP(f) + Fourier(p) -> mean per superpoint S [M,d]    (1)
    S along 4 curves, windows of 128 -> rFFT * gate -> irFFT -> mean over curves, added to S  (2)(3)(5)
    all points along the 4 curves, windows of 64 -> votes between superpoints -> graph        sec. 3.3
    T seeds -> 1-hop pooling of S in Hilbert order -> LayerNorm, phi -> z' -> MLP -> tokens [T,D]
    a click or box center c [3] with its 16 nearest tokens -> one coordinate token [D]
  [tokens][coordinate token][question] -> frozen LLM, first 8 FFNs: dLoRA + filter -> answer      (4)

Axes: N points, M superpoints, C curves, W windows, L window length, H heads, T merged tokens of a scene, E
edges, P prompts, B scenes, d width of the tokenizer, D width of the language model. (In data.py S are scenes, K
their tokens and T is the whole sequence; here S are superpoints' features, as in the paper.) The tokenizer works
scene by scene and needs no padding. "Places" are coordinates, in meters or, where said, in 0..1 of the box.

| paper                                       | here                                         |
| sec. 3.1 token initialization, (1)          | fourier_code, superpoint_mean, Initial       |
| (6) quantization, Morton and Hilbert keys   | quantize, morton, hilbert, CURVES            |
| (5) FFT, (2) filtered windows, (3) curves   | windowed_filter, enhance, Enhancer           |
| superpoint graph by window voting           | vote_graph, nearest_edges                    |
| (9)-(11) its cost in time and memory        | vote_graph's docstring, tests/bench.py       |
| token merging: seeds, suppression, pooling  | choose_seeds, graph_pool, Merger             |
| places of tokens and prompts                | Model.place of data.fourier_waves            |
| 3D coordinate token                         | CoordinateToken, Model.prompt_tokens         |
| Fourier-augmented LoRA: filter, dLoRA       | global_filter, FourierFilter, DecoupledLoRA  |
| (4) loss on answers                         | data.SceneLanguageModel.forward              |
| two training stages, and from scratch       | STAGES, recipe                               |
| dense captioning, 48 spectral clusters      | spectral_clusters, Model.propose             |
| Tables 3, 4, A to E: ablations              | Config, SELECTORS, ADAPTERS, FILTERS         |

What the paper leaves open, and what we chose
- d = 768 is a guess: from an LLM of width 2048 to one of 4096 the tokenizer's parameters grow by one
  map of 768 inputs (10.54 to 12.11 M); but OPT-1.3B, 2048 wide as well, is listed with 9.30 M. The MLP is
  6 -> 128 -> d with LayerNorm and GELU after the first map; superpoints are averaged before the
  second, which is linear: the same result for 1/50 of the work.
- The Fourier code has sin and cos of 100 x / 1000^(i / F) for F = d / 6 frequencies per axis,
  coordinates scaled to the box of the points drawn; clicks are coded in the same box.
- Centers are quantized with 10 bits, points with 16; equal keys are ordered by coordinates, so that
  the order of the input matters only between points at exactly the same place.
- Enhancer: Hann windows before and after the filter, divided by the summed squared window. A
  window's mean is taken out first and put back with the gate of frequency zero. The gate is
  softplus(theta) per head and frequency; head h starts as a low-pass of its own width. The
  supplement (D.2) also names linear maps around the FFT and a scorer of curves; (2) and (3) have
  neither, nor has this file.
- Graph: a window is 32 points before and 32 after its center, a new center every 16 points.
  Votes propose neighbors and weigh edges, but distance chooses: the k = 8 nearest of those proposed, of
  equals those with more votes; an edge stays if either end keeps it, with the larger vote.
- Seeds: farthest points, the first one farthest from the centroid. Where two of them lie in one superpoint, the
  later is replaced by the largest superpoint that is adjacent to no seed: the paper says "uncovered", not in
  which order. In a room of 50,000 points so are about half of the tokens.
- Edge weight: max(0, cos(S_i, S_j)) * log(1 + v_ij) / log(1 + largest vote of the scene).
- A token is LayerNorm(MLP(z')) + `Model.place` of its position in meters, a linear map that also encodes
  clicks and boxes, so that a place can be found by what it shares with a token. The LayerNorm starts at
  the size of the LLM's word vectors.
- Coordinate token: the same map of c + MLP([code(c); mean over its 16 nearest merged
  tokens of z_k + code(c_k - c)]); a box counts by its center. Order: scene, coordinate token, text.
- LoRA on all linear maps of the FFN (OPT: fc1, fc2), no dropout. The filter acts on what enters the
  FFN and starts as the identity. Of its D gains (the paper's count) those of frequency +k and -k
  act as their mean. Behind the last layer nothing reads vision tokens: if that layer is adapted
  too, it gets neither vision adapter nor filter, for they could not learn.
- Gate and gains are vectors to the optimizer, which decays matrices only: decay draws theta to 0, where the
  gate is softplus(0) = 0.69, so it would open by itself.
  Clipping at 0.1 and a warm-up of 10 % are ours. Decoding is greedy (LL3DA: beams of 4); captions have one
  instruction and questions none (LL3DA draws from 6 and 4).
- The LLM is loaded in bfloat16, in which the trainer computes (paper: float16), so that autocast
  need not copy its weights.
- What depends on geometry alone (points drawn, curves, graph, seeds) is computed once per scene and
  cached, so points are drawn once per scene, not once per step; colors and normals are gathered in the
  training process. Mirrored scenes keep the curves of
  the unmirrored one; scenes are not rotated by small angles.
- A cloud without color is answered by models that saw such clouds in training (`no_color`), and
  refused by others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import data
from data import PROMPT, DataError, Scene, SceneLanguageModel, Source, Stage

# ---- configuration -------------------------------------------------------------------------------


@dataclass
class Config:
    """Every number of the model; `paper()` are the paper's, `tiny()` trains from nothing."""

    llm: str | None = None  # name or folder of a causal language model; None: a tiny one
    dtype: str = "bfloat16"  # in which it is loaded
    points: int = 50_000  # points per scene, drawn uniformly; paper 50,000
    superpoint: bool = True  # False: every point is a superpoint of its own (Table 3)
    color: bool = True  # points carry color
    normals: bool = True  # and normals; paper: both
    no_color: float = 0.0  # share of training scenes shown without color
    dim: int = 768  # d, width of the tokenizer; a multiple of 6 and of `heads`
    hidden: int = 128  # hidden width of the per-point MLP
    bits: int = 10  # per axis of a superpoint's key
    curves: int = 4  # how many of CURVES; paper 4 (1, 2, 4, 6)
    enhancer: bool = True  # False: no FFT context (Table 3)
    window: int = 128  # L, superpoints per FFT window; paper 128
    heads: int = 8  # of the gate; paper 8
    vote_window: int = 64  # points per voting window; paper 64
    vote_stride: int = 16  # points between its centers; paper 16
    edges: int = 8  # k, edges kept per superpoint
    tokens: int = 256  # T; paper 256 (64, 128, 256, 320)
    selector: str = "graph"  # a key of SELECTORS
    prompt_neighbors: int = 16  # of a click or box; paper 16
    adapters: str = "decoupled"  # a key of ADAPTERS
    filter: str = "vision"  # a key of FILTERS
    adapted_layers: int = 8  # first layers with adapters and filter; paper 8 (0, 4, 8, 10, 12)
    rank: int = 768  # of LoRA; paper 768
    alpha: float = 768  # of LoRA; paper 768, scale alpha / rank = 1
    filter_heads: int = 8  # of the Fourier filter; paper 8
    pretrain: bool = True  # False: from scratch, without the generalist stage
    task: str = "all"  # what the second stage tunes for: a key of TUNED
    reader: tuple[int, ...] = data.READER  # the tiny language model, where llm is None

    @classmethod
    def tiny(cls, **changes) -> Config:
        tokenizer = dict(points=4096, no_color=0.05, dim=96, hidden=64, tokens=128)
        llm = dict(prompt_neighbors=4, rank=32, alpha=32, filter_heads=4, adapted_layers=2)
        return cls(**{**tokenizer, **llm, **changes})

    @classmethod
    def paper(cls, **changes) -> Config:
        return cls(**{"llm": "Qwen/Qwen2.5-3B-Instruct", "task": "qa", **changes})


# ---- 1 token initialization, Eq. (1) -------------------------------------------------------------


def fourier_code(x: Tensor, dim: int) -> Tensor:
    """Encode coordinates without parameters, F = dim / 6 frequencies per axis.

    sin and cos of 100 x / 1000^(i / F); x [..., 3] in the unit of the scene's box -> [..., dim].
    """
    count = dim // 6
    frequency = 100 / 1000 ** (torch.arange(count, device=x.device) / count)  # [count]
    phase = (x.float()[..., None] * frequency).flatten(-2)  # [..., 3*count]
    return torch.cat([phase.sin(), phase.cos()], dim=-1)  # [..., dim]


def superpoint_mean(x: Tensor, owner: Tensor, count: int | None = None) -> Tensor:
    """Average x [N, d] over the points of each superpoint, Eq. (1).

    owner [N] of 0..M-1, each of which must be there; count: M, else read from `owner`, for which a GPU must be
    waited for. Returns: [M, d].
    """
    if count is None:
        count = int(owner.max()) + 1
    return data.group_mean(x, owner, count)[0]  # [M, d]


def unit_box(points: Tensor, box: Tensor) -> Tensor:
    """Put points [..., 3] into the unit of a box [2, 3]; 0 along an axis without extent."""
    return (points - box[0]) / (box[1] - box[0]).clamp(min=1e-6)


class Initial(nn.Module):
    """Per-point MLP + Fourier code, pooled to superpoints."""

    def __init__(self, channels: int, hidden: int, dim: int):
        super().__init__()
        self.lift = nn.Sequential(nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.GELU())
        self.out = nn.Linear(hidden, dim)

    def forward(self, features: Tensor, places: Tensor, owner: Tensor, count: int) -> Tensor:
        """Pool points: features [N, channels], places [N, 3] in 0..1, owner [N] of 0..count-1 -> S [M, d]."""
        # averaging before the second linear map gives the same, and that map then reads M rows
        x = superpoint_mean(self.lift(features), owner, count)  # [M, hidden]
        S = self.out(x)  # [M, d]
        return S + superpoint_mean(fourier_code(places, S.shape[1]), owner, count)  # [M, d]


# ---- 2 serialization, Eq. (6) --------------------------------------------------------------------
#
# A space-filling curve gives every cell of a grid a number, its key, such that near keys are near
# cells. With one bit per axis there are eight cells xyz, and the two curves visit them like this:
#
#   key       0    1    2    3    4    5    6    7
#   Morton   000  100  010  110  001  101  011  111   the bits of z, y, x: jumps at every carry
#   Hilbert  000  001  011  010  110  111  101  100   a Gray code: a step changes one axis by one
#
# With more bits each of the eight cells holds eight smaller ones. Hilbert's curve turns and mirrors
# the path inside each such that it ends beside where the next one starts; Morton's does not.


def quantize(points: Tensor, bits: int) -> Tensor:
    """Divide the cloud's box into 2^bits cells per axis, Eq. (6): [N, 3] -> cells [N, 3] int64.

    As the paper has it, (2^bits - 1) x is rounded down: the last cell holds the far end alone.
    """
    points = points.double()
    box = torch.stack([points.amin(0), points.amax(0)])  # [2, 3]
    return ((2**bits - 1) * unit_box(points, box)).floor().long()  # [N, 3]


def interleave(axes: Sequence[Tensor], bits: int) -> Tensor:
    """Interleave the bits of three numbers [N]: bit j of number i goes to bit 3j + i."""
    key = torch.zeros_like(axes[0])
    for bit in range(bits):
        for i, axis in enumerate(axes):
            key = key | ((axis >> bit) & 1) << (3 * bit + i)
    return key


def morton(cells: Tensor, bits: int) -> Tensor:
    """Number cells [N, 3] of 0..2^bits-1 in Z-order: keys [N]."""
    return interleave(cells.unbind(1), bits)


def hilbert(cells: Tensor, bits: int) -> Tensor:
    """Number cells [N, 3] of 0..2^bits-1 along the Hilbert curve (Skilling 2004): keys [N].

    With one bit it visits the eight cells, written x y z, so that every step changes one axis:

        000  001  011  010  110  111  101  100

    With more bits it does the same inside each of eight cubes, turned or mirrored so that the last cell
    of a cube touches the first of the next.
    """
    x = list(cells.unbind(1))

    # undo the turns from the coarse level down: where an axis' bit is set the lower bits of the
    # first axis are mirrored, elsewhere they change places with the lower bits of that axis
    for level in range(bits - 1, 0, -1):
        low = (1 << level) - 1
        for axis in range(3):
            is_set = -((x[axis] >> level) & 1)  # all ones or all zeros
            swap = (x[0] ^ x[axis]) & low & ~is_set
            x[axis] = x[axis] ^ swap
            x[0] = x[0] ^ swap ^ (is_set & low)

    # what remains, interleaved, is a Gray code of the key: each bit of the key is the parity of its
    # own and all higher bits
    key = interleave(x[::-1], bits)
    for shift in (1, 2, 4, 8, 16, 32):
        key = key ^ (key >> shift)
    return key


CURVES = {  # name -> (how cells are numbered, axes in the order in which they enter), used from the top. The first
    # axis leads a Hilbert key, the last a Morton key: height leads "z", and turns fastest in
    # "vertical z"
    "z": (morton, (0, 1, 2)),
    "hilbert": (hilbert, (0, 1, 2)),
    "transposed z": (morton, (1, 0, 2)),
    "transposed hilbert": (hilbert, (1, 0, 2)),
    "vertical z": (morton, (2, 0, 1)),
    "vertical hilbert": (hilbert, (2, 0, 1)),
}


def curve_order(points: Tensor, curve: str, bits: int) -> Tensor:
    """Sort points [N, 3] along a curve, those of one cell by x, y, z: their order [N]."""
    number, axes = CURVES[curve]
    key = number(quantize(points, bits)[:, axes], bits)
    ties = points.numpy().T[::-1]
    return torch.from_numpy(np.lexsort((*ties, key.numpy())))  # the last counts first


def canonical_order(points: Tensor) -> Tensor:
    """Sort points [N, 3] by x, y, z, whatever the order of the input: their order [N]."""
    return torch.from_numpy(np.lexsort(points.numpy().T[::-1]))  # the last axis counts first


# ---- 3 FFT context enhancer, Eq. (2), (3), (5) ---------------------------------------------------


def windowed_filter(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply the spectrum of sequences by a gate inside overlapping windows, Eq. (2).

    Six superpoints in windows of L = 4, a new one every L / 2, so that each lies in two of them:

        . . 1 2             Hann weights 0, 1/2, 1, 1/2 before the FFT and after it; what two windows
            1 2 3 4         give to a superpoint is added. With a gate of one, 1 gets 1 + 0 of itself, but
                3 4 5 6     2 gets 1/4 + 1/4: the squares do not add up to a constant. Divided by their
                    5 6 . . sum, such a gate gives the sequence back

    Args: x [C, M, d]; gate [H, L/2 + 1] >= 0, one per head of d / H channels. Returns: [C, M, d].
    """
    M, d = x.shape[1:]
    L = 2 * (gate.shape[1] - 1)
    stride = L // 2

    # cut the windows; `present` says where they hold a token, not padding
    padding = (0, 0, stride, stride + -M % stride)
    window = F.pad(x, padding).unfold(1, L, stride)  # [C, W, d, L]
    present = F.pad(x.new_ones(M, 1), padding).unfold(0, L, stride)  # [W, 1, L]

    # the mean is taken out, and multiplied by the gate of frequency zero by itself: with it in, the zeros of
    # padding would look like a step
    hann = torch.hann_window(L, device=x.device)  # [L]
    gain = gate.repeat_interleave(d // gate.shape[0], 0)  # [d, L/2 + 1]
    mean = window.sum(-1, keepdim=True) / present.sum(-1, keepdim=True)  # [C, W, d, 1]
    spectrum = torch.fft.rfft((window - mean) * (present * hann)) * gain  # [C, W, d, L/2 + 1]
    y = torch.fft.irfft(spectrum, n=L) + mean * gain[:, :1] * hann  # [C, W, d, L]

    # overlap-add: the second half of each window meets the first half of the next
    y = y * (hann / hann.view(2, -1).square().sum(0).repeat(2))  # [C, W, d, L]
    out = y[:, 1:, :, :stride] + y[:, :-1, :, stride:]  # [C, W - 1, d, L/2]
    return out.transpose(2, 3).flatten(1, 2)[:, :M]  # [C, M, d]


def enhance(S: Tensor, orders: Tensor, gate: Tensor) -> Tensor:
    """Add to S [M, d] the mean over curves of the filtered sequences, Eq. (3).

    orders [C, M] are the curves, as permutations of the superpoints: each sequence is put back.
    """
    y = windowed_filter(S[orders], gate)  # [C, M, d]
    total = torch.zeros_like(S).index_add(0, orders.flatten(), y.flatten(0, 1))  # [M, d]
    return S + total / len(orders)  # [M, d]


class Enhancer(nn.Module):
    """The learned gate: softplus(theta) >= 0 per head and frequency, shared by the curves."""

    def __init__(self, heads: int, window: int):
        super().__init__()
        bins = window // 2 + 1
        # low-passes of many widths, from one wave per window to all of them
        cut = (window / 2) ** (torch.arange(heads) / max(1, heads - 1))  # [H]
        gate = 1 / (1 + (torch.arange(bins) / cut[:, None]) ** 2)  # [H, bins]
        self.theta = nn.Parameter(gate.expm1().log().flatten())  # softplus(theta) = gate
        self.heads = heads

    def forward(self, S: Tensor, orders: Tensor) -> Tensor:
        """Spread context over S [M, d] along orders [C, M]: [M, d], always in float32."""
        with torch.autocast(S.device.type, enabled=False):
            gate = F.softplus(self.theta.float()).view(self.heads, -1)  # [H, bins]
            return enhance(S.float(), orders, gate)


# ---- 4 superpoint graph by window voting, Eq. (9)-(11) -------------------------------------------
#
# Points along a curve, each written as its superpoint; windows of one point to either side, with a
# center at every second point:
#
#   A  A  B  B  C    The first center (A) sees A alone; the second (B) sees an A and votes for B-A;
#   ^     ^     ^    the third (C) votes for C-B. Every curve adds its votes: superpoints that touch
#                    along many stretches collect many, and pairs far apart are never looked at.


def vote_graph(
    points: Tensor,
    superpoints: Tensor,
    curves: Sequence[str],
    window: int,
    stride: int,
    bits: int = 16,
) -> tuple[Tensor, Tensor]:
    """Count how often points of two superpoints meet in a window along a curve.

    Every `stride`-th point is a center and votes for the superpoint of each of the window / 2
    points before and after it, if that is another one: O(C N window / stride) in time and memory, plus sorting.

    Args: points [N, 3]; superpoints [N] of 0..M-1. Returns: pairs from -> to [E, 2], votes [E].
    """
    M = int(superpoints.max()) + 1

    # the windows, as places in the sequence, are the same for all curves
    center = torch.arange(0, len(points), stride)
    near = center[:, None] + torch.arange(-(window // 2), window // 2 + 1)
    inside = (near >= 0) & (near < len(points))
    near = near.clamp(0, len(points) - 1)

    # a vote is one number, from * M + to, so that equal votes can be counted
    votes = []
    for curve in curves:
        label = superpoints[curve_order(points, curve, bits)]
        source, target = label[center][:, None], label[near]
        votes.append((source * M + target)[inside & (source != target)])
    pair, count = torch.cat(votes).unique(return_counts=True)
    return torch.stack([pair // M, pair % M], 1), count


def nearest_edges(pairs: Tensor, votes: Tensor, centers: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Keep each superpoint's k nearest candidates, of equals those with more votes.

    Args: pairs [E, 2], votes [E], centers [M, 3]. Returns: the graph, made symmetric by the larger
    vote: edges [E', 2], both ways and sorted, votes [E'].
    """
    from scipy.sparse import coo_array

    # the candidates of a superpoint in a row, the best first: where one stands is its rank
    distance = (centers[pairs[:, 0]] - centers[pairs[:, 1]]).square().sum(1)
    order = torch.from_numpy(np.lexsort((-votes, distance, pairs[:, 0])))
    source = pairs[order, 0]
    rank = torch.arange(len(source)) - torch.searchsorted(source, source)
    kept = order[rank < k]

    # an edge stays if either end keeps it
    M = len(centers)
    graph = coo_array((votes[kept].numpy(), pairs[kept].numpy().T), (M, M)).tocsr()
    graph = graph.maximum(graph.T).tocoo()
    return torch.from_numpy(np.stack(graph.coords, 1)), torch.from_numpy(graph.data)


# ---- 5 token merging -----------------------------------------------------------------------------


def choose_seeds(points: Tensor, superpoints: Tensor, edges: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Choose the superpoints that become tokens, spread over the scene; none beside a seed while others are left.

    Args: points [N, 3]; superpoints [N] of 0..M-1; edges [E, 2] both ways.
    Returns: seeds [T] and their positions [T, 3], T = min(count, M).
    """
    anchor = data.farthest_point_sampling(points, count)
    seed = superpoints[anchor]

    # then all others, the largest first; neighbors of seeds come last, since their size is made negative
    size = torch.bincount(superpoints)
    size[edges[torch.isin(edges[:, 0], seed), 1]] -= len(points)
    rest = size.argsort(descending=True, stable=True)

    # of a superpoint that comes twice only the first stays: what farthest points repeat, the others replace
    seed = torch.cat([seed, rest])
    point = torch.cat([anchor, nearest_to_center(points, superpoints)[rest]])
    first = np.sort(np.unique(seed, return_index=True)[1])[:count]
    return seed[first], points[point[first]]


def nearest_to_center(points: Tensor, owner: Tensor) -> Tensor:
    """Find each superpoint's point nearest its mean, of equals the first: indices [M]."""
    distance = (points - superpoint_mean(points, owner)[owner]).square().sum(1)
    order = np.lexsort((distance, owner))
    first = np.unique(owner[order], return_index=True)[1]
    return torch.from_numpy(order[first])


def edge_weight(S: Tensor, a: Tensor, b: Tensor, strength: Tensor) -> Tensor:
    """Weigh edges between a [E] and b [E] by likeness and votes: max(0, cos(S_a, S_b)) * strength."""
    unit = F.normalize(S, dim=-1)  # [M, d]
    return (unit[a] * unit[b]).sum(-1).clamp(min=0) * strength  # [E]


def graph_pool(S: Tensor, seed: Tensor, token: Tensor, member: Tensor, strength: Tensor) -> Tensor:
    """Merge every seed with its neighbors: a mean, weighted 1 for the seed, else by `edge_weight`.

    Args: S [M, d]; seed [T]; of every edge at a seed: its token [E] of 0..T-1, its other end
    member [E], strength [E] = log(1 + votes) / log(1 + most votes). Returns: z [T, d].
    """
    weight = edge_weight(S, seed[token], member, strength)  # [E]
    total = torch.ones_like(S[seed, 0]).index_add(0, token, weight)  # [T]
    return S[seed].index_add(0, token, weight[:, None] * S[member]) / total[:, None]  # [T, d]


def word_norm(width: int, scale: float) -> nn.LayerNorm:
    """Make the norm that ends whatever becomes a token: at first of the size of word vectors."""
    norm = nn.LayerNorm(width, bias=False)
    nn.init.constant_(norm.weight, scale)
    return norm


class Merger(nn.Module):
    """phi(LayerNorm(z)), then the MLP adapter to the LLM's width."""

    def __init__(self, dim: int, width: int, scale: float):
        super().__init__()
        self.phi = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))
        self.adapter = nn.Sequential(
            nn.GELU(),
            nn.Linear(dim, dim),
            nn.GELU(),
            nn.Linear(dim, width),
            word_norm(width, scale),
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Project pooled z [T, d]: z' [T, d] for coordinate tokens, and tokens [T, D]."""
        z_prime = self.phi(z)  # [T, d]
        return z_prime, self.adapter(z_prime)  # [T, d], [T, D]


# ---- 6 positions and the coordinate token --------------------------------------------------------


class CoordinateToken(nn.Module):
    """A click or a box's center: MLP([code(c); mean over its nearest tokens of z + code(offset)])."""

    def __init__(self, dim: int, width: int, scale: float):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * dim, dim),
            nn.GELU(),
            nn.Linear(dim, width),
            word_norm(width, scale),
        )

    def forward(self, c: Tensor, box: Tensor, z: Tensor, places: Tensor, k: int) -> Tensor:
        """Encode positions c [P, 3] in one scene, each with its k nearest tokens: [P, D].

        box [2, 3] low and high corner of the cloud; z [T, d] merged tokens, after phi, at places [T, 3] meters.
        """
        d = z.shape[1]
        # the nearest tokens, each with the code of where it lies as seen from c
        distance = (places - c[:, None]).square().sum(-1)  # [P, T]
        near = distance.topk(min(k, len(places)), largest=False).indices  # [P, k]
        here = unit_box(c, box)  # [P, 3]
        offset = unit_box(places, box)[near] - here[:, None]  # [P, k, 3]
        around = (z[near] + fourier_code(offset, d)).mean(1)  # [P, d]
        return self.mlp(torch.cat([fourier_code(here, d), around], dim=-1))  # [P, D]


# ---- 7 the frozen language model: Fourier filter and dLoRA ---------------------------------------
#
# Both act on the tokens of one kind. `token_index` is one dictionary for all layers: kind -> indices [n] of
# the tokens of that kind among all tokens of a batch in a row. It is filled before every pass and kept until the next:
# gradient checkpointing runs the layers again during the backward pass and must find it.


def global_filter(z: Tensor, gain: Tensor) -> Tensor:
    """Filter tokens z [n, D] along their channels, head by head: (z + iFFT(FFT(z) * G)) / 2.

    Each token alone: neighbors in the sequence are not mixed, as GFNet's filter over an image would.

    gain [H, w] for H heads of w = D / H channels; 1 = the identity. A real signal's spectrum is
    symmetric: the gains of +k and -k act as their mean, and half of the spectrum is enough.
    """
    w = gain.shape[1]
    symmetric = (gain + gain.flip(-1).roll(1, -1)) / 2  # [H, w]
    x = z.float().unflatten(-1, gain.shape)  # [n, H, w]
    spectrum = torch.fft.rfft(x) * symmetric[:, : w // 2 + 1]  # [n, H, w/2 + 1]
    mixed = torch.fft.irfft(spectrum, n=w)  # [n, H, w]
    return ((x + mixed) / 2).flatten(-2).to(z)  # [n, D]


class FourierFilter(nn.Module):
    """The global filter in front of an FFN, for tokens of some kinds."""

    def __init__(self, width: int, heads: int, kinds: set[str], token_index: dict):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.heads = heads
        self.kinds = kinds
        self.token_index = token_index

    def forward(self, x: Tensor) -> Tensor:
        """Filter the tokens x [..., D] of these kinds, and leave the others: [..., D]."""
        rows = x.flatten(0, -2)
        gain = self.gain.float().view(self.heads, -1)  # [H, w]
        for kind in self.kinds:
            index = self.token_index[kind]
            if len(index):  # there is no FFT of nothing
                rows = rows.index_copy(0, index, global_filter(rows[index], gain))
        return rows.view(x.shape)


class DecoupledLoRA(nn.Module):
    """A frozen linear map and low-rank ones beside it, by kind of token: W x + alpha / rank * B A x."""

    def __init__(self, base: nn.Linear, route: dict[str, str], scale: float, token_index: dict):
        super().__init__()
        self.base = base
        self.route = route  # kind of token -> name of its pair (A, B)
        self.scale = scale
        self.token_index = token_index
        self.lora = nn.ModuleDict()

    def add(self, name: str, rank: int):
        """Draw a pair (A, B), and keep it if a kind of token is routed to it.

        B = 0: training starts from the frozen map.
        """
        down = nn.Linear(self.base.in_features, rank, bias=False)
        up = nn.Linear(rank, self.base.out_features, bias=False)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        if name in self.route.values():
            self.lora[name] = nn.Sequential(down, up)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens x [..., in] to [..., out]."""
        out = self.base(x)
        rows = x.flatten(0, -2)
        flat = out.flatten(0, -2)
        for kind, name in self.route.items():
            index = self.token_index[kind]
            pair = self.lora[name]
            delta = pair(rows[index].to(pair[0].weight)) * self.scale  # [n, out]
            flat = flat.index_add(0, index, delta.to(flat))
        return flat.view(out.shape)


FFN = {"gate_proj", "up_proj", "down_proj", "fc1", "fc2"}  # linear maps of Qwen2 and Llama; of OPT


def adapt(llm: nn.Module, config: Config, token_index: dict):
    """Put dLoRA into the first FFNs of a language model, and a Fourier filter in front of each.

    Raises DataError where the model has fewer layers, or no FFN that is known.
    """
    blocks = next((m for name, m in llm.named_modules() if name.endswith("layers")), ())
    if config.adapted_layers > len(blocks):
        raise DataError(f"adapted_layers = {config.adapted_layers}; the llm has {len(blocks)}")

    adapted, names = [], ADAPTERS[config.adapters]
    for depth, block in enumerate(blocks[: config.adapted_layers], start=1):
        # nothing reads vision tokens behind the last layer: what serves them there cannot learn
        route, kinds = dict(names), set(FILTERS[config.filter])
        if depth == len(blocks):
            route.pop("vision", None)
            kinds.discard("vision")

        # every linear map of the FFN gets its pairs, and the FFN as a whole its filter
        for name, module in list(block.named_modules()):
            if name.rpartition(".")[2] in FFN:
                layer = DecoupledLoRA(module, route, config.alpha / config.rank, token_index)
                block.set_submodule(name, layer)
                adapted.append(layer)
        entry = "mlp" if hasattr(block, "mlp") else "fc1"
        own = FourierFilter(llm.config.hidden_size, config.filter_heads, kinds, token_index)
        setattr(block, entry, nn.Sequential(own, getattr(block, entry)))
    if config.adapted_layers and not adapted:
        raise DataError(f"{type(llm).__name__}: its FFN has none of {', '.join(sorted(FFN))}")

    # one kind of pair after the other, through all layers: a kind that is left out changes no draw before it
    for name in dict.fromkeys(names.values()):
        for layer in adapted:
            layer.add(name, config.rank)


# ---- 8 the model ---------------------------------------------------------------------------------


class Model(SceneLanguageModel):
    """Fase3D around a pre-trained causal language model. See the file's docstring for shapes."""

    scene_inputs = ("tokens",)

    def __init__(self, config: Config, text: data.TinyText | data.HubText):
        super().__init__(config, text)
        check(config)
        self.llm = self.load_llm()
        D = self.llm.config.hidden_size
        if D % config.filter_heads:
            raise DataError(f"filter_heads = {config.filter_heads} does not divide the llm's width {D}")
        self.token_index = {}
        adapt(self.llm, config, self.token_index)

        # what is new starts at the size of word vectors: attention does not find smaller tokens
        words = self.llm.get_input_embeddings().weight.detach().float()
        scale = float(words.square().mean().sqrt())
        self.initial = Initial(3 * config.color + 3 * config.normals, config.hidden, config.dim)
        self.enhancer = Enhancer(config.heads, config.window)
        self.merger = Merger(config.dim, D, scale)
        self.place = nn.Linear(36, D, bias=False)  # of 3 axes x 6 waves x (cos, sin): their squares sum to 18
        nn.init.normal_(self.place.weight, std=scale / math.sqrt(18))
        self.coordinate = CoordinateToken(config.dim, D, scale)
        self.qformer = None
        if config.selector == "qformer":
            self.qformer = make_qformer(config.dim, config.heads)

        # a checkpoint need not repeat what `llm` names
        if config.llm is not None and config.adapters != "full":
            self.frozen_pretrained_names = tuple(self.pretrained())

    def load_llm(self):
        """Load the language model that the Config names."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            self.config.llm,
            dtype=self.config.dtype,
            attn_implementation="sdpa",  # packed questions need a mask of their own, which it takes
        )

    # -- what trains

    def pretrained(self) -> dict[str, nn.Parameter]:
        """List the language model's own weights by name; a tied weight has two."""
        named = self.llm.named_parameters("llm", remove_duplicate=False)
        return {n: p for n, p in named if ".lora." not in n and not n.endswith(".gain")}

    def parts(self):
        """Name what a stage may train."""
        # a switched-off part has no gradient, so it must not count as trained
        tokenizer = [self.initial, self.merger]
        if self.config.enhancer:
            tokenizer.append(self.enhancer)
        if self.qformer:
            tokenizer.append(self.qformer)

        # in the language model: its own weights, or what was put beside them
        llm = list(self.pretrained().values())
        layers = list(self.llm.modules())
        lora = [m.lora for m in layers if isinstance(m, DecoupledLoRA)]
        return {
            "tokenizer": tokenizer,
            "place": [self.place],
            "prompt": [self.coordinate],
            "adapters": llm if self.config.adapters == "full" else lora,
            "filter": [m.gain for m in layers if isinstance(m, FourierFilter) and m.kinds],
            "lm": llm,
        }

    # -- geometry of a scene: computed once, cached

    def feature_settings(self):
        """Name all settings, more than geometry needs: a run's settings never change, so that costs nothing."""
        return tuple(vars(self.config).items())

    def compute_features(self, scene):
        """Work out what follows from the points alone.

        Returns: "index" [N], which points are used; "owner" [N], their superpoint; "orders" [C, M],
        the curves; "edges" [E, 2] and "edge_strength" [E], the graph; "seed" [T] and "place" [T, 3]
        meters; and of the edges at seeds "token", "member", "strength", as `graph_pool` takes them.
        """
        c = self.config
        if scene.points is None or not len(scene.points):
            raise DataError(f"{scene.name}: Fase3D needs points; this source has none")
        if scene.superpoints is None and c.superpoint:
            raise DataError(f"{scene.name}: no superpoints; make them with data.over_segment")

        # draw from the sorted points: neither their order nor turning matters, since @ turn undoes @ turn.T
        points = torch.from_numpy(scene.points @ scene.turn).float()
        rng = np.random.default_rng(len(points))
        drawn = rng.choice(len(points), min(c.points, len(points)), replace=False)
        index = canonical_order(points)[np.sort(drawn)]
        points = points[index]

        # number superpoints by place, not by name
        label = torch.arange(len(index))
        if c.superpoint:
            label = torch.from_numpy(scene.superpoints)[index].unique(return_inverse=True)[1]
        centers = superpoint_mean(points, label)
        order = canonical_order(centers)
        centers, owner = centers[order], order.argsort()[label]

        # curves, and the graph by voting along them
        curves = list(CURVES)[: c.curves]
        orders = torch.stack([curve_order(centers, name, c.bits) for name in curves])
        pairs, votes = vote_graph(points, owner, curves, c.vote_window, c.vote_stride)
        edges, votes = nearest_edges(pairs, votes, centers, c.edges)
        edge_strength = votes.float().log1p() / math.log1p(max(votes.tolist(), default=1))

        # seeds in the order of a Hilbert curve, which the LLM's positions then follow
        seed, place = SELECTORS[c.selector](points, owner, edges, c.tokens)
        order = curve_order(place, "hilbert", c.bits)
        seed = seed[order]

        # which edges start at which seed; farthest points are not merged with anything
        edge, token = (edges[:, :1] == seed).nonzero().unbind(1)
        if c.selector == "fps":
            edge, token = edge[:0], token[:0]

        whole = dict(index=index, owner=owner, orders=orders, edges=edges, seed=seed, token=token)
        found = {key: value.int() for key, value in whole.items()}
        found["member"] = found["edges"][edge, 1]
        found["strength"] = edge_strength[edge]
        found["edge_strength"] = edge_strength
        found["place"] = place[order]
        return found

    # -- scenes to tokens

    def point_features(self, scene: Scene, index: np.ndarray) -> Tensor:
        """Give color and normals of the points `index`, in -1..1: [N, channels]; 0 = no color."""
        config, parts = self.config, []
        if config.color:
            if scene.colors is None and not config.no_color:
                raise DataError(
                    f"{scene.name}: the cloud has no color and this model never saw such; "
                    "train with --set color=false or no_color=0.1"
                )
            # in training a share of the scenes hides it, drawn from their identifiers
            draw = np.random.default_rng([7, *scene.identifiers.values()]).random()
            hidden = scene.colors is None or (self.training and draw < config.no_color)
            parts.append(np.zeros((len(index), 3)) if hidden else scene.colors[index] / 127.5 - 1)

        if config.normals:
            parts.append(scene.normals[index])  # every reader of clouds finds them
        return torch.from_numpy(np.concatenate(parts, 1)).float()

    def superpoint_features(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """Compute a scene's superpoints in context S [M, d], and the box [2, 3] of its points."""
        found = self.load_features(scene)
        index = found["index"].numpy()
        points = torch.from_numpy(scene.points[index]).to(self.device)  # [N, 3]
        box = torch.stack([points.amin(0), points.amax(0)])  # [2, 3]
        features = self.point_features(scene, index).to(self.device)  # [N, channels]
        owner = found["owner"].to(self.device)  # [N]
        S = self.initial(features, unit_box(points, box), owner, found["orders"].shape[1])  # [M, d]
        if self.config.enhancer:
            S = self.enhancer(S, found["orders"].to(self.device))  # [M, d]
        return S, box

    def scene_tokens(self, scene: Scene) -> dict[str, Tensor]:
        """Merge a scene's superpoints: {"tokens" [T, D] without place, "z" [T, d], "box" [2, 3]}."""
        S, box = self.superpoint_features(scene)
        found = self.load_features(scene)
        keys = ("seed", "token", "member", "strength")
        seed, *graph = [found[key].to(S.device) for key in keys]
        z = self.qformer(S[seed], S) if self.qformer else graph_pool(S, seed, *graph)  # [T, d]
        z, tokens = self.merger(z)  # [T, d], [T, D]
        return {"tokens": tokens, "z": z, "box": box}

    def token_centers(self, scene):
        """Say where the scene's tokens are, turned with it: [T, 3] meters."""
        return self.load_features(scene)["place"].numpy() @ scene.turn.T.astype(np.float32)

    def scene_length(self, scene):
        """Say how many tokens the scene takes."""
        return len(self.load_features(scene)["seed"])

    def encode(self, scenes):
        """Encode scenes: "tokens" [B, T, D], "valid" [B, T], "places" [B, T, 3], "z" [B, T, d], "box" [B, 2, 3]."""
        found = []
        for scene in scenes:
            own = self.scene_tokens(scene)
            own["places"] = torch.from_numpy(self.token_centers(scene)).to(self.device)
            own["tokens"] = own["tokens"] + self.place(data.fourier_waves(own["places"]))
            own["valid"] = torch.ones_like(own["places"][:, 0], dtype=torch.bool)
            found.append(own)
        return {key: pad_sequence([f[key] for f in found], batch_first=True) for key in found[0]}

    # -- questions

    def object_to_text(self, scene, object_id):
        """Name an object in a question: its coordinate token stands in front of the text."""
        return "this"

    def refusal(self, scene, question):
        """Say why a question cannot be answered about a scene of one's own, or None."""
        words = set(question.lower().replace("?", " ").split())
        about_color = words & {"color", "colour", *data.COLORS}
        return "this cloud has no color." if about_color and scene.colors is None else None

    def add_prompt(self, scene, sample, rng):
        """Give a question about a marked object its box, or in training sometimes a click on it."""
        marks = data.MARK.findall(sample.question)
        if sample.prompt is not None or not marks:
            return sample
        if len(set(marks)) > 1:
            raise DataError(
                f"{sample.task}: {sample.question!r} points at two things; Fase3D has one "
                "coordinate token per question"
            )
        marked = scene.thing(int(marks[0]))

        # half of the time, one of the object's points
        if self.training and scene.instances is not None and rng.random() < 0.5:
            mine = scene.points[scene.instances == marked.id]
            if len(mine):
                click = mine[int(rng.random() * len(mine))]
                return replace(sample, prompt=click.astype(float))
        return replace(sample, prompt=marked.box)

    def prompt_tokens(self, batch, seen):
        """Encode the click or box of every question that has one: [P, D]."""
        centers = batch["prompts"][:, :3].to(self.device)  # [P, 3]
        counts = (batch["ids"] == PROMPT).sum(1).tolist()
        tokens = []
        for b, c in enumerate(centers.split(counts)):
            T = self.scene_length(batch["scenes"][b])
            z, places = seen["z"][b, :T], seen["places"][b, :T]
            near = self.coordinate(c, seen["box"][b], z, places, self.config.prompt_neighbors)
            tokens.append(self.place(data.fourier_waves(c)) + near)
        return torch.cat(tokens)

    def run_decoder(self, embeds, is_scene, positions, mask, cache=None):
        """Run the language model; scene and coordinate tokens are vision, all others text."""
        vision = is_scene.flatten()
        if is_scene.shape[1] == 1:  # the next token of every answer is text: nothing to look up
            text = torch.arange(len(vision), device=self.device)
            self.token_index.update(vision=text[:0], text=text)
        else:
            self.token_index.update(vision=vision.nonzero()[:, 0], text=(~vision).nonzero()[:, 0])
        return super().run_decoder(embeds, is_scene, positions, mask, cache)

    # -- dense captioning without given boxes, and pictures

    @torch.no_grad()
    def propose(self, scene: Scene, count: int = 48) -> Scene:
        """Give the scene spectral clusters of its superpoint graph for objects."""
        # edges count as in graph pooling
        found = self.load_features(scene)
        index, edges = found["index"].numpy(), found["edges"]
        S = self.superpoint_features(scene)[0].cpu()
        weight = edge_weight(S, *edges.T, found["edge_strength"])
        label = spectral_clusters(edges.numpy(), weight.numpy(), len(S), count)
        label = label[found["owner"].numpy()]

        # points that were not drawn belong to none
        instances = np.zeros(len(scene.points), np.int64)
        instances[index] = label + 1
        what = "spectral clusters of the superpoint graph"
        return data.with_instances(replace(scene, frames=None), instances, None, what)

    def proposals(self):
        """Name what `evaluate.py --proposals` may use besides its own."""
        return {"clusters": self.propose}

    def pictures(self, scenes, folder):
        """Draw the curves, and the superpoint graph with its seeds, too."""
        paths = super().pictures(scenes, folder)
        for scene in scenes:
            # superpoints as the scene is turned now
            found = self.load_features(scene)
            points = torch.from_numpy(scene.points)[found["index"]]
            centers = superpoint_mean(points, found["owner"])
            paths += [folder / f"{data.safe_name(scene.name)}_{what}.png" for what in ("curves", "graph")]
            draw_curves(centers, found["orders"], paths[-2])
            draw_graph(scene, centers, found, paths[-1])
        return paths


def check(config: Config):
    """Raise DataError, which names what is known, for settings that do not exist."""
    tables = dict(selector=SELECTORS, adapters=ADAPTERS, filter=FILTERS, task=TUNED)
    for key, table in tables.items():
        data.choose(table, vars(config)[key], key)
    if not 1 <= config.curves <= len(CURVES):
        raise DataError(f"curves = {config.curves}; give 1 to {len(CURVES)}")
    if config.dim % 6 or config.dim % config.heads:
        raise DataError(f"dim = {config.dim}; give a multiple of 6 and of heads = {config.heads}")


def spectral_clusters(edges: np.ndarray, weight: np.ndarray, nodes: int, count: int) -> np.ndarray:
    """Cluster a weighted graph (Ng, Jordan and Weiss 2001): labels [nodes] in 0..count-1.

    k-means on the rows of the `count` eigenvectors of the normalized Laplacian with the least eigenvalues.

    Args: edges [E, 2], both ways; weight [E] >= 0.
    """
    from scipy.cluster.vq import kmeans2
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import laplacian
    from scipy.sparse.linalg import eigsh

    few = min(count, nodes - 2)  # the sparse solver finds fewer eigenvectors than there are nodes
    if few < 1 or not weight.any():
        return np.arange(nodes) % count

    # smooth vectors on the graph, from a fixed start: the same clusters every time
    graph = coo_array((weight.astype(float), edges.T), (nodes, nodes)).tocsr()
    start = np.random.default_rng(0).random(nodes)
    _, rows = eigsh(laplacian(graph, normed=True), k=few, which="SA", v0=start, tol=1e-3)

    # nodes of one cluster have rows of one direction
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-9)
    return kmeans2(rows, few, minit="++", rng=np.random.default_rng(0))[1]


# ---- 9 the paper's recipe ------------------------------------------------------------------------

TASKS = {}  # no question types beyond data.TASKS
UNLABELLED = ("id_color", "exist", "count")  # what stands in for questions that need names

QA = {"color": 0.2, "what": 0.2, "where": 0.12, "count": 0.12, "exist": 0.16, "situated": 0.04}
CAPTION = {"caption": 1.0}
NAME = {"id_category": 0.5, "id_color": 0.5}  # "what is this?" with a click: a caption in short
GENERALIST = {  # official files of stage 1, and how many questions are expected in them: of 3D-LLM as many as
    # the paper counts, which include descriptions of validation rooms (`evaluate.mixture` leaves those out); of
    # the others the size of their training split
    "3D-LLM descriptions": Source("3dllm/description", 1033, splits=("train", "val")),
    "3D-LLM planning": Source("3dllm/planning", 1864),
    "3D-LLM dialogue": Source("3dllm/dialogue", 2955),
    "ScanQA": Source("scanqa", 25_563),
    "SQA3D": Source("sqa3d", 26_623),
    "ScanRefer": Source("scan2cap", 36_665),
    "Nr3D": Source("nr3d/caption", 32_919),
}


def mixture(*parts: tuple[float, dict[str, float]]) -> dict[str, float]:
    """Join question mixes by their shares."""
    joined = {}
    for share, mix in parts:
        for task, weight in mix.items():
            joined[task] = share * weight / sum(mix.values())
    return joined


TUNED = {  # what stage 2 tunes for: generated questions, and the official files in their place
    "qa": (QA, ["ScanQA", "SQA3D"]),
    "scanqa": (QA, ["ScanQA"]),  # the paper's ablations
    "sqa3d": (QA, ["SQA3D"]),
    "caption": (CAPTION, ["ScanRefer", "Nr3D"]),
    "all": (mixture((0.7, QA), (0.2, CAPTION), (0.1, NAME)), list(GENERALIST)),
}
PARTS = ("tokenizer", "place", "prompt", "adapters", "filter")
SCHEDULE = dict(batch=8, per_scene=1, lr=1e-4, final_lr=1e-6, weight_decay=0.1, clip=0.1)
STAGES = {
    "paper": [  # sec. 4.1: AdamW, cosine from 1e-4 to 1e-6; `recipe` says what stage 2 asks
        Stage(
            "1 generalist",
            mixture((0.6, QA), (0.4, CAPTION)),
            PARTS,
            "tokens",
            iterations=100_000,
            files=GENERALIST,
            **SCHEDULE,
        ),
        Stage(
            "2 task", {}, PARTS, "tokens", iterations=30_000, **SCHEDULE
        ),  # {}: `recipe` puts in what it asks
    ],
}


def recipe(config: Config, stages: list[Stage]) -> list[Stage]:
    """Fit a preset's stages: no generalist without `pretrain`; the last one asks for `task`."""
    kept = [s for s in stages if config.pretrain or s.name != "1 generalist"]
    tasks, names = TUNED[config.task]
    files = {name: GENERALIST[name] for name in names}
    kept[-1] = replace(kept[-1], tasks=tasks, files=files)
    return kept


# ---- 10 alternatives the paper compares with -----------------------------------------------------


def farthest_seeds(points: Tensor, superpoints: Tensor, edges: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Choose superpoints whose centers lie farthest apart; arguments as of `choose_seeds`."""
    centers = superpoint_mean(points, superpoints)
    seed = data.farthest_point_sampling(centers, count)
    return seed, centers[seed]


def make_qformer(dim: int, heads: int) -> nn.Module:
    """Make a layer of attention among tokens and to all superpoints, in place of graph pooling.

    Its queries start from the seeds' superpoints: tokens of free queries would have no place in the
    scene, and the coordinate token no nearest ones.
    """
    how = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    return nn.TransformerDecoderLayer(dim, heads, 2 * dim, **how)


SELECTORS = {  # Table E: how seeds are chosen
    "graph": choose_seeds,  # and merged with their neighbors in the graph
    "fps": farthest_seeds,  # and not merged
    "qformer": choose_seeds,  # and merged by attention
}
ADAPTERS = {  # Table 4: kind of token -> its low-rank pair
    "none": {},
    "vision": {"vision": "vision"},
    "text": {"text": "text"},
    "shared": {"vision": "shared", "text": "shared"},
    "decoupled": {"vision": "vision", "text": "text"},
    "full": {},  # the language model itself trains with the adapters' stages
}
FILTERS = {"none": (), "vision": ["vision"], "both": ["vision", "text"]}  # Table 4: kinds of token


# ---- 11 figures ----------------------------------------------------------------------------------


def draw_curves(centers, orders, path):
    """Draw superpoints centers [M, 3] in line along each curve of orders [C, M], from above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(orders), 5), layout="constrained")
    axes = figure.subplots(1, len(orders), squeeze=False)[0]
    for axis, order, name in zip(axes, orders, CURVES, strict=False):
        x, y = centers[order, :2].T
        axis.plot(x, y, color="0.6", lw=0.8)
        axis.scatter(x, y, c=range(len(x)), s=10, cmap="turbo")
        axis.set(title=f"curve {name!r}: blue comes first, red last", aspect="equal")
    data.save_figure(figure, path)


def draw_graph(scene, centers, found, path):
    """Draw the superpoint graph: edges darker the more votes they have, rings around the seeds."""
    from matplotlib.collections import LineCollection

    figure, (top, _) = data.scene_figure(scene, f"{scene.name}: superpoint graph, ringed seeds")
    lines = centers[found["edges"], :2].numpy()
    top.add_collection(LineCollection(lines, array=found["edge_strength"], cmap="Greys", lw=0.8))
    top.scatter(*centers[:, :2].T, s=8, color="black")
    top.scatter(
        *centers[found["seed"], :2].T,
        s=50,
        facecolors="none",
        edgecolors="black",
        zorder=4,
    )
    data.save_figure(figure, path)


# ---- 12 demo -------------------------------------------------------------------------------------


def demo():
    """Show one room from points to tokens, with real shapes, and learn its questions by heart."""
    torch.manual_seed(0)
    scene = data.room(1, views=0)
    scene.identifiers = data.number_objects(scene, np.random.default_rng(0))
    model = TinyModel(Config.tiny(no_color=0.0), data.TinyText(data.vocabulary()))
    tasks = TUNED["all"][0]
    model.configure_stage(Stage("demo", tasks, PARTS, "tokens"))

    # from points to tokens
    with torch.no_grad():
        S, _ = model.superpoint_features(scene)
        found = model.load_features(scene) | model.scene_tokens(scene)
    print(f"points [N, 3]         {list(scene.points.shape)}")
    print(f"superpoints S [M, d]  {list(S.shape)}")
    print(f"curves [C, M]         {list(found['orders'].shape)}")
    print(f"graph, edges [E, 2]   {list(found['edges'].shape)}")
    print(f"merged z' [T, d]      {list(found['z'].shape)}")
    print(f"tokens [T, D]         {list(found['tokens'].shape)}")

    # from tokens to answers
    samples = data.questions(scene, tasks, 24, np.random.default_rng(1))
    data.overfit_demo(model, scene, samples, steps=60, lr=3e-3)


# ==== tiny preset: trains from nothing on a CPU; not in the paper, skip on a first reading ====
#
# Its language model was trained on rooms described in words (data.Reader) and is frozen for good. First a
# token learns to name what its seed lies on ("tokenizer"); then come the paper's two stages.


class TinyModel(Model):
    """Fase3D around the small language model that has read rooms in words."""

    scene_inputs = ("tokenizer", "tokens")
    from_nothing = True

    def load_llm(self):
        return data.tiny_llm(len(self.text), self.config.reader)

    def start_from(self, reader):
        """Copy the language model and its map of places."""
        # adapters stand around its linear maps, which changed their names
        plain = {n: n.replace(".mlp.1.", ".mlp.").replace(".base.", ".") for n in data.named_weights(self)}
        own = {name: reader[there] for name, there in plain.items() if there in reader}
        super().start_from(own | {"place.weight": reader["code.weight"][:, :36]})

    def compute_features(self, scene):
        """Add which object most points of a seed's superpoint lie on: "shows" [T], 0 = none."""
        found = super().compute_features(scene)
        shows = torch.zeros_like(found["seed"])
        if scene.instances is not None:
            instance = torch.from_numpy(scene.instances)[found["index"]]
            owner = found["owner"].long()
            shows = data.most_frequent(instance, owner, int(owner.max()) + 1)[found["seed"]]
        return found | {"shows": shows}

    def encoder_loss(self, scenes):
        """Let every token name what its seed lies on, in the LLM's word vectors; walls are <unk>."""
        tokens, pairs = [], []
        for scene in scenes:
            tokens.append(self.scene_tokens(scene)["tokens"])
            named = {o.id: data.name_pair(self.text, o.category, o.color) for o in scene.objects}
            nothing = data.name_pair(self.text)
            pairs += [named.get(i, nothing) for i in self.load_features(scene)["shows"].tolist()]

        # walls are many
        pairs = torch.tensor(pairs, device=self.device)  # [T, 2]
        weight = torch.where(pairs[:, 0] == self.text.unk, 0.2, 1.0)  # [T]
        return self.naming_loss(torch.cat(tokens), pairs, weight)


ALL = mixture((0.6, QA), (0.15, CAPTION), (0.25, NAME))
TINY = dict(lr=2e-3, weight_decay=0.01, batch=256, per_scene=32, reasoning=True)
STAGES["tiny"] = [
    Stage(
        "0 tokenizer",
        {},
        ("tokenizer",),
        "tokenizer",
        iterations=400,
        batch=16,
        lr=8e-3,
        warmup=0.05,
    ),
    Stage(
        "1 generalist",
        ALL,
        PARTS,
        "tokens",
        iterations=500,
        files=GENERALIST,
        **TINY,
        schedule="constant",
    ),
    Stage("2 task", {}, PARTS, "tokens", iterations=300, **TINY, schedule="linear"),
]


def build(config, text):
    """Make the model that a configuration describes."""
    return TinyModel(config, text) if config.llm is None else Model(config, text)


if __name__ == "__main__":
    data.run_demo(demo)
