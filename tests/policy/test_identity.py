"""A backing that has changed is refused and never mixed in, whenever it changes; a damaged or missing pin is told."""

from __future__ import annotations

import os
import struct
import subprocess
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from contrib.boot.server import free_port
from qedfs.backing.base import Identity, Source
from qedfs.backing.file import open_file
from qedfs.backing.resilient import Backing
from qedfs.config import DiskOptions, Mode, MountOptions
from qedfs.disk.disk import Disk
from qedfs.errors import BackingChanged, BackingRefused, BackingUnavailable
from qedfs.image import record as records
from qedfs.image.geometry import SECTOR, Geometry
from qedfs.image.header import Header, decode
from qedfs.image.locks import lock_for_writing
from qedfs.image.record import Damage, Record, hash_name
from qedfs.report.info import describe, info_text
from qedfs.session.admission import Terms, admitted
from qedfs.session.leaf import NewLeaf, create, looked_at, rebase
from tests.backing.samples import run
from tests.policy.people import ROOT, image
from tests.policy.people import served as served_by_nbd

CLUSTER = 65536
CONTENT = b"".join(bytes([n]) * CLUSTER for n in range(1, 17))
Warn = Callable[[str], None]
Change = Callable[[Path], None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(CONTENT)
    return path


@asynccontextmanager
async def served(leaf: Path, **options: object) -> AsyncIterator[Disk]:
    disk = DiskOptions(mode=Mode.COR, readahead=0, backing_timeout=5.0)
    terms = Terms(MountOptions(disk=disk, **options), "/nowhere", ROOT)  # type: ignore[arg-type]
    async with admitted(str(leaf), terms) as (opened, _):
        yield opened


def header_of(leaf: Path) -> Header:
    with leaf.open("rb") as file:
        return decode(file.read(64), leaf.stat().st_size, str(leaf))


def record_of(leaf: Path) -> Record | Damage:
    with leaf.open("rb") as file:
        return records.decode(os.pread(file.fileno(), SECTOR, records.offset(header_of(leaf))))


async def make(tmp_path: Path, backing: object, mode: str = "") -> Path:
    """As `qedfs create` does: with a pin."""
    leaf = NewLeaf(str(tmp_path / "leaf.qed"), None, str(backing), "raw", Geometry(CLUSTER, 4), mode, False, False)
    await create(leaf)
    return tmp_path / "leaf.qed"


def touch(base: Path) -> None:
    os.utime(base, ns=(0, base.stat().st_mtime_ns + 1))


def truncate(base: Path) -> None:
    os.truncate(base, 8 * CLUSTER)


def append(base: Path) -> None:
    with base.open("ab") as file:
        file.write(b"x")


def rewrite(base: Path) -> None:
    with base.open("r+b") as file:
        file.write(b"another content" * 8192)
    touch(base)  # whatever the clock's grain


def replace(base: Path) -> None:
    other = base.with_name("other")
    other.write_bytes(b"\xee" * len(CONTENT))
    touch(other)
    other.replace(base)


CHANGES = [touch, truncate, append, rewrite, replace]


@pytest.mark.parametrize("change", CHANGES)
async def test_a_backing_changed_before_the_mount_is_refused(tmp_path: Path, base: Path, change: Change) -> None:
    leaf = await make(tmp_path, base)
    change(base)
    with pytest.raises(
        BackingChanged, match=r"is not what the image was made on: .*\(accepted by '-o trust_backing'\)"
    ):
        async with served(leaf):
            pass
    assert record_of(leaf) != Damage.ABSENT


@pytest.mark.parametrize("change", [touch, truncate, append, rewrite])
async def test_a_backing_changed_while_mounted_is_eio_for_what_is_not_local(
    tmp_path: Path, base: Path, change: Change, expected_warnings: Warn
) -> None:
    expected_warnings("has been changed while it was in use|has become shorter")
    leaf = await make(tmp_path, base)
    async with served(leaf) as disk:
        assert bytes(await disk.read(0, CLUSTER)) == CONTENT[:CLUSTER]
        await disk.write(2 * CLUSTER, b"w" * CLUSTER)
        change(base)
        for _ in range(2):
            with pytest.raises(BackingRefused):
                await disk.read(9 * CLUSTER, CLUSTER)
        with pytest.raises(BackingRefused):
            await disk.write(5 * CLUSTER, b"part of a cluster")
        assert base.name in disk.statistics().last_error
        assert disk.statistics().state == "backing-error"
        # What is local stays, and takes writes.
        assert bytes(await disk.read(0, CLUSTER)) == CONTENT[:CLUSTER]
        await disk.write(100, b"local")
        await disk.write(6 * CLUSTER, b"v" * CLUSTER)  # a whole cluster needs no backing
        await disk.flush()
        assert bytes(await disk.read(2 * CLUSTER, CLUSTER)) == b"w" * CLUSTER
    run("qemu-img", "check", "-q", leaf)


async def test_a_file_put_in_the_place_of_an_open_backing_is_not_read(tmp_path: Path, base: Path) -> None:
    leaf = await make(tmp_path, base)
    async with served(leaf) as disk:
        replace(base)
        assert bytes(await disk.read(9 * CLUSTER, CLUSTER)) == CONTENT[9 * CLUSTER : 10 * CLUSTER]
    with pytest.raises(BackingChanged):
        async with served(leaf):
            pass


async def test_trust_backing_pins_the_new_one_for_later_mounts(tmp_path: Path, base: Path) -> None:
    leaf = await make(tmp_path, base)
    touch(base)
    async with served(leaf, trust_backing=True, read_only=True):
        pass
    with pytest.raises(BackingChanged):  # a read-only mount wrote nothing
        async with served(leaf):
            pass
    async with served(leaf, trust_backing=True):
        pass
    async with served(leaf):
        pass


async def test_a_leaf_made_elsewhere_is_pinned_at_the_first_writable_mount(tmp_path: Path, base: Path) -> None:
    leaf = await image(tmp_path / "leaf.qed", base)
    async with served(leaf, read_only=True):
        pass
    touch(base)
    async with served(leaf):  # nothing was pinned yet
        pass
    touch(base)
    with pytest.raises(BackingChanged):
        async with served(leaf):
            pass


async def test_qemus_rebase_voids_the_pin_and_ours_renews_it(tmp_path: Path, base: Path) -> None:
    leaf = await make(tmp_path, base)
    (tmp_path / "copy.raw").write_bytes(CONTENT)
    run("qemu-img", "rebase", "-q", "-u", "-b", "copy.raw", "-F", "raw", leaf)
    touch(tmp_path / "copy.raw")
    async with served(leaf):  # pins the copy
        pass
    touch(tmp_path / "copy.raw")
    with pytest.raises(BackingChanged):
        async with served(leaf):
            pass
    assert await rebase(str(leaf), str(base), "raw", force=False)
    async with served(leaf):
        pass
    touch(base)
    with pytest.raises(BackingChanged):
        async with served(leaf):
            pass


async def test_a_damaged_record_is_told_and_left_alone_until_somebody_trusts(
    tmp_path: Path, base: Path, expected_warnings: Warn
) -> None:
    expected_warnings("record in the header is damaged")
    leaf = await make(tmp_path, base, "stream")
    at = records.offset(header_of(leaf)) + 40
    with leaf.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), at)
    async with looked_at(str(leaf)) as looked:
        assert "warning: qedfs's record in the header is damaged" in info_text(await describe(looked))
    async with served(leaf) as disk:
        assert "record in the header is damaged" in disk.statistics().last_error
        assert bytes(await disk.read(0, CLUSTER)) == CONTENT[:CLUSTER]
    assert record_of(leaf) is Damage.BROKEN
    async with served(leaf, trust_backing=True):
        pass
    assert isinstance(record_of(leaf), Record)


