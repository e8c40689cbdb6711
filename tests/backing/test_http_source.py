"""Files on web servers, by nginx: what is there, what is pinned, TLS, outages and redirects of a real server."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from contrib.boot.server import free_port
from qedfs.backing.base import Identity, Source
from qedfs.backing.locate import Reference, open_backing
from qedfs.backing.policy import Policy
from qedfs.errors import BackingChanged, BackingError, BackingRefused, BackingUnavailable, NotAllowed
from tests.backing.samples import KIB, MIB, make_qed, random_bytes
from tests.backing.web_reading import backing_at, opened, read
from tests.backing.web_servers import Web, nginx
from tests.nbd.certificates import Authority

CONTENT, OTHER = random_bytes(300_000, 1), random_bytes(300_000, 2)
pytestmark = pytest.mark.usefixtures("no_habits")


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    "replacement", [OTHER, OTHER + b"longer", OTHER[:1000]], ids=["same-size", "longer", "shorter"]
)
async def test_a_file_that_is_replaced_is_refused_and_never_mixed(web: Web, scheme: str, replacement: bytes) -> None:
    name = f"changing-{scheme}-{len(replacement)}.raw"
    web.put(name, CONTENT)
    os.utime(web.files / name, (1e9, 1e9))
    async with opened(f"{web.url if scheme == 'http' else web.secure}/{name}") as source:
        assert await read(source, 0, 1000) == CONTENT[:1000]
        web.put(name, replacement)
        for pos in (0, 250_000):
            with pytest.raises(BackingChanged, match=f"{name}: has "):
                await read(source, pos, 50_000)


async def test_a_replaced_file_is_not_what_the_leaf_was_made_on(web: Web) -> None:
    web.put("pinned.raw", CONTENT)
    os.utime(web.files / "pinned.raw", (1e9, 1e9))
    async with opened(f"{web.url}/pinned.raw") as source:
        pinned = source.identity
    assert pinned == Identity(len(CONTENT), f'etag:"3b9aca00-{len(CONTENT):x}"')
    web.put("pinned.raw", OTHER)
    backing = backing_at(f"{web.url}/pinned.raw", pinned)
    with pytest.raises(BackingChanged, match="is not what the image was made on"):
        await read(backing, 0, 512)
    await backing.aclose()


@pytest.mark.parametrize("path", ["missing.raw", "directory/", ""])
async def test_what_is_no_file_is_refused_with_the_reason(web: Web, path: str) -> None:
    (web.files / "directory").mkdir(exist_ok=True)
    with pytest.raises(BackingRefused, match=r"there is no such file \(status 404\)|refuses it \(status 403\)"):
        await open_backing(Reference(f"{web.url}/{path}", None, "/leaf.qed"), Policy())


async def test_an_empty_file_is_one(web: Web) -> None:
    web.put("empty.raw", b"")
    async with opened(f"{web.url}/empty.raw") as source:
        assert source.size == 0


async def test_a_server_without_ranges_is_refused_at_once(tmp_path: Path) -> None:
    with nginx(tmp_path, "max_ranges 0;") as web:
        web.put("base.raw", CONTENT)
        with pytest.raises(BackingRefused, match="the server sends no parts of a file"):
            await open_backing(Reference(f"{web.url}/base.raw", None, "/leaf.qed"), Policy())


async def test_an_outage_of_the_server_is_waited_out(tmp_path: Path) -> None:
    with nginx(tmp_path) as web:
        web.put("base.raw", CONTENT)
        backing = backing_at(f"{web.url}/base.raw")
        assert await read(backing, 0, 1000) == CONTENT[:1000]
        web.stop()
        async with trio.open_nursery() as nursery:

            async def read_over_the_outage() -> None:
                assert await read(backing, 1000, 1000) == CONTENT[1000:2000]

            nursery.start_soon(read_over_the_outage)
            with trio.fail_after(10):
                while "Connection refused" not in backing.statistics().last_error:  # noqa: ASYNC110 (nothing tells)
                    await trio.sleep(0.01)
            web.start()
        await backing.aclose()


async def test_many_readers_share_few_connections_that_are_kept(web: Web) -> None:
    web.put("many.raw", CONTENT)
    before = web.connections()
    async with opened(f"{web.url}/many.raw", connections=3) as source:
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                for pos in range(0, 200 * KIB, 10 * KIB):
                    nursery.start_soon(check, source, pos)
    # One more than allowed is that of the opening.
    assert web.connections() - before <= 4


async def check(source: Source, pos: int) -> None:
    assert await read(source, pos, 10 * KIB) == CONTENT[pos : pos + 10 * KIB]


def slice_cache(port: int, folder: Path) -> Callable[[Web], str]:
    """Return the configuration of a cache, on `port`, that asks the server for what it has not in slices."""
    return lambda web: (
        f"""
  proxy_cache_path {folder}/slices keys_zone=slices:1m;
  server {{
    listen 127.0.0.1:{port}; access_log off;
    location / {{
      slice 64k; proxy_cache slices; proxy_cache_key $uri$slice_range; proxy_cache_valid 200 206 1h;
      proxy_set_header Range $slice_range; proxy_http_version 1.1; proxy_pass {web.url};
    }}
  }}"""
    )


async def test_a_cache_of_slices_in_between_fetches_everything_once(tmp_path: Path) -> None:
    port = free_port()
    with nginx(tmp_path, more=slice_cache(port, tmp_path)) as web:
        web.put("base.raw", CONTENT)
        for _ in range(3):
            async with opened(f"http://127.0.0.1:{port}/base.raw") as source:
                assert source.identity.tag.startswith('etag:"')
                for pos in (0, 1000, 131_072, 299_000):
                    assert await read(source, pos, 1000) == CONTENT[pos : pos + 1000]
                assert await read(source, 0, source.size) == CONTENT
        assert web.sent() == len(CONTENT)


async def test_a_file_that_is_replaced_behind_a_cache_of_slices_is_not_mixed(tmp_path: Path) -> None:
    port = free_port()
    with nginx(tmp_path, more=slice_cache(port, tmp_path)) as web:
        web.put("base.raw", CONTENT)
        os.utime(web.files / "base.raw", (1e9, 1e9))
        async with opened(f"http://127.0.0.1:{port}/base.raw") as source:
            assert await read(source, 0, 1000) == CONTENT[:1000]
            web.put("base.raw", OTHER)
            # What the cache has is still of the old content; what it has not would be of the new one.
            assert await read(source, 2000, 1000) == CONTENT[2000:3000]
            with pytest.raises(BackingError):
                await read(source, 200_000, 1000)


# --- TLS --------------------------------------------------------------------------------------------------------------


async def test_a_certificate_of_nobody_known_is_refused(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    web.put("tls.raw", CONTENT)
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(BackingRefused, match=r"a certificate that is not accepted: .*SSL_CERT_FILE adds an authority"):
        await open_backing(Reference(f"{web.secure}/tls.raw", None, "/leaf.qed"), Policy())


@pytest.mark.parametrize(
    ("names", "days", "kind", "why"),
    [
        (["other.example"], 2, BackingRefused, "certificate is not valid for '127.0.0.1'"),
        ([], -1, BackingUnavailable, "certificate has expired"),
    ],
)
async def test_a_certificate_of_another_host_is_refused_and_an_expired_one_may_be_renewed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    days: int,
    kind: type[BackingError],
    why: str,
) -> None:
    with nginx(tmp_path) as web:
        Authority().server(tmp_path / "pki", *names, days=days)
        monkeypatch.setenv("SSL_CERT_FILE", str(web.authority))
        web.stop()
        web.start()
        with pytest.raises(BackingError, match=why) as caught:
            await open_backing(Reference(f"{web.secure}/base.raw", None, "/leaf.qed"), Policy())
        assert type(caught.value) is kind


@pytest.mark.parametrize("content", [None, b"no certificate"])
async def test_an_authority_that_cannot_be_read_is_told(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(BackingRefused, match=r"SSL_CERT_FILE: .*ca\.pem cannot be used"):
        await open_backing(Reference(f"{web.secure}/tls.raw", None, "/leaf.qed"), Policy())


async def test_plain_http_where_tls_is_spoken_and_the_reverse_end(web: Web) -> None:
    web.put("tls.raw", CONTENT)
    with pytest.raises(BackingRefused, match="status 400"):
        await open_backing(Reference(f"http://127.0.0.1:{web.https}/tls.raw", None, "/leaf.qed"), Policy())
    with pytest.raises(BackingUnavailable, match="does not come to terms by TLS"):
        await open_backing(Reference(f"https://127.0.0.1:{web.http}/tls.raw", None, "/leaf.qed"), Policy())


# --- who may name what ------------------------------------------------------------------------------------------------


async def test_an_image_without_trust_names_no_url_unless_it_is_allowed(web: Web, tmp_path: Path) -> None:
    web.put("open/base.raw", CONTENT)
    leaf = make_qed(tmp_path / "leaf.qed", 64 * KIB)
    leaf.chmod(0o666)
    reference = Reference(f"{web.url}/open/base.raw?token=secret", "raw", str(leaf), leaf.stat())
    before = web.requests()
    with pytest.raises(NotAllowed, match="may name only what allow_backing names"):
        await open_backing(reference, Policy())
    with pytest.raises(NotAllowed, match="no pattern of allow_backing matches") as refusal:
        await open_backing(reference, Policy(allow_backing=(f"{web.secure}/*",)))
    assert "secret" not in str(refusal.value)
    assert web.requests() == before
    source = await open_backing(reference, Policy(allow_backing=(f"{web.url}/open/*",)))
    await source.aclose()


@pytest.mark.parametrize("name", ["/etc/passwd", "file:/etc/passwd", "nbd:unix:/run/s", "nbd+unix:///?socket=/run/s"])
async def test_an_image_on_a_web_server_names_nothing_local(web: Web, tmp_path: Path, name: str) -> None:
    remote = make_qed(tmp_path / "remote.qed", "-b", name, "-F", "raw", "-u", 64 * KIB)
    web.put("naming/remote.qed", remote.read_bytes())
    with pytest.raises(NotAllowed, match="may not name anything local"):
        await open_backing(Reference(f"{web.url}/naming/remote.qed", "qed", "/leaf.qed"), Policy(allow_backing=("*",)))


async def test_a_chain_that_leads_back_to_itself_is_refused(web: Web, tmp_path: Path) -> None:
    remote = make_qed(tmp_path / "remote.qed", "-b", "remote.qed", "-F", "qed", "-u", MIB)
    web.put("circle/remote.qed", remote.read_bytes())
    with pytest.raises(BackingRefused, match="the chain of backings leads back to it"):
        await open_backing(Reference(f"{web.url}/circle/remote.qed", None, "/leaf.qed"), Policy(allow_backing=("*",)))
