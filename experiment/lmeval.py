"""lm-eval's evaluator, called quietly on one task object; the device of a run.

The index of all tasks is never built and no host is asked. `device_stamp` describes the device.
"""

from __future__ import annotations

import logging
import math
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from experiment.result import metrics_of
from tasks.code import over_repeats
from tasks.installed import is_mean

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from experiment.sample import Request


@contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval, transformers and datasets to errors, and lm-eval from describing the machine.

    lm-eval has no arguments for its progress bar and its description of the machine, which asks git
    and the shell: the three functions are replaced as long as the context is open.
    """
    import datasets
    import lm_eval.api.task
    import lm_eval.evaluator
    import transformers

    replaced = [
        (lm_eval.api.task, "tqdm", lambda items, **_: items),
        (lm_eval.evaluator, "add_env_info", lambda storage: None),
        (lm_eval.evaluator, "get_git_commit_hash", lambda: None),
    ]
    loggers = [
        logging.getLogger(name)
        for name in ("lm_eval", "lm-eval", "transformers", "datasets", "evaluate", "absl")
    ]
    functions = [getattr(module, name) for module, name, _ in replaced]
    levels = [logger.level for logger in loggers]
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        for module, name, function in replaced:
            setattr(module, name, function)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for (module, name, _), function in zip(replaced, functions, strict=True):
            setattr(module, name, function)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def evaluate(
    lm: LM,
    task,
    *,
    chat_template: bool,
    system: str | None,
    limit: int | None,
    repeats: int = 1,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> list[dict[str, Any]]:
    """lm-eval's logged samples for one task: one per document and filter.

    repeats: of --repeats; above 1 a sample's metrics are those of the document, and it has the
             metrics of each answer as "repeats".
    keep: is called with all that lm-eval returns.

    A sample that could not be scored has no metrics, and the reason as "error". Few-shot examples
    and metrics are lm-eval's. Means and intervals are computed from the samples
    (`result.metrics_of`), and the means are checked against lm-eval's own.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    failures = _score_one_by_one(task)
    if repeats > 1:
        _score_each_repeat(task)
    with quiet():
        found = simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=False,  # 0.4.8's default; newer ones have another
            # lm-eval puts nothing between it and a prompt without a chat template
            system_instruction=f"{system}\n\n" if system and not chat_template else system,
            confirm_run_unsafe_code=True,
            log_samples=True,
        )
    keep(found)
    (name,) = found["samples"]
    samples = found["samples"][name]
    _check_means(
        samples,
        {k: v for k, v in found["results"][name].items() if "," in k and "_stderr," not in k},
    )
    if repeats > 1:
        samples = [s | {"repeats": getattr(s["filtered_resps"][0], "scores", [])} for s in samples]
    return [s | {"error": failures[s["doc_id"]]} if s["doc_id"] in failures else s for s in samples]


class _Answers(list):
    """What a filter has found in each answer to a document; `scores`: the metrics of each."""

    scores: Sequence[Mapping[str, float]] = ()


class _EachRepeat:
    """A filter chain that takes each answer to a document as an instance of its own."""

    def __init__(self, chain):
        self.name, self._chain = chain.name, chain

    def apply(self, instances: Iterable) -> None:
        asked = [
            (instance, [replace(instance, resps=[t], filtered_resps={}) for t in instance.resps])
            for instance in instances
        ]
        self._chain.apply([one for _, alone in asked for one in alone])
        for instance, alone in asked:
            found = _Answers(one.filtered_resps[self.name] for one in alone)
            instance.filtered_resps[self.name] = found


def _score_each_repeat(task) -> None:
    """Make a task extract and score each answer to a document; its metrics are over them."""
    score, code = task.process_results, getattr(task, "judging", None) is not None

    def process_results(doc: dict, results: list) -> Mapping[str, float]:
        (answers,) = results
        if not isinstance(answers, _Answers):  # one answer, for progress, or one without a score
            return score(doc, results)
        answers.scores = [score(doc, [answer]) for answer in answers]
        return over_repeats(answers.scores, code=code)

    task.process_results = process_results
    task._filters = [_EachRepeat(chain) for chain in task._filters]


SCORING_S = 60.0  # for one answer: filters and metrics of lm-eval's tasks are code of many hands


class _TooLong(BaseException):
    """Scoring one answer takes too long. No Exception: metrics catch these."""


