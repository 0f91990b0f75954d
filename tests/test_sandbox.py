"""Judging a program: what counts as a pass, what does not, and what ends a program."""

import os
from dataclasses import replace

import pytest

import sandbox
from sandbox import SandboxError, judge, judge_many, tiers
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
    "swallows a wrong verdict": "import json, os\njson.dumps = os.write = None\n" + GOOD,
}


@pytest.mark.parametrize("name", PASSES)
def test_harmless_habits_do_not_fail_a_right_program(name):
    if name == "numpy":
        pytest.importorskip("numpy")
    verdict = judge(PASSES[name], TESTS)
    assert verdict.passed, verdict
    assert verdict.seconds < 20


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


def test_an_interpreter_that_does_not_start_is_no_verdict(monkeypatch):
    """The machine's fault must never be scored as the model's."""
    sandbox.tier()
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    with pytest.raises(SandboxError, match="tried 3 times"):
        judge(GOOD, TESTS)
