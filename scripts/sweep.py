#!/usr/bin/env python3
"""Run many experiments: by default 4 models x 4 tasks x 1, 2, 3 tokens per step.

    python scripts/sweep.py plan                                   list the experiments and states
    python scripts/sweep.py run                                    one worker for each visible GPU
    python scripts/sweep.py run --models llada --tps 1 2 4 8 --extra "--batch_size 8 --limit 100"
    python scripts/sweep.py run --file my.yaml --workers 2         experiments of your own
    python scripts/sweep.py run --suite parallel                   algorithms and caches, on a CPU
    python scripts/sweep.py run --suite anchors                    beside published speeds
    python scripts/sweep.py run --engine slurm --partition gpu     an array job of a SLURM cluster
    python scripts/sweep.py progress --watch                       samples, tok/s, score, time left

A YAML file is a list. Each entry is text ("--model_alias llada --task gsm8k"), a list of words, or
a mapping of flags to values, where a list of values means one experiment for each value.

exit codes: 0 all done, 5 some experiments failed, 75 another process has some; others as eval.py
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if p != str(HERE))]  # without lm_eval.py

from eval import MODEL_DEFAULTS, TASKS  # noqa: E402
from experiment import plugins  # noqa: E402
from experiment.arguments import Parser  # noqa: E402
from experiment.arguments import build_parser as flags_parser  # noqa: E402
from experiment.identity import forget  # noqa: E402
from experiment.signals import exit_code_of  # noqa: E402
from suite.lease import read_records  # noqa: E402
from suite.matrix import REFUSED, SUITES, Selection, argument_sets, select  # noqa: E402
from suite.state import Watcher, statuses  # noqa: E402
from suite.table import plan, progress_table  # noqa: E402
from utils import (  # noqa: E402
    EXIT_COMPLETE,
    OutputError,
    UsageError,
    nearest,
    output_problem,
)

if TYPE_CHECKING:
    from suite.cluster import JobRequest

# flags for --engine slurm alone: fields of JobRequest
SLURM = {
    "partition": (str, "partition, or several with commas (default: the cluster's)"),
    "gpus_per_job": (int, "GPUs per task of the array (default: 1); 0 runs on CPUs"),
    "array_size": (
        int,
        "largest number of tasks (default: one for each model that is not done)",
    ),
    "time": (
        str,
        "time limit of a task, in a format of sbatch (default: 4:00:00); at the limit the task "
        "is requeued and resumes",
    ),
    "account": (str, "account, as for sbatch"),
    "qos": (str, "quality of service, as for sbatch"),
    "slurm_extra": (
        str,
        "more options of sbatch, such as "
        '--slurm-extra="--cpus-per-task=8 --mem=64G --constraint=a100"',
    ),
}


# flags with one value, which may look like a flag itself
JOINED = ("--extra", "--slurm-extra")
WATCH_S = 86400.0  # at most
NO_PLUGIN = (
    "progress imports no --plugin; without filters it shows the last suites from their records"
)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) <= WATCH_S:
            return float(text)
    raise UsageError(f"--watch {text}: must be seconds, above 0 and at most {WATCH_S:.0f}")


def selecting_parser() -> argparse.ArgumentParser:
    """The flags that select experiments."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("which experiments")

    def add_list(flag: str, metavar: str, text: str, kind: type = str) -> None:
        group.add_argument(
            flag, metavar=metavar, help=text, nargs="+", default=[], action="extend", type=kind
        )

    add_list("--models", "NAME", "only these models (default: all)")
    add_list("--tasks", "NAME", "only these benchmarks; lm_eval:NAME adds another one")
    add_list("--tps", "K", "these tokens per step instead of 1 2 3", int)
    add_list(
        "--algs", "NAME", "these algorithms instead of the protocol's, where the model has them"
    )
    text = "arguments of eval.py that every experiment gets; repeatable"
    group.add_argument("--extra", metavar='"..."', action="append", default=[], help=text)
    group.add_argument(
        "--suite",
        choices=list(SUITES),
        default="main",
        help="main: the matrix (default); parallel: adaptive algorithms and KV caches on the tiny "
        "checkpoints; anchors: methods with a published speed, one sample at a time; batches: the "
        "same with 1, 4, 16 and 64 samples in flight; filters apply",
    )
    text = "these argument sets instead of the matrix; filters apply"
    group.add_argument("--file", metavar="YAML", type=Path, help=text)
    text = "directory of the results (default: results)"
    group.add_argument(
        "--output_dir", metavar="DIR", default="results", type=os.path.expanduser, help=text
    )
    return parser


