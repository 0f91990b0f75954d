"""How many positions each step commits: tokens per step, steps and blocks turned into quotas. No torch.

tokens_per_step (K) and num_steps are one knob. A block takes ceil(block_length / K) steps; where there are no blocks
(Dream, DiffuCoder, left to right, if no block_length is given) the whole canvas takes ceil(gen_length / K). An explicit
num_steps decides. An adaptive algorithm decides itself; K is the least that it commits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil

import numpy as np

from decoding.algorithms import ALGORITHMS, OPTIONS
from decoding.kv_cache import CACHES

# Far above every model's positions: a typing error must not allocate gigabytes.
MAX_LENGTH = 1 << 20
CONFIDENCE_DTYPES = ("float64", "float32", "model")


class ScheduleError(ValueError):
    """A schedule that cannot be; `.problems` has one sentence for each reason."""

    def __init__(self, problems: list[str]):
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class Schedule:
    """The steps of one sample.

    quotas:  positions that each step of a block commits; all blocks are alike. Zero means: no forward pass.
             For `origin`, which commits a random number, the most that it can be; for an adaptive algorithm the least.
    num_steps: of all blocks together; for an adaptive algorithm the most that there can be.
    rates:   for `origin`, the chance of an open position to be committed at each step; else 1 for all.
    note:    what a user should be told about it, or None.
    """

    algorithm: str
    gen_length: int
    block_length: int
    num_steps: int
    tokens_per_step: int | None
    quotas: tuple[int, ...]
    rates: tuple[float, ...]
    note: str | None = None

    @property
    def n_blocks(self) -> int:
        return self.gen_length // self.block_length

    @property
    def steps_per_block(self) -> int:
        return len(self.quotas)

    @property
    def realised_tps(self) -> float:
        """Positions per step, steps that commit nothing included; for an adaptive algorithm the least."""
        return self.quotas[0] if self.adaptive else self.gen_length / self.num_steps

    @property
    def adaptive(self) -> bool:
        """Whether the algorithm decides itself how many positions a step commits."""
        return ALGORITHMS[self.algorithm].schedule == "adaptive"

    @property
    def forward_passes(self) -> int:
        """Steps that commit something: what a sample costs at most (`origin` may skip more by chance)."""
        return min(self.n_blocks * sum(q > 0 for q in self.quotas), self.gen_length)


def even_quotas(n: int, steps: int) -> tuple[int, ...]:
    """n positions over `steps` steps, the remainder on the first ones: 10 over 4 is (3, 3, 2, 2).

    Source: ML-GSAI/LLaDA generate.py, get_num_transfer_tokens.
    """
    base, rest = divmod(n, steps)
    return tuple(base + (j < rest) for j in range(steps))


def stride_quotas(n: int, k: int) -> tuple[int, ...]:
    """n positions, k every step and what is left in the last."""
    return tuple(min(k, n - done) for done in range(0, n, k))


@lru_cache(maxsize=64)
def floor_rates(steps: int, eps: float = 1e-3) -> tuple[float, ...]:
    """Share of the open positions that each step of Dream's schedule unmasks: 1 - t[i+1] / t[i], at last 1.

    t is linspace(1, eps, steps + 1) in float32, each point rounded once as a fused multiply-add does: one bit
    decides a quota now and then (984 positions in 246 steps), and so it is what torch.linspace gives.
    Source: DreamLM/Dream generation_utils.py.
    """
    f = np.float32
    i = np.arange(steps + 1)
    width = np.float64(f((f(eps) - f(1)) / f(steps)))
    t = np.where(
        i < (steps + 1) // 2, 1 + width * i, np.float64(f(eps)) - width * (steps - i)
    ).astype(f)
    return tuple(float(r) for r in f(1) - t[1:-1] / t[:-2]) + (1.0,)


def floor_quotas(n: int, steps: int) -> tuple[int, ...]:
    """Dream's schedule: floor(open * rate) positions a step, all that are left in the last one.

    One token per step begins with steps of none and ends with steps of several. Source: as floor_rates.
    """
    quotas = []
    for rate in floor_rates(steps):
        quotas.append(int(np.float32(n) * np.float32(rate)))
        n -= quotas[-1]
    return tuple(quotas)


def _problems(
    algorithm: str, gen_length: int, block_length: int, k: int | None, num_steps: int | None
) -> list[str]:
    problems = [
        f"{name} {value} must be at least 1 and at most {MAX_LENGTH}"
        for name, value in (
            ("gen_length", gen_length),
            ("block_length", block_length),
            ("tokens_per_step", k),
            ("num_steps", num_steps),
        )
        if value is not None and not 1 <= value <= MAX_LENGTH
    ]
    if problems:
        return problems
    if ALGORITHMS[algorithm].schedule == "adaptive" and num_steps is not None:
        return [
            f"num_steps {num_steps}: {algorithm} decides itself how many steps it takes; leave it out"
        ]
    if gen_length % block_length:
        below = gen_length // block_length * block_length
        nearest = ", ".join(str(n) for n in (below, below + block_length) if n)
        return [
            f"gen_length {gen_length} is not a multiple of block_length {block_length}; nearest: {nearest}"
        ]
    n_blocks = gen_length // block_length
    if num_steps is not None and num_steps % n_blocks:
        below = num_steps // n_blocks * n_blocks
        nearest = ", ".join(str(n) for n in (below, below + n_blocks) if n)
        return [
            f"num_steps {num_steps} does not divide over the {n_blocks} blocks of {block_length}; nearest: {nearest}"
        ]
    return []


def make_schedule(
    algorithm: str,
    gen_length: int,
    block_length: int | None = None,
    tokens_per_step: int | None = None,
    num_steps: int | None = None,
) -> Schedule:
    """The schedule of an algorithm of ALGORITHMS; with neither K nor num_steps, one token per step.

    block_length None is the whole canvas. Raises ScheduleError with every reason why it cannot be.
    """
    if algorithm not in ALGORITHMS:
        raise ScheduleError(
            [f"unknown algorithm {algorithm!r}; there are: {', '.join(sorted(ALGORITHMS))}"]
        )
    block_length = gen_length if block_length is None else block_length
    problems = _problems(algorithm, gen_length, block_length, tokens_per_step, num_steps)
    if problems:
        raise ScheduleError(problems)
    n_blocks = gen_length // block_length
    k = (
        tokens_per_step
        if tokens_per_step is not None
        else (1 if num_steps is None else ceil(gen_length / num_steps))
    )
    implied = n_blocks * ceil(block_length / k)
    steps = implied if num_steps is None else num_steps
    kind = ALGORITHMS[algorithm].schedule
    by_chance = kind == "floor" and not ALGORITHMS[algorithm].scores
    if by_chance:
        quotas = (block_length,) * (steps // n_blocks)
    elif kind == "floor":
        quotas = floor_quotas(block_length, steps // n_blocks)
    elif kind == "adaptive":
        steps, quotas = gen_length, (min(k, block_length),) * block_length
    elif kind == "stride" and steps == implied:
        quotas = stride_quotas(block_length, k)
    else:
        quotas = even_quotas(block_length, steps // n_blocks)
    note = None
    if tokens_per_step is not None and num_steps is not None and steps != implied:
        note = (
            f"num_steps {steps} decides: {gen_length / steps:g} tokens per step, "
            f"not tokens_per_step {tokens_per_step}, which would be {implied} steps"
        )
    elif k > block_length:
        note = f"tokens_per_step {k} is more than the block of {block_length}: {block_length} tokens per step"
    return Schedule(
        algorithm,
        gen_length,
        block_length,
        steps,
        tokens_per_step if steps == implied or kind == "adaptive" else None,
        quotas,
        floor_rates(steps // n_blocks) if by_chance else (1.0,) * len(quotas),
        note,
    )


@dataclass(frozen=True)
class DecodeConfig:
    """How one sample is decoded: everything besides model, prompt and seed that can change a token.

    temperature:      0 takes the likeliest token; above 0 one is drawn.
    top_p, top_k:     nucleus and top-k filter of the draw; inactive at temperature 0.
    alg_temp:         Dream: draw the order of commits from softmax(score / alg_temp) instead of taking the best.
    confidence_dtype: precision of softmax and scores; "model" is the logits' own.
    logits_eos_inf:   LLaDA: the end token is never proposed (the end of turn still can be).
    confidence_eos_eot_inf: LLaDA: both end tokens keep no confidence, so they are committed last.
    early_exit:       a row leaves once no later commit can change its text.
    kv_cache:         of CACHES: which columns a forward pass computes anew.
    cache_refresh:    with a cache: every how many forward passes of a block all columns are computed; None: at the
                      block's first alone. 1 is no cache at all, at a cache's memory.
    kv_window:        with kv_cache "window": columns computed again left of what was committed last, itself included.
    max_lookahead:    left to right: the canvas reaches this many positions beyond the first open one; None: to its end.
    given:            the algorithm's own options that were given, as (name, value), by name.
    """

    schedule: Schedule
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    alg_temp: float | None = None
    confidence_dtype: str = "float64"
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    early_exit: bool = True
    kv_cache: str = "none"
    cache_refresh: int | None = None
    kv_window: int | None = None
    max_lookahead: int | None = None
    given: tuple[tuple[str, float], ...] = ()

    @cached_property
    def options(self) -> dict[str, float]:
        """The algorithm's own options, defaults included; counts are int, all others float."""
        given = dict(self.given)
        own = ALGORITHMS[self.schedule.algorithm].options
        return {
            name: (int if o.whole else float)(given.get(name, o.default)) for name, o in own.items()
        }

    def problems(self, family: str) -> list[str]:
        """One sentence for each option that is out of range, or that the family or the algorithm lacks."""
        name = self.schedule.algorithm
        algorithm = ALGORITHMS[name]
        checks = [
            (
                family not in algorithm.families,
                f"algorithm {name!r} is not defined for {family}; it has: {', '.join(a for a in ALGORITHMS if family in ALGORITHMS[a].families)}",
            ),
            (
                not 0 <= self.temperature < float("inf"),
                f"temperature {self.temperature:g} must be 0 or more",
            ),
            (
                self.top_p is not None and not 0 < self.top_p <= 1,
                f"top_p {self.top_p} must be above 0 and at most 1",
            ),
            (self.top_k is not None and self.top_k < 1, f"top_k {self.top_k} must be at least 1"),
            (
                self.alg_temp is not None and not 0 <= self.alg_temp < float("inf"),
                f"alg_temp {self.alg_temp} must be 0 or more",
            ),
            (
                bool(self.alg_temp) and not algorithm.draws_order,
                f"alg_temp {self.alg_temp}: {name} has no drawn order; these have: "
                + ", ".join(a for a in ALGORITHMS if ALGORITHMS[a].draws_order),
            ),
            (
                self.confidence_dtype not in CONFIDENCE_DTYPES,
                f"confidence_dtype {self.confidence_dtype!r} must be one of {', '.join(CONFIDENCE_DTYPES)}",
            ),
            (
                family != "llada" and self.logits_eos_inf,
                f"logits_eos_inf is a rule of the llada family; {family} lacks it",
            ),
            (
                family != "llada" and self.confidence_eos_eot_inf,
                f"confidence_eos_eot_inf is a rule of the llada family; {family} lacks it",
            ),
            (
                self.kv_cache not in CACHES,
                f"kv_cache {self.kv_cache!r} must be one of {', '.join(CACHES)}",
            ),
            (
                self.cache_refresh is not None and self.kv_cache == "none",
                f"cache_refresh {self.cache_refresh}: there is no cache to refresh; give kv_cache prefix or dual",
            ),
            (
                self.cache_refresh is not None and self.cache_refresh < 1,
                f"cache_refresh {self.cache_refresh} must be at least 1",
            ),
        ]
        return (
            [text for wrong, text in checks if wrong]
            + self._sight_problems()
            + self._option_problems()
        )

    def _sight_problems(self) -> list[str]:
        """What is wrong with how far the algorithm looks to the left and to the right."""
        name, window, ahead = self.schedule.algorithm, self.kv_window, self.max_lookahead
        only = "left to right go " + ", ".join(a for a in ALGORITHMS if ALGORITHMS[a].left_to_right)
        strays, cached = not ALGORITHMS[name].left_to_right, self.kv_cache == "window"
        most = max(self.schedule.quotas)
        checks = [
            (cached and strays, f"kv_cache window: {name} may commit anywhere; {only}"),
            (cached and window is None, "kv_cache window needs a kv_window"),
            (
                window is not None and not cached,
                f"kv_window {window} is of kv_cache window, not of {self.kv_cache}",
            ),
            (window is not None and window < 1, f"kv_window {window} must be at least 1"),
            (
                ahead is not None and strays,
                f"max_lookahead {ahead}: {name} may commit anywhere; {only}",
            ),
            (
                ahead is not None and self.kv_cache in ("prefix", "dual"),
                f"max_lookahead {ahead}: kv_cache {self.kv_cache} keeps what lies ahead; take none or window",
            ),
            (ahead is not None and ahead < 1, f"max_lookahead {ahead} must be at least 1"),
            (
                ahead is not None and 1 <= ahead < most and not strays,
                f"max_lookahead {ahead} is less than the {most} positions that a step commits",
            ),
        ]
        return [text for wrong, text in checks if wrong]

    def _option_problems(self) -> list[str]:
        name = self.schedule.algorithm
        problems = []
        for option, value in self.given:
            known = ALGORITHMS[name].options.get(option)
            if known is None:
                having = ", ".join(OPTIONS.get(option, ["none"]))
                problems.append(
                    f"{option} {value:g}: {name} has no such option; these have: {having}"
                )
            elif problem := known.problem(value):
                problems.append(f"{option} {value:g} {problem}")
        return problems
