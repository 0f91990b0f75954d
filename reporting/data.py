"""Result files -> what the report needs of each; whatever is no result of ours is named and left out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import fsum, isfinite
from pathlib import Path
from typing import Any

from experiment.result import VOLATILE, is_proportion
from reporting.samples import pack
from utils import SCHEMA_VERSION, BadDataError, RunConfig, UsageError, canonical_json, sha256

ORIGINALS = (
    "original",
    "hub",
)  # names of the benchmarks' own data; any other name goes wherever the task's goes
# what tokens per step, and an adaptive algorithm's threshold, change of a configuration; the rest makes one curve
SPEED = ("num_steps", "quotas", "options")


class NotAResult(Exception):
    """A file that the report leaves out, and why."""


@dataclass(frozen=True)
class Skipped:
    path: Path
    reason: str


@dataclass(frozen=True, eq=False)
class Run:
    """One complete result.

    value, low, high: the headline metric and its 95 % interval; in percent where it is an accuracy.
    scores:    doc_id -> value of that metric, mean over repeats, as scored (an accuracy: 0 to 1).
    tpf, tok_s: None where no model ran (predictions made elsewhere).
    identity:  everything that can change a number, None for predictions; see RunConfig.identity.
    packed:    the samples, compressed, as the HTML page wants them.
    """

    path: Path
    id: str
    config: dict[str, Any]
    identity: dict[str, Any] | None
    overrides: dict[str, Any]
    data: dict[str, Any]
    limit: int | None
    metric: str
    value: float
    low: float | None
    high: float | None
    metrics: dict[str, dict[str, Any]]
    scores: dict[int, float]
    tpf: float | None
    tok_s: float | None
    reference: dict[str, Any] | None
    reference_note: str | None
    warnings: tuple[str, ...]
    machine: str
    started: str
    packed: str

    @property
    def accuracy(self) -> bool:
        """Whether the metric is a share of right answers, and so is shown in percent."""
        return is_proportion(self.metric)

    @property
    def original_data(self) -> bool:
        return self.data["name"] in ORIGINALS

    @property
    def task(self) -> str:
        """The benchmark, with the data's name where they are not the original's, and how much of it was run."""
        parts = [] if self.original_data else [f"on {self.data['name']}"]
        parts += [] if self.limit is None else [f"first {self.limit}"]
        return self.config["task"] + (f" ({', '.join(parts)})" if parts else "")

    @property
    def model(self) -> str:
        """The alias, and the checkpoint's name where it is not the alias's own."""
        alias, override = self.config["model_alias"], self.overrides.get("checkpoint")
        return (
            alias
            if override is None
            else f"{alias} [{Path(str(self.config.get('checkpoint'))).name}]"
        )

    @property
    def algorithm(self) -> str:
        """With its options, its cache, another temperature or verifier: what a reader must know to tell two methods apart."""
        cache, refresh = self.config.get("kv_cache"), self.config.get("cache_refresh")
        parts = [f"{name} {value:g}" for name, value in (self.config.get("options") or {}).items()]
        window, ahead = self.config.get("kv_window"), self.config.get("max_lookahead")
        said = (
            f"{cache} cache"
            + (f" of {window}" if window else "")
            + (f" refreshed every {refresh}" if refresh else "")
        )
        parts += ([said] if cache else []) + ([f"lookahead {ahead}"] if ahead else [])
        parts += (
            [f"temperature {self.config['temperature']:g}"]
            if "temperature" in self.overrides
            else []
        )
        parts += (
            [f"verifier {Path(str(self.config.get('verifier'))).name}"]
            if "verifier" in self.overrides
            else []
        )
        name = self.config.get("algorithm") or "predictions"
        return name + (f" ({', '.join(parts)})" if parts else "")

    @property
    def k(self) -> float | None:
        """Tokens per step: as asked for, else as realised."""
        if self.identity is None:
            return None
        asked = self.config["tokens_per_step"]
        return self.config["gen_length"] / self.config["num_steps"] if asked is None else asked

    @property
    def name(self) -> str:
        k = "" if self.k is None else f", K = {self.k:.3g}"
        return f"{self.model} {self.task}, {self.config['protocol']}, {self.algorithm}{k}"

    @cached_property
    def curve(self) -> str:
        """Equal for results that differ in tokens per step, or in the options of the algorithm, only."""
        settings = (
            {k: v for k, v in self.identity.items() if k not in SPEED}
            if self.identity
            else {"id": self.id}
        )
        return canonical_json([self.model, self.task, settings])

    def same_documents(self, other: Run) -> bool:
        """Whether doc_id n is the same document in both."""
        if self.config["task"] != other.config["task"]:
            return False
        a, b = (r.data.get("rows_sha256") for r in (self, other))
        files = self.data["files"]
        return (a is not None and a == b) or (files is not None and files == other.data["files"])


# ---------------------------------------------------------------- one file


def read_run(path: Path) -> Run:
    """The result at `path`. Raises NotAResult with the reason, whatever the file holds."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotAResult(f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise NotAResult(f"not JSON: {str(error)[:100]}") from error
    if not isinstance(result, dict) or "schema_version" not in result or "config" not in result:
        raise NotAResult("JSON, but no result of this program")
    if result["schema_version"] != SCHEMA_VERSION:
        raise NotAResult(
            f"has schema_version {result['schema_version']!r:.20}, this program reads {SCHEMA_VERSION}"
        )
    try:
        if sha256({k: v for k, v in result.items() if k not in VOLATILE}) != result.get(
            "content_sha256"
        ):
            raise NotAResult("its content does not match its checksum: edited, or damaged")
        if result["status"] != "complete":
            raise NotAResult(
                f"incomplete: {result['n_failed']} of {result['n_samples']} samples failed; run it again"
            )
        return _run(path, result)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        RecursionError,
        ZeroDivisionError,
    ) as error:
        raise NotAResult(
            f"a field is missing or malformed ({type(error).__name__}: {str(error)[:100]})"
        ) from error


