"""An arena of ragged chunks at its capacity for a long time: it stays full, and finding room stays cheap.

Covers: the production arena, allocator, window search and policies together. Does not cover: bytes (nothing is
written: pages that are not touched take no memory), threads.
"""

import random
import time
from collections.abc import Iterator

import pytest

from kvstore.container import Header, stored_bytes
from kvstore.interfaces import ChunkMeta, EvictionPolicy, TierEntry
from kvstore.keys import ChunkKey
from kvstore.policy import FreeRuns, Resident, make_policy, victim_window
from kvstore.settings import PolicyName
from kvstore.testing.samples import sample_key
from kvstore.tiers.host import HostTier
from loadtest.workloads import Zipf

SMALL_MODEL_BYTES = 23_040
"""Per token: 30 layers, 3 KV heads of 64, bfloat16."""
LARGE_MODEL_BYTES = 131_072
"""Per token: 32 layers, 8 KV heads of 128, bfloat16."""


class CountingPolicy:
    """A policy, and how many victims the searches have looked at."""

    def __init__(self, inner: EvictionPolicy) -> None:
        self._inner = inner
        self.looked = 0

    def admit(self, key: ChunkKey, entry: TierEntry) -> None:
        self._inner.admit(key, entry)

    def touch(self, key: ChunkKey) -> None:
        self._inner.touch(key)

    def remove(self, key: ChunkKey, *, evicted: bool) -> None:
        self._inner.remove(key, evicted=evicted)

    def victims(self) -> Iterator[ChunkKey]:
        for key in self._inner.victims():
            self.looked += 1
            yield key


class Churn:
    """Chunks of 1 to 2000 tokens, half of them drawn by popularity, half never seen again; some being read."""

    def __init__(self, policy: PolicyName, *, capacity_bytes: int, bytes_per_token: int, seed: int) -> None:
        self.policy = CountingPolicy(make_policy(policy))
        self.host = HostTier(capacity_bytes, policy=self.policy)
        self._bytes_per_token = bytes_per_token
        self._rng = random.Random(seed)
        self._popular = Zipf(4000, exponent=0.9)
        self._tokens = [self._rng.randint(1, 2000) for _ in range(4000)]
        self._readers: list[ChunkKey] = []
        self.utilisation: list[float] = []
        self.looked: list[int] = []
        self.refused = 0

    def run(self, operations: int) -> None:
        for number in range(operations):
            if self._rng.random() < 0.5:
                index = self._popular.draw(self._rng)
                key, tokens = sample_key(index), self._tokens[index]
            else:
                key, tokens = sample_key(number, salt="one-off"), self._rng.randint(1, 2000)
            slot = self.host.pin(key)
            if slot is not None:
                self._read(key)
            else:
                self._learn(key, tokens)

    def _read(self, key: ChunkKey) -> None:
        """Eight chunks are being read at any time."""
        self._readers.append(key)
        if len(self._readers) > 8:
            slot = self.host.find(self._readers.pop(0))
            assert slot is not None, "a chunk that is being read left"
            self.host.unpin(slot)

    def _learn(self, key: ChunkKey, tokens: int) -> None:
        size = stored_bytes(tokens * self._bytes_per_token)
        self.policy.looked = 0
        slot = self.host.reserve(key, size)
        if slot is None:
            self.refused += 1
            return
        if self.policy.looked:
            self.looked.append(self.policy.looked)
            # Measured at its lowest: what had to leave has left, and the new record is not there yet.
            self.utilisation.append((self.host.stat().bytes + size) / self.host.capacity_bytes)
        meta = ChunkMeta(
            num_tokens=tokens, num_layers=1, num_kv_heads=1, head_dim=1, dtype="bfloat16", base_position=300
        )
        header = Header(
            key=key, meta=meta, payload_bytes=size - 4096, stored_bytes=size, payload_checksum=0, is_sealed=False
        )
        assert self.host.commit(slot, header)

    def close(self) -> None:
        for key in self._readers:
            slot = self.host.find(key)
            assert slot is not None
            self.host.unpin(slot)
        assert self.host.stat().pinned_bytes == 0
        self.host.close()


def check(churn: Churn) -> None:
    steady = churn.utilisation[len(churn.utilisation) // 10 :]
    print(
        f"utilisation mean {sum(steady) / len(steady):.3f} min {min(steady):.3f}; looked at "
        f"{sum(churn.looked) / len(churn.looked):.0f} records in the mean, {max(churn.looked)} at most, of "
        f"{churn.host.stat().chunks}"
    )
    assert churn.refused == 0
    assert sum(steady) / len(steady) >= 0.93
    assert min(steady) >= 0.9
    assert sum(churn.looked) / len(churn.looked) <= 0.5 * churn.host.stat().chunks
    assert churn.host.stat().bytes <= churn.host.capacity_bytes


@pytest.mark.parametrize("policy", ["cost", "lru", "s3fifo", "arc"])
def test_a_full_arena_stays_full(policy: PolicyName) -> None:
    churn = Churn(policy, capacity_bytes=5 << 30, bytes_per_token=SMALL_MODEL_BYTES, seed=1)
    churn.run(8000)
    check(churn)
    churn.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("policy", "operations", "capacity_bytes", "bytes_per_token"),
    [
        ("cost", 200_000, 5 << 30, SMALL_MODEL_BYTES),
        ("lru", 200_000, 100 << 30, LARGE_MODEL_BYTES),
        ("cost", 40_000, 100 << 30, LARGE_MODEL_BYTES),
    ],
)
def test_a_full_arena_stays_full_for_long(
    policy: PolicyName, operations: int, capacity_bytes: int, bytes_per_token: int
) -> None:
    churn = Churn(policy, capacity_bytes=capacity_bytes, bytes_per_token=bytes_per_token, seed=2)
    churn.run(operations)
    check(churn)
    churn.close()


def test_room_for_a_huge_record_among_tiny_ones_is_found_in_linear_time() -> None:
    """The pieces grow one by one to half of the arena: joining them must not copy them."""

    def seconds(count: int) -> float:
        residents = [Resident(key=sample_key(n), start=n, units=1) for n in range(count)]
        random.Random(5).shuffle(residents)
        began_s = time.process_time()
        found = victim_window(
            residents, free=FreeRuns(units_by_start={}, start_by_stop={}), need_units=int(0.99 * count)
        )
        took_s = time.process_time() - began_s
        assert found is not None
        assert len(found) == int(0.99 * count)
        return took_s

    seconds(1000)
    small_s, large_s = (min(seconds(count) for _ in range(3)) for count in (4000, 64_000))
    assert large_s < 64 * small_s, "sixteen times the records; a quadratic search takes 256 times as long"
