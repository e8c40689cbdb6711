"""The edge between qedfs and the kernel: every error of a handler becomes an errno here, and nowhere else.

pyfuse3 knows only `FUSEError`; any other exception would leave the request unanswered and end the main loop, and all
disks with it.
"""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

import pyfuse3

from qedfs.errors import QedfsError

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)


def answered(handler: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Let `handler` fail only as the kernel understands it. A cancellation passes; it means that the main loop ends."""

    @functools.wraps(handler)
    async def answering(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(*args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            raise failure(error, handler.__name__) from error

    return answering


def failure(error: Exception, handler: str) -> pyfuse3.FUSEError:
    """Return what the kernel is told of `error`, raised by the handler of that name.

    `QedfsError` becomes its errno. Everything else is a defect of ours: logged with its traceback, and EIO for this
    request alone.
    """
    if isinstance(error, QedfsError):
        return pyfuse3.FUSEError(error.errno)
    _log.error("%s failed", handler, exc_info=error)
    return pyfuse3.FUSEError(errno.EIO)
