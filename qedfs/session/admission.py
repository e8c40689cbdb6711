"""Opening one leaf: file, lock, image, backing, disk; and closing them in the opposite order."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple

import trio

from qedfs.backing.base import Identity
from qedfs.backing.file import real_path
from qedfs.backing.locate import Reference, Route
from qedfs.backing.location import FileLocation, host_of, masked, parse_location
from qedfs.backing.mirror_name import agree, joined
from qedfs.backing.policy import Policy
from qedfs.backing.resilient import Backing
from qedfs.config import MountOptions
from qedfs.disk.disk import Disk, open_disk
from qedfs.errors import (
    BackingChanged,
    BackingLocked,
    BackingRefused,
    ImageError,
    LeafError,
    QedfsError,
    ReadOnly,
    UsageError,
)
from qedfs.image.image import Image, open_image
from qedfs.image.record import Pin, hash_name, short_tag
from qedfs.image.storage import FileStorage, open_storage
from qedfs.session.places import is_below
from qedfs.session.shared_cache import SharedCaches

log = logging.getLogger(__name__)

PATIENCE = 2.0
"""Seconds that a mount waits for each backing, to find out whether it is the right one. A leaf whose backing does not
answer is served all the same, and must not keep the caller waiting."""


DAMAGED = (
    "qedfs's record in the header is damaged: mode, hold and what the backing was are not known (-o trust_backing)"
)
NO_ROOM = "no room in its header to note what its backing is; a change will go unnoticed"


@dataclass(frozen=True)
class Terms:
    """What holds for all leaves of a mount. `mountpoint` is a real path: no backing may lie below it; empty for no mount.

    `caches` are between the leaves and their remote backings, if there shall be any.
    """

    options: MountOptions
    mountpoint: str
    uid: int
    caches: SharedCaches | None = None

    def policy(self) -> Policy:
        return Policy(
            mounter=self.uid,
            allow_backing=self.options.allow_backing,
            forbidden_roots=(self.mountpoint,) if self.mountpoint else (),
            connections=self.options.connections,
            secret=self.options.secret,
        )


class Admitted(NamedTuple):
    """A disk, and the status of the open file behind it: not of its path, which may mean another file by now."""

    disk: Disk
    status: os.stat_result


@asynccontextmanager
async def admitted(path: str, terms: Terms) -> AsyncIterator[Admitted]:
    """Serve the image at `path` (absolute) as a disk while inside; leaving makes everything durable and closes it.

    Raises:
        InvalidImage, Locked, BackingRefused, BackingChanged, NotAllowed: it cannot be served.
        LeafError: it cannot be read; at leaving: what was written since the last flush may not be durable.
    """
    storage = await _open_storage(path, read_only=terms.options.read_only)
    status = os.fstat(storage.fd)
    image = await _open_image(storage, terms.mountpoint)
    # Ordering: the disk's copies end, then the image is committed and closed, then nobody reads the backing any more.
    async with AsyncExitStack() as opened:
        backing = backing_of(image, storage, terms) if image.backing_name else None
        if backing:
            opened.push_async_callback(_shielded, backing.aclose)
        opened.push_async_callback(_shielded, image.aclose)
        warnings: list[QedfsError] = [ImageError(image.name, DAMAGED)] if image.record_damaged else []
        if backing and not image.record.hold:
            warnings += await _meet(image, backing, trust=terms.options.trust_backing)
        disk = await opened.enter_async_context(open_disk(image, backing, terms.options.disk))
        for warning in warnings:
            disk.note(warning)
        yield Admitted(disk, status)


async def _shielded(close: Callable[[], Awaitable[None]]) -> None:
    with trio.CancelScope(shield=True):
        await close()


async def _open_storage(path: str, *, read_only: bool) -> FileStorage:
    if not read_only:
        try:
            return await open_storage(path, writable=True)
        except ReadOnly as error:
            log.warning("%s; served read-only", error)
    return await open_storage(path, writable=False)


async def _open_image(storage: FileStorage, mountpoint: str) -> Image:
    try:
        if is_below(real_path(storage.fd), mountpoint):
            # Ordering: before it is read, as this process would wait for itself.
            raise UsageError(storage.name, "lies in the mount itself")
        return await open_image(storage)
    except BaseException:
        await _shielded(storage.aclose)
        raise


def backing_of(image: Image, storage: FileStorage, terms: Terms) -> Backing:
    """Return the backing that `image`, open as `storage`, names, not connected yet. It is to be what was pinned."""
    pin = image.record.pin_of(image.backing_name)
    stored = "raw" if image.header.backing_is_raw else pin.format if pin else None
    # From the open file, not from its path: whose image is it that names the backing?
    reference = Reference(image.backing_name, stored, real_path(storage.fd), os.fstat(storage.fd))
    policy = terms.policy()
    # What the user trusts is pinned anew; a held image is on its way from somewhere else and pins nothing.
    expected = None if pin is None or terms.options.trust_backing or image.record.hold else Identity(pin.size, pin.tag)
    # What a held image reads is still changing, and is nothing to keep.
    if terms.caches is not None and not image.record.hold:
        cached = terms.caches.backing(reference, policy, expected)
        if cached is not None:
            return cached
    route = Route(reference, policy, expected, changing=image.record.hold)
    return Backing(
        route.open,
        tend=route.tend,
        name=masked(image.backing_name),
        format=stored or "",
        expected=expected,
        host=_host(reference),
        changing=image.record.hold,
    )


def _host(reference: Reference) -> str | None:
    try:
        return host_of(parse_location(reference.name, FileLocation(reference.image)))
    except BackingRefused:
        return None  # opening it will say what is wrong


async def _meet(image: Image, backing: Backing, *, trust: bool) -> list[QedfsError]:
    """Find out whether the backing is the right one, and remember what it is at the first writable mount.

    Returns what `last_error` should show.
    """
    identity: Identity | None = None
    with trio.move_on_after(PATIENCE):
        try:
            identity = await backing.identity()
        except BackingChanged as error:
            raise BackingChanged(error.what, f"{error.why} (accepted by '-o trust_backing')") from error
    if identity is None:
        if isinstance(backing.failure, BackingLocked):
            raise BackingRefused(backing.failure.what, backing.failure.why)
        why = backing.statistics().last_error or f"{backing.name}: does not answer"
        log.warning("%s; until it is reached only what is local can be read", why)
    elif image.record_damaged and not trust:
        pass  # what the backing was is not known any more, and that it is the same now is for a person to say
    elif image.storage.writable and (trust or _says_more(identity, image.record.pin_of(image.backing_name))):
        return await _pin(
            image, Pin(hash_name(image.backing_name), backing.format, identity.size, short_tag(identity.tag))
        )
    return []


def _says_more(identity: Identity, pin: Pin | None) -> bool:
    """Whether nothing was pinned yet, or of mirrors fewer than are known now."""
    return pin is None or (agree(pin.tag, identity.tag) and joined(pin.tag, identity.tag) != pin.tag)


async def _pin(image: Image, pin: Pin) -> list[QedfsError]:
    if image.record.pins == (pin,):
        return []
    try:
        stored = await image.change_record(lambda record: record.pinned(pin))
    except LeafError as error:
        return [error]
    return [] if stored else [ImageError(image.name, NO_ROOM)]
