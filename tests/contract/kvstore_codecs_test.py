"""Every codec that changes bytes keeps every promise of a codec, and its own about values.

Covers: the contract for `lossless`, `int8`, `int4`, `cachegen` and `transform`; how close their values are; sizes.
Does not cover: the raw codec (`engine_codec_raw_test`), quality on real KV (`learnonce bench codec`).
"""

from functools import lru_cache

import msgspec
import pytest
import torch

from kvstore.codecs import Codec, codec_by_name
from kvstore.codecs.cachegen import CachegenCodec
from kvstore.codecs.cachegen_calibrate import calibrate_cachegen
from kvstore.codecs.cachegen_profile import CachegenProfile
from kvstore.codecs.int4 import Int4Codec, group_values
from kvstore.codecs.int8 import Int8Codec
from kvstore.codecs.lossless import LosslessCodec
from kvstore.codecs.profile import Profile
from kvstore.codecs.transform import TransformCodec
from kvstore.interfaces import ChunkMeta
from kvstore.testing.codec_contract import CodecContract, FixedLayoutContract, make_kv, make_meta
from kvstore.testing.profiles import make_profile, make_profile_kv

ULPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-23}
"""Rounding to a dtype, relative."""


class TestLosslessCodec(CodecContract):
    def make(self, meta: ChunkMeta) -> Codec:
        return LosslessCodec()

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_every_bit_pattern_survives(self, dtype: str) -> None:
        meta = self._named(make_meta((2, 64, 2, 16), dtype=dtype))
        kind = torch.int32 if dtype == "float32" else torch.int16
        limits = torch.iinfo(kind)
        generator = torch.Generator().manual_seed(3)
        bits = torch.randint(limits.min, limits.max + 1, meta.shape, generator=generator, dtype=torch.int64).to(kind)
        decoded = self._decode(self._encode(bits.view(getattr(torch, dtype)), meta), meta)
        assert torch.equal(decoded.view(kind), bits)

    @pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 11.5), ("float16", 14.2), ("float32", 27.5)])
    def test_normal_values_get_shorter(self, dtype: str, most: float) -> None:
        """A normal variable's exponent has 2.5 bits of information, not 8."""
        meta = self._named(make_meta((2, 256, 2, 64), dtype=dtype))
        kv = make_kv(meta)
        assert 8 * len(self._encode(kv, meta)) / kv.numel() < most

    def test_widened_values_cost_as_much_as_narrow_ones(self) -> None:
        """float32 KV that was bfloat16 has two bytes of zeros per value."""
        meta = self._named(make_meta((2, 256, 2, 64)))
        kv = make_kv(meta)
        wide = self._encode(kv.float(), msgspec.structs.replace(meta, dtype="float32"))
        assert len(wide) < 1.02 * len(self._encode(kv, meta))

    def test_noise_costs_next_to_nothing(self) -> None:
        """What cannot be made shorter is kept as it is."""
        meta = self._named(make_meta((2, 64, 2, 16)))
        generator = torch.Generator().manual_seed(3)
        bits = torch.randint(-(2**15), 2**15, meta.shape, generator=generator, dtype=torch.int64).to(torch.int16)
        assert len(self._encode(bits.view(torch.bfloat16), meta)) < 2 * bits.numel() + 100


class TestInt8Codec(FixedLayoutContract):
    def make(self, meta: ChunkMeta) -> Codec:
        return Int8Codec()

    def assert_close(self, decoded: torch.Tensor, original: torch.Tensor) -> None:
        exact = original.double()
        largest = exact.abs().amax(-1, keepdim=True)
        bound = largest / 127 * 0.5001 + largest * ULPS[original.dtype]
        assert ((decoded.double() - exact).abs() <= bound).all()

    def test_bits_per_value(self) -> None:
        meta = make_meta((2, 128, 3, 64))
        assert 8 * self.make(meta).encoded_bytes(meta) / make_kv(meta).numel() == 8.5


