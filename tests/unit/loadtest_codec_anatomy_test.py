"""Bytes and speed in `learnonce bench codec`, on synthetic profiles.

Covers: sections that add up to what is stored, costs of components that add up to their sections, prefixes as points,
pages that hold what was decoded, jobs that are timed alike, stages. Does not cover: real speeds, the codec itself.
"""

import itertools

import pytest
import torch

from kvstore.codecs import stream
from kvstore.codecs.profile import Profile
from kvstore.codecs.transform import TransformCodec
from kvstore.testing.profiles import make_profile, make_profile_kv, make_profile_meta
from loadtest.bench_codec.anatomy import component_bits, live_rows, sections_of
from loadtest.bench_codec.measures import bits_per_element
from loadtest.bench_codec.parts import speed_at_measured_level
from loadtest.bench_codec.sample import Sample
from loadtest.bench_codec.schemes import Encoded, TransformScheme
from loadtest.bench_codec.speed import decode_layer_to_pages, jobs_of, time_jobs
from loadtest.bench_codec.stages import decode_stages_s

_TOKENS = 192


@pytest.fixture(scope="module")
def profile() -> Profile:
    return make_profile(num_layers=3, num_kv_heads=2, head_dim=16, num_exact=1, seed=4)


@pytest.fixture(scope="module")
def chunks(profile: Profile) -> list[torch.Tensor]:
    return [
        make_profile_kv(profile, make_profile_meta(profile, num_tokens=_TOKENS, base_position=at), seed=at)
        for at in (0, _TOKENS)
    ]


@pytest.fixture(scope="module")
def encoded(profile: Profile, chunks: list[torch.Tensor]) -> list[list[Encoded]]:
    scheme = TransformScheme(profile)
    return [scheme.encode(chunk, base_position=at * _TOKENS) for at, chunk in enumerate(chunks)]


def test_sections_headers_and_exact_tokens_add_up_to_the_payload(
    profile: Profile, chunks: list[torch.Tensor], encoded: list[list[Encoded]]
) -> None:
    finest = [points[-1] for points in encoded]
    num_elements = sum(chunk.numel() for chunk in chunks)
    sections, rest = sections_of(finest, profile=profile, num_elements=num_elements)
    total = sum(section["bits"] for section in sections) + sum(rest.values())
    assert total == pytest.approx(bits_per_element([len(each.payload) for each in finest], num_elements=num_elements))
    # Only the chunk at position 0 has an exact token.
    exact_values = profile.num_layers * 2 * profile.num_kv_heads * profile.head_dim
    assert rest["exact_tokens"] == pytest.approx(16 * exact_values / num_elements)


def test_points_are_growing_prefixes_of_one_encoding(profile: Profile, encoded: list[list[Encoded]]) -> None:
    assert [each.point for each in encoded[0]] == ["transform-0", "transform-1", "transform-2"]
    sizes = [len(each.payload) for each in encoded[0]]
    assert sizes == sorted(set(sizes))
    assert all(bytes(encoded[0][-1].payload[: len(each.payload)]) == bytes(each.payload) for each in encoded[0])


def test_finer_points_are_nearer_to_the_kv(
    profile: Profile, chunks: list[torch.Tensor], encoded: list[list[Encoded]]
) -> None:
    scheme = TransformScheme(profile)
    errors = [float((scheme.decode(each).float() - chunks[1].float()).square().mean()) for each in encoded[1]]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 4


def test_costs_of_components_add_up_to_the_sections(
    profile: Profile, chunks: list[torch.Tensor], encoded: list[list[Encoded]]
) -> None:
    finest = [encoded[1][-1]]
    bits = component_bits(finest, scheme=TransformScheme(profile))
    layout = stream.read_header(finest[0].payload, meta=finest[0].meta, profile=profile)
    for kv, name in enumerate("KV"):
        for level in range(profile.num_levels):
            stored_bytes = (layout.stop_VL2G - layout.start_VL2G)[level, :, kv].sum()
            # States, and for level 0 the count of escapes, are no symbols.
            symbols_bits = 8 * (stored_bytes - profile.num_layers * (64 + 4 * (level == 0)))
            ideal_bits = sum(bits[name][level]) * _TOKENS * profile.num_layers
            assert ideal_bits == pytest.approx(symbols_bits, rel=0.05, abs=600)


def test_dead_rows_cost_nothing(profile: Profile, encoded: list[list[Encoded]]) -> None:
    bits = component_bits([encoded[1][-1]], scheme=TransformScheme(profile))
    live = live_rows(profile)["K"]
    assert live[0][0] < live[-1][0]
    assert bits["K"][0][live[0][0] :] == [0.0] * (len(bits["K"][0]) - live[0][0])


def test_pages_hold_what_was_decoded(profile: Profile, encoded: list[list[Encoded]]) -> None:
    scheme = TransformScheme(profile)
    pages = torch.full((3, 2 * _TOKENS // 32, 2, 32, 2 * 16), torch.nan, dtype=torch.bfloat16)
    for points in encoded:
        chunk = scheme.codec.open(points[1].payload, meta=points[1].meta)
        for layer in range(3):
            decode_layer_to_pages(chunk, layer, pages)
    wanted = torch.cat([scheme.decode(points[1]) for points in encoded], dim=2)
    for token in (0, 31, 32, 191, 192, 383):
        page, slot = divmod(token, 32)
        assert pages[1, page, 1, slot, :16].equal(wanted[1, 0, token, 1])
        assert pages[2, page, 0, slot, 16:].equal(wanted[2, 1, token, 0])
    assert not pages.isnan().any()


def test_every_job_of_a_scheme_runs(profile: Profile, chunks: list[torch.Tensor]) -> None:
    sample = Sample(text="synthetic", chunks=tuple(chunks))
    jobs = jobs_of(TransformScheme(profile, num_threads=2), sample, num_cores=2)
    assert {"encode transform", "decode transform-0", "decode transform-1 to pages"} <= set(jobs)
    medians_s = time_jobs(jobs, rounds=1)
    assert set(medians_s) == set(jobs)
    assert all(seconds > 0 for seconds in medians_s.values())


def test_decoding_speed_is_told_at_the_level_that_was_measured_to_be_good_enough() -> None:
    rates = {"decode transform-1 to pages": 2.0, "decode transform-2 to pages": 1.0}
    quality = {"comparisons": {"transform_kl01_ratio_to_int8": {"point": "transform-2"}}}
    assert speed_at_measured_level({"quality": quality, "speed": {"gb_per_s": rates}}) == {"decode_gb_per_s": 1.0}
    assert speed_at_measured_level({"quality": quality}) == {}
    assert speed_at_measured_level({"speed": {"gb_per_s": rates}}) == {}


def test_jobs_are_interleaved_and_warmed() -> None:
    calls: list[str] = []
    time_jobs({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b", "a", "b", "a", "b"]


def test_stages_of_decoding_sum_to_the_whole(profile: Profile, encoded: list[list[Encoded]]) -> None:
    """On a clock that counts its calls: every stage takes one tick."""
    chunk, ticks = encoded[0][-1], itertools.count()
    codec = TransformCodec(profile)
    seconds = decode_stages_s(codec, chunk.payload, meta=chunk.meta, rounds=2, now_s=lambda: float(next(ticks)))
    assert next(ticks) == 2 * 2 * 5
    assert seconds == {
        "checksums": 1.0,
        "symbols": 0.0,
        "products": 1.0,
        "scale_rotate_round": 0.0,
        "whole": 1.0,
        "copy": 1.0,
    }
