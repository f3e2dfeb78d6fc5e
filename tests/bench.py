"""Speed, measured: `python tests/bench.py proxy3d` prints a row per claim, beside something named that is timed in the
same run. Best of several repetitions; no time is asserted, so a busy machine only makes the numbers worse. `segments`
measures how well our segments follow objects. --little runs every line once, on small inputs.
"""

import argparse
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import papers
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import fase3d
import proxy3d
import spatial3dllm

ROOT = str(Path(data.__file__).parent)
CUDA = torch.cuda.is_available()
CARD = torch.cuda.get_device_name() if CUDA else "no GPU"
DEVICE = torch.device("cuda" if CUDA else "cpu")


def timed(work, *args, times=3):
    """Seconds of the fastest of some calls, on a GPU until it has done them, and what a call returns."""
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        found = work(*args)
        if CUDA:
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return min(spent), found


def make_model(paper, build=None, **changes):
    """Build a paper's model with random weights, in the last stage of its tiny preset."""
    last = papers.stages_of(paper.__name__)[-1]
    torch.manual_seed(0)
    build = build or paper.build
    model = build(paper.Config.tiny(**changes), data.TinyText(data.vocabulary())).eval()
    model.configure_stage(last)
    return model


def make_paper_fase3d(points):
    """Fase3D at the paper's sizes; of the language model only the width matters here."""
    paper = fase3d.Config()
    return make_model(fase3d, points=points, dim=paper.dim, hidden=paper.hidden, tokens=paper.tokens,
                      prompt_neighbors=paper.prompt_neighbors, reader=(2048, 1, 16, 16),
                      adapted_layers=0)  # fmt: skip


def numbered_room(seed, **options):
    scene = data.room(seed, **options)
    scene.identifiers = data.number_objects(scene, np.random.default_rng(seed))
    return scene


def ask(scene, tasks, count=1):
    """Ask questions of a mix about a scene, as `batch` takes them."""
    return scene, data.questions(scene, tasks, count, np.random.default_rng(0))


# ---- Proxy3D


def bench_proxy3d(args):
    """Compare clustering with scikit-learn's KMeans in the same groups with the same allocation."""
    from sklearn.cluster import KMeans

    # 32 x 32 x 42 = 43,008 patches of a room seen by 32 cameras
    V, budget = (2, 80) if args.little else (32, 700)
    frames = data.room(5, objects=40, views=V, size=168).frames
    points = torch.from_numpy(data.unproject(frames.depth, frames.intrinsics, frames.poses))
    masks = torch.from_numpy(frames.masks).long()
    _, p, m = proxy3d.patch_triplets(torch.zeros(V, 32, 42, 1), points, masks)
    _, group, sizes = m.unique(return_inverse=True, return_counts=True)
    counts = proxy3d.allocate(sizes.tolist(), budget)
    print(f"clustering {len(p):,} patches in {len(sizes)} groups to {budget} proxies, on coordinates")

    def kmeans(p, m, budget):
        """Number the clusters of all groups."""
        proxy, K = torch.zeros_like(m), 0
        for g, count in enumerate(counts):
            found = KMeans(count, n_init=1, random_state=0).fit(p[group == g].numpy())
            proxy[group == g] = torch.from_numpy(found.labels_).long() + K
            K += count
        return proxy

    # how fast, and how far points are from the mean of their proxy
    methods = {"scikit-learn KMeans": kmeans, "farthest seeds": proxy3d.cluster,
               "farthest seeds + 10 Lloyd steps": partial(proxy3d.cluster, lloyd=10)}  # fmt: skip
    for name, method in methods.items():
        time_s, proxy = timed(method, p, m, budget)
        mean, _ = data.group_mean(p, proxy, budget)
        far = float((p - mean[proxy]).norm(dim=1).mean())
        if method is kmeans:
            base = time_s, far
        print(f"  {name:32s} {1000 * time_s:8.1f} ms {base[0] / time_s:5.1f} x as fast"
              f" {far:8.4f} m {far / base[1]:5.2f} x the distance")  # fmt: skip

    # what follows clustering
    proxy = proxy3d.cluster(p, m, budget)
    c, _ = data.group_mean(p, proxy, budget)
    group = data.most_frequent(m, proxy, budget)
    wide = torch.randn(len(p), 3584)
    print(
        f"  averaging features of width 3,584 {1000 * timed(data.group_mean, wide, proxy, budget)[0]:7.1f} ms"
    )
    print(f"  BFS order of the proxies          {1000 * timed(proxy3d.bfs_order, c, group)[0]:7.1f} ms")


