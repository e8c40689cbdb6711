"""Several servers for one backing, on a virtual clock, with servers that do as they are told."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
import trio
import trio.testing

from qedfs.backing.base import Extent, Identity, Source
from qedfs.backing.mirror_name import mark
from qedfs.backing.mirrors import (
    BEATEN,
    FIRST_REST,
    LONGEST_REST,
    PATIENCE,
    SAMPLE,
    SAMPLES,
    SILENCE,
    MirroredSource,
    Mirrors,
)
from qedfs.backing.resilient import Backing, BackingState
from qedfs.errors import BackingChanged, BackingRefused, BackingUnavailable, CorruptEntry, QedfsError
from tests.backing.samples import random_bytes

Warned = Callable[[], list[str]]

SIZE = 256 * 1024
CONTENT = random_bytes(SIZE, 3)


class Server:
    """One mirror. `refusal` ends the opening, `failure` each read; `deaf`: it connects and then says nothing."""

    def __init__(self, name: str, content: bytes = CONTENT, tag: str = "") -> None:
        self.name = name
        self.content = content
        self.tag = tag or f"etag:{name}"
        self.format = "raw"
        self.refusal: QedfsError | None = None
        self.failure: QedfsError | None = None
        self.deaf = False
        self.seconds = 0.0
        """For each read."""
        self.hangs = False
        """Nobody answers the door."""
        self.opened_at: list[float] = []
        self.reads: list[tuple[int, int]] = []
        """Without those of samples."""
        self.open_now = 0

    async def open(self) -> Source:
        self.opened_at.append(trio.current_time())
        await trio.sleep(float("inf") if self.hangs else 0)
        if self.refusal is not None:
            raise self.refusal
        return Connection(self)

    def gone(self) -> None:
        self.refusal = self.failure = BackingUnavailable(self.name, "is gone")

    def back(self) -> None:
        self.refusal = self.failure = None


class Connection(Source):
    def __init__(self, server: Server) -> None:
        self.name = server.name
        self.size = len(server.content)
        self.identity = Identity(self.size, server.tag if server.tag != "none" else "")
        self.format = server.format
        self._server = server
        self._closed = trio.Event()
        server.open_now += 1

    async def read_into(self, pos: int, buffer: memoryview) -> None:
        await self._answer(pos, len(buffer))
        buffer[:] = self._server.content[pos : pos + len(buffer)]

    async def extents(self, pos: int, length: int) -> list[Extent]:
        await self._answer(pos, length)
        return [Extent(length, False)]

    async def aclose(self) -> None:
        if not self._closed.is_set():
            self._server.open_now -= 1
        self._closed.set()

    async def _answer(self, pos: int, length: int) -> None:
        if length != SAMPLE:
            self._server.reads.append((pos, length))
        with trio.move_on_after(float("inf") if self._server.deaf else self._server.seconds):
            await self._closed.wait()
        await trio.lowlevel.checkpoint()
        if self._closed.is_set():
            raise BackingUnavailable(self.name, "is closed")
        if self._server.failure is not None:
            raise self._server.failure


class Pair:
    """Two mirrors, `a` before `b`, and what reads them."""

    def __init__(self, expected: Identity | None = None) -> None:
        self.a, self.b = Server("a"), Server("b")
        self.mirrors = Mirrors(
            "mirrors:a|b", [(s.name, s.open) for s in (self.a, self.b)], expected, jitter=lambda: 1.0
        )

    async def tended(self, nursery: trio.Nursery) -> MirroredSource:
        """Open, and wait until both are connected."""
        nursery.start_soon(self.mirrors.tend)
        source = await self.mirrors.open()
        await settled()
        assert source.connected == ["a", "b"]
        return source


@pytest.fixture
def pair() -> Pair:
    return Pair()


@pytest.fixture
async def source(pair: Pair, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> MirroredSource:
    return await pair.tended(nursery)


async def settled() -> None:
    """Let everything happen that needs no time, and some that needs next to none."""
    await trio.sleep(0.01)


async def read(source: Source | Backing, pos: int = 0, length: int = 100) -> bytes:
    buffer = bytearray(b"?" * length)
    await source.read_into(pos, memoryview(buffer))
    return bytes(buffer)


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture, expected_warnings: Callable[[str], None]) -> Warned:
    """Call it for what was warned of since the last call; a test that does expects it."""

    def take() -> list[str]:
        said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        caplog.clear()
        for line in said:
            expected_warnings(re.escape(line))
        return said

    return take


# --- which one is read ------------------------------------------------------------------------------------------------


async def test_the_first_is_read_and_the_others_stand_by(
    pair: Pair, source: MirroredSource, autojump_clock: trio.testing.MockClock
) -> None:
    for pos in range(0, 1000, 100):
        assert await read(source, pos) == CONTENT[pos : pos + 100]
    assert (len(pair.a.reads), pair.b.reads) == (10, [])


async def test_a_second_try_for_the_same_bytes_goes_to_another(
    pair: Pair, source: MirroredSource, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    pair.a.seconds = 1
    nursery.start_soon(read, source, 500)
    await settled()
    assert await read(source, 500) == CONTENT[500:600]
    assert pair.b.reads == [(500, 100)]
    assert await read(source, 600) == CONTENT[600:700]
    assert pair.b.reads == [(500, 100)]


# --- failing and healing ----------------------------------------------------------------------------------------------


async def test_a_read_of_a_mirror_that_is_gone_is_answered_by_the_next_at_once(
    pair: Pair, source: MirroredSource, warned: Warned, autojump_clock: trio.testing.MockClock
) -> None:
    pair.a.gone()
    before = trio.current_time()
    assert await read(source) == CONTENT[:100]
    assert await read(source, 100) == CONTENT[100:200]
    assert trio.current_time() - before < 0.01
    assert len(pair.a.reads) == 1
    assert warned() == ["a: is gone; the other mirrors are asked"]
    assert source.trouble[1] == "a: is gone"


async def test_the_first_is_returned_to_when_it_works_again(
    pair: Pair, source: MirroredSource, warned: Warned, autojump_clock: trio.testing.MockClock
) -> None:
    pair.a.gone()
    await read(source)
    await trio.sleep(10 * FIRST_REST)
    pair.a.back()
    await trio.sleep(20 * FIRST_REST)
    assert source.connected == ["a", "b"]
    pair.a.reads.clear()
    await read(source)
    assert len(pair.a.reads) == 1
    assert len(warned()) == 1


async def test_a_mirror_that_stays_away_is_asked_less_and_less_often(
    pair: Pair, source: MirroredSource, warned: Warned, autojump_clock: trio.testing.MockClock
) -> None:
    pair.a.gone()
    await read(source)
    await trio.sleep(1000)
    pauses = [b - a for a, b in zip(pair.a.opened_at[1:], pair.a.opened_at[2:], strict=False)]
    assert pauses[:4] == pytest.approx([2, 4, 8, 16], rel=0.05)
    assert pauses[-1] == pytest.approx(LONGEST_REST, rel=0.05)
    assert warned() == ["a: is gone; the other mirrors are asked"]


async def test_a_mirror_that_hangs_is_left_after_some_seconds_with_all_its_reads(
    pair: Pair, source: MirroredSource, warned: Warned, autojump_clock: trio.testing.MockClock
) -> None:
    pair.a.deaf = True
    before = trio.current_time()
    async with trio.open_nursery() as nursery:
        for pos in range(0, 6400, 100):
            nursery.start_soon(read, source, pos)
    assert trio.current_time() - before == pytest.approx(SILENCE, rel=0.01)
    assert len(pair.b.reads) == 64
    assert await read(source) == CONTENT[:100]
    assert trio.current_time() - before == pytest.approx(SILENCE, rel=0.01)
    assert warned() == [f"a: no answer for {SILENCE:g} seconds; the other mirrors are asked"]


async def test_a_mirror_that_only_answers_the_door_does_not_come_back(
    pair: Pair, source: MirroredSource, warned: Warned, autojump_clock: trio.testing.MockClock
) -> None:
    pair.a.deaf = True
    await read(source)
    await trio.sleep(500)
    assert len(pair.a.opened_at) > 3
    assert source.connected == ["b"]
    before = trio.current_time()
    await read(source)
    assert trio.current_time() == before
    pair.a.deaf = False
    await trio.sleep(2 * LONGEST_REST)
    assert source.connected == ["a", "b"]
    assert len(warned()) == 1


async def test_a_slow_mirror_that_goes_on_answering_is_not_taken_for_silent(
    pair: Pair, source: MirroredSource, autojump_clock: trio.testing.MockClock
) -> None:
    async def slow(pos: int) -> None:
        pair.a.seconds = 1 + pos / 100  # the last one takes longer than the time that silence may last
        assert await read(source, pos) == CONTENT[pos : pos + 100]

    async with trio.open_nursery() as nursery:
        for pos in range(0, 1000, 100):
            nursery.start_soon(slow, pos)
            await trio.lowlevel.checkpoint()
    assert len(pair.a.reads) == 10
    assert pair.b.reads == []


async def test_the_last_one_that_answers_has_all_the_time(
    pair: Pair, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, warned: Warned
) -> None:
    pair.b.gone()
    nursery.start_soon(pair.mirrors.tend)
    source = await pair.mirrors.open()
    pair.a.seconds = 4 * SILENCE
    assert await read(source) == CONTENT[:100]
    assert warned() == ["b: is gone; the other mirrors are asked"]


async def test_bytes_that_are_damaged_on_one_are_read_from_another(
    pair: Pair, source: MirroredSource, autojump_clock: trio.testing.MockClock
) -> None:
    pair.a.failure = CorruptEntry("a", "entry 7 is nonsense")
    assert await read(source) == CONTENT[:100]
    assert source.connected == ["a", "b"]
    pair.b.failure = CorruptEntry("b", "entry 7 is nonsense")
    with pytest.raises(CorruptEntry):
        await read(source)


async def test_one_that_is_beaten_again_and_again_rests(
    pair: Pair, source: MirroredSource, nursery: trio.Nursery, warned: Warned, autojump_clock: trio.testing.MockClock
) -> None:
    pair.a.seconds = 3
    for pos in range(0, BEATEN * 100, 100):
        nursery.start_soon(read, source, pos)
        await settled()
        await read(source, pos)
    pair.a.reads.clear()
    await read(source, 5000)
    assert pair.a.reads == []
    assert warned() == ["a: is slower than b; the other mirrors are asked"]
    assert source.connected == ["a", "b"]
    await trio.sleep(FIRST_REST)
    await read(source, 6000)
    assert pair.a.reads == [(6000, 100)]


async def test_who_is_asked_second_is_not_blamed_for_coming_second(
    pair: Pair, source: MirroredSource, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    pair.a.seconds, pair.b.seconds = 1, 3
    for pos in range(0, 3 * BEATEN * 100, 100):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as both:
                both.start_soon(read, source, pos)
                await settled()
                both.start_soon(read, source, pos)
                await trio.sleep(1.1)
                scope.cancel()
    assert source.trouble == (0.0, "")


# --- what is no mirror ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "tag", "why"),
    [
        (CONTENT[:-512], "", "b: has 261632 bytes, the backing 262144"),
        (CONTENT[:100_000] + bytes(SIZE - 100_000), "", "b: holds other bytes than a"),
        (CONTENT[:100_000] + bytes(SIZE - 100_000), "none", "b: holds other bytes than a"),
    ],
)
async def test_other_content_is_never_mixed_in(
    pair: Pair,
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
    warned: Warned,
    content: bytes,
    tag: str,
    why: str,
) -> None:
    pair.b.content, pair.b.tag = content, tag or pair.b.tag
    nursery.start_soon(pair.mirrors.tend)
    source = await pair.mirrors.open()
    await trio.sleep(1000)
    assert source.connected == ["a"]
    assert len(pair.b.opened_at) == 1
    assert pair.b.open_now == 0
    (said,) = warned()
    assert said.startswith(why)
    assert said.endswith("this mirror is left out")
    pair.a.failure = BackingUnavailable("a", "is gone")
    with pytest.raises(BackingUnavailable):
        await read(source, 200_000)
    assert pair.b.reads == []


async def test_each_is_pinned_by_itself(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, warned: Warned
) -> None:
    pinned = Identity(SIZE, f"mirrors:{mark('etag:old')},{mark('etag:b')}")
    pair = Pair(pinned)
    nursery.start_soon(pair.mirrors.tend)
    source = await pair.mirrors.open()
    await settled()
    assert source.connected == ["b"]
    assert source.identity == pinned
    assert warned() == ["a: is not what the image was made on: it is etag:a now; this mirror is left out"]


async def test_one_that_comes_back_as_another_is_left_out(
    pair: Pair, source: MirroredSource, warned: Warned, autojump_clock: trio.testing.MockClock
) -> None:
    pair.a.gone()
    await read(source)
    pair.a.back()
    pair.a.tag = "etag:new"
    await trio.sleep(100)
    assert source.connected == ["b"]
    assert warned()[1].startswith("a: is not what the image was made on: it is etag:new now")


async def test_one_that_only_tells_its_size_is_compared_each_time_it_comes_back(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, warned: Warned
) -> None:
    pair = Pair()
    pair.a.tag = pair.b.tag = "none"
    source = await pair.tended(nursery)
    assert not source.tells_content
    pair.a.gone()
    await read(source)
    pair.a.back()
    pair.a.content = CONTENT[::-1]
    await trio.sleep(100)
    assert source.connected == ["b"]
    assert warned()[1].startswith("a: holds other bytes than b (near 0)")


async def test_one_that_refuses_a_read_is_left_out_and_the_last_one_that_does_ends_it(
    pair: Pair, source: MirroredSource, warned: Warned, autojump_clock: trio.testing.MockClock
) -> None:
    pair.a.failure = BackingChanged("a", "has been replaced")
    assert await read(source) == CONTENT[:100]
    await trio.sleep(1000)
    assert len(pair.a.opened_at) == 1
    pair.b.failure = BackingRefused("b", "has gone")
    with pytest.raises(BackingRefused):
        await read(source)
    with pytest.raises(BackingChanged, match="a: has been replaced"):
        await pair.mirrors.open()
    assert warned() == ["a: has been replaced; this mirror is left out"]


async def test_formats_that_differ_are_no_mirrors(
    pair: Pair, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, warned: Warned
) -> None:
    pair.b.format = "qed"
    nursery.start_soon(pair.mirrors.tend)
    source = await pair.mirrors.open()
    await settled()
    assert source.connected == ["a"]
    assert warned() == ["b: is qed, the other mirrors are raw; this mirror is left out"]


# --- opening ----------------------------------------------------------------------------------------------------------


async def test_opening_is_content_with_one(pair: Pair, autojump_clock: trio.testing.MockClock, warned: Warned) -> None:
    pair.a.hangs = True
    before = trio.current_time()
    source = await pair.mirrors.open()
    assert trio.current_time() - before == pytest.approx(PATIENCE)
    assert source.connected == ["b"]
    assert source.identity == Identity(SIZE, f"mirrors:-,{mark('etag:b')}")
    assert not source.tells_content
    assert warned() == ["a: no answer within 1 seconds; the other mirrors are asked"]


async def test_who_has_failed_is_asked_last_at_the_next_opening(
    pair: Pair, autojump_clock: trio.testing.MockClock, warned: Warned
) -> None:
    pair.a.hangs = True
    await (await pair.mirrors.open()).aclose()
    before = trio.current_time()
    await (await pair.mirrors.open()).aclose()
    assert trio.current_time() - before < PATIENCE
    assert len(warned()) == 1


async def test_when_none_answers_it_may_pass_and_each_is_named(
    pair: Pair, warned: Warned, autojump_clock: trio.testing.MockClock
) -> None:
    pair.a.gone()
    pair.b.refusal = BackingUnavailable("b", "is busy", retry_after=7)
    with pytest.raises(BackingUnavailable, match=r"no mirror answers \(a: is gone; b: is busy\)") as caught:
        await pair.mirrors.open()
    assert caught.value.retry_after == 0
    assert len(warned()) == 2


async def test_opening_all_wants_every_one(pair: Pair, autojump_clock: trio.testing.MockClock) -> None:
    source = await pair.mirrors.open_all()
    assert source.connected == ["a", "b"]
    assert source.tells_content
    assert source.identity == Identity(SIZE, f"mirrors:{mark('etag:a')},{mark('etag:b')}")
    await source.aclose()
    pair.b.gone()
    with pytest.raises(BackingUnavailable, match="b: is gone"):
        await pair.mirrors.open_all()
    pair.b.back()
    pair.b.content = CONTENT[:-1] + b"!"
    with pytest.raises(BackingRefused, match="b: holds other bytes than a"):
        await pair.mirrors.open_all()
    assert (pair.a.open_now, pair.b.open_now) == (0, 0)


async def test_samples_are_taken_from_the_first_byte_to_the_last(
    pair: Pair, autojump_clock: trio.testing.MockClock
) -> None:
    for pos in (0, SIZE - 1):
        changed = bytearray(CONTENT)
        changed[pos] ^= 1
        pair.b.content = bytes(changed)
        with pytest.raises(BackingRefused, match="holds other bytes"):
            await pair.mirrors.open_all()


@pytest.mark.parametrize("size", [1, SAMPLE, SAMPLE * SAMPLES // 3])
async def test_a_small_backing_may_have_mirrors(pair: Pair, size: int, autojump_clock: trio.testing.MockClock) -> None:
    pair.a.content = pair.b.content = CONTENT[:size]
    source = await pair.mirrors.open_all()
    assert await read(source, 0, size) == CONTENT[:size]
    await source.aclose()


async def test_closing_ends_reads_and_connections_and_lets_nobody_in(
    pair: Pair, source: MirroredSource, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    pair.a.deaf = True
    failed = 0

    async def reader(pos: int) -> None:
        nonlocal failed
        with pytest.raises(BackingUnavailable):
            await read(source, pos)
        failed += 1

    for pos in range(3):
        nursery.start_soon(reader, pos)
    await settled()
    await source.aclose()
    await settled()
    assert (failed, pair.a.open_now, pair.b.open_now) == (3, 0, 0)
    await trio.sleep(100)
    assert (pair.a.open_now, pair.b.open_now) == (0, 0)


# --- under the backing that a disk reads ------------------------------------------------------------------------------


async def test_a_backing_whose_mirrors_are_all_gone_waits_and_heals_with_whoever_comes_first(
    pair: Pair, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, warned: Warned
) -> None:
    backing = Backing(pair.mirrors.open, name="mirrors:a|b", tend=pair.mirrors.tend, jitter=lambda: 1.0)
    nursery.start_soon(backing.watch)
    assert await read(backing) == CONTENT[:100]
    await settled()
    pair.a.gone()
    pair.b.gone()
    answers: list[bytes] = []

    async def reader() -> None:
        answers.append(await read(backing, 300))

    nursery.start_soon(reader)
    await trio.sleep(30)
    assert answers == []
    assert backing.statistics().state is BackingState.UNAVAILABLE
    pair.b.back()
    await trio.sleep(11)
    assert answers == [CONTENT[300:400]]
    assert backing.statistics().state is BackingState.HEALTHY
    assert len(warned()) == 2
    await backing.aclose()


async def test_what_one_of_them_had_is_told_as_the_last_error_though_no_read_failed(
    pair: Pair, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, warned: Warned
) -> None:
    backing = Backing(pair.mirrors.open, name="mirrors:a|b", tend=pair.mirrors.tend)
    nursery.start_soon(backing.watch)
    await read(backing)
    assert backing.statistics().last_error == ""
    await settled()
    pair.a.gone()
    await read(backing)
    facts = backing.statistics()
    assert (facts.state, facts.last_error) == (BackingState.HEALTHY, "a: is gone")
    assert facts.last_error_time is not None
    assert len(warned()) == 1
    await backing.aclose()


async def test_a_bad_spot_of_the_only_one_left_does_not_take_it_from_the_others(
    pair: Pair, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, warned: Warned
) -> None:
    pair.b.refusal = BackingRefused("b", "is forbidden")
    source = await pair.mirrors.open()
    pair.a.failure = BackingUnavailable("a", "EIO")
    with pytest.raises(BackingUnavailable, match="EIO"):
        await read(source)
    assert source.connected == ["a"]
    pair.a.failure = None
    assert await read(source) == CONTENT[:100]
    assert len(pair.a.opened_at) == 1
    await source.aclose()
