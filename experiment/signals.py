"""A signal becomes an exception, so that a run that ends early keeps its finished samples."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from utils import EXIT_OUTPUT, DllmexpError, safe_streams

# those that a scheduler or a user ends a run with; USR1, USR2 and XCPU announce the end of a job
ENDING = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM")


class Signalled(BaseException):
    """A signal has arrived; its number is the argument."""


@contextmanager
def signals_raise() -> Iterator[None]:
    """Inside, the signals of ENDING raise Signalled, as SIGINT raises KeyboardInterrupt.

    A signal that is ignored stays ignored. Does nothing outside the main thread.
    """

    def handler(number, frame):
        while frame is not None:
            if frame.f_code.co_name == "__del__":  # would swallow the exception: try again soon
                threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
                return
            frame = frame.f_back
        signal.signal(number, signal.SIG_IGN)  # a second one would interrupt the clean end
        raise Signalled(number)

    old = {}
    try:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (getattr(signal, name) for name in ENDING):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                old[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread
        pass
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


class Interrupted(DllmexpError):
    """A signal has ended the run; its finished samples are kept."""

    @classmethod
    def by(cls, error: KeyboardInterrupt | Signalled, kept: str = "") -> Interrupted:
        """kept: what is kept, as `; N samples are kept in DIR`."""
        number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else error.args[0]
        name = signal.Signals(number).name
        ended = cls(f"ended by {name}{kept}; run the same command again to go on")
        ended.exit_code = 128 + number
        return ended


def exit_code_of(program: Callable[[], int]) -> int:
    """The exit code of a program whose errors and signals are lines and codes; see `leave`."""
    safe_streams()
    try:
        with signals_raise():
            code = program()
            sys.stdout.flush()
            return code
    except (DllmexpError, OSError, KeyboardInterrupt, Signalled) as error:
        return leave(error)


def leave(error: DllmexpError | OSError | KeyboardInterrupt | Signalled) -> int:
    """The exit code of a program that `error` ends; says why, one line for each problem."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, Signalled):
        return 128 + error.args[0]
    if isinstance(error, DllmexpError):
        problems, code = error.problems, error.exit_code
    else:
        # what is left in stdout's buffer must not fail again when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):  # such as `report.py results | head`
            return 141
        problems, code = [f"{error.filename or 'cannot write'}: {error.strerror}"], EXIT_OUTPUT
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return code
