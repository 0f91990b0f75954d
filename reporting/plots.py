"""Figures of accuracy against speed, for a paper: PNG, PDF, and SVG whose text is text.

Colour: the model, or the algorithm if there is one model. Line: the family of the algorithm.
Marker: the KV cache. Filling of the marker: other settings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill
from typing import Any

from decoding.algorithms import ALGORITHMS
from decoding.kv_cache import CACHES
from experiment.statistics import wilson
from reporting.data import Result, curve_parts, each_once, pooled
from reporting.paper import setting_of
from reporting.tables import panels

# Palette of Okabe and Ito, safe for colour-blind readers; without its yellow, too light on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = dict(zip(CACHES, ("o", "s", "D", "^"), strict=False))
DASHES = {"fixed K": "-", "adaptive": "--", "left to right": "-.", "of a plugin": ":"}
FILLS = ("full", "none", "bottom", "left", "top", "right")
GREY = "#555555"
METRICS = {
    "exact_match": "Exact match",
    "pass@1": "pass@1",
    "bleu_acc": "BLEU accuracy",
    "acc": "Accuracy",
}
AXES = {"k": "Tokens per step K", "tpf": "Tokens per forward pass", "tok_s": "Tokens per second"}
STYLE = Path(__file__).with_name("figure.mplstyle")
COLUMN, PAGE = 3.3, 6.9  # inches: one column and both columns of a paper
TOGETHER = 8  # curves that a panel shows at most, if they can be divided
MOST_PANELS = 24  # of one figure
GAPS = {"k": 5.5, "tpf": 3.0, "tok_s": 3.0}  # points from one interval to the next that it covers
WIDE = 6  # an axis whose ends differ by a larger factor is logarithmic


@dataclass(frozen=True)
class Line:
    """One curve. parts: from curve_parts(). look: matplotlib's names of its style."""

    parts: Mapping[str, str]
    curve: Sequence[Result]
    look: dict[str, str] = field(default_factory=dict)

    @property
    def task(self) -> str:
        return self.curve[0].task

    @property
    def label(self) -> str:
        return ", ".join(self.parts.values())

    @property
    def method(self) -> str:
        """The name of the algorithm."""
        return str(self.curve[0].config.get("algorithm"))

    @property
    def family(self) -> str:
        """A key of DASHES."""
        rule = ALGORITHMS.get(self.method)
        if rule is None:
            return "of a plugin"
        if rule.left_to_right:
            return "left to right"
        return "adaptive" if rule.schedule == "adaptive" else "fixed K"

    @property
    def cache(self) -> str:
        return self.curve[0].config.get("kv_cache", "none")

    @property
    def rest(self) -> str:
        """The settings that no colour, line or marker shows."""
        shown = ("model", "algorithm", "kv_cache")
        return ", ".join(text for name, text in self.parts.items() if name not in shown)

    def points(self, axis: str) -> list[tuple[float, Result]]:
        """(speed, result) of the results that have a speed; axis: a key of AXES.

        An adaptive algorithm has no K: it has none itself, or several options at one K.
        """
        rule = ALGORITHMS.get(self.method)
        ks = [result.k for result in self.curve]
        if axis == "k" and ((rule and rule.schedule == "adaptive") or len({*ks}) < len(ks)):
            return []
        speeds = [getattr(result, axis) for result in self.curve]
        return [(round(x, 2) if axis == "k" else x, r) for x, r in zip(speeds, self.curve) if x]


@dataclass(frozen=True)
class Picture:
    """name: file name without its suffix. title: caption and alternative text.

    part: whether it shows one of the tasks of another picture.
    """

    name: str
    title: str
    svg: str
    part: bool = False


