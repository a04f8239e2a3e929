"""The arena under random histories of writers, readers that follow them, cuts, drops and evictions.

Covers: that no two slots share a page, that pages come back, that counts are sums. Does not cover: the tier protocol
(`kvstore_property_test.py`).
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.container import encode_header, parse_header
from kvstore.policy import POLICIES, make_policy
from kvstore.settings import PolicyName
from kvstore.testing.samples import sample_key, sample_meta
from kvstore.tiers.host import PAGE_BYTES, HostTier, Slot, SlotState

PAGES = 24


class ArenaMachine(RuleBasedStateMachine):
    """Every slot that somebody may touch has its pages for itself."""

    @initialize(policy=st.sampled_from(sorted(POLICIES)))
    def start(self, policy: PolicyName) -> None:
        self.host = HostTier(PAGES * PAGE_BYTES, policy=make_policy(policy), on_evict=self.note_evicted)
        self.writing: list[Slot] = []
        self.readers: list[Slot] = []
        self.held: set[Slot] = set()

    def note_evicted(self, slot: Slot) -> None:
        assert slot not in self.readers
        self.held.remove(slot)

    @rule(index=st.integers(0, 9), size=st.integers(1, 9 * PAGE_BYTES))
    def reserve(self, index: int, size: int) -> None:
        size = -(-size // 4096) * 4096
        slot = self.host.reserve(sample_key(index), size)
        if slot is not None:
            self.writing.append(slot)
        elif not self.writing and not self.readers:
            raise AssertionError("an idle arena has room for everything that fits it")

    @precondition(lambda self: self.writing)
    @rule(choice=st.integers(0), share=st.floats(0.01, 1.0))
    def shrink(self, choice: int, share: float) -> None:
        slot = self.writing[choice % len(self.writing)]
        self.host.shrink(slot, max(4096, int(share * slot.stored_bytes) // 4096 * 4096))

    @precondition(lambda self: self.writing)
    @rule(choice=st.integers(0))
    def commit(self, choice: int) -> None:
        slot = self.writing.pop(choice % len(self.writing))
        head = encode_header(
            slot.key, sample_meta(), payload_bytes=max(1, slot.stored_bytes - 4096), payload_checksum=1
        )
        was_held = self.host.contains(slot.key)
        assert self.host.commit(slot, parse_header(head)) == (not was_held)
        if not was_held:
            self.held.add(slot)

    @precondition(lambda self: self.writing)
    @rule(choice=st.integers(0))
    def discard(self, choice: int) -> None:
        self.host.discard(self.writing.pop(choice % len(self.writing)))

    @precondition(lambda self: self.writing)
    @rule(choice=st.integers(0))
    def follow(self, choice: int) -> None:
        slot = self.writing[choice % len(self.writing)]
        self.host.hold(slot)
        self.readers.append(slot)

    @rule(index=st.integers(0, 9))
    def read(self, index: int) -> None:
        slot = self.host.pin(sample_key(index))
        if slot is not None:
            self.readers.append(slot)

    @precondition(lambda self: self.readers)
    @rule(choice=st.integers(0))
    def unpin(self, choice: int) -> None:
        self.host.unpin(self.readers.pop(choice % len(self.readers)))

    @rule(index=st.integers(0, 9))
    def drop(self, index: int) -> None:
        slot = self.host.find(sample_key(index))
        assert self.host.drop(sample_key(index)) == (slot is not None)
        self.held.discard(slot) if slot else None

    @invariant()
    def pages_have_one_owner(self) -> None:
        if not hasattr(self, "host"):
            return
        slots = {*self.writing, *self.readers, *self.held}
        pages = [page for slot in slots for page in range(slot.start_page, slot.start_page + slot.pages)]
        assert len(pages) == len(set(pages))
        assert self.host._room.free_pages == PAGES - len(pages), "pages leaked, or were freed too early"
        assert all(slot.stored_bytes <= slot.pages * PAGE_BYTES for slot in slots)
        busy = {slot for slot in slots if slot.state is SlotState.WRITING or slot.pins}
        assert self.host.stat().pinned_bytes == sum(slot.pages for slot in busy) * PAGE_BYTES
        assert self.host.stat().bytes == sum(slot.stored_bytes for slot in self.held)

    def teardown(self) -> None:
        if not hasattr(self, "host"):
            return
        for slot in self.readers:
            self.host.unpin(slot)
        for slot in self.writing:
            self.host.discard(slot)
        for key, _ in list(self.host.keys()):
            self.host.drop(key)
        assert self.host._room.free_pages == PAGES
        assert self.host.stat().pinned_bytes == 0
        assert not self.host._writing_bytes
        self.host.close()


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(deadline=None, max_examples=80, stateful_step_count=40)
