"""Frames and addresses of the TCP data path: what is no frame is no frame, whatever the bytes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.transport.tcp_wire import (
    HANDLE_BYTES,
    REQUEST_BYTES,
    RESPONSE_BYTES,
    AddressError,
    Status,
    WireError,
    encode_address,
    encode_request,
    encode_response,
    parse_address,
    parse_request,
    parse_response,
)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 1), ("::1", 65535), ("fe80::1%eth0", 80)])
def test_address_round_trip(host: str, port: int) -> None:
    assert parse_address(encode_address(host, port)) == (host, port)


@pytest.mark.parametrize(
    "address",
    [
        b"",
        b"1.2.3.4",
        b":80",
        b"1.2.3.4:",
        b"1.2.3.4:0",
        b"::1:65536",
        b"1.2.3.4:-1",
        b"host:1",
        b"\xff:1",
        b"1.2.3.4:x",
    ],
)
def test_garbage_address_is_a_bug_of_the_caller(address: bytes) -> None:
    with pytest.raises(AddressError):
        parse_address(address)


@settings(max_examples=2000, deadline=None)
@given(frame=st.binary(max_size=REQUEST_BYTES + 2), has_magic=st.booleans())
def test_request_parser_is_total(frame: bytes, has_magic: bool) -> None:
    """A request within bounds, or `WireError`; and what is believed encodes to the same bytes."""
    if has_magic:
        frame = (encode_request(bytes(HANDLE_BYTES), offset=0, length=1)[:8] + frame)[:REQUEST_BYTES]
    try:
        request = parse_request(frame)
    except WireError:
        return
    assert encode_request(request.handle, offset=request.offset, length=request.length) == frame


@settings(max_examples=2000, deadline=None)
@given(frame=st.binary(max_size=RESPONSE_BYTES + 2), has_magic=st.booleans())
def test_response_parser_is_total(frame: bytes, has_magic: bool) -> None:
    if has_magic:
        frame = (encode_response(Status.OK)[:6] + frame)[:RESPONSE_BYTES]
    try:
        status, length = parse_response(frame)
    except WireError:
        return
    assert encode_response(status, length) == frame
