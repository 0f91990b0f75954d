"""Generation benchmarks of the field: prompts and scores on rows in the originals' formats."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from mini import LLADA

from eval import TASKS
from experiment.result import metrics_of
from tasks import DataError, build_task, check_data, load_data
from utils import minerva_answer

ASSERTION = """
import numpy as np


def is_floats(x) -> bool:
    return isinstance(x, float) or isinstance(x, list) and all(isinstance(i, float) for i in x)


def assertion(out, exp, atol):
    exact_match = out == exp
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if not exact_match and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert exact_match
"""
INPUTS = "inputs = [[2.0], [0.0], [-1.5], [10.0]]\nresults = [4.0, 0.0, -3.0, 20.0]\n"
LOOP = "for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion({}(*inp), exp, 0)\n"


def indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


HUMANEVAL_PLUS = {
    "task_id": "HumanEval/0",
    "entry_point": "double",
    "prompt": 'def double(x: float) -> float:\n    """ Twice x. """\n',
    "canonical_solution": "    return 2 * x\n",
    "test": f"{ASSERTION}\n\ndef check(candidate):\n{indented(INPUTS + LOOP.format('candidate'))}",
}
MBPP_PLUS = {
    "task_id": 2,
    "prompt": "Write a function to double a number.",
    "code": "def double(x):\n  return 2 * x",
    "source_file": "Benchmark Questions Verification V2.ipynb",
    "test_imports": ["import math"],
    "test_list": ["assert double(2) == 4", "assert double(0) == 0", "assert math.sqrt(4) == 2"],
    "test": f"{ASSERTION}\n{INPUTS}{LOOP.format('double')}",
}
MATH = {
    "problem": "What is the half of the root of 3?",
    "level": "Level 1",
    "type": "Algebra",
    "solution": "It is $\\boxed{\\frac{\\sqrt{3}}{2}}$.",
}
IFEVAL = {
    "key": 1000,
    "prompt": "Write about rain without commas, in lower case.",
    "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
    "kwargs": [{}, {}],
}
BOOLEAN = {"subset": "boolean_expressions", "input": "not ( True ) and True is", "target": "False"}
SNARKS = {
    "subset": "snarks",
    "input": "Which statement is sarcastic?\nOptions:\n(A) Great, rain again\n(B) It rains",
    "target": "(A)",
}
ROWS = {
    "humaneval_plus.jsonl": [HUMANEVAL_PLUS],
    "mbpp_plus.jsonl": [MBPP_PLUS],
    "minerva_math.jsonl": [
        MATH | {"subset": "algebra"},
        MATH | {"subset": "number_theory", "solution": "So $\\boxed{7}$."},
        MATH | {"subset": "algebra", "solution": "So $\\boxed{0.5}$."},
    ],
    "math500.jsonl": [MATH | {"answer": "\\frac{\\sqrt{3}}{2}", "subject": "Algebra"}],
    "ifeval_input_data.jsonl": [IFEVAL],
    "bbh.jsonl": [BOOLEAN, SNARKS, BOOLEAN | {"input": "True is", "target": "True"}],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("field")
    for name, rows in ROWS.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(lines, encoding="utf-8")
    counts = {name: len(rows) for name, rows in ROWS.items()}
    (folder / "manifest.json").write_text(json.dumps({"name": "own", "counts": counts}))
    return folder


def scored(task, answer) -> tuple[dict[str, float], list[str]]:
    """The means of lm-eval's scores, and the prompts. answer: doc -> text, or a text."""
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    for one in task.instances:
        one.resps = [answer(one.doc) if callable(answer) else answer]
    task.apply_filters()
    logged = []
    for one in task.instances:
        for name, found in one.filtered_resps.items():
            scores = task.process_results(one.doc, [found])
            logged.append({"filter": name, "metrics": list(scores), **scores})
    means = {key: e.value for key, e in metrics_of(logged).items()}
    return means, [one.args[0] for one in task.instances]


@pytest.mark.parametrize("name", ["humaneval_plus", "mbpp_plus"])
@pytest.mark.parametrize(
    ("body", "passes"),
    [
        ("return x + x", 1.0),
        ("return x + x + 1e-9", 1.0),  # EvalPlus compares floats with a tolerance
        ("return x + 2 if x else 0", 0.0),  # right for the examples of MBPP's own tests
    ],
)
def test_evalplus_tests_decide(data, name, body, passes):
    spec = TASKS[name]
    assert check_data(spec, data) == [] and spec.kind == "code"
    code = f"def double(x):\n    {body}"
    means, [prompt] = scored(build_task(spec, data, "chat"), f"Sure:\n```python\n{code}\n```")
    assert means == {"pass@1,create_test": passes}
    assert prompt.startswith(
        "Complete the following Python function."
        if name == "humaneval_plus"
        else "You are an expert Python programmer, and here is your task: Write a function to d"
    )


