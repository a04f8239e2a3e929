"""Promises of the `transform` codec for any shape, profile and KV.

Covers: round trips at every level against the plain decoder, prefixes, wild values, random access.
Does not cover: hostile bytes (`tests/fault/codec_transform_fuzz_test.py`).
"""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codecs.profile import Profile
from kvstore.codecs.raw import CodecDataError
from kvstore.codecs.stream import truncate
from kvstore.codecs.transform import TransformCodec
from kvstore.testing.profiles import make_profile, make_profile_kv, make_profile_meta
from kvstore.testing.transform_reference import decode_reference


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Profiles of few values, so that the plain decoder keeps up."""
    groups = draw(st.integers(1, 2))
    return make_profile(
        num_layers=draw(st.integers(1, 3)),
        num_kv_heads=groups * draw(st.integers(1, 2)),
        head_dim=draw(st.integers(1, 20)),
        groups=groups,
        num_levels=draw(st.integers(1, 4)),
        num_exact=draw(st.integers(0, 3)),
        with_classes=draw(st.booleans()),
        is_neox=draw(st.booleans()),
        finest_bin=draw(st.sampled_from([1e-3, 0.1, 30.0])),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    profiles(),
    st.integers(1, 40),
    st.sampled_from(["bfloat16", "float16", "float32"]),
    st.sampled_from([0, 1, 30000]),
    st.sampled_from([0.0, 1e-4, 1e-2]),
    st.integers(0, 1000),
)
def test_round_trip(
    profile: Profile, num_tokens: int, dtype: str, base_position: int, wild_share: float, seed: int
) -> None:
    meta = make_profile_meta(profile, num_tokens=num_tokens, dtype=dtype, base_position=base_position)
    kv = make_profile_kv(profile, meta, seed=seed)
    # A few values far outside what the profile expects: escapes, and what they cost.
    wild = np.random.default_rng(seed).random(tuple(meta.shape)) < wild_share
    kv[torch.from_numpy(wild)] *= 500
    codec = TransformCodec(profile)
    out = bytearray(4 * codec.encoded_bytes(meta))
    payload = out[: codec.encode(kv, out=memoryview(out), meta=meta)]
    for level in range(profile.num_levels):
        decoded = codec.decode(truncate(memoryview(payload), level=level), meta=meta)
        expected = decode_reference(bytes(payload), meta=meta, profile=profile, num_levels=level + 1)
        assert torch.equal(decoded, expected)
    layer = seed % meta.num_layers
    one = torch.empty(1, *meta.shape[1:], dtype=decoded.dtype)
    codec.decode_layers(memoryview(payload), meta=meta, layers=range(layer, layer + 1), out=one)
    assert torch.equal(one[0], decoded[layer])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(profiles(), st.integers(1, 40), st.integers(0, 1000))
def test_any_finite_kv_is_coded_or_refused(profile: Profile, num_tokens: int, seed: int) -> None:
    """KV of nobody's model: whatever comes back is finite and of the right shape."""
    meta = make_profile_meta(profile, num_tokens=num_tokens, dtype="float32", base_position=seed % 2)
    random = np.random.default_rng(seed)
    values = random.standard_normal(meta.shape) * 10.0 ** random.uniform(-30, 30, meta.shape)
    kv = torch.from_numpy(np.clip(values, -3e38, 3e38).astype(np.float32))
    codec = TransformCodec(profile)
    out = bytearray(codec.encoded_bytes(meta))
    try:
        size = codec.encode(kv, out=memoryview(out), meta=meta)
    except CodecDataError:
        return
    decoded = codec.decode(memoryview(out)[:size], meta=meta)
    assert decoded.shape == meta.shape
    assert torch.isfinite(decoded).all()
