"""Adaptive algorithms and caches on the command line: flags, identity, names, result, report."""

import json

import pytest
from crafted import save
from mini import LLADA, gsm8k_dir

import eval as cli
from decoding.algorithms import ALGORITHMS, algorithm_options
from decoding.kv_cache import CACHES
from reporting.data import curve_labels, curves, read_all
from reporting.plots import Line, caption
from reporting.tables import comparison_table
from scripts import sweep
from suite.matrix import Selection, select
from utils import UsageError


@pytest.fixture
def mini(tmp_path):
    """Arguments of a small run on a tiny checkpoint and a benchmark of three documents."""
    return (
        f"--model_alias llada --task gsm8k --llada_ckpt {LLADA} "
        f"--data_dir {gsm8k_dir(tmp_path / 'data')} --output_dir {tmp_path / 'out'} "
        "--device cpu --dtype float32 --gen_length 8"
    )


def test_methods_do_not_share_a_file_or_an_identity(run, mini):
    """A run with threshold 0.95 must not find, or overwrite, the result of 0.9."""
    methods = [
        [],
        ["--alg", "threshold"],
        ["--alg", "threshold", "--threshold", "0.95"],
        ["--alg", "threshold", "--kv_cache", "dual"],
        ["--alg", "threshold", "--kv_cache", "prefix"],
        ["--alg", "threshold", "--kv_cache", "dual", "--cache_refresh", "4"],
        ["--kv_cache", "dual"],
    ]
    shown = [run(mini, "--dry_run", "--block_length", "4", *more)[1] for more in methods]
    for what in ("id ", "output: "):
        assert len({text.split(what)[-1].split()[0] for text in shown}) == len(methods)
    assert (
        "gsm8k_threshold_threshold0.95_tps1_float32_mini.json" in shown[2]
        and "threshold0.9_dual_refresh4_tps1_float32_mini.json" in shown[5]
    )
    # the default, written out, is the same experiment
    assert (
        run(mini, *"--dry_run --block_length 4 --alg threshold --threshold 0.9".split())[1]
        == shown[1]
    )


def test_a_cache_shows_in_the_result(run, mini, tmp_path):
    assert (
        run(
            mini,
            "--alg",
            "threshold",
            "--threshold",
            "0.8",
            "--kv_cache",
            "dual",
            "--block_length",
            "4",
        )[0]
        == 0
    )
    [path] = (tmp_path / "out").glob("*.json")
    result = json.loads(path.read_text())
    passes = result["profile"]["forward_passes"]
    assert passes["partial"] > 0 and passes["full"] == sum(
        s["nfe"] - s["nfe_partial"] for s in result["samples"]
    )
    assert (
        len(result["samples"]) == 3
        and result["config"]["options"] == {"threshold": 0.8}
        and result["config"]["kv_cache"] == "dual"
    )
    assert result["protocol"]["overrides"]["kv_cache"] == {"protocol": "none", "run": "dual"}
    for sample in result["samples"]:
        columns = sample["prompt_tokens"] + 8
        assert (
            sample["positions_computed"]
            == (sample["nfe"] - sample["nfe_partial"]) * columns + 4 * sample["nfe_partial"]
        )


def test_adaptive_algorithms_have_blocks_for_dream_too(run):
    out = run("--model_alias dream --task gsm8k --alg threshold --dry_run")[1]
    assert (
        "schedule: threshold decides, in 8 blocks of 32: at least 1 tokens per step, "
        "at most 256 forward passes" in out
    )
    out = run(
        "--model_alias dream --task gsm8k --alg maskgit_plus --block_length 64 --tokens_per_step 3 "
        "--dry_run"
    )[1]
    assert "88 steps in 4 blocks of 64" in out
    out = run(
        "--model_alias dream --task gsm8k --alg klass --gen_length 24 --kl_history 3 --dry_run"
    )[1]
    assert (
        "in 1 block of 24" in out
        and "'kl_history': 3}" in out
        and "override: kl_history 3 (protocol uniform: 2)" in out
    )
    assert "klass_threshold0.9_kl_threshold0.01_kl_history3_tps1" in out


def test_a_count_is_a_whole_number(run):
    code, _, error = run("--model_alias dream --task gsm8k --alg klass --kl_history 1.5")
    assert code == 2 and error == "error: --kl_history 1.5: must be a whole number of at least 1\n"


def test_every_option_of_an_algorithm_has_a_flag(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"--{name} " in out for name in algorithm_options())


