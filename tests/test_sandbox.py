"""Judging a program: what counts as a pass, what does not, and what ends a program."""

import os
import signal
import sys
import time
from dataclasses import replace
from itertools import chain, repeat

import pytest

import sandbox
from sandbox import SandboxError, bubblewrap, judge, judge_many, process, scratch, tiers
from sandbox.process import Limits, Mechanism
from sandbox.scratch import RUN
from utils import EnvironmentProblem

GOOD = "def f(x):\n    return x + 1\n"
BAD = "def f(x):\n    return x\n"
TESTS = "assert f(1) == 2\nassert f(-1) == 0"


def scratch_folders() -> set[str]:
    """Working directories of programs, in this process's run."""
    return {p for p in os.listdir(RUN.path()) if p.startswith("s")}


def test_a_right_program_passes():
    verdict = judge(GOOD, TESTS)
    assert verdict.passed and verdict.reason == "passed" and 0 < verdict.seconds < 30


FAILURES = {
    "wrong": (BAD, "assertion"),
    "missing": ("", "exception"),
    "raises": ("def f(x):\n    raise KeyError(x)\n", "exception"),
    "syntax": ("def f(x) return x", "syntax"),
    "null byte": (GOOD + "\0", "syntax"),
    "deep": ("x = " + "(" * 3000, "syntax"),
    "long sum": ("x = " + "+".join("1" * 60000), "syntax"),
    "exit at import": ("import sys\nsys.exit(0)\n" + GOOD, "exception"),
    "_exit at import": ("import os\nos._exit(0)\n" + GOOD, "protocol"),
    "posix._exit": ("import posix\nposix._exit(0)\n", "protocol"),
    "exit in the function": ("def f(x):\n    raise SystemExit(0)\n", "exception"),
    "generator exit": ("def f(x):\n    raise GeneratorExit\n", "exception"),
    "atexit": ("import atexit, os\natexit.register(os._exit, 0)\n" + BAD, "assertion"),
    "thread exits": (
        "import os, threading, time\nthreading.Timer(0.05, os._exit, (0,)).start()\n"
        "def f(x):\n    time.sleep(5)\n",
        "protocol",
    ),
    "prints passed": ("print('passed', flush=True)\n" + BAD, "assertion"),
    "own check": ("def check(*a): pass\n" + BAD, "assertion"),
    "own AssertionError": (
        "import builtins\nbuiltins.AssertionError = ValueError\n" + BAD,
        "assertion",
    ),
    "writes to every pipe": (
        "import os\nfor i in range(3, 64):\n    try: os.write(i, b'P' + bytes(16))\n"
        "    except OSError: pass\nos._exit(0)\n",
        "protocol",
    ),
    "closes every pipe": ("import os\nos.closerange(0, 64)\n" + BAD, "protocol"),
    "segfault": ("import ctypes\nctypes.string_at(0)\n", "protocol"),
    "message that exits": (
        "class E(Exception):\n    def __str__(self): raise SystemExit(0)\ndef f(x):\n    raise E\n",
        "exception",
    ),
    "huge message": ("def f(x):\n    raise ValueError('x' * 50_000_000)\n", "exception"),
    "surrogates": ("def f(x):\n    raise ValueError('\\ud800')\n", "exception"),
    "reads input": ("def f(x):\n    return int(input())\n", "exception"),
    "memory": ("def f(x):\n    return bytearray(8 << 30)\n", "memory"),
    "big file": (
        "def f(x):\n    open('big', 'wb').write(bytes(64 << 20))\n    return x + 1\n",
        None,
    ),
    "forks": ("import os\nos.fork()\n" + GOOD, "exception"),
    "starts a program": ("import subprocess\nsubprocess.run(['true'])\n" + GOOD, "exception"),
    "connects": ("import socket\nsocket.socket()\n" + GOOD, "exception"),
    "reads a home": (
        "import os, pwd\nos.listdir(pwd.getpwuid(os.getuid()).pw_dir)\n" + GOOD,
        "exception",
    ),
    "writes elsewhere": ("open('/tmp/dllmexp-escaped', 'w')\n" + GOOD, "exception"),
    "recursion": ("def f(x):\n    return f(x)\n", "exception"),
    "kills its session": ("import os, signal\nos.killpg(0, signal.SIGKILL)\n", "exception"),
    "stops itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\n", "wall"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "stops itself" else n for n in FAILURES],
)
def test_a_failure_has_its_reason(name):
    candidate, reason = FAILURES[name]
    verdict = judge(candidate, TESTS, wall_s=3 if reason == "wall" else 30)
    assert not verdict.passed and verdict.reason == (reason or verdict.reason)
    assert len(verdict.detail) < 1500
    verdict.detail.encode()  # it will be written to a file: no surrogates


