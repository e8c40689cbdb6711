"""Waiting until streaming has completed images, from outside: their attributes are looked at until there is an answer.

A mount may end while it is waited for (`unmount_when_complete`). Then the image files tell: a complete one names no
backing any more. So every look remembers which file is behind each disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import trio

from qedfs.errors import NotMounted, QedfsError, StreamingFailed, WaitedTooLong
from qedfs.image import header as headers
from qedfs.report.status import ServedImage, read_status

PERIOD = 0.5
"""Seconds between two looks: soon enough for people, and next to nothing for the serving process."""
NAMES = ("leaf", "mode", "state", "backing", "backing_state", "last_error", "progress", "rate", "eta")
"""What is looked at: none of it makes the serving process walk over tables that it has not seen."""
PERMANENT = frozenset({"refused", "damaged"})
"""States of a backing that nothing but a person mends."""
_SILENCE = 2.0
"""Seconds beyond the time given in which a mount that does not answer may still do so: a timeout of 0 is one look."""

Look = Callable[[str], list[ServedImage]]
Show = Callable[[list[ServedImage]], None]


def look_at(path: str) -> list[ServedImage]:
    """Return the image behind the disk `path`, or all that the mount `path` serves, with the attributes `NAMES`."""
    return [image for image in read_status(path, NAMES) if isinstance(image, ServedImage)]


async def wait_complete(
    paths: Sequence[str],
    *,
    patience: float | None = None,
    look: Look = look_at,
    show: Show | None = None,
    period: float = PERIOD,
) -> None:
    """Return when all images of `paths`, disks and roots of mounts, are complete. `show` is told each look.

    Raises:
        StreamingFailed: one of them will not become so by itself: it is not in mode `stream`, something has failed for
            good, or its mount has ended.
        WaitedTooLong: `patience` seconds have passed.
        UsageError: there is no such disk or mount.
    """
    deadline = trio.current_time() + (float("inf") if patience is None else patience)
    waiting = {path: _Awaited(path, look) for path in paths}
    with trio.move_on_at(deadline + _SILENCE):
        while True:
            seen = []
            for awaited in waiting.values():
                # In a thread: a mount whose process hangs must not take the timeout and Ctrl-C with it.
                seen += await trio.to_thread.run_sync(awaited.look, abandon_on_cancel=True)
            if show:
                show(seen)
            if all(awaited.complete for awaited in waiting.values()):
                return
            now = trio.current_time()
            if now >= deadline:
                break
            await trio.sleep(min(period, deadline - now))
    raise WaitedTooLong(paths[0] if len(paths) == 1 else "wait", f"not complete after {patience:g} s")


class _Awaited:
    """One path that is waited for, and the image files that were behind it at the last look."""

    def __init__(self, path: str, look: Look) -> None:
        self.complete = False
        self._path = path
        self._look = look
        self._leaves: dict[str, str] = {}
        """Image file by disk."""

    def look(self) -> list[ServedImage]:
        """Look once; return what is served, nothing once the mount has ended with everything complete."""
        if self.complete and not self._leaves:
            return []
        try:
            images = self._look(self._path)
        except NotMounted:
            if not self._leaves:
                raise
            self._judge_files()
            return []
        if not images:
            raise StreamingFailed(self._path, "serves no image")
        self._leaves = {image.path: image.attributes.get("leaf", "") for image in images}
        complete = [is_complete(image) for image in images]  # each is judged: one that has failed is told at once
        self.complete = all(complete)
        return images

    def _judge_files(self) -> None:
        for disk, leaf in self._leaves.items():
            if not names_no_backing(leaf):
                raise StreamingFailed(disk, "its mount has ended, and the image is not complete")
        self._leaves, self.complete = {}, True


def is_complete(image: ServedImage) -> bool:
    """Whether the image stands alone; it still may become so if this returns False.

    Raises:
        StreamingFailed: it will not by itself, and why.
    """
    values = image.attributes
    if values.get("state") == "complete" or values.get("backing") == "":
        return True
    if values.get("state") == "failed" or values.get("backing_state") in PERMANENT:
        raise StreamingFailed(image.path, values.get("last_error") or "has failed for good")
    if values.get("mode") != "stream":
        raise StreamingFailed(image.path, f"is in mode {values.get('mode', '')}, in which nothing completes it")
    return False


def names_no_backing(leaf: str) -> bool:
    """Whether the QED image at `leaf` stands alone, by its header.

    Raises:
        StreamingFailed: its header cannot be read, so nobody can say.
    """
    try:
        with open(leaf, "rb") as file:
            header = headers.decode(file.read(headers.SIZE), os.fstat(file.fileno()).st_size, leaf)
    except OSError as error:
        why = f"its mount has ended, and whether it is complete cannot be told ({os.strerror(error.errno or 0)})"
        raise StreamingFailed(leaf, why) from error
    except QedfsError as error:
        raise StreamingFailed(leaf, f"its mount has ended, and it is damaged ({error.why})") from error
    return not header.has_backing
