"""Transforms between a chunk's KV and its stored bytes.

Covers: the `Codec` protocol, the registry by name, and what the stored form promises.
Does not cover: headers and checksums (`kvstore.container`), which codec a chunk gets (its `ChunkMeta` says it).
Shape letters: L layers, 2 for K and V, T tokens of the chunk, N KV heads, H head dimension.

Payloads are layer-major: all bytes of layer 0 stand before those of layer 1, so that a reader can use layers in order
while later ones still arrive. Those of `transform` are level-major, and layer-major within a level.
"""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Final, Protocol

import torch

from cluster.errors import DataError
from kvstore.codecs.profile import Profile
from kvstore.codecs.raw import CodecDataError
from kvstore.interfaces import ChunkMeta

__all__ = [
    "TRANSFORM",
    "Codec",
    "CodecDataError",
    "ProfileMissingError",
    "UnknownCodecError",
    "codec_by_name",
    "codec_for",
    "codec_names",
]

TRANSFORM: Final = "transform"
"""Name of the codec that needs a profile (`kvstore.codecs.transform`)."""


class UnknownCodecError(DataError):
    """A chunk was written with a codec that this version does not know: a miss."""


class ProfileMissingError(DataError):
    """A chunk names a profile that is not here: a miss."""


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

    def encode(self, kv_L2TNH: torch.Tensor, *, out: memoryview, meta: ChunkMeta | None = None) -> int:
        """Write one chunk's KV to `out`.

        Args:
            kv_L2TNH: On the CPU, any strides; K is rotated for `meta.base_position`.
            out: Room for the payload.
            meta: What the reader will know; None: KV of a sequence's start.

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

    def decode_layers(self, payload: memoryview, *, meta: ChunkMeta, layers: range, out: torch.Tensor) -> None:
        """Some layers' KV into `out` `[layer, 2, T, N, H]`, contiguous; the bytes of other layers are not looked at.

        Raises:
            DataError: The payload is not what `meta` says, or `out` is no room for these layers.
        """
        ...


_PLACES: Final = {
    "raw": ("kvstore.codecs.raw", "RawCodec"),
    "lossless": ("kvstore.codecs.lossless", "LosslessCodec"),
    "int8": ("kvstore.codecs.int8", "Int8Codec"),
    "int4": ("kvstore.codecs.int4", "Int4Codec"),
}
"""Loops are compiled when their module is imported, once per machine: processes that never use them do not wait."""


@cache
def _made(name: str) -> Codec:
    module, kind = _PLACES[name]
    codec: Codec = getattr(import_module(module), kind)()
    return codec


def codec_by_name(name: str) -> Codec:
    """The codec that wrote a chunk.

    Raises:
        UnknownCodecError: No codec of this version has that name.

    Example:
        >>> codec_by_name("raw").name
        'raw'
    """
    if name not in _PLACES:
        raise UnknownCodecError(f"unknown codec {name!r}, this version knows {', '.join(codec_names())}")
    return _made(name)


def codec_for(meta: ChunkMeta, profiles: Mapping[str, Profile]) -> Codec:
    """The codec that reads a chunk, whether it needs a profile or not.

    Args:
        meta: Of the chunk.
        profiles: Profiles that are at hand, by id.

    Raises:
        UnknownCodecError: No codec of this version has that name.
        ProfileMissingError: The chunk's profile is not among `profiles`.
    """
    if meta.codec != TRANSFORM:
        return codec_by_name(meta.codec)
    profile = profiles.get(meta.profile)
    if profile is None:
        raise ProfileMissingError(f"profile {meta.profile[:12]!r} of a {meta.codec} chunk is not at hand")
    # Its loops are compiled when it is imported, once per machine: processes that never meet such a chunk do not wait.
    from kvstore.codecs.transform import TransformCodec

    return TransformCodec(profile)


def codec_names() -> tuple[str, ...]:
    """Every codec of this version that needs no profile."""
    return tuple(_PLACES)
