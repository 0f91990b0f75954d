"""Which columns a forward pass computes and attends to: one pure function per KV cache, one table.

The keys and values of a canvas are kept from earlier passes, so a cache policy is three integers:
compute the columns [lo, hi), attend to [0, kv_end). All other columns keep the keys and values of
the pass that last computed them. No torch.

Source of prefix and dual: Fast-dLLM, arXiv:2505.22618; NVlabs/Fast-dLLM llada/generate.py.
Source of window: APD, arXiv:2506.00413; danielmisrael/apd dream/generation_utils.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Columns = tuple[int, int, int]  # lo, hi, kv_end


@dataclass(frozen=True)
class CacheView:
    """One row before a forward pass. Columns count from the start of the prompt.

    lo, hi: the active block. A shifted model predicts a position from the column to its left, so lo
            is one column further left while the block's first position is open.
    length: columns of prompt and canvas, up to the end of the lookahead.
    fresh:  nothing may be reused: the block has just begun, or a refresh is due.
    since:  the first column that was open before the previous pass.
    window: recompute this many columns up to `since`, itself included.
    """

    lo: int
    hi: int
    length: int
    fresh: bool
    since: int = 0
    window: int = 1


def none(view: CacheView) -> Columns:
    """Compute everything on every pass: exact."""
    return 0, view.length, view.length


def prefix(view: CacheView) -> Columns:
    """Reuse the columns left of the block; compute the block and everything right of it."""
    return (0 if view.fresh else view.lo), view.length, view.length


def dual(view: CacheView) -> Columns:
    """Reuse the columns left and right of the block; compute the block only."""
    return none(view) if view.fresh else (view.lo, view.hi, view.length)


def window(view: CacheView) -> Columns:
    """Left to right: compute from `window` - 1 columns left of `since` on; reuse the others."""
    return (0 if view.fresh else max(0, view.since - view.window + 1)), view.length, view.length


CACHES: dict[str, Callable[[CacheView], Columns]] = {
    "none": none,
    "prefix": prefix,
    "dual": dual,
    "window": window,
}
