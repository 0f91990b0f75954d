"""Which suite is running which experiments: a file below results/logs for each, so that nothing is run twice.

    results/logs/sweep-<host>-<pid>.json     {"pid", "host", "start", "since", "workers", "run",
                                             "experiments": [{"argv", "id", "path"}], "mine": [path]}

experiments: what the suite was asked for. mine: what it has of it. A suite on one machine has at once all that nobody
else has. Suites that share a run - the tasks of a job array, `run` names it - take one experiment after the other.

The file is touched while its suite lives. On this host a suite lives while its process does; on another one while its file
is younger than FRESH_S. The files of dead suites stay until the next suite starts, for what they say of the experiments.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from experiment.identity import known_id
from suite.matrix import Experiment
from suite.state import HOST, Watcher, alive, read_note, started
from utils import BusyError, atomic_write_json

TOUCH_S, FRESH_S = 20.0, 120.0


def read_claims(output_dir: Path) -> list[dict[str, Any]]:
    """Claims of suites that live or lived, with their "path" and whether they are "alive"; newest last."""
    found = []
    for path in (output_dir / "logs").glob("sweep-*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(path.read_bytes())
            sets = [
                {"argv": [str(w) for w in e["argv"]], "id": e["id"], "path": e["path"]}
                for e in told["experiments"]
            ]
            lives = "ended" not in told and alive(told, path, FRESH_S)
            mine = told.get("mine", [e["path"] for e in sets])
            found.append(told | {"experiments": sets, "mine": mine, "path": path, "alive": lives})
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


def holders(output_dir: Path) -> dict[str, dict[str, Any]]:
    """Path of a result -> the living suite that has the experiment."""
    return {
        path: claim for claim in read_claims(output_dir) if claim["alive"] for path in claim["mine"]
    }


def see_who_is_silent(output_dir: Path, wanted: set[str]) -> bool:
    """Wait while a suite of another host, that has what is wanted, may be dead; whether something became free thereby.

    A requeued job starts elsewhere at once.
    """
    doubtful = {
        p: claim
        for p, claim in holders(output_dir).items()
        if p in wanted and claim.get("host") != HOST
    }
    for claim in {claim["path"]: claim for claim in doubtful.values()}.values():
        print(
            f"waiting at most {FRESH_S:.0f} s to see whether the suite on {claim['host']} lives",
            file=sys.stderr,
        )
        with suppress(OSError):
            touched = claim["path"].stat().st_mtime
            while claim["path"].stat().st_mtime == touched and alive(claim, claim["path"], FRESH_S):
                time.sleep(0.5)
    return bool(doubtful.keys() - holders(output_dir).keys())


class Lease:
    """The experiments that this suite has, from construction to release().

    run:  None: all at once; `elsewhere` are those that another living suite has. Raises BusyError where there are some to
          run, and all of them are taken. The name of a run that suites share: none at first, more() takes one.
    mine: what it has.
    """

    def __init__(
        self,
        output_dir: Path,
        experiments: Sequence[Experiment],
        workers: int,
        run: str | None = None,
    ):
        self.output_dir, self.experiments, self.run = output_dir, list(experiments), run
        self._folder = output_dir / "logs"
        self._folder.mkdir(parents=True, exist_ok=True)
        self.path = self._folder / f"sweep-{HOST}-{os.getpid()}.json"
        self.told = {
            "pid": os.getpid(),
            "host": HOST,
            "start": started(os.getpid()),
            "claim": str(self.path.resolve()),
            "run": run,
        }
        self._where = {e.name: str(e.job.path.resolve()) for e in experiments}
        self._finished: set[str] = set()
        self.mine: list[Experiment] = []
        if run is None:
            see_who_is_silent(output_dir, set(self._where.values()))
        with _one_at_a_time(self._folder):
            taken = holders(output_dir)
            self.elsewhere = [
                e for e in experiments if run is None and self._where[e.name] in taken
            ]
            if run is None:
                self.mine = [e for e in experiments if e not in self.elsewhere]
            if self.elsewhere and not self.mine:
                raise busy(taken[self._where[self.elsewhere[0].name]])
            for other in read_claims(output_dir):
                if not other["alive"]:
                    other["path"].unlink(missing_ok=True)
            sets = [
                {"argv": list(e.argv), "id": known_id(e.job, e.spec), "path": self._where[e.name]}
                for e in experiments
            ]
            self._text = self.told | {"since": time.time(), "workers": workers, "experiments": sets}
            self._write()

    def _write(self, **more: Any) -> None:
        self._touched = time.monotonic()
        atomic_write_json(
            self.path, self._text | {"mine": [self._where[e.name] for e in self.mine]} | more
        )

    def more(
        self, choose: Callable[[list[Experiment], list[Experiment]], Experiment]
    ) -> Experiment | None:
        """One experiment more of a shared run, None where nothing is free.

        choose: (free experiments, those that other suites are at) -> one of the free ones.
        """
        if self.run is None:
            return None
        with _one_at_a_time(self._folder):
            taken = holders(self.output_dir)
            free = [
                e
                for e in self.experiments
                if e not in self.mine and self._where[e.name] not in taken
            ]
            free = [e for e in free if not self._is_over(e)]
            if not free:
                return None
            at_it = {
                path for claim in taken.values() for path in claim["mine"][-claim["workers"] :]
            }
            one = choose(free, [e for e in self.experiments if self._where[e.name] in at_it])
            self.mine.append(one)
            self._write()
        return one

    def _is_over(self, experiment: Experiment) -> bool:
        """Whether it is done, or has failed for good in this run."""
        if experiment.name not in self._finished:
            note = read_note(experiment)
            gave_up = (
                note.get("phase") == "failed" and (note.get("sweep") or {}).get("run") == self.run
            )
            if gave_up or Watcher(experiment).finished():
                self._finished.add(experiment.name)
        return experiment.name in self._finished

    def wait_for_the_silent(self) -> bool:
        """Whether a suite that shares this run has died meanwhile, so that there may be more to take."""
        return self.run is not None and see_who_is_silent(
            self.output_dir, set(self._where.values())
        )

    def touch(self) -> None:
        """Say now and then that this suite lives."""
        if time.monotonic() - self._touched > TOUCH_S:
            self._touched = time.monotonic()
            with suppress(OSError):
                os.utime(self.path)

    def release(self) -> bool:
        """What this suite was about stays readable; its experiments are free. Whether it was the last one of its run."""
        with _one_at_a_time(self._folder):
            self._write(ended=time.time())
            return self.run is None or not any(
                c["alive"] and c.get("run") == self.run for c in read_claims(self.output_dir)
            )


def busy(holder: dict[str, Any]) -> BusyError:
    return BusyError(
        f"these experiments are with the suite of pid {holder['pid']} on {holder['host']} already"
    )
