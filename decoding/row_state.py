"""A row: the state of one sample in the engine. A Completion: the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Completion:
    """A decoded canvas.

    token_ids:     [gen_length] ids; an open position holds the mask id.
    committed_at:  [gen_length] index of the row's forward pass that committed the position; -1 for
                   an open position.
    nfe:           number of forward passes that the row took part in.
    forwards_saved: forward passes that the schedule had left when the row finished. An upper bound
                   for `origin`; 0 for an adaptive algorithm, which has no fixed schedule.
    positions_computed: columns computed by the model over all forward passes of the row.
    seconds:       wall time in flight, without what the caller does between two completions. The
                   rows of a batch share it: it is a latency, not a cost.
    finish_reason: "end_token", "stop_string" or "length".
    nfe_partial:   number of the forward passes that reused columns from the KV cache.
    nfe_verifier:  forward passes of the verifier; `nfe` does not include them.
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
    """State of one row in flight.

    canvas: [prompt_length + gen_length] ids of prompt and answer.
    open:   [gen_length] bool, the open positions of the answer.
    committed_at, nfe, nfe_partial, nfe_verifier, positions: as in Completion.
    block, step: the active block, and the step within it.
    passes: forward passes of the active block so far.
    memory: the algorithm's memory of the block's open positions, on the device.
    since:  the first column that was open before the previous forward pass.
    checked: length of the prefix that was last found not to end the text.
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
    checked: int = 0
    nfe: int = 0
    nfe_partial: int = 0
    nfe_verifier: int = 0
    positions: int = 0
    started: float = 0.0

    @property
    def answer(self) -> np.ndarray:
        return self.canvas[self.prompt_length :]

    @property
    def frontier(self) -> int:
        """The first open column of the canvas."""
        return self.prompt_length + int(self.open.argmax())

    @property
    def prefix(self) -> np.ndarray:
        """The answer up to its first open position. No later commit changes it."""
        return self.answer[: int(self.open.argmax())] if self.open.any() else self.answer
