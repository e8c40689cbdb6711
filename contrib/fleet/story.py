"""What happens in a fleet: hosts that boot at once, a base that is replaced, an origin that is away.

Everything that a host reads is compared with the base; what the origin sends is counted by its own log.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from contrib.bench.link import link
from contrib.bench.rig import BenchError, make_random
from contrib.fleet.hosts import THINKING, Booted, Host, at_once
from contrib.fleet.servers import Sent, cache, origin, sent
from contrib.fleet.trace import MIB, boot_trace

NAME = "base.raw"


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes; the link to the origin in bytes per second (0: no limit) and seconds for a round trip."""

    size: int = 1024 * MIB
    files: int = 400
    slice: int = MIB
    rate: float = 125e6
    round_trip: float = 0.02
    thinking: float = THINKING


class Wave(NamedTuple):
    """Hosts that have booted at once: each one's boot, and what the origin has answered for them."""

    boots: list[Booted]
    origin: Sent


class Fleet:
    """A base on a server behind a long link, caches at this end of it, and as many hosts as wanted."""

    def __init__(self, folder: Path, plan: Plan, stack: ExitStack) -> None:
        self.plan = plan
        self._folder = folder
        self._count = 0
        files = folder / "files"
        files.mkdir()
        self.base = files / NAME
        make_random(self.base, plan.size)
        os.utime(self.base, (1e9, 1e9))  # or a replacement within the same second would have the same ETag
        self.trace = boot_trace(plan.size, files=plan.files)
        self.origin = origin(folder / "origin", files)
        stack.enter_context(self.origin.running())
        self.link = stack.enter_context(link(str(self.origin.port), plan.rate, plan.round_trip))

    @property
    def far(self) -> str:
        """The name of the base without a cache."""
        return f"http://127.0.0.1:{self.link.port}/{NAME}"

    def touched(self, unit: int) -> int:
        """Return the bytes of all units of so many bytes that a boot touches."""
        ends = ((read.pos // unit, (read.pos + read.length - 1) // unit) for read in self.trace)
        return len({number for first, last in ends for number in range(first, last + 1)}) * unit

    @contextlib.contextmanager
    def cached(self, *, lock: bool = True) -> Iterator[str]:
        """Have an empty cache while inside, `lock` as for `cache`; yield the name of the base there."""
        with cache(self._fresh("cache"), self.link.port, slice=self.plan.slice, lock=lock).running() as server:
            yield f"{server.url}/{NAME}"

    def host(self, backing: str) -> Host:
        """Return a new host with a fresh leaf."""
        return Host(self._fresh("host"), backing)

    def wave(self, count: int, backing: str, *options: str) -> Wave:
        """Create leaves on `count` new hosts, mount them, and boot at the same moment."""
        before = sent(self.origin)
        hosts = [self.host(backing) for _ in range(count)]
        with ExitStack() as mounts:
            for host in hosts:
                mounts.enter_context(host.mounted(*options))
            boots = at_once([partial(self.boot, host) for host in hosts])
        return Wave(boots, sent(self.origin) - before)

    def boot(self, host: Host, part: slice = slice(None), base: Path | None = None) -> Booted:
        """Read a part of the trace on a host, and compare it with the base, or an earlier one.

        Raises:
            BenchError: something else was read.
            OSError: something could not be read.
        """
        return host.boot(self.trace[part], base or self.base, self.plan.thinking)

    def replace(self) -> Path:
        """Put another content of the same size in the place of the base; return where the old one is now."""
        old = self._fresh("old")
        self.base.rename(old)
        make_random(self.base, self.plan.size)
        return old

    def _fresh(self, kind: str) -> Path:
        self._count += 1
        return self._folder / f"{kind}{self._count}"


@contextlib.contextmanager
def fleet(folder: Path, plan: Plan) -> Iterator[Fleet]:
    """Have a fleet in an empty folder while inside."""
    with ExitStack() as stack:
        yield Fleet(folder, plan, stack)


class Replaced(NamedTuple):
    """What was said after the base had been replaced."""

    running: str
    """`last_error` of a host that needed what the cache had not."""
    seconds: float
    """Until then, from the read on."""
    mounted: str
    """The answer to a mount of a leaf of the old content."""
    fresh: Booted
    """A boot of a new leaf, from the new content."""


def replace_the_base(fleet: Fleet) -> Replaced:
    """Two hosts boot the first half; before the second one does the base is replaced, and it wants the rest, too.

    Raises:
        BenchError: anything was mixed, or was not refused.
    """
    half = slice(len(fleet.trace) // 2)
    with fleet.cached() as name:
        first, second = fleet.host(name), fleet.host(name)
        with first.mounted(), second.mounted():
            fleet.boot(first, part=half)
            old = fleet.replace()
            # What the first one has read is in the cache, of the content that both have pinned.
            fleet.boot(second, part=half, base=old)
            start = time.monotonic()
            with failing(OSError):
                fleet.boot(second, part=slice(half.stop, None), base=old)
            seconds = time.monotonic() - start
            running = second.get("last_error")
        with failing(BenchError) as refusal, first.mounted():
            pass
        fresh = fleet.host(name)
        with fresh.mounted():
            return Replaced(running, seconds, str(refusal.error), fleet.boot(fresh))


def stop_the_origin(fleet: Fleet) -> Wave:
    """A host boots; then the origin is away, and another one is created, mounted and booted from what the cache has."""
    with fleet.cached() as name:
        fleet.wave(1, name)
        fleet.origin.kill()
        try:
            # How far a read-ahead goes is a matter of time, too, and what the first host has not touched is not there.
            return fleet.wave(1, name, "readahead=0")
        finally:
            fleet.origin.start()


class Failing:
    """The error that something has ended with."""

    error: Exception


@contextlib.contextmanager
def failing(kind: type[Exception]) -> Iterator[Failing]:
    """Want what is inside to fail. Raises BenchError if it does not."""
    failed = Failing()
    try:
        yield failed
    except kind as error:
        failed.error = error
    else:
        raise BenchError("what has to be refused was done")
