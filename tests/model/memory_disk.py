"""A whole disk in memory: image, backing and disk over fakes."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio.testing

from qedfs.config import DiskOptions, Mode
from qedfs.disk.disk import Disk, open_disk
from qedfs.image.create import create_image
from qedfs.image.geometry import Geometry
from qedfs.image.image import Image, open_image
from qedfs.image.record import Record
from tests.image.memory_storage import MemoryStorage
from tests.model.fake_source import FakeSource

SMALL = Geometry(4096, 2)
"""1024 entries a table, 4 MiB of disk each."""


def pattern(length: int, seed: int = 0) -> bytes:
    """Return `length` bytes without a run of zeros, different for each seed."""
    return random.Random(seed).randbytes(length)


@dataclass
class MemoryDisk:
    """The parts of one disk under test."""

    storage: MemoryStorage
    image: Image
    source: FakeSource
    disk: Disk

    def kinds_since(self, mark: int) -> list[str]:
        return self.storage.kinds()[mark:]


async def empty_image(
    size: int, *, geometry: Geometry = SMALL, backing: bool = True, record: Record | None = None
) -> MemoryStorage:
    """Return a new image; its log is empty."""
    storage = MemoryStorage()
    name = ("base.raw", True) if backing else None
    await create_image(storage, size=size, geometry=geometry, backing=name, record=record or Record())
    storage.log.clear()
    return storage


@asynccontextmanager
async def memory_disk(
    storage: MemoryStorage,
    base: bytes | FakeSource = b"",
    *,
    mode: Mode = Mode.COR,
    readahead: int = 0,
    backing_timeout: float | None = 60.0,
    write_timeout: float | None = None,
    close: bool = True,
) -> AsyncIterator[MemoryDisk]:
    """Serve the image in `storage` over `base`; at the end close it well, unless `close` is False (a crash)."""
    source = base if isinstance(base, FakeSource) else FakeSource(base)
    image = await open_image(storage)
    backing = source.backing(changing=image.record.hold) if image.backing_name else None
    options = DiskOptions(mode=mode, readahead=readahead, backing_timeout=backing_timeout, write_timeout=write_timeout)
    async with open_disk(image, backing, options) as disk:
        yield MemoryDisk(storage, image, source, disk)
    if close:
        await image.aclose()
    if backing is not None:
        await backing.aclose()


async def settled() -> None:
    """Return when every task waits for something that only the test can give."""
    await trio.testing.wait_all_tasks_blocked()
