"""Signs that a score measures the format of the answers and not the model: shares of samples, with a warning each.

A hint is all that a share is: an answer may well be empty, or end with its canvas. But a benchmark where one answer in
five has no end token, or does not parse, is measured wrongly more often than not.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

WARN_ABOVE = 0.1

# name -> what is said of it
MEANING = {
    "empty": "answers are empty",
    "no_end_token": "answers fill the canvas without an end token: a longer --gen_length may be needed",
    "cut_by_stop_string": "answers are cut by a stop string",
    "residual_masks": "answers have positions that were never committed",
    "unparseable_code": "answers hold no Python that parses",
}


def diagnostics(rows: Sequence[Mapping[str, Any]], *, code: bool) -> dict[str, Any]:
    """Name -> {"n", "of", "share"} over the samples that were generated and did not fail, and "warnings".

    rows: samples as in the result file. Texts that were made elsewhere have no tokens, so that only what can be
    read off a text is counted. residual_masks counts open positions in front of the place where an answer was cut.
    """
    rows = [row for row in rows if row["status"] == "ok"]
    generated = [row for row in rows if row["finish_reason"] is not None]
    signs = {"empty": [not row["text"].strip() for row in rows]}
    if generated:
        signs |= {
            "no_end_token": [row["finish_reason"] == "length" for row in generated],
            "cut_by_stop_string": [row["finish_reason"] == "stop_string" for row in generated],
            "residual_masks": [
                row["finish_reason"] == "length" and -1 in row["committed_at"] for row in generated
            ],
        }
    if code:
        signs["unparseable_code"] = [not _parses(row.get("extracted")) for row in rows]
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


def _parses(extracted: Mapping[str, str | None] | None) -> bool:
    """Whether the program that was taken out of an answer is Python, and not nothing."""
    source = next(iter((extracted or {}).values()), None)
    try:
        return bool(source and ast.parse(source).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
