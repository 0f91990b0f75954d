"""Finds the Python program in a text. Pure functions on syntax trees.

The functions for each benchmark, and the patterns that cut an answer into text and fenced blocks,
are in utils.py ("answer patterns"). They call `find_program`, which
    1. collects the pieces of valid Python: the fenced blocks, else the parts that compile;
    2. takes the last piece with a complete definition of the entry point, else reads the answer as
       the body of the prompt's function;
    3. keeps of it what the entry point reaches, with helpers from other pieces and from the prompt,
       so that example calls, asserts and stray words are not run.
The code is only cut and joined; of Markdown's "\\_", where it is a fault, the backslash is removed.
"""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from sandbox.names import names_of, without_warnings
from utils import CODE_FENCE

MAX_COMPILED = (
    400_000  # characters compiled in search of pieces, per answer: a degenerate text ends
)
CODE_START = re.compile(
    r"(?:import|from|def|async|class|if|for|while|try|with)\b|@|[A-Za-z_][\w.\[\]'\", \t]*[:+*-]?="
)
# a line that continues the statement before it: that one was cut by a fault
CONTINUES = re.compile(r"[ \t]|(?:return|yield|elif|else|except|finally)\b")
# a statement at the left margin with its decorators, to the next one
TOP_LEVEL = re.compile(
    r"^(?:@.*\n)*\S.*(?:\n(?:[ \t)\]}#]|(?:elif|else|except|finally)\b|(?=\n)).*)*", re.MULTILINE
)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
BUILTINS = frozenset(dir(builtins)) | {"__name__", "__file__", "__doc__"}
# a top-level statement that uses one of these is an example, or waits for a user
EXAMPLES = frozenset({"print", "input", "unittest", "doctest", "__name__", "exit", "quit"})
ENDS = {"sys.exit", "os._exit", "os.abort"}
# a function that uses one of these may reach any name
LOOKS_UP_NAMES = frozenset({"globals", "locals", "vars", "eval", "exec"})
# values that cannot be called: an assignment of one defines no function
NOT_CALLABLE = (
    *(ast.Constant, ast.JoinedStr, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Compare),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.BinOp, ast.UnaryOp),
)
# what compile() can raise
FAULTS = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError)


@dataclass(frozen=True)
class _Unit:
    """Top-level statements that share lines, with the names that they bind and use."""

    text: str
    binds: frozenset[str]
    uses: frozenset[str]
    kind: str  # "import" | "def" | "assign" (to plain names) | "assert" | "exit" | "other"


@dataclass(frozen=True)
class _Piece:
    """Python found in a text. cut: a fault ended it inside its last statement."""

    source: str
    cut: bool = False


@dataclass
class _Budget:
    left: int = MAX_COMPILED


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
    The time is linear in the length of the text.
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
    budget = _Budget()
    fenced = [piece for block in blocks for piece in _pieces(block, budget)]
    chosen, pieces, how = _chosen(text, blocks, fenced, entry_point, prompt, budget)
    if chosen is None:
        return None, "none"
    if entry_point is None:
        return chosen, how
    others = [piece.source for piece in pieces if piece.source != chosen]
    code = _reachable(chosen, others, prompt, entry_point, {entry_point, *roots})
    return code if _compiles(code) else chosen, how


def _chosen(
    text: str,
    blocks: list[str],
    fenced: list[_Piece],
    entry_point: str | None,
    prompt: str,
    budget: _Budget,
) -> tuple[str | None, list[_Piece], str]:
    """(the source that defines the entry point, all pieces, how), by the first reading that does.

    A body is read before assignments: a local variable may be called as the function is.
    """
    without_fences = CODE_FENCE.sub("\n", text)  # a fence may be glued to the last line of code
    texts = [text] if without_fences == text else [text, without_fences]
    if entry_point is None:
        found = _first_defining(fenced)
        pieces = fenced if found else [p for t in texts for p in _pieces(t, budget)]
        return found or _first_defining(pieces), pieces, "fence" if found else "text"
    if found := _last_complete(fenced, entry_point):
        return found, fenced, "fence"
    as_text, returns = _as_body(prompt, texts, entry_point, budget)
    if as_text and returns:
        return as_text, fenced, "body"
    loose: list[_Piece] = []
    for more in (*(_pieces(t, budget) for t in texts), _indented(text, budget)):
        loose += more
        if found := _last_complete(more, entry_point):
            return found, fenced + loose, "text"
    as_block = [_as_body(prompt, [block], entry_point, budget) for block in reversed(blocks)]
    if found := next((code for code, returns in as_block if returns), None):
        return found, fenced + loose, "body"
    for defines in (_assigns, _begins):
        for pieces, how in ((fenced, "fence"), (loose, "text")):
            for piece in reversed(pieces):
                if defines(_parse(piece.source).body, entry_point):
                    return piece.source, fenced + loose, how
    found = next((code for code, _ in as_block if code), as_text)
    return found, fenced + loose, "body"


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


