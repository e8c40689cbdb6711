"""Each workload, and every state that a power cut may leave of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qedfs.image.check import check_image
from tests.image.memory_storage import MemoryStorage
from tests.image.qemu import qemu_check
from tests.powercut.exploring import Effort, explore
from tests.powercut.workloads import LONG_NAME, WORKLOADS


@pytest.mark.parametrize("name", WORKLOADS)
async def test_whatever_a_power_cut_leaves_is_sound_and_can_be_used_further(name: str, tmp_path: Path) -> None:
    tally = await explore(await WORKLOADS[name](), Effort())
    print(f"{name:26} {tally}")
    assert tally.states > tally.windows
    assert tally.samples
    for backing in ("base.raw", "old.raw", LONG_NAME):
        (tmp_path / backing).write_bytes(bytes(512))
    for number, content in enumerate(tally.samples[:2]):
        path = tmp_path / f"{number}.qed"
        path.write_bytes(content)
        ours = await check_image(MemoryStorage(content, writable=False), repair=False)
        theirs = qemu_check(path)
        assert theirs.status in (0, 3), "0: nothing, 3: leaks only"
        # What is a hole of the file is free for us and a leak for QEMU.
        assert theirs.report.get("leaks", 0) == ours.leaks + ours.free_clusters
