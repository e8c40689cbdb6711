"""Leaves that share a cache: what crosses the network once, and what happens when the cache cannot be had."""

from __future__ import annotations

import json
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from qedfs.backing import locate
from qedfs.backing.base import Extent, Identity, Source
from qedfs.backing.locate import Reference
from qedfs.backing.policy import Policy
from qedfs.config import DiskOptions, Mode, MountOptions, Reserve
from qedfs.disk.disk import Disk
from qedfs.errors import BackingChanged, BackingUnavailable, UsageError
from qedfs.image.image import open_image
from qedfs.image.storage import FileStorage, open_storage
from qedfs.session.admission import Terms, admitted
from qedfs.session.leaf import looked_at
from qedfs.session.shared_cache import either, open_shared_caches
from tests.model.fake_source import FakeSource

MIB = 1 << 20
SIZE = 4 * MIB
CLUSTER = 65536
CONTENT = random.Random("shared cache").randbytes(SIZE)
NAME = "nbd://store.example/base"
ETAG = Identity(SIZE, "etag:1")
PATIENCE = 20


class Store:
    """The remote that every leaf names; `opened` counts connections to it."""

    def __init__(self) -> None:
        self.source = FakeSource(CONTENT, name=NAME)
        self.source.identity = ETAG
        self.opened = 0
        self.error: Exception | None = None

    async def open(self, reference: Reference, policy: Policy) -> Source:
        self.opened += 1
        await trio.lowlevel.checkpoint()
        if self.error:
            raise self.error
        return self.source

    @property
    def bytes_read(self) -> int:
        return sum(length for _, length in self.source.requests)


class Place:
    """A store, leaves on it, and the folder of the caches."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder = folder
        self.store = store
        self.caches = folder / "caches"

    @asynccontextmanager
    async def mount(self, size: int = 0, **disk: Any) -> AsyncIterator[Mount]:
        options = MountOptions(
            disk=DiskOptions(**{"readahead": 0, "reserve": Reserve(size=0), **disk}),
            allow_backing=("*",),
            shared_cache=str(self.caches),
            shared_cache_size=size,
        )
        async with open_shared_caches(options, "/nowhere", ()) as caches, trio.open_nursery() as leaves:
            mount = Mount(self.folder, Terms(options, "/nowhere", os.getuid(), caches), leaves)
            yield mount
            mount.close()

    def files(self) -> list[Path]:
        return sorted(self.caches.iterdir())


class Mount:
    """Leaves that are served side by side, each in a task of its own."""

    def __init__(self, folder: Path, terms: Terms, nursery: trio.Nursery) -> None:
        self.folder = folder
        self.terms = terms
        self._nursery = nursery
        self._leaving: dict[str, trio.Event] = {}
        self._closed: dict[str, trio.Event] = {}

    def close(self) -> None:
        for leaving in self._leaving.values():
            leaving.set()

    async def close_leaf(self, name: str) -> None:
        self._leaving[name].set()
        await self._closed[name].wait()

    async def _keep(self, name: str, task_status: trio.TaskStatus[Disk]) -> None:
        async with admitted(str(self.path(name)), self.terms) as (disk, _):
            leaving, self._closed[name] = self._leaving.setdefault(name, trio.Event()), trio.Event()
            task_status.started(disk)
            await leaving.wait()
        self._closed[name].set()

    async def leaf(self, name: str, *, mode: int = 0o644, hold: bool = False) -> Disk:
        """Return the disk of the leaf `name`, made if it is not there; it is open until `close_leaf` or `close`."""
        path = self.path(name)
        if not path.exists():
            made = ["qemu-img", "create", "-q", "-f", "qed", "-u", "-b", NAME, "-F", "raw", str(path), str(SIZE)]
            await trio.run_process(made)
            if hold:
                image = await open_image(await open_storage(str(path), writable=True))
                await image.change_record(lambda record: replace(record, hold=True))
                await image.aclose()
        path.chmod(mode)
        disk: Disk = await self._nursery.start(self._keep, name)
        return disk

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.qed"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    store = Store()
    monkeypatch.setattr(locate, "open_backing", store.open)
    return Place(tmp_path, store)


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until `condition`: of what happens behind the answers nobody is told."""
    with trio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110 (there is no event for it)
            await trio.sleep(0.01)


