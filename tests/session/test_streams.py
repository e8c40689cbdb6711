"""What the streams of a mount share."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
import trio.testing

from qedfs.config import DiskOptions, Idle, Mode, MountOptions, StreamOptions
from qedfs.session import streams as streams_module
from qedfs.session.streams import open_streams
from tests.model.fake_source import FakeSource
from tests.model.memory_disk import memory_disk
from tests.stream.test_job import BASE, MIB, slow, storage


async def test_a_backing_that_does_not_answer_holds_up_no_stream_from_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Its window is full, and a piece of each of its leaves waits for its turn; none of it is given back until it answers."""
    monkeypatch.setattr(streams_module, "IN_FLIGHT", 4 * MIB)
    options = MountOptions(disk=DiskOptions(window=2 * MIB), stream=StreamOptions(idle=Idle.ALWAYS), boot_profile="off")
    status = os.stat(tmp_path)
    async with AsyncExitStack() as stack:
        streams = await stack.enter_async_context(open_streams(options))
        alive = await stack.enter_async_context(
            memory_disk(await storage(), FakeSource(BASE, name="alive"), mode=Mode.STREAM)
        )
        sources = [slow(FakeSource(BASE, name="dead"), 0.01) for _ in range(8)]
        disks = [
            await stack.enter_async_context(memory_disk(await storage(), source, mode=Mode.STREAM))
            for source in sources
        ]
        for number, dead in enumerate(disks):
            await stack.enter_async_context(streams.streaming(dead.disk, str(number), status))
        await trio.sleep(0.1)  # by then the window is large
        assert 8 * MIB <= sum(dead.disk.copied() for dead in disks) < len(disks) * len(BASE)
        gates = [source.hold() for source in sources]
        await trio.sleep(10)
        async with streams.streaming(alive.disk, "alive", status):
            await trio.sleep(600)
            assert alive.disk.remaining() == 0
        for gate in gates:
            gate.release()
