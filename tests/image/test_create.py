from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.errors import InvalidImage, LeafFull, Locked, QedfsError
from qedfs.image import header as headers
from qedfs.image import record as records
from qedfs.image.create import create_image, create_leaf
from qedfs.image.geometry import Geometry
from qedfs.image.record import Pin, Record
from qedfs.image.storage import open_storage
from tests.image.memory_storage import MemoryStorage
from tests.image.qemu import qemu_check, qemu_img, qemu_io

MIB = 1 << 20
DEFAULT = Geometry()
NOTHING = Record()
PIN = Pin(records.hash_name("base.raw"), "raw", MIB, "mtime:1")


async def make(
    path: Path,
    *,
    size: int = MIB,
    geometry: Geometry = DEFAULT,
    backing: tuple[str, bool] | None = None,
    record: Record = NOTHING,
    overwrite: bool = False,
) -> None:
    await create_leaf(str(path), size=size, geometry=geometry, backing=backing, record=record, overwrite=overwrite)


@pytest.mark.parametrize(
    ("geometry", "size", "backing"),
    [
        (Geometry(), 1 << 30, None),
        (Geometry(), 0, None),
        (Geometry(4096, 2), 1000448, ("base.raw", True)),
        (Geometry(1 << 20, 16), 1 << 40, ("base.qed", False)),
    ],
)
async def test_an_image_is_byte_for_byte_that_of_qemu_img(
    tmp_path: Path, geometry: Geometry, size: int, backing: tuple[str, bool] | None
) -> None:
    options = f"cluster_size={geometry.cluster_size},table_size={geometry.table_clusters}"
    (tmp_path / "base.raw").write_bytes(bytes(1000))
    qemu_img("create", "-f", "qed", tmp_path / "base.qed", "1M")
    line: list[str | Path] = ["create", "-f", "qed", "-o", options]
    if backing:
        line += ["-b", backing[0], "-F", "raw" if backing[1] else "qed"]
    qemu_img(*line, tmp_path / "theirs.qed", str(size))
    await make(tmp_path / "ours.qed", size=size, geometry=geometry, backing=backing)
    assert (tmp_path / "ours.qed").read_bytes() == (tmp_path / "theirs.qed").read_bytes()


async def test_qemu_reads_and_writes_what_was_made_and_leaves_the_record_alone(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"\7" * MIB)
    leaf = tmp_path / "leaf.qed"
    record = Record(mode="stream", hold=True, pins=(PIN,))
    await make(leaf, backing=("base.raw", True), record=record)
    assert qemu_check(leaf).status == 0
    qemu_io(leaf, "read -P 7 0 1M", "write -P 9 64k 100", "read -P 9 64k 100", "read -P 7 66k 4k")
    qemu_img("rebase", "-u", "-b", "other.raw", "-F", "raw", leaf)
    assert qemu_img("info", "-f", "qed", "-U", leaf).count("other.raw")
    sector = leaf.read_bytes()[Geometry().cluster_size - 512 : Geometry().cluster_size]
    assert records.decode(sector) == record


async def test_nothing_opens_before_the_last_write_and_that_follows_a_flush() -> None:
    storage = MemoryStorage(b"x" * 100000)
    await create_image(storage, size=MIB, geometry=Geometry(4096, 2), backing=("b", True), record=Record(mode="cow"))
    assert storage.kinds() == ["truncate", "flush", "write", "write", "write", "flush", "write", "flush"]
    assert [operation.offset for operation in storage.log if operation.kind == "write"][-1] == 0
    assert storage.log[-2].data[:4] == headers.MAGIC


@pytest.mark.parametrize("failing", [0, 64, 3584, 4096])
async def test_a_full_disk_leaves_an_empty_file_and_never_half_an_image(failing: int) -> None:
    storage = MemoryStorage(b"QED\0 and so on")
    storage.fail("write", LeafFull("leaf.qed", "full"), lambda offset: offset == failing)
    with pytest.raises(LeafFull):
        await create_image(storage, size=MIB, geometry=Geometry(4096, 2), backing=("b", True), record=Record("cow"))
    assert storage.content == b""


REFUSED = [
    ({"size": 1000}, "not a multiple of 512"),
    ({"size": -512}, "not a multiple of 512"),
    ({"geometry": Geometry(4096, 1), "size": (1 << 30) + 512}, "more than the"),
    ({"geometry": Geometry(5000, 4)}, "cluster size 5000"),
    ({"geometry": Geometry(2048, 4)}, "cluster size 2048"),
    ({"geometry": Geometry(1 << 27, 4)}, "cluster size"),
    ({"geometry": Geometry(4096, 3)}, "table size 3"),
    ({"geometry": Geometry(4096, 32)}, "table size 32"),
    ({"geometry": Geometry(1 << 26, 2)}, "one table takes 128 MiB"),
    ({"geometry": Geometry(4096, 2), "backing": ("x" * 4033, True)}, "4032 fit"),
    ({"backing": ("x" * 4096, True)}, "4095 fit"),
    ({"backing": ("", True)}, "must not be empty"),
    ({"backing": ("a\0b", True)}, "NUL"),
    ({"geometry": Geometry(4096, 2), "backing": ("x" * 4000, True), "record": Record(mode="cow")}, "no room for qedfs"),
]


@pytest.mark.parametrize(("arguments", "why"), REFUSED, ids=[why for _, why in REFUSED])
async def test_what_is_refused_leaves_nothing_behind(tmp_path: Path, arguments: dict[str, object], why: str) -> None:
    path = tmp_path / "leaf.qed"
    with pytest.raises(QedfsError, match=why):
        await make(path, **arguments)  # type: ignore[arg-type]
    assert not path.exists()
    path.write_bytes(b"precious")
    with pytest.raises(QedfsError, match=why):
        await make(path, overwrite=True, **arguments)  # type: ignore[arg-type]
    assert path.read_bytes() == b"precious"


async def test_an_existing_file_stays_unless_overwriting_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "leaf.qed"
    path.write_bytes(b"precious")
    with pytest.raises(InvalidImage, match="exists already"):
        await make(path)
    assert path.read_bytes() == b"precious"
    await make(path, overwrite=True)
    assert qemu_check(path).status == 0


async def test_a_dangling_link_is_not_followed(tmp_path: Path) -> None:
    link = tmp_path / "leaf.qed"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidImage, match="exists already"):
        await make(link)
    assert not (tmp_path / "elsewhere").exists()


async def test_an_image_in_use_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "leaf.qed"
    await make(path, size=2 * MIB)
    before = path.read_bytes()
    user = await open_storage(str(path), writable=False)
    with pytest.raises(Locked):
        await make(path, overwrite=True)
    await user.aclose()
    assert path.read_bytes() == before


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    yield path
    assert stat.S_ISFIFO(path.stat().st_mode)


async def test_what_is_no_file_is_not_overwritten(tmp_path: Path, fifo: Path) -> None:
    for path in (fifo, tmp_path):
        with pytest.raises(QedfsError):
            await make(path, overwrite=True)


async def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidImage, match="cannot be created"):
        await make(tmp_path / "no" / "leaf.qed")
