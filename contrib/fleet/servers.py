"""The web server that has the base, and the cache of the site, `cache.conf` as it stands but for its places: two nginx."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from contrib.bench.rig import BenchError, answers, until
from contrib.boot.server import free_port

CONFIG = Path(__file__).with_name("cache.conf")
FRAME = """
daemon off; {user} worker_processes 2; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
  sendfile on; client_body_temp_path {folder}/tmp; proxy_temp_path {folder}/tmp; fastcgi_temp_path {folder}/tmp;
  uwsgi_temp_path {folder}/tmp; scgi_temp_path {folder}/tmp;
  {server}
}}
"""
ORIGIN = """
  log_format lines '$status $body_bytes_sent "$http_range"';
  server {{ listen 127.0.0.1:{port}; root {files}; access_log {folder}/access.log lines; }}
"""


class Sent(NamedTuple):
    """What a server has answered: how often, and bytes of bodies."""

    answers: int
    bytes: int

    def __sub__(self, before: Sent) -> Sent:
        return Sent(self.answers - before.answers, self.bytes - before.bytes)


class Nginx:
    """An nginx that can be killed and started again. `port` is on 127.0.0.1."""

    def __init__(self, folder: Path, port: int, server: str) -> None:
        folder.mkdir()
        self.folder = folder
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None
        # Its workers would be of another user otherwise, and temporary folders are for us alone.
        user = "user root;" if os.getuid() == 0 else ""
        (folder / "nginx.conf").write_text(FRAME.format(user=user, folder=folder, server=server))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[Nginx]:
        self.start()
        try:
            yield self
        finally:
            self.kill()

    def start(self) -> None:
        command = ("nginx", "-e", str(self.folder / "error.log"), "-c", str(self.folder / "nginx.conf"))
        # A group of its own: a master that is killed leaves its workers, who would go on.
        self._process = process = subprocess.Popen(command, start_new_session=True)
        until(lambda: process.poll() is not None or answers(self.port), "nginx")
        if process.poll() is not None:
            raise BenchError(f"nginx: {(self.folder / 'error.log').read_text().strip()}")

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def log(self) -> list[list[str]]:
        """Return the words of each line about a request that has been answered."""
        file = self.folder / "access.log"
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def origin(folder: Path, files: Path) -> Nginx:
    """Return a server of the folder `files`."""
    port = free_port()
    return Nginx(folder, port, ORIGIN.format(folder=folder, files=files, port=port))


def sent(server: Nginx) -> Sent:
    """Return what an `origin` has answered so far, over all its starts."""
    lines = server.log()
    return Sent(len(lines), sum(int(line[1]) for line in lines))


def cache(folder: Path, target: int, *, slice: int = 1 << 20, lock: bool = True) -> Nginx:
    """Return the cache of `cache.conf`, with slices of so many bytes, in front of the origin on port `target`.

    `lock`: whether what is on its way already is waited for, as it is there.
    """
    port = free_port()
    changes = {
        "/var/cache/nginx/qedfs ": f"{folder}/slices ",
        "/var/log/nginx/qedfs.log": f"{folder}/access.log",
        "listen 80;": f"listen 127.0.0.1:{port};",
        "server origin.example:443;": f"server 127.0.0.1:{target};",
        "https://qedfs_origin": "http://qedfs_origin",
        "slice 1m;": f"slice {slice};",
        "min_free=10g": "min_free=0",
    }
    if not lock:
        changes["proxy_cache_lock on;"] = ""
    text = CONFIG.read_text()
    for old, new in changes.items():
        if old not in text:
            raise BenchError(f"{CONFIG.name}: does not say {old!r} any more")
        text = text.replace(old, new)
    return Nginx(folder, port, text)