@lru_cache(maxsize=64)
def _parse(source: str) -> ast.Module:
    """The tree of a program. Raises one of FAULTS; ast.parse alone accepts a stray `return`."""
    with without_warnings():
        tree = ast.parse(source)
        for node in tree.body:  # one by one: thousands of equal functions take a quadratic time
            compile(ast.Module([node], []), "<answer>", "exec", dont_inherit=True)
        return tree


def _compiles(source: str) -> bool:
    try:
        _parse(source)
    except FAULTS:
        return False
    return True


def _longest_prefix(lines: list[str], budget: _Budget, at_least: int = 1) -> int:
    """How many of the first lines compile, as many as possible; 0 if fewer than at_least do."""
    n = len(lines)
    tries = 0
    while n >= at_least and budget.left > 0:
        tries += 1
        # two or three tries are enough, except for degenerate texts
        step = 1 if tries < 10 else 2 ** (tries - 9)
        source = "\n".join(lines[:n])
        try:
            _parse(source)
            return n
        except SyntaxError as e:
            at = e.lineno or n
            # an open bracket or string is noticed at the end
            whole = re.search("never closed|unterminated|EOF", e.msg)
            read = len(source) if whole else sum(map(len, lines[:at])) + len(source) // 50
            n = min(n - step, at)  # lines after the fault cannot mend it
        except FAULTS:
            read = len(source)
            n -= step
        budget.left -= read + 20
    return 0


def _pieces(text: str, budget: _Budget) -> list[_Piece]:
    """The parts of a text that are Python: all of it, or each longest run that compiles."""
    text = textwrap.dedent(text).strip("\n")
    if "\\_" in text and not _compiles(text):
        in_part = TOP_LEVEL.sub(lambda found: _unescaped(found.group(), budget), text)
        text = next(filter(_compiles, (in_part, text.replace("\\_", "_"))), in_part)
    if _compiles(text):
        return [_Piece(text)]
    lines, pieces, i = text.split("\n"), [], 0
    while i < len(lines) and budget.left > 0:
        n = _longest_prefix(lines[i:], budget) if CODE_START.match(lines[i]) else 0
        if n:
            after = next((line for line in lines[i + n :] if line.strip()), "")
            pieces.append(_Piece("\n".join(lines[i : i + n]), CONTINUES.match(after) is not None))
        i += max(n, 1)
    return pieces


def _unescaped(source: str, budget: _Budget) -> str:
    """A top-level statement without Markdown's escape of underscores, if more of it compiles so."""
    plain = source.replace("\\_", "_")
    if plain == source:
        return source
    read, of_plain = (_longest_prefix(s.split("\n"), budget) for s in (source, plain))
    return plain if of_plain > read else source


def _indented(text: str, budget: _Budget) -> list[_Piece]:
    """The pieces of the indented parts of a text, as Markdown sets code without a fence."""
    pieces, part, width = [], [], 0
    for line in [*text.split("\n"), "end"]:
        indent = len(line) - len(line.lstrip())
        if part and line.strip() and indent < width:
            pieces += _pieces("\n".join(part), budget)
            part = []
        if part or (indent and CODE_START.match(line.lstrip())):
            width = width if part else indent
            part.append(line)
    return pieces


