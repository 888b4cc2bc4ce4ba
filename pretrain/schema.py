"""The one check for everything from outside: options, training states, manifests, configs.

A form says what a value must be: a `Rule`, {key: form} for an object (a missing key counts as
None), or [form] for an array whose items all have that form.
"""

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import starmap
from typing import Any, TypeAlias

Form: TypeAlias = "Rule | dict[str, Form] | list[Form]"
SHOWN_CHARACTERS = 60  # of a value in a message
AUTO = "auto"  # the value of an option that the program chooses


@dataclass(frozen=True)
class Rule:
    """What one value must be; `expected` completes the sentence "expected ..."."""

    holds: Callable[[Any], bool]
    expected: str
    choices: tuple = ()  # all valid values, if there are few
    metavar: str | None = None  # what --help calls the value
    nargs: int | str | None = None  # values on a command line, as argparse counts them


def optional(rule: Rule) -> Rule:
    """`rule`, or None."""
    return Rule(lambda value: value is None or rule.holds(value), rule.expected)


def either(word: str, rule: Rule) -> Rule:
    """The value `word`, or one that fits `rule`."""
    return Rule(lambda value: value == word or rule.holds(value), f"{rule.expected}, or {word}")


def each(rule: Rule, nargs: int | str = "+") -> Rule:
    """A sequence whose items all fit `rule`."""
    return Rule(lambda values: all(map(rule.holds, values)), rule.expected, (), rule.metavar, nargs)


def integer(low: int = 0, high: int = 2**53) -> Rule:
    """A whole number within low..high."""
    expected = f"a whole number from {low:,} to {high:,}"
    return Rule(lambda value: type(value) is int and low <= value <= high, expected)


def number(low: float = 0.0, high: float = math.inf, above: bool = False) -> Rule:
    """A finite number within low..high; with `above`, `low` itself is excluded."""

    def holds(value: Any) -> bool:
        # Not math.isfinite, which raises an error for integers too large for a float.
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            return False
        return (value > low if above else value >= low) and value <= high

    least = f"above {low:g}" if above else f"of at least {low:g}"
    if high == math.inf:
        return Rule(holds, f"a finite number {least}")
    return Rule(holds, f"a number {least} and at most {high:,}")


def one_of(*values: object) -> Rule:
    """One of `values`."""
    return Rule(lambda value: value in values, f"one of {', '.join(map(str, values))}", values)


def pattern(regex: str, expected: str, metavar: str | None = None) -> Rule:
    """Text that matches `regex` in full."""
    compiled = re.compile(regex, re.DOTALL)
    return Rule(
        lambda value: type(value) is str and compiled.fullmatch(value) is not None,
        expected,
        metavar=metavar,
    )


TEXT = Rule(lambda value: type(value) is str, "text")
FLAG = Rule(lambda value: type(value) is bool, "true or false")
FLOAT = Rule(lambda value: type(value) is float, "a floating-point number")
FILE_NAME = pattern(r"(?a:\w[\w.-]{0,99})", "a plain file name")


def values_of(rule: Rule, expected: str) -> Rule:
    """An object with any keys, whose values all fit `rule`."""
    return Rule(
        lambda value: type(value) is dict and all(map(rule.holds, value.values())), expected
    )


def misfit(value: object, form: Form, place: str = "") -> str | None:
    """Where `value` does not fit `form`, and what was expected there; None if it fits."""
    if isinstance(form, Rule):
        if form.holds(value):
            return None
        shown = "missing" if value is None else str(value)[:SHOWN_CHARACTERS]
        shown = shown if isinstance(value, (str, int, float, type(None))) else type(value).__name__
        return f"{place} is {shown}; expected {form.expected}"
    if isinstance(form, list) and isinstance(value, list):
        parts = ((item, form[0], f"{place}[{index}]") for index, item in enumerate(value))
    elif isinstance(form, dict) and isinstance(value, dict):
        start = f"{place}." if place else ""
        parts = ((value.get(key), inner, f"{start}{key}") for key, inner in form.items())
    else:
        expected = "an array" if isinstance(form, list) else "an object"
        shown = "missing" if value is None else type(value).__name__
        return f"{place or 'the content'} is {shown}; expected {expected}"
    return next(filter(None, starmap(misfit, parts)), None)


def option(
    default: object,
    text: str,
    form: Rule | None = None,
    *,
    may_change: bool = False,
    required: bool = False,
    excludes: str = "",
    takes_auto: bool = False,
    **argparse_arguments: object,
) -> Any:  # a Field, but the class declares the type of its value
    """A dataclass field that is also a command-line option, with `text` as its help.

    `form` is for values other than the default. `may_change`: on resume. `excludes`: an option that
    cannot be combined with it. `takes_auto`: the word auto stands for the default, (). The rest
    goes to argparse; `positional` means no flag."""
    arguments: dict[str, object] = {"nargs": "+"} if isinstance(default, tuple) else {}
    if form and form.choices:  # only shown: `validate` reports all wrong values at once
        arguments["metavar"] = f"{{{','.join(map(str, form.choices))}}}"
    for name in ("metavar", "nargs"):
        if getattr(form, name, None):
            arguments[name] = getattr(form, name)
    metadata = {
        "help": text,
        "form": form,
        "may_change": may_change,
        "required": required,
        "excludes": excludes,
        "takes_auto": takes_auto,
        "argparse": arguments | argparse_arguments,
    }
    return field(default=default, metadata=metadata)


changeable = partial(option, may_change=True)  # on resume


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return f"--{name.replace('_', '-')}"
