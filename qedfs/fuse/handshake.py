"""What the kernel and libfuse agree on at the start, with two things added that libfuse cannot be asked for.

The kernel's first message, INIT, says what it can do; the answer says what is wanted. Two wishes matter here:

- FUSE_HANDLE_KILLPRIV_V2. Without it the kernel asks for the attribute `security.capability` before every write, which
  halves the rate of small writes. With it the kernel remembers that there is none, until it looks at the status of the
  file again. It means that the file system itself takes set-user-ID bits away when a file is written: ours has none.
- `max_background` and `congestion_threshold`, which otherwise only root, or somebody with fusectl, may raise later.

So the device is mounted by us and libfuse is given a socket in its place (it takes `/dev/fd/N` for a mountpoint that is
mounted already). INIT is passed on to libfuse, its answer is completed and passed back, and then the device takes the
place of the socket under the same number. After that nobody is between the kernel and libfuse.

Layout of the messages: linux/fuse.h, `fuse_init_in` and `fuse_init_out`.
"""

from __future__ import annotations

import os
import select
import socket
import struct

_HANDLE_KILLPRIV_V2 = 1 << 28
_MAX_MESSAGE = 1 << 17
"""Bytes; the kernel refuses to read into less than 8 KiB, and libfuse sends far less."""

_U32 = struct.Struct("<I")
_IN_FLAGS_AT = 40 + 12
_OUT_HEADER = 16
_OUT_READAHEAD_AT = _OUT_HEADER + 8
_UNLIMITED = (1 << 31) - 1
_OUT_FLAGS_AT = _OUT_HEADER + 12
_OUT_LIMITS = struct.Struct("<HH")
_OUT_LIMITS_AT = _OUT_HEADER + 16
_OUT_ERROR_AT = 4


class Handshake:
    """Stands between the kernel (`device`, just mounted, owned from now on) and libfuse until they have shaken hands.

    `mountpoint` is what libfuse is told; it closes that descriptor itself. `finish` is called before every wait for what
    libfuse reads, until it says that it is done.
    """

    def __init__(self, device: int, *, max_background: int, congestion_threshold: int) -> None:
        self._device = device
        self._limits = (max_background, congestion_threshold)
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._fd = theirs.detach()
        # The kernel queues INIT while it mounts, so this does not wait.
        self._init = os.read(device, _MAX_MESSAGE)
        self._ours.send(self._init)

    @property
    def mountpoint(self) -> str:
        return f"/dev/fd/{self._fd}"

    def finish(self) -> bool:
        """Pass libfuse's answer to the kernel and give libfuse the device; False as long as there is no answer."""
        if not select.select([self._ours], [], [], 0)[0]:
            return False
        answer = self._ours.recv(_MAX_MESSAGE)
        os.write(self._device, completed(self._init, answer, *self._limits))
        os.dup2(self._device, self._fd, inheritable=False)
        self.close()
        return True

    def close(self) -> None:
        """Let go of everything but the descriptor that libfuse has."""
        device, self._device = self._device, -1
        if device >= 0:
            os.close(device)
            self._ours.close()


def completed(init: bytes, answer: bytes, max_background: int, congestion_threshold: int) -> bytes:
    """Return `answer`, libfuse's to the kernel's message `init`, with our wishes, as far as the kernel knows them.

    The readahead is not limited here: the kernel takes the smaller of this and what `tuning` sets.
    """
    result = bytearray(answer)
    if len(answer) < _OUT_LIMITS_AT + _OUT_LIMITS.size or any(answer[_OUT_ERROR_AT : _OUT_ERROR_AT + 4]):
        return answer  # a refusal, or an answer without room for wishes
    (offered,) = _U32.unpack_from(init, _IN_FLAGS_AT)
    (wanted,) = _U32.unpack_from(answer, _OUT_FLAGS_AT)
    _U32.pack_into(result, _OUT_FLAGS_AT, wanted | (offered & _HANDLE_KILLPRIV_V2))
    _U32.pack_into(result, _OUT_READAHEAD_AT, _UNLIMITED)
    _OUT_LIMITS.pack_into(result, _OUT_LIMITS_AT, max_background, congestion_threshold)
    return bytes(result)
