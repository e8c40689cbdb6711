"""Which backings an image may name, and with whose rights they are opened."""

from __future__ import annotations

import pytest

from qedfs.backing.policy import Owner, Place, Policy, Rights
from qedfs.errors import NotAllowed

ROOT, MOUNTER, STRANGER = 0, 1000, 2000
FILE, SOCKET, REMOTE = Place.FILE, Place.SOCKET, Place.REMOTE


def rights(policy: Policy, owner: Owner | None, place: Place, *, remote: bool = False) -> Rights | None:
    """Return the rights, None when it is refused."""
    try:
        return policy.rights(owner, remote=remote, place=place, name="backing")
    except NotAllowed:
        return None


@pytest.mark.parametrize("place", list(Place))
@pytest.mark.parametrize("mounter", [ROOT, MOUNTER])
def test_a_trusted_image_and_a_person_may_name_anything(place: Place, mounter: int) -> None:
    policy = Policy(mounter)
    for owner in (Owner(ROOT, 0o644), Owner(mounter, 0o100600), None):
        assert rights(policy, owner, place) is Rights.OURS


@pytest.mark.parametrize(
    ("mounter", "owner", "file", "other"),
    [
        (ROOT, Owner(STRANGER, 0o644), Rights.OWNER, None),
        (MOUNTER, Owner(STRANGER, 0o644), None, None),
        (ROOT, Owner(ROOT, 0o664), None, None),
        (ROOT, Owner(ROOT, 0o646), None, None),
        (ROOT, Owner(STRANGER, 0o664), None, None),
        (MOUNTER, Owner(MOUNTER, 0o664), None, None),
        (MOUNTER, Owner(MOUNTER, 0o602), None, None),
    ],
)
def test_an_untrusted_image_names_what_its_owner_could_open(
    mounter: int, owner: Owner, file: Rights | None, other: Rights | None
) -> None:
    assert rights(Policy(mounter), owner, FILE) is file
    assert rights(Policy(mounter), owner, SOCKET) is other
    assert rights(Policy(mounter), owner, REMOTE) is other


def test_allow_backing_lets_an_untrusted_image_name_what_it_names() -> None:
    policy = Policy(MOUNTER, allow_backing=("nbd://host/*",))
    for place in Place:
        assert rights(policy, Owner(STRANGER, 0o644), place) is Rights.NAMED


def test_allow_backing_does_not_lend_a_stranger_the_rights_of_root() -> None:
    policy = Policy(ROOT, allow_backing=("*",))
    assert rights(policy, Owner(STRANGER, 0o644), FILE) is Rights.OWNER


@pytest.mark.parametrize("patterns", [(), ("*",)])
def test_a_remote_image_names_nothing_local(patterns: tuple[str, ...]) -> None:
    policy = Policy(ROOT, allow_backing=patterns)
    assert rights(policy, None, FILE, remote=True) is None
    assert rights(policy, None, SOCKET, remote=True) is None
    assert rights(policy, None, REMOTE, remote=True) is (Rights.NAMED if patterns else None)


def test_patterns_match_the_whole_name() -> None:
    policy = Policy(allow_backing=("/srv/*.raw", "nbd://host/[ab]"))
    for name in ("/srv/x.raw", "/srv/deep/x.raw", "nbd://host/a"):
        policy.check_name(name)
    for name in ("/srv/x.qed", "/mnt/srv/x.raw", "nbd://host/a/b", "NBD://host/a", ""):
        with pytest.raises(NotAllowed, match="no pattern of allow_backing matches it"):
            policy.check_name(name)


def test_without_patterns_no_name_is_refused() -> None:
    Policy().check_name("anything")


def test_nothing_below_the_mountpoint_is_a_backing() -> None:
    policy = Policy(forbidden_roots=("/mnt/disks",))
    for path in ("/mnt/disks", "/mnt/disks/vm.raw"):
        with pytest.raises(NotAllowed, match="lies under the mountpoint /mnt/disks"):
            policy.check_path(path)
    policy.check_path("/mnt/disks2/vm.raw")
    with pytest.raises(NotAllowed):
        Policy(forbidden_roots=("/",)).check_path("/anything")
