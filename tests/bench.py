"""Speed, measured: `python tests/bench.py proxy3d` (or another of BENCHES) prints a row per claim, each a ratio to
something named and timed in the same run. Best of several repetitions; no time is asserted, so a busy machine only
makes the numbers worse. `segments` measures how well our segments follow objects."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import full_rows

import data
import fase3d
import proxy3d
import spatial3dllm


def best(work, times: int = 3) -> float:
    """Seconds of the fastest of some calls."""
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        spent.append(time.perf_counter() - start)
    return min(spent)


def many_patches(grid: tuple[int, int] = (32, 42), frames: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and labels of 32 x 32 x 42 = 43,008 patches: a procedural room seen by 32 cameras."""
    scene = data.room(5, objects=40, views=frames, size=168)
    points = torch.from_numpy(data.unproject(scene.frames.depth, scene.frames.intrinsics, scene.frames.poses))
    none = torch.zeros(frames, *grid, 1)
    _, p, m = proxy3d.patch_triplets(none, points, torch.from_numpy(scene.frames.masks).long())
    return p, m


def clustering(budget: int = 700) -> None:
    """Proxy3D's clustering against scikit-learn's KMeans in the same groups with the same allocation."""
    from sklearn.cluster import KMeans

    p, m = many_patches()
    narrow = torch.zeros(len(p), 1)
    groups = [p[m == g].numpy() for g in m.unique()]
    counts = proxy3d.allocate([len(g) for g in groups], budget)

    def kmeans() -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fits = [KMeans(k, n_init=1, random_state=0).fit(g) for g, k in zip(groups, counts, strict=True)]
        return sum(np.linalg.norm(g - f.cluster_centers_[f.labels_], axis=1).sum()
                   for g, f in zip(groups, fits, strict=True)) / len(p)  # fmt: skip

    theirs = best(kmeans)
    print(f"clustering, {len(p):,} patches in {len(groups)} groups -> {budget} proxies (coordinates, without features)")
    near = kmeans()
    print(f"  scikit-learn KMeans                 {1000 * theirs:8.1f} ms   mean distance to own centre {near:.4f} m")
    for name, steps in (("farthest seeds", 0), ("farthest seeds + 1 Lloyd step", 1)):
        ours = best(lambda steps=steps: proxy3d.cluster(narrow, p, m, budget, lloyd=steps), 5)
        total = 0.0
        for g, k in zip(groups, counts, strict=True):
            own = proxy3d.CLUSTERING["fps"](g, k)
            for _ in range(steps):
                own = proxy3d.lloyd_step(g, own, k)
            means = np.stack([np.bincount(own, weights=c, minlength=k) for c in g.T], 1) / np.bincount(own)[:, None]
            total += np.linalg.norm(g - means[own], axis=1).sum()
        print(f"  {name:35s} {1000 * ours:8.1f} ms   {total / len(p):.4f} m   {theirs / ours:.1f} x faster, "
              f"{total / len(p) / near:.2f} x the distance")  # fmt: skip
    wide = torch.randn(len(p), 3584)
    averaging = best(lambda: proxy3d.cluster(wide, p, m, budget)) - best(lambda: proxy3d.cluster(narrow, p, m, budget))
    print(f"  averaging 3,584-wide features       {1000 * averaging:8.1f} ms")
    _, c, label = proxy3d.cluster(narrow, p, m, budget)
    print(f"  BFS order of the {len(c)} proxies          {1000 * best(lambda: proxy3d.bfs_order(c, label)):8.1f} ms")


def rooms(scenes: int = 950, run: float = 600.0) -> None:
    """Procedural rooms against the ten minutes of the default run."""
    one = best(lambda: [data.room(seed) for seed in range(10)], 2) / 10
    print(f"rooms, 12 views of 96 x 96: {1000 * one:.1f} ms each on one core; {scenes} rooms on two cores "
          f"{scenes * one / 2:.0f} s = {100 * scenes * one / 2 / run:.1f} % of a {run:.0f} s run")  # fmt: skip


