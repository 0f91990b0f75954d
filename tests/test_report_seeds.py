"""Seeds of one setting are one point, with mean and spread; machines that differ are named."""

import csv
from statistics import fmean, stdev

import pytest
from crafted import config_of, craft, save

from experiment.config import result_name
from reporting.data import curves, pooled, read_all
from reporting.plots import Line, caption
from reporting.stats import aup
from reporting.tables import aup_table, comparison_table, result_table, to_csv
from suite.matrix import Selection, select
from utils import UsageError

RIGHT = {0: 30, 1: 24, 2: 27}  # of 40, by seed


def scores(n_right: int) -> list[float]:
    return [1.0] * n_right + [0.0] * (40 - n_right)


@pytest.fixture
def seeds(tmp_path):
    """Results of three seeds at K = 1 and at K = 2, and of a method with one seed."""
    for seed, right in RIGHT.items():
        save(tmp_path, k=1, scores=scores(right), seed=seed)
        save(tmp_path, k=2, scores=scores(right - 1), seed=seed)
    save(tmp_path, "dream", k=1, scores=scores(26))
    return read_all([tmp_path])[0]


def by_column(table, row):
    return dict(zip(table.columns, row, strict=True))


def test_a_name_says_a_seed_and_a_temperature_that_depart():
    name = "llada_gsm8k_low_confidence_tps2"
    assert result_name(config_of("llada", "gsm8k", 2)) == f"{name}.json"
    warm = config_of("llada", "gsm8k", 2, seed=3, temperature=0.5)
    shown = result_name(warm, overrides={"temperature": {}}, tag="x")
    assert shown == f"{name}_temperature0.5_seed3_x.json"
    assert result_name(warm) == f"{name}_seed3.json"  # the protocol's own temperature


