"""How finely each token of a chunk is stored: its class, guessed from its keys and its place.

Covers: expected attention, importance, classes. Does not cover: how these numbers are measured
(`kvstore.codecs.calibrate_fit`), what a class does to a value (`kvstore.codecs.transform_encode`).
Shape letters: L layers, T tokens, N KV heads, H head dimension, G head groups, J factor's columns, P knots, B bounds.

Few tokens get most of the attention, and the last tokens of a chunk matter most to what follows it. An error counts as
much as its token is attended to; so tokens that will hardly be looked at are stored with far larger steps. Only
encoders guess: a chunk says which class each token has.

What a profile holds in `encoder` for it; all or none:

    attention_mean    f32 [L, N, H]     mean query (un-rotated, scaled as the model scales it), per KV head
    attention_factor  f32 [L, N, H, J]  factor F of the queries' covariance F F^T: a token's expected attention is
                                        exp(mean . k + |k F|^2 / 2)
    class_bounds      f32 [L, 2, G, B]  a token's class is the number of bounds that are above its importance; falling

and optionally, where importance is not just the expected attention:

    importance_at     f32 [L, 2, G, P]  rising: logarithms of expected attention, relative to the chunk's mean
    importance        f32 [L, 2, G, P]  logarithm of importance there; linear between, constant outside
    importance_tail   f32 [L, 2, G, T]  what is added to that for the chunk's last tokens, the very last one first
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.codecs.profile import NUM_CLASSES, Profile, ProfileDataError, derived

_NEEDED: Final = ("attention_mean", "attention_factor", "class_bounds")
_CURVE: Final = ("importance_at", "importance", "importance_tail")

Floats = NDArray[np.float32]


def log_attention(
    k_TNH: Floats, *, mean_NH: Floats, factor_NHJ: Floats, groups: int, diagonal_NH: Floats | None = None
) -> Floats:
    """Logarithm of the attention that each token may expect, relative to the mean of these tokens, `[G, T]`.

    Of the heads of a group, the one counts that needs the token most. `diagonal_NH` is the factor's diagonal, where it
    has nothing else.
    """
    by_head = k_TNH.transpose(1, 0, 2)
    spread_NTJ = _spread(by_head, factor_NHJ, diagonal_NH)
    log_NT = np.einsum("nth,nh->nt", by_head, mean_NH) + np.float32(0.5) * np.square(spread_NTJ, out=spread_NTJ).sum(
        axis=2
    )
    log_NT = log_NT - log_NT.max(axis=1, keepdims=True)
    log_NT -= np.log(np.exp(log_NT).mean(axis=1, keepdims=True))
    best_GT: Floats = log_NT.reshape(groups, len(log_NT) // groups, -1).max(axis=1)
    return best_GT


def _spread(k_NTH: Floats, factor_NHJ: Floats, diagonal_NH: Floats | None) -> Floats:
    """`k F`. Of a diagonal F all other products are zero."""
    if diagonal_NH is None:
        return k_NTH @ factor_NHJ
    return np.multiply(k_NTH, diagonal_NH[:, None], order="C")


def _diagonals(factor_LNHJ: Floats) -> Floats | None:
    """`[L, N, H]`, if every factor is diagonal: most profiles', as covariances of single dimensions say nearly all."""
    if factor_LNHJ.shape[2] != factor_LNHJ.shape[3]:
        return None
    diagonal_LNH = np.diagonal(factor_LNHJ, axis1=2, axis2=3).astype(np.float32)
    return diagonal_LNH if np.count_nonzero(factor_LNHJ) == np.count_nonzero(diagonal_LNH) else None


def importance_of(log_attention_T: Floats, *, at_P: Floats, importance_P: Floats, tail_T: Floats) -> Floats:
    """Logarithm of the importance of a chunk's tokens for one band."""
    importance_T = np.interp(log_attention_T, at_P, importance_P).astype(np.float32)
    last = min(len(tail_T), len(importance_T))
    if last:
        importance_T[-last:] += tail_T[:last][::-1]
    return importance_T


def token_classes(profile: Profile, k_TNH: Floats, *, layer: int) -> NDArray[np.int16] | None:
    """Classes `[2, G, T]` of the tokens of one layer, from their un-rotated keys; None: all are of class 0.

    Raises:
        ProfileDataError: The encoder's arrays do not fit the model.
    """
    if not all(name in profile.encoder for name in _NEEDED) or not len(k_TNH):
        return None
    encoder, groups, diagonals = profile.encoder, profile.groups, derived(profile, _checked_diagonals)
    attention_GT = log_attention(
        k_TNH,
        mean_NH=encoder["attention_mean"][layer].astype(np.float32),
        factor_NHJ=encoder["attention_factor"][layer].astype(np.float32),
        groups=groups,
        diagonal_NH=None if diagonals is None else diagonals[layer],
    )
    classes = np.empty((2, groups, len(k_TNH)), np.int16)
    for kv in (0, 1):
        for group in range(groups):
            importance_T = attention_GT[group]
            if _CURVE[0] in encoder:
                at_P, importance_P, tail_T = (encoder[name][layer, kv, group] for name in _CURVE)
                importance_T = importance_of(importance_T, at_P=at_P, importance_P=importance_P, tail_T=tail_T)
            bounds_B = encoder["class_bounds"][layer, kv, group]
            classes[kv, group] = (bounds_B[:, None] > importance_T).sum(axis=0)
    return classes


def _checked_diagonals(profile: Profile) -> Floats | None:
    """The factors' diagonals, of arrays that fit the model."""
    encoder, bands = profile.encoder, (profile.num_layers, 2, profile.groups)
    heads = (profile.num_layers, profile.num_kv_heads, profile.head_dim)
    mean, factor, bounds = (encoder[name] for name in _NEEDED)
    right = mean.shape == heads and factor.ndim == 4 and factor.shape[:3] == heads
    right = right and bounds.shape == (*bands, NUM_CLASSES - 1)
    if any(name in encoder for name in _CURVE):
        curve = [encoder.get(name) for name in _CURVE]
        right = right and all(each is not None and each.ndim == 4 and each.shape[:3] == bands for each in curve)
        right = right and encoder[_CURVE[0]].shape == encoder[_CURVE[1]].shape and encoder[_CURVE[0]].size > 0
        right = right and bool((np.diff(encoder[_CURVE[0]], axis=-1) >= 0).all())
    if not right:
        raise ProfileDataError(f"encoder's {', '.join((*_NEEDED, *_CURVE))} do not fit each other or the model")
    return _diagonals(factor)
