"""A profile as the compiled loops want it.

Covers: tables, basis and scales of all bands in few aligned arrays, built once per profile; rotary tables.
Does not cover: the loops (`kvstore.codecs.transform_decode`, `kvstore.codecs.transform_encode`).
Shape letters: W bands (layer, K or V, head group), V levels, R rows, C channels; both in vectors of 16.
"""

import functools
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.codecs.profile import FREQUENCY_SUM, NUM_CONTEXTS, Band, Profile, derived
from kvstore.codecs.rans import ENCODER_ENTRIES, CoderTables, coder_tables
from kvstore.codecs.rans_vectors import LANES

MAX_VALUE: Final = (1 << 13) - 1
"""Largest magnitude of a symbol at the finest level: 16383 * 127 * 1024 still fits 32 bits."""
_OFFSET: Final = 128
"""What is added to symbols so that they are unsigned bytes."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """Arrays over all bands of a profile."""

    num_channels: int
    tables: CoderTables
    table_ids: NDArray[np.int32]
    """`[W, V, row group, context, lane]`; lanes without a row have the last table."""
    table_starts: NDArray[np.int32]
    """At level 0, first look-up entries of those tables; at refinements, which code -1, 0 and 1 only, where 0 begins
    in a table, and 1 (16 bits above)."""
    class_ids: NDArray[np.int32]
    """`[W, context, lane]`: one table, repeated."""
    class_starts: NDArray[np.int32]
    has_classes: NDArray[np.bool_]
    num_groups: NDArray[np.int64]
    """Row groups that are coded, `[W, V]`."""
    num_rows: NDArray[np.int64]
    """Rows that are coded, `[W, V]`."""
    basis: NDArray[np.int8]
    """`[W, vector of channels, R / 4, 16 channels * 4 rows]`."""
    start: NDArray[np.int32]
    """What takes the offset back, `[W, V, C]`."""
    bias: NDArray[np.float32]
    scale: NDArray[np.float32]
    token_scales: NDArray[np.float32]


def padded(count: int) -> int:
    """The next multiple of 16."""
    return -(-count // LANES) * LANES


def plan_of(profile: Profile) -> Plan:
    """The plan of a profile; made at its first use, and kept as long as the profile."""
    return derived(profile, _build)


def flat_bands(profile: Profile) -> list[Band]:
    """Bands in the order of their index."""
    return [band for layer in profile.bands for pair in layer for band in pair]


def _build(profile: Profile) -> Plan:
    bands = flat_bands(profile)
    tables = coder_tables(profile.frequencies_KS)
    nobody = len(tables.lut_KF) - 1
    levels, channels = profile.num_levels, padded(profile.num_channels)
    rows = max(LANES, padded(max(band.rows_per_level[-1] for band in bands)))
    ids = np.full((len(bands), levels, rows, NUM_CONTEXTS), nobody, np.int32)
    class_ids = np.full((len(bands), NUM_CONTEXTS, LANES), nobody, np.int32)
    groups = np.zeros((len(bands), levels), np.int64)
    basis = np.zeros((len(bands), rows, channels), np.int8)
    start = np.zeros((len(bands), levels, channels), np.int32)
    bias, scale = (np.zeros((len(bands), channels), np.float32) for _ in range(2))
    for index, band in enumerate(bands):
        live = band.rows_per_level
        basis[index, : live[-1], : band.basis_RC.shape[1]] = band.basis_RC[: live[-1]]
        bias[index, : len(band.bias_C)], scale[index, : len(band.bias_C)] = band.bias_C, band.scale_C
        if band.class_table is not None:
            class_ids[index] = band.class_table
        for level in range(levels):
            ids[index, level, : live[level]] = band.table_ids_VRX[level, : live[level]]
            groups[index, level] = padded(live[level]) // LANES
            used = basis[index, : padded(live[level])].sum(axis=0, dtype=np.int32)
            start[index, level] = -_OFFSET * used
    by_vector = basis.reshape(len(bands), rows // 4, 4, channels // LANES, LANES).transpose(0, 3, 1, 4, 2)
    by_group = ids.reshape(len(bands), levels, rows // LANES, LANES, NUM_CONTEXTS).transpose(0, 1, 2, 4, 3)
    table_ids = np.ascontiguousarray(by_group)
    table_starts = table_ids * np.int32(FREQUENCY_SUM)
    table_starts[:, 1:] = _cuts(profile.frequencies_KS)[table_ids[:, 1:]]
    return Plan(
        num_channels=profile.num_channels,
        tables=tables,
        table_ids=table_ids,
        table_starts=table_starts,
        class_ids=class_ids,
        class_starts=class_ids * np.int32(FREQUENCY_SUM),
        has_classes=np.array([band.class_table is not None for band in bands]),
        num_groups=groups,
        num_rows=np.array([band.rows_per_level for band in bands], np.int64),
        basis=np.ascontiguousarray(by_vector).reshape(*by_vector.shape[:3], -1),
        start=start,
        bias=bias,
        scale=scale,
        token_scales=np.stack([band.token_scales for band in bands]),
    )


def _cuts(frequencies_KS: NDArray[np.uint16]) -> NDArray[np.int32]:
    """Where 0 begins, and 1 (16 bits above), of each table that codes nothing else, and of the one for nobody."""
    zero = frequencies_KS.shape[1] // 2
    minus, none = (frequencies_KS[:, zero + value].astype(np.int32) for value in (-1, 0))
    return np.append(minus | minus + none << 16, FREQUENCY_SUM << 16).astype(np.int32)


def encoder_starts(ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """First encoder entries of tables."""
    return ids * np.int32(ENCODER_ENTRIES)


def rotary_tables(profile: Profile, *, first: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines of positions `[first, first + count)`, `[count, rotary / 2]`.

    Angles in float64, results rounded to float32: one table for all backends, made on the CPU, so that they agree.
    """
    frequencies = profile.inv_freq.astype(np.float64)
    return _rotary_tables(frequencies.tobytes(), first, count)


@functools.lru_cache(maxsize=64)
def _rotary_tables(frequencies: bytes, first: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    inv_freq = np.frombuffer(frequencies, np.float64)
    angles = np.arange(first, first + count, dtype=np.float64)[:, None] * inv_freq
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
