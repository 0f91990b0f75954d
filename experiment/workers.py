"""The processes of one run: the rank of this one, and the start of the others.

`torchrun` and `accelerate launch` set RANK, WORLD_SIZE and LOCAL_RANK. `--devices 0,1` starts the
other workers itself and sets the same variables. The workers, on one node or on several, share
nothing but the store: each decodes the samples that their keys assign to it, and rank 0, the
leader, scores when all are there.
lm-eval always runs at world size 1, because its few-shot prompts change with the number of ranks.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiment.store import process_start
from utils import DllmexpError, UsageError, available_cores

STOP_TIMEOUT_S = 20.0
# the same on every node of a launch, where a launcher sets them
LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")


class LeaderGone(DllmexpError):
    """The leader of this worker's run has ended, or has not started."""

    exit_code = 1


@dataclass(frozen=True)
class WorkerInfo:
    """A process among the workers of a run.

    rank, size: 0 <= rank < size; rank 0 leads.
    local_rank: rank among the workers of this node.
    launch:     the same for all workers of a run; another run may have it later.
    session:    of the run and of no other one. The leader chooses it, the others read it in the
                leader's status file.
    parent:     pid of the leader where the leader started this worker, else None.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    session: str = "alone"
    parent: int | None = None
    launch: str = "alone"

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
    if "RANK" not in environ and environ.get("WORLD_SIZE", "1") != "1":
        text = (
            f"WORLD_SIZE={environ['WORLD_SIZE']} without RANK is ignored: this process runs alone"
        )
        logging.getLogger("dllmexp").warning(f"note: {text}; torchrun sets both")
        environ = {k: v for k, v in environ.items() if k not in ("WORLD_SIZE", "LOCAL_RANK")}
    try:
        rank, size = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
        local = int(environ.get("LOCAL_RANK", rank))
    except ValueError:
        rank = size = local = -1
    if not 0 <= rank < size or local < 0:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        found = [f"{name}={environ[name]!r}" for name in names if name in environ]
        wrong = "is not valid; unset it" if len(found) == 1 else "are not valid; unset them"
        raise UsageError(f"{', '.join(found)} {wrong} to run alone")
    parent = int(environ["DLLMEXP_PARENT"]) if "DLLMEXP_PARENT" in environ else None
    launch = environ.get("DLLMEXP_LAUNCH") or _launch(environ, size)
    return WorkerInfo(rank, size, local, uuid.uuid4().hex, parent, launch)


def _launch(environ: Mapping[str, str], size: int) -> str:
    """What the processes of one launcher have in common; on one node also the launcher itself.

    It may be part of a file's name.
    """
    if size == 1:
        return uuid.uuid4().hex
    parts = [environ[name] for name in LAUNCH if environ.get(name)]
    if not parts and "SLURM_JOB_ID" in environ:
        parts = ["job", environ["SLURM_JOB_ID"]]
    if not parts or environ.get("LOCAL_WORLD_SIZE") == str(size):
        parts += ["pid", str(os.getppid()), str(process_start(os.getppid()))]
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(parts))


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
        threads = max(1, available_cores() // len(devices))
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before torch is imported here, too
        for rank, device in enumerate(devices[1:], start=1):
            variables = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": len(devices),
                "DLLMEXP_LAUNCH": leader.launch,
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
