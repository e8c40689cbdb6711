"""The file under an image: the only place that reads and writes a leaf.

`Storage` is the interface (a recording one replays power cuts in the tests), `FileStorage` the real one. Calls that the
page cache answers at once run on the event loop, everything else in threads of this file's own. A call in a thread is
never abandoned on cancellation: its extent could be given to somebody else while it is still being written.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import trio

from qedfs.errors import InvalidImage, LeafError, LeafFull, ReadOnly
from qedfs.image.locks import lock_for_reading, lock_for_writing
from qedfs.image.writeback import FileWriteback

T = TypeVar("T")

THREADS = 16
"""Calls under way at once per file; more only queue in the device."""
SLOW_WRITE = 0.02
"""Seconds. A write that the page cache does not take within this time is waiting for the disk (throttled writeback, a
journal commit), and the event loop with it: one such wait is the price of finding out. On a busy machine a few time slices
may pass during any write, which says nothing about the disk."""
COPIERS = 2
"""Calls of `write_behind` under way at once per file: they only take turns at the file's lock, which guest writes need, too."""
COPY_PIECE = 128 << 10
"""Bytes that `write_behind` writes at once, and for which the file's lock is held."""
SLOW_PAUSE = 0.5
"""Seconds for which writes go to threads after a slow one."""

_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 0x1, 0x2
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Space(NamedTuple):
    """Room on a file system, in bytes: all there is, and what an ordinary user may still take.

    `allowed` is how much the file may still grow, where somebody has set it a limit.
    """

    total: int
    free: int
    allowed: int | None = None


