"""A benchmark's rows, read from the original files or from the hub, and checked.

A directory holds the originals or another set in their formats, which a manifest.json declares:
    {"name": "mini", "counts": {"gsm8k/test.jsonl": 100, ...}}      rows per file
"""

from __future__ import annotations

import ast
import csv
import gzip
import json
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from utils import BadDataError, file_bytes, file_sha256, parse_fault

if TYPE_CHECKING:
    from tasks.base import TaskSpec


Rows = list[dict]
OWN = Path(__file__).resolve().parent.parent / "assets" / "benchmarks"
# extra of lm-eval -> the packages that it installs and a task imports
EXTRAS = {
    "math": ("sympy", "antlr4", "math_verify"),
    "ifeval": ("langdetect", "immutabledict", "nltk"),
}
MAX_PROBLEMS = 5  # per file: a file of another format would otherwise give thousands


class DataError(BadDataError):
    """Benchmark data that is missing, malformed or of the wrong size."""


@dataclass(frozen=True)
class Source:
    """One original file.

    fields: name -> "int" | "text" | "texts" (a list) | "source" (Python) | "sources", with a "?" at
        the end where it may be empty; "text like R" matches the regular expression R.

    rows: how many it must have. key: a field whose value may not occur twice.
    sha256: of the published file, None where nothing is published.
    columns + convert: for a CSV, the columns it must have and the row -> doc function.
    check: doc -> what else is wrong with it, or None.
    optional: the file may be absent; it has worked examples only.
    """

    path: str
    rows: int
    fields: Mapping[str, str]
    sha256: str | None = None
    key: str | None = None
    columns: tuple[str, ...] = ()
    convert: Callable[[dict], dict] | None = None
    check: Callable[[dict], str | None] | None = None
    optional: bool = False

    def problem(self, doc: dict) -> str | None:
        """Why a row is malformed, or None."""
        return _field_problem(doc, self.fields) or (self.check(doc) if self.check else None)


@dataclass(frozen=True)
class Data:
    """A benchmark's rows.

    name: "original" (the published files, byte for byte), "modified" (as many rows, other bytes),
        "local" (as many rows, of a benchmark without published files), "hub", or the name that a
        manifest.json gives the set.
    """

    name: str
    origin: str
    splits: Mapping[str, Rows]


def missing_extra(extra: str | None) -> str | None:
    """A line that names the packages that an extra of lm-eval lacks here, or None."""
    lacking = [name for name in EXTRAS.get(extra, ()) if find_spec(name) is None]
    if not lacking:
        return None
    return (
        f"this task needs the packages {', '.join(lacking)}: "
        f'pip install "lm-eval[{extra}]" -c requirements.txt'
    )


def check_data(spec: TaskSpec, data_dir: str | os.PathLike | None) -> list[str]:
    """The problems of the files below data_dir: sentences with file, line and field.

    Without data_dir nothing is checked where the hub has the data.
    """
    if spec.foreign or (data_dir is None and spec.hub is not None):
        return []
    try:
        load_data(spec, data_dir)
    except DataError as e:
        return e.problems
    return []


def data_checksums(spec: TaskSpec, data_dir: str | os.PathLike | None) -> dict[str, str]:
    """File -> sha256 of the originals and of their manifest.json; {} for the hub's data."""
    if data_dir is None or spec.foreign:
        return {}
    paths = [p for p in (*spec.files, "manifest.json") if (Path(data_dir) / p).is_file()]
    return {p: file_sha256(Path(data_dir) / p) for p in paths}


def load_data(spec: TaskSpec, data_dir: str | os.PathLike | None) -> Data:
    """The benchmark's rows from local files, or from the hub. Raises DataError."""
    if spec.foreign:
        return spec.build(None, next(iter(spec.forms))).data
    if data_dir is None:
        return _read_hub(spec)
    try:
        return _read_local(spec, Path(data_dir))
    except OSError as error:
        raise _unreadable(error) from error


def _unreadable(error: OSError) -> DataError:
    return DataError([f"{error.filename} cannot be read: {error.strerror}"])


