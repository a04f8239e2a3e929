"""Make a profile for the `transform` codec from a model and text: what `learnonce calibrate` does.

Covers: the order of the work, the step by trial on text that was not used for the rest, the finished profile.
Does not cover: the model (`kvstore.codecs.calibrate_model`), the mathematics (`kvstore.codecs.calibrate_fit`), tables
(`kvstore.codecs.calibrate_tables`). Imports torch and transformers: nothing that serves requests imports this.
Shape letters: as in those modules.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.codecs import calibrate_tables as tables
from kvstore.codecs.calibrate_fit import (
    CHUNK_TOKENS,
    TRUST,
    Attention,
    Importance,
    Transform,
    attention_of,
    attention_of_chunks,
    class_scales,
    energies,
    fit_importance,
    fit_transform,
    metric_of,
    symmetric_power,
)
from kvstore.codecs.calibrate_model import SKIPPED_TOKENS, CalibrationError, CalibrationModel, Geometry, Segment
from kvstore.codecs.profile import NUM_CLASSES, Band, Profile
from kvstore.model_digest import model_digest

NUM_LEVELS: Final = 3
TARGET_LEVEL: Final = 1
"""Level that meets the target; the one below is half as fine, the one above twice."""
ROUNDING: Final = 0.25
"""Added to magnitudes in units of the finest bin: a dead zone of 1.5 bins there, of nearly 2 at the coarsest level."""
_QUERY_PIECES: Final = 4
_TRIALS: Final = 4
_CLOSE_RATIO: Final = 0.06
_SLOPE: Final = 1.8
"""Of the logarithm of the divergence over that of the step, measured."""
_LARGEST_VALUE: Final = (1 << 13) - 1

OnProgress = Callable[[str, int, int], None]
"""Told what is done, how much of it, and of how much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSettings:
    """How a profile is made."""

    num_pieces: int = 24
    """Pieces that are read, from all texts in turn."""
    context_tokens: int = 1536
    """Tokens of every piece whose KV is looked at."""
    following_tokens: int = 384
    """Tokens of every piece behind those: what is predicted with that KV."""
    num_trials: int = 4
    """How many of them are kept for choosing the step."""
    target_kl: float = 0.008
    """Mean KL divergence of next tokens, in nats, that the middle level may cause."""
    groups: int = 1
    """Head groups: the largest tensor-parallel size that is to read just its part."""
    seed: int = 1


@dataclass(frozen=True, eq=False, kw_only=True)
class _FittedBand:
    transform: Transform
    importance: Importance


@dataclass(frozen=True, eq=False, kw_only=True)
class _Symbols:
    """One band of one context, quantised at the finest level."""

    values_TR: NDArray[np.int16]
    classes_T: NDArray[np.int64]


