"""The tables of the report, once as rows, and each form they are written in: terminal, Markdown, CSV, HTML."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from reporting.data import Run, curve_labels, curves
from reporting.stats import AUP_RESAMPLES, Paired, aup, aup_interval, compare_runs


@dataclass(frozen=True)
class Table:
    """title: heading. columns, rows: text as shown. notes: what a reader must know, below it.

    records: the same rows in full precision for the CSV file, one dict each. left: columns that are set left.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...]
    records: list[dict[str, Any]]
    left: frozenset[str] = frozenset()


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    if value is None:
        return "-"
    shown = f"{value:{'+' if sign else ''}.{digits}f}"
    return shown if float(shown) else shown.lstrip("+-")  # not -0.0


def interval(
    value: float, low: float | None, high: float | None, digits: int = 1, sign: bool = False
) -> str:
    """`74.8 [72.4, 77.1]`; without brackets where one sample says nothing of the spread."""
    shown = number(value, digits, sign)
    return (
        shown
        if low is None
        else f"{shown} [{number(low, digits, sign)}, {number(high, digits, sign)}]"
    )


def _k(run: Run) -> str:
    return "-" if run.k is None else f"{run.k:.3g}"


# ---------------------------------------------------------------- results


def published(run: Run) -> tuple[float, float, bool] | None:
    """(published score in percent, ours minus it, whether it lies in our 95 % interval); None where there is none."""
    if run.reference is None:
        return None
    ours, score = run.metrics[run.reference["metric"]], run.reference["score"]
    low, high = ours["ci95"]
    return score, 100 * ours["value"] - score, low is not None and 100 * low <= score <= 100 * high


def results(runs: Sequence[Run]) -> Table:
    rows, records = [], []
    for run in runs:
        beside = published(run)
        digits = 1 if run.accuracy else 3
        rows.append(
            (
                run.task,
                run.model,
                run.config["protocol"],
                run.algorithm,
                _k(run),
                interval(run.value, run.low, run.high, digits),
                str(len(run.scores)),
                number(run.tpf, 2),
                number(run.tok_s),
                number(beside[0]) if beside else "-",
                f"{number(beside[1], sign=True)}, {'within' if beside[2] else 'beyond'} noise"
                if beside
                else "-",
            )
        )
        records.append(
            {
                "file": run.path.name,
                "id": run.id,
                "task": run.config["task"],
                "data": run.data["name"],
                "limit": run.limit,
                "model": run.model,
                "protocol": run.config["protocol"],
                "algorithm": run.algorithm,
                "tokens_per_step": run.k,
                "metric": run.metric,
                "value": run.value,
                "ci95_low": run.low,
                "ci95_high": run.high,
                "n": len(run.scores),
                "tpf": run.tpf,
                "tokens_per_second": run.tok_s,
                "machine": run.machine,
                "published": beside and beside[0],
                "published_source": run.reference and run.reference["source"],
                "difference": beside and beside[1],
                "within_noise": beside and beside[2],
            }
        )
    columns = (
        "task",
        "model",
        "protocol",
        "algorithm",
        "K",
        "accuracy % [95 %]",
        "n",
        "TPF",
        "tok/s",
        "published",
        "difference",
    )
    left = frozenset({"task", "model", "protocol", "algorithm", "difference"})
    return Table("Results", columns, rows, tuple(_result_notes(runs)), records, left)


