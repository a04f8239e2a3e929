r"""Profiles: what the `transform` codec was taught about one model, as one content-addressed file.

Covers: the data, its bytes, validation, the id that chunks name.
Does not cover: how a profile is made (`kvstore.codecs.calibrate`), what is done with it (`kvstore.codecs.transform`).
Shape letters: L layers, R rows (components of the transform), C channels (values per token of one band), K tables,
S symbols of a table, X contexts, V levels.

A *band* is one layer's K or V of one group of KV heads: C = num_kv_heads / groups * head_dim.

The file, all numbers little-endian: magic `\x89LKP\r\n\x1a\n`, version u16, zero u16, header length u32, header
(msgpack), zeros up to a multiple of 64, then the arrays, each at a multiple of 64. The header names every array with
dtype, shape and offset from the first multiple of 64 behind it. The profile's id is the SHA-256 of the whole file.
"""

import hashlib
import math
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from cluster.errors import DataError

MAGIC: Final = b"\x89LKP\r\n\x1a\n"
VERSION: Final = 1
FREQUENCY_BITS: Final = 12
FREQUENCY_SUM: Final = 1 << FREQUENCY_BITS
"""What the frequencies of every table sum to."""
NUM_CONTEXTS: Final = 3
"""Contexts of a row's table: 0, 1, or more (a magnitude that is known already)."""
NUM_CLASSES: Final = 8
MAX_LEVELS: Final = 4
MAX_CHANNELS: Final = 1024
"""C and R: 1024 * 127 * 16383, the largest sum of the inverse transform, still fits 32 bits."""
MAX_TABLES: Final = 64
MAX_SYMBOLS: Final = 255
MAX_FILE_BYTES: Final = 1 << 31

_ALIGN: Final = 64
_START: Final = struct.Struct("<8sHHI")
_DTYPES: Final = ("<f4", "<f8", "|i1", "|u1", "<u2", "<i2", "<u4", "<i4", "<i8")
_MAX_COUNT: Final = 1 << 16
_MAX_TEXT_CHARS: Final = 1 << 16
_DERIVING: Final = threading.RLock()
"""Re-entrant, because what is derived may need something else that is. One for all: it is held once per profile."""

T = TypeVar("T")


class ProfileDataError(DataError):
    """Bytes or numbers that are no profile of this version; chunks that name it are misses."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Band:
    """The transform of one layer's K or V of one head group.

    The decoded value is `bias_C + scale_C * token_scale * (symbols @ basis_RC)`, see `kvstore.codecs.transform`.
    """

    bias_C: NDArray[np.float32]
    basis_RC: NDArray[np.int8]
    """Components, best first, within [-127, 127]. R = C unless the rest can never matter: then the encoder's inverse
    is a plain pseudo-inverse, and no longer the one of the calibrated metric."""
    scale_C: NDArray[np.float32]
    """What one half of the finest bin is worth in every channel, times the integer in `basis_RC`; positive."""
    rows_per_level: tuple[int, ...]
    """Rows that are coded at each level, coarsest first; never falling. Rows behind are 0 at that level."""
    table_ids_VRX: NDArray[np.uint8]
    """Which of the profile's tables codes a row's symbol, by level and context.

    Context at level 0: `min(|symbol of the row in the token before|, 2)`. At a refinement: `min(|b|, 2)` of the value
    known so far."""
    token_scales: NDArray[np.float32]
    """Of the eight classes; class 0 is 1.0."""
    class_table: int | None = None
    """Table of the tokens' classes (symbol = class); None: every token is of class 0, and no class is stored."""


