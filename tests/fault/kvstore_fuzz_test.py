"""A million hostile inputs: none crashes a parser of the store, and none is believed.

Every parser of bytes that come from a disk, a bucket, a socket or a header is fed mutations of valid inputs, splices of
two of them, and garbage: as they are, and ("signed") made again with right checksums or MACs, as a broken writer or an
insider could. Allowed are the errors that the caller takes for a miss. What is believed must be right.
"""

import base64
import hmac
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from support.fuzzing import Outcome, Target, attack, samples_of

from kvstore import events, peer_protocol, protocol, wire
from kvstore.container import (
    ALIGN,
    MAX_TENANT_CHARS,
    RecordError,
    checksum,
    encode_header,
    encode_record,
    parse_header,
    parse_record,
)
from kvstore.interfaces import TierEntry
from kvstore.keys import ChunkKey
from kvstore.sealing import OVERHEAD_BYTES, Sealer
from kvstore.testing.samples import sample_key, sample_meta, sample_payload
from kvstore.tiers.object_names import object_name, parse_name
from kvstore.transport import nixl_wire, tcp_wire

SECRET = b"a secret of a test cluster"
GOLDEN = Path(__file__).parent.parent / "golden"
QUICK_INPUTS = 100_000
FULL_INPUTS = 1_200_000


# Records.

METAS = (
    sample_meta(),
    msgspec.structs.replace(sample_meta(5, base_position=9), tenant="a tenant", learned_unix_s=1.79e9),
    msgspec.structs.replace(sample_meta(266), tenant="ü" * MAX_TENANT_CHARS, codec="int8"),
)
RECORDS = [
    bytes(encode_record(sample_key(1), METAS[0], sample_payload(1, 1))),
    bytes(encode_record(sample_key(1), METAS[1], sample_payload(2, 5000))),
    bytes(encode_record(sample_key(2), METAS[2], sample_payload(3, 4096))),
    (GOLDEN / "kvstore_record_v1.bin").read_bytes(),
    (GOLDEN / "kvstore_record_v2.bin").read_bytes(),
]
FIELDS = (0, 7, 8, 9, 10, 11, 12, 13, 16, 24, 32, 64, 65, 70, 72, 80, 88, 89, 100, 4095, 4096)


def sign_record(data: bytes) -> bytes:
    """With right checksums of header and payload, where they would be."""
    if len(data) < ALIGN:
        return data
    signed = bytearray(data)
    length = int.from_bytes(signed[64:72], "little")
    signed[80:88] = checksum(bytes(signed[ALIGN : ALIGN + min(length, len(signed))])).to_bytes(8, "little")
    signed[24:32] = bytes(8)
    signed[24:32] = checksum(bytes(signed[:ALIGN])).to_bytes(8, "little")
    return bytes(signed)


def believe_record(data: bytes) -> None:
    parse_record(data)
    assert data in RECORDS, "a record that nobody has written"


def believe_signed_record(data: bytes) -> None:
    """A writer may be broken, not the reader: everything that it returns is within its bounds."""
    header, payload = parse_record(data)
    assert (data[:8], data[16:24], data[32:64]) == (b"\x89LONCE\r\n", b"xxh3_64\0", header.key)
    assert int.from_bytes(data[8:10], "little") in (1, 2)
    assert data[10:12] == bytes(2)
    assert len(data) == header.stored_bytes == ALIGN + math.ceil(len(payload) / ALIGN) * ALIGN
    assert bytes(payload) == data[ALIGN : ALIGN + header.payload_bytes]
    assert not any(data[ALIGN + len(payload) :])
    meta = header.meta
    counts = (meta.num_tokens, meta.num_layers, meta.num_kv_heads, meta.head_dim, meta.base_position + 1)
    assert all(0 < count <= 1 << 31 for count in counts)
    assert len(meta.tenant) <= 64
    assert meta.tenant.isprintable()
    assert 0 <= meta.learned_unix_s < math.inf
    encode_header(header.key, meta, payload_bytes=header.payload_bytes, payload_checksum=0)


SEALER = Sealer([bytes(range(32))])
SEALED_PLAIN = {
    sample_key(index): bytes(encode_record(sample_key(index), METAS[index], sample_payload(index, 3000)))
    for index in range(3)
}


def sealed(key: ChunkKey) -> bytes:
    record = SEALED_PLAIN[key]
    room = memoryview(bytearray(len(record) + 3 * ALIGN))
    return bytes(SEALER.seal(memoryview(record), into=room, expected_key=key))


