"""qedfs with one step of its orderings taken out: each function changes what it must by a monkeypatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qedfs.disk import completion, growth
from qedfs.disk.populate import Populate
from qedfs.image import check, rebase
from qedfs.image.cache import Table
from qedfs.image.commit import Committer
from qedfs.image.geometry import SECTOR
from qedfs.image.header import Header
from qedfs.image.image import Image
from qedfs.image.storage import Storage
from tests.model.recording_storage import RecordingStorage
from tests.powercut import workloads

_run, _write_tables, _flush = Committer._run, Committer._write_tables, Committer.flush
_commit, _take = Committer.commit, Committer._take


class _Phases:
    """Knows in which step of a commit a flush is, and leaves those of `dropped` out: 2, 4, 5, or 0 (not in a commit)."""

    def __init__(self, patch: pytest.MonkeyPatch, *dropped: int, late: bool = False) -> None:
        self.step = 0
        phases = self

        async def run(committer: Committer, batch: Any) -> None:
            phases.step = 5 if committer.clean_but_running else 2  # type: ignore[attr-defined]
            try:
                await _run(committer, batch)
            finally:
                phases.step = 0

        async def write_tables(committer: Committer, snapshot: Any) -> None:
            phases.step = 4
            await _write_tables(committer, snapshot)
            if late:
                await _flush(committer)
            phases.step = 5

        async def flush(committer: Committer) -> None:
            if phases.step not in dropped:
                await _flush(committer)

        clean = property(lambda committer: not any(t.dirty or not t.named for t in committer._tables))
        patch.setattr(Committer, "clean_but_running", clean, raising=False)
        patch.setattr(Committer, "_run", run)
        patch.setattr(Committer, "_write_tables", write_tables)
        patch.setattr(Committer, "flush", flush)


def no_step_2_flush(patch: pytest.MonkeyPatch) -> None:
    _Phases(patch, 2)


def entries_before_data(patch: pytest.MonkeyPatch) -> None:
    _Phases(patch, 2, late=True)


def no_step_4_flush(patch: pytest.MonkeyPatch) -> None:
    _Phases(patch, 4)


def no_step_5_flush(patch: pytest.MonkeyPatch) -> None:
    _Phases(patch, 5)


def l1_before_table(patch: pytest.MonkeyPatch) -> None:
    async def run(committer: Committer, batch: Any) -> None:
        live = committer._l1.cast("B")
        for table in committer._tables:
            if not table.named:
                committer._l1[table.index] = table.offset
                start = table.index * 8 // SECTOR * SECTOR
                await committer._storage.write(committer._l1_offset + start, bytes(live[start : start + SECTOR]))
        await _run(committer, batch)

    patch.setattr(Committer, "_run", run)


def new_table_not_written_as_zeros(patch: pytest.MonkeyPatch) -> None:
    """The room of a new table is taken and not written."""
    make = Image._make_table

    async def make_table(image: Image, index: int) -> Table:
        storage, image.storage = image.storage, _Deaf()  # type: ignore[assignment]
        try:
            return await make(image, index)
        finally:
            image.storage = storage

    patch.setattr(Image, "_make_table", make_table)


class _Deaf:
    async def write(self, offset: int, data: object) -> None:
        pass


def marks_not_given_back(patch: pytest.MonkeyPatch) -> None:
    async def run(committer: Committer, batch: Any) -> None:
        tables = list(committer._tables)
        try:
            await _run(committer, batch)
        except BaseException:
            for table in tables:
                table.dirty = set()
            raise

    patch.setattr(Committer, "_run", run)


def evicted_during_commit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Table, "evictable", property(lambda table: not table.dirty and table.named))


def waiter_joins_running_commit(patch: pytest.MonkeyPatch) -> None:
    async def commit(committer: Committer, *, durable: bool) -> None:
        if committer._running is not None:
            await committer._running.ended.wait()
        else:
            await _commit(committer, durable=durable)

    patch.setattr(Committer, "commit", commit)


def live_table_written(patch: pytest.MonkeyPatch) -> None:
    """Step 3 writes the entries as they are by then, not as they were when the snapshot was taken."""

    def take(committer: Committer, table: Table) -> Any:
        taken = _take(committer, table)
        live = table.entries.cast("B")
        pieces: Any = [(o, live[o - table.offset : o - table.offset + len(d)]) for o, d in taken.pieces]
        return taken._replace(pieces=pieces)

    patch.setattr(Committer, "_take", take)


def need_check_not_durable(patch: pytest.MonkeyPatch) -> None:
    """The first allocation follows the mark without the flush in between."""
    _mark(patch, written=True, flushed=False)


def need_check_not_written(patch: pytest.MonkeyPatch) -> None:
    """The mark is never set; its flush is made."""
    _mark(patch, written=False, flushed=True)


def _mark(patch: pytest.MonkeyPatch, *, written: bool, flushed: bool) -> None:
    change_header = Image._change_header

    async def changed(image: Image, change: Callable[[Header], Header]) -> None:
        header = change(image.header)
        # Setting what is set already is the begin of a mount, too.
        if not header.needs_check or header.image_size != image.header.image_size:
            await change_header(image, change)
            return
        if written:
            await image.storage.write(0, header.encode())
            image.header = header
        if flushed:
            await image.committer.flush()

    patch.setattr(Image, "_change_header", changed)


def survey_repair_not_flushed(patch: pytest.MonkeyPatch) -> None:
    survey, commit = Image._survey, Image.commit

    async def surveyed(image: Image) -> None:
        async def weak(*, durable: bool) -> None:
            await commit(image, durable=False)

        image.commit = weak  # type: ignore[method-assign]
        await survey(image)
        del image.commit

    patch.setattr(Image, "_survey", surveyed)


def survey_repair_and_mark_not_flushed(patch: pytest.MonkeyPatch) -> None:
    survey_repair_not_flushed(patch)
    need_check_not_durable(patch)


def repair_not_flushed(patch: pytest.MonkeyPatch) -> None:
    """`check --repair` reclaims, and clears the mark, before what it has read or repaired is durable."""
    original = check.check_image

    async def checked(storage: RecordingStorage, *, repair: bool) -> check.CheckResult:
        flush, left = storage.flush, [1]

        async def once() -> None:
            if left:
                left.pop()
            else:
                await flush()

        storage.flush = once  # type: ignore[method-assign]
        try:
            return await original(storage, repair=repair)
        finally:
            storage.flush = flush  # type: ignore[method-assign]

    patch.setattr(workloads, "check_image", checked)


def growth_not_durable(patch: pytest.MonkeyPatch) -> None:
    commit = Image.commit

    async def weak(image: Image, *, durable: bool) -> None:
        await commit(image, durable=durable and image.storage.name != "growing")

    async def grow(*arguments: Any) -> None:
        image = arguments[0]
        name, image.storage.name = image.storage.name, "growing"
        try:
            await original(*arguments)
        finally:
            image.storage.name = name

    original = growth.grow
    patch.setattr(growth, "grow", grow)
    patch.setattr(Image, "commit", weak)


def header_before_record(patch: pytest.MonkeyPatch) -> None:
    """A rebase stores the pins when the header names the new backing already."""
    store = rebase._store
    put_off = [1]

    async def stored(image: Image, record: Any) -> bool:
        return put_off.pop() == 1 if put_off else await store(image, record)

    patch.setattr(rebase, "_store", stored)


def completed_before_commit(patch: pytest.MonkeyPatch) -> None:
    """The backing is dropped first, and what was copied is committed afterwards."""

    async def complete(image: Image, claims: Any, populate: Populate) -> bool:
        if not await populate.is_all_local():
            return False
        await image.drop_backing()
        await image.commit(durable=True)
        return True

    patch.setattr(completion, "complete", complete)


def magic_before_tables(patch: pytest.MonkeyPatch) -> None:
    """`create` writes the header with no flush before it."""
    flush = RecordingStorage.flush
    skipped: list[Storage] = []

    async def flushed(storage: RecordingStorage) -> None:
        if storage.content[:4] != b"QED\0" and storage.content and storage not in skipped:
            skipped.append(storage)
        else:
            await flush(storage)

    patch.setattr(RecordingStorage, "flush", flushed)
