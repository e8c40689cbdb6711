"""`qedfs demo`: show the main job end to end."""

from __future__ import annotations

import click
import trio

from qedfs.errors import printable
from qedfs.session.demo import run_demo


@click.command("demo", short_help="Show the main job end to end.")
def command() -> None:
    """Make an image, serve it by NBD, mount a leaf over it, read, write, unmount and check, all in a temporary folder.

    Any failure is a non-zero exit status; nothing is left behind.
    """
    trio.run(run_demo, lambda line: click.echo(printable(line)))
