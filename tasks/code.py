"""What the two code benchmarks share: answers become programs, all of them are run, pass@1 is their mean.

lm-eval hands a `custom` filter every answer of a task in one call, which is the place to run in parallel what has not been
judged beside the generation by then.
The filter puts one dict per document into `filtered_resps`:
    program    the source that was executed, tests included
    candidate  the part of it that came from the answer (and the prompt)
    how        how it was found, see extract.Extracted
    why_cut    what was left out of the answer and why
    passed, reason, detail, tier, seconds, cpu_seconds    see sandbox.Verdict; passed is None with --no_exec
    strict     {passed, reason, detail} of the strict re-check of a pass, None where there was no pass
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import sandbox
from sandbox import Program, Verdict, judge_many
from tasks.programs import Extracted

FILTER = "create_test"
METRIC, STRICT = "pass@1", "pass@1_strict"
HEADLINE = f"{METRIC},{FILTER}"  # lm-eval's key for humaneval; its mbpp calls the same number "pass_at_1,none"
NOT_RUN = {
    "passed": None,
    "reason": "not run",
    "detail": "--no_exec",
    "tier": None,
    "seconds": None,
    "cpu_seconds": None,
}

Extract = Callable[[dict, str], Extracted]
ProgramOf = Callable[
    [dict, str], Program
]  # document, candidate -> with its tests and what the strict mode needs


class Judging:
    """A task's answers to verdicts. extract(doc, answer) gives the candidate, program_of(doc, candidate) the program to judge."""

    def __init__(self, extract: Extract, program_of: ProgramOf):
        self.extract, self.program_of = extract, program_of
        self._early: dict[Program, Future] = {}

    @contextmanager
    def beside(self, n: int) -> Iterator[Callable[[dict, str], None]]:
        """Judge what the callable is given, (doc, answer), in n threads while the caller goes on; score() takes it from there."""
        cancel, pool = threading.Event(), ThreadPoolExecutor(n)

        def ahead(doc: dict, answer: str) -> None:
            program = self.program_of(doc, self.extract(doc, answer).code)
            if program not in self._early:
                self._early[program] = pool.submit(verdicts, [program], cancel)

        try:
            yield ahead
        finally:
            cancel.set()
            pool.shutdown(cancel_futures=True)
            self._early.clear()

    def score(self, resps: list[list[str]], docs: list[dict]) -> list[dict]:
        """lm-eval's filter: the dict above for each document."""
        answers = [answer for answer, *_ in resps]
        found = [self.extract(doc, answer) for answer, doc in zip(answers, docs, strict=True)]
        programs = [self.program_of(doc, e.code) for e, doc in zip(found, docs, strict=True)]
        early, asked = self._early, dict.fromkeys(programs)
        late = [
            p for p in asked if p not in early or early[p].cancel()
        ]  # not begun: taken back, for here are all cores
        judged = dict(zip(late, verdicts(late), strict=True))
        again = [p for p in asked if p not in judged and early[p].exception()]
        judged |= zip(again, verdicts(again), strict=True)
        return [
            {
                "program": f"{p.candidate.rstrip()}\n\n{p.tests}\n",
                "candidate": p.candidate,
                "how": e.how,
                "why_cut": e.why_cut,
                **(judged[p] if p in judged else early[p].result()[0]),
            }
            for e, p in zip(found, programs, strict=True)
        ]


def verdicts(programs: Sequence[Program], cancel: threading.Event | None = None) -> list[dict]:
    """How each program fared, and what the strict re-check says of those that passed. cancel: see judge_many."""
    if not sandbox.executes():
        return [NOT_RUN | {"strict": None} for _ in programs]
    first = judge_many(programs, cancel=cancel)
    passes = [i for i, v in enumerate(first) if v.passed]
    strict = judge_many([programs[i] for i in passes], strict=True, cancel=cancel)
    again: dict[int, Verdict] = dict(zip(passes, strict, strict=True))
    return [
        {
            "passed": v.passed,
            "reason": v.reason,
            "detail": v.detail,
            "tier": v.tier,
            "seconds": round(v.seconds, 4),
            "cpu_seconds": round(v.cpu_s, 3),
            "strict": {k: getattr(again[i], k) for k in ("passed", "reason", "detail")}
            if i in again
            else None,
        }
        for i, v in enumerate(first)
    ]


def process_results(doc: dict, results: list[dict]) -> dict[str, float]:
    """Both metrics; none of a program that was not run."""
    (found,) = results
    if found["passed"] is None:
        return {}
    return {
        METRIC: float(found["passed"]),
        STRICT: float(found["passed"] and found["strict"]["passed"]),
    }


def scoring(judging: Judging) -> dict:
    """The part of an lm-eval configuration that runs programs instead of asking the hub for code_eval."""

    def score(
        resps: list[list[str]], docs: list[dict]
    ) -> list[dict]:  # lm-eval copies what is no function
        return judging.score(resps, docs)

    return {
        "filter_list": [{"name": FILTER, "filter": [{"function": "custom", "filter_fn": score}]}],
        "process_results": process_results,
        "metric_list": [
            {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in (METRIC, STRICT)
        ],
    }
