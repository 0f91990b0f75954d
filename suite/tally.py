"""What a sample store holds, counted without decoding its JSON: from the lines that a run writes beside its shards
(experiment/briefs.py), and what those do not cover from the shards themselves, 63,000 lines of 6 kB in a second.

A line of a shard is canonical JSON (experiment/store.py), so its fields lie in a known order: those of `meta` in front of the
canvas, `nfe` and the status behind it. A line that does not look so is decoded. Checksums are not looked at: this
counts, and a run that goes on checks every line.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from experiment.briefs import read_briefs

HEAD = re.compile(
    rb'[0-9a-f]{8} \{"config_id":"[0-9a-f]{64}","record":\{"key":"([0-9a-f]{64})","meta":\{'
    rb'"cost_seconds":([-+0-9.e]+),"doc_id":(\d+),'
)
TOKENS, FORWARDS = b'"tokens_returned":', b'"nfe":'
OK = b'"status":"ok"},"version":1}'
NUMBER = re.compile(rb"\d+")


@dataclass(frozen=True)
class Sums:
    """Over the finished samples of an experiment: tokens returned, forward passes, seconds of decoding.

    failed: samples whose last attempt failed. scores: of those of the n that were scored as they were made.
    """

    n: int = 0
    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0
    failed: int = 0
    scores: tuple[float, ...] = ()


class Tally:
    """The samples below one store directory. update() reads what has been added since the last time."""

    def __init__(self, directory: Path):
        self.directory = directory
        # key -> document, tokens, forwards, seconds, score
        self._samples: dict[bytes, tuple[int, int, int, float, float | None]] = {}
        self._failed: set[bytes] = set()
        self._offsets: dict[str, int] = {}  # how far each shard is known
        self._briefs: dict[str, int] = {}  # how far the lines beside it have been read

    def update(self) -> None:
        """Raises nothing: a shard that cannot be read is left out, and one that has vanished starts afresh."""
        try:
            paths = {
                path.name: path
                for path in self.directory.iterdir()
                if path.name.startswith("shard-")
            }
        except OSError:
            paths = {}
        if self._offsets.keys() - paths.keys():  # set aside by --overwrite
            self._samples, self._failed, self._offsets, self._briefs = {}, set(), {}, {}
        for name, path in sorted(paths.items()):
            self._read_briefs(name, path)
            with suppress(OSError):
                self._read(name, path)

    def _read_briefs(self, name: str, path: Path) -> None:
        for at, (end, key, *row) in read_briefs(path, self._briefs.get(name, 0)):
            if row:
                self._samples[key.encode()] = tuple(row)
            else:
                self._failed.add(key.encode())
            self._briefs[name], self._offsets[name] = at, max(end, self._offsets.get(name, 0))

    def _read(self, name: str, path: Path) -> None:
        offset = self._offsets.get(name, 0)
        if path.stat().st_size <= offset:
            return
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        start = 0
        while start < end:
            stop = data.index(b"\n", start)
            self._line(data, start, stop)
            start = stop + 1
        self._offsets[name] = offset + end

    def _line(self, data: bytes, start: int, stop: int) -> None:
        head = HEAD.match(data, start, stop)
        at = data.find(TOKENS, head.end(), stop) if head else -1
        after = data.find(FORWARDS, at, stop) if at >= 0 else -1
        if after >= 0 and data.endswith(OK, start, stop):
            key, seconds, doc = head.groups()
            tokens = NUMBER.match(data, at + len(TOKENS))
            forwards = NUMBER.match(data, after + len(FORWARDS))
            if tokens and forwards:
                self._samples.setdefault(
                    key, (int(doc), int(tokens[0]), int(forwards[0]), float(seconds), None)
                )
                return
        self._decode(data[start:stop])

    def _decode(self, line: bytes) -> None:
        """The slow way: the first line of a shard, failed samples, damage."""
        try:
            record = json.loads(line[9:]).get("record")
            if record is None:
                return
            key, meta, result = record["key"].encode(), record["meta"], record["result"]
            if record["status"] == "ok":
                told = (
                    meta.get("doc_id", -1),
                    meta.get("tokens_returned", 0),
                    result.get("nfe", 0),
                    meta.get("cost_seconds", 0.0),
                )
                self._samples.setdefault(key, (*told, None))
            else:
                self._failed.add(key)
        except (ValueError, KeyError, AttributeError, TypeError):
            return

    def sums(self, limit: int | None = None) -> Sums:
        """Of the documents below `limit`: a store is shared by runs that differ in it."""
        rows = [row for row in self._samples.values() if limit is None or row[0] < limit]
        return Sums(
            len(rows),
            sum(r[1] for r in rows),
            sum(r[2] for r in rows),
            sum(r[3] for r in rows),
            len(self._failed - self._samples.keys()),
            tuple(r[4] for r in rows if r[4] is not None),
        )
