"""What a service manager is told, by real processes over a real socket in its place."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from qedfs.session.notify import Manager
from tests.failing.rig import PATIENCE, QEDFS, ROOT, run

CLUSTER = 65536


class Told(NamedTuple):
    """One message, by the process `pid`; a descriptor that came with it is `held`, as a manager would until it has read on."""

    text: str
    pid: int
    held: int | None


class Listener:
    """In the place of a manager, at the address `name` as NOTIFY_SOCKET says it."""

    def __init__(self, receiving: socket.socket, name: str) -> None:
        self.name = name
        self._receiving = receiving
        receiving.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        receiving.settimeout(PATIENCE)

    def next(self) -> Told:
        data, messages, _, _ = self._receiving.recvmsg(4096, 256)
        pid, held = 0, None
        for _, kind, content in messages:
            if kind == socket.SCM_RIGHTS:
                (held,) = struct.unpack("i", content[:4])
            elif kind == socket.SCM_CREDENTIALS:
                pid = struct.unpack("iII", content)[0]
        return Told(data.decode(), pid, held)

    def until(self, text: str) -> list[str]:
        """Return all messages up to the one that begins with `text`."""
        seen = [self.next().text]
        while not seen[-1].startswith(text):
            seen.append(self.next().text)
        return seen


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Listener]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@qedfs-test-{os.getpid()}-{tmp_path.name}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiving:
        receiving.bind(name.replace("@", "\0"))
        yield Listener(receiving, name)


def environment(listener: Listener) -> dict[str, str]:
    return os.environ | {"NOTIFY_SOCKET": listener.name, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def leaf(tmp_path: Path) -> Path:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "base.raw").write_bytes(os.urandom(64 * CLUSTER))
    run(*QEDFS, "create", "-b", tmp_path / "base.raw", "-F", "raw", tmp_path / "vm.qed")
    return tmp_path / "vm.qed"


@contextlib.contextmanager
def in_foreground(listener: Listener, leaf: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    more = [argument for option in options for argument in ("-o", option)]
    command = [*QEDFS, "mount", "-f", *more, "--log-file", f"{leaf}.log", str(leaf), str(leaf.parent / "mnt")]
    with subprocess.Popen(command, env=environment(listener)) as server:
        try:
            yield server
        finally:
            server.terminate()
            server.wait(PATIENCE)


def test_mount_in_the_foreground_tells_ready_progress_and_end(listener: Listener, leaf: Path) -> None:
    with in_foreground(listener, leaf, "mode=stream,stream_rate=512k,idle=always") as server:
        ready = listener.next()
        assert (ready.text, ready.pid) == ("READY=1", server.pid)
        assert os.listdir(leaf.parent / "mnt") == ["vm.raw"]
        status = listener.next().text
        assert status.startswith("STATUS=1 image; streaming 1: ")
        assert "% local" in status
        os.setxattr(leaf.parent / "mnt" / "vm.raw", "user.qedfs.stream_rate", b"0")
        assert listener.until("STATUS=1 image, 1 complete")[-1] == "STATUS=1 image, 1 complete"
        run(*QEDFS, "unmount", leaf.parent / "mnt")
        assert listener.next().text == "STOPPING=1"
        assert server.wait(PATIENCE) == 0


def test_mount_in_the_background_is_told_of_by_the_process_that_was_started(listener: Listener, leaf: Path) -> None:
    mountpoint = leaf.parent / "mnt"
    command = [*QEDFS, "mount", "--log-file", f"{leaf}.log", str(leaf), str(mountpoint)]
    with subprocess.Popen(command, env=environment(listener)) as started:
        usable = listener.next()
        server = int(os.getxattr(mountpoint, "user.qedfs.pid"))
        assert (usable.text, usable.pid) == (f"MAINPID={server}\nREADY=1", started.pid)
        barrier = listener.next()
        assert barrier.text == "BARRIER=1"
        assert barrier.held is not None
        # It waits until the manager has read everything.
        with pytest.raises(subprocess.TimeoutExpired):
            started.wait(0.2)
        os.close(barrier.held)
        assert started.wait(PATIENCE) == 0
    os.kill(server, signal.SIGTERM)
    ending = listener.next()
    assert (ending.text, ending.pid) == ("STOPPING=1", server)
    wait_gone(server)


def test_failed_start_tells_nothing(listener: Listener, leaf: Path) -> None:
    command = [*QEDFS, "mount", "-f", str(leaf), str(leaf.parent / "no-such-folder")]
    assert subprocess.run(command, env=environment(listener), capture_output=True, check=False).returncode == 1
    Manager(listener.name).status("nothing before this")
    assert listener.next().text == "STATUS=nothing before this"


def test_programs_that_read_a_backing_do_not_inherit_the_socket(listener: Listener, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "base.qcow2", "1M")
    run(*QEDFS, "create", "-b", tmp_path / "base.qcow2", tmp_path / "vm.qed")
    with in_foreground(listener, tmp_path / "vm.qed") as server:
        assert listener.next().text == "READY=1"
        children = psutil.Process(server.pid).children(recursive=True)
        assert any("qemu-nbd" in child.name() for child in children)
        for child in children:
            assert b"NOTIFY_SOCKET" not in Path(f"/proc/{child.pid}/environ").read_bytes()


def test_manager_that_has_gone_changes_nothing(tmp_path: Path, leaf: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiving:
        receiving.bind(str(tmp_path / "gone"))
        listener = Listener(receiving, str(tmp_path / "gone"))
    command = [*QEDFS, "mount", "--log-file", f"{leaf}.log", str(leaf), str(leaf.parent / "mnt")]
    begun = time.monotonic()
    done = subprocess.run(command, env=environment(listener), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - begun < PATIENCE / 2
    run(*QEDFS, "unmount", leaf.parent / "mnt")
    assert "ERROR" not in Path(f"{leaf}.log").read_text()


def test_serve_tells_when_clients_can_connect(listener: Listener, leaf: Path) -> None:
    path = leaf.parent / "nbd"
    command = [sys.executable, "-m", "qedfs", "serve", "--socket", str(path), str(leaf)]
    with subprocess.Popen(command, env=environment(listener), stdout=subprocess.DEVNULL) as server:
        ready = listener.next()
        assert (ready.text, ready.pid) == ("READY=1", server.pid)
        assert path.is_socket()
        server.terminate()


@pytest.mark.parametrize("name", ["", "vsock:2:1234", "relative"])
def test_nobody_is_told_where_no_address_is_one(name: str) -> None:
    manager = Manager.named_by({"NOTIFY_SOCKET": name})
    assert not manager.listens
    manager.served_by(1)


def wait_gone(pid: int) -> None:
    """Return when the process `pid`, which need not be a child, has ended."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            waiting = select.poll()
            waiting.register(fd, select.POLLIN)
            assert waiting.poll(PATIENCE * 1000)
        finally:
            os.close(fd)
