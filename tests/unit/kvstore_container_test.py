"""Records: what is encoded is parsed, the golden files stay readable, damage is named."""

import math
from pathlib import Path

import msgspec
import pytest

from kvstore.container import (
    ALIGN,
    MAX_PAYLOAD_BYTES,
    MAX_TENANT_CHARS,
    ChunkCorruptError,
    ChunkMismatchError,
    RecordError,
    RecordVerifier,
    checksum,
    encode_header,
    encode_record,
    entry_of,
    parse_header,
    parse_record,
    stored_bytes,
)
from kvstore.interfaces import ChunkMeta, TierEntry
from kvstore.testing.samples import sample_key, sample_meta, sample_payload

GOLDEN = Path(__file__).parent.parent / "golden"
GOLDEN_V1, GOLDEN_V2 = GOLDEN / "kvstore_record_v1.bin", GOLDEN / "kvstore_record_v2.bin"
GOLDEN_KEY = bytes(range(32))
GOLDEN_META = ChunkMeta(
    num_tokens=266, num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16", base_position=1234, codec="raw"
)
GOLDEN_META_V2 = msgspec.structs.replace(GOLDEN_META, tenant="tenant/7 ü", learned_unix_s=1_790_000_000.25)
GOLDEN_PAYLOAD = b"learned once " * 400


def test_golden_record_of_version_1_is_read() -> None:
    header, payload = parse_record(GOLDEN_V1.read_bytes(), expected_key=GOLDEN_KEY)
    assert (header.key, header.meta, bytes(payload)) == (GOLDEN_KEY, GOLDEN_META, GOLDEN_PAYLOAD)
    assert (header.meta.tenant, header.meta.learned_unix_s, header.is_sealed) == ("", 0.0, False)


def test_golden_record_of_version_2_is_read() -> None:
    header, payload = parse_record(GOLDEN_V2.read_bytes(), expected_key=GOLDEN_KEY)
    assert (header.key, header.meta, bytes(payload)) == (GOLDEN_KEY, GOLDEN_META_V2, GOLDEN_PAYLOAD)


def test_golden_record_of_version_2_is_written() -> None:
    assert bytes(encode_record(GOLDEN_KEY, GOLDEN_META_V2, GOLDEN_PAYLOAD)) == GOLDEN_V2.read_bytes()


def test_version_1_has_none_of_the_fields_of_version_2() -> None:
    header = bytearray(encode_record(GOLDEN_KEY, GOLDEN_META_V2, GOLDEN_PAYLOAD)[:ALIGN])
    header[8] = 1
    with pytest.raises(ChunkCorruptError, match="version 1"):
        parse_header(sign_again(header))


@pytest.mark.parametrize(("version", "flags"), [(0, 0), (1, 1), (2, 2), (2, 3), (2, 0x8000), (3, 0), (3, 1), (258, 0)])
def test_unknown_version_or_flag_is_corrupt(version: int, flags: int) -> None:
    header = bytearray(encode_header(sample_key(1), sample_meta(), payload_bytes=10, payload_checksum=0))
    header[8:12] = version.to_bytes(2, "little") + flags.to_bytes(2, "little")
    with pytest.raises(ChunkCorruptError, match="version"):
        parse_header(sign_again(header), expected_sealed=None)


def test_sealed_and_plain_records_are_not_taken_for_each_other() -> None:
    for is_sealed in (False, True):
        header = encode_header(sample_key(1), sample_meta(), payload_bytes=10, payload_checksum=0, is_sealed=is_sealed)
        for expected in (is_sealed, None):
            assert parse_header(header, expected_sealed=expected).is_sealed is is_sealed
        with pytest.raises(ChunkMismatchError, match="sealed"):
            parse_header(header, expected_sealed=not is_sealed)
    with pytest.raises(ChunkMismatchError):
        parse_header(header)  # the default: who knows nothing of sealing never takes ciphertext for KV


def test_books_get_what_the_header_says() -> None:
    header = parse_header(GOLDEN_V2.read_bytes())
    assert entry_of(header) == TierEntry(
        payload_bytes=len(GOLDEN_PAYLOAD),
        stored_bytes=GOLDEN_V2.stat().st_size,
        num_tokens=266,
        base_position=1234,
        codec="raw",
        tenant="tenant/7 ü",
        learned_unix_s=1_790_000_000.25,
    )


@pytest.mark.parametrize("steps", [(20_480,), (1, 4095, 4096, 4097, 20_480), (10_000, 10_000, 30_000), ()])
def test_record_is_verified_as_it_arrives(steps: tuple[int, ...]) -> None:
    record = encode_record(sample_key(1), sample_meta(), sample_payload(1, 15_000))
    assert len(record) == 20_480
    verifier = RecordVerifier(memoryview(record), expected_key=sample_key(1))
    for step in steps:
        verifier(step)
    if steps:
        assert verifier.finish() == parse_record(record)[0]
    else:
        with pytest.raises(ChunkCorruptError, match="arrived"):
            verifier.finish()


