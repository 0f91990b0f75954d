"""Where an experiment stands, read from files only: its result, its sample store, what the suite noted of it.

No lock is tried: a process that tests a lock holds it for a moment, and the run that wants it then ends with 75.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.identity import known_id
from experiment.result import is_proportion
from experiment.statistics import estimate
from suite.matrix import Experiment
from suite.tally import Sums, Tally
from utils import atomic_write_json

HOST = re.sub(r"[^A-Za-z0-9.-]", "_", os.uname().nodename)  # as experiment/store.py writes it
HOLDER = re.compile(
    r"pid (\d+) on (\S+) since \S+ \(process start (\d+)\)"
)  # the text of a store's LOCK
FRESH_S = 900.0  # a holder on another node counts as alive while its files are not older
HEAD_END, PROFILE = b' "samples": ', b'\n "profile": '
TAIL_BYTES = 1 << 20


@dataclass(frozen=True)
class Status:
    """Where an experiment stands.

    state:    done | partial | failed | waiting | running.
    n, of:    samples finished and in all (None: not known).
    sums:     what those samples cost.
    score:    value, low, high of the headline metric, and over how many samples; None where not known.
    note:     why it failed, what is running, what is wrong with a file; "" for nothing.
    """

    state: str
    n: int
    of: int | None
    sums: Sums = Sums()
    score: tuple[float, float | None, float | None, int] | None = None
    note: str = ""


# ---------------------------------------------------------------- what the suite notes


def note_path(experiment: Experiment) -> Path:
    return experiment.log.with_suffix(".json")


def write_note(
    experiment: Experiment,
    phase: str,
    attempts: int,
    error: str = "",
    sweep: dict[str, Any] | None = None,
) -> None:
    """Keep beside the log what became of an experiment.

    phase: generating | scoring | done | failed | elsewhere | stopped. sweep: the process that it is with, see Lease.told.
    """
    told = {
        "phase": phase,
        "attempts": attempts,
        "error": error,
        "sweep": sweep,
        "time": time.time(),
    }
    atomic_write_json(note_path(experiment), told | {"command": experiment.command})


def read_note(experiment: Experiment) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        told = json.loads(note_path(experiment).read_bytes())
        if isinstance(told, dict):
            return told
    return {}


# ---------------------------------------------------------------- who is alive


def started(pid: int) -> str | None:
    """When a process of this host started, None where it has ended (proc(5), stat, field 22)."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def alive(told: dict[str, Any], path: Path, fresh_s: float = FRESH_S) -> bool:
    """Whether the process {"pid", "host", "start"} lives; on another host, whether it has touched `path` lately."""
    if told.get("host") == HOST:
        return told.get("start") is not None and started(told.get("pid", 0)) == told["start"]
    with suppress(OSError):
        return time.time() - path.stat().st_mtime < fresh_s
    return False


def holder(directory: Path) -> str | None:
    """Who is writing to a store, as `pid 12 on node7`; None where nobody is known to."""
    for name in ("LOCK", "LOCK.owner"):
        with suppress(OSError):
            found = HOLDER.match((directory / name).read_text())
            if found:
                newest = max(
                    (directory / name, *directory.glob("shard-*")), key=lambda p: p.stat().st_mtime
                )
                if alive({"pid": int(found[1]), "host": found[2], "start": found[3]}, newest):
                    return f"pid {found[1]} on {found[2]}"
    return None


# ---------------------------------------------------------------- results


def read_summary(path: Path) -> dict[str, Any] | None:
    """A result without its samples, None where there is none. Raises ValueError where the file is something else.

    Results are written with one line for each key (utils.readable_json): those in front of the samples and the profile
    behind them are read, megabytes of samples are not.
    """
    try:
        with open(path, "rb") as file:
            head = [file.readline()]
            while head[-1] and not head[-1].startswith(HEAD_END):
                head.append(file.readline())
            if head[0] != b"{\n" or not head.pop():
                raise ValueError("not a result file")
            found = json.loads(b"".join(head).rstrip().rstrip(b",") + b"}")
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            tail = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(error.strerror) from error
    if not {"status", "id", "schema_version"} <= found.keys():
        raise ValueError("not a result file")
    at = tail.rfind(PROFILE)
    if at >= 0:
        line = tail[at + len(PROFILE) :].partition(b"\n")[0]
        sums, cut, _ = line.partition(b', "sample_seconds": ')
        with suppress(ValueError):
            found["profile"] = json.loads(sums + b"}" if cut else line.rstrip(b","))
    return found


