"""The system calls that a confined program may not make, as a seccomp filter in classic BPF.

It is a deny list, so that numpy, threads, asyncio and newer C libraries keep working. It closes
what Landlock, rlimits and missing privileges leave open: new processes, other processes, the
network, kernel objects that outlive the process, changes of files that need no open (chown, ...),
extended attributes, and calls that are newer than this table.
aarch64: the numbers come from the kernel's generic table; only x86_64 has been run.
"""

from __future__ import annotations

import errno
import platform
import struct
import sys
from dataclasses import dataclass

# name, x86_64, aarch64 ("-": the architecture does not have it). include/uapi/asm-generic/unistd.h
# and its x86 twin
DENIED = """
fork 57 -|vfork 58 -|execve 59 221|execveat 322 281|socket 41 198|connect 42 203|bind 49 200|
listen 50 201|accept 43 202|accept4 288 242|sendmsg 46 211|sendmmsg 307 269|io_uring_setup 425 425|
io_uring_enter 426 426|io_uring_register 427 427|tkill 200 130|rt_sigqueueinfo 129 138|
rt_tgsigqueueinfo 297 240|timer_create 222 107|pidfd_open 434 434|pidfd_getfd 438 438|
pidfd_send_signal 424 424|ptrace 101 117|process_vm_readv 310 270|process_vm_writev 311 271|
process_madvise 440 440|process_mrelease 448 448|kcmp 312 272|migrate_pages 256 238|
move_pages 279 239|unshare 272 97|setns 308 268|mount 165 40|umount2 166 39|mount_setattr 442 442|
move_mount 429 429|open_tree 428 428|fsopen 430 430|fsconfig 431 431|fsmount 432 432|fspick 433 433|
pivot_root 155 41|chroot 161 51|open_tree_attr 467 467|mknod 133 -|mknodat 259 33|swapon 167 224|
swapoff 168 225|reboot 169 142|acct 163 89|quotactl 179 60|quotactl_fd 443 443|init_module 175 105|
finit_module 313 273|delete_module 176 106|kexec_load 246 104|kexec_file_load 320 294|bpf 321 280|
perf_event_open 298 241|userfaultfd 323 282|keyctl 250 219|add_key 248 217|request_key 249 218|
shmget 29 194|shmat 30 196|shmctl 31 195|semget 64 190|semop 65 193|semtimedop 220 192|
semctl 66 191|msgget 68 186|msgsnd 69 189|msgrcv 70 188|msgctl 71 187|mq_open 240 180|
mq_unlink 241 181|open_by_handle_at 304 265|name_to_handle_at 303 264|fanotify_init 300 262|
fanotify_mark 301 263|inotify_init 253 -|inotify_init1 294 26|inotify_add_watch 254 27|sync 162 81|
syncfs 306 267|setpgid 109 154|get_robust_list 274 100|setpriority 141 140|ioprio_set 251 30|
sched_setaffinity 203 122|
sched_setparam 142 118|sched_setscheduler 144 119|sched_setattr 314 274|setrlimit 160 164|
truncate 76 45|chown 92 -|fchown 93 55|lchown 94 -|fchownat 260 54|
file_setattr 469 469|
memfd_create 319 279|memfd_secret 447 447|personality 135 92|modify_ldt 154 -|iopl 172 -|
ioperm 173 -|syslog 103 116|vhangup 153 58|lookup_dcookie 212 18|settimeofday 164 170|
clock_settime 227 112|clock_adjtime 305 266|adjtimex 159 171|sethostname 170 161|
setdomainname 171 162|setuid 105 146|setgid 106 144|setreuid 113 145|setregid 114 143|
setresuid 117 147|setresgid 119 149|setgroups 116 159|setfsuid 122 151|setfsgid 123 152|
capset 126 91
"""
# extended attributes, which Landlock leaves open, of files outside too. "not supported": libraries
# that copy files do without
UNSUPPORTED = """
setxattr 188 5|lsetxattr 189 6|fsetxattr 190 7|getxattr 191 8|lgetxattr 192 9|fgetxattr 193 10|
listxattr 194 11|llistxattr 195 12|flistxattr 196 13|removexattr 197 14|lremovexattr 198 15|
fremovexattr 199 16|setxattrat 463 463|getxattrat 464 464|listxattrat 465 465|removexattrat 466 466
"""
# mode and times of files: nothing is changed and 0 is returned, since Landlock would let a program
# change files outside, and honest programs do it to files of their own (shutil.copy, Path.touch)
WITHOUT_EFFECT = """
chmod 90 -|fchmod 91 52|fchmodat 268 53|fchmodat2 452 452|utime 132 -|utimes 235 -|
utimensat 280 88|futimesat 261 -
"""
# their arguments decide: see _by_arguments
SPECIAL = """
clone 56 220|clone3 435 435|openat2 437 437|kill 62 129|tgkill 234 131|prctl 157 167|
prlimit64 302 261|fcntl 72 25|ioctl 16 29|sendto 44 206|open 2 -|openat 257 56|exit 60 93|
exit_group 231 94
"""
# a call with a higher number is newer than this table: it gets ENOSYS, and libraries fall back
LAST_KNOWN = 469

# machine -> AUDIT_ARCH_*, column of the tables
ARCHITECTURES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}

LOAD, JUMP, JUMP_EQ, JUMP_GE, JUMP_SET, AND, RETURN = 0x20, 0x05, 0x15, 0x35, 0x45, 0x54, 0x06
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x50000
EPERM, ENOSYS, ENOTSUP = (ERRNO | code for code in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP))
NUMBER_AT, ARCH_AT, ARGS_AT = 0, 4, 16  # struct seccomp_data
PID = -1  # placeholder for the id of the process that installs the filter

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


