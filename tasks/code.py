"""Scoring of the code benchmarks: answers become programs, and programs run in the sandbox.

lm-eval calls a `custom` filter once, with all answers of a task. That is where the programs run in
parallel, except those that were judged while the model was still generating (Judging.beside).
The filter puts one dict per document into `filtered_resps`:
    program    source that was executed, tests included
    candidate  the part of it that comes from the answer (and the prompt)
    how        how the candidate was found, see utils.Extracted
    why_cut    what was left out of the answer, and why
    passed, reason, detail, tier, seconds, cpu_seconds
               see sandbox.Verdict; passed is None under --no_exec
    strict     only after add_strict: {passed, reason, detail} of a pass's second run, else None
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import sandbox
from sandbox import Program, judge_many
from utils import Extracted, UsageError

FILTER = "create_test"
METRIC, STRICT = "pass@1", "pass@1_strict"
HEADLINE = f"{METRIC},{FILTER}"  # lm-eval's key for humaneval; its mbpp has "pass_at_1,none"
NOT_RUN = {
    "passed": None,
    "reason": "not run",
    "detail": "--no_exec",
    "tier": None,
    "seconds": None,
    "cpu_seconds": None,
}


class Judging:
    """How one task's answers are judged.

    extract:    (doc, answer) -> the candidate found in the answer.
    program_of: (doc, candidate) -> the program to judge, with its tests.
    strict:     judge every pass a second time in strict mode; add_strict sets it.
    """

    def __init__(
        self,
        extract: Callable[[dict, str], Extracted],
        program_of: Callable[[dict, str], Program],
    ):
        self.extract, self.program_of = extract, program_of
        self.strict = False
        self._early: dict[Program, Future] = {}

    @contextmanager
    def beside(self, n: int) -> Iterator[Callable[[dict, str], None]]:
        """Judge answers in n threads while the model generates others.

        Yields a function of (doc, answer) that queues an answer. score() takes the verdicts from
        here. At exit, programs that still run are ended.
        """
        cancel, pool = threading.Event(), ThreadPoolExecutor(n)

        def ahead(doc: dict, answer: str) -> None:
            program = self.program_of(doc, self.extract(doc, answer).code)
            if program not in self._early:
                self._early[program] = pool.submit(
                    verdicts, [program], strict=self.strict, cancel=cancel
                )

        try:
            yield ahead
        finally:
            cancel.set()
            pool.shutdown(cancel_futures=True)
            self._early.clear()

    def score(self, resps: list[list[str]], docs: list[dict]) -> list[dict]:
        """lm-eval's filter: the dict described above for each document."""
        answers = [answer for answer, *_ in resps]
        found = [self.extract(doc, answer) for answer, doc in zip(answers, docs, strict=True)]
        programs = [self.program_of(doc, e.code) for e, doc in zip(found, docs, strict=True)]
        early, distinct = self._early, dict.fromkeys(programs)
        # a queued program that has not started is withdrawn: judge_many uses every core
        late = [p for p in distinct if p not in early or early[p].cancel()]
        judged = dict(zip(late, verdicts(late, strict=self.strict), strict=True))
        failed = [p for p in distinct if p not in judged and early[p].exception()]
        judged |= zip(failed, verdicts(failed, strict=self.strict), strict=True)
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


def verdicts(
    programs: Sequence[Program], *, strict: bool = False, cancel: threading.Event | None = None
) -> list[dict]:
    """The part of the dict above that judging gives. strict: judge passes again.

    cancel: see judge_many.
    """
    if not sandbox.executes():
        return [NOT_RUN | ({"strict": None} if strict else {}) for _ in programs]
    rows = [
        {
            "passed": v.passed,
            "reason": v.reason,
            "detail": v.detail,
            "tier": v.tier,
            "seconds": round(v.seconds, 4),
            "cpu_seconds": round(v.cpu_s, 3),
        }
        for v in judge_many(programs, cancel=cancel)
    ]
    if strict:
        passes = [i for i, row in enumerate(rows) if row["passed"]]
        again = judge_many([programs[i] for i in passes], strict=True, cancel=cancel)
        for row in rows:
            row["strict"] = None
        for i, v in zip(passes, again, strict=True):
            rows[i]["strict"] = {"passed": v.passed, "reason": v.reason, "detail": v.detail}
    return rows


def process_results(doc: dict, results: list[dict]) -> dict[str, float]:
    """pass@1 of one document, and pass@1_strict after add_strict; {} if no program was run."""
    (found,) = results
    if found["passed"] is None:
        return {}
    scores = {METRIC: float(found["passed"])}
    if "strict" in found:
        scores[STRICT] = float(found["passed"] and found["strict"]["passed"])
    return scores


def scoring(judging: Judging) -> dict:
    """The part of an lm-eval configuration that scores, without the hub's code_eval."""

    # lm-eval deep-copies a configuration's objects, but not its functions
    def score(resps: list[list[str]], docs: list[dict]) -> list[dict]:
        return judging.score(resps, docs)

    return {
        "filter_list": [{"name": FILTER, "filter": [{"function": "custom", "filter_fn": score}]}],
        "process_results": process_results,
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
    }


def add_strict(task):
    """Make a code task report pass@1_strict too: every pass is judged again in strict mode.

    task: what build_task returned, before it is evaluated. Returns the task. Raises UsageError
    where the task runs no programs.
    """
    judging = getattr(task, "judging", None)
    if judging is None:
        raise UsageError(
            f"--strict_exec: {task.config.task} runs no programs; humaneval and mbpp do"
        )
    judging.strict = True
    task.aggregation()[STRICT] = task.aggregation()[METRIC]
    task.higher_is_better()[STRICT] = True
    return task
