"""Kill a run again and again, and compare its end with an undisturbed run: python tests/kills.py --kills 20

A short run of Fase3D, from making rooms to scores, is killed (SIGKILL to all of its processes) after times that are
spread evenly over its length: while rooms are made, in the language model's stages, at changes of stages, while saving,
while scoring. The same command goes on, with --resume where there is a checkpoint. In the end the weights must be equal
to the last bit.
"""

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import papers

import data

ROOT = Path(data.__file__).parent
FLAGS = [
    "--model=fase3d",
    "--steps=24",
    "--train-scenes=8",
    "--test-scenes=2",
    "--save-every=2",
    "--workers=1",
]


def family(pid):
    """List a process and all that it started, which torchrun puts into groups of their own."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return []
    found = [pid]
    for child in map(int, children):
        found += family(child)
    return found


def run(out, processes, seconds=None):
    """Start or continue a run; kill it after some seconds. Returns whether it ended by itself."""
    command = [*papers.LAUNCH, f"--nproc_per_node={processes}"] if processes > 1 else [sys.executable]
    command += ["train.py", *FLAGS, f"--out={out}"]
    if (out / "checkpoint" / "state.json").exists():
        command.append("--resume")

    with (out.parent / "output.txt").open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            for pid in family(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()
            return False
    if status != 0:
        raise SystemExit(f"{out}: status {status}; {(out.parent / 'output.txt').read_text()[-2000:]}")
    return True


def digest(out):
    """Hash all weights of a finished run."""
    found = hashlib.sha256()
    for name, tensor in sorted(data.read_tensors(out, "weights").items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def doing(out):
    """Name what a run did last: the end of its last line."""
    lines = (out.parent / "output.txt").read_text().replace("\r", "\n").split("\n")
    shown = [line for line in lines if line.strip()]
    return shown[-1][:60] if shown else "starting"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # undisturbed
        whole, begun = Path(folder) / "whole" / "run", time.monotonic()
        whole.parent.mkdir()
        run(whole, args.processes)
        length = time.monotonic() - begun
        expected = digest(whole)
        print(f"undisturbed: {length:.0f} s")

        # a chain of kills ends when a run gets through; then another begins
        delays = np.random.default_rng(0).permutation(np.linspace(0.05, 0.95, args.kills)) * length
        chains, out = 0, Path(folder) / "0" / "run"
        for delay in delays:
            out.parent.mkdir(exist_ok=True)
            ended = run(out, args.processes, delay)
            print(f"after {delay:5.1f} s: {'it had ended' if ended else doing(out)}")
            if ended:
                assert digest(out) == expected, out
                chains += 1
                out = Path(folder) / str(chains) / "run"
        out.parent.mkdir(exist_ok=True)
        run(out, args.processes)
        assert digest(out) == expected, out
    print(f"{args.kills} kills on {args.processes} processes: {chains + 1} runs ended with equal weights")


if __name__ == "__main__":
    main()