# ---------------------------------------------------------------- the whole


class Watcher:
    """Where an experiment stands, again and again: what has been read once is not read again."""

    def __init__(self, experiment: Experiment, known_id: str | None = None):
        self.experiment, self._id = experiment, known_id
        self._tally: Tally | None = None
        self._summary: tuple[tuple[int, int], Status] | None = None

    @property
    def id(self) -> str | None:
        self._id = self._id or known_id(self.experiment.job, self.experiment.spec)
        return self._id

    def standing(self) -> Status:
        return self._of_result() or self._of_store()

    def finished(self) -> bool:
        """Whether a final result is there; nothing else is looked at."""
        standing = self._of_result()
        return standing is not None and standing.state == "done"

    def _of_result(self) -> Status | None:
        """Of the result file, where there is one that is final."""
        path = self.experiment.job.path
        try:
            stat = path.stat()
        except OSError:
            return None
        stamp = (stat.st_mtime_ns, stat.st_size)
        if self._summary is None or self._summary[0] != stamp:
            self._summary = stamp, self._read_result(path)
        found = self._summary[1]
        # one that is not final may be on its way to become so
        return found if found.state == "done" or not self._active() else None

    def _read_result(self, path: Path) -> Status:
        of = self.experiment.n
        try:
            told = read_summary(path)
            profile = told.get("profile") or {}
            passes = profile.get("forward_passes") or {}
            sums = Sums(
                int(told["n_samples"]) - int(told["n_failed"]),
                profile.get("tokens_returned") or 0,
                sum(passes.values()),
                profile.get("seconds") or 0.0,
                int(told["n_failed"]),
            )
            if self.experiment.job.predictions is None and self.id and told["id"] != self.id:
                return Status(
                    "failed",
                    0,
                    of,
                    note=f"{path} is of another configuration: --extra '--tag NAME' writes beside it",
                )
            key = self.experiment.spec.headline
            scores = told["headline"] or (told["score_on_completed"] or {}).get(key)
            score = (scores["value"], *scores["ci95"], scores["n"]) if scores else None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return Status(
                "failed", 0, of, note=f"{path} is no result of this program ({error}): move it away"
            )
        if told["status"] == "complete":
            return Status("done", sums.n, int(told["n_samples"]), sums, score)
        return Status(
            "failed", sums.n, int(told["n_samples"]), sums, score, f"{sums.failed} samples failed"
        )

    def _active(self) -> str | None:
        """What is running, None where nothing is."""
        told = read_note(self.experiment)
        if told.get("phase") in ("generating", "scoring") and isinstance(told.get("sweep"), dict):
            if alive(told["sweep"], Path(told["sweep"].get("claim", ""))):
                return told["phase"]
        return holder(self.directory) if self.id else None

    @property
    def directory(self) -> Path:
        return self.experiment.job.output_dir / "cache" / (self.id or "unknown")[:16]

    def _of_store(self) -> Status:
        of, sums = self.experiment.n, Sums()
        if self.id:
            self._tally = self._tally or Tally(self.directory)
            self._tally.update()
            sums = self._tally.sums(of)
        told, active = read_note(self.experiment), self._active()
        score = self._score_so_far(sums.scores)
        if active:
            return Status("running", sums.n, of, sums, score, active)
        if told.get("phase") == "failed":
            return Status(
                "failed", sums.n, of, sums, score, str(told.get("error") or "see its log")
            )
        return Status("partial" if sums.n else "waiting", sums.n, of, sums, score)

    def _score_so_far(
        self, scores: Sequence[float]
    ) -> tuple[float, float | None, float | None, int] | None:
        if not scores:
            return None
        found = estimate(
            scores,
            proportion=is_proportion(self.experiment.spec.headline) and set(scores) <= {0, 1},
        )
        return found.value, found.low, found.high, found.n


def statuses(watchers: Sequence[Watcher]) -> list[tuple[Experiment, Status]]:
    return [(watcher.experiment, watcher.standing()) for watcher in watchers]
