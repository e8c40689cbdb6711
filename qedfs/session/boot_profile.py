"""Boot profiles as files: where they are, who reads and who writes them. docs/boot-profile.md

A disk with a profile gets it replayed; one without is listened to, and what its guest had to wait for is written at the end
of the boot, or of the mount. No profile, whatever is wrong with it, keeps a disk from being served.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import stat
from dataclasses import dataclass

import trio

from qedfs.backing.base import Identity
from qedfs.backing.location import FileLocation, parse_location
from qedfs.config import Mode
from qedfs.disk.disk import Disk
from qedfs.errors import BackingRefused, QedfsError, UsageError, printable
from qedfs.session.places import is_below
from qedfs.stream.job import Job
from qedfs.stream.profile import MOST_TEXT, Part, Recorder, clusters, parse, serialise

log = logging.getLogger(__name__)

AUTO, OFF = "auto", "off"
SECONDS = 300.0
"""From the first miss on: what a guest waits for later is work, not boot."""
LEAST = 1 << 20
"""Bytes; less is somebody's look at the partition table, and the boot is still to come."""
LOOK_EVERY = 1.0
"""Seconds; the disk remembers more misses than a guest can wait for in that time."""
FRESH, FRESH_SHARE = 16 << 20, 0.01
"""A leaf with more bytes, or a larger share of it, of its own has been booted before: what that brought is not missed."""
MOST_FILES = 128
"""Profiles kept in the user's folder; the least used go."""
SYSTEM_CACHE = "/var/cache/qedfs"
"""Root's: what is there can be made again."""


@dataclass(frozen=True)
class _Place:
    """Where the profile of a disk is. One in the user's own folder (`ours`) may be replaced; one that was given never is."""

    path: str
    ours: bool


class BootProfiles:
    """The profiles of one mount, as the option `boot_profile` says: `auto`, `off`, or an absolute path."""

    def __init__(self, choice: str) -> None:
        self._choice = choice

    async def attend(self, disk: Disk, leaf: str, job: Job) -> None:
        """Let `job` replay the profile of `disk`, whose image is at `leaf`, or record one until cancelled or at the end."""
        # What is held is on its way here while it runs: nothing of it may be kept, and it does not boot.
        if self._choice == OFF or disk.held:
            return
        try:
            place = await self._place(disk, leaf)
            if place is None or await self._replayed(disk, place, job):
                return
            if await _is_fresh(disk):
                await _record(disk, place)
        except QedfsError as error:
            log.info("%s: no boot profile: %s", disk.name, error)

    async def _place(self, disk: Disk, leaf: str) -> _Place | None:
        if self._choice != AUTO:
            return _Place(self._choice, ours=False)
        identity = await disk.backing_identity()
        folder = cache_folder()
        if identity is None or folder is None:
            return None
        statistics = disk.statistics()
        where = await trio.to_thread.run_sync(_where, statistics.backing, leaf)
        if isinstance(where, FileLocation) and statistics.backing_format == "raw":
            return None  # a read of it costs what its copy would
        return _Place(os.path.join(folder, _file_name(str(where), statistics.backing_format, identity)), ours=True)

    async def _replayed(self, disk: Disk, place: _Place, job: Job) -> bool:
        """Have the profile replayed; False if there is none and one may be made."""
        try:
            parts = await trio.to_thread.run_sync(_read, place)
        except UsageError as error:
            log.warning("%s; ignored", error)
            return not place.ours
        except OSError as error:
            log.warning("%s: the boot profile cannot be read (%s)", place.path, os.strerror(error.errno or 0))
            return True
        if parts is None:
            return False
        ranges = clusters(parts, disk.cluster_size, disk.size)
        log.info("%s: boot profile of %d parts from %s", disk.name, len(ranges), place.path)
        job.replay(ranges)
        return True


def check_profile_place(choice: str, mountpoint: str) -> None:
    """Refuse a file that cannot be one. `mountpoint` is a real path.

    Raises:
        UsageError: its folder does not exist, or it lies in the mount.
    """
    if choice in (AUTO, OFF):
        return
    folder = os.path.realpath(os.path.dirname(choice))
    if is_below(folder, mountpoint):
        raise UsageError(choice, "the boot profile lies in the mount itself")
    if not os.path.isdir(folder):
        raise UsageError(choice, "the folder of the boot profile does not exist")


