"""Going to the background, in a way that tells the caller the truth.

`in_background` returns in the parent when the child is usable, or has failed. The child lets go of the working directory
and the session at once, of standard input, output and error only when it is usable: until then its errors are the
parent's, in one line, with the same exit status.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator

_USABLE = b"+"

Ready = Callable[[], None]
"""Called once by a server when it is usable. Raises OSError when nobody waits for that any more."""


def in_background(serve: Callable[[Ready], int], usable: Callable[[int], None] = lambda pid: None) -> int:
    """Fork; return the exit status in the parent, and what `serve` returns in the child, which may also raise.

    `usable` is called in the parent, with the pid of the child, before it returns 0.

    Nothing tells the caller which of the two it is: both have only to report and to exit.
    To be called with one thread and before anything is opened that must live on: descriptors above 2 are closed in the
    child at once, so that it holds no lock or pipe of whoever started us.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe2(os.O_CLOEXEC)
    # An interrupt waits until the parent is ready for it: before, nobody would tell the child.
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    child = os.fork()
    if child:
        os.close(writing)
        return _wait_until_usable(child, reading, signals, usable)
    signal.pthread_sigmask(signal.SIG_SETMASK, signals)
    return _serve_detached(serve, writing)


def _wait_until_usable(child: int, pipe: int, signals: set[int], usable: Callable[[int], None]) -> int:
    try:
        with open(pipe, "rb") as answers, _woken_by_signals() as woken:
            signal.pthread_sigmask(signal.SIG_SETMASK, signals)
            # Not `read` alone: a signal that comes just before it would wait for the child's answer.
            waiting = select.poll()
            waiting.register(answers, select.POLLIN)
            waiting.register(woken, select.POLLIN)
            waiting.poll()
            if answers.read(1) == _USABLE:
                usable(child)
                return 0
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:
        # We are interrupted. The child has left our session, so the terminal's signal did not reach it.
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)
        raise
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def _woken_by_signals() -> Iterator[int]:
    """Have a descriptor that becomes readable with the first signal that Python handles."""
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield reading
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        os.close(reading)


def _serve_detached(serve: Callable[[Ready], int], pipe: int) -> int:
    os.setsid()
    os.chdir("/")
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != pipe:
            with contextlib.suppress(OSError):  # the descriptor that listed the folder
                os.close(int(name))

    def ready() -> None:
        os.write(pipe, _USABLE)
        os.close(pipe)
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        os.close(nothing)

    return serve(ready)
