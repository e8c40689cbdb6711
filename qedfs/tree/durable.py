"""A disk behind a handle on which the kernel does not say which writes are to be durable: then all of them are."""

from __future__ import annotations

from qedfs.tree.leaf import OpenDisk


class WriteThrough:
    """`disk`, with every write flushed before it is answered."""

    def __init__(self, disk: OpenDisk) -> None:
        self._disk = disk
        self.read_nowait = disk.read_nowait
        self.read = disk.read
        self.flush = disk.flush

    def write_nowait(self, pos: int, data: bytes) -> bool:
        return False

    async def write(self, pos: int, data: bytes) -> None:
        if not self._disk.write_nowait(pos, data):
            await self._disk.write(pos, data)
        await self._disk.flush()
