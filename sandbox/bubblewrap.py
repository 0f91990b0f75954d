"""The cell for kernels without Landlock: a file system of what a program may read, and namespaces of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence


def program() -> str | None:
    """Path of bwrap, or None."""
    return shutil.which("bwrap")


def command(bwrap: str, folder: str, lib: str, readable: Sequence[str]) -> list[str]:
    """bwrap and its arguments; what it shall run comes after them.

    Its own environment has to be clean too, whatever --clearenv says: /proc/1/environ inside is that one.
    """
    binds: list[str] = []
    for path in dict.fromkeys([*readable, *_interpreter(), lib]):
        if path not in ("/dev/zero", "/dev/urandom", "/dev/random"):  # --dev makes them
            binds += ["--ro-bind", path, path]
    return [
        bwrap,
        "--unshare-all",
        "--die-with-parent",
        "--new-session",
        "--cap-drop",
        "ALL",
        *_links(),
        "--dev",
        "/dev",
        *binds,
        "--bind",
        folder,
        folder,
        "--remount-ro",
        "/dev",
        "--remount-ro",
        "/",
        "--chdir",
        folder,
        "--",
    ]


def _links() -> list[str]:
    """/lib and the like, where they are links into /usr: the loader is looked for through them."""
    return [
        word
        for name in ("/lib", "/lib64")
        if os.path.islink(name)
        for word in ("--symlink", os.readlink(name), name)
    ]


def _interpreter() -> list[str]:
    """The interpreter as it is called and as it is, and what tells it where its library is."""
    paths = [sys.executable, os.path.realpath(sys.executable), f"{sys.prefix}/pyvenv.cfg"]
    link = sys.executable
    while os.path.islink(link):
        link = os.path.join(os.path.dirname(link), os.readlink(link))
        paths.append(os.path.normpath(link))
    return [path for path in paths if os.path.exists(path)]


def problem(bwrap: str) -> str | None:
    """Why bwrap does not run here, in its own words, or None."""
    arguments = [
        "--unshare-all",
        "--die-with-parent",
        "--ro-bind",
        "/",
        "/",
        "--",
        sys.executable,
        "-S",
        "-c",
        "",
    ]
    try:
        run = subprocess.run(
            [bwrap, *arguments], env={}, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
    return lines[-1].removeprefix("bwrap: ") if run.returncode else None
