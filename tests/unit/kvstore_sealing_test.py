"""Sealed records: right bytes or an error by name, whatever is changed, exchanged or missing."""

import hashlib
import hmac
import struct
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cluster.errors import DataError, SettingsError
from kvstore.container import (
    ALIGN,
    ChunkCorruptError,
    ChunkMismatchError,
    RecordError,
    checksum,
    encode_header,
    encode_record,
    packed_meta,
    parse_header,
    parse_record,
    stored_bytes,
)
from kvstore.interfaces import ChunkMeta
from kvstore.keys import ChunkKey
from kvstore.sealing import (
    OVERHEAD_BYTES,
    OtherStoreKeyError,
    RecordTamperedError,
    Sealer,
    plain_payload_bytes,
    sealed_payload_bytes,
    store_keys,
)
from kvstore.settings import STORE_KEY_VARIABLE
from kvstore.testing.samples import sample_key, sample_meta, sample_payload

MASTER = bytes(range(32))
OTHER = bytes(range(1, 33))
GOLDEN = Path(__file__).parent.parent / "golden"
GOLDEN_MASTER = hashlib.sha256(b"key of the golden sealed record").digest()


def sample_record(index: int = 1, *, size: int = 5000, tenant: str = "a") -> bytearray:
    meta = msgspec.structs.replace(sample_meta(), tenant=tenant, learned_unix_s=1.5)
    return encode_record(sample_key(index), meta, sample_payload(index, size))


def seal(record: bytearray, *, key: ChunkKey, sealer: Sealer | None = None) -> bytearray:
    room = memoryview(bytearray(stored_bytes(len(record) + OVERHEAD_BYTES)))
    return bytearray((sealer or Sealer([MASTER])).seal(memoryview(record), into=room, expected_key=key))


def unseal(
    sealed: bytes | bytearray, *, key: ChunkKey, num_bytes: int, sealer: Sealer | None = None
) -> tuple[bytearray, ChunkMeta]:
    plain = bytearray(b"\xee") * num_bytes
    header = (sealer or Sealer([MASTER])).open(memoryview(sealed), into=memoryview(plain), expected_key=key)
    return plain, header.meta


def sign_again(record: bytearray) -> bytearray:
    """With right checksums: what an attacker can do without the key."""
    payload_bytes = int.from_bytes(record[64:72], "little")
    record[80:88] = checksum(bytes(record[ALIGN : ALIGN + payload_bytes])).to_bytes(8, "little")
    record[24:32] = bytes(8)
    record[24:32] = checksum(bytes(record[:ALIGN])).to_bytes(8, "little")
    return record


def derive(master: bytes, info: bytes, num_bytes: int) -> bytes:
    """HKDF-SHA256 (RFC 5869) by hand, for up to 32 bytes."""
    extracted = hmac.new(bytes(32), master, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\1", hashlib.sha256).digest()[:num_bytes]


def identity(sealed: bytes | bytearray) -> bytes:
    header = parse_header(sealed, expected_sealed=True)
    numbers = struct.pack("<32sQ", header.key, header.payload_bytes)
    return b"learnonce sealed record 1" + numbers + packed_meta(header.meta)


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 524_288 - 4096, 524_288, 1_100_003])
@pytest.mark.parametrize("tenant", ["", "a", "ü" * 64])
def test_what_was_sealed_is_opened(size: int, tenant: str) -> None:
    record = sample_record(size=size, tenant=tenant)
    sealed = seal(record, key=sample_key(1))
    header, payload = parse_record(sealed, expected_key=sample_key(1), expected_sealed=True)
    assert len(payload) == sealed_payload_bytes(size)
    assert plain_payload_bytes(len(payload)) == size
    opened, meta = unseal(sealed, key=sample_key(1), num_bytes=len(record))
    assert opened == record
    assert meta == header.meta == parse_header(record).meta


