"""Mountpoints that cannot work are refused before anything is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from qedfs.errors import MountError, QedfsError, UsageError
from qedfs.session.places import check_places, is_below, real_mountpoint


def test_empty_directory_beside_the_sources_is_fine(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "vm.qed").touch()
    (tmp_path / "mnt").mkdir()
    check_places(str(tmp_path / "mnt"), [str(tmp_path / "images"), str(tmp_path / "vm.qed")])


def test_missing_mountpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MountError, match="No such file or directory"):
        check_places(str(tmp_path / "mnt"), [])


def test_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mnt").touch()
    with pytest.raises(MountError, match="Not a directory"):
        check_places(str(tmp_path / "mnt"), [])


@pytest.mark.parametrize("source", ["images", "images/deep", "images/vm.qed", "link"])
def test_mountpoint_over_its_source_is_refused(source: str, tmp_path: Path) -> None:
    (tmp_path / "images/deep").mkdir(parents=True)
    (tmp_path / "images/vm.qed").touch()
    (tmp_path / "link").symlink_to("images")
    with pytest.raises(UsageError, match="cover its own source"):
        check_places(str(tmp_path / "images"), [str(tmp_path / source)])


def test_mountpoint_inside_its_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images/mnt").mkdir(parents=True)
    with pytest.raises(UsageError, match="lies inside its own source"):
        check_places(str(tmp_path / "images/mnt"), [str(tmp_path / "images")])


def test_refusals_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(QedfsError) as caught:
        check_places(str(tmp_path / "a\nb"), [])
    assert "\n" not in str(caught.value)


def test_real_mountpoint_follows_links(tmp_path: Path) -> None:
    (tmp_path / "deep/mnt").mkdir(parents=True)
    (tmp_path / "folder").symlink_to("deep")
    (tmp_path / "link").symlink_to("folder/mnt")
    for path in ("deep/mnt", "folder/mnt", "link", "link/"):
        assert real_mountpoint(str(tmp_path / path)) == str(tmp_path / "deep/mnt")
    assert real_mountpoint(str(tmp_path / "folder/none")) == str(tmp_path / "deep/none")
    assert real_mountpoint("/") == "/"


def test_below_is_by_components() -> None:
    assert is_below("/a/b", "/a")
    assert is_below("/a", "/a")
    assert is_below("/a", "/")
    assert not is_below("/ab", "/a")
