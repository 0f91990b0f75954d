"""The processes of one run: this one's place among them, and starting the others.

`torchrun` and `accelerate launch` say a process's place in RANK, WORLD_SIZE and LOCAL_RANK; `--devices 0,1` starts the
other workers itself and tells them in the same way. The workers talk through the store alone: each decodes the samples
whose key falls to it, and rank 0, which leads, scores once all are there. lm-eval always runs at world size 1, because
its few-shot prompts change with the number of ranks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils import DllmexpError, UsageError

SESSION_FILE = "SESSION"
LEADER_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 20.0


class LeaderGone(DllmexpError):
    """The process that this worker belongs to has ended, or never came."""

    exit_code = 1


@dataclass(frozen=True)
class WorkerInfo:
    """A process among the workers of a run.

    session: the same for all of them, and for no other run.
    parent:  pid of the leader where it started this worker, else None.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    session: str = "alone"
    parent: int | None = None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def check(self) -> None:
        """Raises LeaderGone where the leader that started this worker is dead: it must not keep a GPU."""
        if self.parent is not None and os.getppid() != self.parent:
            raise LeaderGone(
                f"the process {self.parent} that started this worker has ended; what it decoded is kept"
            )


def worker_info(environ: Mapping[str, str]) -> WorkerInfo:
    """This process's place, from what torchrun, accelerate or a leader has put into the environment."""
    try:
        rank, size = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
        local = int(environ.get("LOCAL_RANK", rank))
    except ValueError:
        rank = size = local = -1
    if not 0 <= rank < size or local < 0:
        told = ", ".join(
            f"{name}={environ[name]!r}"
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
            if name in environ
        )
        raise UsageError(
            f"the environment says {told}, which is no place among workers; unset them to run alone"
        )
    parent = int(environ["DLLMEXP_PARENT"]) if "DLLMEXP_PARENT" in environ else None
    # workers of one launcher on one node have its pid in common
    told = environ.get("DLLMEXP_SESSION") or (
        f"{os.getppid()}-{environ.get('MASTER_PORT', '')}" if size > 1 else ""
    )
    return WorkerInfo(rank, size, local, told or uuid.uuid4().hex, parent)


def announce(directory: Path, place: WorkerInfo) -> None:
    """Let the workers of this run in: the leader has the store, and what --overwrite sets aside is set aside."""
    path = directory / SESSION_FILE
    path.with_suffix(f".{os.getpid()}").write_text(place.session)
    path.with_suffix(f".{os.getpid()}").replace(path)


def await_leader(directory: Path, place: WorkerInfo, timeout_s: float = LEADER_TIMEOUT_S) -> None:
    """Wait until the leader of this run has announced itself. Raises LeaderGone."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        place.check()
        try:
            if (directory / SESSION_FILE).read_text() == place.session:
                return
        except FileNotFoundError:
            pass
        time.sleep(0.05)
    raise LeaderGone(
        f"worker {place.rank} of {place.size} waited {timeout_s:g} s for rank 0, which has not opened {directory}"
    )


class WorkerPool:
    """Workers 1 to n-1 of this process's run, each with its device. A context: leaving it ends those still running."""

    def __init__(self, argv: Sequence[str], devices: Sequence[str], place: WorkerInfo):
        """argv: this run's own arguments, as the workers get them. devices: of all workers, the first is the leader's."""
        self.processes = []
        threads = max(1, len(os.sched_getaffinity(0)) // len(devices))
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before torch is imported here, too
        for rank, device in enumerate(devices[1:], start=1):
            told = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": len(devices),
                "DLLMEXP_SESSION": place.session,
                "DLLMEXP_PARENT": os.getpid(),
            }
            self.processes.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        str(Path(__file__).resolve().parent.parent / "eval.py"),
                        *argv,
                        "--device",
                        device,
                    ],
                    env=os.environ | {name: str(value) for name, value in told.items()},
                    stdin=subprocess.DEVNULL,
                )
            )

    def alive(self) -> bool:
        """Whether a worker is still at its share."""
        return any(process.poll() is None for process in self.processes)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.terminate()
        end = time.monotonic() + STOP_TIMEOUT_S
        for process in self.processes:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
