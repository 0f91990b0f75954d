"""One process of the suite: it runs experiments one after the other and keeps the model loaded.

It reads orders from stdin, one JSON object a line, and answers each on its original stdout:
    {"argv": [...], "log": "...", "score": false, "title": "..."}  ->  {"code": 0, "loads": 1}

A worker that generates leaves an experiment before it is scored: the device goes on with the next
one, and a worker without a device finds all samples in the store and scores them. If a sample has
failed it scores the experiment itself: only the run that saw the failure can put it into the
result. The worker ends with stdin, with its parent, or on a signal.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import eval as cli
from experiment.kept_model import KeptModel, free_memory
from experiment.sample_cache import SampleCache
from utils import DllmexpError

if TYPE_CHECKING:
    from models import Transformer

PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass
class Generating(SampleCache):
    """Ends the run once every sample is kept, unless one has failed."""

    n_failed: int = 0

    def failed(self, key: str, error: str) -> None:
        super().failed(key, error)
        self.n_failed += 1

    def share_done(self) -> None:
        super().share_done()
        if not self.n_failed:
            self.leave()


def refuse(checkpoint: str, device: str, dtype: str) -> Transformer:
    """Stands in for loading in a worker that only scores. Raises DllmexpError."""
    raise DllmexpError(
        "samples are missing from the store although all were generated; they are generated again"
    )


@contextmanager
def written_to(path: str):
    """Append the output of this process and of its children to the file `path`."""
    kept = [os.dup(1), os.dup(2)]
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        for fd in (1, 2):
            os.dup2(log, fd)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, old in zip((1, 2), kept, strict=True):
            os.dup2(old, fd)
            os.close(old)
        os.close(log)


def obey(order: dict[str, Any], kept: KeptModel) -> int:
    """Run one experiment; the exit code that eval.py would have."""
    argv, score = order["argv"], order["score"]
    sys.argv = ["eval.py", *argv]  # a result keeps the command
    host = cli.Host(
        refuse if score else kept.load, SampleCache if score else Generating, judges=False
    )
    with written_to(order["log"]):
        stage = "scoring" if score else "generating"
        print(time.strftime("== %Y-%m-%d %H:%M:%S"), stage, order["title"], flush=True)
        code = cli.main(argv, host)
        print(f"== exit code {code}", flush=True)
    free_memory()
    return code


def die_with_parent(parent: int) -> None:
    """SIGTERM when the parent ends for any reason: an orphan must not keep a GPU."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):
        return  # not Linux: the end of stdin is seen after the experiment
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def main(parent: int) -> int:
    die_with_parent(parent)
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    kept = KeptModel()
    for line in sys.stdin:
        code = obey(json.loads(line), kept)
        if code > 128:  # a signal, meant for this process
            return code
        replies.write(json.dumps({"code": code, "loads": kept.loads}) + "\n")
        replies.flush()
    return 0
