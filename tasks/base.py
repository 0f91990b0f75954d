"""What a benchmark is: its data, its prompt forms, and the lm-eval task made from both.

A benchmark is one file in this folder that exports `SPEC: TaskSpec`. `build_task(SPEC, data_dir, form)`
gives lm-eval 0.4.8 a `ConfigurableTask` that reads local files, or with data_dir None the hub's data set,
so that the index of all tasks is never built and `evaluate.load` is never called. Prompts, few-shot
examples, filters and metrics come from lm-eval's installed YAML files wherever it has them.

The task object carries, beside what lm-eval knows:
    task.form           the PromptForm
    task.form_name      its key in SPEC.forms
    task.data           the Data: its name, where it was read, its rows
    task.prefill(doc)   -> str, the beginning of the answer that the prompt form puts into the model's mouth
                        ("" for most). It is NOT in lm-eval's prompt: whoever generates appends it to the
                        rendered prompt by string concatenation (lm-eval's own way lets the chat template
                        render it, and LLaDA's template trims its last newline), and returns only what
                        follows it. Scoring puts it back in front of the answer.

Only the standard library is imported at the top: checking data must not wait for lm-eval.
"""

from __future__ import annotations

import ast
import csv
import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

Rows = list[dict]
MAX_PROBLEMS = 5  # per file: a file of another format would otherwise give thousands


class DataError(ValueError):
    """Benchmark data that is missing, malformed or of the wrong size. `.problems`: list[str], a sentence each."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class PromptForm:
    """One way to ask a benchmark's questions.

    source:       where the wording comes from.
    yaml:         lm-eval's installed definition it builds on, e.g. "gsm8k/gsm8k-cot.yaml".
    doc_to_text:  None: the installed one; a template; or a function installed template -> template.
    doc_to_target: as doc_to_text; it is only read for few-shot examples.
    num_fewshot:  default number of worked examples.
    multiturn:    examples are chat turns of their own, not text in the one user turn.
    prefill:      template of the beginning of the answer, see task.prefill above.
    until:        stop strings; None: the installed ones.
    clean:        the answer is cleaned before it is scored (code: always; see truthfulqa).
    """

    source: str
    yaml: str
    doc_to_text: str | Callable[[str], str] | None = None
    doc_to_target: str | Callable[[str], str] | None = None
    num_fewshot: int = 0
    multiturn: bool = False
    prefill: str = ""
    until: tuple[str, ...] | None = None
    clean: bool = True


@dataclass(frozen=True)
class Source:
    """One original file. fields: name -> "int" | "text" | "texts" (a list) | "source" (Python) | "sources", with a
    "?" at the end where it may be empty.

    rows: how many it must have. key: a field whose value may not occur twice.
    columns + convert: for a CSV, the columns it must have and the row -> doc function.
    """

    path: str
    rows: int
    fields: Mapping[str, str]
    key: str | None = None
    columns: tuple[str, ...] = ()
    convert: Callable[[dict], dict] | None = None


@dataclass(frozen=True)
class Data:
    """A benchmark's rows. name: "original", "hub", or the name that a manifest.json gives the set."""

    name: str
    origin: str
    splits: Mapping[str, Rows]


@dataclass(frozen=True)
class TaskSpec:
    """A benchmark. `build(data, form)` makes the lm-eval task; use build_task, which also reads the data.

    n_docs:   documents of the original test set.
    sources:  the original files below data_dir; `files` is their paths.
    hub:      (data set, configuration) for the case that there is no data_dir.
    splits:   rows by file -> rows by split, in the hub's naming; eval_split is the one that is asked.
    headline: lm-eval's key of the metric that stands for the benchmark.
    kind:     "code" | "math" | "qa".
    """

    name: str
    build: Callable[[Data, str], object]
    n_docs: int
    sources: tuple[Source, ...]
    hub: tuple[str, str | None]
    splits: Callable[[dict[str, Rows]], dict[str, Rows]]
    eval_split: str
    forms: Mapping[str, PromptForm]
    headline: str
    kind: str
    doc_fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(s.path for s in self.sources)


# ---------------------------------------------------------------- reading and checking


def check_data(spec: TaskSpec, data_dir: str | os.PathLike | None) -> list[str]:
    """Every problem of the files below data_dir, each a sentence with file, line and field; empty is good.

    With data_dir None there is nothing to check before the hub is asked.
    """
    if data_dir is None:
        return []
    try:
        _read_local(spec, Path(data_dir))
    except DataError as e:
        return e.problems
    return []


def data_checksums(spec: TaskSpec, data_dir: str | os.PathLike | None) -> dict[str, str]:
    """File -> sha256 of the originals (and of a manifest.json beside them); {} for the hub's data."""
    if data_dir is None:
        return {}
    paths = [p for p in (*spec.files, "manifest.json") if (Path(data_dir) / p).is_file()]
    return {p: hashlib.sha256((Path(data_dir) / p).read_bytes()).hexdigest() for p in paths}


