"""Blocks, KV caches and adaptive algorithms: the engine against plain loops, alone and in batches."""

import numpy as np
import pytest
import torch

import oracle
from decoding.algorithms import ALGORITHMS, OPTIONS, algorithms_of
from decoding.engine import decode
from decoding.schedule import DecodeConfig, make_schedule
from decoding.spans import CACHES, SpanView
from models import load_model

LENGTH, BLOCK = 24, 8


@pytest.fixture(scope="module")
def models(conformance_dir):
    names = {"llada": "llada-tiny", "dream": "dream-tiny"}
    return {f: load_model(conformance_dir / n, device="cpu", dtype=torch.float32)[0] for f, n in names.items()}


def prompts_for(n: int) -> list[list[int]]:
    rng = np.random.default_rng(11)
    return [rng.integers(5, 400, size=int(rng.integers(1, 30))).tolist() for _ in range(n)]


def config(name: str, k: int = 1, *, length: int = LENGTH, block: int | None = BLOCK, given=None, **more) -> DecodeConfig:
    schedule = make_schedule(name, length, block, tokens_per_step=k)
    return DecodeConfig(schedule, early_exit=False, given=tuple((given or {}).items()), **more)


# ---- which columns are computed


@pytest.mark.parametrize(("cache", "fresh", "span"), [
    ("none", False, (0, 50, 50)),
    ("prefix", True, (0, 50, 50)),
    ("prefix", False, (19, 50, 50)),
    ("dual", True, (0, 50, 50)),
    ("dual", False, (19, 28, 50)),
])
def test_a_cache_is_three_integers(cache, fresh, span):
    assert CACHES[cache](SpanView(lo=19, hi=28, length=50, fresh=fresh)) == span


class Recording:
    """A model that notes the spans that it is asked for, and the columns that it is asked about."""

    def __init__(self, model):
        self.model, self.config, self.device, self.new_cache = model, model.config, model.device, model.new_cache
        self.spans, self.rows = [], []

    def predict(self, tokens, spans, rows, cache=None):
        self.spans.append([tuple(s) for s in spans])
        self.rows.append(rows.tolist())
        return self.model.predict(tokens, spans, rows, cache)


@pytest.mark.parametrize(("family", "cache", "later"), [
    ("llada", "prefix", [(6, 22, 22), (14, 22, 22)]),
    ("llada", "dual", [(6, 14, 22), (14, 22, 22)]),
    # one column more to the left, where a shifted model predicts the block's first position; left to right it is
    # committed by the first pass and needed no longer
    ("dream", "prefix", [(6, 22, 22), (14, 22, 22)]),
    ("dream", "dual", [(6, 14, 22), (14, 22, 22)]),
])
def test_a_block_begins_with_all_columns_and_goes_on_with_its_own(models, family, cache, later):
    model = Recording(models[family])
    [done] = decode(model, [[7] * 6], config("leftright", 4, length=16, kv_cache=cache), [0])
    full = (0, 22, 22)
    assert [s for [s] in model.spans] == [full, later[0], full, later[1]]
    assert (done.nfe, done.nfe_partial) == (4, 2)
    assert done.positions_computed == sum(hi - lo for [(lo, hi, _)] in model.spans)


def test_dream_computes_one_column_more_while_the_first_position_is_open(models):
    model = Recording(models["dream"])
    decode(model, [[7] * 6], config("maskgit_plus", 2, length=16, kv_cache="dual"), [0])
    lo = [s[0] for [s] in model.spans if s[0]]
    assert set(lo) <= {5, 6, 13, 14} and {5, 13} & set(lo)
    assert lo[:lo.count(5) + lo.count(6)] == [5] * lo.count(5) + [6] * lo.count(6)


def test_a_prompt_without_tokens_has_no_column_to_its_left(models):
    done = decode(models["dream"], [[]], config("threshold", length=16, kv_cache="dual"), [0])[0]
    assert done.tokens_committed == 16


# ---- caches

BLOCKWISE = [(family, name) for family in ("llada", "dream") for name in algorithms_of(family)]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize(("family", "name"), BLOCKWISE)
def test_a_cache_refreshed_every_step_is_no_cache(models, family, name, cache):
    """Token for token and pass for pass, drawn tokens too; every column is computed anew each time."""
    prompts = prompts_for(4)
    for temperature in (0.0, 0.7):
        plain = config(name, 2, temperature=temperature)
        fresh = config(name, 2, temperature=temperature, kv_cache=cache, cache_refresh=1)
        a, b = (decode(models[family], prompts, c, range(4), batch_size=3) for c in (plain, fresh))
        same = ("token_ids", "committed_at", "nfe", "nfe_partial", "positions_computed")
        assert [[getattr(c, f) for f in same] for c in a] == [[getattr(c, f) for f in same] for c in b]


