"""Stories of the transmission phase, from the client's side and from the server's."""

from __future__ import annotations

import itertools
import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.nbd.constants import CHUNK_DONE, Chunk, Command, CommandFlag, Errno, TransmissionFlag
from qedfs.nbd.errors import NbdProtocolError
from qedfs.nbd.negotiation import Agreement, BlockSizes
from qedfs.nbd.serving import Answers, Asked, ServerTransmission
from qedfs.nbd.transmission import ClientTransmission, Request

SIZE = 1 << 20
CONTEXT = 5
CHUNKS = Agreement(SIZE, TransmissionFlag.HAS_FLAGS, True, CONTEXT)
SIMPLE = Agreement(SIZE, TransmissionFlag.HAS_FLAGS)
CONTENT = random.Random(1).randbytes(SIZE)


def feed(machine: ClientTransmission, data: bytes, sizes: list[int] | None = None) -> list[Request]:
    """Hand `data` to the machine as a socket would, in receptions of at most `sizes`, over and over."""
    finished: list[Request] = []
    turn = 0
    while data:
        place = machine.place()
        count = min(len(place), len(data), sizes[turn % len(sizes)] if sizes else len(data))
        place[:count] = data[:count]
        finished += machine.received(count)
        data = data[count:]
        turn += 1
    return finished


def chunk(kind: int, cookie: int, payload: bytes = b"", done: bool = False) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, CHUNK_DONE * done, kind, cookie, len(payload)) + payload


def data(cookie: int, pos: int, length: int, done: bool = False) -> bytes:
    return chunk(Chunk.OFFSET_DATA, cookie, struct.pack(">Q", pos) + CONTENT[pos : pos + length], done)


def hole(cookie: int, pos: int, length: int, done: bool = False) -> bytes:
    return chunk(Chunk.OFFSET_HOLE, cookie, struct.pack(">QI", pos, length), done)


def error(cookie: int, number: int, text: bytes = b"", done: bool = False) -> bytes:
    return chunk(Chunk.ERROR, cookie, struct.pack(">IH", number, len(text)) + text, done)


def simple(cookie: int, number: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">IIQ", 0x67446698, number, cookie) + payload


def status(cookie: int, *extents: tuple[int, int], context: int = CONTEXT, done: bool = True) -> bytes:
    payload = struct.pack(">I", context) + b"".join(struct.pack(">II", *extent) for extent in extents)
    return chunk(Chunk.BLOCK_STATUS, cookie, payload, done)


def none(cookie: int) -> bytes:
    return chunk(Chunk.NONE, cookie, done=True)


def test_read_is_asked_for_and_answered_by_chunks_in_any_order() -> None:
    machine, buffer = ClientTransmission(CHUNKS), bytearray(b"x" * 3000)
    request, message = machine.read(1000, memoryview(buffer))
    assert message == struct.pack(">IHHQQI", 0x25609513, 0, Command.READ, request.cookie, 1000, 3000)
    assert feed(machine, data(0, 3000, 1000) + hole(0, 2000, 1000) + data(0, 1000, 1000)) == []
    assert machine.pending == 1
    assert feed(machine, none(0)) == [request]
    assert machine.pending == 0
    assert buffer == CONTENT[1000:2000] + bytes(1000) + CONTENT[3000:4000]


def test_simple_reply_fills_the_buffer() -> None:
    machine, buffer = ClientTransmission(SIMPLE), bytearray(100)
    request, _ = machine.read(7, memoryview(buffer))
    assert feed(machine, simple(0, 0, CONTENT[7:107])) == [request]
    assert buffer == CONTENT[7:107]


def test_payload_of_a_long_read_goes_straight_to_its_buffer() -> None:
    machine, buffer = ClientTransmission(CHUNKS), bytearray(500_000)
    machine.read(0, memoryview(buffer))
    feed(machine, data(0, 0, 500_000)[: 28 + 1000])
    place = machine.place()
    assert place.obj is buffer
    assert len(place) == 499_000


