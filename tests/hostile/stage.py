"""A disposable environment for hostile programs: what they may steal or break, and what they do."""

import fcntl
import json
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

from sandbox.process import Limits  # noqa: E402
from sandbox.scratch import RUN  # noqa: E402

TESTS = "assert f(1) == 2\nassert f(-1) == 0\nassert f(41) == 42"
SECRET, TOKEN, ABSTRACT = "PRIVATE-KEY-SENTINEL", "hf_SENTINELtoken", "dllmexp-agent"
LIMITS = Limits(cpu_s=1.0, wall_s=3.0, memory_mb=512, scratch_mb=64)
# of programs without a control, good ones among them
WIDE = Limits(cpu_s=2.0, wall_s=4.0, memory_mb=1024, scratch_mb=64)


def cases() -> list[dict]:
    """Of expected.json, and of found.json: programs found from outside, without a control."""
    files = (HERE / name for name in ("expected.json", "found.json"))
    return [case for file in files for case in json.loads(file.read_text(encoding="utf-8"))]


def limits_of(case: dict) -> Limits:
    if case.get("limits") == "default":
        return Limits()
    return LIMITS if "control" in case else WIDE


class Stage:
    """An environment in the folder that HOSTILE_DIR names.

    alone: in a process namespace of its own, where every unknown process is a survivor.
    """

    def __init__(self, alone: bool) -> None:
        self.alone = alone
        self.home = Path(tempfile.mkdtemp(dir=os.environ["HOSTILE_DIR"]))
        os.environ["HOME"] = str(self.home)
        (self.home / ".ssh").mkdir()
        (self.home / ".ssh" / "id_rsa").write_text(SECRET)
        (self.home / "name-sentinel").write_text("")
        (self.home / "secret").mkdir()
        (self.home / "secret" / "link").symlink_to(self.home)
        (self.home / "many").mkdir()
        for i in range(200):
            (self.home / "many" / f"{i}").touch()
        try:
            os.setxattr(self.home / ".ssh" / "id_rsa", "user.note", SECRET.encode())
        except OSError:
            pass  # not on every file system
        (self.home / "victim").write_text("x" * 100)
        self.victim = subprocess.Popen(
            ["sleep", "600"],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.before = self._state()
        self.abstract = f"{ABSTRACT}{self.victim.pid}"
        self.sockets = {
            "tcp": _socket(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            "udp": _socket(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            "unix": _socket(socket.AF_UNIX, socket.SOCK_STREAM, str(self.home / "agent")),
            "unix datagram": _socket(
                socket.AF_UNIX, socket.SOCK_DGRAM, str(self.home / "datagram")
            ),
            "unix abstract": _socket(socket.AF_UNIX, socket.SOCK_STREAM, f"\0{self.abstract}"),
        }

    def source(self, case: dict) -> str:
        if "repeat" in case:
            return "".join(text * count for text, count in case["repeat"])
        text = case.get("source")
        if text is None:
            text = (HERE / "programs" / f"{case['id']}.txt").read_text(encoding="utf-8")
        filled = {
            "HOME": self.home,
            "VICTIM": self.victim.pid,
            "ABSTRACT": self.abstract,
            "TCP": self.sockets["tcp"].getsockname()[1],
            "UDP": self.sockets["udp"].getsockname()[1],
        }
        for name, value in filled.items():
            text = text.replace(f"@{name}@", str(value))
        return text

    def _state(self) -> tuple | None:
        """Size, mode and time of the file that programs attack; None if it is gone."""
        try:
            status = os.lstat(self.home / "victim")
        except FileNotFoundError:
            return None
        return status.st_size, stat.S_IMODE(status.st_mode), status.st_mtime_ns

    def effects(self, *, wait_s: float = 0.0) -> set[str]:
        """What happened since the last call. wait_s: how long the victim may take to die."""
        found = {"wrote_outside"} if os.path.lexists(self.home / "written") else set()
        found |= {"changed_outside"} if self._state() != self.before else set()
        try:
            self.victim.wait(wait_s)
            found.add("victim_died")
        except subprocess.TimeoutExpired:
            pass
        for name, listener in self.sockets.items():
            try:
                if listener.type == socket.SOCK_STREAM:
                    listener.accept()[0].close()
                else:
                    listener.recv(100)
                found.add(name.split()[0])
            except BlockingIOError:
                pass
        return found

    def strangers(self) -> list[int]:
        """Living processes that a program left, or may have left."""
        pids = map(int, filter(str.isdigit, os.listdir("/proc")))
        return [pid for pid in pids if self._is_strange(pid)]

    def _is_strange(self, pid: int) -> bool:
        if pid in (1, os.getpid(), os.getppid(), self.victim.pid):
            return False
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            ours = RUN.path().encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False
        return state != "Z" and (self.alone or ours)

    def survivors(self) -> list[str]:
        """Command lines of strangers() that are still there after up to two seconds."""
        for _ in range(40):
            left = self.strangers()
            if not left:
                return []
            time.sleep(0.05)
        return [_command(pid) for pid in left]

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        for listener in self.sockets.values():
            listener.close()
        shutil.rmtree(self.home, ignore_errors=True)


def reported(detail: str) -> set[str]:
    """The effects that a program's own output reports."""
    effects = (word for word in detail.split() if word.startswith("EFFECT:"))
    found = {word.split(":", 1)[1].strip("'\"") for word in effects}
    found |= {"leak"} if SECRET in detail or TOKEN in detail else set()
    found |= {"listed"} if "name-sentinel" in detail else set()
    return found | ({"huge_detail"} if len(detail) > 2000 else set())


def loopback_up() -> None:
    """Bring the loopback up: in a new network namespace it is down."""
    up = struct.pack("16sH14s", b"lo", 0x41, b"")  # IFF_UP | IFF_RUNNING
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            fcntl.ioctl(probe, 0x8914, up)  # SIOCSIFFLAGS
        except OSError:
            pass  # not in a namespace: it is up already


def _socket(family, kind, address) -> socket.socket:
    made = socket.socket(family, kind)
    made.bind(address)
    if kind == socket.SOCK_STREAM:
        made.listen()
    made.setblocking(False)
    return made


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
    except OSError:
        return str(pid)
