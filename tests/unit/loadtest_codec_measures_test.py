"""The mathematics of `learnonce bench codec`.

Covers: KL, first choices and likelihoods against sums done by hand; the paired bootstrap; curves; bits of records;
which figures come of which rows. Does not cover: models, codecs (`loadtest_codec_quality_test`).
"""

import math
from typing import Any

import numpy as np
import pytest
import torch

from kvstore.container import ALIGN, stored_bytes
from loadtest.agreement import agreement, bootstrap, log_probabilities
from loadtest.bench_codec.figures import comparisons, point_tables, quality_detail, quality_figures
from loadtest.bench_codec.measures import Curve, CurveError, CurvePoint, bits_per_element, stored_bits_per_element


def test_kl_is_the_sum_over_words_of_p_times_the_log_of_p_over_q() -> None:
    random = np.random.default_rng(3)
    logits = random.normal(size=(2, 7, 50)) * 3
    exact, other = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[:]
    expected_T = (np.exp(exact) * (exact - other)).sum(-1)

    found = agreement(*map(_float32, (exact, other)), targets_T=torch.zeros(7, dtype=torch.long))

    assert found.kl == pytest.approx(expected_T.mean(), rel=1e-5)
    assert found.first_token_kl == pytest.approx(expected_T[0], rel=1e-5)
    assert found.dnll == pytest.approx((exact[:, 0] - other[:, 0]).mean(), rel=1e-5)


def test_kl_is_not_symmetric_and_the_exact_side_is_the_weight() -> None:
    exact, other = _float32(np.log([[0.9, 0.1]])), _float32(np.log([[0.5, 0.5]]))
    there = agreement(exact, other, targets_T=torch.tensor([0])).kl
    back = agreement(other, exact, targets_T=torch.tensor([0])).kl
    assert there == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-5)
    assert back == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5.0), rel=1e-5)


def test_equal_distributions_agree_in_all() -> None:
    exact = log_probabilities(torch.randn(5, 20, generator=torch.Generator().manual_seed(1)))
    found = agreement(exact, exact.clone(), targets_T=torch.arange(5))
    assert (found.kl, found.first_token_kl, found.top1_ratio, found.dnll) == (0.0, 0.0, 1.0, 0.0)


def test_log_probabilities_sum_to_one_whatever_the_dtype() -> None:
    logits = 30 * torch.randn(4, 100, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    assert log_probabilities(logits).exp().sum(-1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)


def test_a_bootstrap_of_a_mean_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(5).normal(10.0, 2.0, size=400)
    found = bootstrap(lambda draw: float(values[draw].mean()), count=400)
    assert found.value == pytest.approx(values.mean())
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(400), rel=0.1)
    assert found.low < values.mean() < found.high


def test_what_two_codecs_share_cancels_in_a_paired_bootstrap() -> None:
    hard = np.random.default_rng(5).uniform(0.001, 1.0, size=8)
    one, other = 2.0 * hard, 3.0 * hard
    ratio = bootstrap(lambda draw: float(one[draw].mean() / other[draw].mean()), count=8)
    alone = bootstrap(lambda draw: float(one[draw].mean()), count=8)
    assert (ratio.low, ratio.high) == pytest.approx((2 / 3, 2 / 3))
    assert alone.low is not None
    assert alone.low < 0.8 * alone.value


def test_a_bootstrap_is_the_same_every_time() -> None:
    values = np.arange(6.0)
    assert bootstrap(lambda draw: float(values[draw].mean()), count=6) == bootstrap(
        lambda draw: float(values[draw].mean()), count=6
    )


def test_one_document_has_no_interval_and_neither_has_a_figure_that_other_documents_would_not_have() -> None:
    assert bootstrap(lambda _: 1.0, count=1).low is None
    found = bootstrap(lambda draw: 1.0 if 0 in draw else math.nan, count=4)
    assert (found.value, found.low, found.high) == (1.0, None, None)


def test_curves_are_straight_in_log_kl_and_end_where_measuring_ended() -> None:
    curve = Curve([CurvePoint(bits=3.0, kl=0.001), CurvePoint(bits=1.0, kl=0.1), CurvePoint(bits=2.0, kl=0.02)])
    assert curve.kl_at(1.5) == pytest.approx(math.sqrt(0.1 * 0.02))
    assert curve.kl_at(2.25) == pytest.approx(0.02**0.75 * 0.001**0.25)
    assert [curve.bits_at(kl) for kl in (0.1, 0.02, 0.001)] == [1.0, 2.0, 3.0]
    assert curve.bits_at(curve.kl_at(2.6)) == pytest.approx(2.6)
    assert all(math.isnan(value) for value in (curve.kl_at(0.9), curve.kl_at(3.1), curve.bits_at(0.2)))


