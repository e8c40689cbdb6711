"""One backing on several servers: the first that works is read, the others stand by, and none with another content is.

**Which one.** The order is the user's: the first that is connected and does not rest. A request for what is being read from
one mirror already is a second try for a straggler (`hedge.py`) and goes to another. One that was beaten so `BEATEN` times
in a row rests, as one that failed does, for a time that doubles until it has worked for as long as it rested.

**Failing.** A read goes on to the next mirror at once, be it that one is gone, hangs, or has damaged bytes. Only when all
have failed does the caller see it, and `resilient.py` opens anew. `tend` brings back what has failed, beside the reads, so
that none of them waits for a server that is away while another one works.

**Identity.** Each mirror is known by its own tag: what the pin says, else what it was first. As some servers tell only a
size, samples are compared, too, before one joins others, which also shows that it does not only answer the door. One that
has become another is left out for good, with a warning; the backing is refused when no mirror is left.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from qedfs.backing.base import Extent, Identity, Source, close
from qedfs.backing.mirror_name import UNKNOWN, mark, marks_of, tag_of
from qedfs.errors import BackingChanged, BackingRefused, BackingUnavailable, CorruptEntry, first_of

log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE, LONGEST_PATIENCE = 1.0, 10.0
"""Seconds for a mirror to be connected before the next one is tried; twice as long each time it was not enough."""
SILENCE = 5.0
"""Seconds without any answer, while others could give it, after which a mirror has failed. A read of 1 MiB takes as long
over 1.7 Mbit/s."""
FIRST_REST, LONGEST_REST = 1.0, 60.0
"""Seconds that a mirror which failed is left alone while another one works."""
BEATEN = 3
"""Stragglers in a row that another mirror has answered, after which one has failed."""
SAMPLES, SAMPLE = 16, 4096
"""Places that are compared before a mirror joins others, and bytes at each: a mistake is found by that, not malice."""
PROOF = 10.0
"""Seconds for that."""

Opener = Callable[[], Awaitable[Source]]


class _Mirror:
    """What is known of one, over all connections. `known`: the mark of its content."""

    def __init__(self, name: str, opener: Opener, known: str) -> None:
        self.name = name
        self.opener = opener
        self.known = known
        self.refused: BackingRefused | None = None
        self.failures = 0
        self.rests_until = -float("inf")
        self._proven_at = -float("inf")
        self.beaten = 0

    @property
    def resting(self) -> bool:
        return trio.current_time() < self.rests_until

    @property
    def patience(self) -> float:
        """Seconds for connecting."""
        return min(PATIENCE * 2.0 ** min(self.failures, 30), LONGEST_PATIENCE)

    def fail(self, jitter: float, at_least: float) -> None:
        self.failures += 1
        self.beaten = 0
        rest = min(FIRST_REST * 2.0 ** min(self.failures - 1, 30), LONGEST_REST) * (1 + jitter) / 2
        rest = max(rest, at_least)
        self.rests_until = trio.current_time() + rest
        self._proven_at = self.rests_until + rest

    def succeed(self) -> None:
        self.beaten = 0
        if self.failures and trio.current_time() >= self._proven_at:
            self.failures = 0


class Mirrors:
    """The mirrors of one backing: `mirrors` are name and opener of each, in order of preference.

    `expected` is what the backing was when it was pinned, None if anything is right. `jitter` returns numbers in [0, 1).
    """

    def __init__(
        self,
        name: str,
        mirrors: list[tuple[str, Opener]],
        expected: Identity | None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.name = name
        self.trouble = (0.0, "")
        """The newest failure of one, and when (seconds since the epoch)."""
        self._size = None if expected is None else expected.size
        self._format: str | None = None
        known = marks_of("" if expected is None else expected.tag, len(mirrors))
        self._mirrors = [_Mirror(*mirror, tag) for mirror, tag in zip(mirrors, known, strict=True)]
        self._jitter = jitter
        self._current: MirroredSource | None = None
        self._news = trio.Event()
        """A mirror is not connected."""
        self._samples: list[bytearray] | None = None
        """Of the content, once two mirrors have agreed about them: what connects later must have them, too."""

    async def open(self) -> MirroredSource:
        """Connect one mirror, the first that answers.

        Raises:
            BackingUnavailable: none does now.
            BackingRefused: none is left that may be read.
        """
        failures: list[BackingUnavailable] = []
        for mirror in sorted(self._left(), key=lambda mirror: mirror.failures):
            try:
                source = await self._proven(mirror)
            except BackingUnavailable as error:
                self.failed(mirror, error)
                failures.append(error)
            except BackingRefused as error:
                self._leave_out(mirror, error)
            else:
                self._current = MirroredSource(self, self._mirrors, mirror, source)
                self._news.set()
                return self._current
        self._left()
        raise BackingUnavailable(
            self.name,
            f"no mirror answers ({'; '.join(map(str, failures))})",
            retry_after=min(error.retry_after for error in failures),
        )

    async def open_all(self) -> MirroredSource:
        """Connect every mirror; none may be missing.

        Raises:
            BackingUnavailable, BackingRefused: one cannot be had, or has another size, format or content than the first, as
            far as some samples tell.
        """
        first, *others = self._mirrors
        opened = MirroredSource(self, self._mirrors, first, await self._connect(first, LONGEST_PATIENCE))
        try:
            for mirror in others:
                await self._join(opened, mirror, LONGEST_PATIENCE)
        except BaseException:
            await close(opened)
            raise
        return opened

    async def tend(self) -> None:
        """Connect, for ever, what is not connected while another mirror is, when its rest is over."""
        while True:
            self._news = trio.Event()
            current = self._current
            missing = [] if current is None else current.missing()
            if current is None or not missing:
                await self._news.wait()
                continue
            mirror = min(missing, key=lambda mirror: mirror.rests_until)
            with trio.move_on_at(mirror.rests_until):
                await self._news.wait()
                continue  # another one may be due earlier
            try:
                await self._join(current, mirror, mirror.patience)
            except BackingUnavailable as error:
                self.failed(mirror, error)
            except BackingRefused as error:
                self._leave_out(mirror, error)
            else:
                log.info("%s: stands by", mirror.name)

    @property
    def identity(self) -> Identity:
        """Of the content, as far as it is known."""
        return Identity(self._size or 0, tag_of([mirror.known for mirror in self._mirrors]))

    def failed(self, mirror: _Mirror, error: BackingUnavailable | CorruptEntry) -> None:
        """Let `mirror` rest."""
        if not mirror.failures:
            log.warning("%s; the other mirrors are asked", error)
        mirror.fail(self._jitter(), error.retry_after if isinstance(error, BackingUnavailable) else 0.0)
        self.trouble = (time.time(), str(error))
        self._news.set()

    def lost(self, mirror: _Mirror, refusal: BackingRefused) -> None:
        """Use `mirror` no more. Raises BackingRefused if it was the last."""
        self._leave_out(mirror, refusal)
        self._left()

    def _left(self) -> list[_Mirror]:
        left = [mirror for mirror in self._mirrors if mirror.refused is None]
        if not left:
            refusal = self._mirrors[0].refused
            assert refusal is not None, "no mirror is left"
            # A new one for each caller: a traceback grows with every raise.
            raise type(refusal)(refusal.what, refusal.why) from refusal
        return left

    def _leave_out(self, mirror: _Mirror, refusal: BackingRefused) -> None:
        if mirror.refused is None:
            mirror.refused = refusal
            self.trouble = (time.time(), str(refusal))
            if any(other.refused is None for other in self._mirrors):
                log.warning("%s; this mirror is left out", refusal)

    async def _proven(self, mirror: _Mirror) -> Source:
        """Connect `mirror`, and compare it with what is known of the content if nothing else tells that."""
        source = await self._connect(mirror, mirror.patience)
        if self._samples is not None and mirror.known == UNKNOWN:
            async with self._on_trial(mirror, source):
                self._compare(mirror, self._samples, await _samples(source, *_places(source.size)), "before")
        return source

    @asynccontextmanager
    async def _on_trial(self, mirror: _Mirror, source: Source) -> AsyncIterator[None]:
        """Close `source`, which was connected to `mirror`, if what is done within fails or takes longer than `PROOF`."""
        try:
            with trio.move_on_after(PROOF) as proof:
                yield
            if proof.cancelled_caught:
                raise BackingUnavailable(mirror.name, f"does not give some samples within {PROOF:g} seconds")
        except BaseException:
            await close(source)
            raise

    async def _agree(self, current: MirroredSource, mirror: _Mirror, source: Source) -> None:
        """Compare samples of `source` with those of the content, which are those of `current` if none are known yet.

        Raises:
            BackingRefused: two differ.
            BackingUnavailable: they cannot be had.
        """
        places = _places(current.size)
        theirs = await _samples(source, *places)
        ours = self._samples or await _samples(current, *places)
        self._compare(mirror, ours, theirs, " and ".join(current.connected))
        self._samples = ours

    def _compare(self, mirror: _Mirror, ours: list[bytearray], theirs: list[bytearray], whose: str) -> None:
        places, _ = _places(self._size or 0)
        for pos, one, other in zip(places, ours, theirs, strict=True):
            if one != other:
                raise BackingRefused(mirror.name, f"holds other bytes than {whose} (near {pos})")

    async def _join(self, current: MirroredSource, mirror: _Mirror, patience: float) -> None:
        """Connect `mirror` and let it be read beside the others of `current`, if it proves to be of the same content."""
        source = await self._connect(mirror, patience)
        async with self._on_trial(mirror, source):
            await self._agree(current, mirror, source)
        if not current.install(mirror, source):
            await close(source)

    async def _connect(self, mirror: _Mirror, patience: float) -> Source:
        with trio.move_on_after(patience):
            source = await mirror.opener()
            try:
                self._admit(mirror, source)
            except BaseException:
                await close(source)
                raise
            return source
        raise BackingUnavailable(mirror.name, f"no answer within {patience:g} seconds")

    def _admit(self, mirror: _Mirror, source: Source) -> None:
        """Take `source` for a connection to `mirror`, or raise BackingChanged, BackingRefused."""
        if self._size is not None and source.size != self._size:
            raise BackingChanged(mirror.name, f"has {source.size} bytes, the backing {self._size}")
        if self._format is not None and source.format != self._format:
            raise BackingRefused(mirror.name, f"is {source.format}, the other mirrors are {self._format}")
        found = mark(source.identity.tag)
        if UNKNOWN not in (found, mirror.known) and found != mirror.known:
            raise BackingChanged(mirror.name, f"is not what the image was made on: it is {source.identity.tag} now")
        self._size, self._format = source.size, source.format
        if found != UNKNOWN:
            mirror.known = found


class _Replaced(BackingUnavailable):
    """A mirror of which nothing but the size is known has reconnected by itself: its answer may be of anything."""


class _Line:
    """The connection to one mirror, if there is one, and what is asked over it."""

    def __init__(self, mirror: _Mirror) -> None:
        self.mirror = mirror
        self.source: Source | None = None
        self.epoch: object = None
        """Of `source`, when it had been compared."""
        self.asked: dict[tuple[int, int], float] = {}
        """Ranges that are being read, and since when."""
        self.patience: set[trio.CancelScope] = set()
        """Of requests that could go to another mirror."""
        self._extended_at = -float("inf")

    def answered(self) -> None:
        """Begin the others' time anew: what answers is alive. Not at each answer, for there may be many."""
        now = trio.current_time()
        if now - self._extended_at > SILENCE / 30:
            self._extended_at = now
            for scope in self.patience:
                scope.deadline = now + SILENCE


