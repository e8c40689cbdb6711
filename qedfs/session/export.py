"""Writing the disk of a leaf as a plain raw file.

What lies as whole blocks in a file of the same file system, the leaf itself or a raw backing, is shared with it where the
file system can (FICLONERANGE: btrfs, XFS, bcachefs, …). Everything else is read and written; what reads as zeros stays a hole.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import trio

from qedfs.backing.file import FileSource
from qedfs.backing.resilient import Backing
from qedfs.config import DiskOptions, MountOptions
from qedfs.disk.telling import timed_out
from qedfs.errors import Held, NotMounted, UsageError, first_of
from qedfs.image.image import Image, open_image
from qedfs.image.storage import FileStorage, open_storage
from qedfs.image.tables import State
from qedfs.report.mounted import is_mounted
from qedfs.session.admission import Terms, backing_of
from qedfs.session.new_file import NewFile, failure, new_file

PIECE = 1 << 20
"""Bytes that are read and written at once."""
AT_ONCE = 16
"""Pieces under way: a link of 1 Gbit/s is full up to 130 ms of round trip, for 16 MiB of memory."""
SHARE_PIECE = 256 << 20
"""Bytes that are shared at once, so that there is something to show in between."""
FIRST_ASK, MOST_ASK = 64 << 20, 4 << 30
"""Bytes of the disk that one question about zeros of the backing is about, at first and at most."""
FEW = 4096
"""Ranges in an answer below which the next question is twice as long: an answer costs memory."""
BLOCK = 4096
"""Bytes of zeros that become a hole, and the unit in which file systems share."""

_FICLONERANGE = 0x4020940D
_CLONE = struct.Struct("qQQQ")
_NEVER = frozenset({errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY, errno.EPERM, errno.ETXTBSY, errno.ENOSYS})
"""What a file system that does not share, at all or with that file, answers. Others are about one range."""

T = TypeVar("T")

Read = Callable[[int, memoryview], Awaitable[None]]
"""Fill a buffer with the bytes at a position."""
WithDescriptor = Callable[[Callable[[int], int]], Awaitable[int]]
"""Call a function in a thread with the descriptor of an open file."""


@dataclass
class Progress:
    """How far an export is, in bytes: of the disk `size`, `done` of it, and of that `shared` and `written`."""

    size: int = 0
    done: int = 0
    shared: int = 0
    written: int = 0


@dataclass(frozen=True)
class Export:
    """What to export to where. `secret` opens encrypted backings, `allow_backing` is as the mount option."""

    leaf: str
    out: str
    overwrite: bool
    secret: bytes | None = None
    allow_backing: tuple[str, ...] = ()


async def export(job: Export, progress: Progress) -> None:
    """Write the disk of the leaf as the raw file `out`, durably, or leave nothing behind. `progress` is kept up to date.

    The leaf and its local backings are locked as QEMU does for reading: a leaf that is mounted, or that somebody writes, is
    refused. The backing must be what the leaf was made on.

    Raises:
        UsageError: the leaf is a disk on a mount.
        InvalidImage, Locked, LeafError, CorruptEntry: the leaf cannot be read.
        Held: it is held for a migration, so that nobody knows yet what its disk is.
        BackingError: the backing cannot be read, or is not what it was.
        OutputError: the file cannot be made.
    """
    path = os.path.abspath(job.leaf)  # noqa: ASYNC240 (asks only for the working directory)
    await trio.to_thread.run_sync(_refuse_mounted, path)
    storage = await open_storage(path, writable=False)
    async with AsyncExitStack() as opened:
        opened.push_async_callback(_shielded, storage.aclose)
        image = await open_image(storage)
        if image.record.hold:
            raise Held(image.name, "is held for a migration; its disk may still change")
        terms = Terms(MountOptions(read_only=True, secret=job.secret, allow_backing=job.allow_backing), "", os.getuid())
        backing = backing_of(image, storage, terms) if image.backing_name else None
        if backing is not None:
            opened.push_async_callback(_shielded, backing.aclose)
            await _waited(backing, backing.identity)
        if job.overwrite and os.path.exists(job.out):  # noqa: ASYNC240
            # The locks exclude this process's other descriptors, too: it is neither the leaf nor a backing.
            over = await open_storage(job.out, writable=True)
            opened.push_async_callback(_shielded, over.aclose)
        mode = stat.S_IMODE(os.fstat(storage.fd).st_mode) & 0o666
        with new_file(job.out, mode, overwrite=job.overwrite) as out:
            await _copy(image, storage, backing, out, progress)
            await trio.to_thread.run_sync(out.publish)


def _refuse_mounted(path: str) -> None:
    try:
        mounted = is_mounted(path)
    except NotMounted:
        return  # opening it says what is wrong
    if mounted:
        raise UsageError(path, "is a mounted disk: a raw file already, which any program can copy")


async def _shielded(close: Callable[[], Awaitable[None]]) -> None:
    with trio.CancelScope(shield=True):
        await close()


@dataclass
class _Origin:
    """Where data comes from; `share_with` is None where there is no file, or none (any more) to share with."""

    read: Read
    share_with: WithDescriptor | None


async def _copy(image: Image, storage: FileStorage, backing: Backing | None, out: NewFile, progress: Progress) -> None:
    progress.size = image.header.image_size
    await trio.to_thread.run_sync(_set_size, out, progress.size)
    leaf = _Origin(storage.read_into, lambda function: trio.to_thread.run_sync(function, storage.fd))
    below = _Below(backing, progress.size) if backing is not None else None
    origin = await _origin_of(backing) if backing is not None else None
    try:
        async with trio.open_nursery() as nursery, aclosing(image.stored().runs()) as runs:
            writer = _Writer(out, progress, nursery)
            async for run in runs:
                if run.state is State.DATA:
                    await writer.put(leaf, run.offset, run.pos, run.length)
                elif run.state is State.ZERO or below is None or origin is None:
                    progress.done += run.length
                else:
                    for extent in await below.extents(run.pos, run.length):
                        if extent.zero:
                            progress.done += extent.length
                        else:
                            await writer.put(origin, extent.pos, extent.pos, extent.length)
    except BaseExceptionGroup as group:
        raise first_of(group) from None


async def _origin_of(backing: Backing) -> _Origin:
    source = await _waited(backing, backing.source)
    regular = isinstance(source, FileSource) and stat.S_ISREG(source.status.st_mode)

    async def read(pos: int, buffer: memoryview) -> None:
        await _waited(backing, lambda: backing.read_into(pos, buffer))

    return _Origin(read, source.with_descriptor if isinstance(source, FileSource) and regular else None)


class _Piece(NamedTuple):
    pos: int
    length: int
    zero: bool


class _Below:
    """What the backing promises to read as zeros: asked in few, large questions, as a leaf may have holes everywhere."""

    def __init__(self, backing: Backing, size: int) -> None:
        self._backing = backing
        self._size = size
        self._ask = FIRST_ASK
        self._end = 0
        self._known: list[_Piece] = []
        """In order, up to `_end`, without gaps; what is before the last question's range is forgotten."""

    async def extents(self, pos: int, length: int) -> list[_Piece]:
        """Return what is known of the range, piece by piece. Ranges are asked for in ascending order."""
        end = pos + length
        pieces = [_clipped(piece, pos, end) for piece in self._known if piece.pos + piece.length > pos]
        self._known = [piece for piece in self._known if piece.pos + piece.length > end]
        while self._end < end:
            start = max(pos, self._end)
            asked = min(self._size - start, self._ask)
            found = await _waited(self._backing, lambda: self._backing.extents(start, asked))  # noqa: B023 (awaited here)
            self._ask = min(MOST_ASK, 2 * self._ask) if len(found) < FEW else FIRST_ASK
            self._end = start + asked
            for extent in found:
                piece = _Piece(start, extent.length, extent.zero)
                start += extent.length
                if piece.pos < end:
                    pieces.append(_clipped(piece, pos, end))
                if start > end:
                    self._known.append(piece)
        return [piece for piece in pieces if piece.length > 0]


