"""Waiting lines: reverse, shuffle or change a line of names; this project's own benchmark.

In the manner of ParallelBench (arXiv:2510.04767): the tasks are easy one token at a time, and most
have many right answers. Tokens that one pass commits mix these: a name comes twice, or is lost.

A row: {"kind": "insert_at", "line": "Ada, Ben, Cleo, Dan", "name": "Eve", "place": 3,
"request": "Insert Eve right after Ben.", "answer": "Ada, Ben, Eve, Cleo, Dan"}
`name` is the new name, else ""; `place` is where it goes, from 1, else 0; `answer` is one of the
right ones. dev/make_benchmarks.py writes the file.

An answer is right (`acc`) if its names (utils.lines_names) are any of the right lines of its kind.
Reverse, insert_at and replace have one right line: they show what the others lose to the choice.
An unchanged line is wrong for every kind: a copy gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import permutations

from tasks.base import PromptForm, TaskSpec, make_task
from tasks.data import Data, DataError, Source
from utils import lines_names

FILE = "lines.jsonl"
SHA256 = "62facf0c684f680c26dabb90d583dd5d3375a8b9e928ad479def218bd8e8979f"
FILTER = "names"

# kind -> (line, name, index of the place) -> the right lines; right_lines drops an unchanged one
RIGHT: dict[str, Callable[[list[str], str, int], Iterable[Sequence[str]]]] = {
    "reverse": lambda line, name, at: [line[::-1]],
    "shuffle": lambda line, name, at: permutations(line),
    "insert": lambda line, name, at: [[*line[:i], name, *line[i:]] for i in range(len(line) + 1)],
    "insert_at": lambda line, name, at: [[*line[:at], name, *line[at:]]],
    "replace": lambda line, name, at: [[*line[:at], name, *line[at + 1 :]]],
    "replace_any": lambda line, name, at: [
        [*line[:i], name, *line[i + 1 :]] for i in range(len(line))
    ],
    "first_or_last_two": lambda line, name, at: [
        [line[1], line[0], *line[2:]],
        [*line[:-2], line[-1], line[-2]],
    ],
    "first_three": lambda line, name, at: [[*p, *line[3:]] for p in permutations(line[:3])],
}
# of the kinds with several right lines
IN_WORDS = {
    "shuffle": "any other order of {line}",
    "insert": "{line}, with {name} at any place",
    "replace_any": "{line}, with {name} in place of any one",
    "first_or_last_two": "{line}, with either the first two or the last two swapped",
    "first_three": "{line}, with the first three in any other order",
}
FIELDS = {
    "kind": f"text like ^({'|'.join(RIGHT)})$",
    "line": r"text like ^\w+(, \w+){3,5}$",
    "name": "text?",
    "place": "int",
    "request": "text",
    "answer": "text",
}
FORMS = {
    "chat": PromptForm(
        source="own wording",
        doc_to_text="A waiting line: {{line}}\n{{request}}\nAnswer with the names of the new line "
        "only, in order, separated by commas.",
        doc_to_target="{{answer}}",
        until=(),
    ),
}


def right_lines(doc: dict) -> list[str]:
    """All right lines, as "Ada, Ben, Cleo, Dan"."""
    right = RIGHT[doc["kind"]](doc["line"].split(", "), doc["name"], doc["place"] - 1)
    return [line for line in map(", ".join, right) if line != doc["line"]]


def target(doc: dict) -> dict[str, str]:
    """The kind, so that accuracy by kind can be read from a result, and what is right in words."""
    words = IN_WORDS.get(doc["kind"], doc["answer"])
    return {"kind": doc["kind"], "right": words.format(**doc)}


def read_names(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    return [[", ".join(lines_names(r)) or "[invalid]" for r in rs] for rs in resps]


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    return {"acc": float(results[0] in right_lines(doc))}


def build(data: Data, form_name: str):
    wrong = [doc for doc in data.splits["test"] if doc["answer"] not in right_lines(doc)]
    if wrong:
        raise DataError(
            f"{data.origin}: {FILE}: the answer {wrong[0]['answer']!r} is not right for kind "
            f"{wrong[0]['kind']!r}, line {wrong[0]['line']!r}, name {wrong[0]['name']!r} and "
            f"place {wrong[0]['place']}"
        )
    steps = [{"function": "custom", "filter_fn": read_names}, {"function": "take_first"}]
    config = {
        "task": "lines",
        "output_type": "generate_until",
        "test_split": "test",
        "filter_list": [{"name": FILTER, "filter": steps}],
        "process_results": process_results,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    form = FORMS[form_name]
    config |= {"doc_to_text": form.doc_to_text, "doc_to_target": form.doc_to_target}
    return make_task(data, form, config)


SPEC = TaskSpec(
    name="lines",
    build=build,
    n_docs=150,
    sources=(Source(FILE, 150, FIELDS, SHA256),),
    forms=FORMS,
    headline=f"acc,{FILTER}",
    target=target,
    gen_length=64,
)
