"""Published speeds as suites, speeds over the samples in flight, and their table in the report."""

import json

import pytest
from crafted import protocol_of, save
from mini import LLADA, gsm8k_dir

from experiment.result import reference_of
from reporting.data import read_all
from reporting.tables import speed_table, to_text
from scripts import report, sweep
from suite.matrix import Selection, select
from utils import EXIT_ENVIRONMENT

DUAL = {"algorithm": "threshold", "kv_cache": "dual"}


def anchors(suite: str = "anchors", **filters) -> list:
    return select(Selection(suite=suite, **filters))


def overrides_of(method: dict) -> dict:
    return {name: {"protocol": None, "run": value} for name, value in method.items()}


def test_every_anchor_has_its_published_speed_and_one_sample_in_flight():
    """A setting that departs from what was measured would silently lose its reference."""
    found = {}
    for e in anchors():
        reference, why = reference_of(
            e.job.protocol.references, e.job.overrides, whole=True, data="original"
        )
        assert why is None and e.job.config.timed_batch == 1
        schedule = e.job.schedule
        assert (schedule.gen_length, schedule.block_length) == (256, 32)
        cited = [reference, *reference.get("also", ())]
        found[e.name] = [(r["device"], r["score"], r["tokens_per_second"]) for r in cited]
    assert len(found) == 16
    assert found["llada_gsm8k_threshold_threshold0.9_tps1_batch1_fast_dllm"] == [
        ("H200", 77.26, 48.7),
        ("H100-80G", 78.39, 33.4),
    ]
    assert found[
        "dream_humaneval_confidence_threshold_threshold0.9_dual_tps1_batch1_fast_dllm"
    ] == [("H200", 48.78, 65.9)]
    assert found[
        "llada_gsm8k_klass_threshold0.6_kl_threshold0.015_kl_history2_tps1_batch1_fast_dllm"
    ] == [("H100-80G", 76.12, 23.2)]


def test_batches_are_the_anchors_at_four_sizes_with_results_of_their_own():
    """Kept samples of one size must not answer for another: their seconds are another's."""
    chosen = anchors("batches", models=("llada",), tasks=("gsm8k",), algs=("low_confidence",))
    assert [e.job.config.timed_batch for e in chosen] == [1, 4, 16, 64]
    assert len({e.path.name for e in chosen}) == len({e.job.config.generation_id for e in chosen})
    assert len(anchors("batches")) == 4 * len(anchors())
    [one] = anchors(models=("llada",), tasks=("gsm8k",), algs=("low_confidence",))
    assert one.path == chosen[0].path


def test_a_reference_is_of_its_own_method_alone():
    references = protocol_of("fast_dllm", "llada", "gsm8k").references

    def score(method: dict, whole: bool = True):
        found = reference_of(references, overrides_of(method), whole=whole, data="original")
        return found[0] and found[0]["score"], found[1]

    assert score({}) == (77.79, None) and score(DUAL) == (77.4, None)
    for method, departs in (
        (DUAL | {"threshold": 0.8}, "algorithm, kv_cache, threshold"),
        ({"kv_cache": "dual"}, "kv_cache"),
    ):
        missing, why = score(method)
        assert missing is None and why.endswith(f"differs from the protocol in {departs}")
    assert score(DUAL, whole=False)[1].endswith("in documents")
    assert score({"tokens_per_step": 2})[1] == "no score is published for 2 tokens per step"


# ---- --timed_batch


@pytest.fixture
def mini(tmp_path):
    return (
        f"--model_alias llada --task gsm8k --llada_ckpt {LLADA} --device cpu --dtype float32 "
        f"--data_dir {gsm8k_dir(tmp_path / 'data')} --output_dir {tmp_path / 'out'} --gen_length 8"
    )


def test_a_timed_batch_decodes_its_own_samples_at_its_own_size(run, mini, tmp_path):
    made = []
    for words in ("--batch_size 2", "--timed_batch 2", "--timed_batch 3"):
        assert run(f"{mini} {words}")[0] == 0
    for name in ("tps1_float32", "tps1_float32_batch2", "tps1_float32_batch3"):
        result = json.loads(
            (tmp_path / "out" / f"llada_gsm8k_low_confidence_{name}_mini.json").read_text()
        )
        made.append((result["generation_id"], result["meta"]["batch_size"]))
        assert [p["batch_size"] for p in result["meta"]["samples_made"]] == [made[-1][1]]
        assert "timed_batch" not in result["protocol"]["overrides"]
    assert [n for _, n in made] == [2, 2, 3] and len({key for key, _ in made}) == 3


def test_two_batch_sizes_are_refused(run, mini):
    code, _, error = run(f"{mini} --batch_size 4 --timed_batch 2")
    assert code == 2 and error == (
        "error: --batch_size 4 and --timed_batch 2: both are the samples in flight; "
        "give one of them\n"
    )
    assert run(f"{mini} --batch_size 2 --timed_batch 2 --dry_run")[0] == 0


def test_a_timed_batch_that_does_not_fit_ends_the_run(run, mini, monkeypatch):
    """Halved, it would be a speed at another size under this one's name."""
    import harness

    def decode(*args, **more):
        raise MemoryError

    monkeypatch.setattr(harness, "decode_each", decode)
    code, _, error = run(f"{mini} --timed_batch 3")
    assert code == EXIT_ENVIRONMENT and "--timed_batch 3: out of memory; a smaller one" in error


# ---- the report


@pytest.mark.slow
def test_the_report_shows_speed_over_samples_in_flight_beside_published_speeds(tmp_path, capsys):
    for batch in (1, 4):
        save(tmp_path, timed_batch=batch, protocol="fast_dllm")
        save(
            tmp_path,
            timed_batch=batch,
            protocol="fast_dllm",
            algorithm="threshold",
            kv_cache="dual",
            overrides=overrides_of(DUAL),
        )
    save(tmp_path, task="humaneval")
    results, skipped = read_all([tmp_path])
    table = speed_table(results)
    assert not skipped and len(table.rows) == 2
    assert table.columns[4:] == ("accuracy %", "at 1", "at 4", "published %, tok/s")
    plain, dual = table.rows
    assert plain[2] == "low_confidence" and dual[2] == "threshold (threshold 0.9, dual cache)"
    assert plain[-1] == "77.8, 14.9 (H200); 77.9, 10.3 (H100-80G)"
    assert dual[-1] == "77.4, 92.3 (H200)"
    speeds = {(r.algorithm, r.config["timed_batch"]): f"{r.tok_s:.1f}" for r in results if r.speeds}
    assert plain[5:7] == tuple(speeds[f"low_confidence (batch {n})", n] for n in (1, 4))
    assert "DSB (lizhuo008/DSB), one H200; one sample at a time" in to_text(table)
    assert report.main([str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    assert "tok/s by samples in flight" in capsys.readouterr().out
    assert "tokens_per_second_at_4" in (tmp_path / "report" / "speed.csv").read_text()


def test_anchors_are_chosen_on_the_command_line(capsys):
    words = ["plan", "--suite", "batches", "--models", "llada1.5", "--extra", "--limit 5"]
    assert sweep.main(words) == 0
    out = capsys.readouterr().out
    assert "12 experiments" in out and "llada1.5_gsm8k_low_confidence_tps1_batch64_" in out
