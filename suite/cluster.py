"""The engine of a SLURM cluster: a job array, each task of which is a suite on its node.

The experiments are divided among the tasks beforehand, by model. A task begins with its own share
and goes on with the others': it skips what is finished, and what another task has locked it tries
again later. So a task that is killed for good leaves its share to the others. Every sample is in
the store: a task that SLURM requeues runs the same command and resumes.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiment import plugins
from experiment.identity import agree
from experiment.signals import Signalled
from suite.lease import Lease
from suite.local import COMMAND
from suite.matrix import Experiment, experiments
from suite.run import progress_command, run_suite
from suite.state import Watcher
from utils import BadDataError, EnvironmentProblem, UsageError, atomic_write_json, numbered

WARN_S = 90  # a task gets SIGUSR2 that long before its time limit
LEAST_MINUTES = 5  # of a time limit: a task that is warned as soon as it starts does nothing
DEFAULT_TIME = "4:00:00"  # short jobs start sooner; the end of one costs the loading of a model
# options of sbatch that --slurm-extra cannot give, and the way out
RESERVED = {
    "partition": "give --partition",
    "time": "give --time",
    "account": "give --account",
    "qos": "give --qos",
    "array": "give --array-size",
    "gpus-per-node": "give --gpus-per-job",
    "output": "logs go to logs/slurm",
    "error": "logs go to logs/slurm",
    "open-mode": "logs are appended to",
    "signal": "a task is requeued by it",
    "requeue": "tasks are always requeued",
    "no-requeue": "tasks are always requeued",
    "nodes": "a task has one node",
    "ntasks": "a task is one process",
    "ntasks-per-node": "a task is one process",
    "wrap": "a task runs the suite",
}


@dataclass(frozen=True)
class JobRequest:
    """The resources of each task of the array.

    array_size: tasks at most; None: one for each model. gpus_per_job: 0 runs on the CPU.
    time: in a format of sbatch. slurm_extra: further options of sbatch, as on its command line.
    """

    partition: str | None = None
    gpus_per_job: int = 1
    array_size: int | None = None
    time: str = DEFAULT_TIME
    account: str | None = None
    qos: str | None = None
    slurm_extra: str = ""

    def options(self) -> list[str]:
        """Options of sbatch. Raises UsageError with every problem."""
        problems, more = [], []
        if self.gpus_per_job < 0:
            problems.append(f"--gpus-per-job {self.gpus_per_job}: must be 0 or more")
        if self.array_size is not None and self.array_size < 1:
            problems.append(f"--array-size {self.array_size}: must be at least 1")
        minutes = _minutes(self.time)
        if minutes is None:
            problems.append(f"--time {self.time}: expected minutes, H:MM:SS, D-HH or D-HH:MM")
        elif minutes < LEAST_MINUTES:
            problems.append(f"--time {self.time}: must be at least {LEAST_MINUTES} minutes")
        try:
            more = shlex.split(self.slurm_extra)
        except ValueError as error:
            problems.append(f"--slurm-extra {self.slurm_extra!r}: {error}")
        for word in more:
            name = word.removeprefix("--").partition("=")[0]
            if word.startswith("-") and not word.startswith("--"):
                problems.append(
                    f"--slurm-extra {self.slurm_extra!r}: {word!r} is no --option of sbatch; "
                    "write short ones out, -C a100 as --constraint=a100"
                )
            elif word.startswith("--") and name in RESERVED:
                problems.append(f"--slurm-extra --{name}: {RESERVED[name]}")
        if problems:
            raise UsageError(problems)
        given = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "gpus-per-node": self.gpus_per_job or None,
            "time": minutes,
            "signal": f"B:USR2@{WARN_S}",
        }
        fixed = ["--job-name=dllmexp", "--nodes=1", "--ntasks=1", "--requeue", "--open-mode=append"]
        return [*fixed, *(f"--{k}={v}" for k, v in given.items() if v is not None), *more]


def _minutes(text: str) -> int | None:
    """M, M:S, H:M:S, D-H, D-H:M or D-H:M:S -> minutes, rounded up; None for 0 or another form."""
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        return None
    unit = 3600 if dash or len(parts) == 3 else 60
    seconds = sum(int(part) * unit // 60**i for i, part in enumerate(parts))
    return -(-(seconds + int(days or 0) * 86400) // 60) or None


# ---------------------------------------------------------------- on the login node


def shares(chosen: Sequence[Experiment], n: int) -> list[list[Experiment]]:
    """The experiments divided among n tasks, with whole models and equal cost as far as possible.

    The longest model comes first. n: at most the number of experiments.
    """
    models: dict[str | None, list[Experiment]] = {}
    for one in chosen:
        models.setdefault(one.model, []).append(one)
    parts = list(models.values())
    while len(parts) < n:  # more tasks than models: divide the longest part
        parts.sort(key=lambda part: (len(part) > 1, _cost(part)))
        parts += _packed([[one] for one in parts.pop()], 2)
    return _packed(parts, n)


def _packed(parts: Sequence[list[Experiment]], n: int) -> list[list[Experiment]]:
    """n shares: each part, the longest first, goes to the share with the least cost so far."""
    found: list[list[Experiment]] = [[] for _ in range(n)]
    for part in sorted(parts, key=_cost, reverse=True):
        min(found, key=_cost).extend(part)
    return found


def _cost(part: Sequence[Experiment]) -> int:
    return sum(one.cost for one in part)


def submit(
    chosen: Sequence[Experiment], out: Path, n_workers: int | None, request: JobRequest
) -> str:
    """Submit what is not done and with no other suite; a message about it.

    Raises BusyError, EnvironmentProblem, UsageError.
    """
    options = request.options()
    check_cluster()
    left = [e for e in chosen if Watcher(e).status().state != "done"]
    if not left:
        return f"{numbered(len(chosen), 'experiment')}: all done"
    lease = Lease(out, left, workers=0)
    todo = lease.mine
    n = min(request.array_size or len({e.model for e in todo}), len(todo))
    run, folder = uuid.uuid4().hex[:12], out.resolve() / "logs" / "slurm"
    plan = {
        "run": run,
        "output_dir": str(out),
        "workers": n_workers,
        "gpus": request.gpus_per_job,
        "plugins": plugins.loaded(),
        "shares": [[list(e.argv) for e in share] for share in shares(todo, n)],
    }
    path = folder / f"plan-{run}.json"
    command = ["exec", sys.executable, str(COMMAND), "share", "--plan", str(path)]
    options += [f"--array=0-{n - 1}", f"--output={folder}/%A_%a.log"]
    try:
        atomic_write_json(path, plan)
        job = _sbatch([*options, "--wrap", shlex.join(command)])
    finally:
        lease.release()  # progress shows its experiments while the job waits in the queue
    more = f" ({len(lease.elsewhere)} more are with another suite)" if lease.elsewhere else ""
    return "\n".join(
        [
            f"job {job}: {numbered(len(todo), 'experiment')}{more}, "
            f"{numbered(n, 'task')} at most at a time",
            f"progress: {progress_command(out)}; squeue --job {job}",
            f"logs: {folder}/{job}_*.log, {out / 'logs'}/<experiment>.log",
            f"cancel: scancel {job}; the same command resumes, and so does scontrol requeue {job}",
        ]
    )


def check_cluster() -> None:
    """Raises EnvironmentProblem if jobs cannot be submitted from here."""
    missing = [name for name in ("sbatch", "scontrol") if shutil.which(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"{' and '.join(missing)} not found: --engine slurm submits from a login node of a "
            "SLURM cluster; --engine local runs here"
        )


def _sbatch(arguments: Sequence[str]) -> str:
    """Submit; the id of the job. Raises EnvironmentProblem with the message of sbatch.

    A cluster's own text may stand before the line with the id.
    """
    run = subprocess.run(["sbatch", *arguments], capture_output=True, text=True)
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if line.strip()] or ["failed silently"]
        raise EnvironmentProblem(f"sbatch: {lines[-1].removeprefix('sbatch: error: ')}")
    found = re.findall(r"^Submitted batch job (\d+)", run.stdout, re.MULTILINE)
    if not found:
        said = " ".join(run.stdout.split())[:200]
        raise EnvironmentProblem(
            f"sbatch names no job ({said!r}); squeue --me shows whether one was submitted"
        )
    return found[-1]


# ---------------------------------------------------------------- on a node


def share(path: Path) -> int:
    """The suite of one task of the array; its exit code. Raises BadDataError for a broken plan."""
    signal.signal(signal.SIGUSR2, _warned)
    job, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    try:
        plan = json.loads(path.read_bytes())
        first = int(task or 0)
        own, *others = plan["shares"][first:] + plan["shares"][:first]
        # from their ends: the tasks whose shares they are begin at the front
        sets = [*own, *(argv for share in others for argv in reversed(share))]
        plugins.expect(plan["plugins"])
        chosen = experiments(sets)
        out, workers, run = Path(plan["output_dir"]), plan["workers"], plan["run"]
        if not plan["gpus"]:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise BadDataError(f"{path} is no plan of --engine slurm ({error})") from None
    name = f"{job}_{task}" if job else os.environ.get("SLURM_JOB_ID", "no job")
    begins_with = {e.name for e in chosen[: len(own)]}
    agree(path.with_suffix(".commits"), [e.job for e in chosen])
    try:
        return run_suite(chosen, out, workers, run, begins_with, f"[{name}] ")
    except Signalled as error:
        if error.args[0] == signal.SIGUSR2:  # the time limit is near
            subprocess.run(["scontrol", "requeue", name])
        raise


def _warned(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Signalled(number)