def calibrate(
    model_path: Path, texts: Sequence[str], *, settings: CalibrationSettings, name: str, on_progress: OnProgress
) -> Profile:
    """Make a profile.

    The same model, texts and settings give the same profile on one kind of machine with one number of threads.

    Args:
        model_path: A folder that transformers can load, or a name.
        texts: What the model will be asked about, of all kinds; each of one piece or more.
        settings: How much to read, and how good it has to be.
        name: The model's name in the profile.
        on_progress: Called before the first and after every step of each part.

    Raises:
        CalibrationError: Not a model like Llama, texts too short, or a target that no step reaches.

    Cost:
        About 15 s per piece of a model of 135 million parameters on one core; memory for the KV of all pieces in
        float32 (71 MB each, there).
    """
    if not texts or not 1 <= settings.num_trials < settings.num_pieces:
        raise CalibrationError(f"{len(texts)} texts, {settings.num_pieces} pieces, {settings.num_trials} for trials")
    model = CalibrationModel(
        model_path, context_tokens=settings.context_tokens, following_tokens=settings.following_tokens
    )
    shape = model.geometry
    if settings.groups < 1 or shape.num_kv_heads % settings.groups:
        raise CalibrationError(f"{settings.groups} head groups of {shape.num_kv_heads} KV heads")
    pieces = model.cut(texts, count=settings.num_pieces)
    learned, tried = pieces[: -settings.num_trials], pieces[-settings.num_trials :]
    of_queries = learned[:_QUERY_PIECES]
    steps = _Steps("queries", len(of_queries), on_progress)
    queries = model.queries(of_queries, on_piece=steps.one)
    metrics = [metric_of(queries, shape, band=band) for band in range(2 * shape.num_layers)]
    attention = [attention_of(queries, shape, layer=layer) for layer in range(shape.num_layers)]
    roots = [symmetric_power(metric_CC, -0.5).float() for metric_CC in metrics]
    kv: list[torch.Tensor] = []
    energy: list[list[NDArray[np.float64]]] = []
    steps = _Steps("reading", len(learned), on_progress)
    for index, piece in enumerate(learned):
        segment = model.read(piece, seed=settings.seed * 1_000_003 + index)
        assert segment.gradient_WTC is not None
        kv.append(segment.kv_WTC)
        energy.append([energies(g, root) for g, root in zip(segment.gradient_WTC, roots, strict=True)])
        steps.one()
    fit = _Fit(shape, settings, attention)
    steps = _Steps("transforms", 2 * shape.num_layers, on_progress)
    for band, metric_CC in enumerate(metrics):
        fit.add(band, [each[band & ~1] for each in kv], [each[band] for each in kv], metric_CC, energy)
        steps.one()
    trials = [model.read(piece, seed=None) for piece in tried]
    step, kl = _step_for(fit, model, trials, target_kl=settings.target_kl, on_progress=on_progress)
    notes = {
        "calibrated on": f"{len(learned)} pieces of {len(kv[0][0])} tokens from {len(texts)} texts",
        "kl of the middle level": f"{kl:.5f} on {len(trials)} other pieces of these texts",
        "settings": repr(settings),
    }
    digest = model_digest(str(model_path))
    return _finish(fit, kv, step=step, name=name, digest=digest, notes=notes, on_progress=on_progress)


class _Steps:
    """Progress of one part."""

    def __init__(self, what: str, total: int, on_progress: OnProgress) -> None:
        self._what, self._total, self._on_progress, self._done = what, total, on_progress, 0
        on_progress(what, 0, total)

    def one(self) -> None:
        """One step is done."""
        self._done += 1
        self._on_progress(self._what, self._done, self._total)


