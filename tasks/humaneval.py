"""HumanEval: complete a Python function from its signature and docstring.

Chen et al., arXiv:2107.03374.
A row: {"task_id": "HumanEval/0", "prompt": "def f(...):\\n    \\"\\"\\"...", "entry_point": "f",
        "canonical_solution": "    return ...", "test": "def check(candidate): ..."}

Metric "pass@1,create_test". lm-eval 0.4.8 appends the raw answer to the prompt, which scores every
chat answer as a syntax error; here the program is taken out of the answer first
(utils.humaneval_program).

HumanEval+ (humaneval_plus) has the same prompts and EvalPlus' tests, about 80 times as many. Liu et
al., arXiv:2305.01210. Its rows have the same fields; below --data_dir they are JSON lines, as
`datasets.load_dataset("evalplus/humanevalplus")["test"].to_json(FILE)` writes them.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from functools import partial

from sandbox import Program
from tasks.base import PromptForm, TaskSpec, installed_config, make_task
from tasks.code import HEADLINE, Judging, scoring
from tasks.data import Data, Source
from utils import Extracted, humaneval_program

FILE = "HumanEval.jsonl.gz"
SHA256 = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"
PLUS_FILE = "humaneval_plus.jsonl"
YAML = "humaneval/humaneval.yaml"
FIELDS = {
    "task_id": "text",
    "prompt": "text",
    "canonical_solution": "text",
    "test": "source",
    "entry_point": "text",
}

FORMS = {
    "chat": PromptForm(
        source="this project's, for every model alike",
        yaml=YAML,
        doc_to_text=(
            "Complete the following Python function. Reply with the whole function, with the "
            "imports it needs, in one Python code block.\n\n```python\n{{prompt.strip()}}\n```"
        ),
        until=(),  # a chat answer may begin with an import, a comment or the function itself
    ),
    "lm_eval": PromptForm(source="lm-eval 0.4.8 humaneval", yaml=YAML),
    "whole": PromptForm(
        source="lm-eval 0.4.8 humaneval without its stop strings, as Fast-dLLM asks LLaDA and "
        "Dream-Base's authors ask it",
        yaml=YAML,
        until=(),  # a chat answer writes the function anew
    ),
    "opencompass": PromptForm(
        source="OpenCompass humaneval_gen_8e312c, as LLaDA reports",
        yaml=YAML,
        doc_to_text="Complete the following python code:\n{{prompt}}",
        until=(),
    ),
    "instruct": PromptForm(
        source="humaneval_instruct, version 2 of the lm-eval fork with which Dream reports",
        yaml=YAML,
        doc_to_text=(
            "Write a solution to the following problem and make sure that it passes the tests:\n"
            "```{{prompt}}"
        ),
        prefill="Here is the completed function:\n```python\n{{prompt}}\n",
    ),
}


def tests_of(doc: dict) -> str:
    return f"{doc['test']}\ncheck({doc['entry_point']})"


def program_of(doc: dict, candidate: str) -> Program:
    """The program of a candidate. In strict mode helper functions of the prompt are trusted."""
    try:
        prompt = ast.parse(doc["prompt"].rstrip() + "\n    pass\n")
    except SyntaxError:
        return Program(candidate, tests_of(doc))
    prompt.body = [
        node for node in prompt.body if getattr(node, "name", None) != doc["entry_point"]
    ]
    return Program(candidate, tests_of(doc), helpers=ast.unparse(prompt))


def build(data: Data, form_name: str, name: str = "humaneval"):
    form = FORMS[form_name]

    def extract(doc: dict, answer: str) -> Extracted:
        return humaneval_program(answer, doc, tests=tests_of(doc), prefill=task.prefill(doc))

    judging = Judging(extract, program_of)
    config = installed_config(form.yaml) | {"task": name} | scoring(judging)
    task = make_task(data, form, config, judging)
    return task


SPEC = TaskSpec(
    name="humaneval",
    build=build,
    n_docs=164,
    sources=(Source(FILE, 164, FIELDS, SHA256, key="task_id"),),
    hub=("openai/openai_humaneval", None),
    splits=lambda rows: {"test": rows[FILE]},
    eval_split="test",
    forms=FORMS,
    headline=HEADLINE,
    kind="code",
    target=tests_of,
    gen_length=512,
)

# what is kept as the target is short: the tests have megabytes, and each program has them
PLUS = replace(
    SPEC,
    name="humaneval_plus",
    build=partial(build, name="humaneval_plus"),
    sources=(Source(PLUS_FILE, 164, FIELDS, key="task_id"),),
    hub=("evalplus/humanevalplus", None),
    splits=lambda rows: {"test": rows[PLUS_FILE]},
    target=lambda doc: doc["canonical_solution"],
)
