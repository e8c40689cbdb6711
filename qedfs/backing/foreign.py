"""What an image of one of QEMU's formats says of the world outside itself, read before QEMU sees it. Sans-IO.

QEMU follows what an image names: a backing, a data file, a VMDK's extents. Here nothing is followed: a backing becomes a
link of the chain, to be judged and opened by us; whatever else would lead out of the image is refused. All of it stands
in the first `HEAD` bytes, which QEMU is then shown as they were judged (`qemu.py`), so that a server cannot tell us one
thing and QEMU another, and without the name of a backing: QEMU would open that name with the options meant for our node.

Sources: QEMU's docs/interop/qcow2.rst; block/qcow.c; VMware's "Virtual Disk Format 5.0"; Microsoft's "Virtual Hard Disk
Image Format Specification".
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass

from qedfs.errors import BackingRefused

HEAD = 64 << 10
"""Bytes at the start of an image that are judged."""

QCOW_MAGIC = b"QFI\xfb"
FORMATS = ("qcow2", "qcow", "vmdk", "vhdx", "vdi", "vpc", "parallels", "luks", "bochs", "cloop", "dmg")
"""QEMU's names of the formats that it reads for us."""

_RAW_BY_OTHER_NAMES = ("file", "host_device")
"""What qemu-img of old days has stored as the format of a raw backing."""
_COMMON_NAMES = {"vhd": "vpc", "hdd": "parallels"}

_QCOW_BACKING = struct.Struct(">4sIQI")  # magic, version, offset and length of the backing's name
_QCOW_NAME = slice(8, 20)
"""Where the two stand."""
_QCOW2_SIZE = struct.Struct(">24xQI")  # size of the disk, encryption
_QCOW_SIZE = struct.Struct(">24xQ4xI")
_QCOW2_V2_HEADER = 72
_QCOW2_V3 = struct.Struct(">72xQ8x8xII")  # incompatible features, …, length of the header
_DATA_FILE = 1 << 2
_EXTENSION = struct.Struct(">II")
_BACKING_FORMAT, _END = 0xE2792ACA, 0
_LUKS = 2
_MAX_NAME = 1023

_MARKS = (
    (b"KDMV", "vmdk"),
    (b"# Disk DescriptorFile", "vmdk"),
    (b"vhdxfile", "vhdx"),
    (b"conectix", "vpc"),
    (b"<<< ", "vdi"),
    (b"WithoutFreeSpace", "parallels"),
    (b"WithouFreSpacExt", "parallels"),
)

_VMDK = struct.Struct("<4sIIQ")  # magic, version, flags, capacity
_VMDK_DESCRIPTOR = slice(512, 512 + 20 * 512)
_VHD = struct.Struct(">8s52xI")
_VHD_DIFFERENCING = 4


@dataclass(frozen=True)
class Foreign:
    """`backing` is the name of the image's backing, empty if it has none, and `backing_format` what the image says of it.

    `encryption` is QEMU's name of it (`luks`), empty if there is none. `size` is in bytes, None where it is not looked for.
    """

    backing: str = ""
    backing_format: str | None = None
    encryption: str = ""
    size: int | None = None


def known_format(format: str, what: str) -> str:
    """Return `format` in QEMU's spelling.

    Raises:
        BackingRefused: nothing of that name can be a backing.
    """
    if format in _RAW_BY_OTHER_NAMES:
        return "raw"
    if format in ("raw", "qed", *FORMATS):
        return format
    hint = f"; did you mean {_COMMON_NAMES[format]}?" if format in _COMMON_NAMES else ""
    raise BackingRefused(what, f"the format {format} is none of raw, qed, {', '.join(FORMATS)}{hint}")


def format_by_magic(head: bytes) -> str | None:
    """Return `qcow2` or `qcow` if the image begins so. Other formats are never guessed: their marks are weak, or at the end."""
    if not head.startswith(QCOW_MAGIC):
        return None
    return "qcow" if head[4:8] == b"\0\0\0\1" else "qcow2"


def looks_like(head: bytes) -> str | None:
    """Return the format whose mark the image begins with, of those that are never guessed; to doubt that it is raw."""
    return next((format for mark, format in _MARKS if head.startswith(mark)), None)


