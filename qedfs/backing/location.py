"""Names of backings: what they mean, and how they are shown. Sans-IO.

The rules are QEMU's (QED fact sheet of its behaviour, "Backing string"): a name with a ':' before its first '/' has a
protocol, anything else is a path, and a path that is not absolute begins in the folder of the image that names it, as
that image's path was given; symbolic links are not followed for that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from qedfs.backing.foreign import FORMATS
from qedfs.backing.http_name import HttpLocation, is_http, parse_http
from qedfs.backing.mirror_name import MOST, PREFIX, SEPARATOR, MirrorsLocation, is_mirrors, names_of
from qedfs.backing.object_name import ObjectLocation, is_object, parse_object
from qedfs.errors import BackingRefused, UsageError
from qedfs.nbd.address import NbdAddress, is_nbd, parse_address, without_user

_PROTOCOL = re.compile(r"[^/]*?:")
_MAX_JSON = 4096


@dataclass(frozen=True)
class FileLocation:
    """A path of this machine. `format` is what the name itself says of the format (`json:`), else None."""

    path: str
    format: str | None = None

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class NbdLocation:
    """An export of an NBD server."""

    address: NbdAddress
    format: str | None = None

    def __str__(self) -> str:
        return str(self.address)

    @property
    def is_local(self) -> bool:
        """Whether it is a socket of this machine, to be judged as a file is."""
        return self.address.socket is not None


Location = FileLocation | NbdLocation | HttpLocation | ObjectLocation | MirrorsLocation


def host_of(location: Location) -> str | None:
    """Return the name or address of the machine that has the bytes; None if they come over no network."""
    match location:
        case NbdLocation():
            return location.address.host
        case HttpLocation() | MirrorsLocation():
            return location.host
    return None


def key_of(location: Location) -> str:
    """Return what is the same for two names of one place, and only for these: the name without secrets, and their hash."""
    match location:
        case HttpLocation() if location.query:
            return f"{location}{hashlib.sha256(location.query.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}"
        case MirrorsLocation():
            return PREFIX + SEPARATOR.join(location.keys)
    return str(location)


def parse_location(name: str, image: Location | None) -> Location:
    """Return where the backing called `name` is. `image` is the image that names it, None for a name as typed.

    Raises:
        BackingRefused: the name means nothing that we can open; the message is masked.
    """
    shown = masked(name)
    if not name:
        raise BackingRefused("backing", "the name is empty")
    if "\0" in name:
        raise BackingRefused(shown, "the name contains a NUL character")
    if name.startswith("json:"):
        return _parse_json(name)
    if is_mirrors(name):
        return _mirrors(names_of(name), shown)
    if is_nbd(name):
        return _nbd(name, None)
    if is_object(name):
        return parse_object(name, shown)
    if is_http(name):
        return parse_http(name, shown)
    path = name
    if protocol := _PROTOCOL.match(name):
        scheme = protocol[0][:-1]
        if scheme == "file":
            path = name.removeprefix("file:")
            if path.startswith("//"):
                raise BackingRefused(shown, "write a path, or file: and a path; URLs of files are not understood")
        else:
            raise BackingRefused(shown, f"the protocol '{scheme}' is unknown; write a file of that name as ./{shown}")
    elif isinstance(image, HttpLocation | ObjectLocation) and not os.path.isabs(path):
        return image.beside(path, shown)
    return _file(path, shown, image)


def masked(name: str) -> str:
    """Return `name` without what could be a secret in it: user and password, the query, all of a `json:`."""
    if name.startswith("json:"):
        return "json:{…}"
    if is_mirrors(name):
        # What is no address may be what stands behind a stray separator in a query.
        return PREFIX + SEPARATOR.join(masked(one) if _is_address(one) else "***" for one in names_of(name))
    if not _PROTOCOL.match(name):
        return name
    name = without_user(name)
    # Of what is no address, perhaps for want of a slash, too.
    name = re.sub(
        r"^(?!file:|nbd:unix:|nbd:[^:@]*:\d+(?::|$))([^/@]*?:/?)(?!/)[^@]*:.*@", r"\1***@", name, flags=re.DOTALL
    )
    # Paths and names are no secrets, and without them nobody knows which server is meant.
    if re.fullmatch(r"nbds?[^?#]*\?&?((socket|tls-hostname|tls-certificates)=[^&#?]*(&|$))+", name, re.IGNORECASE):
        return name
    return re.sub(r"[?#].*", "?***", name, flags=re.DOTALL)


def _mirrors(names: list[str], shown: str) -> MirrorsLocation:
    if not 2 <= len(names) <= MOST:
        raise BackingRefused(shown, f"needs 2 to {MOST} addresses, with a {SEPARATOR} between them")
    if not all(map(_is_address, names)):
        raise BackingRefused(
            shown, f"each mirror must be an address of a server (a {SEPARATOR} inside of one is written %7C)"
        )
    locations = [parse_location(name, None) for name in names]
    keys = tuple(map(key_of, locations))
    if len(set(keys)) < len(keys):
        raise BackingRefused(shown, "names one mirror twice")
    return MirrorsLocation(tuple(map(str, locations)), keys, host_of(locations[0]))


def _is_address(name: str) -> bool:
    return is_nbd(name) or is_object(name) or is_http(name)


def _file(path: str, shown: str, image: Location | None) -> FileLocation:
    if not path:
        raise BackingRefused(shown, "the path is empty")
    if image is not None and not isinstance(image, FileLocation) and not os.path.isabs(path):
        raise BackingRefused(shown, f"a relative name has no meaning in an image read from {image}")
    folder = os.path.dirname(image.path) if isinstance(image, FileLocation) else ""
    return FileLocation(os.path.join(folder, path))


def _nbd(name: str, format: str | None) -> NbdLocation:
    try:
        return NbdLocation(parse_address(name), format)
    except UsageError as error:
        raise BackingRefused(error.what, error.why) from error


def _parse_json(name: str) -> Location:
    """Accept those of QEMU's node trees that say no more than a plain name does."""
    refusal = BackingRefused(
        masked(name),
        "of QEMU's json: names only a plain file, URL or NBD export, in a format, is understood; write it as such",
    )
    if len(name) > _MAX_JSON:
        raise refusal
    try:
        tree = json.loads(name.removeprefix("json:"))
        location = _node(tree)
    except (ValueError, RecursionError):
        location = None
    if location is None:
        raise refusal
    return location


