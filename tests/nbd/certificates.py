"""Certificates for tests of TLS, in the folders that QEMU, nbdkit, libnbd and qedfs read."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_DAY = datetime.timedelta(days=1)
_SIGNING, _BOTH = ("key_cert_sign", "crl_sign"), ("digital_signature",)


class Authority:
    """Signs certificates and puts them where programs look for them."""

    def __init__(self, name: str = "qedfs test") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        extensions = [x509.BasicConstraints(ca=True, path_length=None), _usage(_SIGNING)]
        self._certificate = self._signed(self._name, self._key.public_key(), extensions, days=2)

    def server(self, folder: Path, *names: str, days: int = 2) -> Path:
        """Write the certificate of a server called `names`; negative `days` make one that has expired."""
        alternatives: list[x509.GeneralName] = []
        for name in names or ("localhost", "127.0.0.1"):
            is_address = name.replace(".", "").isdigit()
            alternatives.append(x509.IPAddress(ipaddress.ip_address(name)) if is_address else x509.DNSName(name))
        self._pair(folder, "server", ExtendedKeyUsageOID.SERVER_AUTH, [x509.SubjectAlternativeName(alternatives)], days)
        return folder

    def client(self, folder: Path) -> Path:
        """Write the certificate of a client."""
        self._pair(folder, "client", ExtendedKeyUsageOID.CLIENT_AUTH, [], 2)
        return folder

    def believed(self, folder: Path) -> Path:
        """Write only the certificate of the authority."""
        folder.mkdir(exist_ok=True)
        (folder / "ca-cert.pem").write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))
        return folder

    def revoke(self, folder: Path, file: str) -> None:
        """Write a list in which the certificate in `file` is revoked."""
        number = x509.load_pem_x509_certificate((folder / file).read_bytes()).serial_number
        now = datetime.datetime.now(datetime.UTC)
        revoked = x509.RevokedCertificateBuilder().serial_number(number).revocation_date(now - _DAY).build()
        crl = x509.CertificateRevocationListBuilder().issuer_name(self._name).last_update(now - _DAY)
        signed = crl.next_update(now + _DAY).add_revoked_certificate(revoked).sign(self._key, hashes.SHA256())
        (folder / "ca-crl.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))

    def _pair(
        self, folder: Path, role: str, purpose: x509.ObjectIdentifier, more: list[x509.ExtensionType], days: int
    ) -> None:
        self.believed(folder)
        key = ec.generate_private_key(ec.SECP256R1())
        extensions = [
            x509.BasicConstraints(ca=False, path_length=None),
            _usage(_BOTH),
            x509.ExtendedKeyUsage([purpose]),
            *more,
        ]
        certificate = self._signed(_named(f"test {role}"), key.public_key(), extensions, days)
        (folder / f"{role}-cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        plain = serialization.NoEncryption()
        form = serialization.PrivateFormat.PKCS8
        (folder / f"{role}-key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))

    def _signed(
        self, name: x509.Name, key: ec.EllipticCurvePublicKey, extensions: list[x509.ExtensionType], days: int
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(self._name).public_key(key)
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - 3 * _DAY).not_valid_after(now + days * _DAY)
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(self._key, hashes.SHA256())


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(what: tuple[str, ...]) -> x509.KeyUsage:
    fields = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
        *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{field: field in what for field in fields})
