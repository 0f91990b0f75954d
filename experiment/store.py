"""The per-sample store behind resume: it keeps every finished sample of an experiment on disk.

    <root>/<config_id[:16]>/config.json                   the configuration, one setting a line
                            LOCK                          flock; its text names the holder
                            LOCK.owner                    only without flock: see _Lock
                            shard-<host>-<pid>-<n>.jsonl  append-only, one writer
                            status-<rank>.json            progress: see experiment/status.py
                            aside-<n>/                    shards that --overwrite set aside

A line of a shard is `<crc32 of the JSON: 8 hex> {JSON}\\n`, written by one os.write. Its JSON is
    {"config_id": ..., "shard":  {"created", "host", "pid"}, "version": 1}            (first line)
    {"config_id": ..., "record": {"key", "meta", "result", "status"}, "version": 1}   (one sample)
Every line names its configuration and version, so each can be read alone: a line of another id is
never used, and damage costs only the lines that it hits. Plain JSON: reading runs no code.

Guarantees
- Once put() has returned, the record survives the death of the process by any means, including
  kill -9.
- A power loss costs at most the samples of one second: fdatasync runs when a second has passed
  since the last one, and in flush() and close(). Derived from the design, not tested.
- A line without its newline (torn) or with a wrong CRC is not used; CRC-32 misses wide damage once
  in 4e9. A shard is never truncated, rewritten or deleted; --overwrite renames it.
- Every order of reading gives the same view: ok beats error; of two ok values the one in the older
  shard wins, and values that differ are reported as a failure of determinism.

Limits
- The lock avoids double work; the data are safe without it. Where locks hold on one node only
  (Lustre with `localflock`, NFS with `local_lock=all` or `nolock`) two processes write two shards,
  and equal samples count as duplicates.
- NFS has no atomic O_APPEND. A reader sees lines of another host once the writer has synced and
  the reader's caches have expired (by default within a minute): call flush() before a barrier, and
  expect refresh() to lag.
- A process forked without exec shares the lock until it ends or the store is closed.
- One Store belongs to one thread.
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
from collections.abc import Callable, Iterator, Sequence
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
    file_bytes,
    sha256,
    sync_directory,
    way_out,
)

VERSION = 1  # of the format above
SYNC_SECONDS = 1.0
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HOST = re.sub(r"[^A-Za-z0-9.-]", "_", os.uname().nodename)
# Where a line begins, even inside a damaged one: canonical JSON has ` {"` nowhere else.
LINE_START = re.compile(rb'(?=[0-9a-f]{8} \{")')
Record = dict[str, Any]
FORM = [("key", str), ("meta", dict), ("result", dict), ("status", str)]
# creation time and name of its shard, offset, line: every reader sorts entries alike
Entry = tuple[float, str, int, bytes]


class StoreError(DllmexpError):
    """The store is of another configuration or version, damaged or unreadable."""

    exit_code = EXIT_DATA


class StoreBusy(BusyError):
    """Another process has the store.

    holder: the text of its lock, such as `pid 4121 on node7 since 2025-11-23T22:11:02+0000 ...`.
    """

    def __init__(self, directory: Path, holder: str, way_out: str = ""):
        self.holder = holder or "a process that has just started"
        super().__init__(f"{directory} is in use by {self.holder}{way_out}")


class StoreFull(OutputError, OSError):
    """No space, quota or file size is left. Everything written before stays valid."""


def folder(root: str | Path, config_id: str) -> Path:
    """The directory of a configuration's store below `root`."""
    return Path(root) / config_id[:16]


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError of a write into StoreFull or OutputError."""
    try:
        yield
    except DllmexpError:
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise OutputError(f"cannot write {path}: {error.strerror}; {way_out(error)}") from error
        full = StoreFull(
            f"cannot write {path}: {error.strerror}; what is there stays good: "
            f"{way_out(error)}, start again"
        )
        full.errno = error.errno
        raise full from error


def sample_key(config_id: str, prompt: str, repeat: int, stops: Sequence[str] = ()) -> str:
    """Key of one sample, 64 hex: a hash of configuration, rendered prompt, repeat and stops."""
    return sha256([config_id, prompt, repeat, list(stops)])


def _content(line: bytes) -> Record | None:
    """The content of an undamaged line, else None."""
    if line[8:9] != b" " or line[:8] != b"%08x" % zlib.crc32(line[9:]):
        return None
    with suppress(ValueError, RecursionError):
        content = json.loads(line[9:])
        if isinstance(content, dict):
            return content
    return None


def _has_form(record: object) -> bool:
    """Whether a record is what put() takes."""
    kinds = isinstance(record, dict) and [(k, type(v)) for k, v in sorted(record.items())]
    return kinds == FORM and record["status"] in ("ok", "error")


@dataclass
class Report:
    """What a Store found on disk.

    loaded:     records of this configuration, failed ones included.
    torn:       shards whose last line has no end: the writer was killed, or is writing now.
    corrupt:    lines with a wrong checksum or of another form.
    duplicates: further ok records of a sample, with the same result.
    foreign:    lines of another configuration or version.
    conflicts:  keys with two different results: decoding was not deterministic.
    notes:      messages for the user, also logged.
    """

    loaded: int = 0
    torn: int = 0
    corrupt: int = 0
    duplicates: int = 0
    foreign: int = 0
    conflicts: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = {
            name: value if isinstance(value, int) else len(value)
            for name, value in vars(self).items()
        }
        return ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "nothing"


def process_start(pid: int) -> str | None:
    """Start time of a process of this host (proc(5), stat, field 22); None if it has ended.

    Without /proc every process counts as ended.
    """
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


class _Lock:
    """The exclusive right to run an experiment, from construction to release(). Raises StoreBusy.

    It is a flock on LOCK, which the kernel frees when its holder ends. On a file system without
    flock it is the file LOCK.owner, made with O_EXCL: the lock of a dead process of this host is
    taken over; whether a process of another host is alive cannot be known.
    """

    OWNER = re.compile(r"pid (\d+) on (\S+) since \S+ \(process start (\d+)\)")

    def __init__(self, directory: Path):
        self.note = ""
        self._owner = directory / "LOCK.owner"
        since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        start = process_start(os.getpid())
        self._text = f"pid {os.getpid()} on {HOST} since {since} (process start {start})"
        self._fd = self._flock(directory / "LOCK")
        if self._fd is None:
            self.note = f"{directory} has no flock: LOCK.owner is the lock"
            self._own()

    def _flock(self, path: Path) -> int | None:
        """A descriptor that holds the lock; None on a file system without flock."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 1000, 0).decode(errors="replace")
            os.close(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise StoreBusy(path.parent, holder, "; wait for it, or stop it") from None
            return None  # file systems without flock give many other codes, 524 among them
        with suppress(OSError):  # the text is for people: a full disk must not end the run
            os.truncate(fd, os.pwrite(fd, self._text.encode(), 0))
        return fd

    def _own(self) -> None:
        holder = ""
        with suppress(FileNotFoundError):
            holder = self._owner.read_text()
        found = self.OWNER.fullmatch(holder)
        if found and found[2] == HOST and process_start(int(found[1])) != found[3]:
            # two processes that do this at once may both go on: double work, no damage
            self._owner.unlink(missing_ok=True)
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
    """The finished samples of one experiment. Store.open() gives one to write to, a context.

    len() and iteration cover samples with an ok record.
    """

    def __init__(
        self,
        directory: Path,
        config_id: str,
        usable: Callable[[Record], bool] = lambda record: True,
    ):
        self.directory, self.config_id, self.report = directory, config_id, Report()
        self._usable = usable
        self._ok: dict[str, Entry] = {}
        self._failed: dict[str, Entry] = {}
        self._offsets: dict[Path, int] = {}  # bytes read of each shard of another writer
        self._created: dict[Path, float] = {}  # from its first line; unknown counts as the newest
        self._pid, self._open = os.getpid(), ExitStack()
        # the shard of this process, created by the first put(): scoring alone leaves no file
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
        usable: Callable[[Record], bool] = lambda record: True,
    ) -> Store:
        """The store of configuration `config_id` below `root`, created if missing, and read.

        config: the configuration, ready for JSON; written to config.json and compared with it.
        alone:  take the lock. False joins an experiment that another process leads (a data
                parallel rank): a shard of its own, no lock.
        fresh:  set aside the existing shards first; for the leader, before others join.
        usable: whether a record that was read has the content that the caller relies on.
        Raises StoreBusy; StoreError if config.json is of another configuration or version;
        OutputError or StoreFull if the directory cannot be written.
        """
        if fresh and not alone:
            raise ValueError("fresh=True needs alone=True: others may already be writing")
        store = cls(folder(root, config_id), config_id, usable)
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

    @classmethod
    def read(
        cls, directory: Path, config_id: str, usable: Callable[[Record], bool] = lambda record: True
    ) -> Store:
        """A view of the current content of a directory; writes nothing. Raises StoreError."""
        store = cls(directory, config_id, usable)
        if directory.is_dir():
            store.refresh()
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
        found = None
        try:
            found = json.loads(file_bytes(path))
        except FileNotFoundError:
            return atomic_write_json(path, wanted)
        except PermissionError:
            raise
        except (OSError, ValueError, RecursionError):
            pass
        if not isinstance(found, dict):
            raise StoreError(f"{path} is damaged. Delete it; no sample is lost")
        if found != wanted:
            differing = ", ".join(differing_keys(found, wanted)) or "null against absent"
            raise StoreError(
                f"{path} is of another configuration ({differing}); its samples are not used: "
                "--overwrite sets them aside, another --output_dir leaves them alone"
            )

    def _shards(self) -> list[Path]:
        return [
            self.directory / name
            for name in sorted(os.listdir(self.directory))
            if name.startswith("shard-") and (self.directory / name).is_file()
        ]

    def refresh(self) -> int:
        """Read what other writers have appended since the last call; the number of new samples."""
        before = len(self._ok)
        try:
            self.report.torn = sum(
                self._read(path) for path in self._shards() if path != self.shard
            )
        except PermissionError as error:
            raise OutputError(
                f"{error.filename}: no permission to read it; give another --output_dir"
            ) from error
        except OSError as error:
            raise StoreError(f"cannot read {self.directory}: {error}") from error
        return len(self._ok) - before

    def _read(self, path: Path) -> bool:
        """Read the new lines of a shard; whether it ends within a line."""
        offset = self._offsets.get(path, 0)
        with open(path, "rb") as file:  # opened each time: NFS revalidates its cache on open
            file.seek(offset)
            *lines, rest = file.read().split(b"\n")
        for line in lines:
            self._read_line(path, offset, line)
            offset += len(line) + 1
        *lines, rest = LINE_START.split(rest)  # where newlines were lost
        lines, rest = ([*lines, rest], b"") if any(lines) and _content(rest) else (lines, rest)
        for line in lines:
            self._read_line(path, offset, line)
            offset += len(line)
        self._offsets[path] = offset
        return bool(rest)

    def _read_line(self, path: Path, offset: int, line: bytes) -> None:
        content = _content(line)
        if content is None:
            self.report.corrupt += bool(line)  # an empty one ends a torn line
            # if a newline was hit, the lines before and after it are still whole
            for part in [
                part
                for piece in LINE_START.split(line)
                for part in (piece, piece[:-1])
                if _content(part)
            ]:
                self._read_line(path, offset + line.index(part), part)
        elif (content.get("config_id"), content.get("version")) != (self.config_id, VERSION):
            self.report.foreign += 1
        elif _has_form(record := content.get("record")) and self._usable(record):
            self.report.loaded += 1
            self._take(record, path, offset, line)
        elif (
            isinstance(shard := content.get("shard"), dict) and type(shard.get("created")) is float
        ):
            self._created[path] = shard["created"]
        else:
            self.report.corrupt += 1

    def _take(self, record: Record, path: Path, offset: int, line: bytes) -> None:
        """Add a record to the view: ok beats error; the first ok and the last error count."""
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
                f"not deterministic: sample {key[:16]} has different results "
                f"in {kept[1]} and {path.name}"
            )
        self._ok[key] = min(kept, entry)

    def get(self, key: str) -> Record | None:
        """A copy of the ok record of a sample, as it is on disk, or None."""
        return _content(self._ok[key][3])["record"] if key in self._ok else None

    def errors(self) -> list[Record]:
        """The last error record of each sample without an ok record, sorted by key."""
        return [
            _content(self._failed[key][3])["record"]
            for key in sorted(self._failed.keys() - self._ok.keys())
        ]

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._ok))

    def __len__(self) -> int:
        return len(self._ok)

    def put(self, key: str, record: Record) -> None:
        """Append {"status": "ok" | "error", "result": {...}, "meta": {...}}; "key" is optional.

        result: the reproducible part, or the description of a failure.
        meta:   the rest: times, hosts, batch sizes.
        On return the record survives the death of this process. Raises StoreFull or OutputError,
        after which the record may be missing; ValueError for a record of another form.
        """
        assert self._pid == os.getpid(), (
            "put() on a closed store, or in a forked process: a shard has one writer"
        )
        record = {"key": key, "meta": {}, "result": {}} | record
        if not _has_form(record) or record["key"] != key:
            raise ValueError(
                "a record is {status: ok | error, result: dict, meta: dict}, "
                f"got {record!r:.200} for {key!r}"
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
            sync_directory(self.directory)

    def _append(self, line: bytes) -> int:
        """Write a line; its offset. A newline, now or in the next call, ends a partial line."""
        with _writing(self.shard):
            data = b"\n" * self._unended + line
            self._unended = True
            if os.write(self._fd, data) < len(data):
                os.write(self._fd, b"\n")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._unended = False
            return os.lseek(self._fd, 0, os.SEEK_CUR) - len(line)

    def flush(self) -> None:
        """Sync the shard to disk. Raises OutputError if that fails or the shard was deleted."""
        if self._fd is not None:
            with _writing(self.shard):
                getattr(os, "fdatasync", os.fsync)(self._fd)
                self._synced = time.monotonic()
                if os.fstat(self._fd).st_nlink == 0:
                    raise OutputError(
                        f"{self.shard} was deleted while this run was writing to it: start again"
                    )

    def close(self) -> None:
        """Flush, end the shard, free the lock. get() still works; a second call does nothing."""
        with self._open:
            try:
                self.flush()
            finally:
                self._fd, self._pid = None, None

    def __exit__(self, *_: object) -> None:
        self.close()
