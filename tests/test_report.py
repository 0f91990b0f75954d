"""scripts/report.py: tables, files that are left out, the command, and the page in a browser."""

import csv
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest
from crafted import craft, save
from mini import ROOT

from experiment import config
from experiment.result import VOLATILE
from reporting.data import curve_labels, curves, read_all, remarks
from reporting.stats import aup_interval, compare_results
from reporting.tables import (
    aup_table,
    comparison_table,
    interval,
    result_table,
    to_csv,
    to_markdown,
    to_text,
)
from scripts import report
from suite.matrix import Planned
from utils import UsageError, atomic_write_json, sha256

# ---------------------------------------------------------------- tables


def test_only_the_documents_that_both_have_are_compared(tmp_path):
    save(tmp_path, k=1, scores=[1.0] * 10, n=10)
    save(tmp_path, k=2, scores=[0.0] * 6, n=6, limit=6)
    save(tmp_path, k=2, task="humaneval", n=10)
    save(tmp_path, k=3, n=10, data="mini")
    by_task = {result.task: result for result in read_all([tmp_path])[0]}
    whole, first = by_task["gsm8k"], by_task["gsm8k (first 6)"]
    # the data have one hash; the number of documents may differ
    assert compare_results(whole, first).n == 6 and compare_results(whole, first).p == 0.03125
    with pytest.raises(ValueError, match="not on the same documents"):
        compare_results(whole, by_task["humaneval"])


@pytest.mark.parametrize("version", ["SCORING_VERSION", "ENGINE_VERSION"])
def test_results_of_another_version_are_named(tmp_path, monkeypatch, version):
    """After an update a suite may be half old: its old results look like the new ones."""
    with monkeypatch.context() as before:
        before.setattr(config, version, getattr(config, version) - 1)
        old = save(tmp_path, k=1, seed=1, repeats=2, temperature=0.5)
    save(tmp_path, k=2, strict_exec=True)
    save(tmp_path, k=3, predictions="a file")
    results, skipped = read_all([tmp_path])
    found = remarks(results, skipped)
    ((line,),) = [lines for title, lines in found.items() if "another version" in title]
    assert line.startswith(f"{old.name}: ")
    assert ("scores its kept" in line) is (version == "SCORING_VERSION")


@pytest.mark.parametrize(
    "arguments, shown",
    [
        ((74.75, 72.35, 77.02), "74.8 [72.3, 77.0]"),
        ((0.0, 0.0, 16.11), "0.0 [0.0, 16.1]"),
        ((50.0, None, None), "50.0"),
        ((-3.2, -8.04, 1.6, 1, True), "-3.2 [-8.0, +1.6]"),
        ((0.5, 0.25, 0.75, 3), "0.500 [0.250, 0.750]"),
        ((-0.0, -0.04, 0.1, 1, True), "0.0 [0.0, +0.1]"),
    ],
)
def test_interval_display(arguments, shown):
    assert interval(*arguments) == shown


def test_results_show_what_was_measured(tmp_path):
    save(tmp_path, k=2, scores=[1.0] * 30 + [0.0] * 10)
    table = result_table(read_all([tmp_path])[0])
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["accuracy % [95 %]"] == "75.0 [59.8, 85.8]" and row["K"] == "2" and row["n"] == "40"
    result, _ = craft(k=2, scores=[1.0] * 30 + [0.0] * 10)
    assert row["TPF"] == f"{result['profile']['tpf']:.2f}"
    assert row["tok/s"] == f"{result['profile']['tokens_per_second']:.1f}"
    (record,) = csv.DictReader(to_csv(table).splitlines())
    assert (
        float(record["value"]) == 0.75
        and record["published"] == ""
        and record["machine"] == "NVIDIA H200"
    )
    assert (
        "| gsm8k | llada | uniform | low_confidence | 2 | 75.0 [59.8, 85.8] | 40 |"
        in to_markdown(table)
    )
    assert "75.0 [59.8, 85.8]" in to_text(table) and "NVIDIA H200" in to_text(table)


