"""The state of an experiment, from files only: its result, the status files of its run, its store.

No lock is tried: testing a lock takes it for a moment, and a run that starts then ends with 75.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.result import load_result
from experiment.sample import is_usable
from experiment.status import (
    ACTIVE,
    StatusRecord,
    Summary,
    Sums,
    counted,
    listed,
    read_status,
    stamp_of,
)
from experiment.store import Store
from suite.matrix import Planned
from utils import DllmexpError, atomic_write_json, numbered

Score = tuple[float, float | None, float | None, int]


@dataclass(frozen=True)
class Status:
    """The state of an experiment.

    state: done | partial | failed | waiting | running.
    of:    number of samples, None if unknown.
    sums:  totals over the n finished samples.
    score: value, low, high of the headline metric and the number of samples; None if unknown.
    note:  why it failed, or which process runs it; "" otherwise.
    queued: a suite that is running has it among its experiments.
    """

    state: str
    of: int | None
    sums: Sums = Sums()
    score: Score | None = None
    note: str = ""
    queued: bool = False

    @property
    def n(self) -> int:
        return self.sums.n

    @property
    def shown(self) -> str:
        """The state as tables name it, a key of STATES: it says what an experiment waits for."""
        if self.state in ("done", "failed"):
            return self.state
        if self.note.startswith("scoring"):
            return "scoring"
        if self.n and self.n == self.of:
            return "to score"
        if self.state == "running":
            return "running"
        return "queued" if self.queued else "begun" if self.state == "partial" else "not begun"


# as tables name them, in the order of their counts; what those that stand still wait for
STATES = {
    "done": "",
    "running": "",
    "scoring": "",
    "to score": "has every answer and waits to be scored",
    "queued": "waits for a worker of its suite",
    "begun": "has samples, and no suite is running it",
    "not begun": "no suite is running it",
    "failed": "",
}


# ---------------------------------------------------------------- failures that the suite notes


def write_failure(experiment: Planned, error: str, run: str | None) -> None:
    """Note next to the log that a suite has given up on an experiment; run: see Lease."""
    record = {"error": error, "run": run, "time": time.time(), "command": experiment.command}
    atomic_write_json(experiment.log.with_suffix(".json"), record)


def read_failure(experiment: Planned) -> dict[str, Any] | None:
    """The note of the last failure, None without one."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads(experiment.log.with_suffix(".json").read_bytes())
        return {name: record[name] for name in ("error", "run", "time")}
    return None


# ---------------------------------------------------------------- the whole


class Watcher:
    """The state of one experiment, read repeatedly: large files are read again only if changed."""

    def __init__(self, experiment: Planned):
        self.experiment = experiment
        self._result: tuple[list[int], Status] | None = None
        self._sums: tuple[list, Sums] | None = None

    def status(self) -> Status:
        if self.experiment.id is None:  # an input may have arrived
            self.experiment = self.experiment.identified()
        store = self.experiment.store
        records = read_status(store) if store else []
        active = next((r for r in records if r.state in ACTIVE), None)
        # experiments that differ in --limit alone share a store
        records = [r for r in records if Path(r.result).name == self.experiment.path.name]
        final = self._of_result(records)
        if final and (final.state == "done" or not active):
            return final
        leader = records[0] if records else None
        sums = sum((r.sums for r in records), Sums()) if records else self._counted()
        of = self.experiment.n or (leader.of if leader else None)
        state, note = "partial" if sums.n else "waiting", ""
        if active:
            state, note = "running", f"{active.state} by pid {active.pid} on {active.host}"
        elif error := self._failure(leader):
            state, note = "failed", error
        return Status(state, of, sums, sums.estimate(), note)

    def _failure(self, leader: StatusRecord | None) -> str:
        """Why the last attempt failed, from the run itself or from the suite; "" if it did not."""
        noted = read_failure(self.experiment)
        if noted and (leader is None or noted["time"] > leader.time):
            return str(noted["error"])
        return leader.error if leader and leader.state == "failed" else ""

    def _of_result(self, records: Sequence[StatusRecord]) -> Status | None:
        """From the result file, None without one."""
        try:
            stamp = stamp_of(self.experiment.path)
        except OSError:
            return None
        if self._result is None or self._result[0] != stamp:
            self._result = stamp, self._read_result(stamp, records)
        return self._result[1]

    def _read_result(self, stamp: list[int], records: Sequence[StatusRecord]) -> Status:
        """The run has put a summary into its status file; without one the result is read."""
        path, of = self.experiment.path, self.experiment.n
        found = next((r.summary for r in records if r.summary and r.summary.stamp == stamp), None)
        try:
            if found is None:
                found = Summary.of_result(path, load_result(path), self.experiment.metric)
        except (DllmexpError, ValueError, KeyError, TypeError, AttributeError) as error:
            damaged = f"{path} is no result ({error!r}); move it away"
            note = str(error) if isinstance(error, DllmexpError) else damaged
            return Status("failed", of, note=note)
        if self.experiment.model and self.experiment.id and found.id != self.experiment.id:
            note = f"{path} is of another configuration: --extra '--tag NAME' writes beside it"
            return Status("failed", of, note=note)
        score = tuple(found.score) if found.score else None
        if self.experiment.result_id not in (None, found.result_id) and self.experiment.model:
            note = "scored by another version: its samples are scored again"
            return Status("partial", found.of, found.sums, note=note)
        if found.status == "complete":
            return Status("done", found.of, found.sums, score)
        failed = numbered(found.sums.failed, "sample")
        note = f"{failed} failed" if found.sums.failed else "programs were not run (--no_exec)"
        return Status("failed", found.of, found.sums, score, note)

    def _counted(self) -> Sums:
        """Sums over the store, for a run that has left no status file. The slow way."""
        n, repeats = self.experiment.n, self.experiment.repeats
        shards = listed(self.experiment.store, "shard-") if self.experiment.store else []
        with suppress(OSError, DllmexpError):
            stamp = [(path.name, path.stat().st_size) for path in shards]
            if stamp and (self._sums is None or self._sums[0] != stamp):
                store = Store.read(self.experiment.store, self.experiment.id, is_usable)
                failed = Sums(failed=len(store.errors()))
                self._sums = stamp, counted(store, n and n // repeats, repeats) + failed
            return self._sums[1] if stamp else Sums()
        return Sums()


def statuses(watchers: Sequence[Watcher]) -> list[tuple[Planned, Status]]:
    return [(watcher.experiment, watcher.status()) for watcher in watchers]