def latency() -> None:
    """Supplementary Table 3's columns for the tiny model, and training tokens per second."""
    torch.manual_seed(0)
    model = proxy3d.Model(proxy3d.Config.tiny(), data.TinyText(data.vocabulary()))
    stage = proxy3d.STAGES["tiny"][-1]
    model.configure_stage(stage)
    scenes = [data.augment(data.room(seed), np.random.default_rng(seed)) for seed in range(16)]
    print("latency in seconds, tiny model (paper, 7B on a GPU: 9.4 / 2.9 / 1.1 at batch 8, 16.2 / 5.6 / 1.5 at 16)")
    print("  batch   encoder   clustering   LLM (8 new tokens)   per question")
    for B in (8, 16):
        colours = [torch.from_numpy(s.frames.colour) for s in scenes[:B]]
        with torch.no_grad():
            encoder = best(lambda colours=colours: [model.look(c) for c in colours])
            whole = best(lambda B=B: [model.proxies(s) for s in scenes[:B]])
        model.cache_features(scenes[:B])
        groups = [(s, data.questions(s, {"ground": 1.0}, 1, np.random.default_rng(0))) for s in scenes[:B]]
        batch = model.batch(groups)
        llm = best(lambda batch=batch: model.generate(batch, max_new_tokens=8))
        print(f"  {B:5d} {encoder:9.3f} {whole - encoder:12.3f} {llm:20.3f} {(whole + llm) / B:14.3f}")
    groups = [(s, data.questions(s, stage.tasks, stage.per_scene, np.random.default_rng(0))) for s in scenes]
    batch = model.batch(groups)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step() -> None:
        out = model(batch)
        (out["loss"] / out["weight"]).backward()
        optimizer.step()
        optimizer.zero_grad()

    rows = [data.collate([(s, [q])], model.text, [model.scene_length(s)], model.refer, stage.steps)
            for s, qs in groups for q in qs]  # fmt: skip
    apart = sum(r["ids"].numel() for r in rows)
    spent = best(step, 5)
    questions = sum(len(qs) for _, qs in groups)
    packed = batch["ids"].numel()
    print(f"training step, stage IV: {spent:.3f} s, {packed / spent:,.0f} tokens/s, "
          f"{questions / spent:,.0f} questions/s; packing reads {packed:,} tokens where one row per question reads "
          f"{apart:,} ({apart / packed:.1f} x)")


# ---- Fase3D ----------------------------------------------------------------------------------------------------------


def hilbert_by_bits(cells: torch.Tensor, bits: int) -> torch.Tensor:
    """The same keys with a column per bit, the form in which public code mostly has the algorithm."""
    x = ((cells[..., None] >> torch.arange(bits - 1, -1, -1)) & 1).bool()  # [N, 3, bits]
    for level in range(bits):
        for axis in range(3):
            turned = x[:, axis, level]
            x[:, 0, level + 1 :] ^= turned[:, None]
            swap = ~turned[:, None] & (x[:, 0, level + 1 :] ^ x[:, axis, level + 1 :])
            x[:, axis, level + 1 :] ^= swap
            x[:, 0, level + 1 :] ^= swap
    gray = x.transpose(1, 2).flatten(1)  # [N, 3 bits]
    shift = 1
    while shift < gray.shape[1]:
        gray = gray ^ F.pad(gray[:, :-shift], (shift, 0))
        shift *= 2
    return (gray.long() << torch.arange(3 * bits - 1, -1, -1)).sum(1)


def curve_keys(N: int = 50_000, bits: int = 10) -> None:
    """Keys of random cells."""
    cells = torch.randint(0, 2**bits, (N, 3), generator=torch.Generator().manual_seed(0)).int()
    assert torch.equal(fase3d.hilbert(cells, bits), hilbert_by_bits(cells, bits))
    slow = best(lambda: hilbert_by_bits(cells, bits))
    print(f"keys of {N:,} points, {bits} bits (goal: Hilbert <= 20 ms on one core)")
    for name, keys in (("Hilbert", fase3d.hilbert), ("Morton", fase3d.morton)):
        spent = best(lambda keys=keys: keys(cells, bits), 10)
        print(f"  {name:8s} {1000 * spent:7.2f} ms")
        if name == "Hilbert":
            print(f"  the same with a column per bit {1000 * slow:.1f} ms: {slow / spent:.0f} x")


