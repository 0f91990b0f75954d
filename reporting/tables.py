"""The tables of the report, and the forms they are written in: terminal, Markdown, CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from textwrap import fill
from typing import Any, NamedTuple

from decoding.algorithms import ALGORITHMS
from decoding.config import DecodeConfig
from decoding.option import Option, options_in
from reporting.data import Result, curve_labels, curves, distinctions, pooled
from reporting.stats import (
    AUP,
    AUP_RESAMPLES,
    Paired,
    aup,
    aup_interval,
    aup_spread,
    compare_results,
)
from utils import numbered

PUBLISHED_SPEEDS = "published %, tok/s"
LEFT_ALIGNED = frozenset(
    "task model protocol algorithm method difference A B test verdict dropped".split()
) | {PUBLISHED_SPEEDS}
# columns of results.csv from a result's config: name -> meaning
SETTINGS = {
    "seed": "--seed",
    "dtype": "precision of the weights and of the forward pass",
    "gen_length": "positions of the canvas",
    "block_length": "positions of a block",
    "num_steps": "steps of the schedule",
    "timed_batch": "--timed_batch",
}
FRACTION = "a fraction if the metric is an accuracy"
OTHER_MACHINE = (
    "Accuracy may differ by machine too: kernels round differently, and a near tie then commits "
    "another token."
)
# widths to which columns of text shrink for a terminal: before other columns fold away, and after
NARROW, NARROWEST = 24, 12


@dataclass(frozen=True)
class Table:
    """One table, as text and in full precision.

    columns, rows: headings and cells as shown. notes: paragraphs below the table.
    fields, records: the same lines for the CSV file, in full precision. meanings: of the fields.
    about: the results of each row: one, or the two that it compares.
    folds: the columns that a narrow terminal leaves out, the first ones first.
    quiet: number of rows at the end that say nothing new: text and Markdown have `quiet_note` for
           them.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    fields: tuple[str, ...]
    records: list[tuple[Any, ...]]
    notes: tuple[str, ...]
    meanings: tuple[str, ...]
    about: list[tuple[Result, ...]]
    folds: tuple[str, ...] = ()
    quiet: int = 0
    quiet_note: str = ""

    def loud(self) -> tuple[list[tuple[str, ...]], list[str]]:
        """(the rows without the quiet ones, notes with the line that stands for those)."""
        n = len(self.rows) - self.quiet
        said = [self.quiet_note] if self.quiet else []
        return self.rows[:n], [*said, *(self.notes if n else ())]


def make_table(
    title: str,
    items: Sequence[Any],
    columns: Mapping[str, Callable[[Any], str]],
    fields: Mapping[str, tuple[str, Callable[[Any], Any]]],
    notes: Iterable[str],
    recorded: Sequence[Any] | None = None,
    about: Callable[[Any], tuple[Result, ...]] = lambda item: (),
    **more: Any,
) -> Table:
    """One line per item.

    columns: heading -> function from an item to its cell. fields: name -> (meaning, the same).
    recorded: the items of the CSV file; None: the same. about: item -> its results. more: other
    fields of Table.
    """
    rows = [tuple(cell(item) for cell in columns.values()) for item in items]
    recorded = items if recorded is None else recorded
    records = [tuple(cell(item) for _, cell in fields.values()) for item in recorded]
    meanings, texts = tuple(meaning for meaning, _ in fields.values()), (tuple(columns), rows)
    files = (tuple(fields), records, tuple(notes), meanings)
    return Table(title, *texts, *files, [about(item) for item in items], **more)


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    if value is None:
        return "-"
    shown = f"{value:{'+' if sign else ''}.{digits}f}"
    return shown if float(shown) else shown.lstrip("+-")  # not -0.0


def interval(
    value: float, low: float | None, high: float | None, digits: int = 1, sign: bool = False
) -> str:
    """`74.8 [72.4, 77.1]`; without brackets if there is no interval."""
    shown = number(value, digits, sign)
    if low is None:
        return shown
    return f"{shown} [{number(low, digits, sign)}, {number(high, digits, sign)}]"


# ---------------------------------------------------------------- results


