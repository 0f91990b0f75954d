"""Options, schedules, algorithms, sampling and the engine, against plain loops and known values."""

import itertools
import json
import time
import weakref
from dataclasses import fields, replace

import numpy as np
import oracle
import pytest
import torch
from causal import decoded
from mini import KINDS, prompts_for

from decoding.algorithms import (
    ALGORITHMS,
    FAMILIES,
    Algorithm,
    StepView,
    algorithm_options,
    algorithms_of,
    leftright,
    origin,
    top_k,
)
from decoding.config import END_TOKEN_FLAGS, DecodeConfig, label_parts, name_parts
from decoding.engine import decode, decode_each
from decoding.option import Option, options_in, written
from decoding.sampling import Rules, draw, filtered, propose, uniforms
from decoding.schedule import Schedule, ScheduleError, floor_quotas, make_schedule
from models import load_model


@pytest.fixture(scope="module")
def models(conformance_dir):
    names = {"llada": "llada-tiny", "dream": "dream-tiny"}
    return {
        f: load_model(conformance_dir / n, device="cpu", dtype=torch.float32)[0]
        for f, n in names.items()
    }


# ---- schedules


@pytest.mark.parametrize(
    ("arguments", "steps", "quotas"),
    [
        (("low_confidence", 48, 16, 3), 18, (3, 3, 3, 3, 2, 2)),
        (("low_confidence", 30, 10, 4), 9, (4, 3, 3)),
        (("low_confidence", 512, 64, 3), 176, (3,) * 20 + (2,) * 2),
        (("maskgit_plus", 50, None, 3), 17, (2, 2, 2, 3, 3, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4)),
        (("leftright", 33, None, 2), 17, (2,) * 16 + (1,)),
        (("leftright", 33, None, 4), 9, (4,) * 8 + (1,)),
    ],
)
def test_tokens_per_step_becomes_steps_and_quotas(arguments, steps, quotas):
    schedule = make_schedule(*arguments)
    assert (schedule.num_steps, sum(schedule.quotas)) == (steps, schedule.block_length)
    if arguments[0] != "maskgit_plus":
        assert schedule.quotas == quotas
    assert schedule.note is None and schedule.tokens_per_step == arguments[3]


@pytest.mark.parametrize(
    ("arguments", "steps", "quotas", "last"),
    [
        (("low_confidence", 200, 32, 1), 200, (1,) * 32, (1,) * 8),
        (("low_confidence", 200, 32, 2), 100, (2,) * 16, (2,) * 4),
        (("low_confidence", 20, 8, 3), 8, (3, 3, 2), (2, 2)),
        (("low_confidence", 42, 32, 5), 10, (5, 5, 5, 5, 4, 4, 4), (4, 3, 3)),
        (("low_confidence", 20, 8, None, 5), 5, (4, 4), (4,)),
        (("leftright", 20, 8, 3), 8, (3, 3, 2), (3, 1)),
        (("maskgit_plus", 20, 8, 2), 10, floor_quotas(8, 4), floor_quotas(4, 2)),
        (("origin", 20, 8, 2), 10, (8,) * 4, (4,) * 2),
        (("threshold", 20, 8, 6), 20, (6,) * 8, (4,) * 4),
    ],
)
def test_the_last_block_may_be_short(arguments, steps, quotas, last):
    """It takes its share of a whole block's steps, so `--max_new_tokens 200` works in blocks."""
    schedule = make_schedule(*arguments)
    assert (schedule.num_steps, schedule.quotas, schedule.last_quotas) == (steps, quotas, last)
    assert schedule.span(schedule.n_blocks - 1).stop == schedule.gen_length
    assert len(schedule.last_rates) == len(last) and schedule.note is None
    if not schedule.adaptive:  # --num_steps is the other side of the same knob
        name, length, block = arguments[:3]
        again = make_schedule(name, length, block, num_steps=schedule.num_steps)
        assert again.last_quotas == last or name == "leftright"


