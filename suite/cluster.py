"""The engine of a SLURM cluster: an array job through submitit, each of whose tasks is a suite on the node that it gets.

The tasks share one run (suite/lease.py): each takes one experiment after the other, of the model that it has loaded where
there is one, until nothing is left that nobody has. What a task is killed in the middle of goes on where it was, in the
task itself once it is requeued or in another one: every sample is in the store. So nothing has to be saved when SLURM
takes a node away, and a task is the same command each time, `sweep.py share`, in its first life and in any later one.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest import mock

from suite.lease import Lease, busy, holders
from suite.matrix import Experiment, experiments
from suite.run import run_suite
from suite.state import Watcher, statuses
from suite.worker import die_with_parent
from utils import BadDataError, EnvironmentProblem, UsageError, atomic_write_json

if TYPE_CHECKING:
    from submitit.core.utils import DelayedSubmission

COMMAND = Path(__file__).resolve().parent.parent / "scripts" / "sweep.py"
TIMEOUTS = (
    10_000  # a task that reaches its time limit is requeued; nothing speaks against doing so again
)
GRACE_S = 600.0  # what SLURM may leave a task that it pre-empts
WARN_S, LEAST_MINUTES = (
    90,
    5,
)  # how long before its time limit a task is told, and what that limit must be
DEFAULT_TIME = "4:00:00"  # short jobs start sooner, and the end of one costs no more than loading a model again
# sbatch's options that --slurm-extra cannot give, and why
OURS = {
    "partition": "give --partition",
    "time": "give --time",
    "account": "give --account",
    "qos": "give --qos",
    "array": "give --array-size",
    "gpus_per_node": "give --gpus-per-job",
    "output": "logs go to logs/slurm",
    "error": "logs go to logs/slurm",
    "open_mode": "logs are appended to",
    "signal": "it is what a task is requeued by",
    "requeue": "tasks are always requeued",
    "no_requeue": "tasks are always requeued",
    "nodes": "a task has one node",
    "ntasks": "a task is one process",
    "ntasks_per_node": "a task is one process",
}


@dataclass(frozen=True)
class Request:
    """What is asked of SLURM for each task of the array.

    array_size: tasks at most; None: one for each model. gpus_per_job: 0 runs on the CPU. time: as sbatch takes it.
    slurm_extra: further options of sbatch, as on its command line.
    """

    partition: str | None = None
    gpus_per_job: int = 1
    array_size: int | None = None
    time: str = DEFAULT_TIME
    account: str | None = None
    qos: str | None = None
    slurm_extra: str = ""

    def parameters(self) -> dict[str, Any]:
        """For submitit's SlurmExecutor. Raises UsageError with every problem."""
        problems = []
        if self.gpus_per_job < 0:
            problems.append(f"--gpus-per-job {self.gpus_per_job}: must be 0 or more")
        if self.array_size is not None and self.array_size < 1:
            problems.append(f"--array-size {self.array_size}: must be at least 1")
        limit, more = _minutes(self.time), {}
        if limit is None:
            problems.append(f"--time {self.time}: expected minutes, H:MM:SS, D-HH or D-HH:MM")
        elif limit < LEAST_MINUTES:  # warned as soon as it starts, it would be requeued for ever
            problems.append(f"--time {self.time}: must be at least {LEAST_MINUTES} minutes")
        try:
            more = _options(self.slurm_extra)
        except ValueError as error:
            problems.append(f"--slurm-extra {self.slurm_extra!r}: {error}")
        problems += [f"--slurm-extra --{k.replace('_', '-')}: {OURS[k]}" for k in more if k in OURS]
        if problems:
            raise UsageError(problems)
        given = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "gpus_per_node": self.gpus_per_job or None,
        }
        return {k: v for k, v in given.items() if v is not None} | {
            "time": limit,
            "job_name": "dllmexp",
            "signal_delay_s": WARN_S,
            "stderr_to_stdout": True,
            "additional_parameters": {"requeue": True} | more,
            # from SLURM 22.05 on srun does not take this over from sbatch
            "setup": [
                '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"'
            ],
        }


