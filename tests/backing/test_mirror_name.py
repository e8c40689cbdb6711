"""The names of mirrors, and the tag that pins each of them by itself."""

from __future__ import annotations

import pytest

from qedfs.backing.location import FileLocation, host_of, masked, parse_location
from qedfs.backing.mirror_name import MOST, MirrorsLocation, agree, joined, mark, marks_of, tag_of
from qedfs.errors import BackingRefused
from qedfs.image.record import MAX_TAG

LEAF = FileLocation("/images/vm.qed")


def test_the_canonical_name_has_the_canonical_names_of_all_in_their_order() -> None:
    location = parse_location("mirrors:nbd:b:10809:exportname=x|HTTPS://A/x?sig=1|s3://bucket/x", LEAF)
    assert isinstance(location, MirrorsLocation)
    assert str(location) == "mirrors:nbd://b/x|https://a/x?***|s3://bucket/x"
    assert host_of(location) == "b"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mirrors:", "needs 2 to 8 addresses"),
        ("mirrors:nbd://a/x", "needs 2 to 8 addresses"),
        ("mirrors:" + "|".join(f"nbd://{n}/x" for n in range(MOST + 1)), "needs 2 to 8 addresses"),
        ("mirrors:nbd://a/x|", "must be an address of a server"),
        ("mirrors:nbd://a/x|base.raw", "must be an address of a server"),
        ("mirrors:nbd://a/x|/images/base.raw", "must be an address of a server"),
        ("mirrors:nbd://a/x|mirrors:nbd://b/x", "must be an address of a server"),
        ("mirrors:nbd://a/x|json:{}", "must be an address of a server"),
        ("mirrors:nbd://a/x|nbd://b:0/x", "port"),
        ("mirrors:nbd://a/x|nbd:a:10809:exportname=x", "names one mirror twice"),
    ],
)
def test_what_cannot_be_mirrors_is_refused(name: str, why: str) -> None:
    with pytest.raises(BackingRefused, match=why):
        parse_location(name, LEAF)


def test_two_queries_make_two_mirrors() -> None:
    name = "mirrors:https://cdn/get?id=1|https://cdn/get?id=2"
    assert str(parse_location(name, LEAF)) == "mirrors:https://cdn/get?***|https://cdn/get?***"
    with pytest.raises(BackingRefused, match="names one mirror twice"):
        parse_location("mirrors:https://cdn/get?id=1|https://cdn/get?id=1", LEAF)


@pytest.mark.parametrize(
    "name",
    [
        "mirrors:https://a/x?sig=secret|nbd://me:secret@b/x",
        "mirrors:https://a/x?sig=1|secret|nbd://b/x",  # a separator in a query
        "mirrors:https://a/x?sig=1|secret:1|nbd://b/x",
    ],
)
def test_no_secret_of_any_is_shown(name: str) -> None:
    assert "secret" not in masked(name)
    assert "a/x?***|" in masked(name)
    with pytest.raises(BackingRefused) as caught:
        parse_location(name, LEAF)
    assert "secret" not in str(caught.value)


def test_the_tag_of_the_most_mirrors_fits_into_a_pin() -> None:
    tag = tag_of([mark(f"etag:{number}") for number in range(MOST)])
    assert len(tag) <= MAX_TAG
    assert len(set(marks_of(tag, MOST))) == MOST


def test_of_mirrors_of_which_nothing_is_known_there_is_no_tag() -> None:
    assert tag_of([mark(""), mark("")]) == ""
    assert marks_of("", 2) == marks_of("etag:1", 2) == marks_of("mirrors:1,2,3", 2) == ["-", "-"]


def test_tags_agree_unless_one_mirror_is_known_to_both_as_something_else() -> None:
    assert agree("mirrors:1,-", "mirrors:1,2")
    assert agree("mirrors:1,-", "mirrors:-,2")
    assert not agree("mirrors:1,2", "mirrors:1,3")
    assert not agree("mirrors:1,2", "mirrors:1,2,3")
    assert not agree("etag:1", "mirrors:1,2")
    assert joined("mirrors:1,-", "mirrors:-,2") == "mirrors:1,2"