def draw(results: Sequence[Result], folder: Path) -> list[Picture]:
    """Write every figure to `folder`.

    Per protocol: accuracy against K, tokens per forward pass and tokens per second, of all tasks
    and of each; our scores and the published ones; tokens per second over the batch size.
    """
    results = each_once(results)
    by_protocol: dict[str, list[list[Result]]] = {}
    for (protocol, _), curves in panels(results).items():
        by_protocol.setdefault(protocol, []).extend(curves)
    models = sorted({r.model for r in results if r.tpf or r.published})
    pictures = []
    with _matplotlib():
        for protocol, curves in by_protocol.items():
            lines = make_lines(curves, models)
            for axis, label in AXES.items():
                title = f"Accuracy against {label[0].lower()}{label[1:]}, protocol {protocol}"
                pictures += _of_tasks(lines, axis, folder, f"accuracy_{axis}_{protocol}", title)
            if any(len(result.batches) > 1 for line in lines for result in line.curve):
                figure = batch_figure(lines)
                title = f"Tokens per second over samples in flight, protocol {protocol}"
                pictures.append(_save(figure, folder, f"tok_s_batch_{protocol}", title))
        cited = [r for r in pooled(results) if r.published]
        for protocol, own in _by(cited, lambda r: r.config["protocol"]).items():
            title = f"Our scores and the published ones, protocol {protocol}"
            figure = published_figure(own, models)
            pictures.append(_save(figure, folder, f"published_{protocol}", title))
    return pictures


def _of_tasks(
    lines: Sequence[Line], axis: str, folder: Path, name: str, title: str
) -> list[Picture]:
    """One figure of all tasks, if it is not too large, and one of each if there are several."""
    drawn = [line for line in lines if line.points(axis)]
    if axis == "k" and len({k for line in drawn for k, _ in line.points("k")}) < 2:
        return []
    tasks = _by(drawn, lambda line: line.task)
    pictures = []
    if len(tasks) == 1 or len(make_panels(drawn)) <= MOST_PANELS:
        pictures.append(_save(make_figure(lines, axis), folder, name, title))
    for task in tasks if len(tasks) > 1 else ():
        slug = re.sub(r"[^A-Za-z0-9.]+", "_", task).strip("_")
        figure = make_figure([line for line in lines if line.task == task], axis)
        pictures.append(_save(figure, folder, f"{name}_{slug}", f"{title}, {task}", True))
    return pictures


