"""The contract of `kvstore.transport.Transport` and `TransportServer`, as a suite to inherit.

A new data path subclasses `TransportContract` in a test module and implements `make_server` and `make_client`; one that
can only serve or fill memory of its own kind implements `place` and `room` too.

Covers: what every data path promises while both ends are well, and what a hostile puller gets.
Does not cover: peers that die, freeze or restart (`kvstore.testing.transport_faults`).
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import msgspec
import pytest

from cluster.errors import CallerError, DataError, LearnonceError, UnavailableError
from kvstore.testing.poll import wait_until
from kvstore.testing.samples import sample_payload
from kvstore.transport import MAX_HANDLE_BYTES, Offer, OfferRefusedError, PeerGoneError, Transport, TransportServer

KIB: Final = 1 << 10
MIB: Final = 1 << 20
RAGGED_BYTES: Final = (8 * KIB, 12 * KIB, 68 * KIB, MIB - 4 * KIB, MIB, MIB + 4 * KIB, 10 * MIB, 64 * MIB)
ROOM_BYTES: Final = 256 * MIB
"""What `place` and `room` of one test ask for at most, together."""
SOON_S: Final = 20.0
"""Deadline of what must work."""
LATE_S: Final = 2.0
"""How long after its deadline a call may return on a busy machine."""
_MARK: Final = 0xA5


class DataPathSuite:
    """What suites of data paths share: memory to pull into, and that nothing is left behind."""

    def room(self, client: Transport, num_bytes: int) -> memoryview:
        """Memory that the client can pull into, valid until the test ends."""
        return memoryview(bytearray(num_bytes))

    def leftovers(self) -> list[str]:
        """After both ends are closed: what remains beside threads and descriptors of this process, in words."""
        return []

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self) -> Iterator[None]:
        """Runs around a suite's fixtures: whatever they open is closed before it looks."""
        before = open_things()
        yield
        wait_until(lambda: open_things().is_within(before), what=f"no more than {before} to be open")
        assert self.leftovers() == []


