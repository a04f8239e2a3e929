"""Records at rest: sealed with AES-256-GCM under a key per tenant, opened only if not one bit differs.

Covers: keys and their derivation, what a sealed record looks like, sealing and opening in caller's memory.
Does not cover: where sealed records live (`kvstore.tiers.sealed`), the record itself (`kvstore.container`).

A sealed record is a record whose payload is the ciphertext of a whole plain record (its header and its payload, without
padding), and whose header has the flag for it. The payload, in bytes:

    offset  bytes  field
         0      4  format, `GCM1`
         4      8  key id: which master key
        12     12  nonce, random for each record
        24      n  AES-256-GCM ciphertext of the plain header (4096 bytes) and the plain payload
      24+n     16  tag

The tag also covers key, metadata and length of the outer header, so that records cannot be exchanged for each other,
and the plain header's own checksum travels inside, so that a record that was damaged before it was sealed is found out.

What stays readable: chunk keys (digests of tokens and salt), metadata (tenant, number of tokens, model shape, time) and
lengths. Memory is not protected, nor who reads what when (docs/adr/0011-records-at-rest.md).
"""

import os
import secrets
import struct
from collections.abc import Sequence
from typing import Final

import xxhash
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cluster.errors import DataError, SettingsError
from kvstore.container import (
    ALIGN,
    ChunkCorruptError,
    Header,
    RecordError,
    RecordVerifier,
    encode_header,
    packed_meta,
    parse_header,
    stored_bytes,
)
from kvstore.keys import ChunkKey
from kvstore.settings import STORE_KEY_VARIABLE

STORE_KEY_BYTES: Final = 32
FORMAT: Final = b"GCM1"
KEY_ID_BYTES: Final = 8
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
MAX_PLAIN_BYTES: Final = (1 << 36) - 32
"""What one nonce may encrypt (NIST SP 800-38D, 5.2.1.1)."""
OVERHEAD_BYTES: Final = ALIGN + len(FORMAT) + KEY_ID_BYTES + NONCE_BYTES + TAG_BYTES
"""Bytes by which a sealed payload is longer than the plain one."""

_PREFIX: Final = struct.Struct(f"<{len(FORMAT)}s{KEY_ID_BYTES}s{NONCE_BYTES}s")
_IDENTITY: Final = struct.Struct("<32sQ")
_IDENTITY_LABEL: Final = b"learnonce sealed record 1"
_TENANT_LABEL: Final = b"learnonce tenant key 1\0"
_KEY_ID_LABEL: Final = b"learnonce key id 1"
_PIECE_BYTES: Final = 512 << 10
"""Encrypted and hashed at once: still in the cache for the second step."""


class RecordTamperedError(DataError):
    """A sealed record that nobody with the key has made: changed, exchanged for another, or cut."""


class OtherStoreKeyError(DataError):
    """A record that was sealed with a master key that this store does not have: another cluster's, or a former one."""


def store_keys() -> tuple[bytes, ...]:
    """The master keys from the environment: the first seals, all open.

    Raises:
        SettingsError: None, or one that is not 32 bytes in hex; says how to make one.
    """
    help_text = f"make one with `openssl rand -hex {STORE_KEY_BYTES}` and give it to every node that shares records"
    text = os.environ.get(STORE_KEY_VARIABLE, "")
    if not text.strip():
        raise SettingsError(f"encrypt_at_rest is on, but {STORE_KEY_VARIABLE} is not set: {help_text}")
    keys = []
    for number, part in enumerate(text.split(","), start=1):
        try:
            key = bytes.fromhex(part)
        except ValueError:
            key = b""
        if len(key) != STORE_KEY_BYTES:
            # Never the value itself: messages end in logs.
            raise SettingsError(
                f"key {number} in {STORE_KEY_VARIABLE} is not {STORE_KEY_BYTES} bytes in hex "
                f"({2 * STORE_KEY_BYTES} digits; it has {len(part.strip())} characters): {help_text}"
            )
        keys.append(key)
    return tuple(keys)


def sealed_payload_bytes(payload_bytes: int) -> int:
    """Payload of the sealed record of a plain payload."""
    return payload_bytes + OVERHEAD_BYTES


def plain_payload_bytes(sealed_bytes: int) -> int | None:
    """The reverse; None for what is too short to be a sealed payload."""
    return sealed_bytes - OVERHEAD_BYTES if sealed_bytes > OVERHEAD_BYTES else None


