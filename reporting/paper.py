"""A table for a paper: methods in rows, tasks in columns, the best of each task in bold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from decoding.option import written
from reporting.data import Result, curve_labels, curves, pooled
from reporting.tables import number

ESCAPED = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
}
NOTE = (
    "Bold: the best of a task, which may not be distinguishable from the next. "
    "+-: half the width of the 95 % interval. TPF: tokens per forward pass."
)


@dataclass(frozen=True)
class Row:
    """One setting of a method. cells: task -> its result."""

    method: str
    setting: str
    cells: dict[str, Result]


@dataclass(frozen=True)
class PaperTable:
    """The results of one protocol. tasks: with their metric, in the order of the columns."""

    protocol: str
    tasks: dict[str, str]
    rows: list[Row]

    def cell(self, row: Row, task: str, bold: tuple[str, str], pm: str) -> tuple[str, str]:
        """(accuracy, TPF). bold: what stands before and behind the best. pm: plus-minus."""
        result = row.cells.get(task)
        if result is None:
            return "-", "-"
        digits = 1 if result.accuracy else 3
        shown = number(result.value, digits)
        every = [r.cells[task].value for r in self.rows if task in r.cells]
        if result.accuracy and result.value == max(every):
            shown = f"{bold[0]}{shown}{bold[1]}"
        if result.low is not None and result.high is not None:
            shown += f" {pm} {number((result.high - result.low) / 2, digits)}"
        return shown, number(result.tpf, 2)


def paper_tables(results: Sequence[Result]) -> list[PaperTable]:
    """One table for each protocol; seeds of a setting are one row, their mean."""
    by_protocol: dict[str, list[list[Result]]] = {}
    for curve in curves(pooled(results)):
        by_protocol.setdefault(curve[0].config["protocol"], []).append(curve)
    return [_table(protocol, group) for protocol, group in by_protocol.items()]


def _table(protocol: str, group: Sequence[Sequence[Result]]) -> PaperTable:
    tasks: dict[str, str] = {}
    rows: dict[tuple[str, str, int], Row] = {}
    labelled = list(zip(curve_labels(group), group, strict=True))
    for label, curve in labelled:
        same = [result for other, points in labelled if other == label for result in points]
        for result in curve:
            unit = " (%)" if result.accuracy else ""
            tasks.setdefault(result.task, result.metric.partition(",")[0] + unit)
            again, setting = 0, setting_of(result, same)
            while result.task in rows.get((label, setting, again), Row("", "", {})).cells:
                again += 1  # the same setting once more, such as with --strict_exec
            row = rows.setdefault((label, setting, again), Row(label, setting, {}))
            row.cells[result.task] = result
    return PaperTable(protocol, tasks, list(rows.values()))


def setting_of(result: Result, same: Sequence[Result]) -> str:
    """K and the options in which results of a method differ: "K = 2", "threshold 0.9"."""
    options = result.config.get("options") or {}
    parts = [
        f"{name} {written(value)}"
        for name, value in options.items()
        if any((r.config.get("options") or {}).get(name) != value for r in same)
    ]
    if result.k is not None and (not parts or len({r.k for r in same}) > 1):
        parts.insert(0, f"K = {result.k_text}")
    return ", ".join(parts)


def to_markdown(table: PaperTable) -> str:
    heads = [f"{task}, {metric} | TPF" for task, metric in table.tasks.items()]
    lines = [
        f"| method | setting | {' | '.join(heads)} |",
        "|---|---|" + "---:|---:|" * len(heads),
    ]
    for row in table.rows:
        cells = [table.cell(row, task, ("**", "**"), "±") for task in table.tasks]
        texts = [row.method, row.setting, *(text for pair in cells for text in pair)]
        lines.append(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in texts)} |")
    note = NOTE.replace("+-", "±")
    return "\n".join([f"Protocol {table.protocol}.", "", *lines, "", note, ""])


def to_latex(table: PaperTable) -> str:
    """A tabular with the rules of booktabs; a method is named in its first row."""
    return "\n".join(_latex_lines(table)) + "\n"


def _latex_lines(table: PaperTable) -> Iterator[str]:
    n = len(table.tasks)
    yield f"% Protocol {table.protocol}. {NOTE}"
    yield r"% \usepackage{booktabs}"
    yield rf"\begin{{tabular}}{{ll{'rr' * n}}}"
    yield r"\toprule"
    tasks = [rf"\multicolumn{{2}}{{c}}{{{latex(task)}}}" for task in table.tasks]
    yield rf" & & {' & '.join(tasks)} \\"
    yield " ".join(rf"\cmidrule(lr){{{3 + 2 * i}-{4 + 2 * i}}}" for i in range(n))
    heads = [f"{latex(metric)} & TPF" for metric in table.tasks.values()]
    yield rf"Method & Setting & {' & '.join(heads)} \\"
    last = None
    for row in table.rows:
        if row.method != last:
            yield r"\midrule" if last is None else r"\addlinespace"
        method, last = "" if row.method == last else latex(row.method), row.method
        cells = [table.cell(row, task, (r"\textbf{", "}"), r"$\pm$") for task in table.tasks]
        texts = [method, latex(row.setting), *(text for pair in cells for text in pair)]
        yield rf"{' & '.join(texts)} \\"
    yield r"\bottomrule"
    yield r"\end{tabular}"


def latex(text: str) -> str:
    return "".join(ESCAPED.get(letter, letter) for letter in text)