def build_parser() -> argparse.ArgumentParser:
    which = selecting_parser()
    importing = argparse.ArgumentParser(add_help=False)
    importing.add_argument(
        "--plugin",
        metavar="FILE",
        action="append",
        default=[],
        help="a Python file that adds models, benchmarks or algorithms; repeatable",
    )
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(
        dest="command", required=True, parser_class=Parser, metavar="plan | run | progress"
    )
    text = "list the experiments, their commands and states"
    commands.add_parser("plan", parents=[which, importing], help=text)
    run = commands.add_parser("run", parents=[which, importing], help="run what is not done")
    run.add_argument(
        "--engine",
        choices=["local", "slurm"],
        default="local",
        help="local: the devices of this machine (default); slurm: submit a job array from here",
    )
    run.add_argument(
        "--workers",
        metavar="N",
        type=int,
        help="processes that generate (default: one for each visible GPU, or one on the CPU); if "
        "there are more workers than GPUs, they share the GPUs",
    )
    text = "check the options, print the directory of the results and exit"
    run.add_argument("--check", action="store_true", help=text)
    slurm = run.add_argument_group("for --engine slurm")
    for name, (kind, text) in SLURM.items():
        slurm.add_argument(_flag(name), type=kind, metavar=name.upper(), help=text)
    text = (
        "show the experiments of the suites that are running or ran last; with filters, or if "
        "there is no suite, those that the flags select"
    )
    progress = commands.add_parser("progress", parents=[which], help=text)
    text = "repeat every S seconds (default: 5)"
    progress.add_argument("--watch", metavar="S", type=_seconds, nargs="?", const=5.0, help=text)
    worker = commands.add_parser("worker")  # started by the local engine
    worker.add_argument("--parent", type=int, required=True)
    share = commands.add_parser("share")  # started by SLURM on a node
    share.add_argument("--plan", type=Path, required=True)
    return parser


def selection_of(args: argparse.Namespace) -> Selection:
    try:
        extra = tuple(word for text in args.extra for word in shlex.split(text))
    except ValueError as error:
        raise UsageError(f"--extra {' '.join(args.extra)}: {error}") from None
    models, tasks, algs = (
        tuple(name for text in texts for name in text.split(","))
        for texts in (args.models, args.tasks, args.algs)
    )
    return Selection(
        models,
        tasks,
        tuple(args.tps),
        algs,
        extra,
        file=args.file,
        suite=args.suite,
        output_dir=args.output_dir,
        plugins=tuple(getattr(args, "plugin", ())),
    )


# ---------------------------------------------------------------- progress


def watched(args: argparse.Namespace) -> tuple[list[Watcher], int]:
    """The experiments to show, and the number of workers that share what is left.

    Raises UsageError for experiments with a plugin: progress imports none.
    """
    selection = selection_of(args)
    records = read_records(Path(selection.output_dir))
    workers = max(1, sum(record.workers for record in records if record.alive))
    if records and selection == Selection(output_dir=selection.output_dir):
        planned = {p.path: p for record in records for p in record.experiments}
        return [Watcher(p) for p in planned.values()], workers
    listed = argument_sets(replace(selection, extra=()))
    if plugins.paths_in([*selection.extra, *(word for words in listed for word in words)]):
        raise UsageError(NO_PLUGIN)
    return [Watcher(e) for e in select(selection)], workers


