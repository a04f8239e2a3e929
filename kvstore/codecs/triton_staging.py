"""Payloads on their way to a GPU: checked, found, and described for the kernels.

Covers: what a payload holds, every checksum of what is used, the numbers that tell kernels where to read.
Does not cover: launches (`kvstore.codecs.triton_decode`). Everything here happens on the CPU.

Kernels trust these numbers, so nothing that a payload says goes into them unchecked.
Shape letters: V levels, L layers, 2 for K and V, G head groups, B bands (layer, K or V, group), T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.codecs.profile import Profile
from kvstore.codecs.rans_vectors import LANES
from kvstore.codecs.raw import DTYPES, CodecDataError
from kvstore.codecs.stream import Layout, checksum, read_header
from kvstore.codecs.transform_decode import COUNT_BYTES, ESCAPE_BYTES, escapes_in_order
from kvstore.codecs.transform_plan import MAX_VALUE, flat_bands, padded, rotary_tables
from kvstore.codecs.triton_tables import pair_columns
from kvstore.interfaces import ChunkMeta

SECTION_FIELDS: Final = 13
_STATE_WORDS: Final = 2 * LANES
_COUNT_WORDS: Final = COUNT_BYTES // 2
_ESCAPE_WORDS: Final = ESCAPE_BYTES // 2


@dataclass(frozen=True, eq=False, kw_only=True)
class EncodedChunk:
    """One chunk as it was stored, or a prefix of it that holds some levels."""

    payload: memoryview
    meta: ChunkMeta
    position: int | None = None
    """Where the chunk's first token is to be; None: where it was."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Found:
    """What of one chunk is used."""

    meta: ChunkMeta
    layout: Layout
    payload: NDArray[np.uint8]
    levels_L: NDArray[np.int64]
    """Levels of each layer that is used, at least 1."""
    position: int
    """Where its first token is to be."""

    @property
    def num_coded(self) -> int:
        """Tokens that are not stored exactly."""
        return self.meta.num_tokens - self.layout.num_exact


def find(chunk: EncodedChunk, *, profile: Profile, layers: range, max_levels: int) -> Found:
    """Find and check a chunk's parts.

    Raises:
        CodecDataError: The payload is damaged, of another profile or chunk, or holds no level of one of the layers.
    """
    layout = read_header(chunk.payload, meta=chunk.meta, profile=profile)
    payload = np.frombuffer(chunk.payload, np.uint8)
    levels_L = np.minimum(layout.levels_within(len(payload))[layers.start : layers.stop], max_levels)
    if (levels_L < 1).any():
        raise CodecDataError(f"payload of {len(payload)} bytes holds nothing of layer {layers[int(levels_L.argmin())]}")
    if (
        layout.num_exact
        and checksum(memoryview(chunk.payload)[layout.exact_start : layout.exact_stop]) != layout.exact_checksum
    ):
        raise CodecDataError("exact tokens do not match their checksum")
    for level in range(int(levels_L.max())):
        used = np.arange(layers.start, layers.stop)[levels_L > level]
        starts, stops = layout.start_VL2G[level, used].ravel(), layout.stop_VL2G[level, used].ravel()
        for start, stop, expected in zip(starts, stops, layout.checksum_VL2G[level, used].ravel(), strict=True):
            if checksum(memoryview(chunk.payload)[start:stop]) != expected:
                raise CodecDataError(f"a section of level {level} does not match its checksum")
    position = chunk.meta.base_position if chunk.position is None else chunk.position
    return Found(meta=chunk.meta, layout=layout, payload=payload, levels_L=levels_L, position=position)


class Room:
    """Offsets into one array that many things share."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each of some things starts."""
        ends = self.size + np.cumsum(sizes)
        self.size = int(ends[-1]) if len(ends) else self.size
        return ends - sizes


@dataclass(frozen=True, eq=False, kw_only=True)
class Staged:
    """Numbers for the kernels, about some chunks and layers of one profile."""

    words: NDArray[np.uint16]
    """Sections of all levels."""
    sections: tuple[NDArray[np.int64], ...]
    """By level `[sections, 13]`: first word of the states, words behind them, tokens, rows, rows of the level before
    (both to the next multiple of 16), table ids, symbols, unit, table of classes or -1, classes, escapes, the largest
    magnitude that an escape may have, and rows."""
    units: NDArray[np.int64]
    """`[chunks * bands, 4]`: symbols, rows, ratio of the missing levels, classes or -1."""
    num_symbols: int
    num_classes: int


