"""What breaks around NIXL, on real agents over UCX's TCP: peers, sidecars of either side, late bytes, forged blobs."""

import importlib.util
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil
import pytest

from kvstore.interfaces import OnBytes
from kvstore.testing.poll import wait_until
from kvstore.testing.samples import sample_payload
from kvstore.testing.transport import KIB, LATE_S, MIB, open_things, soon
from kvstore.testing.transport_faults import PeerProcess, TransportFaultContract, once_in_the_middle
from kvstore.testing.transport_nixl import NETWORK, SECRET, nixl_service, sidecar_pids
from kvstore.transport import Offer, OfferRefusedError, PeerGoneError, Transport
from kvstore.transport.nixl import NixlServer, NixlService, NixlTransport
from kvstore.transport.nixl_life import SidecarLife
from kvstore.transport.nixl_staging import SlotState
from kvstore.transport.nixl_wire import decode_address, decode_handle, encode_address, encode_handle

pytestmark = pytest.mark.skipif(importlib.util.find_spec("nixl_cu12") is None, reason="nixl-cu12 is not installed")

FACTORY = "kvstore.testing.transport_nixl:nixl_holder"
PATIENCE_S = 1.0
"""Of services whose sidecar a test freezes."""


@pytest.fixture(scope="module", autouse=True)
def _network() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in NETWORK.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def shared() -> Iterator[NixlService]:
    """A puller's service for the contract, which lives through all of its faults."""
    service = nixl_service("puller")
    yield service
    service.close()


class TestNixlPeerFaults(TransportFaultContract):
    factory = FACTORY
    service: NixlService

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self, shared: NixlService) -> Iterator[None]:
        self.service = shared
        before = open_things()
        yield
        wait_until(lambda: open_things().is_within(before), what=f"no more than {before} to be open")

    def make_client(self, address: bytes) -> Transport:
        assert self.service.wait_ready(30.0)
        return NixlTransport(self.service, address=address)

    def test_peer_restarted_before_a_pull(self, peer: PeerProcess, client: Transport) -> None:
        """An agent's address names one life: the node keeps its name, and gets another address."""
        old = peer.offer(1, MIB)
        former = decode_address(peer.address, secret=SECRET)
        peer.kill()
        peer.restart()
        assert decode_address(peer.address, secret=SECRET).node_id == former.node_id
        with pytest.raises((OfferRefusedError, PeerGoneError)):
            client.pull(old, self.room(client, MIB), stop_s=soon())
        self.assert_works_again(peer, client)


@pytest.fixture
def service() -> Iterator[NixlService]:
    """A puller's service with small memory, closed; it leaves neither processes nor memory."""
    before = (open_things(), sidecar_pids())
    service = nixl_service("puller", patience_s=PATIENCE_S, staging_bytes=64 << 20)
    yield service
    service.close()
    assert sidecar_pids() == before[1]
    assert num_mapped() == len(before[1])
    wait_until(lambda: open_things().is_within(before[0]), what=f"no more than {before} to be open")


@pytest.fixture
def peer(service: NixlService) -> Iterator[PeerProcess]:
    peer = PeerProcess(FACTORY, {"patience_s": PATIENCE_S})
    yield peer
    peer.stop()


@pytest.fixture
def client(service: NixlService, peer: PeerProcess) -> Iterator[NixlTransport]:
    client = NixlTransport(service, address=peer.address)
    pull(client, peer.offer(99, 68 * KIB), 99)
    yield client
    client.close()


def pull(client: NixlTransport, offer: Offer, seed: int, *, on_bytes: OnBytes | None = None) -> None:
    """Pull, and compare."""
    into = memoryview(bytearray(offer.stored_bytes))
    client.pull(offer, into, stop_s=soon(), on_bytes=on_bytes)
    assert into == sample_payload(seed, offer.stored_bytes)


def late_pull(client: NixlTransport, offer: Offer, peer: PeerProcess, *, deadline_s: float = 0.5) -> None:
    """Freeze the peer in the middle, and miss the deadline."""
    broken_pull(client, offer, peer.freeze, deadline_s=deadline_s)


def broken_pull(
    client: NixlTransport, offer: Offer, fault: Callable[[], object], *, deadline_s: float = 1.0
) -> memoryview:
    """A pull that `fault` ends, and in time; the memory that it was for."""
    into = memoryview(bytearray(offer.stored_bytes))
    stop_s = time.monotonic() + deadline_s
    happened: list[object] = []
    on_bytes = once_in_the_middle(offer.stored_bytes, lambda: happened.append(fault()))
    with pytest.raises(PeerGoneError):
        client.pull(offer, into, stop_s=stop_s, on_bytes=on_bytes)
    assert time.monotonic() - stop_s < LATE_S
    assert happened
    return into


