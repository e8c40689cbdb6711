"""How much room copies leave on the leaf's file system. Sans-IO: told what is free, it says whether a copy may be made.

A copy is a convenience, a guest's write is not: so copies stop while there is room left, and guest writes take the rest.
They resume only at twice the reserve, or a leaf near the limit would stop and resume with every file that comes and goes.
"""

from __future__ import annotations

from qedfs.config import Reserve
from qedfs.image.storage import Space

LEAST, LEAST_PERCENT = 1 << 30, 5.0
"""The default is the larger of both: some minutes of a busy guest."""
LOOK_AGE = 1.0
"""Seconds for which a look at the file system is believed while copies are made."""
LOOK_BYTES = 64 << 20
"""Bytes that may be copied on the ground of one look: what each of several leaves on one file system may overshoot."""
LEAST_TO_RESUME = 1 << 20
"""Bytes that must be free for copies to resume, however small the reserve."""


class Room:
    """Whether copies may go on. `now` is any clock in seconds; lengths are in bytes."""

    def __init__(self, reserve: Reserve | None) -> None:
        self._wanted = reserve
        self._known = False
        self._left = 0
        """What may still be copied on the ground of the last look."""
        self._believed_until = -float("inf")
        self.under_way = 0
        """Bytes of copies that may be made and have not ended. Nobody knows what of them a look has seen as taken."""
        self.reserve = 0
        """Bytes that stay free; 0 before the first look."""
        self.stopped = False
        """No copies until a look finds twice the reserve."""
        self.used_up = False
        """At the last look it was not the reserve that kept copies out but the limit that the file was set."""

    def take(self, length: int, now: float) -> bool:
        """Count a copy of `length` bytes, until `ended`, if it may be made by what is known.

        False: look, and `observe` what is there; and if that does not help, look again when what is `under_way` has ended.
        """
        if not self._known or now >= self._believed_until or length > self._left:
            return False
        self._left -= length
        self.under_way += length
        return True

    def ended(self, length: int) -> None:
        """A copy that `take` counted has been made, or not."""
        self.under_way -= length

    def observe(self, space: Space | None, length: int, now: float) -> None:
        """Take in what a look has found (None: nothing that could be told), before a copy of `length` bytes."""
        if not self._known:
            self._known = True
            self.reserve = _size(self._wanted, space) if space else 0
        allowed = LOOK_BYTES + length if space is None or space.allowed is None else space.allowed
        spare = min(space.free - self.reserve, allowed) if space else allowed
        self.used_up = space is not None and allowed < length and allowed <= space.free - self.reserve
        if self.stopped:
            self.stopped = space is not None and (
                space.free < max(2 * self.reserve, LEAST_TO_RESUME) or allowed < LEAST_TO_RESUME
            )
        elif spare < length:
            self.stopped = True
        self._left = 0 if self.stopped else min(spare - self.under_way, LOOK_BYTES + length)
        self._believed_until = now + LOOK_AGE

    def stop(self) -> None:
        """A copy found no room, whatever a look says (a quota, or somebody was faster)."""
        self.stopped = True
        self._left = 0


def _size(reserve: Reserve | None, space: Space) -> int:
    """Return the reserve in bytes for a file system as it was at the first look."""
    if reserve is None:
        return min(max(LEAST, int(space.total * LEAST_PERCENT / 100)), space.free // 2)
    if reserve.percent is not None:
        return int(space.total * reserve.percent / 100)
    return reserve.size or 0
