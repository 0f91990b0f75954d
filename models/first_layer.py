"""Queries, keys and values of the first layer, kept from one forward pass to the next.

There they depend on a column's token and position alone, and from one step to the next a few tokens change: only
their columns are computed anew, a multiple of 8 as everywhere, so to the same bits. T packed columns, as in layers.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from models.packing import ROWS, padded, up_to

WORTHWHILE = 1 << 16  # numbers in x; for fewer, to look for changes costs more than it saves
Projected = tuple[Tensor, Tensor, Tensor]


class FirstLayer:
    """What the last forward pass computed, and of what. For a CPU: elsewhere a row's bits may depend on how many there are."""

    def __init__(self) -> None:
        self.source: tuple | None = None
        self.tokens = self.positions = np.zeros(0, dtype=np.int64)
        self.kept: Projected | None = None

    def project(
        self,
        project: Callable[..., Projected],
        embedding: Tensor,
        tokens: np.ndarray,
        positions: np.ndarray,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        norm: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Projected:
        """`project(x, cos, sin, norm, weight, bias)`. tokens, positions: [T] int64, what x, cos and sin were made of."""
        if x.numel() < WORTHWHILE:
            return project(x, cos, sin, norm, weight, bias)
        weights = [w for w in (embedding, norm, weight, bias) if w is not None]
        if any(w.is_inference() for w in weights):  # a change in place would not show
            return project(x, cos, sin, norm, weight, bias)
        # a tensor made in inference mode cannot be written to outside of it
        mode = torch.is_inference_mode_enabled()
        source = (project, mode, cos.dtype, *((w.data_ptr(), w._version) for w in weights))
        changed = None
        if (
            source == self.source
            and len(tokens) == len(self.tokens)
            and np.array_equal(positions, self.positions)
        ):
            changed = np.flatnonzero(tokens != self.tokens)
        if changed is None or len(changed) > len(tokens) // 4:
            self.kept = project(x, cos, sin, norm, weight, bias)
        elif len(changed):
            at = torch.from_numpy(padded(changed, up_to(len(changed), ROWS["cpu"]), changed[0]))
            for kept, new in zip(self.kept, project(x[at], cos[at], sin[at], norm, weight, bias)):
                kept[at] = new
        self.source, self.tokens, self.positions = source, tokens.copy(), positions
        return self.kept
