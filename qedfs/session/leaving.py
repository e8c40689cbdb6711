"""`unmount_when_complete`: a mount that nobody needs any more ends by itself."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import trio

from qedfs.errors import MountError
from qedfs.fuse.unmount import unmount
from qedfs.tree.leaf import Leaf
from qedfs.tree.tree import Tree, Usage

log = logging.getLogger(__name__)

PERIOD = 0.5
"""Seconds between two looks at what is served and open."""


class Ages:
    """Since when each leaf is there, by any monotonic clock in seconds. Sans-IO."""

    def __init__(self) -> None:
        self._since: dict[Leaf, float] = {}

    def may_end(self, usages: Iterable[Usage], now: float, grace: float) -> bool:
        """Whether a mount that serves these may end: there are some, and all are complete and closed.

        One that nobody has opened yet counts as closed when it has been there for `grace` seconds.
        """
        usages = list(usages)
        self._since = {usage.leaf: self._since.get(usage.leaf, now) for usage in usages}
        return bool(usages) and all(
            usage.leaf.disk.statistics().state == "complete"
            and not usage.handles
            and (usage.opened or now - self._since[usage.leaf] >= grace)
            for usage in usages
        )


async def unmount_when_complete(tree: Tree, mountpoint: str, grace: float) -> None:
    """Unmount once `Ages.may_end` holds, plainly: while somebody uses the mount in another way it is tried again."""
    ages = Ages()
    told = False
    while True:
        if ages.may_end(tree.usage(), trio.current_time(), grace):
            if not told:
                log.info("%s: all images are complete and closed, unmounting", mountpoint)
                told = True
            try:
                if await unmount(mountpoint):
                    return
            except MountError as error:
                log.error("%s", error)
                return
        await trio.sleep(PERIOD)
