"""Raises the kernel's limits for our mount.

The defaults are made for file systems without latency: 128 KiB of readahead and 12 requests in flight. Over a backing
at 50 ms that is 5 MB/s; 4 MiB and 256 give 128 MB/s. And requests in the background that wait for one backing hold up
those of every other disk once the limit is reached.
"""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

from qedfs.fuse.mounts import find_mount

_log = logging.getLogger(__name__)

READ_AHEAD_KB = 4096
MAX_BACKGROUND = 2048
"""Requests in flight that the kernel counts as background: readahead, writeback, and every O_DIRECT read or write on a
plain handle. Half of the tasks that serve requests (`serve.MAX_TASKS`), so that the others always find one. Memory sets
no lower bound: the kernel allows a FUSE mount about 1 % of its limit of dirty pages."""
CONGESTION_THRESHOLD = 1536
"""Three quarters, as the kernel's own default: from here on readahead is left out."""

_CONNECTIONS = "/sys/fs/fuse/connections"
_SECONDS = 5


def tune(mountpoint: str) -> None:
    """Set readahead and queue length of the mount on `mountpoint`, where we may; never raises.

    Does not touch the mount itself. Readahead takes root; the queue length also the mounting user.
    """
    mount = find_mount(mountpoint)
    if mount is None:
        return
    connection = Path(_CONNECTIONS, mount.device.partition(":")[2])
    limits = {connection / "max_background": MAX_BACKGROUND, connection / "congestion_threshold": CONGESTION_THRESHOLD}
    _write({Path("/sys/class/bdi", mount.device, "read_ahead_kb"): READ_AHEAD_KB})
    if os.path.ismount(_CONNECTIONS):
        _write(limits)
    elif os.geteuid() == 0:
        _write_unmounted(limits)


def _write(values: dict[Path, int]) -> None:
    for path, value in values.items():
        try:
            path.write_text(str(value))
        except OSError as error:
            _log.debug("%s stays as it is: %s", path, error)


def _write_unmounted(limits: dict[Path, int]) -> None:
    """Set `limits` where nobody has mounted fusectl (containers): it is mounted for a moment, for one process alone."""
    script = f"mount -t fusectl none {_CONNECTIONS}" + "".join(f" && echo {v} > {p}" for p, v in limits.items())
    try:
        subprocess.run(
            ["unshare", "--mount", "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        _log.debug("queue length stays as it is: %s", error)
