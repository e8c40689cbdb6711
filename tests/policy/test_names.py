"""`allow_backing` on the names that are really opened, and secrets in names, which nobody is shown."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import pytest
import trio

from qedfs.backing.location import masked, parse_location
from qedfs.backing.policy import Policy
from qedfs.cli.main import main
from qedfs.config import MountOptions
from qedfs.errors import BackingRefused, NotAllowed
from qedfs.session.admission import Terms, admitted
from tests.cli.test_mount import QEDFS, run
from tests.policy.people import MALLORY, ROOT, SECRET, folder, image, link, open_backing_of, secret, served, start_of

PASSWORD = "hunter2"

# --- allow_backing ----------------------------------------------------------------------------------------------------


async def test_a_pattern_is_held_against_the_real_path_and_not_the_name(shared: Path) -> None:
    allowed = folder(shared / "allowed")
    target = secret(shared / "elsewhere")
    inside = secret(allowed / "base.raw")
    policy = Policy(ROOT, (f"{allowed}/*",))
    for name in (link(allowed / "link", target, ROOT), f"{allowed}/../elsewhere", target):
        leaf = await image(shared / "leaf.qed", name)
        with pytest.raises(NotAllowed, match="no pattern of allow_backing matches it"):
            await open_backing_of(leaf, name, policy)
        leaf.unlink()
    for name in (inside, link(shared / "inwards", inside, ROOT), f"{allowed}/../allowed/base.raw"):
        leaf = await image(shared / "leaf.qed", name)
        assert await start_of(await open_backing_of(leaf, name, policy)) == SECRET
        leaf.unlink()


async def test_a_pattern_narrows_what_trusted_images_and_all_below_them_may_name(shared: Path) -> None:
    base = secret(shared / "base.raw")
    middle = await image(shared / "middle.qed", base)
    leaf = await image(shared / "leaf.qed", middle, raw=False)
    with pytest.raises(NotAllowed, match=r"base\.raw: no pattern of allow_backing matches it"):
        await open_backing_of(leaf, middle, Policy(ROOT, (str(middle),)))
    assert await open_and_close(leaf, middle, Policy(ROOT, (str(middle), str(base))))


async def test_a_pattern_opens_remote_backings_to_untrusted_images_but_lends_no_rights_to_files(shared: Path) -> None:
    async with served(secret(shared / "remote.raw")) as address:
        leaf = await image(shared / "leaf.qed", address, MALLORY)
        with pytest.raises(NotAllowed, match="it may name only what allow_backing names"):
            await open_backing_of(leaf, address)
        host = address.rpartition("/")[0]
        assert await start_of(await open_backing_of(leaf, address, Policy(ROOT, (f"{host}/*",)))) == SECRET
    closed = secret(shared / "closed")
    with pytest.raises(NotAllowed, match="Permission denied"):
        await open_backing_of(leaf, closed, Policy(ROOT, ("*",)))


async def open_and_close(leaf: Path, name: object, policy: Policy) -> bool:
    await (await open_backing_of(leaf, name, policy)).aclose()
    return True


@pytest.mark.parametrize(
    "name",
    [
        "nbd://good%2Fx.evil.example/e",  # canonical: nbd://good/x.evil.example/e
        "nbd:good/x.evil.example:10809:exportname=e",
        "nbd://good%3A10809%2F.evil.example/e",
        "nbd://good%23.evil.example/e",
        "nbd://good%40evil.example/e",
        "nbd://good%0aevil.example/e",
    ],
)
def test_no_host_makes_an_address_look_like_that_of_another(name: str) -> None:
    with pytest.raises(BackingRefused):
        parse_location(name, None)


@pytest.mark.parametrize("host", ["localhost", "10.1.2.3", "[::1]", "[fe80::1%25eth0]", "a-b.example", "under_score"])
def test_plain_hosts_are_hosts(host: str) -> None:
    parse_location(f"nbd://{host}/e", None)


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        f"nbd://user:{PASSWORD}@host/e",
        f"nbd://user:a/{PASSWORD}@host/e",
        f"nbd://user:a?{PASSWORD}@host/e",
        f"nbd://user:a#{PASSWORD}@host/e",
        f"nbd://user:1234@{PASSWORD}@host/e",
        f"https://{PASSWORD}@host/e",
        f"https://host/../e?X-Amz-Signature={PASSWORD}",
        f"https://host/e#{PASSWORD}",
        f"s3://bucket/key?token={PASSWORD}",
        f"nbd+unix:///e?socket=/s&token={PASSWORD}",
        f"nbd+unix:///e?token={PASSWORD}&socket=/s",
        f'json:{{"driver":"https","url":"https://host","password":"{PASSWORD}"}}',
        f"ssh://user:{PASSWORD}@host/e",
    ],
)
async def test_no_secret_of_a_name_is_shown(shared: Path, name: str) -> None:
    assert PASSWORD not in masked(name)
    leaf = await image(shared / "vm.qed", name)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        for command in (
            ("info", leaf), ("info", "--json", leaf), ("check", leaf),
            ("create", "-b", name, shared / "other.qed"), ("rebase", "-b", name, leaf),
        ):  # fmt: skip
            await trio.to_thread.run_sync(main, [str(argument) for argument in command])
    assert PASSWORD not in said.getvalue()
    with pytest.raises(BackingRefused) as refusal:
        async with admitted(str(leaf), Terms(MountOptions(), "/nowhere", ROOT)):
            pass
    assert PASSWORD not in str(refusal.value)


@pytest.mark.parametrize(
    "name",
    ["/plain/path@1?x", "nbd://host/pool/image@snapshot", "nbd://host:10810/e@1", "nbd://[::1]/e@1",
     "nbd://[::1]:10810/e@1", "nbd+unix:///e?socket=/run/x"],
)  # fmt: skip
def test_what_is_no_secret_is_shown(name: str) -> None:
    assert masked(name) == name


async def test_what_a_directory_refuses_is_listed_and_logged_without_secrets(shared: Path) -> None:
    images = folder(shared / "images")
    await image(images / "vm.qed", f"nbd://user:{PASSWORD}@host/e")
    await image(images / "good.qed", None)
    mnt = folder(shared / "mnt")
    done = run(*QEDFS, "mount", "--log-file", shared / "log", images, mnt)
    try:
        assert done.returncode == 0
        shown = done.stderr + os.getxattr(mnt, "user.qedfs.status").decode() + (shared / "log").read_text()
        shown += run(*QEDFS, "status", mnt).stdout
        assert "***@host" in shown
        assert PASSWORD not in shown
    finally:
        assert run(*QEDFS, "unmount", mnt).returncode == 0
