"""Tables and streams of the codecs that code channel by channel, and payloads made of layers.

Covers: `kvstore.codecs.rows` against a coder written from its definition, `kvstore.codecs.layered`.
Does not cover: what symbols mean (the contract of every codec).
"""

import struct

import numpy as np
import pytest
from numpy.typing import NDArray

from cluster.errors import DataError
from kvstore.codecs.layered import MAX_EXPANSION, Reader, head_bytes, read_layered, write_layered
from kvstore.codecs.lossless import LosslessCodec
from kvstore.codecs.profile import FREQUENCY_SUM
from kvstore.codecs.rans import lookup_tables
from kvstore.codecs.raw import CodecDataError
from kvstore.codecs.rows import (
    SYMBOLS,
    TableError,
    bits_of,
    check_frequencies,
    decode_own_rows,
    decode_rows,
    encode_rows,
    frequencies_of,
)
from kvstore.testing.codec_contract import make_kv, make_meta

SHAPES = [(1, 1), (1, 16), (3, 17), (40, 5), (63, 32), (64, 32), (65, 33), (200, 48)]


def symbols_of(shape: tuple[int, int], *, seed: int) -> NDArray[np.uint8]:
    """Every channel with a spread of its own, one of them constant."""
    numbers = np.random.default_rng(seed)
    spread_C = numbers.uniform(0.1, 40.0, shape[1])
    values = np.clip(np.rint(numbers.standard_normal(shape) * spread_C) + 128, 0, 255).astype(np.uint8)
    values[:, shape[1] // 2] = 77
    return values


def own_tables(symbols: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """One table per channel."""
    counts = np.stack([np.bincount(column, minlength=SYMBOLS) for column in symbols.T])
    return frequencies_of(counts.astype(np.int64))


def decoded_by_definition(stream: bytes, tables: NDArray[np.uint16], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Sixteen channels at a time, token by token: one symbol, then one word if the state has become short."""
    states = list(struct.unpack("<16I", stream[:64]))
    words = iter(struct.unpack(f"<{(len(stream) - 64) // 2}H", stream[64:]))
    out = np.empty(shape, dtype=np.uint8)
    for first in range(0, shape[1], 16):
        for token in range(shape[0]):
            for lane, channel in enumerate(range(first, min(first + 16, shape[1]))):
                slot = states[lane] % FREQUENCY_SUM
                ends = np.cumsum(tables[channel])
                symbol = int(np.searchsorted(ends, slot, side="right"))
                frequency = int(tables[channel, symbol])
                state = frequency * (states[lane] // FREQUENCY_SUM) + slot - int(ends[symbol]) + frequency
                if state < 1 << 16:
                    state = state << 16 | next(words)
                states[lane] = state
                out[token, channel] = symbol
    assert next(words, None) is None
    assert states == [1 << 16] * 16
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_streams_are_those_of_the_definition(shape: tuple[int, int]) -> None:
    symbols = symbols_of(shape, seed=1)
    tables = own_tables(symbols)
    ids = np.arange(shape[1], dtype=np.uint16)
    stream = encode_rows(symbols, table_ids_C=ids, frequencies_KS=tables)
    assert np.array_equal(decoded_by_definition(stream.tobytes(), tables, shape), symbols)
    for decode in (
        lambda out: decode_rows(stream, table_ids_C=ids, lookup_KE=lookup_tables(tables), out_TC=out),
        lambda out: decode_own_rows(stream, frequencies_CS=tables, out_TC=out),
    ):
        out = np.zeros_like(symbols)
        decode(out)
        assert np.array_equal(out, symbols)


def test_streams_are_as_short_as_their_tables_allow() -> None:
    symbols = symbols_of((500, 64), seed=2)
    counts = np.stack([np.bincount(column, minlength=SYMBOLS) for column in symbols.T]).astype(np.int64)
    tables = frequencies_of(counts)
    stream = encode_rows(symbols, table_ids_C=np.arange(64, dtype=np.uint16), frequencies_KS=tables)
    # Each of the sixteen states takes up to a word with it.
    assert abs(8 * (len(stream) - 64) - bits_of(counts, tables)) < 0.001 * bits_of(counts, tables) + 16 * 16


def test_frequencies_keep_every_symbol_and_sum_up() -> None:
    counts = np.zeros((3, SYMBOLS), dtype=np.int64)
    counts[0, ::2] = 1
    counts[0, 0] = 10**9
    counts[1, 9] = 5
    tables = frequencies_of(counts)
    check_frequencies(tables)
    assert np.array_equal(tables[:2] > 0, counts[:2] > 0)
    assert tables[1, 9] == FREQUENCY_SUM
    assert tables[2, 0] == FREQUENCY_SUM


def test_unknown_symbols_cost_infinitely_much() -> None:
    counts = np.ones((1, SYMBOLS), dtype=np.int64)
    tables = frequencies_of(counts)
    tables[0, :2] = (0, 32)
    assert bits_of(counts, tables) == float("inf")


def test_wrong_sums_are_refused() -> None:
    tables = frequencies_of(np.ones((2, SYMBOLS), dtype=np.int64))
    tables[1, 3] += 1
    with pytest.raises(TableError, match="table 1"):
        check_frequencies(tables)


@pytest.mark.parametrize("num_tokens", [40, 100])
@pytest.mark.parametrize("damage", ["missing word", "extra word", "half word", "state", "no states"])
def test_streams_that_are_too_short_or_too_long_are_refused(num_tokens: int, damage: str) -> None:
    """Both for the search, which few tokens take, and for tables."""
    symbols = symbols_of((num_tokens, 20), seed=3)
    tables = own_tables(symbols)
    stream = encode_rows(symbols, table_ids_C=np.arange(20, dtype=np.uint16), frequencies_KS=tables)
    changed = {
        "missing word": stream[:-2],
        "extra word": np.append(stream, np.zeros(2, np.uint8)),
        "half word": stream[:-1],
        "state": np.concatenate([stream[:3] ^ 1, stream[3:]]),
        "no states": stream[:60],
    }[damage]
    with pytest.raises(DataError):
        decode_own_rows(changed, frequencies_CS=tables, out_TC=np.empty_like(symbols))


def layers_of(*sizes: int) -> list[NDArray[np.uint8]]:
    return [np.full(size, index + 1, dtype=np.uint8) for index, size in enumerate(sizes)]


def test_layers_return() -> None:
    meta = make_meta((3, 2, 1, 4))
    out = memoryview(bytearray(1000))
    size = write_layered(layers_of(5, 0, 7), version=3, preamble=b"abc", decoded_bytes=96, out=out)
    assert size == head_bytes(3) + 3 + 12
    parts = read_layered(out[:size], version=3, meta=meta)
    assert parts.preamble.tobytes() == b"abc"
    assert [layer.tobytes() for layer in parts.layers] == [b"\1" * 5, b"", b"\3" * 7]
    with pytest.raises(CodecDataError, match="version"):
        read_layered(out[:size], version=4, meta=meta)


def test_short_payloads_cannot_claim_much_memory() -> None:
    """KV that is all alike takes next to nothing; the payload is still as long as its claim needs."""
    meta = make_meta((2, 4096, 2, 64))
    kv = make_kv(meta).fill_(1.0)
    out = memoryview(bytearray(LosslessCodec().encoded_bytes(meta)))
    size = LosslessCodec().encode(kv, out=out)
    assert MAX_EXPANSION * size >= 2 * kv.numel()
    assert LosslessCodec().decode(out[:size], meta=meta).equal(kv)
    with pytest.raises(CodecDataError, match="cannot hold"):
        read_layered(out[:size], version=1, meta=make_meta((2, 1 << 30, 2, 64)))


def test_reader_stops_at_the_end() -> None:
    reader = Reader(np.arange(6, dtype=np.uint8))
    assert reader.number("<u2") == 0x0100
    assert reader.array("u1", 2).tolist() == [2, 3]
    for wrong in (3, -1, 1 << 62):
        with pytest.raises(CodecDataError):
            reader.take(wrong)
    with pytest.raises(CodecDataError, match="2 bytes too many"):
        reader.end()
    reader.take(2)
    reader.end()
