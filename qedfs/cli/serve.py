"""`qedfs serve`: serve an image read-only by NBD."""

from __future__ import annotations

import os

import click
import trio

from qedfs.config import read_secret
from qedfs.errors import UsageError, printable
from qedfs.nbd.constants import DEFAULT_PORT
from qedfs.session.notify import Manager
from qedfs.session.serving import Service, serve_image


@click.command("serve", short_help="Serve an image read-only by NBD.")
@click.option(
    "--socket", "socket_path", metavar="PATH", help="A unix socket for you alone. Default: IMAGE's name + .sock."
)
@click.option("--listen", metavar="HOST:PORT", help=f"TCP. Port 0 takes a free one; without a port {DEFAULT_PORT}.")
@click.option("--name", default="", metavar="NAME", help="Of the export. It is the default export in any case.")
@click.option(
    "-F",
    "--format",
    "format_",
    metavar="FORMAT",
    help="raw, qed, or a format of QEMU. Default: raw, unless its magic is QED's or qcow2's.",
)
@click.option(
    "--tls-certificates",
    "certificates",
    metavar="DIR",
    help="Serve by TLS only, with server-cert.pem and server-key.pem of DIR.",
)
@click.option(
    "--tls-verify-peer", "verify_peer", is_flag=True, help="Only clients with a certificate of DIR/ca-cert.pem."
)
@click.option("--insecure", is_flag=True, help="Listen beyond loopback without TLS, where anybody can read the image.")
@click.option("--secret", metavar="fd:N|file:PATH", help="Where the passphrase of an encrypted image is.")
@click.argument("image", metavar="IMAGE|RAW")
def command(
    socket_path: str | None,
    listen: str | None,
    name: str,
    format_: str | None,
    certificates: str | None,
    verify_peer: bool,
    insecure: bool,
    secret: str | None,
    image: str,
) -> None:
    """Serve the disk in IMAGE (raw, or QED with its backings), or the mounted disk RAW, until SIGINT or SIGTERM.

    Prints the URI under which it can be read, for instance as the BACKING of 'qedfs create'.
    """
    if socket_path and listen:
        raise UsageError("serve", "give a socket or an address to listen on, not both")
    if verify_peer and certificates is None:
        raise UsageError("--tls-verify-peer", "needs --tls-certificates")
    host, port = _address(listen) if listen else ("", 0)
    if not listen and not socket_path:
        socket_path = os.path.basename(image) + ".sock"
    passphrase = None if secret is None else read_secret(secret, "--secret")
    service = Service(
        image, format_, name, socket_path, host, port, insecure, certificates, verify_peer, secret=passphrase
    )
    manager = Manager.named_by(os.environ)

    def usable(uri: str) -> None:
        click.echo(printable(uri))
        manager.usable()

    trio.run(serve_image, service, usable)


def _address(listen: str) -> tuple[str, int]:
    host, colon, port = listen.rpartition(":")
    if not colon or listen.endswith("]"):
        return listen.strip("[]"), DEFAULT_PORT
    if not port.isdecimal() or int(port) > 65535:
        raise UsageError("--listen", f"'{listen}' is not of the form HOST:PORT")
    return host.strip("[]") or "0.0.0.0", int(port)
