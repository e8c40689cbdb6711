"""`qedfs migrate`: move a running machine to this host, and its disk afterwards."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial

import click
import trio
from rich.console import Console

from qedfs.config import parse_duration, parse_mount_options
from qedfs.errors import printable
from qedfs.migrate.host import LocalHost
from qedfs.migrate.machine import Machine, Progress
from qedfs.migrate.monitor import MonitorAddress, parse_monitor, wait_for_monitor
from qedfs.migrate.plan import Order, Side, script, start_hint
from qedfs.migrate.sequence import DESTINATION_PATIENCE, SWITCHOVER_PATIENCE, Patience, Summary, migrate
from qedfs.report.progress import Screen, opened
from qedfs.report.sizes import size_text
from qedfs.session.places import real_mountpoint
from qedfs.session.sources import raw_name


@click.command("migrate", short_help="Move a running machine to this host, its disk afterwards.")
@click.option("--source", metavar="QMP", required=True, help="QMP of the QEMU that runs: unix:PATH or tcp:HOST:PORT.")
@click.option("--destination", metavar="QMP", required=True, help="QMP of the QEMU on this host, which may come later.")
@click.option("--uri", metavar="URI", required=True, help="Where the memory goes, in QEMU's words: tcp:HOST:PORT.")
@click.option("--listen", metavar="URI", help="Where the destination listens for it. Default: the same.")
@click.option("-b", "--backing", metavar="BACKING", required=True, help="The source's disk as the source exports it.")
@click.option("-F", "--format", "format_", metavar="FORMAT", default="raw", help="Of the export. Default: raw.")
@click.option("-o", "options", multiple=True, metavar="OPT[,OPT...]", help="Mount options (see docs/mount.md).")
@click.option("--log-file", metavar="FILE", help="Where the mount logs to. Default: syslog.")
@click.option("--stop-export", is_flag=True, help="At the end, stop the source's NBD server.")
@click.option("--keep", is_flag=True, help="Keep the leaf of a migration that failed before the hold was released.")
@click.option(
    "--wait", "wait", metavar="TIME", help=f"For the destination to come. Default: {DESTINATION_PATIENCE:g} s."
)
@click.option(
    "--switchover", metavar="TIME", help=f"Longest that the guest may stand still. Default: {SWITCHOVER_PATIENCE:g} s."
)
@click.option("--dry-run", is_flag=True, help="Print what would be done.")
@click.argument("leaf")
@click.argument("mountpoint")
def command(
    source: str,
    destination: str,
    uri: str,
    listen: str | None,
    backing: str,
    format_: str,
    options: tuple[str, ...],
    log_file: str | None,
    stop_export: bool,
    keep: bool,
    wait: str | None,
    switchover: str | None,
    dry_run: bool,
    leaf: str,
    mountpoint: str,
) -> None:
    """Move a machine to this host: make LEAF over its exported disk, mount it on MOUNTPOINT, move the memory, and stream the disk.

    The machine runs here before its disk is. If a step fails, the machine goes on at the source, and LEAF is removed.
    """
    parse_mount_options(options)
    addresses = {
        Side.SOURCE: parse_monitor(source, "--source"),
        Side.DESTINATION: parse_monitor(destination, "--destination"),
    }
    folder = real_mountpoint(mountpoint)
    order = Order(
        leaf=os.path.abspath(leaf),
        mountpoint=folder,
        raw=os.path.join(folder, raw_name(leaf)),
        backing=backing,
        uri=uri,
        listen=listen or uri,
        format=format_,
        mount_options=options,
        log_file=os.path.abspath(log_file) if log_file else None,
        stop_export=stop_export,
        keep=keep,
    )
    if dry_run:
        for line in script(order, {side: str(address) for side, address in addresses.items()}):
            click.echo(printable(line))
        return
    patience = Patience(
        DESTINATION_PATIENCE if wait is None else parse_duration(wait, "--wait"),
        SWITCHOVER_PATIENCE if switchover is None else parse_duration(switchover, "--switchover"),
    )
    with opened(Console()) as screen:
        screen.say(f"The destination: {start_hint(order, str(addresses[Side.DESTINATION]))}")
        summary = trio.run(_migrate, order, addresses, screen, patience)
        screen.say(
            f"The machine runs here, and its disk is complete: it stood still for {summary.downtime:.2f} s, "
            f"streaming took {summary.streaming:.1f} s. The source may be ended"
        )


async def _migrate(
    order: Order, addresses: Mapping[Side, MonitorAddress], screen: Screen, patience: Patience
) -> Summary:
    machines = {
        side: Machine(side.value, partial(wait_for_monitor, side.value, address)) for side, address in addresses.items()
    }
    return await migrate(order, machines, LocalHost(screen.show), _View(screen), patience)


class _View:
    """Tells a person how it goes."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def say(self, line: str) -> None:
        self._screen.say(line)

    def memory(self, progress: Progress) -> None:
        if progress.transferred:
            sent, left = size_text(progress.transferred), size_text(progress.remaining)
            self._screen.note(f"  memory: {sent} sent, {left} left ({progress.status})")
