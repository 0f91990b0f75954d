"""One round: run the reference and the engine in turns, take times, compare tokens, count costs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch

from decoding.engine import decode
from decoding.row_state import Completion
from decoding.sampling import Rules, _drawn, propose, uniforms
from dev.bench.presets import Preset, Regime, rows_in_flight
from dev.bench.reference import Plain, official_sampler, reference
from models.config import ModelConfig, Span, parameter_shapes
from models.transformer import KVCache, Transformer


@dataclass
class Timing:
    """The cost of one run.

    cpu:  processor seconds of all threads, which other processes on the machine hardly change
    wall: wall seconds, device synchronised
    peak: peak memory in bytes; None if unknown
    """

    cpu: float
    wall: float
    peak: int | None

    def seconds(self, on_gpu: bool) -> float:
        """The seconds that ratios are made of."""
        return self.wall if on_gpu else self.cpu


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, Timing]:
    """Run `work`. Returns its result and its cost."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _reset_peak()
    cpu, wall = time.process_time(), time.perf_counter()
    done = work()
    if on_gpu:
        torch.cuda.synchronize(device)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return done, Timing(cpu, wall, torch.cuda.max_memory_allocated(device) if on_gpu else _peak())


def _reset_peak() -> None:
    """Reset the peak of this process's resident memory (Linux only)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _peak() -> int | None:
    try:
        found = re.search(
            r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii")
        )
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


@dataclass(frozen=True)
class Rates:
    """Rates of the machine, measured in the same round."""

    matmul: float  # floating-point operations per second of a large matrix product
    copy: float  # bytes read and written per second by a large copy

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Rates:
        return cls(matmul_rate(device, dtype), copy_rate(device))


class Counted:
    """A model that records its forward passes. Their cost is computed after the time is taken."""

    def __init__(self, model: Transformer, end_ids: tuple[int, ...] | None = None):
        self.model, self.device = model, model.device
        self.passes: list[tuple[Sequence, int, bool]] = []  # spans, requested rows, with a cache
        ends = model.config.end_ids if end_ids is None else end_ids
        self.config: ModelConfig = replace(model.config, end_ids=ends, eos_id=ends[0])

    def new_cache(self) -> KVCache:
        return self.model.new_cache()

    def predict(self, tokens, spans: Sequence, rows, cache=None):
        self.passes.append((spans, len(rows), cache is not None))
        return self.model.predict(tokens, spans, rows, cache)

    def at_best(self, rates: Rates) -> tuple[float, float]:
        """Seconds of the recorded passes at these rates.

        First of the arithmetic alone, then with the slower of arithmetic and memory in each pass.
        """
        arithmetic = floor = 0.0
        for given, n_rows, cached in self.passes:
            spans = [Span(*s) for s in given]
            seconds = matmul_flops(self.config, spans, n_rows) / rates.matmul
            moved = moved_bytes(self.config, spans, n_rows, self.model.dtype.itemsize, cached)
            arithmetic, floor = arithmetic + seconds, floor + max(seconds, moved / rates.copy)
        return arithmetic, floor


def matmul_flops(config: ModelConfig, spans: Sequence[Span], n_rows: int) -> int:
    """Floating-point operations of one `predict`: matrix products and attention.

    The last layer computes queries and everything behind them for n_rows only.
    """
    c = config
    columns = sum(s.hi - s.lo for s in spans)
    pairs = sum((s.hi - s.lo) * s.kv_end for s in spans)
    heads, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    keys, others = 2 * 2 * c.d_model * kv, 2 * (2 * c.d_model * heads + 3 * c.d_model * c.d_ff)
    full = columns * (keys + others) + 4 * heads * pairs
    last = columns * keys + n_rows * others + 4 * heads * pairs * n_rows // max(columns, 1)
    return (c.n_layers - 1) * full + last + 2 * n_rows * c.d_model * c.vocab_size


def moved_bytes(
    config: ModelConfig, spans: Sequence[Span], n_rows: int, itemsize: int, cached: bool
) -> int:
    """Bytes that one `predict` has to read or write: weights once, a cache's columns, the logits.

    An embedding that is not the head too is left out: few of its rows are read.
    """
    shapes = parameter_shapes(config)
    weights = sum(
        prod(shape)
        for name, shape in shapes.items()
        if config.tie_embeddings or name != "embed.weight"
    )
    columns = sum(s.kv_end + s.hi - s.lo for s in spans) if cached else 0
    kept = columns * 2 * config.n_kv_heads * config.head_dim * config.n_layers
    return (weights + kept + n_rows * config.vocab_size) * itemsize


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    repeats = 20 if device.type == "cuda" else 4
    a @ a
    _, took = timed(lambda: [a @ a for _ in range(repeats)], device)
    return repeats * 2 * n**3 / took.seconds(device.type == "cuda")


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    n = 1 << 30 if device.type == "cuda" else 1 << 26
    a = torch.ones(n, dtype=torch.uint8, device=device)
    b, repeats = a.clone(), 8
    _, took = timed(lambda: [b.copy_(a) for _ in range(repeats)], device)
    return repeats * 2 * n / took.seconds(device.type == "cuda")


def end_tokens(answers: Sequence[Sequence[int]], share: float) -> tuple[int, ...]:
    """Choose one token of each answer as its end token.

    The chosen token occurs first as close as possible to `share` of the answer, if possible not
    after it: with a share of one half, the end must not lie in the next block. It occurs in no
    other answer before that place. Algorithms do not know which tokens end an answer, so the choice
    changes no token before it. Raises ValueError if an answer has no such token.
    """
    chosen: list[int] = []
    for answer in answers:
        at = round(share * len(answer)) - 1
        others = [other[: at // 2 * 2] for other in answers if other is not answer]
        first = [
            i
            for i, token in enumerate(answer)
            if token not in answer[:i] and not any(token in other for other in others)
        ]
        if not first:
            raise ValueError("no token of a random answer can be its end; try another --seed")
        chosen.append(answer[min(first, key=lambda i: (i > at, abs(i - at)))])
    return tuple(dict.fromkeys(chosen))


def until_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The ids up to and including the first end token."""
    at = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[: at + 1])


