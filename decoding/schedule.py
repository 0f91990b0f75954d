"""How many positions each step commits: quotas from tokens per step, steps and blocks. No torch.

tokens_per_step (K) and num_steps are one knob. A block takes ceil(block_length / K) steps. Without
blocks the whole canvas is one block. If num_steps is given, it decides. An adaptive algorithm
itself decides how many positions a step commits, at least K.

The last block is shorter than the others if block_length does not divide gen_length. It then takes
its share of a whole block's steps, rounded up, so that num_steps = ceil(gen_length * steps of a
whole block / block_length). Its quotas are those of its own length and steps: an even split, or
Dream's floor schedule.
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
    quotas:    positions that each step of a whole block commits, the same for all of them. A step
               with quota 0 is idle: it needs no forward pass. For `origin`, which commits a random
               number, an upper bound; for an adaptive algorithm a lower bound.
    rates:     for `origin`, the probability that a step commits an open position; otherwise 1.
    last_quotas, last_rates: those of the last block. They differ only if it is short.
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
        "Decode the canvas in blocks of N tokens, from left to right. The last block is shorter if "
        "N does not divide --gen_length; N equal to --gen_length means no blocks.",
        protocol=True,
    )
    num_steps: int = _count(
        "Decoding steps per sample, another way to set the tokens per step. If --tokens_per_step "
        "is given too and disagrees, N decides, and the run prints and stores the realised tokens "
        "per step. Default: from --tokens_per_step.",
    )
    tokens_per_step: int | None = _count(
        "Tokens committed per step; more is faster and usually less accurate. A block takes "
        "ceil(block_length / K) steps, a short last block proportionally fewer; without blocks a "
        "sample takes ceil(gen_length / K). An adaptive algorithm commits at least K tokens per "
        "step. Default: 1.",
        metavar="K",
    )
    quotas: tuple[int, ...]
    rates: tuple[float, ...]
    last_quotas: tuple[int, ...]
    last_rates: tuple[float, ...]
    note: str | None = None

    @property
    def n_blocks(self) -> int:
        """Number of blocks, a short last one included."""
        return ceil(self.gen_length / self.block_length)

    @property
    def last_length(self) -> int:
        """Positions of the last block."""
        return self.gen_length - (self.n_blocks - 1) * self.block_length

    @property
    def steps_per_block(self) -> int:
        """Steps of a whole block."""
        return len(self.quotas)

    def span(self, block: int) -> slice:
        """The positions of a block on the canvas."""
        lo = block * self.block_length
        return slice(lo, min(lo + self.block_length, self.gen_length))

    def quotas_of(self, block: int) -> tuple[int, ...]:
        """The quotas of a block, one for each of its steps."""
        return self.quotas if block < self.n_blocks - 1 else self.last_quotas

    def rates_of(self, block: int) -> tuple[float, ...]:
        """The rates of a block, one for each of its steps."""
        return self.rates if block < self.n_blocks - 1 else self.last_rates

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
        return min(self.passes_after(0, 0), self.gen_length)

    def passes_after(self, block: int, step: int) -> int:
        """Number of steps that are not idle, from a step of a block to the end of the canvas."""
        later = range(block + 1, self.n_blocks)
        counted = [self.quotas_of(block)[step:], *map(self.quotas_of, later)]
        return sum(q > 0 for quotas in counted for q in quotas)


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


def _steps_in_all(gen_length: int, block_length: int, per_block: int) -> int:
    """Steps of a sample whose whole blocks take `per_block` steps."""
    return ceil(gen_length * per_block / block_length)


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
    if block_length > gen_length:
        return [f"block_length {block_length} is more than the gen_length of {gen_length}"]
    below = (num_steps or 0) * block_length // gen_length
    if num_steps is not None and _steps_in_all(gen_length, block_length, below) != num_steps:
        # a block has no use for more steps than positions
        near = sorted({min(max(1, n), block_length) for n in (below, below + 1)})
        listed = ", ".join(str(_steps_in_all(gen_length, block_length, n)) for n in near)
        n_blocks = ceil(gen_length / block_length)
        return [
            f"num_steps {num_steps} does not divide over the {n_blocks} blocks of {block_length}; "
            f"nearest: {listed}"
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
    implied = _steps_in_all(gen_length, block_length, ceil(block_length / k))
    steps = implied if num_steps is None else num_steps
    per_block = steps * block_length // gen_length
    n_before = ceil(gen_length / block_length) - 1  # blocks before the last one
    kind = ALGORITHMS[algorithm].schedule
    if kind == "floor" and not ALGORITHMS[algorithm].scores:
        kind = "drawn"
    whole, last = (
        _block_plan(kind, n, block_steps, k)
        for n, block_steps in (
            (block_length, per_block),
            (gen_length - n_before * block_length, steps - n_before * per_block),
        )
    )
    if kind == "adaptive":
        steps = gen_length
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
        *whole,
        *last,
        note,
    )


def _block_plan(kind: str, n: int, steps: int, k: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Quotas and rates of a block of n positions.

    kind: Algorithm.schedule, or "drawn" (`origin`).
    """
    if kind == "drawn":
        return (n,) * steps, floor_rates(steps)
    if kind == "floor":
        quotas = floor_quotas(n, steps)
    elif kind == "adaptive":
        quotas = (min(k, n),) * n
    elif kind == "stride" and steps == ceil(n / k):
        quotas = stride_quotas(n, k)
    else:
        quotas = even_quotas(n, steps)
    return quotas, (1.0,) * len(quotas)
