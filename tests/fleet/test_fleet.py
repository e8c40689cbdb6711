"""Small fleets behind the cache of `contrib/fleet/cache.conf`, with real mounts: `python -m contrib.fleet` has large ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from contrib.fleet.servers import sent
from contrib.fleet.story import (
    Fleet,
    Plan,
    fleet,
    replace_the_base,
    stop_the_origin,
)
from contrib.fleet.trace import MIB

KIB = 1 << 10
PLAN = Plan(size=16 * MIB, files=30, slice=256 * KIB, rate=0, round_trip=0.002, thinking=0)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Fleet]:
    with fleet(tmp_path, PLAN) as made:
        yield made


def test_the_origin_sends_each_slice_once_however_many_hosts_boot_at_a_time(small: Fleet) -> None:
    with small.cached() as name:
        wave = small.wave(3, name)
        # The first bytes are asked for at each opening (create, mount), but for those within a second.
        openings = 6
        assert small.touched(PLAN.slice) <= wave.origin.bytes <= PLAN.size + openings
        slices = [line[2] for line in small.origin.log() if line[2] != '"bytes=0-0"']
        assert len(slices) == len(set(slices))
        assert small.wave(1, name, "readahead=0").origin.bytes <= openings
    assert all(boot.fetched >= small.touched(64 * KIB) for boot in wave.boots)


def test_a_base_that_is_replaced_behind_the_cache_is_refused_and_never_mixed(small: Fleet) -> None:
    replaced = replace_the_base(small)
    assert "is not what the image was made on" in replaced.running
    assert replaced.seconds < 10
    assert "is not what the image was made on" in replaced.mounted
    assert replaced.fresh.fetched >= small.touched(64 * KIB)


def test_machines_start_from_the_cache_while_the_origin_is_away(small: Fleet) -> None:
    before = sent(small.origin)
    assert stop_the_origin(small).origin.bytes == 0
    assert sent(small.origin).bytes > before.bytes
