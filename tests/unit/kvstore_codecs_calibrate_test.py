"""`kvstore.codecs.calibrate` on a tiny model with random weights.

Covers: the profile codes KV of text that it was not made from, better than its parts left out; classes, head groups,
determinism, refusals; tables and importance by themselves.
Does not cover: the quality for real models (`learnonce bench codec`).
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from kvstore.codecs import calibrate_tables as tables
from kvstore.codecs.calibrate import TARGET_LEVEL, CalibrationSettings, calibrate
from kvstore.codecs.calibrate_fit import fit_importance, fit_transform, symmetric_power
from kvstore.codecs.calibrate_model import CalibrationError, CalibrationModel
from kvstore.codecs.importance import importance_of, log_attention, token_classes
from kvstore.codecs.profile import FREQUENCY_SUM, NUM_CLASSES, Profile, ProfileDataError
from kvstore.codecs.transform import TransformCodec
from kvstore.interfaces import ChunkMeta

SETTINGS = CalibrationSettings(
    num_pieces=5, num_trials=1, context_tokens=320, following_tokens=32, target_kl=0.0005, groups=1, seed=3
)
WORDS = tuple(f"w{index}" for index in range(96))


def text(seed: int, *, words: int = 2200) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(WORDS[index] for index in (rng.zipf(1.4, words) - 1) % len(WORDS))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    plain = Tokenizer(models.WordLevel({word: at for at, word in enumerate((*WORDS, "?"))}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?").save_pretrained(path)
    return path


def made(path: Path, **changes: object) -> Profile:
    settings = CalibrationSettings(**{**{f: getattr(SETTINGS, f) for f in SETTINGS.__slots__}, **changes})  # type: ignore[arg-type]
    return calibrate(
        path, [text(1), text(2)], settings=settings, name="tiny", on_progress=lambda _what, _done, _total: None
    )


@pytest.fixture(scope="module")
def profile(model_path: Path) -> Profile:
    return made(model_path)


@pytest.fixture(scope="module")
def model(model_path: Path) -> CalibrationModel:
    return CalibrationModel(model_path, context_tokens=256, following_tokens=32)


def coded(model: CalibrationModel, profile: Profile, *, level: int) -> tuple[float, float]:
    """Bits per value and divergence of other text's KV through the real codec."""
    segment = model.read(model.cut([text(9)], count=1)[0], seed=None)
    shape = model.geometry
    kv_L2TNH = segment.kv_WTC.reshape(shape.num_layers, 2, 256, shape.num_kv_heads, shape.head_dim)
    meta = ChunkMeta(
        num_tokens=256,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype="float32",
        base_position=0,
        codec="transform",
        profile=profile.id,
    )
    codec = TransformCodec(profile)
    room = bytearray(codec.encoded_bytes(meta))
    rotated = kv_L2TNH.clone()
    angles = torch.arange(256, dtype=torch.float64)[:, None] * shape.inv_freq
    turn = torch.polar(torch.ones_like(angles), angles)[:, None].to(torch.complex64)
    half = shape.head_dim // 2
    pairs = torch.complex(kv_L2TNH[:, 0, ..., :half], kv_L2TNH[:, 0, ..., half:]) * turn
    rotated[:, 0] = torch.cat([pairs.real, pairs.imag], -1)
    size = codec.encode(rotated, out=memoryview(room), meta=meta, level=level)
    decoded = codec.decode(memoryview(room)[:size], meta=meta)
    pairs = torch.complex(decoded[:, 0, ..., :half], decoded[:, 0, ..., half:]) * turn.conj()
    decoded[:, 0] = torch.cat([pairs.real, pairs.imag], -1)
    return 8 * size / kv_L2TNH.numel(), model.divergence(segment, decoded.reshape(segment.kv_WTC.shape))


def test_profile_codes_other_text_as_well_as_it_was_asked_to(model: CalibrationModel, profile: Profile) -> None:
    results = [coded(model, profile, level=level) for level in range(profile.num_levels)]
    bits, divergence = zip(*results, strict=True)
    assert list(bits) == sorted(bits)
    assert list(divergence) == sorted(divergence, reverse=True)
    assert SETTINGS.target_kl / 3 < divergence[TARGET_LEVEL] < 3 * SETTINGS.target_kl


