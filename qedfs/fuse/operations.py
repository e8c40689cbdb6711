"""The handlers of pyfuse3: decode the request, call the tree, encode the answer.

What is not here is answered by the kernel once pyfuse3 has said ENOSYS: `flush` in particular, which would come at
every close and every fork+exec of a guest's process. The kernel writes cached data back before it would send FLUSH and
reports errors of that itself, so nothing is lost.
"""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Sequence
from typing import Any

import pyfuse3
import trio

from qedfs.config import DirectIO
from qedfs.errors import Held, LeafError
from qedfs.fuse.boundary import answered, failure
from qedfs.tree.errors import NotPermitted
from qedfs.tree.tree import ROOT, Status, Tree

_ENTRY_TIMEOUT = 300.0
"""Seconds; a leaf that goes away is invalidated by name."""
_ATTR_TIMEOUT = 10.0
"""Seconds after which `stat` of a file that nobody reads or writes sees progress in st_blocks.

Not 0: the kernel would ask before each read and write. Not 1: when the time is over, writes in flight keep the kernel
from believing the answer, so it asks again and again (one GETATTR per three writes at queue depth 16)."""

_DIRECTORY_HANDLE = 0

_COHERENT_SINCE = (6, 6)
"""From this kernel on a direct handle flushes and drops the pages that other handles have cached."""


class Operations(pyfuse3.Operations):
    """One mount of `tree`."""

    # The kernel collects small writes; fsync, close and age write them back.
    enable_writeback_cache = True
    # Handles of an NFS export would name another leaf after a remount, as inodes are counted anew.
    supports_dot_lookup = False
    enable_acl = False

    def __init__(self, tree: Tree, *, direct_io: DirectIO) -> None:
        super().__init__()
        self._tree = tree
        self._disks = tree.disks
        # DirectIO.AUTO promises durability of O_DIRECT writes with RWF_DSYNC: the kernel sends no FSYNC after one on a
        # direct handle, and pyfuse3 does not tell the flags of a write. So only `on` may hand out direct handles.
        self._direct = direct_io is DirectIO.ON and kernel_version() >= _COHERENT_SINCE
        self.ready = trio.Event()
        """Set while the kernel's first message is being answered: from the next step of the event loop on the mount is
        usable and the kernel has made up its mind about limits."""

    def init(self) -> None:
        self.ready.set()

    # --- the hot path -------------------------------------------------------------------------------------------

    # Without the decorator: its coroutine would cost as much as the look-up.

    async def read(self, fh: int, off: int, size: int) -> Any:
        try:
            disk = self._disks[fh]
            # INVARIANT: the view is a buffer that the disk uses again. pyfuse3 (handlers.pxi, fuse_read_async) copies it
            # into the kernel right after this coroutine returns, without an await in between.
            data = disk.read_nowait(off, size)
            return await disk.read(off, size) if data is None else data
        except Exception as error:
            raise failure(error, "read") from error

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        try:
            disk = self._disks[fh]
            if not disk.write_nowait(off, buf):
                await disk.write(off, buf)
            return len(buf)
        except Exception as error:
            raise failure(error, "write") from error

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        # The kernel asks for this before every write, so the answer does not even pass the boundary.
        # ENOSYS would stop the question, but for all attributes of the mount.
        if name == b"security.capability":
            raise pyfuse3.FUSEError(errno.ENODATA)
        return await self._read_attribute(inode, name)

    @answered
    async def _read_attribute(self, inode: int, name: bytes) -> bytes:
        return await self._tree.read_attribute(inode, name)

    # --- handles ------------------------------------------------------------------------------------------------

    @answered
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        # O_SYNC contains O_DSYNC: such a handle is never direct, as its writes would not be followed by FSYNC.
        direct = self._direct and bool(flags & os.O_DIRECT) and not flags & os.O_DSYNC
        handle, uncached = self._tree.open(inode, flags)
        if uncached and kernel_version() < _COHERENT_SINCE:
            # It would not see what others have cached, nor they what it writes, once the disk is no longer held.
            self._tree.close(handle)
            raise Held("open", "while a disk is held this kernel (before 6.6) can open it only with O_DIRECT")
        # Nothing but this mount changes a disk, so cached pages stay right over a close.
        return pyfuse3.FileInfo(fh=handle, direct_io=direct or uncached, keep_cache=True)

    @answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._disks[fh].flush()

    @answered
    async def release(self, fh: int) -> None:
        self._tree.close(fh)

    # --- status -------------------------------------------------------------------------------------------------

    @answered
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return _encoded(self._tree.status(inode))

    @answered
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise NotPermitted("chmod, chown", "mode and owner are those of the image file")
        if fields.update_size:
            await self._tree.resize(inode, attr.st_size)
        # Under the writeback cache the kernel owns the times and reports them; refusing would fail its fsync.
        self._tree.set_times(
            inode,
            atime=attr.st_atime_ns if fields.update_atime else None,
            mtime=attr.st_mtime_ns if fields.update_mtime else None,
            ctime=attr.st_ctime_ns if fields.update_ctime else None,
        )
        return _encoded(self._tree.status(inode))

    @answered
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = 4096
        answer.f_namemax = 255
        if leaves := self._tree.leaves:
            path = leaves[0].path
            try:
                # In a thread: the leaf may lie on a network file system that does not answer.
                of_leaf = await trio.to_thread.run_sync(os.statvfs, path, abandon_on_cancel=True)
            except OSError as error:
                raise LeafError(path, os.strerror(error.errno or errno.EIO)) from error
            for name in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail"):
                setattr(answer, f"f_{name}", getattr(of_leaf, f"f_{name}"))
        return answer

    # --- the directory ------------------------------------------------------------------------------------------

    @answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return _encoded(self._tree.lookup(parent_inode, name))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for inode, count in inode_list:
            self._tree.forget(inode, count)

    @answered
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return _DIRECTORY_HANDLE

    @answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for name, status in self._tree.entries(max(start_id, ROOT)):
            if not pyfuse3.readdir_reply(token, name, _encoded(status), status.inode):
                return
            self._tree.reference(status.inode)

    @answered
    async def releasedir(self, fh: int) -> None:
        pass

    # --- extended attributes ------------------------------------------------------------------------------------

    @answered
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        return self._tree.attribute_names(inode)

    @answered
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._tree.write_attribute(inode, name, value, ctx.uid)

    @answered
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._tree.remove_attribute(inode, name)

    # --- what the directory does not do ---------------------------------------------------------------------------

    @answered
    async def _refuse(self, *args: object) -> None:
        raise NotPermitted("the directory", "shows images and cannot be changed")

    mknod = mkdir = unlink = rmdir = symlink = rename = link = create = _refuse  # type: ignore[assignment]


def kernel_version() -> tuple[int, int]:
    """Return the major and minor number of the running kernel; (0, 0) if it has no such name."""
    parts = platform.release().split(".")
    try:
        return int(parts[0]), int(parts[1])
    except (IndexError, ValueError):
        return 0, 0


def _encoded(status: Status) -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.entry_timeout = _ENTRY_TIMEOUT
    entry.attr_timeout = _ATTR_TIMEOUT
    entry.st_ino = status.inode
    entry.st_mode = status.mode
    entry.st_nlink = status.nlink
    entry.st_uid = status.uid
    entry.st_gid = status.gid
    entry.st_size = status.size
    entry.st_blocks = status.blocks
    entry.st_atime_ns = status.atime_ns
    entry.st_mtime_ns = status.mtime_ns
    entry.st_ctime_ns = status.ctime_ns
    return entry