@pytest.mark.parametrize("pin", ["Infinity", "-Infinity", "NaN", "1e400", '"x"', "[]", "null", "-1", "9" * 100])
def test_no_size_in_a_record_hurts(pin: str) -> None:
    text = f'{{"pins":[["{hash_name("b")}","raw",{pin},""]]}}'.encode()
    sector = (struct.pack("<8sHHI", records.MAGIC, 1, len(text), zlib.crc32(text)) + text).ljust(SECTOR, b"\0")
    assert isinstance(records.decode(sector), (Record, Damage))


async def test_a_pin_without_room_is_told(tmp_path: Path, base: Path, expected_warnings: Warn) -> None:
    expected_warnings("no room in its header to note what its backing is")
    # A name that reaches into the last sector of the header's only cluster.
    name = "/" * (4096 - 64 - SECTOR + 1 - len(str(base))) + str(base)
    leaf = tmp_path / "leaf.qed"
    run("qemu-img", "create", "-q", "-f", "qed", "-u", "-o", "cluster_size=4k", "-b", name, "-F", "raw", leaf, "1M")
    async with served(leaf) as disk:
        assert "a change will go unnoticed" in disk.statistics().last_error
        assert bytes(await disk.read(0, CLUSTER)) == CONTENT[:CLUSTER]
    async with looked_at(str(leaf)) as looked:
        assert "backing pin: warning: its header has no room for one" in info_text(await describe(looked))


# --- locks ------------------------------------------------------------------------------------------------------------


