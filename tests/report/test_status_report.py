from __future__ import annotations

from qedfs.report.status import RefusedImage, ServedImage, status_text

ATTRIBUTES = {
    "virtual_size": "1073741824",
    "allocated_bytes": "536870912",
    "progress": "50.00",
    "mode": "stream",
    "state": "backing-error",
    "backing": "nbd://host/x",
    "rate": "0",
    "last_error": "12:00 nbd://host/x: gone",
    "density": "1,2",
    "hold": "0",
}


def test_each_image_has_a_line_and_its_error_one_below() -> None:
    text = status_text([ServedImage("mnt/vm.raw", ATTRIBUTES), RefusedImage("/images/bad.qed", "not a QED image")])
    lines = text.splitlines()
    assert lines[1].split() == "mnt/vm.raw stream backing-error 50.00 % 512 MiB 1 GiB nbd://host/x".split()
    assert lines[2] == "    12:00 nbd://host/x: gone"
    assert lines[3].split()[:3] == ["/images/bad.qed", "-", "refused"]
    assert lines[4] == "    not a QED image"


def test_json_has_numbers_where_there_are_numbers() -> None:
    found = ServedImage("mnt/vm.raw", ATTRIBUTES).to_json()
    assert found["virtual_size"] == 1 << 30
    assert found["progress"] == 50.0
    assert found["rate"] == 0
    assert found["hold"] == "0"
    assert "density" not in found


def test_counts_that_are_not_known_yet_are_told_so() -> None:
    text = status_text([ServedImage("mnt/vm.raw", {"virtual_size": "512", "mode": "cor", "state": "passive"})])
    assert text.splitlines()[1].split() == ["mnt/vm.raw", "cor", "passive", "-", "-", "512", "B", "-"]


def test_no_image_is_no_line() -> None:
    assert len(status_text([]).splitlines()) == 1