@pytest.mark.parametrize(("family", "name"), BLOCKWISE)
def test_a_cache_that_is_not_refreshed_computes_less(models, family, name):
    prompts = prompts_for(3)
    costs = []
    for cache in ("none", "prefix", "dual"):
        done = decode(models[family], prompts, config(name, 2, kv_cache=cache), range(3), batch_size=3)
        costs.append(sum(c.positions_computed / c.nfe for c in done))
        assert all((c.nfe_partial > 0) == (cache != "none") for c in done)
    assert costs[0] > costs[1] > costs[2]


# ---- algorithms against plain loops

RULES = {
    "threshold": (oracle.threshold, {"threshold": 0.35}),
    "confidence_threshold": (oracle.confidence_threshold, {"threshold": 0.35}),
}
ADAPTIVE = [(family, name) for family in ("llada", "dream") for name in algorithms_of(family) if name in RULES]


def test_every_adaptive_algorithm_has_a_plain_loop():
    assert {*RULES} >= {name for name, a in ALGORITHMS.items() if a.schedule == "adaptive"}
    assert {*OPTIONS} == {option for _, given in RULES.values() for option in given}


@pytest.mark.parametrize(("cache", "refresh"), [("none", None), ("prefix", None), ("dual", None), ("dual", 3)])
@pytest.mark.parametrize(("family", "name"), ADAPTIVE)
def test_adaptive_algorithms_equal_the_plain_loop(models, family, name, cache, refresh):
    """Tokens, forward passes and columns; at temperature 0 and above; in a batch that rows join and leave."""
    model, prompts = models[family], prompts_for(5)
    make, given = RULES[name]
    for temperature in (0.0, 0.7) if cache in ("none", "dual") else (0.0,):
        chosen = config(name, given=given, temperature=temperature, kv_cache=cache, cache_refresh=refresh)
        got = decode(model, prompts, chosen, range(5), batch_size=3)
        for seed, (prompt, done) in enumerate(zip(prompts, got)):
            rule = make(**{k.replace("threshold", "value"): v for k, v in given.items()})
            plain = oracle.blockwise(model, prompt, rule, LENGTH, BLOCK, seed, temperature, cache, refresh)
            assert (list(done.token_ids), done.nfe, done.positions_computed) == plain
    if name != "klass":
        assert any(c.nfe < LENGTH for c in got), "the option is such that nothing is decided in parallel"


@pytest.mark.parametrize(("family", "name"), ADAPTIVE)
def test_tokens_do_not_depend_on_the_batch_with_a_cache(models, family, name):
    """Rows that are at different steps of different blocks share a forward pass and a cache."""
    prompts = prompts_for(9)
    chosen = config(name, given=RULES[name][1], kv_cache="dual")
    alone = [decode(models[family], [p], chosen, [i])[0].token_ids for i, p in enumerate(prompts)]
    for batch_size in (3, 8):
        order = np.random.default_rng(batch_size).permutation(9).tolist()
        got = decode(models[family], [prompts[i] for i in order], chosen, order, batch_size=batch_size)
        assert [c.token_ids for c in got] == [alone[i] for i in order]


def test_tokens_per_step_is_the_least_that_an_adaptive_algorithm_commits(models):
    prompts = prompts_for(3)
    got = decode(models["llada"], prompts, config("threshold", 3, given={"threshold": 1.0}), range(3))
    rule = oracle.threshold(1.0, 3)
    for seed, (prompt, done) in enumerate(zip(prompts, got)):
        assert (list(done.token_ids), done.nfe) == oracle.blockwise(models["llada"], prompt, rule, LENGTH, BLOCK, seed)[:2]
        assert done.nfe == 9 and done.forwards_saved == 0


# ---- what cannot be


@pytest.mark.parametrize(("name", "more", "message"), [
    ("threshold", dict(given={"threshold": 1.5}), "threshold 1.5 must be at least 0 and at most 1"),
    ("low_confidence", dict(given={"threshold": 0.5}), "threshold 0.5: low_confidence has no such option; these have: threshold"),
    ("threshold", dict(given={"treshold": 0.5}), "treshold 0.5: threshold has no such option; these have: none"),
    ("threshold", dict(kv_cache="deal"), "kv_cache 'deal' must be one of none, prefix, dual"),
    ("threshold", dict(cache_refresh=2), "cache_refresh 2: there is no cache to refresh; give kv_cache prefix or dual"),
    ("threshold", dict(kv_cache="dual", cache_refresh=0), "cache_refresh 0 must be at least 1"),
])
def test_options_that_cannot_be_are_refused(models, name, more, message):
    with pytest.raises(ValueError) as error:
        decode(models["llada"], [[5]], config(name, **more), [0])
    assert message in str(error.value)