@pytest.mark.parametrize("algorithm", ["low_confidence", "maskgit_plus", "leftright"])
def test_every_length_splits_into_blocks_whose_quotas_fill_them(algorithm):
    for length in range(1, 41):
        for block in range(1, length + 1):
            for k in (1, 2, 3, 7, 50):
                schedule = make_schedule(algorithm, length, block, k)
                n, last = schedule.n_blocks, schedule.last_length
                plans = [schedule.quotas_of(b) for b in range(n)]
                assert [sum(plan) for plan in plans] == [block] * (n - 1) + [last]
                assert schedule.num_steps == (n - 1) * -(-block // k) + len(plans[-1])
                if length % block == 0:
                    assert schedule.num_steps == n * -(-block // k)


def test_floor_quotas_are_those_of_torch():
    """One bit of a float32 linspace decides a quota now and then, so the bits must be torch's."""
    for steps in [1, 2, 3, 17, 171, 246, 250, 256, 327, 342, 488, 512]:
        t = torch.linspace(1, 1e-3, steps + 1)
        for n in {steps, 2 * steps, 3 * steps - 1, 4 * steps, 512}:
            expected, left = [], n
            for i in range(steps):
                expected.append(
                    int(torch.tensor(float(left)) * (1 - t[i + 1] / t[i]))
                    if i < steps - 1
                    else left
                )
                left -= expected[-1]
            assert floor_quotas(n, steps) == tuple(expected), (n, steps)


def test_one_token_per_step_of_dream_begins_idle_and_ends_with_two():
    quotas = make_schedule("entropy", 256).quotas
    assert quotas[0] == 0 and quotas[-1] == 2 and set(quotas[1:-1]) == {1}
    assert make_schedule("entropy", 256).forward_passes == 255


def test_the_readme_example_is_four_tokens_per_step_and_says_so():
    schedule = make_schedule("low_confidence", 512, 64, tokens_per_step=1, num_steps=128)
    assert (
        schedule.realised_tps == 4
        and schedule.quotas == (4,) * 16
        and schedule.tokens_per_step is None
    )
    assert (
        schedule.note == "num_steps 128 decides: 4 tokens per step, not tokens_per_step 1, "
        "which would be 512 steps"
    )


def test_more_tokens_per_step_than_a_block_has_is_said():
    schedule = make_schedule("low_confidence", 64, 32, tokens_per_step=100)
    assert schedule.note == "tokens_per_step 100 is more than the block of 32: 32 tokens per step"
    assert schedule.quotas == (32,)


def test_an_explicit_num_steps_of_leftright_is_kept_exactly():
    assert make_schedule("leftright", 32, num_steps=20).quotas == (2,) * 12 + (1,) * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("low_confidence", 16, 32), "block_length 32 is more than the gen_length of 16"),
        (
            ("low_confidence", 256, 32, None, 300),
            "num_steps 300 does not divide over the 8 blocks of 32; nearest: 256",
        ),
        (
            ("low_confidence", 200, 32, None, 3),
            "num_steps 3 does not divide over the 7 blocks of 32; nearest: 7",
        ),
        (
            ("maskgit_plus", 200, 32, None, 99),
            "num_steps 99 does not divide over the 7 blocks of 32; nearest: 94, 100",
        ),
        (
            ("low_confidence", 512, 64, None, 171),
            "num_steps 171 does not divide over the 8 blocks of 64; nearest: 168, 176",
        ),
        (
            ("low_confidence", 512, 64, 0),
            "tokens_per_step 0 must be at least 1 and at most 1048576",
        ),
        (("low_confidence", -4, 64), "gen_length -4 must be at least 1 and"),
        (
            ("entropy", 64, 32, None, 5),
            "num_steps 5 does not divide over the 2 blocks of 32; nearest: 4, 6",
        ),
        (
            ("threshold", 64, 32, None, 8),
            "num_steps 8: threshold decides the number of steps; leave it out",
        ),
        (("entrpy", 64), "unknown algorithm 'entrpy'"),
    ],
)
def test_an_impossible_schedule_says_why(arguments, message):
    with pytest.raises(ScheduleError) as error:
        make_schedule(*arguments)
    assert message in str(error.value)


# ---- options


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        (Option(0.9, "", high=1.0), "1", 1.0),
        (Option(2, "", low=1, whole=True), "3", 3),
        (Option(None, "", low=0.0, high=1.0, above=True), "1e-9", 1e-9),
        (Option("none", "", choices=("none", "dual")), "dual", "dual"),
        (Option(False, "", truth=True), "true", True),
        (Option(True, "", switch=True, negated=True), "false", False),
    ],
)
def test_an_option_reads_the_text_that_it_writes(option, text, value):
    assert option.read(text) == value and type(option.read(text)) is type(value)
    assert option.problem(value) is None and option.read(written(value)) == value


@pytest.mark.parametrize(
    ("option", "texts", "message"),
    [
        (Option(0.9, "", high=1.0), ("1.1", "-0.1"), "must be at least 0 and at most 1"),
        (Option(0.9, "", high=1.0), ("x", ""), "must be a number of at least 0 and at most 1"),
        (Option(0.0, ""), ("inf", "nan"), "must be at least 0"),
        (Option(2, "", low=1, whole=True), ("0",), "must be at least 1"),
        (Option(2, "", low=1, whole=True), ("1.5",), "must be a whole number of at least 1"),
        (Option(1, "", high=1.0, above=True), ("0",), "must be above 0 and at most 1"),
        (Option("none", "", choices=("none", "dual")), ("deal",), "must be one of none, dual"),
        (Option(False, "", truth=True), ("yes", "1"), "must be true or false"),
    ],
)
def test_an_option_refuses_other_text(option, texts, message):
    for text in texts:
        with pytest.raises(ValueError) as error:
            option.read(text)
        assert str(error.value) == message


