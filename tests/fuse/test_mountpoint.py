from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from qedfs.config import MountOptions
from qedfs.errors import MountError
from qedfs.fuse import mounts
from qedfs.fuse.busy import Holder
from qedfs.fuse.mountpoint import captured_stderr, check_mountpoint, mount_options
from qedfs.fuse.mounts import find_mount, read_mounts


def test_a_machine_without_fuse_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os.path, "exists", lambda path: path != "/dev/fuse")
    with pytest.raises(MountError, match=r"^/dev/fuse: does not exist"):
        check_mountpoint(str(tmp_path))


def test_an_ordinary_user_needs_fusermount3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MountError, match=r"^fusermount3: is not installed"):
        check_mountpoint(str(tmp_path))


def test_an_empty_directory_will_do(tmp_path: Path) -> None:
    check_mountpoint(str(tmp_path))


def test_other_users_are_always_held_to_the_mode() -> None:
    assert mount_options(MountOptions(), "vm.qed") == {"default_permissions", "subtype=qedfs", "fsname=vm.qed"}
    every = mount_options(MountOptions(read_only=True, allow_other=True), "vm.qed")
    assert every == {"default_permissions", "subtype=qedfs", "fsname=vm.qed", "ro", "allow_other"}
    assert "allow_root" in mount_options(MountOptions(allow_root=True), "vm.qed")


def test_what_c_code_and_children_say_is_caught_as_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with captured_stderr() as said:
        os.write(2, b"fuse: one\n")
        subprocess.run(["sh", "-c", "echo 'fusermount3: two' >&2"], check=True)
        assert said() == "one; two"
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


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
