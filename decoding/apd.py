"""Adaptive parallel decoding: how a draft is drawn and what the verifier's mixture draws, as pure functions.

The diffusion model proposes a token for each open position on its own; an autoregressive verifier says how well they go
together. Where a draw from the mixture of both is the drafted token, it stands.

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
    """The likeliest tokens, or above temperature 0 a draw from the nucleus of softmax(logits / temperature)."""
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
    """A draw from the mixture at the draft's temperature and with the draft's noise, as in the paper's algorithm 1.

    With one noise for both the draws are equal the more often, the more alike the distributions are. At temperature 0
    the likeliest tokens are compared. The nucleus is the draft's alone, as in the released code.
    """
    mixed = mixture(logits, verifier, rules, options["apd_mixture_weight"])
    if noise is None:
        return mixed.argmax(dim=-1)
    return (mixed.double() / rules.temperature + noise[:, : mixed.shape[1]]).argmax(dim=-1)


def draft_released(logits: Tensor, rules: Rules, noise: Tensor | None) -> Tensor:
    """As `draft`, but drawn at the square of the temperature from the nucleus at the temperature itself.

    sample_with_gumbel divides the logits by the temperature and raises the noise to it as well.
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
    """The mixture's likeliest tokens at every temperature.

    apd_accept_criterion hands the draft's noise on, but not the temperature, without which it is not used.
    """
    return mixture(logits, verifier, rules, options["apd_mixture_weight"]).argmax(dim=-1)


PAPER = Verification(draft, target)
RELEASED = Verification(draft_released, target_released)


def mixture(logits: Tensor, verifier: Tensor, rules: Rules, weight: float) -> Tensor:
    """[R, min(V, A)]: weight * log p_diffusion + (1 - weight) * log p_verifier of the tokens that both have."""
    both = min(logits.shape[1], verifier.shape[1])
    parts = [(share, x) for share, x in ((weight, logits), (1 - weight, verifier)) if share]
    mixed = sum(
        share * x.to(rules.dtype or logits.dtype).log_softmax(dim=-1)[:, :both]
        for share, x in parts
    )
    # the mask token is never proposed, whatever the verifier thinks of it
    return mixed.masked_fill(logits[:, :both] == -INFINITE, -INFINITE)


def _cooled(logits: Tensor, rules: Rules) -> Tensor:
    """[R, V] float64: logits / temperature, outside nucleus and top k at -inf."""
    from decoding.sampling import filtered

    wide = logits.double()
    return filtered(
        (wide - wide.amax(dim=-1, keepdim=True)) / rules.temperature, rules.top_p, rules.top_k
    )