@dataclass
class Line:
    """The measurements of one regime."""

    regime: Regime
    ratios: list[float] = field(default_factory=list)
    wall_ratios: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)  # time of the reference, first run over second
    seconds: list[float] = field(default_factory=list)
    reference_seconds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)  # "of matmul", see __main__
    floors: list[float] = field(default_factory=list)  # "of floor"
    peaks: list[int | None] = field(default_factory=list)
    reference_peaks: list[int | None] = field(default_factory=list)
    returned: int = 0
    forwards: int = 0
    samples: int = 0
    differ: int = 0

    def summary(self) -> dict[str, Any]:
        """The medians over the rounds, and the single ratios."""
        total = sum(self.seconds)
        return {
            "regime": self.regime.name,
            "batch": self.regime.batch,
            "needed": self.regime.needed,
            "ratio": median(self.ratios),
            "ratios": self.ratios,
            "wall_ratio": median(self.wall_ratios) if self.wall_ratios else None,
            "noise": self.noise,
            "tokens_per_second": self.returned / total if total else None,
            "reference_tokens_per_second": self.returned / sum(self.reference_seconds),
            "tpf": self.returned / self.forwards if self.forwards else None,
            "share_of_matmul": median(self.shares) if self.shares else None,
            "share_of_floor": median(self.floors) if self.floors else None,
            "peak_bytes": max((p for p in self.peaks if p), default=None),
            "reference_peak_bytes": max((p for p in self.reference_peaks if p), default=None),
            "samples": self.samples,
            "samples_that_differ": self.differ,
        }


