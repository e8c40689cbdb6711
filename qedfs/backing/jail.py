"""A program of its own: gives up all rights that a reader of hostile images does not need, then becomes that reader.

    python -I -S jail.py PARENT MEMORY FD... -- PROGRAM ARGUMENT...

The descriptors FD, the first of which is a listening socket, become 3, 4, …, and the socket is announced as
sd_listen_fds(3) says. What is left to PROGRAM afterwards, whatever an image makes of it:

- it ends with the thread of process PARENT that started it;
- no privileges to be had by executing something, none of root's if root starts it (it becomes `nobody`), a bounded memory
  (MEMORY bytes), no file written, no core;
- no file or folder opened but programs, libraries and the few things below, and no TCP connection or listener, as far as
  the kernel has Landlock;
- no socket made and none connected, no other process looked into (seccomp; x86_64 and aarch64).

What must hold is enforced or PROGRAM is not run: exit status 125 and a line on standard error. It runs before anything
of qedfs could be imported, and imports nothing of it: a fork of a process with threads may do next to nothing before
`exec`, so what is to happen in between needs a program.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import resource
import signal
import struct
import sys

NOBODY = 65534
_FIRST_FD = 3
_OPEN_FILES = 64

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 38, 22
_SECCOMP_MODE_FILTER = 2

# Landlock's numbers are the same on every machine (linux/landlock.h).
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_GET_VERSION, _PATH_BENEATH = 1, 1
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
"""Everything that a version of Landlock can forbid about files; a later version can forbid no less than the last."""
_TCP_RIGHTS, _ALL_SCOPES = 0b11, 0b11
"""Binding and connecting TCP (version 4); reaching abstract sockets and sending signals (version 6)."""
_READABLE = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/ld.so.preload", "/nix/store", "/gnu/store")
_DEVICES = ("/dev/null", "/dev/urandom")

# seccomp's numbers: socket, connect, bind, ptrace, process_vm_readv, process_vm_writev, pidfd_getfd, open_by_handle_at,
# io_uring_setup (which could make sockets past this filter).
_ARCHITECTURES = {
    "x86_64": (0xC000003E, (41, 42, 49, 101, 310, 311, 438, 304, 425)),
    "aarch64": (0xC00000B7, (198, 203, 200, 117, 270, 271, 438, 265, 425)),
}
_X32 = 0x40000000
"""From this number on, x86_64's calls are those of another table that the filter does not know."""
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # SECCOMP_RET_…; the refusal is EPERM

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def main(arguments: list[str]) -> None:
    """Do what the module says. Returns only by exceptions."""
    split = arguments.index("--")
    parent, memory, *fds = map(int, arguments[:split])
    command = arguments[split + 1 :]
    _place(fds)
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    # Ordering: a change of user forgets this wish.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise OSError("whoever wanted it has gone")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _limit(memory)
    _close_files()
    _close_sockets()
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
    os.execv(command[0], command)


def _place(fds: list[int]) -> None:
    """Let the descriptors be 3, 4, … in the program. Through higher numbers, as they may be in each other's way."""
    parked = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FD + len(fds)) for fd in fds]
    for fd in fds:
        os.close(fd)
    for number, fd in enumerate(parked, _FIRST_FD):
        os.dup2(fd, number, inheritable=True)
        os.close(fd)


def _limit(memory: int) -> None:
    for kind, limit in (
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
    ):
        _, most = resource.getrlimit(kind)
        limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(kind, (limit, limit))


def _close_files() -> None:
    """Forbid every file and folder but what the program itself is made of; the descriptors it has stay open."""
    version = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _GET_VERSION)
    if version < 1:
        return  # a kernel without it
    rights = _FILE_RIGHTS[min(version, max(_FILE_RIGHTS))]
    attributes = [rights, _TCP_RIGHTS if version >= 4 else 0, _ALL_SCOPES if version >= 6 else 0]
    size = 8 * (1 if version < 4 else 2 if version < 6 else 3)
    ruleset = _checked(_libc.syscall(_CREATE_RULESET, struct.pack("QQQ", *attributes), ctypes.c_size_t(size), 0))
    for path in _READABLE + _DEVICES:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        allowed = _READ_FILE if not os.path.isdir(path) else _READ_FILE | _READ_DIR | _EXECUTE
        rule = struct.pack("=Qi", allowed, place)
        _checked(_libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0))
        os.close(place)
    _checked(_libc.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _close_sockets() -> None:
    """Refuse the system calls that make or connect sockets or look into other processes."""
    known = _ARCHITECTURES.get(platform.machine())
    if known is None:
        return
    architecture, refused = known
    # offsetof(struct seccomp_data, arch) is 4, that of the number 0. Jumps are counted from the next instruction.
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    program += [(_AT_LEAST, len(refused) + 1, 0, _X32)]
    program += [(_EQUAL, len(refused) - index, 0, number) for index, number in enumerate(refused)]
    program += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    # struct sock_fprog: a length and, aligned as a pointer, the program.
    filter_ = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(filter_))


def _prctl(option: int, *values: int) -> None:
    _checked(_libc.prctl(option, *(ctypes.c_ulong(value) for value in (*values, *[0] * (4 - len(values))))))


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.stderr.write(f"cannot be confined: {error}\n")
        sys.exit(125)
