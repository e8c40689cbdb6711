"""An image in one of QEMU's formats over any source, read by a confined `qemu-nbd`: one layer of a chain.

QEMU never opens anything. The bytes of the image (a file, an export, an object, whatever we can read) are served to it by
our own NBD server over a socket pair, those of its backing, which is a source of ours too, over another; what it makes of
them is read by our own NBD client. One way for all transports and all formats: policy, locks, identity and the guard
against changes are those of the source below, and there is no path that could be swapped.

The node tree is explicit: the format, the file and the backing are named here, and nothing in the image is followed. The
start of the image, by which `foreign.py` judged it, is shown to QEMU as it was then, even if the source has another one by
now, and without the name of the backing.

**Errors.** QEMU says only "I/O error". What a source below has raised meanwhile is the reason then, and is raised here as
it is, so a change stays a change and an outage an outage. If the sources below have answered all they were asked, the
image itself is broken in that place. If QEMU is gone, that may pass: whoever opens the source anew starts another one.

The serving tasks are trio's system tasks: a source is opened in any task and closed in another, so no nursery of a caller
lives long enough. They raise nothing; `aclose` ends them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import trio

from qedfs.backing.base import Extent, Identity, Source, merged
from qedfs.backing.foreign import HEAD, Foreign, inspect, without_backing
from qedfs.backing.nbd import NbdSource, open_nbd
from qedfs.backing.qemu_process import FIRST_IMAGE_FD, PROGRAM, SECRET_ID, QemuProcess, start
from qedfs.errors import (
    BackingError,
    BackingRefused,
    BackingUnavailable,
    CorruptEntry,
    QedfsError,
)
from qedfs.nbd.address import NbdAddress
from qedfs.nbd.errors import NbdRequestFailed
from qedfs.nbd.server import serve_stream

_SECTOR = 512
_LAST_WORDS = 1.0
"""Seconds for a process that has hung up to be gone."""


async def read_foreign(file: Source, format: str) -> tuple[Foreign, bytes]:
    """Return what the image in `file` says of itself, and the start of it that QEMU may see.

    Raises:
        BackingRefused: it is no such image, or leads somewhere else.
    """
    head = bytearray(min(HEAD, file.size))
    await file.read_into(0, memoryview(head))
    told = inspect(format, bytes(head), file.name)
    return told, without_backing(format, bytes(head))


class QemuSource(Source):
    """The disk of an image. Made by `open_qemu`; owns the sources it is given."""

    def __init__(self, format: str, layers: _Layers, process: QemuProcess, disk: NbdSource) -> None:
        self.format = format
        self.name = layers.file.name
        self.size = disk.size
        self.identity = _identity(disk.size, layers)
        self._layers = layers
        self._process = process
        self._disk = disk
        self._closed = False

    @property
    def pid(self) -> int:
        """Of the process that reads the image."""
        return self._process.pid

    @property
    def tells_content(self) -> bool:
        return self._layers.file.tells_content and (self._layers.below is None or self._layers.below.tells_content)

    async def read_into(self, pos: int, buffer: memoryview) -> None:
        with self._explained(pos):
            await self._disk.read_into(pos, buffer)

    async def extents(self, pos: int, length: int) -> list[Extent]:
        with self._explained(pos):
            return await self._disk.extents(pos, length)

    async def aclose(self) -> None:
        self._closed = True
        try:
            await self._disk.aclose()
            await self._process.end()
            await self._layers.stop()
        finally:
            await self._layers.close_sources()

    @contextlib.contextmanager
    def _explained(self, pos: int) -> Iterator[None]:
        before = self._layers.failures.count
        try:
            yield
        except BackingError as error:
            raise self._meaning(error, pos, before) from error

    def _meaning(self, error: BackingError, pos: int, before: int) -> QedfsError:
        if self._closed:
            return BackingUnavailable(self.name, "is closed")
        if (failure := self._layers.failures.since(before)) is not None:
            return failure
        if isinstance(error.__cause__, NbdRequestFailed):
            return CorruptEntry(self.name, f"QEMU cannot read it as {self.format} at byte {pos} ({error.why})")
        why = f"{PROGRAM} has ended" if self._process.ended else error.why
        return type(error)(self.name, why)


async def open_qemu(
    file: Source, format: str, told: Foreign, head: bytes, below: Source | None, secret: bytes | None = None
) -> QemuSource:
    """Open the image of `format` in `file` over its backing `below`; `told` and `head` are `read_foreign`'s answer.

    `secret` is the passphrase of an encrypted one. The sources are the result's from then on, or still the caller's if
    that fails.

    Raises:
        BackingRefused: QEMU is not installed, does not understand the image, or a passphrase is missing or wrong.
        BackingUnavailable: a source below does not answer now, or QEMU has not answered in time.
    """
    if told.encryption and secret is None:
        raise BackingRefused(file.name, "is encrypted, and no passphrase was given (secret=fd:N or secret=file:PATH)")
    layers = _Layers(file, below, head)
    sockets: list[socket.socket] = []
    process: QemuProcess | None = None
    folder = tempfile.mkdtemp(prefix="qedfs-")
    try:
        path = os.path.join(folder, "disk")
        sockets.append(_listening(path))
        sockets += layers.serve()
        tree = _tree(format, told, below is not None)
        process = start(tree, sockets[0], sockets[1:], secret if told.encryption else None, file.name)
        # Ordering: with our copies closed, the process is the only one to hold its ends, and its death is seen at once.
        _close(sockets)
        before = layers.failures.count
        try:
            disk = await open_nbd(NbdAddress(False, None, 0, path, ""), private=True)
        except BackingError as error:
            raise await _why_not(error, process, layers, before, format) from error
        return QemuSource(format, layers, process, disk)
    except BaseException:
        _close(sockets)
        with trio.CancelScope(shield=True):
            if process is not None:
                await process.end()
            await layers.stop()
        raise
    finally:
        # There is one connection, and one is all that there will be: nobody else finds a socket to connect to.
        shutil.rmtree(folder, ignore_errors=True)


async def _why_not(error: BackingError, process: QemuProcess, layers: _Layers, before: int, format: str) -> QedfsError:
    """Return why the process has not answered: a source below, itself, or time."""
    with trio.move_on_after(_LAST_WORDS):
        await process.wait()
    if (failure := layers.failures.since(before)) is not None:
        return failure
    name = layers.file.name
    return process.why_it_ended(name, format) if process.ended else type(error)(name, f"{PROGRAM}: {error.why}")


@dataclass
class _Failures:
    """What sources below have raised while QEMU asked."""

    count: int = 0
    newest: QedfsError | None = None

    def note(self, error: QedfsError) -> None:
        self.count += 1
        self.newest = error

    def since(self, before: int) -> QedfsError | None:
        """Return an error like the newest one, if there have been more than `before`."""
        if self.count <= before or self.newest is None:
            return None
        return type(self.newest)(self.newest.what, self.newest.why)


class _View:
    """What QEMU is shown of a source: whole sectors, and its start as it was judged."""

    def __init__(self, source: Source, head: bytes, failures: _Failures) -> None:
        self.size = -(-source.size // _SECTOR) * _SECTOR
        self._source = source
        self._head = head
        self._failures = failures

    async def read_into(self, pos: int, buffer: memoryview) -> None:
        known = self._head[pos : pos + len(buffer)]
        buffer[: len(known)] = known
        pos, buffer = pos + len(known), buffer[len(known) :]
        inside = min(max(self._source.size - pos, 0), len(buffer))
        with self._noting():
            if inside:
                await self._source.read_into(pos, buffer[:inside])
        if inside < len(buffer):
            buffer[inside:] = bytes(len(buffer) - inside)

    async def extents(self, pos: int, length: int) -> list[Extent]:
        inside = min(max(self._source.size - pos, 0), length)
        with self._noting():
            known = await self._source.extents(pos, inside) if inside else []
        return merged([*known, Extent(length - inside, True)])

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except QedfsError as error:
            self._failures.note(error)
            raise


class _Layers:
    """The sources below, and the tasks that serve them."""

    def __init__(self, file: Source, below: Source | None, head: bytes) -> None:
        self.file = file
        self.below = below
        self.failures = _Failures()
        self._views = [_View(file, head, self.failures)]
        if below is not None:
            self._views.append(_View(below, b"", self.failures))
        self._scope = trio.CancelScope()
        self._served = trio.Event()
        self._served.set()

    def serve(self) -> list[socket.socket]:
        """Serve each source to one client from now on; return the clients' ends."""
        pairs = [socket.socketpair() for _ in self._views]
        self._served = trio.Event()
        trio.lowlevel.spawn_system_task(self._serve, [ours for ours, _ in pairs])
        return [theirs for _, theirs in pairs]

    async def _serve(self, sockets: list[socket.socket]) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for view, ours in zip(self._views, sockets, strict=True):
                        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
                        nursery.start_soon(serve_stream, view, stream)
        finally:
            self._served.set()

    async def stop(self) -> None:
        """Serve no more."""
        self._scope.cancel()
        await self._served.wait()

    async def close_sources(self) -> None:
        try:
            await self.file.aclose()
        finally:
            if self.below is not None:
                await self.below.aclose()


