"""The per-sample store behind resume: what one experiment has generated, kept so that no crash loses it.

    <root>/<config_id[:16]>/config.json                       what the id stands for, one setting a line
                            LOCK                              flock; its text says who holds it
                            LOCK.owner                        only where the file system has no flock: see _Lock
                            shard-<host>-<pid>-<n>.jsonl      append-only, one writer for ever
                            aside-<n>/                        shards that --overwrite set aside; never read

A line of a shard is `<crc32 of the JSON: 8 hex> {JSON}\\n`, written by one os.write. Its JSON is one of
    {"config_id": ..., "shard":  {"created", "host", "pid"}, "version": 1}            the first line
    {"config_id": ..., "record": {"key", "meta", "result", "status"}, "version": 1}   one sample
Every line names its configuration and version, so each stands on its own: a line of another id is never used, and
damage to one line, be it the first one or a newline, costs that line only. Plain JSON: reading runs no code.

Guarantees
- Once put() has returned the record survives the death of the process by any means, kill -9 included.
- Power loss costs at most the samples of one second: fdatasync runs when a second has passed since the last one, and in
  flush() and close(); the kernel writes the rest within half a minute. By construction, not by pulling a plug.
- A line without its newline (torn) or with a wrong CRC is not used; CRC-32 misses wide damage once in 4e9. Nothing of a
  shard is ever truncated, rewritten or deleted; --overwrite renames, file by file.
- The same shards give the same view in whatever order they are read: ok beats error; of two ok values the one of the
  older shard wins, and values that differ are reported as a failure of determinism.

Limits
- The lock saves double work; it is not what keeps data safe. Where locks hold on one node only (Lustre with `localflock`,
  NFS with `local_lock=all` or `nolock`) two processes write two shards, and equal samples count as duplicates.
- On NFS, which has no atomic O_APPEND, a reader sees another host's lines once the writer has synced and the reader's caches
  have expired (a minute at most by default): flush() before a barrier; what refresh() does not show yet is missing.
- A process forked without exec shares the lock until it ends or the store is closed. One Store belongs to one thread.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import re
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils import (
    EXIT_DATA,
    BusyError,
    DllmexpError,
    OutputError,
    atomic_write_json,
    canonical_json,
    differing_keys,
    sha256,
)

VERSION = 1  # of the format above
SYNC_SECONDS = 1.0
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HOST = re.sub(r"[^A-Za-z0-9.-]", "_", os.uname().nodename)
# Where a line begins, also inside a damaged one: JSON text without spaces has ` {"` nowhere else, strings escape quotes.
LINE_START = re.compile(rb'(?=[0-9a-f]{8} \{")')
Record = dict[str, Any]
FORM = [("key", str), ("meta", dict), ("result", dict), ("status", str)]
Entry = tuple[
    float, str, int, bytes
]  # creation time and name of its shard, offset, line: ordered alike for every reader


class StoreError(DllmexpError):
    """The store cannot be used as it is: of another configuration or version, damaged or unreadable."""

    exit_code = EXIT_DATA


class StoreBusy(BusyError):
    """Another process has the store. `.holder` says which: `pid 4121 on node7 since 2025-11-23T22:11:02+0000 ...`."""

    def __init__(self, directory: Path, holder: str, way_out: str = ""):
        self.holder = holder or "a process that has just started"
        super().__init__(f"{directory} is in use by {self.holder}{way_out}")


class StoreFull(OutputError, OSError):
    """No space, quota or file size left. What was written before stays good."""


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns what the system says about a write into StoreFull or OutputError."""
    try:
        yield
    except DllmexpError:
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise OutputError(
                f"cannot write {path}: {error.strerror}; give another --output_dir"
            ) from error
        full = StoreFull(
            f"cannot write {path}: {error.strerror}; what is there stays good: free some space, start again"
        )
        full.errno = error.errno
        raise full from error


def sample_key(config_id: str, prompt: str, repeat: int, stops: Sequence[str] = ()) -> str:
    """Key of one sample, 64 hex: what is asked (rendered prompt, repeat, stop strings) of which configuration."""
    return sha256([config_id, prompt, repeat, list(stops)])


