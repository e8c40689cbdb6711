"""Who of many streams may ask a backing next: in order of arrival, as much as the backing's window admits."""

from __future__ import annotations

from collections import deque

import trio

from qedfs.backing.window import Token, Window


class Flow:
    """The background reads of all disks on one backing; their pieces take turns."""

    def __init__(self, most: int) -> None:
        """`most` is the largest window in bytes."""
        self._window = Window(most)
        self._waiting: deque[tuple[int, trio.Event]] = deque()
        self._granted: dict[trio.Event, Token] = {}

    @property
    def piece(self) -> int:
        """Bytes to ask for in one request; less is welcome."""
        return self._window.piece

    async def admit(self, length: int) -> Token:
        """Return when `length` bytes may be asked for; they count as on their way from then on, until `ended`."""
        if not self._waiting and self._window.admits(length):
            return self._window.sent(trio.current_time(), length)
        entry = (length, trio.Event())
        self._waiting.append(entry)
        try:
            await entry[1].wait()
        except BaseException:
            if entry[1] in self._granted:
                self.ended(self._granted.pop(entry[1]), answered=False)
            else:
                self._waiting.remove(entry)
            raise
        return self._granted.pop(entry[1])

    def ended(self, token: Token, *, answered: bool) -> None:
        """Note that the request behind `token` has ended, with all its bytes or without."""
        now = trio.current_time()
        if answered:
            self._window.done(token, now)
        else:
            self._window.failed(token, now)
        while self._waiting and self._window.admits(self._waiting[0][0]):
            length, event = self._waiting.popleft()
            self._granted[event] = self._window.sent(now, length)
            event.set()
