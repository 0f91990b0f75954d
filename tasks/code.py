"""What the two code benchmarks share: answers become programs, all of them are run at once, pass@1 is their mean.

lm-eval hands a `custom` filter every answer of a task in one call, which is the place to run programs in parallel.
The filter puts one dict per document into `filtered_resps`:
    program    the source that was executed, tests included
    candidate  the part of it that came from the answer (and the prompt)
    how        how it was found, see extract.Extracted
    why_cut    what was left out of the answer and why
    passed, reason, detail, tier, seconds, cpu_seconds    see sandbox.Verdict; passed is None with --no_exec
    strict     {passed, reason, detail} of the strict re-check of a pass, None where there was no pass
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tasks import sandbox
from tasks.extract import Extracted
from tasks.sandbox import Program, Verdict, judge_many

FILTER = "create_test"
METRIC, STRICT = "pass@1", "pass@1_strict"
HEADLINE = f"{METRIC},{FILTER}"  # lm-eval's key for humaneval; its mbpp calls the same number "pass_at_1,none"
NOT_RUN = {"passed": None, "reason": "not run", "detail": "--no_exec", "tier": None, "seconds": None, "cpu_seconds": None}

Extract = Callable[[dict, str], Extracted]
ProgramOf = Callable[[dict, str], Program]  # document, candidate -> with its tests and what the strict mode needs


def score_filter(extract: Extract, program_of: ProgramOf):
    """The filter. extract(doc, answer) gives the candidate, program_of(doc, candidate) the program to judge."""

    def score(resps: list[list[str]], docs: list[dict]) -> list[dict]:
        found = [extract(doc, answers[0]) for answers, doc in zip(resps, docs, strict=True)]
        programs = [program_of(doc, e.code) for e, doc in zip(found, docs, strict=True)]
        return [
            {
                "program": f"{p.candidate.rstrip()}\n\n{p.tests}\n",
                "candidate": p.candidate,
                "how": e.how,
                "why_cut": e.why_cut,
                **verdict,
            }
            for e, p, verdict in zip(found, programs, verdicts(programs), strict=True)
        ]

    return score


def verdicts(programs: Sequence[Program]) -> list[dict]:
    """How each program fared, and what the strict re-check says of those that passed."""
    if not sandbox.executes():
        return [NOT_RUN | {"strict": None} for _ in programs]
    first = judge_many(programs)
    passes = [i for i, v in enumerate(first) if v.passed]
    again: dict[int, Verdict] = dict(zip(passes, judge_many([programs[i] for i in passes], strict=True), strict=True))
    return [
        {
            "passed": v.passed,
            "reason": v.reason,
            "detail": v.detail,
            "tier": v.tier,
            "seconds": round(v.seconds, 4),
            "cpu_seconds": round(v.cpu_s, 3),
            "strict": {k: getattr(again[i], k) for k in ("passed", "reason", "detail")} if i in again else None,
        }
        for i, v in enumerate(first)
    ]


def process_results(doc: dict, results: list[dict]) -> dict[str, float]:
    """Both metrics; none of a program that was not run."""
    (found,) = results
    if found["passed"] is None:
        return {}
    return {METRIC: float(found["passed"]), STRICT: float(found["passed"] and found["strict"]["passed"])}


def scoring(extract: Extract, program_of: ProgramOf) -> dict:
    """The part of an lm-eval configuration that runs programs instead of asking the hub for code_eval."""
    return {
        "filter_list": [
            {"name": FILTER, "filter": [{"function": "custom", "filter_fn": score_filter(extract, program_of)}]}
        ],
        "process_results": process_results,
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in (METRIC, STRICT)],
    }
