"""Read result files into `Result` objects; list every file that is not a complete result."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from math import fsum, isfinite
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from decoding.config import DecodeConfig, label_parts
from decoding.option import options_in, written
from experiment.config import RunConfig, identity_of, ids_of
from experiment.result import ORIGINALS, is_intact
from experiment.sample import answers_of
from experiment.statistics import estimate
from experiment.status import listed
from reporting.samples import pack
from utils import (
    SCHEMA_VERSION,
    BadDataError,
    UsageError,
    canonical_json,
    file_bytes,
    parse_fault,
    sha256,
)

# settings that vary along one curve: tokens per step, and the options of an adaptive algorithm
SPEED = ("num_steps", "quotas", "options")
# what reading raises if a field is missing or has the wrong type
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)

Interval = tuple[float, float | None, float | None]  # value, low, high; None where n is 1


class NotAResult(Exception):
    """The reason why the report leaves a file out."""


@dataclass(frozen=True)
class Skipped:
    """A file that the report leaves out."""

    path: Path
    reason: str


class Published(NamedTuple):
    """A published score in percent.

    ours:         our value of its metric, with its interval, in percent.
    difference:   our value minus the score.
    within_noise: whether the score lies in our interval.
    """

    score: float
    metric: str
    source: str
    settings: str
    ours: Interval

    @property
    def difference(self) -> float:
        return self.ours[0] - self.score

    @property
    def within_noise(self) -> bool:
        _, low, high = self.ours
        return low is not None and low <= self.score <= high


@dataclass(frozen=True, eq=False)
class Result:
    """One complete result.

    settings:  identity_of(config) without SPEED and seed, with the protocol's revision: equal along
               a curve; predictions have their id.
    k:         tokens per step as requested, else as realised; None for predictions.
    accuracy:  whether the metric is 0 or 1 for every sample: its mean is shown in percent.
    value, low, high: headline metric and its 95 % interval; in percent if it is an accuracy.
    speeds:    published references that have a speed.
    strict:    (value, low, high) of the headline metric under the strict re-check; None without
               --strict_exec.
    scores:    doc_id -> value of the headline metric, mean over repeats (an accuracy: 0 to 1).
    tpf, tok_s: tokens per forward pass and per second; None for predictions.
    packed:    the samples, compressed for the HTML page.
    batches:   samples in flight -> tokens per second, of all files that hold this experiment.
    outdated:  what another version of the program did differently: "decoded", "scored", or "".
    members:   of results that `pooled` put together, each of them; else ().
    spread:    standard deviation of the members' values; None without members.
    """

    path: Path
    id: str
    config: dict[str, Any]
    settings: dict[str, Any]
    overrides: dict[str, Any]
    k: float | None
    data: dict[str, Any]
    limit: int | None
    metric: str
    accuracy: bool
    value: float
    low: float | None
    high: float | None
    strict: Interval | None
    scores: dict[int, float]
    tpf: float | None
    tok_s: float | None
    published: Published | None
    reference_note: str | None
    speeds: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]
    machine: str
    started: str
    packed: str
    batches: dict[int, float] = field(default_factory=dict)
    outdated: str = ""
    members: tuple[Result, ...] = ()
    spread: float | None = None

    @property
    def task(self) -> str:
        """The benchmark, the data's name if it is not the original, and the limit if any."""
        notes = [] if self.data["name"] in ORIGINALS else [f"on {self.data['name']}"]
        notes += [] if self.limit is None else [f"first {self.limit}"]
        return self.config["task"] + (f" ({', '.join(notes)})" if notes else "")

    @property
    def model(self) -> str:
        """The alias, and the checkpoint's name if it is not the default of the alias."""
        alias = self.config["model_alias"]
        if self.overrides.get("checkpoint") is None:
            return alias
        return f"{alias} [{Path(str(self.config.get('checkpoint'))).name}]"

    @property
    def algorithm(self) -> str:
        return method_label(self.config, self.overrides)

    @property
    def k_text(self) -> str:
        return "-" if self.k is None else f"{self.k:.3g}"

    @property
    def seed(self) -> int | None:
        """None for predictions, and for results of several seeds."""
        return None if self.members else self.config.get("seed")

    @property
    def file(self) -> str:
        """The name of the file, or of the members' files."""
        return " + ".join(result.path.name for result in self.members or (self,))

    @property
    def name(self) -> str:
        k = "" if self.k is None else f", K = {self.k_text}"
        seed = f", seed {self.seed}" if self.seed else ""
        if self.members:
            seed = f", seeds {', '.join(str(result.seed) for result in self.members)}"
        return f"{self.model} {self.task}, {self.config['protocol']}, {self.algorithm}{k}{seed}"

    @cached_property
    def curve(self) -> str:
        """Equal for results that differ only in tokens per step, algorithm options or seed."""
        return canonical_json([self.model, self.task, self.settings])

    @property
    def setting(self) -> str:
        """Equal for results that differ only in the seed."""
        return canonical_json([self.curve, self.metric, *map(self.config.get, SPEED)])

    def same_documents(self, other: Result) -> bool:
        """Whether a doc_id is the same document in both results."""
        if self.config["task"] != other.config["task"]:
            return False
        a, b = (result.data.get("rows_sha256") for result in (self, other))
        files = self.data["files"]
        return (a is not None and a == b) or (files is not None and files == other.data["files"])


