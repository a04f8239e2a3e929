"""The entropy coder's loops against its definition in plain Python.

Covers: decoding, refining and encoding of row groups on random tables, words that run out, lanes without a row, tables
of one symbol. Does not cover: sections (`tests/unit/codec_transform_test.py`).
"""

import numpy as np
import pytest
from numpy.typing import NDArray

from kvstore.codecs.rans import FIRST_STATE, coder_tables, decode_step, encode_step
from kvstore.codecs.rans_vectors import LANES, decode_group, decode_streams, encode_group

Symbols = NDArray[np.int16]


def random_frequencies(random: np.random.Generator, *, symbols: int, support: int) -> NDArray[np.uint16]:
    """One table over `support` values around 0, of any skew."""
    shares = random.dirichlet(np.full(support, 10.0 ** random.uniform(-1.5, 1)))
    frequencies = np.zeros(symbols, np.int64)
    first = symbols // 2 - support // 2
    frequencies[first : first + support] = 1 + np.floor(shares * (4096 - support))
    frequencies[symbols // 2] += 4096 - frequencies.sum()
    return frequencies.astype(np.uint16)


class Coder:
    """Tables and the loops behind one convenient call each."""

    def __init__(self, frequencies: NDArray[np.uint16]) -> None:
        self.tables = coder_tables(frequencies)

    def encode(self, symbols: Symbols, known: Symbols, ids: NDArray[np.int32]) -> tuple[list[int], list[int]]:
        """States and words."""
        words = np.zeros(symbols.size, np.uint32)
        states = np.full(LANES, FIRST_STATE, np.uint32)
        starts = np.ascontiguousarray(ids * 256, np.int32)
        entries = self.tables.encoder_KE
        at = encode_group(
            entries.ctypes.data, words.ctypes.data, len(words), states.ctypes.data, starts.ctypes.data,
            symbols.ctypes.data, known.ctypes.data, len(symbols),
        )  # fmt: skip
        return states.tolist(), words[at:].tolist()

    def decode(
        self, states: list[int], words: list[int], ids: NDArray[np.int32], out: Symbols
    ) -> tuple[int, list[int]]:
        """Read position and states; symbols in `out`."""
        padded = np.array(words + [0] * LANES, np.uint32)
        in_out = np.array(states, np.uint32)
        starts = np.ascontiguousarray(ids * 4096, np.int32)
        at = decode_group(
            self.tables.lut_KF.ctypes.data, padded.ctypes.data, 0, len(words), in_out.ctypes.data, starts.ctypes.data,
            out.ctypes.data, len(out),
        )  # fmt: skip
        return at, in_out.tolist()


def refine(
    streams: list[tuple[list[int], list[int]]], cuts: NDArray[np.int32], values: list[Symbols]
) -> tuple[list[int], list[list[int]]]:
    """Read positions and states of one stream, or of two at once; `values` get one more bit."""
    padded = [np.array(words + [0] * LANES, np.uint32) for _, words in streams]
    states = [np.array(each, np.uint32) for each, _ in streams]
    jobs = np.array(
        [
            [words.ctypes.data, 0, len(words) - LANES, state.ctypes.data, cuts.ctypes.data, out.ctypes.data]
            for words, state, out in zip(padded, states, values, strict=True)
        ],
        np.int64,
    )
    decode_streams(0, jobs.ctypes.data, len(streams), len(values[0]), True)
    return jobs[:, 1].tolist(), [each.tolist() for each in states]


def draw(random: np.random.Generator, *, tokens: int) -> tuple[Coder, NDArray[np.int32], Symbols, Symbols]:
    """Coder, tables by context and lane, symbols, the context before each."""
    supports = (1, 3, 9, 41, 81)
    coder = Coder(np.stack([random_frequencies(random, symbols=81, support=support) for support in supports]))
    ids = random.integers(0, len(supports) + 1, (3, LANES)).astype(np.int32)
    symbols = np.zeros((tokens, LANES), np.int16)
    known = np.zeros((tokens, LANES), np.int16)
    for token in range(tokens):
        if token:
            known[token] = symbols[token - 1]
        for lane in range(LANES):
            table = ids[min(abs(int(known[token, lane])), 2), lane]
            most = (*supports, 1)[table] // 2
            symbols[token, lane] = random.integers(-most, most + 1)
    return coder, ids, symbols, known


@pytest.mark.parametrize("seed", range(8))
def test_encoded_stream_is_that_of_the_definition(seed: int) -> None:
    coder, ids, symbols, known = draw(np.random.default_rng(seed), tokens=40)
    states, words = [FIRST_STATE] * LANES, list[int]()
    for token in reversed(range(len(symbols))):
        for lane in reversed(range(LANES)):
            table = ids[min(abs(int(known[token, lane])), 2), lane]
            entry = int(coder.tables.encoder_KE[table, int(symbols[token, lane]) + 128])
            states[lane] = encode_step(states[lane], entry, words)
    assert coder.encode(symbols, known, ids) == (states, words)


@pytest.mark.parametrize("seed", range(8))
def test_round_trip_ends_where_it_began(seed: int) -> None:
    coder, ids, symbols, known = draw(np.random.default_rng(seed), tokens=300)
    states, words = coder.encode(symbols, known, ids)
    decoded = np.full_like(symbols, 99)
    at, last_states = coder.decode(states, words, ids, decoded)
    assert (decoded == symbols).all()
    assert at == len(words)
    assert last_states == [FIRST_STATE] * LANES


@pytest.mark.parametrize("seed", range(4))
def test_random_words_decode_as_the_definition_says(seed: int) -> None:
    """No stream of ours, still the same on both sides, for as long as there are words."""
    random = np.random.default_rng(seed)
    coder, ids, symbols, _ = draw(random, tokens=30)
    states = random.integers(FIRST_STATE, 1 << 32, LANES).tolist()
    words = random.integers(0, 1 << 16, 2000).tolist()
    decoded = np.zeros_like(symbols)
    at, last_states = coder.decode(states, words, ids, decoded)
    left, expected = list(words), np.zeros_like(symbols)
    for token in range(len(symbols)):
        for lane in range(LANES):
            before = expected[token - 1, lane] if token else 0
            table = ids[min(abs(int(before)), 2), lane]
            value, states[lane] = decode_step(states[lane], coder.tables.lut_KF[table], left)
            expected[token, lane] = value
    assert (decoded == expected).all()
    assert (at, last_states) == (len(words) - len(left), states)


@pytest.mark.parametrize("seed", range(4))
def test_refining_doubles_and_adds_away_from_zero(seed: int) -> None:
    random = np.random.default_rng(seed)
    frequencies = np.stack([random_frequencies(random, symbols=3, support=3) for _ in range(4)])
    coder, ids = Coder(frequencies), random.integers(0, 4, (3, LANES)).astype(np.int32)
    coarse = random.integers(-3, 4, (50, LANES)).astype(np.int16)
    bits = random.integers(0, 2, coarse.shape).astype(np.int16)
    bits[coarse == 0] *= random.choice([-1, 1], int((coarse == 0).sum())).astype(np.int16)
    states, words = coder.encode(bits, coarse, ids)
    minus, none = frequencies[:, 0].astype(np.int32), frequencies[:, 1].astype(np.int32)
    cuts = np.ascontiguousarray((minus | (minus + none) << 16)[ids])
    for streams in (1, 2):
        fine = [coarse.copy() for _ in range(streams)]
        at, last_states = refine([(states, words)] * streams, cuts, fine)
        assert all((each == np.where(coarse < 0, 2 * coarse - bits, 2 * coarse + bits)).all() for each in fine)
        assert (at, last_states) == ([len(words)] * streams, [[FIRST_STATE] * LANES] * streams)


def test_words_that_run_out_stop_the_loop() -> None:
    coder, ids, symbols, known = draw(np.random.default_rng(0), tokens=200)
    states, words = coder.encode(symbols, known, ids)
    decoded = np.full_like(symbols, 99)
    at, _ = coder.decode(states, words[: len(words) // 2], ids, decoded)
    assert len(words) // 2 < at <= len(words) // 2 + LANES
    assert (decoded[-1] == 99).all()


def test_lanes_without_a_row_cost_nothing() -> None:
    coder, ids, symbols, known = draw(np.random.default_rng(1), tokens=100)
    ids[:, 3:] = len(coder.tables.lut_KF) - 1
    symbols[:, 3:] = 0
    np.clip(symbols, -4, 4, out=symbols)
    known[1:] = symbols[:-1]
    ids[:, :3] = 3
    states, words = coder.encode(symbols, known, ids)
    assert states[3:] == [FIRST_STATE] * (LANES - 3)
    assert len(words) < 3 * 100
    decoded = np.full_like(symbols, 99)
    coder.decode(states, words, ids, decoded)
    assert (decoded == symbols).all()


def test_tables_say_which_symbols_surround_zero() -> None:
    frequencies = np.zeros((2, 7), np.uint16)
    frequencies[0, 3] = 4096
    frequencies[1] = [1, 0, 5, 4000, 40, 40, 10]
    tables = coder_tables(frequencies)
    assert tables.low_K.tolist() == [0, -1, 0]
    assert tables.high_K.tolist() == [0, 3, 0]
