"""What the text after `-o` means, and which mistakes are told from each other."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.config import (
    DirectIO,
    DiskOptions,
    Idle,
    Mode,
    MountOptions,
    Reserve,
    parse_duration,
    parse_mount_options,
    parse_size,
    split_options,
)
from qedfs.errors import UsageError


def test_no_option_is_the_defaults() -> None:
    assert parse_mount_options([]) == MountOptions()


def test_every_option_of_the_contract_reaches_its_field() -> None:
    options = parse_mount_options(
        [
            "mode=stream,ro,allow_other,stream_rate=10M,stream_floor=0,finish_by=2h,idle=guest,connections=8",
            "window=64M,readahead=0,backing_timeout=5,write_timeout=1m,trust_backing,allow_backing=nbd://*",
            "poll=0,reserve=10%,direct_io=on,boot_profile=off,shared_cache=/c,shared_cache_size=2G",
        ]
    )
    assert (options.shared_cache, options.shared_cache_size) == ("/c", 2 << 30)
    assert (options.read_only, options.allow_other, options.trust_backing) == (True, True, True)
    assert (options.connections, options.poll, options.direct_io) == (8, 0, DirectIO.ON)
    assert options.boot_profile == "off"
    assert options.allow_backing == ("nbd://*",)
    assert options.disk == DiskOptions(
        mode=Mode.STREAM,
        readahead=0,
        backing_timeout=5.0,
        write_timeout=60.0,
        reserve=Reserve(percent=10.0),
        window=64 << 20,
    )
    assert (options.stream.rate, options.stream.floor) == (10 << 20, 0)
    assert (options.stream.finish_by, options.stream.idle) == (7200.0, Idle.GUEST)


def test_backing_timeout_of_zero_waits_for_ever() -> None:
    assert parse_mount_options(["backing_timeout=0"]).disk.backing_timeout is None


def test_boot_profile_is_a_file_as_seen_from_the_folder_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_mount_options(["boot_profile=base.profile"]).boot_profile == str(tmp_path / "base.profile")
    assert parse_mount_options(["boot_profile=auto"]).boot_profile == MountOptions().boot_profile == "auto"


def test_later_option_wins_and_allow_backing_adds_up() -> None:
    options = parse_mount_options(["mode=cow,allow_backing=a", "allow_backing=b,mode=cor"])
    assert options.disk.mode is Mode.COR
    assert options.allow_backing == ("a", "b")


def test_rw_after_ro_takes_it_back() -> None:
    assert not parse_mount_options(["ro,rw"]).read_only
    assert parse_mount_options(["rw,ro"]).read_only


def test_escaped_comma_is_part_of_the_value() -> None:
    assert parse_mount_options([r"allow_backing=/a\,b,ro"]).allow_backing == ("/a,b",)


def test_options_of_mount_and_fstab_are_ignored() -> None:
    text = "rw,defaults,auto,noauto,user,nosuid,nodev,noexec,suid,dev,exec,relatime,_netdev,nofail,x-systemd.automount"
    assert parse_mount_options([text, "X-mount.mkdir=0700,comment=x,user=eve"]) == MountOptions()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("mod=cow", "mod: is not a mount option (did you mean 'mode'?)"),
        ("qqqqqq", "qqqqqq: is not a mount option"),
        ("mode=fast", "mode: 'fast' is none of cow, cor, stream"),
        ("mode", "mode: needs a value ('mode=...')"),
        ("ro=1", "ro: takes no value"),
        ("connections=0", "connections: '0' is not a whole number from 1 to 64"),
        ("connections=٣", "connections: '٣' is not a whole number from 1 to 64"),
        ("poll=-1", "poll: '-1' is not a whole number from 0 to 10000"),
        ("window=1", "window: '1' is not between 65536 and 1073741824 bytes"),
        ("reserve=101%", "reserve: '101%' is more than all of the file system"),
        ("shared_cache=", "shared_cache: needs the path of a folder"),
        ("finish_by=soon", "finish_by: 'soon' is not a duration (such as 30, 5m, 2h)"),
        ("allow_other,allow_root", "allow_root: excludes 'allow_other'"),
        ("a\x1b[2J=1", "a\\x1b[2J: is not a mount option"),
    ],
)
def test_wrong_option_is_named_in_one_line(text: str, line: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_mount_options([text])
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:9100", ("127.0.0.1", 9100)), ("[::1]:0", ("::1", 0)), ("localhost:80", ("localhost", 80))],
)
def test_metrics_are_told_at_a_host_and_port(text: str, address: tuple[str, int]) -> None:
    assert parse_mount_options([f"metrics={text}"]).metrics == address


@pytest.mark.parametrize("text", [":9100", "9100", "host", "host:", "host:65536", "::1:9100", "[]:1", "host:-1"])
def test_metrics_need_a_host_and_a_port(text: str) -> None:
    with pytest.raises(UsageError, match=r"^metrics: "):
        parse_mount_options([f"metrics={text}"])


def test_sloppy_ignores_unknown_options_but_not_wrong_values() -> None:
    assert parse_mount_options(["mod=cow,ro"], sloppy=True).read_only
    with pytest.raises(UsageError):
        parse_mount_options(["mode=fast"], sloppy=True)


@given(st.lists(st.text()))
def test_any_text_is_understood_or_refused(texts: list[str]) -> None:
    with contextlib.suppress(UsageError):  # any other exception fails
        parse_mount_options(texts)


@given(st.lists(st.text(st.characters(exclude_characters="\\"), min_size=1)))
def test_escaping_commas_round_trips(parts: list[str]) -> None:
    assert split_options(",".join(part.replace(",", "\\,") for part in parts)) == parts


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("512", 512), ("4k", 4096), ("1.5G", 3 << 29), ("2T", 2 << 40), ("1MiB", 1 << 20)]
)
def test_sizes_are_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text, "size") == size


@pytest.mark.parametrize("text", ["", "k", "-1", "1.0001k", "1e3", "9999999999T", "1 2"])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a number of bytes"):
        parse_size(text, "size")


def test_durations_have_units() -> None:
    assert [parse_duration(text, "t") for text in ("90", "1.5m", "2h", "1d")] == [90, 90, 7200, 86400]
