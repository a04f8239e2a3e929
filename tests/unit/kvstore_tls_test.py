"""Mutual TLS: nodes of one authority talk, nobody else does, and wrong files are told in words."""

import asyncio
import datetime
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import SettingsError
from kvstore.settings import TlsSettings
from kvstore.testing.certificates import BOTH_USES, SampleAuthority
from kvstore.tls import check_files, client_context, server_context

TIMEOUT_S = 10.0
DAY = datetime.timedelta(days=1)
OURS = SampleAuthority("cluster one")
OTHERS = SampleAuthority("cluster two")


@pytest.fixture
def server(tmp_path: Path) -> ssl.SSLContext:
    return server_context(OURS.issue(tmp_path, "server"))


def exchange(server: ssl.SSLContext, connect: Callable[[socket.socket], socket.socket]) -> tuple[str, str]:
    """What both sides of one connection end with: what they received, or their error's name."""
    outcome: list[str] = []

    def serve() -> None:
        try:
            accepted, _ = listener.accept()
            accepted.settimeout(TIMEOUT_S)
            with server.wrap_socket(accepted, server_side=True) as sock:
                sock.sendall(sock.recv(5)[::-1])
                outcome.append("served")
        except OSError as error:
            outcome.append(getattr(error, "reason", None) or type(error).__name__)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT_S)
        thread = threading.Thread(target=serve)
        thread.start()
        sock = socket.create_connection(listener.getsockname(), timeout=TIMEOUT_S)
        try:
            with connect(sock) as connected:
                connected.sendall(b"hello")
                seen = connected.recv(5).decode("latin-1")
        except OSError as error:
            seen = getattr(error, "reason", None) or type(error).__name__
        finally:
            sock.close()
            thread.join(TIMEOUT_S)
    return outcome[0], seen


def test_two_nodes_of_one_authority_talk(server: ssl.SSLContext, tmp_path: Path) -> None:
    client = client_context(OURS.issue(tmp_path, "client"))
    # By a name that is in no certificate: nodes are known by their authority.
    assert exchange(server, lambda sock: client.wrap_socket(sock, server_hostname="10.1.2.3")) == ("served", "olleh")


def test_connections_are_of_version_1_3_and_hide_the_bytes(server: ssl.SSLContext, tmp_path: Path) -> None:
    client = client_context(OURS.issue(tmp_path, "client"))
    versions: list[str | None] = []

    def connect(sock: socket.socket) -> socket.socket:
        wrapped = client.wrap_socket(sock)
        versions.append(wrapped.version())
        return wrapped

    assert exchange(server, connect) == ("served", "olleh")
    assert versions == ["TLSv1.3"]
    old = client_context(OURS.issue(tmp_path, "client"))
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert "served" not in exchange(server, old.wrap_socket)


def test_client_of_another_authority_is_refused(server: ssl.SSLContext, tmp_path: Path) -> None:
    # It would even trust our server; the server does not trust it.
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(cadata=OURS.pem.decode())
    settings = OTHERS.issue(tmp_path, "stranger")
    client.load_cert_chain(settings.certificate, settings.key)
    served, seen = exchange(server, client.wrap_socket)
    assert served == "CERTIFICATE_VERIFY_FAILED"
    assert seen != "olleh"


def test_server_of_another_authority_is_refused(tmp_path: Path) -> None:
    impostor = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    settings = OTHERS.issue(tmp_path, "impostor")
    impostor.load_cert_chain(settings.certificate, settings.key)
    client = client_context(OURS.issue(tmp_path, "client"))
    served, seen = exchange(impostor, client.wrap_socket)
    assert (served == "served", seen) == (False, "CERTIFICATE_VERIFY_FAILED")


def test_client_without_a_certificate_is_refused(server: ssl.SSLContext) -> None:
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(cadata=OURS.pem.decode())
    served, seen = exchange(server, client.wrap_socket)
    assert served == "PEER_DID_NOT_RETURN_A_CERTIFICATE"
    assert seen != "olleh"


def test_client_without_tls_is_refused(server: ssl.SSLContext) -> None:
    served, seen = exchange(server, lambda sock: sock)
    assert served != "served"
    assert seen != "olleh"


