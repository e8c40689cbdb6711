"""Mutated images: our verdict against that of `qemu-img check`, and what a repair may and may not do.

`QEDFS_MUTATIONS=N` asks for N images instead of the usual number.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from qedfs.errors import InvalidImage
from qedfs.image import header as headers
from qedfs.image.check import CheckResult, check_image
from qedfs.report.check import exit_status
from tests.image.memory_storage import MemoryStorage
from tests.image.qemu import qemu_img, qemu_io

CLUSTER = 4096
L1 = CLUSTER
COUNT = int(os.environ.get("QEDFS_MUTATIONS", "1500"))
BATCH = 250
SPAN = 1024 * CLUSTER
NEED_CHECK_AT = 16


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An image of 4 KiB clusters and two tables, with data, zero clusters and gaps."""
    path = tmp_path_factory.mktemp("differential") / "base.qed"
    qemu_img("create", "-f", "qed", "-o", f"cluster_size={CLUSTER},table_size=2", path, "6M")
    qemu_io(path, "write -P 1 0 32k", "write -P 2 1M 10k", "write -z 2M 64k", "write -P 3 5M 24k")
    return path.read_bytes()


def mutated(original: bytes, seed: int) -> bytes:
    """Return the image with one to four defects."""
    choose = random.Random(seed)
    image = bytearray(original)
    for _ in range(choose.randint(1, 4)):
        tables = [o for o in struct.unpack_from("<1024Q", original, L1) if o and o + 2 * CLUSTER <= len(image)]
        entries = [L1 + 8 * choose.randrange(4)] + [table + 8 * choose.randrange(1024) for table in tables]
        clusters = len(image) // CLUSTER
        match choose.randrange(9):
            case 0:  # a flipped bit of the header
                image[choose.randrange(64)] ^= 1 << choose.randrange(8)
            case 1:  # a flipped bit of L1
                image[L1 + choose.randrange(2 * CLUSTER)] ^= 1 << choose.randrange(8)
            case 2 if tables:  # a flipped bit of an L2 table, where there are entries
                image[choose.choice(tables) + choose.randrange(1024)] ^= 1 << choose.randrange(8)
            case 3:  # an entry that names something else: another's cluster, a table, the header
                struct.pack_into("<Q", image, choose.choice(entries), choose.randrange(clusters) * CLUSTER)
            case 4:  # a misplaced one
                struct.pack_into("<Q", image, choose.choice(entries), choose.randrange(len(image)))
            case 5:  # one past the end, near or far
                past = choose.choice([clusters, clusters + 1, 1 << 30, 1 << 51, (1 << 52) - 1])
                struct.pack_into("<Q", image, choose.choice(entries), past * CLUSTER)
            case 6 if clusters > 24:  # a cut
                del image[choose.randrange(len(image) - 8 * CLUSTER, len(image)) :]
            case 7:  # junk behind the end
                image += b"y" * choose.randrange(3 * CLUSTER)
            case _:
                image[NEED_CHECK_AT] ^= 2
    return bytes(image)


