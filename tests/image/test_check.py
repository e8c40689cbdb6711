from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from qedfs.errors import InvalidImage, LeafError
from qedfs.image import header as headers
from qedfs.image.check import CheckResult, check_image
from qedfs.image.geometry import Geometry
from qedfs.image.header import Feature
from qedfs.image.storage import open_storage
from tests.image.memory_storage import MemoryStorage
from tests.image.qemu import entry, poke, qemu_check, qemu_img, qemu_io

CLUSTER = 4096
L1 = CLUSTER
NEED_CHECK_AT = 16


async def check(path: Path, *, repair: bool = False) -> CheckResult:
    storage = await open_storage(str(path), writable=repair)
    try:
        return await check_image(storage, repair=repair)
    finally:
        await storage.aclose()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of 4 KiB clusters and two L2 tables, with data, zero clusters and gaps."""
    path = tmp_path_factory.mktemp("check") / "base.qed"
    qemu_img("create", "-f", "qed", "-o", f"cluster_size={CLUSTER},table_size=2", path, "9M")
    qemu_io(path, "write -P 1 0 64k", "write -P 2 1M 10k", "write -z 2M 64k", "write -P 3 5M 48k", "write -P 4 8M 4k")
    return path


@pytest.fixture
def image(base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "leaf.qed"
    shutil.copy(base, path)
    return path


def first_table(image: Path) -> int:
    return entry(image, L1)


async def test_an_image_made_by_qemu_is_consistent(image: Path) -> None:
    verdict = qemu_check(image)
    assert verdict.status == 0
    assert await check(image) == CheckResult(
        total_clusters=verdict.report["total-clusters"],
        allocated_clusters=verdict.report["allocated-clusters"],
        fragmented_clusters=verdict.report.get("fragmented-clusters", 0),
    )


@pytest.mark.parametrize("value", [2, 3, 0x1001, CLUSTER - 8, 0, 1 << 62, (1 << 64) - CLUSTER])
async def test_an_invalid_entry_is_a_corruption_and_repair_makes_it_unallocated(image: Path, value: int) -> None:
    poke(image, first_table(image), value)
    result = await check(image)
    assert result.corruptions == (1 if value else 0)
    assert result.leaks == 1
    repaired = await check(image, repair=True)
    assert (repaired.corruptions, repaired.corruptions_fixed) == (0, 1 if value else 0)
    assert entry(image, first_table(image)) == 0
    assert qemu_check(image).status in (0, 3)


async def test_leaks_stay_as_they_are_where_a_corruption_was_found_and_go_with_the_next_repair(image: Path) -> None:
    poke(image, first_table(image), 2)
    first = await check(image, repair=True)
    assert (first.corruptions_fixed, first.leaks, first.leaks_fixed) == (1, 1, 0)
    second = await check(image, repair=True)
    assert (second.leaks, second.leaks_fixed, second.free_clusters) == (0, 1, 1)


async def test_an_invalid_table_is_cut_off_and_what_it_named_is_leaked(image: Path) -> None:
    poke(image, L1, 1)
    result = await check(image, repair=True)
    assert (result.corruptions, result.corruptions_fixed) == (0, 1)
    assert entry(image, L1) == 0
    assert result.leaks + result.free_clusters == qemu_check(image).report["leaks"]


async def test_a_cluster_with_two_owners_is_a_corruption_that_nothing_is_repaired_beside(image: Path) -> None:
    table = first_table(image)
    poke(image, table, entry(image, table + 8))
    poke(image, table + 16, 7)
    before = image.read_bytes()
    result = await check(image, repair=True)
    verdict = qemu_check(image)
    assert result.corruptions == verdict.report["corruptions"] == 2
    assert result.leaks == verdict.report["leaks"] == 2
    assert image.read_bytes() == before


async def test_leaks_at_the_end_are_cut_off(image: Path) -> None:
    length = image.stat().st_size
    with image.open("ab") as file:
        file.write(b"x" * (3 * CLUSTER))
    assert (await check(image)).leaks == 3
    repaired = await check(image, repair=True)
    assert (repaired.leaks, repaired.leaks_fixed) == (0, 3)
    assert image.stat().st_size == length
    assert qemu_check(image).status == 0


async def test_leaks_in_the_middle_become_holes_that_take_no_room(image: Path) -> None:
    table = first_table(image)
    offset = entry(image, table + 8)
    poke(image, table + 8, 0)
    assert (await check(image)).leaks == 1
    blocks = image.stat().st_blocks
    repaired = await check(image, repair=True)
    assert (repaired.leaks, repaired.leaks_fixed, repaired.free_clusters) == (0, 1, 1)
    assert image.stat().st_blocks < blocks
    assert image.read_bytes()[offset : offset + CLUSTER] == bytes(CLUSTER)
    assert qemu_check(image).report["leaks"] == 1


async def test_repair_leaves_every_data_cluster_alone(image: Path, tmp_path: Path) -> None:
    expected = tmp_path / "expected.raw"
    found = tmp_path / "found.raw"
    with image.open("ab") as file:
        file.write(b"x" * CLUSTER)
    qemu_img("convert", "-O", "raw", image, expected)
    await check(image, repair=True)
    qemu_img("convert", "-O", "raw", image, found)
    assert found.read_bytes() == expected.read_bytes()


async def test_a_check_alone_writes_nothing(image: Path) -> None:
    poke(image, first_table(image), 2)
    poke(image, NEED_CHECK_AT, Feature.NEED_CHECK)
    before = image.read_bytes()
    await check(image)
    assert image.read_bytes() == before


async def test_repair_clears_need_check_but_not_beside_a_corruption_it_cannot_mend(image: Path) -> None:
    poke(image, NEED_CHECK_AT, Feature.NEED_CHECK)
    table = first_table(image)
    own = entry(image, table)
    poke(image, table, entry(image, table + 8))
    await check(image, repair=True)
    assert entry(image, NEED_CHECK_AT) == Feature.NEED_CHECK
    poke(image, table, own)
    await check(image, repair=True)
    assert entry(image, NEED_CHECK_AT) == 0


async def test_repairs_are_durable_before_need_check_is_cleared_and_before_anything_is_cut(image: Path) -> None:
    with image.open("ab") as file:
        file.write(bytes(CLUSTER))
    poke(image, NEED_CHECK_AT, Feature.NEED_CHECK)
    storage = MemoryStorage(image.read_bytes())
    await check_image(storage, repair=True)
    assert storage.kinds() == ["flush", "truncate", "flush", "write", "flush"]
    poke(image, first_table(image), 2)
    storage = MemoryStorage(image.read_bytes())
    await check_image(storage, repair=True)
    assert storage.kinds() == ["write", "flush", "write", "flush"]


async def test_a_table_that_cannot_be_read_is_an_error_and_nothing_is_repaired(image: Path) -> None:
    poke(image, first_table(image) + 8, 2)
    storage = MemoryStorage(image.read_bytes())
    second = entry(image, L1 + 8)
    storage.fail("read", LeafError("leaf.qed", "cannot be read"), lambda offset: offset == second)
    result = await check_image(storage, repair=True)
    assert (result.check_errors, result.corruptions, result.leaks) == (1, 1, 0)
    assert not storage.log


async def test_a_file_that_is_no_image_cannot_be_checked(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(100))
    with pytest.raises(InvalidImage, match="not a QED image"):
        await check(tmp_path / "x")


# -- against qemu-img --------------------------------------------------------------------------------------------------


def mutated(original: bytes, seed: int) -> bytes:
    """Return the image with one to three defects: entries, header bits, a wrong length."""
    choose = random.Random(seed)
    image = bytearray(original)
    tables = [offset for offset in struct.unpack_from("<1024Q", image, L1) if offset]
    for _ in range(choose.randint(1, 3)):
        kind = choose.randrange(7)
        clusters = len(image) // CLUSTER
        good = choose.randrange(clusters) * CLUSTER
        value = choose.choice(
            [1, 2, good, good + 512, clusters * CLUSTER, (clusters + 9) * CLUSTER, choose.getrandbits(64)]
        )
        if kind <= 2:
            struct.pack_into("<Q", image, choose.choice(tables) + 8 * choose.randrange(1024), value)
        elif kind == 3:
            struct.pack_into("<Q", image, L1 + 8 * choose.randrange(1024), value)
        elif kind == 4:
            image[choose.randrange(64)] ^= 1 << choose.randrange(8)
        elif kind == 5:
            del image[choose.randrange(len(image) - 10 * CLUSTER, len(image)) :]
        else:
            image += b"y" * choose.randrange(3 * CLUSTER)
        tables = [offset for offset in tables if offset + 2 * CLUSTER <= len(image)]
    return bytes(image)


def names_a_backing(path: Path) -> bool:
    return headers.decode(path.read_bytes(), path.stat().st_size, path.name).has_backing


STRICTER = ("claims no room", "backing name lies outside", "more than 64 is refused", "shorter than a QED header")


@pytest.mark.parametrize("first", range(0, 300, 100))
async def test_the_verdict_is_that_of_qemu_img(base: Path, tmp_path: Path, first: int) -> None:
    original = base.read_bytes()
    path = tmp_path / "mutated.qed"
    for seed in range(first, first + 100):
        path.write_bytes(mutated(original, seed))
        verdict = qemu_check(path)
        try:
            result = await check(path)
        except InvalidImage as refused:
            stricter = any(why in refused.why for why in STRICTER)
            assert verdict.status == 1 or stricter, seed
            continue
        report = verdict.report
        if names_a_backing(path):
            assert verdict.status == 1, seed  # qemu-img opens the backing, which is missing here, before it checks
            continue
        assert bool(result.corruptions) == (verdict.status == 2), (seed, result, report)
        if not report or verdict.status == 2:
            continue
        assert result.total_clusters == report["total-clusters"], seed
        assert result.allocated_clusters == report.get("allocated-clusters", 0), seed
        assert result.fragmented_clusters == report.get("fragmented-clusters", 0), seed
        assert result.leaks + result.free_clusters == report.get("leaks", 0), (seed, result, report)


async def test_repair_never_makes_a_mutated_image_worse(base: Path, tmp_path: Path) -> None:
    original = base.read_bytes()
    path = tmp_path / "mutated.qed"
    for seed in range(1000, 1060):
        path.write_bytes(mutated(original, seed))
        try:
            before = await check(path)
        except InvalidImage:
            continue
        after = await check(path, repair=True)
        assert after.corruptions + after.corruptions_fixed == before.corruptions, seed
        assert before.corruptions or after.leaks <= before.leaks, seed
        assert names_a_backing(path) or qemu_check(path).status in ((2,) if after.corruptions else (0, 3)), seed


# -- hostile images ----------------------------------------------------------------------------------------------------

CHECK_IN_LITTLE_MEMORY = """
import sys, trio
from qedfs.image.check import check_image
from qedfs.image.storage import open_storage
from qedfs.errors import QedfsError

