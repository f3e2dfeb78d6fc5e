"""Ablations at a short budget: `python tests/ablate.py proxy3d` trains what is shared once, then every variant with
every seed, and prints mean ± std over the seeds with the paper's own row beside.

Paired: a seed means the same rooms, questions and order for all variants, and all start from the same encoder and
symbol stages; only what is listed under "last", short, is trained per run. One thread per run, two runs at a time.
Beside the scores stands the loss per token of held-out answers, which resolves what a few hundred right or wrong
answers cannot. What Fase3D's adapters and filter are worth is in gap.py.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import papers  # noqa: F401  (finds the modules below)
import torch

import data
import evaluate

STUDIES = {  # model -> stages trained once; those trained per run, with their steps; settings of all runs; scores, the
    # first beside the paper's; variants: name -> (settings, the paper's number), the first is what all differ from;
    # settings that the stages before depend on too, so that such a variant has these of its own
    "proxy3d": {
        "shared": ["0 tower", "I identifiers", "II coordinates", "III relations"],
        "last": {"IV proxies": 300},
        "settings": [],
        "early": ("coordinate_stage=false", "inter_frame=true"),
        "scores": {"rooms/grounding": "acc@0.5/scanrefer", "rooms/caption": "cider@0.5/chat-scene"},
        "paper": "ScanRefer Acc@0.5, 16x21 / 450 tokens (Table 4)",
        "variants": {
            "semantic grouping": ("", 52.6),
            "no semantic grouping": ("semantic_grouping=false", 31.0),
            "no coordinate stage": ("coordinate_stage=false", None),
            "inter-frame attention": ("inter_frame=true", None),
            "48 for 96 proxies": ("budget=48", None),
            "144 for 96 proxies": ("budget=144", None),
            "5 proxies per object at least": ("floor=5", None),
            "10 proxies per object at least": ("floor=10", None),
        },
    },
    "fase3d": {
        "shared": [],  # but the language model
        "last": {"0 tokenizer": 300, "1 generalist": 150},
        # a window spans a third of the room's diagonal (of 128 superpoints: four fifths); superpoints have 9 points on
        # average, fewer than the paper's 50; a narrow tokenizer, since in two rows each point is a node of its own
        "settings": ["window=16", "dim=48", "tokens=64", "0 tokenizer.batch=8"],
        "scores": {"rooms/qa": "em/strict", "rooms/identifier": "em/strict",
                   "rooms/caption": "cider@0.5/ll3da"},
        "paper": "ScanQA CIDEr, from scratch (Tables 3, B, C and E)",
        "variants": {
            "superpoints + FFT, 4 curves": ("", 86.91),
            "points": ("superpoint=false enhancer=false", 76.04),
            "superpoints": ("enhancer=false", 79.70),
            "points + FFT": ("superpoint=false", 82.97),
            "1 curve": ("curves=1", 79.06),
            "2 curves": ("curves=2", 85.64),
            "6 curves": ("curves=6", 87.14),
            "16 of 64 tokens": ("tokens=16", 79.53),
            "32 of 64 tokens": ("tokens=32", 83.92),
            "80 for 64 tokens": ("tokens=80", 87.20),
            "Q-Former for the graph": ("selector=qformer", 77.41),
            "farthest points for the graph": ("selector=fps", 82.54),
        },
    },
    "spatial3dllm": {
        "shared": ["I encoder"],
        "last": {"II referents": 200},
        "settings": [],
        "scores": {"rooms/modle_distance": "within_20_percent/number", "rooms/modle_move": "acc@0.25/box",
                   "rooms/modle_place": "acc@0.25/box", "rooms/grounding": "acc@0.25/scanrefer"},
        "paper": "its tables are not public",
        "variants": {
            "all three modules": ("", None),
            "no intra-referent": ("intra=false", None),
            "no inter-referent": ("inter=off", None),
            "no contextual": ("context=false", None),
            "none of the three": ("intra=false inter=off context=false", None),
            "concatenation for the graph": ("inter=concat", None),
            "no positions": ("positions=false", None),
        },
    },
}  # fmt: skip


def train(model, out, *more, settings, threads=1):
    """Run train.py, unless its folder is already complete; its output goes to OUT.log."""
    if settings:
        more += ("--set", *settings)
    if (out / "done").exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "train.py", "--model", model, "--out", str(out), "--overwrite", *more]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    with open(f"{out}.log", "w") as log:
        here = Path(data.__file__).parent
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=here, env=env).returncode
    if code:
        sys.exit(f"ablate.py: {' '.join(command[1:])} ended with {code}; see {out}.log")
    (out / "done").touch()


def held_out_loss(model, scenes):
    """Ask a trained model about rooms that no run has seen: nats per token of the answers."""
    stage, loss, tokens = model.stage, 0.0, 0.0
    model.cache_features(scenes)
    for k, scene in enumerate(scenes):
        rng = np.random.default_rng(k)
        scene.identifiers = data.number_objects(scene, rng)
        with torch.no_grad():
            out = model(model.batch([(scene, data.questions(scene, stage.tasks, 32, rng))]))
        loss += float(out["loss"])
        tokens += float(out["weight"])
    return loss / tokens


def mean_and_spread(values):
    return f"{values.mean():+6.1f} ± {values.std(ddof=min(1, len(values) - 1)):4.1f}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=sorted(STUDIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, help="of every stage, to see that all runs (default: the study's own)"
    )
    parser.add_argument("--train-scenes", type=int, default=400)
    parser.add_argument("--test-scenes", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"))
    args = parser.parse_args()
    study, root = STUDIES[args.model], args.out.resolve() / args.model
    scenes = ["--train-scenes", str(args.train_scenes), "--test-scenes", str(args.test_scenes)]

    # what variants start from; one step is enough to have a language model
    steps = args.steps if study["shared"] else 1
    shared = {}
    for early in ("", *study.get("early", ())):
        shared[early] = root / f"shared {early}".strip().replace(" ", "_")
        stages = study["shared"] or list(study["last"])[:1]
        if early == "coordinate_stage=false":
            stages = [stage for stage in stages if "coordinates" not in stage]
        short = [f"{stage}.iterations={steps}" for stage in stages] if steps else []
        train(args.model, shared[early], "--stages", ",".join(stages), "--no-eval", *scenes,
              settings=[*short, *study["settings"], *early.split()], threads=2)  # fmt: skip

    # every variant with every seed
    steps = {stage: args.steps or n for stage, n in study["last"].items()}
    settings = [*(f"{stage}.iterations={n}" for stage, n in steps.items()), *study["settings"]]

    def run(job):
        """Train and score one variant with one seed: its folder."""
        seed, name = job
        out = root / f"{re.sub('[^a-z0-9]+', '_', name.lower())}-{seed}"
        own = study["variants"][name][0]
        start = ["--init", str(shared.get(own, root / "shared"))] if study["shared"] else []
        train(args.model, out, *start, "--stages", ",".join(steps), "--seed", str(seed), "--workers", "0",
              *scenes, settings=settings + own.split())  # fmt: skip
        return out

    variants, seeds = list(study["variants"]), range(1, args.seeds + 1)
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = list(pool.map(run, itertools.product(seeds, variants)))

    # what each came to: its scores x 100, and the loss x 100
    rooms, found = data.rooms(data.ROOM_SEEDS["val"][:50], args.jobs), []
    columns = {**study["scores"], "loss per held-out answer token": "nats"}
    for folder in folders:
        metrics = json.loads((folder / "metrics.json").read_text())
        scores = [metrics[benchmark][metric] for benchmark, metric in study["scores"].items()]
        found.append([*scores, held_out_loss(evaluate.load_run(folder)[0], rooms)])
    scores = 100 * np.array(found).reshape(args.seeds, len(variants), -1)

    # a table per score, differences paired by seed
    budget = ", ".join(f"{n} steps of {stage}" for stage, n in steps.items())
    print(
        f"{budget}, {args.seeds} seeds, mean ± std, paired difference to {variants[0]!r}; paper: {study['paper']}"
    )
    for k, (benchmark, metric) in enumerate(columns.items()):
        print(f"{benchmark} {metric} x 100")
        for i, (name, (_, paper)) in enumerate(study["variants"].items()):
            own = mean_and_spread(scores[:, i, k])
            difference = mean_and_spread(scores[:, i, k] - scores[:, 0, k])
            beside = "" if k or paper is None else f"   paper {paper}"
            print(f"  {name:30s} {own}   difference {difference}{beside}")


if __name__ == "__main__":
    main()
