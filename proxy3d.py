"""Proxy3D: Efficient 3D Representations for Vision-Language Models via Semantic Clustering and Alignment.

CVPR 2026, arXiv 2605.08064. Supplementary Tables 1-3 give the recipe; equation numbers below are the paper's.

Idea. A video of a room is ten thousands of image patches, but only a few dozen things. Lift every patch to 3D, group
the patches by the object they show, summarise each group by a few *proxies* (mean feature, mean position), and give the
language model those few hundred tokens instead of all patches. Identifiers ("<OBJ012>") are added to an object's
proxies as the picture of their digits, seen by the same vision tower; no embedding table is learned.

  frames [V,H,W,3] --tower (frozen)--> features [V,h,w,C] --.
  depth/VGGT ------------------------> points  [V,H,W,3] ---+-> triplets f [L,C], p [L,3], m [L]     L = V*h*w
  masks/SAM 2 -----------------------> masks   [V,H,W] -----'        |
                                                     group by m, allocate K, cluster on p            (1) (2) (3)
                                                                     v
  z [K,C], c [K,3], owner [K] -> BFS order -> R(c_height) z + F(c_horizontal) + f_id[owner] -> LLM -> text   (4) (5) (6)

Axes: B scenes, V frames, H W pixels, h w patches, L = V h w triplets, G groups, K proxies, C = D width, T text,
n objects, S packed rows (one per scene), N positions read at a time, A answer tokens, U proxies with an
identifier, R pieces and symbols of stage 0.

| paper                                  | here                                          |
| sec. 3.1 patch triplets                | patch_triplets                                |
| (1) groups, (2) centres, (3) proxies   | cluster, CLUSTERING                           |
| allocation K_g ~ |G_g| / L             | allocate                                      |
| BFS serialization, (5)                 | bfs_order                                     |
| (4) z' = R(c^H) z + F(c^WxL)           | rotate_height, HorizontalFourier              |
| G_sem, G_id (symbol images)            | draw_identifier, data.category_icon, Model.symbols |
| (6) next-token loss on answers         | Model.forward                                 |
| supp. Table 1, four stages             | STAGES                                        |
| supp. Table 2, SpaceSpan-318K          | SPACESPAN                                     |
| supp. Fig. 3, proxy attention map      | attention_map, draw_attention                 |
| main Tables 4-5, ablations             | section 8                                     |

What the paper leaves open, and what we chose
- "KNN" clustering: farthest-point seeds inside the group (first: the patch nearest the group's centroid), every patch
  to its nearest seed, mean of features and of coordinates. DPC-kNN and Lloyd steps are alternatives.
- Patches without a mask form one more group (label 0), so that floor and walls keep tokens; it gets no identifier.
- Allocation is exact: floor for every group, the rest in proportion by largest remainders, never more than a group has.
  With more groups than tokens the largest groups get one each.
- BFS runs over groups on the symmetric 6-NN graph of their centroids (components joined by their closest pair), from
  the group nearest the origin, nearer neighbours first; inside a group over its proxies, from the one nearest the
  last token.
- R rotates feature pairs by height / height_unit * 10000^(-2i/C): R(0) = I and norms are kept. F is a learnable Fourier
  embedding (Li et al. 2021) whose last layer starts small. Both act from stage II on.
- Proxies take ordinary sequential positions in MRoPE (t = h = w), like words.
- Inter-frame attention: the tower's full-attention blocks see all frames of a scene at once. No parameters.
- 16x21 (32x42) merged tokens = frames resized to exactly 448x588 (896x1176), whatever the camera.
- Category symbols come from the data's categories (the paper's list of 213 is not public) and are drawn icons; a folder
  of images named after categories replaces them. Stage IV adds identifiers only, as in the notes on the paper.
- Without semantic grouping the whole scene is one group and a proxy's identifier is the majority of its patches.
- Point maps and masks come from the scene: sensor depth, or VGGT's depth un-projected with its cameras (its unit made
  metres by known poses, depth or a given length, else metric questions are refused); instance masks, our own segments,
  or SAM 2's tracks: masks on every eighth frame, followed through the frames, joined where their points overlap in 3D
  unless some frame shows both (data.py, parts 4b and 6).
- The tiny preset has no pre-trained parts. In their place: a convolutional tower with a stage 0 of its own (pieces of
  objects -> the words for their category and colour), icons tinted in the object's colour, an initialisation that looks
  back at the last words, attends to what shares content and copies it (`start_tiny`), a constant vector whose rotation
  by R makes the height readable (`anchor`), and answers that write their steps. None of that touches a loaded model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from data import Sample, Scene, SceneLanguageModel, Source, Stage

# ---- configuration ---------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every number of the model; `paper()` are the paper's, `tiny()` trains from nothing on a laptop."""

    llm: str | None = None  # a Qwen2.5-VL name or folder; None builds a tiny one from the fields below
    budget: int = 700  # proxies per scene; paper 450, 700, 1000
    floor: int = 2  # proxies that every object gets at least; paper 2 (2, 5, 10 in Table 5)
    grid: tuple[int, int] = (16, 21)  # merged tokens per frame, rows x columns; paper 16x21 or 32x42
    frames: int = 32  # frames per scene, evenly spaced; paper 32
    semantic_grouping: bool = True  # False: Table 4, "no semantic grouping"
    coordinate_stage: bool = True  # False: Table 4, stage II skipped, F trains in stage IV
    inter_frame: bool = True  # Table 4, full-attention blocks see all frames
    clustering: str = "fps"  # a key of CLUSTERING
    lloyd: int = 0  # Lloyd steps after the seeds
    neighbours: int = 6  # of the BFS graph
    height_unit: float = 0.05  # metres per rotary position
    fourier: int = 256  # random features of F
    fourier_hidden: int = 256  # hidden width of F
    fourier_gamma: float = 1.0  # metres: frequencies start as N(0, 1 / gamma^2)
    symbol: int = 28  # pixels of a symbol image; 28 = one merged token of Qwen2.5-VL
    symbols: str | None = None  # folder of images that replace the drawn icons, named after categories
    # the tiny model, used only where llm is None
    width: int = 128
    layers: int = 2
    heads: int = 4
    hidden: int = 256
    patch: int = 14  # pixels per patch of the tower
    merge: int = 2  # patches per merged token and side
    tower: str = "conv"  # or "qwen": Qwen2.5-VL's own vision transformer, tiny
    vision_width: int = 64
    vision_layers: int = 3
    attention: str = "sdpa"
    dtype: str = "float32"

    @classmethod
    def tiny(cls, **changes) -> Config:
        small = dict(budget=96, grid=(12, 12), frames=12, inter_frame=False, symbol=16, patch=8, merge=1, fourier=24,
                     fourier_hidden=48)  # fmt: skip
        return cls(**{**small, **changes})

    @classmethod
    def paper(cls, **changes) -> Config:
        return cls(**{**dict(llm="Qwen/Qwen2.5-VL-7B-Instruct", dtype="bfloat16"), **changes})


# ---- 1 patches to triplets -------------------------------------------------------------------------------------------


