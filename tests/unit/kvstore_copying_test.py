"""Copy and checksum in one pass: right for every length, and of what was copied, not of what is there now.

Covers: `kvstore.copying` against the library of the same hash. Does not cover: who copies what (`kvstore.client`).
"""

import re
import threading
import time
import types
from collections import Counter
from typing import Any

import numba
import numpy as np
import pytest
import xxhash

from kvstore import copying
from kvstore.copying import CopySizeError, copy_hashed

FAR_S = 1e9
PIECE_BYTES = copying._PIECE_BLOCKS * copying._BLOCK_BYTES
"""Between two looks at the clock."""


def pattern(num_bytes: int, seed: int = 1) -> bytes:
    return np.random.default_rng(seed).bytes(num_bytes)


def assert_copied(source: memoryview, target: memoryview) -> None:
    assert copy_hashed(source, target, stop_s=FAR_S) == xxhash.xxh3_64_intdigest(source)
    assert target == source


def test_every_short_length() -> None:
    """Through all rules of the hash: up to 240 bytes, one stripe, whole and cut blocks of 1,024 bytes."""
    data = memoryview(pattern(3000))
    room = memoryview(bytearray(3000))
    for num_bytes in range(3001):
        assert_copied(data[:num_bytes], room[:num_bytes])


@pytest.mark.parametrize("extra", [-1025, -1024, -65, -64, -1, 0, 1, 63, 64, 65, 1023, 1024, 1025])
@pytest.mark.parametrize("pieces", [1, 2])
def test_lengths_around_pieces(pieces: int, extra: int) -> None:
    data = pattern(PIECE_BYTES + 2000) * pieces
    num_bytes = pieces * PIECE_BYTES + extra
    assert_copied(memoryview(data)[:num_bytes], memoryview(bytearray(num_bytes)))


@pytest.mark.parametrize(("source_at", "target_at"), [(0, 1), (1, 0), (3, 5), (8, 4), (63, 65)])
def test_memory_at_odd_places(source_at: int, target_at: int) -> None:
    """And nothing before or behind the target is touched."""
    num_bytes = 100_001
    data = memoryview(pattern(num_bytes + 64))[source_at : source_at + num_bytes]
    room = bytearray(b"\x5a" * (num_bytes + 256))
    assert_copied(data, memoryview(room)[target_at : target_at + num_bytes])
    assert room[:target_at] == b"\x5a" * target_at
    assert room[target_at + num_bytes :] == b"\x5a" * (256 - target_at)


@pytest.mark.parametrize("num_bytes", [1, 300, 4096, 1_000_001])
def test_every_flipped_byte_is_in_the_checksum(num_bytes: int) -> None:
    data = bytearray(pattern(num_bytes))
    room = memoryview(bytearray(num_bytes))
    before = copy_hashed(memoryview(data), room, stop_s=FAR_S)
    for at_byte in {0, num_bytes // 2, num_bytes - 1}:
        data[at_byte] ^= 1
        assert copy_hashed(memoryview(data), room, stop_s=FAR_S) != before
        data[at_byte] ^= 1


@pytest.mark.parametrize(("source_bytes", "target_bytes"), [(10, 9), (9, 10), (100_000, 99_999), (0, 1)])
def test_other_lengths_are_refused(source_bytes: int, target_bytes: int) -> None:
    with pytest.raises(CopySizeError):
        copy_hashed(memoryview(bytes(source_bytes)), memoryview(bytearray(target_bytes)), stop_s=FAR_S)


def test_late_copy_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between pieces: what was copied until then stays, the rest is untouched."""
    times = iter([0.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(copying, "time", types.SimpleNamespace(monotonic=lambda: next(times)))
    data = pattern(3 * PIECE_BYTES + 5)
    room = bytearray(len(data))
    assert copy_hashed(memoryview(data), memoryview(room), stop_s=1.5) is None
    assert room[: 2 * PIECE_BYTES] == data[: 2 * PIECE_BYTES]
    assert not any(room[2 * PIECE_BYTES :])


def test_copy_that_is_late_at_its_start_does_nothing() -> None:
    room = bytearray(10_000)
    assert copy_hashed(memoryview(pattern(10_000)), memoryview(room), stop_s=time.monotonic() - 1.0) is None
    assert not any(room)


def test_source_that_changes_is_hashed_as_it_was_copied() -> None:
    """The checksum is over what arrived in the target, not over a second look at the source."""
    source = bytearray(pattern(3 << 20))
    over = threading.Event()
    seen: set[Any] = set()

    def flip() -> None:
        while not over.is_set():
            for at_byte in (0, 1 << 20, len(source) - 1):
                source[at_byte] ^= 0xFF

    writer = threading.Thread(target=flip)
    writer.start()
    try:
        for _ in range(2000):
            if len(seen) > 2:
                break
            target = bytearray(len(source))
            checksum = copy_hashed(memoryview(source), memoryview(target), stop_s=FAR_S)
            assert checksum == xxhash.xxh3_64_intdigest(target)
            seen.add(checksum)
    finally:
        over.set()
        writer.join()
    assert len(seen) > 2, "the case is about a source that changes"


def test_nothing_is_promised_of_where_callers_memory_begins() -> None:
    """Loads and stores of eight words that claimed an alignment would be wrong code for memory at odd places."""
    fresh = numba.njit("void(uintp, uintp, uintp, uintp, uintp, intp)")(copying._run.py_func)  # type: ignore[attr-defined]
    (code,) = fresh.inspect_llvm().values()
    aligns = Counter(re.findall(r"(load|store) <8 x i64>.*align (\d+)", code))
    assert aligns["load", "1"] >= copying._STRIPES
    assert aligns["store", "1"] >= copying._STRIPES
    assert aligns["store", "8"] <= 1, "only the lanes are this module's own"
