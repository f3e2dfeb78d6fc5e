"""The README is executed: each command it shows is known as typed, each file and name it mentions is there.

.ci/run executes the lines of CI in a fresh environment, this file those of HERE; the rest says why nobody does.
"""

import ast
import importlib
import itertools
import pkgutil
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
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LINES = [
    line.split("  #")[0].strip()
    for kind, text in BLOCKS
    if kind == "bash"
    for line in text.splitlines()
    if line
]


def parts(lines):
    return [part for line in lines for part in line.split(" && ")]


COMMANDS = "\n".join(parts(LINES))
PROGRAMS = [shlex.split(command) for command in re.findall(r"[\w/]+\.py\b.*", COMMANDS)]

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
        "a GPU; tests/test_run.py has a small language model",
    "torchrun train.py --model fase3d --preset paper --llm Qwen/Qwen2.5-3B-Instruct --data scannet --root DIR": "a GPU",
    "torchrun train.py --model proxy3d --preset paper --data scannet --root DIR --annotations FILES":
        "tests/test_run.py, with a small language model",
    "python evaluate.py --run runs/proxy3d --proposals segments": "tests/test_evaluate.py scores segments",
    "python evaluate.py --run runs/proxy3d --benchmark scanqa --annotations FILE --root DIR": "tests/test_official.py",
    "python evaluate.py --benchmark scanqa --annotations FILE --predictions FILE": "tests/test_official.py",
    "python tests/bench.py proxy3d": "timings belong to a quiet machine; .ci/run runs every line in little",
    "python tests/ablate.py proxy3d": "a quarter of an hour",
}  # fmt: skip


def test_every_command_is_run_by_someone_or_says_why_not():
    """A command that nobody runs is the first to rot; a list of reasons for commands long gone is the second."""
    assert set(parts([*CI, *HERE, *NOT_RUN])) == set(parts(LINES))


@pytest.mark.parametrize("command", [c for c in PROGRAMS if "/" not in c[0]], ids=" ".join)
def test_every_flag_of_a_command_is_in_its_help(command, capsys, monkeypatch):
    """`--help` is what the program's own parser knows, and its branch, such as `check`, where it has some."""
    program, *words = command
    branch = [word for word in words[:1] if word.isalpha()]
    monkeypatch.setattr(sys, "argv", [program, *branch, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(ROOT / program), run_name="__main__")
    said = capsys.readouterr().out
    assert [w for w in words if w.startswith("--") and not re.search(rf"{w}\b", said)] == []


@pytest.mark.parametrize("command", [c for c in PROGRAMS if c[0] == "train.py"], ids=" ".join)
def test_every_training_command_names_what_there_is(command):
    """Models, presets, sources and `--set` keys are looked up by the trainer itself, so a renamed field fails here."""
    args = train.parse_args(command[1:])
    train.configure(args, importlib.import_module(args.model))


def test_benchmarks_papers_and_extras_named_in_commands_exist():
    benchmarks = evaluate.BENCHMARKS
    known = {"--benchmark": benchmarks, "tests/bench.py": bench.BENCHES, "tests/ablate.py": ablate.STUDIES}
    for command in PROGRAMS:
        for word, value in itertools.pairwise(command):
            assert value in known.get(word, [value])
    extras = re.findall(r"pip install .*\[(.*)\]", COMMANDS)
    assert extras and set(extras) <= set(PROJECT["optional-dependencies"])


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
    assert headings.issuperset(re.findall(r"\]\(#([^)]+)\)", README))
    files = re.findall(r"\]\((?!#|https://)([^)]+)\)", README) + re.findall(r"[\w./]*\w\.py\b", README)
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_names_in_the_paper_and_code_tables_exist():
    modules = "data|proxy3d|fase3d|spatial3dllm|train|evaluate"
    names = re.findall(rf"`((?:{modules})\.(?!py`)[\w.]+)`", README)
    assert len(names) > 10
    for name in names:
        pkgutil.resolve_name(name)


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
    groups = PROJECT["dependencies"], PROJECT["optional-dependencies"]["sam2"]
    listed, optional = ({re.match(r"[\w-]+", package)[0] for package in group} for group in groups)
    listed |= {file.stem for file in ROOT.glob("*.py")} | sys.stdlib_module_names
    optional |= {"av", "vggt"}  # of the extra for videos, and in no registry
    for file in ROOT.glob("*.py"):
        tree = ast.parse(file.read_text())
        # an optional package is imported in functions only
        for nodes, allowed in ((tree.body, listed), (ast.walk(tree), listed | optional)):
            for node in nodes:
                if isinstance(node, ast.Import | ast.ImportFrom):
                    name = getattr(node, "module", None) or node.names[0].name
                    assert name.split(".")[0].replace("PIL", "pillow") in allowed, file.name


def test_no_number_is_missing():
    """Tables of results are filled from runs of this code; an empty one promises what nobody measured."""
    assert "TODO" not in README + RESULTS and len(README.splitlines()) <= 250