def _score_one_by_one(task) -> dict[int, str]:
    """Make a task extract and score each answer by itself, so that one answer stops no run.

    Returns doc_id -> why its answer is not scored, which is filled while the task is evaluated.
    Programs are left to the sandbox, which limits them.
    """
    failures: dict[int, str] = {}
    aggregation, documents, score = task.aggregation(), task.doc_iterator, task.process_results
    doc_id = -1

    def doc_iterator(*args: Any, **options: Any) -> Iterator[tuple[int, dict]]:
        nonlocal doc_id
        for doc_id, doc in documents(*args, **options):  # noqa: UP028
            yield doc_id, doc

    def apply_filters() -> None:
        for instance in task.instances:
            for chain in task._filters:
                instance.filtered_resps[chain.name] = ""  # in place of what cannot be extracted
                _, why = _within_limit(chain.apply, [instance])
                if why is not None:
                    failures.setdefault(instance.doc_id, why)

    def numbers(doc: dict, results: list) -> dict[str, float]:
        found = {k: v for k, v in score(doc, results).items() if is_mean(aggregation, k)}
        if odd := [k for k, v in found.items() if not math.isfinite(v)]:
            raise ValueError(f"{odd[0]} is {found[odd[0]]}")
        return found

    def process_results(doc: dict, results: list) -> Mapping[str, float]:
        if doc_id in failures:
            return {}
        found, why = _within_limit(numbers, doc, results)
        if why is not None:
            failures[doc_id] = why
        return found or {}

    if getattr(task, "judging", None) is None:
        task.doc_iterator, task.process_results = doc_iterator, process_results
        task.apply_filters = apply_filters
    return failures


def _within_limit(function: Callable[..., Any], *args: Any) -> tuple[Any, str | None]:
    """(value, None), or (None, why) where the function fails or takes more than SCORING_S."""
    try:
        with _limited():
            return function(*args), None
    except (Exception, SystemExit, _TooLong) as error:
        text = (str(error).splitlines() or [""])[0]
        why = f"{type(error).__name__}: {text}"
        if isinstance(error, _TooLong):
            why = f"it takes more than {SCORING_S:g} seconds"
        return None, f"{traceback.format_exc()}the answer cannot be scored: {why}"


@contextmanager
def _limited() -> Iterator[None]:
    """Raise _TooLong after SCORING_S, of the clock or of the CPU: metrics may use SIGALRM, too.

    Does nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def raise_too_long(*_: Any) -> None:
        raise _TooLong

    timers = {signal.ITIMER_REAL: signal.SIGALRM, signal.ITIMER_PROF: signal.SIGPROF}
    old = {number: signal.signal(number, raise_too_long) for number in timers.values()}
    try:
        for timer in timers:
            signal.setitimer(timer, SCORING_S, 0.5)  # again: a metric may have caught it
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in old.items():
            signal.signal(number, handler)


def reads_greedy(task) -> bool:
    """Whether a metric of the task reads whether an answer is the greedy one, besides its
    likelihood.

    In lm-eval these are `acc` of a task that asks for one likelihood per document, and
    `exact_match` of multiple choice.
    """
    kind = task.OUTPUT_TYPE
    return kind == "loglikelihood" or (
        kind == "multiple_choice" and "exact_match" in task.aggregation()
    )


class _Asked(Exception):
    """Ends lm-eval's evaluation where it asks for texts; carries what it asks."""


def requests_of(lm, task, config, doc_id: int) -> list[Request]:
    """What is asked of a harness for one document, as lm-eval renders it; nothing is computed.

    config: its `chat_template` and `system` are used.
    """

    def ask(instances, disable_tqdm=False):
        raise _Asked(*(i for i in instances if i.doc_id == doc_id))

    lm.generate_until = lm.loglikelihood = ask
    try:
        chat = {"chat_template": config.chat_template, "system": config.system}
        evaluate(lm, task, **chat, limit=doc_id + 1)
    except _Asked as asked:
        return lm.requests_of(asked.args)
    finally:
        del lm.generate_until, lm.loglikelihood


def scorer(task, headline: str) -> Callable[[dict, str], float | None]:
    """(document, answer) -> value of the answer in the headline metric, by the task's own filters.

    None where the answer cannot be scored. For tasks that score one answer at a time: all but those
    that run programs.
    """
    from lm_eval.api.instance import Instance

    metric, _, chain = headline.partition(",")
    (filters,) = [f for f in task._filters if f.name == chain]
    judge = task.process_results  # `evaluate` wraps it, and its document is then another one

    def score(doc: dict, text: str) -> float:
        request = Instance("generate_until", doc, ("", {}), 0)
        request.resps = [text]
        filters.apply([request])
        return float(judge(doc, [request.filtered_resps[chain]])[metric])

    return lambda doc, text: _within_limit(score, doc, text)[0]


def _check_means(samples: Sequence[dict[str, Any]], means: dict[str, float]) -> None:
    """Assert that lm-eval aggregates every metric as the mean of its samples, as we do."""
    for key, e in metrics_of(samples).items():
        assert abs(e.value - means[key]) < 1e-9, (
            f"{key}: the samples have the mean {e.value}, lm-eval reports {means[key]}"
        )


def device_stamp(device: str) -> dict[str, Any]:
    """The device of a run: its name and driver, threads, the version of CUDA."""
    stamp: dict[str, Any] = {
        "device": device,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
    }
    if device.startswith("cuda"):
        stamp |= {"device_name": torch.cuda.get_device_name(device), "driver": _driver()}
    return stamp


def _driver() -> str | None:
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            found = re.search(r"(\d+\.\d+(\.\d+)?)", file.readline())
    except OSError:
        return None
    return found.group(1) if found else None
