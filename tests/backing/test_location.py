"""What names of backings mean, and that no secret of them is shown."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.backing.location import FileLocation, Location, NbdLocation, masked, parse_location
from qedfs.errors import BackingRefused

LEAF = FileLocation("/images/vm.qed")
REMOTE = parse_location("nbd://host/export", None)


@pytest.mark.parametrize(
    ("name", "image", "path"),
    [
        ("/base.raw", "/images/vm.qed", "/base.raw"),
        ("base.raw", "/images/vm.qed", "/images/base.raw"),
        ("../base.raw", "sub/vm.qed", "sub/../base.raw"),
        ("base.raw", "vm.qed", "base.raw"),
        ("./a:b.raw", "/images/vm.qed", "/images/./a:b.raw"),
        ("sub/a:b.raw", "/images/vm.qed", "/images/sub/a:b.raw"),
        ("file:base.raw", "/images/vm.qed", "/images/base.raw"),
        ("file:/base.raw", "/images/vm.qed", "/base.raw"),
        ("file:a:b.raw", "/images/vm.qed", "/images/a:b.raw"),
    ],
)
def test_paths_begin_where_the_naming_image_lies(name: str, image: str, path: str) -> None:
    assert parse_location(name, FileLocation(image)) == FileLocation(path)


def test_a_name_as_typed_begins_in_the_working_folder() -> None:
    assert parse_location("base.raw", None) == FileLocation("base.raw")


def test_a_relative_name_below_a_remote_image_is_refused() -> None:
    with pytest.raises(BackingRefused, match="a relative name has no meaning in an image read from nbd://host/export"):
        parse_location("base.raw", REMOTE)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("nbd://host/x", "nbd://host/x"),
        ("nbd:host:10809:exportname=x", "nbd://host/x"),
        ("nbd:unix:/run/s:exportname=x", "nbd+unix:///x?socket=/run/s"),
        ("nbd+unix:///x?socket=/run/s", "nbd+unix:///x?socket=/run/s"),
    ],
)
def test_all_spellings_of_an_export_are_one_name(name: str, canonical: str) -> None:
    location = parse_location(name, LEAF)
    assert isinstance(location, NbdLocation)
    assert str(location) == canonical
    assert location.is_local == ("unix" in name)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "backing: the name is empty"),
        ("file:", "file:: the path is empty"),
        ("a\0b", r"a\x00b: the name contains a NUL character"),
        ("https://host:x/x?token=secret", "https://host:x/x?***: has no host, and perhaps a port, in ASCII"),
        ("https://me:secret@host/x", "https://***@host/x: a name holds no user or password"),
        ("S3://bucket/", "S3://bucket/: names no object"),
        ("ssh://me:secret@host/x", "ssh://***@host/x: the protocol 'ssh' is unknown; write a file of that name as ./"),
        ("a:b.raw", "a:b.raw: the protocol 'a' is unknown; write a file of that name as ./a:b.raw"),
        ("file:///base.raw", "file:///base.raw: write a path"),
        ("nbd://", "nbd://: the host is missing"),
        ("nbd://me:secret@host/x", "nbd://***@host/x: a user name has no meaning"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_one_line(name: str, why: str) -> None:
    with pytest.raises(BackingRefused) as refusal:
        parse_location(name, LEAF)
    assert str(refusal.value).startswith(why)
    assert "secret" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "location"),
    [
        ('json:{"driver":"raw","file":{"driver":"file","filename":"/b"}}', FileLocation("/b", "raw")),
        ('json:{"driver":"qed","file":{"driver":"file","filename":"/b"}}', FileLocation("/b", "qed")),
        ('json:{"file":{"driver":"host_device","filename":"/dev/sdx"}}', FileLocation("/dev/sdx")),
        ('json:{"driver":"file","filename":"/b"}', FileLocation("/b")),
    ],
)
def test_json_names_that_say_no_more_than_a_path(name: str, location: Location) -> None:
    assert parse_location(name, LEAF) == location


@pytest.mark.parametrize(
    ("name", "canonical", "format"),
    [
        ('json:{"driver":"nbd","server":{"type":"inet","host":"h","port":"1"},"export":"x"}', "nbd://h:1/x", None),
        ('json:{"driver":"nbd","server":{"type":"inet","host":"::1","port":"10809"}}', "nbd://[::1]/", None),
        ('json:{"driver":"raw","file":{"driver":"https","url":"https://h/x?s"}}', "https://h/x?***", "raw"),
        (
            'json:{"driver":"raw","file":{"driver":"nbd","server.type":"unix","server.path":"/a b","export":"e/p"}}',
            "nbd+unix:///e/p?socket=/a%20b",
            "raw",
        ),
    ],
)
def test_json_names_that_say_no_more_than_an_address(name: str, canonical: str, format: str | None) -> None:
    location = parse_location(name, LEAF)
    assert str(location) == canonical
    assert location.format == format


@pytest.mark.parametrize(
    "name",
    [
        "json:",
        "json:[]",
        "json:{",
        "json:" + "[" * 4000,
        "json:" + " " * 5000 + "{}",
        'json:{"driver":"raw","offset":512,"file":{"driver":"file","filename":"/b"}}',
        'json:{"driver":"raw","file":{"driver":"file","filename":"/b","locking":"off"}}',
        'json:{"driver":"raw","file":{"driver":"file","filename":"b"}}',
        'json:{"driver":"raw","file":"node"}',
        'json:{"driver":"raw","file":{"driver":"raw","file":{"driver":"file","filename":"/b"}}}',
        'json:{"driver":"blkdebug","file":{"driver":"file","filename":"/b"}}',
        'json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"/b"}}',
        'json:{"driver":"nbd","server":{"type":"inet","host":"h","port":1}}',
        'json:{"driver":"nbd","server":{"type":"inet","host":"h","port":"1","numeric":"on"}}',
        'json:{"driver":"nbd","server":{"type":"inet","host":"h","port":"1"},"tls-creds":"c"}',
        'json:{"driver":"https","url":"http://host/"}',
        'json:{"driver":"https","url":"https://host/","sslverify":"off"}',
    ],
)
def test_other_json_names_are_refused(name: str) -> None:
    with pytest.raises(BackingRefused) as refusal:
        parse_location(name, LEAF)
    assert str(refusal.value).startswith("json:{…}: of QEMU's json: names only")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/images/a?b#c@d", "/images/a?b#c@d"),
        ("https://me:secret@host/x?X-Amz-Signature=secret", "https://***@host/x?***"),
        ("https://host/x#secret", "https://host/x?***"),
        ("http:/me:secret@host/x", "http:/***@host/x"),
        ("nbd:me:secret@host:1", "nbd:***@host:1"),
        ("foo:me:secret@host", "foo:***@host"),
        ("nbd:host:1:exportname=a:b@c", "nbd:host:1:exportname=a:b@c"),
        ("nbd:unix:/run/a:b@c", "nbd:unix:/run/a:b@c"),
        ("file:/images/a:b@c", "file:/images/a:b@c"),
        ("nbd+unix:///x?socket=/run/s", "nbd+unix:///x?socket=/run/s"),
        ("nbd+unix:///x?socket=/run/s&key=secret", "nbd+unix:///x?***"),
        ('json:{"password":"secret"}', "json:{…}"),
    ],
)
def test_secrets_are_masked(name: str, shown: str) -> None:
    assert masked(name) == shown


@given(st.one_of(st.text(max_size=60), st.text(alphabet='nbd:/+uix?socket=@[]%{}"json0', max_size=60)))
def test_any_text_is_a_location_or_refused(name: str) -> None:
    with contextlib.suppress(BackingRefused):
        parse_location(name, LEAF)