def test_an_option_checks_values_of_any_type():
    """A case of scripts/trace.py can hold any JSON value."""
    count, share = Option(2, "", low=1, whole=True), Option(None, "", high=1.0)
    assert count.problem(1.5) == "must be a whole number, at least 1" and not count.problem(2.0)
    assert share.problem(None) is None and count.problem(None) is not None
    for value in ("1", True, [1], {}):
        assert share.problem(value) == "must be a number of at least 0 and at most 1"
    assert Option("a", "", choices={"a": 1}).problem(1) == "must be one of a"
    assert share.sentence("top_p", "x") == "top_p 'x' must be a number of at least 0 and at most 1"
    assert share.sentence("top_p", 2) == "top_p 2 must be at least 0 and at most 1"


def test_every_field_of_the_configuration_declares_an_option():
    declared = options_in(DecodeConfig)
    assert [*declared] == [f.name for f in fields(DecodeConfig)][1:-1]  # schedule, ..., given
    knobs = {"algorithm", "gen_length", "block_length", "num_steps", "tokens_per_step"}
    assert options_in(Schedule).keys() == knobs
    for name, option in (declared | options_in(Schedule)).items():
        assert option.help.endswith(".") and option.problem(option.default) is None, name
    flags = {flag for n, o in (declared | options_in(Schedule)).items() for flag in o.names(n)}
    assert {"alg", "remasking", "max_new_tokens", "no_early_exit", "top_p"} <= flags
    texts = {n: o.description for n, o in declared.items() if not o.switch}
    assert all(text.count(" Default: ") == 1 for text in texts.values())
    assert texts["top_p"].endswith(" Default: the protocol's.")
    assert texts["kv_cache"].endswith(" Default: none.")
    assert not flags & {"algorithm", "early_exit"}


@pytest.mark.parametrize(
    ("options", "name", "label"),
    [
        ({}, [], []),
        (dict(early_exit=False, temperature=0.5), [], []),
        (dict(kv_cache="dual"), ["dual"], ["dual cache"]),
        (
            dict(kv_cache="window", kv_window=16, cache_refresh=4, max_lookahead=8),
            ["window16", "refresh4", "lookahead8"],
            ["window cache of 16 refreshed every 4", "lookahead 8"],
        ),
    ],
)
def test_parts_of_names_and_labels(options, name, label):
    """For a whole configuration and for a result's, which leaves out defaults."""
    chosen = DecodeConfig(make_schedule("leftright", 64), **options)
    assert name_parts(chosen) == name and label_parts(vars(chosen)) == label
    assert label_parts(options) == label
    chosen = replace(chosen, schedule=make_schedule("klass", 64), given=(("kl_history", 3.0),))
    assert name_parts(chosen) == ["threshold0.9", "kl_threshold0.01", "kl_history3", *name]
    stored = json.loads(json.dumps({"options": chosen.options} | options))
    assert label_parts(stored) == ["threshold 0.9", "kl_threshold 0.01", "kl_history 3", *label]


def test_tables_count_as_they_are_when_they_are_read(monkeypatch):
    """Families, algorithms and their options can be added after the import."""
    assert "own" in FAMILIES and "own" not in algorithm_options()
    entry = Algorithm(leftright, ("own",), "stride", options={"own": Option(1.0, "")})
    monkeypatch.setitem(ALGORITHMS, "new", entry)
    assert (
        algorithm_options()["own"] == ["new"] and "new" in options_in(Schedule)["algorithm"].choices
    )
    assert algorithms_of("own")[-1] == "new" and "leftright" in algorithms_of("own")


# ---- algorithms


def view(masked, quota, **fields) -> StepView:
    n = len(masked)
    fields = {
        k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v
        for k, v in fields.items()
    }
    return StepView(
        torch.tensor(masked),
        torch.tensor(quota),
        fields.pop("rate", torch.ones(n).double()),
        **fields,
    )


def test_equal_scores_are_taken_leftmost_first():
    """torch.topk leaves the order of ties open, and CPU and GPU differ."""
    score, masked = torch.ones(2, 40).double(), torch.ones(2, 40, dtype=torch.bool)
    masked[1, :3] = False
    taken = top_k(score, masked, torch.tensor([3, 2]))
    assert taken[0].nonzero().flatten().tolist() == [0, 1, 2] and taken[
        1
    ].nonzero().flatten().tolist() == [3, 4]


def test_a_quota_above_what_is_open_takes_all_that_is_open():
    masked = torch.tensor([[True, False, True]])
    assert top_k(torch.rand(1, 3), masked, torch.tensor([9])).tolist() == [[True, False, True]]


