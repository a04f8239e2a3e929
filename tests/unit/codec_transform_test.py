"""The `transform` codec on synthetic profiles.

Covers: equality with the plain decoder to the bit, error bounds, levels and prefixes, random access, positions,
strides, escapes, classes, threads, determinism, refusals.
Does not cover: quality on a model, hostile bytes (`tests/fault/codec_transform_fuzz_test.py`), speed.
"""

import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from cluster.errors import CallerError, DataError
from kvstore.codecs import ProfileMissingError, codec_for, importance, transform_encode, transform_plan
from kvstore.codecs.profile import Profile
from kvstore.codecs.raw import CodecDataError
from kvstore.codecs.stream import read_header, truncate
from kvstore.codecs.transform import OpenTransformChunk, TransformCodec
from kvstore.interfaces import ChunkMeta
from kvstore.testing.profiles import make_profile, make_profile_kv, make_profile_meta
from kvstore.testing.transform_reference import decode_reference, mend

PROFILES: dict[str, Callable[[], Profile]] = {
    "plain": lambda: make_profile(),
    "classes": lambda: make_profile(with_classes=True, seed=1),
    "groups": lambda: make_profile(num_kv_heads=4, head_dim=6, groups=2, seed=2),
    "neighbours": lambda: make_profile(is_neox=False, head_dim=16, seed=3),
    "wide": lambda: make_profile(num_layers=1, num_kv_heads=1, head_dim=80, num_exact=2, seed=4),
    "whole vectors": lambda: make_profile(num_layers=1, num_kv_heads=2, head_dim=64, with_classes=True, seed=7),
    "whole vectors, partly rotated": lambda: _partly_rotated(make_profile(num_layers=1, head_dim=48, seed=8), pairs=16),
    "one level": lambda: make_profile(num_levels=1, num_exact=0, seed=5),
    "four levels, one channel": lambda: make_profile(num_kv_heads=1, head_dim=1, num_levels=4, seed=6),
}


def _partly_rotated(profile: Profile, *, pairs: int) -> Profile:
    return dataclasses.replace(profile, inv_freq=profile.inv_freq[:pairs].copy())


