"""Directories that programs may write to: in memory, one below another per run of the harness, swept when it is dead.

<root>/dllmexp-<uid>-<random>/         one per harness process, mode 0700
    lock                               held (flock) as long as that process lives, whatever kills it
    lib/                               child.py and oracle.py, compiled
    <random>/                          the working directory of one program
Memory rather than disk: creating files on a busy disk is slow enough to change a verdict.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
import py_compile
import secrets
import shutil
import stat
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
MODULES = ("child", "oracle")
MAX_ENTRIES = 20_000  # files and directories that one program may leave in its scratch
ROOM_BYTES = 1 << 30


def roots() -> list[str]:
    """Where runs may be kept, the best first: shared memory, the user's runtime directory, what TMPDIR says."""
    found = (
        path
        for path in ("/dev/shm", os.environ.get("XDG_RUNTIME_DIR") or "")
        if path and os.path.isdir(path)
    )
    return [
        *(path for path in found if os.access(path, os.R_OK | os.W_OK | os.X_OK)),
        tempfile.gettempdir(),
    ]


def root() -> str:
    """The first with room for several programs: a container's /dev/shm often has 64 MiB, which one could fill."""
    found = roots()
    return next((path for path in found if shutil.disk_usage(path).free >= ROOM_BYTES), found[-1])


def prefix() -> str:
    return f"dllmexp-{os.geteuid()}-"


class Run:
    """The directory of this process. Made on first use, and again where something took it away."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._path: str | None = None
        self._pid = 0
        self._lock = -1

    def path(self) -> str:
        with self._guard:
            gone = self._path is None or not os.path.isdir(f"{self._path}/lib")
            if (
                gone or self._pid != os.getpid()
            ):  # a fork has to make its own: the lock is its parent's
                self._make()
            return self._path

    def lib(self) -> str:
        return f"{self.path()}/lib"

    def _make(self) -> None:
        sweep()
        atexit.register(self.close)
        self._path = tempfile.mkdtemp(prefix=prefix(), dir=root())
        self._pid = os.getpid()
        self._lock = os.open(f"{self._path}/lock", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.mkdir(f"{self._path}/lib")
        for name in (
            MODULES
        ):  # an interpreter starts faster from compiled code, and __pycache__ may be read-only
            py_compile.compile(
                str(HERE / f"{name}.py"), f"{self._path}/lib/{name}.pyc", doraise=True
            )

    def close(self) -> None:
        """Remove the directory, at the end of the process."""
        with self._guard:
            if self._path is not None and self._pid == os.getpid():
                remove(self._path)
                os.close(self._lock)
                self._path = None


RUN = Run()


class Scratch:
    """A new directory, removed at the end also where the program took its own permissions away."""

    def __enter__(self) -> str:
        self.path = tempfile.mkdtemp(prefix="s", dir=RUN.path())
        return self.path

    def __exit__(self, *_exc) -> None:
        remove(self.path)


def remove(path: str) -> None:
    """Remove a tree, following no link. What cannot be removed is left to the next sweep: it must not fail a run.

    What has just been killed may write for a moment yet - bubblewrap's own end is told before that of its program - so
    a tree that is not empty then is emptied again.
    """
    if os.path.islink(path):
        return
    for pause_s in (0.0, 0.01, 0.1, 0.5):
        time.sleep(pause_s)
        _empty(path)
        try:
            return os.rmdir(path)
        except FileNotFoundError:
            return
        except OSError:
            continue


def _empty(path: str) -> None:
    """Remove what is in a directory, as far as it can be removed.

    A directory found in another is first moved up to `path`: however deep a program nested them, no path gets too long
    and nothing here recurses.
    """
    waiting = [path]
    while waiting:
        folder = waiting.pop()
        with contextlib.suppress(OSError):
            os.chmod(folder, 0o700)  # the program may have taken its own permissions away
            for entry in list(os.scandir(folder)):
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        os.chmod(
                            entry.path, 0o700
                        )  # moving a directory writes to it: its ".." changes
                        moved = f"{path}/{secrets.token_hex(8)}"
                        os.rename(entry.path, moved)
                        waiting.append(moved)
                    else:
                        os.unlink(entry.path)
        if folder != path:
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def sweep() -> list[str]:
    """Remove the directories of this user's dead runs; their paths. A run is dead when nobody holds its lock."""
    swept = []
    for folder in dict.fromkeys(roots()):
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if name.startswith(prefix()) and _is_dead(path):
                remove(path)
                swept.append(path)
    return swept


def _is_dead(path: str) -> bool:
    try:
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return False
        lock = os.open(f"{path}/lock", os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:  # it is being made, or was left half made
        return os.path.isdir(path) and time.time() - status.st_mtime > 60
    except OSError:
        return False
    try:
        # a lock that is only just being taken: the run has no lib/ yet
        fresh = time.time() - os.fstat(lock).st_mtime < 60 and not os.path.isdir(f"{path}/lib")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return not fresh
    except OSError:
        return False
    finally:
        os.close(lock)


def holds(path: str, most_bytes: int) -> bool:
    """Whether a scratch directory holds more than most_bytes, more than MAX_ENTRIES files and directories, or a
    directory that cannot be looked into: nested too deep, or closed to its owner. Raises OSError."""
    total = entries = 0
    waiting = [path]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as found:
                for entry in found:
                    entries += 1
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if total > most_bytes or entries > MAX_ENTRIES:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.EACCES):
                return True
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):  # those went away meanwhile
                raise
    return False
