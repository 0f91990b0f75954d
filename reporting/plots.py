"""Accuracy against speed, one panel per task: figures for a paper, as PNG and SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from reporting.data import Run, curve_labels
from reporting.tables import panels

# Okabe and Ito's palette, told apart with every kind of colour vision; its yellow is too light for a line on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "D", "^", "h", "p", "8")
DASHES = ("-", "--", ":", "-.")
METRICS = {
    "exact_match": "Exact match",
    "pass@1": "pass@1",
    "bleu_acc": "BLEU accuracy",
    "acc": "Accuracy",
}
TOGETHER = 0.015  # of a panel's range: closer points cover each other
AXES = {"tpf": "Tokens per forward pass", "tok_s": "Tokens per second"}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "legend.fontsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "svg.fonttype": "path",
    "svg.hashsalt": "dllmexp",
    "figure.dpi": 100,
}


@dataclass(frozen=True)
class Line:
    """One curve with its name and its look: colour, marker, dash."""

    label: str
    curve: list[Run]
    look: dict[str, str]


@dataclass(frozen=True)
class Picture:
    """name: file name without ending. title: for the page and for a reader who sees no picture."""

    name: str
    title: str
    svg: str


def draw(runs: Sequence[Run], folder: Path) -> list[Picture]:
    """Write every figure to `folder`; per protocol one against TPF and one against tok/s."""
    groups = panels(runs)
    models = sorted({curve[0].model for curves in groups.values() for curve in curves})
    pictures = []
    for protocol in dict.fromkeys(protocol for protocol, _ in groups):
        curves = [curve for (p, _), found in groups.items() if p == protocol for curve in found]
        lines = _lines(curves, models)
        for axis, label in AXES.items():
            name = f"accuracy_{axis}_{protocol}"
            with _matplotlib():
                figure = _figure(lines, axis)
                figure.savefig(folder / f"{name}.png", dpi=300, metadata={"Software": None})
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
            svg = (folder / f"{name}.svg").read_text(encoding="utf-8")
            pictures.append(
                Picture(name, f"Accuracy against {label.lower()}, protocol {protocol}", svg)
            )
    return pictures


def _lines(curves: Sequence[list[Run]], models: Sequence[str]) -> list[Line]:
    """A model keeps its colour in every figure; its further curves get another marker and another dash."""
    labels, looks, seen = curve_labels(curves), {}, {}
    for label, curve in zip(labels, curves, strict=True):
        if label not in looks:
            model = models.index(curve[0].model)
            nth = seen[model] = seen.get(model, -1) + 1
            looks[label] = {
                "color": COLOURS[model % len(COLOURS)],
                "marker": MARKERS[(model + 2 * nth) % len(MARKERS)],
                "linestyle": DASHES[(nth + model // len(COLOURS)) % len(DASHES)],
            }
    return [Line(label, curve, looks[label]) for label, curve in zip(labels, curves, strict=True)]


@contextmanager
def _matplotlib():
    import logging

    import matplotlib

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a font cache is built, once
    with matplotlib.rc_context(STYLE):
        yield


def _figure(lines: Sequence[Line], axis: str):
    """7 inches wide (a page's two columns), or 3.5 for a single panel; one legend below for all panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(line.curve[0].task for line in lines))
    columns = min(2, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    labels = sorted({line.label for line in lines})
    per_line = columns * (2 if max(map(len, labels)) <= 26 else 1)
    caption = "\n".join(fill(line, 55 * columns) for line in _caption(lines, axis).splitlines())
    height = (
        2.5 * rows
        + 0.2 * math.ceil(len(labels) / per_line)
        + 0.15 * len(caption.splitlines())
        + 0.2
    )
    figure = Figure(figsize=(3.5 * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(wspace=0.06, hspace=0.04)
    grid = figure.subplots(rows, columns, squeeze=False)
    drawn = {}
    for axes, task in zip(grid.flat, tasks, strict=False):
        here = [line for line in lines if line.curve[0].task == task]
        for line, ranks in zip(here, _ranks(here, axis), strict=True):
            drawn.setdefault(line.label, _curve(axes, line, axis, ranks))
        _dress(axes, here[0].curve[0], axis)
    for axes in list(grid.flat)[len(tasks) :]:
        axes.set_axis_off()
    legend = figure.legend(
        [drawn[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=min(per_line, len(labels)),
        frameon=False,
        title=caption,
        title_fontsize=7,
        handlelength=2.6,
    )
    legend.get_title().set_multialignment("center")
    return figure


def _ranks(lines: Sequence[Line], axis: str) -> list[list[int]]:
    """For each point of each curve of a panel, how many points of the curves before it lie in its place."""
    points = [
        [(getattr(r, axis), r.value) for r in line.curve if getattr(r, axis)] for line in lines
    ]
    near = [
        TOGETHER * (max(v) - min(v))
        for v in zip(*(p for line in points for p in line), strict=True)
    ]

    def covered(line: int, point: tuple[float, float]) -> int:
        before = [other for others in points[:line] for other in others]
        return sum(
            all(abs(a - b) <= n for a, b, n in zip(point, other, near, strict=True))
            for other in before
        )

    return [[covered(i, point) for point in line] for i, line in enumerate(points)]


def _curve(axes, line: Line, axis: str, ranks: Sequence[int]):
    """One curve in the order of K, with its intervals; returns what the legend shows.

    ranks: a point in whose place others are already becomes a ring around them.
    """
    points = [r for r in line.curve if getattr(r, axis)]
    x, y = [getattr(r, axis) for r in points], [r.value for r in points]
    below = [r.value - r.low if r.low is not None else 0 for r in points]
    above = [r.high - r.value if r.high is not None else 0 for r in points]
    bars = {"elinewidth": 0.8, "capsize": 2.2, "capthick": 0.8, "alpha": 0.55}
    axes.errorbar(x, y, yerr=[below, above], fmt="none", ecolor=line.look["color"], **bars)
    solid = {"linewidth": 1.1, "markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.6}
    plain = [i for i, rank in enumerate(ranks) if not rank]
    (drawn,) = axes.plot(x, y, markevery=plain, **solid, **line.look)
    above = {
        "linestyle": "none",
        "zorder": drawn.get_zorder() + 1,
    }  # a later curve's line does not cross a point
    axes.plot([x[i] for i in plain], [y[i] for i in plain], **solid | line.look | above)
    for at, rank in enumerate(ranks):
        if rank:
            ring = {
                "markersize": 5 + 4 * rank,
                "markerfacecolor": "none",
                "markeredgecolor": line.look["color"],
            }
            axes.plot(x[at], y[at], marker=line.look["marker"], markeredgewidth=1.1, **ring | above)
    return drawn


def _caption(lines: Sequence[Line], axis: str) -> str:
    runs = [run for line in lines for run in line.curve]
    steps, machines = sorted({round(run.k, 2) for run in runs}), {run.machine for run in runs}
    told = "Bars: 95 % intervals. Tokens per step K" + (
        " = " if len(steps) == 1 else " rise along each line: "
    )
    told += ", ".join(f"{k:g}" for k in steps) + "."
    by_task = [
        [line for line in lines if line.curve[0].task == task]
        for task in {run.task for run in runs}
    ]
    if any(rank for here in by_task for ranks in _ranks(here, axis) for rank in ranks):
        told += " Rings: curves that meet in a point."
    if any(run.algorithm != line.curve[0].algorithm for line in lines for run in line.curve):
        told += " Lines of adaptive algorithms join values of their option."
    if axis == "tok_s":
        told += f"\nDecoded on {machines.pop() if len(machines) == 1 else 'several machines: speeds do not compare'}."
    return told


def _dress(axes, run: Run, axis: str) -> None:
    metric = run.metric.partition(",")[0]
    axes.set_title(fill(run.task, 42))
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel(METRICS.get(metric, metric) + (" (%)" if run.accuracy else ""))
    axes.margins(x=0.1, y=0.1)
    if run.accuracy:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -4), min(high, 104))


def inline(svg: str, prefix: str) -> str:
    """An SVG file as part of an HTML page that holds several: ids of its own, at most as wide as the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    size = r'width="([\d.]+)pt" height="[\d.]+pt"'
    return re.sub(size, r'style="width:\1pt;max-width:100%"', svg, count=1)
