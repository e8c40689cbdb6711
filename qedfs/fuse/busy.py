"""Who keeps a mount busy: processes with something open on it, loop devices over its files.

Nothing here touches the mount: the links in /proc are read, never followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from qedfs.fuse.mounts import find_mount


class Holder(NamedTuple):
    """One who keeps the mount busy."""

    name: str
    """The command of a process, or the path of a loop device."""
    pid: int | None
    """None: a loop device."""
    path: str
    """What it uses."""

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})" if self.pid else self.name


def find_holders(mountpoint: str) -> list[Holder]:
    """Return who uses the mount on `mountpoint`, as far as we may look (other users' processes take root)."""
    mount = find_mount(mountpoint)
    root = mount.mountpoint if mount else os.path.abspath(mountpoint)
    return [*_processes(root), *_loop_devices(root)]


def _processes(root: str) -> Iterable[Holder]:
    for process in sorted((p for p in Path("/proc").iterdir() if p.name.isdigit()), key=lambda p: int(p.name)):
        used = next((path for path in _used_by(process) if _is_in(path, root)), None)
        if used is not None:
            yield Holder(_read(process / "comm").strip() or "?", int(process.name), used)


def _used_by(process: Path) -> Iterable[str]:
    """Yield the paths that a process holds: directories, open files, mapped files."""
    for link in ("cwd", "root", "exe"):
        yield _read_link(process / link)
    try:
        descriptors = os.listdir(process / "fd")
    except OSError:
        descriptors = []
    for descriptor in descriptors:
        yield _read_link(process / "fd" / descriptor)
    # A mapping keeps a file in use after its descriptor was closed.
    for line in _read(process / "maps").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6:
            yield fields[5]


def _loop_devices(root: str) -> Iterable[Holder]:
    """A loop device belongs to the kernel, so no process has its file open."""
    for backing in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        path = _read(backing).rstrip("\n")
        if _is_in(path, root):
            yield Holder(f"/dev/{backing.parts[3]}", None, path)


def _is_in(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape")
    except OSError:
        return ""


def _read_link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
