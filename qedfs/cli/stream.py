"""`qedfs stream`: copy everything that a mounted image still needs of its backing."""

from __future__ import annotations

import click
import trio
from rich.console import Console

from qedfs.errors import Interrupted, UsageError
from qedfs.report.mounted import read_attribute, write_attributes
from qedfs.report.progress import opened
from qedfs.report.waiting import wait_complete


@click.command("stream", short_help="Copy all that is missing; the image then stands alone.")
@click.option("--background", is_flag=True, help="Return at once; 'qedfs status' and 'qedfs wait' tell more.")
@click.option("--step", type=int, metavar="SECTOR", help="Make one cluster local, and print how many sectors are.")
@click.argument("raw")
def command(background: bool, step: int | None, raw: str) -> None:
    """Switch the mounted disk RAW to mode=stream and show how it goes until the image is complete.

    Interrupting it ends only the view: streaming goes on.

    With --step only the cluster at that 512-byte sector is made local, in every mode but held; printed is how many sectors from there on are
    known to be local, 0 at the end of the disk. `offset += count` until 0 brings everything in.
    """
    if step is not None:
        if background:
            raise UsageError("stream", "--step and --background exclude each other")
        write_attributes(raw, [("stream_step", str(step))])
        click.echo(read_attribute(raw, "stream_step"))
        return
    write_attributes(raw, [("mode", "stream")])
    if background:
        return
    try:
        trio.run(_watch, raw)
    except KeyboardInterrupt:
        raise Interrupted(raw, "not watched any more; streaming goes on ('qedfs status' shows it)") from None


async def _watch(raw: str) -> None:
    with opened(Console()) as screen:
        await wait_complete([raw], show=screen.show)
