r"""The self-describing record: one chunk's bytes with everything needed to believe or refuse them.

Covers: encoding and parsing of records, in memory and on disk alike.
Does not cover: how a payload becomes KV (`kvstore.codecs`), where records live (`kvstore.tiers`).

A record is a 4096-byte header, the payload, and zeros up to a multiple of 4096. All numbers are little-endian:

    offset  bytes  field
         0      8  magic, `\x89LONCE\r\n`
         8      2  version: 2 is written, 1 and 2 are read
        10      2  flags: bit 0, the payload is sealed (`kvstore.sealing`); the others are 0, as all are in version 1
        12      4  length of the metadata
        16      8  name of both checksums, `xxh3_64` (xxHash, 64 bits, seed 0)
        24      8  checksum of the header's 4096 bytes, this field taken as zero
        32     32  chunk key
        64      8  payload length
        72      8  stored length: header, payload and padding
        80      8  checksum of the payload
        88      n  metadata, msgpack map of `ChunkMeta` (version 1: without `tenant` and `learned_unix_s`); zeros up to
                   4096

The checksums find accidents, not attackers. Whoever may write to a store is authenticated before, and a sealed payload
has a tag that only holders of the key can make.
"""

import math
import struct
from typing import Final

import msgspec
import xxhash

from cluster.errors import CallerError, DataError
from kvstore.interfaces import ChunkMeta, TierEntry
from kvstore.keys import KEY_BYTES, ChunkKey
from kvstore.untrusted import UNDECODABLE

ALIGN: Final = 4096
"""Header size and granule of the stored length: what direct I/O asks for."""
MAX_PAYLOAD_BYTES: Final = 1 << 40
MAGIC: Final = b"\x89LONCE\r\n"
VERSION: Final = 2
MAX_TENANT_CHARS: Final = 64
MAX_PROFILE_CHARS: Final = 64
CHECKSUM_NAME: Final = b"xxh3_64\0"

_FIXED: Final = struct.Struct("<8sHHI8sQ32sQQQ")
_CHECKSUM_START: Final = 24
_CHECKSUM_STOP: Final = 32
_ZEROS: Final = bytes(8)
_SEALED: Final = 1
_FLAGS_BY_VERSION: Final = {1: (0,), 2: (0, _SEALED)}
_MAX_META_BYTES: Final = ALIGN - _FIXED.size
_MAX_COUNT: Final = 1 << 31
"""Above every honest count in the metadata."""

Buffer = bytes | bytearray | memoryview


class ChunkCorruptError(DataError):
    """A record that is damaged, cut, of another version, or no record at all."""


class ChunkMismatchError(DataError):
    """A sound record of another chunk than the one asked for; or sealed, where a plain one was, or the reverse."""


class RecordError(CallerError):
    """A chunk that no record can hold: its metadata or payload is too large or empty."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a record says about itself, after its checksum was found right."""

    key: ChunkKey
    meta: ChunkMeta
    payload_bytes: int
    stored_bytes: int
    payload_checksum: int
    is_sealed: bool = False
    """The payload is ciphertext: what KV it holds only `kvstore.sealing` can tell."""