class _Fit:
    """Everything but the step, by band and head group."""

    def __init__(self, geometry: Geometry, settings: CalibrationSettings, attention: list[Attention]) -> None:
        self.geometry, self.groups, self.attention = geometry, settings.groups, attention
        self.bands: list[list[_FittedBand]] = []

    def channels(self, group: int) -> slice:
        """A group's channels."""
        width = self.geometry.num_channels // self.groups
        return slice(group * width, (group + 1) * width)

    def log_attention(self, k_TC: torch.Tensor, *, layer: int) -> list[NDArray[np.float32]]:
        """Of every chunk of a context, `[G, T]`."""
        return attention_of_chunks(self.attention[layer], k_TC, self.geometry, groups=self.groups)

    def add(
        self,
        band: int,
        k: Sequence[torch.Tensor],
        x: Sequence[torch.Tensor],
        metric_CC: torch.Tensor,
        energy: Sequence[Sequence[NDArray[np.float64]]],
    ) -> None:
        """Fit the next band to its values `x`, with the keys `k` of its layer, all by piece."""
        chunks = [self.log_attention(each, layer=band // 2) for each in k]
        fitted = []
        for group in range(self.groups):
            by_piece = [[chunk_GT[group] for chunk_GT in of_piece] for of_piece in chunks]
            whole = [np.concatenate(of_piece) for of_piece in by_piece]
            importance = fit_importance(whole, [each[band] for each in energy], trust=TRUST[band % 2])
            scales = np.square(class_scales().astype(np.float64))
            flat = [chunk for of_piece in by_piece for chunk in of_piece]
            weights = [importance.of_class_zero / scales[importance.classes(chunk)] for chunk in flat]
            rows = np.concatenate(weights).reshape(len(x), -1)[:, SKIPPED_TOKENS:].ravel()
            part = self.channels(group)
            samples_TC = torch.cat([each[SKIPPED_TOKENS:, part] for each in x])
            transform = fit_transform(samples_TC, rows, metric_CC[part, part])
            fitted.append(_FittedBand(transform=transform, importance=importance))
        self.bands.append(fitted)

    def band(self, band: int, group: int, *, step: float) -> Band:
        """The transform in whole numbers, still without tables."""
        fitted = self.bands[band][group]
        # Half of the finest bin of class 0.
        half = 0.5 * step / math.sqrt(fitted.importance.of_class_zero)
        inverse_RC = fitted.transform.inverse_RC.numpy() * half
        scale_C = np.maximum(np.abs(inverse_RC).max(axis=0) / 127, np.finfo(np.float32).tiny).astype(np.float32)
        rows = len(inverse_RC)
        return Band(
            bias_C=fitted.transform.bias_C.numpy().astype(np.float32),
            basis_RC=np.rint(inverse_RC / scale_C).astype(np.int8),
            scale_C=scale_C,
            rows_per_level=(rows,) * NUM_LEVELS,
            table_ids_VRX=np.zeros((NUM_LEVELS, rows, 3), np.uint8),
            token_scales=class_scales(),
            class_table=0,
        )

    def symbols(self, kv_WTC: torch.Tensor, band: int, group: int, coded: Band, inverse_CR: torch.Tensor) -> _Symbols:
        """What the encoder would make of one context, chunk by chunk."""
        importance = self.bands[band][group].importance
        chunks = self.log_attention(kv_WTC[band & ~1], layer=band // 2)
        classes_T = np.concatenate([importance.classes(chunk_GT[group]) for chunk_GT in chunks])
        x_TC = kv_WTC[band][:, self.channels(group)] - torch.from_numpy(coded.bias_C)
        y_TR = x_TC @ inverse_CR / torch.from_numpy(coded.token_scales[classes_T])[:, None]
        size_TR = (y_TR.abs() + ROUNDING).floor().clamp_max(_LARGEST_VALUE)
        return _Symbols(values_TR=(size_TR * y_TR.sign()).numpy().astype(np.int16), classes_T=classes_T)


def _inverse(coded: Band) -> torch.Tensor:
    """From values to finest bins of class 0, as the encoder computes it."""
    decoded_RC = coded.basis_RC.astype(np.float64) * coded.scale_C * 2
    return torch.from_numpy(np.linalg.pinv(decoded_RC)).float()


def _decoded(coded: Band, symbols: _Symbols, *, level: int) -> torch.Tensor:
    """One band's values as a decoder of that level has them."""
    missing = NUM_LEVELS - 1 - level
    size = np.abs(symbols.values_TR.astype(np.int32)) >> missing
    middle_TR = np.where(size > 0, 2 * size + 1, 0) * np.sign(symbols.values_TR)
    sums_TC = middle_TR.astype(np.float32) @ coded.basis_RC.astype(np.float32)
    factor_T = coded.token_scales[symbols.classes_T] * np.float32(1 << missing)
    return torch.from_numpy(coded.bias_C + coded.scale_C * factor_T[:, None] * sums_TC)


def _step_for(
    fit: _Fit, model: CalibrationModel, trials: Sequence[Segment], *, target_kl: float, on_progress: OnProgress
) -> tuple[float, float]:
    """The finest level's step with which the middle level meets the target, and its divergence."""
    num_bands, channels = len(fit.bands), fit.geometry.num_channels
    # What small errors would do: uniform noise of one step in every component of every token.
    values = num_bands * channels * trials[0].kv_WTC.shape[1]
    step = math.sqrt(24 * target_kl / values) / (1 << NUM_LEVELS - 1 - TARGET_LEVEL)
    steps = _Steps("trials", _TRIALS * len(trials), on_progress)
    best = (math.inf, step, math.inf)
    for _ in range(_TRIALS):
        coded = [[fit.band(band, group, step=step) for group in range(fit.groups)] for band in range(num_bands)]
        inverses = [[_inverse(each) for each in of_band] for of_band in coded]
        total = 0.0
        for segment in trials:
            decoded_WTC = torch.empty_like(segment.kv_WTC)
            for band in range(num_bands):
                for group in range(fit.groups):
                    here = coded[band][group]
                    symbols = fit.symbols(segment.kv_WTC, band, group, here, inverses[band][group])
                    values_TC = _decoded(here, symbols, level=TARGET_LEVEL)
                    decoded_WTC[band][:, fit.channels(group)] = values_TC
            decoded_WTC[:, 0] = segment.kv_WTC[:, 0]
            total += model.divergence(segment, decoded_WTC)
            steps.one()
        kl = total / len(trials)
        if not 0 < kl < math.inf:
            raise CalibrationError(f"a step of {step:.3g} gives a divergence of {kl}: the model's KV cannot be coded")
        best = min(best, (abs(math.log(kl / target_kl)), step, kl))
        if best[0] < _CLOSE_RATIO:
            break
        step *= (target_kl / kl) ** (1 / _SLOPE)
    return best[1], best[2]


def _finish(
    fit: _Fit,
    kv: Sequence[torch.Tensor],
    *,
    step: float,
    name: str,
    digest: str,
    notes: Mapping[str, str],
    on_progress: OnProgress,
) -> Profile:
    """Count symbols, make tables, put the profile together."""
    shape, groups = fit.geometry, fit.groups
    flat = [(band, group) for band in range(len(fit.bands)) for group in range(groups)]
    coded, counts, live, classes = [], [], [], np.zeros((len(flat), NUM_CLASSES), np.int64)
    steps = _Steps("tables", len(flat), on_progress)
    for index, (band, group) in enumerate(flat):
        here = fit.band(band, group, step=step)
        inverse_CR = _inverse(here)
        symbols = [fit.symbols(each, band, group, here, inverse_CR) for each in kv]
        values_TR = np.concatenate([each.values_TR[SKIPPED_TOKENS:] for each in symbols])
        at, starts = 0, []
        for each in symbols:
            length = len(each.values_TR) - SKIPPED_TOKENS
            starts += [at, *range(at + CHUNK_TOKENS - SKIPPED_TOKENS, at + length, CHUNK_TOKENS)]
            at += length
            classes[index] += np.bincount(each.classes_T, minlength=NUM_CLASSES)
        counted = tables.count_symbols(values_TR, starts, num_levels=NUM_LEVELS)
        rows = np.maximum.accumulate([tables.live_rows(of_level) for of_level in counted])
        coded.append(here)
        counts.append(counted)
        live.append(tuple(int(n) for n in rows))
        steps.one()
    frequencies_KS, ids = tables.table_set(counts, live)
    of_classes_KS, owner_W = tables.class_tables(classes)
    bands = [
        Band(
            bias_C=each.bias_C,
            basis_RC=each.basis_RC,
            scale_C=each.scale_C,
            rows_per_level=live[index],
            table_ids_VRX=ids[index],
            token_scales=each.token_scales,
            class_table=len(frequencies_KS) + int(owner_W[index]),
        )
        for index, each in enumerate(coded)
    ]
    by_group = [tuple(bands[at : at + groups]) for at in range(0, len(bands), groups)]
    return Profile(
        model=name,
        model_digest=digest,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        groups=groups,
        num_levels=NUM_LEVELS,
        num_exact=1,
        inv_freq=shape.inv_freq.numpy().astype(np.float32),
        is_neox=True,
        bands=tuple((by_group[at], by_group[at + 1]) for at in range(0, len(by_group), 2)),
        frequencies_KS=np.concatenate([frequencies_KS, of_classes_KS]),
        encoder=_encoder_arrays(fit),
        notes=notes,
    )


def _encoder_arrays(fit: _Fit) -> dict[str, NDArray[np.float32]]:
    """What `kvstore.codecs.importance` and `kvstore.codecs.transform_encode` read."""
    shape = (fit.geometry.num_layers, 2, fit.groups)
    flat = [each.importance for of_band in fit.bands for each in of_band]
    knots = max(len(each.at_P) for each in flat)

    def stacked(rows: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        # Fewer knots: the last one again.
        return np.stack([np.pad(row, (0, knots - len(row)), mode="edge") for row in rows]).reshape(*shape, -1)

    return {
        "attention_mean": np.stack([each.mean_NH for each in fit.attention]),
        "attention_factor": np.stack([each.factor_NHJ for each in fit.attention]),
        "class_bounds": np.stack([each.bounds for each in flat]).reshape(*shape, -1),
        "importance_at": stacked([each.at_P for each in flat]),
        "importance": stacked([each.importance_P for each in flat]),
        "importance_tail": np.stack([each.tail_T for each in flat]).reshape(*shape, -1),
        "rounding": np.full(shape, ROUNDING, np.float32),
    }
