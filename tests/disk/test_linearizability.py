"""Many tasks at once under random schedules: for each sector a read returns what was there between its start and end."""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import trio
from hypothesis import given
from hypothesis import strategies as st

from qedfs.config import Mode
from qedfs.disk.disk import Disk
from qedfs.errors import LeafError
from qedfs.image.geometry import Geometry
from tests.model.effort import examples
from tests.model.fake_source import FakeSource
from tests.model.memory_disk import empty_image, memory_disk
from tests.model.recording_storage import RecordingStorage
from tests.model.reference import judge

SECTOR = 512
NEVER = 1 << 62


def stamped(version: int, sector: int) -> bytes:
    """Return the content that write number `version` gives to a sector; 0 is the backing's, and -1 zeros."""
    return bytes(SECTOR) if version < 0 else struct.pack("<QQ", version + 1, sector) * (SECTOR // 16)


@dataclass
class Write:
    """Times of one write to one sector. `seen`: until when it may be thought not to have happened."""

    begun: int
    ended: int = NEVER
    seen: int = NEVER


@dataclass
class Register:
    """One sector: what was written to it, and what may be read from it."""

    writes: dict[int, Write] = field(default_factory=lambda: {0: Write(-1, -1, -1)})

    def possible(self, version: int, begun: int) -> bool:
        """Whether a read that began at `begun` may return `version`."""
        ended = self.writes[version].ended
        return not any(write.begun > ended and write.seen < begun for write in self.writes.values())


class Checked:
    """A disk whose every read is judged."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.sectors: defaultdict[int, Register] = defaultdict(Register)
        self._clock = itertools.count()
        self._versions = itertools.count(1)

    async def write(self, sector: int, count: int, *, zeros: bool = False) -> None:
        number = next(self._versions)
        version = -number if zeros else number
        writes = [Write(next(self._clock)) for _ in range(count)]
        for i, write in enumerate(writes):
            self.sectors[sector + i].writes[version] = write
        data = b"".join(stamped(version, sector + i) for i in range(count))
        try:
            if not self.disk.write_nowait(sector * SECTOR, data):
                await self.disk.write(sector * SECTOR, data)
        except LeafError:
            for write in writes:
                write.ended = next(self._clock)  # it may have happened, but nobody may count on it
        else:
            for write in writes:
                write.ended = write.seen = next(self._clock)

    async def read(self, sector: int, count: int) -> None:
        begun = next(self._clock)
        view = self.disk.read_nowait(sector * SECTOR, count * SECTOR)
        data = view if view is not None else await self.disk.read(sector * SECTOR, count * SECTOR)
        self.judge(bytes(data), sector, begun, next(self._clock))

    def judge(self, data: bytes, sector: int, begun: int, ended: int) -> None:
        for i in range(len(data) // SECTOR):
            content = data[i * SECTOR : (i + 1) * SECTOR]
            stamp, place = struct.unpack_from("<QQ", content)
            writes = self.sectors[sector + i]
            if stamp:
                assert content == stamped(stamp - 1, place), "a torn sector"
                assert place == sector + i
                found = [stamp - 1]
            else:
                assert content == bytes(SECTOR)
                found = [version for version in writes.writes if version < 0]  # all zeros look alike
            assert any(writes.possible(version, begun) for version in found), (
                f"sector {sector + i}: {found} read from {begun} on, of {writes}"
            )
            if stamp:
                writes.writes[stamp - 1].seen = min(writes.writes[stamp - 1].seen, ended)

    def judge_all(self, content: bytes) -> None:
        now = next(self._clock)
        self.judge(content, 0, now, now)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let the disk not warn of the failures that a test provokes, or may."""
    logs = [logging.getLogger(f"qedfs.disk.{name}") for name in ("disk", "copies")]
    for log in logs:
        log.disabled = True
    try:
        yield
    finally:
        for log in logs:
            log.disabled = False


async def use(checked: Checked, dice: random.Random, sectors: int, widest: int) -> None:
    """Do a few requests, most of them in the same places as everybody else."""
    for _ in range(dice.randrange(5, 25)):
        at = min(dice.choice((0, 5, 8, 16, dice.randrange(sectors))), sectors - 1)
        count = min(dice.choice((1, 2, 8, 9, 24, widest)), sectors - at)
        match dice.choice(("read", "read", "read", "write", "write", "zeros", "flush", "impatient")):
            case "read":
                await checked.read(at, count)
            case "write":
                await checked.write(at, count)
            case "zeros":
                await checked.write(at, count, zeros=True)
            case "flush":
                try:
                    await checked.disk.flush()
                except LeafError:
                    pass
            case "impatient":
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(checked.read, at, count)
                        for _ in range(dice.randrange(8)):
                            await trio.lowlevel.checkpoint()
                        scope.cancel()


async def run(dice: random.Random, geometry: Geometry, sectors: int, *, failing: int = 0) -> None:
    base = b"".join(stamped(0, i) for i in range(sectors))
    storage = RecordingStorage((await empty_image(sectors * SECTOR, geometry=geometry)).content, schedule=dice)
    source = FakeSource(base)

    async def delay() -> None:
        for _ in range(dice.choice((0, 0, 2, 10, 40))):
            await trio.lowlevel.checkpoint()

    source.delay = delay
    mode = dice.choice((Mode.COR, Mode.COR, Mode.COW))
    async with memory_disk(storage, source, mode=mode, readahead=dice.choice((0, 64 << 10))) as rig:
        checked = Checked(rig.disk)
        storage.failing = failing
        async with trio.open_nursery() as nursery:
            for _ in range(dice.randrange(2, 9)):
                nursery.start_soon(use, checked, dice, sectors, min(sectors, 200))
        storage.failing = 0
        checked.judge_all(bytes(await rig.disk.read(0, sectors * SECTOR)))
    judged = judge(storage.content, base)
    checked.judge_all(judged.content)
    assert not judged.need_check
    if not failing:
        counts = rig.image.counts_nowait()
        assert counts is not None
        assert counts == (judged.data, judged.zero)


@examples(40)
@given(seed=st.integers(0, 1 << 32))
async def test_reads_of_small_clusters_are_never_older_than_a_write_that_ended_before(seed: int) -> None:
    dice = random.Random(seed)
    await run(dice, Geometry(4096, dice.choice((1, 2))), dice.choice((64, 61, 700)))


@examples(8)
@given(seed=st.integers(0, 1 << 32))
async def test_reads_of_large_clusters_are_never_older_than_a_write_that_ended_before(seed: int) -> None:
    dice = random.Random(seed)
    await run(dice, Geometry(2 << 20, 1), dice.choice((1000, 6000)))


@examples(30)
@given(seed=st.integers(0, 1 << 32))
async def test_failing_writes_of_the_leaf_leave_old_or_new_content_and_reads_go_on(seed: int) -> None:
    dice = random.Random(seed)
    with quiet():
        await run(dice, Geometry(4096, 1), 200, failing=12)
