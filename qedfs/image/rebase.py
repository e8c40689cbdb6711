"""Changing the reference to the backing, and nothing else.

At every instant the header names the old backing with its pin in force, or the new one with its own: the record holds
both pins first, the new name is written where the old one is not, and one write of the header's 64 bytes changes over.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace

import trio

from qedfs.errors import InvalidImage, UsageError
from qedfs.image import header as headers
from qedfs.image import record as records
from qedfs.image.header import NAME_OFFSET, Header
from qedfs.image.image import Image, open_image
from qedfs.image.record import Pin, Record
from qedfs.image.storage import Storage
from qedfs.image.tables import State


async def rebase_image(storage: Storage, *, backing: tuple[str, bool] | None, pin: Pin | None, force: bool) -> bool:
    """Let the image in `storage`, which nobody else has open, name another backing; return whether the pin is stored.

    `backing` is a name, stored as it is, and whether the backing is raw; None drops the reference, which is refused
    while any cluster needs the backing. `pin` says what the new backing is; without one the next mount pins it.
    An image that stands alone gets a backing only if it has every cluster, or with `force`: what it does not have reads as
    zeros. With `force` a name that finds no room beside the old one overwrites it, which a power cut may leave half-done.
    The storage is closed in the end.

    Raises:
        InvalidImage: it is no QED image, or has no room for the name.
        UsageError: the backing is still needed, or something needs `force`.
        LeafError, LeafFull: it cannot be read or written.
    """
    try:
        image = await open_image(storage)
        if backing is not None:
            if not force:
                await _refuse_to_fill(image)
            return await _rename(image, *backing, pin, force)
        await _refuse_while_needed(image)
        await _write_header(storage, image.header.without_backing())
        return await _store(image, replace(image.record, pins=()))
    finally:
        # The image has allocated nothing, so there is nothing of its own to bring to the disk.
        with trio.CancelScope(shield=True):
            await storage.aclose()


async def _rename(image: Image, backing: str, raw: bool, pin: Pin | None, force: bool) -> bool:
    storage, header = image.storage, image.header
    if header.compat_features:
        raise InvalidImage(storage.name, f"has compatible features that are not known ({header.compat_features:x})")
    name = headers.encode_backing_name(backing, header, storage.name)
    hashed = records.hash_name(backing)
    # A pin of this very name that is not renewed would hold for whatever the name means now.
    record = replace(image.record, pins=tuple(p for p in image.record.pins if p.name_hash != hashed))
    if image.backing_name == backing:
        # Only the format or the pin changes; with the old pin gone or replaced first, no mix of both can be in force.
        pinned = await _store(image, record.pinned(pin) if pin else record)
        offset = header.backing_name_offset
        await _write_header(storage, header.with_backing(len(name), raw=raw, name_offset=offset))
        return pinned and pin is not None
    place = _place(header, len(name))
    if place is None and not force:
        raise UsageError(
            storage.name,
            "its header has no room for the new backing name beside the old one (--force overwrites it in place)",
        )
    # A name that reaches into the record's place takes the record with it.
    room = NAME_OFFSET + len(name) <= records.offset(header)
    pinned = pin is not None and room and await _store(image, record.also_pinned(pin))
    if place is None:
        await storage.write(NAME_OFFSET, name)
        place = NAME_OFFSET
    else:
        await storage.write(place, name)
        # Ordering: the name before the header that points to it.
        await storage.flush()
    await _write_header(storage, header.with_backing(len(name), raw=raw, name_offset=place))
    if pin is not None and pinned:
        await _store(image, record.pinned(pin))
    return pinned


def _place(header: Header, length: int) -> int | None:
    """Return where a name of `length` bytes finds room beside the present one and the record; None if nowhere."""
    end = records.offset(header)
    if not header.has_backing:
        return NAME_OFFSET if NAME_OFFSET + length <= end else None
    taken = header.backing_name_offset, header.backing_name_offset + header.backing_name_size
    if NAME_OFFSET + length <= min(taken[0], end):
        return NAME_OFFSET
    return taken[1] if taken[1] + length <= end else None


async def _refuse_to_fill(image: Image) -> None:
    if image.backing_name:
        return
    async with aclosing(image.stored().runs()) as runs:
        async for run in runs:
            if run.state is State.BACKING:
                raise UsageError(
                    image.storage.name,
                    f"stands alone, and reads as zeros what it does not have (from byte {run.pos} on); over a backing that "
                    "would change (--force takes it)",
                )


async def _refuse_while_needed(image: Image) -> None:
    if not image.backing_name:
        return
    pin = image.record.pin_of(image.backing_name)
    # Past the end of the backing there is nothing that it could be needed for.
    end = min(image.header.image_size, pin.size) if pin else image.header.image_size
    async with aclosing(image.stored().runs()) as runs:
        async for run in runs:
            if run.pos >= end:
                return
            if run.state is State.BACKING:
                raise UsageError(
                    image.storage.name, f"still needs its backing (from byte {run.pos} on); stream it first"
                )


async def _store(image: Image, record: Record) -> bool:
    """Store `record` durably; False where it has no room."""
    if record == image.record:
        return True
    sector = records.encode(record)
    if sector is None or not records.fits(image.header):
        return False
    await image.storage.write(records.offset(image.header), sector)
    await image.storage.flush()
    return True


async def _write_header(storage: Storage, header: Header) -> None:
    await storage.write(0, header.encode())
    await storage.flush()
