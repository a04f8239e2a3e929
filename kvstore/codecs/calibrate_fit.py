"""From what a model did on calibration text to transforms, steps and classes of tokens.

Covers: the metric of errors, importance of tokens, bases, quantising with them as the encoder will.
Does not cover: running the model (`kvstore.codecs.calibrate_model`), tables (`kvstore.codecs.calibrate_tables`).
Shape letters: T tokens, N KV heads, H head dimension, C = N * H channels, R = C rows, W bands (K and V by layer),
P knots.

The metric of an error of K is the attention's logits (moments of the queries), of V the layer's output (`W_o' W_o`);
how much the answer depends on that, layer by layer and token by token, comes from the Fisher information. One step for
all layers, K and V, in that metric gives every bit the same worth.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.codecs.calibrate_model import SKIPPED_TOKENS, Geometry, Queries
from kvstore.codecs.importance import importance_of, log_attention
from kvstore.codecs.profile import NUM_CLASSES

CHUNK_TOKENS: Final = 256
"""Tokens that are taken as one chunk: expected attention is relative to a chunk's mean, and its last tokens matter."""
QUANTILES: Final = (0.05, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99, 0.997)
TAIL_BINS: Final = (1, 4, 8, 16, 32, 64)
"""Distances from the end, in tokens, up to which importance is taken as constant."""
CHUNKS_PER_TAIL: Final = 8.0
"""Of how many chunks one is followed by what reads it; the last tokens of the others are no more than the rest."""
TRUST: Final = (0.5, 0.7)
"""Of K and V: exponent of measured importance. Below 1, because other contexts attend to other tokens, and because an
error of K moves attention to a token that had none.

Source: on other text, at KL .01, 1 with V alone (0, .7) takes 1.39 bits per value, (.3, .7) 1.26, (.5, .7) 1.13,
(.7, .9) 1.15."""
CLASS_RATIO: Final = 4.0
"""Of importance, between neighbouring classes: their steps differ by 2."""
TOP_CLASSES: Final = 5
"""Class 0 has `CLASS_RATIO ** TOP_CLASSES` times the importance of the typical token."""
_FASTEST_RADIANS: Final = 0.01
"""Per position: a mean query that turns faster than this has no direction where the key will stand."""
_EIGENVALUE_FLOOR: Final = 1e-6
_PSEUDO_TOKENS: Final = 5.0
_LARGEST_TAIL: Final = 1000.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Attention:
    """What expected attention is computed from, in one layer (see `kvstore.codecs.importance`)."""

    mean_NH: NDArray[np.float32]
    factor_NHJ: NDArray[np.float32]


@dataclass(frozen=True, eq=False, kw_only=True)
class Importance:
    """How important tokens are to one band."""

    at_P: NDArray[np.float32]
    importance_P: NDArray[np.float32]
    tail_T: NDArray[np.float32]
    typical: float
    """Mean of its logarithm over calibration tokens."""

    @property
    def bounds(self) -> NDArray[np.float32]:
        """Logarithms of importance between classes, falling."""
        places = TOP_CLASSES - 0.5 - np.arange(NUM_CLASSES - 1)
        return np.asarray(self.typical + math.log(CLASS_RATIO) * places, dtype=np.float32)

    def classes(self, log_attention_T: NDArray[np.float32]) -> NDArray[np.int64]:
        """Classes of one chunk's tokens."""
        importance_T = importance_of(
            log_attention_T, at_P=self.at_P, importance_P=self.importance_P, tail_T=self.tail_T
        )
        return np.asarray((importance_T[:, None] < self.bounds).sum(axis=1))

    @property
    def of_class_zero(self) -> float:
        """Importance that class 0 stands for."""
        return math.exp(self.typical) * CLASS_RATIO**TOP_CLASSES


def class_scales() -> NDArray[np.float32]:
    """What the step of a class is, relative to that of class 0."""
    return np.asarray(CLASS_RATIO ** (0.5 * np.arange(NUM_CLASSES)), dtype=np.float32)


