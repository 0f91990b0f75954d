"""Any other generation task of lm-eval's, by its name."""

import contextlib
import json
import random
import re
import shutil
import sys
import time
from pathlib import Path

import datasets
import pytest
from lm_eval.api.filter import FilterEnsemble
from lm_eval.api.task import ConfigurableTask
from mini import LLADA

import eval as cli
import models
from experiment import lmeval
from experiment.sample import samples_of
from tasks import build_task, installed
from tasks.installed import members_of, spec_of

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


def test_a_changed_definition_scores_the_kept_samples_anew(hub, tmp_path, monkeypatch, capsys):
    """A result was finished for ever, whatever became of its filters and metrics."""
    folder = Path(shutil.copytree(installed.tasks_dir() / "gsm8k", tmp_path / "tasks" / "gsm8k"))
    monkeypatch.setattr(installed, "tasks_dir", lambda: tmp_path / "tasks")
    installed.members_of.cache_clear()
    words = ("gsm8k_cot_zeroshot", "--limit", "2")
    assert run(tmp_path / "out", *words) == 0
    [path] = (tmp_path / "out").glob("*.json")
    first = json.loads(path.read_text())
    assert run(tmp_path / "out", *words) == 0 and "finished already" in capsys.readouterr().err
    definition = folder / "gsm8k-cot-zeroshot.yaml"
    definition.write_text(definition.read_text().replace("strict-match", "strictest"))
    monkeypatch.setattr(models, "load_model", None)  # nothing is decoded
    assert run(tmp_path / "out", *words) == 0
    again = json.loads(path.read_text())
    assert again["headline"]["metric"] == "exact_match,strictest"
    assert again["generation_id"] == first["generation_id"] and again["id"] != first["id"]
    installed.members_of.cache_clear()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm8k_cot_zerosho", "no such task; did you mean 'gsm8k_cot_zeroshot'?"),
        ("GSM8K", "no such task; did you mean 'gsm8k'?"),
        ("x" * 3000, "the installed lm-eval has no such task"),
        ("wikitext", "asks for loglikelihood_rolling, the likelihood of whole documents"),
        ("agieval", "agieval_gaokao_biology and agieval_gaokao_mathcloze differ in output_type"),
        ("math_word_problems", "differ in filter_list"),  # a tag
        ("glue", "lm-eval's task cola has no score that is a mean over the answers: mcc"),
        ("squadv2", "is a class in Python"),
        ("wmt16-en-ro", "no score that is a mean over the answers: bleu, ter, chrf"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--dry_run",)])
def test_a_task_that_cannot_be_run_is_refused_before_it_is_loaded(
    tmp_path, capsys, monkeypatch, name, message, more
):
    """It was found out after a download, and passed --dry_run."""
    monkeypatch.setattr("tasks.installed._load", None)
    assert run(tmp_path, name, *more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) < 400


def test_every_installed_task_is_found_as_lm_eval_finds_it():
    """One in seven has quoted keys, "task": "name", and was said to be missing."""
    [member] = members_of("bbh_cot_zeroshot_boolean_expressions")
    config = member.config
    assert member.path.name == "boolean_expressions.yaml"
    assert config["output_type"] == "generate_until" and config["num_fewshot"] == 0
    assert config["dataset_name"] == "boolean_expressions"


@pytest.mark.parametrize(
    ("name", "n", "first", "last"),
    [
        (
            "mmlu",
            57,
            ("mmlu_abstract_algebra", "mmlu_stem"),
            ("mmlu_world_religions", "mmlu_humanities"),
        ),
        ("bbh", 27, ("bbh_cot_fewshot_boolean_expressions",), ("bbh_cot_fewshot_word_sorting",)),
        ("ai2_arc", 2, ("arc_challenge",), ("arc_easy",)),  # a tag
        ("hendrycks_ethics", 5, ("ethics_cm",), ("ethics_virtue",)),
    ],
)
def test_the_tasks_of_a_group_are_those_of_lm_eval(name, n, first, last):
    members = members_of(name)
    assert len(members) == n and not spec_of(f"lm_eval:{name}").n_docs
    for member, (task, *parts) in ((members[0], first), (members[-1], last)):
        assert (member.name, [g for g in member.groups if g != name]) == (task, parts)


def test_a_group_changes_what_its_definition_says():
    [member] = [m for m in members_of("mmlu_continuation") if m.name.endswith("_anatomy")]
    assert member.config["output_type"] == "multiple_choice"
    changes = {m.name: m.changes for m in members_of("multimedqa")}
    assert changes["mmlu_anatomy"]["task_alias"] == "anatomy (mmlu)"


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("ifeval", "inst_level_strict_acc, inst_level_loose_acc: left out, no mean"),
        ("gpqa_main_cot_n_shot", "0 worked examples unless --num_fewshot"),
    ],
)
def test_what_a_task_leaves_open_is_noted(tmp_path, capsys, name, note):
    assert run(tmp_path, name, "--dry_run", "--data_dir", "/nowhere") == 0
    out = capsys.readouterr().out
    assert note in out and "note: data_dir /nowhere has no effect" in out


