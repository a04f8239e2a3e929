"""Lossless codec: the KV's own bytes, layer-major, little-endian.

Covers: bfloat16, float16 and float32 KV to bytes and back, without a copy on the way back.
Does not cover: compression.
Shape letters: as in `kvstore.codecs`.
"""

import math
import sys
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.errors import DataError
from kvstore.interfaces import ChunkMeta

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("stored KV is little-endian; this machine is not")

DTYPES: Final[dict[str, torch.dtype]] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""Dtypes of KV that can be stored, by the name in `ChunkMeta.dtype`."""


class CodecDataError(DataError):
    """KV or bytes that a codec cannot take; the chunk is dropped and computed again."""


class RawCodec:
    """KV as it is.

    Cost:
        Encoding is one copy. Decoding copies nothing: the tensor is a view of the payload.

    Example:
        >>> kv = torch.arange(8.0).reshape(2, 2, 1, 1, 2)
        >>> meta = ChunkMeta(num_tokens=1, num_layers=2, num_kv_heads=1, head_dim=2, dtype="float32", base_position=0)
        >>> out = bytearray(RawCodec().encoded_bytes(meta))
        >>> RawCodec().encode(kv, out=memoryview(out)), RawCodec().decode(memoryview(out), meta=meta).equal(kv)
        (32, True)
    """

    @property
    def name(self) -> str:
        """`raw`."""
        return "raw"

    def encoded_bytes(self, meta: ChunkMeta) -> int:
        """Exactly the bytes of the KV."""
        dtype = DTYPES.get(meta.dtype)
        if dtype is None:
            raise CodecDataError(f"KV dtype {meta.dtype!r} cannot be stored, only {', '.join(DTYPES)}")
        if min(meta.shape) < 1:
            raise CodecDataError(f"KV shape {meta.shape} has an empty dimension")
        return math.prod(meta.shape) * dtype.itemsize

    def encode(self, kv_L2TNH: torch.Tensor, *, out: memoryview, meta: ChunkMeta | None = None) -> int:
        """Copy the KV to the start of `out`."""
        if kv_L2TNH.ndim != 5 or kv_L2TNH.shape[1] != 2 or kv_L2TNH.dtype not in DTYPES.values():
            raise CodecDataError(f"not KV [L, 2, T, N, H]: shape {tuple(kv_L2TNH.shape)}, dtype {kv_L2TNH.dtype}")
        num_bytes = kv_L2TNH.numel() * kv_L2TNH.element_size()
        if len(out) < num_bytes:
            raise CodecDataError(f"KV needs {num_bytes} bytes, {len(out)} were reserved")
        if num_bytes:
            target = torch.frombuffer(out, dtype=kv_L2TNH.dtype, count=kv_L2TNH.numel())
            target.view(kv_L2TNH.shape).copy_(kv_L2TNH)
        return num_bytes

    def decode(self, payload: memoryview, *, meta: ChunkMeta) -> torch.Tensor:
        """A view of the payload."""
        expected_bytes = self.encoded_bytes(meta)
        if len(payload) != expected_bytes:
            raise CodecDataError(f"payload has {len(payload)} bytes, its KV needs {expected_bytes}")
        return _tensor_over(payload, DTYPES[meta.dtype]).view(meta.shape)

    def decode_layers(self, payload: memoryview, *, meta: ChunkMeta, layers: range, out: torch.Tensor) -> None:
        """Copy some layers."""
        kv_L2TNH = self.decode(payload, meta=meta)
        if layers.step != 1 or not 0 <= layers.start <= layers.stop <= meta.num_layers:
            raise CodecDataError(f"layers {layers} of a chunk with {meta.num_layers}")
        part = kv_L2TNH[layers.start : layers.stop]
        if out.shape != part.shape or out.dtype != part.dtype:
            raise CodecDataError(
                f"room for {tuple(out.shape)} of {out.dtype}, {tuple(part.shape)} of {part.dtype} needed"
            )
        out.copy_(part)


class _ReadOnlyBytes:
    """Lets torch see read-only memory without exporting the buffer.

    `torch.frombuffer` warns about read-only memory, and an exported memoryview cannot be released by its owner.
    """

    def __init__(self, payload: memoryview) -> None:
        self._payload = payload
        address = np.frombuffer(payload, dtype=np.uint8).ctypes.data
        # Declared writable because torch knows no other memory; `Codec.decode` forbids writing.
        self.__array_interface__: dict[str, Any] = {
            "shape": (len(payload),),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def unexported_bytes(payload: memoryview) -> NDArray[np.uint8]:
    """A payload's bytes as an array that does not keep its owner from releasing it; valid while the payload is."""
    flat = payload.cast("B") if payload.format != "B" or payload.ndim != 1 else payload
    return np.asarray(_ReadOnlyBytes(flat))


def _tensor_over(payload: memoryview, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(unexported_bytes(payload)).view(dtype)
