"""Transforms between a chunk's KV and its stored bytes.

Covers: the `Codec` protocol, the registry by name, and what the stored form promises.
Does not cover: headers and checksums (`kvstore.container`), which codec a chunk gets (its `ChunkMeta` says it).
Shape letters: L layers, 2 for K and V, T tokens of the chunk, N KV heads, H head dimension.

Payloads are layer-major: all bytes of layer 0 stand before those of layer 1, so that a reader can use layers in order
while later ones still arrive.
"""

from typing import Protocol

import torch

from cluster.errors import DataError
from kvstore.codecs.raw import CodecDataError, RawCodec
from kvstore.interfaces import ChunkMeta

__all__ = ["Codec", "CodecDataError", "UnknownCodecError", "codec_by_name", "codec_names"]


class UnknownCodecError(DataError):
    """A chunk was written with a codec that this version does not know: a miss."""


class Codec(Protocol):
    """KV of one chunk to bytes and back.

    Guarantees:
        `decode(encode(kv))` has the shape and dtype of `kv`; how close the values are is the codec's own promise.
        Hostile payloads raise `DataError` and nothing else; no allocation exceeds what `meta` and the payload imply.
        Safe for several threads: codecs hold no state.
    """

    @property
    def name(self) -> str:
        """Short closed-set name, stored in `ChunkMeta.codec`."""
        ...

    def encoded_bytes(self, meta: ChunkMeta) -> int:
        """Bytes to reserve for a chunk; `encode` writes at most this many.

        Raises:
            DataError: `meta` describes no KV that this codec can hold.
        """
        ...

    def encode(self, kv_L2TNH: torch.Tensor, *, out: memoryview) -> int:
        """Write one chunk's KV (on the CPU, any strides) to `out`.

        Returns:
            Bytes written, from the start of `out`.

        Raises:
            DataError: The tensor is not KV that this codec can hold, or `out` is too short.
        """
        ...

    def decode(self, payload: memoryview, *, meta: ChunkMeta) -> torch.Tensor:
        """One chunk's KV as `[L, 2, T, N, H]`.

        The tensor may share the payload's memory: it is valid while the payload is, and must not be written to.

        Raises:
            DataError: The payload is not what `meta` says.
        """
        ...


_CODECS: dict[str, Codec] = {codec.name: codec for codec in (RawCodec(),)}


def codec_by_name(name: str) -> Codec:
    """The codec that wrote a chunk.

    Raises:
        UnknownCodecError: No codec of this version has that name.

    Example:
        >>> codec_by_name("raw").name
        'raw'
    """
    codec = _CODECS.get(name)
    if codec is None:
        raise UnknownCodecError(f"unknown codec {name!r}, this version knows {', '.join(codec_names())}")
    return codec


def codec_names() -> tuple[str, ...]:
    """Every codec of this version."""
    return tuple(_CODECS)
