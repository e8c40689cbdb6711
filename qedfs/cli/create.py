"""`qedfs create`: make a QED image over a backing."""

from __future__ import annotations

import os

import click
import trio

from qedfs.backing.location import masked
from qedfs.config import Mode, parse_size, read_secret
from qedfs.errors import UsageError, printable
from qedfs.image.geometry import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_CLUSTERS, Geometry
from qedfs.report.sizes import exact_size_text
from qedfs.session.leaf import NewLeaf, create


@click.command("create", short_help="Make a QED image over a backing.")
@click.option(
    "-b", "--backing", metavar="BACKING", help="Path (relative to LEAF) or URL (nbd, https, s3, …); stored as it is."
)
@click.option(
    "-F",
    "--format",
    "format_",
    metavar="FORMAT",
    help="raw, qed, or a format of QEMU. Default: raw, unless its magic is QED's or qcow2's.",
)
@click.option("-s", "--size", metavar="SIZE", help="Of the disk. Default: the backing's, in whole sectors.")
@click.option("--cluster-size", metavar="SIZE", default=str(DEFAULT_CLUSTER_SIZE), help="4k to 64M. Default: 64k.")
@click.option(
    "--table-size", metavar="N", type=int, default=DEFAULT_TABLE_CLUSTERS, help="Clusters a table. Default: 4."
)
@click.option("--mode", type=click.Choice([mode.value for mode in Mode]), help="Stored in the leaf. Default: cor.")
@click.option("--hold", is_flag=True, help="Copy and record nothing until a migration releases the leaf.")
@click.option("--secret", metavar="fd:N|file:PATH", help="Where the passphrase of an encrypted BACKING is.")
@click.option("--allow-backing", multiple=True, metavar="PATTERN", help="Which backings images may name, as for mount.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@click.argument("leaf")
def command(
    backing: str | None,
    format_: str | None,
    size: str | None,
    cluster_size: str,
    table_size: int,
    mode: str | None,
    hold: bool,
    secret: str | None,
    allow_backing: tuple[str, ...],
    force: bool,
    leaf: str,
) -> None:
    """Make the QED image LEAF; what the backing is now is recorded in it, so that a later change is noticed."""
    if format_ and not backing:
        raise UsageError("create", "a format (-F) needs a backing (-b)")
    new = NewLeaf(
        path=leaf,
        size=None if size is None else parse_size(size, "--size"),
        backing=backing,
        format=format_,
        geometry=Geometry(parse_size(cluster_size, "--cluster-size"), table_size),
        mode=mode or "",
        hold=hold,
        overwrite=force,
        secret=None if secret is None else read_secret(secret, "--secret"),
        allow_backing=allow_backing,
    )
    header, found = trio.run(create, new)
    on = f" on {masked(backing)} ({found})" if backing else ""
    click.echo(printable(f"{os.fsdecode(leaf)}: {exact_size_text(header.image_size)}{on}"))
    if table_size == 1:
        click.echo("qedfs: warning: QEMU cannot open an image with a table size of 1", err=True)
