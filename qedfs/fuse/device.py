"""Makes the mount: asks fusermount3 for it and gets the open device back.

fusermount3 is the one program that may mount for ordinary users; root takes the same way. It explains a refusal on
standard error and nowhere else.
"""

from __future__ import annotations

import array
import os
import socket
import subprocess

from qedfs.errors import MountError


def mount_device(mountpoint: str, options: list[str]) -> int:
    """Mount a FUSE file system on `mountpoint` and return the descriptor of its device.

    `options` are those of mount(8) and of FUSE, each as `name` or `name=value` with commas in values escaped.

    Raises:
        MountError: the mount was refused; nothing is mounted.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        command = ["fusermount3", "-o", ",".join(options), "--", mountpoint]
        try:
            # The protocol: fusermount3 sends the device over the socket that this variable names.
            result = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                check=False,
            )
        except OSError as error:
            raise MountError("fusermount3", f"cannot be started ({os.strerror(error.errno or 0)})") from error
        if result.returncode:
            raise MountError(mountpoint, _explanation(result.stderr) or "fusermount3 could not mount it")
        theirs.close()
        return _received_descriptor(ours, mountpoint)


def _received_descriptor(ours: socket.socket, mountpoint: str) -> int:
    descriptors = array.array("i")
    _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_LEN(descriptors.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: descriptors.itemsize])
    if not descriptors:
        raise MountError(mountpoint, "fusermount3 mounted it but gave no device")
    return descriptors[0]


def _explanation(text: bytes) -> str:
    lines = (line.strip().removeprefix("fusermount3: ") for line in os.fsdecode(text).splitlines())
    return "; ".join(line for line in lines if line)
