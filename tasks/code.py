"""Scoring of the code benchmarks: answers become programs, and programs run in the sandbox.

lm-eval calls a `custom` filter once, with all answers of a task. That is where the programs run in
parallel, except those that were judged while the model was still generating (Judging.beside).
The filter puts one dict per document into `filtered_resps`:
    program    source that was executed, tests included
    candidate  the part of it that comes from the answer (and the prompt)
    how        how the candidate was found, see utils.Extracted
    why_cut    what was left out of the answer, and why
    passed, reason, detail, tier, seconds, cpu_seconds
               see sandbox.Verdict; passed is None under --no_exec, and with the reason "error"
    ours       only after use_extraction: {how, why_cut, candidate, passed, reason, detail} of this
               project's extraction; the rest is then by the authors' rule
    strict     only after add_strict: {passed, reason, detail} of a pass's second run, else None
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from math import comb, fsum

import sandbox
from sandbox import Program, judge_many
from tasks.evalplus import evalplus, verbatim
from utils import Extracted

FILTER = "create_test"
METRIC, STRICT, OURS = "pass@1", "pass@1_strict", "pass@1_ours"
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
    authors:    (doc, answer) -> the candidate by the authors' extraction; use_extraction sets it.
    """

    authors: Callable[[dict, str], str] | None = None
    rule = ""  # the name of the authors' extraction

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
            code = (self.authors or (lambda *a: self.extract(*a).code))(doc, answer)
            program = self.program_of(doc, code)
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
        own = [self.program_of(doc, e.code) for e, doc in zip(found, docs, strict=True)]
        ours, programs = found, own
        if self.authors:
            codes = map(self.authors, docs, answers)
            found = [Extracted(code, self.rule, "") for code in codes]
            programs = [self.program_of(d, e.code) for e, d in zip(found, docs, strict=True)]
        early, distinct = self._early, dict.fromkeys([*programs, *own])
        # a queued program that has not started is withdrawn: judge_many uses every core
        late = [p for p in distinct if p not in early or early[p].cancel()]
        judged = dict(zip(late, verdicts(late, strict=self.strict), strict=True))
        failed = [p for p in distinct if p not in judged and _failed(early[p])]
        judged |= zip(failed, verdicts(failed, strict=self.strict), strict=True)

        def verdict(program: Program) -> dict:
            return judged[program] if program in judged else early[program].result()[0]

        rows = [
            {
                "program": f"{p.candidate.rstrip()}\n\n{p.tests}\n",
                "candidate": p.candidate,
                "how": e.how,
                "why_cut": e.why_cut,
                **verdict(p),
            }
            for e, p in zip(found, programs, strict=True)
        ]
        for row, e, p in zip(rows, ours, own, strict=True) if self.authors else ():
            fared = {key: verdict(p)[key] for key in ("passed", "reason", "detail")}
            row["ours"] = {"how": e.how, "why_cut": e.why_cut, "candidate": e.code} | fared
        return rows


def _failed(early: Future) -> bool:
    return early.exception() is not None or unjudged(early.result()[0]) is not None


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


def unjudged(found: dict) -> str | None:
    """Why a program of an answer could not be judged, None where all were."""
    parts = (found, found.get("ours"), found.get("strict"))
    return next((part["detail"] for part in parts if part and part["reason"] == "error"), None)


def process_results(doc: dict, results: list[dict]) -> dict[str, float]:
    """pass@1 of one document, and pass@1_strict after add_strict; {} without a verdict."""
    (found,) = results
    if found["passed"] is None or unjudged(found):
        return {}
    scores = {METRIC: float(found["passed"])}
    if "ours" in found:
        scores[OURS] = float(found["ours"]["passed"])
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

    task: what build_task returned, before it is evaluated. Returns the task.
    """
    task.judging.strict = True
    return _report_too(task, STRICT)


# ---------------------------------------------------------------- several answers a document


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n answers, drawn without replacement, have one of the c that pass.

    The unbiased estimator of Chen et al. 2021 (arXiv:2107.03374), exact in whole numbers.
    """
    return 1 - comb(n - c, k) / comb(n, k)


