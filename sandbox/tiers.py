"""The tiers of confinement. The best one that works here is found with small hostile programs.

A    Landlock + seccomp + rlimits     blocks everything that is tried
A'   bubblewrap + seccomp + rlimits   the same, where Landlock is missing
B    seccomp + rlimits                files are open: only with --unsafe_exec fs
C    rlimits                          limits memory and time: only with --unsafe_exec all
"""

from __future__ import annotations

import functools
import os
import platform
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sandbox import bubblewrap, landlock, process, seccomp
from sandbox.process import Limits, Mechanism, Outcome
from sandbox.scratch import Scratch

PROBE_LIMITS = Limits(cpu_s=5.0, wall_s=20.0, memory_mb=1024)
FILES = ("read", "write", "env")
EFFECTS = ("read", "write", "net", "fork", "kill", "env")
# tier -> values of --unsafe_exec that accept it; () needs none
ACCEPTED_BY = {"A": (), "A'": (), "B": ("fs", "all"), "C": ("all",)}


def _blocked(action: str, error: str = "OSError") -> str:
    """Source that passes if the action raises the error."""
    return f"try:\n    {action}\nexcept {error}: pass\nelse: raise SystemError\n"


# effect -> program that passes if the effect is blocked; {...} are filled in
PROBES = {
    "read": _blocked("open({secret!r}).read()"),
    "write": _blocked("open({new!r}, 'w').write('x')"),
    "net": """
import socket
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    try:
        s = socket.socket(socket.AF_INET, kind)
        s.settimeout(2)
        s.connect(('127.0.0.1', {port}))
        s.send(b'x')
    except OSError: pass
    else: raise SystemError
""",
    "fork": "import os\n" + _blocked("os.fork() or os._exit(0)"),
    "kill": "import os\n" + _blocked("os.kill({pid}, 0)"),
    "env": (
        "import os\nassert set(os.environ) - {{'PWD', 'LC_CTYPE'}} == {names!r}, os.environ\n"
        + _blocked("open('/proc/{pid}/environ', 'rb').read()")
    ),
    "memory": _blocked("bytearray(2 << 30)", "MemoryError"),
}
HARMLESS = "import math, re, tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x')"


@dataclass(frozen=True)
class Tier:
    """A tier as found on this machine.

    name: "A", "A'", "B", "C", or "-" where not even a harmless program runs.
    open: effects that are not blocked. why: what the better tiers lack here.
    abi:  version of Landlock, 0 for none.
    """

    name: str
    mechanism: Mechanism
    open: tuple[str, ...]
    why: tuple[str, ...]
    abi: int = 0

    @property
    def line(self) -> str:
        """The line that a run prints and stores."""
        mechanisms = [f"landlock abi {self.abi}"] if self.abi else []
        mechanisms += ["bubblewrap"] if self.mechanism.bwrap else []
        mechanisms += ["seccomp"] if self.mechanism.seccomp else []
        parts = " + ".join([*mechanisms, "rlimits"])
        effects = " ".join(f"{e}:{'OPEN' if e in self.open else 'blocked'}" for e in EFFECTS)
        memory = f"{Limits.memory_mb >> 10}GiB" if "memory" not in self.open else "OPEN"
        text = f"code sandbox: tier {self.name} ({parts})  {effects} mem:{memory}"
        return "; ".join([text, *self.why])

    def accepted(self, unsafe: str | None) -> bool:
        """Whether programs may run under --unsafe_exec `unsafe` (None: the flag is not given)."""
        by = ACCEPTED_BY.get(self.name)
        return by == () or by is not None and unsafe in by

    def refusal(self) -> str:
        """The error where the tier is not accepted, with the ways out."""
        keep = "--no_exec runs no program and keeps them for another machine"
        if self.name == "-":
            return f"{self.line}; no program runs here: {keep}"
        if self.name == "B":
            can, value = "CAN READ AND WRITE your files", "fs"
        else:
            can, value = "COULD DO EVERYTHING that you can do", "all"
        return f"{self.line}; generated code {can} here: --unsafe_exec {value} accepts that, {keep}"


_finding = threading.Lock()  # a cache alone would let several threads probe at once


def find() -> Tier:
    """The best tier that works here."""
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
        why.append(f"landlock abi {abi} + seccomp: {_problem(opened)}")
    else:
        why.append(f"landlock: {missing}")
    bwrap = bubblewrap.program()
    problem = "not installed" if bwrap is None else bubblewrap.problem(bwrap)
    if problem is None:
        opened = probe(Mechanism(False, has_filter, bwrap))
        if isinstance(opened, tuple) and not opened:
            return Tier("A'", Mechanism(False, True, bwrap), (), tuple(why))
        problem = _problem(opened)
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


def _problem(opened: tuple[str, ...] | str) -> str:
    return opened if isinstance(opened, str) else f"{', '.join(opened)} still open"


def probe(mechanism: Mechanism) -> tuple[str, ...] | str:
    """The effects that are open under a mechanism, or why not even a harmless program runs."""
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

        def run(source: str) -> Outcome | str:
            try:
                return process.run_program(source, "", PROBE_LIMITS, mechanism)
            except OSError as error:
                return str(error)

        harmless = run(HARMLESS)
        if isinstance(harmless, str):
            return harmless
        if harmless.reason != "passed":
            return f"a harmless program fails: {harmless.reason}: {harmless.detail}"
        sources = [source.format(**filled) for source in PROBES.values()]
        with ThreadPoolExecutor(2) as pool:
            ends = dict(zip(PROBES, pool.map(run, sources), strict=True))
        opened = [n for n, end in ends.items() if isinstance(end, str) or end.reason != "passed"]
        if new.exists() and "write" not in opened:
            opened.append("write")
        return tuple(opened)
