"""Certificates of a small authority, for tests of TLS between nodes.

Covers: an authority, certificates of nodes, their files. Does not cover: production: use your own authority there.
"""

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kvstore.settings import TlsSettings

_DAY = datetime.timedelta(days=1)
BOTH_USES = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


class SampleAuthority:
    """Signs certificates of nodes, or of authorities below it.

    Args:
        name: Its common name.
        above: The authority that signs it; None: itself.
    """

    def __init__(self, name: str, *, above: "SampleAuthority | None" = None) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = _named(name)
        signer = above or self
        self.certificate = (
            _builder(self.name, issuer=signer.name, key=self.key, valid_from=-_DAY, valid_until=10 * _DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage_of_an_authority(), critical=True)
            .sign(signer.key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        """Its certificate."""
        return self.certificate.public_bytes(Encoding.PEM)

    def issue(
        self,
        folder: Path,
        name: str,
        *,
        valid_from: datetime.timedelta = -_DAY,
        valid_until: datetime.timedelta = _DAY,
        uses: tuple[x509.ObjectIdentifier, ...] | None = BOTH_USES,
        password: bytes | None = None,
        authority: bytes | None = None,
        chain: bytes = b"",
    ) -> TlsSettings:
        """Make a node's certificate and key, and write the three files.

        Args:
            folder: Where.
            name: The node's common name, and how its files are called.
            valid_from: From now.
            valid_until: From now.
            uses: Extended key usages; None leaves the extension out.
            password: Encrypts the key's file.
            authority: Content of the authority's file; None: this authority.
            chain: Further certificates behind the node's.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(
            _named(name), issuer=self.name, key=key, valid_from=valid_from, valid_until=valid_until
        ).add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        if uses is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        certificate = builder.sign(self.key, hashes.SHA256())
        encryption: KeySerializationEncryption = BestAvailableEncryption(password) if password else NoEncryption()
        files = {
            "certificate": certificate.public_bytes(Encoding.PEM) + chain,
            "key": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption),
            "authority": self.pem if authority is None else authority,
        }
        folder.mkdir(parents=True, exist_ok=True)
        for what, content in files.items():
            (folder / f"{name}.{what}.pem").write_bytes(content)
        return TlsSettings(**{what: str(folder / f"{name}.{what}.pem") for what in files})


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name,
    *,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    valid_from: datetime.timedelta,
    valid_until: datetime.timedelta,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + valid_from)
        .not_valid_after(now + valid_until)
    )


def _usage_of_an_authority() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
