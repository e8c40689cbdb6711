"""One mount from its start to its end.

Order of start: judge the mountpoint, open the source directories, admit the leaves, mount, tell the caller, watch.
Order of stop, whoever causes it (a signal, `qedfs unmount`, umount(8)): the kernel hands over every dirty page and
detaches the mount, the handles close, the leaves become durable and close, the process ends. Nothing here drops cached
data: a signal only asks the kernel to unmount, lazily if the mount is busy, and a second one changes nothing.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from enum import Enum

import trio

from qedfs.config import MountOptions
from qedfs.errors import MountError, UsageError
from qedfs.fuse.serve import serve
from qedfs.fuse.unmount import unmount
from qedfs.session.admission import Terms
from qedfs.session.boot_profile import check_profile_place
from qedfs.session.leaving import unmount_when_complete
from qedfs.session.metrics import open_metrics
from qedfs.session.notify import Manager, tell_status
from qedfs.session.places import check_places
from qedfs.session.roster import Roster
from qedfs.session.shared_cache import open_shared_caches
from qedfs.session.sources import raw_name
from qedfs.session.streams import open_streams
from qedfs.session.watch import Folder, open_folder
from qedfs.tree.tree import Tree

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Mount:
    """What to mount where. All paths are absolute, that of the mountpoint is as of `real_mountpoint`."""

    sources: tuple[str, ...]
    mountpoint: str
    options: MountOptions


def run_mount(mount: Mount, ready: Callable[[], None], manager: Manager) -> int:
    """Serve `mount` until it is unmounted, calling `ready` once it is usable. Return the exit status.

    `manager` is told how it goes, and when it ends; not that it is usable, which is up to `ready`.

    Raises:
        QedfsError: it cannot be mounted, or a leaf named as a source cannot be served.
    """
    usable = False

    def tell() -> None:
        nonlocal usable
        ready()
        usable = True

    try:
        return trio.run(_run, mount, tell, manager)
    except BaseException:
        if usable:  # before that, the caller is there to be told
            log.critical("%s: ended by an internal error", mount.mountpoint, exc_info=True)
        raise


async def _run(mount: Mount, ready: Callable[[], None], manager: Manager) -> int:
    ending = _Ending(mount.mountpoint, manager)
    # What waits for a dead name server or file system keeps its thread for many seconds, whoever has given up on it. Of trio's
    # 40 none would be left, and statfs, looks at directories and openings would wait. Whatever needs a bound has its own.
    trio.to_thread.current_default_thread_limiter().total_tokens = math.inf
    with trio.open_signal_receiver(*_SIGNALS) as signals:
        async with trio.open_nursery() as listening:
            listening.start_soon(ending.obey, signals)
            status = await _serve(mount, ready, ending, manager)
            listening.cancel_scope.cancel()
    return ending.status or status


class _Phase(Enum):
    STARTING = "starting"
    MOUNTED = "mounted"
    ENDING = "ending"


class _Ending:
    """What a signal does: before the mount is usable it stops the start, then it unmounts, later nothing.

    Nothing, because what is mounted there by then may be another's.
    """

    def __init__(self, mountpoint: str, manager: Manager) -> None:
        self.status = 0
        """The exit status that a signal has caused."""
        self.starting = trio.CancelScope()
        self._mountpoint = mountpoint
        self._manager = manager
        self._phase = _Phase.STARTING

    def mounted(self) -> None:
        self._phase = _Phase.MOUNTED

    def unmounted(self) -> None:
        if self._phase is _Phase.MOUNTED:
            self._manager.stopping()
        self._phase = _Phase.ENDING

    async def obey(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            log.info("%s: %s", self._mountpoint, signal.Signals(number).name)
            if self._phase is _Phase.STARTING:
                self.status = 128 + number
                self.starting.cancel()
            elif self._phase is _Phase.MOUNTED:
                await self.unmount()

    async def unmount(self) -> None:
        """Unmount; if it is busy, serve on out of sight until the last close."""
        try:
            if not await unmount(self._mountpoint):
                log.info("%s: in use, served until the last close", self._mountpoint)
                await unmount(self._mountpoint, lazy=True)
        except MountError as error:
            log.error("%s", error)
        else:
            self.unmounted()


@dataclass(frozen=True)
class _Opened:
    """What a mount begins with: `images` are to be served at any rate, of `folders` what can be."""

    images: list[str]
    folders: list[Folder]


@contextlib.contextmanager
def _opened(mount: Mount) -> Iterator[_Opened]:
    """Judge the mountpoint, then open the directories: after mounting, their paths could lead elsewhere."""
    check_places(mount.mountpoint, mount.sources)
    check_profile_place(mount.options.boot_profile, mount.mountpoint)
    with contextlib.ExitStack() as stack:
        opened = _Opened([], [])
        for path in mount.sources:
            if os.path.isdir(path):
                opened.folders.append(stack.enter_context(open_folder(path, mount.mountpoint)))
            else:
                opened.images.append(path)
        yield opened


async def _serve(mount: Mount, ready: Callable[[], None], ending: _Ending, manager: Manager) -> int:
    with _opened(mount) as opened:
        async with (
            open_streams(mount.options) as streams,
            open_shared_caches(mount.options, mount.mountpoint, mount.sources) as caches,
            open_metrics(mount.options.metrics) as metrics,
            trio.open_nursery() as leaves,
        ):
            roster = Roster(Terms(mount.options, mount.mountpoint, os.getuid(), caches), streams, leaves)
            try:
                with ending.starting:
                    await _admit_all(opened, roster)
                    async with trio.open_nursery() as mounted:
                        await mounted.start(_serve_until_unmounted, roster.tree, mount, mounted.cancel_scope)
                        ending.mounted()
                        for folder in opened.folders:
                            mounted.start_soon(folder.watch, roster)
                        if (grace := mount.options.unmount_grace) is not None:
                            mounted.start_soon(unmount_when_complete, roster.tree, mount.mountpoint, grace)
                        mounted.start_soon(metrics.serve, roster)
                        mounted.start_soon(tell_status, manager, lambda: roster.tree.leaves)
                        await _tell(ready, ending)
            finally:
                ending.unmounted()
                roster.tree.close_all()  # the kernel need not tell us the last close
                roster.release_all()
    return 1 if roster.failed else 0


async def _admit_all(opened: _Opened, roster: Roster) -> None:
    """Admit the named images, all of which must succeed, then what the directories hold.

    Raises:
        QedfsError: a named image cannot be served, or two would have one name.
    """
    # Before any of them is opened: the first might be written to by then.
    names: dict[str, str] = {}
    for path in opened.images:
        if (name := raw_name(path)) in names:
            raise UsageError(path, f"would be called {name}, as {names[name]} is")
        names[name] = path
    async with trio.open_nursery() as nursery:
        for path in opened.images:
            nursery.start_soon(roster.admit, path)
    for folder in opened.folders:
        await folder.begin(roster)


async def _serve_until_unmounted(
    tree: Tree, mount: Mount, watching: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    await serve(tree, mount.mountpoint, mount.options, fsname=" ".join(mount.sources), task_status=task_status)
    watching.cancel()


async def _tell(ready: Callable[[], None], ending: _Ending) -> None:
    try:
        ready()
    except OSError:
        # Whoever asked for the mount has gone and was never told that it is there: leave nothing behind.
        log.warning("nobody waits for the mount any more, unmounting")
        await ending.unmount()