SAY = """
import os
def say(message):
    for fd in range(3, 64):
        try: os.write(fd, message)
        except OSError: pass
    os._exit(0)
"""


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("reason", ["tests", "gone", "unverifiable", "opaque", "error", "passed"])
def test_a_process_that_has_run_the_candidate_speaks_for_the_candidate_alone(reason, strict):
    """'The tests are not Python' from a program ended the whole run, each time it was scored."""
    message = f"F{reason}\nboom".encode()
    called = f"{SAY}def f(x):\n    say({message!r})\n"
    assert judge(called, TESTS, strict=strict).reason == "protocol"


@pytest.mark.parametrize("strict", [False, True])
def test_what_a_program_says_of_its_failure_is_short_and_printable(strict):
    for shown in ("\x1b]0;owned\x07\x1b[2J", "\udcff" * 400, "\x9b31m\u202e", "x" * 5000):
        detail = judge(f"raise ValueError({shown!r})", TESTS, strict=strict).detail
        assert detail.startswith("ValueError: ") and len(detail) <= 600
        assert detail.isprintable()
    forged = f"{SAY}say(b'Fassertion\\n' + b'\\xff\\x1b' * 2000)"
    detail = judge(forged, TESTS).detail
    assert len(detail) <= 600 and detail.isprintable()


def test_a_process_may_have_any_name():
    """A name that is no UTF-8 ended the harness."""
    name = "import ctypes, time\nctypes.CDLL(None).prctl(15, b'\\xff\\xfe) 1', 0, 0, 0)\n"
    assert judge(f"{name}time.sleep(0.3)\n{GOOD}", TESTS).passed


@pytest.mark.parametrize("to", ["d", "/usr"])
def test_directories_that_become_links_are_not_followed(tmp_path, monkeypatch, to):
    """A program that exchanges them in a loop ended the harness with 'too many levels'."""
    (tmp_path / "d").mkdir()
    real = os.open

    def exchanged(name, flags, *more, dir_fd=None):
        if name == "d":
            (tmp_path / "d").rmdir()
            (tmp_path / "d").symlink_to(to)
        return real(name, flags, *more, dir_fd=dir_fd)

    monkeypatch.setattr(scratch.os, "open", exchanged)
    assert not scratch.holds_too_much(str(tmp_path), 1 << 20)
    assert (tmp_path / "d").is_symlink()


