"""Proxy3D: Efficient 3D Representations for Vision-Language Models via Semantic Clustering and Alignment.

CVPR 2026, arXiv 2605.08064. Supplementary Tables 1 and 2 give the recipe; equation numbers are the paper's.

Idea. A video of a room is ten thousands of image patches, but only a few dozen objects. Lift every patch
to 3D, group the patches by the object they show, summarize each group by a few *proxies* (mean feature, mean
position), and give the language model those few hundred tokens instead of all patches. Every object of a scene
has an *id*, its label in the masks, and an *identifier* 0..99, drawn anew each time, which text writes as
"<OBJ012>". An object's proxies carry it as the picture of its digits, encoded by the same vision tower: on the
scene's side no embedding table is learned.

  frames [V,H,W,3] --tower (frozen)--> features [V,h,w,C] --.
  depth or VGGT ---------------------> points  [V,H,W,3] ---+-> triplets f [L,C], p [L,3], m [L], L <= V h w
  masks or SAM 2 --------------------> masks   [V,H,W] -----'        |
                                                     group by m, allocate K, cluster on p       (1) (2) (3)
                                                                     v
  z [K,C], c [K,3], group [K] --> BFS order --> R(c_height) z + F(c_horizontal) + f_id[identifier]  (5) (4)
                                                                     v
                                                           language model --> text                      (6)

Axes: V frames, H W pixels, h w patches (one per merged token of the tower), L triplets, G groups, K proxies,
C = D width (of the tower's tokens, so of the language model), T text, n objects, R pieces and symbols of stage 0,
E width of the tiny tower. In Eq. (4) R is a rotation and F a network; the paper's c^H and c^WxL are a proxy's
height and its place on the floor, not pixels.

| paper                                  | here                                          |
| sec. 3.1 patch triplets                | patch_triplets                                |
| (1) groups of patches by object        | cluster                                       |
| (2) clusters and their centers         | farthest_seeds, seeds_together; means: c      |
| (3) proxies, the means of clusters     | make_proxies                                  |
| allocation K_g ~ |G_g| / L             | allocate                                      |
| (5) BFS serialization                  | bfs_order                                     |
| (4) z' = R(c^H) z + F(c^WxL)           | rotate_height, HorizontalFourier, Model.encode |
| G_sem, G_id (symbol images)            | draw_category, draw_identifier, Model.symbols  |
| (6) next-token loss on answers         | data.SceneLanguageModel.forward               |
| supp. Table 1, four stages             | STAGES                                        |
| supp. Table 2, SpaceSpan-318K          | SPACESPAN                                     |
| supp. Fig. 3, proxy attention map      | attention_map, draw_attention                 |
| main Tables 4-5, ablations             | Config, recipe                                |

What the paper leaves open, and what we chose
- "KNN" clustering: farthest-point seeds inside the group (first: the patch nearest its centroid), every patch
  to its nearest seed, mean of features and of coordinates. Lloyd's steps would make it k-means (`lloyd`).
- Patches without a mask form one more group (label 0): ground and walls keep tokens, but get no identifier.
- Allocation is exact: a least number (`floor`) for every group (lower where those alone exceed the budget), the
  rest in proportion by largest remainders, never more than a group has.
- BFS runs over groups on the symmetric 6-NN graph of their centroids, from the group nearest the origin,
  nearer neighbors first; inside a group over its proxies, from the one nearest the last token. When a
  connected part of the graph is done, the point nearest to any visited one comes next.
- R rotates feature pairs by height / 5 cm * 10000^(-2i/C): R(0) = I and norms are kept. F is a learnable
  Fourier embedding (Li et al. 2021). Both act from stage II on.
- With loaded weights and the paper's rate of 5e-6 a term that starts small stays small. So F starts at 0.3 of
  the RMS of proxies' features, and symbols at their full RMS (`Model.measure_gains`): a meter along x, y or z
  then moves a token by comparable amounts (tested).
- Proxies take ordinary sequential positions in MRoPE (t = h = w), like words.
- Inter-frame attention: the tower's full-attention blocks see all frames of a scene at once. No parameters.
- 16x21 (32x42) merged tokens = frames resized to exactly 448x588 (896x1176), whatever the camera.
- Category symbols come from the data's categories (the paper's list of 213 is not public): a drawn icon, or
  the written word where there is none. Stages I to III see an object as category + identifier symbol; in
  stage IV proxies take the place of category symbols.
- Symbols have no color, so the paper's stages I to III never ask for one; of MMScan's pairs III takes those
  about space.
- Without semantic grouping the scene is one group, and a proxy's identifier that of most of its patches.
- Point maps and masks come from the scene (data.py): sensor depth or VGGT, and instance masks, own segments
  or SAM 2.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import data
from data import Sample, Scene, Source, Stage, Thing

# ---- configuration -------------------------------------------------------------------------------


@dataclass
class Config:
    """Every number of the model; `paper()` is the main table's setting, `tiny()` trains on a laptop."""

    llm: str | None = None  # a Qwen2.5-VL name or folder; None: a tiny one of the last fields
    budget: int = 700  # proxies per scene; paper 450, 700, 1000
    floor: int = 2  # proxies that every object gets, if the budget allows; paper 2 (2, 5, 10 in Table 5)
    grid: tuple[int, int] = (32, 42)  # merged tokens per frame, rows x columns; paper 16x21 or 32x42
    frames: int = 32  # frames per scene, evenly spaced; paper 32
    semantic_grouping: bool = True  # False: Table 4, "no semantic grouping"
    coordinate_stage: bool = True  # False: Table 4, stage II skipped, F trains in stage IV
    inter_frame: bool = True  # Table 4, full-attention blocks see all frames
    lloyd: int = 0  # steps of k-means from the farthest seeds
    fourier: int = 256  # features of F, cosines and sines; half as many as its hidden width
    position_share: float = 0.3  # RMS of F at the start, as a share of that of the tower's features
    symbol: int = 112  # pixels of a symbol image; 112 = 4 x 4 merged tokens of Qwen2.5-VL, averaged
    lora: int = 0  # rank of LoRA in the language model; 0 trains all of it, as the paper does
    dtype: str = "float32"  # of what stays frozen; what trains is float32
    # the tiny model, used only where llm is None: its language model, and its tower
    reader: tuple[int, ...] = data.READER
    vision_width: int = 64
    vision_layers: int = 5

    @classmethod
    def paper(cls, **changes) -> Config:
        """The main table: 700 tokens at 32x42."""
        return cls("Qwen/Qwen2.5-VL-7B-Instruct", dtype="bfloat16", **changes)

    @classmethod
    def paper_450(cls) -> Config:
        """VSI-Bench and the base of the ablations: 450 tokens at 16x21."""
        return cls.paper(budget=450, grid=(16, 21))

    @classmethod
    def tiny(cls, **changes) -> Config:
        """Rooms of 96 x 96 pixels on a CPU."""
        small = dict(
            budget=96,
            grid=(12, 12),
            frames=12,
            inter_frame=False,
            fourier=24,
            symbol=16,
        )
        return cls(**{**small, **changes})


