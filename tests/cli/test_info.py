from __future__ import annotations

import json
from pathlib import Path

import pytest

from qedfs.image import record as records
from tests.cli.commands import mounted, qedfs, qedfs_json, refused
from tests.image.qemu import poke, qemu_img, qemu_io


@pytest.fixture(autouse=True)
def leaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A leaf on `middle.qed` on `base.raw`, with a data cluster and two zero clusters."""
    monkeypatch.chdir(tmp_path)
    Path("base.raw").write_bytes(b"\5" * (1 << 20))
    qedfs("create", "-b", "base.raw", "middle.qed")
    qedfs("create", "-b", "middle.qed", "leaf.qed")
    qemu_io(Path("leaf.qed"), "write 64k 64k", "write -z 256k 128k")
    return tmp_path / "leaf.qed"


def test_json_agrees_with_qemu_img_where_both_have_a_field(leaf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = json.loads(qemu_img("info", "-U", "--output=json", leaf))
    ours = qedfs_json("info", leaf)
    for field in (
        "filename",
        "format",
        "virtual-size",
        "actual-size",
        "cluster-size",
        "backing-filename",
        "full-backing-filename",
    ):
        assert ours[field] == theirs[field]
    monkeypatch.chdir("/")
    for name in ("base.raw", str(leaf.parent / "base.raw"), "./x:y"):
        qemu_img("rebase", "-u", "-b", name, "-F", "raw", leaf)
        theirs = json.loads(qemu_img("info", "-U", "--output=json", leaf))
        assert qedfs_json("info", leaf)["full-backing-filename"] == theirs["full-backing-filename"]


def test_no_name_makes_a_line_of_its_own(leaf: Path) -> None:
    name = "evil\n\x1b[31mdirty no"
    Path(name).write_bytes(bytes(1 << 20))
    qedfs("create", "-b", name, "-F", "raw", name + ".qed")
    lines = qedfs("info", name + ".qed")[0].splitlines()
    assert len(lines) == len(qedfs("info", "middle.qed")[0].splitlines())
    assert sum(r"evil\n\x1b[31mdirty no" in line for line in lines) == 3


def test_clusters_and_chain_are_told(leaf: Path) -> None:
    info = qedfs_json("info", "leaf.qed")
    assert info["clusters"] == {"total": 16, "data": 1, "zero": 2, "backing": 13}
    chain = [(level["filename"], level["format"], level["virtual-size"], level["problem"]) for level in info["chain"]]
    assert chain == [("middle.qed", "qed", 1 << 20, None), ("base.raw", "raw", 1 << 20, None)]


def test_nothing_is_missing_of_an_image_that_stands_alone(tmp_path: Path) -> None:
    qedfs("create", "-s", "1M", "alone.qed")
    qemu_io(Path("alone.qed"), "write 64k 64k", "write -z 256k 64k")
    assert qedfs_json("info", "alone.qed")["clusters"] == {"total": 16, "data": 1, "zero": 15, "backing": 0}
    with mounted(tmp_path / "alone.qed", tmp_path / "mnt") as mnt:
        (status,) = qedfs_json("status", mnt)
    assert [status[f"clusters_{kind}"] for kind in ("total", "data", "zero", "backing")] == [16, 1, 15, 0]


def test_a_chain_that_cannot_be_followed_is_told_and_is_no_error(leaf: Path) -> None:
    Path("base.raw").unlink()
    chain = qedfs_json("info", "leaf.qed")["chain"]
    assert chain[-1]["filename"] == "base.raw"
    assert "No such file" in chain[-1]["problem"]
    out, err = qedfs("info", "leaf.qed")
    assert "chain 2: base.raw, raw (cannot be opened" in out
    assert not err


def test_a_chain_without_end_is_cut() -> None:
    qemu_img("rebase", "-u", "-b", "leaf.qed", "-F", "qed", "leaf.qed")
    assert len(qedfs_json("info", "leaf.qed")["chain"]) == 64


def test_remote_backings_are_not_contacted_and_secrets_not_shown() -> None:
    qemu_img("rebase", "-u", "-b", "nbd://192.0.2.1/x", "-F", "raw", "leaf.qed")
    assert qedfs_json("info", "leaf.qed")["chain"][0]["problem"].startswith("not looked at")
    qemu_img("rebase", "-u", "-b", "nbd://user:secret@192.0.2.1/x?key=secret", "-F", "raw", "leaf.qed")
    info = qedfs_json("info", "leaf.qed")
    assert "secret" not in json.dumps(info)
    assert "192.0.2.1" in info["backing-filename"]


def test_dirty_and_damaged_are_told(leaf: Path) -> None:
    poke(leaf, 16, 3)
    poke(leaf, 65536 - 512, records.MAGIC)
    poke(leaf, 65536 - 512 + 16, b"{broken")
    info = qedfs_json("info", leaf)
    assert (info["dirty-flag"], info["record-damaged"]) == (True, True)
    out, _ = qedfs("info", leaf)
    assert "dirty: yes" in out
    assert "record in the header is damaged" in out


def test_a_mounted_disk_and_the_image_behind_it_are_the_same(leaf: Path, tmp_path: Path) -> None:
    with mounted(leaf, tmp_path / "mnt") as mnt:
        info = qedfs_json("info", mnt / "leaf.raw")
        assert info["filename"] == str(leaf)
        assert info["virtual-size"] == 1 << 20
        assert qedfs_json("info", leaf) == info


def test_what_is_no_image_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "not a QED image" in refused("info", "base.raw")
    assert "No such file" in refused("info", "missing")
    assert "neither" in refused("info", tmp_path)
    refused("info")


@pytest.mark.parametrize("length", [0, 3, 4, 63, 64, 4096])
def test_a_truncated_image_is_refused_in_one_line(leaf: Path, length: int) -> None:
    Path("cut.qed").write_bytes(leaf.read_bytes()[:length])
    for name in ("info", "map", "check"):
        refused(name, "cut.qed")
