"""Making a disk local step by step, and letting it stand alone."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import trio

from qedfs.config import Mode
from qedfs.errors import Held, LeafFull
from qedfs.image.record import Record
from qedfs.image.tables import State
from tests.model.fake_source import FakeSource
from tests.model.memory_disk import SMALL, MemoryDisk, empty_image, memory_disk, pattern, settled
from tests.model.reference import judge

C = SMALL.cluster_size
BASE = pattern(16 * C)


async def step_through(rig: MemoryDisk) -> int:
    """The loop over the primitive; return how many steps it took."""
    pos = steps = 0
    while count := await rig.disk.stream(pos):
        pos += count
        steps += 1
    assert pos == rig.disk.size
    return steps


async def test_a_step_brings_one_cluster_and_counts_what_is_local_from_there() -> None:
    storage = await empty_image(16 * C)
    async with memory_disk(storage, BASE, mode=Mode.COW) as rig:
        assert await rig.disk.stream(5 * C + 512) == C - 512
        assert rig.source.requests == [(5 * C, C)]
        assert await rig.disk.stream(4 * C) == 2 * C, "what was local before is included"
        assert await rig.disk.stream(5 * C) == C, "a local cluster is not fetched again"
        assert rig.source.requests == [(5 * C, C), (4 * C, C)]
        assert await rig.disk.stream(16 * C) == 0
        assert await rig.disk.stream(1 << 60) == 0


@pytest.mark.parametrize("promises", [False, True])
async def test_the_loop_over_steps_brings_everything(promises: bool) -> None:
    base = BASE[: 4 * C] + bytes(4 * C) + BASE[8 * C :]
    storage = await empty_image(16 * C - 512)
    source = FakeSource(base)
    source.promises = promises
    async with memory_disk(storage, source) as rig:
        await rig.disk.write(9 * C + 7, b"guest")
        assert await step_through(rig) <= 16
        assert rig.disk.remaining() == 0
        assert await rig.disk.complete()
        assert rig.disk.statistics().state == "complete"
        requests = len(rig.source.requests)
        assert bytes(await rig.disk.read(0, 16 * C)) == judge(storage.content, b"").content
        assert len(rig.source.requests) == requests
    assert all(not promises or pos + length <= 4 * C or pos >= 8 * C for pos, length in source.requests)
    expected = bytearray(base[: 16 * C - 512])
    expected[9 * C + 7 : 9 * C + 12] = b"guest"
    assert judge(storage.content, b"").content == expected, "no backing is needed"


async def test_a_disk_with_something_missing_does_not_complete() -> None:
    storage = await empty_image(16 * C)
    async with memory_disk(storage, BASE) as rig:
        await rig.disk.read(0, 15 * C)
        await settled()
        assert not await rig.disk.complete()
        assert rig.disk.statistics().state == "passive"
        await rig.disk.stream(15 * C)
        assert await rig.disk.complete()
        assert await rig.disk.complete(), "once more changes nothing"
        assert rig.disk.statistics().backing_bytes_read == 16 * C, "what was fetched is still told"
    assert judge(storage.content, b"").content == BASE


async def test_promised_zeros_at_the_end_of_the_disk_do_not_stand_in_the_way() -> None:
    """The last cluster is cut short, is promised, and has a table that a guest has made: completion claims it."""
    storage = await empty_image(1024 * C + 8 * C + 512)
    async with memory_disk(storage, BASE[:777]) as rig:
        await rig.disk.write(1025 * C, b"guest")
        populate = rig.disk.populate
        assert populate is not None
        while missing := populate.next_missing(0, populate.total):
            await populate.bring(await populate.look(missing[0], missing[0] + 1, widely=True)).linked()
        assert await rig.disk.complete()
    assert judge(storage.content, b"").content[:777] == BASE[:777]


async def test_spans_that_are_zeros_throughout_get_no_table() -> None:
    span = 1024 * C
    storage = await empty_image(8 * span)
    source = FakeSource(BASE + bytes(8 * span - len(BASE) - C) + BASE[:C])
    source.promises = True
    async with memory_disk(storage, source) as rig:
        populate = rig.disk.populate
        assert populate is not None
        missing = []
        for first in range(0, populate.total, 256):
            missing += await populate.look(first, first + 256, widely=True)
        assert missing == [(0, 16), (8 * 1024 - 1, 8 * 1024)]
        assert populate.promised() == 6 * 1024
        bringing = populate.bring(missing)
        await bringing.arrived()
        await bringing.linked()
        assert rig.disk.remaining() == 0
        await rig.disk.write(3 * span + 5, b"guest")  # a table appears among promised zeros
        assert await rig.disk.complete()
        assert bytes(await rig.disk.read(3 * span, 16)) == bytes(5) + b"guest" + bytes(6)
        assert sum(rig.image.has_table(index) for index in range(8)) == 3
    content = judge(storage.content, b"").content
    assert content[: 16 * C] == BASE
    assert content[-C:] == BASE[:C]
    assert not any(content[4 * span : 7 * span])


async def test_a_promise_is_forgotten_with_the_connection_it_was_made_on() -> None:
    span = 1024 * C
    storage = await empty_image(2 * span)
    source = FakeSource(BASE + bytes(2 * span - len(BASE)))
    source.promises = True
    async with memory_disk(storage, source) as rig:
        populate, backing = rig.disk.populate, rig.disk._backing
        assert populate is not None
        assert backing is not None
        await populate.look(1024, 2048, widely=True)
        assert populate.next_missing(1024, 2048) is None
        await backing.reset()
        assert populate.next_missing(1024, 2048) == (1024, 2048)
        assert populate.promised() == 0
        source.content = BASE + bytes(span + 100) + b"x" + bytes(span - len(BASE) - 101)
        assert await populate.look(1024, 2048, widely=True) == [(1040, 1041)]


async def test_a_growth_and_a_completion_come_one_after_the_other() -> None:
    storage = await empty_image(16 * C)
    async with memory_disk(storage, BASE + pattern(8 * C, 3)) as rig:
        await step_through(rig)
        done: list[bool] = []

        async def complete() -> None:
            done.append(await rig.disk.complete())

        gate = storage.hold("flush")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.disk.grow, 20 * C)
            await gate.arrived()
            nursery.start_soon(complete)
            await settled()
            gate.release()
        assert done == [True]
        assert bytes(await rig.disk.read(0, 20 * C)) == BASE + bytes(4 * C)
    assert judge(storage.content, b"").content == BASE + bytes(4 * C)


async def test_a_growth_that_waits_for_a_completion_finds_the_backing_gone() -> None:
    """Also one by a write past the end: it must not be lost."""
    storage = await empty_image(16 * C)
    async with memory_disk(storage, BASE + pattern(8 * C, 3)) as rig:
        await step_through(rig)
        gate = storage.hold("flush")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.disk.complete)
            await gate.arrived()
            nursery.start_soon(rig.disk.grow, 20 * C)
            nursery.start_soon(rig.disk.write, 20 * C, bytes(C) + b"w" * 512)
            await settled()
            gate.release()
        assert rig.disk.populate is None
        expected = BASE + bytes(5 * C) + b"w" * 512
        assert bytes(await rig.disk.read(0, 22 * C)) == expected
    assert judge(storage.content, b"").content == expected


async def test_whoever_waits_for_the_backing_when_the_disk_completes_gets_his_bytes() -> None:
    storage = await empty_image(2 * C)
    async with memory_disk(storage, BASE[: 2 * C], mode=Mode.COW) as rig:
        await rig.disk.stream(0)
        gate = rig.source.hold()
        got: list[bytes] = []
        done: list[bool] = []

        async def read() -> None:
            got.append(bytes(await rig.disk.read(C, C)))

        async def complete() -> None:
            done.append(await rig.disk.complete())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await gate.arrived()
            await rig.disk.write(C, b"new" + bytes(C - 3))
            nursery.start_soon(complete)
            await settled()
            assert rig.disk.statistics().state == "complete"
            assert not done, "the backing stays open for the reader"
            gate.release()
        assert got == [BASE[C : 2 * C]]
        assert done == [True]


async def test_a_step_tells_why_nothing_became_local(expected_warnings: Callable[[str], None]) -> None:
    expected_warnings("no room")
    storage = await empty_image(16 * C)
    async with memory_disk(storage, BASE) as rig:
        await rig.disk.write(0, b"x")
        storage.fail("write", LeafFull("leaf", "no room"))
        with pytest.raises(LeafFull):
            await rig.disk.stream(7 * C)
        storage.heal()
    storage = await empty_image(16 * C, record=Record(hold=True))
    async with memory_disk(storage, BASE) as rig:
        with pytest.raises(Held):
            await rig.disk.stream(0)


async def test_a_completion_beside_writers_loses_nothing() -> None:
    chance = random.Random(5)
    for seed in range(20):
        storage = await empty_image(8 * C)
        expected = bytearray(BASE[: 8 * C])
        async with memory_disk(storage, BASE[: 8 * C]) as rig:

            async def write(at: int, data: bytes) -> None:
                await rig.disk.write(at, data)

            async with trio.open_nursery() as nursery:
                for i in range(8):
                    data = bytes([seed + 1]) * chance.randrange(1, C)
                    at = i * C + chance.randrange(C - len(data))
                    expected[at : at + len(data)] = data
                    nursery.start_soon(write, at, data)
                for cluster in chance.sample(range(8), 8):
                    await rig.disk.stream(cluster * C)
                assert await rig.disk.complete()
            assert bytes(await rig.disk.read(0, 8 * C)) == expected
            assert (await rig.image.run(0, 8 * C)).state is State.DATA
        assert judge(storage.content, b"").content == expected


async def test_a_read_that_looked_before_the_completion_and_reads_after_it_gets_what_was_copied() -> None:
    storage = await empty_image(16 * C)
    async with memory_disk(storage, BASE) as rig:
        looked = await rig.image.run(0, 16 * C)
        assert looked.state is State.BACKING
        await step_through(rig)
        assert await rig.disk.complete()
        # Its task starts only now: the scheduler may let the end of a completion in between.
        assert bytes(await rig.disk._reads._read_run(looked, lambda: True)) == BASE
