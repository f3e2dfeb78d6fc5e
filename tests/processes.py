"""Train every paper on 1, 2 and 4 processes and sharded, and compare: python tests/processes.py --steps 40

Prints, per paper, the largest relative difference from one process of any step's loss, stage by stage, and of the
final weights (root mean square over all of them).
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import papers
import torch

import data

ROOT = Path(data.__file__).parent
FLAGS = ["--train-scenes=8", "--workers=0", "--no-eval", "--dtype=float32"]


def trained(out, processes, *flags):
    """Run the trainer: the losses of every stage, the final weights."""
    command = [*papers.LAUNCH, f"--nproc_per_node={processes}", "train.py", f"--out={out}", *FLAGS, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{out}: {done.stderr[-2000:]}")
    losses = {}
    for line in papers.rows(out / "log.jsonl"):
        losses.setdefault(line["stage"], []).append(line["loss"])
    return losses, data.read_tensors(out, "weights")


def whole(weights):
    """All weights in one row."""
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=papers.PAPERS)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    print(f"{'paper':13s} {'processes':9s} difference from one: loss by stage; weights")
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            flags = [f"--model={model}", f"--steps={args.steps}"]
            losses, weights = trained(Path(folder) / "1", 1, *flags)
            for processes, *more in ((2,), (4,), (2, "--shard")):
                name = " ".join(map(str, (processes, *more)))
                own_losses, own_weights = trained(Path(folder) / name, processes, *flags, *more)
                stages = []
                for stage, values in losses.items():
                    pairs = zip(own_losses[stage], values, strict=True)
                    stages.append(f"{stage} {max(abs(a - b) / abs(b) for a, b in pairs):.0e}")
                apart = (whole(own_weights) - whole(weights)).norm() / whole(weights).norm()
                print(f"{model:13s} {name:9s} {', '.join(stages)}; {apart:.0e}", flush=True)


if __name__ == "__main__":
    main()
