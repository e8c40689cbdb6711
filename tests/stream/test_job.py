"""The job of one disk, in virtual time: it brings everything in while it may, and lets the image stand alone."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from qedfs.config import Idle, Mode, StreamOptions
from qedfs.disk.fetches import Budget
from qedfs.errors import BackingRefused, BackingUnavailable, CorruptEntry
from qedfs.image.geometry import Geometry
from qedfs.image.record import Record
from qedfs.image.storage import Space
from qedfs.stream.flow import Flow
from qedfs.stream.idle import Sample
from qedfs.stream.job import Job
from qedfs.stream.machine import Machine
from qedfs.stream.profile import Part, Recorder, clusters
from qedfs.turns import MOST_PASSES, Turns, beside
from tests.image.memory_storage import MemoryStorage
from tests.model.fake_source import FakeSource
from tests.model.memory_disk import MemoryDisk, empty_image, memory_disk, pattern
from tests.model.reference import judge

GEOMETRY = Geometry(65536, 2)
C = GEOMETRY.cluster_size
MIB = 1 << 20
SIZE = 8 * MIB
BASE = pattern(SIZE)


class QuietMachine:
    """A sampler of a machine on which nobody else works; `busy` adds a guest that waits for ever."""

    def __init__(self) -> None:
        self.busy = False
        self.samples = 0

    def sample(self, now: float, *, waiting: int = 0, waited_at: float = 0.0, asked: int = 0) -> Sample:
        self.samples += 1
        return Sample(now, waiting + self.busy, waited_at)

    def flushed(self, written: int) -> None:
        pass


class Rig:
    def __init__(self, disk: MemoryDisk, job: Job, machine: QuietMachine) -> None:
        self.memory = disk
        self.disk = disk.disk
        self.source = disk.source
        self.job = job
        self.machine = machine

    @property
    def state(self) -> str:
        return self.job.state(self.disk.statistics().state)

    async def until(self, state: str) -> float:
        """Wait until the job is in `state`; return the seconds that took."""
        began = trio.current_time()
        with trio.fail_after(3600):
            while self.state != state:  # noqa: ASYNC110 (virtual time, and no event tells every change)
                await trio.sleep(0.05)
        return trio.current_time() - began


@asynccontextmanager
async def rig(
    storage: MemoryStorage,
    base: bytes | FakeSource,
    *,
    mode: Mode = Mode.STREAM,
    idle: Idle = Idle.ALWAYS,
    **options: Any,
) -> AsyncIterator[Rig]:
    async with memory_disk(storage, base, mode=mode) as memory, trio.open_nursery() as nursery:
        sampler = QuietMachine()
        machine = Machine(idle, sampler)  # type: ignore[arg-type]
        settings = StreamOptions(**{"idle": idle, **options})
        job = Job(memory.disk, settings, flow=Flow(32 << 20), budget=Budget(64 << 20), machine=machine)
        nursery.start_soon(machine.run)
        nursery.start_soon(job.run)
        yield Rig(memory, job, sampler)
        nursery.cancel_scope.cancel()


def slow(source: FakeSource, seconds: float) -> FakeSource:
    async def delay() -> None:
        await trio.sleep(seconds)

    source.delay = delay
    return source


async def storage() -> MemoryStorage:
    return await empty_image(SIZE, geometry=GEOMETRY)


async def test_streaming_completes_the_image_while_a_guest_writes(autojump_clock: trio.testing.MockClock) -> None:
    leaf, chance = await storage(), random.Random(1)
    expected = bytearray(BASE)
    async with rig(leaf, slow(FakeSource(BASE), 0.01)) as r:
        assert r.state in ("streaming", "idle-wait")
        while r.state != "complete":
            length = chance.choice([512, 5000, C, 3 * C])
            pos = chance.randrange((SIZE - length) // 512) * 512
            data = chance.randbytes(length)
            await r.disk.write(pos, data)
            expected[pos : pos + length] = data
            await trio.sleep(0.005)
        assert r.job.eta is None
        assert bytes(await r.disk.read(0, SIZE)) == expected
    assert judge(leaf.content, b"").content == expected


async def test_a_cluster_is_fetched_once_and_promised_zeros_not_at_all(autojump_clock: trio.testing.MockClock) -> None:
    leaf = await storage()
    source = slow(FakeSource(BASE[: 2 * MIB] + bytes(4 * MIB) + BASE[6 * MIB :]), 0.02)
    source.promises = True
    async with rig(leaf, source) as r:
        await r.until("complete")
    asked = [False] * (SIZE // C)
    for pos, length in source.requests:
        for cluster in range(pos // C, (pos + length) // C):
            assert not asked[cluster], "asked twice"
            asked[cluster] = True
    assert [i for i, was in enumerate(asked) if was] == [*range(32), *range(96, 128)]


async def test_only_the_mode_stream_streams_and_it_may_change_at_any_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    leaf = await storage()
    async with rig(leaf, slow(FakeSource(BASE), 0.05), mode=Mode.COR) as r:
        await trio.sleep(60)
        assert (r.state, r.source.requests) == ("passive", [])
        chance = random.Random(3)
        for _ in range(40):
            await r.disk.set_mode(chance.choice(list(Mode)))
            r.job.paused = chance.random() < 0.3
            await trio.sleep(chance.random() * 0.02)
        r.job.paused = False
        await r.disk.set_mode(Mode.STREAM)
        await r.until("complete")
    assert judge(leaf.content, b"").content == BASE


@pytest.mark.parametrize("passes", range(6))
async def test_a_change_is_noticed_however_soon_it_follows_another(
    passes: int, autojump_clock: trio.testing.MockClock
) -> None:
    """The job is on its way to its next wait when the second one comes. The order within a pass is trio's, so: often."""
    for _ in range(12):
        async with rig(await empty_image(2 * C, geometry=GEOMETRY), BASE[: 2 * C], mode=Mode.COW) as r:
            r.job.paused = True
            await trio.sleep(60)
            r.job.paused = False
            for _ in range(passes):
                await trio.lowlevel.checkpoint()
            await r.disk.set_mode(Mode.STREAM)
            await r.until("complete")


