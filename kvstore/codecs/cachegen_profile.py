"""What the `cachegen` codec knows about one model: bins and tables, measured once, the same for every chunk.

Covers: the data, its bytes, validation, the id that chunks name.
Does not cover: how it is measured (`kvstore.codecs.cachegen_calibrate`), chunks (`kvstore.codecs.cachegen`).
Shape letters: V levels, L layers, C = N * H channels, S = 256 symbols.

The file, little-endian: magic, version u16, zero u16, header length u32, header (msgpack), then per table (a level's,
coarsest first, then the anchors'; by layer, K or V, channel) its first and its last symbol u8, then all frequencies
u16 between them. The id is the SHA-256 of the file.
"""

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from cluster.errors import DataError
from kvstore.codecs.rows import SYMBOLS, Frequencies, TableError, check_frequencies

MAGIC: Final = b"\x89LCG\r\n\x1a\n"
VERSION: Final = 1
ESCAPE: Final = 0
"""Symbol of a value that the table does not know; other symbols stand for themselves less 128."""
SATURATED: Final = 255
"""A difference that is at least this far up; it is escaped."""
MAX_LEVELS: Final = 8
_START: Final = struct.Struct("<8sHHI")
_MAX_TABLES: Final = 1 << 22
_MAX_EXACT: Final = 64


class CachegenProfileError(DataError):
    """Bytes or numbers that are no profile of this codec; chunks that name it are misses."""


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    group_tokens: int
    num_exact: int
    default_level: int
    bins: list[list[list[float]]]
    notes: dict[str, str]


@dataclass(frozen=True, eq=False, kw_only=True)
class CachegenProfile:
    """Bins and tables of one model.

    Raises:
        CachegenProfileError: Anything does not fit together; nothing has to be checked again later.
    """

    model: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    group_tokens: int
    """Tokens of a group; the first is its anchor."""
    num_exact: int
    """Tokens stored as they are at the start of a chunk that begins at position 0; 0 is the paper's scheme."""
    default_level: int
    """The level with the paper's bins."""
    bins_VL2: NDArray[np.float32]
    """Bin width of the differences by level (coarsest first), layer, and K or V; positive."""
    tables_VL2CS: Frequencies
    """Of the differences."""
    anchor_tables_L2CS: Frequencies
    notes: dict[str, str]

    def __post_init__(self) -> None:
        _check(self)

    @property
    def num_levels(self) -> int:
        """V."""
        return len(self.bins_VL2)

    @cached_property
    def id(self) -> str:
        """SHA-256 of the file, hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The file. The same profile always gives the same bytes."""
        header = msgspec.msgpack.encode(
            _Header(
                model=self.model,
                num_layers=self.num_layers,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                group_tokens=self.group_tokens,
                num_exact=self.num_exact,
                default_level=self.default_level,
                bins=self.bins_VL2.astype(np.float64).tolist(),
                notes=dict(sorted(self.notes.items())),
            )
        )
        tables_KS = np.concatenate(
            [self.tables_VL2CS.reshape(-1, SYMBOLS), self.anchor_tables_L2CS.reshape(-1, SYMBOLS)]
        )
        known_KS = tables_KS > 0
        first_K, last_K = known_KS.argmax(axis=1), SYMBOLS - 1 - known_KS[:, ::-1].argmax(axis=1)
        symbols_S = np.arange(SYMBOLS)
        inside_KS = (symbols_S >= first_K[:, None]) & (symbols_S <= last_K[:, None])
        spans = np.stack([first_K, last_K], axis=1).astype(np.uint8)
        start = _START.pack(MAGIC, VERSION, 0, len(header))
        return b"".join([start, header, spans.tobytes(), tables_KS[inside_KS].astype("<u2").tobytes()])

    @staticmethod
    def from_bytes(data: bytes | memoryview) -> "CachegenProfile":
        """Read a profile.

        Raises:
            CachegenProfileError: The bytes are no profile of this version.
        """
        data = bytes(data)
        if len(data) < _START.size:
            raise CachegenProfileError(f"{len(data)} bytes are no profile")
        magic, version, zero, header_bytes = _START.unpack_from(data)
        if magic != MAGIC or version != VERSION or zero:
            raise CachegenProfileError(f"not a cachegen profile of version {VERSION}: {magic!r}, version {version}")
        try:
            header = msgspec.msgpack.decode(data[_START.size : _START.size + header_bytes], type=_Header)
            with np.errstate(over="ignore"):  # An infinity is refused below.
                bins_VL2 = np.array(header.bins, dtype=np.float32)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError, OverflowError) as error:
            raise CachegenProfileError(f"profile's header: {error}") from error
        return _assemble(header, bins_VL2, data[_START.size + header_bytes :])


