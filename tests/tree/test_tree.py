from __future__ import annotations

import errno
import os
import stat

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from qedfs.errors import QedfsError, ReadOnly, UsageError
from qedfs.tree.errors import AttributeAccess, Gone, NoSuchAttribute, NoSuchFile, NotPermitted
from qedfs.tree.tree import ROOT, Tree
from tests.tree.tree_fakes import FakeDisk, leaf_of


def test_a_leaf_is_a_regular_file_with_the_rights_of_its_image() -> None:
    tree = Tree()
    tree.add(leaf_of("vm.raw", FakeDisk(size=1 << 20), mode=0o104640, uid=12, gid=34, mtime_ns=56))
    status = tree.lookup(ROOT, b"vm.raw")
    assert status.mode == stat.S_IFREG | 0o640
    assert (status.uid, status.gid, status.size, status.nlink) == (12, 34, 1 << 20, 1)
    assert (status.mtime_ns, status.ctime_ns) == (56, 56)


@pytest.mark.parametrize(("allocated", "blocks"), [(0, 1), (512, 1), (513, 2), (1 << 20, 2048)])
def test_blocks_count_what_is_allocated_and_are_never_none(allocated: int, blocks: int) -> None:
    tree = Tree()
    disk = FakeDisk()
    disk.allocated = allocated
    tree.add(leaf_of("vm.raw", disk))
    assert tree.lookup(ROOT, b"vm.raw").blocks == blocks


def test_a_name_is_taken_once() -> None:
    tree = Tree()
    tree.add(leaf_of("vm.raw", FakeDisk()))
    with pytest.raises(UsageError, match=r"already served as vm\.raw"):
        tree.add(leaf_of("vm.raw", FakeDisk()))


def test_an_unknown_name_is_not_found() -> None:
    tree = Tree()
    tree.add(leaf_of("vm.raw", FakeDisk()))
    with pytest.raises(NoSuchFile):
        tree.lookup(ROOT, b"other")
    with pytest.raises(NoSuchFile):
        tree.lookup(tree.lookup(ROOT, b"vm.raw").inode, b"vm.raw")
    with pytest.raises(NoSuchFile):
        tree.remove("other")


def test_names_may_be_any_bytes() -> None:
    tree = Tree()
    tree.add(leaf_of(os.fsdecode(b"\xff\xfe.raw"), FakeDisk()))
    assert tree.lookup(ROOT, b"\xff\xfe.raw").size
    assert [name for name, _ in tree.entries(ROOT)] == [b"\xff\xfe.raw"]


def test_an_inode_is_never_used_again() -> None:
    tree = Tree()
    tree.add(leaf_of("vm.raw", FakeDisk()))
    first = tree.lookup(ROOT, b"vm.raw").inode
    tree.remove("vm.raw")
    tree.forget(first, 1)
    tree.add(leaf_of("vm.raw", FakeDisk()))
    assert tree.lookup(ROOT, b"vm.raw").inode != first


@given(st.lists(st.sampled_from(["add", "remove", "list"]), max_size=40))
def test_a_listing_in_pieces_neither_skips_nor_repeats_what_stays(steps: list[str]) -> None:
    tree = Tree()
    names = [f"stays{i}" for i in range(3)]
    for name in names:
        tree.add(leaf_of(name, FakeDisk()))
    seen: list[bytes] = []
    after = ROOT
    others: list[str] = []
    for number, step in enumerate(steps):
        if step == "add":
            others.append(f"other{number}")
            tree.add(leaf_of(others[-1], FakeDisk()))
        elif step == "remove" and others:
            tree.remove(others.pop(0))
        elif step == "list" and (entry := next(tree.entries(after), None)):
            seen.append(entry[0])
            after = entry[1].inode
    seen += [name for name, _ in tree.entries(after)]
    assert [os.fsdecode(name) for name in seen if name.startswith(b"stays")] == names
    assert len(set(seen)) == len(seen)