def _result_notes(runs: Sequence[Run]) -> Iterable[str]:
    yield (
        "K: tokens per step; of an adaptive algorithm the least. TPF: tokens returned per forward pass, measured. tok/s: "
        "tokens returned per second of "
        "decoding. [95 %]: Wilson's interval of a share, the normal one of any other mean."
    )
    metrics = {run.config["task"]: run for run in runs}
    yield (
        "Metrics: "
        + "; ".join(
            f"{task} {run.metric}{'' if run.accuracy else ' (no share of right answers: not in percent)'}"
            for task, run in sorted(metrics.items())
        )
        + "."
    )
    machines = sorted({run.machine for run in runs if run.tok_s is not None})
    if machines:
        yield f"Decoded on: {'; '.join(machines)}." + (
            " tok/s compare on one machine only." if len(machines) > 1 else ""
        )
    cited = {
        (r.model, r.task): r.reference for r in runs if r.reference
    }  # they differ in tokens per step and score alone
    for (model, task), reference in cited.items():
        yield f"Published, {model} {task}: {reference['source']}; {reference['metric']}; {reference['settings']}."
    bare: dict[tuple[str, str, str], list[str]] = {}
    for r in runs:
        if r.config["protocol"] == "official" and r.reference_note and not r.reference:
            bare.setdefault((r.model, r.task, r.reference_note), []).append(
                f"{r.algorithm} at K = {_k(r)}"
            )
    for (model, task, why), runs_of in bare.items():
        yield f"No published score beside {model} {task}, {', '.join(dict.fromkeys(runs_of))}: {why}."
    if cited:
        yield "Within noise: the published score lies in the 95 % interval of ours."


# ---------------------------------------------------------------- comparisons


def _pairs(runs: Sequence[Run]) -> Iterable[tuple[Run, Run]]:
    for curve in curves(runs):
        for a, b in combinations(curve, 2):
            if a.k is not None and a.same_documents(b):
                yield a, b


def comparisons(runs: Sequence[Run], asked: Sequence[tuple[Run, Run]] = ()) -> Table:
    """Tokens-per-step settings of one model and task against each other, after the pairs that were asked for.

    Raises ValueError where an asked pair cannot be compared.
    """
    rows, records = [], []
    automatic = [pair for pair in _pairs(runs) if pair not in asked]
    for a, b in [*asked, *automatic]:
        found = compare_runs(a, b)
        rows.append((*_pair_names(a, b), *_compared(found, a.accuracy)))
        records.append(
            {
                "a": a.path.name,
                "b": b.path.name,
                "metric": a.metric,
                "n": found.n,
                "difference": found.difference,
                "ci95_low": found.low,
                "ci95_high": found.high,
                "p": found.p,
                "only_a": found.only_a,
                "only_b": found.only_b,
                "test": found.test,
                "verdict": found.verdict("A", "B"),
            }
        )
    notes = (
        "Paired over the documents that both have. Only A / only B: documents that only one of them got right. "
        "McNemar: exact, two-sided; its interval is for the number of documents on which the two differ. Bootstrap: "
        "10,000 resamples of the documents, always the same ones. Not distinguishable: p is at least 0.05 (McNemar), or "
        "the interval holds 0. Not corrected for the number of comparisons: of 20 equal pairs one is told apart.",
    )
    columns = ("A", "B", "n", "B - A [95 %]", "only A / only B", "p", "test", "verdict")
    return Table(
        "Comparisons", columns, rows, notes, records, frozenset({"A", "B", "test", "verdict"})
    )


def _pair_names(a: Run, b: Run) -> tuple[str, str]:
    """What A and B are called; their files too where that does not tell them apart."""
    if a.name != b.name:
        return a.name, f"K = {_k(b)}" if (a.curve, a.algorithm) == (
            b.curve,
            b.algorithm,
        ) else b.name
    return f"{a.name} ({a.path.name})", f"{b.name} ({b.path.name})"


def _compared(found: Paired, accuracy: bool) -> tuple[str, ...]:
    scale, digits = (100, 1) if accuracy else (1, 3)
    only = "-" if found.only_a is None else f"{found.only_a} / {found.only_b}"
    p = "< 0.001" if found.p < 0.001 else f"{found.p:.3f}"
    bounds = (
        (None, None)
        if found.only_a == found.only_b == 0
        else (found.low * scale, found.high * scale)
    )
    return (
        str(found.n),
        interval(found.difference * scale, *bounds, digits, sign=True),
        only,
        p,
        found.test,
        found.verdict("A", "B"),
    )


# ---------------------------------------------------------------- AUP


