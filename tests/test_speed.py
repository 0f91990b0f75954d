"""What makes the exact path fast, each against the slow way: sampling without a sort, bits that batching keeps."""

import pytest
import torch

import decoding.sampling as sampling
from decoding.sampling import Rules, propose, shortlisted, uniforms

V = 5000


def logits_of(kind: str, rows: int = 24) -> torch.Tensor:
    """[rows, V] logits: "peaked", "ties" (bfloat16 steps, as a model gives), or "flat"."""
    noise = torch.randn(rows, V, generator=torch.Generator().manual_seed(5))
    if kind == "peaked":
        return noise * 4
    if kind == "ties":
        return (noise * 4).bfloat16()
    return noise * 0.01


def by_sorting(logits: torch.Tensor, temperature: float, top_p: float | None, top_k: int | None) -> list[set[int]]:
    """The nucleus of each row, from a sort of the whole vocabulary."""
    wide = (logits.double() - logits.double().amax(-1, keepdim=True)) / temperature
    return [set(row.isfinite().nonzero()[:, 0].tolist()) for row in sampling.filtered(wide, top_p, top_k)]


@pytest.mark.parametrize("kind", ["peaked", "ties"])
@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [
    (0.2, 0.95, None), (0.7, 0.8, None), (0.7, 0.5, 40), (1.0, None, 50), (0.5, 1.0, 200), (1.0, 0.9, None),
])  # fmt: skip
def test_the_shortlist_holds_the_same_nucleus(kind, temperature, top_p, top_k):
    logits = logits_of(kind)
    ids, probs, sound = shortlisted(logits, temperature, top_p, top_k)
    expected = by_sorting(logits, temperature, top_p, top_k)
    same = [set(i[p > 0].tolist()) == kept for i, p, kept in zip(ids, probs, expected)]
    assert all(ok for ok, known in zip(same, sound.tolist()) if known)
    assert sound.float().mean() > 0.5 or temperature == 1.0, "most rows are to be answered without a sort"


@pytest.mark.parametrize("kind", ["peaked", "ties", "flat"])
@pytest.mark.parametrize("options", [dict(top_p=0.95), dict(top_k=50), dict(top_p=0.8, top_k=20), dict(top_p=0.95, top_k=300)])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 1e-308])
@pytest.mark.parametrize("scores_the_draw", [True, False])
def test_draws_and_scores_are_those_of_the_sort(monkeypatch, kind, options, temperature, scores_the_draw):
    """Tokens exactly, scores to the last bits of a float64, whether or not the shortlist suffices."""
    logits, noise = logits_of(kind), uniforms(3, 1, 24)[0]
    reads = frozenset({"confidence", "entropy", "margin"})
    rules = Rules(temperature=temperature, scores_the_draw=scores_the_draw, **options)
    quick = propose(logits, rules, reads, noise)
    monkeypatch.setattr(sampling, "SHORTLIST", V)  # no vocabulary is larger than four of these: all is sorted
    slow = propose(logits, rules, reads, noise)
    assert torch.equal(quick.tokens, slow.tokens)
    for name in reads:
        torch.testing.assert_close(getattr(quick, name), getattr(slow, name), atol=1e-12, rtol=1e-12)


def test_a_peaked_distribution_is_drawn_from_without_a_sort(monkeypatch):
    """Otherwise the shortlist would only be asked, and its answer thrown away."""
    def sort(*_):
        raise AssertionError("the whole vocabulary was sorted")

    monkeypatch.setattr(sampling, "filtered", sort)
    rules = Rules(temperature=0.2, top_p=0.95, scores_the_draw=True)
    logits, noise = logits_of("peaked"), uniforms(3, 1, 24)[0]
    assert len(propose(logits, rules, frozenset({"entropy"}), noise).tokens) == 24
    with pytest.raises(AssertionError, match="sorted"):
        propose(logits_of("flat"), rules, frozenset({"entropy"}), noise)


def test_a_nucleus_that_ends_among_ties_beyond_the_shortlist_is_sorted():
    """400 equal tokens: which of them belong is decided by their ids, and the shortlist has any 256 of them."""
    logits = torch.full((1, V), -30.0)
    logits[0, 1000:1400] = 0.0
    assert not shortlisted(logits, 1.0, 0.5, None)[2].item()
    assert not shortlisted(logits, 1.0, None, 100)[2].item()
    drawn = [propose(logits, Rules(temperature=1.0, top_p=0.5), frozenset(), torch.tensor([u]).double()) for u in (0, 1 - 1e-9)]
    assert [d.tokens.item() for d in drawn] == [1000, 1200]  # 201 tokens are the fewest whose mass exceeds a half