class MirroredSource(Source):
    """See the module; made by `Mirrors`."""

    def __init__(self, mirrors: Mirrors, each: list[_Mirror], connected: _Mirror, source: Source) -> None:
        self.name = mirrors.name
        self.size = source.size
        self.format = source.format
        self._mirrors = mirrors
        self._lines = [_Line(mirror) for mirror in each]
        self._closed = False
        self._epoch = 0
        self.install(connected, source)

    @property
    def identity(self) -> Identity:  # type: ignore[override]
        return self._mirrors.identity

    @property
    def tells_content(self) -> bool:
        return all(line.mirror.known != UNKNOWN for line in self._lines)

    @property
    def may_straggle(self) -> bool:  # type: ignore[override]
        connected = [line.source for line in self._lines if line.source is not None]
        return len(connected) > 1 or any(source.may_straggle for source in connected)

    @property
    def trouble(self) -> tuple[float, str]:  # type: ignore[override]
        return self._mirrors.trouble

    @property
    def epoch(self) -> object:
        return self._epoch, tuple(line.source.epoch for line in self._lines if line.source is not None)

    @property
    def connected(self) -> list[str]:
        """The names of the mirrors that are."""
        return [line.mirror.name for line in self._lines if line.source is not None]

    def missing(self) -> list[_Mirror]:
        """Return the mirrors that are not connected and might be."""
        if self._closed:
            return []
        return [line.mirror for line in self._lines if line.source is None and line.mirror.refused is None]

    def install(self, mirror: _Mirror, source: Source) -> bool:
        """Read from `source` too; False if this is closed."""
        line = next(line for line in self._lines if line.mirror is mirror)
        assert line.source is None, "one connects what is missing"
        if not self._closed:
            line.source, line.epoch = source, source.epoch
        return not self._closed

    async def read_into(self, pos: int, buffer: memoryview) -> None:
        await self._ask((pos, len(buffer)), lambda source: source.read_into(pos, buffer))

    def read_nowait(self, pos: int, buffer: memoryview) -> bool:
        line = self._choose((pos, len(buffer)), set())
        return line is not None and line.source is not None and line.source.read_nowait(pos, buffer)

    async def extents(self, pos: int, length: int) -> list[Extent]:
        return await self._ask((pos, length), lambda source: source.extents(pos, length))

    async def aclose(self) -> None:
        self._closed = True
        for line in self._lines:
            source, line.source = line.source, None
            if source is not None:
                await close(source)
        await trio.lowlevel.checkpoint()

    async def _ask(self, place: tuple[int, int], request: Callable[[Source], Awaitable[T]]) -> T:
        """Return the answer of the best mirror that has one."""
        tried = set[_Line]()
        error: BackingUnavailable | CorruptEntry | None = None
        while not self._closed and (line := self._choose(place, tried)) is not None:
            tried.add(line)
            source = line.source
            assert source is not None, "only what is connected is chosen"
            alone = self._choose(place, tried) is None
            try:
                return await self._asked(line, source, place, request, alone=alone)
            except CorruptEntry as failure:
                error = failure  # of these bytes; another copy may be whole
            except _Replaced as failure:
                error = failure
                if await self._drop(line, source):
                    self._mirrors.failed(line.mirror, failure)
            except BackingUnavailable as failure:
                error = failure
                # Of the last one it is not known whether only these bytes fail: then others still need it.
                if not alone and await self._drop(line, source):
                    self._mirrors.failed(line.mirror, failure)
            except BackingRefused as refusal:
                if await self._drop(line, source):
                    self._mirrors.lost(line.mirror, refusal)
        if error is not None and not self._closed:
            raise error
        raise BackingUnavailable(self.name, "is closed" if self._closed else "no mirror is connected")

    async def _asked(
        self,
        line: _Line,
        source: Source,
        place: tuple[int, int],
        request: Callable[[Source], Awaitable[T]],
        *,
        alone: bool,
    ) -> T:
        """Return the answer over `line`; BackingUnavailable if it is silent for too long and not `alone`."""
        now = trio.current_time()
        line.asked.setdefault(place, now)
        with trio.CancelScope(deadline=float("inf") if alone else now + SILENCE) as patience:
            if not alone:
                line.patience.add(patience)
            try:
                answer = await request(source)
                if source.epoch != line.epoch and line.mirror.known == UNKNOWN:
                    raise _Replaced(line.mirror.name, "was away, and has to show what it holds now")
                line.answered()
                self._judge(line, place, now)
                return answer
            finally:
                line.patience.discard(patience)
                line.asked.pop(place, None)
        raise BackingUnavailable(line.mirror.name, f"no answer for {SILENCE:g} seconds")

    def _choose(self, place: tuple[int, int], tried: set[_Line]) -> _Line | None:
        candidates = [line for line in self._lines if line.source is not None and line not in tried]
        return min(candidates, key=lambda line: (place in line.asked, line.mirror.resting), default=None)

    def _judge(self, winner: _Line, place: tuple[int, int], since: float) -> None:
        """Note that `winner`, asked at the time `since`, has an answer before those that were asked earlier."""
        winner.mirror.succeed()
        for line in self._lines:
            if line is not winner and line.asked.get(place, since) < since:
                line.mirror.beaten += 1
                if line.mirror.beaten == BEATEN:
                    why = f"is slower than {winner.mirror.name}"
                    self._mirrors.failed(line.mirror, BackingUnavailable(line.mirror.name, why))

    async def _drop(self, line: _Line, source: Source) -> bool:
        """Read from `source` no more; False if somebody has seen to that already."""
        if line.source is not source:
            return False
        line.source = None
        self._epoch += 1
        await close(source)
        return True


def _places(size: int) -> tuple[list[int], int]:
    """Return where the samples of a disk of `size` bytes are, and the length of each."""
    length = min(SAMPLE, size)
    return sorted({(size - length) * number // (SAMPLES - 1) for number in range(SAMPLES)}), length


async def _samples(source: Source, places: list[int], length: int) -> list[bytearray]:
    """Return `length` bytes at each of `places`, all asked for at once."""
    samples = [bytearray(length) for _ in places]
    try:
        async with trio.open_nursery() as nursery:
            for pos, sample in zip(places, samples, strict=True):
                nursery.start_soon(source.read_into, pos, memoryview(sample))
    except BaseExceptionGroup as group:
        raise first_of(group) from None
    return samples
