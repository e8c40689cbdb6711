"""`qedfs info`: show header, sizes and backing chain."""

from __future__ import annotations

import json

import click
import trio

from qedfs.report.info import Description, describe, info_json, info_text
from qedfs.report.mounted import image_behind
from qedfs.session.leaf import looked_at


@click.command("info", short_help="Show header, sizes and backing chain.")
@click.option("--json", "as_json", is_flag=True, help="Print the fields of qemu-img info --output=json, and ours.")
@click.argument("image", metavar="IMAGE|RAW")
def command(as_json: bool, image: str) -> None:
    """Show what IMAGE is, or the image behind the mounted disk RAW. It may be in use."""
    description = trio.run(_describe, image_behind(image))
    if as_json:
        click.echo(json.dumps(info_json(description), indent=4))
        return
    click.echo(info_text(description))


async def _describe(path: str) -> Description:
    async with looked_at(path) as image:
        return await describe(image)