@given(st.data())
def test_any_order_interleaving_and_split_reads_the_same(draw: st.DataObject) -> None:
    machine = ClientTransmission(CHUNKS)
    requests: list[tuple[Request, bytearray]] = []
    pieces: list[tuple[int, int, int]] = []
    for cookie in range(draw.draw(st.integers(1, 4))):
        pos, length = draw.draw(st.integers(0, 1000)), draw.draw(st.integers(1, 70_000))
        buffer = bytearray(b"\xaa" * length)
        requests.append((machine.read(pos, memoryview(buffer))[0], buffer))
        cuts = sorted({0, length, *draw.draw(st.lists(st.integers(1, length), max_size=4))})
        pieces += [(cookie, pos + a, b - a) for a, b in itertools.pairwise(cuts)]
    pieces = draw.draw(st.permutations(pieces))
    left = [sum(piece[0] == cookie for piece in pieces) for cookie in range(len(requests))]
    stream = b""
    for cookie, pos, length in pieces:
        left[cookie] -= 1
        # DONE comes with the last piece, or alone behind it.
        with_it = left[cookie] == 0 and cookie % 2 == 0
        stream += data(cookie, pos, length, with_it)
        if left[cookie] == 0 and not with_it:
            stream += none(cookie)
    sizes = draw.draw(st.lists(st.integers(1, 40_000), min_size=1, max_size=5))
    finished = feed(machine, stream, sizes)
    assert sorted(request.cookie for request in finished) == list(range(len(requests)))
    for request, buffer in requests:
        assert buffer == CONTENT[request.pos : request.pos + request.length]


def test_byte_by_byte_equals_all_at_once() -> None:
    stream = (
        data(0, 0, 100) + error(1, Errno.EIO, b"bad disk") + hole(0, 100, 50) + none(1) + none(0) + status(2, (50, 3))
    )
    for sizes in ([1], [len(stream)]):
        machine, buffer = ClientTransmission(CHUNKS), bytearray(b"x" * 150)
        whole, _ = machine.read(0, memoryview(buffer))
        failing, _ = machine.read(0, memoryview(bytearray(10)))
        asked, _ = machine.block_status(0, 50)
        assert feed(machine, stream, sizes) == [failing, whole, asked]
        assert buffer == CONTENT[:100] + bytes(50)
        assert failing.error is not None
        assert (failing.error.number, failing.error.why) == (Errno.EIO, "EIO: bad disk")
        assert asked.extents == [(50, True)]


def test_answer_goes_on_after_an_error_until_done() -> None:
    machine = ClientTransmission(CHUNKS)
    request, _ = machine.read(0, memoryview(bytearray(200)))
    assert feed(machine, error(0, Errno.EIO, b"first") + data(0, 0, 100) + error(0, Errno.EPERM, b"second")) == []
    at = chunk(Chunk.ERROR_OFFSET, 0, struct.pack(">IHQ", 5, 0, 199), done=True)
    assert feed(machine, at) == [request]
    assert request.error is not None
    assert request.error.why == "EIO: first"


def test_unknown_error_chunk_is_an_error() -> None:
    machine = ClientTransmission(CHUNKS)
    request, _ = machine.read(0, memoryview(bytearray(200)))
    feed(machine, chunk(0x8077, 0, struct.pack(">IH", 22, 2) + b"hi" + b"more", done=True))
    assert request.error is not None
    assert request.error.number == Errno.EINVAL


def test_simple_reply_with_an_error_has_no_payload() -> None:
    machine = ClientTransmission(SIMPLE)
    first, _ = machine.read(0, memoryview(bytearray(200)))
    second, _ = machine.read(0, memoryview(bytearray(2)))
    assert feed(machine, simple(0, Errno.ENOMEM) + simple(1, 0, b"ab")) == [first, second]
    assert first.error is not None
    assert second.error is None


def test_only_the_zero_flag_promises_zeros_and_the_last_extent_is_cut() -> None:
    machine = ClientTransmission(CHUNKS)
    request, message = machine.block_status(4096, 1000)
    assert struct.unpack(">IHHQQI", message)[2:] == (Command.BLOCK_STATUS, 0, 4096, 1000)
    feed(machine, status(0, (100, 0), (200, 1), (300, 2), (5000, 3)))
    assert request.extents == [(100, False), (200, False), (300, True), (400, True)]


def test_block_status_may_stop_early_and_be_longer_than_the_staging_buffer() -> None:
    machine = ClientTransmission(CHUNKS)
    request, _ = machine.block_status(0, SIZE)
    feed(machine, status(0, *[(1, 3)] * 10_000))
    assert len(request.extents) == 10_000
    early, _ = machine.block_status(0, SIZE)
    feed(machine, status(1, (10, 0)))
    assert early.extents == [(10, False)]


def test_block_status_may_fail_by_a_simple_reply() -> None:
    machine = ClientTransmission(CHUNKS)
    request, _ = machine.block_status(0, SIZE)
    assert feed(machine, simple(0, Errno.EINVAL)) == [request]
    assert request.error is not None


