"""What must hold before a mount is tried, and with which options it is made."""

from __future__ import annotations

import errno
import os
import shutil

from qedfs.config import MountOptions
from qedfs.errors import MountError
from qedfs.fuse.mounts import find_mount


def check_mountpoint(mountpoint: str) -> None:
    """Raise MountError, with what to do, if FUSE is not there or `mountpoint` cannot be mounted on."""
    if not os.path.exists("/dev/fuse"):
        raise MountError("/dev/fuse", "does not exist (is the kernel module fuse loaded?)")
    if not shutil.which("fusermount3"):
        raise MountError("fusermount3", "is not installed (package fuse3)")
    if find_mount(mountpoint):
        raise MountError(mountpoint, "something is mounted here already")
    try:
        content = os.listdir(mountpoint)
    except OSError as error:
        raise MountError(mountpoint, os.strerror(error.errno or errno.EIO)) from error
    if content:
        raise MountError(mountpoint, "the directory is not empty")


def mount_options(options: MountOptions, fsname: str) -> list[str]:
    """Return the options of the mount, for fusermount3."""
    # Without default_permissions the mode of a disk would not keep other users out of it.
    return [
        "default_permissions",
        "subtype=qedfs",
        f"fsname={_escaped(fsname)}",
        *(["ro"] if options.read_only else []),
        # The kernel knows no allow_root: it lets everybody in, and libfuse lets nobody but root and the mounter pass.
        *(["allow_other"] if options.allow_other or options.allow_root else []),
    ]


def library_options(options: MountOptions) -> set[str]:
    """Return the options for libfuse, which is given a mount that has been made."""
    return {"allow_root"} if options.allow_root else set()


def _escaped(fsname: str) -> str:
    """Return `fsname` as fusermount3 parses it."""
    return fsname.replace("\\", "\\\\").replace(",", "\\,")
