"""The source on an NBD server: splits reads by the server's block sizes, spreads them over connections, dials again.

**Connections.** A server that allows it (CAN_MULTI_CONN) gets up to `connections` of them, any other exactly one. The
first is dialled at opening; another one only when all have `_BUSY` requests in flight. Most sources never come so far: one
pipelined connection fills most links, and looking at an image should not cost four handshakes. The reader that finds
every connection busy does the dialling; it would have waited in a queue anyway. A server that does not take the connection
it promised is left alone for a while.

**Loss.** A read whose connection is lost under it dials once more in the same place and is repeated there, in full. Only
if that fails too does the caller see it. After dialling the size must be what it was, else the export is another one and
the source refuses for good.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import trio

from qedfs.backing.base import Extent, Identity, Source, merged
from qedfs.errors import BackingChanged, BackingError, BackingRefused, BackingUnavailable
from qedfs.nbd.address import NbdAddress
from qedfs.nbd.connection import Connection, connect
from qedfs.nbd.constants import MAX_MINIMUM_BLOCK, Errno, Reply
from qedfs.nbd.errors import (
    NbdDisconnected,
    NbdError,
    NbdOptionRefused,
    NbdProtocolError,
    NbdRequestFailed,
    NbdTlsFailed,
)
from qedfs.nbd.negotiation import BlockSizes

DIAL_TIMEOUT = 10.0
"""Seconds for name lookup, connecting and negotiating. A lookup that has to try a second name server takes five."""
_EXTRA_DIAL_TIMEOUT = 2.0
"""Seconds for a connection we can do without: a server at its limit often leaves us in its queue, unanswered."""
_EXTRA_DIAL_PAUSE = 60.0
"""Seconds until a server that did not take another connection is asked for one again."""
_BUSY = 8
"""Requests in flight on each connection from which on another one is worth its handshake."""
_MAX_PIECE = 1024 * 1024
"""Bytes of one READ. A server reads a piece in full before it sends the first byte, and other readers' answers wait
behind it; a piece this long already hides the cost of a request. The kernel's FUSE requests are no longer either."""
CONNECTIONS = 4
"""Where nobody says another number: four fill a long link without tuned TCP buffers."""
_MAX_STATUS = (1 << 32) - MAX_MINIMUM_BLOCK
"""Bytes of one BLOCK_STATUS: what fits into 32 bits and is a multiple of every minimum block."""
_MAX_STATUS_ROUNDS = 1024
"""Queries for one call of `extents`; a server that tells less in so many gets the rest counted as data."""

_MAY_PASS = {Errno.EIO, Errno.ENOMEM, Errno.ESHUTDOWN}
T = TypeVar("T")


async def open_nbd(
    address: NbdAddress, *, connections: int | None = None, credentials: bool = True, private: bool = False
) -> NbdSource:
    """Open the export at `address`, over at most `connections` connections (by default `CONNECTIONS`).

    With `credentials` a TLS server may be shown the client certificate of the mounter. A `private` server is one of ours
    for us alone: it is connected to once and asked for whole answers, holes included, as it costs nothing on this machine.

    Raises:
        BackingUnavailable: nobody answers, or not in time.
        BackingRefused: there is no such export, the server says nonsense, or TLS does not come about.
    """
    first = await _dial(address, DIAL_TIMEOUT, credentials)
    if private:
        first.want_whole_answers()
        return NbdSource(address, first, 1, credentials)
    return NbdSource(address, first, (connections or CONNECTIONS) if first.can_multi_conn else 1, credentials)


@dataclass(eq=False)
class _Line:
    """A place for one connection, which comes and goes."""

    connection: Connection | None = None
    dialling: trio.Lock = field(default_factory=trio.Lock)
    rests_until: float = 0.0
    failures: int = 0
    last_failure: str = ""
    reading: list[tuple[int, int]] = field(default_factory=list)
    """Position and length of the reads under way."""

    @property
    def live(self) -> bool:
        return self.connection is not None and not self.connection.lost

    @property
    def load(self) -> int:
        return self.connection.load if self.connection is not None else 0