def patch_triplets(features: Tensor, points: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One (feature, 3D point, mask label) per patch; patches without a measured point are dropped.

    features [V, h, w, C]; points [V, H, W, 3] metres, NaN = missing; masks [V, H, W] labels, 0 = none. A patch's label
    is the one that covers most of it (ties: the lowest), its point the mean over the measured pixels of that label.
    H and W need not be multiples of h and w. Returns f [L, C], p [L, 3], m [L].
    """
    V, h, w, _ = features.shape
    H, W = masks.shape[1:]
    patch = patch_of_pixel(V, h, w, H, W, masks.device)  # [V*H*W]
    major = majority(masks, h, w).flatten()  # [L]
    counted = torch.isfinite(points).all(-1).flatten() & (masks.flatten() == major[patch])
    total = torch.zeros(V * h * w, 3, device=points.device)
    total.index_add_(0, patch[counted], points.reshape(-1, 3)[counted].float())
    count = torch.bincount(patch[counted], minlength=V * h * w)
    keep = count > 0
    return features.reshape(V * h * w, -1)[keep], (total / count.clamp(min=1)[:, None])[keep], major[keep]


def patch_of_pixel(V: int, h: int, w: int, H: int, W: int, device: torch.device) -> Tensor:
    """Number of the patch, of V * h * w, that each of V * H * W pixels lies in."""
    row = torch.arange(H, device=device) * h // H
    column = torch.arange(W, device=device) * w // W
    frame = torch.arange(V, device=device)
    return ((frame[:, None, None] * h + row[:, None]) * w + column).flatten()


def majority(masks: Tensor, h: int, w: int) -> Tensor:
    """The label that covers most of each patch: masks [V, H, W] >= 0 -> [V, h, w]; ties: the lowest label."""
    V, H, W = masks.shape
    n = int(masks.max()) + 1
    pair = patch_of_pixel(V, h, w, H, W, masks.device) * n + masks.flatten()  # (patch, label)
    return torch.bincount(pair, minlength=V * h * w * n).view(V, h, w, n).argmax(-1)


# ---- 2 allocation and clustering -------------------------------------------------------------------------------------


def allocate(sizes: Sequence[int], budget: int, floor: int = 2) -> list[int]:
    """How many proxies each group gets: exactly min(budget, sum of sizes) in all, at most a group's size, at least
    min(floor, size), the rest in proportion to size by largest remainders (ties: the larger group, then the first).

    When even the floors exceed the budget the floor becomes max(1, budget // G); when G > budget the `budget` largest
    groups get one each. sizes [G] patches per group, all >= 1. (Sec. 3.2, "K_g proportional to |G_g| / L".)
    """
    size = np.asarray(sizes, dtype=np.int64)
    G, budget = len(size), min(budget, int(size.sum()))
    by_size = np.lexsort((np.arange(G), -size))
    if budget < G:
        given = np.zeros(G, dtype=np.int64)
        given[by_size[:budget]] = 1
        return given.tolist()
    floor = floor if np.minimum(size, floor).sum() <= budget else max(1, budget // G)
    given = np.minimum(size, floor)
    while (left := budget - int(given.sum())) > 0:
        room = size - given
        share, remainder = np.divmod(np.where(room > 0, size, 0) * left, size[room > 0].sum())
        full = (room > 0) & (share >= room)
        if full.any():  # it gets all it can hold, and the others share the surplus
            given[full] = size[full]
        else:
            given += share
            given[np.lexsort((np.arange(G), -size, -remainder))[: left - share.sum()]] += 1
    return given.tolist()


def farthest_seeds(points: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Farthest-point seeds of one group: (seed indices [count], nearest seed of every point [n] as 0..count-1).

    points [n, 3], count <= n; the first seed is the point nearest the centroid. The nearest seed comes for free: a
    point changes owner when a new seed is nearer. One small step per seed on the CPU, where 700 steps cost 12 ms; a GPU
    would spend longer on launching them, so only the features of `cluster` ever live there.
    """
    x, y, z = np.ascontiguousarray(points.T)  # separate axes: contiguous reads
    seed = int(np.square(points - points.mean(0)).sum(1).argmin())
    nearest = np.full(len(points), np.inf, dtype=points.dtype)
    owner = np.zeros(len(points), dtype=np.int64)
    seeds = np.empty(count, dtype=np.int64)
    for j in range(count):
        seeds[j] = seed
        distance = np.square(x - x[seed])
        distance += np.square(y - y[seed])
        distance += np.square(z - z[seed])
        owner[distance < nearest] = j
        np.minimum(nearest, distance, out=nearest)
        owner[seed], nearest[seed] = j, -1  # a seed owns itself, also among duplicates, and is chosen once
        seed = int(nearest.argmax())
    return seeds, owner


def lloyd_step(points: np.ndarray, owner: np.ndarray, count: int) -> np.ndarray:
    """One k-means step: the nearest mean of every point; a step that would leave a mean without points is not taken."""
    total = np.stack([np.bincount(owner, weights=c, minlength=count) for c in points.T], 1)
    means = total / np.bincount(owner, minlength=count)[:, None]
    moved = np.argmin(np.square(means).sum(1) - 2 * points @ means.T, axis=1)  # |p|^2 is the same for all means
    return moved if len(np.unique(moved)) == count else owner


def cluster(features: Tensor, points: Tensor, labels: Tensor, budget: int, floor: int = 2, method: str = "fps",
            lloyd: int = 0) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Semantic-aware clustering, Eq. (1)-(3): group patches by label, cluster each group on coordinates, average.

    features [L, C], points [L, 3] metres, labels [L] (any integers). Returns proxy features z [K, C], centres c [K, 3]
    and labels [K], K = min(budget, L), groups contiguous by label. Only coordinates decide who belongs together.
    Raises ValueError on no patches or an unknown method.
    """
    if len(points) == 0:
        raise ValueError("cluster: no patches with a measured point; check the depth and the masks of the scene")
    if method not in CLUSTERING:
        raise ValueError(f"cluster: unknown method {method!r}; known: {', '.join(CLUSTERING)}")
    order = torch.argsort(labels, stable=True)
    groups, sizes = labels[order].unique_consecutive(return_counts=True)
    counts = allocate(sizes.tolist(), budget, floor)
    xyz = points[order].detach().float().cpu().numpy()
    owner, start, K = np.full(len(xyz), -1, dtype=np.int64), 0, 0
    for size, count in zip(sizes.tolist(), counts, strict=True):
        if count:  # a group is left out only when there are more groups than tokens
            members = xyz[start : start + size]
            own = CLUSTERING[method](members, count)
            for _ in range(lloyd):
                own = lloyd_step(members, own, count)
            owner[start : start + size] = own + K
        start, K = start + size, K + count
    owner = torch.from_numpy(owner).to(points.device)
    kept, owner = order[owner >= 0], owner[owner >= 0]
    number = torch.bincount(owner, minlength=K)[:, None]
    mean = lambda x: x.new_zeros(K, x.shape[1], dtype=torch.float32).index_add_(0, owner, x[kept].float()) / number  # noqa: E731
    z, c = mean(features), mean(points)
    return z, c, groups.repeat_interleave(torch.tensor(counts, device=groups.device))


# ---- 3 serialization -------------------------------------------------------------------------------------------------


def bfs_order(centres: Tensor, groups: Tensor, neighbours: int = 6) -> Tensor:
    """Serialization (sec. 3.3, Eq. 5): an order [K] of the proxies, groups contiguous, neighbours near in line.

    Breadth first over groups on the k-NN graph of their centroids, root = the group nearest the origin; then breadth
    first inside each group, from the proxy nearest the last one emitted. Nearer neighbours first; ties break by
    coordinates, so the sequence of centres does not depend on the order of the input. centres [K, 3], groups [K].
    """
    c, g = centres.detach().double().cpu().numpy(), groups.detach().cpu().numpy()
    canonical = np.lexsort((g, c[:, 2], c[:, 1], c[:, 0]))
    names, first, group = np.unique(g[canonical], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))  # name groups by their first proxy, not by their label
    group, c = rank[group], c[canonical]
    centroids = np.stack([c[group == i].mean(0) for i in range(len(names))])
    members = [np.flatnonzero(group == i) for i in range(len(names))]
    out: list[int] = []
    for i in breadth_first(centroids, int(np.square(centroids).sum(1).argmin()), neighbours):
        here = members[i]
        last = c[out[-1]] if out else np.zeros(3)
        start = int(np.square(c[here] - last).sum(1).argmin())
        out += here[breadth_first(c[here], start, neighbours)].tolist()
    return torch.from_numpy(canonical[out]).to(centres.device)


def breadth_first(points: np.ndarray, root: int, neighbours: int) -> list[int]:
    """Breadth-first order of the symmetric k-NN graph of points [n, 3]; a component that ends hands over to the
    unvisited point nearest to any visited one, which is what joining components by their closest pair would do."""
    n = len(points)
    distance = np.square(points[:, None] - points[None]).sum(-1)  # [n, n]
    near = np.argsort(distance, axis=1, kind="stable")[:, 1 : neighbours + 1]
    linked = np.zeros((n, n), dtype=bool)
    np.put_along_axis(linked, near, True, axis=1)
    linked |= linked.T
    order, seen = [root], np.zeros(n, dtype=bool)
    seen[root] = True
    head = 0
    while len(order) < n:
        if head == len(order):  # this component is done
            gap = np.where(seen[:, None] & ~seen[None], distance, np.inf)
            new = np.array([int(gap.min(0).argmin())])
        else:
            new = np.flatnonzero(linked[order[head]] & ~seen)
            new = new[np.argsort(distance[order[head], new], kind="stable")]
            head += 1
        seen[new] = True
        order += new.tolist()
    return order


# ---- 4 hybrid 3D positional encoding, Eq. (4) ------------------------------------------------------------------------


def rotate_height(z: Tensor, height: Tensor, unit: float = 0.05, base: float = 10000.0) -> Tensor:
    """R(c^H) z: rotate feature pairs (2i, 2i+1) by height / unit * base^(-2i/C). R(0) = I; norms are kept.

    z [..., C] with C even, height [...] metres above the floor.
    """
    C = z.shape[-1]
    frequency = base ** (-torch.arange(0, C, 2, device=z.device, dtype=torch.float32) / C)  # [C/2]
    angle = height.float()[..., None] / unit * frequency  # [..., C/2]
    cos, sin = angle.cos().to(z), angle.sin().to(z)
    a, b = z[..., 0::2], z[..., 1::2]  # [..., C/2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)  # [..., C]


class HorizontalFourier(nn.Module):
    """F(c^WxL): learnable Fourier features of the horizontal position (Li et al. 2021, arXiv 2106.02795).

    F(x) = W2 GELU(W1 r), r = [cos(x Wr), sin(x Wr)] / sqrt(D); Wr starts as N(0, 1 / gamma^2), W2 small but not zero.
    """

    def __init__(self, features: int, hidden: int, width: int, gamma: float = 1.0):
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(2, features // 2) / gamma)
        self.lift = nn.Linear(features, hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)
        nn.init.normal_(self.out.weight, std=0.02 / math.sqrt(hidden))

    def forward(self, xy: Tensor) -> Tensor:
        """xy [..., 2] metres -> [..., C]."""
        phase = xy.to(self.frequencies) @ self.frequencies  # [..., D/2]
        r = torch.cat([phase.cos(), phase.sin()], dim=-1) / math.sqrt(2 * phase.shape[-1])  # [..., D]
        return self.out(F.gelu(self.lift(r)))  # [..., C]


# ---- 5 object reference embeddings: pictures of digits and of things -------------------------------------------------

# five rows of three pixels, as octal
DIGITS = ["75557", "26227", "71747", "71717", "55711", "74717", "74757", "71222", "75757", "75717"]


def draw_identifier(number: int, size: int) -> np.ndarray:
    """G_id's picture: white digits on black, [size, size, 3] uint8; three digits where they fit, else two."""
    text = f"{number:03d}" if size >= 11 else f"{number:02d}"
    rows = [[int(bit) for d in text for bit in f"{int(DIGITS[int(d)][r]):03b}0"][:-1] for r in range(5)]
    zoom = size // len(rows[0])
    glyph = np.kron(np.array(rows), np.ones((zoom, zoom))).astype(np.uint8) * 255
    top, left = (size - glyph.shape[0]) // 2, (size - glyph.shape[1]) // 2
    image = np.zeros((size, size, 3), dtype=np.uint8)
    image[top : top + glyph.shape[0], left : left + glyph.shape[1]] = glyph[..., None]
    return image


def draw_category(category: str, colour: str, size: int, folder: str | None = None) -> np.ndarray:
    """G_sem's picture [size, size, 3] uint8: folder/<category>.png where a folder is given, else the drawn icon."""
    if folder is None:
        return data.category_icon(category, colour or "white", size)
    from PIL import Image

    path = Path(folder) / f"{category}.png"
    if not path.exists():
        raise data.DataError(f"no symbol image {path}; add one, or leave `symbols` unset to draw icons")
    return np.asarray(Image.open(path).convert("RGB").resize((size, size)))


# ---- 6 the model -----------------------------------------------------------------------------------------------------


def build_llm(config: Config, vocabulary: int):
    """A small Qwen2.5-VL from its configuration: the same classes that `from_pretrained` loads."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    half = config.width // config.heads // 2  # rotary pairs per head, shared among time, height and width
    text = dict(vocab_size=vocabulary, hidden_size=config.width, intermediate_size=config.hidden,
                num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.heads,
                max_position_embeddings=32768, pad_token_id=0, bos_token_id=1, eos_token_id=1, tie_word_embeddings=True,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6,
                                 "mrope_section": [half - 2 * (3 * half // 8), *[3 * half // 8] * 2]})  # fmt: skip
    vision = dict(depth=config.vision_layers, hidden_size=config.vision_width,
                  intermediate_size=2 * config.vision_width, num_heads=4, patch_size=config.patch,
                  spatial_merge_size=config.merge, out_hidden_size=config.width, temporal_patch_size=2,
                  window_size=max(config.grid) * config.patch * config.merge,
                  fullatt_block_indexes=[config.vision_layers - 1])  # fmt: skip
    whole = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=0,
                             video_token_id=0, vision_start_token_id=0, vision_end_token_id=0)  # fmt: skip
    whole._attn_implementation = config.attention
    return Qwen2_5_VLForConditionalGeneration(whole)


class TinyTower(nn.Module):
    """A convolutional stand-in for the vision tower: [V, H, W, 3] uint8 -> [V, H/8, W/8, C]. Where nothing is
    pre-trained, convolutions learn in a minute the shapes for which a transformer would need an hour."""

    patch = 8  # pixels per token

    def __init__(self, width: int, layers: int, out: int):
        super().__init__()
        self.stem = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in
                                  ((3, width // 4), (width // 4, width // 2), (width // 2, width)))  # fmt: skip
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for _ in range(layers))
        self.spread = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1) for _ in range(layers))
        self.mix = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(layers))
        self.out = nn.Linear(width, out)

    def forward(self, images: Tensor) -> Tensor:
        x = ((images.float() / 255 - 0.5) / 0.27).permute(0, 3, 1, 2)  # [V, 3, H, W]
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.stem[2](F.gelu(self.stem[1](F.gelu(self.stem[0](x)))))  # [V, E, h, w]
        for norm, spread, mix in zip(self.norms, self.spread, self.mix, strict=True):
            x = x + mix(F.gelu(spread(norm(x))))  # [V, E, h, w]
        return self.out(x.permute(0, 2, 3, 1))  # [V, h, w, C]


def qwen_tokens(visual: nn.Module, images: Tensor, inter_frame: bool) -> Tensor:
    """Qwen2.5-VL's vision tower: images [V, H, W, 3] uint8 -> merged tokens [V, h, w, C], every frame an image of its
    own; with inter_frame its full-attention blocks run over all frames as one sequence. H, W: multiples of h, w."""
    p, m, t = visual.config.patch_size, visual.config.spatial_merge_size, visual.config.temporal_patch_size
    V, H, W, _ = images.shape
    h, w = H // (p * m), W // (p * m)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], device=images.device)  # the tower's own normalisation
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], device=images.device)
    x = (images.float() / 255 - mean) / std  # [V, H, W, 3]
    x = x.view(V, h, m, p, w, m, p, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)  # [V, h, w, m, m, 3, p, p]
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, t, -1, -1)  # a still image fills the temporal patch
    x = x.reshape(V * h * w * m * m, -1).to(visual.dtype)  # [patches, 3 * t * p * p]
    grid = torch.tensor([[1, h * m, w * m]] * V, device=images.device)
    joint = {"cu_seqlens": torch.tensor([0, len(x)], dtype=torch.int32, device=images.device)} if inter_frame else {}
    return visual(x, grid_thw=grid, **joint).pooler_output.view(V, h, w, -1)  # [V, h, w, C]


@torch.no_grad()
def start_tiny(model: Model, text: data.TinyText) -> None:
    """Give a model from a configuration what pre-training would: attend to what shares content, copy it unchanged
    (`data.start_decoder`).

    The weights are scaled for a width of 100s, not 1000s; embeddings have unit size and the logits a small gain.
    Numbers start as smooth codes of their value in the very vectors that F and R write into the scene tokens, so that
    reading a coordinate is the same copy as reading a name. All of it is trained on.
    """
    llm, C = model.llm.model.language_model, model.width
    for part in (llm, model.llm.model.visual):
        data.start_weights(part)
    data.start_decoder(llm, model.config.heads)
    table = llm.embed_tokens.weight
    nn.init.normal_(table)

    wave = 2 * math.pi / 0.5 / 2 ** torch.arange(6.0)  # wavelengths 0.5 .. 16 m
    fourier = model.fourier
    fourier.frequencies.copy_(torch.block_diag(wave[None], wave[None]))  # each axis its own
    D, gain = 24, 3**-0.5  # three axes share the unit variance of a position code
    fourier.lift.weight.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))  # GELU(a) - GELU(-a) = a: F starts linear in r
    code = torch.randn(C, D) * math.sqrt(D) * gain / math.sqrt(6)
    fourier.out.weight.copy_(torch.cat([code, -code], dim=1))
    nn.init.normal_(model.anchor, std=gain)
    other = {axis: torch.randn(12, C) / math.sqrt(6) for axis in "wdhl"}
    for token, (axis, value) in text.number.items():
        if axis in "xy":  # the axis' own half of F
            place = torch.tensor([value, 0.0] if axis == "x" else [0.0, value])
            vector = _half(fourier, axis, place) / gain
        elif axis == "z":
            vector = rotate_height(model.anchor, torch.tensor(value), model.config.height_unit) / gain
        else:
            vector = torch.cat([(value * wave).cos(), (value * wave).sin()]) @ other[axis]
        table[token] = vector + 0.3 * torch.randn(C)


def _half(fourier: HorizontalFourier, axis: str, place: Tensor) -> Tensor:
    """The share of F at `place` that comes from one axis, while F is still linear in its features."""
    phase = place @ fourier.frequencies
    r = torch.cat([phase.cos(), phase.sin()]) / math.sqrt(2 * len(phase))
    own = torch.arange(len(r)) % len(phase) < len(phase) // 2
    return fourier.out(F.gelu(fourier.lift(r * (own if axis == "x" else ~own))))


class Model(SceneLanguageModel):
    """Proxy3D around a Qwen2.5-VL: frozen tower -> proxies -> language model. See the file's docstring for shapes."""

    scene_inputs = ("tower", "symbols", "symbols+3d", "proxies")

    def __init__(self, config: Config, text: data.TinyText | data.HubText):
        super().__init__(config, text)
        if config.attention != "sdpa":  # eager would add the mask's booleans, flash attention takes none
            raise data.DataError(f"attention = {config.attention}: packed questions need sdpa's mask; leave it unset")
        if config.llm is None:
            self.llm = build_llm(config, len(text))
            if config.tower == "conv":
                self.llm.model.visual = TinyTower(config.vision_width, config.vision_layers, config.width)
        else:
            from transformers import Qwen2_5_VLForConditionalGeneration

            self.llm = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                config.llm, dtype=getattr(torch, config.dtype), attn_implementation=config.attention)  # fmt: skip
        self.width = C = self.llm.config.text_config.hidden_size
        self.fourier = HorizontalFourier(config.fourier, config.fourier_hidden, C, config.fourier_gamma)
        self.norm, self.anchor = nn.Identity(), None
        if config.llm is None:  # a tower from scratch ends at the scale of the embeddings; a loaded one is left alone
            self.norm = nn.LayerNorm(C, bias=False)
            self.anchor = nn.Parameter(torch.zeros(C))
            start_tiny(self, text)
        self.cache, self.drawn, self.symbol_features, self.contrast = {}, {}, {}, []

    # -- what trains, and on what

    def parts(self) -> dict[str, list[nn.Module | nn.Parameter]]:
        anchor = [] if self.anchor is None else [self.anchor]
        return {"tower": [self.llm.model.visual], "3d": [self.fourier, *anchor],
                "lm": [self.llm.model.language_model, self.llm.lm_head]}  # fmt: skip

    def configure_stage(self, stage: Stage) -> None:
        """See the base class; positions ("3d") are listed by the paper from stage I on, and seen from stage II on."""
        if stage.scene_input == "symbols":
            stage = replace(stage, trains=tuple(name for name in stage.trains if name != "3d"))
        super().configure_stage(stage)
        if "tower" in stage.trains:
            self.symbol_features, self.cache, self.feature_cache = {}, {}, {}

    # -- the vision tower

    @property
    def cell(self) -> int:
        """Pixels per token and side."""
        visual = self.llm.model.visual
        return visual.patch if isinstance(visual, TinyTower) else \
            visual.config.patch_size * visual.config.spatial_merge_size  # fmt: skip

    def look(self, images: Tensor, together: bool = False) -> Tensor:
        """The vision tower: images [V, H, W, 3] uint8 -> tokens [V, h, w, C]; `together`: frames of one scene, which
        may see each other."""
        visual, images = self.llm.model.visual, images.to(self.llm.device)
        if isinstance(visual, TinyTower):
            return self.norm(visual(images))
        return self.norm(qwen_tokens(visual, images, together and self.config.inter_frame))

    @property
    def frame_width(self) -> int:
        """Pixels of a frame's longer side that the tower looks at: what frames should be read with."""
        return max(self.config.grid) * self.cell

    def fit(self, images: Tensor) -> Tensor:
        """Images [V, H, W, 3] uint8, of whatever camera, at exactly the grid's pixels [V, h * cell, w * cell, 3]."""
        want = (self.config.grid[0] * self.cell, self.config.grid[1] * self.cell)
        if tuple(images.shape[1:3]) == want:
            return images
        images = F.interpolate(images.permute(0, 3, 1, 2).float(), want, mode="bilinear", antialias=True)
        return images.round().clamp(0, 255).byte().permute(0, 2, 3, 1)

    def symbols(self, keys: Sequence[tuple]) -> Tensor:
        """Symbol features [len(keys), C]: ("id", 12) or ("category", name, colour); the tower sees each image once."""
        missing = [k for k in dict.fromkeys(keys) if k not in self.symbol_features]
        if missing:
            draw = {"id": lambda i: draw_identifier(i, self.config.symbol),
                    "category": lambda c, colour: draw_category(c, colour, self.config.symbol, self.config.symbols)}
            self.drawn.update({k: draw[k[0]](*k[1:]) for k in missing if k not in self.drawn})
            images = np.stack([self.drawn[k] for k in missing])
            whole = images.shape[1] // self.cell * self.cell
            seen = self.look(torch.from_numpy(images[:, :whole, :whole])).flatten(1, 2).mean(1)
            fresh = dict(zip(missing, self.norm(seen), strict=True))
            if "tower" in self.stage.scene_input:  # the tower is training: nothing may be kept
                return torch.stack([fresh[k] for k in keys])
            self.symbol_features.update({k: v.detach() for k, v in fresh.items()})
        return torch.stack([self.symbol_features[k] for k in keys])

    # -- scenes to tokens

    def feature_settings(self) -> tuple:
        c = self.config
        return (c.budget, c.floor, c.grid, c.frames, c.semantic_grouping, c.inter_frame, c.clustering, c.lloyd,
                c.neighbours)  # fmt: skip

    def feature_weights(self) -> nn.Module:
        return self.llm.model.visual

    def uses_features(self) -> bool:
        return self.stage.scene_input == "proxies"

    @torch.no_grad()
    def compute_features(self, scene: Scene) -> dict[str, Tensor]:
        """All frozen work on one scene: {"z" [K, C] float16, "c" [K, 3] metres, "owner" [K] object id, 0 = none}."""
        config, frames = self.config, scene.frames
        if frames is None:
            raise data.DataError(f"{scene.name}: Proxy3D needs posed frames with depth; this source has points only")
        V = len(frames.colour)
        pick = np.unique(np.linspace(0, V - 1, min(config.frames, V)).round().astype(int))
        colour = self.fit(torch.from_numpy(frames.colour[pick]).to(self.llm.device))  # [V, H', W', 3]
        points = data.unproject(frames.depth[pick], frames.intrinsics[pick], frames.poses[pick])
        f, p, m = patch_triplets(self.look(colour, together=True).float(), torch.from_numpy(points).to(colour.device),
                                 torch.from_numpy(frames.masks[pick]).to(colour.device).long())  # fmt: skip
        if config.semantic_grouping:
            z, c, owner = cluster(f, p, m, config.budget, config.floor, config.clustering, config.lloyd)
            order = bfs_order(c, owner, config.neighbours)
        else:
            z, c, owner = cluster_without_groups(f, p, m, config.budget, config.clustering, config.lloyd)
            order = bfs_order(c, torch.zeros_like(owner), config.neighbours)
        return {"z": z[order].half(), "c": c[order], "owner": owner[order]}

    def cache_features(self, scenes: Sequence[Scene], folder: Path | None = None,
                       rank: int = 0, world: int = 1) -> None:  # fmt: skip
        """Frozen work, once: the pictures of all symbols and, where real proxies are seen, the proxies."""
        things = {(o.category, o.colour) for s in scenes for o in s.objects}
        colours = sorted({*data.COLOURS, *(colour for _, colour in things)})  # recolouring draws any
        categories = sorted({category for category, _ in things})
        if self.stage.scene_input == "tower":  # the names that stage 0 tells apart
            names = [*categories, *colours, *(f"<OBJ{i:03d}>" for i in range(100))]
            self.contrast = sorted({self.text.unk, *(self.text.encode(n)[0] for n in names if n)})
            return
        icons = [("category", c, k) for c in categories for k in (*colours, "white")] * (not self.uses_features())
        self.symbols([*(("id", i) for i in range(100)), *icons])
        super().cache_features(scenes, folder, rank, world)

    def scene_length(self, scene: Scene) -> int:
        """How many tokens the scene will take."""
        if self.uses_features():
            return len(self.load_features(scene)["c"])
        return len(scene.identifiers)

    def encode(self, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        """Scene tokens [B, K, D] and valid [B, K]; what they are depends on the stage."""
        device = self.llm.device
        B, K = len(scenes), max(self.scene_length(s) for s in scenes)
        z = torch.zeros(B, K, self.width, device=device)  # [B, K, D] what is seen
        c = torch.zeros(B, K, 3, device=device)  # [B, K, 3] where
        identifier = torch.full((B, K), -1)  # [B, K] 0..99, -1 = none
        valid = torch.zeros(B, K, dtype=torch.bool, device=device)  # [B, K]
        for b, scene in enumerate(scenes):
            seen, centre, number = (self.proxy_tokens if self.uses_features() else self.symbol_tokens)(scene)
            k = len(seen)
            z[b, :k], c[b, :k], identifier[b, :k], valid[b, :k] = seen, centre, number, True
        if self.stage.scene_input != "symbols":  # spatial encodings act from stage II on
            if self.anchor is not None:
                z = z + self.anchor  # [B, K, D]
            z = rotate_height(z, c[..., 2], self.config.height_unit) + self.fourier(c[..., :2]).to(z)  # Eq. (4)
        used = identifier >= 0
        numbers, index = identifier[used].unique(return_inverse=True)
        if len(numbers):
            f_id = self.symbols([("id", i) for i in numbers.tolist()])[index.to(device)]  # [U, D]
            z = z.masked_scatter(used[..., None].to(device), z[used.to(device)] + f_id)  # [B, K, D]
        return {"tokens": z, "valid": valid}

    def symbol_tokens(self, scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
        """Stages I-III: one "chess piece" per object: f_sem [n, D], centres [n, 3], identifiers [n]."""
        things = [o for o in scene.objects if o.id in scene.identifiers]
        tint = self.config.llm is None or not any(o.category for o in things)
        f_sem = self.symbols([("category", o.category, o.colour if tint else "white") for o in things])
        centres = torch.from_numpy(np.stack([o.box[:3] for o in things])).float()
        order = self.object_order(scene, centres)
        numbers = torch.tensor([scene.identifiers[o.id] for o in things])
        return f_sem[order.to(f_sem.device)], centres[order].to(f_sem.device), numbers[order]

    def object_order(self, scene: Scene, centres: Tensor) -> Tensor:
        """BFS order of the objects; mirroring a scene does not change it, so it is computed once per scene."""
        key = ("order", scene.name)
        if key not in self.cache or len(self.cache[key]) != len(centres):
            self.cache[key] = bfs_order(centres, torch.arange(len(centres)), self.config.neighbours)
        return self.cache[key]

    def proxy_tokens(self, scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
        """Stage IV: real proxies z [K, D], centres [K, 3] turned with the scene, identifiers [K] of their objects."""
        found = self.load_features(scene)
        device = self.llm.device
        turn = torch.from_numpy(scene.turn).float().to(device)
        numbers = torch.tensor([scene.identifiers.get(i, -1) for i in found["owner"].tolist()])
        z = self.norm(found["z"].to(device).to(self.llm.dtype))
        return z.float(), found["c"].to(device) @ turn.T, numbers

    def token_centers(self, scene: Scene) -> np.ndarray:
        """Where the scene's tokens are [K, 3], for pictures."""
        return (self.proxy_tokens if self.uses_features() else self.symbol_tokens)(scene)[1].cpu().numpy()

    def pictures(self, scenes: Sequence[Scene], folder: Path, count: int = 4) -> list[Path]:
        """Some scenes with their segments, boxes, identifiers and proxies, and where the model looks while it answers a
        question; returns the files."""
        paths = []
        for scene in scenes[:count]:
            shown = scene if scene.identifiers else replace(
                scene, identifiers=data.number_objects(scene, np.random.default_rng(0)))  # fmt: skip
            paths.append(folder / f"{scene.name}.png")
            data.draw_scene(shown, paths[-1], tokens=self.token_centers(shown))
            asked = data.question_set([shown], ["ground", "ground_superlative"], 1, 0)[: self.uses_features()]
            for sample in asked:  # the second needs no categories
                paths.append(folder / f"{scene.name}_attention.png")
                said = self.generate(self.batch([(shown, [sample])]))[0]
                draw_attention(self, shown, sample, said, paths[-1])
        return paths

    def answer_pictures(self, scene: Scene, samples: Sequence[Sample], answers: Sequence[str],
                        folder: Path) -> list[Path]:  # fmt: skip
        """Where the model looked for the first of some answers; returns the files (none before proxies are seen)."""
        if self.stage.scene_input != "proxies" or not samples:
            return []
        draw_attention(self, scene, samples[0], answers[0], folder / "ask_attention.png")
        return [folder / "ask_attention.png"]

    @contextlib.contextmanager
    def untrained_tower(self):
        """The same model, but what it sees comes from a tower at its initial weights."""
        visual = self.llm.model.visual
        weights = [p.detach().clone() for p in visual.parameters()]  # state_dict() would shard them again
        kept = self.feature_cache, self.symbol_features, self.feature_folder
        self.feature_cache, self.symbol_features, self.feature_folder = {}, {}, None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            data.start_weights(visual)
        try:
            yield
        finally:
            for p, weight in zip(visual.parameters(), weights, strict=True):
                p.data.copy_(weight)
            self.feature_cache, self.symbol_features, self.feature_folder = kept

    def baselines(self) -> dict:
        """Columns beside the score: only where the tower was trained here."""
        return {} if self.config.llm else {"untrained tower": self.untrained_tower()}

    def run_decoder(self, embeds: Tensor, is_scene: Tensor, positions: Tensor, mask: Tensor, cache=None) -> Tensor:
        """See the base class; proxies take positions like words, t = h = w."""
        return data.last_hidden(self.llm.model.language_model, cache, inputs_embeds=embeds,
                           attention_mask={"full_attention": mask},
                           position_ids=positions.expand(3, -1, -1))  # fmt: skip

    # -- stage 0 of the tiny preset

    def names(self, thing: data.Thing) -> tuple[int, int]:
        """The words of its category and colour; an unknown one is replaced by the other, both by <unk>."""
        category, colour = (self.text.encode(n)[:1] for n in (thing.category, thing.colour))
        return tuple((category or colour or [self.text.unk]) + (colour or category or [self.text.unk]))

    def sightings(self, scene: Scene) -> tuple[np.ndarray, list[np.ndarray]]:
        """Patch labels [V, h, w] and, per object, rows of (view, patch row, patch column) of its middle; found once."""
        key = ("seen", scene.name)
        if key not in self.cache:
            label = majority(torch.from_numpy(scene.frames.masks).long(), *self.config.grid).numpy()  # [V, h, w]
            view, row, column = np.indices(label.shape)
            n = int(label.max()) + 1
            pair = (view * n + label).ravel()  # (view, label)
            count = np.maximum(np.bincount(pair, minlength=len(label) * n), 1)
            middle = [np.bincount(pair, weights=x.ravel(), minlength=len(label) * n) / count for x in (row, column)]
            rows = np.stack([np.repeat(np.arange(len(label)), n), *middle], 1).reshape(-1, n, 3)
            seen = np.bincount(pair, minlength=len(label) * n).reshape(-1, n) > 0
            shown = [o.id for o in scene.objects if o.id < n and seen[:, o.id].any()]
            self.cache[key] = label, [rows[seen[:, i], i] for i in shown]
        return self.cache[key]

    def encoder_loss(self, scenes: Sequence[Scene], crops: int = 6) -> dict[str, Tensor]:
        """Stand-in for vision-language pre-training: the mean feature of a piece of an object names its category and
        colour, in the language model's own word vectors; what belongs to no object is <unk>. So do the symbol images,
        and the pictures of digits name identifiers.

        Trained on crops of half a frame around objects, so that small and rare things are seen as often as large ones,
        and on means over pieces (an object's patches in a quarter of the crop), because proxies are such means.
        """
        (h, w), cell = self.config.grid, self.cell
        h, w = h // 2, w // 2
        quarter = (torch.arange(h) * 2 // h)[:, None] * 2 + (torch.arange(w) * 2 // w)[None]  # [h, w] in 0..3
        images, pieces, names = [], [], {}  # pieces: (crop, object, quarter) of every patch as one number
        for scene in scenes:
            rng = np.random.default_rng(list(scene.identifiers.values()))
            label, seen = self.sightings(scene)
            known = {o.id: self.names(o) for o in scene.objects}
            for _ in range(crops):
                places = seen[rng.integers(len(seen))]
                view, row, column = places[rng.integers(len(places))] + [0, *rng.uniform(-1.5, 1.5, 2)]
                v, top = int(view), int(np.clip(round(row - h / 2), 0, label.shape[1] - h))
                left = int(np.clip(round(column - w / 2), 0, label.shape[2] - w))
                here = torch.from_numpy(label[v, top : top + h, left : left + w])  # [h, w]
                names.update({(len(images), i): known.get(i, (self.text.unk,) * 2) for i in here.unique().tolist()})
                pieces.append((len(images) * 4096 + here) * 4 + quarter)
                frame = self.fit(torch.from_numpy(scene.frames.colour[v : v + 1]))[0]
                images.append(frame[top * cell : (top + h) * cell, left * cell : (left + w) * cell])
        patches = self.look(torch.stack(images)).flatten(0, 2)  # [patches, D]
        piece, which, count = torch.stack(pieces).flatten().unique(return_inverse=True, return_counts=True)
        which, count = which.to(patches.device), count.to(patches.device)
        seen = patches.new_zeros(len(piece), self.width).index_add(0, which, patches) / count[:, None]  # [pieces, D]

        things = [o for s in scenes for o in s.objects[:4]]  # objects come in no order
        numbers = [i for s in scenes for i in list(s.identifiers.values())[:4]]
        symbols = [*(("category", o.category, o.colour) for o in things), *(("id", i) for i in numbers)]
        target = [names[i // 16384, i // 4 % 4096] for i in piece.tolist()]
        target += [*(self.names(o) for o in things), *(self.text.encode(f"<OBJ{i:03d}>") * 2 for i in numbers)]

        features = torch.cat([self.norm(seen), self.symbols(symbols)])  # [R, D]
        words = self.llm.get_input_embeddings().weight.detach()[self.contrast]  # [names, D], frozen in this stage
        target = torch.searchsorted(torch.tensor(self.contrast), torch.tensor(target)).to(words.device)  # [R, 2]
        weight = torch.ones(len(target), device=words.device)  # [R]
        weight[len(seen) :] = 2.0
        weight[: len(seen)][piece // 4 % 4096 == 0] = 0.3  # walls and floor are in every crop
        told = -(0.2 * features @ words.T).log_softmax(-1).gather(1, target).mean(1)  # [R] which names, and
        apart = 1 - F.cosine_similarity(features, words[target].sum(1), dim=-1)  # [R] written as their sum
        apart[len(seen) :] *= 4  # symbols are drawn, not seen: they can be exact
        top = (features[: len(seen)] @ words.T).topk(2).indices  # [pieces, 2]
        both = (top[:, :, None] == target[: len(seen), None]).any(1).all(1).float()  # pieces with both words on top
        loss = ((told + apart) * weight).sum()
        return {"loss": loss, "weight": weight.sum(), "correct": both.mean() * weight.sum()}


# ---- 7 the paper's recipe --------------------------------------------------------------------------------------------

TASKS: dict = {}  # Proxy3D needs no question types beyond data.TASKS

SPACESPAN = {  # supp. Table 2, training splits; its rounded rows give 319K, not 318K. Best proposal's IoU: Chat-Scene
    "ScanQA": Source("scanqa", 26_000), "SQA3D": Source("sqa3d", 26_000),
    "Scan2Cap": Source("scan2cap", 32_000, fit=0.75), "ScanRefer": Source("scanrefer", 32_000, "id", fit=0.75),
    "Multi3DRefer": Source("multi3drefer", 39_000, "id", fit=0.75),
    "MMScan QA": Source("mmscan/qa", 57_000, most=57_000), "MMScan VG": Source("mmscan/vg", 57_000, "id", most=57_000),
    "SR-91K numbers": Source("sr91k", 30_000, "number", most=30_000),
    "SR-91K choices": Source("sr91k", 20_000, "choice", most=20_000),
}  # fmt: skip
_MIX = {"colour": 13, "what": 13, "situated": 26, "caption": 32, "ground": 32, "multi": 39, "where": 29, "exist": 28,
        "ground_relation": 29, "ground_multiple": 28, "count": 10, "vsi_abs_distance": 10, "vsi_object_size": 5,
        "vsi_room_size": 5, "vsi_rel_distance": 10, "vsi_rel_direction": 10}  # fmt: skip  # drawn in SpaceSpan's shares

_RETRIEVE = {"ground": 0.25, "ground_category": 0.2, "id_category": 0.25, "id_colour": 0.2, "colour": 0.1}
_TINY = dict(lr=2e-3, weight_decay=0.01, per_scene=16, batch=256, schedule="constant", warmup=0.1, steps=True)

STAGES = {
    "paper": [  # supp. Table 1; the questions of stages I-III are generated, stage IV's are SpaceSpan's shares
        Stage("I identifiers", {"id_category": 0.5, "ground_category": 0.5}, ("3d", "lm"), "symbols", epochs=1,
              samples=30_000),
        Stage("II coordinates", {"coordinate": 1.0}, ("3d", "lm"), "symbols+3d", epochs=3, samples=30_000,
              score=("rooms/coordinate",)),
        Stage("III relations", {"relation": 0.5, "distance_ids": 0.2, "id_colour": 0.3}, ("lm",), "symbols+3d",
              epochs=3, samples=115_000),
        Stage("IV proxies", _MIX, ("lm",), "proxies", epochs=1, samples=318_000, batch=128, accumulate=2,
              files=SPACESPAN),
    ],
    "tiny": [
        Stage("0 tower", {}, ("tower",), "tower", iterations=1600, batch=16, lr=4e-3, schedule="cosine",
              warmup=0.03),
        Stage("I identifiers", _RETRIEVE, ("3d", "lm"), "symbols", iterations=1100, until=0.96, recolour=True, **_TINY),
        Stage("II coordinates", {"coordinate": 0.45, "ground": 0.12, "id_category": 0.1, "id_colour": 0.1,
                                 "exist": 0.13, "what": 0.1}, ("3d", "lm"), "symbols+3d", iterations=450, until=0.96,
              recolour=True, score=("rooms/coordinate",), **_TINY),
        Stage("III relations", {"subtract": 0.42, "norm": 0.08, "distance_ids": 0.1, "coordinate": 0.06, "ground": 0.06,
                                "id_category": 0.05, "colour": 0.05, "exist": 0.09, "what": 0.05, "relation": 0.04},
              ("lm",), "symbols+3d", iterations=300, recolour=True, **{**_TINY, "batch": 768, "per_scene": 48}),
        Stage("IV proxies", {"ground": 0.1, "ground_multiple": 0.1, "ground_category": 0.05, "multi": 0.03,
                             "id_category": 0.05, "id_colour": 0.03, "colour": 0.11, "what": 0.13, "where": 0.08,
                             "count": 0.08, "exist": 0.1, "caption": 0.03, "coordinate": 0.04, "distance_ids": 0.07},
              ("lm",), "proxies", iterations=1600, files=SPACESPAN, **{**_TINY, "schedule": "trapezoid"}),
    ],
}  # fmt: skip


def recipe(config: Config, stages: list[Stage]) -> list[Stage]:
    """The stages for a configuration. Table 4, without coordinate alignment: no stage II, and F trains in stage IV."""
    if config.coordinate_stage:
        return stages
    kept = [s for s in stages if not s.name.startswith("II ")]
    return [*kept[:-1], replace(kept[-1], trains=("3d", *kept[-1].trains))]


# ---- 8 alternatives the paper compares with --------------------------------------------------------------------------


def dpc_knn(points: np.ndarray, count: int, k: int = 5) -> np.ndarray:
    """Density-peak clustering: owner [n] in 0..count-1 of points [n, 3]. Density from the k nearest points; centres are
    dense points far from any denser one; every point goes to its nearest centre. Ties: the lower index is denser."""
    n = len(points)
    distance = np.sqrt(np.maximum(np.square(points[:, None] - points[None]).sum(-1), 0))  # [n, n]
    density = np.exp(-np.square(np.sort(distance, axis=1)[:, 1 : min(k, n - 1) + 1]).mean(1)) if n > 1 else np.ones(1)
    rank = np.empty(n, dtype=np.int64)
    rank[np.lexsort((np.arange(n), -density))] = np.arange(n)
    denser = rank[None] < rank[:, None]  # [n, n] column is denser than row
    peak = np.where(denser, distance, np.inf).min(1)
    peak[rank == 0] = distance.max()
    centres = np.lexsort((np.arange(n), -density * peak))[:count]
    owner = distance[:, centres].argmin(1)
    owner[centres] = np.arange(count)  # a centre owns itself also among duplicates, so no proxy is empty
    return owner


CLUSTERING = {"fps": lambda points, count: farthest_seeds(points, count)[1], "dpc_knn": dpc_knn}


def cluster_without_groups(features: Tensor, points: Tensor, labels: Tensor, budget: int, method: str = "fps",
                           lloyd: int = 0) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Table 4, "no semantic grouping": one clustering of the whole scene; a proxy's label is its patches' majority
    (ties: the lowest label). Shapes as in `cluster`."""
    classes, which = labels.unique(return_inverse=True)
    hot = F.one_hot(which, len(classes)).to(features)  # averaging one-hot labels counts votes, in cluster's own sums
    both = torch.cat([features.float(), hot.float()], 1)
    z, c, _ = cluster(both, points, torch.zeros_like(labels), budget, 1, method, lloyd)
    C = features.shape[1]
    return z[:, :C], c, classes[z[:, C:].argmax(1)]


# ---- 9 where an answer looked: supp. Fig. 3 --------------------------------------------------------------------------


@torch.no_grad()
def attention_map(model: Model, scene: Scene, sample: Sample) -> Tensor:
    """Supp. Fig. 3: how much the last layer looks at every scene token, over all text queries and heads: [K], sum 1."""
    batch = model.batch([(scene, [sample])])
    device = model.llm.device
    ids, positions, block = (batch[k].to(device) for k in ("ids", "positions", "block"))
    seen = model.encode(batch["scenes"])
    mask = torch.zeros(data.packed_mask(block).shape, device=device, dtype=model.llm.dtype)
    mask = mask.masked_fill(~data.packed_mask(block), torch.finfo(mask.dtype).min)
    language = model.llm.model.language_model
    before = language.config._attn_implementation
    language.set_attn_implementation("eager")  # the fused kernels do not return their weights
    try:
        attention = language(
            inputs_embeds=model.embed(ids, seen, seen["tokens"][0, :0]), attention_mask={"full_attention": mask},
            position_ids=positions.expand(3, -1, -1), use_cache=False,
            output_attentions=True).attentions[-1]  # fmt: skip
    finally:
        language.set_attn_implementation(before)
    looked = attention[0].float().mean(0)[(block[0] > 0)][:, ids[0] == data.SCENE].sum(0)  # [K]
    return looked / looked.sum()


def attention_in_frames(looked: Tensor, centres: Tensor, owner: Tensor, points: Tensor, masks: Tensor) -> Tensor:
    """The attention that every pixel got: that of the nearest proxy of its own object. looked [K], centres [K, 3],
    owner [K], points [..., 3] metres (NaN = missing), masks [...] -> [...], 0 where no proxy stands for the pixel."""
    apart = 100.0  # metres between objects along a fourth axis, so that no other object's proxy is nearest
    place = lambda p, m: torch.cat([p.float(), apart * m[..., None].float()], -1)  # noqa: E731
    seen = torch.isfinite(points).all(-1)  # [...]
    distance, nearest = data.knn(place(points[seen], masks[seen]), place(centres, owner), 1)
    heat = torch.zeros(masks.shape)
    heat[seen] = torch.where(distance[:, 0] < apart / 2, looked[nearest[:, 0]], 0.0)
    return heat


def draw_attention(model: Model, scene: Scene, sample: Sample, said: str, path: Path) -> None:
    """A picture of the `attention_map` of an answer: the proxies over the pale cloud, and the two frames that show most
    of it; the true object (where it is known) and the answered one are outlined."""
    from matplotlib import colormaps

    looked = attention_map(model, scene, replace(sample, steps="", answer=said)).cpu()
    found, f = model.load_features(scene), scene.frames
    step = max(1, math.ceil((f.depth[0].size / 60_000) ** 0.5))
    points = torch.from_numpy(data.unproject(f.depth, f.intrinsics, f.poses)[:, ::step, ::step])
    heat = attention_in_frames(looked, found["c"], found["owner"], points, torch.from_numpy(f.masks[:, ::step, ::step]))
    heat = (heat / looked.max()).numpy()  # [V, H / step, W / step] 1 = the most attended proxy
    colours, images = colormaps["YlOrRd"], []
    for v in sorted(np.argsort(-np.square(heat).sum((1, 2)), kind="stable")[:2]):
        grey = f.colour[v, ::step, ::step].mean(-1, keepdims=True) / 255
        strong = np.sqrt(heat[v])[..., None]
        blend = np.clip((1 - strong) * grey + strong * colours(heat[v])[..., :3], 0, 1)
        images += [(f"frame {v}", f.colour[v]), ("its attention", blend)]
    put = lambda text: data.substitute(text, lambda i: model.object_to_text(scene, i))  # noqa: E731
    lines = [f"answer: {said}" + f"   (true: {put(sample.answer)})" * bool(sample.answer)]
    with data.board(scene, path, put(sample.question), lines, "pale", images) as views:
        views[0].axis.set_title(f"from above: attention of the last layer to {len(looked)} proxies", fontsize=10)
        shade = (looked / looked.max()).numpy()
        order = np.argsort(shade)  # the most attended on top
        dots = [view.dots((found["c"].numpy() @ scene.turn.T)[order], c=looked[order], s=8 + 140 * shade[order],
                          cmap="YlOrRd", vmin=0, ec="0.3", lw=0.5, zorder=3) for view in views]  # fmt: skip
        views[0].axis.legend(*dots[0].legend_elements(num=4, fmt="{x:.1%}"), title="share of attention",
                             loc="upper right", fontsize=8)  # fmt: skip
        for object_id, name, colour in outlined(scene, sample, said, model.object_to_text):
            box = scene.thing(object_id).box
            for view in views:
                view.boxes(box[None], colors=colour, lw=2.2, zorder=4)
                view.labels(box[None, :3] + [0, 0, box[5] / 2], [name], 10, color=colour)


def outlined(scene: Scene, sample: Sample, said: str, refer) -> list[tuple[int, str, str]]:
    """(object id, name, colour) of what `draw_attention` outlines: the true objects and those that the answer names."""
    right = list(sample.targets or sample.about)
    named = [o.id for o in scene.objects if o.id in scene.identifiers and refer(scene, o.id) in said]
    kinds = {(True, True): ("true and answered", "green"), (True, False): ("true", "blue"),
             (False, True): ("answered", "crimson")}  # fmt: skip
    rows = [(i, *kinds[i in right, i in named]) for i in dict.fromkeys(right + named)]
    return [(i, f"{kind}: {scene.thing(i).category or refer(scene, i)}", colour) for i, kind, colour in rows]


# ---- 10 demo and command line ----------------------------------------------------------------------------------------


def build(config: Config, text) -> Model:
    """The model of a configuration."""
    return Model(config, text)


def demo() -> None:
    """One room from pixels to an answer, with real shapes, and a tiny model that learns its questions by heart."""
    torch.manual_seed(0)
    scene = data.room(1)
    scene.identifiers = data.number_objects(scene, np.random.default_rng(0))
    model = Model(Config.tiny(), data.TinyText(data.vocabulary()))
    frames, config = scene.frames, model.config
    with torch.no_grad():
        f = model.look(torch.from_numpy(frames.colour))
        p = torch.from_numpy(data.unproject(frames.depth, frames.intrinsics, frames.poses))
        triplets = patch_triplets(f, p, torch.from_numpy(frames.masks).long())
        z, c, owner = cluster(*triplets, config.budget, config.floor)
        order = bfs_order(c, owner)
    shape = lambda *tensors: ", ".join(str(list(t.shape)) for t in tensors)  # noqa: E731
    print(f"frames [V, H, W, 3]          {shape(frames.colour)}")
    print(f"features [V, h, w, C]        {shape(f)}")
    print(f"triplets f, p, m             {shape(*triplets)}")
    print(f"groups -> proxies z, c       {len(triplets[2].unique())} -> {shape(z, c)}")
    print(f"BFS order, first groups      {owner[order].unique_consecutive()[:8].tolist()}")
    stage = Stage("demo", {"ground": 1.0, "id_colour": 1.0, "colour": 1.0}, ("3d", "lm"), "proxies", iterations=60)
    model.configure_stage(stage)
    model.cache_features([scene])
    samples = data.questions(scene, stage.tasks, 24, np.random.default_rng(1))
    batch = model.batch([(scene, samples)])
    print(f"packed questions [S, T]      {shape(batch['ids'])}, {len(samples)} of them")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    print(f"parameters that train        {sum(p.numel() for p in model.parameters() if p.requires_grad):,}")
    for step in range(stage.iterations):
        out = model(batch)
        loss = out["loss"] / out["weight"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == stage.iterations - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    answer = model.generate(model.batch([(scene, samples[:1])]))[0]
    texts = (samples[0].question, samples[0].answer)
    question, truth = (data.substitute(t, lambda i: model.object_to_text(scene, i)) for t in texts)
    print(f"{question}  ->  {answer}  (true: {truth}; learned by heart, python train.py --model proxy3d learns to see)")


if __name__ == "__main__":
    demo()
