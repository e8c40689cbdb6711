"""A backing on an NBD server with faults: connections that end anywhere, errors, and answers that break the rules."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from qedfs.backing.base import Extent
from qedfs.backing.nbd import open_nbd
from qedfs.backing.resilient import Backing, BackingState
from qedfs.errors import BackingRefused
from qedfs.nbd.constants import Chunk, Errno
from tests.nbd.faulty_server import (
    CONTENT,
    ZEROS,
    Asked,
    Ending,
    Fault,
    FaultyServer,
    chunk,
    data,
    error,
    error_at,
    hole,
    simple,
    status,
)

POS, LENGTH = ZEROS - 8, 20
"""A few bytes of the hole and of what follows, so that an answer has a chunk of each kind."""
TRUE_EXTENTS = [Extent(8, True), Extent(12, False)]


@asynccontextmanager
async def reached(server: FaultyServer) -> AsyncIterator[Backing]:
    async with server.listening() as address:
        backing = Backing(lambda: open_nbd(address, connections=1), name="server", jitter=lambda: 0.0)
        try:
            yield backing
        finally:
            await backing.aclose()


async def read(backing: Backing, pos: int = POS, length: int = LENGTH) -> bytes:
    buffer = bytearray(b"?" * length)
    await backing.read_into(pos, memoryview(buffer))
    return bytes(buffer)


async def check(backing: Backing, structured: bool = True) -> None:
    assert await read(backing) == CONTENT[POS : POS + LENGTH]
    assert await backing.extents(POS, LENGTH) == (TRUE_EXTENTS if structured else [Extent(LENGTH, False)])


# --- connections that end ---------------------------------------------------------------------------------------------


async def conversation(structured: bool) -> int:
    """Return how many bytes the server has to send in all: greeting, options, data, hole, extents."""
    server = FaultyServer(structured=structured)
    async with reached(server) as backing:
        await check(backing, structured)
    assert server.connections == 1
    return server.sent


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
@pytest.mark.parametrize("ending", Ending)
async def test_server_lost_after_any_byte_is_asked_over_the_next_connection(
    ending: Ending, structured: bool, autojump_clock: trio.testing.MockClock
) -> None:
    # A packet through the loopback takes a moment in which nothing runs here.
    autojump_clock.autojump_threshold = 0.002 if ending is Ending.SILENCE else 0.0005
    whole = await conversation(structured)
    assert whole > (200 if structured else 100)
    for cut in range(whole):
        server = FaultyServer(structured=structured, cut=cut, ending=ending)
        async with reached(server) as backing:
            await check(backing, structured)
            assert server.connections >= 2, f"after {cut} bytes"
            assert backing.statistics().state is BackingState.HEALTHY


# --- answers that say it did not work ---------------------------------------------------------------------------------

FAILURES: dict[str, Fault] = {
    "alone": lambda asked: error(asked, Errno.EIO, b"bad sector"),
    "without a text": lambda asked: error(asked, Errno.EIO),
    "after all of the data": lambda asked: data(asked, 0, LENGTH) + error(asked, Errno.EIO),
    "between data": lambda asked: (
        data(asked, 0, 5) + error(asked, Errno.EIO, done=False) + data(asked, 5, 9, done=True)
    ),
    "after a hole": lambda asked: hole(asked, 0, LENGTH) + error(asked, Errno.EIO),
    "of one place": lambda asked: data(asked, 0, 5) + error_at(asked, Errno.EIO, 5),
    "several": lambda asked: error(asked, Errno.EIO, done=False) * 3 + error(asked, Errno.EINVAL),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
async def test_failed_read_is_asked_again_over_the_same_or_another_connection(
    failure: Fault, autojump_clock: trio.testing.MockClock
) -> None:
    server = FaultyServer(reads=[failure, failure])
    async with reached(server) as backing:
        await check(backing)
        assert "EIO" in backing.statistics().last_error


async def test_failed_read_without_structured_replies_is_asked_again(autojump_clock: trio.testing.MockClock) -> None:
    async with reached(
        FaultyServer(structured=False, reads=[lambda asked: simple(asked, number=Errno.EIO)])
    ) as backing:
        await check(backing, structured=False)


async def test_failed_query_of_extents_is_asked_again(autojump_clock: trio.testing.MockClock) -> None:
    async with reached(FaultyServer(statuses=[lambda asked: error(asked, Errno.EIO)])) as backing:
        await check(backing)


@pytest.mark.parametrize("number", [Errno.EPERM, Errno.EINVAL, Errno.ENOTSUP])
async def test_error_that_does_not_pass_is_final(number: Errno) -> None:
    async with reached(FaultyServer(reads=[lambda asked: error(asked, number, b"said so")])) as backing:
        with pytest.raises(BackingRefused, match=f"{number.name}: said so"):
            await read(backing)
        assert backing.statistics().state is BackingState.REFUSED


# --- holes ------------------------------------------------------------------------------------------------------------


def holed(*holes: tuple[int, int]) -> Fault:
    """Return an answer with `holes`, relative to the request, and data between them, the last one first."""

    def answer(asked: Asked) -> bytes:
        edges = [0, *(edge for one in holes for edge in one), asked.length]
        gaps = [data(asked, start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
        parts = gaps + [hole(asked, *one) for one in holes]
        return b"".join(reversed(parts)) + chunk(asked, Chunk.NONE, done=True)

    return answer


@pytest.mark.parametrize(
    "holes", [[(0, 1)], [(1, 2), (3, 4)], [(511, 513)], [(1, 1000), (1000, 1023)], [(5, 1024)], [(0, 1024)]]
)
async def test_holes_of_any_alignment_are_zeros_and_nothing_around_them_is(holes: list[tuple[int, int]]) -> None:
    async with reached(FaultyServer(reads=[holed(*holes)])) as backing:
        # What stands there is not zeros, so a hole that is taken for longer or shorter than it is shows.
        expected = bytearray(CONTENT[ZEROS : ZEROS + 1024])
        for start, end in holes:
            expected[start:end] = bytes(end - start)
        assert await read(backing, ZEROS, 1024) == expected


# --- answers that break the rules -------------------------------------------------------------------------------------


def replaced(field: slice, value: bytes) -> Fault:
    """Return a right answer but for some bytes of its header: magic 0-3, flags 4-5, kind 6-7, cookie 8-15, length 16-19."""

    def answer(asked: Asked) -> bytes:
        message = bytearray(data(asked, 0, asked.length, done=True))
        message[field] = value
        return bytes(message)

    return answer


BROKEN: dict[str, Fault] = {
    "wrong magic": replaced(slice(0, 4), b"NBD!"),
    "magic of a request": replaced(slice(0, 4), struct.pack(">I", 0x25609513)),
    "unknown kind": replaced(slice(6, 8), struct.pack(">H", 99)),
    "unknown cookie": replaced(slice(8, 16), struct.pack(">Q", 1 << 40)),
    "length of nothing": replaced(slice(16, 20), bytes(4)),
    "length of less than a place": replaced(slice(16, 20), struct.pack(">I", 7)),
    "length of 4 GiB": replaced(slice(16, 20), struct.pack(">I", (1 << 32) - 1)),
    "data before what was asked for": lambda asked: data(asked, -1, asked.length, done=True),
    "data beyond what was asked for": lambda asked: data(asked, 0, asked.length + 1, done=True),
    "data of another place": lambda asked: data(asked, asked.length, 2 * asked.length, done=True),
    "data that stops early": lambda asked: data(asked, 0, asked.length - 1, done=True),
    "data that begins late": lambda asked: data(asked, 1, asked.length, done=True),
    "nothing": lambda asked: chunk(asked, Chunk.NONE, done=True),
    "data twice": lambda asked: data(asked, 0, asked.length) * 2,
    "data over data": lambda asked: data(asked, 0, 9) + data(asked, 8, asked.length, done=True),
    "hole over data": lambda asked: data(asked, 0, asked.length) + hole(asked, 3, 4, done=True),
    "data over a hole": lambda asked: hole(asked, 0, 9) + data(asked, 8, asked.length, done=True),
    "hole over a hole": lambda asked: hole(asked, 0, 9) + hole(asked, 8, asked.length, done=True),
    "hole before what was asked for": lambda asked: hole(asked, -1, asked.length, done=True),
    "hole beyond what was asked for": lambda asked: hole(asked, 0, asked.length + 1, done=True),
    "empty hole": lambda asked: hole(asked, 0, 0) + data(asked, 0, asked.length, done=True),
    "hole of half a header": lambda asked: chunk(asked, Chunk.OFFSET_HOLE, bytes(6), done=True),
    "extents for a read": lambda asked: status(asked, (asked.length, 0)),
    "simple reply with data": lambda asked: simple(asked, CONTENT[asked.pos : asked.pos + asked.length]),
    "simple error where chunks were agreed": lambda asked: simple(asked, number=Errno.EIO),
    "error without a number": lambda asked: error(asked, 0),
    "error with half of its text": lambda asked: chunk(
        asked, Chunk.ERROR, struct.pack(">IH", 5, 9) + b"half", done=True
    ),
    "error of a place outside": lambda asked: error_at(asked, Errno.EIO, asked.length),
}
BROKEN_STATUS: dict[str, Fault] = {
    "no extents": lambda asked: status(asked),
    "an empty extent": lambda asked: status(asked, (0, 3), (asked.length, 0)),
    "extents after the end": lambda asked: status(asked, (asked.length, 0), (1, 0)),
    "half an extent": lambda asked: chunk(asked, Chunk.BLOCK_STATUS, struct.pack(">III", 7, 20, 0)[:-1], done=True),
    "another context": lambda asked: chunk(asked, Chunk.BLOCK_STATUS, struct.pack(">III", 8, 20, 0), done=True),
    "data for extents": lambda asked: data(asked, 0, asked.length, done=True),
    "nothing": lambda asked: chunk(asked, Chunk.NONE, done=True),
    "unknown cookie": lambda asked: status(asked._replace(cookie=1 << 40), (asked.length, 0)),
}


async def check_refusal(server: FaultyServer) -> None:
    async with reached(server) as backing:
        outcomes: list[str] = []

        async def one() -> None:
            try:
                await check(backing)
            except BackingRefused as error:
                outcomes.append(str(error))

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(one)
        # Who was answered by the rules before has the right bytes, which `check` has seen; the others have none.
        assert outcomes
        assert all("the server" in outcome for outcome in outcomes)
        assert backing.statistics().state is BackingState.REFUSED
        connections = server.connections
        with pytest.raises(BackingRefused, match="the server"):
            await read(backing)
        assert server.connections == connections, "who breaks the rules is not asked again"


@pytest.mark.parametrize("fault", BROKEN.values(), ids=BROKEN)
async def test_answer_to_a_read_that_breaks_the_rules_is_refused(fault: Fault) -> None:
    await check_refusal(FaultyServer(reads=[fault]))


@pytest.mark.parametrize("fault", BROKEN_STATUS.values(), ids=BROKEN_STATUS)
async def test_answer_about_extents_that_breaks_the_rules_is_refused(fault: Fault) -> None:
    await check_refusal(FaultyServer(statuses=[fault]))


async def test_simple_reply_of_a_wrong_cookie_or_magic_is_refused() -> None:
    for fault in (lambda asked: simple(asked._replace(cookie=99), bytes(LENGTH)), lambda asked: b"HTTP/1.1 400 Bad"):
        await check_refusal(FaultyServer(structured=False, reads=[fault]))
