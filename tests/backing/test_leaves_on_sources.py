"""The life of a leaf, the same on each kind of backing: read, copied in several goes, changed under it, away and back."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from qedfs.config import DiskOptions, Mode, MountOptions, Reserve
from qedfs.disk.disk import Disk
from qedfs.errors import BackingError, BackingRefused
from qedfs.image.geometry import Geometry
from qedfs.session.admission import Terms, admitted
from qedfs.session.leaf import NewLeaf, create
from tests.backing.samples import KIB, MIB, content_by_qemu
from tests.backing.scripted_web import Handler, ScriptedWeb, scripted_web
from tests.backing.source_places import CONTENT, HOLE, PLACES, SIZE, File, Mirrors, Place

CLUSTER = 64 * KIB


SERVERS = [kind for kind in PLACES if kind is not File]


def _name(kind: type[Place]) -> str:
    return kind.__name__.lower()


@pytest.fixture(params=PLACES, ids=_name)
def place(request: pytest.FixtureRequest, tmp_path: Path, no_habits: None) -> Iterator[Place]:
    with ExitStack() as servers:
        made: Place = request.param(tmp_path, servers)
        yield made


@pytest.fixture
async def leaf(place: Place, tmp_path: Path) -> Path:
    """A leaf on it, as `qedfs create` makes it."""
    path = tmp_path / "leaf.qed"
    await create(NewLeaf(str(path), None, place.name, None, Geometry(CLUSTER, 4), "", False, False))
    return path


@pytest.fixture
def warnings(place: Place, expected_warnings: Callable[[str], None]) -> None:
    """Of mirrors each that fails or is left out is told."""
    if isinstance(place, Mirrors):
        expected_warnings("the other mirrors are asked|this mirror is left out")


@asynccontextmanager
async def served(leaf: Path, mode: Mode = Mode.COR) -> AsyncIterator[Disk]:
    options = DiskOptions(mode=mode, readahead=0, reserve=Reserve(size=0), backing_timeout=30)
    async with admitted(str(leaf), Terms(MountOptions(disk=options), "/nowhere", os.getuid())) as (disk, _):
        yield disk


async def read(disk: Disk, pos: int, length: int = CLUSTER) -> None:
    assert await disk.read(pos, length) == CONTENT[pos : pos + length]


async def test_all_of_it_reads_as_the_backing_does(leaf: Path) -> None:
    async with served(leaf) as disk:
        await read(disk, 0, SIZE)
        await read(disk, 0, SIZE)  # now from the leaf


async def test_zeros_take_no_room_and_are_not_fetched_where_the_backing_tells_them(place: Place, leaf: Path) -> None:
    async with served(leaf, Mode.STREAM) as disk:
        await stream(disk, 0, SIZE)
        assert await disk.counts() == ((SIZE - MIB) // CLUSTER, MIB // CLUSTER)
        fetched = disk.statistics().backing_bytes_read
        assert fetched == (SIZE - (HOLE.stop - HOLE.start) if place.tells_zeros else SIZE)


async def stream(disk: Disk, pos: int, end: int) -> None:
    while pos < end:
        pos += await disk.stream(pos)


async def test_copying_goes_on_where_it_has_ended_and_fetches_nothing_twice(place: Place, leaf: Path) -> None:
    async with served(leaf) as disk:
        await read(disk, SIZE - CLUSTER)
        await stream(disk, 0, CLUSTER * 3)
        first = disk.statistics().backing_bytes_read
    async with served(leaf, Mode.STREAM) as disk:
        await stream(disk, 0, SIZE)
        assert await disk.complete()
        data = SIZE - (HOLE.stop - HOLE.start) if place.tells_zeros else SIZE
        assert first + disk.statistics().backing_bytes_read == data
    assert content_by_qemu(leaf) == CONTENT
    place.replace()  # nobody asks it any more
    async with served(leaf) as disk:
        await read(disk, 0, SIZE)


async def test_a_backing_that_was_replaced_is_refused(place: Place, leaf: Path, warnings: None) -> None:
    async with served(leaf) as disk:
        await read(disk, 0)
    place.replace()
    with pytest.raises(BackingRefused, match=r"is not what the image was made on|has 1048576 bytes"):
        async with served(leaf):
            raise AssertionError("it is served")


async def test_a_backing_that_is_replaced_while_it_is_read_is_never_mixed_in(
    place: Place, leaf: Path, warnings: None, expected_warnings: Callable[[str], None]
) -> None:
    if place.notices:
        expected_warnings("disk: .* (has been replaced|has now)")
    async with served(leaf) as disk:
        await read(disk, 0)
        place.replace()
        if place.notices:
            with pytest.raises(BackingError):
                await read(disk, SIZE - CLUSTER)
            assert disk.statistics().backing_state == "refused"
        else:
            await read(disk, SIZE - CLUSTER)
        await read(disk, 0)


def _late(handler: Handler) -> None:
    handler.server.released.wait(60)
    handler.part()


async def test_a_part_that_is_late_is_asked_for_a_second_time_of_the_same_server(
    scripted: ScriptedWeb, tmp_path: Path
) -> None:
    scripted.content = CONTENT
    await create(NewLeaf(str(tmp_path / "l"), None, scripted.url, "raw", Geometry(CLUSTER, 4), "", False, False))
    async with served(tmp_path / "l") as disk:
        await read_clusters(disk, 25)
        before = disk.statistics().backing_asked_twice
        scripted.script.append(_late)
        with trio.fail_after(10):
            await read(disk, 25 * CLUSTER)
        assert disk.statistics().backing_asked_twice == before + 1
        scripted.released.set()


async def test_a_part_that_is_late_on_one_mirror_comes_from_another(scripted: ScriptedWeb, tmp_path: Path) -> None:
    scripted.content = CONTENT
    with scripted_web(CONTENT) as other:
        name = f"mirrors:{scripted.url}/x|{other.url}/x"
        await create(NewLeaf(str(tmp_path / "l"), None, name, "raw", Geometry(CLUSTER, 4), "", False, False))
        async with served(tmp_path / "l") as disk:
            await read_clusters(disk, 25)
            with trio.fail_after(10):
                # By `create`, and now when the second one is let in beside the first, 16 of each are compared.
                while _samples(scripted) < 32:  # noqa: ASYNC110 (nothing tells)
                    await trio.sleep(0.01)
            before = len(other.requests)
            scripted.script.append(_late)
            with trio.fail_after(10):
                await read(disk, 25 * CLUSTER)
            assert other.requests[before:][0].headers["Range"] == f"bytes={25 * CLUSTER}-{26 * CLUSTER - 1}"
            assert not disk.statistics().last_error
            scripted.released.set()


def _samples(web: ScriptedWeb) -> int:
    """Return how many parts of the size of a sample were asked for."""
    ranges = [request.headers["Range"].removeprefix("bytes=").split("-") for request in web.requests]
    return sum(int(last) - int(first) == 4095 for first, last in ranges)


async def read_clusters(disk: Disk, count: int) -> None:
    for number in range(count):
        await read(disk, number * CLUSTER)


@pytest.mark.parametrize("place", SERVERS, ids=_name, indirect=True)
async def test_an_outage_stalls_what_is_not_local_and_heals(place: Place, leaf: Path, warnings: None) -> None:
    async with served(leaf) as disk, trio.open_nursery() as nursery:
        await read(disk, 0)
        place.stop()
        ended = trio.Event()

        async def late() -> None:
            await read(disk, SIZE - CLUSTER)
            ended.set()

        nursery.start_soon(late)
        with trio.fail_after(20):
            while disk.statistics().backing_state != "unavailable":  # noqa: ASYNC110 (nothing tells)
                await trio.sleep(0.01)
            await read(disk, 0)
            assert not ended.is_set()
            await trio.to_thread.run_sync(place.start)
            await ended.wait()
        assert disk.statistics().backing_state == "healthy"
