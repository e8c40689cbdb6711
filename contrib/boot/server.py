"""An NBD server over a raw image, by QEMU or nbdkit, that listens before it runs and ends with the block that started it."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from contrib.boot.guest import BootError

EXPORT = "base"
SERVERS = {
    # Persistent, and open to as many connections as a client may want.
    "qemu-nbd": ("qemu-nbd", "--read-only", "--persistent", "--shared=16", "--format=raw", f"--export-name={EXPORT}"),
    "nbdkit": ("nbdkit", "--foreground", "--readonly", "file"),
}
TRANSPORTS = ("unix", "tcp")

# Socket activation: the server finds our listening socket as descriptor 3, so no port is guessed and nobody waits for it.
ACTIVATION = 'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&0 </dev/null'


_kept: list[socket.socket] = []
"""Of `free_port`."""


def free_port() -> int:
    """Return a TCP port of loopback for a server that sets SO_REUSEADDR, as servers do.

    The kernel gives it to nobody who asks for any port as long as this process lives.
    """
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    _kept.append(kept)
    port: int = kept.getsockname()[1]
    return port


def listens(path: Path) -> bool:
    """Whether somebody listens on the unix socket `path`, by the kernel's list: the file is there a moment earlier."""
    listening = "00010000"  # flags of a socket: __SO_ACCEPTCON
    lines = (line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines())
    names = {str(path), str(path.absolute())}  # some make it absolute before they bind to it
    return any(len(fields) == 8 and fields[3] == listening and fields[7] in names for fields in lines)


@contextmanager
def serving(image: Path, server: str, transport: str, folder: Path) -> Iterator[str]:
    """Serve `image` read-only, on a free loopback port or on a socket in `folder`; gives the URL of the export."""
    with socket.socket(socket.AF_INET if transport == "tcp" else socket.AF_UNIX) as listening:
        if transport == "tcp":
            listening.bind(("127.0.0.1", 0))
            url = f"nbd://127.0.0.1:{listening.getsockname()[1]}/{EXPORT}"
        else:
            path = folder / "nbd.socket"
            listening.bind(str(path))
            url = f"nbd+unix:///{EXPORT}?socket={quote(str(path))}"
        listening.listen(16)
        command = ["sh", "-c", ACTIVATION, "sh", *SERVERS[server], str(image)]
        process = subprocess.Popen(command, stdin=listening.fileno())
    try:
        yield url
        if process.poll() is not None:
            raise BootError(f"{server}: ended by itself with status {process.returncode}")
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
