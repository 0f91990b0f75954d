"""One program in one fresh interpreter (two for the strict re-check): start, talk, end, and what came of it.

CPU time decides, so that a loaded machine changes no verdict; wall time ends a program that waits, and the time in
which it was ready to run but had no core does not count. A program that ends without a verdict has failed; an
interpreter that never came as far as the program, or that something outside killed, is no verdict at all (None).
"""

from __future__ import annotations

import marshal
import os
import resource
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

from sandbox import bubblewrap, landlock, seccomp
from sandbox.scratch import RUN, Scratch, holds

MAX_MESSAGE = 4096
TICK_S = 0.1  # how often a program that runs for long is looked at
KNOWN = (
    "assertion",
    "exception",
    "syntax",
    "memory",
    "protocol",
    "opaque",
    "unverifiable",
    "gone",
    "tests",
)
MUCH_MEMORY_KB = 512 << 10
MAX_THREADS = 512
GONE_S = 2.0  # between the end of a candidate's pipe and its own


@dataclass(frozen=True)
class Limits:
    cpu_s: float = 10.0
    wall_s: float = 30.0
    memory_mb: int = 4096
    file_mb: int = 16
    scratch_mb: int = 256

    def as_rlimits(self) -> dict[str, tuple[int, int]]:
        cpu = max(1, int(-(-self.cpu_s // 1)))
        return {
            "RLIMIT_CPU": (
                cpu,
                cpu + 1,
            ),  # the signal of the first can be caught, that of the second cannot
            "RLIMIT_AS": (self.memory_mb << 20,) * 2,
            "RLIMIT_FSIZE": (self.file_mb << 20,) * 2,
            "RLIMIT_NOFILE": (64, 64),
            "RLIMIT_CORE": (0, 0),
            "RLIMIT_MEMLOCK": (0, 0),
            "RLIMIT_MSGQUEUE": (0, 0),
        }


@dataclass(frozen=True)
class Mechanism:
    """What programs are confined by, besides rlimits. bwrap: path of the program, None for none."""

    landlock: bool = True
    seccomp: bool = True
    bwrap: str | None = None


@dataclass(frozen=True)
class Outcome:
    reason: str  # "passed", or why not
    detail: str
    seconds: float
    cpu_s: float


@dataclass
class Child:
    """A started interpreter: its verdict pipe, what it said, and what it still has to be told."""

    process: subprocess.Popen
    verdict: int
    token: bytes
    unsent: memoryview
    message: bytes = b""
    status: int = 0
    cpu_s: float = 0.0
    rss_kb: int = 0
    cut: str = ""  # why it was ended, if it was
    pidfd: int = field(default=-1)

    def hear(self) -> None:
        """Take what is in the verdict pipe; never wait, never keep more than MAX_MESSAGE."""
        while True:
            try:
                part = os.read(self.verdict, MAX_MESSAGE)
            except BlockingIOError:
                return
            if not part:
                return
            self.message = (self.message + part)[: MAX_MESSAGE + 1]
            if len(self.message) > MAX_MESSAGE:
                return

    def tell(self) -> None:
        """Write what the job pipe takes; a program that ended takes nothing more."""
        stdin = self.process.stdin
        try:
            self.unsent = self.unsent[os.write(stdin.fileno(), self.unsent) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.unsent = memoryview(b"")
        if not self.unsent:
            stdin.close()

    def look(self) -> int:
        """Threads of it and its descendants now. What they used is kept: bwrap's own end tells nothing of theirs."""
        now = [
            _numbers(f"/proc/{pid}/stat") for pid in family(self.process.pid)
        ]  # user and system time, threads, memory
        self.cpu_s = max(self.cpu_s, sum(n[11] + n[12] for n in now) / os.sysconf("SC_CLK_TCK"))
        self.rss_kb = max(self.rss_kb, sum(n[21] for n in now) * (os.sysconf("SC_PAGE_SIZE") >> 10))
        return sum(n[17] for n in now)

    def says(self, start: bytes) -> bool:
        self.hear()
        return self.message.startswith(start)

    def ends_within(self, seconds: float) -> bool:
        """Whether it ends without being killed."""
        end = time.monotonic() + seconds
        while not (ended := self.ended()) and time.monotonic() < end:
            time.sleep(0.001)
        return ended

    def ended(self) -> bool:
        return (
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        )

    def end(self) -> None:
        """Kill the whole session, reap its leader, close what is open."""
        for kill in (
            os.killpg,
            os.kill,
        ):  # the leader is not yet reaped: the id cannot be another's
            try:
                kill(self.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        _, status, usage = os.wait4(self.process.pid, 0)
        self.hear()
        self.status = self.process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_s = max(self.cpu_s, usage.ru_utime + usage.ru_stime)
        # between fork and exec it had the memory of this process, which holds a model: that counts in its peak for ever
        if usage.ru_maxrss > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss:
            self.rss_kb = max(self.rss_kb, usage.ru_maxrss)
        for fd in (self.verdict, self.pidfd):
            if fd >= 0:
                os.close(fd)
        if not self.process.stdin.closed:
            try:
                self.process.stdin.close()
            except BrokenPipeError:
                pass


def environment(folder: str) -> dict[str, str]:
    """Everything a program finds in its environment; also that of the bwrap process, whose own is readable inside."""
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
    paths = {"HOME": folder, "TMPDIR": folder, "PATH": "/usr/bin:/bin"}
    return (
        {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "PYTHONUTF8": "1", "TZ": "UTC"} | threads | paths
    )


_FILTER = seccomp.build()


def _job(mechanism: Mechanism, limits: Limits, folder: str, more: dict) -> dict:
    abi = landlock.version()[0] if mechanism.landlock else 0
    sizes = (8 if abi < 4 else 16 if abi < 6 else 24, *landlock.handled(abi))
    return {
        "limits": limits.as_rlimits(),
        "confine": True,
        "landlock": (sizes, landlock.rules(folder, abi)) if abi else None,
        "seccomp": (_FILTER.code, _FILTER.pid_at) if mechanism.seccomp and _FILTER else None,
        "parent": 0 if mechanism.bwrap else os.getpid(),
        "site": landlock.site_packages(),
        "lib": RUN.lib(),
    } | more


def start(
    mechanism: Mechanism,
    limits: Limits,
    folder: str,
    mode: str,
    more: dict,
    pipes: tuple[int, ...] = (),
) -> Child:
    """Start an interpreter in `folder`. Raises OSError where that is not possible."""
    token = secrets.token_bytes(16)
    job = marshal.dumps(_job(mechanism, limits, folder, more))
    read_fd, write_fd = os.pipe()
    try:
        safe_path = (
            ["-P"] if sys.version_info >= (3, 11) else []
        )  # child.py does the same below 3.11
        program = f"{RUN.lib()}/child.pyc"
        command = [
            sys.executable,
            "-S",
            "-s",
            "-B",
            *safe_path,
            program,
            str(write_fd),
            mode,
            *map(str, pipes),
        ]
        if mechanism.bwrap:
            command = (
                bubblewrap.command(mechanism.bwrap, folder, RUN.lib(), landlock.readable())
                + command
            )
        process = subprocess.Popen(
            command,
            env=environment(folder),
            cwd=folder,
            start_new_session=True,
            pass_fds=(write_fd, *pipes),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
    except BaseException:
        os.close(read_fd)
        raise
    finally:
        os.close(write_fd)
    os.set_blocking(read_fd, False)
    os.set_blocking(process.stdin.fileno(), False)
    child = Child(process, read_fd, token, memoryview(len(job).to_bytes(8, "little") + job + token))
    try:
        child.pidfd = os.pidfd_open(process.pid)
    except (OSError, AttributeError):
        pass  # before Linux 5.3: looked at every few milliseconds instead
    child.tell()
    return child


def listen(
    children: list[Child], limits: Limits, folders: list[str], cancel: threading.Event | None
) -> None:
    """Until the last of the children ends, or must be ended: then its .cut says why."""
    last, began = children[-1], time.monotonic()
    looked, deadline = began, began + limits.wall_s
    while not last.ended():
        poll = select.poll()
        for child in children:
            if child.unsent:
                poll.register(child.process.stdin.fileno(), select.POLLOUT)
            if child.pidfd >= 0:
                poll.register(child.pidfd, select.POLLIN)
        now = time.monotonic()
        if now >= deadline:
            waited = max(delayed_s(child.process.pid) for child in children)
            deadline = began + min(limits.wall_s + waited, 10 * limits.wall_s)
            if now >= deadline:
                last.cut = "wall"
                return
        if now - looked >= TICK_S:
            looked = now
            for child in children:
                child.hear()
            if any(holds(folder, limits.scratch_mb << 20) for folder in folders):
                last.cut = "files"
                return
            if any(child.look() > MAX_THREADS for child in children):
                last.cut = "threads"
                return
        if cancel is not None and cancel.is_set():
            last.cut = "cancelled"
            return
        pause = TICK_S if last.pidfd >= 0 else 0.003
        poll.poll(1000 * max(0.0, min(pause, deadline - now)))
        for child in children:
            if child.unsent:
                child.tell()
        if any(child.pidfd >= 0 and child is not last and child.ended() for child in children):
            time.sleep(0.001)  # a pidfd stays readable: the last one is about to notice too


def family(pid: int) -> list[int]:
    """A process and its descendants (bubblewrap puts two processes before the interpreter)."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            children = file.read().split()
    except OSError:
        children = []
    return [pid, *(p for child in children for p in family(int(child)))]


def delayed_s(pid: int) -> float:
    """Seconds that a process and its descendants were ready to run and had to wait for a core."""
    return sum(_numbers(f"/proc/{p}/schedstat")[1] for p in family(pid)) / 1e9


def _numbers(file: str) -> list[int]:
    """The numbers in a file of /proc, without the name of the program; zeros where they cannot be had."""
    try:
        with open(file) as opened:
            return [
                int(word) if word.isdigit() else 0
                for word in opened.read().rpartition(")")[2].split()
            ]
    except OSError:
        return [0] * 52


def run_program(
    candidate: str,
    tests: str,
    limits: Limits,
    mechanism: Mechanism,
    cancel: threading.Event | None = None,
) -> Outcome | str:
    """Candidate and tests in one interpreter; a text is why there is no verdict."""
    began = time.monotonic()
    with Scratch() as folder:
        job = {"candidate": _source(candidate), "tests": _source(tests)}
        child = start(mechanism, limits, folder, "program", job)
        try:
            listen([child], limits, [folder], cancel)
        finally:
            child.end()
        return outcome(child, limits, mechanism, time.monotonic() - began)


def run_strict(
    candidate: str,
    tests: str,
    helpers: str,
    names: tuple[str, ...],
    limits: Limits,
    mechanism: Mechanism,
    cancel: threading.Event | None = None,
) -> Outcome | str:
    """The candidate in one interpreter, the tests in another; a text is why there is no verdict."""
    began = time.monotonic()
    with ExitStack() as stack:
        folders = [stack.enter_context(Scratch()) for _ in range(2)]
        questions, answers = os.pipe(), os.pipe()
        ours = [*questions, *answers]
        children: list[Child] = []
        try:
            job = {"candidate": _source(candidate)}
            children.append(
                start(mechanism, limits, folders[0], "oracle", job, (questions[0], answers[1]))
            )
            job = {"tests": _source(tests), "helpers": _source(helpers), "names": tuple(names)}
            children.append(
                start(mechanism, limits, folders[1], "checker", job, (questions[1], answers[0]))
            )
            while ours:
                os.close(ours.pop())  # each end is now held by its process alone
            listen(children, limits, folders, cancel)
            if children[1].says(b"SFgone") and not children[0].ends_within(GONE_S):
                children[0].cut = "closed"
        finally:
            for fd in ours:
                os.close(fd)
            for child in reversed(children):
                child.end()
        oracle, checker = children
        seconds = time.monotonic() - began
        found = outcome(checker, limits, mechanism, seconds)
        if isinstance(found, Outcome) and found.reason == "gone":  # why, its own end tells
            return outcome(oracle, limits, mechanism, seconds)
        if isinstance(found, Outcome):
            return Outcome(found.reason, found.detail, seconds, oracle.cpu_s)
        return found


def _source(text: str) -> str | bytes:
    """marshal takes every str but knows no subclass of it."""
    return str(text)


def outcome(child: Child, limits: Limits, mechanism: Mechanism, seconds: float) -> Outcome | str:
    """What the end of a child means; a text is why it means nothing."""
    status = child.status
    if mechanism.bwrap and status > 128:
        status = 128 - status  # bwrap tells signals as a shell does
    message, cpu_s = child.message, child.cpu_s

    def failed(reason: str, detail: str) -> Outcome:
        return Outcome(reason, detail, seconds, cpu_s)

    if child.cut == "cancelled":
        return "cancelled"
    if not message.startswith(b"S"):
        return (
            message[1:].decode("utf-8", "replace")
            or f"the interpreter ended before the program, status {status}"
        )
    if child.cut == "wall":
        return failed("wall", f"still running after {seconds:.0f} s")
    if child.cut == "files":
        return failed(
            "files",
            f"more than {limits.scratch_mb} MiB, too many files or too deep a tree in its directory",
        )
    if child.cut == "threads":
        return failed("threads", f"more than {MAX_THREADS} threads")
    if child.cut == "closed":
        return failed("protocol", "closed the pipe of its answers")
    said = message[1:]
    if said == b"P" + child.token and status == 0:
        return Outcome("passed", "", seconds, cpu_s)
    reason, _, detail = said[1:].partition(b"\n")
    if said.startswith(b"F") and status == 0 and reason.decode("ascii", "replace") in KNOWN:
        return failed(reason.decode(), detail.decode("utf-8", "backslashreplace"))
    if said:
        return failed(
            "protocol", f"something else than a verdict in the verdict's pipe, exit status {status}"
        )
    # the kernel counts for the limit in ticks: its signal may come a little before cpu_s reaches it
    if (
        status == -signal.SIGXCPU
        or status == -signal.SIGKILL
        and max(cpu_s, seconds * bool(mechanism.bwrap)) >= limits.cpu_s
    ):
        return failed("cpu", f"over {limits.cpu_s:g} s of CPU time")
    if (
        status == -signal.SIGKILL and mechanism.seccomp
    ):  # the filter keeps a program from sending it to itself
        if child.rss_kb > MUCH_MEMORY_KB:
            return failed("memory", f"killed by the system while it held {child.rss_kb >> 10} MiB")
        return "the interpreter was killed from outside"
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    return failed("protocol", f"ended before the last test, {how}")
