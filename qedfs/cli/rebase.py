"""`qedfs rebase`: change the reference to the backing."""

from __future__ import annotations

import click
import trio

from qedfs.config import read_secret
from qedfs.errors import printable
from qedfs.session.leaf import rebase


@click.command("rebase", short_help="Change the reference to the backing.")
@click.option("-b", "--backing", required=True, metavar="BACKING", help="The new reference; '' drops it.")
@click.option(
    "-F",
    "--format",
    "format_",
    metavar="FORMAT",
    help="raw, qed, or a format of QEMU. Default: raw, unless its magic is QED's or qcow2's.",
)
@click.option(
    "--force", is_flag=True, help="Also if BACKING has another size, does not answer, or leaves no room for both names."
)
@click.option("--secret", metavar="fd:N|file:PATH", help="Where the passphrase of an encrypted BACKING is.")
@click.option("--allow-backing", multiple=True, metavar="PATTERN", help="Which backings images may name, as for mount.")
@click.argument("leaf")
def command(
    backing: str, format_: str | None, force: bool, secret: str | None, allow_backing: tuple[str, ...], leaf: str
) -> None:
    """Let LEAF name another backing of the same content (a moved server, a copied base), and record what that is.

    Nothing is compared and nothing copied. With -b '' the reference is dropped, once nothing needs it.
    """
    passphrase = None if secret is None else read_secret(secret, "--secret")
    pinned = trio.run(
        lambda: rebase(leaf, backing, format_, force=force, secret=passphrase, allow_backing=allow_backing)
    )
    if backing and not pinned:
        click.echo(printable(f"qedfs: warning: {leaf}: what the backing is now could not be recorded"), err=True)
