"""Judges untrusted programs: runs a candidate and its tests in a confined process.

    judge(candidate, tests)               candidate, then tests, in one interpreter, as lm-eval does
    judge(candidate, tests, strict=True)  the tests in an interpreter without candidate code
    judge_many(programs)                  judge() for a list, on every core

Each program gets a fresh interpreter, confined in files, network, processes, memory and time. There
are four tiers of confinement. tier() tries out which one works on this machine. Below tiers A and
A' no program runs, unless accept() allows it.

A program passes by sending a one-time token after its last test. Exit codes and printed text do not
count. Whatever a program does is a verdict of that program. Where the machine is at fault, the
program runs again, alone; after ATTEMPTS the judgement ends without a verdict (judge_many:
passed=None, judge: SandboxError). It is never a failed sample.

Without strict mode a program can forge a pass, under lm-eval too: it can search its own process for
the token, change what the tests use, or return an object that equals everything. Strict mode
refuses these. Faults of the kernel, side channels and what stat() shows of other files are not
covered. docs/sandbox.md has the details.

    tiers.py       finds the best tier, by running small hostile programs
    process.py     starts an interpreter, watches it, ends it, reads its outcome
    landlock.py    which files a program may reach: rules of the kernel's Landlock
    bubblewrap.py  the same through bwrap, where Landlock is missing
    seccomp.py     which system calls a program may make: the filter, in BPF
    scratch.py     the directories that programs may write to
    names.py       which names a source binds and reads
    child.py       runs in the interpreter: confines it, then executes candidate and tests
    oracle.py      runs in the two interpreters of strict mode, which exchange only data
"""

from __future__ import annotations

import builtins
import resource
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from sandbox import tiers
from sandbox.names import defined_names, free_names
from sandbox.process import Limits, Outcome, run_program, run_strict
from sandbox.tiers import Tier
from utils import EnvironmentProblem, available_cores

TIMEOUT_S = Limits.cpu_s  # MBPP's slowest reference solution takes 1.6 s
WALL_S = Limits.wall_s
ATTEMPTS = 4
UNSAFE = ("fs", "all")


class SandboxError(EnvironmentProblem):
    """A program could not be judged: a fault of the machine or the tests, not a failed sample."""


@dataclass(frozen=True)
class Verdict:
    """How a program fared.

    passed:  every test ran and none raised.
    reason:  "passed", or
        "assertion"     an AssertionError was raised
        "exception"     another exception was raised, SystemExit among them
        "syntax"        the candidate is not Python
        "cpu"           it used more CPU time than allowed
        "wall"          it was still running after the wall time allowed
        "memory"        it ran out of memory
        "files"         it wrote too much to its directory, or opened too many files
        "threads"       it started too many threads
        "protocol"      it ended without a verdict: exit() before the last test, a crash, noise in
                the verdict's pipe
        "opaque"        strict mode: the tests compare an object that is not data
        "unverifiable"  strict mode has no verdict: the tests use an object that is not data
        "error"         passed is None: there is no verdict, since the machine or the tests are at
                fault; only judge_many returns it
    detail:  the exception's text, or what was exceeded; at most about 600 characters.
    seconds: wall time of the process. cpu_s: its CPU time.
    tier:    name of the sandbox's tier.
    """

    passed: bool | None
    reason: str
    detail: str
    seconds: float
    cpu_s: float = 0.0
    tier: str = ""


@dataclass(frozen=True)
class Program:
    """A candidate and its tests. The other two are for strict mode.

    helpers: trusted source that the tests need; it runs with them.
    names:   names in the tests that the candidate provides. None: all that the tests use and that
         neither they,
             nor helpers, nor Python define.
    """

    candidate: str
    tests: str
    helpers: str = ""
    names: tuple[str, ...] | None = None

    def asked(self) -> tuple[str, ...]:
        """The names that the candidate provides."""
        if self.names is not None:
            return self.names
        known = defined_names(self.helpers) | set(dir(builtins))
        return tuple(sorted(free_names(self.tests) - known))


_accepted: str | None = None
_executes = True


def accept(unsafe: str | None, *, execute: bool = True) -> None:
    """Set for this process what may run.

    unsafe: "fs" allows tier B, "all" tiers B and C, None neither. execute=False: run no program;
    executes() says so to the scorer, which then keeps programs without a verdict.
    """
    global _accepted, _executes
    assert unsafe in (None, *UNSAFE), unsafe
    _accepted, _executes = unsafe, execute


