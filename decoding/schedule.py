"""How many positions each step commits: quotas from tokens per step, steps and blocks. No torch.

tokens_per_step (K) and num_steps are one knob. A block takes ceil(block_length / K) steps. Without
blocks the whole canvas is one block. If num_steps is given, it decides. An adaptive algorithm
itself decides how many positions a step commits, at least K.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from functools import lru_cache, partial
from math import ceil

import numpy as np

from decoding.algorithms import ALGORITHMS
from decoding.option import option, options_in
from utils import UsageError

# Far above every model's positions: a typing error must not allocate gigabytes.
MAX_LENGTH = 1 << 20

_count = partial(option, MISSING, low=1, high=MAX_LENGTH, whole=True, group="decoding")


class ScheduleError(UsageError):
    """The requested schedule does not exist; `.problems` has one sentence for each reason."""


@dataclass(frozen=True)
class Schedule:
    """The steps of one sample. The fields with an Option hold the realised values.

    num_steps: steps of all blocks together; for an adaptive algorithm an upper bound.
    tokens_per_step: as requested; None if num_steps decided.
    quotas:    positions that each step of a block commits, the same for all blocks. A step with
               quota 0 is idle: it needs no forward pass. For `origin`, which commits a random
               number, an upper bound; for an adaptive algorithm a lower bound.
    rates:     for `origin`, the probability that a step commits an open position; otherwise 1.
    note:      a remark for the user, or None.
    """

    algorithm: str = option(
        MISSING,
        "The decoding algorithm: it chooses the positions that each step commits. --remasking is "
        "LLaDA's name for it.",
        choices=ALGORITHMS,
        flags=("alg", "remasking"),
        group="decoding",
        protocol=True,
    )
    gen_length: int = _count(
        "Length of the canvas, the maximum length of an answer, in tokens. --max_new_tokens is "
        "Dream's name for it.",
        flags=("gen_length", "max_new_tokens"),
        protocol=True,
    )
    block_length: int = _count(
        "Decode the canvas in blocks of N tokens, from left to right. N must divide --gen_length.",
        protocol=True,
    )
    num_steps: int = _count(
        "Decoding steps per sample, the other side of --tokens_per_step. If both are given, N "
        "decides; if they disagree, the run prints and stores the realised tokens per step. "
        "Default: from --tokens_per_step.",
    )
    tokens_per_step: int | None = _count(
        "Tokens committed per step; more is faster and usually worse. A sample takes (gen_length / "
        "block_length) * ceil(block_length / K) steps, without blocks ceil(gen_length / K). An "
        "adaptive algorithm commits at least K tokens per step. Default: 1.",
        metavar="K",
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
        """Mean positions per step, idle steps included; for an adaptive algorithm the minimum."""
        return self.quotas[0] if self.adaptive else self.gen_length / self.num_steps

    @property
    def adaptive(self) -> bool:
        """Whether the algorithm itself decides how many positions a step commits."""
        return ALGORITHMS[self.algorithm].schedule == "adaptive"

    @property
    def forward_passes(self) -> int:
        """Maximum number of forward passes of a sample: its steps that are not idle."""
        return min(self.n_blocks * sum(q > 0 for q in self.quotas), self.gen_length)


def even_quotas(n: int, steps: int) -> tuple[int, ...]:
    """n positions split over `steps` steps, the remainder first: 10 over 4 is (3, 3, 2, 2).

    Source: ML-GSAI/LLaDA generate.py, get_num_transfer_tokens.
    """
    base, rest = divmod(n, steps)
    return tuple(base + (j < rest) for j in range(steps))


def stride_quotas(n: int, k: int) -> tuple[int, ...]:
    """n positions, k in every step and the remainder in the last."""
    return tuple(min(k, n - done) for done in range(0, n, k))


@lru_cache(maxsize=64)
def floor_rates(steps: int, eps: float = 1e-3) -> tuple[float, ...]:
    """Share of the open positions that each step of Dream's schedule commits.

    The share of step i is 1 - t[i+1] / t[i], and 1 in the last step, with t = linspace(1, eps,
    steps + 1) in float32. Each point is rounded once, like a fused multiply-add, and so equals
    torch.linspace: one bit can change a quota (984 positions in 246 steps).
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
    """Dream's schedule: floor(open * rate) positions per step, and the remainder in the last step.

    At one token per step the first steps commit nothing and the last ones several positions.
    Source: as floor_rates.
    """
    quotas = []
    for rate in floor_rates(steps):
        quotas.append(int(np.float32(n) * np.float32(rate)))
        n -= quotas[-1]
    return tuple(quotas)


