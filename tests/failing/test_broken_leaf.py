"""A leaf whose writes and flushes fail: what the guest sees, what is remembered, what the next mount finds."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.failing.rig import (
    CLUSTER,
    MIB,
    QEDFS,
    Disk,
    FaultyFolder,
    faulty_folder,
    file_system,
    fill,
    run,
    served,
)

SIZE = 8 * MIB
NEED_CHECK = 2
BASE = random.Random(2).randbytes(SIZE)


@pytest.fixture
def leaf(tmp_path: Path) -> Path:
    """A leaf in a folder of its own."""
    (tmp_path / "base.raw").write_bytes(BASE)
    (tmp_path / "real").mkdir()
    run(*QEDFS, "create", "-b", tmp_path / "base.raw", tmp_path / "real/vm.qed")
    return tmp_path / "real/vm.qed"


@pytest.fixture
def faulty(leaf: Path, tmp_path: Path) -> Iterator[FaultyFolder]:
    """The folder of the leaf behind a file system that fails when told to."""
    with faulty_folder(leaf.parent, tmp_path / "faulty") as folder:
        yield folder


def refused(disk: Disk, pos: int) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        disk.write(pos, b"r" * 4096)


def needs_check(leaf: Path) -> bool:
    return bool(leaf.read_bytes()[16] & NEED_CHECK)


def assert_sound(leaf: Path) -> None:
    """Leaked clusters at most."""
    done = subprocess.run(["qemu-img", "check", "-f", "qed", leaf], capture_output=True, timeout=30, check=False)
    assert done.returncode in (0, 3), done


def assert_failed_for_good(disk: Disk) -> None:
    """The latch: reads go on, nothing else does, and it is told."""
    assert disk.attribute("state") == "failed"
    assert "cannot be flushed" in disk.attribute("last_error")
    for pos in (0, CLUSTER, 4 * CLUSTER):
        refused(disk, pos)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        disk.sync()
    assert disk.read(6 * MIB, MIB) == BASE[6 * MIB : 7 * MIB]
    assert disk.read(0, CLUSTER) == b"a" * CLUSTER


def test_failed_flush_is_never_taken_back(leaf: Path, faulty: FaultyFolder, tmp_path: Path) -> None:
    with served(faulty.point / "vm.qed", tmp_path / "mnt") as disk:
        disk.write(0, b"a" * CLUSTER)
        disk.sync()
        disk.write(CLUSTER, b"b" * CLUSTER)
        faulty.tell("fail fsync EIO")
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            disk.sync()
        faulty.tell("heal")
        assert_failed_for_good(disk)
        said = disk.unmount(status=1)
        assert "cannot be flushed" in said
        assert said.count("\n") == 1
    assert needs_check(leaf)
    assert_sound(leaf)
    with served(leaf, tmp_path / "mnt") as disk:
        assert disk.attribute("state") == "passive"
        assert disk.read(0, CLUSTER) == b"a" * CLUSTER, "what was acknowledged"
        assert disk.read(CLUSTER, CLUSTER) in (b"b" * CLUSTER, BASE[CLUSTER : 2 * CLUSTER])
        disk.write(CLUSTER, b"c" * CLUSTER)
        disk.sync()
        disk.unmount()
    assert not needs_check(leaf)
    assert_sound(leaf)


def test_flush_that_fails_in_the_kernel_latches_too(tmp_path: Path) -> None:
    """The disk under the leaf's file system finds no room, long after the page cache took the write."""
    (tmp_path / "base.raw").write_bytes(BASE)
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(file_system("tmpfs", tmp_path / "disk", 24 * MIB))
        folder = stack.enter_context(file_system("ext2", device / "fs", 64 * MIB))
        run(*QEDFS, "create", "-b", tmp_path / "base.raw", folder / "vm.qed")
        with served(folder / "vm.qed", tmp_path / "mnt") as disk:
            disk.write(0, b"a" * CLUSTER)
            disk.sync()
            fill(device)
            disk.write(MIB, b"b" * MIB)
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                disk.sync()
            (device / "filler").unlink()
            assert_failed_for_good(disk)
            disk.unmount(status=1)


def test_failed_write_is_told_once_and_later_ones_work(leaf: Path, faulty: FaultyFolder, tmp_path: Path) -> None:
    with served(faulty.point / "vm.qed", tmp_path / "mnt") as disk:
        disk.write(0, b"a" * CLUSTER)
        faulty.tell("fail write EIO")
        refused(disk, 0)
        refused(disk, CLUSTER)
        assert "cannot be written" in disk.attribute("last_error")
        assert disk.read(4 * CLUSTER, CLUSTER) == BASE[4 * CLUSTER : 5 * CLUSTER], "a copy that fails fails no read"
        faulty.tell("heal")
        assert disk.attribute("state") == "passive"
        disk.write(0, b"b" * CLUSTER)
        disk.write(CLUSTER, b"c" * CLUSTER)
        disk.sync()
        disk.kill()
    assert_sound(leaf)
    with served(leaf, tmp_path / "mnt") as disk:
        assert disk.read(0, 2 * CLUSTER) == b"b" * CLUSTER + b"c" * CLUSTER
        disk.unmount()