@pytest.mark.parametrize("name", ["humaneval", "humaneval_64", "mbpp"])
def test_generated_code_is_never_run_in_this_process(hub, tmp_path, capsys, name):
    """lm-eval's own scorer would execute the code here, and its import alone asks the hub.

    humaneval_64 gets `unsafe_code` from a definition that it includes.
    """
    assert run(tmp_path, name) == 2
    assert (
        f"{name} runs generated code without a sandbox; "
        f"use --task {'mbpp' if 'mbpp' in name else 'humaneval'}" in capsys.readouterr().err
    )


def test_predictions_are_for_the_four_benchmarks(tmp_path, capsys):
    assert run(tmp_path, "triviaqa", "--predictions", "x.jsonl") == 2
    assert "--predictions: not for lm_eval:triviaqa, only for humaneval" in capsys.readouterr().err


def swallow():
    with contextlib.suppress(Exception):  # as metrics do
        re.match(r"(a+)+b", "a" * 40)  # takes a day


@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: sys.exit(3), "SystemExit: 3"),
        (lambda: {"exact_match": float("nan")}, "ValueError: exact_match is nan"),
        (lambda: {"exact_match": [1]}, "TypeError: "),
        (swallow, "it takes more than 0.3 seconds"),
        (lambda: time.sleep(5), "it takes more than 0.3 seconds"),
    ],
)
@pytest.mark.parametrize("where", ["metric", "filter"])
def test_an_answer_that_a_metric_cannot_score_is_an_error_of_its_own(
    hub, tmp_path, capsys, monkeypatch, metric, reason, where
):
    """One answer stopped the run, or hung it, after all had been generated."""
    monkeypatch.setattr(lmeval, "SCORING_S", 0.3)
    scored = ConfigurableTask.process_results

    def process_results(self, doc, results):
        return metric() if doc == ROWS[1] else scored(self, doc, results)

    def apply(self, instances):
        if any(instance.doc == ROWS[1] for instance in instances):
            metric(), 1 / 0
        for instance in instances:
            instance.filtered_resps[self.name] = instance.resps[0]

    if where == "metric":
        monkeypatch.setattr(ConfigurableTask, "process_results", process_results)
    else:
        monkeypatch.setattr(FilterEnsemble, "apply", apply)
        reason = reason if "nan" not in reason and "TypeError" not in reason else "ZeroDivision"
    began = time.monotonic()
    assert run(tmp_path, "gsm8k_cot_zeroshot") == 5 and time.monotonic() - began < 4
    [path] = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert (result["status"], result["n_samples"], result["n_failed"]) == ("incomplete", 3, 1)
    assert result["score_on_completed"]["exact_match,strict-match"]["n"] == 2
    row = result["samples"][1]
    assert row["status"] == "error" and "metrics" not in row and row["token_ids"]
    assert row["error"].splitlines()[-1].startswith(f"the answer cannot be scored: {reason}")
    assert "the answer cannot be scored" in capsys.readouterr().out
    assert len(samples_of(result)) == 3  # nothing has to be decoded again


