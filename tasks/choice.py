"""Benchmarks of multiple choice: the option with the greatest likelihood is the answer.

Prompts, options and metrics are lm-eval 0.4.8's: `acc` compares log-likelihoods, `acc_norm` divides
them by the characters of the option.

A file below --data_dir has the rows of the hub's data set as JSON lines, as
`datasets.load_dataset(DATA_SET, CONFIGURATION)[SPLIT].to_json(FILE)` writes them:

    file                     data set and configuration            split
    arc_challenge.jsonl      allenai/ai2_arc ARC-Challenge         test
    arc_easy.jsonl           allenai/ai2_arc ARC-Easy              test
    hellaswag.jsonl          Rowan/hellaswag                       validation
    winogrande.jsonl         allenai/winogrande winogrande_xl      validation
    piqa.jsonl               baber/piqa                            validation
    truthfulqa_mc.jsonl      truthfulqa/truthful_qa multiple_choice  validation
    mmlu.jsonl               cais/mmlu all                         test
    gpqa_main.csv            Idavidrein/gpqa gpqa_main             the original file; gated
Worked examples are optional: NAME_train.jsonl of the split train (the first five), mmlu_dev.jsonl
of the split dev; those of gpqa are its other questions.
Where lm-eval 0.4.8 names a data set with a loading script (hellaswag, piqa, winogrande, mmlu), the
one here has the same rows as plain files.

Clark et al., arXiv:1803.05457 (ARC); Zellers et al., arXiv:1905.07830 (HellaSwag); Sakaguchi et
al., arXiv:1907.10641 (WinoGrande); Bisk et al., arXiv:1911.11641 (PIQA); Lin et al.,
arXiv:2109.07958 (TruthfulQA); Hendrycks et al., arXiv:2009.03300 (MMLU); Rein et al.,
arXiv:2311.12022 (GPQA).
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tasks.base import PromptForm, TaskSpec, installed_config, make_task, tasks_dir
from tasks.data import Data, DataError, Rows, Source
from tasks.group import by_field, group_task

FORM = "lm_eval"
ACC, ACC_NORM = "acc,none", "acc_norm,none"
ARC = {"question": "text", "answerKey": "text"}
MMLU_FIELDS = {
    "question": "text",
    "subject": r"text like ^\w+$",
    "choices": "texts",
    "answer": "int",
}
GPQA_COLUMNS = ("Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))


def check_arc(doc: dict) -> str | None:
    choices = doc.get("choices")
    try:
        texts, labels = choices["text"], choices["label"]
        good = len(texts) == len(labels) > 1 and all(isinstance(t, str) for t in texts)
    except (TypeError, LookupError):
        good = False
    if not good:
        return f'field \'choices\': expected {{"text": [...], "label": [...]}}, got {choices!r:.60}'
    if doc["answerKey"] not in labels:
        return f"field 'answerKey': {doc['answerKey']!r:.20} is none of the labels {labels}"
    return None


def check_truthfulqa(doc: dict) -> str | None:
    """For lm-eval the first option of mc1 is right, and in mc2 those up to the first 0."""
    for name, most in (("mc1_targets", 1), ("mc2_targets", None)):
        try:
            choices, labels = doc[name]["choices"], list(doc[name]["labels"])
            n = sum(labels)
            good = len(choices) == len(labels) and labels == [1] * n + [0] * (len(labels) - n)
        except (TypeError, LookupError):
            good, n, labels = False, 0, []
        if not good or not 0 < n <= (most or n) or n == len(labels):
            return f"field {name!r}: expected options with the true ones first, and labels 1 and 0"
    return None


def check_piqa(doc: dict) -> str | None:
    return None if doc["label"] in (0, 1) else f"field 'label': expected 0 or 1, got {doc['label']}"


def check_mmlu(doc: dict) -> str | None:
    if len(doc["choices"]) != 4 or doc["answer"] not in range(4):
        return (
            "fields 'choices' and 'answer': expected 4 options and 0 to 3, got "
            f"{len(doc['choices'])} and {doc['answer']}"
        )
    return None


def gpqa_docs(docs):
    """GPQA's rows with their options in an order that the question alone decides.

    lm-eval shuffles with a generator that all documents share.
    """
    from lm_eval.tasks.gpqa.zeroshot.utils import preprocess

    def ordered(doc: dict) -> dict:
        right, *wrong = (preprocess(doc[name]) for name in GPQA_COLUMNS[1:])
        options = [*wrong, right]
        random.Random(doc["Question"]).shuffle(options)
        letter = "ABCD"[options.index(right)]
        return {f"choice{i}": text for i, text in enumerate(options, 1)} | {"answer": f"({letter})"}

    return docs.select_columns(list(GPQA_COLUMNS)).map(ordered)


def spec(
    name: str,
    yaml: str,
    hub: tuple[str, str | None],
    n_docs: int,
    fields: dict[str, str],
    *,
    examples: int = 0,
    eval_split: str = "test",
    headline: str = ACC,
    check: Callable[[dict], str | None] | None = None,
    file: str = "",
    target: Callable[[dict], object] | None = None,
) -> TaskSpec:
    """The benchmark behind one of lm-eval's definitions.

    examples: rows of the training split, for worked examples; 0: there is none.
    """
    form = PromptForm(source=f"lm-eval 0.4.8 {name}", yaml=yaml)

    def build(data: Data, form_name: str):
        return make_task(data, form, installed_config(yaml, functions=True) | {"task": name})

    file, train = file or f"{name}.jsonl", f"{name}_train.jsonl"
    sources = [Source(file, n_docs, fields, check=check)]
    if examples:
        sources.append(Source(train, examples, fields, check=check, optional=True))

    def splits(rows: dict[str, Rows]) -> dict[str, Rows]:
        return {eval_split: rows[file]} | ({"train": rows[train]} if examples else {})

    return TaskSpec(
        name=name,
        build=build,
        n_docs=n_docs,
        sources=tuple(sources),
        hub=hub,
        splits=splits,
        eval_split=eval_split,
        forms={FORM: form},
        headline=headline,
        kind="choice",
        target=target,
    )


def arc_answer(doc: dict) -> str:
    return doc["choices"]["text"][doc["choices"]["label"].index(doc["answerKey"])]


def true_options(targets: str) -> Callable[[dict], list[str]]:
    return lambda doc: doc[targets]["choices"][: sum(doc[targets]["labels"])]


def build_gpqa(data: Data, form_name: str):
    form = GPQA_FORMS[form_name]
    config = installed_config(form.yaml, functions=True) | {"task": "gpqa"}
    return make_task(data, form, config | {"process_docs": gpqa_docs})


def build_mmlu(data: Data, form_name: str):
    """One lm-eval task a subject, as one; a subject's worked examples are of the subject."""
    form = MMLU.forms[form_name]
    members, parts = {}, {}
    for subject, splits in by_field(data, "subject").items():
        if MMLU.eval_split not in splits:
            continue
        if not (tasks_dir() / f"mmlu/default/mmlu_{subject}.yaml").is_file():
            raise DataError(f"{data.origin}: MMLU has no subject {subject!r:.60}")
        config = installed_config(f"mmlu/default/mmlu_{subject}.yaml")
        parts[config["task"]] = (config["tag"].removesuffix("_tasks"),)
        members[config["task"]] = make_task(Data(data.name, data.origin, splits), form, config)
    return group_task("mmlu", data, form, members, parts)


