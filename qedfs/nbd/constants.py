"""Numbers and layouts of the NBD protocol, and the limits we put on a peer.

Names and values: NBD protocol specification (`doc/proto.md` of the reference implementation). All integers are
big-endian.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct

NBD_MAGIC = 0x4E42444D41474943
OPTION_MAGIC = 0x49484156454F5054
OLDSTYLE_MAGIC = 0x00420281861253
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF

DEFAULT_PORT = 10809
BASE_ALLOCATION = "base:allocation"

GREETING = Struct(">QQH")
"""NBD_MAGIC, OPTION_MAGIC, handshake flags."""
OPTION = Struct(">QII")
"""OPTION_MAGIC, option, length of the data."""
OPTION_REPLY = Struct(">QIII")
"""OPTION_REPLY_MAGIC, option, reply type, length of the data."""
EXPORT = Struct(">QH")
"""Size in bytes, transmission flags."""
BLOCK_SIZES = Struct(">III")
"""Minimum, preferred, maximum, in bytes."""
EXPORT_NAME_PADDING = 124
REQUEST = Struct(">IHHQQI")
"""REQUEST_MAGIC, command flags, command, cookie, position, length."""
SIMPLE_REPLY = Struct(">IIQ")
"""SIMPLE_REPLY_MAGIC, error number, cookie."""
CHUNK = Struct(">IHHQI")
"""CHUNK_MAGIC, chunk flags, type, cookie, length of the payload."""
DATA_CHUNK = Struct(">IHHQIQ")
"""A CHUNK of type OFFSET_DATA with the position that leads its payload."""
HOLE = Struct(">QI")
"""Payload of OFFSET_HOLE: position, length."""
ERROR = Struct(">IH")
"""Start of the payload of every error chunk: error number, length of the text that follows."""
U16 = Struct(">H")
U32 = Struct(">I")
U64 = Struct(">Q")
STATUS = Struct(">II")
"""One descriptor of a BLOCK_STATUS chunk: length in bytes, `Status` flags."""

MAX_STRING = 4096
"""Bytes; the specification's limit for names, descriptions and messages."""
MAX_OPTION_DATA = 64 * 1024
"""Bytes of one option or option reply. The longest that makes sense is one string and a few numbers."""
MAX_OPTION_REPLIES = 256
"""Replies to one option; we never ask for more than a handful of facts."""
MAX_MINIMUM_BLOCK = 64 * 1024
"""Bytes; the specification's limit for a server's minimum block size."""
MAX_PAYLOAD = 32 * 1024 * 1024
"""Bytes of one READ or WRITE that every server must take if it does not say otherwise."""
MAX_SIZE = (1 << 63) - 1
"""Bytes of an export; positions in files are signed 64-bit numbers."""
MAX_ERROR_CHUNK = 8 * 1024
"""Bytes of an error chunk's payload: one string, a few numbers, room for types yet unknown."""
MAX_STATUS_CHUNK = U32.size + (1 << 20) * STATUS.size
"""Bytes of a BLOCK_STATUS payload: a million extents, the most that nbdkit collects for one answer."""


class HandshakeFlag(IntFlag):
    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


REPLY_ERROR = 1 << 31
"""The bit that marks a reply type as an error."""


class Reply(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = REPLY_ERROR + 1
    ERR_POLICY = REPLY_ERROR + 2
    ERR_INVALID = REPLY_ERROR + 3
    ERR_PLATFORM = REPLY_ERROR + 4
    ERR_TLS_REQD = REPLY_ERROR + 5
    ERR_UNKNOWN = REPLY_ERROR + 6
    ERR_SHUTDOWN = REPLY_ERROR + 7
    ERR_BLOCK_SIZE_REQD = REPLY_ERROR + 8
    ERR_TOO_BIG = REPLY_ERROR + 9


class Info(IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    HAS_FLAGS = 0x1
    READ_ONLY = 0x2
    SEND_DF = 0x80
    CAN_MULTI_CONN = 0x100


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    DF = 4
    REQ_ONE = 8


class Chunk(IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


CHUNK_DONE = 1
"""Chunk flag: the last chunk of its answer."""
CHUNK_ERROR = 0x8000
"""The bit that marks a chunk type as an error, known or not."""


class Status(IntFlag):
    """Flags of a `base:allocation` descriptor."""

    HOLE = 1
    ZERO = 2


class Errno(IntEnum):
    """Error numbers on the wire; they are the protocol's own, equal to Linux's by origin only."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108