def test_the_report_tells_methods_apart_and_joins_a_threshold_s_points(tmp_path):
    """A curve is one method at several tokens per step, or values of an adaptive option."""
    for value in (0.9, 0.7):
        save(tmp_path, algorithm="threshold", options={"threshold": value})
    save(
        tmp_path,
        algorithm="threshold",
        options={"threshold": 0.9},
        kv_cache="dual",
        cache_refresh=4,
    )
    runs, skipped = read_all([tmp_path])
    assert not skipped and sorted(run.algorithm for run in runs) == [
        "threshold (threshold 0.7)",
        "threshold (threshold 0.9)",
        "threshold (threshold 0.9, dual cache refreshed every 4)",
    ]
    assert sorted(len(curve) for curve in curves(runs)) == [1, 2]
    told = caption([Line("a", curve, {}) for curve in curves(runs)], "tpf")
    assert "K = 1." in told and "Lines of adaptive algorithms join values of their option." in told
    names = [row[:2] for row in comparison_table(runs).rows]
    assert (
        len(names) == 1
        and "threshold 0.7" in " ".join(names[0])
        and "threshold 0.9" in " ".join(names[0])
    )


def test_the_report_names_another_temperature_and_verifier_and_no_checksum(tmp_path):
    """Two rows of one name and different numbers; or a curve that is called after a checksum."""
    prints = [{"revision": None, "files": {"a": "1"}, "shards": {"b": n}} for n in "12"]
    apd = dict(
        alias="dream", algorithm="apd", options={"apd_mixture_weight": 0.7}, verifier="/other/qwen"
    )
    save(tmp_path, alias="dream")
    save(tmp_path, **apd, verifier_fingerprint=prints[0])
    runs, _ = read_all([tmp_path])
    assert sorted(curve_labels(curves(runs))) == ["dream, apd", "dream, maskgit_plus"]
    changed = {
        "temperature": {"protocol": 0.0, "run": 0.2},
        "verifier": {"protocol": "Q", "run": "/other/qwen"},
    }
    save(
        tmp_path,
        **apd,
        verifier_fingerprint=prints[1],
        temperature=0.2,
        overrides=changed,
        tag="other",
    )
    runs, _ = read_all([tmp_path])
    assert "apd (apd_mixture_weight 0.7, temperature 0.2, verifier qwen)" in {
        run.algorithm for run in runs
    }
    labels = ["dream, apd", "dream, apd, temperature 0.2", "dream, maskgit_plus"]
    assert sorted(curve_labels(curves(runs))) == labels


# ---------------------------------------------------------------- the suite


def test_the_parallel_suite_has_every_algorithm_and_cache_and_its_baselines():
    settings = [
        {"kv_cache": "none"} | e.job.config.as_dict() for e in select(Selection(suite="parallel"))
    ]
    with_options = {name for name, a in ALGORITHMS.items() if a.options}
    assert {s["algorithm"] for s in settings} >= with_options
    assert {s["kv_cache"] for s in settings} == {*CACHES}
    for alias, algorithm in (("tiny-llada", "low_confidence"), ("tiny-dream", "maskgit_plus")):
        mine = [s for s in settings if s["model_alias"] == alias]
        anywhere = [s for s in mine if not ALGORITHMS[s["algorithm"]].left_to_right]
        assert {s["block_length"] for s in anywhere} == {8}
        plain = [s for s in mine if s["algorithm"] == algorithm and s["kv_cache"] == "none"]
        assert {s["tokens_per_step"] for s in plain} == {1, 2, 3, 4}


def test_a_suite_is_filtered():
    chosen = select(Selection(suite="parallel", models=("tiny-dream",), algs=("threshold",)))
    assert len(chosen) == 9 and {e.job.config.decode.schedule.algorithm for e in chosen} == {
        "threshold"
    }
    with pytest.raises(
        UsageError, match="^--models llada: --suite parallel has no such experiment"
    ):
        select(Selection(suite="parallel", models=("llada",)))


def test_the_suite_is_chosen_on_the_command_line(capsys):
    assert (
        sweep.main(["plan", "--suite", "parallel", "--algs", "klass", "--extra", "--limit 5"]) == 0
    )
    out = capsys.readouterr().out
    assert "4 experiments" in out and "tiny-llada_gsm8k_klass_threshold0.6_" in out
    assert sweep.main(["plan", "--suite", "paralel"]) == 2
    assert "invalid choice: 'paralel'" in capsys.readouterr().err
