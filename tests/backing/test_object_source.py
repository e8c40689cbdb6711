"""Objects in stores: against moto, s3rver, azurite and fake-gcs-server, and a scripted store where a real one would behave."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from qedfs.backing.base import Identity, Source
from qedfs.backing.locate import Reference, open_backing
from qedfs.backing.object_name import ObjectLocation
from qedfs.backing.objects import PIECE, open_object
from qedfs.backing.policy import Policy
from qedfs.backing.resilient import Backing
from qedfs.errors import BackingChanged, BackingError, BackingRefused, BackingUnavailable, NotAllowed
from tests.backing.object_servers import Put, StoreServer, moto_tls, s3rver
from tests.backing.samples import KIB, MIB, make_qed, random_bytes
from tests.backing.scripted_store import ScriptedStore, failing, scripted_store
from tests.cli.commands import QEDFS, mounted, qedfs, refused

CONTENT, OTHER = random_bytes(300_000, 1), random_bytes(300_000, 2)
ANYWHERE = ObjectLocation("s3", "bucket", "base.raw")


@pytest.fixture(autouse=True)
def _no_variables_of_clouds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_", "STORAGE_EMULATOR")):
            monkeypatch.delenv(name)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedStore]:
    with scripted_store(CONTENT) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@asynccontextmanager
async def opened(name: str) -> AsyncIterator[Source]:
    source = await open_backing(Reference(name, None, "/leaf.qed"), Policy())
    try:
        yield source
    finally:
        await source.aclose()


async def read(source: Source | Backing, pos: int, length: int) -> bytes:
    buffer = bytearray(length)
    await source.read_into(pos, memoryview(buffer))
    return bytes(buffer)


def use(server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.variables().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def restartable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreServer]:
    """A running store that keeps its objects when it is stopped and started again."""
    server = s3rver(tmp_path / "store")
    server.start()
    use(server, monkeypatch)
    yield server
    server.stop()


@pytest.mark.parametrize("kind", ["s3", "s3rver", "gs", "az"])
@pytest.mark.parametrize(
    "replacement", [OTHER, OTHER + b"longer", OTHER[:1000]], ids=["same-size", "longer", "shorter"]
)
async def test_an_object_that_is_replaced_is_refused_and_never_mixed(put: Put, kind: str, replacement: bytes) -> None:
    async with opened(put(kind, "changing.raw", CONTENT)) as source:
        assert await read(source, 0, 1000) == CONTENT[:1000]
        put(kind, "changing.raw", replacement)
        for pos in (0, 250_000):
            with pytest.raises(BackingChanged, match=f"{kind[:2]}://bucket/changing.raw: has "):
                await read(source, pos, 50_000)


@pytest.mark.parametrize("kind", ["s3", "s3rver", "gs", "az"])
async def test_a_replaced_object_is_not_what_the_leaf_was_made_on(put: Put, kind: str) -> None:
    name = put(kind, "pinned.raw", CONTENT)
    async with opened(name) as source:
        pinned = source.identity
    assert pinned.tag.startswith("etag:")
    put(kind, "pinned.raw", OTHER)
    backing = Backing(lambda: open_backing(Reference(name, "raw", "/leaf.qed"), Policy()), name=name, expected=pinned)
    with pytest.raises(BackingChanged, match="is not what the image was made on"):
        await read(backing, 0, 512)
    await backing.aclose()


@pytest.mark.parametrize("kind", ["s3", "s3rver", "gs", "az"])
async def test_an_object_that_does_not_exist_is_refused(put: Put, kind: str) -> None:
    name = put(kind, "there.raw", b"x").replace("there", "not there")
    with pytest.raises(BackingRefused, match=r"not there.raw: there is no such object \(status 404"):
        await open_backing(Reference(name, None, "/leaf.qed"), Policy())


async def test_a_source_goes_on_after_a_restart_of_its_server(restartable: StoreServer) -> None:
    restartable.put("base.raw", CONTENT)
    async with opened("s3://bucket/base.raw") as source:
        assert await read(source, 0, 1000) == CONTENT[:1000]
        restartable.stop()
        with pytest.raises(BackingUnavailable):
            await read(source, 1000, 1000)
        restartable.start()
        assert await read(source, 0, len(CONTENT)) == CONTENT


async def test_a_read_waits_for_a_server_that_is_away_and_ends_when_it_is_back(restartable: StoreServer) -> None:
    restartable.put("base.raw", CONTENT)
    backing = Backing(
        lambda: open_backing(Reference("s3://bucket/base.raw", "raw", "/leaf.qed"), Policy()), name="base"
    )
    assert await read(backing, 0, 1000) == CONTENT[:1000]
    restartable.stop()
    got: list[bytes] = []

    async def read_later() -> None:
        got.append(await read(backing, 100_000, 100_000))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_later)
            while not backing.statistics().last_error:  # noqa: ASYNC110 (nothing tells)
                await trio.sleep(0.01)
            await trio.to_thread.run_sync(restartable.start)
    assert got == [CONTENT[100_000:200_000]]
    await backing.aclose()


async def test_tls_by_an_authority_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = moto_tls(tmp_path)
    server.start()
    try:
        use(server, monkeypatch)
        server.put("base.raw", CONTENT)
        async with opened("s3://bucket/base.raw") as source:
            assert await read(source, 0, len(CONTENT)) == CONTENT
        monkeypatch.delenv("AWS_CA_BUNDLE")
        with pytest.raises(BackingRefused, match="the store's certificate does not convince"):
            await open_object(ANYWHERE, signed=True)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "nothing"))
        with pytest.raises(BackingRefused, match="nothing: No such file"):
            await open_object(ANYWHERE, signed=True)
    finally:
        server.stop()


def test_a_leaf_of_an_object_is_made_mounted_and_read(put: Put, tmp_path: Path) -> None:
    content = random_bytes(4 * MIB, 5)
    name = put("s3", "images/disk one.raw", content)
    leaf = tmp_path / "leaf.qed"
    qedfs("create", "-b", name, leaf)
    with mounted(leaf, tmp_path / "mnt") as mount:
        assert (mount / "leaf.raw").read_bytes() == content
    put("s3", "images/disk one.raw", content[::-1])
    # In a process of its own: obstore's threads, which `create` has started here, are not there after a fork.
    line = [*QEDFS, "mount", str(leaf), str(tmp_path / "mnt")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "is not what the image was made on" in done.stderr


def test_wrong_credentials_are_one_line(put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = put("s3rver", "base.raw", CONTENT)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    said = refused("create", "-b", name, tmp_path / "leaf.qed")
    assert said.startswith("qedfs: s3://bucket/base.raw: the store refuses it to these credentials (status 403")


def test_a_wrong_account_key_is_one_line(put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = put("az", "base.raw", CONTENT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "YWJj")
    assert "the store refuses it to these credentials (status 403" in refused("create", "-b", name, tmp_path / "l.qed")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "!secret!")
    said = refused("create", "-b", name, tmp_path / "l.qed")
    assert "the environment does not make sense" in said
    assert "secret" not in said


@pytest.mark.parametrize(
    ("status", "code", "kind", "why"),
    [
        (404, "NoSuchKey", BackingRefused, "has gone"),
        (403, "AccessDenied", BackingRefused, "the store refuses it to these credentials"),
        (403, "SignatureDoesNotMatch", BackingRefused, "SignatureDoesNotMatch: said the store"),
        (403, "RequestTimeTooSkewed", BackingRefused, "the clock of this machine is wrong"),
        (400, "ExpiredToken", BackingRefused, "the credentials have expired: renew them"),
        (401, "", BackingRefused, "the store refuses it to these credentials"),
        (405, "MethodNotAllowed", BackingRefused, "the store refuses the request"),
        (412, "PreconditionFailed", BackingChanged, "has been replaced"),
        (416, "InvalidRange", BackingChanged, "has been replaced"),
        (429, "TooManyRequests", BackingUnavailable, "status 429: TooManyRequests: said the store"),
        (500, "InternalError", BackingUnavailable, "InternalError"),
        (503, "SlowDown", BackingUnavailable, "SlowDown"),
    ],
)
async def test_what_an_error_of_the_store_means(
    store: ScriptedStore, status: int, code: str, kind: type[BackingError], why: str
) -> None:
    async with opened("s3://bucket/base.raw") as source:
        store.script.extend([failing(status, code)] * 2)  # some are tried a second time
        with pytest.raises(BackingError, match=why) as caught:
            await read(source, 0, 4096)
        assert type(caught.value) is kind
        assert "http" not in str(caught.value)
        store.script.clear()
        assert await read(source, 0, 4096) == CONTENT[:4096]


async def test_a_single_failure_of_the_server_is_not_seen(store: ScriptedStore) -> None:
    async with opened("s3://bucket/base.raw") as source:
        store.script.append(failing(503, "SlowDown"))
        assert await read(source, 0, 4096) == CONTENT[:4096]


async def test_an_answer_that_ends_early_or_is_of_another_range_is_not_taken(store: ScriptedStore) -> None:
    async with opened("s3://bucket/base.raw") as source:
        store.script.extend([lambda handler: handler.part(cut=100)] * 3)
        with pytest.raises(BackingUnavailable):
            await read(source, 0, 4096)
        store.script.clear()
        store.script.append(lambda handler: handler.part(shift=512))
        with pytest.raises(BackingUnavailable):
            await read(source, 0, 4096)
        assert await read(source, 0, 4096) == CONTENT[:4096]


async def test_a_store_that_sends_all_where_a_part_was_asked_for_is_refused(store: ScriptedStore) -> None:
    async with opened("s3://bucket/base.raw") as source:
        store.script.append(lambda handler: handler.answer(200, CONTENT))
        with pytest.raises(BackingRefused, match="cannot be read in parts"):
            await read(source, 0, 4096)


async def test_a_weak_etag_is_compared_and_not_sent(store: ScriptedStore) -> None:
    store.etag = 'W/"weak"'
    async with opened("s3://bucket/base.raw") as source:
        assert await read(source, 0, 4096) == CONTENT[:4096]
        assert "If-Match" not in store.headers[-1]
        store.etag = 'W/"other"'
        with pytest.raises(BackingChanged, match="has been replaced: was etag:W/"):
            await read(source, 0, 4096)


async def test_every_part_is_asked_for_with_the_etag(store: ScriptedStore) -> None:
    store.content = random_bytes(2 * PIECE + 77)
    async with opened("s3://bucket/base.raw") as source:
        assert await read(source, 0, source.size) == store.content
    # The first look at the magic, then three pieces.
    assert [headers["If-Match"] for headers in store.headers] == [None, *['"first"'] * 4]


async def test_a_cancelled_read_is_not_written_into(store: ScriptedStore) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def wait(handler: object) -> None:
        asked.set()
        go_on.wait(30)
        handler.part()  # type: ignore[attr-defined]

    async with opened("s3://bucket/base.raw") as source:
        store.script.append(wait)
        buffer = bytearray(4096)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.read_into, 0, memoryview(buffer))
            await trio.to_thread.run_sync(asked.wait)
            nursery.cancel_scope.cancel()
        go_on.set()
        # One that begins after the other has been answered ends after it.
        assert await read(source, 0, 4096) == CONTENT[:4096]
        assert not any(buffer)


async def test_closing_ends_a_read_that_the_store_does_not_answer(store: ScriptedStore) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def wait(handler: object) -> None:
        asked.set()
        go_on.wait(30)

    try:
        async with opened("s3://bucket/base.raw") as source, trio.open_nursery() as nursery:
            store.script.extend([wait] * 2)

            async def read_until_closed() -> None:
                with pytest.raises(BackingUnavailable, match="is closed"):
                    await read(source, 0, 4096)

            nursery.start_soon(read_until_closed)
            await trio.to_thread.run_sync(asked.wait)
            await source.aclose()
    finally:
        go_on.set()


async def test_credentials_are_used_for_trusted_images_only(store: ScriptedStore, tmp_path: Path) -> None:
    leaf = make_qed(tmp_path / "leaf.qed", 1 * MIB)
    anybody = Policy(allow_backing=("s3://bucket/*",))
    for mode, signed in ((0o600, True), (0o666, False)):
        leaf.chmod(mode)
        store.headers.clear()
        reference = Reference("s3://bucket/base.raw", "raw", str(leaf), leaf.stat())
        source = await open_backing(reference, anybody)
        assert await read(source, 0, 4096) == CONTENT[:4096]
        await source.aclose()
        assert len(store.headers) == 2
        for headers in store.headers:
            assert ("Authorization" in headers) is signed
            assert ("x-amz-security-token" in headers) is signed


async def test_an_image_without_trust_names_no_object_unless_it_is_allowed(
    store: ScriptedStore, tmp_path: Path
) -> None:
    leaf = make_qed(tmp_path / "leaf.qed", 64 * KIB)
    leaf.chmod(0o666)
    reference = Reference("s3://bucket/base.raw", "raw", str(leaf), leaf.stat())
    with pytest.raises(NotAllowed, match="may name only what allow_backing names"):
        await open_backing(reference, Policy())
    with pytest.raises(NotAllowed, match="no pattern of allow_backing matches"):
        await open_backing(reference, Policy(allow_backing=("gs://*",)))
    assert not store.headers


async def test_an_object_may_not_name_a_local_file(store: ScriptedStore, tmp_path: Path) -> None:
    for name in ("/etc/passwd", "file:/etc/passwd"):
        remote = make_qed(tmp_path / "remote.qed", "-b", name, "-F", "raw", "-u", 64 * KIB)
        store.content = remote.read_bytes()
        with pytest.raises(NotAllowed, match="may not name anything local"):
            await open_backing(Reference("s3://bucket/remote.qed", "qed", "/leaf.qed"), Policy(allow_backing=("*",)))


async def test_a_key_of_customer_encryption_is_not_lent(store: ScriptedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SSE_CUSTOMER_KEY_BASE64", "a2V5a2V5a2V5a2V5a2V5a2V5a2V5a2V5a2V5a2V5a2U=")
    with pytest.raises(BackingRefused, match="is not for images that are not trusted"):
        await open_object(ANYWHERE, signed=False)
    assert not store.headers


async def test_without_obstore_the_refusal_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(BackingRefused, match=r"install qedfs\[objects\]"):
        await open_object(ANYWHERE, signed=True)


async def test_an_object_without_etag_is_told_by_its_time(store: ScriptedStore) -> None:
    store.etag = ""
    async with opened("s3://bucket/base.raw") as source:
        assert source.identity == Identity(len(CONTENT), "mtime:2025-01-01T00:00:00+00:00")
        assert await read(source, 0, 4096) == CONTENT[:4096]