def test_a_removed_leaf_stays_usable_until_the_last_close() -> None:
    tree = Tree()
    leaf = leaf_of("vm.raw", FakeDisk())
    tree.add(leaf)
    inode = tree.lookup(ROOT, b"vm.raw").inode
    first, second = tree.open(inode, os.O_RDWR).handle, tree.open(inode, os.O_RDONLY).handle
    assert tree.remove("vm.raw") is leaf
    assert tree.leaves == []
    assert tree.disks[first] is leaf.disk
    assert tree.status(inode).nlink == 0
    tree.close(first)
    third = tree.open(inode, os.O_RDONLY).handle
    tree.close(second)
    tree.close(third)
    with pytest.raises(Gone):
        tree.status(inode)
    with pytest.raises(Gone):
        tree.open(inode, os.O_RDONLY)
    assert not tree.disks


async def test_wait_closed_waits_for_handles_and_for_requests_under_way(autojump_clock: trio.testing.MockClock) -> None:
    tree = Tree()
    disk = FakeDisk()
    leaf = leaf_of("vm.raw", disk)
    tree.add(leaf)
    inode = tree.lookup(ROOT, b"vm.raw").inode
    handle = tree.open(inode, os.O_RDWR).handle
    disk.counting = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tree.read_attribute, inode, b"user.qedfs.progress")
        await trio.testing.wait_all_tasks_blocked()
        tree.remove("vm.raw")
        tree.close(handle)
        with trio.move_on_after(60) as waiting:
            await tree.wait_closed(leaf)
        assert waiting.cancelled_caught
        disk.counting.set()
        await tree.wait_closed(leaf)
    tree.forget(inode, 1)
    await tree.wait_closed(leaf)


async def test_wait_closed_of_a_leaf_that_nobody_uses_returns_at_once() -> None:
    tree = Tree()
    leaf = leaf_of("vm.raw", FakeDisk())
    tree.add(leaf)
    tree.remove("vm.raw")
    with trio.fail_after(5):
        await tree.wait_closed(leaf)


async def test_close_all_frees_everything_when_the_kernel_is_gone() -> None:
    tree = Tree()
    leaf = leaf_of("vm.raw", FakeDisk())
    tree.add(leaf)
    tree.open(tree.lookup(ROOT, b"vm.raw").inode, os.O_RDWR)
    tree.remove("vm.raw")
    tree.close_all()
    with trio.fail_after(5):
        await tree.wait_closed(leaf)
    assert not tree.disks


def test_a_removal_is_announced_with_name_and_inode() -> None:
    tree = Tree()
    tree.add(leaf_of("vm.raw", FakeDisk()))
    inode = tree.lookup(ROOT, b"vm.raw").inode
    tree.remove("vm.raw")
    assert tree.removals.receive_nowait() == (b"vm.raw", inode)


def test_forgetting_what_nobody_knows_is_harmless() -> None:
    Tree().forget(99, 5)
    Tree().close(99)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
def test_o_trunc_is_refused(flags: int) -> None:
    tree = Tree()
    tree.add(leaf_of("vm.raw", FakeDisk()))
    with pytest.raises(NotPermitted) as caught:
        tree.open(tree.lookup(ROOT, b"vm.raw").inode, flags | os.O_TRUNC)
    assert caught.value.errno == errno.EPERM


async def test_a_read_only_leaf_is_opened_for_reading_only() -> None:
    tree = Tree()
    tree.add(leaf_of("vm.raw", FakeDisk(read_only=True)))
    inode = tree.lookup(ROOT, b"vm.raw").inode
    for flags in (os.O_WRONLY, os.O_RDWR):
        with pytest.raises(ReadOnly):
            tree.open(inode, flags)
    with pytest.raises(ReadOnly):
        await tree.resize(inode, tree.status(inode).size)
    assert tree.open(inode, os.O_RDONLY)


