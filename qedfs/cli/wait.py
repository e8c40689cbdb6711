"""`qedfs wait`: return when streaming is complete."""

from __future__ import annotations

import click
import trio

from qedfs.config import parse_duration
from qedfs.report.waiting import wait_complete


@click.command("wait", short_help="Return when streaming is complete.")
@click.option("--timeout", metavar="SECONDS", help="Give up after so long (also 5m, 2h): exit status 124.")
@click.argument("paths", nargs=-1, required=True, metavar="RAW|MOUNTPOINT...")
def command(timeout: str | None, paths: tuple[str, ...]) -> None:
    """Return when each RAW, and each image of each MOUNTPOINT, is complete.

    Exit status 1: one will not become complete by itself. It is not in mode stream, its leaf or its backing failed for good, or
    its mount has ended.
    """
    seconds = None if timeout is None else parse_duration(timeout, "--timeout")

    async def wait() -> None:
        await wait_complete(paths, patience=seconds)

    trio.run(wait)
