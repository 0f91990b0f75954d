"""sha256 of weight files: over all their bytes, computed once, kept in the user's cache.

    $XDG_CACHE_HOME/dllmexp/digests.json     {"<path> <size> <mtime_ns> <inode>": sha256}

It also has the sha256 of the rows of a data set of the hub, as they were last loaded.

A file that is written anew has another time or inode, and is hashed again. The cache only saves
time: a damaged, lost or read-only one costs another hashing.
"""

import fcntl
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event

from models.config import CheckpointError
from utils import OutputError, atomic_write_json

MOST_THREADS = 8
MOST_KEPT = 5000  # entries of the cache; the oldest leave
CHUNK = 1 << 22  # bytes that are hashed between two looks at the bar
LONG = 10**9  # bytes from which a bar is shown in a log, too

_known: dict[str, str] = {}  # what this process has added


def kept_digests(paths: Iterable[Path]) -> dict[Path, str]:
    """Path -> sha256 of the files whose digest is kept. Hashes nothing. Raises OSError."""
    keys = {path: _key(path, path.stat()) for path in paths}
    found = kept(keys.values())
    return {path: found[key] for path, key in keys.items() if key in found}


def digests(paths: Sequence[Path]) -> dict[Path, str]:
    """Path -> sha256 of each file, hashed where it is not kept.

    Raises OSError, and CheckpointError where a file changes while it is read.
    """
    found = kept_digests(paths)
    if len(found) < len(set(paths)):
        with _lock():  # another process may have hashed them in the meantime
            found = kept_digests(paths)
            new = _hashed([path for path in dict.fromkeys(paths) if path not in found])
            _add(dict(new.values()))
        found |= {path: digest for path, (_, digest) in new.items()}
    return found


def _key(path: Path, stat: os.stat_result) -> str:
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"


def _hashed(paths: Sequence[Path]) -> dict[Path, tuple[str, str]]:
    """Path -> key and sha256, with one thread for each file and a bar over the bytes."""
    from tqdm import tqdm

    total, ended = sum(path.stat().st_size for path in paths), Event()
    terminal = sys.stderr.isatty()
    with (
        tqdm(
            total=total,
            desc="hashing weights, once",
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
            leave=False,
            mininterval=0.1 if terminal else 10.0,
            disable=not (terminal or total > LONG),
        ) as bar,
        ThreadPoolExecutor(max(1, min(MOST_THREADS, len(paths)))) as pool,
    ):
        try:
            found = pool.map(lambda path: _hash(path, bar.update, ended), paths)
            return dict(zip(paths, found, strict=True))
        except BaseException:  # Ctrl-C: the threads must not read on to the end
            ended.set()
            raise


def _hash(path: Path, advance, ended: Event) -> tuple[str, str]:
    """The key and the sha256 of a file."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        key = _key(path, os.fstat(file.fileno()))
        while (n := file.readinto(buffer)) and not ended.is_set():
            digest.update(buffer[:n])
            advance(n)
        if _key(path, os.fstat(file.fileno())) != key:
            raise CheckpointError(f"{path} changes while it is read; start again once it is whole")
    return key, digest.hexdigest()


# ---- the cache


def kept(keys: Iterable[str]) -> dict[str, str]:
    """Key -> digest, of the keys that this process or the cache has."""
    keys = set(keys)
    known = _known if _known.keys() >= keys else _read() | _known
    return {key: known[key] for key in keys & known.keys()}


def keep(key: str, digest: str) -> None:
    """Put a digest into the cache, where it is not there yet."""
    if kept([key]) != {key: digest}:
        with _lock():
            _add({key: digest})


def _add(new: dict[str, str]) -> None:
    """Add entries; the caller has the lock."""
    _known.update(new)
    entries = list((_read() | new).items())[-MOST_KEPT:]
    with suppress(OutputError, OSError):
        atomic_write_json(_folder() / "digests.json", dict(entries))


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "dllmexp"


def _read() -> dict[str, str]:
    with suppress(OSError, ValueError, RecursionError):
        kept = json.loads((_folder() / "digests.json").read_bytes())
        if isinstance(kept, dict):
            return {
                key: digest
                for key, digest in kept.items()
                if isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)
            }
    return {}


@contextmanager
def _lock() -> Iterator[None]:
    """One process of this user hashes at a time; without a lock they hash the same file twice."""
    fd = None
    with suppress(OSError):
        _folder().mkdir(parents=True, exist_ok=True)
        fd = os.open(_folder() / "digests.lock", os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if fd is not None:
            os.close(fd)
