"""`kill -9` of the serving process at random moments: nothing acknowledged is lost, nothing is mixed or foreign.

What a round does and checks is in contrib/kill. `QEDFS_KILL_ROUNDS` says how many rounds (default 50).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from contrib.kill.broken import BROKEN
from contrib.kill.rounds import Plan, plans, run_rounds
from contrib.kill.stamps import Violation

ROUNDS = int(os.environ.get("QEDFS_KILL_ROUNDS", "50"))


@pytest.mark.timeout(240)  # a batch takes some 15 seconds on an idle machine
@pytest.mark.parametrize("plan", [*plans(ROUNDS, seed=1)], ids=lambda plan: f"{plan.cluster_size}-seed{plan.seed}")
def test_nothing_acknowledged_is_lost_by_kill(plan: Plan, tmp_path: Path) -> None:
    report = run_rounds(plan, tmp_path)
    assert report.rounds == plan.rounds
    assert report.acknowledged > 0


@pytest.mark.parametrize("name", BROKEN)
def test_rounds_find_a_broken_step(name: str, tmp_path: Path) -> None:
    broken = Plan(seed=3, rounds=10, serve=(sys.executable, "-m", "contrib.kill.broken", name))
    with pytest.raises(Violation):
        run_rounds(broken, tmp_path)
