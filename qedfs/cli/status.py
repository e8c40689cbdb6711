"""`qedfs status`: show progress, state and errors of mounted images."""

from __future__ import annotations

import json

import click
import trio
from rich.console import Console

from qedfs.errors import UsageError
from qedfs.report.progress import opened
from qedfs.report.status import Status, read_status, status_text
from qedfs.report.waiting import PERIOD


@click.command("status", short_help="Show progress, state and errors of mounted images.")
@click.option("--json", "as_json", is_flag=True, help="Print a list with all attributes of each image.")
@click.option("--watch", is_flag=True, help="Show it live, until Ctrl-C; without a terminal a line for each change.")
@click.argument("paths", nargs=-1, required=True, metavar="MOUNTPOINT|RAW...")
def command(as_json: bool, watch: bool, paths: tuple[str, ...]) -> None:
    """Show what each RAW, and each image of each MOUNTPOINT, is doing; also the images a mount leaves out, and why."""
    if watch:
        if as_json:
            raise UsageError("status", "--json and --watch exclude each other")
        trio.run(_watch, paths)
        return
    images = [image for path in paths for image in read_status(path)]
    if as_json:
        click.echo(json.dumps([image.to_json() for image in images], indent=4))
        return
    click.echo(status_text(images))


async def _watch(paths: tuple[str, ...]) -> None:
    def look() -> list[Status]:
        return [image for path in paths for image in read_status(path)]

    with opened(Console(), whole_screen=True) as screen:
        while True:
            # In a thread: a mount that hangs must not take Ctrl-C with it.
            screen.show(await trio.to_thread.run_sync(look, abandon_on_cancel=True))
            await trio.sleep(PERIOD)
