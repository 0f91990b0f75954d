"""APD: drafts, the verifier's cache, windows and lookahead, against plain loops without a cache."""

import numpy as np
import oracle
import pytest
import torch
from causal import causal_twin, decoded
from mini import prompts_for

from decoding.algorithms import ALGORITHMS, apd
from decoding.apd import PAPER, RELEASED
from decoding.config import DecodeConfig
from decoding.engine import decode
from decoding.kv_cache import CacheView, window
from decoding.sampling import NoFiniteLogits, Rules
from decoding.schedule import make_schedule
from decoding.step_view import StepView
from decoding.verifier import gumbels
from models import load_model

LENGTH = 20


@pytest.fixture(scope="module")
def model(conformance_dir):
    return load_model(conformance_dir / "dream-tiny", device="cpu", dtype=torch.float32)[0]


@pytest.fixture(scope="module")
def verifier(model):
    return causal_twin(model)


def config(
    name: str = "apd", k: int = 1, weight: float = 0.7, block: int | None = None, **more
) -> DecodeConfig:
    given = () if name == "leftright" else (("apd_mixture_weight", weight),)
    if "kv_window" in more:
        more["kv_cache"] = "window"
    return DecodeConfig(
        make_schedule(name, LENGTH, block, k), early_exit=False, given=given, **more
    )


# ---- the engine against the plain loops


SIGHTS = [
    {},
    {"max_lookahead": 6},
    {"kv_window": 4},
    {"kv_window": 1, "max_lookahead": 5},
    {"kv_window": 100},
]
DRAWS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 0.5, "top_k": 20},
]


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("name", ["apd", pytest.param("apd_released", marks=pytest.mark.slow)])
def test_apd_equals_the_plain_loop(model, verifier, name, draw):
    prompts, accepted = prompts_for(3), []
    got = decode(
        model,
        prompts,
        config(name, weight=0.6, **draw),
        [3, 4, 2**62],
        batch_size=2,
        verifier=verifier,
    )
    for prompt, seed, done in zip(prompts, [3, 4, 2**62], got):
        ids, counts = oracle.apd(
            model, verifier, prompt, LENGTH, 0.6, seed=seed, released=name == "apd_released", **draw
        )
        assert list(done.token_ids) == ids
        assert np.bincount(
            [at for at in done.committed_at if at >= 0]
        ).tolist() == counts and done.nfe == len(counts)
        assert done.nfe - 1 <= done.nfe_verifier <= done.nfe
        accepted += counts
    assert max(accepted) > 1  # else nothing was verified


@pytest.mark.parametrize("sight", SIGHTS[1:])
def test_windows_and_lookahead_equal_the_plain_loop(model, verifier, sight):
    prompts = prompts_for(3)
    got = decode(
        model, prompts, config(weight=0.8, **sight), range(3), batch_size=2, verifier=verifier
    )
    for i, (prompt, done) in enumerate(zip(prompts, got)):
        assert (
            list(done.token_ids)
            == oracle.apd(model, verifier, prompt, LENGTH, 0.8, seed=i, **sight)[0]
        )
        assert (done.nfe_partial > 0) == ("kv_window" in sight and sight["kv_window"] < 100)
    for prompt, done in zip(
        prompts, decode(model, prompts, config("leftright", 3, **sight), range(3), batch_size=2)
    ):
        assert list(done.token_ids) == oracle.leftright_within(model, prompt, LENGTH, 3, **sight)


@pytest.mark.parametrize("draw", [{}, {"temperature": 0.7}])
def test_blocks_equal_the_plain_loop(model, verifier, draw):
    """The last position of a block may be drafted alone, and is then not verified.

    An older draft of that position must not stay in the verifier's cache.
    """
    prompts = prompts_for(6)
    got = decode(
        model,
        prompts,
        config(weight=0.5, block=4, **draw),
        range(6),
        batch_size=4,
        verifier=verifier,
    )
    for i, (prompt, done) in enumerate(zip(prompts, got)):
        ids, counts = oracle.apd(
            model, verifier, prompt, LENGTH, 0.5, seed=i, block_length=4, **draw
        )
        assert list(done.token_ids) == ids and done.nfe == len(counts)


