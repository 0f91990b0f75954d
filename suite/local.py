"""The engine of one machine: a worker for each device, one worker for scoring, and their tasks.

The experiments of one model go to one worker, which keeps the model loaded. A worker whose model
has nothing left takes the model with the most work left for each of its workers. So a worker
loads each model once, and no device idles.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from suite.lease import Lease
from suite.matrix import Experiment
from suite.state import Status, Watcher, read_failure, write_failure
from utils import (
    EXIT_BUSY,
    EXIT_COMPLETE,
    EXIT_DATA,
    EXIT_INCOMPLETE,
    EXIT_OUTPUT,
    EXIT_USAGE,
    EnvironmentProblem,
    available_cores,
)

RETRIES = 2
FINAL = (EXIT_USAGE, EXIT_DATA, EXIT_OUTPUT)  # another attempt would end in the same way
# after these exit codes a worker is in good order and goes on
CLEAN = (EXIT_COMPLETE, EXIT_INCOMPLETE, EXIT_BUSY, *FINAL)
BUSY_WAITS_S = (3.0, 15.0, 60.0)  # an orphan of a killed suite needs a moment to end
STOP_S = 20.0
DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of NVIDIA, ROCm and WSL2
COMMAND = Path(__file__).resolve().parent.parent / "scripts" / "sweep.py"


@dataclass
class QueuedExperiment:
    """An experiment and its way through the suite.

    stage:    generate | score | ended.
    own:      part of the share of this suite; the share of another suite comes later.
    attempts: attempts that failed. busy: attempts that found another process at work.
    outcome:  done | failed | elsewhere (with another process) | skipped (over, by a suite that
              shares the run) | stopped.
    """

    experiment: Experiment
    stage: str = "generate"
    own: bool = True
    attempts: int = 0
    busy: int = 0
    not_before: float = 0.0
    outcome: str = "stopped"
    error: str = ""


@dataclass
class Worker:
    """A process for one device ("cuda 0", "cpu"), or for scoring (device None).

    It starts with its first task.
    """

    device: str | None
    environ: dict[str, str]
    task: QueuedExperiment | None = None
    model: str | None = None
    process: subprocess.Popen | None = None
    loads: int = 0
    _rest: bytes = field(default=b"", repr=False)

    def give(self, task: QueuedExperiment) -> None:
        """Hand over a task. A process that has died in the meantime is replaced."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, str(COMMAND), "worker", "--parent", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | self.environ,
                start_new_session=True,
            )
            self._rest = b""
        self.task, experiment = task, task.experiment
        if self.device:
            self.model = experiment.model
        where = self.device or "cpu"
        device = [] if experiment.model is None else ["--device", where.partition(" ")[0]]
        order = {
            "argv": [*experiment.argv, *device],
            "log": str(experiment.log),
            "score": task.stage == "score",
            "title": f"on {where}, attempt {task.attempts + 1}: {experiment.command}",
        }
        try:
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has just died: read() will report it

    def read(self) -> int | None:
        """The exit code of the task, None if there is no answer yet; 128 + n after signal n."""
        data = os.read(self.process.stdout.fileno(), 65536)
        self._rest += data
        if not data:
            code = self.process.wait()
            self._close()
            return 128 - code if code < 0 else code or 1
        if not self._rest.endswith(b"\n"):
            return None
        answer = json.loads(self._rest)
        self._rest, self.loads = b"", answer["loads"]
        if answer["code"] not in CLEAN:
            self.stop(time.monotonic() + STOP_S)  # frees what it holds, above all memory
        return answer["code"]

    def stop(self, deadline: float) -> None:
        """SIGTERM, and SIGKILL after the deadline. Finished samples are kept."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._close()

    def _close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None


def visible_gpus() -> list[str]:
    """A value of CUDA_VISIBLE_DEVICES for each GPU that this process may use.

    Where nvidia-smi finds none but a driver is there (ROCm, slim containers), torch is asked in a
    process of its own. Raises EnvironmentProblem where torch finds none either.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return [] if names[0] in ("", "-1") else names
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if run.returncode == 0 and run.stdout.split():
            return run.stdout.split()
    except (OSError, subprocess.SubprocessError):
        pass
    drivers = [driver for driver in DRIVERS if os.path.exists(driver)]
    if not drivers:
        return []
    count = "import torch; print(torch.cuda.device_count())"
    run = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True)
    if not (n := int(run.stdout or 0)):
        raise EnvironmentProblem(
            f"{drivers[0]} is there, but neither nvidia-smi nor torch finds a GPU; "
            "CUDA_VISIBLE_DEVICES= in front of the command runs on the CPU"
        )
    return [str(i) for i in range(n)]


