from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyfuse3
import pytest
import trio
from trio.testing import assert_checkpoints, assert_no_checkpoints, wait_all_tasks_blocked

from qedfs.fuse.readiness import LOOP_INTERVAL, ShortLock, ShortWait, short_waits, waits_as_known
from qedfs.turns import take_turn
from tests.fuse.conftest import Mount

LIMIT = 30e-6


class Time:
    """A clock that a test moves; each look takes `step` seconds."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.step = 0.0
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        self.now += self.step
        return self.now


class Rig:
    """A wait over a pipe, in which being parked in the event loop takes `away` seconds until a byte comes."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.time = Time()
        self.away = 1.0
        self.parked = 0
        self.wait = ShortWait(LIMIT, clock=self.time, park=self._park)

    async def _park(self, fd: int) -> None:
        self.parked += 1
        self.time.now += self.away
        os.write(self.writer, b"x")

    async def request_after(self, seconds: float) -> int:
        """Wait for a request that comes `seconds` after the wait began; return how often the clock was looked at."""
        self.away, self.time.looks = seconds, 0
        await self.wait(self.reader)
        os.read(self.reader, 1)
        return self.time.looks


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    os.close(rig.reader)
    os.close(rig.writer)


async def test_a_ready_descriptor_is_not_parked_for(rig: Rig) -> None:
    os.write(rig.writer, b"x")
    await rig.wait(rig.reader)
    assert (rig.parked, rig.time.looks) == (0, 0)


async def test_requests_far_apart_are_never_polled_for(rig: Rig) -> None:
    rig.time.step = 1e-6
    for _ in range(5):
        assert await rig.request_after(0.001) == 2
    assert rig.parked == 5


async def test_after_a_close_request_the_next_one_is_polled_for_up_to_the_limit(rig: Rig) -> None:
    rig.time.step = 1e-6
    await rig.request_after(LIMIT / 2)
    looks = await rig.request_after(0.001)
    assert LIMIT / 1e-6 <= looks <= LIMIT / 1e-6 + 5
    assert await rig.request_after(0.001) == 2


async def test_a_request_that_comes_while_polling_ends_the_wait(rig: Rig) -> None:
    rig.time.step = 1e-6
    await rig.request_after(LIMIT / 2)
    parked = rig.parked
    ready = rig.wait._polls[rig.reader]
    answers = iter([[], [], [(rig.reader, 1)]])
    rig.wait._polls[rig.reader] = lambda timeout: next(answers)
    await rig.wait(rig.reader)
    rig.wait._polls[rig.reader] = ready
    assert rig.parked == parked


async def test_polling_stops_for_a_while_when_the_processor_was_taken_away(rig: Rig) -> None:
    await rig.request_after(LIMIT / 2)
    rig.time.step = 1e-3
    await rig.request_after(1e-3)
    rig.time.step = 1e-6
    await rig.request_after(LIMIT / 2)
    assert await rig.request_after(LIMIT / 2) == 2
    await rig.request_after(1.0)
    await rig.request_after(LIMIT / 2)
    assert await rig.request_after(LIMIT / 2) > 2


async def test_without_a_limit_nothing_is_polled(rig: Rig) -> None:
    wait = ShortWait(0.0, clock=rig.time, park=rig._park)
    rig.away = 0.0
    for _ in range(3):
        rig.time.looks = 0
        await wait(rig.reader)
        os.read(rig.reader, 1)
        assert rig.time.looks == 2


async def test_the_lock_excludes_and_hands_over() -> None:
    lock = ShortLock()
    inside: list[int] = []
    gate = trio.Event()

    async def worker(number: int) -> None:
        async with lock:
            inside.append(number)
            assert len(inside) == 1
            await gate.wait()
            inside.remove(number)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(worker, number)
        await wait_all_tasks_blocked()
        assert len(inside) == 1
        gate.set()
    assert inside == []


async def test_before_each_pass_a_step_of_others_is_granted() -> None:
    time = Time()
    granted: list[float] = []
    lock = ShortLock(before_pass=lambda: granted.append(time.now), clock=time)
    for _ in range(10):
        async with lock:
            time.now += LOOP_INTERVAL / 4
    assert granted == pytest.approx([1000.0, 1000.0 + LOOP_INTERVAL, 1000.0 + 2 * LOOP_INTERVAL])


async def test_others_stand_aside_while_a_request_waits_that_has_not_been_read(rig: Rig) -> None:
    with short_waits(0):
        os.write(rig.writer, b"x")
        await vars(pyfuse3)["trio"].lowlevel.wait_readable(rig.reader)
        with assert_checkpoints():
            await take_turn()
        os.read(rig.reader, 1)
        with assert_no_checkpoints():
            await take_turn()
        os.write(rig.writer, b"x")
        async with vars(pyfuse3)["trio"].Lock():  # which passes through the event loop first
            with assert_no_checkpoints():
                await take_turn()


