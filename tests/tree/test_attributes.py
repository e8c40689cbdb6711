from __future__ import annotations

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.config import Mode, StreamOptions
from qedfs.errors import Held, QedfsError
from qedfs.tree.attributes import progress, read_attribute, readable_names, refuse_removal, write_attribute
from tests.tree.tree_fakes import FakeCounts, FakeDisk, FakeStatistics, FakeStream, leaf_of

CONTRACT = """
    virtual_size cluster_size clusters_total clusters_data clusters_zero clusters_backing allocated_bytes progress mode
    state hold paused stream_rate stream_floor finish_by rate eta backing backing_format backing_bytes_read density
    stream_step last_error
""".split()
WRITE_ONLY = ("prefetch",)


async def value(disk: FakeDisk, name: str) -> str:
    return (await read_attribute(leaf_of("vm.raw", disk), b"user.qedfs." + name.encode())).decode()


async def refusal(disk: FakeDisk, name: str, text: bytes) -> int:
    """The errno with which setting an attribute is refused; nothing may have changed."""
    with pytest.raises(QedfsError) as caught:
        await write_attribute(leaf_of("vm.raw", disk), name.encode(), text, 0)
    assert disk.calls == []
    return caught.value.errno


def test_every_name_of_the_contract_is_listed() -> None:
    assert readable_names() == [f"user.qedfs.{name}".encode() for name in [*CONTRACT, "backing_state", "leaf"]]


async def test_every_listed_name_can_be_read() -> None:
    for name in readable_names():
        assert (await read_attribute(leaf_of("vm.raw", FakeDisk()), name)).isascii()


async def test_counts_add_up_to_the_total() -> None:
    disk = FakeDisk(size=10 * 65536)
    disk.facts = FakeStatistics(clusters_total=10, backing="nbd://host/base")
    disk.counted = FakeCounts(data=3, zero=2)
    assert await value(disk, "clusters_total") == "10"
    assert await value(disk, "clusters_data") == "3"
    assert await value(disk, "clusters_zero") == "2"
    assert await value(disk, "clusters_backing") == "5"
    assert await value(disk, "allocated_bytes") == str(5 * 65536)
    assert await value(disk, "progress") == "50.00"


async def test_allocated_bytes_end_with_the_disk() -> None:
    disk = FakeDisk(size=65536 + 512)
    disk.facts = FakeStatistics(clusters_total=2, backing="nbd://host/base")
    disk.counted = FakeCounts(data=2)
    assert await value(disk, "allocated_bytes") == str(65536 + 512)


@pytest.mark.parametrize(
    ("local", "total", "text"),
    [(0, 1, "0.00"), (1, 3, "33.33"), (2, 3, "66.66"), (99999, 100000, "99.99"), (3, 3, "100.00"), (0, 0, "100.00")],
)
def test_progress_has_two_decimals_and_is_full_only_at_the_end(local: int, total: int, text: str) -> None:
    assert progress(local, total) == text


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 40))
def test_progress_is_100_exactly_when_nothing_is_missing(local: int, total: int) -> None:
    assert (progress(min(local, total), total) == "100.00") == (local >= total)


async def test_density_has_256_percentages() -> None:
    disk = FakeDisk()
    disk.percentages = [100.0, 100 / 3, 0.00001, *[0.0] * 253]
    parts = (await value(disk, "density")).split(",")
    assert len(parts) == 256
    assert parts[:4] == ["100", "33.33", "0", "0"]


async def test_facts_of_the_disk_are_shown() -> None:
    disk = FakeDisk(held=True)
    disk.facts = FakeStatistics(1, Mode.STREAM, "held", "nbd://h/b", "raw", "healthy", 77, last_error="EIO at noon")
    shown = [await value(disk, name) for name in ("mode", "state", "hold", "backing", "backing_format")]
    assert shown == ["stream", "held", "1", "nbd://h/b", "raw"]
    assert await value(disk, "backing_bytes_read") == "77"
    assert await value(disk, "last_error") == "EIO at noon"
    assert await value(disk, "leaf") == "/images/vm.qed"


