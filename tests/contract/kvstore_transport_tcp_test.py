"""The TCP data path keeps the transport contract, plain and inside mutual TLS."""

import datetime
import ipaddress
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from kvstore.testing.poll import wait_until
from kvstore.testing.transport import KIB, MIB, TransportContract, soon
from kvstore.transport import PeerGoneError, Transport, TransportServer
from kvstore.transport.tcp import TcpServer, TcpTransport


class TestTcp(TransportContract):
    def make_server(self) -> TransportServer:
        return TcpServer(bind_host="127.0.0.1")

    def make_client(self, server: TransportServer) -> Transport:
        return TcpTransport(server.address, peer="holder")


def test_pool_is_bounded() -> None:
    """Two pulls under way take both connections: a third waits, and gives up at its deadline."""
    go = threading.Event()
    with closing(TcpServer(bind_host="127.0.0.1")) as server, ExitStack() as stack:
        client = stack.enter_context(closing(TcpTransport(server.address, peer="holder", max_connections=2)))
        offer = server.offer(memoryview(bytes(MIB)), peer="puller", lifetime_s=60.0)
        assert offer is not None
        arrived: list[int] = []

        def pull(*, stop_s: float, is_held: bool) -> None:
            def on_bytes(in_place: int) -> None:
                arrived.append(in_place)
                go.wait(soon() - time.monotonic())

            client.pull(offer, memoryview(bytearray(MIB)), stop_s=stop_s, on_bytes=on_bytes if is_held else None)

        with ThreadPoolExecutor(2) as pool:
            pulls = [pool.submit(pull, stop_s=soon(), is_held=True) for _ in range(2)]
            wait_until(lambda: len(arrived) == 2, what="two pulls to be under way")
            with pytest.raises(PeerGoneError, match="connections are in use"):
                pull(stop_s=time.monotonic() + 0.2, is_held=False)
            go.set()
            assert [each.result() for each in pulls] == [None, None]
        pull(stop_s=soon(), is_held=False)


class TestTcpOverIpv6(TransportContract):
    def make_server(self) -> TransportServer:
        return TcpServer(bind_host="::1")

    def make_client(self, server: TransportServer) -> Transport:
        assert server.address.startswith(b"[::1]:")
        return TcpTransport(server.address, peer="holder")


class TestTcpInsideTls(TransportContract):
    @pytest.fixture(autouse=True)
    def _certificates(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        folder = tmp_path_factory.mktemp("tls")
        write_certificate(folder)
        self.folder = folder

    def make_server(self) -> TransportServer:
        return TcpServer(bind_host="127.0.0.1", tls=context_of(self.folder, ssl.PROTOCOL_TLS_SERVER))

    def make_client(self, server: TransportServer) -> Transport:
        tls = context_of(self.folder, ssl.PROTOCOL_TLS_CLIENT)
        return TcpTransport(server.address, peer="holder", tls=tls)

    def test_puller_without_tls_is_not_served(self, server: TransportServer) -> None:
        """And does not wait for longer than a handshake may take."""
        self.assert_not_served(server, None)

    def test_puller_without_a_certificate_is_not_served(self, server: TransportServer) -> None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        tls.load_verify_locations(self.folder / "certificate.pem")
        self.assert_not_served(server, tls)

    def test_holder_of_another_authority_is_not_asked(
        self, server: TransportServer, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        other = tmp_path_factory.mktemp("other")
        write_certificate(other)
        self.assert_not_served(server, context_of(other, ssl.PROTOCOL_TLS_CLIENT))

    def assert_not_served(self, server: TransportServer, tls: ssl.SSLContext | None) -> None:
        offer, _ = self.offered(server, 1, 8 * KIB)
        client = TcpTransport(server.address, peer="holder", tls=tls)
        try:
            with pytest.raises(PeerGoneError):
                client.pull(offer, self.room(client, 8 * KIB), stop_s=soon())
        finally:
            client.close()


def context_of(folder: Path, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    context.load_verify_locations(folder / "certificate.pem")
    return context


def write_certificate(folder: Path) -> None:
    """A certificate that is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "node")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
