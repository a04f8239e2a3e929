"""Tables of the entropy coder, as its loops want them, and the coder's definition in plain Python.

Covers: 12-bit tables to look-up and encoder tables; `decode_step` and `encode_step`, the definition that tests hold the
vectors against. Does not cover: the vectors (`kvstore.codecs.rans_vectors`).
Shape letters: K tables, S symbols, of which the one in the middle stands for 0; F slots; E encoder entries.

Interleaved rANS: 32-bit states in [2^16, 2^32), 16-bit words, frequencies that sum to 4096. The 16 states of a section
share one stream of words; in every step, those that fell below 2^16 read the next words, in the order of their lanes.
Encoding runs backwards from states of 2^16, so a decoder that read everything ends with states of 2^16 and no words.
"""

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.codecs.profile import FREQUENCY_BITS, FREQUENCY_SUM
from kvstore.compiled import compiled

FIRST_STATE: Final = 1 << 16
ENCODER_ENTRIES: Final = 256
"""Entries of one encoder table; the one of value 0 is in the middle."""
_ZERO: Final = ENCODER_ENTRIES // 2


class CoderTables(NamedTuple):
    """Tables of a profile, and behind them one more that codes only 0, in no bits: for lanes without a row."""

    lut_KF: NDArray[np.uint32]
    """By slot: value (8 bits, signed), frequency less one (12 bits), slot within the symbol (12 bits)."""
    encoder_KE: NDArray[np.uint32]
    """By value + 128: frequency less one (12 bits), slots below the symbol (12 bits)."""
    low_K: NDArray[np.int16]
    """The least and the greatest value such that all between can be coded."""
    high_K: NDArray[np.int16]


def coder_tables(frequencies_KS: NDArray[np.uint16]) -> CoderTables:
    """Tables for both directions, from frequencies that a profile has validated.

    Example:
        >>> tables = coder_tables(np.array([[1024, 2048, 1024]], dtype=np.uint16))
        >>> [hex(entry) for entry in tables.lut_KF[0, [0, 1024, 4095]]]
        ['0xff3ff000', '0x7ff000', '0x13ff3ff']
    """
    zero = frequencies_KS.shape[1] // 2
    coded_KS = frequencies_KS > 0
    # Contiguous around 0: clipping to these bounds then always gives a symbol that can be coded.
    low = [-_run(coded_S[:zero][::-1]) for coded_S in coded_KS]
    high = [_run(coded_S[zero + 1 :]) for coded_S in coded_KS]
    bounds = (np.array([*each, 0], np.int16) for each in (low, high))
    return CoderTables(lookup_tables(frequencies_KS), encoder_tables(frequencies_KS), *bounds)


def lookup_tables(frequencies_KS: NDArray[np.uint16]) -> NDArray[np.uint32]:
    """`CoderTables.lut_KF`, 16 KiB per table."""
    lut_KF = np.empty((len(frequencies_KS) + 1, FREQUENCY_SUM), np.uint32)
    for frequencies_S, lut_F in zip(frequencies_KS, lut_KF[:-1], strict=True):
        fill_lookup(frequencies_S, lut_F)
    lut_KF[-1] = nobody_lookup()
    return lut_KF


def nobody_lookup() -> NDArray[np.uint32]:
    """The look-up table that takes no words and leaves the state as it is."""
    return np.uint32((FREQUENCY_SUM - 1) << FREQUENCY_BITS) | np.arange(FREQUENCY_SUM, dtype=np.uint32)


def encoder_tables(frequencies_KS: NDArray[np.uint16]) -> NDArray[np.uint32]:
    """`CoderTables.encoder_KE`."""
    count, symbols = frequencies_KS.shape
    wide_KS = frequencies_KS.astype(np.uint32)
    below_KS = np.cumsum(wide_KS, axis=1, dtype=np.uint32) - wide_KS
    entries_KS = np.where(wide_KS > 0, (wide_KS - np.uint32(1)) << np.uint32(FREQUENCY_BITS) | below_KS, np.uint32(0))
    encoder_KE = np.zeros((count + 1, ENCODER_ENTRIES), np.uint32)
    first = _ZERO - symbols // 2
    encoder_KE[:count, first : first + symbols] = entries_KS
    encoder_KE[count, _ZERO] = (FREQUENCY_SUM - 1) << FREQUENCY_BITS
    return encoder_KE


@compiled("void(Array(uint16, 1, 'C', readonly=True), uint32[::1])")
def fill_lookup(frequencies: Any, table: Any) -> None:
    """One look-up table; compiled, because some codecs make one for every channel of a chunk."""
    at, zero = 0, len(frequencies) // 2
    for symbol in range(len(frequencies)):
        frequency = int(frequencies[symbol])
        if frequency:
            value = np.uint32((symbol - zero) & 0xFF)
            entry = np.uint32((value << np.uint32(24)) | np.uint32((frequency - 1) << FREQUENCY_BITS))
            # A slice of its own: LLVM then sees plain increasing addresses, and uses vectors.
            slots = table[at : at + frequency]
            for offset in range(len(slots)):
                slots[offset] = entry | np.uint32(offset)
            at += frequency


def _run(coded: NDArray[np.bool_]) -> int:
    """How many are set before the first that is not."""
    return len(coded) if coded.all() else int(np.argmin(coded))


def decode_step(state: int, lut_F: NDArray[np.uint32], words: list[int]) -> tuple[int, int]:
    """Value and new state of one lane; takes a word from the front of `words` where it needs one."""
    entry = int(lut_F[state & (FREQUENCY_SUM - 1)])
    value = (entry >> 24) - (entry >> 31 << 8)
    frequency, offset = (entry >> FREQUENCY_BITS & (FREQUENCY_SUM - 1)) + 1, entry & (FREQUENCY_SUM - 1)
    state = frequency * (state >> FREQUENCY_BITS) + offset
    if state < FIRST_STATE:
        state = state << 16 | words.pop(0)
    return value, state


def encode_step(state: int, entry: int, words: list[int]) -> int:
    """New state of one lane; puts a word in front of `words` where the state is full."""
    frequency, below = (entry >> FREQUENCY_BITS) + 1, entry & (FREQUENCY_SUM - 1)
    if state >> 20 >= frequency:
        words.insert(0, state & 0xFFFF)
        state >>= 16
    return (state // frequency << FREQUENCY_BITS) + state % frequency + below