def _node(tree: Any) -> Location | None:
    if not isinstance(tree, dict):
        return None
    if "file" in tree and isinstance(tree["file"], dict):
        driver = tree.get("driver")
        if set(tree) - {"driver", "file"} or driver not in (None, "raw", "qed", *FORMATS):
            return None
        location = _protocol_node(tree["file"])
        return None if location is None else replace(location, format=driver)
    return _protocol_node(tree)


def _protocol_node(tree: dict[str, Any]) -> Location | None:
    # Every value must be text: what is left out or nested otherwise has a meaning we do not know.
    flat = dict(tree)
    if isinstance(server := flat.pop("server", {}), dict):
        flat |= {f"server.{key}": value for key, value in server.items()}
    if not all(isinstance(value, str) for value in flat.values()):
        return None
    match flat:
        case {"driver": "file" | "host_device", "filename": path, **rest} if not rest and os.path.isabs(path):
            return FileLocation(path)
        case {"driver": "nbd", "server.type": "inet", "server.host": host, "server.port": port, **rest}:
            host = f"[{host}]" if ":" in host else quote(host, safe="")
            return _nbd_node(f"nbd://{host}:{port}/", rest, "")
        case {"driver": "nbd", "server.type": "unix", "server.path": path, **rest}:
            return _nbd_node("nbd+unix:///", rest, "?socket=" + quote(path))
        case {"driver": "http" | "https" as driver, "url": url, **rest} if not rest and url.startswith(f"{driver}://"):
            return parse_http(url, "json:{…}")
    return None


def _nbd_node(start: str, rest: dict[str, str], end: str) -> Location | None:
    export = rest.pop("export", "")
    return None if rest else _nbd(start + quote(export, safe="") + end, None)
