"""`qedfs rebase`: change the reference to the backing."""

from __future__ import annotations

import click
import trio

from qedfs.errors import printable
from qedfs.session.leaf import rebase


@click.command("rebase", short_help="Change the reference to the backing.")
@click.option("-b", "--backing", required=True, metavar="BACKING", help="The new reference; '' drops it.")
@click.option(
    "-F", "--format", "format_", metavar="FORMAT", help="raw or qed. Default: raw, unless its magic is QED's."
)
@click.option(
    "--force", is_flag=True, help="Also if BACKING has another size, does not answer, or leaves no room for both names."
)
@click.argument("leaf")
def command(backing: str, format_: str | None, force: bool, leaf: str) -> None:
    """Let LEAF name another backing of the same content (a moved server, a copied base), and record what that is.

    Nothing is compared and nothing copied. With -b '' the reference is dropped, once nothing needs it.
    """
    pinned = trio.run(lambda: rebase(leaf, backing, format_, force=force))
    if backing and not pinned:
        click.echo(printable(f"qedfs: warning: {leaf}: what the backing is now could not be recorded"), err=True)
