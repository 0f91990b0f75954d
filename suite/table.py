"""The tables of a suite: one row for each experiment, and the time that is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from suite.matrix import Planned
from suite.state import Status

Rows = Sequence[tuple[Planned, Status]]


class Estimator:
    """Seconds that an experiment still needs, from its own samples or from similar experiments.

    Experiments are compared by seconds per forward pass of the schedule, so 1 and 3 tokens per
    step, and canvases of 128 and 512, inform each other. Similar are, in this order, experiments
    of the same model and task, of the same model, of the same task, and all.
    """

    def __init__(self, rows: Rows):
        self._totals: dict[tuple, tuple[float, int]] = {}
        for experiment, status in rows:
            if status.sums.n and status.sums.seconds:
                for key in self._keys(experiment):
                    seconds, passes = self._totals.get(key, (0.0, 0))
                    passes += status.sums.n * experiment.forward_passes
                    self._totals[key] = seconds + status.sums.seconds, passes

    @staticmethod
    def _keys(experiment: Planned) -> list[tuple]:
        model, task = experiment.model, experiment.task
        return [(model, task), (model, None), (None, task), (None, None)]

    def left_s(self, experiment: Planned, status: Status) -> float | None:
        """None while nothing is known; 0 if nothing is left to generate."""
        if status.state == "done" or experiment.model is None:
            return 0.0
        if status.of is None:
            return None
        left = max(0, status.of - status.n)
        if status.sums.n and status.sums.seconds:
            return left * status.sums.seconds / status.sums.n
        for key in self._keys(experiment):
            if key in self._totals:
                seconds, passes = self._totals[key]
                return left * experiment.forward_passes * seconds / passes
        return None


def duration(seconds: float | None) -> str:
    """`3 d 4 h`, `2 h 5 m`, `40 s`; `-` if unknown."""
    if seconds is None:
        return "-"
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} m"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} m"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def _score(status: Status) -> str:
    if status.score is None:
        return "-"
    value, low, high, n = status.score
    interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{value:.3f}{interval}" + ("" if status.state == "done" else f" of {n}")


def _count(status: Status) -> str:
    return f"{status.n}/{'?' if status.of is None else status.of}"


def progress_table(rows: Rows, workers: int) -> str:
    """The table and a summary line. workers: processes that share what is left."""
    from prettytable import PrettyTable

    table = PrettyTable(["experiment", "state", "samples", "tok/s", "TPF", "ETA", "score"])
    table.align = "r"
    table.align["experiment"] = table.align["state"] = "l"
    estimator = Estimator(rows)
    for experiment, status in rows:
        sums = status.sums
        rate = f"{sums.tokens / sums.seconds:.1f}" if sums.seconds else "-"
        tpf = f"{sums.tokens / sums.forwards:.2f}" if sums.forwards else "-"
        left = "" if status.state == "done" else duration(estimator.left_s(experiment, status))
        cells = [experiment.name, status.state, _count(status), rate, tpf, left, _score(status)]
        table.add_row(cells)
    notes = [f"{e.name}: {s.note}" for e, s in rows if s.state == "failed" and s.note]
    return "\n".join([table.get_string(), *notes, summary_line(rows, workers)])


def summary_line(rows: Rows, workers: int) -> str:
    """`48 experiments: 3 done, 45 waiting; 12000 of 33600 samples; about 3 h 20 m left with ...`"""
    states = Counter(status.state for _, status in rows)
    order = ("done", "running", "partial", "waiting", "failed")
    n, of = sum(s.n for _, s in rows), sum(s.of or 0 for _, s in rows)
    text = f"{len(rows)} experiments: {counts({state: states[state] for state in order})}"
    text += f"; {n} of {of} samples"
    if states["done"] == len(rows):
        return text
    estimator = Estimator(rows)
    left = [estimator.left_s(e, s) for e, s in rows]
    if None in left:
        return f"{text}; the time left is not known yet"
    time_left = duration(sum(left) / workers)
    return f"{text}; about {time_left} left with {workers} worker{'s' * (workers != 1)}"


def plan(rows: Rows) -> str:
    """Name, state and command of each experiment."""
    lines = []
    for experiment, s in rows:
        state = f"partial {_count(s)}" if s.state == "partial" else s.state
        note = f"  ({s.note})" if s.note else ""
        lines += [f"{state:20} {experiment.name}{note}", f"{'':20} {experiment.command}"]
    return "\n".join([*lines, summary_line(rows, 1).partition("; about")[0]])


def counts(numbers: Mapping[str, int]) -> str:
    """{"done": 3, "failed": 0} -> `3 done`."""
    return ", ".join(f"{n} {name}" for name, n in numbers.items() if n) or "nothing to do"