class Sealer:
    """Seals and opens records. Safe for several threads.

    Args:
        master_keys: The first seals; all open. 32 random bytes each.
        max_plain_bytes: Longest record that is sealed; a bound of the cipher, smaller in tests.

    Raises:
        SettingsError: No key, or one of another length.
    """

    def __init__(self, master_keys: Sequence[bytes], *, max_plain_bytes: int = MAX_PLAIN_BYTES) -> None:
        if not master_keys or any(len(key) != STORE_KEY_BYTES for key in master_keys):
            raise SettingsError(f"a store key has {STORE_KEY_BYTES} bytes; got {[len(key) for key in master_keys]}")
        self._masters = {_derive(key, _KEY_ID_LABEL, KEY_ID_BYTES): key for key in master_keys}
        self.key_id = _derive(master_keys[0], _KEY_ID_LABEL, KEY_ID_BYTES)
        """Which key seals."""
        self._max_plain_bytes = max_plain_bytes

    def seal(self, record: memoryview, *, into: memoryview, expected_key: ChunkKey) -> memoryview:
        """Seal a plain record.

        Args:
            record: The plain record; its payload is not verified here, but when it is opened.
            into: At least as long as the sealed record, not overlapping.
            expected_key: Whose record it must be.

        Returns:
            The part of `into` that is the sealed record.

        Raises:
            RecordError: Too long for one nonce, or for `into`.
            ChunkCorruptError, ChunkMismatchError: `record` is no plain record of that key.
        """
        header = parse_header(record, expected_key=expected_key)
        if len(record) != header.stored_bytes:
            raise ChunkCorruptError(f"record should have {header.stored_bytes} bytes, has {len(record)}")
        plain_bytes = ALIGN + header.payload_bytes
        payload_bytes = sealed_payload_bytes(header.payload_bytes)
        total = stored_bytes(payload_bytes)
        if plain_bytes > self._max_plain_bytes or total > len(into):
            raise RecordError(
                f"a record of {plain_bytes} bytes cannot be sealed: at most {self._max_plain_bytes} bytes, "
                f"and {total} of room ({len(into)} given)"
            )
        nonce = secrets.token_bytes(NONCE_BYTES)
        encryptor = self._cipher(self.key_id, header.meta.tenant, modes.GCM(nonce)).encryptor()
        encryptor.authenticate_additional_data(_identity(header, payload_bytes))
        out = into[ALIGN : ALIGN + payload_bytes]
        _PREFIX.pack_into(out, 0, FORMAT, self.key_id, nonce)
        hashed = xxhash.xxh3_64(out[: _PREFIX.size])
        for start in range(0, plain_bytes, _PIECE_BYTES):
            stop = min(start + _PIECE_BYTES, plain_bytes)
            piece = out[_PREFIX.size + start : _PREFIX.size + stop]
            encryptor.update_into(record[start:stop], piece)
            hashed.update(piece)
        encryptor.finalize()
        out[-TAG_BYTES:] = encryptor.tag
        hashed.update(encryptor.tag)
        into[ALIGN + payload_bytes : total] = bytes(total - ALIGN - payload_bytes)
        into[:ALIGN] = encode_header(
            header.key, header.meta, payload_bytes=payload_bytes, payload_checksum=hashed.intdigest(), is_sealed=True
        )
        return into[:total]

    def open(self, sealed: memoryview, *, into: memoryview, expected_key: ChunkKey) -> Header:
        """Open a sealed record.

        Args:
            sealed: Hostile until proven sound; not changed.
            into: Exactly as long as the plain record, not overlapping. Holds anything after an error.
            expected_key: Whose record it must be.

        Returns:
            The plain record's header; the whole plain record is in `into`, and its payload's checksum is right.

        Raises:
            OtherStoreKeyError: Sealed with a key that is not here.
            RecordTamperedError: The tag is wrong.
            ChunkCorruptError, ChunkMismatchError: No sealed record of that key, or damaged before it was sealed.
        """
        outer = parse_header(sealed, expected_key=expected_key, expected_sealed=True)
        plain_bytes = plain_payload_bytes(outer.payload_bytes)
        if plain_bytes is None or len(sealed) != outer.stored_bytes or len(into) != stored_bytes(plain_bytes):
            raise ChunkCorruptError(
                f"sealed record with {outer.payload_bytes} bytes of payload: {len(sealed)} here, {len(into)} of room"
            )
        payload = sealed[ALIGN : ALIGN + outer.payload_bytes]
        name, key_id, nonce = _PREFIX.unpack_from(payload)
        if name != FORMAT:
            raise ChunkCorruptError(f"unknown sealing format {name!r}")
        if key_id not in self._masters:
            raise OtherStoreKeyError(f"chunk {expected_key.hex()[:12]} is sealed with key {key_id.hex()}")
        tag = bytes(payload[-TAG_BYTES:])
        decryptor = self._cipher(key_id, outer.meta.tenant, modes.GCM(nonce, tag)).decryptor()
        decryptor.authenticate_additional_data(_identity(outer, outer.payload_bytes))
        ciphertext = payload[_PREFIX.size : -TAG_BYTES]
        hashed = RecordVerifier(into, expected_key=expected_key)
        into[len(ciphertext) :] = bytes(len(into) - len(ciphertext))
        try:
            for start in range(0, len(ciphertext), _PIECE_BYTES):
                stop = min(start + _PIECE_BYTES, len(ciphertext))
                decryptor.update_into(ciphertext[start:stop], into[start:stop])
                hashed(stop)
            decryptor.finalize()
        except InvalidTag as error:
            raise RecordTamperedError(f"sealed chunk {expected_key.hex()[:12]} has a wrong tag") from error
        header = hashed.finish()
        if header.meta != outer.meta:
            raise ChunkCorruptError(f"sealed chunk {expected_key.hex()[:12]} says something else inside than outside")
        return header

    def _cipher(self, key_id: bytes, tenant: str, mode: modes.GCM) -> Cipher[modes.GCM]:
        tenant_key = _derive(self._masters[key_id], _TENANT_LABEL + tenant.encode(), STORE_KEY_BYTES)
        return Cipher(algorithms.AES256(tenant_key), mode)


def _identity(header: Header, sealed_bytes: int) -> bytes:
    """What the tag covers beside the ciphertext: the outer header, by meaning."""
    return _IDENTITY_LABEL + _IDENTITY.pack(header.key, sealed_bytes) + packed_meta(header.meta)


def _derive(master_key: bytes, info: bytes, num_bytes: int) -> bytes:
    return HKDF(hashes.SHA256(), length=num_bytes, salt=None, info=info).derive(master_key)