Bands = tuple[tuple[tuple[Band, ...], ...], ...]
"""By layer, K or V (0, 1), head group."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Profile:
    """All that encoder and decoder must agree about, for one model.

    Raises:
        ProfileDataError: Anything does not fit together; nothing has to be checked again later.
    """

    model: str
    model_digest: str
    """The weights it was measured on, see `kvstore.model_digest`; "" where nobody said."""
    num_layers: int
    num_kv_heads: int
    head_dim: int
    groups: int
    num_levels: int
    num_exact: int
    """Tokens stored exactly at the start of a chunk that begins at position 0."""
    inv_freq: NDArray[np.float32]
    """Rotary frequencies, half the rotary dimension of them; empty: K is not rotated."""
    is_neox: bool
    """Rotary pairs are halves apart (True) or neighbours (False)."""
    bands: Bands
    frequencies_KS: NDArray[np.uint16]
    """Tables, each summing to 4096. Symbol `s` stands for the value `s - S // 2`; S is odd."""
    encoder: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """What only encoders need, see `kvstore.codecs.transform_encode`."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """How it was calibrated, for people."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def num_channels(self) -> int:
        """C of every band."""
        return self.num_kv_heads // self.groups * self.head_dim

    @cached_property
    def id(self) -> str:
        """SHA-256 of the file, hexadecimal."""
        return hashlib.sha256(self._bytes).hexdigest()

    @cached_property
    def _bytes(self) -> bytes:
        return _encode(self)

    def to_bytes(self) -> bytes:
        """The file. The same profile always gives the same bytes."""
        return self._bytes

    @staticmethod
    def from_bytes(data: bytes | memoryview) -> "Profile":
        """Read a profile; arrays share the memory of `data`, which must not change.

        Raises:
            ProfileDataError: The bytes are no profile of this version.
        """
        profile = _decode(data)
        # The id is that of these bytes, not of what this version would write.
        profile.__dict__["_bytes"] = bytes(data)
        return profile


def derived(profile: Profile, make: Callable[[Profile], T]) -> T:
    """What `make` makes of a profile: once, whichever threads ask for it first, and kept as long as the profile.

    Args:
        profile: Never changes, so neither does what is made of it.
        make: A function of a module, by whose name the result is found again.
    """
    kept, name = profile.__dict__, f"{make.__module__}.{make.__qualname__}"
    if name not in kept:
        with _DERIVING:
            if name not in kept:
                kept[name] = make(profile)
    found: T = kept[name]
    return found


class _BandHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rows_per_level: tuple[int, ...]
    class_table: int | None


class _ArrayHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    offset: int


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: str
    model_digest: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    groups: int
    num_levels: int
    num_exact: int
    is_neox: bool
    notes: dict[str, str]
    bands: list[_BandHeader]
    arrays: dict[str, _ArrayHeader]


_PLAIN: Final = ("model", "model_digest", "num_layers", "num_kv_heads", "head_dim", "groups", "num_levels", "num_exact")
_BAND_ARRAYS: Final = ("bias_C", "basis_RC", "scale_C", "table_ids_VRX", "token_scales")


def _flat(bands: Bands) -> Iterator[Band]:
    return (band for layer in bands for pair in layer for band in pair)


def _encode(profile: Profile) -> bytes:
    arrays: dict[str, NDArray[Any]] = {"inv_freq": profile.inv_freq, "frequencies_KS": profile.frequencies_KS}
    for index, band in enumerate(_flat(profile.bands)):
        arrays |= {f"band/{index}/{name}": getattr(band, name) for name in _BAND_ARRAYS}
    arrays |= {f"encoder/{name}": profile.encoder[name] for name in sorted(profile.encoder)}
    pieces, headers, at = [], {}, 0
    for name, array in arrays.items():
        stored = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        data = stored.tobytes()
        headers[name] = _ArrayHeader(stored.dtype.str, array.shape, at)
        pieces += [data, bytes(-len(data) % _ALIGN)]
        at += len(data) + -len(data) % _ALIGN
    header = _Header(
        **{name: getattr(profile, name) for name in _PLAIN},
        is_neox=profile.is_neox,
        notes=dict(sorted(profile.notes.items())),
        bands=[_BandHeader(band.rows_per_level, band.class_table) for band in _flat(profile.bands)],
        arrays=headers,
    )
    packed = msgspec.msgpack.encode(header)
    start = _START.pack(MAGIC, VERSION, 0, len(packed)) + packed
    return b"".join([start, bytes(-len(start) % _ALIGN), *pieces])


