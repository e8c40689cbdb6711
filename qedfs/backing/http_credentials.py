"""Who we are to a web server: a line of the environment, else an entry of the netrc.

- `QEDFS_HTTP_AUTHORIZATION`: lines of `ORIGIN VALUE`, such as `https://store.example Bearer 0123`; the value of the
  `Authorization` header for that scheme, host and port, and for nobody else.
- the file that `NETRC` names, else `~/.netrc`: `machine HOST login USER password PASSWORD`, for any scheme and port of
  that host. Its `default` is not used, as it would be told to whatever host an image names. It must be ours (or
  root's), and readable for nobody else.

Never a command line or an image: both are for others to read. Everything is looked up anew for each opening, and the
netrc once more when the server refuses what it said, so that a password that is renewed there is used at once.
"""

from __future__ import annotations

import base64
import netrc
import os
import stat
from collections.abc import Mapping
from typing import NamedTuple

from qedfs.backing.http_name import HttpLocation, parse_http
from qedfs.errors import BackingRefused

VARIABLE = "QEDFS_HTTP_AUTHORIZATION"


class Authorization(NamedTuple):
    """The value of the header, empty for none. `renewable`: it is of a file that may say something else next time."""

    value: str
    renewable: bool

    def __repr__(self) -> str:
        return f"Authorization(***, renewable={self.renewable})"


NOBODY = Authorization("", False)


def authorization(location: HttpLocation, environment: Mapping[str, str]) -> Authorization:
    """Return what the server of `location` is to be told. Blocks: it may read a file.

    Raises:
        BackingRefused: what is configured makes no sense, or the netrc is readable for others.
    """
    for line in environment.get(VARIABLE, "").splitlines():
        origin, _, value = line.strip().partition(" ")
        if not origin:
            continue
        if not value.strip() or not value.isascii() or not value.isprintable():
            raise BackingRefused(
                VARIABLE, "expected lines of ORIGIN VALUE, such as 'https://store.example Bearer 0123'"
            )
        if parse_http(origin, VARIABLE).origin == location.origin:
            return Authorization(value.strip(), False)
    path = environment.get("NETRC") or os.path.join(environment.get("HOME") or os.path.expanduser("~"), ".netrc")
    entry = _entry(path, location.host, must_exist=bool(environment.get("NETRC")))
    if entry is None:
        return NOBODY
    login, password = entry
    return Authorization("Basic " + base64.b64encode(f"{login}:{password}".encode()).decode(), True)


def _entry(path: str, host: str, *, must_exist: bool) -> tuple[str, str] | None:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BackingRefused(path, "is no regular file; it is read as the netrc")
        if status.st_uid not in (0, os.getuid()) or status.st_mode & 0o077:
            raise BackingRefused(path, "holds passwords and is not for you alone: chmod 600")
        entries = netrc.netrc(path).hosts
    except (FileNotFoundError, NotADirectoryError) as error:
        if must_exist:
            raise BackingRefused(path, f"{error.strerror} (NETRC names it)") from error
        return None
    except OSError as error:
        raise BackingRefused(path, f"cannot be read as the netrc ({error.strerror})") from error
    except (netrc.NetrcParseError, UnicodeDecodeError) as error:
        # Not what is wrong there, which may be half a password.
        where = f" in line {error.lineno}" if isinstance(error, netrc.NetrcParseError) else ""
        raise BackingRefused(path, f"is not written as a netrc{where}") from error
    found = next((entry for name, entry in entries.items() if name.lower() == host and name != "default"), None)
    return None if found is None else (found[0], found[2])
