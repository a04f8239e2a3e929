"""Hostile frames are refused by name, whatever msgspec makes of them."""

from collections.abc import Callable

import msgspec
import pytest

from kvstore.protocol import ProtocolError, decode_hello, decode_reply, decode_request

NOT_UTF8 = msgspec.msgpack.encode("ab").replace(b"ab", b"\xff\xfe")
START = b"\x94" + msgspec.msgpack.encode("Proof")


@pytest.mark.parametrize("decode", [decode_hello, decode_request, decode_reply])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        NOT_UTF8,
        b"\x91" + NOT_UTF8,
        START + NOT_UTF8 + msgspec.msgpack.encode(bytes(16)) + msgspec.msgpack.encode(b"mac"),
        b"\x91" * 100_000,
    ],
    ids=["empty", "unused byte", "text", "tag", "client name", "deep"],
)
def test_hostile_frame_is_a_protocol_error(decode: Callable[[bytes], object], body: bytes) -> None:
    """Anything else would end the handshake of a stranger, who has proven nothing, with an unexpected error."""
    with pytest.raises(ProtocolError):
        decode(body)
