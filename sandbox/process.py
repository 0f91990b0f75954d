"""Starts an interpreter for a program (two in strict mode), watches it, ends it, reads its outcome.

The limit that decides is one of CPU time, so that a loaded machine changes no verdict. Wall time
ends a program that waits; time in which it was ready to run but had no core does not count. A
program that ends without a verdict has failed. An interpreter that did not get as far as the
program, or was killed from outside, has no outcome, nor has a program whose directory had no room
because of others: then run_program and run_strict return a text with the reason, and the program
has to run again, alone.
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
from dataclasses import dataclass, replace

from sandbox import bubblewrap, landlock, seccomp
from sandbox.names import asks_for_identity
from sandbox.scratch import FULL_BYTES, RUN, Scratch, free_bytes, holds_too_much

MAX_MESSAGE, MAX_DETAIL = 4096, 600
TICK_S = 0.1  # interval between two checks of a running program
# mode -> reasons that its process may send. In the first two it has executed the candidate, which
# can send what it likes; no Verdict has "gone"
SAYS = {
    "program": "assertion exception syntax memory files".split(),
    "oracle": (),
    "checker": "assertion exception syntax memory files protocol opaque unverifiable gone".split(),
}
MUCH_MEMORY_KB = 512 << 10  # a program that holds more and is killed from outside ran out of memory
MAX_THREADS = 512
GONE_S = 2.0  # time for a candidate's process to end after its pipe has closed


@dataclass(frozen=True)
class Limits:
    """Of one interpreter.

    file_mb: size of one file. scratch_mb: of all files of the program.
    room:    whether room that the file system loses meanwhile counts as the program's.
    """

    cpu_s: float = 10.0
    wall_s: float = 30.0
    memory_mb: int = 4096
    file_mb: int = 16
    scratch_mb: int = 256
    room: bool = True

    def as_rlimits(self) -> dict[str, tuple[int, int]]:
        cpu = max(1, int(-(-self.cpu_s // 1)))
        return {
            # the signal of the soft limit can be caught, that of the hard limit cannot
            "RLIMIT_CPU": (cpu, cpu + 1),
            "RLIMIT_AS": (self.memory_mb << 20,) * 2,
            "RLIMIT_FSIZE": (self.file_mb << 20,) * 2,
            "RLIMIT_NOFILE": (64, 64),
            "RLIMIT_CORE": (0, 0),
            "RLIMIT_MEMLOCK": (0, 0),
            "RLIMIT_MSGQUEUE": (0, 0),
        }


@dataclass(frozen=True)
class Mechanism:
    """What confines programs, besides rlimits. bwrap: path of bubblewrap, None to do without it."""

    landlock: bool = True
    seccomp: bool = True
    bwrap: str | None = None


@dataclass(frozen=True)
class Outcome:
    """As in sandbox.Verdict. One more reason: "gone", the other process ended."""

    reason: str
    detail: str
    seconds: float
    cpu_s: float


@dataclass
class Child:
    """A started interpreter.

    mode:      see child.py.
    verdict:   file descriptor from which its message is read. message: what it has sent.
    token:     the bytes that make a message a pass.
    unsent:    the rest of its job, still to be written to stdin.
    ended_for: why this side ended it: "wall", "files", "threads", "room", "cancelled", "closed";
               else "".
    pidfd:     -1 where the kernel has none.
    reaped:    its status and usage, where the system cannot tell that it has ended without reaping.
    """

    mode: str
    process: subprocess.Popen
    verdict: int
    token: bytes
    unsent: memoryview
    message: bytes = b""
    status: int = 0
    cpu_s: float = 0.0
    rss_kb: int = 0
    ended_for: str = ""
    pidfd: int = -1
    reaped: tuple | None = None

    def read_message(self) -> None:
        """Read what is in the verdict pipe, without waiting; keep MAX_MESSAGE + 1 bytes at most."""
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

    def send_job(self) -> None:
        """Write as much of the job as stdin takes; nothing to a program that has ended."""
        stdin = self.process.stdin
        try:
            self.unsent = self.unsent[os.write(stdin.fileno(), self.unsent) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.unsent = memoryview(b"")
        if not self.unsent:
            stdin.close()

    def count_threads(self) -> int:
        """Threads of it and its descendants now.

        Records their time and memory too: under bwrap, wait4() does not report them.
        """
        now = [_numbers(f"/proc/{pid}/stat") for pid in family(self.process.pid)]
        user, system, threads, pages = (
            11,
            12,
            17,
            21,
        )  # fields after the program's name, see proc(5)
        ticks = sum(n[user] + n[system] for n in now)
        self.cpu_s = max(self.cpu_s, ticks / os.sysconf("SC_CLK_TCK"))
        page_kb = os.sysconf("SC_PAGE_SIZE") >> 10
        self.rss_kb = max(self.rss_kb, sum(n[pages] for n in now) * page_kb)
        return sum(n[threads] for n in now)

    def has_sent(self, start: bytes) -> bool:
        self.read_message()
        return self.message.startswith(start)

    def ends_within(self, seconds: float) -> bool:
        """Whether it ends by itself within so many seconds."""
        end = time.monotonic() + seconds
        while not (ended := self.ended()) and time.monotonic() < end:
            time.sleep(0.001)
        return ended

    def ended(self) -> bool:
        pid = self.process.pid
        if hasattr(os, "waitid"):  # while it is not reaped, no other process can have its id
            return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        if self.reaped is None:
            found, *reaped = os.wait4(pid, os.WNOHANG)
            self.reaped = tuple(reaped) if found else None
        return self.reaped is not None

    def end(self) -> None:
        """Kill the whole session, reap its leader, close the pipes."""
        for kill in (os.killpg, os.kill):
            try:
                kill(self.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        status, usage = self.reaped or os.wait4(self.process.pid, 0)[1:]
        self.read_message()
        self.status = self.process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_s = max(self.cpu_s, usage.ru_utime + usage.ru_stime)
        # between fork and exec it had the memory of this process, which may hold a model: that is
        # part of its peak
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
    """The environment of a program, and of bwrap, whose own environment is readable inside."""
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
        "confine": sys.platform == "linux",
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
    """Start an interpreter in `folder`. mode, pipes: see child.py. Raises OSError."""
    token = secrets.token_bytes(16)
    job = marshal.dumps(_job(mechanism, limits, folder, more))
    read_fd, write_fd = os.pipe()
    try:
        options = ["-S", "-s", "-B"]
        if sys.version_info >= (3, 11):  # below it, child.py has the same effect
            options.append("-P")
        arguments = [str(write_fd), mode, *map(str, pipes)]
        command = [sys.executable, *options, f"{RUN.lib()}/child.pyc", *arguments]
        if mechanism.bwrap:
            paths = (folder, RUN.lib(), landlock.readable())
            command = bubblewrap.command(mechanism.bwrap, *paths) + command
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
    unsent = memoryview(len(job).to_bytes(8, "little") + job + token)
    child = Child(mode, process, read_fd, token, unsent)
    try:
        child.pidfd = os.pidfd_open(process.pid)
    except (OSError, AttributeError):
        pass  # before Linux 5.3: watch() polls every few milliseconds
    child.send_job()
    return child


def watch(
    children: list[Child], limits: Limits, folders: list[str], cancel: threading.Event | None
) -> int:
    """Wait until the last of the children has ended, or has to be ended: see its .ended_for.

    Returns the room that was left for its files then.
    """
    last, began, room = children[-1], time.monotonic(), free_bytes()
    checked, deadline = began, began + limits.wall_s
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
                last.ended_for = "wall"
                break
        if now - checked >= TICK_S:
            checked = now
            for child in children:
                child.read_message()
            if any(holds_too_much(folder, limits.scratch_mb << 20) for folder in folders):
                last.ended_for = "files"
                break
            # files without a name are in no directory
            if limits.room and room - free_bytes() > len(folders) * limits.scratch_mb << 20:
                last.ended_for = "room"
                break
            if any(child.count_threads() > MAX_THREADS for child in children):
                last.ended_for = "threads"
                break
        if cancel is not None and cancel.is_set():
            last.ended_for = "cancelled"
            break
        pause = TICK_S if last.pidfd >= 0 else 0.003
        poll.poll(1000 * max(0.0, min(pause, deadline - now)))
        for child in children:
            if child.unsent:
                child.send_job()
        if any(child.pidfd >= 0 and child is not last and child.ended() for child in children):
            time.sleep(
                0.001
            )  # its pidfd stays readable and poll() returns at once; the last ends soon
    return free_bytes()


def family(pid: int) -> list[int]:
    """A process and its descendants: bubblewrap starts the interpreter as its grandchild."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            children = file.read().split()
    except OSError:
        children = []
    return [pid, *(p for child in children for p in family(int(child)))]