def run_round(
    preset: Preset,
    model: Transformer,
    plain: Plain,
    prompts: Sequence[Sequence[int]],
    lines: Sequence[Line],
    batch_size: int | None,
    seed: int,
    step: Callable[[str], None],
) -> None:
    """Run each reference once and the engine in each regime; at the end, the first reference again.

    prompts:    different prompts; the engine repeats them until the regime's batch is full
    batch_size: rows in flight, as far as they fit; None: all of them
    step:       called with the name of each run before it starts
    """
    on_gpu, device = model.device.type == "cuda", model.device
    rates = Rates.of(device, model.dtype)
    seeds = [seed + i for i in range(len(prompts))]
    references: dict[tuple, tuple[list[list[int]], Timing]] = {}

    def official(regime: Regime) -> tuple[list[list[int]], Timing]:
        config = replace(regime, kv_cache="none").config(
            preset.gen_length, preset.tokens_per_step, early_exit=False
        )
        step(f"reference {regime.algorithm}")
        return timed(
            lambda: [reference(plain, p, config, s) for p, s in zip(prompts, seeds)], device
        )

    for line in lines:
        regime = line.regime
        key = (regime.algorithm, regime.block)
        if key not in references:
            references[key] = official(regime)
        answers, once = references[key]
        n = regime.batch or preset.batch
        many = [i % len(prompts) for i in range(n)]
        slow = replace(once, cpu=once.cpu * n / len(prompts), wall=once.wall * n / len(prompts))
        ends = None if regime.answer is None else end_tokens(answers, regime.answer)
        counted = Counted(model, ends)
        config = regime.config(
            preset.gen_length, preset.tokens_per_step, early_exit=ends is not None
        )
        step(regime.name)
        before = model.acceleration.seconds
        asked, drawn = [prompts[i] for i in many], [seeds[i] for i in many]
        most = rows_in_flight(preset, regime, model, batch_size or n)
        ours = partial(decode, counted, asked, config, drawn, batch_size=most)
        done, quick = timed(ours, device)
        # the time of capturing CUDA graphs does not count
        quick.wall -= model.acceleration.seconds - before
        _note(line, [answers[i] for i in many], slow, done, quick, counted, rates)
    first = lines[0]
    again = official(first.regime)[1]
    once = references[first.regime.algorithm, first.regime.block][1]
    first.noise.append(once.seconds(on_gpu) / again.seconds(on_gpu))


def _note(
    line: Line,
    answers: list[list[int]],
    slow: Timing,
    done: list[Completion],
    quick: Timing,
    counted: Counted,
    rates: Rates,
) -> None:
    on_gpu, ends = counted.device.type == "cuda", counted.config.end_ids
    seconds = quick.seconds(on_gpu)
    arithmetic, floor = counted.at_best(rates)
    line.ratios.append(slow.seconds(on_gpu) / seconds)
    line.wall_ratios.append(slow.wall / quick.wall)
    line.seconds.append(seconds)
    line.reference_seconds.append(slow.seconds(on_gpu))
    line.shares.append(arithmetic / seconds)
    line.floors.append(floor / seconds)
    line.peaks.append(quick.peak)
    line.reference_peaks.append(slow.peak)
    for answer, completion in zip(answers, done):
        wanted, got = until_end(answer, ends), until_end(completion.token_ids, ends)
        if line.regime.kv_cache == "none":
            line.samples += 1
            line.differ += wanted != got
        line.returned += len(got) - (got[-1] in ends)
        line.forwards += completion.nfe


def sampler_round(
    line: Line, vocabulary: int, device: torch.device, dtype: torch.dtype, seed: int
) -> None:
    """Compare Dream's sampler with the engine's on 32 rows of random logits.

    Temperature 0.2, top_p 0.95.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    logits = torch.empty(32, vocabulary, device=device).normal_(0, 6, generator=generator).to(dtype)
    noise = uniforms(seed, 0, 32)[0].to(device)
    rules = Rules(temperature=0.2, top_p=0.95, scores_the_draw=True)
    _, slow = timed(lambda: official_sampler(logits, 0.2, 0.95), device)
    got, quick = timed(lambda: propose(logits, rules, frozenset({"confidence"}), noise), device)
    exact = _drawn(logits, rules, frozenset(), noise)
    on_gpu = device.type == "cuda"
    line.ratios.append(slow.seconds(on_gpu) / quick.seconds(on_gpu))
    line.wall_ratios.append(slow.wall / quick.wall)
    line.seconds.append(quick.seconds(on_gpu))
    line.reference_seconds.append(slow.seconds(on_gpu))
    line.peaks.append(quick.peak)
    line.reference_peaks.append(slow.peak)
    line.samples += 32
    line.returned += 32
    line.differ += int((got.tokens != exact.tokens).sum())