def test_top_k_refuses_shapes_that_disagree():
    with pytest.raises(ValueError, match=r"score \(1, 3\)"):
        top_k(torch.rand(1, 3), torch.ones(1, 4, dtype=torch.bool), torch.tensor([1]))


def test_leftright_takes_the_first_open_positions_of_each_row():
    v = view([[False, True, True, True], [True, False, False, True]], [2, 1])
    assert leftright(v).tolist() == [[False, True, True, False], [True, False, False, False]]


def test_origin_commits_what_chance_says():
    v = view(
        [[True, True, False, True]],
        [4],
        rate=torch.tensor([0.5]).double(),
        noise=[[0.4, 0.6, 0.1, 0.49]],
    )
    assert origin(v).tolist() == [[True, False, False, True]]


def test_algorithms_by_family():
    both = [
        "threshold",
        "factor",
        "entropy_threshold",
        "eb_sampler",
        "klass",
        "credit",
        "certainty",
    ]
    assert algorithms_of("llada") == ["low_confidence", "random", "leftright", *both]
    own = [
        "leftright",
        "maskgit_plus",
        "topk_margin",
        "entropy",
        "origin",
        "threshold",
        "confidence_threshold",
    ]
    assert algorithms_of("dream") == own + both[1:] + ["apd", "apd_released"]


# ---- sampling


def test_confidence_of_the_families_above_temperature_zero():
    """LLaDA uses the plain softmax (0.6), Dream the distribution of the draw (1.0)."""
    logits = torch.tensor([[0.6, 0.3, 0.1]]).double().log()
    noise = torch.tensor([0.5]).double()
    for scores_the_draw, expected in [(False, 0.6), (True, 1.0)]:
        rules = Rules(temperature=1.0, top_p=0.5, scores_the_draw=scores_the_draw)
        assert propose(
            logits, rules, frozenset({"confidence"}), noise
        ).confidence.tolist() == pytest.approx([expected])


def test_top_p_is_inactive_at_temperature_zero():
    """If the filter came before the confidence, all positions above top_p would tie at 1."""
    logits = torch.tensor([[0.96, 0.04], [0.99, 0.01]]).double().log()
    rules = Rules(top_p=0.95, top_k=1, scores_the_draw=True)
    assert propose(logits, rules, frozenset({"confidence"})).confidence.tolist() == pytest.approx(
        [0.96, 0.99]
    )


def test_float64_tells_confident_positions_apart_where_bfloat16_ties():
    logits = torch.tensor([[9.0, 0.0], [10.0, 0.0]], dtype=torch.bfloat16)
    read = frozenset({"confidence"})
    a, b = propose(logits, Rules(), read).confidence.tolist()
    assert a < b < 1
    a, b = propose(logits, Rules(dtype=None), read).confidence.tolist()
    assert a == b == 1


def test_scores_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).double().log()
    p = propose(logits, Rules(), frozenset({"confidence", "entropy", "margin"}))
    assert (
        p.tokens.tolist() == [0]
        and p.confidence.item() == pytest.approx(0.5)
        and p.margin.item() == pytest.approx(0.2)
    )
    assert p.entropy.item() == pytest.approx(-sum(q * np.log(q) for q in (0.5, 0.3, 0.2)))


@pytest.mark.parametrize(("top_p", "kept"), [(0.45, 1), (0.5, 2), (0.85, 3), (1.0, 4), (None, 4)])
def test_the_nucleus_is_never_empty_and_holds_the_token_that_crosses_top_p(top_p, kept):
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).double().log()
    assert filtered(logits, top_p, None).isfinite().sum().item() == kept


def test_top_k_keeps_k_tokens():
    assert filtered(torch.tensor([[1.0, 3.0, 2.0]]), None, 2).isfinite().tolist() == [
        [False, True, True]
    ]


def test_draws_follow_the_distribution():
    probs = torch.tensor([0.5, 0.0, 0.2, 0.3]).double()
    n = 20000
    drawn = draw(probs.expand(n, 4), uniforms(3, 0, n)[0])
    share = torch.bincount(drawn, minlength=4).double() / n
    assert share[1] == 0 and (share - probs).abs().max() < 0.015


def test_a_tiny_temperature_takes_the_likeliest_token():
    """A division before the subtraction would overflow to inf - inf."""
    logits = torch.tensor([[3.0, 5.0, -torch.inf, 4.0]])
    rules = Rules(temperature=1e-308, scores_the_draw=True)
    p = propose(logits, rules, frozenset({"confidence"}), torch.tensor([0.9], dtype=torch.float64))
    assert (p.tokens.tolist(), p.confidence.tolist()) == ([1], [1.0])


def test_a_token_without_mass_is_never_drawn_even_at_the_edges():
    probs = torch.tensor([[0.0, 0.5, 0.5, 0.0]] * 3).double()
    assert draw(probs, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)).tolist() == [
        1,
        2,
        2,
    ]


