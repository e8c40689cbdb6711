"""Ends a mount: from the serving process, from another one, plainly or lazily."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from functools import partial

import trio

from qedfs.errors import MountError
from qedfs.fuse.mounts import find_mount

_MNT_DETACH = 2


async def unmount(mountpoint: str, *, lazy: bool = False) -> bool:
    """Unmount `mountpoint`; return False if it is in use (then nothing has changed).

    Cached writes are written back first. With `lazy` it goes out of sight at once and is served until the last file is
    closed; never False. Runs in a thread, as the serving process may call it for its own mount, and is not abandoned
    on cancellation.

    Raises:
        MountError: nothing is mounted there, or it may not be unmounted.
    """
    return await trio.to_thread.run_sync(partial(unmount_sync, mountpoint, lazy=lazy))


def unmount_sync(mountpoint: str, *, lazy: bool = False) -> bool:
    """As `unmount`, blocking; not to be called in the thread that serves the mount."""
    mount = find_mount(mountpoint)
    if mount is None:
        raise MountError(mountpoint, "nothing is mounted here")
    return _by_system_call(mount.mountpoint, lazy) if os.geteuid() == 0 else _by_fusermount(mount.mountpoint, lazy)


def _by_system_call(mountpoint: str, lazy: bool) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(mountpoint), _MNT_DETACH if lazy else 0) == 0:
        return True
    number = ctypes.get_errno()
    if number == errno.EBUSY:
        return False
    raise MountError(mountpoint, f"cannot be unmounted: {os.strerror(number)}")


def _by_fusermount(mountpoint: str, lazy: bool) -> bool:
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", mountpoint]
    try:
        # In the C locale: whether it is busy can be told only by the text.
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env={**os.environ, "LC_ALL": "C"}, check=False
        )
    except OSError as error:
        raise MountError("fusermount3", f"cannot be started: {error.strerror}") from error
    if result.returncode == 0:
        return True
    message = os.fsdecode(result.stderr).strip().removeprefix("fusermount3: ")
    if message.endswith(os.strerror(errno.EBUSY)) or "busy" in message:
        return False
    raise MountError(mountpoint, message or "fusermount3 could not unmount it")
