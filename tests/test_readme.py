"""The README is executed: each command it shows is known as typed, each file and name it mentions is there.

.ci/run executes the lines of CI in a fresh environment, this file those of HERE; the rest says why nobody does.
"""

import ast
import importlib
import itertools
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import ablate
import bench
import numpy as np
import pytest
from PIL import Image

import evaluate
import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LINES = [
    line.split("  #")[0].strip()
    for kind, text in BLOCKS
    if kind == "bash"
    for line in text.splitlines()
    if line
]
COMMANDS = [shlex.split(part) for line in LINES for part in line.split(" && ")]
PROGRAMS = [c[next(i for i, word in enumerate(c) if word.endswith(".py")) :] for c in COMMANDS
            if c[0] in ("python", "torchrun")]  # fmt: skip

CI = re.findall(r"^ *(?:\(.*)?readme '([^']+)'", (ROOT / ".ci/run").read_text(), re.MULTILINE)
CI += [f"python {paper}.py" for paper in train.MODELS]  # in a loop there
HERE = ["python data.py rooms OUT --count 10", "python data.py check DIR"]
NOT_RUN = {
    "git clone REPOSITORY papers && cd papers": "CI starts from a checkout",
    "python3 -m venv .venv && . .venv/bin/activate": "CI has an environment of its own",
    "torchrun train.py --model proxy3d --resume": "tests/test_train.py kills and resumes",
    "torchrun train.py --model proxy3d --set semantic_grouping=false --out runs/no_grouping": "minutes",
    "torchrun --nproc_per_node 8 train.py --model proxy3d --preset paper --data scannet --root DIR --shard": "GPUs",
    "torchrun train.py --model proxy3d --preset paper --llm Qwen/Qwen2.5-VL-3B-Instruct --data scannet --root DIR":
        "a GPU",
    "torchrun train.py --model fase3d --preset paper --llm Qwen/Qwen2.5-3B-Instruct --data scannet --root DIR": "a GPU",
    "torchrun train.py --model proxy3d --preset paper --data scannet --root DIR --annotations FILES":
        "tests/test_official.py",
    "python evaluate.py --run runs/proxy3d --proposals segments": "tests/test_evaluate.py scores segments",
    "python evaluate.py --run runs/proxy3d --benchmark scanqa --annotations FILE --root DIR": "tests/test_official.py",
    "python evaluate.py --benchmark scanqa --annotations FILE --predictions FILE": "tests/test_official.py",
    "python tests/bench.py proxy3d": "timings belong to a quiet machine",
    "python tests/ablate.py proxy3d": "a quarter of an hour",
}  # fmt: skip


def test_every_command_is_run_by_someone_or_says_why_not():
    """A command that nobody runs is the first to rot; a list of reasons for commands long gone is the second."""
    accounted = {part for line in (*CI, *HERE, *NOT_RUN) for part in line.split(" && ")}
    assert accounted == {part for line in LINES for part in line.split(" && ")}


def help_of(program: str, words: list[str], capsys, monkeypatch) -> str:
    monkeypatch.setattr(sys, "argv", [program, *words, "--help"])
    monkeypatch.syspath_prepend(str((ROOT / program).parent))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in PROGRAMS if "/" not in c[0]], ids=" ".join)
def test_every_flag_of_a_command_is_in_its_help(command, capsys, monkeypatch):
    """`--help` is what the program's own parser knows; words that are no flag must be known to it too, or be values."""
    program, *words = command
    flags = [w for w in words if w.startswith("--")]
    branch = [w for w in words[:1] if w in ("check", "rooms", "cache", "modle")]
    said = help_of(program, branch, capsys, monkeypatch)
    assert [f for f in flags if not re.search(rf"{f}\b", said)] == []


@pytest.mark.parametrize("command", [c for c in PROGRAMS if c[0] == "train.py"], ids=" ".join)
def test_every_training_command_names_what_there_is(command):
    """Models, presets, sources and `--set` keys are looked up by the trainer itself, so a renamed field fails here."""
    args = train.parse_args(command[1:])
    train.configure(args, importlib.import_module(args.model))


def test_benchmarks_and_papers_named_in_commands_exist():
    for command in PROGRAMS:
        for flag, value in itertools.pairwise(command):
            assert flag != "--benchmark" or value in evaluate.BENCHMARKS
        assert command[0] != "tests/bench.py" or command[1] in bench.BENCHES
        assert command[0] != "tests/ablate.py" or command[1] in ablate.STUDIES


def test_the_extras_of_the_install_lines_exist():
    extras = {e for c in COMMANDS if c[0] == "pip" for e in re.findall(r"\[(.*)\]", c[-1])}
    assert extras and extras <= set(PROJECT["project"]["optional-dependencies"])


def test_rooms_written_by_the_command_are_found_by_check(tmp_path):
    """The two cheap commands, as typed: what one writes the other reads."""
    for line in HERE:
        words = [w.replace("OUT", str(tmp_path)).replace("DIR", str(tmp_path)) for w in shlex.split(line)]
        ran = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    assert "10 scans, 10 with frames beside them" in ran.stdout


def test_links_and_file_names_lead_somewhere():
    """Links to files and headings, and every file named in the text, in backticks or in the map."""
    titles = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    headings = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("https://"):
            assert (ROOT / target).exists(), target
    named = {*re.findall(r"[\w./]*\w\.py\b", README)}
    assert [n for n in sorted(named) if not (ROOT / n).exists()] == []


def test_names_in_the_paper_and_code_tables_exist():
    names = re.findall(r"`((?:data|proxy3d|fase3d|spatial3dllm|train|evaluate)(?:\.[A-Za-z_]\w*)+)`", README)
    names = [n for n in names if not n.endswith(".py")]
    assert len(names) > 10
    for name in names:
        module, *path = name.split(".")
        found = importlib.import_module(module)
        for part in path:
            found = getattr(found, part)


def test_python_blocks_run_and_make_the_picture(tmp_path, monkeypatch):
    """The picture at the top is the block's own output: rooms that look different now need a new picture there."""
    monkeypatch.chdir(tmp_path)
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, "README.md", "exec"), {})
    new, shown = (
        np.asarray(Image.open(p).convert("RGB"), float) for p in ("rooms.png", ROOT / ".github/rooms.png")
    )
    assert new.shape == shown.shape
    assert np.abs(new - shown).mean() < 4, "save the block's rooms.png as .github/rooms.png"


def test_the_install_brings_all_that_the_modules_import():
    """A module that imports what pyproject.toml does not name works here and fails on a fresh machine."""
    names = {"PIL": "pillow", "sam2": "sam2"}
    listed, optional = ({re.match(r"[\w-]+", d)[0] for d in group} for group in (
        PROJECT["project"]["dependencies"], PROJECT["project"]["optional-dependencies"]["sam2"]))  # fmt: skip
    for file in ROOT.glob("*.py"):
        tree = ast.parse(file.read_text())
        for nodes, allowed in (
            (tree.body, listed),
            (ast.walk(tree), listed | optional),
        ):  # optional: only in functions
            imports = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
            found = {
                (n.module if isinstance(n, ast.ImportFrom) else n.names[0].name).split(".")[0]
                for n in imports
            }
            own = {f.stem for f in ROOT.glob("*.py")} | set(sys.stdlib_module_names)
            assert {names.get(f, f) for f in found - own} <= allowed, file.name


def test_no_number_is_missing():
    """Tables of results are filled from runs of this code; an empty one promises what nobody measured."""
    assert "TODO" not in README + RESULTS and len(README.splitlines()) <= 250
