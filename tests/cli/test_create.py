from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest

from tests.cli.commands import qedfs, qedfs_json, refused
from tests.image.qemu import qemu_check, qemu_img, qemu_io


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A raw base in the current folder."""
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base.raw"
    base.write_bytes(b"\5" * 1000000)
    return base


def test_a_leaf_has_the_size_of_its_backing_and_names_it_as_typed(base: Path) -> None:
    (base.parent / "sub").mkdir()
    out, err = qedfs("create", "-b", "../base.raw", "sub/leaf.qed")
    assert out == "sub/leaf.qed: 977 KiB (1000448 bytes) on ../base.raw (raw)\n"
    assert not err
    info = json.loads(qemu_img("info", "--output=json", "sub/leaf.qed"))
    assert info["backing-filename"] == "../base.raw"
    assert info["backing-filename-format"] == "raw"
    assert info["virtual-size"] == 1000448
    qemu_io(Path("sub/leaf.qed"), "read -P 5 0 1000000", "read -P 0 1000000 448")


def test_the_identity_of_the_backing_is_recorded(base: Path) -> None:
    qedfs("create", "-b", "base.raw", "leaf.qed")
    pin = qedfs_json("info", "leaf.qed")["backing-pin"]
    assert pin == {"format": "raw", "size": 1000000, "tag": f"mtime:{base.stat().st_mtime_ns}"}


def test_options_are_those_of_the_image() -> None:
    line = ("--mode", "stream", "--hold", "--cluster-size", "1M", "--table-size", "2", "-s", "5000k")
    qedfs("create", "-b", "base.raw", *line, "leaf.qed")
    info = qedfs_json("info", "leaf.qed")
    assert (info["mode"], info["hold"], info["cluster-size"], info["table-size"]) == ("stream", True, 1 << 20, 2)
    assert info["virtual-size"] == 5000 << 10
    assert "backing-pin" not in info
    assert qemu_check(Path("leaf.qed")).status == 0


@pytest.mark.parametrize(("size", "stored"), [("1000", 1024), ("0", 0), ("1T", 1 << 40), ("1.5k", 1536)])
def test_a_size_is_rounded_up_to_whole_sectors(size: str, stored: int) -> None:
    qedfs("create", "-s", size, "leaf.qed")
    assert json.loads(qemu_img("info", "--output=json", "leaf.qed"))["virtual-size"] == stored


def test_a_backing_with_the_magic_of_qed_is_qed_unless_told_otherwise() -> None:
    qedfs("create", "-b", "base.raw", "middle.qed")
    assert qedfs("create", "-b", "middle.qed", "leaf.qed")[0].endswith("on middle.qed (qed)\n")
    assert "backing-filename-format" not in json.loads(qemu_img("info", "--output=json", "leaf.qed"))
    qemu_io(Path("leaf.qed"), "read -P 5 0 1000000")
    out = qedfs("create", "-b", "middle.qed", "-F", "raw", "as-raw.qed")[0]
    assert out.endswith("on middle.qed (raw)\n")


def test_table_size_1_warns_that_qemu_cannot_open_it() -> None:
    out, err = qedfs("create", "-s", "1M", "--table-size", "1", "leaf.qed")
    assert out
    assert err == "qedfs: warning: QEMU cannot open an image with a table size of 1\n"
    assert qedfs_json("info", "leaf.qed")["table-size"] == 1


REFUSALS = [
    (["leaf.qed"], "needs a size (-s) or a backing (-b)"),
    (["-s", "x", "leaf.qed"], "not a number of bytes"),
    (["-s", "-5", "leaf.qed"], "not a number of bytes"),
    (["-s", "65T", "leaf.qed"], "more than the"),
    (["-s", "1M", "--cluster-size", "5000", "leaf.qed"], "cluster size 5000"),
    (["-s", "1M", "--table-size", "3", "leaf.qed"], "table size 3"),
    (["-s", "1M", "--mode", "fast", "leaf.qed"], "'fast' is not one of"),
    (["-s", "1M", "-F", "raw", "leaf.qed"], "needs a backing"),
    (["-s", "1M", "no/leaf.qed"], "cannot be created"),
    (["-b", "missing.raw", "leaf.qed"], "No such file"),
    (["-b", ".", "leaf.qed"], "neither"),
    (["-b", "fifo", "leaf.qed"], "neither"),
    (["-b", "base.raw", "-F", "vmdk", "leaf.qed"], "of VMDK only"),
    (["-b", "base.raw", "-F", "qed", "leaf.qed"], "not a QED image"),
    (
        ["-b", "http://127.0.0.1:1/x?secret", "leaf.qed"],
        "http://127.0.0.1:1/x?***: cannot connect to the server (Connection refused)",
    ),
    (["-b", "http://user:secret@127.0.0.1:1/x", "leaf.qed"], "a name holds no user"),
    (["-b", "nbd://user:secret@127.0.0.1:1/x", "leaf.qed"], ""),
    (["-b", "nbd+unix:///?socket=/no/such", "leaf.qed"], ""),
    (["-b", "", "leaf.qed"], ""),
]


@pytest.mark.parametrize(("arguments", "why"), REFUSALS, ids=[" ".join(a) for a, _ in REFUSALS])
def test_a_refusal_is_one_line_and_leaves_nothing_behind(tmp_path: Path, arguments: list[str], why: str) -> None:
    os.mkfifo("fifo")
    before = sorted(os.listdir())
    start = time.monotonic()
    line = refused("create", *arguments)
    assert time.monotonic() - start < 30
    assert why in line
    assert "secret" not in line
    assert sorted(os.listdir()) == before


def test_a_server_that_never_answers_is_given_up_on(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind("silent.sock")
        silent.listen()
        start = time.monotonic()
        assert "does not answer" in refused("create", "-b", "nbd:unix:silent.sock", "leaf.qed")
        assert time.monotonic() - start < 30
    assert not Path("leaf.qed").exists()


def test_nothing_is_overwritten_without_force_and_never_what_is_in_use(base: Path) -> None:
    qedfs("create", "-b", "base.raw", "leaf.qed")
    before = Path("leaf.qed").read_bytes()
    assert "exists already" in refused("create", "-s", "1M", "leaf.qed")
    assert "exists already" in refused("create", "-b", "base.raw", "base.raw")
    refused("create", "--force", "-b", "leaf.qed", "leaf.qed")
    refused("create", "--force", "-b", "base.raw", "base.raw")
    refused("create", "--force", "-b", "leaf.qed", "base.raw")
    assert Path("leaf.qed").read_bytes() == before
    assert base.read_bytes() == b"\5" * 1000000
    qedfs("create", "--force", "-s", "1M", "leaf.qed")
    assert qedfs_json("info", "leaf.qed")["virtual-size"] == 1 << 20


def test_control_characters_never_reach_the_terminal() -> None:
    line = refused("create", "-b", "a\x1b[2J\nb", "leaf.qed")
    assert "\\x1b" in line
