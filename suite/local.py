"""The engine of one machine: a worker for each device, one for scoring, and who does what next.

Experiments of one model go to the same worker, which keeps the model loaded; a worker whose model has nothing left
takes the model with most left for each of its workers. So a worker loads each model once, and no device idles. Where
several suites share a run, an idle worker takes one experiment more of what nobody has, by the same rule.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from suite.lease import Lease
from suite.matrix import Experiment
from suite.state import Status, Watcher, write_note
from utils import EXIT_BUSY, EXIT_COMPLETE, EXIT_DATA, EXIT_INCOMPLETE, EXIT_OUTPUT, EXIT_USAGE

RETRIES = 2
FINAL = (EXIT_USAGE, EXIT_DATA, EXIT_OUTPUT)  # trying again changes nothing
CLEAN = (
    EXIT_COMPLETE,
    EXIT_INCOMPLETE,
    EXIT_BUSY,
    *FINAL,
)  # after these a worker is as good as before
BUSY_WAITS_S = (3.0, 15.0, 60.0)  # an orphan of a killed suite needs a moment to end
STOP_S = 20.0
COMMAND = Path(__file__).resolve().parent.parent / "scripts" / "sweep.py"


@dataclass
class Task:
    """An experiment on its way. stage: generate | score | ended. outcome: done | failed | elsewhere | stopped."""

    experiment: Experiment
    stage: str = "generate"
    attempts: int = 0
    busy: int = 0
    not_before: float = 0.0
    outcome: str = "stopped"
    error: str = ""


@dataclass
class Worker:
    """A process for one device ("cuda 0", "cpu") or, with device None, for scoring. Started when first needed."""

    device: str | None
    environ: dict[str, str]
    task: Task | None = None
    model: tuple[str, str] | None = None
    process: subprocess.Popen | None = None
    loads: int = 0
    _rest: bytes = field(default=b"", repr=False)

    def give(self, task: Task) -> None:
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
        self.task = task
        if self.device:
            self.model = task.experiment.model
        device = (self.device or "cpu").partition(" ")[0]
        argv = [
            *task.experiment.argv,
            *([] if task.experiment.job.predictions else ["--device", device]),
        ]
        what = f"on {self.device or 'cpu'}, attempt {task.attempts + 1}: {task.experiment.command}"
        order = {
            "argv": argv,
            "log": str(task.experiment.log),
            "score": task.stage == "score",
            "what": what,
        }
        try:
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has just died, which read() will see

    def read(self) -> int | None:
        """The exit code of the task, None where there is no answer yet. A dead process answers as a shell would say it."""
        data = os.read(self.process.stdout.fileno(), 65536)
        self._rest += data
        if not data:
            code = self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None
            return 128 - code if code < 0 else code or 1
        if not self._rest.endswith(b"\n"):
            return None
        answer = json.loads(self._rest)
        self._rest, self.loads = b"", answer["loads"]
        if answer["code"] not in CLEAN:
            self.stop(time.monotonic() + STOP_S)  # what it holds, memory above all, goes with it
        return answer["code"]

    def stop(self, deadline: float) -> None:
        """SIGTERM, and SIGKILL after the deadline. What it was doing is kept."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to, one for each GPU that this process may use. No torch is loaded for it."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        names = [name.strip() for name in told.split(",")]
        return [] if names[0] in ("", "-1") else names
    try:
        run = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return run.stdout.split() if run.returncode == 0 else []