def test_listed_values_of_a_suite_file_are_one_experiment_each(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(
        "- {model_alias: llada, task: gsm8k, seed: [0, 1, 2], temperature: [0, 0.5]}\n"
        "- {model_alias: llada, task: mbpp, block_length: [32, 64], top_p: [null, 0.9],\n"
        "   temperature: 1, tag: own}\n"
    )
    found = select(Selection(file=file))
    assert [e.name.removeprefix("llada_") for e in found] == [
        "gsm8k_low_confidence_tps1",
        "gsm8k_low_confidence_tps1_temperature0.5",
        "gsm8k_low_confidence_tps1_seed1",
        "gsm8k_low_confidence_tps1_temperature0.5_seed1",
        "gsm8k_low_confidence_tps1_seed2",
        "gsm8k_low_confidence_tps1_temperature0.5_seed2",
        "mbpp_low_confidence_tps1_temperature1_own_block_length32_top_p-default",
        "mbpp_low_confidence_tps1_temperature1_own_block_length32_top_p0.9",
        "mbpp_low_confidence_tps1_temperature1_own_block_length64_top_p-default",
        "mbpp_low_confidence_tps1_temperature1_own_block_length64_top_p0.9",
    ]
    file.write_text(
        "- --model_alias llada --task gsm8k --block_length 64\n- --model_alias llada --task gsm8k\n"
    )
    with pytest.raises(UsageError, match="two experiments would write"):
        select(Selection(file=file))


def test_seeds_are_one_line_with_mean_and_spread(seeds):
    table = result_table(seeds)
    assert len(table.rows) == 3
    row = by_column(table, next(r for r in table.rows if r[1] == "llada" and r[4] == "1"))
    values = [100 * right / 40 for right in RIGHT.values()]
    assert row["accuracy % [95 %]"].startswith(f"{fmean(values):.1f} [")
    assert row["sd over seeds"] == f"{stdev(values):.1f} (n 3)"
    assert by_column(table, next(r for r in table.rows if r[1] == "dream"))["sd over seeds"] == "-"
    (pool, _) = [result for result in pooled(seeds) if result.model == "llada"]
    assert pool.name.endswith("K = 1, seeds 0, 1, 2")
    assert pool.low < pool.value < pool.high and pool.scores[25] == pytest.approx(2 / 3)


def test_one_seed_alone_has_no_column_for_the_spread(tmp_path):
    save(tmp_path, k=1, seed=4)
    results = read_all([tmp_path])[0]
    assert "sd over seeds" not in result_table(results).columns
    assert results[0].name.endswith("K = 1, seed 4")


def test_results_csv_has_a_line_for_each_seed_and_its_settings(seeds):
    records = list(csv.DictReader(to_csv(result_table(seeds)).splitlines()))
    assert len(records) == 7
    llada = [r for r in records if r["model"] == "llada" and r["tokens_per_step"] == "1"]
    assert sorted(r["seed"] for r in llada) == ["0", "1", "2"]
    values = [right / 40 for right in RIGHT.values()]
    for record in llada:
        assert float(record["mean_over_seeds"]) == pytest.approx(fmean(values))
        assert float(record["sd_over_seeds"]) == pytest.approx(stdev(values))
        assert record["seeds"] == "3" and record["dtype"] == "bfloat16"
        assert record["block_length"] == "32" and record["kv_cache"] == "none"
    dream = next(r for r in records if r["model"] == "dream")
    assert (dream["seeds"], dream["sd_over_seeds"]) == ("1", "")


def test_results_csv_has_options_and_cache(tmp_path):
    save(tmp_path, algorithm="threshold", options={"threshold": 0.7}, kv_cache="dual")
    (record,) = csv.DictReader(to_csv(result_table(read_all([tmp_path])[0])).splitlines())
    assert (record["threshold"], record["kv_cache"]) == ("0.7", "dual")


def test_a_seed_is_no_method(seeds):
    """Three seeds as three methods took the luckiest for y_max."""
    table = aup_table(seeds)
    rows = {row["method"]: row for row in (by_column(table, row) for row in table.rows)}
    assert rows.keys() == {"llada", "dream"}
    assert table.notes[-1].endswith(": dream; llada.") and rows["llada"]["points"] == "2"
    y_max = 100 * fmean(RIGHT.values()) / 40
    assert rows["llada"]["y_max"] == f"{y_max:.1f}"
    alone = [
        aup(
            [(r.tpf, r.value) for r in seeds if r.model == "llada" and r.config["seed"] == seed],
            y_max,
        ).value
        for seed in RIGHT
    ]
    assert rows["llada"]["sd over seeds"] == f"{stdev(alone):.1f}"
    assert rows["dream"]["sd over seeds"] == "-"
    (curve,) = [c for c in curves(pooled(seeds)) if c[0].model == "llada"]
    assert "Points: means over seeds." in caption([Line({}, curve)], "tpf")


def test_seeds_are_compared_by_their_means(seeds):
    (row,) = comparison_table(seeds).rows
    assert row[0].endswith("seeds 0, 1, 2") and row[1] == "K = 2" and row[3].startswith("-2.5")
    (record,) = csv.DictReader(to_csv(comparison_table(seeds)).splitlines())
    assert record["a"].count(".json") == 3


def test_the_same_seed_twice_is_not_pooled(tmp_path):
    """With and without --strict_exec."""
    save(tmp_path, task="humaneval", seed=1)
    save(tmp_path, task="humaneval", seed=1, strict_exec=True, tag="strict")
    results = read_all([tmp_path])[0]
    assert len(results) == 2 and pooled(results) == results


def test_an_empty_comparison_has_the_columns_of_a_full_one(tmp_path):
    for k in (1, 2):
        save(tmp_path, k=k)
    full = to_csv(comparison_table(read_all([tmp_path])[0])).splitlines()
    assert len(full) == 2 and to_csv(comparison_table([])).splitlines() == full[:1]


@pytest.mark.parametrize("other, warns", [("NVIDIA A100", True), ("NVIDIA H200", False)])
def test_a_comparison_across_machines_says_that_accuracy_may_differ(tmp_path, other, warns):
    """77.5 on one GPU and 72.8 on another have been reported for one setting."""
    save(tmp_path, k=1)
    save(tmp_path, k=2, machine=other)
    results = read_all([tmp_path])[0]
    table = comparison_table(results)
    assert table.rows[0][-1].endswith("(different machines)") is warns
    assert any("Accuracy may differ by machine too" in note for note in table.notes) is warns
    assert any("Accuracy may differ" in note for note in result_table(results).notes) is warns
    (record,) = csv.DictReader(to_csv(table).splitlines())
    assert (record["machine_a"], record["machine_b"]) == ("NVIDIA H200", other)
    assert "different" not in record["verdict"]


def test_texts_made_elsewhere_have_no_machine(tmp_path):
    one = save(tmp_path, k=1)
    save(tmp_path, predictions="abc", machine="?", tag="texts")
    results = sorted(read_all([tmp_path])[0], key=lambda r: r.path != one)
    (row,) = comparison_table(results, [tuple(results)]).rows
    assert not row[-1].endswith("(different machines)")
    assert craft(predictions="abc")[0]["config"].get("seed") is None