def _read_local(spec: TaskSpec, data_dir: Path) -> Data:
    needed = [source.path for source in spec.sources if not source.optional]
    if not data_dir.is_dir():
        raise DataError(
            [f"data directory {data_dir} does not exist; it must hold {', '.join(needed)}"]
        )
    manifest = _read_manifest(data_dir)
    problems: list[str] = []
    rows: dict[str, Rows] = {}
    for source in spec.sources:
        path = data_dir / source.path
        if source.optional and not path.exists():
            rows[source.path] = []
            continue
        if not path.is_file():
            problems.append(f"{path} does not exist{_own_set(spec)}")
            continue
        expected = manifest["counts"].get(source.path) if manifest else source.rows
        rows[source.path], found = _read_source(path, source, expected)
        problems += found
    if not problems:
        splits = spec.split(rows)
        n = len(splits[spec.eval_split])
        if n == 0 or not manifest and n != spec.n_docs:
            problems.append(
                f"{data_dir}: {spec.name} has {n} documents to ask, expected {spec.n_docs}"
            )
    if problems:
        raise DataError(problems)
    return Data(name_of_data(spec, data_dir), str(data_dir), splits)


def _own_set(spec: TaskSpec) -> str:
    """Where the files of a benchmark are that this project alone has; "" for any other."""
    own = spec.hub is None and all((OWN / name).is_file() for name in spec.files)
    return f"; {OWN} has it" if own else ""


def name_of_data(spec: TaskSpec, data_dir: str | os.PathLike | None) -> str:
    """The name that `Data` has, without reading the rows. Raises DataError, OSError."""
    if data_dir is None or spec.foreign:
        return "hub"
    if manifest := _read_manifest(Path(data_dir)):
        return manifest["name"]
    published = [source for source in spec.sources if source.sha256]
    if not published:
        return "local"
    same = all(file_sha256(Path(data_dir) / s.path) == s.sha256 for s in published)
    return "original" if same else "modified"


def _read_manifest(data_dir: Path) -> dict | None:
    """{"name": str, "counts": {file: rows}} of a set that is not the originals, or None."""
    path = data_dir / "manifest.json"
    try:
        manifest = json.loads(file_bytes(path))
        name, counts = manifest["name"], manifest["counts"]
        good = isinstance(name, str) and name and all(isinstance(n, int) for n in counts.values())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(error) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise DataError(
            [f'{path}: expected {{"name": "...", "counts": {{"<file>": <rows>, ...}}}}']
        )
    return {"name": name, "counts": counts}


def data_name(data_dir: Path) -> str | None:
    """The name that a good manifest gives a data set; None for any other directory."""
    try:
        manifest = _read_manifest(data_dir)
    except DataError:  # the run reports it
        return None
    return manifest["name"] if manifest else None


def _read_source(path: Path, source: Source, expected: int | None) -> tuple[Rows, list[str]]:
    """Rows of one file and what is wrong with it."""
    rows: Rows = []
    problems: list[str] = []
    seen: dict[object, int] = {}
    try:
        for line, doc in (_csv_rows if source.columns else _json_rows)(path, source):
            bad = doc if isinstance(doc, str) else source.problem(doc)
            if bad is None and source.key and doc[source.key] in seen:
                value = doc[source.key]
                bad = f"field {source.key!r}: {value!r} was already on line {seen[value]}"
            if bad is None:
                rows.append(doc)
                if source.key:
                    seen[doc[source.key]] = line
            else:
                problems.append(f"{path}, line {line}: {bad}")
                if len(problems) == MAX_PROBLEMS:
                    return rows, [*problems, f"{path}: more may be wrong, stopped here"]
    except (
        OSError,
        EOFError,
        UnicodeDecodeError,
        csv.Error,
        zlib.error,
    ) as e:  # not gzip, cut short, not UTF-8
        return rows, [*problems, f"{path}: cannot be read: {e}"]
    if not problems and expected is not None and len(rows) != expected:
        problems.append(f"{path}: {len(rows)} rows, expected {expected}")
    return rows, problems


