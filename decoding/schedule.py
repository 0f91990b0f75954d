"""How many positions each step commits: tokens per step, steps and blocks turned into quotas. No torch.

tokens_per_step (K) and num_steps are one knob. A block takes ceil(block_length / K) steps; where there are no blocks
(Dream, DiffuCoder, left to right, if no block_length is given) the whole canvas takes ceil(gen_length / K). An explicit
num_steps decides. An adaptive algorithm decides itself; K is the least that it commits.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from functools import lru_cache
from math import ceil

import numpy as np

from decoding.algorithms import ALGORITHMS
from decoding.option import option, options_in
from utils import UsageError

# Far above every model's positions: a typing error must not allocate gigabytes.
MAX_LENGTH = 1 << 20


class ScheduleError(UsageError):
    """There is no such schedule; `.problems` has one sentence for each reason."""


@dataclass(frozen=True)
class Schedule:
    """The steps of one sample.

    quotas:  positions that each step of a block commits; all blocks are alike. Zero means: no forward pass.
             For `origin`, which commits a random number, the most that it can be; for an adaptive algorithm the least.
    num_steps: of all blocks together; for an adaptive algorithm the most that there can be.
    rates:   for `origin`, the chance of an open position to be committed at each step; else 1 for all.
    note:    what a user should be told about it, or None.
    """

    algorithm: str = option(
        MISSING,
        "The decoding algorithm: which open positions each step commits. --remasking is LLaDA's name for it.",
        choices=ALGORITHMS,
        metavar="NAME",
        flags=("alg", "remasking"),
        group="decoding",
        protocol=True,
    )
    gen_length: int = option(
        MISSING,
        "Length of the canvas in tokens, the longest that an answer can be. --max_new_tokens is Dream's name for it.",
        low=1,
        high=MAX_LENGTH,
        whole=True,
        flags=("gen_length", "max_new_tokens"),
        group="decoding",
        protocol=True,
    )
    block_length: int = option(
        MISSING,
        "Decode the canvas in blocks of this many tokens, left to right. It must divide --gen_length.",
        low=1,
        high=MAX_LENGTH,
        whole=True,
        group="decoding",
        protocol=True,
    )
    num_steps: int = option(
        MISSING,
        "Decoding steps per sample: --tokens_per_step seen from the other side. It decides if both are given; if they "
        "disagree, the run prints and stores the realised tokens per step. Default: from --tokens_per_step.",
        low=1,
        high=MAX_LENGTH,
        whole=True,
        group="decoding",
    )
    tokens_per_step: int | None = option(
        MISSING,
        "Tokens committed per step; more is faster and usually worse. In blocks a sample takes (gen_length / "
        "block_length) * ceil(block_length / K) steps, else ceil(gen_length / K). Adaptive algorithms commit at least K "
        "per step. Default: 1.",
        low=1,
        high=MAX_LENGTH,
        whole=True,
        metavar="K",
        group="decoding",
    )
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
    given = {
        "gen_length": gen_length,
        "block_length": block_length,
        "tokens_per_step": k,
        "num_steps": num_steps,
    }
    known = options_in(Schedule)
    problems = [
        f"{name} {value} {problem}"
        for name, value in given.items()
        if (problem := known[name].problem(value))
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
    if tokens_per_step is None and num_steps is None:
        tokens_per_step = 1
    k = ceil(gen_length / num_steps) if tokens_per_step is None else tokens_per_step
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
