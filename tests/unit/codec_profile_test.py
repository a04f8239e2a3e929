"""Profiles: the file, its id, what is refused.

Covers: round trips, content address, validation of numbers, damaged and hostile files, what is derived.
Does not cover: how profiles are made, what codecs do with them.
"""

import dataclasses
import random
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import pytest

from kvstore.codecs.profile import Band, Profile, ProfileDataError, derived
from kvstore.testing.profiles import make_profile


def with_band(profile: Profile, **fields: Any) -> Profile:
    """The profile with one band changed."""
    band = dataclasses.replace(profile.bands[0][0][0], **fields)
    return dataclasses.replace(profile, bands=(((band,), profile.bands[0][1]), *profile.bands[1:]))


def test_round_trip_keeps_everything() -> None:
    profile = dataclasses.replace(
        make_profile(with_classes=True, groups=2),
        encoder={"rounding": np.ones((2, 2, 2), np.float32)},
        notes={"b": "c"},
    )
    again = Profile.from_bytes(profile.to_bytes())
    assert again.id == profile.id
    assert again.to_bytes() == profile.to_bytes()
    assert again.notes == {"b": "c"}
    assert (again.encoder["rounding"] == 1).all()
    for field in dataclasses.fields(Profile):
        if field.name not in ("bands", "encoder", "inv_freq", "frequencies_KS"):
            assert getattr(again, field.name) == getattr(profile, field.name)
    for layer, pair in enumerate(profile.bands):
        for kv, groups in enumerate(pair):
            for group, band in enumerate(groups):
                for field in dataclasses.fields(Band):
                    seen = getattr(again.bands[layer][kv][group], field.name)
                    assert np.array_equal(seen, getattr(band, field.name))


def test_written_again_it_is_the_same_file() -> None:
    """`replace` drops what was kept: this is written anew."""
    profile = Profile.from_bytes(make_profile().to_bytes())
    assert dataclasses.replace(profile).to_bytes() == make_profile().to_bytes()


def test_id_is_that_of_the_content() -> None:
    profile = make_profile()
    assert len(profile.id) == 64
    assert profile.id == make_profile().id
    others = [make_profile(seed=1), dataclasses.replace(profile, notes={}), dataclasses.replace(profile, model="m")]
    assert len({profile.id, *(other.id for other in others)}) == 4


def test_read_arrays_cannot_be_changed() -> None:
    profile = Profile.from_bytes(make_profile().to_bytes())
    with pytest.raises(ValueError, match="read-only"):
        profile.bands[0][0][0].basis_RC[0, 0] = 1


def changed(array: np.ndarray[Any, Any], index: Any, value: Any) -> np.ndarray[Any, Any]:
    copy = array.copy()
    copy[index] = value
    return copy


