#!/usr/bin/env python3
"""Say what this machine can run, and what keeps it from running.

    python scripts/doctor.py                      environment, device, sandbox, disk, what fits
    python scripts/doctor.py --checkpoint DIR     are its weights whole, and does it answer?
    python scripts/doctor.py --smoke              every path of the engine once, on random weights

--smoke takes less than five minutes on a GPU (estimated), downloads nothing and writes one JSON
file to send with a report. On a CPU its shapes are tiny, and steps that need a GPU are skipped.

exit codes: 0 nothing is broken, 2 usage, 3 environment, 4 checkpoint, 74 not writable
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if p != str(HERE))]  # without lm_eval.py

from experiment.arguments import Parser  # noqa: E402
from experiment.signals import exit_code_of  # noqa: E402
from suite.doctor import Finding, Machine, checkpoint, examine, guarded  # noqa: E402
from utils import (  # noqa: E402
    EXIT_COMPLETE,
    EXIT_ENVIRONMENT,
    UsageError,
    atomic_write_json,
    environment,
    nearest,
)

SMOKE_JSON = Path("results", "bench", "smoke.json")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. Raises UsageError."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    text = "read every tensor of a checkpoint and decode one prompt; a directory, or a hub id that "
    add("--checkpoint", metavar="DIR", help=text + "the hub's cache has")
    add("--smoke", action="store_true", help="run every path of the engine once")
    add("--device", metavar="NAME", help="cuda, cuda:1, ... or cpu (default: cuda if there is one)")
    text = f"also write all findings to FILE (with --smoke by default to {SMOKE_JSON})"
    add("--json", metavar="FILE", type=Path, help=text)
    text = "where results would go (default: results)"
    add("--output_dir", metavar="DIR", type=os.path.expanduser, default="results", help=text)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = parser._option_string_actions
        raise UsageError(
            f"unknown argument {word!r}{nearest(word, flags) or '; --help lists them all'}"
            for word in unknown
        )
    if args.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise UsageError(f"--device {args.device!r}: allowed: cpu, cuda, cuda:0, cuda:1, ...")
    return args


def shown(finding: Finding) -> str:
    """A finding in lines of at most 80 columns."""
    head = f"{finding.state:8}{finding.name:12}"
    return fill(finding.text, 80, initial_indent=head, subsequent_indent=" " * len(head))


def smoke_findings(machine: Machine) -> Iterator[Finding]:
    """The steps of the smoke run as findings."""
    import torch

    from dev.bench.smoke import smoke

    for step in smoke(torch.device(machine.device or "cpu")):
        failed = step.state == "failed"
        more = {"seconds": step.seconds, "found": step.found, "traceback": step.traceback}
        state = "broken" if failed else step.state
        yield Finding(step.name, state, step.text, EXIT_ENVIRONMENT * failed, more)


def findings(args: argparse.Namespace) -> Iterator[Finding]:
    machine = Machine(args.device, Path(args.output_dir), online=not args.smoke)
    yield from examine(machine)
    if args.checkpoint is not None:
        yield from guarded(checkpoint, machine, args.checkpoint)
    if args.smoke:
        yield from guarded(smoke_findings, machine)


def doctor(args: argparse.Namespace) -> int:
    """Print the findings, write the JSON; the lowest exit code of what is broken."""
    found = []
    for finding in findings(args):
        print(shown(finding), flush=True)
        found.append(finding)
    broken = [finding for finding in found if finding.state == "broken"]
    code = min((finding.code for finding in broken), default=EXIT_COMPLETE)
    path = args.json or (SMOKE_JSON if args.smoke else None)
    if path is not None:
        content = {
            "exit_code": code,
            "environment": environment(),
            "findings": [vars(finding) for finding in found],
        }
        # numbers that JSON lacks, and whatever a step has found, become texts
        plain = json.loads(json.dumps(content, default=str), parse_constant=str)
        atomic_write_json(path, plain)
        print(f"\n-> {path}")
    names = ", ".join(dict.fromkeys(finding.name for finding in broken))
    print(f"\nbroken: {names}" if broken else "\nnothing is broken")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code_of(lambda: doctor(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
