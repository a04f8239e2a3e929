"""Entropy tables of a profile, from the symbols of calibration text.

Covers: counting symbols by level, row and context; which rows are coded; few tables for many rows; frequencies.
Does not cover: quantising (`kvstore.codecs.calibrate_fit`), coding (`kvstore.codecs.rans`).
Shape letters: T tokens, R rows, V levels, X contexts, S symbols, K tables, M histograms.
"""

from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.codecs.profile import FREQUENCY_SUM, NUM_CLASSES, NUM_CONTEXTS

NUM_SYMBOLS: Final = 127
"""Of all tables, around `ZERO`; what lies outside is escaped."""
ZERO: Final = NUM_SYMBOLS // 2
TABLES_BY_KIND: Final = {"base": 38, "trit": 12, "bit": 6, "class": 8}
"""How many tables the coarsest level, refinements of 0, other refinements, and classes share: 64 at most."""
DEAD_SHARE: Final = 1e-3
"""A row is not coded at a level where fewer of its symbols, and of those of all rows behind it, are not 0."""
_ESCAPE_SHARE: Final = 1e-5
"""Of symbols that a table may leave to escapes, which cost 48 bits; one more frequency costs .0004 bits everywhere."""
_ROUNDS: Final = 25

Counts = NDArray[np.int64]


def count_symbols(values_TR: NDArray[np.int16], starts: Iterable[int], *, num_levels: int) -> Counts:
    """How often each symbol occurs, `[V, R, X, S]`.

    Args:
        values_TR: Quantised components at the finest level.
        starts: Where chunks start: the token before is then no context.
        num_levels: V.
    """
    tokens, rows = values_TR.shape
    size, sign = np.abs(values_TR.astype(np.int32)), np.sign(values_TR).astype(np.int32)
    counts = np.zeros((num_levels, rows, NUM_CONTEXTS, NUM_SYMBOLS), np.int64)
    first = np.zeros(tokens, bool)
    first[list(starts)] = True
    for level in range(num_levels):
        missing = num_levels - 1 - level
        here = size >> missing
        if level:
            known = here >> 1
            symbols = np.where(known == 0, sign * here, here & 1)
        else:
            known = np.vstack([np.zeros((1, rows), np.int32), here[:-1]])
            known[first] = 0
            symbols = sign * here
        places = np.clip(symbols, -ZERO, ZERO) + ZERO
        flat = (np.arange(rows) * NUM_CONTEXTS + np.minimum(known, NUM_CONTEXTS - 1)) * NUM_SYMBOLS + places
        counted = np.bincount(flat.ravel(), minlength=rows * NUM_CONTEXTS * NUM_SYMBOLS)
        counts[level] = counted.reshape(rows, NUM_CONTEXTS, NUM_SYMBOLS)
        signed = slice(None) if level == 0 else slice(0, 1)
        # No component prefers a sign.
        counts[level, :, signed] += counts[level, :, signed, ::-1]
    return counts


def live_rows(counts_RXS: Counts) -> int:
    """Rows that are coded at one level: all up to the last that is not nearly always 0."""
    total = counts_RXS.sum(axis=(1, 2))
    share_R = 1 - counts_RXS[:, :, ZERO].sum(axis=1) / np.maximum(total, 1)
    alive = np.flatnonzero(share_R > DEAD_SHARE)
    return int(alive[-1]) + 1 if len(alive) else 0


