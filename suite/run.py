"""One suite on this machine, from its experiments to the report."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from experiment.identity import prepare
from experiment.signals import Signalled
from suite.lease import Lease
from suite.local import LocalEngine, make_workers
from suite.matrix import Experiment
from suite.state import Watcher, statuses
from suite.table import counts, progress_table, state_counts, summary_line
from utils import EXIT_BUSY, EXIT_COMPLETE, EXIT_INCOMPLETE, OutputError, way_out

REPORT = Path(__file__).resolve().parent.parent / "scripts" / "report.py"


class SuiteLog:
    """Messages of a suite, on the terminal and in results/logs/sweep.log.

    prefix: stands before each message.
    """

    def __init__(self, output_dir: Path, prefix: str = ""):
        self.path, self.prefix = output_dir / "logs" / "sweep.log", prefix
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, text: str) -> None:
        text = f"{self.prefix}{text}"
        try:
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text + "\n")
        except OSError as error:
            why = f"cannot write {self.path}: {error.strerror}; {way_out(error)}"
            raise OutputError(why) from error
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except OSError:  # the terminal is gone, the suite goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def stamped(self, text: str) -> None:
        self(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")


class Bar:
    """On a terminal, a bar over the samples of all experiments, with the time left."""

    def __init__(self, chosen: Sequence[Experiment]):
        self._watchers = [Watcher(e) for e in chosen] if sys.stderr.isatty() else []
        found = [status for _, status in statuses(self._watchers)]
        known = [status.of for status in found]
        self._bar = tqdm(
            total=None if None in known else sum(known),
            initial=sum(status.n for status in found),
            unit=" samples",
            dynamic_ncols=True,
            disable=not self._watchers,
        )
        self._at = time.monotonic()

    def __call__(self) -> None:
        if self._watchers and time.monotonic() >= self._at + 1:
            n = sum(status.n for _, status in statuses(self._watchers))
            self._bar.update(n - self._bar.n)
            self._at = time.monotonic()

    def close(self) -> None:
        self._at = 0.0
        self()
        self._bar.close()


def run_suite(
    chosen: Sequence[Experiment],
    out: Path,
    n_workers: int | None,
    run: str | None = None,
    own: Collection[str] | None = None,
    prefix: str = "",
) -> int:
    """Run what is not done; the exit code. Raises BusyError.

    run: name of a run that several suites share, see Lease. own: names of the experiments with
    which this suite begins; None: all.
    """
    workers = make_workers(n_workers)
    prepare(experiment.job for experiment in chosen)
    chosen = [experiment.identified() for experiment in chosen]
    lease = Lease(out, chosen, len(workers), run)
    say = SuiteLog(out, prefix)
    try:
        rows = statuses([Watcher(e) for e in lease.mine])
        say.stamped(summary_line(rows, len(workers)))
        if lease.elsewhere:
            say(f"{len(lease.elsewhere)} more are with another suite")
        devices = ", ".join(worker.device for worker in workers)
        say(f"workers: {devices}; logs: {out / 'logs'}; progress: {progress_command(out)}")
        todo = [(e, status) for e, status in rows if status.state != "done"]
        with closing(Bar(lease.mine)) as bar:
            engine = LocalEngine(lease, todo, workers, say, bar, own)
            tasks = engine.run()
    except (KeyboardInterrupt, Signalled):
        # in the log, too: tmux closes its terminal with the suite
        rows = statuses([Watcher(e) for e in lease.mine])
        if run is None:
            say(f"\n{progress_table(rows, len(workers))}")
        say.stamped(f"stopped: {state_counts(rows)}; the same command resumes")
        if any(status.state == "done" for _, status in rows):
            say(f"a report of what is done: {report_command(out)}")
        raise
    finally:
        lease.release()
    ended = Counter(task.outcome for task in tasks)
    ended["elsewhere"] += len(lease.elsewhere)
    ended["done"] += len(rows) - len(tasks)
    last = run is None or engine.last
    if last:
        say(f"\n{progress_table(statuses([Watcher(e) for e in chosen]), len(workers))}")
    say.stamped(f"ended: {counts(ended)}")
    if last:
        report(out, say)
    if ended["failed"]:
        return EXIT_INCOMPLETE
    return EXIT_BUSY if ended["elsewhere"] and run is None else EXIT_COMPLETE


def progress_command(out: Path) -> str:
    where = "" if str(out) == "results" else f" --output_dir {shlex.quote(str(out))}"
    return f"./scripts/progress.sh{where}"


def report_command(out: Path) -> str:
    folder = shlex.quote(str(out / "report"))
    return f"python scripts/report.py {shlex.quote(str(out))} --suite --out {folder}"


def report(out: Path, say: SuiteLog) -> None:
    """Tables and figures of the suite's results. A failure is only a message."""
    command = [sys.executable, str(REPORT), str(out), "--suite", "--out", str(out / "report")]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    run = subprocess.run(command, **quiet, text=True, errors="replace")
    if run.returncode:
        why = (run.stderr.splitlines() or [f"exit code {run.returncode}"])[-1]
        say(f"no report: {why.removeprefix('error: ')}")
    else:
        say(f"report: {out / 'report' / 'report.html'}")
