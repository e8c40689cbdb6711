"""From a backing's name to an open source: the whole chain, each link judged by policy, loops and abysses refused."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

from qedfs.backing.base import Source, close
from qedfs.backing.file import FileSource, Found, open_file
from qedfs.backing.location import FileLocation, Location, NbdLocation, masked, parse_location
from qedfs.backing.nbd import open_nbd
from qedfs.backing.object_name import ObjectLocation
from qedfs.backing.objects import open_object
from qedfs.backing.policy import Owner, Place, Policy, Rights
from qedfs.backing.qed import PageCache, QedSource, read_header
from qedfs.errors import BackingRefused, NotAllowed
from qedfs.image.header import MAGIC, Header

MAX_DEPTH = 64
"""Backings below one leaf."""

RAW, QED = "raw", "qed"
_QCOW2_MAGIC = b"QFI\xfb"


@dataclass(frozen=True)
class Reference:
    """A backing as an image names it.

    `name` is as stored in the header (or as typed), `image` the path of the naming image: the real one, as whoever can
    make a link to an image could else choose what lies beside it; absolute if the process may change its folder before the
    backing is opened (again).

    `format` is `raw`, `qed`, or None for "see what is there", which is for the day on which the leaf is made or first
    mounted: later the pinned format is to be passed, as a guest could write a magic into a raw base. A header's no-probe
    flag means `raw`.

    `status` is that of the naming image, from its open file; None if a person names the backing, who may name anything.
    """

    name: str
    format: str | None
    image: str
    status: os.stat_result | None = None

    @property
    def shown(self) -> str:
        """The name without secrets, for people."""
        return masked(self.name)


async def open_backing(reference: Reference, policy: Policy) -> Source:
    """Open the backing of an image with everything below it. Its `format` tells what it was found to be.

    Raises:
        NotAllowed: an image of the chain may not name what it names.
        BackingRefused: something of the chain does not exist, is of an unknown format, or leads back to itself.
        BackingUnavailable: something of the chain does not answer now.
    """
    chain = _Chain(policy)
    if reference.status is not None:
        chain.seen.add(_file_key(reference.status))
    link = _Link(reference.name, reference.format, FileLocation(reference.image), _owner(reference.status))
    async with AsyncExitStack() as opened:
        source = await _open_chain(chain, link, opened)
        opened.pop_all()
        return source


@dataclass(frozen=True)
class _Link:
    """What one image of the chain says of the next: `image` is where it is itself, `owner` who answers for it."""

    name: str
    format: str | None
    image: Location
    owner: Owner | None


@dataclass
class _Chain:
    """The sources opened so far: `seen` finds loops. `trusted` while all images have been."""

    policy: Policy
    seen: set[object] = field(default_factory=set)
    trusted: bool = True

    async def open(self, link: _Link) -> tuple[Source, Location]:
        """Open what `link` names, and tell where it is."""
        if link.owner is not None and not self.policy.trusts(link.owner):
            self.trusted = False
        location = parse_location(link.name, link.image)
        if isinstance(location, FileLocation):
            source = await self._open_file(link, location)
            return source, replace(location, path=source.path)
        if isinstance(location, ObjectLocation):
            return await self._open_object(link, location), location
        return await self._open_nbd(link, location), location

    async def _open_file(self, link: _Link, location: FileLocation) -> FileSource:
        rights = self._rights(link, Place.FILE, location.path)
        # Ordering: before anything looks at the file, as looking into our own mount would wait for ourselves.
        self.policy.check_path(os.path.abspath(location.path))  # noqa: ASYNC240 (asks only for the working directory)

        def admit(found: Found) -> None:
            if rights is Rights.OURS and not self.trusted and not link.name.startswith(("/", "file:/", "json:")):
                _refuse_unsafe(os.path.dirname(location.path), location.path, self.policy)
            self.policy.check_path(found.path)
            self.policy.check_name(found.path)
            _refuse_own_kind(location.path, found.status)
            self._check_new(_file_key(found.status), location.path)

        user = link.owner.uid if link.owner is not None and rights is Rights.OWNER else None
        source = await open_file(location.path, admit, user)
        self.seen.add(_file_key(source.status))
        return source

    async def _open_nbd(self, link: _Link, location: NbdLocation) -> Source:
        name = str(location)
        rights = self._rights(link, Place.SOCKET if location.is_local else Place.REMOTE, name)
        self.policy.check_name(name)
        self._check_new(name, name)
        self.seen.add(name)
        # The mounter's certificate speaks for the mounter: only for images that may name what the mounter may.
        ours = rights is Rights.OURS
        return await open_nbd(location.address, connections=self.policy.connections, credentials=ours)

    async def _open_object(self, link: _Link, location: ObjectLocation) -> Source:
        name = str(location)
        rights = self._rights(link, Place.REMOTE, name)
        self.policy.check_name(name)
        self._check_new(name, name)
        self.seen.add(name)
        return await open_object(location, signed=rights is Rights.OURS)

    def _rights(self, link: _Link, place: Place, name: str) -> Rights:
        return self.policy.rights(link.owner, remote=not isinstance(link.image, FileLocation), place=place, name=name)

    def _check_new(self, key: object, name: str) -> None:
        if key in self.seen:
            raise BackingRefused(name, "the chain of backings leads back to it")


async def _open_chain(chain: _Chain, link: _Link, opened: AsyncExitStack) -> Source:
    """Open what `link` names and everything below it; each source is put into `opened` for the case of a failure."""
    layers: list[tuple[Source, Header]] = []
    for _ in range(MAX_DEPTH):
        source, location = await chain.open(link)
        opened.push_async_callback(close, source)
        if await _format(source, link.format or location.format) == RAW:
            return _stacked(layers, source)
        header, name = await read_header(source)
        layers.append((source, header))
        if not name:
            return _stacked(layers, None)
        owner = _owner(source.status) if isinstance(source, FileSource) else None
        link = _Link(name, RAW if header.backing_is_raw else None, location, owner)
    raise BackingRefused(masked(link.name), f"the chain of backings is more than {MAX_DEPTH} deep")


async def _format(source: Source, told: str | None) -> str:
    """Return the format of `source`: what was told, else what its first bytes say. Bytes never overrule what was told."""
    if told in (RAW, QED):
        return str(told)
    if told is not None:
        raise BackingRefused(source.name, f"the format {told} is not supported yet; raw and qed are")
    start = bytearray(min(len(MAGIC), source.size))
    await source.read_into(0, memoryview(start))
    if start == _QCOW2_MAGIC:
        raise BackingRefused(source.name, "the format qcow2 is not supported yet; raw and qed are")
    return QED if start == MAGIC else RAW


def _stacked(layers: Iterable[tuple[Source, Header]], bottom: Source | None) -> Source:
    pages = PageCache()
    for file, header in reversed(list(layers)):
        bottom = QedSource(file, header, bottom, pages)
    assert bottom is not None, "a chain that is not refused has a layer"
    return bottom


def _owner(status: os.stat_result | None) -> Owner | None:
    return None if status is None else Owner.of(status)


def _file_key(status: os.stat_result) -> object:
    # Two device nodes may stand for one device.
    return ("device", status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


def _refuse_unsafe(folder: str, path: str, policy: Policy) -> None:
    """Refuse the relative name of a trusted image to which an untrusted one has led, if others can change its folder.

    They could have moved the image there, or linked it, and put a link to any file beside it.
    """
    sticky = 0
    while True:
        found = Owner.of(os.stat(folder))
        if not policy.trusts(Owner(found.uid, found.mode & ~0o022 if found.mode & sticky else found.mode)):
            raise NotAllowed(
                path, f"lies in {folder}, which others may change, and an image of another user leads there"
            )
        if folder in ("/", ""):
            return
        # In a sticky folder above, nobody can rename what is ours.
        folder, sticky = os.path.dirname(folder), stat.S_ISVTX


def _refuse_own_kind(path: str, status: os.stat_result) -> None:
    """Refuse a file on a qedfs mount: its own backing could be ours, and then each would wait for the other."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        if status.st_dev in qedfs_devices(mounts):
            raise NotAllowed(path, "lies on a qedfs mount; name the image under it instead")


def qedfs_devices(mounts: Iterable[str]) -> set[int]:
    """Return the device numbers of the qedfs mounts among the lines of a `mountinfo` (proc(5))."""
    devices = set()
    for line in mounts:
        mount, _, file_system = line.partition(" - ")
        if file_system.split(" ")[0] == "fuse.qedfs":
            major, minor = mount.split(" ")[2].split(":")
            devices.add(os.makedev(int(major), int(minor)))
    return devices