def life_of(service: NixlService) -> SidecarLife:
    return service.current()


def is_replaced(service: NixlService, former: SidecarLife) -> bool:
    return service.unavailable_reason is None and service.current() is not former


# Late landing.


def test_late_bytes_change_no_later_chunk(service: NixlService, peer: PeerProcess, client: NixlTransport) -> None:
    """A frozen peer is thawed while its former victim reads from another one, again and again in the same memory."""
    life = life_of(service)
    late_pull(client, peer.offer(1, 16 * MIB), peer)
    held = [slot for slot in life.staging.slots if slot.state is SlotState.QUARANTINED]
    assert held
    second = PeerProcess(FACTORY, {})
    try:
        other = NixlTransport(service, address=second.address)
        landed: list[bytes] = []
        is_over = threading.Event()

        def keep_pulling() -> None:
            while not is_over.is_set():
                into = memoryview(bytearray(8 * MIB))
                other.pull(second.offer(len(landed) % 5, 8 * MIB), into, stop_s=soon())
                landed.append(bytes(into))

        thread = threading.Thread(target=keep_pulling)
        thread.start()
        wait_until(lambda: len(landed) > 3, what="transfers before the thaw")
        peer.thaw()
        wait_until(lambda: all(slot.state is not SlotState.QUARANTINED for slot in held), what="the late bytes to land")
        seen = len(landed)
        wait_until(lambda: len(landed) > seen + 3, what="transfers after the thaw")
        is_over.set()
        thread.join(30.0)
        other.close()
        for index, data in enumerate(landed):
            assert data == sample_payload(index % 5, 8 * MIB)
    finally:
        second.kill()
    # NIXL said that the late reads ended well, so their slots came back; the agent is the same.
    assert life_of(service) is life
    assert life.staging.free_slots == len(life.staging.slots)


def test_late_bytes_land_in_quarantine_only(service: NixlService, peer: PeerProcess, client: NixlTransport) -> None:
    """They do land, after the pull has raised: in slots that nobody can take, and nowhere else."""
    late_pull(client, peer.offer(1, 16 * MIB), peer)
    life = life_of(service)
    mark = memoryview(bytes([0x77]) * MIB)
    with service.lock:
        taken = []
        while (slot := life.staging.take()) is not None:
            taken.append(slot)
        assert life.reads
        landing = {pending.slot.offset for pending in life.reads.values()}
    memory = memoryview(life.staging._bytes)
    for slot in life.staging.slots:
        memory[slot.offset : slot.offset + MIB] = mark
    peer.thaw()
    wait_until(lambda: not life.reads, what="the late bytes to land")
    assert all(memory[slot.offset : slot.offset + MIB] == mark for slot in taken)
    changed = {slot.offset for slot in life.staging.slots if memory[slot.offset : slot.offset + MIB] != mark}
    assert changed
    assert changed <= landing
    with service.lock:
        for slot in taken:
            life.staging.done(slot)
    assert life.staging.free_slots == len(life.staging.slots)
    memory.release()


def test_too_much_in_quarantine_replaces_the_agent(peer: PeerProcess) -> None:
    """By another process with other memory, while the old one still ends what it has."""
    # One slot of seven is too much: on a busy machine the peer takes so long to freeze that all but the last piece
    # of the three under way have landed, and are in no quarantine.
    service = nixl_service("puller-b", staging_bytes=16 << 20, quarantine_ratio=0.1)
    client = NixlTransport(service, address=peer.address)
    offer = peer.offer(1, 16 * MIB)
    pull(client, offer, 1)
    former = life_of(service)
    late_pull(client, offer, peer)
    wait_until(lambda: is_replaced(service, former), what="the next agent")
    assert life_of(service).generation == former.generation + 1
    assert former.process.pid in sidecar_pids()
    peer.thaw()
    wait_until(lambda: former.process.pid not in sidecar_pids(), what="the former agent to end")
    pull(client, peer.offer(2, 3 * MIB), 2)
    client.close()
    service.close()


# The sidecars.


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_own_sidecar_dies_in_the_middle(
    service: NixlService, peer: PeerProcess, client: NixlTransport, how: signal.Signals
) -> None:
    """An error at once, and another sidecar soon; the peer notices nothing."""
    former = life_of(service)
    offer, start_s = peer.offer(1, 64 * MIB), time.monotonic()
    broken_pull(client, offer, lambda: kill(former, how), deadline_s=60.0)
    assert time.monotonic() - start_s < LATE_S
    wait_until(lambda: is_replaced(service, former), what="the next sidecar")
    pull(client, peer.offer(2, MIB), 2)


