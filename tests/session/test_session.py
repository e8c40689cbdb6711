"""What all of a mount has in common. Most of it is seen from outside, in `tests/cli`."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio

from qedfs.config import MountOptions
from qedfs.session import session
from qedfs.session.notify import Manager
from qedfs.session.session import Mount, run_mount


def test_hundreds_of_waits_for_a_dead_name_server_keep_no_thread_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()
    waiting = threading.Semaphore(0)

    def look_up() -> None:
        waiting.release()
        answered.wait(30)

    async def serve(*arguments: object) -> int:
        async with trio.open_nursery() as nursery:
            for _ in range(200):
                nursery.start_soon(trio.to_thread.run_sync, look_up)
            try:
                with trio.fail_after(10):
                    for _ in range(200):
                        await trio.to_thread.run_sync(waiting.acquire)
            finally:
                answered.set()
        return 7

    monkeypatch.setattr(session, "_serve", serve)
    assert run_mount(Mount((), str(tmp_path), MountOptions()), lambda: None, Manager()) == 7
