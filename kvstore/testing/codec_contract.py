"""The promises of `kvstore.codecs.Codec`, to inherit for every implementation. Needs pytest.

Covers: shape, dtype, size, strides, layer order, shared memory, hostile bytes.
Does not cover: how close decoded values are (`assert_close` is the subclass's promise), speed.
"""

import random
from itertools import pairwise

import msgspec
import pytest
import torch

from cluster.errors import DataError
from kvstore.codecs import Codec
from kvstore.codecs.raw import DTYPES
from kvstore.interfaces import ChunkMeta

SHAPES = ((1, 1, 1, 1), (2, 3, 1, 4), (3, 17, 2, 8), (4, 128, 3, 64))
"""Layers, tokens, heads, head dimension."""


def make_kv(meta: ChunkMeta, seed: int = 0) -> torch.Tensor:
    """Random KV of `meta`'s shape and dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(meta.shape, generator=generator).to(DTYPES[meta.dtype])


class CodecContract:
    """Subclass it, give `make` and, for a lossy codec, `assert_close`."""

    def make(self) -> Codec:
        """The codec under test."""
        raise NotImplementedError

    def assert_close(self, decoded: torch.Tensor, original: torch.Tensor) -> None:
        """How close decoded values must be: equal, unless the codec promises less."""
        assert torch.equal(decoded, original)

    @pytest.fixture(params=SHAPES, ids=str)
    def shape(self, request: pytest.FixtureRequest) -> tuple[int, int, int, int]:
        """One shape."""
        shape: tuple[int, int, int, int] = request.param
        return shape

    @pytest.fixture(params=sorted(DTYPES))
    def meta(self, request: pytest.FixtureRequest, shape: tuple[int, int, int, int]) -> ChunkMeta:
        """Metadata of one shape and dtype."""
        layers, tokens, heads, dim = shape
        return ChunkMeta(
            num_tokens=tokens,
            num_layers=layers,
            num_kv_heads=heads,
            head_dim=dim,
            dtype=request.param,
            base_position=0,
            codec=self.make().name,
        )

    def _encode(self, kv: torch.Tensor, meta: ChunkMeta) -> bytearray:
        out = bytearray(self.make().encoded_bytes(meta))
        written = self.make().encode(kv, out=memoryview(out))
        assert 0 < written <= len(out)
        return out[:written]

    def test_round_trip(self, meta: ChunkMeta) -> None:
        """Shape and dtype return, values as promised."""
        kv = make_kv(meta)
        decoded = self.make().decode(memoryview(self._encode(kv, meta)), meta=meta)
        assert decoded.shape == meta.shape
        assert decoded.dtype == kv.dtype
        self.assert_close(decoded, kv)

    def test_strides_do_not_matter(self, meta: ChunkMeta) -> None:
        """A permuted view encodes to the same bytes as its contiguous copy."""
        view = make_kv(meta).permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
        assert self._encode(view, meta) == self._encode(view.contiguous(), meta)

    def test_read_only_payload(self, meta: ChunkMeta, recwarn: pytest.WarningsRecorder) -> None:
        """Leases hand out read-only bytes: they decode without a warning."""
        kv = make_kv(meta)
        payload = memoryview(bytes(self._encode(kv, meta)))
        self.assert_close(self.make().decode(payload, meta=meta), kv)
        assert not recwarn.list

    def test_payload_can_be_released(self, meta: ChunkMeta) -> None:
        """A decoded tensor that is still referenced does not stop the owner from releasing its memory."""
        buffer = self._encode(make_kv(meta), meta)
        payload = memoryview(buffer)
        decoded = self.make().decode(payload, meta=meta)
        payload.release()
        buffer.clear()  # BufferError if the decoder still exported it
        del decoded

    def test_output_longer_than_needed_is_left_alone(self, meta: ChunkMeta) -> None:
        """Bytes behind the written ones stay."""
        kv = make_kv(meta)
        size = self.make().encoded_bytes(meta)
        out = bytearray(b"\xaa" * (size + 8))
        written = self.make().encode(kv, out=memoryview(out))
        assert written <= size
        assert out[size:] == b"\xaa" * 8

    def test_short_output_is_refused(self, meta: ChunkMeta) -> None:
        """Nothing is written past the end."""
        out = bytearray(1)
        with pytest.raises(DataError):
            self.make().encode(make_kv(meta), out=memoryview(out))

    def test_other_tensors_are_refused(self) -> None:
        """Wrong rank, wrong K/V dimension, dtype that is not KV."""
        for tensor in (torch.zeros(2, 3), torch.zeros(2, 3, 1, 1, 4), torch.zeros(2, 2, 1, 1, 4, dtype=torch.int32)):
            with pytest.raises(DataError):
                self.make().encode(tensor, out=memoryview(bytearray(4096)))

    def test_hostile_lengths(self, meta: ChunkMeta) -> None:
        """Truncated and empty payloads are refused, whatever else they say."""
        payload = self._encode(make_kv(meta), meta)
        for length in {0, 1, len(payload) // 2, len(payload) - 1}:
            with pytest.raises(DataError):
                self.make().decode(memoryview(payload[:length]), meta=meta)

    def test_hostile_metadata(self, meta: ChunkMeta) -> None:
        """Metadata that does not fit the payload is refused before anything is allocated."""
        payload = memoryview(self._encode(make_kv(meta), meta))
        hostile = [{"num_tokens": n} for n in (0, -1, meta.num_tokens + 1, 2**62)]
        hostile += [{"num_layers": 0}, {"num_kv_heads": -3}, {"head_dim": 2**40}]
        changed = [msgspec.structs.replace(meta, **fields) for fields in hostile]
        changed.append(msgspec.structs.replace(meta, dtype="float8"))
        for wrong in changed:
            with pytest.raises(DataError):
                self.make().decode(payload, meta=wrong)

    def test_hostile_bytes(self, meta: ChunkMeta) -> None:
        """Random bytes of the right length decode to KV of the right shape, or raise `DataError`."""
        size = len(self._encode(make_kv(meta), meta))
        for seed in range(4):
            noise = random.Random(seed).randbytes(size)
            try:
                decoded = self.make().decode(memoryview(noise), meta=meta)
            except DataError:
                continue
            assert decoded.shape == meta.shape

    def test_layers_in_order(self, meta: ChunkMeta) -> None:
        """Changing one layer changes no byte that belongs to an earlier one."""
        kv = make_kv(meta)
        first_changes = []
        for layer in range(meta.num_layers):
            other = kv.clone()
            other[layer] = -other[layer]
            pairs = zip(self._encode(kv, meta), self._encode(other, meta), strict=True)
            first_changes.append(next(i for i, (a, b) in enumerate(pairs) if a != b))
        assert all(earlier < later for earlier, later in pairwise(first_changes))
