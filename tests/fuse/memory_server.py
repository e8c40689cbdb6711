"""Serves a tree of disks in memory; the tests drive it by lines on standard input and read its answers.

    python memory_server.py MOUNTPOINT JSON

JSON: `{"options": "-o text", "fsname": …, "disks": [{"name":, "size":, "mode":, "read_only":, "held":}], "user": uid}`. Commands, one a line:
`journal` (what the disks were asked to do since the last time), `hold NAME` / `release NAME` (reads wait meanwhile), `waiting NAME` (how many do),
`break NAME` (reads and writes meet a defect), `add NAME`, `remove NAME`, `closed NAME` (answers when the removed leaf is not in
use any more), `fill NAME BYTE` (the content becomes that byte, as by another host), `unmount`, `lazy`. Each answers one line of JSON. Ends when it has been unmounted,
with a last line `{"ended": journal}`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import trio

from qedfs.config import Mode, parse_mount_options
from qedfs.errors import Held, LeafFull, QedfsError, ReadOnly, UsageError
from qedfs.fuse.busy import find_holders
from qedfs.fuse.pages import drop_pages
from qedfs.fuse.serve import serve
from qedfs.fuse.unmount import unmount
from qedfs.tree.leaf import DropPages, Leaf, Stream
from qedfs.tree.tree import Tree

LIMIT = 64 << 20
"""Bytes a disk may grow to; a write past this finds the leaf full."""

NO_STREAM = cast(
    Stream,
    SimpleNamespace(
        paused=False, damaged=False, rate_limit=0, floor=0, finish_by=None, rate=0.0, eta=None, state=lambda text: text
    ),
)


@dataclass(frozen=True)
class Counted:
    data: int
    zero: int


@dataclass(frozen=True)
class Facts:
    clusters_total: int
    mode: Mode
    state: str = "passive"
    backing: str = "nbd://host/base"
    backing_format: str = "raw"
    backing_state: str = "healthy"
    backing_bytes_read: int = 4096
    backing_asked_twice: int = 0
    last_error: str = ""
    copied_bytes: int = 0
    misses: int = 0
    missed_seconds: float = 0.0
    waiting: int = 0
    errors: int = 0


class MemoryDisk:
    """A disk in memory that notes what it is asked to do. Nothing is ready at once while `gate` is closed."""

    cluster_size = 65536

    def __init__(
        self, name: str, size: int, journal: list[list[Any]], *, read_only: bool = False, held: bool = False
    ) -> None:
        self.held = held
        self.name = name
        self.content = bytearray(size)
        self.read_only = read_only
        self.mode = Mode.COR
        self.journal = journal
        self.gate = trio.Event()
        self.gate.set()
        self.broken = False
        self.waiting = 0

    @property
    def size(self) -> int:
        return len(self.content)

    def read_nowait(self, pos: int, length: int) -> memoryview | None:
        if self.broken:
            raise RuntimeError("a defect")
        return memoryview(bytes(self.content[pos : pos + length])) if self.gate.is_set() else None

    async def read(self, pos: int, length: int) -> bytes:
        self.waiting += 1
        await self.gate.wait()
        self.waiting -= 1
        return bytes(self.content[pos : pos + length])

    def write_nowait(self, pos: int, data: bytes) -> bool:
        if self.broken:
            raise RuntimeError("a defect")
        if self.held:
            self.journal.append(["refused", self.name, pos, len(data)])
            return False
        self.journal.append(["write", self.name, pos, len(data)])
        if pos + len(data) > self.size:
            return False
        self.content[pos : pos + len(data)] = data
        return True

    async def write(self, pos: int, data: bytes) -> None:
        if self.held:
            raise Held(self.name, "is held")
        end = pos + len(data)
        if end > LIMIT:
            raise LeafFull(self.name, "no room")
        self.content.extend(bytes(max(0, -(-end // 512) * 512 - self.size)))
        self.content[pos:end] = data

    async def flush(self) -> None:
        # Long enough that a caller who does not wait for it would be seen to come first.
        await trio.sleep(0.02)
        self.journal.append(["flush", self.name])

    async def grow(self, size: int) -> None:
        if self.read_only:
            raise ReadOnly(self.name, "is read-only")
        if size % 512 or size < self.size:
            raise UsageError(self.name, "wrong size")
        self.content.extend(bytes(size - self.size))
        self.journal.append(["grow", self.name, size])

    def prefetch(self, pos: int, length: int) -> None:
        self.journal.append(["prefetch", self.name, pos, length])

    async def set_mode(self, mode: Mode) -> None:
        self.mode = mode

    async def stream(self, pos: int) -> int:
        return max(0, self.size - pos)

    def remaining(self) -> int | None:
        return 0

    async def release_hold(self, drop_pages: DropPages) -> None:
        await drop_pages()
        self.journal.append(["dropped", self.name])
        self.held = False

    async def counts(self) -> Counted:
        return Counted(1, 1)

    def allocated_bytes_nowait(self) -> int:
        return 2 * self.cluster_size

    async def density(self) -> list[float]:
        return [100.0] + [0.0] * 255

    def statistics(self) -> Facts:
        return Facts(-(-self.size // self.cluster_size), self.mode)


class Server:
    def __init__(self, mountpoint: str, setup: dict[str, Any]) -> None:
        self.mountpoint = mountpoint
        self.setup = setup
        self.journal: list[list[Any]] = []
        self.disks: dict[str, MemoryDisk] = {}
        self.removed: dict[str, Leaf] = {}
        self.tree = Tree(root_attributes={"pid": lambda: str(os.getpid()).encode()}, drop_pages=drop_pages)
        for disk in setup["disks"]:
            self.add(**disk)

    def add(self, name: str, size: int = 1 << 20, mode: int = 0o600, **kind: bool) -> None:
        self.disks[name] = MemoryDisk(name, size, self.journal, **kind)
        path = os.path.abspath(__file__)
        owner = os.getuid(), os.getgid()
        self.tree.add(Leaf(name, self.disks[name], path, mode, *owner, time.time_ns(), NO_STREAM))

    async def run(self) -> None:
        options = parse_mount_options([self.setup.get("options", "")])
        async with trio.open_nursery() as nursery:
            await nursery.start(self._serve, options, nursery.cancel_scope)
            answer("ready")
            lines = trio.lowlevel.FdStream(os.dup(0))
            buffer = b""
            async for chunk in lines:
                buffer += chunk
                *complete, buffer = buffer.split(b"\n")
                for line in complete:
                    nursery.start_soon(self._command, line.decode())

    async def _serve(self, options: Any, scope: trio.CancelScope, task_status: trio.TaskStatus[None]) -> None:
        fsname = self.setup.get("fsname", "memory")
        await serve(self.tree, self.mountpoint, options, fsname=fsname, task_status=task_status)
        answer({"ended": self.journal})
        scope.cancel()

    async def _command(self, line: str) -> None:
        word, _, name = line.partition(" ")
        if word == "journal":
            answer(list(self.journal))
            self.journal.clear()
        elif word == "hold":
            self.disks[name].gate = trio.Event()
            answer("held")
        elif word == "release":
            self.disks[name].gate.set()
            answer("released")
        elif word == "waiting":
            answer(self.disks[name].waiting)
        elif word == "fill":
            name, _, byte = name.partition(" ")
            self.disks[name].content[:] = bytes([int(byte)]) * self.disks[name].size
            answer("filled")
        elif word == "break":
            self.disks[name].broken = True
            answer("broken")
        elif word == "add":
            self.add(name)
            answer("added")
        elif word == "remove":
            self.removed[name] = self.tree.remove(name)
            answer("removed")
        elif word == "closed":
            await self.tree.wait_closed(self.removed[name])
            answer("closed")
        elif word in ("unmount", "lazy"):
            done = await unmount(self.mountpoint, lazy=word == "lazy")
            answer(done or [str(h) for h in await trio.to_thread.run_sync(find_holders, self.mountpoint)])


def answer(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    if user := json.loads(sys.argv[2]).get("user"):
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    try:
        trio.run(Server(sys.argv[1], json.loads(sys.argv[2])).run)
    except* QedfsError as group:
        answer({"error": str(group.exceptions[0])})


if __name__ == "__main__":
    main()
