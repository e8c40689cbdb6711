"""Everything that reads bytes of strangers, as functions of bytes. What they raise and nobody expects is a find.

Run one until it finds something: `python tests/fuzz/targets.py NAME CORPUS [option of libFuzzer]…`.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a program, this folder would hide the packages

import atheris  # type: ignore[import-untyped]  # its stubs are of another version

with atheris.instrument_imports(include=["qedfs"]):
    import trio

    from qedfs.backing.base import Extent, Identity, Source
    from qedfs.backing.location import masked, parse_location
    from qedfs.backing.qed import PageCache, QedSource, read_header
    from qedfs.errors import QedfsError
    from qedfs.image import header as headers
    from qedfs.image import record as records
    from qedfs.image.check import check_image
    from qedfs.image.image import open_image
    from qedfs.nbd.constants import TransmissionFlag
    from qedfs.nbd.errors import NbdError
    from qedfs.nbd.negotiation import Agreement, BlockSizes, ClientHandshake, ServerHandshake
    from qedfs.nbd.serving import ServerTransmission
    from qedfs.nbd.transmission import ClientTransmission
    from qedfs.stream import profile as profiles
    from tests.image.memory_storage import MemoryStorage

_AGREEMENT = Agreement(1 << 20, TransmissionFlag(3), True, 7, BlockSizes(1, 4096, 1 << 16))


def header(data: bytes) -> None:
    """Decode a header; what was accepted is written back as it was."""
    try:
        decoded = headers.decode(data, 1 << 30, "fuzz")
    except QedfsError as refused:
        _judge(refused)
    else:
        assert decoded.encode() == data[: headers.SIZE]


def record(data: bytes) -> None:
    """Decode a record; one that was accepted, and is not too long, reads the same again."""
    decoded = records.decode(data)
    if isinstance(decoded, records.Record):
        again = records.encode(decoded)
        assert again is None or isinstance(records.decode(again), records.Record)


def image(data: bytes) -> None:
    """Check an image, repair it, survey it and walk over it; a repair ends with what can be repaired."""
    data = _image_of(data)
    trio.run(_image, data)


def source(data: bytes) -> None:
    """Read an image as a backing."""
    trio.run(_source, _image_of(data))


def name(data: bytes) -> None:
    """Find out where a backing is; nothing that is shown may need escaping twice."""
    text = headers.decode_backing_name(data)
    masked(text)
    try:
        parse_location(text, None)
    except QedfsError as refused:
        _judge(refused)


def profile(data: bytes) -> None:
    """Read a boot profile; one that was accepted reads the same again and brings no more than it may."""
    for text in (data, profiles.TITLE + b"\n" + data):
        try:
            parts = profiles.parse(text, "fuzz")
        except QedfsError as refused:
            _judge(refused)
        else:
            assert profiles.parse(profiles.serialise(parts, "fuzz"), "fuzz") == parts
            total = 0
            for first, end in profiles.clusters(parts, 65536, 1 << 40):
                assert 0 <= first < end <= 1 << 24
                total += (end - first) * 65536
            assert total < profiles.MOST_BYTES + 65536


def client(data: bytes) -> None:
    """Negotiate with a server that says anything, then read from it."""
    cut = data[0] if data else 0
    _handshake(ClientHandshake("disk"), data[1:], cut + 1)


def server(data: bytes) -> None:
    """Serve a client that says anything."""
    cut = data[0] if data else 0
    _handshake(ServerHandshake("disk", _AGREEMENT), data[1:], cut + 1)
    requests = ServerTransmission(_AGREEMENT)
    try:
        for start in range(1, len(data), cut + 1):
            for asked in requests.receive(data[start : start + cut + 1]):
                assert asked.refusal or asked.command == 2 or asked.pos + asked.length <= _AGREEMENT.size
    except NbdError as refused:
        _judge(refused)


def replies(data: bytes) -> None:
    """Take the answers to three requests from a server that says anything."""
    transmission = ClientTransmission(_AGREEMENT)
    first, second = bytearray(4096), bytearray(8192)
    transmission.read(0, memoryview(first))
    transmission.read(65536, memoryview(second))
    transmission.block_status(0, 1 << 20)
    try:
        while data:
            place = transmission.place()
            taken = min(len(place), len(data))
            assert taken
            place[:taken] = data[:taken]
            for request in transmission.received(taken):
                assert request.error or request.destination is not None or sum(n for n, _ in request.extents) <= 1 << 20
            data = data[taken:]
    except NbdError as refused:
        _judge(refused)


def _judge(refused: Exception) -> None:
    """What is refused is told in one line."""
    assert str(refused).isprintable()


def _handshake(handshake: Any, data: bytes, step: int) -> None:
    try:
        handshake.receive(b"")
        for start in range(0, len(data), step):
            if handshake.result is not None:
                return
            handshake.receive(data[start : start + min(step, handshake.wants)])
    except (NbdError, QedfsError) as refused:
        _judge(refused)


def _image_of(data: bytes) -> bytes:
    """Turn short input into an image: the header, then L1 and two tables of entries (a byte each), then clusters."""
    head, rest = data[:64].ljust(64, b"\0"), data[64:]
    content = bytearray(head.ljust(4096, b"\0")) + bytes(7 * 4096)
    for place, byte in enumerate(rest[:1536]):
        # Numbers of clusters, or (odd ones) anything near them.
        entry = (byte >> 1) * 4096 if not byte & 1 else (byte >> 1) * 4096 + 1
        struct.pack_into("<Q", content, 4096 + place * 8, entry)
    return bytes(content)


async def _image(data: bytes) -> None:
    try:
        storage = MemoryStorage(data)
        found = await check_image(storage, repair=True)
        again = await check_image(MemoryStorage(storage.content), repair=False)
        assert found.corruptions == again.corruptions
        opened = await open_image(MemoryStorage(data))
        await opened.survey()
        await opened.local_below([0, opened.header.image_size])
        async for run in opened.stored().runs():
            assert run.length > 0
        await opened.aclose()
    except QedfsError as refused:
        _judge(refused)


class _Bytes(Source):
    def __init__(self, data: bytes) -> None:
        self.name, self.size, self.identity = "fuzz", len(data), Identity(len(data))
        self._data = data

    async def read_into(self, pos: int, buffer: memoryview) -> None:
        assert pos >= 0
        assert pos + len(buffer) <= self.size
        buffer[:] = self._data[pos : pos + len(buffer)]

    async def extents(self, pos: int, length: int) -> list[Extent]:
        return [Extent(length, False)]

    async def aclose(self) -> None:
        pass


async def _source(data: bytes) -> None:
    try:
        file = _Bytes(data)
        decoded, _ = await read_header(file)
        disk = QedSource(file, decoded, _Bytes(bytes(5000)), PageCache())
        for pos in (0, 4096, 65535, 1 << 20, disk.size - 4096):
            length = min(70_000, disk.size - pos)
            if pos >= 0 and length > 0:
                await disk.read_into(pos, memoryview(bytearray(length)))
                assert sum(extent.length for extent in await disk.extents(pos, length)) == length
    except QedfsError as refused:
        _judge(refused)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (header, record, image, source, name, profile, client, server, replies)
}


if __name__ == "__main__":
    chosen = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, chosen)
    atheris.Fuzz()