def test_a_curve_needs_points_with_a_logarithm() -> None:
    with pytest.raises(CurveError):
        Curve([])
    with pytest.raises(CurveError):
        Curve([CurvePoint(bits=1.0, kl=0.0)])


def test_stored_bits_count_headers_and_padding_of_every_record() -> None:
    sizes = [100, 5000]
    assert bits_per_element(sizes, num_elements=1000) == 8 * 5100 / 1000
    assert stored_bits_per_element(sizes, num_elements=1000) == 8 * (stored_bytes(100) + stored_bytes(5000)) / 1000
    assert stored_bytes(100) + stored_bytes(5000) == 5 * ALIGN


def test_ratios_to_int8_are_of_measured_levels_that_meet_the_bar() -> None:
    rows = _rows({"transform-0": (1.0, 0.04), "transform-1": (1.7, 0.009), "transform-2": (2.6, 0.002)})
    figures = _figures(rows)
    assert figures["transform_kl01_ratio_to_int8"] == pytest.approx(8.5 / 1.7)
    assert figures["transform_kl05_ratio_to_int8"] == pytest.approx(8.5 / 1.0)


def test_a_bar_that_no_level_meets_has_no_figure() -> None:
    figures = _figures(_rows({"transform-0": (1.0, 0.04), "transform-1": (1.7, 0.011)}))
    assert "transform_kl01_ratio_to_int8" not in figures
    assert "transform_kl05_ratio_to_int8" in figures


def test_codecs_are_compared_at_equal_kl_and_at_equal_bytes() -> None:
    rows = _rows({"transform-0": (1.0, 0.1), "transform-1": (3.0, 0.001), "cachegen-1": (2.5, 0.01)})
    figures = _figures(rows)
    assert figures["cachegen_over_transform_bytes_at_equal_kl"] == pytest.approx(2.5 / 2.0)
    assert figures["transform_over_cachegen_kl_at_equal_bytes"] == pytest.approx(10**-2.5 / 0.01)


def test_beyond_the_measured_levels_a_comparison_is_a_bound_in_disfavour_of_ours() -> None:
    rows = _rows({"transform-0": (1.0, 0.1), "transform-1": (2.0, 0.001), "cachegen-1": (4.0, 0.2)})
    found = comparisons(
        point_tables(rows, points=_points(rows), names=_NAMES), count=len(_NAMES), baseline="cachegen-1"
    )
    assert found["cachegen_over_transform_bytes_at_equal_kl"]["value"] == pytest.approx(4.0 / 1.0)
    assert found["transform_over_cachegen_kl_at_equal_bytes"]["value"] == pytest.approx(0.001 / 0.2)
    assert not found["transform_over_cachegen_kl_at_equal_bytes"]["is_within_curve"]
    better = _rows({"transform-0": (1.0, 0.1), "transform-1": (2.0, 0.01), "cachegen-1": (0.5, 0.001)})
    assert not {name for name in _figures(better) if "cachegen" in name}


def test_points_without_all_documents_are_not_compared() -> None:
    rows = _rows({"transform-0": (1.0, 0.04), "raw": (16.0, 0.0001)})
    rows = [row for row in rows if row["point"] != "transform-0" or row["document"] != _NAMES[0]]
    assert list(point_tables(rows, points=["transform-0", "raw"], names=_NAMES)) == ["raw"]
    assert not _figures(rows)


def test_details_say_means_by_context_and_by_kind() -> None:
    rows = _rows({"int8": (8.5, 0.001)})
    for row in rows:
        row["kl"] = 0.1 if row["kind"] == "code" else 0.2
        row["top1_ratio"] = row["context"] / 4096
    found = quality_detail(rows, points=["int8"], names=_NAMES, contexts=_CONTEXTS, baseline="")["points"]["int8"]
    assert found["kl"]["value"] == pytest.approx(0.15)
    assert (found["by_kind"]["code"]["kl"], found["by_kind"]["novel"]["kl"]) == pytest.approx((0.1, 0.2))
    assert [found["by_context"][str(each)]["top1_ratio"] for each in _CONTEXTS] == [0.25, 1.0]


_NAMES = ["a", "b", "c", "d"]
_CONTEXTS = [1024, 4096]


def _rows(points: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Rows whose mean KL is as given, harder for some documents."""
    return [
        {
            "document": name,
            "kind": "code" if index % 2 else "novel",
            "context": context,
            "point": point,
            "bits": bits,
            "payload_bits": bits,
            "whole_bits": bits,
            "kl": kl * (0.7 + 0.2 * index),
            "first_token_kl": kl,
            "top1_ratio": 0.9,
            "dnll": 0.0,
        }
        for point, (bits, kl) in points.items()
        for index, name in enumerate(_NAMES)
        for context in _CONTEXTS
    ]


def _points(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["point"] for row in rows))


def _figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    return quality_figures(rows, points=_points(rows), names=_NAMES, baseline="cachegen-1")


def _float32(values: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.float32)
