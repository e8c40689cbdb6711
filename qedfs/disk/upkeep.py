"""Committing what nobody asked to be durable, before it is old."""

from __future__ import annotations

from collections.abc import Callable

import trio

from qedfs.errors import LeafError, QedfsError
from qedfs.image.image import Image

COMMIT_AGE = 1.0
"""Seconds that metadata may be older than the disk before it is committed unasked: what a crash without any fsync may
cost in copies, against one flush of the leaf."""
RETRY_COMMIT = 5.0
"""Seconds between attempts to commit when the leaf does not take it."""


async def commit_by_age(image: Image, note: Callable[[QedfsError], None]) -> None:
    """Commit `image` whenever its metadata is older than `COMMIT_AGE` or much, until a flush fails. Tells `note` of errors."""
    while True:
        await image.wait_changed()
        with trio.move_on_after(COMMIT_AGE):
            await image.wait_urgent()
        try:
            await image.commit(durable=False)
        except LeafError as error:
            note(error)
            if image.committer.failed is not None:
                return
            await trio.sleep(RETRY_COMMIT)