SEALED = [sealed(key) for key in SEALED_PLAIN]
SEALED_FIELDS = (*FIELDS, *(ALIGN + at for at in (0, 3, 4, 11, 12, 23, 24, 24 + ALIGN, 3000 + OVERHEAD_BYTES - 16)))


def believe_sealed(data: bytes) -> None:
    """Whatever the outer bytes say, what comes out is the chunk that was asked for, bit by bit."""
    key = sample_key(1)
    into = bytearray(len(SEALED_PLAIN[key]))
    header = SEALER.open(memoryview(data), into=memoryview(into), expected_key=key)
    assert into == SEALED_PLAIN[key], "other bytes than were sealed"
    assert header == parse_header(SEALED_PLAIN[key])


# What is said on the unix socket and between stores.

HELLOS = samples_of(protocol.Challenge | protocol.Proof | protocol.Welcome)
REQUESTS = samples_of(protocol.Request)
REPLIES = samples_of(protocol.Reply)
PEER_REQUESTS = samples_of(peer_protocol.PeerRequest)
PEER_REPLIES = samples_of(peer_protocol.PeerReply)


def believe_message(message: msgspec.Struct) -> None:
    """In the bounds that the server relies on, and good to be sent on."""
    again = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(again, type=type(message), strict=True) is not None
    for key in (*getattr(message, "keys", ()), getattr(message, "key", bytes(32))):
        assert len(key) == 32
    assert 0 <= getattr(message, "timeout_s", 0) <= 86_400
    assert len(getattr(message, "client_name", "")) <= 200
    assert len(getattr(message, "nonce", bytes(16))) == 16
    if isinstance(message, protocol.Reserve):
        try:
            encode_header(ChunkKey(message.key), message.meta, payload_bytes=message.payload_bytes, payload_checksum=0)
        except RecordError:
            return


STREAMS = [
    b"".join(len(body).to_bytes(4, "little") + body for body in group if len(body) <= 256)
    for group in (HELLOS, REQUESTS, REPLIES)
]


def believe_stream(data: bytes) -> None:
    """Frames are the stream's own bytes, in order; what waits for its end is bounded."""
    reader = protocol.FrameReader(max_bytes=256)
    frames: list[bytes] = []
    step = 1 + data[0] % 97 if data else 1
    try:
        for start in range(0, len(data), step):
            frames += reader.feed(data[start : start + step])
            assert len(reader._buffer) < 256 + protocol.LENGTH_BYTES + step
    finally:
        rebuilt = b"".join(len(frame).to_bytes(4, "little") + frame for frame in frames)
        assert data.startswith(rebuilt)


# Events and plans.


def bodies(messages: Sequence[msgspec.Struct]) -> list[bytes]:
    return [msgspec.msgpack.encode(message) for message in messages]


EVENT = events.ChunkEvent(
    change=events.ChunkChange.ADDED,
    key=sample_key(1),
    tier="host",
    num_bytes=10,
    num_tokens=3,
    codec="raw",
    node_id="n",
    epoch="e",
    seq=1,
)
BATCHES = [
    events.EventBatch(node_id="n", epoch="e", next_seq=1),
    events.EventBatch(node_id="n", epoch="e", next_seq=2, events=(EVENT,)),
]
SEALED_EVENTS = [events.seal(batch, secret=SECRET, tag=b"tag") for batch in BATCHES]
PLANS = [
    wire.Plan(request_id="r", expires_unix_s=10.0, deadline_unix_s=9.0),
    wire.Plan(
        request_id="r2",
        expires_unix_s=10.0,
        deadline_unix_s=9.0,
        mode=wire.Mode.REMOTE,
        prompt=wire.pack_tokens([1, 2, 3]),
        spans=(wire.Span(sample_key(1), 0, 3, wire.SpanKind.PREFIX, True, False),),
        prefill=(wire.Peer("p", "http://10.0.0.1:80"),),
        reasons=("because",),
    ),
]
SIGNED_PLANS = [wire.sign_plan(plan, secret=SECRET).encode() for plan in PLANS]


def believe_event(data: bytes) -> None:
    batch = events.unseal(data, events.EventBatch, secret=SECRET, tag=b"tag")
    assert data in SEALED_EVENTS
    assert batch in BATCHES


def believe_signed_event(data: bytes) -> None:
    assert isinstance(events.unseal(data, events.EventBatch, secret=SECRET, tag=b"tag"), events.EventBatch)


def believe_answer(data: bytes) -> None:
    assert isinstance(events.unseal(data, events._Answer, secret=SECRET, tag=b"tag"), events._Answer)


def believe_ask(data: bytes) -> None:
    assert isinstance(events.unseal(data, events._Ask, secret=SECRET, tag=b"tag"), events._Ask)