async def test_limits_of_the_stream_are_those_of_the_mount() -> None:
    leaf = leaf_of("vm.raw", FakeDisk(), stream=StreamOptions(rate=5, floor=6, finish_by=7200.0))
    names = (b"stream_rate", b"stream_floor", b"finish_by")
    assert [await read_attribute(leaf, b"user.qedfs." + name) for name in names] == [b"5", b"6", b"7200"]


@pytest.mark.parametrize("text", [b"stream", b"stream\n", b"stream\0"])
async def test_the_mode_can_be_set(text: bytes) -> None:
    disk = FakeDisk()
    await write_attribute(leaf_of("vm.raw", disk), b"user.qedfs.mode", text, 0)
    assert disk.calls == [("set_mode", Mode.STREAM)]


async def test_prefetch_queues_a_range() -> None:
    disk = FakeDisk()
    await write_attribute(leaf_of("vm.raw", disk), b"user.qedfs.prefetch", b"4096 8192", 0)
    await write_attribute(leaf_of("vm.raw", disk), b"user.qedfs.prefetch", b"1M 64k", 0)
    assert disk.calls == [("prefetch", 4096, 8192), ("prefetch", 1 << 20, 65536)]


async def test_prefetch_of_a_held_image_is_refused() -> None:
    with pytest.raises(Held):
        await write_attribute(leaf_of("vm.raw", FakeDisk(held=True)), b"user.qedfs.prefetch", b"0 1", 0)


@pytest.mark.parametrize("name", WRITE_ONLY)
async def test_a_write_only_attribute_cannot_be_read(name: str) -> None:
    with pytest.raises(QedfsError) as caught:
        await value(FakeDisk(), name)
    assert caught.value.errno == errno.EACCES


@pytest.mark.parametrize("name", ["user.qedfs.other", "user.qedfs.", "user.other", "user.qedfs.Mode"])
async def test_an_unknown_name_is_no_data(name: str) -> None:
    with pytest.raises(QedfsError) as caught:
        await read_attribute(leaf_of("vm.raw", FakeDisk()), name.encode())
    assert caught.value.errno == errno.ENODATA
    assert await refusal(FakeDisk(), name, b"1") == errno.ENODATA


@pytest.mark.parametrize("name", ["security.selinux", "trusted.x", "system.posix_acl_access"])
async def test_foreign_namespaces_have_no_data_and_take_none(name: str) -> None:
    with pytest.raises(QedfsError) as caught:
        await read_attribute(leaf_of("vm.raw", FakeDisk()), name.encode())
    assert caught.value.errno == errno.ENODATA
    assert await refusal(FakeDisk(), name, b"1") == errno.EOPNOTSUPP


@pytest.mark.parametrize(
    "name", sorted(set(CONTRACT) - {*"mode hold paused stream_rate stream_floor finish_by stream_step".split()})
)
async def test_a_read_only_attribute_cannot_be_set(name: str) -> None:
    assert await refusal(FakeDisk(), f"user.qedfs.{name}", b"1") == errno.EACCES


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("mode", text) for text in (b"", b"COW", b"cow cow", b"\xff")),
        *(("hold", text) for text in (b"1", b"", b"no")),
        *(("paused", text) for text in (b"2", b"", b"yes")),
        *(("stream_rate", text) for text in (b"-1", b"fast", b"")),
        *(("stream_floor", text) for text in (b"-1", b"1X")),
        *(("finish_by", text) for text in (b"soon", b"-2h")),
        *(("prefetch", text) for text in (b"", b"1", b"1 2 3", b"-1 5", b"a b", b"0 9223372036854775808", b"1.5 2")),
        *(("stream_step", text) for text in (b"", b"1 2", b"x", b"1k", b"9223372036854775808")),
    ],
)
async def test_a_bad_value_is_refused(name: str, text: bytes) -> None:
    assert await refusal(FakeDisk(), f"user.qedfs.{name}", text) == errno.EINVAL


