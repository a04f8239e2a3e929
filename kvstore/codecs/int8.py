"""Int8 codec: one scale per token and head, eight bits per value.

Covers: one layer of finite KV to small integers with scales and back.
Does not cover: whole chunks (`kvstore.codecs.scaled`), other widths (`kvstore.codecs.int4`).
Shape letters: as in `kvstore.codecs`; R = 2 * T * N rows of H values.

A layer's bytes: scales float32 `[R]`, codes int8 `[R, H]`, K before V. Stored bits per value: 8 + 32 / H, which is 8.5
for heads of 64.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.codecs.layered import Bytes
from kvstore.codecs.scaled import ScaledCodec
from kvstore.compiled import compiled

_SCALE_BYTES: Final = 4
_MOST: Final = 127


class Int8Codec(ScaledCodec):
    """Each value within half a scale of what it was; the scale is the row's largest magnitude over 127.

    Example:
        >>> import torch
        >>> from kvstore.interfaces import ChunkMeta
        >>> kv = torch.tensor([1.0, -254.0, 0.4, 127.0, 0.0, 0.0, 0.0, 0.0]).reshape(1, 2, 1, 1, 4)
        >>> meta = ChunkMeta(num_tokens=1, num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32", base_position=0)
        >>> out = bytearray(Int8Codec().encoded_bytes(meta))
        >>> Int8Codec().encode(kv, out=memoryview(out)), Int8Codec().decode(memoryview(out), meta=meta)[0, 0].tolist()
        (16, [[[0.0, -254.0, 0.0, 128.0]]])
    """

    @property
    def name(self) -> str:
        """`int8`."""
        return "int8"

    def _layer_bytes(self, num_values: int, *, head_dim: int) -> int:
        """A byte for each value, and the scales."""
        return 2 * (num_values // head_dim) * (_SCALE_BYTES + head_dim)

    def _quantise_layer(self, values_RH: NDArray[np.float32], *, out: Bytes) -> bool:
        """Write one layer to all of `out`; whether all values are finite."""
        scales_R, at = np.empty(len(values_RH), np.float32), _SCALE_BYTES * len(values_RH)
        is_finite: bool = _quantise(values_RH, scales_R, out[at:].view(np.int8).reshape(values_RH.shape))
        out[:at] = scales_R.view(np.uint8)
        return is_finite

    def _restore_layer(self, data: Bytes, *, values_RH: NDArray[np.float32]) -> None:
        """Read one layer."""
        at = _SCALE_BYTES * len(values_RH)
        # Copied: scales need not be aligned in the payload.
        scales_R = np.frombuffer(data[:at].tobytes(), dtype=np.float32)
        _restore(scales_R, data[at:].view(np.int8).reshape(values_RH.shape), values_RH)


@compiled("boolean(float32[:, ::1], float32[::1], int8[:, ::1])")
def _quantise(values: NDArray[np.float32], scales: NDArray[np.float32], codes: NDArray[np.int8]) -> bool:
    """Whether all values are finite."""
    num_rows, width = values.shape
    one_over_most = np.float32(1.0 / _MOST)
    for row in range(num_rows):
        largest = np.uint32(0)
        # Magnitudes order like their bits, NaNs behind infinities: a maximum of integers becomes vector code.
        bits = values[row].view(np.uint32)
        for column in range(width):
            largest = max(largest, bits[column] & np.uint32(0x7FFFFFFF))
        if largest >= np.uint32(0x7F800000):
            return False
        scale = np.uint32(largest).view(np.float32) * one_over_most
        scales[row] = scale
        factor = np.float32(1.0) / scale if scale > np.float32(1.2e-38) else np.float32(0.0)
        for column in range(width):
            code = np.rint(values[row, column] * factor)
            codes[row, column] = np.int8(min(max(code, np.float32(-_MOST)), np.float32(_MOST)))
    return True


@compiled("void(Array(float32, 1, 'C', readonly=True), Array(int8, 2, 'C', readonly=True), float32[:, ::1])")
def _restore(scales: NDArray[np.float32], codes: NDArray[np.int8], values: NDArray[np.float32]) -> None:
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            values[row, column] = np.float32(codes[row, column]) * scales[row]
