"""Reads past obstore: whatever a server answers is the right record, a miss, or for a real client; and in time."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.errors import DataError
from kvstore.settings import ObjectSettings
from kvstore.testing.s3 import Fault, S3Process
from kvstore.testing.samples import sample_key
from kvstore.testing.tier import put_record, record_of
from kvstore.tiers.bucket import Arrival, BucketError, BucketLateError
from kvstore.tiers.direct import Answer, DirectReader, NotDirectError
from kvstore.tiers.errands import Errands
from kvstore.tiers.object import open_object_tier
from kvstore.tiers.obs import ObstoreBucket

RECORD = bytes(record_of(1, 300_000))
SILENCE_S = 0.3
SCHEDULING_S = 1.0
OK = b"HTTP/1.1 200 OK\r\n"
LENGTH = b'Content-Length: %d\r\nETag: "1"\r\n' % len(RECORD)

Serve = Callable[[socket.socket], None]


class Server:
    """Answers every connection with a function of the test's."""

    def __init__(self) -> None:
        self.serve: Serve = lambda peer: None
        self.requests: list[bytes] = []
        self.context: ssl.SSLContext | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def read_request(self, peer: socket.socket) -> bytes:
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            piece = peer.recv(4096)
            if not piece:
                raise ConnectionResetError
            request += piece
        self.requests.append(request)
        return request

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(timeout=10)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._run, args=(peer,))
            self._threads.append(thread)
            thread.start()

    def _run(self, peer: socket.socket) -> None:
        peer.settimeout(10)
        try:
            connection = self.context.wrap_socket(peer, server_side=True) if self.context else peer
            with connection:
                self.serve(connection)
        except OSError:
            peer.close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def reader() -> Iterator[DirectReader]:
    errands = Errands("direct-test", max_threads=2)
    reader = DirectReader(connect_timeout_s=5.0, silence_s=SILENCE_S, max_idle=2, errands=errands)
    yield reader
    reader.close()
    assert errands.close(wait_s=10) == 0


def answers(server: Server, *parts: bytes, then_wait: bool = False) -> None:
    """One answer per connection; then the connection is closed, or kept silent until the client closes it."""

    def serve(peer: socket.socket) -> None:
        server.read_request(peer)
        for part in parts:
            peer.sendall(part)
        if then_wait:
            peer.recv(1)

    server.serve = serve


def get(reader: DirectReader, server: Server, *, within_s: float = 20.0, scheme: str = "http") -> bytearray | Answer:
    memory = bytearray(len(RECORD))
    arrival = Arrival(memoryview(memory), key=sample_key(1))
    try:
        stop_s = time.monotonic() + within_s
        answer = reader.get(f"{scheme}://localhost:{server.port}/b/k?sig=1", arrival, stop_s=stop_s)
        if answer is not None:
            return answer
        arrival.finish()
        return memory
    finally:
        arrival.close()


def test_record_arrives_and_the_connection_is_used_again(server: Server, reader: DirectReader) -> None:
    def serve(peer: socket.socket) -> None:
        while True:
            server.read_request(peer)
            peer.sendall(OK + LENGTH + b'ETag: "1"\r\n\r\n' + RECORD)

    server.serve = serve
    for _ in range(3):
        assert get(reader, server) == RECORD
    assert len(server.requests) == 3
    assert len(server._threads) == 2, "one connection"
    assert server.requests[0].startswith(b"GET /b/k?sig=1 HTTP/1.1\r\nHost: localhost:")
    reader.close()


def test_connection_that_the_server_closed_meanwhile_is_replaced(server: Server, reader: DirectReader) -> None:
    answers(server, OK + LENGTH + b"\r\n" + RECORD)
    for _ in range(3):
        assert get(reader, server) == RECORD


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 301 Moved\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        OK + b"\r\nno length",
        OK + b"Content-Length: -1\r\n\r\n",
        OK + b"Content-Length: 99999999999999999999\r\n\r\n",
        OK + "Content-Length: \u0663\r\n\r\n".encode(),
        OK + LENGTH + b"Content-Encoding: gzip\r\n\r\n" + RECORD,
        b"HTTP/1.1 100 Continue\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n" + LENGTH + b"\r\n" + RECORD,
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"\x00\xff" * 4000 + b"\r\n\r\n",
        OK + b"X: " + b"a" * 70_000 + b"\r\n\r\n",
        OK + LENGTH + b"\r\n" + RECORD[:100] + b"b" * len(RECORD),
        b"HTTP/1.1 206 Partial\r\n" + LENGTH + b"Content-Range: bytes 5-9/10\r\n\r\n" + RECORD,
    ],
)
def test_strange_answers_are_never_believed(server: Server, reader: DirectReader, answer: bytes) -> None:
    answers(server, answer)
    with pytest.raises((NotDirectError, DataError, BucketError)):
        get(reader, server)


