#!/usr/bin/env python3
"""Tables, comparisons, AUP and figures of finished results, and one HTML page with every sample.

python scripts/report.py results                          # writes report/, prints the tables
python scripts/report.py results --compare A.json B.json  # are these two different?

Reads result files only; no torch, no lm-eval. Files that are no results are named and left out.
Exit codes: 0 done, 2 usage, 4 no result among the files, 74 not writable.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reporting.data import Run, Skipped, named, read_all  # noqa: E402
from reporting.page import page  # noqa: E402
from reporting.plots import draw  # noqa: E402
from reporting.tables import Table, aup_table, comparisons, results, to_csv, to_markdown, to_text  # noqa: E402
from utils import BadDataError, DllmexpError, OutputError, UsageError  # noqa: E402


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", nargs="+", type=Path, help="result files, or directories that hold them"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report"), help="directory to write to (default: report)"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        action="append",
        default=[],
        type=Path,
        metavar=("A.json", "B.json"),
        help="compare two results on the documents that both have; can be repeated",
    )
    parser.add_argument(
        "--aup_alpha", type=float, default=3.0, help="AUP: weight of lost accuracy (default: 3)"
    )
    parser.add_argument(
        "--aup_drop",
        type=float,
        default=5.0,
        help="AUP: points that many percentage points below the slowest one do not count (default: 5)",
    )
    parser.add_argument(
        "--no_samples", action="store_true", help="leave the samples out of report.html"
    )
    args = parser.parse_args(argv)
    for name in ("aup_alpha", "aup_drop"):
        if not 0 <= getattr(args, name) < float("inf"):
            parser.error(f"--{name} {getattr(args, name)}: expected a number from 0 up")
    return args


def write(path: Path, pieces: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(pieces)


def markdown(
    tables: Sequence[Table], pictures: Sequence, runs: Sequence[Run], skipped: Sequence[Skipped]
) -> str:
    parts = [
        "# dllmexp report",
        f"{len(runs)} results.",
        *(to_markdown(t) for t in tables if t.rows),
    ]
    parts += [f"![{p.title}]({p.name}.png)" for p in pictures]
    for title, lines in (
        (
            "Signs that a score measures the format of answers",
            [f"{r.name}: {w}" for r in runs for w in r.warnings],
        ),
        ("Files left out", [f"{s.path.name}: {s.reason}" for s in skipped]),
    ):
        if lines:
            parts.append("\n".join([f"## {title}", "", *(f"- {line}" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def report(args: argparse.Namespace) -> None:
    """Everything between the arguments and the files."""
    runs, skipped = read_all(args.results)
    for s in skipped:
        print(f"left out: {s.path}: {s.reason}", file=sys.stderr)
    if not runs:
        raise BadDataError(f"no complete result in {', '.join(map(str, args.results))}")
    asked = [(named(runs, a), named(runs, b)) for a, b in args.compare]
    try:
        tables = [
            results(runs),
            comparisons(runs, asked),
            aup_table(runs, args.aup_alpha, args.aup_drop),
        ]
    except ValueError as error:
        raise UsageError(f"--compare: {error}") from error
    print("\n\n".join(to_text(table) for table in tables if table.rows), flush=True)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        pictures = draw(runs, args.out)
        for table, name in zip(tables, ("results", "comparisons", "aup"), strict=True):
            write(args.out / f"{name}.csv", [to_csv(table)])
        write(args.out / "report.md", [markdown(tables, pictures, runs, skipped)])
        write(args.out / "report.html", page(runs, tables, pictures, skipped, not args.no_samples))
    except OSError as error:
        raise OutputError(
            f"cannot write {args.out}: {error.strerror}; give another --out"
        ) from error
    print(
        f"\nreport: {args.out / 'report.html'}, report.md, {len(pictures)} figures (PNG, SVG), 3 CSV files"
    )


def main(argv: Sequence[str] | None = None) -> int:
    try:
        report(parse(argv))
    except DllmexpError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
