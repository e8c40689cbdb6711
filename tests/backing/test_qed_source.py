"""QED images read by us and by QEMU: the edge cases of the format, and images that mean harm."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from qedfs.backing.base import Extent, Identity, Source
from qedfs.backing.locate import Reference, open_backing
from qedfs.backing.policy import Policy
from qedfs.backing.qed import PAGE, PAGES_BUDGET, PageCache, QedSource, read_header
from qedfs.errors import BackingRefused, BackingUnavailable, CorruptEntry
from qedfs.image.geometry import Geometry
from qedfs.image.header import Header
from tests.backing.samples import KIB, MIB, content_by_qemu, make_chain, make_qed, random_bytes, run

L1, L2 = 0x10000, 0x60000
"""Where QEMU puts the L1 table of a default image, and the first L2 table when one cluster was written before it."""


class MemorySource(Source):
    """Bytes in memory that count how they are asked for. With `gate` set, reads wait for it."""

    def __init__(self, content: bytes | bytearray) -> None:
        self.name = "memory"
        self.size = len(content)
        self.identity = Identity(self.size)
        self.content = content
        self.reads: list[tuple[int, int]] = []
        self.gate: trio.Event | None = None
        self.failure: Exception | None = None

    async def read_into(self, pos: int, buffer: memoryview) -> None:
        assert pos >= 0
        assert pos + len(buffer) <= self.size
        self.reads.append((pos, len(buffer)))
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        buffer[:] = self.content[pos : pos + len(buffer)]

    async def extents(self, pos: int, length: int) -> list[Extent]:
        return [Extent(length, False)]

    async def aclose(self) -> None:
        pass


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Source]:
    source = await open_backing(Reference(str(path), "qed", "/leaf"), Policy())
    try:
        yield source
    finally:
        await source.aclose()


async def read(source: Source, pos: int, length: int) -> bytes:
    buffer = bytearray(b"?" * length)
    await source.read_into(pos, memoryview(buffer))
    return bytes(buffer)


async def content_of(path: Path) -> bytes:
    async with opened(path) as source:
        return await read(source, 0, source.size)


def poke(path: Path, offset: int, value: int, size: int = 8) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(value.to_bytes(size, "little"))


def write_one_cluster(path: Path, *options: object) -> Path:
    """Make an image of 1 MiB whose first cluster holds 0x11 and lies at 0x50000, with its L2 table at `L2`."""
    return make_qed(path, *options, "1M", commands=["write -P 0x11 0 64k"])


# ---- what QEMU reads, we read (the numbers are those of the edge cases in the format notes) ----


async def test_a_size_that_is_no_multiple_of_the_cluster(tmp_path: Path) -> None:  # 1
    image = make_qed(tmp_path / "i.qed", "1500k", commands=["write -P 7 1499k 1k"])
    assert await content_of(image) == content_by_qemu(image)


async def test_an_image_of_size_zero(tmp_path: Path) -> None:  # 2
    async with opened(make_qed(tmp_path / "i.qed", "0")) as source:
        assert source.size == 0
        assert await read(source, 0, 0) == b""


async def test_a_size_is_whole_sectors(tmp_path: Path) -> None:  # 3
    assert await content_of(make_qed(tmp_path / "i.qed", "1000")) == bytes(1024)


@pytest.mark.parametrize("size", [700, 1_000_000])
async def test_a_base_that_ends_inside_a_sector_is_followed_by_zeros(tmp_path: Path, size: int) -> None:  # 4
    (tmp_path / "base.raw").write_bytes(random_bytes(size))
    image = tmp_path / "i.qed"
    run("qemu-img", "create", "-q", "-f", "qed", "-b", "base.raw", "-F", "raw", image)
    content = await content_of(image)
    assert content == random_bytes(size) + bytes(-size % 512)
    assert content == content_by_qemu(image)


async def test_an_overlay_larger_than_its_base(tmp_path: Path) -> None:  # 5, 6
    (tmp_path / "base.raw").write_bytes(random_bytes(100_000))
    commands = ["write -P 9 99k 1k", "write -P 8 300k 4k"]
    image = make_qed(tmp_path / "i.qed", "-b", "base.raw", "-F", "raw", "1M", commands=commands)
    content = await content_of(image)
    assert content[110_000 : 300 * KIB] == bytes(300 * KIB - 110_000)
    assert content == content_by_qemu(image)


async def test_a_short_middle_layer_hides_what_is_deeper(tmp_path: Path) -> None:  # 7
    top = make_chain(tmp_path)
    content = await content_of(top)
    assert content[1536 * KIB : 2 * MIB] == bytes(512 * KIB)
    assert content == content_by_qemu(top)


async def test_a_zero_cluster_hides_the_backing(tmp_path: Path) -> None:  # 8
    (tmp_path / "base.raw").write_bytes(random_bytes(MIB))
    commands = ["write -z 64k 64k"]
    image = make_qed(tmp_path / "i.qed", "-b", "base.raw", "-F", "raw", "1M", commands=commands)
    content = await content_of(image)
    assert content[64 * KIB : 128 * KIB] == bytes(64 * KIB)
    assert content[: 64 * KIB] == random_bytes(MIB)[: 64 * KIB]
    assert content == content_by_qemu(image)


@pytest.mark.parametrize(("cut", "lost"), [(1, False), (511, False), (512, True)])
async def test_a_file_cut_inside_its_last_cluster(tmp_path: Path, cut: int, lost: bool) -> None:  # 20, 21
    image = make_qed(tmp_path / "i.qed", "1M", commands=["write -P 1 0 64k", "write -P 2 64k 64k"])
    os.truncate(image, image.stat().st_size - cut)
    async with opened(image) as source:
        assert await read(source, 0, 64 * KIB) == b"\x01" * 64 * KIB
        if lost:
            with pytest.raises(CorruptEntry):
                await read(source, 64 * KIB, 64 * KIB)
        else:
            assert await read(source, 64 * KIB, 64 * KIB) == (b"\x02" * 64 * KIB)[:-cut] + bytes(cut)


@pytest.mark.parametrize("entry", [2, 3, 0x50001, 0x50200, 0xA0000, 1 << 63, (1 << 64) - 1])
async def test_a_broken_entry_fails_only_the_reads_that_reach_it(tmp_path: Path, entry: int) -> None:  # 21, 22
    image = write_one_cluster(tmp_path / "i.qed")
    assert image.stat().st_size == 0xA0000
    poke(image, L2 + 8, entry)
    async with opened(image) as source:
        with pytest.raises(CorruptEntry, match="of cluster 1 lies outside the file"):
            await read(source, 60 * KIB, 8 * KIB)
        with pytest.raises(CorruptEntry):
            await source.extents(0, MIB)
        assert await read(source, 0, 64 * KIB) == b"\x11" * 64 * KIB
        assert await read(source, 128 * KIB, 896 * KIB) == bytes(896 * KIB)


async def test_a_run_of_data_that_leaves_the_file_is_read_up_to_its_end(tmp_path: Path) -> None:  # 21
    image = write_one_cluster(tmp_path / "i.qed")
    for index, offset in enumerate((0x80000, 0x90000, 0xA0000)):  # the file has 0xA0000 bytes
        poke(image, L2 + 8 * index, offset)
    async with opened(image) as source:
        assert await read(source, 0, 128 * KIB) == bytes(128 * KIB)  # the end of the L2 table, read as data
        with pytest.raises(CorruptEntry):
            await read(source, 0, 128 * KIB + 1)


@pytest.mark.parametrize("entry", [1, 2, 0x60200, 0x70000, 1 << 40])
async def test_a_broken_l1_entry_is_no_table(tmp_path: Path, entry: int) -> None:  # 23
    image = write_one_cluster(tmp_path / "i.qed")
    poke(image, L1, entry)
    async with opened(image) as source:
        with pytest.raises(CorruptEntry, match="L1 entry"):
            await read(source, 0, 512)


async def test_entries_past_the_end_of_the_image_do_no_harm(tmp_path: Path) -> None:  # 24
    image = write_one_cluster(tmp_path / "i.qed")
    poke(image, L2 + 8 * 100, 0x50000)
    poke(image, L2 + 8 * 101, 0x50001)
    poke(image, L1 + 8, 12345)
    assert await content_of(image) == content_by_qemu(image)


async def test_a_dirty_backing_is_read_and_left_as_it_is(tmp_path: Path) -> None:  # 29
    image = write_one_cluster(tmp_path / "i.qed")
    poke(image, 16, 2)
    before = image.read_bytes()
    assert await content_of(image) == content_by_qemu(image)
    assert image.read_bytes() == before


async def test_the_backing_bit_with_an_empty_name_means_no_backing(tmp_path: Path) -> None:  # 30, 33
    image = write_one_cluster(tmp_path / "i.qed")
    poke(image, 16, 1)
    poke(image, 56, 64, size=4)
    assert await content_of(image) == content_by_qemu(image)


async def test_an_unknown_incompatible_bit_is_refused_and_others_are_not(tmp_path: Path) -> None:  # 31
    image = write_one_cluster(tmp_path / "i.qed")
    poke(image, 24, 0xFF)
    poke(image, 32, 0xFF)
    assert await content_of(image) == content_by_qemu(image)
    poke(image, 16, 8)
    with pytest.raises(BackingRefused, match="features"):
        await content_of(image)


async def test_a_name_anywhere_in_a_header_of_several_clusters(tmp_path: Path) -> None:  # 32
    (tmp_path / "base.raw").write_bytes(random_bytes(MIB))
    image = make_qed(tmp_path / "i.qed", "-o", "cluster_size=4k,table_size=2", "1M")
    # QEMU puts L1 behind the one cluster of the header; make room by moving everything by a cluster.
    data = image.read_bytes()
    image.write_bytes(data[: 4 * KIB] + bytes(4 * KIB) + data[4 * KIB :])
    poke(image, 12, 2, size=4)
    poke(image, 16, 5)
    poke(image, 40, 8 * KIB)
    poke(image, 56, 5000, size=4)
    poke(image, 60, len("base.raw"), size=4)
    with open(image, "r+b") as file:
        file.seek(5000)
        file.write(b"base.raw")
    assert await content_of(image) == random_bytes(MIB) == content_by_qemu(image)


@pytest.mark.parametrize(("length", "opens"), [(4032, True), (4033, False)])
async def test_the_longest_name_is_what_the_header_has_room_for(
    length: int, opens: bool, request: pytest.FixtureRequest
) -> None:  # 33
    # In a folder of a short name: together they are a path, which the system limits to 4095 bytes.
    folder = Path(mkdtemp(dir="/tmp"))
    request.addfinalizer(lambda: rmtree(folder))
    image = make_qed(folder / "i.qed", "-o", "cluster_size=4k,table_size=2", "1M")
    (folder / "base.raw").write_bytes(random_bytes(MIB))
    name = "base.raw".rjust(length, "/").replace("/" * (length - 8), "./" * ((length - 8) // 2) + "/" * (length % 2))
    poke(image, 16, 5)
    poke(image, 56, 64, size=4)
    poke(image, 60, length, size=4)
    with open(image, "r+b") as file:
        file.seek(64)
        file.write(name.encode()[: 4096 - 64])
    if opens:
        assert await content_of(image) == content_by_qemu(image)
    else:
        with pytest.raises(BackingRefused, match="outside the header"):
            await content_of(image)


async def test_a_relative_name_begins_in_the_folder_of_the_image_that_names_it(tmp_path: Path) -> None:  # 36
    (tmp_path / "sub").mkdir()
    (tmp_path / "a:b.raw").write_bytes(random_bytes(MIB))
    image = make_qed(tmp_path / "sub" / "i.qed", "-u", "-b", "../a:b.raw", "-F", "raw", "1M")
    assert await content_of(image) == random_bytes(MIB) == content_by_qemu(image)
    # Not as QEMU has it: whoever can make a link to an image would choose what lies beside it.
    (tmp_path / "link.qed").symlink_to(image)
    assert await content_of(tmp_path / "link.qed") == random_bytes(MIB)


async def test_reads_across_the_spans_of_two_tables(tmp_path: Path) -> None:  # 41
    commands = ["write -P 1 4090k 12k", "write -P 2 8188k 8k", "write -z 12284k 8k"]
    image = make_qed(tmp_path / "i.qed", "-o", "cluster_size=4k,table_size=2", "20M", commands=commands)
    content = content_by_qemu(image)
    assert await content_of(image) == content
    async with opened(image) as source:
        for edge in (4 * MIB, 8 * MIB, 12 * MIB):
            assert await read(source, edge - 5000, 10000) == content[edge - 5000 : edge + 5000]


async def test_tables_of_one_cluster_work_though_qemu_cannot_open_them(tmp_path: Path) -> None:
    image = make_qed(tmp_path / "i.qed", "-o", "cluster_size=4k,table_size=2", "1M", commands=["write -P 5 8k 4k"])
    poke(image, 8, 1, size=4)  # the first halves of the tables are all that is used
    assert await content_of(image) == bytes(8 * KIB) + b"\5" * 4 * KIB + bytes(MIB - 12 * KIB)


COMMANDS = st.lists(
    st.builds(
        "write {} {}k {}k".format,
        st.sampled_from(["-P 1", "-P 2", "-P 0", "-z"]),
        st.integers(0, 1400),
        st.integers(1, 100),
    ),
    max_size=5,
)
LAYER = st.tuples(st.sampled_from(["cluster_size=4k,table_size=2", "cluster_size=16k,table_size=16"]), COMMANDS)


@settings(max_examples=15)
@given(layers=st.lists(LAYER, min_size=1, max_size=4), sizes=st.permutations([1500, 1600, 1537, 2000]))
async def test_chains_read_as_qemu_reads_them(
    tmp_path_factory: pytest.TempPathFactory, layers: list[tuple[str, list[str]]], sizes: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("chain")
    below, format = folder / "base.raw", "raw"
    below.write_bytes(random_bytes(1_700_000))
    for number, (geometry, commands) in enumerate(layers):
        options = ["-o", geometry, "-b", below.name, "-F", format, f"{sizes[number]}k"]
        below, format = make_qed(folder / f"{number}.qed", *options, commands=commands), "qed"
    content = content_by_qemu(below)
    async with opened(below) as source:
        assert await read(source, 0, source.size) == content
        for extent_pos, extent in _positioned(await source.extents(0, source.size)):
            if extent.zero:
                assert not any(content[extent_pos : extent_pos + extent.length])


def _positioned(extents: list[Extent]) -> list[tuple[int, Extent]]:
    positions, pos = [], 0
    for extent in extents:
        positions.append((pos, extent))
        pos += extent.length
    return positions


# ---- how it is read ----


def fabricate(cluster_size: int, table_clusters: int, image_size: int, file_size: int = 0) -> bytearray:
    """Return an image without any allocated cluster, of `file_size` bytes if that is more than it needs."""
    geometry = Geometry(cluster_size, table_clusters)
    image = bytearray(max(cluster_size + geometry.table_bytes, file_size))
    image[:64] = Header(geometry, image_size, cluster_size).encode()
    return image


async def as_qed(file: Source, pages: PageCache | None = None) -> QedSource:
    header, _ = await read_header(file)
    return QedSource(file, header, None, pages or PageCache())


async def test_a_table_is_loaded_once_for_many_readers(tmp_path: Path) -> None:
    file = MemorySource(write_one_cluster(tmp_path / "i.qed").read_bytes())
    source = await as_qed(file)
    file.reads.clear()
    file.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(read, source, 64 * KIB, 512)
        await trio.testing.wait_all_tasks_blocked()
        file.gate.set()
    assert file.reads == [(L1, PAGE), (L2, PAGE)]


async def test_a_cancelled_load_is_not_the_answer_of_those_who_waited(tmp_path: Path) -> None:
    file = MemorySource(write_one_cluster(tmp_path / "i.qed").read_bytes())
    source = await as_qed(file)
    file.gate = trio.Event()
    answers: list[bytes] = []

    async def ask(scope: trio.CancelScope) -> None:
        with scope:
            answers.append(await read(source, 0, 4))

    first = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, first)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(ask, trio.CancelScope())
        await trio.testing.wait_all_tasks_blocked()
        first.cancel()
        await trio.testing.wait_all_tasks_blocked()
        file.gate.set()
    assert answers == [b"\x11" * 4]


async def test_an_error_of_one_piece_is_the_error_of_the_read(tmp_path: Path) -> None:
    commands = ["write -P 1 0 4k", "write -P 2 8k 4k", "write -P 3 16k 4k"]
    image = make_qed(tmp_path / "i.qed", "-o", "cluster_size=4k", "1M", commands=commands)
    file = MemorySource(image.read_bytes())
    source = await as_qed(file)
    assert await read(source, 0, 24 * KIB) == content_by_qemu(image)[: 24 * KIB]
    file.failure = BackingUnavailable("memory", "is away")
    with pytest.raises(BackingUnavailable, match="memory: is away"):
        await read(source, 0, 24 * KIB)


async def test_neighbouring_clusters_are_one_request(tmp_path: Path) -> None:
    image = make_qed(tmp_path / "i.qed", "-o", "cluster_size=4k", "8M", commands=["write -P 1 0 3M"])
    file = MemorySource(image.read_bytes())
    source = await as_qed(file)
    await read(source, 0, MIB)
    file.reads.clear()
    await read(source, 1000, MIB)
    assert [length for _, length in file.reads] == [MIB]


async def test_neighbours_under_different_tables_are_one_request() -> None:
    image = fabricate(4 * KIB, 1, 4 * MIB, file_size=5 * MIB)
    l1, first_l2, second_l2, data = (n * 4 * KIB for n in (1, 2, 3, 4))
    struct.pack_into("<2Q", image, l1, first_l2, second_l2)
    struct.pack_into("<1024Q", image, first_l2, *range(data, data + 4 * MIB, 4 * KIB))  # the two tables lie together
    image[data:] = random_bytes(len(image) - data)
    file = MemorySource(image)
    source = await as_qed(file)
    await read(source, 0, 4 * MIB)
    assert [length for _, length in file.reads[-3:]] == [4 * KIB, 4 * KIB, 4 * MIB]


async def test_past_the_end_of_a_short_backing_an_image_promises_zeros(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(random_bytes(100 * KIB))
    async with opened(make_qed(tmp_path / "i.qed", "-b", "base.raw", "-F", "raw", "1M")) as source:
        assert await source.extents(0, MIB) == [Extent(100 * KIB, False), Extent(924 * KIB, True)]
        assert await source.extents(512 * KIB, 4 * KIB) == [Extent(4 * KIB, True)]


async def test_the_pages_of_a_chain_stay_within_their_budget() -> None:
    file = MemorySource(fabricate(1 << 16, 4, 1 << 40, file_size=1 << 20))
    struct.pack_into("<512Q", file.content, 1 << 16, *[0x50000] * 512)  # 512 L1 entries, one and the same L2 table
    pages = PageCache(budget=3 * PAGE)
    source = await as_qed(file, pages)
    file.reads.clear()
    for _ in range(2):
        for page in range(4):  # one L1 page and four of L2: more than fit
            await read(source, page * (PAGE // 8) * (1 << 16), 512)
    assert len(file.reads) > 5
    assert pages.bytes <= 3 * PAGE


async def test_the_largest_tables_cost_a_page_each() -> None:
    file = MemorySource(fabricate(1 << 26, 1, 1 << 62))
    source = await as_qed(file)
    file.reads.clear()
    assert await read(source, (1 << 62) - MIB, MIB) == bytes(MIB)
    assert [length for _, length in file.reads] == [PAGE]
    assert PAGES_BUDGET <= 64 * MIB


async def test_a_sparse_image_is_told_to_be_zero_without_reading_every_table() -> None:
    file = MemorySource(fabricate(1 << 16, 4, 1 << 44))
    source = await as_qed(file)
    assert await source.extents(0, 1 << 44) == [Extent(1 << 44, True)]
    assert sum(length for _, length in file.reads) < 256 * KIB


@pytest.mark.parametrize("length", [0, 3, 4, 40, 63, 64, 4096])
async def test_a_cut_header_is_refused(length: int) -> None:
    image = fabricate(4096, 2, MIB)[:length]
    with pytest.raises(BackingRefused):
        await as_qed(MemorySource(image))


@settings(max_examples=200)
@given(
    pokes=st.lists(
        st.tuples(st.integers(0, 6 * 512), st.one_of(st.integers(0, 0xA000), st.integers(0, (1 << 64) - 1))), max_size=6
    ),
    pos=st.integers(0, MIB),
    length=st.integers(0, 70_000),
)
async def test_no_image_makes_it_fail_in_another_way(pokes: list[tuple[int, int]], pos: int, length: int) -> None:
    image = fabricate(4096, 2, MIB, file_size=0x9000)
    for index, value in pokes:
        struct.pack_into("<Q", image, index * 8, value)
    with contextlib.suppress(BackingRefused, CorruptEntry):
        source = await as_qed(MemorySource(image))
        pos = min(pos, source.size)
        length = min(length, source.size - pos)
        await read(source, pos, length)
        assert sum(extent.length for extent in await source.extents(pos, length)) == length
