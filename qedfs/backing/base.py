"""The contract of a byte source: what every transport and format of a backing offers to the layers above.

A source is strict and simple: it reads inside its size or raises, it never retries, and it may be used by any number of
tasks at once. Retrying, reconnecting, counting and the zeros past the end belong to `resilient.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import trio


@dataclass(frozen=True)
class Identity:
    """What tells one content of a source from another, as far as the source says it.

    `size` is in bytes. `tag` is an ETag, a modification time or another token, prefixed by its kind (`etag:…`,
    `mtime:…`); it is empty where a source tells only its size (NBD, block devices). At most 96 ASCII characters, so that
    it can be recorded as it is: a longer one is to be hashed by the source.
    """

    size: int
    tag: str = ""


class Extent(NamedTuple):
    """`length` bytes that the source promises to read as zeros (`zero`), or about which it promises nothing."""

    length: int
    zero: bool


class Source(ABC):
    """Bytes that can be read at any position, by many tasks at once."""

    name: str
    """For messages: where the bytes are, with credentials and query strings masked."""

    size: int
    """Bytes; fixed for the life of the source."""

    identity: Identity
    """Of the content at the time of opening."""

    format: str = "raw"
    """What the bytes were read as."""

    live: bool = False
    """Whether every read asks for the bytes as they are now; not if a part of the answer is remembered (tables)."""

    may_straggle: bool = False
    """Whether a second request for the same bytes may be answered before a first one that is late."""

    trouble: tuple[float, str] = (0.0, "")
    """The newest error that a read did not end with, as others had the bytes too, and its time (seconds since the epoch)."""

    @property
    def tells_content(self) -> bool:
        """Whether another content would show in `identity`, as far as such a tag can be trusted; not if only sizes tell."""
        return bool(self.identity.tag)

    @property
    def epoch(self) -> object:
        """Another one when earlier answers of `extents` may not hold any more, for a source that connects anew by itself."""
        return 0

    @abstractmethod
    async def read_into(self, pos: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `pos`, all of it or raise.

        `buffer` is a writable, contiguous view of bytes; `0 <= pos` and `pos + len(buffer) <= size`.
        On an error or a cancellation its content is undefined.

        Raises:
            BackingUnavailable: may pass (connection lost, server busy).
            BackingRefused: final (gone, changed, nonsense).
            CorruptEntry: final for these bytes only (a QED image with a broken table entry).
        """

    def read_nowait(self, pos: int, buffer: memoryview) -> bool:
        """Fill `buffer` if that needs no waiting; False otherwise, and then its content is undefined.

        Range and errors as for `read_into`. A source that cannot tell says False.
        """
        return False

    @abstractmethod
    async def extents(self, pos: int, length: int) -> list[Extent]:
        """Tell which parts of `[pos, pos + length)` are promised to read as zeros.

        The lengths add up to `length`; neighbours differ in `zero`. Without knowledge the answer is one extent of data.
        The range lies within the size. Raises as `read_into`.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Let go of connections and descriptors. Reads under way fail with `BackingUnavailable`."""


CLOSE_PATIENCE = 5.0
"""Seconds that a polite end of a connection may take."""


async def close(source: Source) -> None:
    """Close `source` within a few seconds, also when the caller is being cancelled: nothing may leak then."""
    with trio.move_on_after(CLOSE_PATIENCE, shield=True):
        await source.aclose()


def merged(extents: list[Extent]) -> list[Extent]:
    """Join neighbours that say the same and drop empty ones."""
    result: list[Extent] = []
    for length, zero in extents:
        if not length:
            continue
        if result and result[-1].zero == zero:
            length += result.pop().length
        result.append(Extent(length, zero))
    return result
