"""Runs a candidate program and its tests in a process of its own, and says whether the tests passed.

What is covered: a fresh interpreter per program (the process that holds the model is never forked), its own
session, all of which is killed afterwards; limits on CPU time, wall time, memory, file size and open files; an
environment built from scratch (no tokens, PYTHONHASHSEED=0); a scratch directory that is removed; output thrown
away; a verdict that only a message on a private pipe after the last test can give, so that exit codes and
printed text count for nothing.

What is NOT covered: this is no security sandbox. The program runs as the same user: it can read and write that
user's files, use the network, start processes, signal others, and leave its session and outlive the limits. A
program that sets out to do so can search its own process for the token of the verdict and forge a pass, and
objects that compare equal to everything pass tests here as they do in every executor of this kind.

CPU time decides, so a loaded machine does not change a verdict; wall time is the backstop for a program that sleeps.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 10.0  # CPU; MBPP's slowest reference solution takes 1.6 s
WALL_S = 30.0
MEMORY_MB = 4096
FILE_MB = 16
RUNNER = Path(__file__).with_name("sandbox_runner.py")
MAX_MESSAGE = 1 << 16


class SandboxError(RuntimeError):
    """The program could not be judged: a fault of the machine or of the tests, never a failed sample."""


@dataclass(frozen=True)
class Verdict:
    """reason: "passed", or why not: "assertion", "exception", "syntax", "cpu", "wall", "memory", "protocol"
    (it ended without a verdict: exit() before the last test, a crash). detail: at most about 1 kB of text.
    seconds: wall time of the process.
    """

    passed: bool
    reason: str
    detail: str
    seconds: float


def judge(candidate: str, tests: str, *, timeout_s: float = TIMEOUT_S, wall_s: float = WALL_S) -> Verdict:
    """Execute candidate, then tests, in one empty namespace (`__name__` is not "__main__"); passed if neither raises.

    timeout_s: CPU seconds. wall_s: seconds until a program that waits is ended. Raises SandboxError if no process
    can be started (tried three times) or if the tests are not Python.
    """
    for attempt in range(3):
        with _scratch() as folder:
            verdict = _run(candidate, tests, timeout_s, wall_s, folder)
        if verdict is not None:
            return verdict
        time.sleep(0.1 * 2**attempt)
    raise SandboxError(f"the interpreter for generated code does not start: {sys.executable} {RUNNER}")


def judge_many(
    programs: Sequence[tuple[str, str]],
    workers: int | None = None,
    *,
    timeout_s: float = TIMEOUT_S,
    wall_s: float = WALL_S,
) -> list[Verdict]:
    """judge() for each (candidate, tests), in order, `workers` at a time (None: one per available core)."""
    workers = workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        try:
            return list(pool.map(lambda program: judge(*program, timeout_s=timeout_s, wall_s=wall_s), programs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@functools.cache
def _scratch_root() -> str:
    """Memory rather than disk: creating files on a busy disk is slow enough to change a verdict."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else tempfile.gettempdir()


class _scratch:
    """A new directory, removed at the end also where the program took its own permissions away."""

    def __enter__(self) -> str:
        self.path = tempfile.mkdtemp(prefix="dllmexp-", dir=_scratch_root())
        return self.path

    def __exit__(self, *_exc) -> None:
        def allow_and_retry(function, path, _info):
            try:
                os.chmod(os.path.dirname(path), 0o700)
                os.chmod(path, 0o700)
                function(path)
            except OSError:
                pass  # what cannot be removed is left to the system; it must not fail the run

        shutil.rmtree(self.path, onerror=allow_and_retry)


def _command(verdict_fd: int) -> list[str]:
    safe_path = ["-P"] if sys.version_info >= (3, 11) else []  # the runner does the same below 3.11
    return [sys.executable, "-S", "-s", "-B", *safe_path, str(RUNNER), str(verdict_fd)]


def _environment(folder: str) -> dict[str, str]:
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
    paths = {"HOME": folder, "TMPDIR": folder, "PATH": "/usr/bin:/bin"}
    return {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "PYTHONUTF8": "1"} | threads | paths


