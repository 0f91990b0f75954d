"""The record of a suite: what it runs, for progress and for other suites.

    results/logs/sweep-<host>-<pid>.json     {"pid", "host", "start", "since", "workers",
                                              "experiments": [Planned, ...], "ended": time or none}

The file is touched while its suite is alive. It stays until the next suite starts, so that
progress shows the last suites where none is running.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.identity import forget
from experiment.status import alive, listed
from experiment.store import HOST, process_start
from suite.matrix import Experiment, Planned
from utils import BusyError, OutputError, atomic_write_json

TOUCH_S = 20.0
FRESH_S = 120.0  # a suite of another host counts as alive while its record is younger


@dataclass(frozen=True)
class SuiteRecord:
    """The record of a suite that is or was running. workers: processes that generate."""

    path: Path
    pid: int
    host: str
    since: float
    workers: int
    alive: bool
    experiments: list[Planned]


def read_records(output_dir: Path) -> list[SuiteRecord]:
    """The records of all suites of a result directory, the newest last."""
    found = []
    for path in listed(output_dir / "logs", "sweep-", ".json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(path.read_bytes())
            own = {name: content[name] for name in ("pid", "host", "since", "workers")}
            lives = "ended" not in content and alive(content, path, FRESH_S)
            planned = [_planned(entry) for entry in content["experiments"]]
            found.append(SuiteRecord(path, alive=lives, experiments=planned, **own))
    return sorted(found, key=lambda record: record.since)


def _planned(entry: dict[str, Any]) -> Planned:
    paths = {name: Path(entry[name]) for name in ("path", "store", "log") if entry[name]}
    return Planned(**entry | paths)


class Lease:
    """The record of this suite, from construction to release().

    mine, elsewhere: the experiments that this suite runs, and those of another living suite.
    run:             name of a run that several suites share, the tasks of a job array; they have
                     all experiments in common, and the locks of the stores keep them apart.
    Raises BusyError if other suites have all experiments.
    """

    def __init__(
        self,
        output_dir: Path,
        experiments: Sequence[Experiment],
        workers: int,
        run: str | None = None,
    ):
        records, self.run = read_records(output_dir), run
        living = [] if run else [record for record in records if record.alive]
        taken = {planned.path: record for record in living for planned in record.experiments}
        self.elsewhere = [e for e in experiments if e.path.resolve() in taken]
        self.mine = [e for e in experiments if e not in self.elsewhere]
        if self.elsewhere and not self.mine:
            other = taken[self.elsewhere[0].path.resolve()]
            raise BusyError(
                f"the suite of pid {other.pid} on {other.host} has these experiments already; wait "
                "for it, or stop it"
            )
        for record in records:
            if not record.alive:
                with suppress(OSError):  # another user's stays
                    record.path.unlink(missing_ok=True)
        pid = os.getpid()
        self.path = output_dir / "logs" / f"sweep-{HOST}-{pid}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._suite = {"pid": pid, "host": HOST, "start": process_start(pid)}
        self._suite |= {"since": time.time(), "workers": workers}
        self._write()

    def _write(self, **more: Any) -> None:
        self._touched = time.monotonic()
        entries = [experiment.identified().entry() for experiment in self.mine]
        self._complete = all(entry["id"] for entry in entries)
        atomic_write_json(self.path, self._suite | {"experiments": entries} | more)

    def touch(self) -> None:
        """Show now and then that this suite is alive."""
        if time.monotonic() - self._touched < TOUCH_S:
            return
        self._touched = time.monotonic()
        with suppress(OSError, OutputError):
            os.utime(self.path)
            if not self._complete:  # a checkpoint may have arrived, and with it an id
                forget()
                self._write()

    def release(self) -> None:
        """Note the end of this suite. Its record stays readable, its experiments are free."""
        self._write(ended=time.time())
