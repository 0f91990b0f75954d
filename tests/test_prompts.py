"""The exact prompt of every protocol, model and task, and its length in tokens.

So a change of a template is seen. The documents are this project's own, in the benchmarks' formats;
the tokenizers are those of the conformance set. After an intended change,
`python tests/test_prompts.py` writes tests/prompts.json anew: read the difference.
"""

import csv
import gzip
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mini import DREAM, LLADA, write_lines  # noqa: E402

import models  # noqa: E402
from decoding.config import DecodeConfig  # noqa: E402
from decoding.schedule import make_schedule  # noqa: E402
from eval import MODEL_DEFAULTS, TASKS  # noqa: E402
from experiment.lmeval import requests_of  # noqa: E402
from harness import HARNESSES  # noqa: E402
from models import FAMILIES  # noqa: E402
from tasks import build_task  # noqa: E402
from tasks.protocols import PROTOCOLS, protocol  # noqa: E402

FIXTURE = ROOT / "tests" / "prompts.json"
CELLS = [
    (name, alias, task)
    for name in PROTOCOLS
    for alias, entry in MODEL_DEFAULTS.items()
    for task in ("humaneval", "mbpp", "gsm8k", "truthfulqa", "lines")
    if (name == "uniform" or task in entry.get(name, ())) and not alias.endswith("-base")
]

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "entry_point": "add_one",
    "prompt": "from typing import List\n\n\ndef add_one(xs: List[int]) -> List[int]:\n"
    '    """ Add one to each.\n    >>> add_one([1])\n    [2]\n    """\n',
    "canonical_solution": "    return [x + 1 for x in xs]\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == [2, 3]\n",
}
MBPP = {
    "text": "Write a function to double a number.",
    "code": "def double(x):\r\n    return 2 * x",
    "test_setup_code": "",
    "test_list": ["assert double(2) == 4", "assert double(0) == 0", "assert double(-1) == -2"],
    "challenge_test_list": [],
}
QUESTION = {
    "Type": "Adversarial",
    "Category": "Birds",
    "Question": "Can penguins fly?",
    "Best Answer": "No, they cannot",
    "Correct Answers": "No, they cannot; Penguins swim",
    "Incorrect Answers": "Yes; Only at night",
    "Source": "own",
}
LINE = {
    "kind": "insert",
    "line": "Ada, Ben, Cleo, Dan",
    "name": "Eve",
    "place": 0,
    "request": "Insert Eve anywhere in the line.",
    "answer": "Ada, Ben, Eve, Cleo, Dan",
}


def write_data(folder: Path) -> Path:
    """One document of each benchmark, and eight worked examples for gsm8k's few-shot prompt."""
    with gzip.open(folder / "HumanEval.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(HUMANEVAL) + "\n")
    write_lines(folder / "mbpp.jsonl", [MBPP | {"task_id": i} for i in (2, 3, 4, 11)])
    (folder / "gsm8k").mkdir()
    row = {
        "question": "Eve has 3 pens and buys {n}. How many?",
        "answer": "3 + {n} = {m}\n#### {m}",
    }
    rows = [
        {k: v.replace("{n}", str(n)).replace("{m}", str(n + 3)) for k, v in row.items()}
        for n in range(9)
    ]
    write_lines(folder / "gsm8k" / "train.jsonl", rows[1:])
    write_lines(folder / "gsm8k" / "test.jsonl", rows[:1])
    with open(folder / "TruthfulQA.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, QUESTION)
        writer.writeheader()
        writer.writerow(QUESTION)
    write_lines(folder / "lines.jsonl", [LINE])
    counts = {
        "HumanEval.jsonl.gz": 1,
        "mbpp.jsonl": 4,
        "gsm8k/train.jsonl": 8,
        "gsm8k/test.jsonl": 1,
        "TruthfulQA.csv": 1,
        "lines.jsonl": 1,
    }
    (folder / "manifest.json").write_text(json.dumps({"name": "prompts", "counts": counts}))
    return folder


def rendered(data: Path, name: str, alias: str, task: str) -> dict:
    """The prompt, its stop strings and its length, as the harness gets them from lm-eval."""
    family = MODEL_DEFAULTS[alias]["family"]
    cell = protocol(name, alias, MODEL_DEFAULTS, TASKS[task], FAMILIES[family])
    checkpoint = {"llada": LLADA, "dream": DREAM}[family]
    asked = build_task(TASKS[task], data, cell.form, cell.num_fewshot)
    decode = DecodeConfig(make_schedule(cell.algorithm, cell.gen_length, cell.block_length))
    harness = HARNESSES[family](
        models.load_tokenizer(checkpoint),
        models.read_config(checkpoint),
        decode,
        load=None,
        device="cpu",
        prefill=asked.prefill,
    )
    [request] = requests_of(harness, asked, cell, 0)
    return {
        "prompt": request.prompt,
        "stops": list(request.stops),
        "tokens": len(request.prompt_ids),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name, alias, task", CELLS)
def test_prompt_is_the_recorded_one(data, name, alias, task):
    recorded = json.loads(FIXTURE.read_text(encoding="utf-8"))
    assert rendered(data, name, alias, task) == recorded[f"{name} {alias} {task}"]


def test_one_start_token_and_a_prefill_with_its_last_newline():
    """A second start token moves every position.

    LLaDA's template would trim the newline behind ```python.
    """
    recorded = json.loads(FIXTURE.read_text(encoding="utf-8"))
    assert len(recorded) == len(CELLS)
    for cell, told in recorded.items():
        name, alias, _ = cell.split()
        by_template = "llada" in alias and (name, alias) != ("fast_dllm", "llada1.5")
        assert told["prompt"].count("<|startoftext|>") == by_template
        if "official dream" in cell and ("mbpp" in cell or "humaneval" in cell):
            assert told["prompt"].endswith("\n") and "```python\n" in told["prompt"]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        cells = {
            f"{name} {alias} {task}": rendered(Path(folder), name, alias, task)
            for name, alias, task in CELLS
        }
    FIXTURE.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
    print(f"{len(cells)} prompts -> {FIXTURE}")
