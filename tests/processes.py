"""Train every paper on 1, 2 and 4 processes and sharded, and compare: python tests/processes.py --steps 40

Prints, per paper, the largest relative difference from one process of any step's loss, stage by stage, and of the
final weights (root mean square over all of them).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from train import MODELS  # noqa: E402

FLAGS = ["--train-scenes=8", "--workers=0", "--no-eval", "--dtype=float32"]


def trained(out: Path, processes: int, *flags: str) -> tuple[dict, dict]:
    """Run the trainer: the losses of every stage, the final weights."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "train.py"]
    done = subprocess.run(
        [*command, f"--out={out}", *FLAGS, *flags], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{out}: {done.stderr[-2000:]}")
    losses = {}
    for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()):
        losses.setdefault(line["stage"], []).append(line["loss"])
    return losses, data.read_tensors(out, "weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    print(f"{'paper':13s} {'processes':9s} difference from one: loss by stage; weights")
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            flags = [f"--model={model}", f"--steps={args.steps}"]
            losses, weights = trained(Path(folder) / "1", 1, *flags)
            for name, processes, more in (("2", 2, ()), ("4", 4, ()), ("2 sharded", 2, ("--shard",))):
                own_losses, own_weights = trained(
                    Path(folder) / name.replace(" ", "-"), processes, *flags, *more
                )
                stages = []
                for stage, values in losses.items():
                    pairs = zip(own_losses[stage], values, strict=True)
                    stages.append(f"{stage} {max(abs(a - b) / abs(b) for a, b in pairs):.0e}")
                apart = sum((own_weights[k].double() - w.double()).square().sum() for k, w in weights.items())
                whole = sum(w.double().square().sum() for w in weights.values())
                print(f"{model:13s} {name:9s} {', '.join(stages)}; {(apart / whole) ** 0.5:.0e}", flush=True)


if __name__ == "__main__":
    main()
