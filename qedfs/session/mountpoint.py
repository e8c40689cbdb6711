"""What must hold of a mountpoint before anything is opened or written."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path

from qedfs.errors import MountError, UsageError

_FUSE = "/dev/fuse"
FILE_SYSTEM = "fuse.qedfs"


def check_mountpoint(mountpoint: str, sources: Sequence[str]) -> None:
    """Refuse a mountpoint that cannot work. All paths are absolute.

    Raises:
        UsageError: it lies over or inside a source.
        MountError: it is no directory, is mounted already, or there is no FUSE.
    """
    _check_fuse()
    try:
        if not os.path.isdir(mountpoint):
            os.stat(mountpoint)  # says why
            raise MountError(mountpoint, "is not a directory")
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            why = f"a mount whose server has died is still on it ('qedfs unmount {mountpoint}' removes it)"
            raise MountError(mountpoint, why) from error
        raise MountError(mountpoint, f"cannot be mounted on ({os.strerror(error.errno or 0)})") from error
    if file_system_of(mountpoint) == FILE_SYSTEM:
        raise MountError(mountpoint, "is in use by another qedfs mount")
    here = os.path.realpath(mountpoint)
    for source in sources:
        there = os.path.realpath(source)
        if is_below(there, here):
            raise UsageError(mountpoint, f"the mount would cover its own source {source}")
        if os.path.isdir(there) and is_below(here, there):
            raise UsageError(mountpoint, f"lies inside its own source {source}")


def is_below(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or lies in it; both are real paths."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def file_system_of(mountpoint: str) -> str | None:
    """Return the type of what is mounted exactly at `mountpoint` (the uppermost mount), or None if nothing is.

    Never touches the mount itself, which may be dead or hang.
    """
    path = _real_parent(mountpoint)
    found = None
    with Path("/proc/self/mountinfo").open(encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            before, _, after = line.rstrip("\n").partition(" - ")
            if _unescaped(before.split(" ")[4]) == path:
                found = after.split(" ")[0]
    return found


def _real_parent(path: str) -> str:
    """Return the real path of `path`, following its last component only if that is a link."""
    parent, name = os.path.split(os.path.abspath(path))
    plain = os.path.join(os.path.realpath(parent), name)
    try:
        os.readlink(plain)  # unlike lstat, answered without asking the file system's server
    except OSError:
        return plain
    return os.path.realpath(path)


def _unescaped(field: str) -> str:
    """Undo the octal escapes of proc(5)."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _check_fuse() -> None:
    try:
        os.close(os.open(_FUSE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        hint = {
            errno.ENOENT: "does not exist (is the kernel module 'fuse' loaded?)",
            errno.ENODEV: "is dead (is the kernel module 'fuse' loaded?)",
            errno.EACCES: "may not be opened by this user",
        }.get(error.errno or 0, f"cannot be opened ({os.strerror(error.errno or 0)})")
        raise MountError(_FUSE, hint) from error
