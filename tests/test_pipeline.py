"""Three stages in three threads: order, bounds, and what happens when one of them fails."""

import threading

import pytest

from runtime.pipeline import LONGEST, grouped, pipeline


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_keeps_the_order(count):
    results = []
    pipeline(range(count), lambda n: n * n, results.append)
    assert results == [n * n for n in range(count)]


def test_each_stage_has_its_thread():
    threads = set()

    def items():
        for n in range(5):
            threads.add(("read", threading.current_thread()))
            yield n

    pipeline(
        items(),
        lambda n: threads.add(("work", threading.current_thread())),
        lambda n: threads.add(("write", threading.current_thread())),
    )
    assert len({thread for _, thread in threads}) == len(threads) == 3
    assert ("work", threading.main_thread()) in threads
    assert not [thread for _, thread in threads if thread.is_alive() and thread is not threading.main_thread()]


@pytest.mark.parametrize("depth", [1, 3])
def test_reads_only_so_far_ahead_and_waits_for_the_writer(depth):
    read, worked, written = [], [], []
    slow = threading.Event()

    def items():
        for n in range(20):
            read.append(n)
            yield n

    def work(n):
        assert len(read) <= len(worked) + 1 + depth
        assert len(worked) <= len(written) + depth
        worked.append(n)
        return n

    def write(n):
        slow.wait(0.01)
        written.append(n)

    pipeline(items(), work, write, depth)
    assert read == worked == written == list(range(20))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("stage", ["read", "work", "write"])
def test_an_error_ends_it_and_what_was_worked_on_is_written(stage, error):
    read, written = [], []

    def fail(name, n):
        if name == stage and n == 5:
            raise error(stage)
        return n

    def items():
        for n in range(100):
            read.append(n)
            yield fail("read", n)

    with pytest.raises(error, match=stage):
        pipeline(items(), lambda n: fail("work", n), lambda n: written.append(fail("write", n)))
    assert written[:5] == list(range(5))
    assert len(read) < 15
    if stage != "write":
        assert written == list(range(5))


@pytest.mark.parametrize(
    ("items", "most", "lists"),
    [
        ("", 3, []),
        ("aaaaa", 3, ["aaa", "aa"]),
        ("aabbba", 3, ["aa", "bbb", "a"]),
        ("aba", 1, ["a", "b", "a"]),
        ("--a-aa-b--", 3, ["-", "-", "a-aa", "-", "b--"]),  # what has no size goes along, and never waits for an image
        ("ab-", 3, ["a", "b-"]),
    ],
)
def test_neighbours_of_one_size_are_grouped(items, most, lists):
    sizes = {"a": (8, 8), "b": (8, 16), "-": None}
    assert ["".join(found) for found in grouped(items, sizes.__getitem__, lambda size: most)] == lists


def test_a_group_is_no_longer_than_so_long():
    found = list(grouped("a" + 2 * LONGEST * "-", {"a": (8, 8), "-": None}.__getitem__, lambda size: 8))
    assert len(found[0]) == LONGEST
    assert sum(map(len, found)) == 1 + 2 * LONGEST
