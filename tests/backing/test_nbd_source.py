"""The NBD source against nbdkit and qemu-nbd, and against scripted servers where a real one would behave.

A real server gets its listening socket from the test (systemd's socket activation). So a connection can be made before
the server is up, nothing needs to wait for it, and it can be killed and started again at the same address.
"""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from qedfs.backing.base import Extent
from qedfs.backing.nbd import NbdSource, cut, open_nbd
from qedfs.errors import BackingChanged, BackingRefused, BackingUnavailable
from qedfs.nbd.address import NbdAddress, parse_address
from qedfs.nbd.constants import TransmissionFlag
from qedfs.nbd.negotiation import Agreement, BlockSizes, ServerHandshake
from qedfs.nbd.serving import Answers, Asked, ServerTransmission
from qedfs.turns import Turns, beside

MIB = 1 << 20


class RealServer:
    """A server program on a listening socket of ours, which stays when the program is killed."""

    def __init__(self, place: Path | None) -> None:
        self._path = place
        self._process: subprocess.Popen[bytes] | None = None
        self._listener = socket.socket(socket.AF_INET if place is None else socket.AF_UNIX)
        self._listener.bind(("127.0.0.1", 0) if place is None else str(place))
        self._listener.listen(64)
        name = f"nbd:unix:{place}" if place is not None else f"nbd:127.0.0.1:{self._listener.getsockname()[1]}"
        self.address = parse_address(name)

    def start(self, command: str) -> None:
        # LISTEN_PID has to be the server's own, which the shell is until exec. Descriptor 3 is where it looks.
        script = f"exec 3<&{self._listener.fileno()}; LISTEN_PID=$$ LISTEN_FDS=1 exec {command}"
        self._process = subprocess.Popen(
            ["bash", "-c", script], pass_fds=[self._listener.fileno()], stderr=subprocess.DEVNULL
        )

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(timeout=10)
            self._process = None

    def vanish(self) -> None:
        """Kill the program and let go of the address."""
        self.kill()
        self._listener.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)


@pytest.fixture
def real(tmp_path: Path) -> Iterator[RealServer]:
    server = RealServer(tmp_path / "nbd.sock")
    yield server
    server.vanish()


@pytest.fixture
def disk(tmp_path: Path) -> tuple[Path, bytes]:
    """A raw file of 8 MiB: data, 2 MiB of hole, data."""
    content = random.Random(7).randbytes(3 * MIB) + bytes(2 * MIB) + random.Random(8).randbytes(3 * MIB)
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.write(content[: 3 * MIB])
        file.seek(5 * MIB)
        file.write(content[5 * MIB :])
    return path, content


@contextlib.asynccontextmanager
async def opened(address: NbdAddress, connections: int = 4) -> AsyncIterator[NbdSource]:
    source = await open_nbd(address, connections=connections)
    try:
        yield source
    finally:
        await source.aclose()


async def read(source: NbdSource, pos: int, length: int) -> bytes:
    buffer = bytearray(length)
    await source.read_into(pos, memoryview(buffer))
    return bytes(buffer)


def pattern(pos: int, length: int) -> bytes:
    """What nbdkit's pattern plugin serves: every 8 bytes hold their own position."""
    first = pos // 8 * 8
    whole = b"".join(struct.pack(">Q", p) for p in range(first, pos + length, 8))
    return whole[pos - first : pos - first + length]


async def check_parallel_reads(source: NbdSource, content: Callable[[int, int], bytes], count: int = 400) -> None:
    rng = random.Random(3)

    async def reader(pos: int, length: int) -> None:
        assert await read(source, pos, length) == content(pos, length)

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            length = rng.choice([1, 511, 4096, 10_000, 65_536])
            nursery.start_soon(reader, rng.randrange(source.size - length), length)


@pytest.mark.parametrize(
    "options",
    ["pattern 16M", "--filter=delay pattern 16M rdelay=5ms", "--no-sr pattern 16M"],
    ids=["plain", "delayed", "simple-replies"],
)
async def test_many_parallel_readers_get_their_own_bytes(real: RealServer, options: str) -> None:
    real.start(f"nbdkit -f {options}")
    async with opened(real.address) as source:
        assert source.size == source.identity.size == 16 * MIB
        await check_parallel_reads(source, pattern)
        assert source.connections == 4
        assert await read(source, 0, 5 * MIB) == pattern(0, 5 * MIB)