def test_server_without_tls_is_refused(tmp_path: Path) -> None:
    class Plain(ssl.SSLContext):
        def wrap_socket(self, sock: socket.socket, **_: object) -> socket.socket:  # type: ignore[override]
            return sock

    client = client_context(OURS.issue(tmp_path, "client"))
    _, seen = exchange(Plain(ssl.PROTOCOL_TLS_SERVER), client.wrap_socket)
    assert seen in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")


def test_certificate_that_expired_meanwhile_is_refused(server: ssl.SSLContext, tmp_path: Path) -> None:
    """The peer looks at the clock too, at every connection."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(cadata=OURS.pem.decode())
    settings = OURS.issue(tmp_path, "late", valid_until=-DAY / 2)
    client.load_cert_chain(settings.certificate, settings.key)
    assert exchange(server, client.wrap_socket)[0] == "CERTIFICATE_VERIFY_FAILED"


async def test_asyncio_takes_the_contexts(server: ssl.SSLContext, tmp_path: Path) -> None:
    client = client_context(OURS.issue(tmp_path, "client"))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readexactly(5))[::-1])
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=server) as listener:
        port = listener.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client)
        writer.write(b"hello")
        assert await asyncio.wait_for(reader.readexactly(5), TIMEOUT_S) == b"olleh"
        writer.close()
        await writer.wait_closed()


def test_intermediate_authority_may_sign_nodes(server: ssl.SSLContext, tmp_path: Path) -> None:
    rack = SampleAuthority("rack 7", above=OURS)
    client = client_context(rack.issue(tmp_path, "client", authority=OURS.pem, chain=rack.pem))
    assert exchange(server, client.wrap_socket) == ("served", "olleh")
    with pytest.raises(SettingsError, match="not signed by"):
        client_context(rack.issue(tmp_path, "without", authority=OURS.pem))


def test_several_authorities_can_be_trusted_while_one_replaces_another(tmp_path: Path) -> None:
    both = OURS.pem + OTHERS.pem
    server = server_context(OURS.issue(tmp_path, "server", authority=both))
    client = client_context(OTHERS.issue(tmp_path, "client", authority=both))
    assert exchange(server, client.wrap_socket) == ("served", "olleh")


def test_good_files_tell_when_they_expire(tmp_path: Path) -> None:
    expires = check_files(OURS.issue(tmp_path, "node", valid_until=5 * DAY))
    assert abs(expires - datetime.datetime.now(datetime.UTC) - 5 * DAY) < datetime.timedelta(minutes=1)


@pytest.mark.parametrize("what", ["certificate", "key", "authority"])
@pytest.mark.parametrize(("content", "words"), [(None, "cannot be read: No such file"), (b"", "holds no PEM")])
def test_missing_or_empty_file_is_named(tmp_path: Path, what: str, content: bytes | None, words: str) -> None:
    settings = OURS.issue(tmp_path, "node")
    path = Path(getattr(settings, what))
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    for make in (server_context, client_context):
        with pytest.raises(SettingsError, match=words) as caught:
            make(settings)
        assert str(path) in str(caught.value)
        assert what in str(caught.value)


def test_mistakes_are_told_in_words(tmp_path: Path) -> None:
    good, other = OURS.issue(tmp_path, "good"), OURS.issue(tmp_path, "other")
    swapped = TlsSettings(certificate=good.certificate, key=other.key, authority=good.authority)
    mistakes = [
        (OURS.issue(tmp_path, "old", valid_from=-3 * DAY, valid_until=-2 * DAY), "is valid from"),
        (OURS.issue(tmp_path, "early", valid_from=DAY, valid_until=2 * DAY), "set the clock"),
        (swapped, "does not belong to the first certificate"),
        (OURS.issue(tmp_path, "foreign", authority=OTHERS.pem), r"was not signed by.*cluster two"),
        (OURS.issue(tmp_path, "locked", password=b"a password"), "is encrypted"),
        (OURS.issue(tmp_path, "half", uses=BOTH_USES[:1]), "may not be used as client"),
        (OURS.issue(tmp_path, "cluster one"), "has the name of its issuer"),
    ]
    for settings, words in mistakes:
        with pytest.raises(SettingsError, match=words):
            server_context(settings)


def test_certificates_without_extended_usage_are_for_both(server: ssl.SSLContext, tmp_path: Path) -> None:
    client = client_context(OURS.issue(tmp_path, "any", uses=None))
    assert exchange(server, client.wrap_socket) == ("served", "olleh")
