"""Looking up, and the header of an open image."""

from __future__ import annotations

import struct
from contextlib import aclosing
from dataclasses import replace

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from qedfs.errors import CorruptEntry, InvalidImage
from qedfs.image.geometry import Geometry
from qedfs.image.image import Image, open_image
from qedfs.image.record import Record
from qedfs.image.tables import State
from tests.image.memory_storage import MemoryStorage
from tests.model.effort import examples
from tests.model.memory_disk import empty_image, memory_disk, pattern
from tests.model.reference import judge

G = Geometry(4096, 1)
C = G.cluster_size
SIZE = 2 * G.span


async def image_of(entries: dict[int, int], clusters: int, *, size: int = SIZE) -> Image:
    """Return an image with these L2 entries (by cluster) and `clusters` data clusters, the first at 4 * C."""
    storage = await empty_image(size, geometry=G)
    storage.content.extend(bytes(2 * C) + pattern(clusters * C))
    for table in (0, 1):
        struct.pack_into("<Q", storage.content, C + table * 8, (2 + table) * C)
    for cluster, entry in entries.items():
        struct.pack_into("<Q", storage.content, (2 + cluster // 512) * C + cluster % 512 * 8, entry)
    return await open_image(MemoryStorage(storage.content, writable=False))


@examples(100)
@given(
    kinds=st.lists(st.sampled_from(["backing", "zero", "data", "data", "gap", "bad"]), min_size=1, max_size=40),
    start=st.sampled_from([0, 480, 500, 511]),
    pos=st.integers(0, 40 * C),
    length=st.integers(1, 40 * C),
)
async def test_runs_say_of_each_byte_what_its_entry_says(kinds: list[str], start: int, pos: int, length: int) -> None:
    entries: dict[int, int] = {}
    following = 4
    for cluster, kind in enumerate(kinds, start):
        if kind in ("data", "gap"):
            following += kind == "gap"
            entries[cluster] = following * C
            following += 1
        else:
            entries[cluster] = {"backing": 0, "zero": 1, "bad": 12345}[kind]
    image = await image_of(entries, following)
    pos = min(start * C + pos, SIZE - 1)
    end = min(pos + length, SIZE)
    offset = image.data_offset(pos, end - pos)
    at = pos
    while at < end:
        entry = entries.get(at // C, 0)
        if entry > 1 and entry % C:
            with pytest.raises(CorruptEntry):
                await image.run(at, end - at)
            at = (at // C + 1) * C
            continue
        run = await image.run(at, end - at)
        assert run.pos == at
        assert 0 < run.length <= end - at
        for byte in range(at, at + run.length, 512):
            entry = entries.get(byte // C, 0)
            assert run.state is {0: State.BACKING, 1: State.ZERO}.get(entry, State.DATA)
            if run.state is State.DATA:
                assert run.offset + byte - at == entry + byte % C
        at += run.length
    first = image.tables.get(pos // G.span)
    assert first is not None
    sound = first.valid and pos // G.span == (end - 1) // G.span
    offset = image.data_offset(pos, end - pos)
    whole = sound and (await image.run(pos, end - pos)).length == end - pos
    if offset >= 0:
        assert whole
        assert (await image.run(pos, end - pos)).offset == offset
    elif whole:
        assert (await image.run(pos, end - pos)).state is not State.DATA


async def test_a_walk_over_the_runs_covers_the_disk() -> None:
    image = await image_of({0: 4 * C, 1: 5 * C, 2: 1, 600: 7 * C}, 8)
    async with aclosing(image.runs(0, SIZE)) as walk:
        runs = [run async for run in walk]
    assert sum(run.length for run in runs) == SIZE
    assert [(run.state, run.pos // C) for run in runs if run.state is not State.BACKING] == [
        (State.DATA, 0),
        (State.ZERO, 2),
        (State.DATA, 600),
    ]


async def test_a_run_of_data_ends_at_the_end_of_a_damaged_file() -> None:
    image = await image_of({i: (4 + i) * C for i in range(6)}, 4)
    assert (await image.run(C, 5 * C)).length == 3 * C
    with pytest.raises(CorruptEntry, match="cluster 4"):
        await image.run(4 * C, C)


async def test_bits_that_a_writer_must_clear_are_cleared_durably_before_anything_else() -> None:
    storage = await empty_image(SIZE, geometry=G)
    struct.pack_into("<Q", storage.content, 32, 0xFF)
    reader = MemoryStorage(storage.content, writable=False)
    await open_image(reader)
    assert reader.log == []
    await open_image(storage)
    assert storage.kinds() == ["write", "flush"]
    assert storage.durable[32:40] == bytes(8)


async def test_an_image_that_is_none_is_refused() -> None:
    for content in (b"", b"QED\0", bytes(100_000)):
        with pytest.raises(InvalidImage):
            await open_image(MemoryStorage(content))


async def test_the_record_is_stored_durably_and_survives_the_other_header_changes() -> None:
    storage = await empty_image(SIZE, geometry=G)
    image = await open_image(storage)
    assert await image.change_record(lambda record: replace(record, mode="cow", hold=True))
    assert storage.kinds() == ["write", "flush"]
    await image.begin_allocating()
    await image.aclose()
    again = await open_image(storage)
    assert again.record == Record(mode="cow", hold=True)
    assert again.backing_name == "base.raw"


async def test_dropping_the_backing_leaves_an_image_that_stands_alone() -> None:
    storage = await empty_image(4 * C, geometry=G)
    base = pattern(4 * C)
    async with memory_disk(storage, base) as rig:
        await rig.disk.write(0, base)
        await rig.disk.flush()
        await rig.image.drop_backing()
    assert judge(storage.durable).content == base
    image = await open_image(storage)
    assert (image.backing_name, image.header.has_backing) == ("", False)


async def test_changes_of_the_header_do_not_undo_each_other() -> None:
    storage = await empty_image(SIZE, geometry=G)
    image = await open_image(storage)
    gate = storage.hold("flush")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.begin_allocating)
        await gate.arrived()
        nursery.start_soon(image.drop_backing)
        gate.release()
    again = await open_image(MemoryStorage(storage.content))
    assert again.header.needs_check
    assert not again.header.has_backing
    assert again.header == replace(image.header)
