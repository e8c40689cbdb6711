"""What is done to a leaf before the power is cut: one function a workload, small enough to be gone through completely."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import trio

from qedfs.config import Mode
from qedfs.errors import LeafError, LeafFull
from qedfs.image import rebase, record
from qedfs.image.check import check_image
from qedfs.image.create import create_image
from qedfs.image.geometry import Geometry
from qedfs.image.header import Feature
from qedfs.image.record import Pin, Record
from qedfs.image.tables import ZERO
from tests.image.memory_storage import MemoryStorage
from tests.model.cuts import State
from tests.model.history import SECTOR, History
from tests.model.memory_disk import empty_image, memory_disk, pattern, settled
from tests.model.recording_storage import RecordingStorage
from tests.model.reference import judge
from tests.powercut.exploring import Scenario

G = Geometry(4096, 2)
"""1024 entries a table: 4 MiB of disk. (Tables of one cluster are valid, but QEMU does not open them.)"""
C = G.cluster_size
PER = C // SECTOR
FIRST_TABLE = 3 * C
"""Where the first L2 table of an empty image comes to lie: behind the header and L1."""
SIZE = 12 * C
TABLE = G.span
"""Bytes of disk that one table is for."""


def thin(seed: int, clusters: int = 1) -> bytes:
    """Return clusters with bytes other than zero in two of their eight sectors: so that all states can be gone through."""
    return b"".join(
        pattern(SECTOR, seed * 16 + i) + bytes(3 * SECTOR) + pattern(SECTOR, seed * 16 + i + 8) + bytes(3 * SECTOR)
        for i in range(clusters)
    )


BASE = thin(77, 10)
LONG_NAME = "a-name-that-is-longer.raw"


def by_history(history: History, base: bytes) -> Callable[[State], bool]:
    def allowed(state: State) -> bool:
        content = judge(state.content, base).content
        history.check(state.first, content)
        if state.last > state.first:
            history.check(state.last, content)
        return True

    return allowed


@asynccontextmanager
async def life(
    storage: RecordingStorage, base: bytes = BASE, *, mode: Mode = Mode.COW, close: bool = True
) -> AsyncIterator[History]:
    async with memory_disk(storage, base, mode=mode, close=close) as rig:
        yield History(rig, judge(storage.content, base).content)


async def leaf(size: int = SIZE, *, leaks: int = 0) -> RecordingStorage:
    """Return a new image, with `leaks` clusters at its end that nothing names and that are full of something."""
    content = (await empty_image(size, geometry=G)).content
    return RecordingStorage(content + pattern(leaks * C, 55))


Work = Callable[[History], Awaitable[None]]


async def _disk(
    name: str, work: Work, *, size: int = SIZE, base: bytes = BASE, leaks: int = 0, mode: Mode = Mode.COW
) -> Scenario:
    storage = await leaf(size, leaks=leaks)
    async with life(storage, base, mode=mode) as history:
        await work(history)
    return Scenario(name, storage.before, storage.log, base, by_history(history, base))


async def _allocating(h: History) -> None:
    await h.write(0, thin(1))
    await h.write(5 * PER + 3, pattern(SECTOR, 2))
    await h.flush()
    await h.write(7 * PER, thin(3))
    await h.flush()


async def _overwrites(h: History) -> None:
    await h.write(0, thin(1, 2))
    await h.flush()
    await h.write(0, thin(2))
    await h.write(PER, thin(3))
    await h.flush()
    await h.write(1, pattern(SECTOR, 4))


async def _copies(h: History) -> None:
    await h.rig.disk.read(0, 2 * C)
    await h.rig.image.commit(durable=False)
    await h.rig.disk.read(5 * C, C)
    await h.write(5 * PER, pattern(SECTOR, 1))
    await h.flush()
    await h.rig.disk.read(8 * C, 2 * C)


async def _new_tables(h: History) -> None:
    await h.write(2 * TABLE // SECTOR, thin(1))
    await h.flush()
    await h.write(0, thin(2))
    await h.write(TABLE // SECTOR, thin(3))
    await h.flush()


async def _zeros(h: History) -> None:
    await h.write(0, thin(1, 2))
    await h.flush()
    await h.write(PER, bytes(3 * C))
    await h.write(6 * PER, bytes(2 * C))
    await h.flush()
    await h.write(PER, thin(4))


async def _growth(h: History) -> None:
    await h.write(0, thin(1))
    await h.grow(9 * C)
    await h.write(8 * PER, thin(2))
    await h.flush()
    await h.grow(14 * C)


async def _modes(h: History) -> None:
    await h.write(0, thin(1))
    await h.rig.disk.set_mode(Mode.COR)
    await h.rig.disk.read(2 * C, C)
    await h.rig.disk.set_mode(Mode.COW)
    await h.flush()
    await h.rig.disk.set_mode(Mode.COR)


async def _synchronous(h: History) -> None:
    # O_SYNC, O_DSYNC and RWF_DSYNC, buffered and with O_DIRECT: each comes as a write and a flush. Buffered writes come
    # in whole pages, those with O_DIRECT as they are.
    for number in range(3):
        await h.synchronous(number * PER, thin(number + 1))
    for number in range(3):
        await h.synchronous((4 + number) * PER + 1, pattern(SECTOR, 50 + number))


async def _shared_commit(h: History) -> None:
    await h.write(0, thin(1))
    storage = h.rig.storage
    # The second flush comes when the first has passed its flush of data and writes its entries.
    gate = storage.hold("write", lambda offset: offset >= FIRST_TABLE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(h.flush)
        await gate.arrived()
        storage._gates.clear()  # who stands at the gate stays there; others pass
        await h.write(PER, thin(2))
        nursery.start_soon(h.flush)
        await settled()
        gate.release()


async def _failed_commit(h: History) -> None:
    await h.write(0, thin(1))
    await h.flush()
    await h.write(PER, thin(2))
    storage = h.rig.storage
    storage.fail("write", LeafFull("leaf.qed", "provoked"), lambda offset: FIRST_TABLE <= offset < FIRST_TABLE + 2 * C)
    try:
        await h.rig.image.commit(durable=True)
    except LeafError:
        storage.heal()
    await h.flush()


async def _evictions(h: History) -> None:
    """A commit waits while tables are looked at that push others out of memory."""
    for index in range(3):
        await h.write(index * TABLE // SECTOR, thin(index + 1))
    await h.flush()
    image = h.rig.image
    image.tables._capacity = 1
    for table in image.tables:
        image.tables.drop(table)
    await h.write(PER, thin(5))
    gate = h.rig.storage.hold("flush")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(h.flush)
        await gate.arrived()
        for index in (1, 2, 1, 2):
            await h.rig.disk.read(index * TABLE, C)
        await h.write(2 * PER, thin(6))
        gate.release()
    await h.flush()


async def _completion(h: History) -> None:
    await h.write(PER // 2, thin(3))
    pos = 0
    while count := await h.rig.disk.stream(pos):
        pos += count
    assert await h.rig.disk.complete()


DISKS: dict[str, Callable[[], Awaitable[Scenario]]] = {
    "allocating writes": partial(_disk, "allocating writes", _allocating),
    "overwrites": partial(_disk, "overwrites", _overwrites),
    "copy-on-read": partial(_disk, "copy-on-read", _copies, mode=Mode.COR),
    "new L2 tables": partial(_disk, "new L2 tables", _new_tables, size=2 * TABLE + 2 * C),
    "zero entries": partial(_disk, "zero entries", _zeros),
    "growth": partial(_disk, "growth", _growth, size=6 * C + SECTOR, base=thin(66, 16)),
    "backing link removal": partial(_disk, "backing link removal", _completion, size=4 * C, mode=Mode.COR),
    "mode and record": partial(_disk, "mode and record", _modes),
    "synchronous writes": partial(_disk, "synchronous writes", _synchronous),
    "reuse of leaked space": partial(_disk, "reuse of leaked space", _new_tables, size=2 * TABLE + 2 * C, leaks=7),
    "two flushes at once": partial(_disk, "two flushes at once", _shared_commit),
    "failed commit": partial(_disk, "failed commit", _failed_commit),
    "eviction during a commit": partial(_disk, "eviction during a commit", _evictions, size=2 * TABLE + 4 * C),
}


async def _zeroed_by_another() -> tuple[RecordingStorage, History]:
    """Return a leaf after another writer of QED was killed: it made clusters 0 and 2 zero entries, and never flushed that.

    (A process of qedfs never takes an entry back; QEMU's `write -z` does.) What the entries named is free in the page
    cache and still named on the disk.
    """
    storage = await leaf()
    async with life(storage) as history:
        await history.write(0, thin(1, 3))
        await history.flush()
    storage.before = bytes(storage.content)
    storage.log.clear()
    history.old, history.flushes = judge(storage.before, BASE).content, []
    kept = storage.before[FIRST_TABLE + 8 : FIRST_TABLE + 16]
    zero = ZERO.to_bytes(8, "little")
    await storage.write(FIRST_TABLE, zero + kept + zero)
    history.acknowledged = {}
    history.versions = {sector: [(0, bytes(SECTOR))] for sector in (*range(PER), *range(2 * PER, 3 * PER))}
    return storage, history


async def killed() -> Scenario:
    """A writer is killed, what it wrote is in the page cache; the next one reuses what that freed; the power is cut."""
    storage, first = await _zeroed_by_another()
    async with life(storage) as second:
        second.versions, second.old = first.versions, first.old
        await second.write(8 * PER, thin(4))
        await second.flush()
    return Scenario("killed, then reused", storage.before, storage.log, BASE, by_history(second, BASE))


async def killed_and_repaired() -> Scenario:
    """A writer is killed, `check --repair` reclaims what it freed, the power is cut."""
    storage, first = await _zeroed_by_another()
    await check_image(storage, repair=True)
    return Scenario("killed, then repaired", storage.before, storage.log, BASE, by_history(first, BASE))


ENTRY_3 = FIRST_TABLE + 3 * 8


async def _damaged() -> MemoryStorage:
    """Return an image with NEED_CHECK and an entry of cluster 3 that names a cluster past the end of the file."""
    storage = await leaf()
    async with life(storage) as history:
        await history.write(0, thin(1))
        await history.flush()
    storage.content[ENTRY_3 : ENTRY_3 + 8] = len(storage.content).to_bytes(8, "little")
    storage.content[16] |= Feature.NEED_CHECK.value
    return storage


async def _mended(name: str, mend: Callable[[RecordingStorage], Awaitable[History | None]]) -> Scenario:
    """A repair: an entry that is still there after a cut names nothing, and NEED_CHECK is set."""
    storage = RecordingStorage((await _damaged()).content)
    whole = thin(1) + BASE[C:].ljust(SIZE - C, b"\0")
    history = await mend(storage)

    def allowed(state: State) -> bool:
        try:
            content = judge(state.content, BASE).content
        except AssertionError:
            assert state.content[16] & Feature.NEED_CHECK.value, "an entry that names nothing, and no mark"
            length = len(storage.before)
            entry = int.from_bytes(state.content[ENTRY_3 : ENTRY_3 + 8], "little")
            assert entry == length, "an entry that is neither the old one nor mended"
            assert len(state.content) <= length, "the old entry has come to name what is another's"
            return False
        if history is None:
            assert content == whole
        else:
            history.check(state.first, content)
            history.check(state.last, content)
        return True

    return Scenario(name, storage.before, storage.log, BASE, allowed, mended=whole)


async def repaired() -> Scenario:
    async def mend(storage: RecordingStorage) -> None:
        await check_image(storage, repair=True)
        await check_image(storage, repair=True)

    return await _mended("check --repair", mend)


async def recovered() -> Scenario:
    async def mend(storage: RecordingStorage) -> History:
        rig_old = thin(1) + BASE[C:].ljust(SIZE - C, b"\0")
        async with memory_disk(storage, BASE, mode=Mode.COW) as rig:
            history = History(rig, rig_old)
            await history.write(6 * PER, thin(9))
            await history.flush()
        return history

    return await _mended("recovery by mounting", mend)


async def _created(name: str, before: bytes) -> Scenario:
    storage = RecordingStorage(before)
    note = Record(mode="cor")
    await create_image(storage, size=SIZE, geometry=G, backing=("base.raw", True), record=note)

    def allowed(state: State) -> bool:
        if state.content[:4] != b"QED\0":
            return False
        if state.content == before:
            return True
        judged = judge(state.content, BASE)
        if len(judged.content) == SIZE:
            assert judged.content == BASE.ljust(SIZE, b"\0")
            assert record.decode(state.content[C - SECTOR : C]) == note
            assert state.content[64:72] == b"base.raw"
        return True

    return Scenario(name, storage.before, storage.log, BASE, allowed)


async def created() -> Scenario:
    return await _created("create", b"")


async def created_over() -> Scenario:
    storage = await leaf(8 * C)
    async with life(storage) as history:
        await history.write(0, thin(1, 2))
    return await _created("create over an image", bytes(storage.content))


def pin_of(name: str) -> Pin:
    return Pin(record.hash_name(name), "raw", SIZE, f"tag:{name}")


async def _rebased(name: str, new: str) -> Scenario:
    storage = MemoryStorage()
    note = Record(mode="cow", pins=(pin_of("old.raw"),))
    await create_image(storage, size=SIZE, geometry=G, backing=("old.raw", True), record=note)
    storage = RecordingStorage(storage.content)
    fresh = replace(pin_of(new), tag="tag:fresh")
    assert await rebase.rebase_image(storage, backing=(new, False), pin=fresh, force=False)
    names = {"old.raw": pin_of("old.raw"), new: fresh}

    def allowed(state: State) -> bool:
        header = state.content
        offset, size = (int.from_bytes(header[at : at + 4], "little") for at in (56, 60))
        backing = header[offset : offset + size].decode()
        assert backing in names, f"the header names {backing!r}"
        found = record.decode(header[C - SECTOR : C])
        # A sector comes whole or not at all, so the record can always be read.
        assert isinstance(found, Record)
        pin = found.pin_of(backing)
        # One name for both is pinned anew before the header changes: no pin of it is ever that of the other.
        assert pin == names[backing] or (new == "old.raw" and pin == pin_of(new)), f"{backing!r} without its pin"
        assert judge(state.content, BASE).content == BASE.ljust(SIZE, b"\0")
        return True

    return Scenario(name, storage.before, storage.log, BASE, allowed)


async def dropped() -> Scenario:
    """`rebase` to no backing, of an image that needs none any more."""
    storage = await leaf(3 * C)
    async with life(storage) as history:
        await history.write(0, thin(1, 3))
    storage = RecordingStorage(storage.content)
    await rebase.rebase_image(storage, backing=None, pin=None, force=False)

    def allowed(state: State) -> bool:
        assert judge(state.content, BASE).content == thin(1, 3)
        return True

    return Scenario("rebase to nothing", storage.before, storage.log, BASE, allowed)


WORKLOADS: dict[str, Callable[[], Awaitable[Scenario]]] = {
    **DISKS,
    "killed, then reused": killed,
    "killed, then repaired": killed_and_repaired,
    "check --repair": repaired,
    "recovery by mounting": recovered,
    "create": created,
    "create over an image": created_over,
    "rebase": partial(_rebased, "rebase", LONG_NAME),
    "rebase to the same name": partial(_rebased, "rebase to the same name", "old.raw"),
    "rebase to nothing": dropped,
}
