"""The embedded mini benchmarks: reproducible, solvable, and disjoint from the training problems."""

import csv
import gzip
import json
import re
from collections import Counter
from itertools import chain, islice, zip_longest

import pytest
from mini import ROOT

from dev import make_benchmarks, train_tiny
from eval import TASKS
from models import check_checkpoint, load_model
from tasks import build_task, check_data
from tasks.lines import right_lines
from utils import lines_names

FOLDER = ROOT / "assets" / "benchmarks"


def lines(name: str) -> list[dict]:
    opener = gzip.open if name.endswith(".gz") else open
    with opener(FOLDER / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_the_committed_files_are_what_the_script_writes():
    """Byte for byte; a compressed file after decompression, since zlib versions differ."""
    for name, content in make_benchmarks.benchmark_files().items():
        unpacked = gzip.decompress if name.endswith(".gz") else bytes
        assert unpacked((FOLDER / name).read_bytes()) == unpacked(content), name


@pytest.mark.slow
def test_more_problems_are_a_set_of_another_name(tmp_path, capsys):
    assert make_benchmarks.main(["--out", str(tmp_path), "--n", "500"]) == 0
    for task in ("humaneval", "mbpp", "gsm8k", "truthfulqa", "lines"):
        assert check_data(TASKS[task], tmp_path) == []
        built = build_task(TASKS[task], tmp_path, "chat")
        assert built.data.name == "dllmexp-mini-500" and len(built.eval_docs) == 500
    rows = (tmp_path / "gsm8k/test.jsonl").read_text().splitlines()
    assert len(set(rows)) == 500
    assert [json.loads(row) for row in rows[:150]] == lines("gsm8k/test.jsonl")


@pytest.mark.parametrize(
    "options",
    [
        ["--n", "400"],
        ["--n", "400", "--out", "assets/../assets/benchmarks"],
        ["--n", "0", "--out", "x"],
        ["--n", "501", "--out", "x"],
    ],
)
def test_the_project_s_own_set_is_not_overwritten(options, monkeypatch, tmp_path, capsys):
    (tmp_path / "assets" / "benchmarks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(make_benchmarks, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        make_benchmarks.main(options)
    assert "--n " in capsys.readouterr().err
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("task", sorted(set(make_benchmarks.TASKS) - set(make_benchmarks.KEYS)))
def test_the_files_pass_the_harness_s_own_checks(task):
    assert check_data(TASKS[task], FOLDER) == []
    spec = TASKS[task]
    assert build_task(spec, FOLDER, spec.default_form).data.name == "dllmexp-mini"


@pytest.mark.slow
@pytest.mark.parametrize("task", make_benchmarks.TASKS)
def test_no_test_problem_among_the_training_ones(task):
    """Neither the question nor its key: its numbers, or its constant and function name."""

    def question(problem) -> list:
        return [problem.row.get(k) for k in ("question", "prompt", "text", "Question", "line")]

    asked = make_benchmarks.test_problems(task)
    keys = {p.key for p in asked}
    questions = {json.dumps(question(p)) for p in asked}
    different = questions if task in make_benchmarks.KEYS else keys
    assert len(different) == len(asked) == make_benchmarks.N_TEST
    same = {task, make_benchmarks.KEYS.get(task, task)}
    same |= {other for other, key in make_benchmarks.KEYS.items() if key == task}
    for p in chain(*(islice(make_benchmarks.problems(t, "train", 0), 20_000) for t in same)):
        assert p.key not in keys
        # the text of an mbpp problem lacks the function's name, which is part of the key
        assert task == "mbpp" or json.dumps(question(p)) not in questions


def test_the_training_files_hold_no_test_question():
    train = {row["question"] for row in lines("gsm8k/train.jsonl")}
    assert not train & {row["question"] for row in lines("gsm8k/test.jsonl")}
    rows = lines("mbpp.jsonl")
    test = {row["code"] + row["text"] for row in rows if 11 <= row["task_id"] <= 510}
    assert len(test) == 150
    assert not test & {row["code"] + row["text"] for row in rows if not 11 <= row["task_id"] <= 510}


def test_canonical_solutions_pass_their_tests():
    for row in lines("HumanEval.jsonl.gz"):
        program = row["prompt"] + row["canonical_solution"]
        exec(f"{program}\n{row['test']}\ncheck({row['entry_point']})", {})
    for row in lines("mbpp.jsonl"):
        exec("\n".join([row["code"], *row["test_list"]]), {})


def answers(task: str, n: int = 300) -> list[tuple[make_benchmarks.Problem, str]]:
    return [(p, p.answer) for p in islice(make_benchmarks.problems(task, "train", 1), n)]


def test_every_form_of_an_answer_is_right():
    """The models learn them; the scorers accept all."""
    for p, text in answers("gsm8k"):
        number = re.sub("[^0-9]", "", text.split("####")[1])
        assert number == re.sub("[^0-9]", "", p.row["answer"].split("####")[1]), text
    for task, test in (("humaneval", "test"), ("mbpp", "test_list")):
        for p, text in answers(task):
            names: dict = {}
            exec(text.removeprefix("```python").removesuffix("```"), names)
            exec(p.row[test] if test == "test" else "\n".join(p.row[test]), names)
            if test == "test":
                names["check"](names[p.row["entry_point"]])
    for p, text in answers("truthfulqa"):
        assert text.removesuffix(".") in p.row["Correct Answers"].split("; ")
        assert text.removesuffix(".") not in p.row["Incorrect Answers"].split("; ")
    for p, text in answers("lines"):
        assert ", ".join(lines_names(text)) in right_lines(p.row)
    for task in make_benchmarks.KEYS:
        for p, text in answers(task):
            options = p.row["choices"]
            assert dict(zip(options["label"], options["text"]))[p.row["answerKey"]] == text.strip()
            assert len(set(options["text"])) == len(options["text"]) >= 3


def test_a_mixture_of_right_forms_is_wrong():
    """The likeliest token of each place, of forms drawn 3 : 2 : 2, is none of the forms."""
    kinds = [kind for kind in make_benchmarks.KINDS if len(kind.forms) > 1]
    assert len(kinds) >= 8
    for kind in kinds:
        assert len(kind.forms) == 3
        tokens = [re.findall(r"\w+|[^\w\s]", form) for form in kind.forms]
        mixed = []
        for place in zip_longest(*tokens, fillvalue=""):
            votes = Counter()
            for token, weight in zip(place, (3, 2, 2)):
                votes[token] += weight
            mixed.append(max(votes, key=votes.get))
        assert [t for t in mixed if t] not in tokens, kind.docstring


def test_worked_answers_are_right():
    for row in [*lines("gsm8k/test.jsonl"), *lines("gsm8k/train.jsonl")]:
        *steps, last = row["answer"].split("\n")
        assert 1 <= len(steps) <= 3
        for step in steps:
            left, right = step.split("=")
            assert eval(left) == int(right)
        thousands = "thousand" in row["question"] and right != "0"
        assert last == f"#### {right}{',000' if thousands else ''}"


def test_a_question_s_best_answer_is_among_the_true_ones_only():
    with open(FOLDER / "TruthfulQA.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            true, false = (row[f"{kind} Answers"].split("; ") for kind in ("Correct", "Incorrect"))
            assert row["Best Answer"] in true and not set(true) & set(false)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llada", "dream", "qwen2"])
def test_the_trainer_learns_and_writes_a_checkpoint_that_loads(family, tmp_path, capsys):
    """The mean of the loss falls; a second call has nothing to do and writes the same weights."""
    out, state = tmp_path / "out", tmp_path / "state.pt"
    argv = ["--family", family, "--out", str(out), "--state", str(state), "--device", "cpu"]
    argv += ["--steps", "30", "--batch", "2", "--log_every", "1"]
    assert train_tiny.main(argv) == 0
    printed = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[3]) for line in printed if line.startswith("step ")]
    assert len(losses) == 30 and sum(losses[-5:]) / 5 < 0.9 * losses[0]
    weights = (out / "model.safetensors").read_bytes()
    assert check_checkpoint(out) == []
    load_model(str(out), device="cpu", dtype="float32")
    assert train_tiny.main(argv) == 0
    assert "resuming at step 30" in capsys.readouterr().out
    assert (out / "model.safetensors").read_bytes() == weights
