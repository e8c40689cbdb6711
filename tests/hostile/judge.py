"""What a command costs: run in a process of its own, with the processor time and the memory it took at most.

Starting Python and importing everything takes longer than most answers. So a process that has done that forks once per
command (`python judge.py`); a fork begins with the memory of its parent, which is what a fresh start would have.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

LIMIT_MEMORY = 256
"""MiB, of the largest resident set."""
LIMIT_TIME = 2.0
"""Seconds of processor time: unlike the time on the wall it does not depend on what else the machine does."""
ENDED_AFTER = 20
"""Seconds after which a command that gives no answer is ended."""
_MAX_OUTPUT = 20_000


class Answer(NamedTuple):
    """`status` is negative for a signal. `seconds` of processor time, `mebibytes` resident; `said` is cut when long."""

    status: int
    seconds: float
    mebibytes: int
    output: str
    said: str

    def judge(self) -> None:
        """Hold the answer to the limits; an error must be one line without control characters."""
        assert self.mebibytes <= LIMIT_MEMORY, self
        assert self.seconds <= LIMIT_TIME, self
        assert self.status >= 0, self
        assert self.status != 70, self  # an internal error
        assert self.said.count("\n") <= 1, self
        assert self.said.rstrip("\n").isprintable(), self
        assert all(line.isprintable() for line in self.output.split("\n")), self
        if self.status == 1:
            assert self.said.startswith("qedfs: "), self


class Judge:
    """A process that runs commands of qedfs one after the other. A context manager."""

    def __enter__(self) -> Judge:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        return self

    def run(self, *arguments: str | Path, folder: Path) -> Answer:
        """Run `qedfs arguments…` in `folder`."""
        assert self._process.stdin
        assert self._process.stdout
        json.dump([str(folder), *map(str, arguments)], self._process.stdin)
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Answer(*json.loads(self._process.stdout.readline()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=ENDED_AFTER)
        self._process.stdout.close()


def _serve() -> None:
    import importlib

    from qedfs.cli.main import COMMANDS

    for name in COMMANDS:
        importlib.import_module(f"qedfs.cli.{name}")
    for line in sys.stdin:
        folder, *arguments = json.loads(line)
        print(json.dumps(_answer(folder, arguments)), flush=True)


def _answer(folder: str, arguments: list[str]) -> Answer:
    files = [os.memfd_create("output"), os.memfd_create("said")]
    child = os.fork()
    if not child:
        _become(folder, arguments, files)
    _, status, used = os.wait4(child, 0)
    output, said = (os.pread(file, _MAX_OUTPUT, 0).decode(errors="replace") for file in files)
    for file in files:
        os.close(file)
    seconds = used.ru_utime + used.ru_stime
    return Answer(os.waitstatus_to_exitcode(status), round(seconds, 3), used.ru_maxrss >> 10, output, said)


def _become(folder: str, arguments: list[str], files: list[int]) -> None:
    """Turn this fork into the command; never returns."""
    from qedfs.cli.main import main

    status = 71
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(files[0], 1)
        os.dup2(files[1], 2)
        os.chdir(folder)
        signal.alarm(ENDED_AFTER)
        resource.setrlimit(resource.RLIMIT_CPU, (ENDED_AFTER, ENDED_AFTER))
        status = main(arguments)
        sys.stdout.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    _serve()
