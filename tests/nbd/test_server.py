"""The server judged by qemu-img, nbdinfo and nbdcopy, by our own client, and by clients that misbehave."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import stat
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from qedfs.errors import LeafError, UsageError
from qedfs.nbd.address import NbdAddress, parse_address
from qedfs.nbd.connection import connect
from qedfs.nbd.constants import OPTION_MAGIC, Command, CommandFlag, Errno, Option
from qedfs.nbd.errors import NbdOptionRefused, NbdRequestFailed
from qedfs.nbd.listeners import open_tcp_listeners, open_unix_listener
from qedfs.nbd.server import MAX_CLIENTS, MAX_REQUESTS, serve

MIB = 1 << 20


class Memory:
    """An export of 6 MiB: data, 2 MiB of zeros, data. Reads can be held back and made to fail."""

    def __init__(self) -> None:
        rng = random.Random(4)
        self.content = rng.randbytes(2 * MIB) + bytes(2 * MIB) + rng.randbytes(2 * MIB)
        self.size = len(self.content)
        self.bad: range = range(0)
        self.gate = trio.Event()
        self.gate.set()
        self.reading = 0
        self.most_reading = 0

    async def read_into(self, pos: int, buffer: memoryview) -> None:
        self.reading += 1
        self.most_reading = max(self.reading, self.most_reading)
        try:
            await self.gate.wait()
        finally:
            self.reading -= 1
        if pos < self.bad.stop and self.bad.start < pos + len(buffer):
            raise LeafError("disk.qed", "a bad sector")
        buffer[:] = self.content[pos : pos + len(buffer)]

    async def extents(self, pos: int, length: int) -> list[tuple[int, bool]]:
        await trio.lowlevel.checkpoint()
        cuts = sorted({pos, pos + length, *(cut for cut in (2 * MIB, 4 * MIB) if pos < cut < pos + length)})
        return [(b - a, 2 * MIB <= a < 4 * MIB) for a, b in itertools.pairwise(cuts)]


@pytest.fixture
def export() -> Memory:
    return Memory()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nbd.sock"


@contextlib.asynccontextmanager
async def serving(export: Memory, path: Path) -> AsyncIterator[NbdAddress]:
    listener = await open_unix_listener(path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve(export, [listener], name="disk"))
        yield parse_address(f"nbd+unix:///disk?socket={path}")
        nursery.cancel_scope.cancel()


async def run(*command: str | Path) -> str:
    return (await trio.run_process(list(map(str, command)), capture_stdout=True)).stdout.decode()


async def test_qemu_img_copies_and_maps_it(export: Memory, path: Path, tmp_path: Path) -> None:
    async with serving(export, path) as address:
        await run("qemu-img", "convert", "-f", "raw", "-O", "raw", str(address), tmp_path / "copy")
        mapped = json.loads(await run("qemu-img", "map", "--output=json", "-f", "raw", str(address)))
    assert (tmp_path / "copy").read_bytes() == export.content
    extents = [(e["start"], e["length"], e["zero"], e["data"]) for e in mapped]
    assert extents == [(0, 2 * MIB, False, True), (2 * MIB, 2 * MIB, True, False), (4 * MIB, 2 * MIB, False, True)]


async def test_nbdcopy_copies_it_with_and_without_extents(export: Memory, path: Path, tmp_path: Path) -> None:
    async with serving(export, path) as address:
        await run("nbdcopy", str(address), tmp_path / "sparse")
        await run("nbdcopy", "--no-extents", "--request-size=4194304", str(address), tmp_path / "full")
    assert (tmp_path / "sparse").read_bytes() == (tmp_path / "full").read_bytes() == export.content


async def test_nbdinfo_sees_what_it_can_do(export: Memory, path: Path) -> None:
    async with serving(export, path) as address:
        (info,) = json.loads(await run("nbdinfo", "--json", str(address)))["exports"]
        listed = json.loads(await run("nbdinfo", "--list", "--json", str(address)))
    assert info["export-size"] == export.size
    assert info["contexts"] == ["base:allocation"]
    assert info["is_read_only"]
    assert info["can_multi_conn"]
    assert info["can_df"]
    assert info["block_size_maximum"] == 32 * MIB
    assert [e["export-name"] for e in listed["exports"]] == ["disk"]


async def test_our_client_reads_it_by_either_name(export: Memory, path: Path) -> None:
    async with serving(export, path) as address:
        for name in ("", "disk"):
            connection = await connect(NbdAddress(False, None, 0, address.socket, name))
            buffer = bytearray(3 * MIB)
            await connection.read([(7, memoryview(buffer))])
            assert buffer == export.content[7 : 7 + 3 * MIB]
            assert await connection.block_status(MIB, 4 * MIB) == [(MIB, False), (2 * MIB, True), (MIB, False)]
            connection.close()
        with pytest.raises(NbdOptionRefused, match="no such export"):
            await connect(NbdAddress(False, None, 0, address.socket, "other"))


async def test_tcp_serves_too(export: Memory) -> None:
    listeners = await open_tcp_listeners("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: serve(export, listeners, name="x", task_status=task_status))
        port = listeners[0].socket.getsockname()[1]
        connection = await connect(parse_address(f"nbd://127.0.0.1:{port}/x"))
        buffer = bytearray(10)
        await connection.read([(0, memoryview(buffer))])
        assert buffer == export.content[:10]
        connection.close()
        nursery.cancel_scope.cancel()


async def test_failed_read_is_told_with_its_reason_and_the_rest_goes_on(export: Memory, path: Path) -> None:
    export.bad = range(5 * MIB, 5 * MIB + 1)
    async with serving(export, path) as address:
        connection = await connect(address)
        # The second piece of this read fails, after the first has been sent.
        with pytest.raises(NbdRequestFailed, match=r"EIO: disk.qed: a bad sector"):
            await connection.read([(4 * MIB, memoryview(bytearray(2 * MIB)))])
        await connection.read([(0, memoryview(bytearray(10)))])
        connection.close()


async def test_requests_of_one_client_are_answered_together_up_to_a_limit(export: Memory, path: Path) -> None:
    export.gate = trio.Event()
    async with serving(export, path) as address:
        connection, other = await connect(address), await connect(address)
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(connection.read, [(0, memoryview(bytearray(512)))])
            await trio.testing.wait_all_tasks_blocked()
            assert export.most_reading == MAX_REQUESTS
            # Another client is not held up by that: it may have as many.
            nursery.start_soon(other.read, [(0, memoryview(bytearray(512)))])
            await trio.testing.wait_all_tasks_blocked()
            assert export.most_reading == MAX_REQUESTS + 1
            export.gate.set()
        connection.close()
        other.close()


class Raw:
    """A client that says what it likes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream

    async def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = await self.stream.receive_some(count - len(data))
            assert more
            data += more
        return data

    async def ask(self, command: int, pos: int, length: int, flags: int = 0, payload: bytes = b"") -> None:
        message = struct.pack(">IHHQQI", 0x25609513, flags, command, 1, pos, length)
        await self.stream.send_all(message + payload)

    async def error(self) -> int:
        """Receive a structured error; return its number."""
        _, flags, kind, _, length = struct.unpack(">IHHQI", await self.exactly(20))
        assert (flags, kind) == (1, 0x8001)
        number: int = struct.unpack_from(">I", await self.exactly(length))[0]
        return number


