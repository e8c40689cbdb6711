from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands import mounted, qedfs, refused
from tests.image.qemu import entry, poke, qemu_img, qemu_io

CLUSTER = 65536


@pytest.fixture(autouse=True)
def leaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    qedfs("create", "-s", "5G", "leaf.qed")
    qemu_io(Path("leaf.qed"), "write 64k 128k", "write 256k 64k", "write -z 1M 128k", "write 2g 64k")
    return tmp_path / "leaf.qed"


def test_json_is_that_of_qemu_img_for_an_image_without_backing(leaf: Path) -> None:
    theirs = json.loads(qemu_img("map", "--output=json", leaf))
    assert json.loads(qedfs("map", "--json", leaf)[0]) == theirs


def test_text_lists_runs_of_the_whole_disk(leaf: Path) -> None:
    lines = [line.split() for line in qedfs("map", leaf)[0].splitlines()]
    assert [line[2] for line in lines] == [
        "backing",
        "data",
        "backing",
        "data",
        "backing",
        "zero",
        "backing",
        "data",
        "backing",
    ]
    assert lines[1] == ["65536", "131072", "data", str(5 * CLUSTER)]
    assert sum(int(line[1]) for line in lines) == 5 << 30


def test_a_backing_counts_as_data_below(leaf: Path, tmp_path: Path) -> None:
    qedfs("create", "-b", "leaf.qed", "top.qed")
    assert json.loads(qedfs("map", "--json", "top.qed")[0]) == [
        {"start": 0, "length": 5 << 30, "depth": 1, "present": True, "zero": False, "data": True}
    ]


def test_an_empty_disk_has_no_runs() -> None:
    qedfs("create", "-s", "0", "empty.qed")
    assert qedfs("map", "empty.qed")[0] == ""
    assert json.loads(qedfs("map", "--json", "empty.qed")[0]) == []


def test_a_mounted_disk_can_be_mapped(leaf: Path, tmp_path: Path) -> None:
    expected = qedfs("map", leaf)[0]
    with mounted(leaf, tmp_path / "mnt") as mnt:
        assert qedfs("map", mnt / "leaf.raw")[0] == expected


def test_a_corrupt_entry_ends_the_list_with_an_error(leaf: Path) -> None:
    table = entry(leaf, CLUSTER)
    poke(leaf, table + 16 * 8, 7)
    out, err = qedfs("map", leaf, status=1)
    assert out.splitlines()[0].split() == ["0", "65536", "backing"]
    assert "invalid" in err
    assert err.count("\n") == 1


def test_wrong_usage_is_one_line() -> None:
    refused("map")
    refused("map", "missing")
