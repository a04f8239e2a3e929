"""Payloads that are made layer by layer: what such codecs share.

Covers: checks of KV and metadata, the table that says where each layer lies, the bound on what few bytes may claim.
Does not cover: the bytes of a layer (the codecs).
Shape letters: as in `kvstore.codecs`.

A layered payload: version u16, zero u16, length of the preamble u32, the end of every layer u64 (from the end of the
preamble on), the preamble, the layers. All numbers are little-endian.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.codecs.raw import DTYPES, CodecDataError, unexported_bytes
from kvstore.interfaces import ChunkMeta

MAX_EXPANSION: Final = 256
"""Decoded bytes per payload byte, at most: nobody makes a reader reserve memory by a short payload."""
_START: Final = struct.Struct("<HHI")
_END_BYTES: Final = 8

Bytes = NDArray[np.uint8]


def check_meta(meta: ChunkMeta) -> torch.dtype:
    """The KV's dtype.

    Raises:
        CodecDataError: `meta` describes no KV.
    """
    dtype = DTYPES.get(meta.dtype)
    if dtype is None:
        raise CodecDataError(f"KV dtype {meta.dtype!r} cannot be stored, only {', '.join(DTYPES)}")
    if min(meta.shape) < 1:
        raise CodecDataError(f"KV shape {meta.shape} has an empty dimension")
    return dtype


def check_kv(kv_L2TNH: torch.Tensor) -> None:
    """Refuse what is no KV.

    Raises:
        CodecDataError: Wrong rank or dtype, or an empty dimension.
    """
    shape = tuple(kv_L2TNH.shape)
    if kv_L2TNH.ndim != 5 or shape[1] != 2 or kv_L2TNH.dtype not in DTYPES.values() or min(shape) < 1:
        raise CodecDataError(f"not KV [L, 2, T, N, H]: shape {shape}, dtype {kv_L2TNH.dtype}")


def check_layers(layers: range, meta: ChunkMeta, out: torch.Tensor) -> None:
    """Refuse layers that the chunk does not have, and room that does not fit them.

    Raises:
        CodecDataError: Not a part of the chunk's layers, in order; `out` has another shape, dtype or strides.
    """
    dtype, shape = check_meta(meta), (len(layers), *meta.shape[1:])
    if tuple(out.shape) != shape or out.dtype != dtype or not out.is_contiguous():
        raise CodecDataError(f"room for {tuple(out.shape)} of {out.dtype}, contiguous {shape} of {dtype} is needed")
    if layers.step != 1 or not 0 <= layers.start < layers.stop <= meta.num_layers:
        raise CodecDataError(f"layers {layers} of a chunk with {meta.num_layers} layers")


def writable_bytes(out: memoryview, num_bytes: int) -> Bytes:
    """The first bytes of a buffer that was reserved for a payload; its owner can release it at any time.

    Raises:
        CodecDataError: It is shorter, or cannot be written to.
    """
    if out.readonly:
        raise CodecDataError("the room for a payload is read-only")
    if len(out) < num_bytes:
        raise CodecDataError(f"payload needs {num_bytes} bytes, {len(out)} were reserved")
    return unexported_bytes(out)[:num_bytes]


def float_rows(kv: torch.Tensor) -> NDArray[np.float32]:
    """Values as float32, one row per head and token."""
    return kv.reshape(-1, kv.shape[-1]).float().contiguous().numpy()


def unsigned(kv: torch.Tensor) -> NDArray[Any]:
    """Values' bits as unsigned integers, flat; a view where the tensor is contiguous."""
    flat = kv.reshape(-1)
    if flat.element_size() == 4:
        return flat.view(torch.int32).numpy().view(np.uint32)
    return flat.view(torch.int16).numpy().view(np.uint16)


def head_bytes(num_layers: int) -> int:
    """Bytes before the preamble."""
    return _START.size + _END_BYTES * num_layers


@dataclass(frozen=True, slots=True)
class LayeredPayload:
    """A payload whose parts lie where they can lie."""

    preamble: Bytes
    layers: Sequence[Bytes]


def write_layered(
    layers: Sequence[Bytes], *, version: int, preamble: bytes, decoded_bytes: int, out: memoryview
) -> int:
    """Put a payload together; bytes written.

    A payload that is very short for what it decodes to gets zeros behind its preamble, up to `MAX_EXPANSION`.

    Raises:
        CodecDataError: `out` is too short.
    """
    ends = np.cumsum([len(layer) for layer in layers], dtype="<u8")
    num_bytes = head_bytes(len(layers)) + len(preamble) + int(ends[-1])
    padding = max(0, -(-decoded_bytes // MAX_EXPANSION) - num_bytes)
    target = writable_bytes(out, num_bytes + padding)
    start = _START.pack(version, 0, len(preamble) + padding) + ends.tobytes() + preamble + bytes(padding)
    target[: len(start)] = np.frombuffer(start, dtype=np.uint8)
    np.concatenate(layers, out=target[len(start) :])
    return len(target)


def read_layered(payload: memoryview, *, version: int, meta: ChunkMeta) -> LayeredPayload:
    """Take a payload apart.

    Raises:
        CodecDataError: It is not of this version, its parts do not fill it, or it is too short for `meta`.
    """
    decoded_bytes = math.prod(meta.shape) * check_meta(meta).itemsize
    if decoded_bytes > len(payload) * MAX_EXPANSION or head_bytes(meta.num_layers) > len(payload):
        raise CodecDataError(f"payload of {len(payload)} bytes cannot hold KV {meta.shape}")
    found, zero, preamble_bytes = _START.unpack_from(payload)
    if found != version or zero:
        raise CodecDataError(f"{meta.codec} payload of version {found}, this version reads {version}")
    data = unexported_bytes(payload)
    ends = np.frombuffer(data[_START.size : head_bytes(meta.num_layers)].tobytes(), dtype="<u8").tolist()
    body = head_bytes(meta.num_layers) + preamble_bytes
    if ends != sorted(ends) or body + ends[-1] != len(payload):
        raise CodecDataError(f"layers do not fill the payload of {len(payload)} bytes")
    begins = [0, *ends[:-1]]
    return LayeredPayload(
        preamble=data[head_bytes(meta.num_layers) : body],
        layers=[data[body + begin : body + end] for begin, end in zip(begins, ends, strict=True)],
    )


class Reader:
    """Takes typed pieces from bytes, from the start on.

    Raises:
        CodecDataError: A piece does not lie within the bytes.
    """

    def __init__(self, data: Bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left_bytes(self) -> int:
        """Bytes not taken yet."""
        return len(self._data) - self._at

    def take(self, num_bytes: int) -> Bytes:
        """The next bytes, without a copy."""
        if not 0 <= num_bytes <= self.left_bytes:
            raise CodecDataError(f"{num_bytes} bytes expected, {self.left_bytes} left")
        self._at += num_bytes
        return self._data[self._at - num_bytes : self._at]

    def array(self, dtype: str, count: int) -> NDArray[Any]:
        """The next numbers, copied: the bytes need not be aligned."""
        return np.frombuffer(self.take(np.dtype(dtype).itemsize * count).tobytes(), dtype=dtype)

    def number(self, dtype: str) -> int:
        """The next whole number."""
        return int(self.array(dtype, 1)[0])

    def end(self) -> None:
        """Refuse bytes that nobody asked for."""
        if self.left_bytes:
            raise CodecDataError(f"{self.left_bytes} bytes too many")
