"""The order in which entries reach the disk, who waits for which commit, and what a failure leaves behind."""

from __future__ import annotations

import struct

import pytest
import trio
import trio.testing

from qedfs.errors import LeafError, LeafFailed, LeafFull
from qedfs.image.geometry import Geometry
from qedfs.image.image import Image, open_image
from tests.image.memory_storage import MemoryStorage
from tests.model.memory_disk import empty_image, pattern, settled
from tests.model.reference import judge

G = Geometry(4096, 1)
"""512 entries a table, 64 a sector, 2 MiB of disk a table."""
C = G.cluster_size
SIZE = 64 << 20
FULL = LeafFull("leaf.qed", "no room (provoked)")


async def new_image() -> tuple[MemoryStorage, Image]:
    """Return an image that has begun to allocate, with an empty log."""
    storage = await empty_image(SIZE, geometry=G, backing=False)
    image = await open_image(storage)
    await image.begin_allocating()
    storage.log.clear()
    return storage, image


async def link(image: Image, *clusters: int) -> None:
    """Put `pattern(C, cluster)` into each cluster and link it."""
    for cluster in clusters:
        async with image.pinned(cluster, cluster + 1):
            extent = image.allocate(1)
            await image.storage.write(extent.offset, pattern(C, cluster))
            image.link_data(cluster, 1, extent.offset)


def story(storage: MemoryStorage, image: Image) -> list[str]:
    """Say in one word each what was done: data, table (whole, zeros), sector N of table, l1, header, flush, ..."""
    tables = {table.offset: table.index for table in image.tables}
    words = []
    for operation in storage.log:
        table = tables.get(operation.offset // C * C)
        if operation.kind != "write":
            words.append(operation.kind)
        elif operation.offset == 0:
            words.append("header")
        elif image.header.l1_table_offset <= operation.offset < image.header.l1_table_offset + G.table_bytes:
            words.append("l1")
        elif table is None:
            words.append("data")
        elif operation.length == C:
            words.append(f"table {table}")
        else:
            words.append(f"sector {operation.offset % C // 512} of {table}")
    return words


def entry(storage: MemoryStorage, image: Image, cluster: int) -> int:
    """Return the entry of a cluster as the file has it, 0 without a table."""
    number: int
    (offset,) = struct.unpack_from("<Q", storage.content, image.header.l1_table_offset + cluster // 512 * 8)
    (number,) = struct.unpack_from("<Q", storage.content, offset + cluster % 512 * 8) if offset else (0,)
    return number


async def test_a_new_table_is_whole_and_durable_before_l1_names_it_and_data_before_both() -> None:
    storage, image = await new_image()
    await link(image, 3)
    await image.commit(durable=True)
    assert story(storage, image) == ["table 0", "data", "flush", "sector 0 of 0", "flush", "l1", "flush"]
    assert judge(storage.durable).content[3 * C : 4 * C] == pattern(C, 3)


async def test_a_table_that_has_its_name_costs_one_flush_less() -> None:
    storage, image = await new_image()
    await link(image, 3)
    await image.commit(durable=False)
    storage.log.clear()
    await link(image, 4, 100, 511)
    await image.commit(durable=False)
    assert story(storage, image) == ["data"] * 3 + ["flush", "sector 0 of 0", "sector 1 of 0", "sector 7 of 0"][:1] + [
        "sector 0 of 0", "sector 7 of 0",
    ]  # fmt: skip
    assert storage.log[-2].length == 1024, "neighbouring sectors are one write"


async def test_an_fsync_with_nothing_to_write_is_one_flush() -> None:
    storage, image = await new_image()
    await image.commit(durable=True)
    assert storage.kinds() == ["flush"]
    await image.commit(durable=False)
    assert storage.kinds() == ["flush"]


async def test_the_first_allocation_is_preceded_by_a_durable_need_check_and_a_clean_close_clears_it() -> None:
    storage = await empty_image(SIZE, geometry=G, backing=False)
    image = await open_image(storage)
    await link(image, 3)
    assert story(storage, image)[:3] == ["header", "flush", "table 0"]
    assert judge(storage.durable).need_check
    await image.aclose()
    assert storage.kinds()[-2:] == ["write", "flush"]
    assert storage.closed
    judged = judge(storage.durable)
    assert (judged.need_check, judged.leaks, judged.data) == (False, 0, 1)


async def test_a_link_made_during_a_commit_is_not_written_by_it() -> None:
    storage, image = await new_image()
    await link(image, 3)
    await image.commit(durable=False)
    await link(image, 4)
    gate = storage.hold("flush")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: image.commit(durable=False))
        await gate.arrived()
        await link(image, 5)  # in the same sector, and no flush has covered its data
        gate.release()
    assert entry(storage, image, 4) > 1
    assert entry(storage, image, 5) == 0
    assert image.pending
    await image.commit(durable=False)
    assert entry(storage, image, 5) > 1


async def test_a_caller_during_a_commit_waits_for_one_that_starts_later_and_shares_it() -> None:
    storage, image = await new_image()
    await link(image, 3)
    gate = storage.hold("flush")
    ended: list[str] = []

    async def commit(name: str) -> None:
        await image.commit(durable=True)
        ended.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(commit, "first")
        await gate.arrived()
        await link(image, 5)
        for name in "abc":
            nursery.start_soon(commit, name)
        await settled()
        assert ended == []
        gate.release()
    assert ended[0] == "first"
    assert sorted(ended[1:]) == ["a", "b", "c"]
    assert entry(storage, image, 5) > 1
    assert storage.kinds().count("flush") == 5, "three for the first commit, two for all the others"


async def test_a_waiter_for_durability_raises_a_queued_commit() -> None:
    storage, image = await new_image()
    await link(image, 3)
    await image.commit(durable=True)
    gate = storage.hold("flush")
    storage.log.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: image.commit(durable=True))
        await gate.arrived()
        await link(image, 5)
        nursery.start_soon(lambda: image.commit(durable=False))
        await settled()
        nursery.start_soon(lambda: image.commit(durable=True))
        await settled()
        gate.release()
    assert story(storage, image) == ["data", "flush", "flush", "sector 0 of 0", "flush"]


