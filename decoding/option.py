"""An option: one value that a user can set, with everything that is known about it.

An option's declaration is the one place that names it. Its flag, help, range check, part of a
result's file name and key in a trace case derive from the declaration. No torch.
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

    default:   the value if none is given. If it is None, None is a valid value: "not set".
    help:      what the option does, for the flag's description.
    low, high: range of a number, both ends included. Infinity is never valid.
    whole:     the number is a count.
    above:     `low` itself is not valid.
    choices:   the valid words, for an option whose value is a word. This may be a table: entries
               that are added to it later are valid too.
    words:     words that are valid in addition to numbers, e.g. ("auto",).
    type:      makes the value of a text that is neither a number nor one of a few words, e.g. Path.
    truth:     the value is true or false. The word may follow the flag; without it the flag means
               true.
    switch:    the value is true or false. The flag takes no word and turns the value on.
    negated:   the switch turns the value off, and its flag is --no_NAME.
    metavar:   the value's name in --help; see `placeholder` for "".
    flags:     the names of the flag, e.g. ("gen_length", "max_new_tokens"). () means the name under
               which the option is declared.
    group:     title of the group in --help that lists the flag.
    protocol:  without the flag, the protocol gives the value.
    name:      the option's name in a result's file name: "refresh" gives "refresh4". None: the file
               name does not show the option. "": it shows the value only.
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
        """The valid values as words that follow "must be"."""
        if self.numeric:
            number = f"a {'whole ' if self.whole else ''}number {self._range('of at least')}"
            return ", or ".join([number, *self.words])
        if self.type:
            return "a text that is not empty"
        return f"one of {', '.join(self.choices)}" if self.choices else "true or false"

    @property
    def placeholder(self) -> str:
        """The value's name in --help: metavar, or N for a count, X for another number and so on."""
        if not self.numeric:
            return self.metavar or ("NAME" if self.choices else "true|false")
        return self.metavar or ("N" if self.whole else "X")

    @property
    def description(self) -> str:
        """The help, with the words and the default unless the help itself gives them."""
        parts = [self.help]
        if not all(word in self.help for word in self.choices):
            parts.append(f"One of {', '.join(self.choices)}.")
        if self.protocol:
            parts.append("Default: the protocol's.")
        elif not (self.default is None or self.switch):
            parts.append(f"Default: {written(self.default)}.")
        return " ".join(parts)

    def problem(self, value: Any) -> str | None:
        """Why `value` is not valid, e.g. "must be at least 1"; None if it is valid."""
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

    def sentence(self, name: str, value: Any) -> str | None:
        """`problem` as a sentence about option `name`: "top_k 0 must be at least 1"."""
        problem = self.problem(value)
        shown = repr(value) if isinstance(value, str) else written(value)
        return problem and f"{name} {shown} {problem}"

    def read(self, text: str) -> Any:
        """The value that `text` stands for. Raises ValueError if it is not a valid value."""
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
        """A valid value as configurations hold it: a count as int, another number as float."""
        if value is None or not self.numeric:
            return value
        return int(value) if self.whole else float(value)

    def names(self, field_name: str) -> tuple[str, ...]:
        """Names of the flag on the command line, without dashes."""
        return self.flags or (f"no_{field_name}" if self.negated else field_name,)

    def _range(self, at_least: str) -> str:
        low = f"{'above' if self.above else at_least} {written(self.low)}"
        return low if self.high == INFINITE else f"{low} and at most {written(self.high)}"


def written(value: Any) -> str:
    """A value as text, e.g. "0.9", "4", "dual" or "true". `Option.read` is the inverse."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def option(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field that declares an Option. `more` are the other arguments of Option.

    With the default dataclasses.MISSING the field is required and the Option's default is None.
    """
    declared = Option(None if default is MISSING else default, help, **more)
    return field(default=default, metadata={"option": declared})


def options_in(cls: type) -> dict[str, Option]:
    """Field name -> Option, for the fields of a dataclass that declare one."""
    return {f.name: f.metadata["option"] for f in fields(cls) if "option" in f.metadata}