def _tree(format: str, told: Foreign, has_backing: bool) -> dict[str, Any]:
    """Return QEMU's node tree: every node named here, the backing ours or none."""
    tree: dict[str, Any] = {"driver": format, "read-only": True, "file": _node(FIRST_IMAGE_FD)}
    if format in _WITH_BACKING:
        tree["backing"] = _node(FIRST_IMAGE_FD + 1) if has_backing else None
    if told.encryption and format == "luks":
        tree["key-secret"] = SECRET_ID
    elif told.encryption:
        tree["encrypt"] = {"format": told.encryption, "key-secret": SECRET_ID}
    return tree


_WITH_BACKING = ("qcow2", "qcow", "vmdk")
"""The formats to which QEMU would otherwise add the backing that the image names."""


def _node(fd: int) -> dict[str, Any]:
    return {"driver": "nbd", "read-only": True, "server": {"type": "fd", "str": str(fd)}}


def _identity(size: int, layers: _Layers) -> Identity:
    """Return the size of the disk, and a tag that differs when any layer is another one."""
    below = layers.below.identity if layers.below is not None else Identity(0)
    parts = [layers.file.identity.size, layers.file.identity.tag, below.size, below.tag]
    return Identity(size, "chain:" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32])


def _listening(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        listener.listen(1)
    except BaseException:
        listener.close()
        raise
    return listener


def _close(sockets: list[socket.socket]) -> None:
    for each in sockets:
        each.close()
