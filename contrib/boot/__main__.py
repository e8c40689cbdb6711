"""Boot a small Linux guest from a leaf over a server and judge the outcome, once or in all ways: `python -m contrib.boot --help`."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

from contrib.boot import guest, web
from contrib.boot.boot import MODES, WAYS, Options, boot
from contrib.boot.hypervisors import AIOS, CACHES, HYPERVISORS, Drive
from contrib.boot.matrix import run_matrix
from contrib.boot.server import SERVERS, TRANSPORTS


def main() -> None:
    default = Options()
    parser = argparse.ArgumentParser(prog="python -m contrib.boot", description=__doc__)
    parser.add_argument("--matrix", action="store_true", help="all combinations, as a table; minutes")
    parser.add_argument("--hypervisor", choices=HYPERVISORS, default=default.hypervisor, help="(%(default)s)")
    parser.add_argument("--cache", choices=CACHES, default=default.drive.cache, help="QEMU's cache mode (%(default)s)")
    parser.add_argument("--aio", choices=AIOS, default=default.drive.aio, help="QEMU's way of I/O (%(default)s)")
    parser.add_argument(
        "--unmap", action="store_true", help="discard=unmap, detect-zeroes=unmap, and fstrim in the guest"
    )
    parser.add_argument(
        "--server",
        choices=[*SERVERS, web.SERVER],
        default=default.server,
        help="of the base: NBD, or a qcow2 by https (%(default)s)",
    )
    parser.add_argument("--transport", choices=TRANSPORTS, default=default.transport, help="of NBD (%(default)s)")
    parser.add_argument("--mode", choices=MODES, default=default.mode, help="of the leaf (%(default)s)")
    parser.add_argument(
        "--through",
        choices=WAYS,
        default=default.through,
        help="a qedfs mount, or QEMU's own QED driver (%(default)s)",
    )
    parser.add_argument("--timeout", type=float, default=default.timeout, help="seconds for the guest (%(default)s)")
    parser.add_argument(
        "--guests", type=Path, default=guest.default_folder(), help="where guests are kept (%(default)s)"
    )
    arguments = vars(parser.parse_args())
    # An end from outside ends the servers and the mount in good order, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    drive = Drive(*(arguments.pop(name) for name in Drive._fields))
    is_matrix = arguments.pop("matrix")
    try:
        made = guest.made(arguments.pop("guests"))
        if is_matrix:
            sys.exit(not run_matrix(made, arguments["timeout"], print, partial(print, file=sys.stderr, flush=True)))
        once(made, Options(drive=drive, **arguments))
    except guest.BootError as error:
        sys.exit("\n".join([*getattr(error, "__notes__", ()), f"boot: {error}"]))


def once(made: guest.Guest, options: Options) -> None:
    """Boot once and print what was measured."""
    with tempfile.TemporaryDirectory(prefix="qedfs-boot-") as folder:
        report = boot(made, options, Path(folder))
    for step, seconds in report.seconds.items():
        print(f"{step:20} {seconds:8.2f} s")
    sizes = {"read from the base": report.backing_bytes_read, "local": report.local_bytes, "leaf": report.leaf_bytes}
    for name, size in sizes.items():
        if size is not None:
            print(f"{name:20} {size / 2**20:8.1f} MiB")


if __name__ == "__main__":
    main()
