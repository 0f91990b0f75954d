"""What a person sees of a run while it goes on, and what is kept of a batch that went wrong."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass, field

from tqdm import tqdm

from experiment.result import Record
from utils import out_of_memory


@dataclass(frozen=True)
class Failure:
    """Why a batch failed, as text: an exception would keep its tensors."""

    traceback: str
    out_of_memory: bool

    @classmethod
    def of(cls, error: Exception) -> Failure:
        return cls(
            "".join(traceback.format_exception(type(error), error, error.__traceback__)),
            out_of_memory(error),
        )


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
