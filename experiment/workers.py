"""The processes of one run: the rank of this one, and the start of the others.

`torchrun` and `accelerate launch` set RANK, WORLD_SIZE and LOCAL_RANK. `--devices 0,1` starts the
other workers itself and sets the same variables. The workers share nothing but the store: each
decodes the samples that their keys assign to it, and rank 0, the leader, scores when all are there.
lm-eval always runs at world size 1, because its few-shot prompts change with the number of ranks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from utils import DllmexpError, UsageError

SESSION_FILE = "SESSION"
LEADER_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 20.0


class LeaderGone(DllmexpError):
    """The leader of this worker's run has ended, or has not started."""

    exit_code = 1


@dataclass(frozen=True)
class WorkerInfo:
    """A process among the workers of a run.

    rank, size: 0 <= rank < size; rank 0 leads.
    local_rank: rank among the workers of this node.
    session:    the same for all workers of a run, and for no other run.
    parent:     pid of the leader where the leader started this worker, else None.
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
        """Raises LeaderGone where the leader that started this worker has ended.

        An orphan must not keep a GPU.
        """
        if self.parent is not None and os.getppid() != self.parent:
            raise LeaderGone(
                f"the process {self.parent} that started this worker has ended; "
                "what it decoded is kept"
            )


def worker_info(environ: Mapping[str, str]) -> WorkerInfo:
    """This process among the workers, from variables that torchrun, accelerate or a leader sets.

    Raises UsageError where they do not name a rank.
    """
    try:
        rank, size = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
        local = int(environ.get("LOCAL_RANK", rank))
    except ValueError:
        rank = size = local = -1
    if not 0 <= rank < size or local < 0:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        found = ", ".join(f"{name}={environ[name]!r}" for name in names if name in environ)
        raise UsageError(
            f"the environment has {found}, which no launcher would set; unset them to run alone"
        )
    parent = int(environ["DLLMEXP_PARENT"]) if "DLLMEXP_PARENT" in environ else None
    session = environ.get("DLLMEXP_SESSION")
    if not session and size > 1:
        # the workers of one launcher on one node have its pid in common, and when it started
        session = f"{os.getppid()}-{environ.get('MASTER_PORT', '')}"
        with suppress(OSError):
            stat = Path(f"/proc/{os.getppid()}/stat").read_text()
            session += f"-{stat.rpartition(')')[2].split()[19]}"
    return WorkerInfo(rank, size, local, session or uuid.uuid4().hex, parent)


def announce(directory: Path, worker: WorkerInfo) -> None:
    """Let the workers of this run open the store in `directory`.

    For the leader, once it has the lock and has set aside what --overwrite sets aside.
    """
    path = directory / SESSION_FILE
    path.with_suffix(f".{os.getpid()}").write_text(worker.session)
    path.with_suffix(f".{os.getpid()}").replace(path)


def await_leader(directory: Path, worker: WorkerInfo, timeout_s: float = LEADER_TIMEOUT_S) -> None:
    """Wait until the leader of this run has called `announce`. Raises LeaderGone."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        worker.check()
        try:
            if (directory / SESSION_FILE).read_text() == worker.session:
                return
        except FileNotFoundError:
            pass
        time.sleep(0.05)
    raise LeaderGone(
        f"worker {worker.rank} of {worker.size} waited {timeout_s:g} s for rank 0, "
        f"which has not opened {directory}"
    )


class WorkerPool:
    """Workers 1 to n-1 of this process's run, each with its device.

    A context manager: leaving it ends the workers that are still running.
    """

    def __init__(self, argv: Sequence[str], devices: Sequence[str], leader: WorkerInfo):
        """Start the workers.

        argv:    arguments of the workers.
        devices: of all workers, the first one the leader's.
        """
        self.processes = []
        threads = max(1, len(os.sched_getaffinity(0)) // len(devices))
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before torch is imported here, too
        for rank, device in enumerate(devices[1:], start=1):
            variables = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": len(devices),
                "DLLMEXP_SESSION": leader.session,
                "DLLMEXP_PARENT": os.getpid(),
            }
            program = Path(__file__).resolve().parent.parent / "eval.py"
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, str(program), *argv, "--device", device],
                    env=os.environ | {name: str(value) for name, value in variables.items()},
                    stdin=subprocess.DEVNULL,
                )
            )

    def alive(self) -> bool:
        """Whether a worker is still running."""
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
