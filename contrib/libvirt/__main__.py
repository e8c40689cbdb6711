"""Domains of libvirt on leaves, told as a transcript of virsh: `python -m contrib.libvirt`."""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path

from contrib.boot.guest import BootError, default_folder, made
from contrib.libvirt.daemon import LibvirtError
from contrib.libvirt.story import story


def main() -> None:
    # An end from outside ends libvirtd and all that it has started, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="qedfs-libvirt-") as folder:
        try:
            with story(made(default_folder()), Path(folder), print) as told:
                told.tell_all()
                told.tell_of_a_mount_that_stays()
                told.tell_of_a_failure()
        except (BootError, LibvirtError) as error:
            sys.exit(f"libvirt: {error}")


if __name__ == "__main__":
    main()