def _clipped(piece: _Piece, pos: int, end: int) -> _Piece:
    start = max(pos, piece.pos)
    return _Piece(start, min(end, piece.pos + piece.length) - start, piece.zero)


class _Writer:
    """Puts data into the new file, several pieces at once."""

    def __init__(self, out: NewFile, progress: Progress, nursery: trio.Nursery) -> None:
        self._out = out
        self._progress = progress
        self._nursery = nursery
        self._slots = trio.Semaphore(AT_ONCE)

    async def put(self, origin: _Origin, start: int, pos: int, length: int) -> None:
        """Bring the `length` bytes at `start` of `origin` to `pos`; returns when the last piece is on its way."""
        while origin.share_with is not None and length >= BLOCK and not (start | pos) % BLOCK:
            piece = min(length - length % BLOCK, SHARE_PIECE)
            code = await origin.share_with(partial(self._share, start, pos, piece))
            if code in _NEVER:
                origin.share_with = None
            if code:
                break
            self._progress.shared += piece
            self._progress.done += piece
            start, pos, length = start + piece, pos + piece, length - piece
        while length:
            piece = min(length, PIECE)
            await self._slots.acquire()
            self._nursery.start_soon(self._carry, origin.read, start, pos, piece)
            start, pos, length = start + piece, pos + piece, length - piece

    def _share(self, start: int, pos: int, length: int, fd: int) -> int:
        """Return 0, or the number of the error, and then nothing has changed that reading and writing does not mend."""
        try:
            fcntl.ioctl(self._out.fd, _FICLONERANGE, _CLONE.pack(fd, start, length, pos))
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    async def _carry(self, read: Read, start: int, pos: int, length: int) -> None:
        try:
            buffer = memoryview(bytearray(length))
            await read(start, buffer)
            # Not in one line: `+=` looks at its left side before the await, and forgets what others add meanwhile.
            written = await trio.to_thread.run_sync(_write_sparse, self._out, pos, buffer)
            self._progress.written += written
            self._progress.done += length
        finally:
            self._slots.release()


def _set_size(out: NewFile, size: int) -> None:
    try:
        os.ftruncate(out.fd, size)
    except OSError as error:
        raise failure(out.path, error) from error


def _write_sparse(out: NewFile, pos: int, data: memoryview) -> int:
    """Write `data` but for its blocks of zeros, which are holes already; return how many bytes that was."""
    whole = len(data) - len(data) % BLOCK
    used = np.frombuffer(data[:whole], dtype=np.uint64).reshape(-1, BLOCK // 8).any(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], used, [False])).astype(np.int8))) * BLOCK
    written = 0
    ranges = [*zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True), (whole, len(data))]
    try:
        for start, end in ranges:
            while start < end:
                count = os.pwrite(out.fd, data[start:end], pos + start)
                start, written = start + count, written + count
    except OSError as error:
        raise failure(out.path, error) from error
    return written


async def _waited(backing: Backing, request: Callable[[], Awaitable[T]]) -> T:
    """Return the answer of the backing, which has as long as a guest's read gives it."""
    options = DiskOptions()
    with trio.move_on_after(options.backing_timeout or float("inf")):
        return await request()
    raise timed_out(backing, options.backing_timeout)
