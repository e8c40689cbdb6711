"""A QED image over any source, read-only, with its own backing below: one layer of a chain.

Tables are read in pages as they are needed, so that neither a large image nor a hostile one costs memory or time in
proportion to its size; the pages of a whole chain share one budget. An entry is judged before it is used. NEED_CHECK
does not matter here: what it warns of, entries past the end of the file, is found when they are reached.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import trio

from qedfs.backing.base import Extent, Identity, Source, merged
from qedfs.errors import BackingRefused, CorruptEntry, InvalidImage
from qedfs.image.header import SIZE, Header, decode, decode_backing_name
from qedfs.image.tables import UNALLOCATED, Run, State, all_valid, as_entries, run_length

PAGE = 64 << 10
"""Bytes of a table that are read at once; a smaller table is one page. One page of a default image maps 512 MiB."""
PAGES_BUDGET = 32 << 20
"""Bytes of pages that one chain keeps."""
RUNS_PER_TURN = 256
"""Look-ups in cached pages, some microseconds each, before other tasks get a turn."""
PIECES_AT_ONCE = 16
"""Of one read that is scattered over a fragmented image."""


class Page(NamedTuple):
    """`entries` of a table; `valid` if all of them are sound, so that a look-up need not judge again."""

    entries: memoryview
    valid: bool


class PageCache:
    """The least recently used pages of a chain's tables go when there are more than `budget` bytes of them."""

    def __init__(self, budget: int = PAGES_BUDGET) -> None:
        self.bytes = 0
        self._budget = budget
        self._pages: OrderedDict[tuple[object, int], Page] = OrderedDict()
        self._loading: dict[tuple[object, int], trio.Event] = {}

    async def get(self, owner: object, offset: int, load: Callable[[], Awaitable[Page]]) -> Page:
        """Return the page of `owner` (anything hashable) at file offset `offset`, loaded once however many ask.

        If the load fails or is cancelled, those who waited for it try by themselves.
        """
        key = (owner, offset)
        while True:
            page = self._pages.get(key)
            if page is not None:
                self._pages.move_to_end(key)
                return page
            loading = self._loading.get(key)
            if loading is None:
                break
            await loading.wait()
        done = self._loading[key] = trio.Event()
        try:
            page = self._pages[key] = await load()
        finally:
            del self._loading[key]
            done.set()
        self.bytes += page.entries.nbytes
        while self.bytes > self._budget and len(self._pages) > 1:
            self.bytes -= self._pages.popitem(last=False)[1].entries.nbytes
        return page


