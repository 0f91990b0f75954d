"""The experiments of a suite: axes, filters, files -> argument sets of eval.py -> experiments."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from decoding.algorithms import ALGORITHMS, algorithms_of
from eval import MODEL_DEFAULTS, TABLES, TASKS
from experiment import plugins
from experiment.arguments import parse
from experiment.identity import known_ids
from experiment.resolve import Job, resolve
from experiment.store import folder
from tasks import DataError, TaskSpec, load_data
from tasks.installed import spec_of
from utils import DllmexpError, ManyProblems, UsageError, file_bytes, nearest, parse_fault

# The suite "main": every combination of these values. Entries of a --file have the same form.
MATRIX: dict[str, list] = {
    "model_alias": ["llada", "llada1.5", "dream", "diffucoder"],
    "task": ["humaneval", "mbpp", "gsm8k", "truthfulqa"],
    "tokens_per_step": [1, 2, 3],
}

# The suite "parallel": adaptive algorithms, caches and fixed tokens per step, in blocks of 8, on
# the embedded tiny checkpoints; a CPU is enough.
TINY = {
    "model_alias": ["tiny-llada", "tiny-dream"],
    "task": ["gsm8k"],
    "block_length": 8,
    "dtype": "float32",
    "batch_size": 8,
    "data_dir": str(Path(__file__).resolve().parent.parent / "assets" / "benchmarks"),
}
# left to right over the whole canvas
DRAFTS = TINY | {"model_alias": "tiny-dream", "block_length": None}
CACHED = {"kv_cache": ["prefix", "dual"]}
THRESHOLD = {"alg": "threshold", "threshold": [0.95, 0.9, 0.7]}
FAST_DREAM = {"model_alias": "tiny-dream", "alg": "confidence_threshold", "threshold": [0.9, 0.7]}
APD = {"alg": "apd", "apd_mixture_weight": [0.5, 0.7, 0.9]}
PARALLEL: list[dict[str, Any]] = [
    TINY | {"tokens_per_step": [1, 2, 3, 4]},
    TINY | {"tokens_per_step": [1, 2]} | CACHED,
    TINY | THRESHOLD | {"kv_cache": ["none", "prefix", "dual"]},
    TINY | FAST_DREAM | CACHED,
    TINY | {"alg": "factor", "factor": [0.5, 1.0]},
    TINY | {"alg": "entropy_threshold", "threshold": [0.1, 0.4]},
    TINY | {"alg": "eb_sampler", "gamma": [0.001, 0.1]},
    TINY | {"alg": "klass", "threshold": [0.9, 0.6]},
    TINY | {"alg": "credit", "threshold": [0.9, 0.7]},
    TINY | {"alg": "certainty", "tokens_per_step": [1, 2]},
    DRAFTS | {"alg": "leftright", "tokens_per_step": [1, 2]},
    DRAFTS | APD,
    DRAFTS | APD | {"kv_window": 8},
    DRAFTS | {"alg": ["apd", "apd_released"], "temperature": 0.2},
]


def _anchors(**flags: Any) -> list[dict[str, Any]]:
    """One entry for each method whose speed is published under --protocol fast_dllm."""
    found = []
    for alias, entry in MODEL_DEFAULTS.items():
        for task, cell in entry.get("fast_dllm", {}).items():
            for reference in cell["references"]:
                one = {"model_alias": alias, "task": task, "protocol": "fast_dllm"}
                one |= {"tokens_per_step": reference["tokens_per_step"], **reference["method"]}
                if "algorithm" in one:
                    one["alg"] = one.pop("algorithm")
                one |= flags
                found += [one] if one not in found else []
    return found


SUITES: dict[str, list[dict[str, Any]]] = {
    "main": [MATRIX],
    "parallel": PARALLEL,
    # published speeds, measured one sample at a time; and what becomes of them in a batch
    "anchors": _anchors(timed_batch=1),
    "batches": _anchors(timed_batch=[1, 4, 16, 64]),
}

# flags of eval.py that an experiment of a suite cannot have, and the way out
REFUSED = {
    "device": "the engine chooses the device: CUDA_VISIBLE_DEVICES and --workers",
    "devices": "the engine chooses the devices: CUDA_VISIBLE_DEVICES and --workers",
    "output_dir": "give --output_dir to the suite",
    "overwrite": "delete the results that are to be made again",
    "dry_run": "`sweep.py plan` shows what would run",
    "print_output_path": "`sweep.py plan` shows what would run",
    "show_prompt": "`eval.py --show_prompt` shows the prompt of one experiment",
    "help": "`eval.py --help` lists the flags",
    "h": "`eval.py --help` lists the flags",
    "version": "`eval.py --version` prints the versions",
}
MOST = 2000  # experiments that the entries of a file may multiply to


@dataclass(frozen=True)
class Planned:
    """An experiment as the record of a suite describes it: all that progress needs.

    path:           of its result.
    id, store:      generation id and directory of its samples; None while an input is missing.
    result_id:      of a result that is scored as it would be now; None as above.
    n:              number of samples, None if only lm-eval knows.
    repeats:        samples a document.
    model:          checkpoint and dtype, None for predictions: nothing is generated.
    forward_passes: of the schedule, per sample.
    metric:         headline metric.
    """

    name: str
    path: Path
    id: str | None
    result_id: str | None
    store: Path | None
    n: int | None
    command: str
    log: Path
    model: str | None
    task: str
    forward_passes: int
    metric: str
    repeats: int = field(default=1, kw_only=True)

    def identified(self) -> Planned:
        """The same with its id, if that can be found now."""
        return self


@dataclass(frozen=True)
class Experiment(Planned):
    """One call of eval.py. argv: its arguments."""

    argv: tuple[str, ...]
    job: Job

    @property
    def cost(self) -> int:
        """Forward passes that it may need, to compare experiments; at least 1."""
        return (self.n or 1) * max(1, self.forward_passes)

    def identified(self) -> Experiment:
        if self.id or (ids := known_ids(self.job)) is None:
            return self
        store = folder(self.job.output_dir / "cache", ids[0])
        return replace(self, id=ids[0], result_id=ids[1], store=store)

    def entry(self) -> dict[str, Any]:
        """The fields of Planned for the record of a suite, ready for JSON, with absolute paths."""
        values = ((field.name, getattr(self, field.name)) for field in fields(Planned))
        return {name: str(v.resolve()) if isinstance(v, Path) else v for name, v in values}


@dataclass(frozen=True)
class Selection:
    """The experiments that a command line selects. An empty tuple filters nothing.

    file:    argument sets instead of the suite of the name `suite`.
    plugins: files that every experiment gets as --plugin.
    """

    models: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    tps: tuple[int, ...] = ()
    algs: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    file: Path | None = None
    suite: str = "main"
    output_dir: str = "results"
    plugins: tuple[str, ...] = ()

    @property
    def is_matrix(self) -> bool:
        """The axes of the matrix can have any value; entries of other suites are filtered."""
        return self.file is None and self.suite == "main"


def select(selection: Selection) -> list[Experiment]:
    """The experiments, in order. Raises UsageError with every problem of every one of them."""
    found = experiments(argument_sets(selection))
    kept = found if selection.is_matrix else [e for e in found if _wanted(e, selection)]
    if not kept:
        where = f"--file {selection.file}" if selection.file else f"--suite {selection.suite}"
        filters = ("models", "tasks", "tps", "algs")
        given = [
            f"--{name} {' '.join(map(str, values))}"
            for name in filters
            if (values := getattr(selection, name))
        ]
        raise UsageError(f"{' '.join(given)}: {where} has no such experiment; leave a filter out")
    return kept


def argument_sets(selection: Selection) -> list[list[str]]:
    """The argument sets of all entries; those of a file are not filtered yet. Raises UsageError."""
    common = [*selection.extra]
    for path in plugins.paths_in(f"{plugins.FLAG}={file}" for file in selection.plugins):
        common += [plugins.FLAG, path]
    plugins.load(common, TABLES)  # the filters may name what it adds
    if selection.is_matrix:
        entries: Sequence[Any] = [_narrowed(selection)]
    else:
        entries = read_file(selection.file) if selection.file else SUITES[selection.suite]
    algs = selection.algs if selection.is_matrix else ()
    by_entry = [[[*words, *common] for words in arguments(entry, algs)] for entry in entries]
    words = [w.partition("=")[0] for sets in by_entry for words in sets for w in words]
    given = dict.fromkeys(w for w in words if w.startswith("-"))
    if refused := [flag for flag in given if flag.lstrip("-") in REFUSED]:
        raise UsageError(
            f"{flag} cannot be given to an experiment of a suite: {REFUSED[flag.lstrip('-')]}"
            for flag in refused
        )
    sets = [words for entry, of in zip(entries, by_entry) for words in _apart(entry, of)]
    own = ["--output_dir", selection.output_dir] if selection.output_dir != "results" else []
    return [[*words, *own] for words in sets]


def _narrowed(selection: Selection) -> dict[str, list]:
    """MATRIX with the axes that the filters name; models and tasks must be known, K is free."""
    problems = [
        f"--{flag} {value!r} is not known{nearest(value, known)}; there are: {', '.join(known)}"
        for flag, values, known in (
            ("models", selection.models, list(MODEL_DEFAULTS)),
            ("tasks", selection.tasks, list(TASKS)),
            ("algs", selection.algs, list(ALGORITHMS)),
        )
        for value in values
        if value not in known and not (flag == "tasks" and value.startswith("lm_eval:"))
    ]
    if problems:
        raise UsageError(problems)
    chosen = dict(zip(MATRIX, (selection.models, selection.tasks, selection.tps), strict=True))
    return {axis: list(chosen[axis]) or values for axis, values in MATRIX.items()}


def _wanted(experiment: Experiment, selection: Selection) -> bool:
    settings = experiment.job.config.as_dict()
    chosen = {
        "model_alias": selection.models,
        "task": selection.tasks,
        "tokens_per_step": selection.tps,
        "algorithm": selection.algs,
    }
    return all(not values or settings.get(name) in values for name, values in chosen.items())


def read_file(path: Path) -> list[Any]:
    """The entries of a YAML file. Raises UsageError."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is given twice, of which YAML's own takes the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            keys: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in keys:
                        raise yaml.constructor.ConstructorError(
                            problem=f"{key.value!r} is given twice", problem_mark=key.start_mark
                        )
                    keys.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        entries = yaml.load(file_bytes(path), Loader)
    except OSError as error:
        raise UsageError(f"--file {path} cannot be read: {error.strerror}") from None
    except RecursionError as error:
        raise UsageError(f"--file {path} is {parse_fault(error)}") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}"
        raise UsageError(f"--file {path}, {line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        fault = parse_fault(error).partition("\n")[0]  # the next line names no file
        raise UsageError(f"--file {path} is not YAML: {fault}") from None
    if not isinstance(entries, list) or not entries:
        raise UsageError(
            f"--file {path}: expected a list of argument sets, "
            "such as `- --model_alias llada --task gsm8k`"
        )
    problems = [
        f"--file {path}: entry {n}{p}" for n, e in enumerate(entries, 1) if (p := _wrong(e))
    ]
    if problems:
        raise UsageError(problems)
    n = sum(prod(map(len, _listed(e).values())) for e in entries)
    if n > MOST:
        raise UsageError(
            f"--file {path} multiplies to {n} experiments; at most {MOST} are possible"
        )
    return entries


def _wrong(entry: Any) -> str | None:
    """Why an entry of a file is no argument set, to follow its number, or None."""
    if entry is None:
        return " is empty"
    if isinstance(entry, str):
        try:
            shlex.split(entry)
        except ValueError as error:
            return f": {entry!r:.60}: {error}"
        return f": {entry!r:.60} has a null character" if "\0" in entry else None
    if not isinstance(entry, list | dict):
        return f": {entry!r:.60} is no argument set; give text, a list of words or flag: value"
    if odd := [key for key in _listed(entry) if not isinstance(key, str)]:
        return f": {odd[0]!r:.60} is no flag"
    for key, values in (_listed(entry) or {"a word": entry}).items():
        for value in values:
            if isinstance(value, str) and "\0" in value:
                return f": {key} has a null character"
            if isinstance(value, Collection) and not isinstance(value, str):
                kind = "mapping" if isinstance(value, dict) else type(value).__name__
                return f": {key} must be a text or a number, not a {kind}"
            if isinstance(value, int) and value.bit_length() > 64:
                return f": {key}: a number of {value.bit_length()} bits is too large"
    return None


def _listed(entry: str | Mapping[str, Any] | list) -> dict[str, list]:
    """Flag -> its values, of which an argument set takes one each."""
    if isinstance(entry, Mapping):
        return {k: v if isinstance(v, list) else [v] for k, v in entry.items()}
    return {}


def arguments(entry: str | Mapping[str, Any] | list, algs: Sequence[str] = ()) -> list[list[str]]:
    """The argument sets of one entry.

    entry: text, a list of words, or flag -> value; a list of values means one set for each. Listed
           values that the result's name does not show become its tag.
    algs:  for a mapping without an algorithm, one set for each of these that the model has.
    """
    if isinstance(entry, str):
        return [shlex.split(entry)]
    if isinstance(entry, list):
        return [[str(word) for word in entry]]
    values, sets = _listed(entry), []
    for chosen in product(*values.values()):
        flags = dict(zip(values, chosen, strict=True))
        model = MODEL_DEFAULTS.get(str(flags.get("model_alias")))
        if algs and model and not {"alg", "remasking"} & flags.keys():
            has = algorithms_of(model["family"])
            sets += [_words(flags | {"alg": a}) for a in algs if a in has]
        else:
            sets.append(_words(flags))
    return sets


def _apart(entry: str | Mapping[str, Any] | list, sets: list[list[str]]) -> list[list[str]]:
    """The argument sets of an entry; those that would write one result get their values as a tag.

    Only values that the entry lists are part of the tag, as `<flag><value>`, behind the set's own.
    """
    listed = [k for k, v in entry.items() if isinstance(v, list)] if isinstance(entry, dict) else []
    if not {*listed} - MATRIX.keys():
        return sets
    same: dict[Path, list[tuple[Job, list[str]]]] = {}
    for words in sets:
        with suppress(DllmexpError):  # `experiments` reports what is wrong with it
            job = _job(words)
            same.setdefault(job.path, []).append((job, words))
    for jobs in same.values():
        values = {flag: [_value(words, flag) for _, words in jobs] for flag in listed}
        differing = [flag for flag in listed if len({*values[flag]}) > 1]
        for i, (job, words) in enumerate(jobs if differing else ()):
            parts = [f"{flag}{values[flag][i]}" for flag in differing]
            tag = "_".join([*filter(None, [job.tag]), *parts])
            words += ["--tag", re.sub(r"[^A-Za-z0-9._-]+", "-", tag)]
    return sets


def _value(words: Sequence[str], flag: str) -> str:
    """The value of a flag as `_words` writes it; "" of a switch, "-default" of a flag left out."""
    at = words.index(f"--{flag}") if f"--{flag}" in words else None
    if at is None:
        return "-default"
    return "" if at + 1 == len(words) or words[at + 1].startswith("--") else words[at + 1]


def _words(flags: Mapping[str, Any]) -> list[str]:
    """true is a switch that is on; false and null leave the flag out."""
    words: list[str] = []
    for flag, value in flags.items():
        if value is not None and value is not False:
            words += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    return words


def experiments(sets: Iterable[Sequence[str]]) -> list[Experiment]:
    """Argument sets -> experiments, without repetitions.

    Raises UsageError with all problems, each once; two experiments cannot write one result.
    """
    found: dict[Path, Experiment] = {}
    problems: dict[str, None] = {}
    for words in sets:
        try:
            one = _experiment(tuple(words))
        except (UsageError, DataError, ManyProblems) as error:
            problems |= dict.fromkeys(error.problems)
            continue
        other = found.setdefault(one.path, one)
        if other.argv != one.argv:
            both = f"`{other.command}` and `{one.command}`"
            text = f"two experiments would write {one.path}: {both}; --tag NAME keeps them apart"
            problems[text] = None
    if problems:
        raise UsageError(problems)
    return list(found.values())


def _job(argv: Sequence[str]) -> Job:
    plugins.load(argv, TABLES)
    args, problems = parse(list(argv), MODEL_DEFAULTS, TASKS)
    return resolve(args, problems, MODEL_DEFAULTS, TASKS)


def _experiment(argv: tuple[str, ...]) -> Experiment:
    job = _job(argv)
    config, spec = job.config, job.spec
    n = _n_docs(spec.name, job.data_dir)
    n = min(n, job.limit or n) if n else job.limit
    found = Experiment(
        name=job.path.stem,
        path=job.path,
        id=None,
        result_id=None,
        store=None,
        n=n and n * config.repeats,
        repeats=config.repeats,
        command=shlex.join(["python", "eval.py", *argv]),
        log=job.output_dir / "logs" / f"{job.path.stem}.log",
        model=None if job.predictions else f"{config.checkpoint} in {config.dtype}",
        task=config.task,
        forward_passes=job.schedule.forward_passes if job.schedule else 0,
        metric=spec.headline,
        argv=argv,
        job=job,
    )
    return found.identified()


@lru_cache
def _spec_named(task: str) -> TaskSpec:
    return TASKS.get(task) or spec_of(task)


@lru_cache
def _n_docs(task: str, data_dir: Path | None) -> int | None:
    """Documents of a benchmark; a manifest may give another number. None: unknown."""
    spec = _spec_named(task)
    if data_dir is None or spec.foreign or not (data_dir / "manifest.json").is_file():
        return spec.n_docs or None
    try:
        return len(load_data(spec, data_dir).splits[spec.eval_split])
    except DataError:
        return None  # the run reports what is wrong
