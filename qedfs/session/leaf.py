"""Leaves that are not mounted: made on a backing, moved to another one, looked at."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple

import trio

from qedfs.backing.base import Source
from qedfs.backing.locate import Reference, open_backing
from qedfs.backing.location import masked
from qedfs.backing.mirror_name import is_mirrors
from qedfs.backing.policy import Policy
from qedfs.errors import BackingLocked, BackingUnavailable, UsageError
from qedfs.image.create import create_leaf
from qedfs.image.geometry import SECTOR, Geometry
from qedfs.image.header import Header
from qedfs.image.image import Image, open_image
from qedfs.image.rebase import rebase_image
from qedfs.image.record import Pin, Record, hash_name, short_tag
from qedfs.image.storage import open_storage

PATIENCE = 4.0
"""Seconds for a backing to answer; a person waits for it."""

_SEEN = ("raw", "qed", "qcow2", "qcow")
"""The formats that need no pin to be told later: from a flag of the header, or from the magic."""


@dataclass(frozen=True)
class NewLeaf:
    """What a new leaf shall be. `size` is in bytes, None for that of the backing; `mode` is empty for the default."""

    path: str
    size: int | None
    backing: str | None
    format: str | None
    geometry: Geometry
    mode: str
    hold: bool
    overwrite: bool
    secret: bytes | None = None
    """The passphrase of an encrypted backing."""
    allow_backing: tuple[str, ...] = ()
    """As the mount option."""


class Made(NamedTuple):
    """The header of a new leaf, and the format of its backing, empty without one."""

    header: Header
    format: str


async def create(leaf: NewLeaf) -> Made:
    """Make the leaf, with the identity of its backing recorded.

    The backing is open, and locked if it is a file, until the leaf is there: it cannot be the file that is overwritten.

    Raises:
        UsageError: neither a size nor a backing was given.
        BackingError: the backing cannot be opened, or does not answer.
        InvalidImage, ReadOnly, Locked, LeafError, LeafFull: the leaf cannot be made (`create_leaf`).
    """
    record = Record(leaf.mode, leaf.hold)
    if leaf.backing is None:
        if leaf.size is None:
            raise UsageError(leaf.path, "needs a size (-s) or a backing (-b)")
        header = await create_leaf(
            leaf.path,
            size=_whole_sectors(leaf.size),
            geometry=leaf.geometry,
            backing=None,
            record=record,
            overwrite=leaf.overwrite,
        )
        return Made(header, "")
    async with _opened(leaf.backing, leaf.format, leaf.path, leaf.secret, leaf.allow_backing) as source:
        if leaf.hold and is_mirrors(leaf.backing):
            raise UsageError(leaf.path, "a held leaf cannot have mirrors: what changes is in one place")
        if leaf.hold and source.format not in _SEEN:
            raise UsageError(leaf.path, f"a held leaf records nothing, and that its backing is {source.format} must be")
        header = await create_leaf(
            leaf.path,
            size=_whole_sectors(source.size if leaf.size is None else leaf.size),
            geometry=leaf.geometry,
            backing=(leaf.backing, source.format == "raw"),
            # While it is held the backing may still change: releasing the hold pins it.
            record=record if leaf.hold else record.pinned(_pin(leaf.backing, source)),
            overwrite=leaf.overwrite,
        )
        return Made(header, source.format)


async def reach(backing: str, format: str | None, path: str) -> None:
    """Return when `backing`, as the leaf at `path` would name it, has answered.

    Raises:
        BackingError: it cannot be opened, or does not answer.
    """
    async with _opened(backing, format, path):
        pass


async def rebase(
    path: str,
    backing: str,
    format: str | None,
    *,
    force: bool,
    secret: bytes | None = None,
    allow_backing: tuple[str, ...] = (),
) -> bool:
    """Let the leaf at `path` name `backing`, or none if that is empty; return whether its identity could be recorded.

    With `force` a backing of another size, or one that does not answer (its format must be told then), is taken too.
    `allow_backing` is as the mount option.

    Raises:
        UsageError: the leaf still needs its backing, or `force` would be needed.
        BackingError: the backing cannot be opened, or does not answer.
        InvalidImage, ReadOnly, Locked, LeafError, LeafFull: the leaf cannot be changed.
    """
    if not backing:
        return await rebase_image(await open_storage(path, writable=True), backing=None, pin=None, force=force)
    try:
        async with _opened(backing, format, path, secret, allow_backing) as source:
            if not force:
                await _refuse_other_size(path, source)
            named, pin = (backing, source.format == "raw"), _pin(backing, source)
            return await rebase_image(await open_storage(path, writable=True), backing=named, pin=pin, force=force)
    except BackingUnavailable as error:
        if not force or format not in _SEEN or isinstance(error, BackingLocked):
            raise
    named = (backing, format == "raw")
    return await rebase_image(await open_storage(path, writable=True), backing=named, pin=None, force=force)


@asynccontextmanager
async def looked_at(path: str) -> AsyncIterator[Image]:
    """Have the image at `path` open for a look, without locks: somebody may be using it.

    On the disk a leaf in use is a valid image, if one of a moment ago.

    Raises:
        InvalidImage: it is no QED image, or cannot be opened.
        LeafError: it cannot be read.
    """
    storage = await open_storage(path, writable=False, lock=False)
    try:
        yield await open_image(storage)
    finally:
        with trio.CancelScope(shield=True):
            await storage.aclose()


@asynccontextmanager
async def _opened(
    name: str, format: str | None, leaf: str, secret: bytes | None = None, allow_backing: tuple[str, ...] = ()
) -> AsyncIterator[Source]:
    reference = Reference(name, format, await trio.to_thread.run_sync(os.path.realpath, leaf))
    with trio.move_on_after(PATIENCE) as patience:
        source = await open_backing(reference, Policy(os.getuid(), allow_backing, secret=secret))
    if patience.cancelled_caught:
        raise BackingUnavailable(masked(name), f"does not answer within {PATIENCE:.0f} s")
    try:
        yield source
    finally:
        with trio.CancelScope(shield=True):
            await source.aclose()


async def _refuse_other_size(path: str, source: Source) -> None:
    async with looked_at(path) as image:
        pin = image.record.pin_of(image.backing_name)
    if pin is not None and pin.size != source.identity.size:
        raise UsageError(
            source.name,
            f"has {source.identity.size} bytes, the backing it would replace {pin.size}; a rebase is for the same content "
            "(--force takes it)",
        )


def _pin(name: str, source: Source) -> Pin:
    return Pin(hash_name(name), source.format, source.identity.size, short_tag(source.identity.tag))


def _whole_sectors(size: int) -> int:
    return -(-size // SECTOR) * SECTOR