def _save(figure, folder: Path, name: str, title: str, part: bool = False) -> Picture:
    """Write PNG, SVG and PDF. A canvas draws once, where savefig would draw twice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")  # the files have one layout, which is computed once
    dates = {"CreationDate": None, "Creator": None, "Producer": None}
    FigureCanvasPdf(figure).print_pdf(folder / f"{name}.pdf", metadata=dates)
    svg = folder / f"{name}.svg"
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
    figure.set_dpi(300)
    FigureCanvasAgg(figure).print_png(folder / f"{name}.png", metadata={"Software": None})
    return Picture(name, title, svg.read_text(encoding="utf-8"), part)


@contextmanager
def _matplotlib():
    import logging
    import os

    os.environ["MPLBACKEND"] = "agg"  # a notebook's may be one that is not installed here
    import matplotlib

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it announces its font cache
    with matplotlib.rc_context(fname=STYLE):
        yield


def _by(items: Iterable, key) -> dict[Hashable, list]:
    groups: dict[Hashable, list] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


# ---------------------------------------------------------------- looks and panels


def make_lines(curves: Sequence[Sequence[Result]], models: Sequence[str] = ()) -> list[Line]:
    """The curves of one protocol with their looks.

    models: of all figures, so that a model has one colour in all of them.
    """
    lines = [Line(p, c) for p, c in zip(curve_parts(curves), curves, strict=True)]
    models = models or sorted({line.curve[0].model for line in lines})
    methods, rests = ({getattr(line, n) for line in lines} for n in ("method", "rest"))
    hues = models if len(models) > 1 else sorted(methods)
    fills = sorted(rests)  # "" comes first
    for line in lines:
        hue = line.curve[0].model if len(models) > 1 else line.method
        line.look.update(
            color=COLOURS[hues.index(hue) % len(COLOURS)],
            linestyle=DASHES[line.family],
            marker=MARKERS.get(line.cache, "v"),
            fillstyle=FILLS[fills.index(line.rest) % len(FILLS)],
        )
    return lines


def make_panels(lines: Sequence[Line]) -> list[tuple[str, list[Line], list[Line]]]:
    """(title, its lines, the other lines of its task) of each panel.

    One panel for each task. A task with more than TOGETHER curves, or with two that look the same,
    is divided by algorithm, cache or model: small multiples.
    """
    found = []
    tasks = _by(lines, lambda line: line.task)
    for task, own in tasks.items():
        looks = {tuple(line.look.items()) for line in own}
        divided = {"": own}
        if len(own) > TOGETHER or len(looks) < len(own):
            ways = [
                _by(own, key)
                for key in (
                    lambda line: line.method,
                    lambda line: "no cache" if line.cache == "none" else f"{line.cache} cache",
                    lambda line: line.curve[0].model,
                )
            ]
            # a way whose panels can be read, with few panels; else the one with the least in each
            most = [max(TOGETHER, *(_crowd(panel) for panel in way.values())) for way in ways]
            divided = min(zip(most, map(len, ways), range(3), ways))[3]
        order = list(DASHES)
        divided = sorted(divided.items(), key=lambda p: (order.index(p[1][0].family), p[0]))
        for name, panel in divided:
            title = ", ".join(filter(None, [task if len(tasks) > 1 else "", name])) or task
            found.append((title, panel, [line for line in own if line not in panel]))
    return found


def _crowd(panel: Sequence[Line]) -> int:
    """The number of curves, and more for those that look the same."""
    return len(panel) + 10 * (len(panel) - len({tuple(line.look.items()) for line in panel}))


def legend_entries(lines: Sequence[Line], divided: bool) -> list[tuple[dict[str, str], str]]:
    """(look, label) of each entry: one for each curve, or one for each colour, line and marker.

    Labels leave out the model if there is one model, see caption().
    """
    one_model = len({line.curve[0].model for line in lines}) == 1
    if not divided:
        left_out = {"model"} if one_model and len({line.label for line in lines}) > 1 else set()
        named = {}
        for line in lines:
            texts = [text for name, text in line.parts.items() if name not in left_out]
            named.setdefault(", ".join(texts) or line.method, line.look)
        return [(look, label) for label, look in named.items()]
    plain = {"color": GREY, "linestyle": "none", "marker": "o", "fillstyle": "full"}
    found = []
    if not one_model:
        for line in sorted(lines, key=lambda line: line.curve[0].model):
            look = {"color": line.look["color"], "linestyle": "-"}
            found.append((look, line.curve[0].model))
    for name in DASHES:
        found += [
            ({"color": GREY, "linestyle": DASHES[name]}, name)
            for line in lines
            if line.family == name
        ]
    for name, marker in MARKERS.items():
        text = "no cache" if name == "none" else f"{name} cache"
        found += [(plain | {"marker": marker}, text) for line in lines if line.cache == name]
    for line in sorted(lines, key=lambda line: line.rest):
        if line.rest:
            found.append((plain | {"fillstyle": line.look["fillstyle"]}, line.rest))
    return [(look, label) for label, look in {label: look for look, label in found}.items()]


# ---------------------------------------------------------------- figures


def make_figure(lines: Sequence[Line], axis: str):
    """A matplotlib figure with the panels of make_panels(); axis: a key of AXES.

    COLUMN inches wide for a single panel, else PAGE.
    """
    every, lines = lines, [line for line in lines if line.points(axis)]
    shown = make_panels(lines)
    divided = any(others for _, _, others in shown)
    figure, grid = _figure(len(shown), 3 if divided and len(shown) > 4 else 2)
    ks = sorted({k for line in lines for k, _ in line.points("k")})
    speeds = [x for line in lines for x, _ in line.points(axis)]
    log = axis != "k" and max(speeds) > WIDE * min(speeds)
    limits: dict[str, list[tuple[float, float]]] = {}
    for axes, (title, panel, others) in zip(grid, shown, strict=True):
        width = 72 * figure.get_figwidth() / _n_columns(grid) - 40
        placed = _placed([*panel, *others], axis, len(panel), width, ks, log)
        for line, x in zip(others, placed[len(panel) :], strict=True):
            y = [result.value for _, result in line.points(axis)]
            axes.plot(x, y, color="#cccccc", linewidth=0.7, zorder=1)
        for line, x in zip(panel, placed, strict=False):
            _draw_curve(axes, x, [result for _, result in line.points(axis)], line.look)
        if log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        result = panel[0].curve[0]
        metric = result.metric.partition(",")[0]
        unit = " (%)" if result.accuracy else ""
        axes.set_title(fill(title, 42))
        axes.set_ylabel(METRICS.get(metric, metric) + unit)
        axes.margins(x=0.08, y=0.08)
        if axis == "k":
            axes.set_xticks(range(len(ks)), [f"{k:g}" for k in ks])
            axes.set_xlim(-0.5, len(ks) - 0.5)
        if result.accuracy:
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -4), min(high, 104))
        limits.setdefault(result.task, []).append((*axes.get_xlim(), *axes.get_ylim()))
    for axes, (_, panel, _) in zip(grid, shown, strict=True):  # panels of a task are comparable
        left, right, low, high = zip(*limits[panel[0].task], strict=True)
        axes.set(xlim=(min(left), max(right)), ylim=(min(low), max(high)))
    _outer_labels(grid, AXES[axis])
    _legend(figure, grid, legend_entries(lines, divided), caption(every, axis))
    return figure


def _figure(n: int, most_columns: int):
    """(an empty figure, its n axes)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_columns = min(most_columns, n)
    n_rows = math.ceil(n / n_columns)
    each = 1.5 if n_columns == 3 else 2.0
    size = (COLUMN if n == 1 else PAGE, each * n_rows)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(wspace=0.05, hspace=0.05)
    grid = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    for axes in grid[n:]:
        axes.remove()
    return figure, grid[:n]


