"""How far beyond a miss to fetch: sequential readers get a growing window, random ones nothing. Sans-IO."""

from __future__ import annotations

from collections import OrderedDict

STREAMS = 8
"""Sequential readers remembered at once; a guest's boot has a few."""


class Readahead:
    """Watches misses of one disk. All positions are clusters.

    A miss that begins where an earlier one ended continues its stream; each step doubles what is fetched beyond it, up to
    `most` clusters (0: never widen).
    """

    def __init__(self, most: int) -> None:
        self._most = most
        # Next expected cluster -> (end of what was asked for ahead, present width).
        self._streams: OrderedDict[int, tuple[int, int]] = OrderedDict()

    def observe(self, first: int, end: int) -> tuple[int, int]:
        """Note that `[first, end)` was missed or is on its way; return the range to fetch beyond it, perhaps empty."""
        if not self._most:
            return (end, end)
        stream = self._stream_at(first)
        if stream is None:
            ahead, width = end, 0
        else:
            ahead, width = self._streams.pop(stream)
            width = min(self._most, max(2 * width, end - first))
        start = max(end, ahead)
        stop = max(start, end + width)
        self._streams[end] = (stop, width)
        if len(self._streams) > STREAMS:
            self._streams.popitem(last=False)
        return (start, stop)

    def _stream_at(self, first: int) -> int | None:
        if first in self._streams:
            return first
        # A reader whose window has been copied meanwhile comes back somewhere inside or at the end of it.
        return next((key for key, (ahead, width) in self._streams.items() if width and key <= first <= ahead), None)
