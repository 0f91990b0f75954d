"""The tables of the report, and the forms they are written in: terminal, Markdown, CSV, HTML."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from textwrap import fill
from typing import Any, NamedTuple

from reporting.data import Result, curve_labels, curves, method_label, pooled
from reporting.stats import (
    AUP,
    AUP_RESAMPLES,
    Paired,
    aup,
    aup_interval,
    aup_spread,
    compare_results,
)

PUBLISHED_SPEEDS = "published %, tok/s"
LEFT_ALIGNED = frozenset(
    "task model protocol algorithm method difference A B test verdict dropped".split()
) | {PUBLISHED_SPEEDS}
# of a result's config, in results.csv
SETTINGS = ("seed", "dtype", "gen_length", "block_length", "num_steps", "temperature")
OTHER_MACHINE = (
    "Accuracy may differ by machine too: kernels round differently, and a near tie then commits "
    "another token."
)
NARROWEST = 12  # width to which a column of text shrinks for a terminal


@dataclass(frozen=True)
class Table:
    """One table, as text and in full precision.

    columns, rows: headings and cells as shown. notes: paragraphs below the table.
    fields, records: the same lines for the CSV file, in full precision.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    fields: tuple[str, ...]
    records: list[tuple[Any, ...]]
    notes: tuple[str, ...]


def make_table(
    title: str,
    items: Sequence[Any],
    columns: Mapping[str, Callable[[Any], str]],
    fields: Mapping[str, Callable[[Any], Any]],
    notes: Iterable[str],
    recorded: Sequence[Any] | None = None,
) -> Table:
    """One line per item. columns, fields: heading -> function from an item to its cell.

    recorded: the items of the CSV file; None: the same.
    """
    rows = [tuple(cell(item) for cell in columns.values()) for item in items]
    recorded = items if recorded is None else recorded
    records = [tuple(cell(item) for cell in fields.values()) for item in recorded]
    return Table(title, tuple(columns), rows, tuple(fields), records, tuple(notes))


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
        return lambda r: getattr(pool_of[id(r)], name) if id(r) in pool_of else None

    def spread(r: Result) -> str:
        return f"{number(r.spread, 1 if r.accuracy else 3)} (n {len(r.members)})"

    seeds = {"sd over seeds": lambda r: spread(r) if r.members else "-"}
    strict = any(r.strict for r in results)
    strict_column = {"strict % [95 %]": lambda r: interval(*r.strict) if r.strict else "-"}
    columns = {
        "task": lambda r: r.task,
        "model": lambda r: r.model,
        "protocol": lambda r: r.config["protocol"],
        "algorithm": lambda r: r.algorithm,
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
        "file": lambda r: r.path.name,
        "id": lambda r: r.id,
        "task": lambda r: r.config["task"],
        "data": lambda r: r.data["name"],
        "limit": lambda r: r.limit,
        "model": lambda r: r.model,
        "protocol": lambda r: r.config["protocol"],
        "algorithm": lambda r: r.algorithm,
        "tokens_per_step": lambda r: r.k,
        **{name: lambda r, name=name: r.config.get(name) for name in SETTINGS},
        "kv_cache": lambda r: None if r.k is None else r.config.get("kv_cache", "none"),
        "options": lambda r: json.dumps(options) if (options := r.config.get("options")) else None,
        "metric": lambda r: r.metric,
        "value": lambda r: r.value,
        "ci95_low": lambda r: r.low,
        "ci95_high": lambda r: r.high,
        "n": lambda r: len(r.scores),
        "seeds": lambda r: len(pool_of[id(r)].members) if id(r) in pool_of else 1,
        "mean_over_seeds": of_pool("value"),
        "sd_over_seeds": of_pool("spread"),
        "tpf": lambda r: r.tpf,
        "tokens_per_second": lambda r: r.tok_s,
        "machine": lambda r: r.machine,
        "published": lambda r: r.published and r.published.score,
        "published_source": lambda r: r.published and r.published.source,
        "difference": lambda r: r.published and r.published.difference,
        "within_noise": lambda r: r.published and r.published.within_noise,
    }
    if strict:
        names = ("strict", "strict_ci95_low", "strict_ci95_high")
        fields |= {n: lambda r, i=i: r.strict and r.strict[i] for i, n in enumerate(names)}
    return make_table("Results", shown, columns, fields, _result_notes(shown), results)


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
    # the published scores of one model and task differ only in tokens per step and score
    cited = {(r.model, r.task): r.published for r in results if r.published}
    for (model, task), p in cited.items():
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
    for r in pooled(results):
        if (batch := r.config.get("timed_batch")) and r.tok_s:
            config = {name: value for name, value in r.config.items() if name != "timed_batch"}
            method = method_label(config, r.overrides), r.k_text, r.config["protocol"]
            lines.setdefault((r.task, r.model, *method, r.machine), {})[batch] = r
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
    names = ("task", "model", "algorithm", "tokens_per_step", "protocol", "machine")
    fields = {
        **{name: lambda item, i=i: item[0][i] for i, name in enumerate(names)},
        "value": lambda item: first(item).value,
        **{f"tokens_per_second_at_{n}": lambda item, n=n: speed(item, n) for n in batches},
        "published": lambda item: json.dumps(first(item).speeds),
    }
    notes = [
        "at N: tok/s with N samples in flight (--timed_batch N). accuracy: of the smallest N. "
        f"Decoded on: {'; '.join(sorted({key[-1] for key in lines}))}."
    ]
    cited = {(k[0], k[1], s["source"]): s for k, line in items for s in first((k, line)).speeds}
    for (task, model, source), s in cited.items():
        notes.append(f"Published, {model} {task}: {source}, one {s['device']}; {s['settings']}.")
    return make_table("tok/s by samples in flight", items, columns, fields, notes)


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
    pairs = [Comparison(a, b, compare_results(a, b)) for a, b in [*requested, *automatic]]
    columns = {
        "A": lambda c: c.names[0],
        "B": lambda c: c.names[1],
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
        "a": lambda c: c.a.file,
        "b": lambda c: c.b.file,
        "metric": lambda c: c.a.metric,
        "n": lambda c: c.found.n,
        "difference": lambda c: c.found.difference,
        "ci95_low": lambda c: c.found.low,
        "ci95_high": lambda c: c.found.high,
        "p": lambda c: c.found.p,
        "only_a": lambda c: c.found.only_a,
        "only_b": lambda c: c.found.only_b,
        "test": lambda c: c.found.test,
        "verdict": lambda c: c.found.verdict("A", "B"),
        "machine_a": lambda c: c.a.machine,
        "machine_b": lambda c: c.b.machine,
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
    return make_table("Comparisons", pairs, columns, fields, [note, *notes])


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
        "task": lambda c: c.task,
        "protocol": lambda c: c.protocol,
        "method": lambda c: c.label,
        "aup": lambda c: c.aup.value,
        "ci95_low": lambda c: c.low,
        "ci95_high": lambda c: c.high,
        "sd_over_seeds": lambda c: c.spread,
        "points": lambda c: c.aup.points,
        "dropped": lambda c: len(c.aup.dropped),
        "y_max": lambda c: c.y_max,
        "comparison_set": lambda c: c.labels,
        "alpha": lambda c: alpha,
        "y_drop": lambda c: drop,
    }
    note = (
        f"AUP (arXiv:2601.07568): area under accuracy against measured TPF, alpha {alpha:g}; "
        f"points more than {drop:g} below the slowest one do not count. [95 %]: "
        f"{AUP_RESAMPLES:,} resamples of the documents, the same for all points, with fixed y_max "
        "and TPF. AUP depends on y_max, the best accuracy in the comparison set, and on the number "
        "of points: values of different sets are not comparable. Seeds of one setting are one "
        "point, their mean; sd over seeds is that of the AUP of each seed alone."
    )
    sets = {(c.task, c.protocol): f"y_max {c.y_max:.1f}: the best of {c.labels}" for c in scored}
    notes = [note, *(f"{task}, {protocol}: {text}." for (task, protocol), text in sets.items())]
    return make_table("Accuracy under parallelism", scored, columns, fields, notes)


