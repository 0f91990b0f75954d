"""How one sample is decoded: every option of the loop, each in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from decoding.algorithms import ALGORITHMS, algorithm_options
from decoding.kv_cache import CACHES
from decoding.option import option, options_in
from decoding.schedule import Schedule

CONFIDENCE_DTYPES = ("float64", "float32", "model")
SAMPLING, PRECISION = "sampling", "precision and seed"
CACHE, LEFT_TO_RIGHT = "KV cache", "algorithms that go left to right"
END = "Default: the protocol's."


@dataclass(frozen=True)
class DecodeConfig:
    """How one sample is decoded: everything besides model, prompt and seed that can change a token.

    early_exit: a row leaves once no later commit can change its text.
    given:      the algorithm's own options that were given, as (name, value), by name.
    The other fields are described by their options.
    """

    schedule: Schedule
    temperature: float = option(
        0.0,
        "0 takes the likeliest token at every position; above 0 tokens are drawn, from a generator seeded per sample. "
        f"{END}",
        group=SAMPLING,
        protocol=True,
    )
    top_p: float | None = option(
        None,
        "Draw only from the likeliest tokens that together have probability P. It has no effect at temperature 0, and "
        f"the run says so. {END}",
        above=True,
        high=1.0,
        group=SAMPLING,
        protocol=True,
    )
    top_k: int | None = option(
        None,
        f"Draw only from the N likeliest tokens. It has no effect at temperature 0, and the run says so. {END}",
        low=1,
        whole=True,
        group=SAMPLING,
        protocol=True,
    )
    alg_temp: float | None = option(
        None,
        "Above 0 the positions to commit are drawn too, by softmax(score / T); for algorithms of the Dream family. "
        f"{END}",
        group=SAMPLING,
        protocol=True,
    )
    confidence_dtype: str = option(
        "float64",
        "Precision of probabilities and scores. model is the precision of the logits, which in bfloat16 gives most "
        "confident positions the same score.",
        choices=CONFIDENCE_DTYPES,
        group=PRECISION,
    )
    logits_eos_inf: bool = option(
        False,
        f"LLaDA family: never propose the end-of-text token; the end-of-turn token still can be proposed. {END}",
        truth=True,
        group=SAMPLING,
        protocol=True,
    )
    confidence_eos_eot_inf: bool = option(
        False,
        f"LLaDA family: end tokens get no confidence, so they are committed last. {END}",
        truth=True,
        group=SAMPLING,
        protocol=True,
    )
    early_exit: bool = option(
        True,
        "Fill the whole canvas even where the answer can no longer change. Answers are the same either way; the result "
        "says how many forward passes the early exit saved. leftright and apd always end at the end token, which is part "
        "of these algorithms.",
        switch=True,
        negated=True,
        group="decoding",
    )
    kv_cache: str = option(
        "none",
        "Reuse keys and values of earlier forward passes: prefix those left of the block, dual those right of it too, "
        "window those left of --kv_window. Faster and not exact: reused keys and values do not reflect what was "
        "committed since.",
        choices=tuple(CACHES),
        group=CACHE,
        name="",
    )
    cache_refresh: int | None = option(
        None,
        "With a cache, compute all columns on every Nth forward pass of a block, the first included. 1 gives the tokens "
        "of no cache. Default: on the first alone.",
        low=1,
        whole=True,
        group=CACHE,
        name="refresh",
    )
    kv_window: int | None = option(
        None,
        "Recompute the columns that the last step committed and enough before them that they are W; reuse the columns "
        "further left. Implies --kv_cache window, whose default is 16.",
        low=1,
        whole=True,
        group=LEFT_TO_RIGHT,
        name="",
    )
    max_lookahead: int | None = option(
        None,
        "The model sees, and a step may commit, at most M positions from the first open one on. Default: all that are "
        "left.",
        low=1,
        whole=True,
        group=LEFT_TO_RIGHT,
        name="lookahead",
    )
    given: tuple[tuple[str, float], ...] = ()

    @cached_property
    def options(self) -> dict[str, float]:
        """The algorithm's own options, defaults included; counts are int, all others float."""
        given = dict(self.given)
        own = ALGORITHMS[self.schedule.algorithm].options
        return {n: (int if o.whole else float)(given.get(n, o.default)) for n, o in own.items()}

    def at_its_temperature(self) -> DecodeConfig:
        """The same without the filters of the draw where nothing is drawn."""
        return replace(self, top_p=None, top_k=None) if self.temperature == 0 else self

    def problems(self, family: str, end_token_flags: Sequence[str]) -> list[str]:
        """One sentence for each option that is out of range, or that the family or the algorithm lacks.

        end_token_flags: the family's, models.Family.end_token_flags.
        """
        name = self.schedule.algorithm
        algorithm = ALGORITHMS[name]
        ranges = [
            f"{field} {getattr(self, field)} {problem}"
            for field, known in options_in(DecodeConfig).items()
            if (problem := known.problem(getattr(self, field)))
        ]
        having = ", ".join(a for a in ALGORITHMS if family in ALGORITHMS[a].families)
        drawing = ", ".join(a for a in ALGORITHMS if ALGORITHMS[a].draws_order)
        checks = [
            (
                family not in algorithm.families,
                f"algorithm {name!r} is not defined for {family}; it has: {having}",
            ),
            (
                bool(self.alg_temp) and not algorithm.draws_order,
                f"alg_temp {self.alg_temp}: {name} has no drawn order; these have: {drawing}",
            ),
            *(
                (
                    getattr(self, flag) and flag not in end_token_flags,
                    f"{flag} is no rule of the {family} family; leave it out",
                )
                for flag in ("logits_eos_inf", "confidence_eos_eot_inf")
            ),
            (
                self.cache_refresh is not None and self.kv_cache == "none",
                f"cache_refresh {self.cache_refresh}: there is no cache to refresh; give kv_cache prefix or dual",
            ),
        ]
        rules = [text for wrong, text in checks if wrong]
        return ranges + rules + self._sight_problems() + self._option_problems()

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
            (
                ahead is not None and strays,
                f"max_lookahead {ahead}: {name} may commit anywhere; {only}",
            ),
            (
                ahead is not None and self.kv_cache in ("prefix", "dual"),
                f"max_lookahead {ahead}: kv_cache {self.kv_cache} keeps what lies ahead; take none or window",
            ),
            (
                ahead is not None and 1 <= ahead < most and not strays,
                f"max_lookahead {ahead} is less than the {most} positions that a step commits",
            ),
        ]
        return [text for wrong, text in checks if wrong]

    def _option_problems(self) -> list[str]:
        name = self.schedule.algorithm
        problems = []
        for own, value in self.given:
            known = ALGORITHMS[name].options.get(own)
            if known is None:
                having = ", ".join(algorithm_options().get(own, ["none"]))
                problems.append(f"{own} {value:g}: {name} has no such option; these have: {having}")
            elif problem := known.problem(value):
                problems.append(f"{own} {value:g} {problem}")
        return problems


def named_values(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of what tells two runs of one algorithm apart: its options, its cache, its sight.

    settings: a result's flat configuration. A cache's window is part of its value: "window16".
    """
    found = [(name, f"{value:g}") for name, value in (settings.get("options") or {}).items()]
    cache = settings.get("kv_cache") or "none"
    if cache != "none":
        found.append(("", f"{cache}{settings.get('kv_window') or ''}"))
    for field, known in options_in(DecodeConfig).items():
        if known.name and settings.get(field) is not None:
            found.append((known.name, f"{settings[field]:g}"))
    return found


def name_parts(config: DecodeConfig) -> list[str]:
    """`named_values` as parts of a file name: threshold0.9, window16, refresh4."""
    settings = {name: getattr(config, name) for name in options_in(DecodeConfig)}
    return [
        f"{name}{value}" for name, value in named_values(settings | {"options": config.options})
    ]
