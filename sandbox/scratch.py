"""Directories that programs may write to, in memory: a busy disk could change a verdict.

<root>/dllmexp-<uid>-<random>/    one per harness process, mode 0700
    lock                          locked (flock) while that process lives
    lib/                          child.py and oracle.py, compiled
    s<random>/                    working directory of one program
A directory whose lock is free belongs to a dead process; the next run removes it.
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

from utils import EnvironmentProblem

HERE = Path(__file__).parent
MODULES = ("child", "oracle")
MAX_ENTRIES, MAX_DEPTH = 20_000, 64  # files and directories of one program
FULL_BYTES = 16 << 20  # with less room a program may fail through no fault of its own
ROOM_BYTES = 1 << 30


def roots() -> list[str]:
    """Possible roots, the best first: shared memory, the user's runtime directory, TMPDIR."""
    found = [path for path in ("/dev/shm", os.environ.get("XDG_RUNTIME_DIR")) if path]
    usable = [
        path
        for path in found
        if os.path.isdir(path) and os.access(path, os.R_OK | os.W_OK | os.X_OK)
    ]
    try:
        return [*usable, tempfile.gettempdir()]
    except FileNotFoundError:
        return usable


def root() -> str:
    """The first root with room for several programs: a container's /dev/shm often has 64 MiB."""
    found = roots()
    if not found:
        raise EnvironmentProblem(
            "programs need a directory to write to, and /dev/shm and the temporary directories are "
            "not writable: set TMPDIR, or --no_exec keeps the programs for another machine"
        )
    return next((path for path in found if shutil.disk_usage(path).free >= ROOM_BYTES), found[-1])


def prefix() -> str:
    return f"dllmexp-{os.geteuid()}-"


class Run:
    """The directory of this process. Made on first use, and again if something has removed it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._path: str | None = None
        self._pid = 0
        self._lock = -1

    def path(self) -> str:
        with self._guard:
            gone = self._path is None or not os.path.isdir(f"{self._path}/lib")
            # a forked process makes its own: the lock is its parent's
            if gone or self._pid != os.getpid():
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
        # an interpreter starts faster from compiled code; __pycache__ may be read-only
        for name in MODULES:
            compiled = f"{self._path}/lib/{name}.pyc"
            py_compile.compile(str(HERE / f"{name}.py"), compiled, doraise=True)

    def close(self) -> None:
        """Remove the directory, at the end of the process."""
        with self._guard:
            if self._path is not None and self._pid == os.getpid():
                remove(self._path)
                os.close(self._lock)
                self._path = None


RUN = Run()


class Scratch:
    """A new directory, removed at exit even if the program took its own permissions away."""

    def __enter__(self) -> str:
        self.path = tempfile.mkdtemp(prefix="s", dir=RUN.path())
        return self.path

    def __exit__(self, *_exc) -> None:
        remove(self.path)


def remove(path: str) -> None:
    """Remove a tree, following no link. It does not fail: the next sweep removes what is left.

    Processes that were just killed may still write for a moment (bubblewrap exits before its
    program), so that the tree is emptied several times if necessary.
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
    """Remove the content of a directory, as far as possible.

    A directory in it is first moved up to `path`, so that however deep the tree is, no path gets
    too long and nothing recurses.
    """
    waiting = [path]
    while waiting:
        folder = waiting.pop()
        with contextlib.suppress(OSError):
            os.chmod(folder, 0o700)
            for entry in list(os.scandir(folder)):
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        os.chmod(entry.path, 0o700)  # moving a directory writes its ".."
                        moved = f"{path}/{secrets.token_hex(8)}"
                        os.rename(entry.path, moved)
                        waiting.append(moved)
                    else:
                        os.unlink(entry.path)
        if folder != path:
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def sweep() -> list[str]:
    """Remove the directories of this user's dead processes. Returns their paths."""
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
    except FileNotFoundError:  # it has no lock: being made, or left half made
        return os.path.isdir(path) and time.time() - status.st_mtime > 60
    except OSError:
        return False
    try:
        # a process that is about to take its lock has no lib/ yet
        fresh = time.time() - os.fstat(lock).st_mtime < 60 and not os.path.isdir(f"{path}/lib")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return not fresh
    except OSError:
        return False
    finally:
        os.close(lock)


def free_bytes() -> int:
    """Room on the file system of the scratch directories."""
    found = os.statvfs(RUN.path())
    return found.f_bavail * found.f_frsize


def holds_too_much(path: str, max_bytes: int) -> bool:
    """Whether a directory holds more than max_bytes, MAX_ENTRIES or MAX_DEPTH, or cannot be read.

    The program may exchange its directories for links meanwhile: each is opened from the one above
    it, and no link is followed. Raises OSError for what no program can cause.
    """
    return _exceeds(path, None, [max_bytes, MAX_ENTRIES], MAX_DEPTH)


def _exceeds(name: str, above: int | None, left: list[int], depth: int) -> bool:
    """Take what a directory holds from left: bytes, entries. above: descriptor of its parent."""
    folder = -1
    try:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK
        folder, inner = os.open(name, flags, dir_fd=above), []
        with os.scandir(folder) as found:
            for entry in found:
                status = entry.stat(follow_symlinks=False)
                left[0] -= status.st_blocks * 512
                left[1] -= 1
                if min(left) < 0:
                    return True
                if stat.S_ISDIR(status.st_mode):
                    inner.append(entry.name)
        return (bool(inner) and depth == 0) or any(
            _exceeds(entry, folder, left, depth - 1) for entry in inner
        )
    except OSError as error:
        if error.errno == errno.EACCES:
            return True
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # changed meanwhile
            raise
        return False
    finally:
        if folder >= 0:
            os.close(folder)
