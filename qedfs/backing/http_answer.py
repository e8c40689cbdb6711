"""What a web server's answer means for a reader: is it the part asked for, of the content meant, and if not, will it pass.
Sans-IO.

Rules (RFC 9110, sections 13 to 15):

- A part is taken only from a 206 whose Content-Range says where it begins and how long the whole is, and whose ETag (or,
  without one, time of change) is the one of opening. We compare, and also ask under that condition: a strong ETag by
  `If-Match` and `If-Range`, a time by `If-Unmodified-Since`. Weak ETags are only compared, as they match no condition.
- Less than was asked for, from its start on, is a part, too: the rest is asked for again.
- What contradicts the opening but not the identity (all of the file instead of a part, no length, compressed) may be a
  proxy's mood and passes; if it does not, the next opening refuses it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from qedfs.backing.base import Identity
from qedfs.errors import BackingChanged, BackingError, BackingRefused, BackingUnavailable

REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_RETRY_AFTER = 60.0
"""Seconds; a server that wants longer is asked all the same, as somebody may have mended it."""
_MAX_TAG = 96
_MAX_SIZE = (1 << 63) - 1
_RANGE = re.compile(r"bytes +(?:(\d{1,19})-(\d{1,19})|\*)/(?:(\d{1,19})|\*)", re.IGNORECASE | re.ASCII)
_STRONG = re.compile(r'"[\x21\x23-\x7e]*"')
_PASSING = frozenset({408, 421, 425, 429, 499})
_NEVER = frozenset({501, 505, 511})


class Answer(NamedTuple):
    """Status and headers (looked up without regard to case)."""

    status: int
    headers: Mapping[str, str]


class Content(NamedTuple):
    """What the opening found: identity, and the headers under whose condition each part is asked for."""

    identity: Identity
    conditions: Mapping[str, str]


class ContentRange(NamedTuple):
    """Bytes `[start, end)` of `size`; `size` is None where the server does not tell, an unsatisfied range is empty."""

    start: int
    end: int
    size: int | None


def content_range(value: str | None) -> ContentRange | None:
    """Return what a Content-Range says, None if it says nothing that makes sense."""
    match = _RANGE.fullmatch(value.strip()) if value else None
    if match is None:
        return None
    first, last, whole = match.groups()
    size = None if whole is None else int(whole)
    start, end = (0, 0) if first is None else (int(first), int(last) + 1)
    if first is not None and (start >= end or (size is not None and end > size)):
        return None
    return None if max(end, size or 0) > _MAX_SIZE else ContentRange(start, end, size)


def tag_of(headers: Mapping[str, str]) -> str:
    """Return the tag of an `Identity`: the ETag, else the time of change, else nothing."""
    etag = headers.get("ETag", "").strip()
    tag = f"etag:{etag}" if etag else ""
    modified = headers.get("Last-Modified", "").strip()
    if not tag and modified:
        try:
            tag = f"mtime:{parsedate_to_datetime(modified).isoformat()}"
        except ValueError:
            tag = f"mtime:{modified}"
    if len(tag) <= _MAX_TAG and tag.isascii() and tag.isprintable():
        return tag
    return f"{tag.partition(':')[0]}-sha256:{hashlib.sha256(tag.encode()).hexdigest()}"


def opened(name: str, answer: Answer) -> Content:
    """Return the content, from the answer to a request for its first byte.

    Raises:
        BackingRefused: there is no such file, or the server cannot do what we need, and why.
        BackingUnavailable: it does not answer as it should, which may pass.
    """
    status, headers = answer
    said = content_range(headers.get("Content-Range"))
    if encoding := _encoding(headers):
        raise BackingRefused(name, f"the server sends it compressed ({encoding}), though asked not to")
    if (status == 416 and said is not None and said.size == 0) or (status == 200 and _length(headers) == 0):
        size = 0
    elif status == 200:
        also = "" if _length(headers) else ", nor does it tell the length"
        raise BackingRefused(name, f"the server sends no parts of a file (it ignores Range){also}")
    elif status != 206:
        raise failed(name, answer, opening=True)
    elif said is None:
        raise BackingRefused(name, "the server does not say which part of the file it sends (Content-Range)")
    elif said.size is None:
        raise BackingRefused(name, "the server does not tell the length of the file")
    elif said.start != 0:
        raise BackingUnavailable(name, f"the server sends from byte {said.start} on where byte 0 was asked for")
    else:
        size = said.size
    return Content(Identity(size, tag_of(headers)), _conditions(headers))


def part(name: str, answer: Answer, pos: int, end: int, expected: Identity) -> int:
    """Return the end of the part that begins at `pos`, from the answer to a request for `[pos, end)`.

    Raises:
        BackingChanged: it is a part of another content.
        BackingRefused: the file has gone or is refused.
        BackingUnavailable: it is not the part asked for, which may pass.
    """
    status, headers = answer
    if status in (412, 416):
        raise BackingChanged(name, "has been replaced since it was opened")
    if status not in (200, 206):
        raise failed(name, answer, opening=False)
    if encoding := _encoding(headers):
        raise BackingUnavailable(name, f"the server sent it compressed ({encoding}), though asked not to")
    said = content_range(headers.get("Content-Range"))
    size = said.size if status == 206 and said is not None else _length(headers) if status == 200 else None
    if size is not None and size != expected.size:
        raise BackingChanged(name, f"has now {size} bytes, had {expected.size}")
    if expected.tag != (tag := tag_of(headers)):
        raise BackingChanged(name, f"has been replaced: was {expected.tag or 'untold'}, is {tag or 'untold'}")
    if status == 200:
        raise BackingUnavailable(name, "the server sent all of the file where a part was asked for")
    if said is None or said.size is None:
        raise BackingUnavailable(name, "the server did not say which part of which length it sent (Content-Range)")
    if said.start != pos or not pos < said.end <= end:
        raise BackingUnavailable(
            name, f"the server sent the bytes {said.start}-{said.end - 1} where {pos}-{end - 1} were asked for"
        )
    return said.end


def failed(name: str, answer: Answer, *, opening: bool) -> BackingError:
    """Return the error that an answer without content means. 401 is told by whoever knows the credentials."""
    status, headers = answer
    if status in (404, 410):
        return BackingRefused(
            name, f"there is no such file (status {status})" if opening else f"has gone (status {status})"
        )
    if status in (401, 403):
        return BackingRefused(
            name, f"the server refuses it (status {status}); a signed URL or credentials may have expired"
        )
    if status == 407:
        return BackingRefused(name, "the proxy wants credentials (http_proxy=http://USER:PASSWORD@HOST:PORT)")
    if status in REDIRECTS:
        return BackingRefused(name, f"the server redirects without saying where to (status {status})")
    why = f"the server does not answer as it should (status {status})"
    if status in _PASSING or (status >= 500 and status not in _NEVER):
        return BackingUnavailable(name, why, retry_after=retry_after(headers, datetime.now(UTC)))
    return BackingRefused(name, f"the server refuses the request (status {status})")


def retry_after(headers: Mapping[str, str], now: datetime) -> float:
    """Return for how many seconds the server wants to be left alone: 0 if it does not say, at most MAX_RETRY_AFTER."""
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), MAX_RETRY_AFTER)
    try:
        # By the server's own clock, if it tells.
        told = headers.get("Date")
        seconds = (_moment(value) - (_moment(told) if told else now)).total_seconds()
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)


def _moment(text: str) -> datetime:
    moment = parsedate_to_datetime(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _conditions(headers: Mapping[str, str]) -> dict[str, str]:
    etag, modified = headers.get("ETag", "").strip(), headers.get("Last-Modified", "").strip()
    if _STRONG.fullmatch(etag):
        return {"If-Match": etag, "If-Range": etag}
    if not etag and modified.isascii() and modified.isprintable() and modified:
        return {"If-Unmodified-Since": modified}
    return {}


def _encoding(headers: Mapping[str, str]) -> str:
    encoding = headers.get("Content-Encoding", "").strip()
    return "" if encoding.lower() == "identity" else encoding[:40]


def _length(headers: Mapping[str, str]) -> int | None:
    value = headers.get("Content-Length", "").strip()
    return int(value) if value.isascii() and value.isdigit() and len(value) < 20 else None