def test_a_record_of_version_1_is_sealed_as_it_is() -> None:
    record = bytearray((GOLDEN / "kvstore_record_v1.bin").read_bytes())
    key = parse_header(record).key
    assert unseal(seal(record, key=key), key=key, num_bytes=len(record))[0] == record


def test_golden_sealed_record_is_opened() -> None:
    plain = (GOLDEN / "kvstore_record_v2.bin").read_bytes()
    sealed = (GOLDEN / "kvstore_sealed_v2.bin").read_bytes()
    key = parse_header(plain).key
    opened, _ = unseal(sealed, key=key, num_bytes=len(plain), sealer=Sealer([GOLDEN_MASTER]))
    assert opened == plain


def test_the_format_is_what_the_module_says() -> None:
    """Sealed here, opened by another implementation of AES-GCM and HKDF; and the reverse."""
    record = sample_record(tenant="tenant 7")
    sealed = seal(record, key=sample_key(1))
    payload = bytes(parse_record(sealed, expected_sealed=True)[1])
    plain = bytes(record[: ALIGN + 5000])
    tenant_key = derive(MASTER, b"learnonce tenant key 1\0tenant 7", 32)
    assert payload[:4] == b"GCM1"
    assert payload[4:12] == derive(MASTER, b"learnonce key id 1", 8)
    assert AESGCM(tenant_key).decrypt(payload[12:24], payload[24:], identity(sealed)) == plain
    other = AESGCM(tenant_key).encrypt(bytes(12), plain, identity(sealed))
    made = bytearray(sealed)
    made[ALIGN : ALIGN + len(payload)] = payload[:12] + bytes(12) + other
    assert unseal(sign_again(made), key=sample_key(1), num_bytes=len(record))[0] == record


def test_plaintext_does_not_appear() -> None:
    record = sample_record(size=100_000)
    sealed = seal(record, key=sample_key(1))
    payload = bytes(record[ALIGN:])
    assert not any(payload[at : at + 8] in sealed for at in range(0, 99_000, 500))
    # Nor a fingerprint of it: the plain checksum would tell which of two guesses is right.
    assert bytes(record[80:88]) not in bytes(sealed)


def test_two_sealings_share_nothing() -> None:
    record = sample_record(size=100_000)
    first, second = (bytes(seal(record, key=sample_key(1))[ALIGN + 12 :]) for _ in range(2))
    same = sum(a == b for a, b in zip(first, second, strict=True))
    assert same / len(first) < 0.05  # padding, and one byte in 256


# The prefix, ciphertext of header and payload, the tag.
@pytest.mark.parametrize("at_byte", [0, 4, 12, 23, 24, 24 + 100, 24 + 4096, 24 + 9095, 24 + 9096, 24 + 9111])
@pytest.mark.parametrize("is_signed", [False, True])
def test_flipped_bit_is_refused(at_byte: int, is_signed: bool) -> None:
    record = sample_record()
    sealed = seal(record, key=sample_key(1))
    sealed[ALIGN + at_byte] ^= 1
    if is_signed:
        sign_again(sealed)
    with pytest.raises({0: ChunkCorruptError, 4: OtherStoreKeyError}.get(at_byte, DataError)):
        unseal(sealed, key=sample_key(1), num_bytes=len(record))


def test_attacker_who_knows_the_plaintext_cannot_change_it() -> None:
    """The cipher is a stream: who knows the plain record can turn it into another sound one. Only the tag tells."""
    record = sample_record(1)
    wanted = encode_record(sample_key(1), parse_header(record).meta, sample_payload(2, 5000))
    sealed = seal(record, key=sample_key(1))
    difference = bytes(a ^ b for a, b in zip(record, wanted, strict=True))[: ALIGN + 5000]
    start = ALIGN + 24
    changed = bytes(a ^ b for a, b in zip(sealed[start : start + len(difference)], difference, strict=True))
    sealed[start : start + len(difference)] = changed
    with pytest.raises(RecordTamperedError):
        unseal(sign_again(sealed), key=sample_key(1), num_bytes=len(record))


