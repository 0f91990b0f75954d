"""The positive controls: each attack where nothing stops it. An attack that bites nowhere would prove nothing.

"bare" is the sandbox's own interpreter with limits only (tier C); the others are ways of naive.py.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from naive import SEPARATOR
from stage import HERE, LIMITS, TESTS, Stage, cases, told

import sandbox
from sandbox import tiers
from sandbox.process import Mechanism

ENDLESS_S, PATIENCE_S = 1.0, 120.0  # the second for controls that end by themselves


def run_all(chosen: list[dict], alone: bool) -> dict[str, list[str]]:
    """What each control shows. Bare ones one after the other, each in a harness that it may kill; the others together."""
    harmless = [c for c in chosen if c["control"]["how"] != "bare"]
    with ThreadPoolExecutor(
        4
    ) as pool:  # the endless ones, and those that sleep, hold up few others
        seen = dict(
            zip(
                (c["id"] for c in harmless),
                pool.map(lambda c: sorted(naive(c)), harmless),
                strict=True,
            )
        )
    rest = [c["id"] for c in chosen if c["id"] not in seen]
    while rest:
        command = [
            sys.executable,
            str(HERE / "programme.py"),
            "inner",
            *["--alone"] * alone,
            "--cases",
            ",".join(rest),
        ]
        inner = subprocess.run(command, capture_output=True, text=True, check=False)
        seen |= dict(json.loads(line) for line in inner.stdout.splitlines())
        if inner.returncode != 0:
            dead = next(name for name in rest if name not in seen)
            seen[dead] = (
                ["harness_died"]
                if inner.returncode < 0
                else [f"control failed: {inner.stderr[-300:]}"]
            )
        rest = [name for name in rest if name not in seen]
    return seen


def inner(names: list[str], alone: bool) -> None:
    """The bare controls, each with a stage of its own: they break it."""
    tiers.find = lambda: tiers.Tier("C", Mechanism(False, False), tiers.EFFECTS, ())
    sandbox.accept("all")
    for case in (c for c in cases() if c["id"] in names):
        stage = Stage(alone)
        print(json.dumps([case["id"], sorted(bare(stage, case))]), flush=True)
        stage.close()


def bare(stage: Stage, case: dict) -> set[str]:
    known = stage.strangers()
    program = sandbox.Program(stage.source(case), case.get("tests", TESTS))
    verdict = sandbox.judge_program(program, limits=LIMITS)
    seen = told(verdict.detail) | ({"passed"} if verdict.passed else set())
    seen |= stage.effects(wait_s=5.0 if case["control"]["shows"] == "victim_died" else 0.0)
    left = set(stage.strangers()) - set(known)
    if left:
        time.sleep(0.3)  # those that were killed with the program's group are gone by then
        left &= set(stage.strangers())
    for pid in left:
        seen.add("survivor")
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return seen


def naive(case: dict) -> set[str]:
    """A judge without precautions; what of it was seen."""
    how, stage = case["control"]["how"], Stage(alone=False)
    folder = tempfile.mkdtemp(prefix="naive-", dir=stage.home)
    file = stage.home / "program"
    try:
        file.write_text(
            f"{stage.source(case)}{SEPARATOR}{case.get('tests', TESTS)}",
            encoding="utf-8",
            newline="",
        )
        return _naive(case, how, folder, str(file)) | stage.effects()
    except UnicodeEncodeError:
        return {"unsendable"}
    finally:
        stage.close()


def _naive(case: dict, how: str, folder: str, file: str) -> set[str]:
    read_fd, write_fd = os.pipe()
    process = subprocess.Popen(
        [sys.executable, str(HERE / "naive.py"), how, file, str(write_fd)],
        cwd=folder,
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(write_fd,),
    )
    os.close(write_fd)
    printed: list[bytes] = []
    reader = threading.Thread(target=lambda: printed.append(process.stdout.read()), daemon=True)
    reader.start()
    end = time.monotonic() + (ENDLESS_S if case["control"]["shows"] == "endless" else PATIENCE_S)
    while (endless := _runs(process.pid)) and time.monotonic() < end:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    reader.join(5)
    process.stdin.close()
    os.set_blocking(read_fd, False)
    try:
        heard = os.read(read_fd, 100)
    except BlockingIOError:
        heard = b""
    os.close(read_fd)
    text = b"".join(printed)
    seen = {"endless"} if endless else _verdict(how, process.returncode, text, heard)
    seen |= {"output"} if len(text) > 10_000_000 else set()
    seen |= {"memory"} if usage.ru_maxrss >> 10 > LIMITS.memory_mb else set()
    return (
        seen
        | _files(folder)
        | _cleaned(how, folder)
        | told(text[-2000:].decode("utf-8", "replace"))
    )


def _runs(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _verdict(how: str, code: int, printed: bytes, heard: bytes) -> set[str]:
    passes = {
        "any_byte": bool(heard),
        "silence": not heard,
        "stdout": b"passed" in printed,
        "in_process": code == 0 and b"FAIL" not in printed,
    }.get(how, code == 0)
    return ({"passed"} if passes else set()) | ({"crashed"} if code not in (0, 3) else set())


def _files(folder: str) -> set[str]:
    try:
        sizes = [entry.stat(follow_symlinks=False).st_size for entry in os.scandir(folder)]
    except OSError:
        return set()
    return ({"big_file"} if sum(sizes) > 60_000_000 else set()) | (
        {"many_files"} if len(sizes) >= 5000 else set()
    )


def _cleaned(how: str, folder: str) -> set[str]:
    """What a simple clean-up makes of the program's directory."""
    if how == "cleanup_following":
        for where, _, names in os.walk(folder, followlinks=True):
            for name in names:
                os.unlink(os.path.join(where, name))
    if how != "cleanup":
        return set()
    try:
        for name in os.listdir(folder):
            os.unlink(os.path.join(folder, name))
        os.rmdir(folder)
    except FileNotFoundError:
        return {"crashed"}
    except OSError:
        return {"scratch_left"}
    finally:
        subprocess.run(
            ["rm", "-rf", folder], check=False
        )  # shutil's recursion ends before the deepest of them
    return set()