async def main(path):
    storage = await open_storage(path, writable=False)
    try:
        print(await check_image(storage, repair=False))
    except QedfsError as error:
        print("refused:", error)

trio.run(main, sys.argv[1])
# Not ru_maxrss: that begins with the memory of the process that started this one.
most = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(most.split()[1]) >> 10, file=sys.stderr)
"""


def check_hostile(path: Path) -> str:
    """Check in a process of its own and return what was said; at most 2 s of processor time and 256 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", CHECK_IN_LITTLE_MEMORY, str(path)],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert int(done.stderr) <= 256, done.stderr
    return done.stdout


def sparse_image(path: Path, *, cluster_size: int, table_clusters: int, length: int, l1: bytes) -> None:
    geometry = Geometry(cluster_size, table_clusters)
    header = headers.Header(geometry, min(1 << 50, geometry.max_image_size), cluster_size)
    with path.open("wb") as file:
        file.write(header.encode())
        file.seek(cluster_size)
        file.write(l1)
        file.truncate(length)


def test_tables_named_all_over_a_huge_sparse_file_cost_neither_time_nor_memory(tmp_path: Path) -> None:
    cluster = 1 << 20
    entries = struct.pack("<100000Q", *((1 << 30) + (4 * i + 4) * cluster for i in range(100000)))
    sparse_image(tmp_path / "h.qed", cluster_size=cluster, table_clusters=4, length=1 << 42, l1=entries)
    assert "check_errors=0" in check_hostile(tmp_path / "h.qed")


def test_an_l1_full_of_one_table_is_answered(tmp_path: Path) -> None:
    cluster = 1 << 26
    entries = struct.pack("<Q", 2 * cluster) * (1 << 20)
    sparse_image(tmp_path / "h.qed", cluster_size=cluster, table_clusters=1, length=4 * cluster, l1=entries)
    assert f"corruptions={(1 << 20) - 1}" in check_hostile(tmp_path / "h.qed")


def test_an_l1_of_noise_is_answered(tmp_path: Path) -> None:
    sparse_image(tmp_path / "h.qed", cluster_size=1 << 22, table_clusters=16, length=1 << 40, l1=os.urandom(64 << 20))
    assert f"corruptions={8 << 20}" in check_hostile(tmp_path / "h.qed")


def test_a_file_longer_than_can_be_checked_is_refused(tmp_path: Path) -> None:
    sparse_image(tmp_path / "h.qed", cluster_size=4096, table_clusters=1, length=1 << 43, l1=b"")
    assert check_hostile(tmp_path / "h.qed").startswith("refused:")
