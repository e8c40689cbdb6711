from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli.commands import qedfs, qedfs_json, refused
from tests.image.qemu import qemu_check, qemu_io


@pytest.fixture(autouse=True)
def leaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A leaf on `base.raw`, of which `copy.raw` is a copy, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("base.raw", "copy.raw"):
        Path(name).write_bytes(b"\5" * (1 << 20))
    qedfs("create", "-b", "base.raw", "--mode", "cow", "leaf.qed")
    return tmp_path / "leaf.qed"


def test_only_the_reference_changes_and_the_new_identity_is_recorded(leaf: Path) -> None:
    qemu_io(leaf, "write -P 1 0 64k")
    assert qedfs("rebase", "-b", "copy.raw", leaf) == ("", "")
    info = qedfs_json("info", leaf)
    assert info["backing-filename"] == "copy.raw"
    assert info["backing-pin"]["tag"] == f"mtime:{os.stat('copy.raw').st_mtime_ns}"
    assert info["mode"] == "cow"
    os.unlink("base.raw")
    qemu_io(leaf, "read -P 1 0 64k", "read -P 5 64k 960k")
    assert qemu_check(leaf).status == 0


def test_another_size_is_refused_unless_forced(leaf: Path) -> None:
    Path("copy.raw").write_bytes(b"\5" * 4096)
    before = leaf.read_bytes()
    assert "--force" in refused("rebase", "-b", "copy.raw", leaf)
    assert leaf.read_bytes() == before
    qedfs("rebase", "--force", "-b", "copy.raw", leaf)
    assert qedfs_json("info", leaf)["backing-pin"]["size"] == 4096


def test_a_backing_that_does_not_answer_needs_force_and_a_format(leaf: Path) -> None:
    url = "nbd+unix:///x?socket=/no/such.sock"
    before = leaf.read_bytes()
    refused("rebase", "-b", url, leaf)
    refused("rebase", "-b", url, "--force", leaf)
    assert leaf.read_bytes() == before
    out, err = qedfs("rebase", "-b", url, "--force", "-F", "raw", leaf)
    assert not out
    assert "could not be recorded" in err
    info = qedfs_json("info", leaf)
    assert (info["backing-filename"], info["backing-filename-format"]) == (url, "raw")
    assert "backing-pin" not in info


def test_a_leaf_is_no_backing_of_itself(leaf: Path) -> None:
    before = leaf.read_bytes()
    refused("rebase", "-b", "leaf.qed", leaf)
    assert leaf.read_bytes() == before


def test_the_backing_is_dropped_once_the_leaf_is_complete(leaf: Path) -> None:
    assert "still needs its backing" in refused("rebase", "-b", "", leaf)
    qemu_io(leaf, "write -P 2 0 1M")
    assert qedfs("rebase", "-b", "", leaf) == ("", "")
    os.unlink("base.raw")
    qemu_io(leaf, "read -P 2 0 1M")
    assert "backing-filename" not in qedfs_json("info", leaf)


def test_an_image_that_stands_alone_keeps_its_zeros() -> None:
    qedfs("create", "-s", "1M", "alone.qed")
    alone = Path("alone.qed")
    qemu_io(alone, "write -P 1 0 64k")
    before = alone.read_bytes()
    assert "reads as zeros what it does not have (from byte 65536 on)" in refused("rebase", "-b", "base.raw", alone)
    assert alone.read_bytes() == before
    qemu_io(alone, "write -P 2 64k 960k")
    qedfs("rebase", "-b", "base.raw", alone)
    qemu_io(alone, "read -P 1 0 64k", "read -P 2 64k 960k")
    qedfs("create", "-s", "1M", "empty.qed")
    qedfs("rebase", "-b", "base.raw", "--force", "empty.qed")
    qemu_io(Path("empty.qed"), "read -P 5 0 1M")


def test_a_file_that_is_no_leaf_is_refused() -> None:
    assert "not a QED image" in refused("rebase", "-b", "base.raw", "copy.raw")
    assert Path("copy.raw").read_bytes() == b"\5" * (1 << 20)
    refused("rebase", "-b", "base.raw", "missing.qed")
    refused("rebase", "leaf.qed")
