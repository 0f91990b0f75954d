"""Benchmarks of multiple choice: requests and scores on rows in the originals' formats."""

import csv
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import load_yaml_config

from eval import TASKS
from experiment.result import metrics_of
from tasks import DataError, build_task, check_data, load_data
from tasks.base import tasks_dir

FORM = "lm_eval"


def arc(i: int) -> dict:
    texts, labels = [f"{i} metres", f"{i + 1} metres", "none"], ["A", "B", "C"]
    return {
        "id": f"Mercury_{i}",
        "question": f"How long is rod {i}?",
        "choices": {"text": texts, "label": labels},
        "answerKey": "ABC"[i % 3],
    }


def mmlu(subject: str, i: int) -> dict:
    choices = [f"{subject} {i + j}" for j in range(4)]
    return {"question": f" Q{i}? ", "subject": subject, "choices": choices, "answer": i % 4}


def winogrande(i: int) -> dict:
    sentence = f"Ann gave Bea book {i} because _ had read it."
    return {
        "sentence": sentence,
        "option1": "Ann",
        "option2": "Bea",
        "answer": str(1 + i % 2),
    }


def piqa(i: int) -> dict:
    return {"goal": f"Open jar {i}.", "sol1": "Turn the lid.", "sol2": "Eat it.", "label": i % 2}


def truthfulqa(i: int) -> dict:
    mc1 = {"choices": ["No.", f"Yes, {i}.", "At noon."], "labels": [1, 0, 0]}
    mc2 = {"choices": ["No.", "Never.", f"Yes, {i}."], "labels": [1, 1, 0]}
    return {"question": f"Do cows fly {i} times?", "mc1_targets": mc1, "mc2_targets": mc2}


def hellaswag(i: int) -> dict:
    return {
        "ind": i,
        "activity_label": "Cooking",
        "ctx_a": f"[header] A man boils egg {i}.",
        "ctx_b": "the man",
        "ctx": "...",
        "endings": ["eats it.", "sings [step] a song.", "leaves.", "sleeps."],
        "source_id": "x",
        "split": "val",
        "split_type": "indomain",
        "label": str(i % 4),
    }


def gpqa(i: int) -> dict:
    wrong = {f"Incorrect Answer {j}": f"wrong {j} of {i} [note]" for j in (1, 2, 3)}
    return {"Record ID": str(i), "Question": f"Which {i}?", "Correct Answer": f"right {i}"} | wrong


ROWS = {
    "arc_easy.jsonl": [arc(i) for i in range(4)],
    "arc_easy_train.jsonl": [arc(i) for i in range(10, 18)],
    "arc_challenge.jsonl": [arc(i) for i in range(4)],
    "hellaswag.jsonl": [hellaswag(i) for i in range(4)],
    "winogrande.jsonl": [winogrande(i) for i in range(4)],
    "winogrande_train.jsonl": [winogrande(i) for i in range(10, 20)],
    "piqa.jsonl": [piqa(i) for i in range(4)],
    "truthfulqa_mc.jsonl": [truthfulqa(i) for i in range(4)],
    "mmlu.jsonl": [mmlu("virology", i) for i in range(3)] + [mmlu("anatomy", 0)],
    "mmlu_dev.jsonl": [mmlu(s, 10 + i) for s in ("anatomy", "virology") for i in range(5)],
    "gpqa_main.csv": [gpqa(i) for i in range(8)],
}


def write(folder: Path, name: str, rows: list[dict]) -> None:
    with open(folder / name, "w", encoding="utf-8", newline="") as file:
        if name.endswith(".csv"):
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("choice")
    for name, rows in ROWS.items():
        write(folder, name, rows)
    counts = {name: len(rows) for name, rows in ROWS.items()}
    (folder / "manifest.json").write_text(json.dumps({"name": "own", "counts": counts}))
    return folder


def requests(task, num_fewshot: int) -> list[tuple]:
    task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    return [(one.doc_id, one.idx, *one.args) for one in task.instances]


