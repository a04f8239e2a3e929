"""Entropy coding of symbols `[tokens, channels]` where every channel has one table.

Covers: frequencies from counts, one stream of symbols and back.
Does not cover: what symbols mean and which table a channel has (`kvstore.codecs.lossless`, `kvstore.codecs.cachegen`),
tables as the coder wants them (`kvstore.codecs.rans`), the inner loops (`kvstore.codecs.rans_vectors`).
Shape letters: T tokens, C channels, K tables, S = 256 symbols.

A stream: 16 states u32, then words u16, little-endian. Sixteen channels are coded side by side, token after token, and
then the next sixteen. After the last symbol every state is back at its start and every word is used: damage that
survives this check has still decoded to the right number of symbols.

Source:
    Asymmetric numeral systems, arXiv:1311.2540. The rate is that of an arithmetic coder, within 0.1 % on KV.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cluster.errors import DataError
from kvstore.codecs import rans_vectors
from kvstore.codecs.profile import FREQUENCY_SUM
from kvstore.codecs.rans import FIRST_STATE, encoder_tables, fill_lookup, nobody_lookup
from kvstore.codecs.rans_vectors import LANES
from kvstore.codecs.raw import CodecDataError
from kvstore.compiled import compiled

SYMBOLS: Final = 256
_STATES_BYTES: Final = 4 * LANES
_WORD_BYTES: Final = 2
_SEARCHED_TOKENS: Final = 64
_CENTRE: Final = 128
"""The inner loops know signed symbols."""

_decode_group: Final[Any] = rans_vectors.decode_group
_encode_group: Final[Any] = rans_vectors.encode_group

Bytes = NDArray[np.uint8]
Ids = NDArray[np.uint16]
Frequencies = NDArray[np.uint16]
Lookup = NDArray[np.uint32]


class TableError(DataError):
    """Frequencies that are no table: they do not sum to 4096."""


def frequencies_of(counts_KS: NDArray[np.int64]) -> Frequencies:
    """Frequencies that sum to 4096, at least 1 for every symbol that was counted.

    Args:
        counts_KS: Not negative. A row of zeros becomes a table that knows symbol 0 only.

    Example:
        >>> counts = np.zeros((1, 256), dtype=np.int64)
        >>> counts[0, :3] = 1_000_000, 1_000_000, 1
        >>> frequencies_of(counts)[0, :4].tolist()
        [2047, 2048, 1, 0]
    """
    frequencies = np.zeros(counts_KS.shape, dtype=np.uint16)
    _normalise(np.ascontiguousarray(counts_KS, dtype=np.int64), frequencies)
    return frequencies


def bits_of(counts_KS: NDArray[np.int64], frequencies_KS: Frequencies) -> float:
    """Bits that symbols of these counts take with these tables; infinite where a table does not know one."""
    if np.any((frequencies_KS == 0) & (counts_KS > 0)):
        return float("inf")
    share = np.where(frequencies_KS > 0, frequencies_KS.astype(np.float64) / FREQUENCY_SUM, 1.0)
    return float(-(counts_KS * np.log2(share)).sum())


def check_frequencies(frequencies: Frequencies) -> None:
    """Refuse what is no table, in `[..., S]`.

    Raises:
        TableError: A table does not sum to 4096.
    """
    sums = frequencies.sum(axis=-1, dtype=np.int64).ravel()
    if np.any(sums != FREQUENCY_SUM):
        wrong = int(np.flatnonzero(sums != FREQUENCY_SUM)[0])
        raise TableError(f"table {wrong} sums to {sums[wrong]}, expected {FREQUENCY_SUM}")


def stream_bound_bytes(num_tokens: int, num_channels: int) -> int:
    """The longest stream: no symbol takes more than one word."""
    return _STATES_BYTES + _WORD_BYTES * num_tokens * -(-num_channels // LANES) * LANES


def encode_rows(symbols_TC: Bytes, *, table_ids_C: Ids, frequencies_KS: Frequencies) -> Bytes:
    """One stream.

    Args:
        symbols_TC: Contiguous. Every symbol must have a frequency in its channel's table.
        table_ids_C: Table of every channel, below K.
        frequencies_KS: Checked by the caller.
    """
    num_tokens, num_channels = symbols_TC.shape
    words = np.empty(num_tokens * -(-num_channels // LANES) * LANES, dtype=np.uint32)
    states = np.full(LANES, FIRST_STATE, dtype=np.uint32)
    first = _encode(symbols_TC, table_ids_C, encoder_tables(frequencies_KS), states, words)
    return np.concatenate([states.view(np.uint8), words[first:].astype(np.uint16).view(np.uint8)])


def decode_rows(stream: Bytes, *, table_ids_C: Ids, lookup_KE: Lookup, out_TC: Bytes) -> None:
    """Read one stream into `out_TC` (contiguous), whose shape says how many symbols there are.

    Args:
        stream: Exactly the bytes that were written.
        table_ids_C: Table of every channel, below K.
        lookup_KE: As `kvstore.codecs.rans.lookup_tables` made them.
        out_TC: Filled with symbols.

    Raises:
        CodecDataError: The stream is not one of so many symbols with these tables.
    """
    words, states = _split(stream)
    _check_end(_decode(words, states, table_ids_C, lookup_KE, out_TC), words, states, out_TC)


def decode_own_rows(stream: Bytes, *, frequencies_CS: Frequencies, out_TC: Bytes) -> None:
    """As `decode_rows`, where every channel has a table of its own; frequencies are checked by the caller.

    Cost:
        Makes the tables, for sixteen channels at a time so that they stay in the cache: one to three microseconds each.
        For few tokens that is not worth it: then every symbol is searched for.
    """
    words, states = _split(stream)
    if len(out_TC) < _SEARCHED_TOKENS:
        read = _decode_searched(words, states, frequencies_CS, out_TC)
    else:
        lookup_KE = np.empty((LANES + 1, FREQUENCY_SUM), np.uint32)
        lookup_KE[LANES] = nobody_lookup()
        read = _decode_own(words, states, frequencies_CS, lookup_KE, out_TC)
    _check_end(read, words, states, out_TC)


def _split(stream: Bytes) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Words and states."""
    if len(stream) < _STATES_BYTES or (len(stream) - _STATES_BYTES) % _WORD_BYTES:
        raise CodecDataError(f"stream of {len(stream)} bytes is not {_STATES_BYTES} bytes of states and whole words")
    raw = stream.tobytes()
    # A group's worth of zeros behind the words: the loop reads ahead before it sees that there are none.
    words = np.zeros((len(stream) - _STATES_BYTES) // _WORD_BYTES + LANES, dtype=np.uint32)
    words[:-LANES] = np.frombuffer(raw, dtype=np.uint16, offset=_STATES_BYTES)
    return words, np.frombuffer(raw, dtype=np.uint32, count=LANES).copy()


def _check_end(read: int, words: NDArray[np.uint32], states: NDArray[np.uint32], out_TC: Bytes) -> None:
    if read != len(words) - LANES or np.any(states != FIRST_STATE):
        raise CodecDataError(f"stream of {len(words) - LANES} words does not hold {out_TC.shape} symbols")


@compiled("void(int64[:, ::1], uint16[:, ::1])")
def _normalise(counts: NDArray[np.int64], frequencies: Frequencies) -> None:
    for table in range(counts.shape[0]):
        total = 0
        for symbol in range(SYMBOLS):
            total += counts[table, symbol]
        if total == 0:
            frequencies[table, 0] = FREQUENCY_SUM
            continue
        left = FREQUENCY_SUM
        for symbol in range(SYMBOLS):
            if counts[table, symbol] > 0:
                share = max(1, int(counts[table, symbol] * (FREQUENCY_SUM / total) + 0.5))
                frequencies[table, symbol] = share
                left -= share
        # The largest ones carry the rounding: there it costs least.
        while left != 0:
            largest = 0
            for symbol in range(1, SYMBOLS):
                if frequencies[table, symbol] > frequencies[table, largest]:
                    largest = symbol
            change = left if left > 0 else -min(-left, max(1, (frequencies[table, largest] - 1) // 8))
            frequencies[table, largest] += change
            left -= change


@compiled("intp(uint32[::1], intp, uint32[::1], uint32[:, ::1], int32[:, ::1], int16[:, ::1], intp, uint8[:, ::1])")
def _decode_tile(
    words: NDArray[np.uint32],
    at: int,
    states: NDArray[np.uint32],
    lookup: Lookup,
    entries: NDArray[np.int32],
    tile: NDArray[np.int16],
    first: int,
    out: Bytes,
) -> int:
    """Sixteen channels of `out` from `first` on; where their words end."""
    at = _decode_group(
        lookup.ctypes.data, words.ctypes.data, at, len(words) - LANES, states.ctypes.data, entries.ctypes.data,
        tile.ctypes.data, len(tile),
    )  # fmt: skip
    width = min(LANES, out.shape[1] - first)
    for token in range(len(tile)):
        for lane in range(width):
            out[token, first + lane] = np.uint8(tile[token, lane] + _CENTRE)
    return at


@compiled("intp(uint32[::1], uint32[::1], uint16[::1], uint32[:, ::1], uint8[:, ::1])")
def _decode(words: NDArray[np.uint32], states: NDArray[np.uint32], ids: Ids, lookup: Lookup, out: Bytes) -> int:
    """Words read; more than there are if they were not enough."""
    tile = np.empty((out.shape[0], LANES), dtype=np.int16)
    entries = np.empty((3, LANES), dtype=np.int32)
    limit, at = len(words) - LANES, 0
    idle = len(lookup) - 1
    for first in range(0, out.shape[1], LANES):
        for lane in range(LANES):
            channel = first + lane
            entries[:, lane] = FREQUENCY_SUM * (int(ids[channel]) if channel < len(ids) else idle)
        at = _decode_tile(words, at, states, lookup, entries, tile, first, out)
        if at > limit:
            break
    return at


@compiled("intp(uint32[::1], uint32[::1], uint16[:, ::1], uint32[:, ::1], uint8[:, ::1])")
def _decode_own(
    words: NDArray[np.uint32], states: NDArray[np.uint32], frequencies: Frequencies, lookup: Lookup, out: Bytes
) -> int:
    """As `_decode`; `lookup` is room for the tables of 16 channels, and holds the one for nobody behind them."""
    tile = np.empty((out.shape[0], LANES), dtype=np.int16)
    entries = np.empty((3, LANES), dtype=np.int32)
    limit, at = len(words) - LANES, 0
    for first in range(0, out.shape[1], LANES):
        for lane in range(LANES):
            channel = first + lane
            if channel < out.shape[1]:
                fill_lookup(frequencies[channel], lookup[lane])
            entries[:, lane] = FREQUENCY_SUM * (lane if channel < out.shape[1] else LANES)
        at = _decode_tile(words, at, states, lookup, entries, tile, first, out)
        if at > limit:
            break
    return at


@compiled("intp(uint32[::1], uint32[::1], uint16[:, ::1], uint8[:, ::1])")
def _decode_searched(
    words: NDArray[np.uint32], states: NDArray[np.uint32], frequencies: Frequencies, out: Bytes
) -> int:
    """As `_decode_own`, one symbol after the other."""
    num_tokens, num_channels = out.shape
    below = np.empty((LANES, SYMBOLS + 1), dtype=np.uint32)
    limit, at = len(words) - LANES, 0
    for first in range(0, num_channels, LANES):
        width = min(LANES, num_channels - first)
        for lane in range(width):
            total = np.uint32(0)
            for symbol in range(SYMBOLS):
                below[lane, symbol] = total
                total += np.uint32(frequencies[first + lane, symbol])
            below[lane, SYMBOLS] = total
        for token in range(num_tokens):
            if at > limit:
                return at
            for lane in range(width):
                state = states[lane]
                slot = state & np.uint32(FREQUENCY_SUM - 1)
                symbol = 0
                step = SYMBOLS // 2
                while step:
                    symbol += step if below[lane, symbol + step] <= slot else 0
                    step >>= 1
                out[token, first + lane] = symbol
                frequency = below[lane, symbol + 1] - below[lane, symbol]
                state = frequency * (state >> np.uint32(12)) + slot - below[lane, symbol]
                if state < np.uint32(FIRST_STATE):
                    state = (state << np.uint32(16)) | words[at]
                    at += 1
                states[lane] = state
    return at


@compiled("intp(uint8[:, ::1], uint16[::1], uint32[:, ::1], uint32[::1], uint32[::1])")
def _encode(
    symbols: Bytes, table_ids: Ids, entries: NDArray[np.uint32], states: NDArray[np.uint32], words: NDArray[np.uint32]
) -> int:
    """Fill `words` from its end; where they start."""
    num_tokens, num_channels = symbols.shape
    nobody = len(entries) - 1
    tile = np.zeros((num_tokens, LANES), dtype=np.int16)
    first_entries = np.empty((3, LANES), dtype=np.int32)
    at = len(words)
    for group in range((num_channels + LANES - 1) // LANES - 1, -1, -1):
        first = group * LANES
        for lane in range(LANES):
            channel = first + lane
            table = int(table_ids[channel]) if channel < num_channels else nobody
            first_entries[:, lane] = table * SYMBOLS
        for token in range(num_tokens):
            for lane in range(min(LANES, num_channels - first)):
                tile[token, lane] = np.int16(symbols[token, first + lane]) - _CENTRE
        at = _encode_group(
            entries.ctypes.data, words.ctypes.data, at, states.ctypes.data, first_entries.ctypes.data,
            tile.ctypes.data, tile.ctypes.data, num_tokens,
        )  # fmt: skip
    return at