def result_table(results: Sequence[Result]) -> Table:
    """One line per setting, its seeds pooled; in the CSV file one line per result.

    The strict re-check, and the spread over seeds, have a column if a result has them.
    """
    shown = pooled(results)
    pool_of = {id(member): pool for pool in shown for member in pool.members}

    def difference(r: Result) -> str:
        noise = "within" if r.published.within_noise else "beyond"
        return f"{number(r.published.difference, sign=True)}, {noise} noise"

    def of_pool(name: str) -> Callable[[Result], float | None]:
        return lambda r: fraction(r, getattr(pool_of[id(r)], name)) if id(r) in pool_of else None

    def spread(r: Result) -> str:
        return f"{number(r.spread, 1 if r.accuracy else 3)} (n {len(r.members)})"

    apart = dict(zip(map(id, shown), distinctions(shown), strict=True))
    seeds = {"sd over seeds": lambda r: spread(r) if r.members else "-"}
    strict = any(r.strict for r in results)
    strict_column = {"strict % [95 %]": lambda r: interval(*r.strict) if r.strict else "-"}
    columns = {
        "task": lambda r: r.task,
        "model": lambda r: r.model,
        "protocol": lambda r: r.config["protocol"],
        "algorithm": lambda r: _joined(r.algorithm, apart[id(r)]),
        "K": lambda r: r.k_text,
        "accuracy % [95 %]": lambda r: interval(r.value, r.low, r.high, 1 if r.accuracy else 3),
        **(seeds if pool_of else {}),
        **(strict_column if strict else {}),
        "n": lambda r: str(len(r.scores)),
        "TPF": lambda r: number(r.tpf, 2),
        "tok/s": lambda r: number(r.tok_s),
        "published": lambda r: number(r.published and r.published.score),
        "difference": lambda r: difference(r) if r.published else "-",
    }
    fields = {
        "file": ("name of the result file", lambda r: r.path.name),
        "id": ("result id", lambda r: r.id),
        "task": ("benchmark", lambda r: r.config["task"]),
        "data": ("name of the data; original and hub are the benchmark's own", _data),
        "limit": ("--limit; empty: all documents", lambda r: r.limit),
        "model": ("alias, and the checkpoint's name if it is not the alias's own", _model),
        "protocol": ("protocol", lambda r: r.config["protocol"]),
        "algorithm": ("algorithm, with the settings that the tables name", lambda r: r.algorithm),
        "tokens_per_step": ("K, as requested, else as the schedule realises it", lambda r: r.k),
        **{n: (text, lambda r, n=n: r.config.get(n)) for n, text in SETTINGS.items()},
        **{
            name: (_help(name, option), lambda r, n=name, o=option: _setting(r, n, o.default))
            for name, option in options_in(DecodeConfig).items()
        },
        "metric": ("headline metric and lm-eval's filter", lambda r: r.metric),
        "value": (f"its mean, {FRACTION}", lambda r: fraction(r, r.value)),
        "ci95_low": ("low end of its 95 % interval", lambda r: fraction(r, r.low)),
        "ci95_high": ("high end of its 95 % interval", lambda r: fraction(r, r.high)),
        "n": ("documents", lambda r: len(r.scores)),
        "seeds": (
            "results that differ in the seed alone, this one included",
            lambda r: len(pool_of[id(r)].members) if id(r) in pool_of else 1,
        ),
        "mean_over_seeds": ("mean of their values; empty for one seed", of_pool("value")),
        "sd_over_seeds": ("standard deviation of their values", of_pool("spread")),
        "tpf": ("tokens returned per forward pass", lambda r: r.tpf),
        "tokens_per_second": ("tokens returned per second of decoding", lambda r: r.tok_s),
        "batch_size": (
            "samples in flight; empty if it changed",
            lambda r: next((n for n, speed in r.batches.items() if speed == r.tok_s), None),
        ),
        "machine": ("devices that made the samples", lambda r: r.machine),
        "started": ("start of the run that wrote the file, ISO 8601", lambda r: r.started),
        "published": ("published score, a fraction", lambda r: _published(r, "score")),
        "published_source": (
            "where it is published",
            lambda r: r.published and r.published.source,
        ),
        "difference": ("our value of its metric minus it", lambda r: _published(r, "difference")),
        "within_noise": (
            "whether it lies in our interval",
            lambda r: r.published and r.published.within_noise,
        ),
    }
    if strict:
        names = ("strict", "strict_ci95_low", "strict_ci95_high")
        meanings = ("value under the strict re-check (--strict_exec)", "low end", "high end")
        fields |= {
            name: (text, lambda r, i=i: fraction(r, r.strict[i]) if r.strict else None)
            for i, (name, text) in enumerate(zip(names, meanings, strict=True))
        }
    folds = ("difference", "published", "strict % [95 %]", "sd over seeds", "n", "tok/s")
    fields |= _option_fields(results, fields)
    notes, about = _result_notes(shown), lambda r: (r,)
    return make_table("Results", shown, columns, fields, notes, results, about, folds=folds)


