"""Mutual TLS between nodes: both sides show a certificate of the cluster's own authority, or there is no connection.

Covers: contexts for sockets and for asyncio, errors of certificate files in words.
Does not cover: the sockets (`kvstore.peer_server`, `kvstore.peer_link`, `kvstore.transport.tcp`), the unix socket and
the event stream, which carry no chunks and stay with the cluster's secret.

TLS 1.3 only. The authority file is the only root: the system's own are not read. Host names are not compared, because
nodes come and go with addresses that no certificate can foresee: who has a certificate of this authority is a node, and
the proof of the cluster's secret follows inside the connection. So the authority must sign nodes of this cluster only.

In TLS 1.3 a client has finished its handshake before the server has looked at the client's certificate: a client that
is refused sees its connection end at the first read.
"""

import datetime
import logging
import ssl
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from cluster.errors import SettingsError
from kvstore import metrics
from kvstore.settings import TlsSettings

log = logging.getLogger(__name__)

_USES: Final = {
    "server": x509.oid.ExtendedKeyUsageOID.SERVER_AUTH,
    "client": x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH,
}


def server_context(settings: TlsSettings) -> ssl.SSLContext:
    """For sockets that accept: clients without a certificate of the authority are refused.

    Raises:
        SettingsError: What is wrong with which file.
    """
    context = _context(settings, ssl.PROTOCOL_TLS_SERVER)
    # Every connection shows its certificate again: nothing to resume.
    context.num_tickets = 0
    return context


def client_context(settings: TlsSettings) -> ssl.SSLContext:
    """For sockets that connect: servers without a certificate of the authority are refused.

    Raises:
        SettingsError: What is wrong with which file.
    """
    return _context(settings, ssl.PROTOCOL_TLS_CLIENT)


def check_files(settings: TlsSettings, *, now: datetime.datetime | None = None) -> datetime.datetime:
    """Look for every mistake that would otherwise be a handshake error on another node.

    Args:
        settings: The files.
        now: The time, with its zone; None: this machine's.

    Returns:
        When the node's certificate, or one of its chain, expires.

    Raises:
        SettingsError: What is wrong with which file.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    chain = _certificates(settings.certificate, what="certificate")
    authorities = _certificates(settings.authority, what="authority")
    for certificate, path in [
        *((c, settings.certificate) for c in chain),
        *((a, settings.authority) for a in authorities),
    ]:
        start, stop = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if not start <= now <= stop:
            raise SettingsError(
                f"tls: the certificate of {_name(certificate)} in {path} is valid from {start:%Y-%m-%d %H:%M} to "
                f"{stop:%Y-%m-%d %H:%M} UTC; it is {now:%Y-%m-%d %H:%M}: make a new one, or set the clock"
            )
    if _public_bytes(_private_key(settings.key)) != _public_bytes(chain[0].public_key()):
        raise SettingsError(
            f"tls: the key in {settings.key} does not belong to the first certificate in {settings.certificate}"
        )
    _check_chain(chain, authorities, settings)
    _check_uses(chain[0], settings.certificate)
    return min(certificate.not_valid_after_utc for certificate in chain)


def _context(settings: TlsSettings, protocol: int) -> ssl.SSLContext:
    expires = check_files(settings)
    metrics.TLS_EXPIRES.set(expires.timestamp())
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cafile=settings.authority)
        # An empty password, where OpenSSL would ask for one on the terminal.
        context.load_cert_chain(settings.certificate, settings.key, password="")
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(
            f"tls: {settings.certificate}, {settings.key} or {settings.authority} cannot be used: {error}"
        ) from error
    return context


def _certificates(path: str, *, what: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_read(path, what=what))
    except ValueError as error:
        raise SettingsError(f"tls: {what} file {path} holds no PEM certificate: {error}") from error


def _private_key(path: str) -> PublicKeyTypes:
    try:
        return load_pem_private_key(_read(path, what="key"), password=None).public_key()
    except TypeError as error:
        raise SettingsError(f"tls: key file {path} is encrypted: nobody is there to type its password") from error
    except ValueError as error:
        raise SettingsError(f"tls: key file {path} holds no PEM private key: {error}") from error


def _read(path: str, *, what: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise SettingsError(f"tls: {what} file {path} cannot be read: {error.strerror}") from error


def _public_bytes(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _check_chain(chain: list[x509.Certificate], authorities: list[x509.Certificate], settings: TlsSettings) -> None:
    if chain[0].subject == chain[0].issuer:
        raise SettingsError(
            f"tls: the certificate in {settings.certificate} has the name of its issuer, {_name(chain[0])}, so that "
            "other nodes would take it for a self-signed one: give the node another name"
        )
    issuers = [*chain[1:], *authorities]
    certificate, seen = chain[0], 0
    while not any(_is_issued_by(certificate, authority) for authority in authorities):
        above = next(
            (issuer for issuer in issuers if issuer != certificate and _is_issued_by(certificate, issuer)), None
        )
        seen += 1
        if above is None or seen > len(chain):
            raise SettingsError(
                f"tls: the certificate of {_name(certificate)} in {settings.certificate} was not signed by the "
                f"authority in {settings.authority} ({', '.join(_name(a) for a in authorities)})"
            )
        certificate = above


def _is_issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _check_uses(certificate: x509.Certificate, path: str) -> None:
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return
    missing = [use for use, oid in _USES.items() if oid not in usage]
    if missing and x509.oid.ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE not in usage:
        raise SettingsError(
            f"tls: the certificate in {path} may not be used as {' and '.join(missing)}: a node is both "
            "(extendedKeyUsage = serverAuth, clientAuth)"
        )


def _name(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string() or f"serial number {certificate.serial_number:x}"
