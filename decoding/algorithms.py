"""Which open positions a step commits: one pure function per algorithm, one table.

An algorithm sees a frozen view of the step and returns a mask. It draws no randomness and writes nothing, so it is
the same alone and in a batch. It may commit several positions, or none where its schedule asks for none.

Shapes: B rows in flight, T columns of the active block (the whole canvas where an algorithm knows no blocks).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = ("llada", "dream")


@dataclass(frozen=True)
class StepView:
    """What one step looks like. Fields that the algorithm does not name in `reads` are None.

    masked:     [B, T] bool, the open positions of each row's active block.
    quota:      [B] int64, positions that the schedule asks for at this step.
    rate:       [B] float64, the chance of each open position to be committed at this step (`origin`), else 1.
    noise:      [B, T] float64 uniform in (0, 1), drawn per sample, step and position; None where not `noisy`.
    confidence: [B, T] float64, probability of the proposed token.
    entropy:    [B, T] float64, entropy of the distribution in nats.
    margin:     [B, T] float64, probability of the likeliest token less that of the second.
    alg_temp:   temperature of the order itself; 0 takes the best positions, above 0 draws them.
    """

    masked: Tensor
    quota: Tensor
    rate: Tensor
    noise: Tensor | None = None
    confidence: Tensor | None = None
    entropy: Tensor | None = None
    margin: Tensor | None = None
    alg_temp: float = 0.0


def top_k(score: Tensor, masked: Tensor, k: Tensor) -> Tensor:
    """Mask of the k[b] highest-scoring masked positions in each row.

    score:  [B, T] any float dtype; read only where masked.
    masked: [B, T] bool.
    k:      [B] int64, positions to take; more than are masked means all of them.
    Returns [B, T] bool. Equal scores are taken leftmost first, so the choice does not depend on the device.
    """
    if score.shape != masked.shape or k.shape != score.shape[:1]:
        raise ValueError(
            f"top_k: score {tuple(score.shape)}, masked {tuple(masked.shape)} and k {tuple(k.shape)} "
            "must be [B, T], [B, T] and [B]"
        )
    order = score.masked_fill(~masked, -float("inf")).argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(dim=-1) < k[:, None]) & masked


def _drawn(score: Tensor, view: StepView) -> Tensor:
    """Scores whose top k are a draw of k positions without replacement from softmax(score / alg_temp)."""
    if not view.alg_temp:
        return score
    return score / view.alg_temp - (-view.noise.log()).log()


def low_confidence(view: StepView) -> Tensor:
    """Commit the `quota` most confident positions; the others are remasked (hence LLaDA's name for it).

    Source: LLaDA, arXiv:2502.09992; ML-GSAI/LLaDA generate.py.
    """
    return top_k(view.confidence, view.masked, view.quota)


def random(view: StepView) -> Tensor:
    """Commit `quota` positions in an order drawn by chance.

    Source: LLaDA, arXiv:2502.09992; ML-GSAI/LLaDA generate.py, remasking="random".
    """
    return top_k(view.noise, view.masked, view.quota)


def leftright(view: StepView) -> Tensor:
    """Commit the first `quota` open positions: left to right, the order of an autoregressive model.

    Source: APD, arXiv:2506.00413; danielmisrael/apd llada/llada_generate.py and dream/generation_utils.py.
    """
    return view.masked & (view.masked.cumsum(dim=-1) <= view.quota[:, None])


def maskgit_plus(view: StepView) -> Tensor:
    """Commit the `quota` positions with the highest confidence, drawn where alg_temp is above 0.

    Source: MaskGIT, arXiv:2202.04200; DreamLM/Dream generation_utils.py.
    """
    return top_k(_drawn(view.confidence, view), view.masked, view.quota)


def topk_margin(view: StepView) -> Tensor:
    """Commit the `quota` positions where the likeliest token leads the second by most.

    Source: arXiv:2502.06768; DreamLM/Dream generation_utils.py.
    """
    return top_k(_drawn(view.margin, view), view.masked, view.quota)


def entropy(view: StepView) -> Tensor:
    """Commit the `quota` positions with the lowest entropy.

    Source: Dream, arXiv:2508.15487; DreamLM/Dream generation_utils.py.
    """
    return top_k(_drawn(-view.entropy, view), view.masked, view.quota)


def origin(view: StepView) -> Tensor:
    """Commit each open position with the chance `rate`, whatever the model says: a random number of them.

    Source: D3PM, arXiv:2107.03006; DreamLM/Dream generation_utils.py.
    """
    return view.masked & (view.noise < view.rate[:, None])


@dataclass(frozen=True)
class Algorithm:
    """An entry of the table.

    select:   StepView -> [B, T] bool, a subset of view.masked.
    families: model families that it is defined for.
    schedule: "even" splits a block over its steps, remainder first (LLaDA); "floor" is Dream's schedule over the
              whole canvas; "stride" is tokens_per_step positions every step.
    reads:    scores of the model's distribution that select looks at, of "confidence", "entropy", "margin". With
              none, the positions are chosen before the forward pass and the model is asked for these alone.
    noisy:    select reads `noise`.
    draws_order: alg_temp applies.
    ends_at_eos: the official loop itself stops once the end token is on the canvas.
    """

    select: Callable[[StepView], Tensor]
    families: tuple[str, ...]
    schedule: str
    reads: frozenset[str] = field(default_factory=frozenset)
    noisy: bool = False
    draws_order: bool = False
    ends_at_eos: bool = False

    @property
    def blocks(self) -> bool:
        """Whether the canvas is decoded in blocks of block_length."""
        return self.schedule == "even"


def _dream(select: Callable[[StepView], Tensor], score: str) -> Algorithm:
    return Algorithm(select, ("dream",), "floor", reads=frozenset({score}), noisy=True, draws_order=True)


ALGORITHMS: dict[str, Algorithm] = {
    "low_confidence": Algorithm(low_confidence, ("llada",), "even", reads=frozenset({"confidence"})),
    "random": Algorithm(random, ("llada",), "even", noisy=True),
    "leftright": Algorithm(leftright, FAMILIES, "stride", ends_at_eos=True),
    "maskgit_plus": _dream(maskgit_plus, "confidence"),
    "topk_margin": _dream(topk_margin, "margin"),
    "entropy": _dream(entropy, "entropy"),
    "origin": Algorithm(origin, ("dream",), "floor", noisy=True),
}


def algorithms_of(family: str) -> list[str]:
    """Names of the algorithms that are defined for a model family."""
    return [name for name, algorithm in ALGORITHMS.items() if family in algorithm.families]