# ---- Proxy3D around Qwen2.5-VL at its own sizes, and what a GPU makes of it

TEXT = {  # Qwen2.5-VL's public configuration
    "3B": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
               num_key_value_heads=2, vocab_size=151_936),
    "7B": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, vocab_size=152_064),
}  # fmt: skip


def save_random(size, folder):
    """Save a Qwen2.5-VL of a size with random weights, and a tokenizer of a token per letter."""
    import transformers as hf

    if size == "little":
        return str(papers.save_llm("proxy3d", folder))
    papers.save_tokenizer(folder)
    width = TEXT[size]["hidden_size"]
    pairs = width // TEXT[size]["num_attention_heads"] // 2
    sections = [pairs // 4, 3 * pairs // 8, pairs - pairs // 4 - 3 * pairs // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    text = TEXT[size] | {"rope_parameters": rope}
    tower = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=width)
    torch.set_default_dtype(torch.bfloat16)
    config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=tower)
    with DEVICE:
        llm = hf.Qwen2_5_VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    llm.save_pretrained(folder)
    return str(folder)


def load_proxy3d(llm, lora=0, **changes):
    """Load the paper's model of 450 tokens around a language model, as its stage IV trains it."""
    data.adopt(proxy3d)
    config = replace(proxy3d.Config.paper_450(), llm=llm, lora=lora, **changes)
    model = proxy3d.build(config, data.HubText(llm))
    model.keep_trained_precise(proxy3d.STAGES["paper_450"][-1:])
    return model.to(DEVICE)


GROUND = {"ground": 1.0}


@torch.no_grad()
def bench_latency(args):
    """Compare with supplementary Table 3 of Proxy3D: encoder, clustering, LLM, and all image tokens in its place."""
    with tempfile.TemporaryDirectory() as folder:
        model = load_proxy3d(args.llm or save_random("little", Path(folder))).eval()
    views = 2 if args.little else 32
    scenes = [numbered_room(seed, views=views, size=240) for seed in range(max(args.batch))]
    cfg = model.config
    print("seconds; paper, 7B: encoder, clustering, LLM 9.4 / 2.9 / 1.1 at batch 8, 16.2 / 5.6 / 1.5 at 16")
    print("  batch   encoder  clustering  LLM, 8 tokens  all patches   a question")

    def encode(images):
        for shown in images:
            model.encode_images(shown, together=True)

    def compute(scenes):
        for scene in scenes:
            model.compute_features(scene)

    with torch.autocast(DEVICE.type, torch.bfloat16):
        for B in args.batch:
            images = [model.resize_frames(torch.from_numpy(s.frames.color).to(DEVICE)) for s in scenes[:B]]
            encoder, _ = timed(encode, images)
            whole, _ = timed(compute, scenes[:B])
            asked = [ask(scene, GROUND) for scene in scenes[:B]]
            batch = model.batch(asked)
            llm, _ = timed(model.generate, batch, 8)

            # every patch as a token of its own
            L = views * cfg.grid[0] * cfg.grid[1]
            z, c = torch.randn(L, model.width).half(), torch.rand(L, 3)
            patches = {"z": z, "c": c, "group": torch.zeros(L).int()}
            kept, model.feature_cache = model.feature_cache, {scene.name: patches for scene in scenes}
            every, _ = timed(model.generate, model.batch(asked), 8)
            model.feature_cache = kept
            print(
                f"  {B:5d} {encoder:9.3f} {whole - encoder:11.3f} {llm:14.3f} {every:12.3f} {(whole + llm) / B:12.3f}"
            )

        # ten questions behind one prefix, and each with a prefix of its own
        scene, questions = ask(scenes[0], GROUND, 10)
        packed, apart = model.batch([(scene, questions)]), model.batch([(scene, [q]) for q in questions])
        ratio = timed(model.generate, apart, 8)[0] / timed(model.generate, packed, 8)[0]
    print(f"  10 questions about a scene behind one prefix: {ratio:.1f} x as fast as each with its own")


def step(model, batch, optimizer):
    """Train one step."""
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = model(batch)
    (out["loss"] / out["weight"]).backward()
    optimizer.step()
    optimizer.zero_grad()


