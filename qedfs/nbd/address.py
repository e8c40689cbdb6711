"""NBD addresses: the URIs of the NBD project and QEMU's older `nbd:` spellings.

    nbd://HOST[:PORT]/[EXPORT]           nbd+tcp:// is the same; nbds:// with TLS
    nbd+unix:///[EXPORT]?socket=PATH     nbds+unix:// with TLS
    nbd:HOST:PORT[:exportname=EXPORT]    the port is a must here; nothing is percent-decoded
    nbd:unix:PATH[:exportname=EXPORT]

A URI loses exactly one leading slash of its path and is then percent-decoded: `nbd://h//e%2fp` is the export `/e/p`.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from qedfs.nbd.constants import DEFAULT_PORT, MAX_STRING
from qedfs.nbd.errors import AddressInvalid

_SCHEME = re.compile(r"nbds?(\+[a-z0-9.+-]*)?:", re.IGNORECASE)
_HOST = re.compile(r"[\w.-]+|[0-9a-f:.]+(%[\w.-]+)?", re.IGNORECASE)
_SPELLINGS = "nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH, nbd:HOST:PORT or nbd:unix:PATH"
_MAX_SOCKET_PATH = 107
"""Bytes of a unix socket's path on Linux (`sun_path` without its NUL)."""


@dataclass(frozen=True)
class NbdAddress:
    """Where an export is: `host` and `port`, or the path of a unix `socket`; `export` is empty for the default one."""

    tls: bool
    host: str | None
    port: int
    socket: str | None
    export: str

    def __str__(self) -> str:
        """Return the canonical URI. It holds no credentials, as none are taken, and is printable as it is quoted."""
        scheme = "nbds" if self.tls else "nbd"
        if self.socket is not None:
            return f"{scheme}+unix:///{quote(self.export)}?socket={quote(self.socket, errors='surrogateescape')}"
        host = f"[{self.host}]" if self.host and ":" in self.host else self.host
        port = "" if self.port == DEFAULT_PORT else f":{self.port}"
        return f"{scheme}://{host}{port}/{quote(self.export)}"


def is_nbd(name: str) -> bool:
    """Tell whether `name` means an NBD export, well spelt or not; a file of such a name needs `./` in front."""
    return _SCHEME.match(name) is not None


def parse_address(name: str) -> NbdAddress:
    """Parse any spelling of an NBD address.

    Raises:
        AddressInvalid: it is none, or says something we do not understand; the message holds no credentials.
    """
    legacy = name[:4].lower() == "nbd:" and not name[4:].startswith("//")
    try:
        address = _parse_legacy(name[4:]) if legacy else _parse_uri(name)
        _check(address)
    except ValueError as error:
        raise AddressInvalid(re.sub(r"\?.*", "?***", without_user(name), flags=re.DOTALL), str(error)) from None
    return address


def _parse_uri(name: str) -> NbdAddress:
    if not is_nbd(name) or "://" not in name:
        raise ValueError(f"is not an NBD address: expected {_SPELLINGS}")
    parts = urlsplit(name)
    base, _, transport = parts.scheme.partition("+")
    if transport not in ("", "tcp", "unix"):
        raise ValueError(f"the transport {transport!r} is not supported, only TCP and unix sockets are")
    if "@" in parts.netloc:
        raise ValueError("a user name has no meaning in an NBD address")
    if parts.fragment:
        raise ValueError("'#' must be written as %23")
    tls = base == "nbds"
    export = unquote(parts.path.removeprefix("/"), errors="strict")
    if transport == "unix":
        if parts.netloc:
            raise ValueError("a unix socket has no host: write three slashes, nbd+unix:///EXPORT?socket=PATH")
        parameters = parse_qsl(parts.query, keep_blank_values=True, errors="strict")
        if [key for key, _ in parameters] != ["socket"]:
            raise ValueError("expected ?socket=PATH and nothing else after the export")
        return NbdAddress(tls, None, 0, parameters[0][1], export)
    if parts.query:
        raise ValueError("parameters after '?' are not understood for TCP")
    if not parts.hostname:
        raise ValueError("the host is missing")
    try:
        port = DEFAULT_PORT if parts.port is None else parts.port
    except ValueError:
        # Not what it is instead, which may be half a password.
        raise ValueError("the port is no number from 1 to 65535") from None
    return NbdAddress(tls, unquote(parts.hostname, errors="strict"), port, None, export)


def _parse_legacy(rest: str) -> NbdAddress:
    place, marker, export = rest.partition(":exportname=")
    if marker and not export:
        raise ValueError("the name after exportname= is missing")
    if place.startswith("unix:"):
        return NbdAddress(False, None, 0, place.removeprefix("unix:"), export)
    host, colon, port = place.rpartition(":")
    if not colon or not host:
        raise ValueError(f"the host or the port is missing: expected {_SPELLINGS}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("expected HOST:PORT; an IPv6 address needs brackets")
    return NbdAddress(False, host, _port_number(port), None, export)


def _port_number(port: str) -> int:
    if port.isascii() and port.isdigit():
        return int(port)
    try:
        return socket.getservbyname(port, "tcp")
    except OSError:
        raise ValueError("the port is neither a number nor a known service") from None


def _check(address: NbdAddress) -> None:
    if len(address.export.encode()) > MAX_STRING:
        raise ValueError(f"the export name is longer than {MAX_STRING} bytes")
    if "\0" in address.export + (address.host or "") + (address.socket or ""):
        raise ValueError("contains a NUL character")
    if address.socket is None:
        # Other characters could make the canonical URI look like that of another host.
        if not _HOST.fullmatch(address.host or ""):
            raise ValueError("the host is no name or address")
        if not 0 < address.port <= 65535:
            raise ValueError(f"the port {address.port} is not between 1 and 65535")
    elif not address.socket:
        raise ValueError("the path of the socket is missing")
    elif len(address.socket.encode(errors="surrogateescape")) > _MAX_SOCKET_PATH:
        raise ValueError(f"the path of the socket is longer than the {_MAX_SOCKET_PATH} bytes Linux allows")


def without_user(name: str) -> str:
    """Return a URL with what may be a user's name and password masked, also where that is not quoted as it should be.

    A password may hold a `/`, `?` or `#`: what follows a `:` and is no port is taken for one, up to the last `@`.
    """
    name = re.sub(r"//[^/?#@\[]*:(?!\d*(?:[/?#]|$)).*@", "//***@", name, flags=re.DOTALL)
    return re.sub(r"//[^/?#]*@", "//***@", name)
