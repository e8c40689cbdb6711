"""QMP, the control protocol of QEMU, without I/O (QEMU's docs/interop/qmp-spec.rst).

    server   a greeting: {"QMP": {"version": …, "capabilities": […]}}
    client   {"execute": "qmp_capabilities", "id": 0}, before anything else
    client   {"execute": COMMAND, "arguments": {…}, "id": N}
    server   {"return": VALUE, "id": N} or {"error": {"class": …, "desc": …}, "id": N}, in the order of the commands
    server   {"event": NAME, "data": {…}, "timestamp": …}, between any two of these

Each is one JSON object on one line, ended by a line feed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

MAX_LINE = 16 << 20
"""Bytes of one message: far more than a QEMU with hundreds of block nodes says of them, far less than would hurt."""


class ProtocolError(Exception):
    """What came is not QMP; the message is a few words about it."""


class Greeting(NamedTuple):
    """The first thing that a server says. `version` is QEMU's, as `7.2.0`."""

    version: str


class Answer(NamedTuple):
    """What the command with this number returned."""

    number: int
    value: Any


class Refusal(NamedTuple):
    """The command with this number failed; None: what was sent could not be read."""

    number: int | None
    description: str


class Event(NamedTuple):
    """News that nobody has asked for."""

    name: str
    data: Mapping[str, Any]


Message = Greeting | Answer | Refusal | Event


def encode(number: int, command: str, arguments: Mapping[str, Any]) -> bytes:
    """Return what to send so that `command` is done; its answer carries `number`."""
    message: dict[str, Any] = {"execute": command}
    if arguments:
        message["arguments"] = dict(arguments)
    return json.dumps(message | {"id": number}).encode() + b"\n"


class Decoder:
    """Cuts what a server sends into messages."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Take the next bytes, and return the messages that are complete with them.

        Raises:
            ProtocolError: this is no QMP, or a message is longer than `MAX_LINE`. Nothing can be told from then on.
        """
        *lines, rest = data.split(b"\n")
        messages = []
        for line in lines:
            whole = bytes(self._rest + line)
            self._rest.clear()
            if whole.strip():
                messages.append(_decode(whole))
        self._rest += rest
        if len(self._rest) > MAX_LINE:
            raise ProtocolError(f"a message of more than {MAX_LINE} bytes")
        return messages


def _decode(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a line that is no JSON") from error
    match message:
        case {"QMP": {"version": {"qemu": {"major": int(major), "minor": int(minor), "micro": int(micro)}}}}:
            return Greeting(f"{major}.{minor}.{micro}")
        case {"return": value, "id": int(number)}:
            return Answer(number, value)
        case {"error": {"desc": str(description)}}:
            number = message.get("id")
            return Refusal(number if isinstance(number, int) else None, description)
        case {"event": str(name)}:
            data = message.get("data", {})
            return Event(name, data if isinstance(data, dict) else {})
    raise ProtocolError("a message of no known kind")
