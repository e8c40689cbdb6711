"""The look at all tables before the first allocation: what is free, and where no allocation may come to lie."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import trio

from qedfs.errors import CorruptEntry, LeafError
from qedfs.image.check import check_image
from qedfs.image.header import Feature
from qedfs.image.image import Image, open_image
from tests.image.memory_storage import MemoryStorage
from tests.image.qemu import qemu_check
from tests.model.memory_disk import SMALL, empty_image, memory_disk, pattern
from tests.model.reference import judge

C = SMALL.cluster_size
SIZE = 4 * SMALL.span
SPAN = SMALL.table_entries
"""Clusters of a table."""


class Damaged:
    """An image of four data clusters (disk clusters 0, 1, 2 and the first of the second table), to be damaged."""

    def __init__(self, storage: MemoryStorage, tables: list[int], data: list[int]) -> None:
        self.storage = storage
        self.tables = tables
        self.data = data

    @property
    def length(self) -> int:
        return len(self.storage.content)

    def set_entry(self, cluster: int, value: int) -> None:
        struct.pack_into("<Q", self.storage.content, self.tables[cluster // SPAN] + cluster % SPAN * 8, value)

    def set_l1(self, index: int, value: int) -> None:
        struct.pack_into("<Q", self.storage.content, C + index * 8, value)

    def need_check(self) -> None:
        features = struct.unpack_from("<Q", self.storage.content, 16)[0]
        struct.pack_into("<Q", self.storage.content, 16, features | Feature.NEED_CHECK)

    async def reopened(self) -> Image:
        return await open_image(self.storage)


@pytest.fixture
async def damaged() -> Damaged:
    storage = await empty_image(SIZE, backing=False)
    async with memory_disk(storage) as rig:
        for cluster in (0, 1, 2, SPAN):
            await rig.disk.write(cluster * C, pattern(C, cluster))
        tables = [table.offset for table in sorted(rig.image.tables, key=lambda t: t.index)]
        data = [(await rig.image.run(cluster * C, 1)).offset for cluster in (0, 1, 2, SPAN)]
    return Damaged(MemoryStorage(storage.content), tables, data)


async def write_clusters(image: Image, first: int, count: int) -> list[int]:
    """Write and link clusters, one extent each, and return where they came to lie."""
    offsets = []
    for cluster in range(first, first + count):
        async with image.pinned(cluster, cluster + 1):
            extent = image.allocate(1)
            await image.storage.write(extent.offset, pattern(C, cluster))
            image.link_data(cluster, 1, extent.offset)
            offsets.append(extent.offset)
    return offsets


async def test_a_sound_image_is_counted_and_nothing_of_it_is_free(damaged: Damaged) -> None:
    image = await damaged.reopened()
    await image.survey()
    assert await image.counts() == (4, 0)
    assert image.allocator.free_extents == []
    assert image.allocator.end == damaged.length
    assert image.survey_problem == ""


async def test_leaks_are_used_before_the_file_grows(damaged: Damaged) -> None:
    damaged.set_entry(1, 0)
    end = damaged.length
    image = await damaged.reopened()
    assert await write_clusters(image, 10, 2) == [damaged.data[1], end]
    await image.aclose()
    judged = judge(damaged.storage.content)
    assert (judged.leaks, judged.data) == (0, 5)
    assert judged.content[10 * C : 11 * C] == pattern(C, 10)


async def test_what_is_free_at_the_end_is_cut_off_and_in_the_middle_becomes_a_hole(damaged: Damaged) -> None:
    damaged.set_entry(1, 0)
    damaged.storage.content.extend(pattern(3 * C + 100))
    image = await damaged.reopened()
    await image.begin_allocating()
    await image.aclose()
    assert damaged.length == damaged.data[3] + C
    assert damaged.storage.content[damaged.data[1] : damaged.data[1] + C] == bytes(C)


async def test_a_mount_that_allocates_nothing_changes_nothing(damaged: Damaged) -> None:
    damaged.storage.content.extend(pattern(3 * C + 100))
    before = bytes(damaged.storage.content)
    image = await damaged.reopened()
    await image.survey()
    await image.aclose()
    assert damaged.storage.content == before


@pytest.mark.parametrize("where", ["entry", "l1"])
async def test_no_allocation_comes_to_lie_where_a_dangling_entry_points(damaged: Damaged, where: str) -> None:
    end = damaged.length
    if where == "entry":
        damaged.set_entry(5, end + C)
        damaged.set_entry(6, end + 3 * C)
        forbidden = {end + C, end + 3 * C}
    else:
        damaged.set_l1(3, end + C)
        forbidden = {end + C, end + 2 * C}
    image = await damaged.reopened()
    offsets = await write_clusters(image, 100, 6)
    assert not set(offsets) & forbidden
    for cluster in (5, 6) if where == "entry" else (3 * SPAN,):
        with pytest.raises(CorruptEntry):  # the file is long enough now, but that is nobody's cluster
            await image.run(cluster * C, 1)
    assert image.survey_problem
    await image.aclose()
    again = await open_image(MemoryStorage(damaged.storage.content))
    for i, offset in enumerate(offsets):
        assert (await again.run((100 + i) * C, 1)).offset == offset


async def test_after_a_crash_of_another_program_dangling_entries_are_dropped_durably_first(damaged: Damaged) -> None:
    end = damaged.length
    damaged.set_entry(5, end)
    damaged.set_entry(SPAN + 7, 12345)
    damaged.need_check()
    image = await damaged.reopened()
    offsets = await write_clusters(image, 100, 2)
    assert offsets == [end, end + C]
    repairs = next(i for i, o in enumerate(damaged.storage.log) if o.offset >= end)
    assert "flush" in damaged.storage.kinds()[:repairs]
    await image.aclose()
    judged = judge(damaged.storage.content)  # every entry is valid again
    assert judged.data == 6
    assert not judged.need_check


async def test_a_survey_that_was_cut_short_is_made_again(damaged: Damaged) -> None:
    damaged.set_entry(SPAN + 7, 12345)
    damaged.need_check()
    image = await damaged.reopened()
    gate = damaged.storage.hold("read", lambda offset: offset >= damaged.tables[1])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.survey)
        await gate.arrived()
        nursery.cancel_scope.cancel()
    gate.release()
    await write_clusters(image, 100, 1)
    await image.aclose()
    assert judge(damaged.storage.content).data == 5


@pytest.mark.parametrize("kind", ["misaligned", "below the header", "duplicate", "alias of a table", "two names", "l1"])
async def test_with_any_corruption_nothing_is_reused_or_cut(damaged: Damaged, kind: str) -> None:
    damaged.set_entry(1, 0)  # a leak
    match kind:
        case "misaligned":
            damaged.set_entry(9, damaged.data[0] + 512)
        case "below the header":
            damaged.set_entry(9, 2)
        case "duplicate":
            damaged.set_entry(9, damaged.data[0])
        case "alias of a table":
            damaged.set_entry(9, damaged.tables[1])
        case "two names":
            damaged.set_l1(2, damaged.tables[0])
        case "l1":
            damaged.set_l1(2, 1)
    end = damaged.length
    damaged.storage.content.extend(pattern(2 * C + 700))
    image = await damaged.reopened()
    (offset,) = await write_clusters(image, SPAN + 100, 1)
    assert offset == end + 2 * C
    await image.aclose()
    assert damaged.storage.content[damaged.data[1] : damaged.data[1] + C] == pattern(C, 1)
    assert damaged.storage.content[end : end + 2 * C] == pattern(2 * C + 700)[: 2 * C]


async def test_a_file_cut_in_its_last_cluster_keeps_what_is_left_of_it(damaged: Damaged) -> None:
    """The entry is invalid now; somebody may still want to save the bytes."""
    rest = damaged.length - 512
    del damaged.storage.content[rest:]
    image = await damaged.reopened()
    await image.begin_allocating()
    async with image.pinned(7, 8):
        image.link_zero(7, 1)
    await image.aclose()
    assert damaged.length >= rest
    assert damaged.storage.content[damaged.data[3] : rest] == pattern(C, SPAN)[: C - 512]


async def test_two_l1_entries_of_one_table_are_no_place_to_allocate(damaged: Damaged) -> None:
    """Two objects of one table would overwrite each other's links."""
    damaged.set_l1(2, damaged.tables[0])
    image = await damaged.reopened()
    assert (await image.run(2 * SPAN * C, 1)).offset == damaged.data[0], "it can be read"
    for cluster in (100, 2 * SPAN + 100):
        with pytest.raises(CorruptEntry):
            await write_clusters(image, cluster, 1)
    assert await write_clusters(image, SPAN + 1, 1)