@pytest.mark.parametrize("before", [0, 5, 20, 28, 500, 60_000])
def test_abandoned_read_is_drained_without_touching_its_buffer(before: int) -> None:
    machine, gone, kept = ClientTransmission(CHUNKS), bytearray(100_000), bytearray(100)
    first, _ = machine.read(0, memoryview(gone))
    second, _ = machine.read(50, memoryview(kept))
    stream = data(0, 0, 100_000, True) + data(1, 50, 100, True)
    feed(machine, stream[:before])
    machine.abandon(first)
    gone[:] = bytes(len(gone))
    assert feed(machine, stream[before:]) == [first, second]
    assert not any(gone)
    assert kept == CONTENT[50:150]


def test_abandoned_hole_and_status_are_harmless() -> None:
    machine, gone = ClientTransmission(CHUNKS), bytearray(b"x" * 10)
    first, _ = machine.read(0, memoryview(gone))
    second, _ = machine.block_status(0, SIZE)
    stream = hole(0, 0, 10, True) + status(1, *[(1, 3)] * 10_000)
    machine.abandon(first)
    feed(machine, stream[:40_000])
    machine.abandon(second)
    assert feed(machine, stream[40_000:]) == [second]
    assert gone == b"x" * 10


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (b"HTTP/1.1 400 Bad", "wrong magic"),
        (data(77, 0, 100), "was not made"),
        (simple(0, 0, bytes(100)), "simple reply"),
        (data(0, 0, 100) + data(0, 50, 10), "twice"),
        (hole(0, 10, 10) + data(0, 5, 6), "twice"),
        (data(0, 10, 10) + hole(0, 0, 100), "twice"),
        (data(0, 50, 51), "outside"),
        (chunk(Chunk.OFFSET_DATA, 0, struct.pack(">Q", (1 << 64) - 1) + b"xy"), "outside"),
        (hole(0, (1 << 64) - 4, 8), "outside"),
        (hole(0, 0, (1 << 32) - 1), "outside"),
        (hole(0, 0, 0), "empty hole"),
        (chunk(Chunk.OFFSET_HOLE, 0, b"123"), "wrong length"),
        (chunk(Chunk.OFFSET_DATA, 0, bytes(8)), "without data"),
        (data(0, 0, 99, True), "before it was complete"),
        (none(0), "before it was complete"),
        (chunk(Chunk.NONE, 0), "empty chunk"),
        (chunk(Chunk.NONE, 0, b"x", True), "empty chunk"),
        (chunk(Chunk.ERROR, 0, b"12"), "malformed"),
        (error(0, 0), "malformed"),
        (chunk(Chunk.ERROR, 0, struct.pack(">IH", 5, 100) + b"short"), "malformed"),
        (chunk(Chunk.ERROR_OFFSET, 0, struct.pack(">IHQ", 5, 0, 100)), "outside"),
        (chunk(Chunk.ERROR_OFFSET, 0, struct.pack(">IH", 5, 0)), "outside"),
        (chunk(77, 0), "does not belong"),
        (status(0, (10, 0)), "does not belong"),
        (struct.pack(">IHHQI", 0x668E33EF, 0, 0x8001, 0, 1 << 31), "too much"),
        (error(0, 5) * 5000, "does not stop"),
        (none(1), "without an answer"),
        (simple(1), "without an answer"),
        (data(1, 0, 10), "does not belong"),
        (status(1, (10, 0), context=6), "context"),
        (status(1, (0, 0)), "no blocks"),
        (status(1, (100, 0), (1, 0)), "not asked"),
        (status(1, (10, 0), done=False) + status(1, (10, 0)), "twice"),
        (status(1), "cannot be"),
        (chunk(Chunk.BLOCK_STATUS, 1, bytes(13)), "cannot be"),
        (struct.pack(">IHHQI", 0x668E33EF, 0, 5, 1, (1 << 32) - 4), "cannot be"),
        (none(1) + none(1), "answer"),
    ],
)
def test_misbehaving_server_is_found_out(stream: bytes, why: str) -> None:
    for sizes in ([1], [1 << 20]):
        machine = ClientTransmission(CHUNKS)
        machine.read(0, memoryview(bytearray(100)))
        machine.block_status(0, 100)
        with pytest.raises(NbdProtocolError, match=why):
            feed(machine, stream, sizes)


def test_chunks_that_were_not_agreed_are_refused() -> None:
    machine = ClientTransmission(SIMPLE)
    machine.read(0, memoryview(bytearray(100)))
    with pytest.raises(NbdProtocolError, match="wrong magic"):
        feed(machine, data(0, 0, 100, True))


