"""Blocks, KV caches and adaptive algorithms: the engine against plain loops, also in batches."""

import ast
import re
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from causal import decoded
from mini import KINDS, ROOT, prompts_for

from decoding import adaptive
from decoding.algorithms import ALGORITHMS, CONFIDENCE, algorithm_options, algorithms_of
from decoding.config import DecodeConfig
from decoding.engine import decode, rules_of
from decoding.kv_cache import CACHES, CacheView
from decoding.sampling import propose
from decoding.schedule import make_schedule
from decoding.step_view import Algorithm, Observation, StepView, top_k
from models import load_model

LENGTH, BLOCK = 16, 8


@pytest.fixture(scope="module")
def models(conformance_dir):
    names = {"llada": "llada-tiny", "dream": "dream-tiny"}
    return {
        f: load_model(conformance_dir / n, device="cpu", dtype=torch.float32)[0]
        for f, n in names.items()
    }


def config(
    name: str, k: int = 1, *, length: int = LENGTH, block: int | None = BLOCK, given=None, **more
) -> DecodeConfig:
    schedule = make_schedule(name, length, block, tokens_per_step=k)
    return DecodeConfig(schedule, early_exit=False, given=tuple((given or {}).items()), **more)


# ---- which columns are computed


@pytest.mark.parametrize(
    ("cache", "fresh", "span"),
    [
        ("none", False, (0, 50, 50)),
        ("prefix", True, (0, 50, 50)),
        ("prefix", False, (19, 50, 50)),
        ("dual", True, (0, 50, 50)),
        ("dual", False, (19, 28, 50)),
    ],
)
def test_a_cache_is_three_integers(cache, fresh, span):
    assert CACHES[cache](CacheView(lo=19, hi=28, length=50, fresh=fresh)) == span


class Recording:
    """A model that records the spans and the rows of each call of `predict`."""

    def __init__(self, model):
        self.model, self.config, self.device, self.new_cache = (
            model,
            model.config,
            model.device,
            model.new_cache,
        )
        self.spans, self.rows = [], []

    def predict(self, tokens, spans, rows, cache=None):
        self.spans.append([tuple(s) for s in spans])
        self.rows.append(rows.tolist())
        return self.model.predict(tokens, spans, rows, cache)


@pytest.mark.parametrize(
    ("family", "cache", "later"),
    [
        ("llada", "prefix", [(6, 22, 22), (14, 22, 22)]),
        ("llada", "dual", [(6, 14, 22), (14, 22, 22)]),
        # a shifted model predicts a block's first position from one column further left; left to
        # right the first pass commits that position, so later passes do not need the column
        ("dream", "prefix", [(6, 22, 22), (14, 22, 22)]),
        ("dream", "dual", [(6, 14, 22), (14, 22, 22)]),
    ],
)
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
    assert lo[: lo.count(5) + lo.count(6)] == [5] * lo.count(5) + [6] * lo.count(6)


def test_a_prompt_without_tokens_has_no_column_to_its_left(models):
    done = decode(models["dream"], [[]], config("threshold", length=16, kv_cache="dual"), [0])[0]
    assert done.tokens_committed == 16


# ---- caches

BLOCKWISE = [(family, name) for family in ("llada", "dream") for name in algorithms_of(family)]


@pytest.mark.parametrize("cache", [pytest.param("prefix", marks=pytest.mark.slow), "dual"])
@pytest.mark.parametrize(
    ("family", "name"),
    [pytest.param(*b, marks=[] if b[1] in KINDS else pytest.mark.slow) for b in BLOCKWISE],
)
def test_a_cache_refreshed_every_step_is_no_cache(models, family, name, cache):
    """Tokens, passes and columns are equal, with drawn tokens too."""
    prompts = prompts_for(4)
    for temperature in (0.0, 0.7):
        plain = config(name, 2, temperature=temperature)
        fresh = config(name, 2, temperature=temperature, kv_cache=cache, cache_refresh=1)
        a, b = (decoded(models[family], prompts, c, range(4), batch_size=3) for c in (plain, fresh))
        same = ("token_ids", "committed_at", "nfe", "nfe_partial", "positions_computed")
        assert [[getattr(c, f) for f in same] for c in a] == [
            [getattr(c, f) for f in same] for c in b
        ]


@pytest.mark.parametrize(("family", "name"), BLOCKWISE)
def test_a_cache_that_is_not_refreshed_computes_less(models, family, name):
    prompts = prompts_for(3)
    costs = []
    for cache in ("none", "prefix", "dual"):
        done = decoded(
            models[family], prompts, config(name, 2, kv_cache=cache), range(3), batch_size=3
        )
        costs.append(sum(c.positions_computed / c.nfe for c in done))
        assert all((c.nfe_partial > 0) == (cache != "none") for c in done)
    assert costs[0] > costs[1] > costs[2]


