"""The embedded mini benchmarks: what is committed is what the script makes, solvable, and apart from the training rows."""

import csv
import gzip
import json
import sys
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "dev"))

import make_benchmarks as mini  # noqa: E402

from eval import TASKS  # noqa: E402
from tasks import build_task, check_data  # noqa: E402

FOLDER = ROOT / "assets" / "benchmarks"


def lines(name: str) -> list[dict]:
    opener = gzip.open if name.endswith(".gz") else open
    with opener(FOLDER / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_the_committed_files_are_what_the_script_writes():
    """Byte for byte, the compressed one too."""
    for name, content in mini.benchmark_files().items():
        if name.endswith(".gz"):  # another zlib may compress otherwise
            assert gzip.decompress((FOLDER / name).read_bytes()) == gzip.decompress(content)
        else:
            assert (FOLDER / name).read_bytes() == content, name


def test_more_word_problems_are_a_set_of_another_name(tmp_path, capsys):
    assert mini.main(["--out", str(tmp_path), "--n_gsm8k", "400"]) == 0
    assert check_data(TASKS["gsm8k"], tmp_path) == []
    assert build_task(TASKS["gsm8k"], tmp_path, "chat").data.name == "dllmexp-mini-gsm8k-400"
    rows = (tmp_path / "gsm8k/test.jsonl").read_text().splitlines()
    assert len(set(rows)) == 400 and [json.loads(row) for row in rows[:150]] == lines(
        "gsm8k/test.jsonl"
    )
    assert (tmp_path / "mbpp.jsonl").read_bytes() == (FOLDER / "mbpp.jsonl").read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        ["--n_gsm8k", "400"],
        ["--n_gsm8k", "400", "--out", "assets/../assets/benchmarks"],
        ["--n_gsm8k", "0", "--out", "x"],
    ],
)
def test_the_project_s_own_set_is_not_written_over(words, monkeypatch, tmp_path, capsys):
    (tmp_path / "assets" / "benchmarks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mini, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        mini.main(words)
    assert "--n_gsm8k" in capsys.readouterr().err and not [
        p for p in tmp_path.rglob("*") if p.is_file()
    ]


@pytest.mark.parametrize("task", mini.TASKS)
def test_the_files_pass_the_harness_s_own_checks(task):
    assert check_data(TASKS[task], FOLDER) == []
    assert build_task(TASKS[task], FOLDER, "chat").data.name == "dllmexp-mini"


@pytest.mark.parametrize("task", mini.TASKS)
def test_no_test_problem_among_the_training_ones(task):
    """Neither the question nor its numbers, constant and function name, whatever the names around them."""
    asked = mini.test_problems(task)
    keys = {p.key for p in asked}
    questions = {
        json.dumps([p.row.get(k) for k in ("question", "prompt", "text", "Question")])
        for p in asked
    }
    assert len(keys) == len(asked) == mini.N_TEST[task]
    for p in islice(mini.problems(task, "train", 0), 20_000):
        assert p.key not in keys
        assert (
            task == "mbpp"
            or json.dumps([p.row.get(k) for k in ("question", "prompt", "text", "Question")])
            not in questions
        )


def test_the_training_files_hold_no_test_question():
    train, test = (
        {row["question"] for row in lines(f"gsm8k/{s}.jsonl")} for s in ("train", "test")
    )
    assert not train & test
    rows = lines("mbpp.jsonl")
    test = {row["code"] + row["text"] for row in rows if 11 <= row["task_id"] <= 510}
    assert len(test) == 150
    assert not test & {row["code"] + row["text"] for row in rows if not 11 <= row["task_id"] <= 510}


def test_canonical_solutions_pass_their_tests():
    for row in lines("HumanEval.jsonl.gz"):
        exec(
            f"{row['prompt']}{row['canonical_solution']}\n{row['test']}\ncheck({row['entry_point']})",
            {},
        )
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
    """Sixty steps of sixteen problems: the running mean of the loss falls; a second call has nothing left to do and writes the same weights."""
    import train_tiny

    from models import check_checkpoint, load_model

    argv = [
        "--family",
        family,
        "--out",
        str(tmp_path / "out"),
        "--state",
        str(tmp_path / "state.pt"),
        "--device",
        "cpu",
    ]
    argv += ["--steps", "60", "--batch", "16", "--log_every", "1"]
    assert train_tiny.main(argv) == 0
    losses = [
        float(line.split()[3])
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("step ")
    ]
    assert len(losses) == 60 and losses[-1] < 0.9 * losses[0]
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert check_checkpoint(tmp_path / "out") == []
    load_model(str(tmp_path / "out"), device="cpu", dtype="float32")
    assert train_tiny.main(argv) == 0
    assert "going on at step 60" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
