"""Figures of accuracy against speed, one panel per task, as PNG and SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from reporting.data import Result, curve_labels
from reporting.tables import panels

# Palette of Okabe and Ito, safe for colour-blind readers; without its yellow, too light on white
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
STYLE = Path(__file__).with_name("figure.mplstyle")


@dataclass(frozen=True)
class Line:
    """One curve with its label and its look (matplotlib's color, marker, linestyle)."""

    label: str
    curve: list[Result]
    look: dict[str, str]

    def points(self, axis: str) -> list[tuple[float, Result]]:
        """(speed, result) of the results that have a speed; axis: a key of AXES."""
        speeds = [getattr(result, axis) for result in self.curve]
        return [(x, result) for x, result in zip(speeds, self.curve, strict=True) if x]


@dataclass(frozen=True)
class Picture:
    """name: file name without its suffix. title: caption and alternative text."""

    name: str
    title: str
    svg: str


def draw(results: Sequence[Result], folder: Path) -> list[Picture]:
    """Write every figure to `folder`: per protocol, one against TPF and one against tok/s."""
    by_protocol: dict[str, list[list[Result]]] = {}
    for (protocol, _), curves in panels(results).items():
        by_protocol.setdefault(protocol, []).extend(curves)
    models = sorted({curve[0].model for curves in by_protocol.values() for curve in curves})
    pictures = []
    for protocol, curves in by_protocol.items():
        lines = _lines(curves, models)
        for axis, label in AXES.items():
            name = f"accuracy_{axis}_{protocol}"
            with _matplotlib():
                figure = make_figure(lines, axis)
                figure.savefig(folder / f"{name}.png", dpi=300, metadata={"Software": None})
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
            svg = (folder / f"{name}.svg").read_text(encoding="utf-8")
            title = f"Accuracy against {label.lower()}, protocol {protocol}"
            pictures.append(Picture(name, title, svg))
    return pictures


def _lines(curves: Sequence[list[Result]], models: Sequence[str]) -> list[Line]:
    """A model has one colour in every figure; its further curves differ in marker and dash."""
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
    import os

    os.environ["MPLBACKEND"] = "agg"  # a notebook's may be one that is not installed here
    import matplotlib

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it announces its font cache
    with matplotlib.rc_context(fname=STYLE):
        yield


def _by_task(lines: Sequence[Line]) -> dict[str, list[Line]]:
    tasks: dict[str, list[Line]] = {}
    for line in lines:
        tasks.setdefault(line.curve[0].task, []).append(line)
    return tasks


def make_figure(lines: Sequence[Line], axis: str):
    """A matplotlib figure with one panel per task and one legend; axis: a key of AXES.

    7 inches wide (two columns of a page), or 3.5 for a single panel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = _by_task(lines)
    n_columns = min(2, len(tasks))
    n_rows = math.ceil(len(tasks) / n_columns)
    labels = sorted({line.label for line in lines})
    per_row = n_columns * (2 if max(map(len, labels)) <= 26 else 1)
    text = "\n".join(fill(part, 55 * n_columns) for part in caption(lines, axis).splitlines())
    n_texts, n_legend = len(text.splitlines()), math.ceil(len(labels) / per_row)
    height = 2.5 * n_rows + 0.2 * n_legend + 0.15 * n_texts + 0.2
    figure = Figure(figsize=(3.5 * n_columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(wspace=0.06, hspace=0.04)
    grid = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    drawn = {}
    for axes, panel in zip(grid, tasks.values(), strict=False):
        for line, ranks in zip(panel, overlaps(panel, axis), strict=True):
            drawn.setdefault(line.label, _draw_curve(axes, line, axis, ranks))
        _label_axes(axes, panel[0].curve[0], axis)
    for axes in grid[len(tasks) :]:
        axes.set_axis_off()
    legend = figure.legend(
        [drawn[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=min(per_row, len(labels)),
        frameon=False,
        title=text,
        title_fontsize=7,
        handlelength=2.6,
    )
    legend.get_title().set_multialignment("center")
    return figure


def overlaps(lines: Sequence[Line], axis: str) -> list[list[int]]:
    """For each point of each line of a panel: how many points of earlier lines it covers."""
    points = [[(x, result.value) for x, result in line.points(axis)] for line in lines]
    near = [
        TOGETHER * (max(values) - min(values))
        for values in zip(*(p for line in points for p in line), strict=True)
    ]

    def covered(line: int, point: tuple[float, float]) -> int:
        return sum(
            all(abs(a - b) <= n for a, b, n in zip(point, other, near, strict=True))
            for earlier in points[:line]
            for other in earlier
        )

    return [[covered(i, point) for point in line] for i, line in enumerate(points)]


def _draw_curve(axes, line: Line, axis: str, ranks: Sequence[int]):
    """Draw one curve in the order of K, with intervals; return the artist for the legend.

    ranks: from overlaps(). A point that covers others becomes a ring around them.
    """
    points = line.points(axis)
    x, y = [x for x, _ in points], [r.value for _, r in points]
    below = [0 if r.low is None else r.value - r.low for _, r in points]
    above = [0 if r.high is None else r.high - r.value for _, r in points]
    bars = {"elinewidth": 0.8, "capsize": 2.2, "capthick": 0.8, "alpha": 0.55}
    axes.errorbar(x, y, yerr=[below, above], fmt="none", ecolor=line.look["color"], **bars)
    solid = {"linewidth": 1.1, "markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.6}
    plain = [i for i, rank in enumerate(ranks) if not rank]
    (drawn,) = axes.plot(x, y, markevery=plain, **solid, **line.look)
    # points are above every line, so that a later line does not cross them
    point = {**line.look, "linestyle": "none", "zorder": drawn.get_zorder() + 1}
    axes.plot([x[i] for i in plain], [y[i] for i in plain], **solid | point)
    ring = {"markerfacecolor": "none", "markeredgecolor": line.look["color"]}
    for i, rank in enumerate(ranks):
        if rank:
            size = {"markersize": 5 + 4 * rank, "markeredgewidth": 1.1}
            axes.plot(x[i], y[i], **point | ring | size)
    return drawn


def caption(lines: Sequence[Line], axis: str) -> str:
    """The text of a figure's legend: K, and how to read bars, rings and lines."""
    results = [result for line in lines for result in line.curve]
    ks = sorted({round(result.k, 2) for result in results})
    rise = "=" if len(ks) == 1 else "rise along each line:"
    text = f"Bars: 95 % intervals. Tokens per step K {rise} {', '.join(f'{k:g}' for k in ks)}."
    if any(any(ranks) for panel in _by_task(lines).values() for ranks in overlaps(panel, axis)):
        text += " Rings: curves that meet in a point."
    if any(result.members for result in results):
        text += " Points: means over seeds."
    if any(result.algorithm != line.curve[0].algorithm for line in lines for result in line.curve):
        text += " Lines of adaptive algorithms join values of their option."
    if axis == "tok_s":
        machines = {result.machine for result in results}
        several = "several machines: speeds are not comparable"
        text += f"\nDecoded on {machines.pop() if len(machines) == 1 else several}."
    return text


def _label_axes(axes, result: Result, axis: str) -> None:
    metric = result.metric.partition(",")[0]
    axes.set_title(fill(result.task, 42))
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel(METRICS.get(metric, metric) + (" (%)" if result.accuracy else ""))
    axes.margins(x=0.1, y=0.1)
    if result.accuracy:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -4), min(high, 104))


def inline(svg: str, prefix: str) -> str:
    """An SVG file for a page that holds several: ids get `prefix`; at most as wide as the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    size = r'width="([\d.]+)pt" height="[\d.]+pt"'
    return re.sub(size, r'style="width:\1pt;max-width:100%"', svg, count=1)