# ---- algorithms against plain loops

RULES = {
    "threshold": (oracle.threshold, {"threshold": 0.35}),
    "confidence_threshold": (oracle.confidence_threshold, {"threshold": 0.35}),
    "factor": (oracle.factor, {"factor": 1.6}),
    "entropy_threshold": (oracle.entropy_threshold, {"threshold": 2.2}),
    "eb_sampler": (oracle.eb_sampler, {"gamma": 2.0}),
    "klass": (oracle.klass, {"threshold": 0.2, "kl_threshold": 0.3, "kl_history": 2}),
    "credit": (
        oracle.credit,
        {"threshold": 0.4, "credit_weight": 0.9, "credit_decay": 0.7, "credit_power": 0.3},
    ),
    "certainty": (oracle.certainty, {"sigma": 4.0}),
}
ADAPTIVE = [
    (family, name)
    for family in ("llada", "dream")
    for name in algorithms_of(family)
    if name in RULES
]


def test_every_adaptive_algorithm_has_a_plain_loop():
    assert {*RULES} >= {
        name for name, a in ALGORITHMS.items() if a.schedule == "adaptive" and not a.verification
    }
    held = {option for _, given in RULES.values() for option in given}
    assert {*algorithm_options()} == held | {"apd_mixture_weight"}  # in test_apd.py