def sign_event(body: bytes) -> bytes:
    return hmac.digest(SECRET, b"tag" + body, "sha256") + body


def believe_plan(data: bytes) -> None:
    plan = wire.open_plan(data.decode("latin-1"), secret=SECRET, now_unix_s=1.0)
    # Base64 has several spellings; the plan has one.
    assert plan in PLANS


def believe_signed_plan(data: bytes) -> None:
    plan = wire.open_plan(data.decode("latin-1"), secret=SECRET, now_unix_s=1.0)
    assert plan.version == 1
    assert not plan.spans or plan.spans[-1].stop in (0, plan.num_prompt_tokens)


def sign_plan_body(body: bytes) -> bytes:
    packed = zlib.compress(body, 1)
    return base64.urlsafe_b64encode(hmac.digest(SECRET, b"learnonce plan 1" + packed, "sha256") + packed)


def sign_handle(body: bytes) -> bytes:
    return hmac.digest(SECRET, b"learnonce nixl handle 1" + body, "sha256") + body


# Data paths and names.

TCP_REQUESTS = [
    tcp_wire.encode_request(b"h" * tcp_wire.HANDLE_BYTES, offset=offset, length=length)
    for offset, length in ((0, 8192), (4096, 1 << 40))
]
TCP_RESPONSES = [tcp_wire.encode_response(status, 8192) for status in tcp_wire.Status]
NIXL_ADDRESS = nixl_wire.Address("n", "e", 1, 4096, 1 << 20, b"metadata")
NIXL_HANDLES = [nixl_wire.Handle("n-e-1", 8192, 12_288, bytes(16)), nixl_wire.Handle("n-e-2", 1, 1, b"t" * 16, b"a")]
SIGNED_ADDRESSES = [
    nixl_wire.encode_address(msgspec.structs.replace(NIXL_ADDRESS, generation=number), secret=SECRET)
    for number in (1, 2)
]
SIGNED_HANDLES = [nixl_wire.encode_handle(handle, secret=SECRET) for handle in NIXL_HANDLES]
ORDERS = samples_of(nixl_wire.Order)
REPORTS = samples_of(nixl_wire.Report)
NAMES = [
    object_name(
        sample_key(index),
        TierEntry(
            payload_bytes=10**index, stored_bytes=8192, num_tokens=3, base_position=7, codec=codec, tenant=tenant
        ),
    ).encode()
    for index, (codec, tenant) in enumerate((("raw", ""), ("int8", "tenant_7"), ("", "a tenant/ü")))
]


def believe_tcp_request(data: bytes) -> None:
    request = tcp_wire.parse_request(data)
    assert tcp_wire.encode_request(request.handle, offset=request.offset, length=request.length) == data
    assert 0 < request.length <= tcp_wire.MAX_LENGTH_BYTES
    assert 0 <= request.offset <= tcp_wire.MAX_LENGTH_BYTES


def believe_tcp_response(data: bytes) -> None:
    assert tcp_wire.encode_response(*tcp_wire.parse_response(data)) == data


def believe_tcp_address(data: bytes) -> None:
    host, port = tcp_wire.parse_address(data)
    assert host
    assert 0 < port < 1 << 16


def believe_name(data: bytes) -> None:
    """A name that is read is the name that would be written, and no other."""
    name = data.decode("latin-1")
    parsed = parse_name(name)
    if parsed is None:
        raise protocol.ProtocolError("no name of ours")
    key, entry = parsed
    assert object_name(key, entry) == name
    assert len(key) == 32
    assert entry.payload_bytes > 0


def believe_nixl_address(data: bytes) -> None:
    nixl_wire.decode_address(data, secret=SECRET)
    assert data in SIGNED_ADDRESSES


def believe_nixl_handle(data: bytes) -> None:
    nixl_wire.decode_handle(data, secret=SECRET)
    assert data in SIGNED_HANDLES


def believe_signed_handle(data: bytes) -> None:
    handle = nixl_wire.decode_handle(data, secret=SECRET)
    assert len(handle.token) == nixl_wire.TOKEN_BYTES
    assert handle.stored_bytes > 0


