from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cli.commands import QEDFS

ENOUGH = 60


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Temporary files go to a folder that can be looked into, and no program of QEMU is found."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "bin").mkdir()
    for tool in ("fusermount3", "fusermount"):
        for folder in ("/bin", "/usr/bin"):
            if os.path.exists(f"{folder}/{tool}") and not (tmp_path / "bin" / tool).exists():
                (tmp_path / "bin" / tool).symlink_to(f"{folder}/{tool}")
    return {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PATH": str(tmp_path / "bin")}


def test_the_main_job_is_shown_and_nothing_is_left_behind(tmp_path: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [*QEDFS, "demo"], env=environment, capture_output=True, text=True, timeout=ENOUGH, check=False
    )
    assert done.returncode == 0, done.stderr
    at = 0
    for said in (
        *("$ qedfs create", "$ qedfs mount", "it reads back", "$ qedfs stream", "100.00 %", "all of it local"),
        *("$ qedfs unmount", "No errors were found"),
    ):
        at = done.stdout.index(said, at)
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["$ qedfs create", "$ qedfs mount", "Wrote in three places", "$ qedfs stream"])
def test_a_signal_leaves_nothing_behind(
    tmp_path: Path, environment: dict[str, str], number: signal.Signals, moment: str
) -> None:
    line = [*QEDFS, "demo"]
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        assert demo.stderr is not None
        try:
            for said in demo.stdout:
                if moment in said:
                    break
            demo.send_signal(number)
            assert demo.wait(timeout=ENOUGH) == 130
            assert demo.stderr.read() == "qedfs: demo: interrupted; everything is removed\n"
        finally:
            demo.kill()
    assert not list((tmp_path / "tmp").iterdir())
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
