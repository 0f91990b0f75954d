"""Progress files: a run writes them next to its samples, the suite reads them.

    results/cache/<generation_id[:16]>/status-<rank>.json     a StatusRecord

Each process of a run writes its own file, and touches it while it is alive; a reader adds them up.
A write that fails is skipped; a missing or damaged file costs progress the time to count the store.
The ranks of a run find each other by these files: the leader's opens the store to the others, and
the leader does not wait for a rank without one.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiment.signals import Signalled
from experiment.statistics import Z95, wilson
from experiment.store import HOST, Store, process_start
from experiment.workers import LeaderGone, WorkerInfo
from utils import SCORING_VERSION, OutputError

WRITE_S = 2.0  # seconds between two writes while samples finish
TOUCH_S = 20.0
FRESH_S = 180.0  # a process of another host counts as alive while its file is younger
LEADER_S = 600.0  # a rank waits that long for its leader
JOIN_S = 300.0  # the leader counts on a rank that long after its own start
STARTED = time.time()
ACTIVE = ("generating", "scoring")


@dataclass(frozen=True)
class Sums:
    """Totals over samples; they can be added.

    n, failed:         samples that are kept, and samples whose last attempt failed.
    tokens, forwards:  tokens returned and forward passes; of likelihoods the rows that ran.
    seconds:           time of decoding.
    scored, score, squares: first answers whose headline score is known, the sum of the scores and
                       of their squares. A score of another SCORING_VERSION is not known.
    """

    n: int = 0
    failed: int = 0
    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0
    scored: int = 0
    score: float = 0.0
    squares: float = 0.0

    @classmethod
    def of_sample(cls, result: Mapping[str, Any], meta: Mapping[str, Any]) -> Sums:
        """Of one sample, from the two parts of its record in the store."""
        sums = cls(
            n=1,
            tokens=meta.get("tokens_returned", 0),
            forwards=result.get("nfe", meta.get("rows_run", 0)),
            seconds=meta.get("cost_seconds", 0.0),
        )
        score = meta.get("score")
        # the interval is one over documents: of several answers the first counts
        if meta.get("repeat") or not score or score["version"] != SCORING_VERSION:
            return sums
        value = score["value"]
        return sums + cls(scored=1, score=value, squares=value * value)

    def __add__(self, other: Sums) -> Sums:
        return Sums(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def estimate(self) -> tuple[float, float | None, float | None, int] | None:
        """Mean score, its 95 % interval and the number of samples; None without scores.

        The interval is Wilson's if every score is 0 or 1, else the normal one.
        """
        n = self.scored
        if not n:
            return None
        mean = self.score / n
        if self.score == self.squares:
            return mean, *wilson(round(self.score), n), n
        if n == 1:
            return mean, None, None, n
        half = Z95 * math.sqrt(max(0.0, self.squares - n * mean * mean) / (n - 1) / n)
        return mean, mean - half, mean + half, n


def counted(store: Store, limit: int | None, repeats: int = 1) -> Sums:
    """Sums over the samples of a store: the first `repeats` of each document.

    limit: only of documents below it, if there is one.
    """
    sums = Sums()
    for key in store:
        record = store.get(key)
        meta, scored = record["meta"], "loglikelihood" in record["result"]
        asked = scored or meta.get("repeat", 0) < repeats
        if asked and (limit is None or meta.get("doc_id", -1) < limit):
            sums += Sums.of_sample(record["result"], record["meta"])
    return sums


@dataclass
class Summary:
    """The part of a result file that progress shows.

    stamp:  modification time in ns and size of the file: another stamp is another result.
    status: complete | incomplete | unscored.
    id, result_id: what generated and what scored the samples.
    of:     number of samples.
    score:  value of the headline metric, its interval and n; None without one.
    """

    stamp: list[int]
    status: str
    id: str
    result_id: str
    of: int
    sums: Sums
    score: list[Any] | None

    @classmethod
    def of_result(cls, path: Path, result: Mapping[str, Any], metric: str) -> Summary:
        """metric: headline metric of the benchmark, shown for an incomplete result too.

        Raises KeyError, TypeError, ValueError or AttributeError if this is no result.
        """
        profile, repeats = result["profile"], int(result["config"].get("repeats", 1))
        of, failed = (int(result[name]) * repeats for name in ("n_samples", "n_failed"))
        sums = Sums(
            n=of - failed,
            failed=failed,
            tokens=profile.get("tokens_returned") or 0,
            forwards=sum((profile.get("forward_passes") or {}).values()),
            seconds=profile.get("seconds") or 0.0,
        )
        found = result["headline"] or (result["score_on_completed"] or {}).get(metric)
        score = [found["value"], *found["ci95"], found["n"]] if found else None
        ids = result["generation_id"], result["id"]
        return cls(stamp_of(path), result["status"], *ids, of, sums, score)


def stamp_of(path: Path) -> list[int]:
    """Identifies a version of a file: modification time in ns and size. Raises OSError."""
    stat = path.stat()
    return [stat.st_mtime_ns, stat.st_size]


# ---------------------------------------------------------------- the file


@dataclass
class StatusRecord:
    """The content of a status file.

    rank, session, launch: of the process among the workers of the run (see WorkerInfo).
    pid, host, start: of the process; start as process_start gives it.
    result:           path of the result.
    state:            generating | scoring | done | failed | stopped. "stopped" is a process that
                      ended in order before it was done.
    error:            reason of the state "failed".
    of:               samples of the experiment, None if unknown.
    sums:             rank 0: samples kept at the start of the run and those finished by this
                      process; other ranks: those finished by this process.
    time:             of the last write, seconds since the epoch.
    summary:          of the result, once it is written.
    """

    rank: int
    session: str
    pid: int
    host: str
    start: str | None
    result: str
    state: str = "generating"
    error: str = ""
    of: int | None = None
    sums: Sums = Sums()
    time: float = 0.0
    summary: Summary | None = None
    launch: str = ""


class StatusFile(AbstractContextManager):
    """The status file of this process, from construction until the context is left.

    Leaving the context notes how the run ended. Never raises because of the file.
    """

    def __init__(
        self,
        store: Store,
        worker: WorkerInfo,
        result: Path,
        limit: int | None = None,
        metric: str = "",
        repeats: int = 1,
    ):
        """result: path of the result. metric: see Summary.of_result; the others: see counted."""
        self.path = store.directory / f"status-{worker.rank}.json"
        self.worker, self.metric, self._result = worker, metric, result
        self._began, self._ended, self._gone = time.monotonic(), threading.Event(), set[int]()
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._written = -math.inf
        pid = os.getpid()
        self.record = StatusRecord(
            worker.rank, worker.session, pid, HOST, process_start(pid), str(result.resolve())
        )
        self.record.launch = worker.launch
        if worker.leads:
            self.record.sums = counted(store, limit, repeats)
            for rank, path in _files(store.directory):
                if rank >= worker.size:
                    path.unlink(missing_ok=True)
        self.write()
        threading.Thread(target=self._touch, daemon=True).start()

    def expect(self, n: int) -> None:
        """Note the number of samples of the experiment."""
        self.record.of = n

    def sample(self, result: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Count a sample that has been put into the store."""
        self.record.sums += Sums.of_sample(result, meta)
        self._write_soon()

    def failed(self) -> None:
        """Count a sample that has failed."""
        self.record.sums += Sums(failed=1)
        self._write_soon()

    def done(self, result: Mapping[str, Any]) -> None:
        """The result has been written."""
        self.record.summary = Summary.of_result(self._result, result, self.metric)
        self.say("done")

    def say(self, state: str, error: str = "") -> None:
        """Note the state, at once."""
        self.record.state, self.record.error = state, error
        self.write()

    def _write_soon(self) -> None:
        """A timer writes: samples of a batch finish together, and the last one counts, too."""
        if self._timer is None:
            wait = max(0.0, self._written + WRITE_S - time.monotonic())
            self._timer = threading.Timer(wait, self.write)
            self._timer.daemon = True
            self._timer.start()

    def write(self) -> None:
        with self._lock, suppress(OSError):
            self._timer, self._written = None, time.monotonic()
            self.record.time = time.time()
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps(asdict(self.record)), encoding="ascii")
            temporary.replace(self.path)

    def _touch(self) -> None:
        """Show that this process is alive: one sample may take longer than FRESH_S."""
        while not self._ended.wait(TOUCH_S):
            with suppress(OSError):
                os.utime(self.path)

    def awaits_ranks(self) -> bool:
        """For the leader: whether another rank may still deliver samples. Names each that cannot.

        One that has not joined may do so until JOIN_S after the start.
        """
        states = {r.rank: r for r in read_status(self.path.parent) if r.rank}
        early = time.monotonic() - self._began < JOIN_S
        for rank in range(1, self.worker.size):
            found = states.get(rank)
            if rank in self._gone or (found.state in (*ACTIVE, "done") if found else early):
                continue
            self._gone.add(rank)
            what = f"on {found.host} has ended early" if found else "has not joined"
            text = f"rank {rank} of {self.worker.size} {what}; its samples are decoded by rank 0"
            logging.getLogger("dllmexp").warning(text)
        absent = early and len(states) < self.worker.size - 1
        return absent or any(r.state in ACTIVE for r in states.values())

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self._ended.set()
        if self._timer:
            self._timer.cancel()
        if self.record.state not in ACTIVE:
            return
        if error is None or isinstance(error, KeyboardInterrupt | Signalled):
            return self.say("stopped")
        problems = getattr(error, "problems", None) or [f"{type(error).__name__}: {error}"]
        self.say("failed", "; ".join(problems)[:1000])


