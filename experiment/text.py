"""Stop strings: where an answer is cut, and when that can no longer change. Text only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN_TAIL = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """(index, stop string) of the earliest stop string in the text, the longest where two begin there; or None."""
    found = [(text.find(s), -len(s), s) for s in stops]
    at, _, stop = min((f for f in found if f[0] >= 0), default=(-1, 0, None))
    return None if stop is None else (at, stop)


def text_is_final(text: str, stops: Sequence[str]) -> bool:
    """Whether a committed prefix of an answer already decides where the answer is cut.

    A stop string at i is final once the text reaches i + the longest stop string: until then another one that begins
    before i may still be completed. The tail that an unfinished UTF-8 sequence decodes to does not count as reached.
    """
    settled = text.rstrip(BROKEN_TAIL)
    found = first_stop(settled, stops)
    return found is not None and len(settled) >= found[0] + max(map(len, stops))


def stops_of(gen_kwargs: dict[str, Any]) -> tuple[str, ...]:
    """The stop strings of a request; lm-eval gives a list, a single string or nothing."""
    until = gen_kwargs.get("until") or ()
    return tuple(s for s in ((until,) if isinstance(until, str) else until) if s)
