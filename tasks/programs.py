"""Finds the Python program in a text. Pure functions on syntax trees.

The functions for each benchmark, and the patterns that cut an answer into text and fenced blocks,
are in utils.py ("answer patterns"). They call `find_program`, which
    1. collects the pieces of valid Python: the fenced blocks, else the parts that compile;
    2. takes the first piece that defines the entry point with a body, else reads the answer as the
       body of the prompt's function;
    3. keeps of it what the entry point reaches, with helpers from other pieces and from the prompt,
       so that example calls, asserts and stray words are not run.
The code is never changed, only cut and joined.
"""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
import warnings
from dataclasses import dataclass

from sandbox.names import names_of

MAX_LINES = 40_000  # lines compiled per answer: hundreds of degenerate lines would take seconds
CODE_START = re.compile(
    r"(?:import|from|def|async|class|if|for|while|try|with)\b|@|[A-Za-z_][\w.\[\]'\", ]*\s*[:+*-]?="
)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
BUILTINS = frozenset(dir(builtins)) | {"__name__", "__file__", "__doc__"}
# a top-level statement that uses one of these is an example, or waits for a user
EXAMPLES = frozenset({"print", "input", "unittest", "doctest", "__name__", "exit", "quit"})
# a function that uses one of these may reach any name
LOOKS_UP_NAMES = frozenset({"globals", "locals", "vars", "eval", "exec"})
# what compile() can raise
FAULTS = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError)


@dataclass(frozen=True)
class _Unit:
    """Top-level statements that share lines, with the names that they bind and use."""

    text: str
    binds: frozenset[str]
    uses: frozenset[str]
    kind: str  # "import" | "def" | "assign" (to plain names) | "assert" | "other"


def find_program(
    text: str,
    blocks: list[str],
    entry_point: str | None = None,
    prompt: str = "",
    roots: frozenset[str] = frozenset(),
) -> tuple[str, str]:
    """(code, how) of the program in a text with "\\n" as its only line end.

    blocks:      contents of the text's fences.
    entry_point: the function asked for; None takes the first piece that defines anything, whole.
    prompt:      source that the text may continue (HumanEval), or "".
    roots:       further names that must be kept.
    how:         "fence" | "text" | "body" (completed with the prompt) | "none": no program was
                 found, code is the first block, else the text.
    """
    try:
        code, how = _find(text, blocks, entry_point, prompt, roots)
    except RecursionError:  # nested too deeply to be compiled
        code, how = None, "none"
    if code is None:
        code = textwrap.dedent(blocks[0] if blocks else text).strip("\n")
    # a backslash on the last line needs its empty line
    end = "\n\n" if how != "none" and code.rstrip("\n").endswith("\\") else "\n"
    return code.rstrip("\n") + end, how


def _find(
    text: str, blocks: list[str], entry_point: str | None, prompt: str, roots: frozenset[str]
) -> tuple[str | None, str]:
    """(code, how); (None, "none") where no program was found."""
    pieces = [piece for block in blocks for piece in _pieces(block)]
    chosen, how = _first_defining(pieces, entry_point), "fence"
    if chosen is None:
        loose = _pieces(text)
        chosen, how, pieces = _first_defining(loose, entry_point), "text", pieces + loose
    if chosen is None and prompt and entry_point:
        bodies = (_as_body(prompt, block, entry_point) for block in (*blocks, text))
        chosen, how = next((b for b in bodies if b), None), "body"
    if chosen is None:
        return None, "none"
    if entry_point is None:
        return chosen, how
    others = [piece for piece in pieces if piece != chosen]
    code = _reachable(chosen, others, prompt, entry_point, {entry_point, *roots})
    return code if _compiles(code) else chosen, how