def test_tables_that_could_not_be_written_are_written_by_the_next_fsync(
    leaf: Path, faulty: FaultyFolder, tmp_path: Path
) -> None:
    with served(faulty.point / "vm.qed", tmp_path / "mnt") as disk:
        disk.write(0, b"a" * CLUSTER)
        # The header, L1 and the first table lie below the first cluster of data.
        faulty.tell(f"fail write EIO {9 * CLUSTER}")
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            disk.sync()
        disk.write(0, b"b" * CLUSTER)
        faulty.tell("heal")
        disk.sync()
        disk.kill()
    assert_sound(leaf)
    with served(leaf, tmp_path / "mnt") as disk:
        assert disk.read(0, CLUSTER) == b"b" * CLUSTER
        disk.unmount()


def test_unmount_tells_of_cached_writes_that_found_no_room(leaf: Path, faulty: FaultyFolder, tmp_path: Path) -> None:
    with served(faulty.point / "vm.qed", tmp_path / "mnt") as disk:
        disk.write(0, b"a" * CLUSTER)
        disk.sync()
        faulty.tell("fail write ENOSPC")
        # A guest that ends without looking at what its last close said.
        guest = f"import os; os.pwrite(os.open('{disk.file}', os.O_RDWR), b'l', 0); os._exit(0)"
        run(sys.executable, "-c", guest)
        said = run(*QEDFS, "unmount", disk.point, status=1)
        assert "No space left on device" in said


def test_read_only_file_system_is_served_read_only(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(BASE)
    with file_system("tmpfs", tmp_path / "fs", 4 * MIB) as folder:
        run(*QEDFS, "create", "-b", tmp_path / "base.raw", folder / "vm.qed")
        run("mount", "-o", "remount,ro", folder)
        assert_served_read_only(folder / "vm.qed", tmp_path)


def test_immutable_leaf_is_served_read_only(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(BASE)
    with file_system("ext4", tmp_path / "fs", 16 * MIB) as folder:
        run(*QEDFS, "create", "-b", tmp_path / "base.raw", folder / "vm.qed")
        run("chattr", "+i", folder / "vm.qed")
        assert_served_read_only(folder / "vm.qed", tmp_path)


def assert_served_read_only(leaf: Path, folder: Path) -> None:
    before = leaf.read_bytes()
    with served(leaf, folder / "mnt") as disk:
        assert disk.read(0, MIB) == BASE[:MIB]
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            disk.write(0, b"r" * 4096)
        disk.unmount()
    assert leaf.read_bytes() == before
    assert "read-only" in Path(f"{folder}/mnt.log").read_text()


def test_leaf_that_becomes_immutable_while_open_refuses_writes_and_serves_reads(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(BASE)
    with file_system("ext4", tmp_path / "fs", 16 * MIB) as folder:
        leaf = folder / "vm.qed"
        run(*QEDFS, "create", "-b", tmp_path / "base.raw", leaf)
        with served(leaf, tmp_path / "mnt") as disk:
            disk.write(0, b"a" * CLUSTER)
            disk.sync()
            run("chattr", "+i", leaf)
            refused(disk, 0)
            assert disk.read(MIB, MIB) == BASE[MIB : 2 * MIB]
            run("chattr", "-i", leaf)
            disk.write(0, b"b" * CLUSTER)
            disk.sync()
            disk.unmount()
        assert_sound(leaf)


@pytest.mark.parametrize("replaced", [False, True], ids=["removed", "replaced"])
def test_leaf_removed_or_replaced_while_open_goes_on_in_its_own_file(
    leaf: Path, tmp_path: Path, replaced: bool
) -> None:
    held = os.open(leaf, os.O_RDONLY)
    with served(leaf, tmp_path / "mnt") as disk:
        disk.write(0, b"a" * CLUSTER)
        leaf.unlink()
        if replaced:
            run("qemu-img", "create", "-q", "-f", "qed", leaf, "1M")
            other = leaf.read_bytes()
        disk.write(CLUSTER, b"b" * CLUSTER)
        disk.sync()
        assert disk.read(0, 2 * CLUSTER) == b"a" * CLUSTER + b"b" * CLUSTER
        disk.unmount()
    if replaced:
        assert leaf.read_bytes() == other
        leaf.unlink()
    leaf.write_bytes(Path(f"/proc/self/fd/{held}").read_bytes())
    os.close(held)
    assert_sound(leaf)
