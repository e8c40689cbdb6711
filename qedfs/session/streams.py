"""The streams of one mount, and what they share: turns at each backing, memory, boot profiles, the watch over the machine."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from qedfs.config import MountOptions
from qedfs.disk.disk import Disk
from qedfs.disk.fetches import Budget, Share
from qedfs.session.boot_profile import BootProfiles
from qedfs.stream.flow import Flow
from qedfs.stream.job import Job
from qedfs.stream.machine import Machine
from qedfs.stream.sampler import Sampler, disk_of, interfaces_to

IN_FLIGHT = 64 << 20
"""Bytes of all pieces of all streams of a mount that are on their way or being copied: what they cost in memory."""
LOOK_UP_TIME = 2.0
"""Seconds that finding the interfaces to a backing may take; then only disk and guest are watched."""


class Streams:
    """Makes the job of each disk. Made by `open_streams`."""

    def __init__(self, options: MountOptions, nursery: trio.Nursery) -> None:
        self._options = options
        self._nursery = nursery
        self._budget = Budget(IN_FLIGHT)
        # A backing that does not answer keeps what it has until it does: so none may have it all.
        self._most = min(IN_FLIGHT, max(IN_FLIGHT // 2, options.disk.window))
        self._budgets: dict[str, Share] = {}
        self._profiles = BootProfiles(options.boot_profile)
        self._flows: dict[str, Flow] = {}
        self._machines: dict[tuple[str | None, frozenset[str]], Machine] = {}

    @asynccontextmanager
    async def streaming(self, disk: Disk, leaf: str, status: os.stat_result) -> AsyncIterator[Job]:
        """Stream `disk`, whose leaf has this path and status, whenever its mode asks for it, while inside."""
        machine = await self._machine(status.st_dev, disk.host)
        backing = disk.statistics().backing
        flow = self._flows.setdefault(backing, Flow(self._options.disk.window))
        budget = self._budgets.setdefault(backing, Share(self._most, self._budget))
        job = Job(disk, self._options.stream, flow=flow, budget=budget, machine=machine)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.run)
            nursery.start_soon(self._profiles.attend, disk, leaf, job)
            try:
                yield job
            finally:
                nursery.cancel_scope.cancel()

    async def _machine(self, device: int, host: str | None) -> Machine:
        interfaces: frozenset[str] = frozenset()
        if host is not None:
            with trio.move_on_after(LOOK_UP_TIME):
                interfaces = await trio.to_thread.run_sync(interfaces_to, host, abandon_on_cancel=True)
        key = (disk_of(device), interfaces)
        machine = self._machines.get(key)
        if machine is None:
            machine = self._machines[key] = Machine(self._options.stream.idle, Sampler(*key))
            self._nursery.start_soon(machine.run)
        return machine


@asynccontextmanager
async def open_streams(options: MountOptions) -> AsyncIterator[Streams]:
    """Watch the machine for the streams of a mount while inside; it must outlive the leaves."""
    async with trio.open_nursery() as nursery:
        yield Streams(options, nursery)
        nursery.cancel_scope.cancel()