class Storage(ABC):
    """Bytes of one image file. Offsets and lengths are in bytes; any number of tasks may call at once."""

    name: str
    writable: bool

    @abstractmethod
    def length(self) -> int:
        """Length of the file now."""

    @abstractmethod
    def read_nowait(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` if that needs no waiting; False otherwise, and then its content is undefined."""

    @abstractmethod
    def write_nowait(self, offset: int, data: bytes | memoryview) -> bool:
        """Write `data` if that needs no waiting; False otherwise, and then nothing was written."""

    @abstractmethod
    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`; bytes past the end of the file are zeros."""

    @abstractmethod
    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data`, growing the file when it passes the end. After an error any part may have been written."""

    async def write_behind(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """As `write`, for bulk that nobody waits for: neither writes nor flushes of others are to wait for it for long."""
        await self.write(offset, data)

    @abstractmethod
    async def truncate(self, length: int) -> None:
        """Cut the file, or grow it by a hole. Never while others write past `length`."""

    @abstractmethod
    async def flush(self) -> None:
        """Return when every write that ended before this call is durable, and the length with them."""

    @abstractmethod
    async def punch(self, offset: int, length: int) -> bool:
        """Turn the range into a hole that reads as zeros; False, and nothing changed, where there are no holes."""

    async def next_data(self, offset: int) -> tuple[int, int]:
        """Return `[start, end)` of the first range at or after `offset` that may hold anything but zeros.

        Both are the length of the file when there is none.
        """
        return min(offset, self.length()), self.length()

    async def space(self) -> Space | None:
        """Return what room the file system under the file has; None where nobody can tell, or there is none to fill up."""
        return None

    @abstractmethod
    async def aclose(self) -> None:
        """Close the file and let go of its locks."""

    async def read(self, offset: int, length: int) -> bytearray:
        """Return `length` bytes at `offset`, zeros past the end of the file."""
        buffer = bytearray(length)
        await self.read_into(offset, memoryview(buffer))
        return buffer


class FileStorage(Storage):
    """An open file or block device. Made by `open_storage` and `create_storage`."""

    def __init__(self, fd: int, name: str, *, writable: bool) -> None:
        self.fd = fd
        self.name = name
        self.writable = writable
        self._limiter = trio.CapacityLimiter(THREADS)
        self._copiers = trio.CapacityLimiter(COPIERS)
        self._writeback: FileWriteback | None = None
        self._slow_until = 0.0

    def length(self) -> int:
        return os.lseek(self.fd, 0, os.SEEK_END)  # st_size of a block device is 0

    def read_nowait(self, offset: int, buffer: memoryview) -> bool:
        try:
            return os.preadv(self.fd, [buffer], offset, os.RWF_NOWAIT) == len(buffer)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                return False
            raise self._error("cannot be read", error) from error

    def write_nowait(self, offset: int, data: bytes | memoryview) -> bool:
        start = time.monotonic()
        if start < self._slow_until:
            return False
        # RWF_NOWAIT is refused for buffered writes by ext4, so the write itself is the question. See SLOW_WRITE.
        self._write_all(offset, memoryview(data))
        if time.monotonic() - start > SLOW_WRITE:
            self._slow_until = time.monotonic() + SLOW_PAUSE
        return True

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self._in_thread(self._read_all, offset, buffer)

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        await self._in_thread(self._write_all, offset, memoryview(data))

    async def write_behind(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        if self._writeback is None:
            self._writeback = FileWriteback(self.fd)
        await trio.to_thread.run_sync(
            self._write_behind, self._writeback, offset, memoryview(data), limiter=self._copiers
        )

    async def truncate(self, length: int) -> None:
        def truncate() -> None:
            try:
                os.ftruncate(self.fd, length)
            except OSError as error:
                raise self._error("cannot be resized", error) from error

        await self._in_thread(truncate)

    async def flush(self) -> None:
        def flush() -> None:
            try:
                os.fdatasync(self.fd)
            except OSError as error:
                raise self._error("cannot be flushed", error) from error

        await self._in_thread(flush)

    async def punch(self, offset: int, length: int) -> bool:
        def punch() -> bool:
            if _libc.fallocate(self.fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length) == 0:
                return True
            code = ctypes.get_errno()
            if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
                return False
            raise self._error("a hole cannot be punched", OSError(code, os.strerror(code)))

        return await self._in_thread(punch)

    async def next_data(self, offset: int) -> tuple[int, int]:
        def seek() -> tuple[int, int]:
            try:
                start = os.lseek(self.fd, offset, os.SEEK_DATA)
                return start, os.lseek(self.fd, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return self.length(), self.length()
                if error.errno == errno.EINVAL:  # a file system, or a block device, that knows no holes
                    return min(offset, self.length()), self.length()
                raise self._error("cannot be read", error) from error

        return await self._in_thread(seek)

    async def space(self) -> Space | None:
        def look() -> Space | None:
            try:
                if stat.S_ISBLK(os.fstat(self.fd).st_mode):
                    return None
                found = os.fstatvfs(self.fd)
            except OSError:  # a file system that does not say (ENOSYS): a write that finds no room will
                return None
            return Space(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)

        return await self._in_thread(look)

    async def aclose(self) -> None:
        fd, self.fd = self.fd, -1
        if self._writeback is not None:
            self._writeback.close()
        if fd >= 0:
            # close(2) may wait for the disk on network file systems.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(os.close, fd)

    def _read_all(self, offset: int, buffer: memoryview) -> None:
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(self.fd, [buffer[done:]], offset + done)
                if not count:
                    buffer[done:] = bytes(len(buffer) - done)
                    return
                done += count
        except OSError as error:
            raise self._error("cannot be read", error) from error

    def _write_all(self, offset: int, data: memoryview) -> None:
        try:
            done = os.pwrite(self.fd, data, offset)
            while done < len(data):
                done += os.pwrite(self.fd, data[done:], offset + done)
        except OSError as error:
            raise self._error("cannot be written", error) from error

    def _write_behind(self, writeback: FileWriteback, offset: int, data: memoryview) -> None:
        for start in range(0, len(data), COPY_PIECE):
            self._write_all(offset + start, data[start : start + COPY_PIECE])
        writeback.written(offset, len(data))

    def _error(self, what_failed: str, error: OSError) -> LeafError:
        kind = LeafFull if error.errno in _FULL else LeafError
        return kind(self.name, f"{what_failed} ({os.strerror(error.errno or 0)})")

    async def _in_thread(self, function: Callable[..., T], *args: object) -> T:
        return await trio.to_thread.run_sync(function, *args, limiter=self._limiter)


async def open_storage(path: str, *, writable: bool, lock: bool = True) -> FileStorage:
    """Open the image at `path`, which must be a regular file or a block device, and lock it as QEMU would.

    With `lock=False` somebody else may be writing the image; what is read is then a valid image of a moment ago.

    Raises:
        InvalidImage: no such file, no permission, or a file of another kind, which is then not opened at all (opening a
            FIFO waits, opening a device may act).
        ReadOnly: it may be read but not written.
        Locked: somebody has it open in a way that excludes ours.
    """
    fd = await trio.to_thread.run_sync(_open_regular, path, writable)
    try:
        if lock:
            (lock_for_writing if writable else lock_for_reading)(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return FileStorage(fd, path, writable=writable)


async def create_storage(path: str) -> FileStorage:
    """Make a new, empty file at `path` and lock it for writing.

    Raises:
        InvalidImage: it exists already, or cannot be made.
    """

    def create() -> int:
        try:
            # 0644 whatever the umask allows: an image that others may write is not trusted to name a backing.
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise InvalidImage(path, f"cannot be created ({os.strerror(error.errno or 0)})") from error

    fd = await trio.to_thread.run_sync(create)
    try:
        lock_for_writing(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return FileStorage(fd, path, writable=True)


def _open_regular(path: str, writable: bool) -> int:
    try:
        # Ordering: O_PATH looks at the file without opening it; the second open goes through the same file.
        with _closing(os.open(path, os.O_PATH | os.O_CLOEXEC)) as look:
            kind = os.fstat(look).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
                raise InvalidImage(path, "is neither a regular file nor a block device")
            flags = os.O_RDWR if writable else os.O_RDONLY
            return os.open(f"/proc/self/fd/{look}", flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if writable and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY):
            raise ReadOnly(path, f"cannot be opened for writing ({os.strerror(error.errno)})") from error
        raise InvalidImage(path, f"cannot be opened ({os.strerror(error.errno or 0)})") from error


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)
