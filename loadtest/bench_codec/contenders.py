"""What the quality protocol measures: whatever gives a context's KV back, and says what was stored for it.

Covers: `Contender`; the project's codecs, chunk by chunk on all cores; LMCache's own CacheGen.
Does not cover: one chunk (`loadtest.bench_codec.schemes`), how LMCache is asked
(`loadtest.bench_codec.lmcache_reference`).
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch

from loadtest.bench_codec import CHUNK_TOKENS
from loadtest.bench_codec.lmcache_reference import find_python, round_trip
from loadtest.bench_codec.measures import bits_per_element
from loadtest.bench_codec.schemes import Encoded, Scheme


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Returned:
    """A context's KV after it was stored."""

    point: str
    kv_L2TNH: torch.Tensor
    chunk_bytes: tuple[int, ...]
    """Payload bytes of each chunk."""
    whole_bits: float | None
    """Bits per element with the context as one payload; None where that was not tried."""


class Contender(Protocol):
    """One or more points of quality and bytes."""

    @property
    def points(self) -> Sequence[str]:
        """Names of its points, fewest bytes first."""
        ...

    def run(self, kv_L2TNH: torch.Tensor, *, contexts: Sequence[int]) -> Iterator[Returned]:
        """Store and load KV (bfloat16), one point after the other; `contexts` are the prefixes that matter."""
        ...


class SchemeContender:
    """A codec of this project."""

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme

    @property
    def points(self) -> Sequence[str]:
        """The scheme's."""
        return self._scheme.points

    def run(self, kv_L2TNH: torch.Tensor, *, contexts: Sequence[int]) -> Iterator[Returned]:
        """Chunk by chunk, and the whole once more where the scheme takes it."""
        del contexts
        scheme = self._scheme
        chunks = encode_chunks(scheme, kv_L2TNH)
        whole = [len(each.payload) for each in scheme.encode(kv_L2TNH, base_position=0)] if scheme.takes_whole else None
        for index, point in enumerate(scheme.points):
            encoded = [chunk[index] for chunk in chunks]
            yield Returned(
                point=point,
                kv_L2TNH=decode_chunks(scheme, encoded),
                chunk_bytes=tuple(len(each.payload) for each in encoded),
                whole_bits=None if whole is None else bits_per_element([whole[index]], num_elements=kv_L2TNH.numel()),
            )


class LmcacheContender:
    """LMCache's own CacheGen, in its own interpreter.

    Raises:
        LmcacheUnusableError: There is no such interpreter.
    """

    def __init__(self, model: str) -> None:
        self._python = find_python()
        self._model = Path(model)

    @property
    def points(self) -> Sequence[str]:
        """One."""
        return ("lmcache",)

    def run(self, kv_L2TNH: torch.Tensor, *, contexts: Sequence[int]) -> Iterator[Returned]:
        """The pieces between the contexts: LMCache tells bytes per piece, so chunks of one count as equally long."""
        bounds = [0, *sorted(contexts)]
        pieces = {f"{stop:06d}": kv_L2TNH[:, :, start:stop].contiguous() for start, stop in pairwise(bounds)}
        answers = round_trip(pieces, model=self._model, chunk_tokens=CHUNK_TOKENS, python=self._python)
        chunk_bytes: list[int] = []
        for name, piece in pieces.items():
            count = piece.shape[2] // CHUNK_TOKENS
            chunk_bytes += [-(-answers[name].num_bytes // count)] * count
        kv = torch.cat([answers[name].kv_L2TNH for name in pieces], dim=2).to(kv_L2TNH.dtype)
        yield Returned(point="lmcache", kv_L2TNH=kv, chunk_bytes=tuple(chunk_bytes), whole_bits=None)


def encode_chunks(scheme: Scheme, kv_L2TNH: torch.Tensor) -> list[list[Encoded]]:
    """Every chunk of a context at every point, as the store keeps it."""
    starts = range(0, kv_L2TNH.shape[2], CHUNK_TOKENS)

    def one(start: int) -> list[Encoded]:
        return scheme.encode(kv_L2TNH[:, :, start : start + CHUNK_TOKENS], base_position=start)

    with _threads() as threads:
        return list(threads.map(one, starts))


def decode_chunks(scheme: Scheme, chunks: Sequence[Encoded]) -> torch.Tensor:
    """The KV of a context from its chunks, `[L, 2, T, N, H]`."""
    with _threads() as threads:
        return torch.cat(list(threads.map(scheme.decode, chunks)), dim=2)


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)))
