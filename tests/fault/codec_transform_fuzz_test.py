"""Damaged and hostile payloads of the `transform` codec: `DataError`, or KV of the right shape; nothing else.

Covers: flipped, cut, spliced and lengthened payloads, with and without checksums that were made right again, so that
damage reaches every stage; hostile headers and metadata; memory.
Does not cover: profiles (`tests/unit/codec_profile_test.py`).
"""

import random
import struct
import tracemalloc

import msgspec
import pytest
import torch

from cluster.errors import DataError
from kvstore.codecs.profile import Profile
from kvstore.codecs.raw import CodecDataError
from kvstore.codecs.stream import truncate
from kvstore.codecs.transform import TransformCodec
from kvstore.interfaces import ChunkMeta
from kvstore.testing.profiles import make_profile, make_profile_kv, make_profile_meta
from kvstore.testing.transform_reference import PayloadParts, mend

FIXED_BYTES = 32


def sample(*, num_tokens: int = 5, num_layers: int = 1) -> tuple[Profile, ChunkMeta, bytes]:
    """A small chunk with everything: classes, escapes, exact tokens, three levels."""
    profile = make_profile(num_layers=num_layers, num_kv_heads=1, head_dim=6, with_classes=True)
    meta = make_profile_meta(profile, num_tokens=num_tokens)
    kv = make_profile_kv(profile, meta)
    kv[0, 1, -1, 0, 0] = 300.0
    codec = TransformCodec(profile)
    out = bytearray(codec.encoded_bytes(meta) + 4096)
    return profile, meta, bytes(out[: codec.encode(kv, out=memoryview(out), meta=meta)])


def mutated(payload: bytes, seeded: random.Random) -> bytearray:
    """One kind of damage; in two of three cases with right checksums."""
    damaged = bytearray(payload)
    kind = seeded.randrange(6)
    if kind <= 2:
        for _ in range(seeded.choice((1, 1, 2, 5, 30))):
            damaged[seeded.randrange(len(damaged))] = seeded.choice((0, 255, seeded.randrange(256)))
    elif kind == 3:
        del damaged[seeded.randrange(len(damaged)) :]
    elif kind == 4:
        at, size = seeded.randrange(len(damaged)), seeded.randrange(1, 40)
        damaged[at : at + size] = seeded.randbytes(seeded.randrange(40))
    else:
        # A section's length changes, so that its neighbours' bytes become its own.
        count = len(PayloadParts(payload).sections)
        at = FIXED_BYTES + 8 * seeded.randrange(count)
        length = struct.unpack_from("<I", damaged, at)[0]
        new = seeded.choice((0, length - 2, length + 2, length + 1, 67, 68, 1 << 31, 0xFFFFFFFF, seeded.randrange(400)))
        struct.pack_into("<I", damaged, at, max(0, new))
    if seeded.random() < 0.67 and len(damaged) > FIXED_BYTES:
        try:
            mend(damaged)
        except (struct.error, MemoryError, OverflowError):
            return damaged
    return damaged


def mend_is_bounded(payload: bytearray) -> bool:
    """Whether the header's counts are small enough to walk the table in a test."""
    if len(payload) < FIXED_BYTES:
        return False
    groups, _, _, layers = struct.unpack_from("<HHII", payload, 8)
    return payload[6] * groups * layers * 8 <= len(payload)


def run(num_mutations: int, *, seed: int) -> dict[str, int]:
    """Decode so many mutations; counts of outcomes."""
    profile, meta, payload = sample()
    codec, seeded = TransformCodec(profile), random.Random(seed)
    good = codec.decode(memoryview(payload), meta=meta)
    outcomes = {"refused": 0, "decoded": 0, "unchanged": 0}
    for _ in range(num_mutations):
        damaged = mutated(payload, seeded)
        try:
            decoded = codec.decode(memoryview(damaged), meta=meta)
        except DataError:
            outcomes["refused"] += 1
            continue
        assert decoded.shape == good.shape
        assert decoded.dtype == good.dtype
        outcomes["unchanged" if torch.equal(decoded, good) else "decoded"] += 1
    return outcomes


def test_mutated_payloads() -> None:
    outcomes = run(4000, seed=0)
    # The mutations must reach all ends, or they test nothing.
    assert min(outcomes.values()) > 20, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_a_million_mutated_payloads(seed: int) -> None:
    """In ten parts of a hundred thousand."""
    outcomes = run(100_000, seed=seed)
    assert sum(outcomes.values()) == 100_000
    assert min(outcomes.values()) > 500, outcomes


