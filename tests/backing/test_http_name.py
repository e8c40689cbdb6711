"""What names of files on web servers mean, where relative names and redirects lead, and that no secret is shown."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.backing.http_name import HttpLocation, parse_http
from qedfs.backing.location import FileLocation, parse_location
from qedfs.errors import BackingRefused

LEAF = FileLocation("/images/vm.qed")
TOP = parse_http("https://store.example/images/vm/top.qed?token=secret", "shown")


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("http://host/x", "http://host/x"),
        ("HTTPS://Host.Example:443/X", "https://host.example/X"),
        ("http://host:443/x", "http://host:443/x"),
        ("http://host", "http://host/"),
        ("http://[::1]:8080/x", "http://[::1]:8080/x"),
        ("https://host/a b/é", "https://host/a%20b/%C3%A9"),
        ("https://host/a%2fb%", "https://host/a%2Fb%25"),
        ("https://host/x?key=secret&b=c/d?e", "https://host/x?***"),
        ("https://host/x\n", "https://host/x%0A"),
    ],
)
def test_all_spellings_of_a_url_are_one_name(name: str, canonical: str) -> None:
    location = parse_location(name, LEAF)
    assert isinstance(location, HttpLocation)
    assert str(location) == canonical
    assert "secret" not in repr(location)


def test_what_is_asked_for_has_the_query() -> None:
    assert TOP.url == "https://store.example/images/vm/top.qed?token=secret"
    assert parse_http("http://h/x?a b=\r\né%2f", "").url == "http://h/x?a%20b=%0D%0A%C3%A9%2F"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("http:/x", "expected http://HOST"),
        ("http:x", "expected http://HOST"),
        ("http:///x", "has no host"),
        ("http://me@host/x", "holds no user or password"),
        ("http://me:secret@host/x", "holds no user or password"),
        ("http://hóst/x", "in ASCII"),
        ("http://ho st/x", "has no host"),
        ("http://host:0/x", "the port 0 is not between"),
        ("http://host:65536/x", "the port 65536 is not between"),
        ("http://host:x/x", "has no host"),
        ("http://host/x#y", "must be written as %23"),
        ("http://host/images/../x", "with . or .. in it"),
        ("http://host/images/%2e%2E/x", "with . or .. in it"),
        ("http://host/./x", "with . or .. in it"),
        ("http://host/" + "x" * 9000, "is longer than 8192 bytes"),
    ],
)
def test_what_is_no_url_of_a_file_is_refused(name: str, why: str) -> None:
    with pytest.raises(BackingRefused, match=why) as refusal:
        parse_location(name, LEAF)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("base.raw", "https://store.example/images/vm/base.raw"),
        ("../base.raw", "https://store.example/images/base.raw"),
        ("./a//b", "https://store.example/images/vm/a/b"),
        ("a?b#c%20d", "https://store.example/images/vm/a%3Fb%23c%2520d"),
    ],
)
def test_a_relative_name_means_the_file_beside(path: str, url: str) -> None:
    location = parse_location(path, TOP)
    assert isinstance(location, HttpLocation)
    assert location.url == url


@pytest.mark.parametrize(("path", "why"), [("../../../x", "leads out of https://store.example/"), ("a/..", "names no")])
def test_a_relative_name_stays_on_the_server(path: str, why: str) -> None:
    with pytest.raises(BackingRefused, match=why):
        parse_location(path, TOP)


@pytest.mark.parametrize(
    ("target", "url"),
    [
        ("https://other.example/x?sig=1#part", "https://other.example/x?sig=1"),
        ("//other.example/x", "https://other.example/x"),
        ("/x/../y?z", "https://store.example/y?z"),
        ("y", "https://store.example/images/vm/y"),
        ("../y", "https://store.example/images/y"),
        ("?new=1", "https://store.example/images/vm/top.qed?new=1"),
        ("/a b", "https://store.example/a%20b"),
        ("/Ã©", "https://store.example/%C3%A9"),
    ],
)
def test_where_a_redirect_leads(target: str, url: str) -> None:
    assert TOP.redirected(target).url == url


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("http://store.example/x?sig=secret", "redirects to http://store.example/x.*, which is not encrypted"),
        ("file:///etc/passwd", "no http:// or https:// URL"),
        ("https://me:secret@host/x", "redirects to https://\\*\\*\\*@host/x: a name holds no user"),
        ("https://host/%2e%2e/x", "with . or .. in it"),
    ],
)
def test_where_no_redirect_is_followed_to(target: str, why: str) -> None:
    with pytest.raises(BackingRefused, match=why) as refusal:
        TOP.redirected(target)
    assert "secret" not in str(refusal.value)


@given(st.text(alphabet="htp:/s.?#@[]%é\n-x0 \udcff", max_size=40))
def test_any_text_after_http_is_a_url_or_refused(text: str) -> None:
    with contextlib.suppress(BackingRefused):
        assert parse_http("http:" + text, "").url.isascii()
        assert TOP.redirected(text.encode("utf-8", "surrogateescape").decode("latin-1")).url.isascii()
