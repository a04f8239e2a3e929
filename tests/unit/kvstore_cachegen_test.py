"""The CacheGen baseline: what makes it the paper's scheme, and its profile's file.

Covers: anchors, differences, bins by depth, tables, escapes, levels, exact tokens, calibration, hostile profiles.
Does not cover: the promises of every codec (`kvstore_codecs_test`).
"""

import dataclasses
import random

import numpy as np
import pytest
import torch

from cluster.errors import DataError
from kvstore.codecs.cachegen import CachegenCodec
from kvstore.codecs.cachegen_calibrate import BINS, CalibrationError, calibrate_cachegen
from kvstore.codecs.cachegen_profile import ESCAPE, CachegenProfile, CachegenProfileError, is_cachegen_profile
from kvstore.codecs.profile import FREQUENCY_SUM
from kvstore.testing.codec_contract import make_meta

SHAPE = (6, 2, 8)
"""Layers, heads, head dimension."""


def walk(num_tokens: int, *, seed: int, shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    """KV whose neighbours are alike, every channel with a spread of its own."""
    layers, heads, dim = shape
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((layers, 2, num_tokens + 20, heads, dim), generator=generator)
    smooth = torch.cumsum(noise, 2)
    scales = torch.logspace(-1, 1, heads * dim).view(heads, dim)
    level = 3 * torch.randn((layers, 2, 1, heads, dim), generator=torch.Generator().manual_seed(5))
    return ((level + 0.2 * (smooth[:, :, 20:] - smooth[:, :, :-20])) * scales).to(torch.bfloat16)


@pytest.fixture(scope="module")
def profile() -> CachegenProfile:
    return calibrate_cachegen([walk(600, seed=1), walk(500, seed=2)], model="walks", notes={"text": "none"})


def coded(codec: CachegenCodec, kv: torch.Tensor, *, base_position: int = 0) -> tuple[int, torch.Tensor]:
    """Bytes, and what comes back."""
    layers, _, tokens, heads, dim = kv.shape
    meta = make_meta((layers, tokens, heads, dim), base_position=base_position, codec="cachegen")
    out = memoryview(bytearray(codec.encoded_bytes(meta)))
    num_bytes = codec.encode(kv, meta=meta, out=out)
    return num_bytes, codec.decode(out[:num_bytes], meta=meta)


def test_bins_grow_with_depth_as_in_the_paper(profile: CachegenProfile) -> None:
    """In units of what differences to a group's first token measure, here counted anew."""
    chunks = [walk(600, seed=1), walk(500, seed=2)]
    for layer in range(SHAPE[0]):
        differences = []
        for values in (chunk[layer, 1, 8:].float() for chunk in chunks):
            groups = [values[first : first + 10] for first in range(0, len(values), 10)]
            differences += [(group[1:] - group[0]).flatten() for group in groups]
        spread = torch.cat(differences).square().mean().sqrt().item()
        expected = BINS[layer // 2] * spread
        assert profile.bins_VL2[profile.default_level, layer, 1] == pytest.approx(expected, rel=0.01)


def test_anchors_are_eight_bits_and_others_a_bin(profile: CachegenProfile) -> None:
    kv = walk(95, seed=3)
    _, decoded = coded(CachegenCodec(profile), kv, base_position=100)
    error = (decoded.float() - kv.float()).abs()
    is_anchor = torch.arange(95) % 10 == 0
    largest = kv.float().abs().amax(-1, keepdim=True)
    rounding = largest * 2**-8
    assert (error <= largest / 127 * 0.51 + rounding)[:, :, is_anchor].all()
    bins = torch.from_numpy(profile.bins_VL2[profile.default_level])[:, :, None, None, None]
    assert (error <= bins / 2 + rounding)[:, :, ~is_anchor].all()
    assert error[:, :, ~is_anchor].mean() > 3 * error[:, :, is_anchor].mean()


def test_groups_do_not_lean_on_each_other(profile: CachegenProfile) -> None:
    """Damage to one group's tokens changes no other group: the paper's reason for anchors."""
    kv = walk(60, seed=4)
    other = kv.clone()
    other[:, :, 20:30] = 0
    same = torch.ones(60, dtype=torch.bool)
    same[20:30] = False
    one, two = (coded(CachegenCodec(profile), chunk)[1] for chunk in (kv, other))
    assert torch.equal(one[:, :, same], two[:, :, same])


def test_levels_trade_bytes_for_error(profile: CachegenProfile) -> None:
    kv = walk(300, seed=5)
    sizes, errors = [], []
    for level in range(profile.num_levels):
        size, decoded = coded(CachegenCodec(profile, level=level), kv)
        sizes.append(size)
        errors.append((decoded.float() - kv.float()).square().mean().item())
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert profile.bins_VL2[profile.default_level, 0, 0] == pytest.approx(profile.bins_VL2[0, 0, 0] / 1.5, rel=1e-3)


def test_readers_need_not_know_the_level(profile: CachegenProfile) -> None:
    kv = walk(40, seed=6)
    meta = make_meta((SHAPE[0], 40, *SHAPE[1:]), codec="cachegen")
    writer, reader = CachegenCodec(profile, level=0), CachegenCodec(profile, level=3)
    out = memoryview(bytearray(writer.encoded_bytes(meta)))
    payload = out[: writer.encode(kv, meta=meta, out=out)]
    assert torch.equal(reader.decode(payload, meta=meta), writer.decode(payload, meta=meta))


def test_tables_of_channels_beat_one_table(profile: CachegenProfile) -> None:
    """The paper's reason for a table per layer and channel; channels here differ a hundredfold."""
    tables = profile.tables_VL2CS.copy()
    shared = np.mean(tables, axis=(2, 3, 4), dtype=np.float64, keepdims=True)
    tables[:] = np.floor(shared)
    tables[..., 128] += (FREQUENCY_SUM - tables.sum(axis=-1, dtype=np.int64)).astype(np.uint16)
    one = dataclasses.replace(profile, tables_VL2CS=tables)
    kv = walk(300, seed=7)
    assert coded(CachegenCodec(profile), kv)[0] < 0.85 * coded(CachegenCodec(one), kv)[0]


def test_values_beyond_every_table_are_kept(profile: CachegenProfile) -> None:
    kv = walk(50, seed=8)
    kv[2, 1, 13, 1, 5], kv[0, 0, 37, 0, 0] = 30000.0, -1e30
    decoded = coded(CachegenCodec(profile), kv)[1]
    assert decoded[2, 1, 13, 1, 5] == kv[2, 1, 13, 1, 5]
    assert decoded[0, 0, 37, 0, 0] == kv[0, 0, 37, 0, 0]


def test_other_text_costs_little_more_than_the_calibrations_own(profile: CachegenProfile) -> None:
    sizes = [coded(CachegenCodec(profile), walk(500, seed=seed))[0] for seed in (2, 20)]
    assert sizes[1] < 1.05 * sizes[0]


def test_other_models_are_refused(profile: CachegenProfile) -> None:
    codec = CachegenCodec(profile)
    with pytest.raises(DataError, match="profile is for"):
        coded(codec, walk(20, seed=0, shape=(6, 2, 4)))
    with pytest.raises(DataError, match="level 9"):
        CachegenCodec(profile, level=9)


@pytest.mark.parametrize(
    ("chunks", "factors"),
    [
        ([], (1.0,)),
        ([walk(18, seed=0)], (1.0,)),
        ([walk(40, seed=0), walk(40, seed=0, shape=(5, 2, 8))], (1.0,)),
        ([walk(40, seed=0)], (0.5, 1.0)),
        ([walk(40, seed=0)], (2.0, 0.5)),
        ([torch.full((1, 2, 40, 1, 2), float("nan"))], (1.0,)),
    ],
)
def test_calibration_says_what_it_lacks(chunks: list[torch.Tensor], factors: tuple[float, ...]) -> None:
    with pytest.raises(CalibrationError):
        calibrate_cachegen(chunks, model="none", factors=factors)


def test_profiles_return_and_name_themselves(profile: CachegenProfile) -> None:
    data = profile.to_bytes()
    assert is_cachegen_profile(data)
    again = CachegenProfile.from_bytes(memoryview(data))
    assert (again.id, again.notes, again.model) == (profile.id, profile.notes, "walks")
    assert again.notes["text"] == "none"
    assert np.array_equal(again.tables_VL2CS, profile.tables_VL2CS)
    assert np.array_equal(again.anchor_tables_L2CS, profile.anchor_tables_L2CS)
    assert np.array_equal(again.bins_VL2, profile.bins_VL2)
    assert dataclasses.replace(profile, num_exact=1).id != profile.id


def test_hostile_profiles_are_refused() -> None:
    small = calibrate_cachegen([walk(60, seed=1, shape=(1, 1, 4))], model="w", factors=(1.0,)).to_bytes()
    numbers = random.Random(11)
    refused = 0
    for _ in range(400):
        damaged = bytearray(small)
        for _ in range(numbers.randint(1, 3)):
            damaged[int(len(damaged) * numbers.random() ** 2)] = numbers.randrange(256)
        length = numbers.choice((len(damaged), numbers.randrange(len(damaged))))
        try:
            CachegenProfile.from_bytes(bytes(damaged[:length]))
        except DataError:
            refused += 1
    assert refused > 200


def test_profiles_must_fit_together(profile: CachegenProfile) -> None:
    escapeless = profile.anchor_tables_L2CS.copy()
    escapeless[0, 0, 0, 128] += escapeless[0, 0, 0, ESCAPE]
    escapeless[0, 0, 0, ESCAPE] = 0
    for wrong in (
        {"num_layers": 5},
        {"head_dim": 4},
        {"group_tokens": 1},
        {"num_exact": 65},
        {"default_level": 5},
        {"bins_VL2": -profile.bins_VL2},
        {"anchor_tables_L2CS": escapeless},
        {"tables_VL2CS": profile.tables_VL2CS // 2},
    ):
        with pytest.raises(CachegenProfileError):
            dataclasses.replace(profile, **wrong)  # type: ignore[arg-type]
