"""Making an image: everything is judged before a byte is written, and the header comes last.

An image without its magic opens nowhere. So the tables, the backing name and the record are durable before the 64 bytes
of the header are written, and neither a power cut nor a full disk leaves something half-made that opens.
"""

from __future__ import annotations

import os

import trio

from qedfs.errors import InvalidImage, LeafError
from qedfs.image import header as headers
from qedfs.image import record as records
from qedfs.image.geometry import Geometry
from qedfs.image.header import Header
from qedfs.image.record import Record
from qedfs.image.storage import FileStorage, Storage, create_storage, open_storage

_PIECE = 1 << 20
"""Bytes of zeros written at once."""


async def create_image(
    storage: Storage, *, size: int, geometry: Geometry, backing: tuple[str, bool] | None, record: Record
) -> Header:
    """Turn `storage`, which is writable and not in use, into an empty image of `size` bytes, and return its header.

    `size` is a multiple of 512. `backing` is a name, stored as it is, and whether the backing is raw. What `storage`
    held is gone, except when the arguments are refused. After a failure on the way the file is left empty if possible.

    Raises:
        InvalidImage: no such image can be made; nothing was written.
        LeafError, LeafFull: it cannot be written.
    """
    header, name = _designed(storage.name, size, geometry, backing)
    sector = records.encode(record)
    if record != Record() and (sector is None or not records.fits(header)):
        raise InvalidImage(
            storage.name, "the backing name leaves no room for qedfs's record; choose larger clusters or a shorter name"
        )
    try:
        if storage.length():
            await storage.truncate(0)
            # Ordering: no header of an earlier image may come back under what follows.
            await storage.flush()
        # Written, not left as a hole: the first allocations must not find that there is no room for L1.
        end = header.l1_table_offset + geometry.table_bytes
        for offset in range(header.l1_table_offset, end, _PIECE):
            await storage.write(offset, bytes(min(_PIECE, end - offset)))
        if name:
            await storage.write(header.backing_name_offset, name)
        if record != Record() and sector is not None:
            await storage.write(records.offset(header), sector)
        # Ordering: all of the image before the magic that makes it one.
        await storage.flush()
        await storage.write(0, header.encode())
        await storage.flush()
    except BaseException:
        with trio.CancelScope(shield=True):
            await _empty(storage)
        raise
    return header


async def create_leaf(
    path: str, *, size: int, geometry: Geometry, backing: tuple[str, bool] | None, record: Record, overwrite: bool
) -> Header:
    """Make the image file `path` (`create_image`), durably in its directory too, and return its header.

    An existing file is refused unless `overwrite`; then it is locked before anything of it is lost. A new file is
    removed again when the image cannot be made.

    Raises:
        InvalidImage, LeafError, LeafFull: as `create_image`; or the file exists, or cannot be made.
        ReadOnly, Locked: the existing file cannot be written, or somebody uses it.
    """
    storage, new = await _open(path, overwrite)
    try:
        header = await create_image(storage, size=size, geometry=geometry, backing=backing, record=record)
        await trio.to_thread.run_sync(_sync_directory, path)
        return header
    except BaseException:
        if new:
            # Still locked by us, so it is ours.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(os.unlink, path)
        raise
    finally:
        await storage.aclose()


async def _open(path: str, overwrite: bool) -> tuple[FileStorage, bool]:
    exists = await trio.to_thread.run_sync(os.path.lexists, path)
    if not exists:
        return await create_storage(path), True
    if not overwrite:
        raise InvalidImage(path, "exists already (--force overwrites it)")
    return await open_storage(path, writable=True), False


def _designed(path: str, size: int, geometry: Geometry, backing: tuple[str, bool] | None) -> tuple[Header, bytes]:
    geometry = Geometry.checked(*geometry, path)
    geometry.check_image_size(size, path)
    header = Header(geometry, size, l1_table_offset=geometry.cluster_size)
    if backing is None:
        return header, b""
    name = headers.encode_backing_name(backing[0], header, path)
    return header.with_backing(len(name), raw=backing[1]), name


async def _empty(storage: Storage) -> None:
    try:
        await storage.truncate(0)
    except LeafError:
        pass  # the first failure is the one to tell; without its header the file opens nowhere


def _sync_directory(path: str) -> None:
    try:
        fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise LeafError(path, f"its directory cannot be flushed ({os.strerror(error.errno or 0)})") from error
