"""The program of the interpreters that process.py starts: confines itself, then executes the job.

argv:  file descriptor of the verdict's pipe; "program" | "oracle" | "checker"; for the last two,
       the descriptors of requests and replies.
stdin: length of the job; the job, in marshal, which needs no import; the token.
Sends "S" once it is confined and the tests are compiled, or "E" and the reason why it could not do
that: from "S" on, all that it sends may come from the candidate. Then "P" and the token, or "F", a
reason, a line feed and a detail.
Every import in this file costs time for every program.
"""

import os
import sys

REASON_OF = ((AssertionError, b"assertion"), (MemoryError, b"memory"))
FILE_ERRORS = (24, 27, 28, 122)  # EMFILE, EFBIG, ENOSPC, EDQUOT
DETAIL = 500
TOKEN = 16
FIRST = 10  # number of the verdict's descriptor


def text_of(error, limit=DETAIL):
    """Type and message of an exception, as valid UTF-8. Its methods may be hostile."""
    try:
        text = f"{type(error).__name__}: {str(error)[:limit]}"
    except BaseException:
        return b"an exception whose text raises another"
    return text[: limit + 100].encode("utf-8", "backslashreplace")


def reason_of(error, reasons=REASON_OF):
    if isinstance(error, OSError) and error.errno in FILE_ERRORS:
        return b"files"
    return next((reason for kind, reason in reasons if isinstance(error, kind)), b"exception")


def reset_inherited():
    """Signals and umask as in a fresh shell: under nohup or a scheduler they are others."""
    import _signal as signal

    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as Python itself sets these three
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    os.umask(0o022)


def read_exactly(fd, size, read=os.read):
    parts = []
    while size > 0:
        part = read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError("the pipe is closed")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def limit_itself(limits):
    import resource

    for name, (soft, hard) in limits.items():
        number = getattr(resource, name, None)
        if number is None:  # not on macOS
            continue
        ceiling = resource.getrlimit(number)[1]
        if ceiling != resource.RLIM_INFINITY:  # the machine's own limit cannot be raised
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        try:
            resource.setrlimit(number, (soft, hard))
        except (ValueError, OSError):
            if sys.platform == "linux":  # macOS knows RLIMIT_AS and refuses it
                raise
    try:
        # when the machine runs out of memory, the kernel kills this process first
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass


def libc_call():
    """Returns call(name, function, *arguments), which calls a function of the C library.

    Integers are passed as int, bytes as a pointer to them. A failed call raises OSError with
    `name`. It uses _ctypes: importing ctypes takes 4 ms, a third of a program's life.
    """
    import _ctypes

    library = _ctypes.dlopen(None, 0)

    def call(name, function, *arguments):
        result = _ctypes.call_function(_ctypes.dlsym(library, function), arguments)
        if result < 0:  # called again, for errno
            import ctypes

            getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments)
            code = ctypes.get_errno()
            raise OSError(code, f"{name}: {os.strerror(code)}")
        return result

    return call


def address_of(data):
    """Address of the content of a bytes object (in CPython, after its header)."""
    return id(data) + bytes.__basicsize__ - 1


