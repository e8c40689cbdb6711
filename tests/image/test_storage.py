from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from qedfs.errors import InvalidImage, LeafError, LeafFull, Locked
from qedfs.image import storage as storage_module
from qedfs.image.storage import create_storage, open_storage
from tests.model.memory_disk import pattern


@pytest.fixture
def leaf(tmp_path: Path) -> Path:
    path = tmp_path / "leaf.qed"
    path.write_bytes(pattern(10_000))
    return path


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "missing", "dangling link"])
async def test_what_is_no_file_is_refused_without_being_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "leaf.qed"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "dangling link":
            path.symlink_to("nothing")
    for writable in (False, True):
        with trio.fail_after(5), pytest.raises(InvalidImage):  # opening a FIFO would wait for ever
            await open_storage(str(path), writable=writable)


async def test_a_new_file_does_not_replace_an_old_one(leaf: Path) -> None:
    with pytest.raises(InvalidImage, match="exists"):
        await create_storage(str(leaf))
    assert leaf.read_bytes() == pattern(10_000)


async def test_bytes_past_the_end_are_zeros_and_a_write_there_grows_the_file(leaf: Path) -> None:
    storage = await open_storage(str(leaf), writable=True)
    assert await storage.read(9_990, 20) == pattern(10_000)[9_990:] + bytes(10)
    assert await storage.read(1 << 40, 5) == bytes(5)
    await storage.write(12_000, b"new")
    assert storage.length() == 12_003
    assert await storage.read(10_000, 2_003) == bytes(2_000) + b"new"
    await storage.truncate(11_000)
    assert storage.length() == 11_000
    await storage.flush()
    await storage.aclose()


async def test_calls_that_do_not_wait_answer_only_in_full(leaf: Path) -> None:
    storage = await open_storage(str(leaf), writable=True)
    buffer = memoryview(bytearray(100))
    await storage.read(0, 10_000)  # into the page cache
    assert not storage.read_nowait(9_950, buffer), "past the end"
    if storage.read_nowait(50, buffer):  # some file systems know no RWF_NOWAIT
        assert buffer == pattern(10_000)[50:150]
    assert storage.write_nowait(50, b"x" * 10)
    assert (await storage.read(49, 12))[1:11] == b"x" * 10
    await storage.aclose()


async def test_after_a_slow_write_others_go_to_threads_for_a_while(leaf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = await open_storage(str(leaf), writable=True)
    monkeypatch.setattr(storage_module, "SLOW_WRITE", -1.0)
    assert storage.write_nowait(0, b"a")
    if storage.write_nowait(1, b"b"):
        pytest.fail("the event loop would wait for the disk again")
    monkeypatch.setattr(storage_module, "SLOW_WRITE", 10.0)
    storage._slow_until = 0.0
    assert storage.write_nowait(1, b"b")
    await storage.aclose()


async def test_a_write_past_what_the_file_system_can_hold_is_a_full_disk(leaf: Path) -> None:
    storage = await open_storage(str(leaf), writable=True)
    with pytest.raises(LeafFull, match="too large"):
        await storage.write((1 << 63) - 4096, b"x")
    await storage.aclose()


async def test_a_hole_reads_as_zeros_takes_no_room_and_keeps_the_length(leaf: Path) -> None:
    leaf.write_bytes(pattern(1 << 20))
    storage = await open_storage(str(leaf), writable=True)
    assert await storage.punch(1 << 16, 1 << 19), "the tests need a file system with holes"
    assert storage.length() == 1 << 20
    assert await storage.read(1 << 16, 1 << 19) == bytes(1 << 19)
    assert await storage.next_data(1 << 16) == ((1 << 16) + (1 << 19), 1 << 20)
    assert await storage.next_data(2 << 20) == (1 << 20, 1 << 20)
    await storage.aclose()


async def test_errors_of_the_disk_are_named_and_not_taken_for_an_end_of_the_file(leaf: Path) -> None:
    storage = await open_storage(str(leaf), writable=False)
    os.close(storage.fd)
    for call in (storage.read(0, 10), storage.write(0, b"x"), storage.flush()):
        with pytest.raises(LeafError, match=r"leaf\.qed"):
            await call
    storage.fd = -1
    await storage.aclose()


async def test_closing_lets_go_of_the_locks_and_may_be_repeated(leaf: Path) -> None:
    storage = await open_storage(str(leaf), writable=True)
    with pytest.raises(Locked):
        await open_storage(str(leaf), writable=True)
    await storage.aclose()
    await storage.aclose()
    await (await open_storage(str(leaf), writable=True)).aclose()
