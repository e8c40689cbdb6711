"""What the layers above see of a backing: a source that is connected when needed, retried, and told apart from another.

Rules it lives by:

- A failure that may pass never reaches the caller: the request is tried again, on the same source once more and as long
  as that answers others, else on a new one from the opener. The caller ends the waiting by cancelling.
- One connection attempt at a time, whoever asked first makes it; if that caller leaves, the next one takes over. Pauses
  between attempts grow and are shared, so that a hundred waiting reads are not a hundred knocks on the door.
- A server that wants to be left alone for a while (`retry_after`) is, by the request that was told so, and by all when the
  connection is made anew.
- A source that owes an answer for `stall` seconds and gives none at all is taken for dead, even if every caller so far
  has run out of patience earlier.
- A request that takes much longer than usual is asked a second time, if somebody waits for it (`hedge.py`, run by `watch`).
- A final error is latched until `reset`. A corrupt entry of a QED backing is final for its bytes only.
- A source whose content is not the expected one is never read.
- While the content is still changing (a disk on its way from another host) nothing is expected of it, a source that finds
  it changed makes way for a new one, and a source that remembers what it read serves one request.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeVar

import trio

from qedfs.backing.base import Extent, Identity, Source, close, merged
from qedfs.backing.hedge import Hedge, Urgent
from qedfs.backing.mirror_name import agree, joined
from qedfs.errors import BackingChanged, BackingRefused, BackingUnavailable, CorruptEntry, QedfsError

T = TypeVar("T")

FIRST_PAUSE = 0.1
"""Seconds before the second attempt; each further pause is twice as long."""
LONGEST_PAUSE = 10.0
CHANGE_PAUSE = 0.01
"""Seconds before a source is opened anew because its content, which may change, has done so under a read."""
STALL = 30.0
"""Seconds without any answer after which a source is taken for dead. Below the default time that a guest's read waits."""


class BackingState(Enum):
    """How the backing is, as far as the last request told."""

    IDLE = "idle"
    """Not yet connected, because nothing was asked of it."""
    HEALTHY = "healthy"
    UNAVAILABLE = "unavailable"
    """The last attempt failed in a way that may pass."""
    REFUSED = "refused"
    """The last attempt failed for good."""


@dataclass(frozen=True)
class BackingStatistics:
    """`bytes_read`: asked of the source, repetitions included. `last_error_time`: seconds since the epoch.

    `asked_twice`: second requests for stragglers.
    """

    bytes_read: int
    state: BackingState
    last_error: str
    last_error_time: float | None
    size: int | None
    asked_twice: int = 0