def encode(profile: Profile, kv: torch.Tensor, meta: ChunkMeta, **kwargs: int) -> bytes:
    codec = TransformCodec(profile, **kwargs)
    out = bytearray(codec.encoded_bytes(meta))
    return bytes(out[: codec.encode(kv, out=memoryview(out), meta=meta)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", PROFILES)
def test_decoded_kv_is_that_of_the_plain_decoder_to_the_bit(name: str, dtype: str) -> None:
    profile = PROFILES[name]()
    for num_tokens, base_position in ((21, 0), (16, 1000)):
        meta = make_profile_meta(profile, num_tokens=num_tokens, dtype=dtype, base_position=base_position)
        payload = encode(profile, make_profile_kv(profile, meta), meta)
        for level in range(profile.num_levels):
            prefix = truncate(memoryview(payload), level=level)
            decoded = TransformCodec(profile).decode(prefix, meta=meta)
            expected = decode_reference(payload, meta=meta, profile=profile, num_levels=level + 1)
            assert torch.equal(decoded, expected)


@pytest.mark.parametrize("name", PROFILES)
def test_finest_level_is_within_one_bin(name: str) -> None:
    """Along every component: the finest bin is 1, and a dead zone of plain truncation gives at most 1."""
    profile = dataclasses.replace(PROFILES[name](), encoder={})
    meta = make_profile_meta(profile, num_tokens=33, dtype="float32", base_position=7)
    kv = make_profile_kv(profile, meta)
    decoded = TransformCodec(profile).decode(memoryview(encode(profile, kv, meta)), meta=meta)
    size = profile.num_channels
    for layer, pair in enumerate(profile.bands):
        for group, band in enumerate(pair[1]):
            heads = slice(
                group * profile.num_kv_heads // profile.groups, (group + 1) * profile.num_kv_heads // profile.groups
            )
            error_TC = (decoded - kv)[layer, 1, :, heads].reshape(-1, size).double().numpy()
            bins_TR = error_TC @ np.linalg.inv(band.basis_RC * band.scale_C.astype(np.float64) * 2)
            worst = 1.0 if band.class_table is None else float(band.token_scales.max())
            assert np.abs(bins_TR[:, : band.rows_per_level[0]]).max() <= worst + 1e-3


def test_levels_grow_finer_and_longer() -> None:
    profile = make_profile(num_kv_heads=3, head_dim=64)
    meta = make_profile_meta(profile, num_tokens=64, dtype="float32")
    kv = make_profile_kv(profile, meta)
    payload = memoryview(encode(profile, kv, meta))
    prefixes = [truncate(payload, level=level) for level in range(profile.num_levels)]
    errors = [float((TransformCodec(profile).decode(each, meta=meta) - kv).square().mean()) for each in prefixes]
    assert len(prefixes[-1]) == len(payload)
    assert [len(each) for each in prefixes] == sorted({len(each) for each in prefixes})
    assert errors[0] > 2.5 * errors[1] > 5 * errors[2]


def test_coarse_encoding_is_the_prefix_of_a_finer_one_but_for_its_header() -> None:
    profile = make_profile()
    meta = make_profile_meta(profile, num_tokens=40)
    kv = make_profile_kv(profile, meta)
    fine, coarse = encode(profile, kv, meta), encode(profile, kv, meta, level=1)
    parts = [read_header(each, meta=meta, profile=profile) for each in (fine, coarse)]
    stop = parts[0].stop_bytes(level=1)
    assert fine[parts[0].exact_start : stop] == coarse[parts[1].exact_start :]


def test_a_cut_payload_gives_every_layer_what_is_whole_in_it() -> None:
    profile = make_profile(num_layers=3)
    meta = make_profile_meta(profile, num_tokens=20)
    payload = memoryview(encode(profile, make_profile_kv(profile, meta), meta))
    codec, layout = TransformCodec(profile), read_header(payload, meta=meta, profile=profile)
    stop = layout.stop_bytes(level=1, layer=1)
    decoded = codec.decode(payload[:stop], meta=meta)
    by_level = [codec.decode(truncate(payload, level=level), meta=meta) for level in range(2)]
    assert torch.equal(decoded[:2], by_level[1][:2])
    assert torch.equal(decoded[2], by_level[0][2])
    assert torch.equal(codec.decode(payload[: stop - 1], meta=meta)[1], by_level[0][1])
    with pytest.raises(DataError, match="coarsest"):
        codec.decode(payload[: layout.stop_bytes(level=0) - 1], meta=meta)


def test_layers_decode_alone_and_in_any_order() -> None:
    profile = make_profile(num_layers=4)
    meta = make_profile_meta(profile, num_tokens=18)
    payload = bytearray(encode(profile, make_profile_kv(profile, meta), meta))
    codec = TransformCodec(profile)
    whole = codec.decode(memoryview(payload), meta=meta)
    layout = read_header(payload, meta=meta, profile=profile)
    # Damage in another layer is not even seen.
    payload[int(layout.start_VL2G[0, 0, 0, 0]) + 5] ^= 255
    out = torch.empty(2, *meta.shape[1:], dtype=torch.bfloat16)
    codec.decode_layers(memoryview(payload), meta=meta, layers=range(2, 4), out=out)
    assert torch.equal(out, whole[2:])
    with pytest.raises(CodecDataError, match="layer 0, K, level 0"):
        codec.decode(memoryview(payload), meta=meta)


def test_decoding_to_another_position_is_decoding_from_there() -> None:
    """The chunk holds no position: K at 5000 is the same as if the chunk had been there."""
    profile = make_profile(num_exact=0)
    here = make_profile_meta(profile, num_tokens=12, base_position=3)
    there = make_profile_meta(profile, num_tokens=12, base_position=5000)
    payload = memoryview(encode(profile, make_profile_kv(profile, here), here))
    codec, out = TransformCodec(profile), torch.empty(here.shape, dtype=torch.bfloat16)
    codec.decode_layers(payload, meta=here, layers=range(2), out=out, position=5000)
    assert torch.equal(out, codec.decode(payload, meta=there))
    assert not torch.equal(out[:, 0], codec.decode(payload, meta=here)[:, 0])


def test_exact_tokens_are_exact_and_can_move() -> None:
    profile = make_profile(num_exact=2)
    meta = make_profile_meta(profile, num_tokens=9, dtype="float32")
    kv = make_profile_kv(profile, meta)
    kv[:, :, :2] *= 1000
    payload = memoryview(encode(profile, kv, meta))
    codec, out = TransformCodec(profile), torch.empty(meta.shape)
    assert torch.equal(codec.decode(payload, meta=meta)[:, :, :2], kv[:, :, :2])
    codec.decode_layers(payload, meta=meta, layers=range(2), out=out, position=77)
    assert torch.equal(out[:, 1, :2], kv[:, 1, :2])
    unmoved = codec.decode(payload, meta=meta)[:, 0]
    assert torch.allclose(out[:, 0].norm(dim=-1), unmoved.norm(dim=-1), rtol=1e-4)
    assert not torch.allclose(out[:, 0, :2], kv[:, 0, :2], rtol=1e-2)


def test_only_position_zero_has_exact_tokens() -> None:
    profile = make_profile(num_exact=1)
    for base_position, num_exact in ((0, 1), (1, 0)):
        meta = make_profile_meta(profile, num_tokens=5, base_position=base_position)
        payload = encode(profile, make_profile_kv(profile, meta), meta)
        assert read_header(payload, meta=meta, profile=profile).num_exact == num_exact


def test_a_chunk_of_exact_tokens_only() -> None:
    profile = make_profile(num_exact=4)
    meta = make_profile_meta(profile, num_tokens=3)
    kv = make_profile_kv(profile, meta)
    assert torch.equal(TransformCodec(profile).decode(memoryview(encode(profile, kv, meta)), meta=meta), kv)


def test_outliers_go_through_as_escapes() -> None:
    """Values far beyond every table, and beyond 8-bit midpoints, come back as near as others."""
    profile = make_profile(num_exact=0, num_kv_heads=1, head_dim=16)
    meta = make_profile_meta(profile, num_tokens=20, dtype="float32", base_position=9)
    kv = make_profile_kv(profile, meta)
    band = profile.bands[1][1][0]
    kv[1, 1, 7, 0] += torch.from_numpy(band.basis_RC[0].astype(np.float32) * band.scale_C * 2 * 4000.0)
    payload = encode(profile, kv, meta)
    decoded = TransformCodec(profile).decode(memoryview(payload), meta=meta)
    error = float((decoded[1, 1, 7] - kv[1, 1, 7]).abs().max())
    others = float((decoded[1, 1] - kv[1, 1])[torch.arange(20) != 7].abs().max())
    assert kv[1, 1, 7].abs().max() > 100
    assert error < 2 * others
    assert torch.equal(decoded, decode_reference(payload, meta=meta, profile=profile, num_levels=3))


def test_classes_follow_expected_attention() -> None:
    """Tokens that will hardly be looked at get a coarser bin; without the encoder's arrays all are of class 0."""
    with_classes = _with_classes()
    profile = dataclasses.replace(with_classes, encoder={})
    meta = _meta_of(with_classes, num_tokens=64)
    kv = make_profile_kv(with_classes, meta)
    payload = encode(with_classes, kv, meta)
    decoded = TransformCodec(with_classes).decode(memoryview(payload), meta=meta)
    assert torch.equal(decoded, decode_reference(payload, meta=meta, profile=with_classes, num_levels=3))
    plain_meta = _meta_of(profile, num_tokens=64)
    plain = encode(profile, kv, plain_meta)
    error = (decoded - kv)[0, 1].square().mean(dim=(1, 2))
    plain_error = (
        (TransformCodec(profile).decode(memoryview(plain), meta=plain_meta) - kv)[0, 1].square().mean(dim=(1, 2))
    )
    coarser = error > 1.5 * plain_error
    assert len(payload) < len(plain)
    assert 8 < int(coarser.sum()) < 64


def _with_classes() -> Profile:
    mean = np.zeros((1, 1, 16), np.float32)
    mean[0, 0, 0] = 5.0
    bounds = np.broadcast_to(np.linspace(0.0, -6.0, 7), (1, 2, 1, 7)).astype(np.float32)
    encoder = {"attention_mean": mean, "attention_factor": np.zeros((1, 1, 16, 1), np.float32), "class_bounds": bounds}
    profile = make_profile(num_layers=1, num_kv_heads=1, head_dim=16, num_exact=0, with_classes=True)
    return dataclasses.replace(profile, encoder=encoder)


def _meta_of(profile: Profile, *, num_tokens: int) -> ChunkMeta:
    return make_profile_meta(profile, num_tokens=num_tokens, dtype="float32", base_position=3)


def test_rounding_and_dead_zone_of_the_profile() -> None:
    profile = make_profile(num_exact=0)
    meta = make_profile_meta(profile, num_tokens=50, dtype="float32", base_position=1)
    kv = make_profile_kv(profile, meta)
    sizes = {}
    for name, values in {"none": {}, "rounding": {"rounding": 0.5}, "dead": {"dead_zone": 1.7}}.items():
        encoder = {key: np.full((2, 2, 1), value, np.float32) for key, value in values.items()}
        changed = dataclasses.replace(profile, encoder=encoder)
        sizes[name] = len(
            encode(changed, kv, make_profile_meta(changed, num_tokens=50, dtype="float32", base_position=1))
        )
    assert sizes["dead"] < sizes["none"] < sizes["rounding"]


def test_any_strides_in_and_out() -> None:
    profile = make_profile(num_kv_heads=4, head_dim=6, groups=2)
    meta = make_profile_meta(profile, num_tokens=10, base_position=4)
    kv = make_profile_kv(profile, meta)
    payload = encode(profile, kv, meta)
    assert encode(profile, kv.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0), meta) == payload
    codec, expected = TransformCodec(profile), TransformCodec(profile).decode(memoryview(payload), meta=meta)
    # K and V of a token side by side, heads outermost: as an engine's page has them.
    page = torch.zeros(2, 4, 10, 2, 6, dtype=torch.bfloat16)
    codec.decode_layers(memoryview(payload), meta=meta, layers=range(2), out=page.permute(0, 3, 2, 1, 4))
    assert torch.equal(page.permute(0, 3, 2, 1, 4), expected)
    turned = torch.zeros(6, 4, 10, 2, 2, dtype=torch.bfloat16).permute(4, 3, 2, 1, 0)
    codec.decode_layers(memoryview(payload), meta=meta, layers=range(2), out=turned)
    assert torch.equal(turned, expected)


def test_encoding_leaves_the_kv_alone() -> None:
    profile = make_profile()
    meta = make_profile_meta(profile, num_tokens=10, dtype="float32", base_position=4)
    kv = make_profile_kv(profile, meta)
    before = kv.clone()
    encode(profile, kv, meta)
    assert torch.equal(kv, before)


def test_threads_change_nothing() -> None:
    profile = make_profile(num_layers=5)
    meta = make_profile_meta(profile, num_tokens=30)
    kv = make_profile_kv(profile, meta)
    payload = encode(profile, kv, meta)
    assert encode(profile, kv, meta, num_threads=3) == payload
    threaded = TransformCodec(profile, num_threads=3).decode(memoryview(payload), meta=meta)
    assert torch.equal(threaded, TransformCodec(profile).decode(memoryview(payload), meta=meta))


def test_a_failed_decode_returns_when_no_thread_writes_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reserved `out` gives it back when `decode_layers` raises."""
    profile = make_profile(num_layers=3)
    meta = make_profile_meta(profile, num_tokens=10)
    payload = memoryview(encode(profile, make_profile_kv(profile, meta), meta))
    began, returned, finished = threading.Event(), threading.Event(), list[int]()

    def decode(_chunk: OpenTransformChunk, layer: int, **_options: object) -> None:
        if layer == 0:
            assert began.wait(10)
            raise CodecDataError("layer 0 is damaged")
        began.set()
        returned.wait(0.2)
        finished.append(layer)

    monkeypatch.setattr(OpenTransformChunk, "decode", decode)
    out = torch.empty(meta.shape, dtype=torch.bfloat16)
    with pytest.raises(CodecDataError, match="damaged"):
        TransformCodec(profile, num_threads=2).decode_layers(payload, meta=meta, layers=range(3), out=out)
    done = list(finished)
    returned.set()
    assert 1 in done
    assert not [thread for thread in threading.enumerate() if "learnonce-codec" in thread.name]


@pytest.mark.parametrize(
    "place", [(transform_plan, "_build"), (transform_encode, "_build"), (importance, "_diagonals")]
)
def test_threads_that_encode_first_prepare_once(place: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Inverting every band takes seconds for a large model."""
    module, name = place
    profile, calls, busy, together = _with_classes(), list[Any](), threading.Event(), threading.Barrier(4)
    meta, real = _meta_of(profile, num_tokens=20), getattr(module, name)
    kv = make_profile_kv(profile, meta)

    @functools.wraps(real)
    def slow(of: Any) -> Any:
        calls.append(of)
        busy.wait(0.1)  # The others arrive meanwhile; nobody sets it.
        return real(of)

    monkeypatch.setattr(module, name, slow)

    def work(_: int) -> bytes:
        together.wait()
        return encode(profile, kv, meta)

    with ThreadPoolExecutor(4) as threads:
        payloads = set(threads.map(work, range(4)))
    assert len(calls) == 1
    assert len(payloads) == 1


def test_kv_that_cannot_be_coded_is_refused() -> None:
    profile = make_profile()
    meta = make_profile_meta(profile, num_tokens=6)
    kv = make_profile_kv(profile, meta)
    assert profile.num_exact == 1
    for token, value in itertools.product((0, 3), (float("nan"), float("inf"), float("-inf"))):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            bad = kv.to(dtype)
            bad[1, 0, token, 1, 2] = value
            with pytest.raises(CodecDataError, match="not finite"):
                encode(profile, bad, msgspec.structs.replace(meta, dtype=str(dtype).removeprefix("torch.")))
    with pytest.raises(CodecDataError):
        encode(profile, kv.float(), meta)
    with pytest.raises(CodecDataError):
        encode(profile, kv[:, :, :5], meta)
    for room in (0, 10, 100, 600):
        with pytest.raises(CodecDataError):
            TransformCodec(profile).encode(kv, out=memoryview(bytearray(room)), meta=meta)


def test_settings_that_make_no_sense_are_refused() -> None:
    for kwargs in ({"level": 3}, {"level": -1}, {"num_threads": 0}):
        with pytest.raises(CallerError):
            TransformCodec(make_profile(), **kwargs)
    profile = make_profile()
    meta = make_profile_meta(profile, num_tokens=6)
    for level in (-1, 3):
        with pytest.raises(CallerError, match="levels 0 to 2"):
            TransformCodec(profile).encode(
                make_profile_kv(profile, meta), out=memoryview(bytearray(9999)), meta=meta, level=level
            )


def test_a_chunk_finds_its_codec_by_its_profile() -> None:
    profile = make_profile()
    meta = make_profile_meta(profile, num_tokens=6)
    payload = memoryview(encode(profile, make_profile_kv(profile, meta), meta))
    assert codec_for(meta, {profile.id: profile}).decode(payload, meta=meta).shape == meta.shape
    with pytest.raises(ProfileMissingError):
        codec_for(meta, {})
    other = make_profile(seed=9)
    with pytest.raises(CodecDataError, match="profile"):
        TransformCodec(other).decode(payload, meta=meta)
    with pytest.raises(CodecDataError, match="profile"):
        TransformCodec(other).decode(payload, meta=make_profile_meta(other, num_tokens=6))


def test_an_open_chunk_says_what_each_layer_needs() -> None:
    profile = make_profile(num_layers=3)
    meta = make_profile_meta(profile, num_tokens=20)
    payload = bytes(encode(profile, make_profile_kv(profile, meta), meta))
    codec = TransformCodec(profile)
    arriving = bytearray(len(payload))
    head = codec.head_bytes(memoryview(payload[:40]), meta=meta)
    arriving[:head] = payload[:head]
    chunk = codec.open(memoryview(arriving), meta=meta)
    whole = codec.decode(truncate(memoryview(payload), level=1), meta=meta)
    out = torch.empty(meta.shape[1:], dtype=torch.bfloat16)
    with pytest.raises(CodecDataError):
        chunk.decode(1, level=1, out_2TNH=out)
    stop = chunk.stop_bytes(level=1, layer=1)
    arriving[:stop] = payload[:stop]
    chunk.decode(1, level=1, out_2TNH=out)
    assert torch.equal(out, whole[1])
    with pytest.raises(CodecDataError):
        chunk.decode(2, level=1, out_2TNH=out)
    assert chunk.num_levels == 3
    assert chunk.stop_bytes(level=2, layer=2) == len(payload)


def test_mended_damage_never_passes_for_the_original() -> None:
    """With right checksums, the coder's own end condition finds almost every changed word."""
    profile = make_profile(num_layers=1, num_kv_heads=1, head_dim=16, num_exact=0)
    meta = make_profile_meta(profile, num_tokens=40, base_position=2)
    payload = encode(profile, make_profile_kv(profile, meta), meta)
    layout, found = read_header(payload, meta=meta, profile=profile), 0
    for at in range(layout.exact_stop, len(payload), 7):
        damaged = bytearray(payload)
        damaged[at] ^= 1 << at % 8
        mend(damaged)
        try:
            TransformCodec(profile).decode(memoryview(damaged), meta=meta)
        except CodecDataError:
            found += 1
    assert found > 0.9 * len(range(layout.exact_stop, len(payload), 7))
