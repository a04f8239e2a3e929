"""A profile on a GPU: what the kernels read.

Covers: the arrays, in the order and the padding that the kernels expect.
Does not cover: the profile (`kvstore.codecs.profile`), the kernels (`kvstore.codecs.triton_kernels`).
Shape letters: B bands (layer, K or V, group), V levels, R rows, padded to a multiple of 64, C channels, K tables,
X contexts, P rotary pairs.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.errors import CallerError
from kvstore.codecs.profile import NUM_CONTEXTS, Profile
from kvstore.codecs.rans import coder_tables

ROW_STEP: Final = 64
"""Rows of one step of the inverse transform; rows are padded to a multiple of it, with zeros."""


class OddHeadError(CallerError):
    """A profile of a model whose heads have an odd number of channels; they are decoded on the CPU."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Tables:
    """A profile's arrays on one device."""

    lookup: torch.Tensor
    """int32 `[K + 1, 4096]`, as in `kvstore.codecs.rans`."""
    table_ids: torch.Tensor
    """int32 `[B, V, R]`: a row's tables, eight bits for each context."""
    basis: torch.Tensor
    """int8 `[B, C, R]`: along the rows, as matrix units of 8-bit integers want them."""
    channels: torch.Tensor
    """float32 `[B, C, 2]`: scale, bias."""
    token_scales: torch.Tensor
    """float32 `[B, 8]`."""
    pair_columns: torch.Tensor
    """int32 `[2, P]`: channels of a head, those that are rotated together under each other, rotated pairs first."""
    row_pitch: int
    """R."""


def tables_of(profile: Profile, *, device: torch.device) -> Tables:
    """Copy a profile to a device.

    Cost:
        C * R bytes for each band: 67 MB for Llama-3-8B with one head group.

    Raises:
        OddHeadError: The kernels take channels in pairs, and one would be left.
    """
    if profile.head_dim % 2:
        raise OddHeadError(
            f"profile {profile.id[:12]} is for heads of {profile.head_dim} channels; a GPU decodes even numbers only: "
            "use kvstore.codecs.transform"
        )
    bands = [band for layer in profile.bands for pair in layer for band in pair]
    most_rows = max(1, *(band.rows_per_level[-1] for band in bands))
    row_pitch = most_rows + -most_rows % ROW_STEP
    coder = coder_tables(profile.frequencies_KS)
    # Lanes without a row have the table that codes nothing.
    nobody = np.full((profile.num_levels, row_pitch, NUM_CONTEXTS), len(coder.lut_KF) - 1, np.int32)
    ids = np.broadcast_to(_packed(nobody), (len(bands), *nobody.shape[:2])).copy()
    basis = np.zeros((len(bands), profile.num_channels, row_pitch), np.int8)
    for index, band in enumerate(bands):
        for level, live in enumerate(band.rows_per_level):
            ids[index, level, :live] = _packed(band.table_ids_VRX[level, :live].astype(np.int32))
        basis[index, :, :live] = band.basis_RC[:live].T
    channels = np.stack([np.stack([band.scale_C, band.bias_C], axis=1) for band in bands])

    def move(array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return Tables(
        lookup=move(coder.lut_KF.view(np.int32)),
        table_ids=move(ids),
        basis=move(basis),
        channels=move(channels),
        token_scales=move(np.stack([band.token_scales for band in bands])),
        pair_columns=move(pair_columns(profile)),
        row_pitch=row_pitch,
    )


def _packed(ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """Table ids of three contexts in one number."""
    packed: NDArray[np.int32] = ids[..., 0] | ids[..., 1] << 8 | ids[..., 2] << 16
    return packed


def pair_columns(profile: Profile) -> NDArray[np.int32]:
    """`[2, P]`: left and right channel of every pair, rotated ones first; the rest is paired in any order."""
    rotary = 2 * len(profile.inv_freq)
    rotated = np.arange(rotary).reshape(2, -1) if profile.is_neox else np.arange(rotary).reshape(-1, 2).T
    rest = np.arange(rotary, profile.head_dim).reshape(2, -1)
    return np.concatenate([rotated, rest], axis=1).astype(np.int32)
