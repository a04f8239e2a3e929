"""Synthetic profiles and KV that fits them, for tests of the codec.

Covers: small profiles of any shape, made from a seed; KV drawn from them.
Does not cover: calibrated profiles (`kvstore.codecs.calibrate`).
"""

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.codecs.profile import FREQUENCY_SUM, NUM_CLASSES, NUM_CONTEXTS, Band, Profile
from kvstore.codecs.raw import DTYPES
from kvstore.interfaces import ChunkMeta

_NUM_SCALES = 12
_MAX_SYMBOL = 40


def _table(weights: NDArray[np.float64], support: NDArray[np.bool_]) -> NDArray[np.uint16]:
    """Frequencies that sum to 4096, at least 1 within the support."""
    count = int(support.sum())
    share = np.where(support, weights, 0.0)
    frequencies = np.where(support, 1 + np.floor(share / share.sum() * (FREQUENCY_SUM - count)), 0).astype(np.int64)
    frequencies[np.argmax(frequencies)] += FREQUENCY_SUM - frequencies.sum()
    return frequencies.astype(np.uint16)


def _tables() -> NDArray[np.uint16]:
    """First refinements (sign unknown, known), then classes, then symbols by growing scale."""
    values = np.arange(-_MAX_SYMBOL, _MAX_SYMBOL + 1)
    even = np.ones(len(values))
    tables = [
        _table(even + 2 * (values == 0), np.abs(values) <= 1),
        _table(even, (values == 0) | (values == 1)),
        _table(0.5 ** np.maximum(values, 0), (values >= 0) & (values < NUM_CLASSES)),
    ]
    tables += [
        _table(np.exp(-np.abs(values) / scale), np.abs(values) <= max(3, min(_MAX_SYMBOL, 4 * scale)))
        for scale in np.geomspace(0.25, 16.0, _NUM_SCALES)
    ]
    return np.stack(tables)


def _spread(rows: int) -> NDArray[np.float64]:
    """Of the components, in coarsest bins."""
    return np.geomspace(4.0, 0.03, rows) if rows > 1 else np.array([4.0])


def make_profile(
    *,
    num_layers: int = 2,
    num_kv_heads: int = 2,
    head_dim: int = 8,
    groups: int = 1,
    num_levels: int = 3,
    num_exact: int = 1,
    with_classes: bool = False,
    is_neox: bool = True,
    finest_bin: float = 0.1,
    seed: int = 0,
) -> Profile:
    """A valid profile with random orthogonal bases and tables that suit `make_profile_kv`.

    Components fall from a spread of 4 coarsest bins to far below one, so that some rows are dead at the coarse levels.
    """
    random = np.random.default_rng(seed)
    channels = num_kv_heads // groups * head_dim
    spread_R = _spread(channels)
    live = tuple(int((spread_R * 2**level > 0.25).sum()) for level in range(num_levels))
    ids_VRX = np.zeros((num_levels, channels, NUM_CONTEXTS), np.uint8)
    ids_VRX[1:, :, 1:] = 1
    nearest_R = 3 + np.clip(np.round(np.log(spread_R / 0.25) / np.log(64.0) * (_NUM_SCALES - 1)), 0, _NUM_SCALES - 1)
    for context in range(NUM_CONTEXTS):
        ids_VRX[0, :, context] = np.clip(nearest_R + context - 1, 3, 2 + _NUM_SCALES)

    def band() -> Band:
        rotation = np.linalg.qr(random.standard_normal((channels, channels)))[0]
        scale_C = (np.abs(rotation).max(axis=0) / 127 * finest_bin / 2 * random.uniform(0.5, 2.0)).astype(np.float32)
        basis_RC = np.clip(np.round(rotation * (finest_bin / 2) / scale_C), -127, 127).astype(np.int8)
        return Band(
            bias_C=random.standard_normal(channels).astype(np.float32),
            basis_RC=basis_RC,
            scale_C=scale_C,
            rows_per_level=live,
            table_ids_VRX=ids_VRX,
            token_scales=(1.5 ** np.arange(NUM_CLASSES)).astype(np.float32),
            class_table=2 if with_classes else None,
        )

    rotary = head_dim // 2
    return Profile(
        model="synthetic",
        model_digest="",
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        groups=groups,
        num_levels=num_levels,
        num_exact=num_exact,
        inv_freq=(10000.0 ** (-np.arange(rotary) / max(rotary, 1))).astype(np.float32),
        is_neox=is_neox,
        bands=tuple(
            (tuple(band() for _ in range(groups)), tuple(band() for _ in range(groups))) for _ in range(num_layers)
        ),
        frequencies_KS=_tables(),
        notes={"made": f"kvstore.testing.profiles, seed {seed}"},
    )


def make_profile_meta(
    profile: Profile, *, num_tokens: int, dtype: str = "bfloat16", base_position: int = 0
) -> ChunkMeta:
    """Metadata of a chunk that the profile fits."""
    return ChunkMeta(
        num_tokens=num_tokens,
        num_layers=profile.num_layers,
        num_kv_heads=profile.num_kv_heads,
        head_dim=profile.head_dim,
        dtype=dtype,
        base_position=base_position,
        codec="transform",
        profile=profile.id,
    )


def make_profile_kv(profile: Profile, meta: ChunkMeta, *, seed: int = 0) -> torch.Tensor:
    """KV as the profile expects it (its spread per component), `[L, 2, T, N, H]`, with neighbours that are alike."""
    random = np.random.default_rng(seed)
    kv = np.empty((meta.num_layers, 2, meta.num_tokens, profile.groups, profile.num_channels), np.float32)
    fine = 2.0 ** (profile.num_levels - 1)
    for layer, pair in enumerate(profile.bands):
        for index, groups in enumerate(pair):
            for group, band in enumerate(groups):
                rows = band.basis_RC.shape[0]
                spread_R = _spread(rows)
                size_T1 = random.gamma(2.0, 0.5, (meta.num_tokens, 1))
                y_TR = random.laplace(0.0, 1.0, (meta.num_tokens, rows)) * spread_R * fine * size_T1
                decoded_RC = band.basis_RC.astype(np.float64) * band.scale_C * 2
                kv[layer, index, :, group] = band.bias_C + y_TR @ decoded_RC
    keys = kv[:, 0].reshape(meta.num_layers, meta.num_tokens, meta.num_kv_heads, meta.head_dim)
    kv[:, 0] = _rotated(profile, keys, first=meta.base_position).reshape(kv[:, 0].shape)
    return torch.from_numpy(kv).reshape(meta.shape).to(DTYPES[meta.dtype])


def _rotated(profile: Profile, keys: NDArray[np.float32], *, first: int) -> NDArray[np.float64]:
    """Keys `[L, T, N, H]` at positions from `first` on, in complex arithmetic: not as the codec does it."""
    half = len(profile.inv_freq)
    angles = np.arange(first, first + keys.shape[1])[:, None] * profile.inv_freq.astype(np.float64)
    turn = np.exp(1j * angles)[:, None, :]
    rotated = keys.astype(np.float64)
    one, other = (
        (slice(half), slice(half, 2 * half)) if profile.is_neox else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    )
    turned = (keys[..., one] + 1j * keys[..., other]) * turn
    rotated[..., one], rotated[..., other] = turned.real, turned.imag
    return rotated
