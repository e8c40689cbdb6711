"""`qedfs status`: show progress, state and errors of mounted images."""

from __future__ import annotations

import json

import click

from qedfs.errors import printable
from qedfs.report.status import read_status, status_text


@click.command("status", short_help="Show progress, state and errors of mounted images.")
@click.option("--json", "as_json", is_flag=True, help="Print a list with all attributes of each image.")
@click.argument("paths", nargs=-1, required=True, metavar="MOUNTPOINT|RAW...")
def command(as_json: bool, paths: tuple[str, ...]) -> None:
    """Show what each RAW, and each image of each MOUNTPOINT, is doing; also the images a mount leaves out, and why."""
    images = [image for path in paths for image in read_status(path)]
    if as_json:
        click.echo(json.dumps([image.to_json() for image in images], indent=4))
        return
    for line in status_text(images).split("\n"):
        click.echo(printable(line))