def test_chunked_scoring_is_the_same(monkeypatch):
    logits = torch.randn(37, 50, generator=torch.Generator().manual_seed(0))
    read, noise = frozenset({"confidence", "entropy"}), uniforms(1, 1, 37)[0]
    whole = propose(logits, Rules(temperature=0.7), read, noise)
    monkeypatch.setattr("decoding.sampling.CHUNK_NUMBERS", {"cpu": 500})
    parts = propose(logits, Rules(temperature=0.7), read, noise)
    assert torch.equal(whole.tokens, parts.tokens) and torch.equal(whole.entropy, parts.entropy)


def test_noise_depends_on_seed_and_step_alone():
    assert torch.equal(uniforms(5, 2, 10), uniforms(5, 2, 10))
    assert not torch.equal(uniforms(5, 2, 10), uniforms(5, 3, 10))
    assert not torch.equal(uniforms(5, 2, 10), uniforms(6, 2, 10))
    assert uniforms(2**64 - 1, 0, 4).shape == (2, 4)


# ---- the engine against the plain loops

LLADA = [
    (dict(algorithm="low_confidence", gen_length=24, block_length=8, num_steps=9), {}),
    (
        dict(algorithm="low_confidence", gen_length=24, block_length=24, num_steps=12),
        dict(temperature=0.7),
    ),
    (
        dict(algorithm="low_confidence", gen_length=16, block_length=8, num_steps=16),
        dict(temperature=0.7, confidence_eos_eot_inf=True),
    ),
    (
        dict(algorithm="low_confidence", gen_length=16, block_length=8, num_steps=8),
        dict(temperature=1.0, logits_eos_inf=True, top_p=0.9),
    ),
    (dict(algorithm="random", gen_length=24, block_length=8, num_steps=12), {}),
    (
        dict(algorithm="random", gen_length=24, block_length=12, num_steps=6),
        dict(temperature=0.7, top_k=20),
    ),
    (
        dict(algorithm="low_confidence", gen_length=20, block_length=8, num_steps=8),
        dict(temperature=0.7),
    ),
    (dict(algorithm="random", gen_length=13, block_length=5, num_steps=8), {}),
]
DREAM = [
    (dict(algorithm="maskgit_plus", gen_length=24, num_steps=24), dict(temperature=0.7)),
    (dict(algorithm="maskgit_plus", gen_length=24, num_steps=12), dict(alg_temp=0.1)),
    (dict(algorithm="entropy", gen_length=24, num_steps=8), dict(temperature=0.4, top_p=0.9)),
    (dict(algorithm="topk_margin", gen_length=24, num_steps=9), dict(temperature=0.7, top_k=30)),
    (dict(algorithm="origin", gen_length=24, num_steps=24), {}),
    (dict(algorithm="origin", gen_length=24, num_steps=7), dict(temperature=0.7)),
    (dict(algorithm="entropy", gen_length=20, num_steps=33), {}),
    (dict(algorithm="maskgit_plus", gen_length=20, block_length=8, num_steps=20), {}),
    (
        dict(algorithm="entropy", gen_length=22, block_length=8, num_steps=11),
        dict(temperature=0.4, top_p=0.9, alg_temp=0.1),
    ),
    (dict(algorithm="topk_margin", gen_length=19, block_length=8, num_steps=8), {}),
    (dict(algorithm="origin", gen_length=13, block_length=5, num_steps=8), dict(temperature=0.7)),
]


@pytest.mark.parametrize(
    "family, steps, options", [("llada", *c) for c in LLADA] + [("dream", *c) for c in DREAM]
)
def test_engine_equals_the_plain_loop(models, family, steps, options):
    """In batches of different prompts, with random orders and draws, which no recorded case has."""
    model, prompts = models[family], prompts_for(4)
    schedule = make_schedule(**steps)
    config = DecodeConfig(schedule, early_exit=False, **options)
    seeds = [11, 12, 13, 2**60]
    loop = getattr(oracle, family)
    got = decode(model, prompts, config, seeds, batch_size=3)
    for prompt, seed, completion in zip(prompts, seeds, got):
        assert list(completion.token_ids) == loop(model, prompt, seed=seed, **steps, **options)
        assert (
            completion.nfe <= schedule.num_steps
            and model.config.mask_id not in completion.token_ids
        )


def first_as_well(view):
    """A rule that forgets `& view.masked`: it chooses position 0 again in every step."""
    chosen = view.masked & (view.masked.cumsum(dim=-1) == 1)
    chosen[:, 0] = True
    return chosen