def test_a_window_wider_than_the_canvas_is_no_cache(model, verifier):
    """Then no column is reused after a token was committed."""
    prompts = prompts_for(4)
    wide, none = (
        decode(model, prompts, config(temperature=0.8, **s), range(4), verifier=verifier)
        for s in ({"kv_window": 200}, {})
    )
    assert [c.token_ids for c in wide] == [c.token_ids for c in none]


@pytest.mark.parametrize(
    "sight", [pytest.param(s, marks=pytest.mark.slow) for s in SIGHTS[:-2]] + SIGHTS[-2:]
)
@pytest.mark.parametrize("name", ["apd", pytest.param("apd_released", marks=pytest.mark.slow)])
def test_tokens_do_not_depend_on_the_batch(model, verifier, name, sight):
    prompts = prompts_for(6)
    chosen = config(name, temperature=0.7, top_p=0.95, **sight)
    alone = [decode(model, [p], chosen, [i], verifier=verifier)[0] for i, p in enumerate(prompts)]
    order = [3, 0, 5, 1, 4, 2]
    for batch_size in (2, 6):
        got = decode(
            model,
            [prompts[i] for i in order],
            chosen,
            order,
            batch_size=batch_size,
            verifier=verifier,
        )
        assert [c.token_ids for c in got] == [alone[i].token_ids for i in order]
        assert [c.nfe_verifier for c in got] == [alone[i].nfe_verifier for i in order]


def test_the_verifier_s_cache_computes_each_committed_column_about_once(model, verifier):
    class Counting:
        def __init__(self):
            self.config, self.device, self.new_cache, self.columns = (
                verifier.config,
                verifier.device,
                verifier.new_cache,
                [],
            )

        def predict(self, tokens, spans, rows, cache):
            self.columns.append([hi - lo for lo, hi, _ in spans])
            return verifier.predict(tokens, spans, rows, cache)

    counting = Counting()
    [done] = decode(model, [[7] * 9], config(weight=0.5, max_lookahead=4), [0], verifier=counting)
    assert counting.columns[0] == [13]  # prompt and draft
    assert all(n <= 4 for [n] in counting.columns[1:]) and done.nfe_verifier == len(
        counting.columns
    )


# ---- the rule


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_mixture_of_the_model_alone_accepts_every_draft(model, verifier, temperature):
    """With shared noise equal distributions draw equal tokens; not so in the released code."""
    [done] = decode(
        model, [[5, 6, 7]], config(weight=1.0, temperature=temperature), [1], verifier=verifier
    )
    assert done.nfe == 1 and done.nfe_verifier == 1
    [done] = decode(
        model,
        [[5, 6, 7]],
        config("apd_released", weight=1.0, temperature=temperature),
        [1],
        verifier=verifier,
    )
    assert (done.nfe == 1) == (temperature == 0)


def test_at_temperature_zero_the_paper_and_the_released_code_are_one(model, verifier):
    prompts = prompts_for(5)
    a, b = (
        decode(model, prompts, config(name, weight=0.6), range(5), verifier=verifier)
        for name in ("apd", "apd_released")
    )
    assert [(c.token_ids, c.committed_at) for c in a] == [(c.token_ids, c.committed_at) for c in b]


@pytest.mark.parametrize("n_tokens", [300, 2500])
def test_a_verifier_may_have_another_number_of_tokens(model, n_tokens):
    """Qwen2.5-0.5B has 151936 tokens, Dream 152064; a token that one lacks is not accepted."""
    other = causal_twin(model, n_tokens)
    for seed, prompt in enumerate([[5, 8, 9], [12]]):
        [done] = decode(
            model, [prompt], config(weight=0.9, temperature=1.0), [seed], verifier=other
        )
        assert (
            list(done.token_ids)
            == oracle.apd(model, other, prompt, LENGTH, 0.9, seed=seed, temperature=1.0)[0]
        )