def test_tag_covers_the_outer_header() -> None:
    """Ciphertext under the right tenant's key, but made for other metadata, length or key, has a wrong tag."""
    record = sample_record()
    sealed = seal(record, key=sample_key(1))
    header = parse_header(sealed, expected_sealed=True)
    plain = bytes(record[: ALIGN + 5000])
    cipher = AESGCM(derive(MASTER, b"learnonce tenant key 1\0a", 32))
    right = identity(sealed)
    for wrong in (b"", right[:-1], right.replace(sample_key(1), sample_key(2)), right[:57] + b"\0" * 8 + right[65:]):
        made = bytearray(sealed)
        made[ALIGN + 24 : ALIGN + header.payload_bytes] = cipher.encrypt(
            bytes(made[ALIGN + 12 : ALIGN + 24]), plain, wrong
        )
        with pytest.raises(RecordTamperedError):
            unseal(sign_again(made), key=sample_key(1), num_bytes=len(record))


@pytest.mark.parametrize(
    "change",
    [
        {"num_tokens": 4},
        {"base_position": 1},
        {"codec": "other"},
        {"tenant": "b"},
        {"tenant": ""},
        {"learned_unix_s": 2.0},
    ],
)
def test_changed_metadata_is_refused(change: dict[str, object]) -> None:
    """Also with right checksums: all of it is covered by the tag, or chooses another key."""
    record = sample_record()
    sealed = seal(record, key=sample_key(1))
    outer = parse_header(sealed, expected_sealed=True)
    sealed[:ALIGN] = encode_header(
        outer.key,
        msgspec.structs.replace(outer.meta, **change),
        payload_bytes=outer.payload_bytes,
        payload_checksum=outer.payload_checksum,
        is_sealed=True,
    )
    with pytest.raises((RecordTamperedError, ChunkCorruptError)):
        unseal(sealed, key=sample_key(1), num_bytes=len(record))


def test_records_cannot_be_exchanged() -> None:
    """Neither under each other's names as they are, nor with the name changed."""
    one, two = (seal(sample_record(index), key=sample_key(index)) for index in (1, 2))
    with pytest.raises(ChunkMismatchError):
        unseal(two, key=sample_key(1), num_bytes=12_288)
    renamed = bytearray(two)
    renamed[32:64] = sample_key(1)
    with pytest.raises((RecordTamperedError, ChunkMismatchError)):
        unseal(sign_again(renamed), key=sample_key(1), num_bytes=12_288)
    grafted = bytearray(one[:ALIGN]) + two[ALIGN:]
    with pytest.raises((RecordTamperedError, ChunkMismatchError)):
        unseal(sign_again(grafted), key=sample_key(1), num_bytes=12_288)


def test_records_of_two_tenants_cannot_be_exchanged() -> None:
    """The same chunk key, written for two tenants."""
    one, two = (seal(sample_record(tenant=tenant), key=sample_key(1)) for tenant in ("a", "b"))
    grafted = bytearray(one[:ALIGN]) + two[ALIGN:]
    with pytest.raises((RecordTamperedError, ChunkCorruptError)):
        unseal(sign_again(grafted), key=sample_key(1), num_bytes=12_288)


def test_other_master_key_is_told_from_tampering() -> None:
    sealed = seal(sample_record(), key=sample_key(1))
    with pytest.raises(OtherStoreKeyError):
        unseal(sealed, key=sample_key(1), num_bytes=12_288, sealer=Sealer([OTHER]))


def test_former_keys_open_and_the_first_seals() -> None:
    record = sample_record()
    old = seal(record, key=sample_key(1), sealer=Sealer([MASTER]))
    both = Sealer([OTHER, MASTER])
    assert unseal(old, key=sample_key(1), num_bytes=len(record), sealer=both)[0] == record
    new = seal(record, key=sample_key(1), sealer=both)
    assert unseal(new, key=sample_key(1), num_bytes=len(record), sealer=Sealer([OTHER]))[0] == record