def cluster(counts_MS: Counts, *, count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """At most `count` distributions for many histograms: which is whose, and the distributions `[K, S]`.

    Each round gives every histogram the distribution that codes it in the fewest bits, and every distribution the mean
    of its histograms. Deterministic.
    """
    weights_M = counts_MS.sum(axis=1)
    places = np.abs(np.arange(counts_MS.shape[1]) - ZERO)
    mean_M = (counts_MS @ places) / np.maximum(weights_M, 1)
    order = np.argsort(mean_M, kind="stable")
    # Start: equal parts of the histograms, by their mean magnitude, bits counting more than symbols.
    reached = np.cumsum(weights_M[order] * np.minimum(mean_M[order] + 0.05, 1.0))
    owner_M = np.empty(len(counts_MS), np.int64)
    owner_M[order] = np.minimum(reached / max(reached[-1], 1e-9) * count, count - 1).astype(np.int64)
    for _ in range(_ROUNDS):
        shares_KS = _shares(counts_MS, owner_M)
        bits_MK = -(counts_MS @ np.log2(shares_KS).T)
        best_M = bits_MK.argmin(axis=1)
        if np.array_equal(best_M, owner_M):
            break
        owner_M = best_M
    used, owner_M = np.unique(owner_M, return_inverse=True)
    assert len(used) <= count
    return owner_M, _shares(counts_MS, owner_M)


def _shares(counts_MS: Counts, owner_M: NDArray[np.int64]) -> NDArray[np.float64]:
    used, index_M = np.unique(owner_M, return_inverse=True)
    sums_KS = np.zeros((len(used), counts_MS.shape[1]))
    np.add.at(sums_KS, index_M, counts_MS)
    # A little of every symbol, less the farther out: a histogram with one more symbol must not become impossible.
    places = np.abs(np.arange(counts_MS.shape[1]) - ZERO)
    sums_KS += 0.05 * np.exp(-0.3 * places)
    shares_KS: NDArray[np.float64] = sums_KS / sums_KS.sum(axis=1, keepdims=True)
    return shares_KS


def reach_of(counts_RXS: Counts) -> NDArray[np.float64]:
    """Share of each row's symbols beyond every magnitude, `[R, ZERO + 1]`."""
    by_size_RS = counts_RXS.sum(axis=1)
    sizes = by_size_RS[:, ZERO:].copy()
    sizes[:, 1:] += by_size_RS[:, ZERO - 1 :: -1] if ZERO else 0
    beyond = sizes[:, ::-1].cumsum(axis=1)[:, ::-1] - sizes
    share: NDArray[np.float64] = beyond / np.maximum(sizes.sum(axis=1, keepdims=True), 1)
    return share


def widths(owner_M: NDArray[np.int64], weight_M: Counts, reach_MZ: NDArray[np.float64]) -> list[int]:
    """Largest magnitude that each table codes, so that few symbols of the rows that use it are escaped.

    An encoder escapes what any context of a row cannot code, so the rows' symbols count, not the contexts'.
    """
    result = []
    for table in range(int(owner_M.max()) + 1):
        mine = owner_M == table
        beyond = weight_M[mine] @ reach_MZ[mine] / max(int(weight_M[mine].sum()), 1)
        result.append(max(int(np.argmax(beyond <= _ESCAPE_SHARE)), 1))
    return result


def table_of(share_S: NDArray[np.float64], *, low: int, high: int) -> NDArray[np.uint16]:
    """Whole frequencies that sum to 4096, at least 1 for the values from `low` to `high`, 0 for others."""
    result = np.zeros(len(share_S), np.int64)
    inside = slice(ZERO + low, ZERO + high + 1)
    share = share_S[inside] / share_S[inside].sum()
    exact = share * FREQUENCY_SUM
    whole = np.maximum(np.floor(exact), 1).astype(np.int64)
    while (left := FREQUENCY_SUM - int(whole.sum())) != 0:
        step = 1 if left > 0 else -1
        # Where one more (or less) changes the expected bits most for the better.
        gain = share * np.log2(np.maximum(whole + step, 0.5) / whole)
        gain = np.where((whole == 1) & (step < 0), -np.inf, gain)
        whole[int(gain.argmax())] += step
    result[inside] = whole
    return result.astype(np.uint16)


def table_set(counts: list[Counts], live: list[tuple[int, ...]]) -> tuple[NDArray[np.uint16], list[NDArray[np.uint8]]]:
    """Tables for all bands: frequencies `[K, S]`, and ids `[V, R, X]` of every band.

    Args:
        counts: `[V, R, X, S]` of every band.
        live: Rows coded at each level, of every band.
    """
    ids = [np.zeros(each.shape[:3], np.uint8) for each in counts]
    frequencies: list[NDArray[np.uint16]] = []
    places = {
        kind: [
            (band, level, row, context)
            for band, of_band in enumerate(counts)
            for level in range(of_band.shape[0])
            for row in range(live[band][level])
            for context in range(NUM_CONTEXTS)
            if kind == ("base" if level == 0 else "bit" if context else "trit")
        ]
        for kind in ("base", "trit", "bit")
    }
    for kind, of_kind in places.items():
        if not of_kind:
            continue
        histograms = np.stack([counts[band][level, row, context] for band, level, row, context in of_kind])
        owner_M, shares_KS = cluster(histograms, count=TABLES_BY_KIND[kind])
        wide = [1] * len(shares_KS)
        if kind == "base":
            reach = {band: reach_of(of_band[0]) for band, of_band in enumerate(counts)}
            reach_MZ = np.stack([reach[band][row] for band, _, row, _ in of_kind])
            wide = widths(owner_M, histograms.sum(axis=1), reach_MZ)
        for (band, level, row, context), owner in zip(of_kind, owner_M, strict=True):
            ids[band][level, row, context] = len(frequencies) + owner
        low = 0 if kind == "bit" else -1
        frequencies += [
            table_of(share_S, low=low * width, high=width) for share_S, width in zip(shares_KS, wide, strict=True)
        ]
    if not frequencies:
        frequencies.append(table_of(np.ones(NUM_SYMBOLS), low=-1, high=1))
    return np.stack(frequencies), ids


def class_tables(counts_WS: Counts) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Tables for the classes of tokens `[K, S]`, and which is whose, from counts `[W, NUM_CLASSES]`."""
    padded_WS = np.zeros((len(counts_WS), NUM_SYMBOLS), np.int64)
    padded_WS[:, ZERO : ZERO + NUM_CLASSES] = counts_WS
    owner_W, shares_KS = cluster(padded_WS, count=TABLES_BY_KIND["class"])
    return np.stack([table_of(share_S, low=0, high=NUM_CLASSES - 1) for share_S in shares_KS]), owner_W
