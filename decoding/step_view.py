"""The parts of an algorithm: its table entry, the frozen view of a step, and its memory.

Shapes: B rows in flight, T columns of the active block (without blocks: of the whole canvas), N
positions of the canvas, R open positions of one row's block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from decoding.option import Option

if TYPE_CHECKING:
    from torch import Tensor

    from decoding.sampling import Rules

SCORES = frozenset({"confidence", "entropy", "margin"})
SCHEDULES = frozenset({"even", "floor", "stride", "adaptive"})


class _Unread:
    """Stands for a field of the view that the algorithm has not asked for; any use is an error."""

    def __getattr__(self, name: str):
        raise AttributeError(
            "select uses a field of StepView that the algorithm's entry leaves out; "
            "name it in `reads` (the noise: `noisy`)"
        )


UNREAD: Any = _Unread()


@dataclass(frozen=True)
class StepView:
    """One step of all rows, read-only. Only fields that the algorithm names in `reads` are there.

    masked:     [B, T] bool, open positions of each row's active block, within the lookahead.
    quota:      [B] int64, number of positions that the schedule asks for at this step.
    rate:       [B] float64, probability that the step commits an open position (`origin`), else 1.
    noise:      [B, T] float64 uniform in (0, 1), drawn per sample, step and position; there if
                the algorithm is `noisy`.
    confidence: [B, T] float64, probability of the proposed token.
    entropy:    [B, T] float64, entropy of the distribution in nats.
    margin:     [B, T] float64, probability of the likeliest token minus that of the second.
    step:       [B] int64, number of steps that each row's block has had.
    canvas:     [B, N] bool, open positions of the whole canvas.
    start:      [B] int64, first position of the block on the canvas; comes with `canvas`.
    observed:   [B, T] float64, the score of `Algorithm.observe`, if it returns one.
    agreed:     [B, T] bool, whether `Algorithm.verification` draws the proposed token too;
                with a verification only.
    options:    the algorithm's own options, by name.
    alg_temp:   temperature of the order of commits: 0 takes the best positions, above 0 draws them.
    """

    masked: Tensor
    quota: Tensor
    rate: Tensor
    noise: Tensor = UNREAD
    confidence: Tensor = UNREAD
    entropy: Tensor = UNREAD
    margin: Tensor = UNREAD
    step: Tensor = UNREAD
    canvas: Tensor = UNREAD
    start: Tensor = UNREAD
    observed: Tensor = UNREAD
    agreed: Tensor = UNREAD
    options: Mapping[str, float] = field(default_factory=dict)
    alg_temp: float = 0.0


@dataclass(frozen=True)
class Observation:
    """The result of `Algorithm.observe` for one row and one forward pass.

    logits: [R, V]; tokens are proposed from them and scored by them.
    memory: name -> [R, ...]. The next pass of the block gets the entries of the positions that are
            still open.
    score:  [R] float64, the view's `observed`; or None.
    """

    logits: Tensor
    memory: dict[str, Tensor]
    score: Tensor | None = None


@dataclass(frozen=True)
class Verification:
    """How a draft is drawn and checked, as two pure functions.

    The verifier is a second, autoregressive model: its logits of a position depend on the draft to
    the left of that position.
    draft:  (logits [R, V], rules, noise) -> tokens [R] int64.
    target: (logits [R, V], verifier's logits [R, A], rules, options, noise) -> tokens [R] int64.
            The verifier's vocabulary A may be smaller or larger than V; a token has the same id in
            both.
    noise:  [R, V] float64, standard Gumbel, per sample, step and position; None at temperature 0.
    """

    draft: Callable[[Tensor, Rules, Tensor | None], Tensor]
    target: Callable[[Tensor, Tensor, Rules, Mapping[str, float], Tensor | None], Tensor]


@dataclass(frozen=True)
class Algorithm:
    """An entry of the table.

    select:   StepView -> [B, T] bool, a subset of view.masked. A pure function.
    families: model families that it is defined for; FAMILIES means all.
    schedule: "even" splits a block evenly over its steps, remainder first (LLaDA); "floor" is
              Dream's schedule; "stride" is tokens_per_step positions in every step; with "adaptive"
              the algorithm decides, and tokens_per_step is the minimum.
    blocks:   the canvas is decoded in blocks by default.
    reads:    fields of the view that select reads: "confidence", "entropy", "margin" (the scores),
              "step", "canvas". Without a score the positions are chosen before the forward pass,
              and the model predicts only these.
    noisy:    select reads `noise`.
    draws_order: alg_temp applies.
    ends_at_eos: the algorithm itself stops once the end token is on the canvas.
    options:  name -> Option.
    observe:  (logits [R, V] in the precision of the scores, memory, options) -> Observation. A pure
              function, called for each row. memory is None on the first pass of a block.
    left_to_right: it always commits the first open positions. max_lookahead and kv_cache "window"
              are then possible.
    verification: the use of a verifier; select then reads `agreed` and no score.
    scores_the_draw: an adaptive rule that scores the distribution of the draw where the family
              does; by default it reads the model's own probability, see `reads_the_model`.
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
    scores_the_draw: bool = False

    @property
    def reads_the_model(self) -> bool:
        """Whether the scores are those of the plain softmax of the logits in every family."""
        return self.schedule == "adaptive" and not self.scores_the_draw

    def __post_init__(self) -> None:
        for name, given, known in (
            ("schedule", {self.schedule}, SCHEDULES),
            ("reads", self.reads, SCORES | {"step", "canvas"}),
        ):
            if wrong := sorted(given - known):
                raise ValueError(
                    f"{name} {wrong[0]!r} is not known; there are: {', '.join(sorted(known))}"
                )

    @property
    def scores(self) -> frozenset[str]:
        """The scores that select reads."""
        return self.reads & SCORES

    @property
    def chooses_first(self) -> bool:
        """Whether positions are chosen before the forward pass, which then predicts only these."""
        return not self.scores and self.verification is None


def top_k(score: Tensor, masked: Tensor, k: Tensor) -> Tensor:
    """Mask of the k[b] highest-scoring masked positions in each row.

    score:  [B, T] any float dtype; read only where masked.
    masked: [B, T] bool.
    k:      [B] int64, number of positions; if fewer are masked, all of them are taken.
    Returns [B, T] bool. Of equal scores the leftmost is taken first, so the result does not depend
    on the device. Raises ValueError if the shapes disagree.
    """
    if score.shape != masked.shape or k.shape != score.shape[:1]:
        raise ValueError(
            f"top_k: score {tuple(score.shape)}, masked {tuple(masked.shape)} and "
            f"k {tuple(k.shape)} must be [B, T], [B, T] and [B]"
        )
    order = score.masked_fill(~masked, -float("inf")).argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(dim=-1) < k[:, None]) & masked
