"""The files of one mount: names, inodes, open handles. Leaves come and go while it is served.

The tree knows nothing of FUSE. Its caller tells it what the kernel holds: references to inodes (`lookup` and `forget`)
and open handles (`open` and `close`).

A removed leaf loses its name at once and stays usable until nobody uses it; `wait_closed` tells when.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import trio

from qedfs.errors import ReadOnly, UsageError
from qedfs.tree.attributes import PREFIX, read_attribute, readable_names, refuse_removal, write_attribute
from qedfs.tree.durable import WriteThrough
from qedfs.tree.errors import AttributeAccess, Gone, NoSuchAttribute, NoSuchFile, NotPermitted
from qedfs.tree.leaf import Leaf, OpenDisk

ROOT = 1
"""Inode of the directory."""

_SECTOR = 512
_ROOT_MODE = stat.S_IFDIR | 0o755


class Status(NamedTuple):
    """What stat(2) tells of a file. Sizes in bytes, `blocks` in units of 512 bytes, times in nanoseconds."""

    inode: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


class Usage(NamedTuple):
    """A leaf, how many handles on it are open now, and whether there ever was one."""

    leaf: Leaf
    handles: int
    opened: bool


class Opened(NamedTuple):
    """A handle. Reads and writes through one that is `uncached` must pass by the kernel's cache."""

    handle: int
    uncached: bool


async def _nothing_cached(inode: int) -> None:
    """What there is to drop where no kernel caches anything."""


class _Node:
    """One leaf under an inode, and who holds it."""

    def __init__(self, inode: int, leaf: Leaf) -> None:
        self.inode = inode
        self.leaf = leaf
        self.atime_ns = self.mtime_ns = self.ctime_ns = leaf.mtime_ns
        self.lookups = 0
        # Open handles and requests under way. INVARIANT: the disk is used only while this is above zero.
        self.users = 0
        self.handles = 0
        self.opened = False
        """Whether anybody has ever opened it."""
        self.removed = False
        self.closed = trio.Event()

    @property
    def gone(self) -> bool:
        return self.removed and not self.users


