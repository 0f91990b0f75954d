"""One process of the suite: experiments one after the other, the model kept loaded between them.

It reads commands from stdin, one JSON a line, and answers each on what was stdout when it started:
    {"argv": [...], "log": "...", "score": false}   ->   {"code": 0, "loads": 1}

A worker that generates leaves an experiment before it is scored: the device goes on with the next one, and a worker
without a device finds all samples in the store and scores them. Where a sample failed it scores itself, because only
the run that saw the failure can say so in the result. It ends when stdin does, when its parent dies, on a signal.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import eval as cli
from experiment.sample_cache import SampleCache, ShareDone
from utils import DllmexpError

if TYPE_CHECKING:
    from models import Transformer

PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass
class Generating(SampleCache):
    """Leaves once every sample is kept, unless one failed."""

    n_failed: int = 0

    def failed(self, key: str, error: str) -> None:
        super().failed(key, error)
        self.n_failed += 1

    def share_done(self) -> None:
        super().share_done()
        if not self.n_failed:
            raise ShareDone


class KeptModel:
    """The model that was loaded last, and the verifier that was: another one of its kind takes its place."""

    def __init__(self) -> None:
        self.loads = 0
        self._kept: dict[
            bool, tuple[tuple[str, str, str], Transformer]
        ] = {}  # by whether it is causal

    def load(self, checkpoint: str, device: str, dtype: str) -> Transformer:
        from models import read_config

        what, causal = (checkpoint, device, dtype), read_config(checkpoint).causal
        if causal not in self._kept or self._kept[causal][0] != what:
            self._kept.pop(causal, None)
            free_memory()
            self._kept[causal] = what, cli.USUAL.load(checkpoint, device, dtype)
            self.loads += 1
        return self._kept[causal][1]


def refuse(checkpoint: str, device: str, dtype: str) -> Transformer:
    """In place of loading, in a worker that only scores."""
    raise DllmexpError(
        "samples are missing from the store although all were generated; they are generated again"
    )


def free_memory() -> None:
    """Collect cycles - a harness is in one, and holds its model - and give their device memory back."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


@contextmanager
def written_to(path: str):
    """Everything that this process and its children print goes to the end of `path`."""
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
    """The exit code with which eval.py would have ended."""
    argv, ledger = order["argv"], SampleCache if order["score"] else Generating
    sys.argv = ["eval.py", *argv]  # a result says how it was made
    load = refuse if order["score"] else kept.load
    with written_to(order["log"]):
        print(
            time.strftime("== %Y-%m-%d %H:%M:%S"),
            "scoring" if order["score"] else "generating",
            order["what"],
            flush=True,
        )
        code = cli.main(argv, cli.Parts(load, ledger))
        print(f"== exit code {code}", flush=True)
    # before the next run: its start freezes what is there, and a frozen harness would keep its model for ever
    free_memory()
    return code


def import_everything() -> None:
    """Before the first run: a package keeps an exception from its import, and with it the frames that imported it.

    Were that a run's, its harness and its model would stay for ever.
    """
    with warnings.catch_warnings():
        # what packages say of each other is nothing for the terminal
        warnings.simplefilter("ignore")
        import experiment.lmeval  # noqa: F401
        import harness  # noqa: F401


def die_with_parent(parent: int) -> None:
    """SIGTERM when the parent ends by whatever means; a GPU must not stay with an orphan."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):
        return  # not Linux: stdin ends with the parent, which is seen after the experiment
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def main(parent: int) -> int:
    die_with_parent(parent)
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    import_everything()
    kept = KeptModel()
    for line in sys.stdin:
        order = json.loads(line)
        code = obey(order, kept)
        if code > 128:  # a signal, meant for this process
            return code
        replies.write(json.dumps({"code": code, "loads": kept.loads}) + "\n")
        replies.flush()
    return 0
