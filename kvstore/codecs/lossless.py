"""Lossless codec that compresses: exponents are entropy-coded, mantissas and signs are kept.

Covers: bfloat16, float16 and float32 KV to bytes and back, bit for bit (NaNs and signed zeros included).
Does not cover: KV that may change a little (`kvstore.codecs.transform` and the baselines beside it).
Shape letters: as in `kvstore.codecs`; C = N * H channels, P bytes per value, K tables.

Every value is turned left by one bit, which brings the sign to the end, and cut into bytes. The first byte (bfloat16
and float32: the exponent; float16: the exponent and three bits of the mantissa) is coded with one of a few tables that
the chunk brings along; a channel's table follows from its mean, because exponents spread alike around it. A later byte
is coded with one table where that saves something, as where float32 KV was bfloat16 before; else it is kept.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.codecs.layered import (
    Bytes,
    LayeredPayload,
    Reader,
    check_kv,
    check_layers,
    check_meta,
    head_bytes,
    read_layered,
    unsigned,
    write_layered,
)
from kvstore.codecs.rans import lookup_tables
from kvstore.codecs.raw import CodecDataError
from kvstore.codecs.rows import (
    SYMBOLS,
    Frequencies,
    bits_of,
    check_frequencies,
    decode_rows,
    encode_rows,
    frequencies_of,
)
from kvstore.compiled import compiled
from kvstore.interfaces import ChunkMeta

_VERSION: Final = 1
_MAX_TABLES: Final = 40
_VALUES_PER_TABLE: Final = 8192
"""A chunk has at most one table for so many values: a table costs about 60 bytes."""
_TABLE_BYTES: Final = 2 + 2 * SYMBOLS
_LENGTH: Final = struct.Struct("<I")
_LENGTH_BYTES: Final = _LENGTH.size
_WORTH_RATIO: Final = 0.97
"""Bytes are coded if they then take less than this share: decoding costs time."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one byte of every value is stored."""

    frequencies_KS: Frequencies | None
    """`[K, S]`; None: kept as it is."""
    table_ids_L2C: NDArray[np.uint16]


class LosslessCodec:
    """KV bit for bit, about two thirds of its bytes (bfloat16).

    Cost:
        Decoding holds two bytes per value of one layer besides the result; encoding one byte per value of the chunk.

    Example:
        >>> kv = torch.arange(8.0).reshape(2, 2, 1, 1, 2)
        >>> meta = ChunkMeta(num_tokens=1, num_layers=2, num_kv_heads=1, head_dim=2, dtype="float32", base_position=0)
        >>> out = bytearray(LosslessCodec().encoded_bytes(meta))
        >>> num_bytes = LosslessCodec().encode(kv, out=memoryview(out))
        >>> LosslessCodec().decode(memoryview(out)[:num_bytes], meta=meta).equal(kv)
        True
    """

    @property
    def name(self) -> str:
        """`lossless`."""
        return "lossless"

    def encoded_bytes(self, meta: ChunkMeta) -> int:
        """The KV's bytes and what is stored about them; `encode` needs less, as far as exponents are alike."""
        itemsize = check_meta(meta).itemsize
        num_values = math.prod(meta.shape)
        plan = itemsize + _TABLE_BYTES * (_max_tables(num_values) + itemsize - 1) + num_values // meta.num_tokens
        lengths = _LENGTH_BYTES * 2 * meta.num_layers * itemsize
        return head_bytes(meta.num_layers) + plan + lengths + num_values * itemsize

    def encode(self, kv_L2TNH: torch.Tensor, *, out: memoryview, meta: ChunkMeta | None = None) -> int:
        """Write the chunk to the start of `out`."""
        check_kv(kv_L2TNH)
        planes_PL2TC = _planes_of(kv_L2TNH)
        plans = [
            _plan(planes_L2TC, most=_max_tables(kv_L2TNH.numel()) if index == 0 else 1)
            for index, planes_L2TC in enumerate(planes_PL2TC)
        ]
        layers = [_encode_layer(planes_PL2TC[:, layer], plans, layer) for layer in range(len(kv_L2TNH))]
        preamble = b"".join(_packed(plan) for plan in plans)
        decoded_bytes = kv_L2TNH.numel() * kv_L2TNH.element_size()
        return write_layered(layers, version=_VERSION, preamble=preamble, decoded_bytes=decoded_bytes, out=out)

    def decode(self, payload: memoryview, *, meta: ChunkMeta) -> torch.Tensor:
        """The chunk's KV, bit for bit."""
        parts = read_layered(payload, version=_VERSION, meta=meta)
        out = torch.empty(meta.shape, dtype=check_meta(meta))
        _decode_layers(parts, range(meta.num_layers), out)
        return out

    def decode_layers(self, payload: memoryview, *, meta: ChunkMeta, layers: range, out: torch.Tensor) -> None:
        """Some layers' KV, bit for bit, into `out` `[layer, 2, T, N, H]`; the others are not looked at."""
        check_layers(layers, meta, out)
        _decode_layers(read_layered(payload, version=_VERSION, meta=meta), layers, out)