def delayed_s(pid: int) -> float:
    """Seconds for which a process and its descendants were ready to run and waited for a core."""
    return sum(_numbers(f"/proc/{p}/schedstat")[1] for p in family(pid)) / 1e9


def _numbers(file: str) -> list[int]:
    """The numbers in a file of /proc after the program's name; zeros where it cannot be read."""
    try:
        with open(file, "rb") as opened:  # a program's name can be any bytes
            words = opened.read().rpartition(b")")[2].split()
    except OSError:
        return [0] * 52
    return [int(word) if word.isdigit() else 0 for word in words]


def oom_kills() -> int:
    """Processes of this control group that the kernel has killed for lack of memory; 0: not known.

    Without a group's counter it is the machine's.
    """
    try:
        with open("/proc/self/cgroup") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        groups = []
    files = []
    for _, controllers, path in groups:
        if "memory" in controllers.split(","):
            files += [f"/sys/fs/cgroup/memory{path}/memory.oom_control"]
        elif not controllers:
            files += [f"/sys/fs/cgroup{path}/memory.events"]
    for name in (*files, "/proc/vmstat"):
        try:
            with open(name) as file:
                return next(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
        except (OSError, StopIteration):
            continue
    return 0


def run_program(
    candidate: str,
    tests: str,
    limits: Limits,
    mechanism: Mechanism,
    cancel: threading.Event | None = None,
    attempt: int = 0,
) -> Outcome | str:
    """Candidate and tests in one interpreter. A text says why there is no outcome.

    attempt: counted from 0; from 1 on no other program of this process runs beside it.
    """
    # str(): marshal refuses subclasses of it
    jobs = {"program": {"candidate": str(candidate), "tests": str(tests)}}
    return _run(jobs, limits, mechanism, cancel, attempt)


def run_strict(
    candidate: str,
    tests: str,
    helpers: str,
    names: tuple[str, ...],
    limits: Limits,
    mechanism: Mechanism,
    cancel: threading.Event | None = None,
    attempt: int = 0,
) -> Outcome | str:
    """Candidate and tests in two interpreters. A text says why there is no outcome."""
    checker = {"tests": str(tests), "helpers": str(helpers), "names": tuple(names)}
    checker["identity"] = asks_for_identity(checker["tests"])
    jobs = {"oracle": {"candidate": str(candidate)}, "checker": checker}
    return _run(jobs, limits, mechanism, cancel, attempt)


def _run(
    jobs: dict[str, dict],
    limits: Limits,
    mechanism: Mechanism,
    cancel: threading.Event | None,
    attempt: int,
) -> Outcome | str:
    """Run one interpreter for each mode in jobs; the last one decides."""
    alone = attempt > 0
    began, kills = time.monotonic(), oom_kills() if alone else 0
    with ExitStack() as stack:
        folders = [stack.enter_context(Scratch()) for _ in jobs]
        ours: list[int] = []  # ends of the pipes between the two
        ends: list[tuple[int, ...]] = [()]
        if len(jobs) == 2:
            requests, replies = os.pipe(), os.pipe()
            ours = [*requests, *replies]
            ends = [(requests[0], replies[1]), (requests[1], replies[0])]
        children: list[Child] = []
        try:
            for (mode, job), folder, pipes in zip(jobs.items(), folders, ends, strict=True):
                children.append(start(mechanism, limits, folder, mode, job, pipes))
            while ours:
                os.close(ours.pop())  # now only the children hold the ends
            room = watch(children, limits, folders, cancel)
            if children[-1].has_sent(b"SFgone") and not children[0].ends_within(GONE_S):
                children[0].ended_for = "closed"
        finally:
            for fd in ours:
                os.close(fd)
            for child in reversed(children):
                child.end()
    seconds, last = time.monotonic() - began, children[-1]
    out_of_memory = alone and oom_kills() > kills
    found = outcome(last, limits, mechanism, seconds, alone, out_of_memory)
    if isinstance(found, Outcome) and last.mode == "checker":
        if found.reason == "gone":  # the candidate's process ended: its own end is the outcome
            found = outcome(children[0], limits, mechanism, seconds, alone, out_of_memory)
        else:
            found = replace(found, cpu_s=children[0].cpu_s)
    if isinstance(found, str) or found.reason == "passed":
        return found
    if last.ended_for == "room" or last.ended_for != "files" and room < FULL_BYTES:
        wanted = room + (len(folders) * limits.scratch_mb << 20)
        # once is no proof: another process may have taken the room and given it back
        if attempt > 1 and _comes_free(wanted, 1.0 if mechanism.bwrap else 0.0):
            detail = f"more than {limits.scratch_mb} MiB, also in files without a name"
            return replace(found, reason="files", detail=detail)
        return f"{os.path.dirname(RUN.path())} was full: {room >> 20} MiB free"
    if not alone and not last.ended_for and found.reason == "files":
        return found.detail  # others may have taken the room
    return found


def _comes_free(wanted: int, wait_s: float) -> bool:
    """Whether the ended program gave back its room; bubblewrap ends a moment before its program."""
    end = time.monotonic() + wait_s
    while not (free := free_bytes() > wanted) and time.monotonic() < end:
        time.sleep(0.01)
    return free


def outcome(
    child: Child,
    limits: Limits,
    mechanism: Mechanism,
    seconds: float,
    alone: bool,
    out_of_memory: bool,
) -> Outcome | str:
    """The outcome of a child that has ended. A text says why there is none.

    out_of_memory: it ran alone, and the kernel has killed a process for lack of memory meanwhile.
    """
    status = child.status
    if mechanism.bwrap and status > 128:
        status = 128 - status  # as a shell reports signals; the filter allows no such exit status
    message, cpu_s = child.message, child.cpu_s

    def failed(reason: str, detail: str) -> Outcome:
        return Outcome(reason, printable(detail), seconds, cpu_s)

    if child.ended_for == "cancelled":
        return "cancelled"
    if not message.startswith(b"S"):
        problem = printable(message[1:].decode("utf-8", "replace"))
        return problem or f"the interpreter ended before the program started, status {status}"
    if child.ended_for == "wall":
        return failed("wall", f"still running after {seconds:.0f} s")
    if child.ended_for == "files":
        size = f"more than {limits.scratch_mb} MiB"
        return failed("files", f"{size}, too many files or too deep a tree in its directory")
    if child.ended_for == "room":
        return failed("files", "")
    if child.ended_for == "threads":
        return failed("threads", f"more than {MAX_THREADS} threads")
    if child.ended_for == "closed":
        return failed("protocol", "closed the pipe of its replies")
    sent = message[1:]
    if sent == b"P" + child.token and status == 0:
        return Outcome("passed", "", seconds, cpu_s)
    reason, _, detail = sent[1:].partition(b"\n")
    if (
        sent.startswith(b"F")
        and status == 0
        and reason.decode("ascii", "replace") in SAYS[child.mode]
    ):
        return failed(reason.decode(), detail.decode("utf-8", "backslashreplace"))
    if sent:
        return failed("protocol", f"no verdict in the verdict's pipe, exit status {status}")
    # The kernel counts in ticks: its signal may come before cpu_s reaches the limit. Under bwrap
    # the last reading of cpu_s may be too low: wall time stands in for it.
    used_s = max(cpu_s, seconds) if mechanism.bwrap else cpu_s
    killed = status == -signal.SIGKILL
    if status == -signal.SIGXCPU or killed and used_s >= limits.cpu_s:
        return failed("cpu", f"over {limits.cpu_s:g} s of CPU time")
    if killed and alone and (out_of_memory or child.rss_kb > MUCH_MEMORY_KB):
        return failed("memory", f"killed by the system while it held {child.rss_kb >> 10} MiB")
    # the filter keeps a program from killing itself
    if killed and (mechanism.seccomp or not alone):
        return "the interpreter was killed from outside"
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    return failed("protocol", f"ended before the last test, {how}")


def printable(text: str) -> str:
    """At most MAX_DETAIL characters, without those that act on a terminal."""
    shown = (c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text[:MAX_DETAIL])
    return "".join(shown)[:MAX_DETAIL]
