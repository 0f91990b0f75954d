"""GSM8K: grade-school word problems, the answer is a number. Cobbe et al., arXiv:2110.14168.

A row: {"question": "Janet's ducks lay 16 eggs ...", "answer": "Janet sells 16 - 3 ...\\n#### 18"}

Scored by lm-eval's own filters and exact_match. strict-match needs the definition's exact closing
phrase. flexible-extract takes the last number of the answer (utils.GSM8K_NUMBER); it is the
headline, because chat models rarely write "####". "1,000" is read as 1000.
A third filter, numeric, reads the answer as a careful reader does (utils.gsm8k_number): $75.00 is
75, and a number after "the answer is 3." does not count.
"""

from __future__ import annotations

from tasks.base import PromptForm, TaskSpec, installed_config, make_task
from tasks.data import Data, Source
from utils import GSM8K_NUMBER, gsm8k_number

FIELDS = {"question": "text", "answer": r"text like #### -?[\d,.]*\d\s*$"}
TEST, TRAIN = "gsm8k/test.jsonl", "gsm8k/train.jsonl"

NUMERIC = "numeric"
GOLD, GOLD_ONCE = "(?s).*#### ", r"(?s)\A.*#### "  # without "\\A" a search takes a quadratic time

FORMS = {
    "chat": PromptForm(
        source="lm-eval 0.4.8 gsm8k, without examples",
        yaml="gsm8k/gsm8k.yaml",
        until=(),  # a chat answer may begin with "Question: ..."
    ),
    "lm_eval": PromptForm(source="lm-eval 0.4.8 gsm8k", yaml="gsm8k/gsm8k.yaml", num_fewshot=5),
    "cot": PromptForm(
        source="lm-eval 0.4.8 gsm8k_cot, without examples, as Dream reports",
        yaml="gsm8k/gsm8k-cot.yaml",
    ),
    "lm_eval_cot": PromptForm(
        source="lm-eval 0.4.8 gsm8k_cot", yaml="gsm8k/gsm8k-cot.yaml", num_fewshot=8
    ),
}


def build(data: Data, form_name: str):
    form = FORMS[form_name]
    config = installed_config(form.yaml) | {"task": "gsm8k"}
    (flexible,) = [chain for chain in config["filter_list"] if chain["name"] == "flexible-extract"]
    flexible["filter"][0]["regex_pattern"] = GSM8K_NUMBER
    steps = [{"function": "custom", "filter_fn": read_numbers}, {"function": "take_first"}]
    config["filter_list"].append({"name": NUMERIC, "filter": steps})
    for metric in config["metric_list"]:
        ignored = metric["regexes_to_ignore"]
        metric["regexes_to_ignore"] = [GOLD_ONCE if r == GOLD else r for r in ignored]
    return make_task(data, form, config)


def read_numbers(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """The number of each answer; as the gold answer writes it, where they are equal."""

    def read(answer: str, doc: dict) -> str:
        number, gold = gsm8k_number(answer), doc["answer"].rpartition("####")[2].strip()
        if number is None:
            return "[invalid]"
        return gold if number == gsm8k_number(gold) else number

    return [[read(r, doc) for r in rs] for rs, doc in zip(resps, docs, strict=True)]


SPEC = TaskSpec(
    name="gsm8k",
    build=build,
    n_docs=1319,
    sources=(
        Source(
            TEST, 1319, FIELDS, "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"
        ),
        Source(
            TRAIN, 7473, FIELDS, "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"
        ),
    ),
    hub=("openai/gsm8k", "main"),
    splits=lambda rows: {"train": rows[TRAIN], "test": rows[TEST]},
    eval_split="test",
    forms=FORMS,
    headline="exact_match,flexible-extract",
    kind="math",
    target=lambda doc: doc["answer"].rpartition("####")[2].strip(),
)
