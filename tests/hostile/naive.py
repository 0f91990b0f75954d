"""Naive judges, each of which one of the hostile programs gets past: naive.py JUDGE FILE FD

FILE holds candidate and tests with SEPARATOR between them. FD is a pipe that some judges use.
Every judge is a positive control: it shows that an attack works where nothing stops it.
"""

import os
import signal
import sys

SEPARATOR = "\n#\x01TESTS\x01\n"


def exit_code(candidate, tests, _fd):
    exec(f"{candidate}\n{tests}", {})


def encoded(candidate, tests, _fd):
    exec(f"{candidate}\n{tests}".encode(), {})


def script(candidate, tests, _fd):
    exec(f"{candidate}\n{tests}", {"__name__": "__main__"})


def in_process(candidate, tests, _fd):
    try:
        exec(f"{candidate}\n{tests}", {})
    except AssertionError as error:
        print("FAIL", error)
        os._exit(3)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        print("FAIL", text)
        sys.stdout.flush()
        os._exit(3)


def counting(candidate, tests, _fd):
    """Only failed asserts count as failures; other exceptions count as faults of the test."""
    listed = [f"{line}" for line in tests.splitlines()]
    namespace, failures = {}, 0
    exec(candidate, namespace)
    for test in listed:
        try:
            exec(test, namespace)
        except AssertionError:
            failures += 1
        except Exception:
            pass
    sys.exit(3 if failures else 0)


def check_after(candidate, tests, _fd):
    """The tests define check(), then the program runs, then check() is called."""
    *definition, call = tests.splitlines()
    namespace = {}
    exec("\n".join(definition), namespace)
    exec(candidate, namespace)
    exec(call, namespace)


def alarm(candidate, tests, _fd):
    def ring(_number, _frame):
        raise TimeoutError

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    exec(f"{candidate}\n{tests}", {})


def any_byte(candidate, tests, fd):
    """A byte in the pipe is a pass."""
    exec(f"{candidate}\n{tests}", {})
    os.write(fd, b"P")


def silence(candidate, tests, fd):
    """Silence in the pipe is a pass."""
    try:
        exec(f"{candidate}\n{tests}", {})
    except BaseException:
        os.write(fd, b"F")


def listing(candidate, _tests, _fd):
    namespace = {}
    exec(candidate, namespace)
    for _ in namespace["f"](1):
        pass


stdout = cleanup = cleanup_following = exit_code

if __name__ == "__main__":
    with open(sys.argv[2], encoding="utf-8", errors="surrogatepass", newline="") as file:
        parts = file.read().split(SEPARATOR)
    sys.set_int_max_str_digits(0) if hasattr(sys, "set_int_max_str_digits") else None
    globals()[sys.argv[1]](*parts, int(sys.argv[3]))
