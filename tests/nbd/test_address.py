"""Every spelling of an NBD address, and what is said about those that are none."""

from __future__ import annotations

import pytest

from qedfs.nbd.address import NbdAddress, is_nbd, parse_address
from qedfs.nbd.errors import AddressInvalid


def tcp(host: str, port: int = 10809, export: str = "", tls: bool = False) -> NbdAddress:
    return NbdAddress(tls, host, port, None, export)


def tls(host: str, hostname: str = "", certificates: str = "") -> NbdAddress:
    return NbdAddress(True, host, 10809, None, "x", hostname, certificates)


def unix(path: str, export: str = "", tls: bool = False) -> NbdAddress:
    return NbdAddress(tls, None, 0, path, export)


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("nbd://host", tcp("host")),
        ("nbd://host/", tcp("host")),
        ("NBD://host:1234/disk", tcp("host", 1234, "disk")),
        ("nbd+tcp://host/disk", tcp("host", export="disk")),
        ("nbd://[::1]:99/disk", tcp("::1", 99, "disk")),
        ("nbd://host//e%2fp", tcp("host", export="/e/p")),
        ("nbd://host/a/b", tcp("host", export="a/b")),
        ("nbds://host/x", tcp("host", export="x", tls=True)),
        ("nbd+unix:///?socket=/run/s", unix("/run/s")),
        ("nbd+unix:///exp?socket=/run/a%20b", unix("/run/a b", "exp")),
        ("nbds+unix:///exp?socket=s", unix("s", "exp", tls=True)),
        ("nbds://host/x?tls-hostname=store.example", tls("host", "store.example")),
        ("nbds://host/x?tls-verify-peer=1&tls-certificates=/etc/a%26b", tls("host", certificates="/etc/a&b")),
        (
            "nbds+unix:///x?tls-hostname=h&socket=/s&tls-certificates=/t",
            NbdAddress(True, None, 0, "/s", "x", "h", "/t"),
        ),
        ("nbd:host:10809", tcp("host")),
        ("nbd:host:nbd", tcp("host")),
        ("nbd:[::1]:5:exportname=a:b", tcp("::1", 5, "a:b")),
        ("nbd:host:7:exportname=a%20b", tcp("host", 7, "a%20b")),
        ("nbd:unix:/run/s", unix("/run/s")),
        ("nbd:unix:/run/s:1:exportname=x:exportname=y", unix("/run/s:1", "x:exportname=y")),
    ],
)
def test_spelling_is_understood(name: str, address: NbdAddress) -> None:
    assert is_nbd(name)
    assert parse_address(name) == address


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nbd:localhost", "the port is missing"),
        ("nbd::10809", "the port is missing"),
        ("nbd:a:b:1", "brackets"),
        ("nbd:host:99999", "65535"),
        ("nbd:host:nosuchservice", "neither a number"),
        ("nbd:host:1:exportname=", "exportname= is missing"),
        ("nbd:unix:", "path of the socket is missing"),
        ("nbd://", "host is missing"),
        ("nbd://host:0/", "65535"),
        ("nbd://host:x/", "ort"),
        ("nbd://host/x?a=b", "not understood"),
        ("nbd://host/x#y", "%23"),
        ("nbd://host/%ff", "utf-8"),
        ("nbd://host/%00", "NUL"),
        ("nbd://host/" + "x" * 4097, "4096"),
        ("nbd+unix:///x", "?socket=PATH"),
        ("nbd+unix:///x?socket=/s&tls-certificates=/t", "nothing else"),
        ("nbd+unix:///x?socket=/s&socket=/t", "?socket=PATH once"),
        ("nbds+unix:///x?tls-hostname=h", "?socket=PATH"),
        ("nbd://host/x?tls-hostname=h", "not understood"),
        ("nbds://host/x?socket=/s", "not understood"),
        ("nbds://host/x?tls-verify-peer=0", "always verified"),
        ("nbds://host/x?tls-verify-peer=false", "always verified"),
        ("nbds://host/x?tls-psk-file=/k&tls-username=me", "use certificates"),
        ("nbds://host/x?tls-certificates=pki", "absolute"),
        ("nbds://host/x?tls-certificates=/%00", "NUL"),
        ("nbds://host/x?tls-hostname=a%2fb", "no name or address"),
        ("nbd+unix://x?socket=/s", "three slashes"),
        ("nbd+unix:///x?socket=" + "y" * 108, "107"),
        ("nbd+vsock://1/x", "transport 'vsock'"),
        ("nbd://[::1/", "IPv6"),
        ("/a/file", "not an NBD address"),
    ],
)
def test_wrong_address_is_refused_with_the_reason(name: str, why: str) -> None:
    with pytest.raises(AddressInvalid) as caught:
        parse_address(name)
    assert why in caught.value.why
    assert "\n" not in str(caught.value)


def test_credentials_are_never_shown() -> None:
    for name in ("nbd://me:secret@host/x", "nbd+unix:///x?password=secret", "nbd://host/x?token=secret\n"):
        with pytest.raises(AddressInvalid) as caught:
            parse_address(name)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["disk.qed", "/nbd:/x", "./nbd://x", "nbdx://y", "http://nbd:1"])
def test_other_names_are_not_nbd(name: str) -> None:
    assert not is_nbd(name)


@pytest.mark.parametrize(
    "address",
    [
        *(tls("h", "other"), tls("h", "", "/a &?b"), NbdAddress(True, None, 0, "/s", "x", "h", "/t")),
        *(tcp("h"), tcp("::1", 7, "a b/\u00fc?"), unix("/r s", "/x%"), tcp("h", tls=True), unix("/s", tls=True)),
    ],
)
def test_shown_address_parses_to_itself(address: NbdAddress) -> None:
    assert str(address).isprintable()
    assert parse_address(str(address)) == address
