from __future__ import annotations

import errno
from collections.abc import Callable

import pyfuse3
import pytest
import trio

from qedfs.errors import LeafFull, QedfsError
from qedfs.fuse.boundary import answered
from qedfs.fuse.operations import Operations


def raising(error: BaseException) -> Callable[[], object]:
    @answered
    async def handler() -> None:
        raise error

    return handler


async def errno_of(error: BaseException) -> int:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await raising(error)()  # type: ignore[misc]
    return caught.value.errno


async def test_an_answer_passes() -> None:
    @answered
    async def handler(number: int) -> int:
        return number

    assert await handler(7) == 7


async def test_an_expected_error_becomes_its_errno() -> None:
    assert await errno_of(LeafFull("vm.qed", "no room")) == errno.ENOSPC
    assert await errno_of(QedfsError("vm.qed", "something")) == errno.EIO
    assert await errno_of(pyfuse3.FUSEError(errno.ENOTTY)) == errno.ENOTTY


async def test_a_defect_is_logged_with_its_traceback_and_answered_with_eio(
    expected_warnings: Callable[[str], None],
) -> None:
    expected_warnings(r"(?s)ERROR qedfs\.fuse\.boundary: handler failed.*ZeroDivisionError: a defect")
    assert await errno_of(ZeroDivisionError("a defect")) == errno.EIO


async def test_a_cancellation_passes() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()

        @answered
        async def handler() -> None:
            await trio.sleep_forever()

        await handler()
    assert scope.cancelled_caught


def test_every_handler_that_can_fail_is_answered() -> None:
    """`init` and `forget` have no request to answer and no way to fail; `getxattr` calls another one that is, and the hot
    path answers by itself (test_mounted_files shows a defect there)."""
    handlers = {name: value for name, value in vars(Operations).items() if hasattr(pyfuse3.Operations, name)}
    ours = {name for name, value in handlers.items() if callable(value) and not name.startswith("__")}
    assert {name for name in ours if not hasattr(handlers[name], "__wrapped__")} == {
        "init",
        "forget",
        "getxattr",
        "read",
        "write",
    }
