"""The parts of the NIXL data path that need no NIXL: signed words, control frames, books of the staging memory."""

import doctest
import itertools
import os
import socket
import subprocess
import time
import types
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvariantError, SettingsError
from kvstore.settings import MIN_STAGING_BYTES, NixlSettings
from kvstore.transport import MAX_HANDLE_BYTES, Offer, OfferRefusedError, PeerGoneError, nixl, nixl_life, nixl_wire
from kvstore.transport.nixl import NixlTransport, plan_pieces
from kvstore.transport.nixl_life import LifeState, Outcome, PendingRead, SidecarLife, sidecar_environment
from kvstore.transport.nixl_service import NixlService
from kvstore.transport.nixl_staging import PAGE_BYTES, LandingSlot, SlotState, Staging
from kvstore.transport.nixl_wire import (
    HEAD,
    MAGIC,
    MAX_FRAME_BYTES,
    MAX_METADATA_BYTES,
    STILL_S,
    AddPeer,
    Address,
    Done,
    Failed,
    Handle,
    NixlUnavailableError,
    Order,
    Ping,
    Read,
    SidecarFrameError,
    decode_address,
    decode_handle,
    decode_order,
    decode_report,
    encode,
    encode_address,
    encode_handle,
    is_head_of,
)

SECRET = b"a secret of a test cluster"
ADDRESS = Address("node-a", "e1", 2, 0x7F0000000000, 1 << 20, b"metadata")
HANDLE = Handle(ADDRESS.agent, ADDRESS.base + 4032, 8192, bytes(range(16)), b"address")


