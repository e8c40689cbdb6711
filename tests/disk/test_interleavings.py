"""Interleavings that were wrong once: what outlives a completion, and what a failure beside one proves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from qedfs.config import Mode
from qedfs.disk import copies, fetches, populate, reads, writes
from qedfs.errors import LeafError, LeafFailed
from qedfs.image.record import Record
from tests.image.memory_storage import MemoryStorage
from tests.model.fake_source import FakeSource
from tests.model.memory_disk import SMALL, empty_image, memory_disk, pattern, settled

C = SMALL.cluster_size
BASE = pattern(16 * C)


async def test_a_read_that_waits_for_room_for_its_copy_outlives_the_completion(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Its fetch is no request to the backing yet, so `retire` does not wait for it."""
    monkeypatch.setattr(fetches, "COPY_BUDGET", C)
    storage = await empty_image(2 * C)
    source = FakeSource(BASE)
    gate = source.hold()
    answers: list[bytes] = []
    async with memory_disk(storage, source) as rig:

        async def read(cluster: int) -> None:
            answers.append(bytes(await rig.disk.read(cluster * C, C)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, 0)
            await settled()
            nursery.start_soon(read, 1)  # stands behind the other in the budget
            await settled()
            await rig.disk.write(0, pattern(2 * C, seed=1))
            nursery.start_soon(rig.disk.complete)
            await settled()
            assert rig.disk.statistics().state == "complete"
            gate.release()
    assert len(answers) == 2


async def test_a_guest_write_that_joins_such_a_fetch_outlives_the_completion(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(fetches, "COPY_BUDGET", C)
    span = 1024 * C
    storage = await empty_image(2 * span)
    source = FakeSource(BASE[: 2 * C] + bytes(2 * span - 2 * C))
    source.promises = True
    async with memory_disk(storage, source) as rig:
        what = rig.disk.populate
        assert what is not None
        for first in range(2, what.total, 256):
            await what.look(first, min(first + 256, what.total), widely=True)
        await rig.disk.read(C, C)
        await settled()
        gate = source.hold(lambda pos: pos == 0)

        async def read(pos: int) -> None:
            await rig.disk.read(pos, 512)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, 0)  # takes the budget
            await settled()
            nursery.start_soon(read, span + 5 * C)  # promised, without a table: its fetch waits for the budget
            await settled()
            nursery.start_soon(rig.disk.write, span + 5 * C + 7, b"guest")  # joins that fetch
            await settled()
            await rig.disk.write(0, pattern(C, seed=1))
            nursery.start_soon(rig.disk.complete)
            await settled()
            assert rig.disk.statistics().state == "complete"
            gate.release()
        assert bytes(await rig.disk.read(span + 5 * C + 7, 5)) == b"guest"


@pytest.mark.parametrize("attempt", range(8))  # trio runs what is ready in any order
async def test_a_step_that_waits_for_an_answer_about_zeros_outlives_the_completion(
    autojump_clock: trio.testing.MockClock, attempt: int
) -> None:
    storage = await empty_image(2 * C)
    source = FakeSource(BASE)
    steps: list[int] = []
    async with memory_disk(storage, source, mode=Mode.COW) as rig:
        populate = rig.disk.populate
        assert populate is not None
        await rig.disk.read(0, 512)
        await rig.disk.write(0, pattern(C))
        await settled()
        answer = trio.Event()
        source.delay = answer.wait

        async def step(pos: int) -> None:
            steps.append(await rig.disk.stream(pos))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(step, C)  # asks
            await settled()
            nursery.start_soon(step, C)  # waits for that answer
            await settled()
            await rig.disk.write(C, pattern(C))
            nursery.start_soon(rig.disk.complete)
            await settled()
            assert rig.disk.statistics().state == "complete"
            answer.set()
    assert steps == [C, C]


class TwoFlushes(MemoryStorage):
    """The first flush is held until the second one, that comes meanwhile, has failed: the kernel tells an error once."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.flushes: list[trio.Event] = []
        self.armed = False

    async def flush(self) -> None:
        if not self.armed:
            return await super().flush()
        first = not self.flushes
        self.flushes.append(trio.Event())
        await trio.lowlevel.checkpoint()
        if not first:
            raise LeafError(self.name, "cannot be flushed (Input/output error)")
        await self.flushes[0].wait()
        self.log.clear()
        return None


async def test_a_flush_that_ends_well_after_another_has_failed_proves_nothing(
    expected_warnings: Callable[[str], None],
) -> None:
    expected_warnings("cannot be flushed")
    storage = await empty_image(4 * C, backing=False)
    storage = TwoFlushes(bytes(storage.content))
    async with memory_disk(storage, close=False) as rig:
        await rig.disk.write(0, pattern(C))
        await rig.disk.flush()
        await rig.disk.write(0, pattern(C, seed=1))  # in place: nothing to commit but a flush
        storage.armed = True
        acknowledged = False

        async def flush() -> None:
            nonlocal acknowledged
            try:
                await rig.disk.flush()
                acknowledged = True
            except LeafFailed:
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flush)
            await settled()
            with pytest.raises(LeafFailed):
                await rig.disk.set_mode(Mode.COW)  # its flush is told of the page that could not be written
            storage.flushes[0].set()
        assert not acknowledged


class Unreadable(MemoryStorage):
    """While `broken`, nothing can be told of what lies behind header and L1."""

    broken = True

    async def next_data(self, offset: int) -> tuple[int, int]:
        if self.broken and offset >= 3 * C:
            raise LeafError(self.name, "cannot be read (Input/output error)")
        return await super().next_data(offset)


async def test_the_counts_of_an_image_whose_survey_failed_are_an_error(
    autojump_clock: trio.testing.MockClock, expected_warnings: Callable[[str], None]
) -> None:
    expected_warnings("cannot be read")
    made = await empty_image(4 * C, backing=False)
    async with memory_disk(made) as rig:
        await rig.disk.write(0, pattern(C))
    storage = Unreadable(bytes(made.content))
    async with memory_disk(storage) as rig:
        await settled()
        with trio.fail_after(60), pytest.raises(LeafError):
            await rig.disk.counts()
        storage.broken = False
        with trio.fail_after(60):
            assert await rig.disk.counts() == (1, 3)


async def test_the_mode_that_was_set_last_is_the_one_that_is_remembered() -> None:
    storage = await empty_image(4 * C, backing=False, record=Record(mode="cow"))
    async with memory_disk(storage) as rig:
        gate = storage.hold("write")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.disk.set_mode, Mode.STREAM)
            await settled()
            nursery.start_soon(rig.disk.set_mode, Mode.COW)
            await settled()
            gate.release()
        assert rig.disk.mode is Mode.COW
        assert rig.image.record.mode == "cow"


async def test_the_copy_of_a_large_cluster_outlives_the_completion(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Between two of its pieces it asks nothing of the backing, which then closes."""
    for module in (copies, populate, reads, writes):
        monkeypatch.setattr(module, "MAX_FETCH", C // 4)
    storage = await empty_image(2 * SMALL.span)
    source = FakeSource(bytes(2 * SMALL.span))
    source.promises = True
    async with memory_disk(storage, source) as rig:
        what = rig.disk.populate
        assert what is not None
        for first in range(0, what.total, 256):
            await what.look(first, first + 256, widely=True)
        gate = storage.hold("write", lambda offset: offset >= 3 * C)
        await rig.disk.read(SMALL.span + 5 * C, 512)
        await settled()  # the copy writes its first piece
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.disk.complete)
            await settled()
            assert rig.disk.statistics().state == "complete"
            gate.release()
        await settled()
        assert rig.disk.statistics().last_error == ""