# ---------------------------------------------------------------- reading


def listed(directory: Path, begin: str = "", end: str = "") -> list[Path]:
    """What a directory has, sorted, by how the names begin and end; nothing where it is absent.

    Raises OutputError: one that cannot be read is not empty.
    """
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as error:
        denied = isinstance(error, PermissionError)
        why = "no permission to read it" if denied else error.strerror
        raise OutputError(f"{directory}: {why}") from None
    return [directory / name for name in names if name.startswith(begin) and name.endswith(end)]


def _files(directory: Path) -> Iterable[tuple[int, Path]]:
    """(rank, path) of each status file, sorted."""
    names = ((p.stem.removeprefix("status-"), p) for p in listed(directory, "status-", ".json"))
    return sorted((int(rank), path) for rank, path in names if rank.isdecimal())


def read_status(directory: Path) -> list[StatusRecord]:
    """The records of the last run in a store, by rank; none without a record of rank 0.

    A process that has ended without a word gets the state "stopped".
    """
    found: list[StatusRecord] = []
    for _, path in _files(directory):
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            content = json.loads(path.read_bytes())
            sums, summary = Sums(**content.pop("sums")), content.pop("summary")
            if summary:
                summary = Summary(**summary | {"sums": Sums(**summary["sums"])})
            record = StatusRecord(**content, sums=sums, summary=summary)
            if record.state in ACTIVE and not alive(content, path):
                record.state = "stopped"
            found.append(record)
    leads = bool(found) and found[0].rank == 0
    return [record for record in found if leads and record.session == found[0].session]