SIDECAR_REFUSALS = (nixl_wire.SidecarFrameError,)
TARGETS = [
    Target("record", RECORDS, believe_record, weight=6, offsets=FIELDS, min_reasons=6),
    Target(
        "record signed", RECORDS, believe_signed_record, weight=6, offsets=FIELDS, remake=sign_record, min_reasons=15
    ),
    Target("sealed", SEALED, believe_sealed, weight=4, offsets=SEALED_FIELDS, min_reasons=7),
    Target(
        "sealed signed", SEALED, believe_sealed, weight=4, offsets=SEALED_FIELDS, remake=sign_record, min_reasons=15
    ),
    Target("hello", HELLOS, lambda data: believe_message(protocol.decode_hello(data)), min_reasons=10),
    Target("request", REQUESTS, lambda data: believe_message(protocol.decode_request(data)), 2, min_reasons=20),
    Target("reply", REPLIES, lambda data: believe_message(protocol.decode_reply(data)), min_reasons=20),
    Target("stream", STREAMS, believe_stream, 2, offsets=(0, 1, 2, 3), min_reasons=1),
    Target(
        "peer request",
        PEER_REQUESTS,
        lambda data: believe_message(peer_protocol.decode_peer_request(data)),
        min_reasons=10,
    ),
    Target(
        "peer reply",
        PEER_REPLIES,
        lambda data: believe_message(peer_protocol.decode_peer_reply(data)),
        min_reasons=10,
    ),
    Target("event", SEALED_EVENTS, believe_event),
    Target("snapshot signed", samples_of(events._Answer), believe_answer, remake=sign_event, min_reasons=10),
    Target("snapshot request signed", samples_of(events._Ask), believe_ask, remake=sign_event, min_reasons=5),
    Target("event signed", bodies(BATCHES), believe_signed_event, remake=sign_event, min_reasons=10),
    Target("plan", SIGNED_PLANS, believe_plan),
    Target("plan signed", bodies(PLANS), believe_signed_plan, remake=sign_plan_body, min_reasons=10),
    Target("tcp request", TCP_REQUESTS, believe_tcp_request, offsets=(0, 4, 6, 8, 32, 40)),
    Target("tcp response", TCP_RESPONSES, believe_tcp_response, offsets=(0, 4, 6, 8)),
    Target(
        "tcp address",
        [b"127.0.0.1:80", b"[::1]:65535"],
        believe_tcp_address,
        refusals=(tcp_wire.AddressError,),
        min_reasons=1,
    ),
    Target("object name", NAMES, believe_name, min_reasons=1),
    Target("nixl address", SIGNED_ADDRESSES, believe_nixl_address, min_reasons=1),
    Target("nixl handle", SIGNED_HANDLES, believe_nixl_handle, min_reasons=1),
    Target(
        "nixl handle signed",
        bodies(NIXL_HANDLES),
        believe_signed_handle,
        remake=sign_handle,
    ),
    Target("nixl order", ORDERS, nixl_wire.decode_order, refusals=SIDECAR_REFUSALS, min_reasons=5),
    Target("nixl report", REPORTS, nixl_wire.decode_report, refusals=SIDECAR_REFUSALS, min_reasons=5),
]


def share(target: Target, total: int) -> int:
    """How many inputs a target gets; all shares together are at least `total`."""
    return math.ceil(total * target.weight / sum(target.weight for target in TARGETS))


def check(target: Target, total: int) -> Outcome:
    outcome = attack(target, inputs=share(target, total))
    assert outcome.inputs == share(target, total)
    assert outcome.believed + outcome.reasons.total() == outcome.inputs
    assert outcome.believed, "not even the valid inputs among them were believed"
    assert len(outcome.reasons) >= target.min_reasons, outcome.reasons
    return outcome


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_hostile_inputs_are_refused(target: Target) -> None:
    check(target, QUICK_INPUTS)


@pytest.mark.slow
def test_a_million_hostile_inputs_are_refused() -> None:
    outcomes = {target.name: check(target, FULL_INPUTS) for target in TARGETS}
    inputs = sum(outcome.inputs for outcome in outcomes.values())
    assert inputs >= 1_000_000
    print(json.dumps({name: {"inputs": o.inputs, "believed": o.believed} for name, o in outcomes.items()}, indent=1))
    print(f"{inputs} inputs")


def test_the_attack_itself_notices_a_parser_that_believes_or_crashes() -> None:
    """The check can fail: a reader without checksums, and one that raises what it should not."""

    def believe_anything(data: bytes) -> None:
        assert data in RECORDS

    def crash(data: bytes) -> None:
        int.from_bytes(data[64:72], "little") // data[64]

    for believe, words in ((believe_anything, "input"), (crash, "Error")):
        with pytest.raises(AssertionError, match=words):
            attack(Target("broken", RECORDS, believe, refusals=(IndexError,)), inputs=10_000)


def test_inputs_are_the_same_for_the_same_seed() -> None:
    target = TARGETS[0]
    assert attack(target, inputs=300).reasons == attack(target, inputs=300).reasons
    assert attack(target, inputs=300, seed=1).reasons != attack(target, inputs=300).reasons
