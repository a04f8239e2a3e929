"""Codecs of scales and small codes: what `int8` and `int4` share.

Covers: checks, where each layer lies, layers one after the other. Does not cover: the bytes of a layer (the codecs).
Shape letters: as in `kvstore.codecs`; R = 2 * T * N rows of H values, K before V.

Every layer takes the same bytes, which the shape alone says, so there is no header. There is nothing to calibrate.
"""

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.codecs.layered import Bytes, check_kv, check_layers, check_meta, float_rows, writable_bytes
from kvstore.codecs.raw import CodecDataError, unexported_bytes
from kvstore.interfaces import ChunkMeta


class ScaledCodec(ABC):
    """KV layer by layer, each in a fixed number of bytes."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What chunks call it."""

    @abstractmethod
    def _layer_bytes(self, num_values: int, *, head_dim: int) -> int:
        """Length of a layer of so many values of K, and as many of V."""

    @abstractmethod
    def _quantise_layer(self, values_RH: NDArray[np.float32], *, out: Bytes) -> bool:
        """Write one layer to all of `out`; whether all values are finite."""

    @abstractmethod
    def _restore_layer(self, data: Bytes, *, values_RH: NDArray[np.float32]) -> None:
        """Read one layer."""

    def encoded_bytes(self, meta: ChunkMeta) -> int:
        """Exactly what `encode` writes."""
        check_meta(meta)
        return meta.num_layers * self._layer_bytes(math.prod(meta.shape[2:]), head_dim=meta.head_dim)

    def encode(self, kv_L2TNH: torch.Tensor, *, out: memoryview, meta: ChunkMeta | None = None) -> int:
        """Write the chunk to the start of `out`.

        Raises:
            CodecDataError: Also for a NaN or an infinity: no code stands for it.
        """
        check_kv(kv_L2TNH)
        size = self._layer_bytes(kv_L2TNH[0, 0].numel(), head_dim=kv_L2TNH.shape[-1])
        target = writable_bytes(out, len(kv_L2TNH) * size)
        for layer, kv_2TNH in enumerate(kv_L2TNH):
            if not self._quantise_layer(float_rows(kv_2TNH), out=target[layer * size : (layer + 1) * size]):
                raise CodecDataError(f"KV of layer {layer} holds a NaN or an infinity")
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
        data, size = unexported_bytes(payload), len(payload) // meta.num_layers
        values_RH = np.empty((math.prod(meta.shape[1:-1]), meta.head_dim), dtype=np.float32)
        for index, layer in enumerate(layers):
            self._restore_layer(data[layer * size : (layer + 1) * size], values_RH=values_RH)
            out[index] = torch.from_numpy(values_RH).view(out[index].shape)

    def _check(self, payload: memoryview, meta: ChunkMeta) -> None:
        expected_bytes = self.encoded_bytes(meta)
        if len(payload) != expected_bytes:
            raise CodecDataError(f"payload has {len(payload)} bytes, its KV needs {expected_bytes}")
