"""From what a model wrote to what is scored. Pure functions, standard library only.

Chat models wrap code in prose and fences, restate the function or give only its body, add examples that run at
import, and end with chat tokens. `extract_code` finds the program in such an answer:
    1. cut at the first chat end token, take what lies between [BEGIN] and [DONE];
    2. collect the pieces of valid Python: the fenced blocks, else the parts of the text that compile;
    3. take the first piece that really defines the entry point, else read the answer as the body of the
       prompt's function;
    4. keep of it what the entry point reaches (and helpers from other pieces and from the prompt), so that
       example calls, asserts and stray words are not run.
The code is never changed, only cut and put together. What was done is in Extracted.how and .why_cut.
"""

from __future__ import annotations

import ast
import builtins
import re
import symtable
import textwrap
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

END_TOKEN = re.compile(r"<\|(?:im_end|im_start|endoftext|eot_id|dlm_pad|start_header_id)\|>")
FENCE = re.compile(r"```(?:([\w+-]*)[ \t]*(?=\n|$))?")
PARSED_LINES = 40_000  # per answer: a degenerate text of hundreds of lines would take seconds
CODE_START = re.compile(
    r"(?:import|from|def|async|class|if|for|while|try|with)\b|@|[A-Za-z_][\w.\[\]'\", ]*\s*[:+*-]?="
)
BUILTINS = frozenset(dir(builtins)) | {"__name__", "__file__", "__doc__"}
# a statement at top level that uses one of these shows the function off, or waits for a user
SHOWING_OFF = frozenset({"print", "input", "unittest", "doctest", "__name__", "exit", "quit"})
LOOKS_UP_NAMES = frozenset(
    {"globals", "locals", "vars", "eval", "exec"}
)  # with these any name may be reached


@dataclass(frozen=True)
class Extracted:
    """code: the candidate's source, "" for an empty answer.

    how: "fence" | "text" | "body" (completed with the prompt) | "none" (no program was found: the raw text)
    why_cut: what was left out of the answer and why, "" if nothing; reasons joined with "; "
    """

    code: str
    how: str
    why_cut: str


@dataclass(frozen=True)
class _Unit:
    """Top-level statements that share lines: their text, the names they bind, the global names they use."""

    text: str
    binds: frozenset[str]
    uses: frozenset[str]
    kind: str  # "import" | "def" | "assign" (to plain names) | "assert" | "other"


def extract_code(
    text: str,
    entry_point: str | None = None,
    prompt: str = "",
    *,
    roots: Iterable[str] = (),
    prefill: str = "",
) -> Extracted:
    """The program in an answer.

    entry_point: the function asked for; None: the first piece that defines anything is taken, whole.
    prompt: the source that the answer may continue (HumanEval), "" if there is none.
    roots: further names that the tests use and that must be kept.
    prefill: the beginning of the answer that the prompt gave; text is what follows it.
    """
    answer, cuts = _cut(text)
    text = _normalise(prefill) + answer
    if not answer.strip():
        return Extracted("", "none", "; ".join([*cuts, "empty answer"]))
    fenced = _fences(text)
    try:
        code, how = _find(text, fenced, entry_point, prompt, set(roots))
    except RecursionError:  # nested deeper than can be looked through
        code, how = "", "none"
    if how == "none":
        return Extracted(
            textwrap.dedent(fenced[0] if fenced else text).strip("\n") + "\n", how, "; ".join(cuts)
        )
    kept = {line.strip() for line in code.split("\n")}
    if any(
        line.strip() not in kept
        for line in answer.split("\n")
        if line.strip() and "```" not in line
    ):
        cuts.append("text outside the program")
    end = "\n\n" if code.rstrip("\n").endswith("\\") else "\n"  # a backslash needs its empty line
    return Extracted(code.rstrip("\n") + end, how, "; ".join(cuts))


def _find(
    text: str, fenced: list[str], entry_point: str | None, prompt: str, roots: set[str]
) -> tuple[str, str]:
    """(code, how); how is "none" where no program was found."""
    pieces = [piece for block in fenced for piece in _pieces(block)]
    chosen, how = _first_defining(pieces, entry_point), "fence"
    if chosen is None:
        loose = _pieces(text)
        chosen, how, pieces = _first_defining(loose, entry_point), "text", pieces + loose
    if chosen is None and prompt and entry_point:
        bodies = (_as_body(prompt, block, entry_point) for block in (*fenced, text))
        chosen, how = next((b for b in bodies if b), None), "body"
    if chosen is None:
        return "", "none"
    if entry_point is None:
        return chosen, how
    code = _reachable(
        chosen, [p for p in pieces if p != chosen], prompt, entry_point, {entry_point, *roots}
    )
    return code if _compiles(code) else chosen, how