@dataclass(frozen=True, eq=False, kw_only=True)
class Transform:
    """`x = y @ inverse + bias`, where errors of `y` weigh the same in all directions."""

    bias_C: torch.Tensor
    inverse_RC: torch.Tensor


def metric_of(queries: Queries, geometry: Geometry, *, band: int) -> torch.Tensor:
    """Weights `[C, C]` of an error of one band: of the attention's logits for K, of the layer's output for V."""
    layer, per_head, dim = band // 2, geometry.num_heads // geometry.num_kv_heads, geometry.head_dim
    blocks = []
    for head in range(geometry.num_kv_heads):
        of_group = slice(head * per_head, (head + 1) * per_head)
        if band % 2:
            blocks.append(queries.output_LQHH[layer, of_group].sum(0))
        else:
            moment_H = queries.second_moment_LQHH[layer, of_group].sum(0).diagonal()
            blocks.append(torch.diag(_of_pairs(moment_H, geometry) / dim))
    weights_CC = torch.zeros(geometry.num_channels, geometry.num_channels, dtype=torch.float64)
    for head, block_HH in enumerate(blocks):
        weights_CC[head * dim : (head + 1) * dim, head * dim : (head + 1) * dim] = block_HH
    return weights_CC


def _of_pairs(moment_H: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Means over rotary pairs: rotation mixes the two of a pair."""
    half = len(geometry.inv_freq)
    means = (moment_H[..., :half] + moment_H[..., half : 2 * half]) / 2
    return torch.cat([means, means, moment_H[..., 2 * half :]], -1)


def attention_of(queries: Queries, geometry: Geometry, *, layer: int) -> Attention:
    """What one layer's queries say about where attention will go, wherever the key will stand."""
    shape = (geometry.num_kv_heads, -1, geometry.head_dim)
    mean_NH = queries.mean_LQH[layer].reshape(shape).mean(1)
    second_NH = queries.second_moment_LQHH[layer].diagonal(dim1=1, dim2=2).reshape(shape).mean(1)
    half = len(geometry.inv_freq)
    slow_H = torch.ones(geometry.head_dim, dtype=torch.float64)
    slow_H[: 2 * half] = (geometry.inv_freq <= _FASTEST_RADIANS).double().repeat(2)
    slow_NH = mean_NH * slow_H
    # What is left after the slow part of the mean, fast means included, has no direction: a variance.
    spread_NH = _of_pairs((second_NH - slow_NH.square()).clamp_min(0), geometry)
    scale = geometry.head_dim**-0.5
    return Attention(
        mean_NH=(slow_NH * scale).numpy().astype(np.float32),
        factor_NHJ=torch.diag_embed(spread_NH.sqrt() * scale).numpy().astype(np.float32),
    )


def attention_of_chunks(
    attention: Attention, k_TC: torch.Tensor, geometry: Geometry, *, groups: int
) -> list[NDArray[np.float32]]:
    """Logarithms of expected attention `[G, T]` of every chunk of one context's keys."""
    return [
        log_attention(
            chunk_TC.reshape(len(chunk_TC), geometry.num_kv_heads, geometry.head_dim).numpy(),
            mean_NH=attention.mean_NH,
            factor_NHJ=attention.factor_NHJ,
            groups=groups,
        )
        for chunk_TC in torch.split(k_TC, CHUNK_TOKENS)
    ]


def energies(gradient_TC: torch.Tensor, inverse_root_CC: torch.Tensor) -> NDArray[np.float64]:
    """How much the answer depends on each token of a band, per unit of the metric, whose power -1/2 is given."""
    whitened_TC = gradient_TC @ inverse_root_CC
    return np.asarray(whitened_TC.double().square().mean(1).numpy())


def fit_importance(
    log_attention_ST: Sequence[NDArray[np.float32]], energy_ST: Sequence[NDArray[np.float64]], *, trust: float
) -> Importance:
    """Importance by expected attention and by distance from the end, from contexts of equal length.

    Args:
        log_attention_ST: Per context, of all its tokens.
        energy_ST: Per context, what `energies` says.
        trust: Exponent of what is measured.
    """
    attention_ST, energy = np.stack(log_attention_ST), np.stack(energy_ST)
    rest = attention_ST.shape[1] - TAIL_BINS[-1]
    attention_X, energy_X = attention_ST[:, SKIPPED_TOKENS:rest].ravel(), energy[:, SKIPPED_TOKENS:rest].ravel()
    usual = max(float(energy_X.mean()), float(np.finfo(np.float64).tiny))
    edges = np.concatenate([[-np.inf], np.quantile(attention_X, QUANTILES), [np.inf]])
    at, measured = [], []
    for low, high in itertools.pairwise(edges):
        inside = (attention_X >= low) & (attention_X < high)
        if inside.any():
            at.append(float(attention_X[inside].mean()))
            pseudo = 0.1 * usual * _PSEUDO_TOKENS
            measured.append((energy_X[inside].sum() + pseudo) / (inside.sum() + _PSEUDO_TOKENS))
    # More attention is never less important: what looks so is noise.
    log_P = np.log(np.maximum.accumulate(measured))
    curve_P = (trust * log_P + (1 - trust) * math.log(usual)).astype(np.float32)
    at_P, tail_T = np.asarray(at, dtype=np.float32), _tail(energy, usual=usual)
    logs = [
        importance_of(each[start : start + CHUNK_TOKENS], at_P=at_P, importance_P=curve_P, tail_T=tail_T)
        for each in log_attention_ST
        for start in range(0, len(each), CHUNK_TOKENS)
    ]
    typical = float(np.concatenate(logs).mean())
    return Importance(at_P=at_P, importance_P=curve_P, tail_T=tail_T, typical=typical)


def _tail(energy_ST: NDArray[np.float64], *, usual: float) -> NDArray[np.float32]:
    """What the last tokens of a chunk get on top, the very last first."""
    by_distance_ST = energy_ST[:, ::-1]
    ratios: list[float] = []
    start = 0
    for stop in TAIL_BINS:
        part = by_distance_ST[:, start:stop]
        # One token that everything looks at says nothing about its place.
        ratio = float(np.minimum(part, np.quantile(part, 0.98)).mean()) / usual
        ratios.append(min(max(ratio, 1.0), _LARGEST_TAIL, ratios[-1] if ratios else _LARGEST_TAIL))
        start = stop
    widths = np.diff([0, *TAIL_BINS])
    return np.repeat(np.log1p((np.array(ratios) - 1) / CHUNKS_PER_TAIL), widths).astype(np.float32)


def symmetric_power(matrix: torch.Tensor, power: float) -> torch.Tensor:
    """Power of a symmetric positive matrix, its smallest eigenvalues raised to a millionth of the largest."""
    values, vectors = torch.linalg.eigh(matrix.double())
    values = values.clamp_min(_EIGENVALUE_FLOOR * float(values.max()))
    return (vectors * values**power) @ vectors.T


def fit_transform(x_TC: torch.Tensor, importance_T: NDArray[np.float64], metric_CC: torch.Tensor) -> Transform:
    """The Karhunen-Loeve transform in the metric, rows by falling variance; tokens count as they are important."""
    weight_T = torch.from_numpy(importance_T / importance_T.mean())[:, None]
    x_TC = x_TC.double()
    bias_C = (x_TC * weight_T).mean(0)
    centred_TC = x_TC - bias_C
    covariance_CC = (centred_TC * weight_T).T @ centred_TC / len(x_TC)
    root_CC, inverse_CC = symmetric_power(metric_CC, 0.5), symmetric_power(metric_CC, -0.5)
    vectors = torch.linalg.eigh(root_CC @ covariance_CC @ root_CC)[1].flip(1)
    # An eigenvector has no sign; without one the same text would not give the same profile everywhere.
    vectors = vectors * torch.sign(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)))
    return Transform(bias_C=bias_C, inverse_RC=vectors.T @ inverse_CC)
