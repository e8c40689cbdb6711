from __future__ import annotations

import pytest
import trio

from qedfs.errors import LeafError
from qedfs.image.cache import Table, TableCache
from qedfs.image.tables import as_entries
from tests.model.memory_disk import settled


def table(index: int) -> Table:
    return Table(index, 4096 * (index + 1), as_entries(bytearray(4096)), valid=True, named=True)


class Reader:
    """Reads tables, and counts how often."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.may_end = trio.Event()
        self.may_end.set()
        self.error: Exception | None = None

    async def __call__(self, index: int) -> Table | None:
        self.read.append(index)
        error = self.error
        await self.may_end.wait()
        if error is not None:
            raise error
        return table(index) if index < 100 else None


async def test_a_table_is_read_once_however_many_ask() -> None:
    cache, read = TableCache(4), Reader()
    read.may_end = trio.Event()
    got: list[Table | None] = []

    async def load() -> None:
        got.append(await cache.load(3, read))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(load)
        await settled()
        read.may_end.set()
    assert read.read == [3]
    assert got[0] is got[1] is got[2] is cache.get(3)


async def test_a_failure_or_a_cancellation_of_one_is_not_the_answer_of_another() -> None:
    cache, read = TableCache(4), Reader()
    read.may_end = trio.Event()
    read.error = LeafError("leaf", "provoked")
    scope = trio.CancelScope()
    got: list[Table | None] = []

    async def first() -> None:
        with pytest.raises(LeafError):
            await cache.load(3, read)

    async def cancelled() -> None:
        with scope:
            await cache.load(4, read)

    async def load(index: int) -> None:
        got.append(await cache.load(index, read))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        nursery.start_soon(cancelled)
        await settled()
        nursery.start_soon(load, 3)
        nursery.start_soon(load, 4)
        await settled()
        read.error = None
        scope.cancel()
        read.may_end.set()
    assert sorted(t.index for t in got if t) == [3, 4]


async def test_a_table_that_does_not_exist_is_not_remembered() -> None:
    cache, read = TableCache(4), Reader()
    assert await cache.load(100, read) is None
    assert await cache.load(100, read) is None
    assert read.read == [100, 100]


async def test_the_least_used_is_evicted_and_one_in_use_gets_a_second_chance() -> None:
    cache, read = TableCache(3), Reader()
    for index in (0, 1, 2):
        await cache.load(index, read)
    await cache.load(3, read)  # all were used: a round clears that, the oldest goes
    assert {t.index for t in cache} == {1, 2, 3}
    await cache.load(1, read)
    await cache.load(4, read)
    assert {t.index for t in cache} == {1, 3, 4}


@pytest.mark.parametrize("why", ["pinned", "dirty", "unnamed"])
async def test_what_something_depends_on_stays(why: str) -> None:
    cache, read = TableCache(2), Reader()
    kept = await cache.load(0, read)
    assert kept is not None
    match why:
        case "pinned":
            kept.pins = 1
        case "dirty":
            kept.set(5, 1, 4096, 0)
        case "unnamed":
            kept.named = False
    for index in range(1, 9):
        await cache.load(index, read)
    cache.drop(kept)
    assert cache.get(0) is kept
    assert len(cache) == 2
    kept.pins, kept.named = 0, True
    kept.dirty.clear()
    cache.drop(kept)
    assert cache.get(0) is None


async def test_the_cache_grows_beyond_its_capacity_when_everything_is_pinned() -> None:
    cache, read = TableCache(2), Reader()
    for index in range(5):
        loaded = await cache.load(index, read)
        assert loaded is not None
        loaded.pins = 1
    assert len(cache) == 5


def test_setting_entries_marks_just_their_sectors() -> None:
    t = table(0)
    t.set(62, 3, 8192, 4096)
    assert list(t.entries[61:66]) == [0, 8192, 12288, 16384, 0]
    assert t.dirty == {0, 1}
    t.set(511, 1, 1, 0)
    assert t.dirty == {0, 1, 7}
