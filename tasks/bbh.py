"""BIG-Bench Hard: 27 tasks that need several steps. Suzgun et al., arXiv:2210.09261.

A row: {"subset": "boolean_expressions", "input": "not ( True ) and ( True ) is", "target": "False"}
Below --data_dir these are JSON lines, bbh.jsonl; `subset` is the hub's configuration, the rest is
the hub's row.

Prompts and scores are lm-eval's: of bbh_cot_fewshot with the form lm_eval (three worked examples),
of bbh_cot_zeroshot with the form chat, whose flexible-extract is called get-answer here: there is
one headline. There is a score for each task, and their mean over all documents.
"""

from __future__ import annotations

from tasks.base import PromptForm, TaskSpec, installed_config, make_task
from tasks.data import Data, DataError, Source
from tasks.group import by_field, group_task

FILE = "bbh.jsonl"
FILTER = "get-answer"
FORMS = {
    # an answer may begin with the question, where lm-eval's stop string would cut
    "chat": PromptForm(source="lm-eval 0.4.8 bbh_cot_zeroshot", yaml="bbh/cot_zeroshot", until=()),
    "lm_eval": PromptForm(
        source="lm-eval 0.4.8 bbh_cot_fewshot", yaml="bbh/cot_fewshot", num_fewshot=3
    ),
}
SUBSETS = (
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
)


def build(data: Data, form_name: str):
    form, members = FORMS[form_name], {}
    for subset, splits in by_field(data, "subset").items():
        if subset not in SUBSETS:
            raise DataError(f"{data.origin}: BIG-Bench Hard has no task {subset!r:.60}")
        config = installed_config(f"{form.yaml}/{subset}.yaml", functions=True)
        for chain in config["filter_list"]:
            chain["name"] = chain["name"].replace("flexible-extract", FILTER)
        own = Data(data.name, data.origin, splits)
        members[config["task"]] = make_task(own, form, config)
    return group_task("bbh", data, form, members)


SPEC = TaskSpec(
    name="bbh",
    build=build,
    n_docs=6511,
    sources=(Source(FILE, 6511, {"subset": "text", "input": "text", "target": "text"}),),
    hub=("lukaemon/bbh", None),
    subsets=SUBSETS,
    forms=FORMS,
    headline=f"exact_match,{FILTER}",
    gen_length=512,
    target=lambda doc: doc["target"],
)
