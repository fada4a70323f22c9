"""Canaries: inputs whose answers are known, by which a machine finds out whether what it runs is still the model.

    check(session, bundle, "model.onnx")         # or CanaryError; the next time on this machine it costs nothing

A compiler that gets a network wrong does not say so: it answers with images that are a little, or entirely, wrong. So a
bundle carries what its model answers in float32 (`export.canaries` makes them), and before a file of it restores its
first image on a machine, it has to give the same. That a file has passed is kept beside the bundle (`Bundle.beside`),
for this file on this device with this driver and this library; a note that somebody else could have written, or of
another machine, does not count.

Each canary is asked `ROUNDS` times, one size after the other and then again, because a replayed CUDA graph is not what
ran the first time.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import time
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from .bundle import Bundle
from .contract import Session
from .errors import CanaryError, InputError
from .files import read_own, writing
from .manifest import Canary
from .pixels import psnr, to_batch, to_image
from .version import __version__

When = Literal["first", "always", "never"]
"""When a file has to answer the canaries: the first time that it is loaded on a machine, every time, or never."""

WHEN: tuple[When, ...] = get_args(When)

ROUNDS = 2


@dataclass(frozen=True)
class Answer:
    """How a session answered a canary.

    Attributes:
        psnr: Least PSNR over RGB between the known answer and this one, in dB, of all rounds; infinite where they are
            equal, and minus infinity for NaN or infinity in it.
        milliseconds: Of the last round.
    """

    canary: Canary
    psnr: float
    milliseconds: float

    @property
    def passed(self) -> bool:
        return self.psnr >= self.canary.floor_db


def ask(session: Session, bundle: Bundle) -> list[Answer]:
    """How a session answers the canaries of a bundle whose sizes it takes. Raises MismatchError for a broken file, and
    what `session.run` does."""
    limits = getattr(session, "limits", ()) or (((1, 1), (math.inf, math.inf)),)
    images = {
        canary: np.frombuffer(bundle.read(canary.file), np.uint8).reshape(2, *canary.size, 3)
        for canary in bundle.manifest.canaries
        if any(low[0] <= canary.height <= high[0] and low[1] <= canary.width <= high[1] for low, high in limits)
    }
    answers = {canary: Answer(canary, math.inf, 0.0) for canary in images}
    for _ in range(ROUNDS):
        for canary, (image, known) in images.items():
            started = time.perf_counter()
            output = session.run(to_batch(image))
            milliseconds = (time.perf_counter() - started) * 1000
            found = psnr(to_image(output), known) if np.isfinite(output).all() else -math.inf
            answers[canary] = Answer(canary, min(found, answers[canary].psnr), milliseconds)
    return list(answers.values())


def check(session: Session, bundle: Bundle, name: str, when: When = "first") -> None:
    """Have the file `name` of a bundle, which `session` runs, answer the canaries, unless it has passed before.

    Raises:
        CanaryError: An answer is further from the known one than rounding explains.
        InputError: `when` is none of `WHEN`.
    """
    if when not in WHEN:
        raise InputError(f"`canary`: expected one of {', '.join(WHEN)}, found {when!r}")
    canaries = bundle.manifest.canaries
    if when == "never" or not canaries:
        return
    key, path = _key(session, bundle, name), bundle.beside(name, "canary")
    passed = _passed(read_own(path))
    if when == "first" and key and key in passed:
        return
    for answer in ask(session, bundle):
        if not answer.passed:
            raise CanaryError(
                f"{bundle.folder / name} is not used, since it answers wrongly here: expected at least "
                f"{answer.canary.floor_db:.1f} dB between its answer to {answer.canary.file} and the model's, found "
                f"{_db(answer.psnr)} ({_where(session)}); build it again, in another precision, or use the provider cpu"
            )
    if key and key not in passed:
        with contextlib.suppress(OSError), writing(path, mode=0o600) as temporary:  # or it is asked again next time
            temporary.write_text(json.dumps([*passed, key], indent=2))


def _key(session: Session, bundle: Bundle, name: str) -> dict[str, Any] | None:
    """What has to be as it was for a file to answer as it did; None where the session does not tell."""
    identity: dict[str, str] | None = getattr(session, "identity", None)
    if not identity or not all(identity.values()):
        return None
    hashes = {file.name: file.sha256 for file in bundle.manifest.files}
    floors = {hashes[canary.file]: canary.floor_db for canary in bundle.manifest.canaries}
    return {
        "sha256": hashes[name],
        "canaries": floors,
        "provider": getattr(session, "provider", ""),
        "host": platform.node(),
        "derainer": __version__,
        **identity,
    }


def _passed(content: bytes) -> list[Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return []
    return found if isinstance(found, list) else []


def _where(session: Session) -> str:
    identity = getattr(session, "identity", {})
    return ", ".join(value for value in (identity.get("device"), identity.get("library")) if value) or "a session"


def _db(psnr: float) -> str:
    return "NaN or infinity in it" if psnr == -math.inf else f"{psnr:.1f} dB"
