"""A read-only NBD server for anything that can be read and knows its holes.

Every client has one task that reads its requests and one for each request under way, at most `MAX_REQUESTS`; answers go
out as they are ready. What a client can make us hold is bounded: `MAX_CLIENTS` connections, a time limit for the
handshake, and `MAX_REQUESTS` buffers of `MAX_PIECE` bytes. Longer reads go out in pieces: as chunks, or, for a client that
knows only simple replies, one after the other behind one header.

A client that breaks the protocol or goes away is dropped; nobody else notices. A read that fails is answered with an
error and its text, unless a simple reply has begun: there only the end of the connection can say so.

With TLS nobody is served without; its handshake counts towards the same time limit.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import stat
from collections.abc import Sequence
from typing import Protocol

import trio

from qedfs.errors import QedfsError
from qedfs.nbd.constants import MAX_PAYLOAD, Command, CommandFlag, Errno, TransmissionFlag
from qedfs.nbd.errors import NbdError
from qedfs.nbd.negotiation import Agreement, BlockSizes, ServerHandshake
from qedfs.nbd.serving import Answers, Asked, ServerTransmission

MAX_CLIENTS = 64
HANDSHAKE_TIMEOUT = 10.0
"""Seconds; a client that is not done by then holds a place for nothing."""
MAX_REQUESTS = 16
"""Requests of one client under way; as many as QEMU's client sends."""
MAX_PIECE = 1024 * 1024
"""Bytes read and sent at once."""
_MAX_STATUS_LENGTH = 1 << 30
"""Bytes described by one BLOCK_STATUS answer; the client asks again for the rest."""
_MAX_EXTENTS = 8192
"""Descriptors in one BLOCK_STATUS answer (64 KiB)."""
_CONTEXT = 1
_LARGEST_REQUEST = 64 * 1024
"""Bytes received at once."""

Channel = trio.SocketStream | trio.SSLStream[trio.SocketStream]

log = logging.getLogger(__name__)


