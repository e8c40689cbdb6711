"""A directory as a source: its leaves come and go with its files."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from qedfs.errors import QedfsError, UsageError
from qedfs.session.roster import Roster
from qedfs.session.sources import Entry, FileId, Stamp, choose, scan

log = logging.getLogger(__name__)

PERIOD = 1.0
"""Seconds between two looks. A file that appears while mounted is admitted when it was the same in two of them, so that
one that is being copied here is left alone."""
RETRY = 10.0
"""Seconds after which a refused file is tried again though it has not changed: a lock or a backing may have."""
AT_ONCE = 32
"""Leaves being opened at a time."""


@dataclass(frozen=True)
class _Refusal:
    id: FileId
    stamp: Stamp
    time: float


class Folder:
    """One directory given as a source; `path` is absolute and real."""

    def __init__(self, fd: int, path: str, mountpoint: str) -> None:
        self.path = path
        self._fd = fd
        self._mountpoint = mountpoint
        self._entries: dict[str, Entry] = {}
        self._admitted: dict[str, FileId] = {}
        self._refusals: dict[str, _Refusal] = {}

    async def begin(self, roster: Roster) -> None:
        """Admit what is there. Files that cannot be served are noted in the roster."""
        self._entries = await self._scan()
        # A refused image no longer hides its backing, so refusing may make new leaves.
        for _ in range(len(self._entries)):
            known = set(self._refusals)
            await self._follow(roster, self._entries)
            if known == set(self._refusals):
                return

    async def watch(self, roster: Roster) -> None:
        """Follow the directory until cancelled."""
        while True:
            await trio.sleep(PERIOD)
            try:
                before, self._entries = self._entries, await self._scan()
            except OSError as error:
                log.warning("%s: cannot be read (%s)", self.path, os.strerror(error.errno or 0))
                continue
            await self._follow(roster, before)

    async def _scan(self) -> dict[str, Entry]:
        return await trio.to_thread.run_sync(scan, self._fd, self.path, self._mountpoint, self._entries)

    async def _follow(self, roster: Roster, before: dict[str, Entry]) -> None:
        """Bring the roster to what the directory holds now; `before` is what it held at the look before this one."""
        for path, file_id in list(self._admitted.items()):
            if path not in self._entries or self._entries[path].id != file_id:
                del self._admitted[path]
                roster.forget(path)
        served = set(roster.served.values())
        refused = {refusal.id for refusal in self._refusals.values()}
        choice = choose(self._entries.values(), served, refused, names=roster.served)
        candidates = {entry.path for entry in choice.leaves}
        turned_down = {entry.path for entry, _ in choice.refused}
        for path in [path for path in roster.refused if os.path.dirname(path) == self.path]:
            if path not in candidates:
                self._refusals.pop(path, None)
                if path not in turned_down:
                    roster.forget(path)
        for entry, reason in choice.refused:
            roster.refuse(entry.path, f"{entry.path}: {reason}")
        limiter = trio.CapacityLimiter(AT_ONCE)
        async with trio.open_nursery() as nursery:
            for entry in choice.leaves:
                if entry.id not in served and before.get(entry.path) == entry and self._is_due(entry):
                    nursery.start_soon(self._admit, roster, entry, limiter)

    def _is_due(self, entry: Entry) -> bool:
        refusal = self._refusals.get(entry.path)
        if refusal is None or (refusal.id, refusal.stamp) != (entry.id, entry.stamp):
            return True
        return trio.current_time() - refusal.time >= RETRY

    async def _admit(self, roster: Roster, entry: Entry, limiter: trio.CapacityLimiter) -> None:
        async with limiter:
            try:
                await roster.admit(entry.path)
            except QedfsError as error:
                self._refusals[entry.path] = _Refusal(entry.id, entry.stamp, trio.current_time())
                roster.refuse(entry.path, str(error))
            except Exception:
                # A defect of ours that one image brings out must not end the others.
                log.exception("%s: cannot be served because of an internal error", entry.path)
                self._refusals[entry.path] = _Refusal(entry.id, entry.stamp, trio.current_time())
                roster.refuse(entry.path, f"{entry.path}: internal error, see the log")
            else:
                self._refusals.pop(entry.path, None)
                self._admitted[entry.path] = entry.id


@contextmanager
def open_folder(path: str, mountpoint: str) -> Iterator[Folder]:
    """Open the directory `path` as a source of leaves; both are absolute paths, `mountpoint` a real one.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(path, f"cannot be read ({os.strerror(error.errno or 0)})") from error
    try:
        yield Folder(fd, os.path.realpath(path), mountpoint)
    finally:
        os.close(fd)