def _first_defining(pieces: list[_Piece]) -> str | None:
    """The source of the first piece that defines anything, or None."""
    for piece in pieces:
        if any(isinstance(node, DEFINITIONS) for node in _parse(piece.source).body):
            return piece.source
    return None


def _last_complete(pieces: list[_Piece], name: str) -> str | None:
    """The source of the last piece with a complete definition of name, or None.

    A signature with a docstring is none, nor is a definition that a fault has cut. Where one
    follows the complete definition it is left out.
    """
    for piece in reversed(pieces):
        body, later = _parse(piece.source).body, []
        for node in reversed(body):
            if not (isinstance(node, DEFINITIONS) and node.name == name):
                continue
            if not (_is_stub(node) or piece.cut and node is body[-1]):
                return _without(piece.source, later)
            later.append(node)
    return None


def _without(source: str, nodes: list[ast.stmt]) -> str:
    """A source without some of its top-level statements."""
    lines: list[str | None] = list(source.split("\n"))
    for node in nodes:
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        lines[first - 1 : node.end_lineno] = [None] * (node.end_lineno - first + 1)
    return "\n".join(line for line in lines if line is not None)


def _begins(body: list[ast.stmt], name: str) -> bool:
    """Whether statements define name with more than a signature, though perhaps not to its end."""
    return any(isinstance(n, DEFINITIONS) and n.name == name and not _is_stub(n) for n in body)


def _assigns(body: list[ast.stmt], name: str) -> bool:
    """Whether the last assignment to name gives it a value that can be a function."""
    for node in reversed(body):
        if isinstance(node, ast.Assign):
            targets = node.targets
        else:
            targets = [node.target] if isinstance(node, ast.AnnAssign) and node.value else []
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            return not isinstance(node.value, NOT_CALLABLE)
    return False


def _is_stub(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    return all(map(_is_placeholder, node.body))


def _is_placeholder(node: ast.stmt) -> bool:
    """Whether a statement only fills an empty body: pass, an import, raise NotImplementedError."""
    if isinstance(node, ast.Raise):
        return "NotImplementedError" in ast.unparse(node)
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return constant or isinstance(node, (ast.Pass, ast.Import, ast.ImportFrom))


def _as_body(prompt: str, texts: list[str], name: str, budget: _Budget) -> tuple[str | None, bool]:
    """(prompt + text, read as the body of the prompt's function, whether that returns anything).

    The longest body of those that return counts. The code is None where it is no program. The first
    line of a text, or all of them, may have lost the indentation, or underscores be escaped.
    """
    if not prompt:
        return None, False
    head = prompt.rstrip("\n ").split("\n")
    readings: list[str] = []
    for text in (t.strip("\n").rstrip() for t in texts):
        for reading in (text, text.replace("\\_", "_")):
            dedented = textwrap.indent(textwrap.dedent(reading), "    ")
            readings += [reading, dedented, "    " + reading.lstrip()]
    best, best_end, best_returns = None, 0, False
    for reading in dict.fromkeys(readings):
        lines = head + reading.split("\n")
        lines = lines[: _longest_prefix(lines, budget, at_least=len(head) + 1)]
        named = [
            node
            for node in _parse("\n".join(lines)).body
            if isinstance(node, DEFINITIONS) and node.name == name
        ]
        if not named or named[-1].lineno > len(head) or _is_stub(named[-1]):
            continue
        returns, end = _returns(named[-1].body), named[-1].end_lineno
        if (returns, end) > (best_returns, best_end):
            best, best_end, best_returns = "\n".join(lines), end, returns
    return best, best_returns


def _returns(body: Iterable[ast.AST]) -> bool:
    """Whether the statements of a function return or yield, functions inside it apart."""
    todo = list(body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.Return, ast.Yield, ast.YieldFrom)):
            return True
        if not isinstance(node, (*DEFINITIONS, ast.Lambda)):
            todo += ast.iter_child_nodes(node)
    return False


# ---------------------------------------------------------------- what the entry point reaches