def by_lm_eval(yaml: str, splits: dict[str, list[dict]]):
    """lm-eval's own task of a definition, on these rows."""

    class Own(ConfigurableTask):
        def download(self, *_, **__):
            self.dataset = datasets.DatasetDict(
                {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
            )

    return Own(config=load_yaml_config(str(tasks_dir() / yaml)))


@pytest.mark.parametrize(
    ("task", "yaml", "splits", "n"),
    [
        ("arc_easy", "arc/arc_easy.yaml", {"test": "", "train": "_train", "validation": ""}, 0),
        ("arc_easy", "arc/arc_easy.yaml", {"test": "", "train": "_train", "validation": ""}, 3),
        ("arc_challenge", "arc/arc_challenge.yaml", dict.fromkeys(("test", "train"), ""), 0),
        ("hellaswag", "hellaswag/hellaswag.yaml", dict.fromkeys(("validation", "train"), ""), 0),
        ("winogrande", "winogrande/default.yaml", {"validation": "", "train": "_train"}, 0),
        ("winogrande", "winogrande/default.yaml", {"validation": "", "train": "_train"}, 5),
        ("piqa", "piqa/piqa.yaml", dict.fromkeys(("validation", "train"), ""), 0),
        ("truthfulqa_mc1", "truthfulqa/truthfulqa_mc1.yaml", {"validation": ""}, 0),
        ("truthfulqa_mc2", "truthfulqa/truthfulqa_mc2.yaml", {"validation": ""}, 0),
    ],
)
def test_requests_and_scores_are_those_of_lm_eval_s_own_definition(data, task, yaml, splits, n):
    spec = TASKS[task]
    assert check_data(spec, data) == [] and spec.kind == "choice"
    ours = build_task(spec, data, FORM, n)
    stem = spec.files[0].removesuffix(".jsonl")
    theirs = by_lm_eval(yaml, {s: ROWS[f"{stem}{end}.jsonl"] for s, end in splits.items()})
    assert ours.OUTPUT_TYPE == "multiple_choice" and ours.data.name == "own"
    assert requests(ours, n) == requests(theirs, n)
    draw = random.Random(5)
    for mine, other in zip(ours.eval_docs, theirs.eval_docs, strict=True):
        n_options = len(ours.doc_to_choice(mine))
        found = [(draw.uniform(-9, 0), False) for _ in range(n_options)]
        assert ours.process_results(mine, found) == theirs.process_results(other, found)


def test_accuracy_of_known_likelihoods(data):
    """acc takes the greatest log-likelihood; acc_norm the greatest per character."""
    task = build_task(TASKS["arc_easy"], data, FORM)
    doc = task.eval_docs[0]  # right: "0 metres", of 8 characters; "none" has 4
    scores = task.process_results(doc, [(-7.0, False), (-9.0, False), (-6.0, False)])
    assert scores == {"acc": 0.0, "acc_norm": 1.0} and TASKS["arc_easy"].target(doc) == "0 metres"
    task = build_task(TASKS["truthfulqa_mc2"], data, FORM)
    lls = [(math.log(p), False) for p in (0.1, 0.2, 0.3)]
    assert task.process_results(task.eval_docs[0], lls)["acc"] == pytest.approx(0.5)
    assert TASKS["truthfulqa_mc2"].target(task.eval_docs[0]) == ["No.", "Never."]
    task = build_task(TASKS["winogrande"], data, FORM)  # the option stands in the context
    assert requests(task, 0)[:2] == [
        (0, 0, "Ann gave Bea book 0 because Ann", " had read it."),
        (0, 1, "Ann gave Bea book 0 because Bea", " had read it."),
    ]
    for name, right in (("hellaswag", "eats it."), ("piqa", "Turn the lid."), ("gpqa", "right 0")):
        task = build_task(TASKS[name], data, FORM)
        assert TASKS[name].target(task.eval_docs[0]) == right


def test_mmlu_is_one_run_with_a_score_for_each_subject_and_part(data):
    spec = TASKS["mmlu"]
    task = build_task(spec, data, FORM, 5)
    asked = requests(task, 5)
    # subjects take turns, so that --limit 2 has one document of each
    assert [doc["subject"] for doc in task.eval_docs] == ["anatomy"] + ["virology"] * 3
    for subject in ("anatomy", "virology"):  # worked examples and heading are the subject's own
        rows = {
            split: [row for row in ROWS[name] if row["subject"] == subject]
            for split, name in (("test", "mmlu.jsonl"), ("dev", "mmlu_dev.jsonl"))
        }
        theirs = by_lm_eval(f"mmlu/default/mmlu_{subject}.yaml", rows)
        own = [request[1:] for request in asked if f"about {subject}." in request[2]]
        assert own == [request[1:] for request in requests(theirs, 5)]
    logged = []
    for doc_id, doc in enumerate(task.eval_docs):
        lls = [(-1.0 if i == 0 else -2.0, False) for i in range(4)]  # A is always chosen
        for filters in task._filters:
            scores = task.process_results(doc, lls)
            logged.append({"doc_id": doc_id, "filter": filters.name, "metrics": list(scores)})
            logged[-1] |= scores
    means = {key: (e.value, e.n) for key, e in metrics_of(logged).items()}
    assert means == {
        "acc,none": (0.5, 4),  # over all documents, as lm-eval weighs
        "acc/mmlu_anatomy,none": (1.0, 1),
        "acc/mmlu_stem,none": (1.0, 1),
        "acc/mmlu_virology,none": (pytest.approx(1 / 3), 3),
        "acc/mmlu_other,none": (pytest.approx(1 / 3), 3),
    }
    assert set(task.aggregation()) == {key.removesuffix(",none") for key in means}
    assert spec.target(task.eval_docs[0]) == {"subject": "anatomy", "right": "anatomy 0"}


def test_filters_of_a_group_are_those_of_each_member(data):
    task = build_task(TASKS["mmlu"], data, FORM)
    requests(task, 0)
    for i, one in enumerate(task.instances):
        one.resps = [(-float(i), False)]
    task.apply_filters()
    assert [one.filtered_resps["none"] for one in task.instances] == [
        (-float(i), False) for i in range(16)
    ]


def test_an_unknown_subject_is_named(tmp_path):
    write(tmp_path, "mmlu.jsonl", [mmlu("alchemy", 1)])
    (tmp_path / "manifest.json").write_text('{"name": "x", "counts": {"mmlu.jsonl": 1}}')
    with pytest.raises(DataError, match="MMLU has no subject 'alchemy'"):
        build_task(TASKS["mmlu"], tmp_path, FORM)


def test_gpqa_s_options_depend_on_the_question_alone(data, tmp_path):
    """lm-eval shuffles with the global generator, or with one that all documents share."""
    random.seed(1)
    state = random.getstate()
    whole = build_task(TASKS["gpqa"], data, FORM)
    assert random.getstate() == state
    write(tmp_path, "gpqa_main.csv", ROWS["gpqa_main.csv"][5:])
    (tmp_path / "manifest.json").write_text('{"name": "x", "counts": {"gpqa_main.csv": 3}}')
    part = build_task(TASKS["gpqa"], tmp_path, FORM)
    assert list(part.eval_docs) == list(whole.eval_docs)[5:]
    letters = set()
    for i, doc in enumerate(whole.eval_docs):
        options = [doc[f"choice{j}"] for j in (1, 2, 3, 4)]
        assert sorted(options) == [f"right {i}", *(f"wrong {j} of {i} " for j in (1, 2, 3))]
        assert options["(A)(B)(C)(D)".index(doc["answer"]) // 3] == f"right {i}"
        letters.add(doc["answer"])
    assert len(letters) > 1
    (first, *_, last) = requests(whole, 0)[:4]
    assert first[2].startswith(
        "What is the correct answer to this question:Which 0?\nChoices:\n(A)"
    )
    assert (first[3], last[3]) == (" (A)", " (D)")
    shots = requests(build_task(TASKS["gpqa"], data, "n_shot"), 5)[0][2]
    assert shots.count("\nChoices:\n") == 6 and shots.count("Which 0?") == 1
    assert requests(build_task(TASKS["gpqa"], data, FORM, 7), 7)[0][2].count("\nChoices:\n") == 8
    with pytest.raises(DataError, match="--num_fewshot 8: gpqa has 7 worked examples; give at"):
        build_task(TASKS["gpqa"], data, FORM, 8)


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("arc_easy", arc(0) | {"answerKey": "E"}, "'answerKey': 'E' is none of the labels"),
        ("arc_easy", arc(0) | {"choices": ["a", "b"]}, "field 'choices': expected"),
        ("hellaswag", hellaswag(0) | {"label": ""}, "field 'label' is empty"),
        ("winogrande", winogrande(0) | {"answer": "3"}, "field 'answer' does not match"),
        ("piqa", piqa(0) | {"label": -1}, "field 'label': expected 0 or 1, got -1"),
        ("mmlu", mmlu("anatomy", 0) | {"answer": 4}, "expected 4 options and 0 to 3, got 4 and 4"),
        (
            "truthfulqa_mc1",
            truthfulqa(0) | {"mc1_targets": {"choices": ["a", "b"], "labels": [0, 1]}},
            "field 'mc1_targets': expected options with the true ones first",
        ),
        (
            "truthfulqa_mc2",
            truthfulqa(0) | {"mc2_targets": {"choices": ["a", "b"], "labels": [1, 1]}},
            "field 'mc2_targets': expected",
        ),
    ],
)
def test_a_malformed_row_is_named(tmp_path, name, row, problem):
    spec = TASKS[name]
    write(tmp_path, spec.files[0], [row])
    (tmp_path / "manifest.json").write_text('{"name": "x", "counts": {}}')
    [found] = check_data(spec, tmp_path)
    assert found.startswith(f"{tmp_path / spec.files[0]}, line 1: ") and problem in found


