"""The leaves of one mount: each lives in a task of its own, from its admission until its last handle is closed.

The roster also remembers what was refused, and why, for `qedfs status`.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from dataclasses import dataclass, field

import trio

from qedfs.disk.disk import Disk
from qedfs.errors import QedfsError, UsageError
from qedfs.fuse.pages import drop_pages
from qedfs.session.admission import Terms, admitted
from qedfs.session.sources import FileId, raw_name
from qedfs.session.streams import Streams
from qedfs.stream.job import Job
from qedfs.tree.leaf import Leaf
from qedfs.tree.tree import Tree

log = logging.getLogger(__name__)

STATUS_LIMIT = 60_000
"""Bytes of the status text: an extended attribute holds at most 64 KiB."""


@dataclass
class _Served:
    path: str
    name: str
    id: FileId
    leaving: trio.Event = field(default_factory=trio.Event)


class Roster:
    """What is served and what is not. `nursery` runs the leaves and must outlive the mount.

    INVARIANT: a name is in `served` from before its admission begins until its disk is closed, so that no two leaves
    share one and none is opened twice.
    """

    def __init__(self, terms: Terms, streams: Streams, nursery: trio.Nursery) -> None:
        self.tree = Tree(
            root_attributes={"pid": lambda: b"%d" % os.getpid(), "status": self.status}, drop_pages=drop_pages
        )
        self.failed = False
        """Whether a leaf could not be closed in good order, or was lost."""
        self._terms = terms
        self._streams = streams
        self._nursery = nursery
        self._served: dict[str, _Served] = {}
        self._refused: dict[str, str] = {}

    @property
    def served(self) -> dict[str, FileId]:
        """The files of the leaves being served or on their way in, by path."""
        return {leaf.path: leaf.id for leaf in self._served.values() if not leaf.leaving.is_set()}

    @property
    def refused(self) -> dict[str, str]:
        """Why a file is not served, by path."""
        return dict(self._refused)

    async def admit(self, path: str) -> None:
        """Serve the image at `path`; return when it can be used.

        Raises:
            QedfsError: it cannot be served. The caller decides whether that is worth noting (`refuse`).
        """
        status = await trio.to_thread.run_sync(_status, path)
        name = raw_name(path)
        # No await from looking for the name to taking it.
        if name in self._served:
            raise UsageError(path, f"would be called {name}, as {self._served[name].path} is")
        served = self._served[name] = _Served(path, name, FileId(status.st_dev, status.st_ino))
        try:
            await self._nursery.start(self._keep, served)
        except BaseException as error:
            if self._served.get(name) is served:  # else it is another one's by now
                del self._served[name]
            raise _plain(error) from None
        self._refused.pop(path, None)

    def refuse(self, path: str, reason: str) -> None:
        """Note why the file at `path` is not served; said in the log only when it is news."""
        if self._refused.get(path) != reason:
            log.warning("%s", reason)
        self._refused[path] = reason

    def forget(self, path: str) -> None:
        """The file at `path` is no longer there: serve it only to whoever has it open."""
        self._refused.pop(path, None)
        for leaf in self._served.values():
            if leaf.path == path and not leaf.leaving.is_set():
                log.info("%s: removed", path)
                leaf.leaving.set()

    def release_all(self) -> None:
        """Let every leaf go once it is closed; the nursery ends when all have."""
        for leaf in self._served.values():
            leaf.leaving.set()

    def status(self) -> bytes:
        """Return the names of the leaves and of what was refused, as JSON of at most `STATUS_LIMIT` bytes."""
        leaves = [{"name": s.name, "path": s.path} for s in self._served.values() if not s.leaving.is_set()]
        refused = [{"path": path, "reason": reason} for path, reason in sorted(self._refused.items())]
        left_off = 0
        while True:
            text = json.dumps({"leaves": leaves, "refused": refused, "left_off": left_off}).encode("ascii")
            if len(text) <= STATUS_LIMIT:
                return text
            longer = leaves if len(leaves) > len(refused) else refused
            cut = max(1, len(longer) // 8)
            del longer[-cut:]
            left_off += cut

    async def _keep(self, served: _Served, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        leaf: Leaf | None = None
        try:
            async with admitted(served.path, self._terms) as (disk, status):
                if served.id != FileId(status.st_dev, status.st_ino):
                    raise UsageError(served.path, "was replaced while it was being opened")
                async with self._streams.streaming(disk, served.path, status) as job:
                    leaf = self._show(served, disk, job, status)
                    task_status.started()
                    await served.leaving.wait()
                    self.tree.remove(served.name)
                    with trio.CancelScope(shield=True):
                        await self.tree.wait_closed(leaf)
            log.info("%s: closed", served.path)
        except Exception as error:
            if not leaf:
                raise
            # One leaf is lost; the others go on.
            self.failed = True
            served.leaving.set()
            if leaf in self.tree.leaves:
                self.tree.remove(served.name)
            self._report(served, _plain(error))
        finally:
            self._served.pop(served.name, None)

    def _show(self, served: _Served, disk: Disk, job: Job, status: os.stat_result) -> Leaf:
        leaf = Leaf(
            name=served.name,
            disk=disk,
            path=served.path,
            mode=stat.S_IMODE(status.st_mode),
            uid=status.st_uid,
            gid=status.st_gid,
            mtime_ns=status.st_mtime_ns,
            stream=job,
            options=self._terms.options.stream,
        )
        self.tree.add(leaf)
        log.info("%s: served as %s%s", served.path, served.name, " (read-only)" if disk.read_only else "")
        return leaf

    def _report(self, served: _Served, error: BaseException) -> None:
        if isinstance(error, QedfsError):
            log.error("%s", error)
        else:
            log.error("%s: lost by an internal error", served.path, exc_info=error)


def _status(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise UsageError(path, os.strerror(error.errno or 0)) from error


def _plain(error: BaseException) -> BaseException:
    """Return the one error inside the groups that nurseries make."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
