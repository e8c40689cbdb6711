"""TLS under NBD: contexts from certificate files, and an encrypted connection that looks like a socket.

Files are laid out as QEMU, nbdkit and libnbd have them, in one folder: `ca-cert.pem` (who is believed), `ca-crl.pem` (who
is not any more), `client-cert.pem` and `client-key.pem`, `server-cert.pem` and `server-key.pem`. A client without a
folder believes the certificate authorities of the machine. They are read anew for each connection of a client, so that
renewed ones count from the next on.

Rules: the server's certificate is always verified, for its name too; nothing older than TLS 1.2; no renegotiation.
"""

from __future__ import annotations

import os
import socket
import ssl
from typing import NamedTuple

import trio

from qedfs.nbd.address import NbdAddress
from qedfs.nbd.errors import NbdDisconnected, NbdError, NbdTlsFailed
from qedfs.nbd.negotiation import SERVER

ENVIRONMENT = "QEDFS_TLS_CERTIFICATES"
"""The folder for clients whose address names none."""

CA, REVOKED = "ca-cert.pem", "ca-crl.pem"
_CERTIFICATE_EXPIRED, _CERTIFICATE_NOT_YET_VALID = 10, 9
"""`X509_V_ERR_CERT_HAS_EXPIRED` and `…_NOT_YET_VALID` of OpenSSL: another day, or a renewal, mends them."""
_HOW = "(client-cert.pem and client-key.pem in tls-certificates=DIR)"
# OpenSSL names alerts of the peer so; what matters to a person is who has to do something.
_ALERTS = {
    "CERTIFICATE_REQUIRED": f"requires a client certificate {_HOW}",
    "BAD_CERTIFICATE": "does not accept our client certificate",
    "UNKNOWN_CA": "does not accept our client certificate: it is of an authority unknown there",
    "CERTIFICATE_EXPIRED": "does not accept our client certificate: it has expired",
    "CERTIFICATE_REVOKED": "does not accept our client certificate: it is revoked",
    "CERTIFICATE_UNKNOWN": "does not accept our client certificate",
}


class ClientContext(NamedTuple):
    """How to connect; `has_pair`: a client certificate can be shown."""

    context: ssl.SSLContext
    has_pair: bool


def client_context(address: NbdAddress, *, credentials: bool) -> ClientContext:
    """Return the context for a connection to `address`. Blocks: files are read.

    Without `credentials` no client certificate is shown to the server, and the address may name no folder: who wrote it
    is not trusted with the mounter's files. Whom the mounter believes (the environment's folder) holds all the same.

    Raises:
        NbdTlsFailed: a file is missing, unreadable or not what it should be; or a folder is named without the right to.
    """
    if address.certificates and not credentials:
        raise NbdTlsFailed(SERVER, "may not be given credentials: the image that names tls-certificates is not trusted")
    folder = address.certificates or os.environ.get(ENVIRONMENT, "")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _harden(context)
    if not folder:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        return ClientContext(context, False)
    pair = [os.path.join(folder, name) for name in ("client-cert.pem", "client-key.pem")]
    has_ca, has_pair = os.path.exists(os.path.join(folder, CA)), os.path.exists(pair[0])
    if not has_ca and not has_pair:
        raise NbdTlsFailed(SERVER, f"cannot be verified: {folder} holds neither {CA} nor client-cert.pem")
    if has_ca:
        _believe(context, folder)
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if has_pair and credentials:
        _load_pair(context, *pair)
    return ClientContext(context, has_pair and credentials)