@pytest.mark.parametrize("name", ["humaneval_plus", "mbpp_plus"])
def test_every_form_of_a_plus_benchmark_scores_its_reference(data, name):
    spec = TASKS[name]
    for form in spec.forms:
        task = build_task(spec, data, form)
        [doc] = task.eval_docs
        inside = name == "humaneval_plus" and form in ("lm_eval", "instruct")
        code = spec.target(doc) if inside else doc.get("code") or doc["prompt"] + spec.target(doc)
        if form == "opencompass" and name == "mbpp_plus":
            code = f"[BEGIN]\n '{code}' \n[DONE]"
        elif form == "chat":
            code = f"```python\n{code}\n```"
        assert scored(task, code)[0] == {"pass@1,create_test": 1.0}, form
    assert name != "mbpp_plus" or spec.target(doc) == MBPP_PLUS["test_list"]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("so \\boxed{1}, no: \\boxed {\\frac{\\sqrt{3}}{2}}.", "\\frac{\\sqrt{3}}{2}"),
        ("\\boxed{7} and \\boxed{\\frac{1}{2}", "7"),  # the last one is not closed
        ("<think>\\boxed{1}</think>It is \\boxed{2}", "2"),
        ("Final Answer: The final answer is $2$.", None),
    ],
)
def test_the_last_box_that_is_closed_is_the_answer(answer, found):
    assert minerva_answer(answer) == found


@pytest.mark.parametrize(
    ("task", "lacking"),
    [
        ("math500", "antlr4, math_verify"),
        ("minerva_math", "antlr4, math_verify"),
        ("ifeval", "langdetect"),
    ],
)
def test_a_missing_extra_is_one_line_before_anything_is_loaded(
    monkeypatch, run, data, task, lacking
):
    installed = set("sympy immutabledict nltk".split())
    monkeypatch.setattr("tasks.data.find_spec", lambda name: name in installed or None)
    monkeypatch.setattr("experiment.run._task", None)  # where lm-eval is imported
    arguments = f"--model_alias llada --dtype float32 --llada_ckpt {LLADA} --gen_length 32"
    code, _, error = run(f"{arguments} --task {task} --data_dir {data} --limit 1")
    extra = "ifeval" if task == "ifeval" else "math"
    assert code == 3 and error.splitlines() == [
        f"error: this task needs the packages {lacking}: "
        f'pip install "lm-eval[{extra}]" -c requirements.txt'
    ]


@pytest.mark.parametrize(
    ("form", "answer", "right"),
    [
        ("chat", "It is \\boxed{\\frac{\\sqrt{3}}{2}}.", 1.0),
        ("chat", "It is \\boxed{\\sqrt{3}/2}.", 1.0),  # equal, written in another way
        ("chat", "It is \\boxed{\\sqrt{3}}.", 0.0),
        (
            "lm_eval",
            "Final Answer: The final answer is $\\frac{\\sqrt{3}}{2}$. I hope it is correct.",
            1.0,
        ),
        ("lm_eval", "Final Answer: The final answer is $2$. I hope it is correct.", 0.0),
    ],
)
def test_math_500_uses_minerva_s_equivalence(data, form, answer, right):
    pytest.importorskip("math_verify")
    spec = TASKS["math500"]
    assert check_data(spec, data) == []
    task = build_task(spec, data, form)
    means, [prompt] = scored(task, answer)
    assert means["exact_match,none"] == right and "math_verify,none" in means
    assert prompt.count("Solution:") == (5 if form == "lm_eval" else 0)
    assert spec.target(task.eval_docs[0]) == "\\frac{\\sqrt{3}}{2}"


def test_minerva_math_has_a_score_for_each_subject(data):
    pytest.importorskip("math_verify")
    spec = TASKS["minerva_math"]
    assert check_data(spec, data) == []
    means, prompts = scored(build_task(spec, data, "chat"), "It is \\boxed{7}.")
    assert {k: v for k, v in means.items() if k.startswith("exact")} == {
        "exact_match,none": pytest.approx(1 / 3),
        "exact_match/minerva_math_algebra,none": 0.0,
        "exact_match/minerva_math_num_theory,none": 1.0,
    }
    assert prompts[0].startswith("What is the half") and prompts[0].endswith("in \\boxed{}.")


def test_ifeval_counts_answers_that_follow_all_instructions(data, monkeypatch):
    pytest.importorskip("langdetect")
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "find", lambda name: name)  # no sentence is counted here
    spec = TASKS["ifeval"]
    assert check_data(spec, data) == []
    task = build_task(spec, data, "chat")
    for answer, strict, loose in (
        ("it rains again in this small and quiet town", 1.0, 1.0),
        ("Sure!\nit rains again in this small and quiet town", 0.0, 1.0),
        ("it rains, again", 0.0, 0.0),
    ):
        means, [prompt] = scored(task, answer)
        assert means == {
            "prompt_level_strict_acc,none": strict,
            "prompt_level_loose_acc,none": loose,
        }
    assert prompt == IFEVAL["prompt"]


