"""From a backing's name to an open source: the whole chain, each link judged by policy, loops and abysses refused."""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

import trio

from qedfs.backing.base import Identity, Source, close
from qedfs.backing.file import FileSource, Found, open_file
from qedfs.backing.foreign import Foreign, format_by_magic, known_format, looks_like
from qedfs.backing.http import open_http
from qedfs.backing.http_name import HttpLocation
from qedfs.backing.location import FileLocation, Location, NbdLocation, masked, parse_location
from qedfs.backing.mirror_name import MirrorsLocation, is_mirrors, names_of
from qedfs.backing.mirrors import Mirrors
from qedfs.backing.nbd import open_nbd
from qedfs.backing.object_name import ObjectLocation
from qedfs.backing.objects import open_object
from qedfs.backing.policy import Owner, Place, Policy, Rights
from qedfs.backing.qed import PageCache, QedSource, read_header
from qedfs.backing.qemu import open_qemu, read_foreign
from qedfs.errors import BackingRefused, NotAllowed
from qedfs.image.header import MAGIC, Header

MAX_DEPTH = 64
"""Backings below one leaf."""

MAX_FOREIGN = 8
"""Of them, images in formats that QEMU reads for us: each is a process of some 10 MiB."""

RAW, QED = "raw", "qed"

_Layer = Callable[[Source | None], Awaitable[Source]]
"""Puts an image, of which all is known but its backing, over that."""


@dataclass(frozen=True)
class Reference:
    """A backing as an image names it.

    `name` is as stored in the header (or as typed), `image` the path of the naming image: the real one, as whoever can
    make a link to an image could else choose what lies beside it; absolute if the process may change its folder before the
    backing is opened (again).

    `format` is `raw`, `qed`, one of `foreign.FORMATS`, or None for "see what is there", which is for the day on which the
    leaf is made or first mounted: later the pinned format is to be passed, as a guest could write a magic into a raw base.
    A header's no-probe flag means `raw`.

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

    Of mirrors all must answer, and hold the same bytes as far as a few samples tell: `Route` is content with one.
    """
    if is_mirrors(reference.name):
        return await _mirrors(reference, policy, None).open_all()
    chain = _Chain(policy)
    if reference.status is not None:
        chain.seen.add(_file_key(reference.status))
    link = _first_link(reference)
    async with AsyncExitStack() as opened:
        source = await _open_chain(chain, link, opened)
        opened.pop_all()
        return source


class Route:
    """How the backing of a leaf is reached, over and over. `expected` is what it must be, None if that is not known."""

    def __init__(self, reference: Reference, policy: Policy, expected: Identity | None, *, changing: bool) -> None:
        self._reference = reference
        self._policy = policy
        self._expected = expected
        self._changing = changing
        self._mirrors: Mirrors | None = None
        self._begun = trio.Event()

    async def open(self) -> Source:
        """Connect. Raises as `open_backing`; of mirrors one is enough."""
        if not is_mirrors(self._reference.name):
            return await open_backing(self._reference, self._policy)
        if self._changing:
            raise BackingRefused(
                self._reference.shown, "a held image cannot have mirrors: what changes is in one place"
            )
        if self._mirrors is None:
            self._mirrors = _mirrors(self._reference, self._policy, self._expected)
            self._begun.set()
        return await self._mirrors.open()

    async def tend(self) -> None:
        """Do what is to be done beside the reads, for ever: bring back mirrors that have failed."""
        await self._begun.wait()
        if self._mirrors is not None:
            await self._mirrors.tend()


def _mirrors(reference: Reference, policy: Policy, expected: Identity | None) -> Mirrors:
    """Return the mirrors that `reference` names.

    Raises:
        BackingRefused: they are not named as they should be.
        NotAllowed: the image may not name one of them, needed now or not.
    """
    parse_location(reference.name, FileLocation(reference.image))
    each = [replace(reference, name=name) for name in names_of(reference.name)]
    for one in each:
        _Chain(policy).admit(_first_link(one), parse_location(one.name, FileLocation(one.image)))

    def opener(one: Reference) -> Callable[[], Awaitable[Source]]:
        return lambda: open_backing(one, policy)

    return Mirrors(reference.shown, [(one.shown, opener(one)) for one in each], expected)


