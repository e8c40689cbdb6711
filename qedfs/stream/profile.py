"""Boot profiles: which parts of a disk its guest waits for as it starts, in their order. Sans-IO.

A profile is text, so that people can read, edit and ship it: a first line that says what it is, then a line for each part,
`POSITION LENGTH` in bytes; empty lines and lines that begin with `#` say nothing. It knows neither clusters nor the backing
it was recorded on, so it is of use for any leaf with that content. Whoever reads one believes nothing but that these
parts may be worth having early: what lies outside the disk is left out, and what it may cause to be copied is bounded.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from qedfs.errors import UsageError

MOST_BYTES = 1 << 30
"""Bytes that one profile brings in at most: several times what a desktop reads until its login."""
MOST_PARTS = 16384
MOST_TEXT = 1 << 20
"""Bytes of the text: enough for so many parts and some words."""
MOST_PART = 1 << 20
"""Bytes above which a part is not continued but followed by the next one, so that two files read at a time stay side by
side: the largest fetch."""
MOST_GAP = 4 << 20
"""Bytes that a reader may have skipped and is still the same one: what the readahead brings (its default), it does not wait
for. Never more than it has read so far, as readahead widens like that."""
READERS = 8
"""Sequential readers remembered at once, as for readahead."""

TITLE = b"qedfs boot profile 1"
_PART = re.compile(rb"(\d{1,19}) (\d{1,19})")


class Part(NamedTuple):
    """`length` bytes at `pos` of the disk."""

    pos: int
    length: int


@dataclass
class _Reader:
    """A sequential reader: it has read `length` clusters up to `end`; its newest part is the one with number `part`."""

    end: int
    length: int
    part: int


class Recorder:
    """Makes a profile of the misses of one disk."""

    def __init__(self, cluster_size: int) -> None:
        self._cluster_size = cluster_size
        self._gap = MOST_GAP // cluster_size
        self._most = max(1, MOST_PART // cluster_size)
        # INVARIANT: the clusters of `_parts`, none of which is in two of them.
        self._seen: set[int] = set()
        self._parts: list[tuple[int, int]] = []
        self._readers: deque[_Reader] = deque(maxlen=READERS)

    @property
    def length(self) -> int:
        """Bytes recorded."""
        return len(self._seen) * self._cluster_size

    @property
    def full(self) -> bool:
        return self.length >= MOST_BYTES or len(self._parts) >= MOST_PARTS

    def missed(self, pos: int, length: int) -> None:
        """Note that the guest had to wait for these bytes. They count as whole clusters: the rest of one comes with it."""
        first, end = pos // self._cluster_size, -(-(pos + length) // self._cluster_size)
        while first < end and first in self._seen:
            first += 1
        if first >= end or self.full:
            return
        reader = self._reader_at(first)
        if reader is None:
            reader = _Reader(first, 0, -1)
            self._readers.append(reader)
        for start, stop in self._unseen(reader.end, end):
            self._seen.update(range(start, stop))
            reader.part = self._append(reader.part, start, stop)
        reader.length += end - reader.end
        reader.end = end

    def parts(self) -> list[Part]:
        """Return what was recorded, in its order."""
        size = self._cluster_size
        return [Part(first * size, (end - first) * size) for first, end in self._parts]

    def _reader_at(self, first: int) -> _Reader | None:
        return next((r for r in self._readers if 0 <= first - r.end <= min(self._gap, r.length)), None)

    def _unseen(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        start = first
        for cluster in range(first, end + 1):
            if cluster == end or cluster in self._seen:
                if start < cluster:
                    yield start, cluster
                start = cluster + 1

    def _append(self, number: int, first: int, end: int) -> int:
        """Continue the part with this number, or begin a new one; return its number."""
        if number >= 0:
            part_first, part_end = self._parts[number]
            if part_end == first and end - part_first <= self._most:
                self._parts[number] = (part_first, end)
                return number
        self._parts.append((first, end))
        return len(self._parts) - 1


def serialise(parts: Iterable[Part], comment: str) -> bytes:
    """Return the text of a profile; `comment` is one line without control characters that says what it is of."""
    lines = [TITLE, b"# " + comment.encode(), b"# Position and length of each part in bytes, in the order of need."]
    return b"\n".join([*lines, *(b"%d %d" % part for part in parts), b""])


def parse(text: bytes, name: str) -> list[Part]:
    """Return the parts that the text of a profile lists; `name` is what the message calls it.

    Raises:
        UsageError: it is no profile, or too long.
    """
    if len(text) > MOST_TEXT:
        raise UsageError(name, f"is no boot profile: longer than {MOST_TEXT} bytes")
    lines = text.replace(b"\r\n", b"\n").split(b"\n")
    if lines[0] != TITLE:
        raise UsageError(name, f"is no boot profile: the first line must be '{TITLE.decode()}'")
    parts = []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip() or line.startswith(b"#"):
            continue
        match = _PART.fullmatch(line.strip())
        if match is None:
            raise UsageError(name, f"line {number} is not a position and a length in bytes")
        parts.append(Part(int(match[1]), int(match[2])))
        if len(parts) > MOST_PARTS:
            raise UsageError(name, f"lists more than {MOST_PARTS} parts")
    return parts


def clusters(parts: Iterable[Part], cluster_size: int, size: int) -> list[tuple[int, int]]:
    """Return the clusters `[first, end)` of each part, as far as it lies inside a disk of `size` bytes, in their order.

    At most `MOST_BYTES` of them, and one cluster more.
    """
    result = []
    left = MOST_BYTES
    for pos, length in parts:
        first, stop = pos // cluster_size, min(pos + length, size)
        end = min(-(-stop // cluster_size), first + -(-left // cluster_size))
        if length and pos < size:
            result.append((first, end))
            left -= (end - first) * cluster_size
        if left <= 0:
            break
    return result
