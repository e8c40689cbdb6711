"""`qedfs map`: show which parts of an image are local."""

from __future__ import annotations

import shutil
import sys
from contextlib import aclosing

import click
import trio

from qedfs.report.map import Picture, joined_runs, run_json, run_text
from qedfs.report.mounted import image_behind
from qedfs.session.leaf import looked_at

_LINES = 8
"""Of the picture."""


@click.command("map", short_help="Show which parts of an image are local.")
@click.option("--json", "as_json", is_flag=True, help="Print the fields of qemu-img map --output=json.")
@click.argument("image", metavar="IMAGE|RAW")
def command(as_json: bool, image: str) -> None:
    """Print runs of `start length state [offset]` of IMAGE, or of the image behind the mounted disk RAW.

    States: data (at the offset of the file), zero, backing (not in the image). A terminal also gets a picture: the darker
    a place, the more of it is in the image.
    """
    path = image_behind(image)
    if as_json:
        trio.run(_map_json, path)
    else:
        trio.run(_map_text, path)


async def _map_json(path: str) -> None:
    async with looked_at(path) as image, aclosing(joined_runs(image)) as runs:
        before = "["
        async for run in runs:
            click.echo(before + run_json(run, has_backing=bool(image.backing_name)), nl=False)
            before = ",\n"
        click.echo("]" if before != "[" else "[]")


async def _map_text(path: str) -> None:
    async with looked_at(path) as image, aclosing(joined_runs(image)) as runs:
        width = max(16, min(128, shutil.get_terminal_size().columns))
        picture = Picture(image.header.image_size, width * _LINES)
        async for run in runs:
            click.echo(run_text(run))
            picture.add(run)
    if sys.stdout.isatty():
        for line in picture.lines(width):
            click.echo(line)
