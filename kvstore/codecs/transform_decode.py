"""From the sections of one band to its K or V.

Covers: entropy decoding of the levels that are there, the exact inverse transform, rotation, rounding.
Does not cover: where sections are (`kvstore.codecs.stream`), threads (`kvstore.codecs.transform`).

A level 0 section: number of escapes u32; escapes (index row * tokens + token u32, value i16); 16 states u32; words u16.
Escapes stand by row group, the last one first, and within a group by rising index: none stands twice.
Its symbols: the tokens' classes, where the profile has them (token t on lane t mod 16), then row groups, token by
token.
A refinement's section: 16 states u32, words u16.

Arithmetic, which every backend repeats: integer sums, one conversion to float32, `sum * (scale * factor)` with that
product rounded first, plus bias; the rotation as separate products and sums; one rounding to the KV's dtype.
Nothing is fused.
"""

from typing import Any, Final

import numpy as np
from numba import types

from kvstore.codecs.rans import FIRST_STATE
from kvstore.codecs.rans_vectors import LANES, decode_streams
from kvstore.codecs.transform_plan import MAX_VALUE
from kvstore.codecs.transform_vectors import (
    TILE_TOKENS,
    VECTOR,
    bfloat16_bits,
    copy_bytes,
    finish_head,
    pack_row,
    product,
)
from kvstore.compiled import compiled

BLOCK: Final = 16
"""Tokens that go through the inverse transform at once: their sums stay in the first-level cache."""
_STATE_BYTES: Final = 4 * LANES
ESCAPE_BYTES: Final = 6
COUNT_BYTES: Final = 4
_NUM_CLASSES: Final = 8
_MIDDLE: Final = 128

OK: Final = 0
ERRORS: Final = {
    1: "a section is too short for what it says it holds",
    2: "a section has too few or too many words",
    3: "a section does not end in its first state",
    4: "an escape or a class is out of bounds",
    5: "escapes are not in their order",
}
"""What the codes that `decode_level` returns mean."""

_U32: Final = types.uint32[::1]
_I16: Final = types.int16[::1]
_F32: Final = types.float32[::1]
_F32_2: Final = types.Array(types.float32, 2, "C", readonly=True)
_BYTES: Final = types.Array(types.uint8, 1, "C", readonly=True)


@compiled(types.uint32(_BYTES, types.intp))
def _u32(data: Any, at: int) -> Any:
    return (
        np.uint32(data[at])
        | np.uint32(data[at + 1]) << np.uint32(8)
        | np.uint32(data[at + 2]) << np.uint32(16)
        | np.uint32(data[at + 3]) << np.uint32(24)
    )


@compiled(types.intp(_BYTES, types.intp, types.intp, _U32, _U32))
def _read_words(data: Any, at: int, stop: int, states: Any, words: Any) -> int:
    """States at `at`, words from `words_at` on. Returns the number of words, or -1."""
    for lane in range(LANES):
        states[lane] = _u32(data, at + 4 * lane)
    first = at + 4 * LANES
    count = (stop - first) // 2
    for index in range(count):
        words[index] = np.uint32(data[first + 2 * index]) | np.uint32(data[first + 2 * index + 1]) << np.uint32(8)
    words[count : count + LANES] = 0
    return count


@compiled(types.intp(types.intp, types.intp, _U32))
def _ended(at: int, count: int, states: Any) -> int:
    """OK if exactly all words were used and every state is the first one."""
    if at != count:
        return 2
    for lane in range(LANES):
        if states[lane] != FIRST_STATE:
            return 3
    return 0


_IDS_3: Final = types.Array(types.int32, 3, "C", readonly=True)
_IDS_2: Final = types.Array(types.int32, 2, "C", readonly=True)
_LUT: Final = types.Array(types.uint32, 2, "C", readonly=True)
_VALUES: Final = types.int16[:, :, ::1]
_BASIS: Final = types.Array(types.int8, 3, "C", readonly=True)
_START: Final = types.Array(types.int32, 1, "C", readonly=True)
_ROW: Final = types.Array(types.float32, 1, "C", readonly=True)