def bench_training(args):
    """Time a step of stage IV: 3B in full, 7B with LoRA, eight scenes with eight questions each."""
    stage = proxy3d.STAGES["paper_450"][-1]
    rows, views, count = ({"little": 0}, 2, 2) if args.little else ({"3B": 0, "7B": 64}, 32, 8)
    scenes = [numbered_room(seed, views=views, size=240) for seed in range(count)]
    for size, lora in rows.items():
        with tempfile.TemporaryDirectory() as folder:
            model = load_proxy3d(save_random(size, Path(folder)), lora).train()
        model.configure_stage(stage)
        model.gradient_checkpointing_enable()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            model.cache_features(scenes)
        batch = model.batch([ask(scene, stage.tasks, 8) for scene in scenes])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

        spent, tokens = timed(step, model, batch, optimizer)[0], batch["ids"].numel()
        memory = torch.cuda.max_memory_allocated() / 2**30 if CUDA else math.nan
        print(f"stage IV, {size}, {'LoRA of rank ' + str(lora) if lora else 'in full'}: {spent:.3f} s a step, "
              f"{tokens / spent:,.0f} tokens/s, {memory:.1f} GB at most")  # fmt: skip
        del model, optimizer


def bench_gpu(args):
    """Measure what a GPU is for, at the real sizes with random weights: training, latency at 7B, Fase3D's tokens."""
    print(f"{CARD}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    bench_training(args)
    with tempfile.TemporaryDirectory() as folder:
        args.llm = save_random("little" if args.little else "7B", Path(folder))
        bench_latency(args)

    # Fase3D's tokenizer at the paper's sizes
    N = 2000 if args.little else 50_000
    model = make_paper_fase3d(N).to(DEVICE)
    scenes = [numbered_room(seed, views=0, points=N) for seed in range(8)]
    model.cache_features(scenes)
    with torch.no_grad():
        spent, _ = timed(lambda: [model.scene_tokens(scene) for scene in scenes])
    print(f"Fase3D, tokens of 8 scenes of {N:,} points: {spent:.3f} s")


# ---- Fase3D


def hilbert_by_bits(cells, bits):
    """Compute the same keys with a column per bit, the form in which public code mostly has the algorithm."""
    x = ((cells[..., None] >> torch.arange(bits - 1, -1, -1)) & 1).bool()  # [N, 3, bits]
    for level in range(bits):
        rest = x[..., level + 1 :]
        first = rest[:, 0]
        for axis in range(3):
            turned = x[:, axis, level, None]
            other = rest[:, axis]
            first ^= turned
            swap = ~turned & (first ^ other)
            other ^= swap
            first ^= swap
    gray = x.transpose(1, 2).flatten(1).long()  # [N, 3 bits]
    key = gray.cumsum(1) % 2  # each bit of the key is the parity of its own and all higher bits
    return (key << torch.arange(3 * bits - 1, -1, -1)).sum(1)


def superpoint_graph(points, owner, stride=16):
    """Find edges [E, 2] to 8 neighbors from bare points, by window voting along four curves."""
    curves = list(fase3d.CURVES)[:4]
    proposed = fase3d.vote_graph(points, owner, curves, 64, stride)
    return fase3d.nearest_edges(*proposed, fase3d.superpoint_mean(points, owner), 8)[0]


def bench_curves(args):
    """Compare Hilbert keys with a column per bit, and the voting graph with a KD-tree over sizes of a cloud."""
    N, bits = 50_000, 10
    cells = torch.randint(0, 2**bits, (N, 3), generator=torch.Generator().manual_seed(0))
    slow, expected = timed(hilbert_by_bits, cells, bits)
    hilbert, keys = timed(fase3d.hilbert, cells, bits)
    morton, _ = timed(fase3d.morton, cells, bits)
    assert torch.equal(keys, expected)
    print(f"keys of {N:,} points, {bits} bits (goal: Hilbert <= 20 ms on one core): Hilbert {1000 * hilbert:.1f} ms, "
          f"a column per bit {slow / hilbert:.0f} x, Morton {1000 * morton:.1f} ms")  # fmt: skip

    sizes = (500, 1000) if args.little else (12_500, 25_000, 50_000, 100_000, 200_000, 400_000)
    times = []
    print(
        "superpoint graph by window voting (goal: time ~ N^1.1 or less; faster than the KD-tree from 50,000 up)"
    )
    print("   points   superpoints      graph   KD-tree, 8 neighbors   ratio")
    for N in sizes:
        scene = data.room(5, objects=40, views=0, points=N)
        points, owner = torch.from_numpy(scene.points), torch.from_numpy(scene.superpoints)
        ours, _ = timed(superpoint_graph, points, owner)
        tree, _ = timed(data.knn, points, points, 9)  # the nearest is the point itself
        times.append((ours, tree))
        print(
            f"  {N:7,d} {len(owner.unique()):13,d} {1000 * ours:7.0f} ms {1000 * tree:19.0f} ms {tree / ours:7.2f}"
        )
    power = np.polyfit(np.log(sizes), np.log(times), 1)[0]
    print(f"  fitted: graph ~ N^{power[0]:.2f}, KD-tree ~ N^{power[1]:.2f}")


def nearest_pairs(distance):
    """Join every node with its 8 nearest, in both directions."""
    near = distance.fill_diagonal_(math.inf).topk(8, largest=False).indices.tolist()
    return {pair for a, others in enumerate(near) for b in others for pair in ((a, b), (b, a))}


def bench_graph(args):
    """Compare edges with the exact graph: each superpoint with the 8 at the smallest distance between points."""
    scene = data.room(0, objects=12, views=0, points=1000 if args.little else 20_000)
    points, owner = torch.from_numpy(scene.points), torch.from_numpy(scene.superpoints)
    M = int(owner.max()) + 1

    # the smallest distance between points of every two superpoints
    near = torch.full((M * M,), math.inf)
    for p, o in zip(points.split(500), owner.split(500), strict=True):
        pair = o[:, None] * M + owner
        near.scatter_reduce_(0, pair.flatten(), torch.cdist(p, points).flatten(), "amin")
    exact = nearest_pairs(near.view(M, M))

    centers = fase3d.superpoint_mean(points, owner)
    found = {"nearest centers": nearest_pairs(torch.cdist(centers, centers))}
    for stride in (16, 4, 1):
        spent, edges = timed(superpoint_graph, points, owner, stride)
        found[f"voting, stride {stride:2d}, {1000 * spent:6.0f} ms"] = set(map(tuple, edges.tolist()))
    print(
        f"edges against the exact graph, 8 neighbors, the paper's stride 16; {len(points):,} points, {M} superpoints"
    )
    for name, edges in found.items():
        right = len(edges & exact)
        print(f"  {name:27s} precision {right / len(edges):.3f}   recall {right / len(exact):.3f}")


@torch.no_grad()
def bench_tokenizer(args):
    """Compare the paper's tokenizer with its count, and its parts with attention in their places."""
    N, M = (2000, 300) if args.little else (50_000, 1024)
    scene = numbered_room(5, objects=40, views=0, points=N)
    points = torch.from_numpy(scene.points)
    centers = points[data.farthest_point_sampling(points, M)]
    scene.superpoints = data.knn(points, centers, 1)[1][:, 0].numpy()

    paper, model = fase3d.Config(), make_paper_fase3d(N)
    found = model.load_features(scene)
    owner, orders, place, seed, *graph = (
        found[key] for key in ("owner", "orders", "place", "seed", "token", "member", "strength")
    )
    features = model.point_features(scene, found["index"].numpy())
    box = torch.stack([points.amin(0), points.amax(0)])
    places = fase3d.unit_box(points[found["index"]], box)
    S = model.initial(features, places, owner, M)  # [M, d]
    z = fase3d.graph_pool(S, seed, *graph)  # [T, d]
    attention = torch.nn.MultiheadAttention(paper.dim, paper.heads, batch_first=True)
    former = fase3d.make_qformer(paper.dim, paper.heads)

    # name: module or None, call, name of the row that it stands in for
    rows = {
        "points to superpoints": (model.initial, lambda: model.initial(features, places, owner, M)),
        "enhancer": (model.enhancer, lambda: model.enhancer(S, orders)),
        "graph pooling": (None, lambda: fase3d.graph_pool(S, seed, *graph)),
        "phi, adapter": (model.merger, lambda: model.merger(z)),
        "places of tokens": (model.place, lambda: model.place(data.fourier_waves(place))),
        "coordinate token": (model.coordinate, lambda: model.coordinate(place[:1], box, z, place, 16)),
        "once per scene: curves, graph, seeds": (None, lambda: model.compute_features(scene)),
        "in the enhancer's place: self-attention": (attention, lambda: attention(S[None], S[None], S[None])),
        "in pooling's place: Q-Former": (former, lambda: former(S[seed], S)),
    }
    print(
        f"tokenizer: {N:,} points, {M:,} superpoints, {len(seed)} tokens, width 2,048 (an FFT counts L log2 L)"
    )
    whole, prompt = np.zeros(2), np.zeros(2)
    for name, (module, work) in rows.items():
        parameters = sum(p.numel() for p in module.parameters()) if module else 0
        with FlopCounterMode(display=False) as counter:
            work()
        multiply_adds = counter.get_total_flops() / 2
        if module is model.enhancer:
            windows = len(orders) * (math.ceil(M / (paper.window / 2)) + 1) * paper.dim
            multiply_adds = windows * 2 * paper.window * math.log2(paper.window)
        if not name.startswith("in "):
            whole += parameters, multiply_adds
        if name == "coordinate token":
            prompt += parameters, multiply_adds
        print(f"  {name:40s} {parameters:12,d} parameters {multiply_adds / 1e6:9.1f} M multiply-adds "
              f"{1000 * timed(work)[0]:9.1f} ms")  # fmt: skip
    # the paper counts what grows by one map of the language model's width: tokens, no coordinate token
    for name, (parameters, multiply_adds) in (("all", whole), ("the scene's tokens alone", whole - prompt)):
        print(f"  {name}: {parameters / 1e6:.2f} M parameters, {multiply_adds / 1e9:.2f} G "
              "(the paper's tokenization: 10.54 M, 2.04 G)")  # fmt: skip


# ---- Spatial 3D-LLM


PAPER_SIZES = dict(centers=(2048, 1024, 512, 256), samples=(64, 32, 16, 16), feature=256, referents=256,
                   context_heads=8, fourier=128, ball_layers=3)  # fmt: skip


class WithPaperEncoder(spatial3dllm.TinyModel):
    """The paper's own encoder, not the tiny one, before a tiny language model."""

    level = spatial3dllm.SetAbstraction


def bench_spatial3dllm(args):
    """Compare Spatial 3D-LLM's parts over numbers of points and of objects; what is kept of a scene runs once."""
    cases = [(f"tiny, 12 objects, {n:,} points", 12, n, {}) for n in (2048, 8192, 32_768)]
    cases += [(f"tiny, {n} objects, 2,048 points", n, 2048, {}) for n in (50, 100, 200)]
    paper_sizes = dict(build=WithPaperEncoder, **PAPER_SIZES)
    cases += [("the paper's sizes but the LLM, 40,000 points", 12, 40_000, paper_sizes)]
    print(f"{'seconds per scene':48s}   geometry    encoder    modules     answer      new/s     kept/s")
    for name, objects, points, sizes in cases[:: len(cases) - 1] if args.little else cases:
        model = make_model(spatial3dllm, points=points, **sizes)
        stage = model.stage
        scene = numbered_room(5, objects=objects, views=0, points=points)
        with torch.no_grad():
            # what the frozen encoder makes of a scene once
            geometry, cloud = timed(model.read_cloud, scene, times=2)
            cloud = model.stack([cloud])
            encoder, seeds = timed(model.encoder, cloud["f"], cloud["p"], cloud)

            # what every question needs: the three modules, and a distance of 24 tokens
            modules, _ = timed(model.referents, *seeds)
            model.configure_stage(replace(stage, tasks={"modle_distance": 1.0}))
            batch = model.batch([ask(scene, model.stage.tasks)])
            model.load_features(scene)
            kept, _ = timed(model.generate, batch, 24)
        answer = kept - modules
        print(f"  {name:46s} {geometry:10.4f} {encoder:10.4f} {modules:10.4f} {answer:10.4f} "
              f"{1 / (geometry + encoder + kept):10.1f} {1 / kept:10.1f}")  # fmt: skip


# ---- own segments


def best_iou(found, own):
    """Give the points of an object its IoU with the found label that fits it best; arrays of one shape, 0 = none."""
    rivals = [found == j for j in np.unique(found[own & (found > 0)])]
    return max(((own & other).sum() / (own | other).sum() for other in rivals), default=0.0)


def dbscan(scene):
    """Cluster by scikit-learn's DBSCAN on coordinates what our own shell leaves: [N], 0 = none."""
    from sklearn.cluster import DBSCAN

    spacing = np.median(data.nearest(scene.points, scene.points, 2)[0][:, 1])
    colors = data.opponent_colors(scene.colors)
    thing = ~data.find_shell(scene.points, scene.normals, colors, scene.superpoints)
    label = np.zeros(len(thing), int)
    label[thing] = DBSCAN(eps=2.5 * spacing, min_samples=6).fit(scene.points[thing]).labels_ + 1
    return label


def bench_segments(args):
    """Compare our segments with bare superpoints and with DBSCAN, in rooms that nothing was tuned on."""
    methods = {
        "superpoints, not merged": lambda scene: scene.superpoints + 1,
        "DBSCAN without the shell": dbscan,
        "superpoints, merged": lambda scene: data.object_segments(
            scene.points, scene.normals, scene.colors, scene.superpoints
        ),
    }
    seeds = data.ROOM_SEEDS["test"][: 2 if args.little else 60]
    for size, views in ((96, 12), (240, 16)):
        scores, counts, objects = {name: [] for name in methods}, dict.fromkeys(methods, 0), 0
        for seed in seeds:
            # every point of the fused cloud belongs to the object of the nearest pixel
            room = data.room(seed, views=views, size=size, points=0)
            f, scene = room.frames, data.visible_cloud(room)
            pixels = data.unproject(f.depth, f.intrinsics, f.poses)[f.depth > 0]
            true = f.masks[f.depth > 0][data.nearest(scene.points, pixels)[1][:, 0]]
            seen = [true == i for i in np.unique(true[true > 0]) if (true == i).sum() >= 10]
            objects += len(seen)
            for name, segment in methods.items():
                found = segment(scene)
                scores[name] += [best_iou(found, own) for own in seen]
                counts[name] += found.max()
        print(
            f"{objects} objects of {len(seeds)} test rooms, {views} views of {size} x {size} pixels: IoU as points"
        )
        for name, values in scores.items():
            x = np.array(values)
            print(f"  {name:27s} mean {x.mean():.3f}   > 0.25 {(x > 0.25).mean():.3f}   > 0.5 {(x > 0.5).mean():.3f}   "
                  f"{counts[name] / objects:.1f} segments per object")  # fmt: skip


# ---- memory

KEEPING = """
import resource, sys, tempfile
from pathlib import Path
sys.path[:0] = {paths!r}
import bench, data, proxy3d
scenes = data.load_scenes({source!r}, "train", {folder!r}, {count}, folder=Path({folder!r}))
model = bench.make_model(proxy3d)
with tempfile.TemporaryDirectory() as folder:
    model.cache_features(scenes, Path(folder))
print(len(scenes), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def bench_memory(args):
    """Compute and keep the features of more and more scenes: the peak memory of a process."""
    paths = [str(Path(__file__).parent), ROOT]
    counts = {"rooms": (50, 200, 800), "scannet": (10, 40, 160)}  # scans: four of five are for training
    if args.little:
        counts = {"rooms": (2, 4), "scannet": (2,)}
    with tempfile.TemporaryDirectory() as folder:
        for source, some in counts.items():
            for count in some:
                if source == "scannet":
                    data.main(["rooms", folder, f"--count={count}"])
                program = KEEPING.format(paths=paths, source=source, folder=folder, count=count)
                out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
                n, peak = out.stdout.split()[-2:]
                print(f"{source}: {n} scenes, at most {float(peak):.0f} MB")


BENCHES = {
    "memory": [bench_memory],
    "proxy3d": [bench_proxy3d],
    "fase3d": [bench_curves, bench_graph, bench_tokenizer],
    "spatial3dllm": [bench_spatial3dllm],
    "segments": [bench_segments],
    "latency": [bench_latency],
    "gpu": [bench_gpu],
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=BENCHES)
    parser.add_argument("--little", action="store_true", help="every line once, on small inputs")
    parser.add_argument(
        "--llm", help="latency: name or folder of a Qwen2.5-VL (default: a little random one)"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16], help="latency: scenes at a time")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for bench in BENCHES[args.what]:
        bench(args)