async def test_streaming_is_steered_by_attributes() -> None:
    leaf = leaf_of("vm.raw", FakeDisk())
    settings = {"paused": b"1", "stream_rate": b"2M", "stream_floor": b"0", "finish_by": b"2h"}
    for name, text in settings.items():
        await write_attribute(leaf, b"user.qedfs." + name.encode(), text, 0)
    shown = [await read_attribute(leaf, b"user.qedfs." + name.encode()) for name in settings]
    assert shown == [b"1", b"2097152", b"0", b"7200"]
    await write_attribute(leaf, b"user.qedfs.finish_by", b"0", 0)
    assert await read_attribute(leaf, b"user.qedfs.finish_by") == b"", "nothing is promised any more"


async def test_a_step_answers_in_sectors_when_it_is_read() -> None:
    disk = FakeDisk(size=1 << 20)
    leaf = leaf_of("vm.raw", disk)
    assert await read_attribute(leaf, b"user.qedfs.stream_step") == b"0"
    await write_attribute(leaf, b"user.qedfs.stream_step", b"8", 0)
    assert disk.calls == [("stream", 4096)]
    assert await read_attribute(leaf, b"user.qedfs.stream_step") == b"2040"
    assert await refusal(FakeDisk(held=True), "user.qedfs.stream_step", b"0") == errno.EBUSY


@pytest.mark.parametrize(
    ("name", "allowed", "more"),
    [
        ("stream_rate", b"1M", [b"3M", b"0"]),
        ("stream_floor", b"100k", [b"2M"]),
        ("finish_by", b"3h", [b"1h"]),
    ],
)
async def test_others_than_root_and_the_mounter_stay_within_the_options(
    name: str, allowed: bytes, more: list[bytes]
) -> None:
    leaf = leaf_of("vm.raw", FakeDisk(), stream=StreamOptions(rate=2 << 20, floor=1 << 20, finish_by=7200.0))
    full_name = b"user.qedfs." + name.encode()
    await write_attribute(leaf, full_name, allowed, os.getuid() + 1)
    set_to = await read_attribute(leaf, full_name)
    for text in more:
        with pytest.raises(QedfsError) as caught:
            await write_attribute(leaf, full_name, text, os.getuid() + 1)
        assert caught.value.errno == errno.EPERM
        assert await read_attribute(leaf, full_name) == set_to
        await write_attribute(leaf, full_name, text, os.getuid())
        await write_attribute(leaf, full_name, allowed, os.getuid())


async def test_the_stream_refines_the_state_of_the_disk() -> None:
    leaf = leaf_of("vm.raw", FakeDisk())
    assert await read_attribute(leaf, b"user.qedfs.state") == b"passive"
    assert isinstance(leaf.stream, FakeStream)
    leaf.stream.stated, leaf.stream.rate, leaf.stream.eta = "idle-wait", 1234.5, 10.2
    assert await read_attribute(leaf, b"user.qedfs.state") == b"idle-wait"
    assert await read_attribute(leaf, b"user.qedfs.rate") == b"1234"
    assert await read_attribute(leaf, b"user.qedfs.eta") == b"11"


async def test_releasing_the_hold_drops_what_the_kernel_has_cached() -> None:
    disk = FakeDisk(held=True)

    async def drop() -> None:
        disk.calls.append(("drop", disk.held))

    await write_attribute(leaf_of("vm.raw", disk), b"user.qedfs.hold", b"0", 0, drop)
    assert disk.calls == [("release_hold",), ("drop", True)]
    assert await value(disk, "hold") == "0"


@pytest.mark.parametrize(
    ("name", "number"),
    [("user.qedfs.mode", errno.EACCES), ("user.qedfs.other", errno.ENODATA), ("security.x", errno.EOPNOTSUPP)],
)
def test_no_attribute_can_be_removed(name: str, number: int) -> None:
    with pytest.raises(QedfsError) as caught:
        refuse_removal(name.encode())
    assert caught.value.errno == number


async def test_a_disk_without_backing_needs_none_for_anything() -> None:
    disk = FakeDisk(size=4 * 65536)
    disk.facts = FakeStatistics(clusters_total=4, backing="")
    disk.counted = FakeCounts(data=1)
    assert await value(disk, "progress") == "100.00"
    assert await value(disk, "allocated_bytes") == str(4 * 65536)
    assert await value(disk, "clusters_backing") == "3"
