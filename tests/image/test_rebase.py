from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from qedfs.errors import InvalidImage, QedfsError, UsageError
from qedfs.image import header as headers
from qedfs.image import record as records
from qedfs.image.create import create_image, create_leaf
from qedfs.image.geometry import Geometry
from qedfs.image.header import Header
from qedfs.image.image import open_image
from qedfs.image.rebase import rebase_image
from qedfs.image.record import Pin, Record
from qedfs.image.storage import open_storage
from tests.image.memory_storage import MemoryStorage
from tests.image.qemu import poke, qemu_check, qemu_img, qemu_io

MIB = 1 << 20
SMALL = Geometry(4096, 2)
NOTHING = Record()


def pin_of(name: str, tag: str = "mtime:1", size: int = MIB) -> Pin:
    return Pin(records.hash_name(name), "raw", size, tag)


async def leaf_on(backing: str, record: Record = NOTHING) -> MemoryStorage:
    storage = MemoryStorage()
    await create_image(storage, size=MIB, geometry=SMALL, backing=(backing, True), record=record)
    storage.log.clear()
    return storage


async def state(content: bytes | bytearray) -> tuple[str, bool, Record]:
    """Return backing name, whether it is raw, and the record."""
    image = await open_image(MemoryStorage(content, writable=False))
    return image.backing_name, image.header.backing_is_raw, image.record


def power_cuts(before: bytes, storage: MemoryStorage) -> list[bytes]:
    """Return the file as it may be after a power cut: at each flush, and with each write since by itself or not."""
    states = [before]
    content = bytearray(before)
    flushed = bytes(before)
    for operation in storage.log:
        if operation.kind == "flush":
            flushed = bytes(content)
        else:
            assert operation.kind == "write"
            for base in (bytearray(flushed), content):
                base[operation.offset : operation.offset + operation.length] = operation.data
                states.append(bytes(base))
    return states


@pytest.mark.parametrize("new", ["b", "a-much-longer-name" * 20, "old.ram"])
async def test_at_every_instant_the_old_backing_has_its_pin_or_the_new_one_has_its_own(new: str) -> None:
    old = "old.raw"
    storage = await leaf_on(old, Record(mode="cow", pins=(pin_of(old),)))
    before = bytes(storage.content)
    assert await rebase_image(storage, backing=(new, False), pin=pin_of(new, "etag:2"), force=False)
    seen = set()
    for content in power_cuts(before, storage):
        name, raw, record = await state(content)
        seen.add((name, raw))
        assert record.mode == "cow"
        assert record.pin_of(name) == (pin_of(old) if name == old else pin_of(new, "etag:2"))
    assert seen == {(old, True), (new, False)}
    assert await state(storage.durable) == (new, False, Record("cow", pins=(pin_of(new, "etag:2"),)))


async def test_every_write_of_a_rebase_is_flushed_before_the_next() -> None:
    storage = await leaf_on("old.raw")
    await rebase_image(storage, backing=("new.raw", True), pin=pin_of("new.raw"), force=False)
    assert all("flush" in pair for pair in pairwise(storage.kinds()))
    assert storage.kinds()[-1] == "flush"


async def test_going_there_and_back_many_times_needs_no_more_room() -> None:
    storage = await leaf_on("a" * 1000)
    for i in range(20):
        name = "ab"[i % 2] * (900 + i)
        assert await rebase_image(storage, backing=(name, True), pin=pin_of(name), force=False)
        assert (await state(storage.content))[0] == name


async def test_a_name_without_room_beside_the_old_one_needs_force() -> None:
    storage = await leaf_on("a" * 3000)
    before = bytes(storage.content)
    with pytest.raises(UsageError, match="--force"):
        await rebase_image(storage, backing=("b" * 3000, True), pin=None, force=False)
    assert storage.content == before
    await rebase_image(storage, backing=("b" * 3000, True), pin=None, force=True)
    assert (await state(storage.content))[0] == "b" * 3000


async def test_the_same_name_gets_a_new_pin_and_never_keeps_an_old_one() -> None:
    storage = await leaf_on("base", Record(pins=(pin_of("base", "old"),)))
    assert await rebase_image(storage, backing=("base", True), pin=pin_of("base", "new"), force=False)
    assert (await state(storage.content))[2].pin_of("base") == pin_of("base", "new")
    assert not await rebase_image(storage, backing=("base", False), pin=None, force=False)
    assert await state(storage.content) == ("base", False, Record())


async def test_a_pin_that_finds_no_room_is_reported() -> None:
    storage = await leaf_on("base")
    assert not await rebase_image(storage, backing=("b" * 4000, True), pin=pin_of("b"), force=True)
    assert (await state(storage.content))[0] == "b" * 4000