BAND = make_profile().bands[0][0][0]
BANDS: dict[str, dict[str, Any]] = {
    "bias of another length": {"bias_C": BAND.bias_C[:-1]},
    "bias of another dtype": {"bias_C": BAND.bias_C.astype(np.float64)},
    "bias not finite": {"bias_C": changed(BAND.bias_C, 0, np.nan)},
    "basis -128": {"basis_RC": changed(BAND.basis_RC, (0, 0), -128)},
    "basis flat": {"basis_RC": BAND.basis_RC.ravel()},
    "scale 0": {"scale_C": changed(BAND.scale_C, 0, 0.0)},
    "scale infinite": {"scale_C": changed(BAND.scale_C, 0, np.inf)},
    "rows fall": {"rows_per_level": (16, 15, 16)},
    "rows above R": {"rows_per_level": (1, 2, 17)},
    "rows below 0": {"rows_per_level": (-1, 2, 3)},
    "levels missing": {"rows_per_level": (1, 2)},
    "table id": {"table_ids_VRX": changed(BAND.table_ids_VRX, (0, 0, 0), 15)},
    "refinement without -1": {"table_ids_VRX": changed(BAND.table_ids_VRX, (1, 0, 0), 1)},
    "refinement of many bits": {"table_ids_VRX": changed(BAND.table_ids_VRX, (1, 0, 0), 9)},
    "refinement of many bits, sign known": {"table_ids_VRX": changed(BAND.table_ids_VRX, (2, 0, 2), 9)},
    "refinement that takes a bit away": {"table_ids_VRX": changed(BAND.table_ids_VRX, (2, 0, 1), 0)},
    "token scales": {"token_scales": changed(BAND.token_scales, 1, -1.0)},
    "class 0": {"token_scales": changed(BAND.token_scales, 0, 2.0)},
    "class table": {"class_table": 15},
    "class table without all classes": {"class_table": 0},
}
PROFILES: dict[str, dict[str, Any]] = {
    "no layers": {"num_layers": 0},
    "other layers": {"num_layers": 3},
    "groups that do not divide": {"groups": 3},
    "too many levels": {"num_levels": 5},
    "exact tokens": {"num_exact": -1},
    "frequencies": {"frequencies_KS": changed(make_profile().frequencies_KS, (0, 0), 1)},
    "even symbols": {"frequencies_KS": np.full((1, 4), 1024, np.uint16)},
    "rotary too long": {"inv_freq": np.ones(5, np.float32)},
    "encoder's dtype": {"encoder": {"a": np.ones(3, np.complex64)}},
    "no bands": {"bands": ()},
    "endless notes": {"notes": {"a": "b" * (1 << 17)}},
    "huge dimension": {"head_dim": 4096},
}


@pytest.mark.parametrize("name", BANDS)
def test_bands_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(ProfileDataError):
        with_band(make_profile(), **BANDS[name])


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(ProfileDataError):
        dataclasses.replace(make_profile(), **PROFILES[name])


def test_cut_files_are_refused() -> None:
    data = make_profile().to_bytes()
    for length in {0, 1, 15, 16, 100, len(data) // 2, len(data) - 64}:
        with pytest.raises(ProfileDataError):
            Profile.from_bytes(data[:length])


def test_damaged_files_are_refused_or_have_another_id() -> None:
    """The id is the checksum: whoever asked for a profile by its id compares it."""
    data, seeded = make_profile().to_bytes(), random.Random(0)
    profile_id, refused = make_profile().id, 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(seeded.choice((1, 1, 2, 8))):
            damaged[seeded.randrange(len(data) if seeded.random() < 0.5 else 3000)] = seeded.randrange(256)
        try:
            profile = Profile.from_bytes(bytes(damaged))
        except ProfileDataError:
            refused += 1
        else:
            assert (profile.id == profile_id) == (damaged == data)
    assert refused > 100


def test_an_empty_array_of_an_impossible_shape_is_refused() -> None:
    data = make_profile().to_bytes()
    (length,) = struct.unpack_from("<I", data, 12)
    header = msgspec.msgpack.decode(data[16 : 16 + length])
    header["arrays"]["encoder/none"] = {"dtype": "<f4", "shape": [0, 1 << 31, 1 << 31, 1 << 31], "offset": 0}
    packed = msgspec.msgpack.encode(header)
    with pytest.raises(ProfileDataError, match="shape"):
        Profile.from_bytes(data[:12] + struct.pack("<I", len(packed)) + packed + bytes(len(data)))


def test_files_of_another_version_are_refused() -> None:
    data = bytearray(make_profile().to_bytes())
    struct.pack_into("<H", data, 8, 2)
    with pytest.raises(ProfileDataError, match="version 2"):
        Profile.from_bytes(bytes(data))


def test_what_is_made_of_a_profile_is_made_once_for_all_threads() -> None:
    profile, together, busy, made = make_profile(), threading.Barrier(4), threading.Event(), list[Profile]()

    def make(of: Profile) -> list[Profile]:
        made.append(of)
        busy.wait(0.1)  # The others arrive meanwhile; nobody sets it.
        return made

    def ask(_: int) -> list[Profile]:
        together.wait()
        return derived(profile, make)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(ask, range(4)))
    assert len(made) == 1
    assert all(each is made for each in found)