def _json_rows(path: Path, source: Source) -> Iterator[tuple[int, dict | str]]:
    """(line, row); a text in the place of a row says what is wrong with the line."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as f:
        for line, text in enumerate(f, start=1):
            if text.strip():
                try:
                    doc = json.loads(text)
                    json.dumps(doc, ensure_ascii=False).encode()  # "\ud800" alone is no text
                except (ValueError, RecursionError) as e:
                    yield line, f"not JSON: {parse_fault(e)}"
                else:
                    yield line, doc if isinstance(doc, dict) else "not a JSON object"


def _csv_rows(path: Path, source: Source) -> Iterator[tuple[int, dict | str]]:
    with open(path, newline="", encoding="utf-8-sig") as f:  # some public copies begin with a BOM
        reader = csv.DictReader(f)
        missing = [c for c in source.columns if c not in (reader.fieldnames or [])]
        if missing:
            yield 1, f"no column {', '.join(map(repr, missing))}"
            return
        for row in reader:
            short = [c for c in source.columns if row[c] is None]
            if short or None in row:
                yield (
                    reader.line_num,
                    f"field {short[0]!r} is missing" if short else "more fields than columns",
                )
            else:
                yield reader.line_num, source.convert(row) if source.convert else row


def _field_problem(doc: dict, fields: Mapping[str, str]) -> str | None:
    """Why doc is malformed, naming the first bad field, or None."""
    for name, kind in fields.items():
        if name not in doc:
            return f"field {name!r} is missing"
        kind, _, pattern = kind.partition(" like ")
        value, may_be_empty, kind = doc[name], kind.endswith("?"), kind.rstrip("?")
        if kind == "int":
            wanted, good = "an integer", isinstance(value, int) and not isinstance(value, bool)
        elif kind.endswith("s"):
            wanted = "a list of texts"
            good = isinstance(value, list) and all(isinstance(v, str) for v in value)
        else:
            wanted, good = "text", isinstance(value, str)
        if not good:
            return f"field {name!r}: expected {wanted}, got {value!r:.60}"
        if (
            kind != "int"
            and not may_be_empty
            and not (value.strip() if isinstance(value, str) else value)
        ):
            return f"field {name!r} is empty"
        if pattern and not re.search(pattern, value):
            return f"field {name!r} does not match {pattern}: {value!r:.60}"
        if kind.startswith("source"):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    ast.parse(value if isinstance(value, str) else "\n".join(value))
            except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
                return f"field {name!r} is not Python: {str(e) or 'nested too deeply'}"
    return None


def _read_hub(spec: TaskSpec) -> Data:
    """The hub's data set (its cache, HF_HOME and offline mode are honoured)."""
    if spec.hub is None:
        files = ", ".join(spec.files)
        raise DataError(
            f"{spec.name} has no data set on the hub; --data_dir DIR reads {files}{_own_set(spec)}"
        )
    repo, config = spec.hub
    splits: dict[str, Rows] = {}
    for subset in spec.subsets or (config,):
        found, origin = _parquet_splits(repo, subset) or (_loaded_splits(repo, subset), repo)
        own = {"subset": subset} if spec.subsets else {}
        for name in spec.split_names:
            splits.setdefault(name, []).extend(row | own for row in found.get(name, ()))
    docs = splits.get(spec.eval_split, [])
    problems = [
        f"{repo}, row {i}: {bad}" for i, d in enumerate(docs) if (bad := spec.sources[0].problem(d))
    ]
    if len(docs) != spec.n_docs:
        problems.append(
            f"{repo}: {len(docs)} documents in {spec.eval_split!r}, expected {spec.n_docs}"
        )
    if problems:
        raise DataError(problems[:MAX_PROBLEMS])
    return Data("hub", origin, splits)


def _parquet_splits(repo: str, config: str | None) -> tuple[dict[str, Rows], str] | None:
    """The splits, and the data set with its commit; None where `datasets` has to find the rows."""
    from models import CheckpointError
    from models.hub import parquet_files

    try:
        files = parquet_files(repo, config)
    except CheckpointError as error:
        raise DataError(f"{error}; --data_dir DIR reads local files") from error
    if not files:
        return None
    splits = {
        split: [row for path in paths for row in _rows(path)] for split, paths in files.items()
    }
    return splits, f"{repo}@{next(iter(files.values()))[0].parents[1].name}"


def _rows(path: Path) -> Rows:
    import pyarrow
    from pyarrow.parquet import read_table

    try:
        return read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path.resolve()} ({path.name}) cannot be read: {str(error).splitlines()[0]}; delete "
            "it, then the same command downloads it again"
        ) from error


def _loaded_splits(repo: str, config: str | None) -> dict[str, Rows]:
    import datasets

    from models.hub import beside, quiet

    quiet()
    try:
        [loaded] = beside([lambda: datasets.load_dataset(repo, config)])
    except Exception as e:  # whatever the network or the cache raises, the way out is the same
        raise DataError(
            f"cannot load data set {repo} from the hub ({type(e).__name__}: {e}); --data_dir DIR "
            "reads local files"
        ) from e
    return {name: [dict(row) for row in rows] for name, rows in loaded.items()}
