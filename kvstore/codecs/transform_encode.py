"""From the K or V of one band to its sections.

Covers: the forward transform, quantising, classes of tokens, levels, escapes, entropy coding.
Does not cover: where sections go (`kvstore.codecs.stream`), threads (`kvstore.codecs.transform`).

What a profile may hold in `encoder`, all optional:

    rounding          f32 [L, 2, G]  added to a magnitude before its fraction is cut; 0 where absent
    dead_zone         f32 [L, 2, G]  magnitudes below are 0; 0 where absent. Both in units of the finest bin

and what `kvstore.codecs.importance` needs for the classes of tokens.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numba import types
from numpy.typing import NDArray

from kvstore.codecs.profile import Profile, ProfileDataError, derived
from kvstore.codecs.rans import FIRST_STATE
from kvstore.codecs.rans_vectors import LANES, encode_bits, encode_group
from kvstore.codecs.transform_plan import MAX_VALUE, Plan, encoder_starts, flat_bands, plan_of
from kvstore.codecs.transform_vectors import product, quantise_16
from kvstore.compiled import compiled

BLOCK: Final = 16
_ESCAPE_BYTES: Final = 6
_INVERSE_ERROR: Final = 1e-6
"""In bins: beyond it, the basis has no inverse worth the name."""

TOO_LONG: Final = -1
"""What the encoders return when a section does not fit."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Forward:
    """What an encoder adds to a plan."""

    plan: Plan
    table_starts: NDArray[np.int32]
    """Of level 0, `[W, row group, context, lane]`."""
    class_starts: NDArray[np.int32]
    matrix: NDArray[np.float32]
    """Inverse of basis and scale, in finest bins: `[W, vector of rows, C, 16 rows]`."""
    start: NDArray[np.float32]
    """What the bias becomes, `[W, R]`."""
    limit: NDArray[np.float32]
    """Largest magnitude of each row, `[W, R]`: rows that are dead at coarse levels have few bits."""
    low: NDArray[np.int16]
    """Level 0's symbols without escapes, `[W, row group, lane]`."""
    high: NDArray[np.int16]
    rounding: NDArray[np.float32]
    dead_zone: NDArray[np.float32]
    """Of each band."""


def forward_of(profile: Profile) -> Forward:
    """The encoder's side of a profile; made at its first use, and kept as long as the profile."""
    return derived(profile, _build)


