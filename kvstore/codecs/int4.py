"""Int4 codec: one scale per 32 values of a head, four bits per value.

Covers: finite KV to codes of four bits with scales and back.
Does not cover: other widths (`kvstore.codecs.int8`), anything about the model: there is nothing to calibrate.
Shape letters: as in `kvstore.codecs`; G = T * N * H / W groups of W values each, for K as for V.

A layer's bytes: scales bfloat16 `[2, G]`, then a byte for each value of K (low half) and the same one of V (high half).
Stored bits per value: 4 + 16 / W, which is 4.5 for heads of a multiple of 32. There is no header: metadata says all.

A code is between -8 and 7, and the value of largest magnitude gets -8, so the scale has the sign that this takes. On KV
of SmolLM2 that has 12 % less error than scales without a sign, and as little as 64 values with a scale and an offset,
which take the same 4.5 bits.
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

_GROUP_VALUES: Final = 32
_SCALE_BYTES: Final = 2
_LEAST: Final = -8
_MOST: Final = 7


def group_values(head_dim: int) -> int:
    """Values that share a scale: as many as divide a head evenly, 32 at most.

    Example:
        >>> group_values(64), group_values(80), group_values(7)
        (32, 20, 7)
    """
    return next(width for width in range(min(head_dim, _GROUP_VALUES), 0, -1) if head_dim % width == 0)


class Int4Codec:
    """Each value within a scale of what it was; the scale is the largest magnitude of its group over 8.

    Example:
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

    def encoded_bytes(self, meta: ChunkMeta) -> int:
        """Exactly what `encode` writes."""
        check_meta(meta)
        if meta.head_dim > 1 << 20:
            raise CodecDataError(f"heads of {meta.head_dim} values cannot be stored")
        return meta.num_layers * _layer_bytes(math.prod(meta.shape[2:]), meta.head_dim)

    def encode(self, kv_L2TNH: torch.Tensor, *, out: memoryview, meta: ChunkMeta | None = None) -> int:
        """Write the chunk to the start of `out`.

        Raises:
            CodecDataError: Also for a NaN or an infinity: no code stands for it.
        """
        check_kv(kv_L2TNH)
        head_dim, num_values = kv_L2TNH.shape[-1], kv_L2TNH[0, 0].numel()
        layer_bytes = _layer_bytes(num_values, head_dim)
        target = writable_bytes(out, len(kv_L2TNH) * layer_bytes)
        width = group_values(head_dim)
        scales_2G = np.empty((2, num_values // width), dtype=np.uint16)
        for layer, kv_2TNH in enumerate(kv_L2TNH):
            part = target[layer * layer_bytes : (layer + 1) * layer_bytes]
            values_2GW = float_rows(kv_2TNH).reshape(2, -1, width)
            if not _quantise(values_2GW, scales_2G, part[layer_bytes - num_values :].reshape(-1, width)):
                raise CodecDataError(f"KV of layer {layer} holds a NaN or an infinity")
            part[: layer_bytes - num_values] = scales_2G.reshape(-1).view(np.uint8)
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
        width = group_values(meta.head_dim)
        values_2GW = np.empty((2, math.prod(meta.shape[2:]) // width, width), dtype=np.float32)
        for index, layer in enumerate(layers):
            _decode_layer(data[layer * layer_bytes : (layer + 1) * layer_bytes], values_2GW)
            out[index] = torch.from_numpy(values_2GW).view(out[index].shape)

    def _check(self, payload: memoryview, meta: ChunkMeta) -> None:
        expected_bytes = self.encoded_bytes(meta)
        if len(payload) != expected_bytes:
            raise CodecDataError(f"payload has {len(payload)} bytes, its KV needs {expected_bytes}")


def _layer_bytes(num_values: int, head_dim: int) -> int:
    """One byte per value of K, which is shared with V, and the scales of both."""
    return num_values + 2 * _SCALE_BYTES * (num_values // group_values(head_dim))


def _decode_layer(data: Bytes, values_2GW: NDArray[np.float32]) -> None:
    _, num_groups, width = values_2GW.shape
    at = 2 * _SCALE_BYTES * num_groups
    # Copied: scales need not be aligned in the payload.
    scales_2G = np.frombuffer(data[:at].tobytes(), dtype=np.uint16).reshape(2, num_groups)
    _restore(scales_2G, data[at:].reshape(num_groups, width), values_2GW)


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
