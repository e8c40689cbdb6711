"""Mounts a tree and serves it until it is unmounted.

pyfuse3 keeps its session in globals of its module, so a process can serve one mount in its life.
This process must never touch its own mount: it would wait for itself.
"""

from __future__ import annotations

import logging

import pyfuse3
import trio

from qedfs.config import MountOptions
from qedfs.errors import MountError
from qedfs.fuse.mountpoint import captured_stderr, check_mountpoint, mount_options
from qedfs.fuse.operations import Operations
from qedfs.fuse.readiness import short_waits
from qedfs.fuse.tuning import tune
from qedfs.tree.tree import ROOT, Tree

_log = logging.getLogger(__name__)

MAX_TASKS = 4096
"""Requests in progress at once. Each request that waits for a backing keeps a task, and with none left every disk of
the mount stands still. Half of them cannot be taken by background requests (`tuning.MAX_BACKGROUND`); of the others
there is one per waiting thread of a client, so this is more threads than one host has stuck at a time. A waiting task
takes about 20 KiB, and the size of its request more for a write."""


async def serve(
    tree: Tree,
    mountpoint: str,
    options: MountOptions,
    *,
    fsname: str,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Mount `tree` on the directory `mountpoint`, serve it, and return when it has been unmounted.

    `task_status.started()` is called when the mount is usable. `fsname` is what mount tables show as the source.
    A cancellation detaches the mount at once: whoever has a file open gets ENOTCONN and loses cached writes. The good
    way to end is `unmount.unmount`. In any case all handles of the tree are closed at the end.

    Raises:
        MountError: the mount cannot be made; nothing is left mounted.
    """
    await trio.to_thread.run_sync(check_mountpoint, mountpoint)
    operations = Operations(tree, direct_io=options.direct_io)
    with short_waits(options.poll):
        _mount(operations, mountpoint, mount_options(options, fsname))
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_report_ready, operations, mountpoint, task_status)
                nursery.start_soon(_drop_names, tree)
                await pyfuse3.main(max_tasks=MAX_TASKS)
                nursery.cancel_scope.cancel()
        finally:
            # After a plain unmount this only frees the session; else it detaches.
            pyfuse3.close(unmount=True)
            # The last RELEASE may be missing.
            tree.close_all()


def _mount(operations: Operations, mountpoint: str, options: set[str]) -> None:
    with captured_stderr() as messages:
        try:
            pyfuse3.init(operations, mountpoint, options)
        except RuntimeError as error:
            raise MountError(mountpoint, messages() or str(error)) from error


async def _report_ready(operations: Operations, mountpoint: str, task_status: trio.TaskStatus[None]) -> None:
    await operations.ready.wait()
    # Limits can be raised only now: the kernel sets them from our answer to its first message.
    await trio.to_thread.run_sync(tune, mountpoint, abandon_on_cancel=True)
    task_status.started()


async def _drop_names(tree: Tree) -> None:
    """Make the kernel forget the names of leaves that are gone.

    In a thread: the kernel may wait for a request under way, which only this loop can answer.
    """
    async for name, _inode in tree.removals:
        try:
            await trio.to_thread.run_sync(pyfuse3.invalidate_entry, ROOT, name, abandon_on_cancel=True)
        except OSError as error:
            # ENOENT: the kernel does not know the name.
            _log.debug("name of a removed leaf not dropped: %s", error)