def test_unmended_damage_is_always_found() -> None:
    """Behind the header's checksum and the sections' own, no flipped bit passes."""
    profile, meta, payload = sample()
    codec = TransformCodec(profile)
    for at in range(len(payload)):
        damaged = bytearray(payload)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(CodecDataError):
            codec.decode(memoryview(damaged), meta=meta)


def test_every_cut_within_the_coarsest_level_is_refused() -> None:
    profile, meta, payload = sample()
    codec = TransformCodec(profile)
    first = len(truncate(memoryview(payload), level=0))
    for length in range(len(payload)):
        if length >= first:
            assert codec.decode(memoryview(payload[:length]), meta=meta).shape == meta.shape
        else:
            with pytest.raises(CodecDataError):
                codec.decode(memoryview(payload[:length]), meta=meta)


def test_random_bytes() -> None:
    profile, meta, payload = sample()
    codec = TransformCodec(profile)
    for seed in range(500):
        noise = bytearray(random.Random(seed).randbytes(len(payload)))
        if seed % 2:
            # A right header before noise.
            head = FIXED_BYTES + 8 * len(PayloadParts(payload).sections) + 8
            noise[:head] = payload[:head]
            mend(noise)
        try:
            assert codec.decode(memoryview(noise), meta=meta).shape == meta.shape
        except DataError:
            continue


@pytest.mark.parametrize(
    "fields",
    [
        {"num_tokens": 0}, {"num_tokens": -1}, {"num_tokens": 6}, {"num_tokens": 2**62}, {"num_layers": 0},
        {"num_layers": 2}, {"num_layers": 2**40}, {"num_kv_heads": -3}, {"num_kv_heads": 6, "head_dim": 1},
        {"head_dim": 2**40}, {"dtype": "float8"}, {"dtype": "float32"}, {"base_position": 1}, {"base_position": -1},
        {"base_position": 2**62}, {"profile": "0" * 64},
    ],
    ids=str,
)  # fmt: skip
def test_metadata_that_does_not_fit(fields: dict[str, int]) -> None:
    profile, meta, payload = sample()
    with pytest.raises(DataError):
        TransformCodec(profile).decode(memoryview(payload), meta=msgspec.structs.replace(meta, **fields))


def test_hostile_counts_reserve_no_memory() -> None:
    """A header of few bytes that says it has billions of sections or tokens."""
    profile, meta, payload = sample()
    codec = TransformCodec(profile)
    tracemalloc.start()
    for offset, layout in ((8, "<H"), (10, "<H"), (12, "<I"), (16, "<I"), (20, "<I")):
        damaged = bytearray(payload)
        struct.pack_into(layout, damaged, offset, 0xFFFF if layout == "<H" else 0xFFFFFFFF)
        if mend_is_bounded(damaged):
            mend(damaged, sections=False)
        with pytest.raises(CodecDataError):
            codec.decode(memoryview(damaged), meta=meta)
        with pytest.raises(CodecDataError):
            truncate(memoryview(damaged), level=3)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_escapes_that_point_anywhere() -> None:
    """Counts and places of escapes, with right checksums."""
    profile, meta, payload = sample()
    codec, at = TransformCodec(profile), PayloadParts(payload).starts[1]
    (count,) = struct.unpack_from("<I", payload, at)
    assert count
    for new in (count + 1, 1 << 31, 0xFFFFFFFF, 0x2AAAAAAB):
        damaged = bytearray(payload)
        struct.pack_into("<I", damaged, at, new)
        mend(damaged)
        with pytest.raises(CodecDataError):
            codec.decode(memoryview(damaged), meta=meta)
    for index, value in ((64, 1), (0xFFFFFFFF, 1), (0, 0x7FFF), (0, -0x8000)):
        damaged = bytearray(payload)
        struct.pack_into("<Ih", damaged, at + 4, index, value)
        mend(damaged)
        with pytest.raises(CodecDataError, match="escape"):
            codec.decode(memoryview(damaged), meta=meta)


def test_an_escape_stands_once_and_in_its_order() -> None:
    """Twice the same place would be decoded as whoever decodes likes it."""
    profile, meta, payload = sample()
    codec, at = TransformCodec(profile), PayloadParts(payload).starts[1]
    count, first, _, second, _ = struct.unpack_from("<IIhIh", payload, at)
    assert count >= 2
    for indices in ((first, first), (second, first), (second, second)):
        damaged = bytearray(payload)
        for escape, index in enumerate(indices):
            struct.pack_into("<I", damaged, at + 4 + 6 * escape, index)
        mend(damaged)
        with pytest.raises(CodecDataError, match="order"):
            codec.decode(memoryview(damaged), meta=meta)
