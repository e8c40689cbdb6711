"""Opening and reading files on web servers in tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from qedfs.backing.base import Identity, Source
from qedfs.backing.locate import Reference, open_backing
from qedfs.backing.policy import Policy
from qedfs.backing.resilient import Backing


@asynccontextmanager
async def opened(url: str, connections: int | None = None, policy: Policy | None = None) -> AsyncIterator[Source]:
    source = await open_backing(Reference(url, "raw", "/leaf.qed"), policy or Policy(connections=connections))
    try:
        yield source
    finally:
        await source.aclose()


def backing_at(url: str, expected: Identity | None = None) -> Backing:
    return Backing(
        lambda: open_backing(Reference(url, "raw", "/leaf.qed"), Policy()),
        name=url,
        expected=expected,
        jitter=lambda: 0.0,
    )


async def read(source: Source | Backing, pos: int, length: int) -> bytes:
    buffer = bytearray(length)
    await source.read_into(pos, memoryview(buffer))
    return bytes(buffer)