class TestInt4Codec(FixedLayoutContract):
    def make(self, meta: ChunkMeta) -> Codec:
        return Int4Codec()

    def assert_close(self, decoded: torch.Tensor, original: torch.Tensor) -> None:
        width = group_values(original.shape[-1])
        exact = original.double().reshape(-1, width)
        largest = exact.abs().amax(-1, keepdim=True)
        # The end without a code of its own is a whole scale away; what the scale lost in bfloat16 adds to both ends.
        bound = largest / 8 * (1 + 8 * 2**-7) + largest * ULPS[original.dtype]
        assert ((decoded.double().reshape(-1, width) - exact).abs() <= bound).all()

    def test_bits_per_value(self) -> None:
        meta = make_meta((2, 128, 3, 64))
        assert 8 * self.make(meta).encoded_bytes(meta) / make_kv(meta).numel() == 4.5

    def test_most_values_are_half_a_scale_away(self) -> None:
        meta = self._named(make_meta((2, 128, 3, 64), dtype="float32"))
        kv = make_kv(meta)
        error = (self._decode(self._encode(kv, meta), meta) - kv).abs().reshape(-1, 32)
        half = kv.abs().reshape(-1, 32).amax(-1, keepdim=True) / 16
        assert (error <= half * 1.01).double().mean() > 0.99


@lru_cache
def cachegen_profile(layers: int, heads: int, dim: int, num_exact: int) -> CachegenProfile:
    """Calibrated on random KV of that shape."""
    return calibrate_cachegen(
        [make_kv(make_meta((layers, 200, heads, dim)), seed=99)],
        model="random",
        num_exact=num_exact,
        factors=(1.0, 0.25),
    )


class TestCachegenCodec(CodecContract):
    num_exact = 0

    def make(self, meta: ChunkMeta) -> CachegenCodec:
        profile = cachegen_profile(meta.num_layers, meta.num_kv_heads, meta.head_dim, self.num_exact)
        return CachegenCodec(profile)

    def assert_close(self, decoded: torch.Tensor, original: torch.Tensor) -> None:
        meta = make_meta((original.shape[0], *original.shape[2:]))
        bins_L2 = torch.from_numpy(self.make(meta).profile.bins_VL2[0])[:, :, None, None, None]
        largest = original.double().abs().amax(-1, keepdim=True)
        # A difference is half a bin off, an anchor half a scale: whichever is coarser.
        bound = torch.maximum(bins_L2 * 0.5001, largest / 127 * 0.51) + largest * 2 * ULPS[original.dtype]
        assert ((decoded.double() - original.double()).abs() <= bound).all()


class TestCachegenCodecWithExactTokens(TestCachegenCodec):
    num_exact = 3

    @pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 14])
    def test_first_tokens_are_exact_at_position_0_only(self, num_tokens: int) -> None:
        meta = self._named(make_meta((2, num_tokens, 2, 64)))
        kv = make_kv(meta)
        assert torch.equal(self._decode(self._encode(kv, meta), meta)[:, :, :3], kv[:, :, :3])
        later = msgspec.structs.replace(meta, base_position=1)
        assert not torch.equal(self._decode(self._encode(kv, later), later)[:, :, :3], kv[:, :, :3])


@lru_cache
def transform_profile(layers: int, heads: int, dim: int) -> Profile:
    """Any basis of that shape."""
    return make_profile(num_layers=layers, num_kv_heads=heads, head_dim=dim)


class TestTransformCodec(CodecContract):
    may_be_cut = True

    def make(self, meta: ChunkMeta) -> Codec:
        return TransformCodec(transform_profile(meta.num_layers, meta.num_kv_heads, meta.head_dim))

    def make_kv(self, meta: ChunkMeta, seed: int = 0) -> torch.Tensor:
        profile = transform_profile(meta.num_layers, meta.num_kv_heads, meta.head_dim)
        return make_profile_kv(profile, msgspec.structs.replace(meta, profile=profile.id), seed=seed)

    def _named(self, meta: ChunkMeta) -> ChunkMeta:
        profile = transform_profile(meta.num_layers, meta.num_kv_heads, meta.head_dim)
        return msgspec.structs.replace(meta, codec="transform", profile=profile.id)

    def assert_close(self, decoded: torch.Tensor, original: torch.Tensor) -> None:
        """Loose: what counts is that it is this KV; the codec's own tests know the bound."""
        error = (decoded.double() - original.double()).square().mean()
        assert error <= 0.05 * original.double().square().mean() + 1e-3


@pytest.mark.parametrize("name", ["raw", "lossless", "int8", "int4"])
def test_codecs_without_profile_are_found_by_name(name: str) -> None:
    assert codec_by_name(name).name == name