def furnished(N: int, objects: int = 40, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Points [N, 3] of a procedural room and their superpoints [N]."""
    scene = data.room(seed, objects=objects, views=0, points=N)
    return torch.from_numpy(scene.points), torch.from_numpy(scene.superpoints)


def superpoint_graph(points: torch.Tensor, owner: torch.Tensor, k: int = 8, stride: int = 16) -> torch.Tensor:
    """From bare points to edges [E, 2], sorting included; four curves."""
    order = fase3d.canonical(points)
    points, owner = points[order], owner[order]
    centres = fase3d.superpoint_mean(points, owner, int(owner.max()) + 1)
    votes = fase3d.vote_graph(points, owner, list(fase3d.CURVES)[:4], stride=stride)
    return fase3d.nearest_edges(*votes, centres, k)[0]


def graph_time() -> None:
    """The window-voting graph against a KD-tree's 8 nearest neighbours of every point, over sizes of a cloud."""
    sizes, ours, theirs = (12_500, 25_000, 50_000, 100_000, 200_000, 400_000), [], []
    print("superpoint graph by window voting (goal: time ~ N^1.1 or less; faster than the KD-tree from 50,000 up)")
    print("   points   superpoints   edges      graph   KD-tree, 8 neighbours   ratio")
    for N in sizes:
        points, owner = furnished(N)
        edges = superpoint_graph(points, owner)
        ours.append(best(lambda p=points, o=owner: superpoint_graph(p, o)))
        theirs.append(best(lambda p=points: data.knn(p, p, 9)))  # the nearest is the point itself
        print(f"  {N:7,d} {int(owner.max()) + 1:13,d} {len(edges):7,d} {1000 * ours[-1]:7.0f} ms "
              f"{1000 * theirs[-1]:20.0f} ms {theirs[-1] / ours[-1]:7.2f}")  # fmt: skip
    power = [np.polyfit(np.log(sizes), np.log(t), 1)[0] for t in (ours, theirs)]
    print(f"  fitted: graph ~ N^{power[0]:.2f}, KD-tree ~ N^{power[1]:.2f}")


def boundary_distances(points: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Exact: the smallest distance between points of two superpoints, all pairs [M, M] (infinite to itself)."""
    M = int(owner.max()) + 1
    near = torch.full((M * M,), math.inf)
    for p, o in zip(points.split(500), owner.split(500), strict=True):
        near.scatter_reduce_(0, (o[:, None] * M + owner).flatten(), torch.cdist(p, points).flatten(), "amin")
    return near.view(M, M).fill_diagonal_(math.inf)


def nearest_pairs(distance: torch.Tensor, k: int) -> set[tuple[int, int]]:
    """Every node with its k nearest, in both directions."""
    near = distance.topk(k, largest=False).indices.tolist()
    return {pair for a, others in enumerate(near) for b in others for pair in ((a, b), (b, a))}


def graph_quality(k: int = 8) -> None:
    """Edges against the exact graph: each superpoint with the k at the smallest boundary distance. In sparse clouds of
    a tiny run, and in one as dense as the paper's, where windows reach less far."""
    for rooms, N in ((5, 4096), (1, 20_000)):
        rows: dict[str, list] = {}
        for seed in range(rooms):
            points, owner = furnished(N, 12, seed)
            M = int(owner.max()) + 1
            near = boundary_distances(points, owner)
            exact = nearest_pairs(near, k)
            centres = fase3d.superpoint_mean(points, owner, M)
            apart = torch.cdist(centres, centres).fill_diagonal_(math.inf)
            found = {"nearest centres": nearest_pairs(apart, k)}
            for stride in (16, 4, 1):
                edges = superpoint_graph(points, owner, k, stride)
                found[f"window voting, stride {stride}"] = {tuple(e) for e in edges.tolist()}
            for name, edges in found.items():
                right, gap = len(edges & exact), float(torch.stack([near[a, b] for a, b in edges]).mean())
                rows.setdefault(name, []).append((right / len(edges), right / len(exact), len(edges) / M, gap))
        print(f"edges against the exact graph of smallest boundary distance, k = {k}, the paper's stride 16; "
              f"rooms: {rooms}, points {N:,}, {N / M:.0f} per superpoint")  # fmt: skip
        print("                              precision   recall   edges per superpoint   mean boundary distance")
        for name, values in rows.items():
            p, r, e, gap = np.mean(values, 0)
            print(f"  {name:27s} {p:9.3f} {r:8.3f} {e:15.1f} {gap:20.3f} m")


def count_tokenizer(model, found: dict) -> dict[str, tuple[int, float]]:
    """Parameters and multiply-adds of each part for one scene, from the sizes alone. An FFT of length L counts
    L log2 L, biases, norms and activations nothing; what is computed once per scene and cached stands apart."""
    c, D = model.config, model.width
    N, M, T, P = len(found["index"]), found["orders"].shape[1], len(found["seed"]), len(found["token"])
    d, h, L, near = c.dim, c.hidden, c.window, c.prompt_neighbours
    windows = c.curves * (-(-M // (L // 2)) + 1) * d
    size = lambda *parts: sum(p.numel() for m in parts for p in m.parameters())  # noqa: E731
    initial, merger, coordinate = model.initial, model.merger, model.coordinate
    return {
        "points: first linear map": (size(initial.lift, initial.norm), N * h * initial.lift.in_features),
        "points: Fourier code": (0, N * d / 2),
        "superpoints: second linear map": (size(initial.out), M * h * d),
        "enhancer: FFT and back": (0, windows * 2 * L * math.log2(L)),
        "enhancer: Hann twice, gate": (size(model.enhancer), windows * (2 * L + L + 2)),
        "graph pooling": (0, 2 * P * d),
        "phi": (size(merger.norm, merger.phi), T * d * d),
        "adapter to the LLM's width": (size(merger.lift, merger.out, merger.end), T * (d * d + d * D)),
        "places of tokens": (size(model.place), T * 36 * D),
        "coordinate token, for a click": (size(coordinate), 3 * T + near * d / 2 + 2 * d * d + d * D),
        "once per scene: farthest points": (0, 3 * N * T),
    }


def tokenizer(N: int = 50_000, M: int = 1024) -> None:
    """The paper's tokenizer: parameters, multiply-adds, and seconds part by part."""
    scene = data.room(5, objects=40, views=0, points=N)
    points = torch.from_numpy(scene.points)
    scene.superpoints = data.knn(points, points[data.farthest_point_sampling(points, M)], 1)[1][:, 0].numpy()
    scene.identifiers = data.number_objects(scene, np.random.default_rng(0))
    torch.manual_seed(0)
    small = dict(layers=1, attention_heads=16, ffn=16, adapted_layers=0)  # the LLM: its width is all that matters here
    model = fase3d.Model(fase3d.Config.paper(llm=None, width=2048, **small), data.TinyText(data.vocabulary())).eval()
    found = model.load_features(scene)
    d, H, L, C = model.config.dim, model.config.heads, model.config.window, model.config.curves
    print(f"tokenizer: {N:,} points, d {d}, {M:,} superpoints, {H} heads, windows of {L}, {len(found['seed'])} tokens, "
          f"width {model.width:,}")  # fmt: skip
    rows = count_tokenizer(model, found)
    for name, (parameters, work) in rows.items():
        print(f"  {name:34s} {parameters:12,d} parameters {work / 1e6:9.1f} M multiply-adds")
    parameters, work = (sum(r[i] for r in rows.values()) for i in range(2))
    parts = model.parts()
    assert parameters == sum(p.numel() for k in ("tokenizer", "place", "prompt") for p in parts[k])
    print(f"  {'all':34s} {parameters:12,d} parameters {work / 1e6:9.1f} M multiply-adds (FFT of length L: L log2 L)")
    print(f"  paper: 10.54 M parameters, 2.04 G: {10.54e6 / parameters:.2f} x ours, {2.04e9 / work:.2f} x ours")

    owner, orders = found["owner"].long(), found["orders"].long()
    features = torch.from_numpy(model.features(scene, found["index"].numpy()))
    places = fase3d.unit_box(points[found["index"].long()])
    valid = torch.ones(1, M, dtype=torch.bool)
    with torch.no_grad():
        S = model.initial(features, places, owner, M)  # [M, d]
        after = model.enhancer(S[None], valid, orders[None])[0]
        keys = ("seed", "token", "member", "strength")
        seed, token, member, strength = (found[k].long() if k != "strength" else found[k] for k in keys)
        pooled = lambda: fase3d.graph_pool(after, seed, token, member, strength, len(seed))  # noqa: E731
        former = fase3d.QFormer(len(seed), d, H)
        attention = torch.nn.MultiheadAttention(d, H, batch_first=True)
        u = torch.randn(C, -(-M // (L // 2)) + 1, d, L)  # the windows of a scene
        gate = F.softplus(model.enhancer.theta)  # [H, L/2 + 1]
        wide = gate.repeat_interleave(d // H, 0)
        circulant = torch.fft.irfft(torch.fft.rfft(torch.eye(L)) * gate[:, None], n=L)  # [H, L, L]
        fft = lambda: torch.fft.irfft(torch.fft.rfft(u) * wide, n=L)  # noqa: E731
        dense = lambda: (u.unflatten(2, (H, -1)) @ circulant).flatten(2, 3)  # noqa: E731
        assert (fft() - dense()).abs().max() < 1e-4
        many, all_ = S.repeat(4, 1)[None], valid.repeat(1, 4)  # 4 M superpoints
        line = torch.arange(4 * M).repeat(1, C, 1)
        times = {
            "points to superpoints": lambda: model.initial(features, places, owner, M),
            "merging: pooling, phi, adapter": lambda: model.merger(pooled()),
            "the whole tokenizer": lambda: model.merge([scene]),
            "once per scene: curves, graph, seeds": lambda: model.geometry(scene),
            "enhancer": lambda: model.enhancer(S[None], valid, orders[None]),
            "self-attention in its place": lambda: attention(S[None], S[None], S[None], need_weights=False),
            "4 x the superpoints: enhancer": lambda: model.enhancer(many, all_, line),
            "4 x the superpoints: self-attention": lambda: attention(many, many, many, need_weights=False),
            "the filter in its windows, FFT": fft,
            "the same as dense circulant matrices": dense,
            "graph pooling": pooled,
            "Q-Former in its place": lambda: former(after, [M], [len(seed)]),
        }
        spent = {name: best(work, 5) for name, work in times.items()}
    for name, seconds in spent.items():
        print(f"  {name:38s} {1000 * seconds:9.1f} ms")
    ratio = lambda a, b: spent[a] / spent[b]  # noqa: E731
    less = (4 * M * d * d + 2 * M * M * d) / (rows["enhancer: FFT and back"][1] + rows["enhancer: Hann twice, gate"][1])
    print(f"  self-attention / enhancer: {ratio('self-attention in its place', 'enhancer'):.1f} x the time, "
          f"{ratio('4 x the superpoints: self-attention', '4 x the superpoints: enhancer'):.1f} x with 4 x the "
          f"superpoints; {less:.0f} x the multiply-adds, {4 * (d * d + d):,} parameters against {H * (L // 2 + 1)}")
    dense = ratio("the same as dense circulant matrices", "the filter in its windows, FFT")
    pooling = ratio("Q-Former in its place", "graph pooling")
    print(f"  dense circulants / FFT {dense:.1f} x; Q-Former / graph pooling {pooling:.0f} x")


# ---- Spatial 3D-LLM --------------------------------------------------------------------------------------------------


PAPER = dict(centres=(2048, 1024, 512, 256), samples=(64, 32, 16, 16), pairs=2, feature=256, spread=0.0,
             spread_normal=0.0, referents=256, context_heads=8, fourier=128)  # fmt: skip


def parts_of(scene: data.Scene, config: spatial3dllm.Config) -> list[float]:
    """Seconds of one scene's geometry, encoder, three modules and a distance answer of 24 tokens."""
    torch.manual_seed(0)
    model = spatial3dllm.Model(config, data.TinyText(data.vocabulary()))
    model.configure_stage(data.Stage("", {}, (), "referents", steps=True))
    sample = data.questions(scene, {"modle_distance": 1.0}, 1, np.random.default_rng(0))

    def geometry() -> None:
        model.cache.clear()
        model.cloud(scene)

    with torch.no_grad():
        first, cloud, turn = best(geometry), [model.cloud(scene)], torch.eye(3)[None]
        second = best(lambda: model.encode_clouds(cloud, turn))
        seeds = model.encode_clouds(cloud, turn)
        third = best(lambda: model.referents(*seeds), 5)
        batch = model.batch([(scene, sample)])
        whole = best(lambda: model.generate(batch, 24))
    return [first, second, third, whole - third]


def spatial() -> None:
    """Spatial 3D-LLM's parts against the number of points and of objects."""
    data.adopt(spatial3dllm)
    print("seconds per scene: geometry (once), encoder (once), three modules, answer; scenes per second new and cached")
    cases = [(f"tiny, 12 objects, {n:6,} points", 12, n, {}) for n in (2048, 8192, 32_768)]
    cases += [(f"tiny, {n} objects, 2,048 points", n, 2048, {}) for n in (50, 100, 200)]
    cases += [("the paper's sizes but the LLM, 40,000 points", 12, 40_000, PAPER)]
    for name, objects, points, sizes in cases:
        scene = data.room(5, objects=objects, views=0, points=points)
        *once, modules, answer = parts_of(scene, spatial3dllm.Config.tiny(points=points, **sizes))
        row = " ".join(f"{t:8.4f}" for t in (*once, modules, answer))
        print(f"  {name:45s} {row} {1 / (sum(once) + modules + answer):8.1f} {1 / (modules + answer):8.1f}")


# ---- long videos and large clouds ------------------------------------------------------------------------------------


def apart(code: str) -> tuple[float, float]:
    """Seconds, and GB beyond the imports, that some lines take in a process of their own (on Linux)."""
    around = ("import re, sys, time; sys.path.insert(0, sys.argv[1]); import av, data, scipy.spatial\n"
              "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 2**20\n"
              f"before, start = peak(), time.perf_counter()\n{code}\n"
              "print(time.perf_counter() - start, peak() - before)")  # fmt: skip
    root = str(Path(__file__).resolve().parents[1])
    said = subprocess.run([sys.executable, "-c", around, root], capture_output=True, text=True, check=True).stdout
    return tuple(map(float, said.split()))


def large_inputs(minutes: int = 10, points: int = 4_000_000) -> None:
    """A long video and a cloud of millions of points: what reading them takes."""
    import av

    still = np.asarray(data.room(1, views=1, size=360, points=0).frames.colour[0])
    with tempfile.TemporaryDirectory() as folder:
        for name, length in (("short", minutes * 30), ("long", minutes * 1800)):  # 10 seconds and 10 minutes
            with av.open(f"{folder}/{name}.mp4", "w") as container:
                stream = container.add_stream("libx264", rate=30)
                stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
                stream.options = {"preset": "ultrafast", "g": "250"}
                wide = np.tile(still, (1, 3, 1))
                for i in range(length):
                    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(wide[:, i % 360 : i % 360 + 640]), "rgb24")
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
            row = apart(f"data.read_video({folder + '/' + name + '.mp4'!r})")
            print(f"32 of the {length:6d} frames of a video, 640 x 360: {row[0]:5.1f} s, {row[1]:.2f} GB")
        scene, rng = data.room(1, views=0, points=200_000), np.random.default_rng(0)
        for count in (points // 10, points):
            pick = rng.integers(0, len(scene.points), count)
            moved = (scene.points[pick] + rng.normal(0, 0.01, (count, 3))).astype(np.float32)
            data.write_ply(f"{folder}/cloud.ply", moved, scene.colours[pick], scene.normals[pick])
            row = apart(f"data.open_scene({folder + '/cloud.ply'!r})")
            print(f"a cloud of {count:9d} points read and segmented:     {row[0]:5.1f} s, {row[1]:.2f} GB")


# ---- own segments ----------------------------------------------------------------------------------------------------


def best_iou(found: np.ndarray, true: np.ndarray) -> dict[int, float]:
    """Give each true label (1 and up) the IoU with the found one that fits it best; arrays of one shape, 0 = none."""
    best = {}
    for i in np.unique(true[true > 0]).tolist():
        own = true == i
        rivals = np.unique(found[own & (found > 0)])
        best[i] = max(((own & (found == j)).sum() / (own | (found == j)).sum() for j in rivals), default=0.0)
    return best


def point_iou(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """IoU [n, m] of point sets: labels found [N] of 0..n and true [N] of 0..m; rows and columns are labels 1 and up."""
    n, m = int(found.max(initial=0)) + 1, int(true.max(initial=0)) + 1
    both = np.bincount(found * m + true, minlength=n * m).reshape(n, m)
    either = both.sum(1, keepdims=True) + both.sum(0) - both
    return (both / np.maximum(either, 1))[1:, 1:]


def dbscan(points: np.ndarray, normals: np.ndarray, colours: np.ndarray, superpoints: np.ndarray) -> np.ndarray:
    """Clusters [N] of 1 and up, 0 = none, of what is left when our own shell is taken away: scikit-learn's DBSCAN on
    coordinates. Of the radii 1.5, 2, 2.5, 3.5 and 5 times the points' spacing 2.5 was best on validation rooms."""
    from sklearn.cluster import DBSCAN

    spacing = data.neighbour_pairs(points, 8)[2]
    thing = ~data.find_shell(points, normals, data.hue_of(colours), superpoints, spacing)
    label = np.zeros(len(points), np.int64)
    label[thing] = DBSCAN(eps=2.5 * spacing, min_samples=6).fit(points[thing]).labels_ + 1
    return label


SEGMENTERS = {
    "superpoints, not merged": lambda p, n, c, s: s + 1,
    "DBSCAN without the shell": dbscan,
    "superpoints, merged": lambda p, n, c, s: data.merge_segments(p, n, c, s),
}


def segment_scores(scene: data.Scene, least: int = 10) -> dict[str, np.ndarray]:
    """For each of SEGMENTERS and every true object with `least` points in the cloud fused from the frames: the best IoU
    with a segment as point sets and as boxes [n, 2]; and in the last row how many segments there are."""
    points, colours, normals = data.surface(scene)
    true = data.read_masks(points, scene.frames)
    seen = [o for o in scene.objects if (true == o.id).sum() >= least]
    superpoints = data.over_segment(points, normals)
    scores = {}
    for name, segment in SEGMENTERS.items():
        found = segment(points, normals, colours, superpoints)
        boxes = np.stack([data.extent(points[found == i]) for i in range(1, found.max() + 1)])
        by_points = point_iou(found, true).max(0)[[o.id - 1 for o in seen]]
        by_boxes = data.box_iou(boxes, np.stack([o.box for o in seen])).max(0)
        scores[name] = np.stack([by_points, by_boxes, np.full(len(seen), len(boxes) / len(seen))], 1)
    return scores


def segments(count: int = 60) -> None:
    """Whether our segments follow objects: rooms that nothing was tuned on, seen by RGB-D cameras."""
    first = data.ROOM_SEEDS["test"].start
    for size, views in ((96, 12), (240, 16)):
        rows = [segment_scores(data.room(seed, views=views, size=size)) for seed in range(first, first + count)]
        things = sum(len(next(iter(r.values()))) for r in rows)
        print(f"own segments against the {things} objects that are seen in {count} test rooms, "
              f"{views} views of {size} x {size} pixels: best IoU of each object")
        print("                              as points: mean  > 0.25  > 0.5   as boxes: mean  > 0.25  > 0.5   segments")
        for name in SEGMENTERS:
            best, box, number = np.concatenate([r[name] for r in rows]).T
            cells = [v for x in (best, box) for v in (x.mean(), (x > 0.25).mean(), (x > 0.5).mean())]
            print("  {:27s} {:15.3f} {:7.3f} {:6.3f} {:16.3f} {:7.3f} {:6.3f} {:8.1f} per object".format(
                name, *cells, number.mean()))  # fmt: skip


KITCHEN = Path(__file__).resolve().parents[2] / "shared/data/7scenes_redkitchen"


def draw_segments() -> None:
    """The README's picture: real frames and a procedural room, in their own colours and as our segments."""
    from matplotlib.figure import Figure
    from PIL import Image

    path = Path(__file__).resolve().parents[1] / ".github/segments.png"
    if not KITCHEN.exists():
        print(f"no real frames at {KITCHEN}: {path.name} was not drawn")
        return
    rooms = {"real RGB-D frames (7-Scenes, red kitchen)": data.read_rgbd(KITCHEN),
             "procedural room": data.room(data.ROOM_SEEDS["test"].start + 6, size=240, views=16)}  # fmt: skip
    figure, size = Figure(figsize=(12, 9.4)), (440, 590)
    for column, (name, scene) in enumerate(rooms.items()):
        own = data.with_own_segments(scene)
        cloud = data.shown_cloud(own)
        for row, look in enumerate(("true", "segments")):
            axis = figure.add_axes((0.005 + 0.5 * column, 0.505 - 0.5 * row, 0.49, 0.465))
            view = data.perspective(axis, size, cloud)
            view.show(cloud, look)
            axis.set_title(f"{name}: {len(own.objects)} segments of our own" if row else name, fontsize=11)
            if row:
                shades = 0.65 * data.palette(len(own.objects))[1:]
                view.boxes(np.stack([o.box for o in own.objects]), colors=shades, lw=0.8)
    figure.savefig(path, dpi=85)
    fewer = np.minimum((np.asarray(Image.open(path).convert("RGB")).astype(int) + 4) // 8 * 8, 255)  # half the file
    Image.fromarray(fewer.astype(np.uint8)).save(path, optimize=True)
    print(f"picture: {path} ({path.stat().st_size / 1024:.0f} KB)")


# ---- questions about one scene, all three ----------------------------------------------------------------------------

WIDE = dict(width=512, layers=8)
ASKED = {  # name -> (paper, changes to its tiny preset); the sizes of scenes are the papers' own
    "Proxy3D, tiny": (proxy3d, {}),
    "Proxy3D, width 512, 8 layers": (proxy3d, dict(**WIDE, heads=8, hidden=2048, budget=700)),
    "Fase3D, tiny": (fase3d, {}),
    "Fase3D, width 512, 8 layers": (fase3d, dict(**WIDE, attention_heads=8, ffn=2048, tokens=256)),
    "Spatial 3D-LLM, tiny": (spatial3dllm, {}),
    "Spatial 3D-LLM, width 512, 8 layers": (spatial3dllm, dict(**WIDE, heads=8, hidden=2048, referents=256)),
}


def ask_model(model: torch.nn.Module, scene: data.Scene, samples: list[data.Sample], tokens: int) -> list[float]:
    """Seconds for the first question and for all: generate, full rows, from the opened scene, with the prefix kept.
    Raises RuntimeError where the answers differ."""
    batches = [model.batch([(scene, samples[:n])]) for n in (1, len(samples))]
    answers = model.generate(batches[1], tokens)
    alone = [model.generate(model.batch([(scene, [s])]), tokens)[0] for s in samples]
    if not answers == alone == full_rows.answer(model, batches[1], tokens) or len(set(answers)) < len(answers) / 2:
        raise RuntimeError("answers differ between alone, together and in full rows, or are all one")
    kept: dict = {}

    def whole(n: int) -> None:
        model.cache.clear()
        model.generate(model.batch([(scene, samples[:n])]), tokens)

    times = [best(lambda b=b: model.generate(b, tokens), 5) for b in batches]
    times += [best(lambda b=b: full_rows.answer(model, b, tokens)) for b in batches]
    times += [best(lambda n=n: whole(n), 5) for n in (1, len(samples))]
    return times + [best(lambda b=b: model.generate(b, tokens, kept), 5) for b in batches]


def ask(questions: int = 10, tokens: int = 16) -> None:
    """One question against ten about one scene, all written to the same length by models with random weights; beside
    them full rows: every question with the scene of its own."""
    scene = data.room(5, objects=40)
    scene.identifiers = data.number_objects(scene, np.random.default_rng(0))
    mix = {"colour": 1, "what": 1, "where": 1, "count": 1, "exist": 1}
    samples = data.questions(scene, mix, questions, np.random.default_rng(0))
    text = data.TinyText(data.vocabulary())
    text.eos = text.unk  # hardly ever written: all answers run to their full length
    print(f"seconds for one question and for {questions} about one scene, {tokens} tokens each (goal: less than 2 x)")
    print("  generate: scene tokens and answers; whole: from the opened scene; kept: what a later question still takes")
    columns = "".join(f"{c:>12s}: 1{questions:>8d}   ratio" for c in ("generate", "full rows", "whole", "kept"))
    print(f"  {'':35s} scene tokens {columns}")
    for name, (paper, changes) in ASKED.items():
        torch.manual_seed(0)
        model = paper.Model(paper.Config.tiny(**changes), text).eval().requires_grad_(False)
        full_rows.vary(getattr(model.llm.model, "language_model", model.llm.model))
        pairs = np.array(ask_model(model, scene, samples, tokens)).reshape(-1, 2)
        row = "".join(f"{one:15.3f}{many:8.3f} {many / one:5.2f} x" for one, many in pairs)
        print(f"  {name:35s} {model.scene_length(scene):12d} {row}")


BENCHES = {"proxy3d": (clustering, rooms, latency), "fase3d": (curve_keys, graph_time, graph_quality, tokenizer),
           "spatial3dllm": (spatial,), "segments": (segments, draw_segments), "ask": (ask,),
           "room": (large_inputs,)}  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=sorted(BENCHES))
    chosen = BENCHES[parser.parse_args().what]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for bench in chosen:
        bench()
