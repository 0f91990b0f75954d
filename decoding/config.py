"""How one sample is decoded: DecodeConfig, its checks, and its parts of file names and labels.

No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from decoding.algorithms import ALGORITHMS, algorithm_options, algorithms_of
from decoding.kv_cache import CACHES
from decoding.option import option, options_in, written
from decoding.schedule import Schedule

CONFIDENCE_DTYPES = ("float64", "float32", "model")
# Options that only some families have. A family's `end_token_flags` lists its own.
END_TOKEN_FLAGS = ("logits_eos_inf", "confidence_eos_eot_inf")

KV_WINDOW = 16  # as in APD

_sampling = partial(option, group="sampling", protocol=True)
_cache = partial(option, group="KV cache", low=1, whole=True)


@dataclass(frozen=True)
class DecodeConfig:
    """How one sample is decoded: everything that can change a token, except model, prompt and seed.

    Each field declares its Option, whose help describes it.
    given: the algorithm's own options that were given, as (name, value) pairs.
    """

    schedule: Schedule
    temperature: float = _sampling(
        0.0,
        "0 takes the likeliest token at every position. Above 0 tokens are drawn, by a generator "
        "that is seeded for each sample.",
        metavar="T",
    )
    top_p: float | None = _sampling(
        None,
        "Draw only from the likeliest tokens that together have probability P. At temperature 0 "
        "it has no effect, and the run says so.",
        high=1.0,
        above=True,
        metavar="P",
    )
    top_k: int | None = _sampling(
        None,
        "Draw only from the N likeliest tokens. At temperature 0 it has no effect, and the run "
        "says so.",
        low=1,
        whole=True,
    )
    alg_temp: float | None = _sampling(
        None,
        "For Dream's algorithms: above 0 the positions to commit are drawn by softmax(score / T); "
        "at 0 the best positions are taken.",
        metavar="T",
    )
    confidence_dtype: str = option(
        "float64",
        "Precision of probabilities and scores. 'model' means the precision of the logits; in "
        "bfloat16 most confident positions then have equal scores.",
        choices=CONFIDENCE_DTYPES,
        group="sampling",
    )
    logits_eos_inf: bool = _sampling(
        False,
        "For LLaDA: never propose the end-of-text token. The end-of-turn token can still be "
        "proposed. Without a value the flag means true.",
        truth=True,
    )
    confidence_eos_eot_inf: bool = _sampling(
        False,
        "For LLaDA: end tokens get no confidence, so they are committed last. Without a value the "
        "flag means true.",
        truth=True,
    )
    early_exit: bool = option(
        True,
        "Decode every canvas to its end, even if the answer can no longer change. Answers are the "
        "same either way; the result reports how many forward passes early exit saved.",
        switch=True,
        negated=True,
        group="decoding",
    )
    kv_cache: str = option(
        "none",
        "Reuse keys and values of earlier forward passes: 'prefix' those left of the block, 'dual' "
        "also those right of it, 'window' those further left than --kv_window. This is faster and "
        "not exact: reused keys and values do not depend on tokens that were committed later.",
        choices=CACHES,
        group="KV cache",
        name="",
    )
    kv_window: int | None = _cache(
        None,
        "For --kv_cache window: compute again the W columns up to the first one that the last step "
        "committed, that one included, and reuse the columns further left. "
        f"Default: {KV_WINDOW} with --kv_cache window.",
        metavar="W",
        name="",
    )
    cache_refresh: int | None = _cache(
        None,
        "With a KV cache: compute all columns on every Nth forward pass of a block, the first "
        "included. 1 gives the same tokens as no cache. Default: on the first pass only.",
        name="refresh",
    )
    max_lookahead: int | None = option(
        None,
        "For left-to-right algorithms: the model sees, and a step commits, at most M positions "
        "from the first open one on. Default: all that are left.",
        low=1,
        whole=True,
        metavar="M",
        group="decoding",
        name="lookahead",
    )
    given: tuple[tuple[str, Any], ...] = ()

    @cached_property
    def options(self) -> dict[str, Any]:
        """The algorithm's own options, defaults included; counts are int, other numbers float."""
        given, own = dict(self.given), ALGORITHMS[self.schedule.algorithm].options
        return {name: o.stored(given.get(name, o.default)) for name, o in own.items()}

    def at_its_temperature(self) -> DecodeConfig:
        """The same, without top_p and top_k if nothing is drawn."""
        return replace(self, top_p=None, top_k=None) if self.temperature == 0 else self

    def problems(self, family: str, end_token_flags: Sequence[str]) -> list[str]:
        """One sentence for each reason why the configuration is not valid for a model family.

        end_token_flags: those of END_TOKEN_FLAGS that the family has.
        """
        name, family_has = self.schedule.algorithm, algorithms_of(family)
        problems = [
            text
            for field_name, declared in options_in(DecodeConfig).items()
            if (text := declared.sentence(field_name, getattr(self, field_name)))
        ]
        if name not in family_has:
            problems.append(
                f"algorithm {name!r} is not defined for {family}; it has: {', '.join(family_has)}"
            )
        if self.alg_temp and not ALGORITHMS[name].draws_order:
            problems.append(
                f"alg_temp {self.alg_temp}: {name} does not draw positions; these do: "
                + ", ".join(a for a in ALGORITHMS if ALGORITHMS[a].draws_order)
            )
        problems += [
            f"{flag}: the {family} family has no such rule; leave it out"
            for flag in END_TOKEN_FLAGS
            if getattr(self, flag) and flag not in end_token_flags
        ]
        if self.cache_refresh is not None and self.kv_cache == "none":
            problems.append(
                f"cache_refresh {self.cache_refresh}: there is no cache to refresh; "
                "give kv_cache prefix or dual"
            )
        return problems + self._sight_problems() + self._own_option_problems()

    def _sight_problems(self) -> list[str]:
        """Problems with how far the algorithm looks to the left and to the right."""
        name, window, ahead = self.schedule.algorithm, self.kv_window, self.max_lookahead
        left_to_right = [a for a in ALGORITHMS if ALGORITHMS[a].left_to_right]
        anywhere = (
            f"{name} may commit anywhere; left-to-right algorithms: {', '.join(left_to_right)}"
        )
        problems = []
        if self.kv_cache == "window" and name not in left_to_right:
            problems.append(f"kv_cache window: {anywhere}")
        if self.kv_cache == "window" and window is None:
            problems.append("kv_cache window needs a kv_window")
        if window is not None and self.kv_cache != "window":
            problems.append(f"kv_window {window} needs kv_cache window, not {self.kv_cache}")
        if ahead is None:
            return problems
        if name not in left_to_right:
            problems.append(f"max_lookahead {ahead}: {anywhere}")
        elif 1 <= ahead < (most := max(self.schedule.quotas)):
            problems.append(
                f"max_lookahead {ahead} is less than the {most} positions that a step commits"
            )
        if self.kv_cache in ("prefix", "dual"):
            problems.append(
                f"max_lookahead {ahead}: kv_cache {self.kv_cache} reuses columns beyond the "
                "lookahead; give none or window"
            )
        return problems

    def _own_option_problems(self) -> list[str]:
        """Problems with the values in `given`."""
        name = self.schedule.algorithm
        problems = []
        for option_name, value in self.given:
            known = ALGORITHMS[name].options.get(option_name)
            if known is None:
                users = ", ".join(algorithm_options().get(option_name, ["none"]))
                text = f"{name} has no such option; these have: {users}"
                problems.append(f"{option_name} {written(value)}: {text}")
            elif text := known.sentence(option_name, value):
                problems.append(text)
        return problems


