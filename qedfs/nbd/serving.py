"""The server's side of the transmission phase, without I/O: bytes of a client in, what it asks for out, answers as bytes.

A request is a fixed 28 bytes; only a WRITE carries more, which is thrown away here, as nothing is writable. The answer to
a request is one simple reply or any number of chunks, by what was agreed; `Answers` knows which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qedfs.nbd.constants import (
    CHUNK,
    CHUNK_DONE,
    CHUNK_MAGIC,
    DATA_CHUNK,
    ERROR,
    MAX_STRING,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STATUS,
    U32,
    U64,
    Chunk,
    Command,
    CommandFlag,
    Errno,
    Status,
)
from qedfs.nbd.errors import NbdProtocolError
from qedfs.nbd.negotiation import CLIENT, Agreement


class Asked(NamedTuple):
    """One request as it came. `refusal` is the error to answer at once, or 0 if the request may be carried out."""

    command: int
    flags: int
    cookie: int
    pos: int
    length: int
    refusal: int


class ServerTransmission:
    """Cuts a client's bytes into requests and judges them; DISC is judged by the driver, which ends the connection."""

    def __init__(self, agreement: Agreement) -> None:
        self._agreement = agreement
        self._incoming = bytearray()
        self._unwanted = 0
        """Bytes of a WRITE's payload that are still to come."""

    def receive(self, data: bytes) -> list[Asked]:
        """Take what came, in pieces of any size; return the requests that are complete now.

        Raises:
            NbdProtocolError: the client is out of step; the connection must end.
        """
        self._incoming += data
        asked: list[Asked] = []
        while True:
            skipped = min(self._unwanted, len(self._incoming))
            del self._incoming[:skipped]
            self._unwanted -= skipped
            if len(self._incoming) < REQUEST.size:
                return asked
            magic, flags, command, cookie, pos, length = REQUEST.unpack_from(self._incoming)
            if magic != REQUEST_MAGIC:
                raise NbdProtocolError(CLIENT, "sent something else than a request")
            del self._incoming[: REQUEST.size]
            if command == Command.WRITE:
                self._unwanted = length
            asked.append(Asked(command, flags, cookie, pos, length, self._judge(command, flags, pos, length)))

    def _judge(self, command: int, flags: int, pos: int, length: int) -> int:
        if command in (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES):
            return Errno.EPERM
        if command == Command.READ:
            known = CommandFlag.DF if self._agreement.structured else CommandFlag(0)
            limit = self._agreement.blocks.maximum
        elif command == Command.BLOCK_STATUS and self._agreement.allocation_context is not None:
            known = CommandFlag.REQ_ONE
            limit = self._agreement.size
        else:
            return 0 if command == Command.DISC else Errno.EINVAL
        if flags & ~int(known) or not 0 < length <= limit or pos + length > self._agreement.size:
            return Errno.EINVAL
        return 0


class Answers:
    """Writes answers in the form that was agreed."""

    def __init__(self, agreement: Agreement) -> None:
        self.structured = agreement.structured
        self._context = agreement.allocation_context
        self.data_header = DATA_CHUNK.size if self.structured else SIMPLE_REPLY.size
        """Bytes of the header in front of data."""

    def put_data_header(self, header: memoryview, cookie: int, pos: int, length: int, done: bool) -> None:
        """Write the header for `length` bytes of data from `pos`; a simple reply has one header for all of its data."""
        if self.structured:
            size = U64.size + length
            DATA_CHUNK.pack_into(header, 0, CHUNK_MAGIC, CHUNK_DONE * done, Chunk.OFFSET_DATA, cookie, size, pos)
        else:
            SIMPLE_REPLY.pack_into(header, 0, SIMPLE_REPLY_MAGIC, 0, cookie)

    def error(self, cookie: int, number: int, text: str = "") -> bytes:
        """Return the error that ends the answer to `cookie`; a simple reply has no room for the text."""
        if not self.structured:
            return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, number, cookie)
        message = text.encode(errors="replace")[:MAX_STRING]
        size = ERROR.size + len(message)
        header = CHUNK.pack(CHUNK_MAGIC, CHUNK_DONE, Chunk.ERROR, cookie, size)
        return header + ERROR.pack(number, len(message)) + message

    def status(self, cookie: int, extents: Sequence[tuple[int, bool]]) -> bytes:
        """Return the answer to BLOCK_STATUS: lengths (each below 2^32) and whether the bytes read as zeros."""
        assert self._context is not None
        size = U32.size + STATUS.size * len(extents)
        header = CHUNK.pack(CHUNK_MAGIC, CHUNK_DONE, Chunk.BLOCK_STATUS, cookie, size)
        both = Status.HOLE | Status.ZERO
        return b"".join([header, U32.pack(self._context), *(STATUS.pack(n, both if z else 0) for n, z in extents)])
