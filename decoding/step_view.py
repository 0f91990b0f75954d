"""What an algorithm sees and how it says what it is: the step's frozen view, its options, its memory, its table entry.

Shapes: B rows in flight, T columns of the active block (the whole canvas where there are no blocks), N positions of the
canvas, R open positions of one row's block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from decoding.option import Option

if TYPE_CHECKING:
    from torch import Tensor

    from decoding.sampling import Rules

SCORES = frozenset({"confidence", "entropy", "margin"})


@dataclass(frozen=True)
class StepView:
    """What one step looks like. Fields that the algorithm does not name in `reads` are None.

    masked:     [B, T] bool, the open positions of each row's active block, as far as it looks ahead.
    quota:      [B] int64, positions that the schedule asks for at this step.
    rate:       [B] float64, the chance of each open position to be committed at this step (`origin`), else 1.
    noise:      [B, T] float64 uniform in (0, 1), drawn per sample, step and position; None where not `noisy`.
    confidence: [B, T] float64, probability of the proposed token.
    entropy:    [B, T] float64, entropy of the distribution in nats.
    margin:     [B, T] float64, probability of the likeliest token less that of the second.
    step:       [B] int64, steps that each row's block has behind it.
    canvas:     [B, N] bool, the open positions of the whole canvas.
    start:      [B] int64, where on the canvas the block begins; given with `canvas`.
    observed:   [B, T] float64, the score of `Algorithm.observe`; None where it gives none.
    agreed:     [B, T] bool, whether `Algorithm.verification` draws the proposed token too; None where there is none.
    options:    the algorithm's own options by name.
    alg_temp:   temperature of the order itself; 0 takes the best positions, above 0 draws them.
    """

    masked: Tensor
    quota: Tensor
    rate: Tensor
    noise: Tensor | None = None
    confidence: Tensor | None = None
    entropy: Tensor | None = None
    margin: Tensor | None = None
    step: Tensor | None = None
    canvas: Tensor | None = None
    start: Tensor | None = None
    observed: Tensor | None = None
    agreed: Tensor | None = None
    options: Mapping[str, float] = field(default_factory=dict)
    alg_temp: float = 0.0


@dataclass(frozen=True)
class Observation:
    """What an algorithm with a memory makes of one row's forward pass.

    logits: [R, V], from which tokens are proposed and scored.
    memory: name -> [R, ...]; the next pass of the block gets back what belongs to the positions still open.
    score:  [R] float64, becomes the view's `observed`; or None.
    """

    logits: Tensor
    memory: dict[str, Tensor]
    score: Tensor | None = None


@dataclass(frozen=True)
class Verification:
    """How a draft is drawn, and what it is held against: two pure functions over a second model's logits.

    The second model, the verifier, is autoregressive: its logits of a position are those after the draft up to there.
    draft:  (logits [R, V], rules, noise) -> tokens [R] int64.
    target: (logits [R, V], verifier's logits [R, A], rules, options, noise) -> tokens [R]; A, its vocabulary, may be
            smaller or larger than V, and a token is the same number in both.
    noise:  [R, V] float64, standard Gumbel, of the sample, step and position; None at temperature 0.
    """

    draft: Callable[[Tensor, Rules, Tensor | None], Tensor]
    target: Callable[[Tensor, Tensor, Rules, Mapping[str, float], Tensor | None], Tensor]


@dataclass(frozen=True)
class Algorithm:
    """An entry of the table.

    select:   StepView -> [B, T] bool, a subset of view.masked.
    families: model families that it is defined for.
    schedule: "even" splits a block over its steps, remainder first (LLaDA); "floor" is Dream's schedule; "stride" is
              tokens_per_step positions every step; "adaptive": the algorithm decides how many, tokens_per_step is the
              least that it should.
    blocks:   whether the canvas is decoded in blocks where nothing is said about it.
    reads:    what select looks at: scores of the model's distribution ("confidence", "entropy", "margin"), "step",
              "canvas". Without a score the positions are chosen before the forward pass and the model is asked for
              these alone.
    noisy:    select reads `noise`.
    draws_order: alg_temp applies.
    ends_at_eos: the official loop itself stops once the end token is on the canvas.
    options:  name -> Option.
    observe:  (logits [R, V] in the precision of the scores, memory or None on a block's first pass, options) ->
              Observation. Pure, called for each row by itself.
    left_to_right: always commits the first open positions: it can look ahead less far (max_lookahead), and keep what is
              far to the left (kv_cache "window").
    verification: with a verifier; select then reads `agreed`, and no score.
    """

    select: Callable[[StepView], Tensor]
    families: Container[str]
    schedule: str
    blocks: bool = False
    reads: frozenset[str] = frozenset()
    noisy: bool = False
    draws_order: bool = False
    ends_at_eos: bool = False
    options: Mapping[str, Option] = field(default_factory=dict)
    observe: (
        Callable[[Tensor, dict[str, Tensor] | None, Mapping[str, float]], Observation] | None
    ) = None
    left_to_right: bool = False
    verification: Verification | None = None

    @property
    def scores(self) -> frozenset[str]:
        """The scores of the model's distribution that select looks at."""
        return self.reads & SCORES

    @property
    def chooses_first(self) -> bool:
        """Whether the positions are chosen before the forward pass, which is then asked for these alone."""
        return not self.scores and self.verification is None


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
