"""Boot profiles on disk: found, recorded, replayed, and never trusted further than they may be."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

from qedfs.errors import UsageError
from qedfs.session import boot_profile
from qedfs.session.boot_profile import MOST_FILES, BootProfiles, cache_folder, check_profile_place
from qedfs.stream.job import Job
from qedfs.stream.profile import MOST_TEXT, TITLE
from tests.failing.rig import QEDFS, run, served, until
from tests.image.memory_storage import MemoryStorage
from tests.model.fake_source import FakeSource
from tests.model.memory_disk import empty_image, memory_disk, pattern

MIB = 1 << 20
C = 4096
SIZE = 4 * MIB
BASE = pattern(SIZE)


class FakeJob:
    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def replay(self, ranges: list[tuple[int, int]]) -> None:
        self.ranges = ranges


async def boot(choice: str, *reads: int, name: str = "nbd://host/base", leaf: MemoryStorage | None = None) -> FakeJob:
    """Have a mount in which these clusters are read; return its job."""
    job = FakeJob()
    async with (
        memory_disk(leaf or await empty_image(SIZE), FakeSource(BASE, name=name)) as memory,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(BootProfiles(choice).attend, memory.disk, "/images/vm.qed", cast(Job, job))
        await trio.sleep(2)
        for cluster in reads:
            await memory.disk.read(cluster * C, C)
        await trio.sleep(2)
        nursery.cancel_scope.cancel()
    return job


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "cache"))
    return tmp_path / "cache" / "boot"


MANY = [*range(700, 1000)]
"""More than the least that is a boot."""
MANY_ASKED = [(700, 956), (956, 1000)]
"""The same in pieces of a fetch."""


@pytest.fixture(autouse=True)
def _threads_in_virtual_time(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    # A virtual clock jumps while a thread works; what is written here takes no time anyway.
    if "autojump_clock" in request.fixturenames:

        async def here(function: Callable[..., object], *args: object) -> object:
            await trio.lowlevel.checkpoint()
            return function(*args)

        monkeypatch.setattr(trio.to_thread, "run_sync", here)


async def test_first_mount_records_and_the_next_one_of_the_same_backing_replays(
    cache: Path, autojump_clock: trio.testing.MockClock
) -> None:
    assert (await boot("auto", 5, *MANY)).ranges == []
    assert len(list(cache.iterdir())) == 1
    assert (await boot("auto")).ranges == [(5, 6), *MANY_ASKED]
    assert (await boot("auto", name="nbd://host/other")).ranges == []
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


async def test_off_a_local_raw_file_and_a_held_leaf_have_none(
    cache: Path, autojump_clock: trio.testing.MockClock
) -> None:
    await boot("off", *MANY)
    await boot("auto", *MANY, name="/images/base.raw")
    await boot("auto", *MANY, name="base.raw")
    assert not cache.exists()


async def test_a_look_at_the_disk_is_no_boot_and_a_leaf_that_was_booted_teaches_nothing(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "profile"
    await boot(str(file), 0, 1, 2)
    assert not file.exists()
    leaf = await empty_image(SIZE)
    await boot("off", *range(20), leaf=leaf)
    monkeypatch.setattr(boot_profile, "FRESH", 10 * C)
    await boot(str(file), *MANY, leaf=leaf)
    assert not file.exists()
    monkeypatch.setattr(boot_profile, "FRESH", 1 << 30)
    await boot(str(file), *MANY, leaf=await empty_image(SIZE))
    assert file.exists()


async def test_a_boot_ends_after_some_minutes(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    file = tmp_path / "profile"
    async with memory_disk(await empty_image(SIZE), FakeSource(BASE)) as memory, trio.open_nursery() as nursery:
        nursery.start_soon(BootProfiles(str(file)).attend, memory.disk, "/vm.qed", cast(Job, FakeJob()))
        await memory.disk.read(0, C)
        await trio.sleep(3600)
        assert not file.exists(), "the boot is still to come"
        for cluster in MANY:
            await memory.disk.read(cluster * C, C)
        await trio.sleep(2 * boot_profile.SECONDS)
        assert file.exists()
        await memory.disk.read(100 * C, C)
    assert (await boot(str(file))).ranges == [(0, 1), *MANY_ASKED]


async def test_a_given_file_may_be_of_another_disk_and_is_clipped(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    file = tmp_path / "profile"
    file.write_bytes(TITLE + b"\n%d 8192\n%d 999999999\n0 1\n" % (SIZE, SIZE - 1))
    before = file.read_bytes()
    assert (await boot(str(file), *MANY)).ranges == [(SIZE // C - 1, SIZE // C), (0, 1)]
    assert file.read_bytes() == before, "a given file is never changed"


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, TITLE + b"\n1 2 3\n", b"#" * (MOST_TEXT + 2)])
async def test_a_damaged_file_is_one_warning_and_no_reason_not_to_serve(
    damage: bytes,
    cache: Path,
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
    expected_warnings: Callable[[str], None],
) -> None:
    expected_warnings("; ignored$")
    file = tmp_path / "profile"
    file.write_bytes(damage)
    assert (await boot(str(file), *MANY)).ranges == []
    assert file.read_bytes() == damage
    # One of our own is made anew.
    await boot("auto", *MANY)
    (own,) = cache.iterdir()
    own.write_bytes(damage)
    assert (await boot("auto", *MANY)).ranges == []
    assert (await boot("auto")).ranges == MANY_ASKED


@pytest.mark.parametrize("kind", ["folder", "fifo"])
async def test_what_is_no_file_is_not_waited_for(
    kind: str, tmp_path: Path, autojump_clock: trio.testing.MockClock, expected_warnings: Callable[[str], None]
) -> None:
    place = tmp_path / "profile"
    if kind == "fifo":
        os.mkfifo(place)
        expected_warnings("is no file; ignored")
    else:
        place.mkdir()
        expected_warnings("cannot be read")
    assert (await boot(str(place), *MANY)).ranges == []


async def test_a_folder_that_others_may_write_is_not_believed(
    cache: Path, autojump_clock: trio.testing.MockClock, expected_warnings: Callable[[str], None]
) -> None:
    await boot("auto", *MANY)
    cache.chmod(0o777)
    expected_warnings("others may write boot profiles there; ignored")
    assert (await boot("auto")).ranges == []


async def test_files_of_our_own_stay_few(cache: Path, autojump_clock: trio.testing.MockClock) -> None:
    cache.mkdir(parents=True, mode=0o700)
    for number in range(MOST_FILES + 10):
        (cache / f"old{number}").touch()
        os.utime(cache / f"old{number}", (number, number))
    await boot("auto", *MANY)
    left = {path.name for path in cache.iterdir()}
    assert len(left) == MOST_FILES
    assert "old10" not in left
    assert f"old{MOST_FILES + 9}" in left


def test_the_folder_is_that_of_the_service_of_the_system_or_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", "/run/a:/run/b")
    assert cache_folder() == "/run/a/boot"
    monkeypatch.delenv("CACHE_DIRECTORY")
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/eve/c")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert cache_folder() == "/var/cache/qedfs/boot"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cache_folder() == "/home/eve/c/qedfs/boot"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", "/home/eve")
    assert cache_folder() == "/home/eve/.cache/qedfs/boot"


def test_a_file_in_the_mount_or_in_no_folder_is_refused(tmp_path: Path) -> None:
    check_profile_place("auto", str(tmp_path))
    check_profile_place(str(tmp_path / "profile"), str(tmp_path / "mnt"))
    for place in (tmp_path / "profile", tmp_path / "sub" / "profile"):
        with pytest.raises(UsageError):
            check_profile_place(str(place), str(tmp_path if place.parent == tmp_path else tmp_path / "mnt"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    """The URL of 32 MiB behind a server that takes 5 ms for each read."""
    base, socket, ready = tmp_path / "base.raw", tmp_path / "socket", tmp_path / "ready"
    base.write_bytes(random.Random(1).randbytes(32 * MIB))
    command = ["nbdkit", "--foreground", "--readonly", f"--unix={socket}", f"--pidfile={ready}"]
    with subprocess.Popen([*command, "--filter=delay", "file", str(base), "rdelay=5ms"]) as server:
        try:
            until(lambda: ready.exists() and ready.read_text().endswith("\n"))
            yield f"nbd+unix:///?socket={socket}"
        finally:
            server.terminate()


def test_second_boot_of_a_base_is_fast(store: str, tmp_path: Path) -> None:
    chance = random.Random(2)
    places = [chance.randrange(32 * 16) * 65536 for _ in range(120)]
    base = (tmp_path / "base.raw").read_bytes()
    profile = tmp_path / "base.profile"
    seconds, missed = [], []
    for number in range(3):
        leaf = tmp_path / f"vm{number}.qed"
        run(*QEDFS, "create", "-b", store, "-F", "raw", leaf)
        with served(leaf, tmp_path / f"mnt{number}", "mode=cor", f"boot_profile={profile}", "reserve=0") as disk:
            disk.file = disk.point / f"vm{number}.raw"
            began = time.monotonic()
            for pos in places:
                assert disk.read(pos, 4096) == base[pos : pos + 4096]
            seconds.append(time.monotonic() - began)
            missed.append(int(disk.attribute("backing_bytes_read")))
            disk.unmount()
        run("qemu-img", "check", "-q", "-f", "qed", leaf)
    assert profile.read_bytes().startswith(TITLE)
    assert missed[1] <= missed[0] + MIB // 2, "hardly anything is fetched that the first boot did not need"
    assert min(seconds[1:]) < 0.7 * seconds[0], seconds