def view(agreed, masked=None, quota: int = 1) -> StepView:
    masked = [True] * len(agreed) if masked is None else masked
    return StepView(
        torch.tensor([masked]), torch.tensor([quota]), torch.ones(1), agreed=torch.tensor([agreed])
    )


@pytest.mark.parametrize(
    ("agreed", "masked", "quota", "taken"),
    [
        ([False, True, True, False, True], None, 1, [0, 1, 2]),
        ([False, False, True, True], None, 1, [0]),
        ([False, False, True, False], None, 2, [0, 1, 2]),
        ([True, True], None, 1, [0, 1]),
        ([False, False, True, True, False], [False, True, True, True, True], 1, [1, 2, 3]),
        (
            [True, True, True, True],
            [True, True, False, False],
            1,
            [0, 1],  # nothing beyond the lookahead
        ),
    ],
)
def test_what_is_agreed_on_without_a_gap_is_accepted_and_always_the_first(
    agreed, masked, quota, taken
):
    assert apd(view(agreed, masked, quota))[0].nonzero()[:, 0].tolist() == taken


def test_tokens_per_step_is_the_least_that_is_accepted(model, verifier):
    ids, counts = oracle.apd(model, verifier, [9, 8], LENGTH, 0.3, k=3)
    [done] = decode(model, [[9, 8]], config(k=3, weight=0.3), [0], verifier=verifier)
    assert list(done.token_ids) == ids and done.nfe == len(counts) <= -(-LENGTH // 3)


# ---- the noise


def test_the_noise_is_gumbel_and_a_function_of_key_and_token_alone():
    noise = gumbels(range(200), 500, torch.device("cpu"))
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - np.pi**2 / 6) < 0.05
    assert torch.equal(gumbels([7], 500, torch.device("cpu"))[0], noise[7])
    assert torch.equal(
        gumbels([2**64 - 1], 40, torch.device("cpu")),
        gumbels([2**64 - 1], 99, torch.device("cpu"))[:, :40],
    )
    assert noise.isfinite().all() and len(noise.unique()) == noise.numel()


@pytest.mark.parametrize(("verification", "power"), [(PAPER, 1), (RELEASED, 2)])
def test_drafts_are_drawn_at_the_temperature_and_in_the_released_code_at_its_square(
    verification, power
):
    """Two logits differ by 0.3, T is 0.5: a share of 0.646, or 0.769 if T is applied twice."""
    logits = torch.tensor([[1.3, 1.0, -9.0]]).double().expand(20_000, -1)
    drawn = verification.draft(
        logits, Rules(temperature=0.5), gumbels(range(20_000), 3, torch.device("cpu"))
    )
    assert abs((drawn == 0).double().mean() - 1 / (1 + np.exp(-0.3 / 0.5**power))) < 0.01


def test_draft_and_mixture_agree_as_often_as_the_coupling_promises():
    """The draft has p = (0.6, 0.4), the mixture q = (0.3, 0.7), and they share their noise.

    Then token 0 is accepted with probability 0.3 / 0.6, token 1 always.
    """
    n = 20_000
    p, q = (torch.tensor([x]).double().log().expand(n, -1) for x in ([0.6, 0.4], [0.3, 0.7]))
    noise = gumbels(range(n), 2, torch.device("cpu"))
    drawn = PAPER.draft(p, Rules(temperature=1.0), noise)
    checked = PAPER.target(p, q, Rules(temperature=1.0), {"apd_mixture_weight": 0.0}, noise)
    assert abs((checked[drawn == 0] == 0).double().mean() - 0.5) < 0.02
    assert (checked[drawn == 1] == 1).all()


# ---- columns, and invalid configurations