def _minutes(text: str) -> int | None:
    """Whole minutes of a time as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. None where it is no time, or none at all."""
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        return None
    unit = 3600 if dash or len(parts) == 3 else 60
    seconds = int(days or 0) * 86400 + sum(
        int(part) * unit // 60**i for i, part in enumerate(parts)
    )
    return -(-seconds // 60) or None


def _options(text: str) -> dict[str, Any]:
    """`--mem=64G --exclusive` or `--mem 64G` -> {"mem": "64G", "exclusive": True}. Raises ValueError."""
    found: dict[str, Any] = {}
    name = ""
    for word in shlex.split(text):
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = value if equals else True
        elif name and found[name] is True and not word.startswith("-"):
            found[name] = word
        else:
            raise ValueError(
                f"{word!r} is no --option of sbatch; write short ones out, -C a100 as --constraint=a100"
            )
    return found


# ---------------------------------------------------------------- on a node


class ArrayTask:
    """What submitit starts on a node: a suite of its own process, which is stopped in good order before a requeue."""

    process: subprocess.Popen | None = None

    def __init__(self, command: list[str]):
        self.command = command

    def __call__(self) -> None:
        """Ends with the suite's exit code."""
        # SLURM sends its warning to every process of the task, and by default it kills
        warning = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self.process = subprocess.Popen([*self.command, "--parent", str(os.getpid())])
        signal.signal(signal.SIGUSR2, warning)
        code = self.process.wait()
        code = 128 - code if code < 0 else code
        if code == 128 + signal.SIGTERM:
            # pre-empted with some time left, perhaps: a task that ended by itself within it would not be requeued
            end = time.monotonic() + GRACE_S
            state = ["squeue", "--noheader", "--job", os.environ["SLURM_JOB_ID"], "--format", "%T"]
            while (
                time.monotonic() < end
                and "RUNNING" in subprocess.run(state, capture_output=True, text=True).stdout
            ):
                time.sleep(1)
        sys.exit(code)

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit on SLURM's warning, before it requeues the task."""
        from submitit.helpers import DelayedSubmission

        if self.process:
            self.process.terminate()
            os.waitid(
                os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT
            )  # not wait(): this interrupts the one above
        return DelayedSubmission(ArrayTask(self.command))


def share(plan: Path, parent: int) -> int:
    """The suite of one task of the array: the exit code. Raises BadDataError where the plan cannot be read."""
    die_with_parent(parent)
    try:
        told = json.loads(plan.read_bytes())
        chosen = experiments(told["sets"])
        out, workers, run, gpus = (
            Path(told["output_dir"]),
            told["workers"],
            told["run"],
            told["gpus"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadDataError(f"{plan} is no plan of --engine slurm ({error})") from None
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    job, task = (os.environ.get(name) for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"))
    who = f"[{job}_{task}] " if job else f"[{os.environ.get('SLURM_JOB_ID', 'no job')}] "
    return run_suite(chosen, out, workers, run, who)


# ---------------------------------------------------------------- on the login node


def submit(chosen: Sequence[Experiment], out: Path, n_workers: int | None, request: Request) -> str:
    """Submit what is not done and nobody has; what to tell about it. Raises BusyError, EnvironmentProblem, UsageError."""
    parameters = request.parameters()
    check_cluster()
    taken = holders(out)
    rows = [(e, s) for e, s in statuses([Watcher(e) for e in chosen]) if s.state != "done"]
    todo = [e for e, _ in rows if str(e.job.path.resolve()) not in taken]
    if not rows:
        return f"all {len(chosen)} experiments are done"
    if not todo:
        raise busy(taken[str(rows[0][0].job.path.resolve())])
    run = uuid.uuid4().hex[:12]
    folder = out.resolve() / "logs" / "slurm"
    plan = folder / f"plan-{run}.json"
    atomic_write_json(
        plan,
        {
            "run": run,
            "output_dir": str(out),
            "workers": n_workers,
            "gpus": request.gpus_per_job,
            "sets": [list(e.argv) for e in todo],
        },
    )
    n = min(request.array_size or len({e.model for e in todo}), len(todo))
    job = _sbatch(
        folder, parameters, [sys.executable, str(COMMAND), "share", "--plan", str(plan)], n
    )
    Lease(
        out, todo, 0, run
    ).release()  # so that progress shows them while the job waits in the queue
    left = (
        f" ({len(rows) - len(todo)} more are with another suite)" if len(todo) < len(rows) else ""
    )
    return "\n".join(
        [
            f"job {job}: {len(todo)} experiments{left}, {n} task{'s' * (n != 1)} at most at a time",
            f"where it stands: ./scripts/progress.sh{'' if str(out) == 'results' else f' --output_dir {out}'}; squeue --job {job}",
            f"logs: {folder}/{job}_*_log.out, {out / 'logs'}/<experiment>.log",
            f"cancel: scancel {job}; the same command goes on, and so does scontrol requeue {job}",
        ]
    )


def check_cluster() -> None:
    """Raises EnvironmentProblem where jobs cannot be submitted from here."""
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"{' and '.join(missing)} not found: --engine slurm submits from a login node of a SLURM cluster; --engine local runs here"
        )


def imported_submitit() -> ModuleType:
    """submitit, without what its import does to logging: it closes every handler of the process.

    One of absl's, which lm-eval's metrics bring, closes with it what was standard error when it was made.
    """
    with mock.patch.dict(os.environ, SUBMITIT_LOG_LEVEL="NOCONFIG"):
        import submitit
    return submitit


def _sbatch(folder: Path, parameters: dict[str, Any], command: list[str], n: int) -> str:
    """The id of the job. Raises EnvironmentProblem with what sbatch says."""
    import cloudpickle

    submitit = imported_submitit()
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a node need not find this module
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=TIMEOUTS)
        executor.update_parameters(**parameters)
        with redirect_stderr(io.StringIO()):  # it prints what sbatch says before it raises it
            jobs = executor.submit_array([ArrayTask(command) for _ in range(n)])
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [
            "failed and said nothing"
        ]
        raise EnvironmentProblem(f"sbatch: {lines[-1].removeprefix('sbatch: error: ')}") from None
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    return jobs[0].job_id.partition("_")[0]
