"""Reading, working and writing at the same time.

    pipeline(paths_or_frames, work=restore, consume=save)

The network is the slow part and keeps every core or the GPU busy by itself; what is worth hiding is the reading and
decoding of what comes next and the encoding and writing of what went before. So there is one thread for each of the
two, and the work stays in the calling thread, where ctrl-C arrives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, cast

Item = TypeVar("Item")
Result = TypeVar("Result")

END = object()


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
