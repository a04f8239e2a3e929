"""Records in pieces and behind a cipher: what comes out is what went in, or nothing."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import DataError
from kvstore.container import (
    ALIGN,
    MAX_TENANT_CHARS,
    RecordVerifier,
    encode_record,
    parse_header,
    parse_record,
)
from kvstore.keys import ChunkKey
from kvstore.sealing import Sealer
from kvstore.testing.samples import sample_key, sample_meta, sample_payload

SEALER = Sealer([bytes(range(32))])
KEY = sample_key(1)
RECORD = encode_record(KEY, sample_meta(), sample_payload(1, 5000))
TENANTS = st.text(max_size=MAX_TENANT_CHARS).filter(lambda text: text.isprintable())


def seal(record: bytearray, key: ChunkKey) -> bytearray:
    room = memoryview(bytearray(len(record) + 3 * ALIGN))
    return bytearray(SEALER.seal(memoryview(record), into=room, expected_key=key))


SEALED = seal(RECORD, KEY)


@given(st.binary(min_size=32, max_size=32), TENANTS, st.floats(0, 1e12), st.binary(min_size=1, max_size=20_000))
@settings(deadline=None)
def test_any_chunk_survives_sealing(key: bytes, tenant: str, learned_unix_s: float, payload: bytes) -> None:
    meta = msgspec.structs.replace(sample_meta(), tenant=tenant, learned_unix_s=learned_unix_s)
    record = encode_record(ChunkKey(key), meta, payload)
    into = bytearray(len(record))
    header = SEALER.open(memoryview(seal(record, ChunkKey(key))), into=memoryview(into), expected_key=ChunkKey(key))
    assert into == record
    assert header == parse_header(record)


@given(st.integers(0, ALIGN + 24 + ALIGN + 5000 + 16 - 1), st.integers(1, 255))
def test_any_flip_of_a_sealed_record_is_refused(at_byte: int, flip: int) -> None:
    """Header, prefix, ciphertext and tag; the padding behind them is the inner tier's to look at."""
    damaged = bytearray(SEALED)
    damaged[at_byte] ^= flip
    with pytest.raises(DataError):
        SEALER.open(memoryview(damaged), into=memoryview(bytearray(len(RECORD))), expected_key=KEY)
    with pytest.raises(DataError):
        parse_record(damaged, expected_sealed=True)


@given(st.binary(max_size=3 * ALIGN))
def test_any_bytes_are_not_opened(data: bytes) -> None:
    with pytest.raises(DataError):
        SEALER.open(memoryview(data), into=memoryview(bytearray(len(RECORD))), expected_key=KEY)


@given(st.lists(st.integers(0, len(RECORD)), max_size=20), st.none() | st.integers(0, len(RECORD) - 1))
def test_arrival_in_any_steps_is_judged_as_the_whole(steps: list[int], flipped: int | None) -> None:
    record = bytearray(RECORD)
    if flipped is not None:
        record[flipped] ^= 1
    verifier = RecordVerifier(memoryview(record), expected_key=KEY)
    try:
        for step in [*sorted(steps), len(record)]:
            verifier(step)
        header = verifier.finish()
    except DataError:
        assert flipped is not None
        with pytest.raises(DataError):
            parse_record(record, expected_key=KEY)
    else:
        assert flipped is None
        assert header == parse_record(record, expected_key=KEY)[0]