class TransportContract(DataPathSuite):
    """Subclass this; pytest collects the subclass."""

    # What a subclass provides.

    def make_server(self) -> TransportServer:
        """A new holder's end with nothing to offer."""
        raise NotImplementedError

    def make_client(self, server: TransportServer) -> Transport:
        """A puller's end, of a peer that the server calls "puller"."""
        raise NotImplementedError

    def place(self, server: TransportServer, data: bytes) -> memoryview:
        """Memory with `data` that the server can offer, writable, valid until the test ends."""
        return memoryview(bytearray(data))

    # The suite.

    @pytest.fixture
    def server(self, _nothing_is_left: None) -> Iterator[TransportServer]:
        """A holder's end, closed afterwards."""
        server = self.make_server()
        yield server
        server.close()
        server.close()

    @pytest.fixture
    def client(self, server: TransportServer) -> Iterator[Transport]:
        """A puller's end, closed afterwards."""
        client = self.make_client(server)
        yield client
        client.close()
        client.close()

    def test_both_ends_have_the_same_name(self, server: TransportServer, client: Transport) -> None:
        """And offers carry it."""
        offer = self.offered(server, 1, 8 * KIB)[0]
        assert offer.transport == server.name == client.name

    @pytest.mark.parametrize("num_bytes", RAGGED_BYTES)
    def test_pull_brings_the_offered_bytes(self, server: TransportServer, client: Transport, num_bytes: int) -> None:
        """Whatever the size."""
        offer, data = self.offered(server, num_bytes, num_bytes)
        assert offer.stored_bytes == num_bytes
        assert 0 < len(offer.handle) <= MAX_HANDLE_BYTES
        into = self.room(client, num_bytes)
        client.pull(offer, into, stop_s=soon())
        assert into == data
        server.revoke(offer.handle)

    def test_many_threads_pull_at_the_same_time(self, server: TransportServer, client: Transport) -> None:
        """Each gets its own record; more threads than connections wait for their turn."""
        offers = [self.offered(server, index, RAGGED_BYTES[index % 6]) for index in range(24)]
        rooms = [self.room(client, offer.stored_bytes) for offer, _ in offers]

        def pull(index: int) -> None:
            client.pull(offers[index][0], rooms[index], stop_s=soon())

        with ThreadPoolExecutor(12) as pool:
            list(pool.map(pull, range(len(offers))))
        assert all(into == data for into, (_, data) in zip(rooms, offers, strict=True))

    def test_several_clients(self, server: TransportServer, client: Transport) -> None:
        """One going away does not disturb the other."""
        offer, data = self.offered(server, 1, MIB)
        other = self.make_client(server)
        into = self.room(other, MIB)
        other.pull(offer, into, stop_s=soon())
        other.close()
        again, data_again = self.offered(server, 2, MIB)
        into_again = self.room(client, MIB)
        client.pull(again, into_again, stop_s=soon())
        assert into == data
        assert into_again == data_again

    def test_on_bytes_is_monotone_and_true(self, server: TransportServer, client: Transport) -> None:
        """What it says is in place is right already: early layers are used while later ones are on their way."""
        num_bytes = 16 * MIB + 4 * KIB
        offer, data = self.offered(server, 1, num_bytes)
        into = self.room(client, num_bytes)
        into[:] = bytes([_MARK]) * num_bytes
        told = [0]

        def on_bytes(in_place: int) -> None:
            assert into[told[-1] : in_place] == data[told[-1] : in_place]
            told.append(in_place)

        client.pull(offer, into, stop_s=soon(), on_bytes=on_bytes)
        assert told == sorted(told)
        assert told[-1] == num_bytes
        assert len(told) > 8
        assert into == data

    def test_failing_on_bytes_ends_the_pull(self, server: TransportServer, client: Transport) -> None:
        """The consumer's error comes out, and the path is good for the next record."""

        class ConsumerError(Exception):
            pass

        def on_bytes(in_place: int) -> None:
            raise ConsumerError

        offer, _ = self.offered(server, 1, 4 * MIB)
        with pytest.raises(ConsumerError):
            client.pull(offer, self.room(client, 4 * MIB), stop_s=soon(), on_bytes=on_bytes)
        self.assert_works(server, client)

    # Handles.

    def test_handles_differ(self, server: TransportServer, client: Transport) -> None:
        """Also for the same record."""
        record = self.place(server, sample_payload(1, 8 * KIB))
        handles = {self.offer_of(server, record).handle for _ in range(8)}
        assert len(handles) == 8

    @pytest.mark.parametrize("at_byte", [0, -1])
    def test_forged_handle_is_refused(self, server: TransportServer, client: Transport, at_byte: int) -> None:
        """One bit is enough, and no byte is written."""
        offer, _ = self.offered(server, 1, MIB)
        forged = bytearray(offer.handle)
        forged[at_byte] ^= 1
        self.assert_refused(client, msgspec.structs.replace(offer, handle=bytes(forged)))
        self.assert_works(server, client)

    @pytest.mark.parametrize("handle", [b"", b"x", bytes(16), bytes(24), b"\xff" * MAX_HANDLE_BYTES])
    def test_garbage_handle_is_refused(self, server: TransportServer, client: Transport, handle: bytes) -> None:
        """Of any length."""
        offer, _ = self.offered(server, 1, 8 * KIB)
        self.assert_refused(client, msgspec.structs.replace(offer, handle=handle))
        self.assert_works(server, client)

    def test_handle_of_another_server_is_refused(self, server: TransportServer, client: Transport) -> None:
        """As after a restart under the same address."""
        other = self.make_server()
        try:
            offer, _ = self.offered(other, 1, 8 * KIB)
            self.assert_refused(client, offer)
        finally:
            other.close()
        self.assert_works(server, client)

    def test_revoked_handle_is_refused(self, server: TransportServer, client: Transport) -> None:
        """Others stay good; revoking again, or what never was, is ignored."""
        offer, _ = self.offered(server, 1, MIB)
        kept, data = self.offered(server, 2, MIB)
        for handle in (offer.handle, offer.handle, b"", b"never offered", bytes(24)):
            server.revoke(handle)
        self.assert_refused(client, offer)
        into = self.room(client, MIB)
        client.pull(kept, into, stop_s=soon())
        assert into == data

    def test_expired_handle_is_refused(self, server: TransportServer, client: Transport) -> None:
        """Also when nobody has revoked it."""
        record = self.place(server, sample_payload(1, MIB))
        lifetime_s = 0.05
        offer = self.offer_of(server, record, lifetime_s=lifetime_s)
        expired_s = time.monotonic() + lifetime_s
        wait_until(lambda: time.monotonic() > expired_s, what="the offer to expire")
        self.assert_refused(client, offer)
        self.assert_works(server, client)

    def test_second_pull_is_right_or_refused(self, server: TransportServer, client: Transport) -> None:
        """A used-up handle is refused; until then it brings the same bytes."""
        offer, data = self.offered(server, 1, MIB)
        into = self.room(client, MIB)
        client.pull(offer, into, stop_s=soon())
        for _ in range(64):
            into[:] = bytes(MIB)
            try:
                client.pull(offer, into, stop_s=soon())
            except OfferRefusedError:
                assert into == bytes(MIB)
                break
            assert into == data
        self.assert_works(server, client)

    @pytest.mark.parametrize("num_bytes", [4 * KIB, MIB - 1, MIB + 4 * KIB])
    def test_wrong_length_never_succeeds(self, server: TransportServer, client: Transport, num_bytes: int) -> None:
        """An offer that claims more or less than was leased."""
        offer, _ = self.offered(server, 1, MIB)
        wrong = msgspec.structs.replace(offer, stored_bytes=num_bytes)
        with pytest.raises(DataError):
            client.pull(wrong, self.room(client, num_bytes), stop_s=soon())
        self.assert_works(server, client)

    @pytest.mark.parametrize("num_bytes", [0, MIB - 1, MIB + 1])
    def test_landing_buffer_of_another_length_is_a_bug(
        self, server: TransportServer, client: Transport, num_bytes: int
    ) -> None:
        """Of the caller's; nothing is asked of the peer."""
        offer, _ = self.offered(server, 1, MIB)
        with pytest.raises(CallerError):
            client.pull(offer, self.room(client, num_bytes), stop_s=soon())
        self.assert_works(server, client)

    # Time, and ends that go.

    def test_deadline_that_has_passed(self, server: TransportServer, client: Transport) -> None:
        """Ends at once, and writes nothing."""
        offer, _ = self.offered(server, 1, MIB)
        into = self.room(client, MIB)
        into[:] = bytes([_MARK]) * MIB
        start_s = time.monotonic()
        with pytest.raises(PeerGoneError):
            client.pull(offer, into, stop_s=start_s - 1.0)
        assert time.monotonic() - start_s < LATE_S
        assert into == bytes([_MARK]) * MIB
        self.assert_works(server, client)

    def test_deadline_passes_in_the_middle(self, server: TransportServer, client: Transport) -> None:
        """The rest is not waited for, and what came late is not written later."""
        num_bytes = 64 * MIB
        offer, _ = self.offered(server, 1, num_bytes)
        into = self.room(client, num_bytes)
        stop_s = time.monotonic() + 0.3
        told: list[int] = []

        def on_bytes(in_place: int) -> None:
            told.append(in_place)
            wait_until(lambda: time.monotonic() > stop_s, what="the deadline to pass")

        with pytest.raises(PeerGoneError):
            client.pull(offer, into, stop_s=stop_s, on_bytes=on_bytes)
        assert time.monotonic() - stop_s < LATE_S
        assert len(told) == 1
        self.assert_untouched_after(into, lambda: self.assert_works(server, client))

    def test_close_during_a_pull(self, server: TransportServer, client: Transport) -> None:
        """The pull raises, and `into` belongs to the caller again."""
        into, error = self.interrupted(server, client, client.close)
        assert isinstance(error, PeerGoneError), error
        self.assert_untouched_after(into, server.close)
        offer = Offer(transport=client.name, handle=bytes(24), stored_bytes=8 * KIB)
        with pytest.raises(UnavailableError):
            client.pull(offer, into[: 8 * KIB], stop_s=soon())

    def test_server_closed_during_a_pull(self, server: TransportServer, client: Transport) -> None:
        """An error in time."""
        into, error = self.interrupted(server, client, server.close)
        assert isinstance(error, LearnonceError), error
        self.assert_untouched_after(into, client.close)

    def test_revoke_during_a_pull(self, server: TransportServer, client: Transport) -> None:
        """Once `revoke` has returned, new bytes in the record's memory reach nobody: the old ones, or an error."""
        num_bytes = 64 * MIB
        data = sample_payload(1, num_bytes)
        record = self.place(server, data)
        offer = self.offer_of(server, record)

        def revoke() -> None:
            server.revoke(offer.handle)
            record[:] = bytes([_MARK]) * num_bytes

        into, error = self.interrupted(server, client, revoke, offer=offer)
        assert isinstance(error, LearnonceError) or into == data, error
        self.assert_works(server, client)

    # Steps of the tests above.

    def offer_of(self, server: TransportServer, record: memoryview, *, lifetime_s: float = 60.0) -> Offer:
        """Offer a placed record."""
        offer = server.offer(record, peer="puller", lifetime_s=lifetime_s)
        assert offer is not None
        return offer

    def offered(self, server: TransportServer, seed: int, num_bytes: int) -> tuple[Offer, bytes]:
        """A new record, offered; and its bytes."""
        data = sample_payload(seed, num_bytes)
        return self.offer_of(server, self.place(server, data)), data

    def assert_works(self, server: TransportServer, client: Transport) -> None:
        """One good transfer: nothing before it has broken the path."""
        offer, data = self.offered(server, 99, 68 * KIB)
        into = self.room(client, 68 * KIB)
        client.pull(offer, into, stop_s=soon())
        assert into == data
        server.revoke(offer.handle)

    def assert_refused(self, client: Transport, offer: Offer) -> None:
        """And nothing is written."""
        into = self.room(client, offer.stored_bytes)
        into[:] = bytes([_MARK]) * offer.stored_bytes
        with pytest.raises(OfferRefusedError):
            client.pull(offer, into, stop_s=soon())
        assert into == bytes([_MARK]) * offer.stored_bytes

    def assert_untouched_after(self, into: memoryview, act: Callable[[], object]) -> None:
        """Nothing writes to `into` any more, whatever happens."""
        into[:] = bytes([_MARK]) * len(into)
        act()
        assert into == bytes([_MARK]) * len(into)

    def interrupted(
        self, server: TransportServer, client: Transport, act: Callable[[], object], *, offer: Offer | None = None
    ) -> tuple[memoryview, BaseException | None]:
        """Pull 64 MiB, with `act` on another thread as soon as the first bytes are in place; what came of it."""
        if offer is None:
            offer, _ = self.offered(server, 1, 64 * MIB)
        into = self.room(client, offer.stored_bytes)
        has_begun, acts = threading.Event(), threading.Event()
        errors: list[BaseException] = []

        def on_bytes(in_place: int) -> None:
            has_begun.set()
            # The rest comes in the company of `act`, which has a head start.
            acts.wait(0.1)

        def pull() -> None:
            try:
                client.pull(offer, into, stop_s=soon(), on_bytes=on_bytes)
            except BaseException as error:
                # Handed to the test, which says what it must be.
                errors.append(error)
            finally:
                has_begun.set()

        thread = threading.Thread(target=pull)
        thread.start()
        assert has_begun.wait(SOON_S)
        start_s = time.monotonic()
        act()
        acts.set()
        thread.join(SOON_S)
        assert not thread.is_alive()
        assert time.monotonic() - start_s < LATE_S * 2
        return into, errors[0] if errors else None


def soon() -> float:
    """Monotonic deadline of what must work."""
    return time.monotonic() + SOON_S


def open_things() -> "Things":
    """What this process holds now."""
    threads = sum(thread.name.startswith("kvstore") for thread in threading.enumerate())
    return Things(len(os.listdir("/proc/self/fd")), threads)


@dataclass(frozen=True, slots=True)
class Things:
    """Descriptors and threads of a process."""

    descriptors: int
    threads: int

    def is_within(self, other: "Things") -> bool:
        """Whether neither count is above the other's."""
        return self.descriptors <= other.descriptors and self.threads <= other.threads
