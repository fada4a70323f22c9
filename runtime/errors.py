"""What goes wrong, as exceptions with one line for their reader: expected, found, how to mend it.

A function names a parameter of its own in backquotes, as in "`rounds`: expected at least 1, found 0"; a command shows
it as the option that its user typed, --rounds.
"""

from __future__ import annotations

import math


class InputError(Exception):
    """Something the user gave cannot be used.

    Not a ValueError, since tyro would catch one that an option's dataclass raises and draw a box around it.
    """


class MismatchError(InputError):
    """A file is not what the manifest or the signature says, so that nothing of the bundle may be used."""


class GateError(RuntimeError):
    """What was made does not pass its test, through no fault of the user."""


def expect_between(parameter: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise InputError unless low <= value <= high."""
    if not low <= value <= high:
        wanted = f"at least {low}" if high == math.inf else f"{low} to {high}"
        raise InputError(f"`{parameter}`: expected {wanted}, found {value}")


def one_line(message: object) -> str:
    """Text as one line, in which nothing steers a terminal, whatever the names in it are."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(message).split()))