@pytest.mark.parametrize("module", [nixl, nixl_life, nixl_wire])
def test_examples_run(module: types.ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


# What is signed.


def test_signed_words_come_back() -> None:
    assert decode_address(encode_address(ADDRESS, secret=SECRET), secret=SECRET) == ADDRESS
    assert decode_handle(encode_handle(HANDLE, secret=SECRET), secret=SECRET) == HANDLE


def test_every_flipped_bit_is_refused() -> None:
    for data, decode in (
        (encode_address(ADDRESS, secret=SECRET), decode_address),
        (encode_handle(HANDLE, secret=SECRET), decode_handle),
    ):
        for bit in range(8 * len(data)):
            forged = bytearray(data)
            forged[bit // 8] ^= 1 << bit % 8
            with pytest.raises(OfferRefusedError):
                decode(bytes(forged), secret=SECRET)


def test_an_address_is_no_handle() -> None:
    with pytest.raises(OfferRefusedError):
        decode_handle(encode_address(ADDRESS, secret=SECRET), secret=SECRET)
    with pytest.raises(OfferRefusedError):
        decode_address(encode_handle(HANDLE, secret=SECRET), secret=SECRET)


@given(st.binary(max_size=2 * MAX_HANDLE_BYTES))
def test_garbage_is_refused(data: bytes) -> None:
    for decode in (decode_address, decode_handle):
        with pytest.raises(OfferRefusedError):
            decode(data, secret=SECRET)


@pytest.mark.parametrize(
    "wrong",
    [{"token": b"short"}, {"head_address": 0}, {"head_address": -1}, {"stored_bytes": 0}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_signed_handle_that_names_no_record_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(OfferRefusedError):
        decode_handle(encode_handle(msgspec.structs.replace(HANDLE, **wrong), secret=SECRET), secret=SECRET)


def test_handle_leaves_out_an_address_that_does_not_fit() -> None:
    """Many devices make long metadata; the puller then has to ask for the address."""
    long = msgspec.structs.replace(HANDLE, address=bytes(MAX_HANDLE_BYTES))
    data = encode_handle(long, secret=SECRET)
    assert len(data) <= MAX_HANDLE_BYTES
    assert decode_handle(data, secret=SECRET).address == b""


def test_head_must_be_the_offers() -> None:
    head = HEAD.pack(MAGIC, HANDLE.token, HANDLE.stored_bytes)
    assert is_head_of(head, HANDLE)
    assert not is_head_of(bytes(HEAD.size), HANDLE)
    assert not is_head_of(HEAD.pack(MAGIC, bytes(16), HANDLE.stored_bytes), HANDLE)
    assert not is_head_of(HEAD.pack(MAGIC, HANDLE.token, HANDLE.stored_bytes + 1), HANDLE)
    assert not is_head_of(HEAD.pack(b"otherone", HANDLE.token, HANDLE.stored_bytes), HANDLE)


# Control frames.


def test_orders_come_back() -> None:
    for order in (AddPeer("a-e-1", b"metadata"), Read(1, "a-e-1", 2**47, 4096, 1 << 20), Ping(7)):
        assert decode_order(encode(order)) == order


def test_frames_are_bounded() -> None:
    with pytest.raises(SidecarFrameError):
        encode(AddPeer("a-e-1", bytes(MAX_FRAME_BYTES)))


@given(st.binary(max_size=200))
def test_garbage_is_no_frame(data: bytes) -> None:
    for decode in (decode_order, decode_report):
        try:
            decode(data)
        except SidecarFrameError:
            continue


# The staging memory.


@pytest.fixture
def staging() -> Staging:
    staging = Staging(MIN_STAGING_BYTES)
    staging.close_fd()
    return staging


def test_staging_must_have_room_for_pieces() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(SettingsError, match=r"nixl\.staging_bytes"):
        Staging(MIN_STAGING_BYTES - 1)
    assert os.listdir("/proc/self/fd") == before


def test_slots_do_not_overlap_each_other_or_records(staging: Staging) -> None:
    stops = [slot.offset + slot.num_bytes for slot in staging.slots]
    assert [slot.offset for slot in staging.slots] == [0, *stops[:-1]]
    assert stops[-1] <= staging.landing_bytes
    record = staging.stage(bytes(16), 1, now_s=0.0, expires_s=1.0)
    assert record is not None
    assert staging.head_position(record) >= staging.landing_bytes


def test_slot_goes_through_its_states(staging: Staging) -> None:
    slot = staging.take()
    assert slot is not None
    assert slot.state is SlotState.POSTED
    staging.quarantine(slot)
    assert staging.quarantined_bytes == slot.num_bytes
    assert 0 < staging.quarantined_ratio <= 1
    others = [staging.take() for _ in range(len(staging.slots) - 1)]
    assert slot not in others
    assert staging.take() is None
    with pytest.raises(InvariantError):
        staging.quarantine(slot)
    staging.done(slot)
    assert staging.quarantined_bytes == 0
    assert staging.take() is slot
    staging.done(slot)
    with pytest.raises(InvariantError):
        staging.done(slot)


def test_record_keeps_its_bytes_for_a_moment_after_its_end(staging: Staging) -> None:
    """And its head is gone at once."""
    size = staging.num_bytes - staging.landing_bytes - PAGE_BYTES
    record = staging.stage(b"t" * 16, size, now_s=0.0, expires_s=9.0)
    assert record is not None
    staging.fill(record, memoryview(bytes([7]) * size))
    head = staging.head_position(record)
    assert is_head_of(staging.read(head, HEAD.size), Handle("a", 1, size, b"t" * 16))
    assert staging.stage(b"u" * 16, 1, now_s=0.0, expires_s=9.0) is None
    staging.unstage(record, now_s=1.0)
    assert staging.read(head, HEAD.size) == bytes(HEAD.size)
    assert staging.stage(b"u" * 16, 1, now_s=1.0 + 0.9 * STILL_S, expires_s=9.0) is None
    assert staging.read(head + HEAD.size, size) == bytes([7]) * size
    assert staging.stage(b"u" * 16, size, now_s=1.01 + STILL_S, expires_s=9.0) is not None


def test_copying_after_the_end_is_refused(staging: Staging) -> None:
    staging.unmap()
    with pytest.raises(NixlUnavailableError):
        staging.copy_out(0, memoryview(bytearray(8)))


@given(st.integers(1, 300 << 20), st.sampled_from([1 << 20, 2 << 20, (1 << 20) + PAGE_BYTES]))
def test_pieces_cover_a_record_in_order(stored_bytes: int, most: int) -> None:
    position = 0
    for piece in plan_pieces(stored_bytes, max_piece_bytes=most):
        assert piece.start == position
        assert position < piece.stop <= position + most
        assert piece.head_bytes == (HEAD.size if position == 0 else 0)
        assert piece.start % PAGE_BYTES == 0
        position = piece.stop
    assert position == stored_bytes


# One sidecar's books, with a process that does nothing in its place.


@pytest.fixture
def life(monkeypatch: pytest.MonkeyPatch) -> Iterator[SidecarLife]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(nixl_life, "_spawn", lambda *_: (process, ours))
    life = SidecarLife(NixlSettings(staging_bytes=MIN_STAGING_BYTES), node_id="a", epoch="e", generation=1, now_s=0.0)
    yield life
    life.kill()
    life.bury(process.wait())
    theirs.close()


def posted(life: SidecarLife) -> PendingRead:
    slot = life.staging.take()
    assert slot is not None
    pending = life.post(slot, agent="b-e-1", remote_address=4096, num_bytes=4096)
    assert pending is not None
    return pending


@pytest.mark.parametrize("order", list(itertools.permutations(["told to stop", "done", "given up"])), ids="-".join)
def test_slot_of_a_read_that_ends_well_comes_back(life: SidecarLife, order: tuple[str, ...]) -> None:
    """In whatever order the three things happen, and not before NIXL is done with it."""
    pending = posted(life)
    acts = {
        "told to stop": lambda: pending.end(Outcome.LOST, "the transport was closed"),
        "done": lambda: life.handle(Done(pending.number)),
        "given up": lambda: life.abandon(pending),
    }
    is_done = False
    for name in order:
        acts[name]()
        is_done |= name == "done"
        assert is_done or pending.slot.state is not SlotState.FREE
    assert life.staging.free_slots == len(life.staging.slots)
    assert not life.reads


@pytest.mark.parametrize("was_posted", [True, False])
@pytest.mark.parametrize("is_late", [True, False])
def test_slot_of_a_read_that_fails_stays_in_quarantine(life: SidecarLife, was_posted: bool, is_late: bool) -> None:
    """Unless nothing was posted: then nothing can land."""
    pending = posted(life)
    if is_late:
        life.abandon(pending)
    life.handle(Failed(pending.number, "remote disconnect", was_posted))
    life.abandon(pending)
    assert pending.outcome is Outcome.FAILED
    assert pending.slot.state is (SlotState.QUARANTINED if was_posted else SlotState.FREE)
    life.handle(Done(pending.number))
    assert pending.slot.state is (SlotState.QUARANTINED if was_posted else SlotState.FREE)


def test_death_ends_every_read(life: SidecarLife) -> None:
    pending = posted(life)
    life.kill()
    life.bury(life.process.wait())
    assert pending.outcome is Outcome.LOST
    assert pending.reason == "the NIXL sidecar died of signal 9"
    life.abandon(pending)


def test_slot_comes_back_whatever_keeps_a_read_from_starting(
    life: SidecarLife, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = NixlService(NixlSettings(), secret=SECRET, node_id="a", epoch="e")
    life.state = LifeState.READY
    huge = msgspec.structs.replace(ADDRESS, metadata=bytes(MAX_FRAME_BYTES))
    for source, error in ((huge, SidecarFrameError), (ADDRESS, NixlUnavailableError)):
        slot = life.staging.take()
        assert slot is not None
        if source is ADDRESS:
            monkeypatch.setattr(life, "send", lambda order: isinstance(order, AddPeer))
        with pytest.raises(error):
            service.post(life, slot, source=source, remote_address=4096, num_bytes=4096)
        assert life.staging.free_slots == len(life.staging.slots)


def test_address_that_no_sidecar_takes_is_refused() -> None:
    """Before anything is posted: the frame to the sidecar holds the metadata."""
    largest = msgspec.structs.replace(ADDRESS, metadata=bytes(MAX_METADATA_BYTES))
    assert decode_address(encode_address(largest, secret=SECRET), secret=SECRET) == largest
    huge = msgspec.structs.replace(ADDRESS, metadata=bytes(MAX_FRAME_BYTES))
    with pytest.raises(OfferRefusedError, match="a sidecar takes at most"):
        decode_address(encode_address(huge, secret=SECRET), secret=SECRET)


# A pull among other pulls, without a sidecar.


class CrowdedService(NixlService):
    """Its reads end as soon as they are waited for, and a neighbour takes every slot that the pull gives back."""

    def __init__(self, life: SidecarLife, *, remote: bytes, base: int, free_slots: int) -> None:
        super().__init__(NixlSettings(), secret=SECRET, node_id="a", epoch="e")
        life.state = LifeState.READY
        self._lives.append(life)
        self._life = life
        self._remote, self._base = remote, base
        self.orders: dict[int, Read] = {}
        self.waits = 0
        self._neighbours = [life.staging.take() for _ in range(len(life.staging.slots) - free_slots)]

    def send(self, order: Order) -> bool:
        """In the place of the sidecar's."""
        if isinstance(order, Read):
            self.orders[order.number] = order
        return True

    def take_slot(self, life: SidecarLife, *, stop_s: float) -> LandingSlot:
        held = len(life.staging.slots) - life.staging.free_slots - len(self._neighbours)
        assert held == 0, f"waits for a slot while it holds {held}"
        self.waits += 1
        self._take_or_leave(num_left=1)
        return super().take_slot(life, stop_s=stop_s)

    def wait(self, pending: PendingRead, *, stop_s: float) -> None:
        order = self.orders[pending.number]
        start = order.remote_address - self._base
        landed = np.frombuffer(self._remote[start : start + order.num_bytes], dtype=np.uint8)
        self._life.staging._bytes[order.offset : order.offset + order.num_bytes] = landed
        with self.lock:
            self._life.handle(Done(pending.number))
        super().wait(pending, stop_s=stop_s)

    def free_slot(self, life: SidecarLife, slot: LandingSlot) -> None:
        super().free_slot(life, slot)
        self._take_or_leave(num_left=0)

    def give_up(self, life: SidecarLife, pending: PendingRead) -> None:
        super().give_up(life, pending)
        self._take_or_leave(num_left=0)

    def _take_or_leave(self, *, num_left: int) -> None:
        staging = self._life.staging
        while staging.free_slots > num_left:
            self._neighbours.append(staging.take())
        while staging.free_slots < num_left:
            slot = self._neighbours.pop()
            assert slot is not None
            staging.done(slot)


@pytest.mark.parametrize("free_slots", [0, 1, 2, 3])
@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("trust_s", [-1.0, STILL_S], ids=["slow", "quick"])
def test_pull_never_waits_for_a_slot_while_it_holds_one(
    life: SidecarLife, monkeypatch: pytest.MonkeyPatch, free_slots: int, is_streamed: bool, trust_s: float
) -> None:
    """Otherwise pulls that hold all slots together wait for each other until their time is over."""
    monkeypatch.setattr(nixl, "_TRUST_S", trust_s)
    record = bytes(range(256)) * (5 << 12)
    token = bytes(16)
    source = Address("b", "e", 1, 1 << 40, len(record) + HEAD.size, b"metadata")
    remote = HEAD.pack(MAGIC, token, len(record)) + record
    service = CrowdedService(life, remote=remote, base=source.base, free_slots=free_slots)
    monkeypatch.setattr(life, "send", service.send)
    transport = NixlTransport(service, address=encode_address(source, secret=SECRET))
    handle = encode_handle(Handle(source.agent, source.base, len(record), token, b""), secret=SECRET)
    into, told = bytearray(len(record)), list[int]()
    transport.pull(
        Offer("nixl", handle, len(record)),
        memoryview(into),
        stop_s=time.monotonic() + 30.0,
        on_bytes=told.append if is_streamed else None,
    )
    assert into == record
    assert service.waits >= (0 if free_slots else 1)
    assert told == ([(n + 1) << 20 for n in range(5)] if is_streamed else [])
    assert not life.reads
    num_looks = sum(order.num_bytes == HEAD.size for order in service.orders.values())
    assert num_looks == (0 if trust_s > 0 else 1 + 5 * is_streamed)


def test_peer_is_known_only_when_the_sidecar_was_told(life: SidecarLife, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every later read of it fails, and the peer is blamed."""
    orders: list[Order] = []
    with monkeypatch.context() as frozen:
        frozen.setattr(life, "send", lambda _: False)
        assert not life.add_peer(ADDRESS)
    monkeypatch.setattr(life, "send", lambda order: orders.append(order) or True)
    assert life.add_peer(ADDRESS)
    assert life.add_peer(ADDRESS)
    assert orders == [AddPeer(ADDRESS.agent, ADDRESS.metadata)]


# The service, without a sidecar.


def test_sidecar_environment_is_a_list_of_what_may_pass() -> None:
    of_store = {
        "PATH": "/bin",
        "UCX_TLS": "tcp",
        "UCX_TCP_TX_SEG_SIZE": "1m",
        "LEARNONCE_CLUSTER_ID": "id",
        "LEARNONCE_CLUSTER_SECRET": "s",
        "LEARNONCE_STORE_KEY": "s",
        "AWS_SECRET_ACCESS_KEY": "s",
        "RAY_AUTH_TOKEN": "s",
    }
    passed = sidecar_environment(NixlSettings(net_devices="eth1"), environment=of_store, path=["", "/app"])
    assert "s" not in passed.values()
    assert passed["UCX_NET_DEVICES"] == "eth1"
    assert passed["UCX_TCP_TX_SEG_SIZE"] == "1m"
    assert passed["UCX_TCP_RX_SEG_SIZE"] == "256k"
    assert passed["PYTHONPATH"] == "/app"
    assert passed["LEARNONCE_CLUSTER_ID"] == "id"


def test_service_that_was_not_started_is_unavailable() -> None:
    service = NixlService(NixlSettings(), secret=SECRET, node_id="a", epoch="e")
    assert service.unavailable_reason == "the NIXL sidecar has not been started"
    assert service.address == b""
    transport = NixlTransport(service, address=encode_address(ADDRESS, secret=SECRET))
    with pytest.raises(PeerGoneError, match="has not been started"):
        service.current()
    transport.close()
    service.close()


def test_wrong_settings_are_a_reason_not_an_error() -> None:
    service = NixlService(NixlSettings.model_construct(staging_bytes=1), secret=SECRET, node_id="a", epoch="e")
    service.start()
    assert not service.wait_ready(10.0)
    assert "nixl.staging_bytes must be at least" in (service.unavailable_reason or "")
    service.close()