def test_the_strict_re_check_has_a_column_only_if_a_result_has_it(tmp_path):
    save(tmp_path, k=1, task="humaneval", scores=[1.0] * 30 + [0.0] * 10)
    table = result_table(read_all([tmp_path])[0])
    for text in (to_text(table), to_markdown(table), to_csv(table)):
        assert "strict" not in text
    result, _ = craft(k=2, task="humaneval", scores=[1.0] * 30 + [0.0] * 10)
    strict = {"value": 0.5, "stderr": 0.08, "ci95": [0.35, 0.65], "n": 40}
    metrics = result["metrics"] | {"pass@1_strict,create_test": strict}
    atomic_write_json(tmp_path / "strict.json", _sign(result, metrics=metrics))
    table = result_table(read_all([tmp_path])[0])
    column = table.columns.index("strict % [95 %]")
    assert [row[column - 1 : column + 1] for row in table.rows] == [
        ("75.0 [59.8, 85.8]", "-"),
        ("75.0 [59.8, 85.8]", "50.0 [35.0, 65.0]"),
    ]
    records = list(csv.DictReader(to_csv(table).splitlines()))
    assert [r["strict"] for r in records] == ["", "0.5"]
    assert [r["strict_ci95_high"] for r in records] == ["", "0.65"]


def test_an_empty_table_still_has_a_csv_header():
    assert to_csv(comparison_table([])).startswith("a,b,metric,n,difference,")


def test_a_published_score_is_shown_for_its_own_protocol_only(tmp_path):
    """79.3 is published for LLaDA on GSM8K."""
    for name, options in {
        "within": {"scores": [1.0] * 80 + [0.0] * 20},
        "beyond": {"scores": [1.0] * 60 + [0.0] * 40},
        "uniform": {"protocol": "uniform"},
        "mini": {"data": "mini"},
        "limit": {"limit": 100},
        "override": {"overrides": {"temperature": {}}},
    }.items():
        save(tmp_path / name, n=100, **({"protocol": "official"} | options))
    save(tmp_path / "none", task="truthfulqa", protocol="official")
    shown, notes = {}, {}
    for name in ("within", "beyond", "uniform", "mini", "limit", "override", "none"):
        table = result_table(read_all([tmp_path / name])[0])
        shown[name] = table.rows[0][-2:]
        notes[name] = [note for note in table.notes if note.startswith("No published score")]
    assert shown == {
        "within": ("79.3", "+0.7, within noise"),
        "beyond": ("79.3", "-19.3, beyond noise"),
        "uniform": ("-", "-"),
        "mini": ("-", "-"),
        "limit": ("-", "-"),
        "override": ("-", "-"),
        "none": ("-", "-"),
    }
    assert notes["none"] == [
        "No published score for llada truthfulqa, low_confidence at K = 1: "
        "no score is published for this protocol, model and task."
    ]
    assert [bool(notes[name]) for name in ("within", "uniform", "mini", "limit", "override")] == [
        False,
        False,
        True,
        True,
        True,
    ]


def test_each_number_of_tokens_per_step_has_its_own_published_score(tmp_path):
    """Fast-dLLM publishes LLaDA's gsm8k at 1, 2, 4 and 8 tokens per step; nobody does at 3."""
    for k in (1, 2, 3, 4):
        save(tmp_path, k=k, protocol="official", data="original")
    save(
        tmp_path,
        protocol="official",
        data="original",
        algorithm="leftright",
        overrides={"algorithm": {}},
    )
    table = result_table(read_all([tmp_path])[0])
    assert [row[table.columns.index("published")] for row in table.rows] == [
        "-",
        "79.3",
        "74.8",
        "-",
        "66.5",
    ]
    bare = [note for note in table.notes if note.startswith("No published score for")]
    assert bare == [
        "No published score for llada gsm8k, leftright at K = 1: not compared with the published "
        "score: the run differs from the protocol in algorithm.",
        "No published score for llada gsm8k, low_confidence at K = 3: no score is published for "
        "3 tokens per step.",
    ]


def test_another_data_set_carries_its_name_everywhere(tmp_path):
    result, config = craft(data="mini", protocol="official")
    reference = {
        "score": 79.3,
        "metric": "exact_match,flexible-extract",
        "source": "s",
        "settings": "t",
    }
    _sign(result, reference=reference)
    atomic_write_json(tmp_path / "forged.json", result)
    save(tmp_path, data="mini", protocol="official", k=2)
    save(tmp_path, data="original", protocol="official", k=3)
    results, _ = read_all([tmp_path])
    minis = [result for result in results if result.data["name"] == "mini"]
    assert [(result.task, result.published) for result in minis] == [("gsm8k (on mini)", None)] * 2
    assert all("on mini" in result.name for result in minis)
    assert [len(curve) for curve in curves(results)] == [1, 2]  # no line joins the two data sets
    assert {row[0] for row in aup_table(results).rows} == {"gsm8k", "gsm8k (on mini)"}
    assert [row[6] for row in comparison_table(results).rows] == ["McNemar exact"]


