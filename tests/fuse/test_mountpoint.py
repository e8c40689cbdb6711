from __future__ import annotations

import os
from pathlib import Path

import pytest

from qedfs.config import MountOptions
from qedfs.errors import MountError
from qedfs.fuse import mounts
from qedfs.fuse.busy import Holder
from qedfs.fuse.mountpoint import check_mountpoint, library_options, mount_options
from qedfs.fuse.mounts import find_mount, read_mounts


def test_a_machine_without_fuse_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os.path, "exists", lambda path: path != "/dev/fuse")
    with pytest.raises(MountError, match=r"^/dev/fuse: does not exist"):
        check_mountpoint(str(tmp_path))


def test_nobody_mounts_without_fusermount3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MountError, match=r"^fusermount3: is not installed"):
        check_mountpoint(str(tmp_path))


def test_an_empty_directory_will_do(tmp_path: Path) -> None:
    check_mountpoint(str(tmp_path))


def test_other_users_are_always_held_to_the_mode() -> None:
    assert mount_options(MountOptions(), "vm.qed") == ["default_permissions", "subtype=qedfs", "fsname=vm.qed"]
    every = mount_options(MountOptions(read_only=True, allow_other=True), "a,b\\c")
    assert every == ["default_permissions", "subtype=qedfs", "fsname=a\\,b\\\\c", "ro", "allow_other"]


def test_only_root_and_the_mounter_pass_with_allow_root() -> None:
    only_root = MountOptions(allow_root=True)
    assert "allow_other" in mount_options(only_root, "vm.qed")  # the kernel lets everybody in ...
    assert library_options(only_root) == {"allow_root"}  # ... and libfuse nobody else
    assert library_options(MountOptions(allow_other=True)) == set()


def test_the_mount_on_top_is_found_with_blanks_in_its_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_bytes(
        b"22 1 0:20 / /a rw - tmpfs below rw\n"
        b"23 1 0:21 / /a rw shared:1 master:2 - fuse.qedfs /img/a\\134b rw\n"
        b"24 1 8:1 / /a/with\\040blank rw - ext4 /dev/sda1 rw\n"
    )
    monkeypatch.setattr(mounts, "_MOUNTINFO", str(table))
    assert find_mount("/a/../a") == (23, "0:21", "/a", "fuse.qedfs", "/img/a\\b")
    assert find_mount("/a/with blank") == (24, "8:1", "/a/with blank", "ext4", "/dev/sda1")
    assert find_mount("/other") is None
    assert len(read_mounts()) == 3


def test_a_holder_is_named_with_its_pid_where_it_has_one() -> None:
    assert str(Holder("qemu", 7, "/m/vm.raw")) == "qemu (pid 7)"
    assert str(Holder("/dev/loop0", None, "/m/vm.raw")) == "/dev/loop0"
