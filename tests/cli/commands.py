"""Running commands of qedfs as a person would, and judging what they say."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qedfs.cli.main import main

QEDFS = (sys.executable, "-m", "qedfs")


def qedfs(*arguments: str | Path, status: int = 0) -> tuple[str, str]:
    """Run a command in this process; it must end with `status`. Return what it said on standard output and error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        ended = main([str(argument) for argument in arguments])
    assert ended == status, (ended, out.getvalue(), err.getvalue())
    return out.getvalue(), err.getvalue()


def refused(*arguments: str | Path, status: int = 1) -> str:
    """Run a command that must fail with nothing but one line; return that line."""
    out, err = qedfs(*arguments, status=status)
    assert not out
    assert err.startswith("qedfs: ")
    assert err.count("\n") == 1
    return err.strip()


def qedfs_json(*arguments: str | Path, status: int = 0) -> Any:
    """Run a command with `--json` and return what it printed."""
    return json.loads(qedfs(*arguments, "--json", status=status)[0])


@contextlib.contextmanager
def mounted(source: Path, mountpoint: Path, *options: str) -> Iterator[Path]:
    """Mount `source` on the new folder `mountpoint` while inside."""
    mountpoint.mkdir()
    more = [argument for option in options for argument in ("-o", option)]
    line = [*QEDFS, "mount", *more, "--log-file", f"{mountpoint}.log", str(source), str(mountpoint)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    try:
        yield mountpoint
    finally:
        done = subprocess.run(
            [*QEDFS, "unmount", str(mountpoint)], capture_output=True, text=True, timeout=30, check=False
        )
    assert done.returncode == 0, done.stderr