ARC_CHALLENGE = spec(
    "arc_challenge",
    "arc/arc_challenge.yaml",
    ("allenai/ai2_arc", "ARC-Challenge"),
    1172,
    ARC,
    check=check_arc,
    target=arc_answer,
    examples=1119,
    headline=ACC_NORM,
)
ARC_EASY = spec(
    "arc_easy",
    "arc/arc_easy.yaml",
    ("allenai/ai2_arc", "ARC-Easy"),
    2376,
    ARC,
    check=check_arc,
    target=arc_answer,
    examples=2251,
)
HELLASWAG = spec(
    "hellaswag",
    "hellaswag/hellaswag.yaml",
    ("Rowan/hellaswag", None),
    10042,
    {
        "activity_label": "text",
        "ctx_a": "text?",
        "ctx_b": "text?",
        "endings": "texts",
        "label": "text like ^[0-3]$",
    },
    target=lambda doc: doc["choices"][int(doc["label"])],
    examples=39905,
    eval_split="validation",
    headline=ACC_NORM,
)
WINOGRANDE = spec(
    "winogrande",
    "winogrande/default.yaml",
    ("allenai/winogrande", "winogrande_xl"),
    1267,
    {
        "sentence": "text like _",
        "option1": "text",
        "option2": "text",
        "answer": "text like ^[12]$",
    },
    target=lambda doc: doc[f"option{doc['answer']}"],
    examples=40398,
    eval_split="validation",
)
PIQA = spec(
    "piqa",
    "piqa/piqa.yaml",
    ("baber/piqa", None),
    1838,
    {"goal": "text?", "sol1": "text?", "sol2": "text?", "label": "int"},
    check=check_piqa,
    target=lambda doc: doc[f"sol{doc['label'] + 1}"],
    examples=16113,
    eval_split="validation",
    headline=ACC_NORM,
)
TRUTHFULQA_MC1, TRUTHFULQA_MC2 = (
    spec(
        f"truthfulqa_mc{i}",
        f"truthfulqa/truthfulqa_mc{i}.yaml",
        ("truthfulqa/truthful_qa", "multiple_choice"),
        817,
        {"question": "text"},
        check=check_truthfulqa,
        target=true_options(f"mc{i}_targets"),
        eval_split="validation",
        file="truthfulqa_mc.jsonl",
    )
    for i in (1, 2)
)
MMLU = TaskSpec(
    name="mmlu",
    build=build_mmlu,
    n_docs=14042,
    sources=(
        Source("mmlu.jsonl", 14042, MMLU_FIELDS, check=check_mmlu),
        Source("mmlu_dev.jsonl", 285, MMLU_FIELDS, check=check_mmlu, optional=True),
    ),
    hub=("cais/mmlu", "all"),
    splits=lambda rows: {"test": rows["mmlu.jsonl"], "dev": rows["mmlu_dev.jsonl"]},
    forms={FORM: PromptForm(source="lm-eval 0.4.8 mmlu", yaml="mmlu/default/_mmlu.yaml")},
    headline=ACC,
    kind="choice",
    target=lambda doc: {"subject": doc["subject"], "right": doc["choices"][doc["answer"]]},
)
GPQA_FORMS = {
    FORM: PromptForm(
        source="lm-eval 0.4.8 gpqa_main_zeroshot", yaml="gpqa/zeroshot/gpqa_main_zeroshot.yaml"
    ),
    "n_shot": PromptForm(
        source="lm-eval 0.4.8 gpqa_main_n_shot; examples are other documents",
        yaml="gpqa/n_shot/gpqa_main_n_shot.yaml",
        num_fewshot=5,
    ),
}
GPQA = TaskSpec(
    name="gpqa",
    build=build_gpqa,
    n_docs=448,
    sources=(
        Source(
            "gpqa_main.csv",
            448,
            dict.fromkeys(GPQA_COLUMNS, "text"),
            columns=GPQA_COLUMNS,
        ),
    ),
    hub=("Idavidrein/gpqa", "gpqa_main"),
    splits=lambda rows: {"train": rows["gpqa_main.csv"]},
    eval_split="train",
    forms=GPQA_FORMS,
    headline=ACC,
    kind="choice",
    target=lambda doc: doc["Correct Answer"],
    note="the order of a question's options depends on the question alone; lm-eval shuffles them "
    "with a generator that all documents share",
)
