"""What the tree shows as one file: a disk, and what is known of the image file it comes from."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from qedfs.config import Mode, StreamOptions

DropPages = Callable[[], Awaitable[None]]


class Counts(Protocol):
    """Numbers of clusters that need no backing."""

    @property
    def data(self) -> int: ...

    @property
    def zero(self) -> int: ...


class Statistics(Protocol):
    """The part of a disk's statistics that attributes and metrics show."""

    @property
    def clusters_total(self) -> int: ...

    @property
    def mode(self) -> Mode: ...

    @property
    def state(self) -> str: ...

    @property
    def backing(self) -> str: ...

    @property
    def backing_format(self) -> str: ...

    @property
    def backing_state(self) -> str: ...

    @property
    def backing_bytes_read(self) -> int: ...

    @property
    def backing_asked_twice(self) -> int: ...

    @property
    def last_error(self) -> str: ...

    @property
    def copied_bytes(self) -> int: ...

    @property
    def misses(self) -> int: ...

    @property
    def missed_seconds(self) -> float: ...

    @property
    def waiting(self) -> int: ...

    @property
    def errors(self) -> int: ...


class OpenDisk(Protocol):
    """What an open handle needs of its disk. Positions and lengths are in bytes; only `QedfsError` is raised."""

    def read_nowait(self, pos: int, length: int) -> memoryview | None:
        """Local data in one piece, or None. The view is valid only until the next call or await."""

    async def read(self, pos: int, length: int) -> bytes | bytearray | memoryview:
        """Clipped at the end of the disk."""

    def write_nowait(self, pos: int, data: bytes) -> bool:
        """Whether the write was done at once."""

    async def write(self, pos: int, data: bytes) -> None:
        """Grows the disk when it passes the end."""

    async def flush(self) -> None:
        """Everything acknowledged is durable when this returns."""


class ServedDisk(OpenDisk, Protocol):
    """What a file needs of its disk; `disk.Disk` is one. Sizes are in bytes; only `QedfsError` is raised."""

    @property
    def size(self) -> int: ...

    @property
    def cluster_size(self) -> int: ...

    @property
    def read_only(self) -> bool: ...

    @property
    def held(self) -> bool: ...

    async def grow(self, size: int) -> None:
        """UsageError unless `size` is a multiple of 512 and not below the present one."""

    def prefetch(self, pos: int, length: int) -> None:
        """Queues and returns."""

    async def set_mode(self, mode: Mode) -> None: ...

    async def stream(self, pos: int) -> int:
        """Make the cluster at `pos` local; return how many bytes from there on are."""

    def remaining(self) -> int | None:
        """Bytes that are not local; None while that is not known."""

    async def release_hold(self, drop_pages: DropPages) -> None:
        """End the hold, if there is one; `drop_pages` empties the kernel's cache of this disk."""

    async def counts(self) -> Counts: ...

    def allocated_bytes_nowait(self) -> int: ...

    async def density(self) -> list[float]: ...

    def statistics(self) -> Statistics: ...


class Stream(Protocol):
    """The background copying of one disk; `stream.Job` is one. Rates are in bytes per second."""

    paused: bool
    damaged: bool

    @property
    def rate_limit(self) -> int:
        """0: none."""

    @property
    def floor(self) -> int: ...

    @property
    def finish_by(self) -> float | None:
        """As it was set, in seconds."""

    def set_limits(self, *, rate: int | None = None, floor: int | None = None) -> None: ...

    def set_finish_by(self, seconds: float | None) -> None: ...

    @property
    def rate(self) -> float: ...

    @property
    def eta(self) -> float | None:
        """Seconds; None: unknown."""

    def state(self, of_disk: str) -> str: ...


@dataclass
class Step:
    """What the last step of streaming that was asked for has answered, in sectors."""

    sectors: int = 0


@dataclass(frozen=True, eq=False)
class Leaf:
    """One served image. Two leaves are the same only if they are the same object."""

    name: str
    """Of the file in the mount, such as `vm1.raw`."""
    disk: ServedDisk
    path: str
    """Absolute, of the image file."""
    mode: int
    """Permission bits of the image file; set-user-id and the like are not shown."""
    uid: int
    gid: int
    mtime_ns: int
    stream: Stream
    options: StreamOptions = field(default_factory=StreamOptions)
    """Those of the mount: what others than root and the mounter may not exceed."""
    step: Step = field(default_factory=Step)
