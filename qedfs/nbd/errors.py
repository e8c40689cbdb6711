"""What can go wrong between two NBD peers, told apart by what the caller can do about it.

The state machines do not know whom they talk to, so `what` is the role of the peer; whoever owns the address translates
at the edge and puts its name there.
"""

from __future__ import annotations

from qedfs.errors import QedfsError, UsageError


class NbdError(QedfsError):
    """Base of everything an NBD peer can do to us."""


class NbdProtocolError(NbdError):
    """The peer broke the protocol; nothing more it says on this connection can be trusted."""


class NbdDisconnected(NbdError):
    """The connection is gone: closed, reset or silent. Another one may work."""


class NbdTlsFailed(NbdError):
    """No encrypted connection comes about: certificates, keys or the peer's idea of TLS. Never a reason to go on without.

    `may_pass`: time or the server's administrator may mend it without us (a certificate to be renewed).
    """

    def __init__(self, what: str, why: str, *, may_pass: bool = False) -> None:
        super().__init__(what, why)
        self.may_pass = may_pass


class NbdOptionRefused(NbdError):
    """The server refused what we asked for in the negotiation; `code` is its reply type (`Reply`), `why` its text."""

    def __init__(self, what: str, why: str, code: int) -> None:
        super().__init__(what, why)
        self.code = code


class NbdRequestFailed(NbdError):
    """The server answered one request with an error; `number` is its NBD error number, the connection goes on."""

    def __init__(self, what: str, why: str, number: int) -> None:
        super().__init__(what, why)
        self.number = number


class AddressInvalid(UsageError):
    """A name that should be an NBD address is none."""