@contextlib.asynccontextmanager
async def raw_client(path: Path, structured: bool = True) -> AsyncIterator[Raw]:
    async with await trio.open_unix_socket(str(path)) as stream:
        client = Raw(stream)
        await client.exactly(18)
        await stream.send_all(b"\0\0\0\3")
        if structured:
            await stream.send_all(struct.pack(">QII", OPTION_MAGIC, Option.STRUCTURED_REPLY, 0))
            await client.exactly(20)
        await stream.send_all(struct.pack(">QII", OPTION_MAGIC, Option.EXPORT_NAME, 4) + b"disk")
        await client.exactly(10)
        yield client


async def test_write_is_refused_and_its_payload_skipped(export: Memory, path: Path) -> None:
    async with serving(export, path), raw_client(path) as client:
        await client.ask(Command.WRITE, 0, 100_000, payload=bytes(100_000))
        assert await client.error() == Errno.EPERM
        await client.ask(Command.TRIM, 0, 4096)
        assert await client.error() == Errno.EPERM
        await client.ask(Command.READ, export.size, 1)
        assert await client.error() == Errno.EINVAL


async def test_df_gets_one_chunk_or_an_error_that_it_is_too_long(export: Memory, path: Path) -> None:
    async with serving(export, path), raw_client(path) as client:
        await client.ask(Command.READ, 0, MIB, CommandFlag.DF)
        header = struct.unpack(">IHHQIQ", await client.exactly(28))
        assert header[1:] == (1, 1, 1, MIB + 8, 0)
        assert await client.exactly(MIB) == export.content[:MIB]
        await client.ask(Command.READ, 0, MIB + 1, CommandFlag.DF)
        assert await client.error() == Errno.EOVERFLOW


async def test_simple_reply_is_whole_or_an_error_or_the_end(export: Memory, path: Path) -> None:
    async with serving(export, path), raw_client(path, structured=False) as client:
        await client.ask(Command.READ, 5, 3 * MIB)
        assert await client.exactly(16) == struct.pack(">IIQ", 0x67446698, 0, 1)
        assert await client.exactly(3 * MIB) == export.content[5 : 5 + 3 * MIB]
        export.bad = range(2 * MIB, 2 * MIB + 1)
        await client.ask(Command.READ, 2 * MIB, 512)
        assert await client.exactly(16) == struct.pack(">IIQ", 0x67446698, Errno.EIO, 1)
        # The header has promised all; only hanging up can take that back.
        await client.ask(Command.READ, 0, 3 * MIB)
        await client.exactly(16 + 2 * MIB)
        assert await client.stream.receive_some() == b""