def test_settings_of_one_model_are_compared_by_themselves(tmp_path):
    for k, right in ((1, 30), (2, 29), (3, 10)):
        save(tmp_path, k=k, scores=[1.0] * right + [0.0] * (40 - right))
    save(tmp_path, "dream", k=1)
    results, _ = read_all([tmp_path])
    shown = [(row[0][-5:], row[1], row[-1]) for row in comparison_table(results).rows]
    assert shown == [
        ("K = 1", "K = 3", "A higher"),
        ("K = 2", "K = 3", "A higher"),
        ("K = 1", "K = 2", "not distinguishable"),
    ]
    llada = [result for result in results if result.model == "llada"]
    (dream,) = [result for result in results if result.model == "dream"]
    rows = comparison_table(results, [(llada[0], dream), (llada[0], llada[1])]).rows
    assert (
        len(rows) == 4 and rows[0][1] == "dream gsm8k, maskgit_plus, K = 1"
    )  # requested pairs come first, and once


def test_results_that_never_differ_have_no_interval(tmp_path):
    """An interval from 0 to 0 would look like certainty."""
    for k in (1, 2):
        save(tmp_path, k=k, scores=[0.0] * 10, n=10)
    assert comparison_table(read_all([tmp_path])[0]).rows[0][2:6] == ("10", "0.0", "0 / 0", "1.000")


def test_aup_shows_y_max_and_the_comparison_set(tmp_path):
    save(tmp_path, k=1, scores=[1.0] * 30 + [0.0] * 10)
    save(tmp_path, k=2, scores=[1.0] * 10 + [0.0] * 30)
    save(tmp_path, "dream", k=1, scores=[1.0] * 36 + [0.0] * 4)
    results, _ = read_all([tmp_path])
    rows = [
        dict(zip(aup_table(results).columns, row, strict=True))
        for row in aup_table(results, 3, 5).rows
    ]
    assert [(r["method"], r["points"], r["y_max"]) for r in rows] == [
        ("dream", "1", "90.0"),
        ("llada", "1", "90.0"),
    ]
    # once: in each row it made tables of 2,000 columns
    assert aup_table(results).notes[-1] == "Comparison set of gsm8k: dream; llada."
    assert rows[1]["dropped"].startswith("25.0 % at TPF ")
    assert aup_table(results, 3, 100).rows[1][4] == "2"


def test_figures_that_fail_do_not_take_the_tables_along(tmp_path, monkeypatch, capsys):
    save(tmp_path, k=1)

    def broken(results, folder):
        raise ValueError("no fonts\nat all")

    monkeypatch.setattr(report, "draw", broken)
    assert report.main([str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    out, err = capsys.readouterr()
    assert err == "no figures: ValueError: no fonts\n" and "0 figures" in out
    assert "No figures" in (tmp_path / "report" / "report.html").read_text()
    assert (
        (tmp_path / "report" / "report.md")
        .read_text()
        .startswith("# dllmexp report\n\n1 result.\n")
    )


@pytest.mark.slow
def test_a_report_in_a_notebook_and_into_head(tmp_path):
    """Its MPLBACKEND is not installed here; `head` closes the pipe before the files are written."""
    save(tmp_path, k=1)
    environ = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = [
        sys.executable,
        "scripts/report.py",
        str(tmp_path),
        "--out",
        str(tmp_path / "report"),
    ]
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environ, cwd=ROOT)
    os.close(write)
    assert (run.returncode, run.stderr) == (141, b"")
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"report.html", "results.csv", "accuracy_tpf_uniform.svg"} <= names


def test_the_checksum_is_of_the_content_not_of_its_layout(tmp_path):
    path = save(tmp_path, k=1)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7, sort_keys=True))
    assert len(read_all([tmp_path])[0]) == 1


