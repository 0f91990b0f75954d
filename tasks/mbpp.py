"""MBPP: short Python programs from one sentence and three asserts. Austin et al., arXiv:2108.07732.

A row: {"task_id": 11, "text": "Write a python function to ...", "code": "def ...",
        "test_list": ["assert ...", ...],
        "test_setup_code": "", "challenge_test_list": []}

The test set is task_id 11 to 510 (500 tasks); the worked examples are 2, 3 and 4. Metric
"pass@1,create_test" (the number that lm-eval calls "pass_at_1,none"). `test_setup_code` is run
between the program and its tests. lm-eval leaves it out, so that its best possible score is 499 of
500 (task 367).

MBPP+ (mbpp_plus) has 378 of the tasks and EvalPlus' tests, about 35 times as many. Liu et al.,
arXiv:2305.01210. lm-eval 0.4.8 asks them with the same words, but runs the three asserts only.
A row: {"task_id": 2, "prompt": "Write a function to ...", "code": "def ...",
        "test_imports": ["import math"], "test_list": ["assert ...", ...],
        "test": "import numpy as np ..."}
Below --data_dir these are JSON lines, as
`datasets.load_dataset("evalplus/mbppplus")["test"].to_json(FILE)` writes them.
"""

from __future__ import annotations

import builtins
from dataclasses import replace
from functools import partial

from sandbox import Program
from sandbox.names import defined_names, free_names
from tasks.base import PromptForm, TaskSpec, installed_config, installed_constant, make_task
from tasks.code import HEADLINE, Judging, scoring
from tasks.data import Data, Source
from utils import Extracted, mbpp_program

FILE = "mbpp.jsonl"
SHA256 = "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f"
YAML = "mbpp/mbpp.yaml"
FIELDS = {
    "task_id": "int",
    "text": "text",
    "code": "text",
    "test_list": "sources",
    "test_setup_code": "source?",
}
PLUS_FILE, PLUS_YAML = "mbpp_plus.jsonl", "mbpp/mbpp_plus.yaml"
PLUS_FIELDS = {
    "prompt": "text",
    "code": "text",
    "test_imports": "sources?",
    "test_list": "sources",
    "test": "source",
}
SPLITS = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}


def without_begin(installed: str) -> str:
    """The installed sentence and tests without "[BEGIN]", which a chat answer does not continue."""
    sentence = installed.removesuffix("\n[BEGIN]\n")
    assert sentence != installed, "lm-eval's mbpp prompt no longer ends with [BEGIN]"
    return sentence


def in_code_block(installed: str) -> str:
    """The installed answer of a worked example, in the code block that the chat form asks for."""
    answer = installed.replace("{{code}}\n[DONE]", "\n\n```python\n{{code}}\n```")
    assert answer != installed, "lm-eval's mbpp answers no longer end with [DONE]"
    return answer


FORMS = {
    "chat": PromptForm(
        source="lm-eval 0.4.8 mbpp's sentence and tests, without examples; reply in a code block",
        yaml=YAML,
        doc_to_text=lambda installed: (
            without_begin(installed) + "\n\nReply with the code in one Python code block."
        ),
        doc_to_target=in_code_block,
        until=(),
    ),
    "lm_eval": PromptForm(source="lm-eval 0.4.8 mbpp", yaml=YAML, num_fewshot=3),
    "opencompass": PromptForm(
        source="OpenCompass mbpp_gen_830460, as LLaDA reports: the three examples are chat turns",
        yaml=YAML,
        doc_to_text=lambda installed: (
            without_begin(installed).replace("\n\n{{", "\n\n {{", 1) + "  \n"
        ),
        doc_to_target="[BEGIN]\n '{{code}}' \n[DONE] \n\n ",
        num_fewshot=3,
        multiturn=True,
        until=(),  # as OpenCompass; its extraction reads the closing mark
    ),
    "instruct": PromptForm(
        source="mbpp_instruct of the lm-eval fork with which Dream reports",
        yaml=YAML,
        doc_to_text=without_begin,
        prefill="Here is the completed function:\n```python\n",
        until=("```",),
    ),
}


def splits(rows: dict[str, list[dict]]) -> dict[str, list[dict]]:
    return {
        name: [r for r in rows[FILE] if lo <= r["task_id"] <= hi]
        for name, (lo, hi) in SPLITS.items()
    }


def tests_of(doc: dict) -> str:
    if "test" in doc:  # MBPP+
        tests = [*doc["test_imports"], doc["test"]]
    else:
        tests = [doc["test_setup_code"] or "", *doc["test_list"]]
    return "\n".join(tests).replace("\r\n", "\n").strip("\n")


def program_of(doc: dict, candidate: str) -> Program:
    """The program of a candidate. In strict mode the candidate provides all names but builtins.

    A builtin that the reference defines is the candidate's too: task 126 asks for `sum`.
    """
    tests, defined = tests_of(doc), defined_names(doc["code"])
    own = {n for n in free_names(tests) if n in defined or not hasattr(builtins, n)}
    return Program(candidate, tests, names=tuple(sorted(own)))


def build(data: Data, form_name: str, name: str = "mbpp"):
    form = (PLUS_FORMS if name == "mbpp_plus" else FORMS)[form_name]

    def extract(doc: dict, answer: str) -> Extracted:
        return mbpp_program(answer, doc, tests=tests_of(doc), prefill=task.prefill(doc))

    judging = Judging(extract, program_of)
    config = installed_config(form.yaml) | {"task": name} | scoring(judging)
    config["fewshot_config"] |= {
        "samples": installed_constant("mbpp/utils.py", "list_fewshot_samples")
    }
    task = make_task(data, form, config, judging)
    return task


SPEC = TaskSpec(
    name="mbpp",
    build=build,
    n_docs=500,
    sources=(Source(FILE, 974, FIELDS, SHA256, key="task_id"),),
    hub=("google-research-datasets/mbpp", "full"),
    splits=splits,
    eval_split="test",
    forms=FORMS,
    headline=HEADLINE,
    kind="code",
    target=tests_of,
    gen_length=512,
    note="test_setup_code is run before the tests; lm-eval forgets it, which costs it task 367",
)

PLUS_FORMS = {name: replace(form, yaml=PLUS_YAML) for name, form in FORMS.items()}
# what is kept as the target is short: the tests have megabytes, and each program has them
PLUS = replace(
    SPEC,
    name="mbpp_plus",
    build=partial(build, name="mbpp_plus"),
    n_docs=378,
    sources=(Source(PLUS_FILE, 378, PLUS_FIELDS, key="task_id"),),
    hub=("evalplus/mbppplus", None),
    splits=lambda rows: {"test": rows[PLUS_FILE]},
    forms=PLUS_FORMS,
    target=lambda doc: doc["test_list"],
    note="EvalPlus' tests decide; lm-eval runs the three asserts of the prompt",
)
