"""The source on a web server: reads by ranges, every one of them checked to be of the content that was opened.

One request is one worker thread's for as long as it takes (`http_client.py`), and at most `connections` are made at once.
That is what fills a long link: without pipelining each connection carries one part in a round trip and its own time, so
1 Gbit/s over 80 ms needs a dozen parts of 1 MiB on their way. What is judged of an answer stands in `http_answer.py`.

**Identity.** The ETag, without one the time of change, and the size. A server that tells neither is believed by the size.

**Retries.** None, but for a kept connection that the server has closed meanwhile. All other patience is `resilient.py`'s;
how long a server wants to be left alone goes there with the error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio
from urllib3.response import BaseHTTPResponse

from qedfs.backing.base import Extent, Source
from qedfs.backing.http_answer import Answer, Content, opened, part
from qedfs.backing.http_client import HttpClient, Transfer
from qedfs.backing.http_name import HttpLocation
from qedfs.errors import BackingUnavailable, first_of

CONNECTIONS = 32
"""Requests at once where nobody says another number: of 1 MiB each they fill 1 Gbit/s at 250 ms; of 64 KiB, at 16 ms."""
PIECE = 4 << 20
"""Bytes of one request; longer reads are several at once. The disk asks for a quarter of that at most."""
OPEN_TIMEOUT = 10.0
"""Seconds for finding out what is there, redirects and handshakes included."""
_CHUNK = 256 << 10
"""Bytes taken from a connection at a time. Smaller ones cost more calls, larger ones memory that is new each time."""
T = TypeVar("T")


async def open_http(
    location: HttpLocation,
    *,
    credentials: bool,
    admit: Callable[[HttpLocation], None],
    connections: int | None = None,
) -> HttpSource:
    """Open the file at `location`, over at most `connections` connections.

    With `credentials` the server is told who the mounter is. `admit` raises if a redirect's target is not to be asked.

    Raises:
        BackingUnavailable: the server does not answer now.
        BackingRefused: there is no such file, or the server sends no parts of it, and why.
    """
    count = connections or CONNECTIONS
    name = str(location)
    transfer = Transfer()
    # Not trio's common one: a hundred backings on a server that hangs would take all its places, and statfs, directory
    # scans and openings of leaves wait for those.
    limiter = trio.CapacityLimiter(count)

    def look() -> tuple[HttpClient, Content]:
        client = HttpClient(location, credentials=credentials, admit=admit, connections=count)
        try:
            with client.asked(transfer, {"Range": "bytes=0-0"}) as response:
                content = opened(name, _answer(response))
                response.read(1)
            transfer.check()
            return client, content
        except BaseException:
            client.close()
            raise

    try:
        with trio.fail_after(OPEN_TIMEOUT):
            client, content = await _called_off(transfer, look, limiter)
    except trio.TooSlowError:
        raise BackingUnavailable(name, f"no answer within {OPEN_TIMEOUT:.0f} seconds") from None
    return HttpSource(location, client, content, limiter)


class HttpSource(Source):
    """See the module; made by `open_http`."""

    live = True
    may_straggle = True

    def __init__(
        self, location: HttpLocation, client: HttpClient, content: Content, limiter: trio.CapacityLimiter
    ) -> None:
        self.name = str(location)
        self.identity = content.identity
        self.size = content.identity.size
        self._conditions = content.conditions
        self._client: HttpClient | None = client
        self._limiter = limiter
        self._under_way: set[trio.CancelScope] = set()

    async def read_into(self, pos: int, buffer: memoryview) -> None:
        client = self._open_client()
        if len(buffer) <= PIECE:
            await self._read_piece(client, pos, buffer)
            return
        try:
            async with trio.open_nursery() as nursery:
                for start in range(0, len(buffer), PIECE):
                    nursery.start_soon(self._read_piece, client, pos + start, buffer[start : start + PIECE])
        except BaseExceptionGroup as group:
            raise first_of(group) from None

    async def extents(self, pos: int, length: int) -> list[Extent]:
        self._open_client()
        await trio.lowlevel.checkpoint()
        return [Extent(length, False)] if length else []

    async def aclose(self) -> None:
        client, self._client = self._client, None
        for scope in self._under_way:
            scope.cancel()
        if client is not None:
            client.close()
        await trio.lowlevel.checkpoint()

    async def _read_piece(self, client: HttpClient, pos: int, buffer: memoryview) -> None:
        if not buffer:
            await trio.lowlevel.checkpoint()
            return
        transfer = Transfer()
        with trio.CancelScope() as scope:
            self._under_way.add(scope)
            try:
                await _called_off(transfer, lambda: self._get(client, transfer, pos, buffer), self._limiter)
                return
            finally:
                self._under_way.discard(scope)
        raise BackingUnavailable(self.name, "is closed")

    def _get(self, client: HttpClient, transfer: Transfer, pos: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `pos`. Blocks."""
        end = pos + len(buffer)
        while buffer:
            headers = {"Range": f"bytes={pos}-{end - 1}", **self._conditions}
            with client.asked(transfer, headers) as response:
                stop = part(self.name, _answer(response), pos, end, self.identity)
                _receive(response, transfer, buffer[: stop - pos], self.name)
            pos, buffer = stop, buffer[stop - pos :]

    def _open_client(self) -> HttpClient:
        if self._client is None:
            raise BackingUnavailable(self.name, "is closed")
        return self._client


def _answer(response: BaseHTTPResponse) -> Answer:
    return Answer(response.status, response.headers)


def _receive(response: BaseHTTPResponse, transfer: Transfer, buffer: memoryview, name: str) -> None:
    """Take the whole body, which must be as long as `buffer`."""
    while buffer:
        data = response.read(min(len(buffer), _CHUNK))
        if not data:
            raise BackingUnavailable(name, "the server sent less than it promised")
        transfer.put(buffer, data)
        buffer = buffer[len(data) :]
    if response.read(1):
        raise BackingUnavailable(name, "the server sent more than it promised")


async def _called_off(transfer: Transfer, work: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
    """Return `work()`, done in a thread that is given up when the caller is cancelled."""
    try:
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)
    except trio.Cancelled:
        transfer.give_up()
        raise
