"""The mount table, read without touching a mount."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

_MOUNTINFO = "/proc/self/mountinfo"
_OCTAL = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    """One line of proc_pid_mountinfo(5)."""

    mount_id: int
    device: str
    """`major:minor`."""
    mountpoint: str
    fs_type: str
    source: str


def read_mounts() -> list[Mount]:
    """Return the mounts of this process's namespace, later ones over earlier ones."""
    with open(_MOUNTINFO, "rb") as file:
        return [_parse(line) for line in file]


def find_mount(mountpoint: str) -> Mount | None:
    """Return what is mounted on `mountpoint`, on top if there are several.

    Only the parent directory is looked at: the mount itself may be dead or ours.
    """
    path = os.path.abspath(mountpoint)
    parent, name = os.path.split(path)
    path = os.path.join(os.path.realpath(parent), name) if name else path
    return next((mount for mount in reversed(read_mounts()) if mount.mountpoint == path), None)


def _parse(line: bytes) -> Mount:
    before, _, after = line.partition(b" - ")
    fields, rest = before.split(), after.split()
    return Mount(int(fields[0]), fields[2].decode(), _unescaped(fields[4]), rest[0].decode(), _unescaped(rest[1]))


def _unescaped(field: bytes) -> str:
    """Blanks and backslashes are written in octal."""
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field))