class QedSource(Source):
    """The disk of a QED image. Made from `read_header`'s answer; owns the sources it is given."""

    format = "qed"

    def __init__(self, file: Source, header: Header, backing: Source | None, pages: PageCache) -> None:
        self.name = file.name
        self.size = header.image_size
        self.identity = _identity(header, file, backing)
        self.may_straggle = file.may_straggle or (backing is not None and backing.may_straggle)
        self._file = file
        self._backing = backing
        self._pages = pages
        self._header = header
        self._geometry = header.geometry
        self._usable = header.geometry.usable_length(file.size)
        self._page_bytes = min(PAGE, header.geometry.table_bytes)

    @property
    def tells_content(self) -> bool:
        # The tag of a chain is made of what its layers tell, and be it only their sizes.
        return self._file.tells_content and (self._backing is None or self._backing.tells_content)

    async def read_into(self, pos: int, buffer: memoryview) -> None:
        runs: list[Run] = []
        for run in await self.runs(pos, len(buffer)):
            if run.state is State.ZERO or (run.state is State.BACKING and self._backing is None):
                start = run.pos - pos
                buffer[start : start + run.length] = bytes(run.length)
            else:
                runs.append(run)

        async def read(run: Run) -> None:
            part = buffer[run.pos - pos :][: run.length]
            if run.state is State.DATA:
                await _read_clipped(self._file, run.offset, part)
            elif self._backing is not None:
                await _read_clipped(self._backing, run.pos, part)

        await _each(read, runs)

    async def extents(self, pos: int, length: int) -> list[Extent]:
        extents: list[Extent] = []
        for run in await self.runs(pos, length):
            if run.state is State.BACKING and self._backing is not None:
                inside = min(max(self._backing.size - run.pos, 0), run.length)
                if inside:
                    extents += await self._backing.extents(run.pos, inside)
                extents.append(Extent(run.length - inside, True))
            else:
                extents.append(Extent(run.length, run.state is not State.DATA))
        return merged(extents)

    async def aclose(self) -> None:
        try:
            await self._file.aclose()
        finally:
            if self._backing is not None:
                await self._backing.aclose()

    async def runs(self, pos: int, length: int) -> list[Run]:
        """Return what the tables say of the range, without gaps and in order; neighbours that belong together are one.

        Raises:
            CorruptEntry: an entry on the way cannot be so.
        """
        runs: list[Run] = []
        end = pos + length
        for turn in itertools.count(1):
            if pos >= end:
                break
            run = await self._run_at(pos, end)
            if runs and _continues(runs[-1], run):
                runs[-1] = runs[-1]._replace(length=runs[-1].length + run.length)
            else:
                runs.append(run)
            pos += run.length
            if not turn % RUNS_PER_TURN:
                await trio.lowlevel.checkpoint()
        return runs

    async def _run_at(self, pos: int, end: int) -> Run:
        """Return the run at `pos`, to the end of its page of the table at most."""
        geometry = self._geometry
        span = geometry.span
        l1_index, within = divmod(pos, span)
        table = await self._table_offset(l1_index)
        if table == UNALLOCATED:
            return Run(State.BACKING, pos, min(end, (l1_index + 1) * span) - pos)
        cluster, skip = divmod(within, geometry.cluster_size)
        page, index = await self._page_of(table, cluster, self._load_l2)
        last = min(len(page.entries), index + geometry.clusters(skip + end - pos))
        count = run_length(page.entries, index, last, geometry.cluster_size)
        offset = page.entries[index]
        length = min(count * geometry.cluster_size - skip, end - pos)
        if offset <= State.ZERO:
            return Run(State(offset), pos, length)
        if not page.valid:
            self._check_data(offset, cluster)
            # The first cluster is sound; the ones that follow it are as long as they lie inside the file.
            length = min(length, self._usable - offset - skip)
        return Run(State.DATA, pos, length, offset + skip)

    def _check_data(self, offset: int, cluster: int) -> None:
        if not self._geometry.is_cluster_offset(offset, self._header.room, self._usable):
            raise CorruptEntry(self.name, f"the table entry {offset:#x} of cluster {cluster} lies outside the file")

    async def _table_offset(self, index: int) -> int:
        page, index_in_page = await self._page_of(self._header.l1_table_offset, index, self._load_l1)
        offset: int = page.entries[index_in_page]
        if offset != UNALLOCATED and not self._geometry.is_table_offset(offset, self._header.room, self._usable):
            raise CorruptEntry(self.name, f"the L1 entry {offset:#x} at index {index} lies outside the file")
        return offset

    async def _page_of(self, table: int, index: int, load: Callable[[int], Awaitable[Page]]) -> tuple[Page, int]:
        """Return the page of the table at offset `table` that holds entry `index`, and the entry's index there."""
        number, index_in_page = divmod(index, self._page_bytes // 8)
        offset = table + number * self._page_bytes
        # `load` is bound to this layer and tells L1 from L2: in a hostile image one page may be part of both.
        return await self._pages.get(load, offset, lambda: load(offset)), index_in_page

    async def _load_l1(self, offset: int) -> Page:
        return Page(await self._read_entries(offset), False)

    async def _load_l2(self, offset: int) -> Page:
        entries = await self._read_entries(offset)
        return Page(entries, all_valid(entries, self._geometry, self._header.room, self._usable))

    async def _read_entries(self, offset: int) -> memoryview:
        buffer = bytearray(self._page_bytes)
        await _read_clipped(self._file, offset, memoryview(buffer))
        return as_entries(buffer)


async def read_header(file: Source) -> tuple[Header, str]:
    """Return the header of the image in `file` and the name of its backing, empty if it has none.

    Raises:
        BackingRefused: it is no QED image that we can read.
    """
    start = bytearray(min(SIZE, file.size))
    await file.read_into(0, memoryview(start))
    try:
        header = decode(bytes(start), file.size, file.name)
    except InvalidImage as error:
        raise BackingRefused(error.what, error.why) from error
    if not header.has_backing:
        return header, ""
    raw = bytearray(header.backing_name_size)
    await _read_clipped(file, header.backing_name_offset, memoryview(raw))
    return header, decode_backing_name(bytes(raw))


def _identity(header: Header, file: Source, backing: Source | None) -> Identity:
    """Return the identity of the disk: its size, and a tag that differs when any layer of the chain is another one."""
    if backing is None:
        return Identity(header.image_size, file.identity.tag)
    layers = [file.identity.size, file.identity.tag, backing.identity.size, backing.identity.tag]
    digest = hashlib.sha256(json.dumps(layers).encode()).hexdigest()
    return Identity(header.image_size, f"chain:{digest[:32]}")


def _continues(run: Run, following: Run) -> bool:
    if run.state is not following.state:
        return False
    return run.state is not State.DATA or run.offset + run.length == following.offset


async def _read_clipped(source: Source, pos: int, buffer: memoryview) -> None:
    """Fill `buffer` from `source`; past its end there are zeros."""
    inside = min(max(source.size - pos, 0), len(buffer))
    if inside:
        await source.read_into(pos, buffer[:inside])
    if inside < len(buffer):
        buffer[inside:] = bytes(len(buffer) - inside)


async def _each(read: Callable[[Run], Awaitable[None]], runs: list[Run]) -> None:
    """Call `read` for all runs, some at once; the first failure ends the others and is raised as it is."""
    if len(runs) == 1:
        await read(runs[0])
        return
    waiting = iter(runs)
    failures: list[Exception] = []

    async def work() -> None:
        try:
            for run in waiting:
                await read(run)
        except Exception as error:
            failures.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for _ in range(min(len(runs), PIECES_AT_ONCE)):
            nursery.start_soon(work)
    if failures:
        raise failures[0]