def fraction(result: Result, value: float | None) -> float | None:
    """A value of a result as files hold it: people read an accuracy in percent."""
    return value if value is None or not result.accuracy else round(value / 100, 12)


def _data(result: Result) -> str:
    return result.data["name"]


def _model(result: Result) -> str:
    return result.model


def _published(result: Result, name: str) -> float | None:
    return result.published and round(getattr(result.published, name) / 100, 12)


def _option_fields(
    results: Sequence[Result], others: Collection[str]
) -> dict[str, tuple[str, Callable[[Result], Any]]]:
    """A column for each option of the algorithms in `results`. others: the names of the others."""
    found = sorted({name for r in results for name in r.config.get("options") or {}})
    return {
        f"option_{name}" if name in others else name: (
            _own_help(name),
            lambda r, n=name: (r.config.get("options") or {}).get(n),
        )
        for name in found
    }


def _setting(result: Result, name: str, default: Any) -> Any:
    return None if result.k is None else result.config.get(name, default)


def _help(name: str, option: Option) -> str:
    return f"false with --no_{name}: {option.help}" if option.negated else option.help


def _own_help(name: str) -> str:
    """What an option of an algorithm does; it may differ from one algorithm to another."""
    helps: dict[str, list[str]] = {}
    for algorithm, rule in ALGORITHMS.items():
        if name in rule.options:
            helps.setdefault(rule.options[name].help, []).append(algorithm)
    known = [f"{', '.join(names)}: {text}" for text, names in helps.items()]
    return "; ".join(known) or "option of an algorithm of a plugin"


def _result_notes(results: Sequence[Result]) -> Iterable[str]:
    yield (
        "K: tokens per step; the minimum for an adaptive algorithm. TPF: tokens returned per "
        "forward pass, measured. tok/s: tokens returned per second of decoding. [95 %]: Wilson's "
        "interval for proportions, the normal interval for other means."
    )
    if any(r.members for r in results):
        yield (
            "sd over seeds: standard deviation of the values of the seeds of one setting, and how "
            "many they are. Such a line shows means over the seeds; [95 %] is the interval over "
            "documents of their mean scores."
        )
    if any(r.strict for r in results):
        yield "strict: passes that the strict re-check of programs confirms (--strict_exec)."
    metrics = {
        r.config["task"]: r.metric + ("" if r.accuracy else " (no accuracy: not in percent)")
        for r in results
    }
    yield f"Metrics: {'; '.join(f'{task} {text}' for task, text in sorted(metrics.items()))}."
    machines = sorted({r.machine for r in results if r.tok_s is not None})
    if machines:
        warning = f" Compare tok/s on one machine only. {OTHER_MACHINE}"
        warning = warning if len(machines) > 1 else ""
        yield f"Decoded on: {'; '.join(machines)}.{warning}"
    # those of one model, task and source differ only in tokens per step and score
    cited = {
        (r.model, r.task, r.published.source, r.published.settings): r.published
        for r in results
        if r.published
    }
    for (model, task, *_), p in cited.items():
        yield f"Published, {model} {task}: {p.source}; {p.metric}; {p.settings}."
    missing: dict[tuple[str, str, str], list[str]] = {}
    for r in results:
        if r.config["protocol"] == "official" and r.reference_note and not r.published:
            methods = missing.setdefault((r.model, r.task, r.reference_note), [])
            methods.append(f"{r.algorithm} at K = {r.k_text}")
    for (model, task, why), methods in missing.items():
        yield f"No published score for {model} {task}, {', '.join(dict.fromkeys(methods))}: {why}."
    if cited:
        yield "Within noise: the published score lies in the 95 % interval of our value."