@pytest.mark.parametrize(
    "head",
    [
        OK,
        b'HTTP/1.1 206 Partial\r\nETag: "1"\r\n',
        b'HTTP/1.1 206 Partial\r\nETag: "1"\r\nContent-Range: bytes 0-%d/%d\r\n' % (len(RECORD) - 1, len(RECORD)),
        b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 0-%d/%d\r\n" % (len(RECORD) - 1, len(RECORD)),
    ],
)
def test_object_without_version_and_part_of_one_are_for_a_real_client(
    server: Server, reader: DirectReader, head: bytes
) -> None:
    answers(server, head + b"Content-Length: %d\r\n\r\n" % len(RECORD) + RECORD)
    with pytest.raises(NotDirectError):
        get(reader, server)


@pytest.mark.parametrize("num_bytes", [0, 1, len(RECORD) - 4096, len(RECORD) + 4096, 1 << 50])
def test_object_of_another_length_is_refused_before_its_bytes(
    server: Server, reader: DirectReader, num_bytes: int
) -> None:
    answers(server, OK + b'ETag: "1"\r\nContent-Length: %d\r\n\r\n' % num_bytes, then_wait=True)
    with pytest.raises(DataError, match="should have"):
        get(reader, server)


def test_wrong_bytes_are_refused(server: Server, reader: DirectReader) -> None:
    wrong = bytearray(RECORD)
    wrong[200_000] ^= 1
    answers(server, OK + LENGTH + b"\r\n" + wrong)
    with pytest.raises(DataError, match="checksum"):
        get(reader, server)


