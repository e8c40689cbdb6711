from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.commands import mounted, qedfs, qedfs_json, refused


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("set")
    (folder / "base.raw").write_bytes(b"\5" * (1 << 20))
    qedfs("create", "-b", folder / "base.raw", folder / "vm.qed")
    with mounted(folder / "vm.qed", folder / "mnt") as mnt:
        yield mnt / "vm.raw"


def mode_of(raw: Path) -> str:
    return os.getxattr(raw, "user.qedfs.mode").decode()


def test_a_mode_is_changed_and_remembered_in_the_leaf(raw: Path) -> None:
    assert qedfs("set", raw, "mode=cow") == ("", "")
    assert mode_of(raw) == "cow"
    assert qedfs_json("info", raw)["mode"] == "cow"
    qedfs("set", raw, "mode=cor")
    assert mode_of(raw) == "cor"


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("mode=fast", "not one it can have"),
        ("colour=red", "there is no attribute 'colour'"),
        ("state=complete", "cannot be set"),
        ("virtual_size=5", "cannot be set"),
        ("mode", "not of the form KEY=VALUE"),
        ("=cow", "not of the form KEY=VALUE"),
    ],
)
def test_a_refused_setting_changes_nothing(raw: Path, setting: str, why: str) -> None:
    before = mode_of(raw)
    assert why in refused("set", raw, setting)
    assert mode_of(raw) == before


def test_a_file_of_another_file_system_is_refused_whatever_its_attributes(tmp_path: Path) -> None:
    file = tmp_path / "vm.raw"
    file.touch()
    os.setxattr(file, "user.qedfs.mode", b"cow")
    assert "is not a disk on a qedfs mount" in refused("set", file, "mode=cor")
    assert os.getxattr(file, "user.qedfs.mode") == b"cow"
    refused("set", tmp_path, "mode=cor")
    refused("set", tmp_path / "missing", "mode=cor")


def test_the_root_of_a_mount_is_no_disk(raw: Path) -> None:
    assert "is not a disk" in refused("set", raw.parent, "mode=cow")
