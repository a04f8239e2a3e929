"""Payloads of the `transform` codec: what lies where.

Covers: the header, the table of sections, prefixes that are coarser chunks, damage.
Does not cover: what is inside a section (`kvstore.codecs.transform_decode`), records (`kvstore.container`).
Shape letters: V levels, L layers, 2 for K and V, G head groups, E exact tokens, N KV heads, H head dimension.

All numbers are little-endian:

    offset  bytes  field
         0      4  magic, `LKT1`
         4      1  version: 1
         5      1  lanes of the entropy coder: 16
         6      1  levels V, when it was written
         7      1  0
         8      2  head groups G
        10      2  exact tokens E
        12      4  tokens, the exact ones included
        16      4  layers L
        20      4  bytes of the exact tokens
        24      8  first bytes of the profile's id
        32    8 n  sections by level, layer, K and V, group: length, and the low half of its `xxh3_64`
      32+8n     4  low half of the exact tokens' `xxh3_64`
      36+8n     4  low half of the `xxh3_64` of all before
      40+8n        exact tokens [L, 2, E, N, H] in the KV's dtype, K as the engine had it; then the sections, in order

So a prefix of a payload that ends with a level is that chunk, coarser; and one that ends anywhere behind the first
level holds that level of all layers, and the next one of some.
"""

import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvstore.codecs.profile import Profile
from kvstore.codecs.rans_vectors import LANES
from kvstore.codecs.raw import DTYPES, CodecDataError
from kvstore.interfaces import ChunkMeta

MAGIC: Final = b"LKT1"
VERSION: Final = 1
MAX_TOKENS: Final = 1 << 22
"""Above every chunk; keeps hostile headers from asking for more memory than a machine has."""

_FIXED: Final = struct.Struct("<4sBBBBHHIII8s")
_ENTRY: Final = np.dtype([("length", "<u4"), ("checksum", "<u4")])
_TAIL: Final = struct.Struct("<II")
_LOW: Final = 0xFFFFFFFF

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, eq=False, kw_only=True)
class Layout:
    """Where the parts of one payload are. Only the header's checksum has been compared."""

    exact_start: int
    exact_stop: int
    num_exact: int
    exact_checksum: int
    start_VL2G: NDArray[np.int64]
    stop_VL2G: NDArray[np.int64]
    checksum_VL2G: NDArray[np.uint32]

    @property
    def num_levels(self) -> int:
        """Levels that were written."""
        return self.start_VL2G.shape[0]

    def stop_bytes(self, *, level: int, layer: int | None = None) -> int:
        """Length of the prefix that holds a layer at a level; without a layer, all of them."""
        return int(self.stop_VL2G[level, -1 if layer is None else layer, -1, -1])

    def levels_within(self, num_bytes: int) -> NDArray[np.int64]:
        """How many levels of every layer a prefix of so many bytes holds, `[L]`."""
        return np.asarray((self.stop_VL2G[:, :, -1, -1] <= num_bytes).sum(axis=0))


def checksum(data: Buffer) -> int:
    """Low half of `xxh3_64`, seed 0."""
    value: int = xxhash.xxh3_64_intdigest(data)
    return value & _LOW


def header_bytes(*, levels: int, layers: int, groups: int) -> int:
    """Length of everything before the exact tokens."""
    return _FIXED.size + levels * layers * 2 * groups * _ENTRY.itemsize + _TAIL.size


def num_exact(meta: ChunkMeta, profile: Profile) -> int:
    """Tokens that are stored exactly: the attention sinks, which only position 0 has."""
    return min(profile.num_exact, meta.num_tokens) if meta.base_position == 0 else 0


def exact_bytes(meta: ChunkMeta, profile: Profile) -> int:
    """Bytes of the exact tokens."""
    values = meta.num_layers * 2 * meta.num_kv_heads * meta.head_dim
    return num_exact(meta, profile) * values * DTYPES[meta.dtype].itemsize


def check_meta(meta: ChunkMeta, profile: Profile) -> None:
    """Refuse KV that is not of the profile's model.

    Raises:
        CodecDataError: Which field it is.
    """
    ours = (profile.num_layers, profile.num_kv_heads, profile.head_dim)
    seen = (meta.num_layers, meta.num_kv_heads, meta.head_dim)
    if seen != ours:
        raise CodecDataError(f"KV of {seen} layers, heads, dimension; the profile is for {ours}")
    if meta.dtype not in DTYPES:
        raise CodecDataError(f"KV dtype {meta.dtype!r} cannot be stored, only {', '.join(DTYPES)}")
    if not 0 < meta.num_tokens <= MAX_TOKENS or not 0 <= meta.base_position <= 1 << 31:
        raise CodecDataError(f"{meta.num_tokens} tokens at {meta.base_position}")
    if meta.profile and meta.profile != profile.id:
        raise CodecDataError(f"chunk of profile {meta.profile[:12]}, not {profile.id[:12]}")