async def test_server_without_multi_conn_gets_one_connection(real: RealServer) -> None:
    real.start("nbdkit -f --filter=multi-conn pattern 16M multi-conn-mode=disable")
    async with opened(real.address) as source:
        await check_parallel_reads(source, pattern)
        assert source.connections == 1


async def test_tcp_works_like_a_unix_socket() -> None:
    server = RealServer(None)
    try:
        server.start("nbdkit -f pattern 1M")
        async with opened(server.address) as source:
            await check_parallel_reads(source, pattern, 50)
    finally:
        server.vanish()


async def test_two_sources_in_one_process_do_not_meet(tmp_path: Path) -> None:
    one, two = RealServer(tmp_path / "one"), RealServer(tmp_path / "two")
    try:
        one.start("nbdkit -f pattern 16M")
        two.start("nbdkit -f data data='0x55*1048576' size=16M")
        async with opened(one.address) as first, opened(two.address) as second, trio.open_nursery() as nursery:
            nursery.start_soon(check_parallel_reads, first, pattern, 100)
            nursery.start_soon(
                check_parallel_reads,
                second,
                lambda pos, length: (b"\x55" * MIB + bytes(15 * MIB))[pos : pos + length],
                100,
            )
    finally:
        one.vanish()
        two.vanish()


async def test_block_size_limits_are_obeyed(real: RealServer) -> None:
    policy = "blocksize-minimum=4096 blocksize-preferred=8192 blocksize-maximum=65536 blocksize-error-policy=error"
    real.start(f"nbdkit -f --filter=blocksize-policy pattern 1M {policy}")
    async with opened(real.address) as source:
        await check_parallel_reads(source, pattern, 100)
        assert await read(source, 0, MIB) == pattern(0, MIB)
        assert await read(source, 4095, 2) == pattern(4095, 2)
        assert await source.extents(5, 100_000) == [Extent(100_000, False)]


async def test_only_promised_zeros_are_extents_of_zeros(real: RealServer) -> None:
    real.start("nbdkit -f data data='@65536 0x55*65536' size=1M")
    async with opened(real.address) as source:
        zeros, found = [], 0
        for length, zero in await source.extents(0, source.size):
            zeros += [(found, length)] if zero else []
            found += length
        assert found == source.size
        assert zeros
        for pos, length in zeros:
            assert not any(await read(source, pos, length))
        assert await source.extents(70_000, 10) == [Extent(10, False)]


async def test_server_without_extents_has_data_only(real: RealServer) -> None:
    real.start("nbdkit -f --no-sr memory 1M")
    async with opened(real.address) as source:
        assert await source.extents(10, 1000) == [Extent(1000, False)]


async def test_error_of_the_server_passes_or_is_final_by_its_number(real: RealServer) -> None:
    for name, kind in (("EIO", BackingUnavailable), ("ENOMEM", BackingUnavailable), ("EPERM", BackingRefused)):
        real.start(f"nbdkit -f --filter=error pattern 1M error-pread={name} error-pread-rate=100%")
        async with opened(real.address) as source:
            with pytest.raises(kind, match=name):
                await read(source, 0, 512)
        real.kill()


async def test_failing_reads_leave_others_intact(real: RealServer) -> None:
    real.start("nbdkit -f --filter=error pattern 1M error-pread=EIO error-pread-rate=50%")
    results: list[bool] = []
    async with opened(real.address) as source:

        async def reader(pos: int) -> None:
            try:
                assert await read(source, pos, 4096) == pattern(pos, 4096)
                results.append(True)
            except BackingUnavailable:
                results.append(False)

        async with trio.open_nursery() as nursery:
            for pos in range(0, MIB, 4096):
                nursery.start_soon(reader, pos)
    assert {True, False} == set(results)


async def test_oldstyle_server_is_refused_with_the_reason(real: RealServer) -> None:
    real.start("nbdkit -f -o memory 1M")
    with pytest.raises(BackingRefused, match="oldstyle"):
        await open_nbd(real.address)


async def test_missing_export_is_refused(real: RealServer, disk: tuple[Path, bytes]) -> None:
    real.start(f"qemu-nbd -t -r -f raw -x disk {shlex.quote(str(disk[0]))}")
    with pytest.raises(BackingRefused, match="no such export"):
        await open_nbd(NbdAddress(False, None, 0, real.address.socket, "other"))
    async with opened(NbdAddress(False, None, 0, real.address.socket, "disk")) as source:
        assert await read(source, 0, 1000) == disk[1][:1000]


