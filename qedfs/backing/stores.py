"""How an object store is reached: what of the environment counts, and what an image without trust gets. Sans-IO.

obstore reads each cloud's usual variables by itself (`AWS_…`, `GOOGLE_…`, `AZURE_…`: endpoint, region, account,
credentials, tokens, the files they name). Settled here is what must not be left to it: whether requests are signed,
whether a plain http endpoint is meant, and which authority is trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qedfs.backing.object_name import ObjectLocation
from qedfs.errors import BackingRefused

CONNECT_TIMEOUT = "5s"
READ_TIMEOUT = "20s"
"""Without a byte: a worker thread that nobody waits for any more ends after that. Below `resilient.STALL`."""
REQUEST_TIMEOUT = "300s"
"""For a whole request, so for a megabyte on a link of 30 kbit/s."""

_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_ALLOW_HTTP = {"s3": "AWS_ALLOW_HTTP", "gs": "GOOGLE_ALLOW_HTTP", "az": "AZURE_ALLOW_HTTP"}
_EMULATOR = "STORAGE_EMULATOR_HOST"
_AZURE_ACCOUNT = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_USE_EMULATOR")


@dataclass(frozen=True)
class Settings:
    """For the class of obstore that belongs to the scheme. `store` and `client` are its options by name.

    `authority` is a file with certificates to be trusted in addition to the system's; None for no more.
    """

    store: dict[str, str | bool] = field(default_factory=dict)
    client: dict[str, str | bool] = field(default_factory=dict)
    authority: str | None = None


def settings_for(location: ObjectLocation, environment: Mapping[str, str], *, signed: bool) -> Settings:
    """Return how the store of `location` is to be opened. Without `signed` no credential of ours is used.

    Raises:
        BackingRefused: the environment does not say enough, or names a plain http endpoint without allowing it.
    """
    scheme = location.scheme
    store: dict[str, str | bool] = {}
    if not signed:
        store["skip_signature"] = True
        if scheme == "s3" and "AWS_SSE_CUSTOMER_KEY_BASE64" in environment:
            raise BackingRefused(str(location), "AWS_SSE_CUSTOMER_KEY_BASE64 is not for images that are not trusted")
    if scheme == "az" and not any(name in environment for name in _AZURE_ACCOUNT):
        raise BackingRefused(str(location), f"the environment names no account ({_AZURE_ACCOUNT[0]})")
    endpoint = next((environment[name] for name in _ENDPOINTS[scheme] if environment.get(name)), "")
    allow_http = environment.get(_ALLOW_HTTP[scheme], "").lower() in ("1", "true", "yes", "on")
    if scheme == "gs" and environment.get(_EMULATOR):
        # As Google's own libraries do: an emulator knows nobody.
        endpoint = environment[_EMULATOR]
        endpoint = endpoint if "://" in endpoint else f"http://{endpoint}"
        store |= {"base_url": endpoint, "skip_signature": True}
        allow_http = True
    if scheme == "az" and environment.get("AZURE_STORAGE_USE_EMULATOR"):
        allow_http = True
    if endpoint.lower().startswith("http://") and not allow_http:
        raise BackingRefused(str(location), f"its endpoint is plain http; {_ALLOW_HTTP[scheme]}=true allows that")
    client: dict[str, str | bool] = {
        "allow_http": allow_http,
        "connect_timeout": CONNECT_TIMEOUT,
        "read_timeout": READ_TIMEOUT,
        "timeout": REQUEST_TIMEOUT,
    }
    authority = environment.get("AWS_CA_BUNDLE") if scheme == "s3" else None
    return Settings(store, client, authority or environment.get("SSL_CERT_FILE") or None)
