"""Adaptive algorithms, which decide how many positions a step commits, and the certainty prior.

All of them are pure functions. An adaptive rule compares the model's own probability: confidence
and entropy are those of the plain softmax of the logits in every family, also above temperature 0,
since a bound on a sharpened distribution holds for tokens that the model gives little probability.
Only `confidence_threshold`, Fast-dLLM's rule for Dream, reads the distribution of the draw as
published, for replay.

If the rule of an adaptive algorithm gives fewer than `quota` positions, it commits `quota`
positions: tokens_per_step, which is 1 by default, as in the papers. Two rules differ. `klass` does
so only if its rule gives no position, `confidence_threshold` only after a block's first pass.
Shapes: see step_view.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from decoding.step_view import Observation, StepView, top_k

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def threshold(view: StepView) -> Tensor:
    """Commit every position with a confidence of at least `threshold`, and always the best ones.

    Source: Fast-dLLM, arXiv:2505.22618; NVlabs/Fast-dLLM llada/generate.py, get_transfer_index.
    """
    sure = view.confidence >= view.options["threshold"]
    return (view.masked & sure) | top_k(view.confidence, view.masked, view.quota)


def confidence_threshold(view: StepView) -> Tensor:
    """Commit the first position on a block's first forward pass; after it, use `threshold`.

    This is the rule of Fast-dLLM for Dream. The first pass computes the whole canvas. A shifted
    model predicts a block's first position from the column to the left of the block; once that
    position is committed, later passes need not compute this column.
    Source: arXiv:2505.22618; NVlabs/Fast-dLLM dream/model/generation_utils_block.py.
    """
    first = view.masked & (view.masked.cumsum(dim=-1) == 1)
    return threshold(view).where((view.step > 0)[:, None], first)


def factor(view: StepView) -> Tensor:
    """Commit the n most confident positions, with the largest n that satisfies the factor's bound.

    The bound is (k + 1) * (1 - c_k) < `factor` for every k up to n, with c_k the k-th highest
    confidence. It is strict, and nothing is committed beyond it, as in the paper's theorem. The
    published loops differ at the last open position. Fast-dLLM and dInfer commit it if it is the
    only one that fails the bound; d2Cache leaves it open if none fails.
    Source: Fast-dLLM, arXiv:2505.22618, section 3.3.
    """
    ranked = (
        view.confidence.masked_fill(~view.masked, -float("inf"))
        .sort(dim=-1, descending=True)
        .values
    )
    rank = view.masked.new_ones(view.masked.shape).cumsum(dim=-1)
    holds = (rank + 1) * (1 - ranked) < view.options["factor"]
    n = holds.long().cumprod(dim=-1).sum(dim=-1)
    return top_k(view.confidence, view.masked, n.maximum(view.quota))


def entropy_threshold(view: StepView) -> Tensor:
    """Commit every position with an entropy of at most `threshold` nats, and always the lowest.

    An entropy equal to the threshold is committed, as in d3LLM's LLaDA; dParallel does not.
    Source: d3LLM, arXiv:2601.07568; hao-ai-lab/d3LLM, get_transfer_index_entropy.
    """
    sure = view.entropy <= view.options["threshold"]
    return (view.masked & sure) | top_k(-view.entropy, view.masked, view.quota)


def eb_sampler(view: StepView) -> Tensor:
    """Commit the n positions of lowest entropy, with the largest n that satisfies `gamma`'s bound.

    The bound: the n entropies without their highest sum to at most `gamma`. This sum bounds the
    error of treating the positions as independent. `gamma` 0 commits one position and all certain
    ones. The paper allows any order of the positions; in the order of their entropies, all
    published readings of the maximum agree.
    Source: EB-Sampler, arXiv:2505.24857, equation 8.
    """
    ranked = view.entropy.masked_fill(~view.masked, float("inf")).sort(dim=-1).values
    # the highest of the first n is the n-th, so the bound is on the sum of those before it
    before = ranked.cumsum(dim=-1).roll(1, dims=-1)
    before[:, 0] = 0
    n = (before <= view.options["gamma"]).sum(dim=-1)
    return top_k(-view.entropy, view.masked, n.maximum(view.quota))


def klass(view: StepView) -> Tensor:
    """Commit every position that is confident and stable; if there is none, the `quota` best ones.

    Confident means a confidence above `threshold`. Stable means that each of the last `kl_history`
    divergences KL(p_now || p_before) is below `kl_threshold`. Both bounds are strict. A history
    starts with the block, so its first divergence comes with the second forward pass. The authors'
    code continues the history of the previous block, and compares the canvas's first pass with
    zeros.
    Source: KLASS, arXiv:2511.05664; shkim0116/KLASS src/model/llada_klass.py.
    """
    ready = (
        view.masked
        & (view.confidence > view.options["threshold"])
        & (view.observed < view.options["kl_threshold"])
    )
    return ready.where(
        ready.any(dim=-1, keepdim=True), top_k(view.confidence, view.masked, view.quota)
    )


def divergences(
    logits: Tensor, memory: dict[str, Tensor] | None, options: Mapping[str, float]
) -> Observation:
    """For `klass`: each position's highest divergence of the last `kl_history` passes.

    It is infinite while a position has had fewer divergences.
    memory: probs [R, V] of the previous pass, recent [R, kl_history] divergences.
    """
    probs = logits.softmax(dim=-1)
    if memory is None:
        recent = probs.new_full((len(probs), options["kl_history"]), float("inf"))
    else:
        tiny = 1e-12  # as in the authors' code, so that log(0) stays finite
        now = (probs * ((probs + tiny).log() - (memory["probs"] + tiny).log())).sum(
            dim=-1, keepdim=True
        )
        recent = memory["recent"].roll(-1, dims=-1)
        recent[:, -1:] = now
    return Observation(logits, {"probs": probs, "recent": recent}, recent.amax(dim=-1).double())


def credit(
    logits: Tensor, memory: dict[str, Tensor] | None, options: Mapping[str, float]
) -> Observation:
    """For `credit`: raise the logits of tokens that were the likeliest before; `threshold` follows.

    With each pass of the block a token's credit is multiplied by `credit_decay`, and grows by
    p ** `credit_power` if the token is the likeliest, with p its probability. The token's logit
    grows by `credit_weight` * log(1 + credit).
    Source: CreditDecoding, arXiv:2510.06133; inclusionAI/dInfer decoding/parallel_strategy.py.
    memory: credit [R, V].
    """
    best = logits.softmax(dim=-1).max(dim=-1, keepdim=True)
    credit = (
        logits.new_zeros(logits.shape)
        if memory is None
        else memory["credit"] * options["credit_decay"]
    )
    credit = credit.scatter_add(-1, best.indices, best.values ** options["credit_power"])
    return Observation(logits + options["credit_weight"] * credit.log1p(), {"credit": credit})


def certainty(view: StepView) -> Tensor:
    """Commit the `quota` positions with the highest product of confidence and density.

    The density of a position is the share of known positions around it, weighted by a Gaussian of
    standard deviation `sigma` over the canvas and its length on either side. Positions left of the
    canvas are known; those right of it are known once the last position of the canvas is.
    Source: d2Cache, arXiv:2509.23094; Kamichanw/d2Cache, certainty_density.
    """
    import torch

    known = (~view.canvas).double()
    extended = torch.cat([torch.ones_like(known), known, known[:, -1:].expand_as(known)], dim=-1)
    kernel = _kernel(known.shape[1], view.options["sigma"], known.device)
    # row by row, because a matrix product may round differently in another batch
    density = torch.stack([kernel @ row for row in extended])
    block = view.start[:, None] + torch.arange(view.masked.shape[1], device=known.device)
    # columns that fill up a short last block are not masked; their density is not read
    block = block.clamp(max=known.shape[1] - 1)
    return top_k(view.confidence * density.gather(-1, block), view.masked, view.quota)


@lru_cache(maxsize=4)
def _kernel(n: int, sigma: float, device: torch.device) -> Tensor:
    """[n, 3n] float64: Gaussian weights of columns -n to 2n around column i; rows sum to 1."""
    import torch

    at = torch.arange(-n, 2 * n, dtype=torch.float64, device=device)
    weight = (-((at[n : 2 * n, None] - at) ** 2) / (2 * sigma**2)).exp()
    return weight / weight.sum(dim=-1, keepdim=True)
