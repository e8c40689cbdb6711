"""Serving one image by NBD, read-only, until a signal ends it."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import trio

from qedfs.backing.base import Source
from qedfs.backing.file import FileSource
from qedfs.backing.locate import Reference, open_backing
from qedfs.backing.policy import Policy
from qedfs.errors import UsageError
from qedfs.nbd.errors import NbdTlsFailed
from qedfs.nbd.listeners import open_tcp_listeners, open_unix_listener
from qedfs.nbd.server import serve
from qedfs.nbd.tls import server_context
from qedfs.report.mounted import is_mounted


@dataclass(frozen=True)
class Service:
    """What is served where: on the unix socket `socket_path` (of mode 0600), or on `host` and `port`.

    `certificates` is the folder of the certificates for TLS, or None for open connections; with `verify_peer` clients must
    have one, too.
    """

    image: str
    format: str | None
    name: str
    socket_path: str | None
    host: str
    port: int
    insecure: bool
    certificates: str | None = None
    verify_peer: bool = False
    secret: bytes | None = None
    """The passphrase of encrypted images."""


async def serve_image(service: Service, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; call `ready` with the URI of the export once clients can connect.

    Raises:
        UsageError: the place cannot be listened on, or would be open to others without TLS or `insecure`; a certificate
            cannot be used.
        BackingError: the image cannot be opened.
    """
    tls = await trio.to_thread.run_sync(_tls, service)
    if service.socket_path is None and not service.insecure and tls is None:
        await _refuse_beyond_loopback(service.host)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        source = await _open(service)
        try:
            async with trio.open_nursery() as nursery:
                listeners = await _listen(service)
                await nursery.start(
                    lambda task_status: serve(source, listeners, name=service.name, tls=tls, task_status=task_status)
                )
                ready(_uri(service, listeners[0]))
                async for _ in signals:
                    break
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await source.aclose()


def _tls(service: Service) -> ssl.SSLContext | None:
    if service.certificates is None:
        return None
    try:
        return server_context(service.certificates, verify_peer=service.verify_peer)
    except NbdTlsFailed as error:
        raise UsageError("--tls-certificates", error.why) from error


async def _open(service: Service) -> Source:
    path = os.path.abspath(service.image)  # noqa: ASYNC240 (asks only for the working directory)
    if await trio.to_thread.run_sync(is_mounted, path):
        # No lock: a guest may be running on it, and that is what it is for.
        return await trio.to_thread.run_sync(_open_mounted, path)
    return await open_backing(Reference(path, service.format, path), Policy(mounter=os.getuid(), secret=service.secret))


def _open_mounted(path: str) -> Source:
    try:
        return FileSource(os.open(path, os.O_RDONLY | os.O_CLOEXEC), path, steady=False)
    except OSError as error:
        raise UsageError(path, f"cannot be opened ({os.strerror(error.errno or 0)})") from error


async def _listen(service: Service) -> list[trio.SocketListener]:
    if service.socket_path is not None:
        return [await open_unix_listener(Path(service.socket_path))]
    return await open_tcp_listeners(service.host, service.port)


async def _refuse_beyond_loopback(host: str) -> None:
    try:
        found = await trio.socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UsageError(host, f"is no address to listen on ({error})") from error
    for *_, address in found:
        if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
            raise UsageError(
                host or str(address[0]),
                "anybody who can reach this address could read the image (--tls-certificates encrypts, --insecure allows it)",
            )


def _uri(service: Service, listener: trio.SocketListener) -> str:
    name = quote(service.name, safe="")
    scheme = "nbd" if service.certificates is None else "nbds"
    if service.socket_path is not None:
        return f"{scheme}+unix:///{name}?socket={quote(os.path.abspath(service.socket_path))}"
    host, port = listener.socket.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/{name}"
