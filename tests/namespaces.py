"""Mount namespaces of tests that mount where nobody else sees it."""

from __future__ import annotations

FORGET_MOUNTS = "umount --lazy --all --types fuse.qedfs"
"""First of all in a new one: its copies of the mounts of tests beside this one would keep those alive when they are
unmounted, as an open file does."""