def clean_answer(text: str) -> str:
    """A short answer in prose: one leading "A:" is dropped, it ends at a blank line or at the next question."""
    text = _normalise(text)
    end = END_TOKEN.search(text)
    text = text[: end.start()] if end else text
    text = re.sub(r"^\s*(?:A:)?\s*", "", text)
    return re.split(r"\n\s*\n|\nQ:", text)[0].strip()


def called_names(tests: str) -> list[str]:
    """Names that the source of some tests calls or reads and does not itself provide, in order of appearance.

    The first is the entry point of an MBPP task: `assert set(similar(a)) == set(b)` gives ["similar"].
    Raises SyntaxError where the tests are not Python.
    """
    nodes = list(ast.walk(_parse(_normalise(tests))))
    bound = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {(a.asname or a.name).split(".")[0] for a in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    called = {id(n.func) for n in nodes if isinstance(n, ast.Call)}
    loads = [n for n in nodes if isinstance(n, ast.Name) and n.id not in bound]
    loads.sort(key=lambda n: (id(n) not in called, n.lineno, n.col_offset))
    own = [n.id for n in loads if n.id not in BUILTINS]
    hidden = [n.id for n in loads if id(n) in called][
        :1
    ]  # a task may ask for a function called `sum`
    return list(dict.fromkeys(own or hidden))


# ---------------------------------------------------------------- cutting


def _normalise(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _cut(text: str) -> tuple[str, list[str]]:
    """The answer without what follows a chat end token, and what lies between [BEGIN] and [DONE]."""
    cuts = []
    text = _normalise(text)
    if end := END_TOKEN.search(text):
        text = text[: end.start()]
        cuts.append(f"end token {end.group()}")
    marked = "[BEGIN]" in text or "[DONE]" in text
    if "[BEGIN]" in text:
        text = text.split("[BEGIN]", 1)[1]
    if "[DONE]" in text:
        text = text.split("[DONE]", 1)[0]
        cuts.append("[DONE]")
    quoted = (
        text.strip()
    )  # OpenCompass's MBPP examples put the code in quotes; its [DONE] may be cut off already
    marked = marked or re.match(r"\s*(?:import|from|def|class|@)\b", quoted[1:]) is not None
    if (
        marked
        and len(quoted) > 1
        and quoted[0] == quoted[-1] in "'\""
        and quoted[:3] != quoted[0] * 3
    ):
        text = quoted[1:-1]
    return text, cuts


def _fences(text: str) -> list[str]:
    """What stands inside the fences. A tagged fence opens a block even where one is open; the last may be open."""
    blocks: list[str] = []
    start: int | None = None
    for fence in FENCE.finditer(text):
        if start is not None:
            blocks.append(text[start : fence.start()])
        start = fence.end() if start is None or fence.group(1) else None
    if start is not None:
        blocks.append(text[start:])
    return [b for b in blocks if b.strip()]


FAULTS = (
    SyntaxError,
    ValueError,
    RecursionError,
    MemoryError,
    OverflowError,
)  # what compiling a text can raise


def _parse(source: str) -> ast.Module:
    """The tree of a program; raises one of FAULTS where it is none. (ast.parse alone lets a stray `return` pass.)"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d" in an answer is the model's affair
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
        step = (
            1 if tries < 10 else 2 ** (tries - 9)
        )  # two or three tries do, but for degenerate texts
        try:
            _parse("\n".join(lines[:n]))
            return n
        except SyntaxError as e:
            n = min(n - step, e.lineno or n)  # what stands after the fault cannot mend it
        except FAULTS:
            n -= step
    return 0


def _pieces(text: str) -> list[str]:
    """The parts of a text that are Python: all of it, or each longest run of lines that compiles."""
    text = textwrap.dedent(text).strip("\n")
    if _compiles(text):
        return [text]
    lines, pieces, i, budget = text.split("\n"), [], 0, PARSED_LINES
    while i < len(lines) and budget > 0:
        n = _longest_prefix(lines[i:]) if CODE_START.match(lines[i]) else 0
        budget -= len(lines) - i
        if n:
            pieces.append("\n".join(lines[i : i + n]))
        i += max(n, 1)
    return pieces


def _first_defining(pieces: list[str], entry_point: str | None) -> str | None:
    """The first piece that defines the entry point with a body of its own; None if there is none."""
    for piece in pieces:
        body = _parse(piece).body
        if entry_point is None:
            if any(
                isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) for n in body
            ):
                return piece
        elif _defines(body, entry_point):
            return piece
    return None


def _defines(body: list[ast.stmt], name: str) -> bool:
    """Whether the last top-level binding of name is more than a signature with a docstring."""
    for node in reversed(body):
        if (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            and node.name == name
        ):
            return not all(map(_idle, node.body))
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in node.targets
        ):
            return True
    return False


def _idle(node: ast.stmt) -> bool:
    """Whether a statement stands where a body is still to come: pass, ..., a docstring, raise NotImplementedError."""
    if isinstance(node, ast.Raise):
        return "NotImplementedError" in ast.unparse(node)
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return constant or isinstance(node, (ast.Pass, ast.Import, ast.ImportFrom))


def _as_body(prompt: str, text: str, entry_point: str) -> str | None:
    """prompt + text, read as the body of the prompt's last function; None where that is no program.

    The first line, or all of them, may have lost the indentation.
    """
    head = _normalise(prompt).rstrip("\n ").split("\n")
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
    """The top-level statements of a source that compiles, with their comments left out."""
    lines = source.split("\n")
    spans: list[list] = []
    for node in _parse(source).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        if spans and first <= spans[-1][1]:  # a; b on one line
            spans[-1][1] = max(spans[-1][1], node.end_lineno)
            spans[-1][2] = "other"
        else:
            spans.append([first, node.end_lineno, _kind(node)])
    # a backslash at the end of a statement continues it with an empty line: put elsewhere it would not be empty
    return [
        _unit("\n".join(lines[first - 1 : last]).rstrip("\\"), kind) for first, last, kind in spans
    ]


def _kind(node: ast.stmt) -> str:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return "import"
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return "def"
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    if isinstance(node, (ast.Assign, ast.AnnAssign)) and all(
        isinstance(t, ast.Name) for t in targets
    ):
        return "assign"
    return "assert" if isinstance(node, ast.Assert) else "other"


def _unit(text: str, kind: str) -> _Unit:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = symtable.symtable(text, "<answer>", "exec")
    symbols = table.get_symbols()
    binds = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported()}
    uses = {s.get_name() for s in symbols if s.is_referenced()}
    inner = list(table.get_children())
    while inner:
        table = inner.pop()
        uses |= {s.get_name() for s in table.get_symbols() if s.is_global()}
        binds |= {
            s.get_name() for s in table.get_symbols() if s.is_declared_global() and s.is_assigned()
        }
        inner += table.get_children()
    return _Unit(text, frozenset(binds), frozenset(uses), kind)


def _reachable(
    chosen: str, others: list[str], prompt: str, entry_point: str, roots: set[str]
) -> str:
    """The statements of chosen that the roots need, after those they need from other pieces and the prompt.

    A statement is needed where it binds a needed name, or acts on one (or on a module) without being a use of
    the entry point. Imports stay. Where nothing is left out, chosen comes back as it is.
    """
    units = _units(chosen)
    bound = frozenset().union(*(u.binds for u in units))
    helpers = [u for u in _prompt_units(prompt, entry_point) if not u.binds <= bound]
    foreign = [
        u
        for piece in others
        for u in _units(piece)
        if u.kind != "assert" and not u.uses & SHOWING_OFF
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
            acts = acts and entry_point not in unit.uses and not unit.uses & SHOWING_OFF
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
    future = [
        line for line in body.split("\n") if line.startswith("from __future__ ")
    ]  # has to come first
    rest = "\n".join(line for line in body.split("\n") if line not in future)
    return "\n".join([*future, *before, "", rest])


def _prompt_units(prompt: str, entry_point: str) -> list[_Unit]:
    """What a prompt gives beside the function it asks for: imports and helper functions."""
    prompt = _normalise(prompt)
    source = next((s for s in (prompt, prompt.rstrip() + "\n    pass\n") if _compiles(s)), "")
    return [u for u in _units(source) if entry_point not in u.binds] if source else []
