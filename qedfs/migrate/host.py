"""What a migration does on its own host: commands of qedfs, attributes of the disk, and the end of a leaf."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from subprocess import STDOUT
from typing import Final

import trio

from qedfs.errors import LeafError, MigrationFailed
from qedfs.fuse.mounts import find_mount
from qedfs.migrate.plan import Order
from qedfs.report.mounted import write_attributes
from qedfs.report.status import ServedImage
from qedfs.report.waiting import wait_complete
from qedfs.session.leaf import reach

BUSY_PATIENCE: Final = 10.0
"""Seconds for a QEMU that was told to end to close the disk."""
_RETRY = 0.5


class LocalHost:
    """This host. `show` is told how streaming goes."""

    def __init__(self, show: Callable[[list[ServedImage]], None]) -> None:
        self._show = show

    async def run(self, arguments: tuple[str, ...]) -> None:
        """Run a command of qedfs.

        Raises:
            MigrationFailed: it failed, and what it said.
        """
        line = [sys.executable, "-m", "qedfs", *arguments]
        done = await trio.run_process(line, stdin=b"", capture_stdout=True, stderr=STDOUT, check=False)
        if done.returncode:
            said = done.stdout.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
            raise MigrationFailed(arguments[0], said[-1].removeprefix("qedfs: "))

    async def set(self, raw: str, name: str, value: str) -> None:
        """Set an attribute of the disk; in a thread, which is left behind if the mount does not answer. Raises UsageError."""
        await trio.to_thread.run_sync(write_attributes, raw, [(name, value)], abandon_on_cancel=True)

    async def probe(self, order: Order) -> None:
        """Raise BackingError unless the export answers soon."""
        await reach(order.backing, order.format, order.leaf)

    async def complete(self, raw: str) -> None:
        """Return when the disk stands alone. Raises as `wait_complete`."""
        await wait_complete([raw], show=self._show)

    async def unmount(self, mountpoint: str) -> str:
        """End the mount. Where somebody keeps it busy it is detached, and the rest is told.

        Raises:
            MigrationFailed: it is still there.
        """
        if find_mount(mountpoint) is None:
            return "its server had ended"
        deadline = trio.current_time() + BUSY_PATIENCE
        while True:
            try:
                await self.run(("unmount", mountpoint))
            except MigrationFailed as error:
                if trio.current_time() >= deadline:
                    await self.run(("unmount", "--lazy", mountpoint))
                    return error.why
            else:
                return ""
            await trio.sleep(_RETRY)

    async def remove(self, leaf: str) -> None:
        """Remove the leaf, durably: it must not come back after a power cut.

        Raises:
            LeafError: it is still there.
        """
        try:
            os.unlink(leaf)
            folder = os.open(os.path.dirname(leaf), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise LeafError(
                leaf, f"cannot be removed, and must not be used ({os.strerror(error.errno or 0)})"
            ) from error
