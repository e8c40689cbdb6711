"""Real mounts of disks in memory, each served by a process of its own: a test never serves what it reads."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVER = Path(__file__).with_name("memory_server.py")
PATIENCE = 30
"""Seconds for one answer of the server."""


class Mounted:
    """A mount and the process behind it."""

    def __init__(self, path: Path, setup: dict[str, Any], command: tuple[str, ...] = ()) -> None:
        self.path = path
        arguments = [*command, sys.executable, str(SERVER), str(path), json.dumps(setup)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process: subprocess.Popen[str] = subprocess.Popen(
            arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes
        )  # type: ignore[call-overload]
        self._answers: queue.Queue[str] = queue.Queue()
        self.log: list[str] = []
        self._readers = [
            threading.Thread(target=self._collect, args=(self.process.stdout, self._answers.put)),
            threading.Thread(target=self._collect, args=(self.process.stderr, self.log.append)),
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _collect(lines: Any, take: Callable[[str], None]) -> None:
        for line in lines:
            take(line)

    def file(self, name: str = "vm.raw") -> Path:
        return self.path / name

    def send(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        return json.loads(self._answers.get(timeout=PATIENCE))

    def ask(self, line: str) -> Any:
        self.send(line)
        return self.answer()

    def end(self) -> None:
        """Make sure that the process has ended and nothing is mounted, whatever the test did."""
        subprocess.run(["umount", "-l", str(self.path)], check=False, capture_output=True, timeout=PATIENCE)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(PATIENCE)
        for reader in self._readers:
            reader.join(PATIENCE)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()


Mount = Callable[..., Mounted]


def make_mount(point: Path, *disks: dict[str, Any], options: str = "", **setup: Any) -> Mounted:
    """Mount `disks` (`{"name":, "size":, "mode":, "read_only":}`; one by default); usable when it returns."""
    point.mkdir()
    mounted = Mounted(point, {"disks": disks or [{"name": "vm.raw"}], "options": options, **setup})
    try:
        assert mounted.answer() == "ready", mounted.log
    except BaseException:
        mounted.end()
        raise
    return mounted


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """`make_mount` at places of its own; ends what it made."""
    made: list[Mounted] = []

    def make(*disks: dict[str, Any], options: str = "", **setup: Any) -> Mounted:
        made.append(make_mount(tmp_path / f"mount{len(made)}", *disks, options=options, **setup))
        return made[-1]

    yield make
    for mounted in made:
        mounted.end()


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """One mount for all tests in which nothing changes because everything is refused."""
    mounted = make_mount(tmp_path_factory.mktemp("refusing") / "mount")
    yield mounted
    mounted.end()
