"""The extractions with which Dream's and DiffuCoder's code scores are published.

Source: Dream eval_instruct, lm_eval/tasks/humaneval (a port of EvalPlus' sanitize to `ast`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from sandbox.names import without_warnings

MAX_LINES = 100  # Dream's port reads no more
# characters parsed in search of a run: an answer of 768 tokens needs far less, and what a
# degenerate one needs grows with the cube of its lines
MAX_PARSED = 2_000_000
FENCE = "```"


def evalplus(doc: dict, answer: str) -> str:
    """The program that EvalPlus' sanitize keeps of HumanEval's prompt and an answer.

    Of the first "```python" to the next fence, behind the prompt: the longest run of lines that
    parses; of that the imports, and the definitions that the entry point reaches. A function
    without a return statement is none. Comments and other statements are lost, and so is a helper
    of the prompt that only the tests use: nothing passes HumanEval/50.

    DiffuCoder's authors name EvalPlus and publish no code. EvalPlus 0.3.1 uses tree-sitter and
    differs: it has no limit of lines, ignores a run of one line, keeps the first of several
    definitions of a name, never keeps a decorated function, follows both names of `a.b`, copies the
    source, and gives the whole run where nothing else is left.
    """
    code = answer.split(f"{FENCE}python\n", 1)[-1].split(FENCE)[0]
    text = "\n".join([doc["prompt"], code]).replace("\t", "    ").replace("\r\n", "\n")
    tree = _longest(text.replace("\r", "\n").strip().splitlines()[:MAX_LINES])
    imports, defined = [], {}  # a later definition takes the place of an earlier one
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append(node)
        elif name := _name(node):
            defined[name] = node
    reached, ahead = set(), [doc["entry_point"]]
    while ahead:
        if (name := ahead.pop()) not in reached:
            reached.add(name)
            ahead += _used(defined[name]) if name in defined else ()
    kept = imports + [node for name, node in defined.items() if name in reached]
    try:
        return "\n".join(map(ast.unparse, kept))
    except RecursionError:  # nested too deeply
        return ""


def verbatim(doc: dict, answer: str) -> str:
    """The answer up to its first fence: so Dream's MBPP, whose prompt has opened the fence."""
    return answer.split(FENCE)[0]


def _longest(lines: list[str]) -> ast.Module:
    """The run with most lines that are not blank, of those that parse; of equals the first.

    A fault in a line is in every run that goes from the same first line past it.
    """
    best, most, parsed = ast.Module([], []), 0, 0
    filled = [bool(line.strip()) for line in lines]
    for begin in range(len(lines)):
        end = len(lines)
        while (n := sum(filled[begin:end])) > most:
            source = "\n".join(lines[begin:end])
            parsed += len(source)
            if parsed > MAX_PARSED:
                return best
            try:
                with without_warnings():
                    best, most = ast.parse(source), n
            except SyntaxError as fault:
                last = max(fault.lineno or end, fault.end_lineno or 0)
                end = min(end - 1, begin + last)
            except (ValueError, RecursionError, MemoryError, OverflowError):
                end -= 1
    return best


def _name(node: ast.stmt) -> str | None:
    """The name that a top-level statement defines, by the rule."""
    if isinstance(node, ast.ClassDef):
        return node.name
    if isinstance(node, ast.FunctionDef):
        returns = any(isinstance(inner, ast.Return) for inner in ast.walk(node))
        return node.name if returns else None
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return None


def _used(node: ast.AST) -> Iterator[str]:
    """The names in a definition. Of `a.b` it is b: the rule does not look at a."""
    ahead = [node]
    while ahead:
        for child in ast.iter_child_nodes(ahead.pop()):
            if isinstance(child, (ast.Name, ast.Attribute)):
                yield child.id if isinstance(child, ast.Name) else child.attr
            else:
                ahead.append(child)
