"""`qedfs set`: change attributes of a mounted image."""

from __future__ import annotations

import click

from qedfs.errors import UsageError
from qedfs.report.mounted import write_attributes


@click.command("set", short_help="Change an attribute of a mounted image.")
@click.argument("raw")
@click.argument("settings", nargs=-1, required=True, metavar="KEY=VALUE...")
def command(raw: str, settings: tuple[str, ...]) -> None:
    """Set attributes of the mounted disk RAW, such as mode=stream, in the order given; a refused one ends it."""
    values: list[tuple[str, str]] = []
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise UsageError("set", f"'{setting}' is not of the form KEY=VALUE")
        values.append((name, value))
    write_attributes(raw, values)