async def test_resize_grows_and_leaves_the_present_size_alone() -> None:
    tree = Tree()
    disk = FakeDisk(size=1024)
    tree.add(leaf_of("vm.raw", disk))
    inode = tree.lookup(ROOT, b"vm.raw").inode
    await tree.resize(inode, 1024)
    assert disk.calls == []
    await tree.resize(inode, 2048)
    assert disk.calls == [("grow", 2048)]
    for wrong in (512, 2049):
        with pytest.raises(UsageError):
            await tree.resize(inode, wrong)


def test_times_that_the_kernel_sets_are_shown() -> None:
    tree = Tree()
    tree.add(leaf_of("vm.raw", FakeDisk(), mtime_ns=1))
    inode = tree.lookup(ROOT, b"vm.raw").inode
    tree.set_times(inode, atime=None, mtime=7, ctime=8)
    assert tree.status(inode)[-3:] == (1, 7, 8)


async def test_the_directory_has_the_attributes_it_was_given_read_anew_each_time() -> None:
    values = iter([b"one", b"two"])
    tree = Tree(root_attributes={"status": lambda: next(values)})
    assert tree.attribute_names(ROOT) == [b"user.qedfs.status"]
    assert await tree.read_attribute(ROOT, b"user.qedfs.status") == b"one"
    assert await tree.read_attribute(ROOT, b"user.qedfs.status") == b"two"
    with pytest.raises(NoSuchAttribute):
        await tree.read_attribute(ROOT, b"user.qedfs.mode")
    with pytest.raises(NoSuchAttribute):
        await tree.write_attribute(ROOT, b"user.qedfs.mode", b"cow", 0)
    with pytest.raises(AttributeAccess):
        await tree.write_attribute(ROOT, b"user.qedfs.status", b"x", 0)
    with pytest.raises(AttributeAccess):
        tree.remove_attribute(ROOT, b"user.qedfs.status")


async def test_an_error_of_the_disk_passes_unchanged() -> None:
    tree = Tree()
    disk = FakeDisk()
    tree.add(leaf_of("vm.raw", disk))
    disk.failure = QedfsError("vm", "a test")
    with pytest.raises(QedfsError, match="a test"):
        await tree.read_attribute(tree.lookup(ROOT, b"vm.raw").inode, b"user.qedfs.progress")


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_DSYNC])
@pytest.mark.parametrize("direct", [0, os.O_DIRECT])
def test_what_is_opened_while_held_caches_nothing(held: bool, flags: int, direct: int) -> None:
    tree = Tree()
    tree.add(leaf_of("vm.raw", FakeDisk(held=held)))
    opened = tree.open(tree.lookup(ROOT, b"vm.raw").inode, flags | direct)
    assert opened.uncached == (held and not direct)


async def test_writes_through_an_uncached_handle_are_flushed_for_as_long_as_it_lives() -> None:
    tree = Tree()
    disk = FakeDisk(held=True)
    tree.add(leaf_of("vm.raw", disk))
    inode = tree.lookup(ROOT, b"vm.raw").inode
    uncached, direct = tree.open(inode, os.O_RDWR), tree.open(inode, os.O_RDWR | os.O_DIRECT)
    await tree.write_attribute(inode, b"user.qedfs.hold", b"0", 0)
    disk.calls.clear()
    for handle in (uncached.handle, direct.handle, tree.open(inode, os.O_RDWR).handle):
        through = tree.disks[handle]
        if not through.write_nowait(0, b"x"):
            await through.write(0, b"x")
    assert disk.calls == [("write", 0, b"x"), ("flush",), ("write", 0, b"x"), ("write", 0, b"x")]


async def test_the_pages_of_the_inode_that_is_released_are_dropped() -> None:
    dropped: list[int] = []

    async def drop(inode: int) -> None:
        dropped.append(inode)

    tree = Tree(drop_pages=drop)
    for name in ("a.raw", "b.raw"):
        tree.add(leaf_of(name, FakeDisk(held=True)))
    inode = tree.lookup(ROOT, b"b.raw").inode
    await tree.write_attribute(inode, b"user.qedfs.hold", b"0", 0)
    assert dropped == [inode]
