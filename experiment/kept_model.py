"""A process that runs several experiments keeps the model that they share."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from experiment.run import load_weights
from utils import canonical_json

if TYPE_CHECKING:
    from models import Transformer


class KeptModel:
    """The last model and the last verifier that were loaded. A new one replaces its kind.

    read: as Host.load of experiment/run.py, loads what is not kept.
    """

    def __init__(self, read: Callable[[str, str, str], Transformer] = load_weights) -> None:
        self.read, self.loads = read, 0
        # is it causal? -> (identity of its checkpoint, device, dtype), model
        self._kept: dict[bool, tuple[tuple[str, str, str], Transformer]] = {}

    def load(self, checkpoint: str, device: str, dtype: str) -> Transformer:
        from models import fingerprint, read_config

        key = (canonical_json(fingerprint(checkpoint)), device, dtype)
        causal = read_config(checkpoint).causal
        if causal not in self._kept or self._kept[causal][0] != key:
            self._kept.pop(causal, None)
            free_memory()
            self._kept[causal] = key, self.read(checkpoint, device, dtype)
            self.loads += 1
        return self._kept[causal][1]


def free_memory() -> None:
    """Collect cycles - a harness is in one and holds its model - and free their device memory."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
