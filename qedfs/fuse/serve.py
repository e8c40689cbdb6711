"""Mounts a tree and serves it until it is unmounted.

pyfuse3 keeps its session in globals of its module, so a process can serve one mount in its life.
This process must never touch its own mount: it would wait for itself.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import pyfuse3
import trio

from qedfs.config import MountOptions
from qedfs.errors import MountError
from qedfs.fuse.device import mount_device
from qedfs.fuse.handshake import Handshake
from qedfs.fuse.mountpoint import check_mountpoint, library_options, mount_options
from qedfs.fuse.operations import Operations
from qedfs.fuse.readiness import short_waits, waits_as_known
from qedfs.fuse.tuning import CONGESTION_THRESHOLD, MAX_BACKGROUND, widen_readahead
from qedfs.fuse.unmount import unmount
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
    device = await trio.to_thread.run_sync(mount_device, mountpoint, mount_options(options, fsname))
    ended = False
    try:
        with _opened(operations, device, options):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_report_ready, operations, mountpoint, task_status)
                nursery.start_soon(_drop_names, tree)
                await pyfuse3.main(max_tasks=MAX_TASKS)
                ended = True
                nursery.cancel_scope.cancel()
    finally:
        if not ended:
            # The device is closed: what is still mounted answers nobody.
            with trio.CancelScope(shield=True), contextlib.suppress(MountError):
                await unmount(mountpoint, lazy=True)
        # The last RELEASE may be missing.
        tree.close_all()


@contextlib.contextmanager
def _opened(operations: Operations, device: int, options: MountOptions) -> Iterator[None]:
    """Let pyfuse3 serve the mounted `device`, which it closes at the end."""
    with contextlib.ExitStack() as stack:
        place = f"/dev/fd/{device}"  # libfuse's way to be given a mount that has been made
        if waits_as_known():
            handshake = Handshake(device, max_background=MAX_BACKGROUND, congestion_threshold=CONGESTION_THRESHOLD)
            stack.callback(handshake.close)
            stack.enter_context(short_waits(options.poll, first=handshake.finish))
            place = handshake.mountpoint
        else:
            _log.info("pyfuse3 %s waits in a way unknown to us: small requests are slower", pyfuse3.__version__)
        try:
            pyfuse3.init(operations, place, library_options(options))
        except RuntimeError as error:
            raise MountError("libfuse", str(error)) from error
        stack.callback(pyfuse3.close, unmount=False)
        yield


async def _report_ready(operations: Operations, mountpoint: str, task_status: trio.TaskStatus[None]) -> None:
    await operations.ready.wait()
    await trio.to_thread.run_sync(widen_readahead, mountpoint, abandon_on_cancel=True)
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
