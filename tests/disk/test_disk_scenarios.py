"""The scenarios of docs/concurrency.md, in its order, and traps met on the way."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
import trio
import trio.testing

from qedfs.config import Mode
from qedfs.errors import BackingUnavailable, CorruptEntry, LeafError, LeafFailed, LeafFull
from qedfs.image.geometry import Geometry
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


async def test_a_read_that_began_while_nothing_was_copied_copies_nothing_when_that_changes() -> None:
    """A copy of the kind made for large clusters would write a megabyte over what lies behind a small one."""
    storage = await empty_image(16 * C)
    async with memory_disk(storage, BASE, mode=Mode.COW) as rig:
        gate = rig.source.hold(lambda pos: pos == 7 * C)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.disk.read, 7 * C, C)
            await gate.arrived()
            await rig.disk.set_mode(Mode.COR)
            gate.release()
        again = rig.source.hold(lambda pos: pos == 7 * C)
        await settled()
        await rig.disk.write(9 * C, pattern(C, 9))
        again.release()
        await settled()
        assert await state_of(rig, 7) is State.BACKING
        assert bytes(await rig.disk.read(9 * C, C)) == pattern(C, 9)


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


async def test_a_copy_that_fails_does_not_fail_the_read_and_copies_rest_for_a_while(
    autojump_clock: trio.testing.MockClock, expected_warnings: Expect
) -> None:
    expected_warnings("I/O error")
    storage = await empty_image(16 * C)
    async with memory_disk(storage, BASE) as rig:
        await rig.disk.write(0, pattern(C, 1))
        storage.fail("write", LeafError("leaf.qed", "I/O error"))
        assert bytes(await rig.disk.read(3 * C, C)) == BASE[3 * C : 4 * C]
        await settled()
        assert await state_of(rig, 3) is State.BACKING
        assert "I/O error" in rig.disk.statistics().last_error
        storage.heal()
        assert bytes(await rig.disk.read(3 * C, C)) == BASE[3 * C : 4 * C]
        await settled()
        assert await state_of(rig, 3) is State.BACKING, "resting"
        await trio.sleep(6)
        await rig.disk.read(3 * C, C)
        await settled()
        assert await state_of(rig, 3) is State.DATA
    assert judge(storage.content, BASE).leaks == 1, "the extent whose write ended in doubt was not used again"


async def test_a_read_gives_up_an_unreachable_backing_in_time_and_a_write_waits_for_it(
    autojump_clock: trio.testing.MockClock, expected_warnings: Expect
) -> None:
    expected_warnings("unreachable for 10 s")
    storage = await empty_image(16 * C)
    source = FakeSource(BASE)
    source.error = BackingUnavailable("fake", "no route")
    async with memory_disk(storage, source, backing_timeout=10) as rig:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.disk.write, 5 * C + 1, b"x")
            with pytest.raises(BackingUnavailable):
                await rig.disk.read(3 * C, C)
            await rig.disk.write(7 * C, pattern(C, 7))
            assert bytes(await rig.disk.read(7 * C, C)) == pattern(C, 7), "local clusters stay readable"
            source.error = None
        assert bytes(await rig.disk.read(5 * C, 3)) == BASE[5 * C : 5 * C + 1] + b"x" + BASE[5 * C + 2 : 5 * C + 3]


@pytest.mark.parametrize("geometry", [SMALL, Geometry(4 << 20, 1)])
async def test_a_write_gives_up_an_unreachable_backing_if_it_was_told_to(
    geometry: Geometry, autojump_clock: trio.testing.MockClock, expected_warnings: Expect
) -> None:
    expected_warnings("unreachable for 8 s, given up for this write")
    size = geometry.cluster_size
    base = pattern(2 * size)
    source = FakeSource(base)
    source.error = BackingUnavailable("fake", "no route")
    async with memory_disk(await empty_image(2 * size, geometry=geometry), source, write_timeout=8) as rig:
        began = trio.current_time()
        with pytest.raises(BackingUnavailable, match="given up for this write"):
            await rig.disk.write(5, b"x")
        assert trio.current_time() - began == pytest.approx(8)
        await rig.disk.write(size, pattern(size, 1))  # needs nothing of it
        source.error = None
        await rig.disk.write(7, b"y")
        assert bytes(await rig.disk.read(0, 16)) == base[:7] + b"y" + base[8:16]


async def test_the_kernel_that_asks_for_a_page_of_what_was_given_up_need_not_wait_again(
    autojump_clock: trio.testing.MockClock, expected_warnings: Expect
) -> None:
    """It does so after each read-ahead that failed; the guest's one read would take twice the time."""
    expected_warnings("unreachable for 10 s")
    source = FakeSource(BASE)
    source.error = BackingUnavailable("fake", "no route")
    async with memory_disk(await empty_image(16 * C), source, backing_timeout=10) as rig:

        async def waited(pos: int, length: int) -> float:
            began = trio.current_time()
            with pytest.raises(BackingUnavailable, match="unreachable for 10 s, given up for this read"):
                await rig.disk.read(pos, length)
            return trio.current_time() - began

        await rig.disk.write(4 * C, bytes(C))
        assert await waited(0, 8 * C) == pytest.approx(10)
        assert [await waited(pos, 512) for pos in (0, 6 * C)] == [0, 0]
        assert bytes(await rig.disk.read(4 * C, C)) == bytes(C)
        assert await waited(8 * C, C) == pytest.approx(10)
        assert await waited(0, 512) == pytest.approx(10), "that is another read by now"
        for _ in range(3):
            assert await waited(0, 512) == 0
            await trio.sleep(0.02)
        source.error = None
        assert bytes(await rig.disk.read(0, 512)) == BASE[:512], "asking again and again does not keep it away"