def method_label(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> str:
    """The algorithm, with the settings that distinguish it from another method in the same table.

    config: flat, as in the result file. overrides: the protocol's settings that the run changed.
    """
    settings = label_parts(config)
    if "temperature" in overrides:
        settings.append(f"temperature {config['temperature']:g}")
    if batch := config.get("timed_batch"):
        settings.append(f"batch {batch}")
    if repeats := config.get("repeats"):
        settings.append(f"{repeats} samples")
    if config.get("mc_num"):
        settings.append(f"{config['mc_num']} draws")
    if config.get("cfg_scale"):
        settings.append(f"guidance {config['cfg_scale']:g}")
    if "verifier" in overrides:
        settings.append(f"verifier {Path(str(config.get('verifier'))).name}")
    name = config.get("algorithm") or config.get("estimator") or "predictions"
    return name + (f" ({', '.join(settings)})" if settings else "")


# ---------------------------------------------------------------- one file


def read_result(path: Path) -> Result:
    """The result at `path`. Raises NotAResult, with the reason, for any other content."""
    try:
        content = json.loads(file_bytes(path))
    except OSError as error:
        raise NotAResult(f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise NotAResult(f"not JSON: {parse_fault(error)[:100]}") from error
    if not isinstance(content, dict) or not {"schema_version", "config"} <= content.keys():
        raise NotAResult("JSON, but no result of this program")
    if content["schema_version"] != SCHEMA_VERSION:
        version = f"{content['schema_version']!r:.20}"
        raise NotAResult(f"has schema_version {version}, this program reads {SCHEMA_VERSION}")
    try:
        if not is_intact(content):
            raise NotAResult(
                "its content does not match its checksum: edited, damaged, or rewritten by a "
                "program that rounds numbers, such as jq 1.6"
            )
        if content["status"] == "unscored":
            raise NotAResult("not scored: its programs were not run (--no_exec)")
        if content["status"] != "complete":
            failed = f"{content['n_failed']} of {content['n_samples']} samples failed"
            raise NotAResult(f"incomplete: {failed}; run it again")
        return _result(path, content)
    except MALFORMED as error:
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise NotAResult(f"a field is missing or malformed ({reason})") from error


def _result(path: Path, content: dict[str, Any]) -> Result:
    config, headline, profile = content["config"], content["headline"], content["profile"]
    metric, meta = headline["metric"], content.get("meta") or {}
    values: dict[int, list[float]] = {}
    for sample in answers_of(content["samples"]):
        values.setdefault(int(sample["doc_id"]), []).append(_finite(sample["metrics"][metric]))
    accuracy = {v for repeats in values.values() for v in repeats} <= {0, 1}
    scale = 100.0 if accuracy else 1.0
    value, low, high = _interval(headline, scale)
    strict = content["metrics"].get(metric.replace(",", "_strict,", 1))
    for name in ("task", "model_alias", "protocol"):
        if not isinstance(config[name], str):
            raise ValueError(f"config: {name} is {config[name]!r:.40}, expected a string")
    predictions = config.get("predictions") is not None
    settings = {"id": content["id"]} if predictions else identity_of(config)
    if "repeats" in config:
        settings["repeats"] = config["repeats"]
    if revision := content["protocol"].get("revision"):
        settings["revision"] = revision
    return Result(
        path=path,
        id=str(content["id"]),
        config=config,
        # a seed is no method, see pooled()
        settings={n: value for n, value in settings.items() if n not in (*SPEED, "seed")},
        overrides=dict(content["protocol"]["overrides"]),
        k=None if predictions or "estimator" in config else _tokens_per_step(config),
        data={"files": None, **content["data"], "name": str(content["data"]["name"])},
        limit=content["limit"],
        metric=metric,
        accuracy=accuracy,
        value=value,
        low=low,
        high=high,
        strict=strict and _interval(strict, scale),
        scores={doc: fsum(v) / len(v) for doc, v in sorted(values.items())},
        tpf=_finite_or_none(profile["tpf"]),
        tok_s=_finite_or_none(profile["tokens_per_second"]),
        published=_published(content),
        reference_note=content.get("reference_note"),
        speeds=_speeds(content["reference"]),
        warnings=tuple(content["diagnostics"]["warnings"]),
        machine=_machine(meta),
        started=str(meta.get("started", "")),
        packed=pack(content, metric),
        batches=_batches(meta, profile),
        outdated=_outdated(content),
    )


def _outdated(content: Mapping[str, Any]) -> str:
    """See Result.outdated: the ids cover the versions of engine and scoring."""
    generation, own = ids_of(content["config"])
    if content["id"] == own:
        return ""
    return "scored" if content["generation_id"] == generation else "decoded"


def _tokens_per_step(config: Mapping[str, Any]) -> float:
    """As requested, else as realised by the schedule."""
    length, steps, asked = (config[n] for n in ("gen_length", "num_steps", "tokens_per_step"))
    for count in (length, steps, 1 if asked is None else asked):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"a canvas, its steps and K are positive integers, got {count!r:.40}")
    return length / steps if asked is None else asked


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ValueError(f"{value!r:.40} is no number")
    return float(value)


def _finite_or_none(value: Any) -> float | None:
    return None if value is None else _finite(value)


def _interval(estimate: Mapping[str, Any], scale: float) -> Interval:
    low, high = (None if bound is None else _finite(bound) * scale for bound in estimate["ci95"])
    return _finite(estimate["value"]) * scale, low, high


def _published(content: Mapping[str, Any]) -> Published | None:
    """The published score, if the result is on the original data and has the score's metric."""
    cited, metrics = content["reference"], content["metrics"]
    original = content["data"]["name"] in ORIGINALS
    if cited is None or not original or cited["metric"] not in metrics:
        return None
    names = ("metric", "source", "settings")
    ours = _interval(metrics[cited["metric"]], 100)
    return Published(_finite(cited["score"]), *(str(cited[n]) for n in names), ours)


def _batches(meta: dict[str, Any], profile: dict[str, Any]) -> dict[int, float]:
    """Samples in flight -> tokens per second, if all samples were made with as many."""
    made = {at.get("batch_size") for at in meta.get("samples_made") or []}
    size, speed = made.pop() if len(made) == 1 else None, profile["tokens_per_second"]
    return {size: _finite(speed)} if isinstance(size, int) and speed is not None else {}


def _speeds(cited: Mapping[str, Any] | None) -> tuple[dict[str, Any], ...]:
    """The references with a speed, each with its score, tok/s and device."""
    cited = [cited, *cited.get("also", ())] if cited else []
    return tuple(dict(one) for one in cited if _finite_or_none(one.get("tokens_per_second")))


def _machine(meta: dict[str, Any]) -> str:
    """The devices that made the samples. Times are comparable only on the same one."""
    made = {
        str(at.get("device_name") or at.get("cpu") or at.get("device") or "?")
        for at in meta.get("samples_made") or []
    }
    return " + ".join(sorted(made)) or "?"


# ---------------------------------------------------------------- many files


def read_all(places: Sequence[Path]) -> tuple[list[Result], list[Skipped]]:
    """Results in files and directories (without subdirectories), in a fixed order, and other files.

    If several files hold the same experiment, the newest one counts.
    Raises UsageError if a place does not exist, OutputError if a directory cannot be read.
    """
    missing = [str(p) for p in places if not p.exists()]
    if missing:
        raise UsageError(f"{name} does not exist" for name in missing)
    results: list[Result] = []
    skipped: list[Skipped] = []
    for path in dict.fromkeys(f for place in places for f in _files(place)):
        try:
            if re.fullmatch(r"\..*\.tmp", path.name):
                raise NotAResult("an unfinished write")
            if path.suffix != ".json":
                raise NotAResult("not a .json file")
            results.append(read_result(path))
        except NotAResult as error:
            skipped.append(Skipped(path, str(error)))
    newest: dict[tuple, Result] = {}
    for result in sorted(results, key=lambda r: (r.started, r.path)):
        if old := newest.get((result.id, result.limit)):
            reason = f"the same experiment as {result.path.name}, which is newer"
            if old.machine == result.machine and old.batches.keys() - result.batches.keys():
                reason += "; its tokens per second are kept, with their samples in flight"
                result = replace(result, batches=old.batches | result.batches)
            skipped.append(Skipped(old.path, reason))
        newest[result.id, result.limit] = result
    return sorted(newest.values(), key=_order), sorted(skipped, key=lambda s: str(s.path))


def _files(place: Path) -> Iterable[Path]:
    if not place.is_dir():
        return [place]
    return [p for p in listed(place) if not p.is_dir() and p.name != ".gitkeep"]


def _order(result: Result) -> tuple:
    return (
        result.config["protocol"],
        result.task,
        result.model,
        result.k is None,  # predictions last
        result.algorithm,
        result.curve,
        result.k or 0,
        str(result.path),
    )


def result_at(results: Sequence[Result], path: Path) -> Result:
    """The result of the file `path`, read if it is not in `results`. Raises BadDataError."""
    for result in results:
        if result.path.resolve() == path.resolve():
            return result
    try:
        return read_result(path)
    except NotAResult as error:
        raise BadDataError(f"{path}: {error}") from error


def remarks(results: Sequence[Result], skipped: Sequence[Skipped]) -> dict[str, list[str]]:
    """Title -> lines that a reader must see with the tables; without empty lists."""
    lists = {
        "Signs that a score measures the format of answers": [
            f"{result.name}: {warning}" for result in results for warning in result.warnings
        ],
        "Results of another version of this program, which may differ from the others": [
            f"{result.path.name}: it is {result.outdated} otherwise now; the same command "
            + ("runs it again" if result.outdated == "decoded" else "scores its kept samples again")
            for result in results
            if result.outdated
        ],
        "Files left out": [f"{s.path.name}: {s.reason}" for s in skipped],
    }
    return {title: lines for title, lines in lists.items() if lines}


# ---------------------------------------------------------------- seeds and curves


def pooled(results: Iterable[Result]) -> list[Result]:
    """One Result for each setting, in the order of the first ones: seeds of a setting become one.

    Its scores are means over the seeds, document by document, and its interval is that of their
    mean over the documents.
    """
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        again = 0  # another result with the same seed, such as one with --strict_exec
        while any(result.seed == r.seed for r in groups.get((result.setting, again), ())):
            again += 1
        groups.setdefault((result.setting, again), []).append(result)
    return [_pool(group) if len(group) > 1 else group[0] for group in groups.values()]


def _pool(members: Sequence[Result]) -> Result:
    members = sorted(members, key=lambda r: r.seed or 0)
    first, values = members[0], [r.value for r in members]
    documents = sorted(set.intersection(*(set(r.scores) for r in members)))
    scores = {doc: fmean(r.scores[doc] for r in members) for doc in documents}
    found = estimate(list(scores.values())).as_dict()
    value, low, high = _interval(found, 100.0 if first.accuracy else 1.0)
    if first.accuracy and low is not None:
        low, high = max(low, 0.0), min(high, 100.0)
    published = first.published
    if published:
        published = published._replace(ours=(value, low, high))
    stricts = [r.strict[0] for r in members if r.strict]
    return replace(
        first,
        value=value,
        low=low,
        high=high,
        strict=(fmean(stricts), None, None) if len(stricts) == len(members) else None,
        scores=scores,
        tpf=_mean(r.tpf for r in members),
        tok_s=_mean(r.tok_s for r in members),
        published=published,
        machine=" + ".join(sorted({r.machine for r in members})),
        members=tuple(members),
        spread=stdev(values),
    )


def each_once(results: Iterable[Result]) -> list[Result]:
    """One Result for each setting and seed, for figures.

    Results that differ in --timed_batch or --strict_exec alone are one: that of the fewest samples
    in flight, or without --timed_batch, with the tokens per second of all on its machine.
    """
    groups: dict[str, list[Result]] = {}
    for r in results:
        settings = {name: value for name, value in r.settings.items() if name != "timed_batch"}
        r = replace(r, settings=settings)
        groups.setdefault(canonical_json([r.setting, r.seed]), []).append(r)
    found = []
    for group in groups.values():
        first, *others = sorted(group, key=lambda r: r.config.get("timed_batch", 0))
        batches = [r.batches for r in others if r.machine == first.machine]
        merged = {n: speed for speeds in batches for n, speed in speeds.items()} | first.batches
        found.append(replace(first, batches=merged))
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    values = list(values)
    return None if None in values else fmean(values)


def curves(results: Iterable[Result]) -> list[list[Result]]:
    """Results grouped by `Result.curve`, each group sorted by rising speed."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.curve, []).append(result)
    return [
        sorted(group, key=lambda r: (r.k or 0, r.tpf or 0, str(r.path)))
        for group in groups.values()
    ]


# settings in the order in which labels name them; the others follow by name
NAMED_FIRST = ("algorithm", "kv_cache", "kv_window")
# what makes another method of it on any task; canvas, blocks or examples may be a task's own
METHOD = {"algorithm", *(n for n, o in options_in(DecodeConfig).items() if o.name is not None)}
DEFAULTS = {n: o.default for kind in (DecodeConfig, RunConfig) for n, o in options_in(kind).items()}


def curve_parts(group: Sequence[Sequence[Result]]) -> list[dict[str, str]]:
    """For each curve {"model": ..., setting: text}, with the settings that tell it from others.

    A setting is named if two curves, equal in what is named so far, differ in it on one task, or
    on any tasks where it makes another method, and only where it is not the default.
    """
    firsts = [curve[0] for curve in group]
    parts = [{"model": result.model} for result in firsts]
    first = {name: i for i, name in enumerate(NAMED_FIRST)}
    every = {name for result in firsts for name in result.settings}
    for name in sorted(every, key=lambda name: (first.get(name, len(first)), name)):
        alike: dict[tuple, list[int]] = {}
        for i, part in enumerate(parts):
            alike.setdefault(tuple(part.items()), []).append(i)
        for members in alike.values():
            pairs = combinations([firsts[i] for i in members], 2)
            if any(_tell(a, b, name) for a, b in pairs):
                for i in members:
                    if (value := firsts[i].settings.get(name)) not in (None, DEFAULTS.get(name)):
                        parts[i][name] = _part(name, value)
    return parts


def curve_labels(group: Sequence[Sequence[Result]]) -> list[str]:
    """A label for each curve: the model, and the settings that tell its curves apart."""
    return [", ".join(part.values()) for part in curve_parts(group)]


def distinctions(results: Sequence[Result]) -> list[str]:
    """For each result the settings that tell it from those with the same cells in a table."""
    alike: dict[tuple, list[Result]] = {}
    for r in results:
        shown = (r.task, r.model, r.config["protocol"], r.algorithm, r.k_text)
        alike.setdefault(shown, []).append(r)
    parts: dict[int, str] = {}
    for group in alike.values():
        pairs = list(combinations([r.settings for r in group], 2))
        names = {n for r in group for n in r.settings if any(_differ(a, b, n) for a, b in pairs)}
        for r in group:
            told = ((n, r.settings.get(n)) for n in sorted(names))
            told = (_part(n, v) for n, v in told if v not in (None, DEFAULTS.get(n)))
            parts[id(r)] = ", ".join(told)
    return [parts[id(r)] for r in results]


def _tell(a: Result, b: Result, name: str) -> bool:
    """Whether a setting tells two curves apart."""
    compared = a.task == b.task or (name in METHOD and None not in (a.k, b.k))
    return compared and _differ(a.settings, b.settings, name)


def _differ(a: Mapping[str, Any], b: Mapping[str, Any], name: str) -> bool:
    """Whether two curves differ in a setting that says something of its own."""
    if name == "verifier_fingerprint" and None in (a.get(name), b.get(name)):
        return False  # the name of the algorithm implies a verifier
    if name == "revision" and a.get("protocol") != b.get("protocol"):
        return False  # revisions of different protocols do not compare
    return a.get(name) != b.get(name)


def _part(name: str, value: Any) -> str:
    if name == "algorithm":
        return str(value)
    if name == "kv_cache":
        return f"{value} cache"
    text = value if isinstance(value, str) else json.dumps(value)
    if isinstance(value, int | float):
        text = written(value)
    return f"{name} {text if len(text) <= 24 else sha256(value)[:8]}"