def inspect(format: str, head: bytes, what: str) -> Foreign:
    """Return what the image of `format` (one of FORMATS) says, from its first `HEAD` bytes, or all if it has fewer.

    Raises:
        BackingRefused: it is no such image, or would lead QEMU elsewhere. `what` names it.
    """
    match format:
        case "qcow2" | "qcow":
            return _qcow(format, head, what)
        case "vmdk":
            _refuse_vmdk_in_parts(head, what)
        case "vpc":
            if len(head) >= _VHD.size and _VHD.unpack_from(head) == (b"conectix", _VHD_DIFFERENCING):
                raise BackingRefused(what, "is a differencing VHD, which holds only half of its disk; merge it")
        case "luks":
            return Foreign(encryption="luks")
    return Foreign()


def without_backing(format: str, head: bytes) -> bytes:
    """Return the start of the image as QEMU may see it: with no backing in its header."""
    if format not in ("qcow2", "qcow"):
        return head
    return head[: _QCOW_NAME.start] + bytes(_QCOW_NAME.stop - _QCOW_NAME.start) + head[_QCOW_NAME.stop :]


def _qcow(format: str, head: bytes, what: str) -> Foreign:
    if format_by_magic(head) != format or len(head) < _QCOW2_V2_HEADER:
        raise BackingRefused(what, f"is no {format} image")
    _, version, offset, length = _QCOW_BACKING.unpack_from(head)
    size, crypt = (_QCOW2_SIZE if format == "qcow2" else _QCOW_SIZE).unpack_from(head)
    encryption = "" if not crypt else "luks" if crypt == _LUKS and format == "qcow2" else "aes"
    if encryption == "aes":
        raise BackingRefused(what, "is encrypted in QEMU's old way, which nobody should rely on; convert it to luks")
    extensions = _QCOW2_V2_HEADER
    if version >= 3:
        if len(head) < _QCOW2_V3.size:
            raise BackingRefused(what, f"is no {format} image")
        features, _, extensions = _QCOW2_V3.unpack_from(head)
        if features & _DATA_FILE:
            raise BackingRefused(what, "keeps its data in another file, which is not supported; convert it")
    if not offset:
        return Foreign("", None, encryption, size)
    if not 0 < length <= _MAX_NAME or offset + length > len(head):
        raise BackingRefused(what, "the name of its backing is too long, or not in its header")
    name = os.fsdecode(head[offset : offset + length])
    told = _backing_format(head, extensions, offset) if format == "qcow2" else None
    return Foreign(name, None if told is None else known_format(told, what), encryption, size)


def _backing_format(head: bytes, at: int, end: int) -> str | None:
    """Return what the header extensions of a qcow2 image say of its backing's format."""
    end = min(end, len(head))
    while at + _EXTENSION.size <= end:
        kind, length = _EXTENSION.unpack_from(head, at)
        at += _EXTENSION.size
        if kind == _END or at + length > end:
            return None
        if kind == _BACKING_FORMAT:
            return head[at : at + length].decode("ascii", "replace") or None
        at += -(-length // 8) * 8
    return None


def _refuse_vmdk_in_parts(head: bytes, what: str) -> None:
    """Refuse what is not one sparse file with everything in it: descriptors, which name files, and deltas of others."""
    if len(head) < _VMDK.size or _VMDK.unpack_from(head)[0] != b"KDMV":
        raise BackingRefused(
            what,
            "of VMDK only images in one sparse file can be used (monolithicSparse, streamOptimized): "
            "this is a list of other files, or none",
        )
    if _VMDK.unpack_from(head)[3] == 0:  # then its descriptor counts, and that may name any file
        raise BackingRefused(what, "is a VMDK that has no data of its own but names other files")
    descriptor = head[_VMDK_DESCRIPTOR].partition(b"\0")[0].decode("latin-1")
    parent = re.search(r"^\s*parentCID\s*=\s*(\w+)", descriptor, re.MULTILINE)
    if "parentFileNameHint" in descriptor or (parent and parent[1].lower() != "ffffffff"):
        raise BackingRefused(what, "is a VMDK that holds only the changes to another one; merge them")
