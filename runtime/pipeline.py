"""Reading, working and writing at the same time.

    pipeline(paths_or_frames, work=restore, consume=save)
    pipeline(grouped(frames, size_of, most), work=restore_batch, consume=save_all)

The network is the slow part and keeps every core or the GPU busy by itself; what is worth hiding is the reading and
decoding of what comes next and the encoding and writing of what went before. So there is one thread for each of the
two, and the work stays in the calling thread, where ctrl-C arrives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, cast

from .pixels import Size

Item = TypeVar("Item")
Result = TypeVar("Result")

END = object()

LONGEST = 128
"""Items of a group, those without a size included, so that a video whose sound goes on does not gather all of that."""


def grouped(
    items: Iterable[Item], size_of: Callable[[Item], Size | None], most: Callable[[Size], int]
) -> Iterator[list[Item]]:
    """Lists of neighbours, in their order, that can be restored together.

    Args:
        items: Anything, some of which are images.
        size_of: Height and width of one; None for what is no image, and travels with the images around it.
        most: How many images of a size a list may have.
    """
    group: list[Item] = []
    images, current = 0, None
    for item in items:
        size = size_of(item)
        if size is not None and current not in (None, size):
            yield group
            group, images, current = [], 0, None
        group.append(item)
        if size is not None:
            images, current = images + 1, size
        if current is None or images >= most(current) or len(group) == LONGEST:
            yield group
            group, images, current = [], 0, None
    if group:
        yield group


def pipeline(
    items: Iterable[Item], work: Callable[[Item], Result], consume: Callable[[Result], object], depth: int = 2
) -> None:
    """Call `consume(work(item))` for every item, in their order; at most `depth` items are read ahead and `depth`
    results wait to be consumed, which bounds the memory.

    `items` is iterated in a thread of its own and `consume` runs in another. Whatever is raised, by the three or by
    ctrl-C, ends it: nothing more is read, what was worked on is still consumed, and then it is raised here.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        ahead: deque[Future[object]] = deque(reader.submit(next, iterator, END) for _ in range(depth))
        behind: deque[Future[object]] = deque()
        try:
            while (item := ahead.popleft().result()) is not END:
                ahead.append(reader.submit(next, iterator, END))
                result = work(cast("Item", item))
                if len(behind) == depth:
                    behind.popleft().result()
                behind.append(writer.submit(consume, result))
        finally:
            for future in ahead:
                future.cancel()
            for future in behind:
                future.result()
