"""The boot matrix: every hypervisor, cache mode and way of I/O, over every backing and in every mode, as one table."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

from contrib.boot import web
from contrib.boot.boot import MODES, Options, Report, boot
from contrib.boot.guest import BootError, Guest
from contrib.boot.hypervisors import AIOS, CACHES, DIRECT, Drive
from contrib.boot.server import SERVERS, TRANSPORTS

DRIVES = tuple(Drive(cache, aio) for cache, aio in product(CACHES, AIOS) if aio != "native" or cache in DIRECT)
"""Every pair that QEMU accepts."""

Row = tuple[str, Drive | None]
"""A hypervisor, and how it is to use the disk, if that can be told."""
ROWS: tuple[Row, ...] = (*product(("q35", "microvm"), DRIVES), ("uml", None))
COLUMNS = tuple(product((*SERVERS, web.SERVER), MODES))


def cells() -> Iterator[tuple[Row, tuple[str, str], Options]]:
    """Give every boot of the matrix: its row, its column, and what to boot.

    `unmap` and the transport of NBD go round, so that each of their values meets every row and every column.
    """
    for (number, row), (place, (server, mode)) in product(enumerate(ROWS), enumerate(COLUMNS)):
        hypervisor, drive = row
        used = (drive or Drive())._replace(unmap=(number + place) % 2 == 0)
        transport = TRANSPORTS[(number // 2 + place) % len(TRANSPORTS)]
        yield row, (server, mode), Options(hypervisor, used, server, transport, mode)


def run_matrix(guest: Guest, timeout: float, tell: Callable[[str], None], note: Callable[[str], None]) -> bool:
    """Boot all of the matrix, one after the other, and `tell` the table and what failed. Return whether nothing did.

    `note` is told each result as it comes.
    """
    results: dict[tuple[Row, tuple[str, str]], str] = {}
    failures: list[str] = []
    for row, column, options in cells():
        with tempfile.TemporaryDirectory(prefix="qedfs-boot-") as folder:
            try:
                results[row, column] = cell(boot(guest, replace(options, timeout=timeout), Path(folder)))
            except BootError as error:
                results[row, column] = "FAILED"
                failures.append("\n".join([f"{options}: {error}", *getattr(error, "__notes__", ())]))
        note(f"{row} {column}: {results[row, column]}")
    for line in table(results):
        tell(line)
    for failure in failures:
        tell(f"\n{failure}")
    tell(f"\n{len(results) - len(failures)} passed, {len(failures)} failed")
    return not failures


def cell(report: Report) -> str:
    """Return what the table tells of a run that passed: seconds to boot, work and power off, and MiB fetched."""
    return f"{report.seconds['boot']:.1f} s, {(report.backing_bytes_read or 0) / 2**20:.0f}"


def table(results: dict[tuple[Row, tuple[str, str]], str]) -> Iterator[str]:
    """Give the lines of a Markdown table: hypervisor, cache and aio down, backing and mode across."""
    yield "| | cache | aio | " + " | ".join(f"{server} {mode}" for server, mode in COLUMNS) + " |"
    yield "|---" * (3 + len(COLUMNS)) + "|"
    for row in ROWS:
        hypervisor, drive = row
        head = (hypervisor, drive.cache, drive.aio) if drive else (hypervisor, "–", "–")
        yield "| " + " | ".join([*head, *(results[row, column] for column in COLUMNS)]) + " |"
