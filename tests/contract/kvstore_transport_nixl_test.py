"""The contract of transports, for NIXL: two real agents in two sidecars, over UCX's TCP on the loopback device.

Starting a sidecar takes a second, so services are lent to the tests and go back into a pool; what a test opens beside
them is still checked.
"""

import importlib.util
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from cluster.errors import LearnonceError
from kvstore.testing.poll import wait_until
from kvstore.testing.samples import sample_payload
from kvstore.testing.transport import LATE_S, MIB, TransportContract, open_things, soon
from kvstore.testing.transport_nixl import NETWORK, OwnServer, nixl_service, sidecar_pids
from kvstore.transport import OfferRefusedError, PeerGoneError, Transport, TransportServer
from kvstore.transport.nixl import NixlServer, NixlService, NixlTransport
from kvstore.transport.nixl_staging import SlotState

pytestmark = pytest.mark.skipif(importlib.util.find_spec("nixl_cu12") is None, reason="nixl-cu12 is not installed")


class LentServer(NixlServer):
    """A holder's end whose service goes back to the pool when it is closed."""

    def __init__(self, service: NixlService, pool: list[NixlService]) -> None:
        super().__init__(service)
        self.service = service
        self._pool = pool

    def close(self) -> None:
        super().close()
        if self.service not in self._pool:
            self._pool.append(self.service)


@dataclass
class Services:
    pool: list[NixlService]
    """Of holders that no test uses now."""
    puller: NixlService


@pytest.fixture(scope="module")
def services() -> Iterator[Services]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in NETWORK.items():
            patch.setenv(name, value)
        services = Services([nixl_service("holder-a"), nixl_service("holder-b")], nixl_service("puller"))
        yield services
        assert len(services.pool) == 2
        for service in [*services.pool, services.puller]:
            service.close()
        assert sidecar_pids() == []


class TestNixlTransport(TransportContract):
    pool: list[NixlService]
    puller: NixlService

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self, services: Services) -> Iterator[None]:
        """As the contract's, after the services have started."""
        self.pool, self.puller = services.pool, services.puller
        before = open_things()
        yield
        wait_until(lambda: open_things().is_within(before), what=f"no more than {before} to be open")
        assert self.leftovers() == []

    def make_server(self) -> TransportServer:
        return LentServer(self.pool.pop(), self.pool)

    def make_client(self, server: TransportServer) -> Transport:
        return NixlTransport(self.puller, address=server.address)

    def leftovers(self) -> list[str]:
        """Slots in use and offers, once reads that were given up have ended; failed ones stay in quarantine."""

        def used() -> list[str]:
            with self.puller.lock:
                (life,) = self.puller._lives
                slots = sum(slot.state is SlotState.POSTED for slot in life.staging.slots)
                found = [f"{slots} landing slots"] if slots else []
                found += [f"{len(life.reads)} reads"] if life.reads else []
            for service in self.pool:
                with service.lock:
                    found += [f"{len(life.offers)} offers" for life in service._lives if life.offers]
            return found

        wait_until(lambda: not used(), what=f"nothing to be in use: {used()}")
        return used()

    def test_expired_handle_is_refused(self, server: TransportServer, client: Transport) -> None:
        """Nobody is asked at the holder's end: the offer is wiped when its time is over, and refused from then on."""
        record = self.place(server, sample_payload(1, MIB))
        offer = self.offer_of(server, record, lifetime_s=0.05)
        expired_s = time.monotonic() + 0.05
        into = self.room(client, MIB)

        def is_refused() -> bool:
            try:
                client.pull(offer, into, stop_s=soon())
            except OfferRefusedError:
                return True
            assert into == sample_payload(1, MIB)
            return False

        wait_until(is_refused, what="the offer to expire")
        assert time.monotonic() - expired_s < LATE_S
        self.assert_refused(client, offer)
        self.assert_works(server, client)

    def test_server_closed_during_a_pull(self, server: TransportServer, client: Transport) -> None:
        """With its sidecar: an error in time. (Without, a pull that is nearly done may end well.)"""
        own = OwnServer(nixl_service("holder-c"))
        other = NixlTransport(self.puller, address=own.address)
        into, error = self.interrupted(own, other, own.close)
        assert isinstance(error, LearnonceError), error
        self.assert_untouched_after(into, other.close)

    def test_revoked_in_the_middle_is_refused_or_right(self, server: TransportServer, client: Transport) -> None:
        """Also when the record's room has been given to another one: the bytes are old, or refused."""
        size = 64 * MIB
        offer, data = self.offered(server, 1, size)
        into = self.room(client, size)
        told: list[int] = []

        def on_bytes(in_place: int) -> None:
            assert into[(told or [0])[-1] : in_place] == data[(told or [0])[-1] : in_place]
            told.append(in_place)
            if len(told) == 2:
                server.revoke(offer.handle)
                wait_until(lambda: self.overwrite(server, size), what="the room to be used again")

        with pytest.raises(OfferRefusedError):
            client.pull(offer, into, stop_s=soon(), on_bytes=on_bytes)
        assert len(told) < 20

    def overwrite(self, server: TransportServer, num_bytes: int) -> bool:
        """Fill all room with another record's bytes until there is none left."""
        filled = []
        record = memoryview(bytes([0x33]) * num_bytes)
        while (offer := server.offer(record, peer="other", lifetime_s=60.0)) is not None:
            filled.append(offer)
        for offer in filled:
            server.revoke(offer.handle)
        return len(filled) == 7

    def test_peer_without_an_agent(self, server: TransportServer) -> None:
        """Is as good as gone; negotiation should have seen that its address is empty."""
        server.close()
        assert server.address == b""
        with pytest.raises(PeerGoneError):
            NixlTransport(self.puller, address=server.address)