async def test_a_backing_open_for_writing_is_refused_at_mount(tmp_path: Path, base: Path) -> None:
    leaf = await make(tmp_path, base)
    with base.open("r+b") as writer:
        lock_for_writing(writer.fileno(), "writer")
        with pytest.raises(BackingRefused, match="somebody else has it open for writing"):
            async with served(leaf):
                pass
    async with served(leaf):
        pass


async def test_a_backing_that_qemu_has_open_for_writing_is_refused_and_qemu_does_not_open_ours(
    tmp_path: Path, base: Path
) -> None:
    leaf = await make(tmp_path, base)
    command = ["qemu-io", "-f", "raw", str(base)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as qemu:
        assert qemu.stdin
        assert qemu.stdout
        # Its prompt comes when it has the file open.
        assert await trio.to_thread.run_sync(qemu.stdout.read, 8) == b"qemu-io>"
        with pytest.raises(BackingRefused, match="somebody else has it open for writing"):
            async with served(leaf):
                pass
        qemu.stdin.close()
        await trio.to_thread.run_sync(qemu.wait)
    async with served(leaf):
        done = await trio.run_process(
            [*command, "-c", "read 0 1"], capture_stdout=True, capture_stderr=True, check=False
        )
        assert b'Failed to get "write" lock' in done.stdout + done.stderr


async def test_a_leaf_served_for_writing_is_no_backing_of_another(tmp_path: Path, base: Path) -> None:
    leaf = await make(tmp_path, base)
    over = await image(tmp_path / "over.qed", leaf, raw=False)
    async with served(leaf):
        with pytest.raises(BackingRefused, match=r"leaf\.qed: somebody else has it open for writing"):
            async with served(over):
                pass
    async with served(over):
        with pytest.raises(Exception, match="does not want it to change"):
            async with served(leaf):
                pass


async def test_a_lock_that_goes_away_heals_unless_the_content_has_changed(tmp_path: Path, base: Path) -> None:
    expected = Identity(len(CONTENT), f"mtime:{base.stat().st_mtime_ns}")
    failed = trio.Event()

    async def opened() -> Source:
        try:
            return await open_file(str(base))
        except BackingUnavailable:
            failed.set()
            raise

    backing = Backing(opened, name="base", expected=expected, jitter=lambda: 0.0)
    buffer = bytearray(CLUSTER)
    with base.open("r+b") as writer:
        lock_for_writing(writer.fileno(), "writer")
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(backing.read_into, 0, memoryview(buffer))
                await failed.wait()
                await trio.testing.wait_all_tasks_blocked()
                assert "open for writing" in backing.statistics().last_error
                nursery.cancel_scope.cancel()
    with trio.fail_after(10):
        await backing.read_into(0, memoryview(buffer))
    assert buffer == CONTENT[:CLUSTER]
    await backing.aclose()
    with pytest.raises(BackingUnavailable):
        await backing.read_into(0, memoryview(buffer))


# --- servers ----------------------------------------------------------------------------------------------------------


async def test_a_server_that_comes_back_with_another_size_is_refused(
    tmp_path: Path, base: Path, expected_warnings: Warn
) -> None:
    expected_warnings("has now 1049088 bytes, had 1048576")
    port = free_port()
    async with served_by_nbd(base, port) as address:
        leaf = await make(tmp_path, address)
    bigger = tmp_path / "bigger.raw"
    bigger.write_bytes(CONTENT + bytes(512))
    async with served_by_nbd(bigger, port):
        with pytest.raises(BackingChanged, match=f"its size was {len(CONTENT)} bytes and is {len(CONTENT) + 512}"):
            async with served(leaf):
                pass
    async with disk_whose_server_is_gone(leaf, base, port) as disk, served_by_nbd(bigger, port):
        with pytest.raises(BackingChanged, match="has now 1049088 bytes, had 1048576"):
            await disk.read(9 * CLUSTER, CLUSTER)
        assert "has now 1049088 bytes" in disk.statistics().last_error
        assert bytes(await disk.read(0, CLUSTER)) == CONTENT[:CLUSTER]


@asynccontextmanager
async def disk_whose_server_is_gone(leaf: Path, base: Path, port: int) -> AsyncIterator[Disk]:
    """A disk that has read its first cluster from a server that is gone by now."""
    async with trio.open_nursery() as nursery:
        gone = trio.Event()
        up = trio.Event()

        async def server() -> None:
            async with served_by_nbd(base, port):
                up.set()
                await gone.wait()

        nursery.start_soon(server)
        await up.wait()
        async with served(leaf) as disk:
            assert bytes(await disk.read(0, CLUSTER)) == CONTENT[:CLUSTER]
            gone.set()
            yield disk
