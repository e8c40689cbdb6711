"""What a program can still do in the jail: a Python in the place of QEMU tries, and tells over the socket it was given."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qedfs.backing import jail

MEMORY = 256 << 20
PYTHON = os.path.realpath("/usr/bin/python3")
"""That of the system: one in a virtual environment lies where nothing may be read."""

TRIES = {
    "read a file": "open({file!r}).read()",
    "read a file that everybody may read": "open('/etc/passwd').read()",
    "read it by a link": "open('/proc/self/root/etc/passwd').read()",
    "list a folder": "os.listdir('/etc')",
    "write a file": "open('/tmp/qedfs-jail-test', 'w')",
    "remove a file": "os.unlink({file!r})",
    "look into the process that started it": "open('/proc/' + str(os.getppid()) + '/mem', 'rb')",
    "end the process that started it": "os.kill(os.getppid(), 0)",
    "make a socket": "socket.socket(socket.AF_INET)",
    "make a local socket": "socket.socket(socket.AF_UNIX)",
    "connect what it was given": "given.connect({address!r})",
    "become root": "os.setuid(0)",
    "trace": "ctypes.CDLL(None, use_errno=True).ptrace(16, os.getppid(), 0, 0) == -1 and fail()",
}


def jailed(program: str, *, parent: int | None = None) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    arguments = [str(os.getpid() if parent is None else parent), str(MEMORY), str(theirs.fileno()), "--"]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", jail.__file__, *arguments, PYTHON, "-I", "-S", "-c", program],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    theirs.close()
    ours.settimeout(20)
    return process, ours


def said(program: str) -> str:
    """What `program` has sent to its descriptor 3."""
    process, ours = jailed(program)
    with process, ours:
        answer = b""
        while piece := ours.recv(4096):
            answer += piece
        assert process.wait(20) == 0, process.stderr and process.stderr.read()
        return answer.decode()


@pytest.mark.parametrize("what", TRIES)
def test_nothing_can_be_reached(tmp_path: Path, what: str) -> None:
    assert os.geteuid() == 0, "as root the test shows more: even root's rights are gone"
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o666)
    attempt = TRIES[what].format(file=str(secret), address=str(tmp_path / "socket"))
    program = f"""
import ctypes, os, socket
given = socket.socket(fileno=3)
def fail():
    raise OSError(ctypes.get_errno(), "")
try:
    {attempt}
    given.send(b"done")
except OSError as error:
    given.send(type(error).__name__.encode())
"""
    assert said(program) == "PermissionError"
    assert secret.read_text() == "secret"


def test_what_it_needs_it_has() -> None:
    program = """
import os, socket, zlib
given = socket.socket(fileno=3)
os.urandom(1), open("/dev/null"), open("/usr/bin/python3", "rb").read(1)
assert os.environ["LISTEN_FDS"] == "1" and int(os.environ["LISTEN_PID"]) == os.getpid()
given.send(str(os.getuid()).encode())
"""
    assert said(program) == str(jail.NOBODY if os.getuid() == 0 else os.getuid())


def test_memory_is_bounded() -> None:
    program = f"""
import socket
given = socket.socket(fileno=3)
try:
    bytearray({MEMORY})
except MemoryError:
    given.send(b"no")
"""
    assert said(program) == "no"


def test_without_whoever_wanted_it_nothing_is_started() -> None:
    process, ours = jailed("pass", parent=os.getppid())
    with process, ours:
        assert process.wait(20) == 125
        assert process.stderr is not None
        assert process.stderr.read() == b"cannot be confined: whoever wanted it has gone\n"


def test_it_ends_with_whoever_started_it() -> None:
    # One between us and the program, which is killed before anybody has connected.
    between = f"""
import os, subprocess, sys, time
arguments = [sys.executable, "-I", "-S", {jail.__file__!r}, str(os.getpid()), "{MEMORY}", "0", "--"]
subprocess.Popen([*arguments, {PYTHON!r}, "-c", "import time; print(1, flush=True); time.sleep(100)"])
time.sleep(100)
"""
    with subprocess.Popen(
        [sys.executable, "-c", between], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        process.kill()
        before = time.monotonic()
        assert process.stdout.read() == b""  # the last one that holds the pipe has ended
        assert time.monotonic() - before < 20
