"""The store's parts against simple models: hostile records, room in the arena, tiers against a dict."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.errors import DataError
from kvstore.container import ALIGN, encode_record, parse_header, parse_record
from kvstore.interfaces import ChunkMeta, Tier
from kvstore.keys import ChunkKey
from kvstore.protocol import FrameReader, ProtocolError, decode_reply, decode_request
from kvstore.testing.samples import sample_key, sample_meta, sample_payload
from kvstore.tiers.extents import ExtentAllocator
from kvstore.tiers.file import FileTier
from kvstore.tiers.host import PAGE_BYTES, HostTier, Slot

RECORD = bytes(encode_record(sample_key(1), sample_meta(), sample_payload(1, 5000)))


@given(st.binary(max_size=3 * ALIGN))
def test_any_bytes_are_refused_with_a_data_error(data: bytes) -> None:
    with pytest.raises(DataError):
        parse_record(data)


@given(st.integers(0, len(RECORD) - 1), st.integers(1, 255))
def test_any_flip_is_refused(at_byte: int, flip: int) -> None:
    damaged = bytearray(RECORD)
    damaged[at_byte] ^= flip
    with pytest.raises(DataError):
        parse_record(damaged)


@given(st.integers(0, len(RECORD) - 1), st.binary(max_size=2 * ALIGN))
def test_any_cut_or_tail_is_refused(cut: int, tail: bytes) -> None:
    if RECORD[:cut] + tail != RECORD:
        with pytest.raises(DataError):
            parse_record(RECORD[:cut] + tail)
    if tail:
        with pytest.raises(DataError):
            parse_record(RECORD + tail)


@given(st.binary(min_size=32, max_size=32), st.integers(1, 1 << 30), st.integers(0, 1 << 30), st.binary(min_size=1))
def test_any_chunk_survives(key: bytes, num_tokens: int, base_position: int, payload: bytes) -> None:
    meta = sample_meta(num_tokens, base_position=base_position)
    header, parsed = parse_record(encode_record(ChunkKey(key), meta, payload), expected_key=ChunkKey(key))
    assert (header.key, header.meta, bytes(parsed)) == (key, meta, payload)


@given(st.text(max_size=100), st.text(max_size=100))
def test_any_metadata_text_survives(dtype: str, codec: str) -> None:
    meta = ChunkMeta(num_tokens=1, num_layers=1, num_kv_heads=1, head_dim=1, dtype=dtype, base_position=0, codec=codec)
    assert parse_header(encode_record(sample_key(1), meta, b"x")).meta == meta


@given(st.binary(max_size=200), st.lists(st.integers(1, 20), max_size=20))
def test_hostile_streams_end_in_protocol_errors_only(data: bytes, cuts: list[int]) -> None:
    reader = FrameReader(max_bytes=64)
    try:
        while data:
            size = cuts.pop() if cuts else len(data)
            for body in reader.feed(data[:size]):
                for decode in (decode_request, decode_reply):
                    try:
                        decode(body)
                    except ProtocolError:
                        continue
            data = data[size:]
    except ProtocolError:
        pass


class AllocatorMachine(RuleBasedStateMachine):
    """Free and used runs always cover the arena, without overlap, and free runs are as long as they can be."""

    @initialize(pages=st.integers(1, 64))
    def start(self, pages: int) -> None:
        self.room = ExtentAllocator(pages)

    @rule(pages=st.integers(1, 40))
    def allocate(self, pages: int) -> None:
        longest = max(self.room.free_runs.values(), default=0)
        start = self.room.allocate(pages)
        assert (start is not None) == (pages <= longest)

    @precondition(lambda self: self.room.used_runs)
    @rule(choice=st.integers(0))
    def free(self, choice: int) -> None:
        starts = sorted(self.room.used_runs)
        self.room.free(starts[choice % len(starts)])

    @invariant()
    def runs_cover_the_arena(self) -> None:
        if not hasattr(self, "room"):
            return
        runs = sorted(
            [(start, pages, False) for start, pages in self.room.used_runs.items()]
            + [(start, pages, True) for start, pages in self.room.free_runs.items()]
        )
        position = 0
        was_free = False
        for start, pages, is_free in runs:
            assert start == position
            assert not (is_free and was_free), "two free runs touch"
            position, was_free = start + pages, is_free
        assert position == self.room.num_pages
        assert self.room.free_pages + sum(self.room.used_runs.values()) == self.room.num_pages


class TierMachine(RuleBasedStateMachine):
    """A tier gives back what was put, or nothing; what it claims to hold it holds; capacity is kept."""

    keys = st.integers(0, 7)

    def make(self) -> Tier:
        raise NotImplementedError

    @initialize()
    def start(self) -> None:
        self.tier = self.make()
        self.put_before: set[ChunkKey] = set()

    @staticmethod
    def record(index: int) -> bytearray:
        return encode_record(sample_key(index), sample_meta(), sample_payload(index, 20_000 + 60_000 * index))

    @rule(index=keys)
    def put(self, index: int) -> None:
        if self.tier.put(sample_key(index), memoryview(self.record(index))):
            self.put_before.add(sample_key(index))
            assert self.tier.contains(sample_key(index))

    @rule(index=keys)
    def get(self, index: int) -> None:
        held = self.tier.contains(sample_key(index))
        found = self.tier.get(sample_key(index))
        assert (found is not None) == held
        assert found is None or (found == self.record(index) and sample_key(index) in self.put_before)

    @rule(index=keys)
    def drop(self, index: int) -> None:
        held = self.tier.contains(sample_key(index))
        assert self.tier.drop(sample_key(index)) == held
        assert not self.tier.contains(sample_key(index))

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "tier"):
            sizes = dict(self.tier.keys())
            stat = self.tier.stat()
            assert stat.chunks == len(sizes)
            assert stat.bytes == sum(sizes.values()) <= stat.capacity_bytes
            assert set(sizes) <= self.put_before

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            self.tier.close()


class HostTierMachine(TierMachine):
    """With pins: a pinned record keeps its bytes whatever happens to its key, and its room is freed at the end."""

    def make(self) -> Tier:
        self.pinned: list[tuple[int, Slot]] = []
        return HostTier(16 * PAGE_BYTES)

    @rule(index=TierMachine.keys)
    def pin(self, index: int) -> None:
        assert isinstance(self.tier, HostTier)
        slot = self.tier.pin(sample_key(index))
        if slot is not None:
            self.pinned.append((index, slot))

    @precondition(lambda self: self.pinned)
    @rule(choice=st.integers(0))
    def unpin(self, choice: int) -> None:
        assert isinstance(self.tier, HostTier)
        _, slot = self.pinned.pop(choice % len(self.pinned))
        self.tier.unpin(slot)

    @invariant()
    def pinned_records_keep_their_bytes(self) -> None:
        if not hasattr(self, "tier"):
            return
        assert isinstance(self.tier, HostTier)
        for index, slot in self.pinned:
            assert self.tier.view(slot) == self.record(index)
        pages = {slot.start_page: slot.pages for _, slot in self.pinned}
        assert self.tier.stat().pinned_bytes == sum(pages.values()) * PAGE_BYTES

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            assert isinstance(self.tier, HostTier)
            for _, slot in self.pinned:
                self.tier.unpin(slot)
            for key, _ in list(self.tier.keys()):
                self.tier.drop(key)
            assert self.tier.reserve(sample_key(0), 16 * PAGE_BYTES) is not None, "room leaked"
        super().teardown()


class FileTierMachine(TierMachine):
    """With restarts: what was there is found again."""

    def make(self) -> Tier:
        self.folder = Path(tempfile.mkdtemp(prefix="kvstore-"))
        return self.open()

    def open(self) -> Tier:
        tier = FileTier(self.folder, capacity_bytes=16 * PAGE_BYTES)
        assert tier.wait_scanned(30.0)
        return tier

    @rule()
    def restart(self) -> None:
        before = set(self.tier.keys())
        self.tier.close()
        self.tier = self.open()
        assert set(self.tier.keys()) == before

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "folder"):
            assert not list(self.folder.rglob("*.tmp"))
            shutil.rmtree(self.folder)


_RELAXED = settings(deadline=None, max_examples=40, stateful_step_count=25, suppress_health_check=list(HealthCheck))
TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)
TestHostTier = HostTierMachine.TestCase
TestHostTier.settings = _RELAXED
TestFileTier = FileTierMachine.TestCase
TestFileTier.settings = settings(_RELAXED, max_examples=10)
