"""An option: one value that a user can set, with everything that is known about it. No torch.

Its declaration is the only place that names it: the flag, the help, the range check, the part of a result's file name
and the key of a trace case derive from it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import KW_ONLY, MISSING, dataclass, field, fields
from numbers import Real
from typing import Any

INFINITE = float("inf")
TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class Option:
    """A number, a word or a truth value that a configuration or an algorithm takes.

    default:   the value if none is given. If it is None, None is a valid value and means "not set".
    help:      what it does, for the flag's description.
    low, high: range of a number, both ends included; infinity is never a valid value.
    whole:     the number is a count.
    above:     `low` itself is not a valid value.
    choices:   the valid words, if the value is a word. A table may be given: entries added to it later are valid too.
    words:     words that are valid beside the numbers, e.g. ("auto",).
    type:      makes the value of a text that is neither a number nor one of a few words, e.g. Path or str.
    truth:     the value is true or false; the flag takes it as an optional word and means true without it.
    switch:    the value is true or false; the flag takes no word and turns the value on.
    negated:   the switch turns the value off; its flag is called no_NAME.
    metavar:   the value's name in --help; "" means N for a count and X for a number.
    flags:     the flag's names, if they differ from the field's name, e.g. ("gen_length", "max_new_tokens").
    group:     title of the --help group that lists the flag.
    protocol:  the protocol gives the value if the flag is not given.
    name:      the option's name in a result's file name, e.g. "refresh" for "refresh4"; None if it is not part of it.
    """

    default: Any
    help: str
    low: float = 0.0
    high: float = INFINITE
    whole: bool = False
    _: KW_ONLY
    above: bool = False
    choices: Collection[str] = ()
    words: tuple[str, ...] = ()
    type: Callable[[str], Any] | None = None
    truth: bool = False
    switch: bool = False
    negated: bool = False
    metavar: str = ""
    flags: tuple[str, ...] = ()
    group: str = ""
    protocol: bool = False
    name: str | None = None

    @property
    def numeric(self) -> bool:
        """Whether the value is a number."""
        return not (self.choices or self.truth or self.switch or self.type)

    @property
    def allowed(self) -> str:
        """The valid values in words, to follow "must be"."""
        if self.numeric:
            number = f"a {'whole ' if self.whole else ''}number {self._range('of at least')}"
            return ", or ".join([number, *self.words])
        if self.type:
            return "a text that is not empty"
        return f"one of {', '.join(self.choices)}" if self.choices else "true or false"

    @property
    def placeholder(self) -> str:
        """The value's name in --help."""
        return self.metavar or ("N" if self.whole else "X")

    def problem(self, value: Any) -> str | None:
        """Why `value` is not valid, as a clause that follows the option's name and the value; None if it is valid."""
        if (value is None and self.default is None) or value in self.words or self.type:
            return None
        if not self.numeric:
            valid = value in self.choices if self.choices else isinstance(value, bool)
            return None if valid else f"must be {self.allowed}"
        if isinstance(value, bool) or not isinstance(value, Real):
            return f"must be {self.allowed}"
        whole = "a whole number, " if self.whole and value % 1 else ""
        inside = self.low <= value <= self.high and value < INFINITE
        if inside and not whole and not (self.above and value == self.low):
            return None
        return f"must be {whole}{self._range('at least')}"

    def read(self, text: str) -> Any:
        """The value that `text` stands for. Raises ValueError if there is none or it is not valid."""
        if text in self.words:
            return text
        try:
            if self.type:
                value = self.type(text) if text else None
            elif self.numeric:
                value = int(text) if self.whole else float(text)
            else:
                value = text if self.choices else TRUTH[text]
        except (KeyError, ValueError):
            raise ValueError(f"must be {self.allowed}") from None
        problem = self.problem(value) if text else f"must be {self.allowed}"
        if problem:
            raise ValueError(problem)
        return value

    def stored(self, value: Any) -> Any:
        """A valid value as configurations hold it: a count as int, any other number as float."""
        if value is None or not self.numeric:
            return value
        return int(value) if self.whole else float(value)

    def names(self, field_name: str) -> tuple[str, ...]:
        """The flag's names on the command line, without dashes."""
        return self.flags or (f"no_{field_name}" if self.negated else field_name,)

    def _range(self, at_least: str) -> str:
        low = f"{'above' if self.above else at_least} {written(self.low)}"
        return low if self.high == INFINITE else f"{low} and at most {written(self.high)}"


def written(value: Any) -> str:
    """A value as text, the inverse of `Option.read`: "0.9", "4", "dual", "true"."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def option(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field that declares an Option; `more` are Option's other arguments.

    With the default dataclasses.MISSING the field must be given, and the Option's default is None.
    """
    declared = Option(None if default is MISSING else default, help, **more)
    return field(default=default, metadata={"option": declared})


def options_in(cls: type) -> dict[str, Option]:
    """The options that a dataclass declares, by field name."""
    return {f.name: f.metadata["option"] for f in fields(cls) if "option" in f.metadata}
