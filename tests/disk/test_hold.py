"""A held disk, and its release: nothing that was read before may be given out or linked after (docs/concurrency.md)."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import trio
import trio.testing

from qedfs.backing.base import Identity
from qedfs.config import Mode
from qedfs.disk import hold
from qedfs.errors import BackingChanged, BackingRefused, BackingUnavailable, Held, LeafError, ReadOnly
from qedfs.image import record as records
from qedfs.image.geometry import Geometry
from qedfs.image.record import Record
from tests.image.memory_storage import MemoryStorage
from tests.model.fake_source import FakeSource
from tests.model.memory_disk import SMALL, empty_image, memory_disk, pattern, settled
from tests.model.reference import judge

Expect = Callable[[str], None]
C = SMALL.cluster_size
BASE = pattern(16 * C)
HELD = Record(mode="cor", hold=True)


async def no_pages() -> None:
    """The kernel has cached nothing."""


async def held_image(size: int = 16 * C, *, geometry: Geometry = SMALL) -> MemoryStorage:
    return await empty_image(size, geometry=geometry, record=HELD)


def stored(storage: MemoryStorage) -> Record:
    """The record as a mount after a crash would find it."""
    found = records.decode(storage.durable[C - 512 : C])
    assert isinstance(found, Record)
    return found


@pytest.mark.parametrize("mode", Mode)
async def test_reads_pass_through_and_nothing_is_kept(mode: Mode) -> None:
    storage = await held_image()
    async with memory_disk(storage, BASE, mode=mode, readahead=1 << 20) as rig:
        for seed in range(3):
            rig.source.content = pattern(16 * C, seed)
            for cluster in range(4):  # in sequence, which would widen
                assert bytes(await rig.disk.read(cluster * C, C)) == rig.source.content[cluster * C :][:C]
        await settled()
        assert rig.source.requests == [(cluster * C, C) for cluster in range(4)] * 3
        assert rig.disk.statistics().state == "held"
    assert storage.log == [] or set(storage.kinds()) == {"flush"}


async def test_writes_growth_and_copies_on_demand_are_refused() -> None:
    storage = await held_image()
    async with memory_disk(storage, BASE) as rig:
        with pytest.raises(Held):
            await rig.disk.write(0, b"x" * C)
        assert not rig.disk.write_nowait(0, b"x")
        with pytest.raises(Held):
            await rig.disk.grow(32 * C)
        with pytest.raises(Held):
            rig.disk.prefetch(0, C)
        with pytest.raises(Held):
            await rig.disk.stream(0)
        assert rig.source.requests == []


async def test_a_source_that_grows_meanwhile_is_read_as_it_is_and_the_disk_keeps_its_size() -> None:
    storage = await held_image()
    source = FakeSource(BASE[: 8 * C])
    async with memory_disk(storage, source) as rig:
        assert bytes(await rig.disk.read(8 * C, C)) == bytes(C)
        source.content, source.size, source.identity = BASE, 16 * C, Identity(16 * C)
        assert bytes(await rig.disk.read(8 * C, C)) == BASE[8 * C : 9 * C]
        source.content, source.size, source.identity = BASE * 2, 32 * C, Identity(32 * C)
        await rig.disk.release_hold(no_pages)
        assert rig.disk.size == 16 * C
    assert stored(storage).pins[0].size == 32 * C


async def test_the_release_pins_what_the_source_is_in_one_write_and_then_copies() -> None:
    storage = await held_image()
    async with memory_disk(storage, BASE, mode=Mode.COR) as rig:
        rig.source.identity = Identity(16 * C, "etag:after")
        mark = len(storage.log)
        await rig.disk.release_hold(no_pages)
        assert rig.kinds_since(mark) == ["write", "flush"]
        found = stored(storage)
        assert (found.mode, found.hold, found.pin_of("base.raw")) == ("cor", False, found.pins[0])
        assert (found.pins[0].format, found.pins[0].size, found.pins[0].tag) == ("raw", 16 * C, "etag:after")
        assert rig.disk.statistics().state == "passive"
        await rig.disk.write(0, b"new")
        await rig.disk.read(3 * C, C)
    assert judge(storage.content, BASE).data == 2


async def test_pages_are_dropped_between_the_new_connection_and_the_record() -> None:
    storage = await held_image()
    async with memory_disk(storage, BASE) as rig:
        opened = rig.source.requests
        steps: list[tuple[bool, bool, int]] = []

        async def drop() -> None:
            with pytest.raises(Held):
                await rig.disk.write(0, b"a page that was dirtied during the hold")
            steps.append((rig.disk.held, stored(storage).hold, len(opened)))

        await rig.disk.release_hold(drop)
        assert steps == [(True, True, 0)]
        assert not rig.disk.held


async def test_a_read_under_way_is_repeated_and_copies_nothing() -> None:
    storage = await held_image()
    async with memory_disk(storage, BASE, mode=Mode.COR) as rig:
        gate = rig.source.hold()
        got: list[bytes] = []

        async def read() -> None:
            got.append(bytes(await rig.disk.read(7 * C, C)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await gate.arrived()
            rig.source.content = pattern(16 * C, 1)
            await rig.disk.release_hold(no_pages)
            gate.release()
        await settled()
        assert got == [pattern(16 * C, 1)[7 * C : 8 * C]]
        assert (await rig.disk.counts()).data == 0


async def test_a_second_release_changes_nothing_and_two_at_once_are_one() -> None:
    storage = await held_image()
    async with memory_disk(storage, BASE) as rig:
        dropped: list[int] = []

        async def drop() -> None:
            dropped.append(1)
            await trio.testing.wait_all_tasks_blocked()

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(rig.disk.release_hold, drop)
        mark = len(storage.log)
        await rig.disk.release_hold(drop)
        assert (dropped, len(storage.log)) == ([1], mark)


async def test_without_its_backing_it_stays_held_and_can_be_released_later(
    autojump_clock: trio.testing.MockClock, expected_warnings: Expect
) -> None:
    expected_warnings("not reached within 15 s, the image stays held")
    storage = await held_image()
    source = FakeSource(BASE)
    refusing = True

    async def opening() -> None:
        if refusing:
            raise BackingUnavailable("fake", "away")

    source.opening = opening
    async with memory_disk(storage, source) as rig:
        began = trio.current_time()
        with pytest.raises(BackingUnavailable, match="stays held"):
            await rig.disk.release_hold(no_pages)
        assert trio.current_time() - began == pytest.approx(hold.RELEASE_PATIENCE)
        assert (rig.disk.held, stored(storage)) == (True, HELD)
        assert "stays held" in rig.disk.statistics().last_error
        refusing = False
        await rig.disk.release_hold(no_pages)
        assert not rig.disk.held


async def test_a_backing_that_is_refused_is_asked_again_by_the_next_release(expected_warnings: Expect) -> None:
    expected_warnings("no such export")
    storage = await held_image()
    refusals = [BackingRefused("fake", "no such export")]

    async def opening() -> None:
        if refusals:
            raise refusals.pop()

    source = FakeSource(BASE)
    source.opening = opening
    async with memory_disk(storage, source) as rig:
        with pytest.raises(BackingRefused):
            await rig.disk.release_hold(no_pages)
        assert rig.disk.held
        await rig.disk.release_hold(no_pages)
        assert not rig.disk.held


async def test_a_record_that_cannot_be_written_leaves_it_held(expected_warnings: Expect) -> None:
    expected_warnings("provoked")
    storage = await held_image()
    async with memory_disk(storage, BASE) as rig:
        storage.fail("write", LeafError("leaf.qed", "provoked"))
        with pytest.raises(LeafError):
            await rig.disk.release_hold(no_pages)
        storage.heal()
        assert (rig.disk.held, stored(storage)) == (True, HELD)
        await rig.disk.release_hold(no_pages)
        assert not stored(storage).hold


async def test_pages_that_cannot_be_dropped_leave_it_held(expected_warnings: Expect) -> None:
    expected_warnings("does not drop")

    async def stuck() -> None:
        raise Held("hold", "the kernel does not drop its pages")

    storage = await held_image()
    async with memory_disk(storage, BASE) as rig:
        with pytest.raises(Held):
            await rig.disk.release_hold(stuck)
        assert (rig.disk.held, stored(storage)) == (True, HELD)


async def test_a_leaf_that_cannot_be_written_is_not_released() -> None:
    storage = await held_image()
    storage.writable = False
    async with memory_disk(storage, BASE) as rig:
        with pytest.raises(ReadOnly):
            await rig.disk.release_hold(no_pages)
        assert rig.disk.held


async def test_a_mode_that_is_set_during_the_release_does_not_bring_the_hold_back() -> None:
    storage = await held_image()
    async with memory_disk(storage, BASE) as rig:
        gate = storage.hold("flush")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.disk.release_hold, no_pages)
            await gate.arrived()
            nursery.start_soon(rig.disk.set_mode, Mode.STREAM)
            await settled()
            gate.release()
    found = stored(storage)
    assert (found.mode, found.hold, len(found.pins)) == ("stream", False, 1)


async def test_whoever_waits_for_news_learns_of_the_release() -> None:
    storage = await held_image()
    async with memory_disk(storage, BASE) as rig:
        assert not rig.disk.may_copy
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.disk.news.wait)
            await settled()
            await rig.disk.release_hold(no_pages)
        assert rig.disk.may_copy


async def test_it_comes_up_held_again_until_it_was_released() -> None:
    storage = await held_image()
    async with memory_disk(storage, BASE, mode=Mode.STREAM, close=False) as rig:
        assert rig.disk.held
    async with memory_disk(MemoryStorage(storage.durable), BASE) as rig:
        assert rig.disk.held
        await rig.disk.release_hold(no_pages)
        after = MemoryStorage(rig.storage.durable)
    async with memory_disk(after, BASE) as rig:
        assert not rig.disk.held


async def test_after_the_release_another_content_is_refused(expected_warnings: Expect) -> None:
    expected_warnings("its size was")
    storage = await held_image()
    source = FakeSource(BASE)
    async with memory_disk(storage, source) as rig:
        await rig.disk.release_hold(no_pages)
        source.size, source.identity = 8 * C, Identity(8 * C)
        source.error = BackingUnavailable("fake", "reset")
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                with pytest.raises((BackingChanged, BackingRefused)):
                    await rig.disk.read(0, C)

            nursery.start_soon(read)


class ChangingSource(FakeSource):
    """Whoever reads it gets what was there when the request came in, sometimes much later, until it stands still."""

    def __init__(self, clusters: int, randomness: random.Random) -> None:
        super().__init__(b"\x01" * clusters * C)
        self.randomness = randomness
        self.stands_still = False

    async def read_into(self, pos: int, buffer: memoryview) -> None:
        seen = self.content[pos : pos + len(buffer)]
        for _ in range(self.randomness.randrange(12)):
            await trio.lowlevel.checkpoint()
        buffer[:] = seen

    def change(self) -> None:
        assert not self.stands_still
        self.content = bytes([self.content[0] % 200 + 1]) * len(self.content)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("cluster_size", [C, 2 << 20], ids=["small clusters", "large clusters"])
async def test_under_load_every_byte_is_of_after_the_release(seed: int, cluster_size: int) -> None:
    """Readers never stop, the source changes until the release, and guests write at once after it."""
    randomness = random.Random(seed)
    geometry = Geometry(cluster_size, 2)
    clusters = 64 if cluster_size == C else 2 * cluster_size // C
    storage = await empty_image(clusters * C, geometry=geometry, record=HELD)
    source = ChangingSource(clusters, randomness)
    async with memory_disk(storage, source, mode=Mode.COR, readahead=8 * C) as rig, trio.open_nursery() as nursery:
        released = False

        async def read() -> None:
            while True:
                first = randomness.randrange(clusters - 4)
                began_after = released
                data = bytes(await rig.disk.read(first * C + randomness.randrange(C), randomness.randrange(1, 3 * C)))
                if began_after:
                    assert set(data) <= {source.content[0], 255}
                await trio.lowlevel.checkpoint()

        async def change() -> None:
            while not source.stands_still:
                source.change()
                await trio.lowlevel.checkpoint()

        async def drop() -> None:
            for _ in range(randomness.randrange(5)):
                await trio.lowlevel.checkpoint()

        for _ in range(6):
            nursery.start_soon(read)
        nursery.start_soon(change)
        for _ in range(randomness.randrange(50, 200)):
            await trio.lowlevel.checkpoint()
        source.stands_still = True
        await rig.disk.release_hold(drop)
        released = True
        # Small writes, which are merged into clusters with what the source holds around them.
        written = {randomness.randrange(clusters) * C + 100 for _ in range(8)}
        for pos in written:
            await rig.disk.write(pos, b"\xff")
        await rig.disk.read(0, clusters * C)
        for _ in range(100):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    expected = bytearray(source.content)
    for pos in written:
        expected[pos] = 255
    judged = judge(storage.content, b"")
    assert judged.data + judged.zero == clusters * C // cluster_size, "all of it is in the leaf"
    assert judged.content == expected


async def test_a_release_does_not_wait_for_the_pause_after_an_earlier_failure(
    autojump_clock: trio.testing.MockClock,
) -> None:
    storage = await empty_image(4 * C, record=Record(hold=True))
    source = FakeSource(pattern(4 * C))
    away = True

    async def opening() -> None:
        await trio.lowlevel.checkpoint()
        if away:
            raise BackingUnavailable("fake", "come back later", retry_after=60)

    async def nothing() -> None:
        await trio.lowlevel.checkpoint()

    source.opening = opening
    async with memory_disk(storage, source) as rig, trio.open_nursery() as nursery:
        nursery.start_soon(rig.disk.read, 0, C)
        await trio.sleep(1)
        away = False
        began = trio.current_time()
        await rig.disk.release_hold(nothing)
        assert trio.current_time() - began < 1
