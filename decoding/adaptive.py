"""Algorithms that decide themselves how many positions a step commits: pure functions of the step's view.

Each commits at least `quota` positions, which is tokens_per_step and 1 by default, as the papers have it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from decoding.view import StepView, top_k

if TYPE_CHECKING:
    from torch import Tensor


def threshold(view: StepView) -> Tensor:
    """Commit every position whose confidence is at least `threshold`, and always the best ones.

    Source: Fast-dLLM, arXiv:2505.22618; NVlabs/Fast-dLLM llada/generate.py, get_transfer_index.
    """
    sure = view.confidence >= view.options["threshold"]
    return (view.masked & sure) | top_k(view.confidence, view.masked, view.quota)


def confidence_threshold(view: StepView) -> Tensor:
    """Commit the first position on a block's first forward pass, and by `threshold` after it.

    The rule of Fast-dLLM's Dream: that pass sees the whole canvas, and with the first position committed no later one
    has to compute the column to its left, from which a shifted model would predict it.
    Source: arXiv:2505.22618; NVlabs/Fast-dLLM dream/model/generation_utils_block.py.
    """
    first = view.masked & (view.masked.cumsum(dim=-1) == 1)
    return threshold(view).where((view.step > 0)[:, None], first)
