"""Proposed tokens and their scores from logits: in one place, in one stated precision.

Shapes: R queried positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Rows are scored in chunks of at most this many numbers, so there is never a float64 copy of all
# logits. On a CPU a chunk stays in the cache and its memory is reused: 3 times the speed at 152,064
# tokens.
CHUNK_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 25}
# The nucleus and the top k are searched among this many likeliest tokens first, then among all.
SHORTLIST = 256
# A float32 sum over the vocabulary does not decide closer to top_p than this: 10 times its error.
UNDECIDED = 1e-5
# As in Dream's code, so that log(0) stays finite.
ENTROPY_EPS = 1e-10


@dataclass(frozen=True)
class Rules:
    """How tokens are proposed and scored.

    temperature, top_p, top_k: of the draw. At temperature 0 the likeliest token is taken and the
                      filters have no effect.
    dtype:            of softmax and scores; None means that of the logits.
    scores_the_draw:  confidence, entropy and margin are those of the filtered distribution that the
                      token is drawn from (Dream); otherwise of the plain softmax of the logits
                      (LLaDA, and the adaptive rules of every family).
    never:            token ids that are never proposed.
    last:             token ids that have no confidence. They are proposed as before, but scored
                      without their mass, and so committed last.
                      Source: ML-GSAI/LLaDA generate.py, confidence_eos_eot_inf at temperature 0.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    dtype: torch.dtype | None = torch.float64
    scores_the_draw: bool = False
    never: tuple[int, ...] = ()
    last: tuple[int, ...] = ()


class NoFiniteLogits(ArithmeticError):
    """The model, or its verifier, gives NaN or infinity where a token is asked for.

    everywhere: at every position that the step asks for, in every row.
    """

    def __init__(self, n: int, of: int, whose: str = "model"):
        self.everywhere = n == of
        super().__init__(
            f"the {whose} gives no finite logits at {n} of {of} open positions; its weights are "
            "damaged, or they do not fit into --dtype"
        )


@dataclass(frozen=True)
class Proposal:
    """tokens [R] int64; confidence, entropy (nats), margin [R] float64, None if not requested.

    A token is -1 where the logits are not finite: see `marked`.
    sound: [R] bool, where token and scores hold; None if they do everywhere. `settled` takes the
           indices of the other rows, and gives the proposal that holds everywhere.
    """

    tokens: Tensor
    confidence: Tensor | None = None
    entropy: Tensor | None = None
    margin: Tensor | None = None
    sound: Tensor | None = None
    settled: Callable[[Tensor], Proposal] | None = None


def propose(
    logits: Tensor, rules: Rules, reads: frozenset[str], noise: Tensor | None = None
) -> Proposal:
    """Proposed token and scores of each row. Arguments: see `quick_proposal`."""
    proposal = quick_proposal(logits, rules, reads, noise)
    if proposal.sound is None:
        return proposal
    # this waits for the device, so it is done once for all chunks
    return proposal.settled((~proposal.sound).nonzero()[:, 0])


def quick_proposal(
    logits: Tensor, rules: Rules, reads: frozenset[str], noise: Tensor | None = None
) -> Proposal:
    """Proposed token and scores of each row, as far as no vocabulary has to be sorted for them.

    It does not wait for the device.

    logits: [R, V] any float dtype; -inf excludes a token. Where a row has NaN, +inf or no finite
            number, its token is -1.
    reads:  the scores to compute, among "confidence", "entropy" and "margin".
    noise:  [R] float64 uniform in [0, 1), for the draw of each row; required above temperature 0.
    """
    groups = chunks(logits)
    parts = [
        _propose(logits[part], rules, reads, None if noise is None else noise[part])
        for part in groups
    ]
    proposal = joined([found for found, _ in parts], reads)
    if parts[0][1] is None:
        return proposal
    all_sound = torch.cat([sound for _, sound in parts])

    def settled(rest: Tensor) -> Proposal:
        for some in rest.split(groups[0].stop) if len(rest) else ():
            exact = _drawn(mask_tokens(logits[some], rules.never), rules, reads, noise[some])
            for name in ("tokens", *reads):
                getattr(proposal, name)[some] = getattr(exact, name)
        return proposal

    return replace(proposal, sound=all_sound, settled=settled)


