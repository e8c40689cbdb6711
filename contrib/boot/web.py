"""A compressed qcow2 of an image on an nginx that speaks TLS: the way of a base that is published, to a leaf that is local."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from contrib.boot.guest import BootError, run
from contrib.boot.server import free_port

SERVER = "nginx"
NAME = "base.qcow2"
PATIENCE = 20.0
"""Seconds in which nginx has to listen."""
CONFIG = """
daemon off; {user} worker_processes 1; pid {folder}/pid; error_log stderr error;
events {{ worker_connections 256; }}
http {{
  access_log off; sendfile on;
  client_body_temp_path {folder}/tmp; proxy_temp_path {folder}/tmp; fastcgi_temp_path {folder}/tmp;
  uwsgi_temp_path {folder}/tmp; scgi_temp_path {folder}/tmp;
  server {{
    listen 127.0.0.1:{port} ssl; ssl_certificate {folder}/certificate; ssl_certificate_key {folder}/key;
    location = /{name} {{ alias {folder}/{name}; }}
  }}
}}
"""


@contextmanager
def serving(image: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Convert the raw `image` and serve it from a new folder in `folder`; gives the URL, and the certificate to believe.

    Raises:
        BootError: a tool is missing or fails.
    """
    place = folder / "web"
    place.mkdir()
    run("qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", "-c", image, place / NAME)
    make_certificate(place)
    port = free_port()
    # Workers of another user could not read what is for us alone.
    user = "user root;" if os.getuid() == 0 else ""
    (place / "conf").write_text(CONFIG.format(user=user, folder=place, port=port, name=NAME))
    try:
        process = subprocess.Popen([SERVER, "-e", "stderr", "-c", place / "conf"])
    except FileNotFoundError as error:
        raise BootError(f"{SERVER}: not installed") from error
    try:
        wait_until_it_listens(process, port)
        yield f"https://127.0.0.1:{port}/{NAME}", place / "certificate"
        if process.poll() is not None:
            raise BootError(f"{SERVER}: ended by itself with status {process.returncode}")
    finally:
        process.terminate()
        process.wait()


def make_certificate(place: Path) -> None:
    """Make a certificate for 127.0.0.1 that has signed itself."""
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", place / "key")
    name = ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1")
    run("openssl", "req", "-x509", "-days", "2", *key, *name, "-out", place / "certificate")


def wait_until_it_listens(process: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            if process.poll() is not None or time.monotonic() > until:
                raise BootError(f"{SERVER}: does not listen") from None
            time.sleep(0.01)
        else:
            return