class SparseStorage(MemoryStorage):
    """One in which every cluster of zeros is a hole, as on the sparsest file system."""

    async def next_data(self, offset: int) -> tuple[int, int]:
        length = self.length()
        while offset < length and not any(self._block(offset)):
            offset = (offset // CLUSTER + 1) * CLUSTER
        end = offset
        while end < length and any(self._block(end)):
            end = (end // CLUSTER + 1) * CLUSTER
        return min(offset, length), min(end, length)

    def _block(self, offset: int) -> bytes:
        start = offset // CLUSTER * CLUSTER
        return bytes(self.content[start : start + CLUSTER])


class Ours(NamedTuple):
    """Our verdict. `refusal` is empty unless the image could not be checked."""

    status: int
    refusal: str = ""
    result: CheckResult | None = None


async def our_verdict(image: bytes) -> Ours:
    try:
        result = await check_image(SparseStorage(image, writable=False), repair=False)
    except InvalidImage as refused:
        return Ours(1, refused.why)
    return Ours(exit_status(result), result=result)


def qemu_verdicts(folder: Path, images: list[bytes]) -> list[int]:
    """Return the exit statuses of `qemu-img check` for all `images`, from one shell."""
    for number, image in enumerate(images):
        (folder / f"{number}.qed").write_bytes(image)
    loop = f'for n in $(seq 0 {len(images) - 1}); do qemu-img check -q -f qed "$n.qed" >/dev/null 2>&1; echo $?; done'
    done = subprocess.run(["sh", "-c", loop], cwd=folder, capture_output=True, text=True, timeout=110, check=True)
    return [int(line) for line in done.stdout.split()]


STRICTER = ("claims no room", "backing name lies outside", "more than 64 is refused")
"""What we refuse and QEMU opens. docs/security.md gives the reasons."""


def justified(image: bytes, ours: Ours, qemu: int) -> str:
    """Return why the two verdicts may differ, empty if there is no reason."""
    if ours.status == 1:
        return next((why for why in STRICTER if why in ours.refusal), "")
    header = headers.decode(image[:64], len(image), "image")
    if header.has_backing:
        return "QEMU opens the backing before it checks" if qemu == 1 else ""
    if ours.status == 0 and qemu == 3 and ours.result and ours.result.free_clusters:
        return "a free cluster that takes no room is no leak"
    return ""


@pytest.mark.parametrize("first", range(0, COUNT, BATCH))
async def test_the_verdict_on_a_mutated_image_is_that_of_qemu(original: bytes, tmp_path: Path, first: int) -> None:
    images = [mutated(original, seed) for seed in range(first, min(COUNT, first + BATCH))]
    for seed, (image, qemu) in enumerate(zip(images, qemu_verdicts(tmp_path, images), strict=True), first):
        ours = await our_verdict(image)
        assert ours.status == qemu or justified(image, ours, qemu), (seed, ours, qemu)


def readable(image: bytes) -> dict[int, bytes]:
    """Return every data cluster that the tables name, by its number on the disk: slowly, and by the book only."""
    header = headers.decode(image[:64], len(image), "image")
    geometry, room = header.geometry, header.room
    size, table_size = geometry.cluster_size, geometry.table_bytes
    end = -(-len(image) // 512) * 512 // size * size
    padded = image.ljust(end, b"\0")
    found: dict[int, bytes] = {}
    for i in range(table_size // 8):
        (table,) = struct.unpack_from("<Q", padded, header.l1_table_offset + 8 * i)
        if table < room or table % size or table + table_size > end:
            continue
        for j in range(table_size // 8):
            (offset,) = struct.unpack_from("<Q", padded, table + 8 * j)
            if room <= offset < end and not offset % size:
                found[i * (table_size // 8) + j] = padded[offset : offset + size]
    return found


@pytest.mark.parametrize("first", range(0, COUNT // 3, BATCH))
async def test_a_repair_makes_nothing_worse_and_touches_no_data(original: bytes, tmp_path: Path, first: int) -> None:
    repaired: list[bytes] = []
    statuses: list[int] = []
    for seed in range(10_000_000 + first, 10_000_000 + first + BATCH):
        image = mutated(original, seed)
        before = await our_verdict(image)
        if before.result is None:
            continue
        storage = SparseStorage(image)
        after = await check_image(storage, repair=True)
        content = bytes(storage.content)
        assert after.corruptions <= before.result.corruptions, seed
        assert readable(content) == readable(image), seed
        if not before.result.corruptions:
            assert after.leaks == 0, seed
            assert after.leaks_fixed == before.result.leaks, seed
        if after.corruptions:
            assert content == image, seed  # two owners of one cluster: nothing is safe to write
        twice = SparseStorage(content)
        again = await check_image(twice, repair=True)
        assert again.corruptions == after.corruptions, seed
        final = SparseStorage(bytes(twice.content))
        await check_image(final, repair=True)
        assert final.content == twice.content, seed
        if not headers.decode(content[:64], len(content), "image").has_backing:
            repaired.append(content)
            statuses.append(exit_status(after))
    for content, ours, qemu in zip(repaired, statuses, qemu_verdicts(tmp_path, repaired), strict=True):
        # Free clusters that take no room are leaks to QEMU.
        assert qemu == ours or (ours, qemu) == (0, 3), len(content)
