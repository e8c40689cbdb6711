"""The judge of a boot notices what it is there for."""

from __future__ import annotations

from pathlib import Path

import pytest

from contrib.boot import judge
from contrib.boot.guest import BootError, Guest, run


@pytest.fixture
def untouched_leaf(guest: Guest, tmp_path: Path) -> Path:
    leaf = tmp_path / "vm.qed"
    run("qemu-img", "create", "-q", "-f", "qed", "-b", guest.disk, "-F", "raw", leaf)
    return leaf


def test_untouched_leaf_has_the_files_of_its_base(guest: Guest, untouched_leaf: Path, tmp_path: Path) -> None:
    judge.check_leaf(untouched_leaf)
    judge.check_files(untouched_leaf, guest.sums(), tmp_path)


def test_every_wrong_file_is_named(guest: Guest, untouched_leaf: Path, tmp_path: Path) -> None:
    expected = guest.sums() | {"/base/part-0": "0" * 64, "/guest/token": "0" * 64}
    del expected["/base/removed"]
    with pytest.raises(BootError) as caught:
        judge.check_files(untouched_leaf, expected, tmp_path)
    assert str(caught.value) == (
        "the disk after the run: /base/part-0 has other content, /base/removed should not be there, /guest/token is missing"
    )


def test_damaged_file_system_is_refused(guest: Guest, untouched_leaf: Path, tmp_path: Path) -> None:
    # Zeros over the first block group's descriptors, behind the superblock.
    run("qemu-io", "-f", "qed", "-c", "write -z 2k 1k", untouched_leaf)
    with pytest.raises(BootError, match=r"^e2fsck: "):
        judge.check_files(untouched_leaf, guest.sums(), tmp_path)


def test_leaked_cluster_is_refused(untouched_leaf: Path) -> None:
    with untouched_leaf.open("ab") as leaf:
        leaf.write(bytes(65536))
    with pytest.raises(BootError, match=r"^qemu-img: "):
        judge.check_leaf(untouched_leaf)
