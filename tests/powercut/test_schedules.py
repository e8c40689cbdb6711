"""A power cut at any instant: the image is valid, and what a flush covered is there."""

from __future__ import annotations

import random

import trio
from hypothesis import given
from hypothesis import strategies as st

from qedfs.config import Mode
from qedfs.image.check import check_image
from qedfs.image.geometry import Geometry
from tests.image.memory_storage import MemoryStorage
from tests.model.effort import examples
from tests.model.fake_source import FakeSource
from tests.model.history import SECTOR, History
from tests.model.memory_disk import empty_image, memory_disk, pattern
from tests.model.recording_storage import RecordingStorage, after_power_cut, worst_cases
from tests.model.reference import judge

CUTS = 20
"""States rebuilt for each run of the workload."""


async def work(history: History, dice: random.Random, first: int, end: int) -> None:
    """Use the sectors `[first, end)`, which no other task writes, though others use the clusters at their edges."""
    rig = history.rig
    for _ in range(dice.randrange(4, 16)):
        at = dice.randrange(first, end)
        count = min(dice.choice((1, 3, 8, 24)), end - at)
        match dice.choice(("write", "write", "write", "zeros", "read", "read", "flush", "commit", "prefetch")):
            case "write":
                await history.write(at, dice.randbytes(count * SECTOR))
            case "zeros":
                at = at // 8 * 8 if at // 8 * 8 >= first else at
                await history.write(at, bytes(min(8 * dice.randrange(1, 4), end - at) * SECTOR))
            case "read":
                await rig.disk.read(at * SECTOR, count * SECTOR)
            case "flush":
                await history.flush()
            case "commit":
                await rig.image.commit(durable=False)
            case "prefetch":
                rig.disk.prefetch(at * SECTOR, 16 * SECTOR)


@examples(6)
@given(seed=st.integers(0, 1 << 32))
async def test_every_state_a_power_cut_could_leave_is_a_valid_image_with_what_was_flushed(seed: int) -> None:
    dice = random.Random(seed)
    geometry = Geometry(4096, dice.choice((1, 2)))
    size = dice.choice((300, 8 * 40, 8 * 40 + 3)) * SECTOR
    tables = dice.choice((1, 3))  # the disk's content lies in the spans of that many tables
    size += (tables - 1) * geometry.span
    base = bytearray(pattern(dice.choice((size // 2 + 777, size, size + 100_000))))
    for _ in range(10):
        hole = dice.randrange(len(base)) // 4096 * 4096
        base[hole : hole + 8192] = bytes(len(base[hole : hole + 8192]))
    content = (await empty_image(size, geometry=geometry)).content
    for _ in range(3):  # what a cut left is used further: its leaks are reused
        storage = RecordingStorage(content, schedule=dice)
        source = FakeSource(bytes(base))
        source.promises = dice.random() < 0.5
        current = judge(content, bytes(base)).content
        async with memory_disk(storage, source, mode=dice.choice((Mode.COW, Mode.COR, Mode.COR))) as rig:
            history = History(rig, current)
            async with trio.open_nursery() as nursery:
                for table in range(tables):
                    at = table * geometry.span // SECTOR
                    last = min(at + 300, len(current) // SECTOR)
                    edge = (at + last) // 2 + 3
                    nursery.start_soon(work, history, dice, at, edge)
                    nursery.start_soon(work, history, dice, edge, last)
                if dice.random() < 0.5:
                    nursery.start_soon(history.grow, len(current) + dice.randrange(1, 40) * SECTOR)
        for _ in range(CUTS):
            cut = dice.randrange(len(storage.log) + 1)
            left = after_power_cut(storage.before, storage.log[:cut], dice)
            history.check(cut, judge(left, bytes(base)).content)
        assert (await check_image(MemoryStorage(left, writable=False), repair=False)).consistent
        content = left


async def test_growth_over_a_longer_backing_never_shows_it_after_a_power_cut_between_any_two_operations() -> None:
    geometry = Geometry(4096, 1)
    base = pattern(600 * 4096)
    size = 500 * 4096 + SECTOR
    storage = RecordingStorage((await empty_image(size, geometry=geometry)).content)
    async with memory_disk(storage, base, mode=Mode.COW) as rig:
        await rig.disk.write(0, pattern(4096, 1))
        await rig.disk.grow(580 * 4096)  # into the span of a second table
        await rig.disk.write(579 * 4096, pattern(4096, 2))
    new = pattern(4096, 1) + base[4096:size]
    for left in worst_cases(storage.before, storage.log):
        content = judge(left, base).content
        assert content[:4096] in (base[:4096], new[:4096])
        assert content[4096:size] == base[4096:size]
        assert not any(content[size : 579 * 4096])
        assert content[579 * 4096 :] in (b"", bytes(4096), pattern(4096, 2))


async def test_no_order_of_reaching_the_disk_breaks_copies_holes_and_new_tables() -> None:
    geometry = Geometry(4096, 1)
    base = pattern(40 * 4096) + bytes(8 * 4096)
    storage = RecordingStorage((await empty_image(1100 * 4096, geometry=geometry)).content + pattern(3 * 4096))
    source = FakeSource(base)
    async with memory_disk(storage, source) as rig:  # three leaked clusters are reused
        await rig.disk.write(0, bytes(4096))
        await rig.disk.read(4096, 3 * 4096)
        await rig.disk.write(1000 * 4096, pattern(2 * 4096, 1))
        await rig.disk.flush()
        await rig.disk.read(38 * 4096, 4 * 4096)
        await rig.disk.write(600 * 4096 + 5, b"x")
        await rig.image.commit(durable=False)
        await rig.disk.write(601 * 4096, pattern(4096, 2))
    whole = judge(storage.content, base).content
    old = base.ljust(len(whole), b"\0")
    for left in worst_cases(storage.before, storage.log):
        content = judge(left, base).content
        for pos in range(0, len(whole), 4096):
            assert content[pos : pos + 4096] in (old[pos : pos + 4096], whole[pos : pos + 4096])
    assert content == whole
