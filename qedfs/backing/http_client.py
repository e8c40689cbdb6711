"""Requests to web servers by urllib3, in worker threads: connections, redirects, credentials, proxies, and how one is called off.

**Calling off.** A thread that waits for a server cannot be cancelled, but its connection can be shut down under it: the
wait ends at once, and what is left of the answer is thrown away with the connection. Only while it dials it has to be
left alone, and ends by the time limit of that. So the task does not wait for its thread, and the thread may write into the
task's buffer only under the lock that says whether the task is still there.

**Connections.** urllib3 keeps as many alive as there may be requests at once. The server may close a kept one just when
it is used again; such a request is made again at once, on a new one in the end.

**Redirects.** Where the last one led is asked directly from then on. When that does not give a part any more (a signed URL
has expired, a cache has gone), the origin is asked again, once. `Authorization` goes to the origin's scheme, host and port
only, wherever redirects lead.

urllib3 is silenced: its lines of log hold whole URLs, with all that is secret in them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.response import BaseHTTPResponse, HTTPResponse
from urllib3.util import Timeout, make_headers, parse_url

from qedfs.backing.http_answer import REDIRECTS
from qedfs.backing.http_credentials import NOBODY, Authorization, authorization
from qedfs.backing.http_name import HttpLocation
from qedfs.errors import BackingRefused, BackingUnavailable

CONNECT_TIMEOUT = 5.0
READ_TIMEOUT = 20.0
"""Seconds without a byte. Below `resilient.STALL`."""
MAX_REDIRECTS = 10
_MAX_DRAINED = 64 << 10
"""Bytes of an answer that nobody wants, up to which reading it costs less than a new connection."""
_CERTIFICATE_NOT_YET_VALID, _CERTIFICATE_EXPIRED = 9, 10
_ALWAYS = {"Accept-Encoding": "identity", "User-Agent": "qedfs"}

logging.getLogger("urllib3").setLevel(logging.CRITICAL + 1)


class GivenUp(Exception):
    """Nobody waits for this request any more."""


class Transfer:
    """One read: what a thread works on, and what the task that wants it may call off."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._given_up = False
        self._connection: _Connection | None = None
        self.reused = True
        """Whether the request went out on a kept connection."""

    def give_up(self) -> None:
        """Let the thread end as soon as it can; nothing is written into the buffer any more. Does not block."""
        with self._lock:
            self._given_up = True
            connection = self._connection
            if connection is None or connection.transfer is not self or connection.sock is None:
                return
            # A TLS connection's own method would make what is left of the answer look like plain text.
            inner = getattr(connection.sock, "socket", connection.sock)
            with contextlib.suppress(OSError):
                socket.socket.shutdown(inner, socket.SHUT_RDWR)

    def check(self) -> None:
        """Raise `GivenUp` if nobody waits any more."""
        if self._given_up:
            raise GivenUp

    def put(self, buffer: memoryview, data: bytes) -> None:
        """Copy `data` to the start of `buffer`, or raise `GivenUp`."""
        with self._lock:
            self.check()
            buffer[: len(data)] = data

    def uses(self, connection: _Connection) -> None:
        """Note what to shut down, or raise `GivenUp`."""
        with self._lock:
            self.check()
            self._connection = connection
            connection.transfer = self


_present: ContextVar[Transfer] = ContextVar("transfer")
"""The one that the thread works on: urllib3 makes and chooses the connections."""


class _Connection(HTTPConnection):
    transfer: Transfer | None = None

    def connect(self) -> None:
        transfer = _present.get()
        transfer.uses(self)
        transfer.reused = False
        super().connect()
        transfer.check()

    def request(self, *arguments: Any, **more: Any) -> None:
        _present.get().uses(self)
        super().request(*arguments, **more)

    def getresponse(self) -> HTTPResponse:  # type: ignore[override]  # as urllib3's own is
        used = self.sock
        try:
            return super().getresponse()
        except BaseException:
            # An answer whose headers are not taken would keep it open until the garbage collector comes by.
            number = getattr(used, "socket", used).detach()
            if number >= 0:
                os.close(number)
            raise


