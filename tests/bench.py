"""Speed, measured: `python tests/bench.py proxy3d` prints a row per claim, each a ratio to something named and timed in
the same run. Best of several repetitions; nothing here is asserted, so a busy machine only makes the numbers worse."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
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
    model.begin(stage)
    scenes = [data.augment(data.room(seed), np.random.default_rng(seed)) for seed in range(16)]
    print("latency in seconds, tiny model (paper, 7B on a GPU: 9.4 / 2.9 / 1.1 at batch 8, 16.2 / 5.6 / 1.5 at 16)")
    print("  batch   encoder   clustering   LLM (8 new tokens)   per question")
    for B in (8, 16):
        colours = [torch.from_numpy(s.frames.colour) for s in scenes[:B]]
        with torch.no_grad():
            encoder = best(lambda colours=colours: [model.look(c) for c in colours])
            whole = best(lambda B=B: [model.proxies(s) for s in scenes[:B]])
        model.prepare(scenes[:B])
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


PAPER = dict(centres=(2048, 1024, 512, 256), samples=(64, 32, 16, 16), pairs=2, feature=256, spread=0.0,
             spread_normal=0.0, referents=256, context_heads=8, fourier=128)  # fmt: skip


def parts_of(scene: data.Scene, config: spatial3dllm.Config) -> list[float]:
    """Seconds of one scene's geometry, encoder, three modules and a distance answer of 24 tokens."""
    torch.manual_seed(0)
    model = spatial3dllm.Model(config, data.TinyText(data.vocabulary()))
    model.begin(data.Stage("", {}, (), "referents", steps=True))
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
    data.TASKS.update(spatial3dllm.TASKS)
    print("seconds per scene: geometry (once), encoder (once), three modules, answer; scenes per second new and cached")
    cases = [(f"tiny, 12 objects, {n:6,} points", 12, n, {}) for n in (2048, 8192, 32_768)]
    cases += [(f"tiny, {n} objects, 2,048 points", n, 2048, {}) for n in (50, 100, 200)]
    cases += [("the paper's sizes but the LLM, 40,000 points", 12, 40_000, PAPER)]
    for name, objects, points, sizes in cases:
        scene = data.room(5, objects=objects, views=0, points=points)
        *once, modules, answer = parts_of(scene, spatial3dllm.Config.tiny(points=points, **sizes))
        row = " ".join(f"{t:8.4f}" for t in (*once, modules, answer))
        print(f"  {name:45s} {row} {1 / (sum(once) + modules + answer):8.1f} {1 / (modules + answer):8.1f}")


BENCHES = {"proxy3d": (clustering, rooms, latency), "spatial3dllm": (spatial,)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(BENCHES))
    chosen = BENCHES[parser.parse_args().model]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for bench in chosen:
        bench()
