"""One layer of a `transform` payload, from its sections to K and V, in one compiled call.

Covers: the order of levels, and of K's and V's bands. Does not cover: one level, or one band
(`kvstore.codecs.transform_decode`).
"""

from typing import Any, Final

import numpy as np
from numba import types

from kvstore.codecs.rans_vectors import LANES
from kvstore.codecs.transform_decode import OK, decode_level, inverse_band
from kvstore.compiled import compiled

_BYTES: Final = types.Array(types.uint8, 1, "C", readonly=True)
_LUT: Final = types.Array(types.uint32, 2, "C", readonly=True)
_F32_2: Final = types.Array(types.float32, 2, "C", readonly=True)
_VALUES: Final = types.int16[:, :, ::1]
_CLASS_PAIR: Final = types.UniTuple(types.int16[::1], 2)
_PLACE: Final = types.UniTuple(types.intp, 3)
_BANDS: Final = types.UniTuple(types.intp, 2)
_COUNTS_2: Final = types.Array(types.int64, 2, "C", readonly=True)
_LEVELS: Final = (
    _BYTES,
    types.Array(types.int64, 3, "C", readonly=True),
    _LUT,
    types.Array(types.int32, 5, "C", readonly=True),
    types.Array(types.int32, 3, "C", readonly=True),
    _COUNTS_2,
    _COUNTS_2,
    _BANDS,
    types.UniTuple(_VALUES, 2),
    _CLASS_PAIR,
)


@compiled(types.intp(*_LEVELS))
def decode_levels(
    data: Any,
    spans: Any,
    lut: Any,
    table_starts: Any,
    class_starts: Any,
    num_groups: Any,
    num_rows: Any,
    bands: Any,
    values: Any,
    classes: Any,
) -> int:
    """All levels of `spans` i64[V, 2, 2] of K and V of a layer; `OK`, or 8 times the level plus one of `ERRORS`.

    The arrays behind `lut` are a plan's; `bands` are K's and V's place in them. `values` must be zeros behind
    the groups of level 0; both it and `classes` are as for `decode_level`.
    """
    key, value = bands
    num_levels = num_groups.shape[1]
    for level in range(spans.shape[0]):
        groups = np.array([num_groups[key, level], num_groups[value, level]], np.int64)
        rows = np.array([num_rows[key, level], num_rows[value, level]], np.int64)
        tables = (table_starts[key, level], table_starts[value, level])
        ids = (class_starts[key], class_starts[value])
        missing = num_levels - 1 - level
        code = decode_level(
            data,
            spans[level],
            lut,
            tables,
            ids,
            groups,
            rows,
            missing,
            level == 0,
            values,
            classes,
        )
        if code:
            return 8 * level + code
    return OK


@compiled(
    types.intp(
        *_LEVELS[:-2],
        types.Array(types.boolean, 1, "C", readonly=True),
        types.Array(types.int8, 4, "C", readonly=True),
        types.Array(types.int32, 3, "C", readonly=True),
        _F32_2,
        _F32_2,
        _F32_2,
        types.intp,
        types.intp,
        _F32_2,
        _F32_2,
        types.boolean,
        _PLACE,
        types.intp,
        types.boolean,
    )
)
def decode_bands(
    data: Any,
    spans: Any,
    lut: Any,
    table_starts: Any,
    class_starts: Any,
    num_groups: Any,
    num_rows: Any,
    bands: Any,
    has_classes: Any,
    basis: Any,
    start: Any,
    scale: Any,
    bias: Any,
    token_scales: Any,
    channels: int,
    head_dim: int,
    cosine: Any,
    sine: Any,
    is_neox: bool,
    place: Any,
    value_bytes: int,
    is_half: bool,
) -> int:
    """K and V of one layer and head group, from sections to values: what `decode_levels` returns.

    One call, because every call from Python costs as much as a tenth of what a layer of a small model does. The arrays
    are a plan's; `place` is as for `inverse_band`, of K, and V is `value_bytes` behind it.
    """
    tokens, level = cosine.shape[0], spans.shape[0] - 1
    room = (tokens + LANES - 1) // LANES * LANES
    values = (
        np.empty((max(1, num_groups[bands[0], level]), tokens, LANES), np.int16),
        np.empty((max(1, num_groups[bands[1], level]), tokens, LANES), np.int16),
    )
    for kv in range(2):
        # Level 0 fills its own groups.
        values[kv][num_groups[bands[kv], 0] :] = 0
    classes = (
        np.empty(room if has_classes[bands[0]] else 0, np.int16),
        np.empty(room if has_classes[bands[1]] else 0, np.int16),
    )
    code = decode_levels(data, spans, lut, table_starts, class_starts, num_groups, num_rows, bands, values, classes)
    if code:
        return code
    factor = np.float32(1 << num_groups.shape[1] - 1 - level)
    for kv in range(2):
        band = bands[kv]
        inverse_band(
            values[kv],
            num_groups[band, level],
            basis[band],
            start[band, level],
            scale[band, :channels],
            bias[band, :channels],
            classes[kv],
            token_scales[band],
            factor,
            head_dim,
            cosine,
            sine,
            is_neox,
            kv == 0,
            (place[0] + kv * value_bytes, place[1], place[2]),
            is_half,
        )
    return OK
