"""Confinement for kernels without Landlock: namespaces, and a file system of readable paths."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence


def program() -> str | None:
    """Path of bwrap, or None."""
    return shutil.which("bwrap")


def command(bwrap: str, folder: str, lib: str, readable: Sequence[str]) -> list[str]:
    """bwrap and its arguments; the command that it runs has to follow.

    Start it with a clean environment: programs can read it as /proc/1/environ, also under
    --clearenv.
    """
    binds: list[str] = []
    for path in dict.fromkeys([*readable, *_interpreter(), lib, os.devnull]):
        # a device works only so; --dev would make more devices than these
        device = stat.S_ISCHR(os.stat(path).st_mode)
        binds += ["--dev-bind" if device else "--ro-bind", path, path]
    return [
        bwrap,
        "--unshare-all",
        "--die-with-parent",
        "--new-session",
        "--cap-drop",
        "ALL",
        *_links(),
        *binds,
        "--bind",
        folder,
        folder,
        "--remount-ro",
        "/",
        "--chdir",
        folder,
        "--",
    ]


def _links() -> list[str]:
    """/lib and /lib64 where they are links: the path of the dynamic loader goes through them."""
    return [
        word
        for name in ("/lib", "/lib64")
        if os.path.islink(name)
        for word in ("--symlink", os.readlink(name), name)
    ]


def _interpreter() -> list[str]:
    """The interpreter's path, the links on the way to its file, and its pyvenv.cfg."""
    paths = [sys.executable, os.path.realpath(sys.executable), f"{sys.prefix}/pyvenv.cfg"]
    link = sys.executable
    while os.path.islink(link):
        link = os.path.join(os.path.dirname(link), os.readlink(link))
        paths.append(os.path.normpath(link))
    return [path for path in paths if os.path.exists(path)]


def problem(bwrap: str) -> str | None:
    """Why bwrap does not run here, by its own message, or None."""
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