@pytest.mark.parametrize("step", ["sector", "l1"])
async def test_a_failed_write_gives_back_every_mark_and_the_next_commit_writes_it_all(step: str) -> None:
    storage, image = await new_image()
    await link(image, 3)
    table = image.tables.get(0)
    assert table is not None
    at = table.offset if step == "sector" else image.header.l1_table_offset
    storage.fail("write", FULL, lambda offset: at <= offset < at + C)
    with pytest.raises(LeafFull):
        await image.commit(durable=True)
    assert not table.evictable
    assert table.pins == 0
    storage.heal()
    storage.log.clear()
    await image.commit(durable=True)
    assert story(storage, image) == ["flush", "sector 0 of 0", "flush", "l1", "flush"]
    assert not image.pending
    assert judge(storage.durable).data == 1


async def test_marks_of_a_failed_commit_and_of_links_meanwhile_add_up() -> None:
    storage, image = await new_image()
    await link(image, 3)
    await image.commit(durable=False)
    await link(image, 4)
    gate = storage.hold("flush")
    storage.fail("write", FULL, lambda offset: offset % C < 512 and offset >= 2 * C)
    async with trio.open_nursery() as nursery:

        async def fails() -> None:
            with pytest.raises(LeafFull):
                await image.commit(durable=False)

        nursery.start_soon(fails)
        await gate.arrived()
        gate.release()
        await settled()
    storage.heal()
    await link(image, 100)
    await image.commit(durable=False)
    assert entry(storage, image, 4) > 1
    assert entry(storage, image, 100) > 1


async def test_a_failed_commit_is_the_answer_of_its_own_callers_only() -> None:
    storage, image = await new_image()
    await link(image, 3)
    gate = storage.hold("write", lambda offset: offset >= 2 * C)
    answers: list[str] = []

    async def commit(name: str) -> None:
        try:
            await image.commit(durable=True)
            answers.append(f"{name} done")
        except LeafFull:
            answers.append(f"{name} failed")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(commit, "first")
        await gate.arrived()
        storage.fail("write", FULL, lambda offset: offset >= 2 * C)
        nursery.start_soon(commit, "second")
        await settled()
        assert answers == []
        original = image.committer._lead  # the fault ends with the first commit

        async def heal(batch: object) -> None:
            storage.heal()
            await original(batch)  # type: ignore[arg-type]

        image.committer._lead = heal  # type: ignore[method-assign]
        gate.release()
    assert answers == ["first failed", "second done"]


