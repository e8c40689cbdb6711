"""What an error of an object store means for a reader: will it pass, and what is to be done. Sans-IO.

obstore tells the kind of a failure by the class of its exception and everything else in a long text: first lines for
people, then a dump of its own structures. The text holds the URL asked for, and in that may be a token, so only the
status and the store's own code and message are taken from it.
"""

from __future__ import annotations

import re

from qedfs.errors import BackingChanged, BackingError, BackingRefused, BackingUnavailable

_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_CODE = re.compile(r"<Code>([^<]{1,80})</Code>")
_MESSAGE = re.compile(r"<Message>([^<\n]{1,200})")
_PASSING = frozenset({408, 425, 429})
_EXPIRED = ("ExpiredToken", "TokenRefreshRequired", "RequestExpired", "invalid_grant")
_SKIP_SIGNATURE = {"s3": "AWS_SKIP_SIGNATURE", "gs": "GOOGLE_SKIP_SIGNATURE", "az": "AZURE_SKIP_SIGNATURE"}
_SIGNING = "http://169.254.169.254/"
"""Where a machine in a cloud is told its own credentials: asked when the environment has none."""


def translated(name: str, error: Exception, *, reading: bool) -> BackingError:
    """Return the error to raise for `error` of obstore about the object `name`, which begins with its scheme.

    `reading`: a part inside the known size was asked for, with the ETag that it must have.
    """
    kind = type(error).__name__
    text = str(error).partition("Debug source:")[0]
    found = _STATUS.search(text)
    status = int(found[1]) if found else 0
    said = _said(text, status)
    if kind == "PreconditionError" or (reading and status == 416):
        return BackingChanged(name, "has been replaced since it was opened")
    if any(code in text for code in _EXPIRED):
        return BackingRefused(name, f"the credentials have expired: renew them and mount again ({said})")
    if "RequestTimeTooSkewed" in text:
        return BackingRefused(name, f"the clock of this machine is wrong ({said})")
    if _SIGNING in text or "instance credentials" in text:
        return BackingUnavailable(
            name,
            f"the environment has no credentials and the cloud tells this machine none (an object that anybody may read "
            f"needs {_SKIP_SIGNATURE[name[:2]]}=true)",
        )
    if isinstance(error, FileNotFoundError):
        return BackingRefused(name, "has gone" if reading else f"there is no such object ({said})")
    if kind in ("PermissionDeniedError", "UnauthenticatedError"):
        return BackingRefused(name, f"the store refuses it to these credentials ({said})")
    if "redirect without LOCATION" in text:
        return BackingRefused(name, "lies in another region (AWS_REGION)")
    # Of a certificate that does not convince only the dump tells.
    if "InvalidCertificate" in str(error):
        return BackingRefused(
            name, "the store's certificate does not convince; AWS_CA_BUNDLE or SSL_CERT_FILE adds one"
        )
    if status and status < 500 and status not in _PASSING:
        return BackingRefused(name, f"the store refuses the request ({said})")
    if kind in ("NotSupportedError", "InvalidPathError", "UnknownConfigurationKeyError") or "non-partial" in text:
        return BackingRefused(name, f"cannot be read in parts ({said})")
    return BackingUnavailable(name, f"the store does not answer as it should ({said})")


def _said(text: str, status: int) -> str:
    """Return what the store said, without the URL."""
    parts = [f"status {status}"] if status else []
    for pattern in (_CODE, _MESSAGE):
        if match := pattern.search(text):
            parts.append(match[1].strip())
    if parts:
        return ": ".join(parts)
    # "… Error performing GET URL in 3ms - HTTP error: error sending request"
    last = re.sub(r"\S+://\S+", "…", text.strip().rpartition(" - ")[2])
    return last[:200].strip() or "no reason given"