class Backing:
    """A backing of a leaf. Any number of tasks may call at once."""

    def __init__(
        self,
        opener: Callable[[], Awaitable[Source]],
        *,
        name: str,
        format: str = "",
        expected: Identity | None = None,
        host: str | None = None,
        changing: bool = False,
        stall: float = STALL,
        jitter: Callable[[], float] = random.random,
        tend: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`opener` makes a new, connected source. Nothing is opened before the first request.

        `name` is shown to people (masked). `format` may be empty until the source has told it. `expected` is what the
        content must be; without it, what the first connection finds. `host` is the machine it is on, where there is one.
        `changing`: the content may be another one at any time, until `settle`. `jitter` returns numbers in [0, 1).
        `tend` is what has to run beside the reads, for ever (of mirrors).
        """
        self.name = name
        self.host = host
        self._format = format
        self._opener = opener
        self._expected = expected
        self._changing = changing
        self._stall = stall
        self._jitter = jitter
        self._tend = tend
        self._hedge = Hedge()
        self._source: Source | None = None
        self._generation = 0
        """Counts resets: what was opened before one is not used after it."""
        self._connecting: trio.Event | None = None
        self._closed = trio.Event()
        self._woken = trio.Event()
        """Pauses end: there is another source to be asked, or none any more."""
        self._requests = 0
        """Under way, retries and pauses between them included."""
        self._unused: trio.Event | None = None
        self._refused: BackingRefused | None = None
        self._state = BackingState.IDLE
        self._failures = 0
        self._not_before = -float("inf")
        self._attempts: set[trio.CancelScope] = set()
        self._owing_since: float | None = None
        self._extended_at = -float("inf")
        self._successes = 0
        self._bytes_read = 0
        self._epoch = 0
        self._last_error = ""
        self._last_error_time: float | None = None
        self.failure: QedfsError | None = None
        """Why the last attempt to connect failed, in a way that may pass; None once something was answered."""

    @property
    def format(self) -> str:
        """What the backing is read as: `raw`, `qed`; empty while that is not known."""
        return self._format

    @property
    def epoch(self) -> object:
        """Another one with every connection and reset. What the backing promised about zeros holds for one epoch only."""
        return self._epoch, None if self._source is None else self._source.epoch

    async def watch(self) -> None:
        """Do, for ever, what nobody who reads could wait for: second requests, and mirrors that come back."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hedge.watch)
            if self._tend is not None:
                nursery.start_soon(self._tend)

    async def read_into(self, pos: int, buffer: memoryview, *, urgent: Urgent = lambda: True) -> None:
        """Fill `buffer` with the bytes at `pos`; bytes past the end of the backing are zeros.

        `urgent` says whether a guest waits for it, at the time it is called.

        Raises:
            BackingRefused, BackingChanged: no retry helps.
            CorruptEntry: no retry helps for these bytes.
            BackingUnavailable: the backing was closed meanwhile.
        """

        async def read(source: Source) -> None:
            inside = min(max(source.size - pos, 0), len(buffer))

            async def ask(place: memoryview) -> None:
                self._bytes_read += inside
                await source.read_into(pos, place)

            if inside and source.may_straggle and not self._changing:
                await self._hedge.read(ask, buffer[:inside], urgent)
            elif inside:
                await ask(buffer[:inside])
            if inside < len(buffer):
                buffer[inside:] = bytes(len(buffer) - inside)

        await self._retried(read)

    def read_nowait(self, pos: int, buffer: memoryview) -> bool:
        """As `read_into` if that needs no waiting; False otherwise, and then the content of `buffer` is undefined."""
        source = self._source
        if source is None or self._state is not BackingState.HEALTHY or (self._changing and not source.live):
            return False
        inside = min(max(source.size - pos, 0), len(buffer))
        try:
            if inside and not source.read_nowait(pos, buffer[:inside]):
                return False
        except QedfsError:
            return False  # `read_into` meets it again, and tells what may pass from what is final
        self._bytes_read += inside
        if inside < len(buffer):
            buffer[inside:] = bytes(len(buffer) - inside)
        return True

    async def extents(self, pos: int, length: int) -> list[Extent]:
        """Tell which parts of the range the backing promises to read as zeros; past its end all of it does.

        The answer holds for now: not after a reconnection. Raises as `read_into`.
        """

        async def ask(source: Source) -> list[Extent]:
            inside = min(max(source.size - pos, 0), length)
            known = await source.extents(pos, inside) if inside else []
            return merged([*known, Extent(length - inside, True)])

        return await self._retried(ask)

    async def size(self) -> int:
        """Return the size in bytes, connecting if it is not known yet. Raises as `read_into`."""
        return (await self.identity()).size

    async def identity(self) -> Identity:
        """Return what the content is now, connecting for it if need be. Raises as `read_into`."""

        async def ask(source: Source) -> Identity:
            return source.identity

        return await self._retried(ask)

    async def source(self) -> Source:
        """Return what is connected now, for what only a source of its kind can do. Raises as `read_into`."""

        async def ask(source: Source) -> Source:
            return source

        return await self._retried(ask)

    @property
    def refused(self) -> bool:
        """Whether it failed for good, until `reset`."""
        return self._refused is not None

    def statistics(self) -> BackingStatistics:
        size = None if self._expected is None else self._expected.size
        error, when = self._last_error, self._last_error_time
        if self._source is not None and self._source.trouble[0] > (when or 0.0):
            when, error = self._source.trouble
        return BackingStatistics(self._bytes_read, self._state, error, when, size, self._hedge.asked_twice)

    async def reset(self, expected: Identity | None = None) -> None:
        """Forget the connection and a final error; the next request connects anew and finds `expected`, or anything."""
        self._generation += 1
        self._epoch += 1
        self._refused = None
        self._expected = expected
        self._state = BackingState.IDLE
        self._failures, self._not_before = 0, -float("inf")
        self._woken.set()
        self._woken = trio.Event()
        for attempt in list(self._attempts):
            attempt.cancel()
        await self._drop()

    def settle(self, identity: Identity) -> None:
        """From now on the content is that of `identity`, and any other one is refused.

        The caller got `identity` since the last `reset`.
        """
        self._changing = False
        self._expected = identity
        if self._source is not None and (why := difference(identity, self._source.identity)):
            self._refuse(BackingChanged(self.name, why))

    async def aclose(self) -> None:
        """Close the source. Requests under way fail with BackingUnavailable."""
        self._closed.set()
        self._woken.set()
        for attempt in list(self._attempts):
            attempt.cancel()
        await self._drop()

    async def retire(self) -> None:
        """Close the source when every request under way has ended. The caller makes no new ones."""
        if self._requests:
            self._unused = trio.Event()
            await self._unused.wait()
        await self.aclose()

    async def _retried(self, request: Callable[[Source], Awaitable[T]]) -> T:
        self._requests += 1
        try:
            return await self._until_answered(request)
        finally:
            self._requests -= 1
            if self._unused is not None and not self._requests:
                self._unused.set()

    async def _until_answered(self, request: Callable[[Source], Awaitable[T]]) -> T:
        asked: Source | None = None
        failures = successes = 0
        while True:
            source = await self._connected()
            if source is not asked:
                asked, failures, successes = source, 0, self._successes
            try:
                answer = await self._attempt(lambda: self._ask(source, request))  # noqa: B023 (awaited here)
            except BackingUnavailable as error:
                if source is not self._source:
                    continue  # replaced meanwhile: its successor is asked at once
                failures += 1
                answers_others = self._successes != successes
                if answers_others or (failures == 1 and not self._is_silent()):
                    # Perhaps only this request fails (a bad sector): the source is not taken from the others for that.
                    successes = self._successes
                    self._note(error, BackingState.UNAVAILABLE)
                    await self._pause(max(self._pause_after(failures), error.retry_after))
                else:
                    self._failed(error)
                    await self._drop()
                continue
            except CorruptEntry as error:
                self._succeeded()
                self._note(error, BackingState.HEALTHY)
                raise
            except QedfsError as error:
                if source is not self._source:
                    continue
                if self._changing and isinstance(error, BackingChanged):
                    await self._drop()
                    await self._pause(CHANGE_PAUSE)
                    continue
                self._refuse(error)
                await self._drop()
                raise
            self._succeeded()
            return answer

    async def _ask(self, source: Source, request: Callable[[Source], Awaitable[T]]) -> T:
        if source.live or not self._changing:
            return await request(source)
        own = await self._opener()
        try:
            return await request(own)
        finally:
            await close(own)

    async def _connected(self) -> Source:
        """Return the source, connecting first if there is none or it has been silent for too long."""
        while True:
            if self._closed.is_set():
                raise BackingUnavailable(self.name, "is closed")
            if self._refused is not None:
                # A new one for each caller: a traceback grows with every raise.
                raise type(self._refused)(self._refused.what, self._refused.why) from self._refused
            if self._source is not None:
                if not self._is_silent():
                    return self._source
                self._failed(self._silent())
                await self._drop()
            elif self._connecting is not None:
                await self._connecting.wait()
            else:
                await self._connect()

    async def _connect(self) -> None:
        """Make one attempt, after the pause that is due. Its outcome is in the state."""
        done = self._connecting = trio.Event()
        try:
            await self._pause(self._not_before - trio.current_time())
            generation = self._generation
            if self._closed.is_set():
                return
            source = await self._attempt(self._opener)
            if self._closed.is_set() or generation != self._generation:
                await close(source)
                return
            try:
                self._check_identity(source)
            except BackingChanged:
                await close(source)
                raise
            self._source, self._owing_since = source, None
            self._epoch += 1
            self._format = source.format
            self._state = BackingState.HEALTHY
        except BackingUnavailable as error:
            if generation == self._generation:
                self._failed(error)
        except QedfsError as error:
            if generation == self._generation:
                self._refuse(error)
        finally:
            self._connecting = None
            done.set()

    def _check_identity(self, source: Source) -> None:
        found = source.identity
        if self._changing:
            return
        if self._expected is None:
            self._expected = found
        elif why := difference(self._expected, found):
            raise BackingChanged(self.name, f"is not what the image was made on: {why}")
        elif agree(self._expected.tag, found.tag):
            # What the first connection found may be less than all mirrors.
            self._expected = replace(self._expected, tag=joined(self._expected.tag, found.tag))

    async def _attempt(self, function: Callable[[], Awaitable[T]]) -> T:
        """Call `function`, giving up when nothing at all was answered for `stall` seconds, or on close."""
        now = trio.current_time()
        if self._owing_since is None:
            self._owing_since = now
        with trio.CancelScope(deadline=now + self._stall) as scope:
            self._attempts.add(scope)
            try:
                return await function()
            finally:
                self._attempts.discard(scope)
        raise BackingUnavailable(self.name, "is closed") if self._closed.is_set() else self._silent()

    async def _drop(self) -> None:
        """Close the present source, which nobody asks any more from now on."""
        source, self._source = self._source, None
        self._owing_since = None
        if source is not None:
            await close(source)

    def _succeeded(self) -> None:
        now = trio.current_time()
        self._successes += 1
        self._failures = 0
        self.failure = None
        if self._refused is None:  # else this was on its way before that
            self._state = BackingState.HEALTHY
        # The others' time begins anew: what answers is alive. Not at each answer, for there may be many.
        if now - self._extended_at > self._stall / 30:
            self._extended_at = now
            for attempt in self._attempts:
                attempt.deadline = now + self._stall
        self._owing_since = now if self._attempts else None

    def _failed(self, error: QedfsError) -> None:
        self.failure = error
        self._failures += 1
        wished = error.retry_after if isinstance(error, BackingUnavailable) else 0.0
        self._not_before = trio.current_time() + max(self._pause_after(self._failures), wished)
        self._note(error, BackingState.UNAVAILABLE)

    def _refuse(self, error: QedfsError) -> None:
        self._refused = error if isinstance(error, BackingRefused) else BackingRefused(error.what, error.why)
        self._note(error, BackingState.REFUSED)

    def _note(self, error: QedfsError, state: BackingState) -> None:
        self._last_error, self._last_error_time = str(error), time.time()
        self._state = state

    def _is_silent(self) -> bool:
        return self._owing_since is not None and trio.current_time() >= self._owing_since + self._stall

    def _silent(self) -> BackingUnavailable:
        return BackingUnavailable(self.name, f"no answer for {self._stall:g} seconds")

    def _pause_after(self, failures: int) -> float:
        longest = min(FIRST_PAUSE * 2.0 ** min(failures - 1, 30), LONGEST_PAUSE)
        return longest * (1 + self._jitter()) / 2

    async def _pause(self, seconds: float) -> None:
        """Sleep, but not past the end or a reset."""
        with trio.move_on_after(max(seconds, 0)):
            await self._woken.wait()


def difference(expected: Identity, found: Identity) -> str:
    """Say in what `found` is another content than `expected`; empty if in nothing that both tell."""
    if expected.size != found.size:
        return f"its size was {expected.size} bytes and is {found.size}"
    if expected.tag and found.tag and expected.tag != found.tag and not agree(expected.tag, found.tag):
        return f"it was {expected.tag} and is {found.tag}"
    return ""
