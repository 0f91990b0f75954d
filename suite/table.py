"""The tables of a suite: one row for each experiment, and the time that is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from textwrap import fill, wrap

from experiment.statistics import as_read
from suite.matrix import Planned
from suite.state import STATES, Status
from utils import numbered, terminal_columns

Rows = Sequence[tuple[Planned, Status]]
NARROWEST = 16  # width to which names wrap
# what a narrow table leaves out, the first one first
FOLDS = ("TPF", "interval", "border", "tok/s")


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
        """None while nothing is known; 0 if nothing is left to generate, or it has failed."""
        if status.state in ("done", "failed") or experiment.model is None:
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


def _score(status: Status, interval: bool) -> str:
    if status.score is None:
        return "-"
    *values, n = status.score
    text, low, high = as_read(*values)
    if not interval:
        return text + ("" if status.state == "done" else "*")
    bounds = "" if None in values else f" [{low}, {high}]"
    return text + bounds + ("" if status.state == "done" else f" of {n}")


def _count(status: Status) -> str:
    return f"{status.n}/{'?' if status.of is None else status.of}"


def progress_table(rows: Rows, workers: int, size: tuple[int, int] | None = None) -> str:
    """The table and a summary line. workers: processes that share what is left.

    size: columns and lines to fit into, 0 for any; None: those of the terminal, any lines. FOLDS
    fold away until the table fits; a low one has the rows in which something happens.
    """
    columns, lines = size or (terminal_columns(), 0)
    notes = [f"{e.name}: {s.note}" for e, s in rows if s.state == "failed" and s.note]
    seen = {status.shown for _, status in rows}
    waits = [f"{state}: {text}" for state, text in STATES.items() if text and state in seen]
    notes += ["; ".join(waits)] if waits else []
    estimator, summary = Estimator(rows), summary_line(rows, workers)
    for n in range(len(FOLDS) + 1):
        folded = FOLDS[:n]
        text = _table(rows, estimator, folded, columns)
        wraps = text.count("\n") > len(rows) + (0 if "border" in folded else 3)
        if not columns or len(text.partition("\n")[0]) <= columns and not wraps:
            break
    if "interval" in folded and any(s.score and s.state != "done" for _, s in rows):
        notes.insert(0, "* of the answers so far")
    foot = [fill(note, columns) for note in [*notes, summary]] if columns else [*notes, summary]
    room = lines - len("\n".join(foot).split("\n"))
    if lines and text.count("\n") + 1 > room:
        foot = [fill(summary, columns)] if columns else [summary]
        room = lines - len(foot[0].split("\n")) - 1
        for n in range(max(1, room), 0, -1):
            kept = _first(rows, n)
            text = _table(kept, estimator, folded, columns)
            if text.count("\n") < room:
                break
        hidden = Counter(s.shown for e, s in rows if all(e is not k for k, _ in kept))
        foot.insert(0, f"not shown: {counts({state: hidden[state] for state in STATES})}")
    return "\n".join([text, *foot])


def _first(rows: Rows, n: int) -> Rows:
    """The n rows that say most, in their order: those at work, then failed, waiting, done ones."""
    order = ["running", "scoring", "failed", "to score", "begun", "queued", "not begun", "done"]
    chosen = sorted(range(len(rows)), key=lambda i: order.index(rows[i][1].shown))[:n]
    return [rows[i] for i in sorted(chosen)]


def _table(rows: Rows, estimator: Estimator, folded: Sequence[str], columns: int) -> str:
    from prettytable import PrettyTable

    narrow = "border" in folded
    names = [experiment.name for experiment, _ in rows]
    title = "experiment"
    if narrow and len(rows) > 1:  # say once how all names end
        reverse = [name.split("_")[::-1] for name in names]
        same = 0
        while all(len(r) > same + 1 and r[same] == reverse[0][same] for r in reverse):
            same += 1
        if same:
            title = "experiment ..._" + "_".join(reverse[0][:same][::-1])
            names = ["_".join(r[same:][::-1]) for r in reverse]
    heads = [title, "state", "samples", "tok/s", "TPF", "ETA", "score %"]
    table = PrettyTable(heads)
    table.align = "r"
    table.align[title] = table.align["state"] = "l"
    for name, (experiment, status) in zip(names, rows, strict=True):
        sums, shown = status.sums, status.shown
        rate = f"{sums.tokens / sums.seconds:.1f}" if sums.seconds else "-"
        tpf = f"{sums.tokens / sums.forwards:.2f}" if sums.forwards else "-"
        over = shown in ("done", "scoring", "to score")
        left = "" if over else duration(estimator.left_s(experiment, status))
        left = "-" if shown == "failed" else left
        score = _score(status, "interval" not in folded)
        table.add_row([name, shown, _count(status), rate, tpf, left, score])
    for head in {"TPF", "tok/s"} & {*folded}:
        table.del_column(head)
    if narrow:
        table.border, table.left_padding_width, table.right_padding_width = False, 0, 1
        others = [max(map(len, map(str, column))) for column in zip(table.field_names, *table.rows)]
        table.max_width[title] = max(NARROWEST, columns - sum(others[1:]) - len(others))
    return "\n".join(line.rstrip() for line in table.get_string().splitlines())


def summary_line(rows: Rows, workers: int) -> str:
    """`48 experiments: 3 done, 45 waiting; 12000 of 33600 samples; about 3 h 20 m left with ...`"""
    n, known = sum(s.n for _, s in rows), [s.of for _, s in rows if s.of is not None]
    of = str(sum(known)) if known or not rows else "?"
    if 0 < len(known) < len(rows):
        of = f"at least {of}"
    text = f"{numbered(len(rows), 'experiment')}: {state_counts(rows)}; {n} of {of} samples"
    if all(status.state == "done" for _, status in rows):
        return text
    estimator = Estimator(rows)
    left = [estimator.left_s(e, s) for e, s in rows]
    if None in left:
        return f"{text}; the time left is not known yet"
    if not sum(left):
        return text
    return f"{text}; about {duration(sum(left) / workers)} left with {numbered(workers, 'worker')}"


def state_counts(rows: Rows) -> str:
    """`3 done, 1 running`."""
    states = Counter(status.shown for _, status in rows)
    return counts({state: states[state] for state in STATES})


def plan(rows: Rows, needs: Sequence[str] = ()) -> str:
    """Name, state and command of each experiment; needs: further lines."""
    columns, lines = terminal_columns(), []
    for experiment, s in rows:
        state = f"begun {_count(s)}" if s.shown == "begun" else s.shown
        note = f"  ({s.note})" if s.note else ""
        lines += [_wrapped(f"{state:9} {experiment.name}{note}", columns, "")]
        lines += [_wrapped(f"  {experiment.command}", columns, " \\")]
    summary = summary_line(rows, 1).partition("; about")[0]
    return "\n".join([*lines, *(_wrapped(line, columns, "") for line in [summary, *needs])])


def _wrapped(text: str, columns: int, mark: str) -> str:
    """Text in lines of the terminal, broken at spaces; mark: ends a line that goes on."""
    if not columns or len(text) <= columns:
        return text
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    found = wrap(
        text,
        columns - len(mark),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return f"{mark}\n".join(found)


def counts(numbers: Mapping[str, int]) -> str:
    """{"done": 3, "failed": 0} -> `3 done`."""
    return ", ".join(f"{n} {name}" for name, n in numbers.items() if n) or "nothing to do"
