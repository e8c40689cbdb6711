"""The byte-range locks by which QEMU and qedfs keep out of each other's images.

QEMU (block/file-posix.c) gives every permission two bytes of the file: 100 + n is locked by whoever uses permission n,
200 + n by whoever does not share it. All of them are read locks, so that any number of holders fit; a conflict is found
by asking, after one's own bytes are taken, whether somebody holds the opposite byte. They are open file description
locks: they belong to the descriptor, exclude even this process's other descriptors, and end when it is closed.

Setting first and asking second means that two who come at once may both be refused, and never both admitted.
"""

from __future__ import annotations

import fcntl
import os
import struct
from enum import IntFlag

from qedfs.errors import Locked


class _Permission(IntFlag):
    """QEMU's permissions, by their bit."""

    CONSISTENT_READ = 0x1
    WRITE = 0x2
    WRITE_UNCHANGED = 0x4
    RESIZE = 0x8


_CHANGES = _Permission.WRITE | _Permission.RESIZE
_USED_BASE = 100
_UNSHARED_BASE = 200
# l_type, l_whence, l_start, l_len, l_pid (must be 0 for locks of this kind), padded to the struct's alignment.
_FLOCK = struct.Struct("hhqqi0q")


def lock_for_writing(fd: int, name: str) -> None:
    """Lock an image that we write: others may still read it as a raw file, but not as an image and not for writing.

    `fd` must be open for reading and writing. The locks last until it is closed, which the caller does after an error.

    Raises:
        Locked: somebody has it open in a way that excludes ours, or the file system has no such locks.
    """
    _lock(fd, name, _Permission.CONSISTENT_READ | _CHANGES)


def lock_for_reading(fd: int, name: str) -> None:
    """Lock an image or backing that we read and that nobody may change meanwhile. Other readers are welcome.

    `fd` must be open for reading. Raises as `lock_for_writing`.
    """
    _lock(fd, name, _Permission.CONSISTENT_READ)


def _lock(fd: int, name: str, used: _Permission) -> None:
    try:
        for base, permissions in ((_USED_BASE, used), (_UNSHARED_BASE, _CHANGES)):
            for byte in _bytes(base, permissions):
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte))
        # Ordering: only now, when our own bytes are there for others to find.
        if any(_held_by_others(fd, byte) for byte in _bytes(_USED_BASE, _CHANGES)):
            raise Locked(name, "somebody else has it open for writing")
        if any(_held_by_others(fd, byte) for byte in _bytes(_UNSHARED_BASE, used)):
            raise Locked(name, "somebody else has it open and does not want it to change")
    except OSError as error:
        raise Locked(name, f"cannot be locked ({os.strerror(error.errno or 0)})") from error


def _bytes(base: int, permissions: _Permission) -> list[int]:
    return [base + permission.value.bit_length() - 1 for permission in permissions]


def _held_by_others(fd: int, byte: int) -> bool:
    # Asking for a write lock finds every holder; nothing is taken.
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _flock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
