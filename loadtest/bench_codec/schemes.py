"""Codecs as the benchmark sees them: one chunk's KV in, one or more points of quality and bytes out.

Covers: `Scheme`, and one for every codec of this project. Does not cover: LMCache's own CacheGen, which lives in
another environment; where profiles come from (`loadtest.bench_codec.profiles`).

A scheme with levels encodes once; its coarser points are prefixes of the same bytes, as the store serves them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

import kvstore.codecs
import loadtest.bench_codec
from kvstore.codecs import Codec
from kvstore.codecs.cachegen import CachegenCodec
from kvstore.codecs.cachegen_profile import CachegenProfile
from kvstore.codecs.profile import Profile
from kvstore.codecs.stream import truncate
from kvstore.codecs.transform import TransformCodec
from kvstore.interfaces import ChunkMeta
from loadtest.work import code_fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One chunk at one point of a scheme."""

    point: str
    """Name of the codec and, where it has them, its level: `transform-1`."""
    payload: memoryview
    meta: ChunkMeta


class Scheme(Protocol):
    """A codec to be measured."""

    @property
    def points(self) -> Sequence[str]:
        """Names of its points, fewest bytes first."""
        ...

    @property
    def takes_whole(self) -> bool:
        """Whether a whole context can be one payload."""
        ...

    def encode(self, kv_L2TNH: torch.Tensor, *, base_position: int) -> list[Encoded]:
        """Encode one chunk (bfloat16, on the CPU) at every point, in the order of `points`."""
        ...

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """The chunk's KV `[L, 2, T, N, H]` as readers get it."""
        ...


class CodecScheme:
    """A codec without levels."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    @property
    def points(self) -> Sequence[str]:
        """The codec's name."""
        return (self._codec.name,)

    @property
    def takes_whole(self) -> bool:
        """Always."""
        return True

    def encode(self, kv_L2TNH: torch.Tensor, *, base_position: int) -> list[Encoded]:
        """The one point."""
        meta = chunk_meta(kv_L2TNH, codec=self._codec.name, base_position=base_position)
        out = memoryview(bytearray(self._codec.encoded_bytes(meta)))
        num_bytes = self._codec.encode(kv_L2TNH, out=out, meta=meta)
        return [Encoded(point=self._codec.name, payload=out[:num_bytes], meta=meta)]

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """By the codec."""
        return self._codec.decode(encoded.payload, meta=encoded.meta)


class CachegenScheme:
    """CacheGen at one of its profile's levels; its levels are separate encodings.

    Only the default level is told what a whole context takes: that costs as long as all of its chunks.
    """

    def __init__(self, profile: CachegenProfile, *, level: int) -> None:
        self.profile = profile
        self._codec = CachegenCodec(profile, level=level)
        self._point = cachegen_point(level)

    @property
    def default_point(self) -> str:
        """Name of the profile's default level, the paper's bins."""
        return cachegen_point(self.profile.default_level)

    @property
    def points(self) -> Sequence[str]:
        """The level."""
        return (self._point,)

    @property
    def takes_whole(self) -> bool:
        """At the default level."""
        return self._point == self.default_point

    def encode(self, kv_L2TNH: torch.Tensor, *, base_position: int) -> list[Encoded]:
        """The one point."""
        meta = chunk_meta(kv_L2TNH, codec="cachegen", base_position=base_position, profile=self.profile.id)
        out = memoryview(bytearray(self._codec.encoded_bytes(meta)))
        num_bytes = self._codec.encode(kv_L2TNH, meta=meta, out=out)
        return [Encoded(point=self._point, payload=out[:num_bytes], meta=meta)]

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """By the codec."""
        return self._codec.decode(encoded.payload, meta=encoded.meta)


def cachegen_point(level: int) -> str:
    """Name of one of its levels."""
    return f"cachegen-{level}"


class TransformScheme:
    """The transform codec: one encoding at the finest level, coarser ones are its prefixes."""

    def __init__(self, profile: Profile, *, num_threads: int = 1) -> None:
        self.profile = profile
        self.codec = TransformCodec(profile, num_threads=num_threads)

    @property
    def points(self) -> Sequence[str]:
        """The levels, coarsest first."""
        return tuple(f"transform-{level}" for level in range(self.profile.num_levels))

    @property
    def takes_whole(self) -> bool:
        """Always."""
        return True

    def encode(self, kv_L2TNH: torch.Tensor, *, base_position: int) -> list[Encoded]:
        """All levels."""
        meta = chunk_meta(kv_L2TNH, codec="transform", base_position=base_position, profile=self.profile.id)
        out = memoryview(bytearray(self.codec.encoded_bytes(meta)))
        payload = out[: self.codec.encode(kv_L2TNH, out=out, meta=meta)]
        return [
            Encoded(point=point, payload=truncate(payload, level=level), meta=meta)
            for level, point in enumerate(self.points)
        ]

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """By the codec, at the finest level that is there."""
        return self.codec.decode(encoded.payload, meta=encoded.meta)

    def symbols(self, encoded: Encoded, *, layer: int, kv: int, group: int) -> NDArray[np.int64]:
        """What one band's rows were quantised to at the point's level, `[R, T]`; exact tokens have none."""
        chunk = self.codec.open(encoded.payload, meta=encoded.meta)
        num_levels = 1 + self.points.index(encoded.point)
        values, _ = chunk.symbols(layer, group=group, num_levels=num_levels)[kv]
        return np.asarray(values.transpose(0, 2, 1).reshape(-1, values.shape[1]), np.int64)


def chunk_meta(kv_L2TNH: torch.Tensor, *, codec: str, base_position: int, profile: str = "") -> ChunkMeta:
    """What the store would keep beside this chunk."""
    num_layers, _, num_tokens, num_kv_heads, head_dim = kv_L2TNH.shape
    return ChunkMeta(
        num_tokens=num_tokens,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=str(kv_L2TNH.dtype).removeprefix("torch."),
        base_position=base_position,
        codec=codec,
        profile=profile,
    )


def rows_fingerprint(part: str, *, model: str, schemes: Sequence[Scheme]) -> str:
    """What makes rows of a part comparable: the codecs' code, names of points, ids of profiles."""
    identities = tuple((*scheme.points, *_profile_id(scheme)) for scheme in schemes)
    return code_fingerprint(part, model, identities, packages=(kvstore.codecs, loadtest.bench_codec))


def _profile_id(scheme: Scheme) -> tuple[str, ...]:
    return (scheme.profile.id,) if isinstance(scheme, TransformScheme | CachegenScheme) else ()


def transform_of(schemes: Sequence[Scheme]) -> TransformScheme | None:
    """The transform codec among these."""
    return next((scheme for scheme in schemes if isinstance(scheme, TransformScheme)), None)
