"""One sample on its way through the engine, and what comes of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Completion:
    """A decoded canvas.

    token_ids:     [gen_length] ids; a position that was left open holds the mask id.
    committed_at:  [gen_length] which of the row's forward passes committed the position, -1 where left open.
    nfe:           forward passes that the row took part in.
    forwards_saved: forward passes that the schedule still had when the row left (for `origin` at most so many; an
                   adaptive algorithm has no schedule, and saves none).
    positions_computed: columns that went through the model, over all its forward passes.
    seconds:       wall time in flight. Rows of a batch share it: it is a latency, not a cost.
    finish_reason: "end_token", "stop_string" or "length".
    nfe_partial:   how many of the forward passes took some columns from the KV cache.
    nfe_verifier:  forward passes of the verifier, which are not among `nfe`.
    """

    token_ids: tuple[int, ...]
    committed_at: tuple[int, ...]
    nfe: int
    forwards_saved: int
    positions_computed: int
    seconds: float
    finish_reason: str
    nfe_partial: int = 0
    nfe_verifier: int = 0

    @property
    def tokens_committed(self) -> int:
        return sum(at >= 0 for at in self.committed_at)


@dataclass(eq=False)
class Row:
    """State of one row in flight. `canvas` is prompt and answer, `open` its answer's open positions.

    passes: forward passes of the block so far. memory: the algorithm's, of the block's open positions, on the device.
    since: the first column that was open at the forward pass before.
    """

    index: int
    prompt_length: int
    canvas: np.ndarray
    open: np.ndarray
    committed_at: np.ndarray
    seed: int
    block: int = 0
    step: int = 0
    passes: int = 0
    memory: dict[str, Tensor] | None = None
    since: int = 0
    nfe: int = 0
    nfe_partial: int = 0
    nfe_verifier: int = 0
    positions: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def answer(self) -> np.ndarray:
        return self.canvas[self.prompt_length :]

    @property
    def frontier(self) -> int:
        """The first open column of the canvas."""
        return self.prompt_length + int(self.open.argmax())

    @property
    def prefix(self) -> np.ndarray:
        """The answer up to its first open position: what no later commit can change."""
        return self.answer[: int(self.open.argmax())] if self.open.any() else self.answer
