"""What web servers' answers mean, without a server."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from urllib3 import HTTPHeaderDict

from qedfs.backing.base import Identity
from qedfs.backing.http_answer import Answer, ContentRange, content_range, opened, part, retry_after, tag_of
from qedfs.errors import BackingChanged, BackingError, BackingRefused, BackingUnavailable

MODIFIED = "Wed, 01 Jan 2025 00:00:00 GMT"
SAME = {"ETag": '"a"', "Content-Range": "bytes 100-199/1000"}
KNOWN = Identity(1000, 'etag:"a"')


def answer(status: int, headers: dict[str, str]) -> Answer:
    return Answer(status, HTTPHeaderDict(headers))


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        ("bytes 0-0/1", ContentRange(0, 1, 1)),
        ("Bytes 5-9/*", ContentRange(5, 10, None)),
        ("bytes */0", ContentRange(0, 0, 0)),
        (None, None),
        ("", None),
        ("bytes 5-4/10", None),
        ("bytes 5-10/10", None),
        ("bytes 0-0/9223372036854775808", None),
        ("bytes 0-0/1, bytes 0-0/1", None),
        ("bytes ٠-٠/١", None),
        ("lines 0-0/1", None),
    ],
)
def test_content_ranges(value: str | None, meaning: ContentRange | None) -> None:
    assert content_range(value) == meaning


@given(st.text(alphabet="bytes 0123456789-/*,", max_size=30))
def test_any_content_range_makes_sense_or_none(text: str) -> None:
    said = content_range(text)
    assert said is None or 0 <= said.start <= said.end <= (said.end if said.size is None else said.size)


@pytest.mark.parametrize(
    ("headers", "tag"),
    [
        ({"ETag": '"a"', "Last-Modified": MODIFIED}, 'etag:"a"'),
        ({"ETag": 'W/"a"'}, 'etag:W/"a"'),
        ({"Last-Modified": MODIFIED}, "mtime:2025-01-01T00:00:00+00:00"),
        ({"Last-Modified": "yesterday"}, "mtime:yesterday"),
        ({}, ""),
    ],
)
def test_what_tells_contents_apart(headers: dict[str, str], tag: str) -> None:
    assert tag_of(HTTPHeaderDict(headers)) == tag


@pytest.mark.parametrize("etag", ['"' + "x" * 200 + '"', '"ö"', '"a\tb"'])
def test_a_tag_that_cannot_be_recorded_is_hashed(etag: str) -> None:
    tag = tag_of(HTTPHeaderDict({"ETag": etag}))
    assert tag.startswith("etag-sha256:")
    assert len(tag) <= 96
    assert tag != tag_of(HTTPHeaderDict({"ETag": etag + "x"}))


@pytest.mark.parametrize(
    ("headers", "conditions"),
    [
        ({"ETag": '"a"', "Last-Modified": MODIFIED}, {"If-Match": '"a"', "If-Range": '"a"'}),
        ({"ETag": 'W/"a"', "Last-Modified": MODIFIED}, {}),
        ({"ETag": "unquoted"}, {}),
        ({"Last-Modified": MODIFIED}, {"If-Unmodified-Since": MODIFIED}),
    ],
)
def test_under_which_condition_parts_are_asked_for(headers: dict[str, str], conditions: dict[str, str]) -> None:
    content = opened("name", answer(206, {**headers, "Content-Range": "bytes 0-0/10"}))
    assert content.conditions == conditions
    assert content.identity.size == 10


@pytest.mark.parametrize(
    ("status", "headers", "kind", "why"),
    [
        (200, {"Content-Length": "5"}, BackingRefused, r"sends no parts of a file \(it ignores Range\)$"),
        (200, {}, BackingRefused, "nor does it tell the length"),
        (206, {"Content-Range": "bytes 0-0/*"}, BackingRefused, "does not tell the length of the file"),
        (206, {"Content-Type": "multipart/byteranges"}, BackingRefused, "which part of the file it sends"),
        (206, {"Content-Range": "bytes 1-1/5"}, BackingUnavailable, "sends from byte 1 on"),
        (206, {"Content-Range": "bytes 0-0/5", "Content-Encoding": "gzip"}, BackingRefused, r"compressed \(gzip\)"),
        (404, {}, BackingRefused, r"there is no such file \(status 404\)"),
        (403, {}, BackingRefused, r"refuses it \(status 403\)"),
        (302, {}, BackingRefused, "redirects without saying where to"),
        (407, {}, BackingRefused, "the proxy wants credentials"),
        (501, {}, BackingRefused, "refuses the request"),
        (503, {}, BackingUnavailable, "does not answer as it should"),
        (429, {}, BackingUnavailable, "does not answer as it should"),
    ],
)
def test_why_a_server_cannot_be_a_backing(
    status: int, headers: dict[str, str], kind: type[BackingError], why: str
) -> None:
    with pytest.raises(BackingError, match=why) as caught:
        opened("name", answer(status, headers))
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("status", "headers"), [(416, {"Content-Range": "bytes */0"}), (200, {"Content-Length": "0", "ETag": '"a"'})]
)
def test_a_file_without_bytes_is_one(status: int, headers: dict[str, str]) -> None:
    assert opened("name", answer(status, headers)).identity.size == 0


def test_a_part_may_be_less_than_was_asked_for() -> None:
    assert part("name", answer(206, SAME), 100, 500, KNOWN) == 200


@pytest.mark.parametrize(
    ("status", "headers", "kind", "why"),
    [
        (206, {"Content-Range": "bytes 99-199/1000"}, BackingUnavailable, "sent the bytes 99-199 where 100-199"),
        (206, {"Content-Range": "bytes 100-200/1000"}, BackingUnavailable, "sent the bytes 100-200"),
        (206, {"Content-Range": "bytes */1000"}, BackingUnavailable, "sent the bytes"),
        (206, {"Content-Range": "bytes 100-199/*"}, BackingUnavailable, "did not say which part of which length"),
        (206, {"Content-Range": "nonsense"}, BackingUnavailable, "did not say which part"),
        (206, {"Content-Range": "bytes 100-199/1001"}, BackingChanged, "has now 1001 bytes, had 1000"),
        (206, {"ETag": '"b"'}, BackingChanged, 'was etag:"a", is etag:"b"'),
        (206, {"ETag": 'W/"a"'}, BackingChanged, "has been replaced"),
        (206, {"ETag": ""}, BackingChanged, "is untold"),
        (206, {"Content-Encoding": "gzip", "ETag": 'W/"a"'}, BackingUnavailable, "compressed"),
        (200, {"Content-Length": "1000"}, BackingUnavailable, "all of the file where a part"),
        (200, {"Content-Length": "900"}, BackingChanged, "has now 900 bytes"),
        (200, {"Content-Length": "1000", "ETag": '"b"'}, BackingChanged, "has been replaced"),
        (412, {}, BackingChanged, "has been replaced"),
        (416, {"Content-Range": "bytes */5"}, BackingChanged, "has been replaced"),
        (404, {}, BackingRefused, "has gone"),
        (410, {}, BackingRefused, "has gone"),
        (403, {}, BackingRefused, "may have expired"),
        (400, {}, BackingRefused, "refuses the request"),
        (500, {}, BackingUnavailable, "status 500"),
        (504, {}, BackingUnavailable, "status 504"),
        (408, {}, BackingUnavailable, "status 408"),
    ],
)
def test_what_is_no_part_of_the_content(
    status: int, headers: dict[str, str], kind: type[BackingError], why: str
) -> None:
    with pytest.raises(BackingError, match=why) as caught:
        part("name", answer(status, {**SAME, **headers}), 100, 200, KNOWN)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "999999999999999"}, 60),
        ({"Retry-After": "-1"}, 0),
        ({"Retry-After": "soon"}, 0),
        ({"Retry-After": "Wed, 01 Jan 2025 00:00:09 GMT"}, 9),
        ({"Retry-After": "Wed, 01 Jan 2025 00:00:09 GMT", "Date": "Wed, 01 Jan 2025 00:00:04 GMT"}, 5),
        ({"Retry-After": MODIFIED, "Date": "Wed, 01 Jan 2025 00:00:04 GMT"}, 0),
        ({"Retry-After": "Wed, 01 Jan 2025 00:00:09 -0000", "Date": MODIFIED}, 9),
        ({"Retry-After": "Thu, 01 Jan 2026 00:00:00 GMT"}, 60),
    ],
)
def test_how_long_a_server_wants_to_be_left_alone(headers: dict[str, str], seconds: float) -> None:
    assert retry_after(HTTPHeaderDict(headers), datetime(2025, 1, 1, tzinfo=UTC)) == seconds
