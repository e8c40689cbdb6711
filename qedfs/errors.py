"""Every exception class of qedfs: whose fault it is, the errno a guest sees, the exit code a shell sees.

An error is one line for a person, `what: why`, and says whose fault it is by its class.
Only `fuse/boundary.py` turns `errno` into an answer to the kernel and only `cli/` turns `exit_code` into an exit status;
everything between raises and lets pass.
"""

from __future__ import annotations

import errno as _errno
from typing import ClassVar


def printable(text: str) -> str:
    """Return `text` with every control character and undecodable byte escaped, so that it stays one line on a terminal."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


class QedfsError(Exception):
    """Base of all expected failures.

    `what` names the thing concerned (a path, an option, a backing), `why` says what is wrong and, where there is
    something to be done, what to do.
    """

    errno: ClassVar[int] = _errno.EIO
    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, why: str) -> None:
        super().__init__(what, why)
        self.what = what
        self.why = why

    def __str__(self) -> str:
        return printable(f"{self.what}: {self.why}")


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return one error for several tasks that worked on one thing: a failure before a cancellation that it caused."""
    errors = [first_of(e) if isinstance(e, BaseExceptionGroup) else e for e in group.exceptions]
    return next((e for e in errors if isinstance(e, Exception)), errors[0])


class UsageError(QedfsError):
    """The user's fault: a wrong argument, option or value."""

    errno = _errno.EINVAL


class ImageError(QedfsError):
    """The image's fault: what its bytes say cannot be so."""


class InvalidImage(ImageError):
    """The image cannot be opened at all (header, L1 table, backing name)."""

    errno = _errno.EINVAL


class CorruptEntry(ImageError):
    """One table entry is invalid; only requests that reach it fail."""


class LeafError(QedfsError):
    """The fault of the disk under the leaf: a read, write or flush of the image file failed."""


class LeafFull(LeafError):
    """The file system of the leaf has no room left (ENOSPC, EDQUOT, EFBIG)."""

    errno = _errno.ENOSPC


class LeafFailed(LeafError):
    """A flush of the leaf failed, so what the kernel still holds is unknown; writes and flushes are refused from then on."""


class ReadOnly(QedfsError):
    """A write to an image that is served read-only."""

    errno = _errno.EROFS


class Held(QedfsError):
    """A write, a prefetch or a step while the image is held for a migration."""

    errno = _errno.EBUSY


class Locked(QedfsError):
    """Somebody else has the image open in a way that excludes ours."""

    errno = _errno.EBUSY


class BackingError(QedfsError):
    """The backing's fault."""


class BackingUnavailable(BackingError):
    """May pass: the backing does not answer now. Worth another try, after `retry_after` seconds if the server asked for that."""

    def __init__(self, what: str, why: str, *, retry_after: float = 0.0) -> None:
        super().__init__(what, why)
        self.retry_after = retry_after


class BackingLocked(BackingUnavailable):
    """May pass: somebody has the backing open for writing. At mount it is a refusal all the same."""


class BackingRefused(BackingError):
    """Final: the backing does not exist, may not be used, or says nonsense. No retry helps."""


class BackingChanged(BackingRefused):
    """Final: the backing is not what the leaf was made on (size, ETag or modification time differ)."""


class NotAllowed(BackingRefused):
    """Final: policy forbids the image to name this backing."""

    errno = _errno.EACCES


class OutputError(QedfsError):
    """The file that a command was to write cannot be made, or not to its end; nothing of it is left."""


class MountError(QedfsError):
    """The mount cannot be made, or cannot be ended."""


class NotMounted(UsageError):
    """The user's fault, or news: a path is not on a qedfs mount, or is no more."""


class StreamingFailed(QedfsError):
    """Streaming will not complete an image unless somebody does something: the exit status that `wait` promises."""


class WaitedTooLong(QedfsError):
    """What was waited for did not come in the time given; exits as timeout(1)."""

    exit_code = 124


class MonitorLost(QedfsError):
    """A QEMU is not to be reached, or not any more; what it was told last may be done or not."""


class MonitorRefused(QedfsError):
    """A QEMU does not do what it was told, and says why."""


class MigrationFailed(QedfsError):
    """A machine was not moved, or cannot be left alone after the move; says what became of both sides."""


class Interrupted(QedfsError):
    """A signal ended a command that has something to say about it; exits as a program that SIGINT ended."""

    exit_code = 130
