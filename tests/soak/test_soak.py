"""The long haul, for long enough that each way to end a mount is taken once. The rest is in contrib/soak."""

from __future__ import annotations

from pathlib import Path

import pytest

from contrib.soak.soak import ENDS, Report, soak


@pytest.mark.timeout(240)  # some 35 seconds on an idle machine
def test_all_at_once_loses_nothing_and_leaks_nothing(tmp_path: Path) -> None:
    report = Report()
    soak(24, 1, tmp_path, report, least=len(ENDS))
    assert all(report.ends.values())
    assert report.acknowledged > 0
    assert report.outages == report.rounds
