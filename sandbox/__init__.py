"""Runs a candidate program and its tests in a process of its own, and says whether the tests passed.

    judge(candidate, tests)               the verdict of the standard executor: one program, candidate then tests
    judge(candidate, tests, strict=True)  the tests in a process that never executes candidate code
    judge_many(programs)                  the same for a list, on every core

A fresh interpreter per program, confined as below; which tier of confinement this machine has is tried
out once (`tier()`), and below the floor nothing runs unless `accept()` was told so. A pass is a message with a
one-time token after the last test; exit codes and printed text count for nothing. Three outcomes: a pass, a failure
with its reason, and SandboxError: the machine's fault or the tests', never a failed sample.

landlock.py    which files a program may reach: the rule set of a kernel's Landlock
seccomp.py     which system calls it may make: the filter, as BPF
bubblewrap.py  the same for files where Landlock is missing, through bwrap
scratch.py     the directory it may write to, and the sweeping of dead runs
process.py     starts one interpreter, talks to it, ends it: what came of it
tiers.py       which of these mechanisms have an effect here, found out by trying
child.py       the program of that interpreter: confines itself, then runs candidate and tests
oracle.py      its other program: the strict re-check, in two interpreters that exchange data only

Not covered: faults of the kernel, side channels, what stat() shows of files, and in the default mode a program that
searches its own process for the token or returns objects that equal everything. The strict mode refuses those two.
"""

from __future__ import annotations

import builtins
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sandbox import tiers
from sandbox.names import defined_names, free_names
from sandbox.process import Limits, Outcome, run_program, run_strict
from sandbox.scratch import RUN
from sandbox.tiers import Tier

TIMEOUT_S = Limits.cpu_s  # CPU; MBPP's slowest reference solution takes 1.6 s
WALL_S = Limits.wall_s
ATTEMPTS = 3
UNSAFE = ("fs", "all")


class SandboxError(RuntimeError):
    """The program could not be judged: a fault of the machine or of the tests, never a failed sample."""


@dataclass(frozen=True)
class Verdict:
    """reason: "passed", or why not: "assertion", "exception", "syntax", "cpu", "wall", "memory", "files" (too much on
    disk), "threads" (too many), "protocol" (it ended without a verdict: exit() before the last test, a crash, noise in
    the verdict's pipe); strict also "opaque" (the tests compare an object that is no data) and "unverifiable" (they use one, so this mode
    cannot tell). detail: at most about 600 characters. seconds, cpu_s: of the process. tier: that of the sandbox.
    """

    passed: bool
    reason: str
    detail: str
    seconds: float
    cpu_s: float = 0.0
    tier: str = ""


@dataclass(frozen=True)
class Program:
    """A candidate, its tests, and what the strict mode has to know of the tests.

    helpers: trusted source that the tests need, executed beside them. names: what in the tests is the candidate's;
    None: every name that the tests use and that neither they, nor `helpers`, nor Python define.
    """

    candidate: str
    tests: str
    helpers: str = ""
    names: tuple[str, ...] | None = None

    def asked(self) -> tuple[str, ...]:
        if self.names is not None:
            return self.names
        known = defined_names(self.helpers) | set(dir(builtins))
        return tuple(sorted(free_names(self.tests) - known))


_accepted: str | None = None
_executes = True


def accept(unsafe: str | None, *, execute: bool = True) -> None:
    """Run programs also where the sandbox is below the floor: "fs" (tier B), "all" (B and C), None (neither).
    execute False: run none, here they are only kept (executes() says so to whoever scores)."""
    global _accepted, _executes
    assert unsafe in (None, *UNSAFE), unsafe
    _accepted, _executes = unsafe, execute


def executes() -> bool:
    return _executes


def announcement() -> str:
    """One line on what programs run in. Raises SandboxError as tier() does."""
    return (
        tier().line
        if _executes
        else "code sandbox: not used (--no_exec): programs are kept in the result, none is run"
    )


def tier() -> Tier:
    """The sandbox of this machine. Raises SandboxError where it is below the floor and that was not accepted."""
    found = tiers.find()
    if not found.accepted(_accepted):
        raise SandboxError(found.refusal())
    return found


def judge(
    candidate: str,
    tests: str,
    *,
    strict: bool = False,
    helpers: str = "",
    names: tuple[str, ...] | None = None,
    timeout_s: float = TIMEOUT_S,
    wall_s: float = WALL_S,
) -> Verdict:
    """Execute candidate, then tests, in one empty namespace (`__name__` is not "__main__"); passed if neither raises.

    strict: the tests run in another process, which calls the candidate's functions with data and gets data back;
    helpers, names: see Program. timeout_s: CPU seconds. wall_s: seconds until a program that waits is ended. Raises
    SandboxError if there is no verdict after three attempts, if the sandbox is below the floor (see accept), and if
    the tests are not Python.
    """
    return _judge(
        Program(candidate, tests, helpers, names), strict, Limits(timeout_s, wall_s), None
    )


def judge_many(
    programs: Sequence[Program | tuple[str, str]],
    workers: int | None = None,
    *,
    strict: bool = False,
    timeout_s: float = TIMEOUT_S,
    wall_s: float = WALL_S,
    cancel: threading.Event | None = None,
) -> list[Verdict]:
    """judge() for each program, in order, `workers` at a time (None: one per available core).

    cancel: once the caller sets it, programs are ended at once, and SandboxError is raised.
    """
    limits, ended = Limits(timeout_s, wall_s), threading.Event() if cancel is None else cancel
    whole = [p if isinstance(p, Program) else Program(*p) for p in programs]
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        try:
            return list(pool.map(lambda program: _judge(program, strict, limits, ended), whole))
        except BaseException:
            if cancel is None:
                ended.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _judge(
    program: Program, strict: bool, limits: Limits, cancel: threading.Event | None
) -> Verdict:
    found = tier()
    problem = ""
    for attempt in range(ATTEMPTS):
        end = _run(program, strict, limits, found, cancel)
        if isinstance(end, Outcome):
            if end.reason == "tests":
                raise SandboxError(f"the tests are not Python: {end.detail}")
            passed = end.reason == "passed"
            return Verdict(passed, end.reason, end.detail, end.seconds, end.cpu_s, found.name)
        problem = end
        if cancel is not None and cancel.is_set():
            break
        time.sleep(0.1 * 2**attempt)
    raise SandboxError(f"a program could not be judged, tried {ATTEMPTS} times: {problem}")


def _run(
    program: Program, strict: bool, limits: Limits, found: Tier, cancel: threading.Event | None
) -> Outcome | str:
    try:
        if strict:
            names = program.asked()
            whole = (program.candidate, program.tests, program.helpers, names)
            return run_strict(*whole, limits, found.mechanism, cancel)
        return run_program(program.candidate, program.tests, limits, found.mechanism, cancel)
    except OSError as error:
        return f"{type(error).__name__}: {error}"


def close() -> None:
    """Remove this process's scratch directory; it is made again on use, and the next run sweeps what is left."""
    RUN.close()
