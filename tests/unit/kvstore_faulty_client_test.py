"""The fault wrapper fails exactly the keys it says, the same ones everywhere."""

import time

import pytest

from kvstore.testing import Fault, FaultyStoreClient, MemoryStoreClient
from kvstore.testing.samples import sample_key, sample_meta
from kvstore.testing.store_client import read_bytes, write_chunk

KEY = sample_key(1)


@pytest.mark.parametrize(
    ("fault", "looked_up", "found"), [(Fault.MISS, False, None), (Fault.LOST, True, None), (Fault.REFUSED, True, b"x")]
)
def test_named_key_fails_as_said(fault: Fault, looked_up: bool, found: bytes | None) -> None:
    inner = MemoryStoreClient()
    payload = write_chunk(inner, 1, 10)
    client = FaultyStoreClient(inner, named={KEY: fault})
    assert client.lookup([KEY], deadline_s=1.0) == [looked_up]
    assert client.wait([KEY], deadline_s=0.0) == [looked_up]
    assert read_bytes(client, [KEY], 1.0) == [payload if found else None]
    client.close()
    assert inner.store.leftovers() == []


@pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.UNCOMMITTED])
def test_failing_write_stores_nothing(fault: Fault) -> None:
    client = FaultyStoreClient(MemoryStoreClient(), named={KEY: fault})
    write = client.reserve(KEY, sample_meta(), 10, deadline_s=1.0)
    assert (write is None) == (fault is Fault.REFUSED)
    assert write is None or not write.commit()
    assert client.lookup([KEY], deadline_s=1.0) == [False]
    assert client.reserve(sample_key(2), sample_meta(), 10, deadline_s=1.0) is not None


def test_slow_key_is_late_when_the_deadline_is_shorter() -> None:
    inner = MemoryStoreClient()
    payload = write_chunk(inner, 1, 10)
    client = FaultyStoreClient(inner, named={KEY: Fault.SLOW}, delay_s=0.1)
    start_s = time.monotonic()
    assert read_bytes(client, [KEY], 0.05) == [None]
    assert read_bytes(client, [KEY], 5.0) == [payload]
    assert time.monotonic() - start_s >= 0.15


@pytest.mark.parametrize("fault", [Fault.MISS, Fault.LOST, Fault.SLOW, Fault.REFUSED])
def test_copies_and_streams_fail_as_said(fault: Fault) -> None:
    inner = MemoryStoreClient()
    payload = write_chunk(inner, 1, 10)
    client = FaultyStoreClient(inner, named={KEY: fault}, delay_s=10.0)
    is_sound = fault is Fault.REFUSED
    out = bytearray(10)
    assert (client.read_into(KEY, memoryview(out), deadline_s=0.05) is not None) is is_sound
    assert (out == payload) is is_sound
    stream = client.stream(KEY, deadline_s=1.0)
    assert (stream is None) is (fault is Fault.MISS)
    if stream is not None:
        with stream:
            assert stream.finish(deadline_s=1.0) is is_sound
            assert stream.wait_bytes(10, deadline_s=1.0) == (10 if is_sound else 5)
    assert client.pin([KEY], seconds=1.0, deadline_s=1.0) == [fault is not Fault.MISS]
    client.unpin([KEY], deadline_s=1.0)
    client.close()
    assert inner.store.leftovers() == []


def test_share_of_keys_is_chosen_by_seed_and_not_by_process() -> None:
    client = FaultyStoreClient(MemoryStoreClient(), ratios={Fault.MISS: 0.25}, seed=7)
    chosen = [i for i in range(1000) if client.has_fault(Fault.MISS, sample_key(i))]
    assert 180 < len(chosen) < 320
    assert chosen[:5] == [4, 7, 9, 13, 19]
    other = FaultyStoreClient(MemoryStoreClient(), ratios={Fault.MISS: 0.25}, seed=8)
    assert chosen != [i for i in range(1000) if other.has_fault(Fault.MISS, sample_key(i))]
    assert not client.has_fault(Fault.LOST, sample_key(chosen[0]))
