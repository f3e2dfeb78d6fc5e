"""Comments with shapes are claims: `wrong_shapes` compares them with the tensors of a real run, statement by statement.

A letter is one size within a call of a function, and no two letters of a comment are the same size (or two axes could
be mixed up unseen), so the run must have all axes different.
"""

import ast
import inspect
import itertools
import re
import sys
from collections import defaultdict

import numpy as np
import torch


def shape_comments(module):
    """{function: [(first line, last line, names, shapes)]} of the statements whose comment has shapes."""
    lines = inspect.getsource(module).splitlines()
    found = defaultdict(list)
    for function in ast.walk(ast.parse("\n".join(lines))):
        if not isinstance(function, ast.FunctionDef) or function.name.startswith("draw"):
            continue
        for node in ast.walk(function):
            if not isinstance(node, ast.Assign | ast.Return):
                continue
            shapes = re.findall(r"\[[^\[\]]+\]", lines[node.end_lineno - 1].partition("  # ")[2])
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            names = [n.id for n in getattr(target, "elts", [target]) if isinstance(n, ast.Name)]
            if target is None:
                names = ["return"]
            if names and shapes:
                found[function.name].append((node.lineno, node.end_lineno, names, shapes))
    return dict(found)


def difference(line, shape, true, ints, bound, alike):
    """What is wrong with a tensor of sizes `true` under "[R, W, L/2 + 1]", or None.

    ints: the function's own; bound: letter -> the line that met it first in this call, and its size there."""
    # the same line again is a loop's next round
    known = ints | {k: n for k, (at, n) in bound.items() if at != line}
    written = re.sub(r"(\d)([A-Za-z])", r"\1*\2", shape[1:-1]).replace("/", "//")
    parts = written.replace(" ", "").split(",")
    if parts[0] == "...":
        parts = [str(n) for n in true[: len(true) - len(parts) + 1]] + parts[1:]
    if len(parts) != len(true):
        return f"{shape} but {true}"
    for part, n in zip(parts, true, strict=True):
        if part.isidentifier() and part not in known:
            bound[part], known[part] = (line, n), n
    sizes = [eval(part, {}, known) for part in parts]
    letters = [k for k in known if re.search(rf"\b{k}\b", shape)]
    pairs = itertools.combinations(letters, 2)
    same = [(a, b) for a, b in pairs if known[a] == known[b] and {a, b} not in alike]
    return f"{shape} but {true} {same or ''}" if sizes != list(true) or same else None


def wrong_shapes(module, run, alike=()):
    """What is wrong with the module's comments while `run()` runs, a line each; comments that it never reached too.
    alike: pairs of letters that may be the same size."""
    comments, seen, wrong, calls, pending = shape_comments(module), set(), {}, {}, {}

    def check(frame, statement, value):
        _, last, names, shapes = statement
        values = [value] if names == ["return"] else [frame.f_locals.get(n) for n in names if n != "_"]
        values = list(values[0]) if isinstance(values[0], tuple) else values
        ints = {k: v for k, v in frame.f_locals.items() if isinstance(v, int)}
        for tensor, shape in zip(values, shapes * len(values) if len(shapes) == 1 else shapes, strict=False):
            if isinstance(tensor, torch.Tensor | np.ndarray):
                seen.add(last)
                if problem := difference(last, shape, tensor.shape, ints, calls[id(frame)], alike):
                    wrong[f"{module.__name__}.py:{last}: {problem}"] = True

    def trace(frame, event, arg):
        name = frame.f_code.co_name
        if frame.f_code.co_filename != module.__file__ or name not in comments:
            return None

        def inside(statement):
            return statement[0] <= frame.f_lineno <= statement[1]

        if event == "call":
            calls[id(frame)], pending[id(frame)] = {}, None
        if event in ("line", "return"):
            last = pending[id(frame)]
            if last and last[2] == ["return"] and event == "line":  # leaving a `with` on the way out
                return trace
            if last and (event == "return" or not inside(last)):
                check(frame, last, arg)
                pending[id(frame)] = None
            if event == "line":
                pending[id(frame)] = next((s for s in comments[name] if inside(s)), None)
        return trace

    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)
    missed = {last for rows in comments.values() for _, last, _, _ in rows} - seen
    return [*wrong, *(f"{module.__name__}.py:{n}: no call reached this comment" for n in sorted(missed))]
