"""One knob in one place: its flag, its help, its range, its default and its part of a file name.

A field of a config dataclass carries its Option as metadata; an algorithm lists its own in `Algorithm.options`. Flags,
checks, overrides, result names and report labels are derived from them. No torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Option:
    """A knob.

    default:   its value where none is given.
    help:      what it does, for --help.
    low, high: range of a number, both ends included. above: `low` itself is excluded.
    whole:     the number is a count.
    choices:   the words allowed; then it is no number. words: words allowed beside the numbers.
    switch:    a flag without a value. negated: the flag is --no_NAME and turns it off.
    truth:     true or false; the flag alone means true.
    metavar:   of the flag's value, in --help.
    flags:     the names of the flag where they are not the field's.
    group:     title in --help.
    protocol:  where the flag is not given, the protocol decides.
    name:      what stands before the value in a result's file name and in a report's label; None: in neither.
    """

    default: Any
    help: str
    low: float = 0.0
    high: float = math.inf
    whole: bool = False
    above: bool = False
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    switch: bool = False
    negated: bool = False
    truth: bool = False
    metavar: str = ""
    flags: tuple[str, ...] = ()
    group: str = ""
    protocol: bool = False
    name: str | None = None

    @property
    def is_number(self) -> bool:
        """Whether the value is a number: by its range and default, where nothing else is named."""
        return not (self.choices or self.switch or self.truth or self.metavar)

    @property
    def value_name(self) -> str:
        """What stands for the value in --help."""
        if self.metavar or self.truth:
            return self.metavar or "true|false"
        if self.choices:
            return "NAME"
        return "N" if self.whole else "X"

    @property
    def allowed(self) -> str:
        """The allowed values in words, after "must be"."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.truth:
            return "true or false"
        if not self.is_number:
            return "a path"
        text = f"{'a whole' if self.whole else 'a'} number "
        text += f"{'above' if self.above else 'of at least'} {self.low:g}"
        text += "" if self.high == math.inf else f" and at most {self.high:g}"
        return ", or ".join([text, *self.words])

    def problem(self, value: Any) -> str | None:
        """Why `value` cannot be, or None."""
        if value is None or value in self.words:
            return None
        if self.choices:
            right = value in self.choices
        elif self.is_number:
            right = self.low <= value <= self.high and value < math.inf
            right = right and not (self.above and value == self.low)
            right = right and not (self.whole and value % 1)
        else:
            right = True
        return None if right else f"must be {self.allowed}"

    def read(self, text: str) -> Any:
        """The value that a flag's text means. Raises ValueError for what is not allowed."""
        if self.truth:
            return {"true": True, "false": False}[text]
        if text in self.words:
            return text
        value: Any = text
        if self.is_number:
            value = int(text) if self.whole else float(text)
        elif isinstance(self.default, Path) or self.metavar in ("DIR", "FILE.jsonl"):
            if not text:
                raise ValueError
            value = Path(text)
        if self.problem(value):
            raise ValueError
        return value


def option(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field with its Option."""
    return dataclasses.field(default=default, metadata={"option": Option(default, help, **more)})


@lru_cache
def options_in(cls: type) -> dict[str, Option]:
    """Field name -> Option, for each field of a dataclass that has one."""
    found = {f.name: f.metadata.get("option") for f in dataclasses.fields(cls)}
    return {name: known for name, known in found.items() if known is not None}