async def test_paused_is_shown_and_nothing_is_asked_meanwhile(autojump_clock: trio.testing.MockClock) -> None:
    leaf = await storage()
    async with rig(leaf, slow(FakeSource(BASE), 0.05)) as r:
        await trio.sleep(0.12)
        r.job.paused = True
        await trio.sleep(5)
        asked = len(r.source.requests)
        await trio.sleep(600)
        assert (r.state, len(r.source.requests)) == ("paused", asked)
        r.job.paused = False
        await r.until("complete")


async def test_every_piece_and_every_copy_is_a_step_that_asks_for_its_turn(
    autojump_clock: trio.testing.MockClock,
) -> None:
    asked = 0

    def waiting() -> bool:
        nonlocal asked
        asked += 1
        return True

    source = slow(FakeSource(BASE), 0.05)
    with beside(Turns(waiting)):
        async with rig(await storage(), source) as r:
            await r.until("complete")  # though a request of a guest waits all the while
    assert asked >= MOST_PASSES * 3 * len(source.requests)  # what next, the fetch, its copy


async def test_a_cap_and_a_floor_are_kept(autojump_clock: trio.testing.MockClock) -> None:
    leaf = await storage()
    async with rig(leaf, FakeSource(BASE), rate=MIB) as r:
        assert 6 < await r.until("complete") < 10
    leaf = await storage()
    async with rig(leaf, FakeSource(BASE), idle=Idle.GUEST, floor=MIB // 2) as r:
        r.machine.busy = True
        await trio.sleep(2)
        assert r.state == "idle-wait"
        assert 10 < await r.until("complete") < 20
    leaf = await storage()
    async with rig(leaf, FakeSource(BASE), idle=Idle.GUEST, floor=0) as r:
        r.machine.busy = True
        await trio.sleep(2)
        asked = len(r.source.requests)
        await trio.sleep(3600)
        assert len(r.source.requests) == asked, "without a floor a busy machine is left alone"
        r.machine.busy = False
        assert await r.until("complete") < 60, "an idle moment is used"


async def test_a_promise_to_finish_raises_the_floor(autojump_clock: trio.testing.MockClock) -> None:
    leaf = await storage()
    async with rig(leaf, FakeSource(BASE), idle=Idle.GUEST, floor=0) as r:
        r.machine.busy = True
        await trio.sleep(100)
        r.job.set_finish_by(40.0)
        assert r.job.finish_by == 40.0
        assert 20 < await r.until("complete") < 40


def clusters_asked(source: FakeSource) -> list[int]:
    return [c for pos, length in source.requests for c in range(pos // C, -(-(pos + length) // C))]


async def test_a_boot_profile_comes_at_once_and_in_its_order_without_a_stream(
    autojump_clock: trio.testing.MockClock,
) -> None:
    leaf = await storage()
    async with rig(leaf, slow(FakeSource(BASE), 0.05), mode=Mode.COR, idle=Idle.GUEST, floor=0) as r:
        await r.disk.read(40 * C, C)
        r.source.requests.clear()
        r.machine.busy = True
        r.job.replay([(100, 103), (5, 6), (39, 42), (127, 500)])
        await trio.sleep(1)
        asked = clusters_asked(r.source)
        assert set(asked[:4]) == {100, 101, 102, 5}, "as many at a time as the window admits"
        assert set(asked[4:]) == {39, 41, 127}, "but for what is local"
        assert len(asked) == 7
        assert r.state == "passive"
        await trio.sleep(600)
        assert len(clusters_asked(r.source)) == 7, "nothing else comes"
        r.source.error = BackingUnavailable("fake", "gone")
        assert bytes(await r.disk.read(100 * C, 3 * C)) == BASE[100 * C : 103 * C]


async def test_a_boot_profile_comes_before_the_rest_of_a_stream_also_while_the_guest_waits(
    autojump_clock: trio.testing.MockClock,
) -> None:
    leaf = await storage()
    async with rig(leaf, slow(FakeSource(BASE), 0.05), idle=Idle.GUEST, floor=0) as r:
        r.machine.busy = True
        await trio.sleep(2)
        assert not r.source.requests
        r.job.replay([(90, 100), (10, 20)])
        await trio.sleep(2)
        asked = clusters_asked(r.source)
        assert sorted(asked) == [*range(10, 20), *range(90, 100)]
        assert min(asked[:4]) >= 90, "in its order, as many at a time as the window admits"
        assert r.state == "idle-wait", "what is not of the profile waits for an idle moment"
        r.machine.busy = False
        await r.until("complete")
    assert judge(leaf.content, b"").content == BASE


async def no_space() -> Space:
    return Space(1 << 40, 0)


async def test_a_boot_profile_obeys_pause_mode_cap_and_want_of_room(
    autojump_clock: trio.testing.MockClock, expected_warnings: Callable[[str], None]
) -> None:
    expected_warnings("copying stopped")
    leaf = await storage()
    async with rig(leaf, FakeSource(BASE), mode=Mode.COW, rate=MIB) as r:
        r.job.replay([(0, 128)])
        await trio.sleep(60)
        assert not r.source.requests, "cow copies nothing"
        r.job.paused = True
        await r.disk.set_mode(Mode.COR)
        await trio.sleep(60)
        assert not r.source.requests
        r.job.paused = False
        await trio.sleep(4)
        assert 3 * MIB <= r.disk.asked <= 6 * MIB, "the cap holds"
        await r.disk.set_mode(Mode.COW)
        asked = r.disk.asked
        await trio.sleep(60)
        assert r.disk.asked == asked
        await r.disk.set_mode(Mode.COR)
        await trio.sleep(20)
        assert r.disk.remaining() == 0
    leaf = await storage()
    leaf.space = no_space  # type: ignore[method-assign]
    async with rig(leaf, FakeSource(BASE), mode=Mode.COR) as r:
        await trio.sleep(1)
        r.job.replay([(0, 128)])
        await trio.sleep(60)
        assert r.state == "no-space"
        asked = r.disk.asked
        assert asked <= MIB, "no more than what was on its way"
        await trio.sleep(600)
        assert r.disk.asked == asked


async def test_a_held_disk_gets_no_boot_profile(autojump_clock: trio.testing.MockClock) -> None:
    leaf = await empty_image(SIZE, geometry=GEOMETRY, record=Record(hold=True))
    async with rig(leaf, FakeSource(BASE), mode=Mode.COR) as r:
        r.job.replay([(0, 128)])
        await trio.sleep(60)
        assert (r.state, r.source.requests) == ("held", [])


async def test_a_boot_takes_half_the_time_with_its_profile(autojump_clock: trio.testing.MockClock) -> None:
    chance = random.Random(5)
    trace = [(chance.randrange(SIZE // C - 1) * C + 5, chance.choice([512, 4096, C])) for _ in range(60)]

    async def boot(*profile: tuple[int, int]) -> tuple[float, list[Part]]:
        recorder = Recorder(C)
        async with rig(await storage(), slow(FakeSource(BASE), 0.02), mode=Mode.COR) as r:
            r.job.replay(profile)
            began = trio.current_time()
            for pos, length in trace:
                assert bytes(await r.disk.read(pos, length)) == BASE[pos : pos + length]
                await trio.sleep(0.002)
            took = trio.current_time() - began
            for miss in r.disk.misses.since(0):
                recorder.missed(*miss)
        return took, recorder.parts()

    first, parts = await boot()
    second, _ = await boot(*clusters(parts, C, SIZE))
    assert second < 0.5 * first


async def test_nothing_is_sampled_while_nobody_streams(autojump_clock: trio.testing.MockClock) -> None:
    leaf = await storage()
    async with rig(leaf, FakeSource(BASE), mode=Mode.COR, idle=Idle.AUTO) as r:
        await trio.sleep(600)
        assert r.machine.samples == 0
        await r.disk.set_mode(Mode.STREAM)
        await r.until("complete")
        seen = r.machine.samples
        assert seen
        await trio.sleep(600)
        assert r.machine.samples == seen


async def test_an_outage_of_the_backing_is_told_and_heals(autojump_clock: trio.testing.MockClock) -> None:
    leaf = await storage()
    async with rig(leaf, slow(FakeSource(BASE), 0.05)) as r:
        await trio.sleep(0.2)
        r.source.error = BackingUnavailable("fake", "gone")
        await r.until("backing-error")
        await trio.sleep(100)
        assert r.state == "backing-error"
        assert bytes(await r.disk.read(0, C)) == BASE[:C], "what is local is served"
        r.source.error = None
        await r.until("complete")
    assert judge(leaf.content, b"").content == BASE


async def test_a_backing_that_failed_for_good_is_told(
    autojump_clock: trio.testing.MockClock, expected_warnings: Callable[[str], None]
) -> None:
    expected_warnings("no such thing")
    leaf = await storage()
    async with rig(leaf, slow(FakeSource(BASE), 0.05)) as r:
        await trio.sleep(0.2)
        r.source.error = BackingRefused("fake", "no such thing")
        await r.until("backing-error")
        await trio.sleep(100)
        assert r.disk.statistics().backing_state == "refused"
        assert not r.job.damaged


async def test_a_damaged_place_of_the_backing_does_not_hold_up_the_rest(
    autojump_clock: trio.testing.MockClock, expected_warnings: Callable[[str], None]
) -> None:
    expected_warnings("broken here")

    class Damaged(FakeSource):
        damaged = True

        async def read_into(self, pos: int, buffer: memoryview) -> None:
            if self.damaged and pos <= 40 * C < pos + len(buffer):
                raise CorruptEntry("fake", "broken here")
            await super().read_into(pos, buffer)

    leaf = await storage()
    source = Damaged(BASE)
    async with rig(leaf, source) as r:
        await r.until("backing-error")
        assert r.job.damaged
        await trio.sleep(600)
        assert (r.disk.remaining() or 0) <= MIB
        asked = len(source.requests)
        await trio.sleep(600)
        assert len(source.requests) - asked < 60, "it is tried again, but rarely"
        source.damaged = False
        await r.until("complete")
    assert judge(leaf.content, b"").content == BASE


async def test_many_disks_share_the_turns_at_one_backing(autojump_clock: trio.testing.MockClock) -> None:
    flow, budget = Flow(4 << 20), Budget(8 << 20)
    machine = Machine(Idle.ALWAYS, QuietMachine())  # type: ignore[arg-type]
    took: dict[int, float] = {}
    begin = trio.Event()

    async def one(number: int, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        leaf = await empty_image(SIZE, geometry=GEOMETRY)
        async with memory_disk(leaf, slow(FakeSource(BASE), 0.05), mode=Mode.STREAM) as memory:
            job = Job(memory.disk, StreamOptions(idle=Idle.ALWAYS), flow=flow, budget=budget, machine=machine)
            task_status.started()
            await begin.wait()
            began = trio.current_time()
            await job.run()
            took[number] = trio.current_time() - began
        assert judge(leaf.content, b"").content == BASE

    async with trio.open_nursery() as nursery:
        for number in range(10):
            await nursery.start(one, number)
        begin.set()
    assert len(took) == 10
    assert max(took.values()) < 3 * min(took.values()), "none is served at the cost of another"
