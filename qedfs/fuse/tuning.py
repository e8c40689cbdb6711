"""The kernel's limits for our mount.

The defaults are made for file systems without latency: 128 KiB of readahead and 12 requests in flight. Over a backing
at 50 ms that is 5 MB/s; 4 MiB and 256 give 128 MB/s. And requests in the background that wait for one backing hold up
those of every other disk once the limit is reached.
"""

from __future__ import annotations

import logging
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


def widen_readahead(mountpoint: str) -> None:
    """Set the readahead of the mount on `mountpoint`, where we may (root only); never raises.

    Does not touch the mount itself.
    """
    mount = find_mount(mountpoint)
    if mount is None:
        return
    path = Path("/sys/class/bdi", mount.device, "read_ahead_kb")
    try:
        path.write_text(str(READ_AHEAD_KB))
    except OSError as error:
        _log.debug("%s stays as it is: %s", path, error)
