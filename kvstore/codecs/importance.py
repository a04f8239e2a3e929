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

from typing import Any, Final

import numpy as np
from numba import types
from numpy.typing import NDArray

from kvstore.codecs.profile import NUM_CLASSES, Profile, ProfileDataError, derived
from kvstore.compiled import compiled

_NEEDED: Final = ("attention_mean", "attention_factor", "class_bounds")
_CURVE: Final = ("importance_at", "importance", "importance_tail")
_NO_CURVE: Final = np.empty((2, 0, 0), np.float32)

Floats = NDArray[np.float32]


def log_attention(
    k_TNH: Floats, *, mean_NH: Floats, factor_NHJ: Floats, groups: int, diagonal_NH: Floats | None = None
) -> Floats:
    """Logarithm of the attention that each token may expect, relative to the mean of these tokens, `[G, T]`.

    Of the heads of a group, the one counts that needs the token most. `diagonal_NH` is the factor's diagonal, where it
    has nothing else.
    """
    log_NT: Floats = np.einsum("tnh,nh->nt", k_TNH, mean_NH, order="C")
    log_NT += np.float32(0.5) * _squares(k_TNH, factor_NHJ, diagonal_NH)
    log_NT -= log_NT.max(axis=1, keepdims=True)
    log_NT -= np.log(np.exp(log_NT).mean(axis=1, keepdims=True))
    best_GT = log_NT.reshape(groups, len(log_NT) // groups, -1).max(axis=1)
    return np.ascontiguousarray(best_GT)


def _squares(k_TNH: Floats, factor_NHJ: Floats, diagonal_NH: Floats | None) -> Floats:
    """`|k F|^2`, `[N, T]`. Of a diagonal F all other products are zero."""
    if diagonal_NH is None:
        spread_NTJ = k_TNH.transpose(1, 0, 2) @ factor_NHJ
        return np.square(spread_NTJ, out=spread_NTJ).sum(axis=2)
    spread_TNH = np.multiply(k_TNH, diagonal_NH, order="C")
    return np.square(spread_TNH, out=spread_TNH).sum(axis=2).T


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
        mean_NH=encoder["attention_mean"][layer].astype(np.float32, copy=False),
        factor_NHJ=encoder["attention_factor"][layer].astype(np.float32, copy=False),
        groups=groups,
        diagonal_NH=None if diagonals is None else diagonals[layer],
    )
    at, importance, tail, bounds = (
        np.ascontiguousarray(encoder[name][layer], np.float32) if name in encoder else _NO_CURVE
        for name in (*_CURVE, _NEEDED[-1])
    )
    classes = np.empty((2, groups, len(k_TNH)), np.int16)
    _classify(attention_GT, at, importance, tail, bounds, classes)
    return classes


_FLOATS_3: Final = types.Array(types.float32, 3, "C", readonly=True)


@compiled(types.void(types.float32[:, ::1], *[_FLOATS_3] * 4, types.int16[:, :, ::1]))
def _classify(attention: Any, at: Any, importance: Any, tail: Any, bounds: Any, classes: Any) -> None:
    """Classes by K and V, group and token, as `importance_of` and the bounds say; no knots: of the attention itself."""
    knots, tokens = at.shape[2], attention.shape[1]
    for kv in range(2):
        for group in range(attention.shape[0]):
            for token in range(tokens):
                seen = attention[group, token]
                if knots:
                    x, y = at[kv, group], importance[kv, group]
                    below = -1
                    for knot in range(knots):
                        below += x[knot] <= seen
                    if below < 0:
                        seen = y[0]
                    elif below == knots - 1:
                        seen = y[below]
                    else:
                        first, level = np.float64(x[below]), np.float64(y[below])
                        slope = (np.float64(y[below + 1]) - level) / (np.float64(x[below + 1]) - first)
                        seen = np.float32(slope * (np.float64(seen) - first) + level)
                    if tokens - 1 - token < tail.shape[2]:
                        seen += tail[kv, group, tokens - 1 - token]
                number = 0
                for bound in range(bounds.shape[2]):
                    number += bounds[kv, group, bound] > seen
                classes[kv, group, token] = number


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