@dataclass(frozen=True)
class _Link:
    """What one image of the chain says of the next: `image` is where it is itself, `owner` who answers for it."""

    name: str
    format: str | None
    image: Location
    owner: Owner | None

    @property
    def by_person(self) -> bool:
        """Whether somebody at the command line says it, and no image."""
        return self.owner is None and isinstance(self.image, FileLocation)


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
        if isinstance(location, MirrorsLocation):
            raise BackingRefused(masked(link.name), "only the image that is mounted can have mirrors, not one below it")
        ours = self.admit(link, location) is Rights.OURS
        if isinstance(location, ObjectLocation):
            return await open_object(location, signed=ours), location
        if isinstance(location, HttpLocation):
            return await self._open_http(location, credentials=ours), location
        # The mounter's certificate speaks for the mounter: only for images that may name what the mounter may.
        return await open_nbd(location.address, connections=self.policy.connections, credentials=ours), location

    def admit(self, link: _Link, location: Location) -> Rights:
        """Return with whose rights the server at `location`, which `link` names, is to be asked. Raises NotAllowed."""
        name = str(location)
        local = isinstance(location, NbdLocation) and location.is_local
        rights = self._rights(link, Place.SOCKET if local else Place.REMOTE, name)
        self.policy.check_name(name)
        key = location.url if isinstance(location, HttpLocation) else name
        self._check_new(key, name)
        self.seen.add(key)
        return rights

    async def _open_http(self, location: HttpLocation, *, credentials: bool) -> Source:
        # Patterns hold for where a server sends us, too: it may send us to what only this machine can reach.
        return await open_http(
            location,
            credentials=credentials,
            admit=lambda target: self.policy.check_name(str(target)),
            connections=self.policy.connections,
        )

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

    def secret_for(self, link: _Link) -> bytes | None:
        """Return the passphrase, which opens only what a person or a trusted image of this machine names."""
        return self.policy.secret if self.trusted and isinstance(link.image, FileLocation) else None

    def _rights(self, link: _Link, place: Place, name: str) -> Rights:
        return self.policy.rights(link.owner, remote=not isinstance(link.image, FileLocation), place=place, name=name)

    def _check_new(self, key: object, name: str) -> None:
        if key in self.seen:
            raise BackingRefused(name, "the chain of backings leads back to it")


def _first_link(reference: Reference) -> _Link:
    return _Link(reference.name, reference.format, FileLocation(reference.image), _owner(reference.status))


async def _open_chain(chain: _Chain, link: _Link, opened: AsyncExitStack) -> Source:
    """Open what `link` names and everything below it; each source is put into `opened` for the case of a failure."""
    layers: list[_Layer] = []
    foreign = 0
    pages = PageCache()
    for _ in range(MAX_DEPTH):
        source, location = await chain.open(link)
        opened.push_async_callback(close, source)
        format = await _format(source, link.format or location.format, by_person=link.by_person)
        owner = _owner(source.status) if isinstance(source, FileSource) else None
        if format == RAW:
            return await _stacked(layers, source, opened)
        if format == QED:
            header, name = await read_header(source)
            layers.append(_qed_layer(source, header, pages))
            below = RAW if header.backing_is_raw else None
        else:
            foreign += 1
            if foreign > MAX_FOREIGN:
                raise BackingRefused(source.name, f"more than {MAX_FOREIGN} images of the chain need a QEMU each")
            told, head = await read_foreign(source, format)
            layers.append(_foreign_layer(source, format, told, head, chain.secret_for(link)))
            name, below = told.backing, told.backing_format
        if not name:
            return await _stacked(layers, None, opened)
        link = _Link(name, below, location, owner)
    raise BackingRefused(masked(link.name), f"the chain of backings is more than {MAX_DEPTH} deep")


async def _format(source: Source, told: str | None, *, by_person: bool) -> str:
    """Return the format of `source`: what was told, else what its first bytes say. Bytes never overrule what was told.

    An image that does not say that its backing is raw may have been made on any format that has no magic to be trusted
    (or its pin, which told the format, is lost): what looks like one of these is neither read as it nor as raw then.
    """
    if told is not None:
        return known_format(told, source.name)
    start = bytearray(min(32, source.size))
    await source.read_into(0, memoryview(start))
    if start.startswith(MAGIC):
        return QED
    if not by_person and (likely := looks_like(bytes(start))):
        raise BackingRefused(
            source.name, f"looks like {likely}, and the image that names it does not say so; 'qedfs rebase -F' tells it"
        )
    return format_by_magic(bytes(start)) or RAW


def _qed_layer(source: Source, header: Header, pages: PageCache) -> _Layer:
    async def put(below: Source | None) -> Source:
        return QedSource(source, header, below, pages)

    return put


def _foreign_layer(source: Source, format: str, told: Foreign, head: bytes, secret: bytes | None) -> _Layer:
    async def put(below: Source | None) -> Source:
        return await open_qemu(source, format, told, head, below, secret)

    return put


async def _stacked(layers: list[_Layer], bottom: Source | None, opened: AsyncExitStack) -> Source:
    for put in reversed(layers):
        bottom = await put(bottom)
        opened.push_async_callback(close, bottom)
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
