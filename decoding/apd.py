"""Adaptive parallel decoding: draws of a draft and of its verification, as pure functions.

The diffusion model proposes tokens independently of each other; an autoregressive verifier scores
them together. A drafted token is accepted if the same token is drawn from the mixture of both
models.

Shapes: R drafted positions, V vocabulary of the diffusion model, A vocabulary of the verifier.
Source: APD, arXiv:2506.00413; danielmisrael/apd dream/generation_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from decoding.step_view import Verification

if TYPE_CHECKING:
    from torch import Tensor

    from decoding.sampling import Rules

INFINITE = float("inf")


def draft(logits: Tensor, rules: Rules, noise: Tensor | None) -> Tensor:
    """The likeliest tokens; above temperature 0, draws from the nucleus of softmax(logits / T)."""
    if noise is None:
        return logits.argmax(dim=-1)
    return (_cooled(logits, rules) + noise).argmax(dim=-1)


def target(
    logits: Tensor,
    verifier: Tensor,
    rules: Rules,
    options: Mapping[str, float],
    noise: Tensor | None,
) -> Tensor:
    """Draws from the mixture with the draft's temperature and noise, as in the paper's algorithm 1.

    With shared noise, similar distributions give equal draws more often. At temperature 0 these are
    the likeliest tokens. Only the draft has a nucleus, as in the released code.
    """
    mixed = mixture(logits, verifier, rules, options["apd_mixture_weight"])
    if noise is None:
        return mixed.argmax(dim=-1)
    return (mixed.double() / rules.temperature + noise[:, : mixed.shape[1]]).argmax(dim=-1)


def draft_released(logits: Tensor, rules: Rules, noise: Tensor | None) -> Tensor:
    """As `draft`, but the draws have the square of the temperature; the nucleus does not.

    The released sample_with_gumbel divides the logits by the temperature and also raises the noise
    to that power.
    """
    if noise is None:
        return logits.argmax(dim=-1)
    return (_cooled(logits, rules) / rules.temperature + noise).argmax(dim=-1)


def target_released(
    logits: Tensor,
    verifier: Tensor,
    rules: Rules,
    options: Mapping[str, float],
    noise: Tensor | None,
) -> Tensor:
    """The likeliest tokens of the mixture, at every temperature.

    The released apd_accept_criterion passes on the draft's noise but not the temperature, so the
    noise is not used.
    """
    return mixture(logits, verifier, rules, options["apd_mixture_weight"]).argmax(dim=-1)


PAPER = Verification(draft, target)
RELEASED = Verification(draft_released, target_released)


def mixture(logits: Tensor, verifier: Tensor, rules: Rules, weight: float) -> Tensor:
    """[R, min(V, A)]: weight * log p_diffusion + (1 - weight) * log p_verifier of shared tokens."""
    both = min(logits.shape[1], verifier.shape[1])
    parts = [(share, x) for share, x in ((weight, logits), (1 - weight, verifier)) if share]
    mixed = sum(
        share * x.to(rules.dtype or logits.dtype).log_softmax(dim=-1)[:, :both]
        for share, x in parts
    )
    # the mask token is never proposed, even if the verifier prefers it
    return mixed.masked_fill(logits[:, :both] == -INFINITE, -INFINITE)


def _cooled(logits: Tensor, rules: Rules) -> Tensor:
    """[R, V] float64: logits / temperature, with -inf outside the nucleus and the top k."""
    from decoding.sampling import filtered

    wide = logits.double()
    return filtered(
        (wide - wide.amax(dim=-1, keepdim=True)) / rules.temperature, rules.top_p, rules.top_k
    )