def make_workers(n: int | None) -> list[Worker]:
    """One worker for each visible GPU, or n spread over them; without a GPU n or one on the CPU."""
    gpus = visible_gpus()
    n = n or len(gpus) or 1
    threads = max(1, available_cores() // (n + 1))
    common = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads),
        "TQDM_MININTERVAL": os.environ.get("TQDM_MININTERVAL", "10"),
    }
    if not gpus:
        return [Worker("cpu", common | {"CUDA_VISIBLE_DEVICES": ""}) for _ in range(n)]
    return [
        Worker(f"cuda {gpu}", common | {"CUDA_VISIBLE_DEVICES": gpu})
        for gpu in (gpus[i % len(gpus)] for i in range(n))
    ]


class LocalEngine:
    """Runs experiments until each is done, has failed, or is with another process.

    Suites that share a run (lease.run) have the same experiments. Each begins with its own share
    and goes on with the others': what is over is skipped, what is locked is tried again later.
    last: whether this suite has ended the last experiment of the run.
    """

    def __init__(
        self,
        lease: Lease,
        todo: Sequence[tuple[Experiment, Status]],
        workers: Sequence[Worker],
        say: Callable[[str], None],
        tick: Callable[[], None] = lambda: None,
        own: Collection[str] | None = None,
    ):
        """say: takes messages. tick: called every second. own: names of the share, None: all."""
        self.lease, self.say, self.tick, self.last = lease, say, tick, False
        self.tasks = [
            QueuedExperiment(e, _stage(e, s), own is None or e.name in own) for e, s in todo
        ]
        scorer = Worker(None, workers[0].environ | {"CUDA_VISIBLE_DEVICES": ""})
        self.workers = [*workers, scorer]

    def run(self) -> list[QueuedExperiment]:
        """All tasks with their outcomes. The workers end first, however this ends."""
        try:
            while any(task.stage != "ended" for task in self.tasks):
                for worker in self.workers:
                    task = None if worker.task else self._next(worker)
                    if task:
                        self._begin(worker, task)
                self._wait()
                self.lease.touch()
                self.tick()
        finally:
            self._stop()
        return self.tasks

    # -- which task is next

    def _next(self, worker: Worker) -> QueuedExperiment | None:
        stage, now = "generate" if worker.device else "score", time.monotonic()
        held = [w.task for w in self.workers if w.task]
        free = [
            task
            for task in self.tasks
            if task.stage == stage and task.not_before <= now and all(task is not h for h in held)
        ]
        while free:
            task = self._preferred(free, worker)
            if not self._is_over(task.experiment):
                return task
            task.stage, task.outcome = "ended", "skipped"
            free.remove(task)
        return None

    def _preferred(self, free: list[QueuedExperiment], worker: Worker) -> QueuedExperiment:
        """The next task of the loaded model, else of the model with most work per worker.

        The own share goes first, and what another process was at goes last.
        """
        if not worker.device:
            return free[0]
        rank = min((not task.own, task.busy > 0) for task in free)
        free = [task for task in free if (not task.own, task.busy > 0) == rank]
        model, work = worker.model, Counter()
        for task in free:
            work[task.experiment.model] += task.experiment.cost
        if model not in work:
            busy = [w.task.experiment.model for w in self.workers if w.device and w.task]
            model = max(work, key=lambda name: work[name] / (1 + busy.count(name)))
        return next(task for task in free if task.experiment.model == model)

    def _is_over(self, experiment: Experiment) -> bool:
        """Whether a suite that shares the run has finished the experiment, or given up on it."""
        if self.lease.run is None:
            return False
        failure = read_failure(experiment)
        if failure and failure["run"] == self.lease.run:
            return True
        return Watcher(experiment).status().state == "done"

    # -- what happens to it

    def _begin(self, worker: Worker, task: QueuedExperiment) -> None:
        worker.give(task)
        stage = "generating" if task.stage == "generate" else "scoring"
        self._report(task, f"{stage} on {worker.device}" if worker.device else stage)

    def _report(self, task: QueuedExperiment, text: str) -> None:
        ended = sum(t.stage == "ended" for t in self.tasks)
        count = f"[{ended}/{len(self.tasks)}]"
        self.say(f"{time.strftime('%H:%M:%S')} {count} {task.experiment.name}: {text}")

    def _wait(self) -> None:
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                if worker.task:
                    selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            if not selector.get_map():
                time.sleep(0.2)  # every task waits for another process
                return
            for key, _ in selector.select(1.0):
                worker = key.data
                code = worker.read()
                if code is not None:
                    task, worker.task = worker.task, None
                    self._answered(task, code)

    def _answered(self, task: QueuedExperiment, code: int) -> None:
        if code == EXIT_COMPLETE and task.stage == "generate":
            task.stage = "score"
        elif code == EXIT_COMPLETE:
            self._end(task, "done")
        elif code == EXIT_BUSY:
            self._busy(task)
        else:
            task.attempts += 1
            again, task.error = task.error, _reason(task.experiment.log, code)
            if code in FINAL or task.attempts > RETRIES:
                self._end(task, "failed", task.error, again=task.error == again)
            else:
                why = "the same again" if task.error == again else task.error
                self._report(task, f"{why}; tried again")
                task.stage = "generate"

    def _busy(self, task: QueuedExperiment) -> None:
        """Another process has the experiment: try again later, and leave it once all else is over.

        A process that dies within these waits leaves nothing behind; a task of a job array that
        dies later is requeued, and resumes its experiment itself.
        """
        task.busy += 1
        task.not_before = time.monotonic() + BUSY_WAITS_S[min(task.busy, len(BUSY_WAITS_S)) - 1]
        left = [t for t in self.tasks if t.stage != "ended"]
        if all(t.busy > len(BUSY_WAITS_S) for t in left):
            for t in left:
                self._end(t, "elsewhere", "another process has it")

    def _end(
        self, task: QueuedExperiment, outcome: str, error: str = "", *, again: bool = False
    ) -> None:
        """again: the error has been reported."""
        task.stage, task.outcome, task.error = "ended", outcome, error
        if outcome == "failed":
            write_failure(task.experiment, error, self.lease.run)
        if outcome != "elsewhere":
            left = [t for t in self.tasks if t.stage != "ended"]
            self.last = all(self._is_over(t.experiment) for t in left)
        self._report(task, f"{outcome}: {error}" if error and not again else outcome)

    def _stop(self) -> None:
        """End the workers; they end in order, and together."""
        for worker in self.workers:
            if worker.process:
                worker.process.terminate()
        deadline = time.monotonic() + STOP_S
        for worker in self.workers:
            worker.stop(deadline)


def _stage(experiment: Experiment, status: Status) -> str:
    """ "score" if every answer is there: no device is needed."""
    complete = status.state == "partial" and status.n == status.of
    return "score" if experiment.model is None or complete else "generate"


def _reason(log: Path, code: int) -> str:
    """The last error that the log has of the last attempt, else what the exit code means."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 20000))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in reversed(lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
        if line.startswith("== ") and not line.startswith("== exit"):
            break
    if code > 128:
        return f"its worker was ended by signal {code - 128}"
    return "some samples failed" if code == EXIT_INCOMPLETE else f"it ended with exit code {code}"
