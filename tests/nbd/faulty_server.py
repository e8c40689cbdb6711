"""An NBD server with faults: it ends or falls silent after any byte it sends, or answers what it should not.

Written after the specification, with nothing of qedfs's own server but the numbers, so that both do not share a mistake.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable
from enum import Enum, auto
from typing import NamedTuple

import trio

from qedfs.nbd.address import NbdAddress, parse_address
from qedfs.nbd.constants import CHUNK_DONE, Chunk, Command, Option, Reply

SIZE = 1 << 20
ZEROS = 4096
"""Bytes at the start of the export that are zeros, and a hole; the rest is none."""
CONTENT = bytes(ZEROS) + bytes(1 + number % 251 for number in range(SIZE - ZEROS))
CONTEXT = 7


class Ending(Enum):
    """What becomes of a connection. `RESET` takes back what the client has not received yet."""

    HANG_UP = auto()
    RESET = auto()
    SILENCE = auto()


class Asked(NamedTuple):
    command: int
    cookie: int
    pos: int
    length: int


Fault = Callable[[Asked], bytes]


class _Over(Exception):
    """This connection is."""


class FaultyServer:
    """One export. `structured`: whether it knows structured replies and `base:allocation`.

    The first connection ends after `cut` bytes, None for never, in the way of `ending`. `faults` are what is sent
    instead of the first answers of READ, or of BLOCK_STATUS, one for each request.
    """

    def __init__(
        self,
        *,
        structured: bool = True,
        cut: int | None = None,
        ending: Ending = Ending.HANG_UP,
        reads: list[Fault] | None = None,
        statuses: list[Fault] | None = None,
    ) -> None:
        self.connections = 0
        self.sent = 0
        """Over all connections."""
        self._structured = structured
        self._cut = cut
        self._ending = ending
        self._faults = {Command.READ: list(reads or []), Command.BLOCK_STATUS: list(statuses or [])}

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[NbdAddress]:
        sock = trio.socket.socket(socket.AF_INET)
        await sock.bind(("127.0.0.1", 0))
        sock.listen(16)
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, self._serve, [trio.SocketListener(sock)])
            yield parse_address(f"nbd://127.0.0.1:{sock.getsockname()[1]}")
            nursery.cancel_scope.cancel()

    async def _serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        line = _Line(self, stream, self._cut if self.connections == 1 else None, self._ending)
        with contextlib.suppress(_Over, trio.BrokenResourceError):
            await line.send(b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 3))
            await line.take(4)
            await self._negotiate(line)
            while (asked := Asked(*struct.unpack(">4x2xHQQI", await line.take(28)))).command != Command.DISC:
                faults = self._faults[Command(asked.command)]
                await line.send(faults.pop(0)(asked) if faults else self._answer(asked))

    async def _negotiate(self, line: _Line) -> None:
        option = None
        while option != Option.GO:
            option, length = struct.unpack(">8xII", await line.take(16))
            await line.take(length)
            if option == Option.GO:
                # HAS_FLAGS and READ_ONLY
                await line.send(_reply(option, Reply.INFO, struct.pack(">HQH", 0, SIZE, 3)))
            elif not self._structured:
                await line.send(_reply(option, Reply.ERR_UNSUP))
                continue
            elif option == Option.SET_META_CONTEXT:
                name = b"base:allocation"
                await line.send(_reply(option, Reply.META_CONTEXT, struct.pack(">I", CONTEXT) + name))
            await line.send(_reply(option, Reply.ACK))

    def _answer(self, asked: Asked) -> bytes:
        if asked.command == Command.BLOCK_STATUS:
            return status(asked, *extents(asked))
        if not self._structured:
            return simple(asked, CONTENT[asked.pos : asked.pos + asked.length])
        # Two pieces where there is room for two: the hole, and the last one first.
        zeros = min(max(ZEROS - asked.pos, 0), asked.length)
        parts = [hole(asked, 0, zeros)] if zeros else []
        middle = (zeros + asked.length + 1) // 2
        parts += [data(asked, start, end) for start, end in ((middle, asked.length), (zeros, middle)) if start < end]
        return b"".join(parts) + chunk(asked, Chunk.NONE, done=True)


class _Line:
    def __init__(self, server: FaultyServer, stream: trio.SocketStream, left: int | None, ending: Ending) -> None:
        self._server = server
        self._stream = stream
        self._left = left
        self._ending = ending
        self._incoming = bytearray()

    async def send(self, message: bytes) -> None:
        part = message if self._left is None else message[: self._left]
        if part:
            await self._stream.send_all(part)
        self._server.sent += len(part)
        if self._left is not None:
            self._left -= len(part)
            if len(part) < len(message):
                await self._end()

    async def take(self, length: int) -> bytes:
        while len(self._incoming) < length:
            received = await self._stream.receive_some()
            if not received:
                raise _Over
            self._incoming += received
        taken = bytes(self._incoming[:length])
        del self._incoming[:length]
        return taken

    async def _end(self) -> None:
        if self._ending is Ending.SILENCE:
            while await self._stream.receive_some():
                pass
        if self._ending is Ending.RESET:
            self._stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise _Over


def _reply(option: int, kind: int, payload: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(payload)) + payload


def chunk(asked: Asked, kind: int, payload: bytes = b"", *, done: bool = False) -> bytes:
    flags = CHUNK_DONE if done else 0
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, asked.cookie, len(payload)) + payload


def data(asked: Asked, start: int, end: int, *, done: bool = False) -> bytes:
    """Return the chunk for the bytes `[start, end)` of the request; past its end they are what stands there."""
    pos = asked.pos + start
    return chunk(asked, Chunk.OFFSET_DATA, struct.pack(">Q", pos) + CONTENT[pos : asked.pos + end], done=done)


def hole(asked: Asked, start: int, end: int, *, done: bool = False) -> bytes:
    return chunk(asked, Chunk.OFFSET_HOLE, struct.pack(">QI", asked.pos + start, end - start), done=done)


def error(asked: Asked, number: int, text: bytes = b"", *, done: bool = True) -> bytes:
    return chunk(asked, Chunk.ERROR, struct.pack(">IH", number, len(text)) + text, done=done)


def error_at(asked: Asked, number: int, start: int) -> bytes:
    return chunk(asked, Chunk.ERROR_OFFSET, struct.pack(">IHQ", number, 0, asked.pos + start), done=True)


def simple(asked: Asked, payload: bytes = b"", number: int = 0) -> bytes:
    return struct.pack(">IIQ", 0x67446698, number, asked.cookie) + payload


def status(asked: Asked, *told: tuple[int, int]) -> bytes:
    descriptors = b"".join(struct.pack(">II", *one) for one in told)
    return chunk(asked, Chunk.BLOCK_STATUS, struct.pack(">I", CONTEXT) + descriptors, done=True)


def extents(asked: Asked) -> list[tuple[int, int]]:
    """Return the true ones; HOLE and ZERO are the bits 0 and 1."""
    zeros = min(max(ZEROS - asked.pos, 0), asked.length)
    return [(length, flags) for length, flags in ((zeros, 3), (asked.length - zeros, 0)) if length]