# ---------------------------------------------------------------- forms


def to_text(table: Table, columns: int = 0) -> str:
    """columns: of the terminal; its columns of text are wrapped to fit, 0 wraps nothing."""
    from prettytable import PrettyTable

    shown = PrettyTable(list(table.columns))
    for column in table.columns:
        shown.align[column] = "l" if column in LEFT_ALIGNED else "r"
    shown.add_rows(table.rows)
    cells = zip(table.columns, *table.rows, strict=True)
    widths = {column: max(map(len, (column, *rest))) for column, *rest in cells}
    texts = [column for column in table.columns if column in LEFT_ALIGNED]
    while columns and sum(widths.values()) + 3 * len(widths) + 1 > columns:
        widest = max(texts, key=widths.get)
        if widths[widest] <= NARROWEST:
            break
        widths[widest] -= 1
    shown.max_width = widths
    notes = [fill(note, columns) if columns else note for note in table.notes]
    return "\n".join([table.title, shown.get_string(), *notes])


def to_markdown(table: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
        return f"| {' | '.join(escaped)} |"

    rule = "|" + "|".join("---" if c in LEFT_ALIGNED else "---:" for c in table.columns) + "|"
    lines = [line(table.columns), rule, *map(line, table.rows)]
    return "\n".join([f"## {table.title}", "", *lines, "", *(f"{note}\n" for note in table.notes)])


def to_csv(table: Table) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([table.fields, *table.records])
    return out.getvalue()


def to_html(table: Table) -> str:
    def line(tag: str, cells: Iterable[str]) -> str:
        shown = [
            f"<{tag}{'' if c in LEFT_ALIGNED else ' class=n'}>{html.escape(text)}</{tag}>"
            for c, text in zip(table.columns, cells, strict=True)
        ]
        return f"<tr>{''.join(shown)}</tr>"

    rows = "\n".join(line("td", row) for row in table.rows)
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in table.notes)
    return (
        f"<h2>{html.escape(table.title)}</h2>\n<div class=wide><table><thead>"
        f"{line('th', table.columns)}</thead><tbody>\n{rows}\n</tbody></table></div>\n{notes}"
    )