class _TlsConnection(_Connection, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class HttpClient:
    """Asks for parts of the file at `location`; its methods block, and any number of threads may call them.

    With `credentials` the origin is told who we are. `admit` is asked about every place to which a redirect leads, and
    raises if it is not to be gone to. At most `connections` are kept.
    """

    def __init__(
        self, location: HttpLocation, *, credentials: bool, admit: Callable[[HttpLocation], None], connections: int
    ) -> None:
        self._location = location
        self._admit = admit
        self._credentials = credentials
        self._authorization = NOBODY
        if credentials:
            self._authorization = authorization(location, os.environ)
        self._connections = connections
        self._target = location
        """Where redirects have led."""
        self._lock = threading.Lock()
        self._managers: dict[tuple[str, str, int], urllib3.PoolManager] = {}
        """By origin: whether there is a proxy for one is a long question to the environment."""
        self._closed = False

    @contextlib.contextmanager
    def asked(self, transfer: Transfer, headers: Mapping[str, str]) -> Iterator[BaseHTTPResponse]:
        """Yield the answer to a GET with `headers`, redirects followed. Afterwards its connection is kept or closed.

        Raises:
            BackingUnavailable, BackingRefused: there is none.
            GivenUp: nobody waits for it any more.
        """
        _present.set(transfer)
        response = self._follow(transfer, headers)
        try:
            with self._explained(self._location):
                yield response
        finally:
            _finish(response)

    def close(self) -> None:
        """Close the connections that are not in use; those in use end with their requests."""
        with self._lock:
            self._closed = True
            managers = list(self._managers.values())
        for manager in managers:
            manager.clear()

    def _follow(self, transfer: Transfer, headers: Mapping[str, str]) -> BaseHTTPResponse:
        start = self._target
        if start != self._location:
            try:
                response = self._walk(transfer, start, headers)
            except (BackingUnavailable, BackingRefused):
                response = None
            if response is not None and response.status == 206:
                return response
            if response is not None:
                _finish(response)
            with self._lock:
                if self._target == start:
                    self._target = self._location
                start = self._target  # another thread may have found the new way meanwhile
        return self._walk(transfer, start, headers)

    def _walk(self, transfer: Transfer, at: HttpLocation, headers: Mapping[str, str]) -> BaseHTTPResponse:
        """Go from `at` to where no redirect leads on, and remember that place if it gives parts."""
        for _ in range(MAX_REDIRECTS + 1):
            response = self._ask_as_who_we_are(transfer, at, headers)
            if response.status not in REDIRECTS or "Location" not in response.headers:
                if response.status == 206:
                    self._target = at
                return response
            _finish(response)
            at = at.redirected(response.headers["Location"])
            self._admit(at)
        raise BackingRefused(str(self._location), f"the server redirects more than {MAX_REDIRECTS} times")

    def _ask_as_who_we_are(self, transfer: Transfer, at: HttpLocation, headers: Mapping[str, str]) -> BaseHTTPResponse:
        if at.origin != self._location.origin:
            return self._ask(transfer, at, headers)
        used = self._authorization
        response = self._ask(transfer, at, headers, used)
        if response.status != 401 or not self._credentials:
            return response
        _finish(response)
        self._authorization = now = authorization(self._location, os.environ)
        if now != used:
            response = self._ask(transfer, at, headers, now)
            if response.status != 401:
                return response
            _finish(response)
        if now.renewable:
            raise BackingUnavailable(
                str(at), "the server does not accept what the netrc says (status 401): renew it there"
            )
        how = "QEDFS_HTTP_AUTHORIZATION, which may have expired" if now.value else "nobody's: it wants credentials"
        raise BackingRefused(str(at), f"the server does not accept {how} (status 401)")

    def _ask(
        self, transfer: Transfer, at: HttpLocation, headers: Mapping[str, str], who: Authorization = NOBODY
    ) -> BaseHTTPResponse:
        """Return the answer to one GET, its body still to be read."""
        sent = {**_ALWAYS, **headers, **({"Authorization": who.value} if who.value else {})}
        with self._explained(at):
            manager = self._manager(at)
            while True:
                transfer.reused = True
                try:
                    return manager.urlopen(
                        "GET",
                        at.url,
                        headers=sent,
                        redirect=False,
                        retries=False,
                        preload_content=False,
                        decode_content=False,
                    )
                except urllib3.exceptions.ProtocolError:
                    transfer.check()
                    if not transfer.reused:
                        raise

    def _manager(self, at: HttpLocation) -> urllib3.PoolManager:
        with self._lock:
            if self._closed:
                raise BackingUnavailable(str(self._location), "is closed")
            manager = self._managers.get(at.origin)
            if manager is None:
                manager = self._managers[at.origin] = _new_manager(at.scheme, _proxy_for(at), self._connections)
            return manager

    @contextlib.contextmanager
    def _explained(self, at: HttpLocation) -> Iterator[None]:
        try:
            yield
        except (urllib3.exceptions.HTTPError, OSError) as error:
            _present.get().check()
            raise _translated(str(at), error) from error


def _finish(response: BaseHTTPResponse) -> None:
    """Let the connection be used again if next to nothing is left to be read, else close it."""
    length = response.headers.get("Content-Length", "")
    try:
        if not response.closed and length.isdigit() and int(length) <= _MAX_DRAINED and response.status != 206:
            response.read(_MAX_DRAINED)
    except (urllib3.exceptions.HTTPError, OSError):
        pass  # nobody wanted it
    response.close()
    response.release_conn()


def _new_manager(scheme: str, proxy: str, connections: int) -> urllib3.PoolManager:
    timeout = Timeout(connect=CONNECT_TIMEOUT, read=READ_TIMEOUT)
    options: dict[str, Any] = {"maxsize": connections, "block": False, "timeout": timeout}
    if scheme == "https":
        options["ssl_context"] = _tls_context()
    manager: urllib3.PoolManager
    if proxy:
        where = parse_url(proxy)
        who = make_headers(proxy_basic_auth=where.auth) if where.auth else None
        context = _tls_context() if where.scheme == "https" else None
        manager = urllib3.ProxyManager(proxy, proxy_headers=who, proxy_ssl_context=context, **options)
    else:
        manager = urllib3.PoolManager(**options)
    manager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
    return manager


def _tls_context() -> ssl.SSLContext:
    """Return what a server is verified by: the authorities of this machine and those in SSL_CERT_FILE."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if path := os.environ.get("SSL_CERT_FILE"):
        usual = ssl.get_default_verify_paths()
        try:
            context.load_verify_locations(path)
        except OSError as error:
            raise BackingRefused("SSL_CERT_FILE", f"{path} cannot be used ({error.strerror or error})") from error
        # OpenSSL takes the variable for "instead of", object stores and we for "in addition to".
        if os.path.exists(usual.openssl_cafile):
            context.load_verify_locations(usual.openssl_cafile)
    return context


def _proxy_for(at: HttpLocation) -> str:
    """Return the URL of the proxy that the environment tells for `at` (`https_proxy`, `no_proxy`, …); empty for none."""
    proxies = getproxies()
    if proxy_bypass(f"{at.host}:{at.port}"):
        return ""
    proxy = proxies.get(at.scheme) or proxies.get("all", "")
    if proxy and "://" not in proxy:
        proxy = f"http://{proxy}"
    if proxy and not proxy.lower().startswith(("http://", "https://")):
        raise BackingRefused(f"{at.scheme}_proxy", "only proxies of http:// and https:// are spoken to")
    return proxy


def _translated(name: str, error: Exception) -> BackingUnavailable | BackingRefused:
    """Return what an error of urllib3 means. Its own text may hold a URL with all that is secret in it."""
    whose = "the proxy" if isinstance(error, urllib3.exceptions.ProxyError) else "the server"
    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            passes = cause.verify_code in (_CERTIFICATE_EXPIRED, _CERTIFICATE_NOT_YET_VALID)
            kind = BackingUnavailable if passes else BackingRefused
            return kind(
                name,
                f"{whose} shows a certificate that is not accepted: {cause.verify_message} (SSL_CERT_FILE adds an authority)",
            )
        if "Tunnel connection failed: 407" in str(cause):
            return BackingRefused(name, "the proxy wants credentials (https_proxy=http://USER:PASSWORD@HOST:PORT)")
    if isinstance(error, urllib3.exceptions.LocationValueError):
        return BackingRefused(name, "is no URL that can be asked for")
    told = next((c.strerror for c in causes if isinstance(c, OSError) and c.strerror), "")
    if any(isinstance(cause, urllib3.exceptions.NewConnectionError) for cause in causes):
        return BackingUnavailable(name, f"cannot connect to {whose} ({told or 'no reason given'})")
    if any(isinstance(cause, urllib3.exceptions.ConnectTimeoutError) for cause in causes):
        return BackingUnavailable(name, f"{whose} does not take a connection within {CONNECT_TIMEOUT:g} seconds")
    if any(isinstance(cause, urllib3.exceptions.TimeoutError | TimeoutError) for cause in causes):
        return BackingUnavailable(name, f"{whose} has sent nothing for {READ_TIMEOUT:g} seconds")
    if any(isinstance(cause, urllib3.exceptions.IncompleteRead) for cause in causes):
        return BackingUnavailable(name, f"{whose} sent less than it promised")
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        return BackingUnavailable(name, f"{whose} does not come to terms by TLS ({told or 'no reason given'})")
    return BackingUnavailable(name, f"the connection to {whose} was lost ({told or 'in the middle of an answer'})")


def _causes(error: BaseException) -> list[BaseException]:
    """Return `error` and all errors in it, as urllib3 puts one into another."""
    found: list[BaseException] = []
    waiting: list[object] = [error]
    while waiting:
        one = waiting.pop(0)
        if isinstance(one, BaseException) and not any(one is other for other in found):
            found.append(one)
            waiting += [*one.args, one.__cause__, getattr(one, "original_error", None)]
            if one.__cause__ is None and not one.__suppress_context__:
                waiting.append(one.__context__)
    return found