def _n_columns(grid: Sequence) -> int:
    return min(len(grid), grid[0].get_gridspec().ncols)


def _outer_labels(grid: Sequence, label: str) -> None:
    """The x axis is named below the last panel of each column, an equal y axis once in a row."""
    n = _n_columns(grid)
    for i, axes in enumerate(grid):
        if i + n >= len(grid):
            axes.set_xlabel(label)
        if i % n and grid[i - 1].get_ylabel() == axes.get_ylabel():
            axes.yaxis.label.set_visible(False)


def _legend(figure, grid: Sequence, entries: Sequence[tuple[dict, str]], text: str) -> None:
    """A legend below the panels, in as many columns as fit, with the caption as its title."""
    from matplotlib.lines import Line2D

    inches = figure.get_figwidth()
    handles = [Line2D([], [], markersize=4, **_hollow(look)) for look, _ in entries]
    ways = [(n, 14) for n in range(min(len(entries), 6), 0, -1)] + [(1, 10), (1, 7)]
    for n_columns, letters in ways:  # letters of an inch
        legend = figure.legend(
            handles,
            [fill(label, int(letters * inches)) for _, label in entries],
            loc="outside lower center",
            ncols=n_columns,
            frameon=False,
            title="\n".join(fill(part, int(18 * inches)) for part in text.splitlines()),
            title_fontsize=6,
            handlelength=2.6,
            columnspacing=1.2,
        )
        legend.get_title().set_multialignment("center")
        extent = legend.get_window_extent(figure.canvas.get_renderer())
        if extent.width <= figure.bbox.width or (n_columns, letters) == ways[-1]:
            break
        legend.remove()
    # the panels keep their height whatever the legend takes
    figure.set_figheight(figure.get_figheight() + extent.height / figure.dpi + 0.1)


def _hollow(look: Mapping[str, str]) -> dict[str, Any]:
    """matplotlib's arguments for a look; without fill a marker is white, above the lines."""
    style = {"markerfacecoloralt": "white", "linewidth": 1.1, "markeredgewidth": 0.9, **look}
    if look.get("fillstyle") == "none":
        style |= {"fillstyle": "full", "markerfacecolor": "white"}
    return style