def _decode(data: bytes | memoryview) -> Profile:
    if not _START.size <= len(data) <= MAX_FILE_BYTES:
        raise ProfileDataError(f"{len(data)} bytes are no profile")
    magic, version, zero, header_bytes = _START.unpack_from(data)
    if magic != MAGIC or version != VERSION or zero:
        raise ProfileDataError(f"not a profile of version {VERSION}: magic {magic!r}, version {version}")
    try:
        packed = memoryview(data)[_START.size : _START.size + header_bytes]
        header = msgspec.msgpack.decode(packed, type=_Header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProfileDataError(f"profile's header: {error}") from error
    start = _START.size + header_bytes
    first = start + -start % _ALIGN
    arrays = {name: _array(data, first, name, entry) for name, entry in header.arrays.items()}
    per_layer = 2 * header.groups
    if header.groups < 1 or len(header.bands) != header.num_layers * per_layer:
        raise ProfileDataError(f"{len(header.bands)} bands for {header.num_layers} layers, {header.groups} groups")
    try:
        flat = [
            Band(
                **{name: arrays.pop(f"band/{index}/{name}") for name in _BAND_ARRAYS},
                rows_per_level=entry.rows_per_level,
                class_table=entry.class_table,
            )
            for index, entry in enumerate(header.bands)
        ]
        inv_freq, frequencies_KS = arrays.pop("inv_freq"), arrays.pop("frequencies_KS")
    except KeyError as error:
        raise ProfileDataError(f"profile without its array {error}") from error
    groups = [tuple(flat[at : at + header.groups]) for at in range(0, len(flat), header.groups)]
    encoder = {name.removeprefix("encoder/"): array for name, array in arrays.items() if name.startswith("encoder/")}
    if len(encoder) != len(arrays):
        raise ProfileDataError("profile with arrays that this version does not know")
    return Profile(
        **{name: getattr(header, name) for name in _PLAIN},
        is_neox=header.is_neox,
        notes=header.notes,
        bands=tuple((groups[at], groups[at + 1]) for at in range(0, len(groups), 2)),
        inv_freq=inv_freq,
        frequencies_KS=frequencies_KS,
        encoder=encoder,
    )


def _array(data: bytes | memoryview, first: int, name: str, entry: _ArrayHeader) -> NDArray[Any]:
    if entry.dtype not in _DTYPES or len(entry.shape) > 8 or any(not 0 <= n <= MAX_FILE_BYTES for n in entry.shape):
        raise ProfileDataError(f"profile's array {name!r} has dtype {entry.dtype!r}, shape {entry.shape}")
    dtype, count = np.dtype(entry.dtype), math.prod(entry.shape)
    if math.prod(max(1, n) for n in entry.shape) > MAX_FILE_BYTES:
        # numpy makes no array of such a shape, even an empty one.
        raise ProfileDataError(f"profile's array {name!r} has shape {entry.shape}")
    begin = first + entry.offset
    if entry.offset < 0 or entry.offset % _ALIGN or begin + count * dtype.itemsize > len(data):
        raise ProfileDataError(f"profile's array {name!r} does not lie within its {len(data)} bytes")
    if not count:
        return np.zeros(entry.shape, dtype)
    return np.frombuffer(data, dtype=dtype, count=count, offset=begin).reshape(entry.shape)


def _need(condition: object, message: str) -> None:
    if not condition:
        raise ProfileDataError(message)


def _check(profile: Profile) -> None:
    counts = (profile.num_layers, profile.num_kv_heads, profile.head_dim, profile.groups)
    _need(all(1 <= n <= _MAX_COUNT for n in counts), f"layers, heads, dimension, groups: {counts}")
    _need(profile.num_kv_heads % profile.groups == 0, f"{profile.groups} groups of {profile.num_kv_heads} heads")
    _need(profile.num_channels <= MAX_CHANNELS, f"{profile.num_channels} channels per band; use more groups")
    _need(1 <= profile.num_levels <= MAX_LEVELS, f"{profile.num_levels} levels")
    _need(0 <= profile.num_exact <= 64, f"{profile.num_exact} exact tokens")
    texts = [profile.model, profile.model_digest, *profile.notes, *profile.notes.values()]
    _need(all(isinstance(text, str) and len(text) <= _MAX_TEXT_CHARS for text in texts), "texts that are too long")
    _is(profile.inv_freq, "inv_freq", np.float32, None)
    _need(2 * len(profile.inv_freq) <= profile.head_dim, f"{len(profile.inv_freq)} rotary frequencies")
    _check_tables(profile.frequencies_KS)
    for name, array in profile.encoder.items():
        _need(array.dtype.newbyteorder("<").str in _DTYPES, f"encoder's array {name!r} has dtype {array.dtype}")
    _need(len(profile.bands) == profile.num_layers, f"bands of {len(profile.bands)} layers")
    for layer, pair in enumerate(profile.bands):
        _need(len(pair) == 2 and all(len(groups) == profile.groups for groups in pair), f"bands of layer {layer}")
        for kv, groups in enumerate(pair):
            for group, band in enumerate(groups):
                _check_band(profile, band, f"band {layer}/{'KV'[kv]}/{group}")


def _is(array: NDArray[Any], name: str, dtype: type, shape: tuple[int, ...] | None) -> None:
    right = isinstance(array, np.ndarray) and array.dtype == np.dtype(dtype)
    _need(right and (array.ndim == 1 if shape is None else array.shape == shape), f"{name}: wrong dtype or shape")
    _need(array.dtype.kind != "f" or np.isfinite(array).all(), f"{name}: not finite")


def _check_tables(frequencies_KS: NDArray[np.uint16]) -> None:
    shape = frequencies_KS.shape
    _need(len(shape) == 2 and 1 <= shape[0] <= MAX_TABLES, f"tables {shape}")
    _need(3 <= shape[1] <= MAX_SYMBOLS and shape[1] % 2, f"{shape[1]} symbols: an odd number is needed")
    _is(frequencies_KS, "frequencies", np.uint16, shape)
    sums = frequencies_KS.sum(axis=1, dtype=np.int64)
    _need((sums == FREQUENCY_SUM).all(), f"frequencies sum to {sums.tolist()}, not to {FREQUENCY_SUM}")


def _check_band(profile: Profile, band: Band, name: str) -> None:
    channels, levels = profile.num_channels, profile.num_levels
    rows = band.basis_RC.shape[0] if band.basis_RC.ndim == 2 else 0
    _need(1 <= rows <= MAX_CHANNELS, f"{name}: {rows} rows")
    _is(band.bias_C, f"{name}: bias", np.float32, (channels,))
    _is(band.basis_RC, f"{name}: basis", np.int8, (rows, channels))
    _is(band.scale_C, f"{name}: scale", np.float32, (channels,))
    _is(band.table_ids_VRX, f"{name}: table ids", np.uint8, (levels, rows, NUM_CONTEXTS))
    _is(band.token_scales, f"{name}: token scales", np.float32, (NUM_CLASSES,))
    _need((band.basis_RC != -128).all(), f"{name}: basis outside [-127, 127]")
    _need((band.scale_C > 0).all() and (band.token_scales > 0).all(), f"{name}: scales must be positive")
    _need(band.token_scales[0] == 1.0, f"{name}: class 0 must have scale 1")
    live = band.rows_per_level
    _need(len(live) == levels and list(live) == sorted(live), f"{name}: rows per level {live}")
    _need(live[0] >= 0 and live[-1] <= rows, f"{name}: rows per level {live} of {rows}")
    num_tables, zero = profile.frequencies_KS.shape[0], profile.frequencies_KS.shape[1] // 2
    _need((band.table_ids_VRX < num_tables).all(), f"{name}: table ids above {num_tables - 1}")
    _need(band.class_table is None or 0 <= band.class_table < num_tables, f"{name}: class table {band.class_table}")
    if band.class_table is not None:
        of_classes = profile.frequencies_KS[band.class_table, zero : zero + NUM_CLASSES]
        # An encoder would write another class without a word.
        _need(len(of_classes) == NUM_CLASSES and of_classes.all(), f"{name}: not every class can be coded")
    for level in range(levels):
        used_RXS = profile.frequencies_KS[band.table_ids_VRX[level, : live[level]]]
        _need(used_RXS[:, :, zero].all(), f"{name}: 0 cannot be coded at level {level}")
        if level:
            # A refinement is one bit, with a sign where there was none yet: all of these, and nothing else.
            signs_R3, bits_RX2 = used_RXS[:, 0, zero - 1 : zero + 2], used_RXS[:, 1:, zero : zero + 2]
            _need(signs_R3.all() and bits_RX2.all(), f"{name}: -1, 0 or 1 cannot be coded at level {level}")
            is_whole = (signs_R3.sum(axis=-1) == FREQUENCY_SUM).all() and (bits_RX2.sum(axis=-1) == FREQUENCY_SUM).all()
            _need(is_whole, f"{name}: level {level} codes more than one bit of a magnitude, and its sign")