def stage(found: Sequence[Found], *, profile: Profile, layers: range, row_pitch: int) -> Staged:
    """Lay chunks out for the kernels.

    Raises:
        CodecDataError: A section is too short for what it says it holds, or of odd length.
    """
    bands = flat_bands(profile)[layers.start * 2 * profile.groups : layers.stop * 2 * profile.groups]
    live_BV = np.array([band.rows_per_level for band in bands], np.int64)
    rows_BV = -(-live_BV // LANES) * LANES
    tables_B = np.array([-1 if band.class_table is None else band.class_table for band in bands], np.int64)
    symbols, classes, words_room = Room(), Room(), Room()
    pieces: list[NDArray[np.uint16]] = []
    sections: list[list[NDArray[np.int64]]] = [[] for _ in range(profile.num_levels)]
    units = []
    for index, chunk in enumerate(found):
        tokens = chunk.num_coded
        levels_B = np.repeat(chunk.levels_L, 2 * profile.groups)
        symbols_B = symbols.take(np.full(len(bands), tokens * row_pitch))
        classes_B = np.where(tables_B >= 0, classes.take(np.where(tables_B >= 0, padded(tokens), 0)), -1)
        missing_B = 1 << (profile.num_levels - levels_B)
        units.append(np.stack([symbols_B, rows_BV[np.arange(len(bands)), levels_B - 1], missing_B, classes_B], axis=1))
        for level in range(int(levels_B.max()) if tokens else 0):
            used = np.flatnonzero(levels_B > level)
            piece, fields = _sections(chunk, level=level, layers=layers, num_used=len(used))
            fields[:, 0] += words_room.take(np.array([len(piece)]))[0]
            pieces.append(piece)
            fields[:, 2], fields[:, 3] = tokens, rows_BV[used, level]
            fields[:, 4] = rows_BV[used, level - 1] if level else 0
            fields[:, 5] = ((layers.start * 2 * profile.groups + used) * profile.num_levels + level) * row_pitch
            fields[:, 6], fields[:, 7] = symbols_B[used], index * len(bands) + used
            fields[:, 8], fields[:, 9] = tables_B[used], classes_B[used]
            fields[:, 11] = ((MAX_VALUE + 1) >> (profile.num_levels - 1)) - 1
            fields[:, 12] = live_BV[used, level]
            sections[level].append(fields)
    return Staged(
        words=np.concatenate([*pieces, np.zeros(0, np.uint16)]),
        sections=tuple(_longest_first(np.concatenate(level)) for level in sections if level),
        units=np.concatenate(units),
        num_symbols=symbols.size,
        num_classes=classes.size,
    )


def _sections(
    chunk: Found, *, level: int, layers: range, num_used: int
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """One chunk's sections of one level: their words, and the fields that only they know."""
    layout = chunk.layout
    starts = layout.start_VL2G[level, layers.start : layers.stop].ravel()[:num_used]
    stops = layout.stop_VL2G[level, layers.start : layers.stop].ravel()[:num_used]
    lengths = stops - starts
    if (lengths % 2).any():
        raise CodecDataError(f"a section of level {level} has an odd number of bytes")
    # The header may leave the sections at an odd address: a copy is aligned.
    words = chunk.payload[starts[0] : stops[-1]].copy().view("<u2")
    at, length = (starts - starts[0]) // 2, lengths // 2
    fields = np.zeros((num_used, SECTION_FIELDS), np.int64)
    before = np.zeros(num_used, np.int64)
    if level == 0:
        if (length < _COUNT_WORDS + _STATE_WORDS).any():
            raise CodecDataError("a section is too short for its states")
        fields[:, 10] = words[at].astype(np.int64) | words[at + 1].astype(np.int64) << 16
        before = _COUNT_WORDS + _ESCAPE_WORDS * fields[:, 10]
    fields[:, 0] = at + before
    fields[:, 1] = length - before - _STATE_WORDS
    if (fields[:, 1] < 0).any():
        raise CodecDataError(f"a section of level {level} is too short for what it says it holds")
    for section in np.flatnonzero(fields[:, 10]):
        # Two escapes of one place would be written at once.
        if not escapes_in_order(chunk.payload, starts[section] + COUNT_BYTES, fields[section, 10], chunk.num_coded):
            raise CodecDataError("escapes are not in their order")
    return words, fields


def _longest_first(fields: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sections of a program should be alike, and long ones start early."""
    order = np.argsort(-(fields[:, 2] * fields[:, 3]), kind="stable")
    return np.ascontiguousarray(fields[order])


def exact_bytes(chunk: Found, *, profile: Profile, layers: range) -> NDArray[np.uint8]:
    """Bytes of the exact tokens of some layers, `[L, 2, E, N, H]`, K rotated to where they are to be."""
    meta, num_exact = chunk.meta, chunk.layout.num_exact
    layer_bytes = 2 * num_exact * meta.num_kv_heads * meta.head_dim * DTYPES[meta.dtype].itemsize
    start = chunk.layout.exact_start + layers.start * layer_bytes
    stored = chunk.payload[start : start + len(layers) * layer_bytes]
    if not num_exact or not chunk.position:
        return stored
    # They begin at position 0, so this is the whole rotation.
    heads = (len(layers), 2, num_exact, meta.num_kv_heads, meta.head_dim)
    kv = torch.from_numpy(stored.copy()).view(DTYPES[meta.dtype]).view(heads)
    keys = kv[:, 0].float().numpy()
    cosine, sine = (turn[:, None] for turn in rotary_tables(profile, first=chunk.position, count=num_exact))
    left, right = pair_columns(profile)[:, : len(profile.inv_freq)]
    one, other = keys[..., left], keys[..., right]
    keys[..., left], keys[..., right] = one * cosine - other * sine, other * cosine + one * sine
    kv[:, 0] = torch.from_numpy(keys)
    moved: NDArray[np.uint8] = kv.view(-1).view(torch.uint8).numpy()
    return moved