async def read(disk: Disk, pos: int = 0, length: int = SIZE) -> None:
    assert await disk.read(pos, length) == CONTENT[pos : pos + length]


async def test_second_leaf_asks_the_store_for_nothing_that_the_first_has_read(place: Place) -> None:
    async with place.mount() as mount:
        await read(await mount.leaf("a"), 0, MIB)
        asked = place.store.bytes_read
        second = await mount.leaf("b")
        await read(second, 0, MIB)
        assert (place.store.bytes_read, asked, place.store.opened) == (MIB, MIB, 1)
        assert second.statistics().backing_bytes_read == 0
        await read(second, MIB, CLUSTER)
        assert second.statistics().backing_bytes_read == CLUSTER


async def test_what_is_still_on_its_way_into_the_cache_counts_for_the_leaf_that_asked_only(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies are made behind the answers, so a second leaf can come before the tables know of them."""
    written, write_behind = trio.Event(), FileStorage.write_behind

    async def held_back(self: FileStorage, pos: int, data: bytes) -> None:
        await written.wait()
        await write_behind(self, pos, data)

    monkeypatch.setattr(FileStorage, "write_behind", held_back)
    async with place.mount() as mount:
        first, second = await mount.leaf("a"), await mount.leaf("b")
        await read(first, CLUSTER, MIB)
        await read(second, 512, MIB + CLUSTER)
        written.set()
        assert first.statistics().backing_bytes_read == MIB
        assert second.statistics().backing_bytes_read == 2 * CLUSTER
    assert place.store.bytes_read == MIB + 2 * CLUSTER


async def test_each_cluster_crosses_the_network_once_however_many_leaves_want_it_at_a_time(place: Place) -> None:
    async with place.mount() as mount:
        disks = [await mount.leaf(str(number)) for number in range(20)]
        gate = place.store.source.hold()
        async with trio.open_nursery() as nursery:
            for number, disk in enumerate(disks):
                nursery.start_soon(read, disk, *((0, SIZE) if number % 2 else (MIB, 2 * MIB)))
            await gate.arrived()
            gate.release()
        assert (place.store.bytes_read, place.store.opened) == (SIZE, 1)


async def test_cache_is_there_at_the_next_start_if_the_store_tells_its_content(place: Place) -> None:
    async with place.mount() as mount:
        await read(await mount.leaf("a"))
    (cache,) = place.files()
    await check(cache)
    assert cache.stat().st_mode & 0o777 == 0o600
    async with place.mount() as mount:
        await read(await mount.leaf("b"))
    assert place.store.bytes_read == SIZE


async def test_cache_of_a_process_that_was_killed_serves_what_it_had_committed(place: Place) -> None:
    async with place.mount() as mount:
        await read(await mount.leaf("a"), 0, 2 * MIB)
        (cache,) = place.files()
        with trio.fail_after(PATIENCE):
            while not await is_committed(cache, 2 * MIB):
                await trio.lowlevel.checkpoint()
        left = cache.read_bytes()  # as a killed process leaves the file, NEED_CHECK set
    cache.write_bytes(left)
    async with place.mount() as mount:
        await read(await mount.leaf("b"), 0, 3 * MIB)
    assert place.store.bytes_read == 3 * MIB
    await check(cache)


async def is_committed(cache: Path, length: int) -> bool:
    async with looked_at(str(cache)) as image:
        await image.survey()
        return (await image.counts()).data * CLUSTER == length


async def check(cache: Path) -> None:
    """Let QEMU judge a cache, without its backing, which QEMU cannot reach."""
    name = json.dumps({"driver": "qed", "file": {"driver": "file", "filename": str(cache)}, "backing": None})
    await trio.run_process(["qemu-img", "check", "-q", f"json:{name}"])


async def test_store_that_does_not_tell_its_content_gets_a_cache_that_ends_with_its_last_leaf(place: Place) -> None:
    place.store.source.identity = Identity(SIZE)
    async with place.mount() as mount:
        await read(await mount.leaf("a"), 0, MIB)
        await read(await mount.leaf("b"), 0, MIB)
        assert place.store.bytes_read == MIB
        (cache,) = place.files()
        left = cache.read_bytes()
    assert place.files() == []
    # And what a killed process has left is not believed, and goes.
    cache.write_bytes(left)
    cache.chmod(0o600)
    async with place.mount() as mount:
        assert place.files() == []
        await read(await mount.leaf("c"), 0, MIB)
    assert place.store.bytes_read == 2 * MIB


async def test_leaf_that_comes_after_a_connection_ended_believes_no_cache_of_a_store_that_does_not_tell(
    place: Place,
) -> None:
    place.store.source.identity = Identity(SIZE)
    async with place.mount() as mount:
        await read(await mount.leaf("a"), 0, MIB)
        broken, place.store.source = place.store.source, FakeSource(bytes(SIZE), name=NAME)
        broken.error = BackingUnavailable(NAME, "the server is stopped")
        await (await mount.leaf("b")).read(
            2 * MIB, CLUSTER
        )  # has the cache connect anew: to another content, as it happens
        assert await (await mount.leaf("c")).read(0, MIB) == bytes(MIB)
        assert len(place.files()) == 2


async def test_another_content_gets_another_cache(place: Place) -> None:
    async with place.mount() as mount:
        await read(await mount.leaf("a"), 0, MIB)
    place.store.source.identity = Identity(SIZE, "etag:2")
    place.store.source.content = bytes(SIZE)
    async with place.mount() as mount:
        assert await (await mount.leaf("b")).read(0, MIB) == bytes(MIB)
        with pytest.raises(BackingChanged):
            await mount.leaf("a")  # its own pin decides, as without a cache
    assert len(place.files()) == 2


async def test_content_that_changes_while_mounted_is_refused_and_new_leaves_get_a_new_cache(
    place: Place, expected_warnings: Any
) -> None:
    expected_warnings("is not what the image was made on")
    async with place.mount() as mount:
        first = await mount.leaf("a")
        await read(first, 0, MIB)
        place.store.source.error = BackingUnavailable(NAME, "gone")
        async with trio.open_nursery() as nursery:

            async def refused() -> None:
                with pytest.raises(BackingChanged):
                    await first.read(MIB, CLUSTER)

            nursery.start_soon(refused)
            await eventually(lambda: first.statistics().state == "backing-error")
            changed = FakeSource(bytes(SIZE), name=NAME)
            changed.identity = Identity(SIZE, "etag:2")
            place.store.source = changed
        await read(first, 0, MIB)
        assert await (await mount.leaf("b")).read(0, MIB) == bytes(MIB)
        assert len(place.files()) == 2


async def test_outage_is_waited_out_once_and_shown_and_heals(place: Place) -> None:
    async with place.mount(backing_timeout=3) as mount:
        disk, other = await mount.leaf("a"), await mount.leaf("b")
        await read(disk, 0, MIB)
        place.store.source.error = place.store.error = BackingUnavailable(NAME, "the cable is out")
        with pytest.raises(BackingUnavailable, match=r"unreachable for 3 s.*the cable is out"):
            await disk.read(MIB, CLUSTER)
        assert other.statistics().state == "backing-error"
        assert "the cable is out" in other.statistics().last_error
        await read(other, 0, MIB)  # from the cache, whatever the store does
        await read(await mount.leaf("c"), 0, MIB)  # and so does a leaf that comes now
        place.store.source.error = place.store.error = None
        with trio.fail_after(PATIENCE):
            while other.statistics().state != "passive":
                with trio.move_on_after(0.5):
                    await other.read(MIB, CLUSTER)
        await read(disk)


@pytest.fixture(autouse=True)
def _an_outage_is_news(request: pytest.FixtureRequest, expected_warnings: Any) -> None:
    if "outage" in request.node.name:
        expected_warnings("the cable is out")


async def test_full_cache_stops_copying_and_everything_is_read_all_the_same(
    place: Place, expected_warnings: Any
) -> None:
    expected_warnings("all the room that it was given is taken")
    async with place.mount(size=2 * MIB) as mount:
        disk = await mount.leaf("a")
        await read(disk, 0, MIB + MIB // 2)
        (cache,) = place.files()
        await eventually(lambda: cache.stat().st_blocks * 512 > MIB + MIB // 2)
        await read(disk)
        await read(await mount.leaf("b"))
        assert cache.stat().st_blocks * 512 <= 2 * MIB + 4 * CLUSTER  # and a table
        assert place.store.bytes_read >= 2 * SIZE - 2 * MIB


async def test_caches_that_nobody_uses_make_room_for_a_new_one(place: Place) -> None:
    for number in range(3):
        place.store.source.identity = Identity(SIZE, f"etag:{number}")
        async with place.mount(size=16 * MIB) as mount:
            await read(await mount.leaf(f"leaf{number}"))
        if number == 0:
            (oldest,) = place.files()
            os.utime(oldest, (1, 1))
    place.store.source.identity = Identity(SIZE, "etag:new")
    async with place.mount(size=16 * MIB) as mount:
        await read(await mount.leaf("new"))
        assert oldest not in place.files()
        assert len(place.files()) == 3


async def test_second_mount_reads_without_the_cache_that_the_first_one_has(
    place: Place, expected_warnings: Any
) -> None:
    expected_warnings("somebody else has it open for writing; without this cache")
    async with place.mount() as mount, place.mount() as other:
        await read(await mount.leaf("a"), 0, MIB)
        await read(await other.leaf("b"), 0, MIB)
        assert place.store.bytes_read == 2 * MIB


async def test_untrusted_and_held_leaves_do_not_use_it(place: Place) -> None:
    async with place.mount() as mount:
        untrusted = await mount.leaf("a", mode=0o666)
        await read(untrusted, 0, MIB)
        held = await mount.leaf("b", hold=True)
        await read(held, 0, MIB)
        assert place.files() == []
        assert place.store.bytes_read == 2 * MIB


async def test_damaged_cache_is_never_the_leaf_s_problem(place: Place, expected_warnings: Any) -> None:
    expected_warnings("begun anew")
    expected_warnings("table entry")
    async with place.mount() as mount:
        await read(await mount.leaf("a"))
    (cache,) = place.files()
    content = bytearray(cache.read_bytes())
    l1 = int.from_bytes(content[40:48], "little")
    l2 = int.from_bytes(content[l1 : l1 + 8], "little")
    content[l2 : l2 + 8] = (1 << 50).to_bytes(8, "little")
    cache.write_bytes(content)
    async with place.mount() as mount:
        await read(await mount.leaf("b"))
    cache.write_bytes(b"no image at all")
    async with place.mount() as mount:
        await read(await mount.leaf("c"))


async def test_leaf_is_streamed_through_the_cache_and_zeros_pass_through_it(place: Place, tmp_path: Path) -> None:
    content = CONTENT[: 2 * MIB] + bytes(MIB) + CONTENT[3 * MIB :]
    place.store.source.content = content
    place.store.source.promises = True
    async with place.mount(mode=Mode.STREAM) as mount:
        first, second = await mount.leaf("a"), await mount.leaf("b")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream, first)
            nursery.start_soon(stream, second)
        assert place.store.bytes_read == 3 * MIB
        (cache,) = place.files()
        assert cache.exists()
    base = tmp_path / "base.raw"
    base.write_bytes(content)
    for name in ("a", "b"):
        compare = ["qemu-img", "compare", "-f", "raw", "-F", "qed", str(base), str(mount.path(name))]
        assert "identical" in (await trio.run_process(compare, capture_stdout=True)).stdout.decode()
        async with looked_at(str(mount.path(name))) as image:
            assert image.backing_name == ""


async def stream(disk: Disk) -> None:
    pos = 0
    while more := await disk.stream(pos):
        pos += more
    assert await disk.complete()


async def test_cache_closes_with_its_last_leaf_and_opens_again_with_the_next(place: Place) -> None:
    async with place.mount() as mount:
        for name in ("a", "b"):
            await read(await mount.leaf(name), 0, MIB)
            await mount.close_leaf(name)
        assert (place.store.bytes_read, place.store.opened) == (MIB, 2)


async def test_mount_ends_while_its_leaves_wait_for_a_store_that_is_away(place: Place, expected_warnings: Any) -> None:
    expected_warnings("only what is local can be read")
    expected_warnings("the disk is being closed")
    place.store.error = BackingUnavailable(NAME, "away")
    with trio.fail_after(PATIENCE):
        async with place.mount() as mount, trio.open_nursery() as nursery:
            disk = await mount.leaf("a")

            async def given_up() -> None:
                with pytest.raises(BackingUnavailable):
                    await disk.read(0, CLUSTER)

            nursery.start_soon(given_up)
            await trio.testing.wait_all_tasks_blocked()
            mount.close()


def test_zeros_of_either_list_are_zeros() -> None:
    one = [Extent(10, False), Extent(20, True), Extent(10, False)]
    other = [Extent(5, True), Extent(30, False), Extent(5, True)]
    assert either(one, other) == [
        Extent(5, True),
        Extent(5, False),
        Extent(20, True),
        Extent(5, False),
        Extent(5, True),
    ]


@pytest.mark.parametrize("what", ["foreign", "open", "link", "file", "mountpoint", "source", "nowhere"])
async def test_folder_that_others_could_use_or_that_lies_wrong_is_refused(tmp_path: Path, what: str) -> None:
    path, mountpoint, sources = tmp_path / "caches", "/nowhere", ("/",)
    path.mkdir(mode=0o700)
    match what:
        case "foreign":
            os.chown(path, 1000, -1)
        case "open":
            path.chmod(0o710)
        case "link":
            path.rename(tmp_path / "real")
            path.symlink_to(tmp_path / "real")
        case "file":
            path.rmdir()
            path.touch(0o600)
        case "mountpoint":
            mountpoint = str(tmp_path)
        case "source":
            sources = (f"{path}/../caches",)
        case "nowhere":
            path = tmp_path / "no" / "caches"
    with pytest.raises(UsageError, match=str(path)):
        async with open_shared_caches(MountOptions(shared_cache=str(path)), mountpoint, sources):
            raise AssertionError("it was accepted")


async def test_file_that_is_not_ours_alone_is_not_used(place: Place, expected_warnings: Any) -> None:
    expected_warnings("is not a file of whoever mounts")
    async with place.mount() as mount:
        await read(await mount.leaf("a"), 0, MIB)
    (cache,) = place.files()
    cache.chmod(0o644)
    async with place.mount() as mount:
        await read(await mount.leaf("b"), 0, MIB)
    assert place.store.bytes_read == 2 * MIB


async def test_a_passing_cache_that_somebody_has_removed_is_closed_all_the_same(
    place: Place,
    expected_warnings: Any,
) -> None:
    place.store.source.identity = Identity(SIZE)
    async with place.mount() as mount:
        await read(await mount.leaf("a"))
        (file,) = place.files()
        file.unlink()
        await mount.close_leaf("a")
    held = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{fd}")
    ]
    assert not [path for path in held if path.startswith(str(place.caches))]
