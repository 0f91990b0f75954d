"""The import rule: eval -> harness -> experiment -> {models, decoding, tasks, sandbox} -> utils.

`reporting` and `suite` stand above `experiment`; only `suite` and `scripts` import `eval`. The
tests read the source of every module, so that they find imports inside functions too. Imports
under `if TYPE_CHECKING:` do not count.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module may import its own room and rooms of lower floors. scripts, dev and tests may import any.
FLOORS = (
    ("utils",),
    ("models", "decoding", "sandbox"),
    ("tasks",),
    ("experiment",),
    ("harness", "reporting"),
    ("eval",),
    ("suite",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# The only imports upwards, inside functions: (room, module).
UPWARDS = {
    # A user looks for the answer patterns in utils.py; they need the finder of programs in a text.
    ("utils", "tasks.programs"),
}

# Packages that no module of the room imports, not even inside a function.
NEVER = {
    "utils": {"torch", "transformers", "lm_eval", "datasets"},
    "reporting": {"torch", "transformers", "lm_eval", "datasets"},
    "tasks": {"torch", "transformers"},
    "decoding": {"transformers", "lm_eval", "datasets"},
    "models": {"lm_eval", "datasets"},
}

# Slow to import. Lean rooms import them inside functions only, so that --help is fast.
HEAVY = set("torch transformers lm_eval datasets tokenizers pandas scipy matplotlib".split())
LEAN = {"eval", "reporting", "utils", "suite", "tasks", "sandbox"}


class Import(NamedTuple):
    package: str
    module: str  # dotted, as imported
    line: int
    at_top: bool  # executed when the module is imported


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    """Every source file of every room."""
    return sorted([*ROOT.glob("*.py"), *(p for room in FLOOR for p in (ROOT / room).rglob("*.py"))])


def imports(tree: ast.AST, package: str, at_top: bool = True) -> Iterator[Import]:
    """Every import in a module of the room `package`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (
                Import(alias.name.split(".")[0], alias.name, node.lineno, at_top)
                for alias in node.names
            )
        elif isinstance(node, ast.ImportFrom):
            module = package if node.level else node.module
            yield Import(module.split(".")[0], module, node.lineno, at_top)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(ast.Module(node.orelse, []), package, at_top)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, package, at_top and not inside)


def broken_rules(source: str, room: str) -> list[str]:
    """One line for each forbidden import in the source of a module of `room`."""
    broken = []
    for package, module, line, at_top in imports(ast.parse(source), room):
        upwards = package in FLOOR and package != room and FLOOR[package] >= FLOOR[room]
        if upwards and (at_top or (room, module) not in UPWARDS):
            broken.append(f"{line}: {room} imports {package}, which is not below")
        if package in NEVER.get(room, ()):
            broken.append(f"{line}: {room} imports {package}")
        elif at_top and room in LEAN and package in HEAVY:
            broken.append(f"{line}: {room} imports {package} outside a function")
        if package in ("scripts", "dev", "tests") and room in FLOOR:
            broken.append(f"{line}: {room} imports {package}")
    return broken


def test_imports_go_downwards_only():
    found = {}
    for path in modules():
        name, room = str(path.relative_to(ROOT)), room_of(path)
        assert room in FLOOR, f"{name}: add its room to FLOORS"
        if broken := broken_rules(path.read_text(encoding="utf-8"), room):
            found[name] = broken
    assert found == {}


@pytest.mark.parametrize(
    ("room", "source", "problem"),
    [
        (
            "decoding",
            "from tasks.base import TaskSpec",
            "1: decoding imports tasks, which is not below",
        ),
        ("decoding", "def f():\n    import transformers", "2: decoding imports transformers"),
        ("decoding", "if TYPE_CHECKING:\n    from models import ModelConfig", None),
        (
            "decoding",
            "if TYPE_CHECKING:\n    x\nelse:\n    import tasks",
            "4: decoding imports tasks, which is not below",
        ),
        ("decoding", "from .schedule import x\nimport decoding.engine\nimport utils", None),
        ("tasks", "class C:\n    def f(self):\n        import torch.nn", "3: tasks imports torch"),
        ("tasks", "def f():\n    import lm_eval", None),
        (
            "tasks",
            "try:\n    import lm_eval\nexcept ImportError:\n    pass",
            "2: tasks imports lm_eval outside a function",
        ),
        ("models", "from lm_eval.api import model", "1: models imports lm_eval"),
        ("harness", "import eval", "1: harness imports eval, which is not below"),
        ("utils", "import tasks", "1: utils imports tasks, which is not below"),
        ("utils", "def f():\n    from tasks.programs import find_program", None),
        (
            "utils",
            "from tasks.programs import find_program",
            "1: utils imports tasks, which is not below",
        ),
        (
            "utils",
            "def f():\n    from tasks.base import build_task",
            "2: utils imports tasks, which is not below",
        ),
        (
            "models",
            "def f():\n    from tasks.programs import find_program",
            "2: models imports tasks, which is not below",
        ),
        ("eval", "import harness, tasks, utils", None),
        ("eval", "import torch", "1: eval imports torch outside a function"),
        ("utils", "from tests import oracle", "1: utils imports tests"),
    ],
)
def test_a_broken_rule_is_seen(room, source, problem):
    """Without this the test above could pass by finding nothing."""
    assert broken_rules(source, room) == ([problem] if problem else [])


def test_only_tests_use_mocks():
    """A program that replaces a library's functions depends on the library's internals."""
    files = [*modules(), *(ROOT / "scripts").rglob("*.py"), *(ROOT / "dev").rglob("*.py")]
    found = set()
    for path in files:
        if any(i.package in ("unittest", "mock") for i in imports(ast.parse(path.read_text()), "")):
            found.add(str(path.relative_to(ROOT)))
    assert found == set()


@pytest.mark.parametrize(
    "module",
    [
        "utils",
        "experiment.arguments",
        "experiment.resolve",
        "experiment.checks",
        "experiment.result",
        "experiment.store",
        "eval",
        "tasks",
        "models",
        "suite.table",
        "suite.local",
        "suite.worker",
    ],
)
def test_the_front_of_the_program_loads_nothing_heavy(module):
    """A lean module must not import a heavy package through another module either."""
    code = f"import sys, {module}; print(sorted({HEAVY!r} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr
