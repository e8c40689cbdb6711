"""Copies leave room for the guest: the decision, and what a disk makes of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from qedfs.config import DiskOptions, Reserve
from qedfs.disk.copies import REST
from qedfs.disk.disk import Disk, open_disk
from qedfs.disk.reserve import LEAST, LEAST_TO_RESUME, LOOK_AGE, LOOK_BYTES, Room
from qedfs.errors import LeafFull
from qedfs.image.image import open_image
from qedfs.image.storage import Space
from qedfs.image.tables import State
from tests.image.memory_storage import MemoryStorage
from tests.model.fake_source import FakeSource
from tests.model.memory_disk import SMALL, empty_image, pattern

C = SMALL.cluster_size
MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40


@pytest.mark.parametrize(
    ("reserve", "space", "expected"),
    [
        (None, Space(10 * GIB, 8 * GIB), LEAST),
        (None, Space(TIB, TIB // 2), int(TIB * 0.05)),
        (None, Space(TIB, GIB), GIB // 2),
        (None, Space(8 * MIB, 0), 0),
        (Reserve(size=3 * GIB), Space(10 * GIB, GIB), 3 * GIB),
        (Reserve(percent=10), Space(10 * GIB, GIB), GIB),
        (Reserve(size=0), Space(10 * GIB, GIB), 0),
    ],
)
def test_size_of_the_reserve(reserve: Reserve | None, space: Space, expected: int) -> None:
    room = Room(reserve)
    room.observe(space, 0, 0.0)
    assert room.reserve == expected


def test_nothing_is_copied_before_the_first_look() -> None:
    assert not Room(Reserve(size=0)).take(C, 0.0)


def test_a_look_is_believed_for_a_time_and_an_amount() -> None:
    room = Room(Reserve(size=MIB))
    room.observe(Space(TIB, TIB), C, 0.0)
    assert room.take(C, 0.0)
    assert not room.take(C, LOOK_AGE)
    assert room.take(LOOK_BYTES, LOOK_AGE / 2)
    assert not room.take(C, LOOK_AGE / 2)


def test_copies_stop_at_the_reserve_and_resume_at_twice_the_reserve() -> None:
    room = Room(Reserve(size=10 * MIB))
    room.observe(Space(GIB, 10 * MIB + C), C, 0.0)
    assert room.take(C, 0.0)
    assert not room.take(C, 0.0)
    room.observe(Space(GIB, 10 * MIB), C, 0.0)
    room.observe(Space(GIB, 20 * MIB - 1), C, 1.0)
    assert not room.take(C, 1.0)
    room.observe(Space(GIB, 20 * MIB), C, 2.0)
    assert room.take(C, 2.0)


def test_what_is_under_way_is_not_granted_again_by_a_look_that_did_not_see_it() -> None:
    room = Room(Reserve(size=10 * MIB))
    room.observe(Space(GIB, 12 * MIB), MIB, 0.0)
    assert room.take(MIB, 0.0)
    room.observe(Space(GIB, 12 * MIB), MIB, LOOK_AGE)
    assert (room.take(MIB, LOOK_AGE), room.take(MIB, LOOK_AGE)) == (True, False)
    assert (room.stopped, room.under_way) == (False, 2 * MIB)
    room.ended(MIB)
    room.observe(Space(GIB, 11 * MIB), MIB, LOOK_AGE)
    assert not room.take(MIB, LOOK_AGE)
    room.ended(MIB)
    room.observe(Space(GIB, 11 * MIB), MIB, LOOK_AGE)  # the second one was zeros
    assert room.take(MIB, LOOK_AGE)


def test_without_a_reserve_copies_resume_when_something_is_free() -> None:
    room = Room(Reserve(size=0))
    room.observe(Space(GIB, GIB), C, 0.0)
    room.stop()
    room.observe(Space(GIB, LEAST_TO_RESUME - 1), C, 0.0)
    assert not room.take(C, 0.0)
    room.observe(Space(GIB, LEAST_TO_RESUME), C, 0.0)
    assert room.take(C, 0.0)


def test_a_file_with_a_limit_of_its_own_stops_there_and_says_that_it_was_not_the_reserve() -> None:
    room = Room(Reserve(size=MIB))
    room.observe(Space(TIB, TIB, allowed=2 * C), C, 0.0)
    assert (room.take(2 * C, 0.0), room.take(C, 0.0)) == (True, False)
    room.observe(Space(TIB, TIB, allowed=C - 1), C, 0.0)
    assert (room.stopped, room.used_up) == (True, True)
    room.observe(Space(TIB, TIB, allowed=LEAST_TO_RESUME - 1), C, 0.0)
    assert room.stopped
    room.observe(Space(TIB, 0, allowed=LEAST_TO_RESUME), C, 0.0)
    assert (room.stopped, room.used_up) == (True, False)
    room.observe(Space(TIB, TIB, allowed=LEAST_TO_RESUME), C, 0.0)
    assert room.take(C, 0.0)


def test_a_block_device_has_no_room_to_spare() -> None:
    room = Room(None)
    room.observe(None, GIB, 0.0)
    assert room.take(GIB, 0.0)


class SmallStorage(MemoryStorage):
    """On a file system with `free` bytes left; `looks` counts how often somebody asked."""

    free = 1 * GIB
    looks = 0

    async def space(self) -> Space:
        self.looks += 1
        return Space(2 * GIB, self.free)


async def small_image(size: int) -> SmallStorage:
    return SmallStorage((await empty_image(size)).content)


async def is_local(disk: Disk, cluster: int) -> bool:
    return (await disk._image.run(cluster * C, 1)).state is State.DATA


async def test_a_disk_stops_copying_serves_on_and_resumes(
    autojump_clock: trio.testing.MockClock, expected_warnings: Callable[[str], None]
) -> None:
    expected_warnings("copying stopped")
    base = pattern(16 * C)
    storage = await small_image(16 * C)
    source = FakeSource(base)
    image = await open_image(storage)
    backing = source.backing()
    async with open_disk(image, backing, DiskOptions(readahead=0, reserve=Reserve(size=100 * MIB))) as disk:

        async def read(cluster: int) -> None:
            assert bytes(await disk.read(cluster * C, C)) == base[cluster * C : (cluster + 1) * C]
            await trio.testing.wait_all_tasks_blocked()

        await read(0)
        assert await is_local(disk, 0)
        assert disk.statistics().state == "passive"

        storage.free = 100 * MIB
        await trio.sleep(LOOK_AGE)
        await read(1)
        assert not await is_local(disk, 1)
        assert disk.statistics().state == "no-space"
        assert "reserve" in disk.statistics().last_error
        await disk.write(2 * C, pattern(C, 2))
        assert await is_local(disk, 2), "the reserve is the guest's"

        storage.free = 200 * MIB
        await trio.sleep(2 * REST)
        assert disk.statistics().state == "passive", "it resumes by itself"
        await read(1)
        assert await is_local(disk, 1)
    await image.aclose()
    await backing.aclose()


class SlowStorage(MemoryStorage):
    """On a file system on which `room` bytes are left for this file alone; what is copied arrives after a second."""

    room = 2 * GIB

    async def space(self) -> Space:
        return Space(4 * GIB, GIB + self.room - len(self.content))

    async def write_behind(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        await trio.sleep(1.0)
        await super().write_behind(offset, data)


async def test_looks_while_copies_are_under_way_leave_the_reserve_alone(
    autojump_clock: trio.testing.MockClock, expected_warnings: Callable[[str], None]
) -> None:
    expected_warnings("copying stopped")
    base = pattern(16 * C)
    storage = SlowStorage((await empty_image(16 * C)).content)
    image = await open_image(storage)
    backing = FakeSource(base).backing()
    async with open_disk(image, backing, DiskOptions(readahead=0, reserve=Reserve(size=GIB))) as disk:
        await disk.write(0, pattern(C, 2))  # from now on only data clusters come
        storage.room = len(storage.content) + 4 * C
        await trio.sleep(2 * LOOK_AGE)
        for cluster in range(1, 9):
            await disk.read(cluster * C, C)
            await trio.sleep(LOOK_AGE / 3)
        await trio.sleep(4.0)
        assert [await is_local(disk, cluster) for cluster in range(1, 9)].count(True) == 4
        assert disk.statistics().state == "no-space"
    await image.aclose()
    await backing.aclose()


async def test_a_copy_that_finds_no_room_rests_although_the_file_system_has_some(
    autojump_clock: trio.testing.MockClock, expected_warnings: Callable[[str], None]
) -> None:
    """A quota is not seen by looking at the file system."""
    expected_warnings("quota")
    base = pattern(16 * C)
    storage = await small_image(16 * C)
    image = await open_image(storage)
    backing = FakeSource(base).backing()
    async with open_disk(image, backing, DiskOptions(readahead=0)) as disk:
        await disk.write(0, b"x")
        storage.fail("write", LeafFull("leaf.qed", "quota"))
        await disk.read(C, C)
        await trio.testing.wait_all_tasks_blocked()
        assert disk.statistics().state == "no-space"
        storage.heal()
        await disk.read(C, C)
        await trio.testing.wait_all_tasks_blocked()
        assert not await is_local(disk, 1)
        await trio.sleep(2 * REST)
        await disk.read(C, C)
        await trio.testing.wait_all_tasks_blocked()
        assert await is_local(disk, 1)
    await image.aclose()
    await backing.aclose()


async def test_an_idle_disk_looks_at_its_file_system_once(autojump_clock: trio.testing.MockClock) -> None:
    storage = await small_image(16 * C)
    image = await open_image(storage)
    backing = FakeSource(pattern(16 * C)).backing()
    async with open_disk(image, backing, DiskOptions()):
        await trio.sleep(3600)
    assert storage.looks == 1
    await image.aclose()
    await backing.aclose()