@pytest.mark.parametrize(("status", "text"), [(404, "<Code>NoSuchKey</Code>"), (503, ""), (403, "x" * 16384)])
def test_other_answers_are_told(server: Server, reader: DirectReader, status: int, text: str) -> None:
    answers(server, b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n" % (status, len(text)) + text.encode())
    assert get(reader, server) == Answer(status, text)


def test_long_other_answers_are_cut(server: Server, reader: DirectReader) -> None:
    answers(server, b"HTTP/1.1 500 x\r\nContent-Length: 9999999\r\n\r\n" + b"y" * 100_000, then_wait=True)
    answer = get(reader, server)
    assert isinstance(answer, Answer)
    assert len(answer.text) <= 100_000


@pytest.mark.parametrize("sent", [b"", OK, OK + LENGTH + b"\r\n", OK + LENGTH + b"\r\n" + RECORD[:99_999]])
def test_silence_ends_by_itself(server: Server, reader: DirectReader, sent: bytes) -> None:
    answers(server, sent, then_wait=True)
    start_s = time.monotonic()
    with pytest.raises(BucketLateError):
        get(reader, server)
    assert time.monotonic() - start_s < SILENCE_S + SCHEDULING_S


@pytest.mark.parametrize("part", ["head", "body", "text"])
def test_trickle_ends_by_the_deadline(server: Server, reader: DirectReader, part: str) -> None:
    def serve(peer: socket.socket) -> None:
        server.read_request(peer)
        if part == "body":
            peer.sendall(OK + LENGTH + b"\r\n")
        elif part == "text":
            peer.sendall(b"HTTP/1.1 500 x\r\nContent-Length: 5000\r\n\r\n")
        while True:
            peer.sendall(b"H")
            pause.wait(0.05)

    pause = threading.Event()
    server.serve = serve
    start_s = time.monotonic()
    with pytest.raises((BucketLateError, DataError)):
        get(reader, server, within_s=0.5)
    assert time.monotonic() - start_s < 0.5 + SCHEDULING_S


def test_cut_body_goes_on_where_it_ended(server: Server, reader: DirectReader) -> None:
    at = 123_456
    answers(server, OK + LENGTH + b'ETag: "1"\r\n\r\n' + RECORD[:at])
    memory = bytearray(len(RECORD))
    arrival = Arrival(memoryview(memory), key=sample_key(1))
    url = f"http://127.0.0.1:{server.port}/b/k?sig=1"
    with pytest.raises(BucketError):
        reader.get(url, arrival, stop_s=time.monotonic() + 20)
    arrived = arrival.num_arrived
    assert 0 < arrived <= at
    rest = b"HTTP/1.1 206 Partial\r\nContent-Length: %d\r\nContent-Range: bytes %d-%d/%d\r\nETag: %s\r\n\r\n"
    values = (len(RECORD) - arrived, arrived, len(RECORD) - 1, len(RECORD))
    answers(server, rest % (*values, b'"2"') + RECORD[arrived:])
    with pytest.raises(NotDirectError):
        reader.get(url, arrival, stop_s=time.monotonic() + 20)
    answers(server, rest % (*values, b'"1"') + RECORD[arrived:])
    assert reader.get(url, arrival, stop_s=time.monotonic() + 20) is None
    arrival.finish()
    assert memory == RECORD
    assert b'Range: bytes=%d-\r\nIf-Match: "1"\r\n' % arrived in server.requests[-1]


def test_reads_over_tls_and_refuses_strangers(
    server: Server, reader: DirectReader, tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    chain, key = certificate
    server.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.context.load_cert_chain(chain, key)
    answers(server, OK + LENGTH + b"\r\n" + RECORD)
    with pytest.raises(NotDirectError, match="certificate"):
        get(reader, server, scheme="https")
    reader._tls = ssl.create_default_context(cafile=str(chain))
    assert get(reader, server, scheme="https") == RECORD


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for "localhost" that signs itself, and its key."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(private, hashes.SHA256())
    )
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return chain, key


def test_answer_for_a_real_client_is_read_by_obstore(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with S3Process() as server:
        tier = open_object_tier(ObjectSettings(url=server.url, options=server.options, refresh_s=3600.0))
        try:
            assert tier.refresh()
            record = put_record(tier, 0, 3_000_000)
            bucket = tier._bucket
            assert isinstance(bucket, ObstoreBucket)
            assert bucket._direct is not None

            def refuse(*_: object, **__: object) -> None:
                raise NotDirectError("status 301")

            monkeypatch.setattr(bucket._direct, "get", refuse)
            for _ in range(2):
                assert tier.get(sample_key(0)) == record
            assert bucket._direct is None
            assert caplog.text.count("object_tier_reads_by_client") == 1
            # What obstore reads has the same limits.
            server.set_fault(Fault(kind="cut", methods=("GET",), every=2))
            assert tier.get(sample_key(0)) == record
            server.set_fault(Fault(kind="stall", methods=("GET",)))
            with memoryview(bytearray(len(record))) as view:
                start_s = time.monotonic()
                assert tier.read_into(sample_key(0), view, stop_s=start_s + 0.5) is None
                assert time.monotonic() - start_s < 0.5 + SCHEDULING_S
        finally:
            tier.close()


@pytest.mark.parametrize(
    ("options", "variables", "is_direct"),
    [
        ({"region": "eu-central-1"}, {}, True),
        ({"aws_region": "eu-central-1", "endpoint": "https://s3.example"}, {}, True),
        ({"root_certificate": "x"}, {}, False),
        ({"proxy_url": "http://proxy:1"}, {}, False),
        ({"skip_signature": "true"}, {}, False),
        ({"region": "eu-central-1"}, {"HTTPS_PROXY": "http://proxy:1"}, False),
        ({"region": "eu-central-1"}, {"AWS_REQUEST_PAYER": "requester"}, False),
    ],
)
def test_only_plain_reads_go_past_obstore(
    options: dict[str, str], variables: dict[str, str], is_direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvstore.tiers import obs

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    class Clients:
        scheme = "s3"

    clients = Clients()
    clients.options = options  # type: ignore[attr-defined]
    assert obs._can_read_directly(clients) is is_direct  # type: ignore[arg-type]
