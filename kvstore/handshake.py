"""The client's half of the first messages of a connection: both sides prove the cluster's secret to each other.

Covers: connecting, the proof, the arena's descriptor. Does not cover: messages (`kvstore.protocol`), what comes after
(`kvstore.connection`).
"""

import os
import secrets
import socket
import time

from cluster.errors import UnavailableError
from kvstore.protocol import (
    LENGTH_BYTES,
    MAX_HANDSHAKE_BYTES,
    NONCE_BYTES,
    PROTOCOL_VERSION,
    Challenge,
    Proof,
    ProtocolError,
    Welcome,
    client_mac,
    decode_hello,
    encode,
    store_mac,
)


class StoreUnreachableError(UnavailableError):
    """No store answers on the socket."""


class StoreRefusedError(UnavailableError):
    """A store answers, but the two do not know the same secret, or speak another version."""


def shake_hands(sock: socket.socket, path: str, secret: bytes, client_name: str, stop_s: float) -> tuple[Welcome, int]:
    """Connect, and prove the secret to each other.

    Args:
        sock: Not connected yet.
        path: The store's unix socket.
        secret: The cluster's.
        client_name: For the store's log.
        stop_s: Monotonic time by which it must be over.

    Returns:
        The store's welcome, and the arena's descriptor, which the caller closes.

    Raises:
        StoreUnreachableError: Nobody answers in time.
        StoreRefusedError: Another secret or version.
    """
    fds: list[int] = []
    try:
        _set_timeout(sock, stop_s)
        sock.connect(path)
        challenge = decode_hello(_receive_hello(sock, stop_s, fds))
        if not isinstance(challenge, Challenge) or challenge.version != PROTOCOL_VERSION:
            raise StoreRefusedError(f"the store does not speak version {PROTOCOL_VERSION}")
        nonce = secrets.token_bytes(NONCE_BYTES)
        mac = client_mac(secret, challenge=challenge.nonce, nonce=nonce, client_name=client_name)
        sock.sendall(encode(Proof(client_name, nonce, mac)))
        welcome = decode_hello(_receive_hello(sock, stop_s, fds))
        if not isinstance(welcome, Welcome) or len(fds) != 1:
            raise StoreRefusedError("the store did not welcome this client")
        expected = store_mac(secret, challenge=challenge.nonce, nonce=nonce, epoch=welcome.epoch)
        if not secrets.compare_digest(expected, welcome.mac):
            raise StoreRefusedError("the store does not know the cluster's secret")
        return welcome, fds.pop()
    except ProtocolError as error:
        raise StoreRefusedError(f"handshake failed: {error}") from error
    except OSError as error:
        raise StoreUnreachableError(f"no store at {path}: {error}") from error
    finally:
        for fd in fds:
            os.close(fd)


def _receive_hello(sock: socket.socket, stop_s: float, fds: list[int]) -> bytes:
    data = b""
    wanted = LENGTH_BYTES
    while len(data) < wanted:
        _set_timeout(sock, stop_s)
        part, new_fds, _, _ = socket.recv_fds(sock, wanted - len(data), 2, socket.MSG_CMSG_CLOEXEC)
        fds += new_fds
        if not part:
            raise ProtocolError("the store closed the connection")
        data += part
        if len(data) == LENGTH_BYTES:
            length = int.from_bytes(data, "little")
            if length > MAX_HANDSHAKE_BYTES:
                raise ProtocolError(f"handshake message of {length} bytes")
            wanted += length
    return data[LENGTH_BYTES:]


def _set_timeout(sock: socket.socket, stop_s: float) -> None:
    left_s = stop_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("deadline passed during the handshake")
    sock.settimeout(left_s)
