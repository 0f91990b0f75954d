"""How one sample is decoded: DecodeConfig, its checks, and its parts of file names and labels. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from decoding.algorithms import ALGORITHMS, algorithm_options, algorithms_of
from decoding.kv_cache import CACHES
from decoding.option import option, options_in, written
from decoding.schedule import Schedule

CONFIDENCE_DTYPES = ("float64", "float32", "model")
# options that exist for some families only; the family's `end_token_flags` lists those that it has
END_TOKEN_FLAGS = ("logits_eos_inf", "confidence_eos_eot_inf")


@dataclass(frozen=True)
class DecodeConfig:
    """How one sample is decoded: everything that can change a token, except model, prompt and seed.

    Each field declares its Option. `given` holds the values of the algorithm's own options that were given, as
    (name, value) pairs.
    """

    schedule: Schedule
    temperature: float = option(
        0.0,
        "0 takes the likeliest token at every position. Above 0 tokens are drawn, from a generator seeded per sample.",
        metavar="T",
        group="sampling",
        protocol=True,
    )
    top_p: float | None = option(
        None,
        "Draw only from the likeliest tokens that together have probability P. It has no effect at temperature 0; the "
        "run then says so.",
        above=True,
        high=1.0,
        metavar="P",
        group="sampling",
        protocol=True,
    )
    top_k: int | None = option(
        None,
        "Draw only from the N likeliest tokens. It has no effect at temperature 0; the run then says so.",
        low=1,
        whole=True,
        group="sampling",
        protocol=True,
    )
    alg_temp: float | None = option(
        None,
        "Dream's algorithms: above 0 the positions to commit are drawn by softmax(score / T); at 0 the best ones are "
        "taken.",
        metavar="T",
        group="sampling",
        protocol=True,
    )
    confidence_dtype: str = option(
        "float64",
        "Precision in which probabilities and scores are computed. 'model' is the precision of the logits; in bfloat16 "
        "most confident positions then tie.",
        choices=CONFIDENCE_DTYPES,
        metavar="NAME",
        group="sampling",
    )
    logits_eos_inf: bool = option(
        False,
        "LLaDA: never propose the end-of-text token. The end-of-turn token can still be proposed. Without a value it "
        "means true.",
        truth=True,
        metavar="true|false",
        group="sampling",
        protocol=True,
    )
    confidence_eos_eot_inf: bool = option(
        False,
        "LLaDA: give end tokens no confidence, so that they are committed last. Without a value it means true.",
        truth=True,
        metavar="true|false",
        group="sampling",
        protocol=True,
    )
    early_exit: bool = option(
        True,
        "Decode every canvas to its end, even after the answer can no longer change. Answers stay the same; the result "
        "reports how many forward passes early exit saved.",
        switch=True,
        negated=True,
        group="decoding",
    )
    kv_cache: str = option(
        "none",
        "Reuse keys and values of earlier forward passes: 'prefix' those to the left of the block, 'dual' those to its "
        "right too, 'window' those further left than --kv_window. Faster but not exact: reused values do not see tokens "
        "committed since.",
        choices=CACHES,
        metavar="NAME",
        group="KV cache",
        name="",
    )
    kv_window: int | None = option(
        None,
        "With --kv_cache window: recompute the last W committed columns before the first one that the last step "
        "committed, that one included, and reuse all columns further left.",
        low=1,
        whole=True,
        metavar="W",
        group="KV cache",
        name="",
    )
    cache_refresh: int | None = option(
        None,
        "With a KV cache: compute all columns on every Nth forward pass of a block, starting with the first. 1 gives the "
        "tokens of no cache. If not given, only the first pass of a block computes all columns.",
        low=1,
        whole=True,
        group="KV cache",
        name="refresh",
    )
    max_lookahead: int | None = option(
        None,
        "Left-to-right algorithms: the model sees at most M positions from the first open one on, and a step commits "
        "only among these. If not given, it sees all that are left.",
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
        """One sentence for each value that is out of range or does not fit the family, the algorithm or another value.

        end_token_flags: the names among END_TOKEN_FLAGS that the family has.
        """
        name = self.schedule.algorithm
        algorithm = ALGORITHMS[name]
        checks = [
            (
                family not in algorithm.families,
                f"algorithm {name!r} is not defined for {family}; it has: "
                + ", ".join(algorithms_of(family)),
            ),
            (
                bool(self.alg_temp) and not algorithm.draws_order,
                f"alg_temp {self.alg_temp}: {name} has no drawn order; these have: "
                + ", ".join(a for a in ALGORITHMS if ALGORITHMS[a].draws_order),
            ),
            (
                self.cache_refresh is not None and self.kv_cache == "none",
                f"cache_refresh {self.cache_refresh}: there is no cache to refresh; "
                "give kv_cache prefix or dual",
            ),
        ]
        checks += [
            (
                getattr(self, flag) and flag not in end_token_flags,
                f"{flag}: the {family} family has no such rule; leave it out",
            )
            for flag in END_TOKEN_FLAGS
        ]
        out_of_range = [
            f"{name} {repr(value) if isinstance(value, str) else written(value)} {problem}"
            for name, declared in options_in(DecodeConfig).items()
            if (problem := declared.problem(value := getattr(self, name)))
        ]
        return (
            out_of_range
            + [text for wrong, text in checks if wrong]
            + self._sight_problems()
            + self._option_problems()
        )

    def _sight_problems(self) -> list[str]:
        """Problems with how far the algorithm looks to the left and to the right."""
        name, window, ahead = self.schedule.algorithm, self.kv_window, self.max_lookahead
        only = "left to right go " + ", ".join(a for a in ALGORITHMS if ALGORITHMS[a].left_to_right)
        anywhere, cached = not ALGORITHMS[name].left_to_right, self.kv_cache == "window"
        most = max(self.schedule.quotas)
        checks = [
            (cached and anywhere, f"kv_cache window: {name} may commit anywhere; {only}"),
            (cached and window is None, "kv_cache window needs a kv_window"),
            (
                window is not None and not cached,
                f"kv_window {window} is of kv_cache window, not of {self.kv_cache}",
            ),
            (
                ahead is not None and anywhere,
                f"max_lookahead {ahead}: {name} may commit anywhere; {only}",
            ),
            (
                ahead is not None and self.kv_cache in ("prefix", "dual"),
                f"max_lookahead {ahead}: kv_cache {self.kv_cache} keeps what lies ahead; "
                "take none or window",
            ),
            (
                ahead is not None and 1 <= ahead < most and not anywhere,
                f"max_lookahead {ahead} is less than the {most} positions that a step commits",
            ),
        ]
        return [text for wrong, text in checks if wrong]

    def _option_problems(self) -> list[str]:
        name = self.schedule.algorithm
        problems = []
        for option_name, value in self.given:
            known = ALGORITHMS[name].options.get(option_name)
            if known is None:
                users = ", ".join(algorithm_options().get(option_name, ["none"]))
                problems.append(
                    f"{option_name} {written(value)}: {name} has no such option; these have: {users}"
                )
            elif problem := known.problem(value):
                problems.append(f"{option_name} {written(value)} {problem}")
        return problems


def name_parts(config: DecodeConfig) -> list[str]:
    """What tells two runs of one algorithm apart in a file name: ["threshold0.9", "window16", "refresh4"]."""
    parts = [f"{name}{written(value)}" for name, value in config.options.items()]
    parts += [] if config.kv_cache == "none" else [f"{config.kv_cache}{config.kv_window or ''}"]
    return parts + [f"{name}{value}" for name, value in _named(vars(config))]


def label_parts(config: Mapping[str, Any]) -> list[str]:
    """The same in words, for a table: ["threshold 0.9", "window cache of 16 refreshed every 4"].

    config: a result's `config`; options that are not in it have their default.
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
    """(name in file names, value) of the options that have such a name and another value than their default."""
    for field_name, declared in options_in(DecodeConfig).items():
        value = config.get(field_name, declared.default)
        if declared.name and value != declared.default:
            yield declared.name, written(value)
