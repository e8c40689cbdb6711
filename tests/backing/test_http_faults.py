"""What servers, proxies and networks do wrong: each fault once, and after it the source reads as before or has ended for good."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import trio
import trio.testing

from qedfs.backing.base import Identity
from qedfs.backing.http import PIECE, open_http
from qedfs.backing.http_name import parse_http
from qedfs.backing.locate import Reference, open_backing
from qedfs.backing.policy import Policy
from qedfs.errors import BackingChanged, BackingError, BackingRefused, BackingUnavailable, NotAllowed
from tests.backing.samples import make_qed, random_bytes
from tests.backing.scripted_web import MODIFIED, Act, Handler, ScriptedWeb, redirect, scripted_web, status
from tests.backing.web_reading import backing_at, opened, read
from tests.backing.web_servers import Web

CONTENT = random_bytes(300_000, 1)
PART = CONTENT[:4096]

PASSING: dict[str, tuple[Act, str]] = {
    "short-body": (lambda h: h.part(promised=100), "sent less than it promised"),
    "short-length": (lambda h: h.part(headers={"Content-Length": "100"}), "sent less than it promised"),
    "long-body": (lambda h: h.part(more=b"x"), "sent more than it promised"),
    "wrong-range": (lambda h: h.part(shift=512), "sent the bytes 512-4607 where 0-4095 were asked for"),
    "no-range": (lambda h: h.part(headers={"Content-Range": ""}), "did not say which part"),
    "several-ranges": (
        lambda h: h.part(headers={"Content-Range": "", "Content-Type": "multipart/byteranges; boundary=x"}),
        "did not say which part",
    ),
    "nonsense-range": (lambda h: h.part(headers={"Content-Range": "bytes 0-x/y"}), "did not say which part"),
    "all-of-it": (lambda h: h.answer(200, CONTENT), "sent all of the file where a part was asked for"),
    "compressed": (lambda h: h.part(headers={"Content-Encoding": "br"}), r"compressed \(br\)"),
    "reset-in-the-body": (lambda h: h.reset(sent=1000), "the connection to the server was lost|less than it promised"),
    "500": (status(500), "status 500"),
    "502": (status(502), "status 502"),
    "503": (status(503), "status 503"),
    "429": (status(429), "status 429"),
}
"""Faults of one request: the next one is answered from the same source."""

NO_ANSWERS: dict[str, Act] = {
    "no-http": lambda h: h.say(b"\x15\x03\x03\x00\x02\x02\x50\r\n\r\n"),
    "endless-header": lambda h: h.say(b"HTTP/1.1 206 OK\r\nX: " + b"x" * 70_000),
    "many-headers": lambda h: h.say(b"HTTP/1.1 206 OK\r\n" + b"X: x\r\n" * 200 + b"\r\n"),
    "reset": lambda h: h.reset(),
}

FINAL: dict[str, tuple[Act, type[BackingError], str]] = {
    "401": (status(401), BackingRefused, "it wants credentials"),
    "403": (status(403), BackingRefused, "a signed URL or credentials may have expired"),
    "404": (status(404), BackingRefused, "has gone"),
    "410": (status(410), BackingRefused, "has gone"),
    "412": (status(412), BackingChanged, "has been replaced"),
    "416": (status(416), BackingChanged, "has been replaced"),
    "other-etag": (
        lambda h: h.part(headers={"ETag": '"second"'}),
        BackingChanged,
        'was etag:"first", is etag:"second"',
    ),
    "no-etag": (lambda h: h.part(headers={"ETag": ""}), BackingChanged, "is mtime:2025-01-01"),
    "other-length": (lambda h: h.part(headers={"Content-Range": "bytes 0-4095/9"}), BackingUnavailable, "did not say"),
    "longer": (lambda h: h.part(headers={"Content-Range": "bytes 0-4095/300001"}), BackingChanged, "has now 300001"),
    "redirect-to-nowhere": (status(302), BackingRefused, "redirects without saying where to"),
    "redirect-to-a-file": (redirect("file:///etc/passwd"), BackingRefused, "no http:// or https:// URL"),
}


@pytest.mark.parametrize("fault", PASSING)
async def test_a_fault_that_may_pass(scripted: ScriptedWeb, fault: str) -> None:
    act, why = PASSING[fault]
    async with opened(scripted.url + "/base.raw") as source:
        scripted.script.append(act)
        with pytest.raises(BackingUnavailable, match=why):
            await read(source, 0, 4096)
        assert await read(source, 0, 4096) == PART


@pytest.mark.parametrize("fault", PASSING)
async def test_a_fault_that_may_pass_is_not_seen_above(scripted: ScriptedWeb, fault: str) -> None:
    backing = backing_at(scripted.url + "/base.raw")
    assert await read(backing, 5000, 10) == CONTENT[5000:5010]
    scripted.script.append(PASSING[fault][0])
    assert await read(backing, 0, 4096) == PART
    await backing.aclose()


async def test_a_server_that_stops_sending_parts_is_refused_once_it_is_asked_anew(scripted: ScriptedWeb) -> None:
    backing = backing_at(scripted.url + "/base.raw")
    assert await read(backing, 0, 4096) == PART
    scripted.always = lambda h: h.answer(200, CONTENT)
    with trio.fail_after(10), pytest.raises(BackingRefused, match="the server sends no parts of a file"):
        await read(backing, 5000, 10)
    await backing.aclose()


@pytest.mark.parametrize("fault", FINAL)
async def test_a_fault_that_ends_it(scripted: ScriptedWeb, fault: str) -> None:
    act, kind, why = FINAL[fault]
    async with opened(scripted.url + "/base.raw?sig=secret") as source:
        scripted.script.append(act)
        with pytest.raises(kind, match=why) as caught:
            await read(source, 0, 4096)
        assert type(caught.value) is kind
        assert "secret" not in str(caught.value)


async def test_parts_may_come_without_length_or_shorter_than_asked_for(scripted: ScriptedWeb) -> None:
    async with opened(scripted.url + "/base.raw") as source:
        scripted.script.extend([lambda h: h.chunked(), lambda h: h.part(most=1000), lambda h: h.part(most=1000)])
        assert await read(source, 0, 4096) == PART
        assert await read(source, 0, 4096) == PART
    assert [request.headers["Range"] for request in scripted.requests[1:]] == [
        "bytes=0-4095",
        "bytes=0-4095",
        "bytes=1000-4095",
        "bytes=2000-4095",
    ]
    assert scripted.connections == 1


@pytest.mark.parametrize("fault", NO_ANSWERS)
async def test_no_answer_over_a_kept_connection_is_asked_for_again_at_once(scripted: ScriptedWeb, fault: str) -> None:
    act = NO_ANSWERS[fault]
    async with opened(scripted.url + "/base.raw") as source:
        scripted.script.append(act)
        assert await read(source, 0, 4096) == PART
        scripted.script.extend([act, act])
        with pytest.raises(BackingUnavailable, match="the connection to the server was lost"):
            await read(source, 0, 4096)
        assert await read(source, 0, 4096) == PART


async def test_an_answer_of_two_lengths_is_not_taken(scripted: ScriptedWeb) -> None:
    async with opened(scripted.url + "/base.raw") as source:
        scripted.script.append(lambda h: h.part(headers={"Content-Length": "5, 6"}))
        with pytest.raises(BackingUnavailable, match="was lost"):
            await read(source, 0, 4096)
        # Nor does its connection stay until the garbage collector comes by.
        ours = [one for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_ESTABLISHED]
        assert scripted.server_port not in [one.raddr.port for one in ours]
        assert await read(source, 0, 4096) == PART


async def test_every_part_is_asked_for_on_condition(scripted: ScriptedWeb) -> None:
    scripted.content = random_bytes(2 * PIECE + 77)
    async with opened(scripted.url + "/base.raw") as source:
        assert await read(source, 0, source.size) == scripted.content
    for name in ("If-Match", "If-Range"):
        assert [request.headers[name] for request in scripted.requests] == [None, *['"first"'] * 3]
    assert {request.headers["Accept-Encoding"] for request in scripted.requests} == {"identity"}


async def test_a_weak_etag_is_compared_and_not_sent(scripted: ScriptedWeb) -> None:
    scripted.headers["ETag"] = 'W/"weak"'
    async with opened(scripted.url + "/base.raw") as source:
        assert source.identity == Identity(len(CONTENT), 'etag:W/"weak"')
        assert await read(source, 0, 4096) == PART
        assert "If-Match" not in scripted.requests[-1].headers
        scripted.headers["ETag"] = 'W/"other"'
        with pytest.raises(BackingChanged, match='was etag:W/"weak", is etag:W/"other"'):
            await read(source, 0, 4096)


async def test_without_an_etag_the_time_of_change_tells(scripted: ScriptedWeb) -> None:
    scripted.headers["ETag"] = ""
    async with opened(scripted.url + "/base.raw") as source:
        assert source.identity == Identity(len(CONTENT), "mtime:2025-01-01T00:00:00+00:00")
        assert await read(source, 0, 4096) == PART
        assert scripted.requests[-1].headers["If-Unmodified-Since"] == MODIFIED
        scripted.headers["Last-Modified"] = MODIFIED.replace("2025", "2026")
        with pytest.raises(BackingChanged, match="has been replaced"):
            await read(source, 0, 4096)


async def test_a_server_that_tells_nothing_is_believed_by_the_length(scripted: ScriptedWeb) -> None:
    scripted.headers = {}
    async with opened(scripted.url + "/base.raw") as source:
        assert source.identity == Identity(len(CONTENT))
        assert await read(source, 0, 4096) == PART
        scripted.content += b"x"
        with pytest.raises(BackingChanged, match="has now 300001 bytes, had 300000"):
            await read(source, 0, 4096)


async def test_a_server_that_compresses_all_the_same_is_refused(scripted: ScriptedWeb) -> None:
    scripted.headers["Content-Encoding"] = "gzip"
    with pytest.raises(BackingRefused, match=r"sends it compressed \(gzip\), though asked not to"):
        await open_backing(Reference(scripted.url + "/x", None, "/leaf.qed"), Policy())


# --- waiting ----------------------------------------------------------------------------------------------------------


async def test_a_server_is_left_alone_as_long_as_it_wants(scripted: ScriptedWeb) -> None:
    backing = backing_at(scripted.url + "/base.raw")
    await read(backing, 0, 1)
    scripted.script.append(status(503, Retry_After="1"))
    start = trio.current_time()
    assert await read(backing, 0, 4096) == PART
    assert 1 <= trio.current_time() - start < 3
    await backing.aclose()


@pytest.mark.parametrize("sent", [0, 1000])
async def test_a_silent_server_ends_a_read_by_time(
    scripted: ScriptedWeb, sent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(scripted.url + "/base.raw") as source:
        scripted.script.append(lambda h: h.hold(sent=sent))
        with monkeypatch.context() as impatient:
            impatient.setattr("qedfs.backing.http_client.READ_TIMEOUT", 0.2)
            with pytest.raises(BackingUnavailable, match=r"the server has sent nothing for 0\.2 seconds"):
                await read(source, 0, source.size)
        assert await read(source, 0, 4096) == PART


async def test_a_server_that_says_nothing_at_all_is_given_up_on(
    scripted: ScriptedWeb, autojump_clock: trio.testing.MockClock
) -> None:
    scripted.always = lambda h: h.hold()
    with pytest.raises(BackingUnavailable, match="no answer within 10 seconds"):
        await open_http(parse_http(scripted.url + "/x", ""), credentials=True, admit=lambda target: None)


@pytest.mark.parametrize("sent", [0, 1000])
async def test_a_read_that_is_called_off_ends_its_thread_and_its_connection(scripted: ScriptedWeb, sent: int) -> None:
    held = threading.Event()

    def hold(handler: Handler) -> None:
        held.set()
        handler.hold(sent=sent)

    async with opened(scripted.url + "/base.raw", connections=1) as source:
        scripted.script.append(hold)
        buffer = bytearray(source.size)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.read_into, 0, memoryview(buffer))
            await trio.to_thread.run_sync(held.wait)
            nursery.cancel_scope.cancel()
        before = bytes(buffer)
        assert not any(before[sent:])
        # The only place among the requests is free again at once, although the server still holds its answer back.
        with trio.fail_after(5):
            assert await read(source, 0, 4096) == PART
        assert bytes(buffer) == before
        assert scripted.connections == 2


async def test_closing_ends_a_read_that_the_server_does_not_answer(scripted: ScriptedWeb) -> None:
    held = threading.Event()

    def hold(handler: Handler) -> None:
        held.set()
        handler.hold()

    async with opened(scripted.url + "/base.raw") as source, trio.open_nursery() as nursery:
        scripted.script.append(hold)

        async def read_until_closed() -> None:
            with pytest.raises(BackingUnavailable, match="is closed"):
                await read(source, 0, 4096)

        nursery.start_soon(read_until_closed)
        await trio.to_thread.run_sync(held.wait)
        await source.aclose()


async def test_many_openings_that_nobody_answers_keep_no_thread_from_others(scripted: ScriptedWeb) -> None:
    places = int(trio.to_thread.current_default_thread_limiter().total_tokens)
    all_held = threading.Semaphore(0)

    def hold(handler: Handler) -> None:
        all_held.release()
        handler.hold()

    scripted.always = hold
    async with trio.open_nursery() as nursery:
        for number in range(places):
            nursery.start_soon(open_backing, Reference(f"{scripted.url}/{number}", "raw", "/leaf.qed"), Policy())
        with trio.fail_after(8):
            for _ in range(places):
                await trio.to_thread.run_sync(all_held.acquire, limiter=trio.CapacityLimiter(1))
            assert await trio.to_thread.run_sync(threading.get_ident) != threading.get_ident()
        nursery.cancel_scope.cancel()


# --- redirects --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_where_a_redirect_has_led_is_asked_directly_from_then_on(scripted: ScriptedWeb, code: int) -> None:
    scripted.script.append(redirect(scripted.elsewhere + "/signed?sig=secret", code))
    async with opened(scripted.url + "/base.raw") as source:
        assert source.name == scripted.url + "/base.raw"
        assert await read(source, 0, 4096) == PART
    assert [request.path for request in scripted.requests] == ["/base.raw", "/signed?sig=secret", "/signed?sig=secret"]


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 412, 500])
async def test_when_a_signed_target_has_expired_the_origin_is_asked_again(scripted: ScriptedWeb, code: int) -> None:
    scripted.script.append(redirect("/signed?sig=1"))
    async with opened(scripted.url + "/base.raw") as source:
        scripted.script.extend([status(code), redirect("/signed?sig=2")])
        assert await read(source, 0, 4096) == PART
        assert await read(source, 0, 4096) == PART
    assert [request.path for request in scripted.requests[2:]] == ["/signed?sig=1", "/base.raw", *["/signed?sig=2"] * 2]


async def test_when_the_target_has_gone_from_the_network_the_origin_is_asked_again(scripted: ScriptedWeb) -> None:
    with scripted_web(CONTENT) as cache:
        cache.script.append(lambda h: h.part(last=True))
        scripted.script.append(redirect(cache.url + "/cached"))
        source = await open_backing(Reference(scripted.url + "/base.raw", "raw", "/leaf.qed"), Policy())
    assert await read(source, 0, 4096) == PART
    await source.aclose()
    assert len(cache.requests) == 1


async def test_another_content_behind_a_new_redirect_is_refused(scripted: ScriptedWeb) -> None:
    scripted.script.append(redirect("/signed?sig=1"))
    async with opened(scripted.url + "/base.raw") as source:
        scripted.script.extend([status(403), redirect("/signed?sig=2"), lambda h: h.part(headers={"ETag": '"new"'})])
        with pytest.raises(BackingChanged, match="has been replaced"):
            await read(source, 0, 4096)


async def test_redirects_in_a_circle_end(scripted: ScriptedWeb) -> None:
    scripted.always = redirect("/x")
    with pytest.raises(BackingRefused, match="the server redirects more than 10 times"):
        await open_backing(Reference(scripted.url + "/x", None, "/leaf.qed"), Policy())
    assert len(scripted.requests) == 11
    assert scripted.connections == 1


async def test_patterns_hold_for_where_a_redirect_leads_too(scripted: ScriptedWeb) -> None:
    scripted.script.append(redirect(scripted.elsewhere + "/metadata"))
    with pytest.raises(NotAllowed, match=r"localhost:.*/metadata: no pattern of allow_backing matches"):
        await open_backing(
            Reference(scripted.url + "/x", None, "/leaf.qed"), Policy(allow_backing=(scripted.url + "/*",))
        )
    assert len(scripted.requests) == 1


# --- credentials ------------------------------------------------------------------------------------------------------


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture
def netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "netrc"
    path.touch(0o600)
    path.write_text("machine 127.0.0.1 login me password first\nmachine localhost login no password no\n")
    monkeypatch.setenv("NETRC", str(path))
    return path


def guarded(password: str) -> Act:
    def act(handler: Handler) -> None:
        if handler.headers["Authorization"] == basic("me", password):
            handler.part()
        else:
            handler.answer(401)

    return act


async def test_credentials_go_to_the_origin_only(scripted: ScriptedWeb, netrc: Path) -> None:
    scripted.script.extend([redirect("/here"), redirect(scripted.elsewhere + "/there")])
    async with opened(scripted.url + "/base.raw") as source:
        assert await read(source, 0, 4096) == PART
    told = [(request.path, request.headers["Authorization"]) for request in scripted.requests]
    mine = basic("me", "first")
    assert told == [("/base.raw", mine), ("/here", mine), ("/there", None), ("/there", None)]


async def test_credentials_are_used_for_trusted_images_only(scripted: ScriptedWeb, netrc: Path, tmp_path: Path) -> None:
    leaf = make_qed(tmp_path / "leaf.qed", 1 << 20)
    anybody = Policy(allow_backing=(scripted.url + "/*",))
    for mode, told in ((0o600, basic("me", "first")), (0o666, None)):
        leaf.chmod(mode)
        scripted.requests.clear()
        source = await open_backing(Reference(scripted.url + "/base.raw", "raw", str(leaf), leaf.stat()), anybody)
        assert await read(source, 0, 4096) == PART
        await source.aclose()
        assert [request.headers["Authorization"] for request in scripted.requests] == [told] * 2


async def test_a_password_that_is_renewed_in_the_netrc_is_used_at_once(scripted: ScriptedWeb, netrc: Path) -> None:
    scripted.always = guarded("first")
    async with opened(scripted.url + "/base.raw") as source:
        assert await read(source, 0, 4096) == PART
        scripted.always = guarded("second")
        with pytest.raises(BackingUnavailable, match=r"does not accept what the netrc says .*: renew it there"):
            await read(source, 0, 4096)
        netrc.write_text("machine 127.0.0.1 login me password second")
        assert await read(source, 0, 4096) == PART


async def test_a_token_of_the_environment_that_has_expired_is_told(
    scripted: ScriptedWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QEDFS_HTTP_AUTHORIZATION", f"{scripted.elsewhere} Bearer no\n{scripted.url} Bearer secret")
    async with opened(scripted.url + "/base.raw") as source:
        assert scripted.requests[0].headers["Authorization"] == "Bearer secret"
        scripted.always = status(401)
        with pytest.raises(BackingRefused, match="QEDFS_HTTP_AUTHORIZATION, which may have expired") as refusal:
            await read(source, 0, 4096)
        assert "secret" not in str(refusal.value)


# --- proxies ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(no_habits: None) -> Iterator[ScriptedWeb]:
    with scripted_web(CONTENT) as server:
        yield server


async def test_a_proxy_of_the_environment_is_used(proxy: ScriptedWeb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{proxy.server_port}")
    async with opened("http://store.invalid/base.raw?x=1") as source:
        assert await read(source, 0, 4096) == PART
    assert {request.path for request in proxy.requests} == {"http://store.invalid/base.raw?x=1"}
    assert proxy.requests[0].headers["Proxy-Authorization"] == basic("me", "secret")
    assert proxy.connections == 1


async def test_tls_goes_through_a_proxy_to_the_server_itself(
    web: Web, proxy: ScriptedWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.put("proxied.raw", CONTENT)
    monkeypatch.setenv("https_proxy", f"http://me:secret@127.0.0.1:{proxy.server_port}")
    proxy.script.append(status(407))
    with pytest.raises(BackingRefused, match="the proxy wants credentials") as refusal:
        await open_backing(Reference(f"{web.secure}/proxied.raw", None, "/leaf.qed"), Policy())
    assert "secret" not in str(refusal.value)
    proxy.script.append(status(503))
    with pytest.raises(BackingUnavailable, match=r"/proxied\.raw: .*the proxy"):
        await open_backing(Reference(f"{web.secure}/proxied.raw", None, "/leaf.qed"), Policy())
    async with opened(f"{web.secure}/proxied.raw") as source:
        assert await read(source, 0, 4096) == PART
        assert proxy.requests[-1].path == f"127.0.0.1:{web.https}"
        assert proxy.requests[-1].headers["Proxy-Authorization"] == basic("me", "secret")
        with trio.move_on_after(0):
            await read(source, 0, 4096)
        assert await read(source, 0, source.size) == CONTENT


async def test_no_proxy_is_used_for_what_no_proxy_names(
    scripted: ScriptedWeb, proxy: ScriptedWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    async with opened(scripted.url + "/base.raw") as source:
        assert await read(source, 0, 4096) == PART
    assert not proxy.requests


async def test_a_proxy_that_wants_credentials_is_told(proxy: ScriptedWeb, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy.always = status(407)
    monkeypatch.setenv("http_proxy", proxy.url)
    with pytest.raises(BackingRefused, match="the proxy wants credentials"):
        await open_backing(Reference("http://store.invalid/x", None, "/leaf.qed"), Policy())


async def test_a_proxy_that_cannot_be_spoken_to_is_told(scripted: ScriptedWeb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "socks5://me:secret@127.0.0.1:1")
    with pytest.raises(
        BackingRefused, match=r"http_proxy: only proxies of http:// and https:// are spoken to"
    ) as refusal:
        await open_backing(Reference(scripted.url + "/x", None, "/leaf.qed"), Policy())
    assert "secret" not in str(refusal.value)
    monkeypatch.setenv("http_proxy", "me:secret@127.0.0.1:1")
    with pytest.raises(BackingUnavailable, match=r"cannot connect to the proxy \(Connection refused\)") as away:
        await open_backing(Reference(scripted.url + "/x", None, "/leaf.qed"), Policy())
    assert "secret" not in str(away.value)
