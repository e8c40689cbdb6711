"""The backing as the layers above see it: retried, reconnected, told apart; on a virtual clock, with a source on strings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from qedfs.backing.base import Extent, Identity, Source
from qedfs.backing.resilient import LONGEST_PAUSE, STALL, Backing, BackingState
from qedfs.errors import BackingChanged, BackingRefused, BackingUnavailable, CorruptEntry, QedfsError

CONTENT = bytes(range(256)) * 16


class FakeSource(Source):
    """Obeys its server: fails, hangs or answers as that says."""

    def __init__(self, server: FakeServer) -> None:
        self.name = "fake"
        self.identity = server.identity
        self.size = server.identity.size
        self.closed = trio.Event()
        self._server = server

    async def read_into(self, pos: int, buffer: memoryview) -> None:
        assert pos + len(buffer) <= self.size, "a source is asked only inside its size"
        self._server.reads += 1
        await self._obey(pos)
        buffer[:] = CONTENT[pos : pos + len(buffer)]

    def read_nowait(self, pos: int, buffer: memoryview) -> bool:
        assert pos + len(buffer) <= self.size, "a source is asked only inside its size"
        if self._server.failure is not None:
            raise self._server.failure
        if self._server.at_hand:
            buffer[:] = CONTENT[pos : pos + len(buffer)]
        return self._server.at_hand

    async def extents(self, pos: int, length: int) -> list[Extent]:
        await self._obey(pos)
        return [Extent(length, False)]

    async def aclose(self) -> None:
        self.closed.set()

    async def _obey(self, pos: int) -> None:
        await trio.lowlevel.checkpoint()
        if pos in self._server.held:
            await self._server.held[pos].wait()
        if self.closed.is_set():
            raise BackingUnavailable("fake", "closed")
        failure = self._server.failures.get(pos) or self._server.failure
        if failure is not None:
            raise failure


class FakeServer:
    """What stands behind the opener. `failure` fails every read, `failures` those at a position, `held` stops them."""

    def __init__(self) -> None:
        self.identity = Identity(len(CONTENT), "etag:1")
        self.refusal: QedfsError | None = None
        self.at_hand = False
        """Reads need no waiting."""
        self.failure: QedfsError | None = None
        self.failures: dict[int, QedfsError] = {}
        self.held: dict[int, trio.Event] = {}
        self.opened_at: list[float] = []
        self.sources: list[FakeSource] = []
        self.reads = 0

    async def open(self) -> Source:
        self.opened_at.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        if self.refusal is not None:
            raise self.refusal
        self.sources.append(FakeSource(self))
        return self.sources[-1]


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def backing(server: FakeServer) -> Backing:
    return backing_of(server)


def backing_of(server: FakeServer, expected: Identity | None = None) -> Backing:
    return Backing(server.open, name="nbd://host/x", format="raw", expected=expected, jitter=lambda: 1.0)


async def read(backing: Backing, pos: int = 0, length: int = 16) -> bytes:
    buffer = bytearray(b"?" * length)
    await backing.read_into(pos, memoryview(buffer))
    return bytes(buffer)


def away(why: str = "away") -> BackingUnavailable:
    return BackingUnavailable("fake", why)


async def test_nothing_is_opened_before_something_is_asked(server: FakeServer, backing: Backing) -> None:
    assert backing.statistics().state is BackingState.IDLE
    assert server.opened_at == []
    assert await read(backing) == CONTENT[:16]
    assert backing.statistics().state is BackingState.HEALTHY
    assert len(server.opened_at) == 1


async def test_many_first_requests_make_one_connection(server: FakeServer, backing: Backing) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(read, backing)
    assert len(server.opened_at) == 1


async def test_past_the_end_there_are_zeros(backing: Backing) -> None:
    end = len(CONTENT)
    assert await read(backing, end - 3, 8) == CONTENT[-3:] + bytes(5)
    assert await read(backing, end + 1000, 8) == bytes(8)
    assert await backing.extents(end - 3, 8) == [Extent(3, False), Extent(5, True)]
    assert await backing.extents(end, 8) == [Extent(8, True)]
    assert backing.statistics().bytes_read == 3


async def test_what_is_at_hand_needs_no_waiting(server: FakeServer, backing: Backing) -> None:
    end = len(CONTENT)
    buffer = bytearray(b"x" * 8)
    server.at_hand = True
    assert not backing.read_nowait(0, memoryview(buffer))  # not connected yet
    await read(backing, 0, 1)
    assert backing.read_nowait(end - 3, memoryview(buffer))
    assert buffer == CONTENT[-3:] + bytes(5)
    assert backing.statistics().bytes_read == 1 + 3
    server.failure = away()
    assert not backing.read_nowait(0, memoryview(buffer))  # the patient way will find out
    server.failure, server.at_hand = None, False
    assert not backing.read_nowait(0, memoryview(buffer))


async def test_pauses_between_attempts_grow_up_to_a_limit(
    server: FakeServer, backing: Backing, autojump_clock: trio.testing.MockClock
) -> None:
    server.refusal = away()
    with trio.move_on_after(100):
        await read(backing)
    pauses = [later - earlier for earlier, later in zip(server.opened_at, server.opened_at[1:], strict=False)]
    assert pauses[:7] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4])
    assert pauses[7:] == pytest.approx([LONGEST_PAUSE] * (len(pauses) - 7))
    statistics = backing.statistics()
    assert statistics.state is BackingState.UNAVAILABLE
    assert statistics.last_error == "fake: away"
    assert statistics.last_error_time is not None


async def test_jitter_shortens_pauses_by_half_at_most(
    server: FakeServer, autojump_clock: trio.testing.MockClock
) -> None:
    backing = Backing(server.open, name="x", jitter=lambda: 0.0)
    server.refusal = away()
    with trio.move_on_after(0.2):
        await read(backing)
    assert server.opened_at[1] - server.opened_at[0] == pytest.approx(0.05)


async def test_waiting_readers_share_the_attempts(
    server: FakeServer, backing: Backing, autojump_clock: trio.testing.MockClock
) -> None:
    server.refusal = away()
    with trio.move_on_after(3):
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(read, backing)
    assert len(server.opened_at) == 5  # at 0, 0.1, 0.3, 0.7, 1.5


async def test_a_backing_that_returns_is_used_again(
    server: FakeServer, backing: Backing, autojump_clock: trio.testing.MockClock
) -> None:
    server.refusal = away()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, backing)
        await trio.sleep(5)
        server.refusal = None
    assert backing.statistics().state is BackingState.HEALTHY
    assert backing.statistics().last_error == "fake: away"


async def test_a_server_that_wants_to_be_left_alone_is(
    server: FakeServer, backing: Backing, autojump_clock: trio.testing.MockClock
) -> None:
    server.failure = BackingUnavailable("fake", "busy", retry_after=7)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, backing)
        await trio.sleep(15)
        server.failure = None
    # After 7 seconds the same source was asked, after 14 a new one, and it answered after 21.
    assert server.opened_at[1] - server.opened_at[0] == pytest.approx(14)
    assert trio.current_time() - server.opened_at[0] == pytest.approx(21)


async def test_only_the_request_that_was_told_to_wait_waits(
    server: FakeServer, backing: Backing, autojump_clock: trio.testing.MockClock
) -> None:
    server.failures[0] = BackingUnavailable("fake", "busy", retry_after=7)
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, backing)
        await trio.sleep(1)
        assert await read(backing, 16) == CONTENT[16:32]
        assert trio.current_time() - start == pytest.approx(1)
        server.failures.clear()
    assert trio.current_time() - start == pytest.approx(7)


async def test_after_a_success_pauses_begin_short_again(
    server: FakeServer, backing: Backing, autojump_clock: trio.testing.MockClock
) -> None:
    for _ in range(2):
        server.failure = away()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, backing)
            await trio.sleep(20)
            server.failure = None
    server.opened_at.clear()
    server.failure = away()
    start = trio.current_time()
    with trio.move_on_after(1):
        await read(backing)
    assert server.opened_at[0] - start == pytest.approx(0.2)  # 0.1 on the old source, 0.1 before the new one


async def test_a_waiter_that_leaves_hands_the_connecting_to_the_next(
    server: FakeServer, backing: Backing, autojump_clock: trio.testing.MockClock
) -> None:
    server.refusal = away()
    answers: list[bytes] = []

    async def patient() -> None:
        answers.append(await read(backing))

    async with trio.open_nursery() as nursery:
        with trio.move_on_after(1):
            async with trio.open_nursery() as impatient:
                impatient.start_soon(read, backing)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(patient)
                await trio.sleep_forever()
        server.refusal = None
    assert answers == [CONTENT[:16]]


async def test_a_lost_connection_is_made_anew_and_the_read_repeated(
    server: FakeServer, backing: Backing, autojump_clock: trio.testing.MockClock
) -> None:
    await read(backing)
    server.failure = away("reset")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, backing)
        await trio.sleep(0.15)
        server.failure = None
    assert len(server.opened_at) == 2
    assert server.sources[0].closed.is_set()
    assert not server.sources[1].closed.is_set()


async def test_a_source_that_connects_but_never_answers_is_not_hammered(
    server: FakeServer, backing: Backing, autojump_clock: trio.testing.MockClock
) -> None:
    server.failure = away()
    with trio.move_on_after(3):
        await read(backing)
    assert len(server.opened_at) == 5
    assert server.reads == 10


async def test_one_bad_spot_does_not_take_the_connection_from_the_others(
    server: FakeServer, backing: Backing, autojump_clock: trio.testing.MockClock
) -> None:
    server.failures[512] = away("bad sector")

    async def steady() -> None:
        while True:
            await read(backing)
            await trio.sleep(0.01)

    with trio.move_on_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(steady)
            await trio.sleep(1)
            nursery.start_soon(read, backing, 512)
    assert len(server.opened_at) == 1
    assert server.reads > 1000


async def test_a_silent_source_is_replaced(
    server: FakeServer, backing: Backing, autojump_clock: trio.testing.MockClock
) -> None:
    await read(backing)
    server.held[16] = trio.Event()
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, backing, 16)
        await trio.sleep(STALL - 1)
        assert len(server.opened_at) == 1
        del server.held[16]
    assert len(server.opened_at) == 2
    assert trio.current_time() - start == pytest.approx(STALL + 0.1)
    assert "no answer for 30 seconds" in backing.statistics().last_error


async def test_a_silent_source_is_replaced_though_every_caller_gave_up_earlier(
    server: FakeServer, backing: Backing, autojump_clock: trio.testing.MockClock
) -> None:
    server.held[0] = trio.Event()
    for _ in range(7):
        with trio.move_on_after(STALL / 6):
            await read(backing)
    del server.held[0]
    assert await read(backing) == CONTENT[:16]
    assert len(server.opened_at) == 2


async def test_a_slow_request_lives_while_others_are_answered(
    server: FakeServer, backing: Backing, autojump_clock: trio.testing.MockClock
) -> None:
    slow = server.held[16] = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, backing, 16)
        for _ in range(100):
            await trio.sleep(0.7)
            await read(backing)
        slow.set()
    assert len(server.opened_at) == 1
    assert server.reads == 101, "it is not asked again"


async def test_an_opener_that_hangs_is_asked_again(autojump_clock: trio.testing.MockClock) -> None:
    calls = 0

    async def hang() -> Source:
        nonlocal calls
        calls += 1
        await trio.sleep_forever()
        raise AssertionError

    backing = Backing(hang, name="x")
    with trio.move_on_after(3 * STALL):
        await read(backing)
    assert calls == 3


async def test_a_final_error_is_remembered_until_reset(server: FakeServer, backing: Backing) -> None:
    server.refusal = BackingRefused("fake", "no such export")
    for _ in range(3):
        with pytest.raises(BackingRefused, match="no such export"):
            await read(backing)
    assert len(server.opened_at) == 1
    assert backing.statistics().state is BackingState.REFUSED
    server.refusal = None
    await backing.reset()
    assert await read(backing) == CONTENT[:16]


async def test_a_final_error_reaches_all_who_wait(server: FakeServer, backing: Backing) -> None:
    server.refusal = BackingRefused("fake", "no such export")
    failures = 0

    async def fail() -> None:
        nonlocal failures
        with pytest.raises(BackingRefused):
            await read(backing)
        failures += 1

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(fail)
    assert failures == 5
    assert len(server.opened_at) == 1


async def test_a_final_error_of_a_read_closes_the_source(server: FakeServer, backing: Backing) -> None:
    server.failure = BackingRefused("fake", "nonsense")
    with pytest.raises(BackingRefused):
        await read(backing)
    assert server.sources[0].closed.is_set()


async def test_an_answer_that_had_arrived_before_a_final_error_does_not_hide_it(server: FakeServer) -> None:
    class Early(FakeSource):
        async def aclose(self) -> None:
            await trio.lowlevel.checkpoint()

    async def opener() -> Source:
        await trio.lowlevel.checkpoint()
        return Early(server)

    backing = Backing(opener, name="x")
    server.held[16] = trio.Event()
    server.failures[0] = BackingRefused("fake", "nonsense")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, backing, 16)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(BackingRefused, match="nonsense"):
            await read(backing, 0)
        server.held[16].set()
    assert backing.statistics().state is BackingState.REFUSED
    assert "nonsense" in backing.statistics().last_error


async def test_a_corrupt_entry_is_final_for_its_bytes_only(server: FakeServer, backing: Backing) -> None:
    server.failures[512] = CorruptEntry("fake", "entry")
    for _ in range(2):
        with pytest.raises(CorruptEntry):
            await read(backing, 512)
    assert await read(backing) == CONTENT[:16]
    assert len(server.opened_at) == 1
    assert backing.statistics().state is BackingState.HEALTHY
    assert backing.statistics().last_error == "fake: entry"


@pytest.mark.parametrize(
    ("expected", "same"),
    [
        (Identity(len(CONTENT), "etag:1"), True),
        (Identity(len(CONTENT)), True),
        (Identity(len(CONTENT), "etag:2"), False),
        (Identity(512, "etag:1"), False),
        (Identity(512), False),
    ],
)
async def test_only_the_expected_content_is_read(server: FakeServer, expected: Identity, same: bool) -> None:
    backing = backing_of(server, expected)
    assert backing.statistics().size == expected.size
    if same:
        assert await read(backing) == CONTENT[:16]
    else:
        with pytest.raises(BackingChanged, match="nbd://host/x: is not what the image was made on: it"):
            await read(backing)
        assert server.sources[0].closed.is_set()
        assert server.reads == 0


async def test_a_content_that_changes_behind_a_reconnection_is_not_mixed_in(
    server: FakeServer, backing: Backing, autojump_clock: trio.testing.MockClock
) -> None:
    await read(backing)
    server.identity = Identity(len(CONTENT), "etag:2")
    server.failure = away()
    with pytest.raises(BackingChanged):
        await read(backing)
    server.failure = None
    with pytest.raises(BackingChanged):
        await read(backing)
    await backing.reset(expected=server.identity)
    assert await read(backing) == CONTENT[:16]


async def test_reset_finds_the_identity_anew(server: FakeServer, backing: Backing) -> None:
    assert await backing.identity() == server.identity
    server.identity = Identity(1024, "etag:2")
    await backing.reset()
    assert await backing.size() == 1024


async def test_reset_repeats_the_reads_under_way_on_the_new_source(server: FakeServer, backing: Backing) -> None:
    server.held[0] = trio.Event()
    answers: list[bytes] = []

    async def ask() -> None:
        answers.append(await read(backing))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        del server.held[0]
        await backing.reset()
    assert answers == [CONTENT[:16]]
    assert len(server.sources) == 2


async def test_a_source_whose_opening_began_before_a_reset_is_not_used(server: FakeServer) -> None:
    gate = trio.Event()

    async def stubborn() -> Source:
        with trio.CancelScope(shield=True):
            source = await server.open()
            await gate.wait()
        return source

    backing = Backing(stubborn, name="x")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, backing)
        await trio.testing.wait_all_tasks_blocked()
        await backing.reset()
        server.identity = Identity(1024, "etag:2")
        gate.set()
    assert await backing.size() == 1024
    assert [source.closed.is_set() for source in server.sources] == [True, False]
    assert backing.statistics().last_error == ""


@pytest.mark.parametrize("where", ["read", "pause", "open"])
async def test_closing_fails_whatever_waits(
    server: FakeServer, backing: Backing, where: str, autojump_clock: trio.testing.MockClock
) -> None:
    def prepare() -> Callable[[], None]:
        return {
            "read": lambda: server.held.update({0: trio.Event()}),
            "pause": lambda: setattr(server, "refusal", away()),
            "open": lambda: None,
        }[where]

    prepare()()
    ended = 0

    async def fail() -> None:
        nonlocal ended
        with pytest.raises(BackingUnavailable, match="is closed"):
            await read(backing)
        ended += 1

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(fail)
        if where != "open":
            await trio.sleep(5)
        start = trio.current_time()
        await backing.aclose()
    assert ended == 3
    assert trio.current_time() == start
    assert all(source.closed.is_set() for source in server.sources)


async def test_the_format_is_what_the_source_tells(server: FakeServer) -> None:
    backing = Backing(server.open, name="x")
    assert backing.format == ""
    await backing.size()
    assert backing.format == "raw"


@pytest.fixture
def changing(server: FakeServer) -> Backing:
    return Backing(server.open, name="nbd://host/x", changing=True, jitter=lambda: 1.0)


async def test_while_the_content_changes_a_new_connection_may_find_anything(
    server: FakeServer, changing: Backing, autojump_clock: trio.testing.MockClock
) -> None:
    await read(changing)
    server.identity = Identity(64, "etag:2")
    server.failure = away("reset")

    async def return_again() -> None:
        await trio.sleep(1)
        server.failure = None

    async with trio.open_nursery() as nursery:
        nursery.start_soon(return_again)
        assert await read(changing, 60) == CONTENT[60:64] + bytes(12)
    assert await changing.size() == 64


async def test_a_source_that_finds_its_changing_content_changed_makes_way_for_a_new_one(
    server: FakeServer, changing: Backing, autojump_clock: trio.testing.MockClock
) -> None:
    await read(changing)
    server.failures[0] = BackingChanged("fake", "has been changed")
    async with trio.open_nursery() as nursery:

        async def heal() -> None:
            await trio.sleep(0.5)
            server.failures.clear()

        nursery.start_soon(heal)
        assert await read(changing) == CONTENT[:16]
    assert len(server.sources) > 2


async def test_a_source_that_remembers_serves_one_request_while_the_content_changes(
    server: FakeServer, changing: Backing
) -> None:
    server.at_hand = True
    for _ in range(2):
        assert not changing.read_nowait(0, memoryview(bytearray(16)))
        await read(changing)
    assert len(server.sources) == 3  # one to stay connected, one for each read
    assert [source.closed.is_set() for source in server.sources] == [False, True, True]
    changing.settle(server.identity)
    await read(changing)
    assert len(server.sources) == 3


async def test_a_settled_content_is_compared_like_any_other(
    server: FakeServer, changing: Backing, autojump_clock: trio.testing.MockClock
) -> None:
    before = await changing.identity()
    changing.settle(before)
    server.identity = Identity(len(CONTENT), "etag:2")
    server.failure = away("reset")
    with pytest.raises(BackingChanged, match="etag:1 and is etag:2"):
        await read(changing)


async def test_a_connection_that_was_lost_before_the_content_settled_does_not_bring_another_one(
    server: FakeServer, changing: Backing
) -> None:
    await changing.identity()
    changing.settle(Identity(len(CONTENT), "etag:0"))
    with pytest.raises(BackingRefused, match="etag:0 and is etag:1"):
        await read(changing)