# ---------------------------------------------------------------- speed


def speed_table(results: Sequence[Result]) -> Table:
    """tok/s over the samples in flight of runs with --timed_batch, beside published speeds."""
    lines: dict[tuple, dict[int, Result]] = {}
    timed = [r for r in pooled(results) if r.config.get("timed_batch") and r.tok_s]
    plain = [_without_batch(r) for r in timed]
    for r, one, apart in zip(timed, plain, distinctions(plain), strict=True):
        method = _joined(one.algorithm, apart), r.k_text, r.config["protocol"]
        key = (r.task, r.model, *method, r.machine, one.setting)
        lines.setdefault(key, {})[r.config["timed_batch"]] = r
    items = [(key, dict(sorted(line.items()))) for key, line in sorted(lines.items())]
    batches = sorted({batch for line in lines.values() for batch in line})

    def first(item) -> Result:
        return next(iter(item[1].values()))

    def speed(item, batch: int) -> float | None:
        return item[1][batch].tok_s if batch in item[1] else None

    columns = {
        "task": lambda item: item[0][0],
        "model": lambda item: item[0][1],
        "algorithm": lambda item: item[0][2],
        "K": lambda item: item[0][3],
        "accuracy %": lambda item: number(first(item).value, 1 if first(item).accuracy else 3),
        **{f"at {n}": lambda item, n=n: number(speed(item, n)) for n in batches},
        PUBLISHED_SPEEDS: lambda item: (
            "; ".join(
                f"{s['score']:.1f}, {s['tokens_per_second']:.1f} ({s['device']})"
                for s in first(item).speeds
            )
            or "-"
        ),
    }
    names = {
        "task": "benchmark",
        "model": "alias, and the checkpoint's name if it is not the alias's own",
        "algorithm": "algorithm, with the settings that the tables name",
        "tokens_per_step": "K, as requested, else as the schedule realises it",
        "protocol": "protocol",
        "machine": "devices that made the samples",
    }
    fields = {
        **{
            name: (text, lambda item, i=i: item[0][i])
            for i, (name, text) in enumerate(names.items())
        },
        "value": (
            f"the headline metric with the fewest samples in flight, {FRACTION}",
            lambda item: fraction(first(item), first(item).value),
        ),
        **{
            f"tokens_per_second_at_{n}": (
                f"tok/s with {n} samples in flight",
                lambda item, n=n: speed(item, n),
            )
            for n in batches
        },
        "published": (
            "published score in percent, tok/s, device and source, as JSON",
            lambda item: json.dumps(first(item).speeds),
        ),
    }
    notes = [
        "at N: tok/s with N samples in flight (--timed_batch N). accuracy: of the smallest N. "
        f"Decoded on: {'; '.join(sorted({key[5] for key in lines}))}."
    ]
    cited = {(k[0], k[1], s["source"]): s for k, line in items for s in first((k, line)).speeds}
    for (task, model, source), s in cited.items():
        notes.append(f"Published, {model} {task}: {source}, one {s['device']}; {s['settings']}.")
    title, about = "tok/s by samples in flight", lambda item: (first(item),)
    return make_table(title, items, columns, fields, notes, about=about, folds=("K",))


def _joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _without_batch(result: Result) -> Result:
    """The result as one without --timed_batch."""
    config, settings = (
        {name: value for name, value in part.items() if name != "timed_batch"}
        for part in (result.config, result.settings)
    )
    return replace(result, config=config, settings=settings)


# ---------------------------------------------------------------- comparisons


class Comparison(NamedTuple):
    a: Result
    b: Result
    found: Paired

    @property
    def names(self) -> tuple[str, str]:
        """Names of A and B; with their files if the names are equal."""
        a, b = self.a, self.b
        if a.name == b.name:
            return f"{a.name} ({a.file})", f"{b.name} ({b.file})"
        same_method = (a.curve, a.algorithm) == (b.curve, b.algorithm)
        return a.name, f"K = {b.k_text}" if same_method else b.name

    @property
    def machines_differ(self) -> bool:
        """Whether both results were decoded, on different machines."""
        decoded = None not in (self.a.tok_s, self.b.tok_s)
        return decoded and self.a.machine != self.b.machine

    @property
    def difference(self) -> str:
        scale, digits = (100, 1) if self.a.accuracy else (1, 3)
        bounds = self.found.low * scale, self.found.high * scale
        if self.found.only_a == self.found.only_b == 0:
            bounds = None, None  # an interval from 0 to 0 would look like certainty
        return interval(self.found.difference * scale, *bounds, digits, sign=True)


