"""Finding devices and reading their counters; the trees stand for /sys."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil
import pytest

from qedfs.stream.sampler import Sampler, disk_of, interfaces_to


@pytest.fixture
def sys(tmp_path: Path) -> Path:
    """Two disks, a partition of the first, a volume on that partition, and one over both disks."""
    for disk in ("vda", "vdb"):
        (tmp_path / "devices" / disk / "slaves").mkdir(parents=True)
    (tmp_path / "devices/vda/vda1").mkdir()
    (tmp_path / "devices/vda/vda1/partition").write_text("1\n")
    for volume, below in (("dm-0", ["vda/vda1"]), ("dm-1", ["vda", "vdb"])):
        slaves = tmp_path / "devices" / volume / "slaves"
        slaves.mkdir(parents=True)
        for disk in below:
            (slaves / Path(disk).name).symlink_to(tmp_path / "devices" / disk)
    numbers = tmp_path / "dev/block"
    numbers.mkdir(parents=True)
    for number, node in (("8:0", "vda"), ("8:1", "vda/vda1"), ("253:0", "dm-0"), ("253:1", "dm-1")):
        (numbers / number).symlink_to(tmp_path / "devices" / node)
    return tmp_path


@pytest.mark.parametrize(
    ("major", "minor", "name"),
    [(8, 0, "vda"), (8, 1, "vda"), (253, 0, "vda"), (253, 1, "dm-1"), (0, 44, None), (9, 9, None)],
    ids=["disk", "partition", "volume on a partition", "volume over two disks", "no device", "unknown"],
)
def test_the_disk_of_a_file(sys: Path, major: int, minor: int, name: str | None) -> None:
    assert disk_of(os.makedev(major, minor), sys) == name


class Address:
    def __init__(self, address: str) -> None:
        self.address = address


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A card, a bond of two cards, a bridge on a VLAN on the bond, and the loopback. 127.0.0.1 stands for all of them."""
    interfaces = tmp_path / "class/net"
    below = {
        "eth0": [],
        "eth1": [],
        "eth2": [],
        "bond0": ["eth1", "eth2"],
        "vlan7": ["bond0"],
        "br0": ["vlan7", "tap0"],
    }
    for name, lowers in {**below, "tap0": [], "lo": []}.items():
        (interfaces / name).mkdir(parents=True)
        if name.startswith("eth"):
            (interfaces / name / "device").mkdir()
        for lower in lowers:
            (interfaces / name / f"lower_{lower}").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("over", "found"),
    [("eth0", {"eth0"}), ("bond0", {"eth1", "eth2"}), ("br0", {"eth1", "eth2"}), ("lo", set()), ("tap0", set())],
)
def test_only_physical_interfaces_on_the_way_count(
    network: Path, monkeypatch: pytest.MonkeyPatch, over: str, found: set[str]
) -> None:
    known = {"other": [Address("192.0.2.1")], over: [Address("00:11:22:33:44:55"), Address("127.0.0.1")]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: known)
    assert interfaces_to("127.0.0.1", network) == found


def test_a_host_that_is_not_known_has_no_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> list[object]:
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert interfaces_to("store.invalid") == frozenset()


def test_nothing_known_gives_a_sample_without_devices() -> None:
    sample = Sampler(None, frozenset()).sample(5.0, waiting=2, waited_at=4.0, asked=7)
    assert (sample.at, sample.waiting, sample.waited_at, sample.disk, sample.network) == (5.0, 2, 4.0, None, None)
    assert sample.own_network.read == 7


def test_a_device_that_is_gone_gives_none() -> None:
    sample = Sampler("gone0", frozenset({"gone1"})).sample(0.0)
    assert (sample.disk, sample.network) == (None, None)


def test_reads_the_counters_of_this_machine() -> None:
    """Against psutil's own view, before and after."""
    disks = psutil.disk_io_counters(perdisk=True, nowrap=False)
    name = max(disks, key=lambda disk: disks[disk].write_bytes)
    before, received = disks[name], psutil.net_io_counters(pernic=True, nowrap=False)["lo"]
    sample = Sampler(name, frozenset({"lo"})).sample(0.0)
    after = psutil.disk_io_counters(perdisk=True, nowrap=False)[name]
    assert sample.disk is not None
    assert before.read_bytes <= sample.disk.read <= after.read_bytes
    assert before.write_bytes <= sample.disk.written <= after.write_bytes
    assert sample.network is not None
    assert sample.network.read >= received.bytes_recv


def test_own_writes_are_counted_before_they_are_on_the_disk_and_a_flush_is_noted(tmp_path: Path) -> None:
    found = Sampler(None, frozenset())
    before = found.written()
    with open(tmp_path / "file", "wb") as file:
        file.write(bytes(1 << 20))
        file.flush()
        mark = found.written()
        assert found.sample(0.0).own_flushed == 0
        os.fsync(file.fileno())
    if disk_of(os.stat(tmp_path).st_dev):  # a file system in memory counts no writes
        assert mark - before >= 1 << 20
    found.flushed(mark)
    found.flushed(before)
    sample = found.sample(1.0)
    assert sample.own_flushed == mark <= sample.own_disk.written
