"""A directory as source in which several users can put files: nobody takes another one's disk away, or its place."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from qedfs.backing.policy import Owner, Policy
from qedfs.config import MountOptions
from qedfs.errors import UsageError
from qedfs.session import roster as rosters
from qedfs.session.admission import Terms
from qedfs.session.roster import Roster
from qedfs.session.sources import Choice, Entry, FileId, Stamp, choose, scan
from qedfs.session.streams import open_streams
from tests.policy.people import MALLORY, NOBODY, ROOT, folder, image, link


def entry(
    name: str, inode: int, owner: int, backing: int | None = None, mode: int = 0o644, mounter: int = ROOT
) -> Entry:
    named = FileId(1, backing) if backing else None
    trusted = Policy(mounter).trusts(Owner(owner, mode))
    return Entry(f"/d/{name}", FileId(1, inode), Stamp(0, 0, 0), True, named, owner, trusted, not mode & 0o222)


def names(choice: Choice) -> tuple[list[str], list[str]]:
    """Return what is served, and what is not."""
    return [os.path.basename(e.path) for e in choice.leaves], [os.path.basename(e.path) for e, _ in choice.refused]


# --- hiding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [ROOT, NOBODY])
def test_naming_another_users_disk_as_backing_does_not_hide_it(victim: int) -> None:
    images = [entry("vm.qed", 1, victim), entry("evil.qed", 2, MALLORY, backing=1)]
    assert names(choose(images, [], [])) == (["vm.qed"], ["evil.qed"])


def test_a_base_that_nobody_may_write_is_for_everybody() -> None:
    images = [entry("base.qed", 1, ROOT, mode=0o444), entry("vm.qed", 2, MALLORY, backing=1)]
    assert names(choose(images, [], [])) == (["vm.qed"], [])


@pytest.mark.parametrize("owner", [ROOT, NOBODY])
def test_ones_own_base_and_what_root_says_is_a_base_are_hidden(owner: int) -> None:
    images = [entry("base.qed", 1, NOBODY), entry("vm.qed", 2, owner, backing=1)]
    assert names(choose(images, [], [])) == (["vm.qed"], [])


def test_hiding_through_a_third_image_does_not_work_either() -> None:
    images = [entry("vm.qed", 1, ROOT), entry("a", 2, MALLORY, backing=1), entry("b", 3, MALLORY, backing=2)]
    served, refused = names(choose(images, [], []))
    assert "vm.qed" in served
    assert "a" in refused


# --- taking a name ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("victims", "mallorys"), [("vm.qed", "vm"), ("vm", "vm.qed")])
def test_a_trusted_image_keeps_its_name(victims: str, mallorys: str) -> None:
    images = [entry(victims, 1, ROOT), entry(mallorys, 2, MALLORY)]
    assert names(choose(images, [], [])) == ([victims], [mallorys])


@pytest.mark.parametrize(("victims", "mallorys"), [("vm.qed", "vm"), ("vm", "vm.qed")])
def test_a_name_that_two_users_claim_goes_to_neither_unless_one_has_it(victims: str, mallorys: str) -> None:
    images = [entry(victims, 1, NOBODY), entry(mallorys, 2, MALLORY)]
    assert names(choose(images, [], [])) == ([], ["vm", "vm.qed"])
    assert names(choose(images, [FileId(1, 1)], [])) == ([victims], [mallorys])
    assert names(choose(images, [], [FileId(1, 2)])) == ([victims], [mallorys])


# --- links and swaps --------------------------------------------------------------------------------------------------


def looked(path: Path) -> dict[str, Entry]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return scan(fd, str(path), "/nowhere", {})
    finally:
        os.close(fd)


async def test_links_of_others_lead_only_to_files_of_theirs(shared: Path) -> None:
    images = folder(shared / "images", ROOT, 0o1777)
    roots = await image(shared / "root.qed", None, ROOT, 0o600)
    mallorys = await image(shared / "mallory.qed", None, MALLORY)
    link(images / "steal.qed", roots, MALLORY)
    link(images / "own.qed", mallorys, MALLORY)
    link(images / "by-root.qed", mallorys, ROOT)
    assert {os.path.basename(path) for path in looked(images)} == {"own.qed", "by-root.qed"}


async def test_a_device_that_takes_the_place_of_a_file_is_not_opened(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Opening a watchdog starts it, opening and closing a tape rewinds it.
    images = folder(shared / "images", MALLORY)
    leaf = await image(images / "vm.qed", None, MALLORY)
    device = shared / "device"
    os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    looks_like_a_file = leaf.stat()
    link(images / "next", device, MALLORY).rename(leaf)
    opened: list[int] = []
    real_open, real_stat = os.open, os.stat

    def watched_open(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        fd = real_open(path, flags, mode, dir_fd=dir_fd)
        if stat.S_ISCHR(os.fstat(fd).st_mode) and not flags & os.O_PATH:
            opened.append(fd)
        return fd

    def late_stat(path: Any, **options: Any) -> os.stat_result:
        return looks_like_a_file if path == "vm.qed" else real_stat(path, **options)

    monkeypatch.setattr(os, "open", watched_open)
    monkeypatch.setattr(os, "stat", late_stat)
    assert looked(images) == {}
    assert opened == []


@contextlib.contextmanager
def swapping(name: Path, *targets: Path) -> Iterator[None]:
    """Make `name` a link to one of `targets` after the other, as fast as it goes."""
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for target in targets:
                (name.parent / ".next").symlink_to(target)
                (name.parent / ".next").rename(name)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


async def test_owner_and_mode_shown_are_those_of_what_was_opened(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Else Mallory shows a file of hers while it is judged, root's while it is opened, and writes root's disk.
    home = folder(shared / "home", MALLORY)
    mallorys = await image(home / "mine.qed", None, MALLORY, 0o666)
    roots = await image(shared / "roots.qed", None, ROOT, 0o600)
    name = link(home / "vm.qed", mallorys, MALLORY)
    served: list[int] = []
    with swapping(name, roots, mallorys):
        for _ in range(60):
            async with open_streams(MountOptions()) as streams, trio.open_nursery() as nursery:
                roster = Roster(Terms(MountOptions(), "/nowhere", ROOT), streams, nursery)
                with contextlib.suppress(UsageError):
                    await roster.admit(str(name))
                for leaf in roster.tree.leaves:
                    about = Path(f"/proc/self/fd/{leaf.disk._image.storage.fd}").stat()  # type: ignore[attr-defined]
                    assert (leaf.uid, leaf.mode) == (about.st_uid, stat.S_IMODE(about.st_mode))
                    served.append(leaf.uid)
                roster.release_all()
    assert served


async def test_a_leaf_replaced_between_look_and_opening_is_not_served(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mallorys = await image(shared / "mine.qed", None, MALLORY, 0o666)
    roots = await image(shared / "roots.qed", None, ROOT, 0o600)
    seen = mallorys.stat()
    monkeypatch.setattr(rosters, "_status", lambda path: seen)
    async with open_streams(MountOptions()) as streams, trio.open_nursery() as nursery:
        roster = Roster(Terms(MountOptions(), "/nowhere", ROOT), streams, nursery)
        with pytest.raises(UsageError, match="was replaced while it was being opened"):
            await roster.admit(str(roots))
        assert roster.tree.leaves == []


async def test_a_leaf_in_the_mount_itself_is_refused_before_it_is_read(shared: Path) -> None:
    inside = await image(shared / "vm.qed", None)
    async with open_streams(MountOptions()) as streams, trio.open_nursery() as nursery:
        roster = Roster(Terms(MountOptions(), str(shared), ROOT), streams, nursery)
        with pytest.raises(UsageError, match="lies in the mount itself"):
            await roster.admit(str(inside))
