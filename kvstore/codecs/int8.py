"""Int8 codec: one scale per token and head, eight bits per value.

Covers: finite KV to small integers with scales and back.
Does not cover: other widths (`kvstore.codecs.int4`), anything about the model: there is nothing to calibrate.
Shape letters: as in `kvstore.codecs`; R = 2 * T * N rows of H values.

A layer's bytes: scales float32 `[R]`, codes int8 `[R, H]`, K before V. Stored bits per value: 8 + 32 / H, which is 8.5
for heads of 64. There is no header: metadata says all.
"""

import math
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.codecs.layered import Bytes, check_kv, check_layers, check_meta, float_rows, writable_bytes
from kvstore.codecs.raw import CodecDataError, unexported_bytes
from kvstore.compiled import compiled
from kvstore.interfaces import ChunkMeta

_SCALE_BYTES: Final = 4
_MOST: Final = 127


class Int8Codec:
    """Each value within half a scale of what it was; the scale is the row's largest magnitude over 127.

    Example:
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

    def encoded_bytes(self, meta: ChunkMeta) -> int:
        """Exactly what `encode` writes."""
        check_meta(meta)
        return math.prod(meta.shape[:-1]) * (_SCALE_BYTES + meta.head_dim)

    def encode(self, kv_L2TNH: torch.Tensor, *, out: memoryview, meta: ChunkMeta | None = None) -> int:
        """Write the chunk to the start of `out`.

        Raises:
            CodecDataError: Also for a NaN or an infinity: it has no place between -127 and 127.
        """
        check_kv(kv_L2TNH)
        num_rows, head_dim = kv_L2TNH[0].numel() // kv_L2TNH.shape[-1], kv_L2TNH.shape[-1]
        layer_bytes = num_rows * (_SCALE_BYTES + head_dim)
        target = writable_bytes(out, len(kv_L2TNH) * layer_bytes)
        scales_R = np.empty(num_rows, dtype=np.float32)
        for layer, kv_2TNH in enumerate(kv_L2TNH):
            part = target[layer * layer_bytes : (layer + 1) * layer_bytes]
            codes_RH = part[_SCALE_BYTES * num_rows :].view(np.int8).reshape(num_rows, head_dim)
            if not _quantise(float_rows(kv_2TNH), scales_R, codes_RH):
                raise CodecDataError(f"KV of layer {layer} holds a NaN or an infinity")
            part[: _SCALE_BYTES * num_rows] = scales_R.view(np.uint8)
        return len(target)

    def decode(self, payload: memoryview, *, meta: ChunkMeta) -> torch.Tensor:
        """The chunk's KV."""
        self._check(payload, meta)
        out = torch.empty(meta.shape, dtype=check_meta(meta))
        self.decode_layers(payload, meta=meta, layers=range(meta.num_layers), out=out)
        return out

    def decode_layers(self, payload: memoryview, *, meta: ChunkMeta, layers: range, out: torch.Tensor) -> None:
        """Some layers' KV into `out` `[layer, 2, T, N, H]`; the others are not looked at."""
        self._check(payload, meta)
        check_layers(layers, meta, out)
        data = unexported_bytes(payload)
        layer_bytes = len(payload) // meta.num_layers
        values_RH = np.empty((math.prod(meta.shape[1:-1]), meta.head_dim), dtype=np.float32)
        for index, layer in enumerate(layers):
            _decode_layer(data[layer * layer_bytes : (layer + 1) * layer_bytes], values_RH)
            out[index] = torch.from_numpy(values_RH).view(out[index].shape)

    def _check(self, payload: memoryview, meta: ChunkMeta) -> None:
        expected_bytes = self.encoded_bytes(meta)
        if len(payload) != expected_bytes:
            raise CodecDataError(f"payload has {len(payload)} bytes, its KV needs {expected_bytes}")


def _decode_layer(data: Bytes, values_RH: NDArray[np.float32]) -> None:
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