def called_names(tests: str) -> list[str]:
    """Names that the source of some tests calls or reads and does not provide, called ones first.

    The first is the entry point of an MBPP task: `assert set(similar(a)) == set(b)` gives
    ["similar"]. Raises SyntaxError where the tests are not Python.
    """
    tree = _parse(tests)
    names = names_of(tree)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    reads = [node for node in names.reads if node.id not in names.binds]
    reads.sort(key=lambda node: (id(node) not in called, node.lineno, node.col_offset))
    own = [node.id for node in reads if node.id not in BUILTINS]
    # a task may ask for a function called `sum`
    return list(dict.fromkeys(own)) or [node.id for node in reads if id(node) in called][:1]


# ---------------------------------------------------------------- pieces of Python


def _parse(source: str) -> ast.Module:
    """The tree of a program. Raises one of FAULTS; ast.parse alone accepts a stray `return`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in an answer are no concern of the user
        compile(source, "<answer>", "exec", dont_inherit=True)
        return ast.parse(source)


def _compiles(source: str) -> bool:
    try:
        _parse(source)
    except FAULTS:
        return False
    return True


def _longest_prefix(lines: list[str], at_least: int = 1) -> int:
    """How many of the first lines compile, as many as possible; 0 if fewer than at_least do."""
    n = len(lines)
    tries = 0
    while n >= at_least:
        tries += 1
        # two or three tries are enough, except for degenerate texts
        step = 1 if tries < 10 else 2 ** (tries - 9)
        try:
            _parse("\n".join(lines[:n]))
            return n
        except SyntaxError as e:
            n = min(n - step, e.lineno or n)  # lines after the fault cannot mend it
        except FAULTS:
            n -= step
    return 0


def _pieces(text: str) -> list[str]:
    """The parts of a text that are Python: all of it, or each longest run that compiles."""
    text = textwrap.dedent(text).strip("\n")
    if _compiles(text):
        return [text]
    lines, pieces, i, budget = text.split("\n"), [], 0, MAX_LINES
    while i < len(lines) and budget > 0:
        n = _longest_prefix(lines[i:]) if CODE_START.match(lines[i]) else 0
        budget -= len(lines) - i
        if n:
            pieces.append("\n".join(lines[i : i + n]))
        i += max(n, 1)
    return pieces


def _first_defining(pieces: list[str], entry_point: str | None) -> str | None:
    """The first piece that defines the entry point with a body of its own, or None."""
    for piece in pieces:
        body = _parse(piece).body
        if entry_point is None:
            if any(isinstance(node, DEFINITIONS) for node in body):
                return piece
        elif _defines(body, entry_point):
            return piece
    return None


def _defines(body: list[ast.stmt], name: str) -> bool:
    """Whether the last top-level binding of name is more than a signature with a docstring."""
    for node in reversed(body):
        if isinstance(node, DEFINITIONS) and node.name == name:
            return not all(map(_is_placeholder, node.body))
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in node.targets
        ):
            return True
    return False


def _is_placeholder(node: ast.stmt) -> bool:
    """Whether a statement only fills an empty body: pass, an import, raise NotImplementedError."""
    if isinstance(node, ast.Raise):
        return "NotImplementedError" in ast.unparse(node)
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return constant or isinstance(node, (ast.Pass, ast.Import, ast.ImportFrom))


def _as_body(prompt: str, text: str, entry_point: str) -> str | None:
    """prompt + text, read as the body of the prompt's last function; None where that is no program.

    The first line, or all of them, may have lost the indentation.
    """
    head = prompt.rstrip("\n ").split("\n")
    text = text.strip("\n").rstrip()
    readings = (text, textwrap.indent(textwrap.dedent(text), "    "), "    " + text.lstrip())
    best: list[str] = []
    for reading in readings:
        lines = head + reading.split("\n")
        lines = lines[: _longest_prefix(lines, at_least=len(head) + 1)]
        if len(lines) > len(best) and _defines(_parse("\n".join(lines)).body, entry_point):
            best = lines
    return "\n".join(best) if best else None


# ---------------------------------------------------------------- what the entry point reaches


def _units(source: str) -> list[_Unit]:
    """The top-level statements of a source that compiles, without the comments between them."""
    lines = source.split("\n")
    groups: list[tuple[int, int, list[ast.stmt]]] = []  # first line, last line, statements
    for node in _parse(source).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        if groups and first <= groups[-1][1]:  # a; b on one line
            start, end, nodes = groups.pop()
            groups.append((start, max(end, node.end_lineno), [*nodes, node]))
        else:
            groups.append((first, node.end_lineno, [node]))
    units = []
    for first, last, nodes in groups:
        names = names_of(ast.Module(nodes, []))
        # a backslash continues a statement with an empty line; elsewhere another line may follow
        text = "\n".join(lines[first - 1 : last]).rstrip("\\")
        kind = _kind(nodes[0]) if len(nodes) == 1 else "other"
        units.append(_Unit(text, names.binds, names.uses, kind))
    return units


def _kind(node: ast.stmt) -> str:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return "import"
    if isinstance(node, DEFINITIONS):
        return "def"
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    if isinstance(node, (ast.Assign, ast.AnnAssign)) and all(
        isinstance(t, ast.Name) for t in targets
    ):
        return "assign"
    return "assert" if isinstance(node, ast.Assert) else "other"


def _reachable(
    chosen: str, others: list[str], prompt: str, entry_point: str, roots: set[str]
) -> str:
    """The statements of chosen that the roots need, preceded by what these need from elsewhere.

    That is from the other pieces and from the prompt.
    A statement is needed if it binds a needed name, or if it acts on one (or on a module) and does
    not use the entry point. Imports are kept. Where nothing is left out, chosen is returned
    unchanged.
    """
    units = _units(chosen)
    bound = frozenset().union(*(u.binds for u in units))
    helpers = [u for u in _prompt_units(prompt, entry_point) if not u.binds <= bound]
    foreign = [
        u for piece in others for u in _units(piece) if u.kind != "assert" and not u.uses & EXAMPLES
    ]
    modules = frozenset().union(*(u.binds for u in units if u.kind == "import"))
    have = bound | BUILTINS | frozenset().union(*(u.binds for u in helpers))
    needed = set(roots).union(*(u.uses for u in helpers))
    if any(u.uses & LOOKS_UP_NAMES for u in units if u.kind == "def"):
        needed |= bound
    keep: set[int] = set()
    borrowed: dict[int, _Unit] = {}
    size = -1
    while size != len(needed) + len(keep) + len(borrowed):
        size = len(needed) + len(keep) + len(borrowed)
        for i, unit in enumerate(units):
            acts = unit.kind == "other" and unit.uses & ((needed & bound) | modules)
            acts = acts and entry_point not in unit.uses and not unit.uses & EXAMPLES
            if unit.kind == "import" or unit.binds & needed or acts:
                keep.add(i)
                needed |= unit.uses | unit.binds
        for i, unit in enumerate(foreign):
            if unit.binds & (needed - have) and entry_point not in unit.binds:
                borrowed[i] = unit
                needed |= unit.uses
    if len(keep) == len(units):
        body = chosen
    else:
        body = "\n".join(units[i].text for i in sorted(keep))
    before = [u.text for u in (*helpers, *(borrowed[i] for i in sorted(borrowed)))]
    if not before:
        return body
    # imports from __future__ have to come first
    future = [line for line in body.split("\n") if line.startswith("from __future__ ")]
    rest = "\n".join(line for line in body.split("\n") if line not in future)
    return "\n".join([*future, *before, "", rest])


def _prompt_units(prompt: str, entry_point: str) -> list[_Unit]:
    """What a prompt provides besides the function it asks for: imports and helper functions."""
    source = next((s for s in (prompt, prompt.rstrip() + "\n    pass\n") if _compiles(s)), "")
    return [u for u in _units(source) if entry_point not in u.binds]
