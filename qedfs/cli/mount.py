"""`qedfs mount`: present images as raw disks."""

from __future__ import annotations

import os
from dataclasses import replace

import click

from qedfs.config import parse_mount_options
from qedfs.session.daemon import Ready, in_background
from qedfs.session.notify import Manager
from qedfs.session.places import real_mountpoint


@click.command("mount", short_help="Present QED images as raw disks.")
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground; SIGINT and SIGTERM unmount.")
@click.option("-o", "options", multiple=True, metavar="OPT[,OPT...]", help="Mount options (see docs/mount.md).")
@click.option("--log-file", metavar="FILE", help="Log to FILE. Default: syslog, in the foreground standard error.")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.argument("mountpoint")
def command(
    sources: tuple[str, ...], mountpoint: str, options: tuple[str, ...], foreground: bool, log_file: str | None
) -> None:
    """Present each SOURCE, a QED image or a directory of them, as a raw disk in MOUNTPOINT.

    Goes to the background once the mount is usable: exit status 0 means that it is.
    """
    click.get_current_context().exit(mount(sources, mountpoint, options, foreground=foreground, log_file=log_file))


def mount(
    sources: tuple[str, ...],
    mountpoint: str,
    options: tuple[str, ...],
    *,
    foreground: bool = False,
    log_file: str | None = None,
    sloppy: bool = False,
) -> int:
    """Mount as the command line says; return the exit status. Shared with mount(8)'s helper."""
    manager = Manager.named_by(os.environ)
    parsed = parse_mount_options(options, sloppy=sloppy)
    # Absolute before anything else: the background process leaves the working directory.
    log_file = os.path.abspath(log_file) if log_file else None
    absolute = tuple(map(os.path.abspath, sources)), real_mountpoint(mountpoint)
    if parsed.shared_cache:
        parsed = replace(parsed, shared_cache=os.path.abspath(parsed.shared_cache))

    def serve(ready: Ready) -> int:
        # Imported in the process that needs it, after the fork.
        from qedfs.session.log import Log
        from qedfs.session.session import Mount, run_mount

        log = Log(foreground=foreground, file=log_file)

        def usable() -> None:
            ready()
            if foreground:
                manager.usable()
            else:
                log.leave_terminal()

        return run_mount(Mount(*absolute, parsed), usable, manager)

    return serve(lambda: None) if foreground else in_background(serve, manager.served_by)
