"""Releasing a held disk: from the host it comes from to being its own (docs/concurrency.md, "The hold").

While a disk is held its backing still changes: reads pass through, and nothing that was read is kept anywhere. The
release is called when the source stands still. What it must achieve is that no byte read before it is ever given out
or linked after it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import trio

from qedfs.backing.base import Identity
from qedfs.backing.resilient import Backing
from qedfs.errors import BackingUnavailable, ImageError
from qedfs.image.image import Image
from qedfs.image.record import Pin, Record, hash_name, short_tag

RELEASE_PATIENCE = 15.0
"""Seconds that a release waits for the backing. A guest stands still meanwhile, on neither host; a link that was gone for
ten seconds and the pause before the next attempt fit into it."""

DropPages = Callable[[], Awaitable[None]]
"""Makes the kernel forget what it has cached of this disk, and returns when it has."""


async def release(image: Image, backing: Backing | None, drop_pages: DropPages) -> None:
    """Make `image`, held so far, one that is not: durably, and with the pin of what its backing is now.

    The caller lets reads be copied and writes in at once after the return, with no await in between.

    Raises:
        BackingUnavailable: the backing does not answer within `RELEASE_PATIENCE`.
        BackingRefused: it cannot be had at all.
        ImageError: the header has no room for the pin.
        LeafError, LeafFailed: the leaf did not take the record; on the disk it may be held or released.
    """
    identity: Identity | None = None
    if backing is not None:
        # Ordering: the connections go first. What is read from here on is what the source is now, so pages that come into
        # the kernel's cache while the next step empties it are fresh. Reads under way are repeated on a new connection.
        await backing.reset()
        identity = await _identity(backing)
    # Ordering: still held, so a dirty page (a mapping can make one) is refused with EBUSY and dropped: around what the
    # guest wrote it may hold bytes of the source from before.
    await drop_pages()

    def released(record: Record) -> Record:
        if identity is None or backing is None:
            return replace(record, hold=False)
        pin = Pin(hash_name(image.backing_name), backing.format, identity.size, short_tag(identity.tag))
        return replace(record, hold=False, pins=(pin,))

    # One write of one sector: after a crash the leaf is held, or it is released and knows its backing.
    with trio.CancelScope(shield=True):
        stored = await image.change_record(released)
    if not stored:
        raise ImageError(image.name, "no room in its header to note what its backing is; it stays held")
    if backing is not None and identity is not None:
        backing.settle(identity)


async def _identity(backing: Backing) -> Identity:
    with trio.move_on_after(RELEASE_PATIENCE):
        return await backing.identity()
    why = backing.statistics().last_error or "no answer"
    raise BackingUnavailable(backing.name, f"not reached within {RELEASE_PATIENCE:g} s, the image stays held ({why})")
