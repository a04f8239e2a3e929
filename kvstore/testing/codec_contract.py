"""The promises of `kvstore.codecs.Codec`, to inherit for every implementation. Needs pytest.

Covers: shape, dtype, lengths, positions, strides, layers, threads, released memory, hostile bytes and metadata.
Does not cover: how close decoded values are (`assert_close` is the subclass's promise), speed, a million mutations.
"""

import math
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import msgspec
import pytest
import torch

from cluster.errors import DataError
from kvstore.codecs import Codec
from kvstore.codecs.raw import DTYPES
from kvstore.interfaces import ChunkMeta

CASES = (
    ((1, 1, 1, 1), "bfloat16"),
    ((2, 3, 1, 4), "float32"),
    ((3, 17, 2, 8), "float16"),
    ((2, 65, 1, 24), "bfloat16"),
    ((2, 128, 3, 64), "bfloat16"),
    ((2, 128, 3, 64), "float32"),
)
"""Layers, tokens, heads, head dimension; dtype."""
TOKENS = (1, 2, 7, 9, 10, 11, 15, 16, 17, 19, 20, 21, 31, 32, 33, 64, 100, 255, 256, 257, 511, 600)
"""Around every group, lane and block that a codec may have."""
MUTATIONS = 150


def make_kv(meta: ChunkMeta, seed: int = 0) -> torch.Tensor:
    """Random KV of `meta`'s shape and dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(meta.shape, generator=generator).to(DTYPES[meta.dtype])


def make_meta(
    shape: tuple[int, int, int, int], *, dtype: str = "bfloat16", base_position: int = 0, codec: str = "raw"
) -> ChunkMeta:
    """Metadata of layers, tokens, heads and head dimension."""
    layers, tokens, heads, dim = shape
    return ChunkMeta(
        num_tokens=tokens,
        num_layers=layers,
        num_kv_heads=heads,
        head_dim=dim,
        dtype=dtype,
        base_position=base_position,
        codec=codec,
    )


def _flip(data: bytearray, numbers: random.Random) -> None:
    """Change one bit, more often near the start, where lengths are."""
    at = int(len(data) * numbers.random() ** 3)
    data[at] ^= 1 << numbers.randrange(8)


def _overwrite(data: bytearray, numbers: random.Random) -> None:
    """Put an extreme number somewhere."""
    value = numbers.choice((b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\1\0\0\0"))
    at = int((len(data) - 4) * numbers.random() ** 3)
    data[at : at + 4] = value


def _cut_out(data: bytearray, numbers: random.Random) -> None:
    """Lose some bytes."""
    at = numbers.randrange(len(data))
    del data[at : at + numbers.randint(1, 64)]


def _put_in(data: bytearray, numbers: random.Random) -> None:
    """Add some bytes."""
    at = numbers.randrange(len(data) + 1)
    data[at:at] = numbers.randbytes(numbers.randint(1, 64))


def _noise(data: bytearray, numbers: random.Random) -> None:
    """Keep the start only."""
    at = numbers.randrange(min(len(data), 256))
    data[at:] = numbers.randbytes(len(data) - at)


class CodecContract:
    """Subclass it, give `make` and, for a lossy codec, `assert_close`."""

    may_be_cut = False
    """Whether the start of a payload is a payload too."""

    def make(self, meta: ChunkMeta) -> Codec:
        """The codec under test, for chunks of this shape."""
        raise NotImplementedError

    def make_kv(self, meta: ChunkMeta, seed: int = 0) -> torch.Tensor:
        """KV that the codec is made for."""
        return make_kv(meta, seed)

    def assert_close(self, decoded: torch.Tensor, original: torch.Tensor) -> None:
        """How close decoded values must be: equal, unless the codec promises less."""
        assert torch.equal(decoded, original)

    @pytest.fixture(params=CASES, ids=str)
    def meta(self, request: pytest.FixtureRequest) -> ChunkMeta:
        """Metadata of one shape and dtype."""
        shape, dtype = request.param
        return self._named(make_meta(shape, dtype=dtype))

    @pytest.fixture
    def chunk(self) -> tuple[ChunkMeta, bytes]:
        """One chunk, encoded."""
        meta = self._named(make_meta((3, 23, 2, 8)))
        return meta, bytes(self._encode(self.make_kv(meta), meta))

    def _named(self, meta: ChunkMeta) -> ChunkMeta:
        return msgspec.structs.replace(meta, codec=self.make(meta).name)

    def _encode(self, kv: torch.Tensor, meta: ChunkMeta) -> bytearray:
        codec = self.make(meta)
        out = bytearray(codec.encoded_bytes(meta))
        written = codec.encode(kv, meta=meta, out=memoryview(out))
        assert 0 < written <= len(out)
        return out[:written]

    def _decode(self, payload: bytes | bytearray, meta: ChunkMeta) -> torch.Tensor:
        return self.make(meta).decode(memoryview(payload), meta=meta)

    def test_round_trip(self, meta: ChunkMeta) -> None:
        """Shape and dtype return, values as promised."""
        kv = self.make_kv(meta)
        decoded = self._decode(self._encode(kv, meta), meta)
        assert decoded.shape == meta.shape
        assert decoded.dtype == kv.dtype
        self.assert_close(decoded, kv)

    @pytest.mark.parametrize("num_tokens", TOKENS)
    def test_every_length(self, num_tokens: int) -> None:
        """Groups that are not full, and single tokens."""
        meta = self._named(make_meta((2, num_tokens, 2, 8)))
        kv = self.make_kv(meta, seed=num_tokens)
        self.assert_close(self._decode(self._encode(kv, meta), meta), kv)

    @pytest.mark.parametrize("base_position", [0, 1, 10, 4095, 1 << 20])
    def test_every_position(self, base_position: int) -> None:
        """Chunks begin anywhere; exact first tokens, where a codec has them, only at 0."""
        meta = self._named(make_meta((2, 33, 2, 8), base_position=base_position))
        kv = self.make_kv(meta)
        self.assert_close(self._decode(self._encode(kv, meta), meta), kv)

    def test_same_bytes_every_time(self, meta: ChunkMeta) -> None:
        """Nothing but the KV and its metadata decides."""
        assert self._encode(self.make_kv(meta), meta) == self._encode(self.make_kv(meta), meta)

    def test_strides_do_not_matter(self, meta: ChunkMeta) -> None:
        """A permuted view encodes to the same bytes as its contiguous copy."""
        view = self.make_kv(meta).permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
        assert self._encode(view, meta) == self._encode(view.contiguous(), meta)

    def test_layers_alone(self, meta: ChunkMeta) -> None:
        """Any run of layers decodes to what the whole chunk has there."""
        payload = self._encode(self.make_kv(meta), meta)
        whole = self._decode(payload, meta)
        for start in range(meta.num_layers):
            for stop in range(start + 1, meta.num_layers + 1):
                out = torch.full((stop - start, *meta.shape[1:]), 7.0, dtype=whole.dtype)
                self.make(meta).decode_layers(memoryview(payload), meta=meta, layers=range(start, stop), out=out)
                assert torch.equal(out, whole[start:stop])

    def test_layers_that_do_not_fit(self, chunk: tuple[ChunkMeta, bytes]) -> None:
        """Layers that the chunk does not have, and room of another shape or dtype, are refused."""
        meta, payload = chunk
        right = torch.empty((1, *meta.shape[1:]), dtype=DTYPES[meta.dtype])
        for layers, out in (
            (range(3, 4), right),
            (range(-1, 0), right),
            (range(2), right),
            (range(1), right[..., :-1]),
            (range(1), right.float()),
        ):
            with pytest.raises(DataError):
                self.make(meta).decode_layers(memoryview(payload), meta=meta, layers=layers, out=out)

    def test_extremes_stay_finite(self) -> None:
        """Zeros, the smallest and the largest values of a dtype decode to finite values, or are refused."""
        for dtype, kind in DTYPES.items():
            meta = self._named(make_meta((1, 12, 1, 8), dtype=dtype))
            limits = torch.finfo(kind)
            for value in (0.0, limits.smallest_normal, limits.smallest_normal / 4, limits.max, limits.min):
                kv = self.make_kv(meta)
                kv[:, :, 3:9] = value
                for one in (kv, torch.full_like(kv, value)):
                    decoded = self._decode_or_none(one, meta)
                    assert decoded is None or torch.isfinite(decoded).all(), f"{value} in {dtype}"

    def test_no_number_that_is_none_passes_quietly(self) -> None:
        """NaNs and infinities return, or the chunk is refused."""
        meta = self._named(make_meta((2, 21, 1, 8)))
        for value in (math.nan, math.inf, -math.inf):
            for token in (0, 5, 10):
                kv = self.make_kv(meta)
                kv[1, 1, token, 0, 3] = value
                decoded = self._decode_or_none(kv, meta)
                assert decoded is None or repr(decoded[1, 1, token, 0, 3].item()) == repr(value)

    def _decode_or_none(self, kv: torch.Tensor, meta: ChunkMeta) -> torch.Tensor | None:
        try:
            return self._decode(self._encode(kv, meta), meta)
        except DataError:
            return None

    def test_threads(self) -> None:
        """One codec serves several threads at once."""
        meta = self._named(make_meta((2, 40, 2, 16)))
        codec = self.make(meta)
        kvs = [self.make_kv(meta, seed) for seed in range(4)]
        payloads = [self._encode(kv, meta) for kv in kvs]
        expected = [codec.decode(memoryview(payload), meta=meta) for payload in payloads]

        def work(index: int) -> bool:
            out = bytearray(codec.encoded_bytes(meta))
            num_bytes = codec.encode(kvs[index % 4], meta=meta, out=memoryview(out))
            decoded = codec.decode(memoryview(payloads[index % 4]), meta=meta)
            return out[:num_bytes] == payloads[index % 4] and torch.equal(decoded, expected[index % 4])

        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(work, range(24)))

    def test_read_only_payload(self, meta: ChunkMeta, recwarn: pytest.WarningsRecorder) -> None:
        """Leases hand out read-only bytes: they decode without a warning."""
        kv = self.make_kv(meta)
        self.assert_close(self._decode(bytes(self._encode(kv, meta)), meta), kv)
        assert not recwarn.list

    def test_payload_may_begin_anywhere(self, chunk: tuple[ChunkMeta, bytes]) -> None:
        """A payload need not be aligned."""
        meta, payload = chunk
        expected = self._decode(payload, meta)
        for shift in (1, 2, 3, 7):
            moved = memoryview(bytes(shift) + payload)[shift:]
            assert torch.equal(self.make(meta).decode(moved, meta=meta), expected)

    def test_payload_can_be_released(self, meta: ChunkMeta) -> None:
        """A decoded tensor that is still referenced does not stop the owner from releasing its memory."""
        buffer = self._encode(self.make_kv(meta), meta)
        payload = memoryview(buffer)
        decoded = self.make(meta).decode(payload, meta=meta)
        payload.release()
        buffer.clear()  # BufferError if the decoder still exported it
        del decoded

    def test_room_can_be_released(self, chunk: tuple[ChunkMeta, bytes]) -> None:
        """Whether encoding worked or not, and while the error is looked at, its room can be given back."""
        meta, _ = chunk
        codec = self.make(meta)
        for kv in (self.make_kv(meta), self.make_kv(meta).fill_(math.nan)):
            buffer = bytearray(codec.encoded_bytes(meta))
            room = memoryview(buffer)
            try:
                codec.encode(kv, meta=meta, out=room)
            except DataError:
                room.release()
                buffer.clear()
            else:
                room.release()
                buffer.clear()

    def test_output_longer_than_needed_is_left_alone(self, meta: ChunkMeta) -> None:
        """Bytes behind the written ones stay."""
        codec = self.make(meta)
        size = codec.encoded_bytes(meta)
        out = bytearray(b"\xaa" * (size + 8))
        written = codec.encode(self.make_kv(meta), meta=meta, out=memoryview(out))
        assert written <= size
        assert out[size:] == b"\xaa" * 8

    def test_short_output_is_refused(self, meta: ChunkMeta) -> None:
        """Nothing is written past the end, and no payload without its end is left."""
        kv = self.make_kv(meta)
        for size in {0, 1, len(self._encode(kv, meta)) - 1}:
            out = bytearray(size + 8)
            with pytest.raises(DataError):
                self.make(meta).encode(kv, meta=meta, out=memoryview(out)[:size])
            assert out[size:] == bytes(8)

    def test_other_tensors_are_refused(self) -> None:
        """Wrong rank, wrong K/V dimension, dtype that is not KV, nothing in it."""
        meta = self._named(make_meta((2, 1, 1, 4), dtype="float32"))
        for tensor in (
            torch.zeros(2, 3),
            torch.zeros(2, 3, 1, 1, 4),
            torch.zeros(2, 2, 1, 1, 4, dtype=torch.int32),
            torch.zeros(2, 2, 1, 1, 4, dtype=torch.float64),
        ):
            with pytest.raises(DataError):
                self.make(meta).encode(tensor, meta=meta, out=memoryview(bytearray(4096)))

    def test_hostile_lengths(self, meta: ChunkMeta) -> None:
        """Truncated and empty payloads are refused, whatever else they say; so are bytes behind the end."""
        payload = self._encode(self.make_kv(meta), meta)
        for length in (0, 1, len(payload) // 2, len(payload) - 1, len(payload) + 1):
            changed = (payload + b"\0")[:length]
            if self.may_be_cut and length > 1:
                self._decode_or_refuse(changed, meta)
            else:
                with pytest.raises(DataError):
                    self._decode(changed, meta)

    def test_hostile_metadata(self, meta: ChunkMeta) -> None:
        """Metadata that does not fit the payload is refused before anything is allocated."""
        codec = self.make(meta)
        payload = memoryview(self._encode(self.make_kv(meta), meta))
        hostile = [{"num_tokens": n} for n in (0, -1, meta.num_tokens + 1, 2**31, 2**62)]
        hostile += [{"num_layers": 0}, {"num_layers": 2**40}, {"num_kv_heads": -3}, {"head_dim": 2**40}]
        changed = [msgspec.structs.replace(meta, **fields) for fields in hostile]
        changed.append(msgspec.structs.replace(meta, dtype="float8"))
        for wrong in changed:
            with pytest.raises(DataError):
                codec.decode(payload, meta=wrong)

    @pytest.mark.parametrize("mutate", [_flip, _overwrite, _cut_out, _put_in, _noise], ids=lambda f: f.__name__[1:])
    def test_hostile_bytes(
        self, chunk: tuple[ChunkMeta, bytes], mutate: Callable[[bytearray, random.Random], None]
    ) -> None:
        """Damaged payloads decode to KV of the right shape, or raise `DataError`: nothing else happens."""
        meta, payload = chunk
        numbers = random.Random(7)
        for _ in range(MUTATIONS):
            damaged = bytearray(payload)
            mutate(damaged, numbers)
            self._decode_or_refuse(damaged, meta)

    def _decode_or_refuse(self, payload: bytes | bytearray, meta: ChunkMeta) -> None:
        try:
            decoded = self._decode(payload, meta)
        except DataError:
            return
        assert decoded.shape == meta.shape
        assert decoded.dtype == DTYPES[meta.dtype]


class FixedLayoutContract(CodecContract):
    """Of codecs whose layers lie at the same places whatever the values are."""

    def test_layers_in_order(self, meta: ChunkMeta) -> None:
        """Changing one layer changes no byte that belongs to an earlier one."""
        kv = self.make_kv(meta)
        first_changes = []
        for layer in range(meta.num_layers):
            other = kv.clone()
            other[layer] = -other[layer]
            pairs = zip(self._encode(kv, meta), self._encode(other, meta), strict=True)
            first_changes.append(next(i for i, (a, b) in enumerate(pairs) if a != b))
        assert all(earlier < later for earlier, later in pairwise(first_changes))
