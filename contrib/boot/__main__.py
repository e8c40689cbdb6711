"""Boot a small Linux guest from a leaf over an NBD server and judge the outcome, once: `python -m contrib.boot --help`."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from contrib.boot import guest
from contrib.boot.boot import CACHES, WAYS, Options, boot
from contrib.boot.server import SERVERS, TRANSPORTS


def main() -> None:
    default = Options()
    parser = argparse.ArgumentParser(prog="python -m contrib.boot", description=__doc__)
    parser.add_argument("--cache", choices=CACHES, default=default.cache, help="QEMU's cache mode (%(default)s)")
    parser.add_argument("--server", choices=SERVERS, default=default.server, help="of the base (%(default)s)")
    parser.add_argument("--transport", choices=TRANSPORTS, default=default.transport, help="of NBD (%(default)s)")
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
    try:
        made = guest.made(arguments.pop("guests"))
        with tempfile.TemporaryDirectory(prefix="qedfs-boot-") as folder:
            report = boot(made, Options(**arguments), Path(folder))
    except guest.BootError as error:
        sys.exit("\n".join([*getattr(error, "__notes__", ()), f"boot: {error}"]))
    for step, seconds in report.seconds.items():
        print(f"{step:20} {seconds:8.2f} s")
    if report.backing_bytes_read is not None:
        print(f"{'read from the base':20} {report.backing_bytes_read / 2**20:8.1f} MiB")
    print(f"{'leaf':20} {report.leaf_bytes / 2**20:8.1f} MiB")


if __name__ == "__main__":
    main()
