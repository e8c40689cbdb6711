"""The scenarios of docs/concurrency.md, in its order, and traps met on the way."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
import trio
import trio.testing

from qedfs.errors import CorruptEntry
from qedfs.image.tables import State
from tests.model.fake_source import FakeSource
from tests.model.memory_disk import SMALL, empty_image, memory_disk, pattern, settled
from tests.model.reference import judge

Expect = Callable[[str], None]
C = SMALL.cluster_size
MIB = 1 << 20
BASE = pattern(16 * C)


async def state_of(image_disk: object, cluster: int) -> State:
    return (await image_disk.image.run(cluster * C, 1)).state  # type: ignore[attr-defined, no-any-return]


async def test_a_read_that_began_before_a_write_may_be_old_but_its_copy_does_not_undo_the_write() -> None:
    storage = await empty_image(16 * C)
    async with memory_disk(storage, BASE) as rig:
        gate = rig.source.hold()
        got: list[bytes] = []
        async with trio.open_nursery() as nursery:

            async def reader() -> None:
                got.append(bytes(await rig.disk.read(7 * C, C)))

            nursery.start_soon(reader)
            await gate.arrived()
            nursery.start_soon(rig.disk.write, 7 * C + 100, b"new")
            await settled()
            assert rig.source.requests == [(7 * C, C)], "the writer joins the reader's fetch"
            gate.release()
        assert got == [BASE[7 * C : 8 * C]]
        await settled()
        expected = BASE[7 * C : 7 * C + 100] + b"new" + BASE[7 * C + 103 : 8 * C]
        assert bytes(await rig.disk.read(7 * C, C)) == expected
    assert judge(storage.content, BASE).content[7 * C : 8 * C] == expected


async def test_a_write_that_comes_while_the_copy_is_on_its_way_lands_on_top_of_it() -> None:
    storage = await empty_image(16 * C)
    async with memory_disk(storage, BASE) as rig:
        await rig.disk.write(0, b"x")  # the table is made
        gate = storage.hold("write")
        assert bytes(await rig.disk.read(7 * C, C)) == BASE[7 * C : 8 * C], "the answer does not wait for the copy"
        await gate.arrived()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.disk.write, 7 * C, b"new")
            await settled()
            assert gate.waiting == 1, "the writer waits for the claim"
            requests = list(rig.source.requests)
            gate.release()
        assert rig.source.requests == requests, "and fetches nothing"
        assert bytes(await rig.disk.read(7 * C, C)) == b"new" + BASE[7 * C + 3 : 8 * C]
    assert judge(storage.content, BASE).leaks == 0


async def test_a_copy_leaves_claimed_clusters_to_the_writer() -> None:
    storage = await empty_image(16 * C)
    async with memory_disk(storage, BASE) as rig:
        await rig.disk.write(0, b"x")
        table = rig.image.tables.get(0)
        assert table is not None
        gate = storage.hold("write")
        storage.nowait = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.disk.write, 7 * C, pattern(C, 7))
            await gate.arrived()
            await rig.disk.read(6 * C, C)
            await rig.disk.read(8 * C, 2 * C)
            await settled()
            gate.release()
        await settled()
        assert [table.entries[i] > 1 for i in range(6, 10)] == [True] * 4
        assert bytes(await rig.disk.read(6 * C, 4 * C)) == BASE[6 * C : 7 * C] + pattern(C, 7) + BASE[8 * C : 10 * C]


async def test_a_copy_takes_all_it_can_at_once_so_that_a_later_claim_does_not_meet_it() -> None:
    """A copy of 6-9 finds 7 claimed; while it writes 6, a writer comes for 8."""
    storage = await empty_image(16 * C)
    async with memory_disk(storage, BASE) as rig:
        await rig.disk.write(0, b"x")
        fetch = rig.source.hold(lambda pos: pos == 6 * C)
        writes = storage.hold("write")
        storage.nowait = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.disk.read, 6 * C, 4 * C)
            await fetch.arrived()
            nursery.start_soon(rig.disk.write, 7 * C, pattern(C, 7))
            await writes.arrived()
            fetch.release()
            await settled()
            nursery.start_soon(rig.disk.write, 8 * C, pattern(C, 8))
            await settled()
            writes.release()
        await settled()
        assert bytes(await rig.disk.read(6 * C, 4 * C)) == (
            BASE[6 * C : 7 * C] + pattern(C, 7) + pattern(C, 8) + BASE[9 * C : 10 * C]
        )
    assert judge(storage.content, BASE).leaks == 0


async def test_promised_zeros_are_linked_although_a_claim_comes_in_between() -> None:
    base = bytes(16 * C)
    storage = await empty_image(16 * C)
    source = FakeSource(base)
    source.promises = True
    async with memory_disk(storage, source) as rig:
        writes = storage.hold("write", lambda offset: offset > 0)
        storage.nowait = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.disk.write, 7 * C, pattern(C, 7))
            await writes.arrived()
            rig.disk.prefetch(6 * C, 4 * C)
            await settled()
            nursery.start_soon(rig.disk.write, 8 * C, pattern(C, 8))
            await settled()
            writes.release()
        await settled()
        assert [await state_of(rig, c) for c in (6, 7, 8, 9)] == [State.ZERO, State.DATA, State.DATA, State.ZERO]


async def test_a_read_after_a_write_sees_it_even_while_a_fetch_of_the_cluster_is_on_its_way() -> None:
    storage = await empty_image(16 * C)
    async with memory_disk(storage, BASE) as rig:
        gate = rig.source.hold()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.disk.read, 7 * C, C)
            await gate.arrived()
            await rig.disk.write(7 * C, pattern(C, 1))
            assert bytes(await rig.disk.read(7 * C, C)) == pattern(C, 1)
            gate.release()
        await settled()
        assert bytes(await rig.disk.read(7 * C, C)) == pattern(C, 1)


async def test_two_partial_writes_to_one_cluster_both_survive_in_one_cluster() -> None:
    storage = await empty_image(16 * C)
    async with memory_disk(storage, BASE) as rig:
        gate = rig.source.hold()
        async with trio.open_nursery() as nursery:
            for i in range(4):
                nursery.start_soon(rig.disk.write, 3 * C + 1000 * i, bytes([65 + i]) * 10)
            await gate.arrived()
            await settled()
            gate.release()
        assert len(rig.source.requests) == 1
    judged = judge(storage.content, BASE)
    expected = bytearray(BASE)
    for i in range(4):
        expected[3 * C + 1000 * i : 3 * C + 1000 * i + 10] = bytes([65 + i]) * 10
    assert judged.content == expected
    assert (judged.data, judged.leaks) == (1, 0)


async def test_the_last_reader_to_leave_cancels_the_fetch_and_others_keep_waiting() -> None:
    storage = await empty_image(16 * C)
    async with memory_disk(storage, BASE) as rig:
        gate = rig.source.hold()
        got: list[bytes] = []

        async def reader() -> None:
            got.append(bytes(await rig.disk.read(0, C)))

        async with trio.open_nursery() as nursery:
            leaving, staying = trio.CancelScope(), trio.CancelScope()

            async def scoped(scope: trio.CancelScope) -> None:
                with scope:
                    await reader()

            nursery.start_soon(scoped, leaving)
            nursery.start_soon(scoped, staying)
            await gate.arrived()
            await settled()
            leaving.cancel()
            await settled()
            assert gate.waiting == 1
            staying.cancel()
            await settled()
            assert gate.waiting == 0, "nobody wants it any more"
            nursery.start_soon(reader)
            await settled()
            assert len(rig.source.requests) == 2, "a later reader starts afresh"
            gate.release()
        assert got == [BASE[:C]]


async def test_a_reader_of_two_fetches_is_not_left_alone_when_the_other_reader_of_the_second_leaves() -> None:
    storage = await empty_image(4 * MIB)
    base = pattern(4 * MIB)
    async with memory_disk(storage, base) as rig:
        gate = rig.source.hold()
        got: list[bytes] = []

        async def both() -> None:
            got.append(bytes(await rig.disk.read(0, 2 * MIB)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(both)
            await gate.arrived()
            await settled()
            with trio.move_on_after(0) as leaving:
                await rig.disk.read(MIB, C)
            assert leaving.cancelled_caught
            await settled()
            gate.release()
        assert got == [base[: 2 * MIB]]
        assert sorted(rig.source.requests) == [(0, MIB), (MIB, MIB)]


async def test_a_reader_of_two_fetches_that_leaves_ends_both() -> None:
    storage = await empty_image(4 * MIB)
    async with memory_disk(storage, pattern(4 * MIB)) as rig:
        gate = rig.source.hold()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.disk.read, 0, 2 * MIB)
            await settled()
            assert gate.waiting == 2
            nursery.cancel_scope.cancel()
        await settled()
        assert gate.waiting == 0


async def test_a_failed_fetch_tells_each_waiter_by_itself_and_the_next_reader_starts_afresh(
    expected_warnings: Expect,
) -> None:
    expected_warnings("broken there")
    storage = await empty_image(16 * C)
    source = FakeSource(BASE)
    async with memory_disk(storage, source) as rig:
        gate = source.hold()
        source.error = CorruptEntry("base", "broken there")
        errors: list[CorruptEntry] = []

        async def reader() -> None:
            with pytest.raises(CorruptEntry) as caught:
                await rig.disk.read(0, C)
            errors.append(caught.value)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            nursery.start_soon(reader)
            await settled()
            gate.release()
        assert len(errors) == 2
        assert errors[0] is not errors[1]
        source.error = None
        assert bytes(await rig.disk.read(0, C)) == BASE[:C]


async def test_damage_within_the_readahead_does_not_fail_the_read_in_front_of_it() -> None:
    storage = await empty_image(64 * C)
    async with memory_disk(storage, pattern(64 * C)) as rig:
        await rig.disk.write(5 * C, pattern(C, 5))
        table = rig.image.tables.get(0)
        assert table is not None
    struct.pack_into("<Q", storage.content, table.offset + 5 * 8, 12345)
    async with memory_disk(storage, pattern(64 * C), readahead=16 * C) as rig:
        for cluster in range(5):
            assert bytes(await rig.disk.read(cluster * C, C)) == pattern(64 * C)[cluster * C : (cluster + 1) * C]


async def test_links_after_an_idle_fsync_are_still_committed_by_age(autojump_clock: trio.testing.MockClock) -> None:
    storage = await empty_image(16 * C)
    async with memory_disk(storage, BASE) as rig:
        await rig.disk.write(0, pattern(C, 1))
        await rig.disk.flush()
        await trio.sleep(5)
        await rig.disk.flush()  # while the background waits for something to commit
        await rig.disk.write(C, pattern(C, 2))
        assert rig.image.pending
        await trio.sleep(5)
        assert not rig.image.pending


async def test_a_hole_made_of_reused_clusters_at_the_end_is_whole_in_the_file() -> None:
    """Leaked clusters at the end are taken first; what does not fit into them must make the file longer."""
    storage = await empty_image(16 * C)
    async with memory_disk(storage, BASE) as rig:
        await rig.disk.write(0, pattern(C, 1))
    storage.content.extend(pattern(C, 9))  # a leak
    async with memory_disk(storage, BASE) as rig:
        await rig.disk.write(4 * C, bytes(4 * C))
        assert rig.storage.length() % C == 0
    judged = judge(storage.content, BASE)
    assert judged.content[4 * C : 8 * C] == bytes(4 * C)
    assert judged.leaks == 0


async def test_a_hole_over_trailing_junk_is_whole_in_the_file_and_zero() -> None:
    storage = await empty_image(16 * C)
    async with memory_disk(storage, BASE) as rig:
        await rig.disk.write(0, pattern(C, 1))
    storage.content.extend(pattern(1000, 9))
    async with memory_disk(storage, BASE) as rig:
        await rig.disk.write(4 * C, bytes(C))
    assert judge(storage.content, BASE).content[4 * C : 5 * C] == bytes(C)
