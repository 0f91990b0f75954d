"""TruthfulQA, generation: questions that many people answer wrongly. Lin et al., arXiv:2109.07958.

A row of the CSV becomes {"question", "best_answer", "correct_answers": [...],
"incorrect_answers": [...], ...}.

Prompt and metrics are lm-eval's truthfulqa_gen: an answer is right (`bleu_acc`, `rougeL_acc`) where
it is nearer to the best true reference than to the best false one. ROUGE is computed without the
1000 resamplings per pair of texts that lm-eval spends on a mean of one value; the scores are the
same.
"""

from __future__ import annotations

from functools import cache

from tasks.base import PromptForm, TaskSpec, installed_config, make_task
from tasks.data import Data, Source
from utils import truthfulqa_answer

FILE = "TruthfulQA.csv"
SHA256 = "99d6ae7755e3b435eade956068c9de7c0c474770344237aeb66b56519ba4b697"
YAML = "truthfulqa/truthfulqa_gen.yaml"
COLUMNS = (
    "Type",
    "Category",
    "Question",
    "Best Answer",
    "Correct Answers",
    "Incorrect Answers",
    "Source",
)
FIELDS = {
    "type": "text?",
    "category": "text?",
    "question": "text",
    "best_answer": "text",
    "correct_answers": "texts",
    "incorrect_answers": "texts",
    "source": "text?",
}

FORMS = {
    # a chat model may begin with a lead-in and a blank line, where lm-eval's stop string would cut
    "chat": PromptForm(
        source="lm-eval 0.4.8 truthfulqa_gen; the whole answer counts, without a leading 'A:'",
        yaml=YAML,
        until=(),
    ),
    "lm_eval": PromptForm(
        source="lm-eval 0.4.8 truthfulqa_gen", yaml=YAML, until=("\n\n",), clean=False
    ),
}


def convert(row: dict) -> dict:
    """A row of the CSV in the names and types of the hub's data set."""

    def answers(text: str) -> list[str]:
        return [a.strip() for a in text.split(";") if a.strip()]

    doc = {name.lower().replace(" ", "_"): row[name] for name in COLUMNS}
    return doc | {k: answers(doc[k]) for k in ("correct_answers", "incorrect_answers")}


def build(data: Data, form_name: str):
    from lm_eval.tasks.truthfulqa.utils import process_docs_gen

    form = FORMS[form_name]
    config = installed_config(YAML) | {"task": "truthfulqa", "process_results": process_results}
    config["process_docs"] = process_docs_gen
    if form.clean:
        steps = [{"function": "custom", "filter_fn": clean_filter}, {"function": "take_first"}]
        config["filter_list"] = [{"name": "none", "filter": steps}]
    return make_task(data, form, config)


def clean_filter(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    return [[truthfulqa_answer(r) for r in rs] for rs in resps]


@cache
def _rouge_scorer():
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeLsum"])


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """lm-eval's twelve scores of one answer: {bleu, rouge1, rouge2, rougeL} x {max, acc, diff}.

    max and diff are on a scale of 0 to 100, acc is 0 or 1.
    """
    import numpy as np
    from lm_eval.tasks.truthfulqa.utils import bleu

    def lines(text: str) -> str:  # rougeLsum takes lines for sentences
        return text.replace(" . ", ".\n")

    answer = results[0]
    groups = (doc["correct_answers"], doc["incorrect_answers"])
    rouge = [[_rouge_scorer().score(lines(ref), lines(answer)) for ref in refs] for refs in groups]
    scores = {"bleu": [[bleu([[ref]], [answer]) for ref in refs] for refs in groups]}
    for name, key in (("rouge1", "rouge1"), ("rouge2", "rouge2"), ("rougeL", "rougeLsum")):
        scores[name] = [[s[key].fmeasure * 100 for s in group] for group in rouge]
    out: dict[str, float] = {}
    for name, (true, false) in scores.items():
        best, worst = float(np.nanmax(true)), float(np.nanmax(false))
        out |= {f"{name}_max": best, f"{name}_acc": int(best > worst), f"{name}_diff": best - worst}
    return out


SPEC = TaskSpec(
    name="truthfulqa",
    build=build,
    n_docs=817,
    sources=(Source(FILE, 817, FIELDS, SHA256, columns=COLUMNS, convert=convert),),
    hub=("truthfulqa/truthful_qa", "generation"),
    splits=lambda rows: {"validation": rows[FILE]},
    eval_split="validation",
    forms=FORMS,
    headline="bleu_acc,none",
    kind="qa",
    target=lambda doc: {k: doc[f"{k}_answers"] for k in ("correct", "incorrect")},
    gen_length=128,
)