def _nearest(value: int, divisor: int) -> str:
    """The multiples of `divisor` next to `value`."""
    below = value // divisor * divisor
    return ", ".join(str(n) for n in (below, below + divisor) if n)


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
        text for name, value in given.items() if (text := known[name].sentence(name, value))
    ]
    if problems:
        return problems
    if ALGORITHMS[algorithm].schedule == "adaptive" and num_steps is not None:
        return [f"num_steps {num_steps}: {algorithm} decides the number of steps; leave it out"]
    if gen_length % block_length:
        return [
            f"gen_length {gen_length} is not a multiple of block_length {block_length}; "
            f"nearest: {_nearest(gen_length, block_length)}"
        ]
    n_blocks = gen_length // block_length
    if num_steps is not None and num_steps % n_blocks:
        return [
            f"num_steps {num_steps} does not divide over the {n_blocks} blocks of {block_length}; "
            f"nearest: {_nearest(num_steps, n_blocks)}"
        ]
    return []


def make_schedule(
    algorithm: str,
    gen_length: int,
    block_length: int | None = None,
    tokens_per_step: int | None = None,
    num_steps: int | None = None,
) -> Schedule:
    """The schedule of an algorithm of ALGORITHMS. Without K and num_steps: one token per step.

    block_length: None means the whole canvas.
    Raises ScheduleError with every reason why there is no such schedule.
    """
    if algorithm not in ALGORITHMS:
        raise ScheduleError(
            f"unknown algorithm {algorithm!r}; there are: {', '.join(sorted(ALGORITHMS))}"
        )
    block_length = gen_length if block_length is None else block_length
    problems = _problems(algorithm, gen_length, block_length, tokens_per_step, num_steps)
    if problems:
        raise ScheduleError(problems)
    if tokens_per_step is None and num_steps is None:
        tokens_per_step = 1
    k = ceil(gen_length / num_steps) if tokens_per_step is None else tokens_per_step
    n_blocks = gen_length // block_length
    implied = n_blocks * ceil(block_length / k)
    steps = implied if num_steps is None else num_steps
    per_block, rates = steps // n_blocks, None
    kind = ALGORITHMS[algorithm].schedule
    if kind == "floor" and not ALGORITHMS[algorithm].scores:
        quotas, rates = (block_length,) * per_block, floor_rates(per_block)
    elif kind == "floor":
        quotas = floor_quotas(block_length, per_block)
    elif kind == "adaptive":
        steps, quotas = gen_length, (min(k, block_length),) * block_length
    elif kind == "stride" and steps == implied:
        quotas = stride_quotas(block_length, k)
    else:
        quotas = even_quotas(block_length, per_block)
    note = None
    if tokens_per_step is not None and num_steps is not None and steps != implied:
        note = (
            f"num_steps {steps} decides: {gen_length / steps:g} tokens per step, "
            f"not tokens_per_step {tokens_per_step}, which would be {implied} steps"
        )
    elif k > block_length:
        note = (
            f"tokens_per_step {k} is more than the block of {block_length}: "
            f"{block_length} tokens per step"
        )
    return Schedule(
        algorithm,
        gen_length,
        block_length,
        steps,
        tokens_per_step if steps == implied or kind == "adaptive" else None,
        quotas,
        rates or (1.0,) * len(quotas),
        note,
    )
