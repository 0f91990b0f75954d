"""Logits to proposed tokens and their scores: one place, one stated precision.

Shapes: R queried positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows are scored in chunks of at most this many numbers, so that no float64 copy of all logits is ever made.
CHUNK_NUMBERS = 1 << 25
# As in Dream's code: the logarithm of a probability of zero stays finite.
ENTROPY_EPS = 1e-10


@dataclass(frozen=True)
class Rules:
    """How tokens are proposed and scored.

    temperature, top_p, top_k: of the draw; at temperature 0 the likeliest token is taken and the filters are inactive.
    dtype:            of softmax and scores; None is the logits' own.
    scores_the_draw:  confidence, entropy and margin are those of the filtered distribution that the token is drawn
                      from (Dream); otherwise of the plain softmax of the logits (LLaDA).
    never:            token ids that are never proposed.
    last:             token ids that keep no confidence: proposed as before, but scored without their mass and so
                      committed last. Source: ML-GSAI/LLaDA generate.py, confidence_eos_eot_inf at temperature 0.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    dtype: torch.dtype | None = torch.float64
    scores_the_draw: bool = False
    never: tuple[int, ...] = ()
    last: tuple[int, ...] = ()


@dataclass(frozen=True)
class Proposal:
    """tokens [R] int64; confidence, entropy (nats), margin [R] float64, None where not asked for."""

    tokens: Tensor
    confidence: Tensor | None = None
    entropy: Tensor | None = None
    margin: Tensor | None = None


def propose(logits: Tensor, rules: Rules, reads: frozenset[str], noise: Tensor | None = None) -> Proposal:
    """Proposed token and scores of each row.

    logits: [R, V] any float dtype, tokens that cannot be at -inf.
    reads:  which of "confidence", "entropy", "margin" to compute.
    noise:  [R] float64 uniform in [0, 1), one number for each drawn token; needed above temperature 0.
    """
    size = max(1, CHUNK_NUMBERS // logits.shape[-1])
    parts = [
        _propose(logits[i : i + size], rules, reads, None if noise is None else noise[i : i + size])
        for i in range(0, max(1, len(logits)), size)
    ]
    if len(parts) == 1:
        return parts[0]
    return Proposal(
        torch.cat([p.tokens for p in parts]),
        **{name: torch.cat([getattr(p, name) for p in parts]) for name in reads},
    )


def _propose(logits: Tensor, rules: Rules, reads: frozenset[str], noise: Tensor | None) -> Proposal:
    if rules.never:
        logits = logits.index_fill(-1, torch.tensor(rules.never, device=logits.device), -torch.inf)
    probs = None
    if rules.temperature > 0:
        # a draw needs more than bfloat16 sums even where the scores are kept in it
        wide = logits.double()
        wide = (wide - wide.amax(dim=-1, keepdim=True)) / rules.temperature  # a tiny temperature must not overflow
        probs = filtered(wide, rules.top_p, rules.top_k).softmax(dim=-1)
        tokens = draw(probs, noise)
    else:
        tokens = logits.argmax(dim=-1)
    if not reads:
        return Proposal(tokens)
    dtype = logits.dtype if rules.dtype is None else rules.dtype
    if probs is None or not rules.scores_the_draw:
        if rules.last:
            logits = logits.index_fill(-1, torch.tensor(rules.last, device=logits.device), -torch.inf)
        probs = logits.to(dtype).softmax(dim=-1)
    return Proposal(tokens, **_scores(probs.to(dtype), tokens, reads))


def _scores(probs: Tensor, tokens: Tensor, reads: frozenset[str]) -> dict[str, Tensor]:
    scores = {}
    if "confidence" in reads:
        scores["confidence"] = probs.gather(-1, tokens[:, None])[:, 0].double()
    if "entropy" in reads:
        scores["entropy"] = -(probs * (probs + ENTROPY_EPS).log()).sum(dim=-1).double()
    if "margin" in reads:
        best = probs.topk(2, dim=-1).values
        scores["margin"] = (best[:, 0] - best[:, 1]).double()
    return scores


def filtered(logits: Tensor, top_p: float | None, top_k: int | None) -> Tensor:
    """Logits [R, V] with everything outside the nucleus, then outside the k likeliest, at -inf.

    The nucleus is the smallest set of likeliest tokens whose mass exceeds top_p, so never empty.
    Source: DreamLM/Dream generation_utils.py, top_p_logits and top_k_logits.
    """
    if top_p is not None and top_p < 1:
        order = logits.sort(dim=-1, descending=True, stable=True)
        before = order.values.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order.indices, before > top_p)
        logits = logits.masked_fill(outside, -torch.inf)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    return logits


def draw(probs: Tensor, noise: Tensor) -> Tensor:
    """One token of each row of probs [R, V] (float64), by inverting its distribution function at noise [R].

    One number decides a draw, so what is drawn does not depend on which other positions are looked at.
    """
    cumulative = probs.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # below the total even where the product rounds up to it, or a token without mass could be drawn
    at = (noise[:, None] * total).minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, at, right=True)[:, 0]


def uniforms(seed: int, step: int, n: int) -> Tensor:
    """[2, n] float64 in [0, 1): for each of n positions the number of its token's draw, and that of its order.

    A function of (seed, step) alone, made on the CPU: the same on every device, in every batch, after every resume.
    """
    z = (seed + 0x9E3779B97F4A7C15 * (step + 1)) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    generator = torch.Generator().manual_seed((z ^ (z >> 31)) >> 1)
    return torch.rand(2, n, generator=generator, dtype=torch.float64)