async def test_a_failed_flush_latches_the_leaf_for_good_and_leaves_need_check() -> None:
    storage, image = await new_image()
    await link(image, 3)
    storage.fail("flush", LeafError("leaf.qed", "I/O error"))
    with pytest.raises(LeafFailed, match="I/O error"):
        await image.commit(durable=True)
    storage.heal()
    written = len(storage.log)
    with pytest.raises(LeafFailed):
        await image.commit(durable=False)
    with pytest.raises(LeafFailed):
        await image.aclose()
    assert len(storage.log) == written, "nothing more is written"
    assert storage.closed
    assert judge(storage.content).need_check


async def test_an_unexpected_failure_is_not_told_as_success_to_those_who_share_the_commit() -> None:
    storage, image = await new_image()
    await link(image, 3)
    gate = storage.hold("flush")
    answers: list[str] = []

    async def commit() -> None:
        try:
            await image.commit(durable=True)
            answers.append("done")
        except (ZeroDivisionError, LeafError):
            answers.append("failed")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(commit)
        await gate.arrived()
        await link(image, 4)
        nursery.start_soon(commit)
        nursery.start_soon(commit)
        await settled()
        storage.fail("flush", ZeroDivisionError("a defect"))
        gate.release()
    assert answers == ["failed"] * 3


async def test_a_caller_that_is_cancelled_carries_the_commit_of_the_others_to_its_end() -> None:
    storage, image = await new_image()
    await link(image, 3)
    gate = storage.hold("flush")
    scope = trio.CancelScope()

    async def leader() -> None:
        with scope:
            await image.commit(durable=True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(leader)
        await gate.arrived()
        scope.cancel()
        nursery.start_soon(lambda: image.commit(durable=True))
        await settled()
        gate.release()
    assert judge(storage.durable).data == 1


async def test_a_table_stays_in_memory_while_a_commit_writes_it_and_until_l1_names_it() -> None:
    storage, image = await new_image()
    image.tables._capacity = 2
    await link(image, 0)
    table = image.tables.get(0)
    assert table is not None
    gate = storage.hold("write", lambda offset: offset == image.header.l1_table_offset)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: image.commit(durable=False))
        await gate.arrived()
        await link(image, *(512 * i for i in range(1, 8)))
        await link(image, 1)
        assert image.tables.get(0) is table
        gate.release()
    await image.commit(durable=True)
    for i in range(8, 16):
        await image.run(512 * i * C, 1)
    await link(image, *(512 * i for i in range(8, 16)))
    await image.aclose()
    judged = judge(storage.durable)
    assert judged.data == 17
    assert judged.leaks == 0
    for cluster in (0, 1, 512, 512 * 15):
        assert judged.content[cluster * C : (cluster + 1) * C] == pattern(C, cluster)


async def test_links_survive_whatever_is_evicted_while_they_are_on_their_way() -> None:
    """A table that is evicted and loaded again during a commit would have lost what the commit still writes."""
    storage, image = await new_image()
    await link(image, *(512 * i for i in range(6)))
    await image.aclose()
    image = await open_image(storage)
    image.tables._capacity = 1
    await link(image, 1)
    for i in range(1, 6):  # while its entry waits for a commit
        await image.run(512 * i * C, 1)
    gate = storage.hold("flush")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: image.commit(durable=False))
        await gate.arrived()
        for i in range(1, 6):  # and while the commit holds it
            await image.run(512 * i * C, 1)
        await link(image, 2)
        gate.release()
    await image.aclose()
    judged = judge(storage.durable)
    assert judged.data == 8
    for cluster in (0, 1, 2, 512):
        assert judged.content[cluster * C : (cluster + 1) * C] == pattern(C, cluster)
