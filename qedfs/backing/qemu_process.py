"""One `qemu-nbd`: started without any right but to talk over the sockets it is given, told apart from one that hangs, ended.

It opens no file and makes no connection: the bytes of the image and of its backing come over socket pairs from our own
server, and what it makes of them goes out over one socket that it was given listening. `jail.py` takes everything else
from it. It ends

- with us: at `end`; when its only client goes (`--persistent` is not given); and, should we be killed before there was a
  client, by the kernel's signal at the death of our thread. So no orphan is left, whatever kills us;
- by itself, when it refuses the image. Then its last words are the reason.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from typing import Any

import trio

from qedfs.backing import jail
from qedfs.errors import BackingRefused, BackingUnavailable

PROGRAM = "qemu-nbd"
MEMORY = 512 << 20
"""Bytes of data that it may have. Caches of a large qcow2 take some 40 MiB, the rest is what a hostile one may ask for."""
FIRST_IMAGE_FD = 4
"""The first descriptor behind the listening socket, which is 3."""
SECRET_ID = "passphrase"
"""By which a node tree refers to the passphrase."""
_MAX_WORDS = 4096
_UNCONFINED = 125


class QemuProcess:
    """A running `qemu-nbd`. Made by `start`, and to be ended by `end`."""

    def __init__(self, process: subprocess.Popen[bytes], words: int) -> None:
        self._process = process
        self._words = words
        self._pidfd = os.pidfd_open(process.pid)
        self._waiting = trio.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None or self._process.poll() is not None

    async def wait(self) -> None:
        """Wait until it has ended."""
        async with self._waiting:
            if self._pidfd >= 0 and not self.ended:
                await trio.lowlevel.wait_readable(self._pidfd)
            self._process.wait()

    async def end(self) -> None:
        """Kill it and wait for that: it only reads, so there is nothing to be lost. May be called again."""
        self._process.kill()
        with trio.CancelScope(shield=True):
            await self.wait()
        for fd in (self._pidfd, self._words):
            if fd >= 0:
                os.close(fd)
        self._pidfd = self._words = -1

    def why_it_ended(self, name: str, format: str) -> BackingRefused | BackingUnavailable:
        """Return what its end means for the image called `name`. To be called between `wait` and `end`."""
        status = self._process.returncode
        if status is not None and status < 0:
            return BackingUnavailable(name, f"{PROGRAM} was ended by {signal.Signals(-status).name}")
        words = ""
        with contextlib.suppress(BlockingIOError):
            words = os.read(self._words, _MAX_WORDS).decode(errors="replace")
        if status == _UNCONFINED:
            return BackingRefused(name, f"{PROGRAM} {words.strip()}")
        return BackingRefused(name, f"QEMU does not open it as {format}: {reason(words) or f'exit status {status}'}")


def start(
    tree: dict[str, Any], listener: socket.socket, images: list[socket.socket], secret: bytes | None, what: str
) -> QemuProcess:
    """Start it on the node `tree`, in which the sockets `images` are the descriptors from FIRST_IMAGE_FD on.

    `secret`, a passphrase of at most `config.MAX_SECRET` bytes, goes through a pipe: a command line is for everybody to read.
    To be called in the thread that lives as long as the process is to. It takes some milliseconds and does not wait.

    Raises:
        BackingRefused: QEMU is not installed.
        BackingUnavailable: no process can be made now.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise BackingRefused(what, f"its format needs {PROGRAM}, which is not installed (Debian: qemu-utils)")
    fds = [part.fileno() for part in (listener, *images)]
    stdin = subprocess.DEVNULL if secret is None else _pipe_with(secret)
    # Not blocking: what it says into a full pipe is lost, but it never waits.
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    confined = [sys.executable, "-I", "-S", jail.__file__, str(os.getpid()), str(MEMORY), *map(str, fds), "--"]
    known = [] if secret is None else ["--object", f"secret,id={SECRET_ID},file=/dev/stdin"]
    command = [program, "--read-only", "--shared=1", *known, "json:" + json.dumps(tree)]
    try:
        process = subprocess.Popen(
            confined + command,
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=writing,
            pass_fds=fds,
            process_group=0,  # an interrupt from the terminal is for us, who serve on until the last close
            cwd="/",
            env={"PATH": os.defpath, "LC_ALL": "C"},
        )
    except OSError as error:
        os.close(reading)
        kind = BackingUnavailable if error.errno in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE) else BackingRefused
        raise kind(what, f"{PROGRAM} cannot be started ({error.strerror})") from error
    finally:
        os.close(writing)
        if secret is not None:
            os.close(stdin)
    return QemuProcess(process, reading)


def _pipe_with(secret: bytes) -> int:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    os.write(writing, secret)  # does not wait: it fits
    os.close(writing)
    if os.getuid() == 0:
        # It is opened by name there, and by that user.
        os.fchown(reading, jail.NOBODY, -1)
    return reading


def reason(words: str) -> str:
    """Return the reason in what QEMU says, one line without the program's name and the node tree."""
    line = next((line for line in words.splitlines() if line.strip()), "")
    line = re.sub(r"^\S*qemu-nbd: ", "", line)
    return re.sub(r"^Failed to blk_new_open 'json:.*\}': ", "", line).strip()