async def test_nobody_there_may_pass(tmp_path: Path) -> None:
    with pytest.raises(BackingUnavailable, match="cannot connect"):
        await open_nbd(parse_address(f"nbd:unix:{tmp_path}/none"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(BackingUnavailable, match="cannot connect"):
        await open_nbd(parse_address(f"nbd:127.0.0.1:{port}"))


async def test_impossible_host_is_refused() -> None:
    with pytest.raises(BackingRefused):
        await open_nbd(parse_address(f"nbd:{'x' * 100}..y:1"))


@pytest.mark.parametrize("image", ["raw", "qcow2"])
async def test_qemu_nbd_serves_content_and_holes(
    real: RealServer, disk: tuple[Path, bytes], tmp_path: Path, image: str
) -> None:
    path, content = disk
    if image == "qcow2":
        path = tmp_path / "disk.qcow2"
        await trio.run_process(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk[0], path])
    real.start(f"qemu-nbd -t -r -e 8 -f {image} {shlex.quote(str(path))}")
    async with opened(real.address) as source:
        assert await read(source, 0, source.size) == content
        await check_parallel_reads(source, lambda pos, length: content[pos : pos + length])
        assert await source.extents(0, source.size) == [
            Extent(3 * MIB, False),
            Extent(2 * MIB, True),
            Extent(3 * MIB, False),
        ]
        assert await source.extents(3 * MIB - 10, 20) == [Extent(10, False), Extent(10, True)]


async def test_server_that_is_killed_and_started_again_goes_unnoticed(
    real: RealServer, disk: tuple[Path, bytes]
) -> None:
    path, content = disk
    command = f"qemu-nbd -t -r -e 8 -f raw {shlex.quote(str(path))}"
    real.start(command)
    async with opened(real.address) as source:
        reads = 0
        enough = trio.Event()

        async def reader(seed: int) -> None:
            nonlocal reads
            rng = random.Random(seed)
            for _ in range(60):
                pos = rng.randrange(source.size - 70_000)
                length = rng.choice([1, 4096, 70_000])
                assert await read(source, pos, length) == content[pos : pos + length]
                reads += 1
                if reads >= 100:
                    enough.set()

        async with trio.open_nursery() as nursery:
            for seed in range(16):
                nursery.start_soon(reader, seed)
            await enough.wait()
            real.kill()
            real.start(command)
        assert reads == 16 * 60


async def test_idle_connection_lost_unseen_is_replaced_by_the_next_read(real: RealServer) -> None:
    real.start("nbdkit -f pattern 1M")
    async with opened(real.address) as source:
        await check_parallel_reads(source, pattern, 100)
        real.kill()
        real.start("nbdkit -f pattern 1M")
        for _ in range(8):
            assert await read(source, 8, 4096) == pattern(8, 4096)


async def test_server_that_is_gone_may_pass_and_heals(real: RealServer, tmp_path: Path) -> None:
    real.start("nbdkit -f pattern 1M")
    async with opened(real.address) as source:
        await read(source, 0, 8)
        real.vanish()
        for _ in range(2):
            with pytest.raises(BackingUnavailable):
                await read(source, 0, 8)
        again = RealServer(tmp_path / "nbd.sock")
        again.start("nbdkit -f pattern 1M")
        try:
            assert await read(source, 16, 8) == pattern(16, 8)
        finally:
            again.vanish()


async def test_export_of_another_size_after_reconnect_is_refused_for_good(real: RealServer) -> None:
    real.start("nbdkit -f pattern 1M")
    async with opened(real.address) as source:
        await read(source, 0, 8)
        real.kill()
        real.start("nbdkit -f pattern 2M")
        with pytest.raises(BackingChanged, match="has now 2097152 bytes, had 1048576"):
            await read(source, 0, 8)
        real.kill()
        real.start("nbdkit -f pattern 1M")
        with pytest.raises(BackingChanged):
            await read(source, 0, 8)


# Scripted servers: they hold an answer back until the test lets it go, or say what no real server would.

SIZE = 4 * MIB
FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY
AGREEMENT = Agreement(SIZE, FLAGS, True, 1)
Session = Callable[[trio.SocketStream, "Peer"], Awaitable[None]]


class Peer:
    """The server's end of one connection, after the handshake."""

    def __init__(self, stream: trio.abc.Stream, agreement: Agreement) -> None:
        self.answers = Answers(agreement)
        self._stream = stream
        self._machine = ServerTransmission(agreement)
        self._asked: list[Asked] = []

    async def next(self) -> Asked | None:
        """Return the next request, None when the client has hung up."""
        while not self._asked:
            data = await self._stream.receive_some()
            if not data:
                return None
            self._asked += self._machine.receive(bytes(data))
        return self._asked.pop(0)

    def data(self, asked: Asked) -> bytes:
        header = bytearray(self.answers.data_header)
        self.answers.put_data_header(memoryview(header), asked.cookie, asked.pos, asked.length, True)
        return bytes(header) + pattern(asked.pos, asked.length)


@contextlib.asynccontextmanager
async def scripted(path: Path, session: Session, agreement: Agreement = AGREEMENT) -> AsyncIterator[NbdAddress]:
    """Serve every connection with the handshake and then `session`."""

    async def serve(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            handshake = ServerHandshake("", agreement)
            await stream.send_all(handshake.receive(b""))
            while wanted := handshake.wants:
                await stream.send_all(handshake.receive(bytes(await stream.receive_some(wanted))))
            assert handshake.result is not None
            await session(stream, Peer(stream, handshake.result))

    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.bind(os.fspath(path))
    sock.listen(16)
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, [trio.SocketListener(sock)])
        yield parse_address(f"nbd:unix:{path}")
        nursery.cancel_scope.cancel()


async def well_behaved(stream: trio.SocketStream, peer: Peer) -> None:
    while (asked := await peer.next()) is not None and asked.command != 2:
        await stream.send_all(peer.data(asked))


@pytest.mark.parametrize("cancelled_first", [True, False])
async def test_cancelled_reader_leaves_the_others_and_its_buffer_intact(tmp_path: Path, cancelled_first: bool) -> None:
    held = trio.Event()

    async def session(stream: trio.SocketStream, peer: Peer) -> None:
        asked = [await peer.next(), await peer.next()]
        long, short = (peer.data(a) for a in sorted(filter(None, asked), key=lambda a: -a.length))
        await stream.send_all(long[:300_000])
        await held.wait()
        await stream.send_all(long[300_000:] + short)
        await well_behaved(stream, peer)

    async with scripted(tmp_path / "s", session) as address, opened(address) as source:
        gone, kept, scope = bytearray(MIB), bytearray(1000), trio.CancelScope()

        async def cancelled() -> None:
            with scope:
                await source.read_into(0, memoryview(gone))

        async def survivor() -> None:
            await source.read_into(64, memoryview(kept))

        async with trio.open_nursery() as nursery:
            # Who comes first drives the connection.
            for task in (cancelled, survivor) if cancelled_first else (survivor, cancelled):
                nursery.start_soon(task)
                await trio.testing.wait_all_tasks_blocked()
            assert gone[:100] == pattern(0, 100)
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            gone[:] = bytes(len(gone))
            held.set()
        assert scope.cancelled_caught
        assert kept == pattern(64, 1000)
        assert not any(gone)
        assert await read(source, 8, 100) == pattern(8, 100)


async def test_cancelled_readers_that_were_never_sent_are_forgotten(tmp_path: Path) -> None:
    held = trio.Event()
    served: list[int] = []

    async def session(stream: trio.SocketStream, peer: Peer) -> None:
        await held.wait()
        while (asked := await peer.next()) is not None and asked.command == 0:
            served.append(asked.pos)
            await stream.send_all(peer.data(asked))

    async with scripted(tmp_path / "s", session) as address, opened(address) as source:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                for pos in range(100):
                    nursery.start_soon(read, source, pos, 8)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        held.set()
        assert await read(source, 1000, 8) == pattern(1000, 8)
        assert len(served) == 65


async def test_no_more_requests_are_in_flight_than_a_socket_takes(tmp_path: Path) -> None:
    held = trio.Event()
    before: list[int] = []

    async def session(stream: trio.SocketStream, peer: Peer) -> None:
        asked = [await peer.next() for _ in range(64)]
        with trio.move_on_after(0.05):
            before.append((await peer.next() or asked[0]).pos)  # type: ignore[union-attr]
        await held.wait()
        for one in filter(None, asked):
            await stream.send_all(peer.data(one))
        await well_behaved(stream, peer)

    async with scripted(tmp_path / "s", session) as address, opened(address) as source, trio.open_nursery() as nursery:

        async def reader(pos: int) -> None:
            assert await read(source, pos, 100) == pattern(pos, 100)

        for pos in range(200):
            nursery.start_soon(reader, pos)
        await trio.testing.wait_all_tasks_blocked()
        held.set()
    assert before == []


async def test_connection_that_breaks_in_the_middle_is_replaced_and_the_read_repeated(tmp_path: Path) -> None:
    sessions = 0

    async def session(stream: trio.SocketStream, peer: Peer) -> None:
        nonlocal sessions
        sessions += 1
        if sessions == 1:
            asked = await peer.next()
            assert asked is not None
            await stream.send_all(peer.data(asked)[:100_000])
        else:
            await well_behaved(stream, peer)

    async with scripted(tmp_path / "s", session) as address, opened(address) as source:
        assert await read(source, 0, MIB) == pattern(0, MIB)
    assert sessions == 2


async def test_a_second_request_for_the_same_bytes_goes_over_another_connection(tmp_path: Path) -> None:
    sessions = 0

    async def session(stream: trio.SocketStream, peer: Peer) -> None:
        nonlocal sessions
        sessions += 1
        if sessions == 1:
            while await peer.next() is not None:
                pass
        else:
            await well_behaved(stream, peer)

    agreement = Agreement(SIZE, FLAGS | TransmissionFlag.CAN_MULTI_CONN, True, 1)
    async with scripted(tmp_path / "s", session, agreement) as address, opened(address) as source:
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read, source, 512, 100)  # of a line that has lost a packet
                nursery.start_soon(read, source, 4096, 100)
                await trio.testing.wait_all_tasks_blocked()
                assert source.connections == 1
                assert await read(source, 512, 100) == pattern(512, 100)
                nursery.cancel_scope.cancel()
            assert source.connections == 2