@given(st.binary(max_size=300), st.lists(st.integers(1, 50), min_size=1, max_size=3))
def test_noise_is_a_protocol_error_or_waits_for_more(noise: bytes, sizes: list[int]) -> None:
    machine = ClientTransmission(CHUNKS)
    machine.read(0, memoryview(bytearray(100)))
    try:
        feed(machine, struct.pack(">I", 0x668E33EF) + noise, sizes)
    except NbdProtocolError:
        pass


# The server's side.


def ask(command: int, pos: int = 0, length: int = 512, flags: int = 0, cookie: int = 1) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, pos, length)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=4))
def test_server_cuts_requests_however_they_arrive(sizes: list[int]) -> None:
    stream = (
        ask(Command.READ, cookie=1)
        + ask(Command.WRITE, length=700, cookie=2)
        + bytes(700)
        + ask(Command.DISC, cookie=3)
    )
    machine, asked, turn = ServerTransmission(CHUNKS), [], 0
    while stream:
        size = sizes[turn % len(sizes)]
        asked += machine.receive(stream[:size])
        stream, turn = stream[size:], turn + 1
    assert [(a.command, a.cookie, a.refusal) for a in asked] == [(0, 1, 0), (1, 2, Errno.EPERM), (2, 3, 0)]


@pytest.mark.parametrize(
    ("message", "agreement", "refusal"),
    [
        (ask(Command.READ, SIZE - 512), CHUNKS, 0),
        (ask(Command.READ, SIZE - 511), CHUNKS, Errno.EINVAL),
        (ask(Command.READ, (1 << 64) - 1), CHUNKS, Errno.EINVAL),
        (ask(Command.READ, length=0), CHUNKS, Errno.EINVAL),
        (ask(Command.READ, flags=CommandFlag.DF), CHUNKS, 0),
        (ask(Command.READ, flags=CommandFlag.DF), SIMPLE, Errno.EINVAL),
        (ask(Command.READ, flags=0x4000), CHUNKS, Errno.EINVAL),
        (
            ask(Command.READ, length=4097),
            Agreement(SIZE, TransmissionFlag(3), blocks=BlockSizes(1, 1, 4096)),
            Errno.EINVAL,
        ),
        (ask(Command.BLOCK_STATUS, length=SIZE), CHUNKS, 0),
        (ask(Command.BLOCK_STATUS, flags=CommandFlag.REQ_ONE), CHUNKS, 0),
        (ask(Command.BLOCK_STATUS), SIMPLE, Errno.EINVAL),
        (ask(Command.TRIM), CHUNKS, Errno.EPERM),
        (ask(Command.WRITE_ZEROES), CHUNKS, Errno.EPERM),
        (ask(Command.FLUSH), CHUNKS, Errno.EINVAL),
        (ask(99), CHUNKS, Errno.EINVAL),
    ],
)
def test_server_judges_requests(message: bytes, agreement: Agreement, refusal: int) -> None:
    (asked,) = ServerTransmission(agreement).receive(message)
    assert asked.refusal == refusal


def test_server_ends_with_a_client_that_is_out_of_step() -> None:
    with pytest.raises(NbdProtocolError, match="something else"):
        ServerTransmission(CHUNKS).receive(b"GET / HTTP/1.1\r\nHost: example\r\n")


@pytest.mark.parametrize("agreement", [CHUNKS, SIMPLE])
def test_client_understands_what_the_server_writes(agreement: Agreement) -> None:
    machine, answers, buffer = ClientTransmission(agreement), Answers(agreement), bytearray(100)
    whole, message = machine.read(50, memoryview(buffer))
    failing, _ = machine.read(0, memoryview(bytearray(1)))
    assert ServerTransmission(agreement).receive(message) == [Asked(Command.READ, 0, whole.cookie, 50, 100, 0)]
    header = bytearray(answers.data_header)
    answers.put_data_header(memoryview(header), whole.cookie, 50, 100, True)
    stream = bytes(header) + CONTENT[50:150] + answers.error(failing.cookie, Errno.EIO, "why not")
    assert feed(machine, stream) == [whole, failing]
    assert buffer == CONTENT[50:150]
    assert failing.error is not None
    assert failing.error.number == Errno.EIO


def test_client_understands_the_servers_block_status() -> None:
    machine, answers = ClientTransmission(CHUNKS), Answers(CHUNKS)
    request, _ = machine.block_status(0, 300)
    feed(machine, answers.status(request.cookie, [(100, True), (200, False)]))
    assert request.extents == [(100, True), (200, False)]