def _run(candidate: str, tests: str, timeout_s: float, wall_s: float, folder: str) -> Verdict | None:
    """One process. None: the interpreter never came as far as the program."""
    token = secrets.token_hex(16)
    job = {
        "candidate": candidate,
        "tests": tests,
        "token": token,
        "cpu_s": timeout_s,
        "wall_s": wall_s + 5,  # it ends by itself also where nobody is left to kill it
        "memory_bytes": MEMORY_MB << 20,
        "file_bytes": FILE_MB << 20,
        "site": sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}),
    }
    read_fd, write_fd = os.pipe()
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            _command(write_fd), env=_environment(folder), cwd=folder, start_new_session=True, pass_fds=(write_fd,),
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except OSError as e:
        os.close(read_fd)
        raise SandboxError(f"cannot start {sys.executable}: {e}") from e
    finally:
        os.close(write_fd)
    try:
        try:
            with process.stdin as stdin:
                stdin.write(json.dumps(job).encode())
        except BrokenPipeError:
            pass
        message, timed_out = _listen(process.pid, read_fd, start + wall_s)
    finally:
        os.close(read_fd)
        status, cpu_s = _end(process)
    return _verdict(message, token, timed_out, status, cpu_s, timeout_s, time.monotonic() - start)


def _exited(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _listen(pid: int, fd: int, deadline: float) -> tuple[bytes, bool]:
    """What the process wrote until it ended, and whether the deadline came first. Both ends may be held open by
    children of the program, so its own end is watched too."""
    message, is_open = b"", True
    while True:
        ended = _exited(pid)
        wait = 0.0 if ended else min(0.05, max(0.0, deadline - time.monotonic()))
        if is_open and select.select([fd], [], [], wait)[0]:
            chunk = os.read(fd, MAX_MESSAGE)
            is_open = bool(chunk) and len(message) < MAX_MESSAGE
            message += chunk[: MAX_MESSAGE - len(message)]
        elif ended:
            return message, False
        elif not is_open:
            time.sleep(min(0.002, wait))
        if not ended and time.monotonic() >= deadline:
            return message, True


def _end(process: subprocess.Popen) -> tuple[int, float]:
    """Kill the whole session, reap its leader: (exit status, negative for a signal; CPU seconds used)."""
    try:
        os.killpg(process.pid, signal.SIGKILL)  # the leader is not yet reaped: the id cannot be another's
    except (ProcessLookupError, PermissionError):
        pass
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime


def _verdict(
    message: bytes, token: str, timed_out: bool, status: int, cpu_s: float, timeout_s: float, seconds: float
) -> Verdict | None:
    def failed(reason: str, detail: str) -> Verdict:
        return Verdict(False, reason, detail, seconds)

    started, _, report = message.partition(b"\n")
    if started != b"S":
        return None if not timed_out else failed("wall", "the interpreter did not start in time")
    try:
        said = json.loads(report) if report else None
        honest = said is None or said.pop("token") == token
        reason, detail = (said["reason"], said["detail"]) if said is not None and honest else ("", "")
    except (ValueError, KeyError, TypeError, AttributeError):
        said, honest, reason, detail = {}, False, "", ""
    if not honest:
        return failed("protocol", "something else than the runner wrote to the verdict's pipe")
    if reason == "tests":
        raise SandboxError(f"the tests are not Python: {detail}")
    if timed_out:
        return failed("wall", f"still running after {seconds:.0f} s")
    if reason == "passed" and status != 0:
        return failed("protocol", f"passed, then exit status {status}")
    if reason:
        return Verdict(reason == "passed", reason, detail, seconds)
    # the kernel counts for the limit in ticks: its signal may come a little before cpu_s reaches it
    if status == -signal.SIGXCPU or status == -signal.SIGKILL and cpu_s >= timeout_s:
        return failed("cpu", f"over {timeout_s:g} s of CPU time")
    return failed("protocol", f"ended before the last test, exit status {status}")
