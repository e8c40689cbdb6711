"""Users, and the files that they leave for each other."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from qedfs.backing.base import Source
from qedfs.backing.file import open_file
from qedfs.backing.locate import Reference, open_backing
from qedfs.backing.policy import Policy
from qedfs.image.create import create_leaf
from qedfs.image.geometry import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_CLUSTERS, Geometry
from qedfs.image.record import Record
from qedfs.nbd.listeners import open_tcp_listeners
from qedfs.nbd.server import serve

ROOT, NOBODY, MALLORY = 0, 65534, 4242  # nobody has a name and groups, Mallory has neither
SIZE = 1 << 20
SECRET = b"secret".ljust(512, b"!")


def give(path: Path, uid: int, mode: int) -> Path:
    os.chown(path, uid, uid, follow_symlinks=False)
    if not path.is_symlink():
        path.chmod(mode)
    return path


def folder(path: Path, uid: int = ROOT, mode: int = 0o755) -> Path:
    path.mkdir()
    return give(path, uid, mode)


def secret(path: Path, uid: int = ROOT, mode: int = 0o600) -> Path:
    path.write_bytes(SECRET)
    return give(path, uid, mode)


def link(path: Path, target: object, uid: int) -> Path:
    path.symlink_to(str(target))
    return give(path, uid, 0)


async def image(
    path: Path, backing: object, uid: int = ROOT, mode: int = 0o644, *, raw: bool = True, record: Record | None = None
) -> Path:
    """Make an image that names `backing`, whatever that is; without a pin."""
    await create_leaf(
        str(path),
        size=SIZE,
        geometry=Geometry(DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_CLUSTERS),
        backing=None if backing is None else (str(backing), raw),
        record=record or Record(),
        overwrite=False,
    )
    return give(path, uid, mode)


async def open_backing_of(leaf: Path, name: object, policy: Policy | None = None, format: str | None = None) -> Source:
    """Open what the header of `leaf` names, as a mount does."""
    reference = Reference(str(name), format, str(leaf), leaf.stat())
    with trio.fail_after(10):
        return await open_backing(reference, policy or Policy(mounter=ROOT))


async def start_of(source: Source, length: int = len(SECRET)) -> bytes:
    """Read the start of `source` and close it."""
    try:
        buffer = bytearray(min(length, source.size))
        await source.read_into(0, memoryview(buffer))
        return bytes(buffer)
    finally:
        await source.aclose()


@asynccontextmanager
async def served(path: Path, port: int = 0) -> AsyncIterator[str]:
    """Serve the bytes of a file by NBD on loopback, at a free port or at `port`; the address comes out."""
    source = await open_file(str(path))
    try:
        listeners = await open_tcp_listeners("127.0.0.1", port)
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: serve(source, listeners, name="x", task_status=task_status))
            yield f"nbd://127.0.0.1:{listeners[0].socket.getsockname()[1]}/x"
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await source.aclose()