@compiled(types.boolean(_BYTES, types.intp, types.intp, types.intp))
def escapes_in_order(data: Any, at: int, count: int, tokens: int) -> bool:
    """Whether `count` escapes at `at` stand as an encoder writes them: two of one place would leave its value open."""
    before: Any = np.int64(-1)
    for escape in range(count):
        index = np.int64(_u32(data, at + ESCAPE_BYTES * escape))
        group, group_before = index // tokens // LANES, before // tokens // LANES
        if escape and (group > group_before or (group == group_before and index <= before)):
            return False
        before = index
    return True


@compiled(types.intp(_BYTES, types.intp, types.intp, types.intp, types.intp, _VALUES))
def _apply_escapes(data: Any, at: int, count: int, bound: int, rows: int, values: Any) -> int:
    tokens = values.shape[1]
    if not escapes_in_order(data, at, count, tokens):
        return 5
    for escape in range(count):
        place = at + ESCAPE_BYTES * escape
        index = np.int64(_u32(data, place))
        value = np.int64(np.int16(np.uint16(data[place + 4]) | np.uint16(data[place + 5]) << np.uint16(8)))
        row = index // tokens
        if row >= rows or value > bound or value < -bound:
            return 4
        values[row // LANES, index % tokens, row % LANES] = value
    return 0


_SPANS: Final = types.Array(types.int64, 2, "C", readonly=True)
_COUNTS: Final = types.Array(types.int64, 1, "C", readonly=True)
_JOBS: Final = types.int64[:, ::1]


@compiled(types.intp(_BYTES, _SPANS, types.boolean, types.int64[::1]))
def _heads(data: Any, spans: Any, is_base: bool, escapes: Any) -> int:
    """Counts of escapes of both sections; whether the sections can be what they say."""
    for kv in range(2):
        size = spans[kv, 1] - spans[kv, 0]
        escapes[kv] = 0
        head: Any = np.int64(0)
        if is_base:
            if size < COUNT_BYTES:
                return 1
            escapes[kv] = np.int64(_u32(data, spans[kv, 0]))
            head = COUNT_BYTES + ESCAPE_BYTES * escapes[kv]
        if size < head + _STATE_BYTES or (size - head) % 2:
            return 1
    return 0


_CLASS_PAIR: Final = types.UniTuple(_I16, 2)


@compiled(types.intp(_LUT, types.UniTuple(_IDS_2, 2), _CLASS_PAIR, _JOBS))
def _decode_classes(lut: Any, class_tables: Any, classes: Any, jobs: Any) -> int:
    for kv in range(2):
        if len(classes[kv]) == 0:
            continue
        jobs[kv, 4], jobs[kv, 5] = class_tables[kv].ctypes.data, classes[kv].ctypes.data
        decode_streams(lut.ctypes.data, jobs[kv].ctypes.data, 1, len(classes[kv]) // LANES, False)
        if jobs[kv, 1] > jobs[kv, 2]:
            return 2
        for token in range(len(classes[kv])):
            if classes[kv][token] < 0 or classes[kv][token] >= _NUM_CLASSES:
                return 4
    return 0


@compiled(
    types.intp(
        _BYTES,
        _SPANS,
        _LUT,
        types.UniTuple(_IDS_3, 2),
        types.UniTuple(_IDS_2, 2),
        _COUNTS,
        _COUNTS,
        types.intp,
        types.boolean,
        types.UniTuple(_VALUES, 2),
        _CLASS_PAIR,
    )
)
def decode_level(
    data: Any,
    spans: Any,
    lut: Any,
    tables: Any,
    class_tables: Any,
    groups: Any,
    rows: Any,
    missing: int,
    is_base: bool,
    values: Any,
    classes: Any,
) -> int:
    """One level of K and V of a layer, side by side: OK, or one of `ERRORS`.

    Args:
        data: The payload.
        spans: Start and stop of both sections, i64[2, 2].
        lut: Look-up tables.
        tables: Of both, by row group, context and lane: see `decode_streams`.
        class_tables: Of both.
        groups: Row groups that are coded, i64[2].
        rows: Rows that may have escapes, i64[2].
        missing: Levels behind this one.
        is_base: Whether this is level 0; another one refines.
        values: Of both, i16[row groups, tokens, 16]; level 0 fills them.
        classes: Of both, in whole steps of 16 tokens, or empty; level 0 fills them.
    """
    escapes = np.empty(2, np.int64)
    code = _heads(data, spans, is_base, escapes)
    if code:
        return code
    room = (spans[0, 1] - spans[0, 0] + spans[1, 1] - spans[1, 0]) // 2 + 2 * LANES
    words, states, jobs = np.empty(room, np.uint32), np.empty((2, LANES), np.uint32), np.empty((2, 6), np.int64)
    at = 0
    for kv in range(2):
        head = COUNT_BYTES + ESCAPE_BYTES * escapes[kv] if is_base else 0
        count = _read_words(data, spans[kv, 0] + head, spans[kv, 1], states[kv], words[at:])
        jobs[kv, 0], jobs[kv, 1], jobs[kv, 2] = words.ctypes.data + 4 * at, 0, count
        jobs[kv, 3] = states.ctypes.data + _STATE_BYTES * kv
        at += count + LANES
    if is_base:
        code = _decode_classes(lut, class_tables, classes, jobs)
        if code:
            return code
    both, tokens = min(groups[0], groups[1]), values[0].shape[1]
    for group in range(max(groups[0], groups[1])):
        for kv in range(2):
            if jobs[kv, 1] > jobs[kv, 2]:
                return 2
            if group < groups[kv]:
                jobs[kv, 4], jobs[kv, 5] = tables[kv][group].ctypes.data, values[kv][group].ctypes.data
        if group < both:
            decode_streams(lut.ctypes.data, jobs.ctypes.data, 2, tokens, not is_base)
        else:
            longer = 0 if groups[0] > both else 1
            decode_streams(lut.ctypes.data, jobs[longer].ctypes.data, 1, tokens, not is_base)
    for kv in range(2):
        code = _ended(jobs[kv, 1], jobs[kv, 2], states[kv])
        if not code and is_base:
            bound = ((MAX_VALUE + 1) >> missing) - 1
            code = _apply_escapes(data, spans[kv, 0] + COUNT_BYTES, escapes[kv], bound, rows[kv], values[kv])
        if code:
            return code
    # The loops know only addresses, and numba gives an array back after its last use: this is the last one of words.
    return OK if len(words) else 1


_SUMS: Final = types.int32[:, ::1]
_CUTS: Final = types.int64[::1]


@compiled(types.void(_VALUES, types.intp, _CUTS, types.intp, _BASIS, _SUMS))
def _correct(values: Any, first: int, cuts: Any, num_cuts: int, basis: Any, sums: Any) -> None:
    """Add what `pack_row` cut off in these rows of 16: exact, and rare."""
    for cut in range(num_cuts):
        group, token = cuts[cut] // BLOCK, cuts[cut] % BLOCK
        for lane in range(LANES):
            value = np.int64(values[group, first + token, lane])
            midpoint: Any = 2 * value + (value > 0) - (value < 0)
            rest = midpoint - min(max(midpoint, -_MIDDLE), _MIDDLE - 1)
            if rest == 0:
                continue
            row = group * LANES + lane
            for channel in range(sums.shape[1]):
                weight = basis[channel // LANES, row // 4, channel % LANES * 4 + row % 4]
                sums[token, channel] += rest * weight


@compiled(types.void(_VALUES, types.intp, types.intp, types.intp, _BASIS, _START, types.uint8[:, ::1], _CUTS, _SUMS))
def inverse_block(
    values: Any, groups: int, first: int, count: int, basis: Any, start: Any, packed: Any, cuts: Any, sums: Any
) -> None:
    """Exact sums i32[16, C] of `count` <= 16 tokens from `first` on; `packed` u8[16, rows] and `cuts` are room."""
    num_cuts = 0
    source_at, packed_at, width = values.ctypes.data, packed.ctypes.data, packed.shape[1]
    for group in range(groups):
        row_at = source_at + 2 * LANES * (group * values.shape[1] + first)
        for token in range(count):
            if pack_row(row_at + 2 * LANES * token, packed_at + token * width + group * LANES):
                cuts[num_cuts] = group * BLOCK + token
                num_cuts += 1
    channels = sums.shape[1]
    if not groups:
        sums[:] = 0
        return
    rounded = (count + TILE_TOKENS - 1) // TILE_TOKENS * TILE_TOKENS
    vector_bytes = basis.shape[1] * basis.shape[2]
    out, at_start, columns = sums.ctypes.data, start.ctypes.data, basis.ctypes.data
    vectors = channels // VECTOR
    product(True, packed_at, width, columns, vector_bytes, at_start, out, 4 * channels, groups * 4, rounded, vectors)
    if num_cuts:
        _correct(values, first, cuts, num_cuts, basis, sums)


@compiled(types.void(_F32, types.intp, types.intp, _ROW, _ROW, types.boolean))
def rotate_row(row: Any, channels: int, head_dim: int, cosine: Any, sine: Any, is_neox: bool) -> None:
    """Rotate every head of one token, in place, to the position of `cosine` and `sine`."""
    half = len(cosine)
    step, apart = (1, half) if is_neox else (2, 1)
    for head in range(0, channels, head_dim):
        for index in range(half):
            low = head + step * index
            one, other = row[low], row[low + apart]
            row[low] = one * cosine[index] - other * sine[index]
            row[low + apart] = other * cosine[index] + one * sine[index]


@compiled(types.void(types.int32[::1], _ROW, _ROW, types.float32, types.intp, _ROW, _ROW, types.boolean, _F32))
def _finish_row(
    sums: Any, scale: Any, bias: Any, factor: Any, head_dim: int, cosine: Any, sine: Any, is_neox: bool, row: Any
) -> None:
    """As `finish_head`, of all heads of one token, for any dimension and order of rotary pairs."""
    for channel in range(len(row)):
        row[channel] = np.float32(sums[channel]) * (scale[channel] * factor) + bias[channel]
    rotate_row(row, len(row), head_dim, cosine, sine, is_neox)


_PLACE: Final = types.UniTuple(types.intp, 3)
_MAIN: Final = (
    _VALUES,
    types.intp,
    _BASIS,
    _START,
    _ROW,
    _ROW,
    _I16,
    _ROW,
    types.float32,
    types.intp,
    _F32_2,
    _F32_2,
    types.boolean,
    types.boolean,
    _PLACE,
    types.boolean,
)


@compiled(types.void(*_MAIN))
def inverse_band(
    values: Any,
    groups: int,
    basis: Any,
    start: Any,
    scale: Any,
    bias: Any,
    classes: Any,
    token_scales: Any,
    factor: Any,
    head_dim: int,
    cosine: Any,
    sine: Any,
    is_neox: bool,
    is_key: bool,
    place: Any,
    is_half: bool,
) -> None:
    """Symbols to K or V of all tokens, in bfloat16 (`is_half`) or float32.

    `place` is the address of the first value, and the distances from token to token and from head to head, in bytes.
    """
    tokens = values.shape[1]
    channels = len(scale)
    packed = np.zeros((BLOCK, max(LANES, groups * LANES)), np.uint8)
    sums = np.empty((BLOCK, basis.shape[0] * LANES), np.int32)
    cuts = np.empty(BLOCK * max(1, groups), np.int64)
    row, halves = np.empty(channels, np.float32), np.empty(channels, np.uint16)
    half, head_bytes = cosine.shape[1] if is_key else 0, head_dim * (2 if is_half else 4)
    is_fast = head_dim % VECTOR == 0 and half % VECTOR == 0 and (is_neox or half == 0)
    at_sums, at_scale, at_bias = sums.ctypes.data, scale.ctypes.data, bias.ctypes.data
    for first in range(0, tokens, BLOCK):
        count = min(BLOCK, tokens - first)
        inverse_block(values, groups, first, count, basis, start, packed, cuts, sums)
        for token in range(count):
            scaled = factor
            if len(classes):
                scaled = factor * token_scales[classes[first + token]]
            turn = first + token
            at = place[0] + (first + token) * place[1]
            at_cosine, at_sine = cosine[turn].ctypes.data, sine[turn].ctypes.data
            if is_fast:
                for head in range(channels // head_dim):
                    near = 4 * head * head_dim
                    of_head = at_sums + 4 * token * sums.shape[1] + near
                    finish_head(
                        of_head, at_scale + near, at_bias + near, scaled, at_cosine, at_sine, half, head_dim,
                        at + head * place[2], is_half,
                    )  # fmt: skip
                continue
            _finish_row(
                sums[token], scale, bias, scaled, head_dim, cosine[turn, :half], sine[turn, :half], is_neox, row
            )
            source = row.ctypes.data
            if is_half:
                for channel in range(channels):
                    halves[channel] = bfloat16_bits(row[channel])
                source = halves.ctypes.data
            for head in range(channels // head_dim):
                copy_bytes(at + head * place[2], source + head * head_bytes, head_bytes)