def load_data(spec: TaskSpec, data_dir: str | os.PathLike | None) -> Data:
    """The benchmark's rows from local files, or from the hub. Raises DataError."""
    return _read_hub(spec) if data_dir is None else _read_local(spec, Path(data_dir))


def _read_local(spec: TaskSpec, data_dir: Path) -> Data:
    if not data_dir.is_dir():
        raise DataError([f"data directory {data_dir} does not exist; it must hold {', '.join(spec.files)}"])
    manifest = _read_manifest(data_dir)
    problems: list[str] = []
    rows: dict[str, Rows] = {}
    for source in spec.sources:
        expected = manifest["counts"].get(source.path) if manifest else source.rows
        rows[source.path], found = _read_source(data_dir / source.path, source, expected)
        problems += found
    if not problems:
        splits = spec.splits(rows)
        n = len(splits[spec.eval_split])
        if n == 0 or not manifest and n != spec.n_docs:
            problems.append(f"{data_dir}: {spec.name} has {n} documents to ask, expected {spec.n_docs}")
    if problems:
        raise DataError(problems)
    return Data(manifest["name"] if manifest else "original", str(data_dir), splits)


def _read_manifest(data_dir: Path) -> dict | None:
    """{"name": str, "counts": {file: rows}} of a set that is not the originals, or None."""
    path = data_dir / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        name, counts = manifest["name"], manifest["counts"]
        good = isinstance(name, str) and name and all(isinstance(n, int) for n in counts.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise DataError([f'{path}: expected {{"name": "...", "counts": {{"<file>": <rows>, ...}}}}'])
    return {"name": name, "counts": counts}


def _read_source(path: Path, source: Source, expected: int | None) -> tuple[Rows, list[str]]:
    """Rows of one file and what is wrong with it."""
    if not path.is_file():
        return [], [f"{path} does not exist"]
    rows: Rows = []
    problems: list[str] = []
    seen: dict[object, int] = {}
    try:
        for line, doc in (_csv_rows if source.columns else _json_rows)(path, source):
            bad = doc if isinstance(doc, str) else _field_problem(doc, source.fields)
            if bad is None and source.key and doc[source.key] in seen:
                bad = f"field {source.key!r}: {doc[source.key]!r} was already on line {seen[doc[source.key]]}"
            if bad is None:
                rows.append(doc)
                if source.key:
                    seen[doc[source.key]] = line
            else:
                problems.append(f"{path}, line {line}: {bad}")
                if len(problems) == MAX_PROBLEMS:
                    return rows, [*problems, f"{path}: more may be wrong, stopped here"]
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as e:  # not gzip, cut short, not UTF-8
        return rows, [*problems, f"{path}: cannot be read: {e}"]
    if not problems and expected is not None and len(rows) != expected:
        problems.append(f"{path}: {len(rows)} rows, expected {expected}")
    return rows, problems


def _json_rows(path: Path, source: Source) -> Iterator[tuple[int, dict | str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as f:
        for line, text in enumerate(f, start=1):
            if text.strip():
                try:
                    doc = json.loads(text)
                except ValueError as e:
                    doc = f"not JSON: {e}"
                yield line, doc if isinstance(doc, (dict, str)) else "not a JSON object"


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
                yield reader.line_num, f"field {short[0]!r} is missing" if short else "more fields than columns"
            else:
                yield reader.line_num, source.convert(row) if source.convert else row


def _field_problem(doc: dict, fields: Mapping[str, str]) -> str | None:
    """Why doc is malformed, naming the first bad field, or None."""
    for name, kind in fields.items():
        if name not in doc:
            return f"field {name!r} is missing"
        value, may_be_empty, kind = doc[name], kind.endswith("?"), kind.rstrip("?")
        if kind == "int":
            wanted, good = "an integer", isinstance(value, int) and not isinstance(value, bool)
        elif kind.endswith("s"):
            wanted = "a list of texts"
            good = isinstance(value, list) and all(isinstance(v, str) and v.strip() for v in value)
        else:
            wanted, good = "text", isinstance(value, str)
        if not good:
            return f"field {name!r}: expected {wanted}, got {value!r:.60}"
        if kind != "int" and not may_be_empty and not (value.strip() if isinstance(value, str) else value):
            return f"field {name!r} is empty"
        if kind.startswith("source"):
            try:
                ast.parse(value if isinstance(value, str) else "\n".join(value))
            except (SyntaxError, ValueError) as e:
                return f"field {name!r} is not Python: {e}"
    return None


def _read_hub(spec: TaskSpec) -> Data:
    """The hub's data set through `datasets` (its cache, HF_HOME and offline mode are honoured)."""
    import datasets

    repo, config = spec.hub
    try:
        loaded = datasets.load_dataset(repo, config)
    except Exception as e:  # whatever the network or the cache raises, the way out is the same
        raise DataError(
            [f"cannot load data set {repo} from the hub ({type(e).__name__}: {e}); --data_dir DIR reads local files"]
        ) from e
    splits = {name: [dict(row) for row in rows] for name, rows in loaded.items()}
    docs = splits.get(spec.eval_split, [])
    problems = [f"{repo}, row {i}: {bad}" for i, d in enumerate(docs) if (bad := _field_problem(d, spec.doc_fields))]
    if len(docs) != spec.n_docs:
        problems.append(f"{repo}: {len(docs)} documents in {spec.eval_split!r}, expected {spec.n_docs}")
    if problems:
        raise DataError(problems[:MAX_PROBLEMS])
    return Data("hub", repo, splits)


# ---------------------------------------------------------------- lm-eval


def build_task(spec: TaskSpec, data_dir: str | os.PathLike | None, form: str, num_fewshot: int | None = None):
    """The lm-eval ConfigurableTask of one benchmark, prompt form and number of examples (None: the form's).

    Pass it as `simple_evaluate(tasks=[task], num_fewshot=None, task_manager=TaskManager(include_defaults=False))`;
    few-shot examples become turns or text as the form says, whatever `fewshot_as_multiturn` is.
    Raises DataError, and ValueError for an unknown form or a negative num_fewshot.
    """
    if form not in spec.forms:
        raise ValueError(f"unknown prompt form {form!r}; {spec.name} has: {', '.join(spec.forms)}")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot is {num_fewshot}, it must be 0 or more")
    task = spec.build(load_data(spec, data_dir), form)
    if num_fewshot is not None:
        available = len(list(task.fewshot_docs()))
        if num_fewshot > available:
            raise ValueError(f"num_fewshot is {num_fewshot}, {spec.name} has {available} examples")
        task.set_config("num_fewshot", num_fewshot)
    return task


def make_task(data: Data, form_name: str, form: PromptForm, config: dict):
    """The task object from an lm-eval configuration: the form's texts are put in, data comes from `data`."""
    if isinstance(form.doc_to_text, str):
        config["doc_to_text"] = form.doc_to_text
    elif form.doc_to_text is not None:
        config["doc_to_text"] = form.doc_to_text(config["doc_to_text"])
    if isinstance(form.doc_to_target, str):
        config["doc_to_target"] = form.doc_to_target
    elif form.doc_to_target is not None:
        config["doc_to_target"] = form.doc_to_target(config["doc_to_target"])
    config["num_fewshot"] = form.num_fewshot
    # the canvas, the temperature and the sampler belong to the protocol: only stop strings are the task's
    until = form.until if form.until is not None else (config.get("generation_kwargs") or {}).get("until", ["\n\n"])
    config["generation_kwargs"] = {"until": list(until), "do_sample": False}
    for key in ("tag", "dataset_path", "dataset_name"):
        config.pop(key, None)
    return _task_class()(data, form_name, form, config)


@cache
def _task_class():
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.utils import apply_template

    class LocalTask(ConfigurableTask):
        """lm-eval's task on rows that are already here."""

        def __init__(self, data: Data, form_name: str, form: PromptForm, config: dict):
            self.data, self.form_name, self.form = data, form_name, form  # download() runs inside super()
            super().__init__(config=config)

        def download(self, *_args, **_kwargs) -> None:
            self.dataset = datasets.DatasetDict(
                {name: datasets.Dataset.from_list(rows) for name, rows in self.data.splits.items() if rows}
            )

        def prefill(self, doc: dict) -> str:
            return apply_template(self.form.prefill, doc) if self.form.prefill else ""

        def fewshot_context(
            self, doc, num_fewshot, system_instruction=None, apply_chat_template=False,
            fewshot_as_multiturn=False, chat_template=None, gen_prefix=None,
        ):  # fmt: skip
            multiturn = self.form.multiturn and apply_chat_template
            return super().fewshot_context(
                doc, num_fewshot, system_instruction, apply_chat_template, multiturn, chat_template, gen_prefix
            )

    return LocalTask


def installed_config(yaml_path: str) -> dict:
    """lm-eval's definition, e.g. "gsm8k/gsm8k.yaml", as a dict; `!function utils.f` stays the string "utils.f".

    Functions are not imported here: those of humaneval and mbpp ask the hub and run code when imported.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    config = yaml.load((tasks_dir() / yaml_path).read_text(encoding="utf-8"), Loader=Loader)
    assert "include" not in config, f"{yaml_path} includes another file"
    return config


def installed_constant(module_path: str, function: str):
    """What a function of lm-eval's that only returns a literal returns, read without importing its module."""
    tree = ast.parse((tasks_dir() / module_path).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return ast.literal_eval(node.body[-1].value)
    raise AssertionError(f"{module_path} has no function {function}: not lm-eval 0.4.8?")


def tasks_dir() -> Path:
    """The folder of lm-eval's installed task definitions."""
    from importlib.util import find_spec

    return Path(find_spec("lm_eval").submodule_search_locations[0]) / "tasks"
