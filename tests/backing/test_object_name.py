"""What names of objects mean."""

from __future__ import annotations

import pytest

from qedfs.backing.location import FileLocation, Location, masked, parse_location
from qedfs.backing.object_name import ObjectLocation
from qedfs.errors import BackingRefused

LEAF = FileLocation("/images/vm.qed")
REMOTE = ObjectLocation("s3", "bucket", "images/vm/top.qed")


@pytest.mark.parametrize(
    ("name", "location"),
    [
        ("s3://bucket/key", ObjectLocation("s3", "bucket", "key")),
        ("S3://bucket/a/b c%20d+é", ObjectLocation("s3", "bucket", "a/b c%20d+é")),
        ("gs://my.bucket_1/a:b@c", ObjectLocation("gs", "my.bucket_1", "a:b@c")),
        ("az://$web/base.raw", ObjectLocation("az", "$web", "base.raw")),
    ],
)
def test_a_key_is_taken_as_it_stands(name: str, location: ObjectLocation) -> None:
    assert parse_location(name, LEAF) == location
    assert parse_location(str(location), None) == location


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("s3://", "has no bucket"),
        ("az:///key", "has no container"),
        ("s3://bucket", "names no object"),
        ("s3://bucket/", "names no object"),
        ("s3://bucket/folder/", "names no object"),
        ("s3://bucket//key", "empty part"),
        ("s3://bucket/a/../key", "empty part, . or .."),
        ("s3://bucket/./key", "empty part, . or .."),
        ("s3://bucket/key?versionId=x", "parameters have no meaning"),
        ("s3://bucket/key#x", "parameters have no meaning"),
        ("s3://bucket:80/key", "has no bucket"),
        ("s3:bucket/key", "the protocol 's3' is unknown"),
    ],
)
def test_names_that_mean_no_object_are_refused(name: str, why: str) -> None:
    with pytest.raises(BackingRefused, match=why):
        parse_location(name, LEAF)


def test_credentials_in_a_name_are_refused_and_not_shown() -> None:
    with pytest.raises(BackingRefused, match="credentials go elsewhere") as caught:
        parse_location("s3://key:secret@bucket/base.raw", LEAF)
    assert "secret" not in str(caught.value)
    assert masked("s3://bucket/key?X-Amz-Signature=secret") == "s3://bucket/key?***"


@pytest.mark.parametrize(
    ("name", "key"),
    [("base.raw", "images/vm/base.raw"), ("../base.raw", "images/base.raw"), ("./sub/b.raw", "images/vm/sub/b.raw")],
)
def test_a_relative_name_in_an_object_means_one_beside_it(name: str, key: str) -> None:
    assert parse_location(name, REMOTE) == ObjectLocation("s3", "bucket", key)


@pytest.mark.parametrize("name", ["../../../base.raw", "../../../../etc/passwd", "..", "../../..", "sub/", "a?b"])
def test_a_relative_name_does_not_leave_the_bucket(name: str) -> None:
    with pytest.raises(BackingRefused):
        parse_location(name, REMOTE)


def test_a_relative_file_means_nothing_in_an_object() -> None:
    with pytest.raises(BackingRefused, match="a relative name has no meaning in an image read from s3://bucket/"):
        parse_location("file:base.raw", REMOTE)
    local: Location = parse_location("/etc/passwd", REMOTE)
    assert isinstance(local, FileLocation)  # which policy refuses
