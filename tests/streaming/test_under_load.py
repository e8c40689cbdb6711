"""An image that is streamed while a guest works on it becomes whole, and not one byte of it is wrong.

`QEDFS_STREAM_SEEDS` says how many times each story is told (default 1); a seed also decides the size of clusters.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from contrib.kill.rounds import nbd_server
from contrib.soak.served import check
from tests.failing.rig import until
from tests.streaming.guest import SIZE, SOURCES, Guest, complete, progress, set_attribute, source, stream

SEEDS = range(int(os.environ.get("QEDFS_STREAM_SEEDS", "1")))
IN_A_SECOND = f"stream_rate={SIZE}"
"""So slow that there is a middle to meet; the floor is below it."""

CHANGES = 40

seeds = pytest.mark.parametrize("seed", SEEDS)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize(("number", "kind"), [*enumerate(SOURCES)], ids=SOURCES)
@seeds
def test_image_streamed_under_load_stands_alone(
    number: int, kind: str, seed: int, tmp_path: Path, stack: ExitStack
) -> None:
    guest = Guest(tmp_path, stack.enter_context(source(kind, tmp_path / "base", seed + number)), seed + number, stack)
    # Every other seed at full speed.
    with guest.mounted(*[IN_A_SECOND] * (seed % 2)) as disk:
        guest.start(1.5)
        stream(disk)
        complete(disk)
        guest.ended()
        guest.end(disk)


@seeds
def test_server_that_is_killed_and_comes_back_costs_only_time(seed: int, tmp_path: Path, stack: ExitStack) -> None:
    servers = stack.enter_context(ExitStack())
    guest = Guest(tmp_path, servers.enter_context(source("qemu-nbd", tmp_path / "base", seed)), seed, stack)
    with guest.mounted(f"stream_rate={SIZE // 10}") as disk:
        guest.start(3)
        stream(disk)
        until(lambda: progress(disk) > 30)
        servers.close()
        (tmp_path / "base" / "nbd.socket").unlink()
        until(lambda: disk.attribute("state") == "backing-error")
        assert progress(disk) < 100
        stack.enter_context(nbd_server(tmp_path / "base"))
        set_attribute(disk, "stream_rate", SIZE)
        complete(disk)
        guest.ended()
        guest.end(disk)


@seeds
def test_streaming_goes_on_after_every_kill(seed: int, tmp_path: Path, stack: ExitStack) -> None:
    chance = random.Random(seed)
    guest = Guest(tmp_path, stack.enter_context(source("qemu-nbd", tmp_path / "base", seed)), seed, stack)
    for kill in range(2):
        with guest.mounted(IN_A_SECOND) as disk:
            if not kill:
                stream(disk)  # remembered from now on
            assert disk.attribute("mode") == "stream"
            guest.start(0)
            until(guest.has_written)
            time.sleep(chance.uniform(0.1, 0.5))
            disk.kill()
            guest.ended()
        check(guest.leaf)
    with guest.mounted() as disk:
        complete(disk)
        guest.end(disk)


@seeds
def test_modes_change_under_load_as_often_as_wanted(seed: int, tmp_path: Path, stack: ExitStack) -> None:
    chance = random.Random(seed)
    guest = Guest(tmp_path, stack.enter_context(source("qemu-nbd", tmp_path / "base", seed + 1)), seed + 1, stack)
    with guest.mounted(IN_A_SECOND) as disk:
        guest.start(2)
        for _ in range(CHANGES):
            if disk.attribute("state") == "complete":
                break
            name, values = chance.choice([("mode", ("cow", "cor", "stream")), ("paused", ("0", "1"))])
            value = chance.choice(values)
            set_attribute(disk, name, value)
            assert disk.attribute(name) == value
        set_attribute(disk, "paused", 0)
        stream(disk)
        complete(disk)
        guest.ended()
        guest.end(disk)