def show_progress(args: argparse.Namespace) -> int:
    watchers, workers = watched(args)
    terminal = args.watch is not None and sys.stdout.isatty()
    while True:
        living = [r for r in read_records(Path(args.output_dir)) if r.alive]
        taken = {planned.path for record in living for planned in record.experiments}
        rows = [(e, replace(s, queued=e.path.resolve() in taken)) for e, s in statuses(watchers)]
        states = {status.state for _, status in rows}
        columns, lines = shutil.get_terminal_size()
        size = (columns, lines - 2) if terminal else None
        if args.watch is None or not living and states <= {"done", "failed"}:
            print(progress_table(rows, workers, size))
            return EXIT_COMPLETE
        # the screen is cleared together with the new text, so that it does not flicker
        title = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  every {args.watch:g} s, Ctrl-C leaves"
        text = progress_table(rows, workers, size)
        print(f"\033[2J\033[H{title}\n{text}", flush=True)
        time.sleep(max(0.2, args.watch))
        forget()
        fresh, workers = watched(args)
        if [w.experiment for w in fresh] != [w.experiment for w in watchers]:
            watchers = fresh


# ---------------------------------------------------------------- run


def run(args: argparse.Namespace) -> int:
    if args.workers is not None and args.workers < 1:
        raise UsageError(f"--workers {args.workers}: must be at least 1")
    request = request_of(args)
    selection = selection_of(args)
    chosen = select(selection)
    if problem := output_problem(selection.output_dir):
        raise OutputError(problem)
    out = Path(selection.output_dir)
    if args.check:
        print(out)
        return EXIT_COMPLETE
    if request is None:
        from suite.run import run_suite

        return run_suite(chosen, out, args.workers)
    from suite.cluster import submit

    print(submit(chosen, out, args.workers, request))
    return EXIT_COMPLETE


def request_of(args: argparse.Namespace) -> JobRequest | None:
    """The request to the cluster, None for --engine local.

    Raises UsageError for a bad request, and for its flags without --engine slurm.
    """
    from suite.cluster import JobRequest

    given = {name: getattr(args, name) for name in SLURM if getattr(args, name) is not None}
    if args.engine == "slurm":
        request = JobRequest(**given)
        request.options()
        return request
    if given:
        flags = " and ".join(map(_flag, given))
        raise UsageError(f"{flags}: only for --engine slurm; give it too, or leave them out")
    return None


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. Raises UsageError, with the nearest flag for one that is not known."""
    parser, given = build_parser(), []
    commands = parser._subparsers._group_actions[0].choices
    ours = {flag for each in commands.values() for flag in each._option_string_actions}
    for word in sys.argv[1:] if argv is None else argv:
        if given and given[-1] in JOINED and word not in ours:
            given[-1] += f"={word}"
        else:
            given.append(word)
    args, unknown = parser.parse_known_args(given)
    words = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    of_eval = flags_parser(MODEL_DEFAULTS, list(TASKS))[0]._option_string_actions
    known = commands[args.command]._option_string_actions
    if unknown:
        raise UsageError(
            f"unknown argument {word!r}"
            + (
                f"; {NO_PLUGIN}"
                if word == plugins.FLAG  # of progress; the others have it
                else f"; {REFUSED[word.lstrip('-')]}"
                if word.lstrip("-") in REFUSED
                else f'; it is one of eval.py: --extra "{word} ..." gives it to every experiment'
                if word in of_eval
                else nearest(word, known) or "; --help lists them all"
            )
            for word in words or unknown[:1]
        )
    return args


def command(args: argparse.Namespace) -> int:
    if args.command == "worker":
        from suite.worker import main as work

        return work(args.parent)
    if args.command == "share":
        from suite.cluster import share

        return share(args.plan)
    if args.command == "plan":
        from suite.preflight import preflight

        rows = statuses([Watcher(e) for e in select(selection_of(args))])
        print(plan(rows, preflight(rows, Path(args.output_dir))))
        return EXIT_COMPLETE
    return show_progress(args) if args.command == "progress" else run(args)


def main(argv: list[str] | None = None) -> int:
    return exit_code_of(lambda: command(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