def _build(profile: Profile) -> Forward:
    plan, bands, levels = plan_of(profile), flat_bands(profile), profile.num_levels
    rows, channels = plan.basis.shape[2] * 4, profile.num_channels
    matrix = np.zeros((len(bands), channels, rows), np.float32)
    start, limit = (np.zeros((len(bands), rows), np.float32) for _ in range(2))
    for index, band in enumerate(bands):
        decoded_RC = band.basis_RC.astype(np.float64) * band.scale_C * 2
        live = band.rows_per_level
        inverse_CR = _inverse(decoded_RC)[:, : live[-1]]
        matrix[index, :, : live[-1]] = inverse_CR
        start[index, : live[-1]] = -(band.bias_C.astype(np.float64) @ inverse_CR)
        # A row that appears at a refinement has only the bits from there on.
        for level in range(levels - 1, 0, -1):
            limit[index, : live[level]] = (1 << levels - level) - 1
        limit[index, : live[0]] = MAX_VALUE
    low, high = _symbol_bounds(plan)
    by_vector = matrix.reshape(len(bands), channels, rows // LANES, LANES).transpose(0, 2, 1, 3)
    return Forward(
        plan=plan,
        table_starts=encoder_starts(plan.table_ids[:, 0]),
        class_starts=encoder_starts(plan.class_ids),
        matrix=np.ascontiguousarray(by_vector),
        start=start,
        limit=limit,
        low=low,
        high=high,
        rounding=_per_band(profile, "rounding"),
        dead_zone=_per_band(profile, "dead_zone"),
    )


def _inverse(decoded_RC: NDArray[np.float64]) -> NDArray[Any]:
    """Plain where there is one: that keeps the calibrated metric, and takes a tenth of the time."""
    rows, channels = decoded_RC.shape
    if rows == channels:
        try:
            inverse_CR = np.linalg.inv(decoded_RC)
        except np.linalg.LinAlgError:
            return np.linalg.pinv(decoded_RC)
        if np.abs(decoded_RC @ inverse_CR - np.eye(rows)).max() < _INVERSE_ERROR:
            return inverse_CR
    return np.linalg.pinv(decoded_RC)


def _symbol_bounds(plan: Plan) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """What every context's table can code, so that the bounds do not depend on the token before."""
    ids = plan.table_ids[:, 0]
    low, high = plan.tables.low_K[ids].max(axis=2), plan.tables.high_K[ids].min(axis=2)
    return np.ascontiguousarray(low), np.ascontiguousarray(high)


def _per_band(profile: Profile, name: str) -> NDArray[np.float32]:
    shape = (profile.num_layers, 2, profile.groups)
    array = profile.encoder.get(name)
    if array is None:
        return np.zeros(shape, np.float32).ravel()
    if array.shape != shape or not np.isfinite(array).all():
        raise ProfileDataError(f"encoder's {name!r} has shape {array.shape}, or is not finite; expected {shape}")
    return np.ascontiguousarray(array, np.float32).ravel()


_VALUES: Final = types.int16[:, :, ::1]
_OUT: Final = types.uint8[::1]
_I16: Final = types.Array(types.int16, 1, "C", readonly=True)
_I16_2: Final = types.Array(types.int16, 2, "C", readonly=True)
_F32: Final = types.Array(types.float32, 1, "C", readonly=True)
_F32_2: Final = types.Array(types.float32, 2, "C", readonly=True)
_MATRIX: Final = types.Array(types.float32, 3, "C", readonly=True)
_IDS_2: Final = types.Array(types.int32, 2, "C", readonly=True)
_IDS_3: Final = types.Array(types.int32, 3, "C", readonly=True)
_ENTRIES: Final = types.Array(types.uint32, 2, "C", readonly=True)
_FLOAT: Final = types.float32


@compiled(types.boolean(types.int32[::1]))
def is_finite(bits: Any) -> bool:
    """Whether all float32 are finite, from their bits: integers, because their greatest is found in vectors."""
    greatest = np.int32(0)
    for index in range(len(bits)):
        greatest = max(greatest, bits[index] & np.int32(0x7FFFFFFF))
    return bool(greatest < 0x7F800000)


@compiled(types.boolean(types.Array(types.int16, 4, "C", readonly=True), types.intp, types.int32[:, :, :, ::1]))
def widen(bits: Any, first: int, out: Any) -> bool:
    """bfloat16 `[2, T, N, H]` from token `first` on to float32, both as bits. Whether all are finite, also before."""
    greatest = np.int16(0)
    for kv in range(2):
        for token in range(bits.shape[1]):
            source = bits[kv, token].reshape(-1)
            for index in range(len(source)):
                greatest = max(greatest, source[index] & np.int16(0x7FFF))
            if token >= first:
                target = out[kv, token - first].reshape(-1)
                for index in range(len(source)):
                    target[index] = np.int32(source[index]) << np.int32(16)
    return bool(greatest < 0x7F80)


@compiled(types.void(types.float32[:, :, ::1], _F32_2, _F32_2, types.boolean))
def unrotate(k_TNH: Any, cosine: Any, sine: Any, is_neox: bool) -> None:
    """Turn keys back to position 0, in place."""
    half = cosine.shape[1]
    for token in range(k_TNH.shape[0]):
        for head in range(k_TNH.shape[1]):
            row = k_TNH[token, head]
            if is_neox:
                low, high = row[:half], row[half : 2 * half]
                for index in range(half):
                    one, other = low[index], high[index]
                    low[index] = one * cosine[token, index] + other * sine[token, index]
                    high[index] = other * cosine[token, index] - one * sine[token, index]
            else:
                for index in range(half):
                    one, other = row[2 * index], row[2 * index + 1]
                    row[2 * index] = one * cosine[token, index] + other * sine[token, index]
                    row[2 * index + 1] = other * cosine[token, index] - one * sine[token, index]


@compiled(types.void(_F32_2, _MATRIX, _F32, _F32, _FLOAT, _FLOAT, _I16, _F32, _VALUES))
def forward_band(
    x: Any,
    matrix: Any,
    start: Any,
    limit: Any,
    rounding: Any,
    dead_zone: Any,
    classes: Any,
    token_scales: Any,
    values: Any,
) -> None:
    """K or V `x` f32[tokens, C] to symbols at the finest level, i16[row groups, tokens, 16]."""
    tokens, channels = x.shape
    rows = matrix.shape[0] * LANES
    block = np.zeros((BLOCK, channels), np.float32)
    result = np.empty((BLOCK, rows), np.float32)
    for first in range(0, tokens, BLOCK):
        count = min(BLOCK, tokens - first)
        source = x.ctypes.data + 4 * channels * first
        if count < BLOCK:
            block[:count] = x[first:tokens]
            source = block.ctypes.data
        columns, width, out = matrix.ctypes.data, 4 * channels * LANES, result.ctypes.data
        at_start, size = start.ctypes.data, 4 * channels
        product(False, source, size, columns, width, at_start, out, 4 * rows, channels, BLOCK, matrix.shape[0])
        for token in range(count):
            inverse = np.float32(1.0)
            if len(classes):
                inverse = np.float32(1.0) / token_scales[classes[first + token]]
            at_limit, at_value = limit.ctypes.data, values.ctypes.data + 2 * LANES * (first + token)
            for group in range(matrix.shape[0]):
                source = out + 4 * (rows * token + group * LANES)
                target = at_value + 2 * LANES * tokens * group
                quantise_16(source, inverse, rounding, dead_zone, at_limit + 4 * LANES * group, target)


@compiled(types.intp(_OUT, types.intp, types.uint32))
def _put_u32(out: Any, at: int, value: Any) -> int:
    for byte in range(4):
        out[at + byte] = np.uint8(value >> np.uint32(8 * byte))
    return at + 4


@compiled(types.intp(_OUT, types.intp, types.uint32[::1], types.uint32[::1], types.intp))
def _put_stream(out: Any, at: int, states: Any, words: Any, first: int) -> int:
    """States, and the words from `first` on. Returns where they end, or `TOO_LONG`."""
    count = len(words) - first
    if at + 4 * LANES + 2 * count > len(out):
        return TOO_LONG
    for lane in range(LANES):
        at = _put_u32(out, at, states[lane])
    for index in range(count):
        out[at + 2 * index] = np.uint8(words[first + index])
        out[at + 2 * index + 1] = np.uint8(words[first + index] >> np.uint32(8))
    return at + 2 * count


@compiled(types.boolean(_VALUES, types.intp, types.intp, _I16_2, _I16_2, types.int16[:, ::1]))
def _base_symbols(values: Any, group: int, missing: int, low: Any, high: Any, symbols: Any) -> bool:
    """Symbols of one row group behind a row of zeros; whether any had to be cut."""
    cut = np.int16(0)
    for token in range(values.shape[1]):
        source, target = values[group, token], symbols[token + 1]
        for lane in range(LANES):
            value = source[lane]
            size = np.int16(abs(value) >> missing)
            coarse = size if value >= 0 else np.int16(-size)
            symbol = np.int16(min(max(coarse, low[group, lane]), high[group, lane]))
            cut |= np.int16(symbol ^ coarse)
            target[lane] = symbol
    return cut != 0


@compiled(types.intp(_VALUES, types.intp, types.intp, types.int16[:, ::1], _OUT, types.intp))
def _put_escapes(values: Any, group: int, missing: int, symbols: Any, out: Any, at: int) -> int:
    """What was cut, as it is. Returns where the escapes end, or `TOO_LONG`."""
    tokens = values.shape[1]
    for lane in range(LANES):
        for token in range(tokens):
            value = np.int64(values[group, token, lane])
            size = abs(value) >> missing
            coarse = size if value >= 0 else -size
            if coarse == symbols[token + 1, lane]:
                continue
            if at + _ESCAPE_BYTES > len(out):
                return TOO_LONG
            at = _put_u32(out, at, np.uint32((group * LANES + lane) * tokens + token))
            out[at], out[at + 1] = np.uint8(coarse & 255), np.uint8(coarse >> 8 & 255)
            at += 2
    return at


@compiled(types.intp(_VALUES, types.intp, types.intp, _IDS_3, _IDS_2, _I16, _I16_2, _I16_2, _ENTRIES, _OUT))
def encode_base(
    values: Any,
    missing: int,
    groups: int,
    tables: Any,
    class_tables: Any,
    classes: Any,
    low: Any,
    high: Any,
    entries: Any,
    out: Any,
) -> int:
    """Level 0 as a section at the start of `out`; its length, or `TOO_LONG`. `classes`: whole steps of 16, or none."""
    tokens = values.shape[1]
    symbols = np.zeros((tokens + 1, LANES), np.int16)
    states = np.full(LANES, FIRST_STATE, np.uint32)
    words = np.empty(groups * tokens * LANES + len(classes), np.uint32)
    at, end = len(words), 4
    table, into, state = entries.ctypes.data, words.ctypes.data, states.ctypes.data
    before = symbols.ctypes.data
    if end > len(out):
        return TOO_LONG
    for group in range(groups - 1, -1, -1):
        if _base_symbols(values, group, missing, low, high, symbols):
            end = _put_escapes(values, group, missing, symbols, out, end)
            if end < 0:
                return TOO_LONG
        ids = tables[group].ctypes.data
        at = encode_group(table, into, at, state, ids, before + 2 * LANES, before, tokens)
    if len(classes):
        known = classes.ctypes.data
        at = encode_group(table, into, at, state, class_tables.ctypes.data, known, known, len(classes) // LANES)
    _put_u32(out, 0, np.uint32((end - 4) // _ESCAPE_BYTES))
    return _put_stream(out, end, states, words, at)


@compiled(types.intp(_VALUES, types.intp, types.intp, _IDS_3, _OUT))
def encode_refinement(values: Any, missing: int, groups: int, cuts: Any, out: Any) -> int:
    """The bit that a level adds, as a section at the start of `out`; its length, or `TOO_LONG`."""
    tokens = values.shape[1]
    states = np.full(LANES, FIRST_STATE, np.uint32)
    words = np.empty(groups * tokens * LANES, np.uint32)
    at = len(words)
    into, state = words.ctypes.data, states.ctypes.data
    for group in range(groups - 1, -1, -1):
        source = values.ctypes.data + 2 * LANES * tokens * group
        at = encode_bits(into, at, state, cuts[group].ctypes.data, source, missing, tokens)
    return _put_stream(out, 0, states, words, at)
