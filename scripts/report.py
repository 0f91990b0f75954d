#!/usr/bin/env python3
"""Tables, comparisons, AUP and figures of finished results, and one HTML page with every sample.

Reads result files only; needs neither torch nor lm-eval. Files that are not complete results are
listed and left out.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if p != str(HERE))]  # without lm_eval.py

from experiment.arguments import Parser  # noqa: E402
from experiment.signals import exit_code_of  # noqa: E402
from reporting import paper, tables  # noqa: E402
from reporting.data import read_all, remarks, result_at  # noqa: E402
from reporting.page import page  # noqa: E402
from reporting.plots import Picture, draw  # noqa: E402
from reporting.samples import json_lines  # noqa: E402
from utils import (  # noqa: E402
    EXIT_COMPLETE,
    BadDataError,
    OutputError,
    UsageError,
    nearest,
    numbered,
    terminal_columns,
)

EPILOG = """\
examples:
  python scripts/report.py results                          # writes report/, prints the tables
  python scripts/report.py results --compare A.json B.json  # do these two differ?
  python scripts/report.py results --suite                  # of its running and last suites alone
  python scripts/report.py results --samples samples.jsonl  # all samples, for pandas

exit codes: 0 done, 2 usage error, 4 no complete result, 74 output not writable
"""

MEANT = {"--output_dir": "--out"}  # the name that eval.py and sweep.py have


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("results", nargs="+", type=_path, help="result files, or directories of result files")
    add("--out", type=_path, default=Path("report"), help="output directory (default: report)")
    text = "only results of the suites that are running or ran last in these directories"
    add("--suite", action="store_true", help=text)
    add(
        "--compare",
        nargs=2,
        action="append",
        default=[],
        type=_path,
        metavar=("A.json", "B.json"),
        help="compare two results on the documents that both have; repeatable",
    )
    add("--aup_alpha", type=float, default=3.0, help="AUP: weight of lost accuracy (default: 3)")
    add(
        "--aup_drop",
        type=float,
        default=5.0,
        help="AUP: ignore points more than this many percentage points below the slowest one "
        "(default: 5)",
    )
    add(
        "--samples",
        type=_path,
        metavar="FILE.jsonl",
        help="also write the samples of all results, one line of JSON each, with result, doc_id, "
        "text, extracted, target and metrics; pandas.read_json(FILE, lines=True) reads it",
    )
    add("--no_samples", action="store_true", help="leave the samples out of report.html")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        words = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        raise UsageError(
            f"unknown argument {word!r}"
            + (
                nearest(MEANT.get(word, word), parser._option_string_actions)
                or "; --help lists them all"
            )
            for word in words or unknown[:1]
        )
    for name in ("aup_alpha", "aup_drop"):
        if not 0 <= getattr(args, name) < float("inf"):
            parser.error(f"--{name} {getattr(args, name)}: expected a finite number, 0 or more")
    return args


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def of_suites(places: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """(the results of the running and the last suites, names of experiments without one).

    Raises UsageError if no directory has the record of a suite.
    """
    from suite.lease import read_records

    found = {
        place / planned.path.name: planned.name
        for place in places
        for record in (read_records(place) if place.is_dir() else ())
        for planned in record.experiments
    }
    if not found:
        raise UsageError(
            f"--suite: no suite has run in {', '.join(map(str, places))}; without --suite every "
            "result there is shown"
        )
    there = [path for path in found if path.exists()]
    return there, [name for path, name in found.items() if path not in there]


def write(path: Path, pieces: Iterable[str]) -> None:
    if path.exists() and not path.is_file():  # to open a pipe would wait for its reader
        raise OSError(errno.EINVAL, "not a regular file")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(pieces)


def markdown(
    count: int,
    shown: Sequence[tables.Table],
    pictures: Sequence[Picture],
    notes: Mapping[str, Sequence[str]],
) -> str:
    """The text of report.md."""
    sections = ["# dllmexp report", f"{numbered(count, 'result')}."]
    sections += map(tables.to_markdown, shown)
    sections += [f"![{picture.title}]({picture.name}.png)" for picture in pictures]
    for title, lines in notes.items():
        sections.append("\n".join([f"## {title}", "", *(f"- {line}" for line in lines)]))
    return "\n\n".join(sections) + "\n"


def report(args: argparse.Namespace) -> int:
    """Read the results, print the tables, write the files."""
    places, absent = of_suites(args.results) if args.suite else (args.results, [])
    results, skipped = read_all(places)
    if absent:
        print(f"no result yet: {numbered(len(absent), 'experiment')} of the suite", file=sys.stderr)
    for s in skipped:
        print(f"left out: {s.path}: {s.reason}", file=sys.stderr)
    if not results:
        raise BadDataError(f"no complete result in {', '.join(map(str, args.results))}")
    requested = [(result_at(results, a), result_at(results, b)) for a, b in args.compare]
    try:
        comparisons = tables.comparison_table(results, requested)
    except ValueError as error:
        raise UsageError(f"--compare: {error}") from error
    by_name = {
        "results": tables.result_table(results),
        **({"speed": speed} if (speed := tables.speed_table(results)).rows else {}),
        "comparisons": comparisons,
        "aup": tables.aup_table(results, args.aup_alpha, args.aup_drop),
    }
    notes = remarks(results, skipped)
    if absent:
        notes["Experiments of the suite without a result"] = absent
    shown = [table for table in by_name.values() if table.rows]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, table in by_name.items():
            write(args.out / f"{name}.csv", [tables.to_csv(table)])
        write(args.out / "columns.md", [tables.to_meanings(by_name)])
        for_paper = paper.paper_tables(results)
        write(args.out / "accuracy.tex", ["\n".join(map(paper.to_latex, for_paper))])
        write(args.out / "accuracy.md", ["\n".join(map(paper.to_markdown, for_paper))])
        try:
            pictures = draw(results, args.out)
        except Exception as error:  # a broken installation of matplotlib, say
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            print(f"no figures: {reason}", file=sys.stderr)
            pictures, notes = [], notes | {"No figures": [reason]}
        whole = [picture for picture in pictures if not picture.part]
        write(args.out / "report.md", [markdown(len(results), shown, whole, notes)])
        html = page(results, shown, whole, notes, not args.no_samples)
        write(args.out / "report.html", html)
    except OSError as error:
        message = f"cannot write {args.out}: {error.strerror}; give another --out"
        raise OutputError(message) from error
    if args.samples:
        try:
            write(args.samples, (line for r in results for line in json_lines(r.path)))
        except OSError as error:
            message = f"cannot write --samples {args.samples}: {error.strerror}"
            raise OutputError(message) from error
    columns = terminal_columns()
    print("\n\n".join(tables.to_text(table, columns) for table in shown))
    if args.samples:
        print(f"samples: {args.samples}")
    figures = f"{len(pictures)} figures (PNG, SVG, PDF)"
    others = f"accuracy.tex, accuracy.md, {figures}, {len(by_name)} CSV files, columns.md"
    text = f"report: {args.out / 'report.html'}, report.md, {others}"
    print("\n" + (fill(text, columns, break_long_words=False) if columns else text))
    return EXIT_COMPLETE


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code_of(lambda: report(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
