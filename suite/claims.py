"""Which suite is running which experiments: a file below results/logs for each, so that nothing is run twice.

    results/logs/sweep-<host>-<pid>.json     {"pid", "host", "start", "since", "workers", 
                                             "experiments": [{"argv", "id", "path"}]}

It is touched while its suite lives. On this host a suite lives while its process does; on another one while its file is
younger than FRESH_S. The files of dead suites stay until the next suite starts, for what they say of the experiments.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from suite.matrix import Experiment
from suite.state import HOST, alive, config_id, started
from utils import BusyError, atomic_write_json

TOUCH_S, FRESH_S = 20.0, 120.0


def read_claims(output_dir: Path) -> list[dict[str, Any]]:
    """Claims of suites that live or lived, with their "path" and whether they are "alive"; newest last."""
    found = []
    for path in (output_dir / "logs").glob("sweep-*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(path.read_bytes())
            sets = [{"argv": [str(w) for w in e["argv"]], "id": e["id"], "path": e["path"]} for e in told["experiments"]]
            lives = "ended" not in told and alive(told, path, FRESH_S)
            found.append(told | {"experiments": sets, "path": path, "alive": lives})
    return sorted(found, key=lambda told: told.get("since", 0))


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Two suites that start at once look and claim one after the other."""
    fd = os.open(folder / "CLAIMS", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):  # no flock here: the stores' own locks remain
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _see_who_is_silent(output_dir: Path, wanted: set[str]) -> None:
    """Wait while a suite of another host, that has what is wanted, may be dead: a requeued job starts elsewhere at once."""
    for claim in read_claims(output_dir):
        doubtful = claim["alive"] and claim.get("host") != HOST and wanted & {e["path"] for e in claim["experiments"]}
        if doubtful:
            print(f"waiting at most {FRESH_S:.0f} s to see whether the suite on {claim['host']} lives", file=sys.stderr)
        with suppress(OSError):
            touched = claim["path"].stat().st_mtime
            while doubtful and claim["path"].stat().st_mtime == touched and alive(claim, claim["path"], FRESH_S):
                time.sleep(0.5)


class Claim:
    """The experiments that this suite has, from construction to release().

    mine: those that no living suite has. Raises BusyError where there are some to run, and all of them are taken.
    """

    def __init__(self, output_dir: Path, experiments: Sequence[Experiment], workers: int):
        folder = output_dir / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"sweep-{HOST}-{os.getpid()}.json"
        self.told = {"pid": os.getpid(), "host": HOST, "start": started(os.getpid()), "claim": str(self.path.resolve())}
        where = {e.name: str(e.job.path.resolve()) for e in experiments}
        _see_who_is_silent(output_dir, set(where.values()))
        with _one_at_a_time(folder):
            others = read_claims(output_dir)
            taken = {e["path"]: c for c in others if c["alive"] for e in c["experiments"]}
            self.mine = [e for e in experiments if where[e.name] not in taken]
            self.elsewhere = [e for e in experiments if where[e.name] in taken]
            if experiments and not self.mine:
                other = taken[where[experiments[0].name]]
                raise BusyError(f"these experiments are with the suite of pid {other['pid']} on {other['host']} already")
            for other in others:
                if not other["alive"]:
                    other["path"].unlink(missing_ok=True)
            sets = [{"argv": list(e.argv), "id": config_id(e), "path": where[e.name]} for e in self.mine]
            self._text = self.told | {"since": time.time(), "workers": workers, "experiments": sets}
            atomic_write_json(self.path, self._text)
        self._touched = time.monotonic()

    def touch(self) -> None:
        """Say now and then that this suite lives."""
        if time.monotonic() - self._touched > TOUCH_S:
            self._touched = time.monotonic()
            with suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """What this suite was about stays readable; its experiments are free."""
        atomic_write_json(self.path, self._text | {"ended": time.time()})
