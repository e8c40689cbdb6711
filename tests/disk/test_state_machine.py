"""Any sequence of requests, mode switches, growths and remounts leaves what a plain array of bytes would hold.

QEMU has the last word: `qemu-img check` finds nothing in the image, and `qemu-img convert` reads the same bytes.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from qedfs.config import DiskOptions, Mode
from qedfs.disk.disk import Disk, open_disk
from qedfs.disk.populate import Populate
from qedfs.image.create import create_leaf
from qedfs.image.geometry import Geometry
from qedfs.image.image import Image, open_image
from qedfs.image.record import Record
from qedfs.image.storage import open_storage
from tests.image.qemu import qemu_check, qemu_img
from tests.model.effort import examples
from tests.model.fake_source import FakeSource
from tests.model.reference import ReferenceDisk, judge

SECTOR = 512
MOST = 12 << 20
"""Bytes of the largest disk. With 4 KiB clusters QEMU invents leaks in files of 16 MiB and more."""
GEOMETRIES = [(4096, 1), (4096, 2), (4096, 16), (8192, 2), (65536, 4), (1 << 20, 1), (1 << 20, 2), (2 << 20, 2)]

Step = Callable[[Disk, Image], Awaitable[object]]
MODES = st.sampled_from([Mode.COW, Mode.COR, Mode.STREAM])
PLACES = st.tuples(st.integers(0, 1 << 12), st.sampled_from([0, 0, 0, 1, 511, 512, 4096, -1, -512, -4096]))
"""A cluster, modulo the disk, and a distance from its start."""
LENGTHS = st.one_of(st.sampled_from([1, 511, 512, 513, 4096, 4097, 65536, 300_000]), st.integers(1, 3 << 20))


async def bring(populate: Populate, first: int, end: int) -> None:
    """Make `[first, end)` local; what a copy under way has claimed is waited for."""
    while True:
        bringing = populate.bring(await populate.look(first, end, widely=True))
        await bringing.arrived()
        await bringing.linked()
        if populate.next_missing(first, end) is None:
            return
        await trio.sleep(0.001)


class DiskMachine(RuleBasedStateMachine):
    """One leaf over one backing. The model takes each step at once; the disk takes them all in one event loop, at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step | bool] = []
        """What to do with the disk; a bool is a remount, and says whether by a crash."""

    @initialize(
        geometry=st.sampled_from(GEOMETRIES),
        size=st.one_of(
            st.sampled_from([SECTOR, 4096, 1 << 20, 4 << 20, (4 << 20) + SECTOR]), st.integers(1, MOST // 2)
        ),
        backing=st.one_of(st.none(), st.sampled_from([0, 777, 1 << 20, MOST]), st.integers(0, MOST)),
        mode=MODES,
        readahead=st.sampled_from([0, 1 << 16, 4 << 20]),
        promises=st.booleans(),
        seed=st.integers(0, 1 << 32),
    )
    def create(
        self, geometry: tuple[int, int], size: int, backing: int | None, mode: Mode, readahead: int, promises: bool,
        seed: int,
    ) -> None:  # fmt: skip
        self.dice = random.Random(seed)
        self.geometry = Geometry(*geometry)
        self.base = None if backing is None else self._with_holes(backing)
        self.model = ReferenceDisk(-(-size // SECTOR) * SECTOR, self.base or b"")
        self.first_size = self.model.size
        self.options = DiskOptions(mode=mode, readahead=readahead)
        self.promises = promises

    def _with_holes(self, length: int) -> bytes:
        base = bytearray(self.dice.randbytes(length))
        for _ in range(4):
            start = self.dice.randrange(length + 1) // 4096 * 4096
            base[start : start + (1 << 18)] = bytes(len(base[start : start + (1 << 18)]))
        return bytes(base)

    def _place(self, place: tuple[int, int]) -> int:
        clusters = -(-self.model.size // self.geometry.cluster_size)
        return max(0, place[0] % clusters * self.geometry.cluster_size + place[1]) if clusters else 0

    @rule(place=PLACES, length=LENGTHS, zeros=st.booleans())
    def write(self, place: tuple[int, int], length: int, zeros: bool) -> None:
        pos = self._place(place)
        length = min(length, MOST - pos)
        if not zeros:  # most stay inside
            length = min(length, self.model.size - pos)
        if length > 0:
            self._write(pos, bytes(length) if zeros else self.dice.randbytes(length))

    @rule(place=PLACES, count=st.integers(1, 5))
    def write_whole_clusters_of_zeros(self, place: tuple[int, int], count: int) -> None:
        pos = self._place((place[0], 0))
        self._write(pos, bytes(min(count * self.geometry.cluster_size, max(self.model.size - pos, 1))))

    def _write(self, pos: int, data: bytes) -> None:
        self.model.write(pos, data)

        async def write(disk: Disk, image: Image) -> None:
            if not disk.write_nowait(pos, data):
                await disk.write(pos, data)

        self.steps.append(write)

    @rule(place=PLACES, length=LENGTHS)
    def read(self, place: tuple[int, int], length: int) -> None:
        pos = self._place(place)
        expected = self.model.read(pos, length)

        async def read(disk: Disk, image: Image) -> None:
            view = disk.read_nowait(pos, length)
            assert bytes(view if view is not None else await disk.read(pos, length)) == expected, (pos, length)

        self.steps.append(read)

    @rule(durable=st.booleans())
    def commit(self, durable: bool) -> None:
        self.steps.append(lambda disk, image: disk.flush() if durable else image.commit(durable=False))

    @rule(mode=MODES)
    def set_mode(self, mode: Mode) -> None:
        self.steps.append(lambda disk, image: disk.set_mode(mode))

    @rule(sectors=st.one_of(st.sampled_from([0, 1, 7, 8, 129]), st.integers(0, 10_000)))
    def grow(self, sectors: int) -> None:
        size = min(self.model.size + sectors * SECTOR, max(MOST, self.model.size))
        self.model.grow(size)
        self.steps.append(lambda disk, image: disk.grow(size))

    @rule(place=PLACES, length=LENGTHS, wait=st.booleans())
    def prefetch(self, place: tuple[int, int], length: int, wait: bool) -> None:
        pos = self._place(place)

        async def prefetch(disk: Disk, image: Image) -> None:
            disk.prefetch(pos, length)
            if wait:
                await trio.sleep(0.002)

        self.steps.append(prefetch)

    @rule(place=PLACES)
    def stream_a_step(self, place: tuple[int, int]) -> None:
        pos = self._place(place)
        size = self.model.size

        async def step(disk: Disk, image: Image) -> None:
            count = await disk.stream(pos)
            assert 0 <= count <= max(0, size - pos)
            assert (count > 0) == (pos < size)

        self.steps.append(step)

    @rule(place=PLACES, clusters=st.integers(1, 600))
    def stream_some(self, place: tuple[int, int], clusters: int) -> None:
        first = self._place(place) // self.geometry.cluster_size

        async def stream(disk: Disk, image: Image) -> None:
            if disk.populate is not None and first < disk.populate.total:
                end = min(disk.populate.total, first + clusters)
                await bring(disk.populate, first, end)

        self.steps.append(stream)

    @rule(all_of_it=st.booleans())
    def complete(self, all_of_it: bool) -> None:
        async def complete(disk: Disk, image: Image) -> None:
            populate = disk.populate
            while all_of_it and populate is not None and (missing := populate.next_missing(0, populate.total)):
                await bring(populate, missing[0], min(missing[1], missing[0] + 256))
            done = await disk.complete()
            assert done or not all_of_it
            assert done == (image.backing_name == "")

        self.steps.append(complete)

    @rule(crash=st.booleans())
    def remount(self, crash: bool) -> None:
        if crash:
            self.commit(durable=True)
        self.steps.append(crash)

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        folder = Path(tempfile.mkdtemp())
        try:
            trio.run(self._run, folder)
        finally:
            shutil.rmtree(folder)

    async def _run(self, folder: Path) -> None:
        leaf, base = folder / "leaf.qed", folder / "base.raw"
        if self.base is not None:
            base.write_bytes(self.base)
        backing = None if self.base is None else (str(base), True)
        await create_leaf(
            str(leaf), size=self.first_size, geometry=self.geometry, backing=backing, record=Record(), overwrite=False
        )
        steps = [*self.steps, False]
        while steps:
            stop = next(i for i, step in enumerate(steps) if isinstance(step, bool))
            async with self._mounted(leaf, crash=steps[stop] is True) as (disk, image):
                for step in steps[:stop]:
                    assert not isinstance(step, bool)
                    await step(disk, image)
            del steps[: stop + 1]
        self._judge(leaf, folder / "out.raw")

    @asynccontextmanager
    async def _mounted(self, leaf: Path, *, crash: bool) -> AsyncIterator[tuple[Disk, Image]]:
        storage = await open_storage(str(leaf), writable=True)
        image = await open_image(storage)
        source = FakeSource(self.base or b"")
        source.promises = self.promises
        backing = source.backing() if image.backing_name else None
        async with open_disk(image, backing, self.options) as disk:
            yield disk, image
        await (storage.aclose() if crash else image.aclose())
        if backing is not None:
            await backing.aclose()

    def _judge(self, leaf: Path, out: Path) -> None:
        judged = judge(leaf.read_bytes(), self.base or b"")
        assert judged.content == self.model.content
        assert not judged.need_check or True in self.steps  # after a crash, until something is allocated again
        if self.geometry.table_clusters == 1:
            return  # QEMU cannot open it
        verdict = qemu_check(leaf)
        assert verdict.status == (3 if judged.leaks else 0), verdict
        assert verdict.report.get("corruptions", 0) == 0
        assert verdict.report.get("leaks", 0) == judged.leaks
        qemu_img("convert", "-f", "qed", "-O", "raw", leaf, out)
        assert out.read_bytes() == self.model.content


def test_any_sequence_of_requests_leaves_what_an_array_of_bytes_would_hold() -> None:
    run_state_machine_as_test(DiskMachine, settings=settings(examples(40), stateful_step_count=25))
