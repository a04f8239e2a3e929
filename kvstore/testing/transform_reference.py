"""The `transform` codec's decoder in plain Python and numpy, from the description and not from the loops. Slow.

Covers: decoding a whole payload; mending the checksums of a damaged one, so that damage reaches the decoder.
Does not cover: other positions, encoding, errors.
"""

import struct

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from kvstore.codecs.profile import Band, Profile
from kvstore.codecs.rans import FIRST_STATE, coder_tables, decode_step
from kvstore.codecs.raw import DTYPES
from kvstore.interfaces import ChunkMeta

_FIXED_BYTES = 32
_LANES = 16


class PayloadParts:
    """A payload cut into its parts, by its own header only."""

    def __init__(self, payload: bytes) -> None:
        self.num_levels = payload[6]
        self.groups, self.num_exact, self.num_tokens, self.num_layers, exact_bytes = struct.unpack_from(
            "<HHIII", payload, 8
        )
        count = self.num_levels * self.num_layers * 2 * self.groups
        at = _FIXED_BYTES + 8 * count + 8
        self.exact: bytes = payload[at : at + exact_bytes]
        at += exact_bytes
        self.sections = list[bytes]()
        self.starts: list[int] = []
        for index in range(count):
            (length,) = struct.unpack_from("<I", payload, _FIXED_BYTES + 8 * index)
            self.sections.append(payload[at : at + length])
            self.starts.append(at)
            at += length

    def section(self, level: int, layer: int, kv: int, group: int) -> bytes:
        """One section."""
        index: int = ((level * self.num_layers + layer) * 2 + kv) * self.groups + group
        return self.sections[index]


def mend(payload: bytearray, *, sections: bool = True) -> None:
    """Make all checksums of a damaged payload right again; its lengths are believed."""
    parts = PayloadParts(bytes(payload))
    table_stop = _FIXED_BYTES + 8 * len(parts.sections)
    if sections:
        for index, section in enumerate(parts.sections):
            struct.pack_into("<I", payload, _FIXED_BYTES + 8 * index + 4, _low(section))
        struct.pack_into("<I", payload, table_stop, _low(parts.exact))
    struct.pack_into("<I", payload, table_stop + 4, _low(bytes(payload[: table_stop + 4])))


def _low(data: bytes) -> int:
    return int(xxhash.xxh3_64_intdigest(data)) & 0xFFFFFFFF


def decode_reference(payload: bytes, *, meta: ChunkMeta, profile: Profile, num_levels: int) -> torch.Tensor:
    """KV `[L, 2, T, N, H]` of a payload's first levels."""
    parts = PayloadParts(payload)
    tokens, exact = meta.num_tokens - parts.num_exact, parts.num_exact
    kv = np.zeros((meta.num_layers, 2, tokens, profile.groups, profile.num_channels), np.float32)
    for layer in range(meta.num_layers):
        for index in range(2):
            for group in range(profile.groups):
                sections = [parts.section(level, layer, index, group) for level in range(num_levels)]
                band = profile.bands[layer][index][group]
                if tokens:
                    kv[layer, index, :, group] = _band(sections, band, profile, tokens)
    kv = kv.reshape(meta.num_layers, 2, tokens, meta.num_kv_heads, meta.head_dim)
    kv[:, 0] = _rotated(kv[:, 0], profile, first=meta.base_position + exact)
    decoded = torch.empty(meta.shape, dtype=DTYPES[meta.dtype])
    decoded[:, :, exact:] = torch.from_numpy(kv).to(decoded.dtype)
    if exact:
        stored = torch.frombuffer(bytearray(parts.exact), dtype=decoded.dtype)
        decoded[:, :, :exact] = stored.view(meta.num_layers, 2, exact, meta.num_kv_heads, meta.head_dim)
    return decoded


class _Lanes:
    """16 states that share a stream of words."""

    def __init__(self, data: bytes, profile: Profile) -> None:
        self.states = list(struct.unpack_from("<16I", data))
        self.words = [word for (word,) in struct.iter_unpack("<H", data[4 * _LANES :])]
        self.lut = coder_tables(profile.frequencies_KS).lut_KF

    def step(self, tables: list[int | None]) -> list[int]:
        """One value of every lane; 0 without a table."""
        values = [0] * _LANES
        for lane, table in enumerate(tables):
            if table is not None:
                values[lane], self.states[lane] = decode_step(self.states[lane], self.lut[table], self.words)
        return values

    def end(self) -> None:
        """Everything was read."""
        assert not self.words
        assert self.states == [FIRST_STATE] * _LANES


def _band(sections: list[bytes], band: Band, profile: Profile, tokens: int) -> NDArray[np.float32]:
    rows = band.basis_RC.shape[0]
    values_TR = np.zeros((tokens, rows), np.int64)
    classes = np.zeros(tokens, np.int64)
    for level, section in enumerate(sections):
        at, escapes = 0, 0
        if level == 0:
            (escapes,) = struct.unpack_from("<I", section)
            at = 4 + 6 * escapes
        lanes = _Lanes(section[at:], profile)
        if level == 0 and band.class_table is not None:
            for first in range(0, tokens, _LANES):
                step = lanes.step([band.class_table] * _LANES)
                classes[first : first + _LANES] = step[: tokens - first]
        _read_level(lanes, level, band, values_TR)
        lanes.end()
        for escape in range(escapes):
            index, value = struct.unpack_from("<Ih", section, 4 + 6 * escape)
            values_TR[index % tokens, index // tokens] = value
    midpoints_TR = 2 * values_TR + np.sign(values_TR)
    sums_TC = (midpoints_TR @ band.basis_RC.astype(np.int64)).astype(np.float32)
    missing = np.float32(2 ** (profile.num_levels - len(sections)))
    factor_TC = band.scale_C * (missing * band.token_scales[classes])[:, None]
    decoded_TC: NDArray[np.float32] = sums_TC * factor_TC + band.bias_C
    return decoded_TC


def _read_level(lanes: _Lanes, level: int, band: Band, values_TR: NDArray[np.int64]) -> None:
    live = band.rows_per_level[level]
    for first in range(0, live, _LANES):
        rows = range(first, min(first + _LANES, live))
        before = np.zeros(_LANES, np.int64)
        for values_R in values_TR:
            known = values_R[first : first + len(rows)] if level else before[: len(rows)]
            contexts = [min(abs(int(value)), 2) for value in known]
            tables: list[int | None] = [None] * _LANES
            for lane, row in enumerate(rows):
                tables[lane] = int(band.table_ids_VRX[level, row, contexts[lane]])
            symbols = lanes.step(tables)[: len(rows)]
            before[: len(rows)] = symbols
            if level:
                signs = np.where(known < 0, -1, 1)
                symbols = list(np.where(known == 0, symbols, signs * (2 * np.abs(known) + symbols)))
            values_R[first : first + len(rows)] = symbols


def _rotated(k_LTNH: NDArray[np.float32], profile: Profile, *, first: int) -> NDArray[np.float32]:
    half = len(profile.inv_freq)
    angles = np.arange(first, first + k_LTNH.shape[1], dtype=np.float64)[:, None] * profile.inv_freq.astype(np.float64)
    cosine, sine = (table(angles).astype(np.float32)[:, None, :] for table in (np.cos, np.sin))
    pairs = (slice(half), slice(half, 2 * half)) if profile.is_neox else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    one, other = k_LTNH[..., pairs[0]].copy(), k_LTNH[..., pairs[1]].copy()
    rotated = k_LTNH.copy()
    rotated[..., pairs[0]] = one * cosine - other * sine
    rotated[..., pairs[1]] = other * cosine + one * sine
    return rotated
