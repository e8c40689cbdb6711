"""A real machine is migrated under load, between two QEMUs: `contrib.migration.story` judges that no record is lost or stale.

`python -m contrib.migration --seeds 10 --faults` runs more of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from contrib.boot.guest import Guest, default_folder, made
from contrib.migration import records
from contrib.migration.faults import BEFORE, Fault
from contrib.migration.story import lose_the_disk, tell_story
from qedfs.migrate.plan import Phase


@pytest.fixture(scope="module")
def guest() -> Guest:
    return made(default_folder())


def fault(name: str, phase: Phase) -> Fault:
    (found,) = (fault for fault in BEFORE if (fault.name, fault.phase) == (name, phase))
    return found


# Below the limit at which a stuck run as a whole is ended; usually it takes half a minute.
@pytest.mark.timeout(280)
def test_machine_stays_through_failures_and_is_moved_without_losing_a_record(guest: Guest, tmp_path: Path) -> None:
    stays = [fault("interrupted", Phase.RELEASE), fault("destination is killed", Phase.SWITCH)]
    *stayed, moved = tell_story(guest, tmp_path, 1, stays, None)
    assert len(stayed) == len(stays)
    assert (moved.outcome, moved.lost) == ("moved", 0)
    assert moved.records > 300
    assert moved.downtime is not None
    assert moved.downtime < 30


@pytest.mark.timeout(280)
def test_machine_from_a_mount_that_loses_its_disk_after_the_switch_over_has_all_it_wrote_in_the_leaf(
    guest: Guest, tmp_path: Path
) -> None:
    assert lose_the_disk(guest, tmp_path, 2, on_qedfs=True).records > 100


def test_a_stale_record_is_found(tmp_path: Path) -> None:
    disk, seed, slots, count = tmp_path / "disk", 5, 64, 200
    records.make_disk(disk, seed, slots)
    last = records.newest(seed, slots, count)
    disk.write_bytes(records.contents(seed, 0, last).astype("<u8").tobytes())
    assert records.judge(disk, seed, slots, count, in_doubt=False) == []
    slot = int(last.argmax())
    assert last[slot] == count
    old = records.contents(seed, slot, np.array([last[slot] - np.uint64(1)], np.uint64))
    with disk.open("r+b") as file:
        file.seek(slot * records.SLOT)
        file.write(old.astype("<u8").tobytes()[: records.SLOT // 2])
    assert records.judge(disk, seed, slots, count, in_doubt=False) == [
        f"slot {slot} has record {count - 1} of slot {slot}, not {count}"
    ]
    # Were the guest killed before that record was acknowledged, the old one would do, but not half of it.
    assert len(records.judge(disk, seed, slots, count - 1, in_doubt=True)) == 1