def await_leader(directory: Path, worker: WorkerInfo, timeout_s: float = LEADER_S) -> str | None:
    """The session of this worker's run, once its leader lets the others in.

    None where that run has ended well already. Raises LeaderGone.
    """
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        worker.check()
        leader = next(iter(read_status(directory)), None)
        if leader and leader.launch == worker.launch:
            if leader.state in ACTIVE:
                return leader.session
            if leader.time > STARTED:  # else it is of an earlier launch
                if leader.state == "done":
                    return None
                raise LeaderGone(f"rank 0 on {leader.host} has ended: {leader.error or 'stopped'}")
        time.sleep(0.05)
    raise LeaderGone(
        f"rank {worker.rank} of {worker.size} on {HOST} waited {timeout_s:g} s for rank 0, which "
        f"has not opened {directory}; every node needs the same --output_dir, MASTER_ADDR and "
        "MASTER_PORT"
    )


def alive(process: Mapping[str, Any], path: Path, fresh_s: float = FRESH_S) -> bool:
    """Whether the process {"pid", "host", "start"} that writes `path` is alive.

    On this host pid and start time say so; on another one, and on macOS, which does not tell the
    start time, the age of the file.
    """
    if process.get("host") == HOST and process.get("start") is not None:
        return process["start"] == process_start(process.get("pid", 0))
    with suppress(OSError):
        return time.time() - path.stat().st_mtime < fresh_s
    return False