def stored_bytes(payload_bytes: int) -> int:
    """Bytes of a record with `payload_bytes` of payload.

    Example:
        >>> stored_bytes(1), stored_bytes(4096), stored_bytes(4097)
        (8192, 8192, 12288)
    """
    return ALIGN + -(-payload_bytes // ALIGN) * ALIGN


def checksum(data: Buffer) -> int:
    """XXH3, 64 bits, seed 0. Releases the interpreter lock.

    Source:
        10 GB/s on one core of the reference machine, against 3 GB/s for zlib's crc32 (measured).
    """
    value: int = xxhash.xxh3_64_intdigest(data)
    return value


def entry_of(header: Header) -> TierEntry:
    """What a tier's books keep of a record; `payload_bytes` is that of the header, sealed or not."""
    return TierEntry(
        payload_bytes=header.payload_bytes,
        stored_bytes=header.stored_bytes,
        num_tokens=header.meta.num_tokens,
        base_position=header.meta.base_position,
        codec=header.meta.codec,
        tenant=header.meta.tenant,
        learned_unix_s=header.meta.learned_unix_s,
    )


def encode_header(
    key: ChunkKey, meta: ChunkMeta, *, payload_bytes: int, payload_checksum: int, is_sealed: bool = False
) -> bytes:
    """The first 4096 bytes of a record.

    Raises:
        RecordError: A key that is not 32 bytes, an empty or huge payload, metadata out of bounds.
    """
    if len(key) != KEY_BYTES or not 0 < payload_bytes <= MAX_PAYLOAD_BYTES:
        raise RecordError(f"a record needs a {KEY_BYTES}-byte key and 1 to {MAX_PAYLOAD_BYTES} bytes of payload")
    packed = packed_meta(meta)
    if len(packed) > _MAX_META_BYTES or not _is_plausible(meta):
        raise RecordError(
            f"metadata must fit {_MAX_META_BYTES} bytes, describe at least one token, and name its tenant in at most "
            f"{MAX_TENANT_CHARS} printable characters; got {meta}"
        )
    total = stored_bytes(payload_bytes)
    header = bytearray(ALIGN)
    flags = _SEALED if is_sealed else 0
    fields = (MAGIC, VERSION, flags, len(packed), CHECKSUM_NAME, 0, key, payload_bytes, total, payload_checksum)
    _FIXED.pack_into(header, 0, *fields)
    header[_FIXED.size : _FIXED.size + len(packed)] = packed
    header[_CHECKSUM_START:_CHECKSUM_STOP] = checksum(header).to_bytes(8, "little")
    return bytes(header)


def encode_record(key: ChunkKey, meta: ChunkMeta, payload: Buffer) -> bytearray:
    """A whole record in memory of its own.

    Raises:
        RecordError: As `encode_header`.
    """
    view = memoryview(payload).cast("B")
    header = encode_header(key, meta, payload_bytes=len(view), payload_checksum=checksum(view))
    record = bytearray(stored_bytes(len(view)))
    record[:ALIGN] = header
    record[ALIGN : ALIGN + len(view)] = view
    return record


def parse_header(data: Buffer, *, expected_key: ChunkKey | None = None, expected_sealed: bool | None = False) -> Header:
    """Believe or refuse the first 4096 bytes of a record; more bytes are ignored.

    Args:
        data: Hostile until proven sound.
        expected_key: The chunk that was asked for.
        expected_sealed: Whether the payload must be ciphertext; None takes either. The default refuses ciphertext,
            so that nobody takes it for KV.

    Raises:
        ChunkCorruptError: Damaged, cut, of another version, or no record.
        ChunkMismatchError: A sound header of another key, or not sealed as expected.
    """
    header = bytes(memoryview(data).cast("B")[:ALIGN])
    if len(header) < ALIGN:
        raise ChunkCorruptError(f"a record has at least {ALIGN} bytes, got {len(header)}")
    magic, version, flags, meta_bytes, name, seen, key, payload_bytes, total, payload_checksum = _FIXED.unpack_from(
        header
    )
    if magic != MAGIC or flags not in _FLAGS_BY_VERSION.get(version, ()) or name != CHECKSUM_NAME:
        raise ChunkCorruptError(f"not a record of version 1 or {VERSION}: starts with {header[:12].hex()}, {name!r}")
    if checksum(header[:_CHECKSUM_START] + _ZEROS + header[_CHECKSUM_STOP:]) != seen:
        raise ChunkCorruptError("header checksum differs")
    if not 0 < payload_bytes <= MAX_PAYLOAD_BYTES or total != stored_bytes(payload_bytes):
        raise ChunkCorruptError(f"lengths disagree: payload {payload_bytes}, stored {total}")
    if meta_bytes > _MAX_META_BYTES:
        raise ChunkCorruptError(f"metadata of {meta_bytes} bytes does not fit the header")
    meta = _parse_meta(header[_FIXED.size : _FIXED.size + meta_bytes])
    if version == 1 and (meta.tenant or meta.learned_unix_s):
        raise ChunkCorruptError("metadata of version 1 names no tenant and no time")
    if expected_key is not None and key != expected_key:
        raise ChunkMismatchError(f"asked for chunk {expected_key.hex()[:12]}, the record holds {key.hex()[:12]}")
    is_sealed = bool(flags & _SEALED)
    if expected_sealed is not None and is_sealed is not expected_sealed:
        kinds = ("a plain", "a sealed")
        raise ChunkMismatchError(
            f"expected {kinds[expected_sealed]} record, chunk {key.hex()[:12]} has {kinds[is_sealed]} one"
        )
    return Header(
        key=ChunkKey(key),
        meta=meta,
        payload_bytes=payload_bytes,
        stored_bytes=total,
        payload_checksum=payload_checksum,
        is_sealed=is_sealed,
    )


def parse_record(
    record: Buffer, *, expected_key: ChunkKey | None = None, expected_sealed: bool | None = False
) -> tuple[Header, memoryview]:
    """Believe or refuse a whole record; the payload is a view into it, not a copy.

    Raises:
        ChunkCorruptError: Any byte differs from what was encoded, or bytes are missing or left over.
        ChunkMismatchError: As `parse_header`.
    """
    view = memoryview(record).cast("B")
    verifier = RecordVerifier(view, expected_key=expected_key, expected_sealed=expected_sealed)
    verifier(len(view))
    header = verifier.finish()
    return header, view[ALIGN : ALIGN + header.payload_bytes]


class RecordVerifier:
    """Checks a record while it arrives, so that its bytes are hashed while they are in the cache. An `OnBytes`.

    Args:
        record: Where the record arrives; its length is the record's.
        expected_key: The chunk that was asked for.
        expected_sealed: As in `parse_header`.

    Example:
        >>> meta = ChunkMeta(num_tokens=1, num_layers=1, num_kv_heads=1, head_dim=1, dtype="float16", base_position=0)
        >>> record = encode_record(ChunkKey(bytes(32)), meta, b"abc")
        >>> verifier = RecordVerifier(memoryview(record))
        >>> verifier(5000)
        >>> verifier(8192)
        >>> verifier.finish().payload_bytes
        3
    """

    def __init__(
        self, record: memoryview, *, expected_key: ChunkKey | None = None, expected_sealed: bool | None = False
    ) -> None:
        self._record = record.cast("B")
        self._expected_key = expected_key
        self._expected_sealed = expected_sealed
        self._hashed = ALIGN
        self._state = xxhash.xxh3_64()
        self.header: Header | None = None
        """What the record says it is, once its header has arrived. Its payload is not believed before `finish`."""

    def __call__(self, num_bytes: int) -> None:
        """The first `num_bytes` bytes are in place.

        Raises:
            ChunkCorruptError, ChunkMismatchError: As `parse_header`, or the header tells of another length.
        """
        num_bytes = min(num_bytes, len(self._record))
        if self.header is None:
            if num_bytes < ALIGN and num_bytes < len(self._record):
                return
            self.header = parse_header(
                self._record, expected_key=self._expected_key, expected_sealed=self._expected_sealed
            )
            if self.header.stored_bytes != len(self._record):
                raise ChunkCorruptError(f"record should have {self.header.stored_bytes} bytes, has {len(self._record)}")
        stop = min(num_bytes, ALIGN + self.header.payload_bytes)
        if stop > self._hashed:
            self._state.update(self._record[self._hashed : stop])
            self._hashed = stop

    def finish(self) -> Header:
        """The record's header, if all of it has arrived and is what was encoded.

        Raises:
            ChunkCorruptError: Bytes are missing or differ.
        """
        header = self.header
        if header is None or self._hashed != ALIGN + header.payload_bytes:
            raise ChunkCorruptError(f"record has {len(self._record)} bytes, only {self._hashed} arrived")
        if self._state.intdigest() != header.payload_checksum:
            raise ChunkCorruptError(f"payload checksum differs for chunk {header.key.hex()[:12]}")
        if bytes(self._record[self._hashed :]).strip(b"\0"):
            raise ChunkCorruptError("padding is not zero")
        return header


def verify_payload(header: Header, payload: memoryview) -> memoryview:
    """The payload, if it is the one its header was made for.

    Raises:
        ChunkCorruptError: Length or checksum differ.
    """
    if len(payload) != header.payload_bytes:
        raise ChunkCorruptError(f"payload should have {header.payload_bytes} bytes, has {len(payload)}")
    if checksum(payload) != header.payload_checksum:
        raise ChunkCorruptError(f"payload checksum differs for chunk {header.key.hex()[:12]}")
    return payload


def packed_meta(meta: ChunkMeta) -> bytes:
    """The metadata as a map. A chunk without a profile has the bytes that it had before there were profiles."""
    fields = msgspec.structs.asdict(meta)
    if not meta.profile:
        del fields["profile"]
    return msgspec.msgpack.encode(fields)


def _parse_meta(packed: bytes) -> ChunkMeta:
    try:
        meta = msgspec.msgpack.decode(packed, type=ChunkMeta)
    except UNDECODABLE as error:
        raise ChunkCorruptError(f"metadata is not a ChunkMeta: {error}") from error
    if not _is_plausible(meta):
        raise ChunkCorruptError(f"metadata out of bounds: {meta}")
    return meta


def _is_plausible(meta: ChunkMeta) -> bool:
    counts = (meta.num_tokens, meta.num_layers, meta.num_kv_heads, meta.head_dim)
    return (
        all(0 < n < _MAX_COUNT for n in counts)
        and 0 <= meta.base_position < _MAX_COUNT
        and len(meta.tenant) <= MAX_TENANT_CHARS
        and meta.tenant.isprintable()
        and len(meta.profile) <= MAX_PROFILE_CHARS
        and meta.profile.isprintable()
        and math.isfinite(meta.learned_unix_s)
        and meta.learned_unix_s >= 0
    )