@pytest.mark.parametrize(
    ("fresh", "since", "width", "span"),
    [
        (True, 0, 4, (0, 50, 50)),
        (False, 20, 1, (20, 50, 50)),
        (False, 20, 4, (17, 50, 50)),
        (False, 2, 16, (0, 50, 50)),
    ],
)
def test_a_window_reaches_back_from_what_was_committed_last(fresh, since, width, span):
    assert (
        window(CacheView(lo=10, hi=60, length=50, fresh=fresh, since=since, window=width)) == span
    )


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (config("apd", max_lookahead=0), "max_lookahead 0 must be at least 1"),
        (
            config("apd", 3, max_lookahead=2),
            "max_lookahead 2 is less than the 3 positions that a step commits",
        ),
        (
            config("apd", max_lookahead=4, kv_cache="dual"),
            "kv_cache dual reuses columns beyond the lookahead; give none or window",
        ),
        (
            DecodeConfig(make_schedule("entropy", 8), max_lookahead=4),
            "entropy may commit anywhere; left-to-right algorithms: leftright, apd",
        ),
        (
            DecodeConfig(make_schedule("entropy", 8), kv_cache="window", kv_window=4),
            "kv_cache window: entropy may commit anywhere",
        ),
        (
            DecodeConfig(make_schedule("apd", 8), kv_cache="window"),
            "kv_cache window needs a kv_window",
        ),
        (
            DecodeConfig(make_schedule("apd", 8), kv_window=4),
            "kv_window 4 needs kv_cache window, not none",
        ),
        (config("apd", weight=1.1), "apd_mixture_weight 1.1 must be at least 0 and at most 1"),
    ],
)
def test_what_cannot_be_is_refused(model, verifier, chosen, message):
    with pytest.raises(ValueError, match=message):
        decode(model, [[5]], chosen, [0], verifier=verifier)


def test_a_verifier_is_there_if_and_only_if_it_is_needed(model, verifier):
    with pytest.raises(ValueError, match="apd needs a verifier"):
        decode(model, [[5]], config(), [0])
    with pytest.raises(ValueError, match="leftright has no verifier"):
        decode(model, [[5]], config("leftright"), [0], verifier=verifier)


@pytest.mark.parametrize("name", ["apd", "apd_released"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_verifier_without_finite_logits_is_an_error(model, verifier, wrong, name):
    """Its NaN would be no agreement, so that the sample is decoded without it and looks sound."""

    class Broken:
        config, device, new_cache = verifier.config, verifier.device, verifier.new_cache
        sound = 0  # positions before those that are broken

        def predict(self, tokens, spans, rows, cache):
            logits = verifier.predict(tokens, spans, rows, cache)
            logits[self.sound :] = wrong
            return logits

    broken, prompts = Broken(), [[5, 8], [9, 4]]
    with pytest.raises(
        NoFiniteLogits, match="the verifier gives no finite logits at 38 of 38"
    ) as e:
        decode(model, prompts, config(name), [0, 1], batch_size=2, verifier=broken)
    assert e.value.everywhere
    broken.sound = LENGTH - 1  # those of the first sample
    with pytest.raises(
        NoFiniteLogits, match="the verifier gives no finite logits at 19 of 38"
    ) as e:
        decode(model, prompts, config(name), [0, 1], batch_size=2, verifier=broken)
    assert not e.value.everywhere


def test_early_exit_changes_no_text(model, verifier):
    """APD itself ends at the end token; early exit adds the second end token and stop strings."""
    for name in [n for n, a in ALGORITHMS.items() if a.verification]:
        for seed, prompt in enumerate(prompts_for(3)):
            full, early = (
                decoded(
                    model,
                    [prompt],
                    DecodeConfig(make_schedule(name, LENGTH), early_exit=e),
                    [seed],
                    stop=lambda ids: len(ids) >= 7,
                )[0]
                for e in (False, True)
            )
            assert early.token_ids[:7] == full.token_ids[:7] and early.nfe <= full.nfe
