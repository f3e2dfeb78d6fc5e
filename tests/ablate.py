"""Ablations at a short budget: `python tests/ablate.py proxy3d` trains what is shared once, then every variant with
every seed, and prints mean ± std over the seeds with the paper's own row beside.

Paired: a seed means the same rooms, questions and order for all variants, and all start from the same encoder and
symbol stages; only the last stage, short, is trained per run. One thread per run, two runs at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parents[1]
STUDIES = {  # model -> stages trained once; the stage trained per run; variants: name -> (settings, the paper's number)
    "proxy3d": {
        "shared": "0 tower,I identifiers,II coordinates,III relations",
        "last": "IV proxies",
        "score": ("rooms/grounding", "acc@0.5/scanrefer"),
        "paper": "ScanRefer Acc@0.5, 16x21 / 450 tokens (Table 4)",
        "variants": {"semantic grouping": ([], 52.6), "no semantic grouping": (["semantic_grouping=false"], 31.0)},
    },
}


def train(model: str, out: Path, *more: str, threads: int = 1) -> None:
    """One run of train.py, unless its folder is already complete; its output goes to OUT.log."""
    if (out / "done").exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "train.py"), "--model", model, "--out", str(out), "--overwrite", *more]
    with open(f"{out}.log", "w") as log:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=HERE, env=env).returncode
    if code:
        sys.exit(f"ablate.py: {' '.join(command[1:])} ended with {code}; see {out}.log")
    (out / "done").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(STUDIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="of the last stage")
    parser.add_argument("--train-scenes", type=int, default=400)
    parser.add_argument("--test-scenes", type=int, default=100)
    parser.add_argument("--out", type=Path, default=HERE / "runs" / "ablate")
    a = parser.parse_args()
    study, root = STUDIES[a.model], a.out / a.model
    scenes = ["--train-scenes", str(a.train_scenes), "--test-scenes", str(a.test_scenes)]
    train(a.model, root / "shared", "--stages", study["shared"], "--no-eval", *scenes, threads=2)

    def one(job: tuple[str, int]) -> float:
        name, seed = job
        out = root / f"{name.replace(' ', '_')}-{seed}"
        changes = [*study["variants"][name][0], f"{study['last']}.iterations={a.steps}"]
        train(a.model, out, "--init", str(root / "shared"), "--stages", study["last"], "--seed", str(seed),
              "--set", *changes, "--workers", "0", *scenes)  # fmt: skip
        benchmark, metric = study["score"]
        return json.loads((out / "metrics.json").read_text())[benchmark][metric]

    jobs = [(name, seed) for seed in range(1, a.seeds + 1) for name in study["variants"]]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(jobs, pool.map(one, jobs), strict=True))
    print(f"{' '.join(study['score'])}: {a.steps} steps of {study['last']}, {a.seeds} seeds; paper: {study['paper']}")
    base = next(iter(study["variants"]))
    for name, (_, paper) in study["variants"].items():
        scores = np.array([found[name, seed] for seed in range(1, a.seeds + 1)]) * 100
        gap = scores - 100 * np.array([found[base, seed] for seed in range(1, a.seeds + 1)])
        print(f"{name:24s} {scores.mean():5.1f} ± {scores.std(ddof=min(1, len(scores) - 1)):4.1f}   paired difference "
              f"{gap.mean():+6.1f} ± {gap.std(ddof=min(1, len(gap) - 1)):4.1f}   paper {paper}")  # fmt: skip


if __name__ == "__main__":
    main()