async def test_a_cancelled_waiter_leaves_the_lock_to_the_others() -> None:
    lock = ShortLock()
    done: list[str] = []

    async def worker(name: str, scope: trio.CancelScope) -> None:
        with scope:
            async with lock:
                done.append(name)

    scopes = [trio.CancelScope(), trio.CancelScope()]
    async with trio.open_nursery() as nursery, lock:
        nursery.start_soon(worker, "first", scopes[0])
        nursery.start_soon(worker, "second", scopes[1])
        await wait_all_tasks_blocked()
        scopes[0].cancel()
        await wait_all_tasks_blocked()
    assert done == ["second"]


async def test_other_tasks_run_within_one_interval() -> None:
    """A worker that always finds a request must not keep the loop for itself."""
    now = 0.0
    lock = ShortLock(clock=lambda: now)
    turns: list[float] = []

    async def other() -> None:
        while True:
            turns.append(now)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(100):
            now += LOOP_INTERVAL / 8
            async with lock:
                pass
        nursery.cancel_scope.cancel()
    # Trio runs the tasks of one pass in any order: first in one and last in the next is twice the interval.
    assert all(b - a <= 2 * LOOP_INTERVAL + 1e-9 for a, b in itertools.pairwise(turns))
    assert 100 // 8 - 2 <= len(turns) <= 100 // 8 + 2


async def test_the_namespace_is_trio_but_for_two_names() -> None:
    with short_waits(30):
        namespace = vars(pyfuse3)["trio"]
        assert namespace.open_nursery is trio.open_nursery
        assert namespace.ClosedResourceError is trio.ClosedResourceError
        assert namespace.lowlevel.current_task is trio.lowlevel.current_task
        assert isinstance(namespace.Lock(), ShortLock)
        assert isinstance(namespace.lowlevel.wait_readable, ShortWait)
    assert vars(pyfuse3)["trio"] is trio


def test_a_pyfuse3_that_looks_different_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert waits_as_known()
    monkeypatch.setitem(vars(pyfuse3), "trio", None)
    assert not waits_as_known()


async def test_what_comes_first_is_called_until_it_is_done() -> None:
    answers = iter([False, True])
    calls = []

    def first() -> bool:
        calls.append(next(answers))
        return calls[-1]

    reading, writing = os.pipe()
    try:
        os.write(writing, b"x")
        wait = ShortWait(0.0, first=first)
        for _ in range(4):
            await wait(reading)
    finally:
        os.close(reading)
        os.close(writing)
    assert calls == [False, True]


COUNTING = """
import json, sys, trio
from pathlib import Path
from qedfs.fuse import readiness
used = set()
wait, enter = readiness.ShortWait.__call__, readiness.ShortLock.__aenter__
def noting(name, function):
    def call(*arguments):
        if name not in used:
            used.add(name)
            print(json.dumps(name), flush=True)
        return function(*arguments)
    return call
readiness.ShortWait.__call__ = noting("wait", wait)
readiness.ShortLock.__aenter__ = noting("lock", enter)
sys.argv = sys.argv[1:]
exec(compile(Path(sys.argv[0]).read_text(), sys.argv[0], "exec"))
"""


def test_pyfuse3_waits_and_locks_through_the_namespace(tmp_path: Path) -> None:
    """Should a new pyfuse3 stop to, all works on, slower: this is where one learns of it."""
    server = Path(__file__).with_name("memory_server.py")
    result = subprocess.run(
        [sys.executable, "-c", COUNTING, str(server), str(tmp_path), '{"disks": []}'],
        env={**os.environ, "PYTHONPATH": str(server.parents[2])},
        input="unmount\n",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert {'"lock"', '"wait"'} <= set(result.stdout.splitlines()), result.stderr


def switches(pid: int) -> int:
    """How often a thread of the process has given up its processor, on its own or not."""
    lines = [
        line for task in Path(f"/proc/{pid}/task").iterdir() for line in (task / "status").read_text().splitlines()
    ]
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)


@pytest.mark.parametrize("poll", [0, 1000])
def test_an_idle_mount_sleeps(mount: Mount, poll: int) -> None:
    mounted = mount(options=f"poll={poll}")
    for _ in range(200):
        os.getxattr(mounted.file(), "user.qedfs.state")
    subprocess.run(["sleep", "0.3"], check=True)
    before = switches(mounted.process.pid)
    subprocess.run(["sleep", "1"], check=True)
    assert switches(mounted.process.pid) - before <= 5