class Tree:
    """One directory of leaves.

    `root_attributes` are extended attributes of the directory itself, by name without prefix; each is read anew at
    every request. `drop_pages` makes the kernel forget what it has cached of an inode.
    """

    def __init__(
        self,
        *,
        root_attributes: Mapping[str, Callable[[], bytes]] | None = None,
        drop_pages: Callable[[int], Awaitable[None]] = _nothing_cached,
    ) -> None:
        self._drop_pages = drop_pages
        self._root_attributes = {PREFIX + os.fsencode(k): read for k, read in (root_attributes or {}).items()}
        self._uid, self._gid = os.getuid(), os.getgid()
        self._root_time_ns = time.time_ns()
        self._names: dict[bytes, _Node] = {}
        # Inodes are not used again: a reference that outlived its leaf must not meet another one.
        self._nodes: dict[int, _Node] = {}
        self._next_inode = ROOT + 1
        self._handles: dict[int, _Node] = {}
        self._next_handle = 1
        self.disks: dict[int, OpenDisk] = {}
        """The disk behind each open handle: the one look-up of the hot path. To be read only."""
        self._announce, self.removals = trio.open_memory_channel[tuple[bytes, int]](float("inf"))
        """`removals` delivers the name and inode of each leaf that lost its name, for whoever caches names."""

    # --- leaves -------------------------------------------------------------------------------------------------

    @property
    def leaves(self) -> list[Leaf]:
        """Those that have a name, in the order in which they came."""
        return [node.leaf for node in self._names.values()]

    def usage(self) -> list[Usage]:
        """Who uses each of `leaves`."""
        return [Usage(node.leaf, node.handles, node.opened) for node in self._names.values()]

    def add(self, leaf: Leaf) -> None:
        """Show `leaf`.

        Raises:
            UsageError: its name is taken.
        """
        name = os.fsencode(leaf.name)
        if name in self._names:
            raise UsageError(leaf.path, f"another image is already served as {leaf.name}")
        node = _Node(self._next_inode, leaf)
        self._next_inode += 1
        self._names[name] = self._nodes[node.inode] = node
        self._root_time_ns = time.time_ns()

    def remove(self, name: str) -> Leaf:
        """Take the leaf `name` out of the directory and return it; whoever has it open keeps it.

        Raises:
            NoSuchFile: there is none of this name.
        """
        node = self._named(os.fsencode(name))
        del self._names[os.fsencode(name)]
        self._root_time_ns = time.time_ns()
        node.removed = True
        self._announce.send_nowait((os.fsencode(name), node.inode))
        self._settle(node)
        return node.leaf

    async def wait_closed(self, leaf: Leaf) -> None:
        """Wait until nothing uses the removed `leaf` any more; nothing will again, its disk may be closed."""
        for node in self._nodes.values():
            if node.leaf is leaf:
                await node.closed.wait()
                return

    def close_all(self) -> None:
        """Forget every handle and reference: the kernel is gone."""
        for handle in list(self._handles):
            self.close(handle)
        for node in list(self._nodes.values()):
            node.lookups = 0
            self._settle(node)

    def _settle(self, node: _Node) -> None:
        """Draw the conclusions after a name, user or reference was given up."""
        if node.gone:
            node.closed.set()
            if not node.lookups:
                self._nodes.pop(node.inode, None)

    # --- names --------------------------------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> Status:
        """Return the status of the file `name` and count a reference to it.

        Raises:
            NoSuchFile: there is none of this name.
        """
        if parent != ROOT:
            raise NoSuchFile(os.fsdecode(name), "no such file")
        node = self._named(name)
        node.lookups += 1
        return self._status(node)

    def forget(self, inode: int, count: int) -> None:
        """Give up `count` references. Unknown inodes are none of our business; never raises."""
        node = self._nodes.get(inode)
        if node:
            node.lookups = max(0, node.lookups - count)
            self._settle(node)

    def entries(self, after: int) -> Iterator[tuple[bytes, Status]]:
        """Yield the names with an inode above `after`, by growing inode, without counting references.

        As inodes only grow, a listing in pieces neither skips nor repeats a name that stays.
        """
        for name, node in list(self._names.items()):
            if node.inode > after:
                yield name, self._status(node)

    def reference(self, inode: int) -> None:
        """Count one reference to an inode given out by `entries`."""
        self._node(inode).lookups += 1

    def _named(self, name: bytes) -> _Node:
        try:
            return self._names[name]
        except KeyError:
            raise NoSuchFile(os.fsdecode(name), "no such file") from None

    def _node(self, inode: int) -> _Node:
        node = self._nodes.get(inode)
        if node is None or node.gone:
            raise Gone(f"inode {inode}", "its image is no longer served")
        return node

    # --- status -------------------------------------------------------------------------------------------------

    def status(self, inode: int) -> Status:
        """Return what stat(2) tells."""
        if inode == ROOT:
            at = self._root_time_ns
            return Status(ROOT, _ROOT_MODE, 2, self._uid, self._gid, 0, 0, at, at, at)
        return self._status(self._node(inode))

    def _status(self, node: _Node) -> Status:
        leaf, disk = node.leaf, node.leaf.disk
        # At least one block: with none, `tar -S` would archive the file as one hole.
        blocks = max(1, -(-disk.allocated_bytes_nowait() // _SECTOR))
        mode, size = stat.S_IFREG | leaf.mode & 0o777, disk.size
        times = node.atime_ns, node.mtime_ns, node.ctime_ns
        return Status(node.inode, mode, 0 if node.removed else 1, leaf.uid, leaf.gid, size, blocks, *times)

    def set_times(self, inode: int, *, atime: int | None, mtime: int | None, ctime: int | None) -> None:
        """Remember times (nanoseconds) until the unmount; the kernel, which caches writes, is their master."""
        if inode == ROOT:
            return
        node = self._node(inode)
        node.atime_ns = node.atime_ns if atime is None else atime
        node.mtime_ns = node.mtime_ns if mtime is None else mtime
        node.ctime_ns = node.ctime_ns if ctime is None else ctime

    async def resize(self, inode: int, size: int) -> None:
        """Grow the disk to `size` bytes; the present size changes nothing.

        Raises:
            ReadOnly: the leaf is served read-only.
            UsageError: smaller than now, or not a multiple of 512.
        """
        with self._using(inode) as leaf:
            _check_writable(leaf)
            if size != leaf.disk.size:
                await leaf.disk.grow(size)

    # --- extended attributes ------------------------------------------------------------------------------------

    async def read_attribute(self, inode: int, name: bytes) -> bytes:
        """Return the value of an extended attribute; see `attributes.read_attribute`."""
        if inode == ROOT:
            return self._root_reader(name)()
        with self._using(inode) as leaf:
            return await read_attribute(leaf, name)

    async def write_attribute(self, inode: int, name: bytes, value: bytes, uid: int) -> None:
        """Set an extended attribute for the user `uid`; see `attributes.write_attribute`."""
        if inode == ROOT:
            self._root_reader(name)
            raise AttributeAccess(os.fsdecode(name), "can only be read")
        with self._using(inode) as leaf:
            await write_attribute(leaf, name, value, uid, lambda: self._drop_pages(inode))

    def remove_attribute(self, inode: int, name: bytes) -> None:
        """Always raises: none can be removed."""
        if inode == ROOT:
            self._root_reader(name)
            raise AttributeAccess(os.fsdecode(name), "cannot be removed")
        refuse_removal(name)

    def attribute_names(self, inode: int) -> list[bytes]:
        """The names, with their prefix, of the extended attributes that can be read."""
        if inode == ROOT:
            return list(self._root_attributes)
        self._node(inode)
        return readable_names()

    def _root_reader(self, name: bytes) -> Callable[[], bytes]:
        try:
            return self._root_attributes[name]
        except KeyError:
            raise NoSuchAttribute(os.fsdecode(name), "no such attribute") from None

    # --- handles ------------------------------------------------------------------------------------------------

    def open(self, inode: int, flags: int) -> Opened:
        """Return a handle for `open(2)` with `flags`.

        While a disk is held the kernel may keep nothing of it. O_DIRECT sees to that by itself; other handles must be
        uncached for their whole life. On those the kernel does not say which writes are to be durable, so all of them
        are, until the last close.

        Raises:
            NotPermitted: O_TRUNC. The kernel would set the size to 0 for everyone and forget dirty pages, whatever
                we answer later.
            ReadOnly: for writing, but the leaf is served read-only.
        """
        node = self._node(inode)
        if flags & os.O_TRUNC:
            raise NotPermitted(node.leaf.name, "a disk cannot be truncated (use conv=notrunc)")
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        if writing:
            _check_writable(node.leaf)
        uncached = node.leaf.disk.held and not flags & os.O_DIRECT
        handle = self._next_handle
        self._next_handle += 1
        self._handles[handle] = node
        self.disks[handle] = WriteThrough(node.leaf.disk) if uncached and writing else node.leaf.disk
        node.users += 1
        node.handles += 1
        node.opened = True
        return Opened(handle, uncached)

    def close(self, handle: int) -> None:
        """Give up a handle of `open`; one that is not open is ignored."""
        node = self._handles.pop(handle, None)
        if node:
            del self.disks[handle]
            node.handles -= 1
            self._release(node)

    def _release(self, node: _Node) -> None:
        node.users -= 1
        self._settle(node)

    @contextmanager
    def _using(self, inode: int) -> Iterator[Leaf]:
        """Keep the disk of `inode` from being closed during a request without a handle."""
        node = self._node(inode)
        node.users += 1
        try:
            yield node.leaf
        finally:
            self._release(node)


def _check_writable(leaf: Leaf) -> None:
    if leaf.disk.read_only:
        raise ReadOnly(leaf.name, "the image is served read-only")
