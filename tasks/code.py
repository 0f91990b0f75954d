"""What the two code benchmarks share: answers become programs, all of them are run at once, pass@1 is their mean.

lm-eval hands a `custom` filter every answer of a task in one call, which is the place to run programs in parallel.
The filter puts one dict per document into `filtered_resps`:
    program    the source that was executed, tests included
    candidate  the part of it that came from the answer (and the prompt)
    how        how it was found, see extract.Extracted
    why_cut    what was left out of the answer and why
    passed, reason, detail, tier, seconds    see sandbox.Verdict
"""

from __future__ import annotations

from collections.abc import Callable

from tasks.extract import Extracted
from tasks.sandbox import judge_many

FILTER = "create_test"
METRIC = "pass@1"
HEADLINE = f"{METRIC},{FILTER}"  # lm-eval's key for humaneval; its mbpp calls the same number "pass_at_1,none"


def score_filter(extract: Callable[[dict, str], Extracted], tests_of: Callable[[dict], str]):
    """The filter. extract(doc, answer) gives the candidate, tests_of(doc) the tests that follow it."""

    def score(resps: list[list[str]], docs: list[dict]) -> list[dict]:
        found = [extract(doc, answers[0]) for answers, doc in zip(resps, docs, strict=True)]
        programs = [(e.code, tests_of(doc)) for e, doc in zip(found, docs, strict=True)]
        return [
            {
                "program": f"{candidate.rstrip()}\n\n{tests}\n",
                "candidate": candidate,
                "how": e.how,
                "why_cut": e.why_cut,
                "passed": v.passed,
                "reason": v.reason,
                "detail": v.detail,
                "tier": v.tier,
                "seconds": round(v.seconds, 4),
            }
            for e, (candidate, tests), v in zip(found, programs, judge_many(programs), strict=True)
        ]

    return score


def process_results(doc: dict, results: list[dict]) -> dict[str, float]:
    return {METRIC: float(results[0]["passed"])}


def scoring(extract: Callable[[dict, str], Extracted], tests_of: Callable[[dict], str]) -> dict:
    """The part of an lm-eval configuration that runs programs instead of asking the hub for code_eval."""
    return {
        "filter_list": [
            {"name": FILTER, "filter": [{"function": "custom", "filter_fn": score_filter(extract, tests_of)}]}
        ],
        "process_results": process_results,
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
    }
