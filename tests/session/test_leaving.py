"""When a mount that ends by itself may end."""

from __future__ import annotations

from dataclasses import replace

from qedfs.session.leaving import Ages
from qedfs.tree.tree import Usage
from tests.tree.tree_fakes import FakeDisk, leaf_of

GRACE = 20.0


def usage(name: str, *, complete: bool, handles: int = 0, opened: bool = False) -> Usage:
    disk = FakeDisk()
    disk.facts = replace(disk.facts, state="complete" if complete else "passive")
    return Usage(leaf_of(name, disk), handles, opened)


def test_a_mount_of_nothing_does_not_end() -> None:
    assert not Ages().may_end([], 1000.0, 0.0)


def test_it_ends_when_all_are_complete_and_closed() -> None:
    done = usage("a.raw", complete=True, opened=True)
    assert Ages().may_end([done], 0.0, GRACE)
    assert not Ages().may_end([done, usage("b.raw", complete=False, opened=True)], 0.0, GRACE)
    assert not Ages().may_end([done, usage("b.raw", complete=True, handles=1, opened=True)], 0.0, GRACE)


def test_an_image_that_nobody_has_opened_yet_keeps_it_for_the_grace() -> None:
    ages, fresh = Ages(), usage("a.raw", complete=True)
    assert not ages.may_end([fresh], 100.0, GRACE)
    assert not ages.may_end([fresh], 119.0, GRACE)
    newcomer = usage("b.raw", complete=True)
    assert not ages.may_end([fresh, newcomer], 120.0, GRACE), "each has a time of its own"
    assert ages.may_end([fresh], 121.0, GRACE)
    assert not ages.may_end([fresh, newcomer], 122.0, GRACE), "it came back"
    assert Ages().may_end([fresh], 0.0, 0.0), "none is asked for"