def test_the_interval_of_aup_resamples_documents(tmp_path):
    """The AUP of one point is its mean times its TPF, with a known interval."""
    rng = random.Random(1)
    save(tmp_path, k=2, scores=[float(rng.random() < 0.7) for _ in range(400)], n=400)
    save(tmp_path, "dream", k=1, scores=[1.0] * 40)
    dream, llada = sorted(read_all([tmp_path])[0], key=lambda result: result.model)
    p, half = llada.value / 100, 100 * 1.96 * llada.tpf
    spread = half * (p * (1 - p) / 400) ** 0.5
    assert aup_interval([llada], 100) == pytest.approx(
        (llada.tpf * llada.value - spread, llada.tpf * llada.value + spread), rel=0.02
    )
    assert aup_interval([llada], 100) == aup_interval([llada], 100)
    assert aup_interval([dream], 100) == (None, None)  # all right: no draw differs
    assert aup_interval([dream, llada], 100) == (None, None)  # not the same documents


def test_labels_distinguish_the_curves_of_one_model(tmp_path):
    save(tmp_path, k=1)
    save(tmp_path, k=2, algorithm="leftright")
    save(tmp_path, "dream", k=2)
    save(
        tmp_path,
        k=2,
        tag="other",
        overrides={"checkpoint": {}},
        checkpoint="/x/mine",
        fingerprint=None,
    )
    results, _ = read_all([tmp_path])
    assert sorted(curve_labels(curves(results))) == [
        "dream",
        "llada [mine]",
        "llada, leftright",
        "llada, low_confidence",
    ]


# ---------------------------------------------------------------- files that are left out


def damaged(folder, name, change):
    result, _ = craft(n=3)
    change(result)
    (folder / name).write_text(json.dumps(result), encoding="utf-8")


def test_two_revisions_of_a_protocol_share_no_curve(tmp_path):
    """Dream decodes in blocks since revision 2 of uniform; older results are not comparable."""
    save(tmp_path, "dream", k=3, revision=1)
    save(tmp_path, "dream", k=2)
    save(tmp_path, "dream", k=1)
    found = curves(read_all([tmp_path])[0])
    assert sorted(len(curve) for curve in found) == [1, 2]
    assert sorted(curve_labels(found)) == ["dream, revision 1", "dream, revision 2"]


def test_broken_partial_and_foreign_files_are_named_and_skipped(tmp_path):
    good = save(tmp_path, k=1)
    (tmp_path / "cut.json").write_text(good.read_text()[:1000])
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "other.json").write_text('{"results": {}}')
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".x.json.abc.tmp").write_text("{")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "x.json").write_text("not looked at")
    (tmp_path / "gone.json").symlink_to("/nowhere")
    damaged(tmp_path, "edited.json", lambda r: r["headline"].update(value=0.99))
    damaged(tmp_path, "newer.json", lambda r: r.update(schema_version=99))
    damaged(tmp_path, "failed.json", lambda r: _sign(r, status="incomplete", n_failed=2))
    damaged(tmp_path, "no_exec.json", lambda r: _sign(r, status="unscored", headline=None))
    damaged(tmp_path, "lacking.json", lambda r: _sign(r, headline={"metric": "m"}))
    damaged(tmp_path, "wrong.json", lambda r: _sign(r, samples=[1]))
    # the checksum does not cover the profile
    damaged(tmp_path, "speed.json", lambda r: r["profile"].update(tpf="fast"))
    for name, count in {"zero.json": 0, "text.json": "64"}.items():
        damaged(tmp_path, name, lambda r, n=count: _sign(r, config=r["config"] | {"num_steps": n}))
    damaged(tmp_path, "task.json", lambda r: _sign(r, config=r["config"] | {"task": None}))
    damaged(tmp_path, "nan.json", lambda r: r["profile"].update(tokens_per_second=float("nan")))
    os.mkfifo(tmp_path / "fifo.json")
    results, skipped = read_all([tmp_path])
    assert [result.path for result in results] == [good]
    reasons = {s.path.name: s.reason for s in skipped}
    for name, reason in {
        "cut.json": "not JSON",
        "empty.json": "not JSON",
        "bytes.json": "not JSON",
        "list.json": "no result",
        "deep.json": "not JSON",
        "other.json": "no result",
        "notes.txt": "not a .json file",
        ".x.json.abc.tmp": "unfinished",
        "gone.json": "cannot be read",
        "edited.json": "checksum",
        "newer.json": "schema_version 99",
        "failed.json": "2 of 3 samples failed",
        "no_exec.json": "its programs were not run (--no_exec)",
        "lacking.json": "malformed",
        "wrong.json": "malformed",
        "speed.json": "'fast' is no number",
        "nan.json": "nan is no number",
        "zero.json": "positive integers, got 0",
        "text.json": "positive integers, got '64'",
        "task.json": "task is None, expected a string",
        "fifo.json": "cannot be read: not a regular file",
    }.items():
        assert reason in reasons.pop(name), name
    assert reasons == {}