class NbdSource(Source):
    """See the module; made by `open_nbd`."""

    live = True

    def __init__(self, address: NbdAddress, first: Connection, connections: int, credentials: bool = True) -> None:
        self.name = str(address)
        self.size = first.agreement.size
        self.identity = Identity(self.size)
        self._address = address
        self._credentials = credentials
        self._lines = [_Line(first)] + [_Line() for _ in range(connections - 1)]
        self.may_straggle = connections > 1
        self._changed: str | None = None
        self._closed = False
        self._epoch = 0
        """Counts connections after lost ones: behind them may be another content of this size."""

    @property
    def epoch(self) -> object:
        return self._epoch

    @property
    def connections(self) -> int:
        """How many are alive now."""
        return sum(line.live for line in self._lines)

    async def read_into(self, pos: int, buffer: memoryview) -> None:
        async def read(connection: Connection) -> None:
            pieces = cut(pos, buffer, self.size, connection.agreement.blocks)
            await connection.read([(piece.pos, piece.place) for piece in pieces])
            for piece in pieces:
                if piece.bounced is not None:
                    piece.bounced[:] = piece.place[piece.skip : piece.skip + len(piece.bounced)]

        if not buffer:
            await trio.lowlevel.checkpoint()
            return
        place = pos, len(buffer)
        line = await self._choose(place)
        line.reading.append(place)
        try:
            await self._perform(read, line)
        finally:
            line.reading.remove(place)

    async def extents(self, pos: int, length: int) -> list[Extent]:
        result: list[Extent] = []
        end = pos + length
        for _ in range(_MAX_STATUS_ROUNDS):
            if pos >= end:
                break
            line = await self._choose()
            said = await self._perform(lambda connection, at=pos: self._status(connection, at, end), line)  # type: ignore[misc]
            result += said
            pos += sum(extent.length for extent in said)
        return merged([*result, Extent(end - pos, False)])

    async def aclose(self) -> None:
        self._closed = True
        async with trio.open_nursery() as nursery:
            for line in self._lines:
                if line.connection is not None:
                    nursery.start_soon(line.connection.leave)

    async def _status(self, connection: Connection, pos: int, end: int) -> list[Extent]:
        """Ask once; return at least something of `[pos, end)`, from its start on."""
        if connection.agreement.allocation_context is None:
            return [Extent(end - pos, False)]
        block = connection.agreement.blocks.minimum
        start = pos // block * block
        stop = min(-(-end // block) * block, start + _MAX_STATUS, self.size)
        told = await connection.block_status(start, stop - start)
        said: list[Extent] = []
        for length, zero in told:
            first, last = max(start, pos), min(start + length, end)
            said.append(Extent(max(0, last - first), zero))
            start += length
        if start <= pos:
            # The server told less than its own block size: nothing is known of the byte asked for.
            return [Extent(min(block, end - pos), False)]
        return said

    async def _perform(self, work: Callable[[Connection], Awaitable[T]], line: _Line) -> T:
        """Do `work` over the connection of `line`, and once more over a new one if that is lost; translate errors."""
        for last_try in (False, True):
            try:
                return await work(await self._connected(line, DIAL_TIMEOUT))
            except NbdDisconnected as error:
                if last_try or self._closed:
                    raise BackingUnavailable(self.name, error.why) from error
            except NbdError as error:
                raise _translated(self.name, error) from error
        raise AssertionError("unreachable")

    async def _choose(self, place: tuple[int, int] | None = None) -> _Line:
        """Return the line to use: the least loaded, or one more where all are busy and there may be one more.

        For the second read of one place, which is a second try, a line that still owes the first is as good as busy.
        """
        live = [line for line in self._lines if line.live]
        if not live:
            return self._lines[0]
        best = min(live, key=lambda line: (place in line.reading, line.load))
        if (best.load < _BUSY and place not in best.reading) or len(live) == len(self._lines):
            return best
        now = trio.current_time()
        for line in self._lines:
            if not line.live and not line.dialling.locked() and line.rests_until <= now:
                try:
                    await self._connected(line, _EXTRA_DIAL_TIMEOUT)
                except BackingError:
                    line.rests_until = trio.current_time() + _EXTRA_DIAL_PAUSE
                    return best
                return line
        return best

    async def _connected(self, line: _Line, patience: float) -> Connection:
        """Return the line's connection, dialled anew if it has none that lives; one dials, the others wait for it."""
        if line.connection is not None and not line.connection.lost:
            self._check()
            return line.connection
        failures = line.failures
        async with line.dialling:
            self._check()
            if line.connection is not None and not line.connection.lost:
                return line.connection
            if line.failures != failures:
                # Who waited for a dial that failed shares its failure; else many readers would wait for as many dials.
                raise BackingUnavailable(self.name, line.last_failure)
            try:
                connection = await _dial(self._address, patience, self._credentials)
            except BackingUnavailable as error:
                line.failures += 1
                line.last_failure = error.why
                raise
            if self._closed:
                connection.close()
                self._check()
            if connection.agreement.size != self.size:
                connection.close()
                self._changed = f"has now {connection.agreement.size} bytes, had {self.size}"
                self._check()
            for other in self._lines:
                if other.connection is not None:
                    other.connection.look()
            if line.connection is not None or not self.connections:
                self._epoch += 1
            line.connection = connection
            return connection

    def _check(self) -> None:
        if self._closed:
            raise BackingUnavailable(self.name, "is closed")
        if self._changed is not None:
            raise BackingChanged(self.name, self._changed)


class Piece(NamedTuple):
    """One READ: `len(place)` bytes at `pos`. A bounced one is wider than wanted: `bounced` gets the part behind `skip`."""

    pos: int
    place: memoryview
    bounced: memoryview | None = None
    skip: int = 0


def cut(pos: int, buffer: memoryview, size: int, blocks: BlockSizes) -> list[Piece]:
    """Cut the read of `buffer` at `pos` into READs that obey `blocks`, in ascending order.

    Ends that are not aligned go through a buffer of one block. An export that ends in the middle of a block breaks the
    server's own rule; that block is asked for up to the end, as its bytes cannot be had otherwise.
    """
    block = blocks.minimum
    largest = max(block, min(_MAX_PIECE, blocks.maximum) // block * block)
    pieces: list[Piece] = []
    at, end = pos, pos + len(buffer)
    while at < end:
        start = at // block * block
        if start < at or (end - at < block and end < size):
            place = memoryview(bytearray(min(start + block, size) - start))
            stop = min(end, start + len(place))
            pieces.append(Piece(start, place, buffer[at - pos : stop - pos], at - start))
        else:
            stop = min(at + largest, end if end == size else end // block * block)
            pieces.append(Piece(at, buffer[at - pos : stop - pos]))
        at = stop
    return pieces


async def _dial(address: NbdAddress, patience: float, credentials: bool) -> Connection:
    name = str(address)
    try:
        with trio.fail_after(patience):
            return await connect(address, credentials=credentials)
    except trio.TooSlowError:
        raise BackingUnavailable(name, f"no answer within {patience:.0f} seconds") from None
    except UnicodeError:
        raise BackingRefused(name, "is no possible host name") from None
    except PermissionError as error:
        raise BackingRefused(name, f"cannot connect ({error.strerror})") from error
    except OSError as error:
        # A name that does not resolve (gaierror) may be a network that is not up yet.
        raise BackingUnavailable(name, f"cannot connect ({_reason(error)})") from error
    except NbdError as error:
        raise _translated(name, error) from error


def _reason(error: OSError) -> str:
    """Return the text of `error` itself, or of its cause: trio reports several failed addresses as one such error."""
    cause = error.__cause__
    if isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if error.strerror is None and isinstance(cause, OSError):
        error = cause
    return error.strerror or str(error)


def _translated(name: str, error: NbdError) -> BackingRefused | BackingUnavailable:
    """Return what `error` means to the layers above."""
    may_pass = (
        isinstance(error, NbdDisconnected)
        or (isinstance(error, NbdTlsFailed) and error.may_pass)
        or (isinstance(error, NbdOptionRefused) and error.code == Reply.ERR_SHUTDOWN)
        or (isinstance(error, NbdRequestFailed) and error.number in _MAY_PASS)
    )
    why = (
        f"the server {error.why}"
        if isinstance(error, NbdProtocolError | NbdOptionRefused | NbdTlsFailed)
        else error.why
    )
    return BackingUnavailable(name, why) if may_pass else BackingRefused(name, why)
