"""report.html: one file with tables, figures and every sample; it loads nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from reporting.data import Result
from reporting.plots import Picture, inline
from reporting.tables import Table, interval, to_html

HERE = Path(__file__).parent


def page(
    results: Sequence[Result],
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    remarks: Mapping[str, Sequence[str]],
    samples: bool,
) -> Iterator[str]:
    """The page in pieces: the samples of a suite are too large for one string.

    remarks: title -> lines, shown at the top. samples: whether to embed the samples.
    """
    contents = {
        "css": (HERE / "page.css").read_text(encoding="utf-8"),
        "js": (HERE / "page.js").read_text(encoding="utf-8"),
        "count": str(len(results)),
        "remarks": "\n".join(_remark(title, lines) for title, lines in remarks.items()),
        "tables": "\n".join(map(to_html, tables)),
        "figures": _figures(pictures),
        "results": "\n".join(_result(i, result) for i, result in enumerate(results))
        if samples
        else "<p>Left out (--no_samples).</p>",
    }
    for piece in re.split(r"\{\{(\w+)\}\}", (HERE / "page.html").read_text(encoding="utf-8")):
        if piece == "data":
            for i, result in enumerate(results if samples else ()):
                yield f'<script type="text/plain" id="samples-{i}">{result.packed}</script>\n'
        else:
            yield contents.get(piece, piece)


def _remark(title: str, lines: Sequence[str]) -> str:
    state = " open" if len(lines) <= 10 else ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<details{state}><summary>{title}: {len(lines)}</summary><ul>{items}</ul></details>"


def _figures(pictures: Sequence[Picture]) -> str:
    figures = [
        f'<figure role="img" aria-label="{escape(p.title)}">{inline(p.svg, f"f{i}")}<figcaption>'
        f"{escape(p.title)}. Also as {p.name}.png and {p.name}.svg.</figcaption></figure>"
        for i, p in enumerate(pictures)
    ]
    return "\n".join(["<h2>Figures</h2>", *figures]) if figures else ""


def _result(index: int, result: Result) -> str:
    value = interval(result.value, result.low, result.high, 1 if result.accuracy else 3)
    metric = result.metric.partition(",")[0]
    text = escape(f"{result.name}: {metric} {value}, {len(result.scores)} documents")
    attributes = f'class="result" data-samples="samples-{index}"'
    return f"<details {attributes}><summary>{text}</summary></details>"
