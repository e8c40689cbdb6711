from __future__ import annotations

import mmap
import os
import socket
import struct
import subprocess

import pytest

from qedfs.fuse.handshake import Handshake, completed
from tests.fuse.conftest import Mount

KILLPRIV_V2 = 1 << 28
INIT = struct.Struct(
    "<IIQQIIIIIIII"
)  # header: length, opcode, unique, node, uid, gid, pid, padding; major, minor, readahead, flags
ANSWER = struct.Struct(
    "<IiQIIIIHHI"
)  # header: length, error, unique; major, minor, readahead, flags, background, congestion, write


def init(flags: int) -> bytes:
    return INIT.pack(INIT.size, 26, 2, 0, 0, 0, 0, 0, 7, 45, 1 << 17, flags)


def answer(flags: int, error: int = 0) -> bytes:
    return ANSWER.pack(ANSWER.size, error, 2, 7, 31, 1 << 17, flags, 0, 0, 1 << 20)


def test_the_wishes_are_added_and_nothing_else_changes() -> None:
    result = completed(init(KILLPRIV_V2 | 0xFF), answer(0x39), 2048, 1536)
    length, error, unique, major, minor, readahead, flags, background, congestion, write = ANSWER.unpack(result)
    assert (length, error, unique, major, minor, write) == (ANSWER.size, 0, 2, 7, 31, 1 << 20)
    assert flags == 0x39 | KILLPRIV_V2
    assert (background, congestion) == (2048, 1536)
    assert readahead >= 1 << 20


def test_a_kernel_that_does_not_know_the_wish_is_not_asked() -> None:
    flags = ANSWER.unpack(completed(init(0xFF), answer(0x39), 2048, 1536))[6]
    assert flags == 0x39


@pytest.mark.parametrize("refusal", [answer(0, error=-71), answer(0)[:24]])
def test_a_refusal_is_passed_on_as_it_is(refusal: bytes) -> None:
    assert completed(init(KILLPRIV_V2), refusal, 2048, 1536) == refusal


def test_libfuse_answers_through_a_socket_and_then_has_the_device() -> None:
    kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel:
        kernel.send(init(KILLPRIV_V2))
        handshake = Handshake(device.detach(), max_background=8, congestion_threshold=6)
        libfuse = int(handshake.mountpoint.removeprefix("/dev/fd/"))
        try:
            assert os.read(libfuse, 4096) == init(KILLPRIV_V2)
            assert not handshake.finish()  # it has not answered yet
            os.write(libfuse, answer(0x39))
            assert handshake.finish()
            assert ANSWER.unpack(kernel.recv(4096))[6] == 0x39 | KILLPRIV_V2
            kernel.send(b"the next request")
            assert os.read(libfuse, 4096) == b"the next request"
            assert not os.get_inheritable(libfuse)
            handshake.close()  # a second time does nothing
        finally:
            os.close(libfuse)


def test_the_kernel_does_not_ask_for_capabilities_before_every_write(mount: Mount) -> None:
    mounted = mount()
    trace = subprocess.Popen(
        ["strace", "-f", "-e", "trace=read", "-s", "100", "-p", str(mounted.process.pid)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert trace.stderr
    try:
        assert "attached" in trace.stderr.readline()
        block = mmap.mmap(-1, 4096)
        with open(os.open(mounted.file(), os.O_RDWR | os.O_DIRECT), "r+b", buffering=0) as file:
            for number in range(100):
                file.seek(number * 4096)
                assert file.write(block) == 4096
    finally:
        trace.terminate()
        seen = trace.communicate(timeout=30)[1]
    # Once, and again whenever the kernel has looked at the file's status anew, which it does every second.
    assert seen.count("read(") > 100
    assert seen.count("security.capability") < 20
