"""The client's side of the transmission phase, without I/O and without a second copy of what is read.

A driver sends what `read` and `block_status` return, and moves the answers so:

    count = socket.recv_into(machine.place()); finished = machine.received(count)

`place()` is where the next bytes belong. Between answers that is a small buffer of the machine, so that many small
answers arrive by one system call; while the payload of a long READ is under way it is the reader's own buffer, and the
kernel's copy is the only one. (What of a payload arrived together with its header is copied once more, at most
`_STAGING` bytes of it.)

The rules a server must keep (NBD specification, "Structured reply chunk message"); else `NbdProtocolError`:

- an answer carries the cookie of a pending request; answers to different requests interleave in any order;
- with structured replies a READ is answered by chunks, which lie inside the request, do not overlap and, unless there
  was an error, cover it when the one marked DONE has come; without, by one simple reply;
- BLOCK_STATUS is answered by descriptors of our context that begin where the request does; only the last may reach
  beyond it; they may stop early, but tell at least something;
- a type we do not know is an error if bit 15 says so, and otherwise a violation; after an error chunk the answer goes
  on until DONE.

No field of an answer makes us allocate more than `MAX_STATUS_CHUNK`, or loop without bound: chunks are counted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from qedfs.nbd.constants import (
    CHUNK,
    CHUNK_DONE,
    CHUNK_ERROR,
    CHUNK_MAGIC,
    DATA_CHUNK,
    ERROR,
    HOLE,
    MAX_ERROR_CHUNK,
    MAX_STATUS_CHUNK,
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
from qedfs.nbd.errors import NbdProtocolError, NbdRequestFailed
from qedfs.nbd.negotiation import SERVER, Agreement

_STAGING = 32 * 1024
"""Bytes. Holds seven answers of 4 KiB, and is small beside the 1 MiB of a long read."""
_CHUNKS_PER_ANSWER = 4096
_BYTES_PER_CHUNK = 512
"""An answer may have `_CHUNKS_PER_ANSWER` chunks, and one more per sector read: no server splits finer."""


class Request:
    """A READ or BLOCK_STATUS under way; compared by identity."""

    __slots__ = (
        "chunks",
        "cookie",
        "covered",
        "destination",
        "done",
        "ends",
        "error",
        "extents",
        "length",
        "pos",
        "starts",
    )

    def __init__(self, cookie: int, pos: int, length: int, destination: memoryview | None) -> None:
        self.cookie = cookie
        self.pos = pos
        self.length = length
        self.destination = destination
        """Where the payload goes; None for BLOCK_STATUS, and for a READ whose reader has left."""
        self.done = False
        self.error: NbdRequestFailed | None = None
        self.extents: list[tuple[int, bool]] = []
        """The answer to BLOCK_STATUS: length and "reads as zeros", cut at the end of the request."""
        self.covered = 0
        self.chunks = 0
        # The parts of a READ that have been answered, relative to `pos`, ascending, neighbours joined.
        self.starts: list[int] = []
        self.ends: list[int] = []


class ClientTransmission:
    """Matches answers to requests and leads their bytes to where they belong."""

    def __init__(self, agreement: Agreement) -> None:
        self._structured = agreement.structured
        self._context = agreement.allocation_context
        self._pending: dict[int, Request] = {}
        self._reads: set[int] = set()
        self._next_cookie = 0
        self._staging = memoryview(bytearray(_STAGING))
        self._filled = 0
        # INVARIANT: while one of these two is set, staging is empty. `_payload` is the rest of a payload under way, and
        # `_finish` what to do when it is complete; `_unwanted` is the rest of one that nobody waits for.
        self._payload: memoryview | None = None
        self._finish: Callable[[], Request | None] | None = None
        self._payload_of: Request | None = None
        self._unwanted = 0
        self.read_flags = CommandFlag(0)
        """Of every READ to come."""

    @property
    def pending(self) -> int:
        """Requests not yet fully answered, those whose reader has left included."""
        return len(self._pending)

    @property
    def newest(self) -> Request | None:
        """Of the requests that are `pending`."""
        return next(reversed(self._pending.values()), None)

    def read(self, pos: int, destination: memoryview) -> tuple[Request, bytes]:
        """Return a new READ of `len(destination)` bytes (1 to 2^32 - 1) at `pos`, and the bytes that ask for it."""
        request = self._new(pos, len(destination), destination)
        self._reads.add(request.cookie)
        message = REQUEST.pack(REQUEST_MAGIC, self.read_flags, Command.READ, request.cookie, pos, request.length)
        return request, message

    def block_status(self, pos: int, length: int) -> tuple[Request, bytes]:
        """Return a new BLOCK_STATUS of `length` bytes (1 to 2^32 - 1) at `pos`, and the bytes that ask for it."""
        request = self._new(pos, length, None)
        return request, REQUEST.pack(REQUEST_MAGIC, 0, Command.BLOCK_STATUS, request.cookie, pos, length)

    def goodbye(self) -> bytes:
        """Return the bytes that end the connection politely."""
        return REQUEST.pack(REQUEST_MAGIC, 0, Command.DISC, self._next_cookie, 0, 0)

    def abandon(self, request: Request) -> None:
        """Forget the reader of `request`: nothing is written to its buffer from now on, the answer is thrown away."""
        request.destination = None
        if self._payload_of is request and self._payload is not None and request.cookie in self._reads:
            self._unwanted = len(self._payload)
            self._payload = None

    def withdraw(self, request: Request) -> None:
        """Forget a request whose bytes were never sent."""
        del self._pending[request.cookie]
        self._reads.discard(request.cookie)

    def place(self) -> memoryview:
        """Return where the next bytes from the socket belong; never empty."""
        if self._payload is not None:
            return self._payload
        if self._unwanted:
            return self._staging[: self._unwanted]
        return self._staging[self._filled :]

    def received(self, count: int) -> list[Request]:
        """Take note that `count` bytes (at least 1) were put at `place()`; return the requests that are done by that.

        Raises:
            NbdProtocolError: the server broke a rule; the machine must not be used any more.
        """
        if self._payload is None and not self._unwanted:
            self._filled += count
            return self._parse()
        if self._payload is not None:
            self._payload = self._payload[count:] if count < len(self._payload) else None
            under_way = self._payload is not None
        else:
            self._unwanted -= count
            under_way = self._unwanted > 0
        if under_way:
            return []
        finished = self._end_payload()
        return [finished] if finished else []

    def _new(self, pos: int, length: int, destination: memoryview | None) -> Request:
        request = Request(self._next_cookie, pos, length, destination)
        self._next_cookie = (self._next_cookie + 1) & 0xFFFFFFFFFFFFFFFF
        self._pending[request.cookie] = request
        return request

    def _parse(self) -> list[Request]:
        """Consume all complete messages in staging, and the start of one whose payload goes elsewhere."""
        finished: list[Request] = []
        start = 0
        while start < self._filled:
            used, request = self._parse_one(self._staging[start : self._filled])
            if request is not None:
                finished.append(request)
            if not used:
                break
            start += used
        rest = self._filled - start
        if start and rest:
            self._staging[:rest] = bytes(self._staging[start : self._filled])
        self._filled = rest
        return finished

    def _parse_one(self, data: memoryview) -> tuple[int, Request | None]:
        """Return the bytes used of `data` (0: a message is incomplete) and the request that is finished, if any."""
        if len(data) < U32.size:
            return 0, None
        (magic,) = U32.unpack_from(data)
        if magic == CHUNK_MAGIC and self._structured:
            return self._parse_chunk(data) if len(data) >= CHUNK.size else (0, None)
        if magic == SIMPLE_REPLY_MAGIC:
            return self._parse_simple(data) if len(data) >= SIMPLE_REPLY.size else (0, None)
        raise NbdProtocolError(SERVER, f"sent an answer with the wrong magic {magic:#010x}")

    def _parse_simple(self, data: memoryview) -> tuple[int, Request | None]:
        _, error, cookie = SIMPLE_REPLY.unpack_from(data)
        request = self._of(cookie)
        is_read = cookie in self._reads
        if self._structured and is_read:
            raise NbdProtocolError(SERVER, "answered a read with a simple reply although chunks were agreed")
        if error:
            request.error = _failure(error, "")
            return SIMPLE_REPLY.size, self._done(request)
        if not is_read:
            raise NbdProtocolError(SERVER, "answered a query of block status without an answer")
        request.covered = request.length
        used, finished = self._take_payload(data, SIMPLE_REPLY.size, request, 0, request.length, True)
        return used, finished

    def _parse_chunk(self, data: memoryview) -> tuple[int, Request | None]:
        _, flags, kind, cookie, length = CHUNK.unpack_from(data)
        request = self._of(cookie)
        done = bool(flags & CHUNK_DONE)
        is_read = cookie in self._reads
        if kind == Chunk.OFFSET_DATA and is_read:
            if length <= U64.size:
                raise NbdProtocolError(SERVER, "sent a chunk of data without data")
            if len(data) < DATA_CHUNK.size:
                return 0, None
            pos = U64.unpack_from(data, CHUNK.size)[0]
            size = length - U64.size
            self._count(request)
            relative = self._cover(request, pos, size)
            return self._take_payload(data, DATA_CHUNK.size, request, relative, size, done)
        if kind == Chunk.BLOCK_STATUS and not is_read:
            return self._start_status(data, request, length, done)
        if length > MAX_ERROR_CHUNK:
            raise NbdProtocolError(SERVER, f"sent a chunk of type {kind:#x} with {length} bytes, which is too much")
        if len(data) < CHUNK.size + length:
            return 0, None
        self._count(request)
        body = bytes(data[CHUNK.size : CHUNK.size + length])
        if kind == Chunk.NONE:
            if length or not done:
                raise NbdProtocolError(SERVER, "sent an empty chunk that is not empty or not the last")
        elif kind == Chunk.OFFSET_HOLE and is_read:
            self._fill_hole(request, body)
        elif kind & CHUNK_ERROR:
            self._note_error(request, kind, body)
        else:
            raise NbdProtocolError(SERVER, f"sent a chunk of type {kind:#x}, which does not belong into this answer")
        return CHUNK.size + length, self._end_chunk(request, done)

    def _take_payload(
        self, data: memoryview, used: int, request: Request, relative: int, size: int, done: bool
    ) -> tuple[int, Request | None]:
        """Lead `size` bytes behind the first `used` of `data` to the reader: what is here now, the rest as it comes."""
        here = min(size, len(data) - used)
        destination = request.destination
        if destination is not None:
            destination[relative : relative + here] = data[used : used + here]
        if here == size:
            return used + here, self._end_chunk(request, done)
        self._payload_of = request
        self._finish = lambda: self._end_chunk(request, done)
        if destination is not None:
            self._payload = destination[relative + here : relative + size]
        else:
            self._unwanted = size - here
        return used + here, None

    def _start_status(self, data: memoryview, request: Request, length: int, done: bool) -> tuple[int, Request | None]:
        """Collect the body of a BLOCK_STATUS chunk, which may be longer than staging."""
        if length < U32.size + STATUS.size or (length - U32.size) % STATUS.size or length > MAX_STATUS_CHUNK:
            raise NbdProtocolError(SERVER, f"described blocks in {length} bytes, which cannot be")
        self._count(request)
        body = bytearray(length)
        here = min(length, len(data) - CHUNK.size)
        body[:here] = data[CHUNK.size : CHUNK.size + here]

        def finish() -> Request | None:
            self._note_status(request, body)
            return self._end_chunk(request, done)

        if here == length:
            return CHUNK.size + here, finish()
        self._payload_of = request
        self._finish = finish
        self._payload = memoryview(body)[here:]
        return CHUNK.size + here, None

    def _end_payload(self) -> Request | None:
        finish, self._finish, self._payload_of = self._finish, None, None
        assert finish is not None
        return finish()

    def _of(self, cookie: int) -> Request:
        request = self._pending.get(cookie)
        if request is None:
            raise NbdProtocolError(SERVER, "answered a request that was not made")
        return request

    def _count(self, request: Request) -> None:
        request.chunks += 1
        if request.chunks > _CHUNKS_PER_ANSWER + request.length // _BYTES_PER_CHUNK:
            raise NbdProtocolError(SERVER, "does not stop to answer one request")

    def _cover(self, request: Request, pos: int, size: int) -> int:
        """Note that `[pos, pos + size)` is answered; return its place in the request. Bounds and overlaps are refused."""
        start = pos - request.pos
        end = start + size
        if start < 0 or end > request.length:
            raise NbdProtocolError(SERVER, "sent data outside of what was asked for")
        starts, ends = request.starts, request.ends
        at = bisect_left(starts, start)
        if (at > 0 and ends[at - 1] > start) or (at < len(starts) and starts[at] < end):
            raise NbdProtocolError(SERVER, "sent the same bytes twice")
        request.covered += size
        if at > 0 and ends[at - 1] == start:
            ends[at - 1] = end
        else:
            starts.insert(at, start)
            ends.insert(at, end)
        return start

    def _fill_hole(self, request: Request, body: bytes) -> None:
        if len(body) != HOLE.size:
            raise NbdProtocolError(SERVER, "sent a hole of the wrong length")
        pos, size = HOLE.unpack(body)
        if not size:
            raise NbdProtocolError(SERVER, "sent an empty hole")
        start = self._cover(request, pos, size)
        if request.destination is not None:
            request.destination[start : start + size] = bytes(size)

    def _note_error(self, request: Request, kind: int, body: bytes) -> None:
        error, text_length = ERROR.unpack_from(body) if len(body) >= ERROR.size else (0, 0)
        text, rest = body[ERROR.size : ERROR.size + text_length], body[ERROR.size + text_length :]
        if not error or len(text) != text_length or text_length > MAX_STRING:
            raise NbdProtocolError(SERVER, "sent a malformed error")
        if kind == Chunk.ERROR_OFFSET and not (
            len(rest) == U64.size and 0 <= int.from_bytes(rest) - request.pos < request.length
        ):
            raise NbdProtocolError(SERVER, "reported an error outside of what was asked for")
        if request.error is None:
            request.error = _failure(error, text.decode(errors="replace"))

    def _note_status(self, request: Request, body: bytearray) -> None:
        if request.extents:
            raise NbdProtocolError(SERVER, "described the same blocks twice")
        if self._context is None or int.from_bytes(body[: U32.size]) != self._context:
            raise NbdProtocolError(SERVER, "described blocks in a context that was not agreed")
        left = request.length
        for length, flags in STATUS.iter_unpack(memoryview(body)[U32.size :]):
            if not length or not left:
                raise NbdProtocolError(SERVER, "described no blocks, or blocks that were not asked for")
            length = min(length, left)
            left -= length
            # HOLE alone promises nothing: such a range may still read as anything.
            request.extents.append((length, bool(flags & Status.ZERO)))

    def _end_chunk(self, request: Request, done: bool) -> Request | None:
        if not done:
            return None
        if request.error is None:
            if request.cookie in self._reads:
                if request.covered != request.length:
                    raise NbdProtocolError(SERVER, "ended the answer to a read before it was complete")
            elif not request.extents:
                raise NbdProtocolError(SERVER, "answered a query of block status without an answer")
        return self._done(request)

    def _done(self, request: Request) -> Request:
        del self._pending[request.cookie]
        self._reads.discard(request.cookie)
        request.done = True
        return request


def _failure(number: int, text: str) -> NbdRequestFailed:
    name = Errno(number).name if number in set(Errno) else f"error {number}"
    return NbdRequestFailed(SERVER, f"{name}: {text}" if text else f"answered {name}", number)