def _placed(
    lines: Sequence[Line], axis: str, n: int, width: float, ks: Sequence[float], log: bool
) -> list[list[float]]:
    """Where each point of each line of a task stands on the x axis.

    K is spaced evenly. Points of the first n lines that would cover each other in a panel of
    `width` points stand side by side.
    """
    speeds = [[x for x, _ in line.points(axis)] for line in lines]
    if axis == "k":
        speeds = [[float(ks.index(k)) for k in line] for line in speeds]
    elif log:
        speeds = [[math.log2(x) for x in line] for line in speeds]
    every = [x for line in speeds for x in line]
    extent = float(len(ks)) if axis == "k" else 1.16 * (max(every) - min(every)) or 1.0
    gap = GAPS[axis] * extent / width
    if axis == "k":
        gap = min(gap, 0.7 / n)
    points = [
        (i, j, result)
        for i, line in enumerate(lines[:n])
        for j, (_, result) in enumerate(line.points(axis))
    ]
    for level in _levels(points, 1.0):
        # many points would move far: among them the ends of intervals may cross
        for part in [level] if len(level) <= TOGETHER + 4 else _levels(level, 0.5):
            apart = side_by_side([speeds[i][j] for i, j, _ in part], gap)
            for (i, j, _), x in zip(part, apart, strict=True):
                speeds[i][j] = x
    return [[2**x if log else x for x in line] for line in speeds]


def _levels(
    points: Sequence[tuple[int, int, Result]], share: float
) -> list[list[tuple[int, int, Result]]]:
    """The points in groups, each in the given order, whose intervals do not overlap.

    share: of each half of an interval that counts.
    """

    def end(result: Result, bound: float | None) -> float:
        return result.value + share * ((result.value if bound is None else bound) - result.value)

    levels: list[list[tuple[int, int, Result]]] = []
    top = -math.inf
    for point in sorted(points, key=lambda point: end(point[2], point[2].low)):
        if end(point[2], point[2].low) > top:
            levels.append([])
        levels[-1].append(point)
        top = max(top, end(point[2], point[2].high))
    return [sorted(level, key=lambda point: point[:2]) for level in levels]


def side_by_side(values: Sequence[float], gap: float) -> list[float]:
    """The nearest values, by least squares, that are at least `gap` apart, in the same order."""
    import numpy as np
    from scipy.optimize import isotonic_regression

    values = np.asarray(values, dtype=float)
    order, steps = np.argsort(values, kind="stable"), gap * np.arange(len(values))
    placed = np.empty(len(values))
    placed[order] = isotonic_regression(values[order] - steps).x + steps
    return placed.tolist()


def _draw_curve(axes, x: Sequence[float], results: Sequence[Result], look: dict[str, str]) -> None:
    """One curve in the order of K, with intervals."""
    y = [result.value for result in results]
    below = [0 if r.low is None else r.value - r.low for r in results]
    above = [0 if r.high is None else r.high - r.value for r in results]
    axes.errorbar(
        x, y, yerr=[below, above], fmt="none", ecolor=look["color"], elinewidth=0.7, zorder=2
    )
    axes.plot(x, y, markersize=4, zorder=3, **_hollow(look))


def caption(lines: Sequence[Line], axis: str) -> str:
    """The text of a figure's legend: what bars, points and lines are."""
    left_out = {line.method for line in lines if not line.points(axis)}
    lines = [line for line in lines if line.points(axis)]
    results = [result for line in lines for result in line.curve]
    models = {result.model for result in results}
    ks = sorted({round(result.k, 2) for result in results})
    text = "Bars: 95 % intervals."
    if axis != "k":
        rise = "=" if len(ks) == 1 else "rises along each line:"
        text += f" K {rise} {', '.join(f'{k:g}' for k in ks)}."
        if any(len({r.k for r in line.curve}) < len(line.curve) for line in lines):
            text += " Lines of adaptive algorithms join values of their option."
        text += " Points that would cover each other stand side by side."
    if left_out:
        text += " Not shown: adaptive algorithms, which have no K."
    if any(result.members for result in results):
        text += " Points: means over seeds."
    if len(models) == 1:
        text = f"{models.pop()}. {text}"
    if axis == "tok_s":
        machines = {result.machine for result in results}
        several = "several machines: speeds are not comparable"
        text += f"\nDecoded on {machines.pop() if len(machines) == 1 else several}."
    return text