def test_answers_that_cannot_be_scored_at_all_end_a_run_with_5(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(ConfigurableTask, "process_results", lambda *_: 1 / 0)
    assert run(tmp_path, "gsm8k_cot_zeroshot") == 5
    [path] = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["n_failed"] == 3


def test_a_score_that_is_no_mean_is_left_out(hub, tmp_path, monkeypatch):
    """IFEval's second metric is a list for each answer: the run ended with a TypeError."""
    scored = ConfigurableTask.process_results

    def process_results(self, doc, results):
        self.aggregation().setdefault("inst_level_strict_acc", lambda lists: sum(map(sum, lists)))
        return scored(self, doc, results) | {"inst_level_strict_acc": [True, False]}

    monkeypatch.setattr(ConfigurableTask, "process_results", process_results)
    assert run(tmp_path, "gsm8k_cot_zeroshot") == 0
    [path] = tmp_path.glob("*.json")
    assert list(json.loads(path.read_text())["samples"][0]["metrics"]) == [
        "exact_match,strict-match",
        "exact_match,flexible-extract",
    ]


def test_a_group_is_one_run_with_the_score_of_each_task(monkeypatch, tmp_path):
    """It was refused."""
    rows = datasets.Dataset.from_list(
        [{"context": f"Unscramble {i}", "completion": "word"} for i in range(3)]
    )
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(validation=rows)
    )
    assert run(tmp_path, "unscramble", "--limit", "6") == 0
    [path] = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    names = "anagrams1 anagrams2 cycle_letters random_insertion reversed_words".split()
    counts = {key: e["n"] for key, e in result["metrics"].items()}
    assert counts == {"exact_match,none": 6, "exact_match/anagrams1,none": 2} | {
        f"exact_match/{name},none": 1 for name in names[1:]
    }
    assert result["headline"]["metric"] == "exact_match,none"
    assert any("lm-eval has no mean of this group" in note for note in result["notes"])


def test_a_group_of_multiple_choice_scores_each_task(monkeypatch):
    row = {
        "id": "1",
        "question": "What is red?",
        "choices": {"text": ["blood", "snow"], "label": ["A", "B"]},
        "answerKey": "A",
    }
    rows = datasets.Dataset.from_list([row])
    splits = datasets.DatasetDict(train=rows, validation=rows, test=rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
    spec = spec_of("lm_eval:ai2_arc")
    assert spec.kind == "choice" and spec.foreign
    task = build_task(spec, None, "lm_eval")
    task.build_all_requests()
    assert task.OUTPUT_TYPE == "multiple_choice"
    assert [one.args for one in task.instances] == [
        ("Question: What is red?\nAnswer:", " blood"),
        ("Question: What is red?\nAnswer:", " snow"),
    ] * 2
    right, wrong = [(-1.0, False), (-9.0, False)], [(-9.0, False), (-1.0, False)]
    first, second = task.eval_docs
    assert task.process_results(first, right)["acc/arc_challenge"] == 1.0
    assert task.process_results(second, wrong) == {
        "acc": 0.0,
        "acc_norm": 0.0,
        "acc/arc_easy": 0.0,
        "acc_norm/arc_easy": 0.0,
    }


def test_options_that_lm_eval_shuffles_with_the_global_generator_stay_as_they_are(monkeypatch):
    """Each look at the documents gave GPQA's options another order."""
    row = {"Question": "Which?", "Correct Answer": "right"}
    row |= {f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}
    rows = datasets.Dataset.from_list([row | {"Question": f"Which {i}?"} for i in range(8)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=rows))
    spec, state = spec_of("lm_eval:gpqa_main_zeroshot"), random.getstate()
    task = build_task(spec, None, "lm_eval")
    docs = [dict(doc) for doc in task.eval_docs]
    assert docs == [dict(doc) for doc in task.eval_docs]
    assert docs == [dict(doc) for doc in build_task(spec, None, "lm_eval").eval_docs]
    assert random.getstate() == state and len({doc["answer"] for doc in docs}) > 1
