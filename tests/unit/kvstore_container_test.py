"""Records: what is encoded is parsed, the golden file stays readable, damage is named."""

from pathlib import Path

import pytest

from kvstore.container import (
    ALIGN,
    MAX_PAYLOAD_BYTES,
    ChunkCorruptError,
    ChunkMismatchError,
    RecordError,
    checksum,
    encode_header,
    encode_record,
    parse_header,
    parse_record,
    stored_bytes,
)
from kvstore.interfaces import ChunkMeta
from kvstore.testing.samples import sample_key, sample_meta

GOLDEN = Path(__file__).parent.parent / "golden" / "kvstore_record_v1.bin"
GOLDEN_KEY = bytes(range(32))
GOLDEN_META = ChunkMeta(
    num_tokens=266, num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16", base_position=1234, codec="raw"
)
GOLDEN_PAYLOAD = b"learned once " * 400


def test_golden_record_of_version_1_is_read() -> None:
    header, payload = parse_record(GOLDEN.read_bytes(), expected_key=GOLDEN_KEY)
    assert (header.key, header.meta, bytes(payload)) == (GOLDEN_KEY, GOLDEN_META, GOLDEN_PAYLOAD)


def test_golden_record_of_version_1_is_written() -> None:
    assert bytes(encode_record(GOLDEN_KEY, GOLDEN_META, GOLDEN_PAYLOAD)) == GOLDEN.read_bytes()


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
        (8, b"\x02"),  # version
        (10, b"\x01"),  # flags
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
        header[24:32] = bytes(8)
        header[24:32] = checksum(header).to_bytes(8, "little")
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
        (ChunkMeta(num_tokens=1, num_layers=1, num_kv_heads=1, head_dim=1, dtype="x" * 5000, base_position=0), 10),
    ],
)
def test_chunk_that_no_record_can_hold_is_refused(meta: ChunkMeta, payload_bytes: int) -> None:
    with pytest.raises(RecordError):
        encode_header(sample_key(1), meta, payload_bytes=payload_bytes, payload_checksum=0)