@pytest.mark.parametrize(
    ("cache", "refresh"),
    [
        ("none", None),
        pytest.param("prefix", 3, marks=pytest.mark.slow),
        pytest.param("dual", None, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("family", "name"), ADAPTIVE)
def test_adaptive_algorithms_equal_the_plain_loop(models, family, name, cache, refresh):
    """Tokens, passes and columns, at temperature 0 and above, while rows join and leave.

    The last block is short in every second run. Above temperature 0 only a rule that says so reads
    the filtered distribution of the draw.
    """
    model, prompts = models[family], prompts_for(3)
    make, given = RULES[name]
    drawn = family == "dream" and not ALGORITHMS[name].reads_the_model
    for temperature, length in (
        ((0.0, LENGTH), (0.7, LENGTH - 3)) if cache == "none" else ((0.0, LENGTH - 3),)
    ):
        top_p = 0.9 if temperature else None
        draw = {"temperature": temperature, "top_p": top_p}
        caching = {"kv_cache": cache, "cache_refresh": refresh}
        chosen = config(name, length=length, given=given, **draw, **caching)
        got = decode(model, prompts, chosen, range(3), batch_size=2)
        for seed, (prompt, done) in enumerate(zip(prompts, got)):
            rule = make(*given.values())
            plain = oracle.blockwise(
                model,
                prompt,
                rule,
                length,
                BLOCK,
                seed,
                **draw,
                **caching,
                scores_the_draw=drawn,
            )
            assert (list(done.token_ids), done.nfe, done.positions_computed) == plain
    if ALGORITHMS[name].schedule == "adaptive":
        assert any(c.nfe < LENGTH for c in got), (
            "the option must let some step commit several positions"
        )


@pytest.mark.parametrize(
    ("family", "name"),
    [pytest.param(*pair, marks=[pytest.mark.slow] * (pair[0] == "dream")) for pair in ADAPTIVE],
)
def test_tokens_do_not_depend_on_the_batch_with_a_cache(models, family, name):
    """Rows at different steps of different blocks share a forward pass and a cache."""
    prompts = prompts_for(9)
    chosen = config(name, length=LENGTH - 3, given=RULES[name][1], kv_cache="dual")
    alone = [decode(models[family], [p], chosen, [i])[0].token_ids for i, p in enumerate(prompts)]
    for batch_size in (3, 8):
        order = np.random.default_rng(batch_size).permutation(9).tolist()
        got = decode(
            models[family], [prompts[i] for i in order], chosen, order, batch_size=batch_size
        )
        assert [c.token_ids for c in got] == [alone[i] for i in order]


def test_adaptive_rules_read_the_models_own_probability():
    """At temperature 0.1 a token of probability 0.3 must not pass a threshold of 0.9."""
    for name, algorithm in ALGORITHMS.items():
        if algorithm.schedule == "adaptive" and algorithm.scores:
            assert algorithm.reads_the_model == (name != "confidence_threshold")
    logits = torch.tensor([[0.3, 0.2, 0.2, 0.15, 0.15]], dtype=torch.float64).log()
    for name, sharpened in (("threshold", False), ("confidence_threshold", True)):
        chosen = config(name, temperature=0.02, top_p=0.9)
        rules = rules_of(chosen, SimpleNamespace(scores_the_draw=True, eos_id=1, end_ids=(1,)))
        scored = propose(logits, rules, CONFIDENCE, torch.tensor([0.5], dtype=torch.float64))
        assert scored.tokens.tolist() == [0]
        assert (scored.confidence.item() > 0.9) == sharpened
        assert sharpened or scored.confidence.item() == pytest.approx(0.3)


def test_tokens_per_step_is_the_least_that_an_adaptive_algorithm_commits(models):
    prompts = prompts_for(3)
    got = decode(
        models["llada"], prompts, config("threshold", 3, given={"threshold": 1.0}), range(3)
    )
    rule = oracle.threshold(1.0, 3)
    for seed, (prompt, done) in enumerate(zip(prompts, got)):
        assert (list(done.token_ids), done.nfe) == oracle.blockwise(
            models["llada"], prompt, rule, LENGTH, BLOCK, seed
        )[:2]
        assert done.nfe == 6 and done.forwards_saved == 0


# ---- invalid options


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        (
            "threshold",
            dict(given={"threshold": 1.5}),
            "threshold 1.5 must be at least 0 and at most 1",
        ),
        (
            "low_confidence",
            dict(given={"threshold": 0.5}),
            "threshold 0.5: low_confidence has no such option; these have: threshold",
        ),
        (
            "threshold",
            dict(given={"treshold": 0.5}),
            "treshold 0.5: threshold has no such option; these have: none",
        ),
        ("threshold", dict(kv_cache="deal"), "kv_cache 'deal' must be one of none, prefix, dual"),
        (
            "threshold",
            dict(cache_refresh=2),
            "cache_refresh 2: there is no cache to refresh; give kv_cache prefix or dual",
        ),
        ("threshold", dict(kv_cache="dual", cache_refresh=0), "cache_refresh 0 must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(models, name, more, message):
    with pytest.raises(ValueError) as error:
        decode(models["llada"], [[5]], config(name, **more), [0])
    assert message in str(error.value)


# ---- edges, by brute force and by hand


def view(confidence=None, entropy=None, observed=None, quota=1, masked=None, **options) -> StepView:
    score = torch.tensor([confidence or entropy], dtype=torch.float64)
    return StepView(
        masked=torch.ones_like(score, dtype=torch.bool)
        if masked is None
        else torch.tensor([masked]),
        quota=torch.tensor([quota]),
        rate=torch.ones(1).double(),
        options=options,
        confidence=None if confidence is None else score,
        entropy=None if entropy is None else score,
        observed=None if observed is None else torch.tensor([observed], dtype=torch.float64),
    )


def taken(mask: torch.Tensor) -> list[int]:
    return mask[0].nonzero().flatten().tolist()


def test_factor_takes_the_longest_run_that_holds_and_no_more():
    """Random values against the definition; published loops are off by one at the last rank."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        c, f = rng.integers(0, 11, size=int(rng.integers(1, 6))) / 10, rng.integers(1, 30) / 10
        ranked = sorted(c, reverse=True)
        holds = [
            n
            for n in range(1, len(c) + 1)
            if all((k + 1) * (1 - ranked[k - 1]) < f for k in range(1, n + 1))
        ]
        assert len(taken(adaptive.factor(view(c.tolist(), factor=f)))) == max(holds, default=1), (
            c,
            f,
        )


@pytest.mark.parametrize(
    ("confidence", "factor", "n"),
    [
        ([0.875, 0.875, 0.1], 0.375, 1),  # 3 * 0.125 is 0.375: equality does not hold
        ([0.875, 0.875, 0.1], 0.376, 2),
        ([0.99, 0.99, 0.99], 1.0, 3),  # none fails: all; d2Cache's loop leaves the last open
        # only the last fails: it stays open; Fast-dLLM's loop commits it
        ([0.99, 0.99, 0.2], 1.0, 2),
        ([0.1, 0.1], 1.0, 1),
    ],
)
def test_factor_at_its_edges(confidence, factor, n):
    assert len(taken(adaptive.factor(view(confidence, factor=factor)))) == n


def test_eb_sampler_takes_the_largest_set_within_the_bound():
    rng = np.random.default_rng(1)
    for _ in range(300):
        h, gamma = rng.integers(0, 8, size=int(rng.integers(1, 6))) / 4, rng.integers(0, 12) / 4
        ranked = sorted(h)
        n = max(n for n in range(1, len(h) + 1) if sum(ranked[:n]) - max(ranked[:n]) <= gamma)
        assert len(taken(adaptive.eb_sampler(view(entropy=h.tolist(), gamma=gamma)))) == n, (
            h,
            gamma,
        )


def test_thresholds_include_what_equals_them():
    assert taken(adaptive.threshold(view([0.9, 0.89, 0.95], threshold=0.9))) == [0, 2]
    assert taken(adaptive.entropy_threshold(view(entropy=[0.4, 0.41, 0.1], threshold=0.4))) == [
        0,
        2,
    ]
    assert taken(adaptive.entropy_threshold(view(entropy=[0.9, 0.8], threshold=0.4))) == [1]


def test_klass_is_strict_and_falls_back_to_the_most_confident():
    options = {"threshold": 0.5, "kl_threshold": 0.1}
    assert taken(adaptive.klass(view([0.9, 0.5, 0.8], observed=[0.01, 0.01, 0.1], **options))) == [
        0
    ]
    assert taken(adaptive.klass(view([0.4, 0.9, 0.8], observed=[0.0, 0.2, 0.1], **options))) == [1]
    # only positions that are ready are committed, even if tokens_per_step asks for more
    assert taken(
        adaptive.klass(view([0.9, 0.9, 0.8], observed=[0.0, 0.2, 0.1], quota=2, **options))
    ) == [0]
    assert taken(
        adaptive.klass(view([0.4, 0.9, 0.8], observed=[0.0, 0.2, 0.1], quota=2, **options))
    ) == [1, 2]


def test_what_is_committed_is_open():
    """An algorithm that chose a committed position would overwrite it."""
    masked = [False, True, True, False]
    for name, options in [("threshold", {"threshold": 0.5}), ("factor", {"factor": 9.0})]:
        assert taken(
            getattr(adaptive, name)(view([0.9, 0.8, 0.7, 1.0], masked=masked, **options))
        ) == [1, 2]
    for name, options in [
        ("entropy_threshold", {"threshold": 2.0}),
        ("eb_sampler", {"gamma": 9.0}),
    ]:
        assert taken(
            getattr(adaptive, name)(view(entropy=[0.0, 1.0, 1.0, 0.0], masked=masked, **options))
        ) == [1, 2]


def test_a_memory_is_of_the_open_positions_and_of_the_block(models):
    """`observe` gets no memory on a block's first pass, then that of the open positions."""
    seen = []

    def observe(logits, memory, options):
        ids = torch.arange(len(logits)) if memory is None else memory["ids"]
        seen.append((len(logits), None if memory is None else memory["ids"].tolist()))
        return Observation(logits, {"ids": ids}, ids.double())

    last_two = Algorithm(
        lambda v: top_k(v.observed, v.masked, 2 * v.quota),
        ("llada",),
        "adaptive",
        reads=CONFIDENCE,
        observe=observe,
    )
    ALGORITHMS["last_two"] = last_two
    try:
        [done] = decode(models["llada"], [[5]], config("last_two", length=8, block=4), [0])
    finally:
        del ALGORITHMS["last_two"]
    assert seen == [(4, None), (2, [0, 1])] * 2 and done.committed_at == (1, 1, 0, 0, 3, 3, 2, 2)


def test_a_field_that_was_not_asked_for_is_named(models):
    """It was None, and the error that of whatever was done with it."""
    bad = Algorithm(lambda v: top_k(v.confidence, v.masked, v.quota), ("llada",), "adaptive")
    ALGORITHMS["bad"] = bad
    try:
        with pytest.raises(AttributeError, match="name it in `reads`"):
            decode(models["llada"], [[5]], config("bad"), [0])
    finally:
        del ALGORITHMS["bad"]


def test_the_example_of_the_docs_is_an_algorithm(models):
    """The code runs as it stands there: an import, one function and one entry, nothing else."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    [code] = [block for block in blocks if "best_share" in block]
    kinds = [type(statement) for statement in ast.parse(code).body]
    assert kinds == [ast.ImportFrom, ast.FunctionDef, ast.Assign]
    try:
        exec(code, {})
        for family in ("llada", "dream"):
            got = decode(
                models[family], prompts_for(3), config("best_share", given={"share": 0.5}), range(3)
            )
            assert [c.nfe for c in got] == [2 * 4] * 3  # blocks of 8: 4, 2, 1, 1
    finally:
        ALGORITHMS.pop("best_share", None)
