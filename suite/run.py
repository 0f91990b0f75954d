"""A run of the suite on this machine, from what is asked for to the report: of its own, or one of several that share it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from experiment.signals import Signalled
from suite.lease import Lease
from suite.local import LocalEngine, make_workers
from suite.matrix import Experiment
from suite.state import Watcher, statuses
from suite.table import outcomes, progress_table, summary_line
from utils import EXIT_BUSY, EXIT_COMPLETE, EXIT_INCOMPLETE

REPORT = Path(__file__).resolve().parent.parent / "scripts" / "report.py"


class SuiteLog:
    """What the suite says, on the terminal and in results/logs/sweep.log. who: stands before each line, "" for nobody."""

    def __init__(self, output_dir: Path, who: str = ""):
        self.path, self.who = output_dir / "logs" / "sweep.log", who
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, text: str) -> None:
        text = f"{self.who}{text}"
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except OSError:  # the terminal is gone, the work is not
            sys.stdout = open(os.devnull, "w")


class Bar:
    """On a terminal, a bar over the samples of all experiments, with the time left; elsewhere nothing."""

    def __init__(self, chosen: Sequence[Experiment]):
        self._watchers = [Watcher(e) for e in chosen] if sys.stderr.isatty() else []
        known = [standing.of for _, standing in statuses(self._watchers)]
        total = None if None in known else sum(known)
        self._bar = tqdm(
            total=total,
            initial=self._n(),
            unit=" samples",
            dynamic_ncols=True,
            disable=not self._watchers,
        )
        self._at = time.monotonic()

    def _n(self) -> int:
        return sum(standing.n for _, standing in statuses(self._watchers))

    def __call__(self) -> None:
        if self._watchers and time.monotonic() >= self._at + 1:
            self._bar.update(self._n() - self._bar.n)
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
    who: str = "",
) -> int:
    """The exit code of the suite. run: the name of a run that several suites share; see Lease. Raises BusyError."""
    workers = make_workers(n_workers)
    claim = Lease(out, chosen, len(workers), run)
    counts = {"elsewhere": len(claim.elsewhere)}
    say = SuiteLog(out, who)
    try:
        rows = statuses([Watcher(e) for e in chosen if e not in claim.elsewhere])
        say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {summary_line(rows, len(workers))}")
        if claim.elsewhere:
            say(f"{len(claim.elsewhere)} more are with another suite")
        say(
            f"workers: {', '.join(w.device for w in workers)}; logs: {out / 'logs'}; ./scripts/progress.sh shows where it stands"
        )
        todo = [
            (e, standing) for e, standing in rows if e in claim.mine and standing.state != "done"
        ]
        with closing(Bar([e for e, _ in rows])) as bar:
            tasks = LocalEngine(claim, todo, workers, say, bar).run()
        counts["done"] = sum(e in claim.mine for e, _ in rows) - len(tasks)
    except (KeyboardInterrupt, Signalled):
        say(
            f"{time.strftime('%Y-%m-%d %H:%M:%S')} stopped"
        )  # a tmux session takes what is on its terminal with it
        raise
    finally:
        last = claim.release()
    ended = Counter(counts) + Counter(task.outcome for task in tasks)
    if last and (
        run is None or tasks
    ):  # of several that share a run, the last one that had something to do
        say(progress_table(statuses([Watcher(e) for e in chosen]), len(workers)))
    say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} ended: {outcomes(ended)}")
    if last and (run is None or tasks):
        report(out, say)
    return (
        EXIT_INCOMPLETE if ended["failed"] else EXIT_BUSY if ended["elsewhere"] else EXIT_COMPLETE
    )


def report(out: Path, say: SuiteLog) -> None:
    """Tables and plots. That they fail is said, and nothing more."""
    made = subprocess.run(
        [sys.executable, str(REPORT), str(out), "--out", str(out / "report")],
        stdin=subprocess.DEVNULL,
    )
    say(
        f"report: {out / 'report'}"
        if made.returncode == 0
        else f"scripts/report.py ended with exit code {made.returncode}"
    )