def comparison_table(
    results: Sequence[Result], requested: Sequence[tuple[Result, Result]] = ()
) -> Table:
    """The requested pairs, then all pairs of tokens per step on one curve, seeds pooled.

    Raises ValueError if a requested pair cannot be compared.
    """
    automatic = [
        (a, b)
        for curve in curves(pooled(results))
        for a, b in combinations(curve, 2)
        if a.k is not None and a.same_documents(b) and (a, b) not in requested
    ]
    found = [Comparison(a, b, compare_results(a, b)) for a, b in automatic]
    quiet = [c for c in found if not c.found.distinguishable]
    asked = [Comparison(a, b, compare_results(a, b)) for a, b in requested]
    pairs = [*asked, *(c for c in found if c.found.distinguishable), *quiet]
    protocols = {r.config["protocol"] for c in pairs for r in (c.a, c.b)}
    protocol = f", {protocols.pop()}," if len(protocols) == 1 else ""  # said once, in a note

    def named(c: Comparison, i: int) -> str:
        return c.names[i].replace(protocol, ",", 1) if protocol else c.names[i]

    columns = {
        "A": lambda c: named(c, 0),
        "B": lambda c: named(c, 1),
        "n": lambda c: str(c.found.n),
        "B - A [95 %]": lambda c: c.difference,
        "only A / only B": lambda c: (
            "-" if c.found.only_a is None else f"{c.found.only_a} / {c.found.only_b}"
        ),
        "p": lambda c: "< 0.001" if c.found.p < 0.001 else f"{c.found.p:.3f}",
        "test": lambda c: c.found.test,
        "verdict": lambda c: (
            c.found.verdict("A", "B") + (" (different machines)" if c.machines_differ else "")
        ),
    }
    fields = {
        "a": ("file of A; several with + if seeds are pooled", lambda c: c.a.file),
        "b": ("file of B", lambda c: c.b.file),
        "metric": ("headline metric of both", lambda c: c.a.metric),
        "n": ("documents that both have", lambda c: c.found.n),
        "difference": (f"mean of B minus A, {FRACTION}", lambda c: c.found.difference),
        "ci95_low": ("low end of its 95 % interval", lambda c: c.found.low),
        "ci95_high": ("high end of its 95 % interval", lambda c: c.found.high),
        "p": ("two-sided p-value", lambda c: c.found.p),
        "only_a": (
            "documents that only A answers correctly; empty for the bootstrap",
            _only("only_a"),
        ),
        "only_b": ("documents that only B answers correctly", _only("only_b")),
        "test": ("McNemar exact, or paired bootstrap", lambda c: c.found.test),
        "verdict": ("A higher, B higher or not distinguishable", _verdict),
        "machine_a": ("devices that made A's samples", lambda c: c.a.machine),
        "machine_b": ("devices that made B's samples", lambda c: c.b.machine),
    }
    note = (
        "Paired over the documents that both results have. Only A / only B: documents that only "
        "one of them answers correctly. McNemar: exact and two-sided; its interval takes the "
        "number of documents on which A and B differ as fixed. Bootstrap: 10,000 resamples of the "
        "documents with a fixed seed. Not distinguishable: p is at least 0.05 (McNemar), or the "
        "interval contains 0 (bootstrap). Not corrected for the number of comparisons: of 20 equal "
        "pairs, one is expected to look different."
    )
    differ = {f"{c.a.machine} and {c.b.machine}" for c in pairs if c.machines_differ}
    notes = [f"Different machines: {'; '.join(sorted(differ))}. {OTHER_MACHINE}"] if differ else []
    if protocol:
        notes.append(f"Protocol: {protocol.strip(', ')}.")
    return make_table(
        "Comparisons",
        pairs,
        columns,
        fields,
        [note, *notes],
        folds=("test", "n", "only A / only B", "p"),
        about=lambda c: (c.a, c.b),
        quiet=len(quiet),
        quiet_note=f"Not distinguishable: {numbered(len(quiet), 'pair')} of K on one curve, in "
        "comparisons.csv.",
    )


