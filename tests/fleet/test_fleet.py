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
    kill_the_cache,
    replace_the_base,
    share_on_a_host,
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
    with small.cached() as (_, name):
        wave = small.wave(3, name)
        # The first bytes are asked for at each opening (create, mount), but for those within a second.
        openings = 6
        assert small.touched(PLAN.slice) <= wave.origin.bytes <= PLAN.size + openings
        slices = [line[2] for line in small.origin.log() if line[2] != '"bytes=0-0"']
        assert len(slices) == len(set(slices))
        assert wave.carried >= wave.origin.bytes
        assert small.wave(1, name, "readahead=0").origin.bytes <= openings
    assert all(boot.fetched == boot.local > 0 for boot in wave.boots)


def test_a_base_that_is_replaced_behind_the_cache_is_refused_and_never_mixed(small: Fleet) -> None:
    replaced = replace_the_base(small)
    assert "is not what the image was made on" in replaced.running
    assert replaced.seconds < 10
    assert "is not what the image was made on" in replaced.mounted
    assert replaced.fresh.local > 0


def test_a_cache_that_dies_during_a_boot_is_waited_for_and_keeps_what_it_had(small: Fleet) -> None:
    wave = kill_the_cache(small, 0.3)
    assert wave.boots[0].longest >= 0.3
    # What was on its way into the cache is fetched once more.
    assert wave.origin.bytes <= small.touched(PLAN.slice) + 8 * PLAN.slice


def test_machines_start_from_the_cache_while_the_origin_is_away(small: Fleet) -> None:
    before = sent(small.origin)
    assert stop_the_origin(small).origin.bytes == 0
    assert sent(small.origin).bytes > before.bytes


def test_the_second_leaf_of_a_host_with_a_shared_cache_fetches_nothing(small: Fleet) -> None:
    first, second = share_on_a_host(small)
    assert (first.fetched, second.fetched) == (first.local, 0)
    assert second.local == first.local >= small.touched(64 * KIB)
