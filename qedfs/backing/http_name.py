"""Names of files on web servers: `http://HOST[:PORT]/PATH[?QUERY]`, `https://…`. Sans-IO.

A query may be a signature that lets its holder read the file, so it is never shown; credentials of our own do not belong
in a name at all, as names are stored in images. The canonical URL, which `allow_backing` is matched against, has the
scheme and the host in small letters, the port only if it is not the scheme's own, the path percent-encoded and `?***` for
a query. `.` and `..` are refused in every spelling: what a server makes of them would not be what was matched.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import quote, unquote

from qedfs.errors import BackingRefused

PORTS = {"http": 80, "https": 443}
_NAME = re.compile(r"(https?)://([^/?#]*)([^?#]*)(\?[^#]*)?(#.*)?", re.IGNORECASE | re.DOTALL)
_AUTHORITY = re.compile(r"([a-z0-9_.-]+|\[[0-9a-f:.]+(?:%[a-z0-9_.-]+)?\])(?::([0-9]{0,5}))?", re.IGNORECASE)
_STRAY_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_ENCODED = re.compile(r"%[0-9a-f]{2}", re.IGNORECASE)
_IN_PATH = "/%:@!$&'()*+,;=~"
_MAX_URL = 8192
"""Bytes; servers take no longer ones."""


@dataclass(frozen=True)
class HttpLocation:
    """A file on a web server. `path` begins with a slash; it and `query` are percent-encoded, an empty one is none."""

    scheme: str
    host: str
    port: int
    path: str
    query: str = field(default="", repr=False)
    format: str | None = None

    def __str__(self) -> str:
        return self._origin + self.path + ("?***" if self.query else "")

    @property
    def url(self) -> str:
        """What is asked for, query and all: not to be shown."""
        return self._origin + self.path + (f"?{self.query}" if self.query else "")

    @property
    def origin(self) -> tuple[str, str, int]:
        """Whom credentials are for: they are never sent to another."""
        return self.scheme, self.host, self.port

    def beside(self, path: str, shown: str) -> HttpLocation:
        """Return the file that the image here means by the relative `path`; `shown` is for messages.

        Raises:
            BackingRefused: the path leads out of the server, or names no file.
        """
        parts, wanted = self.path.split("/")[1:-1], path.split("/")
        if wanted[-1] in ("", ".", ".."):
            raise BackingRefused(shown, "names no file")
        for part in wanted:
            if part == "..":
                if not parts:
                    raise BackingRefused(shown, f"leads out of {self._origin}/")
                parts.pop()
            elif part not in ("", "."):
                parts.append(quote(part, safe=_IN_PATH.replace("%", ""), errors="surrogateescape"))
        return HttpLocation(self.scheme, self.host, self.port, "/" + "/".join(parts))

    def redirected(self, target: str) -> HttpLocation:
        """Return where a `Location: target` of the answer for this file leads. `http` after `https` is refused.

        Raises:
            BackingRefused: it leads nowhere that we go.
        """
        # Headers come as Latin-1; whoever writes other characters into one writes UTF-8.
        target = target.strip().encode("latin-1", "replace").decode("utf-8", "surrogateescape").partition("#")[0]
        if target.startswith("//"):
            target = f"{self.scheme}:{target}"
        elif not is_http(target):
            if re.match(r"[a-z][a-z0-9+.-]*:", target, re.IGNORECASE):
                raise BackingRefused(str(self), "redirects to what is no http:// or https:// URL")
            path, mark, query = target.partition("?")
            if not path.startswith("/"):
                path = self.path.rpartition("/")[0] + "/" + path if path else self.path
            target = self._origin + _without_dots(path) + mark + query
        found = parse_http(target, f"{self} redirects to {_shown(target)}")
        if self.scheme == "https" and found.scheme == "http":
            raise BackingRefused(str(self), f"redirects to {found}, which is not encrypted")
        return found

    @property
    def _origin(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + ("" if self.port == PORTS[self.scheme] else f":{self.port}")


def is_http(name: str) -> bool:
    """Tell whether `name` means a file on a web server, well spelt or not."""
    return re.match(r"https?:", name, re.IGNORECASE) is not None


def parse_http(name: str, shown: str) -> HttpLocation:
    """Return the file that `name` means; `shown` is the name for messages.

    Raises:
        BackingRefused: it means none.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise BackingRefused(shown, "expected http://HOST[:PORT]/PATH or https://HOST[:PORT]/PATH")
    scheme, authority, path, query, fragment = match.groups()
    scheme = scheme.lower()
    if "@" in authority:
        raise BackingRefused(
            shown, "a name holds no user or password: ~/.netrc or QEDFS_HTTP_AUTHORIZATION is the place for them"
        )
    if fragment:
        raise BackingRefused(shown, "'#' must be written as %23")
    place = _AUTHORITY.fullmatch(authority)
    if place is None:
        raise BackingRefused(shown, "has no host, and perhaps a port, in ASCII where one belongs")
    port = int(place[2]) if place[2] else PORTS[scheme]
    if not 0 < port <= 65535:
        raise BackingRefused(shown, f"the port {port} is not between 1 and 65535")
    if any(unquote(part) in (".", "..") for part in path.split("/")):
        raise BackingRefused(shown, "a path with . or .. in it is not understood")
    location = HttpLocation(
        scheme,
        place[1].strip("[]").lower(),
        port,
        _encoded(path or "/", _IN_PATH),
        _encoded((query or "")[1:], _IN_PATH + "?"),
    )
    if len(location.url) > _MAX_URL:
        raise BackingRefused(shown, f"is longer than {_MAX_URL} bytes")
    return location


def _encoded(text: str, safe: str) -> str:
    """Return `text` with every character encoded that has no place in a URL; what is encoded stays so."""
    encoded = quote(_STRAY_PERCENT.sub("%25", text), safe=safe, errors="surrogateescape")
    return _ENCODED.sub(lambda match: match[0].upper(), encoded)


def _without_dots(path: str) -> str:
    """Return the absolute `path` of a redirect with `.` and `..` followed (RFC 3986, section 5.2.4)."""
    parts: list[str] = []
    for part in path.split("/")[1:]:
        if part == ".." and parts:
            parts.pop()
        elif part not in (".", ".."):
            parts.append(part)
    return "/" + "/".join(parts)


def _shown(target: str) -> str:
    return re.sub(r"//[^/]*@", "//***@", target.partition("?")[0])
