"""Sockets to serve on. A unix socket belongs to its owner alone from the moment it exists."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

import trio

from qedfs.errors import UsageError

_BACKLOG = 64
_PROBE_TIMEOUT = 1.0
"""Seconds; a live server whose backlog is full does not answer at once."""


async def open_unix_listener(path: Path, mode: int = 0o600) -> trio.SocketListener:
    """Listen on a unix socket at `path` with the permissions `mode`; a socket left behind by a dead server is replaced.

    Raises:
        UsageError: something else is there, a server is alive there, or the place cannot be used.
    """
    await _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Linux gives the file the mode of the unbound socket, so there is no moment in which others may connect.
        os.fchmod(sock.fileno(), mode)
        sock.bind(os.fspath(path))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise UsageError(str(path), f"cannot listen there: {error.strerror or error}") from error
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


async def open_tcp_listeners(host: str, port: int) -> list[trio.SocketListener]:
    """Listen on every address of `host`; port 0 takes a free one.

    Raises:
        UsageError: the name is unknown or the port cannot be used.
    """
    if not 0 <= port <= 65535:
        # The resolver would take it modulo 65536.
        raise UsageError(f"{host}:{port}", "cannot listen there: a port is at most 65535")
    try:
        return list(await trio.open_tcp_listeners(port, host=host, backlog=_BACKLOG))
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"{host}:{port}", f"cannot listen there: {why}") from error


async def _remove_stale(path: Path) -> None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(str(path), f"cannot listen there: {error.strerror}") from error
    if not stat.S_ISSOCK(found.st_mode):
        raise UsageError(str(path), "exists and is not a socket")
    with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM) as probe:
        try:
            with trio.fail_after(_PROBE_TIMEOUT):
                await probe.connect(os.fspath(path))
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                os.unlink(path)
                return
            raise UsageError(str(path), f"cannot listen there: {error.strerror or error}") from error
        except trio.TooSlowError:
            pass
    raise UsageError(str(path), "another server is listening there")
