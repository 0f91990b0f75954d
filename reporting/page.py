"""report.html: one file with figures, tables and every sample; it loads nothing from elsewhere."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from reporting.data import Result
from reporting.plots import Picture, inline
from reporting.tables import LEFT_ALIGNED, Table, interval
from utils import numbered

HERE = Path(__file__).parent
# columns that answer a table's question, shown before the others
FIRST = ("verdict", "B - A [95 %]", "p", "accuracy % [95 %]", "AUP [95 %]")


def page(
    results: Sequence[Result],
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    remarks: Mapping[str, Sequence[str]],
    samples: bool,
) -> Iterator[str]:
    """The page in pieces: the samples of a suite are too large for one string.

    remarks: title -> lines, shown above the tables. samples: whether to embed the samples.
    """
    index_of = {id(result): i for i, result in enumerate(results)}
    index = json.dumps({"results": [_entry(result, results) for result in results]})
    contents = {
        "css": (HERE / "page.css").read_text(encoding="utf-8"),
        "js": (HERE / "page.js").read_text(encoding="utf-8"),
        "summary": _summary(results),
        "remarks": "\n".join(_remark(title, lines) for title, lines in remarks.items()),
        "tables": "\n".join(_table(i, table, index_of) for i, table in enumerate(tables)),
        "sections": " ".join(
            f'<a href="#table-{i}">{escape(table.title)}</a>' for i, table in enumerate(tables)
        ),
        "figures": _figures(results, pictures),
        "index": index.replace("<", "\\u003c"),  # no "</script>" in a name
    }
    for piece in re.split(r"\{\{(\w+)\}\}", (HERE / "page.html").read_text(encoding="utf-8")):
        if piece == "data":
            for i, result in enumerate(results):
                parts = zip(("about", "samples"), result.packed.split("\n"), strict=True)
                for name, packed in list(parts)[: 2 if samples else 1]:
                    yield f'<script type="text/plain" id="{name}-{i}">{packed}</script>\n'
        else:
            yield contents.get(piece, piece)


def _entry(result: Result, results: Sequence[Result]) -> dict:
    """What page.js knows of a result before it is unpacked.

    documents: equal for results on the same documents.
    """
    value = interval(result.value, result.low, result.high, 1 if result.accuracy else 3)
    return {
        "name": result.name,
        "file": result.path.name,
        "value": f"{result.metric.partition(',')[0]} {value}{' %' * result.accuracy}",
        "accuracy": result.accuracy,
        "documents": next(
            i for i, r in enumerate(results) if r is result or r.same_documents(result)
        ),
    }


def _summary(results: Sequence[Result]) -> str:
    parts = [("result", results), ("model", {r.model for r in results})]
    counts = [numbered(len(found), name) for name, found in parts]
    days = sorted({result.started[:10] for result in results if result.started})
    tasks = ", ".join(sorted({result.task for result in results}))
    counts += [" to ".join(dict.fromkeys((days[0], days[-1])))] if days else []
    return escape(f"{', '.join(counts)}. Benchmarks: {tasks}. A row opens its samples.")


def _remark(title: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<details><summary>{title}: {len(lines)}</summary><ul>{items}</ul></details>"


def _figures(results: Sequence[Result], pictures: Sequence[Picture]) -> str:
    """Accuracy against measured speed under the protocol of most results; the others folded."""
    ((protocol, _),) = Counter(r.config["protocol"] for r in results).most_common(1)
    first = f"accuracy_tpf_{protocol}"
    figures = [
        f'<figure role="img" aria-label="{escape(p.title)}">{inline(p.svg, f"f{i}")}<figcaption>'
        f"{escape(p.title)}. Files: {p.name}.*</figcaption></figure>"
        for i, p in enumerate(sorted(pictures, key=lambda p: p.name != first))
    ]
    if len(figures) > 1:
        more = numbered(len(figures) - 1, "more figure")
        figures[1:] = [f"<details><summary>{more}</summary>", *figures[1:], "</details>"]
    return "\n".join(figures)


def _table(number: int, table: Table, index_of: Mapping[int, int]) -> str:
    """A section with a filter and headings that sort.

    Columns of FIRST come first. Below the table is what a column of text says in every row.
    """
    cells = dict(zip(table.columns, zip(*table.rows, strict=True), strict=True))
    same = [
        c
        for c in table.columns[1:]
        if len(table.rows) > 1 and len({*cells[c]}) == 1 and c not in FIRST
        if c in LEFT_ALIGNED or cells[c][0] == "-"
    ]
    shown = [c for c in cells if c not in same]
    columns = [c for c in FIRST if c in shown] + [c for c in shown if c not in FIRST]
    side = {c: "" if c in LEFT_ALIGNED else " class=n" for c in columns}
    heads = [f"<th{side[c]} aria-sort=none><button>{escape(c)}</button></th>" for c in columns]
    rows = []
    for row, about in enumerate(table.about):
        first, *others = _links(about, index_of) or [("", "")]
        texts = [escape(cells[c][row]) for c in columns]
        if first[1]:
            texts[0] = f'<a href="#{first[1]}">{texts[0]}</a>'
            texts[0] += "".join(f' <a href="#{at}">{escape(name)}</a>' for name, at in others)
        line = "".join(f"<td{side[c]}>{text}</td>" for c, text in zip(columns, texts, strict=True))
        rows.append(f"<tr{' class=opens' if first[1] else ''}>{line}</tr>")
    notes = list(table.notes)
    if constant := [
        f"{c} {cells[c][0]}" for c in same if cells[c][0] != "-" and c in columns + same
    ]:
        notes.insert(0, f"In every row: {'; '.join(constant)}.")
    title, below = escape(table.title), "".join(f"<p class=note>{escape(n)}</p>" for n in notes)
    lines = "\n".join(rows)
    return (
        f"<section class=table id=table-{number}><h2>{title}</h2>\n<div class=bar><label>filter "
        f'<input type=search placeholder="words of a row" aria-label="filter {title}"></label> '
        f"<span class=count role=status>{numbered(len(rows), 'row')}</span></div>\n"
        f"<div class=wide><table><thead><tr>{''.join(heads)}</tr></thead><tbody>\n{lines}\n"
        f"</tbody></table></div>\n{below}</section>"
    )


def _links(about: Sequence[Result], index_of: Mapping[int, int]) -> list[tuple[str, str]]:
    """(text, address) of what a row opens: a result, the seeds of a setting, or a pair."""
    if len(about) == 2:
        a, b = (index_of.get(id((result.members or (result,))[0])) for result in about)
        return [] if None in (a, b) else [("", f"result={a}&amp;with={b}&amp;show=differ")]
    found = [r for result in about for r in result.members or (result,) if id(r) in index_of]
    return [(f"seed {r.seed}", f"result={index_of[id(r)]}") for r in found]
