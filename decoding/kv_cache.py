"""Which columns a forward pass computes, and which it attends to: one pure function per KV cache, one table. No torch.

With the keys and values of a canvas kept from earlier passes, a cache policy is three integers: compute the columns
[lo, hi), attend to [0, kv_end). What is not computed keeps the keys and values of the pass that last computed it.

Source of prefix and dual: Fast-dLLM, arXiv:2505.22618; NVlabs/Fast-dLLM llada/generate.py. Of window: APD,
arXiv:2506.00413; danielmisrael/apd dream/generation_utils.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Columns = tuple[int, int, int]  # lo, hi, kv_end: the fields of a models.Span


@dataclass(frozen=True)
class SpanView:
    """One row before a forward pass; columns are counted from the prompt's first.

    lo, hi: the active block. A shifted model predicts a position from the column to its left, so lo is one column
            further left while the block's first position is open.
    length: columns of prompt and canvas, as far as the pass looks ahead.
    fresh:  nothing may be taken from earlier passes: the block has just begun, or a refresh is due.
    since:  the first column that was open at the pass before.
    window: of the columns before that one, how many are computed again, itself included (`--kv_window`).
    """

    lo: int
    hi: int
    length: int
    fresh: bool
    since: int = 0
    window: int = 1


def none(view: SpanView) -> Columns:
    """Everything, always: exact."""
    return 0, view.length, view.length


def prefix(view: SpanView) -> Columns:
    """Keep what is left of the block; compute the block and all that is right of it."""
    return (0 if view.fresh else view.lo), view.length, view.length


def dual(view: SpanView) -> Columns:
    """Keep what is left and right of the block; compute the block alone."""
    return none(view) if view.fresh else (view.lo, view.hi, view.length)


def window(view: SpanView) -> Columns:
    """Left to right: keep what is further left than what was committed last and `window` - 1 columns before it."""
    return (0 if view.fresh else max(0, view.since - view.window + 1)), view.length, view.length


CACHES: dict[str, Callable[[SpanView], Columns]] = {
    "none": none,
    "prefix": prefix,
    "dual": dual,
    "window": window,
}
