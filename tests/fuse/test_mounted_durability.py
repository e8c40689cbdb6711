"""A write that promised durability returns after `flush`, however the file is opened and whatever is cached."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from tests.fuse.conftest import Mount

BLOCK = 4096


def write(file: Path, flags: int, write_flags: int = 0) -> None:
    fd = os.open(file, os.O_RDWR | flags)
    try:
        with mmap.mmap(-1, BLOCK) as buffer:
            buffer[:] = b"x" * BLOCK
            assert os.pwritev(fd, [buffer], BLOCK, write_flags) == BLOCK
    finally:
        os.close(fd)


@pytest.mark.parametrize("options", ["", "direct_io=on"])
@pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["buffered", "O_DIRECT"])
def test_a_write_that_promises_durability_is_flushed_when_it_returns(mount: Mount, options: str, direct: int) -> None:
    mounted = mount(options=options)
    promises = [(os.O_SYNC, 0), (os.O_DSYNC, 0)]
    # On a direct handle the kernel says nothing of RWF_DSYNC: the reason why `on` is not the default.
    promises += [] if options and direct else [(0, os.RWF_DSYNC), (0, os.RWF_SYNC)]
    for flags, write_flags in promises:
        write(mounted.file(), flags | direct, write_flags)
        # Read at once: the disk takes its time for a flush, so one that nobody waited for would be missing here.
        assert mounted.ask("journal") == [["write", "vm.raw", BLOCK, BLOCK], ["flush", "vm.raw"]]


@pytest.mark.parametrize("sync", [os.fsync, os.fdatasync])
def test_fsync_comes_after_all_cached_writes(mount: Mount, sync: object) -> None:
    mounted = mount({"name": "vm.raw", "size": 8 << 20})
    fd = os.open(mounted.file(), os.O_RDWR)
    for pos in range(0, 8 << 20, 1 << 16):
        os.pwrite(fd, b"y" * BLOCK, pos)
    assert callable(sync)
    sync(fd)
    journal = mounted.ask("journal")
    os.close(fd)
    assert journal[-1] == ["flush", "vm.raw"]
    assert sorted(entry[2] for entry in journal[:-1]) == list(range(0, 8 << 20, 1 << 16))


def test_msync_of_a_shared_mapping_is_flushed(mount: Mount) -> None:
    mounted = mount()
    with open(mounted.file(), "r+b") as file, mmap.mmap(file.fileno(), 1 << 20) as mapped:
        mapped[0:1] = b"z"
        mapped.flush()
        assert mounted.ask("journal") == [["write", "vm.raw", 0, BLOCK], ["flush", "vm.raw"]]


def test_closing_writes_back_but_does_not_flush(mount: Mount) -> None:
    mounted = mount()
    write(mounted.file(), 0)
    assert mounted.ask("journal") == [["write", "vm.raw", BLOCK, BLOCK]]