def test_bbh_is_one_run_with_a_score_for_each_task(data):
    spec = TASKS["bbh"]
    assert check_data(spec, data) == [] and spec.scores_alone
    means, prompts = scored(build_task(spec, data, "lm_eval"), "So the answer is False.")
    assert means == {
        "exact_match,get-answer": pytest.approx(1 / 3),
        "exact_match/bbh_cot_fewshot_boolean_expressions,get-answer": 0.5,
        "exact_match/bbh_cot_fewshot_snarks,get-answer": 0.0,
    }
    assert [prompts[i].count("Let's think step by step") for i in (0, 2)] == [4, 4]
    assert prompts[0].startswith("Evaluate the result of a random Boolean expression.")
    means, prompts = scored(build_task(spec, data, "chat"), "It is (A).")
    assert means["exact_match/bbh_cot_zeroshot_snarks,get-answer"] == 1.0
    assert means["exact_match,get-answer"] == pytest.approx(1 / 3)
    assert means["exact_match,strict-match"] == 0.0
    assert prompts[1].endswith("(B) It rains\nA: Let's think step by step.")


@pytest.mark.parametrize(
    ("task", "row", "problem"),
    [
        ("bbh", BOOLEAN | {"subset": "chess"}, "BIG-Bench Hard has no task 'chess'"),
        ("ifeval", IFEVAL | {"kwargs": [{}]}, "field 'kwargs': expected one object for each"),
        ("math500", MATH | {"solution": "7"}, "field 'solution' does not match"),
    ],
)
def test_malformed_rows_are_named(tmp_path, task, row, problem):
    spec = TASKS[task]
    (tmp_path / spec.files[0]).write_text(json.dumps(row) + "\n", encoding="utf-8")
    (tmp_path / "manifest.json").write_text('{"name": "x", "counts": {}}')
    if problems := check_data(spec, tmp_path):
        assert len(problems) == 1 and problem in problems[0]
    else:
        with pytest.raises(DataError, match=problem):
            build_task(spec, tmp_path, "chat")


def test_the_hub_s_subsets_are_read_together(monkeypatch):
    spec = replace(TASKS["bbh"], n_docs=2, subsets=("boolean_expressions", "snarks"))

    def splits(repo, config):
        row = {"input": f"{config}?", "target": "True"}
        return {"test": [row], "other": [row]}, f"{repo}@{config}"

    monkeypatch.setattr("tasks.data._parquet_splits", splits)
    assert load_data(spec, None).splits == {
        "test": [{"input": f"{name}?", "target": "True", "subset": name} for name in spec.subsets]
    }


def test_a_group_is_one_run_with_one_result(run, data, tmp_path):
    arguments = "--model_alias tiny-llada --task bbh --limit 2 --device cpu --batch_size 2"
    code, out, error = run(f"{arguments} --data_dir {data} --output_dir {tmp_path}")
    assert code == 0, error
    [path] = tmp_path.glob("*.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["status"] == "complete" and result["n_samples"] == 2
    prefix = "exact_match/bbh_cot_zeroshot_"
    counts = {key: e["n"] for key, e in result["metrics"].items() if key.endswith("get-answer")}
    assert counts == {  # --limit 2: one document of each
        "exact_match,get-answer": 2,
        f"{prefix}boolean_expressions,get-answer": 1,
        f"{prefix}snarks,get-answer": 1,
    }
    assert result["headline"]["metric"] == "exact_match,get-answer"
    assert [row["target"] for row in result["samples"]] == ["False", "(A)"]
    assert f"{prefix}snarks,get-answer" in out


@pytest.mark.slow
def test_a_group_with_repeats_has_means_over_the_samples_of_a_document(run, data, tmp_path):
    arguments = "--model_alias tiny-llada --task bbh --limit 3 --device cpu --temperature 0.5"
    code, _, error = run(arguments, "--repeats", "2", "--data_dir", data, "--output_dir", tmp_path)
    assert code == 0, error
    [path] = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert [len(row["repeats"]) for row in result["samples"]] == [2, 2, 2]
    for row in result["samples"]:
        first, second = (answer["metrics"] for answer in row["repeats"])
        assert row["metrics"] == {name: (first[name] + second[name]) / 2 for name in first}
    assert result["headline"]["n"] == 3
    counts = {name: e["n"] for name, e in result["metrics"].items()}
    assert counts["exact_match/bbh_cot_zeroshot_snarks,get-answer"] == 1


def test_a_boxed_answer_of_several_lines_is_read():
    """lm-eval's pattern reads one line: a matrix was [invalidanswer]."""
    from tasks.minerva import in_minerva_s_words

    [[text]] = in_minerva_s_words(
        [["So \\boxed{\n\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}\n}."]], [{}]
    )
    assert "The final answer is $\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}$. I hope" in text