def write_header(
    meta: ChunkMeta, profile: Profile, *, lengths: NDArray[np.int64], checksums: NDArray[np.uint32], exact_checksum: int
) -> bytes:
    """Everything before the exact tokens; `lengths` and `checksums` are `[V, L, 2, G]`."""
    table = np.empty(lengths.size, _ENTRY)
    table["length"], table["checksum"] = lengths.ravel(), checksums.ravel()
    levels, exact = lengths.shape[0], num_exact(meta, profile)
    id_start = bytes.fromhex(profile.id[:16])
    counts = (profile.groups, exact, meta.num_tokens, meta.num_layers, exact_bytes(meta, profile))
    fields = (VERSION, LANES, levels, 0, *counts, id_start)
    head = _FIXED.pack(MAGIC, *fields) + table.tobytes() + exact_checksum.to_bytes(4, "little")
    return head + checksum(head).to_bytes(4, "little")


def read_header(payload: Buffer, *, meta: ChunkMeta, profile: Profile) -> Layout:
    """Find the parts of a payload, or of its prefix that holds the header.

    Raises:
        CodecDataError: The header is damaged, or is of another chunk than `meta` and `profile` say.
    """
    check_meta(meta, profile)
    fixed, table = _read_table(payload)
    seen = (fixed.groups, fixed.num_exact, fixed.num_tokens, fixed.num_layers, fixed.exact_bytes)
    exact = num_exact(meta, profile)
    expected = (profile.groups, exact, meta.num_tokens, meta.num_layers, exact_bytes(meta, profile))
    if seen != expected or fixed.num_levels > profile.num_levels:
        raise CodecDataError(f"payload of {seen} groups, exact tokens, tokens, layers, exact bytes; not {expected}")
    if fixed.id_start.hex() != profile.id[:16]:
        raise CodecDataError(f"payload of profile {fixed.id_start.hex()}, not {profile.id[:16]}")
    shape = (fixed.num_levels, fixed.num_layers, 2, fixed.groups)
    start = header_bytes(levels=fixed.num_levels, layers=fixed.num_layers, groups=fixed.groups)
    stops = start + fixed.exact_bytes + np.cumsum(table["length"], dtype=np.int64)
    return Layout(
        exact_start=start,
        exact_stop=start + fixed.exact_bytes,
        num_exact=exact,
        exact_checksum=_TAIL.unpack_from(payload, start - _TAIL.size)[0],
        start_VL2G=(stops - table["length"]).reshape(shape),
        stop_VL2G=stops.reshape(shape),
        checksum_VL2G=table["checksum"].reshape(shape),
    )


def truncate(payload: memoryview, *, level: int) -> memoryview:
    """The chunk without the levels behind `level`: a prefix of the payload. Needs no profile and no metadata.

    Raises:
        CodecDataError: The header is damaged, or there is no such level.
    """
    fixed, table = _read_table(payload)
    if not 0 <= level < fixed.num_levels:
        raise CodecDataError(f"no level {level} in a payload of {fixed.num_levels} levels")
    start = header_bytes(levels=fixed.num_levels, layers=fixed.num_layers, groups=fixed.groups)
    kept = table["length"].reshape(fixed.num_levels, -1)[: level + 1].sum(dtype=np.int64)
    return payload[: start + fixed.exact_bytes + int(kept)]


class _Fixed(NamedTuple):
    """The header's fields behind magic, version and lanes."""

    num_levels: int
    groups: int
    num_exact: int
    num_tokens: int
    num_layers: int
    exact_bytes: int
    id_start: bytes


def _read_table(payload: Buffer) -> tuple[_Fixed, NDArray[np.void]]:
    if len(payload) < _FIXED.size:
        raise CodecDataError(f"{len(payload)} bytes are no transform payload")
    magic, version, lanes, levels, zero, *rest = _FIXED.unpack_from(payload)
    if magic != MAGIC or version != VERSION or lanes != LANES or zero:
        raise CodecDataError(f"not a transform payload of version {VERSION}: {magic!r}, {version}, {lanes} lanes")
    fixed = _Fixed(levels, *rest)
    if min(fixed.num_levels, fixed.groups, fixed.num_layers) < 1:
        raise CodecDataError(f"payload of {fixed.num_levels} levels, {fixed.groups} groups, {fixed.num_layers} layers")
    size = header_bytes(levels=levels, layers=fixed.num_layers, groups=fixed.groups)
    if len(payload) < size:
        raise CodecDataError(f"payload of {len(payload)} bytes ends within its header of {size}")
    if checksum(memoryview(payload)[: size - 4]) != _TAIL.unpack_from(payload, size - _TAIL.size)[1]:
        raise CodecDataError("header does not match its checksum")
    count = levels * fixed.num_layers * 2 * fixed.groups
    return fixed, np.frombuffer(payload, _ENTRY, count=count, offset=_FIXED.size).copy()


def head_bytes(payload: Buffer, *, meta: ChunkMeta, profile: Profile) -> int:
    """How much of a payload `read_header` needs.

    Raises:
        CodecDataError: The first bytes are of no transform payload.
    """
    check_meta(meta, profile)
    if len(payload) < _FIXED.size:
        raise CodecDataError(f"{len(payload)} bytes are no transform payload")
    levels = payload[6]
    if not 1 <= levels <= profile.num_levels:
        raise CodecDataError(f"payload of {levels} levels; the profile has {profile.num_levels}")
    return header_bytes(levels=levels, layers=meta.num_layers, groups=profile.groups)