async def test_a_table_that_cannot_be_read_is_left_out_and_nothing_is_reused(damaged: Damaged) -> None:
    damaged.set_entry(1, 0)
    damaged.storage.fail("read", LeafError("leaf.qed", "bad sector"), lambda offset: offset == damaged.tables[1])
    image = await damaged.reopened()
    assert await write_clusters(image, 10, 1) == [damaged.length - C]
    assert "bad sector" in image.survey_problem
    assert await image.counts() == (3, 0)


async def test_a_place_that_no_file_reaches_is_a_full_disk_and_not_a_defect(damaged: Damaged) -> None:
    for i in range(200):
        damaged.set_entry(300 + i, (1 << 63) + i * C)
    image = await damaged.reopened()
    assert await write_clusters(image, 100, 1) == [damaged.length - C]


async def test_qemu_finds_no_new_problem_after_a_mount_of_a_leaky_image(damaged: Damaged, tmp_path: Path) -> None:
    damaged.set_entry(1, 0)
    damaged.storage.content.extend(pattern(5 * C))
    image = await damaged.reopened()
    await write_clusters(image, 100, 3)
    await image.aclose()
    leaf = tmp_path / "leaf.qed"
    leaf.write_bytes(damaged.storage.content)
    assert qemu_check(leaf).status == 0
    assert (await check_image(MemoryStorage(damaged.storage.content, writable=False), repair=False)).consistent


async def test_where_damage_forbids_all_of_the_file_allocations_fail_as_the_fault_of_the_image(
    damaged: Damaged,
) -> None:
    image = await damaged.reopened()
    await image.begin_allocating()
    image.allocator.forbid([(damaged.length, 1 << 64)])
    with pytest.raises(CorruptEntry, match="end of any file"):
        image.allocate(1)
