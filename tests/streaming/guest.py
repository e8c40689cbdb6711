"""A leaf that is streamed while the loads of the kill rounds, whose every sector is judged, work on it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np

from contrib.boot.server import serving
from contrib.kill.load import MAPPED, TURNS
from contrib.kill.rounds import loads, nbd_server
from contrib.kill.stamps import PAGE_SECTORS, SECTOR, Ledger, content
from tests.backing.object_servers import BUCKET, moto
from tests.failing.rig import MIB, QEDFS, Disk, run, served, until

SIZE = 32 * MIB
SECTORS = SIZE // SECTOR
CLUSTERS = (65536, 8192, 16384)
"""Sizes in bytes. Of smaller ones in a file of this size QEMU counts leaks that are none (docs/format.md)."""
SOURCES = ("raw", "qemu-nbd", "nbdkit", "chain", "qcow2", "s3")


@contextmanager
def source(kind: str, folder: Path, salt: int) -> Iterator[tuple[str, str]]:
    """Have a backing with the content of version 0; yield its name and format."""
    folder.mkdir()
    raw = folder / "base.raw"
    data = content(salt, np.arange(SECTORS), 0)
    raw.write_bytes(data)
    if kind == "raw":
        yield str(raw), "raw"
    elif kind == "qemu-nbd":
        with nbd_server(folder) as socket:
            yield f"nbd+unix:///?socket={socket}", "raw"
    elif kind == "nbdkit":
        with serving(raw, "nbdkit", "tcp", folder) as url:
            yield url, "raw"
    elif kind == "qcow2":
        run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, folder / "base.qcow2")
        yield str(folder / "base.qcow2"), "qcow2"
    elif kind == "s3":
        with stored(data) as url:
            yield url, "raw"
    else:
        raw.write_bytes(data[: SIZE // 2] + bytes(SIZE // 2))
        (folder / "rest").write_bytes(data[SIZE // 2 :])
        run(*QEDFS, "create", "-b", raw, "-F", "raw", folder / "middle.qed")
        write = f"write -s {folder}/rest {SIZE // 2} {SIZE // 2}"
        run("qemu-io", "-f", "qed", "-c", write, folder / "middle.qed")
        yield str(folder / "middle.qed"), "qed"


@contextmanager
def stored(data: bytes) -> Iterator[str]:
    """Have an object on a server of its own, and the environment that leads there; yield its name."""
    server = moto()
    server.start()
    try:
        with mock.patch.dict(os.environ, server.variables()):
            server.put("base.raw", data)
            yield f"s3://{BUCKET}/base.raw"
    finally:
        server.stop()


class Guest:
    """A leaf `vm.qed` over a backing, its loads, and the ledger of what they wrote."""

    def __init__(self, folder: Path, backing: tuple[str, str], seed: int, stack: ExitStack) -> None:
        self.leaf = folder / "vm.qed"
        self._folder = folder
        self._seed = seed * 100
        self._mapped = np.arange(SECTORS) // PAGE_SECTORS % TURNS == MAPPED
        self._ledger = Ledger(folder / "ledger", SECTORS, seed)
        cluster_size = CLUSTERS[seed % len(CLUSTERS)]
        run(
            *(*QEDFS, "create", "-b", backing[0], "-F", backing[1], "--mode", "cow"),
            *("--cluster-size", str(cluster_size), self.leaf),
        )
        self.loads = stack.enter_context(loads(folder / "mnt" / "vm.raw", folder, SECTORS, seed))

    @contextmanager
    def mounted(self, *options: str) -> Iterator[Disk]:
        with served(self.leaf, self._folder / "mnt", "idle=always", *options) as disk:
            yield disk

    def start(self, seconds: float) -> None:
        """Start all loads, for some seconds or (0) until the disk goes."""
        self._seed += 1
        self.loads.start(self._seed, seconds)

    def has_written(self) -> bool:
        """Whether any write was acknowledged, in this mount or an earlier one."""
        return bool(self._ledger.acknowledged.any())

    def ended(self) -> None:
        """Wait for the loads; they have seen nothing that cannot be, and what they wrote was acknowledged."""
        complaints = self.loads.ended()
        assert complaints == {}
        assert self.has_written()

    def judge(self, disk: Disk) -> bytes:
        """Return the whole disk as the mount shows it: every sector is one that the ledger allows, from now on the only one."""
        seen = b"".join(disk.read(pos, MIB) for pos in range(0, SIZE, MIB))
        self._ledger.settle(0, self._ledger.judge(0, seen, self._ledger.acknowledged.copy(), mixed=self._mapped))
        return seen

    def end(self, disk: Disk) -> None:
        """Judge a complete disk and unmount it: QEMU finds it sound, alone and of the same content."""
        seen = self.judge(disk)
        disk.unmount()
        assert_alone(self.leaf, seen, self._folder)


def stream(disk: Disk) -> None:
    set_attribute(disk, "mode", "stream")


def set_attribute(disk: Disk, name: str, value: object) -> None:
    os.setxattr(disk.file, f"user.qedfs.{name}", str(value).encode())


def progress(disk: Disk) -> float:
    return float(disk.attribute("progress"))


def complete(disk: Disk) -> None:
    """Return when the image stands alone."""
    until(lambda: disk.attribute("state") == "complete")
    assert disk.attribute("progress") == "100.00"
    assert disk.attribute("backing") == ""


def assert_alone(leaf: Path, expected: bytes, folder: Path) -> None:
    """By QEMU's reading: no error and no leak, no backing, and the content is `expected`."""
    run("qemu-img", "check", "-f", "qed", leaf)
    assert "backing-filename" not in json.loads(run("qemu-img", "info", "-f", "qed", "--output=json", leaf))
    (folder / "expected.raw").write_bytes(expected)
    run("qemu-img", "compare", "-f", "qed", "-F", "raw", leaf, folder / "expected.raw")
