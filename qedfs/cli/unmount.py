"""`qedfs unmount`: end a mount, and return when nothing is left to lose."""

from __future__ import annotations

import contextlib
import errno
import os
import select

import click

from qedfs.errors import MountError
from qedfs.fuse.busy import find_holders
from qedfs.fuse.mounts import find_mount
from qedfs.fuse.unmount import unmount_sync
from qedfs.session.places import FILE_SYSTEM, real_mountpoint


@click.command("unmount", short_help="Flush and unmount; return when everything is closed.")
@click.option("--lazy", is_flag=True, help="Detach now; serve whoever has a disk open until the last close.")
@click.argument("mountpoint")
def command(mountpoint: str, lazy: bool) -> None:
    """Flush and unmount MOUNTPOINT; return when the serving process has closed its images and ended.

    A busy mount stays; the error says who keeps it busy. A disk that could not be flushed is told, with exit status 1.
    """
    unmount(mountpoint, lazy=lazy)


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount, and wait for the end of the server unless `lazy`. Shared with umount(8)'s helper.

    Raises:
        MountError: it is no mount of ours, or is busy; or it is unmounted now, but a disk could not be made durable.
    """
    mountpoint = real_mountpoint(mountpoint)
    mount = find_mount(mountpoint)
    if mount is None or mount.fs_type != FILE_SYSTEM:
        raise MountError(mountpoint, "is not a qedfs mount")
    # Ordering: the server is found while it is certainly there; afterwards its pid may be another's.
    server = _open_server(mountpoint)
    lost: list[str] = []
    try:
        if not lazy:
            # Ordering: before the flush, which would wait behind a write that waits for its backing.
            if find_holders(mountpoint):
                raise MountError(mountpoint, f"is in use by {_holders(mountpoint)}")
            # Ordering: while there is somebody to answer. What the kernel writes back as it unmounts can fail silently.
            lost = _flush(mountpoint)
        if not unmount_sync(mountpoint, lazy=lazy):
            raise MountError(mountpoint, f"is in use by {_holders(mountpoint)}")
        if server is not None and not lazy:
            ended = select.poll()
            ended.register(server, select.POLLIN)
            ended.poll()
    finally:
        if server is not None:
            os.close(server)
    if lost:
        raise MountError(mountpoint, f"is unmounted, but {'; '.join(lost)}")


def _flush(mountpoint: str) -> list[str]:
    """Make every disk durable; say of each that cannot be why, in the words of the server."""
    failed = []
    with contextlib.suppress(OSError):  # a dead server, or not ours to look into
        for disk in sorted(os.scandir(mountpoint), key=lambda entry: entry.name):
            try:
                fd = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                os.fsync(fd)
            except OSError as error:
                newest = os.fsdecode(os.getxattr(fd, "user.qedfs.last_error"))
                why = f"{os.strerror(error.errno or 0)}; last error: {newest or 'none'}"
                failed.append(f"{disk.name} may have lost what was not flushed before ({why})")
            finally:
                os.close(fd)
    return failed


def _holders(mountpoint: str) -> str:
    return ", ".join(map(str, find_holders(mountpoint))) or "somebody whom only root can see (--lazy detaches it)"


def _open_server(mountpoint: str) -> int | None:
    """Return a pidfd of the process that serves the mount; None when it is dead already."""
    try:
        return os.pidfd_open(int(os.getxattr(mountpoint, "user.qedfs.pid")))
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.ESRCH):
            return None
        raise MountError(mountpoint, f"does not say who serves it ({os.strerror(error.errno or 0)})") from error
    except ValueError as error:
        raise MountError(mountpoint, "does not say who serves it") from error