def test_damage_before_sealing_is_found_when_opened() -> None:
    """A record that went bad in the arena does not become good by being encrypted."""
    for at_byte in (ALIGN, ALIGN + 4999):
        record = sample_record()
        record[at_byte] ^= 1
        sealed = seal(record, key=sample_key(1))
        with pytest.raises(ChunkCorruptError, match="checksum"):
            unseal(sealed, key=sample_key(1), num_bytes=len(record))


@pytest.mark.parametrize("what", ["garbage", "another key", "cut", "with a tail", "sealed"])
def test_only_a_plain_record_of_the_key_is_sealed(what: str) -> None:
    record = sample_record()
    hostile = {
        "garbage": bytearray(sample_payload(1, 8192)),
        "another key": sample_record(2),
        "cut": record[:-ALIGN],
        "with a tail": record + bytes(ALIGN),
        "sealed": seal(record, key=sample_key(1)),
    }[what]
    with pytest.raises(DataError):
        seal(hostile, key=sample_key(1))


@pytest.mark.parametrize("what", ["plain", "cut", "with a tail", "short payload", "room too small", "room too large"])
def test_what_is_no_sealed_record_is_refused(what: str) -> None:
    record = sample_record()
    sealed = seal(record, key=sample_key(1))
    num_bytes = len(record) + {"room too small": -ALIGN, "room too large": ALIGN}.get(what, 0)
    meta = parse_header(record).meta
    short = bytearray(stored_bytes(OVERHEAD_BYTES))
    short[:ALIGN] = encode_header(sample_key(1), meta, payload_bytes=OVERHEAD_BYTES, payload_checksum=0, is_sealed=True)
    hostile = {"plain": record, "cut": sealed[:-ALIGN], "with a tail": sealed + bytes(ALIGN), "short payload": short}
    with pytest.raises(DataError):
        unseal(hostile.get(what, sealed), key=sample_key(1), num_bytes=num_bytes)


def test_too_long_a_record_for_one_nonce_is_refused() -> None:
    sealer = Sealer([MASTER], max_plain_bytes=ALIGN + 5000)
    seal(sample_record(size=5000), key=sample_key(1), sealer=sealer)
    with pytest.raises(RecordError, match="cannot be sealed"):
        seal(sample_record(size=5001), key=sample_key(1), sealer=sealer)
    with pytest.raises(RecordError, match="room"):
        Sealer([MASTER]).seal(memoryview(sample_record()), into=memoryview(bytearray(8192)), expected_key=sample_key(1))


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STORE_KEY_VARIABLE, MASTER.hex())
    assert store_keys() == (MASTER,)
    monkeypatch.setenv(STORE_KEY_VARIABLE, f"{OTHER.hex()}, {MASTER.hex()}")
    assert store_keys() == (OTHER, MASTER)


@pytest.mark.parametrize("text", [None, "", "  ", "zz" * 32, "ab" * 31, "ab" * 33, MASTER.hex() + ",", "secret"])
def test_bad_key_is_a_settings_error_that_says_how_to_make_one(
    monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    monkeypatch.delenv(STORE_KEY_VARIABLE, raising=False)
    if text is not None:
        monkeypatch.setenv(STORE_KEY_VARIABLE, text)
    with pytest.raises(SettingsError, match="openssl rand -hex 32") as caught:
        store_keys()
    assert STORE_KEY_VARIABLE in str(caught.value)
    assert not text or not text.strip() or text.strip(" ,") not in str(caught.value), "the key is in the message"


@pytest.mark.parametrize("keys", [[], [bytes(16)], [MASTER, b""]])
def test_sealer_refuses_keys_of_another_length(keys: list[bytes]) -> None:
    with pytest.raises(SettingsError, match="32 bytes"):
        Sealer(keys)
