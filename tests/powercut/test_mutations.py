"""The simulation finds what it is for: each ordering taken out is seen; where one may be missing, that is proven."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.powercut import mutations as m
from tests.powercut.exploring import Effort, violation
from tests.powercut.workloads import WORKLOADS

Mutation = Callable[[pytest.MonkeyPatch], None]
EFFORT = Effort(lives=1, cuts=2)

CAUGHT: list[tuple[Mutation, str]] = [
    (m.no_step_2_flush, "allocating writes"),
    (m.entries_before_data, "allocating writes"),
    (m.l1_before_table, "new L2 tables"),
    (m.no_step_5_flush, "allocating writes"),
    (m.new_table_not_written_as_zeros, "reuse of leaked space"),
    (m.marks_not_given_back, "failed commit"),
    (m.evicted_during_commit, "eviction during a commit"),
    (m.waiter_joins_running_commit, "two flushes at once"),
    (m.live_table_written, "eviction during a commit"),
    (m.need_check_not_durable, "killed, then reused"),
    (m.repair_not_flushed, "killed, then repaired"),
    (m.repair_not_flushed, "check --repair"),
    (m.survey_repair_and_mark_not_flushed, "recovery by mounting"),
    (m.growth_not_durable, "growth"),
    (m.header_before_record, "rebase"),
    (m.completed_before_commit, "backing link removal"),
    (m.magic_before_tables, "create over an image"),
]
REDUNDANT: list[tuple[Mutation, str]] = [
    (m.no_step_4_flush, "new L2 tables"),
    (m.no_step_4_flush, "reuse of leaked space"),
    (m.survey_repair_not_flushed, "recovery by mounting"),
    (m.need_check_not_written, "allocating writes"),
    (m.need_check_not_written, "killed, then reused"),
]


@pytest.mark.parametrize(("mutation", "workload"), CAUGHT)
async def test_an_ordering_that_is_missing_is_seen(
    mutation: Mutation, workload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    found = await violation(await WORKLOADS[workload](), EFFORT)
    print(f"{mutation.__name__:36} {workload:26} {found}")
    assert found


@pytest.mark.parametrize(("mutation", "workload"), REDUNDANT)
async def test_an_ordering_that_another_one_covers_may_be_missing(
    mutation: Mutation, workload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    assert not await violation(await WORKLOADS[workload](), EFFORT)