def marked(tokens: Tensor, best: Tensor) -> Tensor:
    """The tokens [R], with -1 where the row's largest logit, best [R], is not finite.

    The engine reads the mark with the tokens, in the step's one transfer to the host.
    """
    return tokens.masked_fill(~best.isfinite(), -1)


def joined(parts: list[Proposal], reads: frozenset[str]) -> Proposal:
    """One proposal of several, with the scores `reads`."""
    if len(parts) == 1:
        return parts[0]
    return Proposal(
        torch.cat([p.tokens for p in parts]),
        **{name: torch.cat([getattr(p, name) for p in parts]) for name in reads},
    )


def chunks(logits: Tensor) -> list[slice]:
    """Rows of logits [R, V] in groups that are scored together; one empty group if R is 0."""
    size = max(1, CHUNK_NUMBERS.get(logits.device.type, CHUNK_NUMBERS["cpu"]) // logits.shape[-1])
    return [slice(i, i + size) for i in range(0, max(1, len(logits)), size)]


def _propose(
    logits: Tensor, rules: Rules, reads: frozenset[str], noise: Tensor | None
) -> tuple[Proposal, Tensor | None]:
    """A proposal, and [R] bool whether it is sound; None means that all rows are."""
    logits = mask_tokens(logits, rules.never)
    if rules.temperature == 0:
        return _scored(logits, rules, reads, _likeliest(logits), None), None
    narrow = (rules.top_p or 1) < 1 or (rules.top_k or SHORTLIST) < SHORTLIST
    if not narrow or logits.shape[-1] < 4 * SHORTLIST:
        return _drawn(logits, rules, reads, noise), None
    ids, probs, sound = shortlisted(logits, rules.temperature, rules.top_p, rules.top_k)
    tokens = ids.gather(-1, draw(probs, noise)[:, None])[:, 0]
    return _scored(
        logits, rules, reads, tokens, probs, (ids == tokens[:, None]).long().argmax(dim=-1)
    ), sound


def _likeliest(logits: Tensor) -> Tensor:
    """The likeliest token of each row, the first one of equals."""
    # on a CPU torch's argmax takes ten times as long as numpy's
    if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(logits.detach().numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def mask_tokens(logits: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """The logits with these tokens at -inf; a copy if there are any."""
    logits = logits.clone() if tokens else logits
    for token in tokens:
        logits[:, token] = -torch.inf
    return logits


def _drawn(logits: Tensor, rules: Rules, reads: frozenset[str], noise: Tensor) -> Proposal:
    """Tokens drawn from the whole vocabulary's distribution, in float64."""
    # a draw needs more precision than bfloat16, even if the scores do not
    wide = logits.double()
    # the maximum is subtracted so that a tiny temperature does not overflow
    wide = (wide - wide.amax(dim=-1, keepdim=True)).div_(rules.temperature)
    probs = filtered(wide, rules.top_p, rules.top_k).softmax(dim=-1)
    tokens = draw(probs, noise)
    return _scored(logits, rules, reads, tokens, probs, tokens)


def _scored(
    logits: Tensor,
    rules: Rules,
    reads: frozenset[str],
    tokens: Tensor,
    probs: Tensor | None,
    at: Tensor | None = None,
) -> Proposal:
    """The proposal of `tokens` [R], drawn from probs [R, N] at the indices `at` [R].

    Without probs they are the likeliest ones; a NaN counts as the largest number.
    """
    best = logits.gather(-1, tokens[:, None])[:, 0] if probs is None else logits.amax(dim=-1)
    found = marked(tokens, best)
    if not reads:
        return Proposal(found)
    dtype = logits.dtype if rules.dtype is None else rules.dtype
    if probs is None or not rules.scores_the_draw:
        probs, at = mask_tokens(logits, rules.last).to(dtype).softmax(dim=-1), tokens
    return Proposal(found, **_scores(probs.to(dtype), at, reads))


def _scores(probs: Tensor, at: Tensor, reads: frozenset[str]) -> dict[str, Tensor]:
    scores = {}
    if "confidence" in reads:
        scores["confidence"] = probs.gather(-1, at[:, None])[:, 0].double()
    if "entropy" in reads:
        scores["entropy"] = -(probs + ENTROPY_EPS).log_().mul_(probs).sum(dim=-1).double()
    if "margin" in reads:
        best = probs.topk(2, dim=-1).values
        scores["margin"] = (best[:, 0] - best[:, 1]).double()
    return scores


def shortlisted(
    logits: Tensor, temperature: float, top_p: float | None, top_k: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The distribution of `filtered`, from the likeliest tokens, without sorting the vocabulary.

    Returns ids [R, S] ascending, their probabilities [R, S] float64 (0 if filtered out), and sound
    [R] bool: the nucleus is known to be that of `filtered`. It is not known if the shortlist does
    not hold all of it, if tokens that tie with the shortlist's last might belong to it, or if a
    float32 sum is too close to top_p to decide where it ends.
    """
    values, ids = logits.topk(SHORTLIST, dim=-1)
    # sorted by id, then stably by value: equal values are in the order of a sort of all
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    wide = (values.double() - values[:, :1].double()) / temperature
    keep = torch.ones_like(wide, dtype=torch.bool)
    sound = torch.ones_like(keep[:, 0])
    if top_p is not None and top_p < 1:
        total = (
            (logits.float() - values[:, :1].float())
            .div_(temperature)
            .exp_()
            .sum(dim=-1, keepdim=True)
        )
        mass = wide.exp().cumsum(dim=-1) / total
        before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], dim=-1)
        keep = before <= top_p
        sound = (before - top_p).abs().amin(dim=-1) > UNDECIDED
    if top_k is not None and top_k < SHORTLIST:
        wide = wide.masked_fill(~keep, -torch.inf)
        keep &= wide >= wide[:, top_k - 1 : top_k]
    # if a kept token ties with the shortlist's last, tokens that tie with it may be missing
    sound &= ~(keep & (values == values[:, -1:])).any(dim=-1)
    ids, order = ids.sort(dim=-1)
    return ids, wide.masked_fill(~keep, -torch.inf).gather(-1, order).softmax(dim=-1), sound


def filtered(logits: Tensor, top_p: float | None, top_k: int | None) -> Tensor:
    """Logits [R, V] with -inf outside the nucleus, then outside the k likeliest tokens.

    The nucleus is the smallest set of likeliest tokens with a mass above top_p; it is never empty.
    Source: DreamLM/Dream generation_utils.py, top_p_logits and top_k_logits.
    """
    if top_p is not None and top_p < 1:
        order = logits.sort(dim=-1, descending=True, stable=True)
        before = order.values.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(
            -1, order.indices, before > top_p
        )
        logits = logits.masked_fill(outside, -torch.inf)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    return logits


def draw(probs: Tensor, noise: Tensor) -> Tensor:
    """One token per row of probs [R, V] (float64): the inverse distribution function at noise [R].

    One number decides each draw, so a draw does not depend on the other positions.
    """
    cumulative = probs.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # if the product rounds up to the total, a token without mass could be drawn
    at = (noise[:, None] * total).minimum(total.nextafter(torch.zeros_like(total)))
    # NaN is found behind the last token
    return torch.searchsorted(cumulative, at, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, by a transfer that does not block."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def all_to_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Host tensors of 1 or 8 bytes an element on the device, by one such transfer."""
    if device.type != "cuda":
        return dict(tensors)
    # those of 8 bytes come first, so that they are aligned
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    flat = [tensors[name].contiguous().view(-1).view(torch.uint8) for name in names]
    parts = to_device(torch.cat(flat), device).split([len(part) for part in flat])
    return {
        name: part.view(tensors[name].dtype).view(tensors[name].shape)
        for name, part in zip(names, parts)
    }


def uniforms(seed: int, step: int, n: int) -> Tensor:
    """[2, n] float64 in [0, 1): for each of n positions, noise for its token and for its order.

    It depends on (seed, step) only and is made on the CPU, so it is the same on every device, in
    every batch and after a resume.
    """
    generator = torch.Generator().manual_seed(scrambled(seed, step) >> 1)
    return torch.rand(2, n, generator=generator, dtype=torch.float64)


def scrambled(seed: int, n: int) -> int:
    """64 pseudorandom bits: the n-th number of splitmix64 from `seed`."""
    z = (seed + 0x9E3779B97F4A7C15 * (n + 1)) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return z ^ (z >> 31)
