"""Signs that a score measures the format of the answers and not the model.

Each sign is a share of samples, and gives a warning above 10 %. It is a hint only: a single answer
may be empty or fill its canvas. A benchmark where one answer in five has no end token, or does not
parse, is usually measured wrongly.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

WARN_ABOVE = 0.1

# sign -> text of its warning, after "N of M"
MEANING = {
    "empty": "answers are empty",
    "no_end_token": "answers fill the canvas without an end token: "
    "a longer --gen_length may be needed",
    "cut_by_stop_string": "answers are cut by a stop string",
    "end_token_first": "answers have an end token that was committed before any other position",
    "residual_masks": "answers have positions that were never committed",
    "unparseable_code": "answers contain no Python code that parses",
}


def diagnostics(samples: Sequence[Mapping[str, Any]], *, code: bool) -> dict[str, Any]:
    """Count each sign over the samples that did not fail.

    samples: as in the result file. Answers from --predictions have no tokens, so only the signs
    that can be read from a text are counted for them.
    code: the benchmark scores programs, so `unparseable_code` is counted too.
    Returns sign -> {"n", "of", "share"}, and "warnings": a list of sentences. residual_masks counts
    samples with an open position before the end of the answer; end_token_first those whose first
    commits all lie from the end token on.
    """
    samples = [s for s in samples if s["status"] == "ok"]
    generated = [s for s in samples if s["finish_reason"] is not None]
    signs = {"empty": [not s["text"].strip() for s in samples]}
    if generated:
        signs |= {
            "no_end_token": [s["finish_reason"] == "length" for s in generated],
            "cut_by_stop_string": [s["finish_reason"] == "stop_string" for s in generated],
            "end_token_first": [_ends_first(s) for s in generated],
            "residual_masks": [
                s["finish_reason"] == "length" and -1 in s["committed_at"] for s in generated
            ],
        }
    if code:
        signs["unparseable_code"] = [not _parses(s.get("extracted")) for s in samples]
    counts = {
        name: {"n": sum(seen), "of": len(seen), "share": sum(seen) / len(seen)}
        for name, seen in signs.items()
        if seen
    }
    warnings = [
        f"{c['n']} of {c['of']} {MEANING[name]}"
        for name, c in counts.items()
        if c["share"] > WARN_ABOVE
    ]
    return counts | {"warnings": warnings}


def _ends_first(sample: Mapping[str, Any]) -> bool:
    """Whether the first positions that were committed all lie from the answer's end token on.

    Beyond it stand more end tokens, often of another id, which no sample lists.
    """
    kind, _, end = (sample.get("cut") or "").rpartition(" ")
    if kind != "end token":
        return False
    pairs = list(zip(sample["token_ids"], sample["committed_at"]))
    first = min((step for _, step in pairs if step >= 0), default=-1)
    # of the first commit and the end token, the end token comes first on the canvas
    return next(
        (token == int(end) for token, at in pairs if token == int(end) or at == first), False
    )


def _parses(extracted: Mapping[str, str | None] | None) -> bool:
    """Whether the program extracted from an answer is valid Python with at least one statement."""
    source = next(iter((extracted or {}).values()), None)
    try:
        return bool(source and ast.parse(source).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