def _run(path: Path, result: dict[str, Any]) -> Run:
    config, headline, profile = result["config"], result["headline"], result["profile"]
    metric, scale = headline["metric"], 100.0 if is_proportion(headline["metric"]) else 1.0
    low, high = headline["ci95"]
    values: dict[int, list[float]] = {}
    for row in result["samples"]:
        values.setdefault(int(row["doc_id"]), []).append(_finite(row["metrics"][metric]))
    predictions = config.get("predictions") is not None
    if not predictions:
        (
            config["task"],
            config["model_alias"],
            config["gen_length"] / config["num_steps"],
        )  # has them, or is malformed
    return Run(
        path=path,
        id=str(result["id"]),
        config=config,
        identity=None if predictions else RunConfig(**config).identity(),
        overrides=dict(result["protocol"]["overrides"]),
        data={"files": None, **result["data"], "name": str(result["data"]["name"])},
        limit=result["limit"],
        metric=metric,
        value=_finite(headline["value"]) * scale,
        low=None if low is None else _finite(low) * scale,
        high=None if high is None else _finite(high) * scale,
        metrics=result["metrics"],
        scores={doc: fsum(v) / len(v) for doc, v in sorted(values.items())},
        tpf=None if profile["tpf"] is None else _finite(profile["tpf"]),
        tok_s=None
        if profile["tokens_per_second"] is None
        else _finite(profile["tokens_per_second"]),
        reference=_reference(result),
        reference_note=result.get("reference_note"),
        warnings=tuple(result["diagnostics"]["warnings"]),
        machine=_machine(result.get("meta") or {}),
        started=str((result.get("meta") or {}).get("started", "")),
        packed=pack(result, metric),
    )


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ValueError(f"{value!r:.40} is no number")
    return float(value)


def _reference(result: dict[str, Any]) -> dict[str, Any] | None:
    """The published score, where the result carries one of the original data and of a metric that it has."""
    reference = result["reference"]
    if (
        reference is None
        or result["data"]["name"] not in ORIGINALS
        or reference["metric"] not in result["metrics"]
    ):
        return None
    return {**reference, "score": float(reference["score"])}