async def test_a_name_that_cannot_be_stored_is_refused_and_nothing_is_written() -> None:
    storage = await leaf_on("base")
    for name in ("", "x\0y", "x" * 4033):
        with pytest.raises(InvalidImage):
            await rebase_image(storage, backing=(name, True), pin=None, force=True)
    assert "write" not in storage.kinds()


async def test_unknown_compatible_features_forbid_a_new_name_but_not_its_removal() -> None:
    storage = MemoryStorage()
    await create_image(storage, size=0, geometry=SMALL, backing=("old", True), record=Record())
    header = headers.decode(bytes(storage.content), len(storage.content), "leaf")
    storage.content[:64] = replace(header, compat_features=8).encode()
    with pytest.raises(InvalidImage, match="compatible features"):
        await rebase_image(storage, backing=("new", True), pin=None, force=False)
    await rebase_image(storage, backing=None, pin=None, force=False)
    assert headers.decode(bytes(storage.content), len(storage.content), "leaf").compat_features == 8
    assert (await state(storage.content))[0] == ""


# -- dropping ----------------------------------------------------------------------------------------------------------


async def dropped(path: Path) -> None:
    await rebase_image(await open_storage(str(path), writable=True), backing=None, pin=None, force=False)


async def test_a_backing_is_dropped_once_nothing_needs_it_and_not_before(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"\5" * MIB)
    leaf = tmp_path / "leaf.qed"
    record = Record(mode="cor", pins=(pin_of("base.raw"),))
    await create_leaf(
        str(leaf), size=MIB + 4096, geometry=Geometry(), backing=("base.raw", True), record=record, overwrite=False
    )
    qemu_io(leaf, "write -P 1 0 512k")
    before = leaf.read_bytes()
    with pytest.raises(UsageError, match=f"from byte {512 << 10} on"):
        await dropped(leaf)
    assert leaf.read_bytes() == before
    qemu_io(leaf, "write -z 512k 512k")
    await dropped(leaf)
    (tmp_path / "base.raw").unlink()
    assert await state(leaf.read_bytes()) == ("", False, Record("cor"))
    assert qemu_check(leaf).status == 0
    qemu_io(leaf, "read -P 1 0 512k", "read -P 0 512k 516k")


async def test_without_a_pin_the_whole_disk_counts_as_needed(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"")
    leaf = tmp_path / "leaf.qed"
    qemu_img("create", "-f", "qed", "-b", tmp_path / "base.raw", "-F", "raw", leaf, "1M")
    with pytest.raises(UsageError, match="from byte 0 on"):
        await dropped(leaf)


# -- with qemu-img -----------------------------------------------------------------------------------------------------


async def test_qemu_follows_our_rebase_and_we_follow_its_own(tmp_path: Path) -> None:
    for name, byte in (("a.raw", b"\1"), ("b.raw", b"\2")):
        (tmp_path / name).write_bytes(byte * MIB)
    leaf = tmp_path / "leaf.qed"
    qemu_img("create", "-f", "qed", "-b", tmp_path / "a.raw", "-F", "raw", leaf)
    new = str(tmp_path / "b.raw")
    await rebase_image(await open_storage(str(leaf), writable=True), backing=(new, True), pin=pin_of(new), force=False)
    qemu_io(leaf, "read -P 2 0 1M")
    qemu_img("rebase", "-u", "-b", tmp_path / "a.raw", "-F", "raw", leaf)
    name, raw, record = await state(leaf.read_bytes())
    assert (name, raw) == (str(tmp_path / "a.raw"), True)
    assert record.pin_of(name) is None
    assert record.pin_of(new) == pin_of(new)


async def test_room_beyond_one_cluster_is_used(tmp_path: Path) -> None:
    geometry = Geometry(4096, 2)
    header = Header(geometry, MIB, 8192, header_size=2).with_backing(5, raw=True, name_offset=5000)
    storage = MemoryStorage(header.encode().ljust(8192 + geometry.table_bytes, b"\0"))
    storage.content[5000:5005] = b"a.raw"
    assert await rebase_image(storage, backing=("b.raw", True), pin=pin_of("b.raw"), force=False)
    name, _, record = await state(storage.content)
    assert name == "b.raw"
    assert record.pin_of(name)


async def test_an_image_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"no")
    with pytest.raises(QedfsError, match="not a QED image"):
        await dropped(tmp_path / "x")
    poke(tmp_path / "x", 0, b"QED\0")
    with pytest.raises(QedfsError, match="shorter than"):
        await dropped(tmp_path / "x")
