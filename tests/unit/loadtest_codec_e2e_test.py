"""Figures of `learnonce bench codec --part e2e` from what its rounds found.

Covers: ratios round by round, bars, floors of the link, quality of an answer. Does not cover: engines, stores, the
link (a run of the part itself).
"""

import math
from typing import Any

import pytest

from kvstore.engine.harness import Answered
from loadtest.bench_codec.e2e import _first_kl, _summary, link_floors, slide_bars, ttft_figures


def form(*samples_s: float, quality: str = "exact") -> dict[str, Any]:
    return {"ttft_s": sorted(samples_s)[len(samples_s) // 2], "samples_s": list(samples_s), "quality": quality}


def found(**more: Any) -> dict[str, Any]:
    return {
        "kv_dtype": "float32",
        "stored_bytes": {"raw": 150_000_000, "transform": 7_500_000},
        "shared_memory": {
            # The second round met a busy machine: all of it is slow.
            "raw": form(0.1, 1.0, 0.1),
            "transform": form(0.2, 2.0, 0.25),
            "recompute": form(5.0, 50.0, 5.0),
        },
        **more,
    }


SHAPED = {"raw": form(4.0, 40.0, 4.2, quality="KL 0"), "transform": form(0.5, 5.0, 0.6, quality="KL 0.01")}


def test_rounds_are_compared_with_themselves() -> None:
    figures = ttft_figures(found(shaped=SHAPED))
    assert figures["e2e_ttft_ratio_to_raw_shm"] == pytest.approx(2.0)
    assert figures["shaped_ttft_raw_over_transform"] == pytest.approx(8.0)
    assert figures["shaped_ttft_recompute_over_transform"] == pytest.approx(10.0)


def test_without_a_link_its_figures_are_missing() -> None:
    assert list(ttft_figures(found())) == ["e2e_ttft_ratio_to_raw_shm"]


def test_bars_are_those_of_the_link_and_of_computing() -> None:
    bars = slide_bars(found(shaped=SHAPED))
    assert [bar["name"] for bar in bars] == ["recompute", "naive load", "encoded load"]
    assert [bar["ttft_s"] for bar in bars] == [5.0, 4.2, 0.6]
    assert [bar["quality"] for bar in bars] == ["exact", "KL 0", "KL 0.01"]


@pytest.mark.parametrize(("dtype", "seconds"), [("float32", 2.0), ("bfloat16", 4.0)])
def test_raw_of_16_bits_is_half_of_float32_only(dtype: str, seconds: float) -> None:
    floors = link_floors(found(shaped=SHAPED, kv_dtype=dtype))
    assert floors["raw_s"] == pytest.approx(4.0)
    assert floors["transform_s"] == pytest.approx(0.2)
    assert floors["raw_16_bit_s"] == pytest.approx(seconds)
    assert floors["raw_16_bit_link_over_transform_ttft"] == pytest.approx(seconds / 0.6)


def answered(tokens: tuple[int, ...], *, p: float) -> Answered:
    logprobs = {"1": math.log(p), "2": math.log(1 - p)}
    return Answered(tokens=tokens, cached_tokens=0, ttft_s=1.0, logprobs=logprobs)


def test_quality_is_of_the_first_answer_which_is_a_whole_one() -> None:
    exact = answered((1, 2, 3), p=0.5)
    summary = _summary(exact, [answered((1, 2, 4), p=0.25), answered((1,), p=0.5)])
    assert summary["same_answer_tokens"] == 2
    assert summary["first_token_kl"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert summary["quality"].startswith("KL 0.14")
    assert _summary(exact, [exact])["quality"] == "exact"


def test_rounding_makes_no_kl_negative() -> None:
    assert _first_kl({"1": math.log(0.5)}, {"1": math.log(0.5) + 1e-6}) == 0.0