def published_figure(results: Sequence[Result], models: Sequence[str]):
    """Our scores and the published ones, one line for each result, with both 95 % intervals.

    A published score comes without its answers: its interval is Wilson's at our number of
    documents.
    """
    figure, (axes,) = _figure(1, 1)
    figure.set_figheight(0.5 + 0.3 * len(results))
    settings = [(r.model, r.task, r.k) for r in results]
    several, ks = len({*settings}) < len(settings), {r.k for r in results}
    names = []
    for i, result in enumerate(results):
        score, n = result.published.score, len(result.scores)
        bounds = [100 * bound for bound in wilson(round(score / 100 * n), n)]
        ours = result.published.ours
        colour = COLOURS[models.index(result.model) % len(COLOURS)]
        for y, (value, low, high), look in (
            (i - 0.13, ours, {"color": colour, "marker": "o"}),
            (i + 0.13, (score, *bounds), {"color": GREY, "marker": "D", "fillstyle": "none"}),
        ):
            if low is not None:
                axes.plot([low, high], [y, y], color=look["color"], linewidth=0.8)
            axes.plot([value], [y], linestyle="none", markersize=4, **_hollow(look))
        parts = [f"K = {result.k_text}"] * (len(ks) > 1) + [result.algorithm] * several
        names.append(", ".join([f"{result.model} {result.task}", *parts]))
    axes.set_yticks(range(len(names)), [fill(name, 28) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("Score (%)")
    axes.margins(x=0.05)
    entries = [
        ({"color": GREY, "marker": "o", "linestyle": "none"}, "ours"),
        ({"color": GREY, "marker": "D", "linestyle": "none", "fillstyle": "none"}, "published"),
    ]
    text = "Bars: 95 % intervals; of a published score Wilson's at our number of documents."
    _legend(figure, [axes], entries, text)
    return figure


def batch_figure(lines: Sequence[Line]):
    """Tokens per second over the samples in flight, one panel for each task."""
    shown = {
        task: [
            (line, setting_of(r, line.curve), r)
            for line in own
            for r in line.curve
            if len(r.batches) > 1
        ]
        for task, own in _by(lines, lambda line: line.task).items()
    }
    shown = {task: pairs for task, pairs in shown.items() if pairs}
    figure, grid = _figure(len(shown), 2)
    every = [pair for pairs in shown.values() for pair in pairs]
    labels = sorted({line.label for line, _, _ in every})
    settings = sorted({setting for _, setting, _ in every})
    sizes = sorted({n for _, _, result in every for n in result.batches})
    entries: dict[str, dict[str, str]] = {}
    for axes, (task, pairs) in zip(grid, shown.items(), strict=True):
        for line, setting, result in pairs:
            nth, dashes = labels.index(line.label), list(DASHES.values())
            look = {
                "color": COLOURS[nth % len(COLOURS)],
                "marker": list(MARKERS.values())[nth // len(COLOURS) % len(MARKERS)],
                "linestyle": dashes[settings.index(setting) % len(dashes)],
            }
            entries[line.label + f", {setting}" * (len(settings) > 1)] = look
            batches = sorted(result.batches)
            speeds = [result.batches[n] for n in batches]
            axes.plot(batches, speeds, markersize=4, **_hollow(look))
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, map(str, sizes))
        axes.set_ylim(bottom=0)
        axes.set_title(fill(task, 42))
        axes.set_ylabel("Tokens per second")
    _outer_labels(grid, "Samples in flight")
    text = f"Decoded on {'; '.join(sorted({result.machine for _, _, result in every}))}."
    _legend(figure, grid, [(look, label) for label, look in entries.items()], text)
    return figure


def inline(svg: str, prefix: str) -> str:
    """An SVG file for a page that holds several: ids get `prefix`; at most as wide as the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    size = r'width="([\d.]+)pt" height="[\d.]+pt"'
    return re.sub(size, r'style="width:\1pt;max-width:100%"', svg, count=1)
