"""Which experiments there are: axes as data, filters, extensions, files of argument sets -> eval.py's arguments."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from decoding.algorithms import ALGORITHMS, algorithms_of
from eval import MODEL_DEFAULTS, TASKS
from experiment.arguments import parse
from experiment.resolve import Job, resolve
from tasks import DataError, TaskSpec, load_data
from tasks.installed import spec_of
from utils import UsageError, nearest

# The suite: every combination of these values. A file given with --file has entries of the same form.
MATRIX: dict[str, list] = {
    "model_alias": ["llada", "llada1.5", "dream", "diffucoder"],
    "task": ["humaneval", "mbpp", "gsm8k", "truthfulqa"],
    "tokens_per_step": [1, 2, 3],
}

# Adaptive algorithms, caches and fixed tokens per step on the embedded tiny checkpoints, in blocks of 8: a CPU does it.
TINY = {
    "model_alias": ["tiny-llada", "tiny-dream"],
    "task": ["gsm8k"],
    "block_length": 8,
    "dtype": "float32",
    "batch_size": 8,
    "data_dir": str(Path(__file__).resolve().parent.parent / "assets" / "benchmarks"),
}
DRAFTS = TINY | {
    "model_alias": "tiny-dream",
    "block_length": None,
}  # left to right over the whole canvas
PARALLEL: list[dict[str, Any]] = [
    TINY | {"tokens_per_step": [1, 2, 3, 4]},
    TINY | {"tokens_per_step": [1, 2], "kv_cache": ["prefix", "dual"]},
    TINY
    | {"alg": "threshold", "threshold": [0.95, 0.9, 0.7], "kv_cache": ["none", "prefix", "dual"]},
    TINY
    | {
        "model_alias": "tiny-dream",
        "alg": "confidence_threshold",
        "threshold": [0.9, 0.7],
        "kv_cache": ["prefix", "dual"],
    },
    TINY | {"alg": "factor", "factor": [0.5, 1.0]},
    TINY | {"alg": "entropy_threshold", "threshold": [0.1, 0.4]},
    TINY | {"alg": "eb_sampler", "gamma": [0.001, 0.1]},
    TINY | {"alg": "klass", "threshold": [0.9, 0.6]},
    TINY | {"alg": "credit", "threshold": [0.9, 0.7]},
    TINY | {"alg": "certainty", "tokens_per_step": [1, 2]},
    DRAFTS | {"alg": "leftright", "tokens_per_step": [1, 2]},
    DRAFTS | {"alg": "apd", "apd_mixture_weight": [0.5, 0.7, 0.9]},
    DRAFTS | {"alg": "apd", "apd_mixture_weight": [0.5, 0.7, 0.9], "kv_window": 8},
    DRAFTS | {"alg": ["apd", "apd_released"], "temperature": 0.2, "tag": "t0.2"},
]
SUITES: dict[str, list[dict[str, Any]]] = {"main": [MATRIX], "parallel": PARALLEL}

# eval.py's flags that an experiment of a suite cannot have, and why
OURS = {
    "device": "the engine chooses the device: CUDA_VISIBLE_DEVICES and --workers",
    "devices": "the engine chooses the devices: CUDA_VISIBLE_DEVICES and --workers",
    "output_dir": "give --output_dir to the suite",
    "overwrite": "delete the results that are to be made again",
    "dry_run": "`sweep.py plan` shows what would run",
    "print_output_path": "`sweep.py plan` shows what would run",
}


@dataclass(frozen=True)
class Experiment:
    """One call of eval.py.

    argv: its arguments. n: samples that it has, None where only lm-eval knows.
    """

    argv: tuple[str, ...]
    job: Job
    spec: TaskSpec
    n: int | None

    @property
    def name(self) -> str:
        return self.job.path.stem

    @property
    def model(self) -> tuple[str, str] | None:
        """What has to be loaded for it; experiments that have it in common run after each other."""
        return None if self.job.predictions else (self.job.config.checkpoint, self.job.config.dtype)

    @property
    def command(self) -> str:
        return shlex.join(["python", "eval.py", *self.argv])

    @property
    def log(self) -> Path:
        return self.job.output_dir / "logs" / f"{self.name}.log"


@dataclass(frozen=True)
class Selection:
    """What a command line asks for. Empty tuples filter nothing; file None means the suite of that name."""

    models: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    tps: tuple[int, ...] = ()
    algs: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    file: Path | None = None
    suite: str = "main"
    output_dir: str = "results"


def select(selection: Selection) -> list[Experiment]:
    """The experiments, in order. Raises UsageError with every problem of every one of them."""
    matrix = (
        selection.file is None and selection.suite == "main"
    )  # its axes can be any; other entries are filtered
    listed = SUITES[selection.suite] if selection.file is None else read_file(selection.file)
    entries: Sequence[Any] = [_narrowed(selection)] if matrix else listed
    words = [w for entry in entries for w in arguments(entry, selection.algs if matrix else ())]
    words = [[*w, *selection.extra] for w in words]
    given = {w[2:].partition("=")[0]: None for one in words for w in one if w.startswith("--")}
    if ours := [flag for flag in given if flag in OURS]:
        raise UsageError(
            f"--{flag} cannot be given to an experiment of a suite: {OURS[flag]}" for flag in ours
        )
    own = ["--output_dir", selection.output_dir] if selection.output_dir != "results" else []
    found = experiments([*w, *own] for w in words)
    kept = found if matrix else [e for e in found if _wanted(e, selection)]
    if not kept:
        raise UsageError("the filters leave no experiment")
    return kept


def _narrowed(selection: Selection) -> dict[str, list]:
    """MATRIX with the axes that the filters name: models and tasks must be known, any K may be asked for."""
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
    chosen = {
        "model_alias": selection.models,
        "task": selection.tasks,
        "tokens_per_step": selection.tps,
    }
    return {axis: list(chosen[axis]) or values for axis, values in MATRIX.items()}


def _wanted(experiment: Experiment, selection: Selection) -> bool:
    config = experiment.job.config
    return (
        (not selection.models or config.model_alias in selection.models)
        and (not selection.tasks or config.task in selection.tasks)
        and (not selection.tps or config.tokens_per_step in selection.tps)
        and (not selection.algs or config.algorithm in selection.algs)
    )


def read_file(path: Path) -> list[Any]:
    """The entries of a YAML file. Raises UsageError."""
    import yaml

    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--file {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(entries, list) or not entries:
        raise UsageError(
            f"--file {path}: expected a list of argument sets, such as `- --model_alias llada --task gsm8k`"
        )
    wrong = [e for e in entries if not isinstance(e, str | dict | list)]
    if wrong:
        raise UsageError(
            f"--file {path}: {wrong[0]!r} is no argument set; give text, a list of words or flag: value"
        )
    return entries


def arguments(entry: str | Mapping[str, Any] | list, algs: Sequence[str] = ()) -> list[list[str]]:
    """The argument sets of one entry: text, a list of words, or flag -> value, where a list means each of its values.

    algs: to run each set of a mapping that names no algorithm with those of them that the model's family has.
    """
    if isinstance(entry, str):
        return [shlex.split(entry)]
    if isinstance(entry, list):
        return [[str(word) for word in entry]]
    values = {flag: value if isinstance(value, list) else [value] for flag, value in entry.items()}
    sets = []
    for chosen in product(*values.values()):
        flags = dict(zip(values, chosen, strict=True))
        given = MODEL_DEFAULTS.get(str(flags.get("model_alias")))
        of_family = [a for a in algs if given and a in algorithms_of(given["family"])]
        if algs and given and not {"alg", "remasking"} & flags.keys():
            sets += [_words(flags | {"alg": a}) for a in of_family]
        else:
            sets.append(_words(flags))
    return sets


def _words(flags: Mapping[str, Any]) -> list[str]:
    """true is a switch that is on, false and null one that is left out."""
    words: list[str] = []
    for flag, value in flags.items():
        if value is not None and value is not False:
            words += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    return words


def experiments(sets: Iterable[Sequence[str]]) -> list[Experiment]:
    """Argument sets -> experiments; one that occurs twice is one.

    Raises UsageError with all problems, each once; two experiments cannot write one result.
    """
    found: dict[Path, Experiment] = {}
    problems: dict[str, None] = {}
    for words in sets:
        try:
            one = _experiment(tuple(words))
        except (UsageError, DataError) as error:
            problems |= dict.fromkeys(error.problems)
            continue
        other = found.setdefault(one.job.path, one)
        if other.argv != one.argv:
            text = f"two experiments would write {one.job.path}: `{other.command}` and `{one.command}`; --tag NAME keeps them apart"
            problems[text] = None
    if problems:
        raise UsageError(problems)
    return list(found.values())


def _experiment(argv: tuple[str, ...]) -> Experiment:
    args, problems = parse(list(argv), MODEL_DEFAULTS, list(TASKS))
    job = resolve(args, problems, MODEL_DEFAULTS, list(TASKS))
    spec = spec_named(job.config.task)
    n = _n_docs(job.config.task, job.data_dir)
    return Experiment(argv, job, spec, min(n, job.limit or n) if n else job.limit)


@lru_cache
def spec_named(task: str) -> TaskSpec:
    return TASKS.get(task) or spec_of(task)


@lru_cache
def _n_docs(task: str, data_dir: Path | None) -> int | None:
    """Documents of a benchmark; a manifest beside the files may give another number. None: unknown before it runs."""
    spec = spec_named(task)
    if data_dir is None or spec.foreign or not (data_dir / "manifest.json").is_file():
        return spec.n_docs or None
    try:
        return len(load_data(spec, data_dir).splits[spec.eval_split])
    except DataError:
        return None  # the run will say what is wrong