def panels(runs: Iterable[Run]) -> dict[tuple[str, str], list[list[Run]]]:
    """(protocol, task) -> curves of the decoded results: what may stand in one picture, or under one y_max."""
    found: dict[tuple[str, str], list[list[Run]]] = {}
    for curve in curves(run for run in runs if run.tpf):
        found.setdefault((curve[0].config["protocol"], curve[0].task), []).append(curve)
    return found


def aup_table(runs: Sequence[Run], alpha: float = 3.0, drop: float = 5.0) -> Table:
    """One row per curve; y_max is the best accuracy over the curves of the same task and protocol."""
    rows, records = [], []
    for (protocol, task), group in panels(r for r in runs if r.accuracy).items():
        labels = curve_labels(group)
        y_max = max(run.value for curve in group for run in curve)
        for label, curve in zip(labels, group, strict=True):
            found = aup([(r.tpf, r.value) for r in curve], y_max, alpha=alpha, drop=drop)
            low, high = aup_interval(curve, y_max, alpha=alpha, drop=drop)
            dropped = ", ".join(f"{y:.1f} % at TPF {rho:.2f}" for rho, y in found.dropped) or "-"
            rows.append(
                (
                    task,
                    protocol,
                    label,
                    interval(found.value, low, high, 1),
                    str(found.points),
                    dropped,
                    number(y_max),
                    "; ".join(labels),
                )
            )
            records.append(
                {
                    "task": task,
                    "protocol": protocol,
                    "method": label,
                    "aup": found.value,
                    "ci95_low": low,
                    "ci95_high": high,
                    "points": found.points,
                    "dropped": len(found.dropped),
                    "y_max": y_max,
                    "comparison_set": "; ".join(labels),
                    "alpha": alpha,
                    "y_drop": drop,
                }
            )
    notes = (
        f"AUP (arXiv:2601.07568): area under accuracy against measured TPF, alpha {alpha:g}; points more than {drop:g} "
        f"below the slowest one do not count. [95 %]: {AUP_RESAMPLES:,} resamples of the documents, the same for all points, "
        "with y_max and TPF as they are. It depends on y_max, the best accuracy in the comparison set, and on the "
        "number of points: values of other sets do not compare.",
    )
    columns = (
        "task",
        "protocol",
        "method",
        "AUP [95 %]",
        "points",
        "dropped",
        "y_max",
        "comparison set",
    )
    left = frozenset({"task", "protocol", "method", "dropped", "comparison set"})
    return Table("Accuracy under parallelism", columns, rows, notes, records, left)


# ---------------------------------------------------------------- forms


def to_text(table: Table) -> str:
    from prettytable import PrettyTable

    shown = PrettyTable(list(table.columns))
    shown.align = "r"
    for column in table.left & set(table.columns):
        shown.align[column] = "l"
    shown.add_rows(table.rows)
    return "\n".join([table.title, shown.get_string(), *table.notes])


def to_markdown(table: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return (
            "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"
        )

    rule = "|" + "|".join("---" if c in table.left else "---:" for c in table.columns) + "|"
    body = [line(table.columns), rule, *map(line, table.rows)]
    return "\n".join([f"## {table.title}", "", *body, "", *(f"{note}\n" for note in table.notes)])


def to_csv(table: Table) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(
        out, list(table.records[0]) if table.records else list(table.columns), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(table.records)
    return out.getvalue()


def to_html(table: Table) -> str:
    def cell(tag: str, column: str, text: str) -> str:
        kind = "" if column in table.left else ' class="n"'
        return f"<{tag}{kind}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", c, c) for c in table.columns)
    body = "\n".join(
        "<tr>"
        + "".join(cell("td", c, t) for c, t in zip(table.columns, row, strict=True))
        + "</tr>"
        for row in table.rows
    )
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in table.notes)
    return (
        f"<h2>{html.escape(table.title)}</h2>\n<div class=wide><table><thead><tr>{head}</tr></thead>"
        f"<tbody>\n{body}\n</tbody></table></div>\n{notes}"
    )