@pytest.mark.parametrize("structured", [True, False])
async def test_goodbye_waits_for_what_is_under_way(export: Memory, path: Path, structured: bool) -> None:
    export.gate = trio.Event()
    async with serving(export, path), raw_client(path, structured) as client:
        await client.ask(Command.READ, 0, 512)
        await client.ask(Command.DISC, 0, 0)
        await trio.testing.wait_all_tasks_blocked()
        export.gate.set()
        await client.exactly((28 if structured else 16) + 512)
        assert await client.stream.receive_some() == b""


async def test_bad_clients_are_dropped_and_nobody_else_notices(export: Memory, path: Path) -> None:
    async with serving(export, path) as address:
        good = await connect(address)
        for nonsense in (b"GET / HTTP/1.1\r\n\r\n", b"", b"\xff" * 100):
            async with await trio.open_unix_socket(str(path)) as stream:
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(nonsense)
                    await stream.send_eof()
                    while await stream.receive_some():
                        pass
        async with raw_client(path) as client:
            await client.stream.send_all(b"\xff" * 28)
            assert await client.stream.receive_some() == b""
        async with raw_client(path) as client:
            # Asks for a lot and leaves without reading it.
            for _ in range(20):
                await client.ask(Command.READ, 0, 4 * MIB)
        buffer = bytearray(100)
        await good.read([(0, memoryview(buffer))])
        assert buffer == export.content[:100]
        good.close()


async def test_client_that_does_not_negotiate_is_dropped(
    export: Memory, path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(export, path), await trio.open_unix_socket(str(path)) as stream:
        start = trio.current_time()
        while await stream.receive_some():
            pass
        assert trio.current_time() - start == pytest.approx(10)


async def test_there_is_a_limit_to_clients_and_places_become_free(
    export: Memory, path: Path, expected_warnings: Callable[[str], None]
) -> None:
    expected_warnings("WARNING qedfs.nbd.server: refused an NBD client")
    async with serving(export, path) as address, contextlib.AsyncExitStack() as stack:
        for _ in range(MAX_CLIENTS):
            await stack.enter_async_context(raw_client(path))
        async with await trio.open_unix_socket(str(path)) as stream:
            assert await stream.receive_some() == b""
        await stack.aclose()
        await trio.testing.wait_all_tasks_blocked()
        (await connect(address)).close()


async def test_internal_error_drops_the_client_and_is_logged(
    export: Memory, path: Path, expected_warnings: Callable[[str], None]
) -> None:
    expected_warnings("internal error(.|\n)*ZeroDivisionError")

    async def broken(pos: int, buffer: memoryview) -> None:
        raise ZeroDivisionError

    sound, export.read_into = export.read_into, broken  # type: ignore[method-assign]
    async with serving(export, path) as address:
        async with raw_client(path) as client:
            await client.ask(Command.READ, 0, 512)
            assert await client.stream.receive_some() == b""
        export.read_into = sound  # type: ignore[method-assign]
        connection = await connect(address)
        await connection.read([(0, memoryview(bytearray(10)))])
        connection.close()


async def test_unix_socket_is_private_and_removed_in_the_end(export: Memory, path: Path) -> None:
    async with serving(export, path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


async def test_socket_of_somebody_else_is_not_removed(export: Memory, path: Path) -> None:
    async with serving(export, path):
        path.unlink()
        path.write_text("mine")
    assert path.read_text() == "mine"


async def test_socket_of_a_live_server_is_refused_and_left_alone(export: Memory, path: Path) -> None:
    async with serving(export, path) as address:
        with pytest.raises(UsageError, match="another server is listening there"):
            await open_unix_listener(path)
        (await connect(address)).close()


async def test_socket_left_behind_is_replaced(path: Path) -> None:
    await (await open_unix_listener(path)).aclose()
    assert path.exists()
    await (await open_unix_listener(path)).aclose()


async def test_other_file_is_never_replaced(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(UsageError, match="is not a socket"):
        await open_unix_listener(path)
    assert path.read_text() == "precious"


async def test_impossible_places_are_refused(tmp_path: Path) -> None:
    for place in (tmp_path / "none" / "s", tmp_path / ("x" * 200)):
        with pytest.raises(UsageError, match="cannot listen there"):
            await open_unix_listener(place)
    with pytest.raises(UsageError, match="cannot listen there"):
        await open_tcp_listeners("192.0.2.1", 10809)
    with pytest.raises(UsageError, match="cannot listen there"):
        await open_tcp_listeners("127.0.0.1", 70_000)
