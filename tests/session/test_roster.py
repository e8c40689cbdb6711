"""The leaves of a mount live and end apart from each other."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from qedfs.config import Mode, MountOptions
from qedfs.disk.misses import Misses
from qedfs.errors import InvalidImage, LeafError, UsageError
from qedfs.session import roster as roster_module
from qedfs.session.admission import Terms
from qedfs.session.roster import STATUS_LIMIT, Roster
from qedfs.session.streams import open_streams
from qedfs.tree.tree import ROOT
from tests.tree.tree_fakes import FakeStatistics

TERMS = Terms(MountOptions(), "/nowhere", 0)


class FakeDisk:
    """Stands for an open disk; `end` makes its tasks fail."""

    read_only = False
    host = None
    mode = Mode.COR
    populate = None
    held = False

    def __init__(self) -> None:
        self.broken = trio.Event()
        self.misses = Misses(trio.current_time)

    def statistics(self) -> FakeStatistics:
        return FakeStatistics(0)

    def copied(self) -> int:
        return 0

    async def backing_identity(self) -> None:
        return None


class Leaves:
    """Admits what is asked for, or fails as told; `close_errors` are raised when a leaf closes."""

    def __init__(self) -> None:
        self.disks: dict[str, FakeDisk] = {}
        self.closed: list[str] = []
        self.refusals: dict[str, Exception] = {}
        self.close_errors: dict[str, Exception] = {}

    @asynccontextmanager
    async def admitted(self, path: str, terms: Terms) -> AsyncIterator[Any]:
        await trio.lowlevel.checkpoint()
        if error := self.refusals.get(path):
            raise error
        disk = self.disks[path] = FakeDisk()

        async def fail() -> None:
            await disk.broken.wait()
            raise AssertionError("a defect")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            yield disk, os.stat(path)
            nursery.cancel_scope.cancel()
        self.closed.append(path)
        if error := self.close_errors.get(path):
            raise error


@pytest.fixture
def leaves(monkeypatch: pytest.MonkeyPatch) -> Leaves:
    leaves = Leaves()
    monkeypatch.setattr(roster_module, "admitted", leaves.admitted)
    return leaves


@pytest.fixture
def paths(tmp_path: Path) -> tuple[str, str]:
    for name in ("a.qed", "b.qed"):
        (tmp_path / name).touch()
    return str(tmp_path / "a.qed"), str(tmp_path / "b.qed")


def names(roster: Roster) -> list[str]:
    return [leaf.name for leaf in roster.tree.leaves]


async def test_admitted_leaf_is_shown_and_closed_when_released(leaves: Leaves, paths: tuple[str, str]) -> None:
    async with open_streams(TERMS.options) as streams, trio.open_nursery() as nursery:
        roster = Roster(TERMS, streams, nursery)
        await roster.admit(paths[0])
        await roster.admit(paths[1])
        assert names(roster) == ["a.raw", "b.raw"]
        roster.release_all()
    assert sorted(leaves.closed) == list(paths)
    assert (names(roster), roster.served, roster.failed) == ([], {}, False)


async def test_refusal_reaches_the_caller_plain_and_leaves_the_name_free(
    leaves: Leaves, paths: tuple[str, str]
) -> None:
    leaves.refusals[paths[0]] = InvalidImage(paths[0], "no")
    async with open_streams(TERMS.options) as streams, trio.open_nursery() as nursery:
        roster = Roster(TERMS, streams, nursery)
        with pytest.raises(InvalidImage):
            await roster.admit(paths[0])
        assert roster.served == {}
        del leaves.refusals[paths[0]]
        await roster.admit(paths[0])
        roster.release_all()


async def test_two_admissions_at_once_never_share_a_name(leaves: Leaves, tmp_path: Path) -> None:
    (tmp_path / "vm").touch()
    (tmp_path / "vm.qed").touch()
    refused: list[UsageError] = []
    async with open_streams(TERMS.options) as streams, trio.open_nursery() as nursery:
        roster = Roster(TERMS, streams, nursery)

        async def admit(path: str) -> None:
            try:
                await roster.admit(path)
            except UsageError as error:
                refused.append(error)

        async with trio.open_nursery() as both:
            both.start_soon(admit, str(tmp_path / "vm"))
            both.start_soon(admit, str(tmp_path / "vm.qed"))
        assert (len(refused), len(leaves.disks)) == (1, 1)
        roster.release_all()


async def test_leaf_that_is_lost_does_not_take_the_others_along(
    leaves: Leaves, paths: tuple[str, str], expected_warnings: Callable[[str], None]
) -> None:
    expected_warnings("a.qed: lost by an internal error")
    async with open_streams(TERMS.options) as streams, trio.open_nursery() as nursery:
        roster = Roster(TERMS, streams, nursery)
        await roster.admit(paths[0])
        await roster.admit(paths[1])
        leaves.disks[paths[0]].broken.set()
        await trio.testing.wait_all_tasks_blocked()
        assert names(roster) == ["b.raw"]
        assert roster.failed
        roster.release_all()
    assert leaves.closed == [paths[1]]


async def test_leaf_that_cannot_be_closed_is_a_failure_of_the_mount(
    leaves: Leaves, paths: tuple[str, str], expected_warnings: Callable[[str], None]
) -> None:
    expected_warnings("a.qed: cannot be flushed")
    leaves.close_errors[paths[0]] = LeafError(paths[0], "cannot be flushed")
    async with open_streams(TERMS.options) as streams, trio.open_nursery() as nursery:
        roster = Roster(TERMS, streams, nursery)
        await roster.admit(paths[0])
        roster.release_all()
    assert roster.failed


async def test_removed_leaf_is_closed_after_its_last_handle(leaves: Leaves, paths: tuple[str, str]) -> None:
    async with open_streams(TERMS.options) as streams, trio.open_nursery() as nursery:
        roster = Roster(TERMS, streams, nursery)
        await roster.admit(paths[0])
        handle = roster.tree.open(ROOT + 1, os.O_RDONLY).handle
        roster.forget(paths[0])
        await trio.testing.wait_all_tasks_blocked()
        assert (names(roster), roster.served, leaves.closed) == ([], {}, [])
        roster.tree.close(handle)
    assert leaves.closed == [paths[0]]


async def test_status_fits_into_an_attribute_and_says_what_it_leaves_off(
    leaves: Leaves, expected_warnings: Callable[[str], None]
) -> None:
    expected_warnings("no$")
    async with open_streams(TERMS.options) as streams, trio.open_nursery() as nursery:
        roster = Roster(TERMS, streams, nursery)
        for n in range(2000):
            roster.refuse(f"/images/{n:04}.qed", f"/images/{n:04}.qed: no")
        text = roster.status()
        assert len(text) <= STATUS_LIMIT
        status = json.loads(text)
        assert len(status["refused"]) + status["left_off"] == 2000
        assert len(status["refused"]) > 500


async def test_refusal_is_logged_only_when_it_is_news(
    leaves: Leaves, caplog: pytest.LogCaptureFixture, expected_warnings: Callable[[str], None]
) -> None:
    expected_warnings("a: no")
    async with open_streams(TERMS.options) as streams, trio.open_nursery() as nursery:
        roster = Roster(TERMS, streams, nursery)
        for reason in ("a: no", "a: no", "a: never"):
            roster.refuse("/a", reason)
    expected_warnings("a: never")
    assert [record.getMessage() for record in caplog.records] == ["a: no", "a: never"]


@pytest.mark.parametrize("attempt", range(8))  # trio runs what is ready in any order
async def test_the_end_of_a_refused_admission_does_not_take_the_name_of_the_next_one(
    leaves: Leaves,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    attempt: int,
) -> None:
    """Between the end of a leaf's task and the return to whoever asked for it another leaf may take the name."""

    async def at_once(function: Any, *args: Any) -> Any:
        return function(*args)

    (tmp_path / "vm").touch()
    (tmp_path / "vm.qed").touch()
    leaves.refusals[str(tmp_path / "vm")] = InvalidImage("vm", "no")
    async with open_streams(TERMS.options) as streams, trio.open_nursery() as nursery:
        roster = Roster(TERMS, streams, nursery)
        monkeypatch.setattr(trio.to_thread, "run_sync", at_once)

        async def refused() -> None:
            with pytest.raises(InvalidImage):
                await roster.admit(str(tmp_path / "vm"))

        async def next_one() -> None:
            while "vm.raw" in roster._served:
                await trio.lowlevel.checkpoint()
            await roster.admit(str(tmp_path / "vm.qed"))

        async with trio.open_nursery() as both:
            both.start_soon(refused)
            while "vm.raw" not in roster._served:
                await trio.lowlevel.checkpoint()
            both.start_soon(next_one)
        assert [leaf.path for leaf in roster.tree.leaves] == [str(tmp_path / "vm.qed")]
        served = dict(roster.served)
        roster.release_all()
        with trio.move_on_after(1):
            await trio.testing.wait_all_tasks_blocked()
        closed = list(leaves.closed)
        nursery.cancel_scope.cancel()
    assert list(served) == [str(tmp_path / "vm.qed")]
    assert closed == [str(tmp_path / "vm.qed")], "else the mount never ends"


async def test_a_leaf_that_is_removed_while_it_is_lost_loses_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_warnings: Callable[[str], None]
) -> None:
    """Its disk may take long to close, and its file may go meanwhile."""
    expected_warnings("a.qed: lost by an internal error")
    path = str(tmp_path / "a.qed")
    (tmp_path / "a.qed").touch()
    leaves, closing = Leaves(), trio.Event()

    @asynccontextmanager
    async def admitted(path: str, terms: Terms) -> AsyncIterator[Any]:
        try:
            async with leaves.admitted(path, terms) as opened:
                yield opened
        finally:
            with trio.CancelScope(shield=True):
                await closing.wait()

    monkeypatch.setattr(roster_module, "admitted", admitted)
    async with open_streams(TERMS.options) as streams, trio.open_nursery() as nursery:
        roster = Roster(TERMS, streams, nursery)
        await roster.admit(path)
        leaves.disks[path].broken.set()
        await trio.testing.wait_all_tasks_blocked()
        roster.forget(path)
        closing.set()
        await trio.testing.wait_all_tasks_blocked()
        assert [leaf.name for leaf in roster.tree.leaves] == []
