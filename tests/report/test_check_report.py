from __future__ import annotations

import pytest

from qedfs.image.check import CheckResult
from qedfs.report.check import check_json, check_text, exit_status


@pytest.mark.parametrize(
    ("result", "status"),
    [
        (CheckResult(4), 0),
        (CheckResult(4, free_clusters=3, leaks_fixed=2, corruptions_fixed=1), 0),
        (CheckResult(4, leaks=1), 3),
        (CheckResult(4, corruptions=1, leaks=1), 2),
        (CheckResult(4, corruptions=1, leaks=1, check_errors=1), 1),
    ],
)
def test_the_exit_status_tells_the_worst_that_is_left(result: CheckResult, status: int) -> None:
    assert exit_status(result) == status


def test_json_leaves_out_what_is_zero_as_qemu_img_does() -> None:
    assert check_json("x", CheckResult(0)) == {"filename": "x", "format": "qed", "check-errors": 0}


def test_an_empty_disk_has_no_share() -> None:
    assert check_text(CheckResult(0)) == "No errors were found on the image."
