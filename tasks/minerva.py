"""MATH and MATH-500: competition problems. Hendrycks et al., arXiv:2103.03874; Lightman et al.,
arXiv:2305.20050.

A row of minerva_math: {"subset": "algebra", "problem": "...", "solution": "... $\\\\boxed{2}$ ..."}
A row of math500: {"problem": "...", "solution": "...", "answer": "2", "subject": "Algebra", ...}
Below --data_dir they are JSON lines, minerva_math.jsonl and math500.jsonl; `subset` is the hub's
configuration, one of SUBSETS, the rest is the hub's row.

Scored by lm-eval's minerva_math: `exact_match` compares the final answer with the gold one by
sympy, after Minerva's normalisation; `math_verify` reads the whole answer, but in lm-eval 0.4.8 it
misses a gold answer in LaTeX, which it reads without dollar signs. The form chat asks for
\\boxed{}; its last one becomes the final answer (utils.minerva_answer). minerva_math has a score
for each of its seven subjects, and their mean over all problems.
Scoring needs lm-eval's extra "math".
"""

from __future__ import annotations

from dataclasses import replace

from tasks.base import PromptForm, TaskSpec, installed_config, make_task
from tasks.data import Data, DataError, Source
from tasks.group import by_field, group_task
from utils import minerva_answer

FILE, FILE_500 = "minerva_math.jsonl", "math500.jsonl"
# configuration of the hub's data set -> the end of lm-eval's name
SUBSETS = {
    "algebra": "algebra",
    "counting_and_probability": "counting_and_prob",
    "geometry": "geometry",
    "intermediate_algebra": "intermediate_algebra",
    "number_theory": "num_theory",
    "prealgebra": "prealgebra",
    "precalculus": "precalc",
}
YAML = "minerva_math/minerva_math_{}.yaml"
FIELDS = {"problem": "text", "solution": r"text like \\boxed|\\fbox"}

FORMS = {
    "chat": PromptForm(
        source="own wording around the problem, without examples",
        yaml=YAML.format("algebra"),
        doc_to_text="{{problem}}\n\nReason step by step, and put the final answer in \\boxed{}.",
        until=(),
    ),
    "lm_eval": PromptForm(
        source="lm-eval 0.4.8 minerva_math", yaml=YAML.format("algebra"), num_fewshot=4
    ),
}


def in_minerva_s_words(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """Answers with the sentence that lm-eval's scorer looks for, where they have a \\boxed{}."""

    def read(text: str) -> str:
        found = minerva_answer(text)
        if found is None:
            return text
        found = " ".join(found.split())  # lm-eval's pattern reads one line
        return f"{text}\nFinal Answer: The final answer is ${found}$. I hope it is correct."

    return [[read(r) for r in rs] for rs in resps]


def part(name: str, data: Data, form_name: str, yaml: str):
    form = FORMS[form_name]
    config = installed_config(yaml, functions=True) | {"task": name}
    if form_name == "chat":
        steps = [{"function": "custom", "filter_fn": in_minerva_s_words}]
        config["filter_list"] = [
            {"name": "none", "filter": [*steps, {"function": "take_first"}]},
        ]
    return make_task(data, form, config)


def build(data: Data, form_name: str):
    members = {}
    for subset, splits in by_field(data, "subset").items():
        if subset not in SUBSETS:
            raise DataError(
                f"{data.origin}: field 'subset' is {subset!r:.60}; it must be one of "
                f"{', '.join(SUBSETS)}"
            )
        name = f"minerva_math_{SUBSETS[subset]}"
        own = Data(data.name, data.origin, splits)
        members[name] = part(name, own, form_name, YAML.format(SUBSETS[subset]))
    return group_task("minerva_math", data, FORMS[form_name], members)


def build_500(data: Data, form_name: str):
    return part("math500", data, form_name, YAML.format("algebra"))


SPEC = TaskSpec(
    name="minerva_math",
    build=build,
    n_docs=5000,
    sources=(Source(FILE, 5000, FIELDS | {"subset": "text"}),),
    hub=("EleutherAI/hendrycks_math", None),
    subsets=tuple(SUBSETS),
    forms=FORMS,
    headline="exact_match,none",
    kind="math",
    target=lambda doc: doc["answer"],
    gen_length=512,
    extra="math",
)
MATH500 = replace(
    SPEC,
    name="math500",
    build=build_500,
    n_docs=500,
    sources=(Source(FILE_500, 500, FIELDS | {"answer": "text"}),),
    hub=("HuggingFaceH4/MATH-500", None),
    subsets=(),
)