async def test_growth_over_a_longer_backing_shows_zeros_whatever_is_on_its_way() -> None:
    """The old end lies inside a cluster that is being fetched and copied for the old size."""
    base = pattern(16 * C)
    storage = await empty_image(10 * C + 512)
    async with memory_disk(storage, base) as rig:
        gate = rig.source.hold()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.disk.read, 10 * C, 512)
            await gate.arrived()
            nursery.start_soon(rig.disk.grow, 14 * C)
            await settled()
            gate.release()
        await settled()
        assert rig.disk.size == 14 * C
        assert bytes(await rig.disk.read(10 * C, 4 * C)) == base[10 * C :][:512] + bytes(4 * C - 512)
    judged = judge(storage.content, base)
    assert judged.content == base[: 10 * C + 512] + bytes(4 * C - 512)


async def test_writers_past_the_end_grow_the_disk_once_each_and_lose_nothing() -> None:
    storage = await empty_image(C)
    async with memory_disk(storage, BASE) as rig:
        async with trio.open_nursery() as nursery:
            for i in (5, 3, 4, 9):
                nursery.start_soon(rig.disk.write, i * C + 100, pattern(50, i))
        assert rig.disk.size == 9 * C + 512
        content = bytes(await rig.disk.read(0, rig.disk.size))
    expected = bytearray(BASE[:C] + bytes(8 * C + 512))
    for i in (5, 3, 4, 9):
        expected[i * C + 100 : i * C + 150] = pattern(50, i)
    assert content == expected
    assert judge(storage.content, BASE).content == expected


async def test_a_growth_that_fails_keeps_the_old_size_is_told_and_can_be_repeated(expected_warnings: Expect) -> None:
    expected_warnings("no room")
    storage = await empty_image(10 * C + 512)
    async with memory_disk(storage, BASE) as rig:
        await rig.disk.write(0, b"x")
        storage.fail("write", LeafFull("leaf.qed", "no room"), lambda offset: offset == 0)
        with pytest.raises(LeafFull):
            await rig.disk.grow(14 * C)
        assert rig.disk.size == 10 * C + 512
        assert "no room" in rig.disk.statistics().last_error
        storage.heal()
        await rig.disk.grow(14 * C)
        assert bytes(await rig.disk.read(10 * C, 9 * C)) == BASE[10 * C :][:512] + bytes(4 * C - 512)


async def test_after_a_failed_flush_writes_are_refused_and_reads_go_on(expected_warnings: Expect) -> None:
    expected_warnings("may be lost")
    storage = await empty_image(16 * C)
    async with memory_disk(storage, BASE, close=False) as rig:
        await rig.disk.write(0, pattern(C, 1))
        storage.fail("flush", LeafError("leaf.qed", "I/O error"))
        with pytest.raises(LeafFailed):
            await rig.disk.flush()
        storage.heal()
        for request in (rig.disk.write(0, b"x"), rig.disk.flush(), rig.disk.grow(20 * C)):
            with pytest.raises(LeafFailed):
                await request
        assert not rig.disk.write_nowait(0, b"x")
        assert bytes(await rig.disk.read(0, 2 * C)) == pattern(C, 1) + BASE[C : 2 * C]
        assert rig.disk.statistics().state == "failed"
    with pytest.raises(LeafFailed):
        await rig.image.aclose()
    assert storage.closed


async def test_the_end_waits_for_copies_under_way_and_drops_fetches() -> None:
    storage = await empty_image(16 * C)
    source = FakeSource(BASE)
    async with memory_disk(storage, source) as rig:
        await rig.disk.write(0, pattern(C, 1))
        await rig.disk.read(3 * C, C)
        rig.disk.prefetch(8 * C, 4 * C)
        source.hold(lambda pos: pos >= 8 * C)
    judged = judge(storage.content, BASE)
    assert (judged.data, judged.leaks, judged.need_check) == (2, 0, False)
    assert judged.content == pattern(C, 1) + BASE[C:]


@pytest.mark.parametrize("steps", range(0, 40, 3))
async def test_a_write_cancelled_at_any_point_leaves_old_or_new_and_no_claim(steps: int) -> None:
    storage = await empty_image(16 * C)
    storage.nowait = False
    async with memory_disk(storage, BASE) as rig:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.disk.write, 3 * C + 100, b"new")
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        content = bytes(await rig.disk.read(3 * C + 100, 3))
        assert content in (b"new", BASE[3 * C + 100 : 3 * C + 103])
        await rig.disk.write(3 * C, pattern(C, 3))
    assert judge(storage.content, BASE).content[3 * C : 4 * C] == pattern(C, 3)


async def test_a_disk_that_closes_while_it_begins_to_allocate_is_clean_afterwards() -> None:
    storage = await empty_image(16 * C)

    async def release_later() -> None:
        await settled()
        gate.release()

    source = FakeSource(bytes(16 * C))
    source.promises = True  # so that the first to allocate is not a copy, which is carried to its end anyway
    async with trio.open_nursery() as nursery, memory_disk(storage, source) as rig:
        gate = storage.hold("flush")
        rig.disk.prefetch(0, C)
        await gate.arrived()
        nursery.start_soon(release_later)
    assert not judge(storage.content, BASE).need_check
