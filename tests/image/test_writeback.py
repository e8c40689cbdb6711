"""Copies are pushed out as they are written: never many bytes on their way, and no error taken from the image's own flush."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import trio

from qedfs.image.storage import create_storage
from qedfs.image.writeback import FileWriteback, Writeback

MIB = 1 << 20


class Disk:
    """Remembers what is on its way, and ends it when it is waited for."""

    def __init__(self) -> None:
        self.under_way: dict[int, int] = {}
        self.waited: list[int] = []
        self.most = 0

    def start(self, offset: int, length: int) -> None:
        self.under_way[offset] = length
        self.most = max(self.most, sum(self.under_way.values()))

    def wait(self, offset: int, length: int) -> None:
        assert self.under_way.pop(offset) == length
        self.waited.append(offset)


def test_backlog_is_bounded_and_the_oldest_is_waited_for_first() -> None:
    disk = Disk()
    writeback = Writeback(start=disk.start, wait=disk.wait, backlog=4 * MIB)
    for number in range(32):
        writeback.written(number * MIB, MIB)
    assert disk.most == 5 * MIB
    assert disk.waited == [number * MIB for number in range(28)]


def test_nothing_is_waited_for_within_the_backlog() -> None:
    disk = Disk()
    writeback = Writeback(start=disk.start, wait=disk.wait, backlog=4 * MIB)
    for number in range(4):
        writeback.written(number * MIB, MIB)
    assert disk.waited == []


def test_range_larger_than_the_backlog_is_not_waited_for_by_itself() -> None:
    disk = Disk()
    Writeback(start=disk.start, wait=disk.wait, backlog=MIB).written(0, 8 * MIB)
    assert disk.waited == []


def test_each_range_is_waited_for_once_however_many_threads_write() -> None:
    disk, lock = Disk(), threading.Lock()

    def start(offset: int, length: int) -> None:
        with lock:
            disk.start(offset, length)

    def wait(offset: int, length: int) -> None:
        with lock:
            disk.wait(offset, length)  # would not find it a second time

    writeback = Writeback(start=start, wait=wait, backlog=2 * MIB)

    def push(part: int) -> None:
        for number in range(50):
            writeback.written((part * 50 + number) * MIB, MIB)

    threads = [threading.Thread(target=push, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(disk.waited) == 198


def test_file_is_written_back_through_a_description_of_its_own(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        os.lseek(fd, 5, os.SEEK_SET)
        before = {number for number in map(str, range(1024)) if _target(number)}
        writeback = FileWriteback(fd)
        own = next(number for number in map(str, range(1024)) if number not in before and _target(number))
        # Shared descriptions share their position; errors of writing back are told once per description, too.
        assert os.lseek(int(own), 0, os.SEEK_CUR) == 0
        os.pwrite(fd, b"x" * MIB, 0)
        writeback.written(0, MIB)
        writeback.close()
        assert not _target(own)
    finally:
        os.close(fd)


def test_file_that_may_not_be_opened_again_is_left_to_the_kernel() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.close(writing)
    writeback = FileWriteback(writing)
    writeback.written(0, MIB)
    writeback.close()


@pytest.mark.parametrize("length", [1, 128 << 10, MIB + 512, 3 * MIB])
async def test_what_is_written_behind_is_there(tmp_path: Path, length: int) -> None:
    storage = await create_storage(str(tmp_path / "leaf"))
    data = os.urandom(length)
    async with trio.open_nursery() as nursery:
        for place in range(4):
            nursery.start_soon(storage.write_behind, place * 4 * MIB, data)
    for place in range(4):
        assert await storage.read(place * 4 * MIB, length) == data
    await storage.aclose()
    assert not [fd for fd in os.listdir("/proc/self/fd") if _target(fd) == str(tmp_path / "leaf")]


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # of the listing itself
        return ""
