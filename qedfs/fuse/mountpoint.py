"""What must hold before a mount is tried, and how libfuse is asked for it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qedfs.config import MountOptions
from qedfs.errors import MountError
from qedfs.fuse.mounts import find_mount


def check_mountpoint(mountpoint: str) -> None:
    """Raise MountError, with what to do, if FUSE is not there or `mountpoint` cannot be mounted on."""
    if not os.path.exists("/dev/fuse"):
        raise MountError("/dev/fuse", "does not exist (is the kernel module fuse loaded?)")
    if os.geteuid() != 0 and not shutil.which("fusermount3"):
        raise MountError("fusermount3", "is not installed (package fuse3), and only root can mount without it")
    if find_mount(mountpoint):
        raise MountError(mountpoint, "something is mounted here already")
    try:
        content = os.listdir(mountpoint)
    except OSError as error:
        raise MountError(mountpoint, os.strerror(error.errno or errno.EIO)) from error
    if content:
        raise MountError(mountpoint, "the directory is not empty")


def mount_options(options: MountOptions, fsname: str) -> set[str]:
    """Return the options for libfuse."""
    # Without default_permissions the mode of a disk would not keep other users out of it.
    result = {"default_permissions", "subtype=qedfs", f"fsname={_escaped(fsname)}"}
    result |= {"ro"} if options.read_only else set()
    result |= {"allow_other"} if options.allow_other else set()
    result |= {"allow_root"} if options.allow_root else set()
    return result


def _escaped(fsname: str) -> str:
    """Return `fsname` as libfuse parses it; pyfuse3 takes ASCII only."""
    text = fsname.encode("ascii", "replace").decode("ascii")
    return text.replace("\\", "\\\\").replace(",", "\\,")


@contextmanager
def captured_stderr() -> Iterator[Callable[[], str]]:
    """Catch what C code and child processes write to descriptor 2; the function tells it, as one line.

    libfuse and fusermount3 explain a refused mount there and nowhere else.
    """
    with tempfile.TemporaryFile() as messages:
        saved = os.dup(2)
        os.dup2(messages.fileno(), 2)

        def read() -> str:
            text = os.pread(messages.fileno(), 4096, 0).decode("utf-8", "replace")
            lines = (line.strip() for line in text.splitlines())
            return "; ".join(line.removeprefix("fusermount3: ").removeprefix("fuse: ") for line in lines if line)

        try:
            yield read
        finally:
            os.dup2(saved, 2)
            os.close(saved)
