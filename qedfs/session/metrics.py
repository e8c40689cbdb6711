"""The mount option `metrics`: a small HTTP server that answers GET /metrics, and nothing else.

Rules it lives by: a scrape reads numbers that are there and never waits for an image, a backing or a guest; they are gathered
once a second at most, an image at a time, however many ask; connections are few and short, so that whoever connects and
says nothing costs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from qedfs import __version__
from qedfs.config import Address
from qedfs.nbd.listeners import open_tcp_listeners
from qedfs.report.metrics import CONTENT_TYPE, ImageMetrics, metrics_text
from qedfs.session.roster import Roster
from qedfs.tree.tree import Usage

log = logging.getLogger(__name__)

FRESH = 1.0
"""Seconds for which an answer is given again."""
CONNECTIONS = 16
"""At once; further ones are closed."""
PATIENCE = 5.0
"""Seconds that a connection may last."""
LONGEST_REQUEST = 8192
"""Bytes of its head."""


class Metrics:
    """Made by `open_metrics`; without listeners there is nothing to serve."""

    def __init__(self, listeners: list[trio.SocketListener]) -> None:
        self._listeners = listeners
        self._connections = 0
        self._text = b""
        self._text_time = -FRESH
        self._gathering = trio.Lock()

    async def serve(self, roster: Roster) -> None:
        """Answer about what `roster` serves, until cancelled."""

        async def answer(stream: trio.SocketStream) -> None:
            await self._answer(stream, roster)

        if self._listeners:
            await trio.serve_listeners(answer, self._listeners)

    async def _answer(self, stream: trio.SocketStream, roster: Roster) -> None:
        if self._connections >= CONNECTIONS:
            await trio.aclose_forcefully(stream)
            return
        self._connections += 1
        try:
            with trio.move_on_after(PATIENCE):
                head = await _request_head(stream)
                if head:
                    await stream.send_all(await self._response(head, roster))
                    await stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # whoever asked has gone
        except Exception:
            # A defect here must not end the mount.
            log.exception("a scrape of metrics was not answered")
        finally:
            self._connections -= 1
            await trio.aclose_forcefully(stream)

    async def _response(self, head: bytes, roster: Roster) -> bytes:
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _encoded("400 Bad Request", b"not HTTP/1\n")
        method, target = words[0], words[1].partition(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            return _encoded("405 Method Not Allowed", b"only GET\n", "Allow: GET, HEAD\r\n")
        if target != b"/metrics":
            return _encoded("404 Not Found", b"only /metrics\n", head_only=method == b"HEAD")
        return _encoded("200 OK", await self._gathered(roster), kind=CONTENT_TYPE, head_only=method == b"HEAD")

    async def _gathered(self, roster: Roster) -> bytes:
        async with self._gathering:
            if trio.current_time() - self._text_time >= FRESH:
                images = []
                for usage in roster.tree.usage():
                    images.append(_metrics_of(usage))
                    await trio.lowlevel.checkpoint()
                parts = []
                for part in metrics_text(__version__, images, len(roster.refused)):
                    parts.append(part)
                    await trio.lowlevel.checkpoint()
                self._text = "".join(parts).encode()
                self._text_time = trio.current_time()
            return self._text


@asynccontextmanager
async def open_metrics(address: Address | None) -> AsyncIterator[Metrics]:
    """Listen at `address` while inside, or nowhere.

    Raises:
        UsageError: it cannot be listened on.
    """
    if address is None:
        yield Metrics([])
        return
    listeners = await open_tcp_listeners(*address)
    try:
        for listener in listeners:
            host, port = listener.socket.getsockname()[:2]
            log.info("metrics at http://%s:%d/metrics", f"[{host}]" if ":" in host else host, port)
        yield Metrics(listeners)
    finally:
        for listener in listeners:
            listener.socket.close()


def _metrics_of(usage: Usage) -> ImageMetrics:
    leaf = usage.leaf
    statistics = leaf.disk.statistics()
    return ImageMetrics(
        name=leaf.name,
        size=leaf.disk.size,
        missing=leaf.disk.remaining(),
        allocated=leaf.disk.allocated_bytes_nowait(),
        mode=statistics.mode.value,
        state=leaf.stream.state(statistics.state),
        backing_state="damaged" if leaf.stream.damaged else statistics.backing_state,
        handles=usage.handles,
        backing_bytes=statistics.backing_bytes_read,
        asked_twice=statistics.backing_asked_twice,
        copied=statistics.copied_bytes,
        misses=statistics.misses,
        missed_seconds=statistics.missed_seconds,
        waiting=statistics.waiting,
        errors=statistics.errors,
        rate=leaf.stream.rate,
        eta=leaf.stream.eta,
    )


async def _request_head(stream: trio.SocketStream) -> bytes:
    """Return the head of the request; empty if it does not come to its end."""
    head = b""
    while b"\r\n\r\n" not in head:
        piece = await stream.receive_some(LONGEST_REQUEST)
        head += piece
        if not piece or len(head) > LONGEST_REQUEST:
            return b""
    return head


def _encoded(status: str, body: bytes, more: str = "", *, kind: str = "text/plain", head_only: bool = False) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}Connection: close\r\n\r\n"
    )
    return head.encode("ascii") + (b"" if head_only else body)
