"""Go through the states that a power cut may leave of one workload, and give each a second life."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from qedfs.config import Mode
from qedfs.errors import QedfsError
from qedfs.image.check import check_image
from tests.image.memory_storage import MemoryStorage, Operation
from tests.model.cuts import State, windows
from tests.model.history import SECTOR, History
from tests.model.memory_disk import memory_disk, pattern
from tests.model.recording_storage import RecordingStorage
from tests.model.reference import judge


@dataclass(frozen=True)
class Scenario:
    """What a workload did to a file that held `before`. `allowed` asserts that a cut after any number of operations
    from `first` to `last` may leave a state; it returns False for one that is no image and need not be."""

    name: str
    before: bytes
    log: list[Operation]
    base: bytes
    allowed: Callable[[State], bool]
    mended: bytes = b""
    """What the disk reads as once a mount has recovered a state that is an image and not sound; empty: there are none."""


@dataclass(frozen=True)
class Effort:
    """How much is done: combinations up to which a window is exhausted, samples in larger ones, states that get a second
    life at most, and cuts in each tenth of these lives."""

    limit: int = 1 << 10
    samples: int = 60
    lives: int = 25
    cuts: int = 8

    def for_size(self, size: int) -> Effort:
        """Return the effort for a disk of `size` bytes: looking at many megabytes takes its time."""
        return self if size < 1 << 20 else replace(self, lives=1 + self.lives // 5, cuts=1 + self.cuts // 8)


@dataclass
class Tally:
    """What was done: windows and those gone through completely, states (each once in its window), states with different
    metadata, second lives, states of power cuts in these."""

    windows: int = 0
    complete: int = 0
    states: int = 0
    shapes: int = 0
    lives: int = 0
    second_cuts: int = 0
    samples: list[bytes] = field(default_factory=list)
    """Some of the states, for other judges."""

    def __str__(self) -> str:
        return (
            f"{self.states:7} states in {self.windows:2} windows ({self.complete} complete), {self.shapes:5} shapes, "
            f"{self.lives:4} second lives with {self.second_cuts:5} cuts"
        )


async def explore(scenario: Scenario, effort: Effort, seed: int = 0) -> Tally:
    """Judge the states of `scenario`.

    What recovery does depends on the metadata only, as no data cluster is ever looked at: so `check_image` judges
    each *shape* (state of the metadata) once, and each shape, or an even choice of `lives` of them, gets a second life.

    Raises:
        AssertionError, QedfsError: a state is not as it may be.
    """
    dice = random.Random(f"{scenario.name} {seed}")
    tally = Tally()
    shapes: dict[bytes, bytes] = {}
    for window in windows(scenario.before, scenario.log):
        tally.windows += 1
        tally.complete += window.combinations <= effort.limit
        for state in window.states(effort.limit, effort.samples, dice):
            tally.states += 1
            if not scenario.allowed(state):
                if scenario.mended:
                    await _second_life(state.content, scenario.base, dice, 0, scenario.mended)
                    tally.lives += 1
                continue
            shape = shape_of(state.content)
            if shape not in shapes:
                shapes[shape] = state.content
                await _check(state.content)
    tally.shapes = len(shapes)
    kept = list(shapes.values())
    effort = effort.for_size(len(judge(kept[0], scenario.base).content))
    lived = kept if len(kept) <= effort.lives else dice.sample(kept, effort.lives)
    for number, content in enumerate(lived):
        tally.lives += 1
        tally.second_cuts += await _second_life(content, scenario.base, dice, effort.cuts if number % 3 == 0 else 0)
    tally.samples = dice.sample(kept, min(6, len(kept)))
    return tally


def shape_of(content: bytes) -> bytes:
    """Return the metadata of an image: its length, header clusters, L1 and the tables that it names."""
    _, cluster, table, room, _, _, _, l1_offset, _ = struct.unpack_from("<4sIIIQQQQQ", content)
    l1 = content[l1_offset : l1_offset + table * cluster]
    named = [offset for (offset,) in struct.iter_unpack("<Q", l1.ljust(table * cluster, b"\0")) if offset]
    parts = [content[: room * cluster], l1, *(content[offset : offset + table * cluster] for offset in named)]
    return struct.pack("<Q", len(content)) + b"".join(parts)


async def _check(content: bytes) -> None:
    found = await check_image(MemoryStorage(content, writable=False), repair=False)
    assert found.consistent, found


async def _second_life(content: bytes, base: bytes, dice: random.Random, cuts: int, mended: bytes = b"") -> int:
    """Open what a power cut left, write to it, close it, check it; with `cuts` cut the power in this life, too."""
    storage = RecordingStorage(content)
    old = mended or judge(content, base).content
    async with memory_disk(storage, base, mode=dice.choice((Mode.COR, Mode.COW))) as rig:
        history = History(rig, old)
        await rig.image.survey()
        assert bytes(await rig.disk.read(0, len(old))) == old
        cluster = dice.randrange(max(1, len(old) // 4096))
        await history.write(cluster * 8, pattern(min(8192, len(old) - cluster * 4096), 99))
        await history.flush()
        await history.write(0, pattern(SECTOR, 98))
    last = judge(storage.content, base)
    history.check(len(storage.log), last.content)
    assert not last.need_check
    await _check(bytes(storage.content))
    done = 0
    for window in windows(storage.before, storage.log) if cuts else ():
        for state in window.states(0, cuts, dice):
            found = judge(state.content, base).content
            history.check(state.first, found)
            history.check(state.last, found)
            done += 1
            if done % 10 == 0:
                await _check(state.content)
    return done


async def violation(scenario: Scenario, effort: Effort) -> str:
    """Return what `explore` finds wrong, empty if nothing."""
    try:
        await explore(scenario, effort)
    except (AssertionError, QedfsError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return ""