def test_a_directory_that_holds_too_much_is_seen(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").write_bytes(bytes(100_000))
    assert not scratch.holds_too_much(str(tmp_path), 1 << 20)
    assert scratch.holds_too_much(str(tmp_path), 90_000)
    os.makedirs(tmp_path / "/".join("b" * 70))
    assert scratch.holds_too_much(str(tmp_path), 1 << 20)


@pytest.mark.parametrize("status", [127, 128, 137, 255])
@pytest.mark.parametrize("tier", ["A", "A'"])
def test_an_exit_status_is_no_signal(tier, status):
    """bubblewrap tells a kill as the exit status 137: such a program ended the run."""
    mechanism = sandbox.tier().mechanism
    if tier == "A'":
        bwrap = bubblewrap.program()
        if bwrap is None or bubblewrap.problem(bwrap):
            pytest.skip("bubblewrap does not run here")
        mechanism = Mechanism(False, True, bwrap)
    elif mechanism.bwrap:
        pytest.skip("tier A is not possible here")
    found = process.run_program(f"import os\nos._exit({status})", TESTS, Limits(), mechanism)
    assert not isinstance(found, str) and found.reason == "protocol"


UNNAMED = """
import mmap, os, time
kept = []
for i in range({n}):
    fd = os.open('x', os.O_CREAT | os.O_RDWR); os.unlink('x'); os.posix_fallocate(fd, 0, 4 << 20)
    kept.append({keep})
{close}
time.sleep(1)
"""


@pytest.mark.parametrize(
    ("n", "keep", "close"),
    [(50, "fd", ""), (30, "mmap.mmap(fd, 4 << 20)", "os.closerange(3, 64)"), (70, "fd", "")],
)
def test_files_without_a_name_count(n, keep, close):
    """They are in no directory: 880 MiB of a machine's memory, and the program passed."""
    source = UNNAMED.format(n=n, keep=keep, close=close) + GOOD
    limits = Limits(scratch_mb=64)
    verdict = sandbox.judge_program(sandbox.Program(source, TESTS), limits=limits)
    assert verdict.reason == "files", verdict


def test_a_full_scratch_is_no_failure_of_the_program(monkeypatch):
    """Another program had filled it: the program has to run again, alone."""
    sandbox.tier()
    missed = "open('a', 'w').close()\nraise OSError(28, 'No space left on device')\n"
    real, seen = sandbox.run_program, []

    def run_program(candidate, tests, limits, mechanism, cancel, alone):
        seen.append(alone)
        return real(candidate if alone else missed, tests, limits, mechanism, cancel, alone)

    monkeypatch.setattr(sandbox, "run_program", run_program)
    assert judge(GOOD, TESTS).passed and seen == [False, True]
    monkeypatch.setattr(process, "free_bytes", lambda: 1 << 20)
    assert judge(GOOD, TESTS).passed
    with pytest.raises(SandboxError, match="was full: 1 MiB free"):
        judge(BAD, TESTS)


def test_what_others_write_beside_a_program_is_not_its_own(monkeypatch):
    """On a disk where a download fills gigabytes, no long program would have had a verdict."""
    sandbox.tier()
    left = iter(range(1 << 50, 0, -(1 << 29)))
    monkeypatch.setattr(process, "free_bytes", lambda: next(left))
    assert judge(f"import time\ntime.sleep(0.2)\n{GOOD}", TESTS).passed
    assert judge(f"import time\ntime.sleep(0.2)\n{BAD}", TESTS).reason == "assertion"


@pytest.mark.parametrize(("times", "reason"), [(2, "passed"), (3, "files")])
def test_room_that_goes_and_comes_back_is_the_programs_if_it_does_so_again(
    monkeypatch, times, reason
):
    """A neighbour's files, while a right program ran alone, were taken for its own."""
    sandbox.tier()
    real, runs, much, little = process.watch, [], 1 << 50, 1 << 40

    def watch(children, limits, folders, cancel):
        runs.append(limits.room)
        free = chain([much], repeat(little if len(runs) <= times else much))
        monkeypatch.setattr(process, "free_bytes", lambda: next(free))
        left = real(children, limits, folders, cancel)
        monkeypatch.setattr(process, "free_bytes", lambda: much)
        return left

    monkeypatch.setattr(process, "watch", watch)
    verdict = judge(f"import time\ntime.sleep(0.2)\n{GOOD}", TESTS)
    assert (verdict.reason, runs) == (reason, [True] * 3)


@pytest.mark.parametrize("by", [signal.SIG_IGN, signal.SIG_DFL, None])
def test_verdicts_do_not_depend_on_inherited_signals(by):
    """Under nohup, or in the background of a shell, a program that catches its SIGINT failed."""
    candidate = (
        "import os, signal, tempfile\ndef f(x):\n    try: os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt: pass\n    else: return 0\n"
        "    signal.signal(signal.SIGALRM, lambda *_: 1/0)\n    signal.setitimer(0, 0.01)\n"
        "    try: signal.pause()\n    except ZeroDivisionError: return x + 1\n"
    )
    before = signal.getsignal(signal.SIGINT)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGINT] * (by is None))
    old = os.umask(0o777 if by is None else 0o022)
    try:
        signal.signal(signal.SIGINT, before if by is None else by)
        assert judge(candidate, TESTS).passed
        assert judge(f"import os\nassert os.umask(0) == 0o022\n{GOOD}", TESTS).passed
    finally:
        os.umask(old)
        signal.signal(signal.SIGINT, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.mark.parametrize("call", ["os.getxattr(os.__file__, 'user.x')", "os.listxattr('/')"])
def test_attributes_of_other_files_cannot_be_read(call):
    if "seccomp" not in sandbox.tier().line.split(")")[0]:
        pytest.skip(f"no seccomp: {sandbox.tier().line}")
    candidate = f"import errno, os\ntry: {call}\nexcept OSError as e: code = e.errno\n"
    assert judge(candidate, "assert code == errno.ENOTSUP").passed


@pytest.mark.parametrize(
    "name, candidate, reason",
    [
        ("loop", "while True: pass", "cpu"),
        pytest.param(
            "swallows everything",
            "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
            "cpu",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "ignores signals",
            "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
            "    except (OSError, ValueError): pass\nwhile True: pass",
            "cpu",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "loops in C",
            "import itertools\nsum(itertools.repeat(0))",
            "cpu",
            marks=pytest.mark.slow,
        ),
        pytest.param("sleeps", "import time\ntime.sleep(10**6)", "wall", marks=pytest.mark.slow),
    ],
)
def test_a_program_that_does_not_end_is_ended(name, candidate, reason):
    assert (
        judge(candidate, TESTS, timeout_s=1, wall_s=2 if reason == "wall" else 60).reason == reason
    )


PASSES = {
    "no main block": GOOD + "if __name__ == '__main__':\n    raise SystemExit\n",
    "thread left running": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n" + GOOD
    ),
    "verbose": "print('x' * 10_000_000)\n" + GOOD,
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\n" + GOOD,
    "numpy": "import numpy as np\ndef f(x):\n    return int(np.add(x, 1))\n",
    "files": "open('a.txt', 'w').write('1')\n" + GOOD,
    "copies": (
        "import os, pathlib, shelve, shutil\nopen('a', 'w').write('x')\nshutil.copy2('a', 'b')\n"
        "os.chmod('a', 0o600)\npathlib.Path('a').touch()\nos.utime('a', (1, 1))\n"
        "with shelve.open('s') as s: s['a'] = 1\n" + GOOD
    ),
    "pool of threads": (
        "from multiprocessing.pool import ThreadPool\ndef f(x):\n"
        "    with ThreadPool(2) as pool: return pool.map(lambda y: y + 1, [x])[0]\n"
    ),
    "locks": (
        "import multiprocessing as mp\nlock, again, two = mp.Lock(), mp.RLock(), mp.Semaphore(2)\n"
        "with lock, again, again, two: assert not lock.acquire(timeout=0.01)\n"
        "queue = mp.Queue()\nqueue.put(3)\nassert queue.get(timeout=9) == 3\n" + GOOD
    ),
    "swallows a wrong verdict": "import json, os\njson.dumps = os.write = None\n" + GOOD,
}


