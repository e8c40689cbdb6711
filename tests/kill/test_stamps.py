"""The judge of the kill rounds, judged: what it lets pass and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from contrib.kill.stamps import SECTOR, ZERO_RUN, Ledger, Violation, content

SALT = 5
STRICT = np.zeros(4, np.bool_)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Four sectors: version 1 acknowledged, 3 issued."""
    ledger = Ledger(tmp_path / "ledger", 4, SALT)
    ledger.issue(0, 4)
    ledger.acknowledge(0, 4)
    ledger.issue(0, 4)
    ledger.issue(0, 4)
    return ledger


def judged(ledger: Ledger, data: bytes, *, strict: bool = True) -> list[int]:
    return [int(v) for v in ledger.judge(0, data, ledger.acknowledged, mixed=STRICT if strict else None)]


def test_every_version_from_acknowledged_to_issued_may_be_there(ledger: Ledger) -> None:
    assert judged(ledger, content(SALT, range(4), [1, 2, 3, 1])) == [1, 2, 3, 1]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (content(SALT, range(4), [1, 1, 0, 1]), "lost what was acknowledged"),
        (content(SALT, range(4), [1, 1, 4, 1]), "from the future"),
        (content(SALT, [0, 1, 3, 2], 1), "foreign"),
        (content(SALT + 1, range(4), 1), "foreign"),
        (bytes(4 * SECTOR), "foreign"),
        (content(SALT, range(3), 1) + content(SALT, 3, 1)[:-8] + content(SALT, 3, 2)[:8], "mixture"),
    ],
    ids=["old", "future", "other sector", "other disk", "zeros", "mixed"],
)
def test_anything_else_is_refused(ledger: Ledger, data: bytes, complaint: str) -> None:
    with pytest.raises(Violation, match=complaint):
        judged(ledger, data)


def test_a_mapped_sector_may_be_a_mixture_of_what_was_stored(ledger: Ledger) -> None:
    data = content(SALT, range(3), 1) + content(SALT, 3, 1)[:-8] + content(SALT, 3, 2)[:8]
    assert judged(ledger, data, strict=False) == [1, 1, 1, 2]


def test_part_of_the_backing_is_zeros() -> None:
    assert not any(content(SALT, range(3 * ZERO_RUN, 4 * ZERO_RUN), 0))
    assert any(content(SALT, 3 * ZERO_RUN - 1, 0))
    assert any(content(SALT, 3 * ZERO_RUN, 1))


def test_what_was_found_after_a_crash_is_the_state_from_then_on(ledger: Ledger) -> None:
    ledger.settle(0, np.array([1, 2, 3, 1], np.uint64))
    with pytest.raises(Violation, match="lost"):
        judged(ledger, content(SALT, range(4), [1, 1, 3, 1]))
    with pytest.raises(Violation, match="future"):
        judged(ledger, content(SALT, range(4), [2, 2, 3, 1]))