class Export(Protocol):
    """What can be served; used by many tasks at once. Errors are `QedfsError`s."""

    @property
    def size(self) -> int:
        """Bytes; fixed while it is served."""

    async def read_into(self, pos: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `pos`; the range lies within the size."""

    async def extents(self, pos: int, length: int) -> Sequence[tuple[int, bool]]:
        """Return lengths that add up to `length`, each with whether these bytes read as zeros for certain."""


async def serve(
    export: Export,
    listeners: list[trio.SocketListener],
    *,
    name: str,
    tls: ssl.SSLContext | None = None,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `export` as `name`, and as the default export, until cancelled; then close and remove the sockets.

    With `tls` (`server_context`) only by encrypted connections.
    """
    sockets = [found for listener in listeners if (found := _socket_file(listener)) is not None]
    server = _Server(export, name, tls)
    try:
        await trio.serve_listeners(server.serve_client, listeners, task_status=task_status)
    finally:
        for path, inode in sockets:
            _unlink_own(path, inode)


async def serve_stream(export: Export, stream: trio.SocketStream) -> None:
    """Serve `export` as the default export to the one client at the other end of `stream`, until it goes; then close."""
    await _Server(export, "", None).serve_client(stream)


class _Server:
    def __init__(self, export: Export, name: str, tls: ssl.SSLContext | None) -> None:
        self._export = export
        self._name = name
        self._tls = tls
        self._clients = 0
        flags = (
            TransmissionFlag.HAS_FLAGS
            | TransmissionFlag.READ_ONLY
            | TransmissionFlag.SEND_DF
            | TransmissionFlag.CAN_MULTI_CONN
        )
        self._offer = Agreement(export.size, flags, True, _CONTEXT, BlockSizes(1, 4096, MAX_PAYLOAD))

    async def serve_client(self, stream: trio.SocketStream) -> None:
        """Serve one client to its end; never raises for anything it does."""
        async with stream:
            if self._clients >= MAX_CLIENTS:
                log.warning("refused an NBD client: %d are connected already", MAX_CLIENTS)
                return
            self._clients += 1
            try:
                with trio.fail_after(HANDSHAKE_TIMEOUT):
                    channel, agreement = await self._negotiate(stream)
                # A channel by TLS needs no end of its own: `stream` is closed, as by a client that says goodbye.
                await _Client(self._export, channel, agreement).run()
            except* (NbdError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, OSError) as gone:
                log.debug("an NBD client is gone: %r", gone.exceptions[0])
            except* Exception:
                log.exception("an NBD client was dropped because of an internal error")
            finally:
                self._clients -= 1

    async def _negotiate(self, stream: trio.SocketStream) -> tuple[Channel, Agreement]:
        handshake = ServerHandshake(self._name, self._offer, tls=self._tls is not None)
        channel: Channel = stream
        data = b""
        while True:
            if answer := handshake.receive(data):
                await channel.send_all(answer)
            if handshake.result is not None:
                return channel, handshake.result
            if handshake.tls_due:
                assert self._tls is not None
                # Ordering: nothing has been read past STARTTLS; what somebody put there in the clear breaks this handshake.
                channel = trio.SSLStream(stream, self._tls, server_side=True, https_compatible=True)
                await channel.do_handshake()
                if answer := handshake.secured():
                    await channel.send_all(answer)
            data = bytes(await channel.receive_some(handshake.wants))
            if not data:
                raise handshake.end_of_stream()


class _Client:
    """One client in the transmission phase."""

    def __init__(self, export: Export, stream: Channel, agreement: Agreement) -> None:
        self._export = export
        self._stream = stream
        self._requests = ServerTransmission(agreement)
        self._answers = Answers(agreement)
        self._places = trio.Semaphore(MAX_REQUESTS)
        # An answer is sent whole; this lock keeps others out of it.
        self._sending = trio.Lock()

    async def run(self) -> None:
        """Answer until the client says goodbye, with what is under way answered still, or hangs up."""
        async with trio.open_nursery() as nursery:
            while data := await self._stream.receive_some(_LARGEST_REQUEST):
                for asked in self._requests.receive(bytes(data)):
                    if asked.command == Command.DISC:
                        return
                    await self._places.acquire()
                    nursery.start_soon(self._answer, asked)
            nursery.cancel_scope.cancel()

    async def _answer(self, asked: Asked) -> None:
        try:
            if asked.refusal:
                await self._send(self._answers.error(asked.cookie, asked.refusal, _WHY.get(asked.refusal, "")))
            elif asked.command == Command.BLOCK_STATUS:
                await self._answer_status(asked)
            elif self._answers.structured:
                await self._answer_in_chunks(asked)
            else:
                await self._answer_simply(asked)
        finally:
            self._places.release()

    async def _answer_status(self, asked: Asked) -> None:
        length = min(asked.length, _MAX_STATUS_LENGTH)
        try:
            extents = await self._export.extents(asked.pos, length)
        except QedfsError as error:
            await self._send(self._answers.error(asked.cookie, _number(error), str(error)))
            return
        limit = 1 if asked.flags & CommandFlag.REQ_ONE else _MAX_EXTENTS
        await self._send(self._answers.status(asked.cookie, [e for e in extents if e[0]][:limit]))

    async def _answer_in_chunks(self, asked: Asked) -> None:
        if asked.flags & CommandFlag.DF and asked.length > MAX_PIECE:
            text = f"more than {MAX_PIECE} bytes are not sent in one piece"
            await self._send(self._answers.error(asked.cookie, Errno.EOVERFLOW, text))
            return
        pos, end = asked.pos, asked.pos + asked.length
        while pos < end:
            length = min(MAX_PIECE, end - pos)
            try:
                message = await self._read(asked.cookie, pos, length, pos + length == end)
            except QedfsError as error:
                await self._send(self._answers.error(asked.cookie, _number(error), str(error)))
                return
            await self._send(message)
            pos += length

    async def _answer_simply(self, asked: Asked) -> None:
        """Send header and data in pieces; the first is read before the header tells that all is well."""
        length = min(MAX_PIECE, asked.length)
        try:
            message = await self._read(asked.cookie, asked.pos, length, True)
        except QedfsError as error:
            await self._send(self._answers.error(asked.cookie, _number(error)))
            return
        async with self._sending:
            await self._stream.send_all(message)
            done = length
            while done < asked.length:
                length = min(MAX_PIECE, asked.length - done)
                piece = bytearray(length)
                try:
                    await self._export.read_into(asked.pos + done, memoryview(piece))
                except QedfsError as error:
                    raise NbdError(error.what, f"{error.why}, in the middle of a simple reply") from error
                await self._stream.send_all(piece)
                done += length

    async def _read(self, cookie: int, pos: int, length: int, done: bool) -> bytearray:
        """Return header and data in one buffer, so that they are sent by one call without a copy."""
        start = self._answers.data_header
        message = bytearray(start + length)
        with memoryview(message) as view:
            await self._export.read_into(pos, view[start:])
            self._answers.put_data_header(view[:start], cookie, pos, length, done)
        return message

    async def _send(self, message: bytes | bytearray) -> None:
        async with self._sending:
            await self._stream.send_all(message)


_WHY: dict[int, str] = {Errno.EPERM: "the export is read-only", Errno.EINVAL: "the request is not valid here"}


def _number(error: QedfsError) -> int:
    """Return the error number on the wire; a number the protocol does not know is EIO, as the client cannot fix it."""
    return error.errno if error.errno in {Errno.EPERM, Errno.EIO, Errno.ENOMEM, Errno.ESHUTDOWN} else Errno.EIO


def _socket_file(listener: trio.SocketListener) -> tuple[str, tuple[int, int]] | None:
    """Return path and inode of a unix socket, so that only this very one is removed in the end."""
    if listener.socket.family != socket.AF_UNIX:
        return None
    path = str(listener.socket.getsockname())
    found = os.lstat(path)
    return path, (found.st_dev, found.st_ino)


def _unlink_own(path: str, inode: tuple[int, int]) -> None:
    try:
        found = os.lstat(path)
        if stat.S_ISSOCK(found.st_mode) and (found.st_dev, found.st_ino) == inode:
            os.unlink(path)
    except OSError:
        pass