def _units(source: str) -> list[_Unit]:
    """The top-level statements of a source that compiles, without the comments between them."""
    lines, tree = source.split("\n"), _parse(source)
    imported = _imported(tree)
    groups: list[tuple[int, int, list[ast.stmt]]] = []  # first line, last line, statements
    for node in tree.body:
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
        ends = any(_exits(node, imported) for node in nodes)
        kind = _kind(nodes[0], ends) if len(nodes) == 1 else "exit" if ends else "other"
        units.append(_Unit(text, names.binds, names.uses, kind))
    return units


def _kind(node: ast.stmt, ends: bool) -> str:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return "import"
    if isinstance(node, DEFINITIONS):
        return "def"
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    if isinstance(node, (ast.Assign, ast.AnnAssign)) and all(
        isinstance(t, ast.Name) for t in targets
    ):
        return "assign"
    if isinstance(node, ast.Assert):
        return "assert"
    return "exit" if ends else "other"


def _imported(tree: ast.Module) -> dict[str, str]:
    """name -> "module" or "module.name", of the imports at the top level."""
    imported = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            imported |= {a.asname or a.name: a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            for a in node.names:
                known = ENDS if a.name == "*" else {f"{node.module}.{a.name}"}
                of_module = (name for name in known if name.startswith(f"{node.module}."))
                imported |= {a.asname or name.rpartition(".")[2]: name for name in of_module}
    return imported


def _exits(node: ast.stmt, imported: dict[str, str]) -> bool:
    """Whether a statement may end the program: sys.exit(), os._exit(), raise SystemExit."""
    todo: list[ast.AST] = [node]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Raise) and node.exc is not None:
            if "SystemExit" in ast.unparse(node.exc):
                return True
        if isinstance(node, ast.Name) and imported.get(node.id) in ENDS:
            return True
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = imported.get(node.value.id, node.value.id)
            if f"{module}.{node.attr}" in ENDS:
                return True
        if not isinstance(node, (*DEFINITIONS, ast.Lambda)):
            todo += ast.iter_child_nodes(node)
    return False


def _reachable(
    chosen: str, others: list[str], prompt: str, entry_point: str, roots: set[str]
) -> str:
    """The statements of chosen that the roots need, preceded by what these need from elsewhere.

    That is from the other pieces and from the prompt.
    A statement is needed if it binds a needed name, or if it acts on one (or on a module or a file)
    and does not use the entry point. Imports are kept. Where nothing is left out, chosen is
    returned unchanged.
    """
    units = _units(chosen)
    bound = frozenset().union(*(u.binds for u in units))
    helpers = [u for u in _prompt_units(prompt, entry_point) if not u.binds <= bound]
    foreign = [
        u for piece in others for u in _units(piece) if u.kind != "assert" and not u.uses & EXAMPLES
    ]
    modules = frozenset().union(*(u.binds for u in units if u.kind == "import"))
    have = bound | BUILTINS | frozenset().union(*(u.binds for u in helpers))
    # name -> units that have to be kept, or borrowed, once the name is needed
    wanted: dict[str, list[int]] = {}
    lent: dict[str, list[int]] = {}
    acting = bound | {"open"}  # a file is a state, as a module is
    todo, needed = [*roots, *modules, "open"], set()
    for helper in helpers:
        todo += helper.uses
    for i, unit in enumerate(units):
        acts = unit.kind == "other" and not unit.uses & (EXAMPLES | {entry_point})
        for name in unit.binds | (unit.uses & acting if acts else frozenset()):
            wanted.setdefault(name, []).append(i)
        if unit.kind == "def" and unit.uses & LOOKS_UP_NAMES:
            todo += bound
    for i, unit in enumerate(foreign):
        for name in unit.binds - have if entry_point not in unit.binds else ():
            lent.setdefault(name, []).append(i)
    keep = {i for i, unit in enumerate(units) if unit.kind == "import"}  # binds nothing: import *
    borrowed: dict[int, _Unit] = {}
    while todo:
        name = todo.pop()
        if name in needed:
            continue
        needed.add(name)
        for i in wanted.get(name, ()):
            if i not in keep:
                keep.add(i)
                todo += units[i].uses | units[i].binds
        for i in lent.get(name, ()):
            if i not in borrowed:
                borrowed[i] = foreign[i]
                todo += foreign[i].uses
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