def _sign(result, **changes):
    result.update(changes)
    result["content_sha256"] = sha256({k: v for k, v in result.items() if k not in VOLATILE})
    return result


def test_of_two_files_of_one_experiment_the_newer_counts(tmp_path):
    save(tmp_path, k=1)
    result, _ = craft(k=1)
    result["meta"]["started"] = "2026-02-01T00:00:00+00:00"
    atomic_write_json(tmp_path / "again.json", result)
    results, skipped = read_all([tmp_path])
    assert [result.path.name for result in results] == ["again.json"]
    assert "the same experiment as again.json" in skipped[0].reason


def test_a_place_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="nowhere does not exist"):
        read_all([tmp_path / "nowhere"])


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """(folder of a small suite's results, folder of its report)."""
    folder, out = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("report")
    for alias in ("llada", "dream"):
        for task in ("gsm8k", "humaneval"):
            for k in (1, 2):
                save(folder, alias, task, k, right=0.8 - 0.2 * k, n=12)
    last = save(folder, "dream", "gsm8k", 3, n=230, data="mini", limit=230)
    result = json.loads(last.read_text())
    result["samples"][205]["verdict"] = {"passed": True, "strict": {"passed": False}}
    atomic_write_json(last, _sign(result))
    (folder / "notes.txt").write_text("x")
    assert report.main([str(folder), "--out", str(out)]) == 0
    return folder, out


def test_the_command_writes_everything(suite):
    _, out = suite
    tasks = ["", "_gsm8k", "_gsm8k_on_mini_first_230", "_humaneval"]
    figures = {f"accuracy_{axis}_uniform{t}" for axis in ("k", "tpf", "tok_s") for t in tasks}
    files = {path.name for path in out.iterdir()}
    assert {n for n in files if n.startswith("accuracy_")} == {
        f"{name}.{kind}" for name in figures for kind in ("png", "svg", "pdf")
    }
    assert sorted(name for name in files if not name.startswith("accuracy_")) == [
        "accuracy.md",
        "accuracy.tex",
        "aup.csv",
        "columns.md",
        "comparisons.csv",
        "report.html",
        "report.md",
        "results.csv",
    ]
    assert "notes.txt: not a .json file" in (out / "report.md").read_text()
    assert "gsm8k (on mini, first 230)" in (out / "report.md").read_text()
    assert len(list(csv.DictReader((out / "results.csv").open()))) == 9
    assert (out / "accuracy_tpf_uniform.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_same_results_make_the_same_report_without_torch_and_lm_eval(suite, tmp_path):
    folder, out = suite
    code = (
        "import sys; sys.path.insert(0, '.'); "
        "from scripts import report; assert report.main(sys.argv[1:]) == 0; "
        "assert not {'torch', 'lm_eval', 'transformers', 'datasets'} & sys.modules.keys()"
    )
    words = [sys.executable, "-c", code, folder, "--out", tmp_path]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    for path in sorted(out.iterdir()):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_two_named_results_are_compared(suite, tmp_path, capsys):
    folder, _ = suite
    a, b = (
        folder / "llada_gsm8k_low_confidence_tps1.json",
        folder / "dream_gsm8k_maskgit_plus_tps1.json",
    )
    assert report.main([str(a), "--out", str(tmp_path), "--compare", str(a), str(b)]) == 0
    shown = capsys.readouterr().out
    assert re.search(
        r"llada gsm8k, low_conf.*\| dream gsm8k.*\| 12 \|.*(not distinguishable|higher)", shown
    )


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["{out}/nothing"], 2, "nothing does not exist"),
        (["{results}/notes.txt"], 4, "no complete result"),
        (
            ["{results}", "--compare", "{results}/notes.txt", "{results}/notes.txt"],
            4,
            "notes.txt: not JSON",
        ),
        (
            [
                "{results}",
                "--compare",
                "{results}/llada_gsm8k_low_confidence_tps1.json",
                "{results}/llada_humaneval_low_confidence_tps1.json",
            ],
            2,
            "not on the same documents",
        ),
        (["{results}", "--out", "/dev/null/x"], 74, "cannot write /dev/null/x"),
        (["{results}", "--samples", "{out}/fifo"], 74, "fifo: not a regular file"),
        (["{results}", "--output_dir", "x"], 2, "'--output_dir'; did you mean '--out'?"),
        (["{results}", "--compar", "x"], 2, "error: --compare: expected 2 arguments"),
        ([], 2, "error: the following arguments are required: results"),
    ],
)
def test_errors_are_lines_and_exit_codes(
    suite, tmp_path, monkeypatch, capsys, arguments, code, message
):
    monkeypatch.setattr(report, "draw", lambda results, folder: [])
    words = [a.format(out=tmp_path, results=suite[0]) for a in arguments]
    out = [] if "--out" in words else ["--out", str(tmp_path / "report")]
    os.mkfifo(tmp_path / "fifo")
    assert report.main([*words, *out]) == code
    assert message in capsys.readouterr().err


