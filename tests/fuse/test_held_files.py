"""While a disk is held the kernel keeps nothing of it, and what it kept at the release is gone after it."""

from __future__ import annotations

import errno
import mmap
import os

import pyfuse3
import pytest

import qedfs.fuse.operations
from qedfs.config import DirectIO
from qedfs.errors import Held
from qedfs.fuse.operations import Operations
from qedfs.tree.tree import ROOT, Tree
from tests.fuse.conftest import Mount, Mounted
from tests.tree.tree_fakes import FakeDisk, leaf_of

BLOCK = 4096
HELD = {"name": "vm.raw", "held": True}
RELEASE = "user.qedfs.hold"


def read_block(fd: int, pos: int = 0) -> set[int]:
    """The bytes of one block; O_DIRECT wants them in aligned memory."""
    with mmap.mmap(-1, BLOCK) as buffer:
        assert os.preadv(fd, [buffer], pos) == BLOCK
        return set(buffer[:])


def write_block(fd: int, byte: int, pos: int = 0, flags: int = 0) -> None:
    with mmap.mmap(-1, BLOCK) as buffer:
        buffer[:] = bytes([byte]) * BLOCK
        assert os.pwritev(fd, [buffer], pos, flags) == BLOCK


def release(mounted: Mounted) -> None:
    os.setxattr(mounted.file(), RELEASE, b"0")


@pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["buffered", "O_DIRECT"])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR], ids=["reading", "writing"])
def test_every_read_while_held_is_fresh(mount: Mount, flags: int, direct: int) -> None:
    mounted = mount(HELD)
    fd = os.open(mounted.file(), flags | direct)
    for byte in (1, 2, 3):
        mounted.ask(f"fill vm.raw {byte}")
        assert read_block(fd) == {byte}
    release(mounted)
    assert read_block(fd) == {3}
    os.close(fd)


@pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["buffered", "O_DIRECT"])
def test_a_write_while_held_is_refused_at_once(mount: Mount, direct: int) -> None:
    mounted = mount(HELD)
    fd = os.open(mounted.file(), os.O_RDWR | direct)
    with pytest.raises(OSError, match="busy") as refused:
        write_block(fd, 7)
    assert refused.value.errno == errno.EBUSY
    assert read_block(fd) == {0}
    release(mounted)
    write_block(fd, 7)
    assert read_block(fd) == {7}
    os.close(fd)


@pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["buffered", "O_DIRECT"])
@pytest.mark.parametrize("promise", ["O_SYNC", "O_DSYNC", "RWF_DSYNC", "RWF_SYNC"])
def test_a_handle_of_the_hold_keeps_promises_of_durability_after_it(mount: Mount, promise: str, direct: int) -> None:
    mounted = mount(HELD)
    flags, write_flags = (getattr(os, promise), 0) if promise.startswith("O_") else (0, getattr(os, promise))
    fd = os.open(mounted.file(), os.O_RDWR | direct | flags)
    release(mounted)
    mounted.ask("journal")
    write_block(fd, 7, BLOCK, write_flags)
    # Read at once: a flush that nobody waited for would be missing here.
    assert mounted.ask("journal")[:2] == [["write", "vm.raw", BLOCK, BLOCK], ["flush", "vm.raw"]]
    os.close(fd)


def test_a_mapping_made_while_held_shows_what_is_there_after_the_release(mount: Mount) -> None:
    mounted = mount(HELD)
    mounted.ask("fill vm.raw 1")
    fd = os.open(mounted.file(), os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(fd, 1 << 20, prot=mmap.PROT_READ) as mapped:
        assert set(mapped[:]) == {1}
        mounted.ask("fill vm.raw 2")
        release(mounted)
        assert set(mapped[:]) == {2}
    os.close(fd)


def test_a_page_dirtied_while_held_does_not_bring_old_bytes_back(mount: Mount) -> None:
    mounted = mount(HELD)
    mounted.ask("fill vm.raw 1")
    fd = os.open(mounted.file(), os.O_RDWR | os.O_DIRECT)
    with mmap.mmap(fd, 1 << 20) as mapped:
        mapped[100] = 9  # the page around it is from before
        mounted.ask("fill vm.raw 2")
        release(mounted)
        assert set(mapped[:]) == {2}
        mapped[200] = 9
        with pytest.raises(OSError, match="Input/output") as told:
            mapped.flush()  # once, what was refused during the hold is told
        assert told.value.errno == errno.EIO
        mapped.flush()
    os.close(fd)
    assert mounted.ask("journal") == [
        ["refused", "vm.raw", 0, BLOCK],
        ["dropped", "vm.raw"],
        ["write", "vm.raw", 0, BLOCK],
        ["flush", "vm.raw"],
    ]
    fd = os.open(mounted.file(), os.O_RDONLY)
    assert read_block(fd) == {2, 9}
    os.close(fd)


def test_a_release_waits_for_a_page_that_is_being_read(mount: Mount) -> None:
    mounted = mount(HELD)
    mounted.ask("fill vm.raw 1")
    mounted.ask("hold vm.raw")
    fd = os.open(mounted.file(), os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(fd, 1 << 20, prot=mmap.PROT_READ) as mapped:
        mapped.madvise(mmap.MADV_WILLNEED)
        while not mounted.ask("waiting vm.raw"):
            pass
        mounted.ask("fill vm.raw 2")
        mounted.ask("release vm.raw")
        release(mounted)
        mounted.ask("fill vm.raw 3")  # what is cached from here on is the kernel's to keep
        assert mapped[0] in (2, 3)
    os.close(fd)


async def test_where_the_kernel_keeps_two_views_apart_only_unbuffered_handles_are_given_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(qedfs.fuse.operations, "kernel_version", lambda: (6, 5))
    tree = Tree()
    tree.add(leaf_of("vm.raw", FakeDisk(held=True)))
    operations = Operations(tree, direct_io=DirectIO.AUTO)
    inode = tree.lookup(ROOT, b"vm.raw").inode
    with pytest.raises(pyfuse3.FUSEError) as refused:
        await operations.open(inode, os.O_RDONLY, None)  # type: ignore[arg-type]
    assert refused.value.errno == Held.errno
    assert not tree.disks
    await operations.open(inode, os.O_RDONLY | os.O_DIRECT, None)  # type: ignore[arg-type]
    assert len(tree.disks) == 1