def confine(job):
    """Apply Landlock, drop privileges, apply seccomp: in this order. Raises OSError."""
    from _struct import pack

    call = libc_call()

    def prctl(name, option, value):
        call(name, "prctl", option, value, 0, 0, 0)

    prctl("no_new_privs", 38, 1)
    if job["landlock"]:
        create, add, restrict = 444, 445, 446
        sizes, rules = job["landlock"]
        attributes = pack("<QQQ", *sizes[1:])[: sizes[0]]
        ruleset = call("landlock", "syscall", create, attributes, len(attributes), 0)
        for path, rights in rules:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            call(f"landlock {path}", "syscall", add, ruleset, 1, pack("<Qi", rights, fd), 0)
            os.close(fd)
        call("landlock", "syscall", restrict, ruleset, 0)
        os.close(ruleset)
    if job["seccomp"] or job["landlock"]:
        call("capset", "capset", pack("<Ii", 0x20080522, 0), bytes(24))  # no capabilities, for root
    prctl("pdeathsig", 1, 9)  # killed when the harness ends, however it ends
    if job["parent"] and os.getppid() != job["parent"]:
        os._exit(1)
    if job["seccomp"]:
        prctl("dumpable", 4, 0)
        code, pid_at = bytearray(job["seccomp"][0]), job["seccomp"][1]
        for at in pid_at:
            code[at : at + 4] = pack("<I", os.getpid())
        code = bytes(code)
        call("seccomp", "prctl", 22, 2, pack("@HP", len(code) // 8, address_of(code)))


def run_program(job, verdict, token_fd):
    """Compile the candidate, execute it and the tests in one empty namespace, send the verdict."""
    # local names: the program cannot replace them by rebinding names in modules
    write, leave, run, get_token = os.write, os._exit, exec, read_exactly
    reason_for, text_for = reason_of, text_of

    def failed(reason, detail):
        write(verdict, b"F" + reason + b"\n" + detail)
        leave(0)

    second = job["tests"]
    try:
        first = compile(job["candidate"], "<candidate>", "exec", dont_inherit=True)
    except BaseException as error:  # the parser raises MemoryError and RecursionError too
        failed(b"syntax", text_for(error))
    # empty, as under lm-eval: __name__ is "builtins", so that no `if __name__ == "__main__"` block
    # runs
    namespace = {}
    try:
        run(first, namespace)
        run(second, namespace)
    except BaseException as error:
        failed(reason_for(error), text_for(error))
    write(verdict, b"P" + get_token(token_fd, TOKEN))
    leave(0)


def compile_tests(job, verdict):
    """Replace the tests by their code; execute the helpers, where there are any."""
    try:
        job["tests"] = compile(job["tests"], "<tests>", "exec", dont_inherit=True)
        if "helpers" in job:
            job["namespace"] = {}
            exec(compile(job["helpers"], "<helpers>", "exec", dont_inherit=True), job["namespace"])
    except BaseException as error:
        os.write(verdict, b"Ethe tests are not Python: " + text_of(error))
        os._exit(1)


def move(descriptors):
    """Give descriptors the numbers from FIRST on: a busy harness has others than an idle one."""
    low = dict(zip(sorted(descriptors), range(3, FIRST)))  # the n-th lowest is free, or its own
    for old, new in low.items():
        if old != new:
            os.dup2(old, new)
            os.close(old)
    for number, old in enumerate(descriptors, FIRST):
        os.dup2(low[old], number, inheritable=False)
        os.close(low[old])
    return range(FIRST, FIRST + len(descriptors))


class SemLock:
    """multiprocessing's semaphore for one process: the C library would make a file in /dev/shm."""

    SEM_VALUE_MAX = (1 << 31) - 1
    handle = 0

    def __init__(self, kind, value, maxvalue, name, unlink):
        import threading

        self.kind, self.maxvalue, self.name = kind, maxvalue, None if unlink else name
        self._value, self._depth, self._owner = value, 0, 0
        self._changed, self._me = threading.Condition(), threading.get_ident

    def acquire(self, block=True, timeout=None):
        with self._changed:
            if not (self.kind == 0 and self._is_mine()):  # 0: a recursive lock
                wait_s = None if block and timeout is None else max(0, block and timeout)
                if not self._changed.wait_for(lambda: self._value > 0, wait_s):
                    return False
                self._value -= 1
                self._owner = self._me()
            self._depth += 1
            return True

    def release(self):
        with self._changed:
            if self.kind == 0 and not self._is_mine():
                raise AssertionError("attempt to release recursive lock not owned by thread")
            if self.kind != 0 and self._value >= self.maxvalue:
                raise ValueError("semaphore or lock released too many times")
            self._depth -= 1
            if self.kind != 0 or self._depth == 0:
                self._value += 1
                self._changed.notify()

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *_exc):
        self.release()

    def _is_mine(self):
        return self._depth > 0 and self._owner == self._me()

    def _count(self):
        return self._depth

    def _get_value(self):
        return self._value

    def _is_zero(self):
        return self._value == 0


def main():
    mode, fds = sys.argv[2], [int(number) for number in (sys.argv[1], *sys.argv[3:])]
    verdict, *pipes = move(fds)
    from marshal import loads

    job = loads(read_exactly(0, int.from_bytes(read_exactly(0, 8), "little")))
    token_fd = os.dup(0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    action = run_program
    if mode != "program":
        sys.path.insert(0, job["lib"])
        import oracle

        del sys.path[0]
        action = getattr(oracle, f"run_{mode}")
    sys.path += job["site"]  # numpy can be imported, as under lm-eval; .pth files are not read
    sys.argv = [""]
    sys.modules["__main__"] = type(sys)("__main__")
    sys.modules["_multiprocessing"] = locks = type(sys)("_multiprocessing")
    locks.SemLock, locks.sem_unlink = SemLock, str
    try:
        reset_inherited()
        limit_itself(job["limits"])
        if job["confine"]:
            confine(job)
        if "tests" in job:
            compile_tests(job, verdict)
    except BaseException as error:
        os.write(verdict, b"E" + text_of(error))
        os._exit(1)
    os.write(verdict, b"S")
    action(job, verdict, token_fd, *pipes)


if __name__ == "__main__":
    main()
