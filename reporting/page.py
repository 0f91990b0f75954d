"""report.html: one file with tables, figures and every sample; nothing is loaded from elsewhere."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from reporting.data import Run, Skipped
from reporting.plots import Picture, inline
from reporting.tables import Table, interval, to_html

HERE = Path(__file__).parent


def page(
    runs: Sequence[Run],
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    skipped: Sequence[Skipped],
    samples: bool,
) -> Iterator[str]:
    """The page in pieces, so that the samples of a whole suite are never one string. samples: whether to embed them."""
    parts = {
        "css": (HERE / "page.css").read_text(encoding="utf-8"),
        "js": (HERE / "page.js").read_text(encoding="utf-8"),
        "head": _head(runs, skipped),
        "tables": "\n".join(to_html(table) for table in tables if table.rows),
        "figures": _figures(pictures),
        "runs": "\n".join(_run(i, run) for i, run in enumerate(runs))
        if samples
        else "<p>Left out (--no_samples).</p>",
    }
    for piece in re.split(r"\{\{(\w+)\}\}", (HERE / "page.html").read_text(encoding="utf-8")):
        if piece == "data":
            for i, run in enumerate(runs if samples else ()):
                yield f'<script type="text/plain" id="samples-{i}">{run.packed}</script>\n'
        else:
            yield parts.get(piece, piece)


def _head(runs: Sequence[Run], skipped: Sequence[Skipped]) -> str:
    lines = [f"<p>{len(runs)} results.</p>"]
    if warnings := [(run.name, warning) for run in runs for warning in run.warnings]:
        told = "".join(
            f"<li>{html.escape(name)}: {html.escape(text)}</li>" for name, text in warnings
        )
        title = f"{len(warnings)} signs that a score measures the format of answers"
        lines.append(f"<details><summary>{title}</summary><ul>{told}</ul></details>")
    if skipped:
        told = "".join(
            f"<li>{html.escape(s.path.name)}: {html.escape(s.reason)}</li>" for s in skipped
        )
        lines.append(
            f"<details open><summary>{len(skipped)} files left out</summary><ul>{told}</ul></details>"
        )
    return "\n".join(lines)


def _figures(pictures: Sequence[Picture]) -> str:
    figures = [
        f'<figure role="img" aria-label="{html.escape(p.title)}">{inline(p.svg, f"f{i}")}'
        f"<figcaption>{html.escape(p.title)}. Also as {p.name}.png and {p.name}.svg.</figcaption></figure>"
        for i, p in enumerate(pictures)
    ]
    return "\n".join(["<h2>Figures</h2>", *figures]) if figures else ""


def _run(index: int, run: Run) -> str:
    value = interval(run.value, run.low, run.high, 1 if run.accuracy else 3)
    text = f"{run.name}: {run.metric.partition(',')[0]} {value}, {len(run.scores)} documents"
    return f'<details class="run" data-samples="samples-{index}"><summary>{html.escape(text)}</summary></details>'