def _max_tables(num_values: int) -> int:
    return max(1, min(_MAX_TABLES, num_values // _VALUES_PER_TABLE))


def _planes_of(kv_L2TNH: torch.Tensor) -> Bytes:
    """`[P, L, 2, T, C]`."""
    num_layers, _, num_tokens = kv_L2TNH.shape[:3]
    itemsize = kv_L2TNH.element_size()
    planes = np.empty((itemsize, num_layers, 2, num_tokens, kv_L2TNH[0, 0, 0].numel()), dtype=np.uint8)
    for layer in range(num_layers):
        words = unsigned(kv_L2TNH[layer])
        for index in range(itemsize):
            _cut(words, planes[index, layer].reshape(-1), 8 * (itemsize - 1 - index))
    return planes


def _plan(planes_L2TC: Bytes, *, most: int) -> _Plan:
    """Group channels by their mean, and see whether tables pay."""
    num_layers, _, num_tokens, num_channels = planes_L2TC.shape
    rows_RTC = planes_L2TC.reshape(-1, num_tokens, num_channels)
    ids_RC = np.zeros((2 * num_layers, num_channels), dtype=np.uint16)
    kept = _Plan(None, ids_RC.reshape(num_layers, 2, num_channels))
    if most > 1:
        sums_RC = np.zeros(ids_RC.shape, dtype=np.uint32)
        _sum_channels(rows_RTC, sums_RC)
        ids_RC = _classes(sums_RC / num_tokens, most=most)
    counts_KS = np.zeros((int(ids_RC.max()) + 1, SYMBOLS), dtype=np.int64)
    _count(rows_RTC, ids_RC, counts_KS)
    frequencies_KS = frequencies_of(counts_KS)
    coded = _Plan(frequencies_KS, ids_RC.reshape(num_layers, 2, num_channels))
    coded_bytes = bits_of(counts_KS, frequencies_KS) / 8 + len(_packed(coded))
    return coded if coded_bytes < _WORTH_RATIO * rows_RTC.size else kept


def _classes(means_RC: NDArray[np.float64], *, most: int) -> NDArray[np.uint16]:
    """Channels of nearly equal mean share a table: as fine steps as `most` tables allow where most of them lie."""
    low, high = np.quantile(means_RC, (0.002, 0.998))
    width = max((high - low) / most, 1e-9)
    steps = np.clip((means_RC - low) / width, 0, most - 1).astype(np.int64)
    return np.unique(steps, return_inverse=True)[1].reshape(means_RC.shape).astype(np.uint16)


def _encode_layer(planes_P2TC: Bytes, plans: Sequence[_Plan], layer: int) -> Bytes:
    pieces: list[Bytes] = []
    for kv in (0, 1):
        for plan, planes_2TC in zip(plans, planes_P2TC, strict=True):
            piece = planes_2TC[kv].reshape(-1)
            if plan.frequencies_KS is not None:
                ids_C = plan.table_ids_L2C[layer, kv]
                stream = encode_rows(planes_2TC[kv], table_ids_C=ids_C, frequencies_KS=plan.frequencies_KS)
                # The length tells a stream from the bytes themselves.
                piece = stream if len(stream) < len(piece) else piece
            pieces += [np.frombuffer(_LENGTH.pack(len(piece)), dtype=np.uint8), piece]
    return np.concatenate(pieces)


def _packed(plan: _Plan) -> bytes:
    """Number of tables, the tables from their first to their last symbol, and which one each channel has."""
    if plan.frequencies_KS is None:
        return bytes(1)
    pieces = [bytes([len(plan.frequencies_KS)])]
    for frequencies_S in plan.frequencies_KS:
        known = np.flatnonzero(frequencies_S)
        first, last = int(known[0]), int(known[-1])
        pieces += [bytes([first, last]), frequencies_S[first : last + 1].astype("<u2").tobytes()]
    if len(plan.frequencies_KS) > 1:
        pieces.append(plan.table_ids_L2C.astype(np.uint8).tobytes())
    return b"".join(pieces)


def _read_plan(reader: Reader, shape_L2C: tuple[int, int, int]) -> _Plan:
    num_tables = reader.number("u1")
    if num_tables > _MAX_TABLES:
        raise CodecDataError(f"{num_tables} tables, at most {_MAX_TABLES} are allowed")
    table_ids_L2C = np.zeros(shape_L2C, dtype=np.uint16)
    if num_tables == 0:
        return _Plan(None, table_ids_L2C)
    frequencies = np.zeros((num_tables, SYMBOLS), dtype=np.uint16)
    for frequencies_S in frequencies:
        first, last = reader.number("u1"), reader.number("u1")
        frequencies_S[first : last + 1] = reader.array("<u2", max(0, last + 1 - first))
    check_frequencies(frequencies)
    if num_tables > 1:
        table_ids_L2C[:] = reader.take(table_ids_L2C.size).reshape(shape_L2C)
        if table_ids_L2C.max() >= num_tables:
            raise CodecDataError(f"a channel has table {table_ids_L2C.max()} of {num_tables}")
    return _Plan(frequencies, table_ids_L2C)


def _decode_layers(parts: LayeredPayload, layers: range, out: torch.Tensor) -> None:
    num_tokens, num_channels, itemsize = out.shape[2], out[0, 0, 0].numel(), out.element_size()
    reader = Reader(parts.preamble)
    plans = [_read_plan(reader, (len(parts.layers), 2, num_channels)) for _ in range(itemsize)]
    lookups = [None if plan.frequencies_KS is None else lookup_tables(plan.frequencies_KS) for plan in plans]
    plane_TC = np.empty((num_tokens, num_channels), dtype=np.uint8)
    for index, layer in enumerate(layers):
        reader = Reader(parts.layers[layer])
        for kv in (0, 1):
            words = unsigned(out[index, kv])
            words[:] = 0
            for number, (plan, lookup_KE) in enumerate(zip(plans, lookups, strict=True)):
                piece = reader.take(reader.number("<u4"))
                if len(piece) == plane_TC.size:
                    plane_TC.reshape(-1)[:] = piece
                elif lookup_KE is None or len(piece) > plane_TC.size:
                    raise CodecDataError(f"{len(piece)} bytes for {plane_TC.size} values")
                else:
                    ids_C = plan.table_ids_L2C[layer, kv]
                    decode_rows(piece, table_ids_C=ids_C, lookup_KE=lookup_KE, out_TC=plane_TC)
                _add(words, plane_TC.reshape(-1), 8 * (itemsize - 1 - number))
            _turn_back(words)
        reader.end()


_SIGNATURES: Final = [f"void({kind}[::1], uint8[::1], {kind})" for kind in ("uint16", "uint32")]


@compiled(_SIGNATURES)
def _cut(words: NDArray[Any], plane: Bytes, shift: int) -> None:
    """One byte of every word, after the word was turned left by one bit."""
    top = words.dtype.type(8 * words.itemsize - 1)
    one = words.dtype.type(1)
    for index in range(len(words)):
        word = words[index]
        plane[index] = np.uint8(((word << one) | (word >> top)) >> shift)


@compiled(_SIGNATURES)
def _add(words: NDArray[Any], plane: Bytes, shift: int) -> None:
    """Put one byte back into every word, whose byte there is zero."""
    for index in range(len(words)):
        words[index] |= words.dtype.type(plane[index]) << shift


@compiled(["void(uint16[::1])", "void(uint32[::1])"])
def _turn_back(words: NDArray[Any]) -> None:
    top = words.dtype.type(8 * words.itemsize - 1)
    one = words.dtype.type(1)
    for index in range(len(words)):
        word = words[index]
        words[index] = (word >> one) | (word << top)


@compiled("void(uint8[:, :, ::1], uint32[:, ::1])")
def _sum_channels(planes: Bytes, sums: NDArray[np.uint32]) -> None:
    """Sum over tokens: `[rows of channels, T, C]` to `[rows, C]`."""
    for row in range(planes.shape[0]):
        for token in range(planes.shape[1]):
            for channel in range(planes.shape[2]):
                sums[row, channel] += np.uint32(planes[row, token, channel])


@compiled("void(uint8[:, :, ::1], uint16[:, ::1], int64[:, ::1])")
def _count(planes: Bytes, table_ids: NDArray[np.uint16], counts: NDArray[np.int64]) -> None:
    """Add up how often each table's channels have each symbol."""
    for row in range(planes.shape[0]):
        for token in range(planes.shape[1]):
            for channel in range(planes.shape[2]):
                counts[table_ids[row, channel], planes[row, token, channel]] += 1
