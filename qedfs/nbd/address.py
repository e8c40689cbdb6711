"""NBD addresses: the URIs of the NBD project and QEMU's older `nbd:` spellings.

    nbd://HOST[:PORT]/[EXPORT]           nbd+tcp:// is the same; nbds:// with TLS
    nbd+unix:///[EXPORT]?socket=PATH     nbds+unix:// with TLS
    nbd:HOST:PORT[:exportname=EXPORT]    the port is a must here; nothing is percent-decoded
    nbd:unix:PATH[:exportname=EXPORT]

After the `?` of a URI with TLS, as in the NBD URI specification and libnbd:

    tls-hostname=NAME       what the server's certificate is to say, instead of HOST (for a socket: of "localhost")
    tls-certificates=DIR    an absolute folder with ca-cert.pem and, to show who we are, client-cert.pem and client-key.pem

The certificate is always verified, so `tls-verify-peer` may only say what holds anyway.

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
_TLS_PARAMETERS = ("tls-hostname", "tls-certificates", "tls-verify-peer")
_NO_PARAMETERS = "parameters after '?' are not understood for TCP, but for those of TLS in nbds://"
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
    hostname: str = ""
    """What the server's certificate has to say, if that is not `host`."""
    certificates: str = ""
    """The folder of the certificates to use, or empty for those of the machine."""

    @property
    def verified_name(self) -> str:
        """The name or address that the server's certificate is verified for."""
        return self.hostname or self.host or "localhost"

    def __str__(self) -> str:
        """Return the canonical URI. It holds no credentials, as none are taken, and is printable as it is quoted."""
        scheme = "nbds" if self.tls else "nbd"
        parameters = {"socket": self.socket, "tls-hostname": self.hostname, "tls-certificates": self.certificates}
        query = "&".join(
            f"{key}={quote(value, errors='surrogateescape')}" for key, value in parameters.items() if value
        )
        if self.socket is not None:
            return f"{scheme}+unix:///{quote(self.export)}?{query}"
        host = f"[{self.host}]" if self.host and ":" in self.host else self.host
        port = "" if self.port == DEFAULT_PORT else f":{self.port}"
        return f"{scheme}://{host}{port}/{quote(self.export)}{'?' + query if query else ''}"


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
    parameters = _parameters(parts.query, unix=transport == "unix", tls=tls)
    hostname, certificates = parameters.get("tls-hostname", ""), parameters.get("tls-certificates", "")
    if transport == "unix":
        if parts.netloc:
            raise ValueError("a unix socket has no host: write three slashes, nbd+unix:///EXPORT?socket=PATH")
        return NbdAddress(tls, None, 0, parameters["socket"], export, hostname, certificates)
    if not parts.hostname:
        raise ValueError("the host is missing")
    try:
        port = DEFAULT_PORT if parts.port is None else parts.port
    except ValueError:
        # Not what it is instead, which may be half a password.
        raise ValueError("the port is no number from 1 to 65535") from None
    return NbdAddress(tls, unquote(parts.hostname, errors="strict"), port, None, export, hostname, certificates)


def _parameters(query: str, *, unix: bool, tls: bool) -> dict[str, str]:
    """Return what is behind the `?`; ValueError: something is missing, or is there that we do not understand."""
    pairs = parse_qsl(query, keep_blank_values=True, errors="strict")
    found = dict(pairs)
    if len(found) != len(pairs) or unix != ("socket" in found):
        raise ValueError("expected ?socket=PATH once after the export" if unix else _NO_PARAMETERS)
    known = {"socket", *_TLS_PARAMETERS} if tls else {"socket"}
    if "tls-psk-file" in found:
        raise ValueError("pre-shared keys (tls-psk-file) are not supported; use certificates")
    if found.keys() - known:
        raise ValueError("expected ?socket=PATH and nothing else after the export" if unix else _NO_PARAMETERS)
    if found.get("tls-verify-peer", "1") not in ("1", "true"):
        raise ValueError("the server's certificate is always verified (tls-verify-peer)")
    if "tls-hostname" in found and not _HOST.fullmatch(found["tls-hostname"]):
        raise ValueError("tls-hostname is no name or address")
    if not found.get("tls-certificates", "/").startswith("/"):
        raise ValueError("tls-certificates needs an absolute path")
    return found


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
    if "\0" in address.export + (address.host or "") + (address.socket or "") + address.certificates:
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
