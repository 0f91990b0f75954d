"""The progress bar of a run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from tqdm import tqdm

from decoding.likelihood import Likelihood
from experiment.sample import Sample


@dataclass
class Progress:
    """The bar shows how many samples are there and the time left.

    Tokens per second and per forward pass, or the rows of likelihoods and those per second, are
    those of the samples that this process decodes.
    """

    bar: tqdm
    tokens: int = 0
    forwards: int = 0
    started: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        """Begin to measure. The samples so far were recalled, and count in no rate."""
        self.bar.initial = self.bar.n
        self.bar.unpause()
        self.started = time.perf_counter()

    def add(self, sample: Sample, *, decoded_here: bool = True) -> None:
        if decoded_here and isinstance(sample.completion, Likelihood):
            self.forwards += sample.completion.rows_run
            rate = self.forwards / (time.perf_counter() - self.started)
            self.bar.set_postfix_str(f"{self.forwards} rows, {rate:.1f} rows/s", refresh=False)
        elif decoded_here:
            self.tokens += sample.tokens_returned
            self.forwards += sample.completion.nfe
            rate = self.tokens / (time.perf_counter() - self.started)
            tpf = self.tokens / self.forwards if self.forwards else 0.0
            self.bar.set_postfix_str(f"{rate:.1f} tok/s, {tpf:.2f} TPF", refresh=False)
        self.bar.update(1)
