"""Generation benchmarks of the field: prompts and scores on rows in the originals' formats."""

import json
from pathlib import Path

import pytest

from eval import TASKS
from experiment.result import metrics_of
from tasks import build_task, check_data

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
ROWS = {"humaneval_plus.jsonl": [HUMANEVAL_PLUS], "mbpp_plus.jsonl": [MBPP_PLUS]}


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
