"""nginx for tests: the files of a folder by http and https, and a proxy for both."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from contrib.boot.server import free_port
from tests.nbd.certificates import Authority

_CONFIG = """
daemon off; {user} worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
  log_format counts "$connection $body_bytes_sent"; access_log {folder}/access.log counts; sendfile on;
  client_body_temp_path {folder}/tmp; proxy_temp_path {folder}/tmp; fastcgi_temp_path {folder}/tmp;
  uwsgi_temp_path {folder}/tmp; scgi_temp_path {folder}/tmp;
  server {{
    listen 127.0.0.1:{http}; listen 127.0.0.1:{https} ssl;
    ssl_certificate {pki}/server-cert.pem; ssl_certificate_key {pki}/server-key.pem;
    root {files}; {options}
  }}
{more}
}}
"""


@dataclass
class Web:
    """A running nginx. `url` and `secure` are the addresses of the folder `files`, `authority` the file to believe."""

    files: Path
    folder: Path
    http: int
    https: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    @property
    def secure(self) -> str:
        return f"https://127.0.0.1:{self.https}"

    @property
    def authority(self) -> Path:
        return self.folder / "pki" / "ca-cert.pem"

    def put(self, name: str, content: bytes) -> None:
        """Replace the file called `name` as a careful writer does."""
        path = self.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(path.name + ".new")
        new.write_bytes(content)
        new.rename(path)

    def requests(self) -> int:
        """How many have been answered so far."""
        return len((self.folder / "access.log").read_text().splitlines())

    def connections(self) -> int:
        """How many have carried a request so far."""
        return len({line.split()[0] for line in (self.folder / "access.log").read_text().splitlines()})

    def sent(self) -> int:
        """How many bytes of files have gone out so far."""
        return sum(int(line.split()[1]) for line in (self.folder / "access.log").read_text().splitlines())

    def start(self) -> None:
        self.process = subprocess.Popen(["nginx", "-e", self.folder / "error.log", "-c", self.folder / "nginx.conf"])
        until = time.monotonic() + 20
        while True:
            assert self.process.poll() is None, (self.folder / "error.log").read_text()
            assert time.monotonic() < until, "nginx does not listen"
            try:
                socket.create_connection(("127.0.0.1", self.http)).close()
                return
            except ConnectionRefusedError:
                time.sleep(0.01)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(timeout=10)
            self.process = None


@contextmanager
def nginx(folder: Path, options: str = "", more: Callable[[Web], str] | None = None) -> Iterator[Web]:
    """Serve the files below `folder`/files until the end of the block.

    `options` are more words about that server, `more` returns others beside it.
    """
    web = Web(folder / "files", folder, free_port(), free_port())
    web.files.mkdir()
    (folder / "pki").mkdir()
    Authority().server(folder / "pki")
    # Its workers would be of another user otherwise, and pytest's folders are for us alone.
    user = "user root;" if os.getuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        _CONFIG.format(
            user=user,
            folder=folder,
            files=web.files,
            pki=folder / "pki",
            http=web.http,
            https=web.https,
            options=options,
            more=more(web) if more else "",
        )
    )
    web.start()
    try:
        yield web
    finally:
        web.stop()
