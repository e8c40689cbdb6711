"""A server that speaks as much of S3 as reading needs, and misbehaves as it is told."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ETAG = '"first"'


class ScriptedStore(ThreadingHTTPServer):
    """Serves `content` under every key. What is in `script` is done instead for the next GETs, one each."""

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = content
        self.etag = ETAG
        self.script: deque[Callable[[_Handler], None]] = deque()
        self.headers: list[Message] = []
        """Of each request so far."""

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_SESSION_TOKEN": "token",
        }

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that leaves in the middle is part of some tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedStore

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.server.headers.append(self.headers)
        self.answer(200, b"", {"Content-Length": str(len(self.server.content))})

    def do_GET(self) -> None:
        self.server.headers.append(self.headers)
        if self.server.script:
            self.server.script.popleft()(self)
        else:
            self.part()

    def part(self, *, shift: int = 0, cut: int = 0, etag: str | None = None) -> None:
        """Answer with the range asked for: `shift` bytes later, the last `cut` bytes promised and not sent."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert wanted
        start, end = int(wanted[1]) + shift, int(wanted[2]) + 1 + shift
        body = self.server.content[start:end]
        more = {
            "Content-Range": f"bytes {start}-{end - 1}/{len(self.server.content)}",
            "Content-Length": str(len(body)),
        }
        self.answer(206, body[: len(body) - cut], more, etag=etag)
        if cut:
            self.close_connection = True

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, *, etag: str | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        self.send_header("ETag", etag or self.server.etag)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def failing(status: int, code: str = "") -> Callable[[_Handler], None]:
    """Return a way to answer with an error of S3."""
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>said the store</Message></Error>" if code else ""
    return lambda handler: handler.answer(status, text.encode())


@contextmanager
def scripted_store(content: bytes) -> Iterator[ScriptedStore]:
    with ScriptedStore(content) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
