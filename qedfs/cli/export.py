"""`qedfs export`: write the disk of a leaf as a plain raw file."""

from __future__ import annotations

import click
import trio
from rich.console import Console

from qedfs.config import read_secret
from qedfs.errors import printable
from qedfs.report.progress import Screen, opened
from qedfs.report.sizes import exact_size_text, size_text
from qedfs.report.status import ServedImage
from qedfs.session.export import Export, Progress, export

_PERIOD = 0.25
"""Seconds between two looks at how far it is."""


@click.command("export", short_help="Write the disk of a leaf as a raw file.")
@click.option("--force", is_flag=True, help="Take the place of an existing file, at the end.")
@click.option("--secret", metavar="fd:N|file:PATH", help="Where the passphrase of an encrypted backing is.")
@click.option("--allow-backing", multiple=True, metavar="PATTERN", help="Which backings images may name, as for mount.")
@click.argument("leaf")
@click.argument("out", metavar="OUT.raw")
def command(force: bool, secret: str | None, allow_backing: tuple[str, ...], leaf: str, out: str) -> None:
    """Write the disk of LEAF, with what is in its backings, as the raw file OUT.raw; nothing else is changed.

    What lies on the same file system is shared with it if that can (btrfs, XFS), so that it takes no time and no room; zeros become holes.
    There is no OUT.raw before it is whole and durable.
    """
    job = Export(
        leaf,
        out,
        force,
        secret=None if secret is None else read_secret(secret, "--secret"),
        allow_backing=allow_backing,
    )
    progress = Progress()
    trio.run(_export, job, progress)
    parts = f"{size_text(progress.written)} written, {size_text(progress.shared)} shared"
    click.echo(printable(f"{out}: {exact_size_text(progress.size)}, {parts}"))


async def _export(job: Export, progress: Progress) -> None:
    with opened(Console()) as screen:
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_show, job, progress, screen, began)
            await export(job, progress)
            nursery.cancel_scope.cancel()
        if screen.live:
            screen.show([_status(job, progress, began)])


async def _show(job: Export, progress: Progress, screen: Screen, began: float) -> None:
    while screen.live:
        if progress.size:
            screen.show([_status(job, progress, began)])
        await trio.sleep(_PERIOD)


def _status(job: Export, progress: Progress, began: float) -> ServedImage:
    rate = progress.done / max(trio.current_time() - began, _PERIOD)
    left = f"{(progress.size - progress.done) / rate:.0f}" if rate and progress.done < progress.size else ""
    percent = f"{100 * progress.done / progress.size:.2f}" if progress.size else "100.00"
    return ServedImage(job.out, {"progress": percent, "state": "exporting", "rate": f"{rate:.0f}", "eta": left})