def executes() -> bool:
    return _executes


def announcement() -> str:
    """One line on the sandbox. Raises SandboxError where tier() does."""
    if not _executes:
        return "code sandbox: not used (--no_exec): programs are kept in the result, none is run"
    return tier().line


def tier() -> Tier:
    """The sandbox of this machine. Raises SandboxError where its tier is not accepted."""
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
    """Execute candidate, then tests, in one empty namespace; it passes if neither raises.

    `__name__` is "builtins" there, not "__main__".
    strict: the tests run in another process, which sends data to the candidate's functions and gets
    data back.
    helpers, names: see Program. timeout_s: CPU seconds. wall_s: seconds after which a program that
    waits is ended. Raises SandboxError if ATTEMPTS give no verdict (a fault of the machine, or
    tests that are not Python), and if the tier is not accepted (see accept).
    """
    program = Program(candidate, tests, helpers, names)
    return judge_program(program, strict=strict, limits=Limits(timeout_s, wall_s))


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

    A program that could not be judged has a Verdict with passed=None and the reason "error".
    cancel: once it is set, running programs are ended and SandboxError is raised.
    """
    tier()  # raises where no program may run
    limits, ended = Limits(timeout_s, wall_s), threading.Event() if cancel is None else cancel

    def one(program: Program | tuple[str, str]) -> Verdict:
        whole = program if isinstance(program, Program) else Program(*program)
        verdict = _judged(whole, strict, limits, ended)
        if verdict.passed is None and ended.is_set():
            raise SandboxError(verdict.detail)
        return verdict

    with ThreadPoolExecutor(_affordable(workers or available_cores())) as pool:
        try:
            return list(pool.map(one, programs))
        except BaseException:
            if cancel is None:
                ended.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def judge_program(
    program: Program,
    *,
    strict: bool = False,
    limits: Limits | None = None,
    cancel: threading.Event | None = None,
) -> Verdict:
    """judge() with every limit open to choice, see process.Limits. cancel: see judge_many."""
    verdict = _judged(program, strict, limits or Limits(), cancel)
    if verdict.passed is None:
        raise SandboxError(verdict.detail)
    return verdict


def _judged(
    program: Program, strict: bool, limits: Limits, cancel: threading.Event | None
) -> Verdict:
    """The verdict; that of a program without an outcome has passed=None."""
    found, began, problem = tier(), time.monotonic(), ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(0.05 * 2**attempt)
        if attempt == ATTEMPTS - 1:  # what does not come free is not the program's
            limits = replace(limits, room=False)
        with _TURNS.turn(alone=attempt > 0):
            end = _run(program, strict, limits, found, cancel, attempt)
        if isinstance(end, Outcome):
            passed = end.reason == "passed"
            return Verdict(passed, end.reason, end.detail, end.seconds, end.cpu_s, found.name)
        problem = end
        if cancel is not None and cancel.is_set():
            break
    detail = f"a program could not be judged, tried {attempt + 1} times: {problem}"
    return Verdict(None, "error", detail, time.monotonic() - began, tier=found.name)


def _run(
    program: Program,
    strict: bool,
    limits: Limits,
    found: Tier,
    cancel: threading.Event | None,
    attempt: int,
) -> Outcome | str:
    """One attempt; a text says why there is no outcome."""
    more = (limits, found.mechanism, cancel, attempt)
    try:
        if strict:
            parts = (program.candidate, program.tests, program.helpers, program.asked())
            return run_strict(*parts, *more)
        return run_program(program.candidate, program.tests, *more)
    except EnvironmentProblem:
        raise
    except Exception as error:  # no program may stop a run
        return f"{type(error).__name__}: {error}"


class _Turns:
    """Programs run beside one another; one that was disturbed runs alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running, self._alone = 0, False

    @contextmanager
    def turn(self, *, alone: bool) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            if alone:
                self._alone = True
                try:
                    self._changed.wait_for(lambda: self._running == 0)
                except BaseException:  # interrupted
                    self._alone = False
                    self._changed.notify_all()
                    raise
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._alone = self._alone and not alone
                self._changed.notify_all()


_TURNS = _Turns()


def _affordable(workers: int) -> int:
    """As many workers as this process may open files for; the soft limit is raised if necessary."""
    of_a_worker, others = 32, 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = workers * of_a_worker + others
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        workers = min(workers, max(1, (soft - others) // of_a_worker))
    return workers