def is_cachegen_profile(data: bytes | memoryview) -> bool:
    """Whether these bytes begin like a profile of this codec, not of another one."""
    return bytes(data[: len(MAGIC)]) == MAGIC


def _need(condition: object, message: str) -> None:
    if not condition:
        raise CachegenProfileError(message)


def _assemble(header: _Header, bins_VL2: NDArray[np.float32], body: bytes) -> CachegenProfile:
    counts = (header.num_layers, header.num_kv_heads, header.head_dim)
    _need(all(0 < count <= 1 << 16 for count in counts), f"layers, heads and dimension are {counts}")
    _need(bins_VL2.ndim == 3 and 0 < len(bins_VL2) <= MAX_LEVELS, f"bins of shape {bins_VL2.shape}")
    shape = (len(bins_VL2) + 1, header.num_layers, 2, header.num_kv_heads * header.head_dim)
    num_tables = int(np.prod(shape, dtype=object))
    # Before anything is made of that size: every table has its first and last symbol in the file.
    _need(num_tables <= min(_MAX_TABLES, len(body) // 2), f"{len(body)} bytes cannot hold {num_tables} tables")
    spans_K2 = np.frombuffer(body, dtype=np.uint8, count=2 * num_tables).reshape(-1, 2).astype(np.int64)
    _need((spans_K2[:, 0] <= spans_K2[:, 1]).all(), "a table ends before it begins")
    symbols_S = np.arange(SYMBOLS)
    inside_KS = (symbols_S >= spans_K2[:, :1]) & (symbols_S <= spans_K2[:, 1:])
    values = body[2 * num_tables :]
    _need(len(values) == 2 * int(inside_KS.sum()), f"{len(values)} bytes of frequencies")
    tables_KS = np.zeros((num_tables, SYMBOLS), dtype=np.uint16)
    tables_KS[inside_KS] = np.frombuffer(values, dtype="<u2")
    tables = tables_KS.reshape(*shape, SYMBOLS)
    return CachegenProfile(
        model=header.model,
        num_layers=header.num_layers,
        num_kv_heads=header.num_kv_heads,
        head_dim=header.head_dim,
        group_tokens=header.group_tokens,
        num_exact=header.num_exact,
        default_level=header.default_level,
        bins_VL2=bins_VL2,
        tables_VL2CS=tables[:-1],
        anchor_tables_L2CS=tables[-1],
        notes=header.notes,
    )


def _check(profile: CachegenProfile) -> None:
    channels = profile.num_kv_heads * profile.head_dim
    shape = (profile.num_layers, 2, channels, SYMBOLS)
    _need(min(shape) > 0, f"tables of shape {shape}")
    _need(profile.bins_VL2.shape == (profile.num_levels, *shape[:2]), f"bins of shape {profile.bins_VL2.shape}")
    _need(0 < profile.num_levels <= MAX_LEVELS, f"{profile.num_levels} levels")
    _need(0 <= profile.default_level < profile.num_levels, f"default level {profile.default_level}")
    _need(profile.tables_VL2CS.shape == (profile.num_levels, *shape), f"tables {profile.tables_VL2CS.shape}")
    _need(profile.anchor_tables_L2CS.shape == shape, f"anchor tables {profile.anchor_tables_L2CS.shape}")
    _need(2 <= profile.group_tokens <= 256, f"groups of {profile.group_tokens} tokens")
    _need(0 <= profile.num_exact <= _MAX_EXACT, f"{profile.num_exact} exact tokens")
    _need((np.isfinite(profile.bins_VL2) & (profile.bins_VL2 > 0)).all(), "bins must be positive")
    for tables in (profile.tables_VL2CS, profile.anchor_tables_L2CS):
        _need(tables.dtype == np.uint16, f"tables of {tables.dtype}")
        _need(tables[..., ESCAPE].all(), "a table cannot code values that it does not know")
        try:
            check_frequencies(tables)
        except TableError as error:
            raise CachegenProfileError(str(error)) from error
