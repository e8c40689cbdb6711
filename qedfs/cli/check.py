"""`qedfs check`: look for inconsistencies, and repair them."""

from __future__ import annotations

import json

import click
import trio

from qedfs.image.check import CheckResult, check_image
from qedfs.image.storage import open_storage
from qedfs.report.check import check_json, check_text, exit_status


@click.command("check", short_help="Look for inconsistencies, and repair them.")
@click.option("--repair", is_flag=True, help="Drop invalid entries; give room that nothing uses back.")
@click.option("--json", "as_json", is_flag=True, help="Print the fields of qemu-img check --output=json.")
@click.argument("image")
def command(repair: bool, as_json: bool, image: str) -> None:
    """Check IMAGE, which must not be in use.

    Exit status: 0 consistent, 2 corrupt, 3 leaked clusters only, 1 could not be checked.
    """
    result = trio.run(lambda: _check(image, repair))
    click.echo(json.dumps(check_json(image, result), indent=4) if as_json else check_text(result))
    click.get_current_context().exit(exit_status(result))


async def _check(image: str, repair: bool) -> CheckResult:
    storage = await open_storage(image, writable=repair)
    try:
        return await check_image(storage, repair=repair)
    finally:
        await storage.aclose()