async def test_connections_that_break_again_and_again_may_pass(tmp_path: Path) -> None:
    async def session(stream: trio.SocketStream, peer: Peer) -> None:
        await peer.next()

    async with scripted(tmp_path / "s", session) as address, opened(address) as source:
        with pytest.raises(BackingUnavailable, match="closed the connection"):
            await read(source, 0, 512)


async def test_a_long_answer_is_taken_in_short_steps_each_of_which_asks_for_its_turn(tmp_path: Path) -> None:
    asked = 0

    def waiting() -> bool:
        nonlocal asked
        asked += 1
        return False

    async with scripted(tmp_path / "s", well_behaved) as address, opened(address) as source:
        with beside(Turns(waiting)):
            assert await read(source, 0, 4 * MIB) == pattern(0, 4 * MIB)
    assert asked >= 4 * MIB // (128 << 10)


async def test_silent_server_counts_as_lost(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async def session(stream: trio.SocketStream, peer: Peer) -> None:
        while await peer.next() is not None:
            pass

    async with scripted(tmp_path / "s", session) as address, opened(address) as source:
        start = trio.current_time()
        with pytest.raises(BackingUnavailable, match="silent for 30 seconds"):
            await read(source, 0, 512)
        assert trio.current_time() - start == pytest.approx(60)


async def test_answer_that_waited_for_a_listener_is_no_silence(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with scripted(tmp_path / "s", well_behaved) as address, opened(address) as source:
        # Asked for, and left before the answer came: it stays in the socket for longer than our patience.
        with trio.CancelScope() as scope:
            scope.cancel()
            await read(source, 0, 512)
        await trio.sleep(100)
        assert await read(source, 512, 512) == pattern(512, 512)
        assert source.connections == 1


async def test_server_that_does_not_greet_times_out(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(tmp_path / "s"))
        listener.listen()
        with pytest.raises(BackingUnavailable, match="within 10 seconds"):
            await open_nbd(parse_address(f"nbd:unix:{tmp_path}/s"))


async def test_readers_share_the_failure_of_one_dial(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    dials = 0

    async def session(stream: trio.SocketStream, peer: Peer) -> None:
        nonlocal dials
        dials += 1
        if dials > 1:
            await trio.sleep_forever()

    real_serve = scripted(tmp_path / "s", session)
    async with real_serve as address:
        source = await open_nbd(address)
        (tmp_path / "s").unlink()
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.bind(os.fspath(tmp_path / "s"))
            deaf.listen()
            start = trio.current_time()

            async def reader() -> None:
                with pytest.raises(BackingUnavailable):
                    await read(source, 0, 512)

            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(reader)
            assert trio.current_time() - start <= 20
        await source.aclose()


async def test_closing_fails_the_reads_under_way(tmp_path: Path) -> None:
    async def session(stream: trio.SocketStream, peer: Peer) -> None:
        while (asked := await peer.next()) is not None:
            last.append(asked.command)

    last: list[int] = []
    async with scripted(tmp_path / "s", session) as address:
        source = await open_nbd(address)

        async def reader() -> None:
            with pytest.raises(BackingUnavailable):
                await read(source, 0, 512)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(reader)
            await trio.testing.wait_all_tasks_blocked()
            await source.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert last == [0, 0, 0, 2]
        with pytest.raises(BackingUnavailable, match="closed"):
            await read(source, 0, 512)


@pytest.mark.parametrize(
    "nonsense", [b"HTTP/1.1 400 Bad Request\r\n\r\n", struct.pack(">IHHQI", 0x668E33EF, 1, 0, 99, 0)]
)
async def test_server_that_says_nonsense_is_refused_for_all_its_readers(tmp_path: Path, nonsense: bytes) -> None:
    async def session(stream: trio.SocketStream, peer: Peer) -> None:
        for _ in range(3):
            await peer.next()
        await stream.send_all(nonsense)
        await peer.next()

    async with scripted(tmp_path / "s", session) as address, opened(address) as source:

        async def reader() -> None:
            with pytest.raises(BackingRefused, match="the server"):
                await read(source, 0, 512)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(reader)


async def test_hang_up_at_any_byte_of_the_negotiation_may_pass(tmp_path: Path) -> None:
    handshake = ServerHandshake("", AGREEMENT)
    greeting = handshake.receive(b"")
    listener = trio.socket.socket(socket.AF_UNIX)
    await listener.bind(os.fspath(tmp_path / "s"))
    listener.listen()
    for length in range(len(greeting) + 1):

        async def hang_up(length: int = length) -> None:
            sock, _ = await listener.accept()
            with sock:
                await sock.send(greeting[:length]) if length else None

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hang_up)
            with pytest.raises(BackingUnavailable, match="hung up"):
                await open_nbd(parse_address(f"nbd:unix:{tmp_path}/s"))
    listener.close()


async def test_extents_that_stop_early_are_asked_again(tmp_path: Path) -> None:
    asked_for: list[tuple[int, int]] = []

    async def session(stream: trio.SocketStream, peer: Peer) -> None:
        while (asked := await peer.next()) is not None and asked.command == 7:
            asked_for.append((asked.pos, asked.length))
            zero = len(asked_for) % 2 == 1
            await stream.send_all(peer.answers.status(asked.cookie, [(1000, zero)]))

    async with scripted(tmp_path / "s", session) as address, opened(address) as source:
        told = await source.extents(500, 2500)
        assert told == [Extent(1000, True), Extent(1000, False), Extent(500, True)]
        assert asked_for == [(500, 2500), (1500, 1500), (2500, 500)]
        asked_for.clear()
        # A server that tells a crumb at a time is not asked for ever: the rest is data.
        told = await source.extents(0, SIZE)
        assert sum(extent.length for extent in told) == SIZE
        assert told[-1] == Extent(SIZE - 1023_000, False)
        assert len(asked_for) == 1024


async def test_status_of_less_than_the_servers_block_is_data(tmp_path: Path) -> None:
    async def session(stream: trio.SocketStream, peer: Peer) -> None:
        while (asked := await peer.next()) is not None and asked.command == 7:
            await stream.send_all(peer.answers.status(asked.cookie, [(1, True)]))

    agreement = Agreement(SIZE, FLAGS, True, 1, BlockSizes(4096, 4096, 4096))
    async with scripted(tmp_path / "s", session, agreement) as address, opened(address) as source:
        assert await source.extents(100, 50) == [Extent(50, False)]


@given(st.data())
def test_cut_obeys_block_sizes_and_covers_exactly_what_is_wanted(draw: st.DataObject) -> None:
    minimum = 1 << draw.draw(st.integers(0, 12))
    blocks = BlockSizes(minimum, minimum, minimum * draw.draw(st.integers(1, 9)))
    size = draw.draw(st.integers(1, 60_000))
    pos = draw.draw(st.integers(0, size - 1))
    content = random.Random(5).randbytes(size)
    buffer = bytearray(draw.draw(st.integers(1, size - pos)))
    for piece in cut(pos, memoryview(buffer), size, blocks):
        end = piece.pos + len(piece.place)
        assert piece.pos % minimum == 0
        assert end % minimum == 0 or end == size
        assert 0 < len(piece.place) <= blocks.maximum
        piece.place[:] = content[piece.pos : end]
        if piece.bounced is not None:
            piece.bounced[:] = piece.place[piece.skip : piece.skip + len(piece.bounced)]
    assert buffer == content[pos : pos + len(buffer)]
