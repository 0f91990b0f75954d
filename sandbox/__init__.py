"""Judges untrusted programs: runs a candidate and its tests in a confined process.

    judge(candidate, tests)               candidate, then tests, in one interpreter, as lm-eval does
    judge(candidate, tests, strict=True)  the tests in an interpreter without candidate code
    judge_many(programs)                  judge() for a list, on every core

Each program gets a fresh interpreter, confined in files, network, processes, memory and time. There
are four tiers of confinement. tier() tries out which one works on this machine. Below tiers A and
A' no program runs, unless accept() allows it.

A program passes by sending a one-time token after its last test. Exit codes and printed text do not
count. A judgement ends in a Verdict, passed or failed, or in SandboxError. SandboxError means that
the machine or the tests are at fault. It is never a failed sample.

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
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sandbox import tiers
from sandbox.names import defined_names, free_names
from sandbox.process import Limits, Outcome, run_program, run_strict
from sandbox.tiers import Tier
from utils import EnvironmentProblem

TIMEOUT_S = Limits.cpu_s  # MBPP's slowest reference solution takes 1.6 s
WALL_S = Limits.wall_s
ATTEMPTS = 3
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
        "files"         it wrote too much to its directory: bytes, entries or depth
        "threads"       it started too many threads
        "protocol"      it ended without a verdict: exit() before the last test, a crash, noise in
                the verdict's pipe
        "opaque"        strict mode: the tests compare an object that is not data
        "unverifiable"  strict mode has no verdict: the tests use an object that is not data
    detail:  the exception's text, or what was exceeded; at most about 600 characters.
    seconds: wall time of the process. cpu_s: its CPU time.
    tier:    name of the sandbox's tier.
    """

    passed: bool
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
    waits is ended. Raises SandboxError if three attempts give no verdict, if the tier is not
    accepted (see accept), and if the tests are not Python.
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

    cancel: once it is set, running programs are ended and SandboxError is raised.
    """
    limits, ended = Limits(timeout_s, wall_s), threading.Event() if cancel is None else cancel

    def one(program: Program | tuple[str, str]) -> Verdict:
        whole = program if isinstance(program, Program) else Program(*program)
        return judge_program(whole, strict=strict, limits=limits, cancel=ended)

    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
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
    found, limits = tier(), limits or Limits()
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
    """One attempt; a text says why there is no outcome."""
    try:
        if strict:
            parts = (program.candidate, program.tests, program.helpers, program.asked())
            return run_strict(*parts, limits, found.mechanism, cancel)
        return run_program(program.candidate, program.tests, limits, found.mechanism, cancel)
    except OSError as error:
        return f"{type(error).__name__}: {error}"
