"""Second requests for stragglers, on a virtual clock, with answers at the times that a test says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from qedfs.backing.hedge import Hedge
from qedfs.backing.stragglers import FACTOR, FEWEST
from qedfs.errors import BackingRefused, BackingUnavailable, QedfsError

USUAL = 0.1
LATE = FACTOR * USUAL


class Server:
    """Answers the requests of a read after the seconds in `times`, each with its number, or with an error."""

    def __init__(self, *times: float | tuple[float, QedfsError]) -> None:
        self._times = list(times)
        self.asked = 0
        self.dropped: list[int] = []

    async def ask(self, buffer: memoryview) -> None:
        number, self.asked = self.asked, self.asked + 1
        time = self._times[number]
        seconds, error = time if isinstance(time, tuple) else (time, None)
        try:
            await trio.sleep(seconds)
        except trio.Cancelled:
            self.dropped.append(number)
            raise
        if error is not None:
            raise error
        buffer[:] = bytes([number]) * len(buffer)


@pytest.fixture
async def hedge(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> Hedge:
    """One that knows how long requests take, and has saved up two second ones."""
    hedge = Hedge()
    nursery.start_soon(hedge.watch)
    await trio.testing.wait_all_tasks_blocked()
    for _ in range(FEWEST):
        await read(hedge, Server(USUAL))
    return hedge


async def read(hedge: Hedge, server: Server, urgent: Callable[[], bool] = lambda: True) -> tuple[int, float]:
    """Return which request of `server` was the answer, and the seconds that it took, to a tenth.

    The clock lets a sleep end some milliseconds late.
    """
    buffer, began = bytearray(b"\xff" * 8), trio.current_time()
    await hedge.read(server.ask, memoryview(buffer), urgent)
    assert len(set(buffer)) == 1
    return buffer[0], round(trio.current_time() - began, 1)


async def test_a_usual_answer_is_asked_for_once(hedge: Hedge, autojump_clock: trio.testing.MockClock) -> None:
    server = Server(USUAL)
    assert await read(hedge, server) == (0, USUAL)
    assert (server.asked, hedge.asked_twice) == (1, 0)


async def test_a_straggler_is_asked_for_again_and_dropped_when_the_second_answers(
    hedge: Hedge, autojump_clock: trio.testing.MockClock
) -> None:
    server = Server(60, USUAL)
    assert await read(hedge, server) == (1, round(LATE + USUAL, 1))
    assert server.dropped == [0]
    assert hedge.asked_twice == 1


async def test_the_second_one_is_dropped_when_the_first_answers_after_all(
    hedge: Hedge, autojump_clock: trio.testing.MockClock
) -> None:
    server = Server(LATE + 0.1, 2 * USUAL)
    assert await read(hedge, server) == (0, round(LATE + 0.1, 1))
    await trio.testing.wait_all_tasks_blocked()
    assert server.dropped == [1]


async def test_nobody_asks_twice_for_what_nobody_waits_for(
    hedge: Hedge, autojump_clock: trio.testing.MockClock
) -> None:
    assert await read(hedge, Server(5), lambda: False) == (0, 5)
    assert hedge.asked_twice == 0


async def test_a_background_request_that_a_guest_joins_is_asked_for_again(
    hedge: Hedge, autojump_clock: trio.testing.MockClock
) -> None:
    joins = trio.current_time() + 1
    answer, seconds = await read(hedge, Server(60, USUAL), lambda: trio.current_time() >= joins)
    assert answer == 1
    assert seconds <= 1 + LATE + USUAL


async def test_extra_load_stays_bounded_when_everything_is_slow(
    hedge: Hedge, autojump_clock: trio.testing.MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(read, hedge, Server(10, 10))
    assert 0 < hedge.asked_twice <= 2 + 5


async def test_an_error_of_the_first_waits_for_the_second(hedge: Hedge, autojump_clock: trio.testing.MockClock) -> None:
    gone = BackingUnavailable("server", "gone")
    assert await read(hedge, Server((LATE + 0.03, gone), USUAL)) == (1, round(LATE + USUAL, 1))


async def test_when_both_fail_the_first_error_is_the_answer(
    hedge: Hedge, autojump_clock: trio.testing.MockClock
) -> None:
    server = Server(
        (LATE + 0.03, BackingUnavailable("server", "first")), (USUAL, BackingUnavailable("server", "second"))
    )
    with pytest.raises(BackingUnavailable, match="first"):
        await read(hedge, server)


async def test_an_error_of_the_second_is_nobodys_concern(hedge: Hedge, autojump_clock: trio.testing.MockClock) -> None:
    server = Server(2 * LATE, (0.01, BackingRefused("server", "second")))
    assert await read(hedge, server) == (0, 2 * LATE)


async def test_who_gives_up_takes_both_requests_with_him(hedge: Hedge, autojump_clock: trio.testing.MockClock) -> None:
    server = Server(60, 60)
    with trio.move_on_after(1):
        await read(hedge, server)
    await trio.testing.wait_all_tasks_blocked()
    assert sorted(server.dropped) == [0, 1]


async def test_without_a_watcher_nothing_is_asked_twice(autojump_clock: trio.testing.MockClock) -> None:
    hedge = Hedge()
    for _ in range(FEWEST):
        await read(hedge, Server(USUAL))
    assert await read(hedge, Server(5)) == (0, 5)