def _only(side: str) -> Callable[[Comparison], int | None]:
    return lambda c: getattr(c.found, side)


def _verdict(comparison: Comparison) -> str:
    return comparison.found.verdict("A", "B")


# ---------------------------------------------------------------- AUP


def panels(results: Iterable[Result]) -> dict[tuple[str, str], list[list[Result]]]:
    """(protocol, task) -> curves of the results with a TPF: they share a figure and a y_max.

    The seeds of a setting are one point of a curve.
    """
    found: dict[tuple[str, str], list[list[Result]]] = {}
    for curve in curves(result for result in pooled(results) if result.tpf):
        found.setdefault((curve[0].config["protocol"], curve[0].task), []).append(curve)
    return found


class ScoredCurve(NamedTuple):
    protocol: str
    task: str
    label: str
    aup: AUP
    low: float | None
    high: float | None
    spread: float | None
    y_max: float
    labels: str  # of every curve under the same y_max


def aup_table(results: Sequence[Result], alpha: float = 3.0, drop: float = 5.0) -> Table:
    """One line per curve; y_max is the best accuracy on the same task and protocol."""
    scored = []
    for (protocol, task), group in panels(r for r in results if r.accuracy).items():
        labels = curve_labels(group)
        y_max = max(result.value for curve in group for result in curve)
        for label, curve in zip(labels, group, strict=True):
            found = aup([(r.tpf, r.value) for r in curve], y_max, alpha=alpha, drop=drop)
            bounds = aup_interval(curve, y_max, alpha=alpha, drop=drop)
            bounds += (aup_spread(curve, y_max, alpha=alpha, drop=drop),)
            scored.append(
                ScoredCurve(protocol, task, label, found, *bounds, y_max, "; ".join(labels))
            )
    seeds = {"sd over seeds": lambda c: number(c.spread)}
    columns = {
        "task": lambda c: c.task,
        "protocol": lambda c: c.protocol,
        "method": lambda c: c.label,
        "AUP [95 %]": lambda c: interval(c.aup.value, c.low, c.high, 1),
        **(seeds if any(c.spread is not None for c in scored) else {}),
        "points": lambda c: str(c.aup.points),
        "dropped": lambda c: (
            ", ".join(f"{y:.1f} % at TPF {rho:.2f}" for rho, y in c.aup.dropped) or "-"
        ),
        "y_max": lambda c: number(c.y_max),
    }
    fields = {
        "task": ("benchmark, as in the tables", lambda c: c.task),
        "protocol": ("protocol", lambda c: c.protocol),
        "method": ("label of the curve", lambda c: c.label),
        "aup": ("AUP in the paper's unit: percent times TPF", lambda c: c.aup.value),
        "ci95_low": ("low end of its 95 % interval", lambda c: c.low),
        "ci95_high": ("high end of its 95 % interval", lambda c: c.high),
        "sd_over_seeds": ("standard deviation of the AUP of each seed", lambda c: c.spread),
        "points": ("points that count", lambda c: c.aup.points),
        "dropped": ("points that do not count", lambda c: len(c.aup.dropped)),
        "y_max": (
            "best accuracy of the comparison set, a fraction",
            lambda c: round(c.y_max / 100, 12),
        ),
        "comparison_set": ("labels of the curves that y_max is taken from", lambda c: c.labels),
        "alpha": ("--aup_alpha", lambda c: alpha),
        "y_drop": ("--aup_drop, in percentage points", lambda c: drop),
    }
    note = (
        f"AUP (arXiv:2601.07568): area under accuracy against measured TPF, alpha {alpha:g}; "
        f"points more than {drop:g} below the slowest one do not count. [95 %]: "
        f"{AUP_RESAMPLES:,} resamples of the documents, the same for all points, with fixed y_max "
        "and TPF. AUP depends on y_max, the best accuracy in the comparison set, and on the number "
        "of points: values of different sets are not comparable. Seeds of one setting are one "
        "point, their mean; sd over seeds is that of the AUP of each seed alone."
    )
    sets: dict[str, dict[str, None]] = {}
    several = len({c.protocol for c in scored}) > 1
    for c in scored:
        name = f"{c.task} ({c.protocol})" if several else c.task
        same = c.labels if len(c.labels) < 200 else f"all {c.labels.count('; ') + 1} methods above"
        sets.setdefault(same, {})[name] = None
    notes = [note, *(f"Comparison set of {', '.join(t)}: {labels}." for labels, t in sets.items())]
    title, folds = "Accuracy under parallelism", ("dropped", "points", "sd over seeds")
    return make_table(title, scored, columns, fields, notes, folds=folds)


