"""Which files of a directory are leaves, and what they are called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from qedfs.session.sources import Choice, Entry, FileId, Stamp, choose, raw_name, scan


def _image(name: str, inode: int, backing: int | None = None) -> Entry:
    return Entry(f"/d/{name}", FileId(1, inode), Stamp(0, 0, 0), True, FileId(1, backing) if backing else None)


def _names(entries: list[Entry]) -> list[str]:
    return [os.path.basename(entry.path) for entry in entries]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/d/vm1.qed", "vm1.raw"),
        ("/d/vm1", "vm1.raw"),
        ("/d/vm1.img", "vm1.img.raw"),
        ("/d/vm1.raw", "vm1.raw.raw"),
        ("/d/a.b.qed", "a.b.raw"),
        ("/d/.qed", ".qed.raw"),
    ],
)
def test_name_in_the_mount(path: str, name: str) -> None:
    assert raw_name(path) == name


def test_images_without_ties_are_all_leaves_in_order_of_their_names() -> None:
    assert _names(choose([_image("b", 2), _image("a", 1)], [], []).leaves) == ["a", "b"]


def test_an_image_with_two_names_is_one_leaf_and_the_other_name_is_told() -> None:
    images = [_image("b", 1), _image("a", 1), _image("c", 1)]
    choice = choose(images, [], [])
    assert _names(choice.leaves) == ["a"]
    assert [(entry.path, reason) for entry, reason in choice.refused] == [
        ("/d/b", "is the same image as /d/a"),
        ("/d/c", "is the same image as /d/a"),
    ]
    choice = choose(images, [FileId(1, 1)], [], names=["/d/b"])
    assert (_names(choice.leaves), _names([entry for entry, _ in choice.refused])) == (["b"], ["a", "c"])
    backing = [_image("a", 1), _image("b", 1), _image("leaf", 2, backing=1)]
    assert choose(backing, [], []) == Choice([backing[2]], [])


def test_other_files_are_ignored() -> None:
    other = Entry("/d/readme", FileId(1, 9), Stamp(0, 0, 0), is_qed=False)
    assert choose([other], [], []).leaves == []


def test_image_used_as_backing_is_no_leaf() -> None:
    chain = [_image("base", 1), _image("middle", 2, backing=1), _image("leaf", 3, backing=2)]
    assert _names(choose(chain, [], []).leaves) == ["leaf"]


def test_backing_of_a_refused_image_is_a_leaf() -> None:
    images = [_image("base", 1), _image("broken", 2, backing=1)]
    assert _names(choose(images, [], [FileId(1, 2)]).leaves) == ["base", "broken"]


def test_served_leaf_stays_and_the_newcomer_that_names_it_is_refused() -> None:
    images = [_image("old", 1), _image("new", 2, backing=1)]
    choice = choose(images, [FileId(1, 1)], [])
    assert _names(choice.leaves) == ["old"]
    assert [(entry.path, reason) for entry, reason in choice.refused] == [
        ("/d/new", "its backing is a leaf of this mount")
    ]


def test_served_leaf_over_a_served_leaf_stays() -> None:
    images = [_image("a", 1), _image("b", 2, backing=1)]
    assert _names(choose(images, [FileId(1, 1), FileId(1, 2)], []).leaves) == ["a", "b"]


def test_circle_does_not_vanish() -> None:
    images = [_image("a", 1, backing=2), _image("b", 2, backing=1), _image("self", 3, backing=3)]
    assert _names(choose(images, [], []).leaves) == ["a", "b", "self"]


def test_circle_below_a_leaf_is_not_followed_for_ever() -> None:
    images = [_image("a", 1, backing=2), _image("b", 2, backing=1), _image("leaf", 3, backing=1)]
    assert _names(choose(images, [], []).leaves) == ["leaf"]


def test_of_two_with_one_name_the_served_one_stays_else_the_first() -> None:
    images = [_image("vm", 1), _image("vm.qed", 2)]
    assert _names(choose(images, [], []).leaves) == ["vm"]
    choice = choose(images, [FileId(1, 2)], [])
    assert _names(choice.leaves) == ["vm.qed"]
    assert [reason for _, reason in choice.refused] == ["would be called vm.raw, as /d/vm.qed is"]
    assert _names(choose(images, [], [FileId(1, 1)]).leaves) == ["vm.qed"]


def _make(path: Path, *backing: str) -> None:
    base = ["-b", backing[0], "-F", "raw"] if backing else []
    subprocess.run(["qemu-img", "create", "-q", "-f", "qed", *base, path, "1M"], check=True, timeout=30)


def _scan(folder: Path, known: dict[str, Entry] | None = None) -> dict[str, Entry]:
    fd = os.open(folder, os.O_RDONLY)
    try:
        return scan(fd, str(folder), str(folder / "mnt"), known or {})
    finally:
        os.close(fd)


def test_scan_tells_images_from_other_files(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(1 << 20))
    _make(tmp_path / "vm.qed", "base.raw")
    (tmp_path / ".vm.qed.part").write_bytes((tmp_path / "vm.qed").read_bytes())
    (tmp_path / "folder.qed").mkdir()
    os.mkfifo(tmp_path / "fifo.qed")
    (tmp_path / "nowhere.qed").symlink_to("nothing")
    (tmp_path / "short.qed").write_bytes(b"QE")
    found = _scan(tmp_path)
    assert {os.path.basename(path): entry.is_qed for path, entry in found.items()} == {
        "base.raw": False,
        "vm.qed": True,
        "short.qed": False,
    }
    base = (tmp_path / "base.raw").stat()
    assert found[str(tmp_path / "vm.qed")].backing == FileId(base.st_dev, base.st_ino)


def test_scan_never_follows_links_into_the_mount(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    _make(tmp_path / "mnt/inside")
    (tmp_path / "link.qed").symlink_to("mnt/inside")
    assert _scan(tmp_path) == {}


def test_scan_reads_only_what_changed(tmp_path: Path) -> None:
    _make(tmp_path / "vm.qed")
    first = _scan(tmp_path)
    again = _scan(tmp_path, first)
    assert again[str(tmp_path / "vm.qed")] is first[str(tmp_path / "vm.qed")]
    os.truncate(tmp_path / "vm.qed", 10)
    assert _scan(tmp_path, first) != first


def test_broken_header_still_is_an_image(tmp_path: Path) -> None:
    (tmp_path / "vm.qed").write_bytes(b"QED\0" + b"\xff" * 100)
    (entry,) = _scan(tmp_path).values()
    assert (entry.is_qed, entry.backing) == (True, None)