def test_record_that_arrives_damaged_is_refused_as_early_as_can_be() -> None:
    record = encode_record(sample_key(1), sample_meta(), sample_payload(1, 15_000))
    with pytest.raises(ChunkMismatchError):
        RecordVerifier(memoryview(record), expected_key=sample_key(2))(ALIGN)
    with pytest.raises(ChunkCorruptError, match="should have"):
        RecordVerifier(memoryview(record)[:-ALIGN])(ALIGN)
    verifier = RecordVerifier(memoryview(record))
    verifier(12_000)
    with pytest.raises(ChunkCorruptError, match="arrived"):
        verifier.finish()
    record[15_000] ^= 1
    verifier(len(record))
    with pytest.raises(ChunkCorruptError, match="checksum"):
        verifier.finish()


def test_checksum_is_what_its_name_says() -> None:
    # Test vectors of XXH3 (64 bits, seed 0) from its specification.
    assert (checksum(b""), checksum(b"a")) == (0x2D06800538D394C2, 0xE6C632B61E964E1F)


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097])
def test_payload_is_a_view_into_the_record(size: int) -> None:
    record = encode_record(sample_key(1), sample_meta(), bytes(size))
    assert len(record) == stored_bytes(size)
    _, payload = parse_record(record)
    assert len(payload) == size
    assert payload.obj is record


@pytest.mark.parametrize(
    ("at_byte", "value"),
    [
        (0, b"X"),  # magic
        (8, b"\x03"),  # version
        (10, b"\x02"),  # flags
        (12, b"\xff\xff\xff\xff"),  # metadata length
        (16, b"crc32\0\0\0"),  # checksum name
        (64, b"\xff" * 8),  # payload length
        (72, b"\xff" * 8),  # stored length
        (88, b"\xc1"),  # metadata: a byte that msgpack never uses
    ],
)
@pytest.mark.parametrize("is_signed", [False, True])
def test_wrong_field_is_corrupt(at_byte: int, value: bytes, is_signed: bool) -> None:
    header = bytearray(encode_header(sample_key(1), sample_meta(), payload_bytes=10, payload_checksum=0))
    header[at_byte : at_byte + len(value)] = value
    if is_signed:
        # Also with a right header checksum: whoever computes it again must not make us allocate or believe.
        sign_again(header)
    with pytest.raises(ChunkCorruptError):
        parse_header(header)


def test_record_of_another_key_is_a_mismatch() -> None:
    record = encode_record(sample_key(1), sample_meta(), b"abc")
    with pytest.raises(ChunkMismatchError):
        parse_record(record, expected_key=sample_key(2))


@pytest.mark.parametrize("cut", [0, 1, ALIGN - 1, ALIGN, ALIGN + 3, 2 * ALIGN - 1])
def test_cut_record_is_corrupt(cut: int) -> None:
    record = encode_record(sample_key(1), sample_meta(), b"abc")
    with pytest.raises(ChunkCorruptError):
        parse_record(record[:cut])


@pytest.mark.parametrize(
    ("meta", "payload_bytes"),
    [
        (sample_meta(0), 10),
        (sample_meta(-1), 10),
        (sample_meta(1 << 31), 10),
        (sample_meta(base_position=-1), 10),
        (sample_meta(), 0),
        (sample_meta(), MAX_PAYLOAD_BYTES + 1),
        (msgspec.structs.replace(sample_meta(), dtype="x" * 5000), 10),
        (msgspec.structs.replace(sample_meta(), tenant="x" * (MAX_TENANT_CHARS + 1)), 10),
        (msgspec.structs.replace(sample_meta(), tenant="a\nb"), 10),
        (msgspec.structs.replace(sample_meta(), learned_unix_s=-1.0), 10),
        (msgspec.structs.replace(sample_meta(), learned_unix_s=math.nan), 10),
        (msgspec.structs.replace(sample_meta(), learned_unix_s=math.inf), 10),
    ],
)
def test_chunk_that_no_record_can_hold_is_refused(meta: ChunkMeta, payload_bytes: int) -> None:
    with pytest.raises(RecordError):
        encode_header(sample_key(1), meta, payload_bytes=payload_bytes, payload_checksum=0)


def test_metadata_out_of_bounds_is_refused_by_the_reader_too() -> None:
    """Whoever wrote it: the header's own checksum is right."""
    for change in ({"tenant": "x" * 65}, {"tenant": "\x1b[2J"}, {"learned_unix_s": math.nan}, {"num_tokens": 0}):
        packed = msgspec.msgpack.encode(msgspec.structs.replace(sample_meta(), **change))
        header = bytearray(encode_header(sample_key(1), sample_meta(), payload_bytes=10, payload_checksum=0))
        header[12:16] = len(packed).to_bytes(4, "little")
        header[88 : 88 + len(packed)] = packed
        with pytest.raises(ChunkCorruptError, match="out of bounds"):
            parse_header(sign_again(header))


def sign_again(header: bytearray) -> bytearray:
    """With a right checksum, as whoever computes it would."""
    header[24:32] = bytes(8)
    header[24:32] = checksum(header[:ALIGN]).to_bytes(8, "little")
    return header