def test_ctrl_c_ends_a_report_without_a_traceback(suite, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "draw", interrupted)
    assert report.main([str(suite[0]), "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.startswith("left out: ")


def test_the_home_directory_has_a_short_name(suite, monkeypatch):
    """`--out '~/x'` made a directory of the name ~."""
    monkeypatch.setenv("HOME", "/home/me")
    args = report.parse(["~/a", "--out", "~/x", "--samples=~/y"])
    home = Path("/home/me")
    assert (args.results, args.out, args.samples) == ([home / "a"], home / "x", home / "y")


def test_the_report_of_a_suite_has_its_results_alone(tmp_path, monkeypatch, capsys):
    """It took in every unrelated file of the folder as further panels."""
    monkeypatch.setattr(report, "draw", lambda results, folder: [])
    one, _ = save(tmp_path, k=1, n=5), save(tmp_path, "dream", n=5)
    assert report.main([str(tmp_path), "--suite", "--out", str(tmp_path / "report")]) == 2
    assert "error: --suite: no suite has run in " in capsys.readouterr().err
    entry = dict.fromkeys(field.name for field in fields(Planned))
    experiments = [
        entry | {"name": path.stem, "path": str(path), "log": str(path)}
        for path in (one, tmp_path / "llada_gsm8k_low_confidence_tps2.json")
    ]
    record = {"pid": 1, "host": "h", "since": 0.0, "workers": 1, "ended": 1.0}
    (tmp_path / "logs").mkdir()
    atomic_write_json(tmp_path / "logs" / "sweep-h-1.json", record | {"experiments": experiments})
    assert report.main([str(tmp_path), "--suite", "--out", str(tmp_path / "report")]) == 0
    out, err = capsys.readouterr()
    assert "dream" not in out and err == "no result yet: 1 experiment of the suite\n"
    assert "- llada_gsm8k_low_confidence_tps2\n" in (tmp_path / "report/report.md").read_text()


def test_a_suite_of_zeros_and_predictions_has_a_report(tmp_path):
    save(tmp_path, k=1, scores=[0.0] * 5, n=5)
    save(tmp_path, k=2, scores=[0.0] * 5, n=5)
    texts = save(tmp_path, k=2, scores=[1.0] * 5, n=5, predictions="abc", tag="texts")
    assert report.main([str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    assert report.main([str(texts), "--out", str(tmp_path / "alone")]) == 0
    (row,) = csv.DictReader((tmp_path / "alone" / "results.csv").open())
    assert (row["algorithm"], row["value"], row["tpf"]) == ("predictions", "1.0", "")
    assert not list((tmp_path / "alone").glob("*.png"))  # no speed to plot against


# ---------------------------------------------------------------- the page


class Links(HTMLParser):
    """Everything an HTML page could load: each src and href, and its tags."""

    def __init__(self):
        super().__init__()
        self.loaded, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        loading = ("src", "href", "xlink:href", "data", "srcset")
        self.loaded += [v for k, v in attrs if k in loading and not v.startswith("#")]


def test_the_page_loads_nothing_from_elsewhere(suite):
    text = (suite[1] / "report.html").read_text()
    page = Links()
    page.feed(text)
    assert page.loaded == [] and not {"link", "iframe", "img", "object", "embed"} & set(page.tags)
    assert page.tags.count("svg") == 3 and "@import" not in text and "default-src 'none'" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "two figures share an id"
    assert "Answer to 3" not in text  # samples are packed, not in the page's text
