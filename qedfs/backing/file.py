"""A local file or block device as a source of raw bytes.

What is no regular file and no block device is refused without being opened: opening a FIFO waits and opening a device
may act. Reads that the page cache answers are done at once on the event loop, the rest in threads. A read in a thread
is never abandoned: it writes into the caller's buffer.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import trio

from qedfs.backing.base import Extent, Identity, Source, merged
from qedfs.backing.credentials import call_as
from qedfs.errors import (
    BackingChanged,
    BackingError,
    BackingLocked,
    BackingRefused,
    BackingUnavailable,
    Locked,
    NotAllowed,
)
from qedfs.image.locks import lock_for_reading

T = TypeVar("T")

THREADS = 16
"""Calls under way at once per file; more only queue in the device."""
MAX_SEEKS = 4096
"""Of one question for extents. A file of single-block holes would otherwise keep a thread busy for long."""

_MAY_PASS = {
    *(errno.EIO, errno.EAGAIN, errno.EINTR, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EBUSY),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.ECONNRESET),
}


@dataclass(frozen=True)
class Found:
    """A file that was looked at but not opened. `path` is its real path."""

    path: str
    status: os.stat_result


class FileSource(Source):
    """An open file. Made by `open_file`."""

    live = True

    def __init__(self, fd: int, name: str, *, steady: bool = True) -> None:
        """`steady`: the file is not to change while it is open; if it does, no byte of the new content is given out."""
        self.name = name
        self.path = real_path(fd)
        self.status = os.fstat(fd)
        self.size = os.lseek(fd, 0, os.SEEK_END)  # st_size of a block device is 0
        regular = stat.S_ISREG(self.status.st_mode)
        self.identity = Identity(self.size, f"mtime:{self.status.st_mtime_ns}" if regular else "")
        self._fd = fd
        self._steady = steady and regular
        self._may_have_holes = regular
        self._limiter = trio.CapacityLimiter(THREADS)
        self._users = 0
        self._closed = False

    def read_nowait(self, pos: int, buffer: memoryview) -> bool:
        self._check_open()
        try:
            whole = os.preadv(self._fd, [buffer], pos, os.RWF_NOWAIT) == len(buffer)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise _translated(self.name, "cannot be read", error) from error
            return False
        if whole:
            self._check_unchanged()
        return whole

    async def read_into(self, pos: int, buffer: memoryview) -> None:
        if not self.read_nowait(pos, buffer):
            await self._in_thread(lambda: self._read_all(pos, buffer))

    async def extents(self, pos: int, length: int) -> list[Extent]:
        self._check_open()
        if not self._may_have_holes:
            return merged([Extent(length, False)])
        return await self._in_thread(lambda: self._seek_holes(pos, length))

    async def with_descriptor(self, function: Callable[[int], T]) -> T:
        """Return what `function` makes of the open descriptor, in a thread; it is not closed meanwhile.

        Raises:
            BackingChanged: what was found there may be of another content than the one that was opened.
        """
        answer = await self._in_thread(lambda: function(self._fd))
        self._check_unchanged()
        return answer

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            self._close_if_unused()

    def _check_open(self) -> None:
        if self._closed:
            raise BackingUnavailable(self.name, "is closed")

    def _read_all(self, pos: int, buffer: memoryview) -> None:
        try:
            while buffer:
                count = os.preadv(self._fd, [buffer], pos)
                if not count:
                    raise BackingChanged(self.name, "has become shorter while it was open")
                pos, buffer = pos + count, buffer[count:]
        except OSError as error:
            raise _translated(self.name, "cannot be read", error) from error
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        """Refuse what was just read if it may be of another content than the one that was opened.

        Locks keep QEMU and us from writing a file that is open here, but not `cp`. On the event loop this is asked only
        of file systems that read from memory without waiting, so it does not wait either.
        """
        now = os.fstat(self._fd)
        if self._steady and (now.st_size, now.st_mtime_ns) != (self.size, self.status.st_mtime_ns):
            raise BackingChanged(self.name, "has been changed while it was in use")

    def _seek_holes(self, pos: int, length: int) -> list[Extent]:
        end = pos + length
        extents: list[Extent] = []
        for _ in range(MAX_SEEKS // 2):
            if pos >= end:
                break
            try:
                data = self._seek(pos, os.SEEK_DATA, end)
                hole = self._seek(data, os.SEEK_HOLE, end) if data < end else end
            except OSError as error:
                if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                    break  # a file system that does not tell
                raise _translated(self.name, "cannot be read", error) from error
            extents += Extent(data - pos, True), Extent(hole - data, False)
            pos = hole
        self._check_unchanged()
        return merged([*extents, Extent(end - pos, False)])

    def _seek(self, pos: int, whence: int, end: int) -> int:
        """Return where the next data or hole begins, `end` at most."""
        try:
            # The descriptor's own position moves, and nobody minds: all reads name theirs.
            return min(os.lseek(self._fd, pos, whence), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data up to the end of the file
                return end
            raise

    async def _in_thread(self, function: Callable[[], T]) -> T:
        # The descriptor outlives the last call: a closed one could be somebody else's by then.
        self._users += 1
        try:
            answer = await trio.to_thread.run_sync(function, limiter=self._limiter)
        finally:
            self._users -= 1
            self._close_if_unused()
        self._check_open()
        return answer

    def _close_if_unused(self) -> None:
        if self._closed and not self._users and self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


async def open_file(
    path: str, admit: Callable[[Found], None] = lambda found: None, user: int | None = None
) -> FileSource:
    """Open the file at `path`, and lock it as QEMU locks a backing: nobody may write it meanwhile.

    `admit` judges the file before it is opened and raises to refuse it; it runs in a worker thread. With `user` the file
    is looked up and opened with the rights of that user.

    Raises:
        BackingRefused: no such file, no permission, or a file of another kind.
        BackingLocked: somebody has it open for writing.
        BackingUnavailable: the file system does not answer as it should.
    """
    return await trio.to_thread.run_sync(_open, path, admit, user)


def _open(path: str, admit: Callable[[Found], None], user: int | None) -> FileSource:
    fd = _open_judged(path, admit) if user is None else _open_as(user, path, admit)
    try:
        lock_for_reading(fd, path)
        return FileSource(fd, path)
    except Locked as error:
        os.close(fd)
        raise BackingLocked(error.what, error.why) from error
    except OSError as error:
        os.close(fd)
        raise _translated(path, "cannot be opened", error) from error


def _open_as(user: int, path: str, admit: Callable[[Found], None]) -> int:
    def admit_what_user_can_reach(found: Found) -> None:
        _refuse_out_of_reach(found, path)
        admit(found)

    try:
        return call_as(user, lambda: _open_judged(path, admit_what_user_can_reach))
    except PermissionError as error:
        raise NotAllowed(path, f"cannot be opened with the rights of the image's owner ({error})") from error


def _open_judged(path: str, admit: Callable[[Found], None]) -> int:
    """Open the file with the rights of this thread, through the descriptor by which it was judged."""
    look = _look(path)
    try:
        admit(_found(look, path))
        return os.open(f"/proc/self/fd/{look}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _translated(path, "cannot be opened", error) from error
    finally:
        os.close(look)


def _look(path: str, flags: int = 0) -> int:
    try:
        return os.open(path, os.O_PATH | os.O_CLOEXEC | flags)
    except OSError as error:
        raise _translated(path, "cannot be opened", error) from error
    except ValueError as error:  # a NUL in the path
        raise BackingRefused(path, "cannot be opened (not a path)") from error


def _found(look: int, path: str) -> Found:
    status = os.fstat(look)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise BackingRefused(path, "is neither a regular file nor a block device")
    return Found(real_path(look), status)


def _refuse_out_of_reach(found: Found, path: str) -> None:
    """Refuse a file that this thread's user cannot reach through the folders in which it lies.

    The links in /proc/self/fd lead straight to what this process has open, past every closed folder, and a thread of
    ours may follow them whoever it plays. The real path has no links, so walking it asks each folder.
    """
    look = _look(found.path, os.O_NOFOLLOW)
    try:
        if not os.path.samestat(os.fstat(look), found.status):
            raise NotAllowed(path, "is not what lies at its path")
    finally:
        os.close(look)


def real_path(fd: int) -> str:
    """Return where the open file `fd` lies; something that cannot be opened if it has no name any more."""
    return os.readlink(f"/proc/self/fd/{fd}")


def _translated(name: str, what_failed: str, error: OSError) -> BackingError:
    why = f"{what_failed} ({os.strerror(error.errno or 0)})"
    if error.errno in (errno.EACCES, errno.EPERM):
        return NotAllowed(name, why)
    return (BackingUnavailable if error.errno in _MAY_PASS else BackingRefused)(name, why)
