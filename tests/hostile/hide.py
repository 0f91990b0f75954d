"""Run a command as on a machine that lacks features: hide.py landlock,namespaces,seccomp COMMAND...

A seccomp filter makes the calls fail as where a kernel or an administrator refuses them. All
descendants inherit it, so that the sandbox has to find it out: RHEL 8 (no Landlock), Ubuntu 24.04
(no user namespaces), old containers (neither, or no seccomp).
"""

import ctypes
import errno
import os
import struct
import sys

X86 = os.uname().machine == "x86_64"
UNSHARE, CLONE, CLONE3, PRCTL, SECCOMP = (
    (272, 56, 435, 157, 317) if X86 else (97, 220, 435, 167, 277)
)
NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
LOAD, EQUAL, ANY_OF, RETURN, ALLOW = 0x20, 0x15, 0x45, 0x06, 0x7FFF0000


def fails(number: int, code: int) -> list:
    return [(EQUAL, 0, 1, number), (RETURN, 0, 0, 0x50000 | code)]


def fails_if(number: int, test: tuple, code: int) -> list:
    """Fails where the first argument passes the test; then loads the call's number again."""
    return [
        (EQUAL, 0, 4, number),
        (LOAD, 0, 0, 16),
        (*test[:1], 0, 1, *test[1:]),
        (RETURN, 0, 0, 0x50000 | code),
        (LOAD, 0, 0, 0),
    ]


HIDDEN = {
    "landlock": [step for number in (444, 445, 446) for step in fails(number, errno.ENOSYS)],
    "namespaces": [
        *fails_if(UNSHARE, (ANY_OF, NAMESPACES), errno.EPERM),
        *fails_if(CLONE, (ANY_OF, NAMESPACES), errno.EPERM),
        *fails(CLONE3, errno.ENOSYS),
    ],
    "seccomp": [*fails_if(PRCTL, (EQUAL, 22), errno.EINVAL), *fails(SECCOMP, errno.EINVAL)],
}


def hide(features: list[str]) -> None:
    program = [
        (LOAD, 0, 0, 0),
        *(step for name in features for step in HIDDEN[name]),
        (RETURN, 0, 0, ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in program))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)
    if libc.prctl(22, 2, struct.pack("@HP", len(program), ctypes.addressof(code))) != 0:
        sys.exit(f"hide.py: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    hide([name for name in sys.argv[1].split(",") if name])
    os.execvp(sys.argv[2], sys.argv[2:])
