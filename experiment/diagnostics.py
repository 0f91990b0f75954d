"""Signs that a score measures the format of the answers and not the model.

Each sign is a share of samples, and gives a warning above 10 %, right_otherwise above 1 %. It is a
hint only: a single answer may be empty or fill its canvas. A benchmark where one answer in five has
no end token, or does not parse, is usually measured wrongly.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from sandbox.names import without_warnings

WARN_ABOVE = {"right_otherwise": 0.01}
USUALLY = 0.1
# metrics that read answers with more care than the headline: GSM8K's numbers, our code extraction
CAREFUL = ("exact_match,numeric", "pass@1_ours,create_test")

# sign -> text of its warning, after "N of M"
MEANING = {
    "empty": "answers are empty",
    "no_end_token": "answers fill the canvas without an end token: "
    "a longer --gen_length may be needed",
    "cut_by_stop_string": "answers are cut by a stop string",
    "end_token_first": "answers have an end token that was committed before any other position",
    "residual_masks": "answers have positions that were never committed",
    "unparseable_code": "answers contain no Python code that parses",
    "right_otherwise": "answers are wrong by the headline and right by",
}


def diagnostics(
    samples: Sequence[Mapping[str, Any]], *, code: bool, headline: str = ""
) -> dict[str, Any]:
    """Count each sign over the samples that did not fail.

    samples: as in the result file. Answers from --predictions have no tokens, so only the signs
    that can be read from a text are counted for them.
    code: the benchmark scores programs, so `unparseable_code` is counted too.
    headline: key of the metric that stands for the benchmark. Where a more careful one is there,
    `right_otherwise` counts the answers that are right by it and wrong by the headline.
    Returns sign -> {"n", "of", "share"}, and "warnings": a list of sentences. residual_masks counts
    samples with an open position before the end of the answer; end_token_first those whose first
    commits all lie from the end token on.
    """
    samples = [s for s in samples if s["status"] == "ok"]
    generated = [s for s in samples if s["finish_reason"] is not None]
    signs = {
        "empty": [not s["text"].strip() for s in samples],
        "cut_by_stop_string": [(s.get("cut") or "").startswith("stop string") for s in samples],
    }
    if generated:
        signs |= {
            "no_end_token": [s["finish_reason"] == "length" for s in generated],
            "end_token_first": [_ends_first(s) for s in generated],
            "residual_masks": [
                s["finish_reason"] == "length" and -1 in s["committed_at"] for s in generated
            ],
        }
    if code:
        signs["unparseable_code"] = [not _parses(s.get("extracted")) for s in samples]
    metrics = [m for s in samples if (m := s.get("metrics")) and headline in m]
    careful = next((name for name in CAREFUL if metrics and name in metrics[0]), None)
    if careful:
        signs["right_otherwise"] = [m[careful] > m[headline] for m in metrics]
    counts = {
        name: {"n": sum(seen), "of": len(seen), "share": sum(seen) / len(seen)}
        for name, seen in signs.items()
        if seen
    }
    warnings = [
        f"{c['n']} of {c['of']} {MEANING[name]}"
        + (f" {careful}" if name == "right_otherwise" else "")
        for name, c in counts.items()
        if c["share"] > WARN_ABOVE.get(name, USUALLY)
    ]
    return counts | {"warnings": warnings}


def choice_diagnostics(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As `diagnostics`, for documents that are scored by likelihood: signs of their requests."""
    options = [(s, o) for s in samples if s["status"] == "ok" for o in s["options"]]
    signs = {
        "cut": (
            "contexts are cut on the left to fit the model",
            [o["n_cut"] > 0 for _, o in options],
        ),
        "no_context": (
            "contexts are empty: the start token, or the end token, stands there",
            [not o.get("prompt", s["prompt"]).strip() for s, o in options],
        ),
    }
    counts = {
        name: {"n": sum(seen), "of": len(seen), "share": sum(seen) / len(seen)}
        for name, (_, seen) in signs.items()
        if seen
    }
    warnings = [f"{c['n']} of {c['of']} {signs[n][0]}" for n, c in counts.items() if c["n"]]
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
        with without_warnings():
            return bool(source and ast.parse(source).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