def test_a_file_of_worked_examples_is_only_needed_for_worked_examples(data, tmp_path):
    spec = TASKS["arc_easy"]
    write(tmp_path, "arc_easy.jsonl", ROWS["arc_easy.jsonl"])
    [found] = check_data(spec, tmp_path)
    assert found.endswith("arc_easy.jsonl: 4 rows, expected 2376")
    (tmp_path / "manifest.json").write_text('{"name": "x", "counts": {"arc_easy.jsonl": 4}}')
    assert check_data(spec, tmp_path) == [] and len(build_task(spec, tmp_path, FORM).eval_docs) == 4
    with pytest.raises(
        DataError, match=r"0 worked examples; they come from .*arc_easy_train.jsonl, which"
    ):
        build_task(spec, tmp_path, FORM, 5)
    with pytest.raises(
        DataError, match="--num_fewshot 9: arc_easy has 8 worked examples; give at most 8$"
    ):
        build_task(spec, data, FORM, 9)


def test_the_hub_gives_the_splits_that_are_asked_for(monkeypatch):
    """MMLU's data set has 100,000 training questions, which no prompt uses."""
    rows = {
        "test": [mmlu("anatomy", 1)],
        "dev": [mmlu("anatomy", 2)],
        "auxiliary_train": [mmlu("", 3)],
    }
    monkeypatch.setattr("tasks.data._parquet_splits", lambda repo, config: (rows, f"{repo}@1"))
    spec = replace(TASKS["mmlu"], n_docs=1)
    found = load_data(spec, None)
    assert (found.name, found.origin) == ("hub", "cais/mmlu@1")
    assert found.splits == {"test": rows["test"], "dev": rows["dev"]}


def test_truthfulqa_of_the_hub_keeps_the_rows_that_were_read(monkeypatch):
    """The rows of the task were other ones, and the run ended with "data set has changed"."""
    row = {"question": " Q? ", "best_answer": "No", "correct_answers": ["No"]}
    row |= {"incorrect_answers": ["Yes"], "type": "", "category": "", "source": ""}
    monkeypatch.setattr(
        "tasks.data._parquet_splits", lambda *_: ({"validation": [dict(row)]}, "truthful_qa@1")
    )
    spec = replace(TASKS["truthfulqa"], n_docs=1)
    task = build_task(spec, None, "chat")
    assert task.data == load_data(spec, None)
    assert task.eval_docs[0]["correct_answers"] == ["No.", "I have no comment."]
