"""A leaf whose file system fills up: reads go on, copies stop, writes that need room say so, and all of it heals."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.failing.rig import CLUSTER, MIB, QEDFS, Disk, file_system, fill, opened, run, served, until

SIZE = 32 * MIB


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.raw"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture(params=["tmpfs", "ext4"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with file_system(request.param, tmp_path / "fs", 12 * MIB) as folder:
        yield folder


def make_leaf(folder: Path, base: Path) -> Path:
    run(*QEDFS, "create", "-b", base, folder / "vm.qed")
    return folder / "vm.qed"


def write_buffered(disk: Disk, pos: int, data: bytes) -> None:
    with opened(disk.file, os.O_RDWR) as fd:
        assert os.pwrite(fd, data, pos) == len(data)
        os.fsync(fd)


def refused(number: int, pos: int, disk: Disk, *, buffered: bool = False) -> None:
    """A write that allocates must fail with `number`."""
    with pytest.raises(OSError, match=os.strerror(number)):
        (write_buffered if buffered else Disk.write)(disk, pos, b"r" * 4096)


def assert_sound(leaf: Path) -> None:
    """Leaked clusters at most."""
    done = subprocess.run(["qemu-img", "check", "-f", "qed", leaf], capture_output=True, timeout=30, check=False)
    assert done.returncode in (0, 3), done


def assert_content(leaf: Path, expected: bytes, folder: Path) -> None:
    """By QEMU's reading."""
    run("qemu-img", "convert", "-f", "qed", "-O", "raw", leaf, folder / "judged.raw")
    assert (folder / "judged.raw").read_bytes() == expected


def test_full_file_system_costs_nothing_but_what_needs_room(small: Path, base: Path, tmp_path: Path) -> None:
    expected = bytearray(base.read_bytes())
    leaf = make_leaf(small, base)
    with served(leaf, tmp_path / "mnt", "reserve=0") as disk:

        def write(cluster: int, letter: bytes) -> None:
            disk.write(cluster * CLUSTER, letter * CLUSTER)
            expected[cluster * CLUSTER : (cluster + 1) * CLUSTER] = letter * CLUSTER

        write(0, b"a")
        disk.sync()
        filler = fill(small)

        assert disk.read(8 * MIB, MIB) == expected[8 * MIB : 9 * MIB]
        until(lambda: disk.attribute("state") == "no-space")
        assert "No space left" in disk.attribute("last_error")
        assert b"".join(disk.read(pos, MIB) for pos in range(0, SIZE, MIB)) == expected, "reads go on"

        refused(errno.ENOSPC, 20 * CLUSTER, disk)
        refused(errno.ENOSPC, 21 * CLUSTER, disk, buffered=True)
        write(0, b"b")
        disk.sync()

        copied = int(disk.attribute("clusters_data"))
        filler.unlink()
        until(lambda: disk.attribute("state") == "passive")
        disk.read(8 * MIB, MIB)
        until(lambda: int(disk.attribute("clusters_data")) >= copied + 16)
        write(20, b"c")
        write(21, b"d")
        disk.sync()
        disk.unmount()
    assert_sound(leaf)
    assert_content(leaf, bytes(expected), tmp_path)


def test_copies_stop_at_the_reserve_and_the_guest_may_use_it(base: Path, tmp_path: Path) -> None:
    with file_system("tmpfs", tmp_path / "fs", 24 * MIB) as folder:
        leaf = make_leaf(folder, base)
        with served(leaf, tmp_path / "mnt", "reserve=8M") as disk:
            for pos in range(0, SIZE, MIB):
                disk.read(pos, MIB)
            until(lambda: disk.attribute("state") == "no-space")
            assert "reserve" in disk.attribute("last_error")
            assert 8 * MIB <= free(folder) < 9 * MIB + CLUSTER, "all but the reserve was used"

            before = free(folder)
            for pos in range(24 * MIB, 28 * MIB, MIB):
                disk.write(pos, b"g" * MIB)
            disk.sync()
            assert free(folder) <= before - 3 * MIB

            run("mount", "-o", f"remount,size={40 * MIB}", folder)
            until(lambda: disk.attribute("state") == "passive")
            before = free(folder)
            disk.read(23 * MIB, MIB)
            disk.unmount()
        assert free(folder) <= before - MIB
        assert_sound(leaf)


def free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