@pytest.mark.parametrize("name", PASSES)
def test_harmless_habits_do_not_fail_a_right_program(name):
    if name == "numpy":
        pytest.importorskip("numpy")
    verdict = judge(PASSES[name], TESTS)
    assert verdict.passed, verdict
    assert verdict.seconds < 20


PAIR = "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(x): return P(x, 2)"
OWN = "class E(ValueError): pass\ndef f(x): raise E('no', 3)"
LOADS = "import json\ndef f(x): return json.loads('{')"
CAUGHT = "try: f(1)\nexcept {} as e: ok = {}\nassert ok"
STRICT = {
    "fields": (PAIR, "assert f(1).x == 1", "unverifiable"),
    "a tuple": (PAIR, "assert f(1) == (1, 2) and isinstance(f(1), tuple)", "passed"),
    "enum": (
        "import enum\nclass A(enum.IntEnum):\n    a = 2\ndef f(x): return A.a",
        None,
        "passed",
    ),
    "lies": (
        "class A(int):\n    __eq__ = lambda *_: True\ndef f(x): return A(7)",
        None,
        "assertion",
    ),
    "own exception": (OWN, CAUGHT.format("E", "True"), "unverifiable"),
    "exception above": (OWN, CAUGHT.format("ValueError", "e.args == ('no', 3)"), "passed"),
    "library's exception": (
        LOADS,
        "import json\n" + CAUGHT.format("json.JSONDecodeError", 1),
        "passed",
    ),
    "its attribute": (
        LOADS,
        "import json\n" + CAUGHT.format("json.JSONDecodeError", "e.pos"),
        "unverifiable",
    ),
    "arguments": ("def f(x): {}['k']", CAUGHT.format("KeyError", "e.args == ('k',)"), "passed"),
    "decode": (
        "def f(x): b'\\xff'.decode()",
        CAUGHT.format("UnicodeDecodeError", "e.object == b'\\xff'"),
        "passed",
    ),
    "class": ("class A: pass\ndef f(x): return A()", "assert isinstance(f(1), A)", "unverifiable"),
    "argument itself": ("def f(x): return x", "a = [1]\nassert f(a) is a", "passed"),
    "changed": ("def f(x):\n    x.append(1)\n    return x", "assert f([]) == [1]", "passed"),
    "identity": ("x = []\ndef f(): return x", "assert f() is f()", "unverifiable"),
    "is not None": ("def f(x): return None", "assert f(1) is not None", "assertion"),
    "type": ("def f(x): return int", "assert f(1) is int and f(1) == int", "passed"),
    "view": (
        "from types import MappingProxyType\ndef f(x): return MappingProxyType({1: 1})",
        "assert f(1) == {1: 1}",
        "unverifiable",
    ),
    "own object": ("class A: pass\ndef f(x): return A()", None, "opaque"),
}


