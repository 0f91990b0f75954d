"""What progress shows of each sample, in a line beside its shard: a store of megabytes need not be read for it.

    shard-<host>-<pid>-<n>.jsonl     the samples (experiment/store.py)
    brief-<host>-<pid>-<n>.jsonl     [end, key, document, tokens returned, forward passes, seconds, score] for each of them,
                                     [end, key] for one that failed

end: bytes of the shard up to and including the sample. Lines are written in the shard's order and none is left out: up to
the last `end` the shard need not be read, behind it stands what was not written here any more. Nothing but a view of
where a run stands depends on these files; a lost or damaged one costs time, no sample.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any


def brief_path(shard: Path) -> Path:
    return shard.with_name("brief" + shard.name.removeprefix("shard"))


class Briefs:
    """The lines beside the shard that one process writes. Raises nothing; after a write that failed it writes no more."""

    def __init__(self) -> None:
        self._fd: int | None = None
        self._given_up = False

    def add(self, shard: Path, *row: Any) -> None:
        """After a sample has been put: its key, and the rest of its line."""
        if self._given_up:
            return
        self._given_up = True
        with suppress(OSError):
            if self._fd is None:
                self._fd = os.open(
                    brief_path(shard), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666
                )
            line = (
                json.dumps([os.stat(shard).st_size, *row], separators=(",", ":")).encode() + b"\n"
            )
            self._given_up = os.write(self._fd, line) < len(line)

    def __del__(self) -> None:
        if self._fd is not None:
            os.close(self._fd)


def read_briefs(shard: Path, start: int) -> Iterator[tuple[int, list[Any]]]:
    """(where its line ends in the file, row) from `start` on, up to damage, to a torn line or to what the shard has not got."""
    with suppress(OSError, ValueError, TypeError, LookupError):
        with open(brief_path(shard), "rb") as file:
            file.seek(start)
            *lines, _ = file.read().split(b"\n")
        size = os.stat(shard).st_size
        for line in lines:
            row = json.loads(line)
            numbers = [row[0], *row[2:6], *(n for n in row[6:] if n is not None)]
            if (
                len(row) not in (2, 7)
                or not isinstance(row[1], str)
                or sum(numbers) < 0
                or row[0] > size
            ):
                return
            start += len(line) + 1
            yield start, row
