"""What a person sees of a suite: one row for each experiment, and how long all of it will take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from suite.matrix import Experiment
from suite.state import Status

Rows = Sequence[tuple[Experiment, Status]]


class Estimator:
    """Seconds that an experiment still takes: from its own samples, else from its nearest relatives'.

    What is compared is seconds per forward pass that the schedule may need, so that 1 and 3 tokens per step, and
    canvases of 128 and 512, tell of each other. Relatives: model and task, model, task, all.
    """

    def __init__(self, rows: Rows):
        self._sums: dict[tuple, list[float]] = {}
        for experiment, standing in rows:
            if standing.sums.n and standing.sums.seconds:
                for key in self._keys(experiment):
                    sums = self._sums.setdefault(key, [0.0, 0.0])
                    sums[0] += standing.sums.seconds
                    sums[1] += standing.sums.n * experiment.job.schedule.forward_passes

    @staticmethod
    def _keys(experiment: Experiment) -> list[tuple]:
        model, task = experiment.model, experiment.job.config.task
        return [(model, task), (model, None), (None, task), (None, None)]

    def left_s(self, experiment: Experiment, standing: Status) -> float | None:
        """None where nothing is known yet; 0 where nothing is left to do."""
        if standing.state == "done" or experiment.job.predictions:
            return 0.0
        if standing.of is None:
            return None
        left = max(0, standing.of - standing.n)
        if standing.sums.n and standing.sums.seconds:
            return left * standing.sums.seconds / standing.sums.n
        sums = next((self._sums[k] for k in self._keys(experiment) if k in self._sums), None)
        return left * experiment.job.schedule.forward_passes * sums[0] / sums[1] if sums else None


def duration(seconds: float | None) -> str:
    """`3 d 4 h`, `2 h 5 m`, `40 s`; `-` for what is not known."""
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


def _score(standing: Status) -> str:
    if standing.score is None:
        return "-"
    value, low, high, n = standing.score
    text = f"{value:.3f}" + (
        f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
    )
    return text if standing.state == "done" else f"{text} of {n}"


def progress_table(rows: Rows, workers: int) -> str:
    """The table and a summary line. workers: how many share what is left."""
    from prettytable import PrettyTable

    table = PrettyTable(["experiment", "state", "samples", "tok/s", "TPF", "ETA", "score"])
    table.align = "r"
    table.align["experiment"] = table.align["state"] = "l"
    estimator = Estimator(rows)
    for experiment, standing in rows:
        sums = standing.sums
        left = estimator.left_s(experiment, standing)
        table.add_row(
            [
                experiment.name,
                standing.state,
                f"{standing.n}/{'?' if standing.of is None else standing.of}",
                f"{sums.tokens / sums.seconds:.1f}" if sums.seconds else "-",
                f"{sums.tokens / sums.forwards:.2f}" if sums.forwards else "-",
                "" if standing.state == "done" else duration(left),
                _score(standing),
            ]
        )
    notes = [f"{e.name}: {s.note}" for e, s in rows if s.state == "failed" and s.note]
    return "\n".join([table.get_string(), *notes, summary_line(rows, workers)])


def summary_line(rows: Rows, workers: int) -> str:
    """`48 experiments: 3 done, 45 waiting; 12000 of 33600 samples; about 3 h 20 m left with 2 workers`."""
    counts = Counter(standing.state for _, standing in rows)
    order = ("done", "running", "partial", "waiting", "failed")
    told = ", ".join(f"{counts[state]} {state}" for state in order if counts[state])
    n, of = sum(s.n for _, s in rows), sum(s.of or 0 for _, s in rows)
    text = f"{len(rows)} experiments: {told}; {n} of {of} samples"
    if counts["done"] == len(rows):
        return text
    estimator = Estimator(rows)
    left = [estimator.left_s(e, s) for e, s in rows]
    if None in left:
        return f"{text}; how long it takes is not known yet"
    return f"{text}; about {duration(sum(left) / workers)} left with {workers} worker{'s' * (workers != 1)}"


def plan(rows: Rows) -> str:
    """Each experiment's name, state and command."""
    lines = []
    for experiment, s in rows:
        state = (
            f"partial {s.n}/{'?' if s.of is None else s.of}" if s.state == "partial" else s.state
        )
        note = f"  ({s.note})" if s.note else ""
        lines += [f"{state:20} {experiment.name}{note}", f"{'':20} {experiment.command}"]
    return "\n".join([*lines, summary_line(rows, 1).partition("; about")[0]])


def outcomes(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "nothing to do"
