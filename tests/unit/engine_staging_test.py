"""Memory between decoding and scattering: one bound for everybody, and no page is asked for twice.

Covers: the bound, waiting for room, a piece larger than the bound, using memory again.
Does not cover: who takes it (`tests/unit/engine_coded_transfers_test.py`).
"""

import threading

import torch

from kvstore.engine.staging import Staging

MIB = 1 << 20


def test_the_bound_holds_and_a_release_lets_the_next_in() -> None:
    staging = Staging(4 * MIB)
    first = staging.take(3 * MIB, deadline_s=1.0)
    assert first is not None
    assert staging.take(2 * MIB, deadline_s=0.01) is None
    assert staging.used_bytes == 3 * MIB
    threading.Timer(0.05, first.release).start()
    second = staging.take(2 * MIB, deadline_s=30.0)
    assert second is not None
    first.release()
    assert staging.used_bytes == 2 * MIB
    second.release()
    assert staging.used_bytes == 0


def test_a_piece_larger_than_the_bound_is_alone() -> None:
    staging = Staging(MIB)
    large = staging.take(5 * MIB, deadline_s=0.0)
    assert large is not None
    assert staging.take(1, deadline_s=0.0) is None
    large.release()
    assert staging.take(1, deadline_s=0.0) is not None


def test_released_memory_is_used_again_by_what_it_fits() -> None:
    staging = Staging(64 * MIB)
    memory = staging.take(4 * MIB, deadline_s=0.0)
    assert memory is not None
    address = memory.tensor((4 * MIB,), torch.uint8).data_ptr()
    memory.release()
    small = staging.take(MIB, deadline_s=0.0)
    again = staging.take(3 * MIB, deadline_s=0.0)
    assert small is not None
    assert again is not None
    assert small.tensor((MIB,), torch.uint8).data_ptr() != address, "a quarter of it is too little to take it for"
    assert again.tensor((3 * MIB // 4,), torch.float32).data_ptr() == address


def test_idle_memory_is_bounded() -> None:
    staging = Staging(8 * MIB)
    taken = [staging.take(2 * MIB, deadline_s=0.0) for _ in range(4)]
    for memory in taken:
        assert memory is not None
        memory.release()
    assert sum(map(len, staging._idle)) <= 2 * MIB