@pytest.mark.parametrize("name", STRICT)
def test_strict_mode_suspects_only_what_it_can_check(name):
    """An honest program whose result is no plain data was listed among the forgers."""
    candidate, tests, reason = STRICT[name]
    assert judge(candidate, tests or "assert f(1) == 2", strict=True).reason == reason


def test_the_programs_environment_is_made_from_scratch(monkeypatch):
    """A token in the harness's environment must not be in the program's."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    spy = f"import os, sys\n{GOOD}assert 'hf_secret' not in str(os.environ), os.environ\n"
    spy += "assert os.environ['PYTHONHASHSEED'] == '0' and '/dllmexp-' in os.getcwd()\n"
    spy += (
        "assert __name__ == 'builtins'\nassert not any(p in ('', os.getcwd()) for p in sys.path)\n"
    )
    assert judge(spy, TESTS).passed


def test_set_order_is_the_same_in_every_run():
    candidate = "def f(x):\n    return hash('a')\n"
    detail = {judge(candidate, "assert False, f(0)").detail for _ in range(3)}
    assert len(detail) == 1


def test_nothing_is_left_behind():
    before = scratch_folders()
    candidate = (
        "import os\nos.makedirs('a/b'); open('a/b/x', 'w').close(); os.symlink('/', 'root')\n"
    )
    assert judge(candidate + GOOD, TESTS).passed
    assert scratch_folders() <= before


def test_the_tier_is_announced_and_stored():
    found = sandbox.tier()
    assert found.line.startswith(f"code sandbox: tier {found.name} (")
    assert judge(GOOD, TESTS).tier == found.name


@pytest.mark.parametrize(
    ("name", "unsafe", "runs"),
    [
        ("A", None, True),
        ("A'", None, True),
        ("B", None, False),
        ("B", "fs", True),
        ("C", "fs", False),
        ("C", "all", True),
        ("-", "all", False),
    ],
)
def test_below_the_floor_nothing_runs_unless_that_is_accepted(monkeypatch, name, unsafe, runs):
    """A sandbox that is silently none would be worse than an error."""
    found = replace(sandbox.tier(), name=name, open=("read", "write"))
    monkeypatch.setattr(tiers, "find", lambda: found)
    monkeypatch.setattr(sandbox, "_accepted", unsafe)
    if runs:
        assert judge(GOOD, TESTS).passed
    else:
        with pytest.raises(SandboxError, match=f"tier {name} .*--no_exec"):
            judge(GOOD, TESTS)


def test_many_programs_keep_their_order():
    programs = [(GOOD, TESTS), (BAD, TESTS), ("x =", TESTS), (GOOD, TESTS)]
    assert [v.reason for v in judge_many(programs * 5, workers=4)] == [
        "passed",
        "assertion",
        "syntax",
        "passed",
    ] * 5
    assert judge_many([]) == []


def test_tests_that_are_not_python_are_no_verdict():
    with pytest.raises(EnvironmentProblem, match="tests are not Python") as raised:
        judge(GOOD, "assert (")
    assert isinstance(raised.value, SandboxError) and len(raised.value.problems) == 1


def test_no_exception_of_the_harness_stops_the_other_programs(monkeypatch):
    real = sandbox.run_program

    def run_program(candidate, *rest):
        return real(candidate, *rest) if candidate == GOOD else b"\xff".decode()

    monkeypatch.setattr(sandbox, "run_program", run_program)
    verdicts = judge_many([(BAD, TESTS), (GOOD, TESTS)], 2)
    assert [(v.passed, v.reason) for v in verdicts] == [(None, "error"), (True, "passed")]
    assert "tried 4 times: UnicodeDecodeError" in verdicts[0].detail


def test_a_program_that_runs_again_runs_alone(monkeypatch):
    running, beside = [], []

    def run_program(candidate, *rest):
        running.append(candidate)
        beside.append((len(running), rest[-1]))
        time.sleep(0.05)
        running.remove(candidate)
        return "a fault of the machine"

    monkeypatch.setattr(sandbox, "run_program", run_program)
    verdicts = judge_many([(f"{i}", "") for i in range(4)], 4)
    assert [v.passed for v in verdicts] == [None] * 4
    assert max(n for n, alone in beside if not alone) > 1
    assert {n for n, alone in beside if alone} == {1}


def test_workers_need_files(monkeypatch):
    """500 answers on 128 cores ended with 'too many open files', without a score."""
    limit = [1024, 4096]
    monkeypatch.setattr(sandbox.resource, "getrlimit", lambda _: tuple(limit))
    monkeypatch.setattr(sandbox.resource, "setrlimit", lambda _, new: limit.__setitem__(0, new[0]))
    assert (sandbox._affordable(8), limit[0]) == (8, 1024)
    assert (sandbox._affordable(100), limit[0]) == (100, 3456)
    assert (sandbox._affordable(400), limit[0]) == (120, 4096)
    limit[:] = [64, 64]
    assert sandbox._affordable(128) == 1


def test_without_a_directory_to_write_to_no_program_runs(monkeypatch):
    def none():
        raise FileNotFoundError

    monkeypatch.setattr(scratch.os, "access", lambda *_: False)
    monkeypatch.setattr(scratch.tempfile, "gettempdir", none)
    with pytest.raises(EnvironmentProblem, match="set TMPDIR, or --no_exec"):
        scratch.root()


def test_programs_are_judged_on_a_system_without_proc_waitid_and_affinity(monkeypatch):
    """macOS has none of them: with --unsafe_exec all, code tasks have to run there."""
    real = open

    def without_proc(name, *more, **named):
        if str(name).startswith("/proc"):
            raise FileNotFoundError(name)
        return real(name, *more, **named)

    for name in ("waitid", "sched_getaffinity", "pidfd_open"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr("builtins.open", without_proc)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(process, "_FILTER", None)
    for cached in (tiers._found, sandbox.tiers.landlock.version):
        cached.cache_clear()
    monkeypatch.setattr(sandbox, "_accepted", "all")
    try:
        assert sandbox.tier().name == "C"
        programs = [(GOOD, TESTS), (BAD, TESTS), ("import os\nos._exit(0)", TESTS)]
        assert [v.reason for v in judge_many(programs)] == ["passed", "assertion", "protocol"]
        assert judge(GOOD, TESTS, strict=True).passed
    finally:
        for cached in (tiers._found, sandbox.tiers.landlock.version):
            cached.cache_clear()


def test_an_interpreter_that_does_not_start_is_no_verdict(monkeypatch):
    """The machine's fault must never be scored as the model's."""
    sandbox.tier()
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    with pytest.raises(SandboxError, match="tried 4 times"):
        judge(GOOD, TESTS)