def name_parts(config: DecodeConfig) -> list[str]:
    """Parts of a file name that tell runs of one algorithm apart: ["threshold0.9", "window16"]."""
    parts = [f"{name}{written(value)}" for name, value in config.options.items()]
    parts += [] if config.kv_cache == "none" else [f"{config.kv_cache}{config.kv_window or ''}"]
    return parts + [f"{name}{value}" for name, value in _named(vars(config))]


def label_parts(config: Mapping[str, Any]) -> list[str]:
    """The parts of `name_parts` in words, for a table: ["threshold 0.9", "window cache of 16"].

    config: a result's `config`. An option that it does not hold has its default.
    """
    parts = [f"{name} {written(value)}" for name, value in (config.get("options") or {}).items()]
    named = dict(_named(config))
    window, refresh = config.get("kv_window"), named.pop("refresh", None)
    if (cache := config.get("kv_cache", "none")) != "none":
        parts.append(
            f"{cache} cache"
            + (f" of {window}" if window else "")
            + (f" refreshed every {refresh}" if refresh else "")
        )
    return parts + [f"{name} {value}" for name, value in named.items()]


def _named(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name in file names, value as text) of each named option that is not at its default."""
    for field_name, declared in options_in(DecodeConfig).items():
        value = config.get(field_name, declared.default)
        if declared.name and value != declared.default:
            yield declared.name, written(value)