def test_same_text_gives_the_same_profile(model_path: Path, profile: Profile) -> None:
    assert made(model_path).id == profile.id
    assert Profile.from_bytes(profile.to_bytes()).id == profile.id


def test_a_smaller_target_takes_more_bits(model: CalibrationModel, model_path: Path, profile: Profile) -> None:
    finer = made(model_path, target_kl=SETTINGS.target_kl / 8)
    assert coded(model, finer, level=TARGET_LEVEL)[0] > 1.1 * coded(model, profile, level=TARGET_LEVEL)[0]
    assert coded(model, finer, level=TARGET_LEVEL)[1] < coded(model, profile, level=TARGET_LEVEL)[1] / 2


def test_head_groups_are_transformed_apart(model: CalibrationModel, model_path: Path) -> None:
    grouped = made(model_path, groups=2)
    assert grouped.bands[0][0][0].basis_RC.shape[1] == model.geometry.head_dim
    assert coded(model, grouped, level=TARGET_LEVEL)[1] < 3 * SETTINGS.target_kl


def test_calibration_reports_what_it_does(model_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    calibrate(
        model_path,
        [text(1)],
        settings=SETTINGS,
        name="tiny",
        on_progress=lambda what, done, total: seen.append((what, done, total)),
    )
    assert list(dict.fromkeys(what for what, _, _ in seen)) == ["queries", "reading", "transforms", "trials", "tables"]
    assert all(0 <= done <= total for _, done, total in seen)


@pytest.mark.parametrize(
    ("texts", "changes", "message"),
    [
        ([], {}, "0 texts"),
        (["w1 w2 w3"], {}, "text 1 has 3 tokens"),
        ([text(1)], {"num_trials": 5}, "5 for trials"),
        ([text(1)], {"groups": 3}, "3 head groups of 2"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    model_path: Path, texts: list[str], changes: dict[str, int], message: str
) -> None:
    settings = CalibrationSettings(**{**{f: getattr(SETTINGS, f) for f in SETTINGS.__slots__}, **changes})
    with pytest.raises(CalibrationError, match=message):
        calibrate(model_path, texts, settings=settings, name="tiny", on_progress=lambda _w, _d, _t: None)


def test_classes_are_cut_at_the_bounds_and_the_end_is_finer(profile: Profile) -> None:
    bands = (profile.num_layers, 2, profile.groups)
    encoder = {
        **profile.encoder,
        "importance_at": np.zeros((*bands, 1), np.float32),
        "importance": np.full((*bands, 1), 2.5, np.float32),
        "importance_tail": np.broadcast_to(np.array([4, 2], np.float32), (*bands, 2)).copy(),
        "class_bounds": np.broadcast_to(np.arange(6, -1, -1, dtype=np.float32), (*bands, 7)).copy(),
    }
    k_TNH = np.zeros((4, profile.num_kv_heads, profile.head_dim), np.float32)
    classes = token_classes(dataclasses.replace(profile, encoder=encoder), k_TNH, layer=1)
    assert classes is not None
    assert classes.tolist() == [[[4, 4, 2, 0]] * profile.groups] * 2


@pytest.mark.parametrize(
    "changes",
    [
        {"importance_tail": None},
        {"class_bounds": np.zeros((2, 2, 1, 3), np.float32)},
        {"importance_at": np.zeros((2, 2, 1, 1), np.float32)},
        {"attention_mean": np.zeros((1, 2, 8), np.float32)},
    ],
)
def test_importance_that_does_not_fit_is_refused(profile: Profile, changes: dict[str, np.ndarray | None]) -> None:
    merged = {**profile.encoder, **changes}
    encoder = {name: array for name, array in merged.items() if array is not None}
    k_TNH = np.zeros((4, profile.num_kv_heads, profile.head_dim), np.float32)
    with pytest.raises(ProfileDataError, match="do not fit"):
        token_classes(dataclasses.replace(profile, encoder=encoder), k_TNH, layer=0)


def test_expected_attention_follows_the_mean_query() -> None:
    mean_NH = np.array([[2.0, 0.0], [0.0, 0.0]], np.float32)
    factor_NHJ = np.zeros((2, 2, 2), np.float32)
    k_TNH = np.zeros((3, 2, 2), np.float32)
    k_TNH[1, 0] = [1.0, 5.0]
    k_TNH[2, 0] = [-1.0, 5.0]
    plain = np.exp([0.0, 2.0, -2.0])
    # The second head looks at all tokens alike: no token is worth less than the mean to it.
    expected = np.maximum(np.log(plain / plain.mean()), 0)
    got = log_attention(k_TNH, mean_NH=mean_NH, factor_NHJ=factor_NHJ, groups=1)
    np.testing.assert_allclose(got, [expected], atol=1e-6)


def test_expected_attention_grows_with_the_queries_spread() -> None:
    factor_NHJ = np.array([[[2.0], [0.0]]], np.float32)
    k_TNH = np.array([[[1.0, 0.0]], [[0.0, 1.0]]], np.float32)
    got = log_attention(k_TNH, mean_NH=np.zeros((1, 2), np.float32), factor_NHJ=factor_NHJ, groups=1)[0]
    assert got[0] - got[1] == pytest.approx(2.0)


def test_a_diagonal_factor_needs_no_product_and_gives_the_same_bits() -> None:
    random = np.random.default_rng(0)
    k_TNH, mean_NH = random.normal(size=(50, 2, 16)).astype(np.float32), random.normal(size=(2, 16)).astype(np.float32)
    diagonal_NH = random.normal(size=(2, 16)).astype(np.float32)
    factor_NHJ = np.stack([np.diag(row) for row in diagonal_NH])
    whole = log_attention(k_TNH, mean_NH=mean_NH, factor_NHJ=factor_NHJ, groups=2)
    short = log_attention(k_TNH, mean_NH=mean_NH, factor_NHJ=factor_NHJ, groups=2, diagonal_NH=diagonal_NH)
    np.testing.assert_array_equal(short, whole)


def test_importance_is_linear_between_knots_and_larger_at_the_end() -> None:
    at_P, importance_P = np.array([0, 2], np.float32), np.array([1, 5], np.float32)
    got = importance_of(
        np.array([-1, 1, 3, 1], np.float32),
        at_P=at_P,
        importance_P=importance_P,
        tail_T=np.array([10, 20], np.float32),
    )
    assert got.tolist() == [1, 3, 25, 13]


def test_fitted_importance_rises_with_attention_and_towards_the_end() -> None:
    rng = np.random.default_rng(0)
    attention = [rng.normal(size=512).astype(np.float32) for _ in range(6)]
    energy = [np.exp(each.astype(np.float64)) * rng.chisquare(8, 512) / 8 for each in attention]
    for each in energy:
        each[-8:] *= 100
    fitted = fit_importance(attention, energy, trust=1.0)
    slope = np.diff(fitted.importance_P[2:-2]) / np.diff(fitted.at_P[2:-2])
    np.testing.assert_allclose(slope, 1.0, atol=0.4)
    assert fitted.tail_T[0] > np.log(8)
    assert fitted.tail_T[-1] < np.log(1.5)
    classes = fitted.classes(np.sort(attention[0]))
    assert classes.min() >= 0
    assert classes.max() < NUM_CLASSES
    assert (np.diff(classes) <= 0).all()


def test_transform_makes_components_independent_and_errors_equal() -> None:
    rng = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=rng, dtype=torch.float64)
    x_TC = (torch.randn(4000, 6, generator=rng, dtype=torch.float64) @ mixing + 3).float()
    root = torch.randn(6, 6, generator=rng, dtype=torch.float64)
    metric_CC = root @ root.T + torch.eye(6, dtype=torch.float64)
    fitted = fit_transform(x_TC, np.ones(4000), metric_CC)
    y_TR = (x_TC.double() - fitted.bias_C) @ torch.linalg.inv(fitted.inverse_RC)
    covariance = y_TR.T @ y_TR / 4000
    variance = covariance.diagonal()
    torch.testing.assert_close(covariance, torch.diag(variance), atol=1e-6 * float(variance[0]), rtol=0)
    assert (variance.diff() <= 0).all()
    torch.testing.assert_close(fitted.inverse_RC @ metric_CC @ fitted.inverse_RC.T, torch.eye(6, dtype=torch.float64))


def test_symmetric_power_undoes_itself() -> None:
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrix = root @ root.T + torch.eye(5)
    torch.testing.assert_close(symmetric_power(matrix, 0.5) @ symmetric_power(matrix, 0.5), matrix)


def test_counts_follow_the_levels() -> None:
    values_TR = np.array([[5], [-6], [0], [1]], np.int16)
    counts = tables.count_symbols(values_TR, [0], num_levels=3)
    zero = tables.ZERO
    # Coarsest: 1, -1, 0, 0, after 0, 1, -1, 0; both signs are counted, as no component prefers one.
    assert counts[0, 0, 0, [zero - 1, zero, zero + 1]].tolist() == [1, 2, 1]
    assert counts[0, 0, 1, [zero - 1, zero, zero + 1]].tolist() == [1, 2, 1]
    # First refinement: 2 adds bit 0 to 1, -3 adds bit 1 to -1, two zeros stay 0.
    assert counts[1, 0, 1, [zero, zero + 1]].tolist() == [1, 1]
    assert counts[1, 0, 0, zero] == 4
    # Second: 5 after 2 adds 1, -6 after -3 adds 0, 0 stays, 1 after 0 brings its sign.
    assert counts[2, 0, 2, [zero, zero + 1]].tolist() == [1, 1]
    assert counts[2, 0, 0, [zero - 1, zero, zero + 1]].tolist() == [1, 2, 1]


@pytest.mark.parametrize("spread", [0.1, 0.5, 3.0, 20.0])
def test_frequencies_sum_and_cost_little(spread: float) -> None:
    share_S = np.exp(-np.abs(np.arange(tables.NUM_SYMBOLS) - tables.ZERO) / spread)
    share_S /= share_S.sum()
    frequencies = tables.table_of(share_S, low=-30, high=30)
    assert int(frequencies.sum()) == FREQUENCY_SUM
    inside = np.abs(np.arange(tables.NUM_SYMBOLS) - tables.ZERO) <= 30
    assert ((frequencies > 0) == inside).all()
    share = share_S[inside] / share_S[inside].sum()
    loss = float((share * np.log2(share / (frequencies[inside] / FREQUENCY_SUM))).sum())
    assert 0 <= loss < 0.03


def test_clusters_find_the_kinds_of_histograms() -> None:
    rng = np.random.default_rng(0)
    places = np.abs(np.arange(tables.NUM_SYMBOLS) - tables.ZERO)
    kinds = [np.exp(-places / spread) for spread in (0.3, 1.0, 4.0)]
    histograms = np.stack([rng.multinomial(5000, kind / kind.sum()) for kind in kinds for _ in range(10)])
    owner, shares = tables.cluster(histograms, count=3)
    assert [len(set(owner[start : start + 10])) for start in (0, 10, 20)] == [1, 1, 1]
    assert len(set(owner)) == len(shares) == 3


def test_widths_leave_few_symbols_to_escapes() -> None:
    values_TR = np.random.default_rng(0).laplace(scale=3.0, size=(50_000, 4)).round().astype(np.int16)
    counts = tables.count_symbols(values_TR, [0], num_levels=1)
    frequencies, ids = tables.table_set([counts], [(4,)])
    low = np.array([np.flatnonzero(row)[0] for row in frequencies.astype(int)])[ids[0][0]].max(axis=1)
    outside = (np.abs(values_TR) > tables.ZERO - low).mean()
    assert outside < 2e-4


def test_rows_that_are_nearly_always_zero_are_dead() -> None:
    values_TR = np.zeros((10_000, 3), np.int16)
    values_TR[::10, 1] = 1
    values_TR[0, 2] = 1
    assert tables.live_rows(tables.count_symbols(values_TR, [0], num_levels=1)[0]) == 2
