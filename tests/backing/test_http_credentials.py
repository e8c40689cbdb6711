"""Who a web server is told that we are: lines of the environment, the netrc, and what is wrong with them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qedfs.backing.http_credentials import NOBODY, VARIABLE, authorization
from qedfs.backing.http_name import parse_http
from qedfs.errors import BackingRefused

STORE = parse_http("https://store.example/base.raw", "")
BASIC = "Basic bWU6c2VjcmV0"  # me:secret


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("lines", "value"),
    [
        ("https://store.example Bearer 1", "Bearer 1"),
        ("\n  HTTPS://Store.Example:443/  Bearer 1 \n", "Bearer 1"),
        ("https://other.example Bearer 2\nhttps://store.example Bearer 1", "Bearer 1"),
        ("http://store.example Bearer 2", ""),
        ("https://store.example:444 Bearer 2", ""),
        ("https://a.store.example Bearer 2", ""),
        ("", ""),
    ],
)
def test_a_line_of_the_environment_is_for_one_origin(tmp_path: Path, lines: str, value: str) -> None:
    told = authorization(STORE, {VARIABLE: lines, "HOME": str(tmp_path)})
    assert (told.value, told.renewable) == (value, False)


@pytest.mark.parametrize(
    "line", ["https://store.example", "Bearer secret", "https://store.example secret\x01", "x y é"]
)
def test_a_line_that_makes_no_sense_is_refused_unseen(tmp_path: Path, line: str) -> None:
    with pytest.raises(BackingRefused, match=f"^{VARIABLE}: ") as refusal:
        authorization(STORE, {VARIABLE: line, "HOME": str(tmp_path)})
    assert "secret" not in str(refusal.value)


def test_the_environment_goes_before_the_netrc(tmp_path: Path) -> None:
    write(tmp_path / ".netrc", "machine store.example login me password secret")
    environment = {"HOME": str(tmp_path)}
    assert authorization(STORE, environment) == (BASIC, True)
    assert authorization(STORE, {**environment, VARIABLE: "https://store.example Bearer 1"}) == ("Bearer 1", False)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("machine Store.Example login me password secret", BASIC),
        ("machine other login x password y\nmachine store.example\n\tlogin me\n\tpassword secret", BASIC),
        ("machine other.example login me password secret", ""),
        ("default login me password secret", ""),
        ("machine default login me password secret", ""),
        ("", ""),
    ],
)
def test_an_entry_of_the_netrc_is_for_one_host_and_never_for_all(tmp_path: Path, text: str, value: str) -> None:
    path = write(tmp_path / "netrc", text)
    assert authorization(STORE, {"NETRC": str(path)}).value == value


def test_without_a_netrc_nobody_is_told_anything(tmp_path: Path) -> None:
    assert authorization(STORE, {"HOME": str(tmp_path)}) == NOBODY
    with pytest.raises(BackingRefused, match=r"No such file or directory \(NETRC names it\)"):
        authorization(STORE, {"NETRC": str(tmp_path / "netrc")})


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o602])
def test_a_netrc_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "netrc", "machine store.example login me password secret", mode)
    with pytest.raises(BackingRefused, match="not for you alone: chmod 600"):
        authorization(STORE, {"NETRC": str(path)})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"machine store.example login me secret x", "is not written as a netrc in line 1"),
        (b"machine store.example login \xff", "is not written as a netrc$"),
    ],
)
def test_a_netrc_that_is_none_is_refused_unseen(tmp_path: Path, content: bytes, why: str) -> None:
    path = write(tmp_path / "netrc", "")
    path.write_bytes(content)
    with pytest.raises(BackingRefused, match=why) as refusal:
        authorization(STORE, {"NETRC": str(path)})
    assert "secret" not in str(refusal.value)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "netrc", 0o600)
    with pytest.raises(BackingRefused, match="is no regular file"):
        authorization(STORE, {"NETRC": str(tmp_path / "netrc")})


def test_no_secret_is_shown_by_accident(tmp_path: Path) -> None:
    assert "Bearer" not in repr(authorization(STORE, {VARIABLE: "https://store.example Bearer 1"}))
