"""Measure a model's profile for the `cachegen` codec, from KV that the model has computed.

Covers: bins from the spread of differences, tables from how often symbols occur.
Does not cover: running the model (`learnonce calibrate`), the codec (`kvstore.codecs.cachegen`).
Shape letters: as in `kvstore.codecs`; C = N * H channels, S = 256 symbols.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.errors import CallerError
from kvstore.codecs.cachegen_profile import ESCAPE, SATURATED, CachegenProfile
from kvstore.codecs.layered import check_kv, float_rows
from kvstore.codecs.profile import FREQUENCY_SUM
from kvstore.codecs.rows import SYMBOLS, Frequencies, frequencies_of
from kvstore.compiled import compiled

GROUP_TOKENS: Final = 10
BINS: Final = (0.5, 1.0, 1.5)
"""Bin width of the first, middle and last third of the layers, in standard deviations of the layer's differences.

Source: CacheGen, arXiv:2310.07240.
"""
FACTORS: Final = (1.5, 1.0, 0.7, 0.5, 0.25)
"""What the levels multiply the bins by, coarsest first; the level of 1.0 is the paper's default."""
SKIPPED_TOKENS: Final = 8
"""Tokens at position 0 and behind it are no sample: few values there are larger than all others together."""
_UNIT: Final = 64
"""Weight of one counted symbol, so that its neighbours can get a part of it."""
_ESCAPE_SHARE: Final = 1 / FREQUENCY_SUM
_KNOWN_SHARE: Final = 1 / (8 * FREQUENCY_SUM)
"""A symbol that is rarer than this is escaped: a table has 4096 parts, and one of them is worth more elsewhere."""
_CENTRE: Final = 128


class CalibrationError(CallerError):
    """KV from which nothing can be measured."""


