"""Which files a confined program may reach: a rule set of the kernel's Landlock (Linux 5.13).

Readable: the standard library, site-packages, shared libraries, time zones.
Writable: the scratch directory. Executable: nothing.
Version 4 also forbids TCP, version 6 signals and abstract sockets to processes outside. stat()
still shows type, size and mode of any path.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import sysconfig
from pathlib import Path

CREATE_RULESET = 444  # the same number on every architecture
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE = 1 << 4, 1 << 5
MAKE_DIR, MAKE_REG, MAKE_SYM = 1 << 7, 1 << 8, 1 << 12
REFER, TRUNCATE = 1 << 13, 1 << 14
READ = READ_FILE | READ_DIR
SCRATCH = (
    READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM | REFER | TRUNCATE
)
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE  # the others apply to directories only
SYSTEM_PATHS = """
/lib /lib64 /usr/lib /usr/lib64 /usr/local/lib /etc/ld.so.cache /etc/ld.so.conf
/usr/share/zoneinfo /etc/localtime /dev/zero /dev/urandom /dev/random
"""


@functools.cache
def version() -> tuple[int, str]:
    """The kernel's Landlock version and "", or 0 and why there is none."""
    if sys.platform != "linux":  # the number is another call there
        return 0, f"not on {sys.platform}"
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if found > 0:
        return found, ""
    import errno

    code = ctypes.get_errno()
    return 0, f"{errno.errorcode.get(code, code)} (kernel {os.uname().release})"


def handled(abi: int) -> tuple[int, int, int]:
    """(file rights, network rights, scopes) that are forbidden unless a rule allows them."""
    files = (1 << 13) - 1
    files |= REFER if abi >= 2 else 0
    files |= TRUNCATE if abi >= 3 else 0
    files |= 1 << 15 if abi >= 5 else 0  # ioctl on devices
    return files, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0


@functools.cache
def readable() -> tuple[str, ...]:
    """Paths that a Python program may need to read; never the home directory or one above it."""
    base = Path(sys.base_prefix)
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")] + list(site_packages())
    paths += [str(base / "lib"), *(str(p) for p in base.glob("lib64"))]
    paths += [sysconfig.get_config_var("LIBDIR") or "/usr/lib", *SYSTEM_PATHS.split()]
    home = Path(os.path.realpath(os.path.expanduser("~")))
    real = (Path(os.path.realpath(path)) for path in dict.fromkeys(paths) if os.path.exists(path))
    return tuple(dict.fromkeys(str(p) for p in real if p != home and p not in home.parents))


@functools.cache
def site_packages() -> tuple[str, ...]:
    """Without links on the way: bubblewrap makes only what they lead to."""
    paths = (sysconfig.get_path(name) for name in ("purelib", "platlib"))
    return tuple(dict.fromkeys(os.path.realpath(path) for path in paths))


def rules(scratch: str, abi: int) -> list[tuple[str, int]]:
    """(path, rights) of everything that is allowed."""
    files = handled(abi)[0]

    def rights(path: str, wanted: int) -> tuple[str, int]:
        return path, wanted & files & (-1 if os.path.isdir(path) else FILE_RIGHTS)

    return [*_readable_rules(abi), rights("/dev/null", READ | WRITE_FILE), rights(scratch, SCRATCH)]


@functools.cache
def _readable_rules(abi: int) -> tuple[tuple[str, int], ...]:
    return tuple((path, READ if os.path.isdir(path) else READ_FILE) for path in readable())
