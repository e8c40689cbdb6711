"""A disk that says what a test tells it to, and the leaf around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import trio

from qedfs.config import Mode, StreamOptions
from qedfs.errors import Held, QedfsError, UsageError
from qedfs.tree.leaf import DropPages, Leaf


@dataclass(frozen=True)
class FakeCounts:
    data: int = 0
    zero: int = 0


@dataclass(frozen=True)
class FakeStatistics:
    clusters_total: int
    mode: Mode = Mode.COR
    state: str = "passive"
    backing: str = ""
    backing_format: str = ""
    backing_state: str = ""
    backing_bytes_read: int = 0
    backing_asked_twice: int = 0
    last_error: str = ""
    copied_bytes: int = 0
    misses: int = 0
    missed_seconds: float = 0.0
    waiting: int = 0
    errors: int = 0


class FakeDisk:
    """Notes changes in `calls`; while `counting` is not set, counting takes for ever."""

    cluster_size = 65536

    def __init__(self, *, size: int = 1 << 20, read_only: bool = False, held: bool = False) -> None:
        self.size = size
        self.read_only = read_only
        self.held = held
        self.allocated = 0
        self.counted = FakeCounts()
        self.percentages = [0.0] * 256
        self.facts = FakeStatistics(size // self.cluster_size)
        self.failure: QedfsError | None = None
        self.counting = trio.Event()
        self.counting.set()
        self.calls: list[tuple[Any, ...]] = []

    def read_nowait(self, pos: int, length: int) -> memoryview | None:
        return None

    async def read(self, pos: int, length: int) -> bytes:
        return bytes(length)

    def write_nowait(self, pos: int, data: bytes) -> bool:
        return False

    async def write(self, pos: int, data: bytes) -> None:
        self.calls.append(("write", pos, data))

    async def flush(self) -> None:
        self.calls.append(("flush",))

    async def grow(self, size: int) -> None:
        if size % 512 or size < self.size:
            raise UsageError("size", "wrong")
        self.size = size
        self.calls.append(("grow", size))

    def prefetch(self, pos: int, length: int) -> None:
        if self.held:
            raise Held("vm", "is held")
        self.calls.append(("prefetch", pos, length))

    async def set_mode(self, mode: Mode) -> None:
        self.calls.append(("set_mode", mode))

    async def stream(self, pos: int) -> int:
        if self.held:
            raise Held("vm", "is held")
        self.calls.append(("stream", pos))
        return max(0, self.size - pos)

    def remaining(self) -> int | None:
        return self.size

    async def release_hold(self, drop_pages: DropPages) -> None:
        self.calls.append(("release_hold",))
        await drop_pages()
        self.held = False

    async def counts(self) -> FakeCounts:
        await self.counting.wait()
        if self.failure:
            raise self.failure
        return self.counted

    def allocated_bytes_nowait(self) -> int:
        return self.allocated

    async def density(self) -> list[float]:
        return self.percentages

    def statistics(self) -> FakeStatistics:
        return self.facts


class FakeStream:
    """A stream that does nothing but remember."""

    def __init__(self, options: StreamOptions) -> None:
        self.paused = False
        self.damaged = False
        self.rate_limit, self.floor, self.finish_by = options.rate, options.floor, options.finish_by
        self.rate = 0.0
        self.eta: float | None = None
        self.stated = ""

    def set_limits(self, *, rate: int | None = None, floor: int | None = None) -> None:
        self.rate_limit = self.rate_limit if rate is None else rate
        self.floor = self.floor if floor is None else floor

    def set_finish_by(self, seconds: float | None) -> None:
        self.finish_by = seconds

    def state(self, of_disk: str) -> str:
        return self.stated or of_disk


def leaf_of(
    name: str,
    disk: FakeDisk,
    *,
    mode: int = 0o600,
    uid: int = 0,
    gid: int = 0,
    mtime_ns: int = 0,
    stream: StreamOptions | None = None,
) -> Leaf:
    options = stream or StreamOptions()
    return Leaf(name, disk, "/images/vm.qed", mode, uid, gid, mtime_ns, FakeStream(options), options)