def calibrate_cachegen(
    chunks: Sequence[torch.Tensor],
    *,
    model: str,
    num_exact: int = 0,
    bins: tuple[float, float, float] = BINS,
    factors: Sequence[float] = FACTORS,
    notes: Mapping[str, str] | None = None,
) -> CachegenProfile:
    """Measure bins and tables.

    Args:
        chunks: KV `[L, 2, T, N, H]` of one model, as the engine has it (K rotated), each of more than 18 tokens. 4,000
            tokens in all give tables within 2 % of their rate on other text.
        model: Its name, for people.
        num_exact: Tokens that the codec keeps as they are at position 0; 0 is the paper's scheme.
        bins: Of the three thirds of the layers.
        factors: One level for each.
        notes: How the KV was made, for people.

    Raises:
        CalibrationError: No chunks, chunks of different models, chunks too short, or no factor 1.0.

    Cost:
        Memory for one layer of all chunks; about 0.2 s per 1,000 tokens and level of a 30-layer model on one core.
    """
    shape = _common_shape(chunks)
    if 1.0 not in factors or sorted(factors, reverse=True) != list(factors):
        raise CalibrationError(f"factors {tuple(factors)}: they fall, and 1.0 is one of them")
    num_layers, num_channels = shape[0], shape[1] * shape[2]
    bins_VL2 = np.empty((len(factors), num_layers, 2), dtype=np.float32)
    tables_VL2CS = np.empty((len(factors), num_layers, 2, num_channels, SYMBOLS), dtype=np.uint16)
    anchor_tables_L2CS = np.empty(tables_VL2CS.shape[1:], dtype=np.uint16)
    for layer in range(num_layers):
        third = bins[3 * layer // num_layers]
        for kv in (0, 1):
            samples = [_sample(chunk[layer, kv]) for chunk in chunks]
            spread = _spread(samples)
            anchor_tables_L2CS[layer, kv] = _tables(_count_anchors(samples), blur=6)
            for level, factor in enumerate(factors):
                bins_VL2[level, layer, kv] = third * factor * spread
                counts_CS = _count_differences(samples, float(bins_VL2[level, layer, kv]))
                tables_VL2CS[level, layer, kv] = _tables(counts_CS, blur=1)
    return CachegenProfile(
        model=model,
        num_layers=num_layers,
        num_kv_heads=shape[1],
        head_dim=shape[2],
        group_tokens=GROUP_TOKENS,
        num_exact=num_exact,
        default_level=list(factors).index(1.0),
        bins_VL2=bins_VL2,
        tables_VL2CS=tables_VL2CS,
        anchor_tables_L2CS=anchor_tables_L2CS,
        notes={**(notes or {}), "bins": str(bins), "factors": str(tuple(factors))},
    )


def _common_shape(chunks: Sequence[torch.Tensor]) -> tuple[int, int, int]:
    """Layers, heads, head dimension."""
    if not chunks:
        raise CalibrationError("no KV to calibrate with")
    for chunk in chunks:
        check_kv(chunk)
    shapes = {(chunk.shape[0], chunk.shape[3], chunk.shape[4]) for chunk in chunks}
    shortest = min(chunk.shape[2] for chunk in chunks)
    if len(shapes) > 1 or shortest < SKIPPED_TOKENS + GROUP_TOKENS + 1:
        raise CalibrationError(f"chunks of shapes {sorted(shapes)}, the shortest of {shortest} tokens")
    return shapes.pop()


class _Sample:
    """One chunk's K or V of one layer: every token, coded as if it were an anchor, and differences to real anchors."""

    def __init__(self, values_TNH: NDArray[np.float32]) -> None:
        scales_TN1 = np.abs(values_TNH).max(axis=-1, keepdims=True) / 127
        codes_TNH = np.clip(np.rint(values_TNH / np.maximum(scales_TN1, np.float32(1e-38))), -127, 127)
        num_tokens = len(values_TNH)
        self.codes_TC = codes_TNH.reshape(num_tokens, -1)
        anchors_AC = (codes_TNH * scales_TN1).reshape(num_tokens, -1)[::GROUP_TOKENS]
        tokens = np.flatnonzero(np.arange(num_tokens) % GROUP_TOKENS)
        self.differences_DC = values_TNH.reshape(num_tokens, -1)[tokens] - anchors_AC[tokens // GROUP_TOKENS]


def _sample(kv_TNH: torch.Tensor) -> _Sample:
    values_TNH = float_rows(kv_TNH[SKIPPED_TOKENS:]).reshape(-1, *kv_TNH.shape[1:])
    if not np.isfinite(values_TNH).all():
        raise CalibrationError("KV holds a NaN or an infinity")
    return _Sample(values_TNH)


def _spread(samples: Sequence[_Sample]) -> float:
    """Standard deviation of all differences; they have no common mean by construction."""
    total = sum(float(np.square(sample.differences_DC, dtype=np.float64).sum()) for sample in samples)
    return max(float(np.sqrt(total / sum(sample.differences_DC.size for sample in samples))), 1e-30)


def _count_anchors(samples: Sequence[_Sample]) -> NDArray[np.int64]:
    """Any token might be an anchor, so all of them are counted."""
    counts_CS = np.zeros((samples[0].codes_TC.shape[1], SYMBOLS), dtype=np.int64)
    for sample in samples:
        _count(np.ascontiguousarray(sample.codes_TC, dtype=np.float32), counts_CS)
    return counts_CS


def _count_differences(samples: Sequence[_Sample], width: float) -> NDArray[np.int64]:
    counts_CS = np.zeros((samples[0].codes_TC.shape[1], SYMBOLS), dtype=np.int64)
    for sample in samples:
        _count(np.ascontiguousarray(np.rint(sample.differences_DC / np.float32(width)), dtype=np.float32), counts_CS)
    counts_CS[:, SATURATED] = 0
    return counts_CS


def _tables(counts_CS: NDArray[np.int64], *, blur: int) -> Frequencies:
    """Tables that know what was counted and what lies within `blur` of it, and can escape the rest."""
    weights_CS = _blurred(counts_CS * _UNIT, blur)
    totals_C1 = weights_CS.sum(axis=1, keepdims=True)
    weights_CS[weights_CS < _KNOWN_SHARE * totals_C1] = 0
    weights_CS[:, ESCAPE] = np.maximum(1, _ESCAPE_SHARE * totals_C1[:, 0])
    return frequencies_of(weights_CS)


def _blurred(weights_CS: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Spread a part of every weight over its neighbours: half of it for one neighbour each side, else a triangle."""
    kernel = np.convolve(np.ones(width + 1), np.ones(width + 1))
    if width == 1:
        kernel = np.array([1.0, 14.0, 1.0])
    kernel /= kernel.sum()
    padded = np.pad(weights_CS.astype(np.float64), ((0, 0), (width, width)))
    spread = sum(share * padded[:, at : at + SYMBOLS] for at, share in enumerate(kernel))
    return np.ceil(np.asarray(spread)).astype(np.int64)


@compiled("void(float32[:, ::1], int64[:, ::1])")
def _count(steps: NDArray[np.float32], counts: NDArray[np.int64]) -> None:
    """Count whole numbers by channel; those out of range are escapes, which are counted nowhere."""
    for token in range(steps.shape[0]):
        for channel in range(steps.shape[1]):
            if abs(steps[token, channel]) <= np.float32(127.0):
                counts[channel, int(steps[token, channel]) + _CENTRE] += 1