# ---- 1 patches to triplets, sec. 3.1 -------------------------------------------------------------


def patch_triplets(features: Tensor, points: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lift patches to 3D: one (feature, point, label) per patch that shows its object with a known depth.

    Args: features [V, h, w, C]; points [V, H, W, 3] in meters, NaN = missing; masks [V, H, W] >= 0, 0 = no
    object. H and W need not be multiples of h and w. Returns: f [L, C], p [L, 3], m [L].
    """
    h, w = features.shape[1:3]
    patch = patch_index(masks, h, w)  # [pixels]

    # a patch belongs to the object that covers most of it
    label = patch_labels(masks, h, w).flatten()  # [patches]

    # its point averages that object's pixels only: a chair's edge must not be pulled to the wall behind it
    counted = torch.isfinite(points).all(-1).flatten() & (masks.flatten() == label[patch])
    n = len(label)
    patch = torch.where(counted, patch, n)  # [pixels] n = none
    p, count = data.group_mean(points.reshape(-1, 3).float(), patch, n + 1)  # [patches + 1, 3], [patches + 1]

    # patches whose object has no measured pixel have no place in 3D
    keep = count[:n] > 0
    return features.flatten(0, 2)[keep], p[:n][keep], label[keep]


def patch_index(pixels: Tensor, h: int, w: int) -> Tensor:
    """Number the patch, of V * h * w, in which each pixel of a [V, H, W] tensor lies: [V*H*W]."""
    V, H, W = pixels.shape
    frame, row, column = (torch.arange(n, device=pixels.device) for n in (V, H, W))
    patch = row[:, None] * h // H * w + column * w // W  # [H, W] in its frame
    return (frame[:, None, None] * h * w + patch).flatten()


def patch_labels(masks: Tensor, h: int, w: int) -> Tensor:
    """Find the label that covers most of every patch: masks [V, H, W] >= 0 -> [V, h, w].

    Of labels that cover the same, the highest wins: an object before 0, "none".
    """
    # `most_frequent` prefers the lowest, so labels count downwards from the highest
    V, most = len(masks), masks.max()
    lowest = data.most_frequent((most - masks).flatten(), patch_index(masks, h, w), V * h * w)
    return (most - lowest).view(V, h, w)


# ---- 2 allocation and clustering, sec. 3.2 -------------------------------------------------------


def allocate(sizes: Sequence[int], budget: int, floor: int = 2) -> list[int]:
    """Share the budget among groups in proportion to their patches, K_g ~ |G_g| / L.

    Exactly min(budget, sum of sizes) proxies in all; a group gets at most its size, and at least min(floor, size)
    unless the floors alone exceed the budget.

        sizes 3 3 94, budget 20, floor 2
        floors                2    2     2      14 are left, every group has room
        14 * size / 100    0.42 0.42 13.16
        whole parts           2    2    15      1 is left
        largest remainder     3    2    15      0.42 twice: the larger group, then the first

    Args: sizes [G] patches per group, all >= 1. Returns: proxies per group [G].
    """
    size = np.asarray(sizes)
    budget = min(budget, size.sum())

    # the floor for all, a lower one where the floors alone exceed the budget
    if np.minimum(size, floor).sum() > budget:
        floor = budget // len(size)
    given = np.minimum(size, floor)

    # the rest in proportion, to groups that have patches left
    while (left := budget - given.sum()) > 0:
        room = size - given
        weight = np.where(room > 0, size, 0)
        share, remainder = np.divmod(weight * left, weight.sum())
        full = (room > 0) & (share >= room)
        if full.any():
            # a group that fills up takes all it can hold; the next round shares its surplus among the others
            given[full] = size[full]
        else:
            # whole parts, then one more for the largest remainders
            ranked = np.lexsort((-size, -remainder))
            given += share
            given[ranked[: left - share.sum()]] += 1
    return given.tolist()


def cluster(points: Tensor, labels: Tensor, budget: int, floor: int = 2, lloyd: int = 0) -> Tensor:
    """Group patches by label and cluster each group on coordinates alone, Eq. (1) and (2).

    Args: points [L, 3] meters; labels [L] any integers; lloyd: how often the points' means then take the seeds'
    place, as k-means does. Returns: the proxy 0..K-1 of every patch [L], in the order of labels; -1 in a group
    that got no proxy, as happens where there are more groups than tokens. K = min(budget, L) unless patches
    coincide. Raises ValueError without patches.
    """
    if len(points) == 0:
        raise ValueError("cluster: no patches with a measured point; check the scene's depth")
    _, group, sizes = labels.unique(return_inverse=True, return_counts=True)
    counts = torch.tensor(allocate(sizes.tolist(), budget, floor), device=points.device)  # [G]

    # the patches of groups that got a proxy, group by group
    order = group.argsort(stable=True)
    order = order[counts[group[order]] > 0]
    _, group, sizes = group[order].unique_consecutive(return_inverse=True, return_counts=True)
    counts, p = counts[counts > 0], points[order].float()

    # proxies are numbered group by group; a cluster that nobody joined is none
    seeds = seeds_in_turn if p.device.type == "cpu" else seeds_together
    owner = (counts.cumsum(0) - counts)[group] + seeds(p, sizes, counts)
    _, owner = owner.unique(return_inverse=True)

    for _ in range(lloyd):
        # far apart along a fourth axis, no patch is nearest to a mean of another group
        apart = torch.cat([p, 1000 * group[:, None]], 1).double()
        means, _ = data.group_mean(apart, owner, int(owner.max()) + 1)  # [K, 4]
        _, owner = data.knn(apart, means, 1)[1][:, 0].unique(return_inverse=True)
    return torch.full_like(labels, -1, dtype=torch.long).scatter(0, order, owner)


def farthest_seeds(points: np.ndarray, count: int) -> np.ndarray:
    """Choose seeds one by one, each farthest from those before; give every point its nearest seed.

    The first seed is the point nearest the centroid. The nearest seed comes for free: a point changes hands
    when a new seed is nearer.

    Args: points [n, 3], count <= n. Returns: seed 0..count-1 of every point [n].
    """
    axes = np.ascontiguousarray(points.T)  # [3, n] contiguous reads
    seed = np.square(points - points.mean(0)).sum(1).argmin()
    nearest = np.full(len(points), np.inf, points.dtype)  # [n] squared distance to the own seed
    owner = np.zeros(len(points), int)  # [n]
    for j in range(count):
        # the new seed takes over what is nearer to it than to all before
        distance = np.square(axes - axes[:, seed, None]).sum(0)  # [n]
        owner[distance < nearest] = j
        nearest = np.minimum(nearest, distance)

        # next: the point that all seeds are far from
        seed = nearest.argmax()
    return owner


def seeds_in_turn(points: Tensor, sizes: Tensor, counts: Tensor) -> Tensor:
    """Call `farthest_seeds` for one group after the other: a CPU's way.

    Args: points [L, 3], group by group; sizes [G] points and counts [G] seeds of the groups.
    Returns: seed 0..counts[g]-1 of every point [L].
    """
    groups = zip(points.split(sizes.tolist()), counts.tolist(), strict=True)
    return torch.cat([torch.from_numpy(farthest_seeds(p.numpy(), count)) for p, count in groups])


def seeds_together(points: Tensor, sizes: Tensor, counts: Tensor) -> Tensor:
    """Do as `seeds_in_turn` for all groups at once: a GPU's way, in as many rounds as the largest count.

    A group is a row of a table as wide as the largest group: on a CPU padding would cost more than it saves.
    """
    real = torch.arange(int(sizes.max()), device=points.device) < sizes[:, None]  # [G, n]
    table = points.new_zeros(*real.shape, 3)
    table[real] = points

    # as in `farthest_seeds`; padding is never far
    middle = table.sum(1) / sizes[:, None]  # [G, 3]
    far = -(table - middle[:, None]).square().sum(2)  # [G, n]
    nearest = torch.where(real, torch.inf, -torch.inf)
    seed = torch.where(real, far, -torch.inf).argmax(1)  # [G]
    owner = torch.zeros_like(nearest, dtype=torch.long)
    for j in range(int(counts.max())):
        newest = table[torch.arange(len(seed)), seed]  # [G, 3]
        distance = (table - newest[:, None]).square().sum(2)
        owner[(distance < nearest) & (j < counts)[:, None]] = j
        nearest = torch.minimum(nearest, distance)
        seed = nearest.argmax(1)
    return owner[real]


def make_proxies(
    features: Tensor,
    points: Tensor,
    masks: Tensor,
    budget: int = 700,
    floor: int = 2,
    lloyd: int = 0,
    semantic_grouping: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn the patches of a scene into a sequence of proxies: sections 3.1 to 3.3 without the encoding of places.

    Args: features [V, h, w, C]; points [V, H, W, 3] meters, NaN = missing; masks [V, H, W] object ids,
    0 = none; budget, floor: see `allocate`; lloyd: see `cluster`; semantic_grouping: False takes all for
    one group. Returns: z [K, C] mean features, c [K, 3] mean points, group [K] object ids, in BFS order.
    """
    # patches with a feature, a point and a label, and the proxy that each belongs to
    f, p, m = patch_triplets(features, points, masks)
    same = torch.zeros_like(m)  # the labels of a single group
    proxy = cluster(p, m if semantic_grouping else same, budget, floor, lloyd)  # [L]

    # Eq. (3): a proxy is the mean of its patches
    kept = proxy >= 0
    proxy, K = proxy[kept], int(proxy.max()) + 1
    z, _ = data.group_mean(f[kept].float(), proxy, K)  # [K, C]
    c, _ = data.group_mean(p[kept], proxy, K)  # [K, 3]

    # and shows the object of most of them, which with semantic grouping is the object of all
    group = data.most_frequent(m[kept], proxy, K)  # [K]
    order = bfs_order(c, group if semantic_grouping else same[:K])  # [K]
    return z[order], c[order], group[order]


# ---- 3 serialization, sec. 3.3 -------------------------------------------------------------------


def bfs_order(centers: Tensor, groups: Tensor, neighbors: int = 6) -> Tensor:
    """Put proxies in a line, groups together and neighbors near each other, Eq. (5).

    Breadth first over groups from the one nearest the origin, then in each from the proxy nearest the last:

        proxies on the x axis    desk 4.0 4.4   rug 0.9 0.1   lamp 4.3
        group centroids          desk 4.2       rug 0.5       lamp 4.3     root: the rug
        groups, 1 neighbor       rug, then desk (nearest to it), lamp
        line                     0.1 0.9 | 4.0 4.4 | 4.3

    Args: centers [K, 3] meters, groups [K] any integers. Returns: order [K].
    """
    c, g = centers.double().cpu().numpy(), groups.cpu().numpy()
    members = [np.flatnonzero(g == name) for name in np.unique(g)]
    centroids = np.stack([c[rows].mean(0) for rows in members])  # [G, 3]

    # groups from the origin, and the proxies of each from where the line has arrived
    order, last = [], np.zeros(3)
    for i in breadth_first(centroids, last, neighbors):
        rows = members[i]
        order += rows[breadth_first(c[rows], last, neighbors)].tolist()
        last = c[order[-1]]
    return torch.tensor(order, device=centers.device)


def breadth_first(points: np.ndarray, start: np.ndarray, neighbors: int = 6) -> list[int]:
    """Search the symmetric k-NN graph of points [n, 3] breadth first, from the point nearest to `start` [3].

    Nearer neighbors come first. When a connected part is done, the point nearest to any visited one is next.
    Returns: the order of visits [n].
    """
    # two points are linked if either is among the other's nearest
    n = len(points)
    distance = np.square(points[:, None] - points[None]).sum(-1)  # [n, n]
    near = np.argsort(distance, axis=1, kind="stable")  # [n, n] each point itself, then the nearest
    linked = np.zeros((n, n), bool)
    np.put_along_axis(linked, near[:, 1 : neighbors + 1], True, axis=1)
    linked |= linked.T

    # `order` is what has been found so far; order[head:] is the queue
    order = [int(np.square(points - start).sum(1).argmin())]
    head, waiting = 0, np.ones(n, bool)
    waiting[order] = False
    while waiting.any():
        if head < len(order):
            # those linked to the first in the queue, nearest first
            ranked = near[order[head]]
            found = ranked[waiting[ranked] & linked[order[head], ranked]]
            head += 1
        else:
            # the queue is empty: another part of the graph begins
            gap = np.where(waiting, distance[order].min(0), np.inf)
            found = gap.argmin(keepdims=True)
        waiting[found] = False
        order += found.tolist()
    return order


# ---- 4 hybrid 3D positional encoding, Eq. (4) ----------------------------------------------------


def rotate_height(z: Tensor, height: Tensor, unit: float = 0.05) -> Tensor:
    """Apply R(c^H): rotate feature pairs (2i, 2i+1) by height / unit * 10000^(-2i/C); norms are kept.

    Args: z [..., C] with C even, height [...] meters above the floor. Returns: [..., C].
    """
    C = z.shape[-1]
    frequency = 10000 ** (-torch.arange(0, C, 2, device=z.device) / C)  # [C/2]
    angle = height.float()[..., None] / unit * frequency  # [..., C/2]
    cos, sin = angle.cos().to(z), angle.sin().to(z)
    a, b = z[..., 0::2], z[..., 1::2]  # [..., C/2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)  # [..., C]


class HorizontalFourier(nn.Module):
    """F(c^WxL): learnable Fourier features of the horizontal position (Li et al. 2021, arXiv 2106.02795).

    F(x) = W2 GELU(W1 r), r = [cos(x Wr), sin(x Wr)] / sqrt(2 P) with P learned frequencies. Wr starts as N(0, 1)
    per meter, and W2 with the standard deviation of a language model's weights, so that a step of 5e-6 changes
    it by the same share as those. The scale of F is set outside (`Model.measure_gains`).
    """

    def __init__(self, features: int, width: int):
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(2, features // 2))
        self.lift = nn.Linear(features, 2 * features, bias=False)
        self.out = nn.Linear(2 * features, width, bias=False)
        nn.init.normal_(self.out.weight, std=0.02)

    def forward(self, xy: Tensor) -> Tensor:
        """Encode xy [..., 2] meters: [..., C]."""
        phase = xy.to(self.frequencies) @ self.frequencies  # [..., P]
        r = torch.cat([phase.cos(), phase.sin()], dim=-1)  # [..., 2P]
        r = r / math.sqrt(r.shape[-1])
        return self.out(F.gelu(self.lift(r)))  # [..., C]


# ---- 5 object reference embeddings: pictures of digits and of categories, sec. 3.4 ---------------

DIGITS = [
    "### #.# #.# #.# ###",
    ".#. ##. .#. .#. ###",
    "### ..# ### #.. ###",
    "### ..# ### ..# ###",
    "#.# #.# ### ..# ..#",
    "### #.. ### ..# ###",
    "### #.. ### #.# ###",
    "### ..# .#. .#. .#.",
    "### #.# ### #.# ###",
    "### #.# ### ..# ###",
]


@functools.cache
def draw_identifier(number: int, size: int) -> Tensor:
    """Draw G_id's picture: three white digits on black, [size, size, 3] uint8, size >= 11."""
    # the three digits beside one another, with an empty column between them
    digits = [DIGITS[int(d)].split() for d in f"{number:03d}"]
    rows = [list(".".join(row)) for row in zip(*digits, strict=True)]
    zoom = size // 11
    ink = np.kron(np.array(rows) == "#", np.ones((zoom, zoom), bool))  # [5 * zoom, 11 * zoom]

    # as large as fits, in the middle
    image = np.zeros((size, size, 3), np.uint8)
    top, left = (size - 5 * zoom) // 2, (size - 11 * zoom) // 2
    image[top : top + 5 * zoom, left : left + 11 * zoom][ink] = 255
    return torch.from_numpy(image)


@functools.cache
def draw_category(category: str, color: str, size: int) -> Tensor:
    """Draw G_sem's picture [size, size, 3] uint8: the category's icon, else its words; a cube without a category.

    The tower of a vision-language model reads text, and two categories never share a picture.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not category or category in data.CATEGORIES:
        return torch.from_numpy(data.category_icon(category, color or "white", size))
    image, font = Image.new("RGB", (size, size)), ImageFont.load_default(size / 6)
    ImageDraw.Draw(image).text((0, 0), category.replace(" ", "\n"), font=font)
    return torch.tensor(np.asarray(image))


# a symbol's key is ("id", 12) or ("category", "bed", "white")
DRAW = {"id": draw_identifier, "category": draw_category}
IDENTIFIERS = [("id", number) for number in range(100)]

# ---- 6 the model ---------------------------------------------------------------------------------


def batched_attention(module, q, k, v, attention_mask, scaling, cu_seq_lens_q, **others):
    """Attend within many short sequences, all of one length in one call, where transformers makes a call for each.

    32 frames of 16 x 21 tokens have 768 windows, of two sizes, in each of 28 blocks; in the four blocks with full
    attention a sequence is a frame, or all frames at once.

    Args: q, k, v [1, heads, L, d]; sequence i runs from cu_seq_lens_q[i] to the next. Returns: [1, L, heads, d]
    and no weights, as transformers expects.
    """
    start, length = cu_seq_lens_q[:-1], cu_seq_lens_q.diff()
    out = torch.empty_like(q[0])
    for n in length.unique().tolist():
        rows = start[length == n, None] + torch.arange(n, device=q.device)  # [S, n]
        alike = torch.cat([q, k, v])[:, :, rows].transpose(1, 2)  # [3, S, heads, n, d]
        out[:, rows] = F.scaled_dot_product_attention(*alike, scale=scaling).transpose(0, 1)
    return out.transpose(0, 1)[None], None


def qwen_tokens(visual: nn.Module, images: Tensor, inter_frame: bool) -> Tensor:
    """Run Qwen2.5-VL's vision tower over images [V, H, W, 3] uint8: merged tokens [V, h, w, C].

    p, m, t: sizes of the tower's own small patches, of the square of them that becomes one token, and of a
    patch in time; H and W are multiples of p m. Every frame is an image of its own; with inter_frame the
    blocks with full attention (the others keep to windows) read all frames as one sequence.
    """
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    c = visual.config
    p, m, t = c.patch_size, c.spatial_merge_size, c.temporal_patch_size
    V, H, W, _ = images.shape
    h, w = H // (p * m), W // (p * m)

    # the tower's own normalization
    mean, std = torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD], device=images.device)
    x = (images.float() / 255 - mean) / std  # [V, H, W, 3]

    # patches of one merged token lie together; a still image fills the temporal patch
    x = x.view(V, h, m, p, w, m, p, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)  # [V, h, w, m, m, 3, p, p]
    x = x.unsqueeze(6).expand(*[-1] * 6, t, -1, -1)  # [V, h, w, m, m, 3, t, p, p]
    x = x.reshape(V * h * w * m * m, -1).to(visual.dtype)  # [V*h*w*m*m, 3*t*p*p]

    # cu_seqlens says where the sequences of full attention begin and end; by default every image is one
    grid = torch.tensor([[1, h * m, w * m]] * V, device=images.device)
    joint = None
    if inter_frame:
        joint = torch.tensor([0, len(x)], dtype=torch.int32, device=images.device)
    return visual(x, grid_thw=grid, cu_seqlens=joint).pooler_output.view(V, h, w, -1)  # [V, h, w, C]


class Model(data.SceneLanguageModel):
    """Proxy3D around a Qwen2.5-VL: frozen tower -> proxies -> language model; see the file's docstring."""

    scene_inputs = ("symbols", "symbols+3d", "proxies")

    def __init__(self, config: Config, text: data.TinyText | data.HubText):
        super().__init__(config, text)
        self.llm = self.load_llm()
        self.width = self.llm.config.get_text_config().hidden_size  # D
        self.fourier = HorizontalFourier(config.fourier, self.width)
        self.register_buffer("gains", torch.ones(2))  # of F and of symbols; ones: not measured yet
        self.frame_width = max(config.grid) * self.cell
        self.symbol_features = {}  # what the tower sees in a symbol, by its key

    def load_llm(self) -> nn.Module:
        """Load Qwen2.5-VL, with adapters in its language model where the config asks for them."""
        from transformers import AttentionInterface, Qwen2_5_VLForConditionalGeneration

        # packed questions need a mask that says who sees whom: sdpa takes one
        config, rank = self.config, self.config.lora
        llm = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            config.llm, dtype=config.dtype, attn_implementation="sdpa"
        )

        # transformers tells where windows begin only to attentions with "flash" in their name
        AttentionInterface.register("flash_batched", batched_attention)
        llm.model.visual.config._attn_implementation = "flash_batched"
        if rank:
            from peft import LoraConfig, inject_adapter_in_model

            adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
            inject_adapter_in_model(adapters, llm.get_decoder())

            # a checkpoint holds the adapters only
            self.frozen_pretrained_names = tuple(
                f"llm.{name}" for name in llm.state_dict() if "lora_" not in name
            )
        return llm

    def parts(self):
        language = self.llm.get_decoder()
        adapters = [p for name, p in language.named_parameters() if "lora_" in name]
        return {"3d": [self.fourier], "lm": adapters or [language, self.llm.lm_head]}

    # -- the vision tower

    @property
    def visual(self) -> nn.Module:
        return self.llm.model.visual

    @property
    def cell(self) -> int:
        """Pixels per token and side."""
        vision = self.visual.config
        return vision.patch_size * vision.spatial_merge_size

    def encode_images(self, images: Tensor, together: bool = False) -> Tensor:
        """Run the tower over images [V, H, W, 3] uint8: [V, h, w, C]. together: frames of one scene."""
        images = images.to(self.device)
        return qwen_tokens(self.visual, images, together and self.config.inter_frame)

    def resize_frames(self, images: Tensor) -> Tensor:
        """Bring images [V, H, W, 3] uint8 of any camera to exactly the grid's pixels."""
        size = tuple(n * self.cell for n in self.config.grid)
        if images.shape[1:3] == size:
            return images
        channels_first = images.permute(0, 3, 1, 2).float()
        resized = F.interpolate(channels_first, size, mode="bilinear", antialias=True)
        return resized.round().byte().permute(0, 2, 3, 1)

    # -- symbols

    def encode_symbols(self, keys: Sequence[tuple]) -> Tensor:
        """Run the tower over the pictures of symbols: [n, C], the mean token of each."""
        pictures = torch.stack([DRAW[kind](*what, self.config.symbol) for kind, *what in keys])
        return self.encode_images(pictures).float().mean((1, 2))

    @torch.no_grad()
    def symbols(self, keys: Sequence[tuple]) -> Tensor:
        """Look up symbols: [n, C]; the frozen tower sees each picture once."""
        for key in keys:
            if key not in self.symbol_features:
                self.symbol_features[key] = self.encode_symbols([key])[0]
        return torch.stack([self.symbol_features[key] for key in keys])

    def category_keys(self, objects: Sequence[Thing]) -> list[tuple]:
        """Name the objects' symbols: white icons, as the paper's; colored cubes where no object has a category."""
        named = any(o.category for o in objects)
        return [("category", o.category, "white" if named else o.color) for o in objects]

    @torch.no_grad()
    def measure_gains(self, scenes: Sequence[Scene]):
        """Scale F and the symbols to proxies' features, once: gains are saved with the weights.

        `cache_features` measures the first training scenes, the same on every rank; without it the first batch.
        """
        if bool((self.gains != 1).any()):
            return

        # what the tower sees, and F and symbols as they are before
        found = [self.compute_features(scene) for scene in scenes[:4]]
        z, c = (torch.cat([f[key].float() for f in found]) for key in "zc")
        share, features = self.config.position_share, rms(z)
        self.gains[0] = share * features / rms(self.fourier(c[:, :2]))
        self.gains[1] = features / rms(self.symbols(IDENTIFIERS))
        print(f"RMS of the tower's features {features:.3g}; F starts at {share} of it, symbols at 1;")
        print(f"F is multiplied by {self.gains[0]:.3g}, symbols by {self.gains[1]:.3g}")

    # -- frozen work on a scene

    def feature_settings(self):
        c = self.config
        return c.budget, c.floor, c.lloyd, c.semantic_grouping, c.grid, c.frames, c.inter_frame

    def feature_weights(self):
        return self.visual

    def uses_features(self):
        return self.stage.scene_input == "proxies"

    def compute_features(self, scene):
        """Make a scene's proxies: z [K, C] float16, c [K, 3] meters, group [K] object ids, 0 = none."""
        f, cfg = frames_of(scene), self.config

        # evenly spaced frames, the first and the last among them
        total = len(f.color)
        pick = np.linspace(0, total - 1, min(cfg.frames, total)).round().astype(int)
        images = self.resize_frames(torch.from_numpy(f.color[pick]).to(self.device))
        features = self.encode_images(images, together=True)  # [V, h, w, C]
        points = data.unproject(f.depth[pick], f.intrinsics[pick], f.poses[pick])
        points = torch.from_numpy(points).to(self.device)
        masks = torch.from_numpy(f.masks[pick]).long().to(self.device)
        z, c, group = make_proxies(
            features, points, masks, cfg.budget, cfg.floor, cfg.lloyd, cfg.semantic_grouping
        )
        return {"z": z.half(), "c": c, "group": group}

    def cache_features(self, scenes, folder=None, rank=0, world=1):
        """See the base class; symbols too are encoded before the first step."""
        self.measure_gains(scenes)
        if not self.uses_features():
            self.symbols([key for scene in scenes for key in self.category_keys(scene.objects)])
        super().cache_features(scenes, folder, rank, world)

    # -- scenes to tokens

    def visible(self, scene):
        if self.uses_features():
            return set(self.load_features(scene)["group"].tolist())
        return super().visible(scene)

    def scene_length(self, scene):
        if self.uses_features():
            return len(self.load_features(scene)["c"])
        return len(scene.identifiers)

    def encode(self, scenes):
        """Give "tokens" [S, K, D] and "valid" [S, K]: what is seen, where (Eq. 4), and its identifier.

        A token is a proxy, or in stages I to III an object.
        """
        self.measure_gains(scenes)
        f_id = self.gains[1] * self.symbols(IDENTIFIERS)  # [100, D]
        f_id = F.pad(f_id, (0, 0, 0, 1))  # [101, D] the last row, -1: no identifier

        # what is seen, where it is, and whose identifier it carries
        tokens = []
        for scene in scenes:
            z, c, number = self.scene_tokens(scene)
            if self.stage.scene_input != "symbols":  # spatial encodings act from stage II on
                z = self.add_position(z, c)  # [K, D]
            tokens.append(z + f_id[number])

        # padded to the longest scene
        valid = [torch.ones_like(z[:, 0], dtype=torch.bool) for z in tokens]
        return {"tokens": pad_sequence(tokens, True), "valid": pad_sequence(valid, True)}

    def add_position(self, z: Tensor, c: Tensor) -> Tensor:
        """Say where tokens z [K, D] are, c [K, 3] meters: Eq. (4)."""
        return rotate_height(z, c[:, 2]) + self.gains[0] * self.fourier(c[:, :2])

    def scene_tokens(self, scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
        """Give what is seen [K, D], where [K, 3], and whose identifier it gets [K], -1 = none."""
        return self.proxy_tokens(scene) if self.uses_features() else self.symbol_tokens(scene)

    def symbol_tokens(self, scene):
        """Stages I-III: one token per object, its category's symbol at its center."""
        # objects without an identifier (beyond a hundred) cannot be asked about
        objects = [o for o in scene.objects if o.id in scene.identifiers]
        centers = np.stack([o.box[:3] for o in objects])  # [n, 3]
        order = breadth_first(centers, np.zeros(3))
        f_sem = self.gains[1] * self.symbols(self.category_keys(objects))  # [n, D]
        number = torch.tensor([scene.identifiers[o.id] for o in objects])  # [n]
        return f_sem[order], torch.from_numpy(centers[order]).to(f_sem), number[order]

    def proxy_tokens(self, scene):
        """Stage IV: proxies; their places were kept unturned, and are turned with the scene now."""
        found = self.load_features(scene)
        c = found["c"] @ torch.from_numpy(scene.turn).float().T  # [K, 3]
        number = [scene.identifiers.get(i, -1) for i in found["group"].tolist()]
        return found["z"].float().to(self.device), c.to(self.device), torch.tensor(number)

    def run_decoder(self, embeds, is_scene, positions, mask, cache=None):
        """See the base class; proxies take positions like words, t = h = w."""
        return data.last_hidden(
            self.llm.get_decoder(),
            cache,
            inputs_embeds=embeds,
            attention_mask={
                "full_attention": mask
            },  # by kind of layer: then transformers makes none of its own
            position_ids=positions.expand(3, -1, -1),
        )

    # -- pictures

    def token_centers(self, scene):
        return self.scene_tokens(scene)[1].cpu().numpy()

    def pictures(self, scenes, folder):
        """Draw where the model looks to answer a question about each scene, too."""
        paths = super().pictures(scenes, folder)
        for scene in scenes:
            # the second kind of question needs no categories
            samples = data.question_set([scene], ["ground", "ground_superlative"], 1, 0)[:1]
            if samples:
                answers = self.generate(self.batch([(scene, samples)]))
                paths += self.answer_pictures(scene, samples, answers, folder)
        return paths

    def answer_pictures(self, scene, samples, answers, folder):
        """Draw where the model looked for the first of some answers, once it sees proxies."""
        if not self.uses_features():
            return []
        path = folder / f"{data.safe_name(scene.name)}_attention.png"
        draw_attention(self, scene, samples[0], answers[0], path)
        return [path]


def frames_of(scene: Scene) -> data.Frames:
    """Give a scene's frames. Raises DataError where it has points only."""
    if scene.frames is None:
        raise data.DataError(f"{scene.name}: Proxy3D needs posed frames, here are points only")
    return scene.frames


def rms(x: Tensor) -> float:
    """Compute the root of the mean square of all entries."""
    return float(x.float().square().mean().sqrt())


# ---- 7 the paper's recipe ------------------------------------------------------------------------

TASKS = {}  # Proxy3D needs no question types beyond data.TASKS

# supp. Table 2, training splits; its rounded rows give 319K, not 318K. fit: the IoU with its object that
# Chat-Scene, whose files these are, asks of a proposal
SPACESPAN = {
    "ScanQA": Source("scanqa", 26_000),
    "SQA3D": Source("sqa3d", 26_000),
    "Scan2Cap": Source("scan2cap", 32_000, fit=0.75),
    "ScanRefer": Source("scanrefer", 32_000, "id", fit=0.75),
    "Multi3DRefer": Source("multi3drefer", 39_000, "id", fit=0.75),
    "MMScan QA": Source("mmscan/qa", 57_000, most=57_000),
    "MMScan VG": Source("mmscan/vg", 57_000, "id", most=57_000, fit=0.5),
    "SR-91K numbers": Source("sr91k", 30_000, "number", most=30_000),
    "SR-91K choices": Source("sr91k", 20_000, "choice", most=20_000),
}
RELATIONS = {  # MMScan's questions about where things are to each other: symbols show no other attribute
    "MMScan QA": Source("mmscan/qa", 57_000, most=57_000, kind="Space"),
    "MMScan VG": Source("mmscan/vg", 57_000, "id", most=57_000, fit=0.5, kind="Space"),
}
GENERATED = {  # where those files are not given: generated questions in SpaceSpan's shares, in thousands
    "color": 13,  # this and the next for ScanQA
    "what": 13,
    "situated": 26,  # SQA3D
    "caption": 32,  # Scan2Cap
    "ground": 32,  # ScanRefer
    "multi": 39,  # Multi3DRefer
    "where": 29,  # this and the next for MMScan QA
    "exist": 28,
    "ground_relation": 29,  # this and the next for MMScan VG
    "ground_multiple": 28,
    "count": 10,  # this and the rest for SR-91K
    "vsi_abs_distance": 10,
    "vsi_object_size": 5,
    "vsi_room_size": 5,
    "vsi_rel_distance": 10,
    "vsi_rel_direction": 10,
}

# supp. Table 1; the questions of stages I to III are generated, but for those of MMScan's files. The paper trains
# the 3D embedding in I and II; nothing shows it before II, so it has no gradient in I. From III on it is frozen,
# as the paper has it
PAPER_STAGES = [
    Stage(
        "I identifiers",
        {"id_category": 0.5, "ground_category": 0.5},
        ("lm",),
        "symbols",
        epochs=1,
        samples=30_000,
    ),
    Stage(
        "II coordinates",
        {"coordinate": 1.0},
        ("3d", "lm"),
        "symbols+3d",
        epochs=3,
        samples=30_000,
        score=("rooms/coordinate",),
    ),
    Stage(
        "III relations",
        {"relation": 0.7, "distance_ids": 0.3},
        ("lm",),
        "symbols+3d",
        epochs=3,
        samples=115_000,
        files=RELATIONS,
    ),
    Stage(
        "IV proxies",
        GENERATED,
        ("lm",),
        "proxies",
        epochs=1,
        samples=318_000,
        batch=128,
        per_scene=8,  # so 16 scenes: one for each of eight GPUs in each of two micro-batches
        accumulate=2,
        files=SPACESPAN,
    ),
]
STAGES = {"paper": PAPER_STAGES, "paper_450": PAPER_STAGES}  # "tiny" joins them below


def recipe(config: Config, stages: list[Stage]) -> list[Stage]:
    """Fit the stages to a configuration. Table 4, no coordinate alignment: stage II goes, F trains in IV."""
    if not config.coordinate_stage:
        stages = [stage for stage in stages if not stage.name.startswith("II ")]
        stages[-1] = replace(stages[-1], trains=("3d", *stages[-1].trains))
    return stages


# ---- 8 where an answer looked: supp. Fig. 3 ------------------------------------------------------


@torch.no_grad()
def attention_map(model: Model, scene: Scene, sample: Sample) -> Tensor:
    """Average how much the last layer looks at scene tokens, over all text and all heads: [K], sum 1."""
    # one question with its answer behind the scene's tokens
    batch = model.batch([(scene, [sample])])
    ids, positions, block = (batch[key].to(model.device) for key in ("ids", "positions", "block"))
    seen = model.encode([scene])

    # only eager attention returns its weights, and it adds the mask to the scores
    blocked = torch.finfo(model.llm.dtype).min
    mask = torch.where(data.packed_mask(block), 0.0, blocked).to(model.llm.dtype)
    language, caught = model.llm.get_decoder(), []
    last = language.layers[-1].self_attn
    hook = last.register_forward_hook(lambda module, inputs, out: caught.append(out[1]))
    language.set_attn_implementation("eager")
    model.forward_llm(ids, positions, mask, seen, seen["tokens"][0, :0])
    language.set_attn_implementation("sdpa")
    hook.remove()

    # what words look at, of that the share of each scene token
    attention = caught[0][0].float().mean(0)  # [T, T]
    looked = attention[block[0] > 0][:, ids[0] == data.SCENE].sum(0)  # [K]
    return looked / looked.sum()


def draw_attention(model, scene, sample, answer, path):
    """Draw the `attention_map` of an answer: true objects are outlined in green, those it names in red."""
    looked = attention_map(model, scene, replace(sample, reasoning="", answer=answer)).cpu()  # [K]
    centers = model.token_centers(scene)  # [K, 3]
    written = model.write_marks(scene, sample)
    lines = [f"answer: {answer}", f"true: {written.answer}"]
    figure, axes = data.scene_figure(scene, written.question, lines)

    # the darker and larger a proxy, the more it was looked at
    named = [i for i in scene.identifiers if model.object_to_text(scene, i) in answer]
    style = dict(c=looked, s=8 + 140 * looked / looked.max(), cmap="YlOrRd")
    for axis, places in zip(axes, (centers[:, :2], centers), strict=True):
        axis.scatter(*places.T, **style, zorder=3)
        for color, ids in (("green", sample.targets or sample.about), ("crimson", named)):
            data.draw_boxes(axis, [scene.thing(i).box for i in ids], color=color)
    data.save_figure(figure, path)


# ---- 9 demo -------------------------------------------------------------------------------------


def demo():
    """Follow one room from pixels to an answer; a tiny model learns its questions by heart."""
    # a room and a model that knows nothing
    torch.manual_seed(0)
    scene = data.room(1)
    scene.identifiers = data.number_objects(scene, np.random.default_rng(0))
    model = build(Config.tiny(), data.TinyText(data.vocabulary()))
    f = scene.frames

    # the paper's path, part by part
    features = model.encode_images(torch.from_numpy(f.color)).detach()
    points = torch.from_numpy(data.unproject(f.depth, f.intrinsics, f.poses))
    masks = torch.from_numpy(f.masks).long()
    z, c, _ = make_proxies(features, points, masks, 96)
    print(f"frames [V, H, W, 3]       {list(f.color.shape)}")
    print(f"features [V, h, w, C]     {list(features.shape)}")
    print(f"proxies z [K, C]          {list(z.shape)}, c [K, 3] {list(c.shape)}")

    # questions about the room, packed behind its proxies
    tasks = {"ground": 1.0, "id_color": 1.0, "color": 1.0}
    model.configure_stage(Stage("demo", tasks, ("3d", "lm")))
    samples = data.questions(scene, tasks, 24, np.random.default_rng(1))
    data.overfit_demo(model, scene, samples, 60, 3e-3)


# ==== tiny preset: trains from nothing on a CPU; not in the paper, skip on a first reading ====


class TinyTower(nn.Module):
    """Stand in for the vision tower with convolutions: [V, H, W, 3] uint8 -> [V, H/8, W/8, C].

    From nothing they learn in a minute the shapes for which a transformer would need an hour.
    """

    def __init__(self, width: int, layers: int, out: int):
        super().__init__()
        # three strides of two: 8 pixels per token
        quarter, half = width // 4, width // 2
        self.stem = nn.Sequential(
            nn.Conv2d(3, quarter, 4, 2, 1),
            nn.GELU(),
            nn.Conv2d(quarter, half, 4, 2, 1),
            nn.GELU(),
            nn.Conv2d(half, width, 4, 2, 1),
        )
        # residual blocks: over neighbors, then over channels
        self.blocks = nn.ModuleList()
        for _ in range(layers):
            near, each = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 1)
            self.blocks.append(nn.Sequential(nn.GroupNorm(1, width), near, nn.GELU(), each))
        self.out = nn.Linear(width, out)

    def forward(self, images: Tensor) -> Tensor:
        x = (images.float() / 255 - 0.5) / 0.27
        x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)  # [V, 3, H, W]
        x = self.stem(x)  # [V, E, h, w]
        for block in self.blocks:
            x = x + block(x)  # [V, E, h, w]
        return self.out(x.permute(0, 2, 3, 1))  # [V, h, w, C]


