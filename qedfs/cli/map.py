"""`qedfs map`: show which parts of an image are local."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import aclosing

import click
import trio

from qedfs.errors import OutputError, UsageError
from qedfs.report.map import Picture, joined_runs, run_json, run_text
from qedfs.report.mounted import image_behind
from qedfs.report.png import SIGNATURE
from qedfs.session.leaf import looked_at
from qedfs.session.new_file import new_file

_LINES = 8
"""Of the picture."""
_PNG_WIDTH, _PNG_LINES = 256, 128
"""Places of the PNG: 32768, so that of a disk of 2 GiB each is a cluster of the default size."""


@click.command("map", short_help="Show which parts of an image are local.")
@click.option("--json", "as_json", is_flag=True, help="Print the fields of qemu-img map --output=json.")
@click.option("--png", metavar="FILE", help="Print nothing; draw FILE.")
@click.argument("image", metavar="IMAGE|RAW")
def command(as_json: bool, png: str | None, image: str) -> None:
    """Print runs of `start length state [offset]` of IMAGE, or of the image behind the mounted disk RAW.

    States: data (at the offset of the file), zero, backing (not in the image). A terminal also gets a picture: the darker
    a place, the more of it is in the image. --png draws it into a file that is new, or a PNG already.
    """
    path = image_behind(image)
    if png is not None:
        if as_json:
            raise UsageError("map", "--json and --png exclude each other")
        _check_png(png)
        picture = trio.run(_map_png, path)
        with new_file(png, 0o666, overwrite=os.path.lexists(png)) as out, open(out.fd, "wb", closefd=False) as file:
            file.write(picture)
            file.flush()
            out.publish()
    elif as_json:
        trio.run(_map_json, path)
    else:
        trio.run(_map_text, path)


def _check_png(path: str) -> None:
    """Refuse to draw over anything but another picture: a slip would cost an image."""
    if not os.path.lexists(path):
        return
    if not os.path.isfile(path):
        raise OutputError(path, "is no regular file")
    try:
        with open(path, "rb") as file:
            start = file.read(len(SIGNATURE))
    except OSError as error:
        raise OutputError(path, f"cannot be read ({os.strerror(error.errno or 0)})") from error
    if start not in (SIGNATURE, b""):
        raise OutputError(path, "exists, and is no PNG")


async def _map_png(path: str) -> bytes:
    async with looked_at(path) as image, aclosing(joined_runs(image)) as runs:
        picture = Picture(image.header.image_size, _PNG_WIDTH * _PNG_LINES)
        async for run in runs:
            picture.add(run)
    return picture.png(_PNG_WIDTH)


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
