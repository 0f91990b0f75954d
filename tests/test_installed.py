"""Any other generation task of lm-eval's, by its name."""

import json

import datasets
import pytest
from mini import LLADA

import eval as cli
from tasks.installed import definition_of

ROWS = [{"question": f"What is {i} + 1?", "answer": f"{i + 1}\n#### {i + 1}"} for i in range(3)]


def run(tmp_path, name, *more):
    return cli.main(
        [
            "--model_alias",
            "llada",
            "--llada_ckpt",
            str(LLADA),
            "--task",
            f"lm_eval:{name}",
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--gen_length",
            "32",
            "--tokens_per_step",
            "8",
            "--output_dir",
            str(tmp_path),
            *more,
        ]
    )


@pytest.fixture
def hub(monkeypatch):
    """The hub's gsm8k, small."""
    rows = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=rows, test=rows)
    )


def test_another_generation_task_runs_by_its_name(hub, tmp_path):
    assert run(tmp_path, "gsm8k_cot_zeroshot", "--limit", "2") == 0
    [path] = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert path.name == "llada_lm_eval-gsm8k_cot_zeroshot_low_confidence_tps8_float32_limit2.json"
    assert (
        result["headline"]["metric"] == "exact_match,strict-match" and result["reference"] is None
    )
    assert any("nothing official is known" in note for note in result["notes"])
    assert "Let's think step by step" in result["samples"][0]["prompt"] and result["n_samples"] == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nosuch", "defines no task 'nosuch'"),
        ("hellaswag", "asks for multiple_choice; only generation tasks can be run"),
    ],
)
def test_a_task_that_cannot_be_run_is_refused(hub, tmp_path, capsys, monkeypatch, name, message):
    if name == "hellaswag":
        rows = [
            {
                "ind": 1,
                "activity_label": "a",
                "ctx_a": "b",
                "ctx_b": "c",
                "ctx": "b c",
                "endings": ["x", "y"],
                "label": "0",
                "query": "q",
                "choices": ["x", "y"],
                "gold": 0,
            }
        ]
        table = datasets.Dataset.from_list(rows)
        monkeypatch.setattr(
            datasets,
            "load_dataset",
            lambda *_, **__: datasets.DatasetDict(train=table, validation=table),
        )
    assert run(tmp_path, name) == 4
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize("name", ["humaneval", "humaneval_64", "mbpp"])
def test_generated_code_is_never_run_in_this_process(hub, tmp_path, capsys, name):
    """lm-eval's own scorer would execute the code here, and its import alone asks the hub.

    humaneval_64 gets `unsafe_code` from a definition that it includes.
    """
    assert run(tmp_path, name) == 4
    assert (
        f"{name} runs generated code in this process; --task humaneval and mbpp run it apart"
        in capsys.readouterr().err
    )


def test_the_definition_is_found_without_building_an_index():
    assert definition_of("gsm8k_cot_zeroshot").name == "gsm8k-cot-zeroshot.yaml"
    assert definition_of("gsm8k_cot_zero") is None


def test_predictions_are_for_the_four_benchmarks(tmp_path, capsys):
    assert run(tmp_path, "triviaqa", "--predictions", "x.jsonl") == 2
    assert "--predictions: only for humaneval" in capsys.readouterr().err
