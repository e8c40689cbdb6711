from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

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


def pixels(path: Path) -> list[list[tuple[int, int, int]]]:
    """Decode the PNG with another program than ours."""
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        picture.load()
        width, height = picture.size
        data = picture.tobytes()
    flat = [(data[i], data[i + 1], data[i + 2]) for i in range(0, len(data), 3)]
    return [flat[row * width : (row + 1) * width] for row in range(height)]


def test_png_shows_each_state_where_it_is(tmp_path: Path) -> None:
    qedfs("create", "-s", "2G", "two.qed")  # a cluster for each square
    qemu_io(Path("two.qed"), "write 64k 64k", "write -z 16M 64k", "write 2097088k 64k")
    assert qedfs("map", "--png", "map.png", "two.qed") == ("", "")
    rows = pixels(tmp_path / "map.png")
    assert (len(rows), len(rows[0])) == (512, 1024)
    data, zero, backing = (0, 68, 136), (153, 187, 221), (238, 238, 238)
    assert rows[0][:9] == [backing] * 4 + [data] * 4 + [backing]
    assert rows[-1][-5:] == [backing] + [data] * 4
    squares = [rows[4 * (i // 256)][4 * (i % 256)] for i in range(256 * 128)]
    assert [i for i, square in enumerate(squares) if square == data] == [1, 32767]
    assert [i for i, square in enumerate(squares) if square == zero] == [256]


def test_png_replaces_a_picture_and_nothing_else(leaf: Path, tmp_path: Path) -> None:
    qedfs("map", "--png", "map.png", leaf)
    first = (tmp_path / "map.png").read_bytes()
    qemu_io(leaf, "write 1g 512M")
    qedfs("map", "--png", "map.png", leaf)
    assert (tmp_path / "map.png").read_bytes() != first
    before = leaf.read_bytes()[:4096]
    assert refused("map", "--png", leaf, leaf) == f"qedfs: {leaf}: exists, and is no PNG"
    assert leaf.read_bytes()[:4096] == before
    assert "is no regular file" in refused("map", "--png", ".", leaf)
    assert "exclude each other" in refused("map", "--json", "--png", "other.png", leaf)
    qedfs("create", "-s", "0", "empty.qed")
    qedfs("map", "--png", "empty.png", "empty.qed")
    assert {*pixels(tmp_path / "empty.png")[0]} == {(238, 238, 238)}
