"""Which of the mechanisms have an effect on this machine, found out with small hostile programs, once per process.

A    Landlock + seccomp + rlimits      everything that is tried is blocked
A'   bubblewrap + seccomp + rlimits    the same, where Landlock is missing
B    seccomp + rlimits                 files are open                      only with --unsafe_exec fs
C    rlimits                           only memory and time are limited    only with --unsafe_exec all
"""

from __future__ import annotations

import functools
import os
import platform
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sandbox import bubblewrap, landlock, process, seccomp
from sandbox.process import Limits, Mechanism, Outcome
from sandbox.scratch import Scratch

PROBE_LIMITS = Limits(cpu_s=5.0, wall_s=20.0, memory_mb=1024)
FILES = ("read", "write", "env")
EFFECTS = ("read", "write", "net", "fork", "kill", "env")
FLOOR = {
    "A": (),
    "A'": (),
    "B": ("fs", "all"),
    "C": ("all",),
}  # tier -> values of --unsafe_exec that accept it

# each passes where what it tries is impossible; {..} are filled in
PROBES = {
    "read": "try:\n    open({secret!r}).read()\nexcept OSError: pass\nelse: raise SystemError",
    "write": "try:\n    open({new!r}, 'w').write('x')\nexcept OSError: pass\nelse: raise SystemError",
    "net": (
        "import socket\nfor kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):\n    try:\n"
        "        s = socket.socket(socket.AF_INET, kind)\n        s.settimeout(2)\n"
        "        s.connect(('127.0.0.1', {port}))\n        s.send(b'x')\n"
        "    except OSError: pass\n    else: raise SystemError"
    ),
    "fork": (
        "import os\ntry:\n    pid = os.fork()\nexcept OSError: pass\nelse:\n    if pid == 0: os._exit(0)\n"
        "    raise SystemError"
    ),
    "kill": "import os\ntry:\n    os.kill({pid}, 0)\nexcept OSError: pass\nelse: raise SystemError",
    "env": (
        "import os\nassert set(os.environ) - {{'PWD', 'LC_CTYPE'}} == {names!r}, os.environ\ntry:\n"
        "    open('/proc/{pid}/environ', 'rb').read()\nexcept OSError: pass\nelse: raise SystemError"
    ),
    "memory": "try:\n    bytearray(2 << 30)\nexcept MemoryError: pass\nelse: raise SystemError",
    "good": "import collections, math, re, tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x')",
}


@dataclass(frozen=True)
class Tier:
    """name: "A", "A'", "B", "C", or "-" where no program runs at all. open: effects that are not blocked.
    why: what the better tiers lack. abi: Landlock's version, 0 for none."""

    name: str
    mechanism: Mechanism
    open: tuple[str, ...]
    why: tuple[str, ...]
    abi: int = 0

    @property
    def line(self) -> str:
        """What is announced and stored."""
        first = (
            f"landlock abi {self.abi} + "
            if self.abi
            else "bubblewrap + "
            if self.mechanism.bwrap
            else ""
        )
        parts = f"{first}seccomp + rlimits" if self.mechanism.seccomp else f"{first}rlimits"
        effects = " ".join(f"{e}:{'OPEN' if e in self.open else 'blocked'}" for e in EFFECTS)
        memory = f"{Limits.memory_mb >> 10}GiB" if "memory" not in self.open else "OPEN"
        text = f"code sandbox: tier {self.name} ({parts})  {effects} mem:{memory}"
        return "; ".join([text, *self.why])

    def accepted(self, unsafe: str | None) -> bool:
        return self.name in FLOOR and (not FLOOR[self.name] or unsafe in FLOOR[self.name])

    def refusal(self) -> str:
        """What to do where the tier is below the floor."""
        keep = "--no_exec runs none and keeps them for another machine"
        if self.name == "-":
            return f"{self.line}; no program runs here: {keep}"
        can = (
            "CAN READ AND WRITE your files"
            if self.name == "B"
            else "COULD DO EVERYTHING that you can do"
        )
        value = "fs" if self.name == "B" else "all"
        return f"{self.line}; generated code {can} here: --unsafe_exec {value} accepts that, {keep}"


_finding = threading.Lock()  # a cache alone lets several threads look at once


def find() -> Tier:
    """The best tier whose effects are there."""
    with _finding:
        return _found()


@functools.cache
def _found() -> Tier:
    why: list[str] = []
    has_filter = seccomp.build() is not None
    if not has_filter:
        why.append(f"seccomp: no table for {platform.machine()}")
    abi, missing = landlock.version()
    if abi:
        opened = probe(Mechanism(True, has_filter))
        if isinstance(opened, tuple) and not opened:
            return Tier("A", Mechanism(True, True), (), (), abi)
        why.append(f"landlock abi {abi} + seccomp: {_told(opened)}")
    else:
        why.append(f"landlock: {missing}")
    bwrap = bubblewrap.program()
    problem = "not installed" if bwrap is None else bubblewrap.problem(bwrap)
    if problem is None:
        opened = probe(Mechanism(False, has_filter, bwrap))
        if isinstance(opened, tuple) and not opened:
            return Tier("A'", Mechanism(False, True, bwrap), (), tuple(why))
        problem = _told(opened)
    why.append(f"bwrap: {problem}")
    if has_filter:
        opened = probe(Mechanism(False, True))
        if isinstance(opened, tuple):
            only_files = set(opened) <= set(FILES)
            return Tier("B" if only_files else "C", Mechanism(False, True), opened, tuple(why))
        why.append(f"seccomp: {opened}")
    opened = probe(Mechanism(False, False))
    if isinstance(opened, tuple):
        return Tier("C", Mechanism(False, False), opened, tuple(why))
    return Tier("-", Mechanism(False, False), EFFECTS, (*why, opened))


def _told(opened: tuple[str, ...] | str) -> str:
    return opened if isinstance(opened, str) else f"{', '.join(opened)} still open"


def probe(mechanism: Mechanism) -> tuple[str, ...] | str:
    """The effects that are open under a mechanism; a text where not even a good program runs."""
    with Scratch() as folder, socket.socket() as listener:
        secret, new = Path(folder, "secret"), Path(folder, "new")
        secret.write_text("x")
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        filled = {
            "secret": str(secret),
            "new": str(new),
            "pid": os.getpid(),
            "port": listener.getsockname()[1],
            "names": set(process.environment("")),
        }
        fill: Callable[[str], str] = lambda text: text.format(**filled)  # noqa: E731

        def run(name: str) -> Outcome | str:
            try:
                return process.run_program(fill(PROBES[name]), "", PROBE_LIMITS, mechanism)
            except OSError as error:
                return str(error)

        good = run("good")
        if isinstance(good, str):
            return good
        if good.reason != "passed":
            return f"a harmless program fails: {good.reason}: {good.detail}"
        others = [name for name in PROBES if name != "good"]
        with ThreadPoolExecutor(2) as pool:
            ends = dict(zip(others, pool.map(run, others), strict=True))
        opened = [n for n, end in ends.items() if isinstance(end, str) or end.reason != "passed"]
        if new.exists() and "write" not in opened:
            opened.append("write")
        return tuple(opened)
