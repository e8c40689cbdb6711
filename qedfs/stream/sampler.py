"""Where the numbers for the idle decision come from: psutil's counters of the leaf's disk, the network, and ourselves.

The devices are found once, when streaming starts. What cannot be found is None, and then nothing is concluded from it:
file systems without a device of their own (overlay, btrfs, network file systems, tmpfs), routes over virtual interfaces.
Nothing here touches a mount of ours; a sample is read from /proc in about a millisecond, so
that many disks of one process had better share one: the own counters are those of the process anyway.
"""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path

import psutil

from qedfs.stream.idle import Sample, Traffic

SYS = Path("/sys")


def disk_of(device: int, sys: Path = SYS) -> str | None:
    """Return the name under which the counters of a file's disk are found; `device` is the `st_dev` of the file.

    The whole disk rather than the partition, and what lies under a logical volume that has only one disk: who works on
    the neighbouring partition is in the way too.
    """
    try:
        node = (sys / f"dev/block/{os.major(device)}:{os.minor(device)}").resolve(strict=True)
        if (node / "partition").exists():
            node = node.parent
        while len(below := _names(node / "slaves")) == 1:
            node = (node / "slaves" / below[0]).resolve(strict=True)
            if (node / "partition").exists():
                node = node.parent
    except OSError:
        return None
    return node.name


def interfaces_to(host: str, sys: Path = SYS) -> frozenset[str]:
    """Return the physical interfaces over which `host` is reached; none if that is not known or not over a network.

    Sends nothing, but may ask for the address of `host`, which takes time: call it in a thread.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            local = probe.getsockname()[0]
        addresses = psutil.net_if_addrs()
    except OSError:
        return frozenset()
    names = [name for name, known in addresses.items() if any(a.address.partition("%")[0] == local for a in known)]
    return frozenset(found for name in names for found in _physical(name, sys))


def _physical(name: str, sys: Path) -> set[str]:
    """The interface itself if it is a device, else those below it (bridge, bond, VLAN)."""
    node = sys / "class/net" / name
    if (node / "device").exists():
        return {name}
    below = [entry.removeprefix("lower_") for entry in _names(node) if entry.startswith("lower_")]
    return {found for lower in below for found in _physical(lower, sys)}


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


class Sampler:
    """Takes samples of the device `disk` and the `interfaces`, as the functions above found them."""

    def __init__(self, disk: str | None, interfaces: frozenset[str]) -> None:
        self._disk_name = disk
        self._interfaces = interfaces
        self._process = psutil.Process()
        self._flushed = 0

    def written(self) -> int:
        """Return how many bytes this process has written to storage so far, what is still in memory included.

        Read before a flush begins, and given to `flushed` when it has ended, it tells which writes are on the disk.
        """
        return self._own_disk().written

    def flushed(self, written: int) -> None:
        """Note that a flush has ended before which `written` returned this number."""
        self._flushed = max(self._flushed, written)

    def sample(self, now: float, *, waiting: int = 0, waited_at: float = -math.inf, asked: int = 0) -> Sample:
        """Return what is to be seen now. `asked` counts the bytes asked of the backing (`qedfs.stream.idle.Sample`)."""
        disk, network = self._disk(), self._network()
        return Sample(
            at=now,
            waiting=waiting,
            waited_at=waited_at,
            disk=disk,
            own_disk=self._own_disk(),
            own_flushed=self._flushed,
            network=network,
            own_network=Traffic(asked, 0),
        )

    def _disk(self) -> Traffic | None:
        if self._disk_name is None:
            return None
        # Without psutil's correction of wraps, which remembers devices for ever: the decision copes with them.
        counters = psutil.disk_io_counters(perdisk=True, nowrap=False).get(self._disk_name)
        return Traffic(counters.read_bytes, counters.write_bytes) if counters else None

    def _network(self) -> Traffic | None:
        if not self._interfaces:
            return None
        counters = psutil.net_io_counters(pernic=True, nowrap=False)
        seen = [counters[name] for name in self._interfaces if name in counters]
        # One of several gone: the rest would look like a difference below zero, which is what it is.
        return Traffic(sum(c.bytes_recv for c in seen), sum(c.bytes_sent for c in seen)) if seen else None

    def _own_disk(self) -> Traffic:
        counters = self._process.io_counters()
        return Traffic(counters.read_bytes, counters.write_bytes)
