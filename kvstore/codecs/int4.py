"""Int4 codec: one scale per 32 values of a head, four bits per value.

Covers: one layer of finite KV to codes of four bits with scales and back.
Does not cover: whole chunks (`kvstore.codecs.scaled`), other widths (`kvstore.codecs.int8`).
Shape letters: as in `kvstore.codecs`; G = T * N * H / W groups of W values each, for K as for V.

A layer's bytes: scales bfloat16 `[2, G]`, then a byte for each value of K (low half) and the same one of V (high half).
Stored bits per value: 4 + 16 / W, which is 4.5 for heads of a multiple of 32.

A code is between -8 and 7, and the value of largest magnitude gets -8, so the scale has the sign that this takes. On KV
of SmolLM2 that has 12 % less error than scales without a sign, and as little as 64 values with a scale and an offset,
which take the same 4.5 bits.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.codecs.layered import Bytes
from kvstore.codecs.raw import CodecDataError
from kvstore.codecs.scaled import ScaledCodec
from kvstore.compiled import compiled

_GROUP_VALUES: Final = 32
_SCALE_BYTES: Final = 2
_MAX_HEAD_DIM: Final = 1 << 20
"""Keeps what metadata claims from a long search for a divisor."""
_LEAST: Final = -8
_MOST: Final = 7


def group_values(head_dim: int) -> int:
    """Values that share a scale: as many as divide a head evenly, 32 at most.

    Example:
        >>> group_values(64), group_values(80), group_values(7)
        (32, 20, 7)
    """
    return next(width for width in range(min(head_dim, _GROUP_VALUES), 0, -1) if head_dim % width == 0)


class Int4Codec(ScaledCodec):
    """Each value within a scale of what it was; the scale is the largest magnitude of its group over 8.

    Example:
        >>> import torch
        >>> from kvstore.interfaces import ChunkMeta
        >>> kv = torch.tensor([1.0, -16.0, 0.4, 9.0, 0.0, 0.0, 0.0, 0.0]).reshape(1, 2, 1, 1, 4)
        >>> meta = ChunkMeta(num_tokens=1, num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32", base_position=0)
        >>> out = bytearray(Int4Codec().encoded_bytes(meta))
        >>> Int4Codec().encode(kv, out=memoryview(out)), Int4Codec().decode(memoryview(out), meta=meta)[0, 0].tolist()
        (8, [[[0.0, -16.0, 0.0, 8.0]]])
    """

    @property
    def name(self) -> str:
        """`int4`."""
        return "int4"

    def _layer_bytes(self, num_values: int, *, head_dim: int) -> int:
        """One byte per value of K, which is shared with V, and the scales of both."""
        if head_dim > _MAX_HEAD_DIM:
            raise CodecDataError(f"heads of {head_dim} values cannot be stored")
        return num_values + 2 * _SCALE_BYTES * (num_values // group_values(head_dim))

    def _quantise_layer(self, values_RH: NDArray[np.float32], *, out: Bytes) -> bool:
        """Write one layer to all of `out`; whether all values are finite."""
        values_2GW = _grouped(values_RH)
        scales_2G, at = np.empty(values_2GW.shape[:2], np.uint16), len(out) - values_RH.size // 2
        is_finite: bool = _quantise(values_2GW, scales_2G, out[at:].reshape(values_2GW.shape[1:]))
        out[:at] = scales_2G.reshape(-1).view(np.uint8)
        return is_finite

    def _restore_layer(self, data: Bytes, *, values_RH: NDArray[np.float32]) -> None:
        """Read one layer."""
        values_2GW, at = _grouped(values_RH), len(data) - values_RH.size // 2
        # Copied: scales need not be aligned in the payload.
        scales_2G = np.frombuffer(data[:at].tobytes(), dtype=np.uint16).reshape(values_2GW.shape[:2])
        _restore(scales_2G, data[at:].reshape(values_2GW.shape[1:]), values_2GW)


def _grouped(values_RH: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same values, by what shares a scale."""
    return values_RH.reshape(2, -1, group_values(values_RH.shape[1]))


@compiled("boolean(float32[:, :, ::1], uint16[:, ::1], uint8[:, ::1])")
def _quantise(values: NDArray[np.float32], scales: NDArray[np.uint16], codes: Bytes) -> bool:
    """Whether all values are finite. Codes of K go to the low halves, which clears the high ones; then those of V."""
    width = values.shape[2]
    for kv in range(2):
        for group in range(values.shape[1]):
            row = values[kv, group]
            most, least = row[0], row[0]
            largest = np.uint32(0)
            bits = row.view(np.uint32)
            for column in range(width):
                largest = max(largest, bits[column] & np.uint32(0x7FFFFFFF))
                most, least = max(most, row[column]), min(least, row[column])
            if largest >= np.uint32(0x7F800000):
                return False
            extreme = least if -least >= most else most
            # Cut off, not rounded: no decoded value is larger than the largest of its group.
            exact = np.float32(extreme * np.float32(1.0 / _LEAST)).view(np.uint32)
            scales[kv, group] = np.uint16(exact >> np.uint32(16))
            scale = np.uint32(exact & np.uint32(0xFFFF0000)).view(np.float32)
            factor = np.float32(1.0) / scale if abs(scale) > np.float32(1.2e-38) else np.float32(0.0)
            for column in range(width):
                code = np.int32(np.rint(min(max(row[column] * factor, np.float32(_LEAST)), np.float32(_MOST))))
                nibble = np.uint8(code & 15)
                if kv == 0:
                    codes[group, column] = nibble
                else:
                    codes[group, column] |= nibble << np.uint8(4)
    return True


@compiled("void(Array(uint16, 2, 'C', readonly=True), Array(uint8, 2, 'C', readonly=True), float32[:, :, ::1])")
def _restore(scales: NDArray[np.uint16], codes: Bytes, values: NDArray[np.float32]) -> None:
    for group in range(codes.shape[0]):
        k_scale = np.uint32(np.uint32(scales[0, group]) << np.uint32(16)).view(np.float32)
        v_scale = np.uint32(np.uint32(scales[1, group]) << np.uint32(16)).view(np.float32)
        for column in range(codes.shape[1]):
            pair = np.int32(codes[group, column])
            # The half's top bit is its sign.
            values[0, group, column] = np.float32(((pair & 15) ^ 8) - 8) * k_scale
            values[1, group, column] = np.float32(((pair >> 4) ^ 8) - 8) * v_scale
