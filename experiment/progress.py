"""What a person sees of a run while it goes on, and what is kept of a batch that went wrong."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass, field

from tqdm import tqdm

from experiment.result import Record


@dataclass(frozen=True)
class Failure:
    """Why a batch failed, as text: an exception would keep its tensors."""

    traceback: str
    out_of_memory: bool

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Out of memory is told by name and by what the CPU's allocator, CUDA and cuBLAS say: no torch here."""
        full = isinstance(error, MemoryError) or any(c.__name__ == "OutOfMemoryError" for c in type(error).__mro__)
        words = ("can't allocate memory", "CUDA error: out of memory", "CUDA driver error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
        full = full or isinstance(error, RuntimeError) and any(word in str(error) for word in words)
        return cls("".join(traceback.format_exception(type(error), error, error.__traceback__)), full)


@dataclass
class Progress:
    """The one bar: samples, tokens per second of those decoded here, tokens per forward pass, time left."""

    bar: tqdm
    tokens: int = 0
    forwards: int = 0
    started: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        """What was known before is there; from now on the time left is counted."""
        self.bar.initial = self.bar.n
        self.bar.unpause()
        self.started = time.perf_counter()

    def add(self, record: Record, *, decoded_here: bool = True) -> None:
        if decoded_here:
            self.tokens += record.tokens_returned
            self.forwards += record.nfe
            rate = self.tokens / (time.perf_counter() - self.started)
            tpf = self.tokens / self.forwards if self.forwards else 0.0
            self.bar.set_postfix_str(f"{rate:.1f} tok/s, {tpf:.2f} TPF", refresh=False)
        self.bar.update(1)
