"""reporting/plots.py: what a figure shows, how it fits a paper, and the files it is written to."""

import re
from dataclasses import replace
from itertools import product

import pytest
from crafted import craft, save

from reporting.data import curve_labels, curves, each_once, read_all
from reporting.plots import (
    COLOURS,
    PAGE,
    TOGETHER,
    batch_figure,
    caption,
    draw,
    legend_entries,
    make_figure,
    make_lines,
    make_panels,
    published_figure,
    side_by_side,
)
from utils import atomic_write_json

MANY = ("maskgit_plus", "entropy", "topk_margin", "origin", "leftright", "certainty", "threshold")
MANY += ("factor", "entropy_threshold", "eb_sampler", "klass", "credit")


def lines_in(folder):
    return make_lines(curves(read_all([folder])[0]))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Four models at K = 1 and 2 on two tasks."""
    folder = tmp_path_factory.mktemp("models")
    aliases = ("llada", "llada1.5", "dream", "diffucoder")
    for alias, task, k in product(aliases, ("gsm8k", "humaneval"), (1, 2)):
        save(folder, alias, task, k, n=12)
    return lines_in(folder)


@pytest.fixture(scope="module")
def algorithms(tmp_path_factory):
    """Two models with several algorithms on one task, two of them with two caches."""
    folder = tmp_path_factory.mktemp("algorithms")
    for name in MANY:
        save(folder, "dream", algorithm=name, n=12)
    for alias, cache in product(("dream", "llada"), ("none", "dual")):
        save(folder, alias, algorithm="threshold", options={"threshold": 0.7}, kv_cache=cache, n=12)
    return lines_in(folder)


def test_the_legend_is_in_the_figure_and_outside_the_panels(models, algorithms):
    """It was cut off left and right; a paper has columns of 3.3 and pages of 6.9 inches."""
    one_task = [line for line in models if line.task == "gsm8k"]
    for lines, width in ((models, 6.9), (one_task, 3.3), (algorithms, 6.9)):
        figure = make_figure(lines, "tpf")
        assert figure.get_figwidth() == width
        figure.draw_without_rendering()
        (legend,), renderer = figure.legends, figure.canvas.get_renderer()
        box = legend.get_window_extent(renderer)
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1
        assert all(box.y1 <= axes.get_tightbbox(renderer).y0 for axes in figure.axes)


def test_a_long_label_is_wrapped(tmp_path):
    for dtype in ("float32", "bfloat16"):
        options = {"chat_template": dtype == "float32", "system": "word " * 20, "dtype": dtype}
        save(tmp_path, "llada", n=5, checkpoint="/x/" + "long-name-" * 9, **options)
        save(tmp_path, "dream", n=5, overrides={"checkpoint": {}}, checkpoint="/x/" + "name-" * 30)
    figure = make_figure(lines_in(tmp_path), "tok_s")
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().width <= figure.bbox.width


def test_colour_is_the_model_line_the_family_and_marker_the_cache(models, algorithms):
    colours = {line.curve[0].model: line.look["color"] for line in models}
    names = ("diffucoder", "dream", "llada", "llada1.5")
    assert colours == dict(zip(names, COLOURS, strict=False))
    assert {line.look["linestyle"] for line in models} == {"-"}
    dream = {n: lines[0].look for n, lines in by_label(algorithms).items() if n.startswith("dream")}
    assert {look["color"] for look in dream.values()} == {COLOURS[0]}
    looks = {name.removeprefix("dream, "): look for name, look in dream.items()}
    for name, dash, marker in (
        ("entropy", "-", "o"),
        ("certainty", "-", "o"),
        ("threshold", "--", "o"),
        ("threshold, dual cache", "--", "D"),
        ("leftright", "-.", "o"),
    ):
        assert (looks[name]["linestyle"], looks[name]["marker"]) == (dash, marker), name


def by_label(lines):
    found = {}
    for line in lines:
        found.setdefault(line.label, []).append(line)
    return found


def test_one_model_has_a_colour_for_each_algorithm(tmp_path):
    """All algorithms of a model had its colour."""
    for name in ("entropy", "threshold", "factor"):
        save(tmp_path, "dream", algorithm=name, n=5)
    lines = lines_in(tmp_path)
    assert len({line.look["color"] for line in lines}) == 3
    labels = [label for _, label in legend_entries(lines, divided=False)]
    assert labels == ["entropy", "factor", "threshold"], "the model is named once"
    assert caption(lines, "tpf").startswith("dream. Bars: 95 % intervals.")


def test_more_than_eight_curves_are_small_multiples(models, algorithms):
    assert [title for title, _, _ in make_panels(models)] == ["gsm8k", "humaneval"]
    found = make_panels(algorithms)
    assert len(algorithms) == 15 and [title for title, _, _ in found] == [
        *sorted(("certainty", "entropy", "maskgit_plus", "origin", "topk_margin")),
        *sorted(("credit", "eb_sampler", "entropy_threshold", "factor", "klass", "threshold")),
        "leftright",
    ]
    for _, panel, others in found:
        assert len(panel) <= TOGETHER and len(panel) + len(others) == 15
    entries = [label for _, label in legend_entries(algorithms, divided=True)]
    assert entries == ["dream", "llada", "fixed K", "adaptive", "left to right"] + [
        "no cache",
        "dual cache",
    ]
    figure = make_figure(algorithms, "tpf")
    assert len(figure.axes) == 12 and figure.get_figwidth() == PAGE
    assert len({axes.get_xlim() + axes.get_ylim() for axes in figure.axes}) == 1


def test_curves_that_would_look_the_same_are_divided(tmp_path):
    """Two adaptive algorithms of one model, next to another model, have one colour and line."""
    for alias, name in product(("llada", "dream"), ("threshold", "factor")):
        save(tmp_path, alias, algorithm=name, n=5)
    titles = [title for title, _, _ in make_panels(lines_in(tmp_path))]
    assert titles == ["factor", "threshold"]


def test_labels_say_only_what_differs(tmp_path):
    """They had `block_length 8, temperature 0.0` in every entry."""
    save(tmp_path, "dream", algorithm="leftright", block_length=256)
    save(tmp_path, "dream", algorithm="apd", temperature=0.2, block_length=256)
    save(tmp_path, "dream", algorithm="apd", kv_cache="window", kv_window=8, block_length=256)
    save(tmp_path, "dream", algorithm="entropy", block_length=32)
    save(tmp_path, "dream", algorithm="entropy", block_length=64, tag="64")
    save(tmp_path, "llada", block_length=64)
    assert sorted(curve_labels(curves(read_all([tmp_path])[0]))) == [
        "dream, apd",
        "dream, apd, window cache",
        "dream, entropy, block_length 32",
        "dream, entropy, block_length 64",
        "dream, leftright",
        "llada",
    ]


@pytest.mark.parametrize(
    "values, gap, placed",
    [
        ([1, 1, 1], 0.2, [0.8, 1.0, 1.2]),
        ([2, 1], 0.5, [2.0, 1.0]),
        ([1.0, 1.1], 0.5, [0.8, 1.3]),
        ([5, 1, 1], 1, [5.0, 0.5, 1.5]),
        ([], 1, []),
    ],
)
def test_points_stand_side_by_side(values, gap, placed):
    """Intervals of equal speeds were drawn through each other."""
    assert side_by_side(values, gap) == pytest.approx(placed)


def test_intervals_at_one_k_do_not_cover_each_other(models):
    figure = make_figure([line for line in models if line.task == "gsm8k"], "k")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2"]
    points = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
    at_one = sorted(x[0] for x in points)
    assert len(at_one) == 4 and sum(at_one) == pytest.approx(0)
    assert min(b - a for a, b in zip(at_one, at_one[1:], strict=False)) > 0.05


def test_an_adaptive_algorithm_has_no_k(algorithms, tmp_path):
    drawn = {line.method for line in algorithms if line.points("k")}
    assert drawn == {"certainty", "entropy", "leftright", "maskgit_plus", "origin", "topk_margin"}
    text = "Not shown: adaptive algorithms, which have no K."
    assert text in caption(algorithms, "k") and text not in caption(algorithms, "tpf")
    # all at K = 1: nothing to draw against it
    names = [picture.name for picture in draw([r for r in algorithms[0].curve], tmp_path)]
    assert names == ["accuracy_tpf_uniform", "accuracy_tok_s_uniform"]


def test_a_wide_range_of_speeds_is_logarithmic(algorithms, models):
    object.__setattr__(algorithms[0].curve[0], "tpf", 30.0)
    assert make_figure(algorithms, "tpf").axes[0].get_xscale() == "log"
    assert make_figure(models, "tpf").axes[0].get_xscale() == "linear"


def test_ours_and_published_have_both_errors(tmp_path):
    """79.3 is published for LLaDA on GSM8K at K = 1, and 74.8 at K = 2."""
    for k in (1, 2):
        save(tmp_path, k=k, protocol="official", scores=[1.0] * 75 + [0.0] * 25, n=100)
    (axes,) = published_figure(read_all([tmp_path])[0], ["llada"]).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "llada gsm8k, K = 1",
        "llada gsm8k, K = 2",
    ]
    values = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1]
    assert values == pytest.approx([75, 79.3, 75, 74.8])
    bars = [tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert bars[0] == pytest.approx((65.7, 82.5), abs=0.1)  # Wilson: 75 of 100
    assert bars[1] == pytest.approx((70.0, 85.8), abs=0.1)  # 79 of 100


def test_tokens_per_second_over_samples_in_flight(tmp_path):
    """The batch size is not in the id: of such results the report kept the newest alone."""
    for size, speed in ((1, 20.0), (4, 60.0), (8, 90.0)):
        result, _ = craft(n=5)
        result["meta"]["samples_made"][0]["batch_size"] = size
        result["meta"]["started"] = f"2026-01-0{size}"
        result["profile"]["tokens_per_second"] = speed
        atomic_write_json(tmp_path / f"b{size}.json", result)
    results, skipped = read_all([tmp_path])
    assert [r.path.name for r in results] == ["b8.json"] and len(skipped) == 2
    assert results[0].batches == {1: 20.0, 4: 60.0, 8: 90.0}
    (axes,) = batch_figure(make_lines(curves(results))).axes
    (line,) = axes.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 4, 8], [20.0, 60.0, 90.0])
    names = [picture.name for picture in draw(results, tmp_path)]
    assert "tok_s_batch_uniform" in names


def test_the_text_of_an_svg_is_text(tmp_path, models):
    gsm8k = [r for line in models if line.task == "gsm8k" for r in line.curve]
    picture = draw(gsm8k, tmp_path)[0]
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", picture.svg)
    assert {"llada1.5", "Tokens per step K", "Exact match (%)", "gsm8k"} <= {*texts}
    assert (tmp_path / f"{picture.name}.pdf").read_bytes()[:5] == b"%PDF-"
    assert (tmp_path / f"{picture.name}.png").read_bytes()[:4] == b"\x89PNG"


def test_options_have_curves_of_their_own_over_samples_in_flight(tmp_path):
    for value, size in product((0.9, 0.7), (1, 4)):
        result, _ = craft(n=5, algorithm="threshold", options={"threshold": value})
        result["meta"]["samples_made"][0]["batch_size"] = size
        result["meta"]["started"] = f"2026-01-0{size}"
        atomic_write_json(tmp_path / f"{value}_{size}.json", result)
    figure = batch_figure(lines_in(tmp_path))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["llada, threshold 0.7", "llada, threshold 0.9"]


def test_timed_batches_are_one_point_of_accuracy_and_one_curve_of_speed(tmp_path):
    for size in (4, 1, 16):
        save(tmp_path, n=5, timed_batch=size)
    save(tmp_path, n=5)
    results = read_all([tmp_path])[0]
    timed = [
        replace(r, batches={n: 9.0 * n}) for r in results if (n := r.config.get("timed_batch"))
    ]
    (one,) = each_once(timed)
    assert one.config["timed_batch"] == 1 and one.batches == {1: 9.0, 4: 36.0, 16: 144.0}
    assert "timed_batch" not in one.settings and len(each_once(results)) == 1
    names = {picture.name for picture in draw(timed, tmp_path)}
    assert names == {"accuracy_tpf_uniform", "accuracy_tok_s_uniform", "tok_s_batch_uniform"}
