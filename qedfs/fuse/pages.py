"""Making the kernel forget what it has cached of a file."""

from __future__ import annotations

import errno
import os

import pyfuse3
import trio

from qedfs.errors import Held


async def drop_pages(inode: int) -> None:
    """Return when no page that the kernel cached of `inode` before this call is used any more.

    Reads under way are waited for; dirty pages are written first, and dropped all the same when the write is refused.
    In a thread: the kernel waits for requests that only the event loop can answer.

    Raises:
        Held: the kernel does not do it.
    """
    try:
        await trio.to_thread.run_sync(pyfuse3.invalidate_inode, inode, False, abandon_on_cancel=True)
    except OSError as error:
        if error.errno != errno.ENOENT:  # that is an inode of which the kernel knows nothing
            why = f"stays held, as the kernel does not drop its pages ({os.strerror(error.errno or 0)})"
            raise Held("hold", why) from error