def _content(line: bytes) -> dict[str, Any] | None:
    """What a line without its newline says, or None where it is damaged."""
    intact = line[8:9] == b" " and line[:8] == b"%08x" % zlib.crc32(line[9:])
    return json.loads(line[9:]) if intact else None


@dataclass
class Report:
    """What was found on disk, kept up by Store."""

    loaded: int = 0  # records read from shards of this configuration, failed ones included
    torn: int = 0  # shards whose last line has no end: their writer was killed, or is just writing
    corrupt: int = 0  # lines whose checksum is wrong
    duplicates: int = 0  # further ok records of a sample with the same result
    foreign: int = 0  # lines of another configuration or version
    conflicts: set[str] = field(
        default_factory=set
    )  # keys with two different results: not deterministic
    notes: list[str] = field(
        default_factory=list
    )  # what else a user should know, in sentences; logged as well

    def __str__(self) -> str:
        counts = {
            name: value if isinstance(value, int) else len(value)
            for name, value in vars(self).items()
        }
        return ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "nothing"


def _started(pid: int) -> str | None:
    """When a process of this host started (proc(5), stat, field 22); None where it has ended or there is no /proc."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


class _Lock:
    """The right to run an experiment alone, from construction to release(). Raises StoreBusy.

    flock on LOCK: the kernel frees it with its holder, whatever ends that. Where the file system has no flock, the file
    LOCK.owner made with O_EXCL: a dead holder on this host is taken over; of one on another host nothing can be known.
    """

    OWNER = re.compile(r"pid (\d+) on (\S+) since \S+ \(process start (\d+)\)")

    def __init__(self, directory: Path):
        self.note = ""
        self._owner = directory / "LOCK.owner"
        since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._text = (
            f"pid {os.getpid()} on {HOST} since {since} (process start {_started(os.getpid())})"
        )
        self._fd = self._flock(directory / "LOCK")
        if self._fd is None:
            self.note = f"{directory} has no flock: LOCK.owner is the lock"
            self._own()

    def _flock(self, path: Path) -> int | None:
        """A descriptor that holds the lock; None where there is no flock."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 1000, 0).decode(errors="replace")
            os.close(fd)
            if error.errno in NO_FLOCK:
                return None
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise StoreBusy(path.parent, holder) from None
            raise
        with suppress(OSError):  # for people only: a full disk must not keep a run from scoring
            os.truncate(fd, os.pwrite(fd, self._text.encode(), 0))
        return fd

    def _own(self) -> None:
        holder = ""
        with suppress(FileNotFoundError):
            holder = self._owner.read_text()
        found = self.OWNER.fullmatch(holder)
        if found and found[2] == HOST and _started(int(found[1])) != found[3]:
            self._owner.unlink(
                missing_ok=True
            )  # two that do so at once may both go on: double work, no harm
            self.note += f", taken over from {holder}, which has ended"
        try:
            fd = os.open(self._owner, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            raise StoreBusy(
                self._owner.parent, holder, f"; if that process is gone, delete {self._owner}"
            ) from None
        with suppress(OSError), open(fd, "w") as file:
            file.write(self._text)

    def release(self) -> None:
        with suppress(OSError):
            if self._fd is None:
                return self._owner.unlink()
            os.truncate(self._fd, 0)
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # a forked child may still have it open
        os.close(self._fd)


class Store(AbstractContextManager):
    """All finished samples of one experiment, and the right to add some. Made by Store.open; leaving it closes it.

    len() and iteration are about samples with an ok record.
    """

    def __init__(self, directory: Path, config_id: str):
        self.directory, self.config_id, self.report = directory, config_id, Report()
        self._ok: dict[str, Entry] = {}
        self._failed: dict[str, Entry] = {}
        self._offsets: dict[Path, int] = {}  # how far each shard of another writer has been read
        self._created: dict[Path, float] = {}  # by its first line; unknown counts as the newest
        self._pid, self._open = os.getpid(), ExitStack()
        # the own shard, begun by the first put(): scoring alone leaves no file behind
        self._fd: int | None = None
        self.shard, self._synced, self._unended = directory, 0.0, False

    @classmethod
    def open(
        cls,
        root: Path,
        config: dict[str, Any],
        config_id: str,
        *,
        alone: bool = True,
        fresh: bool = False,
    ) -> Store:
        """The store of configuration `config_id` below `root`, made where there is none, with all that it holds.

        config: what the id stands for, ready for JSON; kept beside the samples and compared.
        alone:  take the lock. False joins an experiment that another process leads (a data parallel rank): own shard,
                shared view, no lock.
        fresh:  set aside what is there and begin with nothing; for the leader, before others join.
        Raises StoreBusy; StoreError where config.json is of another configuration or version; OutputError or StoreFull
        where the directory cannot be written.
        """
        if fresh and not alone:
            raise ValueError("fresh=True needs alone=True: others may already be writing")
        store = cls(Path(root) / config_id[:16], config_id)
        try:
            with _writing(store.directory):
                store.directory.mkdir(parents=True, exist_ok=True)
                if alone:
                    lock = _Lock(store.directory)
                    store._open.callback(lock.release)
                    store._note(lock.note)
                if fresh:
                    store._set_aside()
                store._check_config(config)
            store.refresh()
        except BaseException:
            store.close()
            raise
        return store

    def _note(self, text: str) -> None:
        if text:
            self.report.notes.append(text)
            logging.getLogger("dllmexp").warning(text)

    def _set_aside(self) -> None:
        (self.directory / "config.json").unlink(missing_ok=True)
        aside = self.directory / f"aside-{len(list(self.directory.glob('aside-*'))) + 1}"
        if shards := self._shards():
            aside.mkdir()
            for path in shards:
                path.rename(aside / path.name)
            self._note(f"{len(shards)} shards of earlier samples are set aside in {aside}")

    def _check_config(self, config: dict[str, Any]) -> None:
        path = self.directory / "config.json"
        wanted = {"config_id": self.config_id, "store_version": VERSION} | json.loads(
            canonical_json(config)
        )
        try:
            found = dict(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return atomic_write_json(path, wanted)
        except (ValueError, TypeError):
            raise StoreError(
                f"{path} is damaged; delete it: each sample names its configuration, none is lost"
            ) from None
        if found != wanted:
            differing = ", ".join(differing_keys(found, wanted)) or "null against absent"
            raise StoreError(
                f"{path} is of another configuration ({differing}); nothing of it is used: "
                "--overwrite sets it aside, another --output_dir leaves it alone"
            )

    def _shards(self) -> list[Path]:
        return [
            self.directory / name
            for name in sorted(os.listdir(self.directory))
            if name.startswith("shard-")
        ]

    def refresh(self) -> int:
        """Read what other writers have appended since the last time; the number of samples that are new."""
        before = len(self._ok)
        try:
            self.report.torn = sum(
                self._read(path) for path in self._shards() if path != self.shard
            )
        except OSError as error:
            raise StoreError(f"cannot read {self.directory}: {error}") from error
        return len(self._ok) - before

    def _read(self, path: Path) -> bool:
        """Take in the new lines of a shard; whether it ends in the middle of one."""
        offset = self._offsets.get(path, 0)
        with open(path, "rb") as file:  # opened anew each time: that is when NFS looks again
            file.seek(offset)
            *lines, rest = file.read().split(b"\n")
        for line in lines:
            self._read_line(path, offset, line)
            offset += len(line) + 1
        self._offsets[path] = offset
        return bool(rest)

    def _read_line(self, path: Path, offset: int, line: bytes) -> None:
        content = _content(line)
        if content is None:
            self.report.corrupt += bool(line)  # an empty one ends a torn line
            # where a newline was hit, the lines before and after it are still whole
            for part in [
                part
                for piece in LINE_START.split(line)
                for part in (piece, piece[:-1])
                if _content(part)
            ]:
                self._read_line(path, offset + line.index(part), part)
        elif (content.get("config_id"), content.get("version")) != (self.config_id, VERSION):
            self.report.foreign += 1
        elif "shard" in content:
            self._created[path] = content["shard"]["created"]
        else:
            self.report.loaded += 1
            self._take(content["record"], path, offset, line)

    def _take(self, record: Record, path: Path, offset: int, line: bytes) -> None:
        """Into the view: ok beats error, the first ok and the last error in order count."""
        key, entry = record["key"], (self._created.get(path, math.inf), path.name, offset, line)
        if record["status"] != "ok":
            self._failed[key] = max(entry, self._failed.get(key, entry))
            return
        if (kept := self._ok.setdefault(key, entry)) is entry:
            return
        if canonical_json(_content(kept[3])["record"]["result"]) == canonical_json(
            _content(line)["record"]["result"]
        ):
            self.report.duplicates += 1
        elif key not in self.report.conflicts:
            self.report.conflicts.add(key)
            self._note(
                f"not deterministic: sample {key[:16]} has different results in {kept[1]} and {path.name}"
            )
        self._ok[key] = min(kept, entry)

    def get(self, key: str) -> Record | None:
        """The ok record of a sample as it is on disk, a copy of one's own, or None."""
        return _content(self._ok[key][3])["record"] if key in self._ok else None

    def errors(self) -> list[Record]:
        """The last error record of each sample that has no ok record, in order of key."""
        return [
            _content(self._failed[key][3])["record"]
            for key in sorted(self._failed.keys() - self._ok.keys())
        ]

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._ok))

    def __len__(self) -> int:
        return len(self._ok)

    def put(self, key: str, record: Record) -> None:
        """Append a record: {"status": "ok" | "error", "result": {...}, "meta": {...}}, and "key" or not.

        result: what determinism promises to repeat, or what is known of a failure. meta: times, hosts, batch sizes.
        On return it survives the death of this process. Raises StoreFull or OutputError, and it is then not sure to be in
        the store; ValueError for a record of another form.
        """
        assert self._pid == os.getpid(), (
            "put() on a closed store, or in a forked process: a shard has one writer"
        )
        record = {"key": key, "meta": {}, "result": {}} | record
        kinds = [(name, type(value)) for name, value in sorted(record.items())]
        if kinds != FORM or record["key"] != key or record["status"] not in ("ok", "error"):
            raise ValueError(
                f"a record is {{status: ok | error, result: dict, meta: dict}}, got {record!r:.200} for {key!r}"
            )
        line = self._line(record=record)
        if self._fd is None:
            self._begin_shard()
        self._take(record, self.shard, self._append(line), line[:-1])
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self.flush()

    def _line(self, **content: Record) -> bytes:
        payload = canonical_json(
            {"config_id": self.config_id, "version": VERSION} | content
        ).encode("ascii")
        return b"%08x %b\n" % (zlib.crc32(payload), payload)

    def _begin_shard(self) -> None:
        n = 0
        while (path := self.directory / f"shard-{HOST}-{self._pid}-{n}.jsonl").exists():
            n += 1
        with _writing(path):
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
            self._open.callback(os.close, self._fd)
            self.shard, self._synced, created = path, time.monotonic(), time.time()
            self._append(self._line(shard={"created": created, "host": HOST, "pid": self._pid}))
            self._created[path] = created
            with (
                suppress(OSError),
                ExitStack() as stack,
            ):  # the new name survives a power loss, where the file system can
                stack.callback(os.close, directory := os.open(self.directory, os.O_RDONLY))
                os.fsync(directory)

    def _append(self, line: bytes) -> int:
        """The offset at which a line was written whole. A part of one is ended by a newline, now or before the next line."""
        with _writing(self.shard):
            data = b"\n" * self._unended + line
            self._unended = True
            if os.write(self._fd, data) < len(data):
                os.write(self._fd, b"\n")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._unended = False
            return os.lseek(self._fd, 0, os.SEEK_CUR) - len(line)

    def flush(self) -> None:
        """Make all that was put survive a power loss. Raises OutputError where the disk refuses or the shard is gone."""
        if self._fd is not None:
            with _writing(self.shard):
                getattr(os, "fdatasync", os.fsync)(self._fd)
                self._synced = time.monotonic()
                if os.fstat(self._fd).st_nlink == 0:
                    raise OutputError(
                        f"{self.shard} was deleted while this run was writing to it: start again"
                    )

    def close(self) -> None:
        """Flush, end the shard, free the lock. What was read stays readable. A second call does nothing."""
        with self._open:
            try:
                self.flush()
            finally:
                self._fd, self._pid = None, None

    def __exit__(self, *_: object) -> None:
        self.close()