BAD_RULES = [
    (first_as_well, ValueError, "mine: select chose positions that are not open"),
    (
        lambda view: view.masked.long().argsort(dim=-1),
        TypeError,
        r"returned int64 of shape \[2, 6\]",
    ),
    (lambda view: view.masked[0], TypeError, r"returned bool of shape \[6\]"),
    (lambda view: None, TypeError, r"of shape \[2, 6\], as view.masked is; it returned NoneType"),
]


@pytest.mark.parametrize("reads", [frozenset(), frozenset({"confidence"})])
@pytest.mark.parametrize("select, error, text", BAD_RULES)
def test_a_mask_that_is_none_of_the_open_positions_is_refused(
    models, monkeypatch, select, error, text, reads
):
    """Committed tokens were overwritten with id 0, and the result was complete."""
    entry = Algorithm(select, FAMILIES, "adaptive", reads=reads)
    monkeypatch.setitem(ALGORITHMS, "mine", entry)
    config = DecodeConfig(make_schedule("mine", 6))
    with pytest.raises(error, match=text):
        decode(models["llada"], prompts_for(2), config, [1, 2])


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("options", [{}, dict(temperature=0.9, top_p=0.95)])
def test_leftright_equals_the_plain_loop(models, family, options):
    model, prompts = models[family], prompts_for(4)
    config = DecodeConfig(
        make_schedule("leftright", 21, tokens_per_step=2), early_exit=False, **options
    )
    for prompt, completion in zip(prompts, decode(model, prompts, config, [1, 2, 3, 4])):
        at = prompts.index(prompt)
        assert list(completion.token_ids) == oracle.leftright(
            model, prompt, 21, 2, seed=at + 1, **options
        )


def every_config() -> list[tuple[str, DecodeConfig]]:
    configs = []
    for family in ("llada", "dream"):
        for name in algorithms_of(family):
            schedule = make_schedule(
                name, 20, 8 if ALGORITHMS[name].blocks else None, tokens_per_step=2
            )
            configs += [(family, DecodeConfig(schedule, temperature=t)) for t in (0.0, 0.7)]
    return configs


@pytest.mark.parametrize(
    "family, config",
    [
        pytest.param(
            family,
            c,
            marks=[] if c.temperature and c.schedule.algorithm in KINDS else pytest.mark.slow,
        )
        for family, c in every_config()
    ],
)
def test_tokens_do_not_depend_on_batch_or_order(models, family, config):
    """A generator or a mean shared by the batch, or padding, would change tokens here."""
    prompts = prompts_for(6)
    alone = [decoded(models[family], [p], config, [i])[0].token_ids for i, p in enumerate(prompts)]
    for batch_size in (3, 5):
        order = list(np.random.default_rng(batch_size).permutation(6))
        got = decoded(
            models[family], [prompts[i] for i in order], config, order, batch_size=batch_size
        )
        assert [c.token_ids for c in got] == [alone[i] for i in order]


# ---- early exit


class Scripted:
    """A model that always predicts `answer`, with its confidence falling along `order`."""

    def __init__(
        self,
        answer: list[int],
        order: list[int] | None = None,
        family: str = "llada",
        vocabulary: int = 12,
    ):
        from types import SimpleNamespace

        self.answer, self.device, self.vocabulary = answer, torch.device("cpu"), vocabulary
        self.order = order or list(range(len(answer)))
        self.config = SimpleNamespace(
            family=family,
            mask_id=11,
            eos_id=10,
            end_ids=(10, 9),
            scores_the_draw=family == "dream",
            end_token_flags=END_TOKEN_FLAGS if family == "llada" else (),
        )
        self.forwards = 0

    def predict(self, tokens, spans, rows, cache=None):
        self.forwards += 1
        logits = torch.full((len(rows), self.vocabulary), -5.0)
        starts = np.cumsum([0] + [hi - lo for lo, hi, _ in spans])
        for i, row in enumerate(rows.tolist()):
            sequence = int(np.searchsorted(starts, row, side="right")) - 1
            at = row - starts[sequence] - (spans[sequence][1] - len(self.answer))
            logits[i, self.answer[at]] = 10.0 - self.order.index(at) * 0.1
        logits[:, 11] = -torch.inf
        return logits


def config(length=8, block=4, k=1, algorithm="low_confidence", **options):
    return DecodeConfig(make_schedule(algorithm, length, block, tokens_per_step=k), **options)


def test_a_row_leaves_once_everything_before_its_first_end_token_is_committed():
    model = Scripted([1, 2, 10, 10, 10, 10, 10, 10])
    [done] = decode(model, [[5]], config(), [0])
    assert (done.finish_reason, done.nfe, done.forwards_saved) == ("end_token", 3, 5)
    assert done.token_ids == (1, 2, 10) + (11,) * 5 and done.committed_at == (0, 1, 2) + (-1,) * 5
    assert model.forwards == 3 and done.tokens_committed == 3 and done.positions_computed == 3 * 9