def cache_folder() -> str | None:
    """Return the folder of this user's profiles, which may not exist yet; None if there can be none."""
    if base := os.environ.get("CACHE_DIRECTORY", "").partition(":")[0]:  # by systemd.exec(5)
        return os.path.join(base, "boot")
    if os.geteuid() == 0:
        # Not by root's environment, which may be that of the user who became root.
        return os.path.join(SYSTEM_CACHE, "boot")
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # such a one is to be ignored (XDG Base Directory Specification)
        base = os.path.expanduser("~/.cache")
    return os.path.join(base, "qedfs", "boot") if os.path.isabs(base) else None


def _where(name: str, leaf: str) -> FileLocation | str:
    """Return where the backing with this masked name is, without credentials: a file's path as seen from anywhere."""
    try:
        location = parse_location(name, FileLocation(os.path.realpath(leaf)))
    except BackingRefused:
        return name
    return FileLocation(os.path.realpath(location.path)) if isinstance(location, FileLocation) else name


def _file_name(where: str, format: str, identity: Identity) -> str:
    key = "\n".join([where, format, str(identity.size), identity.tag])
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]


async def _is_fresh(disk: Disk) -> bool:
    counts = await disk.counts()
    local = counts.data * disk.cluster_size - disk.copied()
    return local <= max(FRESH, FRESH_SHARE * disk.size)


async def _record(disk: Disk, place: _Place) -> None:
    """Listen until the boot is over, or this is cancelled, and write what was heard."""
    recorder = Recorder(disk.cluster_size)
    heard = 0

    def listen() -> None:
        nonlocal heard
        for miss in disk.misses.since(heard):
            if disk.mode is not Mode.COW:
                recorder.missed(miss.pos, miss.length)
        heard = disk.misses.count

    what = f"{disk.statistics().backing or disk.name}, a disk of {disk.size} bytes"
    began: float | None = None
    try:
        while not recorder.full:
            await trio.sleep(LOOK_EVERY)
            listen()
            now = trio.current_time()
            if began is None or (now - began >= SECONDS and recorder.length < LEAST):
                began = now if recorder.length else None
            elif now - began >= SECONDS:
                break
    finally:
        listen()
        if recorder.length >= LEAST:
            with trio.CancelScope(shield=True):
                await _write(place, serialise(recorder.parts(), f"Of {printable(what)}."))


async def _write(place: _Place, text: bytes) -> None:
    try:
        await trio.to_thread.run_sync(_write_file, place, text)
    except OSError as error:
        # Nobody asked for one in the user's folder.
        level = logging.INFO if place.ours else logging.WARNING
        why = os.strerror(error.errno or 0)
        log.log(level, "%s: the boot profile cannot be written (%s)", place.path, why)
    else:
        log.info("%s: boot profile recorded", place.path)


def _read(place: _Place) -> list[Part] | None:
    """Return the parts that a profile lists; None if there is no file.

    Raises:
        UsageError: it is no profile, or somebody else may have put it there.
        OSError: it cannot be read.
    """
    if place.ours and not _is_private(os.path.dirname(place.path)):
        return None
    try:
        # A FIFO or a device is not waited for.
        fd = os.open(place.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UsageError(place.path, "the boot profile is no file")
        parts = parse(file.read(MOST_TEXT + 1), place.path)
        if place.ours:
            os.utime(fd)  # used now
    return parts


def _is_private(folder: str) -> bool:
    """Whether a folder of ours is there, and nobody else may put something into it.

    Raises:
        UsageError: somebody else may.
    """
    try:
        status = os.stat(folder)
    except OSError:
        return False
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise UsageError(folder, "others may write boot profiles there")
    return True


def _write_file(place: _Place, text: bytes) -> None:
    """Put a whole file in its place, durably."""
    folder = os.path.dirname(place.path)
    if place.ours:
        os.makedirs(folder, 0o700, exist_ok=True)
        if not _is_private(folder):
            return
        _make_room(folder)
    temporary = os.path.join(folder, f".{os.path.basename(place.path)[:200]}.{secrets.token_hex(4)}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, place.path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_room(folder: str) -> None:
    """Remove the files that were used longest ago, so that one more may come."""
    with os.scandir(folder) as entries:
        by_age = sorted(
            (entry.stat(follow_symlinks=False).st_mtime, entry.path) for entry in entries if entry.is_file()
        )
    for _, path in by_age[: max(0, len(by_age) - MOST_FILES + 1)]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
