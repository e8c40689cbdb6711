"""Names of objects in stores: `s3://BUCKET/KEY`, `gs://BUCKET/KEY`, `az://CONTAINER/KEY`. Sans-IO.

A key is taken as it stands, as the stores' own tools take it: nothing in it is percent-decoded. Which server, region and
account are meant is not in the name but in the environment (`stores.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qedfs.errors import BackingRefused

SCHEMES = ("s3", "gs", "az")
_NAME = re.compile(r"(s3|gs|az)://([^/]*)/?(.*)", re.IGNORECASE | re.DOTALL)
# The stores' rules for buckets differ; what none of them allows could lead to another host or a part of a URL.
_BUCKET = re.compile(r"[A-Za-z0-9$][A-Za-z0-9._-]{0,254}")


@dataclass(frozen=True)
class ObjectLocation:
    """An object: `scheme` is one of `SCHEMES`, `key` has no leading slash and no empty, `.` or `..` part."""

    scheme: str
    bucket: str
    key: str
    format: str | None = None

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}"

    def beside(self, path: str, shown: str) -> ObjectLocation:
        """Return the object that the image here means by the relative `path`; `shown` is for messages.

        Raises:
            BackingRefused: the path leads out of the bucket, or is no key.
        """
        parts, wanted = self.key.split("/")[:-1], path.split("/")
        if wanted[-1] in (".", ".."):
            raise BackingRefused(shown, "names no object")
        for part in wanted:
            if part == "..":
                if not parts:
                    raise BackingRefused(shown, f"leads out of {self.scheme}://{self.bucket}/")
                parts.pop()
            elif part != ".":
                parts.append(part)
        return ObjectLocation(self.scheme, self.bucket, _checked("/".join(parts), shown))


def is_object(name: str) -> bool:
    return _NAME.match(name) is not None


def parse_object(name: str, shown: str) -> ObjectLocation:
    """Return the object that `name`, for which `is_object` holds, means; `shown` is the name for messages.

    Raises:
        BackingRefused: it means none.
    """
    match = _NAME.fullmatch(name)
    assert match, "the caller has asked is_object"
    scheme, bucket, key = match.groups()
    if not _BUCKET.fullmatch(bucket):
        place = "container" if scheme.lower() == "az" else "bucket"
        raise BackingRefused(
            shown, f"has no {place} where one belongs ({scheme}://{place.upper()}/KEY); credentials go elsewhere"
        )
    return ObjectLocation(scheme.lower(), bucket, _checked(key, shown))


def _checked(key: str, shown: str) -> str:
    if not key or key.endswith("/"):
        raise BackingRefused(shown, "names no object")
    if "?" in key or "#" in key:
        raise BackingRefused(shown, "parameters have no meaning here; a key with ? or # in it cannot be named")
    if any(part in ("", ".", "..") for part in key.split("/")):
        raise BackingRefused(shown, "a key with an empty part, . or .. in it cannot be named")
    return key