def test_early_exit_in_and_before_a_short_last_block_counts_what_is_left():
    """7 positions in blocks of 4: 4 passes, then 3."""
    for ends_at, nfe in ((1, 2), (4, 5), (6, 7)):
        model = Scripted([1] * ends_at + [10] * (7 - ends_at))
        [done] = decode(model, [[5]], config(length=7), [0])
        assert (done.finish_reason, done.nfe, done.forwards_saved) == ("end_token", nfe, 7 - nfe)
    [whole] = decode(model, [[5]], config(length=7, early_exit=False), [0])
    assert whole.nfe == config(length=7).schedule.forward_passes == 7
    assert whole.token_ids[:7] == done.token_ids


@pytest.mark.parametrize("name", ["maskgit_plus", "leftright"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_passes_and_saved_passes_add_up_with_a_short_last_block(name, k):
    """Idle steps of the floor schedule are no passes; 11 positions in blocks of 4."""
    for ends_at in range(11):
        model = Scripted([1] * ends_at + [10] * (11 - ends_at), family="dream")
        chosen = config(length=11, algorithm=name, k=k)
        [early] = decode(model, [[5]], chosen, [0])
        [late] = decode(model, [[5]], replace(chosen, early_exit=False), [0])
        if name != "leftright":  # which ends at the end token by itself
            assert late.nfe == chosen.schedule.forward_passes
            assert late.tokens_committed == 11
        assert early.nfe + early.forwards_saved == chosen.schedule.forward_passes
        assert early.token_ids[: ends_at + 1] == late.token_ids[: ends_at + 1]


def test_an_end_token_does_not_end_a_row_while_a_position_before_it_is_open():
    """A loop that stops at any end token on the canvas cuts answers with a masked beginning."""
    model = Scripted([1, 2, 3, 10, 10, 10, 10, 10], order=[3, 4, 5, 6, 7, 0, 1, 2])
    [done] = decode(model, [[5]], config(block=8), [0])
    assert (done.nfe, done.token_ids[:4], done.forwards_saved) == (8, (1, 2, 3, 10), 0)


def test_the_second_end_token_ends_too():
    [done] = decode(Scripted([1, 9, 2, 2, 2, 2, 2, 2]), [[5]], config(), [0])
    assert (done.nfe, done.finish_reason) == (2, "end_token")


def test_early_exit_can_be_turned_off():
    [done] = decode(Scripted([1, 10, 2, 2, 2, 2, 2, 2]), [[5]], config(early_exit=False), [0])
    assert (done.nfe, done.forwards_saved, done.finish_reason) == (8, 0, "end_token")
    assert done.token_ids == (1, 10, 2, 2, 2, 2, 2, 2)


def test_a_stop_string_is_only_looked_for_in_the_committed_prefix():
    seen = []
    model = Scripted([1, 2, 3, 4, 5, 6, 7, 8], order=[2, 0, 1, 3, 4, 5, 6, 7])
    [done] = decode(model, [[5]], config(), [0], stop=lambda ids: seen.append(ids) or 3 in ids)
    assert (done.nfe, done.finish_reason, done.forwards_saved) == (3, "stop_string", 5)
    assert (
        [1] in seen
        and [1, 2, 3] in seen
        and all(ids == list(range(1, len(ids) + 1)) for ids in seen)
    )


def test_leftright_stops_at_the_end_token_even_without_early_exit():
    """The official loop does so: it is part of the algorithm."""
    model = Scripted([1, 2, 10, 3, 3, 3, 3, 3])
    [done] = decode(
        model, [[5]], config(block=None, algorithm="leftright", k=2, early_exit=False), [0]
    )
    assert (
        done.nfe == 2 and done.token_ids == (1, 2, 10, 3) + (11,) * 4 and done.forwards_saved == 0
    )


def test_rows_leave_and_others_take_their_place():
    """No row waits for another: four rows of 3 forward passes take 6 passes in batches of two."""

    class Mixed(Scripted):
        def predict(self, tokens, spans, rows, cache=None):
            self.rows_seen = getattr(self, "rows_seen", []) + [len(spans)]
            self.answer = [1, 2, 10, 10, 10, 10, 10, 10]
            return super().predict(tokens, spans, rows, cache)

    model = Mixed([0] * 8)
    done = list(decode_each(model, [[5], [5, 6], [7], [8]], config(), [0] * 4, batch_size=2))
    assert [i for i, _ in done] == [0, 1, 2, 3] and [c.nfe for _, c in done] == [3] * 4
    assert model.rows_seen == [2] * 6


class EndsAt(Scripted):
    """A model whose answer to prompt [n] has its end token at position n."""

    def predict(self, tokens, spans, rows, cache=None):
        starts = np.cumsum([0] + [hi - lo for lo, hi, _ in spans])
        logits = []
        for i, start in enumerate(starts[:-1]):
            self.answer = [1] * int(tokens[start]) + [10] * (8 - int(tokens[start]))
            own = rows[(rows >= start) & (rows < starts[i + 1])] - start
            logits.append(super().predict(tokens, spans[i : i + 1], own))
        self.forwards -= len(logits) - 1
        return torch.cat(logits)


def test_decode_each_yields_a_completion_before_the_other_rows_are_done():
    """`decode` returns the same completions, in the order of the prompts."""
    prompts, model = [[7], [1], [3]], EndsAt([0] * 8)
    forwards, got = [], []
    for item in decode_each(model, prompts, config(), [0] * 3):
        forwards.append(model.forwards)
        got.append(item)
    assert [i for i, _ in got] == [1, 2, 0] and forwards == [2, 4, 8]
    again = decode(EndsAt([0] * 8), prompts, config(), [0] * 3)
    assert [c.token_ids for c in again] == [c.token_ids for _, c in sorted(got, key=lambda x: x[0])]


def test_a_closed_decode_each_leaves_nothing_behind(models):
    """It frees the cache with its rows, ends inference mode, and computes nothing more."""
    caches, model = [], models["llada"]

    class Watched:
        config, device = model.config, model.device

        def predict(self, *inputs):
            caches[0].append(len(inputs[-1].slots))
            return model.predict(*inputs)

        def new_cache(self):
            cache = model.new_cache()
            caches[:] = [[], weakref.ref(cache)]
            return cache

    each = decode_each(Watched(), prompts_for(5), config(kv_cache="dual"), range(5), batch_size=3)
    index, completion = next(each)
    assert not torch.is_inference_mode_enabled() and caches[1]() is not None
    slots, cache = caches
    passes = len(slots)
    each.close()
    assert (len(slots), cache(), torch.is_inference_mode_enabled()) == (passes, None, False)
    assert list(each) == []
    [alone] = decode(model, [prompts_for(5)[index]], config(kv_cache="dual"), [index])
    assert alone.token_ids == completion.token_ids and max(slots) == 3


def test_decode_each_refuses_a_configuration_at_the_call():
    with pytest.raises(ValueError, match="must be at least 1"):
        decode_each(Scripted([1] * 8), [[5]], config(), [0], batch_size=0)


def test_the_whole_canvas_as_one_block_saves_nothing():
    """There the end tokens are committed first, as the docs say."""
    model = Scripted([1, 10, 10, 10, 10, 10, 10, 10], order=[7, 6, 5, 4, 3, 2, 1, 0])
    assert decode(model, [[5]], config(block=8), [0])[0].forwards_saved == 0


# ---- errors


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "llada",
            dict(algorithm="entropy", block=None),
            "'entropy' is not defined for llada; it has: low_confidence, random, leftright, ",
        ),
        ("dream", dict(), "'low_confidence' is not defined for dream"),
        ("llada", dict(temperature=-1.0), "temperature -1 must be at least 0"),
        ("llada", dict(top_p=1.5), "top_p 1.5"),
        ("llada", dict(top_k=0), "top_k 0"),
        (
            "llada",
            dict(alg_temp=0.5),
            "low_confidence does not draw positions; these do: maskgit_plus, topk_margin, entropy",
        ),
        (
            "llada",
            dict(confidence_dtype="float16"),
            "confidence_dtype 'float16' must be one of float64, float32, model",
        ),
        (
            "dream",
            dict(algorithm="entropy", block=None, logits_eos_inf=True),
            "logits_eos_inf: the dream family has no such rule",
        ),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(family, changes, message):
    with pytest.raises(ValueError) as error:
        decode(Scripted([1] * 8, family=family), [[5]], config(**changes), [0])
    assert message in str(error.value)


def test_prompts_and_seeds_must_agree():
    with pytest.raises(ValueError, match="2 prompts need as many seeds, not 1"):
        decode(Scripted([1] * 8), [[5], [6]], config(), [0])


def test_nothing_to_decode_is_an_empty_list():
    assert decode(Scripted([1] * 8), [], config(), []) == []


def test_a_latency_is_without_what_the_caller_does_between_two_completions(models):
    """A slow scorer made the samples in flight look slow."""
    config, calls = DecodeConfig(make_schedule("leftright", 6)), itertools.count()
    each = decode_each(
        models["llada"], prompts_for(3), config, [0] * 3, stop=lambda ids: next(calls) % 2 == 1
    )
    found, away, began = [], 0.0, time.perf_counter()
    for _, completion in each:
        found.append(completion)
        left = time.perf_counter()
        time.sleep(0.2)
        away += time.perf_counter() - left
    whole = time.perf_counter() - began - away
    assert len({c.nfe for c in found}) > 1
    assert all(0 < c.seconds <= whole for c in found)
