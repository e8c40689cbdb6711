"""Where mounts and their sources lie to each other."""

from __future__ import annotations

import os
from collections.abc import Sequence

from qedfs.errors import MountError, UsageError
from qedfs.fuse.mountpoint import check_mountpoint
from qedfs.fuse.mounts import find_mount

FILE_SYSTEM = "fuse.qedfs"


def check_places(mountpoint: str, sources: Sequence[str]) -> None:
    """Refuse a mountpoint that cannot work, before anything is opened. `mountpoint` is as of `real_mountpoint`.

    Raises:
        MountError: it is no empty directory, is mounted already, or there is no FUSE.
        UsageError: it lies over or inside a source.
    """
    mount = find_mount(mountpoint)
    if mount and mount.fs_type == FILE_SYSTEM:
        raise MountError(
            mountpoint, f"{mount.source} is mounted here already ('qedfs unmount' removes it, dead or alive)"
        )
    for source in sources:
        there = os.path.realpath(source)
        if is_below(there, mountpoint):
            raise UsageError(mountpoint, f"the mount would cover its own source {source}")
        if os.path.isdir(there) and is_below(mountpoint, there):
            raise UsageError(mountpoint, f"lies inside its own source {source}")
    check_mountpoint(mountpoint)


def is_below(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or lies in it; both are real paths."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def real_mountpoint(path: str) -> str:
    """Return the real path of `path` without asking what is mounted there, which may be dead or hang."""
    parent, name = os.path.split(os.path.abspath(path))
    plain = os.path.join(os.path.realpath(parent), name)
    try:
        os.readlink(plain)  # unlike lstat, answered without asking a file system's server
    except OSError:
        return plain
    return os.path.realpath(plain)
