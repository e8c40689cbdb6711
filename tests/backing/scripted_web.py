"""A web server that does what it is told: the faults of all servers, proxies and networks that a reader may meet."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

MODIFIED = "Wed, 01 Jan 2025 00:00:00 GMT"


class Request(NamedTuple):
    """What a client has asked for."""

    path: str
    headers: Message


class ScriptedWeb(ThreadingHTTPServer):
    """Serves `content` under every path. What is in `script` is done instead for the next GETs, one each, `always` for all.

    Like a careful server it answers a condition that does not hold with 412.
    """

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.headers = {"ETag": '"first"', "Last-Modified": MODIFIED}
        self.script: deque[Act] = deque()
        self.always: Act = Handler.part
        self.requests: list[Request] = []
        self.connections = 0
        self.released = threading.Event()
        """Ends what holds an answer back."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def elsewhere(self) -> str:
        """The same server by another name: another origin."""
        return f"http://localhost:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that leaves in the middle is part of some tests."""


class Handler(BaseHTTPRequestHandler):
    """What can be done with a request: its methods."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ScriptedWeb

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.obey(self.server.always)

    def do_CONNECT(self) -> None:
        self.obey(Handler.tunnel)

    def obey(self, otherwise: Act) -> None:
        self.server.requests.append(Request(self.path, self.headers))
        act = self.server.script.popleft() if self.server.script else otherwise
        act(self)

    def tunnel(self) -> None:
        """Be a proxy that connects the client with the server it names."""
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port))) as far:
            self.answer(200, headers=dict.fromkeys(["Content-Length", *self.server.headers], ""))
            for source, to in ((self.connection, far), (far, self.connection)):
                threading.Thread(target=relay, args=(source, to), daemon=True).start()
            self.server.released.wait(60)
        self.close_connection = True

    def part(
        self,
        *,
        shift: int = 0,
        promised: int = 0,
        more: bytes = b"",
        most: int = 1 << 60,
        headers: dict[str, str] | None = None,
        last: bool = False,
    ) -> None:
        """Answer with the range asked for: `shift` bytes later, at most `most` bytes, and `more` behind.

        The last `promised` bytes are not sent. `headers` replace the usual ones; an empty one is left out.
        `last` ends the connection.
        """
        server = self.server
        wanted = self.headers["If-Match"]
        if wanted not in (None, server.headers.get("ETag")):
            self.answer(412)
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert match
        start = int(match[1]) + shift
        body = server.content[start : min(int(match[2]) + 1 + shift, start + most)]
        said = f"bytes {start}-{start + len(body) - 1}/{len(server.content)}"
        body += more
        self.answer(
            206,
            body[: len(body) - promised],
            {"Content-Range": said, "Content-Length": str(len(body)), **(headers or {})},
        )
        if promised or last:
            self.close_connection = True

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), **self.server.headers, **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def chunked(self) -> None:
        """Send the range without telling its length before."""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert match
        body = self.server.content[int(match[1]) : int(match[2]) + 1]
        said = f"bytes {match[1]}-{match[2]}/{len(self.server.content)}"
        self.answer(206, headers={"Content-Range": said, "Content-Length": "", "Transfer-Encoding": "chunked"})
        for start in range(0, len(body), 1000):
            chunk = body[start : start + 1000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        self.wfile.write(b"0\r\n\r\n")

    def say(self, words: bytes) -> None:
        """Answer with these bytes and nothing else."""
        self.wfile.write(words)
        self.close_connection = True

    def hold(self, sent: int = 0) -> None:
        """Send the first `sent` bytes of the body (0: not even a header), and no more until `released`."""
        if sent:
            length = len(self.server.content)
            said = f"bytes 0-{length - 1}/{length}"
            self.answer(206, self.server.content[:sent], {"Content-Range": said, "Content-Length": str(length)})
        self.server.released.wait(60)
        self.close_connection = True

    def reset(self, sent: int = 0) -> None:
        """Break the connection off, after `sent` bytes of the body; 0: before the answer."""
        if sent:
            self.part(promised=len(self.server.content) - sent)
        # With a linger of no time the end of the connection is a reset.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


def relay(source: socket.socket, to: socket.socket) -> None:
    """Carry what `source` says to the other side until it ends."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            to.sendall(data)
        to.shutdown(socket.SHUT_WR)


Act = Callable[[Handler], None]


def status(code: int, **headers: str) -> Act:
    """Return a way to answer with an error; `Retry_After="1"` is a header."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.answer(code, b"said the server", named)


def redirect(target: str, code: int = 302) -> Act:
    return status(code, Location=target)


@contextmanager
def scripted_web(content: bytes) -> Iterator[ScriptedWeb]:
    with ScriptedWeb(content) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