def reported_k(n: int) -> list[int]:
    """The k of the pass@k of n answers: the powers of two below n, and n."""
    return [2**i for i in range((n - 1).bit_length())] + [n]


def over_repeats(scores: Sequence[Mapping[str, float]], *, code: bool) -> dict[str, float]:
    """A document's metrics from those of its answers: means, and pass@k for programs.

    {} where an answer has none.
    """
    n = len(scores)
    names = [name for name in scores[0] if all(name in one for one in scores)]
    found = {name: fsum(float(one[name]) for one in scores) / n for name in names}
    if code and METRIC in found:
        passed = sum(one[METRIC] == 1 for one in scores)
        found |= {f"pass@{k}": pass_at_k(n, passed, k) for k in reported_k(n)[1:]}
    return found


def add_repeats(task, n: int):
    """Make a code task report pass@k of n answers a document. Returns the task."""
    for k in reported_k(n)[1:]:
        _report_too(task, f"pass@{k}")
    return task


def _report_too(task, metric: str):
    task.aggregation()[metric] = task.aggregation()[METRIC]
    task.higher_is_better()[metric] = True
    return task


# ---------------------------------------------------------------- the authors' extraction


def opencompass(doc: dict, answer: str) -> str:
    """The program that OpenCompass takes from an answer, with which LLaDA's scores are published.

    Its humaneval_postprocess_v2 (first closed fence, else the whole text, behind the prompt) and
    the patterns of its MBPPEvaluator: the first of them that matches, from its first opening to its
    last closing. A closing quote without an opening one is dropped.
    """
    if "entry_point" in doc:
        block = re.search(r"```\w*\n(.*?)```", answer, re.DOTALL)
        return doc["prompt"] + (block.group(1) if block else answer).lstrip()
    for opening, closing in _opencompass_marks():
        start = re.search(opening, answer)
        if start is None:
            continue
        begin = end = start.end()
        if closing:
            *_, last = [None, *re.compile(closing).finditer(answer, begin)]
            if last is None:
                continue
            end = last.start()
        answer = answer[begin:end] if closing else answer[begin:]
        break
    answer = answer.split("```")[0]
    if done := re.search(r"\[?DONE", answer):
        answer = answer[: done.start()].rstrip().removesuffix("'")
    answer = answer.replace("\\_", "_").strip()
    alone = answer.endswith("'") and answer.rpartition("\n")[2].count("'") % 2
    return answer[:-1].rstrip() if alone and not answer.endswith("'''") else answer


def _opencompass_marks() -> Iterator[tuple[str, str]]:
    """Pairs of what opens and what closes a program, in OpenCompass's order; "": the end."""
    begins, ends = (r"\[BEGIN\]", "BEGIN"), (r"\[DONE\]", "DONE")
    for quote, unquote in (("'", r"'\s*"), ("'", ""), ("", "")):
        for end in ends:
            for begin in begins:
                yield rf"{begin}\s*{quote}", unquote + end
    for end in ("```", ""):
        yield from (("```python", end), ("```", end))
    yield from ((r"\[BEGIN\]\s*'", ""), (r"\[BEGIN\]", ""), ("'", r"'\s*\[DONE\]"))


def lm_eval(doc: dict, answer: str) -> str:
    """The whole answer, behind HumanEval's prompt: lm-eval 0.4.8 extracts nothing."""
    return doc["prompt"] + answer if "entry_point" in doc else answer


# name in a protocol's cell -> (doc, answer) -> candidate
EXTRACTIONS: dict[str, Callable[[dict, str], str]] = {
    "opencompass": opencompass,
    "evalplus": evalplus,
    "verbatim": verbatim,
    "lm_eval": lm_eval,
}


def use_extraction(task, name: str | None):
    """Score a code task by the authors' extraction, with `pass@1_ours` beside it; None: by ours.

    task: what build_task returned, before it is evaluated. Returns the task.
    """
    if name is None:
        return task
    task.judging.authors, task.judging.rule = EXTRACTIONS[name], name
    return _report_too(task, OURS)
