"""A backing in memory: reads may be held at a gate, made to fail, or delayed as a test likes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from qedfs.backing.base import Extent, Identity, Source, merged
from qedfs.backing.resilient import Backing
from tests.image.memory_storage import Gate

GRANULE = 4096
"""Bytes by which zeros are promised."""


class FakeSource(Source):
    """A source of `content`. `requests` holds `(pos, length)` of every read that was begun."""

    def __init__(self, content: bytes, *, name: str = "fake") -> None:
        self.content = content
        self.name = name
        self.size = len(content)
        self.identity = Identity(self.size)
        self.requests: list[tuple[int, int]] = []
        self.promises = False
        """Whether blocks of zeros are told as such."""
        self.error: Exception | None = None
        self.opening: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        """Awaited by whoever connects; may refuse."""
        self.delay: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self._gates: list[tuple[Gate, Callable[[int], bool]]] = []

    def hold(self, where: Callable[[int], bool] = lambda pos: True) -> Gate:
        """Stop reads that begin at a position that satisfies `where`."""
        gate = Gate()
        self._gates.append((gate, where))
        return gate

    live = True

    def backing(self, *, changing: bool = False) -> Backing:
        """Return the backing over this source that a disk takes; that of a held one is still `changing`."""

        async def opener() -> Source:
            await self.opening()
            return self

        return Backing(opener, name=self.name, format="raw", changing=changing)

    async def read_into(self, pos: int, buffer: memoryview) -> None:
        assert pos >= 0
        assert pos + len(buffer) <= self.size
        self.requests.append((pos, len(buffer)))
        await self.delay()
        for gate, where in self._gates:
            if where(pos):
                await gate.pass_through()
        if self.error is not None:
            raise self.error
        buffer[:] = self.content[pos : pos + len(buffer)]

    async def extents(self, pos: int, length: int) -> list[Extent]:
        await self.delay()
        if not self.promises:
            return [Extent(length, False)]
        pieces, end = [], pos + length
        while pos < end:
            stop = min(end, (pos // GRANULE + 1) * GRANULE)
            pieces.append(Extent(stop - pos, not any(self.content[pos:stop])))
            pos = stop
        return merged(pieces)

    async def aclose(self) -> None:
        pass
