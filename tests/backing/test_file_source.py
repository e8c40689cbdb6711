"""What a local file does beyond the contract of every source."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from qedfs.backing import file as file_module
from qedfs.backing.base import Extent, Identity
from qedfs.backing.credentials import call_as
from qedfs.backing.file import Found, open_file
from qedfs.errors import BackingChanged, BackingLocked, BackingRefused, BackingUnavailable, NotAllowed
from qedfs.image.locks import lock_for_reading, lock_for_writing
from tests.backing.samples import KIB, MIB, random_bytes

NOBODY = 65534


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(random_bytes(MIB))
    return path


async def test_the_identity_is_size_and_time_of_modification(path: Path) -> None:
    os.utime(path, ns=(5, 1234567890123456789))
    source = await open_file(str(path))
    assert source.identity == Identity(MIB, "mtime:1234567890123456789")
    await source.aclose()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: path.mkdir(), "is neither a regular file nor a block device"),
        (lambda path: os.mkfifo(path), "is neither a regular file nor a block device"),
        (lambda path: os.mknod(path, 0o020600, os.makedev(1, 3)), "is neither a regular file nor a block device"),
        (lambda path: path.symlink_to("/dev/tty"), "is neither a regular file nor a block device"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (lambda path: None, "No such file or directory"),
    ],
    ids=["folder", "fifo", "device", "link-to-device", "link-to-itself", "nothing"],
)
async def test_what_is_no_file_is_refused_without_being_opened(
    tmp_path: Path, make: Callable[[Path], None], why: str
) -> None:
    make(tmp_path / "x")
    with trio.fail_after(5), pytest.raises(BackingRefused, match=why):
        await open_file(str(tmp_path / "x"))


async def test_a_socket_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "x"))
        with pytest.raises(BackingRefused, match="is neither"):
            await open_file(str(tmp_path / "x"))


async def test_nobody_may_write_a_backing_that_is_open(path: Path) -> None:
    source = await open_file(str(path))
    with open(path, "r+b") as other, pytest.raises(Exception, match="does not want it to change"):
        lock_for_writing(other.fileno(), "other")
    with open(path, "rb") as other:
        lock_for_reading(other.fileno(), "other")
    await source.aclose()


async def test_a_file_open_for_writing_elsewhere_is_no_backing(path: Path) -> None:
    with open(path, "r+b") as writer:
        lock_for_writing(writer.fileno(), "writer")
        with pytest.raises(BackingLocked, match=r"base\.raw: somebody else has it open for writing"):
            await open_file(str(path))
    await (await open_file(str(path))).aclose()


async def test_a_file_cut_while_open_has_changed(path: Path) -> None:
    source = await open_file(str(path))
    os.truncate(path, 4 * KIB)
    with pytest.raises(BackingChanged, match="has become shorter"):
        await source.read_into(0, memoryview(bytearray(8 * KIB)))
    await source.aclose()


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EIO, BackingUnavailable), (errno.ESTALE, BackingUnavailable), (errno.EINVAL, BackingRefused)],
)
async def test_errors_of_a_read_are_told_apart(
    path: Path, number: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await open_file(str(path))

    def fail(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(kind, match="cannot be read"):
        await source.read_into(0, memoryview(bytearray(512)))
    monkeypatch.undo()
    await source.aclose()


async def test_what_the_page_cache_has_needs_no_waiting(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = path.read_bytes()  # and into the page cache it comes
    source = await open_file(str(path))
    try:
        buffer = bytearray(len(content))
        assert source.read_nowait(0, memoryview(buffer))
        assert buffer == content

        def absent(fd: int, buffers: list[memoryview], pos: int, flags: int = 0) -> int:
            raise BlockingIOError(errno.EAGAIN, "not in the page cache")

        monkeypatch.setattr(os, "preadv", absent)
        assert not source.read_nowait(0, memoryview(buffer))
    finally:
        await source.aclose()


@pytest.mark.parametrize("nowait", ["refused", "partial", "unsupported"])
async def test_what_the_page_cache_does_not_answer_is_read_in_a_thread(
    path: Path, nowait: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await open_file(str(path))
    preadv = os.preadv

    def stubborn(fd: int, buffers: list[memoryview], pos: int, flags: int = 0) -> int:
        if flags and nowait != "partial":
            raise OSError(errno.EAGAIN if nowait == "refused" else errno.EOPNOTSUPP, "")
        return preadv(fd, [buffers[0][:1000]], pos)  # short in the thread too

    monkeypatch.setattr(os, "preadv", stubborn)
    buffer = bytearray(10_000)
    await source.read_into(12345, memoryview(buffer))
    assert buffer == random_bytes(MIB)[12345:22345]
    await source.aclose()


async def test_holes_are_told_and_a_question_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "holes.raw"
    with open(path, "wb") as file:
        for index in range(8):
            file.seek(index * 128 * KIB)
            file.write(b"x" * 64 * KIB)
        file.truncate(MIB)
    source = await open_file(str(path))
    every = [Extent(64 * KIB, bool(index % 2)) for index in range(16)]
    assert await source.extents(0, MIB) == every
    monkeypatch.setattr(file_module, "MAX_SEEKS", 6)
    assert await source.extents(0, MIB) == [*every[:4], Extent(MIB - 4 * 64 * KIB, False)]
    await source.aclose()


async def test_the_judge_sees_the_real_path_before_the_file_is_opened(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link.raw").symlink_to(path)
    seen: list[Found] = []

    def refuse(found: Found) -> None:
        seen.append(found)
        raise NotAllowed(found.path, "not this one")

    with pytest.raises(NotAllowed, match="not this one"):
        await open_file(str(tmp_path / "link.raw"), refuse)
    assert [found.path for found in seen] == [str(path)]


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can take another user's rights")


@as_root
async def test_with_the_rights_of_a_user_only_their_files_can_be_opened(tmp_path: Path) -> None:
    folder = Path("/tmp") / f"qedfs-{os.getpid()}"  # pytest's own folders are closed to others
    folder.mkdir()
    path = folder / "base.raw"
    try:
        path.write_bytes(b"secret")
        path.chmod(0o644)
        folder.chmod(0o755)
        await (await open_file(str(path), user=NOBODY)).aclose()
        for closed, mode in ((path, 0o640), (folder, 0o700)):
            before = closed.stat().st_mode
            closed.chmod(mode)
            with pytest.raises(NotAllowed, match="Permission denied"):
                await open_file(str(path), user=NOBODY)
            await (await open_file(str(path))).aclose()
            closed.chmod(before)
    finally:
        path.unlink()
        folder.rmdir()


@as_root
def test_another_users_rights_end_with_the_thread_that_took_them() -> None:
    def rights() -> tuple[str, ...]:
        with open("/proc/thread-self/status", encoding="ascii") as status:
            return tuple(line for line in status if line.startswith(("Uid", "Gid", "Groups", "CapEff")))

    before = rights()
    uid, gid, groups, capabilities = call_as(NOBODY, rights)
    assert uid.split()[4] == str(NOBODY)
    assert gid.split()[4] != "0"
    assert "0" not in groups.split()[1:]
    assert capabilities != before[3]
    assert rights() == before


@as_root
def test_a_user_nobody_knows_has_no_group() -> None:
    def groups() -> list[bytes]:
        # As bytes: with the rights of a stranger Python may not find its own modules of encodings.
        with open("/proc/thread-self/status", "rb") as status:
            return next(line.split()[1:] for line in status if line.startswith(b"Groups"))

    assert call_as(54321, groups) == []
