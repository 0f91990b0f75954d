"""The embedded mini benchmarks: reproducible, solvable, and disjoint from the training problems."""

import csv
import gzip
import json
from itertools import islice

import pytest
from mini import ROOT

from dev import make_benchmarks, train_tiny
from eval import TASKS
from models import check_checkpoint, load_model
from tasks import build_task, check_data

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


def test_more_word_problems_are_a_set_of_another_name(tmp_path, capsys):
    assert make_benchmarks.main(["--out", str(tmp_path), "--n_gsm8k", "400"]) == 0
    assert check_data(TASKS["gsm8k"], tmp_path) == []
    assert build_task(TASKS["gsm8k"], tmp_path, "chat").data.name == "dllmexp-mini-gsm8k-400"
    rows = (tmp_path / "gsm8k/test.jsonl").read_text().splitlines()
    assert len(set(rows)) == 400
    assert [json.loads(row) for row in rows[:150]] == lines("gsm8k/test.jsonl")
    assert (tmp_path / "mbpp.jsonl").read_bytes() == (FOLDER / "mbpp.jsonl").read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        ["--n_gsm8k", "400"],
        ["--n_gsm8k", "400", "--out", "assets/../assets/benchmarks"],
        ["--n_gsm8k", "0", "--out", "x"],
    ],
)
def test_the_project_s_own_set_is_not_overwritten(options, monkeypatch, tmp_path, capsys):
    (tmp_path / "assets" / "benchmarks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(make_benchmarks, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        make_benchmarks.main(options)
    assert "--n_gsm8k" in capsys.readouterr().err
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("task", make_benchmarks.TASKS)
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
    assert len(keys) == len(asked) == make_benchmarks.N_TEST[task]
    for p in islice(make_benchmarks.problems(task, "train", 0), 20_000):
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


def test_worked_answers_are_right():
    for row in [*lines("gsm8k/test.jsonl"), *lines("gsm8k/train.jsonl")]:
        *steps, last = row["answer"].split("\n")
        assert 1 <= len(steps) <= 3
        for step in steps:
            left, right = step.split("=")
            assert eval(left) == int(right)
        assert last == f"#### {right}"


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
    argv += ["--steps", "60", "--batch", "16", "--log_every", "1"]
    assert train_tiny.main(argv) == 0
    printed = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[3]) for line in printed if line.startswith("step ")]
    assert len(losses) == 60 and losses[-1] < 0.9 * losses[0]
    weights = (out / "model.safetensors").read_bytes()
    assert check_checkpoint(out) == []
    load_model(str(out), device="cpu", dtype="float32")
    assert train_tiny.main(argv) == 0
    assert "resuming at step 60" in capsys.readouterr().out
    assert (out / "model.safetensors").read_bytes() == weights
