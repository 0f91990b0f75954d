"""IFEval: instructions that a program can check. Zhou et al., arXiv:2311.07911.

A row: {"key": 1000, "prompt": "Write ...", "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}]}
Below --data_dir this is the original ifeval_input_data.jsonl, which is the hub's file too.

Prompt and scores are lm-eval's: `prompt_level_strict_acc` counts the answers that follow all of
their instructions; the loose one also without markup, first or last line. Its accuracies over
instructions are no means over answers and are left out.
Scoring needs lm-eval's extra "ifeval" and NLTK's punkt_tab.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout

from tasks.base import PromptForm, TaskSpec, installed_config, make_task
from tasks.data import Data, Source
from utils import EnvironmentProblem

FILE = "ifeval_input_data.jsonl"
YAML = "ifeval/ifeval.yaml"
METRICS = ("prompt_level_strict_acc", "prompt_level_loose_acc")
FORMS = {"chat": PromptForm(source="lm-eval 0.4.8 ifeval", yaml=YAML)}


def check(doc: dict) -> str | None:
    kwargs = doc.get("kwargs")
    if not isinstance(kwargs, list) or len(kwargs) != len(doc["instruction_id_list"]):
        return f"field 'kwargs': expected one object for each instruction, got {kwargs!r:.60}"
    return None


def build(data: Data, form_name: str):
    with redirect_stdout(sys.stderr):  # lm-eval says there what it downloads
        config = installed_config(YAML, functions=True)
        import nltk
        from langdetect import DetectorFactory
    DetectorFactory.seed = 0  # otherwise two verdicts on one answer may differ
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        raise EnvironmentProblem(
            "ifeval needs NLTK's punkt_tab, which could not be downloaded: "
            "python -m nltk.downloader punkt_tab"
        ) from None
    score = config["process_results"]

    def process_results(doc: dict, results: list[str]) -> dict[str, float]:
        scores = score(doc, results)
        return {name: float(scores[name]) for name in METRICS}

    config["metric_list"] = [m for m in config["metric_list"] if m["metric"] in METRICS]
    return make_task(data, FORMS[form_name], config | {"process_results": process_results})


SPEC = TaskSpec(
    name="ifeval",
    build=build,
    n_docs=541,
    sources=(
        Source(
            FILE,
            541,
            {"key": "int", "prompt": "text", "instruction_id_list": "texts"},
            key="key",
            check=check,
        ),
    ),
    hub=("google/IFEval", None),
    eval_split="train",
    forms=FORMS,
    headline="prompt_level_strict_acc,none",
    target=lambda doc: doc["instruction_id_list"],
    gen_length=1280,
    extra="ifeval",
    note="inst_level_strict_acc, inst_level_loose_acc: left out, no mean over the answers",
)