def test_own_sidecar_freezes_in_the_middle(service: NixlService, peer: PeerProcess, client: NixlTransport) -> None:
    """An error at the deadline; the hung one is killed and replaced, and cannot wake up again."""
    former = life_of(service)
    broken_pull(client, peer.offer(1, 64 * MIB), lambda: kill(former, signal.SIGSTOP))
    wait_until(lambda: is_replaced(service, former), what="the next sidecar")
    assert not psutil.pid_exists(former.process.pid)
    pull(client, peer.offer(2, MIB), 2)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
def test_sidecar_of_the_peer_fails_in_the_middle(
    service: NixlService, peer: PeerProcess, client: NixlTransport, how: signal.Signals
) -> None:
    """An error in time; the peer's store lives on, and its next agent is reached without a new transport."""
    (victim,) = sidecar_pids(peer._process.pid)
    into = broken_pull(client, peer.offer(1, 64 * MIB), lambda: os.kill(victim, how))
    into[:] = bytes(len(into))
    wait_until(lambda: has_another_sidecar(peer, victim), what="the peer's next sidecar")
    pull(client, peer.offer(2, MIB), 2)
    assert into == bytes(len(into))


def test_sidecars_die_with_their_store(service: NixlService, peer: PeerProcess, client: NixlTransport) -> None:
    """SIGKILL of the store alone takes its sidecar with it."""
    (sidecar,) = sidecar_pids(peer._process.pid)
    os.kill(peer._process.pid, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(sidecar) or is_zombie(sidecar), what="the sidecar to die")
    peer.kill()


def test_thawed_store_keeps_its_sidecar(service: NixlService, peer: PeerProcess, client: NixlTransport) -> None:
    """That store and sidecar were both frozen is no reason to take the sidecar for hung."""
    before = sidecar_pids(peer._process.pid)
    peer.freeze()
    frozen_s = time.monotonic()
    wait_until(lambda: time.monotonic() - frozen_s > 2 * PATIENCE_S, what="more than the patience to pass")
    peer.thaw()
    thawed_s = time.monotonic()
    wait_until(lambda: time.monotonic() - thawed_s > PATIENCE_S, what="the store to look at its sidecar again")
    assert sidecar_pids(peer._process.pid) == before
    pull(client, peer.offer(2, MIB), 2)


def test_sidecar_that_dies_at_every_start_is_retried_slowly() -> None:
    """The store has a reason in words, and no busy loop."""
    service = nixl_service("puller", staging_bytes=16 << 20)
    try:
        starts = []
        for _ in range(3):
            former = life_of(service)
            starts.append(time.monotonic())
            kill(former, signal.SIGKILL)
            wait_until(lambda former=former: is_replaced(service, former), what="the next sidecar")
        assert service._pause_s >= 2.0
    finally:
        service.close()


# Metadata and handles.


@dataclass(frozen=True)
class Calm:
    """Both ends of a path that nothing breaks: one for all tests that try to."""

    service: NixlService
    peer: PeerProcess
    client: NixlTransport


@pytest.fixture(scope="module")
def calm() -> Iterator[Calm]:
    service = nixl_service("puller-calm", staging_bytes=64 << 20)
    peer = PeerProcess(FACTORY, {})
    client = NixlTransport(service, address=peer.address)
    pull(client, peer.offer(99, 68 * KIB), 99)
    before = life_of(service)
    yield Calm(service, peer, client)
    assert life_of(service) is before
    client.close()
    peer.stop()
    service.close()


@pytest.mark.parametrize("at_share", [0.0, 0.05, 0.3, 0.6, 1.0])
def test_changed_address_never_reaches_nixl(calm: Calm, at_share: float) -> None:
    """One flipped bit, anywhere."""
    forged = bytearray(calm.peer.address)
    forged[int(at_share * (len(forged) - 1))] ^= 0x10
    with pytest.raises(OfferRefusedError):
        NixlTransport(calm.service, address=bytes(forged))
    assert_peers_unchanged(calm)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 200])
def test_cut_address_never_reaches_nixl(calm: Calm, length: int) -> None:
    with pytest.raises(OfferRefusedError):
        NixlTransport(calm.service, address=calm.peer.address[:length])
    assert_peers_unchanged(calm)


def test_address_of_another_cluster_never_reaches_nixl(calm: Calm) -> None:
    """Well made, with the base of the memory moved, and signed with another secret."""
    address = decode_address(calm.peer.address, secret=SECRET)
    moved = msgspec.structs.replace(address, base=address.base - (1 << 20))
    with pytest.raises(OfferRefusedError):
        NixlTransport(calm.service, address=encode_address(moved, secret=b"the secret of somebody else"))
    assert_peers_unchanged(calm)