class TinyModel(Model):
    """Proxy3D around the small language model that has read rooms in words (data.Reader).

    Its tower has a stage 0 of its own, and symbols are in objects' colors.
    """

    scene_inputs = ("tower", *Model.scene_inputs)
    from_nothing = True
    cell = 8  # pixels per token of TinyTower

    def __init__(self, config: Config, text: data.TinyText):
        super().__init__(config, text)
        self.tower = TinyTower(config.vision_width, config.vision_layers, self.width)
        data.start_weights(self.tower)

        # features enter at the scale of the embeddings; R turns the anchor, which makes the height readable
        self.norm = nn.LayerNorm(self.width, bias=False)
        self.anchor = nn.Parameter(torch.randn(self.width) / math.sqrt(3))

    def load_llm(self):
        return data.tiny_llm(len(self.text), self.config.reader)

    @torch.no_grad()
    def start_from(self, reader):
        """Copy the language model, and let F and R say where things are in its own terms."""
        super().start_from(reader)

        # F starts linear in its features, because GELU(a) - GELU(-a) = a; each axis has frequencies of its own
        wave, D = 2 * math.pi / 0.5 / 2 ** torch.arange(6.0), 24  # wavelengths 0.5 .. 16 m
        code = reader["code.weight"][:, :D].unflatten(1, (2, 2, 6))  # [C, 2, 2, 6] x or y, cos or sin
        out = math.sqrt(D) * code.transpose(1, 2).flatten(1)  # [C, 24]
        self.fourier.frequencies.copy_(torch.block_diag(wave, wave))
        self.fourier.lift.weight.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
        self.fourier.out.weight.copy_(torch.cat([out, -out], dim=1))

        # the number of a height is also what R makes of the anchor
        for token, (axis, value) in self.text.number.items():
            if axis == "z":
                turned = rotate_height(self.anchor, torch.tensor(value))
                self.llm.get_input_embeddings().weight[token] += math.sqrt(3) * turned

    def parts(self):
        parts = super().parts()
        parts["3d"].append(self.anchor)
        return {**parts, "tower": [self.tower]}

    @property
    def visual(self) -> nn.Module:
        return self.tower

    def run_decoder(self, *inputs):
        """Run a decoder whose positions have one axis."""
        return data.SceneLanguageModel.run_decoder(self, *inputs)

    def encode_images(self, images, together=False):
        return self.norm(self.tower(images.to(self.device)))

    def encode_symbols(self, keys):
        return self.norm(super().encode_symbols(keys))

    def category_keys(self, objects):
        return [("category", o.category, o.color) for o in objects]

    def measure_gains(self, scenes):
        """Leave all as it is: everything starts at the scale of the embeddings."""

    def proxy_tokens(self, scene):
        z, c, number = super().proxy_tokens(scene)
        return self.norm(z), c, number

    def add_position(self, z, c):
        return super().add_position(z + self.anchor, c)

    def baselines(self):
        return {"untrained tower": self.untrained_tower()}

    @contextlib.contextmanager
    def untrained_tower(self):
        """The same model, but what it sees comes from a tower at its initial weights."""
        # another tower, and nothing that the trained one saw
        before = self.tower, self.feature_cache, self.symbol_features, self.feature_folder
        tower = copy.deepcopy(self.tower)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            data.start_weights(tower)
        self.tower, self.feature_cache, self.symbol_features, self.feature_folder = tower, {}, {}, None
        try:
            yield
        finally:
            self.tower, self.feature_cache, self.symbol_features, self.feature_folder = before

    # -- stage 0

    def encoder_loss(self, scenes, views=2):
        """Stand in for vision-language pre-training: features name categories and colors in word vectors.

        What is named are pieces, means over an object's patches in a sixteenth of a frame, because proxies are
        such means; what belongs to no object is <unk>. So do symbols, and pictures of digits name identifiers.
        """
        # what the tower saw before this step is worth nothing
        self.symbol_features, self.feature_cache = {}, {}

        # of every scene some frames, and four objects and four identifiers, which come in no order
        images, labels, names, keys, pairs = [], [], [], [], []
        for scene in scenes:
            numbers, f = list(scene.identifiers.values()), frames_of(scene)
            pick = np.random.default_rng(numbers).choice(len(f.color), views)
            images.append(self.resize_frames(torch.from_numpy(f.color[pick])))
            labels.append(patch_labels(torch.from_numpy(f.masks[pick]).long(), *self.config.grid))
            names.append({o.id: data.name_pair(self.text, o.category, o.color) for o in scene.objects})
            keys += self.category_keys(scene.objects[:4]) + [("id", i) for i in numbers[:4]]
            pairs += [names[-1][o.id] for o in scene.objects[:4]]
            pairs += [data.name_pair(self.text, f"<OBJ{i:03d}>") for i in numbers[:4]]

        # a piece is a label in a sixteenth of a frame, as one number: sixteenth * n + label
        label = torch.cat(labels)
        n = int(label.max()) + 1
        pieces, which = (patch_index(label, 4, 4) * n + label.flatten()).unique(return_inverse=True)
        nothing, shown = data.name_pair(self.text), []
        for piece in pieces.tolist():
            shown.append(names[piece // n // (16 * views)].get(piece % n, nothing))

        # average the patches of each piece, then all that must be named; walls and floor are everywhere
        patches = self.encode_images(torch.cat(images)).flatten(0, 2)  # [patches, D]
        z, _ = data.group_mean(patches, which.to(patches.device), len(pieces))
        features = torch.cat([self.norm(z), self.encode_symbols(keys)])  # [R, D]
        weight = torch.cat([torch.where(pieces % n > 0, 1.0, 0.3), torch.full([len(keys)], 2.0)])
        pairs = torch.tensor(shown + pairs, device=self.device)  # [R, 2]
        return self.naming_loss(features, pairs, weight.to(self.device))


# every stage asks a little of what its predecessors taught: what is not asked is forgotten
HOW = dict(batch=192, lr=2e-3, weight_decay=0.01, per_scene=16, schedule="constant", reasoning=True)
STAGES["tiny"] = [
    Stage("0 tower", {}, ("tower",), "tower", iterations=1600, batch=16, lr=4e-3, warmup=0.03),
    Stage(
        "I identifiers",
        {
            "ground": 0.2,
            "ground_category": 0.15,
            "id_category": 0.2,
            "id_color": 0.15,
            "color": 0.05,
            "exist": 0.12,
            "count": 0.03,
            "subtract": 0.08,
            "norm": 0.02,
        },
        ("lm",),
        "symbols",
        iterations=400,
        **HOW,
    ),
    Stage(
        "II coordinates",
        {
            "coordinate": 0.36,
            "ground": 0.08,
            "id_category": 0.08,
            "id_color": 0.06,
            "exist": 0.12,
            "what": 0.1,
            "where": 0.04,
            "count": 0.03,
            "subtract": 0.1,
            "norm": 0.03,
        },
        ("3d", "lm"),
        "symbols+3d",
        iterations=400,
        score=("rooms/coordinate",),
        **HOW,
    ),
    Stage(
        "III relations",
        {
            "subtract": 0.2,
            "norm": 0.05,
            "distance_ids": 0.25,
            "coordinate": 0.1,
            "relation": 0.03,
            "ground": 0.06,
            "id_category": 0.05,
            "color": 0.03,
            "exist": 0.11,
            "what": 0.08,
            "where": 0.04,
        },
        ("lm",),
        "symbols+3d",
        iterations=500,
        **HOW,
    ),
    Stage(
        "IV proxies",
        {
            "ground": 0.06,
            "ground_multiple": 0.08,
            "ground_category": 0.05,
            "multi": 0.07,
            "id_category": 0.05,
            "id_color": 0.03,
            "color": 0.08,
            "what": 0.11,
            "where": 0.07,
            "count": 0.08,
            "exist": 0.12,
            "caption": 0.08,
            "coordinate": 0.04,
            "distance_ids": 0.07,
            "subtract": 0.02,
        },
        ("lm",),
        "proxies",
        iterations=1600,
        files=SPACESPAN,
        **HOW | {"schedule": "trapezoid"},
    ),
]


def build(config, text):
    """Make the model that a configuration describes."""
    return TinyModel(config, text) if config.llm is None else Model(config, text)


if __name__ == "__main__":
    data.run_demo(demo)
