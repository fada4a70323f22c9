"""What goes wrong, as exceptions with one line for their reader: expected, found, how to mend it.

    DerainError
        InputError              what the user gave: an option, a file, a folder
            InvalidImage        an image or a video
            InvalidModel        a model or a bundle
                MismatchError   a file is not what its manifest or signature says
                UnprovenError   it was not judged against the full model, and that was demanded
        DeviceError             where the network runs: no such device, driver or library, or it failed
            OutOfMemory
            CanaryError         it answers with something else than the model does
        GateError               what was made does not pass its test

A function names a parameter of its own in backquotes, as in "`rounds`: expected at least 1, found 0"; a command shows
it as the option that its user typed, --rounds.
"""

from __future__ import annotations

import math
import re


class DerainError(Exception):
    """Everything that this package and the commands raise on purpose.

    Not a ValueError, since tyro would catch one that an option's dataclass raises and draw a box around it.
    """


class InputError(DerainError):
    """Something the user gave cannot be used."""


class InvalidImage(InputError):
    """An image, or a video, cannot be used: another one may."""


class InvalidModel(InputError):
    """A model or a bundle cannot be used, or answers with what is no image."""


class MismatchError(InvalidModel):
    """A file is not what the manifest or the signature says, so that nothing of the bundle may be used."""


class UnprovenError(InvalidModel):
    """What would run was not judged against the full model, where only what was may run."""


class DeviceError(DerainError):
    """The device, its driver or its library is missing, or fails."""


class OutOfMemory(DeviceError):
    """Memory does not suffice, of the machine or of its GPU: a smaller image, or smaller tiles, may fit."""


class CanaryError(DeviceError):
    """A file of the bundle answers here with something else than the model does, so nothing it restores is right."""


class GateError(DerainError):
    """What was made does not pass its test, through no fault of the user."""


def expect_between(parameter: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise InputError unless low <= value <= high."""
    if not low <= value <= high:
        wanted = f"at least {low}" if high == math.inf else f"{low} to {high}"
        raise InputError(f"`{parameter}`: expected {wanted}, found {value}")


def expect_finite(parameter: str, value: float) -> None:
    """Raise InputError for NaN and infinity."""
    if not math.isfinite(value):
        raise InputError(f"`{parameter}`: expected a finite number, found {value}")


def device_error(message: str, reason: object) -> DeviceError:
    """A DeviceError that tells `reason` after the message, or an OutOfMemory where it is that."""
    memory = re.search(r"alloc|out[ _]?of[ _]?memory", str(reason), re.IGNORECASE)
    mend = "; use smaller images or tiles, or free memory" if memory else ""
    return (OutOfMemory if memory else DeviceError)(f"{message}: {one_line(reason)}{mend}")


def one_line(message: object) -> str:
    """Text as one line, in which nothing steers a terminal, whatever the names in it are."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(message).split()))