def _machine(meta: dict[str, Any]) -> str:
    """What the samples were made on: times compare only on one machine."""
    made = {
        str(at.get("device_name") or at.get("cpu") or at.get("device") or "?")
        for at in meta.get("samples_made") or []
    }
    return " + ".join(sorted(made)) or "?"


# ---------------------------------------------------------------- many files


def read_all(places: Sequence[Path]) -> tuple[list[Run], list[Skipped]]:
    """The results in files and directories (not below them), in a fixed order, and what was left out.

    Of one experiment's several files the newest counts. Raises UsageError where a place does not exist.
    """
    missing = [str(p) for p in places if not p.exists()]
    if missing:
        raise UsageError(f"{name} does not exist" for name in missing)
    runs: list[Run] = []
    skipped: list[Skipped] = []
    for path in dict.fromkeys(f for place in places for f in _files(place)):
        if re.fullmatch(r"\..*\.tmp", path.name):
            skipped.append(Skipped(path, "an unfinished write"))
        elif path.suffix != ".json":
            skipped.append(Skipped(path, "not a .json file"))
        else:
            try:
                runs.append(read_run(path))
            except NotAResult as error:
                skipped.append(Skipped(path, str(error)))
    kept = {}
    for run in sorted(runs, key=lambda r: (r.started, r.path)):
        if old := kept.get((run.id, run.limit)):
            skipped.append(
                Skipped(old.path, f"the same experiment as {run.path.name}, which is newer")
            )
        kept[run.id, run.limit] = run
    return sorted(kept.values(), key=_order), sorted(skipped, key=lambda s: str(s.path))


def _files(place: Path) -> Iterable[Path]:
    if not place.is_dir():
        return [place]
    return sorted(p for p in place.iterdir() if not p.is_dir() and p.name != ".gitkeep")


def _order(run: Run) -> tuple:
    predictions = run.identity is None
    return (
        run.config["protocol"],
        run.task,
        run.model,
        predictions,
        run.algorithm,
        run.curve,
        run.k or 0,
        str(run.path),
    )


def named(runs: Sequence[Run], path: Path) -> Run:
    """The run of a file that was asked for by its name: that run, or one read for it. Raises BadDataError."""
    for run in runs:
        if run.path.resolve() == path.resolve():
            return run
    try:
        return read_run(path)
    except NotAResult as error:
        raise BadDataError(f"{path}: {error}") from error


def curves(runs: Iterable[Run]) -> list[list[Run]]:
    """Results that differ in tokens per step or in the algorithm's options only, together; by rising speed."""
    together: dict[str, list[Run]] = {}
    for run in runs:
        together.setdefault(run.curve, []).append(run)
    return [
        sorted(group, key=lambda r: (r.k or 0, r.tpf or 0, str(r.path)))
        for group in together.values()
    ]


def curve_labels(group: Sequence[Sequence[Run]]) -> list[str]:
    """A name for each curve of a picture or table: the model, and what tells its curves of one task apart."""
    apart: dict[str, set[str]] = {}
    settings = [(runs[0], runs[0].identity or {"algorithm": runs[0].algorithm}) for runs in group]
    for (a, mine), (b, other) in combinations(settings, 2):
        if (a.model, a.task) == (b.model, b.task):
            apart.setdefault(a.model, set()).update(
                k for k in {*mine, *other} - {*SPEED} if _differ(k, mine.get(k), other.get(k))
            )
    labels = []
    for run, mine in settings:
        names = sorted(apart.get(run.model, ()), key=lambda k: (k != "algorithm", k))
        shown = [
            mine[k] if k == "algorithm" else f"{k} {_short(mine[k])}" for k in names if k in mine
        ]
        labels.append(", ".join([run.model, *shown]))
    return labels


def _differ(key: str, a: Any, b: Any) -> bool:
    """Whether a setting tells two curves apart; that one of them has a verifier its algorithm's name says already."""
    return a != b and not (key == "verifier_fingerprint" and None in (a, b))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else sha256(value)[:8]
