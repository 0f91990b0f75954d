"""`--plugin FILE.py`: a file of the user's own that adds entries to the tables.

The entries are models, benchmarks, algorithms or families. The file is imported before the flags
are read, so its entries are choices and its options are flags. It may add entries and may not
replace one. Its sha256 is part of the identity of the runs that use one of its entries, and of no
other run. The sha256 does not cover modules that the file imports.

A process hands the checksums of its plugins to its children (DLLMEXP_PLUGINS). A worker that finds
a changed file ends with exit code 4 and computes nothing.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from utils import BadDataError, UsageError, file_sha256

FLAG = "--plugin"
EXPECTED = "DLLMEXP_PLUGINS"  # JSON: absolute path -> sha256
Tables = Mapping[str, dict]  # kind of entry ("model", "task", ...) -> the table


@dataclass(frozen=True)
class Plugin:
    """A file that has been imported. entries: (table, name) of everything that it added."""

    path: str
    sha256: str
    entries: frozenset[tuple[str, str]]


_loaded: dict[str, Plugin] = {}


def paths_in(argv: Iterable[str]) -> list[str]:
    """The absolute paths of the plugins that a command line names, each once.

    Raises UsageError for a name that is empty.
    """
    words = list(argv)
    named = [b for a, b in zip(words, words[1:]) if a == FLAG]
    named += [word.partition("=")[2] for word in words if word.startswith(f"{FLAG}=")]
    if "" in named:
        raise UsageError(f"{FLAG} '': give a Python file, FILE.py")
    return list(dict.fromkeys(str(Path(name).expanduser().resolve()) for name in named))


def checksums(argv: Iterable[str]) -> dict[str, str]:
    """Absolute path -> sha256 of the plugins that a command line names.

    Imports nothing. Raises UsageError where a file cannot be read.
    """
    return {path: _sha256(path) for path in paths_in(argv)}


def loaded() -> dict[str, str]:
    """Absolute path -> sha256 of the plugins of this process and of its parents."""
    return json.loads(os.environ.get(EXPECTED, "{}"))


def expect(checksums: Mapping[str, str]) -> None:
    """Accept no other bytes of these plugins in this process and in its children."""
    os.environ[EXPECTED] = json.dumps(loaded() | dict(checksums))


def load(argv: Sequence[str], tables: Tables) -> None:
    """Import the plugins that a command line names, each once in a process.

    Raises UsageError where a file is missing, fails or replaces an entry, and BadDataError where it
    is not the file that the parent process has loaded.
    """
    for path, found in checksums(argv).items():
        if loaded().get(path, found) != found:
            raise BadDataError(
                f"{FLAG} {path} has changed since the run was planned; start the run again"
            )
        expect({path: found})
        if path not in _loaded:
            _loaded[path] = Plugin(path, found, _import(path, tables))


def used_by(names: Mapping[str, str]) -> tuple[dict[str, str], ...]:
    """{"path", "sha256"} of each plugin that added one of these entries; names: table -> name."""
    used = [plugin for plugin in _loaded.values() if plugin.entries & set(names.items())]
    return tuple({"path": plugin.path, "sha256": plugin.sha256} for plugin in used)


def _sha256(path: str) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise UsageError(f"{FLAG} {path} cannot be read: {error.strerror}") from None


def _import(path: str, tables: Tables) -> frozenset[tuple[str, str]]:
    """Import the file and return the entries that it added.

    Where the file is refused, the tables are restored.
    """
    before = {name: dict(table) for name, table in tables.items()}
    # entries of this table are dicts that a file could edit in place
    kept = copy.deepcopy(before["model"])
    name = f"dllmexp_plugin_{Path(path).stem}"
    folder = str(Path(path).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise UsageError(f"{FLAG} {path}: give a Python file, FILE.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # "my_rule:MyHarness" means this module; harness.py and datasets.py are others' names, too
    found = PathFinder.find_spec(Path(path).stem)
    if found is not None and found.origin and Path(path).samefile(found.origin):
        sys.modules.setdefault(Path(path).stem, module)
    try:
        spec.loader.exec_module(module)
        _refuse_replaced(path, tables, before, kept)
    except BaseException as error:
        for table, entries in before.items():
            tables[table].clear()
            tables[table].update(entries)
        before["model"].update(kept)
        tables["model"].update(kept)
        if isinstance(error, Exception | SystemExit) and not isinstance(error, UsageError):
            raise UsageError(f"{FLAG} {path}{_where(error, path)}: {_first_line(error)}") from error
        raise
    return frozenset((t, n) for t, table in tables.items() for n in table.keys() - before[t].keys())


def _refuse_replaced(path: str, tables: Tables, before: Mapping[str, dict], kept: dict) -> None:
    for what, entries in before.items():
        for name, entry in entries.items():
            if tables[what].get(name) is not entry or (what == "model" and entry != kept[name]):
                raise UsageError(
                    f"{FLAG} {path} replaces the {what} {name!r}; "
                    "a plugin may only add: choose another name"
                )


def _first_line(error: BaseException) -> str:
    text: Any = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"


def _where(error: BaseException, path: str) -> str:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines = [error.lineno]
    return f", line {lines[-1]}" if lines else ""
