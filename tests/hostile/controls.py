"""The positive controls: each attack has to succeed where nothing stops it.

"bare" is the sandbox's interpreter with limits only (tier C); the others are judges of naive.py.
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
from stage import HERE, LIMITS, TESTS, Stage, cases, reported

import sandbox
from sandbox import tiers
from sandbox.process import Mechanism

ENDLESS_S, PATIENCE_S = 1.0, 120.0  # PATIENCE_S: for controls that end by themselves


def run_all(chosen: list[dict], alone: bool) -> dict[str, list[str]]:
    """What each control shows, by id.

    The bare ones run one after the other, in a harness that they may kill; the others run together.
    """
    harmless = [c for c in chosen if c["control"]["how"] != "bare"]
    # four threads, so that endless and sleeping ones delay few others
    with ThreadPoolExecutor(4) as pool:
        effects = pool.map(lambda case: sorted(naive(case)), harmless)
        seen = dict(zip((c["id"] for c in harmless), effects, strict=True))
    rest = [c["id"] for c in chosen if c["id"] not in seen]
    while rest:
        command = [sys.executable, str(HERE / "programme.py"), "inner", "--cases", ",".join(rest)]
        command += ["--alone"] * alone
        inner = subprocess.run(command, capture_output=True, text=True, check=False)
        seen |= dict(json.loads(line) for line in inner.stdout.splitlines())
        if inner.returncode != 0:
            dead = next(name for name in rest if name not in seen)
            killed = inner.returncode < 0
            seen[dead] = ["harness_died" if killed else f"control failed: {inner.stderr[-300:]}"]
        rest = [name for name in rest if name not in seen]
    return seen


def inner(names: list[str], alone: bool) -> None:
    """Run the bare controls, each on a stage of its own: they break it."""
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
    seen = reported(verdict.detail) | ({"passed"} if verdict.passed else set())
    seen |= stage.effects(wait_s=5.0 if case["control"]["shows"] == "victim_died" else 0.0)
    left = set(stage.strangers()) - set(known)
    if left:
        time.sleep(0.3)  # processes that were killed with the program's group are gone then
        left &= set(stage.strangers())
    for pid in left:
        seen.add("survivor")
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return seen


def naive(case: dict) -> set[str]:
    """What is seen of the program under a judge without precautions."""
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
    printed_effects = reported(text[-2000:].decode("utf-8", "replace"))
    return seen | _files(folder) | _cleaned(how, folder) | printed_effects


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
    found = {"big_file"} if sum(sizes) > 60_000_000 else set()
    return found | ({"many_files"} if len(sizes) >= 5000 else set())


def _cleaned(how: str, folder: str) -> set[str]:
    """What a simple clean-up does with the program's directory."""
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
        # shutil would exceed Python's recursion limit on the deepest tree
        subprocess.run(["rm", "-rf", folder], check=False)
    return set()
