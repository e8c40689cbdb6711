"""Doing one thing with the rights of another user.

Credentials belong to a thread in Linux; only libc makes them look like the process's. So the work is done in a thread of
its own that takes the user's file system identity and then ends: no other thread ever has it, and there is nothing to
give back that could be forgotten. (A child process that passes a descriptor back does the same at the price of a fork
in a process with threads, or of a new interpreter.) Leaving uid 0 for files also drops the capabilities that override
file permissions.
"""

from __future__ import annotations

import ctypes
import os
import platform
import pwd
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# The kernel's own calls, which change only the calling thread. libc's setgroups changes all of them.
_SETGROUPS = {"x86_64": 116, "aarch64": 159, "riscv64": 159}
_NOBODY = 65534
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.argtypes = (ctypes.c_long, ctypes.c_size_t, ctypes.c_void_p)


def call_as(uid: int, function: Callable[[], T]) -> T:
    """Return `function()`, called with the file system rights of user `uid` and of that user's groups. Blocks.

    Raises what `function` raises, and PermissionError when this process may not take another's rights.
    """
    # Ordering: the user database is asked with our own rights.
    gid, groups = _groups_of(uid)
    outcome: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            _become(uid, gid, groups)
            outcome.append(function())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name=f"as-user-{uid}")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def _groups_of(uid: int) -> tuple[int, list[int]]:
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        # Nobody knows this user: no group's rights are theirs for sure.
        return _NOBODY, []
    return user.pw_gid, os.getgrouplist(user.pw_name, user.pw_gid)


def _become(uid: int, gid: int, groups: list[int]) -> None:
    number = _SETGROUPS.get(platform.machine())
    if number is None:
        raise PermissionError(f"taking another user's rights is not supported on {platform.machine()}")
    array = (ctypes.c_uint32 * len(groups))(*groups)
    if _libc.syscall(number, len(groups), ctypes.cast(array, ctypes.c_void_p)):
        code = ctypes.get_errno()
        raise PermissionError(code, os.strerror(code))
    for change, wanted in ((_libc.setfsgid, gid), (_libc.setfsuid, uid)):
        change(wanted)
        # These two report no error: they return the former id, so asking again tells whether the change was made.
        if change(wanted) != wanted:
            raise PermissionError(f"the rights of user {uid} cannot be taken")
