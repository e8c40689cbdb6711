from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands import mounted, qedfs, qedfs_json, refused
from tests.image.qemu import entry, poke, qemu_check, qemu_io

CLUSTER = 65536


@pytest.fixture
def leaf(tmp_path: Path) -> Path:
    leaf = tmp_path / "leaf.qed"
    qedfs("create", "-s", "10M", leaf)
    qemu_io(leaf, "write 0 256k")
    return leaf


def test_a_consistent_image_exits_with_0_and_the_fields_of_qemu_img(leaf: Path) -> None:
    assert qedfs("check", leaf)[0] == "No errors were found on the image.\n4/160 = 2.50% allocated, 0.00% fragmented\n"
    assert qedfs_json("check", leaf) == qemu_check(leaf).report


def test_leaks_exit_with_3_and_are_reclaimed(leaf: Path) -> None:
    with leaf.open("ab") as file:
        file.write(b"x" * CLUSTER)
    assert "1 leaked clusters" in qedfs("check", leaf, status=3)[0]
    assert qedfs_json("check", leaf, status=3) == qemu_check(leaf).report
    assert "Repaired: 0 corruptions, 1 leaked clusters." in qedfs("check", "--repair", leaf)[0]
    assert qemu_check(leaf).status == 0


def test_corruption_exits_with_2_and_can_be_repaired(leaf: Path) -> None:
    poke(leaf, entry(leaf, CLUSTER), 7)
    assert "1 errors" in qedfs("check", leaf, status=2)[0]
    report = json.loads(qedfs("check", "--repair", "--json", leaf, status=3)[0])
    assert (report["corruptions-fixed"], report["leaks"]) == (1, 1)
    assert "corruptions" not in report
    qedfs("check", "--repair", leaf)
    assert "1 free clusters" in qedfs("check", leaf)[0]


def test_an_image_in_use_is_not_checked(leaf: Path, tmp_path: Path) -> None:
    with mounted(leaf, tmp_path / "mnt"):
        assert "open for writing" in refused("check", leaf)
        refused("check", "--repair", leaf)
    qedfs("check", leaf)


def test_what_cannot_be_checked_exits_with_1(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(1000))
    refused("check", tmp_path / "raw")
    refused("check", tmp_path / "missing")
    refused("check", "--repair", tmp_path)
