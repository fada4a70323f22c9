"""How long work says how far it is, whoever wants to know: a command draws bars of it, a program may do as it likes.

for image in track(images, len(images), "Restoring", on_progress):
    ...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class OnProgress(Protocol):
    """Is told what is being done, how many of its steps are done, and of how many (0: nobody knows). `remark`: what
    else there is to say, such as the loss of a training. Called at the beginning, after each step and from the thread
    that works."""

    def __call__(self, stage: str, done: int, total: int, remark: str = "") -> None: ...


def silent(stage: str, done: int, total: int, remark: str = "") -> None:
    """For nobody."""


def track(items: Iterable[Item], total: int, stage: str, on_progress: OnProgress) -> Iterator[Item]:
    """The items, each of which counts as done when the next one is asked for."""
    on_progress(stage, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        on_progress(stage, done, total)