def server_context(folder: str, *, verify_peer: bool) -> ssl.SSLContext:
    """Return the context of a server with the certificates in `folder`; with `verify_peer` clients must show one of its CA.

    Blocks: files are read.

    Raises:
        NbdTlsFailed: a file is missing, unreadable or not what it should be.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _harden(context)
    _load_pair(context, os.path.join(folder, "server-cert.pem"), os.path.join(folder, "server-key.pem"))
    if verify_peer:
        _believe(context, folder)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class TlsSocket:
    """A connected non-blocking socket, encrypted; as far as `Connection` uses one it behaves like it.

    `recv_into` raises BlockingIOError where nothing has come, `pending` tells of bytes that have come and are decrypted:
    for these the socket itself is not readable any more.
    """

    def __init__(self, sock: socket.socket, context: ClientContext, name: str) -> None:
        """Take over `sock`. `name` is what the peer's certificate is verified for."""
        sock.setblocking(False)
        self._has_pair = context.has_pair
        try:
            self._tls = context.context.wrap_socket(sock, server_hostname=name, do_handshake_on_connect=False)
        except ValueError as error:
            sock.close()
            raise NbdTlsFailed(SERVER, f"cannot be verified: {name} is no possible name of a server") from error

    async def handshake(self) -> None:
        """Agree on keys and verify the server.

        Raises:
            NbdTlsFailed: the server is not whom we want, or does not want us; NbdDisconnected: it hung up.
        """
        while True:
            try:
                self._tls.do_handshake()
                return
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self._tls)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(self._tls)
            except OSError as error:
                raise translated(error) from error

    def dismissal(self) -> NbdError:
        """Return the error that the server's hanging up right behind the handshake means.

        Servers with GnuTLS do not say that they want another certificate. It may as well be that they are just ending.
        """
        why = "may not accept our client certificate" if self._has_pair else f"may require a client certificate {_HOW}"
        return NbdTlsFailed(SERVER, f"hung up as soon as TLS had begun; it {why}", may_pass=True)

    def fileno(self) -> int:
        return self._tls.fileno()

    def setblocking(self, blocking: bool) -> None:
        self._tls.setblocking(blocking)

    def pending(self) -> int:
        """Bytes decrypted and not received."""
        return self._tls.pending()

    def send(self, data: bytes) -> int:
        """As of a socket; 0 if the socket takes no more. Raises OSError, NbdError."""
        try:
            return self._tls.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        except ssl.SSLError as error:
            raise translated(error) from error

    def recv_into(self, buffer: memoryview) -> int:
        """As of a socket: at most one record of TLS, 16 KiB. Raises OSError, NbdError."""
        try:
            return self._tls.recv_into(buffer)
        except ssl.SSLZeroReturnError:
            return 0
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        except ssl.SSLError as error:
            raise translated(error) from error

    def close(self) -> None:
        self._tls.close()


def translated(error: OSError) -> NbdError:
    """Return what an error of TLS means to a client."""
    if isinstance(error, ssl.SSLCertVerificationError):
        passes = error.verify_code in (_CERTIFICATE_EXPIRED, _CERTIFICATE_NOT_YET_VALID)
        return NbdTlsFailed(
            SERVER, f"shows a certificate that is not accepted: {error.verify_message}", may_pass=passes
        )
    if isinstance(error, ssl.SSLEOFError) or not isinstance(error, ssl.SSLError):
        return NbdDisconnected(SERVER, f"the connection was lost ({error.strerror or 'in the middle of TLS'})")
    reason = error.reason or ""
    for alert, meaning in _ALERTS.items():
        # "TLSV13_ALERT_CERTIFICATE_REQUIRED", "SSLV3_ALERT_BAD_CERTIFICATE", …: said by the peer.
        if reason.endswith(f"_ALERT_{alert}"):
            return NbdTlsFailed(SERVER, meaning)
    return NbdTlsFailed(SERVER, f"does not come to terms by TLS ({reason.replace('_', ' ').lower() or error})")


def _harden(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION


def _believe(context: ssl.SSLContext, folder: str) -> None:
    _load(context, os.path.join(folder, CA))
    revoked = os.path.join(folder, REVOKED)
    if os.path.exists(revoked):
        _load(context, revoked)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _load(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except OSError as error:
        raise NbdTlsFailed(SERVER, f"cannot be verified: {path} cannot be used ({_reason(error)})") from error


def _load_pair(context: ssl.SSLContext, certificate: str, key: str) -> None:
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as error:
        missing = next((path for path in (certificate, key) if not os.path.exists(path)), certificate)
        raise NbdTlsFailed(SERVER, f"gets no certificate: {missing} cannot be used ({_reason(error)})") from error


def _no_password() -> str:
    # OpenSSL would else ask for it on the terminal.
    raise ValueError("the key is encrypted; a mount has nobody to ask for its password")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