def make_workers(n: int | None) -> list[Worker]:
    """One worker for each visible GPU, or n spread over them; without a GPU n on the CPU, else one."""
    gpus = visible_gpus()
    n = n or len(gpus) or 1
    threads = os.environ.get("OMP_NUM_THREADS") or str(
        max(1, len(os.sched_getaffinity(0)) // (n + 1))
    )
    common = {
        "OMP_NUM_THREADS": threads,
        "TQDM_MININTERVAL": os.environ.get("TQDM_MININTERVAL", "10"),
    }
    if not gpus:
        return [Worker("cpu", common | {"CUDA_VISIBLE_DEVICES": ""}) for _ in range(n)]
    return [
        Worker(f"cuda {g}", common | {"CUDA_VISIBLE_DEVICES": g})
        for g in (gpus[i % len(gpus)] for i in range(n))
    ]


class LocalEngine:
    """Runs what the claim has, and will take, until each is done, has failed, or is found to be running elsewhere."""

    def __init__(
        self,
        claim: Lease,
        todo: Sequence[tuple[Experiment, Status]],
        workers: Sequence[Worker],
        say: Callable[[str], None],
        tick: Callable[[], None] = lambda: None,
    ):
        """say: is told what happens. tick: is called every second or so."""
        self.claim, self.say, self.tick = claim, say, tick
        self.tasks = [_task(e, standing) for e, standing in todo]
        scorer = Worker(None, workers[0].environ | {"CUDA_VISIBLE_DEVICES": ""})
        self.workers = [*workers, scorer]

    def run(self) -> list[Task]:
        """All tasks with their outcomes. Whatever ends this, the workers end first."""
        try:
            while True:
                for worker in self.workers:
                    task = None if worker.task else self._next(worker)
                    if task:
                        self._begin(worker, task)
                if any(task.stage != "ended" for task in self.tasks):
                    self._wait()
                elif not self.claim.wait_for_the_silent():
                    break
                self.claim.touch()
                self.tick()
        finally:
            self._stop()
        return self.tasks

    # -- who does what

    def _next(self, worker: Worker) -> Task | None:
        stage = "generate" if worker.device else "score"
        held = {id(w.task) for w in self.workers}
        now = time.monotonic()
        open_ = [
            t for t in self.tasks if t.stage == stage and id(t) not in held and t.not_before <= now
        ]
        if not worker.device:
            return open_[0] if open_ else None
        at_it = [w.task.experiment for w in self.workers if w.device and w.task]
        if open_:
            chosen = _preferred([t.experiment for t in open_], worker.model, at_it)
            return next(t for t in open_ if t.experiment is chosen)
        return self._one_more(worker, at_it)

    def _one_more(self, worker: Worker, at_it: list[Experiment]) -> Task | None:
        """What the claim can still take for an idle worker; one that only has to be scored is not for it."""
        while taken := self.claim.more(
            lambda free, elsewhere: _preferred(free, worker.model, at_it + elsewhere)
        ):
            self.tasks.append(_task(taken, Watcher(taken).standing()))
            if self.tasks[-1].stage == "generate":
                return self.tasks[-1]
        return None

    def _begin(self, worker: Worker, task: Task) -> None:
        phase = "generating" if task.stage == "generate" else "scoring"
        write_note(task.experiment, phase, task.attempts + 1, sweep=self.claim.told)
        worker.give(task)
        self._tell(task, f"{phase} on {worker.device}" if worker.device else phase)

    def _tell(self, task: Task, what: str) -> None:
        ended = sum(t.stage == "ended" for t in self.tasks)
        self.say(
            f"{time.strftime('%H:%M:%S')} [{ended}/{len(self.tasks)}] {task.experiment.name}: {what}"
        )

    def _wait(self) -> None:
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                if worker.task:
                    selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            if not selector.get_map():
                time.sleep(0.2)  # all that is left waits for another process
            for key, _ in selector.select(1.0) if selector.get_map() else ():
                worker = key.data
                code = worker.read()
                if code is not None:
                    task, worker.task = worker.task, None
                    self._answered(task, code)

    # -- what an answer means

    def _answered(self, task: Task, code: int) -> None:
        if code == EXIT_COMPLETE and task.stage == "generate":
            task.stage = "score"
        elif code == EXIT_COMPLETE:
            self._end(task, "done")
        elif code == EXIT_BUSY:
            self._busy(task)
        else:
            task.attempts += 1
            task.error = _reason(task.experiment.log, code)
            if code in FINAL or task.attempts > RETRIES:
                self._end(task, "failed", task.error)
            else:
                self._tell(task, f"{task.error}; tried again")
                task.stage = "generate"

    def _busy(self, task: Task) -> None:
        if task.busy == len(BUSY_WAITS_S):
            return self._end(task, "elsewhere", "another process has it")
        task.not_before = time.monotonic() + BUSY_WAITS_S[task.busy]
        task.busy += 1

    def _end(self, task: Task, outcome: str, error: str = "") -> None:
        task.stage, task.outcome, task.error = "ended", outcome, error
        write_note(
            task.experiment, outcome, task.attempts + (outcome == "done"), error, self.claim.told
        )
        self._tell(task, f"{outcome}: {error}" if error else outcome)

    def _stop(self) -> None:
        """End the workers: at once those that have nothing to do, in good order the others."""
        for worker in self.workers:
            if worker.process:
                worker.process.terminate()
        deadline = time.monotonic() + STOP_S
        for worker in self.workers:
            worker.stop(deadline)
        for task in self.tasks:
            if task.stage != "ended":
                write_note(task.experiment, "stopped", task.attempts)


def _task(experiment: Experiment, standing: Status) -> Task:
    """Where only scoring is left no device is needed."""
    generated = bool(experiment.job.predictions) or (
        standing.state == "partial" and standing.n == standing.of
    )
    return Task(experiment, "score" if generated else "generate")


def _preferred(
    free: Sequence[Experiment], model: tuple[str, str] | None, at_it: Sequence[Experiment]
) -> Experiment:
    """The first one of the model that is loaded, else of the model with most left for each worker that is at it."""
    models = [e.model for e in free]
    busy = [e.model for e in at_it]
    if model not in models:
        model = max(
            models, key=lambda m: models.count(m) / (1 + busy.count(m))
        )  # the first of equals: the matrix's order
    return free[models.index(model)]


def _reason(log: Path, code: int) -> str:
    """The last error that an experiment's log tells of the last attempt, else what the code says."""
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
