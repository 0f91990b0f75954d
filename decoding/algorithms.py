"""Which open positions a step commits: one pure function per algorithm, one table.

An algorithm takes a frozen view of the step and returns a mask. It draws no randomness and writes
nothing, so a row gets the same result alone and in a batch. It may commit several positions, and
none if its schedule asks for none. adaptive.py has the algorithms that decide the number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from decoding import adaptive
from decoding.apd import PAPER, RELEASED
from decoding.option import Option
from decoding.step_view import Algorithm, StepView, Verification, top_k

if TYPE_CHECKING:
    from torch import Tensor


class _EveryFamily:
    """Contains the name of every model family, including families that are registered later."""

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str)


FAMILIES = _EveryFamily()


def _drawn(score: Tensor, view: StepView) -> Tensor:
    """Scores whose top k are k draws without replacement from softmax(score / alg_temp)."""
    if not view.alg_temp:
        return score
    return score / view.alg_temp - (-view.noise.log()).log()


def low_confidence(view: StepView) -> Tensor:
    """Commit the `quota` most confident positions. LLaDA names it after those it remasks.

    Source: LLaDA, arXiv:2502.09992; ML-GSAI/LLaDA generate.py.
    """
    return top_k(view.confidence, view.masked, view.quota)


def random(view: StepView) -> Tensor:
    """Commit `quota` positions in a random order.

    Source: LLaDA, arXiv:2502.09992; ML-GSAI/LLaDA generate.py, remasking="random".
    """
    return top_k(view.noise, view.masked, view.quota)


def leftright(view: StepView) -> Tensor:
    """Commit the first `quota` open positions: the order of an autoregressive model.

    Source: APD, arXiv:2506.00413; danielmisrael/apd llada/llada_generate.py and
    dream/generation_utils.py.
    """
    return view.masked & (view.masked.cumsum(dim=-1) <= view.quota[:, None])


def maskgit_plus(view: StepView) -> Tensor:
    """Commit the `quota` most confident positions, or draw them if alg_temp is above 0.

    Source: MaskGIT, arXiv:2202.04200; DreamLM/Dream generation_utils.py.
    """
    return top_k(_drawn(view.confidence, view), view.masked, view.quota)


def topk_margin(view: StepView) -> Tensor:
    """Commit the `quota` positions with the largest margin of the likeliest token over the second.

    Source: arXiv:2502.06768; DreamLM/Dream generation_utils.py.
    """
    return top_k(_drawn(view.margin, view), view.masked, view.quota)


def entropy(view: StepView) -> Tensor:
    """Commit the `quota` positions with the lowest entropy.

    Source: Dream, arXiv:2508.15487; DreamLM/Dream generation_utils.py.
    """
    return top_k(_drawn(-view.entropy, view), view.masked, view.quota)


def origin(view: StepView) -> Tensor:
    """Commit each open position with probability `rate`, independently of the model's scores.

    Source: D3PM, arXiv:2107.03006; DreamLM/Dream generation_utils.py.
    """
    return view.masked & (view.noise < view.rate[:, None])


def apd(view: StepView) -> Tensor:
    """Commit the first `quota` open positions, then those up to the verifier's first disagreement.

    Source: APD, arXiv:2506.00413, algorithm 1; danielmisrael/apd dream/generation_utils.py,
    apd_accept_criterion.
    """
    first = view.masked.cumsum(dim=-1) <= view.quota[:, None]
    return view.masked & (first | view.agreed | ~view.masked).long().cumprod(dim=-1).bool()


CONFIDENCE, ENTROPY = frozenset({"confidence"}), frozenset({"entropy"})
THRESHOLD = {
    "threshold": Option(0.9, "commit every position with at least this confidence", high=1.0)
}


def _dream(select: Callable[[StepView], Tensor], score: str) -> Algorithm:
    return Algorithm(
        select,
        ("dream",),
        "floor",
        blocks=True,
        reads=frozenset({score}),
        noisy=True,
        draws_order=True,
    )


def _adaptive(
    select: Callable[[StepView], Tensor],
    reads: frozenset[str],
    options: Mapping[str, Option],
    **more: Any,
) -> Algorithm:
    return Algorithm(
        select,
        FAMILIES,
        "adaptive",
        blocks=True,
        reads=reads,
        options=options,
        **more,
    )


def _apd(verification: Verification) -> Algorithm:
    """`apd` with the rule of the paper or of the released code."""
    text = "weight of the diffusion model in its mixture with the verifier (R)"
    return Algorithm(
        apd,
        ("dream",),
        "adaptive",
        ends_at_eos=True,
        left_to_right=True,
        verification=verification,
        options={"apd_mixture_weight": Option(0.7, text, high=1.0)},
    )


ALGORITHMS: dict[str, Algorithm] = {
    "low_confidence": Algorithm(low_confidence, ("llada",), "even", blocks=True, reads=CONFIDENCE),
    "random": Algorithm(random, ("llada",), "even", blocks=True, noisy=True),
    "leftright": Algorithm(leftright, FAMILIES, "stride", ends_at_eos=True, left_to_right=True),
    "maskgit_plus": _dream(maskgit_plus, "confidence"),
    "topk_margin": _dream(topk_margin, "margin"),
    "entropy": _dream(entropy, "entropy"),
    "origin": Algorithm(origin, ("dream",), "floor", noisy=True),
    "threshold": _adaptive(adaptive.threshold, CONFIDENCE, THRESHOLD),
    "confidence_threshold": Algorithm(
        adaptive.confidence_threshold,
        ("dream",),
        "adaptive",
        blocks=True,
        reads=CONFIDENCE | {"step"},
        options=THRESHOLD,
        scores_the_draw=True,
    ),
    "factor": _adaptive(
        adaptive.factor,
        CONFIDENCE,
        {
            "factor": Option(
                1.0,
                "commit the n most confident positions, for the largest n with "
                "(n + 1) * (1 - confidence) below this",
            )
        },
    ),
    "entropy_threshold": _adaptive(
        adaptive.entropy_threshold,
        ENTROPY,
        {"threshold": Option(0.4, "commit every position with at most this entropy, in nats")},
    ),
    "eb_sampler": _adaptive(
        adaptive.eb_sampler,
        ENTROPY,
        {
            "gamma": Option(
                0.001,
                "commit the n positions of lowest entropy, for the largest n whose entropies "
                "without the highest sum to at most this",
            )
        },
    ),
    "klass": _adaptive(
        adaptive.klass,
        CONFIDENCE,
        {
            "threshold": Option(
                0.9, "commit every stable position with more than this confidence", high=1.0
            ),
            "kl_threshold": Option(
                0.01, "a position is stable if its KL divergence from pass to pass is below this"
            ),
            "kl_history": Option(
                2, "forward passes for which a position must be stable", low=1, whole=True
            ),
        },
        observe=adaptive.divergences,
    ),
    "credit": _adaptive(
        adaptive.threshold,
        CONFIDENCE,
        THRESHOLD
        | {
            "credit_weight": Option(0.7, "weight of a token's credit in its logit (alpha)"),
            "credit_decay": Option(
                0.8, "share of a credit that remains after each forward pass (beta)", high=1.0
            ),
            "credit_power": Option(
                0.2, "a credit grows by the token's probability to this power (gamma)"
            ),
        },
        observe=adaptive.credit,
    ),
    "certainty": Algorithm(
        adaptive.certainty,
        FAMILIES,
        "even",
        reads=CONFIDENCE | {"canvas"},
        options={
            "sigma": Option(
                10.0, "standard deviation of the weights around a position, in positions", low=0.01
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
    """Name of every algorithm option -> names of the algorithms that take it, as of this call."""
    users: dict[str, list[str]] = {}
    for name, algorithm in ALGORITHMS.items():
        for option in algorithm.options:
            users.setdefault(option, []).append(name)
    return users
