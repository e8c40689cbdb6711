"""What every source must do, whatever it reads from: the contract of `base.py`, one test per sentence."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import trio

from qedfs.backing.base import Source
from qedfs.backing.file import open_file
from qedfs.backing.locate import Reference, open_backing
from qedfs.backing.policy import Policy
from qedfs.errors import BackingUnavailable
from tests.backing.object_servers import Put
from tests.backing.samples import (
    KIB,
    MIB,
    Serve,
    content_by_qemu,
    make_chain,
    make_foreign,
    make_qed,
    random_bytes,
    run,
)
from tests.backing.web_servers import Web
from tests.nbd.certificates import Authority


@dataclass
class Sample:
    """A way to open a source, and what it holds."""

    open: Callable[[], Awaitable[Source]]
    content: bytes


def _named(name: object) -> Callable[[], Awaitable[Source]]:
    return lambda: open_backing(Reference(str(name), None, "/leaf.qed"), Policy())


def _file(folder: Path, serve: Serve) -> Sample:
    path = folder / "file.raw"
    path.write_bytes(random_bytes(300_001))
    return Sample(lambda: open_file(str(path)), path.read_bytes())


def _one_byte(folder: Path, serve: Serve) -> Sample:
    path = folder / "byte.raw"
    path.write_bytes(b"x")
    return Sample(_named(path), b"x")


def _file_with_holes(folder: Path, serve: Serve) -> Sample:
    path = folder / "holes.raw"
    with open(path, "wb") as file:
        for pos in (0, 256 * KIB, 700 * KIB):
            file.seek(pos)
            file.write(random_bytes(40_000, pos))
        file.truncate(MIB - 7)
    return Sample(_named(path), path.read_bytes())


def _qed(folder: Path, serve: Serve) -> Sample:
    commands = ["write -P 1 3k 200k", "write -z 512k 128k", "write -P 2 1499k 1k"]
    path = make_qed(folder / "image.qed", "1500k", commands=commands)
    return Sample(_named(path), content_by_qemu(path))


def _qed_chain(folder: Path, serve: Serve) -> Sample:
    top = make_chain(folder)
    return Sample(_named(top), content_by_qemu(top))


def _nbd(folder: Path, serve: Serve) -> Sample:
    path = folder / "served.raw"
    path.write_bytes(bytes(100 * KIB) + random_bytes(300 * KIB) + bytes(200 * KIB))
    return Sample(_named(serve("file", path)), path.read_bytes())


def _nbds(folder: Path, serve: Serve) -> Sample:
    path = folder / "encrypted.raw"
    path.write_bytes(bytes(100 * KIB) + random_bytes(300 * KIB) + bytes(200 * KIB))
    authority = Authority()
    authority.client(folder / "pki")
    pki = authority.server(folder / "pki")
    uri = serve("--tls=require", f"--tls-certificates={pki}", "--tls-verify-peer", "file", path)
    return Sample(_named(f"{uri.replace('nbd+', 'nbds+')}&tls-certificates={pki}"), path.read_bytes())


def _qed_over_nbd(folder: Path, serve: Serve) -> Sample:
    commands = ["write -P 1 3k 200k", "write -z 512k 128k", "write -P 2 1400k 100k"]
    path = make_qed(folder / "remote.qed", "-o", "cluster_size=4k", "1500k", commands=commands)
    return Sample(_named(serve("file", path)), content_by_qemu(path))


def _qcow2(folder: Path, serve: Serve) -> Sample:
    raw, image = make_foreign(folder, "qcow2", "-c")
    return Sample(_named(image), raw.read_bytes())


def _qcow2_over_nbd(folder: Path, serve: Serve) -> Sample:
    raw, image = make_foreign(folder, "qcow2", "-c")
    return Sample(_named(serve("file", image)), raw.read_bytes())


def _qcow2_over_raw_over_nbd(folder: Path, serve: Serve) -> Sample:
    base = folder / "base.raw"
    base.write_bytes(random_bytes(900 * KIB))
    top = folder / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", serve("file", base), "-F", "raw", top, "1500k")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 3k 200k", "-c", "write -z 512k 128k", top)
    return Sample(_named(top), content_by_qemu(top, "qcow2"))


def _s3(folder: Path, put: Put) -> Sample:
    content = random_bytes(300_001)
    return Sample(_named(put("s3", "images/a b+c%20d.raw", content)), content)


def _gs(folder: Path, put: Put) -> Sample:
    content = random_bytes(300_001)
    return Sample(_named(put("gs", "images/base.raw", content)), content)


def _az(folder: Path, put: Put) -> Sample:
    content = random_bytes(300_001)
    return Sample(_named(put("az", "images/base.raw", content)), content)


def _qed_chain_in_s3(folder: Path, put: Put) -> Sample:
    # Both lower names are relative: they mean the objects beside, which need no credentials on this server.
    top = make_chain(folder)
    for name in ("base.raw", "middle.qed", top.name):
        address = put("s3rver", f"chain/{name}", (folder / name).read_bytes())
    anybody = Policy(allow_backing=("s3://bucket/chain/*",))
    return Sample(lambda: open_backing(Reference(address, None, "/leaf.qed"), anybody), content_by_qemu(top))


def _http(folder: Path, web: Web) -> Sample:
    content = random_bytes(300_001)
    web.put("http/a b+c.raw", content)
    return Sample(_named(f"{web.url}/http/a%20b+c.raw"), content)


def _https(folder: Path, web: Web) -> Sample:
    content = random_bytes(300_001)
    web.put("https/base.raw", content)
    return Sample(_named(f"{web.secure}/https/base.raw?token=secret"), content)


def _qed_chain_over_https(folder: Path, web: Web) -> Sample:
    # Both lower names are relative: they mean the files beside.
    top = make_chain(folder)
    for name in ("base.raw", "middle.qed", top.name):
        web.put(f"chain/{name}", (folder / name).read_bytes())
    anybody = Policy(allow_backing=(f"{web.secure}/chain/*",))
    name = f"{web.secure}/chain/{top.name}"
    return Sample(lambda: open_backing(Reference(name, None, "/leaf.qed"), anybody), content_by_qemu(top))


def _qcow2_over_https(folder: Path, web: Web) -> Sample:
    raw, image = make_foreign(folder, "qcow2", "-c")
    web.put("foreign/base.qcow2", image.read_bytes())
    return Sample(_named(f"{web.secure}/foreign/base.qcow2"), raw.read_bytes())


def _mirrors(folder: Path, web: Web) -> Sample:
    content = random_bytes(300_001)
    for name in ("one", "other"):
        web.put(f"mirrors/{name}.raw", content)
    return Sample(_named(f"mirrors:{web.secure}/mirrors/one.raw|{web.url}/mirrors/other.raw"), content)


SAMPLES = [
    _file,
    _one_byte,
    _file_with_holes,
    _qed,
    _qed_chain,
    _nbd,
    _nbds,
    _qed_over_nbd,
    _qcow2,
    _qcow2_over_nbd,
    _qcow2_over_raw_over_nbd,
]
OBJECTS = [_s3, _gs, _az, _qed_chain_in_s3]
WEB = [_http, _https, _qed_chain_over_https, _qcow2_over_https, _mirrors]
ALL = [*((make, "serve") for make in SAMPLES), *((make, "put") for make in OBJECTS), *((make, "web") for make in WEB)]


@pytest.fixture(params=ALL, ids=[make.__name__.strip("_") for make, _ in ALL])
def sample(request: pytest.FixtureRequest, tmp_path: Path) -> Sample:
    make, server = request.param
    made: Sample = make(tmp_path, request.getfixturevalue(server))
    return made


@pytest.fixture
async def source(sample: Sample) -> AsyncIterator[Source]:
    source = await sample.open()
    yield source
    await source.aclose()


async def read(source: Source, pos: int, length: int) -> bytes:
    buffer = bytearray(b"?" * length)
    await source.read_into(pos, memoryview(buffer))
    return bytes(buffer)


async def test_the_size_is_that_of_the_content(source: Source, sample: Sample) -> None:
    assert source.size == len(sample.content)
    assert source.identity.size == source.size


async def test_the_identity_is_the_same_at_the_next_opening(source: Source, sample: Sample) -> None:
    again = await sample.open()
    await again.aclose()
    assert again.identity == source.identity


async def test_it_tells_its_content_unless_any_layer_tells_only_its_size(
    source: Source, request: pytest.FixtureRequest
) -> None:
    assert source.tells_content == ("nbd" not in request.node.callspec.id)


async def test_all_of_it_reads_as_its_content(source: Source, sample: Sample) -> None:
    assert await read(source, 0, source.size) == sample.content


async def test_reads_of_every_alignment(source: Source, sample: Sample) -> None:
    edges = [0, 512, 4 * KIB, 64 * KIB, 128 * KIB, 1536 * KIB, source.size]
    positions = sorted({edge + delta for edge in edges for delta in (-513, -1, 0, 1, 511)})
    for pos in positions:
        for length in (0, 1, 511, 512, 513, 4097, 66_000):
            if pos >= 0 and pos + length <= source.size:
                assert await read(source, pos, length) == sample.content[pos : pos + length], (pos, length)


async def test_what_is_at_hand_reads_the_same_without_waiting(source: Source, sample: Sample) -> None:
    await read(source, 0, source.size)
    for pos in (0, source.size // 3, max(0, source.size - 4097)):
        buffer = bytearray(min(4097, source.size - pos))
        if source.read_nowait(pos, memoryview(buffer)):
            assert buffer == sample.content[pos : pos + len(buffer)]


async def test_many_tasks_read_at_once(source: Source, sample: Sample) -> None:
    chance = random.Random(3)

    async def check() -> None:
        for _ in range(5):
            pos = chance.randrange(source.size)
            length = chance.randrange(source.size - pos + 1)
            assert await read(source, pos, length) == sample.content[pos : pos + length]

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(check)


async def test_extents_add_up_and_keep_their_promise(source: Source, sample: Sample) -> None:
    chance = random.Random(4)
    ranges = [(0, source.size), (source.size - 1, 1)]
    ranges += [(pos := chance.randrange(source.size), chance.randrange(1, source.size - pos + 1)) for _ in range(30)]
    for pos, length in ranges:
        extents = await source.extents(pos, length)
        assert sum(extent.length for extent in extents) == length
        assert all(extent.length > 0 for extent in extents)
        assert all(a.zero != b.zero for a, b in pairwise(extents))
        for extent in extents:
            if extent.zero:
                assert not any(sample.content[pos : pos + extent.length])
            pos += extent.length


async def test_a_cancelled_read_leaves_the_source_usable(source: Source, sample: Sample) -> None:
    for _ in range(10):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read, source, 0, source.size)
                await trio.lowlevel.checkpoint()
                scope.cancel()
    assert await read(source, 0, source.size) == sample.content


async def test_a_closed_source_may_be_closed_again_and_does_not_answer(sample: Sample) -> None:
    source = await sample.open()
    await source.aclose()
    await source.aclose()
    with pytest.raises(BackingUnavailable):
        await read(source, 0, source.size)
    with pytest.raises(BackingUnavailable):
        await source.extents(0, source.size)


async def test_closing_ends_the_reads_under_way(sample: Sample) -> None:
    source = await sample.open()
    ended = 0

    async def read_or_fail() -> None:
        nonlocal ended
        try:
            assert await read(source, 0, source.size) == sample.content
        except BackingUnavailable:
            pass
        ended += 1

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(read_or_fail)
            await trio.lowlevel.checkpoint()
            await source.aclose()
    assert ended == 8