@dataclass(frozen=True)
class Filter:
    """code: struct sock_filter[], eight bytes each. pid_at: offsets to put the process id."""

    code: bytes
    pid_at: tuple[int, ...]


def numbers(table: str, machine: str) -> dict[str, int]:
    """name -> system call number on this architecture."""
    column = ARCHITECTURES[machine][1]
    rows = [entry.split() for entry in table.replace("\n", "").split("|") if entry]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def _argument(index: int, high: bool = False) -> Instruction:
    """Load half of an argument; both architectures are little-endian."""
    return (LOAD, 0, 0, ARGS_AT + 8 * index + 4 * high)


def _unless(allowed: list[Instruction]) -> list[Instruction]:
    """EPERM where the instructions fall through; to allow the call they skip one instruction."""
    return [*allowed, (RETURN, 0, 0, EPERM), (RETURN, 0, 0, ALLOW)]


def _one_of(index: int, values: tuple[int, ...]) -> list[Instruction]:
    """EPERM where the argument is one of the values."""
    tests = [(JUMP_EQ, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [_argument(index), *tests, (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, EPERM)]


def _null(index: int) -> list[Instruction]:
    """EPERM where the pointer is not null."""
    return _unless(
        [_argument(index), (JUMP_EQ, 0, 2, 0), _argument(index, high=True), (JUMP_EQ, 1, 0, 0)]
    )


def _to_itself(signal_index: int) -> list[Instruction]:
    """Allow signals to this process itself, but not SIGKILL.

    process.py takes every SIGKILL for one from outside. A POSIX timer could send it too:
    timer_create is denied.
    """
    return _unless(
        [_argument(0), (JUMP_EQ, 0, 2, PID), _argument(signal_index), (JUMP_EQ, 0, 1, 9)]
    )


def _no_truncating_read(flags_index: int) -> list[Instruction]:
    """EPERM for O_RDONLY | O_TRUNC: it empties a file, and Landlock 1 and 2 check only reading."""
    truncate, access = 0o1000, 0o3
    tests = [(AND, 0, 0, truncate | access), (JUMP_EQ, 0, 1, truncate)]
    return _unless([_argument(flags_index), *tests])


def _no_status_of_a_signal() -> list[Instruction]:
    """Kill for exit statuses from 128 on: bubblewrap reports a signal as 128 + its number."""
    status = [_argument(0), (AND, 0, 0, 0xFF)]
    return [*status, (JUMP_GE, 0, 1, 128), (RETURN, 0, 0, KILL), (RETURN, 0, 0, ALLOW)]


def _by_arguments() -> dict[str, list[Instruction]]:
    clone_thread = 0x10000
    return {
        "clone": _unless([_argument(0), (JUMP_SET, 1, 0, clone_thread)]),
        # its flags are behind a pointer; after ENOSYS the C library calls clone
        "clone3": [(RETURN, 0, 0, ENOSYS)],
        "openat2": [(RETURN, 0, 0, ENOSYS)],
        "kill": _to_itself(1),
        "tgkill": _to_itself(2),
        "prctl": _one_of(0, (1, 4, 35, 36)),  # PDEATHSIG, DUMPABLE, MM, CHILD_SUBREAPER
        "prlimit64": _null(2),  # a new limit; reading one is allowed
        # SETOWN, SETSIG, SETOWN_EX: they make the kernel send a signal
        "fcntl": _one_of(1, (8, 10, 15)),
        # TIOCSTI, TIOCLINUX, FIOSETOWN, SIOCSPGRP
        "ioctl": _one_of(1, (0x5412, 0x541C, 0x8901, 0x8902)),
        "sendto": _null(4),  # an address; a socketpair needs none
        "open": _no_truncating_read(1),
        "openat": _no_truncating_read(2),
        "exit": _no_status_of_a_signal(),
        "exit_group": _no_status_of_a_signal(),
    }


def build(machine: str | None = None) -> Filter | None:
    """The filter for an architecture (None: this machine's); None if there is no table for it."""
    machine = machine or (platform.machine() if sys.platform == "linux" else sys.platform)
    if machine not in ARCHITECTURES:
        return None
    program: list[Instruction] = [
        (LOAD, 0, 0, ARCH_AT),
        (JUMP_EQ, 1, 0, ARCHITECTURES[machine][0]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_AT),
    ]
    if machine == "x86_64":  # x32 has other numbers for the same calls
        program += [(JUMP_GE, 0, 1, 0x40000000), (RETURN, 0, 0, KILL)]
    program += [(JUMP_GE, 0, 1, LAST_KNOWN + 1), (RETURN, 0, 0, ENOSYS)]
    rules, special = _by_arguments(), numbers(SPECIAL, machine)
    for name, number in special.items():
        program += [(JUMP_EQ, 0, len(rules[name]), number), *rules[name]]
    for table, answer in ((DENIED, EPERM), (UNSUPPORTED, ENOTSUP), (WITHOUT_EFFECT, ERRNO)):
        for number in sorted(numbers(table, machine).values()):
            program += [(JUMP_EQ, 0, 1, number), (RETURN, 0, 0, answer)]
    program.append((RETURN, 0, 0, ALLOW))
    code = b"".join(struct.pack("<HBBI", c, t, f, 0 if k == PID else k) for c, t, f, k in program)
    return Filter(code, tuple(8 * i + 4 for i, step in enumerate(program) if step[3] == PID))
