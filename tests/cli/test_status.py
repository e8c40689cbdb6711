from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.commands import mounted, qedfs, qedfs_json, refused


@pytest.fixture(scope="module")
def mnt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A mounted directory of `vm.qed`, which is local in part, and `bad.qed`, which cannot be opened."""
    folder = tmp_path_factory.mktemp("status")
    source = folder / "images"
    source.mkdir()
    (folder / "base.raw").write_bytes(b"\5" * (1 << 20))
    qedfs("create", "-b", folder / "base.raw", "--mode", "cow", source / "vm.qed")
    (source / "bad.qed").write_bytes(b"QED\0" + bytes(1000))
    with mounted(source, folder / "mnt") as mnt:
        with (mnt / "vm.raw").open("r+b") as disk:
            disk.write(b"\1" * 65536)
        yield mnt


def test_one_disk_is_told_in_full(mnt: Path) -> None:
    (status,) = qedfs_json("status", mnt / "vm.raw")
    assert status["path"] == str(mnt / "vm.raw")
    assert (status["mode"], status["state"], status["virtual_size"]) == ("cow", "passive", 1 << 20)
    assert status["clusters_total"] == 16
    assert status["clusters_data"] + status["clusters_zero"] + status["clusters_backing"] == 16
    assert status["backing"].endswith("base.raw")
    assert "density" not in status


def test_a_mount_lists_its_disks_and_what_it_left_out_with_the_reason(mnt: Path) -> None:
    served, refused_ = qedfs_json("status", mnt)
    assert served["path"] == str(mnt / "vm.raw")
    assert refused_["path"].endswith("images/bad.qed")
    assert refused_["state"] == "refused"
    assert refused_["last_error"]
    lines = qedfs("status", mnt)[0].splitlines()
    assert lines[0].split() == ["IMAGE", "MODE", "STATE", "PROGRESS", "LOCAL", "SIZE", "BACKING"]
    assert lines[1].split()[1:3] == ["cow", "passive"]
    assert "refused" in lines[2]
    assert len(lines) == 4


def test_no_name_makes_a_line_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    qedfs("create", "-s", "1M", tmp_path / "images" / "a\nb.qed")
    (tmp_path / "images" / "c\nd.qed").write_bytes(b"QED\0" + bytes(1000))
    with mounted(tmp_path / "images", tmp_path / "mnt") as mnt:
        lines = qedfs("status", mnt)[0].splitlines()
    assert len(lines) == 4
    assert r"mnt/a\nb.raw" in lines[1]
    assert r"images/c\nd.qed" in lines[2]
    assert r"images/c\nd.qed" in lines[3]


def test_several_paths_are_told_one_after_the_other(mnt: Path) -> None:
    assert len(qedfs_json("status", mnt / "vm.raw", mnt)) == 3


def test_what_is_not_on_a_mount_is_refused(mnt: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is not on a qedfs mount" in refused("status", tmp_path / "file")
    assert "is not on a qedfs mount" in refused("status", tmp_path)
    assert "No such file" in refused("status", mnt / "missing.raw")
    refused("status")