# ---------------------------------------------------------------- forms


def to_text(table: Table, columns: int = 0) -> str:
    """columns: of the terminal; 0 for any width.

    In a narrow terminal, until the table fits: empty columns fold away, then those with the same
    cell in every row, which are named once below; text wraps to NARROW; `folds` fold away in their
    order; text wraps to NARROWEST.
    """
    from prettytable import PrettyTable

    rows, notes = table.loud()
    cells = dict(zip(table.columns, zip(*rows, strict=True), strict=True)) if rows else {}
    once, gone = [], []
    empty = [name for name, column in cells.items() if {*column} == {"-"}]
    same = [name for name, column in cells.items() if len({*column}) == 1 < len(column)]
    for names, least, folded in ((empty + same, 0, once), (table.folds, NARROW, gone)):
        for name in names:
            too_wide = columns and _width(_widths(cells, columns if least else 0, least)) > columns
            if too_wide and name in cells and len(cells) > 1:
                del cells[name]
                folded.append(name)
    widths = _widths(cells, columns, NARROWEST)
    first = dict(zip(table.columns, rows[0], strict=True)) if rows else {}
    once = [f"{name} {first[name]}" for name in once if first[name] != "-"]
    said = f"In every row: {', '.join(once)}."
    left_out = f"Too wide for {columns} columns: {', '.join(gone)}; the CSV file has them."
    notes = [*([said] if once else ()), *([left_out] if gone else ()), *notes]
    shown = PrettyTable(list(cells))
    for name in cells:
        shown.align[name] = "l" if name in LEFT_ALIGNED else "r"
    # no line break within "K = 2"
    lines = zip(*([text.replace(" = ", "\xa0=\xa0") for text in c] for c in cells.values()))
    shown.add_rows(list(lines))
    shown.max_width = widths
    body = [shown.get_string().replace("\xa0", " ")] if rows else []
    return "\n".join([table.title, *body, *(fill(n, columns) if columns else n for n in notes)])


def _width(widths: Mapping[str, int]) -> int:
    return sum(widths.values()) + 3 * len(widths) + 1


def _widths(cells: Mapping[str, Sequence[str]], columns: int, least: int) -> dict[str, int]:
    """The width of each column; those of text shrink to `least` until all fit, if `columns`."""
    widths = {name: max(map(len, (name, *column))) for name, column in cells.items()}
    while columns and _width(widths) > columns:
        texts = [name for name in widths if name in LEFT_ALIGNED and widths[name] > least]
        if not texts:
            break
        widths[max(texts, key=widths.get)] -= 1
    return widths


def to_markdown(table: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
        return f"| {' | '.join(escaped)} |"

    rule = "|" + "|".join("---" if c in LEFT_ALIGNED else "---:" for c in table.columns) + "|"
    rows, notes = table.loud()
    lines = [line(table.columns), rule, *map(line, rows)] if rows else []
    return "\n".join([f"## {table.title}", "", *lines, "", *(f"{note}\n" for note in notes)])


def to_csv(table: Table) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([table.fields, *table.records])
    return out.getvalue()


def to_meanings(tables: Mapping[str, Table]) -> str:
    """Markdown: what the columns of the CSV files mean. tables: by the name of the file."""
    sections = [
        "# Columns of the CSV files",
        "Shares and accuracies are fractions, as in the result files. Empty: there is no value.",
    ]
    for name, table in tables.items():
        meanings = zip(table.fields, table.meanings, strict=True)
        lines = [f"- `{field}`: {meaning}" for field, meaning in meanings]
        sections.append("\n".join([f"## {name}.csv", "", *lines]))
    return "\n\n".join(sections) + "\n"
