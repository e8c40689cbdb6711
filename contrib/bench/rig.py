"""What the streaming benchmarks measure with: base images, servers, mounts of qedfs, and QEMU as a peer."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from contrib.boot.server import free_port, listens

MIB = 1 << 20
PATIENCE = 900.0
"""Seconds for anything that is waited for."""
QEDFS = (sys.executable, "-m", "qedfs")
CLUSTER = 64 << 10


class BenchError(Exception):
    """Something did not do what a measurement needs."""


def run(*command: str | Path) -> str:
    """Run a command to its end and return what it printed; raise with its words when it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode:
        raise BenchError(f"{' '.join(words)}: exit {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def until(condition: Callable[[], bool], what: str, pause: float = 0.005) -> None:
    """Wait for a condition, looked at each `pause` seconds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise BenchError(f"{what}: not within {PATIENCE:.0f} s")
        time.sleep(pause)


def make_random(path: Path, size: int) -> None:
    """Write `size` bytes of noise, a multiple of 1 MiB; they stay in the page cache."""
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))


def make_scattered(path: Path, size: int, data: int, seed: int = 1) -> None:
    """Make a file of `size` bytes that is a hole but for `data` bytes of noise, in pieces of 256 KiB all over it."""
    piece = 4 * CLUSTER
    chance = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for place in sorted(chance.sample(range(size // piece), data // piece)):
            file.seek(place * piece)
            file.write(os.urandom(piece))


@contextlib.contextmanager
def nbd_server(folder: Path) -> Iterator[Path]:
    """Serve each file of `folder` by nbdkit under its name, read-only and with its holes; yield the unix socket."""
    sock = folder.with_suffix(".socket")
    command = ("nbdkit", "--foreground", "--readonly", "--unix", str(sock), "file", f"dir={folder}")
    with subprocess.Popen(command) as process:
        try:
            until(lambda: listens(sock) or process.poll() is not None, "nbdkit")
            yield sock
        finally:
            process.terminate()


NGINX = """
daemon off; {user} worker_processes 1; pid {folder}.pid; error_log stderr error;
events {{ worker_connections 256; }}
http {{
  access_log off; sendfile on; keepalive_requests 1000000;
  client_body_temp_path {folder}.tmp; proxy_temp_path {folder}.tmp; fastcgi_temp_path {folder}.tmp;
  uwsgi_temp_path {folder}.tmp; scgi_temp_path {folder}.tmp;
  server {{ listen 127.0.0.1:{port}; root {folder}; }}
}}
"""


@contextlib.contextmanager
def http_server(folder: Path) -> Iterator[str]:
    """Serve the files of `folder` by nginx; yield the port on this host."""
    port = free_port()
    config = folder.with_suffix(".conf")
    # Its workers would be of another user otherwise, and temporary folders are for us alone.
    user = "user root;" if os.getuid() == 0 else ""
    config.write_text(NGINX.format(user=user, folder=folder, port=port))
    with subprocess.Popen(("nginx", "-c", str(config))) as process:
        try:
            until(lambda: process.poll() is not None or answers(port), "nginx")
            yield str(port)
        finally:
            process.terminate()


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


class Served:
    """One leaf on a mount of qedfs: `file` is its disk."""

    def __init__(self, mountpoint: Path, leaf: Path) -> None:
        self.mountpoint = mountpoint
        self.file = mountpoint / f"{leaf.stem}.raw"

    def get(self, name: str) -> str:
        return os.getxattr(self.file, f"user.qedfs.{name}").decode()

    def set(self, name: str, value: object) -> None:
        os.setxattr(self.file, f"user.qedfs.{name}", str(value).encode())

    def stream(self) -> float:
        """Stream it, and return the seconds until it stands alone."""
        start = time.monotonic()
        self.set("mode", "stream")
        until(lambda: self.get("state") == "complete", "streaming", 0.02)
        return time.monotonic() - start

    def processor(self) -> float:
        """Seconds of processor time that the serving process has used."""
        pid = os.getxattr(self.mountpoint, "user.qedfs.pid").decode()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def mounted(leaf: Path, options: str = "mode=cow", *, idle: str = "always") -> Iterator[Served]:
    """Mount `leaf` by qedfs; it knows nothing of earlier rounds, unless `options` name a boot profile."""
    mountpoint = leaf.with_suffix(".mnt")
    mountpoint.mkdir(exist_ok=True)
    options = f"boot_profile=off,{options},idle={idle},reserve=0"
    run(*QEDFS, "mount", "-o", options, "--log-file", leaf.with_suffix(".log"), leaf, mountpoint)
    try:
        yield Served(mountpoint, leaf)
    finally:
        run(*QEDFS, "unmount", mountpoint)


def fresh_leaf(leaf: Path, backing: str) -> Path:
    """Make an empty leaf over a raw backing, with nothing left of an earlier one."""
    run(*QEDFS, "create", "--force", "-b", backing, "-F", "raw", leaf)
    return leaf


def qemu_stream(leaf: Path, backing: str) -> float:
    """Let `qemu-storage-daemon` stream a fresh leaf, and return the seconds of its job."""
    fresh_leaf(leaf, backing)
    files = {"driver": "qed", "node-name": "disk", "file": {"driver": "file", "filename": str(leaf)}}
    command = ("qemu-storage-daemon", "--blockdev", json.dumps(files), "--chardev", "stdio,id=qmp", "--monitor", "qmp")
    with subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            qmp = _Monitor(process)
            qmp.execute("qmp_capabilities")
            start = time.monotonic()
            qmp.execute("block-stream", device="disk", **{"job-id": "job"})
            qmp.wait("BLOCK_JOB_COMPLETED")
            seconds = time.monotonic() - start
            qmp.execute("quit")
            process.wait(PATIENCE)
            return seconds
        finally:
            process.kill()


class _Monitor:
    """QMP on the standard streams of a process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin
        assert process.stdout
        self._send, self._receive = process.stdin, process.stdout

    def execute(self, command: str, **arguments: Any) -> None:
        self._send.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._send.flush()
        answer = self._next("return", "error")
        if "error" in answer:
            raise BenchError(f"{command}: {answer['error']}")

    def wait(self, event: str) -> None:
        while (answer := self._next("event"))["event"] != event:
            pass
        if "error" in answer["data"]:
            raise BenchError(f"{event}: {answer['data']['error']}")

    def _next(self, *kinds: str) -> dict[str, Any]:
        for line in self._receive:
            answer: dict[str, Any] = json.loads(line)
            if any(kind in answer for kind in kinds):
                return answer
        raise BenchError("qemu-storage-daemon has ended")


def need(*programs: str) -> None:
    """Refuse to begin without a program."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise BenchError(f"missing: {', '.join(missing)}")
