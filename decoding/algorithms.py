"""Which open positions a step commits: one pure function per algorithm, one table.

An algorithm sees a frozen view of the step and returns a mask. It draws no randomness and writes nothing, so it is
the same alone and in a batch. It may commit several positions, or none where its schedule asks for none. Those that
decide themselves how many positions they commit are in adaptive.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from decoding import adaptive
from decoding.apd import PAPER, RELEASED
from decoding.option import Option
from decoding.step_view import Algorithm, StepView, Verification, top_k

if TYPE_CHECKING:
    from torch import Tensor


class _EveryFamily:
    """Contains the name of every model family, those that are registered later too."""

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str)


FAMILIES = _EveryFamily()


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


def apd(view: StepView) -> Tensor:
    """Commit the first `quota` open positions, and those behind them up to the first that the verifier disagrees on.

    Source: APD, arXiv:2506.00413, algorithm 1; danielmisrael/apd dream/generation_utils.py, apd_accept_criterion.
    """
    first = view.masked.cumsum(dim=-1) <= view.quota[:, None]
    return view.masked & (first | view.agreed | ~view.masked).long().cumprod(dim=-1).bool()


def _apd(verification: Verification) -> Algorithm:
    """`apd` by the paper's rule or by that of the released code."""
    return Algorithm(
        apd,
        ("dream",),
        "adaptive",
        ends_at_eos=True,
        left_to_right=True,
        verification=verification,
        options=MIXTURE,
    )


def _dream(select: Callable[[StepView], Tensor], score: str) -> Algorithm:
    return Algorithm(
        select, ("dream",), "floor", reads=frozenset({score}), noisy=True, draws_order=True
    )


THRESHOLD = {
    "threshold": Option(0.9, "commit every position with at least this confidence", high=1.0)
}
MIXTURE = {
    "apd_mixture_weight": Option(
        0.7, "share of the diffusion model in what is verified (R)", high=1.0
    )
}
CONFIDENCE, ENTROPY = frozenset({"confidence"}), frozenset({"entropy"})

ALGORITHMS: dict[str, Algorithm] = {
    "low_confidence": Algorithm(low_confidence, ("llada",), "even", blocks=True, reads=CONFIDENCE),
    "random": Algorithm(random, ("llada",), "even", blocks=True, noisy=True),
    "leftright": Algorithm(leftright, FAMILIES, "stride", ends_at_eos=True, left_to_right=True),
    "maskgit_plus": _dream(maskgit_plus, "confidence"),
    "topk_margin": _dream(topk_margin, "margin"),
    "entropy": _dream(entropy, "entropy"),
    "origin": Algorithm(origin, ("dream",), "floor", noisy=True),
    "threshold": Algorithm(
        adaptive.threshold, FAMILIES, "adaptive", blocks=True, reads=CONFIDENCE, options=THRESHOLD
    ),
    "confidence_threshold": Algorithm(
        adaptive.confidence_threshold,
        ("dream",),
        "adaptive",
        blocks=True,
        reads=CONFIDENCE | {"step"},
        options=THRESHOLD,
    ),
    "factor": Algorithm(
        adaptive.factor,
        FAMILIES,
        "adaptive",
        blocks=True,
        reads=CONFIDENCE,
        options={
            "factor": Option(
                1.0, "commit n positions while (n + 1) * (1 - confidence) stays below it"
            )
        },
    ),
    "entropy_threshold": Algorithm(
        adaptive.entropy_threshold,
        FAMILIES,
        "adaptive",
        blocks=True,
        reads=ENTROPY,
        options={
            "threshold": Option(0.4, "commit every position with at most this entropy, in nats")
        },
    ),
    "eb_sampler": Algorithm(
        adaptive.eb_sampler,
        FAMILIES,
        "adaptive",
        blocks=True,
        reads=ENTROPY,
        options={
            "gamma": Option(
                0.001,
                "commit positions while their entropies, less the highest, sum to at most this",
            )
        },
    ),
    "klass": Algorithm(
        adaptive.klass,
        FAMILIES,
        "adaptive",
        blocks=True,
        reads=CONFIDENCE,
        observe=adaptive.divergences,
        options=THRESHOLD
        | {
            "kl_threshold": Option(
                0.01, "a position is stable while its distribution moves by less than this"
            ),
            "kl_history": Option(2, "over this many forward passes", low=1, whole=True),
        },
    ),
    "credit": Algorithm(
        adaptive.threshold,
        FAMILIES,
        "adaptive",
        blocks=True,
        reads=CONFIDENCE,
        observe=adaptive.credit,
        options=THRESHOLD
        | {
            "credit_weight": Option(0.7, "how much a token's credit raises its logit (alpha)"),
            "credit_decay": Option(
                0.8, "what is left of a credit after each forward pass (beta)", high=1.0
            ),
            "credit_power": Option(
                0.2, "a credit grows by the token's probability to this power (gamma)"
            ),
        },
    ),
    "certainty": Algorithm(
        adaptive.certainty,
        FAMILIES,
        "even",
        reads=CONFIDENCE | {"canvas"},
        options={
            "sigma": Option(
                10.0, "standard deviation, in positions, of what counts as near", low=0.01
            )
        },
    ),
    "apd": _apd(PAPER),
    "apd_released": _apd(RELEASED),
}


def algorithms_of(family: str) -> list[str]:
    """Names of the algorithms that are defined for a model family."""
    return [name for name, algorithm in ALGORITHMS.items() if family in algorithm.families]


def algorithm_options() -> dict[str, list[str]]:
    """Every option that an algorithm of the table takes now, with the names of the algorithms that take it."""
    users: dict[str, list[str]] = {}
    for name, algorithm in ALGORITHMS.items():
        for option in algorithm.options:
            users.setdefault(option, []).append(name)
    return users
