"""Fuzzing by coverage, for some seconds a target; contrib/fuzz runs the same for hours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TARGETS = ("header", "record", "image", "source", "name", "profile", "client", "server", "replies")
SECONDS = int(os.environ.get("QEDFS_FUZZ_SECONDS", "6"))


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_that_a_stranger_may_send_surprises(target: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(HERE / "corpus" / target, corpus)
    limits = [
        f"-max_total_time={SECONDS}",
        "-timeout=10",
        "-rss_limit_mb=1024",
        "-max_len=4096",
        "-print_final_stats=1",
    ]
    line = [sys.executable, str(HERE / "targets.py"), target, str(corpus), *limits, f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=SECONDS + 90, check=False)
    found = [f"{path.name}: {path.read_bytes()!r}" for path in tmp_path.glob("*-*") if path.is_file()]
    assert done.returncode == 0, "\n".join([done.stdout[-2000:], done.stderr[-4000:], *found])
    executions = [line for line in done.stderr.splitlines() if "number_of_executed_units" in line]
    assert executions, done.stderr[-4000:]
    assert int(executions[0].split()[-1]) > 100, executions
