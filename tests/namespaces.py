"""Mount namespaces of tests that mount where nobody else sees it."""

from __future__ import annotations

FORGET_MOUNTS = (
    'while grep -q " - fuse.qedfs " /proc/self/mountinfo; do umount --lazy --all --types fuse.qedfs || :; done'
)
"""First of all in a new one: its copies of the mounts of tests beside this one would keep those alive when they are
unmounted, as an open file does. Again if it fails: one whose folder is removed meanwhile is gone when its turn comes."""
