"""The process in which one candidate program and its tests run. Started by sandbox.py, imported by nobody.

argv: the file descriptor of the verdict. stdin: the job, JSON. Writes "S\\n" when it is set up, then one JSON line.
"""

import json
import os
import resource
import signal
import sys


def text_of(error, limit=1000):
    """Type and message of an exception whose own methods may be hostile; clean UTF-8."""
    try:
        text = f"{type(error).__name__}: {str(error)[:limit]}"
    except BaseException:
        text = f"{type(error).__name__} (its text cannot be had)"
    return text[: limit + 100].encode("utf-8", "backslashreplace").decode("utf-8")


REASONS = ((AssertionError, "assertion"), (MemoryError, "memory"))


def reason_of(error, reasons=REASONS):
    return next((reason for kind, reason in reasons if isinstance(error, kind)), "exception")


def limit_itself(job):
    cpu = max(1, int(-(-job["cpu_s"] // 1)))
    limits = {
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_AS: (job["memory_bytes"],) * 2,
        resource.RLIMIT_FSIZE: (job["file_bytes"],) * 2,
        resource.RLIMIT_NOFILE: (64, 64),
        resource.RLIMIT_CORE: (0, 0),
    }
    for which, (soft, hard) in limits.items():
        ceiling = resource.getrlimit(which)[1]
        if ceiling != resource.RLIM_INFINITY:  # a limit of the machine's own may be lower and cannot be raised
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(which, (soft, hard))
    signal.alarm(int(job["wall_s"]) + 1)


def main():
    verdict_fd = int(sys.argv[1])
    os.set_inheritable(verdict_fd, False)
    job = json.loads(sys.stdin.buffer.read())
    token, candidate, tests = job.pop("token"), job.pop("candidate"), job.pop("tests")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    sys.path += job["site"]  # appended without reading .pth files: numpy can be imported as under lm-eval
    sys.argv = [""]
    limit_itself(job)
    # the names below stay the real ones whatever the program rebinds in these modules
    write, leave, dumps, run = os.write, os._exit, json.dumps, exec
    reason_for, text_for = reason_of, text_of

    def say(reason, detail=""):
        write(verdict_fd, dumps({"token": token, "reason": reason, "detail": detail}).encode() + b"\n")
        leave(0)

    write(verdict_fd, b"S\n")
    try:
        second = compile(tests, "<tests>", "exec", dont_inherit=True)
    except SyntaxError as error:
        say("tests", text_for(error))
    try:
        first = compile(candidate, "<candidate>", "exec", dont_inherit=True)
    except BaseException as error:  # SyntaxError, ValueError, RecursionError, the parser's MemoryError
        say("syntax", text_for(error))
    # empty, as under lm-eval: __name__ is then "builtins" and no `if __name__ == "__main__"` block runs
    namespace = {}
    try:
        run(first, namespace)
        run(second, namespace)
    except BaseException as error:
        say(reason_for(error), text_for(error))
    say("passed")


if __name__ == "__main__":
    main()
