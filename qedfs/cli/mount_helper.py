"""`mount.qedfs`, `mount.fuse.qedfs` and `umount.fuse.qedfs`: what mount(8) and umount(8) call.

`mount.qedfs SOURCE MOUNTPOINT [-sfnv] [-o OPTIONS] [-t TYPE]`, where `-f` means fake, not foreground.
"""

from __future__ import annotations

import os
import sys

import click

from qedfs.cli.main import run
from qedfs.cli.mount import mount
from qedfs.cli.unmount import unmount
from qedfs.config import parse_mount_options


@click.command("mount.qedfs")
@click.option("-o", "options", multiple=True, metavar="OPT[,OPT...]", help="Mount options.")
@click.option("-s", "--sloppy", is_flag=True, help="Ignore unknown options.")
@click.option("-f", "--fake", is_flag=True, help="Only look whether the arguments are right.")
@click.option("-n", "--no-mtab", is_flag=True, help="Ignored: there is no mtab to write.")
@click.option("-v", "--verbose", is_flag=True, help="Ignored.")
@click.option("-t", "--type", metavar="TYPE", help="Ignored: the type is qedfs.")
@click.option("-N", "--namespace", metavar="NAMESPACE", help="Ignored: mount(8) has entered it.")
@click.argument("source")
@click.argument("mountpoint")
def mount_command(
    source: str, mountpoint: str, options: tuple[str, ...], sloppy: bool, fake: bool, **_: object
) -> None:
    """Mount SOURCE, a QED image or a directory of them, for mount(8)."""
    if fake:
        parse_mount_options(options, sloppy=sloppy)
        return
    click.get_current_context().exit(mount((source,), mountpoint, options, sloppy=sloppy))


@click.command("umount.qedfs")
@click.option("-l", "--lazy", is_flag=True, help="Detach now; serve until the last close.")
@click.option("-f", "--force", is_flag=True, help="Ignored: cached writes are never dropped.")
@click.option("-n", "--no-mtab", is_flag=True, help="Ignored: there is no mtab to write.")
@click.option("-r", "--read-only", is_flag=True, help="Ignored.")
@click.option("-v", "--verbose", is_flag=True, help="Ignored.")
@click.option("-t", "--type", metavar="TYPE", help="Ignored: the type is qedfs.")
@click.option("-N", "--namespace", metavar="NAMESPACE", help="Ignored: umount(8) has entered it.")
@click.argument("mountpoint")
def unmount_command(mountpoint: str, lazy: bool, **_: object) -> None:
    """Unmount MOUNTPOINT for umount(8)."""
    unmount(mountpoint, lazy=lazy)


def main() -> int:
    """Be what the program was called as."""
    called = os.path.basename(sys.argv[0])
    return run(unmount_command if called.startswith("umount") else mount_command, sys.argv[1:])