def test_signed_nonsense_hurts_nobody(calm: Calm) -> None:
    """A member of the cluster that sends rubbish: refused by NIXL in the sidecar, and the good peer stays usable."""
    address = decode_address(calm.peer.address, secret=SECRET)
    for metadata in (b"rubbish", address.metadata[:100], address.metadata + b"tail"):
        wrong = msgspec.structs.replace(address, node_id="liar", metadata=metadata, generation=len(metadata))
        offer = calm.peer.offer(1, MIB)
        liar = NixlTransport(calm.service, address=encode_address(wrong, secret=SECRET))
        with pytest.raises((PeerGoneError, OfferRefusedError)):
            liar.pull(offer, memoryview(bytearray(MIB)), stop_s=soon())
        liar.close()
    pull(calm.client, calm.peer.offer(2, MIB), 2)


def test_handle_outside_the_peers_memory_is_refused(calm: Calm) -> None:
    """Signed all the same: NIXL would read what the peer never registered."""
    offer = calm.peer.offer(1, MIB)
    address = decode_address(calm.peer.address, secret=SECRET)
    handle = decode_handle(offer.handle, secret=SECRET)
    stop = address.base + address.size_bytes
    for position in (address.base - 1, stop - MIB, stop, 1):
        moved = encode_handle(msgspec.structs.replace(handle, head_address=position), secret=SECRET)
        with pytest.raises(OfferRefusedError, match="leaves the memory"):
            calm.client.pull(msgspec.structs.replace(offer, handle=moved), memoryview(bytearray(MIB)), stop_s=soon())
    pull(calm.client, offer, 1)


# Without NIXL.


def test_no_library_is_a_reason_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The store goes on, and does not try again."""
    for name in ("nixl_cu12", "nixl_cu13", "nixl_rocm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('no libcuda on this machine')")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = sidecar_pids()
    with pytest.raises(RuntimeError, match="no libcuda on this machine"):
        nixl_service("puller")
    assert sidecar_pids() == before


def test_ucx_without_a_transport_is_a_reason_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.testing.transport_nixl.READY_S", 4.0)
    before = sidecar_pids()
    with pytest.raises(RuntimeError, match="no usable UCX backend"):
        nixl_service("puller", net_devices="nodevice0")
    assert sidecar_pids() == before


def test_nothing_is_offered_without_an_agent() -> None:
    service = nixl_service("holder", staging_bytes=16 << 20)
    server = NixlServer(service)
    service.close()
    assert server.address == b""
    assert server.offer(memoryview(bytearray(MIB)), peer="puller", lifetime_s=1.0) is None
    assert service.unavailable_reason == "the NIXL service is closed"


# What an idle sidecar costs.


def test_pause_of_the_progress_thread_is_applied(service: NixlService) -> None:
    """A sidecar with an agent, a peer and nothing to do needs less than a tenth of a core."""
    life = life_of(service)
    assert life.progress_delay_us == 1000
    process = psutil.Process(life.process.pid)
    before, start_s = process.cpu_times(), time.monotonic()
    wait_until(lambda: time.monotonic() - start_s > 2.0, what="two idle seconds")
    after, seconds = process.cpu_times(), time.monotonic() - start_s
    assert (after.user + after.system - before.user - before.system) / seconds < 0.1


def test_sidecar_knows_no_secret(service: NixlService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEARNONCE_CLUSTER_SECRET", SECRET.hex())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not for the sidecar")
    former = life_of(service)
    kill(former, signal.SIGKILL)
    wait_until(lambda: is_replaced(service, former), what="the next sidecar")
    process = psutil.Process(life_of(service).process.pid)
    said = " ".join([*process.environ(), *process.environ().values(), *process.cmdline()])
    assert SECRET.hex() not in said
    assert "not for the sidecar" not in said


# Steps of the tests above.


def kill(life: SidecarLife, how: signal.Signals) -> None:
    os.kill(life.process.pid, how)


def num_mapped() -> int:
    """Staging memories that this process maps."""
    return Path("/proc/self/maps").read_text(encoding="utf-8").count("learnonce-nixl")


def is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def has_another_sidecar(peer: PeerProcess, former_pid: int) -> bool:
    """Whether the peer's store has another sidecar; its next offer waits for the agent."""
    return [pid for pid in sidecar_pids(peer._process.pid) if pid != former_pid] != []


def assert_peers_unchanged(calm: Calm) -> None:
    """NIXL knows the good peer, by its own address, and it works."""
    known = {agent for agent in life_of(calm.service).peers if not agent.startswith("liar-")}
    assert known == {decode_address(calm.peer.address, secret=SECRET).agent}
    pull(calm.client, calm.peer.offer(3, MIB), 3)
