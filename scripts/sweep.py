#!/usr/bin/env python3
"""Many experiments: 4 models x 4 tasks x 1, 2, 3 tokens per step, or any others.

    python scripts/sweep.py plan                                   every experiment, its command, where it stands
    python scripts/sweep.py run --engine local                     one worker for each visible GPU
    python scripts/sweep.py run --models llada --tps 1 2 4 8 --extra "--batch_size 8 --limit 100"
    python scripts/sweep.py run --file my.yaml --workers 2
    python scripts/sweep.py run --engine slurm --partition gpu     an array job of a SLURM cluster
    python scripts/sweep.py run --suite parallel                   algorithms and caches on the embedded checkpoints
    python scripts/sweep.py progress --watch

A YAML file is a list. Each entry is text ("--model_alias llada --task gsm8k"), a list of words, or flag: value, where a
list of values means one experiment for each.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiment.identity import forget  # noqa: E402
from experiment.signals import Signalled, signals_raise  # noqa: E402
from suite.lease import read_claims  # noqa: E402
from suite.matrix import SUITES, Selection, experiments, select  # noqa: E402
from suite.state import Watcher, statuses  # noqa: E402
from suite.table import plan, progress_table  # noqa: E402
from utils import EXIT_COMPLETE, DllmexpError, OutputError, UsageError, output_problem  # noqa: E402

if TYPE_CHECKING:
    from suite.cluster import Request

# what only --engine slurm asks: fields of Request
SLURM = ("partition", "gpus_per_job", "array_size", "time", "account", "qos", "slurm_extra")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(message)


def build_parser() -> argparse.ArgumentParser:
    which = argparse.ArgumentParser(add_help=False)
    group = which.add_argument_group("which experiments")
    listed = {"nargs": "+", "default": [], "action": "extend"}
    group.add_argument(
        "--models", metavar="NAME", help="only these models (default: all)", **listed
    )
    group.add_argument(
        "--tasks",
        metavar="NAME",
        help="only these benchmarks; lm_eval:NAME adds another one",
        **listed,
    )
    group.add_argument(
        "--tps", metavar="K", type=int, help="these tokens per step instead of 1 2 3", **listed
    )
    group.add_argument(
        "--algs",
        metavar="NAME",
        help="each of these algorithms that the model has, instead of the protocol's",
        **listed,
    )
    group.add_argument(
        "--extra",
        metavar='"..."',
        action="append",
        default=[],
        help="arguments that every experiment gets; may be repeated",
    )
    group.add_argument(
        "--suite",
        choices=list(SUITES),
        default="main",
        help="main: the matrix (default); parallel: adaptive algorithms and KV caches on the tiny checkpoints; filters apply",
    )
    group.add_argument(
        "--file",
        metavar="YAML",
        type=Path,
        help="these argument sets instead of the matrix; filters apply",
    )
    group.add_argument(
        "--output_dir", metavar="DIR", default="results", help="where results go (default: results)"
    )

    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(
        dest="command", required=True, parser_class=_Parser, metavar="plan | run | progress"
    )
    commands.add_parser(
        "plan", parents=[which], help="print every experiment, its command and its state"
    )
    run = commands.add_parser("run", parents=[which], help="run what is not done")
    run.add_argument(
        "--engine",
        choices=["local", "slurm"],
        default="local",
        help="local: the devices of this machine (default); slurm: an array job, submitted from here",
    )
    run.add_argument(
        "--workers",
        metavar="N",
        type=int,
        help="processes that generate (default: one for each visible GPU, or one on the CPU); more than GPUs share them",
    )
    run.add_argument(
        "--check", action="store_true", help="say what is wrong with the options, and leave"
    )
    slurm = run.add_argument_group("for --engine slurm")
    for flag, kind, text in (
        ("--partition", str, "partition, or several with commas (default: the cluster's)"),
        ("--gpus-per-job", int, "GPUs of each task of the array (default 1); 0 runs on its CPUs"),
        (
            "--array-size",
            int,
            "tasks at most (default: one for each model that has something to do)",
        ),
        (
            "--time",
            str,
            "time limit of a task, as sbatch takes it (default 4:00:00); at the limit it is requeued and goes on",
        ),
        ("--account", str, "as sbatch takes it"),
        ("--qos", str, "as sbatch takes it"),
        (
            "--slurm-extra",
            str,
            'more options of sbatch: --slurm-extra="--cpus-per-task=8 --mem=64G --constraint=a100"',
        ),
    ):
        slurm.add_argument(flag, type=kind, metavar=flag[2:].upper().replace("-", "_"), help=text)
    progress = commands.add_parser(
        "progress",
        parents=[which],
        help="a table of the experiments of the running suites, else of the last ones, else of the matrix",
    )
    progress.add_argument(
        "--watch",
        metavar="S",
        type=float,
        nargs="?",
        const=5.0,
        help="again every S seconds (default 5)",
    )
    worker = commands.add_parser("worker")  # started by `run`
    share = commands.add_parser("share")  # started on a node by what `run --engine slurm` submits
    share.add_argument("--plan", type=Path, required=True)
    for started in (worker, share):
        started.add_argument("--parent", type=int, required=True)
    return parser


def selection_of(args: argparse.Namespace) -> Selection:
    try:
        extra = tuple(word for text in args.extra for word in shlex.split(text))
    except ValueError as error:
        raise UsageError(f"--extra {' '.join(args.extra)}: {error}") from None
    lists = {
        name: tuple(w for v in getattr(args, name) for w in str(v).split(","))
        for name in ("models", "tasks", "algs")
    }
    where = {"file": args.file, "suite": args.suite, "output_dir": args.output_dir}
    return Selection(**lists, tps=tuple(args.tps), extra=extra, **where)


# ---------------------------------------------------------------- progress


def watched(args: argparse.Namespace) -> tuple[list[Watcher], int]:
    """What to show, and how many workers share what is left."""
    selection = selection_of(args)
    claims = read_claims(Path(selection.output_dir))
    living = [c for c in claims if c["alive"]]
    workers = max(1, sum(c.get("workers", 1) for c in living))
    if selection != Selection(output_dir=selection.output_dir) or not claims:
        return [Watcher(e) for e in select(selection)], workers
    told = {tuple(e["argv"]): e["id"] for c in claims for e in c["experiments"]}
    return [Watcher(e, told[e.argv]) for e in experiments(told)], workers


def show_progress(args: argparse.Namespace) -> int:
    watchers, workers = watched(args)
    while True:
        text = progress_table(statuses(watchers), workers)
        if args.watch is None:
            print(text)
            return EXIT_COMPLETE
        # the screen is cleared when there is something to put there, so that it does not flicker
        print(
            f"\033[2J\033[H{time.strftime('%Y-%m-%d %H:%M:%S')}  every {args.watch:g} s, Ctrl-C leaves\n{text}",
            flush=True,
        )
        time.sleep(max(0.2, args.watch))
        forget()
        fresh, workers = watched(args)
        if [w.experiment.argv for w in fresh] != [w.experiment.argv for w in watchers]:
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
    if args.check:
        return EXIT_COMPLETE
    out = Path(selection.output_dir)
    if request is None:
        from suite.run import run_suite

        return run_suite(chosen, out, args.workers)
    from suite.cluster import submit

    print(submit(chosen, out, args.workers, request))
    return EXIT_COMPLETE


def request_of(args: argparse.Namespace) -> Request | None:
    """What is asked of the cluster, None for this machine. Raises UsageError where its options are given without it."""
    from suite.cluster import Request

    given = {name: getattr(args, name) for name in SLURM if getattr(args, name) is not None}
    if args.engine == "slurm":
        request = Request(**given)
        request.parameters()
        return request
    if given:
        flags = " and ".join("--" + name.replace("_", "-") for name in given)
        raise UsageError(f"{flags}: only for --engine slurm")
    return None


def main(argv: list[str] | None = None) -> int:
    try:
        with signals_raise():
            args = build_parser().parse_args(argv)
            if args.command == "worker":
                from suite.worker import main as work

                return work(args.parent)
            if args.command == "share":
                from suite.cluster import share

                return share(args.plan, args.parent)
            if args.command == "plan":
                print(plan(statuses([Watcher(e) for e in select(selection_of(args))])))
                return EXIT_COMPLETE
            return show_progress(args) if args.command == "progress" else run(args)
    except DllmexpError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; every finished sample is kept, the same command goes on", file=sys.stderr)
        return 130
    except Signalled as error:
        return 128 + error.args[0]
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141


if __name__ == "__main__":
    sys.exit(main())
