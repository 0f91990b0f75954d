"""Algorithms that decide themselves how many positions a step commits, and the certainty prior: pure functions.

Each adaptive one commits at least `quota` positions where its rule would take fewer (`klass` where it would take none,
`confidence_threshold` after a block's first pass); that is tokens_per_step, and 1 by default, as the papers have it.
Shapes as in view.py.
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


def factor(view: StepView) -> Tensor:
    """Commit the n most confident positions, n the largest with (k + 1) * (1 - c_k) < `factor` for every k up to n.

    c_k is the k-th highest confidence. The inequality is strict and nothing is committed beyond it, as in the paper's
    theorem; the published loops also take the last open position where only that one fails it (Fast-dLLM, dInfer), or
    leave it where none fails it (d2Cache). Source: Fast-dLLM, arXiv:2505.22618, section 3.3.
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
    """Commit every position whose entropy in nats is at most `threshold`, and always the lowest.

    An entropy equal to the threshold counts (d3LLM's LLaDA; dParallel leaves it out). Source: d3LLM, arXiv:2601.07568;
    hao-ai-lab/d3LLM, get_transfer_index_entropy.
    """
    sure = view.entropy <= view.options["threshold"]
    return (view.masked & sure) | top_k(-view.entropy, view.masked, view.quota)


def eb_sampler(view: StepView) -> Tensor:
    """Commit the n positions of lowest entropy, n the largest whose entropies less the highest sum to at most `gamma`.

    That sum bounds what is lost by treating the positions as independent. 0 commits one position (and any that are
    certain). The paper allows any order; with that of the entropies themselves every published reading of the maximum
    agrees. Source: EB-Sampler, arXiv:2505.24857, equation 8.
    """
    ranked = view.entropy.masked_fill(~view.masked, float("inf")).sort(dim=-1).values
    # in this order the highest of the first n is the n-th: what counts is the sum of those before it
    before = ranked.cumsum(dim=-1).roll(1, dims=-1)
    before[:, 0] = 0
    n = (before <= view.options["gamma"]).sum(dim=-1)
    return top_k(-view.entropy, view.masked, n.maximum(view.quota))


def klass(view: StepView) -> Tensor:
    """Commit every position that is confident and stable; where there is none, the `quota` most confident.

    Confident: above `threshold`. Stable: each of the last `kl_history` divergences KL(p_now || p_before) is below
    `kl_threshold`; both are strict. A history begins with the block, so the first divergence is that of its second
    forward pass; the authors' code lets it run on from the block before, and compares the canvas's first pass with zeros.
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
    """For `klass`: the highest of the last `kl_history` divergences of each position, infinite while there are fewer.

    memory: probs [R, V] of the pass before, recent [R, kl_history] divergences.
    """
    probs = logits.softmax(dim=-1)
    if memory is None:
        recent = probs.new_full((len(probs), options["kl_history"]), float("inf"))
    else:
        tiny = 1e-12  # as in the authors' code: the logarithm of a probability of zero stays finite
        now = (probs * ((probs + tiny).log() - (memory["probs"] + tiny).log())).sum(
            dim=-1, keepdim=True
        )
        recent = memory["recent"].roll(-1, dims=-1)
        recent[:, -1:] = now
    return Observation(logits, {"probs": probs, "recent": recent}, recent.amax(dim=-1).double())


def credit(
    logits: Tensor, memory: dict[str, Tensor] | None, options: Mapping[str, float]
) -> Observation:
    """For `credit`: logits raised where the same token has been the likeliest before; `threshold` then decides.

    A token's credit falls to `credit_decay` of itself with each pass of the block, grows by p ** `credit_power` where
    the token is the likeliest, p its probability, and adds `credit_weight` * log(1 + credit) to its logit.
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
    """Commit the `quota` positions where confidence times density is highest: near what is known already.

    The density of a position is the share of known positions around it, weighted by a Gaussian of standard deviation
    `sigma` over the canvas and its own length on either side. What is left of the canvas is known; what is right of
    it is known once the canvas's last position is. Source: d2Cache, arXiv:2509.23094; Kamichanw/d2Cache,
    certainty_density.
    """
    import torch

    known = (~view.canvas).double()
    extended = torch.cat([torch.ones_like(known), known, known[:, -1:].expand_as(known)], dim=-1)
    kernel = _kernel(known.shape[1], view.options["sigma"], known.device)
    # row by row: a product of matrices may round differently in another batch
    density = torch.stack([kernel @ row for row in extended])
    block = view.start[:, None] + torch.arange(view.masked.shape[1], device=known.device)
    return top_k(view.confidence * density.gather(-1, block), view.masked, view.quota)


@lru_cache(maxsize=4)
def _kernel(n: int, sigma: float, device: torch.device) -> Tensor:
    """[n, 3n] float64: Gaussian weights of the columns -n to 2n around each of the columns 0 to n; rows sum to 1."""
    import torch

    at = torch.arange(-n, 2 * n, dtype=torch.float64, device=device)
    weight = (-((at[n : 2 * n, None] - at) ** 2) / (2 * sigma**2)).exp()
    return weight / weight.sum(dim=-1, keepdim=True)
